"""Test generation through a cache, token by token, against attention over the whole sequence at once."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_values
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import logpe
from logpe import KVCache, LogPosition, PagedKVCache, log_attention, reference

B, HEADS, KV, N, D = 2, 4, 2, 50, 16
WINDOW = 20
PRESETS = [(preset, gain) for preset in logpe.PRESETS for gain in (False, True)]


def static(position: Any, window: int | None = None, batch: int = B, **options: Any) -> KVCache:
    return KVCache(batch, KV, N, D, position, window=window, **options)


def paged(position: Any, window: int | None = None, batch: int = B, **options: Any) -> PagedKVCache:
    """Return a paged cache; with a window, one that is just large enough for steps of up to 10 tokens."""
    capacity = N if window is None else window + 10
    return PagedKVCache(batch, KV, capacity, D, position, window=window, page_size=16, **options)


CACHES = pytest.mark.parametrize("make", [static, paged])


def tokens(batch: int = B, length: int = N, value_dim: int = D, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (HEADS, D), (KV, D), (KV, value_dim)
    return tuple(torch.randn(batch, h, length, size, **options) for h, size in sizes)  # type: ignore[return-value]


def steps(start: int, end: int, size: int = 1) -> list[slice]:
    return [slice(n, min(n + size, end)) for n in range(start, end, size)]


def generate(cache: KVCache, x: tuple[Tensor, ...], pieces: list[slice], **options: Any) -> Tensor:
    """Return all outputs of a cache that is fed these pieces of the sequences."""
    with torch.no_grad():
        return torch.cat([cache.attend(*(t[:, :, piece] for t in x), **options) for piece in pieces], 2)


def whole(x: tuple[Tensor, ...], position: Any, window: int | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return log_attention(*x, position, is_causal=True, window=(window, None), **options)


def state(cache: KVCache) -> dict[str, Any]:
    """Return a copy of all that a cache is, except for the values of its keys."""
    copy = {name: x.clone() if isinstance(x, Tensor) else x for name, x in vars(cache).items()}
    return {name: str(x) for name, x in copy.items() if name not in ("k", "v", "position")}


# --- the same as all at once --------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("preset", "gain"), PRESETS)
def test_token_by_token_is_the_whole(make: Callable[..., KVCache], window: int | None, preset: str, gain: bool) -> None:
    values = make_values(HEADS, D, preset, query_gain=gain, gain_length=20)
    x = tokens()
    out = generate(make(values, window), x, [slice(0, 10), slice(10, 17), *steps(17, N)])
    torch.testing.assert_close(out, whole(x, values, window))


@pytest.mark.parametrize(("make", "window"), [(static, None), (paged, WINDOW)])
def test_the_kernels(make: Callable[..., KVCache], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation is the same on the kernels: those for the prompt and those for decoding."""
    pytest.importorskip("triton")
    from logpe_kernels import decode

    monkeypatch.setattr(decode, "MIN_KEYS", 32)
    monkeypatch.setattr(decode, "MAX_QUERIES", 4)
    monkeypatch.setattr(decode, "num_splits", lambda *sizes: 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True, gain_length=20, device=device)
    for value_dim in (D, 8):
        x = tokens(value_dim=value_dim, device=device)
        cache = make(position, window, value_dim=value_dim, device=device)
        out = generate(cache, x, [*steps(0, 40, 10), *steps(40, 43)], backend="triton")
        expected = whole(x, position, window, backend="reference")[:, :, :43]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@CACHES
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("value_dim", [8, 24, 1])
def test_values_of_another_size(make: Callable[..., KVCache], window: int | None, value_dim: int) -> None:
    """Through steps, ragged ones, beams and a crop."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens(value_dim=value_dim)
    cache = make(position, window, value_dim=value_dim)
    assert (cache.k.shape[-1], cache.v.shape[-1]) == (D, value_dim)
    outs = [generate(cache, x, [slice(0, 9), *steps(9, 20)])]
    generate(cache, tokens(length=3, value_dim=value_dim), [slice(None)], lengths=[3, 1])
    cache.crop(20)
    cache.reorder([1, 0])
    cache.reorder([1, 0])
    outs.append(generate(cache, x, steps(20, N, 10)))
    torch.testing.assert_close(torch.cat(outs, 2), whole(x, position, window))
    with pytest.raises(ValueError, match=rf"v must have shape \(2, 2, 1, {value_dim}\), got \(2, 2, 1, 16\)"):
        cache.append(*tokens(length=1)[1:])


@CACHES
@pytest.mark.parametrize("window", [None, WINDOW])
def test_ragged(make: Callable[..., KVCache], window: int | None) -> None:
    """Prompts of different lengths are padded on the right; each sequence goes on from its own end, beams included."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens(3)
    lengths = torch.tensor([12, 0, 40])
    expected = whole(x, position, window)
    cache = make(position, window, batch=3)
    with torch.no_grad():
        for piece in steps(0, 40, 10):
            counts = (lengths - piece.start).clamp(0, 10)
            out = cache.attend(*(t[:, :, piece] for t in x), lengths=counts)
            for b, count in enumerate(counts.tolist()):
                torch.testing.assert_close(out[b, :, :count], expected[b, :, piece][:, :count])
        who = torch.arange(3)
        for step in range(10):
            if step == 5:
                who = torch.tensor([2, 0, 0])
                cache.reorder(who)
            at = lengths[who] + step
            out = cache.attend(*(t[who, :, at][:, :, None] for t in x))
            torch.testing.assert_close(out[:, :, 0], expected[who, :, at])
    assert cache.lengths.tolist() == [50, 22, 22]


@CACHES
def test_left_padding(make: Callable[..., KVCache]) -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens()
    padding = torch.tensor([0, 7])
    out = generate(make(position, key_start=-padding), x, [slice(0, 15), *steps(15, N)])
    torch.testing.assert_close(out[0], whole(tuple(t[:1] for t in x), position)[0])
    torch.testing.assert_close(out[1, :, 7:], whole(tuple(t[1:, :, 7:] for t in x), position)[0])
    assert (out[1, :, :7] == 0).all()


@pytest.mark.parametrize("window", [None, WINDOW])
@CACHES
def test_reorder(make: Callable[..., KVCache], window: int | None) -> None:
    """Beams fork twice, and go on with tokens of their own."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens(3)
    cache = make(position, window, batch=3)
    generate(cache, x, steps(0, 22, 8))
    history = tuple(t[:, :, :22] for t in x)
    for length in (8, 10, 10):
        beams = torch.randint(3, (3,))
        cache.reorder(beams)
        fresh = tokens(3, length)
        out = generate(cache, fresh, steps(0, length))
        history = tuple(torch.cat((old[beams], new), 2) for old, new in zip(history, fresh, strict=True))
        torch.testing.assert_close(out, whole(history, position, window)[:, :, -out.shape[2] :])


@CACHES
def test_reset(make: Callable[..., KVCache]) -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias")
    cache = make(position, key_start=-3)
    generate(cache, tokens(), [slice(0, 40)])
    cache.reset()
    before = state(make(position))
    assert state(cache) == before
    x = tokens()
    torch.testing.assert_close(generate(cache, x, steps(0, N, 9)), whole(x, position))


@CACHES
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("preset", ["none", "log-invariant", "log-rotary-bias"])
def test_crop(make: Callable[..., KVCache], window: int | None, preset: str, backend: str) -> None:
    """Drafts that are dropped leave no trace in a random life of steps, ragged or not, and of beams."""
    values, batch = make_values(HEADS, D, preset, query_gain=True, gain_length=20), 3
    cache = make(values, window, batch=batch)
    x = tokens(batch, 0)  # what should be in the cache, right-aligned behind what has never been
    held = [tuple(t[b : b + 1] for t in x) for b in range(batch)]
    for _ in range(12):
        before = cache.lengths.tolist()
        room = min(10, N - max(before))
        fresh = tokens(batch, room)
        counts = [random.randint(0, room) for _ in range(batch)]
        out = generate(cache, fresh, [slice(None)], lengths=counts, backend=backend)
        for b, count in enumerate(counts):
            held[b] = tuple(
                torch.cat((old, new[b : b + 1, :, :count]), 2) for old, new in zip(held[b], fresh, strict=True)
            )
            expected = whole(held[b], values, window, backend=backend)[0, :, before[b] :]
            torch.testing.assert_close(out[b, :, :count], expected)
        if random.random() < 0.3:
            beams = torch.randint(batch, (batch,))
            cache.reorder(beams)
            held, before = [held[b] for b in beams], [before[b] for b in beams]
        deepest = 0 if window else 15
        ends = [random.randint(max(0, n - deepest), t[0].shape[2]) for n, t in zip(before, held, strict=True)]
        if random.random() < 0.1:
            ends[random.randrange(batch)] = 0
        cache.crop(random.choice([ends, torch.tensor(ends), torch.tensor(ends, dtype=torch.int32)]))
        held = [tuple(t[:, :, :end] for t in kept) for kept, end in zip(held, ends, strict=True)]
        assert cache.lengths.tolist() == ends
        if isinstance(cache, PagedKVCache):
            taken = {page for pages in cache._pages for page in pages}
            assert taken == {page for page, holders in enumerate(cache._holders) if holders}
            used = [-(-(n - gone) // 16) for n, gone in zip(ends, cache._host_dropped, strict=True)]
            assert [len(pages) for pages in cache._pages] == used == (cache.block_table >= 0).sum(1).tolist()


@CACHES
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_crop_leaves_nothing_behind(make: Callable[..., KVCache], backend: str) -> None:
    """Nothing is left of rejected tokens, not even NaN."""
    if backend == "triton":
        pytest.importorskip("triton")
    gpu = backend == "triton" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True, device=device)
    x = tokens(length=20, device=device)
    draft = tuple(torch.full_like(t, float("nan")) for t in x)
    cache = make(position, device=device)
    outs = []
    for piece in (slice(0, 14), slice(14, 15), slice(15, 20)):
        outs.append(generate(cache, x, [piece], backend=backend))
        generate(cache, draft, [slice(0, 4)], backend=backend)
        cache.crop(piece.stop)
    torch.testing.assert_close(torch.cat(outs, 2), whole(x, position, backend="reference"), rtol=1e-4, atol=1e-5)


@CACHES
def test_crop_refuses(make: Callable[..., KVCache]) -> None:
    x = tokens()
    cache = make(LogPosition(HEADS, D), WINDOW)
    generate(cache, x, steps(0, 48, 8))
    before = state(cache)
    for lengths in (49, -1, True, 2.0, [48], [48, 49], [-1, 48], [48.0, 48.0], None, torch.tensor([1.0, 2.0]), "ab"):
        with pytest.raises(ValueError, match=r"lengths must be an int or 2 ints from 0 to .* \[48, 48\], got"):
            cache.crop(lengths)  # type: ignore[arg-type]
    if isinstance(cache, PagedKVCache):  # whose window at 40 has let go of a page
        with pytest.raises(ValueError, match=r"at least 36 or 0 for sequence 1, got 35: .* let go of the first 16"):
            cache.crop([36, 35])
    assert state(cache) == before
    cache.crop(cache.lengths - torch.tensor([0, 12]))
    cache.crop(0)
    if isinstance(cache, PagedKVCache):
        assert not any(cache._holders)
        assert (cache.block_table == -1).all()
    torch.testing.assert_close(generate(cache, x, steps(0, N, 9)), whole(x, cache.position, WINDOW))


@CACHES
def test_what_cannot_be_assigned(make: Callable[..., KVCache]) -> None:
    cache = make(LogPosition(HEADS, D))
    generate(cache, tokens(), [slice(0, 20)])
    before = state(cache)
    names = ["lengths", "k", "v", "capacity", "window", "position", "batch_size", "num_kv_heads", "head_dim"]
    names.append("value_dim")
    for name in names + ["block_table", "page_size"] * isinstance(cache, PagedKVCache):
        with pytest.raises(AttributeError, match=f"{name} of a .*KVCache cannot be assigned: append, crop, reset"):
            setattr(cache, name, getattr(cache, name))
    with pytest.raises(AttributeError, match="lengths of a"):
        cache.lengths -= 3
    cache.lengths.sub_(3)  # a copy
    assert state(cache) == before


@CACHES
@pytest.mark.parametrize("values", [False, True])
def test_copies(make: Callable[..., KVCache], values: bool) -> None:
    """A deep copy is independent of the original."""
    position: Any = LogPosition(HEADS, D, "log-rotary-bias")
    if values:
        with torch.no_grad():
            position = position()
    x = tokens()
    cache = make(position, WINDOW)
    generate(cache, x, steps(0, 40, 10))
    clone = copy.deepcopy(cache)
    clone.crop(30)
    other = tuple(torch.cat((t[:, :, :30], u), 2) for t, u in zip(x, tokens(length=20), strict=True))
    torch.testing.assert_close(generate(clone, other, steps(30, 50, 4)), whole(other, position, WINDOW)[:, :, 30:])
    torch.testing.assert_close(generate(cache, x, [slice(40, 50)]), whole(x, position, WINDOW)[:, :, 40:])


@CACHES
def test_a_refused_step_leaves_no_pages_behind(make: Callable[..., KVCache]) -> None:
    """Otherwise sequences that share pages later would write into each other's."""
    position = LogPosition(HEADS, D)
    x = tokens()
    cache = make(position)
    generate(cache, x, [slice(0, 20)])
    before = state(cache)
    with pytest.raises(ValueError, match="backend must be"):
        generate(cache, x, [slice(20, 50)], backend="flash")
    assert state(cache) == before
    cache.reorder([0, 0])
    x = tuple(torch.cat((t[:1, :, :20].expand(2, -1, -1, -1), t[:, :, 20:]), 2) for t in x)
    torch.testing.assert_close(generate(cache, x, steps(20, 50)), whole(x, position)[:, :, 20:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_options(dtype: torch.dtype) -> None:
    values = make_values(HEADS, D, "log-rotary-bias")
    x = tokens(dtype=dtype)
    cache = static(values, dtype=dtype)
    with torch.no_grad():
        options: dict[str, Any] = dict(return_lse=True, scale=0.3, backend="reference")  # rounds what it turns
        out, lse = cache.attend(*x, **options)
        expected = log_attention(*x, values, is_causal=True, **options)
    assert out.dtype == dtype
    torch.testing.assert_close((out, lse), expected)


def test_no_graph_is_kept() -> None:
    position = LogPosition(HEADS, D)
    q, k, v = (t.requires_grad_() for t in tokens())
    cache = static(position)
    cache.attend(q, k, v).sum().backward()
    assert not cache.k.requires_grad
    assert q.grad is not None
    assert k.grad is None


# --- pages --------------------------------------------------------------------------------------------------------


def test_pages_are_dealt_in_one_copy_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    from_host = PagedKVCache._from_host

    def count(cache: PagedKVCache, rows: Any) -> Tensor:
        copies.append(rows)
        return from_host(cache, rows)

    monkeypatch.setattr(PagedKVCache, "_from_host", count)
    cache = paged(None, batch=5)
    x = tokens(5)
    generate(cache, x, steps(0, 33))
    assert len(copies) == 3  # at 0, 16 and 32 tokens
    cache.reorder([0, 0, 0, 3, 4])
    generate(cache, x, steps(33, 34))
    assert len(copies) == 5  # the shared pages that are written to, and the new table
    assert len(copies[3]) == 2
    cache.crop(20)
    assert len(copies) == 6
    assert len(copies[5]) == 5


def test_pages_come_and_go() -> None:
    """A window's pages go back to the pool; sequences share pages after reorder until one of them writes."""
    position = LogPosition(HEADS, D)
    cache = paged(position, WINDOW)
    x = tokens(length=400)
    torch.testing.assert_close(generate(cache, x, steps(0, 400, 10)), whole(x, position, WINDOW))
    assert cache.k.shape[0] == B * 3
    assert all(len(pages) <= 3 for pages in cache._pages)

    cache = paged(position)
    generate(cache, x, [slice(0, 40)])
    assert len({page for pages in cache._pages for page in pages}) == 6
    cache.reorder(torch.tensor([1, 1]))
    assert len({page for pages in cache._pages for page in pages}) == 3
    generate(cache, x, [slice(40, 41)])
    assert cache._pages[0][:2] == cache._pages[1][:2]
    assert cache._pages[0][2] != cache._pages[1][2]
    assert sum(cache._holders) == 6


def test_a_pool_smaller_than_all_sequences_at_their_longest() -> None:
    position = LogPosition(HEADS, D)
    x = tokens()
    cache = paged(position, num_pages=5)
    generate(cache, x, [slice(0, 32)])  # two pages each
    before = state(cache)
    with pytest.raises(ValueError, match="the cache is full: all 5 pages are taken"):
        generate(cache, x, [slice(32, 33)])
    assert state(cache) == before
    with torch.no_grad():
        cache.append(x[1][:, :, 32:40], x[2][:, :, 32:40], lengths=[8, 0])
    assert cache.lengths.tolist() == [40, 32]


# --- what is refused ------------------------------------------------------------------------------------------------


@CACHES
def test_overflow_leaves_the_cache_as_it_was(make: Callable[..., KVCache]) -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias")
    x = tokens()
    cache = make(position)
    out = generate(cache, x, [slice(0, 45)])
    before = state(cache)
    with pytest.raises(ValueError, match="the cache is full: 51 tokens, and its capacity is 50"):
        cache.append(*(t[:, :, :6] for t in x[1:]))
    assert state(cache) == before
    out = torch.cat((out, generate(cache, x, [slice(45, 50)])), 2)
    torch.testing.assert_close(out, whole(x, position))


def test_a_step_longer_than_a_window_leaves_room_for() -> None:
    x = tokens()
    cache = paged(LogPosition(HEADS, D), WINDOW)
    generate(cache, x, steps(0, 30, 10))
    before = state(cache)
    with pytest.raises(ValueError, match="31 tokens, those of the window and the new ones, and its capacity is 30"):
        generate(cache, x, [slice(30, 41)])
    assert state(cache) == before


@CACHES
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=torch.zeros(B, 3, 5, D)), ValueError, r"q must have shape \(2, a multiple of 2, 5, 16\), got \(2, 3,"),
        (dict(q=torch.zeros(B, 2, 5, D)), ValueError, "q must have the heads of the position, 4, got 2"),
        (dict(k=torch.zeros(B, KV, D, 5).mT), ValueError, "must be contiguous in its last dimension"),
        (dict(q=torch.zeros(B, 4, 4, D)), ValueError, r"q must have shape .* got \(2, 4, 4, 16\)"),
        (dict(q=torch.zeros(B, 4, 5, D).half()), TypeError, "q must be torch.float32 on cpu, got torch.float16"),
        (dict(k=torch.zeros(B, KV, 5, 8)), ValueError, r"k must have shape \(2, 2, 5, 16\), got \(2, 2, 5, 8\)"),
        (dict(v=torch.zeros(B, KV, 6, D)), ValueError, r"v must have shape \(2, 2, 5, 16\), got \(2, 2, 6, 16\)"),
        (dict(q=torch.nested.nested_tensor([torch.zeros(4, 5, D)])), TypeError, "q must be .* got a nested one"),
        (dict(v=torch.nested.nested_tensor([torch.zeros(2, 5, D)])), TypeError, "v must be .* got a nested one"),
        (dict(k=np.zeros((B, KV, 5, D))), TypeError, "k must be a tensor, got ndarray"),
        (dict(v=torch.zeros(B, KV, 5, D).double()), TypeError, "v must be torch.float32 on cpu, got torch.float64"),
        (dict(lengths=[1, 6]), ValueError, r"lengths must be 2 ints from 0 to 5, got \[1, 6\]"),
        (dict(lengths=torch.tensor([1])), ValueError, r"lengths must be 2 ints from 0 to 5, got \[1\]"),
        (dict(lengths=torch.tensor([1.0, 2.5])), ValueError, r"lengths must be 2 ints .* got \[1.0, 2.5\]"),
        (dict(lengths=[True, False]), ValueError, r"lengths must be 2 ints .* got \[True, False\]"),
        (dict(lengths=torch.ones(2, dtype=torch.bool)), ValueError, r"lengths must be 2 ints .* got \[True, True\]"),
        (dict(lengths=3), ValueError, "lengths must be 2 ints from 0 to 5, got 3"),
        (dict(window=3), TypeError, "unexpected keyword argument 'window'"),
    ],
)
def test_refused(make: Callable[..., KVCache], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    cache = make(LogPosition(HEADS, D, "log-rotary"))
    before = state(cache)
    with pytest.raises(error, match=message):
        cache.attend(**(dict(zip("qkv", tokens(length=5), strict=True)) | changes))
    assert state(cache) == before


@CACHES
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=float("inf")), "scale must be finite, got inf"),
        (dict(key_mask=torch.ones(B, 7, dtype=torch.bool)), "key_mask must have shape"),
        (dict(context_length=2.5), "context_length must be"),
        (dict(backend="flash"), "backend must be one of"),
    ],
)
def test_a_bad_option_leaves_the_tokens_to_be_given_again(
    make: Callable[..., KVCache], window: int | None, options: dict[str, Any], message: str
) -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens()
    cache = make(position, window)
    outs = []
    for piece in steps(0, N, 7):
        lengths = cache.lengths.tolist()
        with pytest.raises((TypeError, ValueError), match=message):
            generate(cache, x, [piece], **options)
        assert cache.lengths.tolist() == lengths
        outs.append(generate(cache, x, [piece]))
    torch.testing.assert_close(torch.cat(outs, 2), whole(x, position, window))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVCache(0, 1, 1, 1), "batch_size must be at least 1, got 0"),
        (lambda: KVCache(True, 1, 1, 1), "batch_size must be an integer, got True"),
        (lambda: KVCache(1, 1, 8, 8, window=True), "window must be an int of at least 0 or None, got True"),
        (lambda: KVCache(1, 1, 8, 8, key_start=True), "key_start must be an int or an int tensor .* got True"),
        (lambda: PagedKVCache(1, 1, 8, 8, page_size=16.0), r"page_size must be one of .* got 16.0"),  # type: ignore[arg-type]
        (lambda: PagedKVCache(1, 1, 8, 8, num_pages=2.5), r"num_pages must be .* got 2.5"),  # type: ignore[arg-type]
        (lambda: KVCache(1, 1, 8.0, 1), "capacity must be an integer, got 8.0"),  # type: ignore[arg-type]
        (lambda: KVCache(1, 1, 8, 8, value_dim=0), "value_dim must be at least 1, got 0"),
        (lambda: PagedKVCache(1, 1, 8, 8, value_dim=8.0), "value_dim must be an integer, got 8.0"),
        (lambda: KVCache(1, 1, 8, 8, window=-1), "window must be an int of at least 0 or None, got -1"),
        (lambda: KVCache(1, 1, 8, 8, window=(3, 0)), r"window must be an int .* got \(3, 0\)"),  # type: ignore[arg-type]
        (lambda: KVCache(1, 3, 8, 8, LogPosition(4, 8)), "num_kv_heads must divide the heads of the position, 4, got"),
        (lambda: KVCache(1, 1, 8, 8, "none"), "position must be a LogPosition, .* got str"),  # type: ignore[arg-type]
        (lambda: KVCache(2, 1, 8, 8, key_start=1.5), "key_start must be an int or .* got 1.5"),  # type: ignore[arg-type]
        (lambda: KVCache(1, 1, 8, 8, LogPosition(1, 16)), "head_dim must be that of the position, 16, got 8"),
        (lambda: KVCache(2, 1, 8, 8, key_start=torch.zeros(3).int()), r"key_start must have shape \(2,\), got \(3,\)"),
        (lambda: PagedKVCache(1, 1, 8, 8, page_size=24), r"page_size must be one of \(16, 32, 64, 128, 256\), got 24"),
        (lambda: PagedKVCache(1, 1, 8, 8, num_pages=0), "num_pages must be at least 1, got 0"),
        (lambda: PagedKVCache(1, 1, 8, 8, window=8), "capacity must be above the window, 8, got 8"),
        (lambda: static(None).reorder(torch.tensor([0])), r"beam_idx must be int \(2,\), got torch.int64 \(1,\)"),
        (lambda: static(None).reorder([0.0, 1.0]), r"beam_idx must be int \(2,\), got torch.float32"),  # type: ignore[list-item]
        (lambda: static(None).reorder(torch.tensor([0, 2])), r"beam_idx must be from 0 to 1, got \[0, 2\]"),
    ],
)
def test_refused_settings(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --- rotate -------------------------------------------------------------------------------------------------------


def test_rotate() -> None:
    """Queries and keys that are rotated once give what log_attention gives, gradients included."""
    position = LogPosition(HEADS, D, "log-rotary-bias", rotary_scale=random.choice((1.0, 100.0, float("inf"))))
    starts = torch.tensor([3, -2])
    q, k, v = (t.requires_grad_() for t in tokens(length=9, dtype=torch.float64))
    turned = [logpe.rotate(x, position, starts) for x in (q, k)]
    options: dict[str, Any] = dict(is_causal=True, query_start=starts, key_start=starts, return_lse=True)
    actual = log_attention(*turned, v, position().unrotated(), **options)
    expected = log_attention(q, k, v, position, **options)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for out, _ in (actual, expected)]
    torch.testing.assert_close(*grads)

    assert logpe.rotate(q, None) is q
    assert logpe.rotate(q, LogPosition(HEADS, D, "log-bias")) is q
    with pytest.raises(ValueError, match=r"position.theta must be float64 .* from 2 to head_dim 8"):
        logpe.rotate(q[..., :8].contiguous(), position)
    with pytest.raises(TypeError, match=r"start must be an int or an int tensor \(2,\), got 1.5"):
        logpe.rotate(q, position, 1.5)  # type: ignore[arg-type]
    wide = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.logpe.rotate.default, (wide, position.theta, starts, 0, 3.0, False))
    expected_turn = reference.rotate(wide, torch.arange(9) + 5, position.theta, 3.0)
    torch.testing.assert_close(torch.ops.logpe.rotate(wide, position.theta, None, 5, 3.0, False), expected_turn)


# --- compiled, and on a GPU ---------------------------------------------------------------------------------------


def test_compiled() -> None:
    """One graph serves all steps: the lengths are not its constants."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    x = tokens()
    cache = static(position)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda cache, *x: cache.attend(*x), fullgraph=True, dynamic=True, backend=counter)
    outs = [generate(cache, x, [slice(0, 10)])]
    graphs = 0
    with torch.no_grad():
        for piece in steps(10, N):
            outs.append(step(cache, *(t[:, :, piece] for t in x)))
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs
        with pytest.raises(ValueError, match="the cache is full"):
            cache.append(*(t[:, :, :1] for t in x[1:]))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.cat(outs, 2), whole(x, position))


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """When a captured step is replayed, the tensors count on, and every output is that of the whole sequence."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True, device=device)
    x = tokens(length=1000, device=device, dtype=torch.float16)
    cache = KVCache(B, KV, 1000, D, position, dtype=torch.float16, device=device)
    slot = [t[:, :, :1].clone() for t in x]
    with torch.no_grad():
        cache.attend(*slot)  # compiles
        cache.reset()
        generate(cache, x, [slice(0, 600)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cache.attend(*slot)
        expected = whole(x, position)
        for n in range(600, 700):
            for static_input, t in zip(slot, x, strict=True):
                static_input.copy_(t[:, :, n : n + 1])
            graph.replay()
            torch.testing.assert_close(out, expected[:, :, n : n + 1], rtol=2e-3, atol=2e-3)
        assert cache.lengths.tolist() == [700, 700]
        cache.crop(650)  # the replays are counted
        torch.testing.assert_close(generate(cache, x, [slice(650, 700)]), expected[:, :, 650:700], rtol=2e-3, atol=2e-3)
        with pytest.raises(ValueError, match="the cache is full: 1050 tokens"):
            cache.append(*(t[:, :, :350] for t in x[1:]))
