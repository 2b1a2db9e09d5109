"""What the loops of a disassembled kernel cost per score element, and the roofline that follows.

A loop over tiles is an innermost loop that takes exponentials, since every score goes through one. Its instructions
are those of the natural loop of a jump back, wherever the compiler put them: waits for a barrier lie behind the
kernel. All of them count as issued once in a trip. A warp-specialised kernel has a loop for each of its roles; those
without exponentials (loads, tcgen05's issue and rescaling) belong to other warps and are left out.

Counts are per score element (the instructions that a thread issues in one trip over the scores that it forms in one),
so that tiles, numbers of warps and unrolling compare. How many scores a trip forms the matrix instructions tell:
their shape says how many multiplications a warp does, and a score needs head_dim of them in each product. That holds
for pipelined and unrolled loops, and for warps that share a tile in other ways than ``num_warps`` says. Where a tile
is too small for all warps, some repeat the products of others; Triton's layouts tell how many, and those do not count.
tcgen05's instructions do not tell their shape, there the exponentials count the scores, and without matrix
instructions (float32) the fused multiply-adds do; both up to whole tiles, since they have other uses too.

The roofline is the time in clocks that each unit of an SM needs per score element if nothing else holds it up; the
bound is the largest of them. It assumes that all units overlap perfectly, loads included: a kernel cannot be faster,
and will be slower. Their sum is the time if nothing overlaps: the truth lies between the two. On sm_90 matrix products
are asynchronous, and where each of them is waited for, which ptxas may decide, they overlap with nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

#: Matrix products that each kernel forms from one tile of scores. dq: S, dP, dq; dkdv: S, dP, dv, dk. In two launches,
#: dk: S, dP, dk; dv: S, dv.
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}
#: Those of them with v or its gradient, whose rows may be shorter or longer than those of q and k: P v; dP; dP, dv.
VALUE_PRODUCTS = {"forward": 1, "dq": 1, "dkdv": 2, "dk": 1, "dv": 1}

MATRIX = re.compile(
    r"\bHGMMA\.(?P<M>\d+)x(?P<N>\d+)x(?P<K>\d+)"  # sm_90, of four warps
    r"|\b[HIQ]MMA\.16(?P<n>8)(?P<k>\d+)"  # sm_80 to sm_120, M = 16, of one warp
    r"|\bv_mfma_\w+?_(?P<m_amd>\d+)x(?P<n_amd>\d+)x(?P<k_amd>\d+)"
    r"|\bUTC[A-Z]MMA"  # tcgen05, sm_100: the shape stands in a descriptor
)
EXPONENTIAL = re.compile(r"\bMUFU\.EX2|\bv_exp_f32")
SPECIAL = re.compile(r"\bMUFU\b|\bv_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f32")
FP32 = re.compile(r"\bF(?:FMA|ADD|MUL)(?P<two>2)?\b|\bv_(?P<packed>pk_)?(?:fma\w*|mac|add|sub|subrev|mul)_f32")
FMA = re.compile(r"\bFFMA(?P<two>2)?\b|\bv_(?P<packed>pk_)?(?:fma\w*|mac)_f32")
CONVERSION = re.compile(r"\b(?:F2F|F2FP|F2I|I2F|I2FP)\b|\bv_cvt_")
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_")
LOAD = re.compile(  # from global memory; 4 bytes of a thread where nothing else is said
    r"\b(?:LDG|LDGSTS)\b(?:\S*?\.[US]?(?P<bits>128|64|16|8)\b)?"
    r"|\b(?:global|buffer)_load_(?:dword(?:x(?P<words>\d))?|[su]?(?P<part>short|byte))"
)


class Rates(NamedTuple):
    """What one SM (AMD: compute unit) does in a clock, in operations of a thread; None where no vendor says."""

    matrix: float  # multiply-adds of bfloat16 or float16 with sums in float32
    special: float | None
    fp32: float
    issue: float | None


@dataclass
class Loop:
    """One loop over tiles."""

    instructions: int
    spills: int  # of these, that reach for spilled registers
    matrix: int  # of these, matrix products
    waits: int  # of these, that wait for asynchronous matrix products
    scores: float  # that one thread forms in a trip
    tiles: float  # the same, in parts of what num_warps warps would form of one tile each
    # Per score element:
    special: float  # exponential, logarithm, reciprocal, square root
    fp32: float  # float32 multiplications and additions; packed ones count as two
    conversions: float
    issued: float  # all instructions
    loads: dict[str, int] = field(default_factory=dict)  # from global memory but for TMA's, by bytes of a thread

    @property
    def narrow(self) -> int:
        """The loads of less than 4 bytes: single elements in half precision, which cp.async cannot fetch."""
        return sum(number for width, number in self.loads.items() if int(width) < 4)


def instructions(code: str) -> tuple[list[str], list[list[int]]]:
    """Return the instructions of a disassembled kernel (SASS or AMD's), and what may run before each of them.

    The latter is, for each instruction, the indices of those from which control may come to it.
    """
    lines: list[str] = []
    places: dict[str, int] = {}  # of addresses or labels
    for line in code.splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):  # SASS: /*0a10*/ @P0 BRA 0x9f0 ;
            places[f"0x{int(match[1], 16):x}"] = len(lines)
            lines.append(match[2])
        elif match := re.match(r"(\.LBB\w+):", line):
            places[match[1]] = len(lines)
        elif match := re.match(r"\t([a-z]+_\w+\b.*)", line):  # AMD: s_cbranch_scc1 .LBB0_2
            lines.append(match[1])
    before: list[list[int]] = [[] for _ in lines]
    joins: dict[str, str] = {}  # where the threads that BSSY parts go on after BSYNC
    for i, line in enumerate(lines):
        target = None
        if match := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)|^s_c?branch\w*\s+(\.LBB\w+)", line):
            target = match[1] or match[2]
        elif match := re.match(r"BSSY\S* (B\d+), (0x[0-9a-f]+)", line):
            joins[match[1]] = match[2]
        elif match := re.match(r"BSYNC\S* (B\d+)", line):
            target = joins.get(match[1])
        if target in places and places[target] < len(lines):
            before[places[target]].append(i)
        # A branch with a predicate among its operands (BRA.U !UP0, 0x9f0) goes on like one with it in front.
        ends = re.match(r"(?:BRA 0x|BRX|JMX|EXIT|RET|BSYNC|s_branch|s_endpgm|s_setpc)", line)
        if not ends and i + 1 < len(lines):
            before[i + 1].append(i)
    return lines, before


def natural_loops(before: list[list[int]]) -> list[list[int]]:
    """Return each loop's instructions: those from which a jump back is reached without passing its target again."""
    loops: dict[int, set[int]] = {}
    for head, origins in enumerate(before):
        for origin in origins:
            if origin < head:
                continue
            body, todo = {head}, [origin]
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before[i]
            # One that can be entered elsewhere than at its head is no loop, but a return from code out of line.
            if all(before[i] and i > 0 for i in body - {head}):
                loops.setdefault(head, set()).update(body)
    return [sorted(body) for body in loops.values()]


def multiply_adds(line: str) -> float:
    """Return the multiply-adds of a matrix instruction, per warp; 0 for others, and where the shape is not told."""
    match = MATRIX.search(line)
    if match is None:
        return 0
    if match["M"]:
        return int(match["M"]) * int(match["N"]) * int(match["K"]) / 4
    if match["n"]:
        return 16 * int(match["n"]) * int(match["k"])
    if match["m_amd"]:
        return int(match["m_amd"]) * int(match["n_amd"]) * int(match["k_amd"])
    return 0


def count(pattern: re.Pattern[str], lines: Iterable[str]) -> int:
    """Return how many instructions match; packed ones, which work on two values, count twice."""
    hits = [match.groupdict() for line in lines if (match := pattern.search(line))]
    return sum(2 if hit.get("two") or hit.get("packed") else 1 for hit in hits)


def loads(lines: Iterable[str]) -> dict[str, int]:
    """Return how many loads from global memory there are, by the bytes that a thread loads, widest first."""
    sizes: Counter[int] = Counter()
    for match in filter(None, map(LOAD.search, lines)):
        if match["part"]:
            sizes[2 if match["part"] == "short" else 1] += 1
        else:
            sizes[int(match["bits"]) // 8 if match["bits"] else 4 * int(match["words"] or 1)] += 1
    return {str(size): number for size, number in sorted(sizes.items(), reverse=True)}


def repetition(ttgir: str) -> float:
    """Return how many times as many multiply-adds all warps do together as their tiles need; 1 where none repeats.

    A warp works on instrShape of a tile at a time, and warpsPerCTA lie side by side: on 64 x 8 elements with [4, 1] and
    [16, 8]. A tile of 32 rows is then formed twice. tcgen05's instructions belong to all warps together.
    """
    layouts = {
        name: [number * size for number, size in zip(map(int, (a, b)), map(int, (m, n)), strict=True)]
        for name, a, b, m, n in re.findall(
            r"^(#\w+) = #ttg\.(?:nvidia|amd)_\w+<\{.*warpsPerCTA = \[(\d+), (\d+)\].*instrShape = \[(\d+), (\d+)",
            ttgir,
            re.MULTILINE,
        )
    }
    done = needed = 0
    for depth, m, n, name in re.findall(r"dot\b.* : \S*?<\d+x(\d+)x.* -> tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir):
        if name in layouts:  # and is a matrix instruction's
            rows, columns = map(max, (int(m), int(n)), layouts[name])
            done += rows * columns * int(depth)
            needed += int(m) * int(n) * int(depth)
    return done / needed if needed else 1.0


def loops_over_tiles(code: str, depth: int, tile: float, warp_size: int, repeated: float = 1.0) -> list[Loop]:
    """Return the loops over tiles of a disassembled kernel, in their order in the code.

    Args:
        depth: multiply-adds that a score needs, head_dim in each of the kernel's PRODUCTS.
        tile: elements of the tile per thread, BLOCK_M * BLOCK_N / (num_warps * warp_size).
        repeated: :func:`repetition` of the kernel.
    """
    lines, before = instructions(code)
    tcgen05 = any(re.search(r"\bUTC[A-Z]MMA", line) for line in lines)
    bodies = [body for body in natural_loops(before) if any(EXPONENTIAL.search(lines[i]) for i in body)]
    innermost = [body for body in bodies if not any(set(other) < set(body) for other in bodies)]
    loops = []
    for indices in sorted(innermost):
        body = [lines[i] for i in indices]
        scores = sum(map(multiply_adds, body)) / (depth * warp_size * repeated)
        if not scores:
            tiles = count(EXPONENTIAL, body) // tile if tcgen05 else count(FMA, body) // (depth * tile)
            scores = tile * tiles
        if scores:  # otherwise a few exponentials beside: a factor for each row, say
            loop = Loop(
                instructions=len(body),
                spills=count(SPILL, body),
                matrix=count(MATRIX, body),
                waits=count(WAIT, body),
                scores=scores,
                tiles=scores / tile,
                special=count(SPECIAL, body) / scores,
                fp32=count(FP32, body) / scores,
                conversions=count(CONVERSION, body) / scores,
                issued=len(body) / scores,
                loads=loads(body),
            )
            loops.append(loop)
    return loops


def bulk(loops: list[Loop]) -> Loop:
    """Return the loop that serves most of a long sequence.

    It is the cheapest: full tiles do without a mask, and tiles far away without a logarithm. A special function
    counts as 8 instructions, of which an SM issues 128 in the clock in which it takes 16 special ones.
    """
    return min(loops, key=lambda loop: 8 * loop.special + loop.issued)


def clocks(loop: Loop, depth: float | None, rates: Rates) -> dict[str, float]:
    """Return the clocks of an SM per score element that each unit needs; depth None: no matrix unit is used."""
    work = (depth, loop.special, loop.fp32, loop.issued)
    return {
        unit: amount / rate
        for unit, amount, rate in zip(Rates._fields, work, rates, strict=True)
        if amount is not None and rate is not None
    }
