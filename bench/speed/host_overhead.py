"""Host time of one short call of log_attention, forward under autograd, and what each of its layers costs.

    python -m bench host_overhead
    python -m bench host_overhead --profile      # and the functions that take the time

Each step of the ladder is a call that includes the steps above it; the last is log_attention(q, k, v, position) as a
whole. Calls are repeated, as a model repeats them, so that what is known of one is looked up. On a GPU the host alone
is timed, without waiting for the device, and so is the replay of a CUDA graph of the same call. Without a GPU the
kernels are compiled for sm_90, and everything runs up to the driver: the compiled kernel is looked up, and its launch
is left out. Tensors then lie on the CPU, and so allocations, softplus and F.scaled_dot_product_attention are the CPU's.
"""

from __future__ import annotations

import contextlib
import cProfile
import gc
import importlib
import os
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from logpe_kernels.options import Options
from tqdm import tqdm

import logpe
from bench import command
from bench.common import describe_machine
from bench.speed import runner
from bench.speed.compile_report import Driver
from logpe import ops

CALLS = 20  # timed together: so short that on a busy machine some blocks run undisturbed
STUBBED = "H100 (sm_90), launches left out"
WHOLE = "+ softplus: log_attention(q, k, v, position)"
SDPA = "F.scaled_dot_product_attention"

Call = Callable[[], Any]


def nothing(*args: Any, **keywords: Any) -> None:
    """Stand in for what is left out."""


class NoDevice(Driver):
    """Triton's driver of a GPU that is not there: kernels are compiled for sm_90, and launching one does nothing."""

    class utils:  # noqa: D106 # Triton's name
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 227 * 1024})
        load_binary = staticmethod(lambda *args: (None, object(), 0, 0, 1024))  # no module, which nobody could unload

    launcher_cls = staticmethod(lambda source, metadata: nothing)

    def __init__(self) -> None:
        super().__init__("sm_90")

    def get_current_device(self) -> int:
        """Return a number that no other driver has: Triton keeps kernels by it."""
        return 90

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors lie."""
        return torch.device("cpu")


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Let log_attention take its path for a GPU with tensors that lie on the CPU, up to the launch."""
    from logpe_kernels import configs, plan
    from triton.runtime import driver

    def target(device: torch.device) -> str:
        return "sm_90"

    with contextlib.ExitStack() as stack:
        stack.callback(plan.clear)
        stack.callback(driver.set_active, driver._active)
        stack.enter_context(mock.patch.object(ops, "why_not_triton", nothing))
        stack.enter_context(mock.patch.object(configs, "target_of", target))
        driver.set_active(NoDevice())
        plan.clear()
        yield


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Do not even look up kernels."""
    with mock.patch.object(importlib.import_module("logpe_kernels.forward"), "launch", nothing):
        yield


@contextlib.contextmanager
def without_launch() -> Iterator[None]:
    """Look up kernels, but do not launch them."""
    from triton.compiler import CompiledKernel

    with mock.patch.object(CompiledKernel, "run", property(lambda kernel: nothing)):
        yield


# --- what is timed ----------------------------------------------------------------------------------------------------


def ladder(device: torch.device, length: int, heads: int, head_dim: int) -> dict[str, tuple[Call, Any]]:
    """Return calls, each with the context that it is timed in: first the ladder, then what it is compared with."""
    from logpe_kernels.forward import attention
    from logpe_kernels.plan import plan_of

    q, k, v = (
        torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for _ in range(3)
    )
    position = logpe.LogPosition(heads, head_dim, "log-bias", device=device)
    values = position()
    options = Options(**values._asdict(), window_right=0, scale=head_dim**-0.5)
    plan = plan_of(q, k, v, options)  # which log_attention has for a call like an earlier one
    # A CPU kernel takes its time in the call: as little of it as there can be.
    x, y, z = (t if device.type == "cuda" else t[:, :1, :1].detach().requires_grad_() for t in (q, k, v))

    def kernels() -> Any:
        return attention(q, k, v, options, plan)

    def differentiable() -> Any:
        return ops.run(q, k, v, options, "triton", plan)

    def operator() -> Any:
        return torch.ops.logpe.attention(q, k, v, *options, "triton")

    def attend(at: Any) -> Call:
        return lambda: logpe.log_attention(q, k, v, at, is_causal=True, backend="triton")

    def replay(call: Call) -> Call:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            call()
        return graph.replay

    here = contextlib.nullcontext
    steps: dict[str, tuple[Call, Any]] = {
        "launcher: plan, outputs, tile sizes": (kernels, without_triton),
        "+ the compiled kernel found": (kernels, without_launch),
        "+ the launch": (kernels, here),
        "+ autograd": (differentiable, here),
        "+ validation: log_attention(q, k, v, values)": (attend(values), here),
        WHOLE: (attend(position), here),
        "position()": (position, here),
        "log_attention(q, k, v)": (attend(None), here),
        "the operator, as compiled graphs call it": (operator, here),
        SDPA: (lambda: F.scaled_dot_product_attention(x, y, z, is_causal=True), here),
    }
    if device.type == "cuda":
        steps["CUDA graph of log_attention, replayed"] = (replay(attend(position)), here)
    else:
        del steps["+ the launch"]
    return steps


def measure(steps: dict[str, tuple[Call, Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the microseconds of a call: the least, p50 and p80 of so many blocks of calls; the steps take turns."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for call, _ in steps.values():
        call()  # compiles; under no stub, since what a stub returns would be kept
    gc.disable()
    try:
        for _ in tqdm(range(rounds), unit="round", disable=None):
            for name, (call, context) in steps.items():
                wait()
                with context():
                    call()
                    begin = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    finally:
        gc.enable()
    wait()
    return {name: np.percentile(some, [0, 50, 80]).tolist() for name, some in times.items()}


def profile(call: Call, calls: int = 3000, most: int = 30) -> None:
    """Print the functions that a call spends its time in."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    print(f"\n{calls} calls, slowed down by the profiler")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(most)


def table(times: dict[str, list[float]]) -> str:
    """Return the times, and what each step of the ladder adds to the least: what else runs on the machine only adds."""
    width = max(map(len, times)) + 2
    lines = [f"{'microseconds of host time':{width}}{'least':>8}{'p50':>8}{'p80':>8}{'adds':>8}"]
    previous = 0.0
    for name, (least, p50, p80) in times.items():
        step = name.startswith(("launcher", "+"))
        lines.append(f"{name:{width}}{least:8.1f}{p50:8.1f}{p80:8.1f}" + (f"{least - previous:8.1f}" if step else ""))
        previous = least
    return "\n".join(lines)


@command.program("bench host_overhead")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write what the command line asks for; return the exit status."""
    parser = command.new_parser("bench host_overhead", __doc__)
    for name, default, text in (
        ("--length", 128, "tokens of the one sequence"),
        ("--heads", 16, "heads"),
        ("--head-dim", 64, "dimensions of a head"),
        ("--rounds", 100, f"blocks of {CALLS} calls of each step"),
    ):
        parser.add_argument(name, type=command.count, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    parser.add_argument("--profile", action="store_true", help="also print where log_attention spends its time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the times to this JSON file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: there is nothing to launch when interpreting")
    device = command.parse_device(options.device)
    gpu = device.type == "cuda"
    machine = describe_machine(device)
    with torch.cuda.device(device) if gpu else no_device():
        steps = ladder(device, options.length, options.heads, options.head_dim)
        times = measure(steps, options.rounds, device)
        print("\n".join(f"{name}: {value}" for name, value in machine.items()))
        size = f"1 x {options.heads} heads x {options.length} tokens x {options.head_dim}, bfloat16, causal"
        print(f"\nlog-bias, {size}, forward under autograd")
        if gpu:
            print("Host time, without waiting for the GPU; the graph replays a forward pass with its softplus.\n")
        else:
            print(
                "No GPU: Triton works as for sm_90, the launch is left out, and there is no CUDA graph. Allocations,\n"
                f"softplus and {SDPA} (one head, one token) are the CPU's.\n"
            )
        print(table(times))
        if options.profile:
            profile(steps[WHOLE][0])
    microseconds = {name: dict(zip(("least", "p50", "p80"), some, strict=True)) for name, some in times.items()}
    which = "p50" if gpu else "least"
    whole, sdpa = (microseconds[name][which] for name in (WHOLE, SDPA))
    text = "" if gpu else ", without the launch"
    print(f"\nlog_attention takes {whole:.0f} us of host time{text}, {whole / sdpa:.1f} times {SDPA} ({which})")
    if options.out:
        machine |= dict(launch="measured" if gpu else STUBBED)
        about = runner.circumstances("host_overhead", arguments, machine)
        runner.write_json(options.out, about | dict(size=size, microseconds=microseconds))
    return 0
