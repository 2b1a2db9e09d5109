"""The tuner: what it tries, what may win, and what it keeps. The times are made up, except on a GPU."""

from __future__ import annotations

import argparse
import json
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from logpe_kernels import configs, forward
from logpe_kernels.configs import Config, Entry

import logpe
from bench.speed.compile_report import TARGETS
from logpe import __main__ as command
from logpe import files
from logpe.command import TIME_IS_OVER
from logpe.tuning import trial, tune
from logpe.tuning.trial import KERNELS, Comparison, Gpu, OutOfTime, Resources, Task

ROOT = Path(__file__).parent.parent
NAME = "Some GPU"
CPU = torch.device("cpu")
TASK = Task("forward", "bfloat16", 128, "log-bias", True, 4096, 4, 16, 16)
SMALL = Task("forward", "float16", 16, "log-bias", True, 40, 1, 2, 1)
DEFAULT = Config(128, 128, 8, 3)  # in these tests the shipped one for TASK
FINE = Resources(128, 0, 65536)


def forget() -> None:
    for function in list(vars(configs).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The user's file, on a machine whose CPU says that it is a GPU."""
    forget()
    monkeypatch.setenv("LOGPE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(configs, "name_of", lambda device: NAME)
    monkeypatch.setattr(configs, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "shared_memory", lambda device: 227 * 1024)
    monkeypatch.setattr(trial, "take_turns", take_turns)
    shipped = configs.shipped
    large = TASK.kernel, TASK.head_dim
    monkeypatch.setattr(configs, "shipped", lambda *x: DEFAULT if (x[0], x[3]) == large else shipped(*x))
    yield tmp_path / "Some-GPU.json"
    forget()


class Fake:
    """Compiles and measures by formula. ``compared`` lists what was measured, with the budget."""

    def __init__(
        self,
        ratio: Callable[[Config], float | str] = lambda config: 1.0,
        resources: Callable[[Config], Resources | str] = lambda config: FINE,
    ) -> None:
        self.ratio, self.resources = ratio, resources
        self.compared: list[tuple[Task, Config, float]] = []

    def compile(self, task: Task, candidates: list[Any]) -> list[Resources | str]:
        return [self.resources(config) for config in candidates]

    def compare(self, task: Task, config: Any, default: Any, budget: float) -> Comparison | str:
        assert config != default
        self.compared.append((task, config, budget))
        ratio = self.ratio(config)
        return ratio if isinstance(ratio, str) else Comparison(2.0 * ratio, 2.0)


def search(machine: Fake, task: Task = TASK) -> Entry:
    entry = tune.search(task, CPU, machine)
    assert isinstance(entry, Entry), entry
    return entry


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_are_some_and_may_fit(target: str, kernel: str, dtype: str) -> None:
    shared = TARGETS[target].shared
    for head_dim in (16, 64, 96, 128, 256):
        task = Task(kernel, dtype, head_dim, "log-bias", True, 4096, 4, 16, 16)
        default = configs.shipped(kernel, target, task.itemsize, head_dim)
        tiles = tune.tiles(task, default, target, shared)
        assert 3 <= len(tiles) == len(set(tiles)) <= 40, (head_dim, tiles)
        pipelines = tune.pipelines(default, task, target, shared)
        assert pipelines
        assert default not in (*tiles, *pipelines)
        for config in (*tiles, *pipelines):
            configs.check_values(kernel, config)
            facts = (task.itemsize, head_dim, target, shared)
            assert configs.cannot_launch(kernel, config, *facts) is None
        assert all(tuple(c[3:]) == tuple(default[3:]) for c in tiles)
        assert all(c[:3] == default[:3] for c in pipelines)
        assert {c.SEPARATE for c in pipelines} == (
            {False, True} if kernel == "backward_dkdv" and head_dim > 64 else {False}
        )


def test_less_shared_memory_leaves_fewer_candidates() -> None:
    large = tune.pipelines(DEFAULT, TASK, "sm_90", 227 * 1024)
    small = tune.pipelines(DEFAULT, TASK, "sm_90", 99 * 1024)
    assert set(small) < set(large)
    assert max(c.num_stages for c in small) < max(c.num_stages for c in large)


def test_descriptors_are_tried_where_the_target_has_them() -> None:
    def flags(task: Task, target: str) -> set[bool]:
        return {c.TMA for c in tune.pipelines(Config(64, 64, 4, 2), task, target, 227 * 1024)}

    assert flags(TASK, "sm_90") == flags(TASK, "sm_100") == {False, True}
    assert flags(TASK, "sm_80") == flags(TASK, "gfx942") == {False}
    assert flags(Task("forward", "float32", 128, "log-bias", True, 4096, 4, 16, 16), "sm_90") == {False}


def test_the_specialised_kernel_is_tried_where_it_can_run() -> None:
    def tried(target: str, kernel: str = "forward", dtype: str = "bfloat16", head_dim: int = 128) -> list[Any]:
        task = Task(kernel, dtype, head_dim, "log-bias", True, 4096, 4, 16, 16)
        return tune.specialized(Config(64, 64, 4, 3, TMA=True), task, target, 227 * 1024)

    assert Config(128, 128, 8, 2, SPECIALIZED=True) in tried("sm_90")
    assert all(config.SPECIALIZED and not config.TMA for config in tried("sm_90", head_dim=80))
    for elsewhere in (dict(target="sm_100"), dict(target="sm_80"), dict(target="gfx942")):
        assert not tried(**elsewhere)
    for other in (dict(kernel="backward_dq"), dict(dtype="float32"), dict(head_dim=32), dict(head_dim=256)):
        assert not tried("sm_90", **other)
    assert not set(tried("sm_90")) & {*tune.pipelines(Config(128, 128, 8, 2), TASK, "sm_90", 227 * 1024)}


def test_spilling_candidates_go_unless_all_spill() -> None:
    a, b, c = Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(64, 16, 4, 2)
    spilling = Resources(255, tune.FEW_SPILLS + 1, 1024)
    assert tune.prune({a: FINE, b: Resources(255, tune.FEW_SPILLS, 1024)}) == [a, b]
    assert tune.prune({a: FINE, b: spilling, c: "OutOfResources"}) == [a]
    assert tune.prune({a: spilling, b: spilling, c: "OutOfResources"}) == [a, b]
    assert tune.prune({a: "OutOfResources"}) == tune.prune({}) == []


# ---- the winner ------------------------------------------------------------------------------------------------------


def test_the_fastest_wins_with_its_pipeline() -> None:
    best = Config(64, 64, 4, 3)

    def ratio(config: Config) -> float:
        return 0.7 if config == best else 0.8 if config[:3] == best[:3] else 0.9

    machine = Fake(ratio)
    entry = search(machine)
    assert entry.config == best
    assert (entry.milliseconds, entry.default, entry.default_milliseconds) == (1.4, DEFAULT, 2.0)
    assert (TASK, best, tune.THOROUGH) in machine.compared
    assert len(machine.compared) == len({config for _, config, _ in machine.compared}) + 1  # the confirmation
    assert [list(best), 1.4] in json.loads(json.dumps(entry.tried))


@pytest.mark.parametrize("ratio", [1.0, 0.99, 1.5])
def test_noise_is_no_reason(ratio: float) -> None:
    entry = search(Fake(lambda config: ratio))
    assert entry.config == entry.default == DEFAULT
    assert entry.milliseconds == entry.default_milliseconds == 2.0


def test_luck_is_no_reason() -> None:
    """Fast in the first measurement, slower than the default in the longer one."""
    machine = Fake()
    machine.ratio = lambda config: 1.1 if machine.compared[-1][2] == tune.THOROUGH else 0.5
    assert search(machine).config == DEFAULT
    assert sum(budget == tune.THOROUGH for _, _, budget in machine.compared) == tune.FINALISTS


def test_the_next_one_wins_where_the_best_was_lucky() -> None:
    lucky, good = Config(64, 64, 4, 2), Config(64, 32, 4, 2)
    machine = Fake()
    machine.ratio = lambda config: (
        (0.5 if machine.compared[-1][2] == tune.QUICK else 1.0) if config == lucky else 0.8 if config == good else 1.2
    )
    assert search(machine).config == good


def test_a_wrong_result_never_wins() -> None:
    machine = Fake(lambda config: "wrong: out differs" if config[:2] == (64, 64) else 0.9 - 0.1 * (config[1] == 32))
    entry = search(machine)
    assert entry.config[1] == 32
    assert [list(Config(64, 64, 4, 3)), "wrong: out differs"] in json.loads(json.dumps(entry.tried))

    machine = Fake()
    machine.ratio = lambda config: 0.5 if machine.compared[-1][2] == tune.QUICK else "wrong: not the same result twice"
    assert search(machine).config == DEFAULT  # found out when it was about to win


def test_spilling_candidates_are_not_measured() -> None:
    machine = Fake(resources=lambda config: FINE if config.num_warps == 4 else Resources(255, 80, 65536))
    entry = search(machine)
    assert {config.num_warps for _, config, _ in machine.compared if config[:3] != DEFAULT[:3]} == {4}
    assert "spills 80 registers" in {result for _, result in entry.tried}


def test_nothing_ran() -> None:
    for machine in (Fake(lambda config: "AcceleratorError"), Fake(resources=lambda config: "AcceleratorError")):
        reason = tune.search(TASK, CPU, machine)
        assert isinstance(reason, str)
        assert "AcceleratorError" in reason


# ---- the file --------------------------------------------------------------------------------------------------------

TASKS = [
    Task(kernel, "bfloat16", 128, "log-bias", True, length, 1, 16, 16)
    for length in (4096, 1024)
    for kernel in ("forward", "backward_dq")
]


def test_the_result_is_used(path: Path) -> None:
    machine = Fake(lambda config: 0.5 if config == Config(64, 64, 4, 2) else 1.0)
    entries = tune.tune(TASKS, path, CPU, machine, command="python -m logpe tune")
    assert [(x.kernel, x.length) for x in entries] == [(task.kernel, task.length) for task in TASKS]
    assert configs.read(path, CPU).entries == entries
    (run,) = configs.read(path, CPU).runs
    assert run["torch"] == torch.__version__
    assert run["command"] == "python -m logpe tune"
    forget()
    choice = configs.choose("forward", TASKS[0].traits(CPU))
    assert choice[:2] == (Config(64, 64, 4, 2), path)
    assert "2.00x" in tune.table(entries)
    assert len(tune.table(entries).splitlines()) == 5


def test_a_second_run_measures_what_is_missing(path: Path) -> None:
    tune.tune(TASKS[:1], path, CPU, Fake(lambda config: 0.5))
    before = configs.read(path, CPU).entries
    machine = Fake()
    entries = tune.tune(TASKS, path, CPU, machine)
    assert entries[:1] == before
    assert {task for task, _, _ in machine.compared} == set(TASKS[1:])
    assert [x.run for x in entries] == [0, 1, 1, 1]
    assert len(configs.read(path, CPU).runs) == 2

    unchanged = path.read_bytes()
    machine = Fake()
    assert tune.tune(TASKS, path, CPU, machine) == entries
    assert machine.compared == []
    assert path.read_bytes() == unchanged

    again = tune.tune(TASKS[:1], path, CPU, Fake(), again=True)
    assert again[0].config == again[0].default
    assert again[0].run == 2
    assert len(configs.read(path, CPU).entries) == 4  # replaced


@pytest.mark.parametrize("interruption", [OutOfTime, KeyboardInterrupt])
def test_an_interruption_keeps_what_was_measured(path: Path, interruption: type[BaseException]) -> None:
    machine = Fake()

    def ratio(config: Config) -> float:
        if machine.compared[-1][0] == TASKS[2]:
            raise interruption
        return 0.5

    machine.ratio = ratio
    with pytest.raises(interruption):
        tune.tune(TASKS, path, CPU, machine)
    entries = tune.held(TASKS, path, CPU)
    assert [(x.kernel, x.length) for x in entries] == [("forward", 4096), ("backward_dq", 4096)]
    assert configs.read(path, CPU).entries == entries
    assert sorted(os.listdir(path.parent)) == [f".{path.name}.lock", path.name]
    assert len(tune.tune(TASKS, path, CPU, Fake())) == 4


def test_a_shape_that_cannot_run_does_not_stop_the_others(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Fake()
    machine.ratio = lambda config: "OutOfMemoryError" if machine.compared[-1][0].length == 4096 else 0.5
    assert [x.length for x in tune.tune(TASKS, path, CPU, machine)] == [1024, 1024]
    assert "OutOfMemoryError" in "".join(capsys.readouterr())


@pytest.mark.parametrize("content", ["{", json.dumps(dict(format=1, device="Other", target="x", runs=[], entries=[]))])
def test_a_file_that_is_not_ours_is_left_alone(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ValueError, match=r"no JSON|it is for Other"):
        tune.tune(TASKS, path, CPU, Fake())
    assert path.read_text() == content


# ---- the command -----------------------------------------------------------------------------------------------------


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", *arguments])


def test_the_most_telling_shapes_come_first() -> None:
    tasks = tune.make_tasks(options())
    assert [str(task) for task in tasks[:4]] == [
        "forward bfloat16 D=128 log-bias causal N=4096",
        "backward_dq bfloat16 D=128 log-bias causal N=4096",
        "backward_dkdv bfloat16 D=128 log-bias causal N=4096",
        "forward bfloat16 D=128 log-bias causal N=16384",
    ]
    assert len(tasks) == len(set(tasks)) == 3 * 2 * 2 * 2 * 3
    assert all(task.batch * task.length == 16384 and task.heads * task.head_dim == 2048 for task in tasks)
    assert [task.causal for task in tasks] == [True] * 36 + [False] * 36


def test_shapes_of_one_kind_are_measured_once() -> None:
    arguments = ["--kernels", "forward", "--head-dims", "128", "80", "96", "--masks", "full", "--heads", "8"]
    arguments += ["--presets", "log-rotary-bias", "log-bias", "log-rotary", "log-invariant+gain", "--kv-heads", "2"]
    tasks = tune.make_tasks(options(*arguments, "--lengths", "3000", "4096", "4097", "--batch", "3"))
    shapes = {(task.head_dim, task.preset, task.length) for task in tasks}
    presets = ("log-bias", "none", "log-invariant+gain")
    assert shapes == {(d, preset, n) for d in (128, 80) for preset in presets for n in (3000, 4097)}
    assert {(task.batch, task.heads, task.kv_heads) for task in tasks} == {(3, 8, 2)}


@pytest.mark.parametrize(
    "bad",
    [
        *(["--head-dims", "512"], ["--lengths", "0"], ["--presets", "albi"], ["--jobs", "-1"], ["--device", "x"]),
        *(["--minutes", "nan"], ["--minutes", "-1"], ["--heads", "0"]),
    ],
)
def test_bad_arguments(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*bad)
    assert bad[0] in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune"]) == 2
    assert "tune cannot run: it needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.main(["tune", "--device", "cuda:2"]) == 2
    assert "there is no cuda:2: torch sees 2 GPUs" in capsys.readouterr().err
    assert command.main(["tune", "--device", "cpu"]) == 2
    assert "it needs a GPU" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["tune"]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    assert not path.exists()


def test_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path
) -> None:
    """All but the GPU: what it prints, where it writes, and with which status it ends."""
    machines: list[Any] = []

    class Machine(Fake):
        def __init__(self, device: torch.device, jobs: int, end: float) -> None:
            super().__init__(lambda config: 0.5)
            assert device == torch.device("cuda", 0)
            assert jobs == 2
            assert 0 < end - time.monotonic() <= 120
            machines.append(self)

        def close(self) -> None:
            machines.append("closed")

    monkeypatch.setattr(tune, "Gpu", Machine)
    monkeypatch.setattr(tune, "why_not", lambda device: None)
    arguments = ["tune", "--minutes", "2", "--jobs", "2", "--device", "cuda:0", "--lengths", "512", "--masks", "causal"]
    assert command.main([*arguments, "--kv-heads", "3"]) == 2
    assert "--heads must be a multiple of --kv-heads, got 16 and 3" in capsys.readouterr().err
    assert machines == []

    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{NAME}: written to {path}" in out
    assert out.count("2.00x") == 3 * 2 * 2
    assert machines[1:] == ["closed"]

    other = tmp_path / "elsewhere" / "file.json"
    assert command.main([*arguments, "--out", str(other)]) == 0
    assert f"log_attention reads {path}" in capsys.readouterr().out
    assert len(json.loads(other.read_text())["entries"]) == 12

    path.write_text("{")
    assert command.main(arguments) == 2
    assert f"{path} cannot be used" in capsys.readouterr().err
    assert machines[-1] == "closed"

    path.unlink()
    with files.locked(path.parent, path.name):
        assert command.main(arguments) == 2
    assert f"another run writes to {path}" in capsys.readouterr().err

    for error, status in ((OutOfTime, TIME_IS_OVER), (KeyboardInterrupt, 130)):

        def stop(self: Any, *_: Any, error: type[BaseException] = error) -> Any:
            raise error

        monkeypatch.setattr(Machine, "compare", stop)
        assert command.main(arguments) == status
        assert "the same command resumes from here" in capsys.readouterr().err
        assert machines[-1] == "closed"

    monkeypatch.setattr(Machine, "compare", lambda *_: "AcceleratorError")
    path.write_text("")
    path.unlink()
    assert command.main(arguments) == 1
    assert "Nothing was measured" in capsys.readouterr().err


# ---- one candidate ---------------------------------------------------------------------------------------------------


def take_turns(candidates: list[list[trial.Launch]], budget: float) -> list[float]:
    """Make up times, by BLOCK_N, after each launch was carried out."""
    for launches in candidates:
        for launch in launches:
            launch()
    return [launches[0].keywords["BLOCK_N"] / 10 for launches in candidates]


def compare(task: Task, config: Config, device: torch.device) -> Comparison | str:
    trial._inputs.cache_clear()
    return trial.compare(task, config, Config(32, 32, 4, 1), 10.0, device)


@pytest.mark.parametrize(
    ("kernel", "dtype", "preset"),
    [
        ("forward", "bfloat16", "none"),
        ("backward_dq", "float16", "log-invariant+gain"),
        ("backward_dkdv", "float32", "log-bias"),
    ],
)
def test_right_candidates_are_timed(kernel: str, dtype: str, preset: str, device: torch.device) -> None:
    task = Task(kernel, dtype, 16, preset, preset != "none", 40, 1, 2, 1)
    assert compare(task, Config(16, 64, 4, 1), device) == Comparison(6.4, 3.2)
    assert configs.overrides == {}
    assert not torch.are_deterministic_algorithms_enabled()


def spoil(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let the candidate, the one with BLOCK_N = 64, return something else."""
    run = KERNELS[kernel].run

    def spoiled(inputs: trial.Inputs) -> dict[str, torch.Tensor]:
        results = run(inputs)
        if configs.overrides[kernel].BLOCK_N == 64:
            change(results)
        return results

    monkeypatch.setitem(KERNELS, kernel, KERNELS[kernel]._replace(run=spoiled))


def test_wrong_candidates_are_out(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    spoil(monkeypatch, "forward", lambda results: results["lse"].view(-1)[-1].add_(1))
    reason = compare(SMALL, Config(16, 64, 4, 1), device)
    assert isinstance(reason, str)
    assert reason.startswith("wrong: lse differs by 1, ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["dq", "drate"])
def test_difference(dtype: torch.dtype, name: str) -> None:
    expected = {"dq": torch.randn(2, 3, 50, 8), "drate": torch.randn(2) * 100}
    assert trial.difference(expected, expected, dtype) is None

    def moved(by: float) -> dict[str, torch.Tensor]:
        step = torch.zeros_like(expected[name])
        step.view(-1)[-1] = by * torch.finfo(dtype).eps * expected[name].abs().max()
        return {**expected, name: expected[name] + step}

    allowed = 256 if dtype == torch.float32 else 4
    assert trial.difference(moved(0.9 * allowed), expected, dtype) is None
    assert f"{name} differs by" in str(trial.difference(moved(1.1 * allowed), expected, dtype))
    for value in (float("nan"), float("inf")):
        assert f"{name} is not finite" in str(trial.difference(moved(value), expected, dtype))
        assert f"{name} is not finite" in str(trial.difference(expected, moved(value), dtype))


def test_queries_without_a_key_are_compared_too() -> None:
    expected = {"lse": torch.tensor([1.0, -torch.inf]), "out": torch.zeros(0, 8)}
    assert trial.difference(expected, expected, torch.float16) is None
    other = {**expected, "lse": torch.tensor([1.0, 0.0])}
    assert "lse is not finite" in str(trial.difference(other, expected, torch.float16))


def test_candidates_that_vary_are_out(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    steps = iter((0.0, 1e-4))
    spoil(monkeypatch, "forward", lambda results: results["lse"].add_(next(steps)))
    assert compare(SMALL, Config(16, 64, 4, 1), device) == "wrong: not the same result twice"


def test_memory_is_poisoned() -> None:
    with trial.poisoned():
        assert torch.zeros(3).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_launches_are_recorded_and_can_be_repeated(device: torch.device) -> None:
    inputs = trial.make_inputs(SMALL, device)
    with configs.override(Config(16, 32, 4, 1)), trial.recorded() as launches:
        results = KERNELS["forward"].run(inputs)
    (launch,) = launches["forward"]
    before = {name: x.clone() for name, x in results.items()}
    for x in results.values():
        x.zero_()
    launch()
    for name, x in results.items():
        assert torch.equal(x, before[name])
    with trial.recorded(dry=True) as launches:
        results = KERNELS["forward"].run(inputs)
    assert len(launches["forward"]) == 1
    assert results["out"].isnan().all()  # nothing ran
    assert forward.forward_kernel is launch.kernel


def test_launches_are_recorded_without_the_experimental_parts_of_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "logpe_kernels.hopper", None)  # importing it raises ImportError
    with configs.override(Config(16, 32, 4, 1)), trial.recorded(dry=True) as launches:
        KERNELS["forward"].run(trial.make_inputs(SMALL, torch.device("meta")))
    assert len(launches["forward"]) == 1


def test_everything_but_the_times(path: Path, device: torch.device) -> None:
    """From the candidates to the call that uses the winner."""

    class Inline(Fake):
        def compare(self, task: Task, config: Any, default: Any, budget: float) -> Comparison | str:
            return trial.compare(task, config, default, budget, device)

    (entry,) = tune.tune([SMALL], path, CPU, Inline())
    assert min(config[1] for config, _ in entry.tried) == entry.config.BLOCK_N
    assert entry.config != entry.default
    assert all(isinstance(result, float) for _, result in entry.tried), entry.tried
    if device.type == "cuda":
        return
    forget()
    q = torch.randn(1, 2, 40, 16, dtype=torch.float16)
    with trial.recorded() as launches:
        position = logpe.LogPosition(2, 16, "log-rotary-bias")
        logpe.log_attention(q, q[:, :1], q[:, :1], position, is_causal=True, backend="triton")
    assert launches["forward"][0].keywords.items() >= entry.config.launch().items()


def test_candidates_compile_without_being_launched() -> None:
    """In a process that compiles for an H100 that is not there: only loading the kernel is made up."""
    script = """
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from bench.speed.compile_report import Driver
from logpe.tuning import trial
from logpe_kernels.configs import Config

def load(self):
    self.n_regs, self.n_spills = 100, 0

CompiledKernel._init_handles = load
driver.set_active(Driver("sm_90"))
for kernel in trial.KERNELS:
    task = trial.Task(kernel, "bfloat16", 64, "log-bias", True, 1024, 2, 4, 2)
    needs = trial.compile_candidate(task, Config(64, 64, 4, 2))
    print(kernel, type(needs).__name__, needs.registers, needs.shared > 16384)
print(trial.compile_candidate(task, Config(48, 64, 4, 2)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"{kernel} Resources 100 True" for kernel in KERNELS], result.stderr[-3000:]
    assert lines[3].startswith("CompilationError: ")


# ---- processes -------------------------------------------------------------------------------------------------------


def test_candidates_are_compiled_at_once_until_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "compile_candidate", operator.truediv)  # a function that a process can be sent
    machine = Gpu(None, 1, time.monotonic() + 60)
    try:
        assert machine.compile(6, [2, 0, 3]) == [3, "ZeroDivisionError: division by zero", 2]
        machine.end = time.monotonic() - 1
        with pytest.raises(OutOfTime):
            machine.compile(6, [2])
    finally:
        machine.close()
    assert all(worker.process is None for worker in machine.compilers.workers)


@pytest.mark.gpu
def test_on_this_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--kernels", "forward", "backward_dkdv", "--head-dims", "64", "--presets", "log-bias"]
    arguments += ["--lengths", "1024", "--masks", "causal", "--minutes", "4", "--out", str(out)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]),
    }
    result = subprocess.run(
        [sys.executable, "-m", "logpe", "tune", *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    entries = json.loads(out.read_text())["entries"]
    assert [entry["kernel"] for entry in entries] == ["forward", "backward_dkdv"]
    for entry in entries:
        assert entry["milliseconds"] <= entry["default_milliseconds"]
        assert sum(isinstance(result, float) for _, result in entry["tried"]) >= 3, entry["tried"]
        assert not any("wrong" in str(result) for _, result in entry["tried"]), entry["tried"]
