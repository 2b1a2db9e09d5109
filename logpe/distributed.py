"""The processes among which the tokens of a sequence are shared out, and what they say to each other.

How they attend together stands in :mod:`logpe.context_parallel`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from logpe import checks
from logpe.attention import merge_partials

LAYOUTS = ("head-tail", "contiguous")
METHODS = ("all-gather", "ring", "heads")
REDUCTIONS = ("sum", "mean")
_ERRORS = {error.__name__: error for error in (TypeError, ValueError, RuntimeError, NotImplementedError)}
Span = tuple[int, int]  # tokens from the first to before the second


class ContextParallel:
    """How the tokens of a sequence lie across the processes of a group, and how these attend together.

    Every rank calls the same functions in the same order, those without tokens included, and runs the backward pass
    of what it gets::

        cp = logpe.ContextParallel(mesh["context"])
        x, labels = cp.shard(tokens, 1), cp.shard(targets, 1)      # this rank's tokens
        out = logpe.log_attention(q, k, v, position, is_causal=True, context_parallel=cp)

    **Whose gradient is whose.** The loss of all is the sum of the losses of the ranks. After the backward pass, the
    gradient of an ordinary weight on a rank is the part that came through this rank's tokens: sum it over the context
    ranks, as DDP and FSDP do. The gradients of power, rate, sharpness and alpha, and so of the raw parameters behind
    them, are *already* summed, with the same bits on every rank. Do not sum them again:

    * DDP or FSDP2 over the flattened mesh of data x context divides by the number of all ranks, and so makes the mean
      over the context out of the ordinary weights' parts. Use ``reduction="mean"``, with which a position's gradients
      are divided by the number of context ranks: the average of equal copies then leaves them as they are, and every
      gradient is that of the mean of the ranks' losses. For the mean over all tokens, where ranks hold different
      numbers of them, let each rank's loss be size * (sum over its tokens) / (tokens of the whole sequence).
    * Where data parallelism averages over the data dimension alone, sum the ordinary weights' gradients over the
      context yourself, and leave the position's as they are: ``reduction="sum"``.

    Args:
        mesh: a one-dimensional DeviceMesh, such as one dimension of a larger one, ``mesh["context"]``; or a
            ProcessGroup.
        layout: "head-tail" or "contiguous", see :mod:`logpe.context_parallel`.
        method: "all-gather", "ring" or "heads", see there. "heads" does not support dropout, which depends on the
            index of a head.
        reduction: of the gradients of a position's parameters, "sum" or "mean" over the ranks.

    Attributes:
        group: the ProcessGroup. rank, size: this process in it, and their number.

    Raises:
        TypeError, ValueError: a bad argument, named, with what is allowed.
    """

    def __init__(
        self, mesh: Any, *, layout: str = "head-tail", method: str = "all-gather", reduction: str = "sum"
    ) -> None:
        for name, value, allowed in (
            ("layout", layout, LAYOUTS),
            ("method", method, METHODS),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(mesh, dist.ProcessGroup):
            group = mesh
        elif isinstance(mesh, dist.DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(
                    f'mesh must have one dimension, got {mesh.ndim}: pass one of a larger mesh, as in mesh["context"]'
                )
            group = mesh.get_group()
        elif mesh is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("mesh must be a group that this process belongs to, got another one")
        else:
            raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
        self.group, self.layout, self.method, self.reduction = group, layout, method, reduction
        self.rank, self.size = group.rank(), group.size()

    def __repr__(self) -> str:
        return (
            f"ContextParallel(rank {self.rank} of {self.size}, layout={self.layout!r}, method={self.method!r}, "
            f"reduction={self.reduction!r})"
        )

    def __deepcopy__(self, memo: Any) -> ContextParallel:
        return self  # processes are not copied along with a model

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ContextParallel cannot be pickled: save the state_dict of a model that holds one")

    # --- who holds which tokens

    def spans(self, length: int, rank: int | None = None) -> list[Span]:
        """Return the tokens that a rank (by default this one) holds, as (first, end), rising, none empty or adjacent.

        A rank holds them in this order. ``length`` is that of the whole sequence.
        """
        rank = self.rank if rank is None else rank
        if self.layout == "contiguous":
            chunks, mine = self.size, [rank]
        else:
            chunks, mine = 2 * self.size, [rank, 2 * self.size - 1 - rank]
        return union((c * length // chunks, (c + 1) * length // chunks) for c in mine)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Return the positions of this rank's tokens in a sequence of ``length`` tokens, int64 (n,), rising."""
        parts = [torch.arange(*span, device=device) for span in self.spans(length)]
        return torch.cat([torch.arange(0, device=device), *parts])

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's tokens of a whole tensor, along ``dim``: a new tensor, differentiable in x.

        Any length: ranks may get different numbers of tokens, or none.
        """
        parts = [x.narrow(dim, first, end - first) for first, end in self.spans(x.shape[dim])]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).contiguous()

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """Return the whole tensor of which each rank holds what :meth:`shard` gave it. Without a gradient.

        Raises:
            TypeError: x is not a dense tensor.
            ValueError: the numbers of tokens are not those that :meth:`shard` gives, or dtypes or other sizes differ.
                Both are raised on every rank alike.
        """

        def describe() -> tuple[dict[str, Any], int]:
            checks.check_dense("x", x)
            axis = range(x.dim())[dim]
            others = [size for n, size in enumerate(x.shape) if n != axis]
            return {"dtype of x": str(x.dtype), "other sizes of x": others, "dim": axis}, x.shape[axis]

        length = sum(self.check_counts("x", self.agree(describe)))
        return self.gather(x.detach(), dim % x.dim(), length)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Do what :meth:`unshard` does, for a ``dim`` and a ``length`` on which all ranks already agree."""
        spans = [self.spans(length, rank) for rank in range(self.size)]
        parts = [x.new_empty([count_tokens(held) if n == dim else m for n, m in enumerate(x.shape)]) for held in spans]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.exchange([(rank, x) for rank in others], [(rank, parts[rank]) for rank in others]).wait()
        parts[self.rank] = x
        whole = x.new_empty([length if n == dim else m for n, m in enumerate(x.shape)])
        for held, part in zip(spans, parts, strict=True):
            for first, end in held:
                whole.narrow(dim, first, end - first).copy_(part.narrow(dim, index_of(held, first), end - first))
        return whole

    # --- what the ranks say to each other

    def agree(self, describe: Callable[[], tuple[dict[str, Any], Any]]) -> list[Any]:
        """Call ``describe`` on every rank, and raise on all alike where one raises, or where they disagree.

        Args:
            describe: returns what must be the same on all ranks, by name, and what may differ: plain values.

        Returns:
            What may differ, of each rank.
        """
        error: Exception | None = None
        same: dict[str, Any] = {}
        own = None
        try:
            same, own = describe()
        except Exception as caught:
            error = caught
        mine = (None if error is None else (type(error).__name__, str(error)), same, own)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        for rank, (failure, _, _) in enumerate(everyone):
            if failure is not None:
                name, message = failure
                raise _agreed(_ERRORS.get(name, RuntimeError)(f"{message} (on rank {rank} of {self.size})")) from error
        expected = everyone[0][1]
        for rank, (_, values, _) in enumerate(everyone):
            for name in {**expected, **values}:  # in the same order on all ranks, unlike a set of strings
                if expected.get(name) != values.get(name):
                    message = f"{expected.get(name)} on rank 0 and {values.get(name)} on rank {rank}"
                    raise _agreed(ValueError(f"{name} must be the same on all ranks, got {message}"))
        return [theirs for _, _, theirs in everyone]

    def check_counts(self, name: str, counts: Sequence[int]) -> Sequence[int]:
        """Return the numbers of tokens on each rank; raise ValueError unless they are those of :meth:`shard`."""
        length = sum(counts)
        for rank, count in enumerate(counts):
            expected = count_tokens(self.spans(length, rank))
            if count != expected:
                message = (
                    f"{expected} of {length} on rank {rank} of {self.size} with layout {self.layout!r}, got {count}"
                )
                raise _agreed(ValueError(f"{name} must hold the tokens that shard() gives to each rank: {message}"))
        return counts

    def check_close(self, values: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Raise ValueError where named numbers differ between ranks by more than rounding can."""
        for rank, theirs in enumerate(values):
            for name, numbers in theirs.items():
                for index, (first, other) in enumerate(zip(values[0].get(name, numbers), numbers, strict=True)):
                    if not math.isclose(first, other, rel_tol=1e-3, abs_tol=1e-6):
                        message = f"element {index} is {first:g} on rank 0 and {other:g} on rank {rank}"
                        raise _agreed(ValueError(f"{name} must be the same on all ranks, got values whose {message}"))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of this rank, inside of the block, be that of all ranks at their next agreement.

        What a rank checks before it calls :func:`logpe.log_attention` belongs into such a block.
        """
        try:
            yield
        except Exception as error:
            if not hasattr(error, "agreed"):
                self.agree(functools.partial(_raise, error))
            raise

    def exchange(self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> Exchange:
        """Start to send tensors to ranks of the group and to receive into contiguous ones; empty ones are left out.

        Between two ranks, tensors arrive in the order in which they are sent.
        """
        out = [(rank, x.contiguous()) for rank, x in sends if x.numel()]
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=rank) for rank, x in out]
        operations += [
            dist.P2POp(dist.irecv, x, group=self.group, group_peer=rank) for rank, x in receives if x.numel()
        ]
        return Exchange(dist.batch_isend_irecv(operations) if operations else [], operations)

    def merge(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return out (B, H, N, Dv) and lse (B, H, N) over the keys of all ranks, from those over this rank's, in parts.

        out and lse are both float32, or both float64. The same bits on every rank. Without a gradient.
        """
        mine = merge_partials(*zip(*parts, strict=True))
        packed = torch.cat([mine[0], mine[1][..., None]], -1).contiguous()
        everyone = [torch.empty_like(packed) for _ in range(self.size)]
        dist.all_gather(everyone, packed, group=self.group)
        return merge_partials([x[..., :-1] for x in everyone], [x[..., -1] for x in everyone])

    def reduce(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums, or means, over the ranks of tensors of equal shape, added in rank order in float64."""
        if not gradients:
            return []
        mine = torch.stack([x.double() for x in gradients])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        total = functools.reduce(torch.add, everyone)
        if self.reduction == "mean":
            total = total / self.size
        return list(total)


def _agreed(error: Exception) -> Exception:
    """Mark an error that all ranks raise."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _raise(error: Exception) -> NoReturn:
    raise error


@dataclasses.dataclass
class Exchange:
    """Tensors on their way. They must stay until :meth:`wait` returns."""

    works: Sequence[Any] = ()
    operations: Sequence[Any] = ()

    def wait(self) -> None:
        """Wait until all have been received, and may be read, and all sent, and may be written."""
        for work in self.works:
            work.wait()
        self.works = self.operations = ()


# --- spans of tokens ------------------------------------------------------------------------------------------


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the same tokens as spans that rise and do not touch."""
    merged: list[Span] = []
    for first, end in sorted(spans):
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


def intersect(some: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Return the intersections of each span with each other one."""
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return [(first, end) for first, end in pairs if first < end]


def index_of(spans: Sequence[Span], token: int) -> int:
    """Return where a token lies among those of ``spans``."""
    index = 0
    for first, end in spans:
        if first <= token < end:
            return index + token - first
        index += end - first
    raise AssertionError(f"no rank's token: {token}")


def count_tokens(spans: Iterable[Span]) -> int:
    """Return the number of tokens."""
    return sum(end - first for first, end in spans)
