"""What the commands share: their options and the types of these, how they end, and the record of a run."""

from __future__ import annotations

import argparse
import functools
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
from logpe.command import STATUSES, STOPPED, TIME_IS_OVER, find_device, minutes, run

Budgets = Mapping[str, Mapping[str, Any]]  # of "cuda" and "cpu", and of "quick" where there is one: option, value


# Not where this repository keeps its own measurements: they would count as already done.
OUT = Path("results")
Main = Callable[..., int]


class TimeIsOver(KeyboardInterrupt):
    """Stops a measurement where Ctrl-C would, at the end of --minutes."""


def program(name: str) -> Callable[[Main], Main]:
    """Make a function the ``main`` of a program: what a user can mend ends it with one line. See STATUSES."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def wrapped(*arguments: Any, **options: Any) -> int:
            return run(f"python -m {name}", lambda: main(*arguments, **options))

        return wrapped

    return decorate


def stopped(error: KeyboardInterrupt) -> int:
    """Say that the same command goes on; returns the exit status."""
    over = isinstance(error, TimeIsOver)
    print(f"{'The time is over' if over else 'Stopped'}: the same command (without --fresh) goes on from here.")
    return TIME_IS_OVER if over else STOPPED


def new_parser(name: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser that keeps line breaks, and ends its help with what the exit statuses mean."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n\n".join(filter(None, [epilog.rstrip(), STATUSES])),
    )


# --- types of options -------------------------------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    """Whole numbers."""

    def number(argument: str) -> int:
        if (value := int(argument)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


count = at_least(1)


def positive(argument: str) -> float:
    """Finite numbers above 0."""
    value = float(argument)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value


def share(argument: str) -> float:
    """Numbers in [0, 1)."""
    value = float(argument)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {value:g}")
    return value


# --- options, and the record of a run ---------------------------------------------------------------------------------


def default_of(budgets: Budgets) -> Callable[[str], str]:
    """How the help of an option says what is taken where it is left out."""
    places = {"cuda": "default", "cpu": "on the CPU", "quick": "with --quick"}

    def default(name: str) -> str:
        shown = {kind: " ".join(map(str, v)) if isinstance(v := b[name], list) else v for kind, b in budgets.items()}
        return "(" + "; ".join(f"{place} {shown[kind]}" for kind, place in places.items() if kind in shown) + ")"

    return default


def add_run_options(p: argparse.ArgumentParser, default_minutes: str = "") -> None:
    """Add where to run, how long, and what becomes of it. default_minutes: how the help says what --minutes is."""
    p.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    text = f"stop measuring after M minutes, as Ctrl-C does {default_minutes}".rstrip()
    p.add_argument("--minutes", type=minutes, metavar="M", help=text)
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the results (%(default)s)")
    p.add_argument("--fresh", action="store_true", help="measure everything again")


def deadline(minutes: float | None) -> float:
    """By time.monotonic()."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def parse_device(name: str) -> torch.device:
    """`auto` takes the GPU of torchrun's local rank, or the first, or the CPU. Raises ValueError."""
    return find_device(name, int(os.environ.get("LOCAL_RANK", 0)))


def fill_in(args: argparse.Namespace, budget: Mapping[str, Any]) -> None:
    """Take what was left out, or is no option, from the budget."""
    for name, value in budget.items():
        if getattr(args, name, None) is None:
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
