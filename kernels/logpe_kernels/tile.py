"""What the kernels do with one tile: bounds, masks, loads, products, the online softmax, dropout."""

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from . import configs
from .position import FAR, INTERPRETED, LOG2E, far_logit, logit


class Sequences(NamedTuple):
    """Per-sequence integers (pointers, int32; key_bias float32), None where the call gave one for all or none."""

    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)
    query_starts: Any = None  # (B,)
    key_starts: Any = None  # (B,)
    key_lengths: Any = None  # (B,)
    key_bias: Any = None  # (B, Nk)
    context_lengths: Any = None  # (B,)


class Layer(NamedTuple):
    """The settings of a layer. Where one of the ints is 1, or a multiple of 16, Triton compiles a kernel for that."""

    scale: Any  # of the scores
    gain_length: Any  # n0 of the query gain
    num_heads: Any  # Hq
    group_size: Any  # Hq / Hkv
    window_left: Any  # how many tokens before its own position a query sees; None for all
    window_right: Any  # and after it


class Dropout(NamedTuple):
    """Dropout of weights. A call without it passes None."""

    seed: Any  # pointer, int64 (1,)
    threshold: Any  # a weight stays if its 32 random bits reach this
    scale: Any  # of the weights that stay


class Strides(NamedTuple):
    """Elements between neighbours in (batch, head, token), as :func:`in_units` has them.

    The last dimension is contiguous.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    out: Any = None
    dout: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None


@functools.lru_cache(maxsize=1024)
def in_units(strides: tuple[int, int, int]) -> tuple[Any, ...]:
    """Return strides (batch, head, token) as the kernels take them, here given in elements.

    Where all are multiples of 2, 4 or 8, but not of 16, they are counted in units of that, and the unit comes last:
    the only factor of a number that Triton sees by itself is 16. With a head_dim of 40 it loaded one element at a time.
    """
    unit = math.gcd(*strides, 16)
    if unit in (1, 16) or max(strides) >= 2**31:
        return strides
    return *(stride // unit for stride in strides), tl.constexpr(unit)


@triton.jit
def in_elements(strides):
    """Return the strides (batch, head, token) that :func:`in_units` was given."""
    if len(strides) == 3:
        return strides
    else:
        return strides[0] * strides[3], strides[1] * strides[3], strides[2] * strides[3]


class Axis(NamedTuple):
    """The tokens of one sequence on one side: token t of it is row ``row + t`` and stands at position ``start + t``."""

    batch: Any  # of its tensor: 0 where sequences are packed
    row: Any  # of the first token
    count: Any
    start: Any  # position of the first token
    begin: Any  # positions outside [begin, end) are hidden from everybody
    end: Any


@triton.jit
def query_program(num_queries, num_heads, BLOCK_M: tl.constexpr):
    """Return the sequence, the head and the first query of this program: one program for each tile of queries.

    Late tiles see the most keys when causal, and start first.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    batch_head = tl.program_id(0) // num_tiles
    return batch_head // num_heads, batch_head % num_heads, (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M


@triton.jit
def load_axis(b, count, total, start, cu_seqlens, starts):
    """Return the Axis of sequence b; bad cu_seqlens stay in bounds."""
    batch = b
    row = 0
    if cu_seqlens is not None:
        batch = b * 0
        row = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        count = tl.minimum(count, tl.minimum(tl.load(cu_seqlens + b + 1), total) - row)
    if starts is not None:
        start = tl.load(starts + b)
    return Axis(batch, row, count, start, tl.maximum(start, 0), start + count)


@triton.jit
def load_axes(b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start):
    """Return the query axis and the key axis of sequence b."""
    queries = load_axis(b, num_queries, total_queries, query_start, sequences.cu_seqlens_q, sequences.query_starts)
    keys = load_axis(b, num_keys, total_keys, key_start, sequences.cu_seqlens_k, sequences.key_starts)
    begin, end = keys.begin, keys.end
    if sequences.key_lengths is not None:
        end = tl.minimum(end, keys.start + tl.load(sequences.key_lengths + b))
    if layer.window_left is not None:
        begin = tl.maximum(begin, queries.begin - layer.window_left)
    if layer.window_right is not None:
        end = tl.minimum(end, queries.end + layer.window_right)
    return queries, Axis(keys.batch, keys.row, keys.count, keys.start, begin, end)


@triton.jit
def lse_rows(b, h, row, num_heads, num_queries, total_queries, cu_seqlens_q):
    """Return where a sequence and head begins in lse, delta and dlse, contiguous (B, Hq, Nq) or packed (Hq, total)."""
    if cu_seqlens_q is None:
        return (b.to(tl.int64) * num_heads + h) * num_queries
    else:
        return h.to(tl.int64) * total_queries + row


@triton.jit
def load_lengths(sequences, b, i, window_left):
    """Return n of the query gain for queries at positions i: the context length of the sequence, or else from i."""
    if sequences.context_lengths is not None:
        return tl.load(sequences.context_lengths + b) + 0 * i  # zeros that lie as i does, in Gluon too
    elif window_left is not None:
        return tl.minimum(i, window_left)
    else:
        return i


class Resident(NamedTuple):
    """The tokens of the side of a tile that stays while a loop streams the other side, [BLOCK]."""

    tokens: Any
    positions: Any
    exist: Any  # whether they exist and are seen by anybody: others are loaded as zeros, since 0 * NaN is NaN
    first_visible: Any  # first and last position that each meets on the other side; first > last if there is none
    last_visible: Any


@triton.jit
def resident(tokens, axis, other, before, after):
    """Return the Resident of some tokens of ``axis``.

    One at position p meets positions p - before to p + after of the other axis; None is unlimited.
    """
    positions = axis.start + tokens
    exist = within(positions, axis)
    first_visible = tl.where(exist, other.begin, other.end)
    last_visible = 0 * positions + (other.end - 1)
    if before is not None:
        first_visible = tl.maximum(first_visible, positions - before)
    if after is not None:
        last_visible = tl.minimum(last_visible, positions + after)
    return Resident(tokens, positions, exist, first_visible, last_visible)


class Bounds(NamedTuple):
    """The span of a Resident, and of what it meets on the other side."""

    # Of its positions.
    first: Any
    last: Any
    # Tokens of the other side, multiples of its block but for the end: tiles in [full_begin, full_end) are visible in
    # full, the others in [begin, end) need a mask.
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def bounds_of(token, last_token, axis, other, before, after, ALWAYS_MASK: tl.constexpr, OTHER_BLOCK: tl.constexpr):
    """Return the Bounds of the tokens of ``axis`` from ``token`` to ``last_token``, which may lie beyond its end."""
    first = axis.start + token
    last = tl.minimum(axis.start + last_token, axis.end - 1)
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
    begin = (begin - other.start) // OTHER_BLOCK * OTHER_BLOCK
    end = tl.where(empty, begin, end - other.start)
    full_begin = (full_begin - other.start + OTHER_BLOCK - 1) // OTHER_BLOCK * OTHER_BLOCK
    full_end = (full_end - other.start) // OTHER_BLOCK * OTHER_BLOCK
    none_full = empty | (full_end <= full_begin) | (first < 0)
    if ALWAYS_MASK:
        none_full = True
    full_begin = tl.where(none_full, begin, full_begin)
    full_end = tl.where(none_full, begin, full_end)
    return Bounds(first, last, begin, full_begin, full_end, end)


#: BLOCK_D or BLOCK_DV of a head_dim.
padded = triton.constexpr_function(configs.padded)

#: What the tiles of a loop have in common; the kernels run through them in this order.
FAR_TILES = tl.constexpr(0)  # visible in full, and so far from the diagonal that a polynomial gives the distance
FULL_TILES = tl.constexpr(1)
MASKED_TILES = tl.constexpr(2)


@triton.constexpr_function
def far_tiles_pay(bits, columns, power, rate, sharpness):
    """Whether tiles with so many columns get a loop of their own where they are far, for a position with these parts.

    The polynomial is right to 1e-5, which is enough beside half-precision inputs alone. Its coefficients are formed
    once per row, which needs wide tiles; with a sharpness there would be two polynomials, and no gain.
    """
    return bits == 16 and columns >= 64 and power and rate and not sharpness


@triton.jit
def loop_bounds(TILES: tl.constexpr, bounds, other, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Return (start, stop, gap, jump) of the loop over one sort of tiles.

    The loop is x in range(start, stop, BLOCK); from gap on the tile begins at token x + jump, before it at x.
    SPLIT: whether there are far tiles, or all that are visible in full are FULL_TILES.
    """
    near_begin, near_end = bounds.full_begin, bounds.full_end
    if SPLIT:
        # From the middle of a far tile to the nearest row it is at least FAR * BLOCK.
        left = (tl.maximum(bounds.first - other.start, 0) // BLOCK - FAR) * BLOCK
        right = (tl.maximum(bounds.last - other.start, 0) // BLOCK + (FAR + 1)) * BLOCK
        near_begin = tl.minimum(tl.maximum(left, bounds.full_begin), bounds.full_end)
        near_end = tl.minimum(tl.maximum(right, near_begin), bounds.full_end)
    if TILES == FAR_TILES:
        gap, jump = near_begin, near_end - near_begin
        return bounds.full_begin, bounds.full_end - jump, gap, jump
    elif TILES == FULL_TILES:
        return near_begin, near_end, near_end, 0
    else:
        gap, jump = bounds.full_begin, bounds.full_end - bounds.full_begin
        return bounds.begin, bounds.end - jump, gap, jump


@triton.jit
def past_gap(x, gap, jump, BLOCK: tl.constexpr):
    """Return the token at which the tile of x begins, in a loop of loop_bounds."""
    return tl.multiple_of(tl.where(x >= gap, x + jump, x), BLOCK)


@triton.jit
def within(positions, axis):
    """Return which positions exist and are seen by anybody."""
    return (positions >= axis.begin) & (positions < axis.end)


@triton.jit
def load_masked(pointers, mask, other):
    """Return what tl.load does, with ``other`` where mask is False; a mask of None reads everything."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=other)


@triton.jit
def load_rows(x, rows, stride, mask, HEAD_DIM: tl.constexpr):
    """Return rows of a (tokens, D) slice as [rows, BLOCK_D]; zeros where mask (or None) is False."""
    BLOCK_D: tl.constexpr = padded(HEAD_DIM)
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
    batch: Any
    h: Any
    first: Any  # in the tensor


@triton.jit
def rows_of(x, strides, axis, h):
    """Return the Rows of head h for the tokens of an Axis."""
    strides = in_elements(strides)
    batch, row = axis.batch, axis.row
    pointer = x + batch.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
    return Rows(pointer, strides[2], batch, h, row)


@triton.jit
def load_tile(x, descriptor, start, mask, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return rows start to start + COUNT as [COUNT, BLOCK_D]; zeros where mask (or None) is False.

    descriptor: of the whole tensor, (B, H, N, D) in tiles of [1, 1, COUNT, BLOCK_D], or None; serves without a mask.
    """
    if descriptor is None or mask is not None:
        return load_rows(x.pointer, start + tl.arange(0, COUNT), x.stride, mask, HEAD_DIM)
    else:
        return tl.reshape(descriptor.load([x.batch, x.h, x.first + start, 0]), [COUNT, padded(HEAD_DIM)])


@triton.jit
def store_tile(x, start, value, mask, HEAD_DIM: tl.constexpr):
    """Store [count, BLOCK_D] into Rows from ``start`` where mask is True."""
    store_rows(x.pointer, start + tl.arange(0, value.shape[0]), x.stride, value, mask, HEAD_DIM)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return float32 in dtype, rounded to nearest. The interpreter truncates to bfloat16: round by hand there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(x, rows, stride, value, mask, HEAD_DIM: tl.constexpr):
    """Store [rows, BLOCK_D] into a (tokens, D) slice where mask is True."""
    BLOCK_D: tl.constexpr = padded(HEAD_DIM)
    columns = tl.arange(0, BLOCK_D)
    pointers = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]  # [rows, BLOCK_D]
    keep = mask[:, None]
    if BLOCK_D != HEAD_DIM:
        keep &= (columns < HEAD_DIM)[None, :]
    tl.store(pointers, cast(value, x.dtype.element_ty), mask=keep)


@triton.jit
def load_key_bias(key_bias, b, num_keys, tokens, mask):
    """Return the additive bias of some keys, -inf where mask is False; None if there is none."""
    if key_bias is None:
        return
    else:
        return tl.load(key_bias + b.to(tl.int64) * num_keys + tokens, mask=mask, other=-float("inf"))


@triton.constexpr_function
def num_partials():
    """Return how many partial sums of a row of a matrix product need no exchange between threads.

    In the product's layout a thread has two of each 8 columns on NVIDIA, and few more on AMD; with tensor memory
    (sm_100), whole rows.
    """
    return 1 if cuda_capability_geq(10, 0) and not cuda_capability_geq(12, 0) else 8


@triton.jit
def dot(a, b, acc=None):
    """Return the product in float32 (float32 operands without TF32). The interpreter has no bfloat16 product."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def relative(position, origin):
    """Return position - origin in float32: exact near the origin, where a mask or a small distance depends on it."""
    return (position - origin).to(tl.float32)


@triton.jit
def tile_logits(qk, scale, shift, resident, column, origin, key_bias, head, TILES: tl.constexpr):
    """Return distances, scores, and logits less shift of one tile, these in units of log2 and -inf where hidden.

    Rows are the resident side: queries, and columns keys (S), or the other way round (its transpose).
    column: positions [COLUMNS] from origin on. scale (of the scores, log2 e included), shift (or None) and key_bias
    (or None) are broadcast to the tile [ROWS, COLUMNS].
    """
    y = relative(resident.positions, origin)[:, None]  # [ROWS, 1]
    x = relative(column, origin)[None, :]  # [1, COLUMNS]
    distance = tl.abs(y - x)
    score = qk * scale
    if TILES == FAR_TILES:
        HALF: tl.constexpr = (column.shape[0] - 1) / 2
        tl.static_assert(shift is None)
        a = far_logit(score, y - HALF, x - HALF, head)
    else:
        a = logit(score, distance, head, shift)
    if key_bias is not None:
        a += key_bias * LOG2E
    if TILES == MASKED_TILES:
        first = relative(resident.first_visible, origin)[:, None]
        last = relative(resident.last_visible, origin)[:, None]
        a = tl.where((x >= first) & (x <= last), a, -float("inf"))
    return distance, score, a


@triton.jit
def partial_sums(x):
    """Return sums [ROWS, num_partials()] of x [ROWS, COLUMNS] over columns that one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // num_partials(), num_partials()]), 1)


@triton.jit
def softmax_step(a, m_i, l_i):
    """Return the weights of a tile of logits, the factor for what was summed before, and the new maximum and sum."""
    m_new = tl.maximum(m_i, tl.max(a, 1))  # [BLOCK_M]
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(a - shift[:, None])  # [BLOCK_M, BLOCK_N]
    correction = tl.exp2(m_i - shift)
    return p, correction, m_new, l_i * correction + tl.sum(p, 1)


@triton.jit
def softmax_end(m_i, l_i):
    """Return 1 / sum and lse, in units of log2, of rows with these maxima and sums; -inf for a row without weights."""
    dead = l_i == 0.0
    l_i = tl.where(dead, 1.0, l_i)
    return 1.0 / l_i, tl.where(dead, -float("inf"), m_i + tl.log2(l_i))


@triton.jit
def dropout_keep(dropout, batch_head, i, j):
    """Return which weights stay; None without dropout.

    Philox on (j, i, batch_head): a function of positions, so chunks of keys agree.
    """
    if dropout is None:
        return
    else:
        zero = (i + j) * 0
        bits, _, _, _ = tl.philox(tl.load(dropout.seed), j + zero, i + zero, batch_head + zero, zero)
        return bits >= tl.full([], dropout.threshold, tl.uint32)
