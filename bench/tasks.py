"""Retrieval tasks: one short answer to be found in a long, meaningless text. Add one with `TASKS[name] = Task(...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz"))
DIGITS = torch.tensor(list(b"0123456789"))
MARK, QUERY = b"=?"

Draw = Callable[[torch.Generator, int, int, "float | None"], Tensor]


@dataclass(frozen=True)
class Task:
    """`draw(generator, batch, length, depth)` gives int64 (batch, length + answer): a prompt of `length` bytes, then
    the answer. depth 0 hides it at the start, 1 right before the question, None anywhere."""

    draw: Draw
    answer: int  # bytes
    chance: float  # accuracy of a guess
    steps: float  # of training, as a share of the language model's
    summary: str


def pick(symbols: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Symbols drawn at random, in a tensor of that shape."""
    return symbols[torch.randint(len(symbols), shape, generator=generator)]


def hide(text: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Puts MARK and a digit into each row of text (batch, length) at start (batch,); -> the digits (batch, 1)."""
    rows = torch.arange(len(text))
    value = pick(DIGITS, (len(text),), generator)
    text[rows, start] = MARK
    text[rows, start + 1] = value
    return value[:, None]


def place(first: int, last: int, batch: int, depth: float | None, generator: torch.Generator) -> Tensor:
    """(batch,): a place from first to last, at random or as far along as depth says."""
    if depth is None:
        return torch.randint(first, last + 1, (batch,), generator=generator)
    return torch.full((batch,), first + round(depth * (last - first)))


def needle(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Tensor:
    """`kfwz=7qmx...?` -> `7`: the only digit in a text of letters. Order does not matter."""
    text = pick(LETTERS, (batch, length - 1), generator)
    value = hide(text, place(0, length - 3, batch, depth, generator), generator)
    return torch.cat([text, torch.full((batch, 1), QUERY), value], dim=1)


def latest(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Tensor:
    """`k=3fwz=7qmx...?` -> `7`: the later of two digits, the earlier being anywhere before it. Order decides
    (which the causal mask alone can tell: see what comes before each digit)."""
    text = pick(LETTERS, (batch, length - 1), generator)
    later = place(2, length - 3, batch, depth, generator)
    earlier = (torch.rand(batch, generator=generator) * (later - 1)).long()
    hide(text, earlier, generator)
    value = hide(text, later, generator)
    return torch.cat([text, torch.full((batch, 1), QUERY), value], dim=1)


TASKS = {
    "needle": Task(needle, answer=1, chance=0.1, steps=0.5, summary="the only digit in a text of letters"),
    "latest": Task(latest, answer=1, chance=0.1, steps=1.0, summary="the later of two digits in a text of letters"),
}
