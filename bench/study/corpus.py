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

from logpe.lm import text
from logpe.lm.text import Document

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
    for topic, article in topics.items():
        yield Document(f"pydoc_data/topics/{topic}", article.encode())


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
    lines = makefile.read_text() if makefile.is_file() else ""
    return ".".join([root.name, *re.findall(r"^SUBLEVEL = (\d+)", lines, re.MULTILINE)])


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
        found = text.folder(root / "Documentation") if documentation else text.folder(root, (".c", ".h"))
    else:
        name, found = Path(source).resolve().name, text.folder(Path(source))
    documents = text.distinct(found, MIN_BYTES)
    train, test = text.split_documents(documents)
    if not train or not test:
        raise ValueError(
            f"{source}: {len(train)} documents to train on, {len(test)} to test on; each needs one or more"
        )
    digest = hashlib.sha256(b"".join(d.name + b"\0" + hashlib.sha256(d.text).digest() for d in documents))
    return Corpus(name, train, test, digest.hexdigest())
