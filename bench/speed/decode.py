"""How many tokens per second attention generates from a cache, by its length, beside its alternatives.

    python -m bench decode                     # on a GPU: 1k to 128k tokens, bfloat16, 32 query heads on 8 of 128
    python -m bench decode --device cpu --lengths 256 1024 --methods log-bias sdpa copy

Each sequence has one new query, which sees all keys of its cache; what is timed is attention alone, in one layer. All
methods get the same tensors, in one process. On a GPU a step is a CUDA graph, as decoders run it, and the L2 cache is
cleared before each repeat, as the other layers of a model would. The methods:

* ``log-bias``: log_attention with the learnable log bias, on a preallocated cache.
* ``log-bias-paged``: the same on shuffled pages of 64 tokens.
* ``none``: log_attention without a position.
* ``flex``: compiled flex_attention with the bias as a score_mod, for this length.
* ``sdpa``: F.scaled_dot_product_attention without a bias, on the backend that it chooses.
* ``copy``: the device copies the keys over the values. It reads and writes as many bytes as attention has to read,
  and so shows the memory's limit. The table's last column is the share of it that a method reaches.

A point that fails is a row that says so. The same command resumes where it was stopped. Status 1: nothing could be
measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
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
from logpe import clock
from logpe.clock import Repeats
from logpe.worker import Worker

PAGE_SIZE = 64
REPEATS = Repeats(seconds=1, at_least=10, at_most=200, longest=60)  # of one point on the CPU
GPU_MILLISECONDS = 200  # the same on a GPU
LIMIT = 300.0  # seconds that a point may take, compilation included


@dataclass(frozen=True)
class Case(runner.Point):
    """One point."""

    length: int  # tokens in the cache, the new one included
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    @property
    def cache_bytes(self) -> int:
        """The size of the keys and values."""
        elements = 2 * self.batch * self.kv_heads * self.length * self.head_dim
        return elements * getattr(torch, self.dtype).itemsize

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the method and the length."""
        return self.batch, self.heads, self.kv_heads, self.head_dim, self.dtype, self.device

    @property
    def title(self) -> str:
        """The setting in words."""
        heads = f"{self.heads} query and {self.kv_heads} key heads of {self.head_dim}"
        return f"batch {self.batch}, {heads}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.method} {self.length}"


class Inputs(NamedTuple):
    """q (B, Hq, 1, D); k, v (B, Hkv, N, D); the position of the layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    position: logpe.LogPosition


# --- the methods: each prepares what is not timed, and returns what is --------------------------------------------

Step = Callable[[], object]


def _paged(x: Inputs) -> Step:
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


METHODS: dict[str, Callable[[Inputs], Step]] = {
    "log-bias": lambda x: lambda: logpe.log_attention(x.q, x.k, x.v, x.position, is_causal=True),
    "log-bias-paged": _paged,
    "none": lambda x: lambda: logpe.log_attention(x.q, x.k, x.v, is_causal=True),
    "flex": _flex,
    "sdpa": lambda x: lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True),
    "copy": lambda x: lambda: x.v.copy_(x.k),
}


# --- one point ------------------------------------------------------------------------------------------------------


def make_inputs(case: Case) -> Inputs:
    """Return the same random inputs for every method."""
    torch.manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, dtype=getattr(torch, case.dtype), device=case.device)

    position = logpe.LogPosition(case.heads, case.head_dim, "log-bias", device=case.device)
    return Inputs(
        normal(case.heads, 1), normal(case.kv_heads, case.length), normal(case.kv_heads, case.length), position
    )


def captured(step: Step) -> Step:
    """Return a step as a CUDA graph, which is how decoders run it: the host's time is not part of it."""
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


@torch.no_grad()
def measure(case: Case) -> Row:
    """Return the times of one point in microseconds."""
    if case.device == "cpu":
        step = METHODS[case.method](make_inputs(case))
        for _ in range(3):  # compiles, loads libraries, starts threads
            step()
        seconds = REPEATS.take(lambda: clock.time_once(step, gpu=False))
        return clock.quantiles([1e6 * time for time in seconds])
    from triton.testing import do_bench

    torch.cuda.set_device(torch.device(case.device).index or 0)
    eager = METHODS[case.method](make_inputs(case))  # holds the tensors that the graph reads
    # While the L2 cache is cleared, the host launches the graph: do_bench times nothing but the device.
    milliseconds = do_bench(captured(eager), rep=GPU_MILLISECONDS, return_mode="all")
    return clock.quantiles([1e3 * time for time in milliseconds])


# --- what people look at --------------------------------------------------------------------------------------------


def tokens_per_second(case: Case, row: Row) -> float:
    """Return how many tokens a second a point generates: one in a step for each sequence of the batch."""
    return case.batch / row["p50"] * 1e6


def share_of_copy(case: Case, rows: Rows) -> float | None:
    """Return the share of the copy's speed that a point reaches, None where one of them is missing."""
    copy = rows.get(replace(case, method="copy"), {})
    return copy["p50"] / rows[case]["p50"] if "p50" in copy and "p50" in rows[case] else None


def derive(case: Case, rows: Rows) -> Row:
    """Return what the CSV file has besides: tokens per second, GB/s, and the share of the copy's speed."""
    row, share = rows[case], share_of_copy(case, rows)
    return dict(
        tokens_per_second=round(tokens_per_second(case, row), 1) if "p50" in row else None,
        gigabytes_per_second=round(case.cache_bytes / row["p50"] / 1e3, 2) if "p50" in row else None,
        of_copy=None if share is None else round(share, 4),
    )


def table(rows: Rows) -> str:
    """Return all points, by setting and length."""
    heads = "".join(f"{name:>12}" for name in ("tokens/s", "p20 us", "p50 us", "p80 us", "GB/s", "of copy"))
    lines = []
    for some in runner.by_setting(rows):
        lines += ["", next(iter(some)).title]
        for length in sorted({case.length for case in some}):
            lines += [f"\n{length} tokens in the cache", f"  {'':15}{heads}"]
            for case, row in some.items():
                if case.length != length:
                    continue
                if "missing" in row:
                    lines.append(f"  {case.method:15}  {row['missing']}")
                    continue
                values = derive(case, rows)
                columns = [values["tokens_per_second"], row["p20"], row["p50"], row["p80"]]
                text = "".join(f"{value:12.1f}" for value in (*columns, values["gigabytes_per_second"]))
                share = values["of_copy"]
                lines.append(f"  {case.method:15}{text}{'' if share is None else f'{share:12.0%}'}")
    return "\n".join(lines)


def figure(path: Path, rows: Rows, caption: str) -> bool:
    """Draw tokens per second, and the share of the memory's limit, by the length of the cache, for each setting."""
    settings = runner.by_setting(rows)
    markers = {"log-bias": "o", "log-bias-paged": "s", "none": "v", "flex": "^", "sdpa": "D", "copy": ""}
    lines = {"log-bias-paged": "--", "copy": ":"}
    with plots.panels(path, 2 * len(settings), caption, columns=2, size=(5.4, 3.8), legend="upper center") as axes:
        for some, speed, share in zip(settings, axes[::2], axes[1::2], strict=True):
            for name, marker in markers.items():
                colour = "black" if name == "copy" else plots.COLOURS[name.removesuffix("-paged")]
                label = "copy of as many bytes" if name == "copy" else name
                look = dict(color=colour, label=label, marker=marker, linestyle=lines.get(name, "-"))
                cases = [c for c in some if c.method == name and "p50" in some[c]]
                cases.sort(key=lambda case: case.length)
                lengths = [case.length for case in cases]
                if cases:
                    speed.plot(lengths, [tokens_per_second(case, some[case]) for case in cases], **look)
                    shares = [share_of_copy(case, some) or float("nan") for case in cases]
                    share.plot(lengths, [100 * x for x in shares], **look)
            title = next(iter(some)).title
            for axis, label in ((speed, "tokens per second, one layer"), (share, "speed in % of the copy's")):
                plots.length_axis(axis, sorted({case.length for case in some}), "tokens in the cache", short=True)
                axis.set_title(title, fontsize=9)
                axis.set_ylabel(label)
            speed.set_yscale("log")
            share.set_ylim(bottom=0)
    return bool(settings)


BENCH = runner.Bench("decode", Case, METHODS, table, figure, ("p20", "p50", "p80", "repeats"), derive)


# --- the command ----------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": dict(lengths=[2**n for n in range(10, 18)], dtype="bfloat16", minutes=10.0),
    "cpu": dict(lengths=[512, 2048, 8192], dtype="float32", minutes=10.0),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with the defaults of the device filled in."""
    parser = command.new_parser("bench decode", __doc__)
    default = command.default_of(DEFAULTS)
    parser.add_argument("--lengths", type=command.count, nargs="+", metavar="N",
                        help=f"tokens in the cache {default('lengths')}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (all)")  # fmt: skip
    for name, value, text in (
        ("--batch", 1, "sequences"),
        ("--heads", 32, "query heads"),
        ("--kv-heads", 8, "key heads"),
        ("--head-dim", 128, "dimensions of a head"),
    ):
        parser.add_argument(name, type=command.count, default=value, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help=default("dtype"))
    runner.add_options(parser, default("minutes"))
    options = parser.parse_args(arguments)
    options.device = str(command.parse_device(options.device))
    command.fill_in(options, DEFAULTS["cpu" if options.device == "cpu" else "cuda"])
    if options.heads % options.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    return options


@command.program("bench decode")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print what the command line asks for; return the exit status."""
    options = parse(arguments)
    setting = {name: getattr(options, name) for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "device")}
    cases = [Case(name, length, **setting) for length in sorted(set(options.lengths)) for name in options.methods]
    with Worker() as worker:
        return runner.run(
            BENCH,
            options,
            arguments,
            [cases],
            lambda case, end: runner.ask(worker, measure, case, end=end, limit=LIMIT),
        )
