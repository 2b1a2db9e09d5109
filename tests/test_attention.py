"""Test log_attention and log_attention_varlen as people call them: bad inputs, defaults, backends, merging."""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HALF, PARAMETERS, Call, Reference, check, make_call, make_packed_call, make_values, run
from logpe_kernels.options import Options
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.two_tensor import TwoTensor

import logpe
from logpe import LogPosition, PositionValues, log_attention, log_attention_varlen, merge_partials

INF = math.inf
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
BACKENDS = ["blocked", "reference", pytest.param("triton", marks=interpreted)]
B, HEADS, KV, NQ, NK, D = 2, 4, 2, 5, 7, 8


def normal(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def tensors() -> dict[str, Any]:
    return dict(q=normal(B, HEADS, NQ, D), k=normal(B, KV, NK, D), v=normal(B, KV, NK, D))


def packed() -> dict[str, Any]:
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    return dict(
        q=normal(8, HEADS, D), k=normal(8, KV, D), v=normal(8, KV, D), position=None, cu_seqlens_q=bounds,
        cu_seqlens_k=bounds, max_seqlen_q=5, max_seqlen_k=5,
    )  # fmt: skip


# --- what is refused: the argument, its value, and what is allowed ----------------------------------------------


def refused(message: str, error: type[Exception] = ValueError, **changes: Any) -> Any:
    """Return a case: changes to a good call, and the message, in which ... stands for anything."""
    return pytest.param(changes, error, re.escape(message).replace(r"\.\.\.", ".*"), id=message)


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.as_nested_tensor([normal(2, HEADS, D), normal(3, HEADS, D)], layout=layout)


F64 = torch.float64
SPARSE = normal(B, HEADS, NQ, D).to_sparse()
VALUES = PositionValues(power=torch.ones(HEADS), rate=torch.ones(HEADS))
REFUSED = [
    refused("q must be a tensor, got list", TypeError, q=[1.0]),
    refused("k must be a tensor, got NoneType", TypeError, k=None),
    refused("q must be float16...got torch.int64", TypeError, q=torch.ones(B, HEADS, NQ, D, dtype=torch.int64)),
    refused("k must have the dtype of q, torch.float32, got torch.float16", TypeError, k=normal(B, KV, NK, D).half()),
    refused("v must have the dtype of q, torch.float32, got torch.float64", TypeError, v=normal(B, KV, NK, D).double()),
    refused("q must have 4 dimensions (B, H, N, D), got shape (4, 5, 8)", q=normal(HEADS, NQ, D)),
    refused("v must have 4 dimensions...got shape (1, 2, 2, 7, 8)", v=normal(1, B, KV, NK, D)),
    refused("k must be on the device of q, cpu, got meta", k=normal(B, KV, NK, D, device="meta")),
    refused("v must be on the device of q, cpu, got meta", v=normal(B, KV, NK, D, device="meta")),
    refused("k must have the head_dim of q, 8, got 6", k=normal(B, KV, NK, 6)),
    refused("head_dim of q must be from 1 to 256, got 0", **dict(zip("qkv", normal(3, B, HEADS, NQ, 0), strict=True))),
    refused(
        "head_dim of q must be from 1 to 256, got 257", **dict(zip("qkv", normal(3, B, HEADS, NQ, 257), strict=True))
    ),
    refused("head_dim of v must be from 1 to 256, got 0", v=normal(B, KV, NK, 0)),
    refused("head_dim of v must be from 1 to 256, got 257", v=normal(B, KV, NK, 257)),
    refused("k must have the batch size of q, 2, got 3", k=normal(3, KV, NK, D), v=normal(3, KV, NK, D)),
    refused("v must have the shape of k, (2, 2, 7, 8), but for...got (2, 2, 6, 8)", v=normal(B, KV, 6, D)),
    refused("heads of q must be a multiple of that of k and v, got 3 and 2", q=normal(B, 3, NQ, D)),
    refused("must be a multiple...got 1 and 2", q=normal(B, 1, NQ, D)),
    refused("must be a multiple...got 4 and 0", k=normal(B, 0, NK, D), v=normal(B, 0, NK, D)),
    refused("q must be contiguous in its last dimension, got strides (160, 40, 1, 5)", q=normal(B, HEADS, D, NQ).mT),
    refused("v must be contiguous in its last dimension, got strides (84, 42, 1, 7)", v=normal(B, KV, 6, NK).mT),
    refused("position must be a LogPosition, PositionValues or None, got str", TypeError, position="log-bias"),
    refused("position was built for num_heads 8, and q has 4 heads", position=LogPosition(8, D)),
    refused("position was built for head_dim 16, and q has head_dim 8", position=LogPosition(HEADS, 16)),
    refused("position.power must be on the device of q, cpu, got meta", position=LogPosition(HEADS, D, device="meta")),
    refused("position.power must have shape (4,), got (2,)", position=VALUES._replace(power=torch.ones(2))),
    refused("position.rate must have shape (4,), got ()", position=VALUES._replace(rate=torch.tensor(1.0))),
    refused(
        "position.rate must be float32, got torch.float16",
        TypeError,
        position=VALUES._replace(rate=torch.ones(4).half()),
    ),
    refused(
        "position.alpha must be float32, got torch.float64",
        TypeError,
        position=PositionValues(alpha=torch.ones(4, dtype=F64)),
    ),
    refused(
        "position.rate must be given where position.sharpness",
        position=VALUES._replace(rate=None, sharpness=VALUES.power),
    ),
    refused("position.theta must be float64...got torch.float32 (4,)", position=PositionValues(theta=torch.ones(4))),
    *[
        refused(
            f"position.theta...from 2 to head_dim 8, got...({n},)",
            position=PositionValues(theta=torch.ones(n, dtype=F64)),
        )
        for n in (0, 5)
    ],
    refused("position.theta...(2, 2)", position=PositionValues(theta=torch.ones(2, 2, dtype=F64))),
    refused("position.theta...got meta", position=PositionValues(theta=torch.ones(2, dtype=F64, device="meta"))),
    refused("query_start must be an int or an int tensor (2,), got 1.5", TypeError, query_start=1.5),
    refused("query_start must be an int...got True", TypeError, query_start=True),
    refused("query_start must have shape (2,), got (3,)", query_start=torch.zeros(3, dtype=torch.int32)),
    refused("query_start must be an int32 or int64 tensor, got torch.float32", TypeError, query_start=torch.zeros(2)),
    refused("query_start must be from -536870912 to 536870912, got 1073741824", query_start=2**30),
    refused("query_start must be from...got values from 0 to 4294967296", query_start=torch.tensor([0, 2**32])),
    refused("key_start must be from -536870912 to 536870912, got -1073741824", key_start=-(2**30)),
    refused("key_start must be an int or an int tensor (2,), got [0, 1]", TypeError, key_start=[0, 1]),
    refused("key_start must have shape (2,), got ()", key_start=torch.tensor(3)),
    refused(
        "key_start must be on the device of q, cpu, got meta",
        key_start=torch.zeros(2, dtype=torch.int32, device="meta"),
    ),
    refused("query_start is required for 5 queries and 7 keys without is_causal", position=VALUES, is_causal=False),
    refused("query_start is required for 5 queries and 7 keys", is_causal=False, window=3),
    refused(
        "query_start is required for 5 queries and 7 keys with key_lengths",
        position=VALUES,
        key_lengths=torch.tensor([3, 7]),
    ),
    refused(
        "context_length must be an int...got 2.5",
        TypeError,
        position=PositionValues(alpha=torch.ones(4)),
        context_length=2.5,
    ),
    refused(
        "context_length must have shape (2,), got (1,)",
        position=PositionValues(alpha=torch.ones(4)),
        context_length=torch.ones(1, dtype=torch.int64),
    ),
    refused("context_length must be an int...got 2.5", TypeError, context_length=2.5),
    refused("context_length must have shape (2,), got (1,)", position=VALUES, context_length=torch.tensor([9])),
    refused("key_lengths must be from 0 to 7, got values from 3 to 8", key_lengths=torch.tensor([3, 8]), query_start=0),
    refused(
        "key_lengths must be from 0 to 7, got values from -1 to 2", key_lengths=torch.tensor([-1, 2]), query_start=0
    ),
    refused(
        "key_lengths must be from 0 to 7, got values from 1 to 4294967299",
        key_lengths=torch.tensor([2**32 + 3, 1]),
        query_start=0,
    ),
    refused("key_lengths must have shape (2,), got (1,)", key_lengths=torch.tensor([3])),
    refused("key_lengths must be an int32 or int64 tensor, got torch.float32", TypeError, key_lengths=torch.ones(2)),
    refused("key_lengths must be an int32 or int64 tensor, got int", TypeError, key_lengths=3),
    refused("key_mask must have shape (2, 7), got (5, 7)", key_mask=torch.ones(NQ, NK).bool()),
    refused(
        "key_mask must be a bool or floating tensor, got torch.int64",
        TypeError,
        key_mask=torch.ones(B, NK, dtype=torch.int64),
    ),
    refused("key_mask must be a bool or floating tensor, got list", TypeError, key_mask=[True]),
    refused("key_mask must not require a gradient", key_mask=torch.ones(B, NK, requires_grad=True)),
    refused("key_mask must be on the device of q, cpu, got meta", key_mask=torch.ones(B, NK, device="meta")),
    refused("key_mask must not hold NaN or inf", key_mask=torch.full((B, NK), math.nan)),
    refused("key_mask must not hold NaN or inf", key_mask=torch.full((B, NK), INF)),
    refused("key_mask must be a dense tensor...sparse_coo", TypeError, key_mask=torch.ones(B, NK).to_sparse()),
    refused("key_lengths must be a dense tensor...sparse_coo", TypeError, key_lengths=torch.tensor([3, 2]).to_sparse()),
    refused("q must be a dense tensor (torch.strided), got torch.sparse_coo", TypeError, q=SPARSE),
    refused("k must be a dense tensor (torch.strided), got torch.sparse_coo", TypeError, k=SPARSE),
    refused("q must be float16...got torch.complex64", TypeError, q=normal(B, HEADS, NQ, D, dtype=torch.complex64)),
    *[
        refused(f"{name} must be a dense tensor, got a nested one: log_attention_varlen", TypeError, **{name: x})
        for name in "qkv"
        for x in (nested(torch.strided), nested(torch.jagged).transpose(1, 2))
    ],
    refused("window must be at least 0 on each side (None or -1: unlimited), got -2", window=-2),
    refused("window must be at least 0...got (3, -5)", window=(3, -5)),
    refused("window must hold ints or None, got (3, 1.5)", TypeError, window=(3, 1.5)),
    refused("window must hold ints or None, got (True, 1)", TypeError, window=(True, 1)),
    refused("window must be an int, (left, right) or None, got (1, 2, 3)", window=(1, 2, 3)),
    refused("scale must be finite, got nan", scale=math.nan),
    refused("scale must be finite, got inf", scale=10**400),
    refused("scale must be a number, got a tensor of shape ()", TypeError, scale=torch.nn.Parameter(torch.tensor(0.1))),
    refused("scale must be a number...(4,)...multiply q by it and pass scale=1.0", TypeError, scale=torch.ones(HEADS)),
    refused("scale must be a number, got '0.1'", TypeError, scale="0.1"),
    refused("scale must be a number, got [0.1]", TypeError, scale=[0.1]),
    refused("scale must be a number, got True", TypeError, scale=True),
    refused("scale must be a number, got 1j", TypeError, scale=1j),
    refused("dropout_p must be a number, got a tensor of shape ()", TypeError, dropout_p=torch.tensor(0.0)),
    refused("dropout_p must be a number, got '0.1'", TypeError, dropout_p="0.1"),
    refused("dropout_p must be a number, got None", TypeError, dropout_p=None),
    refused("dropout_p must be a number, got False", TypeError, dropout_p=False),
    refused("is_causal must be True or False, got tensor(True)", TypeError, is_causal=torch.tensor(True)),
    refused("is_causal must be True or False, got 'no'", TypeError, is_causal="no"),
    refused("is_causal must be True or False, got None", TypeError, is_causal=None),
    refused("window must hold ints or None, got tensor(3)", TypeError, window=torch.tensor(3)),
    refused("window must hold ints or None, got 3.0", TypeError, window=3.0),
    refused("window must hold ints or None, got 'ab'", TypeError, window="ab"),
    *[
        refused(f"position.{name} must be a number, got a tensor of shape ()", TypeError, position=VALUES._replace(**x))
        for name in ("rotary_scale", "gain_length")
        for x in [{name: torch.tensor(2.0, requires_grad=True)}]
    ],
    refused("position.gain_length must be a number, got '512'", TypeError, position=VALUES._replace(gain_length="512")),
    refused("position.rotary_scale must be positive, got 0.0", position=VALUES._replace(rotary_scale=0)),
    refused("position.gain_length must be positive, got nan", position=VALUES._replace(gain_length=math.nan)),
    refused("position.power must be a tensor, got float", TypeError, position=VALUES._replace(power=1.0)),
    refused("position.power must be a tensor, got list", TypeError, position=VALUES._replace(power=[1.0] * HEADS)),
    refused(
        "position.power must be float32, got torch.int64",
        TypeError,
        position=VALUES._replace(power=torch.ones(HEADS).long()),
    ),
    refused(
        "position.theta must not require a gradient",
        position=PositionValues(theta=torch.ones(2, dtype=F64, requires_grad=True)),
    ),
    refused("scale must be finite, got inf", scale=INF),
    refused("dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
    refused("dropout_p must be in [0, 1), got -0.1", dropout_p=-0.1),
    refused("dropout_p must be in [0, 1), got nan", dropout_p=math.nan),
    refused("dropout_seed must be...tensor(indices", dropout_p=0.1, dropout_seed=torch.tensor([7]).to_sparse()),
    refused("dropout_seed must be an int64 tensor of one element on cpu, got 7", dropout_p=0.1, dropout_seed=7),
    refused("dropout_seed must be an int64 tensor", dropout_p=0.1, dropout_seed=torch.tensor([7], dtype=torch.int32)),
    refused("dropout_seed...tensor([7, 8])", dropout_p=0.1, dropout_seed=torch.tensor([7, 8])),
    refused(
        "out_dtype must be None or torch.float32 for q in torch.float32, got torch.float16",
        TypeError,
        out_dtype=torch.float16,
    ),
    refused("out_dtype must be None or torch.float32 for q in torch.float32, got '32'", TypeError, out_dtype="32"),
    refused("sink must be a floating tensor, got float", TypeError, sink=0.0),
    refused("sink must be a floating tensor, got torch.int64", TypeError, sink=torch.zeros(HEADS).long()),
    refused("sink must have shape (4,) or (2, 4, 5), got (2, 4)", sink=torch.zeros(2, 4)),
    refused("sink must be on the device of q, cpu, got meta", sink=torch.zeros(HEADS, device="meta")),
    refused("sink must be finite, got NaN or inf", sink=torch.full((HEADS,), -INF)),
    refused("position.rate must be at least 0, got -1", position=VALUES._replace(rate=torch.tensor([0.5, -1, 0, 2]))),
    refused("backend must be one of auto, triton, blocked, reference, got 'cuda'", backend="cuda"),
]
REFUSED_PACKED = [
    refused("q must have 3 dimensions (total, H, D), got shape (1, 8, 4, 8)", q=normal(1, 8, HEADS, D)),
    refused("must be a multiple...got 3 and 2", q=normal(8, 3, D)),
    refused("v must have the shape of k, (8, 2, 8), but for the last dimension, got (7, 2, 8)", v=normal(7, KV, D)),
    refused("cu_seqlens_q must start at 0, got 1", cu_seqlens_q=torch.tensor([1, 3, 8])),
    refused("cu_seqlens_k must never fall, got 5 followed by 3", cu_seqlens_k=torch.tensor([0, 5, 3])),
    refused("cu_seqlens_k must end at or before the 8 tokens given, got 9", cu_seqlens_k=torch.tensor([0, 4, 9])),
    refused(
        "cu_seqlens_q must be an int32 or int64 tensor, got torch.float32",
        TypeError,
        cu_seqlens_q=torch.tensor([0.0, 8.0]),
    ),
    refused("cu_seqlens_q must be an int32 or int64 tensor, got list", TypeError, cu_seqlens_q=[0, 8]),
    refused("cu_seqlens_q must have shape (B + 1,), got (1, 2)", cu_seqlens_q=torch.tensor([[0, 8]])),
    refused("cu_seqlens_q must have at least one element...got (0,)", cu_seqlens_q=torch.tensor([], dtype=torch.int32)),
    refused(
        "cu_seqlens_q must be on the device of q, cpu, got meta", cu_seqlens_q=torch.tensor([0, 3, 8], device="meta")
    ),
    refused("cu_seqlens_k must have the length of cu_seqlens_q, 3, got 4", cu_seqlens_k=torch.tensor([0, 2, 4, 8])),
    refused("max_seqlen_q must be at least the longest sequence, 5, got 4", max_seqlen_q=4),
    refused("max_seqlen_k must be at least the longest sequence, 5, got 3", max_seqlen_k=3),
    refused("max_seqlen_k must be an int of at least 0, got -1", max_seqlen_k=-1),
    refused("max_seqlen_q must be an int of at least 0, got tensor(5)", max_seqlen_q=torch.tensor(5)),
    refused(
        "query_start is required for sequences of different", position=VALUES, cu_seqlens_k=torch.tensor([0, 5, 8])
    ),
    refused("query_start must have shape (2,), got (3,)", query_start=torch.zeros(3, dtype=torch.int32)),
    refused("window must be at least 0...got (-3, 0)", window=(-3, 0)),
    refused("position was built for num_heads 2, and q has 4 heads", position=LogPosition(2, D)),
    refused("dropout_p must be in [0, 1), got 2", dropout_p=2),
    refused("max_seqlen_q must be an int of at least 0, got 5.0", max_seqlen_q=5.0),
    refused("max_seqlen_k must be an int of at least 0, got '5'", max_seqlen_k="5"),
    refused("scale must be a number, got a tensor", TypeError, scale=torch.tensor(1.0)),
    refused("q must be a tensor, got list", TypeError, q=[1.0]),
    refused("sink must have shape (4,) or (4, 8), got (8, 4)", sink=torch.zeros(8, HEADS)),
    refused(
        "out_dtype must be None or torch.bfloat16 or torch.float32 for q in torch.bfloat16, got torch.float64",
        TypeError,
        **{name: normal(8, KV, D, dtype=torch.bfloat16) for name in "qkv"},
        out_dtype=torch.float64,
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=interpreted)])
def test_refused(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    good = {**tensors(), "is_causal": True, "position": VALUES, "backend": backend}
    log_attention(**good)  # known from now on
    with pytest.raises(error, match=message):
        log_attention(**{**good, **changes})


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED_PACKED)
def test_refused_packed(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log_attention_varlen(**{**packed(), **changes})


def test_what_is_refused_would_be_accepted_otherwise() -> None:
    assert log_attention(**tensors(), is_causal=True).shape == (B, HEADS, NQ, D)
    assert log_attention_varlen(**packed()).shape == (8, HEADS, D)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        RuntimeError, match=r'backend="triton" cannot run here: .*need a GPU, and the tensors are on cpu'
    ):
        log_attention(**tensors(), is_causal=True, backend="triton")


@interpreted
def test_triton_refuses_float64() -> None:
    with pytest.raises(TypeError, match=r"q must be float16, bfloat16 or float32 for backend=.*got torch\.float64"):
        log_attention(*(x.double() for x in tensors().values()), backend="triton")


def test_numbers_of_numpy_are_numbers() -> None:
    """NumPy's integers and floats serve as Python's; a window may be a list, and of any length."""
    np = pytest.importorskip("numpy")
    x = tensors()
    expected = log_attention(**x, position=VALUES, is_causal=True, query_start=3, key_start=1, window=(4, 0), scale=0.5)
    for integer in (np.int32, np.int64):
        actual = log_attention(
            **x, position=VALUES._replace(rotary_scale=integer(2)), is_causal=np.bool_(True), query_start=integer(3),
            key_start=integer(1), window=[integer(4), integer(0)], scale=np.float32(0.5), dropout_p=np.float64(0),
        )  # fmt: skip
        assert torch.equal(actual, expected)
        wide = log_attention(**x, window=(2**70, 2**40), query_start=0)
        assert torch.equal(wide, log_attention(**x))
        y = packed()
        longest = dict(max_seqlen_q=integer(5), max_seqlen_k=integer(6))
        assert torch.equal(log_attention_varlen(**y | longest), log_attention_varlen(**y))


def test_query_start_is_not_required_where_it_does_not_matter() -> None:
    log_attention(**tensors())  # plain cross-attention
    log_attention(**tensors(), key_lengths=torch.tensor([3, 7]))
    log_attention(**tensors(), position=VALUES, query_start=0)
    square = tensors() | dict(q=normal(B, HEADS, NK, D))
    log_attention(**square, position=VALUES, key_lengths=torch.tensor([3, 7]))
    log_attention_varlen(**packed() | dict(position=VALUES, cu_seqlens_k=torch.tensor([0, 3, 8])))  # equal lengths
    log_attention_varlen(**packed() | dict(position=VALUES, cu_seqlens_k=torch.tensor([0, 4, 8]), is_causal=True))


# --- defaults ---------------------------------------------------------------------------------------------------


def test_plain_attention_is_torchs() -> None:
    x = tensors()
    expected = F.scaled_dot_product_attention(x["q"], x["k"], x["v"], enable_gqa=True)
    torch.testing.assert_close(log_attention(**x), expected)
    expected = F.scaled_dot_product_attention(x["q"], x["k"], x["v"], scale=0.1, enable_gqa=True)
    torch.testing.assert_close(log_attention(**x, scale=0.1), expected)
    for value_dim in (5, 11):  # the scale follows from q
        x["v"] = normal(B, KV, NK, value_dim)
        expected = F.scaled_dot_product_attention(x["q"], x["k"], x["v"], enable_gqa=True)
        torch.testing.assert_close(log_attention(**x), expected)


def test_is_causal_is_bottom_right() -> None:
    """The last query meets the last key, as in flash-attention 2; query_start=0 gives the top-left of torch."""
    q, k, v = normal(B, HEADS, NQ, D), normal(B, HEADS, NK, D), normal(B, HEADS, NK, D)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(NQ, NK))
    torch.testing.assert_close(log_attention(q, k, v, is_causal=True), expected)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(log_attention(q, k, v, is_causal=True, query_start=0), expected)
    expected = log_attention(q, k, v, VALUES, is_causal=True, query_start=NK - NQ)
    torch.testing.assert_close(log_attention(q, k, v, VALUES, is_causal=True), expected)
    shifted = log_attention(q, k, v, VALUES, is_causal=True, key_start=100)  # the bias sees differences only
    torch.testing.assert_close(shifted, expected)
    starts = torch.tensor([-3, 2])
    torch.testing.assert_close(
        log_attention(q, k, v, VALUES, is_causal=True, key_start=starts),
        log_attention(q, k, v, VALUES, is_causal=True, key_start=starts, query_start=starts + NK - NQ),
    )


def test_packed_is_causal_is_bottom_right_in_each_sequence() -> None:
    x = packed() | dict(position=VALUES, cu_seqlens_k=torch.tensor([0, 4, 8]), is_causal=True)
    expected = log_attention_varlen(**x, query_start=torch.tensor([1, -1]))
    torch.testing.assert_close(log_attention_varlen(**x), expected)


def test_decoding_token_by_token_is_the_whole() -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    q, k, v = normal(B, HEADS, 9, D), normal(B, KV, 9, D), normal(B, KV, 9, D)
    whole = log_attention(q, k, v, position, is_causal=True)
    for n in range(9):
        step = log_attention(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], position, is_causal=True)
        torch.testing.assert_close(step, whole[:, :, n : n + 1])


def test_left_padding_is_a_negative_start() -> None:
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    q, k, v = normal(B, HEADS, 9, D), normal(B, KV, 9, D), normal(B, KV, 9, D)
    out = log_attention(q, k, v, position, is_causal=True, key_start=torch.tensor([0, -4]))
    alone = log_attention(q[1:, :, 4:], k[1:, :, 4:], v[1:, :, 4:], position, is_causal=True)
    torch.testing.assert_close(out[1:, :, 4:], alone)
    assert (out[1, :, :4] == 0).all()


@pytest.mark.parametrize("integer", [int, torch.tensor])
def test_the_gains_length(integer: Callable[..., Any]) -> None:
    """n is the query's position when causal, capped by the window; else the number of keys, or what is given."""
    values = make_values(HEADS, D, "none", query_gain=True, gain_length=4)
    x = tensors() | dict(position=values)

    def given(length: int) -> Any:
        return length if integer is int else torch.tensor([length] * B)

    def gained(*lengths: int) -> Tensor:
        """Return plain attention with the gain in q, one length per query."""
        n = torch.tensor(lengths * (NQ // len(lengths)), dtype=torch.float32)
        gain = 1 + values.alpha[:, None] * torch.log1p(n / 4)
        return log_attention(**tensors_with(q=x["q"] * gain[:, :, None]))

    def tensors_with(**changes: Any) -> dict[str, Any]:
        return {name: x[name] for name in "qkv"} | changes

    torch.testing.assert_close(log_attention(**x, query_start=1), gained(NK))
    torch.testing.assert_close(log_attention(**x, query_start=1, context_length=given(50)), gained(50))
    torch.testing.assert_close(log_attention(**x, query_start=1, key_start=3), gained(NK + 3))
    wide = log_attention(**x, query_start=10, is_causal=True)  # sees all keys
    torch.testing.assert_close(wide, gained(10, 11, 12, 13, 14))
    windowed = log_attention(**x, query_start=7, is_causal=True, window=12)
    torch.testing.assert_close(windowed[:, :, 0], gained(7, 8, 9, 10, 11)[:, :, 0])
    lengths = torch.tensor([3, 7])
    padded = log_attention(**x, query_start=0, key_lengths=lengths)
    alone = log_attention(x["q"][:1], x["k"][:1, :, :3], x["v"][:1, :, :3], values, query_start=0)
    torch.testing.assert_close(padded[:1], alone)


def test_window_spellings() -> None:
    x = tensors() | dict(position=VALUES, query_start=1)
    for a, b in ((3, (3, 3)), ((-1, -1), None), ((None, 2), (-1, 2)), ([2, 1], (2, 1))):
        assert torch.equal(log_attention(**x, window=a), log_attention(**x, window=b))
    assert torch.equal(log_attention(**x, window=3, is_causal=True), log_attention(**x, window=(3, 0)))


def test_key_mask_spellings() -> None:
    mask = torch.rand(B, NK) < 0.6
    bias = torch.zeros(B, NK).masked_fill(~mask, -INF)
    expected = log_attention(**tensors_seeded(), key_mask=mask)
    assert torch.equal(log_attention(**tensors_seeded(), key_mask=bias), expected)
    assert torch.equal(log_attention(**tensors_seeded(), key_mask=bias.half()), expected)
    bias += torch.randn(NK)
    x = tensors_seeded()
    dense = F.scaled_dot_product_attention(x["q"], x["k"], x["v"], bias[:, None, None], enable_gqa=True)
    torch.testing.assert_close(log_attention(**x, key_mask=bias), dense.nan_to_num(0))


def tensors_seeded() -> dict[str, Any]:
    torch.manual_seed(1)
    return tensors()


def test_lse() -> None:
    x = tensors()
    _, lse = log_attention(**x, return_lse=True)
    scores = x["q"] @ x["k"].repeat_interleave(2, 1).mT / D**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert log_attention(**{n: t.bfloat16() for n, t in x.items()}, return_lse=True)[1].dtype == torch.float32
    assert log_attention(**{n: t.double() for n, t in x.items()}, return_lse=True)[1].dtype == torch.float64
    assert log_attention_varlen(**packed(), return_lse=True)[1].shape == (HEADS, 8)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_autocast(backend: str) -> None:
    """q, k and v become bfloat16; the position's float32 parameters stay, and get float32 gradients."""
    position = LogPosition(HEADS, D, "log-invariant", query_gain=True)
    x = {name: t.requires_grad_() for name, t in tensors().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = log_attention(**x, position=position, is_causal=True, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    half = {name: t.detach().bfloat16() for name, t in x.items()}
    assert torch.equal(out, log_attention(**half, position=position, is_causal=True, backend=backend))
    for leaf in (*x.values(), *position.parameters()):
        assert leaf.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = dict(x, k=x["k"].bfloat16())  # as the output of a linear layer may be
        assert torch.equal(log_attention(**mixed, position=position, is_causal=True, backend=backend), out)
        wide = {name: t.double() for name, t in x.items()}
        assert log_attention(**wide, is_causal=True, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", ["dense", "packed", "decode"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_dtype(backend: str, form: str, dtype: torch.dtype) -> None:
    """A float32 out is what would be rounded: closer to the exact one, and so are its gradients."""
    options: dict[str, Any] = dict(dtype=dtype, value_dim=12, preset="log-invariant", query_gain=True, is_causal=True)
    if form == "packed":
        call = make_packed_call([9, 20], [17, 20], kv_heads=2, head_dim=16, **options)
    else:
        call = make_call(2, 4, 2, *((40, 40) if form == "dense" else (2, 600)), 16, **options)
    wide = call.replace(options=call.options | dict(out_dtype=torch.float32))
    rounded, actual, again = (run(x, backend) for x in (call, wide, call))
    assert actual["out"].dtype == torch.float32
    for x in (rounded, again):
        assert x["out"].dtype == dtype
        assert torch.equal(x["lse"], actual["lse"])
        if backend != "reference":  # which forms the product in the one dtype or the other
            assert torch.equal(x["out"], actual["out"].to(dtype))
    reference = Reference(call)
    reference.check(actual)
    errors = [(x["out"] - reference.exact["out"]).square().mean() for x in (actual, rounded)]
    assert errors[0] < errors[1] * (1.2 if backend == "reference" else 1)  # which rounds the scores first
    assert (
        log_attention(**{n: t.double() for n, t in tensors().items()}, out_dtype=torch.float64).dtype == torch.float64
    )


# --- a sink -----------------------------------------------------------------------------------------------------


def with_a_sink(call: Call, sink: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse in float64, from those without a sink: exp(lse) and exp(sink) share each row."""
    exact = run(call, "reference", torch.float64)
    a, b = exact["lse"].exp(), (gain * sink.double()).exp()
    share = a / (a + b)
    return exact["out"] * (share if call.lengths is None else share.mT)[..., None], (a + b).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form", ["causal", "window", "starts", "padded", "context", "packed", "packed context", "step"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sink(backend: str, form: str, dtype: torch.dtype) -> None:
    """In each form n of the query gain is counted here token by token."""
    values = make_values(4, 16, query_gain=True, gain_length=8.0)
    options: dict[str, Any] = dict(kv_heads=2, head_dim=16, dtype=dtype, values=values, is_causal=True)
    if form.startswith("packed"):
        call = make_packed_call([5, 0, 9], [7, 3, 9], **options)
        n = torch.tensor([*range(2, 7), *range(9)])
        if "context" in form:
            call.options["context_length"] = torch.tensor([3, 4, 50])
            n = torch.tensor(5 * [3] + 9 * [50])
    else:
        more, n = {
            "causal": ({}, torch.arange(4, 13)),
            "window": (dict(window=(5, None)), torch.arange(4, 13).clamp(max=5)),
            "starts": (dict(query_start=torch.tensor([4, -2])), torch.arange(9) + torch.tensor([[4], [-2]])),
            "padded": (
                dict(is_causal=False, query_start=0, key_lengths=torch.tensor([13, 6])),
                torch.tensor([[13], [6]]).expand(2, 9),
            ),
            "context": (dict(context_length=100), torch.full((9,), 100)),
            "step": ({}, torch.tensor([12])),
        }[form]
        call = make_call(num_queries=1 if form == "step" else 9, num_keys=13, **options | more)
    gain = 1 + values.alpha.detach().double()[:, None] * torch.log1p(n.clamp(min=0).double() / 8)[..., None, :]
    for sink in (normal(4, requires_grad=True), normal(*call.dlse.shape).to(dtype).requires_grad_()):
        expected = with_a_sink(call, sink.detach() if sink.dim() > 1 else sink.detach()[:, None], gain)
        leaves = [call.q.clone().requires_grad_(), sink, values.alpha]
        part = call.replace(q=leaves[0], options=call.options | dict(sink=sink))
        bounds = [F.pad(x.cumsum(0), (1, 0)).int() for x in call.lengths or ()]
        function = log_attention if call.lengths is None else log_attention_varlen
        longest = [int(x.max()) for x in call.lengths or ()]
        arguments = (part.q, part.k, part.v, values, *bounds, *longest)
        out, lse = function(*arguments, return_lse=True, backend=backend, **part.options)
        assert out.dtype == dtype
        tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
        torch.testing.assert_close(out.double(), expected[0], **tolerance)
        torch.testing.assert_close(lse.double(), expected[1], **tolerance)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum() + lse.sum(), leaves))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_sink_gradcheck(form: str, backend: str) -> None:
    """Rows without a key, too: a sink takes all of them."""
    values = make_values(2, 4, query_gain=True, gain_length=2.0)
    values = values._replace(**{n: getattr(values, n).detach().double().requires_grad_() for n in ("power", "alpha")})
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    shape, lengths = ((1, 2, 5, 4), ()) if form == "dense" else ((5, 2, 4), (bounds, bounds, 3, 3))
    options = dict(query_start=-1, is_causal=True, return_lse=True, backend=backend)

    def function(q: Tensor, k: Tensor, sink: Tensor, power: Tensor, alpha: Tensor) -> Any:
        position = values._replace(power=power, alpha=alpha)
        if form == "dense":
            return log_attention(q, k, k, position, sink=sink, **options)
        return log_attention_varlen(q, k, k, position, *lengths, sink=sink, **options)

    x = [normal(*shape, dtype=torch.float64, requires_grad=True) for _ in "qk"]
    for rows in ((2,), (1, 2, 5) if form == "dense" else (2, 5)):
        sink = normal(*rows, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (*x, sink, values.power, values.alpha))


def test_a_sink_is_a_part_of_its_own() -> None:
    """Keys in parts, of which one has the sink, are merged to the whole; far below all scores it is none."""
    x, sink = tensors(), normal(HEADS)
    k, v, options = x["k"], x["v"], dict(query_start=0, return_lse=True)
    whole = log_attention(**x, sink=sink, **options)
    parts = [
        log_attention(x["q"], k[:, :, :3], v[:, :, :3], sink=sink, **options),
        log_attention(x["q"], k[:, :, 3:], v[:, :, 3:], **options),
    ]
    for a, b in zip(merge_partials(*zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(log_attention(**x, sink=sink - 200), log_attention(**x))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_sink_that_follows_from_padding(backend: str) -> None:
    """Queries that are padding may hold anything, and so may their sinks: the others do not see it."""
    x, sink = tensors(), normal(2, HEADS, 5)
    expected = log_attention(**x, sink=sink, backend=backend)
    x["q"][0, :, 3:], sink[0, :, 3:] = math.nan, math.inf
    out = log_attention(**x, sink=sink, backend=backend)
    assert torch.equal(out[1], expected[1])
    assert torch.equal(out[0, :, :3], expected[0, :, :3])


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sink_without_sequences(is_causal: bool) -> None:
    values = make_values(HEADS, D, "none", query_gain=True)
    x, starts = normal(5, HEADS, D), [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
    out = log_attention_varlen(x, x, x, values, *starts, 0, 0, is_causal=is_causal, sink=normal(HEADS))
    assert torch.equal(out, torch.zeros_like(out))


def test_autocast_lowers_no_product_of_the_reference() -> None:
    q = normal(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = log_attention(q, q, q, backend="reference", out_dtype=torch.float32)
        fast = log_attention(q, q, q, backend="blocked", out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())
    torch.testing.assert_close(out, fast, atol=0.02, rtol=0.02)


# --- backends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_the_backends_agree(form: str) -> None:
    """One call uses every option at once."""
    values = make_values(4, 16, "log-invariant", query_gain=True)
    values = values._replace(theta=make_values(4, 16, "log-rotary").theta, rotary_scale=30.0)
    sizes = dict(kv_heads=2, head_dim=16, value_dim=24)
    options: dict[str, Any] = dict(sizes, values=values, window=(25, 3), dropout_p=0.2)
    options["dropout_seed"] = torch.randint(2**62, (1,))
    if form == "dense":
        bias = torch.randn(2, 45).masked_fill(torch.rand(2, 45) < 0.2, -INF)
        starts = dict(query_start=torch.tensor([-3, 15]), key_start=torch.tensor([0, -5]))
        call = make_call(
            2, num_queries=33, num_keys=45, key_mask=bias, key_lengths=torch.tensor([45, 38]),
            context_length=torch.tensor([40, 60]), **starts, **options,
        )  # fmt: skip
    else:
        starts = dict(query_start=torch.tensor([2, 0, 5, 0]), key_start=1)
        call = make_packed_call([20, 0, 9, 4], [20, 7, 15, 0], outside=3, context_length=50, **starts, **options)
    for backend in ("blocked", "triton") if INTERPRETED else ("blocked",):
        check(call, backend)
    assert torch.equal(run(call, "auto")["out"], run(call, "blocked")["out"])


@interpreted
def test_repeated_calls_see_their_own_values() -> None:
    """Only the layout of a call is remembered: new values, positions, gradients and lengths count each time."""
    position = LogPosition(HEADS, D, "log-rotary-bias", query_gain=True)
    plain, shared = dict(is_causal=True), LogPosition(HEADS, D)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (None, {}),
        (None, plain),
        (shared, plain),
        (shared, dict(is_causal=True, window=3)),
        (position, plain),
        (position, dict(is_causal=False, query_start=1)),
        (PositionValues(alpha=torch.rand(HEADS)), dict(is_causal=False, query_start=2)),
        (PositionValues(alpha=torch.rand(HEADS)), dict(is_causal=False, window=4, query_start=None)),
        (shared, dict(is_causal=True, key_start=2)),
        (shared, dict(is_causal=True, query_start=1)),
        (shared, dict(is_causal=True, key_lengths=torch.tensor([4, 6]), query_start=2)),
    ]
    for i in [*range(len(cases)), *torch.randperm(len(cases)).tolist()]:
        where, options = cases[i]
        x = tensors() if options.get("query_start", 0) is not None else tensors() | dict(q=normal(B, HEADS, NK, D))
        for module in (shared, position):
            module.raw_power.data.uniform_(-1, 1)
        leaves = [t.requires_grad_() for t in x.values()]
        results = []
        for backend in ("triton", "reference"):
            out, lse = log_attention(**x, position=where, **options, backend=backend, return_lse=True)
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
            with torch.no_grad():
                assert torch.equal(log_attention(**x, position=where, **options, backend=backend), out)
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@interpreted
def test_a_remembered_call_accepts_no_more_than_the_first() -> None:
    values, x = make_values(HEADS, D, "log-rotary"), tensors()
    log_attention(**x, position=values, is_causal=True, backend="triton")
    values = values._replace(theta=values.theta.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"position\.theta must not require a gradient"):
        log_attention(**x, position=values, is_causal=True, backend="triton")


# --- layouts ----------------------------------------------------------------------------------------------------


def transposed(x: Tensor, rows: bool) -> Tensor:
    a, b = (0, 1) if rows else (-1, -2)
    return x.transpose(a, b).contiguous().transpose(a, b) if x.dim() > 1 else x


def strided(x: Tensor, rows: bool) -> Tensor:
    dim = x.dim() - 2 if rows else x.dim() - 1
    return torch.stack((x, torch.full_like(x, 3)), dim + 1).select(dim + 1, 0)


def shifted(x: Tensor, rows: bool) -> Tensor:
    """Return a copy that begins one element into its storage, not aligned to 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def expanded(x: Tensor, rows: bool) -> Tensor:
    return x[:1].expand_as(x)


def call_of(form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all tensors that a public function takes, and the rest of its arguments."""
    heads, kv_heads, value_dim = 2, 1, 12
    if form == "rotate":
        theta = make_values(heads, D, "log-rotary").theta
        return dict(x=normal(B, heads, NQ, D), start=torch.tensor([3, -1]), theta=theta), {}
    if form.startswith("merge"):
        out, lse = ((B, heads, NQ, D), (B, heads, NQ)) if form == "merge" else ((NQ, heads, D), (heads, NQ))
        return dict(out0=normal(*out), out1=normal(*out), lse0=normal(*lse), lse1=normal(*lse)), {}
    values = make_values(heads, D, "log-invariant", query_gain=True)
    x: dict[str, Any] = {name: t for name, t in values._asdict().items() if isinstance(t, Tensor)}
    rest: dict[str, Any] = dict(is_causal=True, return_lse=True)
    starts = dict(query_start=torch.tensor([2, 4]), key_start=torch.tensor([0, -1]))
    starts |= dict(context_length=torch.tensor([9, 30]))
    if form == "paged":
        x |= dict(q=normal(B, heads, 1, D), k=normal(6, kv_heads, 16, D), **starts)
        x |= dict(v=normal(6, kv_heads, 16, value_dim))
        x |= dict(block_table=torch.randperm(6)[:4].view(2, 2), key_mask=torch.rand(B, 32) < 0.7)
        return x | dict(sink=normal(heads)), rest
    x |= dict(theta=make_values(heads, D, "log-rotary").theta)
    if form == "packed":
        x |= dict(q=normal(8, heads, D), k=normal(8, kv_heads, D), v=normal(8, kv_heads, value_dim), **starts)
        x |= dict(cu_seqlens_q=torch.tensor([0, 3, 8]), cu_seqlens_k=torch.tensor([0, 4, 7], dtype=torch.int32))
        x |= dict(dropout_seed=torch.tensor([5]), sink=normal(heads, 8))
        return x, rest | dict(max_seqlen_q=5, max_seqlen_k=4, dropout_p=0.2)
    num_queries, num_keys = (1, 513) if form == "decode" else (NQ, NK)
    x |= dict(q=normal(B, heads, num_queries, D), k=normal(B, kv_heads, num_keys, D))
    x |= dict(v=normal(B, kv_heads, num_keys, value_dim))
    if form == "decode":
        return x | dict(key_mask=torch.rand(B, num_keys) < 0.7, **starts), rest
    if form == "dense":
        x |= dict(key_mask=normal(B, num_keys), key_lengths=torch.tensor([num_keys, 6]), **starts)
        x |= dict(sink=normal(B, heads, num_queries))
        return x | dict(dropout_seed=torch.tensor([5])), rest | dict(dropout_p=0.2)
    assert form == "plain"
    return x, rest


def results_of(
    form: str, x: dict[str, Tensor], rest: dict[str, Any], layout: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the results of a call, and all gradients, from cotangents in this layout."""
    leaves = (
        () if form in ("paged", "decode") else ("q", "k", "v", "x", "sink", "out0", "out1", "lse0", "lse1", *PARAMETERS)
    )
    x = {name: t.detach().requires_grad_(name in leaves) for name, t in x.items()}
    position = PositionValues(**{name: t for name, t in x.items() if name in PositionValues._fields})
    others = {name: t for name, t in x.items() if name not in PositionValues._fields}
    results: Any
    if form.startswith("merge"):
        results = merge_partials([x["out0"], x["out1"]], [x["lse0"], x["lse1"]])
    elif form == "rotate":
        results = (logpe.rotate(**others, position=position),)
    else:
        results = (log_attention_varlen if form == "packed" else log_attention)(**others, position=position, **rest)
    inputs = [t for t in x.values() if t.requires_grad]
    if not inputs:
        return [*results]
    torch.manual_seed(1)
    return [*results, *torch.autograd.grad(results, inputs, [layout(normal(*t.shape)) for t in results])]


FORMS = ("plain", "dense", "packed", "decode", "paged")


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        *[pytest.param(f, b, marks=needs) for f in FORMS for b, needs in (("triton", interpreted), ("blocked", ()))],
        *[(form, "reference") for form in (*FORMS, "rotate", "merge", "merge packed")],
    ],
)
def test_layouts(form: str, backend: str) -> None:
    """Tensor arguments and cotangents, all in an odd layout at once, give what contiguous copies give."""
    tensors, rest = call_of(form)
    options = rest | dict(backend=backend)
    expected = results_of(form, tensors, options, lambda t: t)
    for x, y in zip(expected, results_of(form, tensors, rest | dict(backend="reference"), lambda t: t), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    for layout in (transposed, strided, shifted, expanded):

        def odd(t: Tensor, rows: bool = False, layout: Any = layout) -> Tensor:
            return layout(t, rows)

        changed = {name: odd(t, name in ("q", "k", "v", "x")) for name, t in tensors.items()}
        if layout is expanded:
            copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in changed.items()}
            expected = results_of(form, copies, options, lambda t: odd(t).clone(memory_format=torch.contiguous_format))
        for x, y in zip(results_of(form, changed, options, odd), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, layout=layout: f"{layout}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_as_columns_of_a_table(backend: str) -> None:
    """Gradients arrive in the table, even after an earlier call with the same layouts."""
    x = tensors()
    table = torch.rand(HEADS, 2, requires_grad=True)
    gradients = []
    for power, rate in (table.detach().unbind(1), table.clone().mT.contiguous().unbind(0), table.unbind(1)):
        values = PositionValues(power=power, rate=rate)
        out = log_attention(**x, position=values, is_causal=True, backend=backend)
        if out.requires_grad:
            gradients.append((out, *torch.autograd.grad(out.square().sum(), table)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_gradients_of_parameters_have_their_dtype(backend: str) -> None:
    x = {name: t.double() for name, t in tensors().items()}
    power, rate = torch.rand(HEADS, dtype=F64, requires_grad=True), torch.rand(HEADS, requires_grad=True)
    sharpness = torch.rand(HEADS)  # not learned
    out = log_attention(**x, position=PositionValues(power, rate, sharpness), is_causal=True, backend=backend)
    assert out.dtype == F64
    assert [t.dtype for t in torch.autograd.grad(out.square().sum(), [power, rate])] == [F64, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_are_no_plain_tensors(backend: str) -> None:
    """A subclass, such as DTensor, may have no memory of its own. An equal call on plain tensors comes first."""
    x, plain = tensors(), torch.rand(2, HEADS)
    for parameters in (plain, [TwoTensor(t, t) for t in plain]):
        leaves = [t.detach().requires_grad_() for t in parameters]
        out = log_attention(**x, position=PositionValues(*leaves), is_causal=True, backend=backend)
        results = out, *torch.autograd.grad(out.square().sum(), leaves)
        if parameters is plain:
            expected = results
    for a, b in zip(results, expected, strict=True):
        assert isinstance(a, TwoTensor)
        torch.testing.assert_close(a.a, b)


@interpreted
def test_views_that_are_not_what_lies_in_memory() -> None:
    """torch.imag of a conjugate is a view whose sign is yet to be changed."""
    x = {name: torch.complex(t, t).conj().imag for name, t in tensors().items()}
    x = {name: torch._neg_view(-t.resolve_neg()) for name, t in x.items()}
    assert all(t.is_neg() for t in x.values())
    values = PositionValues(*(torch._neg_view(-torch.rand(HEADS)) for _ in range(2)))
    expected = log_attention(**x, position=values, is_causal=True, backend="reference")
    for _ in range(2):
        actual = log_attention(**x, position=values, is_causal=True, backend="triton")
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_a_block_table_do_not_wrap_around(backend: str) -> None:
    x = dict(q=normal(1, HEADS, 1, D), k=normal(2, KV, 16, D), v=normal(2, KV, 16, D), backend=backend)
    with torch.no_grad():
        actual = log_attention(**x, block_table=torch.tensor([[1, 2**32, -(2**32)]]), key_lengths=torch.tensor([40]))
        expected = log_attention(**x, block_table=torch.tensor([[1]], dtype=torch.int32))
    torch.testing.assert_close(actual, expected)


def test_rotate_checks_what_it_is_given() -> None:
    values, x = make_values(HEADS, D, "log-rotary"), normal(B, HEADS, NQ, D)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=x[0]), ValueError, r"x must have 4 dimensions.* got shape \(4, 5, 8\)"),
        (dict(x=x.long()), TypeError, "x must be float16.* got torch.int64"),
        (dict(x=x.mT.contiguous().mT), ValueError, "x must be contiguous in its last dimension"),
        (dict(x=nested(torch.strided)), TypeError, "x must be a dense tensor, got a nested one"),
        (dict(position="log-rotary"), TypeError, "position must be a LogPosition, PositionValues or None, got str"),
        (dict(position=values._replace(theta=values.theta.to("meta"))), ValueError, "theta must be on cpu.* got meta"),
        (dict(position=values._replace(theta=values.theta.float())), ValueError, "theta must be float64"),
        (dict(position=values._replace(theta=values.theta.clone().requires_grad_())), ValueError, "not require a grad"),
        (dict(position=values._replace(rotary_scale=torch.ones(()))), TypeError, "rotary_scale must be a number"),
        (dict(start=True), TypeError, "start must be an int or an int tensor"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            logpe.rotate(**dict(x=x, position=values) | changes)


def test_rotate_gives_zeros_where_no_token_is() -> None:
    """The kernel does this, too, whatever such a row holds."""
    values, x = make_values(HEADS, D, "log-rotary"), normal(B, HEADS, NQ, D)
    x[0, :, :3] = math.nan
    x.requires_grad_()
    turned = logpe.rotate(x, values, torch.tensor([-3, 0]))
    (dx,) = torch.autograd.grad(turned.sum(), x)
    for t in (turned, dx):
        assert (t[0, :, :3] == 0).all()
        assert t.isfinite().all()
    torch.testing.assert_close(turned[:1, :, 3:], logpe.rotate(x[:1, :, 3:].detach(), values))


# --- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_merge_partials(form: str) -> None:
    values = make_values(HEADS, D, "log-invariant", query_gain=True)
    chunks = list(itertools.pairwise((0, 0, 2, 5, 7, 7)))
    if form == "dense":
        x = tensors() | dict(v=normal(B, KV, NK, 5))
        whole = log_attention(**x, position=values, is_causal=True, return_lse=True)
        parts = [
            log_attention(
                x["q"],
                x["k"][:, :, a:b],
                x["v"][:, :, a:b],
                values,
                is_causal=True,
                query_start=NK - NQ,
                key_start=a,
                return_lse=True,
            )
            for a, b in chunks
        ]
    else:
        q, k, v = normal(NQ, HEADS, D), normal(NK, KV, D), normal(NK, KV, 11)
        cu_q = torch.tensor([0, NQ])
        whole = log_attention_varlen(
            q, k, v, values, cu_q, torch.tensor([0, NK]), NQ, NK, is_causal=True, return_lse=True
        )
        parts = [
            log_attention_varlen(
                q,
                k[a:b],
                v[a:b],
                values,
                cu_q,
                torch.tensor([0, b - a]),
                NQ,
                b - a,
                is_causal=True,
                query_start=NK - NQ,
                key_start=a,
                return_lse=True,
            )
            for a, b in chunks
        ]
    merged = merge_partials(*zip(*parts, strict=True))
    for x, y in zip(merged, whole, strict=True):
        torch.testing.assert_close(x, y)
    leaves = [x for x in values[:4] if x is not None]
    dout, dlse = normal(*whole[0].shape), normal(*whole[1].shape)
    for x, y in zip(
        torch.autograd.grad(merged, leaves, [dout, dlse]), torch.autograd.grad(whole, leaves, [dout, dlse]), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_merging_nothing_but_empty_parts() -> None:
    outs = [torch.zeros(B, HEADS, NQ, D, requires_grad=True) for _ in range(2)]
    lses = [torch.full((B, HEADS, NQ), -INF, requires_grad=True) for _ in range(2)]
    out, lse = merge_partials(outs, lses)
    assert (out == 0).all()
    assert (lse == -INF).all()
    for gradient in torch.autograd.grad([out, lse], [*outs, *lses], [torch.ones_like(out), torch.ones_like(lse)]):
        assert (gradient == 0).all()


def test_merging_one_part_and_half_precision() -> None:
    out, lse = log_attention(**tensors(), return_lse=True)
    merged = merge_partials([out.half()], [lse])
    assert merged[0].dtype == torch.float16
    assert torch.equal(merged[0], out.half())
    torch.testing.assert_close(merged[1], lse)


def test_merge_gradcheck() -> None:
    outs = [normal(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [(4 * normal(1, 2, 3, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge_partials(x[:3], x[3:]), [*outs, *lses])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], r"at least 1, got 0 and 0"),
        ([(1, 2, 3, 4)] * 2, [(1, 2, 3)], r"of one length.* got 2 and 1"),
        ([(1, 2, 3, 4)], [(1, 3, 2)], r"got \(1, 2, 3, 4\) and \(1, 3, 2\)"),
        ([(1, 2, 3, 4), (1, 2, 5, 4)], [(1, 2, 3), (1, 2, 5)], r"got \(1, 2, 5, 4\) and \(1, 2, 5\)"),
        ([(5, 2, 4)], [(5, 2)], r"got \(5, 2, 4\) and \(5, 2\)"),
    ],
)
def test_merge_refuses(outs: list[Any], lses: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_partials([torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])


def test_merge_refuses_what_is_no_dense_floating_tensor() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for outs, lses, message in (
        ([out, None], [lse, lse], "outs must be a tensor, got NoneType"),
        ([out.long()], [lse], "outs must be floating tensors of one dtype.* got torch.int64"),
        ([out, out.half()], [lse, lse], "outs must be .* got torch.float16 on cpu beside torch.float32"),
        ([out], [lse.to("meta")], "lses must be .* got torch.float32 on meta beside torch.float32 on cpu"),
        ([out.to_sparse()], [lse], "outs must be a dense tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            merge_partials(outs, lses)


def test_an_empty_part_may_hold_anything() -> None:
    out, lse = log_attention(**tensors(), return_lse=True)
    empty = torch.full_like(out, math.nan), torch.full_like(lse, -INF)
    for x, y in zip(merge_partials([empty[0], out], [empty[1], lse]), (out, lse), strict=True):
        torch.testing.assert_close(x, y)


# --- magnitudes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str, dtype: torch.dtype) -> None:
    """Before scaling, scores go beyond the largest float16.

    The largest one of a row takes all the weight. Rows are drawn again in which rounding could choose another.
    """
    call = make_call(1, 2, 1, 20, 20, 64, dtype=dtype, preset="log-rotary-bias", is_causal=True)
    call = call.replace(q=200 * call.q, k=200 * call.k)
    hidden = torch.ones(20, 20).triu(1).bool()
    for _ in range(100):
        q, k = (logpe.rotate(x.double(), call.values) for x in (call.q, call.k))
        scores = q @ k.mT
        assert scores.abs().max() > 8 * 65504
        first, second = scores.masked_fill(hidden, -INF).topk(2).values.unbind(-1)
        close = first - second < 0.02 * scores.abs().max()
        if not close.any():
            break
        call = call.replace(q=torch.where(close[..., None], 200 * torch.randn_like(call.q), call.q))
    assert not close.any()
    check(call, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_number_as_a_mask(backend: str, dtype: torch.dtype) -> None:
    """It hides a key beside others. Where nothing else is visible, the scores decide, on every backend."""
    hidden = torch.tensor([[True, True, True, False, True, False, False], [True] * NK])
    for of in (torch.float16, torch.bfloat16, torch.float32):
        mask = torch.zeros(B, NK).masked_fill(hidden, torch.finfo(of).min).to(of)
        x = tensors() | dict(position=VALUES, is_causal=True, query_start=0, return_lse=True)
        x |= {name: x[name].to(dtype).requires_grad_() for name in "qkv"}
        out, lse = log_attention(**x, key_mask=mask, backend=backend)
        gradients = torch.autograd.grad(out.float().sum(), [x[name] for name in "qkv"])
        assert all(t.isfinite().all() for t in (out, lse, *gradients))
        wide = {name: t.double() if name in "qkv" else t for name, t in x.items()}
        alone = log_attention(**wide, backend="reference")[0]  # as if there were no mask
        beside = log_attention(**wide, key_mask=~hidden, backend="reference")[0]
        torch.testing.assert_close(out[1].double(), alone[1], rtol=0.02, atol=0.02)
        torch.testing.assert_close(out[0, :, :3].double(), alone[0, :, :3], rtol=0.02, atol=0.02)
        torch.testing.assert_close(out[0, :, 3:].double(), beside[0, :, 3:], rtol=0.02, atol=0.02)
        assert (lse[1] < -60000).all()


# --- on a GPU only ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_values_on_a_gpu_are_checked_on_request() -> None:
    """Reading them waits for the GPU."""
    x = {name: t.cuda() for name, t in tensors().items()}
    lengths = torch.tensor([3, 8], device="cuda")
    assert log_attention(**x, key_lengths=lengths).isfinite().all()  # clamped
    with pytest.raises(ValueError, match="key_lengths must be from 0 to 7, got values from 3 to 8"):
        log_attention(**x, key_lengths=lengths, validate=True)
    y = {name: t.cuda() if isinstance(t, Tensor) else t for name, t in packed().items()}
    y["cu_seqlens_q"] = torch.tensor([0, 5, 3], device="cuda")
    assert log_attention_varlen(**y).isfinite().all()
    with pytest.raises(ValueError, match="cu_seqlens_q must never fall, got 5 followed by 3"):
        log_attention_varlen(**y, validate=True)


@pytest.mark.gpu
def test_backends_on_a_gpu() -> None:
    x = {name: t.cuda() for name, t in tensors().items()}
    expected = log_attention(**x, backend="reference")
    for backend in ("auto", "triton"):
        torch.testing.assert_close(log_attention(**x, backend=backend), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r'backend="blocked" runs on the CPU, and q is on cuda:0'):
        log_attention(**x, backend="blocked")
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        log_attention(x["q"], x["k"].cpu(), x["v"])
    with pytest.raises(ValueError, match=r"position\.power must be on the device of q, cuda:0, got cpu"):
        log_attention(**x, position=LogPosition(HEADS, D), is_causal=True)


def test_public_names() -> None:
    for name in logpe.__all__:
        assert hasattr(logpe, name)
    assert PositionValues._fields[:5] == Options._fields[:5]
    assert PositionValues._field_defaults.items() <= Options._field_defaults.items()
