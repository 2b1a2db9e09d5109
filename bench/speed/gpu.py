"""All that a machine with a GPU can tell about logpe, in one command of bounded time.

    python -m bench gpu --minutes 9 --out DIR
    PYTHONPATH=.:kernels python -m bench gpu --out DIR        # from a checkout that is not installed

Runs the GPU tests, the throughput comparison in its most telling points, the host overhead, and the tuner, each as a
process with a share of the time; what one does not need, the next ones get. A part that fails, or runs out of time,
is a line of the table that is printed last, and the others go on. DIR then holds JSON, CSV and PNG, and ``log.txt``
with all that was printed. The same command on the same DIR goes on where throughput and tuner were stopped.

Exit status 1: a part did not end well. ``--cpu`` runs what there is without a GPU, in tiny sizes: it checks this
command, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import command
from bench.common import commit, describe_machine, write_whole
from bench.speed import throughput
from logpe.command import STOPPED, TIME_IS_OVER
from logpe.files import locked

ROOT = Path(__file__).parents[2]
INTERRUPTED = "stopped by Ctrl-C"
GRACE = 20.0  # seconds to write down what there is, after the time is over
METHODS = ("log-bias", "log-bias-rope", "none", "flex", "sdpa-cudnn", "sdpa-flash", "flex-learned", "log-rotary-bias")


@dataclass(frozen=True)
class Part:
    """One process. command: of the seconds that it has; summary: a line from what it left behind."""

    name: str
    share: float
    command: Callable[[float], list[str]]
    summary: Callable[[], str]


@dataclass
class Outcome:
    """A line of the table."""

    part: str
    state: str  # ok, failed, out of time, not run
    seconds: float = 0.0
    result: str = ""


def parts(folder: Path, gpu: bool) -> list[Part]:
    """In the order of running."""

    def minutes(seconds: float) -> str:
        return f"{max(0.0, seconds - GRACE) / 60:.2f}"

    def tests(seconds: float) -> list[str]:
        where = [] if gpu else ["tests/test_attention.py"]
        processes = max(1, min(12, (os.cpu_count() or 1) - 2))
        several = ["-n", str(processes)] if gpu and importlib.util.find_spec("xdist") else []
        report = folder / "tests.xml"
        options = ["-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
        return ["-m", "pytest", "-m", "gpu", *where, *several, *options]

    def compare(seconds: float) -> list[str]:
        size = ["--methods", *METHODS, "--directions", "forward", "backward"]
        if not gpu:
            size = ["--device", "cpu", "--methods", throughput.OURS, "--directions", "forward"]
            size += ["--hidden", "64", "--lengths", "64", "128", "--long"]
        return ["-m", "bench", "throughput", *size, "--resume", "--minutes", minutes(seconds), "--out", str(folder)]

    def host(seconds: float) -> list[str]:
        size = [] if gpu else ["--device", "cpu", "--rounds", "5"]
        return ["-m", "bench", "host_overhead", *size, "--out", str(folder / "host_overhead.json")]

    def tune(seconds: float) -> list[str]:
        size = ["--masks", "causal", "--presets", "log-bias", "--lengths", "8192"]
        return ["-m", "logpe", "tune", *size, "--minutes", minutes(seconds), "--out", str(folder / "tune.json")]

    found = [
        Part("tests", 0.32, tests, lambda: test_summary(folder / "tests.xml")),
        Part("throughput", 0.34, compare, lambda: throughput_summary(folder, gpu)),
        Part("host overhead", 0.06, host, lambda: json.loads((folder / "host_overhead.json").read_text())["target"]),
    ]
    return [*found, Part("tuner", 0.28, tune, lambda: "")] if gpu else found


def test_summary(path: Path) -> str:
    """Counts from pytest's report, and the names of tests that failed."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    counts = {"passed": total - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped}
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "passed")
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [c.get("name", "?") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return text + (f" ({', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''})" if bad else "")


def throughput_rows(folder: Path, gpu: bool) -> throughput.Rows:
    """Of the last run of this code. LookupError if there is none."""
    path = folder / f"throughput-{'cuda' if gpu else 'cpu'}.json"
    run = [run for run in throughput.read(path)["runs"] if run["commit"] == commit()][-1]
    return {throughput.Case.of(row): row for row in run["points"]}


def throughput_summary(folder: Path, gpu: bool) -> str:
    """How many points there are."""
    rows = throughput_rows(folder, gpu)
    missing = sum("missing" in row for row in rows.values())
    return f"{len(rows) - missing} points" + (f", {missing} that failed" if missing else "")


# --- running ----------------------------------------------------------------------------------------------------------


def stop(process: subprocess.Popen[Any]) -> None:
    """As Ctrl-C does, and if that is not heard, at once; with all that it started."""
    for how, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
            process.wait(patience)
            if how == signal.SIGINT:
                continue  # others of its group may still be there
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, seconds: float, log: Path) -> Outcome:
    """Run it for at most so many seconds (and GRACE); what it prints goes to the end of `log`."""
    command = part.command(seconds)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n=== {part.name}: {shlex.join(['python', *command])}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        state = "out of time"
        layout = "{desc:14} |{bar}| {elapsed} of at most {postfix}"
        with tqdm(
            total=round(seconds), desc=part.name, disable=None, bar_format=layout, postfix=f"{seconds:.0f} s"
        ) as bar:
            try:
                while time.monotonic() - begin < seconds:
                    try:
                        state = "ok" if process.wait(0.5) in (0, TIME_IS_OVER) else f"failed ({process.returncode})"
                        break
                    except subprocess.TimeoutExpired:
                        bar.update(min(round(seconds), round(time.monotonic() - begin)) - bar.n)
            finally:
                if process.poll() is None:
                    stop(process)
    try:
        result = part.summary()
    except Exception as error:  # it left nothing, or half of it
        result = f"no result: {type(error).__name__}"
    if state != "ok" or not result:
        printed = log.read_bytes()[start:].decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(printed) if line.strip()), "nothing printed")
        result = "; ".join(filter(None, [result, last[:160]]))
    return Outcome(part.name, state, round(time.monotonic() - begin, 1), result)


def run_all(todo: Sequence[Part], seconds: float, log: Path) -> list[Outcome]:
    """Each part in its share of the time that is left; Ctrl-C ends them all, and is a state."""
    end = time.monotonic() + seconds
    outcomes = []
    for index, part in enumerate(todo):
        left = (end - time.monotonic()) * part.share / sum(other.share for other in todo[index:])
        try:
            outcomes.append(run_part(part, max(1.0, left - GRACE / 2), log))
        except KeyboardInterrupt:
            return outcomes + [Outcome(other.name, "not run", result=INTERRUPTED) for other in todo[index:]]
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The parts, one a line."""
    lines = [f"{'part':16}{'state':14}{'seconds':>8}  result"]
    lines += [f"{x.part:16}{x.state:14}{x.seconds:8.0f}  {x.result}" for x in outcomes]
    return "\n".join(lines)


@command.program("bench gpu")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command.new_parser("bench gpu", __doc__)
    parser.add_argument("--minutes", type=command.minutes, default=9.0, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--cpu", action="store_true", help="without a GPU, in tiny sizes: checks this command")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here, so there is nothing to measure (--cpu checks the command without)")
    folder = options.out.resolve()
    with locked(folder):
        return run_in(folder, options, shlex.join(["python", "-m", "bench", "gpu", *arguments]))


def run_in(folder: Path, options: argparse.Namespace, command_line: str) -> int:
    """Run all parts, and write and print what they found; returns the exit status."""
    gpu = not options.cpu
    for name in ("tests.xml", "host_overhead.json"):  # of an earlier call: not to be taken for this one's
        (folder / name).unlink(missing_ok=True)
    log = folder / "log.txt"
    machine = describe_machine(torch.device("cuda" if gpu else "cpu"))
    outcomes = run_all(parts(folder, gpu), options.minutes * 60, log)
    lines = [f"{name}: {value}" for name, value in machine.items()]
    verdicts = []
    if gpu:
        try:
            verdicts = throughput.targets(throughput_rows(folder, gpu))
        except (ValueError, LookupError):
            verdicts = throughput.targets({})
        lines += ["", "Targets, stated for an H100 or H200"]
        lines += [f"  {text}\n      {verdict}" for text, verdict in verdicts]
    else:
        lines += ["", "--cpu: this checked the command and measured nothing."]
    content = dict(
        machine=machine,
        commit=commit(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command_line,
        parts=[asdict(outcome) for outcome in outcomes],
        targets=dict(verdicts),
    )
    write_whole(folder / "gpu.json", lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
    lines += ["", *(str(path) for path in sorted(folder.glob("[!.]*"))), "", table(outcomes)]
    with log.open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))
    if any(outcome.result == INTERRUPTED for outcome in outcomes):
        return STOPPED
    return int(any(outcome.state != "ok" for outcome in outcomes))
