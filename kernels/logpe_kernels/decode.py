"""Attention of few queries over many keys: split-KV kernel, the merge of the splits, and their launcher.

One program takes all query heads that share a key head, so that each key is loaded once for them: row r of its tile
is query r // group_size of query head r % group_size. The keys that the tile may see are dealt out over num_splits
programs in whole tiles, by the length that each sequence has and not by what its cache could hold. Each writes its
softmax-weighted sum and its lse; a second kernel merges them, an online softmax whose logits are those lse.

Keys and values may lie in pages: token n of sequence b is row n % page_size of page block_table[b, n // page_size].
A page has the layout (Hkv, page_size, D) of a short sequence, so that a cache without pages is a cache of one page
for each sequence, and the keys of a head stay neighbours in memory. A block table entry that is no page holds no keys.

The launcher decides from sizes alone and waits for nothing: a CUDA graph may hold it while lengths change.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tile
from .configs import Config, padded
from .launch import launch
from .options import Options
from .plan import RUNTIME_INTEGERS, Plan, cdiv
from .position import LN2, LOG2E, Parameters, query_gain

MAX_QUERIES = 64  # of a sequence: with more of them the forward kernel's larger tiles are the better use of the keys
MIN_KEYS = 512  # with fewer of them there is nothing to split
MIN_TILES = 2  # of keys in a split
BLOCK_S = 16  # splits that are merged at once


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "num_pages", "num_splits"])
def decode_kernel(
    q, k, v, partial, partial_lse, block_table, parameters, sequences, strides, num_pages, page_size, num_splits,
    layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of rows that meet the same keys run side by side, for the sake of the L2 cache.
    group_size, kv_heads = layer.group_size, layer.num_heads // layer.group_size
    num_tiles = tl.cdiv(num_queries * group_size, BLOCK_M)
    m0 = tl.program_id(0) % num_tiles * BLOCK_M
    split = tl.program_id(0) // num_tiles % num_splits
    batch_head = tl.program_id(0) // num_tiles // num_splits
    b, kv_head = batch_head // kv_heads, batch_head % kv_heads
    queries, keys = tile.load_axes(
        b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start
    )
    # Every tile is masked: what that costs hides behind the loads.
    before, after = layer.window_left, layer.window_right
    rows = m0 + tl.arange(0, BLOCK_M)  # of which a token fills group_size
    resident = tile.resident(rows // group_size, queries, keys, before, after)
    last = (m0 + BLOCK_M - 1) // group_size
    bounds = tile.bounds_of(m0 // group_size, last, queries, keys, before, after, True, BLOCK_N)
    i = resident.positions  # [BLOCK_M]
    heads = kv_head * group_size + rows % group_size  # [BLOCK_M]
    head = Parameters(*[None if pointer is None else tl.load(pointer + heads)[:, None] for pointer in parameters])
    b64, kv64 = b.to(tl.int64), kv_head.to(tl.int64)
    q_strides, k_strides, v_strides = [tile.in_elements(x) for x in (strides.q, strides.k, strides.v)]
    q += b64 * q_strides[0] + queries.row.to(tl.int64) * q_strides[2]
    k += kv64 * k_strides[1] + keys.row.to(tl.int64) * k_strides[2]
    v += kv64 * v_strides[1] + keys.row.to(tl.int64) * v_strides[2]
    if block_table is not None:
        block_table += b64 * (num_keys // page_size)

    q_offsets = heads.to(tl.int64) * q_strides[1] + resident.tokens.to(tl.int64) * q_strides[2]
    q_tile = tile.load_rows(q, q_offsets, 1, resident.exist, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    n = tile.load_lengths(sequences, b, i, layer.window_left)
    row_scale = tl.full([BLOCK_M, 1], layer.scale * LOG2E, tl.float32) * query_gain(n[:, None], head, layer.gain_length)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, tile.padded(VALUE_DIM)], tl.float32)  # [BLOCK_M, BLOCK_DV]
    share = tl.cdiv(tl.cdiv(bounds.end - bounds.begin, BLOCK_N), num_splits) * BLOCK_N
    begin = bounds.begin + split * share
    for x in range(begin, tl.minimum(bounds.end, begin + share), BLOCK_N):
        n0 = tl.multiple_of(x, BLOCK_N)
        columns = tl.arange(0, BLOCK_N)
        j = keys.start + n0 + columns  # [BLOCK_N]
        mask = tile.within(j, keys)
        key_bias = tile.load_key_bias(sequences.key_bias, b, num_keys, n0 + columns, mask)
        mask = mask if key_bias is None else key_bias > -float("inf")
        page, row = b, n0
        if block_table is not None:  # BLOCK_N divides page_size: a tile lies in one page
            page, row = tl.load(block_table + n0 // page_size), n0 % page_size
            mask &= (page >= 0) & (page < num_pages)
        k_page, v_page = k + page.to(tl.int64) * k_strides[0], v + page.to(tl.int64) * v_strides[0]
        k_tile = tile.load_rows(k_page, row + columns, k_strides[2], mask, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        v_tile = tile.load_rows(v_page, row + columns, v_strides[2], mask, VALUE_DIM)  # [BLOCK_N, BLOCK_DV]
        _, _, a = tile.tile_logits(
            tile.dot(q_tile, k_tile.T), row_scale, None, resident, j, keys.start + n0,
            None if key_bias is None else key_bias[None, :], head, tile.MASKED_TILES,
        )  # fmt: skip  # [BLOCK_M, BLOCK_N]
        if block_table is not None:
            a = tl.where(mask[None, :], a, -float("inf"))
        p, correction, m_i, l_i = tile.softmax_step(a, m_i, l_i)
        acc = tile.dot(tile.cast(p, v_tile.dtype), v_tile, acc * correction[:, None])

    row_weight, lse = tile.softmax_end(m_i, l_i)
    stored = resident.tokens < queries.count
    # Row of the workspace: (batch, query head, query, split).
    place = ((b64 * layer.num_heads + heads) * num_queries + resident.tokens) * num_splits + split
    tile.store_rows(partial, place, VALUE_DIM, acc * row_weight[:, None], stored, VALUE_DIM)
    tl.store(partial_lse + place, lse, mask=stored)


@triton.jit(do_not_specialize=["num_queries", "total_queries", "num_splits"])
def merge_kernel(
    partial, partial_lse, out, lse, cu_seqlens_q, strides, num_heads, num_queries, total_queries, num_splits,
    VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program merges the splits of one query of one head."""
    place = tl.program_id(0).to(tl.int64) * num_splits
    batch_head = tl.program_id(0) // num_queries
    rows = tl.program_id(0) % num_queries + tl.arange(0, 1)  # [1]
    b, h = batch_head // num_heads, batch_head % num_heads
    queries = tile.load_axis(b, num_queries, total_queries, 0, cu_seqlens_q, None)
    out = tile.rows_of(out, strides.out, queries, h)
    lse += tile.lse_rows(b, h, queries.row, num_heads, num_queries, total_queries, cu_seqlens_q)

    m_i = tl.full([1], -float("inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, tile.padded(VALUE_DIM)], tl.float32)  # [1, BLOCK_DV]
    for s0 in range(0, num_splits, BLOCK_S):
        splits = s0 + tl.arange(0, BLOCK_S)
        a = tl.load(partial_lse + place + splits, mask=splits < num_splits, other=-float("inf"))[None, :]
        values = tile.load_rows(partial, place + splits, VALUE_DIM, splits < num_splits, VALUE_DIM)
        p, correction, m_i, l_i = tile.softmax_step(a, m_i, l_i)  # p: [1, BLOCK_S]
        acc = acc * correction[:, None] + tl.sum(p.T * values, 0)[None, :]

    row_weight, lse_row = tile.softmax_end(m_i, l_i)
    stored = rows < queries.count
    tile.store_rows(out.pointer, rows, out.stride, acc * row_weight[:, None], stored, VALUE_DIM)
    tl.store(lse + rows, lse_row * LN2, mask=stored)


def tiles(rows: int, block_d: int, itemsize: int, longest: int) -> Config:
    """Return a configuration: rows, which are the queries of the heads of a group, by keys.

    Enough bytes on the way from memory, in tiles that fit everywhere: there is little else to tune. Half precision: at
    most 16 KiB of keys in a tile, as many of values, two of each on the way; float32 waits for its products.
    ``longest`` is the size of a page, which a tile does not exceed.
    """
    most_rows, tile_bytes, num_stages = (32, 16384, 3) if itemsize == 2 else (16, 8192, 2)
    block_m = min(most_rows, max(16, triton.next_power_of_2(rows)))
    block_n = min(longest, 64, max(16, tile_bytes // (block_d * itemsize)))
    return Config(block_m, block_n, num_warps=4, num_stages=num_stages)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side, one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def num_splits(programs: int, num_keys: int, block_n: int, device: torch.device) -> int:
    """Return how many programs share the keys of one tile of rows: two for each multiprocessor, all in one wave."""
    wanted = 2 * multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, cdiv(num_keys, MIN_TILES * block_n)))


def serves(plan: Plan, options: Options) -> bool:
    """Whether a call comes here: it has pages, or so few queries that the forward kernel would run half empty."""
    if options.block_table is not None:
        return True
    if plan.num_queries > MAX_QUERIES or plan.num_keys < MIN_KEYS or options.dropout_p > 0:
        return False
    rows = plan.num_queries * plan.heads // plan.kv_heads
    return rows <= MAX_QUERIES or plan.batch * plan.heads < multiprocessors(plan.traits.device)


def decode(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, plan: Plan) -> None:
    """Fill in out and lse as the forward kernel would; see there for their shapes."""
    rows, block_d = plan.num_queries * plan.heads // plan.kv_heads, padded(plan.widest)
    page_size = 2**30 if options.block_table is None else k.shape[2]

    def deal() -> tuple[int, int, dict[str, Any]]:
        config = tiles(rows, block_d, v.element_size(), page_size)
        programs = plan.batch * plan.kv_heads * cdiv(rows, config.BLOCK_M)
        splits = num_splits(programs, plan.num_keys, config.BLOCK_N, v.device)
        return programs, splits, plan.constants(config)

    programs, splits, constexprs = plan.once("decode", deal)
    if programs == 0:
        return
    shape = (plan.batch * plan.heads * plan.num_queries, splits)
    partial_lse = v.new_empty(shape, dtype=torch.float32)
    partial = v.new_empty((*shape, plan.value_dim), dtype=torch.float32)
    parameters, sequences, _ = plan.shared(options)
    launch(
        decode_kernel, programs * splits, (q, k, v, partial, partial_lse, options.block_table, parameters, sequences),
        (plan.strides, v.shape[0], page_size, splits, *plan.numbers(options)), constexprs, plan.kernels,
    )  # fmt: skip
    constexprs = dict(VALUE_DIM=plan.value_dim, BLOCK_S=BLOCK_S, num_warps=4, enable_fp_fusion=True)
    launch(
        merge_kernel, shape[0], (partial, partial_lse, out, lse, sequences.cu_seqlens_q),
        (plan.strides, plan.heads, plan.num_queries, plan.total_queries, splits), constexprs, plan.kernels,
    )  # fmt: skip
