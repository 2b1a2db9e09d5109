"""All that a machine with a GPU can tell about logpe, in one command of bounded time.

    python -m bench gpu --minutes 9 --out DIR
    PYTHONPATH=.:kernels python -m bench gpu --out DIR        # from a checkout that is not installed

Runs the GPU tests, the throughput comparison in its most telling points, the host overhead, the counters of the main
kernels where NVIDIA's profiler is installed, and the tuner, each as a process with a share of the time; what one does
not need, the next ones get. Each is a line of the table that is printed at the end, with what it said last. If one
fails, or runs out of time, the others go on. DIR then holds JSON, CSV and PNG, and ``log.txt`` with all that was
printed. The same command on the same DIR resumes where throughput and tuner were stopped.

Exit status 1: a part did not end well. ``--cpu`` runs what there is without a GPU, in tiny sizes: it checks this
command, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import command
from bench.common import describe_machine
from bench.speed import runner, throughput
from logpe.command import STOPPED, TIME_IS_OVER
from logpe.files import locked

ROOT = Path(__file__).parents[2]
INTERRUPTED = "stopped by Ctrl-C"
GRACE = 20.0  # seconds to write down what there is, after the time is over
METHODS = ("log-bias", "log-bias-rope", "none", "flex", "sdpa-cudnn", "sdpa-flash", "flex-learned", "log-rotary-bias")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        share: of the time that all parts have.
        command: returns the arguments of Python, for the seconds that the part has.
    """

    name: str
    share: float
    command: Callable[[float], list[str]]


@dataclass
class Outcome:
    """A line of the table."""

    part: str
    state: str  # ok, failed, out of time, not run
    seconds: float = 0.0
    result: str = ""  # the last line that it printed


def parts(folder: Path, gpu: bool) -> list[Part]:
    """Return the parts in the order of running."""

    def minutes(seconds: float) -> str:
        return f"{max(0.0, seconds - GRACE) / 60:.2f}"

    def tests(seconds: float) -> list[str]:
        where = [] if gpu else ["tests/test_attention.py"]
        processes = max(1, min(12, (os.cpu_count() or 1) - 2))
        several = ["-n", str(processes)] if gpu and importlib.util.find_spec("xdist") else []
        options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return ["-m", "pytest", "-m", "gpu", *where, *several, *options]

    def compare(seconds: float) -> list[str]:
        size = ["--methods", *METHODS, "--directions", "forward", "backward"]
        if not gpu:
            size = ["--device", "cpu", "--methods", throughput.OURS, "--directions", "forward"]
            size += ["--hidden", "64", "--lengths", "64", "128", "--long", "--training"]
        return ["-m", "bench", "throughput", *size, "--minutes", minutes(seconds), "--out", str(folder)]

    def host(seconds: float) -> list[str]:
        size = [] if gpu else ["--device", "cpu", "--rounds", "5"]
        return ["-m", "bench", "host_overhead", *size, "--out", str(folder / "host_overhead.json")]

    def tune(seconds: float) -> list[str]:
        size = ["--masks", "causal", "--presets", "log-bias", "--lengths", "8192"]
        return ["-m", "logpe", "tune", *size, "--minutes", minutes(seconds), "--out", str(folder / "tune.json")]

    def count(seconds: float) -> list[str]:
        return ["-m", "bench", "counters", "--out", str(folder / "counters.json")]

    anywhere = [Part("tests", 0.31, tests), Part("throughput", 0.32, compare), Part("host overhead", 0.06, host)]
    return [*anywhere, Part("counters", 0.06, count), Part("tuner", 0.25, tune)] if gpu else anywhere


# --- running ----------------------------------------------------------------------------------------------------------


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop a process as Ctrl-C does, and if that is not heard, at once; with all that it started."""
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
    """Run a part for at most so many seconds (and GRACE); what it prints goes to the end of `log`."""
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
    printed = log.read_bytes()[start:].decode(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(printed) if line.strip()), "nothing printed")
    return Outcome(part.name, state, round(time.monotonic() - begin, 1), last[:160])


def run_all(todo: Sequence[Part], seconds: float, log: Path) -> list[Outcome]:
    """Run each part in its share of the time that is left. Ctrl-C ends them all, and is a state."""
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
    """Return the parts, one a line."""
    lines = [f"{'part':16}{'state':14}{'seconds':>8}  result"]
    lines += [f"{x.part:16}{x.state:14}{x.seconds:8.0f}  {x.result}" for x in outcomes]
    return "\n".join(lines)


@command.program("bench gpu")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = command.new_parser("bench gpu", __doc__)
    parser.add_argument("--minutes", type=command.minutes, default=9.0, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--cpu", action="store_true", help="without a GPU, in tiny sizes: checks this command")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here, so there is nothing to measure (--cpu checks the command without)")
    folder = options.out.resolve()
    with locked(folder):
        return run_in(folder, options, arguments)


def run_in(folder: Path, options: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """Run all parts, write and print what became of them; return the exit status."""
    gpu = not options.cpu
    for name in ("host_overhead.json", "counters.json"):  # of an earlier call: not to be taken for this one's
        (folder / name).unlink(missing_ok=True)
    log = folder / "log.txt"
    machine = describe_machine(torch.device("cuda" if gpu else "cpu"))
    about = runner.circumstances("gpu", arguments, machine)
    outcomes = run_all(parts(folder, gpu), options.minutes * 60, log)
    runner.write_json(folder / "gpu.json", about | dict(parts=[asdict(outcome) for outcome in outcomes]))
    lines = [f"{name}: {value}" for name, value in machine.items()]
    if not gpu:
        lines += ["", "--cpu: this checked the command and measured nothing."]
    lines += ["", *(str(path) for path in sorted(folder.glob("[!.]*"))), "", table(outcomes)]
    with log.open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))
    if any(outcome.result == INTERRUPTED for outcome in outcomes):
        return STOPPED
    return int(any(outcome.state != "ok" for outcome in outcomes))
