"""Test attention over a sequence that lies across 2, 3 and 4 processes against one process with all of it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import os
import pickle
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import PARAMETERS, Call, Reference, make_call, make_packed_call, make_values, run, run_processes
from torch import Tensor

import logpe
from logpe import ContextParallel, log_attention, log_attention_varlen

ROOT = Path(__file__).parents[1]
LAYOUTS, METHODS = ("head-tail", "contiguous"), ("all-gather", "ring", "heads")
WAYS = list(itertools.product(METHODS, LAYOUTS))

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo backend here"
)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes(world: int, tmp_path: Path) -> None:
    """All cases of a number of processes run in one group of them, for starting them takes most of the time."""
    run_processes(__file__, world, world, tmp_path / "rendezvous", TRITON_INTERPRET="1")


# --- what each process runs -----------------------------------------------------------------------------------------


def shard_call(parallel: ContextParallel, call: Call) -> Call:
    """Return this rank's part of a call."""
    dim = 2 if call.lengths is None else 0
    tensors = {name: parallel.shard(getattr(call, name), dim) for name in ("q", "k", "v", "dout")}
    dlse = None if call.dlse is None else parallel.shard(call.dlse, -1)
    options = dict(call.options, context_parallel=parallel)
    if "key_mask" in options:
        options["key_mask"] = parallel.shard(options["key_mask"], 1)
    if "sink" in options and options["sink"].dim() > 1:
        options["sink"] = parallel.shard(options["sink"], -1)
    return call.replace(**tensors, dlse=dlse, options=options)


def part_of(parallel: ContextParallel, call: Call, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of the results of :func:`helpers.run`."""
    dim = 2 if call.lengths is None else 0
    return {
        name: x if name[1:] in PARAMETERS else parallel.shard(x, -1 if name == "lse" else dim)
        for name, x in whole.items()
    }


def all_equal(*tensors: Tensor) -> bool:
    """Return whether the ranks hold the same bits."""
    x = torch.stack(tensors)
    copies = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, x)
    return all(torch.equal(copies[0], other) for other in copies)


def check(call: Call, backend: str = "auto") -> None:
    """Compare in float64, for each method, with the reference in one process.

    Three processes take both layouts, two and four one of them.
    """
    exact = run(call, "reference", torch.float64)
    world = dist.get_world_size()
    for method, layout in WAYS if world == 3 else WAYS[world // 2 % 2 :: 2]:
        if method == "heads" and call.options.get("dropout_p"):
            continue
        parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
        actual = run(shard_call(parallel, call), backend, torch.float64)
        assert actual.keys() == exact.keys()
        for name, expected in part_of(parallel, call, exact).items():
            size = max(1.0, float(exact[name].nan_to_num(0, 0, 0).abs().max())) if exact[name].numel() else 1.0
            where = f"{name} of {method}, {layout}: "
            torch.testing.assert_close(
                actual[name], expected, rtol=0, atol=1e-12 * size, msg=lambda text, where=where: where + text
            )
        parameters = [x for name, x in actual.items() if name[1:] in PARAMETERS]
        assert not parameters or all_equal(*parameters)


def raised(function: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    """Return the message of the error, which must be one and the same on all ranks."""
    with pytest.raises(error) as info:
        function()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(info.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


def sharding(rank: int, world: int) -> None:
    """Shards are the tokens at positions(), and unshard is the inverse, for any length."""
    for layout, length in itertools.product(LAYOUTS, [0, 1, world, 2 * world, 2 * world + 1, 29]):
        parallel = ContextParallel(dist.group.WORLD, layout=layout)
        x = torch.randn(2, length, 3, requires_grad=True)
        part = parallel.shard(x, 1)
        positions = parallel.positions(length)
        assert torch.equal(part, x[:, positions])
        assert torch.equal(parallel.unshard(part, 1), x)
        assert torch.equal(parallel.unshard(part, -2), x)
        assert torch.equal(parallel.unshard(positions, 0), torch.arange(length))
        part.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad[0, :, 0].nonzero().flatten(), positions)
        counts = [sum(b - a for a, b in parallel.spans(length, other)) for other in range(world)]
        assert sum(counts) == length
        assert max(counts) - min(counts) <= (1 if layout == "contiguous" else 2)


def presets(rank: int, world: int) -> None:
    for preset, causal in zip(logpe.PRESETS, itertools.cycle([True, False])):
        check(make_call(num_queries=29, head_dim=8, preset=preset, is_causal=causal))
    for preset in ("log-invariant", "log-rotary-bias"):
        check(make_call(num_queries=30, head_dim=8, preset=preset, query_gain=True, is_causal=True))
        check(make_call(num_queries=30, head_dim=8, preset=preset, query_gain=True))


def lengths(rank: int, world: int) -> None:
    """Ranks hold different numbers of tokens, or none."""
    for length in {0, 1, world - 1, world + 1, 2 * world - 1, 2 * world, 4 * world + 1}:
        check(make_call(1, num_queries=length, head_dim=4, preset="log-bias-rope", is_causal=True))
    check(make_call(1, num_queries=3, num_keys=29, head_dim=4, is_causal=True))
    check(make_call(1, num_queries=29, num_keys=1, head_dim=4, query_start=0))
    check(make_call(1, num_queries=7, num_keys=17, head_dim=4, query_gain=True, query_start=11, context_length=40))


def windows(rank: int, world: int) -> None:
    for window, causal in [((5, 3), False), (4, True), ((0, 0), False), ((None, 2), False), ((3, -1), False)]:
        options = dict(window=window, is_causal=causal, query_gain=causal)
        check(make_call(1, num_queries=31, head_dim=8, preset="log-bias-rope", **options))


def grouped_heads(rank: int, world: int) -> None:
    """Fewer key heads than ranks, and heads that the ranks do not divide."""
    for heads, kv_heads, value_dim in [(6, 2, 8), (6, 1, 3), (2, 2, 12), (8, 4, 8)]:
        sizes: dict[str, Any] = dict(num_queries=19, head_dim=8, value_dim=value_dim)
        check(make_call(2, heads, kv_heads, **sizes, preset="log-invariant", is_causal=True))


def starts(rank: int, world: int) -> None:
    """Left padding by starts, right padding by lengths, and an offset of both axes."""
    padding = torch.tensor([0, -7, -40])
    options = dict(query_start=padding, key_start=padding, is_causal=True)
    check(make_call(3, num_queries=25, head_dim=8, preset="log-bias-rope", query_gain=True, **options))
    key_lengths = torch.tensor([25, 3, 0])
    check(make_call(3, num_queries=25, head_dim=8, preset="log-invariant", key_lengths=key_lengths))
    check(make_call(3, num_queries=25, head_dim=8, query_gain=True, key_lengths=key_lengths))
    check(make_call(1, num_queries=9, num_keys=21, head_dim=8, query_start=1000, key_start=950, window=(60, 0)))
    check(make_call(2, num_queries=21, head_dim=8, key_mask=torch.rand(2, 21) < 0.5, preset="log-invariant"))
    key_mask = torch.randn(2, 21).where(torch.rand(2, 21) < 0.7, -torch.inf)
    check(make_call(2, num_queries=21, head_dim=8, key_mask=key_mask, preset="log-bias-rope", is_causal=True))


def dropout(rank: int, world: int) -> None:
    seed = torch.tensor([random.getrandbits(62)])
    options = dict(dropout_p=0.3, dropout_seed=seed, is_causal=True)
    check(make_call(2, num_queries=27, head_dim=8, preset="log-bias-rope", **options))
    check(make_packed_call([5, 0, 14], [5, 0, 14], head_dim=8, **options))
    # Without a seed, all ranks take that of the first one.
    torch.manual_seed(1000 + rank)
    parallel = ContextParallel(dist.group.WORLD)
    v = torch.eye(16).expand(1, 1, 16, 16).contiguous()
    zeros = parallel.shard(torch.zeros_like(v), 2)
    weights = parallel.unshard(
        log_attention(zeros, zeros, parallel.shard(v, 2), dropout_p=0.5, context_parallel=parallel), 2
    )
    torch.manual_seed(1000)
    zeros = torch.zeros_like(v)
    torch.testing.assert_close(weights, log_attention(zeros, zeros, v, dropout_p=0.5))


def packed(rank: int, world: int) -> None:
    """Sequences of any length lie across ranks; tokens may belong to none."""
    for preset, causal, window in [
        ("log-bias-rope", True, None),
        ("log-invariant", False, None),
        ("log-rotary", True, 4),
        ("log-bias", False, (3, 2)),
    ]:
        options = dict(is_causal=causal, window=window, query_gain=True, head_dim=8, value_dim=12, preset=preset)
        check(make_packed_call([7, 0, 1, 16, 5], [7, 0, 1, 16, 5], outside=3, heads=4, kv_heads=2, **options))
    options = dict(is_causal=True, head_dim=8, preset="log-bias-rope")
    check(make_packed_call([3, 9, 1], [10, 9, 4], outside=2, **options))
    starts = torch.tensor([2, 0, 5])
    check(make_packed_call([3, 9, 1], [10, 4, 4], head_dim=8, query_start=starts, key_start=torch.tensor([-2, 0, 3])))


def sinks(rank: int, world: int) -> None:
    """For each head, or for each query; with a gain whose length is counted, given, or cut by a window."""
    options: dict[str, Any] = dict(kv_heads=2, head_dim=8, query_gain=True)
    check(make_call(num_queries=29, is_causal=True, sink=torch.randn(4), **options))
    check(make_call(num_queries=23, is_causal=True, window=(7, None), sink=torch.randn(2, 4, 23), **options))
    start = torch.tensor([3, -2])
    check(make_call(num_queries=17, context_length=40, query_start=start, sink=torch.randn(2, 4, 17), **options))
    check(make_call(num_queries=17, sink=torch.randn(2, 4, 17), **options))
    check(make_packed_call([9, 0, 8], [9, 0, 8], is_causal=True, sink=torch.randn(4, 17), **options))
    check(make_packed_call([9, 8], [9, 8], context_length=torch.tensor([4, 99]), sink=torch.randn(4), **options))
    check(make_call(0, num_queries=5, sink=torch.randn(4), **options))
    call = make_call(num_queries=29, is_causal=True, **options)
    for method, layout in WAYS:
        parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
        part = shard_call(parallel, call)
        shared, own = torch.randn(4, requires_grad=True), torch.randn(2, 4, 29, requires_grad=True)
        local = parallel.shard(own.detach(), 2).requires_grad_()
        for sink, piece in (shared, shared), (own, local):
            out = log_attention(call.q, call.k, call.v, call.values, sink=sink, is_causal=True)
            (expected,) = torch.autograd.grad((out * call.dout).sum(), sink)
            out = log_attention(part.q, part.k, part.v, call.values, sink=piece, **part.options)
            (actual,) = torch.autograd.grad((out * part.dout).sum(), piece)
            if sink is shared:  # a weight of the model, as others: each rank has its part
                dist.all_reduce(actual)
            torch.testing.assert_close(actual, expected if sink is shared else parallel.shard(expected, 2))
    call = make_call(num_queries=29, dtype=torch.bfloat16, is_causal=True, sink=torch.randn(4), **options)
    parallel = ContextParallel(dist.group.WORLD, method="ring")
    part = shard_call(parallel, call)
    out = log_attention(part.q, part.k, part.v, call.values, **part.options)
    assert out.dtype == torch.bfloat16
    expected = log_attention(call.q, call.k, call.v, call.values, **call.options)
    torch.testing.assert_close(out, parallel.shard(expected, 2), rtol=0.01, atol=0.01)


def dtypes(rank: int, world: int) -> None:
    """Half precision and float32 keep the bounds of all other tests."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = make_call(2, 4, 2, 45, head_dim=16, dtype=dtype, preset="log-invariant", query_gain=True, is_causal=True)
        reference = Reference(call)
        for method, layout in WAYS:
            parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
            actual = run(shard_call(parallel, call), "auto")
            dims = {name: -1 if name == "lse" else 2 for name in actual if name[1:] not in PARAMETERS}
            reference.check(actual | {name: parallel.unshard(actual[name], dim) for name, dim in dims.items()})
            if dtype != torch.float32:
                part = shard_call(parallel, call)
                wide = run(part.replace(options=part.options | dict(out_dtype=torch.float32)), "auto")
                assert wide["out"].dtype == torch.float32
                assert torch.equal(wide["out"].to(dtype), actual["out"])
    parallel = ContextParallel(dist.group.WORLD, method="ring")
    call = make_call(1, num_queries=21, is_causal=True)
    q, k, v = (parallel.shard(x, 2).requires_grad_() for x in (call.q, call.k, call.v))
    with torch.autocast("cpu", torch.bfloat16):
        out = log_attention(q, k, v, call.values, is_causal=True, context_parallel=parallel)
        expected = log_attention(call.q, call.k, call.v, call.values, is_causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(parallel.unshard(out, 2), expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def pooled(rank: int, world: int) -> None:
    """Over many draws, no result of a ring in half precision is farther off than eager attention's.

    One draw does not tell. The gradients of the parts of a row sum up to zero: if each part had a rounding error of its
    own in that sum, the error of dpower would be 1.5 times eager's.
    """
    if world != 2:
        return
    squares: dict[tuple[str, str], float] = {}
    for layout in LAYOUTS * 8:
        call = make_call(2, 4, 2, 45, head_dim=16, dtype=torch.bfloat16, preset="log-invariant", query_gain=True)
        call.options["is_causal"] = True
        exact, eager = run(call, "reference", torch.float64), run(call, "reference")
        parallel = ContextParallel(dist.group.WORLD, method="ring", layout=layout)
        actual = run(shard_call(parallel, call), "auto")
        for name, expected in part_of(parallel, call, exact).items():
            for way, x in ("ring", actual[name]), ("eager", part_of(parallel, call, eager)[name]):
                squares[way, name] = squares.get((way, name), 0.0) + float((x - expected).square().sum())
    for name in exact:
        ratio = (squares["ring", name] / squares["eager", name]) ** 0.5
        assert ratio <= 1, f"{name}: {ratio:.2f} times eager's error"


def kernels(rank: int, world: int) -> None:
    """The Triton kernels, interpreted: partial results and their gradients, packed and not."""
    if world != 2 or os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    options: dict[str, Any] = dict(head_dim=16, heads=2, kv_heads=1, preset="log-bias-rope", is_causal=True)
    calls = [make_call(1, num_queries=15, query_gain=True, **options), make_packed_call([9, 8], [9, 8], **options)]
    for call, method in zip(calls, ("ring", "all-gather"), strict=True):
        reference = Reference(call)
        parallel = ContextParallel(dist.group.WORLD, method=method)
        actual = run(shard_call(parallel, call), "triton")
        dim = 2 if call.lengths is None else 0
        dims = {name: -1 if name == "lse" else dim for name in actual if name[1:] not in PARAMETERS}
        reference.check(actual | {name: parallel.unshard(actual[name], dim) for name, dim in dims.items()})


def gradients_of_some(rank: int, world: int) -> None:
    """Only some inputs require a gradient, or only one result gets one."""
    call = make_call(1, num_queries=18, head_dim=8, value_dim=5, preset="log-invariant", is_causal=True)
    check(call.replace(dlse=None), backend="reference")
    frozen = call.values._replace(power=call.values.power.detach(), sharpness=call.values.sharpness.detach())
    check(call.replace(values=frozen))
    for method, layout in WAYS:
        parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
        part = shard_call(parallel, call)
        for wanted in ("q", "k", "rate", None):
            inputs = {name: getattr(part, name).clone() for name in ("q", "k", "v")}
            values = call.values._replace(
                **{name: x.detach() for name in PARAMETERS if (x := getattr(call.values, name)) is not None}
            )
            leaf = inputs.get(wanted, values.rate)
            if wanted is not None:
                leaf.requires_grad_()
            lse = log_attention(*inputs.values(), values, return_lse=True, **part.options)[1]
            assert lse.requires_grad == (wanted is not None)
            if wanted is None:
                continue
            lse.backward(part.dlse)
            whole = {name: getattr(call, name).clone() for name in ("q", "k", "v")}
            values = values._replace(rate=values.rate.detach().clone())
            expected = whole.get(wanted, values.rate)
            expected.requires_grad_()
            log_attention(*whole.values(), values, return_lse=True, is_causal=True)[1].backward(call.dlse)
            actual = leaf.grad if wanted == "rate" else parallel.unshard(leaf.grad, 2)
            torch.testing.assert_close(actual, expected.grad, rtol=1e-4, atol=1e-5)


def repeats(rank: int, world: int) -> None:
    """The gradients of the parameters are the same bits on all ranks and in 20 repeats; the mean is the sum's part."""
    call = make_call(1, 4, 2, 33, head_dim=8, preset="log-invariant", query_gain=True, is_causal=True)
    for method in METHODS:
        parallel = ContextParallel(dist.group.WORLD, method=method)
        first = run(shard_call(parallel, call), "auto")
        for _ in range(20):
            again = run(shard_call(parallel, call), "auto")
            assert all(torch.equal(again[name], x) for name, x in first.items())
        mean = run(shard_call(ContextParallel(dist.group.WORLD, method=method, reduction="mean"), call), "auto")
        assert all_equal(*(first[f"d{name}"] for name in PARAMETERS))
        for name in PARAMETERS:
            torch.testing.assert_close(mean[f"d{name}"] * world, first[f"d{name}"])


def errors(rank: int, world: int) -> None:
    """One rank's bad argument is the error of all, and the next call goes on."""
    for method in METHODS:
        errors_of(ContextParallel(dist.group.WORLD, method=method), rank == world - 1)
    for arguments, message in [
        (dict(layout="zigzag"), "layout must be one of head-tail, contiguous, got 'zigzag'"),
        (dict(method="ulysses"), "method must be one of all-gather, ring, heads, got 'ulysses'"),
        (dict(reduction="none"), "reduction must be one of sum, mean, got 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ContextParallel(dist.group.WORLD, **arguments)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh or a ProcessGroup, got int"):
        ContextParallel(2)
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(TypeError, match="context_parallel must be a ContextParallel or None, got ProcessGroup"):
        log_attention(x, x, x, context_parallel=dist.group.WORLD)


def errors_of(parallel: ContextParallel, bad: bool) -> None:
    world, call = parallel.size, make_call(1, num_queries=19, head_dim=8)
    where = f" (on rank {world - 1} of {world})"
    part = shard_call(parallel, call)
    q, k, v = part.q, part.k, part.v
    short = parallel.shard(call.k[:, :, :17], 2)

    def refused(*tensors: Any, error: type[Exception] = ValueError, values: Any = call.values, **options: Any) -> str:
        return raised(lambda: log_attention(*tensors, values, context_parallel=parallel, **options), error)

    text = refused(q.double() if bad else q, k, v, error=TypeError)
    assert text == "k must have the dtype of q, torch.float64, got torch.float32" + where
    assert refused(q, None if bad else k, v, error=TypeError) == "k must be a tensor, got NoneType" + where
    assert "window must be at least 0" in refused(q, k, v, window=-5 if bad else None)
    few, narrow, good = make_values(3, 8), logpe.LogPosition(4, 4), logpe.LogPosition(4, 8)  # on each rank the same
    assert "power must have shape (4,), got (3,)" in refused(q, k, v, values=few if bad else call.values)
    assert "position was built for head_dim 4" in refused(q, k, v, values=narrow if bad else good)
    assert "key_mask must have shape" in refused(q, k, v, key_mask=torch.ones(1, k.shape[2] + bad))
    pages = torch.zeros(1, 1, dtype=torch.int32)
    assert "block_table must be None with context_parallel" in refused(q, k, v, block_table=pages)
    assert "backend must be one of" in refused(q, k, v, backend="cuda" if bad else "auto")
    assert "key_lengths must be from 0 to 19, got 20" in refused(q, k, v, key_lengths=torch.tensor([20]))
    assert "query_start is required" in refused(q, short, short)
    if parallel.method == "heads":
        text = refused(q, k, v, dropout_p=0.1)
        assert 'dropout_p must be 0 with context_parallel of method "heads", got 0.1' in text
    bounds = torch.tensor([0, 9, 20], dtype=torch.int32)
    lengths, x = (bounds, bounds, 11, 11), parallel.shard(torch.randn(19, 4, 8), 0)
    text = raised(lambda: log_attention_varlen(x, x, x, call.values, *lengths, context_parallel=parallel))
    assert text == "cu_seqlens_q must end at or before the 19 tokens of all ranks, got 20"
    assert "out_dtype must be None or torch.float32" in refused(
        q, k, v, error=TypeError, out_dtype=torch.float16 if bad else None
    )
    assert "sink must have shape (4,)" in refused(q, k, v, sink=torch.zeros(3 if bad else 4))
    if world > 1:
        assert "the use of sink must be the same" in refused(q, k, v, sink=torch.zeros(4) if bad else None)
        text = "window, with is_causal must be the same on all ranks, got (3, 3, False) on rank 0 and (4, 4, False)"
        assert text in refused(q, k, v, window=3 + bad)
        longer = torch.cat([q, q], 2) if bad else q
        assert "q must hold the tokens that shard() gives to each rank" in refused(longer, k, v, query_start=0)
        assert "x must hold the tokens that shard() gives" in raised(lambda: parallel.unshard(longer, 2))
        text = "head_dim of q and of v must be the same on all ranks, got (8, 8) on rank 0 and (8, 5)"
        assert text in refused(q, k, v[..., :5].contiguous() if bad else v)
        assert "what requires a gradient must be the same" in refused(q.clone().requires_grad_(bad), k, v)
        power = call.values.power * (1 + bad * torch.eye(4)[2])  # of one head, on one rank
        other = call.values._replace(power=power)
        text = raised(lambda: log_attention(q, k, v, other, context_parallel=parallel))
        assert text.startswith("position.power must be the same on all ranks, got values whose element 2 is ")
        # Where much differs, all ranks name the same first difference.
        doubled, other = [x.double() if bad else x for x in (q, k, v)], (good, logpe.LogPosition(4, 8, "alibi"))[bad]
        assert "must be the same on all ranks" in refused(*doubled, values=other, window=3 + bad)
    out = log_attention(q, k, v, call.values, context_parallel=parallel)
    torch.testing.assert_close(parallel.unshard(out, 2), log_attention(call.q, call.k, call.v, call.values))


def traffic(rank: int, world: int) -> None:
    """No more is sent than the module says, and a window saves most of it."""
    sent = [0]
    original = dist.batch_isend_irecv

    def counting(operations: list[Any]) -> Any:
        sent[0] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return original(operations)

    dist.batch_isend_irecv = counting
    try:
        for method, layout in itertools.product(("all-gather", "ring"), LAYOUTS):
            parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
            call = make_call(1, 4, 2, 64 * world, head_dim=8, lse_gradient=False)
            part = shard_call(parallel, call)
            own = part.k.nbytes + part.v.nbytes
            options = dict(context_parallel=parallel)
            leaves = [x.requires_grad_() for x in (part.q, part.k, part.v)]
            sent[0] = 0
            out = log_attention(*leaves, call.values, **options)
            assert sent[0] == own * (world - 1)  # to each other rank, once
            out.backward(part.dout)
            assert sent[0] == 3 * own * (world - 1)  # once more, and the gradients of theirs
            sent[0] = 0
            log_attention(*leaves, call.values, is_causal=True, **options)
            causal = torch.tensor(sent[0])
            dist.all_reduce(causal)
            assert int(causal) < own * (world - 1) * world or world == 1
            sent[0] = 0
            log_attention(*leaves, call.values, window=(3, 0), **options)
            chunks = 1 if layout == "contiguous" else 2
            assert sent[0] <= chunks * 3 * own // 64
    finally:
        dist.batch_isend_irecv = original


def checkpointing(rank: int, world: int) -> None:
    """Activation checkpointing of both kinds gives the same gradients."""
    from torch.utils.checkpoint import checkpoint

    if world != 2:
        return
    for method in METHODS:
        parallel = ContextParallel(dist.group.WORLD, method=method)
        part = shard_call(parallel, make_call(1, num_queries=15, is_causal=True))
        position = logpe.LogPosition(part.q.shape[1], part.q.shape[-1])
        leaves = [part.q.requires_grad_(), part.k.requires_grad_(), part.v.requires_grad_(), *position.parameters()]

        def attend(q: Tensor, k: Tensor, v: Tensor, *, position: Any = position, parallel: Any = parallel) -> Tensor:
            return log_attention(q, k, v, position, is_causal=True, context_parallel=parallel)

        results = []
        for options in (None, dict(use_reentrant=False), dict(use_reentrant=True)):
            out = attend(*leaves[:3]) if options is None else checkpoint(attend, *leaves[:3], **options)
            out.backward(part.dout)
            results.append([x.grad for x in leaves])
            for x in leaves:
                x.grad = None
        for others in zip(*results, strict=True):
            assert all(torch.equal(others[0], x) for x in others)


def mesh(rank: int, world: int) -> None:
    """One dimension of a mesh of data x context; a mesh of two is refused, and a group without this process."""
    from torch.distributed.device_mesh import init_device_mesh

    if world != 4:
        return
    group = dist.new_group([1, 2])
    if rank in (0, 3):
        with pytest.raises(ValueError, match="mesh must be a group that this process belongs to"):
            ContextParallel(group)
    else:
        assert ContextParallel(group).rank == rank - 1
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    with pytest.raises(ValueError, match=r'mesh must have one dimension, got 2: .*mesh\["context"\]'):
        ContextParallel(both)
    parallel = ContextParallel(both["context"], method="ring")
    assert (parallel.rank, parallel.size) == (rank % 2, 2)
    torch.manual_seed(rank // 2)
    call = make_call(1, num_queries=15, is_causal=True)
    actual = run(shard_call(parallel, call), "auto", torch.float64)
    for name, x in part_of(parallel, call, run(call, "reference", torch.float64)).items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-11)


def modules(rank: int, world: int) -> None:
    """LogAttention and swapped attention: same outputs and, summed or averaged by DDP, same gradients."""
    from torch import nn

    for causal in (True, False):
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        logpe.replace_attention(encoder, "log-invariant", position_options={"query_gain": causal}, sink=causal)
        parallel = ContextParallel(dist.group.WORLD, method="ring", reduction="mean")
        across = copy.deepcopy(encoder)
        for module in across.modules():
            if isinstance(module, logpe.LogAttention):
                module.context_parallel = parallel
        x = torch.randn(2, 24, 16)
        padding = torch.arange(24) >= torch.tensor([[24], [17]])
        options: dict[str, Any] = dict(is_causal=causal, mask=torch.ones(24, 24).triu(1).bool() if causal else None)
        expected = encoder(x, src_key_padding_mask=padding, **options)
        if causal:
            options["mask"] = options["mask"][: 24 // world, : 24 // world]
        own = nn.parallel.DistributedDataParallel(across)
        out = own(parallel.shard(x, 1), src_key_padding_mask=parallel.shard(padding, 1), **options)
        torch.testing.assert_close(out, parallel.shard(expected, 1), rtol=1e-4, atol=1e-5)
        expected.square().mean().backward()
        out.square().mean().backward()
        for (name, p), q in zip(encoder.named_parameters(), across.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)
            assert all_equal(q.grad)

    plain = nn.ModuleList([nn.MultiheadAttention(16, 4)])
    logpe.replace_attention(plain, "log-bias-rope", context_parallel=parallel)
    attention = plain[0]
    assert isinstance(attention, logpe.LogAttention)
    x = torch.randn(9, 1, 16)
    part = parallel.shard(x, 0)
    out = attention(part, part, part, need_weights=False, is_causal=True)[0]
    again = copy.deepcopy(plain)[0]
    assert again.context_parallel is parallel
    again.context_parallel = None
    expected = again(x, x, x, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(out, parallel.shard(expected, 0), rtol=1e-4, atol=1e-5)
    assert "need_weights must be False" in raised(lambda: attention(part, part, part))
    some = torch.zeros(len(part), len(part))
    assert "attn_mask must be None" in raised(lambda: attention(part, part, part, need_weights=False, attn_mask=some))
    wrong = torch.randn(len(part), 1, 15 if rank == world - 1 else 16)
    text = raised(lambda: attention(wrong, wrong, wrong, need_weights=False, is_causal=True))
    assert text.startswith("query must have 16 features, got shape ")
    with pytest.raises(TypeError, match="ContextParallel cannot be pickled"):
        pickle.dumps(attention)
    with pytest.raises(ValueError, match="add_bias_kv must be False with context_parallel"):
        logpe.LogAttention(16, 4, add_bias_kv=True, position=None, context_parallel=parallel)
    with pytest.raises(TypeError, match="context_parallel must be a ContextParallel or None, got int"):
        logpe.LogAttention(16, 4, context_parallel=2)


def sharded(rank: int, world: int) -> None:
    """FSDP2 over data x context, with uneven lengths: the gradients are those of the mean over all tokens."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world != 4:
        return
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    parallel = ContextParallel(both["context"], reduction="mean")
    alone = nn.ModuleList([logpe.LogAttention(16, 4, batch_first=True, num_kv_heads=2, position="log-invariant")])
    across = copy.deepcopy(alone)
    across[0].context_parallel = parallel
    fully_shard(across[0], mesh=both[("data", "context")]._flatten("all"))
    x = torch.randn(2, 1, 13, 16)

    def loss(model: nn.ModuleList, x: Tensor) -> Tensor:
        return model[0](x, x, x, need_weights=False, is_causal=True)[0].square().sum() / (13 * 16)

    (loss(across, parallel.shard(x[rank // 2], 1)) * parallel.size).backward()
    ((loss(alone, x[0]) + loss(alone, x[1])) / 2).backward()
    for p, q in zip(alone.parameters(), across.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6)


def tokens_and_heads(rank: int, world: int) -> None:
    """Context x tensor parallelism, and FSDP2 over data x tensor parallelism: outputs and gradients of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    if world != 4:
        return
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "tensor"))
    for other in ("context", "data"):
        alone = logpe.LogAttention(16, 4, batch_first=True, num_kv_heads=2, position="log-invariant")
        heads = parallelize_module(copy.deepcopy(alone), both["tensor"], logpe.HeadParallel())
        x = torch.randn(2, 13, 16)
        expected = alone(x, x, x, need_weights=False, is_causal=True)[0]
        expected.square().sum().backward()
        if other == "context":
            heads.context_parallel = parallel = ContextParallel(both["other"])
            own, expected = parallel.shard(x, 1), parallel.shard(expected, 1)
        else:
            fully_shard(heads, mesh=both["other"])
            own = x[rank // 2 :][:1]
            expected = expected[rank // 2 :][:1]
        out = heads(own, own, own, need_weights=False, is_causal=True)[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.square().sum().backward()
        for (name, p), q in zip(alone.named_parameters(), heads.parameters(), strict=True):
            gradient = q.grad.full_tensor()
            if other == "data":
                gradient = 2 * gradient  # FSDP takes the mean
            elif not name.startswith("position."):
                dist.all_reduce(gradient, group=both["other"].get_group())
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def caches(rank: int, world: int) -> None:
    """A prompt across ranks, then token by token: the results of one cache, the same bits on every rank."""
    for preset, window, prompt, dtype in [
        ("log-bias-rope", None, 21, torch.float64),
        ("log-invariant", 9, 13, torch.float64),
        ("log-rotary", None, 1, torch.float32),
    ]:
        for method, layout in (WAYS[0], WAYS[3], WAYS[4]):
            parallel = ContextParallel(dist.group.WORLD, method=method, layout=layout)
            values = make_values(4, 8, preset, query_gain=True)
            start = torch.tensor([0, -3])
            steps = [prompt, 1, 3, 1, 1, 4]
            sizes = 8, 8 if window is None else 5  # of keys and values
            options: dict[str, Any] = dict(window=window, key_start=start, value_dim=sizes[1], dtype=dtype)
            whole = logpe.KVCache(2, 2, sum(steps), 8, values, **options)
            capacity = max(-(-sum(steps) // world), len(parallel.positions(prompt)) + 1, 8)
            across = logpe.KVCache(2, 2, capacity, 8, values, context_parallel=parallel, **options)
            for turn in range(2):
                for number, count in enumerate(steps):
                    q = torch.randn(2, 4, count, 8, dtype=dtype)
                    k, v = (torch.randn(2, 2, count, size, dtype=dtype) for size in sizes)
                    sink = torch.randn(2, 4, count) if turn else None
                    out, lse = whole.attend(q, k, v, sink=sink, return_lse=True)
                    if number == 0:
                        q, k, v, out, lse = (parallel.shard(x, 2) for x in (q, k, v, out, lse))
                        sink = None if sink is None else parallel.shard(sink, 2)
                    actual, actual_lse = across.attend(q, k, v, sink=sink, return_lse=True)
                    bound = 1e-12 if dtype == torch.float64 else 1e-5
                    torch.testing.assert_close(actual, out, rtol=0, atol=bound)
                    torch.testing.assert_close(actual_lse, lse, rtol=0, atol=10 * bound)
                    assert number == 0 or all_equal(actual)
                    assert torch.equal(across.lengths, whole.lengths)
                    if count == 3:
                        for cache in (whole, across):
                            cache.crop(cache.lengths - 2)
                            cache.reorder([1, 0])
                for cache in (whole, across):
                    cache.reset(key_start=turn)
    parallel = ContextParallel(dist.group.WORLD)
    cache = logpe.KVCache(1, 2, 4, 8, context_parallel=parallel)
    x = torch.randn(1, 2, 4 * world, 8)
    part = parallel.shard(x, 2)
    assert "q must have shape" in raised(lambda: cache.attend(part[..., : 7 if rank == 0 else 8], part, part))
    assert "lengths must be None with context_parallel" in raised(lambda: cache.attend(part, part, part, [1]))
    cache.attend(part, part, part)
    one = torch.randn(1, 2, 1, 8)
    assert "the cache is full" in raised(lambda: cache.attend(one, one, one))
    cache.crop(4 * world - 1)
    assert "scale must be finite" in raised(lambda: cache.attend(one, one, one, scale=float("inf")))
    assert cache.lengths.item() == 4 * world - 1
    assert cache.attend(one, one, one).shape == one.shape
    with pytest.raises(ValueError, match="append must not be called with context_parallel"):
        cache.append(one, one)
    with pytest.raises(ValueError, match="context_parallel must be None for a PagedKVCache"):
        logpe.PagedKVCache(1, 2, 64, 8, context_parallel=parallel)


def transformers(rank: int, world: int) -> None:
    """A converted Llama: the logits of all tokens, and the gradients of the mean loss."""
    if world != 2:  # the import takes longer than the test
        return
    from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

    from logpe.transformers import set_context_parallel, use_log_position

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    parallel = ContextParallel(dist.group.WORLD)
    alone = use_log_position(LlamaForCausalLM(config))
    across = copy.deepcopy(alone)
    set_context_parallel(across, parallel)
    tokens = torch.randint(50, (2, 19))
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    expected = alone(tokens, labels=tokens, use_cache=False)
    own, labels = parallel.shard(tokens, 1), parallel.shard(shifted, 1)
    out = across(own, labels=own, shift_labels=labels, num_items_in_batch=2 * 18, use_cache=False)
    torch.testing.assert_close(out.logits, parallel.shard(expected.logits, 1), rtol=1e-4, atol=1e-5)
    expected.loss.backward()
    out.loss.backward()
    for (name, p), q in zip(alone.named_parameters(), across.parameters(), strict=True):
        if "log_position" not in name:
            dist.all_reduce(q.grad)
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6)
    bounds = torch.tensor([0, 4, 13, 19])  # of packed sequences: those of the whole row
    packed = dict(cu_seq_lens_q=bounds, max_length_q=9)
    expected = alone(tokens[:1], **packed).logits
    torch.testing.assert_close(across(own[:1], **packed).logits, parallel.shard(expected, 1), rtol=1e-4, atol=1e-5)
    computes = MptForCausalLM(MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=2))  # with its mask
    expected = use_log_position(computes, "alibi")(tokens).logits
    set_context_parallel(computes, parallel)
    torch.testing.assert_close(computes(own).logits, parallel.shard(expected, 1), rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(own)
    torch.testing.assert_close(across(own, attention_mask=mask).logits, out.logits)
    if rank == 0:
        mask[0, 0] = 0
    assert "attention_mask must be None with context_parallel" in raised(lambda: across(own, attention_mask=mask))
    assert "position_ids must be None" in raised(lambda: across(own, position_ids=torch.arange(own.shape[1])[None]))
    cache = across(own, use_cache=True).past_key_values
    assert "past_key_values must be None" in raised(lambda: across(own[:, :1], past_key_values=cache))
    with pytest.raises(ValueError, match="keep_positions must be False with context_parallel"):
        use_log_position(LlamaForCausalLM(config), "none", keep_positions=True, context_parallel=parallel)
    fully_sharded(alone, tokens)
    with pytest.raises(TypeError, match="context_parallel must be a ContextParallel or None, got str"):
        use_log_position(LlamaForCausalLM(config), context_parallel="cp")
    with pytest.raises(ValueError, match="model must have log positions"):
        set_context_parallel(LlamaForCausalLM(config), parallel)


def fully_sharded(alone: Any, tokens: Tensor) -> None:
    """FSDP2 over a converted model, packed: the gradients of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    position_ids = (torch.arange(tokens.shape[1]) % 7)[None]
    across = copy.deepcopy(alone)
    alone.zero_grad()
    across.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in across.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(across, mesh=mesh)
    own = tokens[dist.get_rank() :][:1]
    across(own, labels=own, position_ids=position_ids).loss.backward()
    sum(alone(row, labels=row, position_ids=position_ids).loss / 2 for row in tokens.split(1)).backward()
    for p, q in zip(alone.parameters(), across.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6)


CASES = (
    sharding, presets, lengths, windows, grouped_heads, starts, dropout, packed, sinks, dtypes, pooled, kernels,
    gradients_of_some, repeats, errors, traffic, checkpointing, mesh, modules, sharded, tokens_and_heads, caches,
    transformers,
)  # fmt: skip


def main(rank: int, world: int, rendezvous: str, only: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case in CASES if world > 1 else (sharding, packed, errors, modules, caches):
        if only in case.__name__:
            digest = hashlib.sha256(
                f"{os.environ.get('LOGPE_TEST_SEED', '0')} {case.__name__} {world}".encode()
            ).digest()
            torch.manual_seed(int.from_bytes(digest[:4], "big"))
            random.seed(digest[:4])
            start = time.perf_counter()
            case(rank, world)
            print(f"{case.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.barrier()  # see logpe.lm.train.World
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
