"""Processes that call functions which may raise, hang, or bring their process down."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A call in a worker raised, took too long, or brought the worker down."""


class TookTooLong(Failed):
    """A call in a worker did not return in the time that it was given."""


class Worker:
    """A process that calls one function after the other. It starts with a call, and anew after a call that failed.

    What the process prints goes to a file, of which only :func:`complaint` is ever shown: compilers that fail print
    whole modules. Ctrl-C does not reach it; the process that started it decides when to stop.
    """

    def __init__(self) -> None:
        self.process: Any = None
        self.pipe: Any = None
        self.closed = False

    def call(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """Return what a function returns that a new process can import.

        Raises:
            TookTooLong: it did not return in so many seconds. The process was ended.
            Failed: it raised or brought the process down, for the reason given in one line; or the worker is closed.
        """
        if self.closed:
            raise Failed("stopped")
        if self.process is None:
            self._start()
        process, pipe, log = self.process, self.pipe, Path(self.folder.name, "log")
        try:
            pipe.send((function, args))
            if not pipe.poll(max(0.0, seconds)):
                self.end()
                raise TookTooLong(f"took more than {seconds:.0f} s")
            raised, answer = pipe.recv()
        except (EOFError, OSError):
            if self.closed:  # by another thread, which takes the exit status
                raise Failed("stopped") from None
            process.join(30)
            raised, answer = True, _how_it_ended(process.exitcode, log)
        if raised:  # what a failed kernel leaves behind, such as a broken CUDA context, is not to be relied on
            self.end()
            raise Failed(answer)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, Path(self.folder.name, "log")), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def end(self) -> None:
        """End the process, if there is one. The next call starts another."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.join(10)  # not for ever: one that hangs in the driver does not die
            self.pipe.close()
            self.folder.cleanup()

    def close(self) -> None:
        """End the process, in the middle of a call if need be. Later calls fail."""
        self.closed = True
        self.end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pool:
    """Several workers, each used by a thread of its own."""

    def __init__(self, size: int) -> None:
        self.workers = [Worker() for _ in range(size)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(size)

    def each(self, call: Callable[[Worker, Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each item with its ``call(worker, item)``, as they are done.

        Raises what a call raises. Then, and where the caller stops, calls that were not begun are dropped.
        """

        def one(item: Any) -> Any:
            worker = self.idle.get()
            try:
                return call(worker, item)
            finally:
                self.idle.put(worker)

        pending = {self.threads.submit(one, item): item for item in items}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End all processes, in the middle of their calls if need be."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def one_line(error: BaseException) -> str:
    """Return an exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Triton's CompilationError begins with the source; others begin with the reason, and go on with advice.
    line = "" if not lines else lines[-1] if type(error).__name__ == "CompilationError" else lines[0]
    return f"{type(error).__name__}: {line}"[:200].removesuffix(": ")


def complaint(log: Path | None = None) -> str:
    """Return the last error in what a worker printed, or else its last line; "" if there is none.

    log: the file that it prints to. By default this process is the worker, if it is one.
    """
    try:
        lines = (log or _log).read_text(errors="replace").splitlines()  # type: ignore[union-attr]
    except (OSError, AttributeError):  # the worker was closed meanwhile; this process is none
        return ""
    printed = [line.strip() for line in lines if line.strip()]
    errors = [line for line in printed if re.search(r"error: |LLVM ERROR|Assertion", line)]
    errors = [line for line in errors if "have been detected" not in line]  # ptxas counts its errors at the end
    return (errors or printed or [""])[-1][:500]


def _how_it_ended(status: int | None, log: Path) -> str:
    """Return how a process ended that nobody asked to, and why, as far as it printed that."""
    how = f"ended with status {status}"
    if status is not None and status < 0:
        how = f"killed by signal {-status} ({signal.Signals(-status).name})"
    return ": ".join(filter(None, [how, complaint(log)]))


_log: Path | None = None  # of this process, if it is a worker


def _serve(pipe: Any, log: Path) -> None:
    global _log
    _log = log
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            answer = True, one_line(error)
        pipe.send(answer)
