"""How long one step takes: the clock of the tuner and of the speed benches.

On a GPU, ``triton.testing.do_bench`` comes first: it clears the L2 cache before each repeat, and reads CUDA events.
``bench decode`` uses it. It cannot do what the tuner and ``bench throughput`` need:

* The tuner times two kernels in turns, so that both meet the same clocks of the GPU.
* A backward pass needs a new forward pass before each repeat, which is not timed. (Graphs that torch.compile made
  refuse retain_graph.)
* Where the host is slower than the GPU, its time must not count; and repeats that take seconds must be few.

:func:`between_events` and :func:`time_once` serve these. They treat the cache and the events as do_bench does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

HEAD_START = 2_000_000  # clock cycles, a millisecond: long enough for the host to launch a step


class Repeats(NamedTuple):
    """How often a step is repeated: for ``seconds``, but ``at_least`` and ``at_most`` so many times.

    No repeat begins that would end after ``longest`` seconds, but for the first. Those of the first ``warm_up`` seconds
    do not count.
    """

    seconds: float
    at_least: int
    at_most: int
    longest: float
    warm_up: float = 0.0

    def take(self, once: Callable[[], float]) -> list[float]:
        """Return the seconds of each repeat, as ``once`` returns them."""
        spent = 0.0
        while spent < self.warm_up:
            spent += once()
        times = [once()]
        while (
            len(times) < self.at_most
            and (len(times) < self.at_least or sum(times) < self.seconds)
            and sum(times) + times[-1] < self.longest
        ):
            times.append(once())
        return times


def quantiles(times: list[float]) -> dict[str, Any]:
    """Return the 20th, 50th and 80th percentiles of times, as p20, p50 and p80, and how many there are."""
    p20, p50, p80 = np.percentile(times, [20, 50, 80]).tolist()
    return dict(p20=p20, p50=p50, p80=p80, repeats=len(times))


@functools.cache
def l2_buffer(index: int) -> Any:
    """Return what clears the L2 cache of a GPU when it is written: 256 MB of its memory, allocated once."""
    from triton.runtime import driver

    return driver.active.get_empty_cache_for_benchmark()


def between_events(step: Callable[[], object], head_start: int = 0) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Launch a step on the current GPU, with a cold L2 cache, between two events that give its time once it has run.

    head_start: clock cycles that the GPU waits, so that the host can launch all of the step meanwhile.
    """
    from triton.runtime import driver

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    driver.active.clear_cache(l2_buffer(torch.cuda.current_device()))
    if head_start:
        torch.cuda._sleep(head_start)
    begin.record()
    step()
    end.record()
    return begin, end


def time_once(step: Callable[[], object], gpu: bool) -> float:
    """Return the seconds that a step takes: on the current GPU, without the host's time, or on the CPU."""
    if not gpu:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    first, last = between_events(step, HEAD_START)
    last.synchronize()
    return first.elapsed_time(last) * 1e-3
