"""``python -m logpe tune``: measure which tiles are the fastest on this GPU for one's own shapes.

For each kernel and shape, tiles are tried first, on sm_90 also those of the forward kernel whose warps have different
work, and then the pipelining of the best. Several processes compile the candidates at once; those that do not fit, or
spill much, are dropped. Each of the others takes turns with the shipped configuration on the same inputs, so that both
meet the same clocks of the GPU. A candidate is out if its results differ by more than rounding, from the shipped
configuration's or from run to run. The fastest that is left is taken if it is faster by more than noise. The file is
written after each shape, and a second run resumes from there.

A candidate may bring down the compiler, or hang the GPU. It runs in a process, which is replaced then.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import logpe
from logpe import ops
from logpe.checks import MAX_HEAD_DIM
from logpe.command import STOPPED, TIME_IS_OVER, count, minutes
from logpe.files import locked
from logpe.position import PRESET_PARTS, PRESETS
from logpe.tuning.trial import KERNELS, Comparison, Gpu, OutOfTime, Resources, Task

if TYPE_CHECKING:  # imported where it is used: with it comes triton, which not every machine has
    from logpe_kernels.configs import Entry, Traits

TOKENS, HIDDEN = 16384, 2048  # batch and heads are such that a shape has so many, unless they are given
NOISE = 0.02  # a candidate must be faster by more than this share of the time
QUICK, THOROUGH = 40.0, 200.0  # milliseconds of the GPU for a candidate, and for one that is about to win
FINALISTS = 3  # tiles whose pipelining is tried, and candidates that may be confirmed
# float32 numbers that a thread holds at once. Beyond, it surely spills; below, a tile is too small to be worth it.
FEWEST_REGISTERS, MOST_REGISTERS = 40, 224
FEW_SPILLS = 16  # registers of a thread: so few are spilled around a loop rather than in it, and measuring will tell


# ---- candidates ------------------------------------------------------------------------------------------------------


def tiles(task: Task, default: Any, target: str, shared: int) -> list[Any]:
    """Return tiles, with the pipelining of ``default``, that a target with so much shared memory may be able to run."""
    from logpe_kernels import configs

    kernel = KERNELS[task.kernel]
    streamed = "BLOCK_N" if kernel.resident == "BLOCK_M" else "BLOCK_M"
    half = task.itemsize == 2
    accumulators = 1 if default.SEPARATE else kernel.accumulators
    candidates = []
    for rows, columns, warps in itertools.product((32, 64, 128, 256), (16, 32, 64, 128), (4, 8)):
        config = default._replace(**{kernel.resident: rows, streamed: columns}, num_warps=warps)
        width = accumulators * configs.padded(task.head_dim) + kernel.scores * columns
        fits = FEWEST_REGISTERS <= rows * width / (32 * warps) <= MOST_REGISTERS
        if half and rows < 16 * warps and task.head_dim <= 128:  # a matrix instruction of a warp has 16 rows
            fits = False
        if fits and columns <= rows and config != default:
            candidates.append(config)
    return launchable(candidates, task, target, shared)


def pipelines(config: Any, task: Task, target: str, shared: int) -> list[Any]:
    """Return candidates with the tile of ``config``.

    They have other stages, on sm_90 and later descriptors, and for large heads dk and dv in one launch or in two.
    """
    from logpe_kernels import configs

    half = task.itemsize == 2
    flags = (False, True) if half and configs.has_tma(target) else (False,)
    stages = (1, 2, 3, 4) if half and target.startswith("sm_") else (1, 2)
    separate = (False, True) if task.kernel == "backward_dkdv" and task.head_dim > 64 else (False,)
    candidates = [
        config._replace(num_stages=n, TMA=flag, SEPARATE=apart)
        for flag, n, apart in itertools.product(flags, stages, separate)
    ]
    return launchable([c for c in candidates if c != config], task, target, shared)


def specialized(default: Any, task: Task, target: str, shared: int) -> list[Any]:
    """Return candidates for the kernel whose warps have different work, where a target can run it."""
    sizes = dict(BLOCK_M=128, num_warps=8, TMA=False, SPECIALIZED=True)
    tiles = itertools.product((64, 128), (2, 3))
    candidates = [default._replace(**sizes, BLOCK_N=columns, num_stages=stages) for columns, stages in tiles]
    return launchable(candidates, task, target, shared)


def launchable(candidates: Iterable[Any], task: Task, target: str, shared: int) -> list[Any]:
    """Return the candidates that may fit, as far as can be told beforehand."""
    from logpe_kernels import configs

    facts = (task.itemsize, task.head_dim, target, shared)
    return [config for config in candidates if configs.cannot_launch(task.kernel, config, *facts) is None]


# ---- the search ------------------------------------------------------------------------------------------------------


def prune(compiled: dict[Any, Resources | str]) -> list[Any]:
    """Return the candidates that compiled and spill little; if all of them spill more, all that compiled."""
    usable = {config: needs for config, needs in compiled.items() if isinstance(needs, Resources)}
    return [config for config, needs in usable.items() if needs.spills <= FEW_SPILLS] or list(usable)


def fastest(measured: dict[Any, Comparison | str]) -> list[Any]:
    """Return the candidates that are right, in the order of their time over the default's in the same turns."""
    ratios = {config: result.ratio for config, result in measured.items() if isinstance(result, Comparison)}
    return sorted(ratios, key=lambda config: ratios[config])


def search(
    task: Task, device: torch.device, machine: Gpu, show: Callable[[str], object] = lambda text: None
) -> Entry | str:
    """Return the entry of a task, with 0 for its run; or why there is none: not one candidate could be measured."""
    from logpe_kernels import configs

    traits, target = task.traits(device), configs.target_of(device)
    default = configs.shipped(task.kernel, configs.entry(device)[0], traits.itemsize, traits.head_dim, traits.heavy)
    facts = (target, configs.shared_memory(device))
    measured: dict[Any, Comparison | str] = {}

    def attempt(candidates: Iterable[Any]) -> None:
        new = [config for config in dict.fromkeys(candidates) if config not in measured]
        show(f"compiling {len(new)}")
        compiled = dict(zip(new, machine.compile(task, new), strict=True))
        kept = prune(compiled)
        for config, needs in compiled.items():
            if config not in kept:
                measured[config] = needs if isinstance(needs, str) else f"spills {needs.spills} registers"
        for index, config in enumerate(kept):
            show(f"measuring {index + 1} of {len(kept)}")
            measured[config] = machine.compare(task, config, default, QUICK)

    attempt([*tiles(task, default, *facts), *specialized(default, task, *facts)])
    best = [default, *fastest(measured)[:FINALISTS]]
    attempt(candidate for config in best for candidate in pipelines(config, task, *facts) if candidate != default)

    # The best of many is in part lucky: it has to be as good once more, in more turns.
    winner, final = default, None
    for config in fastest(measured)[:FINALISTS]:
        first = measured[config]
        assert isinstance(first, Comparison)
        if first.ratio > 1 - NOISE:
            break
        show("confirming")
        measured[config] = final = machine.compare(task, config, default, THOROUGH)
        if isinstance(final, Comparison) and final.ratio <= 1 - NOISE:
            winner = config
            break
    times = [result for result in measured.values() if isinstance(result, Comparison)]
    if not times:
        reasons = {result for result in measured.values() if isinstance(result, str)}
        return f"none of {len(measured)} candidates ran: {'; '.join(sorted(reasons)[:3])}"
    if isinstance(final, Comparison) and winner != default:
        milliseconds, default_milliseconds = final
    else:
        milliseconds = default_milliseconds = statistics.median(result.default for result in times)
    return configs.Entry(
        task.kernel,
        traits.itemsize,
        task.head_dim,
        task.parts,
        task.causal,
        task.length,
        task.batch,
        task.heads,
        task.kv_heads,
        winner,
        round(milliseconds, 5),
        default,
        round(default_milliseconds, 5),
        [[list(c), round(x.milliseconds, 5) if isinstance(x, Comparison) else x] for c, x in measured.items()],
        run=0,
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def make_tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks, what the command line names first before the rest, and a shape with all its lengths."""
    shapes = itertools.product(options.masks, options.head_dims, options.presets, options.lengths, options.kernels)
    tasks: dict[Any, Task] = {}
    for mask, head_dim, preset, length, kernel in shapes:
        heads = options.heads or max(1, HIDDEN // head_dim)
        kv_heads = options.kv_heads or heads
        batch = options.batch or max(1, TOKENS // length)
        causal = mask == "causal"
        task = Task(kernel, options.dtype, head_dim, _unrotated(preset), causal, length, batch, heads, kv_heads)
        tasks.setdefault(_key(kernel, task.traits(torch.device("meta"))), task)
    return list(tasks.values())


def _unrotated(preset: str) -> str:
    """Return the preset without its rotation, which is not these kernels' work."""
    name, plus, gain = preset.partition("+")
    parts = set(PRESET_PARTS[name]) - {"rotary"}
    return next(other for other, its in PRESET_PARTS.items() if set(its) == parts) + plus + gain


def _key(kernel: str, traits: Traits) -> tuple[Any, ...]:
    """Return the key of the tasks that share an entry of a file."""
    return kernel, *traits.form, traits.log2_length


def versions() -> dict[str, str]:
    """Return the versions that measured times depend on."""
    import triton

    return dict(
        logpe=logpe.__version__, torch=torch.__version__, triton=triton.__version__, driver=driver_version(),
        python=platform.python_version(),
    )  # fmt: skip


def driver_version() -> str:
    """Return the version of the GPU's driver; "unknown" where nvidia-smi does not say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def tune(
    tasks: list[Task],
    path: Path,
    device: torch.device,
    machine: Gpu,
    *,
    command: str = "",
    again: bool = False,
) -> list[Entry]:
    """Measure the tasks that the file does not hold, or with ``again`` all, and write it after each.

    Returns the file's entries for the tasks. OutOfTime and KeyboardInterrupt end it early, and lose nothing but the
    task at hand.

    Raises:
        ValueError: the file is damaged, or is of another device.
        OSError: the file cannot be written.
        Busy: another process tunes for the file.
    """
    from logpe_kernels import configs
    from tqdm import tqdm

    with locked(path.parent, path.name):
        try:
            tuned = configs.read(path, device)
        except FileNotFoundError:
            tuned = configs.Tuned(str(configs.name_of(device)), configs.target_of(device), [], [])
        entries = {_key(x.kernel, x.traits(device)): x for x in tuned.entries}
        wanted = {_key(task.kernel, task.traits(device)): task for task in tasks}
        todo = {key: task for key, task in wanted.items() if again or key not in entries}
        run = dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), command=command, **versions())
        runs = [*tuned.runs, run]
        done = len(wanted) - len(todo)
        with tqdm(
            todo.items(), unit="shape", initial=done, total=len(wanted), miniters=0, mininterval=0.5, disable=None
        ) as progress:

            def show(text: str) -> None:
                progress.set_postfix_str(text, refresh=False)
                progress.update(0)  # shows the text, if the last time was a while ago

            for key, task in progress:
                progress.set_description(str(task), refresh=False)
                entry = search(task, device, machine, show)
                if isinstance(entry, str):
                    progress.write(f"{task}: {entry}")
                    continue
                entries[key] = entry._replace(run=len(runs) - 1)
                configs.write(path, tuned._replace(runs=runs, entries=list(entries.values())))
    return [entries[key] for key in wanted if key in entries]


def held(tasks: list[Task], path: Path, device: torch.device) -> list[Entry]:
    """Return the entries of the file that belong to these tasks."""
    from logpe_kernels import configs

    if not path.exists():
        return []
    entries = {_key(x.kernel, x.traits(device)): x for x in configs.read(path, device).entries}
    return [entries[key] for task in tasks if (key := _key(task.kernel, task.traits(device))) in entries]


def table(entries: list[Entry]) -> str:
    """Return a table with a line for each entry."""
    from logpe_kernels import configs

    lines = [["kernel", "bytes", "D", "parts", "mask", "N", "shipped ms", "best ms", "faster", "configuration"]]
    for x in entries:
        config = configs.text_of(x.config)
        config += " (shipped)" if x.config == x.default else ""
        lines.append([
            x.kernel, str(x.itemsize), str(x.head_dim), "+".join(x.parts) or "none", "causal" if x.causal else "full",
            str(x.length), f"{x.default_milliseconds:.3f}", f"{x.milliseconds:.3f}",
            f"{x.default_milliseconds / x.milliseconds:.2f}x", config,
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def why_not(device: torch.device) -> str | None:
    """Return why nothing can be measured on a device; None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs a GPU: there is none here, or this build of torch does not see it"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}: torch sees {torch.cuda.device_count()} GPUs"
    if ops.interpreting():
        return "TRITON_INTERPRET=1 is set: the kernels would be interpreted, not compiled"
    return ops.why_not_triton(device)


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``, what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "tune",
        help="measure the fastest tiles for this GPU and keep them",
        description=__doc__,
    )
    parser.set_defaults(run=main)
    gains = [f"{preset}+gain" for preset in PRESETS]
    parser.add_argument(
        "--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="kernels to tune (all)"
    )
    parser.add_argument(
        "--head-dims", nargs="+", type=_head_dim, default=[128, 64], metavar="D", help="sizes of a head"
    )
    parser.add_argument(
        "--presets", nargs="+", choices=[*PRESETS, *gains], default=["log-bias", "none"], metavar="PRESET",
        help="of %(choices)s; a rotation makes no difference to these kernels",
    )  # fmt: skip
    parser.add_argument(
        "--masks", nargs="+", choices=["causal", "full"], default=["causal", "full"], help="masks to tune for (both)"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=count, default=[4096, 16384, 1024], metavar="N",
        help="tokens; one of each power of two is measured, since 2049 to 4096 share an entry",
    )  # fmt: skip
    parser.add_argument("--heads", type=count, help=f"default: {HIDDEN} over head_dim")
    parser.add_argument("--kv-heads", type=count, help="default: as many as --heads")
    parser.add_argument("--batch", type=count, help=f"default: {TOKENS} over the length, at least 1")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of q, k and v (%(default)s)"
    )
    parser.add_argument("--device", type=_device, default=torch.device("cuda"), help="such as cuda:1")
    parser.add_argument("--minutes", type=minutes, default=30, help="stop after so long; default %(default)s")
    parser.add_argument("--out", type=Path, help="default: the file from which log_attention reads")
    parser.add_argument("--fresh", action="store_true", help="also measure what the file holds already")
    parser.add_argument("--jobs", type=count, help="processes that compile; default: by cores and memory, at most 14")


def _head_dim(text: str) -> int:
    value = count(text)
    if value > MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_HEAD_DIM}, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def _jobs(device: torch.device) -> int:
    """Return how many processes compile: each has a core, and 4 GiB of the GPU, of which CUDA takes half a GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(14, cores - 1, torch.cuda.get_device_properties(device).total_memory // 2**32))


def main(options: argparse.Namespace) -> int:
    """Tune what the command line asks for; return the exit status. Raises ValueError where that cannot be done."""
    end = time.monotonic() + 60 * options.minutes
    if reason := why_not(options.device):
        raise ValueError(f"tune cannot run: {reason}")
    tasks = make_tasks(options)
    for task in tasks:
        if task.heads % task.kv_heads:
            raise ValueError(f"--heads must be a multiple of --kv-heads, got {task.heads} and {task.kv_heads}")
    from logpe_kernels import configs

    index = torch.cuda.current_device() if options.device.index is None else options.device.index
    device = torch.device("cuda", index)
    read_from = configs.user_folder() / configs.file_name(str(configs.name_of(device)))
    path = options.out or read_from
    machine = Gpu(device, options.jobs or _jobs(device), end)
    stopped = 0
    try:
        command = shlex.join(["python", "-m", "logpe", *sys.argv[1:]])
        entries = tune(tasks, path, device, machine, command=command, again=options.fresh)
    except (OutOfTime, KeyboardInterrupt) as error:
        stopped = TIME_IS_OVER if isinstance(error, OutOfTime) else STOPPED
        why = "The time is over" if isinstance(error, OutOfTime) else "Stopped"
        print(f"{why}: the same command resumes from here.", file=sys.stderr)
        entries = held(tasks, path, device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used, move it away or name another with --out: {error}") from None
    finally:
        machine.close()
    if not entries:
        print("Nothing was measured.", file=sys.stderr)
        return stopped or 1
    print(table(entries))
    print(f"\n{configs.name_of(device)}: written to {path}")
    if path != read_from:
        print(f"log_attention reads {read_from}: copy it there, or set LOGPE_CONFIG_DIR")
    return stopped
