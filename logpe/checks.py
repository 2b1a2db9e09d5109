"""What is wrong with the arguments of a call, said clearly.

All functions raise TypeError or ValueError. A message names the argument, what it was, and what is allowed. A
``check_`` function returns the argument as the backends take it, if that may differ from what was given; a
``resolve_`` function also fills in defaults.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from logpe_kernels.options import LEARNABLE_PARTS, MAX_HEAD_DIM
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from logpe import eager
from logpe.reference import PositionValues, bounded, device_of_angles

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT_DTYPES = (torch.int32, torch.int64)
MAX_POSITION = 2**29  # a position plus as many tokens plus a window stays within int32
PAGE_SIZES = (16, 32, 64, 128, 256)
Window = int | tuple[int | None, int | None] | None
# Tuples, since a union of types would be built anew in each call.
_INTEGERS = (int, torch.SymInt, numbers.Integral)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)

# --- numbers ------------------------------------------------------------------------------------------------


def plain_value(value: Any) -> Any:
    """Return the Python scalar in a NumPy scalar or a tensor without dimensions; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and not getattr(value, "is_meta", False) else value


def plain_int(name: str, value: Any) -> int:
    """Return ``value``, an integer of at least 1 of Python, of NumPy or in a tensor, as an int."""
    try:
        plain = None if isinstance(plain_value(value), bool) else operator.index(value)
    except TypeError:
        plain = None
    if plain is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if plain < 1:
        raise ValueError(f"{name} must be at least 1, got {plain}")
    return plain


def plain_float(name: str, value: Any) -> float:
    """Return ``value``, a number of Python, of NumPy or in a tensor without a gradient, as a float."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, which is not learned, got a tensor that requires a gradient")
    plain = plain_value(value)
    number = check_number(name, plain)
    if math.isinf(number) and not isinstance(plain, float):
        raise ValueError(f"{name} must be at most {sys.float_info.max}, got a number beyond it")
    return number


def plain_bool(name: str, value: Any) -> bool:
    """Return ``value``, a bool of Python, of NumPy or in a tensor, as a bool."""
    plain = plain_value(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return plain


def check_number(name: str, value: Any, instead: str = "") -> float:
    """Return a number of Python, of NumPy or of a compiler as a float, or inf if it is too large for one.

    A tensor is refused, since it would be cut off from its gradient. The message then says ``instead``, what to do.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}{instead}")
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _plain_integer(x: Any) -> Any:
    """Return an integer as an int; a compiler's symbol stays one."""
    return x if type(x) is torch.SymInt else int(x)


# --- q, k and v ---------------------------------------------------------------------------------------------


def check_local(name: str, x: Tensor) -> None:
    """Raise TypeError if ``x`` is a DTensor, of which a rank may see a part or the whole."""
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} must be the tensor of this rank, got a DTensor: pass {name}.to_local(), with the heads of the "
            "position. See logpe.HeadParallel"
        )


def check_dense(name: str, x: Any, wanted: str = "a tensor") -> None:
    """Raise TypeError unless ``x`` is a dense tensor."""
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):
            raise TypeError(
                f"{name} must be a tensor, got a Proxy: torch.fx.symbolic_trace needs the function as a leaf; write "
                'torch.fx.wrap("log_attention"), or the name of another, at the top of the module that calls it'
            )
        raise TypeError(f"{name} must be {wanted}, got {type(x).__name__}")
    check_local(name, x)
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: log_attention_varlen takes packed sequences, which are "
            "values() and offsets() of a jagged one"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {x.layout}")


def check_tensors(num_dims: int, **tensors: Tensor) -> list[torch.Size]:
    """Check q, k and v, or a single tensor, and return their shapes."""
    if eager.tracing():
        raise RuntimeError(
            "attention with log positions cannot be traced by torch.jit.trace, which would keep the lengths of the "
            "example: use torch.export or torch.compile"
        )
    first, *_ = tensors
    for name, x in tensors.items():
        check_dense(name, x)
        if x.dim() != num_dims:
            layout = "(B, H, N, D)" if num_dims == 4 else "(total, H, D)"
            raise ValueError(f"{name} must have {num_dims} dimensions {layout}, got shape {tuple(x.shape)}")
    shapes = [x.shape for x in tensors.values()]
    dtype, device, head_dim = tensors[first].dtype, tensors[first].device, shapes[0][-1]
    if dtype not in DTYPES:
        raise TypeError(f"{first} must be float16, bfloat16, float32 or (on the CPU) float64, got {dtype}")
    for (name, x), shape in zip(tensors.items(), shapes, strict=True):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {x.device}")
        if name == "k" and shape[-1] != head_dim:
            raise ValueError(f"k must have the head_dim of q, {head_dim}, got {shape[-1]}")
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be from 1 to {MAX_HEAD_DIM}, got {shape[-1]}")
        if shape[-1] > 1 and x.stride()[-1] != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if len(shapes) == 1:
        return shapes
    q_shape, k_shape, v_shape = shapes
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            f"v must have the shape of k, {tuple(k_shape)}, but for the last dimension, got {tuple(v_shape)}"
        )
    heads, kv_heads = q_shape[1], k_shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"the number of heads of q must be a multiple of that of k and v, got {heads} and {kv_heads}")
    return shapes


# --- the position -------------------------------------------------------------------------------------------


def check_position_values(values: PositionValues, q: Tensor, num_heads: int) -> None:
    """Check the values of a position for q, which has ``num_heads`` heads."""
    for name in LEARNABLE_PARTS:
        x = getattr(values, name)
        if x is None:
            continue
        check_dense(f"position.{name}", x)
        if x.shape != (num_heads,):
            raise ValueError(f"position.{name} must have shape ({num_heads},), got {tuple(x.shape)}")
        if x.dtype != torch.float32 and not (x.dtype == torch.float64 and q.dtype == torch.float64):
            raise TypeError(f"position.{name} must be float32, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"position.{name} must be on the device of q, {q.device}, got {x.device}")
    if values.theta is not None:
        check_theta(values.theta, q)
    if values.rate is None and values.sharpness is not None:
        raise ValueError("position.rate must be given where position.sharpness is")
    for name in ("rotary_scale", "gain_length"):
        if not getattr(values, name) > 0:
            raise ValueError(f"position.{name} must be positive, got {getattr(values, name)}")


def check_not_negative(values: PositionValues, validate: bool) -> None:
    """Raise ValueError for values of which the formulas take the logarithm or the root of less than 0."""
    for name in ("rate", "sharpness"):
        x = getattr(values, name)
        if x is not None and readable(x, validate) and (x < 0).any():
            raise ValueError(f"position.{name} must be at least 0, got {x.min().item():g}")


def check_theta(theta: Tensor, x: Tensor) -> None:
    """Check the angles that are to rotate ``x`` (..., D)."""
    head_dim, device = x.shape[-1], x.device
    check_dense("position.theta", theta)
    if theta.dim() != 1 or not 2 <= 2 * theta.shape[0] <= head_dim or theta.dtype != torch.float64:
        raise ValueError(
            f"position.theta must be float64 (planes,) with 2 * planes from 2 to head_dim {head_dim}, "
            f"got {theta.dtype} {tuple(theta.shape)}"
        )
    if theta.requires_grad:
        raise ValueError("position.theta must not require a gradient: it has none")
    if theta.device not in (device, device_of_angles(device)):
        raise ValueError(f"position.theta must be on {device}, where the tokens are, got {theta.device}")


# --- numbers of a call --------------------------------------------------------------------------------------


def resolve_window(window: Window, is_causal: bool) -> tuple[int | None, int | None]:
    """Return the window as (left, right), each an int or None for unlimited; causal is right = 0."""
    if type(is_causal) is not bool and type(is_causal).__name__ not in ("bool", "bool_", "SymBool"):  # NumPy, tracing
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if window is None:
        return None, 0 if is_causal else None
    sides = tuple(window) if isinstance(window, Sequence) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"window must be an int, (left, right) or None, got {window!r}")
    for side in sides:
        if side is not None and (isinstance(side, bool) or not isinstance(side, _INTEGERS)):
            raise TypeError(f"window must hold ints or None, got {window!r}")
        if side is not None and side < -1:
            raise ValueError(f"window must be at least 0 on each side (None or -1: unlimited), got {window!r}")
    left, right = (None if side is None or side == -1 or side >= 2**31 else _plain_integer(side) for side in sides)
    return left, 0 if is_causal else right


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the scale of the scores, 1 / sqrt(head_dim) by default."""
    if scale is None:
        return head_dim**-0.5
    scale = check_number("scale", scale, ": to learn it, or for one per head, multiply q by it and pass scale=1.0")
    if not abs(scale) < math.inf:  # nor NaN; math.isfinite would break the graph of a model whose scale is symbolic
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def resolve_out_dtype(out_dtype: torch.dtype | None, q: Tensor) -> torch.dtype | None:
    """Return the dtype of out, or None for that of q."""
    if out_dtype is None or out_dtype == q.dtype:
        return None
    if out_dtype != torch.float32 or q.dtype == torch.float64:
        allowed = " or ".join(dict.fromkeys(map(str, (q.dtype, torch.promote_types(q.dtype, torch.float32)))))
        raise TypeError(f"out_dtype must be None or {allowed} for q in {q.dtype}, got {out_dtype!r}")
    return out_dtype


def resolve_dropout(dropout_p: float, seed: Tensor | None, q: Tensor) -> tuple[float, Tensor | None]:
    """Return the probability to drop a weight and the seed, drawn if there is none; no seed without dropout."""
    dropout_p = check_number("dropout_p", dropout_p)
    if dropout_p == 0:
        return 0.0, None
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is None:  # on the device: a CUDA graph draws a new one at each replay
        return dropout_p, torch.randint(2**62, (1,), device=q.device)
    if (
        not isinstance(seed, Tensor)
        or (seed.dtype, seed.device, seed.layout) != (torch.int64, q.device, torch.strided)
        or seed.numel() != 1
    ):
        raise ValueError(f"dropout_seed must be an int64 tensor of one element on {q.device}, got {seed!r}")
    return dropout_p, seed


# --- integers, one for all sequences or one for each --------------------------------------------------------


def readable(x: Tensor, validate: bool) -> bool:
    """Whether to look at the values of ``x``: on a GPU only on demand, for reading waits; in a trace there are none."""
    if torch.compiler.is_compiling() or eager.transforming() or get_proxy_mode() or isinstance(x, FakeTensor):
        return False
    return x.device.type != "meta" and (validate or x.device.type == "cpu")


def _check_int_vector(name: str, x: Any, length: int | None, q: Tensor) -> Tensor:
    check_dense(name, x, "an int32 or int64 tensor")
    if x.dtype not in INT_DTYPES:
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {x.dtype}")
    if x.dim() != 1 or (length is not None and x.shape[0] != length):
        shape = "(B + 1,)" if length is None else f"({length},)"
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    return x.contiguous()


def check_int_tensor(name: str, x: Any, batch: int, q: Tensor, validate: bool, low: int, high: int) -> Tensor:
    """Return a tensor of one integer for each sequence, from ``low`` to ``high``, as int32 (batch,)."""
    x = _check_int_vector(name, x, batch, q)
    if readable(x, validate) and x.numel():
        smallest, largest = int(x.min()), int(x.max())
        if smallest < low or largest > high:
            raise ValueError(f"{name} must be from {low} to {high}, got values from {smallest} to {largest}")
    return x.to(torch.int32)


def _check_integer(name: str, x: int, batch: int) -> int:
    if isinstance(x, bool) or not isinstance(x, _INTEGERS):
        raise TypeError(f"{name} must be an int or an int tensor ({batch},), got {x!r}")
    x = _plain_integer(x)
    if isinstance(x, int) and not -MAX_POSITION <= x <= MAX_POSITION:
        raise ValueError(f"{name} must be from {-MAX_POSITION} to {MAX_POSITION}, got {x}")
    return x


def resolve_start(
    name: str, start: int | Tensor, batch: int, q: Tensor, validate: bool = False
) -> tuple[int, Tensor | None]:
    """Return a position that all sequences share and None, or 0 and one position for each, int32 (batch,)."""
    if isinstance(start, Tensor):
        return 0, check_int_tensor(name, start, batch, q, validate, low=-MAX_POSITION, high=MAX_POSITION)
    return _check_integer(name, start, batch), None


def per_sequence(name: str, x: int | Tensor, batch: int, q: Tensor, validate: bool = False) -> Tensor:
    """Return one integer for each sequence, int32 (batch,)."""
    start, starts = resolve_start(name, x, batch, q, validate)
    return torch.full((batch,), start, dtype=torch.int32, device=q.device) if starts is None else starts


# --- masks and lengths --------------------------------------------------------------------------------------


def resolve_key_mask(key_mask: Tensor, batch: int, num_keys: int, q: Tensor, validate: bool) -> Tensor:
    """Return a mask (batch, num_keys) as a bias of the logits, float32, or float64 if q is."""
    check_dense("key_mask", key_mask, "a bool or floating tensor")
    if key_mask.dtype != torch.bool and not key_mask.is_floating_point():
        raise TypeError(f"key_mask must be a bool or floating tensor, got {key_mask.dtype}")
    if key_mask.shape != (batch, num_keys):
        raise ValueError(f"key_mask must have shape ({batch}, {num_keys}), got {tuple(key_mask.shape)}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask must be on the device of q, {q.device}, got {key_mask.device}")
    if key_mask.requires_grad:
        raise ValueError("key_mask must not require a gradient: it has none")
    key_mask = key_mask.contiguous()  # the kernels read it so; what follows keeps strides
    if key_mask.dtype == torch.bool:
        hidden = torch.full((), -math.inf, device=q.device)
        return torch.where(key_mask, torch.zeros((), device=q.device), hidden)
    if readable(key_mask, validate) and not (key_mask < math.inf).all():
        raise ValueError("key_mask must not hold NaN or inf")
    return bounded(key_mask.to(torch.promote_types(q.dtype, torch.float32)))


def check_sink(sink: Tensor, lse_shape: tuple[int, ...], q: Tensor, validate: bool) -> None:
    """Raise unless ``sink`` holds the score of one more key for each head, or for each head and query."""
    check_dense("sink", sink, "a floating tensor")
    if not sink.is_floating_point():
        raise TypeError(f"sink must be a floating tensor, got {sink.dtype}")
    heads = q.shape[1]
    if sink.shape != (heads,) and sink.shape != lse_shape:  # torch.compile misreads "in"
        raise ValueError(f"sink must have shape ({heads},) or {lse_shape}, got {tuple(sink.shape)}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on the device of q, {q.device}, got {sink.device}")
    # One for each query may follow from queries that are padding, which may hold anything.
    if sink.dim() == 1 and readable(sink, validate) and not sink.isfinite().all():
        raise ValueError("sink must be finite, got NaN or inf")


def check_max_seqlen(name: str, x: int) -> int:
    """Return the length of the longest sequence as an int."""
    if isinstance(x, bool) or not isinstance(x, _INTEGERS) or x < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {x!r}")
    return _plain_integer(x)


def check_cu_seqlens(axis: str, x: Tensor, tokens: Tensor, max_seqlen: int, validate: bool) -> Tensor:
    """Return cu_seqlens of an axis, "q" or "k", as int32 (B + 1,). ``tokens`` (total, H, D) is what it divides."""
    name = f"cu_seqlens_{axis}"
    x = _check_int_vector(name, x, None, tokens)
    if x.shape[0] < 1:
        raise ValueError(f"{name} must have at least one element, 0, got {tuple(x.shape)}")
    if readable(x, validate):
        bounds = x.tolist()
        if bounds[0] != 0:
            raise ValueError(f"{name} must start at 0, got {bounds[0]}")
        for before, after in itertools.pairwise(bounds):
            if after < before:
                raise ValueError(f"{name} must never fall, got {before} followed by {after}")
            if after - before > max_seqlen:
                raise ValueError(
                    f"max_seqlen_{axis} must be at least the longest sequence, {after - before}, got {max_seqlen}"
                )
        if bounds[-1] > tokens.shape[0]:
            raise ValueError(f"{name} must end at or before the {tokens.shape[0]} tokens given, got {bounds[-1]}")
    return x.to(torch.int32)


def check_block_table(block_table: Tensor, k: Tensor, q: Tensor, values: PositionValues, dropout_p: float) -> Tensor:
    """Return the pages of each sequence as int32 (B, max_pages). What pages rule out is refused, too."""
    check_dense("block_table", block_table, "an int32 or int64 tensor")
    if block_table.dtype not in INT_DTYPES:
        raise TypeError(f"block_table must be an int32 or int64 tensor, got {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table must have shape ({q.shape[0]}, max_pages), got {tuple(block_table.shape)}")
    if block_table.device != q.device:
        raise ValueError(f"block_table must be on the device of q, {q.device}, got {block_table.device}")
    if k.shape[0] == 0 or k.shape[2] not in PAGE_SIZES:
        raise ValueError(
            f"k must have shape (num_pages, Hkv, page_size, D) with at least one page of {PAGE_SIZES} tokens "
            f"where there is a block_table, got {tuple(k.shape)}"
        )
    if values.theta is not None:
        raise ValueError(
            "position must be without a rotation where there is a block_table, got one with theta: "
            "turn queries and keys with logpe.rotate, and pass position().unrotated()"
        )
    if dropout_p > 0:
        raise ValueError(f"dropout_p must be 0 where there is a block_table, got {dropout_p}")
    if block_table.dtype == torch.int64:  # an entry beyond int32 must not wrap around to a page
        block_table = block_table.clamp(-1, k.shape[0])
    return block_table.to(torch.int32).contiguous()
