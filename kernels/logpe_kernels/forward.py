"""The forward kernel and its launcher: one program per tile of queries, an online softmax over tiles of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode
from .launch import launch
from .options import NUM_LEARNABLE, Options
from .plan import RUNTIME_INTEGERS, Plan, cdiv, new_output, plan_of, sequences_of
from .position import LN2, LOG2E, Position, query_gain
from .rotation import turned
from .tile import (
    FAR_TILES,
    FULL_TILES,
    MASKED_TILES,
    cast,
    dot,
    dropout_keep,
    far_tiles_pay,
    load_axes,
    load_key_bias,
    load_lengths,
    load_tile,
    loop_bounds,
    lse_rows,
    rows_of,
    sight,
    softmax_step,
    store_tile,
    tile_logits,
    tile_range,
    within,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    q, k, v, k_tma, v_tma, out, lse, position, sequences, dropout_seed, strides, dropout_threshold, dropout_scale,
    scale, gain_length, num_heads, group_size, num_queries, num_keys, total_queries, total_keys,
    window_left, window_right, query_start, key_start,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    batch_head = tl.program_id(0) // num_tiles
    # Late tiles see the most keys when causal: start them first.
    m0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    b, h = batch_head // num_heads, batch_head % num_heads
    queries, keys = load_axes(
        b, sequences, num_queries, num_keys, total_queries, total_keys, query_start, key_start,
        window_left, window_right,
    )  # fmt: skip
    head = Position(
        None if position.power is None else tl.load(position.power + h),
        None if position.rate is None else tl.load(position.rate + h),
        None if position.sharpness is None else tl.load(position.sharpness + h),
        None if position.alpha is None else tl.load(position.alpha + h),
    )

    batch = b if sequences.cu_seqlens_q is None else b * 0  # packed sequences lie in one
    q = rows_of(q, strides.q, batch, h, queries.row)
    k = rows_of(k, strides.k, batch, h // group_size, keys.row)
    v = rows_of(v, strides.v, batch, h // group_size, keys.row)
    out = rows_of(out, strides.out, batch, h, queries.row)
    lse += lse_rows(b, h, queries.row, num_heads, num_queries, total_queries, sequences.cu_seqlens_q is not None)

    rows = m0 + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    i = queries.start + rows  # [BLOCK_M]
    q_tile = load_tile(q, None, m0, within(i, queries), BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    n = load_lengths(sequences, b, i, window_left)
    row_scale = tl.full([BLOCK_M], scale * LOG2E, tl.float32) * query_gain(n, head, gain_length)

    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first_key, last_key = sight(i, queries, keys, window_left, window_right)
    first, last = queries.start + m0, tl.minimum(queries.start + m0 + BLOCK_M, queries.end) - 1
    tiles = tile_range(first, last, keys, window_left, window_right, sequences.key_bias is not None, BLOCK_N)
    SPLIT: tl.constexpr = (
        position.power is not None
        and position.rate is not None
        and far_tiles_pay(q.pointer.dtype.element_ty.primitive_bitwidth, position.sharpness is not None, BLOCK_N)
    )
    UNMASKED: tl.constexpr = FAR_TILES if SPLIT else FULL_TILES
    for KIND in tl.static_range(MASKED_TILES if sequences.key_bias is not None else UNMASKED, MASKED_TILES + 1):
        start, stop, hole, skip = loop_bounds(KIND, first, last, keys, tiles, SPLIT, BLOCK_N)
        for x in range(start, stop, BLOCK_N):
            n0 = tl.multiple_of(tl.where(x >= hole, x + skip, x), BLOCK_N)
            tokens = n0 + columns
            j = keys.start + tokens  # [BLOCK_N]
            mask = within(j, keys) if KIND == MASKED_TILES else None
            key_bias = None
            if sequences.key_bias is not None:
                key_bias = load_key_bias(sequences.key_bias, b, num_keys, tokens, mask)
                mask = key_bias > -float("inf")
            k_tile = load_tile(k, k_tma, n0, mask, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v_tile = load_tile(v, v_tma, n0, mask, BLOCK_N, HEAD_DIM, BLOCK_D)
            _, _, a = tile_logits(
                dot(q_tile, k_tile.T), row_scale[:, None], None, i, first_key, last_key, j, keys.start + n0,
                None if key_bias is None else key_bias[None, :], head, KIND,
            )  # fmt: skip  # [BLOCK_M, BLOCK_N]
            p, correction, m_i, l_i = softmax_step(a, m_i, l_i)
            if dropout_seed is not None:
                p = tl.where(dropout_keep(dropout_seed, batch_head, i[:, None], j[None, :], dropout_threshold), p, 0.0)
            acc = dot(cast(p, v_tile.dtype), v_tile, acc * correction[:, None])

    dead = l_i == 0.0
    scale_out = dropout_scale / tl.where(dead, 1.0, l_i) if dropout_seed is not None else 1.0 / tl.where(dead, 1.0, l_i)
    stored = rows < queries.count
    store_tile(out, m0, acc * scale_out[:, None], stored, HEAD_DIM, BLOCK_D)
    tl.store(lse + rows, tl.where(dead, -float("inf"), (m_i + tl.log2(tl.where(dead, 1.0, l_i))) * LN2), mask=stored)


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Attention with a log position.

    q: (B, Hq, Nq, D), k and v: (B, Hkv, Nk, D); packed, with cu_seqlens: (total, H, D). float16, bfloat16 or
    float32, contiguous in the last dimension. With a block_table, int32 (B, max_pages), k and v are
    (num_pages, Hkv, page_size, D), see :mod:`decode`. plan: that of an earlier call of the same layout and options,
    but for the starts; a caller that has it saves looking for it.

    Returns out like q, and lse, float32, (B, Hq, Nq) or packed (Hq, total): natural log of the sum of exponentials.
    """
    if plan is None:
        plan = plan_of(q, k, v, options)
    out = new_output(q, plan.packed)
    if plan.packed:
        lse = torch.full((plan.heads, plan.total_queries), -float("inf"), dtype=torch.float32, device=q.device)
    else:
        lse = torch.empty_strided(*plan.lse_layout, dtype=torch.float32, device=q.device)  # empty takes longer
    q, k = turned(q, k, options, plan)
    if decode.serves(plan, options):
        decode.decode(q, k, v, out, lse, options, plan)
        return out, lse
    config, constants = plan.tiles("forward")
    k_tma, v_tma = plan.descriptors(config, config.BLOCK_N, k, v)
    shared = Position(*options[:NUM_LEARNABLE]), sequences_of(options), plan.seed(options)
    launch(
        forward_kernel, plan.batch * plan.heads * cdiv(plan.num_queries, config.BLOCK_M),
        (q, k, v, k_tma, v_tma, out, lse, *shared),
        (plan.strides, *plan.dropout, *plan.numbers(options)), constants, plan.kernels, (k_tma is None, v_tma is None),
    )  # fmt: skip
    return out, lse
