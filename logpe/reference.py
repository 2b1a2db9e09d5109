"""The definition of attention with log positions: eager, differentiable, in any precision.

Everything positional passes through f(n) = log(1 + n). For a query at position i and a key at position j,
with d = |i - j|, per query head:

    score         s_ij = scale * gain(i) * < R_i q_i , R_j k_j >
    log distance  l_ij = log(1 + rate * d)
    logit         a_ij = sqrt(1 + sharpness * l_ij) * s_ij - power * l_ij
    out_i = sum_j softmax_j(a_ij) v_j,   lse_i = log sum_j exp(a_ij)

All other implementations are tested against this file. It holds Nq x Nk tensors: use it for small inputs.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from logpe_kernels.options import Options, new_output
from torch import Tensor


class PositionValues(NamedTuple):
    """The values of a log position, as attention takes them. A part that is None is absent.

    Attributes:
        power, rate, sharpness, alpha: float32 (Hq,), positive. A power without a rate weighs the distance itself,
            not its log.
        theta: float64 (planes,), the angle of each rotated plane per unit of f_c.
        rotary_scale: c of f_c, in tokens.
        gain_length: n0 of the query gain, in tokens.
    """

    power: Tensor | None = None
    rate: Tensor | None = None
    sharpness: Tensor | None = None
    alpha: Tensor | None = None
    theta: Tensor | None = None
    rotary_scale: float = 1.0
    gain_length: float = 512.0

    def unrotated(self) -> PositionValues:
        """Return the values without the rotation, for queries and keys that :func:`logpe.rotate` has turned."""
        return self._replace(theta=None)


# --- the mathematics of positions ---------------------------------------------------------------------------


def log_map(n: Tensor, scale: float) -> Tensor:
    """Return f_c(n) = c log(1 + n/c), which is n itself for c = inf. n: floating, >= 0. scale: c, in tokens."""
    # Not math.isinf, which would break the graph of a model whose scale is symbolic.
    return n if scale == math.inf else scale * torch.log1p(n / scale)


def log_distance(distance: Tensor, rate: Tensor | None) -> Tensor:
    """Return l = log(1 + rate * d), or d itself without a rate. ``rate`` broadcasts against ``distance``."""
    return distance if rate is None else torch.log1p(rate * distance)


def distance_bias(l: Tensor, power: Tensor) -> Tensor:  # noqa: E741
    """Return -power * l, added to the logit: a key's weight falls as a power of its distance (Chi et al., 2022)."""
    return -power * l


def sharpening(l: Tensor, sharpness: Tensor) -> Tensor:  # noqa: E741
    """Return sqrt(1 + sharpness * l), a factor of the score: contrast grows with distance (Anson et al., 2025)."""
    return torch.sqrt(1 + sharpness * l)


def log_length(n: Tensor, gain_length: float) -> Tensor:
    """Return log(1 + n / gain_length) for a length n >= 0, in tokens like ``gain_length``."""
    return torch.log1p(n / gain_length)


def query_gain(n: Tensor, alpha: Tensor, gain_length: float) -> Tensor:
    """Return 1 + alpha * log(1 + n / gain_length), a factor of all scores of a query."""
    return 1 + alpha * log_length(n, gain_length)


def distance_gradients(
    distance: Tensor,
    dbias: Tensor,
    dsharpening: Tensor | None,
    power: Tensor | None,
    rate: Tensor | None,
    sharpness: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of power, rate and sharpness, from those of ``distance_bias`` and ``sharpening``.

    Args:
        distance: (L,).
        dbias, dsharpening: (..., L), the gradients at these distances.
        power, rate, sharpness: (..., 1).

    Returns:
        Three tensors (...); None for what is absent.
    """
    l = log_distance(distance, rate)  # noqa: E741
    if rate is None:
        return -(dbias * l).sum(-1), None, None
    dl = torch.zeros_like(dbias)
    dpower = dsharpness = None
    if power is not None:
        dpower = -(dbias * l).sum(-1)
        dl -= power * dbias
    if sharpness is not None and dsharpening is not None:
        dsquare = dsharpening / (2 * sharpening(l, sharpness))
        dsharpness = (dsquare * l).sum(-1)
        dl += sharpness * dsquare
    return dpower, (dl * distance / (1 + rate * distance)).sum(-1), dsharpness


def device_of_angles(device: torch.device) -> torch.device:
    """Return the device for the float64 angles of tokens on ``device``: the CPU, where that may lack float64."""
    return device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")


def inverse_frequencies(planes: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Return theta_t = base ** (-t / planes), float64 (planes,)."""
    return base ** (-torch.arange(planes, dtype=torch.float64, device=device) / planes)


def rotate(x: Tensor, positions: Tensor, theta: Tensor, rotary_scale: float, inverse: bool = False) -> Tensor:
    """Turn plane t of x by theta_t * f_c(position), where plane t consists of the dims t and t + planes.

    The angles are formed in float64, on the device of theta: with c = inf they are exact at position 10^6, too.

    Args:
        x: (..., N, D). The products are taken in float32 at least.
        positions: broadcastable to x.shape[:-1]. Positions below 0 do not exist: such tokens turn by 0.
        theta: (planes,), 2 * planes <= D. Later dims stay as they are.
        rotary_scale: c of f_c.
        inverse: turn back.

    Returns:
        (..., N, D), the dtype of x.
    """
    return turn(x, *turns(positions, theta, rotary_scale, x), inverse)


def turns(positions: Tensor, theta: Tensor, rotary_scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of :func:`rotate`, (..., N, planes).

    They lie where ``like`` does, in its dtype, and in float32 at least.
    """
    angle = log_map(positions.clamp(min=0).to(theta.device).double(), rotary_scale)[..., None] * theta
    compute = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(compute).to(like.device), angle.sin().to(compute).to(like.device)


def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Return x (..., N, D), turned by angles of :func:`turns`, or back."""
    planes = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split((planes, planes, x.shape[-1] - 2 * planes), dim=-1)
    sign = -1 if inverse else 1
    turned = (first * cos).addcmul(second, sin, value=-sign), (second * cos).addcmul(first, sin, value=sign)
    return torch.cat((*turned, rest), dim=-1).to(x.dtype)


# --- dropout ------------------------------------------------------------------------------------------------


def philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Return the first word of Philox-4x32-10 (Salmon et al., 2011) at (c0, c1, c2, 0), int64 in [0, 2^32)."""
    word = 0xFFFFFFFF

    def mulhi(a: int, b: Tensor) -> Tensor:  # high word of a 32 x 32 bit product, without leaving int64
        return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16

    c0, c1, c2 = (c.to(torch.int64) & word for c in torch.broadcast_tensors(c0, c1, c2))
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & word, seed >> 32 & word
    for _ in range(10):
        c0, c1, c2, c3 = (
            mulhi(0xCD9E8D57, c2) ^ c1 ^ k0,
            0xCD9E8D57 * c2 & word,
            mulhi(0xD2511F53, c0) ^ c3 ^ k1,
            0xD2511F53 * c0 & word,
        )
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0


def dropout_keep(seed: Tensor, batch_head: Tensor, query_positions: Tensor, key_positions: Tensor, p: float) -> Tensor:
    """Return which weights survive dropout: bool, of the shape to which the three integer tensors broadcast.

    For one seed and head the answer depends on the two positions alone, so that partial results over chunks of the
    keys drop the same weights.

    Args:
        seed: int64, one element.
        batch_head: b * Hq + h, the number of the head h of sequence b.
        p: probability to drop a weight.
    """
    return philox(seed.reshape(()), key_positions, query_positions, batch_head) >= int(p * 2**32)


# --- masks --------------------------------------------------------------------------------------------------

MAX_BIAS = torch.finfo(torch.float16).max  # 65504, and exp(-65504) is 0 in every precision


def bounded(bias: Tensor) -> Tensor:
    """Return a floating mask with its finite values clamped to the range of float16; -inf stays.

    Without the clamp, rounding would decide a row whose keys are all masked in this way: float32's lowest value
    swallows every score, and becomes infinite as soon as anything negative is added to it.
    """
    return bias.clamp(-MAX_BIAS, MAX_BIAS).masked_fill(bias == -math.inf, -math.inf)


# --- attention ----------------------------------------------------------------------------------------------


def positions_of(count: int, start: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """Return the positions (B or 1, count) of tokens that begin at ``starts`` (B,) or, without it, at ``start``."""
    first = torch.tensor([start], device=device) if starts is None else starts
    return first[:, None] + torch.arange(count, device=device)


def query_lengths(options: Options, tokens: Tensor) -> Tensor:
    """Return n of the query gain, (B or 1, N) or packed (N,), of the queries with these indices (N,)."""
    start, context = options.query_starts, options.context_lengths
    if options.cu_seqlens_q is None:
        tokens = tokens[None]
        start, context = (x if x is None else x[:, None] for x in (start, context))
    else:
        ends = options.cu_seqlens_q[1:]
        if len(ends) == 0:
            return torch.zeros_like(tokens)
        sequence = torch.searchsorted(ends, tokens.to(ends.dtype), right=True).clamp(max=len(ends) - 1)
        tokens = tokens - options.cu_seqlens_q[sequence]
        start, context = (x if x is None else x[sequence] for x in (start, context))
    n = tokens + (options.query_start if start is None else start)
    if context is not None:
        n = context + torch.zeros_like(tokens)
    elif options.window_left is not None:
        n = n.clamp(max=options.window_left)
    return n.clamp(min=0)


def gather_pages(k: Tensor, v: Tensor, block_table: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Copy paged keys and values into dense ones.

    Args:
        k, v: (num_pages, Hkv, page_size, D or Dv).
        block_table: int (B, max_pages). An entry that is no page hides its keys by a bias of -inf.
        key_bias: (B, max_pages * page_size), or None.

    Returns:
        k and v (B, Hkv, max_pages * page_size, D or Dv), and the key_bias that goes with them.
    """
    exists = (block_table >= 0) & (block_table < k.shape[0])
    pages = block_table.where(exists, 0)
    exists = exists.repeat_interleave(k.shape[2], 1)
    k, v = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k, v))
    if key_bias is None:
        key_bias = torch.zeros((), device=k.device)
    return k, v, torch.where(exists, key_bias, -math.inf)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the dtype of both, also where autocast would lower it."""
    device = a.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return a @ b


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * (q @ k), float32 or better; the products are rounded to the dtype of q and k."""
    if q.dtype == torch.float16:  # products may go beyond 65504; powers of two cost no precision
        q, k, scale = q / 8, k / 8, 64 * scale
    return product(q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    attn_mask: Tensor | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, ...]:
    """Compute attention with log positions, one eager step after the other.

    The two matrix products run in the dtype of the inputs: a half-precision score is rounded once, as ``q @ k.mT``
    rounds it, and a weight once before it meets v. Positions and softmax run in float32, or in float64 for float64
    inputs. In float16 a score before scaling may reach 4e6.

    Args:
        q: (B, Hq, Nq, D). k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, Dv), with Hq a multiple of Hkv.
        options: everything but cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k. key_bias is clamped by
            :func:`bounded`.
        attn_mask: bool, where True is visible, or additive like key_bias. Broadcastable to (B, Hq, Nq, Nk).
        return_weights: also return the weights.

    Returns:
        out: (B, Hq, Nq, Dv), options.out_dtype, by default the dtype of q. lse: (B, Hq, Nq), natural log, before
            dropout. A query that sees no key gets zeros and -inf. With ``return_weights``, the weights
            (B, Hq, Nq, Nk) after dropout.
    """
    key_bias, scale = options.key_bias, options.scale
    if options.block_table is not None:
        k, v, key_bias = gather_pages(k, v, options.block_table, key_bias)
    (batch, heads, num_queries, _), num_keys = q.shape, k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)

    # i: (B or 1, 1, Nq, 1), j: (B or 1, 1, 1, Nk)
    i = positions_of(num_queries, options.query_start, options.query_starts, q.device)[:, None, :, None]
    j = positions_of(num_keys, options.key_start, options.key_starts, q.device)[:, None, None, :]
    key_index = torch.arange(num_keys, device=q.device)

    visible = (i >= 0) & (j >= 0)  # (B or 1, 1, Nq, Nk)
    if options.window_left is not None:
        visible = visible & (j >= i - options.window_left)
    if options.window_right is not None:
        visible = visible & (j <= i + options.window_right)
    if options.key_lengths is not None:
        visible = visible & (key_index < options.key_lengths[:, None])[:, None, None]
    if key_bias is not None:
        key_bias = bounded(key_bias.to(compute))
        visible = visible & (key_bias != -math.inf)[:, None, None]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = bounded(attn_mask.to(compute))
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)

    # What no query may see must not matter, even if it is NaN.
    seen_by_any = visible.any((1, 2))[:, None, :, None]  # (B or 1, 1, Nk, 1)
    k, v = k.where(seen_by_any, 0), v.where(seen_by_any, 0)
    sees_any = visible.any(-1, keepdim=True)  # (B or 1, 1 or Hq, Nq, 1)
    q = q.where(sees_any, 0)

    if options.theta is not None:
        q = rotate(q, i[..., 0], options.theta, options.rotary_scale)
        k = rotate(k, j[..., 0, :], options.theta, options.rotary_scale)
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def per_head(parameter: Tensor) -> Tensor:
        return parameter.to(compute)[:, None, None]

    logit = scores(q, k.mT, scale)
    if options.alpha is not None:
        n = query_lengths(options, torch.arange(num_queries, device=q.device))[:, None, :, None].to(compute)
        logit = logit * query_gain(n, per_head(options.alpha), options.gain_length)
    if options.rate is not None or options.power is not None:
        rate = None if options.rate is None else per_head(options.rate)
        l = log_distance((i - j).abs().to(compute), rate)  # noqa: E741
        if options.sharpness is not None:
            logit = sharpening(l, per_head(options.sharpness)) * logit
        if options.power is not None:
            logit = logit + distance_bias(l, per_head(options.power))
    if key_bias is not None:
        logit = logit + key_bias[:, None, None]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logit = logit + attn_mask

    # A row without a visible key takes the softmax of zeros, which is then dropped: no NaN, forward or backward.
    logit = logit.masked_fill(~visible, -math.inf).masked_fill(~sees_any, 0)
    lse = torch.logsumexp(logit, -1).masked_fill(~sees_any[..., 0], -math.inf)
    weights = torch.softmax(logit, -1).where(visible, 0)
    if options.dropout_p > 0:
        assert options.dropout_seed is not None
        batch_head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
        keep = dropout_keep(options.dropout_seed, batch_head, i, j, options.dropout_p)
        weights = weights.where(keep, 0) / (1 - options.dropout_p)
    out_dtype = options.out_dtype or v.dtype
    out = product(weights.to(v.dtype).to(out_dtype), v.to(out_dtype)).where(sees_any, 0)
    return (out, lse, weights) if return_weights else (out, lse)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Run :func:`attention` on packed sequences, through a padded copy.

    Args:
        q: (total_q, Hq, D). k: (total_k, Hkv, D), v: (total_k, Hkv, Dv).
        options: cu_seqlens_q and cu_seqlens_k, and the options of :func:`attention` except key_lengths, key_bias and
            block_table.

    Returns:
        out: (total_q, Hq, Dv). lse: (Hq, total_q). Tokens outside every sequence get zeros and -inf.
    """
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None

    def padded(x: Tensor, index: Tensor) -> Tensor:  # (total, H, D) -> (B, H, longest, D)
        return x[index.clamp(max=max(len(x) - 1, 0))].transpose(1, 2)

    index_q, lengths_q = _padded_index(options.cu_seqlens_q)
    index_k, lengths_k = _padded_index(options.cu_seqlens_k)
    out = new_output(q, True, v.shape[-1], options.out_dtype)
    lse = out.new_full((q.shape[1], len(q)), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if len(k) == 0:  # so that there is something to index, in the graph of k and v
        k, v = (torch.cat((x, x.new_zeros(1, *x.shape[1:]))) for x in (k, v))
    dense = options._replace(key_lengths=lengths_k, cu_seqlens_q=None, cu_seqlens_k=None)
    padded_out, padded_lse = attention(padded(q, index_q), padded(k, index_k), padded(v, index_k), dense)[:2]
    real = torch.arange(index_q.shape[1], device=q.device) < lengths_q[:, None]  # (B, longest)
    tokens = index_q[real]
    out = out.index_put((tokens,), padded_out.transpose(1, 2)[real])
    return out, lse.T.index_put((tokens,), padded_lse.transpose(1, 2)[real]).T


def add_sink(out: Tensor, lse: Tensor, sink: Tensor, options: Options, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse with one more key in each row, whose score is ``sink`` and whose value is zero.

    Args:
        out: (B, Hq, N, Dv), or packed (total, Hq, Dv).
        lse: (B, Hq, N), or packed (Hq, total).
        sink: (Hq,), or like lse. The query gain multiplies it.
        options: those of the call that gave out and lse.
        tokens: (N,), the indices of these queries among those of the options.
    """
    sink = (sink if sink.dim() > 1 else sink[:, None]).to(lse.dtype)
    if options.alpha is not None:
        n, alpha = query_lengths(options, tokens).to(lse.dtype), options.alpha.to(lse.dtype)
        sink = sink * query_gain(n[..., None, :], alpha[:, None], options.gain_length)
    keyless = lse == -math.inf
    share = torch.sigmoid((lse - sink).masked_fill(keyless, -math.inf))
    lse = torch.where(keyless, sink, torch.logaddexp(lse.masked_fill(keyless, 0), sink))
    return out * (share if options.cu_seqlens_q is None else share.mT)[..., None], lse


def _padded_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token indices (B, longest) of packed sequences, which run on past each end, and the lengths (B,)."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device), lengths
