"""The operator ``torch.ops.logpe.attention``: schema, fake kernels, autograd, and its two implementations.

Beside it ``torch.ops.logpe.rotate``, which turns queries and keys once, for a cache.

CUDA (and ROCm) tensors go to the Triton kernels, CPU tensors to :mod:`logpe.blocked`, or to the Triton
kernels under Triton's interpreter where ``backend="triton"`` asks for them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

import numpy
import torch
from logpe_kernels.options import NUM_LEARNABLE, NUM_TENSORS, Options, new_output
from torch import Tensor

from logpe import eager, reference

_NO_TRANSFORM = (
    "logpe.attention has no derivative under torch.func (grad, vjp, jvp, jacrev, ...) and no forward-mode one (jvp): "
    'they work with backend="reference", and in LogAttention with need_weights=True'
)
_TYPES = {
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    torch.dtype | None: "ScalarType?",
}
_SCHEMA = ", ".join(f"{_TYPES[hint]} {name}" for name, hint in get_type_hints(Options).items())

_library = torch.library.Library("logpe", "DEF")
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_SCHEMA}, str backend) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SCHEMA}, bool[] learned, str backend) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?)"
)
_library.define(
    "rotate(Tensor x, Tensor theta, Tensor? starts, SymInt start, float rotary_scale, bool inverse) -> Tensor"
)


def interpreting() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter (TRITON_INTERPRET, read when they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on ``device``; None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels need a GPU, and the tensors are on {device} (TRITON_INTERPRET=1 interprets them)"
    return _why_no_triton()


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    older = triton.__version__.startswith("3.6.")
    if interpreting() and older and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} works with NumPy below 2.4, and this is "
            f"{numpy.__version__}: install another version of either"
        )
    return None


@functools.cache
def _implementation(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the forward and the backward pass; imported here, so that logpe imports where there is no triton."""
    if backend == "blocked":
        from logpe.blocked import backward, forward

        return forward, backward
    from logpe_kernels.backward import attention_backward
    from logpe_kernels.forward import attention

    return attention, attention_backward


@functools.cache
def plans() -> ModuleType:
    """Return logpe_kernels.plan, with which triton comes."""
    from logpe_kernels import plan

    return plan


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, plan: Any = None
) -> tuple[Tensor, Tensor]:
    """Run the operator. plan: the kernels' plan of such a call, where it is known.

    In plain eager execution its implementation is called without the dispatcher, see :mod:`logpe.eager`.
    """
    if not q.is_meta and direct(q, k, v, *options[:NUM_TENSORS]):
        return run(q, k, v, options, backend, plan)
    return torch.ops.logpe.attention(q, k, v, *options, backend)


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors, which are on one device, may go past the dispatcher."""
    return not eager.observed() and eager.plain(*tensors)


def run(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, plan: Any) -> tuple[Tensor, Tensor]:
    """Run the operator on what is :func:`direct`."""
    if not torch.is_grad_enabled():
        return _run(q, k, v, options, backend, plan)
    return _apply(q, k, v, options, backend, plan, _run, *options[:NUM_LEARNABLE])


def _run(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, plan: Any = None) -> tuple[Tensor, Tensor]:
    forward, _ = _implementation(backend)
    rest = () if plan is None else (plan,)
    if _is_elsewhere(q):
        with torch.cuda.device_of(q):
            return forward(q, k, v, options, *rest)
    return forward(q, k, v, options, *rest)


def _is_elsewhere(q: Tensor) -> bool:
    """Whether q is on a GPU that is not the current one, on which kernels are launched."""
    return q.is_cuda and q.get_device() != torch.cuda.current_device()


def _refuse_batch(*inputs: Any) -> NoReturn:
    raise RuntimeError(_NO_TRANSFORM)


def _below_autograd(
    q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, plan: None
) -> tuple[Tensor, Tensor]:
    with eager.below_autograd():
        return torch.ops.logpe.attention(q, k, v, *options, backend)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, backend = rest
    return _run(q, k, v, Options(*options), backend)


def _forward_autograd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if eager.transforming():
        raise RuntimeError(_NO_TRANSFORM)
    *values, backend = rest
    options = Options(*values)
    return _Attention.apply(q, k, v, options, backend, None, _below_autograd, *options[:NUM_LEARNABLE])


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    *values, learned, backend = rest
    options = Options(*values)
    if options.block_table is not None:
        raise RuntimeError('attention over a block_table has no gradient, except with backend="reference"')
    with torch.cuda.device_of(q):
        return _implementation(backend)[1](dout, dlse, q, k, v, out, lse, options, learned)


def rotate(x: Tensor, theta: Tensor, starts: Tensor | None, start: int, rotary_scale: float) -> Tensor:
    """Run the operator, or the eager definition where there is none: on other devices, under torch.func."""
    if eager.transforming() or x.device.type not in ("cpu", "cuda", "meta"):
        return _rotate_eagerly(x, theta, starts, start, rotary_scale)
    if not (torch.is_grad_enabled() or x.is_meta) and direct(x, theta, starts):
        return _rotate(x, theta, starts, start, rotary_scale, False)
    return torch.ops.logpe.rotate(x, theta, starts, start, rotary_scale, False)


def _rotate_eagerly(
    x: Tensor, theta: Tensor, starts: Tensor | None, start: int, rotary_scale: float, inverse: bool = False
) -> Tensor:
    positions = reference.positions_of(x.shape[2], start, starts, x.device)[:, None]
    x = x.where(positions[..., None] >= 0, 0)  # such tokens do not exist, and may hold anything
    return reference.rotate(x, positions, theta, rotary_scale, inverse)


def _rotate(x: Tensor, theta: Tensor, starts: Tensor | None, start: int, rotary_scale: float, inverse: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    if x.device.type == "cpu":
        return out.copy_(_rotate_eagerly(x, theta, starts, start, rotary_scale, inverse))
    from logpe_kernels import rotation

    theta = theta.contiguous()
    with torch.cuda.device_of(x):
        return rotation.rotate(x, out, theta, rotary_scale, None, starts, start, x.shape[2], inverse)


def _rotate_fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, _ = rest
    lse_shape = q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
    out = new_output(q, False, v.shape[-1], Options(*options).out_dtype)
    return out, q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    parameters, learned = rest[:NUM_LEARNABLE], rest[-2]
    pairs = zip(parameters, learned, strict=True)
    gradients = (torch.empty_like(p) if p is not None and want else None for p, want in pairs)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *gradients


class _Attention(torch.autograd.Function):
    """Attention under autograd. What is learned comes twice: as arguments, which autograd sees, and in the options."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        backend: str,
        plan: Any,
        run: Callable[..., tuple[Tensor, Tensor]],
        *learned: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v, options, backend, plan)
        ctx.save_for_backward(q, k, v, out, lse, *options[:NUM_TENSORS])
        ctx.rest = options[NUM_TENSORS:], backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_TRANSFORM)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        numbers, backend = ctx.rest
        if dout is None:
            if dlse is None:
                return (None,) * len(ctx.needs_input_grad)
            dout = torch.zeros_like(out)
        dout = dout.to(q.dtype)
        dq, dk, dv, *gradients = torch.ops.logpe.attention_backward(
            dout, dlse, q, k, v, out, lse, *tensors, *numbers, ctx.needs_input_grad[-NUM_LEARNABLE:], backend
        )
        return dq, dk, dv, None, None, None, None, *gradients


_apply = eager.apply_of(_Attention)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, starts: Tensor | None, *scalars: Any) -> Tensor:
        ctx.save_for_backward(theta, starts)
        *ctx.scalars, ctx.inverse = scalars
        with eager.below_autograd():
            return torch.ops.logpe.rotate(x, theta, starts, *scalars)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.ops.logpe.rotate(dout, *ctx.saved_tensors, *ctx.scalars, not ctx.inverse)
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        with eager.below_autograd():
            return torch.ops.logpe.attention_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "logpe.attention has no second derivative: double backward (create_graph=True) works with "
            'backend="reference" only'
        )


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _key)
    _library.impl("attention_backward", _backward, _key)
    _library.impl("rotate", _rotate, _key)
torch.library.register_fake("logpe::attention", _forward_fake, lib=_library)
torch.library.register_fake("logpe::attention_backward", _backward_fake, lib=_library)
torch.library.register_fake("logpe::rotate", _rotate_fake, lib=_library)
for _key in ("Batched", "FuncTorchBatched"):  # gradients in batches, as jacobian(vectorize=True) takes them
    _library.impl("attention_backward", _refuse_batch, _key)
_library.impl("attention", _forward_autograd, "Autograd")
_library.impl("attention_backward", lambda *inputs: _OnceDifferentiable.apply(*inputs), "Autograd")
_library.impl("rotate", lambda *inputs: _Rotate.apply(*inputs), "Autograd")
