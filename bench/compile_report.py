"""Compile every shipped configuration for every target, without a GPU, and report what the compilers made of it.

    python -m bench.compile_report                      # everything, about an hour on two cores
    python -m bench.compile_report --targets sm_90 --head-dims 64 128 --presets log-bias --check
    python -m bench.compile_report --quick --check      # the slice that the tests run

The launchers themselves run, on tensors without storage, against a driver that claims to be the target: what is
compiled is what a GPU would be given. Read from the result: registers, spills and stack per thread, shared memory
against what the target has, and the number of matrix instructions. ``--check`` exits with 1 if a kernel

* does not compile;
* wants more shared (or tensor) memory than the target has;
* spills in half precision at head_dim <= 128. Calls with more than a position (packed, grouped, a window, ...) may
  spill around the loops over tiles, not in them; dropout's random numbers may spill there too;
* is in half precision and has a product that did not become matrix instructions.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

KIB = 1024
HALF = ("bfloat16", "float16")
HEAD_DIMS = (16, 32, 64, 128, 256)
LENGTH = 1024
TENSOR_MEMORY_COLUMNS = 512


class Target(NamedTuple):
    """What Triton is told about a GPU, and the shared memory in bytes that one program may use there."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB),
    "sm_89": Target("cuda", 89, 32, 99 * KIB),
    "sm_90": Target("cuda", 90, 32, 227 * KIB),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "sm_120": Target("cuda", 120, 32, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
}
#: LogPosition's presets; log-invariant is the heaviest for the backward and takes the query gain along.
PRESETS = ("none", "log-bias", "log-invariant+gain", "log-rotary", "log-rotary-bias")
MASKS = ("causal", "full")
#: What a call may bring beside its position; "plain" brings nothing.
FEATURES = (
    "plain",
    "packed",
    "lengths",
    "key_bias",
    "dropout",
    "window",
    "grouped",
    "ragged",
    "decode",
    "dlse",
)
CONFIG_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the forward and backward launchers for each of ``presets``."""

    target: str
    dtype: str
    head_dim: int
    presets: tuple[str, ...]
    mask: str = "causal"
    feature: str = "plain"

    def __str__(self) -> str:
        return f"{self.target} {self.dtype} D={self.head_dim} {'/'.join(self.presets)} {self.mask} {self.feature}"


@dataclasses.dataclass
class Row:
    """What became of one kernel. Registers, spill and stack are per thread, the last two in bytes, as is shared."""

    target: str
    dtype: str
    head_dim: int
    preset: str
    mask: str
    feature: str
    kernel: str
    config: dict[str, int]
    seconds: float = 0.0
    registers: int = 0
    spill: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: int = 0  # instructions
    products: int = 0  # tl.dot in the source
    instructions: int = 0
    loops: list[int] = dataclasses.field(default_factory=list)  # instructions of each loop over tiles
    spilled_in_loops: int = 0  # instructions of these loops that reach for spilled registers
    error: str | None = None

    def failures(self) -> Iterator[str]:
        """What --check holds against it."""
        limit = TARGETS[self.target].shared
        if self.error is not None:
            yield f"does not compile: {self.error}"
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory, {self.target} has {limit}"
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            yield f"{self.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
        if self.dtype in HALF and self.head_dim <= 128:
            if self.feature == "plain" and self.spill > 0:
                yield f"spills {self.spill} bytes"
            elif self.spilled_in_loops > 0 and "dropout" not in self.feature:
                yield f"spills {self.spill} bytes, {self.spilled_in_loops} times in a loop"
        if self.dtype in HALF and self.products > 0 and self.matrix == 0:
            yield "no matrix instructions"

    def __str__(self) -> str:
        tile = " ".join(f"{name}={value}" for name, value in self.config.items())
        where = f"{self.target} {self.kernel} {self.dtype} D={self.head_dim} {self.preset} {self.mask} {self.feature}"
        return f"{where} [{tile}]"


# ---- calls ---------------------------------------------------------------------------------------------------------


def call(case: Case, preset: str) -> None:
    """Run the launchers, forward and backward with everything learned, on tensors of the meta device."""
    import logpe_kernels

    from logpe import LogPosition

    meta = functools.partial(torch.empty, device="meta")
    dtype: torch.dtype = getattr(torch, case.dtype)
    features = case.feature.split("+")
    head_dim = case.head_dim * 3 // 4 if "ragged" in features else case.head_dim  # rounds up to the table's
    batch, heads = 2, 4
    kv_heads = 1 if "grouped" in features else heads
    num_queries = 1 if "decode" in features else LENGTH
    position = LogPosition(
        heads, head_dim, preset.removesuffix("+gain"), query_gain=preset.endswith("+gain"), device="meta"
    )
    options: dict[str, Any] = {name: value for name, value in position()._asdict().items() if value is not None}
    options |= dict(scale=head_dim**-0.5, max_seqlen_q=num_queries, max_seqlen_k=LENGTH)
    if case.mask == "causal":
        options |= dict(window_right=0, query_start=LENGTH - num_queries)
    packed = "packed" in features
    if packed:
        options |= {name: meta((batch + 1,), dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if "lengths" in features:
        names = ("query_starts", "key_starts", "key_lengths", "context_lengths")
        options |= {name: meta((batch,), dtype=torch.int32) for name in names}
    if "key_bias" in features:
        options |= dict(key_bias=meta((batch, LENGTH), dtype=torch.float32))
    if "dropout" in features:
        options |= dict(dropout_p=0.1, dropout_seed=meta((1,), dtype=torch.int64))
    if "window" in features:
        options |= dict(window_left=256)
    q, k, v = (
        meta((batch * n, h, head_dim) if packed else (batch, h, n, head_dim), dtype=dtype)
        for h, n in ((heads, num_queries), (kv_heads, LENGTH), (kv_heads, LENGTH))
    )
    out, lse = logpe_kernels.forward(q, k, v, **options)
    dlse = torch.empty_like(lse) if "dlse" in features else None
    logpe_kernels.backward(torch.empty_like(out), dlse, q, k, v, out, lse, **options)


def cases(
    targets: Iterable[str], dtypes: Iterable[str], head_dims: Iterable[int], presets: tuple[str, ...]
) -> Iterator[Case]:
    """Everything: the grid, and every feature at the common sizes. Presets share a case, since they share kernels."""
    for target, head_dim, dtype in itertools.product(targets, head_dims, dtypes):
        for mask in MASKS:
            yield Case(target, dtype, head_dim, presets, mask)
        if head_dim in (64, 128 if dtype in HALF else 64) and "log-bias" in presets:
            for feature in FEATURES[1:]:
                mask = "full" if feature == "key_bias" else "causal"
                yield Case(target, dtype, head_dim, ("log-bias",), mask, feature)


def quick_cases(targets: Iterable[str]) -> Iterator[Case]:
    """A slice of it: on each target the common size and the heaviest position where it is tightest."""
    for target in targets:
        yield Case(target, "bfloat16", 64, ("log-bias",))
        yield Case(target, "bfloat16", 128, ("log-invariant+gain",))
    rest = [
        ("float32", ("log-bias",), "full", "plain"),
        ("float16", ("log-rotary-bias",), "causal", "packed+grouped"),
        ("float16", ("log-bias",), "causal", "lengths+window"),
        ("float16", ("log-bias",), "full", "ragged+key_bias"),
        ("bfloat16", ("none",), "causal", "dropout+dlse"),
        ("float32", ("log-bias",), "causal", "decode"),
    ]
    for target, (dtype, presets, mask, feature) in zip(itertools.cycle(targets), rest, strict=False):
        yield Case(target, dtype, 64, presets, mask, feature)


# ---- compilation -----------------------------------------------------------------------------------------------------


class _Driver:
    """Claims to be a GPU of one target. Each target is a device of its own, so that no kernel serves another's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.name][:3])

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_case(
    case: Case,
    kernels: tuple[str, ...] | None = None,
    table: Path | None = None,
    console: Path | None = None,
) -> list[Row]:
    """One row for each kernel that the case launches.

    kernels: names of those wanted, None for all. table: a file of configurations to use in place of the shipped ones.
    console: the file that this process prints to, if it is a worker.
    """
    from logpe_kernels import configs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows: dict[Any, Row] = {}
    compile_only = JITFunction.run
    preset = ""

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        name = function.fn.__name__.removesuffix("_kernel")
        if kernels is not None and name not in kernels:
            return None
        config = {field: keywords[field] for field in CONFIG_FIELDS if field in keywords}
        row = Row(case.target, case.dtype, case.head_dim, preset, case.mask, case.feature, name, config)
        start = time.perf_counter()
        try:
            kernel = compile_only(function, *args, grid=grid, warmup=True, **keywords)
            row.seconds = round(time.perf_counter() - start, 2)
            if kernel.hash in rows:
                return kernel
            inspect_kernel(kernel, row)
            rows[kernel.hash] = row
            return kernel
        except Exception as error:
            row.error = f"{type(error).__name__}: {str(error).strip()[-500:]} {_complaint(console)}".strip()
            rows[str(row)] = row
            return None

    def forget() -> None:
        for function in vars(configs).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    with ExitStack() as stack:
        stack.callback(forget)
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(configs, "target_of", return_value=case.target))
        if table is not None:
            stack.enter_context(mock.patch.object(configs, "TABLE", table))
        forget()
        driver.set_active(_Driver(case.target))
        for preset in case.presets:
            call(case, preset)
    return list(rows.values())


def disassemble(kernel: Any) -> str:
    """The machine code of a compiled kernel as text: SASS, or AMD's assembly."""
    if "amdgcn" in kernel.asm:
        return kernel.asm["amdgcn"]
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _output(nvidia.cuobjdump.path, "-sass", file.name)


def instructions(code: str) -> tuple[list[str], list[slice]]:
    """The instructions of a disassembled kernel, in order, and its innermost loops as slices of them.

    A loop is what lies between a branch and its target when that comes first.
    """
    lines: list[str] = []
    places: dict[str, int] = {}  # of addresses or labels
    loops: list[slice] = []
    for line in code.splitlines():
        if found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):  # SASS: /*0a10*/ @P0 BRA 0x9f0 ;
            places[f"0x{int(found[1], 16):x}"] = len(lines)
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", found[2])
            lines.append(found[2])
        elif found := re.match(r"(\.LBB\w+):", line):
            places[found[1]] = len(lines)
            continue
        elif found := re.match(r"\t([a-z]+_\w+\b.*)", line):  # AMD: s_cbranch_scc1 .LBB0_2
            target = re.search(r"^s_c?branch\w*\s+(\.LBB\w+)", found[1])
            lines.append(found[1])
        else:
            continue
        if target and target[1] in places:
            loops.append(slice(places[target[1]], len(lines)))
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and other.start >= loop.start and other.stop <= loop.stop for other in loops)
    ]
    return lines, innermost


def inspect_kernel(kernel: Any, row: Row) -> None:
    """Fill in what the compiled kernel uses."""
    code = disassemble(kernel)
    row.shared = kernel.metadata.shared
    row.tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    row.products = kernel.asm["ttir"].count("tt.dot ")
    if "amdgcn" in kernel.asm:

        def field(name: str) -> int:
            match = re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)
            return int(match[1]) if match else 0

        # vgpr_count includes the accumulation registers. Spills are counted in registers of 4 bytes.
        row.registers, row.spill = field("vgpr_count"), 4 * field("vgpr_spill_count")
        row.stack = field("private_segment_fixed_size")
        matrix, local = r"v_mfma", r"scratch_"
    else:
        row.registers, row.stack = _resources(kernel.asm["cubin"])
        row.spill = _spill(kernel, row.registers, row.stack) if row.stack else 0
        # HMMA (sm_80 to sm_120), HGMMA (sm_90), UTCHMMA (sm_100), and the same for other types.
        matrix, local = r"\b(?:UTC)?[A-Z]G?MMA\b", r"\b(?:LDL|STL)\b"
    lines, loops = instructions(code)
    row.instructions = len(lines)
    row.matrix = sum(bool(re.search(matrix, line)) for line in lines)
    product = matrix if row.matrix else r"FFMA|v_(?:pk_)?fma"
    for loop in loops:
        if any(re.search(product, line) for line in lines[loop]):
            row.loops.append(loop.stop - loop.start)
            row.spilled_in_loops += sum(bool(re.search(local, line)) for line in lines[loop])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread of a cubin."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(nvidia.cuobjdump.path, "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def _spill(kernel: Any, registers: int, stack: int) -> int:
    """Bytes that ptxas spills: the part of the stack that is no array of a library routine.

    The cubin does not tell them apart, ptxas does when asked to be verbose. Its options differ between Triton's
    versions: those are right that lead to the same registers and stack. If none does, all of the stack counts.
    """
    from triton.knobs import nvidia

    arch = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assert arch
    ptxas = nvidia.ptxas_blackwell if int(re.sub(r"\D", "", arch[1])) >= 100 else nvidia.ptxas
    options = ["-v", "-lineinfo", f"--gpu-name={arch[1]}"]
    if not kernel.metadata.enable_fp_fusion:
        options.append("--fmad=false")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        for extra in (["--regAllocOptLevel=2"], []):
            try:
                log = _output(ptxas.path, *options, *extra, str(source), "-o", str(Path(folder, "kernel.cubin")))
            except subprocess.CalledProcessError:
                continue
            found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
            used = re.search(r"Used (\d+) registers", log)
            if found and used and (int(used[1]), int(found[1])) == (registers, stack):
                return max(int(found[2]), int(found[3]))
    return stack


# ---- many of them ----------------------------------------------------------------------------------------------------


def _print_to(console: Path) -> None:
    """Send what this process prints to a file: on failure the compilers print whole modules."""
    with console.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _complaint(console: Path | None) -> str:
    """The last error that a compiler printed."""
    if console is None:
        return ""
    found = re.findall(r"^.*(?:error: |LLVM ERROR|Assertion).*$", console.read_text(errors="replace"), re.MULTILINE)
    return next((line for line in reversed(found) if "have been detected" not in line), "")[:500]


def compile_all(
    todo: list[Case],
    kernels: tuple[str, ...] | None = None,
    table: Path | None = None,
    jobs: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> list[Row]:
    """compile_case on all of ``todo`` in worker processes; one that the compiler brings down becomes a failed row."""
    context = multiprocessing.get_context("spawn")
    worker = threading.local()  # each thread has a process of its own: a crash takes no other case along
    pools: list[futures.ProcessPoolExecutor] = []

    def attempt(case: Case) -> list[Row]:
        if not hasattr(worker, "pool"):
            worker.console = Path(folder, f"{len(pools)}-{threading.get_ident()}")
            worker.pool = futures.ProcessPoolExecutor(1, context, _print_to, (worker.console,))
            pools.append(worker.pool)
        try:
            return worker.pool.submit(compile_case, case, kernels, table, worker.console).result()
        except futures.process.BrokenProcessPool:
            del worker.pool
            if len(case.presets) > 1:
                return [row for preset in case.presets for row in attempt(dataclasses.replace(case, presets=(preset,)))]
            error = f"the compiler aborted: {_complaint(worker.console)}"
            where = (case.target, case.dtype, case.head_dim, case.presets[0], case.mask, case.feature)
            return [Row(*where, kernel="?", config={}, error=error)]

    def work(case: Case) -> list[Row]:
        rows = attempt(case)
        done(1)
        return rows

    with tempfile.TemporaryDirectory() as folder:
        try:
            with futures.ThreadPoolExecutor(jobs) as threads:
                return [row for rows in threads.map(work, todo) for row in rows]
        finally:
            for pool in pools:
                pool.shutdown()


def summary(rows: list[Row]) -> str:
    """A line for each target, kernel, type, head_dim and configuration: the worst over presets, masks and features."""
    columns = ("target", "kernel", "dtype", "D", "tile", "warps", "stages")
    lines = [[*columns, "registers", "spill", "stack", "shared", "of", "matrix", "seconds", "kernels"]]

    def group(row: Row) -> tuple[Any, ...]:
        return list(TARGETS).index(row.target), row.kernel, row.dtype, row.head_dim, tuple(row.config.values())

    for _, members in itertools.groupby(sorted(rows, key=group), group):
        same = list(members)
        row = same[0]
        tile = "x".join(str(row.config[name]) for name in ("BLOCK_M", "BLOCK_N") if name in row.config)
        schedule = [row.config.get(name, "") for name in ("num_warps", "num_stages")]
        worst = [max(getattr(r, name) for r in same) for name in ("registers", "spill", "stack", "shared")]
        least, seconds = min(r.matrix for r in same), max(r.seconds for r in same)
        line = (row.target, row.kernel, row.dtype, row.head_dim, tile, *schedule, *worst, TARGETS[row.target].shared)
        lines.append([str(entry) for entry in (*line, least, f"{seconds:.1f}", len(same))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import triton
    from triton.knobs import nvidia

    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        ptxas=nvidia.ptxas.version,
        ptxas_blackwell=nvidia.ptxas_blackwell.version,
    )


def write_json(path: Path, content: Any) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", help="such as forward, dq, dkdv, rotate (default: all)")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--dtypes", nargs="+", choices=(*HALF, "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--configs", type=Path, help="a table like configs/default.json to use in its place")
    parser.add_argument(
        "--quick", action="store_true", help="the slice that the tests run; of the others minds --targets"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if something failed")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # of the workers: there is nothing to compile when interpreting
    todo = list(
        quick_cases(options.targets)
        if options.quick
        else cases(options.targets, options.dtypes, options.head_dims, tuple(options.presets))
    )
    kernels = tuple(options.kernels) if options.kernels else None
    start = time.perf_counter()
    with tqdm(total=len(todo), unit="call", smoothing=0) as progress:
        rows = compile_all(todo, kernels, options.configs, options.jobs, progress.update)
    seconds = time.perf_counter() - start
    failures = [f"{row}: {reason}" for row in rows for reason in row.failures()]
    print(summary(rows))
    print(f"{len(rows)} kernels in {seconds:.0f} s, {len(failures)} failures")
    for failure in failures:
        print(f"FAIL {failure}")
    if options.out:
        content = dict(versions=versions(), seconds=round(seconds, 1), failures=failures)
        write_json(options.out, content | dict(rows=[dataclasses.asdict(row) for row in rows]))
    return 1 if options.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
