"""Kernels that are launched again: the one that Triton would launch, with what it would be given.

No GPU is needed: kernels are compiled for sm_90, and the driver notes what it is asked to launch.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton.language as tl
from logpe_kernels import configs, problem
from logpe_kernels.forward import attention as launch_attention
from logpe_kernels.launch import MOST_KEPT, _kept, launch
from logpe_kernels.options import Options
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.speed.host_overhead import NoDevice
from logpe import LogPosition, PositionValues, attention, checks, log_attention, ops

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
        super().__init__()
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


def test_descriptors(gpu: Driver) -> None:
    """Another dtype or block is another kernel, another length is not."""

    def copy(x, y, BLOCK: tl.constexpr):
        tl.store(y + tl.arange(0, 16), tl.sum(x.load([0])))

    def described(length: int, block: int, dtype: torch.dtype = torch.float32) -> TensorDescriptor:
        return TensorDescriptor(torch.zeros(length, dtype=dtype), [length], [1], [block])

    kernel = JITFunction(copy)
    calls = [described(64, 16), described(64, 32), described(64, 16, torch.float16)]
    same_kernels = [described(96, 16), described(65, 32), described(1, 16, torch.float16)]
    for x in calls:
        kernel[(1,)](x, at(0), **CONSTANTS)
    compiled = [launched[0] for launched in gpu.launches]
    assert len({str(x) for x in compiled}) == 3
    for x in calls:
        launch(kernel, 1, (x, at(0)), (), CONSTANTS)
    gpu.launches.clear()
    for again in (calls, same_kernels):
        with asked() as run:
            for x in again:
                launch(kernel, 1, (x, at(0)), (), CONSTANTS)
        run.assert_not_called()
        assert [launched[0] for launched in gpu.launches] == compiled
        assert [launched[3][0] for launched in gpu.launches] == again
        gpu.launches.clear()


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


# --- calls of log_attention, of which each repeats an earlier one --------------------------------------------------


HEADS, HEAD_DIM = 4, 16


def dense(
    shape: tuple[int, ...] = (1, HEADS, 32, HEAD_DIM), kv_heads: int = HEADS, num_keys: int = 32,
    dtype: torch.dtype = torch.float16, preset: str | None = "log-bias", position: Any = None, q: Any = None,
    k: Any = None, v: Any = None, **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """A call of log_attention: (q, k, v, position), options. ``q``, ``k`` and ``v``: what is done to these."""
    batch, heads, _, head_dim = shape
    keys = (batch, kv_heads, num_keys, head_dim)
    tensors = [torch.zeros(x, dtype=dtype, requires_grad=True) for x in (shape, keys, keys)]
    tensors = [x if change is None else change(x) for x, change in zip(tensors, (q, k, v), strict=True)]
    place = None if preset is None else LogPosition(heads, head_dim, preset, **position or {})
    return (*tensors, place), dict(is_causal=True, backend="triton") | options


def first_half(x: Tensor) -> Tensor:
    return x[:, :, : x.shape[2] // 2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def shifted(x: Tensor) -> Tensor:
    """The same layout, from an address that is no multiple of 16 bytes on."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


CALLS: list[dict[str, Any]] = [
    {},
    dict(dtype=torch.bfloat16),
    dict(shape=(1, HEADS, 48, HEAD_DIM), num_keys=48),
    dict(shape=(1, HEADS, 16, HEAD_DIM)),
    dict(shape=(2, HEADS, 32, HEAD_DIM)),
    dict(kv_heads=2),
    dict(q=first_half),
    dict(q=first_half, window=8),
    dict(k=first_half, v=first_half),
    dict(k=first_half, v=first_half, query_start=3),
    dict(q=first_half, query_start=3),
    dict(q=transposed),
    dict(k=transposed),
    dict(v=transposed),
    dict(q=shifted),
    dict(k=shifted),
    dict(v=shifted),
    dict(position=dict(query_gain=True)),
    dict(position=dict(query_gain=True, gain_length=9.0)),
    dict(position=dict(query_gain=True), is_causal=False),
    dict(preset=None),
    dict(preset="alibi"),
    dict(preset="log-invariant"),
    dict(preset="log-rotary-bias"),
    dict(preset="log-rotary-bias", position=dict(rotary_scale=7.0)),
    dict(is_causal=False),
    dict(window=8),
    dict(window=(8, 0)),
    dict(scale=0.5),
    dict(scale=1),
    dict(key_start=1),
    dict(key_start=5, query_start=5),
    dict(query_start=3),
    dict(query_start=4),
    dict(query_start=torch.tensor([3])),
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024),
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024, query_start=torch.tensor([3])),
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024, k=first_half, v=first_half),
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024, query_start=2),
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024, query_start=700),
    dict(key_lengths=torch.tensor([20])),
    dict(key_mask=torch.zeros(1, 32)),
    dict(dropout_p=0.5, dropout_seed=torch.tensor([1])),
]


def described(launches: list[Any]) -> list[Any]:
    """Launches, with what they would do to a tensor in place of the tensor."""

    def describe(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.shape, x.stride(), x.data_ptr() % 16
        return tuple(map(describe, x)) if isinstance(x, tuple) else (type(x), x)

    return [(str(compiled_for), grid, describe(arguments)) for compiled_for, grid, _, arguments in launches]


@pytest.fixture
def repeated(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """log_attention launches kernels with tensors that lie on the CPU."""
    monkeypatch.setattr(configs, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(ops, "why_not_triton", lambda device: None)
    forget()
    return gpu


def forget() -> None:
    for memory in (attention._known, problem._sizes, _kept):
        memory.clear()


def in_any_order(driver: Driver, calls: list[Callable[[], Any]], same: int) -> None:
    """Each call launches what it launches alone; ``same``: how many of them another one launches as well."""

    def launched(i: int) -> list[Any]:
        driver.launches.clear()
        calls[i]()
        return described(driver.launches)

    expected = []
    for i in range(len(calls)):
        forget()
        expected.append(launched(i))
        assert expected[i]
    assert len({str(x) for x in expected}) == len(calls) - same
    for _ in range(3):
        for i in torch.randperm(len(calls)).tolist():
            assert launched(i) == expected[i], i


@pytest.mark.parametrize("known", [True, False])
def test_calls_in_any_order_launch_what_each_alone_launches(
    known: bool, repeated: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is remembered of one call is nothing to another that differs in anything.

    ``known``: log_attention knows calls again; else the kernels' launcher alone.
    """
    if not known:
        monkeypatch.setattr(attention, "_kind_of", lambda *arguments: None)

    def call(arguments: Any, options: Any) -> None:
        q = arguments[0]
        with torch.set_grad_enabled(bool(torch.randint(2, ()))):
            out = log_attention(*arguments, **options)
        assert (out.shape, out.stride(), out.dtype) == (q.shape, torch.empty_like(q).stride(), q.dtype)

    calls = [functools.partial(call, *dense(**changed)) for changed in CALLS]
    in_any_order(repeated, calls, same=1)  # window=8 is (8, 0) where causal


FLOAT64 = torch.float64
VALUES = PositionValues(power=torch.ones(HEADS), rate=torch.ones(HEADS))
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("k must have the dtype of q", dict(q=Tensor.float)),
    ("k must have the dtype of q", dict(k=Tensor.float)),
    ("v must have the dtype of q", dict(v=Tensor.float)),
    ("k must be on the device of q", dict(k=lambda x: x.to("meta"))),
    ("v must be on the device of q", dict(v=lambda x: x.to("meta"))),
    ("v must have the shape of k", dict(v=first_half)),
    ("v must have the shape of k", dict(k=first_half)),
    ("k must have the batch size of q", dict(q=lambda x: x.expand(2, -1, -1, -1))),
    ("q must be contiguous in its last", dict(q=lambda x: x.mT.contiguous().mT)),
    ("k must be contiguous in its last", dict(k=lambda x: x.mT.contiguous().mT)),
    ("v must be contiguous in its last", dict(v=lambda x: x.mT.contiguous().mT)),
    ("built for num_heads 4, and q has 2", dict(q=lambda x: x[:, :2], k=lambda x: x[:, :2], v=lambda x: x[:, :2])),
    ("power must have shape", dict(position=VALUES._replace(power=torch.ones(2)))),
    ("rate must be float32", dict(position=VALUES._replace(rate=torch.ones(HEADS, dtype=FLOAT64)))),
    ("rate must be on the device of q", dict(position=VALUES._replace(rate=torch.ones(HEADS, device="meta")))),
    ("rate must be given", dict(position=VALUES._replace(rate=None, sharpness=VALUES.power))),
    ("built for num_heads 8", dict(position=LogPosition(8, HEAD_DIM, "none"))),
    ("built for head_dim 8", dict(position=LogPosition(HEADS, 8, "none"))),
    ("query_start is required", dict(q=first_half, is_causal=False)),
    ("query_start is required", dict(q=first_half, window=(8, 0), is_causal=False)),
    ("window must hold ints", dict(window=(True, True))),
    ("window must hold ints", dict(window=(1.0, 0))),
    ("key_start must be an int", dict(key_start=True)),
    ("key_start must be an int", dict(key_start=1.0)),
    ("scale must be finite", dict(scale=float("nan"))),
    ("backend must be one of", dict(backend="cuda")),
]


@pytest.mark.parametrize(("message", "changed"), REFUSED)
def test_a_bad_call_is_refused_after_good_ones(message: str, changed: dict[str, Any], repeated: Driver) -> None:
    good = [{}, dict(window=1), dict(key_start=1), dict(scale=1.0), dict(preset="none"), dict(q=first_half, window=8)]
    for options in good:
        for _ in range(2):
            arguments, others = dense(**options)
            log_attention(*arguments, **others)
    log_attention(*dense()[0][:3], VALUES, backend="triton", is_causal=True)
    position = changed.get("position")
    arguments, others = dense(**{name: x for name, x in changed.items() if name != "position"})
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            log_attention(*arguments[:3], position or arguments[3], **others)


def test_the_launcher_tells_tensors_of_any_layout_and_dtype_apart(repeated: Driver) -> None:
    """Those that a call is given beside q, k and v."""
    x = torch.zeros(64, HEADS, HEAD_DIM, dtype=torch.float16)
    packed = [dict(cu_seqlens_q=n, cu_seqlens_k=n) for n in map(torch.IntTensor, ([0, 64], [0, 9, 64], [0, 64, 64]))]
    padded = [dict(key_lengths=torch.tensor([9], dtype=dtype)) for dtype in (torch.int32, torch.int64)]
    paged = [dict(block_table=torch.zeros(1, pages, dtype=torch.int32)) for pages in (2, 4)]
    calls = [(x, options) for options in packed] + [(x.view(1, HEADS, 64, HEAD_DIM), y) for y in padded + paged]
    sizes = dict(max_seqlen_q=64, max_seqlen_k=64, scale=1.0)
    calls_of = [functools.partial(launch_attention, q, q, q, Options(**x, **sizes)) for q, x in calls]
    in_any_order(repeated, calls_of, same=1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("preset", ["log-bias", "log-rotary-bias"])
def test_another_length_asks_triton_no_more(
    preset: str, known: bool, repeated: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and decode: nothing is compiled for a length, nor looked up."""
    if not known:
        monkeypatch.setattr(attention, "_kind_of", lambda *arguments: None)

    def call(length: int, num_queries: int | None = None) -> None:
        (q, k, v, position), options = dense(
            (2, HEADS, num_queries or length, HEAD_DIM), num_keys=length, preset=preset, window=(100, None)
        )
        out = log_attention(q, k, v, position, query_start=length // 3, **options)
        out.backward(torch.ones_like(out))

    for length in (200, 1024, 1):
        call(length)
    call(2000, num_queries=1)
    with asked() as run:
        for length in (333, 16, 4096, 17, 2048, 1001):
            call(length)
        for length in (513, 4096):
            call(length, num_queries=1)
    assert [x.args[0].fn.__name__ for x in run.call_args_list] == []


def test_calls_of_one_kind_ask_no_more(repeated: Driver) -> None:
    """Neither the checks, nor Triton: whatever the tensors' values are, and whether gradients are wanted."""
    arguments, options = dense()
    log_attention(*arguments, **options)
    unchecked = mock.patch.object(checks, "check_tensors", side_effect=AssertionError)
    with unchecked, asked() as run:
        for gradients in (True, False):
            (q, k, v, position), _ = dense()
            q.requires_grad_(gradients)
            log_attention(q + 1, k, v, position, **options)
    run.assert_not_called()
    assert len(attention._known) == len(problem._sizes) == 1


def test_a_changing_position_is_no_new_kind(repeated: Driver) -> None:
    """As in decoding with a cache of one size: neither memory grows, nor is Triton asked."""
    arguments, options = dense((1, HEADS, 1, HEAD_DIM), num_keys=1024)
    lengths = torch.tensor([1])
    with torch.no_grad():
        log_attention(*arguments, **options, query_start=0, key_lengths=lengths)
        with asked() as run:
            for n in range(1, 20):
                log_attention(*arguments, **options, query_start=n, key_lengths=lengths + n)
    run.assert_not_called()
    assert len(problem._sizes) == 1
    assert not attention._known


def test_kinds_of_calls_do_not_fill_the_memory(repeated: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_KNOWN", 3)
    monkeypatch.setattr(problem, "MOST_KINDS", 5)
    for num_keys in range(32, 44):
        (q, k, v, position), options = dense(num_keys=num_keys)
        log_attention(q, k, v, position, **options)
        log_attention(q, k, v, position, **options, query_start=0)
    assert 0 < len(attention._known) <= 3
    assert 0 < len(problem._sizes) <= 5


def test_what_is_remembered_holds_no_tensor(repeated: Driver) -> None:
    for changed in CALLS:
        arguments, options = dense(**changed)
        log_attention(*arguments, **options)
        tensors = [weakref.ref(x) for x in arguments[:3]]
        del arguments, options
        repeated.launches.clear()
        gc.collect()
        assert all(x() is None for x in tensors), changed
