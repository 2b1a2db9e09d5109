"""The judge of the generation study: a model that reads what others write, and what it makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.study import corpus, protocol, runner
from bench.study.model import Model, Shape, encoding
from bench.study.runner import Advance, Stage
from logpe.files import locked
from logpe.lm.text import TEST_SHARE, Document, Sampler, document_windows

GRAM, HISTORY = 8, 512  # bytes of what counts as repeated, and how far back it is looked for


@dataclass(frozen=True, kw_only=True)
class Settings(runner.Settings):
    """All that the numbers of this study depend on."""

    corpus: str  # sha256
    shape: Shape
    train_length: int  # bytes
    length: int  # bytes of a text, the prompt included
    prompt: int
    samples: int  # texts of each seed
    real: int  # texts of each seed that the judge reads for comparison; the first `samples` of them give the prompts
    temperature: float
    top_p: float
    judge: str  # its encoding
    judge_length: int
    judge_steps: int
    judge_batch: int

    @property
    def piece(self) -> int:
        """How many bytes the judge scores at once."""
        return self.judge_length // 4

    @property
    def context(self) -> int:
        """How many bytes it reads before them, always: a text begins with what led to its prompt."""
        return self.judge_length - self.piece

    @property
    def edges(self) -> list[int]:
        """Bins of positions: from the prompt to the end, between them the training length by powers of two."""
        powers = (round(self.train_length * 2.0**k) for k in range(-20, 21))
        return [self.prompt, *sorted({n for n in powers if self.prompt < n < self.length}), self.length]


# --- text -------------------------------------------------------------------------------------------------------------


def halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return the writers' documents and the judge's, by a hash of the path."""
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
        """Return the sizes of the halves, and the number of windows, for the record."""
        return {**corpus.sizes(writers=self.written, judge=self.judged), "windows": len(self.windows)}

    def real(self, seed: int) -> Tensor:
        """Return what leads to a prompt, the prompt, and how it really goes on; (real, context - prompt + length)."""
        return self.windows[seed * self.settings.real :][: self.settings.real]


# --- scoring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def judged_bits(judge: Model, texts: Tensor, settings: Settings) -> Tensor:
    """Return the bits of each byte of texts int64 (B, N), after ``context`` or more before it; (B, N - context)."""
    device = next(judge.parameters()).device
    judge.eval()
    bits = []
    for start in range(settings.context, texts.shape[1], settings.piece):
        part = texts[:, start - settings.context : start + settings.piece].to(device)
        target = part[:, settings.context :]
        logits = protocol.predict(judge, part, target.shape[1])
        bits.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu() / math.log(2))
    return torch.cat(bits, dim=1)


def repeated(texts: Tensor, n: int = GRAM, history: int = HISTORY) -> Tensor:
    """Return whether the n <= 8 bytes that end here also end at one of ``history`` places before; as texts (B, N)."""
    grams = (texts.unfold(1, n, 1) << 8 * torch.arange(n)).sum(-1)  # a number for each
    grams, place = grams.sort(dim=1, stable=True)
    again = (grams.diff(dim=1) == 0) & (place.diff(dim=1) <= history)
    marks = torch.zeros_like(texts, dtype=torch.bool)
    return marks.scatter(1, place[:, 1:] + n - 1, again)


def drift(part: Tensor, frequencies: Tensor) -> float:
    """Return the Kullback-Leibler divergence, in bits, of ``part``'s bytes from ``frequencies`` (256,), all > 0."""
    p = torch.bincount(part.flatten(), minlength=256).double()
    p, q = p / p.sum(), frequencies / frequencies.sum()
    return (torch.special.entr(p).neg() - p * q.log()).sum().item() / math.log(2)


def printable(part: Tensor) -> float:
    """Return the share of printable ASCII, tab, line feed and carriage return."""
    shown = (part >= 32) & (part < 127) | torch.isin(part, torch.tensor([9, 10, 13]))
    return shown.double().mean().item()


def scored(judge: Model, texts: Tensor, frequencies: Tensor, settings: Settings) -> dict[str, Any]:
    """Return what to record of texts int64 (B, context - prompt + length): each measure by bin of positions."""
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


# --- the model --------------------------------------------------------------------------------------------------------


class Judge:
    """The model that reads, trained once for all seeds; its checkpoint stays.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, texts: Texts, settings: Settings, device: torch.device, folder: Path) -> None:
        self.texts, self.settings, self.device, self.folder = texts, settings, device, folder
        self.model: Model | None = None

    def build(self) -> Model:
        """Return the judge before training."""
        return Model(self.settings.shape, encoding(self.settings.judge, self.settings.judge_length), 0).to(self.device)

    def loss(self, model: Model, seed: int = 0) -> runner.BatchLoss:
        """Return the loss of its batches, which depend on no seed."""
        return protocol.byte_loss(model, lambda rng: self.texts.judge_sampler(self.settings.judge_batch, rng), 0)

    def ready(self) -> Model:
        """Return the judge; where its checkpoint was lost since it read the real text, it is trained again."""
        if self.model is None:
            self.model = self.build()
            with locked(self.folder.parent, self.folder.name, wait=True):
                self.stage().train(self.model, 0, self.folder, lambda work: None)
            self.model.eval()
        return self.model

    def reading_work(self, texts: int) -> int:
        """Return the work of reading so many texts."""
        pieces = -(-(self.settings.length - self.settings.prompt) // self.settings.piece)
        return protocol.work(texts * pieces, self.settings.judge_length)

    def stage(self) -> Stage:
        """Return the stage in which the judge reads real text: that of each seed's prompts."""

        def score(model: Model, test: str, seed: int, advance: Advance) -> dict[str, Any]:
            scores = scored(model, self.texts.real(seed), self.texts.frequencies, self.settings)
            advance(self.reading_work(self.settings.real))
            return scores

        return Stage(
            self.settings,
            build=lambda name, seed: self.build(),
            loss=self.loss,
            score=score,
            step_work=3 * protocol.work(self.settings.judge_batch, self.settings.judge_length),
            steps=self.settings.judge_steps,
            tests={"all": self.reading_work(self.settings.real)},
            kept=self.folder,
        )
