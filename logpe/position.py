"""The module that owns a log position: its presets, its learnable parameters and their initial values.

The formulas themselves stand in :mod:`logpe.reference` (eager) and ``logpe_kernels.position`` (Triton).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from logpe_kernels.options import LEARNABLE_PARTS, NUM_POSITIONAL
from torch import Tensor, nn

from logpe import eager
from logpe.checks import check_dense, check_number, plain_bool, plain_float, plain_int, plain_value
from logpe.reference import PositionValues, device_of_angles, inverse_frequencies, log_map

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: The parts that each preset switches on. ``query_gain=True`` adds alpha to any of them.
PRESET_PARTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "alibi": ("power",),
    "log-bias": ("power", "rate"),
    "log-bias-rope": ("power", "rate", "rotary"),
    "log-invariant": ("power", "rate", "sharpness"),
    "log-rotary": ("rotary",),
    "log-rotary-bias": ("power", "rate", "rotary"),
}
PRESETS = tuple(PRESET_PARTS)
#: The arguments of LogPosition that shape the rotation, with their defaults, and the presets that have others.
ROTATION = dict(rotary_scale=1.0, rotary_fraction=1.0, rotary_base=10000.0)
PRESET_ROTATION = {"log-bias-rope": dict(rotary_scale=math.inf, rotary_fraction=0.5, rotary_base=30.0)}
#: Initial powers of the first and the last head; in between they grow geometrically.
INITIAL_POWERS = {"log-bias-rope": (1.0, 4.0), "log-invariant": (2.0, 2.0)}
FULL_PRECISION = (torch.float32, torch.float64)


def inverse_softplus(value: Tensor) -> Tensor:
    """Return the raw parameter whose softplus is ``value`` > 0."""
    return value + torch.log(-torch.expm1(-value))


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slopes of ALiBi (Press et al., 2022) for any number of heads.

    For a power of two they fall geometrically from 2^(-8 / num_heads) to 2^-8. For any other number, the slopes of the
    next lower power of two come first, and every second slope of the next higher one follows.
    """
    power_of_two = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power_of_two) for h in range(power_of_two)]
    between = [2.0 ** (-8 * (h + 0.5) / power_of_two) for h in range(power_of_two)]
    return slopes + between[: num_heads - power_of_two]


def mapped(raw: Tensor | None) -> Tensor | None:
    """Return the positive value that a raw parameter stands for, its softplus in full precision."""
    if raw is None:
        return None
    # A sharding wrapper may hand out a half-precision copy of the parameter.
    return F.softplus(raw if raw.dtype in FULL_PRECISION else raw.float())


class _AtLeast(torch.autograd.Function):
    """max(x, least), where an x below ``least`` still gets a gradient that would raise it, and so can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: Tensor) -> Tensor:
        ctx.save_for_backward(x < least)
        return torch.maximum(x, least)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (below,) = ctx.saved_tensors
        return grad.masked_fill(below & (grad > 0), 0), grad.masked_fill(~below, 0)


def _at_least(x: Tensor, least: Tensor) -> Tensor:
    """Return max(x, least), by :class:`_AtLeast` unless a tracer or a transform wants the plain derivative."""
    plain = eager.tracing() or eager.transforming() or eager.forward_mode()
    return torch.maximum(x, least) if plain else _AtLeast.apply(x, least)


def bounded(power: Tensor, rate: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return powers and rates with which at least half of a head's weight lies within ``reach`` tokens.

    Keys of equal scores have weights of (1 + rate d)^-power. Where the power is above 1 their sum over all distances
    converges, and the share beyond R is about (1 + rate R)^(1 - power).
    """
    rate = _at_least(rate, torch.full_like(rate, 1 / reach))
    return _at_least(power, 1 + math.log(2) / torch.log1p(rate * reach)), rate


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Raise RuntimeError. As ``__prepare_scriptable__`` of a module, this is what torch.jit.script calls first."""
    raise RuntimeError(f"torch.jit.script cannot compile {type(module).__name__}: use torch.compile or torch.export")


# --- options as plain values, which every file format can hold ------------------------------------------------------


def _plain_learnable(value: Any) -> bool | tuple[str, ...]:
    value = plain_value(value)
    if isinstance(value, bool):
        return value
    names = None if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if names is None or not all(name in LEARNABLE_PARTS for name in names):
        raise ValueError(
            f"learnable must be True, False, or name parts of {LEARNABLE_PARTS}, got {names if names else repr(value)}"
        )
    return tuple(str(name) for name in names)


def plain_options(**options: Any) -> dict[str, Any]:
    """Return options of a :class:`LogPosition` as bool, int, float, str and tuple, which JSON can hold.

    Raises TypeError or ValueError that names an option out of range. Options of any other name stay as they are.
    """
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("num_heads", "head_dim"):
            value = plain_int(name, value)
        elif name == "preset":
            if not isinstance(value, str) or value not in PRESET_PARTS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {value!r}")
            value = str(value)
        elif name == "query_gain":
            value = plain_bool(name, value)
        elif name == "learnable":
            value = _plain_learnable(value)
        elif name == "gain_length" or (name in (*ROTATION, "reach") and value is not None):
            value = plain_float(name, value)
            if name == "rotary_fraction":
                if not 0 < value <= 1:
                    raise ValueError(f"rotary_fraction must be in (0, 1], got {value}")
            elif not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
            elif name != "rotary_scale" and math.isinf(value):
                raise ValueError(f"{name} must be finite, got {value}")
        plain[name] = value
    return plain


class LogPosition(nn.Module):
    """The position of one attention layer, or of many that share it: parameters for each head, and fixed angles.

    Args:
        num_heads: query heads, Hq.
        head_dim: size of one head, D.
        preset: one of :data:`PRESETS`.

            * ``none``: no position at all; the fair baseline.
            * ``alibi``: -power * d, ALiBi (Press et al., 2022), to which ``log-bias`` tends as its rate falls. power
              starts as the paper's slopes, and ``learnable=False`` keeps them.
            * ``log-bias``: -power * log(1 + rate * d), KERPLE-log (Chi et al., NeurIPS 2022). rate ~ U(0.01, 1), nearly
              as there. power runs from 1/2 to 4 over the heads, where KERPLE draws it from U(0, 2). Most heads then
              look near, which predicts better at any length, and some look far.
            * ``log-bias-rope``: the bias and a rotation. The powers start from 1 to 4, so that at first no head spreads
              its attention over ever more keys (see ``reach``). Half of each head has ordinary rotary embedding, which
              tells order. Its periods are 6 to at most 190 tokens, so that training windows of that length show all of
              them. The default: the best preset measured in language models, translation and generation
              (bench/results/extrapolation.md), also where training texts were as short as 16 tokens.
            * ``log-invariant``: the bias, and a contrast sqrt(1 + sharpness * log(1 + rate * d)) on the score. It
              starts at power 2, sharpness 2, rate 1/10, which is scale-invariant attention (Anson et al., 2025).
              That assumes logits of unit variance: normalise q and k.
            * ``log-rotary``: rotary embedding on f_c(n) = c log(1 + n/c) in place of n.
            * ``log-rotary-bias``: the bias of ``log-bias`` and the rotation of ``log-rotary``.
        query_gain: multiply the scores of the query at n by 1 + alpha * log(1 + n / gain_length).
            alpha starts at 1 / log(1 + gain_length), so that the gain grows about as log n / log gain_length.
        learnable: True, False, or the names of the parts to train, of power, rate, sharpness and alpha.
        rotary_scale: c of f_c, in tokens: 1 gives log(1 + n), and ``math.inf`` ordinary rotary embedding. 1 by
            default; ``math.inf`` for ``log-bias-rope``.
        rotary_fraction: share of head_dim to rotate, in (0, 1], from its first dim on. 1 by default; 1/2 for
            ``log-bias-rope``.
        rotary_base: theta_t = rotary_base ** (-t / planes). 10000 by default; 30 for ``log-bias-rope``.
        gain_length: n0 of the query gain, in tokens. From a length T to a longer one, L, the gain grows at most
            log(1 + L / n0) / log(1 + T / n0) times, however large alpha becomes. Choose an n0 well below the training
            length T: far above it, that is nearly L / T, and scores in long texts become too sharp.
        reach: the length of the training texts, in tokens, or None. With it, at least half of a head's weight lies
            within that many tokens, where scores are equal: powers and rates that training would take further stay at
            this bound for as long as it pulls that way. Without it, heads that nothing held back in training may spread
            over ever more keys in longer texts. They find single tokens from further away, and predict worse
            (bench/results/far-context.md).

    The parameters are stored unconstrained, as ``raw_power`` and so on, and softplus maps them. They stay float32
    under ``.half()`` and ``.bfloat16()``, and carry ``_no_weight_decay = True``; see :func:`parameter_groups`.

    The angles ``theta`` are no part of the state. They follow from the configuration, and lie on the device of the
    parameters, however these came there (``to_empty``, a loader that assigns, a sharder).

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or a state to load has values that
            are not positive and finite. The message names it.
    """

    raw_power: nn.Parameter | None
    raw_rate: nn.Parameter | None
    raw_sharpness: nn.Parameter | None
    raw_alpha: nn.Parameter | None
    # Also of modules that were pickled before there were these:
    head_mesh: DeviceMesh | None = None
    reach: float | None = None

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
        reach: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        options = plain_options(
            num_heads=num_heads,
            head_dim=head_dim,
            preset=preset,
            query_gain=query_gain,
            learnable=learnable,
            rotary_scale=rotary_scale,
            rotary_fraction=rotary_fraction,
            rotary_base=rotary_base,
            gain_length=gain_length,
            reach=reach,
        )
        self.num_heads: int = options["num_heads"]
        self.head_dim: int = options["head_dim"]
        self.preset: str = options["preset"]
        given = {name: options[name] for name in ROTATION if options[name] is not None}
        rotation = ROTATION | PRESET_ROTATION.get(self.preset, {}) | given
        self.rotary_scale, self.rotary_fraction, self.rotary_base = rotation.values()
        self.gain_length: float = options["gain_length"]
        self.reach = options["reach"]
        self.parts = PRESET_PARTS[self.preset] + (("alpha",) if options["query_gain"] else ())
        if self.reach is not None and not {"power", "rate"} <= {*self.parts}:
            raise ValueError(f"reach must be None for preset {self.preset!r}, which has no power and rate to bound")
        learned = options["learnable"]
        for name in LEARNABLE_PARTS:
            raw = None
            if name in self.parts:
                requires_grad = learned if isinstance(learned, bool) else name in learned
                values = torch.empty(self.num_heads, device=device, dtype=torch.float32)
                raw = nn.Parameter(values, requires_grad=requires_grad)
            self.register_parameter(f"raw_{name}", raw)
        # 2 * planes <= head_dim. A fraction that leaves no plane would silently mean no rotation.
        self.planes = int(self.head_dim * self.rotary_fraction) // 2 if "rotary" in self.parts else 0
        if "rotary" in self.parts and self.planes == 0:
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} leaves no plane to rotate"
            )
        self._theta = self._angles(device_of_angles(torch.empty(0, device=device).device))
        self._mark()
        self.reset_parameters()

    __prepare_scriptable__ = refuse_scripting

    def _mark(self) -> None:
        """Keep weight decay off all parameters: again wherever new objects may have replaced the marked ones."""
        for parameter in self.parameters():  # those of parametrizations included
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_theta" not in state:  # pickled when the angles were a buffer
            self._theta = self._buffers.pop("theta", None)
            self._non_persistent_buffers_set.discard("theta")
        self._mark()

    def reset_parameters(self) -> None:
        """Set the initial values of the preset. Deferred initialisation from the meta device calls this, too.

        One seed gives the same values under any default device and dtype.
        """
        like: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
        first, last = map(math.log2, INITIAL_POWERS.get(self.preset, (0.5, 4.0)))
        initial: dict[str, Callable[[], Tensor]] = {
            "power": lambda: torch.logspace(first, last, self.num_heads, base=2, **like),
            # Bounded away from 0, where softplus has almost no gradient.
            "rate": lambda: torch.empty(self.num_heads, **like).uniform_(1e-2, 1.0),
            "alpha": lambda: torch.full((self.num_heads,), 1.0 / math.log1p(self.gain_length), **like),
        }
        if self.preset == "alibi":
            initial["power"] = lambda: torch.tensor(alibi_slopes(self.num_heads), **like)
        if self.preset == "log-invariant":
            initial["sharpness"] = lambda: torch.full((self.num_heads,), 2.0, **like)
            initial["rate"] = lambda: torch.full((self.num_heads,), 0.1, **like)
        for name in LEARNABLE_PARTS:
            raw = getattr(self, f"raw_{name}")
            if raw is None:
                continue
            if not isinstance(raw, nn.Parameter):
                raise RuntimeError(f"raw_{name} cannot be reset: it is computed from another parameter")
            values = inverse_softplus(initial[name]())
            if hasattr(raw, "device_mesh"):  # sharded already: every rank gets the values that rank 0 draws
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(raw, DTensor)
                values = distribute_tensor(values, raw.device_mesh, raw.placements)
            with torch.no_grad():
                raw.copy_(values)

    # --- angles

    def _angles(self, device: torch.device) -> Tensor | None:
        """Return new angles on ``device``, never as an inference tensor, which autograd could not save later."""
        if not self.planes:
            return None
        if torch.compiler.is_compiling():
            return inverse_frequencies(self.planes, self.rotary_base, device)
        with torch.inference_mode(False):
            return inverse_frequencies(self.planes, self.rotary_base, device)

    def _angles_on(self, device: torch.device) -> Tensor | None:
        """Return the angles for tokens on ``device``: new ones if the parameters were moved without ``_apply``."""
        device = device_of_angles(device)
        if self._theta is None or self._theta.device == device:
            return self._theta
        theta = self._angles(device)
        if not (
            type(theta) is not Tensor  # a fake tensor
            or torch.compiler.is_compiling()
            or eager.transforming()
            or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        ):
            self._theta = theta
        return theta

    @property
    def theta(self) -> Tensor | None:
        """The angle of each rotated plane per unit of f_c, float64 (planes,). None if absent."""
        return self().theta

    # --- heads that lie across processes

    @property
    def local_heads(self) -> int:
        """The number of heads whose values this process gets: num_heads, or its share of them."""
        return self.num_heads if self.head_mesh is None else self.num_heads // self.head_mesh.size()

    def shard_heads(self, mesh: DeviceMesh, source: int | None = 0) -> None:
        """Share out the heads among the ranks of ``mesh``, as :class:`logpe.HeadParallel` does.

        Args:
            source: the rank of the mesh whose values count. None: every rank has them already.

        Raises:
            ValueError: the ranks do not divide num_heads, or the heads are shared out in another way.
        """
        from torch.distributed.tensor import Shard

        from logpe.tensor_parallel import check_heads, distribute

        if self.head_mesh is not None:
            if self.head_mesh != mesh:
                raise ValueError("the heads of a LogPosition must be shared out once, got another mesh for them")
            return  # many layers may share it
        check_heads(mesh, num_heads=self.num_heads)
        distribute(self, {f"raw_{name}": Shard(0) for name in LEARNABLE_PARTS}, mesh, source)
        self.head_mesh = mesh
        self._mark()

    # --- values

    @property
    def power(self) -> Tensor | None:
        """The power of the distance with which a key's weight falls, (num_heads,). None if absent."""
        return self._power_and_rate(self.raw_power, self.raw_rate)[0]

    @property
    def rate(self) -> Tensor | None:
        """The rate per token, (num_heads,): distances below 1 / rate count as near. None if absent."""
        return self._power_and_rate(self.raw_power, self.raw_rate)[1]

    @property
    def sharpness(self) -> Tensor | None:
        """The growth of the contrast of scores with the log distance, (num_heads,). None if absent."""
        return mapped(self.raw_sharpness)

    @property
    def alpha(self) -> Tensor | None:
        """The growth of the query gain with the log length, (num_heads,). None if absent."""
        return mapped(self.raw_alpha)

    def forward(self, device: torch.device | None = None) -> PositionValues:
        """Return the mapped values, differentiable in the raw parameters: those of this rank's heads.

        Args:
            device: where theta is wanted; by default the device of the parameters.

        Returns:
            power, rate, sharpness and alpha, float32 (heads of this rank,), theta, float64 (planes,), and two floats.
            None for parts that the preset lacks.
        """
        raw = self._parameters
        try:  # faster than the attributes
            power, rate, sharpness, alpha = raw["raw_power"], raw["raw_rate"], raw["raw_sharpness"], raw["raw_alpha"]
        except KeyError:  # parametrizations, pruning, sharders and DataParallel keep them elsewhere
            power, rate, sharpness, alpha = self.raw_power, self.raw_rate, self.raw_sharpness, self.raw_alpha
        if self.head_mesh is not None:
            power, rate, sharpness, alpha = (
                None if raw is None else raw.to_local()  # type: ignore[attr-defined]
                for raw in (power, rate, sharpness, alpha)
            )
        theta = self._theta
        if theta is not None:
            if device is None:
                device = next((x.device for x in (power, rate, sharpness, alpha) if x is not None), theta.device)
            if theta.device != device:
                theta = self._angles_on(device)
        p, r = self._power_and_rate(power, rate)
        return PositionValues(p, r, mapped(sharpness), mapped(alpha), theta, self.rotary_scale, self.gain_length)

    def _power_and_rate(self, raw_power: Tensor | None, raw_rate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        power, rate = mapped(raw_power), mapped(raw_rate)
        if self.reach is None or power is None or rate is None:
            return power, rate
        return bounded(power, rate, self.reach)

    def extra_repr(self) -> str:
        """Return the settings, for print(model)."""
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, preset={self.preset!r}"
        if self.planes:
            text += f", rotary_scale={self.rotary_scale:g}, planes={self.planes}"
        if "alpha" in self.parts:
            text += f", query_gain=True, gain_length={self.gain_length:g}"
        if self.reach is not None:
            text += f", reach={self.reach:g}"
        return text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogPosition:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lost = moved.dtype in (torch.float16, torch.bfloat16) and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if lost else moved

        super()._apply(keep_precision, recurse)
        if self._theta is not None:  # fn of an empty tensor shows the device; on meta there is nothing to move
            device = "cpu" if self._theta.is_meta else self._theta.device
            self._theta = self._angles_on(fn(torch.empty(0, device=device)).device)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in LEARNABLE_PARTS:
            raw = state_dict.get(f"{prefix}raw_{name}")
            # Assigned, a half-precision parameter would stay one.
            if isinstance(raw, Tensor) and raw.dtype in (torch.float16, torch.bfloat16):
                state_dict[f"{prefix}raw_{name}"] = raw = raw.detach().float()
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


#: What takes a position takes one of these; None is plain attention.
Position = LogPosition | PositionValues | None
_NO_POSITION = PositionValues()


def values_of(position: Position, q: Tensor) -> PositionValues:
    """Return the values of a position for q as the kernels read them: contiguous tensors and plain numbers."""
    if position is None:
        return _NO_POSITION
    if isinstance(position, LogPosition):
        return position(q.device)
    if isinstance(position, nn.Module):  # a LogPosition inside of FSDP, torch.compile, or an adapter of PEFT
        position = position(q.device)
    if not isinstance(position, PositionValues):
        raise TypeError(f"position must be a LogPosition, PositionValues or None, got {type(position).__name__}")
    tensors = [x for x in position[:NUM_POSITIONAL] if x is not None]
    if all(map(_ready, tensors)) and type(position.rotary_scale) is type(position.gain_length) is float:
        return position
    ready: dict[str, Any] = {}
    x: Any
    for name, x in zip(position._fields, position, strict=True):
        if name in ("rotary_scale", "gain_length"):
            ready[name] = check_number(f"position.{name}", x)
        elif x is not None:
            check_dense(f"position.{name}", x)
            ready[name] = (x if torch.compiler.is_compiling() else x.resolve_neg()).contiguous()
    return PositionValues(**ready)


def _ready(x: Any) -> bool:
    """Whether the kernels can read ``x`` as it lies in memory."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_contiguous():
        return False
    return torch.compiler.is_compiling() or not x.is_neg()  # a graph has no negative views


class LogSinusoid(nn.Module):
    """Additive sinusoidal encoding on log positions, for models that add an encoding to the embedding.

    e(n)[2t] = sin(theta_t f_c(n)), e(n)[2t + 1] = cos(theta_t f_c(n)), theta_t = base ** (-2t / dim).

    Args:
        dim: size of the encoding, which may be odd.
        scale: c of f_c(n) = c log(1 + n/c): 1 gives log(1 + n), ``math.inf`` the classic encoding.
        base: base of the geometric frequencies.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, named.
    """

    def __init__(self, dim: int, scale: float = 1.0, base: float = 10000.0) -> None:
        super().__init__()
        self.dim = plain_int("dim", dim)
        self.scale = plain_float("scale", scale)
        self.base = plain_float("base", base)
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0 < self.base < math.inf:
            raise ValueError(f"base must be positive and finite, got {self.base}")

    __prepare_scriptable__ = refuse_scripting

    def forward(
        self, positions: int | Tensor, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the encodings (..., dim) of positions.

        Args:
            positions: a tensor (...) of positions >= 0, or a length, for the positions 0 to length - 1.
            device: where the encodings of a length are wanted.
            dtype: dtype of the encodings.

        Raises:
            TypeError: positions is neither an integer nor a tensor.
            ValueError: a negative length.
            RuntimeError: ``torch.jit.trace`` is tracing a length.
        """
        if not isinstance(positions, Tensor):
            if isinstance(positions, bool) or not isinstance(positions, numbers.Integral | torch.SymInt):
                raise TypeError(f"positions must be a length or a tensor of positions, got {positions!r}")
            if positions < 0:
                raise ValueError(f"positions must be a length of at least 0, got {positions}")
            positions = torch.arange(positions, device=device)
        elif positions.dim() == 0 and eager.tracing():
            raise RuntimeError(
                "positions must be a tensor of at least one dimension under torch.jit.trace, which makes tensors of "
                "lengths: pass torch.arange(length), or use torch.export or torch.compile"
            )
        where = positions.device
        positions = positions.to(device_of_angles(where))
        theta = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim)
        angle = log_map(positions.double(), self.scale)[..., None] * theta  # (..., ceil(dim / 2))
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., : self.dim].to(dtype).to(where)


def position_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every position parameter of ``model`` once, for an optimiser's groups or a sharder's ignored_params."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, LogPosition):
            for parameter in module.parameters():  # also those that parametrizations keep in children
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimiser groups: the other parameters with ``weight_decay``, the position parameters without.

    Decay would pull a raw parameter to 0, and softplus(0) is 0.69, not "off".

    Raises ValueError if a sharder has flattened position parameters together with others.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LogPosition) or next(module.parameters(), None) is not None:
            continue
        if set(module.parts) & set(LEARNABLE_PARTS):
            raise ValueError(
                f"the position parameters of {name or 'model'} are flattened together with others, which decay: shard "
                "with use_orig_params=True, or with ignored_states=position_parameters(model)"
            )
    positions = list(position_parameters(model))
    identities = {id(p) for p in positions}
    others = [p for p in model.parameters() if id(p) not in identities]
    return [{"params": others, "weight_decay": weight_decay}, {"params": positions, "weight_decay": 0.0}]
