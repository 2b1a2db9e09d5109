"""Attention over a sequence that lies across processes: context parallelism with a learned position.

**Who holds what.** Each of P ranks holds some tokens of every sequence: their queries, keys and values, and all that a
model computes token by token. The layout says which. ``contiguous`` cuts the sequence into P chunks, one for each rank.
``head-tail`` cuts it into 2P chunks and gives rank r the chunks r and 2P - 1 - r: an early chunk, whose queries see few
keys, and a late one, whose queries see many. Under a causal mask all ranks then have the same work.

**Why chunks merge exactly.** The logit of a query and a key is a formula of their vectors and of their two positions.
It does not depend on which other keys a call was given. Over a chunk c of the keys, attention returns

    lse_c = log sum_{j in c} exp(a_j)        out_c = sum_{j in c} exp(a_j - lse_c) v_j

and over all keys, with the weights w_c = exp(lse_c - lse),

    lse = log sum_c exp(lse_c)               out = sum_c w_c out_c

which is the same sum in another order: :func:`logpe.merge_partials`. Each call is told where its queries and its keys
start, so distances, rotations, masks and the query gain are those of the whole sequence. Whether dropout drops a weight
follows from its two positions and its head, so that any split drops the same weights.

**Gradients.** From the merge, with delta = <dout, out>,

    dout_c = w_c dout                        dlse_c = w_c (<dout, out_c> - delta + dlse)

Given these two, the gradients of a chunk are those of an ordinary call. The backward pass runs that call again, chunk
by chunk, rather than keep its results: memory stays that of one chunk. A key's gradient is the sum over all ranks whose
queries saw it, and its owner adds up what they send. The gradients of power, rate, sharpness and alpha are sums over
all pairs of tokens: every rank gathers the parts of all ranks and adds them in rank order, in float64. All ranks hence
hold the same bits, in every run.

**What is sent when.** First, one small message each, with the arguments: all ranks find out whether the call is good,
and all raise the same error if it is not. Then the method decides:

* ``all-gather``: each rank receives at once all the keys and values that one of its queries may see. The backward pass
  receives them again, and returns their gradients. One call for each chunk of queries; memory for all these keys.
* ``ring``: the same messages in P steps. In step t, rank r computes with the keys of rank r - t while those of rank
  r - t - 1 arrive. Memory for the keys of two ranks beside its own.
* ``heads``: queries, keys and values change from a share of the tokens to a share of the heads; each rank then attends
  over the whole sequence with its own heads and their parameters; the results change back. In the backward
  pass the gradients take the same route.

Keys travel as they are: heads of keys are not repeated for the query heads that share them. With ``all-gather`` and
``ring`` a rank receives only keys that its queries may see: what a window or the causal mask hides from all of them is
neither sent nor computed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from logpe_kernels.options import Options, new_output
from torch import Tensor
from torch.autograd.function import once_differentiable

from logpe import attention, checks, reference
from logpe.distributed import ContextParallel, Exchange, Span, count_tokens, index_of, intersect, union
from logpe.position import LEARNABLE_PARTS, LogPosition, Position, values_of
from logpe.reference import PositionValues


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Where one sequence lies on the axes of queries and keys, and the positions of its first query and key."""

    queries: Span
    keys: Span
    query_start: int
    key_start: int


@functools.lru_cache(maxsize=1024)
def _reach(sequences: tuple[_Sequence, ...], left: int | None, right: int | None, queries: Span) -> list[Span]:
    """Return the keys that one of these queries may see."""
    reached = []
    for s in set(sequences):
        first, end = max(queries[0], s.queries[0]), min(queries[1], s.queries[1])
        nearest, farthest = (token - s.queries[0] + s.query_start for token in (first, end - 1))
        if first >= end or farthest < 0:
            continue
        first_seen = 0 if left is None else max(0, max(nearest, 0) - left)
        offset = s.keys[0] - s.key_start  # from a position to a key
        end_seen = s.keys[1] if right is None else min(s.keys[1], farthest + right + 1 + offset)
        reached.append((max(s.keys[0], first_seen + offset), end_seen))
    return union(reached)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- one call -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """A call on which all ranks agree. Starts are ints, or int32 tensors (B,)."""

    parallel: ContextParallel
    values: PositionValues
    options: dict[str, Any]  # of log_attention, the same for every chunk
    sequences: tuple[_Sequence, ...]
    left: int | None
    right: int | None
    num_queries: int  # of all ranks together, as num_keys
    num_keys: int
    query_start: int | Tensor
    key_start: int | Tensor
    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None  # of all keys
    cu_seqlens: tuple[Tensor, Tensor] | None = None  # of packed sequences, as max_seqlens
    max_seqlens: tuple[int, int] = (0, 0)
    out_dtype: torch.dtype | None = None  # None: that of q

    @property
    def dim(self) -> int:
        """The dimension of the tokens in q, k, v and out; heads are dimension 1."""
        return 2 if self.cu_seqlens is None else 0

    def narrow(self, x: Tensor, first: int, count: int) -> Tensor:
        """Return tokens of q, k, v, out or a gradient of theirs."""
        return x.narrow(self.dim, first, count)

    def gain_options(self, batch: int, device: torch.device) -> Options:
        """Return the options that the query gain of ``batch`` sequences follows from."""
        length, starts = self.options["context_length"], self.query_start
        if isinstance(length, int):
            length = torch.full((batch,), length, device=device)
        return Options(
            alpha=self.values.alpha,
            gain_length=self.values.gain_length,
            query_starts=starts if isinstance(starts, Tensor) else None,
            query_start=0 if isinstance(starts, Tensor) else starts,
            context_lengths=length,
            window_left=self.left,
            cu_seqlens_q=None if self.cu_seqlens is None else self.cu_seqlens[0],
        )

    def no_lse(self, q: Tensor) -> Tensor:
        """Return the lse of queries that see no key."""
        shape = q.shape[:-1] if self.cu_seqlens is None else (q.shape[1], q.shape[0])
        return q.new_full(shape, -math.inf, dtype=_compute_dtype(q))

    def empty(self, x: Tensor, count: int, heads: int | None = None) -> Tensor:
        """Return memory for ``count`` tokens like those of x."""
        shape = list(x.shape)
        shape[self.dim] = count
        shape[1] = shape[1] if heads is None else heads
        return x.new_empty(shape)

    def column(self, lse: Tensor) -> Tensor:
        """Return lse as a column beside out: (B, H, N, 1) or (total, H, 1)."""
        return (lse if self.cu_seqlens is None else lse.mT)[..., None]

    def lse(self, column: Tensor) -> Tensor:
        """Return the lse (B, H, N) or (H, total) that stands in a column."""
        return column[..., 0] if self.cu_seqlens is None else column[..., 0].mT.contiguous()

    def attend(
        self,
        queries: Span,
        keys: Span,
        out_dtype: torch.dtype | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return out, in out_dtype, and lse of these queries over these keys."""
        present = [name for name in LEARNABLE_PARTS if getattr(self.values, name) is not None]
        learnable: dict[str, Any] = dict(zip(present, parameters, strict=True))
        values = self.values._replace(**learnable)
        options = dict(self.options, out_dtype=out_dtype)
        (first, end), (first_key, end_key) = queries, keys
        if self.cu_seqlens is None:
            key_lengths = self.key_lengths
            if key_lengths is not None:
                key_lengths = (key_lengths - first_key).clamp(0, end_key - first_key)
            key_mask = None if self.key_mask is None else self.key_mask[:, first_key:end_key]
            starts = dict(query_start=self.query_start + first, key_start=self.key_start + first_key)
            hidden = dict(key_lengths=key_lengths, key_mask=key_mask)
            return attention.log_attention(q, k, v, values, return_lse=True, **starts, **hidden, **options)
        cu_seqlens_q, cu_seqlens_k = self.cu_seqlens
        lengths = (
            (cu_seqlens_q - first).clamp(0, end - first),
            (cu_seqlens_k - first_key).clamp(0, end_key - first_key),
            min(self.max_seqlens[0], end - first),
            min(self.max_seqlens[1], end_key - first_key),
        )
        starts = dict(
            query_start=self.query_start + (first - cu_seqlens_q[:-1]).clamp(min=0),
            key_start=self.key_start + (first_key - cu_seqlens_k[:-1]).clamp(min=0),
        )
        return attention.log_attention_varlen(q, k, v, values, *lengths, return_lse=True, **starts, **options)


class _Attention(torch.autograd.Function):
    """Attention of this rank's queries, as one of the two plans below has it."""

    @staticmethod
    def forward(ctx: Any, plan: _Chunks | _Heads, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, saved = plan.forward(*inputs)
        ctx.plan, ctx.count = plan, len(saved)
        ctx.save_for_backward(*saved, *inputs[3:])
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
        saved, parameters = tensors[: ctx.count], tensors[ctx.count :]
        needed = ctx.needs_input_grad[1:]
        gradients = ctx.plan.backward(dout, dlse, saved, parameters, needed)
        learned = [n for n, need in enumerate(needed) if need and n >= 3]
        for n, total in zip(learned, ctx.plan.call.parallel.reduce([gradients[n] for n in learned]), strict=True):
            gradients[n] = total.to(parameters[n - 3].dtype)
        return None, *(x if need else None for x, need in zip(gradients, needed, strict=True))


class _Shared(torch.autograd.Function):
    """A tensor with the same values on all ranks, whose gradient is added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, parallel: ContextParallel, x: Tensor) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (total,) = ctx.parallel.reduce([gradient])
        return None, total.to(gradient.dtype)


def _add_gradients(
    totals: Sequence[Tensor],
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    cotangents: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Call ``function`` again, and add the gradients of the inputs that are needed to the totals."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        out, lse = function(*leaves)
    wanted = [n for n, need in enumerate(needed) if need]
    given = cotangents(out.detach(), lse.detach())
    gradients = torch.autograd.grad((out, lse), [leaves[n] for n in wanted], given, materialize_grads=True)
    for n, gradient in zip(wanted, gradients, strict=True):
        totals[n].add_(gradient)


# --- keys come to the queries -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """Keys and values that stand side by side, and the ranks that hold them."""

    span: Span
    k: Tensor
    v: Tensor
    parts: list[tuple[int, Span]]


class _Meeting(NamedTuple):
    """A chunk of queries, and the keys of a run that it sees."""

    chunk: int
    queries: Span
    keys: Span
    rows: Span  # the place of the queries on this rank: first, count
    columns: Span  # the place of the keys in the run


class _Chunks:
    """The methods all-gather and ring: in each step, this rank's queries meet the keys of some ranks."""

    def __init__(self, call: _Call) -> None:
        self.call, self.parallel = call, call.parallel
        parallel, ranks, me = call.parallel, range(call.parallel.size), call.parallel.rank

        def reach(span: Span) -> list[Span]:
            return _reach(call.sequences, call.left, call.right, span)

        self.queries = parallel.spans(call.num_queries)
        self.reach = [reach(span) for span in self.queries]
        self.keys = [parallel.spans(call.num_keys, rank) for rank in ranks]
        self.needs = [union(itertools.chain(*map(reach, parallel.spans(call.num_queries, rank)))) for rank in ranks]
        # In each step: whose keys come here, and to whom this rank's keys go.
        self.steps = [([*ranks], [*ranks])]
        ring = parallel.method == "ring"
        if ring:
            self.steps = [([(me - step) % parallel.size], [(me + step) % parallel.size]) for step in ranks]
        self.merges = ring or any(len(spans) > 1 for spans in self.reach)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return out, lse, and what the backward pass needs."""
        call = self.call
        partials: list[tuple[Tensor, Tensor] | None] = [None] * len(self.queries)
        for runs in self.runs(k, v):
            while runs:  # each is freed before the next ones come
                self.merge(partials, runs.pop(0), q, parameters)
        out, lse = new_output(q, True, v.shape[-1], self.out_dtype(q)), call.no_lse(q)
        row = 0
        for (first, end), partial in zip(self.queries, partials, strict=True):
            if partial is not None:
                call.narrow(out, row, end - first).copy_(partial[0])
                lse.narrow(-1, row, end - first).copy_(partial[1])
            row += end - first
        return out.to(call.out_dtype or q.dtype), lse, (q, k, v, out, lse)

    def merge(
        self, partials: list[tuple[Tensor, Tensor] | None], run: _Run, q: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """Merge what the keys of a run add into out and lse of each chunk of queries."""
        for meeting in self.meetings(run):
            new = self.attend(meeting, *self.inputs(meeting, run, q), *parameters)
            old = partials[meeting.chunk]
            if old is not None:
                new = attention.merge_partials([old[0], new[0]], [old[1], new[1]])
            partials[meeting.chunk] = new

    def out_dtype(self, q: Tensor) -> torch.dtype | None:
        """Return the dtype of a chunk's out, which is not rounded before it is merged."""
        return _compute_dtype(q) if self.merges else self.call.out_dtype

    def attend(self, meeting: _Meeting, q: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse of a chunk of queries over the keys that it meets."""
        return self.call.attend(meeting.queries, meeting.keys, self.out_dtype(q), q, *inputs)

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        saved: Sequence[Tensor],
        parameters: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """Return the gradients of q, k and v, and this rank's part of those of the parameters, in float64."""
        q, k, v, out, lse = saved
        call, me, compute = self.call, self.parallel.rank, _compute_dtype(q)
        dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else dout.to(q.dtype)
        shift = -call.lse((dout.to(compute) * out).sum(-1, keepdim=True))
        if dlse is not None:
            shift = shift + dlse
        dq, dk, dv = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
        totals = [torch.zeros_like(x, dtype=torch.float64) for x in parameters]
        exchange, arriving = Exchange(), list[tuple[Span, list[Tensor]]]()

        def add(span: Span, parts: Sequence[Tensor]) -> None:
            for total, part in zip((dk, dv), parts, strict=True):
                self.own(total, span).add_(part)

        for (sources, targets), runs in zip(self.steps, self.runs(k, v), strict=True):
            parts: dict[tuple[int, Span], list[Tensor]] = {}
            while runs:
                parts |= self.gradients([dq, *totals], runs.pop(0), [q, dout, lse, shift], parameters, needed)
            if not (needed[1] or needed[2]):
                continue
            # The gradients go back the way the keys came, while the next step computes.
            exchange.wait()
            for span, arrived in arriving:
                add(span, arrived)
            sends, receives, arriving = [], [], []
            for source in sources:
                for span in self.pieces(source, me):
                    if source == me:
                        add(span, parts[source, span])
                    else:
                        sends += [(source, x.to(k.dtype)) for x in parts[source, span]]
            for target in targets:
                for span in self.pieces(me, target) if target != me else ():
                    arriving.append((span, [call.empty(x, span[1] - span[0]) for x in (k, v)]))
                    receives += [(target, x) for x in arriving[-1][1]]
            exchange = self.parallel.exchange(sends, receives)
        exchange.wait()
        for span, arrived in arriving:
            add(span, arrived)
        return [*(x.to(q.dtype) for x in (dq, dk, dv)), *totals]

    def gradients(
        self,
        totals: Sequence[Tensor],
        run: _Run,
        of_queries: Sequence[Tensor],
        parameters: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> dict[tuple[int, Span], list[Tensor]]:
        """Return the gradients of a run's k and v, by the rank that holds them and by span.

        Args:
            totals: to these, the gradients of q and of the parameters are added.
            of_queries: q, dout, lse and dlse - delta.
        """
        narrow, (q, dout, lse, shift), (dq, *rest) = self.call.narrow, of_queries, totals
        dk, dv = (torch.zeros_like(x, dtype=_compute_dtype(q)) for x in (run.k, run.v))
        for meeting in self.meetings(run):
            rows, columns = meeting.rows, meeting.columns
            _add_gradients(
                [narrow(dq, *rows), narrow(dk, *columns), narrow(dv, *columns), *rest],
                functools.partial(self.attend, meeting),
                [*self.inputs(meeting, run, q), *parameters],
                needed,
                functools.partial(self.cotangents, narrow(dout, *rows), lse.narrow(-1, *rows), shift.narrow(-1, *rows)),
            )
        return {
            (source, (first, end)): [narrow(x, first - run.span[0], end - first) for x in (dk, dv)]
            for source, (first, end) in run.parts
        }

    def cotangents(
        self, dout: Tensor, lse: Tensor, shift: Tensor, out_c: Tensor, lse_c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of a chunk's out and lse; ``shift`` is dlse - delta."""
        w = torch.exp(lse_c - lse).masked_fill(lse == -math.inf, 0)
        dout_c = self.call.column(w) * dout
        dlse_c = w * shift + self.call.lse((dout_c * out_c).sum(-1, keepdim=True))  # of dout_c before it is rounded
        return dout_c.to(out_c.dtype), dlse_c

    def pieces(self, source: int, target: int) -> list[Span]:
        """Return the keys that ``source`` holds and ``target`` needs, rising."""
        return intersect(self.keys[source], self.needs[target])

    def own(self, x: Tensor, span: Span) -> Tensor:
        """Return some of this rank's own keys."""
        return self.call.narrow(x, index_of(self.keys[self.parallel.rank], span[0]), span[1] - span[0])

    def inputs(self, meeting: _Meeting, run: _Run, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the q, k and v that meet."""
        narrow = self.call.narrow
        return narrow(q, *meeting.rows), narrow(run.k, *meeting.columns), narrow(run.v, *meeting.columns)

    def meetings(self, run: _Run) -> Iterator[_Meeting]:
        """Yield the chunks of queries that see keys of a run."""
        row = 0
        for chunk, (first, end) in enumerate(self.queries):
            for keys in intersect(self.reach[chunk], [run.span]):
                columns = keys[0] - run.span[0], keys[1] - keys[0]
                yield _Meeting(chunk, (first, end), keys, (row, end - first), columns)
            row += end - first

    def runs(self, k: Tensor, v: Tensor) -> Iterator[list[_Run]]:
        """Yield the keys and values of each step, while those of the next one travel."""
        coming = self.fetch(0, k, v)
        for step in range(len(self.steps)):
            pieces, exchange = coming
            if step + 1 < len(self.steps):
                coming = self.fetch(step + 1, k, v)
            exchange.wait()
            runs = self.join(pieces)
            del pieces
            yield runs

    def fetch(self, step: int, k: Tensor, v: Tensor) -> tuple[list[_Run], Exchange]:
        """Start to send and to receive keys and values; return those that come, and this rank's own."""
        call, me = self.call, self.parallel.rank
        sources, targets = self.steps[step]
        sends, receives, pieces = [], [], []
        for target in targets:
            for span in self.pieces(me, target) if target != me else ():
                sends += [(target, self.own(k, span)), (target, self.own(v, span))]
        for source in sources:
            for span in self.pieces(source, me):
                if source == me:
                    piece = _Run(span, self.own(k, span), self.own(v, span), [(me, span)])
                else:
                    count = span[1] - span[0]
                    piece = _Run(span, call.empty(k, count), call.empty(v, count), [(source, span)])
                    receives += [(source, piece.k), (source, piece.v)]
                pieces.append(piece)
        return pieces, self.parallel.exchange(sends, receives)

    def join(self, pieces: list[_Run]) -> list[_Run]:
        """Return the pieces with those that stand side by side in one."""
        runs = []
        for first, end in union(piece.span for piece in pieces):
            inside = sorted((piece for piece in pieces if first <= piece.span[0] < end), key=lambda piece: piece.span)
            if len(inside) == 1:
                runs += inside
                continue
            k, v = (torch.cat([getattr(piece, name) for piece in inside], self.call.dim) for name in ("k", "v"))
            runs.append(_Run((first, end), k, v, [part for piece in inside for part in piece.parts]))
        return runs


# --- tokens change into heads -----------------------------------------------------------------------------------


class _Heads:
    """The method heads: this rank attends over whole sequences, with its share of the heads.

    Query heads are shared out as evenly as they divide, and a rank gets the key heads that its query heads read: one
    that query heads of two ranks read goes to both.
    """

    def __init__(self, call: _Call, num_heads: int, num_kv_heads: int) -> None:
        self.call, self.parallel = call, call.parallel
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        size, group = call.parallel.size, num_heads // num_kv_heads
        self.heads = [(rank * num_heads // size, (rank + 1) * num_heads // size) for rank in range(size)]
        self.kv_heads = [(a // group, (b - 1) // group + 1) if a < b else (0, 0) for a, b in self.heads]
        first, end = self.heads[call.parallel.rank]
        self.kv_head_of = [head // group - first // group for head in range(first, end)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return out, lse, and what the backward pass needs."""
        call = self.call
        whole = [
            *self.by_heads([q], call.num_queries, self.heads),
            *self.by_heads([k, v], call.num_keys, self.kv_heads),
        ]
        if self.kv_head_of:
            out, lse = self.attend(*whole, *parameters)
        else:
            out, lse = new_output(whole[0], False, v.shape[-1], call.out_dtype), call.no_lse(whole[0])
        out, column = self.by_tokens([out, call.column(lse)], call.num_queries, self.heads, self.num_heads)
        return out, call.lse(column), tuple(whole)

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        saved: Sequence[Tensor],
        parameters: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """Return the gradients of q, k and v, and this rank's part of those of the parameters, in float64."""
        call, (q, _, v) = self.call, saved
        local = call.empty(q, count_tokens(self.parallel.spans(call.num_queries)), self.num_heads)
        local = new_output(local, False, v.shape[-1], call.out_dtype)
        if dout is None:
            dout = torch.zeros_like(local)
        if dlse is None:
            dlse = torch.zeros_like(call.no_lse(local))
        whole_dout, column = self.by_heads([dout, call.column(dlse)], call.num_queries, self.heads)
        gradients = [torch.zeros_like(x) for x in saved]
        totals = [torch.zeros_like(x, dtype=torch.float64) for x in parameters]
        if self.kv_head_of:
            cotangents = whole_dout, call.lse(column)
            _add_gradients([*gradients, *totals], self.attend, [*saved, *parameters], needed, lambda *_: cotangents)
        dq, dk, dv = gradients
        (dq,) = self.by_tokens([dq], call.num_queries, self.heads, self.num_heads) if needed[0] else (dq,)
        if needed[1] or needed[2]:
            dk, dv = self.by_tokens([dk, dv], call.num_keys, self.kv_heads, self.num_kv_heads)
        return [dq, dk, dv, *totals]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse of this rank's heads."""
        own = slice(*self.heads[self.parallel.rank])
        heads, kv_heads = len(self.kv_head_of), k.shape[1]
        if self.kv_head_of != [head * kv_heads // heads for head in range(heads)] or heads % kv_heads:
            k, v = k[:, self.kv_head_of], v[:, self.kv_head_of]  # not the same number of query heads for each key head
        spans = (0, self.call.num_queries), (0, self.call.num_keys)
        return self.call.attend(*spans, self.call.out_dtype, q, k, v, *(x[own] for x in parameters))

    def by_heads(self, local: Sequence[Tensor], length: int, heads: Sequence[Span]) -> list[Tensor]:
        """Return this rank's heads of all tokens, from all heads of this rank's tokens."""
        call, parallel = self.call, self.parallel
        first, end = heads[parallel.rank]
        spans = [parallel.spans(length, rank) for rank in range(parallel.size)]
        parts = [[call.empty(x, count_tokens(held), end - first) for x in local] for held in spans]
        parts[parallel.rank] = [x[:, first:end] for x in local]
        self.swap([[x[:, slice(*theirs)] for x in local] for theirs in heads], parts)
        whole = [call.empty(x, length, end - first) for x in local]
        for held, part in zip(spans, parts, strict=True):
            for x, y in zip(whole, part, strict=True):
                for a, b in held:
                    call.narrow(x, a, b - a).copy_(call.narrow(y, index_of(held, a), b - a))
        return whole

    def by_tokens(self, whole: Sequence[Tensor], length: int, heads: Sequence[Span], num_heads: int) -> list[Tensor]:
        """Return all heads of this rank's tokens, from this rank's heads of all; what heads share is added up."""
        call, parallel = self.call, self.parallel
        spans = [parallel.spans(length, rank) for rank in range(parallel.size)]
        count = count_tokens(spans[parallel.rank])
        parts = [[call.empty(x, count, end - first) for x in whole] for first, end in heads]
        theirs = [
            [torch.cat([call.narrow(x, 0, 0), *(call.narrow(x, a, b - a) for a, b in held)], call.dim) for x in whole]
            for held in spans
        ]
        parts[parallel.rank] = theirs[parallel.rank]
        self.swap(theirs, parts)
        local = [call.empty(x, count, num_heads).zero_().to(_compute_dtype(x)) for x in whole]
        for (first, end), part in zip(heads, parts, strict=True):
            for x, y in zip(local, part, strict=True):
                x[:, first:end] += y
        return [x.to(like.dtype) for x, like in zip(local, whole, strict=True)]

    def swap(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> None:
        """Send to each other rank its tensors, and receive those that it sends."""
        others = [rank for rank in range(self.parallel.size) if rank != self.parallel.rank]
        self.parallel.exchange(
            [(rank, x) for rank in others for x in outgoing[rank]],
            [(rank, x) for rank in others for x in incoming[rank]],
        ).wait()


# --- what log_attention hands over ------------------------------------------------------------------------------


@torch.compiler.disable
def attend(
    parallel: ContextParallel, q: Tensor, k: Tensor, v: Tensor, position: Position, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's queries.

    Args:
        q, k, v: this rank's tokens, as :func:`logpe.log_attention` or, packed, :func:`logpe.log_attention_varlen`
            take them.
        options: all other arguments of the one or the other, by name. They are those of the whole sequences.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank alike, where one of them has a bad argument or they disagree.
    """
    if not isinstance(parallel, ContextParallel):
        raise TypeError(f"context_parallel must be a ContextParallel or None, got {type(parallel).__name__}")
    mine = functools.partial(_Arguments, parallel, q, k, v, position, options)
    resolved: list[_Arguments] = []

    def describe() -> tuple[dict[str, Any], Any]:
        resolved.append(mine())
        return resolved[0].same, resolved[0].own

    everyone = parallel.agree(describe)
    (arguments,) = resolved
    num_queries = sum(parallel.check_counts("q", [theirs["queries"] for theirs in everyone]))
    num_keys = sum(parallel.check_counts("k", [theirs["keys"] for theirs in everyone]))
    parallel.check_close([theirs["values"] for theirs in everyone])
    if arguments.seed is not None:
        arguments.seed = torch.full_like(arguments.seed, everyone[0]["seed"])
    call = arguments.call(num_queries, num_keys)
    q, k, v = arguments.q, arguments.k, arguments.v
    plan = _Heads(call, q.shape[1], k.shape[1]) if parallel.method == "heads" else _Chunks(call)
    sink = options["sink"]
    if sink is None:
        return _Attention.apply(plan, q, k, v, *arguments.parameters)
    call.out_dtype = checks.resolve_out_dtype(_compute_dtype(q), q)  # what the sink scales is not rounded before
    out, lse = _Attention.apply(plan, q, k, v, *arguments.parameters)
    gain = call.gain_options(len(arguments.key_starts), q.device)
    if gain.alpha is not None:
        gain = gain._replace(alpha=_Shared.apply(parallel, gain.alpha))
    out, lse = reference.add_sink(out, lse, sink, gain, parallel.positions(num_queries, q.device))
    return out.to(arguments.out_dtype or q.dtype), lse


class _Arguments:
    """The arguments of one rank, checked as far as one rank can check them. Integers per sequence are lists."""

    def __init__(
        self,
        parallel: ContextParallel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Position,
        options: dict[str, Any],
    ) -> None:
        self.parallel, self.given = parallel, options
        self.q, self.k, self.v = q, k, v = attention.autocast(q, k, v)
        self.packed = "cu_seqlens_q" in options
        (batch, *_), *_ = checks.check_tensors(3 if self.packed else 4, q=q, k=k, v=v)
        if options.get("block_table") is not None:
            raise ValueError("block_table must be None with context_parallel: pages lie in one process")
        self.key_mask: Tensor | None = None
        if options.get("key_mask") is not None:
            self.key_mask = checks.resolve_key_mask(options["key_mask"], batch, k.shape[2], q, True)
        self.values = values = values_of(position, q)
        self.parameters = [x for name in LEARNABLE_PARTS if (x := getattr(values, name)) is not None]
        self.out_dtype = checks.resolve_out_dtype(options["out_dtype"], q)
        sink = options["sink"]
        if sink is not None:
            checks.check_sink(sink, (q.shape[1], batch) if self.packed else tuple(q.shape[:3]), q, options["validate"])
        dropout_p, self.seed = checks.resolve_dropout(options["dropout_p"], options["dropout_seed"], q)
        if dropout_p and parallel.method == "heads":
            raise ValueError(
                f'dropout_p must be 0 with context_parallel of method "heads", got {dropout_p}: "all-gather" '
                'and "ring" drop weights as one process does'
            )
        self.options = {name: options[name] for name in ("is_causal", "window", "scale", "backend", "validate")}
        self.options["dropout_p"] = dropout_p
        # What is wrong with the rest shows on no tokens at all.
        trial = dict(self.options, dropout_seed=self.seed, key_start=options["key_start"])
        trial["context_length"] = options["context_length"]
        trial["query_start"] = 0 if options["query_start"] is None else options["query_start"]
        named = position if isinstance(position, LogPosition) else values
        self.max_seqlens = 0, 0
        self.cu_seqlens: tuple[Tensor, Tensor] | None = None
        self.bounds: tuple[list[int], list[int]] | None = None
        self.key_lengths: list[int] | None = None
        with torch.no_grad():
            if self.packed:
                cu_seqlens_q, longest_q = self.lengths("q")
                cu_seqlens_k, longest_k = self.lengths("k")
                none = torch.zeros_like(cu_seqlens_q), torch.zeros_like(cu_seqlens_k), 0, 0
                attention.log_attention_varlen(q[:0], k[:0], v[:0], named, *none, **trial)
                self.cu_seqlens, self.max_seqlens = (cu_seqlens_q, cu_seqlens_k), (longest_q, longest_k)
                self.bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
                batch = len(cu_seqlens_q) - 1
            else:
                attention.log_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], named, **trial)
                if options["key_lengths"] is not None:
                    key_lengths = checks.check_int_tensor(
                        "key_lengths", options["key_lengths"], batch, q, True, low=0, high=checks.MAX_POSITION
                    )
                    self.key_lengths = key_lengths.tolist()

        def listed(x: int | Tensor) -> list[int]:
            return x.tolist() if isinstance(x, Tensor) else [int(x)] * batch

        self.left, self.right = checks.resolve_window(options["window"], options["is_causal"])
        self.key_starts = listed(options["key_start"])
        self.query_starts = self.context_lengths = None
        if options["query_start"] is not None:
            self.query_starts = listed(options["query_start"])
        if options["context_length"] is not None and values.alpha is not None:
            self.context_lengths = listed(options["context_length"])

    def lengths(self, axis: str) -> tuple[Tensor, int]:
        """Return cu_seqlens and max_seqlen of an axis, "q" or "k"."""
        longest = checks.check_max_seqlen(f"max_seqlen_{axis}", self.given[f"max_seqlen_{axis}"])
        endless = self.q.new_empty(1, 1, 1).expand(checks.MAX_POSITION, 1, 1)  # how many tokens: known later
        return checks.check_cu_seqlens(axis, self.given[f"cu_seqlens_{axis}"], endless, longest, True), longest

    @property
    def same(self) -> dict[str, Any]:
        """What must be the same on all ranks, by the name that an error gives it."""
        q, parallel, values = self.q, self.parallel, self.values
        learned = [
            name
            for name in ("q", "k", "v", *(f"position.{name}" for name in LEARNABLE_PARTS))
            if torch.is_grad_enabled()
            and (x := getattr(self if "." not in name else values, name.rpartition(".")[2])) is not None
            and x.requires_grad
        ]
        heads = [x.shape[1] for x in (q, self.k)]
        return {
            "layout, method and reduction of context_parallel": (parallel.layout, parallel.method, parallel.reduction),
            "the choice between log_attention and log_attention_varlen": self.packed,
            "batch size, heads and key heads": (None if self.packed else q.shape[0], *heads),
            "head_dim of q and of v": (q.shape[-1], self.v.shape[-1]),
            "dtype and kind of device of q": (str(q.dtype), q.device.type),
            "what requires a gradient": learned,
            "the parts of position": [name for name, x in zip(values._fields, values, strict=True) if x is not None],
            "position.rotary_scale": values.rotary_scale,
            "position.gain_length": values.gain_length,
            "window, with is_causal": (self.left, self.right, bool(self.options["is_causal"])),
            "scale": checks.resolve_scale(self.options["scale"], q.shape[-1]),
            "dropout_p": self.options["dropout_p"],
            "dropout_seed": None if self.given["dropout_seed"] is None or self.seed is None else int(self.seed),
            "query_start": self.query_starts,
            "key_start": self.key_starts,
            "key_lengths": self.key_lengths,
            "the use of key_mask": self.key_mask is not None,
            "the use of sink": self.given["sink"] is not None,
            "context_length": self.context_lengths,
            "cu_seqlens_q and cu_seqlens_k": self.bounds,
            "max_seqlen_q and max_seqlen_k": self.max_seqlens,
            "out_dtype": None if self.out_dtype is None else str(self.out_dtype),
            "backend": self.options["backend"],
        }

    @property
    def own(self) -> dict[str, Any]:
        """What may differ between ranks."""
        dim = 0 if self.packed else 2
        seed = None if self.seed is None else int(self.seed)
        tensors = {f"position.{name}": x for name, x in self.values._asdict().items() if isinstance(x, Tensor)}
        readable = (checks.readable(x, self.options["validate"]) for x in tensors.values())
        values = {name: x.tolist() for name, x in tensors.items()} if all(readable) else {}
        return {"queries": self.q.shape[dim], "keys": self.k.shape[dim], "seed": seed, "values": values}

    def call(self, num_queries: int, num_keys: int) -> _Call:
        """Return the call on sequences of these lengths, with defaults filled in as log_attention has them.

        Raises ValueError, on every rank alike, where an argument does not fit the lengths.
        """
        is_causal, key_starts = bool(self.options["is_causal"]), self.key_starts
        values, count = self.values, len(key_starts)
        positional = any(
            x is not None for x in (self.left, self.right, values.power, values.rate, values.alpha, values.theta)
        )
        if self.bounds is None:
            queries, keys = [(0, num_queries)] * count, [(0, num_keys)] * count
            if self.key_lengths is not None:
                if self.key_lengths and max(self.key_lengths) > num_keys:
                    raise ValueError(f"key_lengths must be from 0 to {num_keys}, got {max(self.key_lengths)}")
                keys = [(0, length) for length in self.key_lengths]
            unclear = num_queries != num_keys and (not is_causal or self.key_lengths is not None)
            offsets = [num_keys - num_queries] * count
        else:
            for axis, bounds, total in zip("qk", self.bounds, (num_queries, num_keys), strict=True):
                if bounds[-1] > total:
                    raise ValueError(
                        f"cu_seqlens_{axis} must end at or before the {total} tokens of all ranks, got {bounds[-1]}"
                    )
            queries, keys = (list(itertools.pairwise(bounds)) for bounds in self.bounds)
            offsets = [(d - c) - (b - a) for (a, b), (c, d) in zip(queries, keys, strict=True)]
            unclear = any(offsets) and not is_causal
        query_starts = self.query_starts
        if query_starts is None:
            if positional and unclear:
                raise ValueError(
                    "query_start is required for different numbers of queries and keys without is_causal or with "
                    "key_lengths: the position of the first query, on the axis of the keys"
                )
            query_starts = [a + b if positional else a for a, b in zip(key_starts, offsets, strict=True)]
        context_lengths = self.context_lengths
        if context_lengths is None and values.alpha is not None and not is_causal:
            context_lengths = [end - first + start for (first, end), start in zip(keys, key_starts, strict=True)]

        def vector(x: list[int]) -> Tensor:
            return torch.tensor(x, dtype=torch.int32, device=self.q.device)

        def start(x: list[int]) -> int | Tensor:
            return vector(x) if len(set(x)) > 1 else x[0] if x else 0

        return _Call(
            self.parallel,
            values,
            dict(
                self.options,
                dropout_seed=self.seed,
                context_length=None if context_lengths is None else start(context_lengths),
            ),
            tuple(dict.fromkeys(map(_Sequence, queries, keys, query_starts, key_starts))),
            self.left,
            self.right,
            num_queries,
            num_keys,
            start(query_starts),
            start(key_starts),
            None if self.key_lengths is None else vector(self.key_lengths),
            None if self.key_mask is None else self.parallel.gather(self.key_mask, 1, num_keys),
            self.cu_seqlens,
            self.max_seqlens,
            self.out_dtype,
        )
