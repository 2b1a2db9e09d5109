"""The mathematics of log positions for Triton tiles, forward and backward.

For a query at position i and a key at position j, d = |i - j|, per query head:

    log distance   l = log(1 + rate * d); without a rate, d
    logit          a = u * s - power * l,   u = sqrt(1 + sharpness * l),   s = scale * gain(i) * <q, k>
    query gain     gain(i) = 1 + alpha * log(1 + n / n0)

and its derivatives, which the backward kernels multiply by g = dL/da and sum:

    da/ds = u        da/dpower = -l        da/dsharpness = s * l / (2u)
    da/drate = (sharpness * s / (2u) - power) * d / (1 + rate * d)
    da/dalpha = u * s * log(1 + n / n0) / gain

Units: scores and logits are in units of log2 (multiplied by log2 e), so that exp2 serves the softmax;
derivatives and parameters are in natural units. Tiles arrive already broadcast: the same functions serve
S [BLOCK_M, BLOCK_N] and its transpose. A part that is None costs nothing: the branch is not compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TWO_PI = tl.constexpr(6.283185307179586)


class Parameters(NamedTuple):
    """The parameters of all heads (pointers, float32 (Hq,)), or of one head (scalars); None where absent."""

    power: Any = None
    rate: Any = None
    sharpness: Any = None
    alpha: Any = None


@triton.jit
def log2(x):
    """Return log2(x) in one instruction: tl.log2 is a routine of about 20 with a branch for denormals on NVIDIA."""
    if INTERPRETED:
        return tl.log2(x)
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)  # v_log_f32 on AMD


@triton.jit
def reciprocal(x):
    """Return 1 / x in one instruction: a division takes about 8, for the sake of huge and tiny denominators."""
    if INTERPRETED:
        return 1.0 / x
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def log2_distance(distance, head):
    """Return l / ln 2, which is log2(1 + rate * d), or d / ln 2 without a rate."""
    if head.rate is None:
        return LOG2E * distance
    else:
        return log2(1.0 + head.rate * distance)


@triton.jit
def inverse_sharpening(distance, head):
    """Return 1 / u."""
    return tl.rsqrt(1.0 + head.sharpness * LN2 * log2_distance(distance, head))


@triton.jit
def sharpening(distance, head):
    """Return u = da/ds; 1 without a sharpness."""
    if head.sharpness is None:
        return 1.0
    else:
        squared = 1.0 + head.sharpness * LN2 * log2_distance(distance, head)
        return squared * tl.rsqrt(squared)


@triton.jit
def logit(score, distance, head, shift):
    """Return a - shift, from s, all in units of log2; shift may be None. In this order a step is one multiply-add."""
    if head.sharpness is not None:
        score = score * sharpening(distance, head)
    if shift is not None:
        score = score - shift
    if head.power is not None:
        score = score - head.power * log2_distance(distance, head)
    return score


# A far tile: the middle of its columns is FAR times as distant from every row as it is wide. There a polynomial over
# the columns stands for the logarithm, with coefficients for each row:
# log2(1 + t) = L0 + t (L1 + t (L2 + t L3)) for |t| <= 1 / (2 FAR), within 1.13e-5 (minimax).
FAR = tl.constexpr(4)
L0 = tl.constexpr(1.1153172236607443e-05)
L1 = tl.constexpr(1.442659172212127)
L2 = tl.constexpr(-0.7270388425061942)
L3 = tl.constexpr(0.48775328655390787)


@triton.jit
def far_log2_distance(middle, offset, head, factor):
    """Return factor * log2(1 + rate * d) for d = |middle - offset|; middle: [ROWS, 1], offset: [1, COLUMNS]."""
    # 1 + rate * d = n (1 + t), t = slope * offset: the powers of slope go into the coefficients.
    n = 1.0 + head.rate * tl.abs(middle)
    slope = tl.where(middle > 0, -head.rate, head.rate) * reciprocal(n)
    first = factor * slope
    second = first * slope
    return factor * (log2(n) + L0) + offset * (L1 * first + offset * (L2 * second + offset * (L3 * second * slope)))


@triton.jit
def far_logit(score, middle, offset, head):
    """Return the logit in a far tile, for a head with a power and a rate, and without a sharpness."""
    return score + far_log2_distance(middle, offset, head, -head.power)


# The fields of Parameters.
POWER = tl.constexpr(0)
RATE = tl.constexpr(1)
SHARPNESS = tl.constexpr(2)
ALPHA = tl.constexpr(3)


@triton.jit
def derivative(PARAMETER: tl.constexpr, score, distance, head):
    """Return da/dparameter, for alpha da/dlog(gain), but for the factor that is the same in the whole tile.

    The factor is that of :func:`factors`; da/dalpha is log(1 + n / n0) / gain times da/dlog(gain).
    """
    if PARAMETER == POWER:
        return log2_distance(distance, head)
    elif PARAMETER == RATE:
        by_rate = distance * reciprocal(1.0 + head.rate * distance)
        if head.sharpness is not None:
            pull = (0.5 * LN2) * head.sharpness * score * inverse_sharpening(distance, head)
            if head.power is not None:
                pull = pull - head.power
            by_rate = by_rate * pull
        return by_rate
    elif PARAMETER == SHARPNESS:
        return score * log2_distance(distance, head) * inverse_sharpening(distance, head)
    else:
        return score * sharpening(distance, head)


@triton.jit
def factors(head):
    """Return what sums over :func:`derivative` are to be multiplied by, for each parameter."""
    rate = 1.0
    if head.power is not None and head.sharpness is None:
        rate = -head.power
    return Parameters(-LN2, rate, 0.5 * LN2 * LN2, LN2)


@triton.jit
def log_length(n, gain_length):
    """Return log(1 + n / n0) for integer lengths n; those below 0 count as 0."""
    return LN2 * tl.log2(1.0 + tl.maximum(n, 0).to(tl.float32) / gain_length)


@triton.jit
def query_gain(n, head, gain_length):
    """Return the gain of queries whose length is n; 1 without an alpha."""
    if head.alpha is None:
        return 1.0
    else:
        return 1.0 + head.alpha * log_length(n, gain_length)


@triton.jit
def rotation(n, theta, rotary_scale):
    """Return cos and sin of theta * f_c(n); f_c(n) = c log(1 + n/c) with c = rotary_scale, or n where it is None.

    n: positions and theta: float64, both broadcast. In float32 an angle of 10^5 turns (c large, a long sequence) would
    keep two digits of its fraction. Here the fraction of a turn becomes an integer, whose whole turns overflow.
    """
    n = tl.maximum(n, 0)
    turns = theta * (1.0 / TWO_PI)  # per unit of f_c; a division of float64 takes nine times as long
    if rotary_scale is not None:
        turns *= tl.log(1.0 + n.to(tl.float64) / rotary_scale) * rotary_scale
        turn = ((turns - tl.floor(turns)) * 2.0**32).to(tl.int64).to(tl.int32)  # 2^32 units
    else:  # float64, which many GPUs have little of, for each plane alone: the product is exact in units of 2^-64
        step = ((turns - tl.floor(turns)) * 2.0**63).to(tl.int64) << 1
        turn = ((step * n) >> 32).to(tl.int32)
    # Down to an eighth of a turn, where short polynomials (Cephes, 1 ulp) serve: the library's sine carries
    # a reduction for huge arguments, with a table on the stack.
    quarter = (turn + 2**29) >> 30
    x = (turn - (quarter << 30)).to(tl.float32) * (TWO_PI / 2.0**32)
    xx = x * x
    sin = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 - 1.9515295891e-4 * xx))
    cos = 1.0 - 0.5 * xx + xx * xx * (4.166664568298827e-2 + xx * (2.443315711809948e-5 * xx - 1.388731625493765e-3))
    odd = (quarter & 1) == 1
    sine, cosine = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    quarter &= 3
    return tl.where((quarter == 1) | (quarter == 2), -cosine, cosine), tl.where(quarter >= 2, -sine, sine)
