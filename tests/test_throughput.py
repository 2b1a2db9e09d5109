"""bench.speed.throughput without its clock, and bench.speed.runner: what is compared, counted, kept and drawn."""

import csv
import errno
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import RESULTS, status_of

from bench.plots import COLOURS
from bench.speed import runner, throughput
from bench.speed.throughput import BENCH, METHODS, OURS, Case
from bench.study import extrapolation
from logpe import clock, files
from logpe.clock import Repeats
from logpe.command import TIME_IS_OVER
from logpe.worker import Failed, TookTooLong, Worker

SMALL = Case("log-bias", "forward", 48, batch=2, heads=4, kv_heads=2, head_dim=16)
CPU_METHODS = [name for name, m in METHODS.items() if "cpu" in m.devices]


# --- what is counted --------------------------------------------------------------------------------------------------


def test_flops_by_the_usual_convention():
    full = Case("none", "forward", 4096, batch=4, heads=16, kv_heads=4, head_dim=128, causal=False)
    assert full.flops == 4 * 4096**2 * 128 * 16 * 4 == 549_755_813_888
    assert replace(full, direction="backward").flops == 2.5 * full.flops
    assert replace(full, direction="both").flops == 3.5 * full.flops
    for direction in throughput.DIRECTIONS:
        case = replace(full, direction=direction)
        assert replace(case, causal=True).flops == case.flops / 2
    assert throughput.tflops(full, dict(p50=1.0)) == pytest.approx(549.755813888)  # p50 is in ms
    assert math.isnan(throughput.tflops(full, dict(missing="?")))


# --- what is compared -------------------------------------------------------------------------------------------------


def results(case: Case) -> list[torch.Tensor]:
    """out, and gradients by q, k, v and what else is learned."""
    inputs, attention, _ = throughput.prepare(case)
    out = attention.run()
    if case.direction == "forward":
        return [out]
    leaves = [inputs.q, inputs.k, inputs.v, *attention.parameters]
    return [out, *torch.autograd.grad(out, leaves, inputs.dout)]


def uncompiled(monkeypatch):
    """compile nothing with Inductor: for its results flex_attention needs no minute of compiling."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="aot_eager"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["log-bias-frozen", "log-bias", "sdpa-dense", "flex"])
def test_methods_with_the_bias_compute_the_same(name, causal, monkeypatch):
    uncompiled(monkeypatch)
    direction = "both" if METHODS[name].cpu_backward else "forward"
    case = replace(SMALL, method=name, causal=causal, direction=direction)
    actual, expected = results(case), results(replace(case, method="eager"))
    learned = 2 if name == OURS else 0
    assert len(actual) == (4 + learned if direction == "both" else 1)
    for x, y in zip(actual, expected, strict=False):  # eager has the parameters' gradients besides
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_methods_without_the_bias_compute_the_same(causal):
    case = replace(SMALL, method="none", causal=causal, direction="both")
    actual, expected = results(case), results(replace(case, method="sdpa"))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)
    assert (actual[0] - results(replace(case, method=OURS))[0]).abs().max() > 1e-2  # and the bias is no bias of 0


def test_presets_and_what_they_learn():
    learned = {name: len(throughput.prepare(replace(SMALL, method=name)).attention.parameters) for name in CPU_METHODS}
    assert learned["log-bias"] == learned["log-rotary-bias"] == learned["eager"] == 2
    assert learned["log-invariant"] == 3
    assert learned["none"] == learned["log-bias-frozen"] == learned["sdpa"] == learned["sdpa-dense"] == 0
    assert set(METHODS) - set(CPU_METHODS) == {"sdpa-flash", "sdpa-cudnn", "flex-learned"}


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if "cuda" in m.devices])
def test_methods_on_a_gpu(name, causal, device):
    """A method that cannot run there says so, as it does in the bench; one that does is right."""
    case = Case(name, "both", 512, 2, 4, 1, 64, causal, "bfloat16", "cuda")
    reference = {"none": "none", "sdpa-flash": "none", "sdpa-cudnn": "none"}.get(name, "eager")
    if name in ("log-bias-rope", "log-invariant", "log-rotary-bias"):
        pytest.skip("another formula; tests/test_kernels.py checks it")
    try:
        actual = results(case)
    except RuntimeError as error:
        if name.startswith(("sdpa", "flex")):
            pytest.skip(f"{name}: {error}")
        raise
    for x, y in zip(actual[:4], results(replace(case, method=reference)), strict=False):
        assert (x.double() - y.double()).norm() < 0.03 * y.double().norm()
    for direction in throughput.DIRECTIONS:
        row = throughput.measure(replace(case, direction=direction))
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] < 100
        assert row["memory"] > 0
    throughput.forget()


# --- one point --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Few repeats."""
    monkeypatch.setitem(throughput.REPEATS, "cpu", Repeats(seconds=0, at_least=3, at_most=3, longest=1))


class Slow(torch.autograd.Function):
    """A forward pass of 200 ms and a backward pass of 20."""

    @staticmethod
    def forward(ctx, q, k, v):
        time.sleep(0.2)
        ctx.zeros = torch.zeros_like(k), torch.zeros_like(v)
        return q.clone()

    @staticmethod
    def backward(ctx, dout):
        time.sleep(0.02)
        return dout, *ctx.zeros


def test_each_direction_times_its_own(quick, monkeypatch):
    attention = throughput.Method(lambda x: throughput.Attention(lambda: Slow.apply(x.q, x.k, x.v)))
    monkeypatch.setitem(METHODS, "slow", attention)
    rows = {
        direction: throughput.measure(replace(SMALL, method="slow", direction=direction))
        for direction in throughput.DIRECTIONS
    }
    for row in rows.values():
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["repeats"] == 3
        assert row["memory"] is None or row["memory"] >= 0
    assert rows["forward"]["p20"] >= 200
    assert 20 <= rows["backward"]["p20"] < 200
    assert rows["both"]["p20"] >= 220


def test_a_gpu_is_timed_by_its_events(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 12.5

    class Driver:
        def clear_cache(self, cache):
            order.append("clear")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(clock, "l2_buffer", lambda index: None)
    monkeypatch.setattr("triton.runtime.driver._active", Driver())
    seconds = clock.time_once(lambda: order.append("step"), gpu=True)
    assert seconds == pytest.approx(0.0125)
    assert order == ["clear", "sleep", "record", "step", "record", "synchronize"]


def test_repeats_and_their_quantiles():
    def take(seconds, **changes):
        given = iter(seconds)
        return Repeats(**dict(seconds=10, at_least=2, at_most=5, longest=100) | changes).take(lambda: next(given))

    assert take([6, 6, 6]) == [6, 6]
    assert take([20, 30, 40]) == [20, 30]
    assert take([1] * 9) == [1] * 5
    assert take([60, 60]) == [60]  # another one would take too long
    assert take([2, 1, 6, 6], warm_up=3) == [6, 6]
    assert clock.quantiles([3, 1, 2, 4, 5]) == pytest.approx(dict(p20=1.8, p50=3, p80=4.2, repeats=5))


def test_an_error_is_a_row(quick):
    row = throughput.measure(replace(SMALL, method="sdpa-dense", kv_heads=3))
    assert row.keys() == {"missing"}
    assert "Error: " in row["missing"]
    assert not throughput._prepared  # nothing is kept of it
    assert "p50" in throughput.measure(SMALL)
    assert throughput.measure(SMALL, timed=False) == {}  # compiled, not timed


# --- many -------------------------------------------------------------------------------------------------------------


class Canned:
    """Answers in place of the processes, at once, and knows what it was asked."""

    def __init__(self):
        self.asked, self.compiled, self.interrupt_at = [], set(), math.inf

    def call(self, function, case, timed=True, *, seconds):
        assert function is throughput.measure
        if not timed:
            self.compiled.add(case)
            if case.method == "flex":
                raise Failed("the compiler aborted")
            return {}
        self.asked.append(case)
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        if case.method == "eager":
            raise Failed("killed by signal 9 (SIGKILL)")
        return dict(p20=1.0, p50=case.length / 100, p80=9.0, repeats=3, memory=2**20 * case.length)


@pytest.fixture
def canned(monkeypatch):
    canned = Canned()
    monkeypatch.setattr(Worker, "call", lambda worker, *arguments, **options: canned.call(*arguments, **options))
    monkeypatch.setattr(runner, "commit", lambda: "0123")
    return canned


METHODS_OF_A_RUN = ["log-bias", "sdpa", "eager", "flex"]
SIZES = ["--device", "cpu", "--lengths", "128", "64", "--methods", *METHODS_OF_A_RUN, "--long", "--training"]


def command(out, *more):
    return [*SIZES, "--out", str(out), *more]


def test_a_run_its_files_and_its_table(canned, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert throughput.main(command(tmp_path)) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "throughput-cpu.json"
    data = json.loads(path.read_text())
    (run,) = data["runs"]
    assert data["format"] == 1
    assert run["commit"] == "0123"
    assert run["machine"]["torch"] == torch.__version__
    assert run["command"].startswith("python -m bench throughput --device cpu")
    assert len(run["points"]) == 4 * 2 * 3
    assert [case.length for case in canned.asked] == [128] * 10 + [64] * 10  # flex: forward alone
    assert "killed by signal 9 (SIGKILL) (at 64, 128)" in printed
    assert "no backward on the CPU (at 64, 128)" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert list(rows[0])[:10] == list(asdict(SMALL))
    assert len(rows) == len(run["points"])
    by_point = {(row["method"], row["direction"], row["length"]): row for row in rows}
    sdpa = by_point["sdpa", "backward", "128"]
    assert float(sdpa["p50"]) == 1.28
    assert float(sdpa["tflops"]) == pytest.approx(10 * 128**2 * 64 * 8 / 2 / 1.28e-3 / 1e12, abs=1e-4)
    assert float(sdpa["time_over_log_bias"]) == float(sdpa["memory_over_log_bias"]) == 1
    assert sdpa["torch"] == torch.__version__
    assert sdpa["commit"] == "0123"
    assert sdpa["command"] == run["command"]
    assert by_point["eager", "both", "64"]["missing"].startswith("killed")
    assert by_point["eager", "both", "64"]["tflops"] == ""

    path.with_suffix(".csv").unlink()
    asked = len(canned.asked)
    assert throughput.main(["--device", "cpu", "--out", str(tmp_path), "--report"]) == 0
    assert printed == capsys.readouterr().out + "points: 14 measured, 10 failed\n"
    assert path.with_suffix(".csv").exists()
    assert len(canned.asked) == asked


def test_interrupted_and_resumed(canned, tmp_path, monkeypatch, capsys):
    canned.interrupt_at = 5
    assert throughput.main(command(tmp_path)) == 130
    assert "points: 4 measured, 20 to go\n" in capsys.readouterr().out
    path = tmp_path / "throughput-cpu.json"
    before = json.loads(path.read_text())["runs"][0]["points"]
    assert len(before) == 4
    measured = canned.asked[:4]

    canned.asked, canned.interrupt_at = [], math.inf
    assert throughput.main(command(tmp_path)) == 0
    assert not set(measured) & set(canned.asked)
    (run,) = json.loads(path.read_text())["runs"]
    assert run["points"][:4] == before
    assert len({Case.of(row) for row in run["points"]}) == len(run["points"]) == 24

    canned.asked.clear()
    assert throughput.main(command(tmp_path)) == 0
    assert not canned.asked  # all there
    monkeypatch.setattr(runner, "commit", lambda: "4567")
    assert throughput.main(command(tmp_path)) == 0  # other code: another run
    assert throughput.main(command(tmp_path, "--fresh")) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [(run["commit"], len(run["points"])) for run in runs] == [("0123", 24), ("4567", 24), ("4567", 24)]


def test_on_a_gpu_it_compiles_before_it_measures(canned, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # it sets this for its processes, not for these tests
    monkeypatch.setattr(throughput.command, "parse_device", torch.device)
    monkeypatch.setattr(runner, "describe_machine", lambda device: dict(device="made-up GPU", torch="0"))
    size = ["--lengths", "1024", "512", "--head-dims", "64", "--masks", "causal", "--kv-groups", "4", "--jobs", "3"]
    assert throughput.main(["--device", "cuda", "--out", str(tmp_path), *size]) == 0
    asked = set(canned.asked)
    assert len(asked) == len(canned.asked) == 2 * 12 * 3 + 2
    wanted = {case for case in asked if METHODS[case.method].compiled}
    assert {case.method for case in canned.compiled} == {n for n in METHODS if n.startswith(("log-", "none", "flex"))}
    assert {case.direction for case in canned.compiled} == {"forward", "both"}
    assert {(x.method, x.length) for x in canned.compiled if "flex" in x.method} == {
        (x.method, x.length) for x in wanted if "flex" in x.method
    }
    ours = {replace(x, length=0, batch=1, direction="") for x in wanted if "flex" not in x.method}
    assert {replace(x, length=0, direction="") for x in canned.compiled if "flex" not in x.method} == ours
    assert all(x.length <= 1024 for x in canned.compiled if "flex" not in x.method)
    printed = capsys.readouterr().out
    assert "D = 64, causal, 32 heads on 8: forward + backward" in printed
    assert "1,048,576" in printed
    assert (tmp_path / "throughput-cuda.png").exists()


def test_a_run_in_which_everything_fails_fails(canned, tmp_path):
    assert throughput.main([*SIZES, "--methods", "eager", "--out", str(tmp_path)]) == 1


def test_the_time_is_over(canned, tmp_path, capsys):
    assert throughput.main(command(tmp_path, "--minutes", "0")) == TIME_IS_OVER
    assert "points: 24 to go\n" in capsys.readouterr().out
    assert not canned.asked


def test_a_point_that_takes_too_long(monkeypatch):
    def slow(worker, *arguments, seconds):
        raise TookTooLong(f"took more than {seconds:.0f} s")

    monkeypatch.setattr(Worker, "call", slow)
    case = replace(SMALL, device="cuda")
    limit = throughput.LIMIT["cuda"]
    row = throughput.run_case(Worker(), case, time.monotonic() + limit + 60)
    assert row == dict(missing=f"took more than {limit:.0f} s")
    assert throughput.run_case(Worker(), case, time.monotonic() + limit - 60) is None  # the next run tries it again


def test_what_would_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(throughput, "_status", lambda name, path: 10 * 2**30)
    row = throughput.run_case(None, replace(SMALL, method="eager", length=65536), math.inf)
    assert row == dict(missing="needs 640 GiB, 10 are free")


def test_other_files_are_left_alone(canned, tmp_path, capsys):
    path = tmp_path / "throughput-cpu.json"
    run = dict(machine={}, commit="", load=None, date="", command="", points=[{"p50": 1}])
    whole = json.dumps(dict(format=1, runs=[run]))
    for content in ("{", "[]", '{"format": 99, "runs": []}', '{"format": 1, "runs": [[]]}', whole, whole[:-9], ""):
        path.write_text(content)
        assert throughput.main(command(tmp_path)) == 2
        assert f"{path} is damaged or holds something else: move it away" in capsys.readouterr().err
        assert path.read_text() == content


def test_two_at_once(canned, tmp_path, capsys):
    with files.locked(tmp_path, "throughput-cpu.json"):
        assert throughput.main(command(tmp_path)) == 2
    assert f"another run writes to {tmp_path / 'throughput-cpu.json'}: " in capsys.readouterr().err
    assert not canned.asked


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--minutes", "nan"], "--minutes: must be at least 0, got nan"),
        (["--lengths", "0"], "--lengths: must be at least 1, got 0"),
        (["--training", "16x4x128"], "--training: must be four numbers such as 16x4x128x32, got 16x4x128"),
        (["--tokens", "-5"], "--tokens: must be at least 1, got -5"),
        (["--jobs", "-1"], "--jobs: must be at least 0, got -1"),
        (["--hidden", "x"], "--hidden: invalid number value: 'x'"),
        (["--device", "foo"], "--device must be cpu or cuda, got foo"),
        (["--device", "cuda:99", "--methods", "log-bias"], "--device cuda:99: "),
        (["--methods", "sdpa-flash"], "--methods sdpa-flash cannot run on cpu"),
        (["--head-dims", "96"], "--hidden 512 is no multiple of head dimension 96"),
        (["--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)
def test_bad_use_is_named_in_one_line(canned, tmp_path, capsys, bad, message):
    assert status_of(throughput.main, [*command(tmp_path), *bad]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not canned.asked


def test_a_full_disk_is_named(canned, tmp_path, capsys, monkeypatch):
    assert throughput.main(command(tmp_path, "--lengths", "64")) == 0
    path = tmp_path / "throughput-cpu.json"
    before = path.read_text()

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert throughput.main(command(tmp_path)) == 2
    assert f"{path}: No space left on device" in capsys.readouterr().err
    assert path.read_text() == before


def test_committed_results_are_read_and_shown(tmp_path, capsys):
    for path in RESULTS.glob("throughput-*.json"):
        for run in BENCH.read(path):
            assert len(BENCH.rows(run)) == len(run.points) > 0, path
            BENCH.show(run, tmp_path / path.name)
            assert run.commit in capsys.readouterr().out


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_for_a_gpu():
    options = throughput.parse(["--device", "cuda"])
    assert options.minutes == 8
    groups = throughput.plan(options)
    cases = [case for group in groups for case in group]
    assert len(set(cases)) == len(cases) == 3 * 2 * 2 * 8 * 12 * 3 + 2
    assert {case.method for case in cases} == set(METHODS) - {"sdpa"}
    first = groups[0]
    assert {(c.length, c.batch, c.heads, c.kv_heads, c.head_dim, c.causal) for c in first} == {
        (8192, 2, 16, 16, 128, True)
    }
    assert [case.direction for case in first[:3]] == list(throughput.DIRECTIONS)  # share what is prepared
    assert {case.length for case in cases} == {2**n for n in range(9, 17)} | {2**20}
    for case in cases:
        assert case.dtype == "bfloat16"
        if case.length < 2**20:
            assert case.batch * case.length == max(16384, case.length)
            assert case.heads * case.head_dim == 2048
            assert case.heads in (case.kv_heads, 4 * case.kv_heads)
    long = [case for case in cases if case.length == 2**20]
    assert [(c.method, c.direction, c.heads, c.head_dim) for c in long] == [
        (OURS, "forward", 8, 64),
        (OURS, "backward", 8, 64),
    ]
    assert any(case in groups[3] for case in long)


def test_the_plan_for_a_cpu():
    cases = [case for group in throughput.plan(throughput.parse(["--device", "cpu"])) for case in group]
    assert len(set(cases)) == len(cases) == 6 * len(CPU_METHODS) * 3 + 1
    assert {(c.causal, c.dtype) for c in cases} == {(True, "float32")}
    assert {(c.batch, c.heads, c.head_dim) for c in cases if c.batch == 1} == {(1, 8, 64)}
    training = {(c.batch, c.heads, c.length, c.head_dim) for c in cases if c.batch > 1}
    assert training == {(16, 4, 128, 32), (4, 8, 512, 64), (2, 12, 1024, 64)}
    assert len({c.setting for c in cases}) == len({c.title for c in cases}) == 4  # a table for each
    again = throughput.plan(throughput.parse(["--device", "cpu", "--long", "8192"]))
    assert sum(map(len, again)) == len(cases) - 1  # it is there already


# --- the picture ------------------------------------------------------------------------------------------------------


def test_a_method_has_one_colour_everywhere():
    assert set(METHODS) | set(extrapolation.ENCODINGS) - {n for n in extrapolation.ENCODINGS if "+" in n} <= set(
        COLOURS
    )
    pictured = [COLOURS[name] for name in METHODS if name not in ("log-bias-frozen", "flex-learned", "sdpa")]
    assert len(set(pictured)) == len(pictured)


def test_the_picture_has_a_panel_for_each_setting(tmp_path, monkeypatch):
    figure, pyplot = (pytest.importorskip(f"matplotlib.{name}") for name in ("figure", "pyplot"))

    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    options = throughput.parse(
        ["--device", "cuda", "--head-dims", "64", "128", "--kv-groups", "1", "--masks", "causal"]
    )
    cases = [case for group in throughput.plan(options) for case in group]
    rows = {case: asdict(case) | dict(p50=case.length / 1e3, memory=case.length) for case in cases}
    assert throughput.figure(tmp_path / "picture.png", rows, "made-up data")
    (picture,) = drawn
    axes = picture.axes
    assert len(axes) == 2 * 5
    assert all(axis.get_xscale() == "log" for axis in axes)
    assert "D = 64, causal, 32 heads" in axes[0].get_title()
    assert [axis.get_ylabel() for axis in axes[2:5]] == ["TFLOP/s", "milliseconds", "peak MiB beyond the inputs"]
    legend = {text.get_text() for text in picture.legends[0].get_texts()}
    assert legend == set(METHODS) - {"sdpa"}
    lines = {line.get_color() for line in axes[0].lines}
    assert lines == {COLOURS[name] for name in legend}
    assert not pyplot.get_fignums()
    assert not throughput.figure(tmp_path / "none.png", {}, "")
