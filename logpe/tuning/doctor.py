"""``python -m logpe doctor``: what is installed here, which backend runs, with which tiles, and whether it is right."""

from __future__ import annotations

import os
import platform
import warnings
from typing import Any

import torch

import logpe
from logpe import ops

ALLOWED_ERROR = 1e-4  # of the largest value, in float32
#: Calls whose tiles are shown: bytes, head_dim, parts, tokens; causal.
TYPICAL = (
    (2, 64, ("power",), 4096),
    (2, 128, ("power",), 4096),
    (2, 128, ("power",), 65536),
    (2, 128, (), 4096),
    (2, 128, ("power", "sharpness", "alpha"), 4096),
    (4, 64, ("power",), 4096),
)


def line(name: str, text: object) -> None:
    """Print a row of the report."""
    print(f"{name:<14}{text}")


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``, what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser("doctor", help="print versions, devices, backends and tiles, and check them")
    parser.set_defaults(run=lambda options: int(doctor() > 0))


def doctor() -> int:
    """Print versions, devices, backends and configurations, and check each backend against the definition.

    Returns the number of checks that failed.
    """
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
            print_configs(device)
        for backend in (["blocked"] if device.type == "cpu" else []) + ([] if reason else ["triton"]):
            try:
                measured = _self_check(device, backend)
            except (RuntimeError, OSError) as error:  # torch and Triton: no memory, no compiler, a full disk, ...
                failures += 1
                line(f"  {backend}", f"FAILED: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                continue
            passed = measured <= ALLOWED_ERROR
            failures += not passed
            verdict = "right" if passed else "WRONG"
            line(f"  {backend}", f"{verdict}: error {measured:.1e} against float64, {ALLOWED_ERROR:.0e} allowed")
    return failures


def print_configs(device: torch.device) -> None:
    """Print which files there are for a device, which are refused and why, and what serves typical calls."""
    from logpe_kernels import configs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the refused ones are listed
        files = configs.files(device)
    name = configs.name_of(device)
    if name and not files.used and not files.refused:
        line("  tiles", f"not tuned: python -m logpe tune writes {configs.user_folder() / configs.file_name(name)}")
    for path, reason in files.refused.items():
        line("  REFUSED", f"{path}: {reason}")
    for path, tuned in files.used.items():
        line("  tiles", f"{path}: {len(tuned.entries)} entries")
        for note in _other_versions(tuned.runs):
            line("", note)
    target, why = configs.entry(device)
    line("  otherwise" if files.used else "  tiles", f"{configs.TABLE.name}, entry {target} ({why})")
    for itemsize, head_dim, parts, length in TYPICAL if name else ():
        traits = configs.traits(device, itemsize, head_dim, parts, True, length)
        print(f"  {itemsize} bytes, D {head_dim}, {'+'.join(parts) or 'no position'}, causal, {length} tokens")
        for kernel in configs.KERNELS:
            choice = configs.choose(kernel, traits)
            tile = configs.text_of(choice.config)
            print(f"    {kernel:<14}{tile}: {choice.file.name}, {choice.why}")


def _other_versions(runs: list[dict[str, str]]) -> list[str]:
    """Return notes on the runs of the tuner that had other versions than these."""
    import triton

    here = dict(torch=torch.__version__, triton=triton.__version__, logpe=logpe.__version__)
    notes = []
    for run in runs:
        other = [f"{name} {run.get(name, '?')}" for name, version in here.items() if run.get(name) != version]
        if other:
            notes.append(f"measured on {run.get('date', '?')} with {', '.join(other)}; used all the same")
    return notes


def _self_check(device: torch.device, backend: str) -> float:
    """Return the largest relative error of a small call in float32, forward and backward."""
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
