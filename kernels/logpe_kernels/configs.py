"""Which tile sizes a kernel uses: measured ones where a file has them, else a shipped table's.

``python -m logpe tune`` measures a device and writes a file. The configuration of a call is taken from

1. the user's file for the device, in :func:`user_folder`;
2. the file shipped for the device, in configs/;
3. the shipped table configs/default.json, by target: what is right everywhere, measured or not.

Of the entries in a file that fit (same kernel, dtype size, head_dim, parts and mask) the nearest in length is taken.
A file that is damaged or of another device is not used, with a warning. Nothing is measured on the way, and a
configuration is looked up once for calls that have their traits in common.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """How one kernel is launched. The tile is [BLOCK_M, BLOCK_N]: queries by keys, in every kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    TMA: bool = False  # full tiles come through tensor descriptors: sm_90 and later
    SEPARATE: bool = False  # dk/dv: two launches, each with one sum in registers, and the scores formed twice
    SPECIALIZED: bool = False  # calls that it can do go to the kernel in hopper.py: forward, sm_90

    def launch(self) -> dict[str, Any]:
        """Return the keywords of a launch. The flags are none of them: they choose a kernel, or what it is given."""
        return {name: value for name, value in self._asdict().items() if not isinstance(value, bool)}


def text_of(config: Any) -> str:
    """Return a line for people: BLOCK_M=128 BLOCK_N=64 num_warps=8 num_stages=2; a flag that is off is left out."""
    return " ".join(f"{name}={value}" for name, value in config._asdict().items() if value is not False)


#: The kernels that are configured, each with what the interpreter uses: its type says which fields the kernel takes.
KERNELS: dict[str, Any] = {
    "forward": Config(32, 32, 4, 1),
    "backward_dq": Config(32, 32, 4, 1),
    "backward_dkdv": Config(32, 32, 4, 1),
}
#: The values of the fields that are numbers.
ALLOWED = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
}
#: What a call may bring that makes a kernel heavier; fields of Traits.
PARTS = ("power", "sharpness", "alpha", "key_bias")


class Traits(NamedTuple):
    """What decides which configuration is fast for a call. Cheap to make, and to look up."""

    device: torch.device
    itemsize: int
    head_dim: int  # the larger of that of q and k and that of v
    wide_values: bool = False  # v's rows take at least four times the columns of those of q and k
    power: bool = False  # power and rate
    sharpness: bool = False
    alpha: bool = False
    key_bias: bool = False
    causal: bool = False
    log2_length: int = 12  # of the longer of queries and keys, rounded up: a length is no new key

    @property
    def parts(self) -> list[str]:
        """Return those of PARTS that are there."""
        return [part for part in PARTS if getattr(self, part)]

    @property
    def ragged(self) -> bool:
        """Whether the rows of a tile are wider than head_dim."""
        return self.head_dim & (self.head_dim - 1) != 0

    @property
    def heavy(self) -> bool:
        """Whether an element (two more parts, a bias) or an address (odd rows) takes more registers."""
        return self.sharpness or self.alpha or self.key_bias or self.ragged

    @property
    def form(self) -> tuple[Any, ...]:
        """Return what calls that share a measurement have in common: all but the device and the length."""
        return self.itemsize, padded(self.head_dim), self.ragged, tuple(self.parts), self.causal


def log2_length(num_queries: int, num_keys: int) -> int:
    """Return the field of Traits, the bits of the longer length: 12 for 2049 to 4096."""
    return (max(num_queries, num_keys, 1) - 1).bit_length()


def traits(
    device: torch.device, itemsize: int, head_dim: int, parts: Iterable[str], causal: bool, length: int
) -> Traits:
    """Return the traits of self-attention over ``length`` tokens, where the parts are known by name."""
    present = dict.fromkeys(parts, True)
    return Traits(device, itemsize, head_dim, **present, causal=causal, log2_length=log2_length(length, length))


class Choice(NamedTuple):
    """A configuration, the file that it stands in, and where there and why."""

    config: Any
    file: Path
    why: str


# ---- devices -------------------------------------------------------------------------------------------------------


@functools.cache
def target_of(device: torch.device) -> str:
    """Return the target of a GPU, sm_90, gfx942, ...; "cpu" where the kernels are interpreted."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_tma(target: str) -> bool:
    """Whether a target has tensor descriptors: sm_90 and later."""
    return target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90


@functools.cache
def name_of(device: torch.device) -> str | None:
    """Return the name by which a GPU's files are found; None for anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use; 0 if unknown."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return next((getattr(properties, name) for name in names if getattr(properties, name, 0)), 0)


# ---- the shipped table ---------------------------------------------------------------------------------------------

SHIPPED = Path(__file__).parent / "configs"
TABLE = SHIPPED / "default.json"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@functools.cache
def entry(device: torch.device) -> tuple[str, str]:
    """Return which entry of the table serves a device, and why."""
    target = target_of(device)
    if target == "cpu":
        return target, "the interpreter uses one small tile"
    if target in _table():
        return target, "listed"
    if target.startswith("gfx"):
        return "gfx942", f"{target} is not listed; the entry for AMD"
    # An unknown NVIDIA GPU: what matters is whether the tiles fit its shared memory.
    shared = shared_memory(device)
    nearest = "sm_80" if shared >= 160 * 1024 else "sm_89"
    return nearest, f"{target} is not listed; the entry whose tiles fit {shared // 1024} KiB of shared memory"


def shipped(
    kernel: str, target: str, itemsize: int, head_dim: int, heavy: bool = False, wide_values: bool = False
) -> Any:
    """Return the shipped configuration: table[target][kernel][itemsize][head_dim rounded up to a power of two].

    An entry is one configuration, or a light one and one for heavy calls, for those with wide values or for both.
    Heavy are calls with a sharpness, a query gain, a key bias, or a head_dim that is no power of two. With other tiles,
    wide values of 256 columns make the compiler spill kilobytes in dk/dv, and warps repeat each other's products in dq.
    """
    if target == "cpu":
        return KERNELS[kernel]
    entry = _table()[target][kernel][str(min(itemsize, 4))][str(padded(head_dim))]
    if isinstance(entry, dict) and "light" in entry:
        special = dict(wide_values=wide_values, heavy=heavy)
        entry = next((entry[name] for name, wanted in special.items() if wanted and name in entry), entry["light"])
    return make_config(kernel, entry)


def padded(head_dim: int) -> int:
    """Return BLOCK_D or BLOCK_DV: a head_dim rounded up to a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


# ---- files of measured configurations ------------------------------------------------------------------------------

FORMAT = 1


class Entry(NamedTuple):
    """The fastest configuration found for calls that have their traits in common, and how it was found.

    parts: of PARTS. length: of queries and keys. milliseconds: of ``config``; default: the shipped one that it was
    compared with. tried: [configuration, milliseconds or the reason why there are none]. run: index into Tuned.runs.
    """

    kernel: str
    itemsize: int
    head_dim: int
    parts: list[str]
    causal: bool
    length: int
    batch: int
    heads: int
    kv_heads: int
    config: Any
    milliseconds: float
    default: Any
    default_milliseconds: float
    tried: list[Any]
    run: int

    def traits(self, device: torch.device) -> Traits:
        """Return the traits of the call that was measured."""
        return traits(device, self.itemsize, self.head_dim, self.parts, self.causal, self.length)


class Tuned(NamedTuple):
    """What a file of measured configurations holds. runs: the date, command and versions of each run of the tuner."""

    device: str
    target: str
    runs: list[dict[str, str]]
    entries: list[Entry]


def user_folder() -> Path:
    """Return $LOGPE_CONFIG_DIR, or logpe in the user's cache directory ($XDG_CACHE_HOME or ~/.cache)."""
    if folder := os.environ.get("LOGPE_CONFIG_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "logpe")


def file_name(device_name: str) -> str:
    """Return the name of a device's file, such as NVIDIA-H100-80GB-HBM3.json."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-") + ".json"


def read(path: Path, device: torch.device) -> Tuned:
    """Return what the file holds, checked to be for ``device``.

    Raises OSError where it cannot be read, and ValueError, which says why, where it cannot be used.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    _check_fields(content, {"format", *Tuned._fields}, "the file")
    name, target = name_of(device), target_of(device)
    if (content["device"], content["target"]) != (name, target):
        raise ValueError(f"it is for {content['device']} ({content['target']}), this is {name} ({target})")
    runs = content["runs"]
    if not isinstance(runs, list) or not all(
        isinstance(run, dict) and all(isinstance(text, str) for text in run.values()) for run in runs
    ):
        raise ValueError("runs must be a list of objects of strings")
    if not isinstance(content["entries"], list):
        raise ValueError("entries must be a list")
    entries = []
    for index, item in enumerate(content["entries"]):
        try:
            entries.append(_read_entry(item, len(runs), device))
        except ValueError as error:
            raise ValueError(f"entry {index}: {error}") from error
    return Tuned(name or "", target, runs, entries)


def write(path: Path, tuned: Tuned) -> None:
    """Write all of it or nothing; a line for each entry."""
    head = json.dumps({"format": FORMAT, **tuned._replace(entries=[])._asdict()}, indent=1)
    lines = ",\n".join(f"  {json.dumps(x._asdict())}" for x in tuned.entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(head.replace('"entries": []', f'"entries": [\n{lines}\n ]') + "\n")
    os.replace(file.name, path)


def make_config(kernel: str, value: Any) -> Any:
    """Return a configuration that JSON has as a list of the leading fields or as an object; else raise ValueError."""
    model = KERNELS[kernel]
    try:
        return type(model)(**value) if isinstance(value, dict) else type(model)(*value)
    except TypeError as error:
        raise ValueError(f"{value} is no configuration of {kernel}: {error}") from error


def check_values(kernel: str, config: Any) -> None:
    """Raise ValueError where a field has a value that no target could launch."""
    for name, x in config._asdict().items():
        allowed = (False, True) if isinstance(getattr(KERNELS[kernel], name), bool) else ALLOWED[name]
        if type(x) is not type(allowed[0]) or x not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {x!r}")


def cannot_launch(kernel: str, config: Any, itemsize: int, head_dim: int, target: str, shared: int) -> str | None:
    """Return why a target with so many bytes of shared memory (0: unknown) surely cannot; None if it may."""
    if getattr(config, "TMA", False) and not has_tma(target):
        return f"TMA needs sm_90 or later, this is {target}"
    if getattr(config, "SEPARATE", False) and kernel != "backward_dkdv":
        return f"SEPARATE is for backward_dkdv, this is {kernel}"
    if getattr(config, "SPECIALIZED", False):
        wanted = dict(
            target=(target, "sm_90"), kernel=(kernel, "forward"), itemsize=(itemsize, 2), TMA=(config.TMA, False),
            BLOCK_M=(config.BLOCK_M, 128), num_warps=(config.num_warps, 8),
        )  # fmt: skip
        for name, (value, needed) in wanted.items():
            if value != needed:
                return f"SPECIALIZED needs {name} {needed}, this is {value}"
        if config.BLOCK_N < 64 or not 64 <= padded(head_dim) <= 128:
            return "SPECIALIZED needs BLOCK_N of 64 or more, and head_dims from 33 to 128"
    # At the least: the two tiles that the loop streams, but for the stage which the products read from registers.
    rows = config.BLOCK_M if kernel == "backward_dkdv" else config.BLOCK_N
    needed = max(1, 2 * (config.num_stages - 1)) * rows * padded(head_dim) * itemsize
    if 0 < shared < needed:
        return f"it takes {needed} bytes of shared memory or more, {target} has {shared}"
    return None


def _check_fields(content: Any, fields: set[str], what: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be an object, got {content!r}")
    if unknown := set(content) - fields:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    if missing := fields - set(content):
        raise ValueError(f"fields {sorted(missing)} are missing")


def _read_entry(item: Any, runs: int, device: torch.device) -> Entry:
    _check_fields(item, set(Entry._fields), "it")
    if item["kernel"] not in list(KERNELS):
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {item['kernel']!r}")

    def integer(name: str, low: int, high: int) -> None:
        if type(item[name]) is not int or not low <= item[name] <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {item[name]!r}")

    for name in ("batch", "heads", "kv_heads", "length"):
        integer(name, 1, 2**31 - 1)
    integer("head_dim", 1, 256)
    integer("run", 0, runs - 1)
    if item["itemsize"] not in (2, 4):
        raise ValueError(f"itemsize must be 2 or 4, got {item['itemsize']!r}")
    if not isinstance(item["parts"], list) or not all(part in PARTS for part in item["parts"]):
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {item['parts']!r}")
    if not isinstance(item["causal"], bool):
        raise ValueError(f"causal must be true or false, got {item['causal']!r}")
    for name in ("milliseconds", "default_milliseconds"):
        if type(item[name]) not in (int, float) or not 0 < item[name] < math.inf:
            raise ValueError(f"{name} must be positive, got {item[name]!r}")
    if not isinstance(item["tried"], list):
        raise ValueError(f"tried must be a list, got {item['tried']!r}")
    configs = {name: make_config(item["kernel"], item[name]) for name in ("config", "default")}
    for config in configs.values():
        check_values(item["kernel"], config)
    read = Entry(**{**item, **configs})
    facts = (read.itemsize, read.head_dim, target_of(device), shared_memory(device))
    if reason := cannot_launch(read.kernel, read.config, *facts):
        raise ValueError(reason)
    return read


# ---- the choice ----------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """The files for a device that are used, in order, and why others are not."""

    used: dict[Path, Tuned]
    refused: dict[Path, str]


@functools.cache
def files(device: torch.device) -> Files:
    """Return the user's and the shipped file of measurements for a device, if there are any; warn of refused ones."""
    result = Files({}, {})
    name = name_of(device)
    for folder in (user_folder(), SHIPPED) if name else ():
        path = folder / file_name(name or "")
        try:
            result.used[path] = read(path, device)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            result.refused[path] = str(error)
            warnings.warn(f"{path} is refused, and tiles are taken without it: {error}", stacklevel=2)
    return result


@functools.cache
def choose(kernel: str, traits: Traits) -> Choice:
    """Return the configuration of ``kernel`` (one of KERNELS) for such a call, and where it comes from."""
    used = files(traits.device).used
    for path, tuned in used.items():
        fitting = [x for x in tuned.entries if x.kernel == kernel and x.traits(traits.device).form == traits.form]
        if fitting:
            nearest = min(fitting, key=lambda x: (abs(math.log2(x.length) - traits.log2_length), -x.length))
            why = f"measured at {nearest.length} tokens, the nearest of {len(fitting)}"
            return Choice(nearest.config, path, why)
    target, _ = entry(traits.device)
    config = shipped(kernel, target, traits.itemsize, traits.head_dim, traits.heavy, traits.wide_values)
    why = "".join(f", nothing like it in {path}" for path in used)
    return Choice(config, TABLE, f"for {target}{why}")


_CACHED = target_of, name_of, shared_memory, _table, entry, files, choose


def forget() -> None:
    """Forget what was read of devices and files."""
    for function in _CACHED:
        function.cache_clear()


overrides: dict[str, Any] = {}  # what :func:`override` sets, by kernel


def lookup(kernel: str, traits: Traits) -> Any:
    """Return the configuration of ``kernel`` (one of KERNELS) for a call."""
    return overrides[kernel] if kernel in overrides else choose(kernel, traits).config


@contextlib.contextmanager
def override(*configs: Any, **by_kernel: Any) -> Iterator[None]:
    """Use these instead of what :func:`choose` says.

    One configuration for every kernel that takes its type, or one for each of KERNELS in order; or by kernel's name.
    """
    if len(configs) == 1:
        by_kernel |= {kernel: configs[0] for kernel, model in KERNELS.items() if type(model) is type(configs[0])}
    else:
        by_kernel |= dict(zip(KERNELS, configs, strict=False))
    before = dict(overrides)
    overrides.update(by_kernel)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(before)
