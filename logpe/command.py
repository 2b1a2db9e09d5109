"""Shared by all programs of ``python -m logpe``: exit statuses, option types, and how errors are shown."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from logpe.files import Busy

#: Exit status of a program that stopped after its --minutes (EX_TEMPFAIL). The same command resumes from there.
TIME_IS_OVER = 75
#: Exit status of a program that Ctrl-C or SIGTERM stopped.
STOPPED = 130
#: Exit status of a program that was given an option, a file or a folder that cannot be used.
BAD_USE = 2
#: What the help of every program says about exit statuses.
STATUSES = f"""exit status:
  0 done; {BAD_USE} an option, file or folder cannot be used, and the message says which;
  {TIME_IS_OVER} the time of --minutes is over: the same command resumes; {STOPPED} stopped by Ctrl-C or SIGTERM;
  1 anything else, such as a check that failed or a closed pipe. (torchrun exits with 1 whenever a process does not
  exit with 0.)
With LOGPE_DEBUG=1 in the environment, the traceback of an error stands above its message.
"""


def run(name: str, program: Callable[[], int]) -> int:
    """Run ``program`` and return its exit status; for an error that the user can mend, print one line first.

    These are OSError, ValueError, FloatingPointError, Busy, and too little memory. Any other error is a fault of the
    program, and is raised. With LOGPE_DEBUG=1, a traceback shows where an error comes from.
    """
    for stream in ("stdout", "stderr"):  # a program may be started without these
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with _sigterm_as_interrupt():
            return program()
    except KeyboardInterrupt as error:
        print(f"{name}: {str(error) or 'stopped'}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        return 1
    except (OSError, ValueError, FloatingPointError, Busy) as error:
        return _refuse(name, describe(error))
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        return _refuse(name, f"out of memory: {str(error).splitlines()[0] if str(error) else ''}")


def _refuse(name: str, message: str) -> int:
    """Print the message of the error that is being handled, and return the exit status."""
    if os.environ.get("LOGPE_DEBUG", "0") != "0":
        traceback.print_exc()
    print(f"{name}: {message}", file=sys.stderr)
    return BAD_USE


def describe(error: BaseException) -> str:
    """Return an error as a message, which starts with the file if there is one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that locks are released and temporary files removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def count(argument: str) -> int:
    """Parse a whole number of at least 1, as a type for argparse."""
    value = int(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def minutes(argument: str) -> float:
    """Parse a time of at least 0, as a type for argparse."""
    value = float(argument)
    if math.isnan(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that ``--device`` names, which may be ``auto``. Raises ValueError if it cannot compute."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU here, or this build of torch does not see it")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without this device
        raise ValueError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}") from None
    return device
