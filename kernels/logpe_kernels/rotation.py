"""The companion of the attention kernels: turns queries and keys, each once, and turns their gradients back.

Inside the attention loop a key would be turned once per tile of queries. Here the angles of a position are
formed once and serve all heads.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .options import Options, new_output
from .plan import Plan, call_key, cdiv, find
from .position import rotation
from .tile import cast, in_elements, in_units, load_axis

FEW_TOKENS = 4  # of a step of decoding, which takes a smaller tile
PROGRAMS = 512  # that keep a GPU busy: with more tiles than that, heads share the angles of a program


@triton.jit(do_not_specialize=["heads_each", "count", "total", "start"])
def rotate_kernel(
    x, out, theta, cu_seqlens, starts, x_strides, out_strides, rotary_scale, num_heads, heads_each, count, total, start,
    HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    INVERSE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    x_strides, out_strides = in_elements(x_strides), in_elements(out_strides)
    num_tiles, num_parts = tl.cdiv(count, BLOCK_M), tl.cdiv(num_heads, heads_each)
    first_head = tl.program_id(0) % num_parts * heads_each
    b = tl.program_id(0) // num_parts // num_tiles
    tokens = tl.program_id(0) // num_parts % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    axis = load_axis(b, count, total, start, cu_seqlens, starts)
    rows = (axis.row + tokens).to(tl.int64)
    positions = axis.start + tokens  # [BLOCK_M]
    planes = tl.arange(0, BLOCK_P)
    angles = tl.load(theta + planes, mask=planes < PLANES, other=0.0)
    cos, sin = rotation(positions[:, None], angles[None, :], rotary_scale)  # [BLOCK_M, BLOCK_P]
    if INVERSE:
        sin = -sin

    # Positions below 0 do not exist: their rows may hold anything and become zeros.
    exists = (tokens < axis.count) & (positions >= 0)
    store = (tokens < axis.count)[:, None] & (planes < PLANES)[None, :]
    load = exists[:, None] & (planes < PLANES)[None, :]
    x += b.to(tl.int64) * x_strides[0] + first_head.to(tl.int64) * x_strides[1]
    out += b.to(tl.int64) * out_strides[0] + first_head.to(tl.int64) * out_strides[1]
    for _ in range(tl.minimum(heads_each, num_heads - first_head)):
        source = x + rows[:, None] * x_strides[2]  # [BLOCK_M, 1]
        target = out + rows[:, None] * out_strides[2]
        first = tl.load(source + planes[None, :], mask=load, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_P]
        second = tl.load(source + PLANES + planes[None, :], mask=load, other=0.0).to(tl.float32)
        tl.store(target + planes[None, :], cast(first * cos - second * sin, out.dtype.element_ty), mask=store)
        tl.store(target + PLANES + planes[None, :], cast(second * cos + first * sin, out.dtype.element_ty), mask=store)
        if 2 * PLANES < HEAD_DIM and not IN_PLACE:
            rest = 2 * PLANES + tl.arange(0, BLOCK_D)[None, :]
            value = tl.load(source + rest, mask=exists[:, None] & (rest < HEAD_DIM), other=0.0)
            tl.store(target + rest, value, mask=(tokens < axis.count)[:, None] & (rest < HEAD_DIM))
        x += x_strides[1]
        out += out_strides[1]


def rotate(
    x: Tensor,
    out: Tensor,
    theta: Tensor,
    rotary_scale: float,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    start: int,
    count: int,
    inverse: bool = False,
) -> Tensor:
    """Turn plane t of x by theta_t * f_c(position) into out, and return out; out may be x.

    x, out: (B, H, N, D), or packed (total, H, D) with cu_seqlens (B + 1,). theta: float64 (planes,), with planes at
    most D / 2; the rest of the D are copied. Positions: starts (B,) or start, plus the index of the token.
    """
    packed = cu_seqlens is not None
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    head_dim, planes, in_place = x.shape[-1], theta.shape[0], out is x
    num_heads = x.shape[1]
    key = call_key((x, out, theta, cu_seqlens, starts), "rotate", rotary_scale, count, inverse, in_place)
    BLOCK_M = FEW_TOKENS if count <= FEW_TOKENS else 16 if head_dim > 128 else 32
    tiles = batch * cdiv(count, BLOCK_M)
    heads_each = min(max(tiles * num_heads // PROGRAMS, 1), num_heads)
    strides = [in_units((0, t.stride(1), t.stride(0)) if packed else t.stride()[:3]) for t in (x, out)]
    launch(
        rotate_kernel, tiles * cdiv(num_heads, heads_each), (x, out, theta, cu_seqlens, starts),
        (*strides, None if math.isinf(rotary_scale) else float(rotary_scale),
         num_heads, heads_each, count, x.shape[0], start),
        dict(
            HEAD_DIM=head_dim, PLANES=planes, BLOCK_P=triton.next_power_of_2(planes),
            BLOCK_D=triton.next_power_of_2(max(head_dim - 2 * planes, 1)), BLOCK_M=BLOCK_M,
            INVERSE=inverse, IN_PLACE=in_place, enable_fp_fusion=True,
        ),
        find(key, dict),
    )  # fmt: skip
    return out


def turn_queries(x: Tensor, out: Tensor, options: Options, plan: Plan, inverse: bool = False) -> Tensor:
    """Turn x, which is laid out like q, into out (which may be x), as the queries of a call are turned."""
    assert options.theta is not None
    axis = options.cu_seqlens_q, options.query_starts, options.query_start, plan.num_queries
    return rotate(x, out, options.theta, options.rotary_scale, *axis, inverse=inverse)


def turn_keys(x: Tensor, out: Tensor, options: Options, plan: Plan, inverse: bool = False) -> Tensor:
    """Turn x, which is laid out like k, into out (which may be x), as the keys of a call are turned."""
    assert options.theta is not None
    axis = options.cu_seqlens_k, options.key_starts, options.key_start, plan.num_keys
    return rotate(x, out, options.theta, options.rotary_scale, *axis, inverse=inverse)


def turned(q: Tensor, k: Tensor, options: Options, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return q and k as the kernels take them: turned, where there is a rotation."""
    if options.theta is None:
        return q, k
    new_q, new_k = new_output(q, plan.packed), new_output(k, plan.packed)
    return turn_queries(q, new_q, options, plan), turn_keys(k, new_k, options, plan)
