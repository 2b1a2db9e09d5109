"""Training batches in which short windows show what a model can look up: repetitions and questions beside plain text.

All rows have the training length, and all encodings train on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.study.tasks import TASKS, Task
from logpe.lm.text import Sampler

COLLAGE = "collage"
KINDS = (COLLAGE, *TASKS)
SEGMENT = 16  # mean length of the pieces of a collage
SHORTEST = 16  # prompt
UNSCORED = -100  # target that has no part in the loss


def collage(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Return windows (B, N) whose first third stands, followed by pieces of that third in any order.

    The pieces begin anywhere, and their lengths are geometric with mean SEGMENT.
    """
    source = max(1, windows.shape[1] // 3)
    places = torch.arange(windows.shape[1]).expand(windows.shape)
    begins = torch.rand(windows.shape, generator=generator) < 1 / SEGMENT
    begins[:, source] = True
    begins[:, :source] = False
    first = torch.where(begins, places, 0).cummax(dim=1).values  # of the piece in which a place lies
    starts = torch.randint(source, windows.shape, generator=generator)
    index = torch.where(places < source, places, (starts.gather(1, first) + places - first) % source)
    return windows.gather(1, index)


def prompts(task: Task, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of prompts of one task, one after the other, int64 (rows, length), and which tokens are answers.

    The lengths of the prompts are uniform in their logarithm, as far as a row has room. What is left over at the
    start of a row holds spaces.
    """
    parts: list[Tensor] = []
    room = length
    while room >= SHORTEST + task.answer or not parts:
        longest = max(room - task.answer, 1)
        shortest = min(SHORTEST, longest)
        size = round(shortest * (longest / shortest) ** torch.rand((), generator=generator).item())
        parts.append(task.draw(generator, rows, size, None))
        room -= size + task.answer
    row = torch.cat([torch.full((rows, room), ord(" ")), *parts], dim=1)
    answers = torch.cat([torch.zeros(room), *(torch.arange(x.shape[1]) >= x.shape[1] - task.answer for x in parts)])
    return row, answers.bool().expand(rows, -1)


class Mixture:
    """Draws batches of which shares are collages, or prompts of tasks; the rest is text.

    Args:
        text: windows of text, int64 (rows, length).
        batch: rows of a batch.
        length: tokens of a row.
        shares: of a batch, by kind.
        tasks: by name, in symbols that ``symbols`` makes tokens.
        symbols: the token of each symbol, int64.
    """

    def __init__(
        self,
        text: Sampler,
        batch: int,
        length: int,
        shares: Iterable[tuple[str, float]],
        tasks: dict[str, Task],
        symbols: Tensor,
    ) -> None:
        self.text, self.batch, self.length, self.tasks, self.symbols = text, batch, length, tasks, symbols
        self.rows = {kind: round(share * batch) for kind, share in shares}

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens int64 (batch, length), and the targets of all but the last, some UNSCORED."""
        questions = {kind: rows for kind, rows in self.rows.items() if kind in self.tasks and rows}
        tokens = self.text(self.batch - sum(questions.values()), generator)
        collages = self.rows.get(COLLAGE, 0)
        tokens[:collages] = collage(tokens[:collages], generator)
        parts, targets = [tokens], [tokens[:, 1:]]
        for kind, rows in questions.items():
            row, answers = prompts(self.tasks[kind], rows, self.length, generator)
            row = self.symbols[row]
            parts.append(row)
            targets.append(row.masked_fill(~answers, UNSCORED)[:, 1:])
        return torch.cat(parts), torch.cat(targets)


def loss(
    model: torch.nn.Module,
    predict: Callable[[Tensor], Tensor],
    mixture: Mixture,
    seed: int,
) -> Callable[[int], tuple[Tensor, Callable[[], dict[str, float]]]]:
    """Return the mean loss of the scored tokens of each batch, for runner.fit, which records that of the text alone."""
    device = next(model.parameters()).device
    generator = torch.Generator()
    first = mixture.rows.get(COLLAGE, 0)  # row of plain text; and the first after them
    end = mixture.batch - sum(rows for kind, rows in mixture.rows.items() if kind != COLLAGE)

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], dict[str, float]]]:
        tokens, targets = (x.to(device) for x in mixture.draw(generator.manual_seed(1_000_003 * seed + step)))
        logits = predict(tokens)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=UNSCORED)
        mean = losses.sum() / (targets != UNSCORED).sum()

        def numbers() -> dict[str, float]:
            answers = losses[end:][targets[end:] != UNSCORED]
            parts = {"": losses[first:end], "collage_": losses[:first], "answer_": answers}
            return {f"{n}bits_at_the_end": x.mean().item() / math.log(2) for n, x in parts.items() if x.numel()}

        return mean, numbers

    return batch_loss
