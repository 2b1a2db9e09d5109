"""Train a causal language model with log positions on text: folders of files, files, or datasets on disk.

    python -m logpe train my_texts --out my_model
    torchrun --nproc-per-node=2 -m logpe train my_texts --out my_model

Bytes are the tokens, unless --tokenizer names a file of the library tokenizers. One document in ten, by a hash of its
path, is held out and scored with ever more context, beyond the length of training. What is left out of a text (hidden
files, binary files, copies, the output of trainings) is counted and named.

Whatever ends the command, Ctrl-C, the time limit or the machine: the same command resumes from the last checkpoint,
and arrives at the same model. With a larger --steps it resumes, too, even a finished run: the learning rate then
follows the longer cosine from there on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import logpe
from logpe import files
from logpe.command import STOPPED, TIME_IS_OVER, count, find_device, minutes
from logpe.files import Busy
from logpe.lm import checkpoint, text
from logpe.lm import model as language_model
from logpe.lm.loop import Stop, Training, unwrapped
from logpe.lm.model import LanguageModel, Shape

Result = TypeVar("Result")

#: Settings that LogPosition takes, and all that say what the model is.
POSITION = ("preset", "query_gain", "rotary_scale", "rotary_fraction", "rotary_base", "gain_length", "reach")
ARCHITECTURE = (*POSITION, "dim", "layers", "heads", "qk_norm", "sink")


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
    rotary_base: float | None = _option(None, "base of the rotary frequencies", shown="preset's")
    gain_length: float = _option(512.0, "n0 of the query gain, in tokens; take it well below --length")
    reach: float | None = _option(None, "keep half of each head's weight within so many tokens", shown="no bound")
    dim: int = _option(256, "width of the model")
    layers: int = _option(6, "blocks of the model")
    heads: int = _option(4, "attention heads of a layer")
    qk_norm: bool = _option(False, "normalise queries and keys, as log-invariant assumes")
    sink: bool = _option(False, "give each head one more key, without a position, for queries that match nothing")
    length: int = _option(512, "tokens of a window to train on")
    batch: int = _option(32, "windows of a step, over all processes")
    steps: int = _option(2000, "optimiser steps in all")
    warmup: int = _option(100, "steps in which the learning rate rises")
    learning_rate: float = _option(2e-3, "its peak; a cosine brings it to a tenth")
    weight_decay: float = _option(0.1, "AdamW's, of all but the position parameters")
    clip: float = _option(1.0, "largest norm of the gradient, which is clipped")
    seed: int = _option(0, "for the weights and the order of the text")

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "length", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be from 0 to 2**31 - 1, got {self.seed}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be positive and finite, got {self.learning_rate}")
        if not self.clip > 0:
            raise ValueError(f"--clip must be positive, got {self.clip}")

    def position(self) -> dict[str, Any]:
        """Return LogPosition's keywords."""
        return {name: value for name in POSITION if (value := getattr(self, name)) is not None}

    def model(self, vocabulary: int) -> LanguageModel:
        """Return the model as it is before the first step. Raises ValueError for what cannot be built."""
        shape = Shape(self.dim, self.layers, self.heads, self.qk_norm, vocabulary, self.sink)
        return LanguageModel(shape, self.position(), self.seed)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        progress = max(0, step + 1 - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * rising * (0.55 + 0.45 * math.cos(math.pi * progress))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- processes --------------------------------------------------------------------------------------------------------


class World:
    """This process among those that torchrun started, or alone; a context manager.

    Args:
        device: "auto" or the name of one.
        context: the number of processes that share the tokens of each window. Groups of so many share the windows.
    """

    def __init__(self, device: str, context: int = 1) -> None:
        self.context = context
        self.context_parallel: logpe.ContextParallel | None = None
        self.parallel = "RANK" in os.environ and "MASTER_ADDR" in os.environ
        self.rank = int(os.environ["RANK"]) if self.parallel else 0
        self.size = int(os.environ["WORLD_SIZE"]) if self.parallel else 1
        self.device = find_device(device, int(os.environ.get("LOCAL_RANK", 0)) if self.parallel else 0)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def __enter__(self) -> World:
        if self.parallel:
            # The first process may tokenise for long, while the others wait.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
            if self.context > 1 and self.size % self.context == 0:
                mesh = dist.init_device_mesh(
                    self.device.type, (self.copies, self.context), mesh_dim_names=("data", "context")
                )
                self.context_parallel = logpe.ContextParallel(mesh["context"], reduction="mean")
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self.parallel:
            # DDP and FSDP keep gloo's threads alive. If one still waits for Python's lock when the interpreter ends
            # (it needs the lock to drop a tensor), it aborts the process. It gets the lock while we wait here.
            if error is None and self.device.type == "cpu":
                dist.barrier()
            dist.destroy_process_group()

    @property
    def copies(self) -> int:
        """Among how many the windows are shared out."""
        return self.size // self.context

    @property
    def copy(self) -> int:
        """Which of them this process belongs to."""
        return self.rank // self.context

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over the processes."""
        if not self.parallel:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def once(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the first process; in all, return its result, or raise its OSError, ValueError or Busy."""
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except (OSError, ValueError, Busy) as error:
                answer[1] = error
        if self.parallel:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def wrap(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """Return the model for many processes. Its parameters stay float32: autocast lowers precision, not sharding."""
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
            for module in (*blocks, model):
                fully_shard(module, mesh=mesh)
            return model
        if self.parallel:
            devices = [self.device] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=devices)
        return model


# --- the record ------------------------------------------------------------------------------------------------------


class Metrics:
    """The file of metrics: a JSON object per line and step, appended at once.

    Args:
        path: the file.
        steps: keep the lines of the first so many, if there is a file.
        board: a folder for TensorBoard, or None.
        say: told of lines that are no records, and left out.
    """

    def __init__(self, path: Path, steps: int, board: Path | None, say: Callable[[str], object]) -> None:
        self.path = path
        kept = [json.dumps(record) + "\n" for record in self.read(say) if record["step"] <= steps]
        files.write_whole(path, lambda temporary: temporary.write_text("".join(kept)))
        self.file = path.open("a")
        self.writer: Any = None
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(board), purge_step=steps + 1)

    def append(self, record: dict[str, Any], tokens: int) -> None:
        """Append a record of a step with so many tokens; it survives the process, though not yet the machine."""
        with files.naming(self.path):
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        if self.writer is not None:
            values = {"loss/training": record["loss"], "tokens per second": tokens / max(record["seconds"], 1e-9)}
            values |= {name.replace("_", " "): record[name] for name in ("learning_rate", "gradient_norm")}
            values |= {f"loss/held out, {n} tokens": loss for n, loss in record.get("evaluation", {}).items()}
            for name, value in values.items():
                self.writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Make all survive the machine too: before a checkpoint, which must not know more than this file."""
        with files.naming(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def read(self, say: Callable[[str], object] | None = None) -> list[dict[str, Any]]:
        """Return all records, without half a line at the end, which a process that was killed may have left."""
        records, lines = [], self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not (isinstance(record["step"], int) and isinstance(record["loss"], float)):
                    raise TypeError
                records.append(record)
            except (ValueError, KeyError, TypeError):
                if say is not None and number < len(lines):
                    say(f"{self.path}: line {number} is no record, and left out")
        return records


# --- training ---------------------------------------------------------------------------------------------------------


def predict(
    model: nn.Module,
    tokens: Tensor,
    half: bool,
    last: int | None = None,
    parallel: logpe.ContextParallel | None = None,
) -> Tensor:
    """Return losses in nats, float32 (B, last or N), of tokens int64 (B, N + 1).

    They are those of the last tokens, or of all but the first. With ``parallel``, of this process's tokens alone.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    asked = last
    if parallel is not None:  # this process's tokens, those that count among them
        length, last = targets.shape[1], None
        inputs, targets = parallel.shard(inputs, 1), parallel.shard(targets, 1)
    # The cache would keep copies of sharded weights.
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        if isinstance(unwrapped(model), LanguageModel):
            logits = model(inputs, last)
        else:  # of Transformers
            logits = model(inputs, use_cache=False, logits_to_keep=last or 0).logits
    if last is not None:
        targets = targets[:, -last:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    if parallel is not None and asked is not None:
        losses = losses[:, parallel.positions(length, losses.device) >= length - asked]
    return losses


def gradients(
    model: nn.Module, windows: text.Windows, settings: Settings, step: int, options: Any, world: World
) -> float:
    """Add up the gradients of a step; return the mean loss of this process's windows, in nats."""
    share = settings.batch // (world.copies * options.accumulate)  # windows of one pass in one process
    count = share * settings.length / world.context  # its tokens, on average
    total = 0.0
    for turn in range(options.accumulate):
        first = step * settings.batch + (turn * world.copies + world.copy) * share
        tokens = windows(range(first, first + share)).to(world.device)
        final = turn == options.accumulate - 1
        waiting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(model, nn.parallel.DistributedDataParallel) and not final:
            waiting = model.no_sync()
        elif options.fsdp:
            model.set_requires_gradient_sync(final)  # type: ignore[operator]
        with waiting:
            losses = predict(model, tokens, options.half, parallel=world.context_parallel)
            loss = losses.sum() / count / options.accumulate
            loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, lengths: list[int], target: int, half: bool, world: World
) -> dict[str, float]:
    """Return nats per token of the last ``target`` tokens of each window, by how many tokens the model reads."""
    model.eval()
    scores = {}
    # As many windows in each process, as sharded models want: some are read twice, and counted once.
    mine = torch.arange(world.copy, math.ceil(len(windows) / world.copies) * world.copies, world.copies)
    for length in lengths:
        together = max(1, (8192 if world.device.type == "cpu" else 131072) // length)
        total = 0.0
        for numbers in mine.split(together):
            tokens = windows[numbers % len(windows), -length - 1 :].to(world.device)
            losses = predict(model, tokens, half, target, world.context_parallel).cpu().double().sum(dim=1) / target
            total += losses[numbers < len(windows)].sum().item()
        scores[str(length)] = world.sum(total)[0] / len(windows)
    model.train()
    return scores


def attend_across(model: nn.Module, parallel: logpe.ContextParallel) -> None:
    """Let every attention of a model go over the tokens of all processes of ``parallel``."""
    if not isinstance(model, LanguageModel):
        from logpe.transformers import set_context_parallel

        set_context_parallel(model, parallel)
        return
    for module in model.modules():
        if isinstance(module, language_model.Attention):
            module.context_parallel = parallel


def train(settings: Settings, options: argparse.Namespace, world: World, say: Callable[[str], object]) -> int:
    """Train from the newest checkpoint, if there is one, to the last step or an earlier stop; return the exit status.

    Raises:
        ValueError, OSError: options, text, folder or checkpoints cannot be used.
        Busy: another process trains in the folder.
        FloatingPointError: losses or weights are no longer finite.
    """
    if world.size % world.context:
        started = f"{world.size} processes" if world.parallel else "one process without torchrun"
        raise ValueError(f"--context-parallel must divide the number of processes, got {world.context} and {started}")
    if settings.batch % (world.copies * options.accumulate):
        processes = "processes" if world.context == 1 else "(processes / --context-parallel)"
        raise ValueError(
            f"--batch must be a multiple of {processes} x --accumulate, {world.copies} x {options.accumulate}, "
            f"got {settings.batch}"
        )
    if options.fsdp and not world.parallel:
        raise ValueError("--fsdp needs torchrun: torchrun --nproc-per-node=2 -m logpe train ...")
    if options.dtype == "auto":
        options.half = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        options.half = options.dtype == "bfloat16"
    checkpoints, data = options.out / "checkpoints", options.out / "tokens.safetensors"
    start = world.once(lambda: find_start(settings, options, checkpoints, data, say))
    tokens = text.load_tokens(data)
    windows = text.Windows(tokens.train, settings.length, settings.seed)
    held_out, lengths = text.held_out_windows(tokens, options.lengths, options.windows)
    if lengths != options.lengths:
        say(f"evaluated at {', '.join(map(str, lengths))}: no held-out document is longer")

    if options.init_from is None:
        model: nn.Module = settings.model(tokens.vocabulary)
    else:  # a checkpoint holds the architecture too
        model = language_model.load_model(options.init_from if start is None else start)
    model.to(world.device)
    if world.context_parallel is not None:
        attend_across(model, world.context_parallel)
    parameters = sum(p.numel() for p in model.parameters())
    wrapped = world.wrap(model, options.fsdp)
    groups = logpe.parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    training = Training(
        wrapped, optimizer, settings.learning_rate_at, settings.steps, checkpoints, settings.clip, options.keep,
        world.once,
    )  # fmt: skip
    if start is not None:
        training.restore(start)
        say(f"going on from {start}")
    elif options.init_from is not None:
        say(f"starting from the weights of {options.init_from}")
    passes = settings.steps * settings.batch / windows.count
    say(
        f"{parameters:,} parameters, {len(tokens.train):,} tokens ({passes:.3g} passes), "
        f"{world.size} x {world.device.type}, {'bfloat16' if options.half else 'float32'}"
    )
    about = dict(
        settings=asdict(settings), text=dict(origin=tokens.origin, sha256=tokens.sha256), processes=world.size,
        init_from=options.given,
        logpe=logpe.__version__, torch=torch.__version__, python=platform.python_version(),
    )  # fmt: skip

    def save() -> None:
        def add_tokenizer(folder: Path) -> None:
            config: Any = unwrapped(model).config
            written = json.dumps(config, indent=1) if isinstance(config, dict) else config.to_json_string()
            (folder / "config.json").write_text(written.strip() + "\n")
            if options.tokenizer is not None:
                shutil.copyfile(options.tokenizer, folder / "tokenizer.json")

        training.save(about, add_tokenizer)

    def backward(step: int) -> float:
        torch.manual_seed(1_000_003 * (settings.seed * world.size + world.rank) + step)  # nothing else is random
        return gradients(wrapped, windows, settings, step, options, world)

    if options.fresh:  # now that nothing is left to refuse
        world.once(lambda: shutil.rmtree(checkpoints) if checkpoints.exists() else None)
    board = options.out / "tensorboard" if options.tensorboard else None
    metrics = Metrics(options.out / "metrics.jsonl", training.done, board, say) if world.first else None
    step_tokens = settings.batch * settings.length
    progress = tqdm(
        total=settings.steps, initial=training.done, unit="step", disable=not world.first, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip
    losses, seconds, told = 0.0, 0.0, training.done  # since the last evaluation, which tells their means
    signalled = False
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    with Stop(deadline, impatient=not world.parallel) as stop, progress:
        for step in training.run(backward):
            norm = float(step.gradient_norm)
            loss, signals, late = world.sum(step.loss / world.size, float(stop.signalled), float(stop.late))
            signalled, stopping = signals > 0, signals + late > 0
            finished = step.number == settings.steps
            saving = finished or stopping or step.number % options.save_every == 0
            learning_rate = settings.learning_rate_at(step.number - 1)
            record: dict[str, Any] = dict(
                step=step.number, loss=loss, learning_rate=learning_rate, gradient_norm=norm,
                seconds=round(time.perf_counter() - step.start, 4),
            )  # fmt: skip
            scores: dict[str, float] = {}
            if finished or step.number % options.evaluate_every == 0:
                scores = evaluate(wrapped, held_out, lengths, options.target, options.half, world)
                record["evaluation"] = scores
            elif saving:  # the loss is of the weights before this step
                scores = evaluate(wrapped, held_out[:1], lengths[:1], options.target, options.half, world)
            if wrong := _not_finite(loss, norm, scores, model, world):
                kept = f"; {checkpoints} has what came before" if checkpoints.exists() else ""
                raise FloatingPointError(
                    f"{wrong} at step {step.number}{kept}. Start anew with a lower --learning-rate or a longer "
                    "--warmup, and --fresh"
                )
            if metrics is not None:
                metrics.append(record, step_tokens)
                if saving:
                    metrics.sync()
            if saving:
                save()
            losses, seconds = losses + loss, seconds + record["seconds"]
            speed = step_tokens * (step.number - told) / max(seconds, 1e-9)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            progress.update()
            if "evaluation" in record:
                held = ", ".join(f"{score:.4f} at {int(n):,}" for n, score in scores.items())
                say(f"step {step.number:,}: training {losses / (step.number - told):.4f}, held out {held} "
                    f"nats per token; {speed:,.0f} tokens/s")  # fmt: skip
                losses, seconds, told = 0.0, 0.0, step.number
            if stopping:
                break
    if metrics is not None:
        metrics.close()
    world.once(lambda: export(checkpoints, options, tokens.vocabulary, settings, metrics, say))
    if training.done == settings.steps:
        say(f"done: {options.out}")
        return 0
    say(f"{'stopped' if signalled else 'the time is over'}; the same command resumes from here")
    return STOPPED if signalled else TIME_IS_OVER


def export(
    checkpoints: Path,
    options: argparse.Namespace,
    vocabulary: int,
    settings: Settings,
    metrics: Metrics | None,
    say: Callable[[str], object],
) -> None:
    """Write the folder for Transformers and the picture, from the newest checkpoint and the metrics."""
    newest = checkpoint.newest(checkpoints)
    assert newest is not None
    assert metrics is not None
    out = options.out / "transformers"
    model = language_model.load_model(newest[0])
    if isinstance(model, LanguageModel):
        language_model.save_pretrained(model, out, 0 if options.tokenizer is None else vocabulary - 1)
    else:
        out.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            files.write_whole(out / name, functools.partial(shutil.copyfile, newest[0] / name))
    if options.tokenizer is not None:
        files.write_whole(out / "tokenizer.json", functools.partial(shutil.copyfile, options.tokenizer))
    plot(options.out / "loss.png", metrics.read(), settings, say)


def _not_finite(loss: float, norm: float, scores: dict[str, float], model: nn.Module, world: World) -> str | None:
    """Return what is not finite after a step, the same in all processes, or None; ``scores`` are held-out losses."""
    values = {"the loss": loss, "the norm of the gradient": norm}
    values |= {f"the held-out loss at {n}": score for n, score in scores.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    if scores:  # before a checkpoint, and now and then
        local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
        if world.sum(float(sum(not x.detach().isfinite().all() for x in local)))[0]:
            return "a weight is not finite"
    return None


def find_start(
    settings: Settings, options: argparse.Namespace, checkpoints: Path, data: Path, say: Callable[[str], object]
) -> Path | None:
    """Make the tokens ready; return the newest checkpoint, or None where there is none."""
    if options.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise ValueError("--tensorboard needs the library tensorboard: pip install tensorboard") from None
    newest = None if options.fresh else checkpoint.newest(checkpoints)
    if not options.fresh:
        checkpoint.tidy(checkpoints, options.keep)
    try:
        origin = text.describe_origin(options.text, options.tokenizer, options.split, options.column)
    except OSError as error:
        raise ValueError(f"--tokenizer {options.tokenizer} cannot be read: {error.strerror}") from None

    def prepare() -> None:
        given: dict[str, Any] = {}
        if options.init_from is not None:
            given = _vocabulary(options.init_from if newest is None else newest[0], options.tokenizer)
        text.write_tokens(
            data, options.text, options.tokenizer, options.split, options.column, out=options.out, say=say, **given
        )

    if newest is None:
        prepare()
        return None
    folder, manifest = newest
    advice = "name another --out, or give --fresh to start anew"
    now = {**json.loads(json.dumps(asdict(settings))), **origin, "init_from": options.given}
    try:
        then = {
            **asdict(Settings()),  # an older one lacks newer options
            "init_from": manifest.get("init_from"),
            **manifest["settings"],
            **manifest["text"]["origin"],
        }
        sha256 = manifest["text"]["sha256"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder} is of another program; {advice}") from None
    if isinstance(then.get("steps"), int) and then["steps"] < now["steps"]:
        then["steps"] = now["steps"]
        if manifest["step"] == manifest["settings"]["steps"]:
            say(f"--steps was {manifest['step']:,}: the learning rate follows the cosine of {now['steps']:,} from here")
    shown = {n: "the text" if n == "source" else _flag(n) for n in now}
    if changed := [f"{shown[n]} was {then.get(n)!r}, now {now[n]!r}" for n in now if now[n] != then.get(n)]:
        raise ValueError(f"{folder} is of another training: {'; '.join(changed)}; {advice}")
    try:
        same = text.load_tokens(data, check=True).sha256 == sha256
    except (OSError, ValueError) as error:
        say(f"the tokens are made anew: {error}")
        prepare()
        same = text.load_tokens(data).sha256 == sha256
    if not same:
        raise ValueError(f"{folder} is of another training: the text in {_names(options.text)} has changed; {advice}")
    return folder


def _vocabulary(folder: Path, tokenizer: Path | None) -> dict[str, int]:
    """Return which id ends a document of the model in a folder, and how many ids there are, for text.write_tokens."""
    config = language_model.read_config(folder)
    if "shape" in config:
        size = config["shape"]["vocabulary"]
        end = size - 1
    else:
        size, end = config.get("vocab_size"), config.get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
    if tokenizer is None:
        end = end if "eos_token_id" in config and end is not None else 0
        if size != 256:
            raise ValueError(f"--init-from {folder} has a vocabulary of {size}, and bytes are 256: give --tokenizer")
    if not isinstance(size, int) or not isinstance(end, int):
        raise ValueError(f"--init-from {folder}: its config.json must hold vocab_size and eos_token_id")
    return dict(end=end, vocabulary=size)


def _names(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


# --- what people look at ----------------------------------------------------------------------------------------------


def plot(path: Path, records: list[dict[str, Any]], settings: Settings, say: Callable[[str], object]) -> None:
    """Draw, left, loss by step; right, loss of held-out text by context, once there is one."""
    try:
        import matplotlib
        from matplotlib import figure, ticker
    except ImportError:
        say(f"{path.name} is left out: pip install matplotlib")
        return

    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    smooth: list[float] = []
    weight = 0.0
    for loss in losses:  # mean of about the last 30, each step back counting less
        weight = 1 + weight * 29 / 30
        smooth.append(loss if not smooth else smooth[-1] + (loss - smooth[-1]) / weight)
    scored = [(r["step"], r["evaluation"]) for r in records if "evaluation" in r]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        drawing = figure.Figure(figsize=(9.2 if scored else 4.6, 3.7), layout="constrained")
        axes = drawing.subplots(1, 2 if scored else 1, squeeze=False)
        left, right = axes[0, 0], axes[0, -1]
        left.plot(steps, losses, color="#009E73", alpha=0.3, linewidth=0.8)
        left.plot(steps, smooth, "o-" if len(steps) == 1 else "-", markersize=3, color="#009E73", label="training")
        left.set_xlabel("step")
        left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        left.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
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
        for axis in axes[0]:
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
        files.write_whole(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))


# --- the command ------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``, what ``ArgumentParser.add_subparsers`` returned."""
    p = commands.add_parser(
        "train",
        help="train a language model on a text",
        description=__doc__,
    )
    p.set_defaults(run=main)
    p.add_argument("text", type=Path, nargs="+", help=(
        "folders of text files, files, or Hugging Face datasets on disk"
    ))  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help=(
        "folder for checkpoints, metrics.jsonl, loss.png and, at the end, the model for Transformers"
    ))  # fmt: skip
    p.add_argument("--tokenizer", type=Path, metavar="JSON", help=(
        "a file of the library tokenizers (default: that of --init-from, or bytes); it neither truncates nor pads here"
    ))  # fmt: skip
    p.add_argument("--init-from", type=Path, metavar="FOLDER", help=(
        "take the weights, and with them the architecture, of this model: the --out of another training, one of its "
        "checkpoints, or a converted Transformers model; the optimiser starts anew"
    ))  # fmt: skip
    p.add_argument("--split", default="train", help="split to read of a dataset (%(default)s)")
    p.add_argument("--column", default="text", help="column of a dataset with the text (%(default)s)")
    model = p.add_argument_group("the training")
    for entry in fields(Settings):
        more: dict[str, Any] = dict(entry.metadata)
        if isinstance(entry.default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            number = float if entry.default is None else type(entry.default)
            more |= dict(type=number, metavar=None if "choices" in more else "N")
        model.add_argument(_flag(entry.name), default=entry.default, **more)
    machine = p.add_argument_group("the machine")
    machine.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    machine.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=(
        "dtype of the matrix products (auto: bfloat16 on a GPU that has it); parameters are float32"
    ))  # fmt: skip
    machine.add_argument("--accumulate", type=count, default=1, metavar="N", help="passes per step (%(default)s)")
    machine.add_argument("--fsdp", action="store_true", help="shard the model over the processes of torchrun")
    machine.add_argument("--context-parallel", type=count, default=1, metavar="P", help=(
        "let the tokens of each window lie across P of the processes of torchrun, for windows that one does not hold "
        "(%(default)s)"
    ))  # fmt: skip
    machine.add_argument("--minutes", type=minutes, metavar="M", help=(
        "save and stop after M minutes, with exit status 75"
    ))  # fmt: skip
    record = p.add_argument_group("the record")
    record.add_argument("--save-every", type=count, default=200, metavar="N", help="steps (%(default)s)")
    record.add_argument("--keep", type=count, default=2, metavar="N", help="newest checkpoints to keep (%(default)s)")
    record.add_argument("--evaluate-every", type=count, default=200, metavar="N", help="steps (%(default)s)")
    record.add_argument("--lengths", type=count, nargs="+", metavar="N", help=(
        "lengths of context to evaluate at, in tokens (default: 1, 2, 4, 8 and 16 times the length of training)"
    ))  # fmt: skip
    record.add_argument(
        "--windows", type=count, default=32, metavar="N", help="held-out windows to evaluate on (%(default)s)"
    )
    record.add_argument("--target", type=count, metavar="N", help=(
        "tokens scored at the end of each, the same at every length (default: a quarter of the shortest)"
    ))  # fmt: skip
    record.add_argument("--tensorboard", action="store_true", help="write the metrics to the folder tensorboard, too")
    record.add_argument("--fresh", action="store_true", help="drop the checkpoints in --out and start anew")


def main(options: argparse.Namespace) -> int:
    """Run the command; return its exit status. Raises as ``train`` does."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ValueError("train needs the library safetensors: pip install 'logpe[train]'") from None
    settings = Settings(**{entry.name: getattr(options, entry.name) for entry in fields(Settings)})
    options.lengths = sorted(set(options.lengths or (settings.length << power for power in range(5))))
    options.target = options.target or max(1, min(options.lengths) // 4)
    if options.target > min(options.lengths):
        raise ValueError(f"--target must be at most the shortest of --lengths, {min(options.lengths)}")
    if any(path.resolve() == options.out.resolve() for path in options.text):
        raise ValueError(f"--out {options.out} must not be the folder of the text: name one inside it, or elsewhere")
    options.given = None if options.init_from is None else str(options.init_from.resolve())
    if options.init_from is not None:
        _follow(options, settings)
    world = World(options.device, options.context_parallel)

    def say(message: str) -> None:
        if world.first:
            tqdm.write(message, file=sys.stderr)

    with world, contextlib.ExitStack() as stack:
        world.once(lambda: stack.enter_context(_output(options.out)))
        return train(settings, options, world, say)


def _follow(options: argparse.Namespace, settings: Settings) -> None:
    """Check what --init-from excludes, and find the folder of its model and the tokenizer."""
    given = options.init_from
    trained = checkpoint.newest(given / "checkpoints", aside=False)
    options.init_from = given if trained is None else trained[0]
    for entry in fields(Settings):
        if entry.name in ARCHITECTURE and getattr(settings, entry.name) != entry.default:
            raise ValueError(f"{_flag(entry.name)} must not be given with --init-from, whose model has it")
    if options.fresh and options.init_from.resolve().is_relative_to((options.out / "checkpoints").resolve()):
        raise ValueError(f"--init-from {given} is a checkpoint that --fresh drops: copy it elsewhere")
    if options.tokenizer is None and (options.init_from / "tokenizer.json").exists():
        options.tokenizer = options.init_from / "tokenizer.json"


@contextlib.contextmanager
def _output(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out."""
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError:
        raise ValueError(f"--out {os.fsencode(folder)!r} must be a name in UTF-8, as safetensors wants it") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(folder))
            files.write_whole(folder / ".writable", lambda path: path.touch())
            (folder / ".writable").unlink()
        except OSError as error:
            raise OSError(f"--out {folder} cannot be written: {error.strerror or error}") from None
        yield
