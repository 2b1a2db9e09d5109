"""Train short, read long: how position encodings hold up beyond the length they were trained at.

Small byte-level transformers that differ in nothing but the position encoding (same weights to start from, same
batches) are trained on short windows of text. Then the same held-out bytes are scored with ever more context, and a
retrieval task is trained short and asked long.

    python -m bench.extrapolation --quick

Every finished measurement is on disk at once: Ctrl-C loses nothing, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import logpe
from bench import corpus, tasks
from bench.common import COLOURS, LABELS, RESULTS, commit, device_name, write_whole
from bench.model import ENCODINGS, Model, Shape

FORMAT = 1  # raise it when a change here makes earlier results incomparable


@dataclass(frozen=True)
class Settings:
    """All that a number depends on, the machine included. Results of different settings never share a file."""

    corpus: str  # sha256
    device: str
    versions: dict[str, str]
    shape: Shape
    train_length: int  # bytes
    lengths: tuple[int, ...]  # of context, bytes
    steps: int
    batch: int
    windows: int  # of held-out text
    target: int  # bytes scored at the end of each
    samples: int  # retrieval questions per length and depth
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Names these settings in files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


# --- jobs: what a model is trained for, and how it is scored at one length -------------------------------------------


class Text:
    """Next-byte prediction."""

    answer = None  # every byte is predicted in training

    def __init__(self, text: corpus.Corpus, settings: Settings) -> None:
        self.settings, self.steps = settings, settings.steps
        self.sampler = corpus.Sampler(text.train, settings.train_length + 1)
        self.windows = corpus.windows(text.test, max(settings.lengths) + 1, settings.windows)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A batch to train on."""
        return self.sampler(self.settings.batch, generator)

    def questions(self, length: int, seed: int) -> Iterator[tuple[str, Tensor, int]]:
        """Named sets of sequences, each with the number of last bytes to score: here the windows."""
        yield "text", self.windows[:, -length - 1 :], self.settings.target

    def summary(self, losses: dict[str, Tensor], hits: dict[str, Tensor]) -> dict[str, Any]:
        """What to record, from losses in nats and hits, both (sequences, bytes scored)."""
        bits = losses["text"].mean(dim=1) / math.log(2)
        return {"bits_per_byte": round(bits.mean().item(), 5), "per_window": [round(b, 4) for b in bits.tolist()]}


class Retrieval:
    """One of the tasks in bench.tasks; prompts of any length up to the training length."""

    def __init__(self, task: tasks.Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        self.answer: int | None = task.answer
        self.steps = max(1, round(task.steps * settings.steps))

    def draw(self, generator: torch.Generator) -> Tensor:
        """A batch to train on, twice as many prompts as text has windows: they are half as long on average."""
        longest = self.settings.train_length
        length = int(torch.randint(min(16, longest), longest + 1, (), generator=generator))
        return self.task.draw(generator, 2 * self.settings.batch, length, None)

    def questions(self, length: int, seed: int) -> Iterator[tuple[str, Tensor, int]]:
        """As Text.questions: a set of prompts per depth, the same for every encoding."""
        for depth in self.settings.depths:
            generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * length + round(100 * depth))
            prompts = self.task.draw(generator, self.settings.samples, length, depth)
            yield f"{depth:g}", prompts, self.task.answer

    def summary(self, losses: dict[str, Tensor], hits: dict[str, Tensor]) -> dict[str, Any]:
        """As Text.summary; a question counts if the whole answer is right."""
        depths = {depth: round(hit.all(dim=1).float().mean().item(), 4) for depth, hit in hits.items()}
        return {"accuracy": round(fmean(depths.values()), 4), "per_depth": depths}


Job = Text | Retrieval
Advance = Callable[[int], None]  # tells the progress bar; raises KeyboardInterrupt when it is time to stop


def work(sequences: int, length: int) -> int:
    """Units of work to read some sequences once; attention costs as much as the rest at about 1,500 bytes."""
    return sequences * length * (1500 + length)


def training_work(settings: Settings) -> int:
    """Of one step; backward costs twice the forward pass."""
    return 3 * work(settings.batch, settings.train_length)


def scoring_work(job: Job, length: int, settings: Settings) -> int:
    """Of all questions of one length."""
    return work(len(job.windows) if isinstance(job, Text) else settings.samples * len(settings.depths), length)


def train(model: Model, job: Job, seed: int, settings: Settings, checkpoint: Path, advance: Advance) -> dict[str, Any]:
    """Trains to the end, from the checkpoint if there is one, and leaves one behind, also when it is interrupted."""
    device = next(model.parameters()).device
    groups = logpe.parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    first, seconds, losses = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        first, seconds, losses = state["step"], state["seconds"], state["losses"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.perf_counter() - seconds

    def save(step: int) -> None:
        state = {"step": step, "seconds": time.perf_counter() - start, "losses": losses}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write_whole(checkpoint, lambda path: torch.save(state, path))

    share = training_work(settings)
    advance(first * share)
    model.train()
    generator = torch.Generator()
    for step in range(first, job.steps):
        rate = min(1.0, 10 * (step + 1) / job.steps) * (0.55 + 0.45 * math.cos(math.pi * step / job.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        tokens = job.draw(generator.manual_seed(1_000_003 * seed + step)).to(device)
        logits = predict(model, tokens, job.answer)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.shape[1] :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 0.9 * job.steps - 1:
            losses.append(loss.item())
        try:
            advance(share)
        except KeyboardInterrupt:
            save(step + 1)
            raise
    save(job.steps)
    return {
        "steps": job.steps,
        "bits_at_the_end": round(fmean(losses) / math.log(2), 4),  # mean of the last tenth
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def predict(model: Model, tokens: Tensor, last: int | None) -> Tensor:
    """Logits, float32, of the last few of `tokens` (all but the first where None) from what comes before each."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        return model(tokens[:, :-1], last).float()


@torch.inference_mode()
def score(model: Model, job: Job, length: int, seed: int, advance: Advance) -> dict[str, Any]:
    """The job's summary at one context length."""
    device = next(model.parameters()).device
    together = max(1, (8192 if device.type == "cpu" else 262144) // length)  # sequences in one forward pass
    model.eval()
    start = time.perf_counter()
    losses, hits = {}, {}
    for name, tokens, last in job.questions(length, seed):
        loss, hit = [], []
        for part in tokens.split(together):
            logits, target = predict(model, part.to(device), last), part[:, -last:].to(device)
            loss.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu())
            hit.append((logits.argmax(dim=-1) == target).cpu())
            advance(work(len(part), length))
        losses[name], hits[name] = torch.cat(loss), torch.cat(hit)
    return {**job.summary(losses, hits), "seconds": round(time.perf_counter() - start, 2)}


# --- the study: what is to be measured, and the file it goes to -------------------------------------------------------


class Results:
    """A JSON file that is whole after every `save`: what was run, and `runs[encoding][seed][job]`."""

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool) -> None:
        self.path = path
        self.cache = path.parent / ".cache"  # checkpoints of what is under way
        self.cache.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, Any] = {}
        if fresh:
            for checkpoint in self.cache.glob(f"{about['key']}-*"):
                checkpoint.unlink()
        if path.exists() and not fresh:
            self.runs.update(json.loads(path.read_text())["runs"])
        self.content = {**about, "runs": self.runs}

    def record(self, encoding: str, seed: int, job: str) -> dict[str, Any]:
        """To be filled in: `train` and `lengths`."""
        empty: dict[str, Any] = {"train": {}, "lengths": {}}
        return self.runs.setdefault(encoding, {}).setdefault(str(seed), {}).setdefault(job, empty)

    def save(self) -> None:
        """Writes the whole file, or leaves the old one."""
        write_whole(self.path, lambda path: path.write_text(to_json(self.content) + "\n"))


def to_json(value: Any, indent: str = "") -> str:
    """JSON with lists of numbers on one line."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = [f"{inner}{json.dumps(str(key))}: {to_json(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return json.dumps(value)


def results_path(folder: Path, name: str, key: str) -> Path:
    """`name`.json unless that holds results of other settings; then `name`-`key`.json."""
    path = folder / f"{name}.json"
    if path.exists() and json.loads(path.read_text()).get("key") != key:
        return folder / f"{name}-{key}.json"
    return path


class Progress:
    """The bar over all stages, and the two reasons to stop early: Ctrl-C and the time limit."""

    def __init__(self, total: int, done: int, minutes: float | None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.interrupted = False
        self.bar = tqdm(
            total=total,
            initial=done,
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            bar_format="{desc:<29} {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left",
        )

    def advance(self, units: int) -> None:
        """Counts finished work. Raises KeyboardInterrupt when it is time to stop."""
        self.bar.update(units)
        if self.interrupted or time.monotonic() > self.deadline:
            raise KeyboardInterrupt

    def __enter__(self) -> Progress:
        def stop(*_: object) -> None:
            """Asks `advance` to raise, where a checkpoint is whole; raises here when asked twice."""
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        self.previous = signal.signal(signal.SIGINT, stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)
        self.bar.close()


def measure(
    results: Results,
    settings: Settings,
    jobs: dict[str, Job],
    encodings: Sequence[str],
    seeds: Sequence[int],
    device: torch.device,
    minutes: float | None = None,
    stamp: dict[str, Any] | None = None,
) -> None:
    """Fills in whatever `results` lacks. Raises KeyboardInterrupt on Ctrl-C or when the minutes are over."""
    total = done = 0
    plan = []
    for seed, name, job in itertools.product(seeds, encodings, jobs):
        record = results.record(name, seed, job)
        checkpoint = results.cache / f"{settings.key}-{name}-{seed}-{job}.pt"
        missing = [n for n in settings.lengths if str(n) not in record["lengths"]]
        training = bool(missing) and not (record["train"] and checkpoint.exists())
        cost = {n: scoring_work(jobs[job], n, settings) for n in settings.lengths}
        cost[0] = jobs[job].steps * training_work(settings)
        total += sum(cost.values())
        done += sum(cost.values()) - sum(cost[n] for n in [0] * training + missing)
        if missing:
            plan.append((name, seed, job, record, checkpoint, training, missing))
    if not plan:
        return
    with Progress(total, done, minutes) as progress:
        for name, seed, job, record, checkpoint, training, missing in plan:
            model = Model(settings.shape, ENCODINGS[name], seed).to(device)
            if training:
                progress.bar.set_description(f"{name}: {job}, training")
                found = train(model, jobs[job], seed, settings, checkpoint, progress.advance)
                record["train"] = {**found, **(stamp or {})}
                results.save()
            else:
                model.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True)["model"])
            for n in missing:
                progress.bar.set_description(f"{name}: {job}, {n:,} bytes")
                found = score(model, jobs[job], n, seed, progress.advance)
                record["lengths"][str(n)] = {**found, **(stamp or {})}
                results.save()
            checkpoint.unlink(missing_ok=True)


# --- what people look at ----------------------------------------------------------------------------------------------


def curve(runs: dict[str, Any], encoding: str, job: str, value: str, lengths: Sequence[int]) -> list[float]:
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
        bits = curve(runs, encoding, "text", "bits_per_byte", lengths)
        line = f"{encoding:<20}{cells(bits, '.3f', 7)}{cells([2 ** (bits[-1] - bits[0])], '.3f', 9)}"
        for task in tasks_shown:
            line += "   " + cells(curve(runs, encoding, task, "accuracy", lengths), ".2f", 6)
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def note(axis: Any, text: str, place: tuple[float, float], coords: Any, rotation: float = 0) -> None:
        offset = {"xytext": (4, 3 if not rotation else 0), "textcoords": "offset points"}
        axis.annotate(text, place, xycoords=coords, rotation=rotation, fontsize=8, color="0.45", **offset)

    panels = [("text", "bits_per_byte", "bits per byte of the same text")]
    panels += [(task, "accuracy", f"{task} retrieval accuracy") for task in tasks_shown]
    lengths = settings.lengths
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        drawing, axes = pyplot.subplots(
            1, len(panels), figsize=(4.4 * len(panels) + 0.4, 3.7), squeeze=False, layout="constrained"
        )
        for axis, (job, value, label) in zip(axes[0], panels, strict=True):
            for encoding in runs:
                base, gain, _ = encoding.partition("+")
                axis.plot(
                    lengths,
                    curve(runs, encoding, job, value, lengths),
                    marker="o",
                    markersize=4,
                    color=COLOURS[base],
                    linestyle="--" if gain else "-",
                    label=LABELS.get(base, base) + encoding[len(base) :],
                )
            axis.axvline(settings.train_length, color="0.6", linestyle="--", linewidth=1, zorder=0)
            place = (settings.train_length, 0.5)
            note(axis, f"trained at {settings.train_length:,}", place, ("data", "axes fraction"), rotation=90)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
            axis.set_xlabel("context in bytes")
            axis.set_ylabel(label)
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
            if job != "text":
                axis.set_ylim(-0.03, 1.05)
                chance = tasks.TASKS[job].chance
                axis.axhline(chance, color="0.6", linestyle=":", linewidth=1, zorder=0)
                note(axis, "a guess", (lengths[0], chance), "data")
        axes[0, 0].legend(frameon=False)
        drawing.supxlabel(caption, fontsize=7.5, color="0.35")
        write_whole(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))
        pyplot.close(drawing)


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


# --- the command ------------------------------------------------------------------------------------------------------


BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {"steps": 400, "batch": 16, "windows": 64, "samples": 8, "seeds": [0]},
    "full": {"steps": 4000, "batch": 32, "windows": 256, "samples": 32, "seeds": [0, 1, 2]},
}


def parser() -> argparse.ArgumentParser:
    """Its defaults are the study of --quick; without it only the budget is larger (see `BUDGETS`)."""
    p = argparse.ArgumentParser(
        prog="python -m bench.extrapolation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"encodings: {', '.join(name for name in ENCODINGS if '+' not in name)};\n"
        "           all but alibi also with a query gain, as in log-bias+gain\n"
        f"tasks:     {'; '.join(f'{name} ({task.summary})' for name, task in tasks.TASKS.items())}",
    )
    quick, full = BUDGETS["quick"], BUDGETS["full"]

    def by_budget(name: str) -> str:
        large, small = (" ".join(map(str, b[name])) if name == "seeds" else b[name] for b in (full, quick))
        return f"(default {large}, with --quick {small})"

    p.add_argument("--quick", action="store_true", help="the small budget: minutes on two CPU cores")
    p.add_argument(
        "--encodings",
        nargs="+",
        choices=ENCODINGS,
        metavar="NAME",
        default=["rope", "alibi", "log-bias"],
        help="which to compare, see below (default: rope alibi log-bias)",
    )
    p.add_argument(
        "--tasks",
        nargs="*",
        choices=tasks.TASKS,
        metavar="NAME",
        default=["needle"],
        help="retrieval tasks, see below (default: needle)",
    )
    p.add_argument("--corpus", default="stdlib", metavar="stdlib|DIR", help="the standard library or a folder of text")
    p.add_argument("--train-length", type=int, default=128, metavar="N", help="bytes (default 128)")
    p.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        default=[128, 256, 512, 1024, 2048, 4096],
        help="context lengths to score at, bytes (default 128 to 4096)",
    )
    p.add_argument("--steps", type=int, metavar="N", help=f"of training {by_budget('steps')}; tasks take a share of it")
    p.add_argument("--batch", type=int, metavar="N", help=f"windows per step {by_budget('batch')}")
    p.add_argument("--windows", type=int, metavar="N", help=f"of held-out text {by_budget('windows')}")
    p.add_argument("--samples", type=int, metavar="N", help=f"questions per length and depth {by_budget('samples')}")
    p.add_argument("--seeds", type=int, nargs="+", metavar="N", help=f"one run each {by_budget('seeds')}")
    p.add_argument("--qk-norm", action="store_true", help="normalise queries and keys (log-invariant assumes it)")
    p.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    p.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes, as Ctrl-C does")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for JSON and PNG (default bench/results)")
    p.add_argument("--fresh", action="store_true", help="measure everything again")
    return p


def main(arguments: Sequence[str] | None = None, shape: Shape | None = None) -> int:
    """Exit status 0: all measured. 130: stopped early; the same command goes on."""
    p = parser()
    args = p.parse_args(arguments)
    for name, value in BUDGETS["quick" if args.quick else "full"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    lengths = tuple(sorted(set(args.lengths)))
    if min(args.steps, args.batch, args.windows, args.samples) < 1 or min(args.train_length, *lengths) < 8:
        p.error("counts must be 1 or more, lengths 8 or more")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(args.device)
    try:
        text = corpus.load(args.corpus)
        settings = Settings(
            corpus=text.digest,
            device=device_name(device),
            versions={"torch": torch.__version__, "logpe": logpe.__version__},
            shape=shape or Shape(qk_norm=args.qk_norm),
            train_length=args.train_length,
            lengths=lengths,
            steps=args.steps,
            batch=args.batch,
            windows=args.windows,
            target=min(64, lengths[0] // 2),
            samples=args.samples,
        )
        reading = Text(text, settings)
    except ValueError as error:
        p.error(str(error))
    jobs: dict[str, Job] = {"text": reading}
    jobs |= {name: Retrieval(tasks.TASKS[name], settings) for name in args.tasks}
    command = ["python", "-m", "bench.extrapolation", *(sys.argv[1:] if arguments is None else arguments)]
    stamp = {"commit": commit(), "threads": torch.get_num_threads()}
    about = {
        "key": settings.key,
        "command": shlex.join(command),
        **stamp,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "corpus": {**text.describe(), "windows": len(reading.windows)},
        "settings": asdict(settings),
    }
    name = "extrapolation-quick" if args.quick else "extrapolation"
    results = Results(results_path(args.out, name, settings.key), about, args.fresh)
    status = 0
    try:
        measure(results, settings, jobs, args.encodings, args.seeds, device, args.minutes, stamp)
    except KeyboardInterrupt:
        status = 130
    runs = results.runs
    shown = [task for task in tasks.TASKS if any(task in run for seeds in runs.values() for run in seeds.values())]
    source = f"Python {platform.python_version()}'s standard library" if args.corpus == "stdlib" else text.name
    print("\n" + table(runs, settings, shown))
    if results.path.exists():
        print(f"\nMeasured in {seconds(runs) / 60:.1f} minutes: {results.path}")
        picture = results.path.with_suffix(".png")
        try:
            figure(picture, runs, settings, shown, caption(runs, reading, source, settings))
            print(picture)
        except ImportError:
            print("No figure: matplotlib is not installed.")
    if status:
        print("Stopped early; the same command (without --fresh) goes on from here.")
    return status


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
