"""Kernels that are launched again: the one that Triton would launch, with what it would be given.

No GPU is needed: kernels are compiled for sm_90, and the driver notes what it is asked to launch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton.language as tl
from logpe_kernels.launch import MOST_KEPT, _kept, launch
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.host_overhead import NoDevice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CONSTANTS = dict(BLOCK=16, num_warps=4)


def add(x, y, pair, strides, count, length, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * strides[0], mask=i < length) * scale + count
    if pair[0] is not None:
        value += tl.load(pair[0] + i * strides[1], mask=i < length)
    tl.store(y + i, value, mask=i < length)


class Driver(NoDevice):
    """Notes for each launch what the kernel was compiled for, the grid, the stream, and the arguments."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        compiled_for = source.signature, source.attrs, source.constants, metadata.num_warps

        def launcher(*args: Any) -> None:
            grid, stream, arguments = args[:3], args[3], args[9:]
            self.launches.append((compiled_for, grid, stream, arguments))

        return launcher


@pytest.fixture
def gpu() -> Iterator[Driver]:
    if INTERPRETED:  # which leaves its marks on triton.language
        pytest.skip("test_without_the_interpreter runs it")
    before = driver._active
    gpu = Driver()
    driver.set_active(gpu)
    _kept.clear()
    yield gpu
    driver.set_active(before)
    _kept.clear()


@pytest.fixture
def kernel() -> JITFunction:
    """A new one: it has compiled nothing."""
    return JITFunction(add, do_not_specialize=["length"])


def asked() -> Any:
    """Counts the times that Triton is asked which kernel to launch."""
    return mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run)


def same(a: Any, b: Any) -> bool:
    """Whether two launches are one; tensors are compared by identity."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return a is b if isinstance(a, Tensor) else type(a) is type(b) and a == b


def at(offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """64 elements that start so many elements after a multiple of 16 bytes."""
    x = torch.zeros(128, dtype=dtype)
    assert x.data_ptr() % 16 == 0
    return x[offset : offset + 64]


def vary(**changed: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Tensors, numbers and constants of a launch, with some of them changed."""
    values: dict[str, Any] = dict(x=at(0), y=at(0), other=None, strides=(3, 5), count=7, length=50, scale=0.5)
    values |= {name: x for name, x in changed.items() if name in values}
    constants = CONSTANTS | {name: x for name, x in changed.items() if name in CONSTANTS}
    tensors = values["x"], values["y"], (values["other"], None)
    return tensors, (values["strides"], values["count"], values["length"], values["scale"]), constants


ALIGNED = [
    {},
    dict(x=at(4)),  # float32: 16 bytes
    dict(x=at(0, torch.float16)),
    dict(x=at(0, torch.bfloat16), y=at(0, torch.float16)),
    dict(other=at(0)),
    dict(other=at(8, torch.float16)),
    dict(strides=(1, 5)),
    dict(strides=(3, 1)),
    dict(strides=(16, 5)),
    dict(strides=(16, 32)),
    dict(strides=(2**31, 5)),
    dict(strides=(2**31 + 3, 2**40)),
    dict(count=1),
    dict(count=16),
    dict(count=-16),
    dict(count=2**31 - 1),
    dict(count=2**31),
    dict(count=2**63),
    dict(length=1),
    dict(length=16),
    dict(length=2**31 + 16),
    dict(scale=1.0),
    dict(scale=16.0),
    dict(BLOCK=32),
    dict(num_warps=8),
]
MISALIGNED = [dict(x=at(1)), dict(y=at(3)), dict(other=at(1, torch.float16)), dict(x=at(1), y=at(1), other=at(1))]


@pytest.mark.skipif(not INTERPRETED, reason="the tests below run as they are")
def test_without_the_interpreter() -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-v", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_kernel_is_the_one_that_triton_launches(kernel: JITFunction, gpu: Driver) -> None:
    """In any order of calls; the second time on, Triton is not asked about tensors that start as torch's do."""
    calls = [vary(**changed) for changed in ALIGNED + MISALIGNED]
    expected = []
    for tensors, numbers, constants in calls:
        kernel[(2,)](*tensors, *numbers, **constants)
        expected.append(gpu.launches.pop())
    assert len({str(x[0]) for x in expected}) > 15  # else the calls would not tell one kernel from another
    for again in range(3):
        for i in torch.randperm(len(calls)).tolist():
            with asked() as run:
                tensors, numbers, constants = calls[i]
                launch(kernel, 2, tensors, numbers, constants)
            assert not again or run.called == (i >= len(ALIGNED)), calls[i]
            assert same(gpu.launches.pop(), expected[i]), calls[i]
    assert not gpu.launches


def test_an_empty_grid_launches_nothing(kernel: JITFunction, gpu: Driver) -> None:
    launch(kernel, 0, *vary())
    assert not gpu.launches


def test_each_device_has_its_own(kernel: JITFunction, gpu: Driver) -> None:
    """And the stream is asked for in each launch."""
    for number, stream in ((0, 10), (1, 11), (0, 12), (1, 13)):
        with (
            mock.patch.object(gpu, "get_current_device", lambda number=number: number),
            mock.patch.object(gpu, "get_current_stream", {number: stream}.__getitem__),
            asked() as run,
        ):
            launch(kernel, 1, *vary())
        assert run.called == (stream < 12)
        assert gpu.launches.pop()[2] == stream


def test_two_kernels_with_the_same_arguments(gpu: Driver) -> None:
    def double(x, y, pair, strides, count, length, scale, BLOCK: tl.constexpr):
        tl.store(y + tl.arange(0, BLOCK), 2.0)

    first, second = JITFunction(add, do_not_specialize=["length"]), JITFunction(double)
    launched = []
    for kernel in (first, second, first, second):
        launch(kernel, 1, *vary())
        launched.append(gpu.launches.pop()[0])
    assert launched[0] == launched[2] != launched[1] == launched[3]


def test_descriptors_go_to_triton(gpu: Driver) -> None:
    def copy(x, y, BLOCK: tl.constexpr):
        tl.store(y + tl.arange(0, BLOCK), x.load([0]))

    kernel = JITFunction(copy)
    descriptor = TensorDescriptor(torch.zeros(64), [64], [1], [CONSTANTS["BLOCK"]])
    for _ in range(2):
        with asked() as run:
            launch(kernel, 1, (descriptor, at(0)), (), CONSTANTS)
        run.assert_called_once()


def test_hooks_hear_of_every_launch(kernel: JITFunction, gpu: Driver) -> None:
    """A profiler's, who may come when the kernel is already kept."""
    launch(kernel, 1, *vary())
    hook = mock.Mock()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            with asked() as run:
                launch(kernel, 1, *vary())
            run.assert_called_once()
        finally:
            chain.remove(hook)
        with asked() as run:
            launch(kernel, 1, *vary())
        run.assert_not_called()


def test_what_is_no_kernel_of_triton_is_called_each_time(gpu: Driver) -> None:
    """The interpreter's, and those that record launches."""
    kernel = mock.MagicMock()
    tensors, numbers, constants = vary()
    for _ in range(2):
        launch(kernel, 3, tensors, numbers, constants)
    assert kernel.__getitem__.call_args_list == [mock.call((3,))] * 2
    kernel[(3,)].assert_called_with(*tensors, *numbers, **constants)
    assert not _kept


def test_lengths_do_not_fill_the_memory(kernel: JITFunction, gpu: Driver) -> None:
    for length in range(MOST_KEPT + 10):
        launch(kernel, 1, *vary(length=length))
    assert 0 < len(_kept) <= MOST_KEPT
