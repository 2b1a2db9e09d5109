"""The training loop: steps, what ends them early, and checkpoints from which it goes on to the same weights."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logpe import files
from logpe.lm import checkpoint


class Stop:
    """Whether to stop after the step in hand: the time is over, or Ctrl-C or SIGTERM came.

    A context manager: signals count inside it.

    Args:
        deadline: by ``time.monotonic()``.
        impatient: a second signal raises KeyboardInterrupt at once.
    """

    def __init__(self, deadline: float, impatient: bool = True) -> None:
        self.deadline, self.impatient, self.signalled = deadline, impatient, False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signalled and self.impatient:
            raise KeyboardInterrupt("stopped at once; the same command resumes from the last checkpoint")
        self.signalled = True

    def __enter__(self) -> Stop:
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline


class Step(NamedTuple):
    """What a step tells.

    number: from 1. loss: what ``backward`` returned. gradient_norm: before clipping. start: by time.perf_counter().
    """

    number: int
    loss: Any
    gradient_norm: Tensor
    start: float


def alone(work: Callable[[], object]) -> object:
    """Run ``work`` and return its result: the default of ``once``, for a single process."""
    return work()


class Training:
    """A model in training. From a checkpoint it arrives at the weights that it would have without a stop.

    For that, all that a step uses must follow from its number: the batch, random numbers, the learning rate.

    Args:
        model: on its device, and wrapped already where many processes train it (DDP, FSDP2).
        optimizer: of its parameters.
        learning_rate: of a step, counted from 0.
        steps: number of the last step.
        checkpoints: a folder for them.
        clip: largest norm of the gradient.
        keep: how many of the newest checkpoints stay.
        once: does something in one of all processes that train the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        steps: int,
        checkpoints: Path,
        clip: float = 1.0,
        keep: int = 1,
        once: Callable[[Callable[[], object]], object] = alone,
    ) -> None:
        self.model, self.optimizer, self.learning_rate, self.steps = model, optimizer, learning_rate, steps
        self.checkpoints, self.clip, self.keep, self.once = checkpoints, clip, keep, once
        self.done = 0  # steps

    def run(self, backward: Callable[[int], Any]) -> Iterator[Step]:
        """Take the steps that are left, one for each iteration.

        Args:
            backward: adds up the gradients of a step, counted from 0, and returns its loss.
        """
        self.model.train()
        for step in range(self.done, self.steps):
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimizer.zero_grad()
            loss = backward(step)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.done = step + 1
            yield Step(self.done, loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm, start)

    def save(self, about: dict[str, Any], write: Callable[[Path], object] | None = None) -> None:
        """Write a checkpoint of what the last step left; all processes call it, and one writes.

        The files do not tell how many processes there were. Raises OSError.

        Args:
            about: goes into the manifest, beside the number of the step.
            write: puts more files into the folder that it is given.
        """
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = states.get_model_state_dict(self.model, options=options)
        moments: Any = states.get_optimizer_state_dict(self.model, self.optimizer, options=options)

        def write_all(folder: Path) -> None:
            for name in _tied(self.model):
                weights.pop(name, None)
            files.save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
            tensors = {f"{name}.{part}": x for name, state in moments["state"].items() for part, x in state.items()}
            files.save_tensors(tensors, folder / "optimizer.safetensors")
            if write is not None:
                write(folder)

        self.once(lambda: checkpoint.save(self.checkpoints, self.done, write_all, about, self.keep))

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint; all processes call it. Raises OSError, ValueError where it is damaged."""
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=dist.is_available() and dist.is_initialized())
        weights: Any = files.load_tensors(folder / "model.safetensors")
        weights |= {name: weights[original] for name, original in _tied(self.model).items()}
        states.set_model_state_dict(self.model, weights, options=options)
        # Of its own state, the optimiser keeps the groups: what is in them does not change.
        moments: Any = states.get_optimizer_state_dict(self.model, self.optimizer)
        moments["state"] = {}
        for name, tensor in files.load_tensors(folder / "optimizer.safetensors").items():
            parameter, _, part = name.rpartition(".")
            moments["state"].setdefault(parameter, {})[part] = tensor
        states.set_optimizer_state_dict(self.model, self.optimizer, moments, options=options)
        self.done = int(folder.name.removeprefix("step-"))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel holds, or ``model`` itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _tied(model: nn.Module) -> dict[str, str]:
    """Return the names of parameters that are others under a second name, and the first names."""
    first: dict[nn.Parameter, str] = {}
    names = unwrapped(model).named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in names if first.setdefault(p, name) != name}
