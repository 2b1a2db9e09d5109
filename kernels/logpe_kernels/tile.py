"""What the kernels do with one tile: bounds, masks, loads, products, the online softmax, dropout."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .position import FAR, INTERPRETED, LOG2E, far_logit, logit


class Sequences(NamedTuple):
    """Per-sequence integers (pointers, int32; key_bias float32), None where the call gave one for all or none."""

    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)
    query_starts: Any = None  # (B,)
    key_starts: Any = None  # (B,)
    key_lengths: Any = None  # (B,)
    key_bias: Any = None  # (B, num_keys)
    context_lengths: Any = None  # (B,)


class Strides(NamedTuple):
    """Elements between neighbours in (batch, head, token); the last dimension is contiguous."""

    q: Any = None
    k: Any = None
    v: Any = None
    out: Any = None
    dout: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None


class Axis(NamedTuple):
    """The tokens of one sequence on one side: token t of it is row ``row + t`` and stands at ``start + t``."""

    row: Any  # of the first token in its tensor
    count: Any
    start: Any  # position of the first token
    begin: Any  # positions outside [begin, end) are hidden from everybody
    end: Any


@triton.jit
def sequence_tokens(b, count, total, start, cu_seqlens, starts):
    """Row of the first token, number of tokens, position of the first token; bad cu_seqlens stay in bounds."""
    row = 0
    if cu_seqlens is not None:
        row = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        count = tl.minimum(count, tl.minimum(tl.load(cu_seqlens + b + 1), total) - row)
    if starts is not None:
        start = tl.load(starts + b)
    return row, count, start


@triton.jit
def load_axes(
    b, sequences, num_queries, num_keys, total_queries, total_keys, query_start, key_start, window_left, window_right
):
    """The query axis and the key axis of sequence b."""
    q_row, q_count, q_start = sequence_tokens(
        b, num_queries, total_queries, query_start, sequences.cu_seqlens_q, sequences.query_starts
    )
    k_row, k_count, k_start = sequence_tokens(
        b, num_keys, total_keys, key_start, sequences.cu_seqlens_k, sequences.key_starts
    )
    q_begin = tl.maximum(q_start, 0)
    q_end = q_start + q_count
    k_begin = tl.maximum(k_start, 0)
    k_end = k_start + k_count
    if sequences.key_lengths is not None:
        k_end = tl.minimum(k_end, k_start + tl.load(sequences.key_lengths + b))
    if window_left is not None:
        k_begin = tl.maximum(k_begin, q_begin - window_left)
    if window_right is not None:
        k_end = tl.minimum(k_end, q_end + window_right)
    return Axis(q_row, q_count, q_start, q_begin, q_end), Axis(k_row, k_count, k_start, k_begin, k_end)


@triton.jit
def lse_rows(b, h, row, num_heads, num_queries, total_queries, PACKED: tl.constexpr):
    """Return where one sequence and head begins in lse, delta and dlse, contiguous (B, H, N) or packed (H, total)."""
    if PACKED:
        return h.to(tl.int64) * total_queries + row
    else:
        return (b.to(tl.int64) * num_heads + h) * num_queries


@triton.jit
def load_lengths(sequences, b, i, window_left):
    """n of the query gain for the queries at positions i: a function of the position, or one for the sequence."""
    if sequences.context_lengths is not None:
        return tl.load(sequences.context_lengths + b) + tl.zeros_like(i)
    elif window_left is not None:
        return tl.minimum(i, window_left)
    else:
        return i


@triton.jit
def tile_range(first, last, other, before, after, ALWAYS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens of the other axis the positions first..last of this one meet.

    A token at p meets positions p - before to p + after of the other axis; None is unlimited. Returns
    (begin, full_begin, full_end, end) in tokens of the other axis, begin, full_begin and full_end multiples of
    BLOCK: tiles in [full_begin, full_end) are visible in full, the others in [begin, end) need a mask.
    """
    begin = other.begin
    end = other.end
    full_begin = begin
    full_end = end
    if before is not None:
        begin = tl.maximum(begin, tl.maximum(first, 0) - before)
        full_begin = tl.maximum(full_begin, last - before)
    if after is not None:
        end = tl.minimum(end, last + after + 1)
        full_end = tl.minimum(full_end, first + after + 1)
    empty = (last < tl.maximum(first, 0)) | (end <= begin)
    begin = (begin - other.start) // BLOCK * BLOCK
    end = tl.where(empty, begin, end - other.start)
    full_begin = (full_begin - other.start + BLOCK - 1) // BLOCK * BLOCK
    full_end = (full_end - other.start) // BLOCK * BLOCK
    none_full = empty | (full_end <= full_begin) | (first < 0)
    if ALWAYS_MASK:
        none_full = True
    full_begin = tl.where(none_full, begin, full_begin)
    full_end = tl.where(none_full, begin, full_end)
    return begin, full_begin, full_end, end


#: What the tiles of a loop have in common; the kernels run through them in this order.
FAR_TILES = tl.constexpr(0)  # visible in full, and so far from the diagonal that a polynomial gives the distance
FULL_TILES = tl.constexpr(1)
MASKED_TILES = tl.constexpr(2)


@triton.constexpr_function
def far_tiles_pay(bits, sharpened, columns):
    """Whether tiles with so many columns get a loop of their own where they are far.

    The polynomial is right to 1e-5, which is enough beside half-precision inputs alone. Its coefficients are formed
    once per row, which needs wide tiles; with a sharpness there would be two polynomials, and no gain.
    """
    return bits == 16 and not sharpened and columns >= 64


@triton.jit
def loop_bounds(KIND: tl.constexpr, first, last, other, tiles, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of one kind as (start, stop, hole, skip): x in range(start, stop, BLOCK), plus skip from hole on.

    tiles: what tile_range returned. SPLIT: whether there are far tiles, or all that are visible in full are FULL_TILES.
    """
    begin, full_begin, full_end, end = tiles
    near_begin, near_end = full_begin, full_end
    if SPLIT:
        # From the middle of a far tile to the nearest row it is at least FAR * BLOCK.
        left = (tl.maximum(first - other.start, 0) // BLOCK - FAR) * BLOCK
        right = (tl.maximum(last - other.start, 0) // BLOCK + (FAR + 1)) * BLOCK
        near_begin = tl.minimum(tl.maximum(left, full_begin), full_end)
        near_end = tl.minimum(tl.maximum(right, near_begin), full_end)
    if KIND == FAR_TILES:
        hole, skip = near_begin, near_end - near_begin
        return full_begin, full_end - skip, hole, skip
    elif KIND == FULL_TILES:
        return near_begin, near_end, near_end, 0
    else:
        skip = full_end - full_begin
        return begin, end - skip, full_begin, skip


@triton.jit
def sight(p, axis, other, before, after):
    """First and last position of the other axis that the token at p meets; first > last where p does not exist."""
    first = tl.where((p >= axis.begin) & (p < axis.end), other.begin, other.end)
    last = tl.zeros_like(p) + (other.end - 1)
    if before is not None:
        first = tl.maximum(first, p - before)
    if after is not None:
        last = tl.minimum(last, p + after)
    return first, last


@triton.jit
def within(positions, axis):
    """Which positions exist and are seen by anybody: others are loaded as zeros, since 0 * NaN is NaN."""
    return (positions >= axis.begin) & (positions < axis.end)


@triton.jit
def load_masked(pointers, mask, other):
    """tl.load, with ``other`` where mask is False; a mask of None reads everything."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=other)


@triton.jit
def load_rows(x, rows, stride, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a (tokens, head_dim) slice as [rows, BLOCK_D]; zeros where mask (or None) is False."""
    columns = tl.arange(0, BLOCK_D)
    pointers = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]  # [rows, BLOCK_D]
    keep = None if mask is None else mask[:, None]
    if BLOCK_D != HEAD_DIM:
        keep = (columns < HEAD_DIM)[None, :] if keep is None else keep & (columns < HEAD_DIM)[None, :]
    return load_masked(pointers, keep, 0.0)


class Rows(NamedTuple):
    """The rows of one sequence and head of a tensor: row r lies at pointer + r * stride."""

    pointer: Any
    stride: Any
    b: Any
    h: Any
    first: Any  # in the tensor


@triton.jit
def rows_of(x, strides, b, h, first):
    """The rows from ``first`` on of head h in batch b."""
    pointer = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + first.to(tl.int64) * strides[2]
    return Rows(pointer, strides[2], b, h, first)


@triton.jit
def load_tile(x, descriptor, start, mask, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start to start + COUNT as [COUNT, BLOCK_D], zeros where mask is False.

    descriptor: of the whole tensor, (B, H, N, D) in tiles of [1, 1, COUNT, BLOCK_D], or None; serves without a mask.
    """
    if descriptor is None or mask is not None:
        return load_rows(x.pointer, start + tl.arange(0, COUNT), x.stride, mask, HEAD_DIM, BLOCK_D)
    else:
        return tl.reshape(descriptor.load([x.b, x.h, x.first + start, 0]), [COUNT, BLOCK_D])


@triton.jit
def store_tile(x, start, value, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [count, BLOCK_D] into Rows from ``start`` where mask is True."""
    store_rows(x.pointer, start + tl.arange(0, value.shape[0]), x.stride, value, mask, HEAD_DIM, BLOCK_D)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest. The interpreter truncates on the way to bfloat16: round by hand there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(x, rows, stride, value, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [rows, BLOCK_D] into a (tokens, head_dim) slice where mask is True."""
    columns = tl.arange(0, BLOCK_D)
    pointers = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]  # [rows, BLOCK_D]
    keep = mask[:, None]
    if BLOCK_D != HEAD_DIM:
        keep &= (columns < HEAD_DIM)[None, :]
    tl.store(pointers, cast(value, x.dtype.element_ty), mask=keep)


@triton.jit
def load_key_bias(key_bias, b, num_keys, tokens, mask):
    """The additive bias of some keys; -inf where mask is False."""
    return tl.load(key_bias + b.to(tl.int64) * num_keys + tokens, mask=mask, other=-float("inf"))


@triton.constexpr_function
def num_partials():
    """Of a row in the layout of a matrix product's result, one for each column that only one thread holds.

    There a thread has two of each 8 columns on NVIDIA, and few more on AMD; with tensor memory (sm_100), whole rows.
    """
    return 1 if cuda_capability_geq(10, 0) and not cuda_capability_geq(12, 0) else 8


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in float32 (float32 operands without TF32). The interpreter has no bfloat16 product."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def relative(position, origin):
    """position - origin as float32: exact near the origin, where a mask or a small distance depends on it."""
    return (position - origin).to(tl.float32)


@triton.jit
def tile_logits(qk, scale, shift, row, first, last, column, origin, key_bias, head, KIND: tl.constexpr):
    """Distances, scores and logits less shift of one tile; these in units of log2, -inf where hidden.

    Rows are queries and columns keys (S) or the other way round (its transpose): positions row [ROWS], its
    sight first and last [ROWS], column [COLUMNS], which begins at position origin. scale (of the scores,
    log2 e included), shift (or None) and key_bias are broadcast to the tile [ROWS, COLUMNS].
    """
    y = relative(row, origin)[:, None]  # [ROWS, 1]
    x = relative(column, origin)[None, :]  # [1, COLUMNS]
    distance = tl.abs(y - x)
    score = qk * scale
    if KIND == FAR_TILES:
        HALF: tl.constexpr = (column.shape[0] - 1) / 2
        tl.static_assert(shift is None)
        a = far_logit(score, y - HALF, x - HALF, head)
    else:
        a = logit(score, distance, head, shift)
    if key_bias is not None:
        a += key_bias * LOG2E
    if KIND == MASKED_TILES:
        a = tl.where((x >= relative(first, origin)[:, None]) & (x <= relative(last, origin)[:, None]), a, -float("inf"))
    return distance, score, a


@triton.jit
def partial_sums(x):
    """[ROWS, COLUMNS] -> [ROWS, num_partials()], each over columns that one thread holds: nothing is exchanged."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // num_partials(), num_partials()]), 1)


@triton.jit
def softmax_step(a, m_i, l_i):
    """One online-softmax step: weights of the tile, the factor for what was summed before, new maximum and sum."""
    m_new = tl.maximum(m_i, tl.max(a, 1))  # [BLOCK_M]
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(a - shift[:, None])  # [BLOCK_M, BLOCK_N]
    correction = tl.exp2(m_i - shift)
    return p, correction, m_new, l_i * correction + tl.sum(p, 1)


@triton.jit
def dropout_keep(seed, batch_head, i, j, threshold):
    """Which weights survive: Philox on (j, i, batch_head), a function of positions, so chunks of keys agree."""
    shape = i + j
    zero = shape - shape
    bits, _, _, _ = tl.philox(tl.load(seed), j + zero, i + zero, batch_head + zero, zero)
    return bits >= threshold.to(tl.uint32)
