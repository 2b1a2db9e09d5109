"""Text for a language model: documents, their split, their tokens, and the windows that a model reads.

A document's side of the split follows from a hash of its path, so it does not change when others are added.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logpe.checkpoint import write_whole

TEST_SHARE = 10  # one document in ten is held out


@dataclass(frozen=True)
class Document:
    """Its path relative to the corpus, with slashes, and its bytes."""

    path: str
    text: bytes

    @property
    def hash(self) -> int:
        """Of the path: chance that is the same everywhere."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big")


# --- reading ----------------------------------------------------------------------------------------------------------


def folder(root: Path, suffixes: tuple[str, ...] = ("",)) -> Iterator[Document]:
    """Every text file (one without a zero byte) under ``root`` whose name ends so, hidden ones left out."""
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if name.name.endswith(suffixes) and path.is_file() and not any(part.startswith(".") for part in name.parts):
            text = path.read_bytes()
            if b"\0" not in text:
                yield Document(name.as_posix(), text)


def dataset(root: Path, split: str, column: str) -> Iterator[Document]:
    """The rows of a dataset that ``save_to_disk`` of the library ``datasets`` wrote."""
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
    for index, text in enumerate(rows[column]):
        # The zero byte ends a document; text has none.
        yield Document(f"{split}/{index}", str(text).encode(errors="replace").replace(b"\0", b""))


def documents(source: Path, split: str = "train", column: str = "text") -> list[Document]:
    """A file, a folder of files or a dataset on disk, in order of the paths, without empty ones and copies.

    Raises ValueError where there is none.
    """
    if source.is_file():
        text = source.read_bytes()
        if b"\0" in text:
            raise ValueError(f"{source} is no text: it holds a zero byte")
        found: Iterator[Document] = iter([Document(source.name, text)])
    elif any((source / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        found = dataset(source, split, column)
    elif source.is_dir():
        found = folder(source)
    else:
        raise ValueError(f"there is no file or folder {source}")
    kept: dict[bytes, Document] = {}  # by content
    for document in sorted(found, key=lambda d: d.path):
        if document.text:
            kept.setdefault(hashlib.sha256(document.text).digest(), document)
    if not kept:
        raise ValueError(f"there is no text in {source}; hidden files and those with a zero byte do not count")
    return list(kept.values())


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Tokens, each document followed by the last id of its kind: 0 for bytes, a new one for other tokens.

    train: uint8 or int32 (N,). test: likewise (M,), the held-out documents. test_ends: int64, where each of them ends.
    """

    train: Tensor
    test: Tensor
    test_ends: Tensor
    vocabulary: int
    origin: dict[str, Any]  # what it was made from, and how
    sha256: str  # of the tokens


def describe_origin(source: Path, tokenizer: Path | None, split: str, column: str) -> dict[str, Any]:
    """As Text.origin. Raises OSError where there is no such tokenizer."""
    name = None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return dict(source=str(source.resolve()), tokenizer=name, split=split, column=column)


def prepare(path: Path, source: Path, tokenizer: Path | None, split: str, column: str) -> None:
    """Write the tokens of ``source`` to the file ``path``, from which any number of processes map them into memory.

    Where the hash leaves a side without a document, as it does with a single one, the last tenth of every document
    is held out. Raises ValueError, OSError.
    """
    from safetensors.torch import save_file

    found = documents(source, split, column)
    train = [d for d in found if d.hash % TEST_SHARE]
    test = [d for d in found if d.hash % TEST_SHARE == 0]
    encode, end, vocabulary = _encoder(tokenizer)
    if train and test:
        # In the order of the hash: of which documents an evaluation takes the first, is chance.
        test.sort(key=lambda d: d.hash)
        sides = [[encode(d.text) for d in side] for side in (train, test)]
    else:
        whole = [encode(d.text) for d in found]
        cuts = [len(tokens) - len(tokens) // TEST_SHARE for tokens in whole]
        halves = [tokens.tensor_split([cut]) for tokens, cut in zip(whole, cuts, strict=True)]
        sides = [list(side) for side in zip(*halves, strict=True)]
    ends = torch.tensor([len(tokens) + 1 for tokens in sides[1]]).cumsum(0)
    stop = torch.tensor([end], dtype=sides[0][0].dtype)
    joined = [torch.cat([part for tokens in side for part in (tokens, stop)]) for side in sides]
    digest = hashlib.sha256()
    for tensor in (*joined, ends):
        digest.update(len(tensor).to_bytes(8, "big") + tensor.numpy().tobytes())
    origin = describe_origin(source, tokenizer, split, column)
    about = dict(vocabulary=vocabulary, origin=origin, sha256=digest.hexdigest())
    tensors = {"train": joined[0], "test": joined[1], "test_ends": ends}
    write_whole(path, lambda temporary: save_file(tensors, temporary, {"about": json.dumps(about)}))


def _encoder(tokenizer: Path | None) -> tuple[Callable[[bytes], Tensor], int, int]:
    """A function from bytes to tokens, the id that ends a document, and how many ids there are."""
    if tokenizer is None:
        return lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8), 0, 256
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("--tokenizer needs the library tokenizers: pip install tokenizers") from None
    try:
        model = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # it raises nothing more special
        raise ValueError(f"--tokenizer {tokenizer} is not a file of the library tokenizers: {error}") from None

    def encode(text: bytes) -> Tensor:
        ids = model.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    end = max(model.get_vocab().values()) + 1
    return encode, end, end + 1


def load(path: Path) -> Text:
    """What ``prepare`` wrote. Raises OSError and SafetensorError."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        return Text(**{name: file.get_tensor(name) for name in ("train", "test", "test_ends")}, **about)


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
        """Where the windows of a pass start, int64 (count,)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + turn)
        first = torch.randint(self.slack, (), generator=generator)
        return first + self.length * torch.randperm(self.count, generator=generator)

    def __call__(self, numbers: range) -> Tensor:
        """int64 (len(numbers), length + 1)."""
        starts = torch.stack([self._starts(n // self.count)[n % self.count] for n in numbers])
        return self.tokens[starts[:, None] + self.span].long()


def test_windows(text: Text, lengths: list[int], count: int) -> tuple[Tensor, list[int]]:
    """Windows of held-out text for as many of the lengths as it has room for.

    Returns:
        int64 (count or fewer, longest length + 1), windows that do not overlap, from as many documents as there
        are; and the lengths. Windows lie within a document, unless there is none as long as the shortest length:
        then the documents count as one.

    Raises ValueError where not even one window fits.
    """
    ends = text.test_ends
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
    starts = ends - ends.diff(prepend=ends.new_zeros(1))
    fit = (ends - starts) // size
    candidates = sorted((turn, i) for i, n in enumerate(fit.tolist()) for turn in range(n))[:count]
    places = torch.tensor([int(starts[i]) + turn * size for turn, i in candidates])
    return text.test[places[:, None] + torch.arange(size)].long(), fitting
