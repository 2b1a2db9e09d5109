"""Compile and time one configuration of one kernel, in a process that may fail: for :mod:`logpe.tuning.tune`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from logpe_kernels.options import LEARNABLE_PARTS, Options
from torch import Tensor

from logpe.clock import between_events
from logpe.position import PRESET_PARTS, LogPosition
from logpe.worker import Failed, Pool, Worker, one_line

if TYPE_CHECKING:  # imported where it is used: with it comes triton, which not every machine has
    from logpe_kernels.configs import Traits

LIMIT = 120.0  # seconds for one candidate, the start of a process included


@dataclasses.dataclass(frozen=True)
class Task:
    """One kernel on one shape. ``preset`` is one of PRESETS, with "+gain" behind it for a query gain."""

    kernel: str
    dtype: str
    head_dim: int
    preset: str
    causal: bool
    length: int
    batch: int
    heads: int
    kv_heads: int

    @property
    def position(self) -> dict[str, Any]:
        """The arguments of LogPosition."""
        name, _, gain = self.preset.partition("+")
        return dict(preset=name, query_gain=bool(gain))

    @property
    def parts(self) -> list[str]:
        """The parts of the position, as the files of configurations name them."""
        present = (*PRESET_PARTS[self.position["preset"]], *(["alpha"] if self.position["query_gain"] else []))
        return [part for part in LEARNABLE_PARTS if part in present and part != "rate"]

    @property
    def itemsize(self) -> int:
        """The size of an element in bytes."""
        return getattr(torch, self.dtype).itemsize

    def traits(self, device: torch.device) -> Traits:
        """Return the traits by which the task's configuration is chosen."""
        from logpe_kernels import configs

        return configs.traits(device, self.itemsize, self.head_dim, self.parts, self.causal, self.length)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.kernel} {self.dtype} D={self.head_dim} {self.preset} {mask} N={self.length}"


class Inputs(NamedTuple):
    """Arguments of the launchers.

    q, dout and out are (B, Hq, N, D), k and v (B, Hkv, N, D), lse (B, Hq, N); out and lse come from the forward pass.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    options: Options


def make_inputs(task: Task, device: torch.device) -> Inputs:
    """Return random inputs; on the meta device, tensors of the same shapes."""
    import logpe_kernels

    dtype = getattr(torch, task.dtype)
    q, k, v, dout = (
        torch.randn(task.batch, heads, task.length, task.head_dim, device=device).to(dtype)
        for heads in (task.heads, task.kv_heads, task.kv_heads, task.heads)
    )
    values = LogPosition(task.heads, task.head_dim, **task.position, learnable=False, device=device)()
    options = Options(**values._asdict(), scale=task.head_dim**-0.5, window_right=0 if task.causal else None)
    if device.type == "meta":
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    else:
        out, lse = logpe_kernels.attention(q, k, v, options)
    return Inputs(q, k, v, dout, out, lse, options)


def _forward(x: Inputs) -> dict[str, Tensor]:
    import logpe_kernels

    return dict(zip(("out", "lse"), logpe_kernels.attention(x.q, x.k, x.v, x.options), strict=True))


def _backward(x: Inputs) -> dict[str, Tensor]:
    import logpe_kernels

    gradients = logpe_kernels.attention_backward(x.dout, None, x.q, x.k, x.v, x.out, x.lse, x.options)
    names = ("dq", "dk", "dv", "dpower", "drate", "dsharpness", "dalpha")
    return {name: x for name, x in zip(names, gradients, strict=True) if x is not None}


class Kernel(NamedTuple):
    """Where a kernel is, what launches it, and what it keeps in registers.

    Attributes:
        places: the kernel's name in logpe_kernels, and the names of those that a configuration puts in its place.
        run: calls the launcher, and returns its results by name.
        resident: the side of the tile that stays while the loop streams the other.
        accumulators: how many tiles [resident, head_dim] are held at once.
        scores: how many tiles [resident, streamed] are held at once.
    """

    places: tuple[str, ...]
    run: Callable[[Inputs], dict[str, Tensor]]
    resident: str
    accumulators: int
    scores: int


KERNELS = {
    "forward": Kernel(("forward.forward_kernel", "hopper.specialized_kernel"), _forward, "BLOCK_M", 1, 1),
    "backward_dq": Kernel(("backward.dq_kernel",), _backward, "BLOCK_M", 1, 2),
    "backward_dkdv": Kernel(("backward.dkdv_kernel",), _backward, "BLOCK_N", 2, 2),
}


# ---- one candidate ---------------------------------------------------------------------------------------------------


class Resources(NamedTuple):
    """What a compiled kernel needs: registers and spilled registers of a thread, bytes of shared memory."""

    registers: int
    spills: int
    shared: int


class Comparison(NamedTuple):
    """Median milliseconds of a candidate and of the default, taken in turns."""

    milliseconds: float
    default: float

    @property
    def ratio(self) -> float:
        """The time of the candidate over that of the default: below 1, the candidate is faster."""
        return self.milliseconds / self.default


@dataclasses.dataclass
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self) -> Any:
        """Repeat the launch."""
        return self.kernel[self.grid](*self.args, **self.keywords)


class _Recorder:
    """What stands in for a kernel, and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Launch], dry: bool) -> None:
        self.kernel, self.launches, self.dry = kernel, launches, dry

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **keywords: Any) -> Any:
            self.launches.append(Launch(self.kernel, grid, args, keywords))
            return None if self.dry else self.launches[-1]()

        return launch


@contextlib.contextmanager
def recorded(dry: bool = False) -> Iterator[dict[str, list[Launch]]]:
    """Record the launches of each of KERNELS; with ``dry``, do not carry them out."""
    launches: dict[str, list[Launch]] = {name: [] for name in KERNELS}
    with contextlib.ExitStack() as stack:
        for name, kernel in KERNELS.items():
            for place in kernel.places:
                module_name, function = place.split(".")
                try:
                    module = importlib.import_module(f"logpe_kernels.{module_name}")
                except ImportError:  # a Triton without the experimental parts: candidates that need them fail
                    continue
                original = getattr(module, function)
                setattr(module, function, _Recorder(original, launches[name], dry))
                stack.callback(setattr, module, function, original)
        yield launches


def compile_candidate(task: Task, config: Any) -> Resources | str:
    """Compile one configuration for the current device and load it. Return what it needs, or why that fails."""
    from logpe_kernels import configs

    try:
        with configs.override(**{task.kernel: config}), recorded(dry=True) as launches:
            KERNELS[task.kernel].run(make_inputs(task, torch.device("meta")))
        needs = []
        for launch in launches[task.kernel]:
            compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.keywords)
            compiled._init_handles()  # loads it, as PyTorch's inductor does: raises where it does not fit
            needs.append((compiled.n_regs, compiled.n_spills, compiled.metadata.shared))
        return Resources(*map(max, zip(*needs, strict=True)))
    except Exception as error:
        return one_line(error)


def compare(task: Task, config: Any, default: Any, budget: float, device: torch.device) -> Comparison | str:
    """Run a configuration and the default on the same inputs. Return the times, or why the configuration is out.

    budget: milliseconds for the timing.
    """
    from logpe_kernels import configs

    inputs = _inputs(dataclasses.replace(task, kernel=""), device)
    results, launches = [], []  # type: list[dict[str, Tensor]], list[list[Launch]]
    with poisoned():
        for c in (default, config, config):
            with configs.override(**{task.kernel: c}), recorded() as recording:
                results.append(KERNELS[task.kernel].run(inputs))
            launches.append(recording[task.kernel])
    expected, actual, again = results
    if reason := difference(actual, expected, getattr(torch, task.dtype)):
        return f"wrong: {reason}"
    if not all(torch.equal(actual[name], again[name]) for name in actual):
        return "wrong: not the same result twice"
    default_milliseconds, milliseconds = take_turns(launches[:2], budget)
    return Comparison(milliseconds, default_milliseconds)


_inputs = functools.lru_cache(maxsize=1)(make_inputs)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN: what a kernel does not write shows, and is not what another kernel left there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """Return how two results differ by more than the rounding of another order of summation; None if they do not.

    They may differ by 4 eps of the largest value in half precision, where out is rounded, and so are the weights
    before they meet v; and by 256 eps in float32, where nothing is rounded but the sums over keys.
    """
    allowed = torch.finfo(dtype).eps * (256 if dtype == torch.float32 else 4)
    for name, x in expected.items():
        y = actual[name]
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return f"{name} is not finite where it should be, or the other way round"
        size = x[finite].abs().max().item() if finite.any() else 0.0
        error = (y[finite].double() - x[finite].double()).abs().max().item() if finite.any() else 0.0
        if error > allowed * size:
            return f"{name} differs by {error:.2g}, {allowed * size:.2g} allowed"
    return None


def take_turns(candidates: list[list[Launch]], budget: float) -> list[float]:
    """Return the median milliseconds of each candidate's launches.

    They take turns with a cold cache for ``budget`` milliseconds.
    """

    def run(launches: list[Launch]) -> None:
        for launch in launches:
            launch()

    def times(turns: int) -> list[float]:
        events = [[between_events(functools.partial(run, launches)) for launches in candidates] for _ in range(turns)]
        torch.cuda.synchronize()
        columns = zip(*events, strict=True)
        return [statistics.median(begin.elapsed_time(end) for begin, end in column) for column in columns]

    times(1)  # warms up
    once = sum(times(1))
    return times(min(200, max(5, int(budget / max(once, 1e-3)))))


# ---- processes -------------------------------------------------------------------------------------------------------


class OutOfTime(Exception):
    """The time that the command was given is over."""


class Gpu:
    """Compiles in several processes, and measures in one. Raises OutOfTime after ``end``, by time.monotonic()."""

    def __init__(self, device: torch.device | None, jobs: int, end: float) -> None:
        self.device, self.end = device, end
        self.bench, self.compilers = Worker(), Pool(jobs)

    def _call(self, worker: Worker, function: Callable[..., Any], *args: Any) -> Any:
        left = self.end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return worker.call(_on, self.device, function, *args, seconds=min(LIMIT, left))
        except Failed as error:
            if time.monotonic() >= self.end:
                raise OutOfTime from None
            return str(error)

    def compile(self, task: Task, candidates: list[Any]) -> list[Resources | str]:
        """Return what each candidate takes, or why there is no such kernel."""
        compiled = dict(
            self.compilers.each(lambda w, config: self._call(w, compile_candidate, task, config), candidates)
        )
        return [compiled[config] for config in candidates]

    def compare(self, task: Task, config: Any, default: Any, budget: float) -> Comparison | str:
        """Return the times, or why the configuration is out."""
        return self._call(self.bench, compare, task, config, default, budget, self.device)

    def close(self) -> None:
        """End all processes."""
        self.compilers.close()
        self.bench.close()


def _on(device: torch.device | None, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with a device as the current one."""
    if device is not None:
        torch.cuda.set_device(device)
    return function(*args)
