"""What every comparison of trained models shares: the training loop, the progress bar, and the file of results."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn
from tqdm import tqdm

import logpe
from bench.command import TimeIsOver
from bench.common import reading, write_whole
from logpe.files import locked

CHECKPOINT_SECONDS = 60.0

Advance = Callable[[int], None]  # tells the progress bar; raises KeyboardInterrupt when it is time to stop
BatchLoss = Callable[[int], "tuple[Tensor, Callable[[], list[float]]]"]


@dataclass(frozen=True)
class Settings:
    """All that a number depends on, the machine included. Results of different settings never share a file."""

    def content(self) -> dict[str, Any]:
        """What names them."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Names these settings in files."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:8]


def fit(
    model: nn.Module,
    batch_loss: BatchLoss,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    checkpoint: Path,
    advance: Advance,
) -> tuple[float, list[list[float]]]:
    """Trains to the end, from the checkpoint if there is one, and leaves one behind, also when it is interrupted.

    AdamW; the rate rises over the first tenth of the steps, then falls along a cosine to a tenth.

    Args:
        model: on its device; changed in place.
        batch_loss: of the batch that belongs to a step (and to nothing else, or it could not go on from a checkpoint):
            the loss, and what gives numbers to keep, asked for in the last tenth of the steps.
        steps: how many.
        learning_rate: at its highest.
        weight_decay: of matrices; positions and norms have none.
        checkpoint: of everything, and what remains in the end.
        advance: told how many steps are done.

    Returns:
        Seconds of training, and the numbers that were kept.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(logpe.parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.95))
    first, seconds, kept = 0, 0.0, []
    if state := read_checkpoint(checkpoint, device):
        first, seconds, kept = state["step"], state["seconds"], state["kept"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.perf_counter() - seconds
    saved = time.monotonic()

    def save(step: int) -> None:
        state = {"step": step, "seconds": time.perf_counter() - start, "kept": kept}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, state)

    advance(first)
    model.train()
    for step in range(first, steps):
        rate = min(1.0, 10 * (step + 1) / steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        loss, numbers = batch_loss(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 0.9 * steps - 1:
            kept.append(numbers())
        try:
            advance(1)
        except KeyboardInterrupt:
            save(step + 1)
            raise
        if time.monotonic() - saved > CHECKPOINT_SECONDS:  # for those who are not asked before they are stopped
            save(step + 1)
            saved = time.monotonic()
    save(steps)
    return round(time.perf_counter() - start, 2), kept


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """The file is whole, or the old one. Raises OSError."""
    whole = io.BytesIO()  # writing to a full disk, torch.save itself raises a RuntimeError about positions
    torch.save(state, whole)
    write_whole(path, lambda temporary: temporary.write_bytes(whole.getbuffer()))


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What was saved; None where there is none, or none that can be read, which is said: it can be made again."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever it stumbles over
        print(f"{path} is damaged ({type(error).__name__}): training again", file=sys.stderr)
        path.unlink()
        return None


class Results:
    """A JSON file that is whole after every `save`: what was run, and `runs[encoding][seed][job]`.

    Several processes may fill one file, each its own records.
    """

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.about, self.fresh = path, about, fresh
        self.cache = path.parent / ".cache"  # checkpoints of what is under way
        self.cache.mkdir(parents=True, exist_ok=True)
        self.mine: dict[tuple[str, str, str], Any] = {}
        if fresh:
            for checkpoint in self.cache.glob(f"{about['key']}-*.pt"):
                checkpoint.unlink()
        self.runs: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists() or self.fresh:
            return {}
        with reading(self.path):
            runs = json.loads(self.path.read_text())["runs"]
            for record in (record for seeds in runs.values() for jobs in seeds.values() for record in jobs.values()):
                dict(record["train"]), dict(record["lengths"])
            return runs

    def look(self, encoding: str, seed: int, job: str) -> dict[str, Any]:
        """What there is: `train` and `lengths`, empty where nothing is."""
        empty: dict[str, Any] = {"train": {}, "lengths": {}}
        return self.runs.setdefault(encoding, {}).setdefault(str(seed), {}).setdefault(job, empty)

    def record(self, encoding: str, seed: int, job: str) -> dict[str, Any]:
        """The same, as it is in the file now, to be filled in by this process alone."""
        self.runs = self._read()
        self.mine[encoding, str(seed), job] = record = self.look(encoding, seed, job)
        return record

    def save(self) -> None:
        """Writes the whole file, or leaves the old one; the records of others stay as they are there."""
        with filelock.FileLock(self.cache / f".{self.about['key']}.lock"):  # others write too: waits for them
            runs = self._read()
            for (encoding, seed, job), record in self.mine.items():
                runs.setdefault(encoding, {}).setdefault(seed, {})[job] = record
            content = {**self.about, "runs": runs}
            write_whole(self.path, lambda path: path.write_text(to_json(content) + "\n"))
        self.runs, self.fresh = runs, False


def to_json(value: Any, indent: str = "") -> str:
    """JSON with lists of numbers on one line."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = [f"{inner}{json.dumps(str(key))}: {to_json(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return json.dumps(value)


def results_path(folder: Path, name: str, key: str) -> Path:
    """`name`.json unless that holds results of other settings; then `name`-`key`.json."""
    path = folder / f"{name}.json"
    if not path.exists():
        return path
    with reading(path):
        return path if json.loads(path.read_text()).get("key") == key else folder / f"{name}-{key}.json"


class Progress:
    """The bar over all stages, and the reasons to stop early: Ctrl-C, SIGTERM and the deadline (time.monotonic)."""

    def __init__(self, total: int, done: int, deadline: float) -> None:
        self.deadline = deadline
        self.interrupted = False
        self.bar = tqdm(
            total=total,
            initial=done,
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            bar_format="{desc:<29} {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left",
        )

    def advance(self, units: int) -> None:
        """Counts finished work. Raises KeyboardInterrupt when it is time to stop, at the deadline TimeIsOver."""
        self.bar.update(units)
        if self.interrupted:
            raise KeyboardInterrupt
        if time.monotonic() > self.deadline:
            raise TimeIsOver

    def __enter__(self) -> Progress:
        def stop(*_: object) -> None:
            """Asks `advance` to raise, where a checkpoint is whole; raises here when asked twice."""
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        self.previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.bar.close()


@dataclass(frozen=True)
class Stage:
    """What models are trained for, and the tests that they are then put to. Work is in units of the caller's choice."""

    build: Callable[[str, int], nn.Module]  # encoding, seed -> the model, on its device
    train: Callable[[Any, int, Path, Advance], dict[str, Any]]  # model, seed, checkpoint, advance -> what to record
    score: Callable[[Any, str, int, Advance], dict[str, Any]]  # model, test, seed, advance -> what to record
    training_work: int
    tests: Mapping[str, int]  # name: work


def measure(
    results: Results,
    stages: Mapping[str, Stage],
    encodings: Sequence[str],
    seeds: Sequence[int],
    deadline: float = math.inf,
    stamp: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Fills in whatever `results` lacks; of n processes the one with shard (i, n) does its part.

    `stamp` goes beside every measurement. Raises KeyboardInterrupt on Ctrl-C, TimeIsOver when time.monotonic() passes
    the deadline, and Busy where another process is about to measure the same.
    """
    total = done = 0
    plan = []
    pairs = enumerate(itertools.product(seeds, encodings))
    for (pair, (seed, name)), (turn, (job, stage)) in itertools.product(pairs, enumerate(stages.items())):
        if (pair + turn) % shard[1] != shard[0]:  # everybody gets some of each job
            continue
        record = results.look(name, seed, job)
        checkpoint = results.cache / f"{results.about['key']}-{name}-{seed}-{job}.pt"
        missing = [test for test in stage.tests if test not in record["lengths"]]
        training = bool(missing) and not (record["train"] and checkpoint.exists())
        work = stage.training_work + sum(stage.tests.values())
        total += work
        done += work - stage.training_work * training - sum(stage.tests[test] for test in missing)
        if missing:
            plan.append((name, seed, job, stage, checkpoint))
    if not plan:
        return
    with Progress(total, done, deadline) as progress:
        for name, seed, job, stage, checkpoint in plan:
            with locked(results.cache, checkpoint.stem):
                record = results.record(name, seed, job)  # others may have measured it in the meantime
                missing = [test for test in stage.tests if test not in record["lengths"]]
                if not missing:
                    continue
                model = stage.build(name, seed)
                if record["train"] and (state := read_checkpoint(checkpoint)):
                    model.load_state_dict(state["model"])
                else:
                    progress.bar.set_description(f"{name}: {job}, training")
                    found = stage.train(model, seed, checkpoint, progress.advance)
                    record["train"] = {**found, **(stamp or {})}
                    results.save()
                for test in missing:
                    progress.bar.set_description(f"{name}: {job}, {test}")
                    record["lengths"][test] = {**stage.score(model, test, seed, progress.advance), **(stamp or {})}
                    results.save()
                checkpoint.unlink(missing_ok=True)
