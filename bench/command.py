"""What the commands that train models and compare them share: options, defaults by device, and the record of a run."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.common import commit

Budgets = Mapping[str, Mapping[str, Any]]  # of "cuda" and "cpu", and of "quick" where there is one: option, value


def default_of(budgets: Budgets) -> Callable[[str], str]:
    """How the help of an option says what is taken where it is left out."""
    places = {"cuda": "default", "cpu": "on the CPU", "quick": "with --quick"}

    def default(name: str) -> str:
        shown = {kind: " ".join(map(str, v)) if isinstance(v := b[name], list) else v for kind, b in budgets.items()}
        return "(" + "; ".join(f"{place} {shown[kind]}" for kind, place in places.items() if kind in shown) + ")"

    return default


def add_run_options(p: argparse.ArgumentParser) -> None:
    """Where, how long, and what becomes of it."""
    p.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    p.add_argument("--minutes", type=float, metavar="M", help="stop measuring after M minutes, as Ctrl-C does")
    # Not where this repository keeps its own measurements: they would count as already done.
    p.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="for the results (%(default)s)")
    p.add_argument("--fresh", action="store_true", help="measure everything again")


def deadline(minutes: float | None) -> float:
    """By time.monotonic()."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def parse_device(name: str) -> torch.device:
    """`auto` takes the GPU of torchrun's local rank, or the first, or the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def fill_in(args: argparse.Namespace, budget: Mapping[str, Any]) -> None:
    """What was left out is taken from the budget."""
    for name, value in budget.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def stamp() -> dict[str, Any]:
    """What goes beside every measurement."""
    return {"commit": commit(), "threads": torch.get_num_threads()}


def about(
    program: str, arguments: Sequence[str] | None, settings: Any, stamp: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The head of a file of results. `arguments` None: the process's own."""
    command = ["python", "-m", program, *(sys.argv[1:] if arguments is None else arguments)]
    return {
        "key": settings.key,
        "command": shlex.join(command),
        **stamp,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        **more,
        "settings": asdict(settings),
    }
