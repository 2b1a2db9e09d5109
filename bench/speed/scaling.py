"""Context parallelism: time, bytes sent, peak memory and balance of work for each method, layout and number of ranks.

    python -m bench scaling                     gloo processes on the CPU, or NCCL where there are GPUs enough
    python -m bench scaling --length 65536 --processes 1 2 4 8

Forward and backward of one causal call of log_attention, whose tokens lie across the processes. Where processes share
a machine's cores, time says nothing about scaling; bytes, memory and balance do.

Beside it, what torch.distributed.tensor.experimental makes of the same: its context parallelism for
scaled_dot_product_attention, without a bias, where that runs; and for FlexAttention with a distance bias as its
score_mod, compared with one process that holds all tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

import logpe
from bench import plots
from bench.command import OUT, about, count, fill_in, new_parser, parse_device, program, stamp
from bench.common import device_name
from bench.speed.runner import write_json
from logpe.distributed import LAYOUTS, METHODS
from logpe.files import locked
from logpe.worker import one_line

BUDGETS: dict[str, dict[str, Any]] = {
    "cuda": dict(length=65536, heads=16, kv_heads=4, head_dim=128, dtype="bfloat16", processes=[1, 2, 4], repeats=5),
    "cpu": dict(length=8192, heads=4, kv_heads=2, head_dim=64, dtype="float32", processes=[1, 2, 4], repeats=1),
}
COLOURS = {"all-gather": "#009E73", "ring": "#0072B2", "heads": "#CC79A7"}


@dataclass
class Settings:
    """What a measurement depends on, beside the machine. window: tokens that a query sees before it; None is all."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    repeats: int
    window: int | None
    device: str

    @property
    def key(self) -> str:
        """Name the file of the results."""
        return f"scaling-{self.device}"

    def tensors(self, *heads: int) -> list[Tensor]:
        """Return a random tensor (1, H, length, head_dim) for each number of heads, the same on all ranks."""
        torch.manual_seed(0)
        shape = self.length, self.head_dim
        return [torch.randn(1, h, *shape).to(self.device, getattr(torch, self.dtype)) for h in heads]


# --- one process ------------------------------------------------------------------------------------------------------


class Traffic:
    """The bytes that this rank sends to others, and the most that it holds at once of what it received."""

    def __init__(self) -> None:
        self.sent = self.held = self.peak = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count inside the block."""
        point_to_point, gather = dist.batch_isend_irecv, dist.all_gather

        def transfer(operations: list[Any]) -> Any:
            for operation in operations:
                if operation.op is dist.isend:
                    self.sent += operation.tensor.nbytes
                else:
                    self._hold(operation.tensor)
            return point_to_point(operations)

        def gather_all(copies: list[Tensor], x: Tensor, group: Any = None) -> Any:
            self.sent += x.nbytes * (len(copies) - 1)
            return gather(copies, x, group=group)

        dist.batch_isend_irecv, dist.all_gather = transfer, gather_all  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.batch_isend_irecv, dist.all_gather = point_to_point, gather

    def _hold(self, x: Tensor) -> None:
        self.held += x.nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(x.untyped_storage(), self._release, x.nbytes)

    def _release(self, size: int) -> None:
        self.held -= size


def memory_peak(device: torch.device) -> Callable[[], int]:
    """Return a function that tells by how many bytes the memory in use has grown since now, at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - start

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not returned would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
        start = read("VmRSS")
    except (OSError, AttributeError, StopIteration):  # not Linux with glibc
        return lambda: 0
    return lambda: read("VmHWM") - start


def pairs(parallel: logpe.ContextParallel, settings: Settings) -> int:
    """Return how many (query, key, head) triples this rank computes."""
    if parallel.method == "heads":
        first, end = (rank * settings.heads // parallel.size for rank in (parallel.rank, parallel.rank + 1))
        positions, heads = torch.arange(settings.length), end - first
    else:
        positions, heads = parallel.positions(settings.length), settings.heads
    seen = positions + 1 if settings.window is None else (positions + 1).clamp(max=settings.window + 1)
    return int(seen.sum()) * heads


def measure(parallel: logpe.ContextParallel, settings: Settings) -> dict[str, Any]:
    """Return what this rank sends, holds and computes, and how long it takes."""
    q, k, v, dout = (
        parallel.shard(x, 2) for x in settings.tensors(settings.heads, *2 * (settings.kv_heads,), settings.heads)
    )
    position = logpe.LogPosition(settings.heads, settings.head_dim, "log-bias", device=q.device)
    for x in (q, k, v):
        x.requires_grad_()
    window = None if settings.window is None else (settings.window, 0)
    figures: dict[str, Any] = dict(pairs=pairs(parallel, settings), keys=k.nbytes + v.nbytes)
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for repeat in range(settings.repeats + 1):  # the first warms up
        traffic, peak = Traffic(), memory_peak(q.device)
        with traffic.counted():
            dist.barrier(parallel.group)
            start = time.perf_counter()
            out = logpe.log_attention(q, k, v, position, is_causal=True, window=window, context_parallel=parallel)
            _wait(q)
            middle = time.perf_counter()
            figures["sent forward"] = traffic.sent
            out.backward(dout)
            _wait(q)
        if repeat:
            times["forward"].append(middle - start)
            times["backward"].append(time.perf_counter() - middle)
        figures |= {"sent": traffic.sent, "received at once": traffic.peak, "memory": peak()}
    return figures | {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


# --- torch's own context parallelism ----------------------------------------------------------------------------------


def torch_sdpa(mesh: Any, settings: Settings) -> dict[str, Any]:
    """Return the times of torch's context parallelism for causal SDPA without a bias, or why it does not run."""
    from torch.distributed.tensor.experimental import context_parallel

    buffers = settings.tensors(*4 * (settings.heads,))
    try:
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            q, k, v = (x.detach().requires_grad_() for x in buffers[:3])
            start = time.perf_counter()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            _wait(q)
            middle = time.perf_counter()
            out.backward(buffers[3])
            _wait(q)
            return {"forward": middle - start, "backward": time.perf_counter() - middle}
    except Exception as error:  # whatever it does not serve
        return {"refused": one_line(error)}


def torch_flex(mesh: Any, device: torch.device) -> dict[str, Any]:
    """Return the errors of torch's context parallelism for FlexAttention, causal, with and without a distance bias."""
    try:
        from torch.distributed.tensor.experimental._attention import _context_parallel_shard, _ContextParallel
        from torch.distributed.tensor.parallel import parallelize_module
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - torch.log1p(0.5 * (i - j).abs())

        class Flex(torch.nn.Module):
            def __init__(self, bias: bool) -> None:
                super().__init__()
                self.score_mod = score_mod if bias else None

            def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
                return flex_attention(q, k, v, score_mod=self.score_mod, block_mask=block_mask)

        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        torch.manual_seed(0)
        length = 256
        q, k, v = torch.randn(3, 1, 2, length, 16, device=device)
        mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, length, length, device=str(device), BLOCK_SIZE=64)
        style = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.FLEX)
        errors = {}
        for name, bias in (("no bias", False), ("distance bias", True)):
            expected = flex_attention(q, k, v, score_mod=score_mod if bias else None, block_mask=mask)
            buffers = [x.clone() for x in (q, k, v)]
            *parts, own_mask = _context_parallel_shard(mesh, [*buffers, mask], [2, 2, 2, 2])
            out = parallelize_module(Flex(bias), mesh, style)(*parts, own_mask)
            own = expected.chunk(mesh.size(), 2)[mesh.get_local_rank()]
            worst: list[Any] = [None] * mesh.size()
            dist.all_gather_object(worst, float((out - own).abs().max()), group=mesh.get_group())
            errors[name] = worst
        return {"largest error by rank": errors}
    except Exception as error:  # private names change
        return {"refused": one_line(error)}


# --- all processes ----------------------------------------------------------------------------------------------------


def worker(rank: int, size: int, folder: str, settings: Settings) -> None:
    """Measure all methods and layouts on one rank; the first one writes the figures of all."""
    device = torch.device(settings.device, rank) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    mesh = dist.init_device_mesh(device.type, (size,))
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for layout in LAYOUTS:
            if size == 1 and rows:
                continue
            parallel = logpe.ContextParallel(mesh, method=method, layout=layout)
            ranks: list[Any] = [None] * size
            dist.all_gather_object(ranks, measure(parallel, settings))
            rows.append(dict(processes=size, method=method, layout=layout, ranks=ranks))
    peers = {}
    if size == 2:
        peers = {"sdpa": torch_sdpa(mesh, settings), "flex": torch_flex(mesh, device)}
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(dict(rows=rows, peers=peers)))
    dist.barrier()
    dist.destroy_process_group()


def summary(row: dict[str, Any]) -> dict[str, float]:
    """Return the largest of each figure over the ranks, and the imbalance of work: the most pairs over the mean."""
    ranks = row["ranks"]
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return worst | {"imbalance": worst["pairs"] * len(ranks) / sum(rank["pairs"] for rank in ranks)}


def show(rows: Sequence[dict[str, Any]], peers: dict[str, Any]) -> None:
    """Print a table."""
    print("ranks  method      layout      imbalance  sent fwd  sent all  received at once  memory   forward  backward")
    for row in rows:
        s = summary(row)
        megabytes = [s[name] / 1e6 for name in ("sent forward", "sent", "received at once", "memory")]
        print(
            f"{row['processes']:5}  {row['method']:10}  {row['layout']:10}  {s['imbalance']:9.4f}  "
            f"{megabytes[0]:5.2f} MB  {megabytes[1]:5.2f} MB  {megabytes[2]:13.2f} MB  {megabytes[3]:4.0f} MB  "
            f"{s['forward']:6.2f} s  {s['backward']:7.2f} s"
        )
    for name, outcome in peers.items():
        print(f"torch's context parallelism, {name}: {outcome}")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw bytes sent, what is received at once, memory and imbalance over the number of ranks."""
    rows, size = record["rows"], record["settings"]
    note = (
        f"{size['length']:,} tokens, {size['heads']} heads, {size['kv_heads']} of keys, each {size['head_dim']} wide, "
        f"{size['dtype']}; causal, log-bias, forward and backward\n"
        f"{record['device']}, torch {record['torch']}, commit {record['commit']}, {record['date'][:10]}"
    )
    figures = {
        "sent": ("sent by a rank, forward and backward [MB]", 1e6),
        "received at once": ("received and held at once [MB]", 1e6),
        "memory": ("growth of a rank's memory, peak [MB]", 1e6),
        "imbalance": ("work: largest over mean", 1),
    }
    sizes = sorted({row["processes"] for row in rows})
    with plots.panels(path, len(figures), note, columns=2, legend="right center") as axes:
        for axis, (name, (label, unit)) in zip(axes, figures.items(), strict=True):
            for method in METHODS:
                for layout, line in zip(LAYOUTS, ("-", ":"), strict=True):
                    chosen = [row for row in rows if (row["method"], row["layout"]) == (method, layout)]
                    points = [(row["processes"], summary(row)[name] / unit) for row in chosen if row["processes"] > 1]
                    look: dict[str, Any] = dict(color=COLOURS[method], linestyle=line, marker="o", markersize=4)
                    axis.plot(*zip(*points, strict=True), label=f"{method}, {layout}", **look)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("ranks")
            axis.set_xticks([size for size in sizes if size > 1])


@program("bench scaling")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    p = new_parser("bench scaling", __doc__)
    p.add_argument("--device", default="auto", help="auto (default: GPUs if there are any), cpu, cuda")
    p.add_argument("--processes", type=count, nargs="+", metavar="P", help="numbers of ranks (default 1 2 4)")
    sizes = dict(
        length="tokens in all", heads="query heads", kv_heads="key heads", head_dim="size of a head",
        repeats="measurements of each method",
    )  # fmt: skip
    for name, what in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=count, metavar="N", help=what)
    p.add_argument("--window", type=count, metavar="N", help="tokens that a query sees before it (default: all)")
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the results (%(default)s)")
    args = p.parse_args(arguments)
    device = parse_device(args.device)
    fill_in(args, BUDGETS[device.type])
    if device.type == "cuda" and max(args.processes) > torch.cuda.device_count():
        raise ValueError(f"--processes must be at most the {torch.cuda.device_count()} GPUs, got {max(args.processes)}")
    names = ("length", "heads", "kv_heads", "head_dim", "dtype", "repeats", "window")
    settings = Settings(**{name: getattr(args, name) for name in names}, device=device.type)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with locked(args.out, f"{settings.key}.json"):
        return measure_all(settings, device, args, arguments)


def measure_all(
    settings: Settings, device: torch.device, args: argparse.Namespace, arguments: Sequence[str] | None
) -> int:
    """Measure for each number of processes, and write, print and draw the results; return the exit status."""
    rows: list[dict[str, Any]] = []
    peers: dict[str, Any] = {}
    for size in args.processes:
        with TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(worker, (size, folder, settings), nprocs=size)
            measured = json.loads(Path(folder, "figures.json").read_text())
        rows += measured["rows"]
        peers |= measured["peers"]
    show(rows, peers)
    more = dict(device=device_name(device), torch=torch.__version__, rows=rows, torch_peers=peers)
    record = about("bench scaling", arguments, settings, stamp(), **more)
    path = args.out / f"{settings.key}.json"
    write_json(path, record)
    draw(path.with_suffix(".png"), record)
    print(f"written: {path}, {path.with_suffix('.png')}")
    return 0
