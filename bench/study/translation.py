"""Translate short, then long: an encoder-decoder with each position encoding, English to German.

Small transformers (torch's own layers through logpe.replace_attention) that differ in nothing but the position encoding
(same weights to start from, same batches, same dropout) learn from the message catalogues of programs, from texts of
one line or a few, none longer than --limit tokens on either side. Then they translate held-out messages as short as
those, longer messages, and texts of so many lines that no training example was as long.

    apt-get download libreoffice-l10n-de && dpkg -x libreoffice-l10n-de_*.deb data/libreoffice
    python -m pip install --no-deps --target data/django Django==5.2.19
    python -m bench translation --data data/libreoffice data/django

--data takes any folders with catalogues, .mo or .po, in a folder named `de` or named `de` themselves.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

try:
    import babel  # noqa: F401, bench.study.corpus reads catalogues with it
    import sacrebleu
    import tokenizers
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed: python -m pip install -c constraints.txt -e '.[bench]'") from None

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import command
from bench.command import at_least, count, share
from bench.plots import curve, panels, style
from bench.study import corpus, runner, tables
from bench.study.encoders import BEGIN, END, NEWLINE, PAD, Shape, Translator, translator_encoding
from bench.study.model import ENCODINGS, OPTIONS, autocast
from bench.study.runner import Advance
from bench.study.tables import Runs
from bench.study.vocabulary import Vocabulary

NAMES = [name for name, e in ENCODINGS.items() if not (e.yarn or e.qk_norm)]
DEFAULT = ["sinusoid", "rope", "log-bias", "log-rotary-bias", "log-bias-rope"]
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        encodings=DEFAULT, seeds=[0, 1], limit=16, steps=1200, batch=32,
        vocabulary=2000, dim=128, layers=2, heads=4, dropout=0.1, learning_rate=3e-3, tested=96,
    ),
    "cuda": dict(
        encodings=DEFAULT, seeds=[0, 1, 2], limit=24, steps=3000, batch=256,
        vocabulary=4000, dim=256, layers=4, heads=4, dropout=0.3, learning_rate=1e-3, tested=512,
    ),
}  # fmt: skip

Tokens = tuple[list[int], list[int]]  # of both sides; NEWLINE between lines, and neither BEGIN nor END
MOST_LINES = 4  # in training
TRIES = 12  # pairs drawn to fill the lines of an example; those that are too long for it are skipped
POOL = 8  # batches
REACH = (1, 2, 4)  # tests go to so many times the limit ...
LINES = (2, 4, 8)  # ... and to so many lines
LABEL_SMOOTHING = 0.1
KEPT_EXAMPLES = 4
JOB = "translation"

# --- what is trained on, and what is tested ---------------------------------------------------------------------------


def join(pairs: Sequence[Tokens]) -> Tokens:
    """Return pairs as the lines of one text."""
    sides = [list(pairs[0][0]), list(pairs[0][1])]
    for pair in pairs[1:]:
        for side, more in zip(sides, pair, strict=True):
            side += [NEWLINE, *more]
    return sides[0], sides[1]


def pad(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return int64 (len(texts), longest), filled up with PAD at the end."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts], device=device)


class Examples:
    """What models train on: half single pairs, half texts of 2 to MOST_LINES lines within the limit.

    POOL batches are drawn together, sorted by length and cut: texts of one length leave little padding.
    """

    def __init__(self, pairs: Sequence[Tokens], limit: int, batch: int) -> None:
        self.pairs = [pair for pair in pairs if max(map(len, pair)) <= limit]
        if not self.pairs:
            raise ValueError(f"no pair to train on has at most {limit} tokens (--limit) on either side")
        self.limit, self.batch = limit, batch
        self.pool = functools.lru_cache(maxsize=1)(self._pool)

    def __call__(self, seed: int, step: int) -> list[Tokens]:
        """Return the batch of a step."""
        turn, part = divmod(step, POOL)
        return self.pool(seed, turn)[part]

    def _pool(self, seed: int, turn: int) -> list[list[Tokens]]:
        """Draw POOL batches."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
        count = POOL * self.batch
        lines = torch.randint(2, MOST_LINES + 1, (count,), generator=generator)
        lines[: count // 2] = 1
        draws = torch.randint(len(self.pairs), (count, TRIES), generator=generator)
        pool = [self.draw(*drawn) for drawn in zip(lines.tolist(), draws.tolist(), strict=True)]
        pool.sort(key=lambda text: sum(map(len, text)))
        order = torch.randperm(POOL, generator=generator).tolist()
        return [pool[part * self.batch : (part + 1) * self.batch] for part in order]

    def draw(self, lines: int, numbers: list[int]) -> Tokens:
        """Return a text of so many of these pairs, or of fewer where the limit leaves no room."""
        chosen = [self.pairs[numbers[0]]]
        for pair in (self.pairs[i] for i in numbers[1:]):
            if len(chosen) < lines and max(map(len, join([*chosen, pair]))) <= self.limit:
                chosen.append(pair)
        return join(chosen)


def make_tests(pairs: Sequence[Tokens], limit: int, count: int) -> dict[str, list[Tokens]]:
    """Return held-out texts by name, at most ``count`` each; whatever is beyond the limit is so on both sides.

    Pairs by length, 2 lines within the limit, and so many lines that they are beyond it. Raises ValueError where there
    are too few pairs.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
    tests: dict[str, list[Tokens]] = {}
    low = 0
    for factor in REACH:
        name = f"1 line, {low + 1}-{factor * limit}"
        tests[name] = [pair for pair in pairs if low < min(map(len, pair)) and max(map(len, pair)) <= factor * limit]
        low = factor * limit
    short = tests[f"1 line, 1-{limit}"]
    wanted: list[tuple[str, int, Callable[[Tokens], bool]]] = [
        (f"2 lines, 1-{limit}", 2, lambda text: max(map(len, text)) <= limit)
    ]
    wanted += [(f"{n} lines, {limit + 1}+", n, lambda text: min(map(len, text)) > limit) for n in LINES]
    for name, lines, fits in wanted:
        if len(short) < lines:
            raise ValueError(f"{len(short)} held-out pairs have at most {limit} tokens (--limit); {lines} are needed")
        draws = (torch.randperm(len(short), generator=generator)[:lines].tolist() for _ in range(100 * count))
        tests[name] = [text for draw in draws if fits(text := join([short[i] for i in draw]))][:count]
    return {name: texts[:count] for name, texts in tests.items() if texts}


# --- training and scoring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings(runner.Settings):
    """All that the numbers of this study depend on."""

    pairs: str  # sha256
    vocabulary: str  # sha256
    shape: Shape
    limit: int  # tokens of a side in training
    tested: int  # texts of a test


def shifted(target: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the decoder reads, and what it is to say after each token; int64 (B, N) both."""
    return pad([[BEGIN, *text] for text in target], device), pad([[*text, END] for text in target], device)


def line_loss(model: Translator, examples: Examples, seed: int) -> runner.BatchLoss:
    """Return the loss of translating, with smoothed labels, for runner.fit."""
    device = next(model.parameters()).device

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], dict[str, float]]]:
        torch.manual_seed(1_000_003 * seed + step)  # of the dropout
        source, target = zip(*examples(seed, step), strict=True)
        said, wanted = shifted(target, device)
        with autocast(device):
            logits = model(pad(source, device), said)
        options: dict[str, Any] = dict(ignore_index=PAD, label_smoothing=LABEL_SMOOTHING)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), **options)
        return loss, lambda: {"loss_at_the_end": loss.item()}

    return batch_loss


def scoring_work(texts: Sequence[Tokens]) -> int:
    """Return the work of some texts; a token said costs as much as several read."""
    return sum(len(source) + 8 * len(target) for source, target in texts)


def measures(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return chrF and BLEU of the whole test, the ratio of lengths in words, and how often the lines are as many.

    For sacrebleu a text is one line.
    """
    said, wanted = ([text.replace("\n", " ") for text in side] for side in (translations, references))
    bleu = sacrebleu.corpus_bleu(said, [wanted])
    lines = [t.count("\n") == r.count("\n") for t, r in zip(translations, references, strict=True)]
    return {
        "chrf": round(sacrebleu.corpus_chrf(said, [wanted]).score, 3),
        "bleu": round(bleu.score, 3),
        "length_ratio": round(bleu.sys_len / bleu.ref_len, 4),
        "lines_right": round(fmean(lines), 4),
    }


@torch.inference_mode()
def score(model: Translator, vocabulary: Vocabulary, texts: Sequence[Tokens], advance: Advance) -> dict[str, Any]:
    """Score greedy translations of one test; and, with the reference given token by token, its bits per character."""
    device = next(model.parameters()).device
    together = 64 if device.type == "cpu" else 512
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    said: dict[int, list[int]] = {}
    nats = 0.0
    for first in range(0, len(order), together):
        numbers = order[first : first + together]
        source, target = zip(*(texts[i] for i in numbers), strict=True)
        most = torch.tensor([3 * len(text) // 2 + 16 for text in source], device=device)
        with autocast(device):
            said |= dict(zip(numbers, model.translate(pad(source, device), most), strict=True))
            given, wanted = shifted(target, device)
            logits = model(pad(source, device), given)
        nats += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum").item()
        advance(scoring_work([texts[i] for i in numbers]))
    translations = [vocabulary.decode(said[i]) for i in range(len(texts))]
    sources, references = ([vocabulary.decode(side) for side in sides] for sides in zip(*texts, strict=True))
    shown = zip(sources, references, translations, strict=True)
    return {
        **measures(translations, references),
        "cut_off": round(fmean(text[-1:] != [END] for text in said.values()), 4),
        "bits_per_character": round(nats / math.log(2) / sum(map(len, references)), 5),
        "examples": [list(texts) for _, texts in zip(range(KEPT_EXAMPLES), shown, strict=False)],
    }


# --- tables and pictures ----------------------------------------------------------------------------------------------

MEASURES = {  # in the JSON: form, name
    "chrf": (".1f", "chrF"),
    "bleu": (".1f", "BLEU"),
    "length_ratio": (".2f", "length ratio"),
    "lines_right": (".2f", "lines right"),
    "bits_per_character": (".3f", "bits per character"),
}
LEGEND = """Trained on texts of at most {limit} tokens a side. Spread: standard deviation over seeds; of the
differences, from the lowest to the highest. length ratio: words said over those of the reference; lines right: share
of texts with as many lines as the reference."""


def values(runs: Runs, name: str, test: str, measure: str) -> dict[str, float]:
    """Return a measure by seed, where it is measured."""
    tests = {seed: jobs[JOB]["lengths"] for seed, jobs in runs.get(name, {}).items()}
    return {seed: scores[test][measure] for seed, scores in tests.items() if test in scores}


def measured(runs: Runs, tests: Sequence[str]) -> list[str]:
    """Return the encodings of which there is at least one score."""
    return [name for name in runs if any(values(runs, name, test, "chrf") for test in tests)]


def table(runs: Runs, tests: Sequence[str], baseline: str) -> str:
    """Return every measure of every encoding, mean and spread over seeds; and chrF minus the baseline's, by seed."""
    lines = [["measure", "encoding", *tests]]
    for measure, (form, label) in MEASURES.items():
        for name in measured(runs, tests):
            columns = [list(values(runs, name, test, measure).values()) for test in tests]
            lines.append([label, name, *(tables.cell(some, form) for some in columns)])
    for name in measured(runs, tests):
        cells = []
        for test in tests:
            here, there = (values(runs, n, test, "chrf") for n in (name, baseline))
            differences = [here[seed] - there[seed] for seed in here if seed in there]
            between = f" ({min(differences):+.1f} to {max(differences):+.1f})" if len(differences) > 1 else ""
            cells.append(tables.cell(differences, "+.1f", spread=False) + between)
        if name != baseline:
            lines.append([f"chrF minus {baseline}", name, *cells])
    return tables.markdown(lines)


def picture(path: Path, runs: Runs, tests: Sequence[str], note: str) -> None:
    """Draw chrF of single lines and of many; the length of translations of many, and bits per character of references.

    The latter do not depend on where a translation stops. Bands: the seeds.
    """
    single, many = ([test for test in tests if test.startswith("1 line,") is one] for one in (True, False))
    drawn = [
        (single, "chrf", "chrF"),
        (many, "chrf", "chrF"),
        (many, "length_ratio", "length against the reference's"),
        (many, "bits_per_character", "bits per character, reference given"),
    ]
    names = measured(runs, tests)
    with panels(path, len(drawn), note, columns=2, size=(4.8, 3.6), legend="right center") as axes:
        for axis, (shown, measure, label) in zip(axes, drawn, strict=True):
            for name in names:
                points = {i: list(values(runs, name, test, measure).values()) for i, test in enumerate(shown)}
                curve(axis, {i: values for i, values in points.items() if values}, **style(name, names))
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1, zorder=0)  # the training length
            axis.set_xticks(range(len(shown)), [test.replace(", ", "\n") for test in shown])
            axis.set_xlabel("lines, and tokens of a text")
            axis.set_ylabel(label)
            if measure != "bits_per_character":
                axis.set_ylim(bottom=0)
        axes[2].axhline(1, color="0.6", linestyle=":", linewidth=1, zorder=0)


def examples(runs: Runs, tests: Sequence[str]) -> str:
    """Return a few translations of every test, by the first seed of each encoding."""
    lines = []
    for test in tests:
        first = {name: next(iter(seeds.values()))[JOB]["lengths"] for name, seeds in runs.items()}
        shown = {name: scores[test]["examples"] for name, scores in first.items() if test in scores}
        for i, (source, reference, _) in enumerate(next(iter(shown.values()), [])[:2]):
            lines.append(f"\n{test}")
            said = {"English": source, "reference": reference}
            said |= {name: translations[i][2] for name, translations in shown.items()}
            lines += [f"  {who:<16}{text.replace(chr(10), ' | ')}" for who, text in said.items()]
    return "\n".join(lines)


def caption(runs: Runs, settings: Settings) -> str:
    """Return what the picture shows, in two lines."""
    seeds = sorted({seed for by_seed in runs.values() for seed, jobs in by_seed.items() if jobs[JOB]["lengths"]})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {', '.join(seeds)} (bands: all of them)"
    return (
        f"Encoder-decoders, {tables.parameters(runs)}, {settings.steps:,} steps of {settings.batch} texts of at most "
        f"{settings.limit} tokens, 1 to {MOST_LINES} lines.\nEnglish to German, held-out messages of programs, greedy, "
        f"{which}. Right of the dashed line: longer than any text in training."
    )


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser; what is left out is taken from BUDGETS, by the device."""
    epilog = f"encodings: {', '.join(NAMES)}\noptions of one, as in log-bias+gain: +{', +'.join(OPTIONS)}"
    p, add = runner.new_parser("translation", __doc__, epilog, BUDGETS)
    p.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[Path("data")],
        metavar="DIR",
        help="folders with message catalogues (default: data)",
    )
    add("limit", count, "tokens of a side in training, at most")
    add("batch", count, "examples per step")
    add("tested", count, "texts of a test, at most")
    add("vocabulary", at_least(512), "tokens, 256 of them bytes")
    add("dropout", share, "dropout of residual branches", metavar="P")
    add("baseline", str, "what paired differences are taken from", "rope", metavar="NAME")
    return p


@command.program("bench translation")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return measure(runner.parse(parser(), arguments, BUDGETS))


def measure(args: argparse.Namespace) -> int:
    """Run with these options; return the exit status."""
    if args.dim % args.heads:
        raise ValueError(f"--dim must be a multiple of --heads, {args.heads}, got {args.dim}")
    encodings = {name: translator_encoding(name, args.limit) for name in args.encodings}
    pairs = corpus.load_pairs(args.data)
    vocabulary = Vocabulary((text for pair in pairs.train for text in pair), args.vocabulary)
    train_tokens, test_tokens = (
        [(vocabulary.encode(source), vocabulary.encode(target)) for source, target in side]
        for side in (pairs.train, pairs.test)
    )
    drawn = Examples(train_tokens, args.limit, args.batch)
    tests = make_tests(test_tokens, args.limit, args.tested)
    settings = Settings(
        **runner.machine(args, sacrebleu, tokenizers),
        **{name: getattr(args, name) for name in ("limit", "steps", "batch", "tested", "learning_rate")},
        pairs=pairs.sha256,
        vocabulary=vocabulary.sha256,
        shape=Shape(vocabulary.size, args.dim, args.layers, args.heads, args.dropout),
    )
    stage = runner.Stage(
        settings,
        build=lambda name, seed: Translator(settings.shape, encodings[name], seed).to(args.device),
        loss=lambda model, seed: line_loss(model, drawn, seed),
        score=lambda model, test, seed, advance: score(model, vocabulary, tests[test], advance),
        step_work=3 * 2 * settings.limit * settings.batch,  # in tokens read; backward costs twice the forward pass
        tests={name: scoring_work(texts) for name, texts in tests.items()},
    )
    sizes = {}
    for name, texts in tests.items():
        means = [round(fmean(map(len, side)), 1) for side in zip(*texts, strict=True)]
        sizes[name] = {"texts": len(texts), "mean_tokens": means}

    def report(runs: Runs) -> str:
        legend = LEGEND.format(limit=settings.limit)
        return f"{examples(runs, list(tests))}\n\n{table(runs, list(tests), args.baseline)}\n{legend}"

    def draw(path: Path, runs: Runs) -> None:
        picture(path, runs, list(tests), caption(runs, settings))

    about = {"data": {**pairs.describe(), "short_train_pairs": len(drawn.pairs)}, "tests": sizes}
    plan = [({JOB: stage}, args.encodings)]
    study = runner.Study(f"translation-{args.device.type}", settings, about, plan, report, draw)
    return runner.run("translation", args, [study], measure)
