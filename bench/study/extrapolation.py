"""Train short, read long: how position encodings hold up beyond the length they were trained at.

Small byte-level transformers that differ in nothing but the position encoding (same weights to start from, same
batches) are trained on short windows of text. Then the same held-out bytes are scored with ever more context, and
retrieval tasks are trained short and asked long.

    python -m bench extrapolation --quick        minutes on two CPU cores
    python -m bench extrapolation                the study: hours on a GPU, or a smaller one on the CPU

Every finished measurement is on disk at once: Ctrl-C or --minutes loses nothing, and the same command goes on from
there. On many GPUs one process each does its part of the same study:

    CUDA_VISIBLE_DEVICES=3 python -m bench extrapolation --shard 3/8 --minutes 8.5
    torchrun --nproc-per-node 8 -m bench extrapolation
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import logpe
from bench import command
from bench.command import at_least, count, positive
from bench.common import device_name
from bench.study import corpus, findings, tasks, training
from bench.study import protocol as study
from bench.study.model import ENCODINGS, OPTIONS, Attention, Shape, encoding

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
    """What is left out is taken from BUDGETS, by --quick and the device."""
    options = "\n".join(f"  +{name:<56}{what}" for name, what in OPTIONS.items())
    listed = "\n".join(f"  {name:<57}{task.summary}" for name, task in tasks.TASKS.items())
    p = command.new_parser(
        "bench extrapolation",
        __doc__,
        f"encodings: {', '.join(name for name in ENCODINGS if '+' not in name)};\n"
        f"options of an encoding, as in log-bias+gain+power=0.5:4:\n{options}\n"
        f"tasks:\n{listed}\n"
        f"corpora:\n  stdlib: the standard library beside the interpreter; nothing to download\n"
        f"  linux, linux-docs: C source, or Documentation, of the folder linux-source-* here or in /usr/src\n"
        f"{corpus.LINUX_HELP}  any folder of text",
    )

    default = command.default_of(BUDGETS)
    p.add_argument("--quick", action="store_true", help="a small budget for one table and one picture")
    p.add_argument("--encodings", nargs="+", metavar="NAME", help=f"which to compare, see below {default('encodings')}")
    p.add_argument(
        "--tasks", nargs="*", choices=tasks.TASKS, metavar="NAME", help=f"retrieval, see below {default('tasks')}"
    )
    p.add_argument("--corpus", default="stdlib", metavar="NAME|DIR", help="see below (default stdlib)")
    p.add_argument("--train-length", type=at_least(8), nargs="+", metavar="N", help=f"bytes {default('train_length')}")
    p.add_argument(
        "--reach", type=count, default=32, metavar="N", help="test at 1, 2, 4, ... N times that (default 32)"
    )
    p.add_argument("--lengths", type=at_least(8), nargs="+", metavar="N", help="or at these lengths, in bytes")
    p.add_argument("--steps", type=count, metavar="N", help=f"of training {default('steps')}; tasks take a share of it")
    p.add_argument("--batch", type=count, metavar="N", help="windows per step (default: --batch-bytes)")
    p.add_argument("--batch-bytes", type=count, metavar="N", help=f"of text per step {default('batch_bytes')}")
    p.add_argument("--windows", type=count, metavar="N", help=f"of held-out text {default('windows')}")
    p.add_argument("--whole", type=at_least(0), metavar="N", help=f"of these, read whole {default('whole')}")
    p.add_argument("--target", type=count, metavar="N", help=f"bytes scored with growing context {default('target')}")
    p.add_argument("--samples", type=count, metavar="N", help=f"questions per length and depth {default('samples')}")
    p.add_argument("--depths", type=count, metavar="N", help=f"how many, from 0 to 1 {default('depths')}")
    p.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help=f"one run each {default('seeds')}")
    for name, what in (("dim", "width of the model"), ("layers", "of the model"), ("heads", "of a layer")):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} {default(name)}")
    p.add_argument("--learning-rate", type=positive, metavar="R", help=f"at its highest {default('learning_rate')}")
    p.add_argument("--qk-norm", action="store_true", help="normalise queries and keys in every model")
    p.add_argument("--baseline", default="rope", metavar="NAME", help="of the paired differences (default rope)")
    command.add_run_options(p)
    p.add_argument("--shard", metavar="I/N", help="do part I (from 0) of N; by default torchrun's rank")
    return p


def parse_shard(text: str | None) -> tuple[int, int]:
    """ "2/8" -> (2, 8); None: the rank of torchrun, or all. Raises ValueError."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


def settings_of(args: argparse.Namespace, text: corpus.Corpus, train_length: int, shape: Shape) -> study.Settings:
    """Of the models trained at one length."""
    doublings = range(max(1, args.reach).bit_length())
    lengths = tuple(sorted(set(args.lengths or [train_length << k for k in doublings])))
    target = min(args.target, lengths[0] // 2) if args.quick else min(args.target, lengths[-1] // 2)
    return study.Settings(
        corpus=text.digest,
        device=device_name(command.parse_device(args.device)),
        versions={"torch": torch.__version__, "logpe": logpe.__version__},
        shape=shape,
        train_length=train_length,
        lengths=lengths,
        steps=args.steps,
        batch=args.batch or max(1, args.batch_bytes // train_length),
        windows=args.windows,
        target=target,
        samples=args.samples,
        depths=tuple(round(i / max(1, args.depths - 1), 4) for i in range(args.depths)),
        learning_rate=args.learning_rate,
        whole_windows=args.whole,
    )


@command.program("bench extrapolation")
def main(arguments: Sequence[str] | None = None, shape: Shape | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(arguments)
    deadline = command.deadline(args.minutes)
    device, shard = command.parse_device(args.device), parse_shard(args.shard)
    command.fill_in(args, BUDGETS["quick" if args.quick else "cpu" if device.type == "cpu" else "cuda"])
    if args.fresh and shard[1] > 1:
        raise ValueError("--fresh is for one process alone: others would lose what they measured")
    shape = shape or Shape(args.dim, args.layers, args.heads, args.qk_norm)
    for name in args.encodings:
        Attention(shape, encoding(name, args.train_length[0]))  # complains about what it cannot be
    text = corpus.load(args.corpus)
    studies = []
    for train_length in args.train_length:
        settings = settings_of(args, text, train_length, shape)
        jobs: dict[str, study.Job] = {"text": (reading := study.Text(text, settings))}
        jobs |= {name: study.Retrieval(tasks.TASKS[name], settings) for name in args.tasks}
        studies.append((settings, jobs, reading))
    stamp = command.stamp()
    stop: KeyboardInterrupt | None = None
    found = []
    for settings, jobs, reading in studies:
        about = command.about(
            "bench extrapolation",
            arguments,
            settings,
            stamp,
            corpus={**text.describe(), "windows": len(reading.windows)},
        )
        name = "extrapolation-quick"
        if not args.quick:
            source = "-".join(text.name.split())
            name = f"extrapolation-{device.type}-{source}-{settings.train_length}"
        results = training.Results(training.results_path(args.out, name, settings.key), about, args.fresh)
        found.append((results, settings, reading))
        try:
            stages = {name: study.stage(job, settings, device) for name, job in jobs.items()}
            training.measure(results, stages, args.encodings, args.seeds, deadline, stamp, shard)
        except KeyboardInterrupt as error:
            stop = error
            break
    if shard[0] == 0:  # the others would write the same
        source = f"Python {platform.python_version()}'s standard library" if args.corpus == "stdlib" else text.name
        for results, settings, reading in found:
            show(results, settings, findings.caption(results.runs, reading, source, settings), args)
    return command.stopped(stop) if stop else 0


def show(results: training.Results, settings: study.Settings, caption: str, args: argparse.Namespace) -> None:
    """Prints the tables, and draws the pictures where matplotlib is installed: of the encodings that were asked for."""
    runs = {name: results.runs[name] for name in args.encodings if name in results.runs}
    shown = [task for task in tasks.TASKS if any(task in run for seeds in runs.values() for run in seeds.values())]
    if args.quick:
        print("\n" + findings.table(runs, settings, shown))
    else:
        print("\n" + findings.tables(runs, settings, shown, args.baseline))
    if not results.path.exists():
        return
    print(f"\nMeasured in {findings.seconds(runs) / 60:.1f} minutes: {results.path}")
    try:
        if args.quick:
            picture = results.path.with_suffix(".png")
            findings.figure(picture, runs, settings, shown, caption)
            print(picture)
        else:
            findings.write_csv(results.path.with_suffix(".csv"), results.runs, settings)
            print(results.path.with_suffix(".csv"))
            print(*findings.report(results.path, runs, settings, shown, caption), sep="\n")
    except ImportError:
        print("No figure: matplotlib is not installed.")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
