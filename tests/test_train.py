"""``python -m logpe train``: killed at any moment it arrives at the same model; what it reads, records and refuses."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from logpe import checkpoint, language_model, text, train
from logpe.__main__ import main

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
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command, *arguments], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


# --- resuming ---------------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
import safetensors.torch
from logpe import train
from logpe.__main__ import main

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
        patch.setattr(checkpoint, "_sync", dying(checkpoint._sync, False))
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
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert steps_kept(tmp_path) == [4, 5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([*arguments, "--minutes=0"]) == checkpoint.TIME_IS_OVER == 75
    assert "the time is over; the same command goes on from here" in capsys.readouterr().err
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


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_damaged_checkpoint_is_left_out(folder: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(whole, tmp_path / "out")
    file = tmp_path / "out" / "checkpoints" / "step-00000012" / damage
    content = bytearray(file.read_bytes())
    if damage == "model.safetensors":
        content[-5] ^= 1
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"step-00000012/{damage} "):
        assert main(["train", str(folder), "--out", str(tmp_path / "out"), *SMALL]) == 0
    assert_same(tmp_path / "out", whole)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
def test_two_processes_are_one(folder: Path, whole: Path, tmp_path: Path) -> None:
    """DDP for a step, FSDP2 for the rest: the data is that of one process, and so are the losses to rounding."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "logpe")
    arguments = ["train", str(folder), "--out", str(tmp_path), *SMALL, "--accumulate=2"]
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
    ours = language_model.load(tmp_path / "checkpoints" / "step-00000012").state_dict()
    theirs = language_model.load(whole / "checkpoints" / "step-00000012").state_dict()
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
    model = language_model.load(tmp_path / "checkpoints" / "step-00000060")
    held_out = [d for d in text.documents([folder]) if d.hash % 10 == 0]
    words = sorted((d for d in held_out), key=lambda d: d.hash)
    tokens = [torch.tensor(list(d.text + b"\0")[:129]) for d in words if len(d.text) >= 128][:3]
    assert len(tokens) == 3
    for length in (16, 128):
        losses = []
        for window in tokens:
            logits = model(window[None, -length - 1 : -1])[0].double()
            losses.append(-logits.log_softmax(-1).gather(1, window[-length:, None])[-5:].mean())
        assert found[-1]["evaluation"][str(length)] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_first_step_is_adamw_on_the_clipped_mean(folder: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--steps=1", "--warmup=0", "--accumulate=2", "--clip=0.25", "--weight-decay=0.5"]
    assert main(["train", str(folder), "--out", str(tmp_path), *arguments]) == 0
    options = dict(preset="log-invariant", query_gain=True, dim=16, layers=2, heads=2, qk_norm=True)
    model = train.Settings(**options).model(256)  # type: ignore[arg-type]
    tokens = text.Windows(text.load(tmp_path / "tokens.safetensors").train, 16, 0)(range(4))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.25
    trained = language_model.load(tmp_path / "checkpoints" / "step-00000001").state_dict()
    rate = record["learning_rate"]
    for name, p in model.named_parameters():
        g = gradient[name] * 0.25 / norm
        decay = 0.0 if "raw_" in name else 0.5
        expected = p.detach() * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)  # Adam's first step
        sure = g.abs() > 1e-6  # elsewhere rounding decides
        torch.testing.assert_close(trained[name][sure], expected[sure], rtol=1e-4, atol=1e-5)


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
    words = text.load(tmp_path / "out" / "tokens.safetensors")
    assert words.vocabulary == 4
    assert set(words.train.tolist()) == {0, 1, 2, 3}
    documents = text.documents([folder])
    assert int((words.train == 3).sum() + (words.test == 3).sum()) == len(documents)
    first = next(d for d in documents if d.hash % 10)
    start = [{"log": 0, "bias": 1}.get(word, 2) for word in first.text.decode().split()]
    assert words.train[: len(start) + 1].tolist() == [*start, 3]
    folder_of_model = tmp_path / "out" / "checkpoints" / "step-00000002"
    assert (folder_of_model / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert language_model.load(folder_of_model).embedding.num_embeddings == 4


def test_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"body": [f"text {i} " * 20 for i in range(30)]})
    rows = datasets.Dataset(table, fingerprint="0")  # given, as some versions fail to compute it
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    found = text.documents([tmp_path / "data"], "train", "body")
    assert len(found) == 30
    assert {d.path: d.text for d in found}["train/7"] == b"text 7 " * 20
    with pytest.raises(ValueError, match="--column must be one of body"):
        text.documents([tmp_path / "data"], "train", "text")


@pytest.mark.parametrize(
    "options",
    [["--preset=log-bias-rope"], ["--qk-norm", "--preset=log-rotary-bias", "--rotary-fraction=0.5"]],
    ids=["llama", "qwen3"],
)
def test_transformers_reads_what_it_writes(folder: Path, tmp_path: Path, options: list[str]) -> None:
    pytest.importorskip("transformers")
    integration = pytest.importorskip("logpe.transformers")
    assert main(["train", str(folder), "--out", str(tmp_path), *SMALL, "--steps=2", *options]) == 0
    model = language_model.load(tmp_path / "checkpoints" / "step-00000002")
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


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_pass_takes_every_window_once() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    windows = text.Windows(tokens, 10, seed=3)
    assert windows.count == 99
    drawn = windows(range(2 * 99))
    assert drawn.shape == (198, 11)
    assert (drawn.diff(dim=1) == 1).all()
    for turn in drawn.split(99):
        starts = turn[:, 0].sort().values
        assert (starts.diff() == 10).all()
    assert not torch.equal(drawn[:99], drawn[99:])
    assert torch.equal(windows(range(150, 160)), drawn[150:160])
    assert not torch.equal(text.Windows(tokens, 10, seed=4)(range(10)), drawn[:10])
    for size in range(11, 40):  # no window leaves the text
        few = text.Windows(tokens[:size], 10, seed=size)
        assert few(range(20)).max() < size


def test_held_out_windows() -> None:
    tokens = torch.arange(100, dtype=torch.uint8)
    words = text.Text(tokens, tokens, torch.tensor([8, 50, 100]), 256, {}, "")
    found, lengths = text.test_windows(words, [4, 9, 64], 100)
    assert lengths == [4, 9]
    assert found[:, 0].tolist() == [8, 50, 18, 60, 28, 70, 38, 80, 90]  # documents take turns
    assert (found.diff(dim=1) == 1).all()
    found, lengths = text.test_windows(words, [60, 80], 100)  # longer than any document
    assert (found.shape, lengths) == ((1, 81), [60, 80])


def test_one_file_is_split_by_place(tmp_path: Path) -> None:
    content = bytes(random.Random(0).choices(range(1, 256), k=500))
    (tmp_path / "one").write_bytes(content)
    text.prepare(tmp_path / "tokens", [tmp_path / "one"], None)
    words = text.load(tmp_path / "tokens")
    assert bytes(words.train.tolist()) == content[:450] + b"\0"
    assert bytes(words.test.tolist()) == content[450:] + b"\0"
    assert words.test_ends.tolist() == [51]


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
        ([*out, "--accumulate=3"], "--batch must be a multiple of processes x --accumulate, 1 x 3, got 4"),
        ([*out, "--fsdp"], "--fsdp needs torchrun"),
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
        ([*out, "--learning-rate=1e30"], "is nan at step 2. Start anew with a lower --learning-rate"),
    ):
        assert message in refused([str(folder), *SMALL, *more], capsys)


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
    assert "--source was" in refused([str(tmp_path / "text"), *arguments], capsys)

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
