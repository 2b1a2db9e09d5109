"""The decode kernels, pages and all, against the float64 reference, and against the forward kernel."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HALF, Call, check, make_call, make_packed_call, make_values
from torch import Tensor

import logpe
from logpe import log_attention
from logpe.clock import Repeats
from logpe.command import TIME_IS_OVER
from logpe.worker import Failed, Worker

pytest.importorskip("triton")

from logpe_kernels import decode, plan
from logpe_kernels.configs import Config
from logpe_kernels.options import Options
from test_kernels import FEATURES, build

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
ROOT = Path(__file__).parent.parent
DTYPES = (*HALF, torch.float32)
NAN = float("nan")
PRESETS = [dict(preset=preset, query_gain=gain) for preset in logpe.PRESETS for gain in (False, True)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every call comes here however short, in tiles of 16 keys and 3 splits; what was launched."""
    seen: list[Any] = []
    launch = decode.decode

    def record(*arguments: Any) -> None:
        seen.append(arguments)
        launch(*arguments)

    plan.clear()
    monkeypatch.setattr(decode, "decode", record)
    monkeypatch.setattr(decode, "serves", lambda plan, options: options.dropout_p == 0)
    monkeypatch.setattr(decode, "tiles", lambda *sizes: Config(16, 16, 4, 1))
    monkeypatch.setattr(decode, "num_splits", lambda *sizes: 3)
    yield seen
    plan.clear()


def paged(call: Call, page_size: int = 16, spare: int = 3) -> Call:
    """The same call with its keys in shuffled pages. What belongs to nobody is NaN, and so is the end of a page."""
    batch, kv_heads, num_keys, _ = call.k.shape
    max_pages = -(-num_keys // page_size)
    order = torch.randperm(batch * max_pages + spare)[: batch * max_pages].view(batch, max_pages)
    table = order.to(call.k.device, torch.int32)
    pools = []
    for x in (call.k, call.v):
        padded = torch.nn.functional.pad(x, (0, 0, 0, max_pages * page_size - num_keys), value=NAN)
        pool = x.new_full((batch * max_pages + spare, kv_heads, page_size, x.shape[-1]), NAN)
        pool[table.long()] = padded.unflatten(2, (max_pages, page_size)).transpose(1, 2)
        pools.append(pool)
    options = {"key_lengths": torch.full((batch,), num_keys, device=call.k.device), **call.options}
    return call.replace(k=pools[0], v=pools[1], options=options | dict(block_table=table))


def forward(call: Call, backend: str = "triton", **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        options = call.options | options
        return log_attention(call.q, call.k, call.v, call.values, backend=backend, return_lse=True, **options)


def check_forward(call: Call, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the kernels, within the bounds of helpers.Reference that need no gradient."""
    dtype = call.q.dtype
    exact = forward(call.replace(q=call.q.double(), k=call.k.double(), v=call.v.double()), "reference", **options)
    eager, actual = forward(call, "reference", **options), forward(call, **options)
    largest_lse = float(exact[1].nan_to_num(0, 0, 0).abs().max()) if exact[1].numel() else 0.0
    factor, allowance = (1.1, 1.0) if dtype in HALF else (2.0, 2 * (1 + largest_lse))
    for x, e, y in zip(exact, eager, actual, strict=True):
        seen = x.isfinite()
        assert torch.equal(y[~seen].double(), x[~seen].double())
        if seen.any():
            error, eager_error, size = (z[seen].abs().max() for z in (y - x, e - x, x))
            assert error <= factor * eager_error + torch.finfo(dtype).eps * allowance * size
    return actual


# --- against the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(3))
def test_random_combination(draw: int, launches: list[Any], device: torch.device) -> None:
    """Everything that the forward kernel is tested with, gradients of the ordinary backward included."""
    features = {name: random.choice(levels) for name, levels in FEATURES.items()} | dict(dropout=0.0)
    try:
        check(build(features, device))
    except AssertionError as error:
        raise AssertionError(f"{features}: {error}") from error
    assert launches


@pytest.mark.parametrize("options", PRESETS, ids=lambda x: x["preset"] + "-gain" * x["query_gain"])
def test_presets_and_pages(options: dict[str, Any], launches: list[Any], device: torch.device) -> None:
    """A group of query heads on one tile; two tiles of rows; ragged lengths, left padding and a window."""
    values = make_values(6, 24, **options, gain_length=20, device=device)
    call = make_call(
        2, 6, 2, 6 if options["query_gain"] else 1, 83, 24, value_dim=random.choice((24, 40, 7)), values=values,
        dtype=random.choice(DTYPES), device=device, is_causal=True, query_start=torch.tensor([80, 40], device=device),
        key_start=torch.tensor([0, -5], device=device), key_lengths=torch.tensor([83, 50], device=device),
        window=random.choice((None, 37)),
    )  # fmt: skip
    out, lse = check_forward(call)
    assert len(launches) == 1
    if values.theta is None:
        paged_out, paged_lse = check_forward(paged(call))
        assert torch.equal(paged_out, out)
        assert torch.equal(paged_lse, lse)


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_sizes(page_size: int, dtype: torch.dtype, launches: list[Any], device: torch.device) -> None:
    call = make_call(
        3, 2, 1, 2, 100, 16, dtype=dtype, device=device, is_causal=True,
        query_start=torch.tensor([98, 20, 70], device=device), key_lengths=torch.tensor([100, 22, 0], device=device),
    )  # fmt: skip
    out, lse = check_forward(paged(call, page_size))
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()
    assert len(launches) == 1


def test_pages_with_a_key_mask_and_other_strides(launches: list[Any], device: torch.device) -> None:
    """Pools of (num_pages, page_size, Hkv, D), as others keep them, come transposed."""
    call = paged(make_call(2, 4, 2, 3, 64, 16, dtype=torch.float16, device=device, is_causal=True, query_start=61))
    call.options["key_mask"] = torch.rand(2, 64, device=device) < 0.5
    call = call.replace(k=call.k.transpose(1, 2).contiguous().transpose(1, 2))
    check_forward(call)
    call.options["key_mask"] = torch.randn(2, 64, device=device)
    check_forward(call)


@pytest.mark.parametrize("backend", ["triton", "blocked", "reference"])
def test_entries_that_are_no_page_hold_no_keys(backend: str, launches: list[Any], device: torch.device) -> None:
    call = paged(make_call(2, 4, 2, 3, 64, 16, device=device, is_causal=True, query_start=61), spare=0)
    table = call.options["block_table"]
    hidden = torch.ones(2, 64, dtype=torch.bool, device=device)
    for (b, entry), page in {(0, 1): -1, (0, 3): len(call.k), (1, 0): 2**31 - 1, (1, 2): -(2**31)}.items():
        table[b, entry] = page
        hidden[b, 16 * entry : 16 * (entry + 1)] = False
    if backend == "blocked" and device.type != "cpu":
        pytest.skip("runs on the CPU")
    out, lse = forward(call, backend)
    good = paged(make_call(2, 4, 2, 3, 64, 16, device=device), spare=0).options["block_table"]
    good = table.where((table >= 0) & (table < len(call.k)), 0).to(good.dtype)
    expected = forward(call, "reference", block_table=good, key_mask=hidden)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("backend", ["triton", "blocked", "reference"])
def test_a_table_without_pages_holds_no_keys(backend: str, launches: list[Any], device: torch.device) -> None:
    if backend == "blocked" and device.type != "cpu":
        pytest.skip("runs on the CPU")
    call = make_call(2, 4, 2, 3, 16, 16, device=device, is_causal=True, query_start=0)
    out, lse = forward(call, backend, block_table=torch.zeros(2, 0, dtype=torch.int32, device=device))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_packed(launches: list[Any], device: torch.device) -> None:
    for value_dim in (16, 24):
        sizes = dict(outside=3, kv_heads=2, value_dim=value_dim)
        check(make_packed_call([1, 3, 0, 2], [40, 3, 8, 17], **sizes, is_causal=True, device=device))
    assert launches


def test_what_nobody_sees_may_hold_anything(launches: list[Any], device: torch.device) -> None:
    call = make_call(
        2, 4, 2, 2, 60, 16, device=device, is_causal=True, query_start=torch.tensor([48, -1], device=device),
        key_start=torch.tensor([0, -10], device=device), key_lengths=torch.tensor([50, 60], device=device), window=30,
        key_mask=torch.arange(60, device=device).expand(2, 60) != 40,
    )  # fmt: skip
    out, lse = forward(call)
    for x in (call.k, call.v):
        x[:, :, 40] = NAN
        x[0, :, 50:] = x[0, :, :18] = x[1, :, :10] = x[1, :, 11:] = NAN
    call.q[1, :, 0] = NAN
    for x, y in zip(forward(call), (out, lse), strict=True):
        assert torch.equal(x, y)
    assert (out[1, :, 0] == 0).all()
    assert (lse[1, :, 0] == -torch.inf).all()


def test_head_dims(launches: list[Any], device: torch.device) -> None:
    for head_dim, value_dim in ((1, 1), (40, 40), (256, 256), (16, 8), (24, 40), (192, 128), (32, 64)):
        dtype = random.choice(DTYPES)
        options: dict[str, Any] = dict(value_dim=value_dim, dtype=dtype, device=device, is_causal=True, query_start=32)
        call = make_call(1, 2, 1, 1, 33, head_dim, **options)
        assert check_forward(call)[0].shape[-1] == value_dim
        check_forward(paged(call))


# --- splits -------------------------------------------------------------------------------------------------------


def test_the_number_of_splits_is_a_matter_of_rounding(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """One split, some, and more than there are tiles, of which the last are empty."""
    call = make_call(
        2, 2, 1, 1, 90, 16, device=device, is_causal=True, query_start=torch.tensor([89, 30], device=device),
        key_lengths=torch.tensor([90, 31], device=device),
    )  # fmt: skip
    results = []
    monkeypatch.setattr(decode, "BLOCK_S", 2)  # so that the merge, too, takes several steps
    for splits in (1, 2, 5, 17):
        monkeypatch.setattr(decode, "num_splits", lambda *sizes, splits=splits: splits)
        results.append(check_forward(call))
    for out, lse in results[1:]:
        torch.testing.assert_close((out, lse), results[0], rtol=1e-5, atol=1e-6)


def test_the_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    cpu = torch.device("cpu")
    assert decode.num_splits(8, 128 * 1024, 64, cpu) == 33  # one wave of two programs on each multiprocessor
    assert decode.num_splits(8, 1024, 64, cpu) == 8  # two tiles to a split
    assert decode.num_splits(1000, 128 * 1024, 64, cpu) == 1
    assert decode.num_splits(0, 0, 64, cpu) == 1


@pytest.mark.parametrize(
    ("options", "tiles"),
    [(dict(query_start=39, key_lengths=[40]), 3), (dict(window=30), 2), (dict(query_start=-1), 0)],
    ids=("short", "window", "no query"),
)
def test_hidden_keys_take_no_time(
    options: dict[str, Any],
    tiles: int,
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """A long cache with few tokens in it, and a window: splits deal out what is seen, not what there is room for."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counts the interpreter's products")
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    real = InterpreterBuilder.create_dot

    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal products
        products += 1
        return real(*args, **keywords)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    if "key_lengths" in options:
        options = options | dict(key_lengths=torch.tensor(options["key_lengths"]))
    forward(make_call(1, 2, 1, 1, 2048, 16, device=device, is_causal=True, **options))
    assert products == 2 * tiles


# --- which calls come here ------------------------------------------------------------------------------------------


def test_few_queries_over_many_keys_come_here(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    seen = []
    monkeypatch.setattr(decode, "decode", lambda q, k, v, out, *rest: seen.append(q) or out.zero_())

    def comes(**sizes: Any) -> bool:
        seen.clear()
        options = dict(heads=2, kv_heads=1, num_queries=1, num_keys=512, head_dim=8, device=device, is_causal=True)
        forward(make_call(1, **options | sizes))
        return bool(seen)

    assert comes()
    assert comes(num_queries=64)
    assert not comes(num_queries=65)
    assert not comes(num_keys=511, num_queries=1)
    assert not comes(dropout_p=0.5)
    # Many heads that fill the GPU, and rows that fill the forward kernel's tiles.
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 1)
    assert comes(num_queries=32)
    assert not comes(num_queries=33)


def test_out_and_lse_serve_the_ordinary_backward(device: torch.device) -> None:
    """Check decoding with the shipped tiles and splits."""
    check(make_call(1, 4, 2, 2, 530, 16, preset="log-rotary-bias", device=device, is_causal=True))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (dict(block_table=[[0]]), TypeError, "block_table must be an int32 or int64 tensor, got list"),
        (dict(block_table=torch.zeros(2, 3)), TypeError, "block_table must be .* got torch.float32"),
        (dict(block_table=torch.zeros(3, 3).int()), ValueError, r"shape \(2, max_pages\), got \(3, 3\)"),
        (dict(k=torch.zeros(4, 2, 24, 8)), ValueError, r"page of \(16, .* got \(4, 2, 24, 8\)"),
        (dict(k=torch.zeros(0, 2, 16, 8)), ValueError, "at least one page"),
        (dict(position=make_values(4, 8, "log-rotary")), ValueError, "without a rotation .* logpe.rotate"),
        (dict(dropout_p=0.1), ValueError, "dropout_p must be 0 where there is a block_table, got 0.1"),
        (dict(key_lengths=torch.tensor([5, 49])), ValueError, "key_lengths must be from 0 to 48"),
        (dict(query_start=None), ValueError, "query_start is required for 1 queries and 48 keys with key_lengths"),
    ],
)
def test_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(
        q=torch.randn(2, 4, 1, 8), k=torch.randn(4, 2, 16, 8), position=make_values(4, 8), is_causal=True,
        query_start=4, key_lengths=torch.tensor([5, 5]), block_table=torch.zeros(2, 3, dtype=torch.int64),
    )  # fmt: skip
    arguments |= changes
    with pytest.raises(kind, match=message):
        log_attention(v=arguments["k"], **arguments)


def test_no_gradient_through_pages(device: torch.device) -> None:
    call = paged(make_call(1, 2, 1, 1, 16, 8, device=device, is_causal=True, query_start=15))
    q = call.q.requires_grad_()
    for backend in ("triton", "blocked")[: 2 if device.type == "cpu" else 1]:
        out = log_attention(q, call.k, call.v, call.values, backend=backend, **call.options)
        with pytest.raises(RuntimeError, match="block_table has no gradient"):
            out.sum().backward()
    out = log_attention(q, call.k, call.v, call.values, backend="reference", **call.options)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_opcheck(backend: str, device: torch.device) -> None:
    """Pages in the operator's schema and fake kernel."""
    if backend == "blocked" and device.type != "cpu":
        pytest.skip("runs on the CPU")
    call = paged(make_call(1, 2, 1, 1, 16, 8, device=device))
    q, *pools = (x.nan_to_num() for x in (call.q, call.k, call.v))
    given = dict(block_table=call.options["block_table"], scale=0.5, max_seqlen_q=1, max_seqlen_k=16, dropout_p=0.0)
    given |= dict(query_start=15, key_start=0, rotary_scale=1.0, gain_length=512.0)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.logpe.attention.default, (q, *pools, *Options(**given), backend), test_utils=tests)


# --- compiled -------------------------------------------------------------------------------------------------------

COMPILE = """
import dataclasses, functools, json, sys
import torch
import logpe_kernels
from bench.speed import compile_report
from logpe import LogPosition

def call(case, preset):
    name, queries = case.feature.split("+")
    meta = functools.partial(torch.empty, device="meta", dtype=getattr(torch, case.dtype))
    position = LogPosition(8, case.head_dim, preset.removesuffix("+gain"), query_gain="+" in preset, device="meta")
    options = position()._asdict()
    keys = meta(2, 2, 1024, case.head_dim)
    if name == "paged":
        keys = meta(40, 2, 64, case.head_dim)
        options["block_table"] = meta(2, 16, dtype=torch.int32)
    for name in ("query_starts", "key_starts", "key_lengths"):
        options[name] = meta(2, dtype=torch.int32)
    q = meta(2, 8, int(queries), case.head_dim)
    options |= dict(scale=1.0, window_right=0, max_seqlen_q=q.shape[2], max_seqlen_k=1024)
    logpe_kernels.attention(q, keys, keys, logpe_kernels.Options(**options))

compile_report.call = call
rows = []
for target, (dtype, head_dim, preset, feature) in zip(compile_report.TARGETS, json.loads(sys.argv[1]), strict=True):
    case = compile_report.Case(target, dtype, head_dim, (preset,), "causal", feature)
    rows += [dataclasses.asdict(r) | dict(failures=list(r.failures(None))) for r in compile_report.compile_case(case)]
print(json.dumps(rows))
"""


def test_compiles_for_every_target() -> None:
    """Nothing spills, shared memory suffices, and loads are pipelined: two pairs of tiles are held at once.

    One case for each target; ``bench.speed.compile_report`` has more.
    """
    cases = [
        ("bfloat16", 128, "log-bias", "dense+1"),
        ("float16", 256, "log-invariant+gain", "paged+1"),
        ("bfloat16", 128, "log-invariant+gain", "paged+8"),
        ("bfloat16", 64, "log-bias", "paged+1"),
        ("float32", 128, "log-bias", "dense+1"),
        ("bfloat16", 256, "log-bias", "dense+16"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["kernel"] for row in rows} == {"decode", "merge"}
    for row in rows:
        assert row["failures"] == [], row
        assert row["spill"] == 0, row
        if row["kernel"] == "decode" and row["dtype"] != "float32" and row["target"].startswith("sm_"):
            tile = 2 * row["config"]["BLOCK_N"] * row["head_dim"]
            assert row["shared"] >= 4 * tile, row


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", [None, 16, 64, 256])
@pytest.mark.parametrize("queries", [1, 7, 64])
def test_real_sizes(queries: int, pages: int | None, dtype: torch.dtype, device: torch.device) -> None:
    for head_dim, preset in ((64, "log-bias"), (128, "log-invariant"), (256, "none")):
        starts = torch.tensor([8192 - queries, 3000, -1], device=device)
        call = make_call(
            3, 16, 4, queries, 8192, head_dim, preset=preset, query_gain=True, dtype=dtype, device=device,
            is_causal=True, query_start=starts, key_lengths=(starts + queries).clamp(min=0),
        )  # fmt: skip
        check_forward(call if pages is None else paged(call, pages))


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """Captured once; replayed with other lengths in the same tensors, the launch is still right."""
    call = make_call(2, 8, 2, 1, 4096, 64, dtype=torch.float16, device=device, is_causal=True)
    lengths = torch.tensor([4096, 100], device=device, dtype=torch.int32)
    call.options.update(query_start=lengths - 1, key_lengths=lengths)
    forward(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = forward(call)
    for new in ([17, 4000], [1, 1], [0, 4096]):
        lengths.copy_(torch.tensor(new))
        call.options["query_start"].copy_(lengths - 1)
        graph.replay()
        expected = forward(call)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_the_same_bits_200_times(device: torch.device) -> None:
    call = make_call(1, 8, 2, 3, 20_000, 128, dtype=torch.bfloat16, device=device, is_causal=True)
    out, lse = forward(call)
    for _ in range(200):
        again = forward(call)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.gpu
def test_no_compilation_as_the_length_changes(device: torch.device) -> None:
    call = make_call(1, 8, 2, 1, 9000, 64, dtype=torch.float16, device=device, is_causal=True)

    def compiled() -> list[int]:
        kernels = decode.decode_kernel, decode.merge_kernel
        return [len(kernel.device_caches[device.index or 0][0]) for kernel in kernels]

    forward(call)
    before = compiled()
    for n in (512, 777, 1024, 5001, 8192):
        forward(call.replace(k=call.k[:, :, :n], v=call.v[:, :, :n]))
    assert compiled() == before


# --- bench.speed.decode ---------------------------------------------------------------------------------------------


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, plot and resuming; a method that fails is a row that says so; each setting has its own table."""
    pytest.importorskip("matplotlib")
    from bench.speed import decode as bench

    def call(worker: Worker, function: Any, case: bench.Case, *, seconds: float) -> dict[str, Any]:
        asked.append(case)
        if case.method == "flex":
            raise Failed("no such kernel")
        return function(case)  # in this process, which is warm

    asked: list[Any] = []
    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(bench, "REPEATS", Repeats(seconds=0, at_least=2, at_most=2, longest=60))
    command = ["--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--out", str(tmp_path)]
    assert bench.main([*command, "--lengths", "100"]) == 0
    assert bench.main([*command, "--lengths", "100", "--minutes", "0"]) == 0  # nothing is missing
    assert [case.method for case in asked] == list(bench.METHODS)
    assert bench.main([*command, "--lengths", "100", "33", "--minutes", "0"]) == TIME_IS_OVER
    assert bench.main([*command, "--lengths", "100", "33", "--methods", "none"]) == 0
    assert [case.length for case in asked] == [100] * len(bench.METHODS) + [33]
    (run,) = bench.BENCH.read(tmp_path / "decode-cpu.json")
    assert {row["method"] for row in run.points} == set(bench.METHODS)
    for row in run.points:
        assert row.get("missing") == "no such kernel" if row["method"] == "flex" else row["p50"] > 0
    assert (tmp_path / "decode-cpu.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "no such kernel" in printed
    assert "100%" in printed
    assert bench.main([*command, "--batch", "2", "--lengths", "33", "--methods", "none"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("\nbatch 1, 4 query and 2 key heads of 16, float32\n") < printed.index("\nbatch 2, ")
    assert bench.main([*command, "--report"]) == 0
    assert printed.startswith(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        bench.main([*command, "--heads", "3"])


def test_the_benchs_methods_agree() -> None:
    from bench.speed import decode as bench

    case = bench.Case("", 130, 2, 4, 2, 16, "float32", "cpu")
    with torch.no_grad():
        outs = {name: prepare(bench.make_inputs(case))() for name, prepare in bench.METHODS.items() if name != "flex"}
    torch.testing.assert_close(outs["log-bias-paged"], outs["log-bias"])
    torch.testing.assert_close(outs["sdpa"], outs["none"])
    assert not torch.allclose(outs["none"], outs["log-bias"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["log-bias", "log-bias-paged", "none", "sdpa", "copy"])
def test_bench_on_a_gpu(name: str) -> None:
    from bench.speed import decode as bench

    row = bench.measure(bench.Case(name, 1024, 2, 8, 2, 64, "bfloat16", "cuda:0"))
    assert 0 < row["p20"] <= row["p50"] <= row["p80"] < 1e4
    assert row["repeats"] >= 10
