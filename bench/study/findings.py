"""Tables and pictures of the extrapolation study: see bench.study.extrapolation, the command."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.common import write_whole
from bench.plots import COLOURS, curve, length_axis, panels, style
from bench.study import tasks
from bench.study.model import ENCODINGS
from bench.study.protocol import Settings, Text

Runs = dict[str, Any]  # runs[encoding][seed][job]: a record with `train` and `lengths`

# --- of --quick -------------------------------------------------------------------------------------------------------


def means(runs: dict[str, Any], encoding: str, job: str, value: str, lengths: Sequence[int]) -> list[float]:
    """Means over seeds, by length; nan where nothing is measured yet."""
    seeds = [seed[job]["lengths"] for seed in runs[encoding].values() if job in seed]
    found = [[s[str(n)][value] for s in seeds if str(n) in s] for n in lengths]
    return [fmean(values) if values else math.nan for values in found]


def seconds(found: Any) -> float:
    """All that was spent on some results."""
    if not isinstance(found, dict):
        return 0.0
    return found.get("seconds", 0.0) + sum(map(seconds, found.values()))


def table(runs: dict[str, Any], settings: Settings, tasks_shown: Sequence[str]) -> str:
    """Bits per byte, ratio and retrieval accuracy as aligned plain text."""
    lengths = settings.lengths
    short, long = min(lengths), max(lengths)

    def cells(values: Sequence[float], form: str, width: int) -> str:
        return "".join(f"{'-' if math.isnan(v) else format(v, form):>{width}}" for v in values)

    heads = [f"{'':<20}{' bits per byte ':-^{7 * len(lengths)}}{'':9}"]
    names = [f"{'context in bytes':<20}{cells(lengths, 'd', 7)}{'ratio':>9}"]
    for task in tasks_shown:
        heads.append(f"   {f' {task} accuracy ':-^{6 * len(lengths)}}")
        names.append(f"   {cells(lengths, 'd', 6)}")
    lines = ["".join(heads), "".join(names)]
    lines.append("-" * len(lines[1]))
    for encoding in runs:
        bits = means(runs, encoding, "text", "bits_per_byte", lengths)
        line = f"{encoding:<20}{cells(bits, '.3f', 7)}{cells([2 ** (bits[-1] - bits[0])], '.3f', 9)}"
        for task in tasks_shown:
            line += "   " + cells(means(runs, encoding, task, "accuracy", lengths), ".2f", 6)
        lines.append(line)
    lines.append(f"Trained at {settings.train_length} bytes. The same {settings.target} last bytes of each window.")
    lines.append(
        f"ratio: perplexity per byte with {long:,} bytes of context over that with {short:,}; lower is better."
    )
    for task in tasks_shown:
        lines.append(
            f"{task}: {tasks.TASKS[task].summary}; mean over depths, a guess scores {tasks.TASKS[task].chance:g}."
        )
    return "\n".join(lines)


def figure(path: Path, runs: dict[str, Any], settings: Settings, tasks_shown: Sequence[str], caption: str) -> None:
    """Left: bits per byte by context length; then one panel per task."""
    shown = [("text", "bits_per_byte", "bits per byte of the same text")]
    shown += [(task, "accuracy", f"{task} retrieval accuracy") for task in tasks_shown]
    small = dict(textcoords="offset points", fontsize=8, color="0.45")
    with panels(path, len(shown), caption) as axes:
        for axis, (job, value, label) in zip(axes, shown, strict=True):
            for encoding in runs:
                values = means(runs, encoding, job, value, settings.lengths)
                axis.plot(settings.lengths, values, marker="o", markersize=4, **style(encoding, list(runs)))
            length_axis(axis, settings.lengths, "context in bytes", settings.train_length)
            place, coords = (settings.train_length, 0.5), ("data", "axes fraction")
            axis.annotate(f"trained at {settings.train_length:,}", place, (4, 0), coords, rotation=90, **small)
            axis.set_ylabel(label)
            if job != "text":
                axis.set_ylim(-0.03, 1.05)
                chance = tasks.TASKS[job].chance
                axis.axhline(chance, color="0.6", linestyle=":", linewidth=1, zorder=0)
                axis.annotate("a guess", (settings.lengths[0], chance), (4, 3), "data", **small)
        axes[0].legend(frameon=False)


def caption(runs: dict[str, Any], text: Text, source: str, settings: Settings) -> str:
    """What the figure shows, in two lines."""
    seeds = sorted({int(seed) for by_seed in runs.values() for seed in by_seed})
    jobs = [job for by_seed in runs.values() for run in by_seed.values() for job in run.values()]
    size = max(job["train"].get("parameters", 0) for job in jobs) / 1e6
    return (
        f"Byte-level transformers, {size:.2f} M parameters, trained on {settings.train_length}-byte windows "
        f"of {source}, {settings.steps:,} steps of {settings.batch}, "
        f"{'seed' if len(seeds) == 1 else 'mean of seeds'} {', '.join(map(str, seeds))}.\n"
        f"Scored: the last {settings.target} bytes of the same {len(text.windows)} held-out windows at every length; "
        f"{settings.samples} retrieval questions at each of {len(settings.depths)} depths."
    )


# --- statistics -------------------------------------------------------------------------------------------------------

# The 0.975 quantile of Student's t with 1, 2, ... degrees of freedom; later 1.96 + 2.5 / df, right to 0.005.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def half_width(values: Sequence[float]) -> float:
    """Of the 95% confidence interval of the mean, by Student's t; nan for a single value."""
    n = len(values)
    if n < 2:
        return math.nan
    quantile = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.5 / (n - 1)
    return quantile * stdev(values) / math.sqrt(n)


@dataclass(frozen=True)
class Measure:
    """One column of the table: a number per run, that is of the jobs of one encoding and seed."""

    name: str
    form: str  # of a mean
    of: Callable[[Runs, int, int], float]  # of a run, the training length and the longest; KeyError if not measured

    def by_seed(self, runs: Runs, encoding: str, settings: Settings) -> dict[str, float]:
        """Of every seed that has it."""
        found = {}
        for seed, run in runs.get(encoding, {}).items():
            try:
                found[seed] = self.of(run, settings.train_length, max(settings.lengths))
            except KeyError:
                continue
        return found


def _read(run: Runs, job: str, length: int, value: str) -> Any:
    return run[job]["lengths"][str(length)][value]


def _growth(value: str) -> Callable[[Runs, int, int], float]:
    return lambda run, short, long: 2 ** (_read(run, "text", long, value) - _read(run, "text", short, value))


def _against_cut(run: Runs, short: int, long: int) -> float:
    far, cut = _read(run, "text", long, "bits_per_byte"), _read(run, "text", short, "cut_bits_per_byte")
    return 100 * (2 ** (far - cut) - 1)


def text_measures() -> list[Measure]:
    """Of prediction."""
    return [
        Measure("bits/byte at T", ".3f", lambda run, short, long: _read(run, "text", short, "bits_per_byte")),
        Measure("bits/byte at L", ".3f", lambda run, short, long: _read(run, "text", long, "bits_per_byte")),
        Measure("same-target ratio", ".3f", _growth("bits_per_byte")),
        Measure("whole-window ratio", ".3f", _growth("whole_bits_per_byte")),
        Measure("L against cut, %", "+.2f", _against_cut),
    ]


def task_measures(task: str) -> list[Measure]:
    """Of retrieval."""

    def per_depth(run: Runs, long: int) -> dict[str, float]:
        return _read(run, task, long, "per_depth")

    return [
        Measure(f"{task}: training", ".3f", lambda run, short, long: run[task]["train"]["accuracy_at_the_end"]),
        Measure("at T", ".3f", lambda run, short, long: _read(run, task, short, "accuracy")),
        Measure("at L", ".3f", lambda run, short, long: _read(run, task, long, "accuracy")),
        Measure("at L, worst depth", ".3f", lambda run, short, long: min(per_depth(run, long).values())),
    ]


LEGEND = """T: {train} bytes, the training length. L: {long:,}, the longest tested. Mean ± standard deviation of seeds.
bits/byte: of the same last {target} bytes of each window, with growing context; same-target ratio: their perplexity per
byte at L over that at T. whole-window ratio: the same with every byte of the windows scored, in chunks of T and of L.
L against cut: perplexity of the last {target} bytes at L, against the same model that sees at most T bytes of context
(at least 7/8 T) before each; below 0 far context helps.
Paired differences: same seed, same batches, same initial weights. In brackets the 95% interval by Student's t over
seeds, so with "seeds" - 1 degrees of freedom. What a task shows at L counts where training accuracy came near 1."""


def rows(runs: Runs) -> list[str]:
    """Encodings in the order of bench.study.model, each followed by its variants."""
    order = {name: index for index, name in enumerate(ENCODINGS)}
    return sorted(runs, key=lambda name: (order.get(name.partition("+")[0], len(order)), name))


def seeds_of(counts: set[int]) -> str:
    """How many values a line's means are made of: "3", or "1-3" while the study is under way."""
    return "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0"


def spread_table(runs: Runs, settings: Settings, columns: Sequence[Measure]) -> str:
    """Each encoding's mean ± standard deviation over seeds, as Markdown."""
    lines = [["encoding", "seeds", *(measure.name for measure in columns)]]
    for encoding in rows(runs):
        cells, counts = [], set()
        for measure in columns:
            values = list(measure.by_seed(runs, encoding, settings).values())
            counts |= {len(values)} - {0}
            spread = f" ± {stdev(values):{measure.form.strip('+')}}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):{measure.form}}{spread}" if values else "-")
        lines.append([encoding, seeds_of(counts), *cells])
    return markdown(lines)


def paired_table(runs: Runs, settings: Settings, columns: Sequence[Measure], baseline: str) -> str:
    """Each encoding minus the baseline, seed by seed: the mean and its 95% interval, as Markdown."""
    lines = [[f"minus {baseline}", "seeds", *(measure.name for measure in columns)]]
    for encoding in rows(runs):
        if encoding == baseline:
            continue
        cells, counts = [], set()
        for measure in columns:
            here, there = (measure.by_seed(runs, name, settings) for name in (encoding, baseline))
            differences = [here[seed] - there[seed] for seed in here if seed in there]
            counts |= {len(differences)} - {0}
            form, cell = "+" + measure.form.strip("+"), "-"
            if differences:
                mean, half = fmean(differences), half_width(differences)
                cell = f"{mean:{form}}" + ("" if math.isnan(half) else f" [{mean - half:{form}}, {mean + half:{form}}]")
            cells.append(cell)
        lines.append([encoding, seeds_of(counts), *cells])
    return markdown(lines)


def tables(runs: Runs, settings: Settings, tasks_shown: Sequence[str], baseline: str) -> str:
    """What the text says, then each task; of each the spread over seeds, then paired differences."""
    parts = []
    for columns in (text_measures(), *(task_measures(task) for task in tasks_shown)):
        parts += [spread_table(runs, settings, columns), paired_table(runs, settings, columns, baseline)]
    parts.append(LEGEND.format(train=settings.train_length, long=max(settings.lengths), target=settings.target))
    notes = [
        f"{name}: {tasks.TASKS[name].summary}; a guess scores {tasks.TASKS[name].chance:.2g}." for name in tasks_shown
    ]
    return "\n\n".join(parts) + "\n" + "\n".join(notes)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head, aligned for the terminal too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def write_csv(path: Path, runs: Runs, settings: Settings) -> None:
    """One line per number: everything but the per-window and per-position lists, which are in the JSON."""

    def numbers(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
        for name, value in found.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{name}/")
            elif isinstance(value, int | float):
                yield prefix + name, value

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(
                ["train_length", "encoding", "seed", "job", "length", "measure", "value", "device", "torch", "commit"]
            )
            for encoding, seeds in runs.items():
                for seed, jobs in seeds.items():
                    for job, record in jobs.items():
                        for length, found in {"training": record["train"], **record["lengths"]}.items():
                            where = [settings.train_length, encoding, seed, job, length]
                            about = [settings.device, settings.versions["torch"], found.get("commit", "")]
                            out.writerows([*where, name, value, *about] for name, value in numbers(found))

    write_whole(path, write)


# --- pictures ---------------------------------------------------------------------------------------------------------


def perplexity_axis(axis: Any) -> None:
    """Log scale, with round ticks however little or much there is to see."""
    from matplotlib import ticker

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 5 * low else ticker.MaxNLocator(7))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")


def perplexity_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Perplexity per byte by context length: of the same last bytes, and of whole windows. Bands: the seeds."""
    kinds = {
        "bits_per_byte": f"perplexity of the same last {settings.target} bytes",
        "whole_bits_per_byte": "perplexity of whole windows",
    }
    with panels(path, len(kinds), note, size=(5.6, 4.6), legend="right center") as axes:
        for axis, (value, label) in zip(axes, kinds.items(), strict=True):
            for encoding in rows(runs):
                found: dict[int, list[float]] = {}
                for run in runs[encoding].values():
                    for length, scored in run.get("text", {"lengths": {}})["lengths"].items():
                        if value in scored:
                            found.setdefault(int(length), []).append(2 ** scored[value])
                curve(axis, dict(sorted(found.items())), **style(encoding, rows(runs)))
            what = "context in bytes" if value == "bits_per_byte" else "length of the window in bytes"
            length_axis(axis, settings.lengths, what, settings.train_length)
            perplexity_axis(axis)
            axis.set_ylabel(label)


def retrieval_picture(path: Path, runs: Runs, settings: Settings, task: str, note: str) -> None:
    """Accuracy by length and depth, one panel per encoding."""
    shown = [name for name in rows(runs) if any(run.get(task, {}).get("lengths") for run in runs[name].values())]
    if not shown:
        return
    depths, lengths = [f"{depth:g}" for depth in settings.depths], settings.lengths

    def cell(encoding: str, length: int, depth: str) -> float:
        scored = [run[task]["lengths"].get(str(length)) for run in runs[encoding].values() if task in run]
        values = [found["per_depth"][depth] for found in scored if found]
        return fmean(values) if values else math.nan

    with panels(path, len(shown), note, size=(3.1, 2.8)) as axes:
        for axis, encoding in zip(axes, shown, strict=True):
            grid = [[cell(encoding, n, depth) for n in lengths] for depth in depths]
            axis.grid(False)
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
            axis.set_title(style(encoding, shown)["label"], fontsize=9.5)
        axes[0].set_ylabel(f"{task}: depth of the answer")
        axes[-1].set_xlabel("length in bytes")
        axes[0].figure.colorbar(image, ax=list(axes), label="accuracy", shrink=min(0.7, 2.5 / len(shown)))


def decay_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """What each head's learned bias makes of a key's weight at a distance: (1 + rate d)^-power, of the first seed."""
    learned = {}
    for encoding in rows(runs):
        trained = [run["text"]["train"].get("positions", []) for run in runs[encoding].values() if "text" in run]
        if trained and trained[0] and "power" in trained[0][0]:
            learned[encoding] = trained[0]
    if not learned:
        return
    longest = max(settings.lengths)
    distances = [0.0, *(2 ** (k / 4) for k in range(4 * math.ceil(math.log2(longest)) + 1))]
    with panels(path, len(learned), note, columns=3) as axes:
        for axis, (encoding, layers) in zip(axes, learned.items(), strict=True):
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
            axis.set_title(style(encoding, list(learned))["label"], fontsize=9.5)
            axis.set_xlabel("distance + 1, in bytes")
            axis.set_ylabel("weight against distance 0")
            if len(layers) > 1:
                axis.legend(frameon=False, fontsize=7)


def position_picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Left: bits per byte by position in the longest windows. Right: entropy of the last queries' attention."""
    longest = str(max(settings.lengths))
    with panels(path, 2, note, size=(5.6, 4.6), legend="right center") as (left, right):
        for encoding in rows(runs):
            look = style(encoding, rows(runs))
            texts = [run["text"]["lengths"] for run in runs[encoding].values() if "text" in run]
            by_position = [found[longest]["by_position"] for found in texts if "by_position" in found.get(longest, {})]
            if by_position:
                places = sorted(by_position[0], key=int)
                left.plot([int(n) + 1 for n in places], [fmean(b[n] for b in by_position) for n in places], **look)
            entropy: dict[int, list[float]] = {}
            for found in texts:
                for length, scored in found.items():
                    heads = [h for layer in scored.get("entropy", []) for h in layer]
                    if heads:
                        entropy.setdefault(int(length), []).append(fmean(heads))
            lengths = sorted(entropy)
            right.plot(lengths, [fmean(entropy[n]) for n in lengths], marker="o", markersize=3.5, **look)
        left.set_xscale("log", base=2)
        left.axvline(settings.train_length, color="0.6", linestyle="--", linewidth=1, zorder=0)
        left.set_xlabel("position in the window + 1, in bytes")
        left.set_ylabel("bits per byte")
        length_axis(right, settings.lengths, "context in bytes", settings.train_length)
        right.plot(settings.lengths, [math.log(n) for n in settings.lengths], color="0.6", linestyle=":")
        end = max(settings.lengths)
        right.text(end, math.log(end), "attention to all alike  ", ha="right", va="bottom", fontsize=8, color="0.45")
        right.set_ylabel("entropy of attention in nats, mean of heads")


def report(path: Path, runs: Runs, settings: Settings, tasks_shown: Sequence[str], note: str) -> list[Path]:
    """Writes the pictures beside the JSON at `path`; -> what there is now. ImportError: no matplotlib."""
    pictures = {
        kind: path.with_name(f"{path.stem}-{kind}.png") for kind in ("perplexity", "decay", "positions", *tasks_shown)
    }
    perplexity_picture(pictures["perplexity"], runs, settings, note)
    decay_picture(pictures["decay"], runs, settings, note)
    position_picture(pictures["positions"], runs, settings, note)
    for task in tasks_shown:
        retrieval_picture(pictures[task], runs, settings, task, note)
    return [picture for picture in pictures.values() if picture.exists()]
