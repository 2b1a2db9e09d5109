"""Compile every shipped configuration for every target, without a GPU, and report what the compilers made of it.

    python -m bench compile_report --out report.json                # everything, about an hour on two cores
    python -m bench compile_report --targets sm_90 --head-dims 64 128 --presets none log-bias --check
    python -m bench compile_report --quick --check                  # the slice that the tests run
    python -m bench compile_report --features plain --write-budgets # after a change of kernels or tiles

The launchers themselves run, on tensors without storage, against a driver that claims to be the target: what is
compiled is what a GPU would be given. Read from the result: registers, spills and stack per thread, shared memory
against what the target has, the number of matrix instructions, and what the loops over tiles cost per score element
(:mod:`bench.speed.roofline` says how that is counted). For each preset a table sets these costs, and the roofline bound
that they imply if all units overlap perfectly, beside those of ``none`` and, forward, of a plain kernel without a
position, the ``yardstick``. With ``--out`` the same command resumes from
the file that an earlier one left, if the kernels are the same. ``--check`` exits with 1 if nothing was compiled, or if
a kernel

* does not compile;
* wants more shared (or tensor) memory than the target has;
* spills in half precision at head_dim <= 128 in the loop that serves most of a long sequence, by more than 2 % of its
  instructions (elsewhere it may: the fastest tiles that were measured do). Dropout's random numbers may spill more;
* is in half precision and has a product that did not become matrix instructions;
* has warps that repeat each other's matrix products in half precision, because a tile is too small for all of them;
* loads single elements in half precision in a loop, by more than 2 % of its instructions: rows are aligned further;
* has a loop in which every asynchronous matrix product is waited for, so that nothing overlaps with it;
* costs more per score element than budgets.json allows, in a call with nothing but a position. The loop that is
  judged is the one that serves most of a long sequence. In half precision every shipped configuration must have a
  budget; in float32, which is exact and slow, few have one; those of ``--configs`` need none. Budgets hold for the
  Triton that they were written with. A line says how many kernels were not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from bench import command
from bench.common import reading, write_whole
from bench.speed import roofline
from bench.speed.roofline import Loop, Rates
from bench.speed.runner import write_json
from logpe.command import TIME_IS_OVER
from logpe.files import locked
from logpe.worker import Failed, Pool, Worker, complaint

KIB = 1024
HALF = ("bfloat16", "float16")
HEAD_DIMS = (16, 32, 64, 128, 256)
LENGTH = 1024
PAGE_SIZE = 64
TENSOR_MEMORY_COLUMNS = 512
REGISTERS = 65536  # of a multiprocessor, 32 bits each
BUDGETS = Path(__file__).parent / "budgets.json"
#: What is budgeted of a loop, per score element, and how much more than was counted a budget allows.
COSTS = ("special", "fp32", "issued")
HEADROOM = 1.03
MOST_SPILLS = MOST_NARROW = 0.02  # of the instructions of a loop
LIMIT = 3600.0  # seconds that a case may take


class Target(NamedTuple):
    """What Triton is told about a GPU, and the shared memory in bytes that one program may use there."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int
    rates: Rates


# Rates of NVIDIA: special functions and float32 from the CUDA C++ programming guide's table of the throughput of
# native arithmetic instructions; issue, 4 schedulers with a warp of 32 each; matrix from the dense bfloat16 rate in
# the architectures' white papers (A100 312 TFLOP/s, L40S 362, H100 SXM 989, B200 2,250, RTX PRO 6000 Blackwell 504)
# over SMs and clock. GeForce cards of sm_89 and sm_120 have half of that. Of AMD: FLOPs per clock and compute unit in
# the CDNA 3 white paper, where float32 counts packed instructions; it has none for special functions and issue.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB, Rates(1024, 16, 64, 128)),
    "sm_89": Target("cuda", 89, 32, 99 * KIB, Rates(512, 16, 128, 128)),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, Rates(2048, 16, 128, 128)),
    "sm_100": Target("cuda", 100, 32, 227 * KIB, Rates(4096, 16, 128, 128)),
    "sm_120": Target("cuda", 120, 32, 99 * KIB, Rates(512, 16, 128, 128)),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, Rates(1024, None, 128, None)),
}
#: LogPosition's presets; log-invariant is the heaviest for the backward and takes the query gain along.
PRESETS = ("none", "alibi", "log-bias", "log-bias-rope", "log-invariant+gain", "log-rotary", "log-rotary-bias")
#: Beside them: a plain kernel that is not ours, see bench/speed/yardstick.py. It has a forward pass alone.
YARDSTICK = "yardstick"
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
    "paged",
    "dlse",
    "value_dim",
    "wide_values",
    "float32_out",
    "specialized",
)
#: Those whose costs are shown and budgeted.
JUDGED = ("plain", "specialized")
#: The kernel of sm_90 whose warps have different work, in a call of this feature.
SPECIALIZED: dict[str, Any] = dict(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2, SPECIALIZED=True)


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
    repeated: float = 1.0  # multiply-adds of all warps, by those that the tiles need
    instructions: int = 0
    loops: list[Loop] = dataclasses.field(default_factory=list)  # over tiles
    error: str | None = None

    @property
    def tile(self) -> str:
        """The configuration in short: 128x64 num_warps=8 num_stages=2, and the names of flags that are set."""
        block = "x".join(str(self.config[name]) for name in ("BLOCK_M", "BLOCK_N") if name in self.config)
        rest = {name: value for name, value in self.config.items() if not name.startswith("BLOCK_")}
        flags = (name if value is True else f"{name}={value}" for name, value in rest.items() if value is not False)
        return " ".join(filter(None, (block, *flags)))

    @property
    def programs(self) -> int | None:
        """The number of programs that share a multiprocessor, by registers and shared memory; None for AMD."""
        target = TARGETS[self.target]
        if target.backend != "cuda" or not self.registers:
            return None
        threads = self.config.get("num_warps", 4) * target.warp_size
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, (target.shared + KIB) // (self.shared + KIB))  # 1 KiB of each is the system's

    @property
    def bulk(self) -> Loop:
        """The loop that serves most of a long sequence. There must be one."""
        return roofline.bulk(self.loops)

    @property
    def clocks(self) -> dict[str, float]:
        """The roofline: clocks of an SM per score element that each unit needs in that loop.

        The matrix unit counts in half precision alone; AMD's does the products of float32 too, at another rate.
        """
        depth = self.depth * self.repeated if self.dtype in HALF else None
        return roofline.clocks(self.bulk, depth, TARGETS[self.target].rates)

    @property
    def depth(self) -> int:
        """The multiply-adds that a score needs in the products of the kernel."""
        values = roofline.VALUE_PRODUCTS[self.kernel]
        others = roofline.PRODUCTS[self.kernel] - values
        return self.head_dim * others + value_dim(self.head_dim, self.feature) * values

    def figures(self) -> dict[str, Any]:
        """Return all of the row for a file, with the index of the loop that counts and its roofline."""
        more = dict(bulk=self.loops.index(self.bulk), clocks=self.clocks) if self.loops else {}
        return dataclasses.asdict(self) | more

    @property
    def budget(self) -> str | None:
        """The name of the row's budget in budgets.json; None for what has no budget."""
        if self.feature not in JUDGED or self.kernel not in roofline.PRODUCTS or self.preset == YARDSTICK:
            return None
        dtype = "half" if self.dtype in HALF else self.dtype
        preset = self.preset.removesuffix("-rope")  # which rotates beforehand
        kernel = self.kernel if self.feature == "plain" else f"{self.feature} {self.kernel}"
        return f"{self.target} {kernel} {dtype} D={self.head_dim} {preset} [{self.tile}]"

    def failures(self, budgets: dict[str, list[float]] | None, complete: bool = False) -> Iterator[str]:
        """Yield what --check objects to.

        Args:
            budgets: as in the file; None: costs are not compared.
            complete: object to a budget that is missing.
        """
        limit = TARGETS[self.target].shared
        if self.error is not None:
            yield f"does not compile: {self.error}"
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory, {self.target} has {limit}"
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            yield f"{self.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
        strict = self.dtype in HALF and self.head_dim <= 128 and "dropout" not in self.feature
        if strict and self.loops and (loop := self.bulk).spills > MOST_SPILLS * loop.instructions:
            yield f"spills {self.spill} bytes: {loop.spills} of the {loop.instructions} instructions of a loop"
        if self.dtype in HALF and self.products > 0 and self.matrix == 0:
            yield "no matrix instructions"
        if self.dtype in HALF and self.repeated > 1:
            yield f"warps repeat products: {self.repeated:.2f} times the multiply-adds that the tiles need"
        for loop in self.loops:
            if loop.waits >= loop.matrix > 0:
                yield f"{loop.waits} waits for the {loop.matrix} matrix products of a loop"
            if self.dtype in HALF and loop.narrow > MOST_NARROW * loop.instructions:
                yield f"{loop.narrow} loads of single elements among the {loop.instructions} instructions of a loop"
        if self.error is None and self.budget is not None and budgets is not None:
            if not self.loops:
                yield "no loop over tiles found in its code"
            elif self.budget in budgets:
                for name, most in zip(COSTS, budgets[self.budget], strict=True):
                    if (cost := getattr(self.bulk, name)) > most:
                        yield f"{cost:.2f} {name} instructions per score element, the budget is {most:.2f}"
            elif complete and self.dtype in HALF:
                yield "no budget: run with --write-budgets"

    def __str__(self) -> str:
        where = f"{self.target} {self.kernel} {self.dtype} D={self.head_dim} {self.preset} {self.mask} {self.feature}"
        return f"{where} [{self.tile}]"


# ---- calls ---------------------------------------------------------------------------------------------------------


def value_dim(head_dim: int, feature: str) -> int:
    """Return the head_dim of v in a call with these features, where that of q and k is given."""
    features = feature.split("+")
    return 8 * head_dim if "wide_values" in features else head_dim // 2 if "value_dim" in features else head_dim


def call(case: Case, preset: str) -> None:
    """Run the launchers, forward and backward with everything learned, on tensors of the meta device."""
    import logpe_kernels
    from logpe_kernels import configs

    from bench.speed import yardstick  # imports triton, which must not be in this process yet
    from logpe import LogPosition

    meta = functools.partial(torch.empty, device="meta")
    dtype: torch.dtype = getattr(torch, case.dtype)
    features = case.feature.split("+")
    # 40 and 80, which round up to the table's; 40 is no multiple of 16
    head_dim = case.head_dim * 5 // 8 if "ragged" in features else case.head_dim
    batch, heads = 2, 4
    kv_heads = 1 if "grouped" in features else heads
    num_queries = 1 if {"decode", "paged"} & {*features} else LENGTH
    if preset == YARDSTICK:
        if case.feature == "plain":
            x, lse = meta((batch, heads, LENGTH, head_dim), dtype=dtype), meta((batch, heads, LENGTH))
            yardstick.forward(x, x, x, x, lse, causal=case.mask == "causal")
        return
    position = LogPosition(
        heads, head_dim, preset.removesuffix("+gain"), query_gain=preset.endswith("+gain"), device="meta"
    )
    options = position()._asdict() | dict(scale=head_dim**-0.5, max_seqlen_q=num_queries, max_seqlen_k=LENGTH)
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
    if "float32_out" in features:
        options |= dict(out_dtype=torch.float32)
    given = logpe_kernels.Options(**options)
    rows = (heads, num_queries, head_dim), (kv_heads, LENGTH, head_dim)
    q, k, v = (
        meta((batch * n, h, size) if packed else (batch, h, n, size), dtype=dtype)
        for h, n, size in (*rows, (kv_heads, LENGTH, value_dim(head_dim, case.feature)))
    )
    if "paged" in features:  # there is no backward over pages
        k = v = meta((LENGTH // PAGE_SIZE, kv_heads, PAGE_SIZE, head_dim), dtype=dtype)
        pages = meta((batch, LENGTH // PAGE_SIZE), dtype=torch.int32)
        logpe_kernels.attention(q, k, v, given._replace(block_table=pages))
        return
    if "specialized" in features:  # there is no such backward kernel
        with configs.override(forward=configs.Config(**SPECIALIZED)):
            logpe_kernels.attention(q, k, v, given)
        return
    out, lse = logpe_kernels.attention(q, k, v, given)
    dlse = torch.empty_like(lse) if "dlse" in features else None
    logpe_kernels.attention_backward(torch.empty_like(out, dtype=dtype), dlse, q, k, v, out, lse, given)


def cases(
    targets: Iterable[str],
    dtypes: Iterable[str],
    head_dims: Iterable[int],
    presets: tuple[str, ...],
    features: tuple[str, ...] = FEATURES,
) -> Iterator[Case]:
    """Yield all cases: the grid, and every feature at the common sizes. Presets share a case, as they share kernels.

    alibi, whose kernels are those of none and a multiply-add, is compiled at the common sizes in half precision.
    """
    for target, head_dim, dtype in itertools.product(targets, head_dims, dtypes):
        common = head_dim in (64, 128 if dtype in HALF else 64)
        here = tuple(preset for preset in presets if preset != "alibi" or (common and dtype in HALF))
        for mask in MASKS if "plain" in features and here else ():
            yield Case(target, dtype, head_dim, here, mask)
        if common and "log-bias" in presets:
            for feature in (feature for feature in features if feature not in ("plain", "wide_values", "specialized")):
                mask = "full" if feature == "key_bias" else "causal"
                yield Case(target, dtype, head_dim, ("log-bias",), mask, feature)
        if common and dtype in HALF and target == "sm_90" and "specialized" in features:
            yield Case(target, dtype, head_dim, presets, "causal", "specialized")
        if head_dim == 32 and dtype in HALF and "log-bias" in presets and "wide_values" in features:  # of 256 columns
            yield Case(target, dtype, head_dim, ("log-bias",), "causal", "wide_values")


def quick_cases(targets: Iterable[str]) -> Iterator[Case]:
    """Yield a slice of all cases: on each target the common size, and the heaviest position where it is tightest."""
    for target in targets:
        yield Case(target, "bfloat16", 64, ("log-bias", "log-bias-rope"))
        yield Case(target, "bfloat16", 128, ("log-invariant+gain",))
        if target == "sm_90":
            yield Case(target, "bfloat16", 128, ("none", "log-bias"), "causal", "specialized")
    rest = [
        ("float32", 64, ("log-bias",), "full", "plain"),
        ("float16", 32, ("log-rotary-bias",), "causal", "packed+grouped+wide_values"),
        ("float16", 64, ("log-bias",), "causal", "lengths+window"),
        ("float16", 64, ("log-bias",), "full", "ragged+key_bias"),
        ("bfloat16", 64, ("none",), "causal", "dropout+dlse"),
        ("float32", 64, ("log-bias",), "causal", "decode"),
    ]
    for target, case in zip(itertools.cycle(targets), rest, strict=False):
        yield Case(target, *case)


# ---- compilation -----------------------------------------------------------------------------------------------------


class Driver:
    """A driver that claims to be a GPU. Each target is a device of its own, so that no kernel serves another's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> int:
        """Return the number of the target, by which Triton keeps kernels."""
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what Triton calls the target."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.name][:3])

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors lie."""
        return torch.device("meta")


def compile_case(
    case: Case,
    kernels: tuple[str, ...] | None = None,
    table: Path | None = None,
) -> list[Row]:
    """Return one row for each kernel that the case launches.

    Args:
        kernels: names of those wanted, None for all.
        table: a file of configurations to use in place of the shipped ones.
    """
    from logpe_kernels import configs, plan
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows: dict[tuple[str, str], Row] = {}  # by kernel and preset
    compile_only = JITFunction.run
    preset = ""

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        name = function.fn.__name__.removesuffix("_kernel")
        if kernels is not None and name not in kernels:
            return
        config = {field: keywords[field] for field in configs.Config._fields if field in keywords}
        given = dict(zip(function.arg_names, args, strict=False))
        if name == "specialized":  # whose launch counts its first warpgroup alone
            name, config = "forward", SPECIALIZED
        elif name == "dkdv" and None in (given["dk"], given["dv"]):
            name = "dk" if given["dv"] is None else "dv"
        row = Row(case.target, case.dtype, case.head_dim, preset, case.mask, case.feature, name, config)
        start = time.perf_counter()
        try:
            kernel = compile_only(function, *args, grid=grid, warmup=True, **keywords)
            row.seconds = round(time.perf_counter() - start, 2)
            same = next((other for (key, _), other in rows.items() if key == kernel.hash), None)
            if same is None:
                inspect_kernel(kernel, row)
            else:  # Presets share kernels.
                row = dataclasses.replace(same, preset=preset)
            rows[kernel.hash, preset] = row
        except Exception as error:
            row.error = f"{type(error).__name__}: {str(error).strip()[-500:]} {complaint()}".strip()
            rows[str(row), preset] = row

    with ExitStack() as stack:
        stack.callback(plan.clear)
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(configs, "target_of", return_value=case.target))
        if table is not None:
            stack.enter_context(mock.patch.object(configs, "TABLE", table))
        plan.clear()
        driver.set_active(Driver(case.target))
        for preset in case.presets:
            call(case, preset)
    return list(rows.values())


def disassemble(kernel: Any) -> str:
    """Return the machine code of a compiled kernel as text: SASS, or AMD's assembly."""
    if "amdgcn" in kernel.asm:
        return kernel.asm["amdgcn"]
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _output(nvidia.cuobjdump.path, "-sass", file.name)


def inspect_kernel(kernel: Any, row: Row) -> None:
    """Fill in a row with what the compiled kernel uses."""
    code = disassemble(kernel)
    row.shared = kernel.metadata.shared
    row.tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    gluon = "ttir" not in kernel.asm  # which is written in the terms of ttgir
    row.products = kernel.asm["ttgir"].count("warp_group_dot ") if gluon else kernel.asm["ttir"].count("tt.dot ")
    if "amdgcn" in kernel.asm:

        def field(name: str) -> int:
            match = re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)
            return int(match[1]) if match else 0

        # vgpr_count includes the accumulation registers. Spills are counted in registers of 4 bytes.
        row.registers, row.spill = field("vgpr_count"), 4 * field("vgpr_spill_count")
        row.stack = field("private_segment_fixed_size")
    else:
        row.registers, row.stack = _resources(kernel.asm["cubin"])
        row.spill = _spill(kernel, row.registers, row.stack) if row.stack else 0
    lines, _ = roofline.instructions(code)
    row.instructions = len(lines)
    row.matrix = roofline.count(roofline.MATRIX, lines)
    if row.kernel in roofline.PRODUCTS:
        warp_size = TARGETS[row.target].warp_size
        tile = row.config["BLOCK_M"] * row.config["BLOCK_N"] / (row.config["num_warps"] * warp_size)
        row.repeated = roofline.repetition(kernel.asm["ttgir"])
        row.loops = roofline.loops_over_tiles(code, row.depth, tile, warp_size, row.repeated)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack that a thread of a cubin uses."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(nvidia.cuobjdump.path, "-res-usage", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2])


def _spill(kernel: Any, registers: int, stack: int) -> int:
    """Return the bytes that ptxas spills: the part of the stack that is no array of a library routine.

    The cubin does not tell the two apart; ptxas does when asked to be verbose. Its options differ between Triton's
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
            match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
            used = re.search(r"Used (\d+) registers", log)
            if match and used and (int(used[1]), int(match[1])) == (registers, stack):
                return max(int(match[2]), int(match[3]))
    return stack


# ---- many of them ----------------------------------------------------------------------------------------------------


def compile_all(
    todo: list[Case],
    kernels: tuple[str, ...] | None = None,
    table: Path | None = None,
    jobs: int = 1,
) -> Generator[tuple[Case, list[Row]], None, None]:
    """Yield each case with its rows, compiled in worker processes, as they are done.

    A case that the compiler does not survive becomes a failed row.
    """

    def attempt(worker: Worker, case: Case) -> list[Row]:
        try:
            return worker.call(compile_case, case, kernels, table, seconds=LIMIT)
        except Failed as error:
            if len(case.presets) > 1:
                alone = [dataclasses.replace(case, presets=(preset,)) for preset in case.presets]
                return [row for one in alone for row in attempt(worker, one)]
            where = (case.target, case.dtype, case.head_dim, case.presets[0], case.mask, case.feature)
            return [Row(*where, kernel="?", config={}, error=str(error))]

    with Pool(jobs) as pool:
        yield from pool.each(attempt, todo)


# ---- what is made of them --------------------------------------------------------------------------------------------


def markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table, whose first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def _setting(row: Row) -> tuple[Any, ...]:
    order = [*roofline.PRODUCTS, row.kernel].index(row.kernel)
    return list(TARGETS).index(row.target), order, row.kernel, row.dtype, row.head_dim


def resources(rows: list[Row]) -> str:
    """Return a line for each target, kernel, dtype, head_dim and tile: the worst over presets, masks and features."""
    columns = ("registers", "spill", "stack", "shared")
    lines = [["target", "kernel", "dtype", "D", "tile", *columns, "of", "programs", "matrix", "seconds", "rows"]]

    def group(row: Row) -> tuple[Any, ...]:
        return *_setting(row), row.tile

    for _, members in itertools.groupby(sorted(rows, key=group), group):
        same = list(members)
        row = same[0]
        worst = [max(getattr(r, name) for r in same) for name in columns]
        least, seconds = min(r.matrix for r in same), max(r.seconds for r in same)
        line = (row.target, row.kernel, row.dtype, row.head_dim, row.tile, *worst, TARGETS[row.target].shared)
        programs = min((r.programs for r in same if r.programs is not None), default="-")
        lines.append([str(entry) for entry in (*line, programs, least, f"{seconds:.1f}", len(same))])
    return markdown(lines)


def costs(rows: list[Row]) -> str:
    """Return what a score element costs with each preset, and how its bound compares with that of none.

    Instructions, and clocks of each unit, in the loop that serves most of a long sequence, of a call with nothing
    but a position and the mask that makes it dearer, and of one that goes to the specialised kernel.
    ``loops``: all instructions per score element, of every loop.
    ``waits``: matrix products of a trip, and waits for them. ``loads``: from global memory, number x bytes of a
    thread, without TMA's. ``serial``: clocks if nothing overlaps.
    Presets that share a kernel share a line. The last columns are ratios: of the bound to that of none, and of the
    issued instructions to those of the yardstick. "-": no rate is published, so nothing bounds.
    """
    counts = ("special", "fp32", "conversions", "issued")
    units = [f"{unit} clocks" for unit in Rates._fields]
    about = ["target", "kernel", "dtype", "D", "preset", "tile"]
    lines = [[*about, *counts, "loops", "waits", "loads", *units, "bound by", "serial", "of none", "of yardstick"]]
    judged = sorted((row for row in rows if row.feature in JUDGED and row.loops), key=_setting)
    for _, members in itertools.groupby(judged, _setting):
        # The last of a name stays: the dearest.
        dearest = {(row.feature, row.preset): row for row in sorted(members, key=lambda row: row.bulk.issued)}
        none, yardstick = dearest.get(("plain", "none")), dearest.get(("plain", YARDSTICK))
        of_none = max(none.clocks.values()) if none else None
        issued = yardstick.bulk.issued if yardstick else None
        alike: dict[str, list[str]] = {}
        for feature, preset in sorted(dearest, key=lambda x: (x[0], [*PRESETS, YARDSTICK].index(x[1]))):
            row = dearest[feature, preset]
            clocks = row.clocks
            unit = max(clocks, key=lambda unit: clocks[unit])
            line = [row.tile, *(f"{getattr(row.bulk, name):.2f}" for name in counts)]
            line.append(" ".join(f"{loop.issued:.1f}" for loop in row.loops))
            line.append(f"{row.bulk.matrix}/{row.bulk.waits}")
            line.append(" ".join(f"{number}x{size}" for size, number in row.bulk.loads.items()))
            line += [f"{clocks[unit]:.4f}" if unit in clocks else "-" for unit in Rates._fields]
            line += [unit, f"{sum(clocks.values()):.4f}", f"{clocks[unit] / of_none:.2f}" if of_none else "-"]
            line.append(f"{row.bulk.issued / issued:.2f}" if issued else "-")
            where = [row.target, row.kernel, row.dtype, str(row.head_dim)]
            same = alike.setdefault(" ".join(line), [*where, "", *line])
            same[4] = ", ".join(filter(None, (same[4], preset)))
        lines += alike.values()
    return markdown(lines)


def read_budgets() -> dict[str, list[float]] | None:
    """Return what a kernel may cost per score element, by Row.budget, in COSTS; None if another Triton wrote them."""
    content = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return content["budgets"] if content.get("triton") == versions()["triton"] else None


def write_budgets(rows: list[Row]) -> int:
    """Set the budgets of what was compiled to a little more than it costs; return how many. Others stay."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        if row.budget is not None and row.loops:
            allowed = [math.ceil(getattr(row.bulk, name) * HEADROOM * 100) / 100 for name in COSTS]
            measured[row.budget] = list(map(max, allowed, measured.get(row.budget, allowed)))
    # One that was measured with another tile is of no use any more.
    settings = {name.partition(" [")[0] for name in measured}
    kept = {name: most for name, most in (read_budgets() or {}).items() if name.partition(" [")[0] not in settings}
    lines = (f"  {json.dumps(name)}: {json.dumps(most)}" for name, most in sorted((kept | measured).items()))
    head = f' "triton": {json.dumps(versions()["triton"])},\n "costs": {json.dumps(COSTS)},\n "budgets": '
    content = "{\n" + head + "{\n" + ",\n".join(lines) + "\n }\n}\n"
    write_whole(BUDGETS, lambda path: path.write_text(content))
    return len(measured)


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    import triton
    from triton.knobs import nvidia

    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        ptxas=nvidia.ptxas.version,
        ptxas_blackwell=nvidia.ptxas_blackwell.version,
    )


def sources(*settings: object) -> str:
    """Return a name for all that the figures depend on: the kernels, their tables, this report, settings, versions."""
    import logpe_kernels

    state = hashlib.sha256(repr((settings, versions())).encode())
    here, kernels = Path(__file__).parent, Path(logpe_kernels.__path__[0])
    report = [here / "compile_report.py", here / "roofline.py"]
    for file in [*report, *sorted(kernels.glob("*.py")), *sorted(kernels.glob("configs/*.json"))]:
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def load(path: Path, state: str) -> tuple[list[Row], list[str]]:
    """Return the rows and calls of an earlier run; none of either if what it compiled was not the same."""
    with reading(path):
        content = json.loads(path.read_text())
        if content["sources"] != state:
            print(f"{path} is of other kernels, versions or settings: starting over")
            return [], []
        fields = [field.name for field in dataclasses.fields(Row)]
        rows = [Row(**{name: row[name] for name in fields}) for row in content["rows"]]
        for row in rows:
            row.loops = [Loop(**loop) for loop in row.loops]  # type: ignore[arg-type]
        return rows, list(content["calls"])


def kernel_names() -> list[str]:
    """Return the names of the kernels that the launchers have."""
    import logpe_kernels

    sources = Path(logpe_kernels.__path__[0]).glob("*.py")
    return sorted({name for file in sources for name in re.findall(r"^def (\w+)_kernel\(", file.read_text(), re.M)})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, with the calls to compile, of which there is at least one, as ``todo``."""
    parser = command.new_parser("bench compile_report", __doc__)
    grid = dict(
        targets=list(TARGETS), head_dims=list(HEAD_DIMS), dtypes=["bfloat16", "float32"], presets=[*PRESETS, YARDSTICK],
        features=list(FEATURES),
    )  # fmt: skip
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="GPUs to compile for (all)")
    parser.add_argument("--kernels", nargs="+", choices=kernel_names(), help="of %(choices)s (all)", metavar="KERNEL")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, help="sizes of a head (all)")
    parser.add_argument("--dtypes", nargs="+", choices=(*HALF, "float32"), help="of q, k and v (bfloat16 float32)")
    parser.add_argument("--presets", nargs="+", choices=(*PRESETS, YARDSTICK), help="positions to compile (all)")
    parser.add_argument("--features", nargs="+", choices=FEATURES, help="variants of the call (all)")
    parser.add_argument("--configs", type=Path, help="a table like configs/default.json to use in its place")
    parser.add_argument("--quick", action="store_true", help="the slice that the tests run, for --targets")
    parser.add_argument("--check", action="store_true", help="exit with 1 if something failed")
    parser.add_argument("--write-budgets", action="store_true", help=f"set those of what is compiled in {BUDGETS.name}")
    processes = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--jobs", type=command.count, default=processes, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file, after every call")
    parser.add_argument("--fresh", action="store_true", help="compile everything again, whatever --out holds")
    parser.add_argument("--minutes", type=command.minutes, default=math.inf, help="begin no call after so long")
    options = parser.parse_args(arguments)
    given = [name for name in grid if getattr(options, name) is not None]
    if options.quick and (foreign := [f"--{name.replace('_', '-')}" for name in given if name != "targets"]):
        parser.error(f"--quick has its own {' '.join(foreign)}: leave one or the other out")
    command.fill_in(options, grid)
    options.todo = list(
        quick_cases(options.targets)
        if options.quick
        else cases(options.targets, options.dtypes, options.head_dims, tuple(options.presets), tuple(options.features))
    )
    if not options.todo:
        parser.error(f"--features {' '.join(options.features)}: there is no such call of these sizes and presets")
    return options


@command.program("bench compile_report")
def main(arguments: list[str] | None = None) -> int:
    """Compile what the command line asks for and report on it; return the exit status."""
    options = parse(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # of the workers: there is nothing to compile when interpreting
    if options.configs:
        with reading(options.configs, "--configs"):
            json.loads(options.configs.read_text())
    with contextlib.nullcontext() if options.out is None else locked(options.out.parent, options.out.name):
        return compile_and_judge(options)


def compile_and_judge(options: argparse.Namespace) -> int:
    """Compile what --out does not hold, and print the report and what is wrong; return the exit status."""
    kernels = tuple(options.kernels) if options.kernels else None
    state = sources(kernels, options.configs and options.configs.read_text())
    rows: list[Row] = []
    calls: list[str] = []
    if options.out and options.out.exists() and not options.fresh:
        rows, calls = load(options.out, state)
    todo = [case for case in options.todo if str(case) not in calls]
    budgets = read_budgets()

    def failures() -> list[str]:
        return [f"{row}: {reason}" for row in rows for reason in row.failures(budgets, complete=not options.configs)]

    start = time.monotonic()
    with (
        tqdm(total=len(todo), unit="call", smoothing=0) as progress,
        contextlib.closing(compile_all(todo, kernels, options.configs, options.jobs)) as compiled,
    ):
        for case, more in compiled:
            rows += more
            calls.append(str(case))
            progress.update()
            if options.out:
                content = dict(versions=versions(), sources=state, calls=calls, failures=failures())
                write_json(options.out, content | dict(rows=[row.figures() for row in rows]))
            if time.monotonic() > start + 60 * options.minutes:
                break
    left = [case for case in todo if str(case) not in calls]
    if options.write_budgets:
        print(f"{write_budgets(rows)} budgets written to {BUDGETS}")
        budgets = read_budgets()
    failed = failures()
    print(resources(rows), costs(rows), sep="\n\n", end="\n\n")
    print(f"{len(rows)} rows of {len(calls)} calls in {time.monotonic() - start:.0f} s, {len(failed)} failures")
    if budgets is None:
        print(f"{BUDGETS.name} has no budgets for Triton {versions()['triton']}: costs were not compared with it")
    elif without := sum(row.budget is not None and row.budget not in budgets for row in rows):
        print(f"{without} of these have no budget in {BUDGETS.name}: their costs were not compared")
    if left:
        print(f"{len(left)} calls are left" + ("" if options.out is None else ": the same command resumes"))
    for failure in failed:
        print(f"FAIL {failure}")
    if options.check and (failed or not rows):
        return 1
    return TIME_IS_OVER if left else 0
