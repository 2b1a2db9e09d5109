"""Tables and pictures of the extrapolation study: see bench.study.extrapolation, the command."""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import operator
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.common import write_whole
from bench.plots import COLOURS, curve, length_axis, panels, style
from bench.study.protocol import Settings
from bench.study.tables import Runs, cell, half_width, markdown, parameters, rows, seeds_of
from bench.study.tasks import TASKS


def _wrapped(label: str) -> str:
    """Return the name of an encoding on several lines, broken before its options."""
    return textwrap.fill(label.replace("+", " +"), 26)


def by_length(runs: Runs, encoding: str, job: str, *names: str) -> dict[float, list[Any]]:
    """Return, by length, what stands under ``names`` in the scores of every seed that has it."""
    values: dict[float, list[Any]] = defaultdict(list)
    for run in runs[encoding].values():
        for length, scored in run.get(job, {"lengths": {}})["lengths"].items():
            with contextlib.suppress(KeyError):
                values[int(length)].append(functools.reduce(operator.getitem, names, scored))
    return dict(sorted(values.items()))


def table(runs: Runs, settings: Settings, shown: Sequence[str]) -> str:
    """Return bits per byte, their ratio and the accuracy of the tasks ``shown`` as aligned plain text."""
    lengths = settings.lengths
    short, long = min(lengths), max(lengths)

    def means(encoding: str, job: str, value: str) -> list[float]:
        values = by_length(runs, encoding, job, value)
        return [fmean(values[n]) if n in values else math.nan for n in lengths]

    def cells(values: Sequence[float], form: str, width: int) -> str:
        return "".join(f"{'-' if math.isnan(v) else format(v, form):>{width}}" for v in values)

    head = f"{'':<20}{f' bits per {settings.unit} ':-^{7 * len(lengths)}}{'':9}"
    names = f"{f'context in {settings.unit}s':<20}{cells(lengths, 'd', 7)}{'ratio':>9}"
    for task in shown:
        head += f"   {f' {task} accuracy ':-^{6 * len(lengths)}}"
        names += f"   {cells(lengths, 'd', 6)}"
    lines = [head, names, "-" * len(names)]
    for encoding in runs:
        bits = means(encoding, "text", settings.bits)
        line = f"{encoding:<20}{cells(bits, '.3f', 7)}{cells([2 ** (bits[-1] - bits[0])], '.3f', 9)}"
        lines.append(line + "".join("   " + cells(means(encoding, task, "accuracy"), ".2f", 6) for task in shown))
    lines += [
        f"Trained at {settings.train_length} {settings.unit}s. The same {settings.target} last ones of each window.",
        f"ratio: perplexity per {settings.unit} with {long:,} {settings.unit}s of context over that with {short:,}; "
        "lower is better.",
        *(f"{t}: {TASKS[t].summary}; mean over depths, a guess scores {TASKS[t].chance:g}." for t in shown),
    ]
    return "\n".join(lines)


def figure(path: Path, runs: Runs, settings: Settings, shown: Sequence[str], note: str) -> None:
    """Draw, left, bits per byte by context length; then one panel per task."""
    panes = [("text", settings.bits, f"bits per {settings.unit} of the same text")]
    panes += [(task, "accuracy", f"{task} retrieval accuracy") for task in shown]
    small = dict(textcoords="offset points", fontsize=8, color="0.45")
    with panels(path, len(panes), note) as axes:
        for axis, (job, value, label) in zip(axes, panes, strict=True):
            for encoding in runs:
                curve(axis, by_length(runs, encoding, job, value), **style(encoding, list(runs)))
            length_axis(axis, settings.lengths, f"context in {settings.unit}s", settings.train_length)
            place, coords = (settings.train_length, 0.5), ("data", "axes fraction")
            axis.annotate(f"trained at {settings.train_length:,}", place, (4, 0), coords, rotation=90, **small)
            axis.set_ylabel(label)
            if job != "text":
                axis.set_ylim(-0.03, 1.05)
                axis.axhline(TASKS[job].chance, color="0.6", linestyle=":", linewidth=1, zorder=0)
                axis.annotate("a guess", (settings.lengths[0], TASKS[job].chance), (4, 3), "data", **small)
        axes[0].legend(frameon=False)


def caption(runs: Runs, windows: int, source: str, settings: Settings) -> str:
    """Return what the pictures show, in two lines."""
    seeds = sorted({int(seed) for by_seed in runs.values() for seed in by_seed})
    return (
        f"{settings.unit.capitalize()}-level transformers, {parameters(runs)}, trained on "
        f"{settings.train_length}-{settings.unit} windows "
        f"of {source}, {settings.steps:,} steps of {settings.batch}, "
        f"{'seed' if len(seeds) == 1 else 'mean of seeds'} {', '.join(map(str, seeds))}.\n"
        f"Scored: the last {settings.target} {settings.unit}s of the same {windows} held-out windows at every length; "
        f"{settings.samples} retrieval questions at each of {len(settings.depths)} depths."
    )


# --- tables over seeds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One column of a table.

    form: of a mean. value: of the jobs of one encoding and seed, the training length and the longest; KeyError where
    it is not measured.
    """

    name: str
    form: str
    value: Callable[[Runs, int, int], float]

    def by_seed(self, runs: Runs, encoding: str, settings: Settings) -> dict[str, float]:
        """Return the value of every seed that has it."""
        values = {}
        for seed, run in runs.get(encoding, {}).items():
            try:
                values[seed] = self.value(run, settings.train_length, max(settings.lengths))
            except KeyError:
                continue
        return values


def _read(run: Runs, job: str, length: int, value: str) -> Any:
    return run[job]["lengths"][str(length)][value]


def _growth(value: str) -> Callable[[Runs, int, int], float]:
    return lambda run, short, long: 2 ** (_read(run, "text", long, value) - _read(run, "text", short, value))


def _against_cut(run: Runs, short: int, long: int, value: str, cut: str) -> float:
    return 100 * (2 ** (_read(run, "text", long, value) - _read(run, "text", short, cut)) - 1)


def text_measures(settings: Settings) -> list[Measure]:
    """Return the columns of the text."""
    bits, unit = settings.bits, settings.unit
    measures = [
        Measure(f"bits/{unit} at T", ".3f", lambda run, short, long: _read(run, "text", short, bits)),
        Measure(f"bits/{unit} at L", ".3f", lambda run, short, long: _read(run, "text", long, bits)),
        Measure("same-target ratio", ".3f", _growth(bits)),
        Measure("whole-window ratio", ".3f", _growth(f"whole_{bits}")),
        Measure("L against cut, %", "+.2f", functools.partial(_against_cut, value=bits, cut=f"cut_{bits}")),
    ]
    if settings.mixture:
        far = functools.partial(_against_cut, value=f"far_{bits}", cut=f"far_cut_{bits}")
        measures.append(Measure("the same of repeats from afar, %", "+.1f", far))
    return measures


def task_measures(task: str) -> list[Measure]:
    """Return the columns of a retrieval task."""
    return [
        Measure(f"{task}: training", ".3f", lambda run, short, long: run[task]["train"]["accuracy_at_the_end"]),
        Measure("at T", ".3f", lambda run, short, long: _read(run, task, short, "accuracy")),
        Measure("at L", ".3f", lambda run, short, long: _read(run, task, long, "accuracy")),
        Measure("at L, worst depth", ".3f", lambda run, short, long: min(_read(run, task, long, "per_depth").values())),
    ]


LEGEND = """T: {train} {unit}s, the training length. L: {long:,}, the longest tested. Mean ± standard deviation.
bits/{unit}: of the same last {target} {unit}s of each window, with growing context; same-target ratio: their perplexity
per {unit} at L over that at T. whole-window ratio: the same with every {unit} of the windows scored, in chunks of T and
of L. L against cut: perplexity of the last {target} {unit}s at L, against the same model that sees at most T {unit}s of
context (at least 7/8 T) before each; below 0 far context helps.
Paired differences: same seed, same batches, same initial weights. In brackets the 95% interval by Student's t over
seeds, so with "seeds" - 1 degrees of freedom. What a task shows at L counts where training accuracy came near 1."""

REPEATS = """
Repeats from afar: targets that end three tokens which stood in the longest window before, but not within T."""


def spread_table(runs: Runs, settings: Settings, columns: Sequence[Measure]) -> str:
    """Return each encoding's mean ± standard deviation over seeds, as Markdown."""
    lines = [["encoding", "seeds", *(measure.name for measure in columns)]]
    for encoding in rows(runs):
        values = [list(measure.by_seed(runs, encoding, settings).values()) for measure in columns]
        cells = [cell(some, measure.form) for some, measure in zip(values, columns, strict=True)]
        lines.append([encoding, seeds_of(set(map(len, values))), *cells])
    return markdown(lines)


def paired_table(runs: Runs, settings: Settings, columns: Sequence[Measure], baseline: str) -> str:
    """Return each encoding minus the baseline, seed by seed: the mean and its 95% interval, as Markdown."""
    lines = [[f"minus {baseline}", "seeds", *(measure.name for measure in columns)]]
    for encoding in rows(runs):
        if encoding == baseline:
            continue
        cells, counts = [], set()
        for measure in columns:
            here, there = (measure.by_seed(runs, name, settings) for name in (encoding, baseline))
            differences = [here[seed] - there[seed] for seed in here if seed in there]
            counts.add(len(differences))
            form, half = "+" + measure.form.strip("+"), half_width(differences)
            interval = ""
            if not math.isnan(half):
                mean = fmean(differences)
                interval = f" [{mean - half:{form}}, {mean + half:{form}}]"
            cells.append(cell(differences, form, spread=False) + interval)
        lines.append([encoding, seeds_of(counts), *cells])
    return markdown(lines)


def tables(runs: Runs, settings: Settings, shown: Sequence[str], baseline: str) -> str:
    """Return what the text says, then each task: the spread over seeds, then paired differences."""
    parts = []
    for columns in (text_measures(settings), *map(task_measures, shown)):
        parts += [spread_table(runs, settings, columns), paired_table(runs, settings, columns, baseline)]
    about = dict(unit=settings.unit, train=settings.train_length, long=max(settings.lengths), target=settings.target)
    parts.append(LEGEND.format(**about) + REPEATS * bool(settings.mixture))
    notes = [f"{name}: {TASKS[name].summary}; a guess scores {TASKS[name].chance:.2g}." for name in shown]
    return "\n\n".join(parts) + "\n" + "\n".join(notes)


def write_csv(path: Path, runs: Runs, settings: Settings) -> None:
    """Write one line per number: all but the lists by window and by position, which are in the JSON."""

    def numbers(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
        for name, value in scores.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{name}/")
            elif isinstance(value, int | float):
                yield prefix + name, value

    head = ["train_length", "encoding", "seed", "job", "length", "measure", "value", "device", "torch", "commit"]
    lines: list[list[Any]] = [head]
    for encoding, seeds in runs.items():
        for seed, jobs in seeds.items():
            for job, record in jobs.items():
                for length, scores in {"training": record["train"], **record["lengths"]}.items():
                    where = [settings.train_length, encoding, seed, job, length]
                    about = [settings.device, settings.versions["torch"], scores.get("commit", "")]
                    lines += [[*where, name, value, *about] for name, value in numbers(scores)]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    write_whole(path, write)


# --- pictures ---------------------------------------------------------------------------------------------------------


def perplexity_axis(axis: Any) -> None:
    """Make the y axis logarithmic, with round ticks however little or much there is to see."""
    from matplotlib import ticker

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 5 * low else ticker.MaxNLocator(7))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")


def perplexity_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Draw perplexity by context length: of the same last bytes, and of whole windows. Bands: the seeds."""
    bits = settings.bits
    panes = [
        (bits, f"perplexity of the same last {settings.target} {settings.unit}s", f"context in {settings.unit}s"),
        (f"whole_{bits}", "perplexity of whole windows", f"length of the window in {settings.unit}s"),
    ]
    with panels(path, len(panes), note, size=(5.6, 4.6), legend="right center") as axes:
        for axis, (value, label, what) in zip(axes, panes, strict=True):
            for encoding in rows(runs):
                points = by_length(runs, encoding, "text", value)
                perplexity = {n: [2**bits for bits in values] for n, values in points.items()}
                curve(axis, perplexity, **style(encoding, rows(runs)))
            length_axis(axis, settings.lengths, what, settings.train_length)
            perplexity_axis(axis)
            axis.set_ylabel(label)


def retrieval_picture(path: Path, runs: Runs, settings: Settings, task: str, note: str) -> None:
    """Draw accuracy by length and depth, one panel per encoding; nothing where nothing is measured."""
    shown = [name for name in rows(runs) if any(run.get(task, {}).get("lengths") for run in runs[name].values())]
    if not shown:
        return
    depths, lengths = [f"{depth:g}" for depth in settings.depths], settings.lengths
    with panels(path, len(shown), note, size=(3.1, 2.8)) as axes:
        for axis, encoding in zip(axes, shown, strict=True):
            axis.grid(False)
            by_depth = [by_length(runs, encoding, task, "per_depth", depth) for depth in depths]
            grid = [[fmean(line[n]) if n in line else math.nan for n in lengths] for line in by_depth]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    ink = "black" if value > 0.5 else "white"
                    if not math.isnan(value):
                        axis.text(x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color=ink)
            if settings.train_length in lengths:
                axis.axvline(lengths.index(settings.train_length) + 0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
            axis.set_yticks(range(len(depths)), depths, fontsize=8)
            axis.set_title(_wrapped(style(encoding, shown)["label"]), fontsize=9.5)
        axes[0].set_ylabel(f"{task}: depth of the answer")
        axes[-1].set_xlabel(f"length in {settings.unit}s")
        axes[0].figure.colorbar(image, ax=axes, label="accuracy", shrink=min(0.7, 2.5 / len(shown)))


def decay_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Draw what each head's learned bias makes of a key's weight at a distance: (1 + rate d)^-power, first seed."""
    learned = {}
    for encoding in rows(runs):
        trained = [run["text"]["train"].get("positions", []) for run in runs[encoding].values() if "text" in run]
        if trained and trained[0] and {"power", "rate"} <= trained[0][0].keys():
            learned[encoding] = trained[0]
    if not learned:
        return
    longest = max(settings.lengths)
    distances = [0.0, *(2 ** (k / 4) for k in range(4 * math.ceil(math.log2(longest)) + 1))]
    with panels(path, len(learned), note, columns=3) as axes:
        for axis, (encoding, layers) in zip(axes, learned.items(), strict=True):
            look = style(encoding, list(learned))
            for index, layer in enumerate(layers):
                for head, (power, rate) in enumerate(zip(layer["power"], layer["rate"], strict=True)):
                    axis.plot(
                        [d + 1 for d in distances],
                        [(1 + rate * d) ** -power for d in distances],
                        color=COLOURS[encoding.partition("+")[0]],
                        alpha=1 - 0.75 * index / max(1, len(layers) - 1),
                        linewidth=1.2,
                        label=f"layer {index + 1}" if head == 0 and len(layers) > 1 else None,
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylim(1e-6, 1.5)
            axis.axvline(settings.train_length, color="0.6", linestyle="--", linewidth=1, zorder=0)
            axis.set_title(_wrapped(look["label"]), fontsize=9.5)
            axis.set_xlabel(f"distance + 1, in {settings.unit}s")
            axis.set_ylabel("weight against distance 0")
            if len(layers) > 1:
                axis.legend(frameon=False, fontsize=7)


def position_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Draw, left, bits per byte by position in the longest windows; right, the entropy of the last queries' attention.

    The dotted line is the entropy of attention to all alike.
    """
    longest = max(settings.lengths)
    with panels(path, 2, note, size=(5.6, 4.6), legend="right center") as (left, right):
        for encoding in rows(runs):
            look = style(encoding, rows(runs))
            by_position = by_length(runs, encoding, "text", "by_position").get(longest)
            if by_position:
                places = sorted(by_position[0], key=int)
                left.plot([int(n) + 1 for n in places], [fmean(b[n] for b in by_position) for n in places], **look)
            entropy = by_length(runs, encoding, "text", "entropy")  # of each seed, by layer and head
            means = [fmean(h for layers in seeds for layer in layers for h in layer) for seeds in entropy.values()]
            right.plot(list(entropy), means, marker="o", markersize=3.5, **look)
        left.set_xscale("log", base=2)
        left.axvline(settings.train_length, color="0.6", linestyle="--", linewidth=1, zorder=0)
        left.set_xlabel(f"position in the window + 1, in {settings.unit}s")
        left.set_ylabel(f"bits per {settings.unit}")
        length_axis(right, settings.lengths, f"context in {settings.unit}s", settings.train_length)
        right.plot(settings.lengths, [math.log(n) for n in settings.lengths], color="0.6", linestyle=":")
        place = (longest, math.log(longest))
        right.text(*place, "attention to all alike  ", ha="right", va="bottom", fontsize=8, color="0.45")
        right.set_ylabel("entropy of attention in nats, mean of heads")


def report(path: Path, runs: Runs, settings: Settings, shown: Sequence[str], note: str) -> list[Path]:
    """Draw the pictures beside ``path``; return those that exist. Raises ImportError where there is no matplotlib."""
    pictures = {
        name: path.with_name(f"{path.stem}-{name}.png") for name in ("perplexity", "decay", "positions", *shown)
    }
    perplexity_picture(pictures["perplexity"], runs, settings, note)
    decay_picture(pictures["decay"], runs, settings, note)
    position_picture(pictures["positions"], runs, settings, note)
    for task in shown:
        retrieval_picture(pictures[task], runs, settings, task, note)
    return [picture for picture in pictures.values() if picture.exists()]
