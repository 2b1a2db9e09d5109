"""The forward kernel and its launcher: one program per tile of queries, an online softmax over tiles of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode, tile
from .launch import launch
from .options import Options, new_output
from .plan import RUNTIME_INTEGERS, Plan, cdiv, plan_of
from .position import LN2, LOG2E, Parameters, query_gain
from .rotation import turned


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    q, k, v, k_tma, v_tma, out, lse, parameters, sequences, dropout, strides, layer,
    num_queries, num_keys, total_queries, total_keys, query_start, key_start,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = sequences.key_bias is not None
    SPLIT: tl.constexpr = tile.far_tiles_pay(
        q.dtype.element_ty.primitive_bitwidth, BLOCK_N,
        parameters.power is not None, parameters.rate is not None, parameters.sharpness is not None,
    )  # fmt: skip
    UNMASKED: tl.constexpr = tile.FAR_TILES if SPLIT else tile.FULL_TILES
    b, h, m0 = tile.query_program(num_queries, layer.num_heads, BLOCK_M)
    queries, keys = tile.load_axes(
        b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start
    )
    head = Parameters(*[None if pointer is None else tl.load(pointer + h) for pointer in parameters])
    q = tile.rows_of(q, strides.q, queries, h)
    k = tile.rows_of(k, strides.k, keys, h // layer.group_size)
    v = tile.rows_of(v, strides.v, keys, h // layer.group_size)
    out = tile.rows_of(out, strides.out, queries, h)
    lse += tile.lse_rows(b, h, queries.row, layer.num_heads, num_queries, total_queries, sequences.cu_seqlens_q)

    before, after = layer.window_left, layer.window_right
    resident = tile.resident(m0 + tl.arange(0, BLOCK_M), queries, keys, before, after)
    bounds = tile.bounds_of(m0, m0 + BLOCK_M - 1, queries, keys, before, after, BIASED, BLOCK_N)
    i = resident.positions  # [BLOCK_M]
    q_tile = tile.load_tile(q, None, m0, resident.exist, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    n = tile.load_lengths(sequences, b, i, layer.window_left)
    row_scale = tl.full([BLOCK_M], layer.scale * LOG2E, tl.float32) * query_gain(n, head, layer.gain_length)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, tile.padded(VALUE_DIM)], tl.float32)  # [BLOCK_M, BLOCK_DV]
    for TILES in tl.static_range(tile.MASKED_TILES if BIASED else UNMASKED, tile.MASKED_TILES + 1):
        start, stop, gap, jump = tile.loop_bounds(TILES, bounds, keys, SPLIT, BLOCK_N)
        for x in range(start, stop, BLOCK_N):
            n0 = tile.past_gap(x, gap, jump, BLOCK_N)
            tokens = n0 + tl.arange(0, BLOCK_N)
            j = keys.start + tokens  # [BLOCK_N]
            mask = tile.within(j, keys) if TILES == tile.MASKED_TILES else None
            key_bias = tile.load_key_bias(sequences.key_bias, b, num_keys, tokens, mask)
            mask = mask if key_bias is None else key_bias > -float("inf")
            k_tile = tile.load_tile(k, k_tma, n0, mask, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
            v_tile = tile.load_tile(v, v_tma, n0, mask, BLOCK_N, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
            _, _, a = tile.tile_logits(
                tile.dot(q_tile, k_tile.T), row_scale[:, None], None, resident, j, keys.start + n0,
                None if key_bias is None else key_bias[None, :], head, TILES,
            )  # fmt: skip  # [BLOCK_M, BLOCK_N]
            p, correction, m_i, l_i = tile.softmax_step(a, m_i, l_i)
            keep = tile.dropout_keep(dropout, b * layer.num_heads + h, i[:, None], j[None, :])
            p = p if keep is None else tl.where(keep, p, 0.0)
            acc = tile.dot(tile.cast(p, v_tile.dtype), v_tile, acc * correction[:, None])

    row_weight, lse_row = tile.softmax_end(m_i, l_i)
    row_weight = row_weight if dropout is None else row_weight * dropout.scale
    stored = resident.tokens < queries.count
    tile.store_tile(out, m0, acc * row_weight[:, None], stored, VALUE_DIM)
    tl.store(lse + resident.tokens, lse_row * LN2, mask=stored)


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Return attention with a log position.

    q: (B, Hq, Nq, D), k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, Dv); packed, with cu_seqlens: (total, H, D or Dv). float16,
    bfloat16 or float32, contiguous in the last dimension. With a block_table, int32 (B, max_pages), k and v are
    (num_pages, Hkv, page_size, D or Dv), see :mod:`decode`. plan: that of an earlier call of the same layout and
    options, but for the starts; a caller that has it saves looking for it.

    Returns out, laid out like q but with v's Dv and in options.out_dtype, and lse, float32, (B, Hq, Nq) or packed
    (Hq, total): natural log of the sum of exponentials.
    """
    if plan is None:
        plan = plan_of(q, k, v, options)
    out = new_output(q, plan.packed, plan.value_dim, options.out_dtype)
    if plan.packed:
        lse = torch.full((plan.heads, plan.total_queries), -float("inf"), dtype=torch.float32, device=q.device)
    else:
        lse = torch.empty_strided(*plan.lse_layout, dtype=torch.float32, device=q.device)  # empty takes longer
    q, k = turned(q, k, options, plan)
    if decode.serves(plan, options):
        decode.decode(q, k, v, out, lse, options, plan)
        return out, lse
    config, constants = plan.tiles("forward")
    if config.SPECIALIZED:
        from . import hopper  # parts of Triton that are experimental: only where they are asked for

        if hopper.attention(q, k, v, out, lse, options, plan):
            return out, lse
    k_tma, v_tma = plan.descriptors(config, config.BLOCK_N, k, v)
    launch(
        forward_kernel, plan.batch * plan.heads * cdiv(plan.num_queries, config.BLOCK_M),
        (q, k, v, k_tma, v_tma, out, lse, *plan.shared(options)),
        (plan.strides, *plan.numbers(options)), constants, plan.kernels, (k_tma is None, v_tma is None),
    )  # fmt: skip
    return out, lse
