"""Text that models write far past the length they were trained at, and where it falls apart.

Small byte-level transformers that differ in nothing but the position encoding (same weights to start from, same
batches) are trained on short windows of text. Each then continues prompts of held-out text, byte after byte with a
cache of keys and values, to many times that length; in two ways: every layer sees all that was written (`all`), or
as many bytes as there were in training (`window`, what any encoding can fall back on). What they wrote is scored by
position:

    bits        per byte under a judge, a model of the same kind that was trained on other documents, for longer, on
                longer windows; it reads the text in windows no longer than those, so it never extrapolates itself
    repetition  share of positions whose last 8 bytes stood already among the 512 bytes before
    drift       Kullback-Leibler divergence of the frequencies of bytes from those of the text trained on, in bits
    printable   share of printable ASCII and white space

all beside real held-out text, among it the true continuations of the same prompts, which is what draws at temperature 1
from a perfect model would score. Text that decays into noise has more bits than real text; text that goes round in
circles has fewer, and repeats itself.

    python -m bench generation                 the standard library; nothing to download
    python -m bench generation --corpus linux  the kernel's source; see below for how to get it

Every finished measurement is on disk at once: Ctrl-C or --minutes loses nothing, and the same command goes on from
there.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor

import logpe
from bench import command
from bench.command import at_least, count, positive
from bench.common import device_name
from bench.plots import curve, length_axis, panels, style
from bench.study import corpus, findings, training
from bench.study import protocol as study
from bench.study.model import Attention, Model, Shape, encoding
from bench.study.training import Advance, Results, Stage, fit, read_checkpoint, save_checkpoint
from logpe.lm.text import TEST_SHARE, Document, Sampler, document_windows

FORMAT = 1  # raise it when a change here makes earlier results incomparable
REAL = "real"  # stands among the encodings: the text that the judge is tested on
READINGS = {"all": "every layer sees all that was written", "window": "every layer sees the last {} bytes"}
MEASURES = {"bits": "bits per byte under the judge", "repetition": "repetition rate", "drift": "drift of bytes in bits"}
GRAM, HISTORY = 8, 512  # bytes of what counts as repeated, and how far back it is looked for

# judge_batch: windows of a step.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        encodings=["rope", "log-bias", "log-bias-rope", "alibi", "sinusoid"], train_length=128, seeds=[0, 1], steps=400,
        batch_bytes=2048, dim=128, layers=3, heads=4, learning_rate=5e-3, samples=8, real=32,
        judge_length=1024, judge_steps=400, judge_batch=4,
    ),
    "cuda": dict(
        encodings=["none", "sinusoid", "rope", "rope-yarn", "alibi", "log-bias", "log-bias-rope",
                   "log-invariant+rotary=0.5", "log-rotary-bias"], train_length=512, seeds=[0, 1, 2], steps=3000,
        batch_bytes=32768, dim=384, layers=8, heads=6, learning_rate=1e-3, samples=32, real=32,
        judge_length=2048, judge_steps=4000, judge_batch=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(training.Settings):
    """Of this comparison."""

    corpus: str  # sha256
    device: str
    versions: dict[str, str]
    shape: Shape
    train_length: int  # bytes
    length: int  # bytes of a text, the prompt included
    prompt: int
    steps: int
    batch: int
    samples: int  # texts of each seed
    real: int  # texts of each seed that the judge reads for comparison; the first `samples` of them give the prompts
    temperature: float
    top_p: float
    judge: str  # its encoding
    judge_length: int
    judge_steps: int
    judge_batch: int
    learning_rate: float
    weight_decay: float = 0.1
    format: int = FORMAT

    @property
    def piece(self) -> int:
        """Bytes that the judge scores at once."""
        return self.judge_length // 4

    @property
    def context(self) -> int:
        """Bytes that it reads before them, however early they stand: a text begins with what led to its prompt."""
        return self.judge_length - self.piece

    @property
    def edges(self) -> list[int]:
        """Of bins of positions: from the prompt to the end, between them the training length by powers of two."""
        powers = (round(self.train_length * 2.0**k) for k in range(-20, 21))
        return [self.prompt, *sorted({n for n in powers if self.prompt < n < self.length}), self.length]


# --- text -------------------------------------------------------------------------------------------------------------


def halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The writers' and the judge's, by a hash of the path."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[document.hash // TEST_SHARE % 2].append(document)
    return sides


class Texts:
    """What the writers and the judge train on, and held-out text for prompts.

    Raises ValueError where there is too little of it.
    """

    def __init__(self, text: corpus.Corpus, settings: Settings, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.written, self.judged = halves(text.train)
        self.sampler = Sampler(self.written, settings.train_length + 1)
        self.judge_sampler = Sampler(self.judged, settings.judge_length + 1)
        self.frequencies = torch.bincount(self.sampler.text, minlength=256).double() + 1
        wanted = settings.real * (max(seeds) + 1)
        size = settings.context - settings.prompt + settings.length
        self.windows = document_windows(text.test, size, wanted)
        if len(self.windows) < wanted:
            raise ValueError(
                f"held-out text has {len(self.windows)} windows of {size:,} bytes, and seeds up to {max(seeds)} of "
                f"{settings.real} texts take {wanted}: fewer --real, or a larger --corpus"
            )

    def describe(self) -> dict[str, Any]:
        """Sizes of the halves, and the number of windows, for the record."""
        sides = {"writers": self.written, "judge": self.judged}
        sizes = {side: {"documents": len(d), "bytes": sum(len(x.text) for x in d)} for side, d in sides.items()}
        return {**sizes, "windows": len(self.windows)}

    def real(self, seed: int) -> Tensor:
        """int64 (real, context - prompt + length): what leads to a prompt, the prompt, and how it really goes on."""
        return self.windows[seed * self.settings.real :][: self.settings.real]


# --- writing ----------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each distribution, from the fewest likeliest ones whose probability reaches ``top_p``.

    Args:
        logits: (B, V), divided by ``temperature``.
        chance: (B, 1), uniform from 0 to 1: where in the distribution, the likeliest token first, the draw falls.

    Returns:
        int64 (B, 1).
    """
    p, tokens = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    total = p.cumsum(-1)
    mass = (p * (total - p < top_p)).sum(-1, keepdim=True)
    place = torch.searchsorted(total, chance * mass, right=True)
    return tokens.gather(1, place.clamp(max=logits.shape[-1] - 1))


@torch.inference_mode()
def write(model: Model, prompts: Tensor, settings: Settings, window: int | None, seed: int, advance: Advance) -> Tensor:
    """The prompts, int64 (B, prompt), and what the model makes of them, (B, length), with a cache.

    Draws are the same for every encoding. ``advance`` is told after each byte.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(settings.length, len(prompts), 1, generator=generator, dtype=torch.float64).to(device)
    text = torch.empty(len(prompts), settings.length, dtype=torch.int64, device=device)
    text[:, : settings.prompt] = prompts.to(device)
    half = device.type == "cuda"
    options = dict(window=window, dtype=torch.bfloat16 if half else torch.float32)
    model.eval()
    with model.decoding(len(prompts), settings.length, **options), torch.autocast("cuda", torch.bfloat16, enabled=half):
        read = 0
        for n in range(settings.prompt, settings.length):
            logits = model(text[:, read:n])[:, -1].float()
            text[:, n : n + 1] = draw(logits, chances[n], settings.temperature, settings.top_p)
            read = n
            advance(1)
    return text.cpu()


# --- scoring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def judged_bits(judge: Model, texts: Tensor, settings: Settings) -> Tensor:
    """(B, N - context), of texts int64 (B, N): bits of each byte, after `context` to `judge_length` bytes before it."""
    device = next(judge.parameters()).device
    judge.eval()
    found = []
    for start in range(settings.context, texts.shape[1], settings.piece):
        part = texts[:, start - settings.context : start + settings.piece].to(device)
        target = part[:, settings.context :]
        logits = study.predict(judge, part, target.shape[1])
        found.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu() / math.log(2))
    return torch.cat(found, dim=1)


def repeated(texts: Tensor, n: int = GRAM, history: int = HISTORY) -> Tensor:
    """Bool, as texts (B, N) of bytes: do the n <= 8 bytes that end here also end at one of `history` places before?"""
    grams = (texts.unfold(1, n, 1) << 8 * torch.arange(n)).sum(-1)  # a number for each
    grams, place = grams.sort(dim=1, stable=True)
    again = (grams.diff(dim=1) == 0) & (place.diff(dim=1) <= history)
    found = torch.zeros_like(texts, dtype=torch.bool)
    return found.scatter(1, place[:, 1:] + n - 1, again)


def drift(part: Tensor, frequencies: Tensor) -> float:
    """Kullback-Leibler divergence, in bits, of the bytes in `part` from `frequencies` (256,), none of them 0."""
    p = torch.bincount(part.flatten(), minlength=256).double()
    p, q = p / p.sum(), frequencies / frequencies.sum()
    return (torch.special.entr(p).neg() - p * q.log()).sum().item() / math.log(2)


def printable(part: Tensor) -> float:
    """Share of printable ASCII, tab, line feed and carriage return."""
    shown = (part >= 32) & (part < 127) | torch.isin(part, torch.tensor([9, 10, 13]))
    return shown.double().mean().item()


def scored(judge: Model, texts: Tensor, frequencies: Tensor, settings: Settings) -> dict[str, Any]:
    """What to record of texts int64 (B, context - prompt + length): each measure by bin of positions."""
    bits, again = judged_bits(judge, texts, settings), repeated(texts)[:, settings.context :]
    written = texts[:, settings.context :]
    cuts = [edge - settings.prompt for edge in settings.edges[1:-1]]
    bits_of, again_of, parts = (x.tensor_split(cuts, dim=1) for x in (bits, again, written))
    return {
        "bits": [round(x.mean().item(), 4) for x in bits_of],
        "repetition": [round(x.double().mean().item(), 4) for x in again_of],
        # Of as many texts at once as a model writes: the fewer bytes, the farther from any frequencies.
        "drift": [round(fmean(drift(some, frequencies) for some in x.split(settings.samples)), 4) for x in parts],
        "printable": [round(printable(x), 4) for x in parts],
        "bits_of_each_text": [[round(b, 3) for b in x.mean(dim=1).tolist()] for x in bits_of],
        "end_of_the_first": bytes(texts[0, -160:].tolist()).decode("ascii", "backslashreplace"),
    }


# --- stages -----------------------------------------------------------------------------------------------------------


def train(
    model: Model,
    sampler: Sampler,
    batch: int,
    steps: int,
    seed: int,
    settings: Settings,
    checkpoint: Path,
    advance: Advance,
) -> dict[str, Any]:
    """Next-byte prediction, as bench.study.training.fit; -> what to record."""
    device = next(model.parameters()).device
    generator = torch.Generator()

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], list[float]]]:
        tokens = sampler(batch, generator.manual_seed(1_000_003 * seed + step)).to(device)
        loss = F.cross_entropy(study.predict(model, tokens, None).flatten(0, 1), tokens[:, 1:].flatten())
        return loss, lambda: [loss.item()]

    seconds, kept = fit(model, batch_loss, steps, settings.learning_rate, settings.weight_decay, checkpoint, advance)
    bits = [loss / math.log(2) for (loss,) in kept]
    return {
        "steps": steps,
        "bits_at_the_end": round(fmean(bits), 4),  # mean of the last tenth
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": study.learned_positions(model),
        "seconds": seconds,
    }


def trained_judge(
    texts: Texts, settings: Settings, device: torch.device, keep: Path, checkpoint: Path, advance: Advance
) -> tuple[Model, dict[str, Any]]:
    """The judge, trained once and then kept in the file `keep`; and what to record of its training."""
    model = new_judge(settings, device)
    if state := read_checkpoint(keep):
        model.load_state_dict(state["model"])
        return model, state["found"]
    batch, steps = settings.judge_batch, settings.judge_steps
    found = train(model, texts.judge_sampler, batch, steps, 0, settings, checkpoint, advance)
    save_checkpoint(keep, {"model": model.state_dict(), "found": found})
    return model, found


def judge_stage(texts: Texts, settings: Settings, device: torch.device, keep: Path) -> Stage:
    """The judge reads real text: that of each seed's prompts."""

    def trained(model: Model, seed: int, checkpoint: Path, advance: Advance) -> dict[str, Any]:
        kept = keep.exists()
        judge, found = trained_judge(texts, settings, device, keep, checkpoint, lambda n: advance(n * share))
        model.load_state_dict(judge.state_dict())
        advance(work * kept)
        return found

    def score(model: Model, test: str, seed: int, advance: Advance) -> dict[str, Any]:
        found = scored(model, texts.real(seed), texts.frequencies, settings)
        advance(reading_work(settings, settings.real))
        return found

    share = 3 * study.work(settings.judge_batch, settings.judge_length)
    work = settings.judge_steps * share
    return Stage(
        build=lambda name, seed: new_judge(settings, device),
        train=trained,
        score=score,
        training_work=work,
        tests={"all": reading_work(settings, settings.real)},
    )


def new_judge(settings: Settings, device: torch.device) -> Model:
    """Not trained yet."""
    return Model(settings.shape, encoding(settings.judge, settings.judge_length), 0).to(device)


def reading_work(settings: Settings, texts: int) -> int:
    """Of the judge."""
    pieces = -(-(settings.length - settings.prompt) // settings.piece)
    return study.work(texts * pieces, settings.judge_length)


def writer_stage(texts: Texts, settings: Settings, device: torch.device, keep: Path) -> Stage:
    """A model, trained short, writes on from prompts, in each way of READINGS; the judge in `keep` reads it."""

    models: list[Model] = []

    def judge(advance: Advance) -> Model:
        if not models:  # trained again if its file is gone
            again = keep.with_name(f"{keep.stem}-again.pt")
            models.append(trained_judge(texts, settings, device, keep, again, lambda n: advance(0))[0])
            again.unlink(missing_ok=True)
        return models[0]

    def trained(model: Model, seed: int, checkpoint: Path, advance: Advance) -> dict[str, Any]:
        batch, steps = settings.batch, settings.steps
        return train(model, texts.sampler, batch, steps, seed, settings, checkpoint, lambda n: advance(n * share))

    def score(model: Model, test: str, seed: int, advance: Advance) -> dict[str, Any]:
        window = None if test == "all" else settings.train_length - 1  # bytes before the one that looks
        before, prompts = texts.real(seed)[: settings.samples, : settings.context].split([lead, settings.prompt], dim=1)
        text = write(model, prompts, settings, window, seed, lambda n: advance(n * byte))
        found = scored(judge(advance), torch.cat([before, text], dim=1), texts.frequencies, settings)
        advance(reading_work(settings, settings.samples))
        return found

    lead = settings.context - settings.prompt
    share = 3 * study.work(settings.batch, settings.train_length)
    byte = 10 * study.work(settings.samples, settings.length) // settings.length  # one by one is that much slower
    writing = byte * (settings.length - settings.prompt)
    return Stage(
        build=lambda name, seed: Model(settings.shape, encoding(name, settings.train_length), seed).to(device),
        train=trained,
        score=score,
        training_work=settings.steps * share,
        tests=dict.fromkeys(READINGS, writing + reading_work(settings, settings.samples)),
    )


# --- tables and pictures ----------------------------------------------------------------------------------------------


def lines(runs: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """Encoding, reading, and what was scored by seed; real text first."""
    for name in [REAL, *(name for name in findings.rows(runs) if name != REAL)]:
        for reading in READINGS:
            jobs = {seed: next(iter(run.values())) for seed, run in runs.get(name, {}).items()}
            found = {seed: job["lengths"][reading] for seed, job in jobs.items() if reading in job["lengths"]}
            if found:
                yield name, reading, found


def table(runs: dict[str, Any], settings: Settings) -> str:
    """Bits by position, then what else the last bin shows, as Markdown: means, and ± standard deviation over seeds."""

    def cell(values: Sequence[float], form: str, spread: bool = True) -> str:
        shown = f" ± {stdev(values):{form}}" if spread and len(values) > 1 else ""
        return f"{fmean(values):{form}}" + shown

    bins = list(zip(settings.edges, settings.edges[1:], strict=False))
    others = ("repetition", "drift", "printable")
    found = [["text", "reads", "seeds", *(f"{a:,}-{b:,}" for a, b in bins), "minus real", *others]]
    real = next(lines(runs))[2].values()
    goal = fmean(scored["bits"][-1] for scored in real)
    for name, reading, scores in lines(runs):
        columns = list(zip(*(s["bits"] for s in scores.values()), strict=True))
        cells = [cell(column, ".3f", column is columns[-1]) for column in columns]
        over = "" if name == REAL else f"{fmean(columns[-1]) - goal:+.3f}"
        last = [cell([s[measure][-1] for s in scores.values()], ".3f") for measure in others]
        reads = "" if name == REAL else reading
        found.append([name, reads, str(len(scores)), *cells, over, *last])
    start, end = bins[-1]
    legend = f"""

Bits per byte under the judge by position in the text, which begins with a prompt of {settings.prompt} bytes; trained
at {settings.train_length:,} bytes. minus real, repetition, drift, printable: from {start:,} to {end:,}.
Mean ± standard deviation over seeds, {settings.samples} texts each, {settings.real} real ones.
"""
    change = [
        late - early
        for scored in real
        for early, late in zip(scored["bits_of_each_text"][0], scored["bits_of_each_text"][-1], strict=True)
    ]
    check = f"""The judge is sound if real text scores the same everywhere: from the first bin to the last its bits
change by {fmean(change):+.3f} ± {findings.half_width(change):.3f} (95% interval, {len(change)} texts).
"""
    notes = [f"{name}: {what.format(settings.train_length)}" for name, what in READINGS.items()]
    return findings.markdown(found) + legend + check + ". ".join(notes) + "."


def picture(path: Path, runs: dict[str, Any], settings: Settings, note: str) -> None:
    """A row for each reading: bits, repetition and drift by position. Bands: the seeds."""
    centres = [math.sqrt(a * b) for a, b in zip(settings.edges, settings.edges[1:], strict=False)]
    found = list(lines(runs))
    names = [name for name in findings.rows(runs) if name != REAL]
    places = [(reading, measure) for reading in READINGS for measure in MEASURES]
    with panels(path, len(places), note, columns=len(MEASURES), size=(4.5, 3.6), legend="right center") as axes:
        for axis, (reading, measure) in zip(axes, places, strict=True):
            for name, how, scores in found:
                if name != REAL and how != reading:
                    continue
                look = dict(color="0.15", linestyle="--", linewidth=1.8, label="real text", zorder=5)
                if name != REAL:
                    look = style(name, names)
                columns = zip(*(s[measure] for s in scores.values()), strict=True)
                curve(axis, dict(zip(centres, columns, strict=True)), **look)
            length_axis(axis, settings.edges, "position in the text, in bytes", settings.train_length)
            axis.tick_params(axis="x", labelsize=8)
            axis.set_ylabel(MEASURES[measure])
            axis.set_title(READINGS[reading].format(f"{settings.train_length:,}"), fontsize=9.5)
        for column in range(len(MEASURES)):  # one scale for both readings
            pair = axes[column :: len(MEASURES)]
            limits = [axis.get_ylim() for axis in pair]
            for axis in pair:
                axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
                place = (settings.train_length, axis.get_ylim()[1])
                axis.annotate(
                    f"trained at {settings.train_length:,}", place, xytext=(3, -2), textcoords="offset points",
                    fontsize=7.5, color="0.45", va="top",
                )  # fmt: skip


def caption(runs: dict[str, Any], settings: Settings, source: str) -> str:
    """What the picture shows, in two lines."""
    jobs = [job for seeds in runs.values() for run in seeds.values() for job in run.values()]
    size = max((job["train"].get("parameters", 0) for job in jobs), default=0)
    seeds = sorted({int(seed) for name, _, scores in lines(runs) if name != REAL for seed in scores})
    judge = style(settings.judge, [settings.judge])["label"]
    return (
        f"Byte-level transformers, {size / 1e6:.2f} M parameters, trained on {settings.train_length}-byte windows of "
        f"{source}, {settings.steps:,} steps of {settings.batch}, {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))} (bands), {settings.samples} texts each, temperature {settings.temperature:g}, "
        f"top-p {settings.top_p:g}.\n"
        f"Judge: {judge}, trained on other documents in windows of {settings.judge_length:,} bytes, "
        f"{settings.judge_steps:,} steps of {settings.judge_batch}. Repetition: the last {GRAM} bytes stood already in "
        f"the {HISTORY} before. Drift: Kullback-Leibler, from the text trained on."
    )


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What is left out is taken from BUDGETS, by the device."""
    p = command.new_parser(
        "bench generation",
        __doc__,
        "encodings and their options: those of python -m bench extrapolation --help, but for logit-gain\n"
        f"corpora:\n  stdlib: the standard library beside the interpreter; nothing to download\n"
        f"  linux, linux-docs: C source, or Documentation, of the folder linux-source-* here or in /usr/src\n"
        f"{corpus.LINUX_HELP}  any folder of text",
    )

    default = command.default_of(BUDGETS)
    p.add_argument("--encodings", nargs="+", metavar="NAME", help=f"which to compare {default('encodings')}")
    p.add_argument("--corpus", default="stdlib", metavar="NAME|DIR", help="see below (default stdlib)")
    p.add_argument("--train-length", type=at_least(8), metavar="N", help=f"bytes {default('train_length')}")
    p.add_argument("--reach", type=count, default=32, metavar="N", help="write N times as much (default %(default)s)")
    p.add_argument("--prompt", type=count, default=64, metavar="N", help="bytes of held-out text (default %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the draws (default %(default)s)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from this share (default %(default)s)")
    p.add_argument("--samples", type=count, metavar="N", help=f"texts of each seed {default('samples')}")
    p.add_argument("--real", type=count, metavar="N", help=f"real texts beside them {default('real')}")
    p.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help=f"one model each {default('seeds')}")
    p.add_argument("--steps", type=count, metavar="N", help=f"of training {default('steps')}")
    p.add_argument("--batch-bytes", type=count, metavar="N", help=f"of text per step {default('batch_bytes')}")
    p.add_argument("--learning-rate", type=positive, metavar="R", help=f"at its highest {default('learning_rate')}")
    p.add_argument("--judge", default="rope", metavar="NAME", help="the judge's encoding (default %(default)s)")
    for name, what, least in (
        ("length", "bytes of its windows", 8),
        ("steps", "of its training", 1),
        ("batch", "windows per step", 1),
    ):
        p.add_argument(f"--judge-{name}", type=at_least(least), metavar="N", help=f"{what} {default(f'judge_{name}')}")
    for name, what in (("dim", "width of all models"), ("layers", "of a model"), ("heads", "of a layer")):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} {default(name)}")
    command.add_run_options(p)
    return p


def settings_of(args: argparse.Namespace, text: corpus.Corpus, device: torch.device) -> Settings:
    """Raises ValueError for what cannot be."""
    if args.real < args.samples:
        raise ValueError(f"--real must be at least --samples, {args.samples}: they give the prompts; got {args.real}")
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature must be above 0, --top-p in (0, 1], got {args.temperature}, {args.top_p}")
    most = min(args.train_length * args.reach - 1, args.judge_length - args.judge_length // 4)
    if args.prompt > most:
        raise ValueError(f"--prompt must be less than the text and at most 3/4 of --judge-length: {most}")
    shape = Shape(args.dim, args.layers, args.heads)
    Attention(shape, encoding(args.judge, args.judge_length))  # complains about what it cannot be
    for name in args.encodings:
        try:
            Attention(shape, encoding(name, args.train_length)).new_cache(1, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Settings(
        corpus=text.digest,
        device=device_name(device),
        versions={"torch": torch.__version__, "logpe": logpe.__version__},
        shape=shape,
        train_length=args.train_length,
        length=args.train_length * args.reach,
        prompt=args.prompt,
        steps=args.steps,
        batch=max(1, args.batch_bytes // args.train_length),
        samples=args.samples,
        real=args.real,
        temperature=args.temperature,
        top_p=args.top_p,
        judge=args.judge,
        judge_length=args.judge_length,
        judge_steps=args.judge_steps,
        judge_batch=args.judge_batch,
        learning_rate=args.learning_rate,
    )


@command.program("bench generation")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(arguments)
    deadline = command.deadline(args.minutes)
    device = command.parse_device(args.device)
    command.fill_in(args, BUDGETS["cpu" if device.type == "cpu" else "cuda"])
    text = corpus.load(args.corpus)
    settings = settings_of(args, text, device)
    texts = Texts(text, settings, args.seeds)
    stamp = command.stamp()
    about = command.about(
        "bench generation",
        arguments,
        settings,
        stamp,
        corpus={**text.describe(), **texts.describe()},
        edges=settings.edges,
    )
    name = f"generation-{device.type}-{'-'.join(text.name.split())}-{settings.train_length}"
    results = Results(training.results_path(args.out, name, settings.key), about, args.fresh)
    keep = results.cache / f"{settings.key}-judge.pt"
    stop: KeyboardInterrupt | None = None
    try:
        for stages, names in (
            ({"judge": judge_stage(texts, settings, device, keep)}, [REAL]),
            ({"text": writer_stage(texts, settings, device, keep)}, args.encodings),
        ):
            training.measure(results, stages, names, args.seeds, deadline, stamp)
    except KeyboardInterrupt as error:
        stop = error
    source = f"Python {platform.python_version()}'s standard library" if args.corpus == "stdlib" else text.name
    show(results, settings, caption(results.runs, settings, source))
    return command.stopped(stop) if stop else 0


def show(results: Results, settings: Settings, note: str) -> None:
    """Prints the table, and draws the picture where matplotlib is installed."""
    if not list(lines(results.runs)):
        return
    print("\n" + table(results.runs, settings) + f"\n\n{results.path}")
    try:
        picture(results.path.with_suffix(".png"), results.runs, settings, note)
        print(results.path.with_suffix(".png"))
    except ImportError:
        print("No picture: matplotlib is not installed (pip install -e '.[bench]').")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
