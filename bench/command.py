"""Shared by all programs of ``python -m bench``: options and their types, how a program ends, and a run's record."""

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

#: Defaults of the options, by name, for "cuda" and "cpu", and for "quick" where there is such a run.
Budgets = Mapping[str, Mapping[str, Any]]

# Not where this repository keeps its own measurements: they would count as already done.
OUT = Path("results")
Main = Callable[..., int]


class TimeIsOver(KeyboardInterrupt):
    """Stops a measurement where Ctrl-C would, at the end of --minutes."""


def program(name: str) -> Callable[[Main], Main]:
    """Make a function the ``main`` of a program, which ends with one line and a status for errors that a user can mend.

    See STATUSES.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def wrapped(*arguments: Any, **options: Any) -> int:
            return run(f"python -m {name}", lambda: main(*arguments, **options))

        return wrapped

    return decorate


def stopped(error: KeyboardInterrupt) -> int:
    """Say that the same command resumes, and return the exit status."""
    over = isinstance(error, TimeIsOver)
    print(f"{'The time is over' if over else 'Stopped'}: the same command (without --fresh) resumes from here.")
    return TIME_IS_OVER if over else STOPPED


def new_parser(name: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser that keeps line breaks, and ends its help with what the exit statuses mean."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n\n".join(filter(None, [epilog.rstrip(), STATUSES])),
    )


# --- types of options -------------------------------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number of at least ``least``."""

    def number(argument: str) -> int:
        if (value := int(argument)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


count = at_least(1)


def positive(argument: str) -> float:
    """Parse a finite number above 0."""
    value = float(argument)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value


def share(argument: str) -> float:
    """Parse a number in [0, 1)."""
    value = float(argument)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {value:g}")
    return value


# --- options, and the record of a run ---------------------------------------------------------------------------------


def default_of(budgets: Budgets) -> Callable[[str], str]:
    """Return a function of an option's name: how its help says what is taken where it is left out."""
    places = {"cuda": "default", "cpu": "on the CPU", "quick": "with --quick"}

    def default(name: str) -> str:
        values = {key: budget[name] for key, budget in budgets.items()}
        shown = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in values.items()}
        return "(" + "; ".join(f"{place} {shown[key]}" for key, place in places.items() if key in shown) + ")"

    return default


def add_run_options(p: argparse.ArgumentParser, default_minutes: str = "") -> None:
    """Add where to run, how long, and what becomes of it. default_minutes: how the help says what --minutes is."""
    p.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    text = f"stop measuring after M minutes, as Ctrl-C does {default_minutes}".rstrip()
    p.add_argument("--minutes", type=minutes, metavar="M", help=text)
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the results (%(default)s)")
    p.add_argument("--fresh", action="store_true", help="measure everything again")


def deadline(minutes: float | None) -> float:
    """Return when the time of --minutes is over, by time.monotonic()."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def parse_device(name: str) -> torch.device:
    """Return the device of --device; ``auto`` is the GPU of torchrun's local rank, or the CPU. Raises ValueError."""
    return find_device(name, int(os.environ.get("LOCAL_RANK", 0)))


def fill_in(args: argparse.Namespace, budget: Mapping[str, Any]) -> None:
    """Take what was left out, or is no option, from the budget."""
    for name, value in budget.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def stamp() -> dict[str, Any]:
    """Return what goes beside every measurement."""
    return {"commit": commit(), "threads": torch.get_num_threads()}


def command_line(program: str, arguments: Sequence[str] | None) -> str:
    """Return the command that runs a program, such as ``bench decode``. arguments None: those of the process."""
    return shlex.join(["python", "-m", *program.split(), *(sys.argv[1:] if arguments is None else arguments)])


def about(
    program: str, arguments: Sequence[str] | None, settings: Any, stamp: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the head of a file of results. arguments: of the program; None for those of the process."""
    return {
        "key": settings.key,
        "command": command_line(program, arguments),
        **stamp,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        **more,
        "settings": asdict(settings),
    }
