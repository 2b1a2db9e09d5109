"""Test the definition against torch's attention, plain loops, and numbers worked out by hand."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PARAMETERS, make_values
from logpe_kernels.options import Options
from torch import Tensor

from logpe import LogSinusoid, PositionValues, reference

INF = math.inf


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def wide(values: PositionValues) -> PositionValues:
    """Return the values as float64 leaves."""
    parts = {name: getattr(values, name) for name in PARAMETERS}
    return values._replace(**{n: x.detach().double().requires_grad_() for n, x in parts.items() if x is not None})


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: PositionValues = PositionValues(),  # noqa: B008
    *,
    attn_mask: Tensor | None = None,
    return_weights: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run reference.attention, or reference.attention_varlen, with options by name."""
    given = Options(**values._asdict(), **options)
    if given.cu_seqlens_q is not None:
        return reference.attention_varlen(q, k, v, given)
    return reference.attention(q, k, v, given, attn_mask=attn_mask, return_weights=return_weights)


# --- the parts --------------------------------------------------------------------------------------------------


def test_log_map() -> None:
    n = doubles(0, 1, 3, 1e6)
    torch.testing.assert_close(reference.log_map(n, 1.0), doubles(0, math.log(2), math.log(4), math.log(1000001)))
    torch.testing.assert_close(reference.log_map(n, 3.0)[2], 3 * doubles(math.log(2))[0])
    assert torch.equal(reference.log_map(n, INF), n)
    torch.testing.assert_close(reference.log_map(n[:3], 1e12), n[:3], rtol=1e-11, atol=0)  # c -> inf is the identity


def test_the_formulas_of_the_parts() -> None:
    l = reference.log_distance(doubles(0, 1, 4), doubles(0.5))  # noqa: E741
    torch.testing.assert_close(l, doubles(0, math.log(1.5), math.log(3)))
    bias = reference.distance_bias(l, doubles(2.0))
    torch.testing.assert_close(bias, doubles(0, -2 * math.log(1.5), -2 * math.log(3)))
    torch.testing.assert_close(reference.sharpening(doubles(0, 1, 4), doubles(2.0)), doubles(1, math.sqrt(3), 3))
    gain = reference.query_gain(doubles(0, 10, 70), doubles(3.0), 10.0)
    torch.testing.assert_close(gain, doubles(1, 1 + 3 * math.log(2), 1 + 9 * math.log(2)))
    torch.testing.assert_close(reference.inverse_frequencies(4, 10000.0), doubles(1, 0.1, 0.01, 0.001))


def test_rotation_is_multiplication_by_a_phase() -> None:
    x, theta, positions = normal(5, 11), doubles(1.0, 0.3, 0.01), torch.tensor([-2, 0, 1, 7, 4000])
    turned = reference.rotate(x, positions, theta, 2.0)
    for row, position in enumerate(positions.tolist()):
        f = 2 * math.log1p(max(position, 0) / 2)
        for plane in range(3):
            z = complex(x[row, plane], x[row, plane + 3]) * cmath.exp(1j * float(theta[plane]) * f)
            torch.testing.assert_close(turned[row, [plane, plane + 3]], doubles(z.real, z.imag))
    assert torch.equal(turned[:, 6:], x[:, 6:])  # dims beyond the planes stay


@pytest.mark.parametrize("rotary_scale", [1.0, 100.0, INF])
def test_the_inverse_rotation_undoes_the_rotation(rotary_scale: float) -> None:
    x, theta, positions = normal(2, 3, 7, 10), reference.inverse_frequencies(4, 10000.0), torch.arange(7) * 1000
    turned = reference.rotate(x, positions, theta, rotary_scale)
    torch.testing.assert_close(reference.rotate(turned, positions, theta, rotary_scale, inverse=True), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_an_infinite_scale_is_rotary_embedding() -> None:
    """Hugging Face writes it as x cos + rotate_half(x) sin."""
    x, positions = normal(9, 8), torch.arange(9)
    frequencies = 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.cat((positions[:, None] * frequencies,) * 2, -1)
    half = torch.cat((-x[:, 4:], x[:, :4]), -1)
    expected = x * angles.cos() + half * angles.sin()
    theta = reference.inverse_frequencies(4, 10000.0)
    torch.testing.assert_close(reference.rotate(x, positions, theta, INF), expected)
    torch.testing.assert_close(reference.rotate(x, positions, theta, 1e9), expected, rtol=1e-6, atol=1e-6)


def test_angles_are_exact_far_out() -> None:
    """At position 10^6 a float32 angle would be wrong in its second digit after the point."""
    x = torch.tensor([[1.0, 0.0]])
    turned = reference.rotate(x, torch.tensor([1_000_003]), doubles(1.0), INF)
    torch.testing.assert_close(turned, torch.tensor([[math.cos(1_000_003), math.sin(1_000_003)]]), rtol=0, atol=1e-7)


# --- worked out by hand -----------------------------------------------------------------------------------------


def test_distance_bias_by_hand() -> None:
    """power 1, rate 1: weights 1/4, 1/3, 1/2, 1 over 25/12."""
    values = PositionValues(power=doubles(1.0), rate=doubles(1.0))
    v = doubles(1, 2, 3, 4).view(1, 1, 4, 1)
    out, lse, weights = attention(0 * v[:, :, :1], 0 * v, v, values, query_start=3, return_weights=True)
    torch.testing.assert_close(weights.flatten(), doubles(3 / 25, 4 / 25, 6 / 25, 12 / 25))
    torch.testing.assert_close(out.flatten(), doubles(77 / 25))
    torch.testing.assert_close(lse.flatten(), doubles(math.log(25 / 12)))


def test_sharpness_by_hand() -> None:
    """rate e - 1 puts l = 1 at distance 1, and sharpness 3 doubles the score log 2 there: 4 against 3."""
    values = PositionValues(rate=doubles(math.e - 1), sharpness=doubles(3.0))
    k = doubles(math.log(2), math.log(3)).view(1, 1, 2, 1)
    out, lse = attention(torch.ones(1, 1, 1, 1).double(), k, doubles(7, 0).view_as(k), values, query_start=1)
    torch.testing.assert_close(out.flatten(), doubles(4.0))
    torch.testing.assert_close(lse.flatten(), doubles(math.log(7)))


def test_query_gain_by_hand() -> None:
    """alpha 1/log 2 and n0 = 3 double the scores of the query at 3: 9 against 1. A window, or a length, caps n."""
    values = PositionValues(alpha=doubles(1 / math.log(2)), gain_length=3.0)
    tensors = torch.ones(1, 1, 1, 1).double(), doubles(math.log(3), 0).view(1, 1, 2, 1), doubles(10, 0).view(1, 1, 2, 1)
    out, lse = attention(*tensors, values, query_start=3)
    torch.testing.assert_close(out.flatten(), doubles(9.0))
    torch.testing.assert_close(lse.flatten(), doubles(math.log(10)))
    out = attention(*tensors, values, query_start=100, key_start=98, window_left=3)[0]
    torch.testing.assert_close(out.flatten(), doubles(9.0))
    out = attention(*tensors, values, query_start=1, context_lengths=torch.tensor([9]))[0]  # gain 3
    torch.testing.assert_close(out.flatten(), doubles(10 * 27 / 28))


def test_rotation_by_hand() -> None:
    """theta = pi / (2 log 2) turns position 1 by a quarter: scores log 5 and log 2."""
    values = PositionValues(theta=doubles(math.pi / 2 / math.log(2)))
    q = doubles(1, 0).view(1, 1, 1, 2)
    k = doubles(0, math.log(5), math.log(2), 0).view(1, 1, 2, 2)
    v = doubles(7, 0, 0, 14).view(1, 1, 2, 2)
    out, lse = attention(q, k, v, values, query_start=1)
    torch.testing.assert_close(out.flatten(), doubles(5, 4))
    torch.testing.assert_close(lse.flatten(), doubles(math.log(7)))


def test_visibility_by_hand() -> None:
    """Each query has uniform weights over what it sees."""

    def seen(queries: int = 4, **options: Any) -> list[list[int]]:
        zeros = torch.zeros(1, 1, 5, 1).double()
        weights = attention(zeros[:, :, :queries], zeros, zeros, return_weights=True, **options)[2]
        return (weights[0, 0] > 0).int().tolist()

    full, none = [1] * 5, [0] * 5
    assert seen() == [full] * 4
    assert seen(window_right=0) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert seen(window_right=0, query_start=1)[0] == [1, 1, 0, 0, 0]
    assert seen(window_left=0, window_right=1)[2] == [0, 0, 1, 1, 0]
    assert seen(window_left=1)[2:] == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert seen(query_start=-1)[:2] == [none, full]
    assert seen(key_start=-2)[0] == [0, 0, 1, 1, 1]
    assert seen(key_starts=torch.tensor([-2]), query_starts=torch.tensor([-3])) == [none] * 3 + [[0, 0, 1, 1, 1]]
    assert seen(key_lengths=torch.tensor([2]))[0] == [1, 1, 0, 0, 0]
    assert seen(key_bias=torch.tensor([[0, -INF, 1, -INF, 0.5]]))[0] == [1, 0, 1, 0, 1]
    assert seen(attn_mask=torch.tensor([True, False, False, True, True]))[0] == [1, 0, 0, 1, 1]
    assert seen(attn_mask=doubles(0, -INF, 0, 0, 3))[0] == [1, 0, 1, 1, 1]


# --- against other implementations ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3])
def test_without_a_position_it_is_torchs_attention(group: int) -> None:
    q, k, v = normal(2, 6, 7, 5), normal(2, 6 // group, 9, 5), normal(2, 6 // group, 9, 4 + group)
    out = attention(q, k, v, scale=0.7)[0]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True))
    mask = torch.ones(7, 9, dtype=torch.bool).tril(2)  # bottom-right
    out = attention(q, k, v, scale=0.7, query_start=2, window_right=0)[0]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask, scale=0.7, enable_gqa=True))


def test_the_distance_bias_is_a_dense_mask_of_torchs_attention() -> None:
    q, k, v, values = normal(2, 4, 8, 5), normal(2, 4, 8, 5), normal(2, 4, 8, 5), wide(make_values(4, 5))
    distance = (torch.arange(8)[:, None] - torch.arange(8)).abs().double()
    bias = -values.power[:, None, None] * torch.log(1 + values.rate[:, None, None] * distance)
    bias = bias.masked_fill(torch.ones(8, 8).triu(1).bool(), -INF)
    inputs = [x.requires_grad_() for x in (q, k, v)] + [values.power, values.rate]
    expected = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    out = attention(q, k, v, values, window_right=0)[0]
    torch.testing.assert_close(out, expected)
    dout = normal(*out.shape)
    gradients = torch.autograd.grad(out, inputs, dout)
    for gradient, by_torch in zip(gradients, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(gradient, by_torch)


@torch.no_grad()
def test_everything_at_once_against_plain_loops() -> None:
    """The loops go through the formulas of the module's docstring, one float at a time."""
    batch, heads, kv_heads, num_queries, num_keys, dim, value_dim = 2, 4, 2, 6, 9, 7, 5
    q, k = normal(batch, heads, num_queries, dim), normal(batch, kv_heads, num_keys, dim)
    v = normal(batch, kv_heads, num_keys, value_dim)
    values = wide(make_values(heads, dim, "log-invariant", query_gain=True, gain_length=4))
    values = values._replace(theta=doubles(0.9, 0.2), rotary_scale=3.0)
    query_starts, key_starts, key_lengths = [-2, 3], [0, -1], [8, 9]
    key_bias = normal(batch, num_keys).masked_fill(torch.rand(batch, num_keys) < 0.2, -INF)
    left, right, seed, p = 5, 2, 2**40 + 3, 0.25
    out, lse, weights = attention(
        q, k, v, values, scale=0.6, query_starts=torch.tensor(query_starts), key_starts=torch.tensor(key_starts),
        key_lengths=torch.tensor(key_lengths), key_bias=key_bias, window_left=left, window_right=right,
        dropout_p=p, dropout_seed=torch.tensor([seed]), return_weights=True,
    )  # fmt: skip

    def turned(x: Tensor, position: int) -> list[float]:
        x = x.tolist()
        for t, theta in enumerate((0.9, 0.2)):
            z = complex(x[t], x[t + 2]) * cmath.exp(1j * theta * 3 * math.log(1 + position / 3))
            x[t], x[t + 2] = z.real, z.imag
        return x

    for b in range(batch):
        for h in range(heads):
            power, rate, sharpness, alpha = (float(getattr(values, name)[h]) for name in PARAMETERS)
            for m in range(num_queries):
                i, masses = query_starts[b] + m, {}
                for n in range(num_keys):
                    j = key_starts[b] + n
                    if min(i, j) < 0 or n >= key_lengths[b] or not i - left <= j <= i + right or key_bias[b, n] == -INF:
                        continue
                    l = math.log(1 + rate * abs(i - j))  # noqa: E741
                    products = zip(turned(q[b, h, m], i), turned(k[b, h // 2, n], j), strict=True)
                    s = 0.6 * (1 + alpha * math.log(1 + min(i, left) / 4)) * sum(x * y for x, y in products)
                    masses[n] = math.exp(math.sqrt(1 + sharpness * l) * s - power * l + float(key_bias[b, n]))
                total = sum(masses.values())
                assert float(lse[b, h, m]) == pytest.approx(math.log(total) if masses else -INF, rel=1e-11)
                expected = torch.zeros(value_dim, dtype=torch.float64)
                for n, mass in masses.items():
                    kept = philox4((key_starts[b] + n, i, b * heads + h, 0), seed)[0] >= p * 2**32
                    weight = kept * mass / total / (1 - p)
                    assert float(weights[b, h, m, n]) == pytest.approx(weight, rel=1e-11)
                    expected += weight * v[b, h // 2, n]
                torch.testing.assert_close(out[b, h, m], expected)


@pytest.mark.parametrize("preset", ["none", "alibi", "log-bias", "log-invariant", "log-rotary", "log-rotary-bias"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(preset: str, causal: bool) -> None:
    """Gradients of out and lse reach every input and parameter, beside rows without keys and with dropout."""
    values = wide(make_values(2, 4, preset, query_gain=True, gain_length=3))
    names = [name for name in PARAMETERS if getattr(values, name) is not None]
    inputs = [normal(2, 2, 4, 4), normal(2, 1, 5, 4), normal(2, 1, 5, 3)]
    key_bias = torch.zeros(2, 5).double()
    key_bias[0, :2] = -INF

    def function(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            q, k, v, values._replace(**dict(zip(names, parameters, strict=True))), query_start=-1, key_bias=key_bias,
            window_right=0 if causal else None, dropout_p=0.3, dropout_seed=torch.tensor([11]),
        )  # fmt: skip
        return out, lse.masked_fill(lse == -INF, 0)

    tensors = [x.requires_grad_() for x in inputs] + [getattr(values, name) for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_half_precision_positions_stay_float32() -> None:
    """Far out a bfloat16 distance would be off by hundreds of tokens."""
    values = PositionValues(power=torch.tensor([1.0]), rate=torch.tensor([1.0]))
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.bfloat16) for n in (1, 3, 3))
    lse = attention(q, k, v, values, query_start=100_003, key_start=100_000)[1]
    exact = attention(q.double(), k.double(), v.double(), values, query_start=3)[1]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=0.03)  # products rounded to bfloat16


# --- what nobody sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_products_do_not_overflow(dtype: torch.dtype) -> None:
    """Beyond 65504 everything is finite, and lse is that of the same numbers in float64."""
    q, k = 100 * normal(1, 2, 6, 64), 100 * normal(1, 2, 6, 64)
    q, k, v = (x.to(dtype) for x in (q, k, normal(1, 2, 6, 64)))
    assert (q.double() @ k.double().mT).abs().max() > 65504
    results = []
    for x in ((q, k, v), (q.double(), k.double(), v.double())):
        leaves = [t.clone().requires_grad_() for t in x]
        out, lse, weights = attention(*leaves, return_weights=True)
        results.append([out, lse, weights, *torch.autograd.grad(out.double().sum(), leaves)])
    assert all(x.isfinite().all() for x in results[0])
    torch.testing.assert_close(results[0][1].double(), results[1][1], rtol=0.02, atol=1)  # lse


def test_two_masks_of_the_lowest_number() -> None:
    """Their sum overflows; a row that they cover is as without any mask."""
    q, k, v = (normal(1, 2, 4, 8).float() for _ in range(3))
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0] * 4, [lowest] * 4, [0.0] * 4, [-INF] * 4])
    out, lse = attention(q, k, v, key_bias=torch.full((1, 4), lowest), attn_mask=mask)
    expected = attention(q, k, v)[0]
    torch.testing.assert_close(out[:, :, :3], expected[:, :, :3], rtol=0.05, atol=0.05)
    assert lse[:, :, :3].isfinite().all()
    assert (lse[:, :, 3] == -INF).all()


def test_hidden_rows_do_not_matter() -> None:
    q, k, v, dlse = (normal(2, 2, 5, 4) for _ in range(4))
    values = wide(make_values(2, 4, "log-rotary-bias", query_gain=True))
    options = dict(query_start=-2, key_lengths=torch.tensor([3, 0]), window_right=0)
    results = []
    for filling in (0.0, math.nan):
        tensors = [x.clone() for x in (q, k, v)]
        tensors[0][:, :, :2] = filling  # before position 0
        for x in tensors[1:]:
            x[0, :, 3:] = filling
            x[1] = filling
        cotangents = [q.clone(), dlse[..., 0].clone()]
        for x in cotangents:
            x[:, :, :2] = filling
            x[1] = filling
        tensors = [x.requires_grad_() for x in tensors]
        out, lse = attention(*tensors, values, **options)
        gradients = torch.autograd.grad([out, lse], [*tensors, *values[:2], values.alpha], cotangents)
        results.append([out, lse, *gradients])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    out, lse, dq = results[1][:3]
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert (dq[1] == 0).all()
    assert (lse[0, :, :2] == -INF).all()
    assert lse[0, :, 2:].isfinite().all()


def test_attention_over_no_keys_and_no_queries() -> None:
    out, lse = attention(normal(1, 2, 3, 4), normal(1, 2, 0, 4), normal(1, 2, 0, 4), wide(make_values(2, 4)))
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -INF).all()
    out, lse = attention(normal(1, 2, 0, 4), normal(1, 2, 3, 4), normal(1, 2, 3, 4), wide(make_values(2, 4)))
    assert out.shape == (1, 2, 0, 4)
    assert lse.shape == (1, 2, 0)


def test_packed_sequences_are_separate_calls() -> None:
    lengths_q, lengths_k = [3, 0, 4, 2], [5, 2, 0, 2]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (lengths_q, lengths_k))
    q, k, v = normal(11, 4, 6), normal(10, 2, 6), normal(10, 2, 9)  # two tokens and one outside
    values = wide(make_values(4, 6, "log-rotary-bias", query_gain=True))
    starts = torch.tensor([2, 0, 0, 1])
    out, lse = attention(
        q, k, v, values, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, query_starts=starts, window_right=0, scale=0.5
    )
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x[index].transpose(0, 1)[None] for x, index in ((q, rows), (k, keys), (v, keys))]
        expected, expected_lse = attention(*alone, values, query_starts=starts[b : b + 1], window_right=0, scale=0.5)
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], expected_lse[0])
    assert (out[9:] == 0).all()
    assert (lse[:, 9:] == -INF).all()


def test_packed_sequences_of_nothing_have_gradients() -> None:
    q, k, v = (torch.empty(0, 2, size, requires_grad=True) for size in (6, 6, 4))
    bounds = torch.tensor([0, 0, 0])
    out, lse = attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, scale=0.5)
    assert out.shape == v.shape
    gradients = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert [x.shape for x in torch.autograd.grad(lse.sum(), (q, k))] == [q.shape] * 2


# --- dropout ----------------------------------------------------------------------------------------------------


def philox4(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Compute Philox-4x32-10 in Python's integers, after Salmon et al. (2011)."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def test_philox_against_the_published_vectors() -> None:
    """Random123 publishes known answers; the eager function fixes the fourth word of the counter to 0."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4((0, 0, 0, 0), 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4((ones,) * 4, 2**64 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4(pi, 0x299F31D0A4093822) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    zero = torch.zeros(1, dtype=torch.int64)
    assert int(reference.philox(0, zero, zero, zero)) == 0x6627E8D5
    words = torch.randint(2**32, (3, 50))
    for seed in (1, 2**32 - 1, 2**63 - 1, int(torch.randint(2**62, ()))):
        expected = [philox4((*counter, 0), seed)[0] for counter in words.T.tolist()]
        assert reference.philox(seed, *words).tolist() == expected


def test_dropout_keeps_the_share_it_says() -> None:
    index = torch.arange(200)
    for p in (0.1, 0.5, 0.9):
        keep = reference.dropout_keep(torch.tensor([7]), torch.tensor(3), index[:, None], index, p)
        assert keep.shape == (200, 200)
        assert float(keep.double().mean()) == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / 40000))
    first, second = (
        reference.dropout_keep(torch.tensor([seed]), torch.tensor(0), index[:, None], index, 0.5) for seed in (0, 2**32)
    )
    assert float((first == second).double().mean()) == pytest.approx(0.5, abs=0.02)  # the high word counts


def test_dropout_weights_are_rescaled_and_lse_is_without() -> None:
    q, k, v = normal(2, 2, 6, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 4)
    _, plain_lse, plain = attention(q, k, v, return_weights=True)
    out, lse, dropped = attention(q, k, v, dropout_p=0.4, dropout_seed=torch.tensor([3]), return_weights=True)
    assert torch.equal(lse, plain_lse)
    kept = dropped > 0
    assert 0 < float(kept.double().mean()) < 1
    torch.testing.assert_close(dropped, plain * kept / 0.6)
    torch.testing.assert_close(out, dropped @ v)


# --- the additive encoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
@pytest.mark.parametrize("scale", [1.0, 30.0, INF])
@pytest.mark.parametrize("length", [0, 1, 37])
def test_log_sinusoid(dim: int, scale: float, length: int) -> None:
    encoding = LogSinusoid(dim, scale)(length, dtype=torch.float64)
    assert encoding.shape == (length, dim)
    for n in range(length):
        f = n if scale == INF else scale * math.log(1 + n / scale)
        for d in range(dim):
            angle = f * 10000 ** (-(d - d % 2) / dim)
            assert float(encoding[n, d]) == pytest.approx((math.cos if d % 2 else math.sin)(angle), abs=1e-12)


def test_log_sinusoid_of_an_infinite_scale_is_the_classic_one() -> None:
    """The classic encoding is that of Vaswani et al. (2017), as PyTorch's tutorial writes it."""
    position = torch.arange(50).unsqueeze(1)
    factor = torch.exp(torch.arange(0, 12, 2) * (-math.log(10000.0) / 12))
    classic = torch.zeros(50, 12)
    classic[:, 0::2], classic[:, 1::2] = torch.sin(position * factor), torch.cos(position * factor)
    torch.testing.assert_close(LogSinusoid(12, INF)(50), classic, rtol=0, atol=1e-5)


def test_log_sinusoid_of_positions() -> None:
    encode = LogSinusoid(6, base=100.0)
    positions = torch.tensor([[3, 0], [10**6, 3]])
    encoding = encode(positions)
    assert encoding.shape == (2, 2, 6)
    assert encoding.dtype == torch.float32
    torch.testing.assert_close(encoding[0], encode(4)[[3, 0]])
    assert torch.equal(encoding[0, 0], encoding[1, 1])
    assert encode(positions, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert encode(torch.tensor([0.5])).isfinite().all()
    assert not list(encode.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "dim.*0"), ((4, 0.0), "scale.*0"), ((4, 1.0, -2.0), "base.*-2")]
)
def test_log_sinusoid_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogSinusoid(*arguments)


def test_log_sinusoid_rejects_a_negative_length() -> None:
    with pytest.raises(ValueError, match=r"positions.*-3"):
        LogSinusoid(4)(-3)
