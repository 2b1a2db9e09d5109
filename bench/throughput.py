"""How fast attention with a log bias is, and how much memory it takes, beside its alternatives.

Causal self-attention on random inputs. Every point (method, length, direction) is timed in a process of its own, so
that its peak memory is its own too, and is on disk as soon as it is known.

    python -m bench.throughput
    python -m bench.throughput --lengths 512 2048 --methods logpe sdpa --minutes 5

What is compared:

* ``logpe``: log_attention with the learnable log bias, gradients of its parameters included.
* ``logpe-none``: log_attention without a position.
* ``eager``: the definition, one tensor operation after the other, with the same gradients.
* ``sdpa-dense``: F.scaled_dot_product_attention with the bias as an N x N tensor, formed beforehand and not timed, of
  which no gradient is taken.
* ``sdpa``: F.scaled_dot_product_attention without a bias.
* ``flex``: compiled flex_attention with the bias as a score_mod; its parameters are constants.

A point that fails, or would not fit in memory or in the time given, is a row that says so. Times on a CPU that is busy
otherwise say little; OMP_WAIT_POLICY=passive keeps their ratios right, because threads then do not spin for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import logpe
from logpe import reference

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("forward", "both")  # both: forward and backward
# A point is repeated for SECONDS, but at least MIN_REPEATS times unless that takes more than MOST_SECONDS.
SECONDS, MOST_SECONDS, MIN_REPEATS, MAX_REPEATS = 5, 60, 5, 50
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One point: what is run, on what."""

    method: str
    direction: str
    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def flops(self) -> float:
        """Of the products: two forward, and five backward; half of each is masked away."""
        products = 2 if self.direction == "forward" else 7
        return products * 2 * self.batch * self.heads * self.head_dim * self.length**2 / 2


@dataclass
class Inputs:
    """What the methods share: q, k, v and the cotangent of out, (B, H, N, D), and the position."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    position: logpe.LogPosition

    def power_and_rate(self) -> tuple[Tensor, Tensor]:
        """As constants, float32 (H,)."""
        power, rate = self.position.power, self.position.rate
        assert power is not None
        assert rate is not None
        return power.detach(), rate.detach()

    def dense_bias(self) -> Tensor:
        """(H, N, N) in the dtype of q, -inf above the diagonal."""
        power, rate = self.power_and_rate()
        n = torch.arange(self.q.shape[2], device=self.q.device)
        bias = torch.empty(len(power), len(n), len(n), dtype=self.q.dtype, device=self.q.device)
        for h in range(len(power)):  # one head at a time: only the bias itself is large
            distance = (n[:, None] - n).to(torch.float32)
            l = reference.log_distance(distance.clamp(min=0), rate[h])  # noqa: E741
            bias[h] = reference.distance_bias(l, power[h]).masked_fill_(distance < 0, -torch.inf)
        return bias


# --- the methods: each prepares what is not timed, and returns what is -------------------------------------------

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Method:
    """``squares``: N x N matrices per head that are held at once, forward and in both directions; float32."""

    prepare: Callable[[Inputs], Run]
    squares: tuple[int, int] = (0, 0)
    cpu_backward: bool = True


METHODS: dict[str, Method] = {}


def method(name: str, **options: Any) -> Callable[[Callable[[Inputs], Run]], Callable[[Inputs], Run]]:
    """Registers a method under the name that the command line and the tables use."""

    def register(prepare: Callable[[Inputs], Run]) -> Callable[[Inputs], Run]:
        METHODS[name] = Method(prepare, **options)
        return prepare

    return register


@method("logpe")
def _logpe(x: Inputs) -> Run:
    return lambda: logpe.log_attention(x.q, x.k, x.v, x.position, is_causal=True)


@method("logpe-none")
def _logpe_none(x: Inputs) -> Run:
    return lambda: logpe.log_attention(x.q, x.k, x.v, is_causal=True)


@method("eager", squares=(5, 6))
def _eager(x: Inputs) -> Run:
    return lambda: logpe.log_attention(x.q, x.k, x.v, x.position, is_causal=True, backend="reference")


@method("sdpa-dense", squares=(1, 2))
def _sdpa_dense(x: Inputs) -> Run:
    bias = x.dense_bias()[None]
    return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias)


@method("sdpa")
def _sdpa(x: Inputs) -> Run:
    return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)


@method("flex", cpu_backward=False)
def _flex(x: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    power, rate = x.power_and_rate()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - power[h] * torch.log1p(rate[h] * (i - j).abs())

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    length = x.q.shape[2]
    mask = create_block_mask(causal, None, None, length, length, device=str(x.q.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=mask)


# --- one point, in its own process --------------------------------------------------------------------------------


def make_inputs(case: Case) -> Inputs:
    """The same for every method."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    learn = case.direction == "both"
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=learn) for _ in range(3))
    position = logpe.LogPosition(case.heads, case.head_dim, "log-bias", learnable=learn, device=device)
    return Inputs(q, k, v, torch.randn_like(q), position)


def make_step(case: Case, inputs: Inputs) -> Callable[[], None]:
    """What is timed: forward, or forward and backward."""
    attention = METHODS[case.method].prepare(inputs)
    if case.direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                attention()

        return forward
    leaves = [inputs.q, inputs.k, inputs.v, *inputs.position.parameters()]

    def both() -> None:
        torch.autograd.grad(attention(), leaves, inputs.dout, allow_unused=True)

    return both


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Times in ms, taken for about so many seconds, and the peak memory in bytes beyond the inputs."""
    memory = Memory(case.device)
    small = Case(**{**asdict(case), "length": 128})
    make_step(small, make_inputs(small))()  # loads libraries, starts threads
    inputs = make_inputs(case)
    memory.begin()
    step = make_step(case, inputs)
    step()  # compiles, where anything is compiled
    memory.forget_peak()
    times: list[float] = []
    while not times or (
        len(times) < MAX_REPEATS
        and (len(times) < MIN_REPEATS or sum(times) < SECONDS)
        and sum(times) + times[-1] < seconds
    ):
        times.append(_time(step, case.device))
    p20, p50, p80 = (quantile(times, p) * 1e3 for p in (0.2, 0.5, 0.8))
    return dict(p20=p20, p50=p50, p80=p80, repeats=len(times), memory=memory.peak())


def _time(step: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def quantile(values: Iterable[float], p: float) -> float:
    """Linear between the nearest two."""
    values = sorted(values)
    place = p * (len(values) - 1)
    low = values[int(place)]
    return low + (place - int(place)) * (values[min(int(place) + 1, len(values) - 1)] - low)


class Memory:
    """The most memory in use, in bytes: of the process, or of torch's allocator on a GPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"
        self.before = 0

    def begin(self) -> None:
        """What is held now is not counted."""
        gc.collect()
        self.before = torch.cuda.memory_allocated() if self.gpu else _status("VmRSS")

    def forget_peak(self) -> None:
        """Count from here. Where Linux does not let us, the peak holds what came before, the compiler for one."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """None where it is not known."""
        highest = torch.cuda.max_memory_allocated() if self.gpu else _status("VmHWM")
        return max(0, highest - self.before) if highest else None


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# --- all points --------------------------------------------------------------------------------------------------


def run_case(case: Case, seconds: float) -> dict[str, Any]:
    """A row of the results: the measurement, or under "missing" the reason why there is none."""
    m = METHODS[case.method]
    if case.device == "cpu" and case.direction == "both" and not m.cpu_backward:
        return dict(missing="no backward on the CPU")
    needed = m.squares[DIRECTIONS.index(case.direction)] * case.batch * case.heads * case.length**2 * 4
    available = free_memory(case.device)
    if available and needed > 0.7 * available:  # others want some too
        return dict(missing=f"needs {needed / GIB:.0f} GiB, {available / GIB:.0f} are free")
    if seconds <= 0:
        return dict(missing="out of time")
    point = json.dumps([asdict(case), min(seconds / 2, MOST_SECONDS)])
    command = [sys.executable, "-m", "bench.throughput", "--point", point]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return dict(missing=f"took more than {seconds:.0f} s")
    if done.returncode < 0:
        return dict(missing=f"killed by signal {-done.returncode}: out of memory?")
    if done.returncode:
        return dict(missing="failed: " + (done.stderr.strip().splitlines() or ["?"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def free_memory(device: str) -> int:
    """In bytes; 0 if unknown."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def describe_machine(device: str) -> dict[str, Any]:
    """What the times depend on."""
    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        # What else kept it busy, and how threads wait: on a busy machine OMP_WAIT_POLICY=passive helps everyone.
        load=[round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))},
    )


def commit() -> str | None:
    """Of the repository that this file lies in, if any."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, data: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def table(points: list[dict[str, Any]], ours: str = "logpe") -> str:
    """Times of one run; the last column is each method's time over ours, so that above 1 we are the faster."""
    lines = []
    for direction in DIRECTIONS:
        for length in sorted({p["length"] for p in points if p["direction"] == direction}):
            rows = [p for p in points if (p["direction"], p["length"]) == (direction, length)]
            base = next((p["p50"] for p in rows if p["method"] == ours and "p50" in p), None)
            title = "forward" if direction == "forward" else "forward + backward"
            lines.append(f"\n{title}, {length} tokens")
            heads = "".join(f"{name:>10}" for name in ("p20 ms", "p50 ms", "p80 ms", "GFLOP/s", "MiB"))
            lines.append(f"  {'':12}{heads}{f'time / {ours}':>16}")
            for p in rows:
                if "missing" in p:
                    lines.append(f"  {p['method']:12}{p['missing']}")
                    continue
                memory = "?" if p["memory"] is None else f"{p['memory'] / 2**20:.0f}"
                ratio = "" if base is None else f"{p['p50'] / base:.2f}"
                speed = Case(**{name: p[name] for name in Case.__dataclass_fields__}).flops / p["p50"] / 1e6
                times = "".join(f"{p[name]:10.2f}" for name in ("p20", "p50", "p80"))
                lines.append(f"  {p['method']:12}{times}{speed:10.0f}{memory:>10}{ratio:>16}")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens")
    parser.add_argument("--long", type=int, nargs="*", default=[32768], help="lengths for logpe alone, both directions")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=15, help="stop after so long; default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes and prints everything that the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.point:
        case, seconds = json.loads(options.point)
        print(json.dumps(measure(Case(**case), seconds)))
        return
    shared = dict(batch=options.batch, heads=options.heads, head_dim=options.head_dim, dtype=options.dtype)
    shared["device"] = options.device
    cases = [
        Case(method, direction, length, **shared)
        for direction in DIRECTIONS
        for length in options.lengths
        for method in options.methods
    ]
    cases += [Case("logpe", "both", length, **shared) for length in options.long if "logpe" in options.methods]
    path = options.out / f"throughput-{options.device.split(':')[0]}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(format=FORMAT, runs=[])
    points: list[dict[str, Any]] = []
    data["runs"].append(
        dict(
            machine=describe_machine(options.device), commit=commit(), points=points,
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=shlex.join(["python", "-m", "bench.throughput", *arguments]),
        )
    )  # fmt: skip
    end = time.monotonic() + options.minutes * 60
    progress = tqdm(cases, unit="point", disable=None)
    for case in progress:
        progress.set_description(f"{case.method} {case.direction} {case.length}")
        points.append(asdict(case) | run_case(case, end - time.monotonic()))
        write(path, data)
    print("\n".join(f"{name}: {value}" for name, value in data["runs"][-1]["machine"].items()))
    print(table(points))
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
