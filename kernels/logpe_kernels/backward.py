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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from . import tile
from .launch import dtypes, launch
from .options import NUM_LEARNABLE, Options, new_output
from .plan import RUNTIME_INTEGERS, cdiv, plan_of
from .position import (
    ALPHA,
    LOG2E,
    POWER,
    RATE,
    SHARPNESS,
    Parameters,
    derivative,
    factors,
    log_length,
    query_gain,
    sharpening,
)
from .rotation import turn_keys, turn_queries, turned


@triton.constexpr_function
def asynchronous_products(bits):
    """Return whether a warpgroup may go on while its matrix products run (wgmma).

    ptxas makes it wait for each of them where the accumulators of dk/dv run through two pipelined loops, and in dq with
    a key bias and three stages.
    """
    return bits == 16 and cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0)


@triton.jit
def weights_and_gradient(a, dp, delta, keep, dropout):
    """Return P, the weights that met v, and g = dL/da of one tile with logits a, less lse; keep: see dropout_keep."""
    p = tl.exp2(a)
    if keep is None:
        return p, p, p * (dp - delta)
    else:
        dp = tl.where(keep, dp * dropout.scale, 0.0)
        return p, tl.where(keep, p * dropout.scale, 0.0), p * (dp - delta)


class Sums(NamedTuple):
    """Partial sums for the gradient of one parameter, [BLOCK_M, num_partials()]."""

    g: Any  # of g da/dparameter over keys
    p: Any  # of P da/dparameter: what an error of 1 in delta adds


@triton.jit
def accumulate(sums, g, p, derivative):
    """Return the Sums with those of one tile added."""
    return Sums(sums.g + tile.partial_sums(g * derivative), sums.p + tile.partial_sums(p * derivative))


@triton.jit
def corrected(sums, error, weight):
    """Return the sum over queries, each times its weight, less what the error of delta added to it."""
    return tl.sum(weight * tl.sum(sums.g - error[:, None] * sums.p, 1), 0)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dq_kernel(
    q, k, v, k_tma, v_tma, out, lse, dlse, delta, gain, dout, dq, dparameters, parameters, sequences, dropout, strides,
    layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = sequences.key_bias is not None
    ASYNCHRONOUS: tl.constexpr = asynchronous_products(q.dtype.element_ty.primitive_bitwidth)
    b, h, m0 = tile.query_program(num_queries, layer.num_heads, BLOCK_M)
    queries, keys = tile.load_axes(
        b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start
    )
    head = Parameters(*[None if pointer is None else tl.load(pointer + h) for pointer in parameters])
    q = tile.rows_of(q, strides.q, queries, h)
    k = tile.rows_of(k, strides.k, keys, h // layer.group_size)
    v = tile.rows_of(v, strides.v, keys, h // layer.group_size)
    out = tile.rows_of(out, strides.out, queries, h)
    dout = tile.rows_of(dout, strides.dout, queries, h)
    dq = tile.rows_of(dq, strides.dq, queries, h)

    before, after = layer.window_left, layer.window_right
    resident = tile.resident(m0 + tl.arange(0, BLOCK_M), queries, keys, before, after)
    bounds = tile.bounds_of(m0, m0 + BLOCK_M - 1, queries, keys, before, after, BIASED, BLOCK_N)
    i = resident.positions  # [BLOCK_M]
    stored = resident.tokens < queries.count
    row = tile.lse_rows(b, h, queries.row, layer.num_heads, num_queries, total_queries, sequences.cu_seqlens_q)
    lse_row = tl.load(lse + row + resident.tokens, mask=stored, other=-float("inf"))
    alive = lse_row > -float("inf")
    lse2 = tl.where(alive, lse_row * LOG2E, float("inf"))
    q_tile = tile.load_tile(q, None, m0, alive, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    do_tile = tile.load_tile(dout, None, m0, alive, BLOCK_M, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]
    o_tile = tile.load_tile(out, None, m0, alive, BLOCK_M, VALUE_DIM)
    dlse_row = tl.zeros([BLOCK_M], tl.float32)
    if dlse is not None:
        dlse_row = tl.load(dlse + row + resident.tokens, mask=alive, other=0.0)
    delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) - dlse_row  # [BLOCK_M]
    n = tile.load_lengths(sequences, b, i, layer.window_left)
    gain_row = tl.zeros([BLOCK_M], tl.float32) + query_gain(n, head, layer.gain_length)
    row_scale = gain_row * (layer.scale * LOG2E)

    acc = tl.zeros([BLOCK_M, tile.padded(HEAD_DIM)], tl.float32)  # [BLOCK_M, BLOCK_D]
    g_sum = tl.zeros([BLOCK_M, tile.num_partials()], tl.float32)
    sums = [Sums(g_sum, g_sum) for pointer in dparameters]
    for TILES in tl.static_range(tile.MASKED_TILES if BIASED else tile.FULL_TILES, tile.MASKED_TILES + 1):
        start, stop, gap, jump = tile.loop_bounds(TILES, bounds, keys, False, BLOCK_N)
        for x in tl.range(start, stop, BLOCK_N, num_stages=2 if BIASED and ASYNCHRONOUS else None):
            n0 = tile.past_gap(x, gap, jump, BLOCK_N)
            tokens = n0 + tl.arange(0, BLOCK_N)
            j = keys.start + tokens  # [BLOCK_N]
            mask = tile.within(j, keys) if TILES == tile.MASKED_TILES else None
            key_bias = tile.load_key_bias(sequences.key_bias, b, num_keys, tokens, mask)
            mask = mask if key_bias is None else key_bias > -float("inf")
            k_tile = tile.load_tile(k, k_tma, n0, mask, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
            v_tile = tile.load_tile(v, v_tma, n0, mask, BLOCK_N, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
            distance, score, a = tile.tile_logits(
                tile.dot(q_tile, k_tile.T), row_scale[:, None], lse2[:, None], resident, j, keys.start + n0,
                None if key_bias is None else key_bias[None, :], head, TILES,
            )  # fmt: skip  # [BLOCK_M, BLOCK_N]
            keep = tile.dropout_keep(dropout, b * layer.num_heads + h, i[:, None], j[None, :])
            p, _, g = weights_and_gradient(a, tile.dot(do_tile, v_tile.T), delta_row[:, None], keep, dropout)
            acc = tile.dot(tile.cast(g * sharpening(distance, head), k_tile.dtype), k_tile, acc)
            g_sum += tile.partial_sums(g)
            sums = [
                sums[PARAMETER]
                if dparameters[PARAMETER] is None
                else accumulate(sums[PARAMETER], g, p, derivative(PARAMETER, score, distance, head))
                for PARAMETER in (POWER, RATE, SHARPNESS, ALPHA)
            ]

    tile.store_tile(dq, m0, acc * (gain_row * layer.scale)[:, None], stored, HEAD_DIM)
    error = tl.sum(g_sum, 1) - dlse_row  # of delta
    tl.store(delta + row + resident.tokens, delta_row + error, mask=stored)
    if gain is not None:
        tl.store(gain + row + resident.tokens, gain_row, mask=stored)
    # One partial per program, [Hq, programs of a head]: the launcher adds them up in this order.
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    partial = h * (tl.num_programs(0) // layer.num_heads) + b * num_tiles + m0 // BLOCK_M
    for LEARNED in tl.static_range(POWER, ALPHA + 1):
        if dparameters[LEARNED] is not None:
            weight = log_length(n, layer.gain_length) / gain_row if LEARNED == ALPHA else 1.0
            gradient = corrected(sums[LEARNED], error, weight) * factors(head)[LEARNED]
            tl.store(dparameters[LEARNED] + partial, gradient)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dkdv_kernel(
    q, k, v, q_tma, dout_tma, lse, delta, gain, dout, dk, dv, parameters, sequences, dropout, strides, layer,
    num_queries, num_keys, total_queries, total_keys, query_start, key_start,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Form dk and dv of one tile of keys; where one of them is None, another launch does that."""
    BIASED: tl.constexpr = sequences.key_bias is not None
    MASKED_STAGES: tl.constexpr = (
        1 if asynchronous_products(q.dtype.element_ty.primitive_bitwidth) and not BIASED else None
    )
    group_size = layer.group_size
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    n0 = tl.program_id(0) % num_tiles * BLOCK_N  # early keys are seen by the most queries: they start first
    kv_heads = layer.num_heads // group_size
    b = tl.program_id(0) // num_tiles // kv_heads
    kv_head = tl.program_id(0) // num_tiles % kv_heads
    queries, keys = tile.load_axes(
        b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start
    )
    k = tile.rows_of(k, strides.k, keys, kv_head)
    v = tile.rows_of(v, strides.v, keys, kv_head)

    before, after = layer.window_right, layer.window_left  # of a key: the queries that see it
    resident = tile.resident(n0 + tl.arange(0, BLOCK_N), keys, queries, before, after)
    bounds = tile.bounds_of(n0, n0 + BLOCK_N - 1, keys, queries, before, after, BIASED, BLOCK_M)
    j = resident.positions  # [BLOCK_N]
    key_bias = tile.load_key_bias(sequences.key_bias, b, num_keys, resident.tokens, resident.exist)
    exist = resident.exist if key_bias is None else key_bias > -float("inf")
    k_tile = tile.load_tile(k, None, n0, exist, BLOCK_N, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
    v_tile = tile.load_tile(v, None, n0, exist, BLOCK_N, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
    dk_acc = tl.zeros([BLOCK_N, tile.padded(HEAD_DIM)], tl.float32)  # [BLOCK_N, BLOCK_D]
    dv_acc = tl.zeros([BLOCK_N, tile.padded(VALUE_DIM)], tl.float32)  # [BLOCK_N, BLOCK_DV]
    # One loop over the query heads of the group and their tiles: the state that a loop in a loop keeps alive spills.
    first_head = kv_head * group_size
    first_parameters = [None if pointer is None else tl.load(pointer + first_head) for pointer in parameters]
    for TILES in tl.static_range(tile.MASKED_TILES if BIASED else tile.FULL_TILES, tile.MASKED_TILES + 1):
        start, stop, gap, jump = tile.loop_bounds(TILES, bounds, queries, False, BLOCK_M)
        trips = group_size * tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
        x, h, head = start, first_head, Parameters(*first_parameters)
        for _ in tl.range(0, trips, num_stages=MASKED_STAGES if TILES == tile.MASKED_TILES else None):
            if group_size > 1:
                head = Parameters(*[None if pointer is None else tl.load(pointer + h) for pointer in parameters])
            m0 = tile.past_gap(x, gap, jump, BLOCK_M)
            q_rows = tile.rows_of(q, strides.q, queries, h)
            do_rows = tile.rows_of(dout, strides.dout, queries, h)
            tokens = m0 + tl.arange(0, BLOCK_M)
            row = tile.lse_rows(b, h, queries.row, layer.num_heads, num_queries, total_queries, sequences.cu_seqlens_q)
            i = queries.start + tokens  # [BLOCK_M]
            # A full tile lies inside the sequence and has no dead row: nothing to mask.
            mask = tile.within(i, queries) if TILES == tile.MASKED_TILES else None
            lse_row = tile.load_masked(lse + row + tokens, mask, -float("inf"))
            if TILES == tile.MASKED_TILES:
                mask = lse_row > -float("inf")
                lse_row = tl.where(mask, lse_row, float("inf"))
            delta_row = tile.load_masked(delta + row + tokens, mask, 0.0)
            q_tile = tile.load_tile(q_rows, q_tma, m0, mask, BLOCK_M, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
            do_tile = tile.load_tile(do_rows, dout_tma, m0, mask, BLOCK_M, VALUE_DIM)  # [BLOCK_M, BLOCK_DV]
            gain_row = tl.full([BLOCK_M], 1.0, tl.float32)
            if gain is not None:
                gain_row = tile.load_masked(gain + row + tokens, mask, 0.0)
            distance, _, a = tile.tile_logits(
                tile.dot(k_tile, q_tile.T), (gain_row * (layer.scale * LOG2E))[None, :], None, resident, i,
                queries.start + m0, None if key_bias is None else key_bias[:, None], head, TILES,
            )  # fmt: skip  # [BLOCK_N, BLOCK_M]
            keep = tile.dropout_keep(dropout, b * layer.num_heads + h, i[None, :], j[:, None])
            dp = tile.dot(v_tile, do_tile.T) if dk is not None else 0.0  # [BLOCK_N, BLOCK_M]
            _, p, g = weights_and_gradient(a - (lse_row * LOG2E)[None, :], dp, delta_row[None, :], keep, dropout)
            if dv is not None:
                dv_acc = tile.dot(tile.cast(p, do_tile.dtype), do_tile, dv_acc)
            if dk is not None:
                ds = g * sharpening(distance, head) * gain_row[None, :]
                dk_acc = tile.dot(tile.cast(ds, q_tile.dtype), q_tile, dk_acc)
            x += BLOCK_M
            if group_size > 1:
                h = tl.where(x < stop, h, h + 1)
                x = tl.where(x < stop, x, start)

    # A full tile is not masked, and may hold hidden keys at its end: their rows are formed, and dropped here.
    stored = resident.tokens < keys.count
    if dk is not None:
        rows = tile.rows_of(dk, strides.dk, keys, kv_head)
        tile.store_tile(rows, n0, tl.where(exist[:, None], dk_acc * layer.scale, 0.0), stored, HEAD_DIM)
    if dv is not None:
        rows = tile.rows_of(dv, strides.dv, keys, kv_head)
        tile.store_tile(rows, n0, tl.where(exist[:, None], dv_acc, 0.0), stored, VALUE_DIM)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options,
    learned: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of :func:`attention`, called with the same q, k, v and options and what it returned.

    dout like out; dlse like lse, or None for zero. learned: which of LEARNABLE_PARTS need a gradient.
    Returns dq, dk, dv, dpower, drate, dsharpness, dalpha; those absent or not learned are None.
    """
    if options.block_table is not None:
        raise ValueError("there is no gradient through a block_table")
    plan = plan_of(q, k, v, options)
    dq, dk, dv = (new_output(x, plan.packed) for x in (q, k, v))
    q, k = turned(q, k, options, plan)  # again: kept, they would take as much memory as q and k
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    gain = torch.empty_like(lse) if options.alpha is not None else None
    shared, numbers = plan.shared(options), plan.numbers(options)

    config, constants = plan.tiles("backward_dq")
    programs = plan.batch * cdiv(plan.num_queries, config.BLOCK_M)  # of one head
    partials = [
        lse.new_empty((plan.heads, programs)) if parameter is not None and want else None
        for parameter, want in zip(options[:NUM_LEARNABLE], learned, strict=True)
    ]
    k_tma, v_tma = plan.descriptors(config, config.BLOCK_N, k, v)
    strides = plan.strides_of(q=q, k=k, v=v, out=out, dout=dout, dq=dq)
    tensors = q, k, v, k_tma, v_tma, out, lse, dlse, delta, gain, dout, dq, Parameters(*partials)
    launch(
        dq_kernel, plan.heads * programs, (*tensors, *shared), (strides, *numbers), constants,
        plan.kernels, (dtypes(tensors), strides),
    )  # fmt: skip

    config, constants = plan.tiles("backward_dkdv")
    q_tma, dout_tma = plan.descriptors(config, config.BLOCK_M, q, dout)
    strides = plan.strides_of(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv)
    for wanted in ((dk, None), (None, dv)) if config.SEPARATE else ((dk, dv),):
        kept = q, k, v, q_tma, dout_tma, lse, delta, gain, dout, *wanted
        launch(
            dkdv_kernel, plan.batch * plan.kv_heads * cdiv(plan.num_keys, config.BLOCK_N), (*kept, *shared),
            (strides, *numbers), constants, plan.kernels, (dtypes(kept), strides),
        )  # fmt: skip
    if options.theta is not None:
        turn_queries(dq, dq, options, plan, inverse=True)
        turn_keys(dk, dk, options, plan, inverse=True)
    return dq, dk, dv, *(None if partial is None else partial.sum(1) for partial in partials)
