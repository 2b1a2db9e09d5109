"""Plays a Gluon kernel for sm_90 on the CPU: Triton's interpreter does the arithmetic, and here is what it lacks.

Shared memory, barriers, TMA, asynchronous products and warpgroups behave as badly as hardware may. Between any two
operations on barriers, and before each wait, any other warpgroup may run. A place that TMA fills holds NaN until the
copy ends, at any time before its barrier passes. A product reads shared memory when it is waited for, not earlier. If
all wait for each other, Deadlock is raised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import logpe_kernels
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

SOURCE = Path(logpe_kernels.__file__).parent / "hopper.py"


class Deadlock(Exception):
    """Everybody waits."""


class Scheduler:
    """Runs functions in threads, one at a time, and lets another one run wherever they may interleave."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []  # of TMA, under way
        self.turn = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {}  # by thread: what it waits for
        self.running, self.error = 0, None  # type: int, BaseException | None

    def run(self, functions: list[Callable[[], None]]) -> None:
        """Run the functions to their ends."""

        def play(number: int) -> None:
            with self.turn:
                self.turn.wait_for(lambda: self.running == number or self.error)
            try:
                if self.error is None:
                    functions[number]()
            except BaseException as error:
                self.error = self.error or error
            del self.waiting[number]
            self._next()

        self.waiting = {number: lambda: True for number in range(len(functions))}
        self.running = self.random.choice(list(self.waiting))
        threads = [threading.Thread(target=play, args=(number,)) for number in self.waiting]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until ``ready`` and it is this thread's turn."""
        if not self.waiting:  # before the kernel parts into warpgroups
            assert ready()
            return
        me = self.running
        self.waiting[me] = ready
        self._next()
        with self.turn:
            self.turn.wait_for(lambda: self.running == me or self.error)
        if self.error is not None:
            raise self.error

    def _next(self) -> None:
        while True:
            self.random.shuffle(self.copies)
            for _ in range(self.random.randint(0, len(self.copies))):
                self.copies.pop()()
            able = [number for number, ready in self.waiting.items() if ready()]
            if able or not self.copies:
                break
        with self.turn:
            if able:
                self.running = self.random.choice(able)
            elif self.waiting and self.error is None:
                self.error = Deadlock(f"{len(self.waiting)} warpgroups wait")
            self.turn.notify_all()


class Barrier:
    """An mbarrier: a turn passes when enough have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.turns = 0

    def arrive(self, arrivals: int = 0, bytes_expected: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += bytes_expected
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.turns += 1
            self.missing = self.count

    def passed(self, parity: int) -> bool:
        return self.turns % 2 != parity


class Shared:
    """A tensor in shared memory."""

    def __init__(self, array: np.ndarray, dtype: Any) -> None:
        self.array, self.dtype = array, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def index(self, i: Any) -> Shared:
        return Shared(self.array[int(i)], self.dtype)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.array.transpose(order), self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.array.reshape(shape), self.dtype)


class Descriptor:
    """Gluon's TensorDescriptor, of which a kernel can ask what its own can."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any) -> None:
        assert (list(base.shape), list(base.stride())) == (shape, strides)
        self.base, self.layout = base, layout
        self.dtype = getattr(tl, str(base.dtype).removeprefix("torch."))
        self.block_type = SimpleNamespace(shape=block, nbytes=math.prod(block) * base.element_size())

    def read(self, start: list[int]) -> np.ndarray:
        """Return the block that begins there, zeros outside of the tensor."""
        block = torch.zeros(self.block_type.shape)
        inside = [slice(a, a + size) for a, size in zip(start, block.shape, strict=True)]
        part = self.base.detach()[tuple(inside)].float()
        block[tuple(slice(0, size) for size in part.shape)] = part
        return block.numpy()


class Product:
    """A matrix product under way."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc

    def value(self) -> Any:
        a = self.a.array if isinstance(self.a, Shared) else self.a.to(tl.float32).handle.data
        result = self.acc.handle.data + a @ self.b.array
        return tl.tensor(TensorHandle(result, tl.float32), tl.block_type(tl.float32, list(result.shape)))


@contextlib.contextmanager
def emulated(seed: int, source: Path = SOURCE) -> Iterator[ModuleType]:
    """Put an emulated logpe_kernels.hopper in place of the real one, and count its programs in ``programs``."""
    assert triton.knobs.runtime.interpret
    scheduler, programs = Scheduler(seed), []  # type: Scheduler, list[int]

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype == tl.int64:
            return Shared(np.vectorize(lambda _: Barrier(), otypes=[object])(np.empty(shape)), dtype)
        return Shared(np.full(shape, np.nan, dtype=np.float32), dtype)

    def barrier(x: Shared) -> Barrier:
        return x.array.item()

    def init(x: Shared, count: int) -> None:
        barrier(x).count = barrier(x).missing = int(count)

    def arrive(x: Shared) -> None:
        barrier(x).arrive(arrivals=1)
        scheduler.wait()

    def load(descriptor: Descriptor, start: list[Any], filled: Shared, place: Shared) -> None:
        assert place.shape == descriptor.block_type.shape
        data = descriptor.read([int(i) for i in start])
        place.array[...] = np.nan

        def end() -> None:
            place.array[...] = data
            barrier(filled).arrive(bytes_expected=-descriptor.block_type.nbytes)

        scheduler.copies.append(end)
        scheduler.wait()

    def product_wait(num_outstanding: int, deps: list[Product]) -> Any:
        assert num_outstanding == 0
        (product,) = deps
        scheduler.wait()
        return product.value()

    def product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        return Product(a, b, acc if use_acc else acc * 0.0)

    def warp_specialize(functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[Any]) -> None:
        assert len(warps) == len(registers) == len(functions) - 1
        programs.append(len(functions))
        scheduler.run([lambda f=f, arguments=arguments: f(*arguments) for f, arguments in functions])
        assert not scheduler.copies, "a copy was not waited for"

    def ignored(*arguments: Any, **keywords: Any) -> None:
        """Return nothing: a layout is a matter of speed."""

    language = SimpleNamespace(
        **{name: getattr(tl, name) for name in ("constexpr", "int64", "float16", "bfloat16", "float32")},
        static_range=range, static_assert=ignored, warp_specialize=warp_specialize, allocate_shared_memory=allocate,
        load=lambda *a, **k: tl.load(*a, **k), store=lambda *a, **k: tl.store(*a, **k),
        arange=lambda start, end, layout: tl.arange(int(start), int(getattr(end, "value", end))),
        full=lambda shape, value, dtype, layout: tl.full([int(getattr(n, "value", n)) for n in shape], value, dtype),
        convert_layout=lambda x, layout: x,
        NVMMADistributedLayout=ignored, DotOperandLayout=ignored, SliceLayout=ignored, BlockedLayout=ignored,
        NVMMASharedLayout=SimpleNamespace(get_default_for=ignored),
    )  # fmt: skip
    gluon = SimpleNamespace(jit=triton.jit, language=language)
    hopper = SimpleNamespace(
        mbarrier=SimpleNamespace(
            MBarrierLayout=ignored, init=init, arrive=arrive,
            wait=lambda x, parity: scheduler.wait(lambda: barrier(x).passed(int(parity))),
            expect=lambda x, size: barrier(x).arrive(arrivals=1, bytes_expected=size),
        ),
        tma=SimpleNamespace(async_load=load), fence_async_shared=ignored,
        warpgroup_mma=product, warpgroup_mma_wait=product_wait,
    )  # fmt: skip
    fakes: dict[str, Any] = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
    }
    name = "logpe_kernels.hopper"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    module.tl, module.programs = tl, programs  # the interpreter wants to find triton.language in it
    with mock.patch.dict(sys.modules, fakes):
        spec.loader.exec_module(module)
    with mock.patch.dict(sys.modules, {name: module}), mock.patch.object(logpe_kernels, "hopper", module, create=True):
        yield module
