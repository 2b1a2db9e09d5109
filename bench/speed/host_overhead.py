"""Host time of one short call of log_attention, forward under autograd, and what each of its layers costs.

    python -m bench host_overhead
    python -m bench host_overhead --profile      # and the functions that take it

Every step of the ladder is a call that includes the steps above it, down to the whole of
log_attention(q, k, v, position). Calls are repeated, as a model repeats them: what is known of one is looked up. On a
GPU the host is timed alone, without waiting for the device, and so is the replay of a CUDA graph of the same call.
Without a GPU the kernels are compiled for sm_90 and everything runs up to the driver: the compiled kernel is found,
then its launch is left out; tensors lie on the CPU, so that allocations, softplus and F.scaled_dot_product_attention
are those of the CPU. What is and is not in a number stands beside it.
"""

from __future__ import annotations

import contextlib
import cProfile
import gc
import importlib
import json
import os
import pstats
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from logpe_kernels.options import Options
from tqdm import tqdm

import logpe
from bench import command
from bench.common import commit, describe_machine, load, quantile, write_whole
from logpe import ops

CALLS = 20  # timed together: so short that on a busy machine some blocks run undisturbed
MOST_US, MOST_RATIO = 60, 5  # the target: microseconds, and times F.scaled_dot_product_attention
STUBBED = "H100 (sm_90), launches left out"
WHOLE, SDPA = "log_attention(q, k, v, position)", "F.scaled_dot_product_attention"

Call = Callable[[], Any]


def nothing(*args: Any, **keywords: Any) -> None:
    """In place of what is left out."""


class NoDevice:
    """Triton's driver of a GPU that is not there: kernels are compiled for sm_90, and launching one does nothing."""

    class utils:  # noqa: D106 # Triton's name
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 227 * 1024})
        load_binary = staticmethod(lambda *args: (None, object(), 0, 0, 1024))  # no module, which nobody could unload

    launcher_cls = staticmethod(lambda source, metadata: nothing)

    def get_current_device(self) -> int:
        """No other driver's number: Triton keeps kernels by it."""
        return 90

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """An H100."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors lie."""
        return torch.device("cpu")


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """log_attention takes its path for a GPU with tensors that lie on the CPU, up to the launch."""
    from logpe_kernels import configs, plan
    from triton.runtime import driver

    def target(device: torch.device) -> str:
        return "sm_90"

    def forget() -> None:
        plan.clear()
        for function in vars(configs).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    with contextlib.ExitStack() as stack:
        stack.callback(forget)
        stack.callback(driver.set_active, driver._active)
        stack.enter_context(mock.patch.object(ops, "why_not_triton", nothing))
        stack.enter_context(mock.patch.object(configs, "target_of", target))
        driver.set_active(NoDevice())
        forget()
        yield


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Kernels are not even looked up."""
    with mock.patch.object(importlib.import_module("logpe_kernels.forward"), "launch", nothing):
        yield


@contextlib.contextmanager
def without_launch() -> Iterator[None]:
    """Kernels are looked up, and not launched."""
    from triton.compiler import CompiledKernel

    with mock.patch.object(CompiledKernel, "run", property(lambda kernel: nothing)):
        yield


# --- what is timed ----------------------------------------------------------------------------------------------------


def ladder(device: torch.device, length: int, heads: int, head_dim: int) -> dict[str, tuple[Call, Any]]:
    """Calls in the order of what they include, each with the context that it is timed in; then what stands beside."""
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
        "launcher: problem, outputs, tile sizes": (kernels, without_triton),
        "+ the compiled kernel found": (kernels, without_launch),
        "+ the launch": (kernels, here),
        "+ autograd": (differentiable, here),
        "+ validation: log_attention(q, k, v, values)": (attend(values), here),
        f"+ softplus: {WHOLE}": (attend(position), here),
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
    """Microseconds of a call: the least, p50 and p80 of so many blocks of calls; the steps take turns."""

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
    return {name: [quantile(some, p) for p in (0.0, 0.5, 0.8)] for name, some in times.items()}


def profile(call: Call, calls: int = 3000, most: int = 30) -> None:
    """Print the functions that a call spends its time in."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    print(f"\n{calls} calls, slowed down by the profiler")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(most)


def table(found: dict[str, list[float]]) -> str:
    """Times, and what each step of the ladder adds to the least: what else runs on the machine only adds."""
    width = max(map(len, found)) + 2
    lines = [f"{'microseconds of host time':{width}}{'least':>8}{'p50':>8}{'p80':>8}{'adds':>8}"]
    previous = 0.0
    for name, (least, p50, p80) in found.items():
        step = name.startswith(("launcher", "+"))
        lines.append(f"{name:{width}}{least:8.1f}{p50:8.1f}{p80:8.1f}" + (f"{least - previous:8.1f}" if step else ""))
        previous = least
    return "\n".join(lines)


def verdict(found: dict[str, list[float]], gpu: bool) -> str:
    """Of the target, by the medians; without a GPU an indication by the least."""
    whole, sdpa = (found[name][1 if gpu else 0] for name in (f"+ softplus: {WHOLE}", SDPA))
    text = f"{whole:.0f} us, {whole / sdpa:.1f} times {SDPA}; target: {MOST_US} us and {MOST_RATIO} times"
    if not gpu:
        return f"not measured (no GPU; an indication: {text})"
    return f"{'met' if whole <= MOST_US and whole <= MOST_RATIO * sdpa else 'missed'}: {text}"


@command.program("bench host_overhead")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command.new_parser("bench host_overhead", __doc__)
    for name, default, text in (
        ("--length", 128, "tokens"),
        ("--heads", 16, "of one sequence"),
        ("--head-dim", 64, "of a head"),
        ("--rounds", 100, f"blocks of {CALLS} calls of each step"),
    ):
        parser.add_argument(name, type=command.count, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    parser.add_argument("--profile", action="store_true", help="also print where log_attention spends its time")
    parser.add_argument("--out", type=Path, help="write it to this JSON file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: there is nothing to launch when interpreting")
    device = command.parse_device(options.device)
    gpu = device.type == "cuda"
    machine = describe_machine(device)
    with torch.cuda.device(device) if gpu else no_device():
        steps = ladder(device, options.length, options.heads, options.head_dim)
        found = measure(steps, options.rounds, device)
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
        print(table(found))
        print(f"\ntarget {verdict(found, gpu)}")
        if options.profile:
            profile(steps[f"+ softplus: {WHOLE}"][0])
    if options.out:
        content = dict(
            machine=machine | dict(launch="measured" if gpu else STUBBED),
            load=load(),
            commit=commit(),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=shlex.join(["python", "-m", "bench", "host_overhead", *arguments]),
            size=size,
            microseconds={name: dict(zip(("least", "p50", "p80"), some, strict=True)) for name, some in found.items()},
            target=verdict(found, gpu),
        )
        write_whole(options.out, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
    return 0
