"""What the figures of all benches share: colours and labels, panels that are saved whole, a log axis of lengths.

matplotlib is imported where a figure is drawn: ImportError where it is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers too; a method has one colour in every picture
    "rope": "#D55E00",
    "rope-yarn": "#8A3324",
    "alibi": "#0072B2",
    "kerple": "#8FD3B6",
    "log-bias": "#009E73",
    "log-bias-rope": "#004D38",
    "none": "#7F7F7F",
    "sinusoid": "#E69F00",
    "log-sinusoid": "#B8A800",
    "log-invariant": "#56B4E9",
    "log-rotary": "#CC79A7",
    "log-rotary-bias": "#000000",
    # Peers in speed, never in one picture with the encodings whose colours they take.
    "log-bias-frozen": "#009E73",
    "flex": "#CC79A7",
    "flex-learned": "#CC79A7",
    "sdpa": "#0072B2",
    "sdpa-flash": "#0072B2",
    "sdpa-cudnn": "#D55E00",
    "sdpa-dense": "#E69F00",
    "eager": "#B8A800",
}
LABELS = {"rope": "RoPE", "rope-yarn": "RoPE, YaRN", "alibi": "ALiBi", "kerple": "KERPLE", "none": "no encoding"}
DASHES = ["--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]


def style(name: str, shown: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keywords of ``axis.plot``: the colour of what ``name`` is a variant of, dashes for which variant.

    Args:
        name: one of COLOURS, or a variant of one, such as ``log-bias+gain``.
        shown: the other names in the figure, whose variants have other dashes.
    """
    base, plus, options = name.partition("+")
    variants = sorted({n for n in (*shown, name) if n.partition("+")[0] == base and n != base})
    return {
        "color": COLOURS[base],
        "linestyle": DASHES[variants.index(name) % len(DASHES)] if plus else "-",
        "linewidth": 1.2 if plus else 1.8,
        "label": LABELS.get(base, base) + plus + options,
    }


@contextmanager
def panels(
    path: Path,
    count: int,
    note: str = "",
    *,
    columns: int = 4,
    size: tuple[float, float] = (4.4, 3.7),
    legend: str | None = None,
) -> Iterator[list[Any]]:
    """Yield ``count`` axes of a new figure, which becomes the PNG file ``path`` at the end: all of it or nothing.

    Args:
        note: small print below the axes.
        columns: the most axes in a row.
        size: width and height of one of them, in inches.
        legend: where one legend of all axes stands beside them: "right center", "upper center", "lower center".
    """
    import matplotlib
    from matplotlib.figure import Figure

    from bench.common import write_whole

    columns = min(columns, count)
    rows = -(-count // columns)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((size[0] * columns + 0.4, size[1] * rows + 0.3), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes:
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
        for axis in axes[count:]:
            axis.set_axis_off()
        yield axes[:count]
        if legend:
            entries: dict[str, Any] = {}
            for axis in axes:
                handles, labels = axis.get_legend_handles_labels()
                entries |= dict(zip(labels, handles, strict=True))
            across = 1 if legend.startswith("right") else min(6, len(entries))
            place: Any = f"outside {legend}"
            figure.legend(list(entries.values()), list(entries), loc=place, ncols=across, frameon=False, fontsize=8)
        figure.supxlabel(note, fontsize=7.5, color="0.35")
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def length_axis(axis: Any, lengths: Sequence[int], label: str, trained: int | None = None, short: bool = False) -> None:
    """Make the x axis one of lengths, by powers of two, and mark the length of training with a dashed line.

    Args:
        lengths: the ticks.
        trained: the length of training, where there is one.
        short: write 4k for 4096.
    """
    if trained is not None:
        axis.axvline(trained, color="0.6", linestyle="--", linewidth=1, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if short and n % 1024 == 0 else f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel(label)


def curve(axis: Any, points: Mapping[float, Sequence[float]], **look: Any) -> None:
    """Draw the mean of the values at each x, such as those of the seeds, and a band from the lowest to the highest."""
    axis.plot(list(points), [fmean(values) for values in points.values()], **dict(marker="o", markersize=3.5) | look)
    low, high = ([end(values) for values in points.values()] for end in (min, max))
    axis.fill_between(list(points), low, high, color=look["color"], alpha=0.12, linewidth=0)
