"""What throughput and decode share: points that are measured one by one, kept in a file of runs, and shown.

The file is DIR/NAME-cuda.json or DIR/NAME-cpu.json. It holds a run for each machine and state of the code, and is
written after every point. Tables, a CSV file and a picture are made from the last run.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import command
from bench.common import commit, describe_machine, load_averages, reading, write_whole
from logpe.files import locked
from logpe.worker import Failed, TookTooLong, Worker

FORMAT = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One point of a bench: a method, and in a subclass on what it runs."""

    method: str

    @property
    def setting(self) -> tuple[Any, ...]:
        """What the points of one table and one row of panels share; these are sorted by it."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The setting in words."""
        raise NotImplementedError

    @classmethod
    def of(cls, row: Row) -> Any:
        """Return the point that a row of the results belongs to. Raises KeyError."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


Rows = dict[Any, Row]  # by point


@dataclass
class Run:
    """The points that one state of the code measured on one machine.

    A row of ``points`` holds the fields of its Point and what was measured, or under "missing" why nothing was.
    """

    machine: dict[str, Any]
    commit: str
    load: list[float] | None
    date: str
    command: str
    points: list[Row]


@dataclass(frozen=True)
class Bench:
    """One of the programs.

    Attributes:
        point: the class of its points.
        methods: the names of its methods. Rows of others are dropped where a run goes on.
        table: makes the text that is printed.
        figure: draws a PNG file with a caption; returns whether there was anything to draw.
        measured: names of what a row holds beside the fields of its point.
        derive: returns what the CSV file has besides, of a point and all rows.
    """

    name: str
    point: type[Point]
    methods: Collection[str]
    table: Callable[[Rows], str]
    figure: Callable[[Path, Rows, str], bool]
    measured: Sequence[str]
    derive: Callable[[Any, Rows], Row]

    def file(self, folder: Path, device: str) -> Path:
        """Return where the results of a device are kept."""
        return folder / f"{self.name}-{device.split(':')[0]}.json"

    def read(self, path: Path) -> list[Run]:
        """Return the runs of a file, none where there is no file. Raises ValueError where it holds something else."""
        if not path.exists():
            return []
        with reading(path):
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            runs = [Run(**run) for run in content["runs"]]
            for run in runs:
                self.rows(run)
            return runs

    def rows(self, run: Run) -> Rows:
        """Return the rows of a run by their points."""
        return {self.point.of(row): row for row in run.points}

    def show(self, run: Run, path: Path) -> None:
        """Print the table, and leave a CSV file and a picture beside the JSON file."""
        rows = self.rows(run)
        print("\n" + "\n".join(f"{name}: {value}" for name, value in run.machine.items()))
        print(f"commit: {run.commit}\n\n{self.table(rows)}")
        write_whole(path.with_suffix(".csv"), lambda temporary: self._write_csv(temporary, run))
        print(f"\n{path}\n{path.with_suffix('.csv')}")
        dtypes = sorted({row["dtype"] for row in run.points})
        caption = f"{run.machine['device']}, torch {run.machine['torch']}, triton {run.machine.get('triton')}, "
        caption += f"{', '.join(dtypes)}, commit {run.commit}, {run.date[:10]}; medians"
        try:
            if self.figure(path.with_suffix(".png"), rows, caption):
                print(path.with_suffix(".png"))
        except ImportError:
            print("There is no picture: matplotlib is not installed.")

    def _write_csv(self, path: Path, run: Run) -> None:
        """Write one line a point: what was measured, what follows from it, and what it depends on."""
        rows = self.rows(run)
        versions = ("driver", "cuda", "cudnn", "torch", "triton", "python")
        about = {name: run.machine.get(name) for name in versions}
        about |= dict(device_name=run.machine["device"], commit=run.commit, date=run.date, command=run.command)
        lines = [row | self.derive(point, rows) for point, row in rows.items()]
        names = [*(field.name for field in fields(self.point)), *self.measured, "missing"]
        names = list(dict.fromkeys([*names, *(name for line in lines for name in line)]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*names, "device_name", *versions, "commit", "date", "command"])
            writer.writeheader()
            writer.writerows(about | line for line in lines)


def circumstances(program: str, arguments: Sequence[str] | None, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what stands beside every measurement. arguments: of the program; None for those of the process."""
    return dict(
        machine=machine,
        commit=commit(),
        load=load_averages(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command.command_line(f"bench {program}", arguments),
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def add_options(parser: argparse.ArgumentParser, minutes: str) -> None:
    """Add the options that all benches have. minutes: how the help says what the time is by default."""
    command.add_run_options(parser, minutes)
    parser.add_argument("--report", action="store_true", help="measure nothing: show the last run again")


def run(
    bench: Bench,
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
    groups: Sequence[Sequence[Point]],
    measure: Callable[[Any, float], Row | None],
    prepare: Callable[[Sequence[Any], float], object] = lambda group, end: None,
) -> int:
    """Measure what the last run on this machine and of this code does not hold, or show it; return the exit status.

    Args:
        groups: all points, in the order of measuring.
        measure: returns what was measured of a point, or under "missing" why nothing was; None where there is no time
            for it until ``end``, by time.monotonic().
        prepare: is called with each group of points that are to be measured, and ``end``.
    """
    path = bench.file(options.out, options.device)
    if options.report:
        if not (runs := bench.read(path)):
            raise ValueError(f"{path} holds no run")
        bench.show(runs[-1], path)
        return 0
    machine = describe_machine(command.parse_device(options.device))
    with locked(options.out, path.name):
        runs = bench.read(path)
        new = Run(**circumstances(bench.name, arguments, machine), points=[])
        same = [run for run in runs if (run.machine, run.commit) == (new.machine, new.commit)]
        if options.fresh or not same:
            same = [new]
            runs.append(new)
        current = same[-1]
        current.points = [row for row in current.points if row["method"] in bench.methods]
        done = bench.rows(current)
        stop: KeyboardInterrupt | None = None
        try:
            for row in _measure(groups, done, command.deadline(options.minutes), measure, prepare):
                current.points.append(row)
                write_json(path, dict(format=FORMAT, runs=[asdict(run) for run in runs]))
        except KeyboardInterrupt as error:
            stop = error
        bench.show(current, path)
        done = bench.rows(current)
        left = sum(point not in done for group in groups for point in group)
        failed = sum("missing" in row for row in current.points)
        status = command.stopped(stop or command.TimeIsOver()) if left else int(failed == len(current.points))
        counts = {"measured": len(current.points) - failed, "failed": failed, "to go": left}
        print("points: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
        return status


def _measure(
    groups: Sequence[Sequence[Any]],
    done: Collection[Any],
    end: float,
    measure: Callable[[Any, float], Row | None],
    prepare: Callable[[Sequence[Any], float], object],
) -> Iterable[Row]:
    """Yield the row of each point that is not done, until the time is over."""
    todo = [[point for point in group if point not in done] for group in groups]
    total = sum(map(len, groups))
    initial = total - sum(map(len, todo))
    with tqdm(total=total, initial=initial, unit="point", disable=None, smoothing=0) as progress:
        for group in todo:
            if group:
                progress.set_description("preparing")
                prepare(group, end)
            for point in group:
                progress.set_description(str(point))
                row = measure(point, end)
                if row is None:
                    return
                progress.update()
                yield asdict(point) | row


def ask(worker: Worker, function: Callable[..., Row], *arguments: Any, end: float, limit: float) -> Row | None:
    """Return what a function measures in a worker, in at most ``limit`` seconds; see ``measure`` of :func:`run`."""
    left = end - time.monotonic()
    if left <= 0:
        return None
    try:
        return worker.call(function, *arguments, seconds=min(left, limit))
    except TookTooLong as error:
        return None if left < limit else dict(missing=str(error))
    except Failed as error:
        return dict(missing=str(error))


def by_setting(rows: Mapping[Any, Row]) -> list[Rows]:
    """Return the rows of each setting, in the order of the settings."""
    settings: dict[Any, Rows] = {}
    for point, row in rows.items():
        settings.setdefault(point.setting, {})[point] = row
    return [settings[setting] for setting in sorted(settings)]
