"""What the programs of ``python -m logpe`` share: exit statuses, types of options, and how errors are shown."""

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

#: Exit status of a program that stopped because its --minutes are over: the same command goes on (EX_TEMPFAIL).
TIME_IS_OVER = 75
#: Exit status of a program that Ctrl-C or SIGTERM stopped.
STOPPED = 130
#: Of an option, a file or a folder that cannot be used.
BAD_USE = 2
#: For the help of every program.
STATUSES = f"""exit status:
  0 done; {BAD_USE} an option, file or folder cannot be used, and the message says which;
  {TIME_IS_OVER} the time of --minutes is over: the same command goes on; {STOPPED} stopped by Ctrl-C or SIGTERM;
  1 anything else, such as a check that failed or a closed pipe. (torchrun exits with 1 whenever a process does not
  exit with 0.)
With LOGPE_DEBUG=1 in the environment, the traceback of an error stands above its message.
"""


def run(name: str, program: Callable[[], int]) -> int:
    """Return the exit status of ``program``: what it returns, or the one for what it raises, after one line about it.

    OSError, ValueError, FloatingPointError and Busy are about what the user gave, and so is the lack of memory. Any
    other error is a fault of the program, and raised. LOGPE_DEBUG=1 tells where an error comes from.
    """
    for stream in ("stdout", "stderr"):  # a program may be started without them
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at exit
        return 1
    except (OSError, ValueError, FloatingPointError, Busy) as error:
        return _refuse(name, describe(error))
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        return _refuse(name, f"out of memory: {str(error).splitlines()[0] if str(error) else ''}")


def _refuse(name: str, message: str) -> int:
    """Print the message of the error in hand; returns the exit status."""
    if os.environ.get("LOGPE_DEBUG", "0") != "0":
        traceback.print_exc()
    print(f"{name}: {message}", file=sys.stderr)
    return BAD_USE


def describe(error: BaseException) -> str:
    """One error as a message: the file first, where there is one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that locks and temporary files are given up."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
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
    """A type for argparse: a whole number of at least 1."""
    value = int(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def minutes(argument: str) -> float:
    """A type for argparse: a time, at least 0."""
    value = float(argument)
    if math.isnan(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of ``--device``, ``auto`` included. Raises ValueError where nothing can be computed on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU here, or this build of torch does not see it")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        raise ValueError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}") from None
    return device
