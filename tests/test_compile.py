"""The Triton kernels compile for every target, without a GPU, within its registers and shared memory."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench.speed import compile_report as report  # noqa: E402
from bench.speed import roofline  # noqa: E402
from logpe import files  # noqa: E402
from logpe.command import TIME_IS_OVER  # noqa: E402
from logpe.worker import Failed, Worker  # noqa: E402

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("forward", "backward_dq", "backward_dkdv")
ITEMSIZES = ("2", "4")
HEAD_DIMS = ("16", "32", "64", "128", "256")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), *sys.path]))
    command = [sys.executable, "-m", "bench", "compile_report", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def one_config(tmp_path: Path, target: str, config: list[int]) -> str:
    """A file with a table that has one configuration for everything on one target."""
    entry = {kernel: {size: dict.fromkeys(HEAD_DIMS, config) for size in ITEMSIZES} for kernel in KERNELS}
    file = tmp_path / "table.json"
    file.write_text(json.dumps({target: entry}))
    return str(file)


def test_slice_compiles_for_every_target(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run("--quick", "--check", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    content = json.loads(out.read_text())
    assert content["failures"] == []
    assert content["versions"]["triton"]
    rows = content["rows"]
    assert len(rows) <= 300
    assert {row["target"] for row in rows} == set(TARGETS)
    assert {row["kernel"] for row in rows} >= {"forward", "dq", "dkdv", "rotate"}
    for target in TARGETS:  # Each is compiled on its own: no target is answered from another's cache.
        registers = [row["registers"] for row in rows if row["target"] == target and row["kernel"] == "forward"]
        assert registers, target
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in rows)
    assert all(row["shared"] > 0 for row in rows if row["products"])
    for row in rows:
        if row["kernel"] in roofline.PRODUCTS:  # loops over full and masked tiles, each warp with products of its own
            assert len(row["loops"]) >= (1 if "key_bias" in row["feature"] else 2), row
            assert all(0 < loop["tiles"] <= 1 and loop["special"] >= 1 for loop in row["loops"]), row
            assert row["clocks"]["fp32"] > 0, row
    if triton.__version__ == json.loads(report.BUDGETS.read_text())["triton"]:
        assert "costs were not compared" not in result.stdout


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("sm_80", [128, 128, 4, 1], "spills"),
        ("sm_89", [128, 128, 8, 4], "bytes of shared memory, sm_89 has 101376"),
        ("gfx942", [128, 96, 4, 1], "does not compile"),
    ],
)
def test_check_fails(tmp_path: Path, target: str, config: list[int], reason: str) -> None:
    arguments = ["--targets", target, "--head-dims", "128", "--dtypes", "bfloat16", "--presets", "none"]
    arguments += ["--kernels", "forward", "--configs", one_config(tmp_path, target, config)]
    result = run(*arguments, "--check")
    assert result.returncode == 1, result.stdout + result.stderr[-3000:]
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any(reason in line for line in failures), result.stdout
    assert all(line.startswith(f"FAIL {target} forward bfloat16 D=128") for line in failures)


def test_default_table_has_every_kernel_on_every_target() -> None:
    from logpe_kernels import configs

    shipped = json.loads(configs.TABLE.read_text())  # test_configs looks up every size
    assert set(shipped) == set(TARGETS)
    assert all(set(kernels) == set(KERNELS) for kernels in shipped.values())


# --- loops and their cost, on code written by hand ------------------------------------------------------------------


def sass(code: str) -> str:
    """Return code as cuobjdump prints it. "name:" is a label; where it is named, its address stands."""
    lines = [line.strip() for line in code.strip().splitlines()]
    addresses: dict[str, str] = {}
    text: list[str] = []
    for line in lines:
        if line.endswith(":"):
            addresses[line[:-1]] = f"0x{16 * len(text):x}"
        else:
            text.append(line)
    named = [re.sub(r"\b[a-z]+\b(?!\[)", lambda word: addresses.get(word[0], word[0]), line) for line in text]
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;  /* 0x0 */" for i, line in enumerate(named))


def body(scores: int, special: int = 1, fp32: int = 3, *products: str) -> str:
    """A loop's body for one thread that forms so many scores, with so many instructions for each."""
    return "\n".join(
        [*products, *(["MUFU.EX2 R1, R1"] + ["MUFU.LG2 R2, R2"] * (special - 1) + ["FFMA R3, R3"] * fp32) * scores]
    )


# A warp's products of one 16 x 16 tile with D = 16, forward: 2 * 16 * 16 * 16 multiply-adds.
HMMA = ["HMMA.16816.F32.BF16 R4, R8, R10, R4"] * 4
FORWARD = dict(depth=2 * 16, tile=16 * 16 / 32, warp_size=32)


def test_far_full_and_masked_loops() -> None:
    far, full = body(8, 1, 5, *HMMA), body(8, 2, 3, *HMMA)
    masked = body(8, 2, 3, *HMMA, *["FSEL R1, R1, R2, P0"] * 8)
    code = f"""
        MUFU.EX2 R9, R9
        start:
        {masked}
        @!P0 BRA start
        near:
        {full}
        @!P1 BRA near
        away:
        {far}
        BRA.U !UP0, away
        EXIT
        self:
        BRA self"""
    loops = roofline.loops_over_tiles(sass(code), **FORWARD)
    assert [loop.special for loop in loops] == [2, 2, 1]
    assert [loop.fp32 for loop in loops] == [3, 3, 5]
    assert [loop.issued for loop in loops] == [1 + 5 + 5 / 8, 5 + 5 / 8, 6 + 5 / 8]
    assert {loop.scores for loop in loops} == {8}
    assert roofline.bulk(loops) is loops[2]  # dearer in instructions than the near one
    assert roofline.bulk(loops[:2]) is loops[1]


@pytest.mark.parametrize("unrolled", [1, 2, 3])
def test_unrolling_and_pipelining_change_no_cost(unrolled: int) -> None:
    code = "\n".join(["loop:", *[body(8, 1, 3, *HMMA[:2]), *HMMA[2:]] * unrolled, "@P0 BRA loop", "EXIT"])
    (loop,) = roofline.loops_over_tiles(sass(code), **FORWARD)
    assert (loop.tiles, loop.special, loop.fp32) == (unrolled, 1, 3)
    assert loop.issued == pytest.approx(4 + 4 / 8 + 1 / (8 * unrolled))


def test_waits_in_a_loop_and_behind_the_kernel() -> None:
    code = f"""
        head:
        poll:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2
        @!P0 BRA poll
        BSSY B0, join
        BRA.U !UP0, join
        {body(8, 1, 3, *HMMA)}
        BSYNC B0
        join:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2
        @!P0 BRA tail
        back:
        STL [R1], R5
        @P3 BRA head
        EXIT
        tail:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2
        @!P0 BRA tail
        BRA back"""
    (loop,) = roofline.loops_over_tiles(sass(code), **FORWARD)
    assert loop.instructions == 4 + 4 + 8 * 4 + 1 + 2 + 2 + 3
    assert loop.spills == 1
    assert (loop.tiles, loop.special, loop.fp32) == (1, 1, 3)


def test_warp_specialised_consumers() -> None:
    """Two groups of four warps have half of a 128 x 16 tile each, and loops of their own; a third group loads."""
    half = body(8, 1, 3, *["HGMMA.64x16x16.F32.BF16 R24, gdesc[UR16], R24"] * 2)
    code = f"""
        again:
        @P0 BRA second
        @P1 BRA loads
        first:
        {half}
        @!P2 BRA first
        BRA again
        second:
        {half}
        @!P2 BRA second
        BRA again
        loads:
        UTMALDG.2D [UR16], [UR8]
        BRA.U UP1, loads
        EXIT"""
    # num_warps says four: for these it would be 16 scores a thread.
    loops = roofline.loops_over_tiles(sass(code), depth=2 * 16, tile=128 * 16 / 128, warp_size=32)
    assert [(loop.scores, loop.tiles, loop.special, loop.fp32) for loop in loops] == [(8, 0.5, 1, 3)] * 2


def test_products_without_a_shape() -> None:
    """Code with tcgen05 or float32 products: exponentials and multiply-adds count tiles; their surplus is no tile."""
    product = "UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR9], tmem[UR52], idesc[UR53], UPT"
    rescale = "\n".join(["rescale:", "MUFU.EX2 R1, R1", "@P0 BRA rescale"])
    code = "\n".join([rescale, "loop:", body(16, 1, 3, product), "MUFU.EX2 R7, R7", "@P0 BRA loop", "EXIT"])
    (loop,) = roofline.loops_over_tiles(sass(code), **FORWARD)
    assert (loop.scores, loop.tiles, loop.fp32) == (16, 2, 3)
    code = "\n".join(["loop:", body(8, 1, 32 + 3), "MUFU.EX2 R7, R7", "@P0 BRA loop", "EXIT"])
    (loop,) = roofline.loops_over_tiles(sass(code), **FORWARD)
    assert (loop.scores, loop.tiles, loop.fp32, loop.special) == (8, 1, 35, 9 / 8)


def layout(vendor: str, warps: list[int], shape: list[int]) -> str:
    return f"#mma = #ttg.{vendor}<{{versionMajor = 2, warpsPerCTA = {warps}, instrShape = {shape}}}>\n"


def dot(m: int, n: int, k: int, name: str = "#mma") -> str:
    operands = f"tensor<{m}x{k}xbf16, #ttg.dot_op<{{opIdx = 0, parent = {name}}}>> * tensor<{k}x{n}xbf16, #shared>"
    return f"%1 = tt.dot %2, %3, %4 {{x = 1 : i32}} : {operands} -> tensor<{m}x{n}xf32, {name}> loc(#loc1)\n"


def test_warps_that_repeat_products() -> None:
    four = layout("nvidia_mma", [4, 1], [16, 8])
    assert roofline.repetition(four + dot(64, 32, 16) + dot(64, 16, 32)) == 1
    assert roofline.repetition(four + dot(32, 32, 16)) == 2
    assert roofline.repetition(four + dot(32, 32, 16) + dot(64, 32, 16)) == 8 / 6  # twice a third, and two thirds
    assert roofline.repetition(layout("nvidia_mma", [1, 8], [16, 8]) + dot(64, 32, 64) + dot(64, 64, 32)) == 1.5
    assert roofline.repetition(layout("amd_mfma", [4, 1], [32, 32, 8]) + dot(64, 32, 16)) == 2
    hopper = (
        dot(64, 32, 16).replace("tt.dot", "ttng.warp_group_dot").replace("tensor<64x16xbf16", "!ttg.memdesc<64x16xbf16")
    )
    assert roofline.repetition(layout("nvidia_mma", [8, 1], [16, 32, 16]) + hopper) == 2
    assert roofline.repetition(four + dot(4, 4, 4, "#blocked")) == 1  # no matrix instruction
    code = sass("\n".join(["start:", body(16, 1, 3, *HMMA * 2), "@P0 BRA start", "EXIT"]))
    for repeated, scores in ((1.0, 16), (2.0, 8)):
        (loop,) = roofline.loops_over_tiles(code, **FORWARD, repeated=repeated)
        assert (loop.scores, loop.special) == (scores, 16 / scores)
    row = row_of("none", loop_of(1, 4, 9), matrix=12, products=2, repeated=1.5)
    assert list(row.failures(None)) == ["warps repeat products: 1.50 times the multiply-adds that the tiles need"]
    assert row.clocks["matrix"] == 1.5 * dataclasses.replace(row, repeated=1.0).clocks["matrix"]


def test_amd() -> None:
    body = ["v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]"] * 2
    body += ["v_exp_f32_e32 v1, v1", "v_pk_fma_f32 v[2:3], v[2:3], v[4:5]", "v_sub_f32_e32 v1, v1, v2"] * 8
    body += ["v_cvt_f16_f32_e32 v1, v1", "s_cbranch_scc1 .LBB0_2", "s_endpgm"]
    code = "\n".join(["\ts_mov_b32 s0, 0", ".LBB0_2:                        ; %loop", *(f"\t{line}" for line in body)])
    (loop,) = roofline.loops_over_tiles(code, depth=2 * 16, tile=32 * 16 / 64, warp_size=64)
    assert (loop.scores, loop.tiles, loop.special, loop.fp32, loop.conversions) == (8, 1, 1, 3, 1 / 8)
    assert loop.instructions == 2 + 24 + 2


def loop_of(special: float, fp32: float, issued: float) -> roofline.Loop:
    return roofline.Loop(
        instructions=64, spills=0, matrix=12, waits=2, scores=8, tiles=1,
        special=special, fp32=fp32, conversions=0, issued=issued,
    )  # fmt: skip


def row_of(preset: str, *loops: roofline.Loop, **more: object) -> report.Row:
    config = dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2, TMA=True, WARP_SPECIALIZE=False)
    row = report.Row("sm_90", "bfloat16", 128, preset, "causal", "plain", "forward", config, loops=list(loops))
    return dataclasses.replace(row, **more)


def test_what_a_loop_may_not_do() -> None:
    """Wait for every product, or spill more than a little; around the loops a kernel may spill."""
    loop = loop_of(1, 4, 9)

    def failures(loop: roofline.Loop) -> list[str]:
        return list(row_of("none", loop, spill=16, matrix=12, products=2).failures(None))

    assert failures(loop) == failures(dataclasses.replace(loop, instructions=500, spills=10)) == []
    assert failures(dataclasses.replace(loop, instructions=500, spills=11)) == [
        "spills 16 bytes: 11 of the 500 instructions of a loop"
    ]
    assert failures(dataclasses.replace(loop, waits=12)) == ["12 waits for the 12 matrix products of a loop"]
    assert failures(dataclasses.replace(loop, instructions=500, loads={"16": 99, "4": 9, "2": 9, "1": 1})) == []
    assert failures(dataclasses.replace(loop, instructions=500, loads={"2": 11})) == [
        "11 loads of single elements among the 500 instructions of a loop"
    ]


def test_widths_of_loads() -> None:
    nvidia = ["LDG.E.U16.CONSTANT R1, desc[UR4][R2.64]", "@P0 LDG.E R1, desc[UR4][R2.64]", "LDG.E.U8 R1, [R2.64]"]
    nvidia += ["LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]", "LDGSTS.E.LTC128B.64 [R1+0x400], [R2.64+0x80]"]
    assert roofline.loads(["LDS.128 R1, [R2]", *nvidia]) == {"16": 1, "8": 1, "4": 1, "2": 1, "1": 1}
    amd = ["global_load_dwordx4 v[0:3], v[4:5], off", "global_load_ushort v1, v[2:3]"]
    amd += ["buffer_load_dword v1, v2, s[0:3]", "buffer_load_short_d16_hi v1, v2, s[0:3]"]
    assert roofline.loads(amd) == {"16": 1, "4": 1, "2": 2}


def test_programs_of_a_multiprocessor() -> None:
    row = row_of("none", registers=255, shared=113 * 1024)
    assert row.programs == 1  # 8 warps of 256 registers a thread take all of them
    row = dataclasses.replace(row, registers=220, config=dict(num_warps=4))
    assert row.programs == 2
    assert dataclasses.replace(row, shared=114 * 1024).programs == 1
    assert dataclasses.replace(row, target="gfx942").programs is None


def test_roofline_beside_none() -> None:
    none, bias = row_of("none", loop_of(1, 4, 9)), row_of("log-bias", loop_of(2, 7, 20), loop_of(3, 7, 21))
    assert none.clocks == dict(matrix=0.125, special=1 / 16, fp32=4 / 128, issue=9 / 128)
    assert bias.clocks == dict(matrix=0.125, special=2 / 16, fp32=7 / 128, issue=20 / 128)
    yardstick = row_of("yardstick", loop_of(1, 4, 8))
    assert yardstick.budget is None  # it is not ours
    table = report.costs([bias, yardstick, none, dataclasses.replace(none, preset="log-rotary")]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [line[4:6] for line in cells[2:]] == [
        ["none, log-rotary", "128x64 num_warps=8 num_stages=2 TMA"],
        ["log-bias", "128x64 num_warps=8 num_stages=2 TMA"],
        ["yardstick", "128x64 num_warps=8 num_stages=2 TMA"],
    ]
    assert [line[-4:] for line in cells[2:4]] == [
        ["matrix", "0.2891", "1.00", f"{9 / 8:.2f}"],
        ["issue", "0.4609", "1.25", "2.50"],
    ]
    assert "special" not in row_of("none", loop_of(1, 4, 9), target="gfx942").clocks
    assert "matrix" not in row_of("none", loop_of(1, 4, 9), dtype="float32").clocks


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "BUDGETS", tmp_path / "budgets.json")
    assert report.read_budgets() is None
    good, other = row_of("none", loop_of(1, 4, 9)), row_of("log-bias", loop_of(2, 7, 12))
    assert list(good.failures(report.read_budgets(), complete=True)) == []
    assert report.write_budgets([good, other, row_of("none", loop_of(1, 4, 8), mask="full")]) == 2
    budgets = report.read_budgets()
    assert budgets is not None
    assert budgets[good.budget or ""] == [1.03, 4.12, 9.27]
    assert list(good.failures(budgets, complete=True)) == []

    worse = row_of("none", loop_of(1, 4, 9.3), dtype="float16")
    assert list(worse.failures(budgets)) == ["9.30 issued instructions per score element, the budget is 9.27"]
    assert list(row_of("none").failures(budgets)) == ["no loop over tiles found in its code"]
    moved = row_of("none", loop_of(1, 4, 7), config=dict(good.config, TMA=False))
    assert list(moved.failures(budgets)) == []
    assert list(moved.failures(budgets, complete=True)) == ["no budget: run with --write-budgets"]
    exact = row_of("none", loop_of(9, 9, 99), dtype="float32")
    assert list(exact.failures(budgets, complete=True)) == []
    packed = row_of("none", loop_of(9, 9, 99), feature="packed")
    assert list(packed.failures(budgets, complete=True)) == []

    report.write_budgets([moved])  # that of the tile that it had is dropped, others stay
    assert set(report.read_budgets() or {}) == {moved.budget, other.budget}
    content = json.loads(report.BUDGETS.read_text())
    report.BUDGETS.write_text(json.dumps(content | dict(triton="0")))
    assert report.read_budgets() is None


def test_bounded_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    compiled: list[report.Case] = []

    def compile_all(todo: list[report.Case], *rest: object) -> Iterator[tuple[report.Case, list[report.Row]]]:
        for case in todo:
            compiled.append(case)
            yield case, [row_of(preset, loop_of(1, 4, 9), mask=case.mask) for preset in case.presets]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(report, "compile_all", compile_all)
    monkeypatch.setattr(report, "BUDGETS", tmp_path / "budgets.json")
    out = tmp_path / "out" / "report.json"
    command = ["--targets", "sm_90", "--dtypes", "bfloat16", "--head-dims", "128", "--features", "plain", "--check"]
    command += ["--write-budgets", "--presets", "none", "--out", str(out)]
    assert report.main([*command, "--minutes", "0"]) == TIME_IS_OVER
    assert "1 calls are left: the same command resumes" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["clocks"]["matrix"] == 0.125
    assert report.main(command) == 0
    assert [case.mask for case in compiled] == ["causal", "full"]
    assert "2 rows of 2 calls" in capsys.readouterr().out
    assert report.main([*command, "--kernels", "forward"]) == 0
    assert "starting over" in capsys.readouterr().out
    assert len(compiled) == 4
    assert report.main([*command, "--kernels", "forward", "--fresh"]) == 0
    assert len(compiled) == 6
    assert report.main([*command, "--dtypes", "float32", "--fresh"]) == 0
    with files.locked(out.parent, out.name):
        assert report.main(command) == 2
    out.write_text(out.read_text()[:-9])
    assert report.main(command) == 2
    assert f"{out} is damaged" in capsys.readouterr().err


def test_a_compiler_that_aborts_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(worker: Worker, function: object, case: report.Case, *rest: object, seconds: float) -> list[report.Row]:
        assert function is report.compile_case
        if "none" in case.presets:
            raise Failed("killed by signal 6 (SIGABRT): LLVM ERROR: no")
        return [row_of(preset) for preset in case.presets]

    monkeypatch.setattr(Worker, "call", call)
    cases = [report.Case("sm_90", "bfloat16", head_dim, ("none", "log-bias")) for head_dim in (64, 128)]
    compiled = dict(report.compile_all(cases, jobs=2))
    assert set(compiled) == set(cases)
    for failed, row in compiled.values():  # each preset was compiled alone
        assert list(failed.failures(None)) == ["does not compile: killed by signal 6 (SIGABRT): LLVM ERROR: no"]
        assert row.error is None


def test_what_the_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    assert report.sources() == report.sources() != report.sources("other settings")
    assert {"forward.py", "tile.py", "default.json", "compile_report.py", "roofline.py"} <= set(read)
    assert "throughput.py" not in read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--dtypes", "float32"], "--quick has its own --dtypes"),
        (["--kernels", "backward"], "--kernels: invalid choice: 'backward'"),
        (["--features", "window", "--presets", "none"], "--features window: there is no such call"),
        (["--features", "window", "--head-dims", "16"], "--features window: there is no such call"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--minutes", "nan"], "--minutes: must be at least 0, got nan"),
    ],
)
def test_what_would_check_nothing_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        report.parse(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
