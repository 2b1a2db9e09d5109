"""Train short, read long: how position encodings hold up beyond the length they were trained at.

Small byte-level transformers that differ in nothing but the position encoding (same weights to start from, same
batches) are trained on short windows of text. Then the same held-out bytes are scored with ever more context, and
retrieval tasks are trained short and asked long.

    python -m bench extrapolation --quick        minutes on two CPU cores
    python -m bench extrapolation                the study: hours on a GPU, or a smaller one on the CPU

On many GPUs one process each does its part of the same study:

    CUDA_VISIBLE_DEVICES=3 python -m bench extrapolation --shard 3/8 --minutes 8.5
    torchrun --nproc-per-node 8 -m bench extrapolation
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import command
from bench.command import at_least, count, share
from bench.study import corpus, findings, mixture, protocol, runner, tasks
from bench.study.model import ENCODINGS, OPTIONS, Attention, Shape, encoding
from bench.study.tables import Runs

QUICK = ["rope", "alibi", "log-bias", "log-bias-rope"]
CPU = ["rope", "rope-yarn", "alibi", "kerple", "log-bias", "log-bias-rope"]
GPU = [
    *ENCODINGS,
    *(
        "log-invariant+rotary=0.5",
        "log-invariant+rotary=0.5+gain",
        "log-bias+rotary=0.25",
        "log-rotary-bias+rotary=0.5",
    ),
    "log-bias+shared",
    *("rope+base=30", "kerple+rotary=0.5+base=30", "log-bias+power=1:4"),  # what log-bias-rope is made of
    *("rope+qk-norm", "log-bias+qk-norm"),  # what log-invariant has by itself
]
# `recall` at 128 bytes, CPU size, one seed: not learned in 600 steps at 5e-3 (log-bias+gain); 0.92 of the answers right
# after 280 steps at 2e-3 (log-bias).
# batch_bytes: of one step. samples: questions per length and depth. whole: of the windows, those that are read whole.
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        encodings=QUICK, tasks=["needle"], train_length=[128], seeds=[0], steps=400, batch_bytes=2048,
        windows=64, whole=0, target=64, samples=8, depths=5, dim=128, layers=3, heads=4, learning_rate=5e-3,
    ),
    "cpu": dict(
        encodings=CPU, tasks=["needle", "recall"], train_length=[128], seeds=[0, 1, 2], steps=600, batch_bytes=2048,
        windows=64, whole=16, target=256, samples=8, depths=5, dim=128, layers=3, heads=4, learning_rate=2e-3,
    ),
    "cuda": dict(
        encodings=GPU, tasks=[*tasks.TASKS], train_length=[128, 512], seeds=[0, 1, 2], steps=3000, batch_bytes=32768,
        windows=256, whole=64, target=256, samples=64, depths=9, dim=384, layers=8, heads=6, learning_rate=1e-3,
    ),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser; what is left out is taken from BUDGETS, by --quick and the device."""
    options = "\n".join(f"  +{name:<56}{what}" for name, what in OPTIONS.items())
    listed = "\n".join(f"  {name:<57}{task.summary}" for name, task in tasks.TASKS.items())
    epilog = (
        f"encodings: {', '.join(name for name in ENCODINGS if '+' not in name)};\n"
        f"options of an encoding, as in log-bias+gain+power=0.5:4:\n{options}\n"
        f"tasks:\n{listed}\n{corpus.HELP}"
    )
    p, add = runner.new_parser("extrapolation", __doc__, epilog, BUDGETS)
    p.add_argument("--quick", action="store_true", help="a small budget for one table and one picture")
    what = "retrieval, see below; each task trains for a share of --steps"
    add("tasks", str, what, nargs="*", choices=tasks.TASKS, metavar="NAME")
    add("corpus", str, "text to train and test on, see below", "stdlib", metavar="NAME|DIR")
    add("train_length", at_least(8), "bytes of a window to train on", nargs="+")
    add("times", count, "test at 1, 2, 4, ... N times the training length", 32)
    p.add_argument("--lengths", type=at_least(8), nargs="+", metavar="N", help="or test at these lengths, in bytes")
    p.add_argument("--batch", type=count, metavar="N", help="windows per step (default: --batch-bytes)")
    add("batch_bytes", count, "bytes of text per step")
    add("windows", count, "windows of held-out text")
    add("whole", at_least(0), "how many of them are also read whole")
    add("target", count, "bytes scored with growing context")
    add("samples", count, "questions per length and depth")
    add("depths", count, "how many depths, from 0 to 1")
    p.add_argument("--qk-norm", action="store_true", help="normalise queries and keys in every model")
    add("tokens", at_least(256), "read tokens of a vocabulary of N; 256: bytes. Lengths then count tokens", 256)
    what = f"shares of every batch of text, of {', '.join(mixture.KINDS)}; one model then serves all tasks"
    p.add_argument("--mixture", nargs="+", type=parse_share, default=[], metavar="KIND=F", help=what)
    p.add_argument("--smeared-keys", action="store_true", help="mix each key with the one before, in every model")
    add("baseline", str, "what paired differences are taken from", "rope", metavar="NAME")
    return p


def parse_share(text: str) -> tuple[str, float]:
    """Return ("collage", 0.25) for "collage=0.25"."""
    kind, _, number = text.partition("=")
    if kind not in mixture.KINDS:
        raise argparse.ArgumentTypeError(f"must be KIND=F, KIND one of {', '.join(mixture.KINDS)}, got {text!r}")
    return kind, share(number)


def settings_of(args: argparse.Namespace, text: corpus.Corpus, train_length: int, shape: Shape) -> protocol.Settings:
    """Return the settings of the models that are trained at one length."""
    doublings = range(max(1, args.times).bit_length())
    lengths = tuple(sorted(set(args.lengths or [train_length << k for k in doublings])))
    return protocol.Settings(
        **runner.machine(args),
        corpus=text.digest,
        shape=shape,
        train_length=train_length,
        lengths=lengths,
        steps=args.steps,
        batch=args.batch or max(1, args.batch_bytes // train_length),
        windows=args.windows,
        target=min(args.target, lengths[0 if args.quick else -1] // 2),
        samples=args.samples,
        depths=tuple(round(i / max(1, args.depths - 1), 4) for i in range(args.depths)),
        learning_rate=args.learning_rate,
        whole_windows=args.whole,
        smeared_keys=args.smeared_keys,
        mixture=tuple(args.mixture),
    )


def study_of(args: argparse.Namespace, text: corpus.Corpus, settings: protocol.Settings) -> runner.Study:
    """Return what is measured with these settings, and what is shown of the encodings that were asked for."""
    about: dict[str, Any] = {"corpus": text.describe()}
    symbols = torch.arange(settings.shape.vocabulary)
    if settings.unit == "token":
        text, bpe = corpus.tokenized(text, settings.shape.vocabulary)
        symbols[:128] = torch.tensor([bpe.encode(chr(code)).ids[0] for code in range(128)])
        sides = {side: sum(len(d.tokens) for d in documents) for side, documents in text.sides.items()}
        about["corpus"] |= {"tokens": sides, "tokenizer_sha256": hashlib.sha256(bpe.to_str().encode()).hexdigest()}
    reading = protocol.Text(text, settings)
    about["corpus"]["windows"] = len(reading.windows)
    jobs: dict[str, protocol.Job] = {"text": reading}
    jobs |= {name: protocol.Retrieval(tasks.TASKS[name], settings, symbols) for name in args.tasks}

    def chosen(runs: Runs) -> tuple[Runs, list[str]]:
        runs = {name: runs[name] for name in args.encodings if name in runs}
        measured = {job for seeds in runs.values() for jobs in seeds.values() for job in jobs}
        return runs, [task for task in tasks.TASKS if task in measured]

    def table(runs: Runs) -> str:
        runs, shown = chosen(runs)
        if args.quick:
            return findings.table(runs, settings, shown)
        return findings.tables(runs, settings, shown, args.baseline)

    def draw(path: Path, everything: Runs) -> list[Path]:
        runs, shown = chosen(everything)
        note = findings.caption(everything, len(reading.windows), text.source, settings)
        if args.quick:
            findings.figure(path, runs, settings, shown, note)
            return [path]
        findings.write_csv(path.with_suffix(".csv"), everything, settings)
        return [path.with_suffix(".csv"), *findings.report(path, runs, settings, shown, note)]

    name = f"{args.device.type}-{'-'.join(text.name.split())}-{settings.train_length}{'-far' * bool(settings.mixture)}"
    return runner.Study(
        name="extrapolation-quick" if args.quick else f"extrapolation-{name}",
        settings=settings,
        about=about,
        plan=[(protocol.stages(jobs, settings, symbols, args.device), args.encodings)],
        table=table,
        draw=draw,
    )


@command.program("bench extrapolation")
def main(arguments: Sequence[str] | None = None, shape: Shape | None = None) -> int:
    """Run the command; return its exit status."""
    args = runner.parse(parser(), arguments, BUDGETS)
    shape = shape or Shape(args.dim, args.layers, args.heads, args.qk_norm, args.tokens)
    if sum(part for _, part in args.mixture) >= 1:
        raise ValueError("--mixture must leave room for text: its shares must sum to less than 1")
    for name in args.encodings:
        Attention(shape, encoding(name, args.train_length[0]))  # complains about what it cannot be
    return measure(shape, args)


def measure(shape: Shape, args: argparse.Namespace) -> int:
    """Run with these options; return the exit status."""
    text = corpus.load(args.corpus)
    studies = [study_of(args, text, settings_of(args, text, length, shape)) for length in args.train_length]
    return runner.run("extrapolation", args, studies, functools.partial(measure, shape))
