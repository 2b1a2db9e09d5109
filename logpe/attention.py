"""The functions that people call: they fill in defaults and choose a backend."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from logpe_kernels.options import NUM_POSITIONAL, Options
from torch import Tensor

from logpe import checks, ops, reference
from logpe.checks import Window
from logpe.position import LogPosition, Position, values_of
from logpe.reference import PositionValues

if TYPE_CHECKING:
    from logpe.distributed import ContextParallel

BACKENDS = ("auto", "triton", "blocked", "reference")


@overload
def log_attention(
    q: Tensor, k: Tensor, v: Tensor, position: Position = ..., *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def log_attention(q: Tensor, k: Tensor, v: Tensor, position: Position = ..., **options: Any) -> Tensor: ...
def log_attention(  # type: ignore[misc] # the options are listed once
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Position = None,
    *,
    is_causal: bool = False,
    query_start: int | Tensor | None = None,
    key_start: int | Tensor = 0,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    context_length: int | Tensor | None = None,
    sink: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool = False,
    context_parallel: ContextParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention whose sense of position is logarithmic, otherwise like ``F.scaled_dot_product_attention``.

    Unlike there, ``is_causal`` aligns the last query with the last key (bottom-right, as in flash-attention 2 and
    ``torch.nn.attention.bias.causal_lower_right``). Pass ``query_start=0`` for the top-left alignment.

    The letters of the shapes are explained in :mod:`logpe`.

    Args:
        q: (B, Hq, Nq, D), with D from 1 to 256. float16, bfloat16 or float32; the CPU backends also take float64.
        k, v: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv), where Hq is a multiple of Hkv and Dv is from 1 to 256, too. q, k and
            v may have any strides, as long as the last dimension is contiguous.
        position: a :class:`LogPosition` or the values it returns; None is plain attention.
        is_causal: hide the keys after each query.
        query_start, key_start: position of the first query and of the first key, an int or an int tensor (B,), at
            most 2^29. By default keys start at 0, and the last query stands at the last key. Where that would be a
            guess, query_start is required: if Nq != Nk without is_causal or with key_lengths. Tokens at negative
            positions do not exist, which is how to describe left padding: ``key_start = -padding``.
        key_lengths: int (B,). Keys at this index and beyond are hidden (right padding).
        key_mask: (B, Nk). Bool, where True is visible, or floating and added to the logits, without a gradient. -inf
            hides. Other values are clamped to float16's range, -65504 to 65504, so that any ``finfo.min`` means the
            same.
        block_table: int (B, max_pages), for a paged cache. k and v are then (num_pages, Hkv, page_size, D or
            Dv), with a page_size of 16, 32, 64, 128 or 256. Key n of sequence b is row n % page_size of page
            block_table[b, n // page_size], and Nk is max_pages * page_size. An entry that is no page, such as -1,
            holds no keys. Pages allow no dropout, no gradient (except with backend="reference"), and a rotary
            position only :meth:`unrotated`, with queries and keys that :func:`rotate` has turned.
        window: (left, right): the query at i sees the keys from i - left to i + right. One int means both sides, None
            or -1 unlimited.
        scale: factor of the scores, a number; 1 / sqrt(D) by default. To learn it, or for one per head, multiply q.
        dropout_p: probability to drop a weight, in [0, 1).
        dropout_seed: int64 tensor of one element, on the device of q; drawn from torch's generator by default.
        context_length: n of the query gain, an int or an int tensor (B,). By default it is the query's position when
            causal (at most window[0]), and otherwise the number of keys: the position of the last key, plus 1.
        sink: floating (Hq,) or (B, Hq, Nq), finite: the score of one more key, which a query may choose where no other
            matches. It has no place, so that neither distance nor masks matter to it, and its value is zero; a query
            gain multiplies it as all scores. It is no part of k and v, and dropout leaves it. lse counts it, and is
            its score where a query may see no key.
        out_dtype: the dtype of out, that of q by default. torch.float32 keeps what the sums of half precision hold, so
            that parts to be merged are not rounded one by one. The gradient of out is rounded to the dtype of q.
        return_lse: also return the log of the sum of exponentials.
        backend: "auto" takes "triton" on a GPU and "blocked" on the CPU. "reference" is the eager definition: it holds
            the Nq * Nk scores, runs on any device, and serves ``torch.func`` and double backward.
        validate: also check values that lie on a GPU, which waits for it. CPU values are always checked.
        context_parallel: how the tokens lie across processes. q, k, v, key_mask and a sink for each query, and what is
            returned, are then those of this rank's tokens. All other arguments are those of the whole sequences, the
            same on every rank. There may be no block_table. See :class:`ContextParallel`, also for the gradients.

    Returns:
        out: (B, Hq, Nq, Dv), out_dtype. lse: (B, Hq, Nq), natural log, float32 (float64 for float64 inputs),
        differentiable. A query that may see no key gets zeros and -inf.

    Raises:
        TypeError, ValueError: a bad argument, named, with its value and what is allowed.
        RuntimeError: the chosen backend cannot run here, or ``torch.jit.trace`` is tracing the call.
    """
    if context_parallel is not None:
        result = _context_parallel(
            context_parallel, q, k, v, position, is_causal=is_causal, query_start=query_start, key_start=key_start,
            key_lengths=key_lengths, key_mask=key_mask, block_table=block_table, window=window, scale=scale,
            dropout_p=dropout_p, dropout_seed=dropout_seed, context_length=context_length, sink=sink,
            out_dtype=out_dtype, backend=backend, validate=validate,
        )  # fmt: skip
        return result if return_lse else result[0]
    q, k, v = autocast(q, k, v)
    values = values_of(position, q)
    left, right = checks.resolve_window(window, is_causal)
    key = None
    plain = query_start is key_lengths is key_mask is block_table is context_length is sink is out_dtype is None
    if isinstance(position, PositionValues) and checks.readable(q, validate):
        plain = False  # each call has values of its own to check
    if plain and type(dropout_p) in (float, int) and dropout_p == 0 and (is_causal or values.alpha is None):
        key = _key_of(q, k, v, position, values, is_causal, key_start, (left, right), scale, backend)
        if key is not None and (plan := ops.plans().get(key)) is not None:
            options = Options._make((*values[:NUM_POSITIONAL], *plan.options[NUM_POSITIONAL:]))
            result = ops.run(q, k, v, options, "triton", plan)
            return result if return_lse else result[0]
    (batch, heads, num_queries, head_dim), (pages, _, num_keys, _), _ = checks.check_tensors(4, q=q, k=k, v=v)
    dropout_p = checks.check_number("dropout_p", dropout_p)
    _check_position(position, values, q, heads, head_dim, validate)
    if block_table is not None:
        block_table = checks.check_block_table(block_table, k, q, values, dropout_p)
        num_keys *= block_table.shape[1]
    elif pages != batch:
        raise ValueError(f"k must have the batch size of q, {batch}, got {pages}")
    if key_lengths is not None:
        key_lengths = checks.check_int_tensor("key_lengths", key_lengths, batch, q, validate, low=0, high=num_keys)
    if key_mask is not None:
        key_mask = checks.resolve_key_mask(key_mask, batch, num_keys, q, validate)
    if sink is not None:
        checks.check_sink(sink, (batch, heads, num_queries), q, validate)

    key_start, key_starts = checks.resolve_start("key_start", key_start, batch, q, validate)
    first_key = key_start if key_starts is None else key_starts
    if query_start is None:
        positional = _is_positional(values, left, right)
        if num_queries != num_keys and positional and (not is_causal or key_lengths is not None):
            raise ValueError(
                f"query_start is required for {num_queries} queries and {num_keys} keys "
                f"{'with key_lengths' if is_causal else 'without is_causal'}: the position of the first query, "
                "on the axis of the keys"
            )
        offset = num_keys - num_queries if positional else 0
        query_start, query_starts = key_start + offset, None if key_starts is None else key_starts + offset
    else:
        query_start, query_starts = checks.resolve_start("query_start", query_start, batch, q, validate)
    if context_length is None and values.alpha is not None and not is_causal:
        context_length = first_key + (num_keys if key_lengths is None else key_lengths)
    context_lengths = _context_lengths(context_length, values, batch, q, validate)

    options = Options(
        *values[:NUM_POSITIONAL],
        query_starts=query_starts,
        key_starts=key_starts,
        key_lengths=key_lengths,
        key_bias=key_mask,
        context_lengths=context_lengths,
        block_table=block_table,
        dropout_seed=dropout_seed,
        query_start=query_start,
        key_start=key_start,
        window_left=left,
        window_right=right,
        rotary_scale=values.rotary_scale,
        gain_length=values.gain_length,
        scale=checks.resolve_scale(scale, head_dim),
        dropout_p=dropout_p,
        out_dtype=checks.resolve_out_dtype(out_dtype, q),
    )
    result = _attend(q, k, v, options, backend, key, sink)
    return result if return_lse else result[0]


@overload
def log_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, position: Position, *lengths: Any, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def log_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, position: Position, *lengths: Any, **options: Any
) -> Tensor: ...
def log_attention_varlen(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Position,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    query_start: int | Tensor | None = None,
    key_start: int | Tensor = 0,
    window: Window = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    context_length: int | Tensor | None = None,
    sink: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool = False,
    context_parallel: ContextParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`log_attention` on packed sequences, like ``flash_attn_varlen_func``.

    Args:
        q: (total_q, Hq, D). k, v: (total_k, Hkv, D) and (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), from 0 on and never falling. Sequence b consists of the tokens
            from cu_seqlens[b] to before cu_seqlens[b + 1]. Tokens after the last sequence get zeros.
        max_seqlen_q, max_seqlen_k: int, at least the length of the longest sequence. Less raises ValueError where
            cu_seqlens are checked (on the CPU, or with validate); elsewhere longer sequences are cut there.
        sink: (Hq,) or (Hq, total_q).
        query_start: by default, when causal, each sequence's last query stands at its last key. Without is_causal
            queries start where keys do, which needs equal lengths: with two different cu_seqlens it is required.

    The other arguments and the errors are those of :func:`log_attention`.

    Returns:
        out: (total_q, Hq, Dv). lse: (Hq, total_q).
    """
    if context_parallel is not None:
        result = _context_parallel(
            context_parallel, q, k, v, position, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, is_causal=is_causal, query_start=query_start,
            key_start=key_start, window=window, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
            context_length=context_length, sink=sink, out_dtype=out_dtype, backend=backend, validate=validate,
        )  # fmt: skip
        return result if return_lse else result[0]
    q, k, v = autocast(q, k, v)
    values = values_of(position, q)
    (total_queries, heads, head_dim), *_ = checks.check_tensors(3, q=q, k=k, v=v)
    if sink is not None:
        checks.check_sink(sink, (heads, total_queries), q, validate)
    same_lengths = cu_seqlens_q is cu_seqlens_k
    max_seqlen_q = checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    cu_seqlens_q = checks.check_cu_seqlens("q", cu_seqlens_q, q, max_seqlen_q, validate)
    cu_seqlens_k = checks.check_cu_seqlens("k", cu_seqlens_k, k, max_seqlen_k, validate)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] != batch + 1:
        raise ValueError(f"cu_seqlens_k must have the length of cu_seqlens_q, {batch + 1}, got {cu_seqlens_k.shape[0]}")
    _check_position(position, values, q, heads, head_dim, validate)
    left, right = checks.resolve_window(window, is_causal)

    key_start, key_starts = checks.resolve_start("key_start", key_start, batch, q, validate)
    first_key = key_start if key_starts is None else key_starts
    if query_start is None:
        positional = _is_positional(values, left, right)
        if positional and not same_lengths and not is_causal:
            same_lengths = checks.readable(cu_seqlens_q, validate) and torch.equal(cu_seqlens_q, cu_seqlens_k)
            if not same_lengths:
                raise ValueError(
                    "query_start is required for sequences of different query and key lengths without is_causal "
                    "(pass one and the same tensor as cu_seqlens_q and cu_seqlens_k where they are equal)"
                )
        query_start, query_starts = key_start, key_starts
        if positional and not same_lengths:
            query_starts = cu_seqlens_k.diff() - cu_seqlens_q.diff() + first_key
    else:
        query_start, query_starts = checks.resolve_start("query_start", query_start, batch, q, validate)
    if context_length is None and values.alpha is not None and not is_causal:
        context_length = first_key + cu_seqlens_k.diff()
    context_lengths = _context_lengths(context_length, values, batch, q, validate)

    options = Options(
        *values[:NUM_POSITIONAL],
        query_starts=query_starts,
        key_starts=key_starts,
        context_lengths=context_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_seed=dropout_seed,
        query_start=query_start,
        key_start=key_start,
        window_left=left,
        window_right=right,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        rotary_scale=values.rotary_scale,
        gain_length=values.gain_length,
        scale=checks.resolve_scale(scale, head_dim),
        dropout_p=dropout_p,
        out_dtype=checks.resolve_out_dtype(out_dtype, q),
    )
    result = _attend(q, k, v, options, backend, sink=sink)
    return result if return_lse else result[0]


def rotate(x: Tensor, position: Position, start: int | Tensor = 0) -> Tensor:
    """Rotate queries or keys as :func:`log_attention` does with this position. A cache stores its keys like this.

    A key's rotation depends only on where it stands, so rotating it once is exact. Attention over rotated queries and
    keys takes the rest of the position, ``position().unrotated()``.

    Args:
        x: (B, H, N, D), contiguous in the last dimension.
        position: a :class:`LogPosition` or the values it returns. Without a rotation in it, x is returned as it is.
        start: position of the first token, an int or an int tensor (B,). Tokens before position 0 do not exist.

    Returns:
        (B, H, N, D), the dtype of x, differentiable in x.

    Raises:
        TypeError, ValueError: a bad argument, named, with its value and what is allowed.
    """
    checks.check_dense("x", x)
    values = values_of(position, x)
    if values.theta is None:
        return x
    checks.check_tensors(4, x=x)
    start, starts = checks.resolve_start("start", start, x.shape[0], x)
    checks.check_theta(values.theta, x)
    return ops.rotate(x, values.theta, starts, start, values.rotary_scale)


def merge_partials(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge results over disjoint chunks of the keys into the result over all of them, exactly.

    Args:
        outs: each (B, H, N, Dv), or packed (total, H, Dv), all of one floating dtype. Chunks without keys (zeros, lse
            -inf) are welcome.
        lses: each (B, H, N), or packed (H, total), all of one floating dtype, in natural log.

    Returns:
        out and lse in the shapes and dtypes of the parts, differentiable in all of them. The parts must come from calls
        with the same context_length if there is a query gain, and with the same dropout_seed if there is dropout.

    Raises:
        TypeError, ValueError: no parts, not as many outs as lses, or dtypes, devices or shapes that do not match.
    """
    outs, lses = list(outs), list(lses)
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be of one length, at least 1, got {len(outs)} and {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            checks.check_dense(name, part)
            if not part.is_floating_point() or part.dtype != parts[0].dtype or part.device != outs[0].device:
                raise TypeError(
                    f"{name} must be floating tensors of one dtype, all on one device, "
                    f"got {part.dtype} on {part.device} beside {parts[0].dtype} on {outs[0].device}"
                )
    packed = outs[0].dim() == 3
    for out, lse in zip(outs, lses, strict=True):
        expected = out.shape[:-1] if not packed else (out.shape[1], out.shape[0])
        if out.dim() not in (3, 4) or out.shape != outs[0].shape or lse.shape != expected:
            raise ValueError(
                f"outs and lses must have the shapes (B, H, N, Dv) and (B, H, N), or (total, H, Dv) and (H, total), "
                f"the same in all parts, got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    # Rows of an empty part weigh nothing, but may hold NaN: 0 * NaN is NaN.
    rows = torch.stack(lses)  # [chunks, ...]
    peak = rows.detach().amax(0)
    empty = peak == -math.inf
    peak = peak.masked_fill(empty, 0)
    weights = torch.exp(rows - peak)
    total = weights.sum(0)
    lse = (total.masked_fill(empty, 1).log() + peak).masked_fill(empty, -math.inf)
    weights = weights / total.masked_fill(empty, 1)
    if packed:
        weights, rows = weights.mT, rows.mT
    values = torch.stack(outs).to(weights.dtype).masked_fill((rows == -math.inf)[..., None], 0)
    return (weights[..., None] * values).sum(0).to(outs[0].dtype), lse


for _function in (log_attention, log_attention_varlen, rotate, merge_partials):
    # torch.jit.script raises this, rather than complain of the first line that it does not understand.
    _function.__dict__["__script_unsupported"] = (
        f"{_function.__name__} cannot be compiled by torch.jit.script: use torch.compile or torch.export"
    )


def _context_parallel(
    parallel: ContextParallel, q: Tensor, k: Tensor, v: Tensor, position: Position, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's queries, from its tokens and all other arguments."""
    from logpe.context_parallel import attend  # here, because it calls the functions above for each part

    return attend(parallel, q, k, v, position, options)


# --- running ------------------------------------------------------------------------------------------------


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    backend: str,
    key: Hashable = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a backend and run it on a call whose other arguments are checked.

    Args:
        key: the key by which later calls like this one, which need no checks, will find the plan.
    """
    if sink is not None:  # out is rounded once, after the sink has scaled it
        wide = options._replace(out_dtype=checks.resolve_out_dtype(torch.promote_types(q.dtype, torch.float32), q))
        tokens = torch.arange(q.shape[-2 if q.dim() == 4 else 0], device=q.device)
        out, lse = reference.add_sink(*_attend(q, k, v, wide, backend), sink, options, tokens)
        return out.to(options.out_dtype or q.dtype), lse
    backend = _resolve_backend(backend, q)
    dropout_p, dropout_seed = checks.resolve_dropout(options.dropout_p, options.dropout_seed, q)
    options = options._replace(dropout_p=dropout_p, dropout_seed=dropout_seed)
    if backend == "reference":
        run = reference.attention_varlen if options.cu_seqlens_q is not None else reference.attention
        out, lse = run(q, k, v, options)[:2]
        return out, lse
    plan = None if key is None else ops.plans().find(key, lambda: ops.plans().Plan(q, k, v, options))
    return ops.attention(q, k, v, options, backend, plan)


def _resolve_backend(backend: str, q: Tensor) -> str:
    """Return the name of the backend to run, and raise if it cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "triton" if q.is_cuda else "blocked"
        if not q.is_cuda and q.device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f'backend="auto" has nothing fast on {q.device}: "triton" runs on CUDA and ROCm GPUs, "blocked" on the '
                'CPU. backend="reference" runs anywhere, in memory that grows with Nq * Nk'
            )
    elif backend == "reference" and q.is_meta:  # the shapes are the same, and lengths need not be read
        backend = "blocked"
    if backend == "triton":
        if reason := ops.why_not_triton(q.device):
            raise RuntimeError(f'backend="triton" cannot run here: {reason}')
        if q.dtype == torch.float64:
            raise TypeError('q must be float16, bfloat16 or float32 for backend="triton", got torch.float64')
    if backend == "blocked" and q.device.type not in ("cpu", "meta"):
        raise RuntimeError(f'backend="blocked" runs on the CPU, and q is on {q.device}; "reference" runs anywhere')
    return backend


# --- calls like an earlier one --------------------------------------------------------------------------------


def _key_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Position,
    values: PositionValues,
    is_causal: bool,
    key_start: int | Tensor,
    window: tuple[int | None, int | None],
    scale: float | None,
    backend: str,
) -> Hashable:
    """Return what the checks and the plan follow from of a call that has no other options than these.

    None: not to be remembered. A compiler looks on, an option is a tensor, or the backend takes longer than checks.
    """
    if _resolve_backend(backend, q) != "triton" or not ops.direct(q, k, v, *values[:NUM_POSITIONAL]):
        return None
    if type(key_start) is not int or type(scale) not in (float, type(None)):
        return None
    return ops.plans().call_key(
        (q, k, v, *values[:NUM_POSITIONAL]), "log_attention", is_causal, key_start, window, scale,
        *values[NUM_POSITIONAL:],
        values.theta is not None and values.theta.requires_grad,
        (position.local_heads, position.head_dim) if isinstance(position, LogPosition) else None,
    )  # fmt: skip


# --- checks, and defaults filled in ---------------------------------------------------------------------------


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v in the dtype of autocast, if that is on."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.check_dense(name, x)
    device_type = "cuda" if q.is_cuda else q.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def _check_position(
    position: Position, values: PositionValues, q: Tensor, heads: int, head_dim: int, validate: bool
) -> None:
    """Check that a position and its values fit q."""
    if isinstance(position, LogPosition):
        if position.local_heads != heads:
            shared = "" if position.head_mesh is None else f", {position.local_heads} of them on this rank"
            raise ValueError(f"position was built for num_heads {position.num_heads}{shared}, and q has {heads} heads")
        if position.head_dim != head_dim:
            raise ValueError(f"position was built for head_dim {position.head_dim}, and q has head_dim {head_dim}")
    checks.check_position_values(values, q, heads)
    if not isinstance(position, LogPosition):  # whose values cannot be negative
        checks.check_not_negative(values, validate)


def _context_lengths(
    context_length: int | Tensor | None, values: PositionValues, batch: int, q: Tensor, validate: bool
) -> Tensor | None:
    """Return n of the query gain for each sequence; None where it is the query's position, or nothing gains."""
    if context_length is None:
        return None
    if values.alpha is None:
        checks.resolve_start("context_length", context_length, batch, q, validate)  # refused without a gain, too
        return None
    return checks.per_sequence("context_length", context_length, batch, q, validate)


def _is_positional(values: PositionValues, left: int | None, right: int | None) -> bool:
    """Whether it matters where queries and keys stand."""
    return left is not None or right is not None or any(x is not None for x in values[:NUM_POSITIONAL])
