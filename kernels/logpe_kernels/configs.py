"""Which tile sizes a kernel uses on a device: shipped tables, found by target, dtype and head_dim."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNELS = ("forward", "backward_dq", "backward_dkdv")


class Config(NamedTuple):
    """Tile sizes of one launch. The tile is [BLOCK_M, BLOCK_N]: queries by keys, in every kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


_override: dict[str, Config] = {}


@functools.cache
def target_of(device: torch.device) -> str:
    """sm_90, gfx942, ... of a GPU; "cpu" where the kernels are interpreted."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


TABLE = Path(__file__).parent / "configs" / "default.json"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@functools.cache
def entry(device: torch.device) -> tuple[str, str]:
    """Which entry of the table serves a device, and why."""
    target = target_of(device)
    if target == "cpu":
        return target, "the interpreter uses one small tile"
    if target in _table():
        return target, "listed"
    if target.startswith("gfx"):
        return "gfx942", f"{target} is not listed; the entry for AMD"
    # An unknown NVIDIA GPU: what matters is whether the tiles fit its shared memory.
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    nearest = "sm_80" if shared >= 160 * 1024 else "sm_89"
    return nearest, f"{target} is not listed; the entry whose tiles fit {shared // 1024} KiB of shared memory"


def shipped(kernel: str, target: str, itemsize: int, head_dim: int, heavy: bool = False) -> Config:
    """The shipped configuration: table[target][kernel][itemsize][head_dim rounded up to a power of two].

    An entry is one configuration, or a light and a heavy one; heavy are calls with a sharpness, a query gain, a
    key bias, or a head_dim that is no power of two.
    """
    if target == "cpu":
        return Config(32, 32, 4, 1)
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    found = _table()[target][kernel][str(min(itemsize, 4))][str(block_d)]
    return Config(*(found["heavy" if heavy else "light"] if isinstance(found, dict) else found))


@functools.cache
def _cached(kernel: str, device: torch.device, itemsize: int, head_dim: int, heavy: bool) -> Config:
    return shipped(kernel, entry(device)[0], itemsize, head_dim, heavy)


def lookup(kernel: str, x: Tensor, head_dim: int, heavy: bool = False) -> Config:
    """The configuration of ``kernel`` (one of KERNELS) for tensors like x."""
    if _override:
        return _override[kernel]
    return _cached(kernel, x.device, x.element_size(), head_dim, heavy)


@contextlib.contextmanager
def override(*configs: Config) -> Iterator[None]:
    """Use one configuration for every kernel, or one for each of KERNELS, instead of the tables."""
    if len(configs) == 1:
        configs = configs * len(KERNELS)
    before = dict(_override)
    _override.update(zip(KERNELS, configs, strict=True))
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
