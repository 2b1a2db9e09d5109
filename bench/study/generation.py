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
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench import command
from bench.command import at_least, count
from bench.plots import curve, length_axis, panels, style
from bench.study import corpus, protocol, runner, tables
from bench.study.judge import GRAM, HISTORY, Judge, Settings, Texts, scored
from bench.study.model import Attention, Model, Shape, encoding
from bench.study.runner import Advance, Stage
from bench.study.tables import Runs

REAL = "real"  # stands among the encodings: the text that the judge is tested on
READINGS = {"all": "every layer sees all that was written", "window": "every layer sees the last {} bytes"}
MEASURES = {"bits": "bits per byte under the judge", "repetition": "repetition rate", "drift": "drift of bytes in bits"}

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


# --- writing ----------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token of each distribution, from the fewest likeliest ones whose probability reaches ``top_p``.

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
    """Continue prompts, int64 (B, prompt), to (B, length), with a cache; the draws are the same for every encoding.

    Args:
        window: how many bytes back each layer sees; None: all.
        advance: told after each byte.
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


def writer_stage(texts: Texts, settings: Settings, device: torch.device, judge: Judge) -> Stage:
    """Return the stage of a model that is trained short and writes on from prompts, in each way of READINGS."""

    def score(model: Model, test: str, seed: int, advance: Advance) -> dict[str, Any]:
        window = None if test == "all" else settings.train_length - 1  # bytes before the one that looks
        before, prompts = texts.real(seed)[: settings.samples, : settings.context].split([lead, settings.prompt], dim=1)
        text = write(model, prompts, settings, window, seed, lambda n: advance(n * byte))
        scores = scored(judge.ready(), torch.cat([before, text], dim=1), texts.frequencies, settings)
        advance(judge.reading_work(settings.samples))
        return scores

    lead = settings.context - settings.prompt
    byte = 10 * protocol.work(settings.samples, settings.length) // settings.length  # one by one is that much slower
    writing = byte * (settings.length - settings.prompt)
    return Stage(
        settings,
        build=lambda name, seed: Model(settings.shape, encoding(name, settings.train_length), seed).to(device),
        loss=lambda model, seed: protocol.byte_loss(model, lambda rng: texts.sampler(settings.batch, rng), seed),
        score=score,
        step_work=3 * protocol.work(settings.batch, settings.train_length),
        tests=dict.fromkeys(READINGS, writing + judge.reading_work(settings.samples)),
    )


# --- tables and pictures ----------------------------------------------------------------------------------------------


def lines(runs: Runs) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield encoding, reading, and the scores of every seed; real text first."""
    for name in [REAL, *(name for name in tables.rows(runs) if name != REAL)]:
        for reading in READINGS:
            records = tables.records({name: runs.get(name, {})})
            if scores := [record["lengths"][reading] for record in records if reading in record["lengths"]]:
                yield name, reading, scores


def table(runs: Runs, settings: Settings) -> str:
    """Return bits by position, then what else the last bin shows, as Markdown: means, and ± deviation over seeds."""
    bins = list(zip(settings.edges, settings.edges[1:], strict=False))
    others = ("repetition", "drift", "printable")
    rows = [["text", "reads", "seeds", *(f"{a:,}-{b:,}" for a, b in bins), "minus real", *others]]
    real = next(lines(runs))[2]
    goal = fmean(scored["bits"][-1] for scored in real)
    for name, reading, scores in lines(runs):
        columns = list(zip(*(s["bits"] for s in scores), strict=True))
        bits = [tables.cell(column, ".3f", spread=column is columns[-1]) for column in columns]
        over = "" if name == REAL else f"{fmean(columns[-1]) - goal:+.3f}"
        last = [tables.cell([s[measure][-1] for s in scores], ".3f") for measure in others]
        rows.append([name, "" if name == REAL else reading, str(len(scores)), *bits, over, *last])
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
change by {fmean(change):+.3f} ± {tables.half_width(change):.3f} (95% interval, {len(change)} texts).
"""
    notes = [f"{name}: {what.format(settings.train_length)}" for name, what in READINGS.items()]
    return tables.markdown(rows) + legend + check + ". ".join(notes) + "."


def picture(path: Path, runs: Runs, settings: Settings, note: str) -> None:
    """Draw a row for each reading: bits, repetition and drift by position. Bands: the seeds."""
    centres = [math.sqrt(a * b) for a, b in zip(settings.edges, settings.edges[1:], strict=False)]
    everything = list(lines(runs))
    names = [name for name in tables.rows(runs) if name != REAL]
    places = [(reading, measure) for reading in READINGS for measure in MEASURES]
    with panels(path, len(places), note, columns=len(MEASURES), size=(4.5, 3.6), legend="right center") as axes:
        for axis, (reading, measure) in zip(axes, places, strict=True):
            for name, how, scores in everything:
                if name != REAL and how != reading:
                    continue
                look = dict(color="0.15", linestyle="--", linewidth=1.8, label="real text", zorder=5)
                if name != REAL:
                    look = style(name, names)
                columns = zip(*(s[measure] for s in scores), strict=True)
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


def caption(runs: Runs, settings: Settings, source: str) -> str:
    """Return what the picture shows, in two lines."""
    seeds = sorted({int(seed) for name, by_seed in runs.items() if name != REAL for seed in by_seed})
    judge = style(settings.judge)["label"]
    return (
        f"Byte-level transformers, {tables.parameters(runs)}, trained on {settings.train_length}-byte windows of "
        f"{source}, {settings.steps:,} steps of {settings.batch}, {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))} (bands), {settings.samples} texts each, temperature {settings.temperature:g}, "
        f"top-p {settings.top_p:g}.\n"
        f"Judge: {judge}, trained on other documents in windows of {settings.judge_length:,} bytes, "
        f"{settings.judge_steps:,} steps of {settings.judge_batch}. Repetition: the last {GRAM} bytes stood already in "
        f"the {HISTORY} before. Drift: Kullback-Leibler, from the text trained on."
    )


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser; what is left out is taken from BUDGETS, by the device."""
    epilog = "encodings and their options: those of python -m bench extrapolation --help, but for logit-gain\n"
    p, add = runner.new_parser("generation", __doc__, epilog + corpus.HELP, BUDGETS)
    add("corpus", str, "text to train and test on, see below", "stdlib", metavar="NAME|DIR")
    add("train_length", at_least(8), "bytes of a window to train on")
    add("times", count, "write N times the training length", 32)
    add("prompt", count, "bytes of held-out text that are continued", 64)
    add("temperature", float, "temperature of the draws", 1.0, metavar="T")
    add("top_p", float, "draw from this share of the probability", 1.0, metavar="P")
    add("samples", count, "texts of each seed")
    add("real", count, "real texts beside them")
    add("batch_bytes", count, "bytes of text per step")
    add("judge", str, "the judge's encoding", "rope", metavar="NAME")
    add("judge_length", at_least(8), "bytes of its windows")
    add("judge_steps", count, "steps of its training")
    add("judge_batch", count, "windows per step")
    return p


def settings_of(args: argparse.Namespace, text: corpus.Corpus) -> Settings:
    """Return the settings. Raises ValueError for what cannot be."""
    if args.real < args.samples:
        raise ValueError(f"--real must be at least --samples, {args.samples}: they give the prompts; got {args.real}")
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"--temperature must be above 0, --top-p in (0, 1], got {args.temperature}, {args.top_p}")
    most = min(args.train_length * args.times - 1, args.judge_length - args.judge_length // 4)
    if args.prompt > most:
        raise ValueError(f"--prompt must be less than the text and at most 3/4 of --judge-length: {most}")
    shape = Shape(args.dim, args.layers, args.heads)
    Attention(shape, encoding(args.judge, args.judge_length))  # complains about what it cannot be
    for name in args.encodings:
        try:
            Attention(shape, encoding(name, args.train_length)).new_cache(1, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    same = ["train_length", "prompt", "steps", "samples", "real", "temperature", "top_p", "learning_rate"]
    same += ["judge", "judge_length", "judge_steps", "judge_batch"]
    return Settings(
        **runner.machine(args),
        **{name: getattr(args, name) for name in same},
        corpus=text.digest,
        shape=shape,
        length=args.train_length * args.times,
        batch=max(1, args.batch_bytes // args.train_length),
    )


@command.program("bench generation")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return measure(runner.parse(parser(), arguments, BUDGETS))


def measure(args: argparse.Namespace) -> int:
    """Run with these options; return the exit status."""
    text = corpus.load(args.corpus)
    settings = settings_of(args, text)
    texts = Texts(text, settings, args.seeds)
    judge = Judge(texts, settings, args.device, args.out / ".cache" / f"{settings.key}-judge")

    def draw(path: Path, runs: Runs) -> None:
        picture(path, runs, settings, caption(runs, settings, text.source))

    generation = runner.Study(
        name=f"generation-{args.device.type}-{'-'.join(text.name.split())}-{settings.train_length}",
        settings=settings,
        about={"corpus": {**text.describe(), **texts.describe()}, "edges": settings.edges},
        plan=[
            ({"judge": judge.stage()}, [REAL]),
            ({"text": writer_stage(texts, settings, args.device, judge)}, args.encodings),
        ],
        table=lambda runs: table(runs, settings),
        draw=draw,
    )
    return runner.run("generation", args, [generation], measure)
