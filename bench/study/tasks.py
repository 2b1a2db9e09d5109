"""Retrieval tasks: one short answer to be found in a long, meaningless text. Add one with `TASKS[name] = Task(...)`.

A task writes in symbols: ASCII characters, and names, which stand above them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LETTERS = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz"))
DIGITS = torch.tensor(list(b"0123456789"))
MARK, QUERY = b"=?"

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Task:
    """A retrieval task.

    draw: from a generator, a batch size, a length and a depth, int64 (batch, length + answer): a prompt of ``length``
    symbols, then the answer. Depth 0 hides it at the start, 1 right before the question, None anywhere.
    """

    draw: Draw
    answer: int  # symbols
    chance: float  # accuracy of a guess
    steps: float  # of training, as a share of the language model's
    summary: str
    names: range | None = None  # symbols that the draw takes as a keyword, if it needs any
    mostly_short: bool = False  # train on lengths that are uniform in their logarithm, with as many bytes in each step


def pick(symbols: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw symbols at random, in a tensor of that shape."""
    return symbols[torch.randint(len(symbols), shape, generator=generator)]


def hide(text: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Put MARK and a digit into each row of text (batch, length) at start (batch,); return the digits (batch, 1)."""
    rows = torch.arange(len(text))
    value = pick(DIGITS, (len(text),), generator)
    text[rows, start] = MARK
    text[rows, start + 1] = value
    return value[:, None]


def place(first: int, last: int, batch: int, depth: float | None, generator: torch.Generator) -> Tensor:
    """Return places from first to last, (batch,), at random or as far along as depth says."""
    if depth is None:
        return torch.randint(first, last + 1, (batch,), generator=generator)
    return torch.full((batch,), first + round(depth * (last - first)))


def needle(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Tensor:
    """Ask, as in `kfwz=7qmx...?`, for the only digit in a text of letters (`7`). Order does not matter."""
    text = pick(LETTERS, (batch, length - 1), generator)
    value = hide(text, place(0, length - 3, batch, depth, generator), generator)
    return torch.cat([text, torch.full((batch, 1), QUERY), value], dim=1)


def after(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Tensor:
    """Ask, as in `kf=wzqmx...?`, for the letter after the only mark (`w`). Only its place tells it from the others."""
    return _after_last_mark(1, generator, batch, length, depth)


def recall(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Tensor:
    """Ask, as in `k=fwz=qmx...?`, for the letter after the last mark (`q`); half of the prompts have another before it.

    It takes both senses of order: which letter comes next, and which mark comes last, however far apart.
    """
    return _after_last_mark(2, generator, batch, length, depth)


def _after_last_mark(marks: int, generator: torch.Generator, batch: int, length: int, depth: float | None) -> Tensor:
    text = pick(LETTERS, (batch, length - 1), generator)
    rows = torch.arange(batch)
    last = place(2 * marks - 2, length - 3, batch, depth, generator)
    for _ in range(marks - 1):
        earlier = (torch.rand(batch, generator=generator) * (last - 1)).long()
        there = torch.rand(batch, generator=generator) < 0.5
        text[rows[there], earlier[there]] = MARK
    text[rows, last] = MARK
    return torch.cat([text, torch.full((batch, 1), QUERY), text[rows, last + 1, None]], dim=1)


def phone_book(
    generator: torch.Generator, batch: int, length: int, depth: float | None = None, *, names: range
) -> Tensor:
    """Ask, as in `AkBfCw...B` for names A, B, C, for the letter or digit after the name that the question repeats.

    The book has (length - 1) // 2 names. The one that is asked stands in it once; others may come again.
    """
    entries = (length - 1) // 2
    asked = torch.randint(names.start, names.stop, (batch,), generator=generator)
    others = torch.randint(names.start, names.stop - 1, (batch, entries), generator=generator)
    others += (others >= asked[:, None]).long()
    numbers = pick(torch.cat([LETTERS, DIGITS]), (batch, entries), generator)
    rows, where = torch.arange(batch), place(0, entries - 1, batch, depth, generator)
    others[rows, where] = asked
    text = torch.full((batch, length), ord(" "))
    text[:, length - 1 - 2 * entries : -1] = torch.stack([others, numbers], dim=2).flatten(1)
    text[:, -1] = asked
    return torch.cat([text, numbers[rows, where, None]], dim=1)


TASKS = {
    "needle": Task(needle, answer=1, chance=0.1, steps=0.5, summary="the only digit in a text of letters"),
    "after": Task(
        after, answer=1, chance=1 / 26, steps=0.5, summary="the letter after the only mark", mostly_short=True
    ),
    "recall": Task(
        recall,
        answer=1,
        chance=1 / 26,
        steps=1.0,
        summary="the letter after the last of one or two marks",
        mostly_short=True,
    ),
    "phone-book": Task(
        phone_book,
        answer=1,
        chance=1 / 36,
        steps=1.0,
        summary="the letter or digit after one of (length - 1) / 2 names",
        names=range(128, 256),
        mostly_short=True,
    ),
}


def with_names(task: Task, vocabulary: int) -> Task:
    """Return the task with the names of a vocabulary: bytes beyond ASCII, or tokens that are longer than a byte."""
    if task.names is None:
        return task
    names = task.names if vocabulary == 256 else range(256, vocabulary)
    return replace(task, draw=functools.partial(task.draw, names=names), names=None)
