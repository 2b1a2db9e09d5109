"""``python -m logpe doctor``: what is installed here, which backend runs, with which tiles, and whether it is right.

``python -m logpe generate``: text from a converted Transformers model.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch

import logpe
from logpe import generate, ops

ALLOWED_ERROR = 1e-4  # of the largest value, in float32


def doctor() -> int:
    """Print versions, devices, backends and configurations, and check each backend against the definition.

    Returns the number of checks that failed.
    """

    def line(name: str, text: object) -> None:
        print(f"{name:<14}{text}")

    line("logpe", logpe.__version__)
    line("python", f"{platform.python_version()} on {platform.platform()}")
    line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        import triton

        line("triton", triton.__version__ + (" (interpreted: TRITON_INTERPRET=1)" if ops.interpreting() else ""))
    except ImportError as error:
        line("triton", f"none: {error}")

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    failures = 0
    for device in devices:
        print()
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            line(str(device), f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        else:
            line("cpu", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
        reason = ops.why_not_triton(device)
        line("  auto takes", "triton" if device.type == "cuda" else "blocked")
        line("  triton", f"cannot run: {reason}" if reason else "can run")
        if reason is None:
            _print_configs(device)
        for backend in (["blocked"] if device.type == "cpu" else []) + ([] if reason else ["triton"]):
            measured = _self_check(device, backend)
            passed = measured <= ALLOWED_ERROR
            failures += not passed
            verdict = "right" if passed else "WRONG"
            line(f"  {backend}", f"{verdict}: error {measured:.1e} against float64, {ALLOWED_ERROR:.0e} allowed")
    return failures


def _print_configs(device: torch.device) -> None:
    from logpe_kernels import configs

    target, why = configs.entry(device)
    print(f"{'  tiles':<14}{configs.TABLE.name}, entry {target} ({why})")
    for kernel in configs.KERNELS:
        shipped = {head_dim: configs.shipped(kernel, target, 2, head_dim) for head_dim in (64, 128)}
        tiles = [f"D{d}: {c.BLOCK_M}x{c.BLOCK_N}, {c.num_warps}w {c.num_stages}s" for d, c in shipped.items()]
        print(f"{'':<14}{kernel:<15}{'; '.join(tiles)}")


def _self_check(device: torch.device, backend: str) -> float:
    """Largest relative error of a small call in float32, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    position = logpe.LogPosition(4, 32, "log-rotary-bias", query_gain=True, device=device)
    inputs = [torch.randn(1, heads, 50, 32, generator=generator) for heads in (4, 2, 2)]

    def run(dtype: torch.dtype, name: str) -> list[torch.Tensor]:
        q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in inputs)
        module = position.double() if dtype == torch.float64 else position.float()
        module.zero_grad()
        out = logpe.log_attention(q, k, v, module, is_causal=True, backend=name)
        out.square().sum().backward()
        gradients = [p.grad.double().clone() for p in (q, k, v, *module.parameters()) if p.grad is not None]
        return [out.detach().double(), *gradients]

    pairs = list(zip(run(torch.float32, backend), run(torch.float64, "reference"), strict=True))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m logpe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, devices, backends and tiles, and check them")
    generate.add_parser(commands)
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen) if "run" in chosen else 1 if doctor() else 0


if __name__ == "__main__":
    sys.exit(main())
