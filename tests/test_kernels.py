"""The Triton kernels against the float64 reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from typing import Any

import pytest
import torch
from helpers import HALF, PARAMETERS, Call, Reference, check, make_call, make_packed_call, make_values, presets_of, run
from torch import Tensor

import logpe
from logpe import PositionValues, log_attention, log_attention_varlen, merge_partials, reference

pytest.importorskip("triton")
hypothesis = pytest.importorskip("hypothesis")

import logpe_kernels  # noqa: E402
import logpe_kernels.plan as plan_kernels  # noqa: E402
import logpe_kernels.position as position_kernels  # noqa: E402
import logpe_kernels.tile as tile_kernels  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from logpe_kernels import configs  # noqa: E402
from logpe_kernels.configs import Config  # noqa: E402
from logpe_kernels.options import Options  # noqa: E402

# The interpreter computes the hidden rows too.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
NAN, INF = math.nan, math.inf
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def assert_same(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    """All results equal, bit for bit."""
    assert x.keys() == y.keys()
    for name in y:
        assert torch.equal(x[name], y[name]), name


def int32(values: Any, device: Any = None) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- everything with everything ---------------------------------------------------------------------------------

FEATURES: dict[str, tuple[Any, ...]] = {
    "layout": ("dense", "packed", "left padding", "right padding", "key mask", "key bias"),
    "window": ("none", "causal", "both sides", "left", "right", "causal and left"),
    "position": (
        ("none", {}),
        ("alibi", {}),
        ("log-bias", {}),
        ("log-invariant", {}),
        ("log-rotary", dict(rotary_scale=INF)),
        ("log-rotary-bias", dict(rotary_scale=100.0, rotary_fraction=0.5)),
        ("log-rotary", {}),
    ),
    "gain": ("none", "by position", "by an int", "by a tensor"),
    "strides": ("contiguous", "transposed", "sliced", "expanded"),
    "dtype": DTYPES,
    "keys": (41, 70, 23),
    "group": (1, 2, 4),
    "head_dim": (16, 8, 40),
    "value_dim": (None, 24, 8),  # None: head_dim
    "block": ((32, 32), (32, 16), (16, 64)),
    "start": ("default", "int", "tensor"),
    "learnable": (True, ("rate", "alpha"), False),
    "dropout": (0.0, 0.3),
    "lse_gradient": (True, False),
}


def covering_array() -> list[dict[str, Any]]:
    """Combinations in which any two levels of any two features meet at least once: greedy, always the same."""
    levels = [range(len(values)) for values in FEATURES.values()]
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(range(len(levels)), 2)
        for x, y in itertools.product(levels[a], levels[b])
    }
    rows: list[dict[str, Any]] = []
    while missing:
        row = dict(min(missing, key=sorted))
        for feature in range(len(levels)):
            if feature not in row:
                met = {x: sum({(feature, x), pair} in missing for pair in row.items()) for x in levels[feature]}
                # Ties go round, or the first level would fill every gap.
                row[feature] = max(levels[feature], key=lambda x: (met[x], (x + len(rows)) % len(met)))
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: values[row[f]] for f, (name, values) in enumerate(FEATURES.items())})
    return rows


COMBINATIONS = covering_array()


def build(features: dict[str, Any], device: torch.device) -> Call:
    """The call that a row of the covering array describes."""
    heads, queries, keys = 4, 41, features["keys"]
    preset, rotation = features["position"]
    values = make_values(
        heads, features["head_dim"], preset, learnable=features["learnable"], query_gain=features["gain"] != "none",
        gain_length=20, device=device, **rotation,
    )  # fmt: skip
    sizes = {name: features[name] for name in ("head_dim", "value_dim")}
    sizes |= dict(heads=heads, kv_heads=heads // features["group"])
    options: dict[str, Any] = dict(
        sizes, values=values, dtype=features["dtype"], device=device, lse_gradient=features["lse_gradient"]
    )
    packed = features["layout"] == "packed"
    batch = 4 if packed else 2

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), dtype=torch.int32, device=device)

    causal = "causal" in features["window"]
    options["is_causal"] = causal
    left, right = ("left" in features["window"]) * 9 or None, ("right" in features["window"]) * 6 or None
    if features["window"] == "both sides":
        left, right = 9, 4
    options["window"] = (left, right)
    if features["start"] == "int":
        options.update(query_start=5, key_start=3)
    elif features["start"] == "tensor":
        options.update(query_start=integers(-4, 30), key_start=integers(0, 4))
    elif (packed or keys != queries) and not (causal and features["layout"] != "right padding"):
        options["query_start"] = max(keys - queries, 0)
    if features["gain"] == "by an int":
        options["context_length"] = 30
    elif features["gain"] == "by a tensor":
        options["context_length"] = integers(0, 60)
    if features["dropout"]:
        options["dropout_p"] = features["dropout"]
        options["dropout_seed"] = torch.randint(2**62, (1,), device=device)
    if features["layout"] == "left padding":
        options["key_start"] = -integers(1, keys)
    elif features["layout"] == "right padding":
        options["key_lengths"] = integers(0, keys)
    elif features["layout"] == "key mask":
        options["key_mask"] = torch.rand(batch, keys, device=device) < 0.6
    elif features["layout"] == "key bias":
        bias = torch.randn(batch, keys, device=device)
        options["key_mask"] = bias.masked_fill(torch.rand_like(bias) < 0.3, -INF)
    if packed:  # a sequence without keys, one without queries, and tokens outside
        call = make_packed_call([queries - 22, 5, 0, 17], [keys - 13, 0, 4, 9], outside=3, **options)
    else:
        call = make_call(batch, num_queries=queries, num_keys=keys, **options)
    return with_strides(call, features["strides"])


def with_strides(call: Call, kind: str) -> Call:
    """The same call in another layout: what lies between the rows is NaN; expanded takes one head for all."""

    def laid_out(x: Tensor) -> Tensor:
        if kind == "transposed":
            return x.transpose(-2, -3).contiguous().transpose(-2, -3)
        if kind == "sliced":
            wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), NAN, dtype=x.dtype, device=x.device)
            wide[..., 2:-1, 2:-3] = x
            return wide[..., 2:-1, 2:-3]
        if kind == "expanded":
            return x[:, :1].expand_as(x) if x.dim() == 3 else x[:1].expand_as(x)
        return x

    return call.replace(**{name: laid_out(getattr(call, name)) for name in ("q", "k", "v", "dout")})


def describe(features: dict[str, Any]) -> str:
    return "-".join(
        str(x).removeprefix("torch.").replace(" ", "_") for x in features.values() if not isinstance(x, tuple)
    )


@pytest.mark.parametrize("features", COMBINATIONS, ids=describe)
def test_combination(features: dict[str, Any], device: torch.device) -> None:
    call = build(features, device)
    with configs.override(Config(*features["block"], 4, 1)):
        check(call)


@pytest.mark.parametrize("features", COMBINATIONS[::5], ids=describe)
def test_two_launches_for_dk_and_dv_do_the_same(features: dict[str, Any], device: torch.device) -> None:
    call = build(features, device)
    tile = Config(*features["block"], 4, 1)
    with configs.override(tile):
        together = run(call, "triton")
    with configs.override(tile), configs.override(backward_dkdv=tile._replace(SEPARATE=True)):
        apart = run(call, "triton")
    if device.type == "cuda":  # the two kernels are compiled in their own ways
        Reference(call).check(apart)
    else:
        assert all(torch.equal(apart[name], x) for name, x in together.items())


@pytest.mark.parametrize("draw", range(6))
def test_random_combination(draw: int, device: torch.device) -> None:
    """Others in every run, for what takes three features to go wrong."""
    features = {name: random.choice(levels) for name, levels in FEATURES.items()}
    with configs.override(Config(*features["block"], 4, 1)):
        try:
            check(build(features, device))
        except AssertionError as error:
            raise AssertionError(f"{features}: {error}") from error


def test_the_combinations_cover_all_pairs() -> None:
    for (a, levels_a), (b, levels_b) in itertools.combinations(FEATURES.items(), 2):
        met = [(row[a], row[b]) for row in COMBINATIONS]
        for pair in itertools.product(levels_a, levels_b):
            assert pair in met


# --- accuracy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "preset"),
    [(torch.float16, "log-rotary-bias"), (torch.bfloat16, "log-invariant"), (torch.float32, "log-rotary-bias")],
    ids=str,
)
def test_pooled_errors_are_not_above_eagers(dtype: torch.dtype, preset: str, device: torch.device) -> None:
    """Over many heads the root mean square error is at most 1.1 times eager's, 2 times in float32, for each result.

    This is where a delta taken from a rounded out would show: it made the error of drate 1.5 times eager's.
    """
    squares: dict[str, list[float]] = {}
    for _ in range(2):
        call = make_call(
            1, 48, 24, 48, 48, 16, preset=preset, query_gain=True, dtype=dtype, device=device, is_causal=True
        )
        with configs.override(Config(64, 64, 4, 1)):
            exact, eager, actual = run(call, "reference", torch.float64), run(call, "reference"), run(call, "triton")
        for name, expected in exact.items():
            total = squares.setdefault(name, [0.0, 0.0])
            for side, x in enumerate((actual[name], eager[name])):
                total[side] += float((x - expected).square().sum())
    for name, (ours, eagers) in squares.items():
        ratio = (ours / eagers) ** 0.5
        assert ratio <= (1.1 if dtype in HALF else 2.0), f"{name}: {ratio:.2f} times eager's error"


HEAD_DIMS = (1, 8, 16, 40, 64, 72, 80, 96, 100, 111, 128, 256)


@pytest.mark.parametrize(("head_dim", "dtype"), list(zip(HEAD_DIMS, DTYPES * 4, strict=True)), ids=str)
def test_head_dim(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    preset = "log-rotary-bias" if head_dim > 1 else "log-bias"
    check(make_call(1, 2, 1, 20, 40, head_dim, preset=preset, dtype=dtype, device=device, is_causal=True))


VALUE_DIMS = [(16, 8), (1, 7), (24, 40), (64, 32), (32, 64), (100, 33), (192, 128), (16, 256), (256, 256)]


@pytest.mark.parametrize(("sizes", "dtype"), list(zip(VALUE_DIMS, DTYPES * 3, strict=True)), ids=str)
def test_value_dim(sizes: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Values of another size than queries and keys, as in multi-head latent attention."""
    head_dim, value_dim = sizes
    preset = "log-invariant" if head_dim % 2 else "log-rotary-bias"
    call = make_call(
        1, 2, 1, 20, 40, head_dim, value_dim=value_dim, preset=preset, query_gain=True, dtype=dtype, device=device,
        is_causal=True,
    )  # fmt: skip
    assert check(call)["out"].shape == (1, 2, 20, value_dim)


@pytest.mark.parametrize("rotary_scale", [1.0, 100.0, INF])
@pytest.mark.parametrize("start", [1_000_000, 20_000_000])
def test_far_positions(start: int, rotary_scale: float, device: torch.device) -> None:
    """Angles of 10^7 radians, and distances that float32 holds to a few digits after all."""
    values = make_values(2, 16, "log-rotary-bias", query_gain=True, rotary_scale=rotary_scale, device=device)
    check(make_call(1, 2, 1, 5, 30, 16, values=values, device=device, query_start=start + 28, key_start=start))
    check(make_call(1, 2, 1, 5, 30, 16, values=values, device=device, query_start=start))


@pytest.mark.parametrize("rotary_fraction", [0.25, 0.5, 0.75, 1.0])
def test_rotary_fraction(rotary_fraction: float, device: torch.device) -> None:
    values = make_values(2, 24, "log-rotary", rotary_fraction=rotary_fraction, device=device)
    check(make_call(1, 2, 2, 20, 20, 24, values=values, dtype=torch.float16, device=device))


def test_extreme_parameters(device: torch.device) -> None:
    heads = torch.tensor(
        [[1e-3, 30.0, 2.0, 1.0], [1e-4, 1e3, 1.0, 1e-6], [1e-3, 50.0, 1.0, 4.0], [1e-3, 5.0, 1.0, 2.0]]
    )
    values = PositionValues(*(x.to(device).requires_grad_() for x in heads), gain_length=1.0)
    check(make_call(1, 4, 2, 40, 40, 16, values=values, device=device, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Scores of hundreds, and a bias of -10^4 on all keys: no overflow, no empty row."""
    call = make_call(1, 2, 2, 40, 40, 16, dtype=dtype, device=device)
    call.q.mul_(30)
    call.options["key_mask"] = torch.full((1, 40), -1e4, device=device)
    actual = check(call)
    assert actual["lse"].isfinite().all()


def test_masks_that_are_the_smallest_number(device: torch.device) -> None:
    """Additive masks of other libraries hide with torch.finfo(dtype).min instead of -inf."""
    call = make_call(2, 2, 2, 20, 40, 16, device=device, query_start=20)
    hidden = torch.rand(2, 40, device=device) < 0.5
    for name, lowest in (("finite", torch.finfo(torch.float32).min), ("infinite", -INF)):
        call.options["key_mask"] = torch.zeros(2, 40, device=device).masked_fill(hidden, lowest)
        if name == "finite":
            finite = run(call, "triton")
    assert_same(run(call, "triton"), finite)


# --- dropout ----------------------------------------------------------------------------------------------------


def test_dropout_mask_is_that_of_the_reference(device: torch.device) -> None:
    """With scores of zero and v, then dout, the identity, out and dv are the mask."""
    n, p = 32, 0.4
    seed = torch.randint(2**32, 2**62, (1,), device=device)
    starts = int32([7, 0], device)
    eye = torch.eye(n, device=device).expand(2, 3, n, n)
    zeros = torch.zeros(2, 3, n, n, device=device)
    v = eye.clone().requires_grad_()
    options = dict(query_start=5, key_start=starts, dropout_p=p, dropout_seed=seed, backend="triton")
    out = log_attention(zeros, zeros, v, None, **options)
    (dv,) = torch.autograd.grad(out, v, eye)
    keep = reference.dropout_keep(
        seed,
        torch.arange(6, device=device).view(2, 3, 1, 1),
        5 + torch.arange(n, device=device)[:, None],
        (starts[:, None] + torch.arange(n, device=device)).view(2, 1, 1, n),
        p,
    )
    torch.testing.assert_close(out, keep / (n * (1 - p)))
    torch.testing.assert_close(dv, keep.mT / (n * (1 - p)))


def test_dropout_draws_a_new_mask_each_time(device: torch.device) -> None:
    call = make_call(1, 2, 2, 20, 20, 16, device=device)
    tensors = call.q, call.k, call.v, call.values
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    first, second = (log_attention(*tensors, dropout_p=0.5, backend="triton") for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state)
    assert torch.equal(log_attention(*tensors, dropout_p=0.5, backend="triton"), first)


# --- partial results --------------------------------------------------------------------------------------------


def test_merged_chunks_are_the_whole(device: torch.device) -> None:
    """With every part on, and empty chunks, hidden ones, masks and dropout: out, lse and all gradients."""
    values = make_values(4, 16, "log-invariant", query_gain=True, device=device)
    values = values._replace(theta=reference.inverse_frequencies(6, 10000.0, device=device), rotary_scale=10.0)
    mask = torch.rand(2, 70, device=device) < 0.7
    call = make_call(
        2, 4, 2, 30, 70, 16, value_dim=24, values=values, device=device, is_causal=True, window=(50, None),
        query_start=35, key_mask=mask, dropout_p=0.3, dropout_seed=torch.tensor([99], device=device),
    )  # fmt: skip
    inputs = {f"d{name}": getattr(call, name).detach().requires_grad_() for name in "qkv"}
    q, k, v = inputs.values()
    inputs.update({f"d{name}": getattr(values, name) for name in PARAMETERS})
    outs, lses = [], []
    for begin, end in itertools.pairwise((0, 0, 20, 33, 67, 70)):  # the last one nobody may see
        options = dict(call.options, key_start=begin, key_mask=mask[:, begin:end], backend="triton", return_lse=True)
        out, lse = log_attention(q, k[:, :, begin:end], v[:, :, begin:end], values, **options)
        outs.append(out)
        lses.append(lse)
    out, lse = merge_partials(outs, lses)
    gradients = torch.autograd.grad([out, lse], list(inputs.values()), [call.dout, call.dlse])
    Reference(call).check({"out": out.detach(), "lse": lse.detach(), **dict(zip(inputs, gradients, strict=True))})


def test_merged_packed_chunks_are_the_whole(device: torch.device) -> None:
    call = make_packed_call(
        [9, 14], [20, 12], device=device, head_dim=16, value_dim=8, outside=2, query_start=int32([20, 0], device)
    )
    whole = run(call, "triton")
    cu_q = int32([0, 9, 23], device)
    parts = []
    for begin, end in ((0, 7), (7, 20)):  # of each sequence's keys
        index = [torch.arange(begin, end), torch.arange(20 + begin, 20 + min(end, 12))]
        cu_k = int32([0, end - begin, end - begin + min(end, 12) - begin], device)
        k, v = (x[torch.cat(index).to(device)] for x in (call.k, call.v))
        options = dict(call.options, key_start=begin, backend="triton", return_lse=True)
        parts.append(log_attention_varlen(call.q, k, v, call.values, cu_q, cu_k, 14, 20, **options))
    out, lse = merge_partials(*zip(*parts, strict=True))
    torch.testing.assert_close(out, whole["out"])
    torch.testing.assert_close(lse, whole["lse"])


# --- what nobody sees -------------------------------------------------------------------------------------------

HIDDEN: dict[str, dict[str, Any]] = {
    "right padding": dict(key_lengths=[10, 0], query_start=3),
    "right padding, causal": dict(key_lengths=[10, 3], query_start=3, is_causal=True),
    "left padding": dict(key_start=[-9, -60], is_causal=True),
    "queries before position 0": dict(query_start=[-5, -25], key_start=-3),
    "key mask": dict(key_mask="bool", query_start=20),
    "key bias": dict(key_mask="float", is_causal=True),
    "tail of a cache": dict(is_causal=True, query_start=[7, 0]),
    "left of the window": dict(query_start=30, window=(6, 0)),
    "no key in reach": dict(query_start=200, window=(100, None)),
    "packed tail": dict(outside=6, is_causal=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_rows_may_hold_anything(case: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN or inf in rows of k and v that nobody sees, and of dout and dlse where nothing is seen, changes no bit."""
    options = dict(HIDDEN[case])
    for name in ("key_start", "query_start", "key_lengths"):
        if isinstance(options.get(name), list):
            options[name] = int32(options[name], device)
    if "key_mask" in options:
        mask = torch.rand(2, 45, device=device) < 0.5
        mask[1] = False
        if options["key_mask"] == "float":
            mask = torch.randn(2, 45, device=device).masked_fill(~mask, -INF)
        options["key_mask"] = mask
    options.update(dtype=dtype, device=device, preset="log-rotary-bias", query_gain=True)
    options.update(heads=2, kv_heads=1, head_dim=16)
    if case == "packed tail":
        call = make_packed_call([12, 5], [20, 0], **options)
    else:
        call = make_call(2, num_queries=20, num_keys=45, **options)
    exact = run(call, "reference", torch.float64)
    unseen = (exact["dv"] == 0).all(-1)
    dead = exact["lse"] == -INF
    dead_rows = dead.T if call.lengths is not None else dead
    assert unseen.any()
    results = []
    for filling in (0.0, NAN if dtype == torch.float32 else INF):
        changed = {name: getattr(call, name).clone() for name in ("k", "v", "dout", "dlse")}
        changed["k"][unseen] = changed["v"][unseen] = filling
        changed["dout"][dead_rows] = filling
        changed["dlse"][dead] = filling
        with configs.override(Config(16, 16, 4, 1)):
            results.append(run(call.replace(**changed), "triton"))
    Reference(call).check(results[0])
    assert_same(results[1], results[0])
    assert (results[1]["out"][dead_rows] == 0).all()
    assert (results[1]["dq"][dead_rows] == 0).all()
    assert (results[1]["dk"][unseen] == 0).all()


def test_queries_before_position_0_may_hold_anything(device: torch.device) -> None:
    call = make_call(2, 2, 2, 20, 30, 16, preset="log-rotary-bias", device=device, query_start=-7, is_causal=True)
    expected = run(call, "triton")
    q = call.q.clone()
    q[:, :, :7] = NAN
    assert_same(run(call.replace(q=q), "triton"), expected)


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (1, 1, 1), (1, 1, 40), (1, 40, 1)]
)
@pytest.mark.parametrize("preset", ["none", "log-rotary-bias"])
def test_few_tokens(batch: int, queries: int, keys: int, preset: str, device: torch.device) -> None:
    call = make_call(
        batch, 2, 1, queries, keys, 16, preset=preset, query_gain=True, device=device, is_causal=True, query_start=39
    )
    actual = check(call)
    if batch * queries * keys == 0:
        assert all((actual[name] == 0).all() for name in actual if name != "lse")


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([], []), ([0, 0], [0, 0]), ([0], [5]), ([5], [0]), ([1], [1])])
def test_few_packed_tokens(lengths_q: list[int], lengths_k: list[int], device: torch.device) -> None:
    for outside in (0, 2):
        check(make_packed_call(lengths_q, lengths_k, outside=outside, device=device, is_causal=True))


# --- positions, windows, blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window", [0, 3, (0, 5), (16, 16), (5, None), (None, 0), 1000, (2**31 - 1, 2**31 - 1)], ids=str
)
def test_window(window: Any, device: torch.device) -> None:
    with configs.override(Config(16, 16, 4, 1)):
        check(make_call(1, 2, 2, 40, 40, 16, device=device, window=window))


def test_int64_starts_and_lengths(device: torch.device) -> None:
    call = make_call(
        2, 2, 2, 20, 30, 16, device=device, query_start=int32([3, 10], device), key_lengths=int32([9, 30], device)
    )
    wide = {name: x.long() for name, x in call.options.items()}
    assert_same(run(call.replace(options=wide), "triton"), run(call, "triton"))


def test_a_tensor_of_starts_is_one_call_per_sequence(device: torch.device) -> None:
    starts, keys = [25, -3], [-2, 4]
    options = dict(preset="log-rotary-bias", query_gain=True, device=device, is_causal=True)
    call = make_call(2, 2, 1, 20, 40, 16, query_start=int32(starts, device), key_start=int32(keys, device), **options)
    together = run(call, "triton")
    for b in range(2):
        one = {name: getattr(call, name)[b : b + 1] for name in ("q", "k", "v", "dout", "dlse")}
        alone = run(
            call.replace(**one, options=dict(is_causal=True, query_start=starts[b], key_start=keys[b])), "triton"
        )
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(alone[name], together[name][b : b + 1]), name


def test_packed_is_one_call_per_sequence(device: torch.device) -> None:
    call = make_packed_call(
        [20, 7, 33], [20, 7, 33], kv_heads=2, preset="log-rotary-bias", device=device, is_causal=True
    )
    together = run(call, "triton")
    for begin, end in itertools.pairwise((0, 20, 27, 60)):
        one = {n: getattr(call, n)[begin:end].transpose(0, 1)[None] for n in ("q", "k", "v", "dout")}
        alone = run(call.replace(**one, dlse=call.dlse[None, :, begin:end], lengths=None), "triton")
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(alone[name][0].transpose(0, 1), together[name][begin:end]), name
        assert torch.equal(alone["lse"][0], together["lse"][:, begin:end])


@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 16), (32, 64), (128, 32)], ids=str)
@pytest.mark.parametrize(
    "window", [dict(is_causal=True), dict(window=(7, 11), query_start=20)], ids=["causal", "window"]
)
def test_block_shapes(block: tuple[int, int], window: dict[str, Any], device: torch.device) -> None:
    with configs.override(Config(*block, 4, 1)):
        check(make_call(1, 2, 1, 50, 75, 16, preset="log-invariant", device=device, **window))


@pytest.mark.parametrize(
    ("dtype", "window"),
    [
        (torch.float16, dict(is_causal=True)),
        (torch.bfloat16, dict(query_start=20)),
        (torch.bfloat16, dict(is_causal=True, window=430)),
        (torch.float16, dict(query_start=-250)),
        (torch.bfloat16, dict(query_start=500)),
    ],
    ids=["causal", "full", "window", "before", "after"],
)
def test_far_tiles(dtype: torch.dtype, window: dict[str, Any], device: torch.device) -> None:
    """Tiles far from the diagonal, on either side of it, where a polynomial stands for the logarithm."""
    with configs.override(Config(32, 64, 4, 1)):
        check(make_call(1, 2, 1, 450, 491, 16, query_gain=True, dtype=dtype, device=device, **window))


@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (dict(is_causal=True), torch.float16),
        (dict(window=(40, 5), query_start=11), torch.bfloat16),
        (dict(is_causal=True), torch.float32),
    ],
    ids=str,
)
def test_descriptors(window: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Full tiles by descriptor, next to masked ones by pointers; the same bits as by pointers alone."""
    if device.type == "cuda" and not configs.has_tma(configs.target_of(device)):
        pytest.skip("this GPU has no tensor descriptors")
    packed = {name: value for name, value in window.items() if name != "query_start"}
    calls = [
        make_call(2, 2, 1, 60, 71, 16, dtype=dtype, preset="log-invariant", device=device, **window),
        make_call(1, 1, 1, 50, 61, 40, value_dim=16, dtype=dtype, preset="log-rotary-bias", device=device, **window),
        make_call(1, 1, 1, 50, 50, 20, dtype=dtype, device=device, **window),  # rows of 40 bytes: no descriptor
        make_packed_call([50, 3], [50, 3], heads=2, kv_heads=1, outside=5, dtype=dtype, device=device, **packed),
    ]
    for call in calls:
        with configs.override(Config(16, 16, 4, 1, TMA=True)):
            by_descriptor = check(call)
        with configs.override(Config(16, 16, 4, 1)):
            by_pointer = run(call, "triton")
        assert all(torch.equal(x, by_pointer[name]) for name, x in by_descriptor.items())


def test_descriptors_are_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for keys that are the same for all heads (a step of 0), nor for rows that begin between 16 bytes."""
    made: list[Any] = []
    real = plan_kernels.TensorDescriptor
    monkeypatch.setattr(plan_kernels, "TensorDescriptor", lambda *x: made.append(x) or real(*x))
    call = make_call(1, 2, 1, 40, 40, 16, dtype=torch.float16, device=device)
    with configs.override(Config(16, 32, 4, 1, TMA=True)):
        check(call)
        assert [x[1:3] for x in made[:2]] == [([1, 1, 40, 16], [640, 640, 16, 1])] * 2
        assert [x[3] for x in made] == [[1, 1, rows, 16] for rows in (32, 32, 32, 32, 16, 16)]
        made.clear()
        check(make_call(1, 1, 1, 40, 40, 16, value_dim=40, dtype=torch.float16, device=device))
        assert [x[3][-1] for x in made] == [16, 64] * 3  # k and v, twice; q and dout
        made.clear()
        expanded = call.k[:, :1].expand(-1, 2, -1, -1)
        shifted = torch.randn(2 * 40 * 16 + 1, device=device).half()[1:].view(1, 2, 40, 16)
        log_attention(call.q, expanded, shifted, call.values, backend="triton")
    assert not made


@triton.jit
def far_kernel(y, rate, start, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    head = position_kernels.Parameters(None, tl.load(rate), None, None)
    half: tl.constexpr = (BLOCK - 1) / 2
    middle, offset = (start + rows).to(tl.float32) - half, columns.to(tl.float32) - half
    value = position_kernels.far_log2_distance(middle[:, None], offset[None, :], head, 1.0)
    tl.store(y + rows[:, None] * BLOCK + columns[None, :], value)


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.07, 1.0, 30.0])
@pytest.mark.parametrize("after", [True, False], ids=["rows after", "rows before"])
def test_the_polynomial_of_a_far_tile(rate: float, after: bool, device: torch.device) -> None:
    """log2(1 + rate * d) within the bound that position.py states, up to the nearest tile that is called far."""
    block, rates = 16, torch.tensor([rate], device=device)
    nearest = position_kernels.FAR.value * block + block // 2
    for distance in (nearest, nearest + 5, 1000, 100_000):
        start = distance if after else block // 2 - distance - block
        y = torch.empty(block, block, device=device)
        far_kernel[(1,)](y, rates, start, block)
        exact = torch.log2(1 + rate * (start + torch.arange(block)[:, None] - torch.arange(block)).abs().double())
        assert float((y.cpu() - exact).abs().max()) <= 1.13e-5 + 2**-21 * float(exact.max())


def test_tiles_are_called_far_where_the_polynomial_serves(device: torch.device) -> None:
    """Whatever the alignment of rows and columns: never nearer, and at most a tile and a half farther."""
    far, block = position_kernels.FAR.value, 16
    bounds = torch.zeros(4, dtype=torch.int32, device=device)
    for first, last, start in ((500, 531, 0), (507, 520, 0), (93, 120, -7), (40, 60, 0), (200, 263, 11)):
        bounds_kernel[(1,)](bounds, first, last, start, 1000, block)
        gap, jump = bounds.tolist()[2:]
        tiles = torch.arange(0, 1000, block)
        middles = start + tiles + (block - 1) / 2
        distance = torch.maximum(first - middles, middles - last)
        called_far = (tiles < gap) | (tiles >= gap + jump)
        assert bool((distance[called_far] >= far * block).all())
        assert bool(called_far[distance > (far + 1.5) * block].all())


@triton.jit
def bounds_kernel(bounds, first, last, start, count, BLOCK: tl.constexpr):
    other = tile_kernels.Axis(0, 0, count, start, start, start + count)
    side = tile_kernels.Bounds(first, last, 0, 0, count // BLOCK * BLOCK, count)
    begin, stop, gap, jump = tile_kernels.loop_bounds(tile_kernels.FAR_TILES, side, other, True, BLOCK)
    tl.store(bounds, begin)
    tl.store(bounds + 1, stop)
    tl.store(bounds + 2, gap)
    tl.store(bounds + 3, jump)


def test_each_kernel_may_have_its_own_block(device: torch.device) -> None:
    call = make_call(2, 2, 1, 50, 75, 16, preset="log-invariant", query_gain=True, device=device, is_causal=True)
    with configs.override(Config(16, 32, 4, 1), Config(64, 16, 4, 1), Config(32, 64, 4, 2)):
        check(call)


@pytest.mark.parametrize(
    "window",
    [
        dict(),
        dict(is_causal=True),
        dict(window=(20, 5)),
        dict(window=(20, None)),
        dict(is_causal=True, query_start=40),
        dict(is_causal=True, query_start=-30),
    ],
    ids=str,
)
def test_hidden_tiles_are_skipped(
    window: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter, where products can be counted: as many as there are tiles with a visible pair."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    block, n = 16, 96
    products = [0]
    real = InterpreterBuilder.create_dot

    def counted(*args: Any, **kwargs: Any) -> Any:
        products[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)

    def count(queries: int, keys: int, **options: Any) -> tuple[int, int]:
        call = make_call(1, 1, 1, queries, keys, 16, device=device, **options)
        values = call.values
        q, k, v = (x.requires_grad_() for x in (call.q, call.k, call.v))
        products[0] = 0
        out = log_attention(q, k, v, values, backend="triton", **options)
        forward, products[0] = products[0], 0
        out.backward(call.dout)
        return forward, products[0]

    with configs.override(Config(block, block, 4, 1)):
        of_one_tile = count(block, block)
        actual = count(n, n, **window)
    start = window.get("query_start", 0)
    i, j = start + torch.arange(n)[:, None], torch.arange(n)
    left, right = window.get("window", (None, None))
    visible = (i >= 0) & (j >= 0)
    if left is not None:
        visible &= j >= i - left
    if right is not None or window.get("is_causal"):
        visible &= j <= i + (right or 0)
    tiles = int(visible.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(1).any(-1).sum())
    assert actual == (tiles * of_one_tile[0], tiles * of_one_tile[1])


# --- tensors in, tensors out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["log-bias", "log-rotary"])
def test_results_are_laid_out_like_their_inputs(preset: str, device: torch.device) -> None:
    """(B, N, H, D) in memory stays (B, N, H, D): no copy on the way in, none on the way out."""
    call = with_strides(make_call(2, 4, 2, 20, 30, 16, preset=preset, device=device, is_causal=True), "transposed")
    actual = run(call, "triton")
    for name, like in (("out", call.q), ("dq", call.q), ("dk", call.k), ("dv", call.v)):
        assert actual[name].stride() == like.stride(), name
    assert actual["lse"].is_contiguous()


def test_tensors_that_start_elsewhere(device: torch.device) -> None:
    """Run calls at multiples of 16 bytes and elsewhere, which is what a kernel is compiled for."""
    call = make_call(1, 2, 1, 33, 33, 16, dtype=torch.float16, device=device, is_causal=True)

    def shifted(x: Tensor, offset: int) -> Tensor:
        return torch.zeros(x.numel() + offset, dtype=x.dtype, device=device)[offset:].view(x.shape).copy_(x)

    for offsets in ((0, 0, 0), (1, 8, 3), (0, 0, 0)):
        q, k, v = map(shifted, (call.q, call.k, call.v), offsets)
        check(call.replace(q=q, k=k, v=v), "triton")


def test_a_broadcast_gradient(device: torch.device) -> None:
    """out.sum().backward() hands down a dout whose strides are all 0."""
    call = make_call(2, 4, 2, 20, 30, 16, device=device, is_causal=True, lse_gradient=False)
    ones = torch.ones((), device=device)
    expected = run(call.replace(dout=torch.ones_like(call.dout)), "triton")
    assert_same(run(call.replace(dout=ones.expand_as(call.dout)), "triton"), expected)


def test_the_gradient_of_lse_alone(device: torch.device) -> None:
    call = make_call(2, 4, 2, 20, 30, 16, device=device, is_causal=True)
    q, k, v = (x.requires_grad_() for x in (call.q, call.k, call.v))
    _, lse = log_attention(q, k, v, call.values, is_causal=True, return_lse=True, backend="triton")
    inputs = q, k, v, *call.values[:2]
    gradients = torch.autograd.grad(lse, inputs, call.dlse)
    expected = run(call.replace(dout=torch.zeros_like(call.dout)), "reference")
    for gradient, name in zip(gradients, ("dq", "dk", "dv", "dpower", "drate"), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink(dtype: torch.dtype, device: torch.device) -> None:
    """With a query gain, for each query and for each head, dense and packed."""
    options: dict[str, Any] = dict(dtype=dtype, device=device, preset="log-invariant", query_gain=True, is_causal=True)
    check(make_call(2, 4, 2, 33, 40, 16, sink=torch.randn(2, 4, 33, device=device), **options))
    sink = torch.randn(4, device=device)
    check(make_packed_call([20, 0, 13], [24, 3, 13], kv_heads=2, head_dim=16, outside=2, sink=sink, **options))


def test_frozen_parts_get_no_gradient(device: torch.device) -> None:
    """Nor is one computed: the operator returns None for them."""
    call = make_call(1, 2, 2, 20, 20, 16, preset="log-invariant", query_gain=True, device=device, is_causal=True)
    values = {name: getattr(call.values, name).detach() for name in PARAMETERS}
    options = Options(**values, window_right=0, scale=0.25)
    out, lse = logpe_kernels.attention(call.q, call.k, call.v, options)
    tensors = call.dout, call.dlse, call.q, call.k, call.v, out, lse
    full = logpe_kernels.attention_backward(*tensors, options, (True,) * 4)
    for learned in itertools.product((True, False), repeat=4):
        gradients = logpe_kernels.attention_backward(*tensors, options, learned)
        for want, gradient, expected in zip((True,) * 3 + learned, gradients, full, strict=True):
            assert (gradient is not None) == want
            assert gradient is None or torch.equal(gradient, expected)


def test_sequences_longer_than_max_seqlen_are_cut(device: torch.device) -> None:
    call = make_packed_call([30, 10], [30, 10], heads=2, head_dim=16, device=device)
    cu, scale = int32([0, 30, 40], device), 0.25
    options = Options(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=20, max_seqlen_k=12, scale=scale)
    out, lse = logpe_kernels.attention(call.q, call.k, call.v, options)
    q, k, v = (x[:n].transpose(0, 1)[None] for x, n in ((call.q, 20), (call.k, 12), (call.v, 12)))
    expected = reference.attention(q, k, v, Options(scale=scale))[0][0].transpose(0, 1)
    torch.testing.assert_close(out[:20], expected)
    assert (out[20:30] == 0).all()
    assert (lse[:, 20:30] == -INF).all()
    assert lse[:, 30:].isfinite().all()


@pytest.mark.parametrize("bounds", [[0, 900], [5, 3, 40], [-20, 10], [0, 40, 35, 999]], ids=str)
def test_bad_values_read_nothing_out_of_bounds(bounds: list[int], device: torch.device) -> None:
    """On a GPU they are not checked: the kernels clamp them to the tensors, around which all is NaN."""
    call = with_strides(make_packed_call([40], [40], heads=2, head_dim=16, device=device), "sliced")
    cu = int32(bounds, device)
    options = Options(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=1000, max_seqlen_k=1000, scale=0.2)
    out, lse = logpe_kernels.attention(call.q, call.k, call.v, options)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    dense = with_strides(make_call(2, 2, 2, 20, 20, 16, device=device), "sliced")
    lengths = int32([10**6, -5], device)
    out, lse = logpe_kernels.attention(dense.q, dense.k, dense.v, Options(key_lengths=lengths, scale=0.2))
    assert out.isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    call = make_call(
        2, 4, 2, 50, 60, 16, preset="log-invariant", query_gain=True, dtype=dtype, device=device, is_causal=True,
        dropout_p=0.2, dropout_seed=torch.tensor([5], device=device),
    )  # fmt: skip
    assert_same(run(call, "triton"), run(call, "triton"))


# --- any shape --------------------------------------------------------------------------------------------------


@hypothesis.settings(
    max_examples=10,
    deadline=None,
    database=None,
    print_blob=True,
    phases=(hypothesis.Phase.generate,),  # interpreted, it would shrink for an hour
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.data())
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    def integer(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    batch, kv_heads, group = integer(1, 2), integer(1, 2), integer(1, 3)
    queries, keys, head_dim = integer(0, 50), integer(0, 50), integer(1, 40)
    presets = presets_of(head_dim)
    torch.manual_seed(integer(0, 2**32 - 1))
    options = dict(
        preset=data.draw(st.sampled_from(presets)),
        query_gain=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        device=device,
        is_causal=data.draw(st.booleans()),
        window=data.draw(st.tuples(*[st.one_of(st.none(), st.integers(0, 60))] * 2)),
    )
    block = Config(data.draw(st.sampled_from([16, 32, 64])), data.draw(st.sampled_from([16, 32, 64])), 4, 1)
    heads = dict(heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim)
    with configs.override(block):
        if data.draw(st.booleans()):
            call = make_call(batch, num_queries=queries, num_keys=keys, **heads, **options)
            starts = data.draw(st.lists(st.integers(-60, 60), min_size=2 * batch, max_size=2 * batch))
            call.options.update(query_start=int32(starts[:batch], device), key_start=int32(starts[batch:], device))
            if data.draw(st.booleans()):
                call.options["key_lengths"] = torch.randint(0, keys + 1, (batch,), device=device)
        else:
            lengths = [data.draw(st.lists(st.integers(0, 30), min_size=2, max_size=2)) for _ in range(2)]
            call = make_packed_call(*lengths, outside=integer(0, 3), **heads, **options)
            call.options["query_start"] = integer(-20, 40)
        check(call)


# --- on a GPU only ------------------------------------------------------------------------------------------------


@triton.jit
def log2_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, position_kernels.log2(tl.load(x + index)))


def test_the_fast_logarithm(device: torch.device) -> None:
    """log2(1 + rate * d) in one instruction is off by at most a few units in the last place of max(1, |log2|)."""
    x = torch.cat((1 + torch.logspace(-6, 7, 1024 - 16), torch.arange(1, 17))).float().to(device)
    y = torch.empty_like(x)
    log2_kernel[(4,)](x, y, BLOCK=256)
    exact = x.double().log2()
    assert float(((y - exact).abs() / exact.abs().clamp(min=1)).max()) < 2**-21


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", logpe.PRESETS)
@pytest.mark.parametrize(("length", "head_dim"), [(1024, 128), (4096, 64), (1500, 256), (777, 96)])
def test_real_sizes(length: int, head_dim: int, preset: str, dtype: torch.dtype, device: torch.device) -> None:
    check(
        make_call(
            1,
            2,
            1,
            length,
            length,
            head_dim,
            preset=preset,
            query_gain=True,
            dtype=dtype,
            device=device,
            is_causal=True,
        )
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", ["log-bias", "log-invariant"])
def test_real_sizes_of_everything_else(preset: str, dtype: torch.dtype, device: torch.device) -> None:
    """Full, windowed, padded, masked, packed, with dropout: with the tiles that the table holds."""
    seed = torch.tensor([2**40 + 1], device=device)
    options: dict[str, Any] = dict(preset=preset, query_gain=True, dtype=dtype, device=device, head_dim=64, kv_heads=2)
    lengths = int32([1000, 300], device)
    check(make_call(2, num_queries=1000, num_keys=1000, key_lengths=lengths, **options))
    check(make_call(2, num_queries=1000, num_keys=1300, window=(200, 100), query_start=150, **options))
    check(make_call(2, num_queries=1000, num_keys=1000, is_causal=True, key_start=-lengths // 2, **options))
    check(make_call(2, num_queries=500, num_keys=1000, is_causal=True, dropout_p=0.2, dropout_seed=seed, **options))
    mask = torch.rand(2, 1000, device=device) < 0.7
    check(make_call(2, num_queries=700, num_keys=1000, query_start=300, key_mask=mask, **options))
    check(make_packed_call([700, 0, 1, 333], [700, 50, 1, 500], outside=77, is_causal=True, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [(64, 64, 4, 1), (128, 64, 8, 2), (64, 128, 8, 3), (32, 64, 4, 4), (16, 16, 1, 1), (128, 128, 8, 2)],
    ids=str,
)
def test_other_configurations(config: tuple[int, int, int, int], device: torch.device) -> None:
    call = make_call(1, 4, 2, 500, 700, 64, preset="log-invariant", dtype=torch.float16, device=device, is_causal=True)
    with configs.override(Config(*config)):
        check(call)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_200_times(dtype: torch.dtype, device: torch.device) -> None:
    call = make_call(
        2, 8, 4, 1024, 1024, 64, preset="log-invariant", query_gain=True, dtype=dtype, device=device, is_causal=True
    )
    first = run(call, "triton")
    for _ in range(199):
        assert_same(run(call, "triton"), first)


def require_memory(gigabytes: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    """The last sequence of a batch whose offsets need 64 bits is the same as alone."""
    require_memory(38)
    shape = (520, 64, 1024, 64)
    assert math.prod(shape) > 2**31
    x = torch.zeros(shape, dtype=torch.float16, device=device)
    call = make_call(1, 64, 64, 1024, 1024, 64, dtype=torch.float16, device=device, is_causal=True, lse_gradient=False)
    x[-1:] = call.q
    large = call.replace(q=x, k=x, v=x, dout=x)
    small = call.replace(k=call.q, v=call.q, dout=call.q)
    expected, actual = run(small, "triton"), run(large, "triton")
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(actual[name][-1:], expected[name]), name
    assert (actual["out"][:-1] == 0).all()


def test_units_of_strides() -> None:
    """What the strides have in common is said where Triton would not see it, and where their products stay int32."""
    for head_dim, unit in ((40, 8), (100, 4), (42, 2)):
        *strides, last = tile_kernels.in_units((77 * head_dim, head_dim, 7 * head_dim))
        assert (strides, last.value) == ([x * head_dim // unit for x in (77, 1, 7)], unit)
    for same in ((7 * 48, 48, 7 * 48), (35, 5, 5), (0, 0, 0), (8, 2**31 + 8, 8)):
        assert tile_kernels.in_units(same) == same


@pytest.mark.gpu
def test_strides_beyond_2_to_the_31(device: torch.device) -> None:
    require_memory(30)
    call = make_call(1, 1, 1, 4096, 4096, 64, dtype=torch.float16, device=device, is_causal=True)
    storage = torch.zeros(4096, 2**20, dtype=torch.float16, device=device)  # tokens 2^20 elements apart
    wide = storage.as_strided((1, 1, 4096, 64), (2**32, 2**32, 2**20, 1))
    wide.copy_(call.q)
    expected = run(call, "triton")
    assert_same(run(call.replace(q=wide), "triton"), expected)
    wide.copy_(call.k)
    assert_same(run(call.replace(k=wide), "triton"), expected)
    wide.copy_(call.dout)
    assert_same(run(call.replace(dout=wide), "triton"), expected)


@pytest.mark.gpu
def test_more_than_65535_heads(device: torch.device) -> None:
    """The limit of the second and third axis of a grid."""
    call = make_call(35_000, 2, 1, 16, 16, 16, dtype=torch.float16, device=device, is_causal=True, lse_gradient=False)
    check(call)


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """Captured once, replayed with other inputs; a dropout seed drawn inside is a new one at each replay."""
    call = make_call(
        2, 4, 2, 300, 300, 64, preset="log-rotary-bias", dtype=torch.float16, device=device, is_causal=True
    )
    other = make_call(2, 4, 2, 300, 300, 64, dtype=torch.float16, device=device)
    q, k, v = (x.clone().requires_grad_() for x in (call.q, call.k, call.v))

    def step(dropout_p: float) -> list[Tensor]:
        out = log_attention(q, k, v, call.values, is_causal=True, dropout_p=dropout_p, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, *call.values[:2]), call.dout)]

    for dropout_p in (0.0, 0.3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(dropout_p)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(dropout_p)
        with torch.no_grad():
            for x, y in ((q, other.q), (k, other.k), (v, other.v)):
                x.copy_(y)
        graph.replay()
        first = [x.clone() for x in results]
        graph.replay()
        if dropout_p:
            assert not torch.equal(results[0], first[0])
            assert all(x.isfinite().all() for x in results)
        else:
            for x, y, z in zip(results, first, step(0.0), strict=True):
                assert torch.equal(x, y)
                assert torch.equal(x, z)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    call = make_call(1, 4, 2, 200, 200, 64, device=device, is_causal=True)
    half = call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), dout=call.dout.to(dtype))
    expected = run(half, "triton")
    with torch.autocast("cuda", dtype=dtype):
        q, k, v = (x.requires_grad_() for x in (call.q, call.k, call.v))
        out = log_attention(q, k, v, call.values, is_causal=True)
    assert out.dtype == dtype
    assert torch.equal(out, expected["out"])
    gradients = torch.autograd.grad(out, (q, *call.values[:2]), half.dout)
    assert all(x.dtype == torch.float32 for x in gradients)


@pytest.mark.gpu
def test_memory_grows_with_the_length_not_its_square(device: torch.device) -> None:
    length = 131_072
    call = make_call(1, 1, 1, length, length, 64, dtype=torch.bfloat16, device=device, is_causal=True)
    q, k, v = (x.requires_grad_() for x in (call.q, call.k, call.v))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = log_attention(q, k, v, call.values, is_causal=True)
    out.backward(call.dout)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 12 * q.nbytes  # out, dq, dk, dv, lse and delta; the scores would be 1000 times q
    assert q.grad.isfinite().all()


@pytest.mark.gpu
def test_no_compilation_as_the_length_changes(device: torch.device) -> None:
    """Lengths and starts are no part of what a kernel is compiled for."""

    def compiled() -> int:
        modules = [sys.modules[f"logpe_kernels.{name}"] for name in ("forward", "backward")]
        kernels = [x for module in modules for x in vars(module).values() if isinstance(x, triton.JITFunction)]
        return sum(len(kernel.device_caches[device.index or 0][0]) for kernel in kernels)

    def attend(n: int) -> None:
        run(
            make_call(1, 4, 2, n, n, 64, device=device, is_causal=True, window=(100, None), query_start=n // 3),
            "triton",
        )

    for n in (200, 1024, 1):  # Triton compiles once more for strides that are multiples of 16, or 1
        attend(n)
    before = compiled()
    for n in (333, 16, 4096, 17, 2048, 1001):
        attend(n)
    assert compiled() == before > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device() -> None:
    check(make_call(1, 2, 1, 100, 100, 64, device=torch.device("cuda:1"), is_causal=True))
