"""Test the CPU backend against eager attention in float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import PARAMETERS, Call, make_call, make_packed_call, make_values, presets_of, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logpe_kernels.options import Options
from torch import Tensor

from logpe import PRESETS, blocked, log_attention

NAN, INF = math.nan, math.inf


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many tiles of few tokens: several blocks of rows, and several groups of heads."""
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 8)
    monkeypatch.setattr(blocked, "TILE_ELEMENTS", 2**9)


def assert_exact(call: Call) -> None:
    """Assert equality in float64, where the two differ in the order of summation alone."""
    actual, expected = (run(call, backend, torch.float64) for backend in ("blocked", "reference"))
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# --- features -------------------------------------------------------------------------------------------------

BATCH, NUM_QUERIES, NUM_KEYS = 3, 19, 23  # B != H, odd sizes
FEATURES: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "window": dict(window=(6, 2)),
    "left-window": dict(window=(5, None)),
    "late-queries": dict(query_start=7),
    "early-keys": dict(key_start=-4),
    "starts": dict(query_start=torch.tensor([-3, 2, 30]), key_start=torch.tensor([0, -5, 3])),
    "key-lengths": dict(key_lengths=torch.tensor([23, 0, 11])),
    "key-mask": dict(key_mask=torch.arange(BATCH * NUM_KEYS).view(BATCH, NUM_KEYS) % 5 > 1),
    "hidden-start": dict(key_mask=torch.arange(NUM_KEYS).expand(BATCH, -1) > torch.tensor([[3], [NUM_KEYS], [9]])),
    "key-bias": dict(key_mask=torch.linspace(-2, 2, BATCH * NUM_KEYS).view(BATCH, NUM_KEYS)),
    "dropout": dict(dropout_p=0.3, dropout_seed=torch.tensor([2**40 + 77])),
    "context": dict(context_length=torch.tensor([5, 600, -4])),
    "scale": dict(scale=0.7),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(FEATURES, 2)))
@pytest.mark.usefixtures("small_tiles")
def test_features_and_their_pairs(first: str, second: str) -> None:
    options = dict(query_start=0) | FEATURES[first] | FEATURES[second]
    number = list(FEATURES).index(first) + 2 * list(FEATURES).index(second)
    heads, kv_heads = ((2, 2), (4, 2), (6, 1))[number % 3]
    values = make_values(heads, 6, PRESETS[number % len(PRESETS)], query_gain=True)
    sizes = BATCH, heads, kv_heads, NUM_QUERIES, NUM_KEYS, 6
    assert_exact(make_call(*sizes, value_dim=(6, 3, 10)[number // 3 % 3], values=values, **options))


STEPS: list[dict[str, Any]] = [
    dict(query_start=torch.tensor([9, 0, 22])),
    dict(query_start=torch.tensor([9, -1, 30]), key_start=torch.tensor([-3, 0, 8])),
    dict(query_start=40, key_lengths=torch.tensor([23, 0, 11]), is_causal=False),
    dict(query_start=torch.tensor([19, 2, 3]), window=(6, 2), is_causal=False),
    dict(query_start=12, key_start=torch.tensor([0, 13, -20]), window=(5, 0), context_length=torch.tensor([5, 6, 0])),
    dict(query_start=torch.tensor([9, 3000, 22]), key_start=torch.tensor([0, 0, 10])),
    dict(query_start=torch.tensor([-1, -2, -1])),
]


@pytest.mark.parametrize("options", STEPS, ids=range(len(STEPS)))
@pytest.mark.parametrize("preset", ["none", "log-bias", "log-invariant", "alibi"])
@pytest.mark.usefixtures("small_tiles")
def test_a_step_of_decoding(options: dict[str, Any], preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of several lengths take one product, with the results of one for each, whatever hidden keys hold."""
    call = make_call(
        BATCH, 4, 2, 1, NUM_KEYS, 6, value_dim=5, values=make_values(4, 6, preset, query_gain=preset != "alibi"),
        **(dict(is_causal=True) | options),
    )  # fmt: skip
    assert_exact(call)
    hidden = (run(call.replace(dout=torch.ones_like(call.dout)), "reference")["dv"] == 0).all(-1, keepdim=True)
    assert hidden.any()
    if options["query_start"] is not STEPS[-1]["query_start"]:
        monkeypatch.delattr(blocked, "_spans")
    inputs = dict(backend="blocked", return_lse=True, **call.options)
    with torch.no_grad():
        expected = log_attention(call.q, call.k, call.v, call.values, **inputs)
        for bad in (NAN, INF):
            k, v = (x.masked_fill(hidden, bad) for x in (call.k, call.v))
            q = call.q.masked_fill((expected[1] == -INF)[..., None], bad)
            for actual, same in zip(log_attention(q, k, v, call.values, **inputs), expected, strict=True):
                assert torch.equal(actual, same)
        call.k[1, :, 0] = NAN  # which the second sequence may see, and no other
        for actual, same in zip(log_attention(call.q, call.k, call.v, call.values, **inputs), expected, strict=True):
            assert torch.equal(actual[::2], same[::2])


@pytest.mark.parametrize("query_gain", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("small_tiles")
def test_presets(preset: str, query_gain: bool) -> None:
    assert_exact(make_call(2, 3, 3, 21, 21, 7, preset=preset, query_gain=query_gain, is_causal=True))


PARTS = ("power", "sharpness", "alpha")


@pytest.mark.parametrize("parts", [p for n in (1, 2, 3) for p in itertools.combinations(PARTS, n)], ids="-".join)
@pytest.mark.parametrize("learnable", [False, ("rate",), ("power", "alpha"), ("sharpness",)], ids=str)
def test_any_parts_and_gradients_for_some(parts: tuple[str, ...], learnable: Any) -> None:
    values = make_values(2, 8, "log-invariant", query_gain=True, learnable=learnable)
    kept = {*parts, "rate"} if {"power", "sharpness"} & {*parts} else {*parts}
    values = values._replace(**{name: None for name in PARAMETERS if name not in kept})
    assert_exact(make_call(2, 2, 1, 9, 11, 8, values=values, is_causal=True))


@pytest.mark.parametrize("scale", [1.0, 300.0, INF])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotations(scale: float, fraction: float) -> None:
    values = make_values(2, 12, "log-rotary-bias", rotary_scale=scale, rotary_fraction=fraction)
    assert_exact(make_call(1, 2, 2, 17, 17, 12, values=values, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(is_causal=True),
        dict(preset="none", is_causal=True),
        dict(preset="log-invariant", query_gain=True, is_causal=True),
        dict(preset="log-rotary", query_gain=True),
        dict(preset="log-rotary-bias", kv_heads=1, num_keys=333, is_causal=True),
        dict(preset="log-invariant", num_keys=131, window=(40, 10), query_start=0),
        dict(dropout_p=0.2, dropout_seed=torch.tensor([5]), is_causal=True),
        dict(lse_gradient=False, is_causal=True),
        dict(value_dim=40, preset="log-invariant", is_causal=True),
    ],
    ids=lambda a: "-".join(map(str, a)),
)
def test_error_is_that_of_eager_attention(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Largest errors are averaged over several draws: in a single one either implementation may be lucky."""
    arguments = dict(heads=8, num_queries=269, head_dim=24, dtype=dtype) | arguments
    calls = [make_call(1, **arguments) for _ in range(4)]
    with torch.no_grad():  # equal heads, or the same one would make the largest error every time
        for x in (x for call in calls for x in call.values[:4] if x is not None):
            x.fill_(0.5)

    def pooled(*how: Any) -> dict[str, Tensor]:
        draws = [run(call, *how) for call in calls]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    actual, eager, exact = pooled("blocked"), pooled("reference"), pooled("reference", torch.float64)
    factor, eps = (2.0 if dtype == torch.float32 else 1.1), torch.finfo(dtype).eps
    for name, x in exact.items():
        finite = x.isfinite()
        assert torch.equal(actual[name].double()[~finite], x[~finite]), name
        differences = ((y[name] - x).where(finite, 0).abs() for y in (actual, eager))
        error, of_eager = (float(e.flatten(1).amax(1).mean()) for e in differences)
        assert error <= factor * of_eager + eps * float(x[finite].abs().max()), name


# --- packed, and without tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(is_causal=True),
        dict(query_start=torch.tensor([2, 0, -4, 7, 1]), key_start=torch.tensor([0, 1, -3, 5, 0]), window=(9, 4)),
        dict(
            query_start=3, dropout_p=0.4, dropout_seed=torch.tensor([9]), context_length=torch.tensor([1, 9, 4, 7, 30])
        ),
    ],
    ids=["causal", "starts-window", "dropout-context"],
)
@pytest.mark.usefixtures("small_tiles")
def test_packed(arguments: dict[str, Any]) -> None:
    call = make_packed_call(
        [5, 0, 17, 4, 1], [11, 3, 17, 0, 30], outside=3, heads=4, kv_heads=2, head_dim=6, value_dim=5,
        preset="log-rotary-bias", query_gain=True, **arguments,
    )  # fmt: skip
    assert_exact(call)


@pytest.mark.parametrize("lengths", [([0, 0], [4, 0]), ([3], [0]), ([], []), ([0], [0])], ids=str)
def test_packed_without_pairs(lengths: tuple[list[int], list[int]]) -> None:
    results = run(make_packed_call(*lengths, outside=2, heads=2, head_dim=4, is_causal=True), "blocked")
    assert results["lse"].eq(-INF).all()
    assert all(x.eq(0).all() for name, x in results.items() if name != "lse")


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, num_queries, num_keys = shape
    results = run(make_call(batch, 4, 2, num_queries, num_keys, 8, query_gain=True, query_start=0), "blocked")
    assert results["out"].shape == (batch, 4, num_queries, 8)
    assert results["lse"].eq(-INF).all()
    assert all(x.eq(0).all() for name, x in results.items() if name != "lse")


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.usefixtures("small_tiles")
def test_any_shape(data: st.DataObject) -> None:
    def integer(low: int, high: int, name: str) -> int:
        return data.draw(st.integers(low, high), name)

    kv_heads, side = integer(1, 3, "kv_heads"), st.none() | st.integers(0, 12)
    heads = kv_heads * integer(1, 3, "group")
    options: dict[str, Any] = dict(query_start=integer(-9, 40, "query_start"), key_start=integer(-9, 40, "key_start"))
    options["window"] = data.draw(st.tuples(side, side), "window")
    if data.draw(st.booleans(), "masked"):
        options["key_mask"] = torch.rand(2, integer(1, 40, "num_keys")) > 0.5
    num_keys = options["key_mask"].shape[1] if "key_mask" in options else integer(1, 40, "num_keys")
    head_dim = integer(2, 9, "head_dim")
    options["value_dim"] = integer(1, 9, "value_dim")
    preset = data.draw(st.sampled_from(presets_of(head_dim)), "preset")
    values = make_values(heads, head_dim, preset, query_gain=data.draw(st.booleans(), "query_gain"))
    assert_exact(
        make_call(2, heads, kv_heads, integer(1, 40, "num_queries"), num_keys, head_dim, values=values, **options)
    )


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    values = make_values(4, 4, "log-invariant", query_gain=True)
    theta = torch.tensor([1.0, 0.3], dtype=torch.float64)
    options: dict[str, Any] = dict(
        theta=theta, query_start=1, key_start=0, window_left=4, window_right=1, max_seqlen_q=5, max_seqlen_k=6,
        rotary_scale=2.0, gain_length=3.0, scale=0.6, dropout_p=0.25, dropout_seed=torch.tensor([3]),
    )  # fmt: skip
    shapes = [(2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)]
    if packed:
        shapes = [(7, 4, 4), (8, 2, 4), (8, 2, 5)]
        options.update(cu_seqlens_q=torch.tensor([0, 5, 7]).int(), cu_seqlens_k=torch.tensor([0, 2, 8]).int())
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs += [getattr(values, name).detach().double().requires_grad_() for name in PARAMETERS]

    def attention(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        given = options | dict(zip(PARAMETERS, parameters, strict=True))
        out, lse = torch.ops.logpe.attention(q, k, v, *Options(**given), "blocked")
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(attention, inputs)


# --- what no query sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("preset", ["none", "log-invariant", "log-rotary-bias"])
@pytest.mark.parametrize(
    "options",
    [
        dict(query_start=torch.tensor([-5, 0, 2]), key_start=torch.tensor([-4, -9, 6]), window=(None, 0)),
        dict(key_lengths=torch.tensor([0, 7, 18]), query_start=0),
        dict(key_mask=torch.arange(18).expand(3, 18) % 7 > torch.tensor([[6], [2], [4]]), window=(1, 0), query_start=0),
        dict(key_mask=torch.arange(18).expand(3, 18) > 4, is_causal=True, query_start=0),
        dict(window=(2, 1), query_start=12),
        dict(is_causal=True, query_start=-3),
    ],
    ids=["starts", "lengths", "mask-window", "mask-causal", "beyond", "early"],
)
@pytest.mark.usefixtures("small_tiles")
def test_hidden_values_do_not_matter(options: dict[str, Any], preset: str, bad: float) -> None:
    """NaN or inf in unseen keys, and in queries that see no key, gives the bits that zeros there give."""
    call = make_call(3, 4, 2, 13, 18, 6, preset=preset, query_gain=True, **options)
    everyone = make_values(4, 6, "none")
    seen = run(call.replace(values=everyone, v=torch.ones_like(call.v), dout=torch.ones_like(call.dout)), "reference")
    keyless, hidden = seen["lse"][..., None] == -INF, (seen["dv"] == 0).all(-1, keepdim=True)
    assert keyless.any()
    assert hidden.any()

    def fill(value: float) -> Call:
        dlse = call.dlse.masked_fill(keyless[..., 0], value)
        q, dout = (x.masked_fill(keyless, value) for x in (call.q, call.dout))
        return call.replace(q=q, dout=dout, dlse=dlse, **{n: getattr(call, n).masked_fill(hidden, value) for n in "kv"})

    actual, expected = run(fill(bad), "blocked"), run(fill(0), "blocked")
    for name, x in expected.items():
        assert not x.isnan().any(), name
        assert torch.equal(actual[name], x), name
    assert expected["out"].masked_select(keyless).eq(0).all()
    assert expected["dq"].masked_select(keyless).eq(0).all()
    assert expected["dk"].masked_select(hidden).eq(0).all()


@pytest.mark.parametrize("preset", ["none", "log-invariant", "log-rotary-bias"])
@pytest.mark.parametrize(
    "options",
    [dict(is_causal=True), dict(window=(3, 2)), dict(key_mask=torch.arange(40).view(2, 20) % 5 != 0, is_causal=True)],
    ids=["causal", "window", "mask"],
)
@pytest.mark.usefixtures("small_tiles")
def test_a_key_reaches_only_those_who_see_it(options: dict[str, Any], preset: str) -> None:
    """NaN or inf in a key spreads as in the definition."""
    call = make_call(2, 4, 2, 20, 20, 6, preset=preset, query_gain=True, **options)
    for bad in (NAN, INF, -INF):
        k = call.k.clone()
        k[:, :, 9] = bad
        actual, expected = (run(call.replace(k=k), backend) for backend in ("blocked", "reference"))
        assert expected["out"][:, :, :6].isfinite().all()
        for name in ("out", "lse"):
            finite = expected[name].isfinite()
            assert not finite.all()
            assert torch.equal(actual[name].isfinite(), finite), name
            torch.testing.assert_close(actual[name][finite], expected[name][finite])


# --- precision, memory, repeatability -----------------------------------------------------------------------------


def test_autocast_does_not_reach_the_products() -> None:
    call = make_call(1, 2, 2, 33, 33, 16, dtype=torch.bfloat16, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(call, "blocked")
    outside = run(call, "blocked")
    assert all(torch.equal(x, outside[name]) for name, x in inside.items())


def test_same_bits_every_time() -> None:
    call = make_call(2, 4, 2, 300, 300, 16, preset="log-invariant", query_gain=True, is_causal=True)
    first = run(call, "blocked")
    for _ in range(3):
        again = run(call, "blocked")
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize(
    ("options", "share"), [(dict(is_causal=True), 0.57), (dict(window=(64, 32)), 0.23), (dict(query_start=-500), 0.52)]
)
def test_hidden_tiles_are_skipped(options: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    formed = 0
    logits = blocked._Part.logits

    def counted(part: Any, tile: Any, **options: Any) -> Any:
        nonlocal formed
        formed += math.prod(tile.shape)
        return logits(part, tile, **options)

    monkeypatch.setattr(blocked._Part, "logits", counted)
    call = make_call(1, 2, 1, 1024, 1024, 4, **options)
    log_attention(call.q, call.k, call.v, call.values, **options)
    assert formed <= share * 2 * 1024**2


PEAK = """
import os, resource, torch, logpe
torch.set_num_threads(1)
position = logpe.LogPosition(8, 64, "log-bias")
def step(length):
    tensors = [torch.randn(1, 8, length, 64) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    logpe.log_attention(q, k, v, position, is_causal=True).backward(tensors[3])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
step(64)
print(step(8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear() -> None:
    """Forward and backward over 8,192 tokens in 512 MB; one matrix of all scores alone would take 2,048 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 512 * 2**20
