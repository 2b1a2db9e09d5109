"""The backward kernels and their launcher.

With P = exp(a - lse), dP = do v^T and a = a(s; parameters), out = P v and lse = log sum exp a give

    delta_i = sum_j P_ij dP_ij  (= <do_i, out_i>)
    g_ij    = dL/da_ij = P_ij (dP_ij - delta_i + dlse_i)
    ds_ij   = da/ds g_ij,   dq_i = scale gain_i sum_j ds_ij k_j,   dk_j = scale sum_i gain_i ds_ij q_i
    dtheta  = sum_ij g_ij da_ij/dtheta   for theta in power, rate, sharpness, alpha (position.py)

delta comes from a half-precision out, and its error e_i adds e_i P_ij to g_ij. In the parameter gradients these
errors do not cancel: they made that of the rate 1.5 times as wrong as eager attention. But sum_j g_ij must be
dlse_i, so the row sum of g measures e_i. The dq kernel therefore runs first, subtracts e_i sum_j P_ij
da_ij/dtheta from its parameter gradients, and leaves the corrected delta, and the gains, to the dk/dv kernel.

Parameter gradients are summed in registers, written as one partial per program, and added up in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .launch import dtypes, launch
from .options import NUM_LEARNABLE, Options
from .plan import RUNTIME_INTEGERS, cdiv, new_output, plan_of, sequences_of
from .position import (
    LOG2E,
    Position,
    by_gain,
    by_power,
    by_rate,
    by_sharpness,
    factors,
    log_length,
    query_gain,
    sharpening,
)
from .rotation import turn_keys, turn_queries, turned
from .tile import (
    FULL_TILES,
    MASKED_TILES,
    cast,
    dot,
    dropout_keep,
    load_axes,
    load_key_bias,
    load_lengths,
    load_masked,
    load_tile,
    loop_bounds,
    lse_rows,
    num_partials,
    partial_sums,
    rows_of,
    sight,
    store_tile,
    tile_logits,
    tile_range,
    within,
)


@triton.constexpr_function
def asynchronous_products(bits):
    """Return whether a warpgroup may go on while its matrix products run (wgmma).

    ptxas makes it wait for each of them where the accumulators of dk/dv run through two pipelined loops, and in dq with
    a key bias and three stages.
    """
    return bits == 16 and cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0)


@triton.jit
def weights_and_gradient(a, dp, delta, keep, dropout_scale):
    """P, the weights that met v, and g = dL/da of one tile, a less lse; keep is None without dropout."""
    p = tl.exp2(a)
    if keep is None:
        return p, p, p * (dp - delta)
    else:
        dp = tl.where(keep, dp * dropout_scale, 0.0)
        return p, tl.where(keep, p * dropout_scale, 0.0), p * (dp - delta)


@triton.jit
def accumulate(total, mean, g, p, derivative):
    """Add sum_j g da/dtheta and sum_j P da/dtheta of one tile to their partial sums."""
    return total + partial_sums(g * derivative), mean + partial_sums(p * derivative)


@triton.jit
def corrected(total, mean, error):
    """The sum of what accumulate gathered, less what the error of delta added to it."""
    return tl.sum(tl.sum(total - error[:, None] * mean, 1), 0)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dq_kernel(
    q, k, v, k_tma, v_tma, out, lse, dlse, delta, gain, dout, dq, dposition,
    position, sequences, dropout_seed, strides, dropout_threshold, dropout_scale,
    scale, gain_length, num_heads, group_size, num_queries, num_keys, total_queries, total_keys,
    window_left, window_right, query_start, key_start,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = sequences.key_bias is not None
    ASYNCHRONOUS: tl.constexpr = asynchronous_products(q.dtype.element_ty.primitive_bitwidth)
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    batch_head = tl.program_id(0) // num_tiles
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
    dout = rows_of(dout, strides.dout, batch, h, queries.row)
    dq = rows_of(dq, strides.dq, batch, h, queries.row)
    lse_offset = lse_rows(b, h, queries.row, num_heads, num_queries, total_queries, sequences.cu_seqlens_q is not None)

    rows = m0 + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    i = queries.start + rows  # [BLOCK_M]
    stored = rows < queries.count
    lse_row = tl.load(lse + lse_offset + rows, mask=stored, other=-float("inf"))
    alive = lse_row > -float("inf")
    lse2 = tl.where(alive, lse_row * LOG2E, float("inf"))
    q_tile = load_tile(q, None, m0, alive, BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do_tile = load_tile(dout, None, m0, alive, BLOCK_M, HEAD_DIM, BLOCK_D)
    o_tile = load_tile(out, None, m0, alive, BLOCK_M, HEAD_DIM, BLOCK_D)
    dlse_row = tl.zeros([BLOCK_M], tl.float32)
    if dlse is not None:
        dlse_row = tl.load(dlse + lse_offset + rows, mask=alive, other=0.0)
    delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) - dlse_row  # [BLOCK_M]
    n = load_lengths(sequences, b, i, window_left)
    gain_row = tl.zeros([BLOCK_M], tl.float32) + query_gain(n, head, gain_length)
    row_scale = gain_row * (scale * LOG2E)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_M, num_partials()], tl.float32)
    g_sum = zeros
    power, power_mean, rate, rate_mean = zeros, zeros, zeros, zeros
    sharpness, sharpness_mean, alpha, alpha_mean = zeros, zeros, zeros, zeros

    first_key, last_key = sight(i, queries, keys, window_left, window_right)
    first, last = queries.start + m0, tl.minimum(queries.start + m0 + BLOCK_M, queries.end) - 1
    tiles = tile_range(first, last, keys, window_left, window_right, BIASED, BLOCK_N)
    for KIND in tl.static_range(MASKED_TILES if BIASED else FULL_TILES, MASKED_TILES + 1):
        start, stop, hole, skip = loop_bounds(KIND, first, last, keys, tiles, False, BLOCK_N)
        for x in tl.range(start, stop, BLOCK_N, num_stages=2 if BIASED and ASYNCHRONOUS else None):
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
            distance, score, a = tile_logits(
                dot(q_tile, k_tile.T), row_scale[:, None], lse2[:, None], i, first_key, last_key, j, keys.start + n0,
                None if key_bias is None else key_bias[None, :], head, KIND,
            )  # fmt: skip  # [BLOCK_M, BLOCK_N]
            keep = None
            if dropout_seed is not None:
                keep = dropout_keep(dropout_seed, batch_head, i[:, None], j[None, :], dropout_threshold)
            p, _, g = weights_and_gradient(a, dot(do_tile, v_tile.T), delta_row[:, None], keep, dropout_scale)
            acc = dot(cast(g * sharpening(distance, head), k_tile.dtype), k_tile, acc)
            g_sum += partial_sums(g)
            if dposition.power is not None:
                power, power_mean = accumulate(power, power_mean, g, p, by_power(distance, head))
            if dposition.rate is not None:
                rate, rate_mean = accumulate(rate, rate_mean, g, p, by_rate(score, distance, head))
            if dposition.sharpness is not None:
                sharpness, sharpness_mean = accumulate(
                    sharpness, sharpness_mean, g, p, by_sharpness(score, distance, head)
                )
            if dposition.alpha is not None:
                alpha, alpha_mean = accumulate(alpha, alpha_mean, g, p, by_gain(score, distance, head))

    store_tile(dq, m0, acc * (gain_row * scale)[:, None], stored, HEAD_DIM, BLOCK_D)
    error = tl.sum(g_sum, 1) - dlse_row  # of delta
    tl.store(delta + lse_offset + rows, delta_row + error, mask=stored)
    if gain is not None:
        tl.store(gain + lse_offset + rows, gain_row, mask=stored)
    # One partial per program, [num_heads, programs of a head]: the launcher adds them up in this order.
    partial = h * (tl.num_programs(0) // num_heads) + b * num_tiles + m0 // BLOCK_M
    if dposition.power is not None:
        tl.store(dposition.power + partial, corrected(power, power_mean, error) * factors(head).power)
    if dposition.rate is not None:
        tl.store(dposition.rate + partial, corrected(rate, rate_mean, error) * factors(head).rate)
    if dposition.sharpness is not None:
        tl.store(dposition.sharpness + partial, corrected(sharpness, sharpness_mean, error) * factors(head).sharpness)
    if dposition.alpha is not None:
        by_alpha = log_length(n, gain_length) / gain_row
        alpha, alpha_mean = alpha * by_alpha[:, None], alpha_mean * by_alpha[:, None]
        tl.store(dposition.alpha + partial, corrected(alpha, alpha_mean, error) * factors(head).alpha)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dkdv_kernel(
    q, k, v, q_tma, dout_tma, lse, delta, gain, dout, dk, dv,
    position, sequences, dropout_seed, strides, dropout_threshold, dropout_scale,
    scale, gain_length, num_heads, group_size, num_queries, num_keys, total_queries, total_keys,
    window_left, window_right, query_start, key_start,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = sequences.key_bias is not None
    ASYNCHRONOUS: tl.constexpr = asynchronous_products(q.dtype.element_ty.primitive_bitwidth)
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    n0 = tl.program_id(0) % num_tiles * BLOCK_N  # early keys are seen by the most queries: they start first
    kv_heads = num_heads // group_size
    b = tl.program_id(0) // num_tiles // kv_heads
    kv_head = tl.program_id(0) // num_tiles % kv_heads
    queries, keys = load_axes(
        b, sequences, num_queries, num_keys, total_queries, total_keys, query_start, key_start,
        window_left, window_right,
    )  # fmt: skip

    batch = b if sequences.cu_seqlens_q is None else b * 0
    k = rows_of(k, strides.k, batch, kv_head, keys.row)
    v = rows_of(v, strides.v, batch, kv_head, keys.row)
    dk = rows_of(dk, strides.dk, batch, kv_head, keys.row)
    dv = rows_of(dv, strides.dv, batch, kv_head, keys.row)

    tokens = n0 + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    j = keys.start + tokens  # [BLOCK_N]
    exists = within(j, keys)
    key_bias = None
    if sequences.key_bias is not None:
        key_bias = load_key_bias(sequences.key_bias, b, num_keys, tokens, exists)
        exists = key_bias > -float("inf")
    k_tile = load_tile(k, None, n0, exists, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_tile = load_tile(v, None, n0, exists, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    first_query, last_query = sight(j, keys, queries, window_right, window_left)
    first, last = keys.start + n0, tl.minimum(keys.start + n0 + BLOCK_N, keys.end) - 1
    tiles = tile_range(first, last, queries, window_right, window_left, BIASED, BLOCK_M)
    # One loop over the query heads of the group and their tiles: the state that a loop in a loop keeps alive spills.
    first_head = kv_head * group_size
    first_parameters = Position(
        None if position.power is None else tl.load(position.power + first_head),
        None if position.rate is None else tl.load(position.rate + first_head),
        None if position.sharpness is None else tl.load(position.sharpness + first_head),
        None if position.alpha is None else tl.load(position.alpha + first_head),
    )
    for KIND in tl.static_range(MASKED_TILES if BIASED else FULL_TILES, MASKED_TILES + 1):
        start, stop, hole, skip = loop_bounds(KIND, first, last, queries, tiles, False, BLOCK_M)
        trips = group_size * tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
        x, h, head = start, first_head, first_parameters
        for _ in tl.range(0, trips, num_stages=1 if ASYNCHRONOUS and KIND == MASKED_TILES and not BIASED else None):
            if group_size > 1:
                head = Position(
                    None if position.power is None else tl.load(position.power + h),
                    None if position.rate is None else tl.load(position.rate + h),
                    None if position.sharpness is None else tl.load(position.sharpness + h),
                    None if position.alpha is None else tl.load(position.alpha + h),
                )
            m0 = tl.multiple_of(tl.where(x >= hole, x + skip, x), BLOCK_M)
            q_rows = rows_of(q, strides.q, batch, h, queries.row)
            do_rows = rows_of(dout, strides.dout, batch, h, queries.row)
            lse_offset = lse_rows(
                b, h, queries.row, num_heads, num_queries, total_queries, sequences.cu_seqlens_q is not None
            )
            rows = m0 + columns
            i = queries.start + rows  # [BLOCK_M]
            # A full tile lies inside the sequence and has no dead row: nothing to mask.
            mask = within(i, queries) if KIND == MASKED_TILES else None
            lse_row = load_masked(lse + lse_offset + rows, mask, -float("inf"))
            if KIND == MASKED_TILES:
                mask = lse_row > -float("inf")
                lse_row = tl.where(mask, lse_row, float("inf"))
            delta_row = load_masked(delta + lse_offset + rows, mask, 0.0)
            q_tile = load_tile(q_rows, q_tma, m0, mask, BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            do_tile = load_tile(do_rows, dout_tma, m0, mask, BLOCK_M, HEAD_DIM, BLOCK_D)
            gain_row = tl.full([BLOCK_M], 1.0, tl.float32)
            if gain is not None:
                gain_row = load_masked(gain + lse_offset + rows, mask, 0.0)
            distance, _, a = tile_logits(
                dot(k_tile, q_tile.T), (gain_row * (scale * LOG2E))[None, :], None,
                j, first_query, last_query, i, queries.start + m0,
                None if key_bias is None else key_bias[:, None], head, KIND,
            )  # fmt: skip  # [BLOCK_N, BLOCK_M]
            keep = None
            if dropout_seed is not None:
                keep = dropout_keep(dropout_seed, b * num_heads + h, i[None, :], j[:, None], dropout_threshold)
            _, p, g = weights_and_gradient(
                a - (lse_row * LOG2E)[None, :], dot(v_tile, do_tile.T), delta_row[None, :], keep, dropout_scale
            )
            dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc)
            ds = g * sharpening(distance, head) * gain_row[None, :]
            dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc)
            x += BLOCK_M
            if group_size > 1:
                h = tl.where(x < stop, h, h + 1)
                x = tl.where(x < stop, x, start)

    # A full tile is not masked, and may hold hidden keys at its end: their rows are formed, and dropped here.
    stored = tokens < keys.count
    dk_acc = tl.where(exists[:, None], dk_acc * scale, 0.0)
    dv_acc = tl.where(exists[:, None], dv_acc, 0.0)
    store_tile(dk, n0, dk_acc, stored, HEAD_DIM, BLOCK_D)
    store_tile(dv, n0, dv_acc, stored, HEAD_DIM, BLOCK_D)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options,
    learned: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of :func:`attention`, called with the same q, k, v and options and what it returned.

    dout like out; dlse like lse, or None for zero. learned: which of LEARNABLE_PARTS need a gradient.
    Returns dq, dk, dv, dpower, drate, dsharpness, dalpha; those absent or not learned are None.
    """
    if options.block_table is not None:
        raise ValueError("there is no gradient through a block_table")
    plan = plan_of(q, k, v, options)
    dq, dk, dv = (new_output(x, plan.packed) for x in (q, k, v))
    q, k = turned(q, k, options, plan)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    gain = torch.empty_like(lse) if options.alpha is not None else None
    position = Position(*options[:NUM_LEARNABLE])
    shared = position, sequences_of(options), plan.seed(options)
    numbers = plan.numbers(options)

    config, constants = plan.tiles("backward_dq")
    programs = plan.batch * cdiv(plan.num_queries, config.BLOCK_M)  # of one head
    partials = [
        lse.new_empty((plan.heads, programs)) if parameter is not None and want else None
        for parameter, want in zip(position, learned, strict=True)
    ]
    k_tma, v_tma = plan.descriptors(config, config.BLOCK_N, k, v)
    strides = plan.strides_of(q=q, k=k, v=v, out=out, dout=dout, dq=dq)
    tensors = q, k, v, k_tma, v_tma, out, lse, dlse, delta, gain, dout, dq, Position(*partials)
    launch(
        dq_kernel, plan.heads * programs, (*tensors, *shared), (strides, *plan.dropout, *numbers), constants,
        plan.kernels, (dtypes(tensors), strides),
    )  # fmt: skip

    config, constants = plan.tiles("backward_dkdv")
    q_tma, dout_tma = plan.descriptors(config, config.BLOCK_M, q, dout)
    strides = plan.strides_of(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv)
    kept = q, k, v, q_tma, dout_tma, lse, delta, gain, dout, dk, dv
    launch(
        dkdv_kernel, plan.batch * plan.kv_heads * cdiv(plan.num_keys, config.BLOCK_N), (*kept, *shared),
        (strides, *plan.dropout, *numbers), constants, plan.kernels, (dtypes(kept), strides),
    )  # fmt: skip
    if options.theta is not None:
        turn_queries(dq, dq, options, plan, inverse=True)
        turn_keys(dk, dk, options, plan, inverse=True)
    return dq, dk, dv, *(None if partial is None else partial.sum(1) for partial in partials)
