"""The operator inside PyTorch's machinery: opcheck, fake tensors, torch.compile, checkpointing, double backward."""

from __future__ import annotations

import functools
import gc
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import PARAMETERS, Call, make_call, make_packed_call, make_values, run
from logpe_kernels.options import LEARNABLE_PARTS, NUM_TENSORS, Options
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from logpe import (
    LogPosition,
    LogSinusoid,
    PositionValues,
    eager,
    log_attention,
    log_attention_varlen,
    merge_partials,
    ops,
    rotate,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
BACKENDS = ["blocked", pytest.param("triton", marks=interpreted)]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Switch poisoning off: the compiler has its own use of torch.empty."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def everything(form: str, **sizes: Any) -> Call:
    """A call with every option in it, dense or packed; "plain" has none; "gqa" shares keys and freezes a part.

    "wide" has a float32 out. With options, the values are wider than the keys; in "gqa" narrower.
    """
    if form == "plain":
        return make_call(2, 2, 2, 9, 9, 8, preset="none")
    if form == "wide":
        return make_call(2, 2, 2, 9, 9, 8, dtype=torch.bfloat16, out_dtype=torch.float32)
    if form == "gqa":
        return make_call(2, 4, 1, 9, 9, 8, value_dim=4, values=make_values(4, 8, learnable=("rate",)), is_causal=True)
    values = make_values(4, 8, "log-invariant", query_gain=True)._replace(theta=make_values(4, 8, "log-rotary").theta)
    options: dict[str, Any] = dict(kv_heads=2, head_dim=8, value_dim=12, values=values, window=(6, 2), dropout_p=0.2)
    options["dropout_seed"] = torch.tensor([5])
    if form == "packed":
        starts = dict(query_start=torch.tensor([2, 0, 5]), key_start=1)
        return make_packed_call([6, 0, 5], [8, 3, 7], outside=2, context_length=50, **starts, **options)
    assert form == "dense"
    options.update(query_start=torch.tensor([-1, 4]), key_start=torch.tensor([0, -2]))
    options.update(key_lengths=torch.tensor([12, 10]), context_length=torch.tensor([9, 30]))
    return make_call(2, num_queries=9, num_keys=12, key_mask=torch.randn(2, 12), **options)


def arguments_of(call: Call, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What a call hands to the two operators."""
    captured: dict[str, list[Any]] = {}

    def recorded(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:  # the last may be a plan
            given = [x for x in arguments if type(x).__name__ != "Plan"]
            captured[name] = [y for x in given for y in (x if isinstance(x, Options) else [x])] + [backend]
            return implementation(*arguments)

        return record

    functions = map(recorded, ("forward", "backward"), ops._implementation(backend))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda backend, pair=tuple(functions): pair)
        run(call, backend)
    return captured["forward"], captured["backward"]


# --- the contract of a custom operator --------------------------------------------------------------------------


def test_the_operator_takes_the_options_in_order() -> None:
    """Tensors come first, and of those the parts that are learned."""
    arguments = torch.ops.logpe.attention.default._schema.arguments
    assert tuple(x.name for x in arguments) == ("q", "k", "v", *Options._fields, "backend")
    tensors = [x.name for x in arguments if "Tensor" in str(x.type)]
    assert tuple(tensors[3:]) == Options._fields[:NUM_TENSORS]
    assert LEARNABLE_PARTS == PARAMETERS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["plain", "gqa", "dense", "packed", "wide"])
def test_opcheck(form: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = everything(form)
    forward, backward = arguments_of(call, backend, monkeypatch)
    learned = [x for x in call.values[: len(PARAMETERS)] if x is not None and x.requires_grad]
    for i, x in enumerate(forward):
        if i < 3 or any(x is y or (isinstance(x, Tensor) and x.data_ptr() == y.data_ptr()) for y in learned):
            forward[i] = x.detach().requires_grad_()
    torch.library.opcheck(torch.ops.logpe.attention.default, tuple(forward))
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.logpe.attention_backward.default, tuple(backward), test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "one query", "packed transposed"])
@pytest.mark.parametrize("value_dim", [8, 5, 12])
def test_fake_tensors_have_the_real_strides(
    value_dim: int, layout: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(value_dim=value_dim, is_causal=True)
    if layout.startswith("packed"):
        call = make_packed_call([5, 4], [5, 4], head_dim=8, **options)
        call = call.replace(q=call.q.transpose(0, 1).contiguous().transpose(0, 1))
    else:
        call = make_call(2, 4, 2, 1 if layout == "one query" else 9, 9, 8, preset="log-rotary-bias", **options)
        change = {
            "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "sliced": lambda x: torch.zeros(2, x.shape[1], 12, 20)[:, :, 1:][:, :, : x.shape[2], : x.shape[3]].copy_(x),
            "expanded": lambda x: x[:1].expand_as(x),
        }.get(layout, lambda x: x)
        call = call.replace(q=change(call.q), k=change(call.k), v=change(call.v))
    operators = torch.ops.logpe.attention, torch.ops.logpe.attention_backward
    for operator, arguments in zip(operators, arguments_of(call, backend, monkeypatch), strict=True):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        assert len(real) == len(fake)
        for x, y in zip(real, fake, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        if operator is torch.ops.logpe.attention:  # it lies like q, without what is between the rows
            swapped = {"transposed": (1, 2), "packed transposed": (0, 1)}.get(layout, (0, 0))
            assert real[0].transpose(*swapped).is_contiguous()


def test_meta_tensors_give_shapes() -> None:
    q, k = torch.empty(2, 4, 9, 8, device="meta"), torch.empty(2, 2, 12, 8, device="meta")
    out, lse = log_attention(q, k, k[..., :5], LogPosition(4, 8, device="meta"), is_causal=True, return_lse=True)
    assert (out.shape, out.device.type) == ((2, 4, 9, 5), "meta")
    assert lse.shape == (2, 4, 9)


@pytest.mark.parametrize("form", ["plain", "gqa", "dense", "packed"])
def test_eager_calls_equal_the_operator(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls go past the dispatcher, others through it, and all where torch has no such doors: the same bits."""
    call = everything(form)
    assert ops.direct(call.q)
    direct = run(call, "blocked")
    monkeypatch.setattr(eager, "known", False)
    assert not ops.direct(call.q)
    through = run(call, "blocked")
    assert all(torch.equal(x, through[name]) for name, x in direct.items())


def test_the_private_doors_agree_with_what_goes_on() -> None:
    assert eager.known
    assert not eager.observed()
    assert not eager.transforming()
    assert not eager.tracing()
    x = torch.randn(3, requires_grad=True)
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((eager.observed(), eager.transforming(), eager.tracing(), eager.plain(x)))
        return x * 2

    torch.func.vmap(look)(x)
    assert seen.pop() == (True, True, False, False)
    torch.jit.trace(look, (x,), check_trace=False)
    assert seen.pop() == (True, False, True, True)
    with FlopCounterMode(display=False):
        look(x)
    assert seen.pop() == (True, False, False, True)
    with forward_ad.dual_level():
        look(x)
    assert seen.pop() == (True, False, False, True)

    left_over: list[Tensor] = []
    torch.func.vmap(lambda x: left_over.append(x) or x)(x)
    negative = torch.complex(x, x).detach().conj().imag
    assert negative.is_neg()
    others = left_over[0], negative, nn.parameter.UninitializedParameter()
    assert eager.plain(x, None, nn.Parameter(x))
    assert not any(eager.plain(x, y) for y in others)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 2, None


def test_the_direct_apply_is_apply() -> None:
    for apply in (Double.apply, eager.apply_of(Double)):
        x = torch.randn(3, requires_grad=True)
        out = apply(x, 2.0)
        assert torch.equal(out, x * 2)
        assert torch.equal(*torch.autograd.grad(out.sum(), x), torch.full_like(x, 2.0))


def test_whoever_observes_sees_the_operator() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    call = make_call(1, 2, num_queries=5, head_dim=8, is_causal=True)
    with Seen():
        run(call, "blocked")
    assert "logpe.attention.default" in names
    assert "logpe.attention_backward.default" in names
    traced = make_fx(lambda q: log_attention(q, call.k, call.v, call.values, is_causal=True))(call.q)
    assert torch.ops.logpe.attention.default in [node.target for node in traced.graph.nodes]


def test_other_dispatch_modes_may_be_about() -> None:
    """Such as the counter of operations, or selective checkpointing."""
    call = everything("gqa")
    expected = run(call, "blocked")
    with FlopCounterMode(display=False):
        actual = run(call, "blocked")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda function, q: torch.func.grad(lambda q: function(q).square().sum())(q),
    "vjp": lambda function, q: torch.func.vjp(function, q)[1](torch.ones_like(q))[0],
    "jvp": lambda function, q: torch.func.jvp(function, (q,), (torch.ones_like(q),))[1],
    "per sample": lambda function, q: torch.func.vmap(
        torch.func.grad(lambda q: function(q[None]).square().sum()),
    )(q),
    "hessian": lambda function, q: torch.func.hessian(lambda q: function(q).square().sum())(q),
    "batch of gradients": lambda function, q: torch.autograd.grad(
        function(leaf := q.clone().requires_grad_()), leaf, torch.ones(3, *q.shape), is_grads_batched=True
    )[0],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(transform: str) -> None:
    """Are refused, and work on the reference, as the message says."""
    values = make_values(2, 8, "log-rotary-bias", query_gain=True)
    q, k = torch.randn(2, 2, 3, 8, dtype=torch.float64), torch.randn(1, 2, 3, 8, dtype=torch.float64)

    def function(q: Tensor, backend: str = "blocked") -> Tensor:
        turned = rotate(q, values)
        return log_attention(turned, *[k.expand_as(q)] * 2, values, is_causal=True, backend=backend)

    with pytest.raises(RuntimeError, match=r'torch\.func.*backend="reference"'):
        TRANSFORMS[transform](function, q)
    result = TRANSFORMS[transform](functools.partial(function, backend="reference"), q)
    assert result.isfinite().all()
    if transform in ("grad", "per sample"):
        leaf = q.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
        torch.testing.assert_close(result, expected)
    if transform == "jvp":
        moved = [function(q + step) for step in (1e-6, -1e-6)]
        torch.testing.assert_close(result, (moved[0] - moved[1]) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_vmap(backend: str) -> None:
    values = make_values(2, 8)
    q, key_mask, lengths = torch.randn(3, 1, 2, 5, 8), torch.randn(3, 1, 5), torch.tensor([[5], [2], [4]])

    def function(q: Tensor, key_mask: Tensor, lengths: Tensor) -> Tensor:
        options: dict[str, Any] = dict(key_mask=key_mask, key_lengths=lengths, query_start=0, backend=backend)
        return log_attention(q, q, q, values, is_causal=True, dropout_p=0.3, dropout_seed=torch.tensor([7]), **options)

    results = []
    stacked = torch.stack([function(*x) for x in zip(q, key_mask, lengths, strict=True)])
    for out in (torch.func.vmap(function)(q, key_mask, lengths), stacked):
        results.append((out, *torch.autograd.grad(out.square().sum(), values[:2])))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


class Attend(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return log_attention(q, q, q, is_causal=True)


class Turn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = LogPosition(2, 8, "log-rotary")

    def forward(self, q: Tensor) -> Tensor:
        return rotate(q, self.position)


def test_torchscript_is_refused() -> None:
    """A trace would keep the lengths of its example."""
    q = torch.randn(1, 2, 5, 8)
    for function in (log_attention, log_attention_varlen, rotate, merge_partials):
        with pytest.raises(RuntimeError, match=f"{function.__name__} cannot be compiled by torch.jit.script"):
            torch.jit.script(function)
    with pytest.raises(RuntimeError, match="log_attention cannot be compiled by"):
        torch.jit.script(Attend())
    for function in (Attend(), lambda q: rotate(q, make_values(2, 8, "log-rotary"))):
        with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.jit\.trace.* use torch\.export"):
            torch.jit.trace(function, q)


def test_symbolic_trace_says_how() -> None:
    with pytest.raises(TypeError, match=r'q must be a tensor, got a Proxy.*torch\.fx\.wrap\("log_attention"\)'):
        torch.fx.symbolic_trace(Attend())
    with pytest.raises(TypeError, match="x must be a tensor, got a Proxy"):
        torch.fx.symbolic_trace(Turn())
    scope: dict[str, Any] = {}
    exec(  # a module that follows the advice
        "import torch\nfrom logpe import log_attention\ntorch.fx.wrap('log_attention')\n"
        "def function(q):\n    return log_attention(q, q, q, is_causal=True)",
        scope,
    )
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(torch.fx.symbolic_trace(scope["function"])(q), scope["function"](q))


def indexed(x: Tensor, key: Any) -> Tensor:
    """x[key] for numbers, None, slices and ..., without the C++ that wants the device to be there."""
    key = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in key:
        place = key.index(Ellipsis)
        key[place : place + 1] = [slice(None)] * (x.dim() - sum(k is not None for k in key) + 1)
    dim = 0
    for k in key:
        if isinstance(k, slice):
            first, end, step = k.indices(x.shape[dim])
            assert step == 1
            x = x.narrow(dim, first, end - first)
        else:
            x = x.unsqueeze(dim) if k is None else x.select(dim, k)
        dim += not isinstance(k, int)
    return x


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the definition runs there, and only if it is asked for; it needs no float64, which mps has not."""

    class NoDouble(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            for x in torch.utils._pytree.tree_leaves(out):
                assert not isinstance(x, Tensor) or x.device.type == "cpu" or x.dtype != torch.float64
            return out

    monkeypatch.setattr(FakeTensor, "__getitem__", indexed)
    monkeypatch.setattr(FakeTensor, "__invert__", lambda x: torch.eq(x, 0))
    values = make_values(2, 8, "log-rotary-bias", query_gain=True)
    with NoDouble():
        with pytest.raises(AssertionError):
            torch.empty(1, device=device, dtype=torch.float64)
        x = [torch.empty(1, 2, 5, 8, device=device) for _ in range(3)]
        theta = torch.empty(4, dtype=torch.float64)
        position = PositionValues(*(None if t is None else torch.empty(2, device=device) for t in values[:4]), theta)
        with pytest.raises(RuntimeError, match=f'backend="auto" has nothing fast on {device}.*backend="reference"'):
            log_attention(*x, position, is_causal=True)
        for backend, message in ("triton", "need a GPU"), ("blocked", "runs on the CPU, and q is on"):
            with pytest.raises(RuntimeError, match=f"{message}.*{device}"):
                log_attention(*x, position, is_causal=True, backend=backend)
        out = log_attention(*x, position, is_causal=True, backend="reference")
        turned = rotate(x[0], position)
        assert out.shape == turned.shape == x[0].shape
        assert out.device.type == turned.device.type == device
        made, moved = (LogPosition(2, 8, "log-rotary", device=where) for where in (device, "cpu"))
        for module in (made, moved.to_empty(device=device)):
            out = log_attention(*x, module, is_causal=True, backend="reference")
            assert out.device.type == rotate(x[0], module).device.type == device
        for positions in (torch.empty(5, device=device), 5):
            encoding = LogSinusoid(7)(positions, device=device)
            assert (encoding.shape, encoding.device.type) == ((5, 7), device)


def test_shapes_without_values() -> None:
    """Meta and fake tensors, on every backend that could run there."""
    values = make_values(4, 8, "log-rotary-bias", device="meta")
    bounds = torch.tensor([0, 4, 9], device="meta")
    q = torch.empty(9, 4, 8, device="meta")
    for backend in ("auto", "blocked", "reference"):
        out, lse = log_attention_varlen(
            q, q, q, values, bounds, bounds, 5, 5, is_causal=True, dropout_p=0.1, backend=backend, return_lse=True
        )
        assert (out.shape, lse.shape, out.device.type) == (q.shape, (4, 9), "meta")
        with FakeTensorMode():
            x = torch.empty(2, 4, 9, 8)
            options = dict(key_lengths=torch.tensor([3, 9]), key_mask=torch.zeros(2, 9), query_start=0)
            out = log_attention(x, x, x, is_causal=True, dropout_p=0.1, backend=backend, **options)
            assert out.shape == x.shape
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run here.*meta'):
        log_attention(*[torch.empty(1, 2, 3, 8, device="meta")] * 3, backend="triton")


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad: bool) -> None:
    """Not dropped, as it would be past the dispatcher without gradients."""
    q, tangent = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        with pytest.raises(NotImplementedError, match=r'jvp.*backend="reference"'):
            log_attention(dual, q, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_functional_transform_left_behind(backend: str) -> None:
    """A tensor in the wrapper of a transform that is over."""
    left = []

    def function(q: Tensor) -> Tensor:
        left.append(2 * q)
        return q.sum()

    q = torch.randn(1, 2, 5, 8)
    torch.func.grad(function)(q)
    with torch.no_grad():
        expected = log_attention(2 * q, q, q, backend=backend)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(log_attention(left[0], q, q, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_is_what_was_given(backend: str) -> None:
    """Through autograd, so that it can be offloaded; and nothing else is kept."""
    call = everything("dense")
    saved: list[Tensor] = []

    def pack(x: Tensor) -> int:
        saved.append(x.detach().clone())
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
        expected = run(call, backend)
    assert len(saved) == 5 + 5 + 5 + 1  # q, k, v, out, lse; of the position; lengths and mask; seed
    key_mask = torch.randn(2, 12)
    kept, options = weakref.ref(key_mask), call.options | dict(key_mask=key_mask)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: None):
        out = log_attention(call.q, call.k, call.v, call.values, **options, backend=backend)
    del key_mask, options
    gc.collect()
    assert out.requires_grad
    assert kept() is None
    assert all(torch.equal(x, expected[name]) for name, x in run(call, backend).items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_is_kept_without_gradients(backend: str) -> None:
    call = everything("dense")
    with torch.no_grad():
        assert not log_attention(call.q, call.k, call.v, call.values, **call.options, backend=backend).requires_grad
    out = log_attention(call.q, call.k, call.v, call.values, **call.options, backend=backend)
    assert out.requires_grad  # through the position alone
    with torch.inference_mode():
        log_attention(call.q, call.k, call.v, call.values, **call.options, backend=backend)


# --- torch.compile -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Projections around log_attention, with a position of its own."""

    def __init__(self, heads: int = 2, dim: int = 8, **options: Any) -> None:
        super().__init__()
        self.position = LogPosition(heads, dim, "log-rotary-bias", query_gain=True)
        self.heads, self.options = heads, options
        self.qkv, self.out = nn.Linear(heads * dim, 3 * heads * dim), nn.Linear(heads * dim, heads * dim)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = log_attention(q, k, v, self.position, key_lengths=key_lengths, **self.options)
        return self.out(out.transpose(1, 2).flatten(2))


class PackedLayer(Layer):
    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        out = log_attention_varlen(q, k, v, self.position, cu_seqlens, cu_seqlens, longest, longest, **self.options)
        return self.out(out.flatten(1))


LENGTHS = (9, 12, 17, 33, 20, 65)


def compiled_equals_eager(layer: nn.Module, inputs: list[tuple[Any, ...]], compiler: str) -> None:
    """Values and gradients, and nothing is compiled after the first input."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in inputs:
            results = []
            for function in (layer, compiled):
                layer.zero_grad()
                out = function(*arguments)
                out.square().sum().backward()
                results.append([out, *(p.grad.clone() for p in layer.parameters())])
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs > 0


@pytest.mark.parametrize("options", [dict(is_causal=True), dict(window=(5, 3))], ids=["causal", "window"])
def test_compiled_over_many_lengths(options: dict[str, Any]) -> None:
    compiled_equals_eager(Layer(**options), [(torch.randn(2, n, 16),) for n in LENGTHS], "aot_eager")


def test_compiled_with_padding() -> None:
    inputs = [(torch.randn(2, n, 16), torch.randint(1, n, (2,))) for n in LENGTHS]
    compiled_equals_eager(Layer(), inputs, "aot_eager")


def test_compiled_packed() -> None:
    inputs = []
    for n in LENGTHS:
        cut = int(torch.randint(2, n, ()))
        inputs.append((torch.randn(n, 16), torch.tensor([0, cut, n], dtype=torch.int32), n))
    compiled_equals_eager(PackedLayer(is_causal=True), inputs, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor() -> None:
    compiled_equals_eager(Layer(is_causal=True), [(torch.randn(2, n, 16),) for n in LENGTHS], "inductor")


@pytest.mark.gpu
def test_compiled_by_inductor_on_a_gpu() -> None:
    layer = Layer(is_causal=True).cuda()
    compiled_equals_eager(layer, [(torch.randn(2, n, 16, device="cuda"),) for n in LENGTHS], "inductor")


def test_compiled_with_views() -> None:
    """Parameters that are columns, and a mask that is a transpose."""
    table = torch.rand(2, 2, requires_grad=True)

    def function(q: Tensor, table: Tensor, key_mask: Tensor) -> Tensor:
        values = PositionValues(power=table[:, 0], rate=table[:, 1])
        return log_attention(q, q, q, values, is_causal=True, key_mask=key_mask.T)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    arguments = torch.randn(3, 2, 9, 8), table, torch.rand(9, 3) < 0.7
    results = [(out, *torch.autograd.grad(out.sum(), table)) for out in (f(*arguments) for f in (function, compiled))]
    torch.testing.assert_close(results[0], results[1])


def test_compiled_decoding() -> None:
    """One query against a growing cache: the same graph at every step."""
    position = LogPosition(2, 8, "log-bias", query_gain=True)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return log_attention(q, k, v, position, is_causal=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    graphs = 0
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(5, 30, 4):
            torch.testing.assert_close(compiled(q, k[:, :, :n], v[:, :, :n]), step(q, k[:, :, :n], v[:, :, :n]))
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs > 0


def test_compiled_dropout_draws_anew() -> None:
    def function(q: Tensor) -> Tensor:
        return log_attention(q, q, q, dropout_p=0.5)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    q = torch.randn(1, 2, 20, 8)
    first, second = compiled(q), compiled(q)
    assert not torch.equal(first, second)
    assert first.isfinite().all()


def test_compiled_lse_gradient_and_autocast() -> None:
    position = LogPosition(2, 8)

    def function(q: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = log_attention(q, q, q, position, is_causal=True, return_lse=True)
        return out.float().sum() + lse.sum()

    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    expected = torch.autograd.grad(function(q), [q, *position.parameters()])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(q), [q, *position.parameters()]), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_with_a_sink() -> None:
    """For each query, whose number changes, and for each head."""
    position = LogPosition(2, 8, query_gain=True)

    def function(q: Tensor, sink: Tensor) -> Tensor:
        return log_attention(q, q, q, position, is_causal=True, sink=sink)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sinks in ([torch.randn(1, 2, n) for n in LENGTHS], [torch.randn(2) for _ in LENGTHS]):
        with torch._dynamo.config.patch(error_on_recompile=sinks[0].dim() == 1):
            for n, sink in zip(LENGTHS, sinks, strict=True):
                q, sink = torch.randn(1, 2, n, 8, requires_grad=True), sink.requires_grad_()
                leaves = [q, sink, *position.parameters()]
                results = [torch.autograd.grad(f(q, sink).sum(), leaves) for f in (function, compiled)]
                for x, y in zip(*results, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


# --- checkpointing, double backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_dropout(use_reentrant: bool, backend: str) -> None:
    layer = Layer(is_causal=True, dropout_p=0.4, backend=backend)
    x = torch.randn(2, 12, 16)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        out = checkpoint(layer, leaf, use_reentrant=use_reentrant) if recompute else layer(leaf)
        layer.zero_grad()
        out.square().sum().backward()
        gradients.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_says_that_there_is_none(backend: str) -> None:
    position = LogPosition(2, 8)
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    out = log_attention(q, q, q, position, is_causal=True, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
        gradient.square().sum().backward()


def test_double_backward_of_the_reference() -> None:
    position = LogPosition(2, 8).double()
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor) -> Tensor:
        return log_attention(q, q, q, position, is_causal=True, backend="reference")

    assert torch.autograd.gradgradcheck(function, (q,), fast_mode=True)
    (gradient,) = torch.autograd.grad(function(q).square().sum(), q, create_graph=True)
    gradient.square().sum().backward()
    assert position.raw_power.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_over_two_uses(backend: str) -> None:
    """One position, two calls, one backward: the parameters collect both."""
    position = LogPosition(2, 8)
    q = torch.randn(1, 2, 9, 8)
    loss = [log_attention(x, x, x, position, is_causal=True, backend=backend).square().sum() for x in (q, 2 * q)]
    separate = [torch.autograd.grad(x, position.raw_rate, retain_graph=True)[0] for x in loss]
    (together,) = torch.autograd.grad(loss[0] + loss[1], position.raw_rate)
    torch.testing.assert_close(together, separate[0] + separate[1])
    assert not math.isnan(float(together.sum()))


@pytest.mark.skipif(not ops.interpreting(), reason="the kernels are compiled here")
@pytest.mark.parametrize(("triton_version", "numpy_version", "refused"),
                         [("3.6.0", "2.4.1", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.1", False)])  # fmt: skip
def test_versions_whose_interpreter_fails_are_refused(
    triton_version: str, numpy_version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    ops._why_no_triton.cache_clear()
    try:
        reason = ops.why_not_triton(torch.device("cpu"))
    finally:
        ops._why_no_triton.cache_clear()
    assert (reason is not None) == refused
    assert reason is None or "works with NumPy below 2.4, and this is 2.4.1" in reason
