"""Test LogAttention against nn.MultiheadAttention itself, and its swap inside torch's transformers."""

from __future__ import annotations

import copy
import inspect
import io
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune

import logpe.module
from logpe import HeadSink, LogAttention, LogPosition, log_attention, replace_attention

EMBED, HEADS, HEAD_DIM = 24, 3, 8
PRESETS = ("log-bias", "log-invariant", "log-rotary", "log-rotary-bias")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget earlier warnings, and ignore those of the slow path except where they are the subject."""
    monkeypatch.setattr(logpe.module, "_warned", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LogAttention takes the slow path")
        warnings.filterwarnings("ignore", "Support for mismatched")
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        warnings.filterwarnings("ignore", ".*enable_nested_tensor is True")
        yield


def causal_mask(length: int, source: int | None = None) -> Tensor:
    """Return torch's top-left mask: bool, where True hides."""
    return torch.ones(length, source or length, dtype=torch.bool).triu(1)


def pair(position: Any = "none", **options: Any) -> tuple[nn.MultiheadAttention, LogAttention]:
    """Return a nn.MultiheadAttention with every weight random, and a LogAttention that has loaded it."""
    plain = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(std=0.3)
    ours = LogAttention(EMBED, HEADS, position=position, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def inputs(module: nn.MultiheadAttention, length: int = 7, source: int = 11, batch: int = 2) -> list[Tensor]:
    shapes = (length, module.embed_dim), (source, module.kdim), (source, module.vdim)
    tensors = [torch.randn(batch, *shape, dtype=module.out_proj.weight.dtype) for shape in shapes]
    return tensors if module.batch_first else [x.transpose(0, 1) for x in tensors]


def outcome(module: nn.Module, tensors: list[Tensor], **options: Any) -> list[Any]:
    """Return output, weights, and the gradients of inputs, floating masks and parameters."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = dict(options)
    for name, x in options.items():
        if isinstance(x, Tensor) and x.requires_grad:
            options[name] = x.detach().requires_grad_()
            leaves.append(options[name])
    out, weights = module(*leaves[:3], **options)
    torch.manual_seed(5)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
    named = [(name, p) for name, p in module.named_parameters() if not name.startswith("position.")]
    gradients = torch.autograd.grad(loss, leaves + [p for _, p in named], allow_unused=True)
    return [out, weights, *gradients]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no-bias": {"bias": False},
    "kdim-vdim": {"kdim": 5, "vdim": 13},
    "batch-first": {"batch_first": True},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "batch_first": True},
    "both-appended": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 9},
}

# --- nn.MultiheadAttention ------------------------------------------------------------------------------------


def test_signatures_begin_with_torchs() -> None:
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = inspect.signature(getattr(LogAttention, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[p].default == theirs[p].default for p in theirs)
        assert all(ours[p].kind is inspect.Parameter.KEYWORD_ONLY for p in list(ours)[len(theirs) :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_and_names_are_torchs(variant: str) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **VARIANTS[variant]).state_dict()
    torch.manual_seed(3)
    ours = LogAttention(EMBED, HEADS, position="none", **VARIANTS[variant])
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs)
    assert all(torch.equal(ours.state_dict()[name], theirs[name]) for name in theirs)
    assert ours._qkv_same_embed_dim == ("kdim" not in VARIANTS[variant])
    before = copy.deepcopy(ours)
    for p in ours.parameters():
        nn.init.constant_(p, 0.5)
    torch.manual_seed(3)
    ours.out_proj.reset_parameters()  # the first that the constructor draws
    ours.reset_parameters()
    assert ours._qkv_same_embed_dim == before._qkv_same_embed_dim
    assert all(torch.equal(before.state_dict()[name], x) for name, x in ours.state_dict().items())
    assert all(p.is_meta for p in LogAttention(EMBED, HEADS, qk_norm=True, device="meta").parameters())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_torch(variant: str, need_weights: bool) -> None:
    plain, ours = pair(**VARIANTS[variant])
    tensors = inputs(plain)
    padding = torch.rand(2, 11) < 0.3
    padding[:, 0] = False
    hidden = torch.rand(7, 11) < 0.3
    hidden[:, 0] = False
    additive = torch.randn(2 * HEADS, 7, 11).masked_fill(torch.rand(2 * HEADS, 7, 11) < 0.2, -torch.inf)
    additive[..., 0] = 0
    cases: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"key_padding_mask": torch.zeros(2, 11).masked_fill(padding, -torch.inf)},
        {"key_padding_mask": torch.randn(2, 11, requires_grad=True)},
        {"attn_mask": hidden},
        {"attn_mask": torch.randn(7, 11, requires_grad=True)},
        {"attn_mask": additive, "key_padding_mask": torch.randn(2, 11)},
        {"attn_mask": hidden, "key_padding_mask": padding},
    ]
    for case in cases:
        case["need_weights"] = need_weights
        assert_same(outcome(ours, tensors, **case), outcome(plain, tensors, **case))
    per_head = {"need_weights": need_weights, "average_attn_weights": False}
    assert_same(outcome(ours, tensors, **per_head), outcome(plain, tensors, **per_head))


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_mean_what_they_mean_to_torch(need_weights: bool) -> None:
    """Masks may have any strides, be bool or floating, and hold -inf or the lowest finite number."""
    plain, ours = pair(batch_first=True)
    x = torch.randn(2, 7, EMBED)
    padding = torch.arange(7) > torch.tensor([[6], [3]])
    lowest = torch.finfo(torch.float32).min
    low = torch.zeros(2, 7).masked_fill(padding, lowest)
    low_causal = torch.zeros(7, 7).masked_fill(causal_mask(7), lowest)
    cases: list[dict[str, Any]] = [
        {"key_padding_mask": padding.T.contiguous().T},
        {"key_padding_mask": low.T.contiguous().T},
        {"key_padding_mask": torch.stack((low, low + 1), 2)[..., 0]},
        {"key_padding_mask": low[1:].expand(2, 7)},
        {"attn_mask": low_causal},
        {"attn_mask": low_causal.T.contiguous().T},
        {"attn_mask": low_causal, "key_padding_mask": low},
        {"attn_mask": low_causal, "key_padding_mask": padding},
        {"attn_mask": low_causal.expand(2 * HEADS, 7, 7)},
    ]
    for case in cases:
        options = case | {"need_weights": need_weights}
        with sdpa_kernel(SDPBackend.MATH):  # torch's flash has wrong gradients where all keys have the lowest number
            theirs = outcome(plain, [x] * 3, **options)
        assert_same(outcome(ours, [x] * 3, **options), theirs)
    # The same for all keys hides nothing. (In torch so low a number leaves nothing of the scores, and two give NaN.)
    expected, _ = ours(x, x, x, need_weights=need_weights)
    low = torch.full((7, 7), lowest)
    for case in ({"key_padding_mask": low[:2]}, {"attn_mask": low}, {"attn_mask": low, "key_padding_mask": low[:2]}):
        out, _ = ours(x, x, x, need_weights=need_weights, **case)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)  # logits near 131,008 are 2^-7 apart


@pytest.mark.parametrize("position", ["none", "log-bias-rope"])
def test_scores_beyond_the_range_of_half_precision(position: str) -> None:
    """Both paths give one result for scores beyond 65,504 before scaling and below it after."""
    for dtype in (torch.float16, torch.bfloat16):
        ours = LogAttention(64, 2, batch_first=True, position=position)
        with torch.no_grad():
            ours.in_proj_weight[:128] = 60 * torch.eye(64).repeat(2, 1)
        ours, exact = ours.to(dtype), copy.deepcopy(ours).double()
        x = torch.randn(2, 9, 64, dtype=dtype)
        exact.load_state_dict({name: w.double() for name, w in ours.state_dict().items()})
        expected, expected_weights = exact(x.double(), x.double(), x.double())
        fast, _ = ours(x, x, x, need_weights=False)
        slow, weights = ours(x, x, x)
        for out in (fast, slow):
            torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(weights.double(), expected_weights, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("variant", ["packed", "batch-first", "bias-kv", "zero-attn"])
def test_causal_hint_equals_torch(variant: str, need_weights: bool, padded: bool) -> None:
    plain, ours = pair(**VARIANTS[variant])
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    options: dict[str, Any] = {"need_weights": need_weights, "is_causal": True}
    if padded:
        options["key_padding_mask"] = padding
    for length in (9, 5, 13):  # top-left where there are fewer or more queries than keys
        tensors = inputs(plain, length, 9)
        options["attn_mask"] = causal_mask(length, 9)
        assert_same(outcome(ours, tensors, **options), outcome(plain, tensors, **options))


def test_causal_hint_needs_no_mask() -> None:
    plain, ours = pair()
    tensors = inputs(plain, 9, 9)
    for need_weights in (True, False):
        theirs = outcome(plain, tensors, attn_mask=causal_mask(9), is_causal=True, need_weights=need_weights)
        assert_same(outcome(ours, tensors, is_causal=True, need_weights=need_weights), theirs)


@pytest.mark.parametrize("variant", ["packed", "batch-first", "kdim-vdim", "both-appended"])
def test_unbatched_equals_torch(variant: str) -> None:
    plain, ours = pair(**VARIANTS[variant])
    tensors = [torch.randn(n, d) for n, d in ((5, EMBED), (9, plain.kdim), (9, plain.vdim))]
    for case in (
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"need_weights": False, "key_padding_mask": torch.arange(9) > 5},
        {"need_weights": False, "attn_mask": torch.randn(HEADS, 5, 9)},
    ):
        assert_same(outcome(ours, tensors, **case), outcome(plain, tensors, **case))


@pytest.mark.parametrize("heads", [3, 4])
def test_self_attention_and_fused_inference_equal_torch(heads: int) -> None:
    plain = nn.MultiheadAttention(EMBED, heads, batch_first=True).eval()
    ours = LogAttention(EMBED, heads, batch_first=True, position=None).eval()
    ours.load_state_dict(plain.state_dict())
    x, padding = torch.randn(2, 9, EMBED), torch.arange(9).expand(2, 9) > 6
    with torch.no_grad():
        for options in (
            {},
            {"key_padding_mask": padding},
            {"need_weights": False, "key_padding_mask": padding},
        ):
            theirs = plain(x, x, x, **options)
            assert_same(list(ours(x, x, x, **options)), list(theirs))


def test_float64_equals_torch() -> None:
    plain, ours = pair(dtype=torch.float64)
    tensors = inputs(plain)
    for need_weights in (True, False):
        a, b = (outcome(m, tensors, need_weights=need_weights) for m in (ours, plain))
        for x, y in zip(a, b, strict=True):
            assert x is y is None or torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_a_query_without_keys_gets_zero_weights() -> None:
    _, ours = pair("log-bias")
    x = torch.randn(5, 2, EMBED)
    padding = torch.tensor([[False] * 5, [True] * 5])
    out, _, dx, *_ = outcome(ours, [x, x, x], key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(5, -1))
    assert torch.isfinite(out).all()
    assert torch.isfinite(dx).all()
    slow, weights = ours(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(slow, out)
    assert (weights[1] == 0).all()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_weights(num_kv_heads: int, separate: bool) -> None:
    sizes: dict[str, Any] = {"kdim": 10, "vdim": 14} if separate else {"add_bias_kv": True}
    ours = LogAttention(32, 4, num_kv_heads=num_kv_heads, position=None, **sizes)
    plain = nn.MultiheadAttention(32, 4, **sizes)
    kv_dim = num_kv_heads * 8
    assert ours.in_proj_bias.shape == (32 + 2 * kv_dim,)
    if separate:
        assert ours.k_proj_weight.shape == (kv_dim, 10)
        assert ours.v_proj_weight.shape == (kv_dim, 14)
    else:
        assert ours.in_proj_weight.shape == (32 + 2 * kv_dim, 32)

    def repeat(x: Tensor, dim: int = 0) -> Tensor:
        return x.unflatten(dim, (num_kv_heads, 8)).repeat_interleave(4 // num_kv_heads, dim).flatten(dim, dim + 1)

    state = {}
    with torch.no_grad():
        for name, x in ours.state_dict().items():
            x.normal_(std=0.3)
            if name in ("in_proj_weight", "in_proj_bias"):
                x = torch.cat([x[:32], repeat(x[32 : 32 + kv_dim]), repeat(x[32 + kv_dim :])])
            elif name in ("k_proj_weight", "v_proj_weight"):
                x = repeat(x)
            elif name in ("bias_k", "bias_v"):
                x = repeat(x, 2)
            state[name] = x
    plain.load_state_dict(state)
    tensors = inputs(plain)
    for need_weights in (True, False):
        a, b = (m(*tensors, need_weights=need_weights) for m in (ours, plain))
        assert_same(list(a), list(b))


# --- positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_gain", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_position_reaches_both_paths(preset: str, query_gain: bool) -> None:
    """With a query gain, a sink does, too."""
    ours = LogAttention(
        EMBED,
        HEADS,
        position=preset,
        position_options={"query_gain": query_gain, "gain_length": 5},
        qk_norm=True,
        sink=query_gain,
    )
    assert isinstance(ours.position, LogPosition)
    for parameter in () if ours.sink is None else ours.sink.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(9, 2, EMBED)
    padding = torch.arange(9).expand(2, 9) > torch.tensor([[8], [5]])
    for options in ({}, {"is_causal": True}, {"key_padding_mask": padding}):
        results = []
        for need_weights in (False, True):
            out, weights = ours(x, x, x, need_weights=need_weights, **options)
            gradients = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
            results.append([out, *gradients])
        assert_same(results[0], results[1])
        assert weights.shape == (2, 9, 9)
        if query_gain:
            assert (weights.sum(-1) < 1).all()
        else:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    # the hint given with the mask, and the mask alone, hide the same keys (a gain by position needs the hint)
    hinted = ours(x, x, x, is_causal=True, attn_mask=causal_mask(9), need_weights=False)[0]
    torch.testing.assert_close(hinted, ours(x, x, x, is_causal=True, attn_mask=causal_mask(9))[0])
    if not query_gain:
        torch.testing.assert_close(hinted, ours(x, x, x, attn_mask=causal_mask(9), need_weights=False)[0])


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_log_attention_by_hand(is_causal: bool) -> None:
    options = {"query_gain": True, "gain_length": 3}
    ours = LogAttention(32, 4, num_kv_heads=2, position="log-rotary-bias", position_options=options, batch_first=True)
    x = torch.randn(2, 9, 32)
    q, k, v = F.linear(x, ours.in_proj_weight, ours.in_proj_bias).split((32, 16, 16), -1)
    q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
    for start in (0, 4, torch.tensor([7, -2])):
        out = log_attention(q, k, v, ours.position, is_causal=is_causal, key_start=start, query_start=start)
        expected = ours.out_proj(out.transpose(1, 2).flatten(2))
        for need_weights in (False, True):
            result = ours(x, x, x, is_causal=is_causal, need_weights=need_weights, key_start=start)[0]
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_sink_is_the_zero_key_of_torch(dtype: torch.dtype) -> None:
    """At first it has score zero and value zero, as add_zero_attn's, for every query."""
    plain = nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True, dtype=dtype)
    ours = LogAttention(EMBED, HEADS, position=None, sink=True, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    assert ours.sink is not None
    assert all((x == 0).all() for x in ours.sink.parameters())
    x = inputs(ours, 5, 9)
    expected, weights = plain(*x)
    tolerance: dict[str, Any] = dict(rtol=0.02, atol=0.02) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours(*x, need_weights=False)[0], expected, **tolerance)
    torch.testing.assert_close(ours(*x)[1], weights[..., :-1], **tolerance)


def test_a_sink_by_hand() -> None:
    ours = LogAttention(EMBED, HEADS, sink=True, position_options={"query_gain": True, "gain_length": 3.0})
    assert ours.sink is not None
    for parameter in ours.sink.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(9, 2, EMBED)
    q, k, v = ours._project(x, x, x)
    score = torch.einsum("bhnd,hd->bhn", q, ours.sink.key) / HEAD_DIM**0.5 + ours.sink.bias[:, None]
    out = log_attention(q, k, v, ours.position, is_causal=True, sink=score)
    expected = ours.out_proj(out.permute(2, 0, 1, 3).flatten(2))
    torch.testing.assert_close(ours(x, x, x, need_weights=False, is_causal=True)[0], expected)
    old = LogAttention.__new__(LogAttention)
    state = vars(LogAttention(EMBED, HEADS))
    old.__setstate__(dict(state, _modules={n: m for n, m in state["_modules"].items() if n != "sink"}))
    assert old.sink is None  # pickled before there was one
    assert old(x, x, x, need_weights=False)[0].shape == x.shape


def test_a_sink_and_padding_that_holds_anything() -> None:
    ours = LogAttention(EMBED, HEADS, batch_first=True, sink=True)
    x, hidden = torch.randn(2, 5, EMBED), torch.zeros(2, 5, dtype=torch.bool)
    expected = ours(x, x, x, key_padding_mask=hidden.index_fill(1, torch.tensor([3, 4]), True), need_weights=False)[0]
    hidden[0, 3:] = True
    x[0, 3:] = math.nan
    for need_weights in (False, True):
        out = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
        torch.testing.assert_close(out[0, :3], expected[0, :3])
        assert out[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:LogAttention")
def test_a_sink_of_large_scores_in_half_precision() -> None:
    """Products beyond 65504, under autocast too."""
    ours = LogAttention(8, 1, bias=False, position=None, sink=True, batch_first=True)
    assert ours.sink is not None
    with torch.no_grad():
        ours.in_proj_weight.copy_(torch.cat([100 * torch.eye(8), 100 * torch.eye(8), torch.eye(8)]))
        ours.out_proj.weight.copy_(torch.eye(8))
        ours.sink.key.fill_(100.0)
    x = torch.ones(1, 3, 8)
    expected = torch.full_like(x, 0.75)
    for need_weights in (False, True):
        out = copy.deepcopy(ours).half()(x.half(), x.half(), x.half(), need_weights=need_weights)[0]
        torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=0)
        with torch.autocast("cpu", torch.float16):
            torch.testing.assert_close(ours(x, x, x, need_weights=need_weights)[0].float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("share", [False, True])
def test_options_of_positions_are_not_for_cross_attention_without_one(share: bool) -> None:
    layer = nn.TransformerDecoderLayer(EMBED, HEADS)
    assert replace_attention(layer, position_options={"query_gain": True}, share_position=share) == 2
    assert layer.self_attn.position.alpha is not None
    assert layer.multihead_attn.position is None
    with pytest.raises(ValueError, match="position_options must be empty unless position is the name of a preset"):
        LogAttention(EMBED, HEADS, position=None, position_options={"query_gain": True})


def test_bad_sinks() -> None:
    q = torch.randn(1, 2, 5, 8)
    sink = HeadSink(2, 8)
    assert sink(q).shape == (1, 2, 5)
    assert sink(q[0]).shape == (2, 5)  # packed, with the heads first
    for bad, message in (
        (lambda: HeadSink(0, 8), "num_heads must be at least 1, got 0"),
        (lambda: HeadSink(2, 2.5), "head_dim must be an integer, got 2.5"),
        (lambda: HeadSink(1, 8)(q), r"q must have shape \(B, 1, N, 8\), got \(1, 2, 5, 8\)"),
        (lambda: sink(q[:, :1]), r"q must have shape \(B, 2, N, 8\), got \(1, 1, 5, 8\)"),
        (lambda: sink(None), "q must be a tensor, got NoneType"),
        (lambda: sink(q, "a"), "scale must be a number, got 'a'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bad()


def test_positions_say_where_queries_and_keys_stand() -> None:
    ours = LogAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(2, 9, EMBED)
    whole = ours(x, x, x, is_causal=True, need_weights=False)[0]
    for need_weights in (False, True):  # the last 4 queries, as one decodes
        part = ours(x[:, 5:], x, x, is_causal=True, need_weights=need_weights, query_start=5)[0]
        torch.testing.assert_close(part, whole[:, 5:])
        starts = torch.tensor([5, 5])
        part = ours(x[:, 5:], x, x, is_causal=True, need_weights=need_weights, query_start=starts)[0]
        torch.testing.assert_close(part, whole[:, 5:])
        # left padding: tokens at negative positions do not exist
        padded = torch.cat([torch.full((2, 3, EMBED), torch.nan), x], 1)
        shifted = ours(padded, padded, padded, is_causal=True, need_weights=need_weights, key_start=-3)[0]
        torch.testing.assert_close(shifted[:, 3:], whole)
    top_left = ours(x[:, :4], x, x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(top_left, whole[:, :4])


def test_cross_attention_with_a_position_needs_query_start() -> None:
    ours = LogAttention(EMBED, HEADS)
    tensors = inputs(ours, 5, 9)
    for options in ({}, {"need_weights": False}, {"attn_mask": torch.zeros(5, 9)}):
        with pytest.raises(ValueError, match="query_start is required for 5 queries and 9 keys"):
            ours(*tensors, **options)
    given = ours(*tensors, query_start=2)[0]
    ours.query_start = 2
    torch.testing.assert_close(ours(*tensors, need_weights=False)[0], given)


def test_padding_does_not_move_the_query_gain() -> None:
    ours = LogAttention(EMBED, HEADS, position="none", position_options={"query_gain": True, "gain_length": 3})
    x, padded = torch.randn(6, 1, EMBED), torch.randn(15, 1, EMBED)
    padded[:6] = x
    alone = ours(x, x, x, need_weights=False)[0]
    mask = torch.arange(15)[None] >= 6
    for padding in (mask, torch.zeros(1, 15).masked_fill(mask, -torch.inf)):
        for need_weights in (False, True):
            out = ours(padded, padded, padded, key_padding_mask=padding, need_weights=need_weights)[0]
            torch.testing.assert_close(out[:6], alone)


def test_qk_norm() -> None:
    ours = LogAttention(EMBED, HEADS, position=None, qk_norm=True, batch_first=True)
    assert {"q_norm.weight", "k_norm.weight"} <= set(ours.state_dict())
    x = torch.randn(2, 7, EMBED)
    q, k, v = (
        t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for t in F.linear(x, ours.in_proj_weight, ours.in_proj_bias).chunk(3, -1)
    )
    q, k = F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,))
    expected = ours.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    for need_weights in (False, True):
        torch.testing.assert_close(ours(x, x, x, need_weights=need_weights)[0], expected)


# --- the slow path says so; dropout ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_learned_masks_get_their_gradient(is_causal: bool) -> None:
    """A mask that is learned is no mere hint."""
    plain, ours = pair()
    x = [torch.randn(5, 2, EMBED)] * 3
    mask = (torch.randn(5, 5) + causal_mask(5)).requires_grad_()
    expected = outcome(plain, x, attn_mask=mask, need_weights=False)
    assert_same(outcome(ours, x, attn_mask=mask, need_weights=False, is_causal=is_causal), expected)
    padding = torch.randn(2, 5, requires_grad=True)
    causal = causal_mask(5) if is_causal else None
    expected = outcome(plain, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)
    assert_same(outcome(ours, x, key_padding_mask=padding, need_weights=False, is_causal=is_causal), expected)


def test_slow_path_warns_once_per_reason() -> None:
    ours = LogAttention(EMBED, HEADS)
    x = torch.randn(5, 2, EMBED)
    learned = torch.zeros(2, 5, requires_grad=True)
    cases = {
        "need_weights": {},
        "attn_mask": {"attn_mask": torch.zeros(5, 5), "need_weights": False},
        "requires a gradient": {"key_padding_mask": learned, "need_weights": False},
    }
    for reason, options in cases.items():
        layers = nn.ModuleList([LogAttention(EMBED, HEADS), ours, ours])
        with pytest.warns(UserWarning, match=reason) as caught:
            [layer(x, x, x, **options) for layer in layers]
        assert len(caught) == 1
        assert caught[0].filename == __file__
    fast: list[dict[str, Any]] = [
        {"key_padding_mask": torch.zeros(2, 5)},
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
        {"is_causal": True},
        {"is_causal": True, "attn_mask": causal_mask(5), "key_padding_mask": torch.zeros(2, 5)},
    ]
    logpe.module._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in fast:
            ours(x, x, x, need_weights=False, **options)
        with torch.no_grad():
            ours(x, x, x, need_weights=False, key_padding_mask=learned)


def test_dropout_is_the_same_on_both_paths() -> None:
    ours = LogAttention(64, 8, dropout=0.25, batch_first=True)
    x = torch.randn(3, 19, 64)
    outs = []
    for need_weights in (False, True):
        torch.manual_seed(11)
        out, weights = ours(x, x, x, need_weights=need_weights, average_attn_weights=False)
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1])
    dropped = (weights == 0).double().mean()  # 8664 draws: 0.25 +- 0.005
    assert abs(dropped - 0.25) < 0.025
    torch.manual_seed(12)
    assert not torch.allclose(ours(x, x, x, need_weights=False)[0], outs[0])
    ours.eval()
    out, weights = ours(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 19))
    torch.testing.assert_close(out, ours(x, x, x, need_weights=False)[0])


# --- state_dict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_plain_state_dict_loads_strictly_and_keeps_the_rest(assign: bool) -> None:
    plain = nn.MultiheadAttention(EMBED, HEADS)
    ours = LogAttention(EMBED, HEADS, position="log-invariant", qk_norm=True, sink=True)
    kept = {name: p.detach().clone() for name, p in ours.named_parameters() if name not in plain.state_dict()}
    assert {n.split(".")[0] for n in kept} == {"position", "q_norm", "k_norm", "sink"}
    before = dict(ours.named_parameters())
    state = plain.state_dict()
    names = list(state)
    ours.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == names
    for name, value in ours.named_parameters():
        assert torch.equal(value, kept[name] if name in kept else state[name])
        if name in kept:
            assert value is before[name]
            assert value.requires_grad


def test_own_state_dict_round_trips_and_must_be_complete() -> None:
    options: dict[str, Any] = {
        "position": "log-rotary-bias",
        "qk_norm": True,
        "position_options": {"query_gain": True},
        "sink": True,
    }
    ours, other = (LogAttention(EMBED, HEADS, **options) for _ in range(2))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert all(torch.equal(other.state_dict()[name], x) for name, x in ours.state_dict().items())
    for name in ("position.raw_rate", "q_norm.weight", "sink.bias"):
        state = ours.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*position.raw_power"):
        LogAttention(EMBED, HEADS, position=None).load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        other.load_state_dict({})


def test_both_ways_between_plain_and_none() -> None:
    plain, ours = nn.MultiheadAttention(EMBED, HEADS), LogAttention(EMBED, HEADS, position="none")
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    log = LogAttention(EMBED, HEADS)
    plain.load_state_dict({k: v for k, v in log.state_dict().items() if not k.startswith("position.")})


@pytest.mark.parametrize("share", [False, True])
def test_plain_state_dict_loads_into_a_swapped_encoder(share: bool) -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32)
    plain, swapped = nn.TransformerEncoder(layer, 3), nn.TransformerEncoder(layer, 3)
    for p in plain.parameters():
        nn.init.normal_(p)
    assert replace_attention(swapped, share_position=share) == 3
    kept = {n: x.clone() for n, x in swapped.state_dict().items() if ".position." in n}
    assert len(kept) == 6
    state = plain.state_dict()
    names = list(state)
    swapped.load_state_dict(state, strict=True)
    assert list(state) == names
    assert all(torch.equal(x, (kept | state)[n]) for n, x in swapped.state_dict().items())
    full = swapped.state_dict()
    swapped.load_state_dict(full)
    del full["layers.1.self_attn.position.raw_rate"]
    with pytest.raises(RuntimeError, match=r"layers.1.self_attn.position.raw_rate"):
        swapped.load_state_dict(full)


def test_copies_and_pickles() -> None:
    ours = LogAttention(EMBED, HEADS, qk_norm=True)
    x = torch.randn(5, 2, EMBED)
    expected = ours(x, x, x, need_weights=False)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert isinstance(twin, LogAttention)
        assert twin._qkv_same_embed_dim is True
        assert len(twin._forward_pre_hooks) == 1
        assert torch.equal(twin(x, x, x, need_weights=False)[0], expected)


# --- replace_attention ----------------------------------------------------------------------------------------


def transformer(**options: Any) -> nn.Transformer:
    model = nn.Transformer(EMBED, HEADS + 1, 2, 2, 32, **{"dropout": 0.0, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_with_none_is_the_plain_one(batch_first: bool, norm_first: bool) -> None:
    plain = transformer(batch_first=batch_first, norm_first=norm_first)
    swapped = copy.deepcopy(plain)
    assert replace_attention(swapped, "none") == 6
    assert list(swapped.state_dict()) == list(plain.state_dict())
    source, target = torch.randn(2, 11, EMBED), torch.randn(2, 7, EMBED)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    padding = torch.arange(11).expand(2, 11) > torch.tensor([[10], [6]])
    options: dict[str, Any] = {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
    }
    results = []
    for model in (swapped, plain):
        out = model(source, target, **options)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    swapped.eval()
    with torch.no_grad():
        torch.testing.assert_close(swapped(source, target, **options), results[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("heads", [2, 3])
def test_encoder_eval_equals_train(heads: int, norm_first: bool, masks: str) -> None:
    layer = nn.TransformerEncoderLayer(EMBED, heads, 32, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2)
    plain = copy.deepcopy(encoder).eval()
    assert replace_attention(encoder, "log-invariant") == 2
    assert not encoder.use_nested_tensor
    assert not encoder.enable_nested_tensor
    x = torch.randn(2, 9, EMBED)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    options: dict[str, Any] = {}
    if masks in ("padding", "both"):
        options["src_key_padding_mask"] = padding
    if masks in ("causal", "both"):
        options["mask"] = causal_mask(9)
    trained = encoder(x, **options)
    encoder.eval()
    assert trained.shape == encoder(x, **options).shape
    with torch.no_grad():
        evaluated = encoder(x, **options)
    torch.testing.assert_close(evaluated, trained)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x, **options), trained)
        real = ~padding if "src_key_padding_mask" in options else torch.ones_like(padding)
        assert (plain(x, **options)[real] - evaluated[real]).abs().max() > 1e-3  # the position is at work
        if "src_key_padding_mask" in options:  # and padding changes nothing
            mask = {"mask": causal_mask(5)} if "mask" in options else {}
            torch.testing.assert_close(encoder(x[1:, :5], **mask), evaluated[1:, :5])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_encoder_built_around_a_swapped_layer(by_hand: bool, norm_first: bool) -> None:
    """Such an encoder makes nested tensors of a padded batch, and sets the padding to zero, as torch's own does."""
    layer = nn.TransformerEncoderLayer(EMBED, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
    if by_hand:
        layer.self_attn = LogAttention(EMBED, 2, batch_first=True)
    else:
        assert replace_attention(layer) == 1
    encoder = nn.TransformerEncoder(layer, 2)
    assert encoder.use_nested_tensor != norm_first
    x, padding = torch.randn(2, 9, EMBED), torch.arange(9).expand(2, 9) > torch.tensor([[8], [6]])
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal_mask(9)}):
        trained = encoder.train()(x, **options)
        real = torch.ones_like(padding) if "mask" in options or not options else ~padding
        encoder.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                evaluated = encoder(x, **options)
            torch.testing.assert_close(evaluated[real], trained[real])
            if not real.all() and not norm_first:
                assert (evaluated[~real] == 0).all()
    layer.eval().self_attn._forward_pre_hooks.clear()  # as those do who remove hooks
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"set_fastpath_enabled\(False\)"):
        layer(x)


@pytest.mark.parametrize("cross", [None, "log-bias"])
def test_decoder_eval_equals_train_and_cross_attention_has_no_position_unasked(cross: str | None) -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(EMBED, HEADS, 32, 0.0), 2)
    assert replace_attention(decoder, cross_attention_position=cross) == 4
    for layer in decoder.layers:
        assert layer.self_attn.position.preset == "log-bias-rope"
        assert (layer.multihead_attn.position is None) == (cross is None)
    target, memory = torch.randn(5, 2, EMBED), torch.randn(9, 2, EMBED)
    options = {"tgt_mask": causal_mask(5), "memory_key_padding_mask": torch.arange(9).expand(2, 9) > 6}
    trained = decoder(target, memory, **options)
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval()(target, memory, **options), trained)
        reversed_memory = decoder(target, memory[:7].flip(0))
        if cross is None:  # without a position the order of the memory does not matter
            torch.testing.assert_close(reversed_memory, decoder(target, memory[:7]))
        else:
            assert not torch.allclose(reversed_memory, decoder(target, memory[:7]))


def test_cross_attention_is_recognised() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(EMBED, HEADS)
            self.to_image = nn.MultiheadAttention(EMBED, HEADS, vdim=8)
            self.cross_attention = nn.MultiheadAttention(EMBED, HEADS)

    block = Block()
    assert replace_attention(block) == 3
    assert [m.position is None for m in block.children()] == [False, True, True]


def test_default_dropout_trains() -> None:
    model = nn.Transformer(EMBED, HEADS, 2, 2, 32, batch_first=True)
    assert replace_attention(model, "log-rotary-bias") == 6
    assert all(m.dropout == 0.1 for m in model.modules() if isinstance(m, LogAttention))
    optimizer = torch.optim.AdamW(logpe.parameter_groups(model, 0.1), lr=3e-3)
    source, target = torch.randn(4, 11, EMBED), torch.randn(4, 7, EMBED)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(source, target[:, :-1], tgt_mask=causal_mask(6)) - target[:, 1:]).square().mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        a, b = model(source, target), model(source, target)
        assert not torch.allclose(a, b)
        model.eval()
        torch.testing.assert_close(model(source, target), model(source, target))


def test_weights_mode_and_hooks_are_kept() -> None:
    layers: list[Any] = [nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.2, dtype=torch.float64) for _ in range(2)]
    model = nn.Sequential(*layers)
    first, second = (layer.self_attn for layer in layers)
    second.in_proj_weight = first.in_proj_weight  # tied
    first.out_proj.weight.requires_grad_(False)
    first.eval()
    calls: list[int] = []
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    before = dict(model.named_parameters(remove_duplicate=False))
    assert replace_attention(model, qk_norm=True) == 2
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    swapped = layers[0].self_attn
    assert layers[1].self_attn.in_proj_weight is swapped.in_proj_weight
    assert not swapped.out_proj.weight.requires_grad
    assert swapped.dropout == 0.2
    modules = [m for m in swapped.modules() if m is not swapped.out_proj]
    assert all(not m.training for m in modules)
    assert layers[1].self_attn.training
    assert swapped.position.raw_power.dtype == torch.float32
    assert swapped.q_norm.weight.dtype == torch.float64
    assert first._modules.keys() == {"out_proj"}  # the old module is as it was
    x = torch.randn(5, 2, EMBED, dtype=torch.float64)
    model(x)
    assert calls == [1]
    handle.remove()
    model(x)
    assert calls == [1]


def test_a_module_held_twice_is_swapped_once() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    inner = nn.ModuleList([attention])
    model = nn.ModuleDict({"a": attention, "b": inner})
    assert replace_attention(model) == 1
    assert isinstance(model["a"], LogAttention)
    assert model["a"] is inner[0]
    with pytest.warns(UserWarning, match="swapped 0"):
        assert replace_attention(model) == 0


def test_sharing_positions() -> None:
    def positions(**options: Any) -> list[Any]:
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32), 3)
        replace_attention(encoder, **options)
        return [layer.self_attn.position for layer in encoder.layers]

    assert len(set(positions())) == 3
    assert len(set(positions(share_position=True))) == 1
    own = LogPosition(HEADS, HEAD_DIM, "log-invariant")
    assert set(positions(position=own, share_position=True)) == {own}
    copies = positions(position=own)
    assert len(set(copies)) == 3
    assert own not in copies
    assert all(p.preset == "log-invariant" for p in copies)
    assert positions(position_options={"learnable": False})[0].raw_power.requires_grad is False


def test_what_cannot_be_swapped() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *inputs: Any, **options: Any) -> Any:
            return inputs[0], None

    model = nn.ModuleList([Own(EMBED, HEADS), nn.MultiheadAttention(EMBED, HEADS)])
    with pytest.warns(UserWarning, match="swapped 1 .*left alone: Own"):
        assert replace_attention(model) == 1
    assert type(model[0]) is Own
    for itself in (nn.MultiheadAttention(EMBED, HEADS), LogAttention(EMBED, HEADS)):
        with pytest.raises(ValueError, match="construct a LogAttention"):
            replace_attention(itself)
    with pytest.raises(TypeError, match="model"):
        replace_attention("model")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="swapped 0"):
        assert replace_attention(nn.Linear(2, 2)) == 0
    # all or nothing
    model = nn.ModuleList([nn.MultiheadAttention(EMBED, h, add_zero_attn=h == 2) for h in (1, 2)])
    with pytest.raises(ValueError, match="add_zero_attn"):
        replace_attention(model)
    assert not any(isinstance(m, LogAttention) for m in model)
    assert replace_attention(model, None) == 2


# --- what torch and others do to modules ----------------------------------------------------------------------


def pruned(module: nn.Module) -> None:
    torch.manual_seed(5)
    prune.random_unstructured(module, "in_proj_weight", amount=0.3)


COMPUTED: dict[str, Any] = {
    "identity": lambda m: parametrize.register_parametrization(m, "in_proj_weight", nn.Identity()),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "in_proj_weight"),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "in_proj_bias", dim=None),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "in_proj_weight"),
    "pruned": pruned,
}


@pytest.mark.parametrize("change", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
def test_computed_weights_equal_torchs(change: str) -> None:
    plain, ours = pair(batch_first=True)
    with torch.no_grad():
        ours.in_proj_bias.add_(0.1)
        plain.in_proj_bias.add_(0.1)
    for module in (plain, ours):
        torch.manual_seed(5)
        COMPUTED[change](module)
    x = torch.randn(2, 7, EMBED)
    assert_same(outcome(ours, [x] * 3, need_weights=False), outcome(plain, [x] * 3, need_weights=False))
    assert ours._qkv_same_embed_dim
    if change in ("old weight_norm", "pruned"):  # the others make it another class, which is left alone
        model = nn.ModuleList([plain])
        assert replace_attention(model, "none") == 1
        assert_same(outcome(model[0], [x] * 3), outcome(plain, [x] * 3))


@pytest.mark.parametrize("alive", ["to_empty", "assign", "skip_init"])
def test_modules_made_without_memory(alive: str) -> None:
    options: dict[str, Any] = dict(batch_first=True, qk_norm=True, sink=True)
    source = LogAttention(EMBED, HEADS, **options)
    if alive == "skip_init":
        ours = nn.utils.skip_init(LogAttention, EMBED, HEADS, **options)
    else:
        with torch.device("meta"):
            ours = LogAttention(EMBED, HEADS, **options)
    if alive == "to_empty":
        ours.to_empty(device="cpu")
        for module in ours.modules():  # as those do who initialise late
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert all(torch.isfinite(p).all() for p in ours.parameters())
    ours.load_state_dict(source.state_dict(), assign=alive == "assign")
    x = torch.randn(2, 7, EMBED)
    for need_weights in (False, True):
        assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], source(x, x, x, need_weights=need_weights)[0])


class Attending(nn.Module):
    """Hold an attention module."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention, self.linear = attention, nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out, _ = self.attention(self.linear(x), x, x, key_padding_mask=padding, need_weights=False)
        return out + x


@pytest.mark.parametrize("position", ["none", "log-bias-rope"])
def test_lora_of_peft(position: str) -> None:
    """An adapter trains, merges, is taken back, saved and loaded, as with nn.MultiheadAttention."""
    peft = pytest.importorskip("peft")
    plain, ours = pair(position, batch_first=True)
    models = [Attending(ours), Attending(plain)]
    models[1].linear = copy.deepcopy(models[0].linear)
    x, results = torch.randn(2, 7, EMBED), []
    for model in models[: 2 if position == "none" else 1]:
        base = model(x)
        fresh = copy.deepcopy(model)
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"], r=3))
        torch.testing.assert_close(adapted(x), base)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            (adapted(x) - 1).square().mean().backward()
            optimizer.step()
        out = adapted.eval()(x)
        assert (out - base).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(x), base, rtol=1e-4, atol=1e-4)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(x), out, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()
        again = peft.get_peft_model(fresh, peft.LoraConfig(target_modules=["attention"], r=3))
        peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(adapted))
        torch.testing.assert_close(again(x), out, rtol=1e-4, atol=1e-4)
        merged = adapted.merge_and_unload()
        assert type(merged.attention) is type(fresh.attention.base_layer)
        torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-4)
        results.append([out, *trained])
    if position == "none":
        assert_same(*results)


def test_lora_of_peft_in_an_encoder_and_what_it_refuses() -> None:
    """Neither the position nor the adapter is lost in evaluation, where torch has a path that skips both."""
    peft = pytest.importorskip("peft")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, 2, 32, 0.0, batch_first=True), 2)
    assert replace_attention(encoder) == 2
    x, padding = torch.randn(2, 7, EMBED), torch.arange(7) > torch.tensor([[6], [3]])
    base = encoder(x)
    config = peft.LoraConfig(target_modules=["self_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(encoder, config)
    for options in ({}, {"src_key_padding_mask": padding}):
        trained = adapted.train()(x, **options)
        assert (trained - base).abs().max() > 1e-2
        with torch.no_grad():
            torch.testing.assert_close(adapted.eval()(x, **options), trained)
    for options in ({"num_kv_heads": 1}, {"kdim": 8, "vdim": 8}):  # whose projections are not 3 * embed_dim rows
        module = LogAttention(EMBED, HEADS, **options)
        assert not module._qkv_same_embed_dim
        with pytest.raises(ValueError, match="Only same"):
            peft.get_peft_model(Attending(module), peft.LoraConfig(target_modules=["attention"]))


def test_is_a_leaf_of_fx() -> None:
    """torch.fx keeps the module whole, like nn.MultiheadAttention, and a graph of the module itself is refused."""
    for attention in pair(batch_first=True)[::-1]:
        model = Attending(attention)
        graph = torch.fx.symbolic_trace(model)
        assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["linear", "attention"]
        for length in (5, 9):
            x, padding = torch.randn(2, length, EMBED), torch.arange(length).expand(2, length) > 3
            assert torch.equal(graph(x, padding), model(x, padding))
    with pytest.raises(torch.fx.proxy.TraceError, match="trace a model that holds it"):
        torch.fx.symbolic_trace(LogAttention(EMBED, HEADS))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, 2, 32)
    assert replace_attention(layer) == 1
    for module in (layer, layer.self_attn):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile LogAttention: use torch.compile"):
            torch.jit.script(module)


def test_the_replaced_module_keeps_its_own_fused_inference() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, 2, 32)
    plain = layer.self_attn
    assert replace_attention(layer) == 1
    assert not plain._forward_pre_hooks
    assert len(layer.self_attn._forward_pre_hooks) == 1
    for twin in (copy.deepcopy(layer.self_attn), copy.copy(layer.self_attn)):
        assert len(twin._forward_pre_hooks) == 1


def test_pickled_before_the_flag_told_the_truth() -> None:
    for options, told in (({}, True), ({"kdim": 8}, False), ({"num_kv_heads": 1}, False)):
        ours = LogAttention(EMBED, HEADS, position=None, **options)
        assert ours._qkv_same_embed_dim == told
        state = dict(vars(ours), _qkv_same_embed_dim=False, _forward_pre_hooks=OrderedDict())
        old = LogAttention.__new__(LogAttention)
        old.__setstate__(state)
        assert old._qkv_same_embed_dim == told
        assert len(old._forward_pre_hooks) == 1


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_sizes_become_plain_numbers(integer: Any) -> None:
    ours = LogAttention(
        integer(EMBED), integer(HEADS), np.float32(0.5), kdim=integer(8), vdim=integer(9), num_kv_heads=integer(1)
    )
    for name in ("embed_dim", "num_heads", "kdim", "vdim", "num_kv_heads", "head_dim"):
        assert type(getattr(ours, name)) is int
    assert type(ours.dropout) is float
    assert type(ours.position.num_heads) is int


# --- precision, compilation -----------------------------------------------------------------------------------


def test_half_precision_and_autocast() -> None:
    _, ours = pair("log-bias", batch_first=True)
    x = torch.randn(2, 9, EMBED)
    expected = ours(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (False, True):
            out, _ = ours(x, x, x, need_weights=need_weights)
            assert out.dtype == torch.bfloat16
            assert (out - expected).norm() < 0.015 * expected.norm()  # of one element, chance decides
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert isinstance(half.position, LogPosition)
    assert half.position.raw_rate is not None
    assert half.position.raw_rate.dtype == torch.float32
    assert half.in_proj_weight.dtype == torch.bfloat16
    y = x.bfloat16()
    for need_weights in (False, True):
        out, weights = half(y, y, y, need_weights=need_weights)
        assert out.dtype == torch.bfloat16
        assert weights is None or weights.dtype == torch.bfloat16
        assert (out - expected).norm() < 0.015 * expected.norm()
    normed = LogAttention(EMBED, HEADS, qk_norm=True, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert normed(x, x, x, need_weights=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("preset", ["none", "log-rotary-bias"])
def test_compiles_into_one_graph(preset: str) -> None:
    ours = LogAttention(
        EMBED, HEADS, position=preset, batch_first=True, qk_norm=True, position_options={"query_gain": True}
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for length in (9, 12):
        x = torch.randn(2, length, EMBED)
        padding = torch.arange(length).expand(2, length) > length - 3
        for options in ({"key_padding_mask": padding}, {"is_causal": True, "attn_mask": causal_mask(length)}):
            results = []
            for module in (compiled, ours):
                out, _ = module(x, x, x, need_weights=False, **options)
                gradients = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
                results.append([out, *gradients])
            assert_same(*results)


# --- bad arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"embed_dim": 25}, ValueError, "embed_dim.*25 and 3"),
        ({"embed_dim": "24"}, TypeError, "embed_dim must be an integer, got '24'"),
        ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
        ({"num_heads": 3.0}, TypeError, "num_heads must be an integer, got 3.0"),
        ({"num_kv_heads": "1"}, TypeError, "num_kv_heads must be an integer, got '1'"),
        ({"kdim": 8.5}, TypeError, "kdim must be an integer, got 8.5"),
        ({"vdim": 0}, ValueError, "vdim must be at least 1, got 0"),
        ({"dropout": True}, TypeError, "dropout must be a number, got True"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"qk_norm": "false"}, TypeError, "qk_norm must be True or False, got 'false'"),
        ({"position_options": {"gain_length": "9"}}, TypeError, "gain_length must be a number, got '9'"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_kv_heads": 2}, ValueError, "num_kv_heads must be a divisor of num_heads, 3, got 2"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"dropout": 1.5}, ValueError, "dropout.*1.5"),
        ({"position": "albi"}, ValueError, "log-bias.*'albi'"),
        ({"position": 3}, TypeError, "position.*int"),
        (
            {"position": LogPosition(4, 8)},
            ValueError,
            "position.*3 heads and head_dim 8.*4 heads and head_dim 8",
        ),
        ({"position": LogPosition(3, 16)}, ValueError, "position.*head_dim 8.*head_dim 16"),
        (
            {"position": LogPosition(3, 8), "position_options": {"query_gain": True}},
            ValueError,
            "position_options",
        ),
        ({"add_bias_kv": True}, ValueError, "add_bias_kv.*position=None"),
        ({"add_zero_attn": True, "position": "log-rotary"}, ValueError, "add_zero_attn.*rotary"),
    ],
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LogAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"query": torch.randn(2, 2, 7, EMBED)}, ValueError, "query must have 3 dimensions"),
        ({"key": torch.randn(7, EMBED)}, ValueError, "key must have 3 dimensions"),
        ({"query": torch.randn(2, 7, 5)}, ValueError, "query must have 24 features"),
        ({"value": torch.randn(2, 7, 5)}, ValueError, "value must have 24 features"),
        ({"value": torch.randn(2, 6, EMBED)}, ValueError, "value must have the length and batch of key"),
        ({"query": torch.randn(3, 7, EMBED)}, ValueError, "key must have the batch size of query, 3"),
        ({"key_padding_mask": torch.zeros(2, 6)}, ValueError, r"key_padding_mask must have shape \(2, 7\)"),
        ({"key_padding_mask": torch.zeros(2, 7).long()}, TypeError, "key_padding_mask.*int64"),
        ({"attn_mask": torch.zeros(7, 7).int()}, TypeError, "attn_mask.*int32"),
        (
            {"attn_mask": torch.zeros(2, 7, 7)},
            ValueError,
            r"attn_mask must have shape \(7, 7\) or \(6, 7, 7\)",
        ),
        ({"query_start": torch.zeros(2)}, (TypeError, ValueError), "query_start"),
        ({"key_start": 0.5}, (TypeError, ValueError), "key_start"),
    ],
)
def test_bad_inputs(options: dict[str, Any], error: Any, text: str) -> None:
    x = torch.randn(2, 7, EMBED)
    ours = LogAttention(EMBED, HEADS, batch_first=True)
    for need_weights in (False, True):
        with pytest.raises(error, match=text):
            ours(**{"query": x, "key": x, "value": x, "need_weights": need_weights, **options})


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    """Nested tensors are right where nn.TransformerEncoder makes them, in self-attention, and refused elsewhere."""
    x = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)], layout=layout)
    ours = LogAttention(EMBED, HEADS, batch_first=True)
    bad: list[tuple[LogAttention, dict[str, Any]]] = [
        (ours, {"key": x.clone()}),
        (ours, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
        (LogAttention(EMBED, HEADS), {}),
    ]
    if layout == torch.strided:
        options = dict(is_causal=True, need_weights=False, key_start=2)
        for out, sequence in zip(ours(x, x, x, **options)[0].unbind(), x.unbind(), strict=True):
            torch.testing.assert_close(out, ours(sequence, sequence, sequence, **options)[0])
    else:
        bad.append((ours, {}))
    for module, options in bad:
        with pytest.raises(ValueError, match=r"query must not be a nested tensor.*to_padded_tensor.*key_padding_mask"):
            module(**{"query": x, "key": x, "value": x, **options})
