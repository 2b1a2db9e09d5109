"""How many tokens per second attention generates from a cache, by its length, beside its alternatives.

    python -m bench decode                     # on a GPU: 1k to 128k tokens, bfloat16, 32 query heads on 8 of 128
    python -m bench decode --device cpu --lengths 256 1024 --methods log-bias sdpa copy

One new query of each sequence against all keys of its cache; one layer, attention alone. Every method works on the
same tensors in one process. On a GPU a step is a CUDA graph, as decoders run it, and the L2 cache is overwritten before
each repeat, since the other layers of a model do that too. What is compared:

* ``log-bias``: log_attention with the learnable log bias, on a preallocated cache.
* ``log-bias-paged``: the same on shuffled pages of 64 tokens.
* ``none``: log_attention without a position.
* ``flex``: compiled flex_attention with the bias as a score_mod, for this length.
* ``sdpa``: F.scaled_dot_product_attention without a bias, on the backend that it chooses.
* ``copy``: the keys copied over the values, by the device: as many bytes read and written as attention has to read,
  and so the memory's limit. The table's last column is the share of it that a method reaches.

A point that fails is a row that says so. The same command goes on where it was stopped; rows of another machine,
commit or setting are in the way until ``--fresh``. Status 1: nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import logpe
from bench import command
from bench.common import COLOURS, Worker, commit, describe_machine, load, quantile, reading, write_whole
from logpe.files import locked

FORMAT = 1
PAGE_SIZE = 64
SECONDS, MIN_REPEATS, MAX_REPEATS = 1.0, 10, 200  # of one point
LONGEST = 300.0  # seconds that a point may take, compilation included
L2_BYTES = 256 * 2**20  # more than any GPU's L2 cache


@dataclass(frozen=True)
class Case:
    """One point."""

    method: str
    length: int  # tokens in the cache, the new one included
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        elements = 2 * self.batch * self.kv_heads * self.length * self.head_dim
        return elements * getattr(torch, self.dtype).itemsize


Rows = dict[Case, dict[str, Any]]


class Inputs(NamedTuple):
    """q (B, Hq, 1, D); k, v (B, Hkv, N, D); the position of the layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    position: logpe.LogPosition


# --- the methods: each prepares what is not timed, and returns what is --------------------------------------------

Step = Callable[[], object]
METHODS: dict[str, Callable[[Inputs], Step]] = {}


def method(name: str) -> Callable[[Callable[[Inputs], Step]], Callable[[Inputs], Step]]:
    """Registers a method under the name that the command line, table and plot use."""

    def register(prepare: Callable[[Inputs], Step]) -> Callable[[Inputs], Step]:
        METHODS[name] = prepare
        return prepare

    return register


@method("log-bias")
def _log_bias(x: Inputs) -> Step:
    return lambda: logpe.log_attention(x.q, x.k, x.v, x.position, is_causal=True)


@method("log-bias-paged")
def _log_bias_paged(x: Inputs) -> Step:
    batch, _, length, _ = x.k.shape
    max_pages = -(-length // PAGE_SIZE)
    table = torch.randperm(batch * max_pages, device=x.k.device).view(batch, max_pages)

    def in_pages(dense: Tensor) -> Tensor:
        pages = F.pad(dense, (0, 0, 0, max_pages * PAGE_SIZE - length)).unflatten(2, (max_pages, PAGE_SIZE))
        pages = pages.transpose(1, 2).flatten(0, 1)
        pool = torch.empty_like(pages, memory_format=torch.contiguous_format)
        pool[table.flatten()] = pages
        return pool

    k, v = in_pages(x.k), in_pages(x.v)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=x.k.device)
    options: dict[str, Any] = dict(is_causal=True, block_table=table.int(), key_lengths=lengths, query_start=length - 1)
    return lambda: logpe.log_attention(x.q, k, v, x.position, **options)


@method("none")
def _none(x: Inputs) -> Step:
    return lambda: logpe.log_attention(x.q, x.k, x.v, is_causal=True)


@method("flex")
def _flex(x: Inputs) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    power, rate = x.position.power, x.position.rate
    assert power is not None
    assert rate is not None
    last = x.k.shape[2] - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - power[h] * torch.log1p(rate[h] * (last - j))

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, x.k, x.v, score_mod=score_mod, enable_gqa=True)


@method("sdpa")
def _sdpa(x: Inputs) -> Step:
    return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True)


@method("copy")
def _copy(x: Inputs) -> Step:
    return lambda: x.v.copy_(x.k)


# --- one point ------------------------------------------------------------------------------------------------------


def make_inputs(case: Case) -> Inputs:
    """The same for every method."""
    torch.manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, dtype=getattr(torch, case.dtype), device=case.device)

    position = logpe.LogPosition(case.heads, case.head_dim, "log-bias", device=case.device)
    return Inputs(
        normal(case.heads, 1), normal(case.kv_heads, case.length), normal(case.kv_heads, case.length), position
    )


def captured(step: Step) -> Step:
    """The step as a CUDA graph, which is how decoders run it: the host's time is not part of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_once(step: Step, flush: Tensor | None) -> float:
    """Seconds; on a GPU between two events, behind a write that fills the L2 cache and gives the host a head start."""
    if flush is None:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    """Times of one point in microseconds."""
    if case.device != "cpu":
        torch.cuda.set_device(torch.device(case.device).index or 0)
    eager = METHODS[case.method](make_inputs(case))  # holds the tensors that a graph reads
    step, flush = eager, None
    if case.device != "cpu":
        step, flush = captured(eager), torch.empty(L2_BYTES, dtype=torch.uint8, device=case.device)
    for _ in range(3):
        time_once(step, flush)
    times: list[float] = []
    while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and sum(times) < SECONDS):
        times.append(time_once(step, flush))
    return {f"p{p}": quantile(times, p / 100) * 1e6 for p in (20, 50, 80)} | dict(repeats=len(times))


# --- all points -----------------------------------------------------------------------------------------------------


def run(cases: Sequence[Case], rows: Rows, end: float, save: Callable[[], None]) -> bool:
    """Measure what is missing, until the time is over; False if it was."""
    progress = tqdm([case for case in cases if case not in rows], unit="point", disable=None)
    with Worker(measure) as worker:
        for case in progress:
            progress.set_description(f"{case.method} {case.length}")
            left = end - time.monotonic()
            if left <= 0:
                return False
            try:
                rows[case] = worker.ask(case, min(left, LONGEST))
            except TimeoutError:
                if left < LONGEST:
                    return False
                rows[case] = dict(missing=f"took more than {LONGEST:.0f} s")
            except RuntimeError as error:
                rows[case] = dict(missing=f"failed: {error}")
            save()
    return True


def tokens_per_second(case: Case, row: dict[str, Any]) -> float:
    """One new token for each sequence of the batch."""
    return case.batch / row["p50"] * 1e6


def roofline(rows: Rows, case: Case) -> float | None:
    """The share of the copy's speed that a point reaches, None where one of them is missing."""
    copy = rows.get(Case(**asdict(case) | dict(method="copy")), {})
    return copy["p50"] / rows[case]["p50"] if "p50" in copy and "p50" in rows[case] else None


def table(rows: Rows) -> str:
    """All points by length."""
    heads = "".join(f"{name:>12}" for name in ("tokens/s", "p20 us", "p50 us", "p80 us", "GB/s", "of copy"))
    lines = []
    for length in sorted({case.length for case in rows}):
        lines += [f"\n{length} tokens in the cache", f"  {'':15}{heads}"]
        for case, row in rows.items():
            if case.length != length:
                continue
            if "missing" in row:
                lines.append(f"  {case.method:15}  {row['missing']}")
                continue
            share = roofline(rows, case)
            figures = [tokens_per_second(case, row), row["p20"], row["p50"], row["p80"]]
            figures.append(case.cache_bytes / row["p50"] / 1e3)
            text = "".join(f"{figure:12.1f}" for figure in figures)
            lines.append(f"  {case.method:15}{text}{'' if share is None else f'{share:12.0%}'}")
    return "\n".join(lines)


def figure(path: Path, rows: Rows, caption: str) -> None:
    """Tokens per second, and the share of the memory's limit, by the length of the cache."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    styles = {
        "log-bias": dict(color=COLOURS["log-bias"], marker="o"),
        "log-bias-paged": dict(color=COLOURS["log-bias"], marker="s", linestyle="--"),
        "none": dict(color=COLOURS["none"], marker="v"),
        "flex": dict(color=COLOURS["flex"], marker="^"),
        "sdpa": dict(color=COLOURS["sdpa"], marker="D"),
        "copy": dict(color="black", linestyle=":"),
    }
    panes, (speed, share) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, style in styles.items():
        points = [case for case in rows if case.method == name and "p50" in rows[case]]
        points.sort(key=lambda case: case.length)
        label = "copy of as many bytes" if name == "copy" else name
        lengths = [case.length for case in points]
        if points:
            speed.plot(lengths, [tokens_per_second(c, rows[c]) for c in points], label=label, **style)
        shares = [roofline(rows, case) for case in points]
        if name != "copy" and any(x is not None for x in shares):
            share.plot(lengths, [float("nan") if x is None else 100 * x for x in shares], **style)
    ticks = sorted({case.length for case in rows})
    for axes, title in ((speed, "tokens per second, one layer"), (share, "speed in % of the copy's")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens in the cache")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.axhline(100, color="black", linestyle=":")
    share.set_ylim(bottom=0)
    panes.legend(loc="outside lower center", ncols=len(styles), fontsize=8)
    panes.suptitle(caption, fontsize=9)
    write_whole(path, lambda file: panes.savefig(file, dpi=150, format="png"))
    plt.close(panes)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = command.new_parser("bench decode", __doc__)
    parser.add_argument("--lengths", type=command.count, nargs="+", help="tokens (1k to 128k; CPU: 512 to 8k)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--batch", type=command.count, default=1)
    parser.add_argument("--heads", type=command.count, default=32, help="of the queries; default %(default)s")
    parser.add_argument("--kv-heads", type=command.count, default=8, help="default %(default)s")
    parser.add_argument("--head-dim", type=command.count, default=128, help="default %(default)s")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="bfloat16 on a GPU, else float32")
    command.add_run_options(parser, most=10)
    options = parser.parse_args(arguments)
    options.device = str(command.parse_device(options.device))
    on_gpu = options.device != "cpu"
    options.lengths = options.lengths or [2**n for n in (range(10, 18) if on_gpu else (9, 11, 13))]
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    if options.heads % options.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    return options


@command.program("bench decode")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    path = options.out / f"decode-{options.device.split(':')[0]}.json"
    with locked(options.out, path.name):
        return measure_all(options, path, shlex.join(["python", "-m", "bench", "decode", *arguments]))


def read(path: Path, about: dict[str, Any]) -> Rows:
    """The rows of a file `about` the same machine, code and setting. Raises ValueError where it is about others."""
    with reading(path):
        old = json.loads(path.read_text())
        names = Case.__dataclass_fields__
        rows = {Case(**{n: row[n] for n in names}): {n: row[n] for n in row if n not in names} for row in old["rows"]}
    if other := [name for name, value in about.items() if old.get(name) != value]:
        raise ValueError(f"{path} has another {' and '.join(other)}: --fresh overwrites it, another --out keeps it")
    return rows


def measure_all(options: argparse.Namespace, path: Path, command_line: str) -> int:
    """Measure what the file lacks; returns the exit status."""
    shared = {name: getattr(options, name) for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "device")}
    cases = [Case(name, length, **shared) for length in sorted(set(options.lengths)) for name in options.methods]
    machine = describe_machine(torch.device(options.device))
    about = dict(format=FORMAT, machine=machine, commit=commit(), setting=shared)
    rows = read(path, about) if path.exists() and not options.fresh else {}

    def save() -> None:
        data = about | dict(
            command=command_line,
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            load=load(),
            rows=[asdict(case) | row for case, row in rows.items()],
        )
        write_whole(path, lambda file: file.write_text(json.dumps(data, indent=1) + "\n"))

    stop: KeyboardInterrupt | None = None
    try:
        if not run(cases, rows, command.deadline(options.minutes), save):
            stop = command.TimeIsOver()
    except KeyboardInterrupt as error:
        stop = error
    if rows:
        setting = f"batch {options.batch}, {options.heads} query and {options.kv_heads} key heads of {options.head_dim}"
        caption = f"{machine['device']}, {options.dtype}, {setting}; medians"
        print(f"{caption}\n{table(rows)}\n\nWritten to {path}")
        try:
            figure(path.with_suffix(".png"), rows, caption)
        except ImportError:
            print("No figure: matplotlib is not installed.")
    if stop:
        return command.stopped(stop)
    return int(all("missing" in row for row in rows.values()))
