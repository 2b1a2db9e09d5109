"""What the benches share: files that are whole, what a number depends on, and processes that may die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plots import COLOURS as COLOURS  # for bench.speed, until it takes them from there

if TYPE_CHECKING:  # imported where it is needed, so that a worker without it starts in no time
    import torch

RESULTS = Path(__file__).parent / "results"


# --- files ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file at `path`, in a folder that is made, is either the old one or the whole new one."""

    from logpe import files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, write)


@contextlib.contextmanager
def reading(path: Path, option: str = "--out") -> Iterator[None]:
    """Raise ValueError, which names the file and says what to do, where what is read inside is not as expected."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{path} is damaged or holds something else: move it away, or give another {option}"
        raise ValueError(f"{message} ({reason(error)})") from None


# --- what a number depends on ---------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Of the GPU or the processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Of the code that runs; "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on, but for the code and what else keeps the machine busy (see `load`)."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    about: dict[str, Any] = dict(device=device_name(device))
    if device.type == "cuda":
        about |= dict(
            driver=_driver(),
            cuda=torch.version.cuda or torch.version.hip,
            cudnn=torch.backends.cudnn.version(),
        )
    return about | dict(
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        # How threads wait: on a busy machine OMP_WAIT_POLICY=passive helps everyone.
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))},
    )


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return None


def load() -> list[float] | None:
    """Averages over the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def quantile(values: Iterable[float], p: float) -> float:
    """Linear between the nearest two."""
    values = sorted(values)
    place = p * (len(values) - 1)
    low = values[int(place)]
    return low + (place - int(place)) * (values[min(int(place) + 1, len(values) - 1)] - low)


# --- processes ------------------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200].removesuffix(": ")


class Worker:
    """A process that answers one question after the other; whatever becomes of it, the caller goes on.

    answer: a function of a module, of one picklable argument. If it raises, the process ends. After that, or when
    a question takes too long, the next question starts a new process.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer = answer
        self.process: Any = None
        self.log: Path | None = None  # what the process printed

    def ask(self, question: Any, timeout: float) -> Any:
        """Raises TimeoutError after so many seconds, RuntimeError with the reason if the process ended."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(question)
            if not self.connection.poll(timeout):
                self.close(kill=True)
                raise TimeoutError
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(self._obituary()) from None

    def _start(self) -> None:
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log = Path(name)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.answer, theirs, name))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def _obituary(self) -> str:
        assert self.log is not None
        self.process.join(30)
        status = self.process.exitcode or 0
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        self.close(kill=True)
        if status < 0:
            return f"killed by signal {-status} ({signal.Signals(-status).name})"
        return lines[-1][:200] if lines else f"ended with status {status}"

    def close(self, kill: bool = False) -> None:
        """End the process, if there is one."""
        if self.process is None:
            return
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        assert self.log is not None
        self.log.unlink(missing_ok=True)
        self.process = self.log = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(kill=True)


def _serve(answer: Callable[[Any], Any], connection: Any, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            connection.send(answer(question))
        except Exception as error:
            traceback.print_exc()
            print(reason(error), file=sys.stderr, flush=True)
            os._exit(1)  # a broken CUDA context may hang an orderly end
