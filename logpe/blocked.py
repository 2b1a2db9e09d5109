"""The CPU backend: exact attention in O(N * block) memory, forward and backward, out of matrix products.

A block of queries meets at once all keys that one of them may see. For each head there are two tables over the
distance d = |i - j|, U[d] = sqrt(1 + sharpness * l(d)) and B[d] = -power * l(d):

    s = <q, k>, with q rotated and times scale * gain        a = U[d] s + B[d]        P = softmax(a)
    g = dL/da = P (dP - sum_j P dP + dlse)                   ds = U[d] g
    dU[d], dB[d] = sums of g s and of g over the pairs at distance d

The tables, the gain and their derivatives come from :mod:`logpe.reference`: no formula of a position stands here. Two
tricks make the tables almost free:

* The queries stand in reverse order. Row r holds position last - r, so that i - j depends on r + c alone, and the
  tile B[i - j] is a view of the table with strides (1, 1). Where the causal mask or the window hides, the table holds
  -inf.
* g is written with zeros after each row. Read back with rows one element shorter, the diagonals r + c = constant
  become columns, and one sum over rows gives all their sums.

All sums run in a fixed order: the same input with the same number of threads gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from logpe_kernels.options import LEARNABLE_PARTS, Options, new_output
from torch import Tensor

from logpe import reference

BLOCK_ROWS = 128  # queries of a tile, over all the heads that share a key head
TILE_ELEMENTS = 2**19  # logits of a tile per thread, which stay in cache; more if a single head has more
LN2 = math.log(2)
UNLIMITED = 2**62  # side of a window, in tokens

# glibc hands free memory back to the system at each call, and takes it again at the next: 3,000 page faults, a third of
# the time of a short call. Once it has freed a block of this size it keeps up to twice as much.
torch.empty(24 * 2**20, dtype=torch.uint8, device="cpu")


@torch.autocast("cpu", enabled=False)  # the products below are float32 on purpose
def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Run the forward pass of ``torch.ops.logpe.attention``, without autograd.

    Args:
        q: (B, Hq, Nq, D), or packed (total_q, Hq, D). float16 and bfloat16 are computed in float32.
        k, v: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv), or packed (total_k, Hkv, D) and (total_k, Hkv, Dv).

    Returns:
        out: like q, with the Dv of v, in options.out_dtype. lse: (B, Hq, Nq), or packed (Hq, total_q), float32, and
            float64 for float64.
    """
    if options.block_table is not None:
        k, v, key_bias = reference.gather_pages(k, v, options.block_table, options.key_bias)
        options = options._replace(key_bias=key_bias)
    out = new_output(q, True, v.shape[-1], options.out_dtype)
    lse_shape = q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
    lse = q.new_full(lse_shape, -math.inf, dtype=_compute_dtype(q))
    q, k, v, full_out = (_batched(x) for x in (q, k, v, out))
    full_lse = lse if lse.dim() == 3 else lse[None]
    if (step := _step(options, q, k)) is not None:
        part_out, part_lse = _attend(_Part(options, step, q, k, v), hide=False)
        if part_lse.isnan().any() or part_out.isnan().any():  # for what is hidden, perhaps: 0 * NaN is NaN
            part_out, part_lse = _attend(_Part(options, step, q, k, v, clear=True), hide=False)
        full_out[:], full_lse[:] = part_out.view_as(full_out), part_lse.view_as(full_lse)
        return out, lse
    for span in _spans(options, q, k):
        part = _Part(options, span, q, k, v)
        part_out, part_lse = _attend(part, hide=False)
        if part_lse.isnan().any():
            part_out, part_lse = _attend(part, hide=True)
        full_out[span.queries] = part.unreversed(part_out)
        full_lse[span.queries] = part.unreversed(part_lse)[..., 0]
    return out, lse


def _attend(part: _Part, hide: bool) -> tuple[Tensor, Tensor]:
    """Return out, and lse with a last dimension of 1, of reversed rows. hide: as :meth:`_Part.logits` takes it."""
    out = part.q.new_empty(*part.q.shape[:3], part.v.shape[-1])
    lse = part.q.new_empty(*part.q.shape[:3], 1)
    lowest = torch.finfo(part.compute).min
    for tile in part.tiles():
        logits = part.logits(tile, hide=hide)[1]
        peak = logits.amax(-1, keepdim=True).clamp_(min=lowest)  # where there is no key, the weights are 0, not NaN
        weights = _exp2(logits.sub_(peak))  # still to be divided by their sum; faster than torch.softmax
        total = weights.sum(-1, keepdim=True)
        if part.options.dropout_p:
            weights.mul_(part.dropout(tile))
        out[tile.queries] = tile.by_head(torch.bmm(weights, part.v[tile.keys]).div_(total.clamp(min=0.5)))
        lse[tile.queries] = tile.by_head(total.log2_().add_(peak))
    return out, lse.mul_(LN2)


@torch.autocast("cpu", enabled=False)
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    learned: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, and of power, rate, sharpness, alpha: None where absent or not ``learned``.

    ``out`` is not used: sum_j P dP is <dout, out>, too, but the rounding of that would be the same for all keys of a
    row, and add up in the gradients of the parameters. It is summed over each row again.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v, dout, full_dq, full_dk, full_dv = (_batched(x) for x in (q, k, v, dout, dq, dk, dv))
    lse = lse if lse.dim() == 3 else lse[None]
    dlse = torch.zeros_like(lse) if dlse is None else dlse.view_as(lse)
    parameters = _parameters(options)
    wanted = [n for n, want in zip(LEARNABLE_PARTS, learned, strict=True) if want and n in parameters]
    gradients = {name: torch.zeros_like(parameters[name]) for name in wanted}
    for span in _spans(options, q, k):
        part = _Part(options, span, q, k, v)
        part_dout, part_lse, part_dlse = (part.reversed(x) for x in (dout, lse[..., None] / LN2, dlse[..., None]))
        part_dq, part_dk, part_dv = torch.empty_like(part.q), torch.zeros_like(part.k), torch.zeros_like(part.v)
        dtables = {name: torch.zeros_like(table, dtype=torch.float64) for name, table in part.tables.items()}
        for tile in part.tiles():
            tile_q, tile_dout = (x[tile.queries].flatten(1, 2) for x in (part.q, part_dout))
            scores, logits = part.logits(tile, part_lse[tile.queries])
            weights = _exp2(logits)
            # Divided by the sum of the weights, 1 up to the rounding of lse (0 in a keyless row).
            mass = weights.sum(-1, keepdim=True).clamp_(min=0.5)
            tile_dout = tile_dout / mass
            dweights = torch.bmm(tile_dout, part.v[tile.keys].mT, out=part.buffer("dweights", tile))
            if options.dropout_p:
                dropout = part.dropout(tile)
                part_dv[tile.keys].baddbmm_((weights * dropout).mT, tile_dout)
                dweights.mul_(dropout)
            else:
                part_dv[tile.keys].baddbmm_(weights.mT, tile_dout)

            g, padded_g = part.padded(tile)
            torch.mul(tile.by_head(weights), tile.by_head(dweights), out=g)
            delta = (g.sum(-1, keepdim=True) - part_dlse[tile.queries]) / tile.by_head(mass)
            g.addcmul_(tile.by_head(weights), delta, value=-1)
            if wanted:
                dtables["bias"][tile.diagonals].add_(_diagonal_sums(padded_g))
            dscores = g
            if "contrast" in dtables:
                dscores = torch.mul(g, part.view("contrast", tile), out=tile.by_head(weights))
                if wanted:
                    g.mul_(tile.by_head(scores))
                    dtables["contrast"][tile.diagonals].add_(_diagonal_sums(padded_g), alpha=LN2)

            dscores = dscores.flatten(1, 2)
            part_dq[tile.queries] = tile.by_head(dscores @ part.k[tile.keys])
            part_dk[tile.keys].baddbmm_(dscores.mT, tile_q, alpha=LN2)

        if wanted:
            part_gradients = part.parameter_gradients(dtables, part_dq)
            for name in wanted:
                gradients[name] += part_gradients[name]
        part_dq *= part.scale
        if part.query_turns is not None and part.key_turns is not None:
            part_dq = reference.turn(part_dq, *part.query_turns, inverse=True)
            part_dk = reference.turn(part_dk, *part.key_turns, inverse=True)
        full_dq[span.queries] = part.unreversed(part_dq)
        full_dk[span.keys] = part_dk.unflatten(0, (-1, part.key_heads))
        full_dv[span.keys] = part_dv.unflatten(0, (-1, part.key_heads))
    return dq, dk, dv, *(gradients[n].to(getattr(options, n).dtype) if n in wanted else None for n in LEARNABLE_PARTS)


def _parameters(options: Options) -> dict[str, Tensor]:
    """Return the learnable parts by name, in float64."""
    return {name: x.double() for name in LEARNABLE_PARTS if (x := getattr(options, name)) is not None}


def _window(options: Options) -> tuple[int, int]:
    """Return how many tokens a query sees before and after itself."""
    left, right = options.window_left, options.window_right
    return UNLIMITED if left is None else left, UNLIMITED if right is None else right


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _batched(x: Tensor) -> Tensor:
    """Return x (B, H, N, D) as it is, and packed (total, H, D) as a batch of one, (1, H, total, D)."""
    return x if x.dim() == 4 else x.transpose(0, 1)[None]


def _exp2(x: Tensor) -> Tensor:
    """Compute 2^x in place, and 0 below 2^-100: products with subnormal numbers would be many times slower."""
    return F.threshold(x, -100.0, -math.inf, inplace=True).exp2_()


def _diagonal_sums(padded: Tensor) -> Tensor:
    """Return the sums over equal row + column, [..., diagonals].

    Args:
        padded: [..., rows, diagonals + 1], zero wherever row + column >= diagonals.
    """
    rows, stride = padded.shape[-2:]
    return padded.flatten(-2)[..., : rows * (stride - 1)].unflatten(-1, (rows, stride - 1)).sum(-2)


# --- which queries meet which keys --------------------------------------------------------------------------


class _Span(NamedTuple):
    """Sequences with the same positions, and their rows that exist and have a partner in the window.

    The last two are those of :func:`_step`, whose sequences differ: the distance from each key to the only query,
    (sequences, key rows), UNLIMITED for a hidden key; and the position of that query, (sequences or 1, 1).
    """

    batch: slice  # in the first dimension of q, k and v; packed sequences all lie in its only element
    sequences: slice  # their numbers
    query_rows: slice
    key_rows: slice
    query_position: int  # of the first query row
    key_position: int  # of the first key row
    offsets: Tensor | None = None
    positions: Tensor | None = None

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """The index of the queries in q."""
        return self.batch, slice(None), self.query_rows

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        """The index of the keys in k and v."""
        return self.batch, slice(None), self.key_rows


def _spans(options: Options, q: Tensor, k: Tensor) -> Iterator[_Span]:
    """Yield one span for the whole batch if its positions agree, and otherwise one for each sequence."""
    left, right = _window(options)
    batch, total_q, total_k = q.shape[0], q.shape[2], k.shape[2]
    agree = options.cu_seqlens_q is None and all(
        x is None or bool((x == x[:1]).all()) for x in (options.query_starts, options.key_starts, options.key_lengths)
    )
    if options.cu_seqlens_q is not None:
        batch = len(options.cu_seqlens_q) - 1
    for b in range(min(batch, 1) if agree else batch):
        sequences = slice(0, batch) if agree else slice(b, b + 1)
        i = options.query_start if options.query_starts is None else int(options.query_starts[b])
        j = options.key_start if options.key_starts is None else int(options.key_starts[b])
        if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
            rows, query_row, query_end, key_row = sequences, 0, total_q, 0
            key_end = total_k if options.key_lengths is None else min(total_k, int(options.key_lengths[b]))
        else:
            rows = slice(0, 1)
            query_row, query_end = options.cu_seqlens_q[b : b + 2].tolist()
            key_row, key_end = options.cu_seqlens_k[b : b + 2].tolist()
            query_end = min(query_end, total_q, query_row + options.max_seqlen_q)
            key_end = min(key_end, total_k, key_row + options.max_seqlen_k)
        # From rows to positions, which must exist and have a partner in the window; ends are exclusive.
        i_end, j_end = i + query_end - query_row, j + key_end - key_row
        i_first, j_first = max(i, 0), max(j, 0)
        first_query, end_query = max(i_first, j_first - right), min(i_end, j_end + left)
        first_key, end_key = max(j_first, i_first - left), min(j_end, i_end + right)
        if i_first < i_end and j_first < j_end and first_query < end_query and first_key < end_key:
            query_rows = slice(query_row + first_query - i, query_row + end_query - i)
            key_rows = slice(key_row + first_key - j, key_row + end_key - j)
            yield _Span(rows, sequences, query_rows, key_rows, first_query, first_key)


def _step(options: Options, q: Tensor, k: Tensor) -> _Span | None:
    """Return one span for sequences of several lengths that have one query each; None for other calls.

    This is a step of decoding: one product, instead of one for each sequence.
    """
    starts = (options.query_starts, options.key_starts, options.key_lengths)
    special = (options.cu_seqlens_q, options.theta, options.key_bias)
    if q.shape[2] != 1 or options.dropout_p or all(x is None for x in starts) or any(x is not None for x in special):
        return None
    left, right = _window(options)
    rows = torch.arange(k.shape[2])
    i, j, end = (
        torch.as_tensor(one if several is None else several).long().view(-1, 1)
        for one, several in zip((options.query_start, options.key_start, k.shape[2]), starts, strict=True)
    )
    j = j + rows
    visible = (rows < end) & (j >= 0) & (i >= 0) & (i - j <= left) & (j - i <= right)
    used = visible.any(0).nonzero()
    if not len(used):
        return None
    keys = slice(int(used[0]), int(used[-1]) + 1)
    offsets = torch.where(visible, i - j, UNLIMITED).expand(q.shape[0], -1)
    return _Span(slice(0, q.shape[0]), slice(0, q.shape[0]), slice(0, 1), keys, 0, 0, offsets[:, keys], i)


class _Tile(NamedTuple):
    """A block of reversed query rows, and all keys that one of them may see."""

    heads: slice  # (sequence, key head) pairs
    rows: slice  # of queries
    columns: slice  # of keys
    shape: tuple[int, int, int, int]  # heads, group (query heads for each), rows, columns
    end: int  # of the row + column that the window does not hide

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """The index of the queries in _Part.q."""
        return self.heads, slice(None), self.rows

    @property
    def keys(self) -> tuple[slice, slice]:
        """The index of the keys in _Part.k and _Part.v."""
        return self.heads, self.columns

    @property
    def diagonals(self) -> tuple[slice, slice, slice]:
        """The index of the tile in a table: all values of row + column that the window does not hide."""
        return self.heads, slice(None), slice(self.rows.start + self.columns.start, self.end)

    def by_head(self, x: Tensor) -> Tensor:
        """Return x [heads, group * rows, n] as [heads, group, rows, n]."""
        return x.view(*self.shape[:3], -1)


# --- one span, ready for the loops ----------------------------------------------------------------------------


class _Part:
    """The rows of one span in the compute dtype, and the tables over its distances.

    Attributes:
        q: (batch * key heads, group, query rows, D), reversed, rotated, times ``scale``.
        k, v: (batch * key heads, key rows, D or Dv), the keys rotated.
        tables: (batch * key heads, group, distances), by name.
        key_bias: (batch * key heads, 1, key rows), or None.
        keyless: (batch * key heads, 1, query rows), the queries from which the key bias hides every key; None if
            there are none.

    Args:
        clear: set the keys and values to 0 that are hidden in a span of :func:`_step`, and queries without a key.
    """

    def __init__(self, options: Options, span: _Span, q: Tensor, k: Tensor, v: Tensor, clear: bool = False) -> None:
        self.options, self.span, self.compute = options, span, _compute_dtype(q)
        self.left, self.right = _window(options)
        self.parameters = {name: x[:, None] for name, x in _parameters(options).items()}
        self.query_heads, self.key_heads = q.shape[1], k.shape[1]
        self.batch = span.batch.stop - span.batch.start
        num_queries = span.query_rows.stop - span.query_rows.start
        num_keys = span.key_rows.stop - span.key_rows.start
        self.last_query = span.query_position + num_queries - 1
        self.query_positions = self.last_query - torch.arange(num_queries, device=q.device)
        self.key_positions = span.key_position + torch.arange(num_keys, device=q.device)
        self.buffers: dict[str, Tensor] = {}

        k, v = k[span.keys].to(self.compute), v[span.keys].to(self.compute)
        self.key_bias = self.keyless = None
        if options.key_bias is not None:
            key_bias = options.key_bias[span.batch, span.key_rows].to(self.compute)
            self.key_bias = (key_bias / LN2).repeat_interleave(self.key_heads, 0)[:, None]
            hidden = key_bias == -math.inf
            if hidden.any():
                k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))  # 0 * NaN would be NaN
            visible_before = F.pad((~hidden).cumsum(1), (1, 0))  # number of keys
            first, end = self.query_positions - self.left, self.query_positions + self.right + 1
            first, end = ((x - span.key_position).clamp(0, num_keys) for x in (first, end))
            keyless = visible_before[:, first] == visible_before[:, end]
            self.keyless = keyless.repeat_interleave(self.key_heads, 0)[:, None] if keyless.any() else None
        if clear and span.offsets is not None:
            hidden = span.offsets == UNLIMITED
            k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
            self.keyless = hidden.all(1, keepdim=True).repeat_interleave(self.key_heads, 0)[:, None]

        self.q = self.reversed(q)
        self.query_turns = self.key_turns = None
        if options.theta is not None:
            self.query_turns, self.key_turns = (
                reference.turns(positions, options.theta, options.rotary_scale, self.q)
                for positions in (self.query_positions, self.key_positions)
            )
            self.q, k = reference.turn(self.q, *self.query_turns), reference.turn(k, *self.key_turns)
        self.k, self.v = (self.by_pair(x) for x in (k, v))

        # i - j falls along a table: row r and column c meet at element r + c.
        offsets = self.last_query - span.key_position - torch.arange(num_queries + num_keys - 1, device=q.device)
        hidden = (offsets > self.left) | (offsets < -self.right)
        self.distances, self.index = offsets.abs().double(), None
        if span.offsets is not None and span.positions is not None:
            hidden, self.query_positions = (span.offsets == UNLIMITED)[:, None], span.positions
            distances = span.offsets.abs()
            nearest = int(distances.min())
            distances.masked_fill_(hidden[:, 0], nearest)
            several = torch.arange(nearest, min(int(distances.max()), nearest + distances.numel()) + 1)
            self.index = distances - nearest
            if len(several) > distances.numel():  # sequences that are far from each other
                several, self.index = distances.unique(return_inverse=True)
            self.distances = several.double()
            self.left = self.right = UNLIMITED
        curves = self.curves()
        curves["bias"] = curves["bias"].masked_fill(hidden, -math.inf)
        self.tables = {name: self.by_key_head(x.to(self.compute)) for name, x in curves.items()}
        self.gain = self.tables.pop("gain", None)
        self.scale = options.scale if self.gain is None else options.scale * self.gain[..., None]
        self.q *= self.scale / LN2

    # The mathematics of positions, in float64: it is O(N), but its gradients are sums over N^2 pairs.

    def curves(self) -> dict[str, Tensor]:
        """Return the tables before the mask, (batch, query heads, distances), and the gain over the query rows.

        The bias is that of powers of 2.
        """
        p = self.parameters
        curves = {"bias": self.distances.new_zeros(self.query_heads, len(self.distances))}
        if "rate" in p or "power" in p:
            l = reference.log_distance(self.distances, p.get("rate"))  # noqa: E741
            if "power" in p:
                curves["bias"] = reference.distance_bias(l, p["power"])
            if "sharpness" in p:
                curves["contrast"] = reference.sharpening(l, p["sharpness"])
        curves["bias"] = curves["bias"] / LN2
        if self.index is not None:  # a table for each sequence, out of one over all distances
            curves = {name: x.to(self.compute)[:, self.index].transpose(0, 1) for name, x in curves.items()}
        if "alpha" in p:
            curves["gain"] = reference.query_gain(self.lengths(), p["alpha"], self.options.gain_length)
        return {name: x.expand(self.batch, -1, -1) for name, x in curves.items()}

    def lengths(self) -> Tensor:
        """Return n of the query gain, (batch or 1, 1, query rows)."""
        n = self.query_positions.clamp(max=_window(self.options)[0])
        n = n.view(-1, 1, n.shape[-1])
        if self.options.context_lengths is not None:
            n = self.options.context_lengths[self.span.sequences, None, None].expand(-1, 1, n.shape[-1])
        return n.clamp(min=0).double()

    def parameter_gradients(self, dtables: dict[str, Tensor], dq: Tensor) -> dict[str, Tensor]:
        """Return the gradients of all parameters, from those of the tables and of the scaled q."""
        gradients: dict[str, Tensor | None] = {}
        dcurves = {name: self.by_query_head(x).sum(0) for name, x in dtables.items()}
        p = self.parameters
        if "rate" in p or "power" in p:
            parts = (p.get(name) for name in ("power", "rate", "sharpness"))
            gradients["power"], gradients["rate"], gradients["sharpness"] = reference.distance_gradients(
                self.distances, dcurves["bias"], dcurves.get("contrast"), *parts
            )
        if self.gain is not None:
            dgain = self.by_query_head(torch.linalg.vecdot(dq, self.q).double() * LN2 / self.gain)
            gradients["alpha"] = (dgain * reference.log_length(self.lengths(), self.options.gain_length)).sum((0, 2))
        return {name: x for name, x in gradients.items() if x is not None}

    # The tiles.

    def tiles(self) -> Iterator[_Tile]:
        """Yield tiles that cover all pairs of a query and a key in the window."""
        pairs, group, num_queries, _ = self.q.shape
        num_keys = self.k.shape[1]
        # Two blocks at least, so that a causal tile of a short sequence is not half empty.
        step = min(max(1, BLOCK_ROWS // group), max(32, (num_queries + 1) // 2), num_queries)
        elements = group * step * min(num_keys, step + self.left + self.right)
        heads = max(1, TILE_ELEMENTS * torch.get_num_threads() // elements)
        # A tile takes whole sequences, or some heads of one: never parts of two sequences.
        whole = max(heads // self.key_heads, 1) * self.key_heads
        for pair in (p for first in range(0, pairs, whole) for p in range(first, min(first + whole, pairs), heads)):
            for row in range(0, num_queries, step):
                pair_end = min(pair + heads, pair // whole * whole + whole, pairs)
                row_end = min(row + step, num_queries)
                offset = self.last_query - self.span.key_position
                first = max(0, offset - (row_end - 1) - self.left)
                end = min(num_keys, offset - row + self.right + 1)
                shape = (pair_end - pair, group, row_end - row, end - first)
                last = min(row_end + end - 1, offset + self.right + 1)
                yield _Tile(slice(pair, pair_end), slice(row, row_end), slice(first, end), shape, last)

    def logits(self, tile: _Tile, lse: float | Tensor = 0.0, hide: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the scores s and the logits a - lse of a tile, [heads, group * rows, columns], in buffers.

        Args:
            lse: [heads, group, rows, 1].
            hide: set logits to -inf where the table is -inf, whatever the score: -inf + NaN, or -inf + inf, is NaN.
        """
        q, k = self.q[tile.queries].flatten(1, 2), self.k[tile.keys]
        scores = logits = self.buffer("logits", tile)
        bias = self.view("bias", tile)
        torch.sub(bias, lse, out=tile.by_head(logits))
        if "contrast" in self.tables:
            scores = torch.bmm(q, k.mT, out=self.buffer("scores", tile))
            tile.by_head(logits).addcmul_(tile.by_head(scores), self.view("contrast", tile))
        else:
            logits.baddbmm_(q, k.mT)
        if self.key_bias is not None:
            logits += self.key_bias[tile.heads, :, tile.columns]
        if hide:
            tile.by_head(logits).masked_fill_(bias == -math.inf, -math.inf)
        return scores, logits

    def view(self, table: str, tile: _Tile) -> Tensor:
        """Return the values of a table for a tile, [heads, group, rows, columns]."""
        x = self.tables[table][tile.diagonals]
        return x.as_strided(tile.shape, (*x.stride(), 1))

    def dropout(self, tile: _Tile) -> Tensor:
        """Return the factor of each weight of a tile, 0 or 1 / (1 - p), [heads, group * rows, columns]."""
        options = self.options
        assert options.dropout_seed is not None
        batch_head = torch.arange(self.batch * self.query_heads, device=self.q.device).view(self.batch, -1)
        batch_head = self.by_key_head(batch_head + self.span.sequences.start * self.query_heads)
        keep = reference.dropout_keep(
            options.dropout_seed,
            batch_head[tile.heads, :, None, None],
            self.query_positions[tile.rows, None],
            self.key_positions[tile.columns],
            options.dropout_p,
        )
        return keep.flatten(1, 2).to(self.compute) / (1 - options.dropout_p)

    # Memory that all tiles use in turn; the first tile is among the largest.

    def buffer(self, name: str, tile: _Tile, columns: int | None = None) -> Tensor:
        """Return uninitialised memory [heads, group * rows, columns], which the next call of this name overwrites."""
        heads, group, rows, _ = tile.shape
        shape = heads, group * rows, tile.shape[3] if columns is None else columns
        size = math.prod(shape)
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = self.q.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def padded(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """Return memory for a tile, and a view of it with zero columns added for its diagonals to fit in a row."""
        columns, diagonals = tile.shape[3], tile.diagonals[2]
        padded = tile.by_head(self.buffer("padded", tile, diagonals.stop - diagonals.start + 1))
        padded[..., columns:].zero_()
        return padded[..., :columns], padded

    # Between the caller's tensors and this part's.

    def by_key_head(self, x: Tensor) -> Tensor:
        """Return x (batch, query heads, ...) as (batch * key heads, group, ...), contiguous."""
        return x.unflatten(1, (self.key_heads, -1)).flatten(0, 1).contiguous()

    def by_pair(self, x: Tensor) -> Tensor:
        """Return x (batch, key heads, rows, D) as (batch * key heads, rows, D), the rows of a pair side by side."""
        x = x.flatten(0, 1)
        return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()  # a cache is not copied

    def by_query_head(self, x: Tensor) -> Tensor:
        """Return x (batch * key heads, group, ...) as (batch, query heads, ...)."""
        return x.unflatten(0, (-1, self.key_heads)).flatten(1, 2)

    def reversed(self, x: Tensor) -> Tensor:
        """Copy the rows of this part from x, shaped like q, in reverse order; keyless rows are zero."""
        x = self.by_key_head(x[self.span.queries].flip(2).to(self.compute))
        if self.keyless is not None:
            x.masked_fill_(self.keyless[..., None], 0)
        return x

    def unreversed(self, x: Tensor) -> Tensor:
        """Return x (batch * key heads, group, query rows, ...) as (batch, query heads, query rows, ...) in order."""
        return self.by_query_head(x).flip(2)
