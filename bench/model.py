"""A small decoder-only transformer over bytes, and the position encodings it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logpe


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


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    dim: int = 128
    layers: int = 3
    heads: int = 4
    qk_norm: bool = False  # RMSNorm on queries and keys
    vocabulary: int = 256


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


class Attention(nn.Module):
    """Causal self-attention; the encoding decides what the logits know of distance."""

    slopes: Tensor | None

    def __init__(self, shape: Shape, encoding: Encoding) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)
        head_norm = nn.RMSNorm if shape.qk_norm else nn.Identity
        self.query_norm, self.key_norm = (head_norm(shape.dim // shape.heads) for _ in range(2))
        self.position = logpe.LogPosition(
            shape.heads,
            shape.dim // shape.heads,
            encoding.preset,
            query_gain=encoding.query_gain,
            rotary_scale=encoding.rotary_scale,
        )
        self.register_buffer("slopes", alibi_slopes(shape.heads) if encoding.alibi else None, persistent=False)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """x (B, N, dim) -> (B, last or N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q if last is None else q[:, :, -last:]), self.key_norm(k)
        if self.slopes is not None:
            out = alibi_attention(q, k, v, self.slopes)
        else:
            out = logpe.log_attention(q, k, v, self.position, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU with 8 dim^2 weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape, encoding: Encoding) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.dim), nn.RMSNorm(shape.dim)
        self.attention, self.mlp = Attention(shape, encoding), MLP(shape.dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """x (B, N, dim) -> (B, last or N, dim)."""
        attended = self.attention(self.attention_norm(x), last)
        x = x[:, -attended.shape[1] :] + attended
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Bytes to logits of the next byte, embeddings tied. The same seed gives every encoding the same weights."""

    def __init__(self, shape: Shape, encoding: Encoding, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
            self.blocks = nn.ModuleList(Block(shape, encoding) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.dim)
            scale = encoding.sinusoid_scale
            self.sinusoid = None if scale is None else logpe.LogSinusoid(shape.dim, scale)
        generator = torch.Generator().manual_seed(seed)  # of its own: positions may draw from the global one
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):  # into the residual stream
                    std *= (2 * shape.layers) ** -0.5
                elif name == "embedding.weight":  # or, being tied, it starts by predicting the byte it just read
                    std *= 0.25
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """tokens int64 (B, N) -> logits float (B, N, vocabulary), or of the last few positions alone."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        if self.sinusoid is not None:
            x = x + self.sinusoid(tokens.shape[1]).to(x)
        for index, block in enumerate(self.blocks):
            x = block(x, last if index == len(self.blocks) - 1 else None)
        return F.linear(self.norm(x), self.embedding.weight)
