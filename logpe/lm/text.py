"""Text for a language model: documents, their split, their tokens, and the windows that a model reads.

A document's side of the split follows from a hash of its path, so it does not change when others are added.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from logpe.files import save_tensors, write_whole

TEST_SHARE = 10  # one document in ten is held out

Item = TypeVar("Item")


def stable_hash(data: bytes) -> int:
    """Return 64 bits of the SHA-256 of ``data``: chance that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


@dataclass(frozen=True)
class Document:
    """A text: its path relative to the corpus, with slashes, and its bytes.

    Names of files are bytes: those that are no text stand in ``path`` as os.fsdecode returns them.
    """

    path: str
    text: bytes

    @property
    def tokens(self) -> Tensor:
        """The bytes, uint8 (len(text),)."""
        return bytes_tensor(self.text)

    @property
    def name(self) -> bytes:
        """The path as the file system has it."""
        return os.fsencode(self.path)

    @property
    def hash(self) -> int:
        """The stable_hash of the path, from which the document's side of the split follows."""
        return stable_hash(self.name)

    @property
    def held_out(self) -> bool:
        """Whether models are tested on it; they are trained on the others."""
        return self.hash % TEST_SHARE == 0


class Skipped:
    """What is left out of a text, and why."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}  # by reason

    def add(self, reason: str, name: str) -> None:
        """Count one more file, folder or row."""
        self.names.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Return one line for each reason, with the first names."""
        lines = []
        for reason, names in self.names.items():
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            lines.append(f"left out, {reason}: {', '.join(map(_printable, names[:3]))}{more}")
        return lines


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _progress(items: Iterable[Item] | None, quiet: bool, **options: Any) -> Any:
    """Return a bar that goes when it is full; in a file, it writes a line each 15 seconds."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(items, disable=quiet, leave=False, dynamic_ncols=True, mininterval=interval, **options)


# --- reading ----------------------------------------------------------------------------------------------------------


def folder(
    root: Path,
    suffixes: tuple[str, ...] = ("",),
    skipped: Skipped | None = None,
    out: Path | None = None,
    quiet: bool = True,
) -> Iterator[Document]:
    """Yield every text file under ``root`` whose name ends in one of ``suffixes``; hidden ones are left out.

    A file with a zero byte is no text. Links to folders are followed, and each folder is read once.

    Args:
        skipped: gets what is left out, and why. Without it, a warning names what cannot be read.
        out: a folder to leave out. Those of other trainings are left out too.
        quiet: show no progress.

    Raises:
        OSError: ``root`` itself cannot be read.
    """
    left = Skipped() if skipped is None else skipped
    for name in _progress(list(_files(root, left, out)), quiet, desc="reading", unit="file", delay=0.5):
        if not name.endswith(suffixes):
            continue
        if os.path.basename(name).startswith("."):
            left.add("hidden", name)
            continue
        try:
            path = os.path.join(root, name)
            if not stat.S_ISREG(os.stat(path).st_mode):
                left.add("not a file", name)
                continue
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            left.add(f"cannot be read ({error.strerror})", name)
            continue
        if b"\0" in text:
            left.add("a zero byte is no text", name)
        else:
            yield Document(name.replace(os.sep, "/"), text)
    if skipped is None:
        left.names = {reason: names for reason, names in left.names.items() if reason.startswith("cannot be read")}
        for line in left.lines():
            warnings.warn(f"{root}: {line}", stacklevel=2)


def _files(root: Path, skipped: Skipped, out: Path | None) -> Iterator[str]:
    """Yield the paths, relative to ``root``, of all that is no folder."""

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        skipped.add(f"cannot be read ({error.strerror})", os.path.relpath(error.filename, root))

    seen: set[tuple[int, int]] = set()
    waiting = [str(root)]  # links wait, so that a folder inside keeps the name that it has without them
    while waiting:
        for top, folders, files in os.walk(waiting.pop(0), onerror=unreadable):
            here = os.stat(top)
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            kept = []
            for folder_name in sorted(folders):
                path = os.path.join(top, folder_name)
                name = os.path.relpath(path, root)
                if folder_name.startswith("."):
                    skipped.add("hidden", name)
                elif _is_output(path, out):
                    skipped.add("the output of a training", name)
                elif not os.path.islink(path):
                    kept.append(folder_name)
                elif Path(os.path.realpath(root)).is_relative_to(os.path.realpath(path)):
                    skipped.add("a link to a folder around the text", name)
                else:
                    waiting.append(path)
            folders[:] = kept
            yield from (os.path.relpath(os.path.join(top, file), root) for file in sorted(files))


def _is_output(path: str, out: Path | None) -> bool:
    """Whether a folder is ``out``, or one that ``python -m logpe train`` wrote to."""
    if out is not None and os.path.realpath(path) == os.path.realpath(out):
        return True
    return all(os.path.isfile(os.path.join(path, name)) for name in ("tokens.safetensors", "metrics.jsonl"))


def dataset(
    root: Path, split: str, column: str, skipped: Skipped | None = None, quiet: bool = True
) -> Iterator[Document]:
    """Yield the rows of a dataset that ``save_to_disk`` of the library ``datasets`` wrote.

    ``skipped`` gets the rows that are None. Raises ValueError where a row is neither None nor a string.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{root} is a Hugging Face dataset: pip install datasets") from None
    rows: Any = datasets.load_from_disk(str(root))
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"--split must be one of {', '.join(rows)} in {root}, got {split!r}")
        rows = rows[split]
    if column not in rows.column_names:
        raise ValueError(f"--column must be one of {', '.join(rows.column_names)} in {root}, got {column!r}")
    skipped = skipped or Skipped()
    for index, text in enumerate(_progress(rows[column], quiet, desc="reading", unit="row", delay=0.5)):
        name = f"{split}/{index}"
        if text is None:
            skipped.add("no text in the row", name)
        elif not isinstance(text, str):
            raise ValueError(f"--column must hold text, got {column!r} in {root}: {type(text).__name__} in row {index}")
        else:
            content = text.encode(errors="replace")
            if b"\0" in content:  # it ends a document
                skipped.add("zero bytes of the row", name)
            yield Document(name, content.replace(b"\0", b""))


def documents(
    sources: Iterable[Path],
    split: str = "train",
    column: str = "text",
    skipped: Skipped | None = None,
    out: Path | None = None,
    quiet: bool = True,
) -> list[Document]:
    """Return the documents of files, folders and datasets on disk, in order of the paths.

    Empty ones and copies are left out.

    Args:
        skipped: gets what is left out, and why.
        out: a folder to leave out.
        quiet: show no progress.

    Raises:
        ValueError: there is none.
        OSError: a source cannot be read.
    """
    skipped, sources = skipped or Skipped(), list(sources)
    read: list[Document] = []
    for source in sources:
        if source.is_file():
            text = source.read_bytes()
            if b"\0" in text:
                raise ValueError(f"{source} is no text: it holds a zero byte")
            read.append(Document(source.name, text))
        elif any((source / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            read += dataset(source, split, column, skipped, quiet)
        elif source.is_dir():
            read += folder(source, skipped=skipped, out=out, quiet=quiet)
        else:
            raise ValueError(f"there is no file or folder {source}")
    if not (kept := distinct(read, skipped=skipped)):
        reasons = "".join(f"\n  {line}" for line in skipped.lines())
        raise ValueError(f"there is no text in {', '.join(map(str, sources))}{reasons}")
    return kept


def distinct(corpus: Iterable[Document], least: int = 1, skipped: Skipped | None = None) -> list[Document]:
    """Return documents in order of their paths, without copies of earlier ones and those of fewer bytes than ``least``.

    Args:
        skipped: gets what is left out.
    """
    skipped = skipped or Skipped()
    kept: dict[bytes, Document] = {}  # by content
    for document in sorted(corpus, key=lambda d: d.name):
        if len(document.text) < least:
            skipped.add("too short" if document.text else "empty", document.path)
        elif (digest := hashlib.sha256(document.text).digest()) in kept:
            skipped.add("a copy of another", document.path)
        else:
            kept[digest] = document
    return list(kept.values())


def split_documents(corpus: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on, and those held out."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in corpus:
        sides[document.held_out].append(document)
    return sides


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, each document followed by the id that ends it: 0 for bytes, a new one for other tokens.

    train: uint8 or int32 (N,). test: likewise (M,), the held-out documents. test_ends: int64, where each of them ends.
    """

    train: Tensor
    test: Tensor
    test_ends: Tensor
    vocabulary: int
    origin: dict[str, Any]  # what it was made from, and how
    sha256: str  # of the tokens


def describe_origin(sources: list[Path], tokenizer: Path | None, split: str, column: str) -> dict[str, Any]:
    """Return what stands in Tokens.origin. Raises OSError where there is no such tokenizer."""
    name = None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    paths = [str(source.resolve()) for source in sources]
    return dict(source=paths if len(paths) > 1 else paths[0], tokenizer=name, split=split, column=column)


class Encoder:
    """Turns bytes into tokens, int32 or uint8 (N,), and counts what is lost on the way.

    Args:
        tokenizer: a file of the library tokenizers, or None for bytes. It neither truncates nor pads here.

    Raises:
        ValueError: it is no such file, or the library is not installed.
    """

    end: int  # id of the token that ends a document, the last one

    def __init__(self, tokenizer: Path | None) -> None:
        self.tokenizer: Any = None
        self.end, self.skipped = 0, Skipped()
        self.unknown = 0  # tokens that stand for text that the tokenizer does not know
        self.characters: Counter[str] = Counter()
        if tokenizer is None:
            return
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("--tokenizer needs the library tokenizers: pip install tokenizers") from None
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # it raises nothing more special
            raise ValueError(f"--tokenizer {tokenizer} is not a file of the library tokenizers: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.end = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.unknown_id = None if unknown is None else self.tokenizer.token_to_id(unknown)

    def __call__(self, document: Document) -> Tensor:
        """Return the tokens of a document, without the one that ends it."""
        if self.tokenizer is None:
            return bytes_tensor(document.text)
        try:
            text = document.text.decode()
        except UnicodeDecodeError:
            self.skipped.add("bytes that are no UTF-8", document.path)
            text = document.text.decode(errors="replace")
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)
        if self.unknown_id is not None:
            self.unknown += int((ids == self.unknown_id).sum())
        self.characters.update(text)
        return ids

    def lines(self) -> list[str]:
        """Return what to tell about the text that was lost."""
        lines = self.skipped.lines()
        lost = {
            character: number for character, number in self.characters.items()
            if not character.isspace() and not self.tokenizer.encode(character, add_special_tokens=False).ids
        }  # fmt: skip
        if lost:
            some = ", ".join(map(ascii, sorted(lost, key=lost.__getitem__, reverse=True)[:3]))
            number = sum(lost.values())
            lines.append(f"left out, characters that --tokenizer has no token for: {number:,}, such as {some}")
        if self.unknown:
            lines.append(f"--tokenizer makes {self.unknown:,} tokens of text that it does not know")
        return lines


def write_tokens(
    path: Path,
    sources: list[Path],
    tokenizer: Path | None,
    split: str = "train",
    column: str = "text",
    *,
    end: int | None = None,
    vocabulary: int | None = None,
    out: Path | None = None,
    say: Callable[[str], object] | None = None,
) -> None:
    """Write the tokens of ``sources`` to the file ``path``, from which any number of processes map them into memory.

    Where the hash leaves a side without a document, as it does with a single one, the last tenth of every document
    is held out.

    Args:
        end, vocabulary: of a given model, the id that ends a document and the number of ids. By default the end is a
            new id, the last one (for bytes it is 0).
        out: a folder to leave out.
        say: gets lines that tell what was read, and what was not. Without it, no progress is shown.

    Raises:
        ValueError: there is no text, or the vocabulary is too small for it.
        OSError: a source cannot be read, or ``path`` not be written.
    """
    encode, skipped, quiet = Encoder(tokenizer), Skipped(), say is None
    corpus = documents(sources, split, column, skipped, out, quiet)
    size = sum(len(d.text) for d in corpus)
    if say is not None:
        say(f"read {len(corpus):,} documents, {size:,} bytes")
        for line in skipped.lines():
            say(line)
    end = encode.end if end is None else end
    vocabulary = vocabulary or (256 if tokenizer is None else end + 1)
    train, test = split_documents(corpus)
    test.sort(key=lambda d: d.hash)  # which documents an evaluation takes first is left to chance
    with _progress(None, quiet or tokenizer is None, total=size, desc="tokenising", unit="B", unit_scale=True) as bar:

        def encoded(side: list[Document]) -> list[Tensor]:
            tokens = []
            for document in side:
                tokens.append(encode(document))
                bar.update(len(document.text))
            return tokens

        if train and test:
            sides = [encoded(train), encoded(test)]
        else:
            whole = encoded(corpus)
            cuts = [len(tokens) - len(tokens) // TEST_SHARE for tokens in whole]
            halves = [tokens.tensor_split([cut]) for tokens, cut in zip(whole, cuts, strict=True)]
            sides = [list(side) for side in zip(*halves, strict=True)]
    if say is not None:
        for line in encode.lines():
            say(line)
    largest = max((int(tokens.max()) for side in sides for tokens in side if len(tokens)), default=0)
    if max(largest, end) >= vocabulary:
        raise ValueError(f"the tokens reach {max(largest, end)}, and the model has a vocabulary of {vocabulary}")
    ends = torch.tensor([len(tokens) + 1 for tokens in sides[1]]).cumsum(0)
    stop = torch.tensor([end], dtype=sides[0][0].dtype)
    joined = [torch.cat([part for tokens in side for part in (tokens, stop)]) for side in sides]
    tensors = {"train": joined[0], "test": joined[1], "test_ends": ends}
    origin = describe_origin(sources, tokenizer, split, column)
    about = dict(vocabulary=vocabulary, origin=origin, sha256=_digest(*tensors.values()))
    write_whole(path, lambda temporary: save_tensors(tensors, temporary, {"about": json.dumps(about)}))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(len(tensor).to_bytes(8, "big"))
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def load_tokens(path: Path, check: bool = False) -> Tokens:
    """Return what ``write_tokens`` wrote. Raises OSError, and ValueError where it is damaged.

    Args:
        check: compare the digest too, which finds a single wrong bit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tokens = Tokens(**{name: file.get_tensor(name) for name in ("train", "test", "test_ends")}, **about)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if check and _digest(tokens.train, tokens.test, tokens.test_ends) != tokens.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 differs")
    return tokens


# --- windows ----------------------------------------------------------------------------------------------------------


class Windows:
    """Windows of ``length`` tokens and the one after them, in an order that a seed gives, endlessly.

    Each pass over the tokens cuts them at another place and takes every window once. A window's number alone says
    what it holds: any process may ask for any part, in any order.

    Raises ValueError where not a single window fits.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        if len(tokens) <= length:
            raise ValueError(
                f"a window of --length {length} takes {length + 1:,} tokens, and there are {len(tokens):,} to train on"
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = max(1, (len(tokens) - length) // length)  # in a pass
        self.slack = min(length, len(tokens) - self.count * length)
        self.span = torch.arange(length + 1)
        self._starts = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, turn: int) -> Tensor:
        """Return where the windows of a pass start, int64 (count,)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + turn)
        first = torch.randint(self.slack, (), generator=generator)
        return first + self.length * torch.randperm(self.count, generator=generator)

    def __call__(self, numbers: range) -> Tensor:
        """Return the windows of these numbers, int64 (len(numbers), length + 1)."""
        starts = torch.stack([self._starts(n // self.count)[n % self.count] for n in numbers])
        return self.tokens[starts[:, None] + self.span].long()


class Sampler:
    """Draws windows that lie within one document, every start equally likely.

    Args:
        documents: their bytes are the tokens; those shorter than a window are left out.
        length: bytes of a window.

    Raises ValueError where no document is long enough.
    """

    def __init__(self, documents: list[Document], length: int) -> None:
        texts = [x for d in documents if len(x := d.tokens) >= length]
        if not texts:
            raise ValueError(f"no document has {length} bytes to train on")
        sizes = torch.tensor([len(x) for x in texts])
        self.text = torch.cat(texts)
        self.ends = (sizes - length + 1).cumsum(0)  # of each document's run of starts
        self.skipped = torch.arange(len(sizes)) * (length - 1)  # bytes before it in which no window starts
        self.span = torch.arange(length)

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return int64 (batch, length)."""
        draw = torch.randint(int(self.ends[-1]), (batch,), generator=generator)
        start = draw + self.skipped[torch.searchsorted(self.ends, draw, right=True)]
        return self.text[start[:, None] + self.span].long()


def bytes_tensor(data: bytes) -> Tensor:
    """Return uint8 (len(data),)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def spread(sizes: Sequence[int], length: int, count: int) -> list[tuple[int, int]]:
    """Choose windows of ``length`` that do not overlap, from as many documents as there are.

    Args:
        sizes: of the documents, in the order in which they take turns.
        count: the most windows.

    Returns:
        For each window, the number of its document, and how many windows of that document come before it.
    """
    turns = sorted((turn, i) for i, size in enumerate(sizes) for turn in range(size // length))
    return [(i, turn) for turn, i in turns[:count]]


def document_windows(documents: Iterable[Document], length: int, count: int) -> Tensor:
    """Return windows as ``spread`` chooses them, int64 (count or fewer, length); the first of each starts by chance.

    Raises ValueError where no document is long enough.
    """
    documents = sorted(documents, key=lambda d: d.hash)
    texts = [d.tokens for d in documents]
    chosen = spread([len(x) for x in texts], length, count)
    if not chosen:
        raise ValueError(f"no held-out document has {length} bytes")
    rows = []
    for i, turn in chosen:
        start = documents[i].hash // TEST_SHARE % (len(texts[i]) % length + 1) + turn * length
        rows.append(texts[i][start : start + length])
    return torch.stack(rows).long()


def held_out_windows(tokens: Tokens, lengths: list[int], count: int) -> tuple[Tensor, list[int]]:
    """Return windows of held-out text for as many of the lengths as it has room for.

    Returns:
        int64 (count or fewer, longest length + 1), windows as ``spread`` chooses them; and the lengths. Windows lie
        within a document, unless there is none as long as the shortest length: then the documents count as one.

    Raises ValueError where not even one window fits.
    """
    ends = tokens.test_ends
    longest = int(ends.diff(prepend=ends.new_zeros(1)).max())
    if longest <= min(lengths):
        ends = ends[-1:]
        longest = int(ends[-1])
    fitting = [n for n in lengths if n < longest]
    if not fitting:
        raise ValueError(
            f"the shortest length to evaluate at is {min(lengths)}, and there are {longest:,} tokens of held-out text"
        )
    size = max(fitting) + 1
    starts = [0, *ends[:-1].tolist()]
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    places = torch.tensor([starts[i] + turn * size for i, turn in spread(sizes, size, count)])
    return tokens.test[places[:, None] + torch.arange(size)].long(), fitting
