"""Text to train and test on: the standard library beside the interpreter, the Linux kernel, or any folder.

A document's side of the split follows from a hash of its relative path, so it does not change when others are added.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from logpe.lm.text import TEST_SHARE, Document, folder

MIN_BYTES = 1024  # shorter documents are left out


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their paths, and what identifies them."""

    name: str
    train: list[Document]
    test: list[Document]
    digest: str  # sha256 over every document's path and content

    def describe(self) -> dict[str, object]:
        """Name, digest and sizes, for the record."""
        sides = {"train": self.train, "test": self.test}
        sizes = {side: {"documents": len(d), "bytes": sum(len(x.text) for x in d)} for side, d in sides.items()}
        return {"name": self.name, "sha256": self.digest, "min_document_bytes": MIN_BYTES, **sizes}


def standard_library() -> Iterator[Document]:
    """Python source beside the interpreter, and the articles behind help() as text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages"} & set(name.parts) and name.parts[0] != "pydoc_data":
            yield Document(name.as_posix(), path.read_bytes())
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return
    for topic, text in topics.items():
        yield Document(f"pydoc_data/topics/{topic}", text.encode())


LINUX_HELP = """Debian's package of the kernel source (1.4 GB unpacked) needs no installation:
  apt-get download linux-source-6.1 && dpkg -x linux-source-6.1_*.deb . && tar -xf usr/src/linux-source-6.1.tar.xz
"""


def find_linux() -> Path:
    """The newest linux-source-* folder here or in /usr/src. Raises ValueError that says how to get one."""
    found = [path for place in (Path(), Path("/usr/src")) for path in place.glob("linux-source-*") if path.is_dir()]
    if not found:
        raise ValueError(f"no folder linux-source-* here or in /usr/src. {LINUX_HELP}")
    return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def linux_name(root: Path) -> str:
    """With the version that its Makefile states."""
    makefile = root / "Makefile"
    text = makefile.read_text() if makefile.is_file() else ""
    return ".".join([root.name, *re.findall(r"^SUBLEVEL = (\d+)", text, re.MULTILINE)])


def load(source: str) -> Corpus:
    """`source`: "stdlib", "linux", "linux-docs" or a folder. Copies of a document are dropped.

    Raises ValueError where there is no such folder, or a side of the split stays empty.
    """
    if source == "stdlib":
        name, found = source, standard_library()
    elif source in ("linux", "linux-docs"):
        root = find_linux()
        documentation = source == "linux-docs"
        name = linux_name(root) + (" documentation" if documentation else "")
        found = folder(root / "Documentation") if documentation else folder(root, (".c", ".h"))
    else:
        name, found = Path(source).resolve().name, folder(Path(source))
    documents: dict[bytes, Document] = {}  # by content
    for document in sorted(found, key=lambda d: d.name):
        if len(document.text) >= MIN_BYTES:
            documents.setdefault(hashlib.sha256(document.text).digest(), document)
    digest = hashlib.sha256()
    for content, document in documents.items():
        digest.update(document.name + b"\0" + content)
    train = [d for d in documents.values() if d.hash % TEST_SHARE]
    test = [d for d in documents.values() if d.hash % TEST_SHARE == 0]
    if not train or not test:
        raise ValueError(
            f"{source}: {len(train)} documents to train on, {len(test)} to test on; each needs one or more"
        )
    return Corpus(name, train, test, digest.hexdigest())


def as_tensor(text: bytes) -> Tensor:
    """uint8 (len(text),)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Sampler:
    """Draws windows that lie within one document, every start equally likely."""

    def __init__(self, documents: list[Document], length: int) -> None:
        documents = [d for d in documents if len(d.text) >= length]
        if not documents:
            raise ValueError(f"no document has {length} bytes to train on")
        sizes = torch.tensor([len(d.text) for d in documents])
        self.text = as_tensor(b"".join(d.text for d in documents))
        self.ends = (sizes - length + 1).cumsum(0)  # of each document's run of starts
        self.skipped = torch.arange(len(sizes)) * (length - 1)  # bytes before it in which no window starts
        self.span = torch.arange(length)

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """int64 (batch, length)."""
        draw = torch.randint(int(self.ends[-1]), (batch,), generator=generator)
        start = draw + self.skipped[torch.searchsorted(self.ends, draw, right=True)]
        return self.text[start[:, None] + self.span].long()


def windows(documents: list[Document], length: int, count: int) -> Tensor:
    """int64 (count or fewer, length): windows that do not overlap, from as many documents as there are."""
    candidates = []
    for document in documents:
        fit, slack = divmod(len(document.text), length)
        first = document.hash // TEST_SHARE % (slack + 1)
        candidates += [(turn, document.hash, document.text, first + turn * length) for turn in range(fit)]
    if not candidates:
        raise ValueError(f"no held-out document has {length} bytes")
    chosen = sorted(candidates, key=lambda c: c[:2])[:count]
    return torch.stack([as_tensor(text[start : start + length]) for _, _, text, start in chosen]).long()
