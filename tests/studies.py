"""What the tests of the four studies share: texts of words, and runs that are stopped."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

from bench.study import runner


def write_texts(folder: Path, count: int, least: int, most: int) -> Path:
    """Write documents of words, each of ``least`` to ``most`` bytes, into three folders; return ``folder``."""
    rng = random.Random(0)
    for i in range(count):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        words = (rng.choice(["log", "bias", "of", "attention", "far", "near", "n"]) for _ in range(most))
        path.write_text(f"{i} {' '.join(words)}"[: rng.randint(least, most)])
    return folder


def numbers(path: Path) -> Any:
    """Return what was measured, without when and how fast."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "commit", "threads")}
        return value

    return strip(json.loads(path.read_text())["runs"])


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: Container[int]) -> None:
    """Stop as Ctrl-C does when work is counted for the first time (call 1) and so on, over all runs together."""
    advance, count = runner.Progress.advance, itertools.count(1)

    def stopping(self: runner.Progress, units: int) -> None:
        self.stop.signalled = next(count) in calls
        advance(self, units)

    monkeypatch.setattr(runner.Progress, "advance", stopping)
