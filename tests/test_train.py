"""``python -m logpe train``: killed at any moment it arrives at the same model; what it reads, records and refuses."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from logpe import files
from logpe.__main__ import main
from logpe.command import BAD_USE, TIME_IS_OVER
from logpe.command import run as run_program
from logpe.lm import checkpoint, text, train
from logpe.lm import model as language_model

load_file = pytest.importorskip("safetensors.torch").load_file

ROOT = Path(__file__).parents[1]
# 12 steps with checkpoints at 4, 8 and 12, evaluated at 6 and 12.
SMALL = ["--dim=16", "--layers=2", "--heads=2", "--length=16", "--batch=4", "--steps=12", "--warmup=3", "--device=cpu"]
SMALL += ["--save-every=4", "--evaluate-every=6", "--windows=3", "--lengths", "16", "128", "--preset=log-invariant"]
SMALL += ["--query-gain", "--qk-norm"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same sums as in the processes that are started here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of 200 to 600 bytes."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(rng.choice(["log", "bias", "far", "near", "n"]) for _ in range(400))[: 200 + 10 * i])
    return root


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", str(folder), "--out", str(out), *SMALL]) == 0
    torch.set_num_threads(threads)
    return out


def records(out: Path) -> list[dict[str, Any]]:
    """All that the metrics say, but the times."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*[0-9]"))


def assert_same(out: Path, expected: Path) -> None:
    """The same metrics, weights and optimiser state, to the bit, and the same checkpoints kept."""
    assert records(out) == records(expected)
    assert steps_kept(out) == steps_kept(expected)
    assert not list((out / "checkpoints").glob(".*"))
    last = f"checkpoints/step-{steps_kept(expected)[-1]:08d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(out / last / name), load_file(expected / last / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


def run(arguments: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command, *arguments], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


# --- resuming ---------------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
import safetensors.torch
from logpe.lm import train
from logpe.__main__ import main
from logpe.command import BAD_USE, TIME_IS_OVER
from logpe.command import run as run_program

place, count = sys.argv[1], int(sys.argv[2])
owner = {"gradients": train, "save_file": safetensors.torch, "rename": os}[place]
original = getattr(owner, place)

def dying(*args, **kwargs):
    global count
    count -= 1
    if count == 0:
        if place == "save_file":  # half a file
            open(args[1], "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, place, dying)
main(sys.argv[3:])
"""


def test_killed_processes_arrive_at_the_same_model(folder: Path, whole: Path, tmp_path: Path) -> None:
    arguments = ["train", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    # In step 7; in the second file of checkpoint 8; before checkpoint 12 gets its name. (The first file of all are
    # the tokens.)
    for place, count, kept in (("gradients", 7, [4]), ("save_file", 2, [4]), ("rename", 2, [4, 8])):
        killed = run([place, str(count), *arguments], "-c", DYING)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert steps_kept(tmp_path / "out") == kept
    assert main(arguments) == 0
    assert_same(tmp_path / "out", whole)


class Killed(BaseException):
    """Nothing catches it."""


def test_every_moment_of_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot", lambda *_: None)
    count = 0

    def dying(function: Any, before: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count -= 1
            if count == 0 and before:
                raise Killed
            result = function(*args, **kwargs)
            if count == 0:
                raise Killed
            return result

        return call

    arguments = [*SMALL, "--steps=4", "--save-every=1", "--evaluate-every=3"]
    assert main(["train", str(folder), "--out", str(tmp_path / "whole"), *arguments]) == 0
    moments = 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", dying(checkpoint._digest, True))
        patch.setattr(checkpoint, "sync", dying(checkpoint.sync, False))
        patch.setattr(os, "rename", dying(os.rename, False))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree, True))
        patch.setattr(train.Metrics, "append", dying(train.Metrics.append, False))
        for moment in range(1, 1000, 2):
            out = tmp_path / "out"
            count = moment
            command = ["train", str(folder), "--out", str(out), *arguments]
            try:
                main(command)
            except Killed:
                moments += 1
            else:
                break
            with (out / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "lo')  # a line that was being written
            count = -1
            assert main(command) == 0
            assert_same(out, tmp_path / "whole")
            shutil.rmtree(out)
    assert moments > 20


def test_interrupt_saves_and_goes_on(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL]
    original = train.gradients
    taken: list[int] = []
    take = text.Windows.__call__

    def noted(windows: text.Windows, numbers: range) -> torch.Tensor:
        taken.extend(numbers)
        return take(windows, numbers)

    monkeypatch.setattr(text.Windows, "__call__", noted)

    def interrupting(*args: Any) -> float:
        if args[3] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", interrupting)
        assert main(arguments) == 130
    assert "stopped; the same command resumes from here" in capsys.readouterr().err
    assert steps_kept(tmp_path) == [4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([*arguments, "--minutes=0"]) == TIME_IS_OVER == 75
    assert "the time is over; the same command resumes from here" in capsys.readouterr().err
    assert steps_kept(tmp_path) == [5, 6]
    assert main([*arguments, "--accumulate=1", "--keep=9"]) == 0
    assert records(tmp_path) == records(whole)
    assert steps_kept(tmp_path) == [5, 6, 8, 12]
    assert taken == list(range(12 * 4))  # no part of the text twice, none left out
    assert main(arguments) == 0  # there is nothing to do
    assert records(tmp_path) == records(whole)
    assert main([*arguments, "--fresh", "--minutes=0"]) == 75
    assert steps_kept(tmp_path) == [1]
    assert len(records(tmp_path)) == 1


def test_a_checkpoint_from_before_an_option(folder: Path, whole: Path, tmp_path: Path) -> None:
    """It was trained with what is now that option's default."""
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL]
    assert main([*arguments, "--minutes=0"]) == TIME_IS_OVER
    manifest = tmp_path / "checkpoints" / "step-00000001" / checkpoint.MANIFEST
    content = json.loads(manifest.read_text())
    del content["settings"]["sink"]
    manifest.write_text(json.dumps(content))
    assert main(arguments) == 0
    assert records(tmp_path) == records(whole)


@pytest.mark.parametrize("place", ["reading", "training"])
def test_sigterm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Stops as Ctrl-C does, wherever the program is."""
    owner, name = {"reading": (text, "documents"), "training": (train, "gradients")}[place]
    original = getattr(owner, name)

    def terminated(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(owner, name, terminated)
    assert main(["train", str(folder), "--out", str(tmp_path), *SMALL]) == 130
    assert "stopped" in capsys.readouterr().err
    assert steps_kept(tmp_path) == ([1] if place == "training" else [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_more_steps(folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run goes on, on the longer cosine, and is the same when it is stopped on the way."""
    for name in ("once", "stopped"):
        shutil.copytree(whole, tmp_path / name)
        arguments = ["train", str(folder), "--out", str(tmp_path / name), *SMALL, "--steps=24"]
        if name == "stopped":
            for _ in range(3):
                assert main([*arguments, "--minutes=0"]) == 75
        assert main(arguments) == 0
        assert "--steps was 12: the learning rate follows the cosine of 24 from here" in capsys.readouterr().err
    found = records(tmp_path / "once")
    assert records(tmp_path / "stopped") == found
    assert found[:12] == records(whole)
    longer = train.Settings(steps=24, warmup=3)
    expected = [longer.learning_rate_at(step) for step in range(12, 24)]
    assert [record["learning_rate"] for record in found[12:]] == expected
    assert found[12]["learning_rate"] > found[11]["learning_rate"]
    message = refused([str(folder), "--out", str(tmp_path / "once"), *SMALL], capsys)
    assert "step-00000024 is of another training: --steps was 24, now 12" in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)


def add_lines(path: Path) -> None:
    path.write_bytes(b'3\n[1]\n{"step": "x"}\n\xff\n' + path.read_bytes() + b'{"step": 2, "lo')


STEP = "checkpoints/step-00000012"
DAMAGES = [
    ("tokens.safetensors", truncate, ["the tokens are made anew: "]),
    ("tokens.safetensors", flip, ["the tokens are made anew: "]),
    ("metrics.jsonl", add_lines, [f"metrics.jsonl: line {n} is no record, and left out" for n in (1, 2, 3, 4)]),
    (f"{STEP}/model.safetensors", flip, [f"{STEP}/model.safetensors "]),
    (f"{STEP}/optimizer.safetensors", truncate, [f"{STEP}/optimizer.safetensors "]),
    (f"{STEP}/checkpoint.json", truncate, [f"{STEP}/checkpoint.json "]),
]


@pytest.mark.parametrize(("name", "damage", "messages"), DAMAGES)
def test_damaged_files_are_named_and_made_anew(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, damage: Callable[[Path], None], messages: list[str],
) -> None:  # fmt: skip
    arguments = ["train", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    if name.startswith(STEP):
        shutil.copytree(whole, tmp_path / "out")
    else:
        assert main([*arguments, "--minutes=0"]) == 75
    damage(tmp_path / "out" / name)
    with warnings.catch_warnings(record=True) as warned:
        assert main(arguments) == 0
    told = capsys.readouterr().err + "".join(str(warning.message) for warning in warned)
    assert all(message in told for message in messages)
    assert "line 5" not in told  # a record
    assert "line 6" not in told  # half a line
    assert_same(tmp_path / "out", whole)


def test_output_inside_the_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "text"
    shutil.copytree(folder, root)
    expected = len(text.documents([root]))
    for name in ("run", "other"):
        arguments = ["train", str(root), "--out", str(root / "runs" / name), *SMALL, "--steps=2"]
        assert main([*arguments, "--minutes=0"]) == 75
        assert f"read {expected} documents" in capsys.readouterr().err
        (root / "runs" / name / "tokens.safetensors").unlink()
        assert main(arguments) == 0
        assert "left out, the output of a training: runs/" in capsys.readouterr().err
    message = refused([str(root), "--out", str(root), *SMALL], capsys)
    assert f"--out {root} must not be the folder of the text" in message


def test_two_at_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused, and changes nothing."""
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL]
    assert main([*arguments, "--minutes=0"]) == 75

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}  # not of the lock

    before = times()
    with files.locked(tmp_path):
        for more in ([], ["--fresh"]):
            assert f"another run writes to {tmp_path}" in refused([*arguments[1:], *more], capsys)
    assert times() == before
    assert main(arguments) == 0


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
@pytest.mark.parametrize(("processes", "more"), [(2, []), (3, ["--context-parallel=3"])])
def test_many_processes_are_one(processes: int, more: list[str], folder: Path, whole: Path, tmp_path: Path) -> None:
    """DDP for a step, FSDP2 for the rest: the data is that of one process, and so are the losses to rounding.

    Across three processes, the 16 tokens of a window lie unevenly.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "logpe")
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL, "--accumulate=2", *more]
    started = run([*arguments, "--minutes=0"], *torchrun)
    assert started.returncode == 1, started.stderr  # torchrun's own status
    assert "exitcode  : 75" in started.stderr
    assert steps_kept(tmp_path) == [1]
    assert (tmp_path / "loss.png").exists()  # no process ends before the first has written all
    gone_on = run([*arguments, "--fsdp"], *torchrun)
    assert gone_on.returncode == 0, gone_on.stderr
    assert "going on from" in gone_on.stderr
    found, expected = records(tmp_path), records(whole)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
        assert ours.get("evaluation", {}) == pytest.approx(theirs.get("evaluation", {}), rel=1e-5)
    ours = language_model.load_model(tmp_path / "checkpoints" / "step-00000012").state_dict()
    theirs = language_model.load_model(whole / "checkpoints" / "step-00000012").state_dict()
    for name, x in ours.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, theirs[name], rtol=1e-2, atol=1e-3)  # Adam enlarges what rounding leaves


# --- training ---------------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_record_is_right(folder: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--steps=60", "--learning-rate=0.02", "--target=5"]
    assert main(["train", str(folder), "--out", str(tmp_path), *arguments]) == 0
    found = records(tmp_path)
    assert found[0]["loss"] > 4
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert max(record["learning_rate"] for record in found) == found[2]["learning_rate"] == 0.02
    assert found[-1]["learning_rate"] == pytest.approx(0.002)
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    # The last evaluation, from the files alone: five tokens at the end of windows within held-out documents.
    model = language_model.load_model(tmp_path / "checkpoints" / "step-00000060")
    held_out = [d for d in text.documents([folder]) if d.hash % 10 == 0]
    held_out.sort(key=lambda d: d.hash)
    windows = [torch.tensor(list(d.text + b"\0")[:129]) for d in held_out if len(d.text) >= 128][:3]
    assert len(windows) == 3
    for length in (16, 128):
        losses = []
        for window in windows:
            logits = model(window[None, -length - 1 : -1])[0].double()
            losses.append(-logits.log_softmax(-1).gather(1, window[-length:, None])[-5:].mean())
        assert found[-1]["evaluation"][str(length)] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_first_step_is_adamw_on_the_clipped_mean(folder: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--steps=1", "--warmup=0", "--accumulate=2", "--clip=0.25", "--weight-decay=0.5", "--sink"]
    assert main(["train", str(folder), "--out", str(tmp_path), *arguments]) == 0
    options = dict(preset="log-invariant", query_gain=True, dim=16, layers=2, heads=2, qk_norm=True, sink=True)
    model = train.Settings(**options).model(256)  # type: ignore[arg-type]
    tokens = text.Windows(text.load_tokens(tmp_path / "tokens.safetensors").train, 16, 0)(range(4))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.25
    trained = language_model.load_model(tmp_path / "checkpoints" / "step-00000001").state_dict()
    rate = record["learning_rate"]
    for name, p in model.named_parameters():
        g = gradient[name] * 0.25 / norm
        decay = 0.0 if "raw_" in name else 0.5
        expected = p.detach() * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)  # Adam's first step
        sure = g.abs() > 1e-6  # elsewhere rounding decides
        torch.testing.assert_close(trained[name][sure], expected[sure], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient", "evaluation", "evaluation at a checkpoint", "weight"])
def test_ruined_weights_are_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """In step 6, 8 for what only a checkpoint looks at; the one of step 4 stays, and the advice works."""
    evaluate, gradients, step = train.evaluate, train.gradients, torch.optim.AdamW.step
    count = 0

    def spoiled_gradients(model: Any, windows: Any, settings: Any, step: int, *args: Any) -> float:
        loss = gradients(model, windows, settings, step, *args)
        if step == 5 and what == "gradient":
            next(model.parameters()).grad[0, 0] = math.inf
        return math.nan if step == 5 and what == "loss" else loss

    def spoiled_step(self: Any, *args: Any) -> None:
        nonlocal count
        step(self, *args)
        count += 1
        if count == 8 and what == "weight":
            self.param_groups[0]["params"][0].data[200, 0] = math.nan  # of a byte that the text has not

    def spoiled_evaluate(*args: Any) -> dict[str, float]:
        bad = count == {"evaluation": 6, "evaluation at a checkpoint": 8}.get(what)
        return {name: math.nan if bad else loss for name, loss in evaluate(*args).items()}

    arguments = [str(folder), "--out", str(tmp_path), *SMALL, "--learning-rate=0.01"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", spoiled_gradients)
        patch.setattr(torch.optim.AdamW, "step", spoiled_step)
        patch.setattr(train, "evaluate", spoiled_evaluate)
        message = refused(arguments, capsys)
    names = dict(loss="the loss is nan", gradient="the norm of the gradient is inf")
    assert names.get(what, "the held-out loss at 16 is nan") in message
    assert f" at step {count}; {tmp_path / 'checkpoints'} has what came before. Start anew with a lower" in message
    assert steps_kept(tmp_path) == [4]
    saved = language_model.load_model(tmp_path / "checkpoints/step-00000004")
    assert all(x.isfinite().all() for x in saved.parameters())
    assert [record["step"] for record in records(tmp_path)] == list(range(1, count))
    assert main(["train", *arguments, "--learning-rate=0.001", "--fresh"]) == 0
    assert steps_kept(tmp_path) == [8, 12]


def test_weights_that_no_loss_shows() -> None:
    model = torch.nn.Embedding(3, 2)
    world = train.World("cpu")
    assert train._not_finite(1.0, 1.0, {"16": 1.0}, model, world) is None
    model.weight.data[2, 1] = math.inf
    assert train._not_finite(1.0, 1.0, {"16": 1.0}, model, world) == "a weight is not finite"


def test_console_and_tensorboard(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL, "--tensorboard"]
    assert main([*arguments, "--minutes=0"]) == 75
    assert main(arguments) == 0
    found = records(tmp_path)
    assert found == records(whole)
    told = capsys.readouterr().err
    for number, start in ((6, 1), (12, 6)):
        loss = sum(record["loss"] for record in found[start:number]) / (number - start)
        held_out = ", ".join(f"{loss:.4f} at {n}" for n, loss in found[number - 1]["evaluation"].items())
        line = rf"step {number}: training {loss:.4f}, held out {held_out} nats per token; [\d,]+ tokens/s"
        assert re.search(line, told), told
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, values in {
        "loss/training": {record["step"]: record["loss"] for record in found},
        "learning rate": {record["step"]: record["learning_rate"] for record in found},
        "gradient norm": {record["step"]: record["gradient_norm"] for record in found},
        "loss/held out, 128 tokens": {n: found[n - 1]["evaluation"]["128"] for n in (6, 12)},
    }.items():
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(values)
    assert len(board.Scalars("tokens per second")) == 12

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard needs the library tensorboard: pip install" in refused(arguments[1:], capsys)


def test_steps_on_the_picture_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    labels = []
    save = figure.Figure.savefig

    def noted(drawing: Any, *args: Any, **options: Any) -> None:
        save(drawing, *args, **options)
        labels.append(drawing.axes[0].get_xticklabels())

    monkeypatch.setattr(figure.Figure, "savefig", noted)
    for steps in (1, 5, 11, 4000):
        found: list[dict[str, Any]] = [dict(step=n, loss=5 / n) for n in range(1, steps + 1)]
        found[-1]["evaluation"] = {"16": 3.0, "32": 2.5}
        train.plot(tmp_path / "loss.png", found, train.Settings(), print)
        texts = [label.get_text() for label in labels.pop()]
        assert texts == sorted(set(texts), key=texts.index)
        assert all(label.replace(",", "").lstrip("\u2212-").isdigit() for label in texts), texts


# --- starting from a model --------------------------------------------------------------------------------------------

TRAIN = ["--length=16", "--batch=4", "--steps=4", "--warmup=2", "--device=cpu", "--save-every=2", "--evaluate-every=2"]
TRAIN += ["--windows=3", "--lengths", "16", "128"]


def converted(folder: Path, kind: str) -> Path:
    """A small converted model of Transformers, saved."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("logpe.transformers")
    if kind == "gpt2":  # tied weights, dropout
        config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0)
    else:  # grouped-query heads, another width of the MLP
        config = transformers.Qwen3Config(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
    model = integration.use_log_position(transformers.AutoModelForCausalLM.from_config(config), query_gain=True)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["run", "transformers", "gpt2", "qwen3"])
def test_init_from(folder: Path, whole: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are those of the model; stopped and gone on it is the same to the bit; the result is loaded again."""
    given = whole if kind == "run" else whole / kind
    if kind in ("gpt2", "qwen3"):
        given = converted(tmp_path / "model", kind)
    elif kind == "transformers":
        pytest.importorskip("logpe.transformers")
    out = [tmp_path / "once", tmp_path / "stopped"]
    for path in out:
        arguments = ["train", str(folder), "--out", str(path), *TRAIN, "--init-from", str(given)]
        if path == out[1]:
            assert main([*arguments, "--minutes=0"]) == 75
        assert main(arguments) == 0
    assert "starting from the weights of" in capsys.readouterr().err
    assert_same(out[1], out[0])
    source = whole / "checkpoints" / "step-00000012" if kind == "run" else given
    tokens = text.Windows(text.load_tokens(out[0] / "tokens.safetensors").train, 16, 0)(range(4))
    if kind != "gpt2":
        model = language_model.load_model(source)
        loss = train.predict(model, tokens, half=False).mean().item()
        assert records(out[0])[0]["loss"] == pytest.approx(loss, rel=1e-4)
    last = language_model.load_model(out[0] / "checkpoints" / "step-00000004").eval()
    if kind in ("gpt2", "qwen3"):
        assert {type(last).__name__} == {{"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}[kind]}
    if "transformers" in sys.modules:
        again = language_model.load_converted(out[0] / "transformers")
        losses = [train.predict(m, tokens, half=False) for m in (again, last)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    other = refused([str(folder), "--out", str(out[0]), *TRAIN, *SMALL[:2]], capsys)
    assert "--init-from was" in other


def test_init_from_refuses(folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    begun = ["train", str(folder), "--out", str(tmp_path / "gone_on"), *TRAIN, "--init-from", str(tmp_path / "run")]
    assert main([*begun, "--minutes=0"]) == 75
    last = tmp_path / "run" / "checkpoints" / "step-00000012"
    (tmp_path / "words").mkdir()
    config = json.loads((last / "config.json").read_text())
    config["shape"]["vocabulary"] = 300
    (tmp_path / "words" / "config.json").write_text(json.dumps(config))
    for given, more, message in (
        (tmp_path / "run", ["--dim=32"], "--dim must not be given with --init-from, whose model has it"),
        (whole, ["--preset=log-bias"], "--preset must not be given with --init-from, whose model has it"),
        (tmp_path / "none", [], f"{tmp_path / 'none'} is not a folder with a config.json"),
        (last, ["--fresh"], f"--init-from {last} is a checkpoint that --fresh drops: copy it elsewhere"),
        (tmp_path / "words", [], f"--init-from {tmp_path / 'words'} has a vocabulary of 300, and bytes are 256"),
    ):
        out = tmp_path / ("run" if "--fresh" in more else "out")
        arguments = [str(folder), "--out", str(out), *TRAIN, "--init-from", str(given), *more]
        assert message in refused(arguments, capsys)
    assert steps_kept(tmp_path / "run") == steps_kept(whole)
    shutil.rmtree(last)  # of the model that it started from, nothing is needed to go on
    assert main(begun) == 0


def test_bfloat16_keeps_parameters_in_float32(folder: Path, whole: Path, tmp_path: Path) -> None:
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL, "--steps=12", "--dtype=bfloat16"]
    assert main([*arguments]) == 0
    found, expected = ([record["loss"] for record in records(out)] for out in (tmp_path, whole))
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)
    assert all(
        x.dtype == torch.float32 for x in load_file(tmp_path / "checkpoints/step-00000012/model.safetensors").values()
    )


def test_norms_of_heads_are_fused_under_autocast() -> None:
    """torch warns where they are not, and takes several kernels."""
    attention = language_model.Attention(language_model.Shape(32, heads=2, qk_norm=True), {})
    x = torch.randn(1, 5, 32)
    exact = attention.project(x)
    torch.set_warn_always(True)  # else once in a process
    try:
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            rounded = attention.project(x)
    finally:
        torch.set_warn_always(False)
    assert [t.dtype for t in rounded] == [torch.bfloat16] * 3
    torch.testing.assert_close([t.float() for t in rounded], list(exact), rtol=0.02, atol=0.02)


def test_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"log": 0, "bias": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    arguments = ["train", str(folder), "--out", str(tmp_path / "out"), *SMALL, "--lengths", "16", "32", "--steps=2"]
    assert main([*arguments, "--tokenizer", str(tmp_path / "words.json")]) == 0
    tokens = text.load_tokens(tmp_path / "out" / "tokens.safetensors")
    assert tokens.vocabulary == 4
    assert set(tokens.train.tolist()) == {0, 1, 2, 3}
    documents = text.documents([folder])
    assert int((tokens.train == 3).sum() + (tokens.test == 3).sum()) == len(documents)
    first = next(d for d in documents if d.hash % 10)
    start = [{"log": 0, "bias": 1}.get(word, 2) for word in first.text.decode().split()]
    assert tokens.train[: len(start) + 1].tolist() == [*start, 3]
    folder_of_model = tmp_path / "out" / "checkpoints" / "step-00000002"
    assert (folder_of_model / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert language_model.load_model(folder_of_model).embedding.num_embeddings == 4


@pytest.mark.parametrize(
    "options",
    [["--preset=log-bias-rope", "--sink"], ["--qk-norm", "--preset=log-rotary-bias", "--rotary-fraction=0.5"]],
    ids=["llama", "qwen3"],
)
def test_transformers_reads_what_it_writes(folder: Path, tmp_path: Path, options: list[str]) -> None:
    pytest.importorskip("transformers")
    integration = pytest.importorskip("logpe.transformers")
    assert main(["train", str(folder), "--out", str(tmp_path), *SMALL, "--steps=2", *options]) == 0
    model = language_model.load_model(tmp_path / "checkpoints" / "step-00000002")
    other = integration.from_pretrained(tmp_path / "transformers")
    tokens = torch.randint(256, (2, 30))
    torch.testing.assert_close(other(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    assert other.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 33)


def test_without_matplotlib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train", str(folder), "--out", str(tmp_path), *SMALL, "--minutes=0"]) == 75
    assert "loss.png is left out: pip install matplotlib" in capsys.readouterr().err


# --- what it refuses --------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *arguments]) == 2
    return capsys.readouterr().err


def test_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "out"), *SMALL]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("hidden")
    assert f"there is no text in {tmp_path / 'empty'}" in refused([str(tmp_path / "empty"), *arguments], capsys)
    assert f"no file or folder {tmp_path / 'none'}" in refused([str(tmp_path / "none"), *arguments], capsys)
    (tmp_path / "short").write_text("too short")
    assert "takes 17 tokens, and there are 10 to train on" in refused([str(tmp_path / "short"), *arguments], capsys)
    (tmp_path / "short").write_text("still too short " * 8)
    assert "16, and there are 13 tokens of held-out" in refused([str(tmp_path / "short"), *arguments], capsys)
    (tmp_path / "binary").write_bytes(b"\0" * 500)
    assert "binary is no text: it holds a zero byte" in refused([str(tmp_path / "binary"), *arguments], capsys)


def test_bad_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "out")]
    for more, message in (
        (["--out", str(tmp_path / "file" / "out")], f"--out {tmp_path / 'file' / 'out'} cannot be written: Not a dir"),
        (["--out", str(tmp_path / "caf\udce9")], "caf\\xe9' must be a name in UTF-8, as safetensors wants it"),
        ([*out, "--accumulate=3"], "--batch must be a multiple of processes x --accumulate, 1 x 3, got 4"),
        ([*out, "--fsdp"], "--fsdp needs torchrun"),
        (
            [*out, "--context-parallel=2"],
            "--context-parallel must divide the number of processes, got 2 and one process without torchrun",
        ),
        ([*out, "--dim=18", "--heads=4"], "dim must be a multiple of heads, got 18 and 4"),
        ([*out, "--steps=0"], "--steps must be at least 1, got 0"),
        ([*out, "--rotary-fraction=2"], "rotary_fraction must be in (0, 1], got 2"),
        ([*out, "--learning-rate=0"], "--learning-rate must be positive and finite, got 0"),
        ([*out, "--target=17"], "--target must be at most the shortest of --lengths, 16"),
        (
            [*out, "--tokenizer", str(tmp_path / "none")],
            f"--tokenizer {tmp_path / 'none'} cannot be read: No such file",
        ),
        (
            [*out, "--tokenizer", str(tmp_path / "file")],
            f"--tokenizer {tmp_path / 'file'} is not a file of the library",
        ),
        ([*out, "--dim=-4"], "--dim must be at least 1, got -4"),
        ([*out, "--batch=-5"], "--batch must be at least 1, got -5"),
        ([*out, "--learning-rate=nan"], "--learning-rate must be positive and finite, got nan"),
        ([*out, "--learning-rate=inf"], "--learning-rate must be positive and finite, got inf"),
        ([*out, "--weight-decay=nan"], "--weight-decay must be at least 0 and finite, got nan"),
        ([*out, "--clip=nan"], "--clip must be positive, got nan"),
        ([*out, "--seed=2147483648"], "--seed must be from 0 to 2**31 - 1, got 2147483648"),
        ([*out, "--gain-length=nan"], "gain_length must be positive, got nan"),
        ([*out, "--device=foo"], "--device foo: "),
        ([*out, "--device=meta"], "--device meta: "),
        ([*out, "--dim=2000000000"], "out of memory: "),
        ([*out, "--init-from", str(tmp_path), *["--no-query-gain", "--no-qk-norm"]], "must not be given with --init"),
        ([*out, "--learning-rate=1e30"], "is nan at step 2. Start anew with a lower --learning-rate"),
    ):
        assert message in refused([str(folder), *SMALL, *more], capsys)


@pytest.mark.parametrize("option", ["--minutes=nan", "--minutes=-1", "--lengths=0", "--save-every=0", "--steps=nan"])
def test_options_that_argparse_refuses(folder: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", str(folder), "--out", str(tmp_path), option])
    assert raised.value.code == 2


def test_help_tells_the_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2  # no command
    told = capsys.readouterr().err
    assert all(f"\n    {command} " in told for command in ("doctor", "tune", "train", "generate"))
    for command in ("doctor", "tune", "train", "generate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "75 the time of --minutes is over: the same command resumes; 130 stopped" in capsys.readouterr().out


def test_traceback_of_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A ValueError may be the program's own fault."""
    fault = ValueError("too many values to unpack")
    for debug, traceback in (("1", True), ("0", False)):
        monkeypatch.setenv("LOGPE_DEBUG", debug)
        assert run_program("program", Mock(side_effect=fault)) == BAD_USE
        *above, message = capsys.readouterr().err.splitlines()
        assert message == "program: too many values to unpack"
        assert any(line.startswith("Traceback") for line in above) == traceback


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused([str(folder), "--out", str(tmp_path), *SMALL, "--device=cuda"], capsys)
    assert "--device cuda: there is no GPU here" in message


def test_checkpoint_of_another_training(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "text")
    arguments = ["--out", str(tmp_path / "out"), *SMALL]
    message = refused([str(folder), *arguments, "--preset=log-bias", "--dim=32"], capsys)
    assert "step-00000012 is of another training: --preset was 'log-invariant', now 'log-bias'" in message
    assert "--dim was 16, now 32; name another --out, or give --fresh" in message
    assert "the text was" in refused([str(tmp_path / "text"), *arguments], capsys)

    arguments = [str(tmp_path / "text"), "--out", str(tmp_path / "other"), *SMALL, "--minutes=0"]
    assert main(["train", *arguments]) == 75
    (tmp_path / "text" / "new.txt").write_text("something new")
    assert main(["train", *arguments]) == 75  # a training keeps the tokens that it began with
    (tmp_path / "other" / "tokens.safetensors").unlink()
    assert "has changed" in refused(arguments, capsys)
    assert math.isfinite(records(tmp_path / "other")[-1]["loss"])


def test_full_disk_leaves_the_last_checkpoint(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors
    import safetensors.torch

    original = safetensors.torch.save_file

    def full(tensors: Any, path: Path, *args: Any) -> None:
        if "step-00000008" in str(path):
            raise safetensors.SafetensorError("No space left on device")
        original(tensors, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        assert "No space left" in refused([str(folder), "--out", str(tmp_path), *SMALL], capsys)
    assert steps_kept(tmp_path) == [4]
    assert main(["train", str(folder), "--out", str(tmp_path), *SMALL]) == 0
    assert_same(tmp_path, whole)
