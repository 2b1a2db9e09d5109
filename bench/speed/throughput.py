"""How fast attention with a log position is, and how much memory it takes, beside its alternatives.

Self-attention on random inputs. Every point (method, direction, size) is on the disk as soon as it is measured.
Ctrl-C, or the end of ``--minutes``, loses nothing, and the same command resumes from there. Status 1: nothing could
be measured.

    python -m bench throughput
    python -m bench throughput --lengths 512 2048 --methods log-bias sdpa --minutes 5
    python -m bench throughput --out bench/results       # the record that is kept in this repository
    python -m bench throughput --report                  # measure nothing: table and picture of the last run again

The methods:

* ``log-bias``: log_attention with the learned bias, and the gradients of its parameters. ``log-bias-frozen``: with a
  constant bias. ``log-bias-rope``, ``log-invariant``, ``log-rotary-bias``: with other presets. ``none``: with no
  position. All run the Triton kernels on a GPU, and the blocked backend on the CPU.
* ``flex``: compiled flex_attention with the bias as a score_mod, whose parameters are constants. ``flex-learned``: with
  the gradients of these parameters. The block mask is made beforehand, and not timed.
* ``sdpa-flash``, ``sdpa-cudnn`` (``sdpa`` on the CPU): F.scaled_dot_product_attention without a bias, by one backend.
* ``sdpa-dense``: F.scaled_dot_product_attention with the bias as an N x N tensor (on a GPU by the efficient backend).
  The tensor is made beforehand and not timed, and gets no gradient. The time includes repeating grouped heads.
* ``eager``: the definition, one tensor operation after the other, with the gradients of log-bias.

The directions: ``forward`` runs without gradients. ``backward`` is the time of torch.autograd.grad after a forward
pass that is not timed. ``both`` is a forward and a backward pass together. Memory is the peak beyond q, k, v and the
gradient of out; for ``backward`` it includes what the forward pass kept.

On a GPU, CUDA events measure the time of the device. Before each repeat the L2 cache is cleared, and the device waits
while the host runs ahead: the host's time is the subject of host_overhead. One process measures all points. If a point
brings it down, the row says so, and another process goes on. Kernels are compiled beforehand, by several processes at
once. On the CPU each point has a process of its own, and so its own peak memory. Times on a busy CPU say little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import logpe
from bench import command, plots
from bench.speed import runner
from bench.speed.runner import Row, Rows
from logpe import clock, reference
from logpe.clock import Repeats
from logpe.worker import Failed, Pool, Worker, one_line

DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}  # and what they are called
OURS = "log-bias"  # what the others are compared with
GIB = 2**30


@dataclass(frozen=True)
class Case(runner.Point):
    """One point: a method in one direction, on q (B, Hq, N, D), k and v (B, Hkv, N, D)."""

    direction: str
    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def flops(self) -> float:
        """The operations, as usually counted: 4 N^2 D per head forward, 2.5 times that backward, half if causal."""
        products = {"forward": 4.0, "backward": 10.0, "both": 14.0}[self.direction]
        return products * self.length**2 * self.head_dim * self.heads * self.batch * (0.5 if self.causal else 1.0)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the method, the direction and, on a GPU, the batch. Causal and many heads come first."""
        return self.head_dim, not self.causal, 1 if self.on_gpu else self.batch, -self.heads, -self.kv_heads

    @property
    def title(self) -> str:
        """The setting in words."""
        heads = f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads} heads on {self.kv_heads}"
        batch = "" if self.on_gpu or self.batch == 1 else f", batch {self.batch}"
        return f"D = {self.head_dim}, {'causal' if self.causal else 'full'}, {heads}{batch}"

    def __str__(self) -> str:
        return f"{self.method} {self.direction} {self.length} D{self.head_dim}"


REPEATS = {
    "cpu": Repeats(seconds=5, at_least=5, at_most=50, longest=60),
    "cuda": Repeats(seconds=0.25, at_least=10, at_most=100, longest=5, warm_up=0.02),
}
LIMIT = {"cpu": 3600.0, "cuda": 180.0}  # seconds that a point may take, compilation included


# --- the methods: each prepares what is not timed, and returns what is -----------------------------------------------


@dataclass
class Inputs:
    """What the methods share: q (B, Hq, N, D), k and v (B, Hkv, N, D), and the gradient of out."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def position(self, preset: str = "log-bias", learnable: bool = True) -> logpe.LogPosition:
        """Return a position with the same values for every method."""
        torch.manual_seed(1)
        size = self.case.heads, self.case.head_dim
        return logpe.LogPosition(*size, preset, learnable=learnable, device=self.case.device)

    def power_and_rate(self) -> tuple[Tensor, Tensor]:
        """Return those of log-bias as constants, float32 (Hq,)."""
        position = self.position()
        power, rate = position.power, position.rate
        assert power is not None
        assert rate is not None
        return power.detach(), rate.detach()

    def dense_bias(self) -> Tensor:
        """Return the bias (1, Hq, N, N) in the dtype of q, -inf above the diagonal when causal."""
        power, rate = self.power_and_rate()
        n = torch.arange(self.q.shape[2], device=self.q.device)
        bias = torch.empty(1, len(power), len(n), len(n), dtype=self.q.dtype, device=self.q.device)
        for h in range(len(power)):  # one head at a time: only the bias itself is large
            distance = (n[:, None] - n).to(torch.float32)
            l = reference.log_distance(distance.abs(), rate[h])  # noqa: E741
            bias[0, h] = reference.distance_bias(l, power[h])
            if self.case.causal:
                bias[0, h].masked_fill_(distance < 0, -torch.inf)
        return bias


class Attention(NamedTuple):
    """What a method prepares: ``run``, which is timed, and ``parameters`` that get gradients beside q, k and v."""

    run: Callable[[], Tensor]
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Method:
    """A method, by what prepares it.

    Attributes:
        squares: N x N matrices in float32 that it holds at once for each head, forward and with backward.
        compiled: "once" or "for each length" where that takes a while, and leaves the result in a cache on the disk.
    """

    prepare: Callable[[Inputs], Attention]
    squares: tuple[int, int] = (0, 0)
    devices: tuple[str, ...] = ("cuda", "cpu")
    cpu_backward: bool = True
    compiled: str | None = None


def _log_attention(x: Inputs, preset: str, learnable: bool = True, backend: str = "auto") -> Attention:
    position = x.position(preset, learnable)

    def run() -> Tensor:
        return logpe.log_attention(x.q, x.k, x.v, position, is_causal=x.case.causal, backend=backend)

    return Attention(run, [p for p in position.parameters() if p.requires_grad])


def _flex_attention(x: Inputs, learned: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    power, rate = (p.requires_grad_(learned and x.q.requires_grad) for p in x.power_and_rate())

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - power[h] * torch.log(1 + rate[h] * (i - j).abs())  # log1p compiles to something slower

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    length = x.case.length
    mask = create_block_mask(causal, None, None, length, length, device=x.case.device) if x.case.causal else None
    # One compilation to a length, as fast as it can be; without the reset the ninth falls back to eager attention.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = x.case.kv_heads != x.case.heads

    def run() -> Tensor:
        return compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=mask, enable_gqa=grouped)

    return Attention(run, (power, rate) if learned else ())


def _sdpa(x: Inputs, backend: str | None = None, bias: Tensor | None = None) -> Attention:
    """Attend with one backend of torch, and fail where it cannot; None: with the one that torch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pinned = None if backend is None else getattr(SDPBackend, backend)
    repeats = x.case.heads // x.case.kv_heads if bias is not None else 1

    def run() -> Tensor:
        k, v = x.k, x.v
        if repeats > 1:  # the efficient backend takes no groups
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        with contextlib.nullcontext() if pinned is None else sdpa_kernel(pinned):
            return F.scaled_dot_product_attention(
                *(x.q, k, v),
                attn_mask=bias,
                is_causal=x.case.causal and bias is None,
                enable_gqa=k.shape[1] != x.case.heads,
            )

    return Attention(run)


def _sdpa_dense(x: Inputs) -> Attention:
    return _sdpa(x, "EFFICIENT_ATTENTION" if x.q.is_cuda else None, x.dense_bias())


def _ours(preset: str, **options: Any) -> Method:
    return Method(lambda x: _log_attention(x, preset, **options), compiled="once")


METHODS: dict[str, Method] = {  # the most telling first
    "log-bias": _ours("log-bias"),
    "log-bias-rope": _ours("log-bias-rope"),
    "none": _ours("none"),
    "flex": Method(lambda x: _flex_attention(x, learned=False), cpu_backward=False, compiled="for each length"),
    "sdpa-cudnn": Method(lambda x: _sdpa(x, "CUDNN_ATTENTION"), devices=("cuda",)),
    "sdpa-flash": Method(lambda x: _sdpa(x, "FLASH_ATTENTION"), devices=("cuda",)),
    "sdpa": Method(_sdpa, devices=("cpu",)),
    "flex-learned": Method(lambda x: _flex_attention(x, learned=True), devices=("cuda",), compiled="for each length"),
    "log-rotary-bias": _ours("log-rotary-bias"),
    "log-invariant": _ours("log-invariant"),
    "log-bias-frozen": _ours("log-bias", learnable=False),
    "sdpa-dense": Method(_sdpa_dense, squares=(1, 2)),
    "eager": Method(lambda x: _log_attention(x, "log-bias", backend="reference"), squares=(5, 6)),
}


# --- one point, in a process that may die of it ----------------------------------------------------------------------


class Prepared(NamedTuple):
    """What the directions of a point share. ``before`` is how many bytes were in use before the method took any."""

    inputs: Inputs
    attention: Attention
    before: int


_prepared: dict[Case, Prepared] = {}  # the last one


def make_inputs(case: Case, learn: bool) -> Inputs:
    """Return the same random inputs for every method."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    q, k, v = (
        torch.randn(case.batch, heads, case.length, case.head_dim, dtype=dtype, device=device, requires_grad=learn)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    return Inputs(case, q, k, v, torch.randn_like(q))


def prepare(case: Case) -> Prepared:
    """Return what a point needs, kept until another point, or the other mode (with gradients or without), comes."""
    learn = case.direction != "forward"
    key = replace(case, direction="both" if learn else "forward")
    if key not in _prepared:
        forget()
        inputs = make_inputs(case, learn)
        before = _used(case)
        _prepared[key] = Prepared(inputs, METHODS[case.method].prepare(inputs), before)
    return _prepared[key]


def forget() -> None:
    """Free what was prepared."""
    _prepared.clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def make_step(case: Case, prepared: Prepared) -> Callable[[], Callable[[], object]]:
    """Return what does all that is not timed, and returns what is."""
    inputs, attention, _ = prepared
    leaves = [inputs.q, inputs.k, inputs.v, *attention.parameters]

    def forward() -> None:
        with torch.no_grad():
            attention.run()

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, leaves, inputs.dout)

    def both() -> None:
        backward(attention.run())

    if case.direction == "backward":
        return lambda: functools.partial(backward, attention.run())
    return lambda: forward if case.direction == "forward" else both


def measure(case: Case, timed: bool = True) -> Row:
    """Return times in ms and peak memory in bytes, or under "missing" why there are none.

    Not ``timed``, it is only compiled, and the answer is empty. Raises if the device can no longer be used.
    """
    try:
        with torch.cuda.device(case.device) if case.on_gpu else contextlib.nullcontext():
            return _measure(case, timed)
    except Exception as error:
        row = dict(missing=one_line(error))
    forget()
    if case.on_gpu:
        torch.cuda.synchronize(case.device)
    return row


def _measure(case: Case, timed: bool) -> Row:
    if not case.on_gpu:  # loads libraries, starts threads
        small = replace(case, length=128)
        make_step(small, prepare(small))()()
    elif timed:
        clock.l2_buffer(torch.cuda.current_device())  # before memory is counted
    prepared = prepare(case)
    step = make_step(case, prepared)
    step()()  # compiles, where anything is compiled
    if not timed:
        forget()
        return {}
    _forget_peak(case)
    seconds = REPEATS["cuda" if case.on_gpu else "cpu"].take(lambda: clock.time_once(step(), case.on_gpu))
    highest = _peak(case)
    memory = max(0, highest - prepared.before) if highest else None
    return clock.quantiles([1e3 * time for time in seconds]) | dict(memory=memory)


# Memory in bytes: of torch's allocator on a GPU, else of the process; 0 where it is not known.


def _used(case: Case) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if case.on_gpu else _status("VmRSS")


def _forget_peak(case: Case) -> None:
    """Count from here. Where Linux does not let us, the peak holds what came before, the compiler for one."""
    if case.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(case: Case) -> int:
    return torch.cuda.max_memory_allocated() if case.on_gpu else _status("VmHWM")


def _status(name: str, path: str = "/proc/self/status") -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# --- all points ------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[list[Case]]:
    """Return the points in groups, the most telling first: what stands first in its list tells the most."""
    groups: dict[int, list[Case]] = {}
    axes = (options.head_dims, options.masks, options.kv_groups, options.lengths)
    for (a, head_dim), (b, mask), (c, group), (d, length) in itertools.product(*map(enumerate, axes)):
        heads = options.hidden // head_dim
        shared: dict[str, Any] = dict(
            batch=max(1, options.tokens // length),
            heads=heads,
            kv_heads=heads // group,
            head_dim=head_dim,
            causal=mask == "causal",
            dtype=options.dtype,
            device=options.device,
        )
        groups.setdefault(2 * (a + b + c) + d, []).extend(
            Case(name, direction, length, **shared) for name in options.methods for direction in options.directions
        )
    long = [
        Case(OURS, direction, length, dtype=options.dtype, device=options.device)
        for length in options.long
        for direction in options.long_directions
        if OURS in options.methods
    ]
    for size in options.training:
        batch, heads, length, head_dim = map(int, size.split("x"))
        shape: dict[str, Any] = dict(batch=batch, heads=heads, kv_heads=heads, head_dim=head_dim)
        groups.setdefault(0, []).extend(
            Case(name, direction, length, **shape, dtype=options.dtype, device=options.device)
            for name in options.methods
            for direction in options.directions
        )
    known = {case for group in groups.values() for case in group}
    groups.setdefault(3, []).extend(case for case in long if case not in known)
    return [groups[rank] for rank in sorted(groups)]


def compile_all(pool: Pool, cases: Iterable[Case], end: float) -> None:
    """Fill the caches on the disk, so that the process that measures finds its kernels there."""
    # Each process is one of many: none is to start many of its own.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

    def compile_one(worker: Worker, case: Case) -> None:
        with contextlib.suppress(Failed):  # the row will say so
            if (left := end - time.monotonic()) > 0:
                worker.call(measure, case, False, seconds=min(left, LIMIT["cuda"]))

    def compiles(case: Case) -> Case:
        """Return a small case that compiles what this one needs; a backward pass compiles its forward pass, too."""
        if case.direction == "backward":
            case = replace(case, direction="both")
        if METHODS[case.method].compiled == "once":
            case = replace(case, length=min(case.length, 1024), batch=1)
        return case

    wanted = dict.fromkeys(compiles(case) for case in cases if METHODS[case.method].compiled)
    for _ in pool.each(compile_one, wanted):
        pass


def run_case(worker: Worker, case: Case, end: float) -> Row | None:
    """Measure a point in a worker; see ``measure`` of :func:`runner.run`."""
    method = METHODS[case.method]
    if case.on_gpu:  # to ask a GPU for too much memory harms nobody
        return runner.ask(worker, measure, case, end=end, limit=LIMIT["cuda"])
    if case.direction != "forward" and not method.cpu_backward:
        return dict(missing="no backward on the CPU")
    needed = method.squares[case.direction != "forward"] * case.batch * case.heads * case.length**2 * 4
    free = _status("MemAvailable", "/proc/meminfo")
    if free and needed > 0.7 * free:  # others want some too
        return dict(missing=f"needs {needed / GIB:.0f} GiB, {free / GIB:.0f} are free")
    try:
        return runner.ask(worker, measure, case, end=end, limit=LIMIT["cpu"])
    finally:
        worker.end()  # the next point has its own process, and so its own peak memory


# --- what people look at ---------------------------------------------------------------------------------------------


def tflops(case: Case, row: Row) -> float:
    """Return how many TFLOP/s a point reaches; nan where nothing was measured."""
    return case.flops / row["p50"] / 1e9 if "p50" in row else math.nan


def table(rows: Rows) -> str:
    """Return TFLOP/s, and the time over that of log-bias: above 1, log-bias is the faster."""
    lines = [f"TFLOP/s, and in brackets time / time of {OURS}"]
    for some in runner.by_setting(rows):
        first = next(iter(some))
        lengths = sorted({case.length for case in some})
        for direction in DIRECTIONS:
            here = {(c.method, c.length): (c, row) for c, row in some.items() if c.direction == direction}
            if not here:
                continue
            lines.append(f"\n{first.title}: {DIRECTIONS[direction]}")
            lines.append(f"  {'':16}" + "".join(f"{n:>17,}" for n in lengths))
            notes: dict[str, list[str]] = {}
            for name in dict.fromkeys(name for name, _ in here):
                cells = []
                for n in lengths:
                    case, row = here.get((name, n), (first, {}))
                    base = here.get((OURS, n), (first, {}))[1].get("p50")
                    cell = "" if not row else "-" if "p50" not in row else f"{tflops(case, row):.3g}"
                    if "p50" in row and base and name != OURS:
                        cell += f" ({row['p50'] / base:.2f})"
                    if "missing" in row:
                        notes.setdefault(f"{name}: {row['missing']}", []).append(f"{n:,}")
                    cells.append(f"{cell:>17}")
                lines.append(f"  {name:16}" + "".join(cells))
            lines += [f"  - {note} (at {', '.join(where)})" for note, where in notes.items()]
    return "\n".join(lines)


def derive(case: Case, rows: Rows) -> Row:
    """Return what the CSV file has besides: TFLOP/s, and time and memory over those of log-bias."""
    row, base = rows[case], rows.get(replace(case, method=OURS), {})
    derived: Row = dict(tflops=round(tflops(case, row), 4) if "p50" in row else None)
    for name, value in (("time_over_log_bias", "p50"), ("memory_over_log_bias", "memory")):
        known = row.get(value) is not None and base.get(value)
        derived[name] = round(row[value] / base[value], 4) if known else None
    return derived


def figure(path: Path, rows: Rows, caption: str) -> bool:
    """Draw a row of panels for each setting: TFLOP/s in each direction, time and memory; against the length.

    Returns False if there is nothing to draw yet, since no setting has two lengths.
    """
    settings = [some for some in runner.by_setting(rows) if len({case.length for case in some}) > 1]
    if not settings:
        return False
    directions = [direction for direction in DIRECTIONS if any(case.direction == direction for case in rows)]
    columns: list[tuple[str, str, Callable[[Case, Row], float]]] = [(name, "TFLOP/s", tflops) for name in directions]
    most = directions[-1]  # the direction that does most
    columns.append((most, "milliseconds", lambda case, row: row["p50"]))
    columns.append((most, "peak MiB beyond the inputs", lambda case, row: (row["memory"] or math.nan) / 2**20))
    panels = itertools.product(settings, columns)
    count = len(settings) * len(columns)
    with plots.panels(path, count, caption, columns=len(columns), size=(3.4, 2.9), legend="upper center") as axes:
        for axis, (some, (direction, label, value)) in zip(axes, panels, strict=True):
            for name in METHODS:
                points = sorted(
                    (case.length, value(case, row))
                    for case, row in some.items()
                    if (case.method, case.direction) == (name, direction) and "p50" in row
                )
                if points:
                    axis.plot(*zip(*points, strict=True), **line_style(name))
            axis.set_title(f"{next(iter(some)).title}\n{DIRECTIONS[direction]}", fontsize=9)
            axis.set_ylabel(label)
            if label == "TFLOP/s":
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log", base=2)
                low, high = map(math.log2, axis.get_ylim())
                bottom = math.floor(low)  # whole powers of two, at least two of them: others have no label
                axis.set_ylim(2.0**bottom, 2.0 ** max(bottom + 1, math.ceil(high)))
                axis.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
            plots.length_axis(axis, sorted({case.length for case in some}), "tokens in a sequence", short=True)
    return True


def line_style(name: str) -> dict[str, Any]:
    """Return how the curve of a method is drawn: ours with dots, and the one that is compared broad and below."""
    ours = name.startswith("log-") or name == "none"
    return plots.style(name) | dict(
        label=name,
        marker="o" if ours else "s",
        markersize=4,
        linewidth=3.0 if name == OURS else 1.2,
        linestyle="--" if name in ("log-bias-frozen", "flex-learned") else "-",
        zorder=2 if name == OURS else 3,
    )


BENCH = runner.Bench("throughput", Case, METHODS, table, figure, ("p20", "p50", "p80", "repeats", "memory"), derive)


# --- the command -----------------------------------------------------------------------------------------------------

# What stands first in a list tells the most, and is measured first.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": dict(
        lengths=[8192, 4096, 16384, 2048, 65536, 1024, 32768, 512],
        long=[2**20],
        training=[],
        long_directions=["forward", "backward"],
        tokens=16384,
        hidden=2048,
        head_dims=[128, 64, 256],
        masks=["causal", "full"],
        kv_groups=[1, 4],
        dtype="bfloat16",
        minutes=8.0,
        jobs=max(1, min(12, (os.cpu_count() or 2) - 2)),
    ),
    "cpu": dict(
        lengths=[2048, 512, 8192],
        long=[32768],
        training=["16x4x128x32", "4x8x512x64", "2x12x1024x64"],
        long_directions=["both"],
        tokens=1,
        hidden=512,
        head_dims=[64],
        masks=["causal"],
        kv_groups=[1],
        dtype="float32",
        minutes=15.0,
        jobs=0,
    ),
}


def size(text: str) -> str:
    """Return a size such as 16x4x128x32 as it is, if it is one."""
    if len([command.count(number) for number in text.split("x")]) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers such as 16x4x128x32, got {text}")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with the defaults of the device filled in."""
    parser = command.new_parser("bench throughput", __doc__)
    default = command.default_of(DEFAULTS)

    def add(name: str, text: str, **how: Any) -> None:
        parser.add_argument(name, help=f"{text} {default(name[2:].replace('-', '_'))}", **how)

    numbers: dict[str, Any] = dict(type=command.count, nargs="+", metavar="N")
    add("--lengths", "tokens in a sequence, the most telling first, as in all lists", **numbers)
    add("--long", f"lengths for {OURS} alone, 8 heads of 64, causal", type=command.count, nargs="*", metavar="N")
    add("--training", "sizes BxHxNxD besides, causal", type=size, nargs="*", metavar="SIZE")
    add("--tokens", "tokens in a batch, which has at least one sequence", type=command.count, metavar="N")
    add("--hidden", "heads times head dimension", type=command.count, metavar="N")
    add("--head-dims", "head dimensions", **numbers)
    add("--masks", "masks, causal or full", nargs="+", choices=("causal", "full"), metavar="MASK")
    add("--kv-groups", "query heads to a key head", **numbers)
    add("--dtype", "dtype of q, k and v", choices=("bfloat16", "float16", "float32"))
    add("--jobs", "processes that compile beforehand", type=command.at_least(0), metavar="N")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), metavar="DIRECTION",
                        help=f"of {', '.join(DIRECTIONS)} (all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (all that the device has)")  # fmt: skip
    runner.add_options(parser, default("minutes"))
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = options.device.split(":")[0]
    if device not in DEFAULTS:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    command.fill_in(options, DEFAULTS[device])
    available = [name for name, method in METHODS.items() if device in method.devices]
    options.methods = options.methods or available
    if foreign := [name for name in options.methods if name not in available]:
        parser.error(f"--methods {' '.join(foreign)} cannot run on {device}; there are {' '.join(available)}")
    for head_dim, group in itertools.product(options.head_dims, options.kv_groups):
        if options.hidden % (head_dim * group):
            parser.error(f"--hidden {options.hidden} is no multiple of head dimension {head_dim} times group {group}")
    return options


@command.program("bench throughput")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print what the command line asks for; return the exit status."""
    options = parse(arguments)
    with Worker() as worker, Pool(max(1, options.jobs)) as pool:  # their processes start when they are needed
        return runner.run(
            BENCH,
            options,
            arguments,
            plan(options),
            lambda case, end: run_case(worker, case, end),
            lambda cases, end: compile_all(pool, cases, end) if options.jobs else None,
        )
