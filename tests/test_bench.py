"""The extrapolation study in miniature: corpus, tasks, model, and a run that is interrupted and resumed."""

import json
import math
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from helpers import status_of

from bench.__main__ import main as bench_main
from bench.study import corpus, extrapolation, tasks, training
from bench.study import protocol as study
from bench.study.model import ENCODINGS, Attention, Model, Shape
from logpe import files
from logpe.command import STATUSES, TIME_IS_OVER
from logpe.lm.text import Document, Sampler, document_windows

TINY = Shape(dim=16, layers=2, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty documents of 1,200 to 3,000 bytes; a copy, a short one, a binary and a hidden one besides."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["log", "bias", "of", "attention", "far", "near", "n"]
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(rng.choice(words) for _ in range(4000))[: rng.randint(1200, 3000)])
    (root / "zcopy.txt").write_bytes((root / "part0" / "0.txt").read_bytes())
    (root / "short.txt").write_text("too short")
    (root / "binary.txt").write_bytes(b"\0" * 2000)
    (root / ".hidden.txt").write_text("secret " * 300)
    return root


def arguments(folder, out, *more, lengths=("32", "64")):
    small = ["--steps", "6", "--batch", "2", "--windows", "4", "--samples", "2", "--train-length", "32"]
    return ["--quick", "--corpus", str(folder), "--out", str(out), *small, "--lengths", *lengths, *more]


# --- corpus ---------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_deterministic(folder, tmp_path):
    first, second = corpus.load(str(folder)), corpus.load(str(folder))
    assert first == second
    train, test = ({d.path for d in side} for side in (first.train, first.test))
    assert train
    assert test
    assert not train & test
    assert len(train | test) == 40
    assert not {"zcopy.txt", "short.txt", "binary.txt", ".hidden.txt"} & (train | test)
    assert first.describe()["test"] == {"documents": len(test), "bytes": sum(len(d.text) for d in first.test)}

    for document in first.train + first.test:  # a document stays on its side whatever else there is
        path = tmp_path / document.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document.text)
    (tmp_path / "another.txt").write_text("more " * 300)
    more = corpus.load(str(tmp_path))
    assert more.digest != first.digest
    assert {d.path for d in more.train} - {"another.txt"} == train
    assert {d.path for d in more.test} - {"another.txt"} == test


def test_standard_library_has_long_held_out_documents():
    text = corpus.load("stdlib")
    assert sum(len(d.text) > 4096 for d in text.test) > 10
    assert not any("site-packages" in d.path for d in text.train + text.test)


def test_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="0 documents to train on"):
        corpus.load(str(tmp_path))
    assert status_of(extrapolation.main, arguments(tmp_path, tmp_path)) == 2


def test_sampler_stays_within_documents():
    documents = [Document(c, c.encode() * n) for c, n in (("a", 10), ("b", 7), ("c", 3), ("d", 5))]
    sampler = Sampler(documents, 5)
    batch = sampler(2000, torch.Generator().manual_seed(0))
    assert (batch == batch[:, :1]).all()
    seen = {chr(c): int(n) for c, n in zip(*batch[:, 0].unique(return_counts=True), strict=True)}
    assert seen.keys() == {"a", "b", "d"}  # "c" is too short
    assert abs(seen["a"] / 2000 - 6 / 10) < 0.05  # every start is as likely: 6 + 3 + 1
    with pytest.raises(ValueError, match="11 bytes"):
        Sampler(documents, 11)


def test_windows_take_turns_and_do_not_overlap():
    documents = [Document(str(i), bytes(range(i, i + n))) for i, n in enumerate((50, 90, 9))]
    found = document_windows(documents, 10, 100)
    assert found.shape == (5 + 9, 10)
    assert (found.diff(dim=1) == 1).all()
    assert len(set(found[:2, 0].tolist())) == 2
    assert torch.equal(document_windows(documents, 10, 3), found[:3])
    with pytest.raises(ValueError, match="1000 bytes"):
        document_windows(documents, 1000, 1)


# --- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("length", [8, 57])
def test_answer_is_found_by_a_plain_search(name, length):
    task = tasks.TASKS[name]
    starts, marks = [], set()
    for depth in (None, 0.0, 0.3, 1.0):
        drawn = task.draw(torch.Generator().manual_seed(1), 50, length, depth)
        assert drawn.shape == (50, length + task.answer)
        for row in drawn:
            prompt, answer = bytes(row[:length].tolist()), bytes(row[length:].tolist())
            start = prompt.rindex(b"=")
            assert prompt[start + 1 : start + 1 + len(answer)] == answer
            assert prompt.endswith(b"?")
            marks.add(prompt.count(b"="))
            assert sum(map(prompt.count, b"0123456789")) == (name == "needle")
            if depth is not None:
                starts.append(start)
    assert marks == {"needle": {1}, "after": {1}, "recall": {1, 2}}[name]
    assert set(starts[:50]) == {{"needle": 0, "after": 0, "recall": 2}[name]}
    assert set(starts[100:]) == {length - 3}
    assert torch.equal(drawn, task.draw(torch.Generator().manual_seed(1), 50, length, 1.0))
    assert len(drawn[:, -1].unique()) > 5


# --- model ----------------------------------------------------------------------------------------------------------


def test_alibi_equals_its_definition():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 40, 8), torch.randn(2, 4, 40, 8)
    distance = torch.arange(35, 40)[:, None] - torch.arange(40)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])  # the paper's, for four heads
    bias = torch.where(distance < 0, -math.inf, -slopes[:, None, None] * distance)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    attention = Attention(Shape(dim=32, layers=1, heads=4), ENCODINGS["alibi"])
    assert not any(parameter.requires_grad for parameter in attention.position.parameters())
    torch.testing.assert_close(attention.attend(q, k, v), expected)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_causal_and_learns(name):
    model = Model(TINY, ENCODINGS[name], seed=0)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    torch.testing.assert_close(model(tokens[:, :7]), logits[:, :7])
    torch.testing.assert_close(model(tokens, last=3), logits[:, -3:])
    logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_encodings_start_from_the_same_weights():
    plain = dict(Model(TINY, ENCODINGS["none"], seed=3).named_parameters())
    for name, encoding in ENCODINGS.items():
        weights = dict(Model(TINY, encoding, seed=3).named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in plain.items()), name
    other = dict(Model(TINY, ENCODINGS["none"], seed=4).named_parameters())
    assert not torch.equal(other["embedding.weight"], plain["embedding.weight"])


# --- the study ------------------------------------------------------------------------------------------------------


def test_miniature_study(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert extrapolation.main(arguments(folder, tmp_path), TINY) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "extrapolation-quick.json"
    found = json.loads(path.read_text())
    assert list(found["runs"]) == extrapolation.QUICK
    assert found["corpus"]["sha256"] == corpus.load(str(folder)).digest
    assert found["settings"]["target"] == 16
    for runs in found["runs"].values():
        text, needle = runs["0"]["text"], runs["0"]["needle"]
        assert text["train"]["steps"] == 6
        assert needle["train"]["steps"] == 3
        assert text["lengths"].keys() == needle["lengths"].keys() == {"32", "64"}
        for scored in text["lengths"].values():
            assert 0 < scored["bits_per_byte"] < 12
            assert len(scored["per_window"]) == 4
            assert math.isclose(scored["bits_per_byte"], sum(scored["per_window"]) / 4, abs_tol=1e-3)
        for scored in needle["lengths"].values():
            assert scored["per_depth"].keys() == {"0", "0.25", "0.5", "0.75", "1"}
    rows = {row.split()[0]: row.split()[1:] for row in printed.splitlines() if row.split()}
    assert len(rows["log-bias"]) == 2 + 1 + 2
    assert "-" not in rows["log-bias"]
    assert (tmp_path / "extrapolation-quick.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / ".cache").glob("*.pt"))

    before = path.read_bytes()  # nothing is left to measure: the same file, the same table
    assert extrapolation.main(arguments(folder, tmp_path), TINY) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out == printed

    assert extrapolation.main(arguments(folder, tmp_path, "--encodings", "none+gain", "--tasks"), TINY) == 0
    assert list(json.loads(path.read_text())["runs"]) == [*extrapolation.QUICK, "none+gain"]


def numbers(path):
    """What was measured, without when and how fast."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "commit", "threads")}
        return value

    return strip(json.loads(path.read_text())["runs"])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The numbers of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert extrapolation.main(arguments(folder, out, "--encodings", "log-bias", "none"), TINY) == 0
    return numbers(out / "extrapolation-quick.json")


@pytest.mark.parametrize("pieces", [3, 8, 14])  # in training, in scoring, in the task's training
def test_interrupted_run_resumes_to_the_same_numbers(folder, tmp_path, monkeypatch, capsys, whole, pieces):
    command = arguments(folder, tmp_path, "--encodings", "log-bias", "none")
    steps = 0
    advance = training.Progress.advance

    def interrupted(self, units):
        nonlocal steps
        steps += 1
        if steps == pieces:
            signal.raise_signal(signal.SIGINT)
        advance(self, units)

    with monkeypatch.context() as patch:
        patch.setattr(training.Progress, "advance", interrupted)
        assert extrapolation.main(command, TINY) == 130
    printed = capsys.readouterr().out
    assert "Stopped: the same command" in printed
    assert "log-bias" in printed
    assert len(list((tmp_path / ".cache").glob("*.pt"))) == 1

    trained = []
    draw = study.Text.draw

    def counted(self, generator):
        trained.append(1)
        return draw(self, generator)

    monkeypatch.setattr(study.Text, "draw", counted)
    assert extrapolation.main(command, TINY) == 0
    assert len(trained) == 6 + (6 - 2 if pieces == 3 else 0)  # what was done is not done again
    assert numbers(tmp_path / "extrapolation-quick.json") == whole


def test_a_damaged_checkpoint_is_made_again(folder, tmp_path, monkeypatch, capsys, whole):
    command = arguments(folder, tmp_path, "--encodings", "log-bias", "none")
    advance = training.Progress.advance
    calls = 0

    def stopping(self, units):
        nonlocal calls
        calls += 1
        self.interrupted = calls in (4, 12)  # in a training, and after one
        advance(self, units)

    monkeypatch.setattr(training.Progress, "advance", stopping)
    for _ in range(2):
        assert extrapolation.main(command, TINY) == 130
        (checkpoint,) = (tmp_path / ".cache").glob("*.pt")
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert extrapolation.main(command, TINY) == 0
    assert f"{checkpoint} is damaged" in capsys.readouterr().err
    assert numbers(tmp_path / "extrapolation-quick.json") == whole


def test_two_at_once(tmp_path):
    """Neither loses what the other measured, and what one is about to measure is refused to the other."""

    def stage(trained, score):
        return training.Stage(
            build=lambda name, seed: torch.nn.Linear(1, 1),
            train=lambda model, seed, path, advance: trained.append(seed) or {"steps": 1},
            score=score,
            training_work=1,
            tests={"8": 1},
        )

    def measure(seeds, trained, score=lambda *_: {"value": 1}):
        results = training.Results(tmp_path / "results.json", {"key": "key"})
        training.measure(results, {"job": stage(trained, score)}, ["none"], seeds)

    def meanwhile(*_):
        if not theirs:
            with pytest.raises(files.Busy, match="key-none-0-job"):
                measure([0, 2], theirs)
            measure([1], theirs)
        return {"value": 0}

    ours, theirs = [], []
    measure([0, 1, 2], ours, meanwhile)
    assert (ours, theirs) == ([0, 2], [1])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]["none"]
    assert {seed: jobs["job"]["lengths"]["8"]["value"] for seed, jobs in runs.items()} == {"0": 0, "1": 1, "2": 0}


def test_results_of_another_kind_are_left_alone(folder, tmp_path, capsys):
    path = tmp_path / "extrapolation-quick.json"
    command = arguments(folder, tmp_path, "--encodings", "none", "--tasks")
    assert extrapolation.main([*command, "--minutes", "0"], TINY) == TIME_IS_OVER
    assert extrapolation.main(command, TINY) == 0
    whole = json.loads(path.read_text())
    broken = [dict(whole, runs=runs) for runs in (None, [1], {"none": 1}, {"none": {"0": {"text": []}}})]
    for content in ("", "[]", path.read_text()[:-9], *map(json.dumps, broken)):
        path.write_text(content)
        assert extrapolation.main(command, TINY) == 2
        assert f"{path} is damaged or holds something else: move it away" in capsys.readouterr().err
        assert path.read_text() == content


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--minutes", "nan"], "--minutes: must be at least 0, got nan"),
        (["--learning-rate", "nan"], "--learning-rate: must be above 0, got nan"),
        (["--learning-rate", "inf"], "--learning-rate: must be above 0, got inf"),
        (["--steps", "-5"], "--steps: must be at least 1, got -5"),
        (["--train-length", "4"], "--train-length: must be at least 8, got 4"),
        (["--seeds", "-1"], "--seeds: must be at least 0, got -1"),
        (["--device", "foo"], "--device foo: "),
        (["--corpus", "/nowhere"], "/nowhere"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_use_is_named_in_one_line(folder, tmp_path, capsys, bad, message):
    assert status_of(extrapolation.main, [*arguments(folder, tmp_path), *bad], TINY) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_exception_keeps_what_was_measured(folder, tmp_path, monkeypatch):
    calls = 0
    score = study.score

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(study, "score", failing)
    command = arguments(folder, tmp_path, "--encodings", "none")
    assert extrapolation.main(command, TINY) == 130
    kept = numbers(tmp_path / "extrapolation-quick.json")["none"]["0"]["text"]
    assert kept["train"]
    assert kept["lengths"].keys() == {"32"}
    assert extrapolation.main(command, TINY) == 0
    assert numbers(tmp_path / "extrapolation-quick.json")["none"]["0"]["text"]["lengths"].keys() == {"32", "64"}


def test_different_settings_do_not_mix(folder, tmp_path):
    only = ("--encodings", "none", "--tasks")
    assert extrapolation.main(arguments(folder, tmp_path, *only), TINY) == 0
    first = tmp_path / "extrapolation-quick.json"
    before = first.read_bytes()
    assert extrapolation.main(arguments(folder, tmp_path, *only, lengths=("32", "128")), TINY) == 0
    assert first.read_bytes() == before
    (second,) = tmp_path.glob("extrapolation-quick-*.json")
    found = json.loads(second.read_text())
    assert found["key"] in second.name
    assert found["key"] != json.loads(before)["key"]
    assert found["runs"]["none"]["0"]["text"]["lengths"].keys() == {"32", "128"}
    assert extrapolation.main(arguments(folder, tmp_path, *only, "--seeds", "1"), TINY) == 0  # a seed is an addition
    assert json.loads(first.read_text())["runs"]["none"].keys() == {"0", "1"}


def test_time_limit_and_fresh_start(folder, tmp_path, capsys):
    command = arguments(folder, tmp_path, "--encodings", "none")
    assert extrapolation.main([*command, "--minutes", "0"], TINY) == TIME_IS_OVER
    assert "-" in capsys.readouterr().out
    assert extrapolation.main(command, TINY) == 0
    path = tmp_path / "extrapolation-quick.json"
    known = numbers(path)
    content = json.loads(path.read_text())
    content["runs"]["none"]["0"]["text"]["lengths"]["32"]["bits_per_byte"] = 99.0
    path.write_text(json.dumps(content))
    assert extrapolation.main([*command, "--fresh"], TINY) == 0
    assert numbers(path) == known


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as done:
        extrapolation.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(
        option in text for option in ("--quick", "--corpus", "--minutes", "--fresh", "log-rotary-bias", "needle")
    )


@pytest.mark.parametrize("name", ["classification", "compile_report", "decode", "extrapolation", "throughput"])
def test_programs_say_the_same_of_their_status_and_options(name, capsys):
    """Check what the studies share; generation and translation are made as classification is."""
    with pytest.raises(SystemExit):
        bench_main([name, "--help"])
    text = capsys.readouterr().out
    assert STATUSES.strip() in text
    assert all(option in text for option in ("--out", "--fresh", "--minutes"))
    assert "--resume" not in text
    assert name == "compile_report" or "results (results)" in " ".join(text.split())
