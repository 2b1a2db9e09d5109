"""What the extrapolation study measures, and how: see bench.study.extrapolation, the command."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.study import corpus, mixture, runner, tasks
from bench.study.model import Attention, Model, Shape, autocast, encoding
from bench.study.runner import Advance, Stage
from logpe.lm.text import Sampler, document_windows

ENTROPY_WINDOWS, ENTROPY_QUERIES = 8, 16


@dataclass(frozen=True, kw_only=True)
class Settings(runner.Settings):
    """All that the numbers of the extrapolation study depend on."""

    corpus: str  # sha256
    shape: Shape
    train_length: int  # bytes
    lengths: tuple[int, ...]  # of context, bytes
    windows: int  # of held-out text
    target: int  # bytes scored at the end of each
    samples: int  # retrieval questions per length and depth
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    whole_windows: int = 0  # so many of the windows are also read whole, and their attention is looked at
    smeared_keys: bool = False  # see model.Attention
    mixture: tuple[tuple[str, float], ...] = ()  # shares of each batch of text that are something else, see mixture

    def content(self) -> dict[str, Any]:
        """Return what the key is made of."""
        content = super().content()
        for name in ("whole_windows", "smeared_keys", "mixture"):
            if not content[name]:  # as before it existed, so that older results keep their names
                del content[name]
        return content

    @property
    def unit(self) -> str:
        """What a length counts."""
        return "byte" if self.shape.vocabulary == 256 else "token"

    @property
    def bits(self) -> str:
        """The name under which bits per byte, or per token, are recorded."""
        return f"bits_per_{self.unit}"


# --- jobs: what a model is trained for, and how it is scored at one length -------------------------------------------


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n that is at most ``limit``; 1 where ``limit`` is less."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)


def position_bins(length: int) -> list[int]:
    """Return the first positions of bins that grow with the position: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    starts = {0, 1} | {n << k for k in range(length.bit_length()) for n in (2, 3)}
    return sorted(n for n in starts if n < length)


def repeats_from_afar(windows: Tensor, target: int, near: int) -> Tensor:
    """Return which of the last ``target`` tokens end three that stood in the window before, but not ``near`` by.

    windows: int64 (B, N). Returns bool (B, target).
    """
    triples = windows.unfold(1, 3, 1)
    ends = triples[:, -target:]
    far = []
    for all_of, last in zip(triples, ends, strict=True):
        same = (last[:, None] == all_of).all(dim=2)  # (target, N - 2)
        here = torch.arange(len(all_of) - target, len(all_of))[:, None]
        distance = here - torch.arange(len(all_of))
        far.append((same & (distance >= near)).any(dim=1) & ~(same & (distance > 0) & (distance < near)).any(dim=1))
    return torch.stack(far)


class Text:
    """Next-byte prediction.

    The last `target` bytes of each window are scored with ever more context. Where the context has no room for all of
    them they are read in pieces: what is read has `length` bytes, and what is scored has at least half of them before
    it. With `whole_windows` there are two more readings: `whole`, every byte of these windows in chunks of `length`;
    and, at the training length, `cut`, the same targets in so small pieces that each sees all but an eighth of the
    training length. A model that is better off with long context beats its own `cut`.
    """

    answer = None  # every byte is predicted in training

    def __init__(self, text: corpus.Corpus, settings: Settings) -> None:
        self.settings, self.steps = settings, settings.steps
        self.sampler = Sampler(text.train, settings.train_length + 1)
        self.longest = max(settings.lengths)
        reach = [n + settings.target - piece for n in settings.lengths for piece in self.pieces(n).values()]
        self.windows = document_windows(text.test, max(self.longest, *reach) + 1, settings.windows)
        self.whole = self.windows[: settings.whole_windows, -self.longest - 1 :]
        self.far = None
        if settings.mixture:
            self.far = repeats_from_afar(self.windows[:, -self.longest - 1 :], settings.target, settings.train_length)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a batch to train on, int64 (batch, train_length + 1)."""
        return self.sampler(self.settings.batch, generator)

    def pieces(self, length: int) -> dict[str, int]:
        """Return how many bytes are scored at once, by reading."""
        target = self.settings.target
        sizes = {"text": largest_divisor(target, length // 2)}
        if self.settings.whole_windows and length == self.settings.train_length:
            sizes["cut"] = largest_divisor(target, length // 8)
        return sizes

    def questions(self, length: int, seed: int) -> Iterator[tuple[str, Tensor, int]]:
        """Yield named sets of sequences (count, length + 1), each with the number of last bytes to score."""
        end = self.windows.shape[1]
        for name, piece in self.pieces(length).items():
            ends = range(end - self.settings.target + piece, end + 1, piece)
            parts = [self.windows[:, stop - length - 1 : stop] for stop in ends]
            yield name, torch.stack(parts, dim=1).flatten(0, 1), piece
        if len(self.whole):
            yield "whole", self.whole.unfold(1, length + 1, length).flatten(0, 1), length

    def sequences(self, length: int) -> int:
        """Return how many sequences there are in all questions."""
        targets = sum(self.settings.target // piece for piece in self.pieces(length).values())
        return len(self.windows) * targets + len(self.whole) * (self.longest // length)

    def summary(self, losses: dict[str, Tensor], hits: dict[str, Tensor]) -> dict[str, Any]:
        """Return what to record, from losses in nats and hits, both (sequences, bytes scored)."""
        bits = {name: loss / math.log(2) for name, loss in losses.items()}
        text = bits["text"].view(len(self.windows), -1).mean(dim=1)
        name = self.settings.bits
        record = {name: round(text.mean().item(), 5), "per_window": [round(b, 4) for b in text.tolist()]}
        if "cut" in bits:
            record[f"cut_{name}"] = round(bits["cut"].mean().item(), 5)
        if self.far is not None and self.far.any():
            for reading, prefix in (("text", "far_"), ("cut", "far_cut_")):
                if reading in bits:
                    far = bits[reading].view(len(self.windows), -1)[self.far]
                    record[prefix + name] = round(far.mean().item(), 5)
        if "whole" in bits:
            by_position = bits["whole"].mean(dim=0)
            starts = position_bins(len(by_position))
            means = [round(part.mean().item(), 4) for part in by_position.tensor_split(starts[1:])]
            record[f"whole_{name}"] = round(by_position.mean().item(), 5)
            record["by_position"] = dict(zip(map(str, starts), means, strict=True))
        return record


class Retrieval:
    """One of the tasks in bench.study.tasks; prompts of any length up to the training length."""

    def __init__(self, task: tasks.Task, settings: Settings, symbols: Tensor) -> None:
        self.task, self.settings, self.symbols = tasks.with_names(task, settings.shape.vocabulary), settings, symbols
        self.answer: int | None = task.answer
        self.steps = max(1, round(task.steps * settings.steps))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a batch to train on, of about as many bytes as one of text."""
        longest = self.settings.train_length
        shortest = min(16, longest)
        if self.task.mostly_short:
            length = round(shortest * (longest / shortest) ** torch.rand((), generator=generator).item())
            return self.symbols[self.task.draw(generator, self.settings.batch * longest // length, length, None)]
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return self.symbols[self.task.draw(generator, 2 * self.settings.batch, length, None)]

    def questions(self, length: int, seed: int) -> Iterator[tuple[str, Tensor, int]]:
        """Yield as Text.questions does: a set of prompts per depth, the same for every encoding."""
        for depth in self.settings.depths:
            generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * length + round(100 * depth))
            prompts = self.task.draw(generator, self.settings.samples, length, depth)
            yield f"{depth:g}", self.symbols[prompts], self.task.answer

    def sequences(self, length: int) -> int:
        """Return how many prompts there are in all questions."""
        return self.settings.samples * len(self.settings.depths)

    def summary(self, losses: dict[str, Tensor], hits: dict[str, Tensor]) -> dict[str, Any]:
        """Return as Text.summary does; a question counts if the whole answer is right."""
        depths = {depth: round(hit.all(dim=1).float().mean().item(), 4) for depth, hit in hits.items()}
        return {"accuracy": round(fmean(depths.values()), 4), "per_depth": depths}


Job = Text | Retrieval


def work(sequences: int, length: int) -> int:
    """Return the work of reading sequences once; attention costs as much as the rest at about 1,500 bytes."""
    return sequences * length * (1500 + length)


def byte_loss(
    model: Model, draw: Callable[[torch.Generator], Tensor], seed: int, answer: int | None = None
) -> runner.BatchLoss:
    """Return the loss of predicting bytes, for runner.fit.

    Args:
        draw: a batch int64 (B, N + 1), from a generator.
        answer: predict so many last bytes alone; None: all but the first.
    """
    device = next(model.parameters()).device
    generator = torch.Generator()

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], dict[str, float]]]:
        tokens = draw(generator.manual_seed(1_000_003 * seed + step)).to(device)
        logits = predict(model, tokens, answer)
        target = tokens[:, -logits.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())

        def numbers() -> dict[str, float]:
            bits = {"bits_at_the_end": loss.item() / math.log(2)}
            if answer is None:
                return bits
            right = (logits.argmax(dim=-1) == target).all(dim=1)
            return {**bits, "accuracy_at_the_end": right.float().mean().item()}

        return loss, numbers

    return batch_loss


def predict(model: Model, tokens: Tensor, last: int | None) -> Tensor:
    """Return logits, float32, of the last few of ``tokens`` (None: all but the first) from what comes before each."""
    with autocast(tokens.device):
        return model(tokens[:, :-1], last).float()


@torch.inference_mode()
def score(model: Model, job: Job, length: int, seed: int, advance: Advance) -> dict[str, Any]:
    """Return the job's summary at one context length."""
    device = next(model.parameters()).device
    together = max(1, (8192 if device.type == "cpu" else 262144) // length)  # sequences in one forward pass
    losses, hits = {}, {}
    for name, tokens, last in job.questions(length, seed):
        loss, hit = [], []
        for part in tokens.split(together):
            logits, target = predict(model, part.to(device), last), part[:, -last:].to(device)
            loss.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu())
            hit.append((logits.argmax(dim=-1) == target).cpu())
            advance(work(len(part), length))
        losses[name], hits[name] = torch.cat(loss), torch.cat(hit)
    record = job.summary(losses, hits)
    if isinstance(job, Text) and len(job.whole):
        texts = job.whole[:ENTROPY_WINDOWS, -length - 1 :].to(device)
        record["entropy"] = [[round(h, 4) for h in layer] for layer in attention_entropy(model, texts)]
    return record


@torch.inference_mode()
def attention_entropy(model: Model, tokens: Tensor) -> list[list[float]]:
    """Return how widely the last queries of texts (B, N + 1) spread their attention: nats, by layer and head."""
    entropy = []

    def look(attention: Attention, args: tuple[Tensor, ...]) -> None:
        q, k, v = attention.project(args[0])
        queries = min(ENTROPY_QUERIES, q.shape[2])
        _, weights = attention.eager(q[:, :, -queries:], k, v, k.shape[2] - queries)
        entropy.append(torch.special.entr(weights.float()).sum(dim=-1).mean(dim=(0, 2)).tolist())

    layers = (module for module in model.modules() if isinstance(module, Attention))
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        predict(model, tokens, 1)
    finally:
        for hook in hooks:
            hook.remove()
    return entropy


def stages(jobs: Mapping[str, Job], settings: Settings, symbols: Tensor, device: torch.device) -> dict[str, Stage]:
    """Return the stage of each job. With a mixture one model of each encoding and seed serves all of them."""
    found = {name: stage(job, settings, device) for name, job in jobs.items()}
    text = jobs["text"]
    if not settings.mixture or not isinstance(text, Text):
        return found
    known = {name: tasks.with_names(task, settings.shape.vocabulary) for name, task in tasks.TASKS.items()}
    rows = settings.batch, settings.train_length + 1, settings.mixture
    mixed = mixture.Mixture(text.sampler, *rows, known, symbols)

    def loss(model: Model, seed: int) -> runner.BatchLoss:
        return mixture.loss(model, lambda tokens: predict(model, tokens, None), mixed, seed)

    # YaRN changes nothing at the training length: it reads with the weights that RoPE learned.
    same = {"rope-yarn": "rope"}
    common: dict[str, Any] = dict(loss=loss, steps=text.steps, trained_as="text", same_training=same)
    return {
        name: replace(each, **common, step_work=found["text"].step_work if name == "text" else 0)
        for name, each in found.items()
    }


def stage(job: Job, settings: Settings, device: torch.device) -> Stage:
    """Return a job's stage: training, then the scores at every length."""

    def build(name: str, seed: int) -> Model:
        return Model(settings.shape, encoding(name, settings.train_length), seed, settings.smeared_keys).to(device)

    return Stage(
        settings,
        build=build,
        loss=lambda model, seed: byte_loss(model, job.draw, seed, job.answer),
        score=lambda model, test, seed, advance: score(model, job, int(test), seed, advance),
        step_work=3 * work(settings.batch, settings.train_length),  # backward costs twice the forward pass
        steps=job.steps,
        tests={str(length): work(job.sequences(length), length) for length in settings.lengths},
    )
