"""The position encodings that are compared, in the language model of the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from logpe_kernels.options import LEARNABLE_PARTS, Options
from torch import Tensor, nn

import logpe
from logpe import reference
from logpe.lm import model as language_model
from logpe.lm.model import EMBEDDING_STD, LanguageModel, Shape
from logpe.position import PRESET_PARTS, LogPosition, inverse_softplus
from logpe.reference import PositionValues


@dataclass(frozen=True)
class Encoding:
    """How a model knows where a byte stands: a LogPosition or a LogSinusoid."""

    preset: str = "none"  # of LogPosition
    rotary_scale: float | None = None  # math.inf: rotary on plain positions, that is RoPE; None: preset
    sinusoid_scale: float | None = None  # added to the embedding; math.inf: on plain positions
    learnable: bool = True
    query_gain: bool = False
    gain_length: float = 512.0  # n0 of the query gain
    gain_on_bias: bool = False  # the gain multiplies the whole logit, not the score alone
    rotary: float | None = None  # share of head_dim that is turned, by RoPE where the preset turns none; None: preset
    rotary_base: float | None = None  # plane p of P turns by base^(-p / P) per position; None: preset
    yarn: int | None = None  # bytes it was trained at; RoPE is rescaled for longer texts
    reach: float | None = None  # at least half of each head's weight lies within so many bytes or tokens
    qk_norm: bool = False  # RMSNorm on queries and keys
    sink: bool = False  # a key of each head without a position, whose value is zero
    shared: bool = False  # one LogPosition for all layers
    kerple: bool = False  # powers drawn from U(0, 2), as KERPLE starts
    initial: tuple[tuple[str, float, float], ...] = ()  # of a part: the first head's value and the last head's

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of its LogPosition, beside the preset."""
        return dict(
            query_gain=self.query_gain,
            gain_length=self.gain_length,
            learnable=self.learnable,
            rotary_scale=self.rotary_scale,
            rotary_fraction=self.rotary,
            rotary_base=self.rotary_base,
            reach=self.reach,
        )

    def start(self, position: LogPosition) -> None:
        """Give the position the values to start from."""
        heads = position.num_heads
        values = {"power": torch.empty(heads).uniform_(1e-2, 2.0)} if self.kerple else {}
        for part, first, last in self.initial:
            values[part] = torch.logspace(math.log10(first), math.log10(last), heads)
        for part, value in values.items():
            getattr(position, f"raw_{part}").data.copy_(inverse_softplus(value))


ENCODINGS = {
    "none": Encoding(),
    "sinusoid": Encoding(sinusoid_scale=math.inf),
    "log-sinusoid": Encoding(sinusoid_scale=1.0),
    "rope": Encoding("log-rotary", rotary_scale=math.inf),
    "rope-yarn": Encoding("log-rotary", rotary_scale=math.inf, yarn=128),
    "alibi": Encoding("alibi", learnable=False),  # as in its paper
    "kerple": Encoding("log-bias", kerple=True),
    "log-bias": Encoding("log-bias"),
    "log-bias-rope": Encoding("log-bias-rope"),
    "log-invariant": Encoding("log-invariant", qk_norm=True),
    "log-rotary": Encoding("log-rotary"),
    "log-rotary-bias": Encoding("log-rotary-bias"),
}
ENCODINGS |= {f"{name}+gain": replace(e, query_gain=True) for name, e in ENCODINGS.items()}
OPTIONS = {
    "gain, gain=N": "a query gain on the scores, with n0 = N (512)",
    "logit-gain": "a query gain on the whole logit, bias included (slow: eager attention)",
    "shared": "one set of parameters for all layers",
    "bounded, bounded=F": "no head gives more than half of its weight to what is beyond F (1) training lengths",
    "fixed": "parameters of the position that keep their first values",
    "sink": "a key of each head without a position: what matches nothing may choose it, and reads zeros",
    "qk-norm": "normalised queries and keys (log-invariant has it)",
    "rotary=F": "rotate a share F of each head, by RoPE where nothing rotates yet",
    "base=B": "plane p of P turns by B^(-p / P) per position",
    "power=A, power=A:B, and so with rate, sharpness, alpha": "initial value, of the first and of the last head",
}
FLAGS: dict[str, dict[str, Any]] = {  # fields of Encoding that options without a value set
    "gain": dict(query_gain=True),
    "logit-gain": dict(query_gain=True, gain_on_bias=True),
    "shared": dict(shared=True),
    "fixed": dict(learnable=False),
    "qk-norm": dict(qk_norm=True),
    "sink": dict(sink=True),
}


def encoding(name: str, train_length: int) -> Encoding:
    """Return what a name such as ``log-bias+gain+power=0.5:4`` says: one of ENCODINGS, changed by OPTIONS.

    Raises ValueError for a name that says nothing, or what cannot be.
    """
    base, *options = name.split("+")
    if base not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(n for n in ENCODINGS if '+' not in n)}, got {base!r}")
    chosen = ENCODINGS[base]
    if chosen.yarn:
        chosen = replace(chosen, yarn=train_length)
    for option in options:
        key, _, value = option.partition("=")
        try:
            numbers = [float(x) for x in value.split(":")] if value else []
        except ValueError:
            numbers = []
        if option in FLAGS:
            chosen = replace(chosen, **FLAGS[option])
        elif option == "bounded" or (key == "bounded" and len(numbers) == 1 and numbers[0] > 0):
            chosen = replace(chosen, reach=train_length * (numbers or [1])[0])
        elif key == "gain" and len(numbers) == 1 and numbers[0] > 0:
            chosen = replace(chosen, query_gain=True, gain_length=numbers[0])
        elif key == "rotary" and len(numbers) == 1:
            chosen = replace(chosen, rotary=numbers[0])
        elif key == "base" and len(numbers) == 1 and numbers[0] > 1:
            chosen = replace(chosen, rotary_base=numbers[0])
        elif key in LEARNABLE_PARTS and len(numbers) in (1, 2) and min(numbers) > 0:
            chosen = replace(chosen, initial=(*chosen.initial, (key, numbers[0], numbers[-1])))
        else:
            raise ValueError(f"{option!r} does not apply in {name!r}; options are {', '.join(OPTIONS)}")
    parts = {*PRESET_PARTS[chosen.preset], *(["alpha"] if chosen.query_gain else [])}
    if missing := [part for part, *_ in chosen.initial if part not in parts]:
        raise ValueError(f"{name!r} has no {missing[0]} to initialise")
    if chosen.rotary_base is not None and chosen.rotary is None and "rotary" not in parts:
        raise ValueError(f"{name!r} rotates nothing: base goes with rotary=F, or a preset that rotates")
    if chosen.gain_on_bias and "power" not in parts:
        raise ValueError(f"{name!r} has no bias: there logit-gain is gain")
    if chosen.gain_on_bias and chosen.sink:
        raise ValueError(f"{name!r} has both logit-gain and sink, which do not go together")
    if chosen.reach and not {"power", "rate"} <= parts:
        raise ValueError(f"{name!r} has no power and rate to bound")
    if chosen.shared and not parts & set(LEARNABLE_PARTS):
        raise ValueError(f"{name!r} has no parameters to share")
    return chosen


def yarn(theta: Tensor, trained: int, length: int) -> tuple[Tensor, float]:
    """Return RoPE's angles per position for ``length``, and the factor on the scores, by YaRN (Peng et al., 2023).

    With s = length / trained, planes that turn less than once in `trained` positions turn s times more slowly, those
    that turn more than 32 times as before, the others something between; the scores grow by (1 + 0.1 ln s)^2.
    """
    s = max(1.0, length / trained)
    kept = ((trained * theta / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    return theta * (kept + (1 - kept) / s), (1 + 0.1 * math.log(s)) ** 2


class Attention(language_model.Attention):
    """Causal self-attention; the encoding decides what the logits know of distance."""

    theta: Tensor | None
    cache: logpe.KVCache | None = None  # of the tokens before those that come next, see Model.decoding

    def __init__(self, shape: Shape, encoding: Encoding, smeared_keys: bool = False) -> None:
        position = dict(preset=encoding.preset, **encoding.options)
        super().__init__(replace(shape, qk_norm=shape.qk_norm or encoding.qk_norm, sink=encoding.sink), position)
        self.smear = nn.Parameter(torch.zeros(shape.heads)) if smeared_keys else None
        self.encoding = encoding
        head_dim = shape.dim // shape.heads
        encoding.start(self.position)
        theta = None
        if encoding.rotary is not None and "rotary" not in self.position.parts:
            planes = int(head_dim * encoding.rotary) // 2
            if planes == 0:
                raise ValueError(f"rotary={encoding.rotary:g} of head_dim {head_dim} leaves no plane to rotate")
            theta = reference.inverse_frequencies(planes, self.position.rotary_base)
        self.register_buffer("theta", theta, persistent=False)

    def project(self, x: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, last or N, D), k and v (B, H, N, D).

        A smeared key is a mean of its own and of the token's before, by a share that each head learns (Olsson et al.,
        2022, "smeared keys"): then one layer can find what followed a token, for which else it takes two.
        """
        q, k, v = super().project(x, last)
        if self.smear is not None:
            before = F.pad(k, (0, 0, 1, 0))[:, :, :-1]
            k = torch.lerp(k, before, self.smear.sigmoid()[:, None, None].to(k.dtype))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output, shaped as q (B, H, last or N, D), of attention to k and v (B, H, N, D)."""
        if self.cache is not None:
            scale = self.values(self.cache.capacity)[1]
            sink = None if self.sink is None else self.sink(q, scale)
            return self.cache.attend(*(x.to(self.cache.k.dtype) for x in (q, k, v)), scale=scale, sink=sink)
        if self.encoding.gain_on_bias:
            parts = q.split(256, dim=2)  # queries at once: what is eager holds (B, H, 256, N)
            starts = itertools.accumulate((part.shape[2] for part in parts), initial=k.shape[2] - q.shape[2])
            return torch.cat([self.eager(part, k, v, n)[0] for part, n in zip(parts, starts, strict=False)], dim=2)
        values, scale = self.values(k.shape[2])
        sink = None if self.sink is None else self.sink(q, scale)
        return logpe.log_attention(q, k, v, values, is_causal=True, scale=scale, sink=sink)

    def new_cache(self, batch_size: int, capacity: int, **options: Any) -> logpe.KVCache:
        """Return a cache for texts of ``capacity`` bytes at the most; YaRN turns keys as if every text had so many.

        Raises ValueError for a gain on the whole logit.
        """
        if self.encoding.gain_on_bias:
            raise ValueError("a gain on the whole logit (logit-gain) has no kernel, and so it cannot use a cache")
        if self.smear is not None:
            raise ValueError("smeared keys need the token before, which a cache does not keep")
        heads, head_dim = self.heads, self.qkv.in_features // self.heads
        options["device"] = self.qkv.weight.device
        return logpe.KVCache(batch_size, heads, capacity, head_dim, self.values(capacity)[0], **options)

    def values(self, length: int) -> tuple[PositionValues, float]:
        """Return the position in a text of this length, and the scale of the scores."""
        values, scale = self.position(), (self.qkv.in_features // self.heads) ** -0.5
        if self.theta is not None:
            values = values._replace(theta=self.theta, rotary_scale=math.inf)
        if self.encoding.yarn is not None and values.theta is not None:
            theta, factor = yarn(values.theta, self.encoding.yarn, length)
            values, scale = values._replace(theta=theta), scale * factor
        return values, scale

    def eager(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return output, and weights float32 (B, H, Nq, N), of queries that stand at ``start`` and after it.

        The weights sum up to one: a sink takes its share of the output alone.
        """
        values, scale = self.values(k.shape[2])
        i = torch.arange(start, start + q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        bias = None
        if self.encoding.gain_on_bias:  # the bias once more, as often as the gain exceeds 1
            parts = (values.power, values.rate, values.alpha)
            power, rate, alpha = (x if x is None else x[:, None, None] for x in parts)
            assert power is not None
            assert alpha is not None
            gain = reference.query_gain(i, alpha, values.gain_length)
            bias = (gain - 1) * reference.distance_bias(reference.log_distance((i - j).abs(), rate), power)
        options = Options(**values._asdict(), query_start=start, window_right=0, scale=scale)
        out, lse, weights = reference.attention(q, k, v, options, attn_mask=bias, return_weights=True)
        if self.sink is not None:
            tokens = torch.arange(q.shape[2], device=q.device)
            out, _ = reference.add_sink(out, lse, self.sink(q, scale), options, tokens)
        return out, weights


class Model(LanguageModel):
    """The language model with any encoding. The same seed gives every encoding the same weights."""

    def __init__(self, shape: Shape, encoding: Encoding, seed: int, smeared_keys: bool = False) -> None:
        super().__init__(shape, {}, seed, lambda shape, _: Attention(shape, encoding, smeared_keys))
        if encoding.shared:
            for attention in self.attentions:
                attention.position = self.attentions[0].position
        scale = encoding.sinusoid_scale
        self.sinusoid = None if scale is None else logpe.LogSinusoid(shape.dim, scale)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return what enters the first block, (B, N, dim), from tokens int64 (B, N)."""
        x = super().embed(tokens)
        if self.sinusoid is None:
            return x
        positions = torch.arange(tokens.shape[1], device=x.device)
        if (cache := self.attentions[0].cache) is not None:
            positions = cache.lengths[:, None] + positions
        # As large against the embedding as in the first Transformer, whose embeddings have unit variance.
        return x + EMBEDDING_STD * self.sinusoid(positions).to(x)

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer, from the first."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    @contextmanager
    def decoding(self, batch_size: int, capacity: int, **options: Any) -> Iterator[None]:
        """Keep keys and values: within this context the model is called with the next tokens of its texts.

        Args:
            batch_size: texts.
            capacity: tokens of each, at the most.
            options: window and dtype of logpe.KVCache.

        Raises ValueError, see Attention.new_cache.
        """
        caches = [attention.new_cache(batch_size, capacity, **options) for attention in self.attentions]
        try:
            for attention, cache in zip(self.attentions, caches, strict=True):
                attention.cache = cache
            yield
        finally:
            for attention in self.attentions:
                attention.cache = None


def autocast(device: torch.device) -> torch.autocast:
    """Return autocast to bfloat16 on a GPU, and to nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def learned_positions(model: nn.Module) -> list[dict[str, list[float]]]:
    """Return power, rate, sharpness and alpha of every head, by layer; one entry where the layers share them."""
    modules = (module for module in model.modules() if isinstance(module, LogPosition))
    values = [{part: getattr(module, part) for part in LEARNABLE_PARTS} for module in modules]
    layers = [
        {part: [round(x, 5) for x in value.tolist()] for part, value in parts.items() if value is not None}
        for parts in values
    ]
    return [parts for parts in layers if parts]
