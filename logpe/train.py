"""Train a causal language model with log positions on a text: a folder of files, one file, or a dataset on disk.

    python -m logpe train my_texts --out my_model
    torchrun --nproc-per-node=2 -m logpe train my_texts --out my_model

Bytes are the tokens, unless --tokenizer names a file of the library tokenizers. One document in ten, by a hash of its
path, is held out and scored with ever more context, beyond the length of training.

Whatever ends the command, Ctrl-C, the time limit or the machine: the same command goes on from the last checkpoint,
and arrives at the same model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import logpe
from logpe import checkpoint, language_model, text
from logpe.language_model import LanguageModel, Shape

Result = TypeVar("Result")


def _option(default: Any, help_: str, shown: str = "%(default)s", **more: Any) -> Any:
    return field(default=default, metadata=dict(help=f"{help_} ({shown})", **more))


@dataclass(frozen=True)
class Settings:
    """All that the losses depend on, but for the text and the machine; each is an option of the command."""

    preset: str = _option("log-bias-rope", "position of every layer", choices=logpe.PRESETS)
    query_gain: bool = _option(False, "scores of a query grow with the log of its position")
    rotary_scale: float | None = _option(
        None, "c of positions c log(1 + n / c), inf is ordinary RoPE", shown="preset's"
    )
    rotary_fraction: float | None = _option(None, "share of a head that is rotated", shown="preset's")
    rotary_base: float | None = _option(None, "of the rotary frequencies", shown="preset's")
    gain_length: float = _option(512.0, "n0 of the query gain, in tokens")
    dim: int = _option(256, "width of the model")
    layers: int = _option(6, "its depth")
    heads: int = _option(4, "attention heads of a layer")
    qk_norm: bool = _option(False, "normalise queries and keys, as log-invariant assumes")
    length: int = _option(512, "tokens of a window to train on")
    batch: int = _option(32, "windows of a step, over all processes")
    steps: int = _option(2000, "how many")
    warmup: int = _option(100, "steps in which the learning rate rises")
    learning_rate: float = _option(2e-3, "its peak; a cosine brings it to a tenth")
    weight_decay: float = _option(0.1, "of all but the position parameters")
    clip: float = _option(1.0, "largest norm of the gradient")
    seed: int = _option(0, "of the weights and of the order of the text")

    def __post_init__(self) -> None:
        for name in ("length", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{_flag(name)} must be positive, got {getattr(self, name)}")

    def position(self) -> dict[str, Any]:
        """LogPosition's keywords."""
        names = ("preset", "query_gain", "rotary_scale", "rotary_fraction", "rotary_base", "gain_length")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def model(self, vocabulary: int) -> LanguageModel:
        """As it is before the first step. Raises ValueError."""
        shape = Shape(self.dim, self.layers, self.heads, self.qk_norm, vocabulary)
        return LanguageModel(shape, self.position(), self.seed)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        progress = max(0, step + 1 - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * rising * (0.55 + 0.45 * math.cos(math.pi * progress))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- processes --------------------------------------------------------------------------------------------------------


class World:
    """This process among those that torchrun started, or alone; a context manager."""

    def __init__(self, device: str) -> None:
        self.parallel = "RANK" in os.environ and "MASTER_ADDR" in os.environ
        self.rank = int(os.environ["RANK"]) if self.parallel else 0
        self.size = int(os.environ["WORLD_SIZE"]) if self.parallel else 1
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"--device {device}: there is no GPU here, or this build of torch does not see it")
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if self.parallel else 0)
            torch.cuda.set_device(self.device)

    def __enter__(self) -> World:
        if self.parallel:
            # The first process may tokenise for long, while the others wait.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        return self

    def __exit__(self, *_: object) -> None:
        if self.parallel:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Of each value, over the processes."""
        if not self.parallel:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def once(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returned, or the OSError or ValueError that it raised, in the first process, for all."""
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except (OSError, ValueError) as error:
                answer[1] = error
        if self.parallel:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def wrap(self, model: LanguageModel, fsdp: bool) -> nn.Module:
        """The model for many processes. All parameters are float32: autocast lowers the precision, not the sharding."""
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*model.blocks, model):
                fully_shard(module, mesh=mesh)
            return model
        if self.parallel:
            devices = [self.device] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=devices)
        return model


class Stop:
    """Whether to stop after the step in hand: the time is over, or a signal came. Ctrl-C twice stops at once."""

    def __init__(self, minutes: float | None, impatient: bool) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.impatient, self.signalled = impatient, False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signalled and self.impatient:
            raise KeyboardInterrupt
        self.signalled = True

    def __enter__(self) -> Stop:
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Now."""
        return self.signalled or time.monotonic() > self.deadline


# --- state ------------------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    tokenizer: Path | None,
    keep: int,
    world: World,
) -> None:
    """A checkpoint of what a step left; all processes call it.

    The step also stands for the learning rate, the place in the text and the state of the random numbers, all of
    which follow from it. The files do not tell how many processes wrote them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = states.get_model_state_dict(model, options=options)
    moments: Any = states.get_optimizer_state_dict(model, optimizer, options=options)
    if not world.first:
        return
    config = (model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model).config

    def write(folder: Path) -> None:
        try:
            save_file(weights, folder / "model.safetensors")
            tensors = {f"{name}.{kind}": x for name, state in moments["state"].items() for kind, x in state.items()}
            save_file(tensors, folder / "optimizer.safetensors")
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from None
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.json")

    checkpoint.save(root, step, write, about, keep)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of ``save``, in every process."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(full_state_dict=dist.is_initialized())
    weights: Any = load_file(folder / "model.safetensors")
    states.set_model_state_dict(model, weights, options=options)
    # Of its own state, the optimiser keeps the groups: Settings hold what is in them.
    moments: Any = states.get_optimizer_state_dict(model, optimizer)
    moments["state"] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, _, kind = name.rpartition(".")
        moments["state"].setdefault(parameter, {})[kind] = tensor
    states.set_optimizer_state_dict(model, optimizer, moments, options=options)


class Metrics:
    """A JSON object per line and step, appended at once."""

    def __init__(self, path: Path, steps: int) -> None:
        """Keeps the lines of the first ``steps`` steps, if there is a file."""
        self.path = path
        kept = [json.dumps(record) + "\n" for record in self.read() if record["step"] <= steps]
        checkpoint.write_whole(path, lambda temporary: temporary.write_text("".join(kept)))
        self.file = path.open("a")

    def append(self, record: dict[str, Any]) -> None:
        """Safe from the end of the process, though not yet of the machine."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Safe from the end of the machine too: before a checkpoint, which must not know more than this file."""
        os.fsync(self.file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records; a process that was killed may have left half a line, which does not count."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records


# --- training ---------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, tokens: Tensor, half: bool, last: int | None = None) -> Tensor:
    """Losses in nats, float32 (B, last or N), of the last of the tokens int64 (B, N + 1), each given those before."""
    # The cache would keep copies of sharded weights.
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        logits = model(tokens[:, :-1], last)
    return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, -logits.shape[1] :], reduction="none")


def gradients(
    model: nn.Module, windows: text.Windows, settings: Settings, step: int, options: Any, world: World
) -> float:
    """Adds up the gradients of a step; returns the mean loss of this process's windows, in nats."""
    share = settings.batch // (world.size * options.accumulate)  # windows of one pass in one process
    total = 0.0
    for turn in range(options.accumulate):
        first = step * settings.batch + (turn * world.size + world.rank) * share
        tokens = windows(range(first, first + share)).to(world.device)
        final = turn == options.accumulate - 1
        waiting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(model, nn.parallel.DistributedDataParallel) and not final:
            waiting = model.no_sync()
        elif options.fsdp:
            model.set_requires_gradient_sync(final)  # type: ignore[operator]
        with waiting:
            loss = predict(model, tokens, options.half).mean() / options.accumulate
            loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, lengths: list[int], target: int, half: bool, world: World
) -> dict[str, float]:
    """Nats per token of the last ``target`` tokens of each window, by how many tokens the model reads."""
    model.eval()
    found = {}
    # As many windows in each process, as sharded models want: some are read twice, and counted once.
    mine = torch.arange(world.rank, math.ceil(len(windows) / world.size) * world.size, world.size)
    for length in lengths:
        together = max(1, (8192 if world.device.type == "cpu" else 131072) // length)
        total = 0.0
        for numbers in mine.split(together):
            tokens = windows[numbers % len(windows), -length - 1 :].to(world.device)
            losses = predict(model, tokens, half, target).double().mean(dim=1).cpu()
            total += losses[numbers < len(windows)].sum().item()
        found[str(length)] = world.sum(total)[0] / len(windows)
    model.train()
    return found


def train(settings: Settings, options: argparse.Namespace, world: World, say: Callable[[str], object]) -> bool:
    """From the newest checkpoint, if there is one, to the last step or an earlier stop; True at the last step.

    Raises ValueError, OSError for what is wrong with options, text, folder or checkpoints, FloatingPointError where
    the loss is no number.
    """
    if settings.batch % (world.size * options.accumulate):
        raise ValueError(
            f"--batch must be a multiple of processes x --accumulate, {world.size} x {options.accumulate}, "
            f"got {settings.batch}"
        )
    if options.fsdp and not world.parallel:
        raise ValueError("--fsdp needs torchrun: torchrun --nproc-per-node=2 -m logpe train ...")
    if options.dtype == "auto":
        options.half = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        options.half = options.dtype == "bfloat16"
    checkpoints, data = options.out / "checkpoints", options.out / "tokens.safetensors"
    start = world.once(lambda: find_start(settings, options, checkpoints, data))
    words = text.load(data)
    windows = text.Windows(words.train, settings.length, settings.seed)
    held_out, lengths = text.test_windows(words, options.lengths, options.windows)
    if lengths != options.lengths:
        say(f"evaluated at {', '.join(map(str, lengths))}: no held-out document is longer")

    model = settings.model(words.vocabulary).to(world.device)
    parameters = sum(p.numel() for p in model.parameters())
    wrapped = world.wrap(model, options.fsdp)
    groups = logpe.parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    first = 0
    if start is not None:
        folder, first = start
        restore(folder, wrapped, optimizer)
        say(f"going on from {folder}")
    passes = settings.steps * settings.batch / windows.count
    say(
        f"{parameters:,} parameters, {len(words.train):,} tokens ({passes:.3g} passes), "
        f"{world.size} x {world.device.type}, {'bfloat16' if options.half else 'float32'}"
    )
    about = dict(
        settings=asdict(settings), text=dict(origin=words.origin, sha256=words.sha256), processes=world.size,
        logpe=logpe.__version__, torch=torch.__version__, python=platform.python_version(),
    )  # fmt: skip
    metrics = Metrics(options.out / "metrics.jsonl", first) if world.first else None
    finished = first == settings.steps
    progress = tqdm(
        total=settings.steps, initial=first, unit="step", disable=not world.first, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip
    with Stop(options.minutes, impatient=not world.parallel) as stop, progress:
        for step in range(first, settings.steps):
            begin = time.perf_counter()
            torch.manual_seed(1_000_003 * (settings.seed * world.size + world.rank) + step)  # nothing else is random
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            optimizer.zero_grad()
            loss = gradients(wrapped, windows, settings, step, options, world)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            loss, asked = world.sum(loss / world.size, float(stop.asked()))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step + 1}: a lower --learning-rate or a longer --warmup may help"
                )
            done = step + 1
            finished = done == settings.steps
            record: dict[str, Any] = dict(step=done, loss=loss, learning_rate=settings.rate(step))
            record["gradient_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            record["seconds"] = round(time.perf_counter() - begin, 4)
            if finished or done % options.evaluate_every == 0:
                scores = evaluate(wrapped, held_out, lengths, options.target, options.half, world)
                record["evaluation"] = scores
            if metrics is not None:
                metrics.append(record)
                if finished or asked or done % options.save_every == 0:
                    metrics.sync()
            if finished or asked or done % options.save_every == 0:
                save(checkpoints, done, wrapped, optimizer, about, options.tokenizer, options.keep, world)
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            progress.update()
            if asked:
                break
    if metrics is not None:
        found = checkpoint.newest(checkpoints)
        assert found is not None
        end = 0 if options.tokenizer is None else words.vocabulary - 1
        language_model.save_pretrained(language_model.load(found[0]), options.out / "transformers", end)
        if options.tokenizer is not None:
            shutil.copyfile(options.tokenizer, options.out / "transformers" / "tokenizer.json")
        plot(options.out / "loss.png", metrics.read(), settings, say)
    return finished


def find_start(
    settings: Settings, options: argparse.Namespace, checkpoints: Path, data: Path
) -> tuple[Path, int] | None:
    """Makes the folder ready, tokens included; returns the newest checkpoint and its step, or None without one."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(options.out / ".writable", lambda path: path.touch())
        (options.out / ".writable").unlink()
    except OSError as error:
        raise OSError(f"--out {options.out} cannot be written: {error.strerror}") from None
    if options.fresh:
        shutil.rmtree(checkpoints, ignore_errors=True)
    found = checkpoint.newest(checkpoints)
    checkpoint.tidy(checkpoints, options.keep)
    try:
        origin = text.describe_origin(options.text, options.tokenizer, options.split, options.column)
    except OSError as error:
        raise ValueError(f"--tokenizer {options.tokenizer} cannot be read: {error.strerror}") from None
    if found is None:
        text.prepare(data, options.text, options.tokenizer, options.split, options.column)
        return None
    folder, manifest = found
    advice = "name another --out, or give --fresh to start anew"
    now = {**json.loads(json.dumps(asdict(settings))), **origin}
    then = {**manifest["settings"], **manifest["text"]["origin"]}
    if changed := [f"{_flag(n)} was {then.get(n)!r}, now {now[n]!r}" for n in now if now[n] != then.get(n)]:
        raise ValueError(f"{folder} is of another training: {'; '.join(changed)}; {advice}")
    if not data.exists():
        text.prepare(data, options.text, options.tokenizer, options.split, options.column)
    if text.load(data).sha256 != manifest["text"]["sha256"]:
        raise ValueError(f"{folder} is of another training: the text in {options.text} has changed; {advice}")
    return folder, manifest["step"]


# --- what people look at ----------------------------------------------------------------------------------------------


def plot(path: Path, records: list[dict[str, Any]], settings: Settings, say: Callable[[str], object]) -> None:
    """Left: loss by step. Right: loss of held-out text by context."""
    try:
        import matplotlib
    except ImportError:
        say(f"{path.name} is left out: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    smooth: list[float] = []
    weight = 0.0
    for loss in losses:  # mean of about the last 30, each step back counting less
        weight = 1 + weight * 29 / 30
        smooth.append(loss if not smooth else smooth[-1] + (loss - smooth[-1]) / weight)
    scored = [(r["step"], r["evaluation"]) for r in records if "evaluation" in r]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.7), layout="constrained")
        left.plot(steps, losses, color="#009E73", alpha=0.3, linewidth=0.8)
        left.plot(steps, smooth, color="#009E73", label="training")
        left.set_xlabel("step")
        left.set_ylabel("nats per token")
        if scored:
            lengths = [int(n) for n in scored[-1][1]]
            for length, colour in ((lengths[0], "#0072B2"), (lengths[-1], "#D55E00")):
                points = [(step, scores[str(length)]) for step, scores in scored if str(length) in scores]
                left.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=f"held out, {length:,}")
            right.plot(lengths, list(scored[-1][1].values()), "o-", markersize=4, color="#000000")
            right.axvline(settings.length, color="0.6", linestyle="--", linewidth=1)
            right.set_xscale("log", base=2)
            right.set_xticks(lengths, [f"{n:,}" for n in lengths])
            right.minorticks_off()
            right.set_xlabel(f"tokens of context at step {scored[-1][0]:,}; dashed: trained at")
            right.set_ylabel("nats per token of the same held-out text")
        left.legend(frameon=False)
        for axis in (left, right):
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
        checkpoint.write_whole(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))
        pyplot.close(drawing)


# --- the command ------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Adds this command to what ``ArgumentParser.add_subparsers`` returned."""
    p = commands.add_parser(
        "train",
        help="train a language model on a text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=main)
    p.add_argument("text", type=Path, help="a folder of text files, a file, or a Hugging Face dataset on disk")
    p.add_argument("--out", type=Path, required=True, help=(
        "folder for checkpoints, metrics.jsonl, loss.png and, at the end, the model for Transformers"
    ))  # fmt: skip
    p.add_argument("--tokenizer", type=Path, metavar="JSON", help="of the library tokenizers (default: bytes)")
    p.add_argument("--split", default="train", help="of a dataset (%(default)s)")
    p.add_argument("--column", default="text", help="of a dataset (%(default)s)")
    model = p.add_argument_group("the training")
    for entry in fields(Settings):
        more: dict[str, Any] = dict(entry.metadata)
        if isinstance(entry.default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            kind = float if entry.default is None else type(entry.default)
            more |= dict(type=kind, metavar=None if "choices" in more else "N")
        model.add_argument(_flag(entry.name), default=entry.default, **more)
    machine = p.add_argument_group("the machine")
    machine.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    machine.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=(
        "of the matrix products (auto: bfloat16 on a GPU that has it); parameters are float32"
    ))  # fmt: skip
    machine.add_argument("--accumulate", type=_count, default=1, metavar="N", help="passes per step (%(default)s)")
    machine.add_argument("--fsdp", action="store_true", help="shard the model over the processes of torchrun")
    machine.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes, as Ctrl-C does")
    record = p.add_argument_group("the record")
    record.add_argument("--save-every", type=_count, default=200, metavar="N", help="steps (%(default)s)")
    record.add_argument("--keep", type=_count, default=2, metavar="N", help="newest checkpoints to keep (%(default)s)")
    record.add_argument("--evaluate-every", type=_count, default=200, metavar="N", help="steps (%(default)s)")
    record.add_argument("--lengths", type=_count, nargs="+", metavar="N", help=(
        "of context to evaluate at, in tokens (default: 1, 2, 4, 8 and 16 times the length of training)"
    ))  # fmt: skip
    record.add_argument("--windows", type=_count, default=32, metavar="N", help="to evaluate on (%(default)s)")
    record.add_argument("--target", type=_count, metavar="N", help=(
        "tokens scored at the end of each, the same at every length (default: a quarter of the shortest)"
    ))  # fmt: skip
    record.add_argument("--fresh", action="store_true", help="drop the checkpoints in --out and start anew")


def _count(argument: str) -> int:
    value = int(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(options: argparse.Namespace) -> int:
    """The command; returns its exit status: 0 also where it stopped early and saved."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        print("train needs the library safetensors: pip install 'logpe[train]'", file=sys.stderr)
        return 2
    try:
        world = World(options.device)
        settings = Settings(**{entry.name: getattr(options, entry.name) for entry in fields(Settings)})
        options.lengths = sorted(set(options.lengths or (settings.length << power for power in range(5))))
        options.target = options.target or max(1, min(options.lengths) // 4)
        if options.target > min(options.lengths):
            raise ValueError(f"--target must be at most the shortest of --lengths, {min(options.lengths)}")

        def say(message: str) -> None:
            if world.first:
                tqdm.write(message, file=sys.stderr)

        with world:
            if train(settings, options, world, say):
                say(f"done: {options.out}")
            else:
                say("stopped; the same command goes on from here")
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
