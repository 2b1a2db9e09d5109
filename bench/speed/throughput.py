"""How fast attention with a log position is, and how much memory it takes, beside its alternatives.

Self-attention on random inputs. Every row (method, direction, size) is on disk as soon as it is known; Ctrl-C, or the
end of ``--minutes``, loses nothing, and the same command goes on from there. Status 1: nothing could be measured.

    python -m bench throughput
    python -m bench throughput --lengths 512 2048 --methods log-bias sdpa --minutes 5
    python -m bench throughput --out bench/results                  # the record that is kept in this repository
    python -m bench throughput --report          # tables, targets and picture of the last run again, measuring nothing

What is compared:

* ``log-bias``: log_attention with the learned bias, gradients of its parameters included. ``log-bias-frozen``: with
  the bias as constants. ``log-bias-rope``, ``log-invariant``, ``log-rotary-bias``: others. ``none``: no position.
  Triton kernels on a GPU, the blocked backend on the CPU.
* ``flex``: compiled flex_attention with the bias as a score_mod whose parameters are constants; ``flex-learned``: with
  gradients of these parameters. The block mask is formed beforehand and not timed.
* ``sdpa-flash``, ``sdpa-cudnn`` (``sdpa`` on the CPU): F.scaled_dot_product_attention without a bias, by one backend.
* ``sdpa-dense``: F.scaled_dot_product_attention (on a GPU by its efficient backend) with the bias as an N x N tensor,
  formed beforehand and not timed, of which no gradient is taken. Grouped heads are repeated, in the time.
* ``eager``: the definition, one tensor operation after the other, with the gradients of log-bias.

Directions: ``forward`` runs without gradients; ``backward`` is what torch.autograd.grad takes after a forward pass
that is not timed; ``both`` is a forward pass and its backward pass together. Memory is the peak beyond q, k, v and the
gradient of out; that of ``backward`` includes what its forward pass kept.

On a GPU, CUDA events take the time of the device. Before each repeat the L2 cache is overwritten, and the device waits
while the host runs ahead, so that the host's time does not count (it has a bench of its own, host_overhead). One
process measures point after point; one that it dies of is a row that says so, and another process goes on. Kernels are
compiled beforehand, in several processes at once. On the CPU each point has a process, so that its peak memory is its
own; times on a CPU that is busy otherwise say little.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import itertools
import json
import math
import os
import queue
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import logpe
from bench import command
from bench.common import (
    COLOURS,
    Worker,
    commit,
    describe_machine,
    load,
    quantile,
    reading,
    reason,
    write_whole,
)
from logpe import reference
from logpe.files import locked

FORMAT = 1
DIRECTIONS = ("forward", "backward", "both")
TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
OURS = "log-bias"  # what the others are compared with
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One point: what is run, on what."""

    method: str
    direction: str
    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """The point that a row of the results belongs to."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def flops(self) -> float:
        """As they are usually counted: 4 N^2 D per head forward, 2.5 times that backward, half of it when causal."""
        products = {"forward": 4.0, "backward": 10.0, "both": 14.0}[self.direction]
        return products * self.length**2 * self.head_dim * self.heads * self.batch * (0.5 if self.causal else 1.0)

    @property
    def setting(self) -> tuple[int, bool, int, int]:
        """All but the method, the direction and the size of the batch: what a panel of the figure shows."""
        return self.head_dim, self.causal, self.heads, self.kv_heads


class Repeats(NamedTuple):
    """A point is repeated for ``seconds``, within these numbers of times and unless that takes more than ``most``.

    ``limit``, in seconds, is for all of it, compiling included; the first ``warm_up`` seconds of repeats do not count.
    """

    seconds: float
    most: float
    at_least: int
    at_most: int
    warm_up: float
    limit: float


REPEATS = {"cpu": Repeats(5, 60, 5, 50, 0, 3600), "cuda": Repeats(0.25, 5, 10, 100, 0.02, 180)}


def device_type(name: str) -> str:
    """cpu or cuda."""
    return name.split(":")[0]


# --- the methods: each prepares what is not timed, and returns what is -----------------------------------------------


@dataclass
class Inputs:
    """What the methods share: q (B, H, N, D), k and v (B, kv_heads, N, D), and the cotangent of out."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def position(self, preset: str = "log-bias", learnable: bool = True) -> logpe.LogPosition:
        """The same values for every method."""
        torch.manual_seed(1)
        return logpe.LogPosition(
            self.case.heads, self.case.head_dim, preset, learnable=learnable, device=self.case.device
        )

    def power_and_rate(self) -> tuple[Tensor, Tensor]:
        """Of log-bias, as constants, float32 (H,)."""
        position = self.position()
        power, rate = position.power, position.rate
        assert power is not None
        assert rate is not None
        return power.detach(), rate.detach()

    def dense_bias(self) -> Tensor:
        """(1, H, N, N) in the dtype of q, -inf above the diagonal when causal."""
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
    """``run`` is timed; gradients are taken by q, k, v and ``parameters``."""

    run: Callable[[], Tensor]
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Method:
    """``squares``: N x N matrices per head held at once, forward and with backward, float32; ``compiled``: takes a
    while to compile, and leaves the result in a cache on the disk, "once" or "for each length".
    """

    prepare: Callable[[Inputs], Attention]
    squares: tuple[int, int] = (0, 0)
    devices: tuple[str, ...] = ("cuda", "cpu")
    cpu_backward: bool = True
    compiled: str | None = None


METHODS: dict[str, Method] = {}  # the most telling first


def method(name: str, **options: Any) -> Callable[[Callable[[Inputs], Attention]], Callable[[Inputs], Attention]]:
    """Registers a method under the name that the command line and the tables use."""

    def register(prepare: Callable[[Inputs], Attention]) -> Callable[[Inputs], Attention]:
        METHODS[name] = Method(prepare, **options)
        return prepare

    return register


def _log_attention(x: Inputs, preset: str, learnable: bool = True, backend: str = "auto") -> Attention:
    position = x.position(preset, learnable)

    def run() -> Tensor:
        return logpe.log_attention(x.q, x.k, x.v, position, is_causal=x.case.causal, backend=backend)

    return Attention(run, [p for p in position.parameters() if p.requires_grad])


@method("log-bias", compiled="once")
def _log_bias(x: Inputs) -> Attention:
    return _log_attention(x, "log-bias")


@method("log-bias-rope", compiled="once")
def _log_bias_rope(x: Inputs) -> Attention:
    return _log_attention(x, "log-bias-rope")


@method("none", compiled="once")
def _none(x: Inputs) -> Attention:
    return _log_attention(x, "none")


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


@method("flex", cpu_backward=False, compiled="for each length")
def _flex(x: Inputs) -> Attention:
    return _flex_attention(x, learned=False)


def _sdpa(x: Inputs, backend: str | None = None, bias: Tensor | None = None) -> Attention:
    """One backend or an error; where it is None, what torch chooses."""
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


@method("sdpa-cudnn", devices=("cuda",))
def _sdpa_cudnn(x: Inputs) -> Attention:
    return _sdpa(x, "CUDNN_ATTENTION")


@method("sdpa-flash", devices=("cuda",))
def _sdpa_flash(x: Inputs) -> Attention:
    return _sdpa(x, "FLASH_ATTENTION")


@method("sdpa", devices=("cpu",))
def _sdpa_cpu(x: Inputs) -> Attention:
    return _sdpa(x)


@method("flex-learned", devices=("cuda",), compiled="for each length")
def _flex_learned(x: Inputs) -> Attention:
    return _flex_attention(x, learned=True)


@method("log-rotary-bias", compiled="once")
def _log_rotary_bias(x: Inputs) -> Attention:
    return _log_attention(x, "log-rotary-bias")


@method("log-invariant", compiled="once")
def _log_invariant(x: Inputs) -> Attention:
    return _log_attention(x, "log-invariant")


@method("log-bias-frozen", compiled="once")
def _log_bias_frozen(x: Inputs) -> Attention:
    return _log_attention(x, "log-bias", learnable=False)


@method("sdpa-dense", squares=(1, 2))
def _sdpa_dense(x: Inputs) -> Attention:
    return _sdpa(x, "EFFICIENT_ATTENTION" if x.q.is_cuda else None, x.dense_bias())


@method("eager", squares=(5, 6))
def _eager(x: Inputs) -> Attention:
    return _log_attention(x, "log-bias", backend="reference")


# --- one point, in a process that may die of it ----------------------------------------------------------------------


class Prepared(NamedTuple):
    """What the directions of a point share; ``before``: bytes in use before the method took any."""

    inputs: Inputs
    attention: Attention
    before: int


_prepared: dict[Case, Prepared] = {}  # the last one


def make_inputs(case: Case, learn: bool) -> Inputs:
    """The same for every method."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    q, k, v = (
        torch.randn(case.batch, heads, case.length, case.head_dim, dtype=dtype, device=device, requires_grad=learn)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    return Inputs(case, q, k, v, torch.randn_like(q))


def prepare(case: Case) -> Prepared:
    """Kept until another point, or the other mode (with gradients or without), comes."""
    learn = case.direction != "forward"
    key = replace(case, direction="both" if learn else "forward")
    if key not in _prepared:
        forget()
        inputs = make_inputs(case, learn)
        before = _used(case.device)
        _prepared[key] = Prepared(inputs, METHODS[case.method].prepare(inputs), before)
    return _prepared[key]


def forget() -> None:
    """Free what was prepared."""
    _prepared.clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def make_step(case: Case, prepared: Prepared) -> tuple[Callable[[], Tensor | None], Callable[[Any], None]]:
    """What comes before, and what is timed of what comes before."""
    inputs, attention, _ = prepared
    leaves = [inputs.q, inputs.k, inputs.v, *attention.parameters]

    def forward(_: None) -> None:
        with torch.no_grad():
            attention.run()

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, leaves, inputs.dout)

    def both(_: None) -> None:
        backward(attention.run())

    if case.direction == "backward":
        return attention.run, backward
    return lambda: None, forward if case.direction == "forward" else both


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # several times the L2 cache


def time_once(before: Callable[[], Any], step: Callable[[Any], None], device: str) -> float:
    """Seconds that `step` takes after `before`."""
    state = before()
    if device_type(device) == "cpu":
        begin = time.perf_counter()
        step(state)
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    torch.cuda._sleep(2_000_000)  # clock cycles, a millisecond: the host has launched it all by then
    start.record()
    step(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def measure(question: tuple[Case, bool]) -> dict[str, Any]:
    """Times in ms and peak memory in bytes of a case, or why there are none; whether to time it or only to compile.

    Raises if the device can no longer be used.
    """
    case, timed = question
    gpu = device_type(case.device) != "cpu"
    try:
        with torch.cuda.device(case.device) if gpu else contextlib.nullcontext():
            return _measure(case, timed)
    except Exception as error:
        found = dict(missing=reason(error))
    forget()
    if gpu:
        torch.cuda.synchronize(case.device)
    return found


def _measure(case: Case, timed: bool) -> dict[str, Any]:
    repeats = REPEATS[device_type(case.device)]
    if device_type(case.device) == "cpu":  # loads libraries, starts threads
        small = replace(case, length=128)
        before, step = make_step(small, prepare(small))
        step(before())
    elif timed:
        _cache_filler()  # before memory is counted
    prepared = prepare(case)
    before, step = make_step(case, prepared)
    step(before())  # compiles, where anything is compiled
    if not timed:
        forget()
        return {}
    _forget_peak(case.device)
    spent = 0.0
    while spent < repeats.warm_up:
        spent += time_once(before, step, case.device)
    times: list[float] = []
    while not times or (
        len(times) < repeats.at_most
        and (len(times) < repeats.at_least or sum(times) < repeats.seconds)
        and sum(times) + times[-1] < repeats.most
    ):
        times.append(time_once(before, step, case.device))
    p20, p50, p80 = (quantile(times, p) * 1e3 for p in (0.2, 0.5, 0.8))
    highest = _peak(case.device)
    memory = max(0, highest - prepared.before) if highest else None
    return dict(p20=p20, p50=p50, p80=p80, repeats=len(times), memory=memory)


# Memory in bytes: of torch's allocator on a GPU, else of the process; 0 where it is not known.


def _used(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device_type(device) != "cpu" else _status("VmRSS")


def _forget_peak(device: str) -> None:
    """Count from here. Where Linux does not let us, the peak holds what came before, the compiler for one."""
    if device_type(device) != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device_type(device) != "cpu" else _status("VmHWM")


def _status(name: str, path: str = "/proc/self/status") -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# --- all points ------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[list[Case]]:
    """The points in groups, the most telling first: what stands first in its list tells the most."""
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
    known = {case for group in groups.values() for case in group}
    groups.setdefault(3, []).extend(case for case in long if case not in known)
    return [groups[rank] for rank in sorted(groups)]


def compile_all(workers: Sequence[Worker], cases: Iterable[Case], end: float) -> None:
    """Fill the caches on the disk, so that the process that measures finds its kernels there."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(case: Case) -> None:
        worker = idle.get()
        with contextlib.suppress(TimeoutError, RuntimeError):  # the row will say so
            if (left := end - time.monotonic()) > 0:
                worker.ask((case, False), min(left, REPEATS["cuda"].limit))
        idle.put(worker)

    def compiles(case: Case) -> Case:
        """Return a small case that compiles what this one needs; a backward pass compiles its forward pass, too."""
        if case.direction == "backward":
            case = replace(case, direction="both")
        if METHODS[case.method].compiled == "once":
            case = replace(case, length=min(case.length, 1024), batch=1)
        return case

    wanted = dict.fromkeys(compiles(case) for case in cases if METHODS[case.method].compiled)
    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            list(threads.map(one, wanted))
        except KeyboardInterrupt:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def run_case(worker: Worker, case: Case, end: float) -> dict[str, Any] | None:
    """The measurement, or under "missing" why there is none; None if there is no time for it until `end`."""
    m = METHODS[case.method]
    kind = device_type(case.device)
    if kind == "cpu" and case.direction != "forward" and not m.cpu_backward:
        return dict(missing="no backward on the CPU")
    if kind == "cpu":  # on a GPU to ask for too much harms nobody
        needed = m.squares[case.direction != "forward"] * case.batch * case.heads * case.length**2 * 4
        free = _status("MemAvailable", "/proc/meminfo")
        if free and needed > 0.7 * free:  # others want some too
            return dict(missing=f"needs {needed / GIB:.0f} GiB, {free / GIB:.0f} are free")
    left, limit = end - time.monotonic(), REPEATS[kind].limit
    if left <= 0:
        return None
    try:
        return worker.ask((case, True), min(left, limit))
    except TimeoutError:
        return None if left < limit else dict(missing=f"took more than {limit:.0f} s")
    except RuntimeError as error:
        return dict(missing=str(error))
    finally:
        if kind == "cpu":
            worker.close()


def run_all(groups: list[list[Case]], done: dict[Case, dict[str, Any]], end: float, jobs: int) -> Iterator[Case]:
    """Measure what is not `done`, into it; the cases as they are."""
    todo = [[case for case in group if case not in done] for group in groups]
    total = sum(map(len, groups))
    progress = tqdm(total=total, initial=total - sum(map(len, todo)), unit="point", disable=None, smoothing=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        worker = stack.enter_context(Worker(measure))
        helpers = [stack.enter_context(Worker(measure)) for _ in range(jobs)]
        if helpers:  # each of them is one of many: none is to start many of its own
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        for group in todo:
            if helpers and group:
                progress.set_description("compiling")
                compile_all(helpers, group, end)
            for case in group:
                progress.set_description(f"{case.method} {case.direction} {case.length} D{case.head_dim}")
                found = run_case(worker, case, end)
                if found is None:
                    return
                done[case] = asdict(case) | found
                progress.update()
                yield case


# --- targets ---------------------------------------------------------------------------------------------------------


Rows = dict[Case, dict[str, Any]]


def ratios(rows: Rows, ours: str, peer: str, value: str) -> dict[Case, float]:
    """Ours over the peer's wherever the peer has a value; infinite where we have none."""
    found = {}
    for case, row in rows.items():
        other = rows.get(replace(case, method=peer), {}).get(value)
        if case.method == ours and other:
            found[case] = row.get(value, math.inf) / other
    return found


def judge(found: dict[Case, float], least: float, typical: float = 0.0, stretch: float | None = None) -> str:
    """Met if all are at least `least` and their median is at least `typical`."""
    if not found:
        return "not measured"
    worst = min(found, key=lambda case: found[case])
    low, middle = found[worst], median(found.values())
    verdict = "met" if low >= least and middle >= typical else "missed"
    if stretch is not None:
        verdict += f", stretch {'met' if low >= stretch else 'missed'}"
    return f"{verdict}: worst {low:.2f}x ({describe(worst)}), median {middle:.2f}x, {len(found)} points"


def judge_memory(found: dict[Case, float], most: float) -> str:
    """The same of ratios that are to be at most `most`."""
    if not found:
        return "not measured"
    worst = max(found, key=lambda case: found[case])
    verdict = "met" if found[worst] <= most else "missed"
    return f"{verdict}: worst {found[worst]:.2f}x ({describe(worst)}), {len(found)} points"


def describe(case: Case) -> str:
    """A size in a few words."""
    heads = f"H{case.heads}" + (f":{case.kv_heads}" if case.kv_heads != case.heads else "")
    return f"{case.direction} N{case.length} {heads} D{case.head_dim} {'causal' if case.causal else 'full'}"


def targets(rows: Rows) -> list[tuple[str, str]]:
    """Each target of the project on a Hopper GPU, and whether these rows meet it."""

    def faster(ours: str, peer: str, least_length: int = 0, **where: Any) -> dict[Case, float]:
        return {
            case: 1 / ratio
            for case, ratio in ratios(rows, ours, peer, "p50").items()
            if case.length >= least_length and all(getattr(case, name) == value for name, value in where.items())
        }

    lines = [
        (
            "log-bias forward against flex (frozen): >= 1.2x at every point, 1.5x at the median",
            judge(faster(OURS, "flex", direction="forward"), 1.2, 1.5),
        ),
        (
            "log-bias backward against flex-learned, N >= 4k: >= 5x",
            judge(faster(OURS, "flex-learned", least_length=4096, direction="backward"), 5.0),
        ),
    ]
    for head_dim, least in ((128, 0.95), (64, 0.90)):
        for direction in ("forward", "backward"):
            lines.append(
                (
                    f"log-bias {direction} against none, D = {head_dim}: >= {least:.2f}x",
                    judge(faster(OURS, "none", direction=direction, head_dim=head_dim), least),
                )
            )
    for direction, least, stretch in (("forward", 0.75, 1.0), ("backward", 0.60, 0.85)):
        for ours in ("none", OURS):
            found = faster(ours, "sdpa-cudnn", 8192, direction=direction, head_dim=128, causal=True)
            lines.append(
                (
                    f"{ours} {direction} against sdpa-cudnn, causal, D = 128, N >= 8k: >= {least:.2f}x, "
                    f"stretch {stretch:.2f}x",
                    judge(found, least, stretch=stretch),
                )
            )
    for ours, most in (("none", 1.1), (OURS, 1.1), ("log-invariant", 1.1), ("log-rotary-bias", 1.35)):
        memory = judge_memory(ratios(rows, ours, "sdpa-flash", "memory"), most)
        lines.append((f"{ours} memory against sdpa-flash: <= {most:.2f}x", memory))
    for direction in ("forward", "backward"):
        million = [
            row
            for case, row in rows.items()
            if (case.method, case.direction, case.length, case.heads, case.head_dim) == (OURS, direction, 2**20, 8, 64)
        ]
        verdict = "not measured"
        if million:
            row = million[0]
            verdict = f"missed: {row['missing']}" if "missing" in row else f"met: {row['p50'] / 1e3:.2f} s"
        lines.append((f"log-bias {direction}, N = 1,048,576 in one call, H = 8, D = 64: runs", verdict))
    return lines


# --- what people look at ---------------------------------------------------------------------------------------------


def setting_title(case: Case) -> str:
    """Of a panel."""
    heads = f"{case.heads} heads" if case.heads == case.kv_heads else f"{case.heads} heads on {case.kv_heads}"
    return f"D = {case.head_dim}, {'causal' if case.causal else 'full'}, {heads}"


def by_setting(rows: Rows) -> list[tuple[Case, Rows]]:
    """The rows of each setting, under one of its cases, in order."""
    settings: dict[Any, Rows] = {}
    for case, row in rows.items():
        settings.setdefault(case.setting, {})[case] = row
    order = sorted(settings, key=lambda s: (s[0], not s[1], -s[2], -s[3]))
    return [(next(iter(settings[setting])), settings[setting]) for setting in order]


def tflops(case: Case, row: dict[str, Any]) -> float:
    """nan where nothing was measured."""
    return case.flops / row["p50"] / 1e9 if "p50" in row else math.nan


def table(rows: Rows) -> str:
    """TFLOP/s, and the time over that of log-bias, so that above 1 log-bias is the faster."""
    lines = [f"TFLOP/s, and in brackets time / time of {OURS}"]
    for first, some in by_setting(rows):
        lengths = sorted({case.length for case in some})
        for direction in DIRECTIONS:
            here = {(c.method, c.length): (c, row) for c, row in some.items() if c.direction == direction}
            if not here:
                continue
            lines.append(f"\n{setting_title(first)}: {TITLES[direction]}")
            lines.append(f"  {'':16}" + "".join(f"{n:>15,}" for n in lengths))
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
                    cells.append(f"{cell:>15}")
                lines.append(f"  {name:16}" + "".join(cells))
            lines += [f"  - {note} (at {', '.join(where)})" for note, where in notes.items()]
    return "\n".join(lines)


CSV_COLUMNS = (
    *(field.name for field in fields(Case)),
    *("p20", "p50", "p80", "repeats", "tflops", "memory", "time_over_log_bias", "memory_over_log_bias", "missing"),
    *("device_name", "driver", "cuda", "cudnn", "torch", "triton", "python", "commit", "date", "command"),
)


def write_csv(path: Path, run: dict[str, Any], rows: Rows) -> None:
    """One line a point: times in ms, memory in bytes, and what they depend on."""
    about = {name: run["machine"].get(name) for name in ("driver", "cuda", "cudnn", "torch", "triton", "python")}
    about |= {name: run[name] for name in ("commit", "date", "command")} | dict(device_name=run["machine"]["device"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for case, row in rows.items():
            base = rows.get(replace(case, method=OURS), {})
            speed = tflops(case, row)
            derived: dict[str, Any] = dict(tflops="" if math.isnan(speed) else round(speed, 4))
            for name, value in (("time_over_log_bias", "p50"), ("memory_over_log_bias", "memory")):
                if row.get(value) is not None and base.get(value):
                    derived[name] = round(row[value] / base[value], 4)
            writer.writerow(about | row | derived)


def figure(path: Path, rows: Rows, caption: str) -> bool:
    """A row of panels for each setting: throughput in each direction, and memory; against the length.

    False if there is nothing to draw yet: no setting has two lengths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = [(first, some) for first, some in by_setting(rows) if len({case.length for case in some}) > 1]
    if not settings:
        return False
    directions = [direction for direction in DIRECTIONS if any(case.direction == direction for case in rows)]
    heaviest = directions[-1]  # its memory is shown
    handles: dict[str, Any] = {}

    def draw(axis: Any, some: Rows, direction: str, value: Callable[[Case, dict[str, Any]], float]) -> None:
        for name in METHODS:
            points = sorted(
                (case.length, value(case, row))
                for case, row in some.items()
                if (case.method, case.direction) == (name, direction) and "p50" in row
            )
            if points:
                ours = name.startswith("log-") or name == "none"
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[name],
                    marker="o" if ours else "s",
                    markersize=4,
                    linewidth=3.0 if name == OURS else 1.2,  # and below the others, that they be seen
                    linestyle={"log-bias-frozen": "--", "flex-learned": "--"}.get(name, "-"),
                    zorder=2 if name == OURS else 3,
                )
        lengths = sorted({case.length for case in some})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], fontsize=8)
        axis.minorticks_off()
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)

    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawing, axes = pyplot.subplots(
            len(settings),
            len(directions) + 1,
            figsize=(3.6 * (len(directions) + 1), 2.6 * len(settings) + 1.3),
            squeeze=False,
            layout="constrained",
        )
        for line, (first, some) in zip(axes, settings, strict=True):
            for axis, direction in zip(line, directions, strict=False):
                draw(axis, some, direction, tflops)
                axis.set_title(f"{setting_title(first)}\n{TITLES[direction]}", fontsize=9)
                axis.set_ylim(bottom=0)
                axis.set_ylabel("TFLOP/s")
            draw(line[-1], some, heaviest, lambda case, row: (row["memory"] or math.nan) / 2**20)
            line[-1].set_title(f"{setting_title(first)}\npeak memory, {TITLES[heaviest]}", fontsize=9)
            line[-1].set_yscale("log", base=2)
            low, high = line[-1].get_ylim()
            bottom = math.floor(math.log2(low))  # whole powers of two, two or more: others have no label
            line[-1].set_ylim(2.0**bottom, 2.0 ** max(bottom + 1, math.ceil(math.log2(high))))
            line[-1].yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
            line[-1].set_ylabel("MiB beyond the inputs")
        for axis in axes[-1]:
            axis.set_xlabel("tokens in a sequence")
        drawing.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)), frameon=False
        )
        drawing.supxlabel(caption, fontsize=7.5, color="0.35")
        write_whole(path, lambda temporary: drawing.savefig(temporary, dpi=130, format="png"))
        pyplot.close(drawing)
    return True


# --- the command -----------------------------------------------------------------------------------------------------

# What stands first in a list tells the most, and is measured first.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": dict(
        lengths=[8192, 4096, 16384, 2048, 65536, 1024, 32768, 512],
        long=[2**20],
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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with the defaults of the device filled in."""
    parser = command.new_parser("bench throughput", __doc__)

    def add(name: str, text: str, **how: Any) -> None:
        def show(value: Any) -> str:
            return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if value else "none"

        key = name[2:].replace("-", "_")
        shown = "; ".join(
            f"{kind}: {v if isinstance(v := DEFAULTS[kind][key], str) else show(v)}" for kind in ("cuda", "cpu")
        )
        parser.add_argument(name, help=f"{text} ({shown})", **how)

    numbers: dict[str, Any] = dict(type=command.count, nargs="+", metavar="N")
    add("--lengths", "tokens in a sequence, the most telling first, as in all lists", **numbers)
    add("--long", f"lengths for {OURS} alone, 8 heads of 64, causal", type=command.count, nargs="*", metavar="N")
    add("--tokens", "in a batch, at least one sequence", type=command.count, metavar="N")
    add("--hidden", "heads times head dimension", type=command.count, metavar="N")
    add("--head-dims", "head dimensions", **numbers)
    add("--masks", "causal or full", nargs="+", choices=("causal", "full"), metavar="MASK")
    add("--kv-groups", "query heads to a key head", **numbers)
    add("--dtype", "of q, k and v", choices=("bfloat16", "float16", "float32"))
    add("--minutes", "stop after so long", type=command.minutes, metavar="M")
    add("--jobs", "processes that compile beforehand", type=command.at_least(0), metavar="N")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), metavar="DIRECTION",
                        help=f"of {', '.join(DIRECTIONS)} (all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (all that the device has)")  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu (a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=command.OUT, metavar="DIR", help="for the results (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="begin a new run; the ones before stay in the file")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # as it always does
    parser.add_argument("--report", action="store_true", help="measure nothing: show the last run again")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device_type(options.device)
    if kind not in DEFAULTS:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    for name, value in DEFAULTS[kind].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    available = [name for name, m in METHODS.items() if kind in m.devices]
    options.methods = options.methods or available
    if foreign := [name for name in options.methods if name not in available]:
        parser.error(f"--methods {' '.join(foreign)} cannot run on {kind}; there are {' '.join(available)}")
    for head_dim, group in itertools.product(options.head_dims, options.kv_groups):
        if options.hidden % (head_dim * group):
            parser.error(f"--hidden {options.hidden} is no multiple of head dimension {head_dim} times group {group}")
    return options


def read(path: Path) -> dict[str, Any]:
    """The results file, or an empty one. Raises ValueError where it holds something else."""
    if not path.exists():
        return dict(format=FORMAT, runs=[])
    with reading(path):
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, expected {FORMAT}")
        for run in data["runs"]:
            dict(run["machine"]), *(run[name] for name in ("commit", "date", "command"))
            for row in run["points"]:
                Case.of(row)
        return data


def show(run: dict[str, Any], rows: Rows, path: Path) -> None:
    """Print the tables (and on a GPU the targets), and leave CSV and PNG beside the JSON file."""
    print("\n" + "\n".join(f"{name}: {value}" for name, value in run["machine"].items()))
    print(f"commit: {run['commit']}\n\n{table(rows)}")
    if any(device_type(case.device) != "cpu" for case in rows):
        print(f"\nTargets, stated for an H100 or H200; measured on {run['machine']['device']}")
        for text, verdict in targets(rows):
            print(f"  {text}\n      {verdict}")
    write_whole(path.with_suffix(".csv"), lambda temporary: write_csv(temporary, run, rows))
    print(f"\n{path}\n{path.with_suffix('.csv')}")
    caption = f"{run['machine']['device']}, torch {run['machine']['torch']}, triton {run['machine'].get('triton')}"
    caption += f", {next(iter(rows)).dtype}, commit {run['commit']}, {run['date'][:10]}; medians" if rows else ""
    try:
        if figure(path.with_suffix(".png"), rows, caption):
            print(path.with_suffix(".png"))
    except ImportError:
        print("No figure: matplotlib is not installed.")


@command.program("bench throughput")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    path = options.out / f"throughput-{device_type(options.device)}.json"
    if options.report:
        data = read(path)
        if not data["runs"]:
            raise ValueError(f"{path} holds no run")
        run = data["runs"][-1]
        show(run, {Case.of(row): row for row in run["points"]}, path)
        return 0
    about = dict(machine=describe_machine(command.parse_device(options.device)), commit=commit())
    with locked(options.out, path.name):
        return measure_all(options, path, about, shlex.join(["python", "-m", "bench", "throughput", *arguments]))


def measure_all(options: argparse.Namespace, path: Path, about: dict[str, Any], command_line: str) -> int:
    """Measure what the last run `about` this machine and code in the file does not hold; returns the exit status."""
    data = read(path)
    same = [run for run in data["runs"] if all(run.get(name) == value for name, value in about.items())]
    if same and not options.fresh:
        run = same[-1]
        run["points"] = [row for row in run["points"] if Case.of(row).method in METHODS]
    else:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run = about | dict(load=load(), date=date, command=command_line, points=[])
        data["runs"].append(run)
    rows = {Case.of(row): row for row in run["points"]}
    groups = plan(options)
    end = time.monotonic() + options.minutes * 60
    stop: KeyboardInterrupt | None = None
    try:
        for case in run_all(groups, rows, end, options.jobs):
            run["points"].append(rows[case])
            write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1) + "\n"))
    except KeyboardInterrupt as error:
        stop = error
    show(run, rows, path)
    if missing := sum(case not in rows for group in groups for case in group):
        print(f"{missing} points to go.")
        return command.stopped(stop or command.TimeIsOver())
    return int(all("missing" in row for row in rows.values()))
