"""What the benches share: files that are whole, and what a number depends on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from logpe import files
from logpe.tuning.tune import driver_version
from logpe.worker import one_line

# --- files ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The file at `path`, in a folder that is made, is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, write)


@contextlib.contextmanager
def reading(path: Path, option: str = "--out") -> Iterator[None]:
    """Raise ValueError, which names the file and says what to do, where what is read inside is not as expected."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{path} is damaged or holds something else: move it away, or give another {option}"
        raise ValueError(f"{message} ({one_line(error)})") from None


# --- what a number depends on ---------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the code that runs, or "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a time depends on, but for the code and what else keeps the machine busy (see load_averages)."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    about: dict[str, Any] = dict(device=device_name(device))
    if device.type == "cuda":
        about |= dict(
            driver=driver_version(),
            cuda=torch.version.cuda or torch.version.hip,
            cudnn=torch.backends.cudnn.version(),
        )
    return about | dict(
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        # How threads wait: on a busy machine OMP_WAIT_POLICY=passive helps everyone.
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))},
    )


def load_averages() -> list[float] | None:
    """Return the load averages of the last 1, 5 and 15 minutes; None where the system does not tell them."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
