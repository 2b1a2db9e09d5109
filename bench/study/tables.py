"""Tables of the studies, and the statistics in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from bench.study.model import ENCODINGS

Runs = dict[str, Any]  # runs[encoding][seed][job]: a record with `train` and `lengths`


def records(runs: Runs) -> Iterator[dict[str, Any]]:
    """Yield the record of every job."""
    return (record for seeds in runs.values() for jobs in seeds.values() for record in jobs.values())


def seconds(runs: Runs) -> float:
    """Return the seconds spent on all results. A model that stands in several records was trained once."""
    trained = [{k: v for k, v in record["train"].items() if k not in ("commit", "threads")} for record in records(runs)]
    models = {json.dumps(train, sort_keys=True): train.get("seconds", 0.0) for train in trained}
    tests = (test.get("seconds", 0.0) for record in records(runs) for test in record["lengths"].values())
    return sum(models.values()) + sum(tests)


def parameters(runs: Runs) -> str:
    """Return the size of the largest model, such as "0.66 M parameters"."""
    return f"{max(record['train'].get('parameters', 0) for record in records(runs)) / 1e6:.2f} M parameters"


def rows(runs: Runs) -> list[str]:
    """Return the encodings in the order of bench.study.model, each followed by its variants."""
    order = {name: index for index, name in enumerate(ENCODINGS)}
    return sorted(runs, key=lambda name: (order.get(name.partition("+")[0], len(order)), name))


def seeds_of(counts: set[int]) -> str:
    """Return how many values a line's means are made of: "3", or "1-3" while the study is under way."""
    counts = counts - {0}
    return "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0"


def half_width(values: Sequence[float]) -> float:
    """Return half the 95% confidence interval of the mean, by Student's t; nan for a single value."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], form: str, spread: bool = True) -> str:
    """Return the mean ± standard deviation of the values; "-" where there are none."""
    if not values:
        return "-"
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.strip('+')}}" if spread and len(values) > 1 else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first line is its head, aligned for the terminal too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(entry.ljust(w) for entry, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
