"""Kernels that are launched again: the one that Triton would launch, with what it would be given.

No GPU is needed: kernels are compiled for sm_90, and the driver notes what it is asked to launch.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton.language as tl
from logpe_kernels import configs, plan
from logpe_kernels.forward import attention as launch_attention
from logpe_kernels.launch import dtypes
from logpe_kernels.launch import launch as launch_in
from logpe_kernels.options import Options, new_output
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
    plan.clear()
    yield gpu
    driver.set_active(before)
    plan.clear()


@pytest.fixture
def kernel() -> JITFunction:
    """A new one: it has compiled nothing."""
    return JITFunction(add, do_not_specialize=["length"])


@pytest.fixture
def launch() -> Callable[..., None]:
    """Launches as the calls of one layout do, where what is compiled for is told apart by all but the addresses."""
    kernels: dict[Any, Any] = {}

    def launch(kernel: Any, grid: int, tensors: Any, numbers: Any, constants: Any) -> None:
        variant = dtypes(tensors), numbers, *constants.values()
        launch_in(kernel, grid, tensors, numbers, constants, kernels, variant)

    return launch


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
    dict(strides=(3, tl.constexpr(5))),
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


def test_the_kernel_is_the_one_that_triton_launches(kernel: JITFunction, launch: Any, gpu: Driver) -> None:
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


def test_an_empty_grid_launches_nothing(kernel: JITFunction, launch: Any, gpu: Driver) -> None:
    launch(kernel, 0, *vary())
    assert not gpu.launches


def test_each_device_has_its_own(kernel: JITFunction, launch: Any, gpu: Driver) -> None:
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


def test_two_kernels_with_the_same_arguments(launch: Any, gpu: Driver) -> None:
    def double(x, y, pair, strides, count, length, scale, BLOCK: tl.constexpr):
        tl.store(y + tl.arange(0, BLOCK), 2.0)

    first, second = JITFunction(add, do_not_specialize=["length"]), JITFunction(double)
    launched = []
    for kernel in (first, second, first, second):
        launch(kernel, 1, *vary())
        launched.append(gpu.launches.pop()[0])
    assert launched[0] == launched[2] != launched[1] == launched[3]


def test_descriptors(launch: Any, gpu: Driver) -> None:
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


def test_hooks_hear_of_every_launch(kernel: JITFunction, launch: Any, gpu: Driver) -> None:
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
    kernels: dict[Any, Any] = {}
    for _ in range(2):
        launch_in(kernel, 3, tensors, numbers, constants, kernels)
    assert not kernels
    assert kernel.__getitem__.call_args_list == [mock.call((3,))] * 2
    kernel[(3,)].assert_called_with(*tensors, *numbers, **constants)


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


def narrow(x: Tensor) -> Tensor:
    return x[..., :8].contiguous()


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
    dict(v=narrow),
    dict(v=lambda x: torch.cat((x, x), -1)),
    dict(v=narrow, q=transposed),
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
    dict(shape=(1, HEADS, 1, HEAD_DIM), num_keys=1024, v=narrow),
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
    return gpu


def in_any_order(driver: Driver, calls: list[Callable[[], Any]], same: int) -> None:
    """Each call launches what it launches alone; ``same``: how many of them another one launches as well."""

    def launched(i: int) -> list[Any]:
        driver.launches.clear()
        calls[i]()
        return described(driver.launches)

    expected = []
    for i in range(len(calls)):
        plan.clear()
        expected.append(launched(i))
        assert expected[i]
    assert len({str(x) for x in expected}) == len(calls) - same
    for _ in range(3):
        for i in torch.randperm(len(calls)).tolist():
            assert launched(i) == expected[i], i


def remember(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let log_attention know calls again, or the kernels' launchers alone, or nobody."""
    if by == "launchers":
        monkeypatch.setattr(attention, "_key_of", lambda *arguments: None)
    monkeypatch.setattr(plan, "enabled", by != "nobody")


@pytest.mark.parametrize("by", ["log_attention", "launchers", "nobody"])
def test_calls_in_any_order_launch_what_each_alone_launches(
    by: str, repeated: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is remembered of one call is nothing to another that differs in anything."""
    remember(by, monkeypatch)

    def call(arguments: Any, options: Any) -> None:
        q, _, v, _ = arguments
        with torch.set_grad_enabled(bool(torch.randint(2, ()))):
            out = log_attention(*arguments, **options)
        expected = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else new_output(q, False, v.shape[-1])
        assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), q.dtype)

    calls = [functools.partial(call, *dense(**changed)) for changed in CALLS]
    in_any_order(repeated, calls, same=1)  # window=8 is (8, 0) where causal


BACKWARD: list[dict[str, Any]] = [
    {},
    dict(dout=transposed),
    dict(dout=lambda x: x.mT.contiguous().mT),
    dict(dout=shifted),
    dict(q=transposed),
    dict(v=first_half, k=first_half),
    dict(v=narrow),
    dict(v=narrow, dout=transposed),
    dict(lse=True),
    dict(lse=transposed),
    dict(frozen=("power",)),
    dict(frozen=("rate",)),
    dict(frozen=("power", "rate")),
    dict(preset=None),
    dict(preset="log-rotary-bias"),
    dict(position=dict(query_gain=True)),
    dict(dtype=torch.bfloat16),
    dict(window=8),
    dict(dropout_p=0.5, dropout_seed=torch.tensor([1])),
]


def test_backward_passes_in_any_order_launch_what_each_alone_launches(repeated: Driver) -> None:
    """Those of calls that share a plan, too: other gradients come in, or are wanted."""

    def call(dout: Any = None, lse: Any = None, frozen: tuple[str, ...] = (), **changed: Any) -> None:
        arguments, options = dense(**changed)
        for name in frozen:
            getattr(arguments[3], f"raw_{name}").requires_grad_(False)
        out, row = log_attention(*arguments, **options, return_lse=True)
        gradients = [torch.ones_like(out) if dout is None else dout(torch.ones_like(out))]
        if lse is not None:
            gradients.append(torch.ones_like(row) if lse is True else lse(torch.ones_like(row)[..., None])[..., 0])
        torch.autograd.backward([out, row][: len(gradients)], gradients)

    # The gradient of an output is made contiguous where its last dimension is not, and so is that of lse.
    in_any_order(repeated, [functools.partial(call, **changed) for changed in BACKWARD], same=2)


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


@pytest.mark.parametrize("by", ["log_attention", "launchers"])
@pytest.mark.parametrize("preset", ["log-bias", "log-rotary-bias"])
def test_another_length_compiles_nothing(
    preset: str, by: str, repeated: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and decode. Triton is asked once about each kernel of a new length, and then no more."""
    remember(by, monkeypatch)

    def call(length: int, num_queries: int | None = None) -> None:
        (q, k, v, position), options = dense(
            (2, HEADS, num_queries or length, HEAD_DIM), num_keys=length, preset=preset, window=(100, None)
        )
        out = log_attention(q, k, v, position, query_start=length // 3, **options)
        out.backward(torch.ones_like(out))

    def calls() -> None:
        for length in (333, 16, 4096, 17, 2048, 1001):
            call(length)
        for length in (513, 4096):
            call(length, num_queries=1)

    for length in (200, 1024, 1):
        call(length)
    call(2000, num_queries=1)
    compiled = mock.Mock(return_value=None)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", compiled)
    with asked() as run:
        calls()
    compiled.assert_not_called()
    launches = [(x.args[0].fn.__name__, str(x.args[1:]), str(x.kwargs)) for x in run.call_args_list]
    assert len(launches) == len(set(launches)) > 0
    with asked() as run:
        calls()
    run.assert_not_called()


def test_the_specialised_kernel_is_launched_again(gpu: Driver) -> None:
    """With what Triton gave it first, but for the tensors, and without asking it again."""
    position = LogPosition(HEADS, 64)()._replace(theta=None)
    options = Options(**position._asdict(), window_right=0)
    x = torch.zeros(2, HEADS, 200, 64, dtype=torch.bfloat16)
    with configs.override(forward=configs.Config(128, 64, 8, 2, SPECIALIZED=True)), asked() as run:
        for _ in range(2):
            launch_attention(x, x, x, options)
    run.assert_called_once()
    (compiled_for, grid, stream, arguments), *again = gpu.launches
    assert run.call_args.args[0].fn.__name__ == "specialized_kernel"
    assert grid == (2 * HEADS * 2, 1, 1)
    assert [launched[:3] for launched in again] == [(compiled_for, grid, stream)]
    for first, second in zip(arguments, again[0][3], strict=True):
        assert isinstance(first, Tensor) or same(first, second)


def test_calls_of_one_layout_ask_no_more(repeated: Driver) -> None:
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
    assert plan.count() == 1


def test_without_plans_every_call_is_checked_and_asks(repeated: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "enabled", False)
    arguments, options = dense(preset="log-rotary-bias")
    checked = mock.patch.object(checks, "check_tensors", side_effect=checks.check_tensors)
    for _ in range(2):
        with checked as check, asked() as run:
            log_attention(*arguments, **options)
        assert check.call_count == 1
        assert run.call_count == 3  # the rotations, and the forward kernel
    assert plan.count() == 0


def test_the_environment_switches_plans_off() -> None:
    assert plan.call_key((None,), 1) == (None, 1)
    code = "from logpe_kernels import plan; print(plan.call_key((None,), 1))"
    environment = os.environ | dict(LOGPE_PLAN="0")
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "None\n"


def test_other_tiles_are_another_plan(repeated: Driver) -> None:
    tiles = configs.Config(64, 32, 4, 2)
    calls: list[Callable[[], Any]] = []
    for kernels in ((), ("forward",), ("backward_dq",), ("backward_dkdv",)):

        def call(kernels: tuple[str, ...] = kernels) -> None:
            arguments, options = dense()
            with configs.override(**dict.fromkeys(kernels, tiles)):
                out = log_attention(*arguments, **options)
                out.backward(torch.ones_like(out))

        calls.append(call)
    in_any_order(repeated, calls, same=0)


def test_a_changing_position_is_no_new_layout(repeated: Driver) -> None:
    """Decode with a cache of one size: the memory does not grow, nor is Triton asked."""
    arguments, options = dense((1, HEADS, 1, HEAD_DIM), num_keys=1024)
    lengths = torch.tensor([1])
    with torch.no_grad():
        log_attention(*arguments, **options, query_start=0, key_lengths=lengths)
        with asked() as run:
            for n in range(1, 20):
                log_attention(*arguments, **options, query_start=n, key_lengths=lengths + n)
    run.assert_not_called()
    assert plan.count() == 1


def test_layouts_do_not_fill_the_memory(repeated: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_PLANS", 5)
    for num_keys in range(32, 44):
        (q, k, v, position), options = dense(num_keys=num_keys)
        log_attention(q, k, v, position, **options)
        log_attention(q, k, v, position, **options, query_start=0)
        assert 0 < plan.count() <= 5


def test_threads_that_call_at_once_share_the_plan(repeated: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for plans of several layouts, made once each while other threads clear the memory, fill it and read it."""
    made: list[Any] = []
    make = plan.Plan.__init__

    def slowly(*arguments: Any) -> None:
        made.append(arguments[1].shape)
        time.sleep(0.01)
        make(*arguments)

    monkeypatch.setattr(plan.Plan, "__init__", slowly)
    calls = [dense((1, HEADS, length, HEAD_DIM), num_keys=length) for length in (32, 64, 96)]
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        for i in range(6):
            arguments, options = calls[(number + i) % len(calls)]
            with torch.no_grad():
                log_attention(*arguments, **options)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(made) == plan.count() == len(calls)
    assert len(repeated.launches) == 8 * 6
    by_grid: dict[Any, set[str]] = {}
    for launched in described(repeated.launches):
        by_grid.setdefault(launched[2][0][1], set()).add(str(launched))
    assert [len(x) for x in by_grid.values()] == [1] * len(calls)  # whichever thread launched, it launched the same


def test_what_is_remembered_holds_no_tensor(repeated: Driver) -> None:
    for changed in CALLS:
        arguments, options = dense(**changed)
        log_attention(*arguments, **options)
        tensors = [weakref.ref(x) for x in arguments[:3]]
        del arguments, options
        repeated.launches.clear()
        gc.collect()
        assert all(x() is None for x in tensors), changed
