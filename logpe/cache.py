"""Caches of keys and values for generation: preallocated, or in pages that sequences take as they grow.

A cache belongs to one attention layer and knows its position. It rotates each key once, as it comes in, since a
rotation depends only on where a key stands. Every token keeps the position at which it came, whatever the cache has
dropped since. What a cache holds is part of no autograd graph.

Lengths are counted twice. The count on the host tells whether there is room, without waiting for a GPU. The count in a
tensor is what attention reads, so that a step can be compiled or captured in a CUDA graph; a replay moves the tensor
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from logpe_kernels.options import Options
from torch import Tensor

from logpe.attention import autocast, log_attention, rotate
from logpe.checks import PAGE_SIZES, check_dense, check_sink, per_sequence, plain_int
from logpe.distributed import ContextParallel
from logpe.position import LogPosition, Position
from logpe.reference import PositionValues, add_sink


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class KVCache:
    """A preallocated cache of ``capacity`` tokens for each sequence.

        cache = logpe.KVCache(batch_size, num_kv_heads, capacity, head_dim, position, dtype=q.dtype, device=q.device)
        out = cache.attend(q, k, v)    # the prompt, then token by token

    Under torch.compile, pass the cache to the compiled function as an argument. As the attribute of a module it would
    compile anew at every step, because a module's ints are constants there.

    Args:
        batch_size: sequences, B.
        num_kv_heads: key heads, Hkv.
        capacity: most tokens of a sequence.
        head_dim: size of one head, D.
        position: position of the layer, a :class:`LogPosition` or the values it returns; None is plain attention.
        window: a query sees itself and this many tokens before it; None is unlimited.
        key_start: position of the first token, an int or an int tensor (B,). Tokens at negative positions do not
            exist, which is how to describe left padding: ``-padding``.
        value_dim: size of one head of the values, Dv; by default head_dim.
        dtype, device: those of the keys and values; torch's defaults.
        context_parallel: let the cache of one long prompt lie across processes, ``capacity`` tokens of it on each. The
            first call of ``attend`` then takes this rank's tokens of the prompt, as ``context_parallel.shard`` gives
            them. Later calls take the next tokens, the same on every rank, and return the same bits on every rank: each
            attends over the keys that it holds, and the results are merged by lse, without a gradient. One rank after
            another stores new tokens. All sequences have the same number of tokens; see ``key_start`` for padding.

    Attributes (none can be assigned: append, crop, reset and reorder change what a cache holds):
        k, v: (B, Hkv, capacity, D) and (B, Hkv, capacity, Dv), the keys rotated.
        lengths: int32 (B,), tokens appended to each sequence; a copy.

    Raises:
        TypeError, ValueError: a bad argument, named.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        position: Position = None,
        *,
        window: int | None = None,
        key_start: int | Tensor = 0,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> None:
        if context_parallel is not None and not isinstance(context_parallel, ContextParallel):
            name = type(context_parallel).__name__
            raise TypeError(f"context_parallel must be a ContextParallel or None, got {name}")
        self.context_parallel = context_parallel
        self._placed: list[tuple[int, int, int]] = []  # rank, first token and number of tokens, rising on each rank
        self.batch_size = plain_int("batch_size", batch_size)
        self.num_kv_heads = num_kv_heads = plain_int("num_kv_heads", num_kv_heads)
        self.capacity = plain_int("capacity", capacity)
        self.head_dim = head_dim = plain_int("head_dim", head_dim)
        self.value_dim = head_dim if value_dim is None else plain_int("value_dim", value_dim)
        if window is not None and (not _is_int(window) or window < 0):
            raise ValueError(f"window must be an int of at least 0 or None, got {window!r}")
        if position is not None and not isinstance(position, LogPosition | PositionValues):
            raise TypeError(f"position must be a LogPosition, PositionValues or None, got {type(position).__name__}")
        if isinstance(position, LogPosition):
            if position.head_dim != head_dim:
                raise ValueError(f"head_dim must be that of the position, {position.head_dim}, got {head_dim}")
            if position.local_heads % num_kv_heads:
                raise ValueError(
                    f"num_kv_heads must divide the heads of the position, {position.local_heads}, got {num_kv_heads}"
                )
        self.position, self.window = position, window
        self._lengths = torch.zeros(self.batch_size, dtype=torch.int32, device=device)
        self._key_start = torch.zeros_like(self._lengths)
        self._set_start(key_start)
        self._host_lengths = [0] * self.batch_size
        self._allocate(dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and hasattr(self, name):
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be assigned: append, crop, reset and reorder change what it "
                "holds, and everything else needs a new one"
            )
        super().__setattr__(name, value)

    @property
    def lengths(self) -> Tensor:
        """A copy of the numbers of tokens appended to each sequence, int32 (B,)."""
        return self._lengths.clone()

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Add the next tokens of each sequence, and return the position of the first of them, int32 (B,).

        Args:
            k, v: (B, Hkv, N, D) and (B, Hkv, N, Dv), the keys not rotated.
            lengths: B ints, or a tensor of them, which is read back from a GPU: how many of the N tokens belong to
                each sequence, the rest being right padding. By default all do.

        Raises:
            TypeError, ValueError: a bad argument, or no room. The cache is left as it was.
        """
        if self.context_parallel is not None:
            raise ValueError("append must not be called with context_parallel: attend stores tokens, too")
        counts = self._check_tokens(k, v, lengths)
        ends = [length + count for length, count in zip(self._host_lengths, counts, strict=True)]
        with torch.no_grad():
            first = self._key_start + self._lengths
            k = rotate(k, self.position, first)
            self._reserve(ends)
            if lengths is None:
                b = torch.arange(self.batch_size, device=k.device)[:, None]
                token = torch.arange(k.shape[2], device=k.device)[None]  # (B or 1, N or 1)
                added: int | Tensor = k.shape[2]
            else:
                pairs = [(b, n) for b, count in enumerate(counts) for n in range(count)]
                b, token = torch.tensor(pairs, dtype=torch.int64, device=k.device).view(-1, 2).T
                added = torch.tensor(counts, dtype=torch.int32, device=k.device)
            page, row = self._locate(b, self._lengths[b] + token)
            self.k[page, :, row] = k[b, :, token]
            self.v[page, :, row] = v[b, :, token]
            self._lengths += added
        self._host_lengths = ends
        return first

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        context_length: int | Tensor | None = None,
        sink: Tensor | None = None,
        return_lse: bool = False,
        backend: str = "auto",
        validate: bool = False,
    ) -> Any:
        """Append the next tokens, and return causal attention from them to all tokens so far.

        Args:
            q: (B, Hq, N, D), not rotated. Results for right padding mean nothing.
            k, v, lengths: as in :meth:`append`.
            key_mask: as in :func:`logpe.log_attention`, with one column for each place of the cache.
            scale, context_length, sink, return_lse, backend, validate: as in :func:`logpe.log_attention`.

        Returns:
            out (B, Hq, N, Dv), and lse with ``return_lse``. Differentiable in q and the position, except over pages.

        Raises:
            TypeError, ValueError: a bad argument, or no room. The cache is left as it was.
        """
        held = self._host_lengths
        if self.context_parallel is not None:
            options = dict(scale=scale, context_length=context_length, sink=sink, backend=backend, validate=validate)
            with self.context_parallel.together():
                if lengths is not None or key_mask is not None:
                    name = "key_mask" if lengths is None else "lengths"
                    raise ValueError(f"{name} must be None with context_parallel: key_start says left padding")
                try:
                    result = self._attend_across(self.context_parallel, q, k, v, options)
                except Exception:
                    self._crop(held)
                    raise
            return result if return_lse else result[0]
        self._check_queries(q, k)
        first = self.append(k, v, lengths)
        values = self.position(q.device) if isinstance(self.position, LogPosition) else self.position
        try:
            return log_attention(
                rotate(q, values, first),
                self.k,
                self.v,
                values if values is None else values.unrotated(),
                is_causal=True,
                query_start=first,
                window=(self.window, None),
                key_mask=key_mask,
                scale=scale,
                context_length=context_length,
                sink=sink,
                return_lse=return_lse,
                backend=backend,
                validate=validate,
                **self._keys(),
            )
        except Exception:  # a bad option: take the tokens back
            self._crop(held)
            raise

    def _attend_across(
        self, parallel: ContextParallel, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse, and store the tokens."""
        held, is_prompt = self._host_lengths[0], not self._placed

        def describe() -> tuple[dict[str, Any], int]:
            self._check_queries(q, k)
            self._check_tokens(k, v, None)
            same: dict[str, Any] = {"capacity": self.capacity, "the tokens held": held}
            if not is_prompt:
                same["the number of new tokens"] = k.shape[2]
            return same, k.shape[2]

        counts = parallel.agree(describe)
        if is_prompt:
            counts = list(parallel.check_counts("k", counts))
            placed = [
                (rank, first, end - first)
                for rank in range(parallel.size)
                for first, end in parallel.spans(sum(counts), rank)
            ]
            if max(counts) > self.capacity:
                raise ValueError(
                    f"the cache is full: {max(counts)} tokens on a rank, and its capacity is {self.capacity}"
                )
        else:
            placed = self._place(parallel, held, k.shape[2])
        options |= dict(is_causal=True, window=(self.window, None), return_lse=True)
        result = None
        if is_prompt:
            start = self._key_start
            result = log_attention(
                q, k, v, self.position, query_start=start, key_start=start, context_parallel=parallel, **options
            )
        self._store(parallel, k, v, placed, held)
        self._placed = placed
        self._host_lengths = [sum(count for *_, count in placed)] * self.batch_size
        first = self._key_start + held
        self._lengths.fill_(self._host_lengths[0])
        if result is not None:
            return result
        with torch.no_grad():
            values = self.position(q.device) if isinstance(self.position, LogPosition) else self.position
            q, plain = rotate(q, values, first), values if values is None else values.unrotated()
            own = [(token, count) for rank, token, count in placed if rank == parallel.rank]
            dtype = autocast(q, k, v)[0].dtype
            sink = options.pop("sink")
            if sink is not None:
                check_sink(sink, tuple(q.shape[:3]), q, options["validate"])
            options["out_dtype"] = torch.promote_types(dtype, torch.float32)
            parts: list[Any] = []
            row = 0
            for token, count in own or [(0, 0)]:
                held_k, held_v = (x[:, :, row : row + count] for x in (self.k, self.v))
                starts = dict(query_start=first, key_start=self._key_start + token)
                parts.append(log_attention(q, held_k, held_v, plain, **starts, **options))
                row += count
            out, lse = parallel.merge(parts)
            if sink is not None:
                context = options["context_length"]
                gain = Options(
                    alpha=None if plain is None else plain.alpha,
                    gain_length=1.0 if plain is None else plain.gain_length,
                    query_starts=first,
                    context_lengths=None if context is None else per_sequence("context_length", context, len(q), q),
                    window_left=self.window,
                )
                out, lse = add_sink(out, lse, sink, gain, torch.arange(q.shape[2], device=q.device))
            return out.to(dtype), lse

    def _place(self, parallel: ContextParallel, held: int, count: int) -> list[tuple[int, int, int]]:
        """Return who holds what after ``count`` more tokens: the rank that stored the last one goes on while it can."""
        placed = list(self._placed)
        room = [self.capacity - sum(n for owner, _, n in placed if owner == rank) for rank in range(parallel.size)]
        if count > sum(room):
            raise ValueError(
                f"the cache is full: {held + count} tokens, and its capacity is {self.capacity} on each rank"
            )
        while count > 0:
            last = max(range(len(placed)), key=lambda n: placed[n][1])
            owner, first, number = placed[last]
            if room[owner] > 0:
                taken = min(count, room[owner])
                placed[last] = owner, first, number + taken
            else:
                owner = room.index(max(room))
                taken = min(count, room[owner])
                placed.append((owner, held, taken))
            room[owner] -= taken
            held, count = held + taken, count - taken
        return placed

    @torch.no_grad()
    def _store(
        self, parallel: ContextParallel, k: Tensor, v: Tensor, placed: list[tuple[int, int, int]], held: int
    ) -> None:
        """Write what this rank is to hold of the tokens from ``held`` on; of a prompt, k and v are its own tokens."""
        row, given = 0, 0
        for rank, first, count in placed:
            if rank != parallel.rank:
                continue
            new = max(first, held)
            count_new = first + count - new
            if count_new > 0:
                begin = given if held == 0 else new - held
                place = slice(row + new - first, row + count)
                self.k[:, :, place] = rotate(k[:, :, begin : begin + count_new], self.position, self._key_start + new)
                self.v[:, :, place] = v[:, :, begin : begin + count_new]
                given += count_new
            row += count

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget all tokens after the first ``lengths`` of each sequence, as if they had never come.

        This serves a speculative decoder, which may reject the end of a draft: ``cache.crop(cache.lengths - rejected)``
        drops ``rejected`` tokens, one number or one per sequence.

        Args:
            lengths: an int for all sequences, B ints, or an int tensor (B,), each from 0 to the present length. The
                present lengths are read back from a GPU, and so is a tensor. Negative numbers are refused: they do
                not count from the end, as they do in Transformers' ``DynamicCache.crop``.

        Raises:
            ValueError: bad lengths, or lengths that need tokens which the window has dropped. The lengths before the
                last append are always possible. The cache is left as it was.
        """
        present = self._lengths.tolist()  # not the host's count, which a CUDA graph does not move
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        ends: Any = [given] * self.batch_size if _is_int(given) else given
        valid = isinstance(ends, Sequence) and len(ends) == self.batch_size and all(map(_is_int, ends))
        if not valid or any(not 0 <= end <= length for end, length in zip(ends, present, strict=True)):
            raise ValueError(
                f"lengths must be an int or {self.batch_size} ints from 0 to the present lengths, {present}, "
                f"got {given!r}"
            )
        self._crop(list(ends))

    def reset(self, key_start: int | Tensor = 0) -> None:
        """Forget all tokens; ``key_start``, an int or an int tensor (B,), is the position of the next first token."""
        self._set_start(key_start)
        self._lengths.zero_()
        self._host_lengths = [0] * self.batch_size
        self._placed = []

    def reorder(self, beam_idx: Sequence[int] | Tensor) -> None:
        """Let each sequence b go on from what sequence beam_idx[b] holds.

        Args:
            beam_idx: B ints, or an int tensor (B,), which is read back from a GPU.

        Raises:
            ValueError: a bad beam_idx. The cache is left as it was.
        """
        beam_idx = torch.as_tensor(beam_idx)
        if beam_idx.shape != (self.batch_size,) or beam_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"beam_idx must be int ({self.batch_size},), got {beam_idx.dtype} {tuple(beam_idx.shape)}")
        beams = beam_idx.tolist()
        if any(not 0 <= beam < self.batch_size for beam in beams):
            raise ValueError(f"beam_idx must be from 0 to {self.batch_size - 1}, got {beams}")
        self._share(beams)
        beam_idx = beam_idx.to(self._lengths.device)
        for x in self._per_sequence():
            x.copy_(x[beam_idx])

    # What depends on the layout of the memory.

    def _allocate(self, dtype: torch.dtype | None) -> None:
        self.k, self.v = self._tokens(self.batch_size, self.capacity, dtype)

    def _tokens(self, batch: int, count: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return room for keys and values of ``batch`` times ``count`` tokens.

        It is zero, since the CPU backend multiplies what is hidden by 0, and takes a slower way where that gives NaN.
        """
        shape, device = (batch, self.num_kv_heads, count), self._lengths.device
        k, v = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in (self.head_dim, self.value_dim))
        return k, v

    def _reserve(self, ends: list[int]) -> None:
        """Make room for sequences of these lengths, or raise ValueError and change nothing."""
        if max(ends) > self.capacity:
            raise ValueError(f"the cache is full: {max(ends)} tokens, and its capacity is {self.capacity}")

    def _crop(self, ends: list[int]) -> None:
        """Forget what comes after these lengths, or raise ValueError and change nothing."""
        if self.context_parallel is not None:
            if len(set(ends)) > 1:
                raise ValueError(f"lengths must be the same for all sequences with context_parallel, got {ends}")
            kept = ((rank, first, min(count, ends[0] - first)) for rank, first, count in self._placed)
            self._placed = [(rank, first, count) for rank, first, count in kept if count > 0]
        self._host_lengths = ends
        self._lengths.copy_(torch.tensor(ends, dtype=torch.int32))

    def _locate(self, b: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first index into k and v, and the row there, of tokens of the sequences b."""
        return b, token

    def _keys(self) -> dict[str, Any]:
        """Return the options by which :func:`log_attention` reads k and v."""
        return dict(key_start=self._key_start, key_lengths=self._lengths)

    def _per_sequence(self) -> tuple[Tensor, ...]:
        """Return the tensors whose first dimension is the batch."""
        return self.k, self.v, self._lengths, self._key_start

    def _share(self, beams: list[int]) -> None:
        """Reorder what the host holds."""
        self._host_lengths = [self._host_lengths[beam] for beam in beams]

    # Checks.

    def _set_start(self, key_start: int | Tensor) -> None:
        if isinstance(key_start, Tensor):
            key_start = key_start.to(self._lengths.device)
        self._key_start.copy_(per_sequence("key_start", key_start, self.batch_size, self._lengths))

    def _check_tokens(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        """Check new tokens, and return their number in each sequence."""
        check_dense("k", k)
        check_dense("v", v)
        for name, x, size in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            expected = (self.batch_size, self.num_kv_heads, k.shape[2] if k.dim() == 4 else "N", size)
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
            if x.dtype != self.k.dtype or x.device != self.k.device:
                raise TypeError(f"{name} must be {self.k.dtype} on {self.k.device}, got {x.dtype} on {x.device}")
        if lengths is None:
            return [k.shape[2]] * self.batch_size
        counts = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        valid = isinstance(counts, Sequence) and len(counts) == self.batch_size
        if not valid or any(not _is_int(n) or not 0 <= n <= k.shape[2] for n in counts):
            raise ValueError(f"lengths must be {self.batch_size} ints from 0 to {k.shape[2]}, got {counts}")
        return list(counts)

    def _check_queries(self, q: Tensor, k: Tensor) -> None:
        check_dense("q", q)
        check_dense("k", k)
        valid = q.dim() == 4 and q.shape[1] > 0 and q.shape[1] % self.num_kv_heads == 0
        if not valid or (q.shape[0], q.shape[2], q.shape[3]) != (self.batch_size, k.shape[-2], self.head_dim):
            expected = f"({self.batch_size}, a multiple of {self.num_kv_heads}, {k.shape[-2]}, {self.head_dim})"
            raise ValueError(f"q must have shape {expected}, got {tuple(q.shape)}")
        if isinstance(self.position, LogPosition) and q.shape[1] != self.position.local_heads:
            raise ValueError(f"q must have the heads of the position, {self.position.local_heads}, got {q.shape[1]}")
        if q.dtype != self.k.dtype or q.device != self.k.device:
            raise TypeError(f"q must be {self.k.dtype} on {self.k.device}, got {q.dtype} on {q.device}")


class PagedKVCache(KVCache):
    """A cache in pages, which sequences take from one pool as they grow, and share after :meth:`reorder`.

    With a window, pages that no later query sees go back to the pool, so that a sequence may grow without end.
    ``capacity`` is then the window plus the most new tokens of one step.

    Args:
        page_size: tokens of a page, 16, 32, 64, 128 or 256. Reads are fastest from 64 on.
        num_pages: pages of the pool; by default enough for all sequences to reach the capacity.

    The other arguments are those of :class:`KVCache`. The host assigns pages: append outside of a compiled region.

    Attributes (none can be assigned):
        k, v: (num_pages, Hkv, page_size, D) and (num_pages, Hkv, page_size, Dv), the keys rotated.
        lengths: int32 (B,), tokens appended to each sequence, even if their pages went back; a copy.
        block_table: int32 (B, max_pages), the pages of each sequence in order, then -1; a copy.
    """

    def __init__(self, *args: Any, page_size: int = 64, num_pages: int | None = None, **options: Any) -> None:
        if options.get("context_parallel") is not None:
            raise ValueError("context_parallel must be None for a PagedKVCache: pages lie in one process")
        if not _is_int(page_size) or page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size!r}")
        self.page_size, self._num_pages = page_size, None if num_pages is None else plain_int("num_pages", num_pages)
        super().__init__(*args, **options)

    @property
    def block_table(self) -> Tensor:
        """A copy of the table of pages, int32 (B, max_pages): those of each sequence in order, then -1."""
        return self._block_table.clone()

    def _allocate(self, dtype: torch.dtype | None) -> None:
        if self.window is not None and self.window >= self.capacity:
            raise ValueError(f"capacity must be above the window, {self.window}, got {self.capacity}")
        # A window may need no more than the last token of its oldest page.
        max_pages = -(-self.capacity // self.page_size) + (self.window is not None)
        self.num_pages = self._num_pages or self.batch_size * max_pages
        device = self._lengths.device
        self.k, self.v = self._tokens(self.num_pages, self.page_size, dtype)
        self._block_table = torch.full((self.batch_size, max_pages), -1, dtype=torch.int32, device=device)
        self._dropped = torch.zeros_like(self._lengths)  # tokens whose pages went back
        self._forget()

    def _forget(self) -> None:
        self._host_dropped = [0] * self.batch_size
        self._pages: list[list[int]] = [[] for _ in range(self.batch_size)]
        self._holders = [0] * self.k.shape[0]  # how many sequences hold each page

    def _reserve(self, ends: list[int]) -> None:
        size = self.page_size
        changes: list[tuple[int, int, int, bool]] = []  # sequence, pages to give back, pages to take, last one shared
        for b, (begin, end) in enumerate(zip(self._host_lengths, ends, strict=True)):
            seen = self._first_seen(begin)
            if end - seen > self.capacity:
                raise ValueError(
                    f"the cache is full: {end - seen} tokens"
                    f"{'' if self.window is None else ', those of the window and the new ones'}, "
                    f"and its capacity is {self.capacity}"
                )
            if end > begin:
                dropped_here = self._host_dropped[b]
                unseen, begin, end = (seen - dropped_here) // size, begin - dropped_here, end - dropped_here
                missing = -(-end // size) - len(self._pages[b])
                shared = begin % size > 0 and self._holders[self._pages[b][-1]] > 1
                if unseen or missing or shared:
                    changes.append((b, unseen, missing, shared))
        if not changes:
            return

        # Work on copies, since there may turn out to be too few pages.
        pages, dropped, holders = list(self._pages), list(self._host_dropped), list(self._holders)
        for b, unseen, _, _ in changes:
            for page in pages[b][:unseen]:
                holders[page] -= 1
            pages[b] = pages[b][unseen:]
            dropped[b] += unseen * size
        free = [page for page in reversed(range(len(holders))) if holders[page] == 0]
        copies: list[tuple[int, int]] = []
        for b, _, missing, shared in changes:
            shared = shared and holders[pages[b][-1]] > 1  # unless all others have left it
            if missing + shared > len(free):
                raise ValueError(f"the cache is full: all {len(holders)} pages are taken, and there are more tokens")
            if shared:
                copies.append((pages[b][-1], free[-1]))
                holders[pages[b].pop()] -= 1
            taken = [free.pop() for _ in range(missing + shared)]
            pages[b].extend(taken)
            for page in taken:
                holders[page] = 1
        if copies:
            before, after = self._from_host(copies).T.long()
            self.k[after], self.v[after] = self.k[before], self.v[before]
        self._deal([b for b, *_ in changes], pages, dropped, holders)

    def _first_seen(self, begin: int) -> int:
        """Return the first token that the query at ``begin`` sees."""
        return 0 if self.window is None else max(0, begin - self.window)

    def _deal(self, changed: list[int], pages: list[list[int]], dropped: list[int], holders: list[int]) -> None:
        """Assign the pages; only those of the ``changed`` sequences differ from before."""
        if changed:
            max_pages = self._block_table.shape[1]
            rows = [[b, dropped[b], *pages[b], *[-1] * (max_pages - len(pages[b]))] for b in changed]
            table = self._from_host(rows)
            index = table[:, 0].long()
            self._dropped[index], self._block_table[index] = table[:, 1], table[:, 2:]
        self._pages, self._host_dropped, self._holders = pages, dropped, holders

    def _from_host(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return an int32 tensor of these numbers on the device: one copy, for which the host does not wait."""
        x = torch.tensor(rows, dtype=torch.int32)
        if self.k.is_cuda:
            x = x.pin_memory()
        return x.to(self.k.device, non_blocking=True)

    def _crop(self, ends: list[int]) -> None:
        pages, dropped, holders = list(self._pages), list(self._host_dropped), list(self._holders)
        for b, end in enumerate(ends):
            if end == 0:
                dropped[b] = 0  # begin anew
            elif self._first_seen(end) < dropped[b]:
                raise ValueError(
                    f"lengths must be at least {dropped[b] + (self.window or 0)} or 0 for sequence {b}, got {end}: the "
                    f"window of {self.window} tokens has let go of the first {dropped[b]}"
                )
            kept = -(-(end - dropped[b]) // self.page_size)
            for page in pages[b][kept:]:
                holders[page] -= 1
            pages[b] = pages[b][:kept]
        changed = [b for b in range(len(ends)) if (pages[b], dropped[b]) != (self._pages[b], self._host_dropped[b])]
        self._deal(changed, pages, dropped, holders)
        super()._crop(ends)

    def _locate(self, b: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        token = token - self._dropped[b]
        return self._block_table[b, token // self.page_size], token % self.page_size

    def _keys(self) -> dict[str, Any]:
        return dict(
            key_start=self._key_start + self._dropped,
            key_lengths=self._lengths - self._dropped,
            block_table=self._block_table,
        )

    def _per_sequence(self) -> tuple[Tensor, ...]:
        return self._lengths, self._key_start, self._dropped, self._block_table

    def _share(self, beams: list[int]) -> None:
        super()._share(beams)
        self._pages = [list(self._pages[beam]) for beam in beams]
        self._host_dropped = [self._host_dropped[beam] for beam in beams]
        self._holders = [0] * self.k.shape[0]
        for page in itertools.chain(*self._pages):
            self._holders[page] += 1

    def reset(self, key_start: int | Tensor = 0) -> None:
        """Forget all tokens and give their pages back; ``key_start`` as in :meth:`KVCache.reset`."""
        super().reset(key_start)
        self._block_table.fill_(-1)
        self._dropped.zero_()
        self._forget()
