"""What the GPU's own counters say of the main kernels: forward, dq and dk/dv at 8,192 tokens.

    python -m bench counters --out counters.json
    ncu --profile-from-start off python -m bench counters --calls     # make the calls under a profiler of your own

NVIDIA's profiler, ``ncu`` of Nsight Compute, runs each kernel many times and reads the counters. It must be installed,
and the driver must let users read counters (ERR_NVGPUCTRPERM says that it does not). Causal attention in bfloat16, one
call for each preset and head_dim. A line of the table is a kernel: its time; the warp instructions it issued for each
score element, and how many of them were special functions (``compile_report`` counts the same in the machine code of
the main loop); how busy the matrix unit, the special functions and the issue of instructions were; the warps that were
active, of those that a multiprocessor holds; registers; and why a warp waited, the three most frequent reasons, in
clocks for each instruction. Times are at the profiler's clocks, and caches are cold: ``throughput`` times better.
"""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import logpe
from bench import command
from bench.common import describe_machine
from bench.speed import runner

KERNELS = ("forward_kernel", "dq_kernel", "dkdv_kernel")  # in the order of their launches
LENGTH, TOKENS, HIDDEN = 8192, 16384, 2048
PRESETS, HEAD_DIMS = ("log-bias", "none"), (128, 64)
SECONDS = 300.0  # that the profiler may take

DURATION, ISSUED, SPECIAL = "gpu__time_duration.sum", "smsp__inst_executed.sum", "smsp__inst_executed_pipe_xu.sum"
BUSY = {
    "matrix": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "special": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
REGISTERS = "launch__registers_per_thread"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard"),
    *("sleeping", "tex_throttle", "wait"),
)
METRICS = (DURATION, ISSUED, SPECIAL, *BUSY.values(), REGISTERS, *map(STALL.format, STALLS))


class Call(NamedTuple):
    """A call of log_attention, forward and backward."""

    preset: str
    head_dim: int

    @property
    def heads(self) -> int:
        """The number of heads."""
        return HIDDEN // self.head_dim

    @property
    def scores(self) -> float:
        """The score elements that a causal mask leaves."""
        return TOKENS // LENGTH * self.heads * LENGTH * (LENGTH + 1) / 2


CALLS = tuple(itertools.starmap(Call, itertools.product(PRESETS, HEAD_DIMS)))


def make_calls(device: torch.device) -> None:
    """Make each call twice, and let the profiler see the second one, for which all is compiled."""
    for call in CALLS:
        size = (TOKENS // LENGTH, call.heads, LENGTH, call.head_dim)
        q, k, v = (torch.randn(size, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
        position = logpe.LogPosition(call.heads, call.head_dim, call.preset, device=device)
        leaves = [q, k, v, *position.parameters()]
        for profiled in (False, True):
            torch.cuda.synchronize(device)
            if profiled:
                torch.cuda.profiler.start()
            out = logpe.log_attention(q, k, v, position, is_causal=True)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            torch.cuda.synchronize(device)
            if profiled:
                torch.cuda.profiler.stop()


# --- the profiler -----------------------------------------------------------------------------------------------------


def profile(ncu: str, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each kernel of each call. Raises ValueError with what the profiler said if it fails."""
    metrics = list(METRICS)
    while True:
        status, table, said = run_ncu(ncu, metrics, device)
        missing = {name.split(".")[0] for name in re.findall(r"Failed to find metric\W*([\w.]+)", said)}
        known = [name for name in metrics if name.split(".")[0] not in missing]
        if len(known) == len(metrics):
            break
        metrics = known  # a GPU, or an older ncu, may lack some
    rows = parse(table)
    if status or len(rows) != len(CALLS) * len(KERNELS):
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing was printed"]
        why = next((line for line in lines if "ERROR" in line), lines[-1])
        raise ValueError(f"{ncu} ended with status {status} and {len(rows)} kernels: {why}")
    return rows


def run_ncu(ncu: str, metrics: Sequence[str], device: torch.device) -> tuple[int, str, str]:
    """Return the exit status, the CSV, and all that was said. Raises ValueError if it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        options = ["--csv", "--print-units", "base", "--log-file", str(log), "--profile-from-start", "off"]
        options += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--metrics", ",".join(metrics)]
        calls = [sys.executable, "-m", "bench", "counters", "--calls", "--device", str(device)]
        try:
            done = subprocess.run([ncu, *options, *calls], capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{ncu} took more than {SECONDS:.0f} s") from None
        table = log.read_text() if log.exists() else ""
    return done.returncode, table, table + done.stdout + done.stderr


def parse(text: str) -> list[dict[str, Any]]:
    """Return a row for each kernel: kernel, preset, head_dim, and its metrics by name, None for those it lacks.

    text: CSV as ncu writes it, a metric to a line, below lines of its own that start with ``==``.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines):
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"].removesuffix("_kernel")})
        value = line["Metric Value"].replace(",", "")
        launch[line["Metric Name"]] = None if value in ("", "n/a", "nan") else float(value)
    seen: dict[str, int] = {}
    for launch in launches.values():
        call = CALLS[seen.get(launch["kernel"], 0) % len(CALLS)]
        seen[launch["kernel"]] = seen.get(launch["kernel"], 0) + 1
        launch |= call._asdict()
    return list(launches.values())


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line for each kernel."""
    head = f"{'kernel':8} {'preset':9} {'D':>4} {'us':>7} {'issued':>7} {'special':>8}"
    head += "".join(f" {name + ' %':>9}" for name in BUSY) + f" {'registers':>10}  waits, clocks per instruction"
    lines = [head]
    for row in rows:
        scores = Call(row["preset"], row["head_dim"]).scores

        def number(name: str, scale: float = 1.0, digits: int = 1, row: dict[str, Any] = row) -> str:
            value = row.get(name)
            return "-" if value is None else f"{value * scale:.{digits}f}"

        waits = {name: row.get(STALL.format(name)) or 0.0 for name in STALLS}
        most = sorted(waits, key=lambda name: -waits[name])[:3]
        line = f"{row['kernel']:8} {row['preset']:9} {row['head_dim']:4} {number(DURATION, 1e-3):>7}"
        line += f" {number(ISSUED, 32 / scores):>7} {number(SPECIAL, 32 / scores):>8}"
        line += "".join(f" {number(name):>9}" for name in BUSY.values()) + f" {number(REGISTERS, digits=0):>10}"
        lines.append(line + "  " + ", ".join(f"{name} {waits[name]:.2f}" for name in most if waits[name]))
    return "\n".join(lines)


@command.program("bench counters")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = command.new_parser("bench counters", __doc__)
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counters to this JSON file")
    parser.add_argument("--calls", action="store_true", help="make the calls, and measure nothing")
    options = parser.parse_args(arguments)
    device = command.parse_device(options.device)
    if device.type != "cuda" or torch.version.hip:
        raise ValueError(f"counters are those of an NVIDIA GPU, and the device is {device}")
    if options.calls:
        make_calls(device)
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu (Nsight Compute) is not installed here: nothing was counted")
        return 0
    about = runner.circumstances("counters", arguments, describe_machine(device))
    rows = profile(ncu, device)
    if options.out is not None:
        runner.write_json(options.out, about | dict(length=LENGTH, tokens=TOKENS, hidden=HIDDEN, kernels=rows))
    print(table(rows), f"{len(rows)} kernels counted", sep="\n\n")
    return 0
