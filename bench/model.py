"""The position encodings that are compared, in the language model of the package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import logpe
from logpe.language_model import Attention, LanguageModel, Shape


@dataclass(frozen=True)
class Encoding:
    """How a model knows where a byte stands. Everything but ALiBi is a LogPosition or a LogSinusoid."""

    preset: str = "none"  # of LogPosition
    rotary_scale: float = 1.0  # math.inf: rotary on plain positions, that is RoPE
    sinusoid_scale: float | None = None  # added to the embedding; math.inf: on plain positions
    alibi: bool = False
    query_gain: bool = False


ENCODINGS = {
    "none": Encoding(),
    "sinusoid": Encoding(sinusoid_scale=math.inf),
    "log-sinusoid": Encoding(sinusoid_scale=1.0),
    "rope": Encoding("log-rotary", rotary_scale=math.inf),
    "alibi": Encoding(alibi=True),
    "log-bias": Encoding("log-bias"),
    "log-invariant": Encoding("log-invariant"),
    "log-rotary": Encoding("log-rotary"),
    "log-rotary-bias": Encoding("log-rotary-bias"),
}
ENCODINGS |= {
    f"{name}+gain": Encoding(e.preset, e.rotary_scale, e.sinusoid_scale, query_gain=True)
    for name, e in ENCODINGS.items()
    if not e.alibi
}


def alibi_slopes(heads: int) -> Tensor:
    """(heads,): the geometric sequence of the ALiBi paper, 2^(-8/heads) to 2^-8."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def alibi_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Causal attention with logits - slope * (i - j); q (B, H, Nq, D), k and v (B, H, Nk, D) -> as q.

    Softmax does not see slope * i, which is one number per row: what is left is a bias per key and head. So heads
    become batch entries, and ALiBi runs exactly, in float32, through the same kernel as the encodings it is
    compared with. Distances are taken from the last key, to keep the numbers small.
    """
    batch, heads, length = k.shape[:3]
    bias = slopes[:, None] * torch.arange(1 - length, 1, device=k.device)
    q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    out = logpe.log_attention(q, k, v, is_causal=True, key_mask=bias.repeat(batch, 1))
    return out.view(batch, heads, *out.shape[2:])


class AlibiAttention(Attention):
    """Causal self-attention with ALiBi."""

    slopes: Tensor

    def __init__(self, shape: Shape, position: Mapping[str, Any]) -> None:
        super().__init__(shape, position)
        self.register_buffer("slopes", alibi_slopes(shape.heads), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, last or N, D), k and v (B, H, N, D) -> as q."""
        return alibi_attention(q, k, v, self.slopes)


class Model(LanguageModel):
    """The language model with any encoding. The same seed gives every encoding the same weights."""

    def __init__(self, shape: Shape, encoding: Encoding, seed: int) -> None:
        position = dict(preset=encoding.preset, query_gain=encoding.query_gain, rotary_scale=encoding.rotary_scale)
        super().__init__(shape, position, seed, AlibiAttention if encoding.alibi else Attention)
        scale = encoding.sinusoid_scale
        self.sinusoid = None if scale is None else logpe.LogSinusoid(shape.dim, scale)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 (B, N) -> (B, N, dim)."""
        x = super().embed(tokens)
        return x if self.sinusoid is None else x + self.sinusoid(tokens.shape[1]).to(x)
