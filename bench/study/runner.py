"""What every study does the same way: options, training, the record of results, and how a run ends."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import filelock
import torch
from torch import Tensor, nn
from tqdm import tqdm

import logpe
from bench import command
from bench.command import at_least, count, positive
from bench.common import device_name, reading, write_whole
from bench.study import tables
from bench.study.model import learned_positions
from bench.study.tables import Runs
from logpe.command import STOPPED, TIME_IS_OVER
from logpe.files import locked
from logpe.lm import checkpoint as checkpoints
from logpe.lm.loop import Stop, Training

CHECKPOINT_SECONDS = 60.0

RESUMES = """Every finished measurement is on disk at once: Ctrl-C or --minutes loses nothing, and the same command goes
on from there."""

Advance = Callable[[int], None]  # counts finished work; raises KeyboardInterrupt when it is time to stop
BatchLoss = Callable[[int], "tuple[Tensor, Callable[[], dict[str, float]]]"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the numbers of a study depend on, the machine included: others go into another file."""

    device: str
    versions: dict[str, str]
    steps: int
    batch: int
    learning_rate: float = 5e-3  # its peak
    weight_decay: float = 0.1
    format: int = 1  # to be raised by a change of the program that makes earlier results incomparable

    def content(self) -> dict[str, Any]:
        """Return what the key is made of."""
        content = asdict(self)
        if not content.get("shape", {}).get(
            "sink", True
        ):  # as before it existed, so that older results keep their keys
            del content["shape"]["sink"]
        return content

    @property
    def key(self) -> str:
        """A name for these settings in names of files."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:8]


# --- the command line -------------------------------------------------------------------------------------------------


def new_parser(
    name: str, description: str | None, epilog: str, budgets: command.Budgets
) -> tuple[argparse.ArgumentParser, Callable[..., None]]:
    """Return a parser with the options of every study, and a function that adds another.

    That takes the option's name, its type, what it is, its default where no budget has one, and more keywords of
    ``add_argument``.
    """
    p = command.new_parser(f"bench {name}", f"{description}\n{RESUMES}", epilog)
    of_budget = command.default_of(budgets)

    def add(option: str, type_: Callable[[str], Any], what: str, default: Any = None, **more: Any) -> None:
        shown = of_budget(option) if default is None else f"(default {default})"
        more = {"metavar": "N", **more, "type": type_, "default": default, "help": f"{what} {shown}"}
        p.add_argument("--" + option.replace("_", "-"), **more)

    add("encodings", str, "which to compare, see below", nargs="+", metavar="NAME")
    add("seeds", at_least(0), "one run with each", nargs="+")
    add("steps", count, "steps of training")
    add("learning_rate", positive, "the highest learning rate", metavar="R")
    add("dim", count, "width of a model")
    add("layers", count, "blocks of a model")
    add("heads", count, "attention heads of a block")
    command.add_run_options(p)
    what = "measure so many models side by side (default: on the CPU one for each thread, else 1)"
    p.add_argument("--processes", type=count, metavar="N", help=what)
    p.add_argument("--shard", metavar="I/N", help="do part I (from 0) of N; by default torchrun's rank")
    return p, add


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (2, 8) for "2/8"; for None the rank of torchrun, or all. Raises ValueError."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


def parse(p: argparse.ArgumentParser, arguments: Sequence[str] | None, budgets: command.Budgets) -> argparse.Namespace:
    """Return the options; those left out come from the budget of --quick or of the device.

    ``device`` is a torch.device, ``deadline`` by time.monotonic(), ``command_line`` what was given, ``shard`` two
    numbers. Raises ValueError.
    """
    args = p.parse_args(arguments)
    args.command_line = arguments
    args.deadline = command.deadline(args.minutes)
    args.device = command.parse_device(args.device)
    args.shard = parse_shard(args.shard)
    if args.shard[1] > 1:
        if args.fresh:
            raise ValueError("--fresh is for one process alone: others would lose what they measured")
        if (args.processes or 1) > 1:
            raise ValueError("--processes divides the work as --shard and torchrun do: name one of them")
    if args.processes is None:
        args.processes = torch.get_num_threads() if args.device.type == "cpu" and args.shard[1] == 1 else 1
    budget = "quick" if getattr(args, "quick", False) else "cpu" if args.device.type == "cpu" else "cuda"
    command.fill_in(args, budgets[budget])
    return args


def machine(args: argparse.Namespace, *modules: ModuleType) -> dict[str, Any]:
    """Return what Settings say of the machine: the device, and the versions of torch, logpe and these modules."""
    versions = {module.__name__: module.__version__ for module in (torch, logpe, *modules)}
    return dict(device=device_name(args.device), versions=versions)


# --- training ---------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    batch_loss: BatchLoss,
    settings: Settings,
    steps: int,
    checkpoint: Path,
    advance: Advance,
    step_work: int = 1,
) -> dict[str, Any]:
    """Train to the end, from the checkpoint if there is one; leave one behind, also where Ctrl-C stops it.

    AdamW; the learning rate rises over the first tenth of the steps, then falls along a cosine to a tenth.

    Args:
        model: on its device; changed in place.
        batch_loss: the loss of a step's batch, which follows from the step's number alone; and what computes numbers
            to record, each a mean over the last tenth of the steps.
        settings: learning rate and weight decay.
        checkpoint: a folder.
        advance: told of every step.
        step_work: the work of one.

    Returns:
        What to record.
    """

    def learning_rate(step: int) -> float:
        share = min(1.0, 10 * (step + 1) / steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        return settings.learning_rate * share

    def backward(step: int) -> Callable[[], dict[str, float]]:
        loss, numbers = batch_loss(step)
        loss.backward()
        return numbers

    groups = logpe.parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    training = Training(model, optimizer, learning_rate, steps, checkpoint)
    seconds: float = 0.0
    recorded: list[dict[str, float]] = []
    if (newest := checkpoints.newest(checkpoint)) is not None:
        folder, manifest = newest
        training.restore(folder)
        seconds, recorded = manifest["seconds"], manifest["recorded"]
    start, saved = time.perf_counter() - seconds, time.monotonic()

    def save() -> None:
        nonlocal seconds
        seconds = time.perf_counter() - start
        training.save(dict(seconds=seconds, recorded=recorded))

    advance(training.done * step_work)
    for step in training.run(backward):
        if step.number >= 0.9 * steps:
            recorded.append(step.loss())
        try:
            advance(step_work)
        except KeyboardInterrupt:
            save()
            raise
        if step.number == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:  # SIGKILL does not ask
            save()
            saved = time.monotonic()
    return {
        "steps": steps,
        **{name: round(fmean(numbers[name] for numbers in recorded), 4) for name in recorded[0]},
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": learned_positions(model),
        "seconds": round(seconds, 2),
    }


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """A JSON file that is whole after every ``save``: what was run, and ``runs[encoding][seed][job]``.

    Several processes may fill one file, each its own records.
    """

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.about, self.fresh = path, about, fresh
        self.cache = path.parent / ".cache"  # checkpoints of what is under way
        self.cache.mkdir(parents=True, exist_ok=True)
        self.mine: dict[tuple[str, str, str], Any] = {}
        if fresh:
            for checkpoint in self.cache.glob(f"{about['key']}-*"):
                shutil.rmtree(checkpoint)
        self.runs: Runs = self.read()

    def read(self) -> Runs:
        """Return what is in the file."""
        if not self.path.exists() or self.fresh:
            return {}
        with reading(self.path):
            runs = json.loads(self.path.read_text())["runs"]
            for record in tables.records(runs):
                dict(record["train"]), dict(record["lengths"])
            return runs

    def look(self, encoding: str, seed: int, job: str) -> dict[str, Any]:
        """Return what there is: ``train`` and ``lengths``, empty where nothing is."""
        empty: dict[str, Any] = {"train": {}, "lengths": {}}
        return self.runs.setdefault(encoding, {}).setdefault(str(seed), {}).setdefault(job, empty)

    def record(self, encoding: str, seed: int, job: str) -> dict[str, Any]:
        """Return the same as it is in the file now, to be filled in by this process alone."""
        self.runs = self.read()
        self.mine[encoding, str(seed), job] = record = self.look(encoding, seed, job)
        return record

    def save(self) -> None:
        """Write the whole file, or leave the old one; the records of others stay as they are there."""
        with filelock.FileLock(self.cache / f".{self.about['key']}.lock"):  # others write too: wait for them
            runs = self.read()
            for (encoding, seed, job), record in self.mine.items():
                runs.setdefault(encoding, {}).setdefault(seed, {})[job] = record
            content = {**self.about, "runs": runs}
            write_whole(self.path, lambda path: path.write_text(to_json(content) + "\n"))
        self.runs, self.fresh = runs, False


def to_json(value: Any, indent: str = "") -> str:
    """Return JSON with lists of numbers on one line."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = [f"{inner}{json.dumps(str(key))}: {to_json(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return json.dumps(value)


def results_path(folder: Path, name: str, key: str) -> Path:
    """Return ``name.json`` unless it holds results of other settings, else ``name-key.json``."""
    path = folder / f"{name}.json"
    if not path.exists():
        return path
    with reading(path):
        return path if json.loads(path.read_text()).get("key") == key else folder / f"{name}-{key}.json"


# --- measuring --------------------------------------------------------------------------------------------------------


class Progress:
    """The bar over all stages, and the reasons to stop early: Ctrl-C, SIGTERM and the deadline (time.monotonic).

    A process of :func:`side_by_side` stops, too, when the one that started it is gone. line: where its bar stands.
    """

    def __init__(self, total: int, done: int, deadline: float, line: int) -> None:
        self.stop = Stop(deadline)
        self.parent = multiprocessing.parent_process()
        self.bar = tqdm(
            total=total,
            initial=done,
            position=0 if self.parent is None else line,
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            bar_format="{desc:<29} {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left",
        )

    def advance(self, units: int) -> None:
        """Count finished work. Raises KeyboardInterrupt when it is time to stop, at the deadline TimeIsOver."""
        self.bar.update(units)
        if self.stop.signalled or (self.parent is not None and not self.parent.is_alive()):
            raise KeyboardInterrupt
        if self.stop.late:
            raise command.TimeIsOver

    def __enter__(self) -> Progress:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.__exit__()
        self.bar.close()


@dataclass(frozen=True)
class Stage:
    """What models are trained for, and the tests that they are then put to. Work is in units of the caller's choice.

    build: encoding and seed -> the model, on its device.
    loss: model and seed -> the loss of its batches, see ``fit``.
    score: model, test, seed and ``advance`` -> what to record; the model is in evaluation.
    tests: name and work of each.
    steps: of training, if not those of the settings.
    kept: folder of a checkpoint that all seeds share, and that stays; None: each model has one, until it is scored.
    trained_as: the job whose models are put to these tests, too; their checkpoints stay.
    same_training: an encoding that trains as another does, which may have done so already.
    """

    settings: Settings
    build: Callable[[str, int], nn.Module]
    loss: Callable[[Any, int], BatchLoss]
    score: Callable[[Any, str, int, Advance], dict[str, Any]]
    step_work: int
    tests: Mapping[str, int]
    steps: int | None = None
    kept: Path | None = None
    trained_as: str | None = None
    same_training: Mapping[str, str] = field(default_factory=dict)

    @property
    def training_work(self) -> int:
        """The work of all steps."""
        return (self.steps or self.settings.steps) * self.step_work

    def train(self, model: nn.Module, seed: int, checkpoint: Path, advance: Advance) -> dict[str, Any]:
        """Train a model as ``fit`` does; return what to record."""
        steps = self.steps or self.settings.steps
        return fit(model, self.loss(model, seed), self.settings, steps, checkpoint, advance, self.step_work)


def measure(
    results: Results,
    stages: Mapping[str, Stage],
    encodings: Sequence[str],
    seeds: Sequence[int],
    deadline: float = math.inf,
    stamp: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Fill in whatever ``results`` lack; of n processes the one with shard (i, n) does its part.

    Args:
        stages: by job.
        deadline: by time.monotonic().
        stamp: goes beside every measurement.

    Raises:
        KeyboardInterrupt: Ctrl-C, or TimeIsOver at the deadline.
        Busy: another process is about to measure the same.
    """
    total = done = 0
    plan = []
    pairs = enumerate(itertools.product(seeds, encodings))
    for (pair, (seed, name)), (turn, (job, stage)) in itertools.product(pairs, enumerate(stages.items())):
        # Everybody gets some of each job; but what one model is put to stays together.
        if (pair + (0 if stage.trained_as else turn)) % shard[1] != shard[0]:
            continue
        missing = stage.tests.keys() - results.look(name, seed, job)["lengths"].keys()
        work = stage.training_work + sum(stage.tests.values())
        total += work
        if missing:
            plan.append((name, seed, job, stage))
        done += work - (stage.training_work if missing else 0) - sum(stage.tests[test] for test in missing)
    if not plan:
        return
    with Progress(total, done, deadline, shard[0]) as progress:
        for name, seed, job, stage in plan:
            weights = stage.same_training.get(name, name)
            checkpoint = (
                stage.kept or results.cache / f"{results.about['key']}-{weights}-{seed}-{stage.trained_as or job}"
            )
            with locked(results.cache, checkpoint.name):
                record = results.record(name, seed, job)  # others may have measured it in the meantime
                missing_tests = [test for test in stage.tests if test not in record["lengths"]]
                if not missing_tests:
                    continue
                model = stage.build(name, seed)
                progress.bar.set_description(f"{name}: {job}, training")
                trained = stage.train(model, seed, checkpoint, progress.advance)  # from the checkpoint, in no time
                if not record["train"]:
                    record["train"] = {**trained, **(stamp or {})}
                    results.save()
                model.eval()
                for test in missing_tests:
                    progress.bar.set_description(f"{name}: {job}, {test}")
                    start = time.perf_counter()
                    scores = stage.score(model, test, seed, progress.advance)
                    seconds = round(time.perf_counter() - start, 2)
                    record["lengths"][test] = {**scores, "seconds": seconds, **(stamp or {})}
                    results.save()
                if stage.kept is None and stage.trained_as is None:
                    shutil.rmtree(checkpoint, ignore_errors=True)


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What to measure for one file of results, and what to show of it."""

    name: str  # of the file
    settings: Settings
    about: Mapping[str, Any]  # what the file says of the data
    plan: Sequence[tuple[Mapping[str, Stage], Sequence[str]]]  # stages by job, and the encodings that go through them
    table: Callable[[Runs], str]
    draw: Callable[[Path, Runs], Sequence[Path] | None]  # the PNG file, or others beside it, which it returns


def side_by_side(name: str, again: Callable[[argparse.Namespace], int], args: argparse.Namespace, count: int) -> None:
    """Measure in ``count`` processes, each with its share of the threads: small models gain little from more.

    Args:
        name: of the program, for its messages.
        again: what this process does, for each of them with a ``shard``; returns the exit status.

    Raises:
        KeyboardInterrupt: a process was stopped, at the deadline TimeIsOver.
        ChildProcessError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    lock = context.RLock()  # two bars must not write at once
    processes = []
    for index in range(count):
        part = argparse.Namespace(**{**vars(args), "processes": 1, "fresh": False, "shard": (index, count)})
        processes.append(context.Process(target=_be_one_of_many, args=(name, again, part, threads, lock)))
    with Stop(math.inf, impatient=False) as stop:
        for process in processes:
            process.start()
        told = False
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            multiprocessing.connection.wait(alive, 0.5)
            failed = any(process.exitcode not in (None, 0, TIME_IS_OVER) for process in processes)
            if (stop.signalled or failed) and not told:
                told = True
                for process in processes:
                    process.terminate()  # SIGTERM, which they take as Ctrl-C
    statuses = [process.exitcode for process in processes]
    failures = [status for status in statuses if status not in (0, STOPPED, TIME_IS_OVER, -signal.SIGTERM)]
    if failures and not stop.signalled:
        raise ChildProcessError(f"a process ended with status {failures[0]}; --processes 1 measures in this one")
    if stop.signalled or STOPPED in statuses:
        raise KeyboardInterrupt
    if TIME_IS_OVER in statuses:
        raise command.TimeIsOver


def _be_one_of_many(
    name: str, again: Callable[[argparse.Namespace], int], args: argparse.Namespace, threads: int, lock: Any
) -> None:
    """Do the part of a process of :func:`side_by_side`."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the process that started this one, which passes it on
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  that one reports
    tqdm.set_lock(lock)
    torch.set_num_threads(threads)
    sys.exit(command.run(name, lambda: again(args)))


def run(
    program: str, args: argparse.Namespace, studies: Sequence[Study], again: Callable[[argparse.Namespace], int]
) -> int:
    """Measure what is missing, one study after the other; show what there is, and return the exit status.

    With ``args.processes`` above 1, the last part of each plan is measured in as many processes, or one for each model.

    Args:
        program: its name, such as ``extrapolation``.
        args: from ``parse``.
        again: makes these studies and this call, see :func:`side_by_side`.
    """
    stamp = command.stamp()
    stop: KeyboardInterrupt | None = None
    last = [(stages, encodings) for study in studies for stages, encodings in study.plan[-1:]]
    models = (len(encodings) for stages, encodings in last for stage in stages.values() if not stage.trained_as)
    count = min(args.processes, len(args.seeds) * (sum(models) or sum(len(encodings) for _, encodings in last)))
    measured = []
    torch.set_flush_denormal(True)
    try:
        for study in studies:
            about = command.about(f"bench {program}", args.command_line, study.settings, stamp, **study.about)
            path = results_path(args.out, study.name, study.settings.key)
            measured.append((study, results := Results(path, about, args.fresh)))
            for stages, encodings in study.plan[:-1] if count > 1 else study.plan:
                measure(results, stages, encodings, args.seeds, args.deadline, stamp, args.shard)
            if count > 1 and args.fresh:
                results.save()  # without what was there, since the processes go on from the file
        if count > 1:
            side_by_side(f"python -m bench {program}", again, args, count)
    except KeyboardInterrupt as error:
        stop = error
    finally:
        torch.set_flush_denormal(False)
    if args.shard[0] == 0 and multiprocessing.parent_process() is None:  # else another process shows the same
        for study, results in measured:
            results.runs = results.read()
            show(study, results)
    return command.stopped(stop) if stop else 0


def show(study: Study, results: Results) -> None:
    """Print the table, and draw the pictures where matplotlib is installed, once there are results."""
    if not any(record["lengths"] for record in tables.records(results.runs)):
        print("Nothing is measured yet.")
        return
    print(f"\n{study.table(results.runs)}")
    print(f"\n{tables.seconds(results.runs) / 60:.1f} minutes of measuring, over all processes: {results.path}")
    try:
        picture = results.path.with_suffix(".png")
        print(*(study.draw(picture, results.runs) or [picture]), sep="\n")
    except ImportError:
        print("No picture: matplotlib is not installed (pip install -e '.[bench]').")
