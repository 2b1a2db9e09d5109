"""The learnable parts of a log position: what to install, how it starts, how it is stored.

The formulas themselves live in :mod:`logpe.reference` (eager) and ``logpe_kernels.position`` (Triton).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logpe.reference import inverse_frequencies, log_map

#: The parts that each preset switches on. ``query_gain=True`` adds alpha to any of them.
PRESET_PARTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "log-bias": ("power", "rate"),
    "log-bias-rope": ("power", "rate", "rotary"),
    "log-invariant": ("power", "rate", "sharpness"),
    "log-rotary": ("rotary",),
    "log-rotary-bias": ("power", "rate", "rotary"),
}
PRESETS = tuple(PRESET_PARTS)
#: How a preset rotates, where its caller does not say: LogPosition's arguments.
ROTATION = dict(rotary_scale=1.0, rotary_fraction=1.0, rotary_base=10000.0)
PRESET_ROTATION = {"log-bias-rope": dict(rotary_scale=math.inf, rotary_fraction=0.5, rotary_base=30.0)}
#: Of the first and of the last head; in between, powers grow geometrically.
INITIAL_POWERS = {"log-bias-rope": (1.0, 4.0), "log-invariant": (2.0, 2.0)}
FULL_PRECISION = (torch.float32, torch.float64)
LEARNABLE_PARTS = ("power", "rate", "sharpness", "alpha")


class PositionValues(NamedTuple):
    """A log position as the attention backends take it. A part that is None is absent.

    power, rate, sharpness, alpha: float32 (num_heads,), positive. theta: float64 (planes,), the angle of
    each rotated plane per unit of f_c. rotary_scale: c of f_c, in tokens. gain_length: n0, in tokens.
    """

    power: Tensor | None = None
    rate: Tensor | None = None
    sharpness: Tensor | None = None
    alpha: Tensor | None = None
    theta: Tensor | None = None
    rotary_scale: float = 1.0
    gain_length: float = 512.0

    def unrotated(self) -> PositionValues:
        """The same without the rotation: for queries and keys that :func:`logpe.rotate` has turned."""
        return self._replace(theta=None)


def inverse_softplus(value: Tensor) -> Tensor:
    """The raw parameter whose softplus is ``value`` > 0."""
    return value + torch.log(-torch.expm1(-value))


def mapped(raw: Tensor | None) -> Tensor | None:
    """The positive value that a raw parameter stands for."""
    if raw is None:
        return None
    # A sharding wrapper may hand out a half-precision copy of the parameter.
    return F.softplus(raw if raw.dtype in FULL_PRECISION else raw.float())


class LogPosition(nn.Module):
    """The position of one attention layer (or of many that share it): per-head parameters and fixed angles.

    Args:
        num_heads: query heads.
        head_dim: size of one head; the rotation turns its first ``rotary_fraction``.
        preset: one of :data:`PRESETS`.

            * ``none``: no position at all; the fair baseline.
            * ``log-bias``: -power * log(1 + rate * d), KERPLE-log (Chi et al., NeurIPS 2022). rate ~ U(0, 1) as there,
              but power from 1/2 to 4 over the heads where KERPLE draws from U(0, 2): most heads look near, which
              predicts better at any length, and some look far.
            * ``log-bias-rope``: the bias, whose powers start from 1 to 4, so that no head spreads its attention
              over ever more keys; and ordinary rotary embedding on half of each head, with periods of 6 to at most
              190 tokens, which tell order, and which a model that was trained on windows as long has all seen. The
              default: the best one measured, in language models, translation and generation
              (bench/EXTRAPOLATION.md), where texts were as short as 16 tokens in training, too.
            * ``log-invariant``: the bias and a contrast sqrt(1 + sharpness * log(1 + rate * d)) on the score;
              starts at power 2, sharpness 2, rate 1/10, which is scale-invariant attention (Anson et al.,
              2025). Assumes logits of unit variance: normalise q and k.
            * ``log-rotary``: rotary embedding on f_c(n) = c log(1 + n/c) in place of n.
            * ``log-rotary-bias``: both.
        query_gain: multiply the scores of the query at n by 1 + alpha * log(1 + n / gain_length).
            alpha starts at 1 / log(1 + gain_length), so that the gain grows about as log n / log gain_length.
        learnable: True, False, or the names of the parts that are trained (of power, rate, sharpness, alpha).
        rotary_scale: c of f_c, in tokens: 1 is log(1 + n), ``math.inf`` is ordinary rotary embedding. By default 1;
            ``log-bias-rope``: ``math.inf``.
        rotary_fraction: share of head_dim that is rotated, in (0, 1]. By default 1; ``log-bias-rope``: 1/2.
        rotary_base: theta_t = rotary_base ** (-t / planes). By default 10000; ``log-bias-rope``: 30.
        gain_length: n0 of the query gain, in tokens.

    The parameters are stored unconstrained (``raw_power`` and so on, softplus maps them), stay float32 under
    ``.half()`` and ``.bfloat16()``, and carry ``_no_weight_decay = True``; see :func:`parameter_groups`.

    Raises:
        ValueError: an argument out of range, named; loading a state whose values are not positive and finite.
    """

    theta: Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        preset: str = "log-bias-rope",
        *,
        query_gain: bool = False,
        learnable: bool | Iterable[str] = True,
        rotary_scale: float | None = None,
        rotary_fraction: float | None = None,
        rotary_base: float | None = None,
        gain_length: float = 512.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if preset not in PRESET_PARTS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        given = dict(rotary_scale=rotary_scale, rotary_fraction=rotary_fraction, rotary_base=rotary_base)
        rotation = ROTATION | PRESET_ROTATION.get(preset, {}) | {n: x for n, x in given.items() if x is not None}
        for name, value in (*rotation.items(), ("gain_length", gain_length)):
            if name == "rotary_fraction":
                if not 0 < value <= 1:
                    raise ValueError(f"rotary_fraction must be in (0, 1], got {value}")
            elif not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if isinstance(learnable, bool):
            learned = set(LEARNABLE_PARTS) if learnable else set()
        else:
            learned = set(learnable)
            if unknown := learned - set(LEARNABLE_PARTS):
                raise ValueError(f"learnable must name parts of {LEARNABLE_PARTS}, got {sorted(unknown)}")

        self.num_heads = num_heads
        self.head_dim = head_dim
        self.preset = preset
        self.rotary_scale, self.rotary_fraction, self.rotary_base = map(float, rotation.values())
        self.gain_length = float(gain_length)
        self.parts = PRESET_PARTS[preset] + (("alpha",) if query_gain else ())
        for name in LEARNABLE_PARTS:
            raw = None
            if name in self.parts:
                raw = nn.Parameter(
                    torch.empty(num_heads, device=device, dtype=torch.float32), requires_grad=name in learned
                )
            self.register_parameter(f"raw_{name}", raw)
        # 2 * planes <= head_dim; a fraction that leaves no plane would be a silent "none".
        self.planes = int(head_dim * self.rotary_fraction) // 2 if "rotary" in self.parts else 0
        if "rotary" in self.parts and self.planes == 0:
            raise ValueError(f"rotary_fraction {self.rotary_fraction} of head_dim {head_dim} leaves no plane to rotate")
        theta = torch.empty(self.planes, device=device, dtype=torch.float64) if self.planes else None
        self.register_buffer("theta", theta, persistent=False)
        self._mark()
        self.reset_parameters()

    def _mark(self) -> None:  # again wherever new Parameter objects may have taken the place of the marked ones
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def reset_parameters(self) -> None:
        """Set the initial values of the preset (also called by deferred initialisation from the meta device)."""
        first, last = map(math.log2, INITIAL_POWERS.get(self.preset, (0.5, 4.0)))
        initial: dict[str, Callable[[], Tensor]] = {
            "power": lambda: torch.logspace(first, last, self.num_heads, base=2),
            # Bounded away from 0, where softplus leaves no gradient to speak of.
            "rate": lambda: torch.empty(self.num_heads).uniform_(1e-2, 1.0),
            "alpha": lambda: torch.full((self.num_heads,), 1.0 / math.log1p(self.gain_length)),
        }
        if self.preset == "log-invariant":
            initial["sharpness"] = lambda: torch.full((self.num_heads,), 2.0)
            initial["rate"] = lambda: torch.full((self.num_heads,), 0.1)
        for name in LEARNABLE_PARTS:
            raw = self._parameters[f"raw_{name}"]
            if raw is not None:
                with torch.no_grad():
                    raw.copy_(inverse_softplus(initial[name]()))
        if self.planes and self.theta is not None:
            self.theta = inverse_frequencies(self.planes, self.rotary_base, device=self.theta.device)

    def _value(self, name: str) -> Tensor | None:
        return mapped(self._parameters[f"raw_{name}"])

    @property
    def power(self) -> Tensor | None:
        """(num_heads,): the weight of a key falls as its distance to this power. None if absent."""
        return self._value("power")

    @property
    def rate(self) -> Tensor | None:
        """(num_heads,), per token: distances below 1 / rate count as near. None if absent."""
        return self._value("rate")

    @property
    def sharpness(self) -> Tensor | None:
        """(num_heads,): how fast the contrast of scores grows with the log distance. None if absent."""
        return self._value("sharpness")

    @property
    def alpha(self) -> Tensor | None:
        """(num_heads,): how fast the query gain grows with the log length. None if absent."""
        return self._value("alpha")

    def forward(self) -> PositionValues:
        """The mapped values, differentiable in the raw parameters."""
        raw = self._parameters
        return PositionValues(
            mapped(raw["raw_power"]),
            mapped(raw["raw_rate"]),
            mapped(raw["raw_sharpness"]),
            mapped(raw["raw_alpha"]),
            self._buffers["theta"],  # self.theta searches for it
            self.rotary_scale,
            self.gain_length,
        )

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, preset={self.preset!r}"
        if self.planes:
            text += f", rotary_scale={self.rotary_scale:g}, planes={self.planes}"
        if "alpha" in self.parts:
            text += f", query_gain=True, gain_length={self.gain_length:g}"
        return text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogPosition:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lost = moved.dtype in (torch.float16, torch.bfloat16) or tensor is self.theta
            return tensor.to(moved.device) if lost and moved.dtype != tensor.dtype else moved

        super()._apply(keep_precision, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in LEARNABLE_PARTS:
            raw = state_dict.get(f"{prefix}raw_{name}")
            if isinstance(raw, Tensor) and not raw.is_meta:
                value = F.softplus(raw.detach().float())
                bad = ~(torch.isfinite(value) & (value > 0))
                if bad.any():
                    head = int(bad.nonzero()[0])
                    raise ValueError(
                        f"{prefix}raw_{name} holds {raw.flatten()[head].item()} for head {head}, which maps to "
                        f"{name} = {value.flatten()[head].item()}; {name} must be positive and finite"
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mark()


class LogSinusoid(nn.Module):
    """Additive sinusoidal encoding on log positions, for models that add an encoding to the embedding.

    e(n)[2t] = sin(theta_t f_c(n)), e(n)[2t + 1] = cos(theta_t f_c(n)), theta_t = base ** (-2t / dim).

    Args:
        dim: size of the encoding, odd sizes included.
        scale: c of f_c(n) = c log(1 + n/c): 1 is log(1 + n), ``math.inf`` is the classic encoding.
        base: of the geometric frequencies.
    """

    def __init__(self, dim: int, scale: float = 1.0, base: float = 10000.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        for name, value in (("scale", scale), ("base", base)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.dim = dim
        self.scale = float(scale)
        self.base = float(base)

    def forward(
        self, positions: int | Tensor, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Encodings (..., dim) of ``positions``: a length (positions 0 to length - 1) or a tensor of them >= 0."""
        if not isinstance(positions, Tensor):
            if positions < 0:
                raise ValueError(f"positions must be a length of at least 0, got {positions}")
            positions = torch.arange(positions, device=device)
        theta = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim)
        angle = log_map(positions.double(), self.scale)[..., None] * theta  # (..., ceil(dim / 2))
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., : self.dim].to(dtype)


def position_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every position parameter of ``model``, once: for an optimiser's groups or a sharder's ignored_params."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, LogPosition):
            for parameter in module.parameters(recurse=False):
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: everything with ``weight_decay``, the position parameters without.

    Decay would pull a raw parameter to 0, which is softplus(0) = 0.69 and not "off".
    """
    positions = list(position_parameters(model))
    identities = {id(p) for p in positions}
    others = [p for p in model.parameters() if id(p) not in identities]
    return [{"params": others, "weight_decay": weight_decay}, {"params": positions, "weight_decay": 0.0}]
