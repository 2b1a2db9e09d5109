"""logpe.worker: a process that may die of a call, and several of them."""

from __future__ import annotations

import operator
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from logpe.worker import Failed, Pool, TookTooLong, Worker, complaint, one_line


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker
    assert worker.process is None


def test_it_outlives_its_process(worker: Worker) -> None:
    assert worker.call(operator.add, 1, 2, seconds=60) == 3
    first = worker.process
    assert worker.call(operator.add, 3, 4, seconds=60) == 7
    assert worker.process is first
    with pytest.raises(Failed, match=r"^ValueError: invalid literal for int\(\) with base 10: 'x'$"):
        worker.call(int, "x", seconds=60)
    assert not first.is_alive()
    with pytest.raises(Failed, match=r"^ended with status 3$"):
        worker.call(os._exit, 3, seconds=60)
    with pytest.raises(TookTooLong, match="took more than 0 s"):
        worker.call(time.sleep, 60, seconds=0.2)
    assert worker.call(operator.add, 5, 6, seconds=60) == 11


def test_it_says_what_killed_it_and_the_last_error_that_was_printed(worker: Worker) -> None:
    worker.call(os.write, 2, b"first\n", seconds=60)
    assert worker.call(complaint, seconds=60) == "first"
    worker.call(os.write, 2, b"LLVM ERROR: no\nstack dump\n", seconds=60)
    with pytest.raises(Failed, match=r"^killed by signal 9 \(SIGKILL\): LLVM ERROR: no$"):
        worker.call(signal.raise_signal, signal.SIGKILL, seconds=60)


def test_it_can_be_closed_in_the_middle_of_a_call(worker: Worker) -> None:
    worker.call(operator.add, 1, 2, seconds=60)
    threading.Timer(0.5, worker.close).start()
    with pytest.raises(Failed, match=r"^stopped$"):
        worker.call(time.sleep, 60, seconds=60)
    with pytest.raises(Failed, match=r"^stopped$"):
        worker.call(operator.add, 1, 2, seconds=60)


def test_several_at_once() -> None:
    def negative(worker: Worker, number: int) -> int:
        return worker.call(operator.neg, number, seconds=60)

    with Pool(2) as pool:
        assert dict(pool.each(negative, range(5))) == {0: 0, 1: -1, 2: -2, 3: -3, 4: -4}
        with pytest.raises(Failed, match="TypeError"):
            list(pool.each(negative, [1, "x"]))
    assert complaint() == ""  # this process is no worker


def test_the_line_that_tells() -> None:
    assert one_line(ValueError("\n why\nand advice")) == "ValueError: why"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(type("CompilationError", (Exception,), {})("at 1:2:\n  x = y\ny is not defined")) == (
        "CompilationError: y is not defined"
    )
    assert len(one_line(ValueError("x" * 999))) == 200
