"""bench.speed.gpu and bench.speed.host_overhead: everything but the figures, which need a GPU."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import status_of

from bench.speed import counters, gpu, host_overhead, throughput
from bench.speed.gpu import Part
from logpe import files
from logpe.command import BAD_USE, STATUSES, STOPPED

PICTURES = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.txt"


def part(code, name="part", share=1.0):
    return Part(name, share, lambda seconds: ["-c", code])


def test_a_part_that_ends_well(log):
    outcome = gpu.run_part(part("print('hello\\nall is well\\n')"), 60, log)
    assert (outcome.part, outcome.state, outcome.result) == ("part", "ok", "all is well")
    assert "=== part: python -c" in log.read_text()
    assert "hello" in log.read_text()


def test_a_part_finds_the_checkout_and_no_interpreter(log, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os, sys; print(os.getcwd(), sys.path[1:4], os.environ.get('TRITON_INTERPRET'))"
    root = Path(gpu.__file__).parents[2]
    outcome = gpu.run_part(part(code), 60, log)
    assert outcome.result == f"{root} {[str(root), str(root / 'kernels'), '/elsewhere']} None"


def test_a_part_that_fails(log):
    outcome = gpu.run_part(part("print('why'); raise SystemExit(3)"), 60, log)
    assert (outcome.state, outcome.result) == ("failed (3)", "why")
    assert gpu.run_part(part(""), 60, log).result == "nothing printed"


def test_a_part_out_of_time_may_write_down_what_it_has(log):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written', flush=True)"
    begin = time.monotonic()
    outcome = gpu.run_part(part(code), 10, log)  # on a busy machine Python takes seconds to start
    assert (outcome.state, outcome.result) == ("out of time", "written")
    assert time.monotonic() - begin < 40


def test_a_part_that_does_not_listen_is_ended_with_its_children(log, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    outcome = gpu.run_part(part(code), 3, log)
    assert outcome.state == "out of time"
    child = int(outcome.result)
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_time_that_is_not_needed_goes_to_the_next(log, monkeypatch):
    given = []

    def run_part(part, seconds, log):
        given.append(seconds)
        if part.name == "c":
            raise KeyboardInterrupt
        return gpu.Outcome(part.name, "ok")

    monkeypatch.setattr(gpu, "run_part", run_part)
    todo = [part("", name=name, share=share) for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.1), ("d", 0.1))]
    outcomes = gpu.run_all(todo, 1000, log)
    assert [(x.part, x.state) for x in outcomes] == [("a", "ok"), ("b", "ok"), ("c", "not run"), ("d", "not run")]
    assert given == pytest.approx([500 - gpu.GRACE / 2, 600 - gpu.GRACE / 2, 500 - gpu.GRACE / 2], abs=1)
    printed = gpu.table(outcomes).splitlines()
    assert len(printed) == 5
    assert printed[3].split() == ["c", "not", "run", "0", "stopped", "by", "Ctrl-C"]


def test_parts_are_bounded_commands_of_this_project(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path, gpu=True)]
    assert names == ["tests", "throughput", "host overhead", "counters", "tuner"]
    assert sum(part.share for part in gpu.parts(tmp_path, gpu=True)) == pytest.approx(1)
    commands = {part.name: part.command(120.0) for part in gpu.parts(tmp_path, gpu=True)}
    assert commands["tests"][:4] == ["-m", "pytest", "-m", "gpu"]
    assert "--continue-on-collection-errors" in commands["tests"]
    assert commands["tuner"][:3] == ["-m", "logpe", "tune"]
    assert commands["tuner"][-4:] == ["--minutes", "1.67", "--out", str(tmp_path / "tune.json")]
    options = throughput.parse([*commands["throughput"][3:], "--device", "cuda"])
    assert options.out == tmp_path
    assert options.minutes == 1.67
    assert throughput.OURS in options.methods


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "folder")]) == BAD_USE
    assert "python -m bench gpu: torch finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_statuses(tmp_path, monkeypatch, capsys):
    out = ["--cpu", "--out", str(tmp_path)]
    stopped = gpu.Outcome("part", "not run", result=gpu.INTERRUPTED)
    for outcome, status in ((gpu.Outcome("part", "ok"), 0), (gpu.Outcome("part", "failed (1)"), 1), (stopped, STOPPED)):
        monkeypatch.setattr(gpu, "run_all", lambda *_, outcome=outcome: [outcome])
        assert gpu.main(out) == status
    with files.locked(tmp_path):
        assert gpu.main(out) == BAD_USE
    assert f"another run writes to {tmp_path}" in capsys.readouterr().err
    assert gpu.main(["--cpu", "--out", "/dev/null/x"]) == BAD_USE
    assert "python -m bench gpu: /dev/null/x: Not a directory" in capsys.readouterr().err
    for main in (gpu.main, host_overhead.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert STATUSES.strip() in capsys.readouterr().out


def test_all_parts_in_tiny_sizes(tmp_path):
    """Run it as a user starts it: the processes, the files, the table."""
    command = [sys.executable, "-m", "bench", "gpu", "--cpu", "--minutes", "6", "--out", str(tmp_path / "folder")]
    paths = {"PYTHONPATH": os.pathsep.join([str(gpu.ROOT), str(gpu.ROOT / "kernels")])}
    done = subprocess.run(command, cwd=gpu.ROOT, env=os.environ | paths, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines if line[1:2] == ["ok"]] == [["tests", "ok"], ["throughput", "ok"]]
    assert "measured nothing" in done.stdout
    content = json.loads((tmp_path / "folder" / "gpu.json").read_text())
    assert [(x["part"], x["state"]) for x in content["parts"]] == [
        ("tests", "ok"),
        ("throughput", "ok"),
        ("host overhead", "ok"),
    ]
    assert "skipped" in content["parts"][0]["result"]
    assert content["parts"][1]["result"] == "points: 2 measured"
    assert "us of host time" in content["parts"][2]["result"]
    names = {path.name for path in (tmp_path / "folder").glob("[!.]*")}  # and counters.json and tune.json on a GPU
    comparison = {f"throughput-cpu.{kind}" for kind in ("json", "csv", *["png"] * PICTURES)}
    assert names == {"gpu.json", "host_overhead.json", "log.txt"} | comparison

    host = json.loads((tmp_path / "folder" / "host_overhead.json").read_text())
    assert host["machine"]["launch"] == host_overhead.STUBBED
    times = {name: some["least"] for name, some in host["microseconds"].items()}
    steps = [name for name in times if name.startswith(("launcher", "+"))]
    assert len(steps) == 5
    assert "+ the launch" not in times  # it is left out, and nothing says otherwise
    # Each includes the ones before, and takes longer but for the noise of a busy machine.
    least = [times[steps[n]] for n in (0, 1, 2, 4)]
    assert all(b > a / 2 > 0 for a, b in itertools.pairwise(least)), times
    assert 0 < times[host_overhead.SDPA] < times[steps[4]]


# --- host overhead ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_each_step_adds():
    times = {"launcher: x": [10.0, 11.0, 12.0], "+ more": [14.5, 15.0, 16.0], "beside": [1.0, 2.0, 3.0]}
    lines = [line.split() for line in host_overhead.table(times).splitlines()]
    assert [line[-1] for line in lines] == ["adds", "10.0", "4.5", "3.0"]
    assert len(lines[3]) == 4  # what stands beside the ladder adds nothing


def test_the_interpreter_launches_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        host_overhead.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [(["--device", "foo"], "--device foo: "), (["--rounds", "0"], "must be at least 1"), (["--head-dim", "x"], "'x'")],
)
def test_bad_use_is_named_in_one_line(bad, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert status_of(host_overhead.main, bad) == BAD_USE
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.gpu
def test_host_overhead_on_a_gpu(tmp_path, capsys):
    assert host_overhead.main(["--rounds", "3", "--out", str(tmp_path / "host.json")]) == 0
    content = json.loads((tmp_path / "host.json").read_text())
    times = {name: some["least"] for name, some in content["microseconds"].items()}
    assert "+ the launch" in times
    graph = next(value for name, value in times.items() if name.startswith("CUDA graph"))
    assert graph < times[host_overhead.WHOLE]


# --- counters ---------------------------------------------------------------------------------------------------------

NCU = """#!{python}
import pathlib, sys
options = sys.argv[1:]
metrics = options[options.index("--metrics") + 1].split(",")
assert options[options.index("-m") :][:3] == ["-m", "bench", "counters"] and "--calls" in options
print("==PROF== Connected to process 7")
lost = [name for name in metrics if "gmma" in name or "tensor" in name]
if lost:
    sys.exit(f"==ERROR== Failed to find metric {{lost[0]}}")
if {refused}:
    sys.exit("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
head = "ID,Process ID,Kernel Name,Section Name,Metric Name,Metric Unit,Metric Value"
rows = []
for call in range(4):
    for place, kernel in enumerate(("forward_kernel", "dq_kernel", "dkdv_kernel")):
        for name in metrics:
            value = {{"gpu__time_duration.sum": "1,500,000", "launch__registers_per_thread": "255"}}.get(name, "50.0")
            value = "8,389,632,000" if name == "smsp__inst_executed.sum" else value
            value = str(place) + ".25" if "barrier" in name else "n/a" if "stalled" in name else value
            rows.append((3 * call + place, 7, kernel, "Command line profiler metrics", name, "", value))
lines = [",".join(f'"{{cell}}"' for cell in row) for row in [head.split(","), *rows]]
pathlib.Path(options[options.index("--log-file") + 1]).write_text("==PROF== Disconnected\\n" + "\\n".join(lines))
"""


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """A profiler that knows no metric of a matrix unit, and a GPU; returns what writes it."""

    def write(refused=False):
        path = tmp_path / "bin" / "ncu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(NCU.format(python=sys.executable, refused=refused))
        path.chmod(0o700)
        monkeypatch.setenv("PATH", str(path.parent))

    monkeypatch.setattr(counters.command, "parse_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(counters, "describe_machine", lambda device: {"device": "none"})
    return write


def test_counters_are_read_from_the_profiler(fake_ncu, tmp_path, capsys):
    fake_ncu()
    out = tmp_path / "counters.json"
    assert counters.main(["--out", str(out)]) == 0
    head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [line[:3] for line in lines[:3]] == [[kernel, "log-bias", "128"] for kernel in ("forward", "dq", "dkdv")]
    assert [line[1:3] for line in lines[3:12:3]] == [["log-bias", "64"], ["none", "128"], ["none", "64"]]
    line = dict(zip(head[:10], lines[1], strict=False))
    scores = 2 * 16 * 8192 * 8193 / 2
    assert (line["us"], line["issued"]) == ("1500.0", f"{8_389_632_000 * 32 / scores:.1f}")
    assert lines[1][6] == "-"  # the matrix unit's
    assert lines[1][-3:] == ["255", "barrier", "1.25"]
    rows = json.loads(out.read_text())["kernels"]
    assert len(rows) == 12
    assert rows[4]["gpu__time_duration.sum"] == 1_500_000
    assert rows[4]["smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"] is None


def test_counters_say_why_there_are_none(fake_ncu, monkeypatch, tmp_path, capsys):
    fake_ncu(refused=True)
    assert counters.main([]) == BAD_USE
    assert "ERR_NVGPUCTRPERM" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.main([]) == 0
    assert "not installed" in capsys.readouterr().out
    monkeypatch.undo()
    assert counters.main(["--device", "cpu"]) == BAD_USE
    assert "the device is cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_calls_that_are_counted():
    counters.make_calls(torch.device("cuda"))
