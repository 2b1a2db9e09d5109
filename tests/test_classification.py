"""Long-text classification in miniature: the split, the readings, scoring, resuming, and what the command leaves."""

import ast
import csv
import json
import math
import random
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import status_of
from studies import numbers, stop_at

from bench.study import classification as cl
from bench.study import corpus, encoders, vocabulary
from bench.study.model import encoding
from logpe.lm.model import Shape

pytest.importorskip("tokenizers")

TINY = Shape(dim=16, layers=2, heads=2, vocabulary=400)


def settings(**changes):
    return cl.Settings(
        **dict(corpus="", device="", versions={}, shape=TINY, train_length=16, joined_lengths=(32, 64))
        | dict(steps=1, batch=64, documents=20, joined=6, learning_rate=1e-2, word_dropout=0.0)
        | changes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes out of the standard library: its code, and its docstrings; 256 to 3,000 characters."""
    root, rng = tmp_path_factory.mktemp("classes"), random.Random(0)
    texts = {"code": [], "prose": []}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]:
        source = path.read_text(encoding="utf-8", errors="replace")
        documented = ast.get_docstring(ast.parse(source)) or ""
        if len(documented) > 256:
            texts["prose"].append(documented[:3000])
            start = rng.randrange(max(1, len(source) - 3000))
            texts["code"].append(source[start : start + rng.randint(300, 3000)])
    for label, found in texts.items():
        (root / label).mkdir()
        for i, text in enumerate(found):
            (root / label / f"{i}.txt").write_text(text, encoding="utf-8")
    (root / "readme.txt").write_text("of no class " * 50)
    return root


def samples(lengths, labels=None):
    """Documents in which every token tells its document: its number + 2."""
    tokens = [torch.full((n,), i + 2) for i, n in enumerate(lengths)]
    return cl.Samples(tokens, torch.tensor(labels or [0] * len(lengths)))


# --- documents ------------------------------------------------------------------------------------------------------


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def review(i, length=300):
    return f"{i}. " + "so it goes, " * (length // 12)


def test_split_does_not_leak(tmp_path):
    rows = [[review(i), str(i % 2), "imdb"] for i in range(200)]
    rows += [[review(i) + "<br /><br />", str(i % 2), "copy"] for i in range(200)]  # the same once cleaned
    rows += [[f"long {review(i, 6000)}", str(i % 2), "imdb"] for i in range(8)]
    rows += [["too short", "0", "imdb"]]
    path = write(tmp_path / "reviews.csv", [["text", "label", "source"], *rows])
    found = corpus.load_reviews(path)
    train, test = ({d.text for d in side} for side in (found.train, found.test))
    assert len(found.train) + len(found.test) == len(train) + len(test) == len(train | test) == 208
    assert not any("<br" in text or text.startswith(("too short", "long")) for text in train)
    assert sum(text.startswith("long") for text in test) == 8
    assert 25 < len(test) - 8 < 80  # a quarter of 200
    assert all(d.label == str(int(d.text.removeprefix("long ").split(".")[0]) % 2) for d in found.train + found.test)

    random.Random(1).shuffle(rows)
    more = corpus.load_reviews(write(path, [["text", "label", "source"], *rows, [review(1000), "1", "imdb"]]))
    assert more.digest != found.digest
    assert {d.text for d in more.train} - {review(1000).strip()} == train
    assert {d.text for d in more.test} - {review(1000).strip()} == test


def test_vocabulary_and_batches_come_from_the_training_side():
    known, unknown = "film plot actor " * 30, "secret ending " * 30
    train = [corpus.Review(f"{known} {i}", str(i % 2)) for i in range(20)]
    test = [corpus.Review(f"{known} {unknown} {i}", str(i % 2)) for i in range(20)]
    task = cl.Task(corpus.Reviews("", ["0", "1"], train, test, ""), settings())
    assert sum((tokens == cl.UNKNOWN).sum() for s in task.tests.values() for tokens in s.tokens if len(tokens) > 16)
    for step in range(5):
        tokens, labels = task.draw(torch.Generator().manual_seed(step))
        assert tokens.shape == (64, 16)
        assert not (tokens == cl.UNKNOWN).any()
        assert set(labels.tolist()) == {0, 1}


def test_crops_are_from_all_over_and_words_are_hidden():
    task = cl.Task.__new__(cl.Task)
    task.settings = settings(batch=4000, word_dropout=0.25)
    task.train = cl.Samples([torch.arange(100, 140), torch.arange(200, 210)], torch.tensor([1, 0]))
    tokens, labels = task.draw(torch.Generator().manual_seed(0))
    long, short = tokens[labels == 1], tokens[labels == 0]
    assert (short[:, 10:] == cl.PAD).all()
    assert torch.equal(short[:, :10].max(0).values, torch.arange(200, 210))
    assert abs((tokens == cl.UNKNOWN).sum() / (tokens != cl.PAD).sum() - 0.25) < 0.02
    starts = (long - torch.arange(16)).max(1).values  # where something is seen, it tells the start
    assert set(starts.tolist()) == set(range(100, 125))
    known = long != cl.UNKNOWN
    assert torch.equal((starts[:, None] + torch.arange(16))[known], long[known])


def test_ranges_of_lengths():
    lengths = [1, 16, 17, 32, 33, 64, 65, 128, 200]
    found = cl.by_length(samples(lengths), 16, most=3, fewest=3)
    assert {name: [len(t) for t in s.tokens] for name, s in found.items()} == {
        "up to 16": [1, 16], "17-32": [17, 32], "33-64": [33, 64], "over 64": [65, 128, 200],
    }  # fmt: skip
    assert [len(t) for t in cl.by_length(samples(lengths), 16, 2, 3)["over 64"].tokens] == [65, 128]
    assert list(cl.by_length(samples([10, 17]), 16, 9, 5)) == ["up to 16", "over 16"]


def test_joined_documents_have_one_class_and_share_nothing():
    lengths, labels = [5, 30, 7, 9, 20, 3, 40, 40], [0, 1, 0, 0, 1, 1, 0, 1]
    found = cl.join(samples(lengths, labels), 20, 10)
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert [t.unique().tolist() for t in found.tokens] == [[2, 4, 5], [3], [8], [6]]
    assert all(len(t) == 20 for t in found.tokens)
    assert found.tokens[0].tolist() == [2] * 5 + [4] * 7 + [5] * 8  # the last is cut
    assert len(cl.join(samples(lengths, labels), 20, 3)) == 3
    assert len(cl.join(samples(lengths, labels), 1000, 3)) == 0


def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    assert status_of(cl.main, ["--device", "cpu"]) == 2
    assert corpus.REVIEWS_HELP in capsys.readouterr().err
    with pytest.raises(ValueError, match="pip install"):
        corpus.load_reviews(tmp_path / "nothing")
    with pytest.raises(ValueError, match="columns text and label, got words"):
        corpus.load_reviews(write(tmp_path / "bad.csv", [["words"], ["x"]]))
    with pytest.raises(ValueError, match="in 1 classes"):
        corpus.load_reviews(write(tmp_path / "one.csv", [["text", "label"], *([review(i), "1"] for i in range(40))]))
    for name in ("rope-yarn", "rop", "log-bias+logit-gain", "log-bias+rotary=0.5"):
        assert status_of(cl.main, ["--encodings", name]) == 2


def test_without_the_library_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        vocabulary.train_tokenizer([], 9)


# --- model and scoring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cl.NAMES)
def test_padding_changes_nothing_and_order_matters_where_there_is_an_encoding(name):
    model = encoders.Classifier(TINY, 3, encoding(name, 16), seed=0).eval()
    torch.nn.init.normal_(model.head.weight)
    documents = [torch.randint(2, 400, (n,)) for n in (5, 40, 23)]
    with torch.no_grad():
        alone = torch.cat([model.predict(d[None]) for d in documents])
        padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=cl.PAD)
        torch.testing.assert_close(model.predict(padded), alone)
        torch.testing.assert_close(model.train().predict(padded), alone)
        shuffled = model.predict(documents[1].flip(0)[None])
    # Distances do not tell a text from the same read backwards; where each word stands does not, without an encoding.
    blind = name.removesuffix("+gain") in ("none", "alibi", "kerple", "log-bias", "log-invariant")
    assert torch.allclose(shuffled, alone[1:2], atol=1e-5) == blind
    torch.testing.assert_close(alone.exp().sum(-1), torch.ones(3))


def test_words_near_each_other_count_more_with_a_log_bias():
    tokens = torch.randint(2, 400, (1, 40))
    mixed = tokens[:, torch.randperm(40)]
    for name, same in (("none", True), ("log-bias", False)):
        model = encoders.Classifier(TINY, 3, encoding(name, 16), seed=0).eval()
        torch.nn.init.normal_(model.head.weight)
        assert torch.allclose(model.predict(tokens), model.predict(mixed), atol=1e-5) == same


def test_encodings_start_from_the_same_weights():
    plain = dict(encoders.Classifier(TINY, 2, encoding("none", 16), seed=3).named_parameters())
    for name in (*cl.NAMES, "log-bias-rope+base=3+power=0.5:2+shared"):
        weights = dict(encoders.Classifier(TINY, 2, encoding(name, 16), seed=3).named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in plain.items()), name
    first, second = (plain[f"encoder.layers.{i}.self_attn.in_proj_weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(dict(encoders.Classifier(TINY, 2, encoding("none", 16), 4).named_parameters())[
        "embedding.weight"], plain["embedding.weight"])  # fmt: skip


class Oracle(encoders.Classifier):
    """Log-odds of class 1: what the tokens but PAD sum up to, those above 50 counting against."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read = []

    def forward(self, tokens):
        self.read.append(tokens.shape)
        value = torch.where(tokens > 50, 50 - tokens, tokens).sum(1).float()
        return torch.stack([torch.zeros_like(value), value], 1) / 100


def test_scoring_of_hand_made_documents(monkeypatch):
    documents = [
        torch.tensor([3] * 4),  # for class 1, however it is read
        torch.tensor([60] * 16 + [2] * 200),  # against at first, for it in all
        torch.tensor([9] * 16 + [90] * 4),  # for it at first, against it in all
        torch.tensor([70] * 40),  # against
    ]
    task = cl.Task.__new__(cl.Task)
    task.settings, task.tests = settings(), {"made": cl.Samples(documents, torch.tensor([1, 1, 0, 1]))}
    done = []
    found = cl.score(oracle := Oracle(), task, "made", done.append)
    assert (found["whole_right"], found["cut_right"]) == ("1110", "1000")
    assert (found["whole"], found["cut"]) == (0.75, 0.25)
    assert (found["documents"], found["tokens"], found["commonest_class"]) == (4, 30, 0.75)
    pieces = [piece for reading in task.readings(task.tests["made"]).values() for d in reading for piece in d]
    assert sum(done) == sum(cl.work(1, len(piece)) for piece in pieces)
    assert (4, 216) in oracle.read

    windows = task.readings(task.tests["made"])["windows"]
    assert [len(pieces) for pieces in windows] == [1, 14, 2, 3]
    assert all(torch.equal(torch.cat(pieces), d) for pieces, d in zip(windows, documents, strict=True))
    assert max(len(piece) for pieces in windows for piece in pieces) <= 16
    answers = cl.classify(oracle, windows, done.append)
    for answer, pieces in zip(answers, windows, strict=True):
        alone = torch.stack([oracle.predict(piece[None])[0] for piece in pieces])
        torch.testing.assert_close(answer, alone.mean(0))


# --- findings -------------------------------------------------------------------------------------------------------


def record(whole, cut, tokens):
    found = {"documents": len(whole), "tokens": tokens, "commonest_class": 0.5, "seconds": 1.0}
    for reading, right in (("whole", whole), ("cut", cut), ("windows", whole)):
        found |= {reading: sum(map(int, right)) / len(right), f"{reading}_right": right}
    return found


def cells(table):
    """By the first two columns, without the alignment."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {tuple(line[:2]): line[2:] for line in lines}


def test_tables_of_known_numbers():
    def run(short, long):
        lengths = {"up to 16": record(short, short, 9)} if short else {}
        return {cl.JOB: {"train": {}, "lengths": lengths | {"over 16": record(long, "1000", 30)}}}

    runs = {"log-bias": {"0": run("1111", "1110"), "1": run("0111", "1100")}, "rope": {"0": run("", "1001")}}
    accuracy, differences = cells(cl.accuracy_table(runs)), cells(cl.difference_table(runs, "rope", 16))
    assert accuracy["encoding", "reading"] == ["seeds", "up to 16 (4)", "over 16 (4)"]
    assert accuracy["log-bias", "whole"] == ["2", "87.5 ± 17.7", "62.5 ± 17.7"]
    assert accuracy["rope", "cut"] == ["1", "-", "25.0"]
    # over 16, whole - cut: documents 0, 1, 0.5, 0
    assert differences["log-bias", "whole - cut"][1] == f"+37.5 ± {3.182 * 100 * math.sqrt(0.6875 / 3) / 2:.1f}"
    assert differences["log-bias", "whole - cut"][2] == differences["log-bias", "whole - cut"][1]
    assert differences["log-bias", "whole - rope's"][0] == "-"
    assert differences["log-bias", "whole - rope's"][1].startswith("+25.0 ±")  # seed 0 alone: 1110 against 1001
    assert ("rope", "whole - rope's") not in differences


# --- the command ----------------------------------------------------------------------------------------------------


def arguments(folder, out, *more):
    small = ["--steps", "120", "--batch", "16", "--documents", "20", "--joined", "6", "--train-length", "16"]
    small += ["--times", "8", "--dim", "16", "--layers", "1", "--heads", "2", "--vocabulary", "400"]
    small += ["--learning-rate", "1e-2", "--encodings", "rope", "log-bias", "--seeds", "0"]
    return ["--device", "cpu", "--processes", "1", "--data", str(folder), "--out", str(out), *small, *more]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Results that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert cl.main(arguments(folder, out)) == 0
    return out / "classification-cpu.json"


def test_it_learns_and_leaves_a_record(whole):
    found = json.loads(whole.read_text())
    assert {"key", "command", "commit", "date", "python", "corpus", "settings"} < found.keys()
    assert found["corpus"]["train"]["by_class"].keys() == {"code", "prose"}
    assert found["settings"]["joined_lengths"] == [32, 64, 128]
    assert list(found["runs"]) == ["rope", "log-bias"]
    for name, seeds in found["runs"].items():
        run = seeds["0"][cl.JOB]
        assert run["train"]["loss_at_the_end"] < 0.65 * math.log(2)
        assert run["train"]["accuracy_at_the_end"] > 0.8
        assert len(run["train"]["positions"]) == (name == "log-bias")
        assert list(run["lengths"])[-3:] == ["joined 32", "joined 64", "joined 128"]
        for test, scored in run["lengths"].items():
            for reading in cl.READINGS:
                right = scored[f"{reading}_right"]
                assert len(right) == scored["documents"]
                assert scored[reading] == pytest.approx(right.count("1") / len(right), abs=1e-4)
            if test.startswith("joined"):
                assert scored["tokens"] == int(test.split()[1])
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert all(path.name.startswith(".") for path in (whole.parent / ".cache").iterdir())  # locks


def test_interrupted_it_goes_on_to_the_same_numbers(whole, folder, tmp_path, capsys, monkeypatch):
    stop_at(monkeypatch, range(37, 1000, 37))
    command = arguments(folder, tmp_path)
    stops = 0
    while status := cl.main(command):
        assert status == 130
        assert "resumes from here" in capsys.readouterr().out
        stops += 1
    assert stops > 3
    assert numbers(tmp_path / "classification-cpu.json") == numbers(whole)
    printed = capsys.readouterr().out
    assert cl.main(command) == 0  # nothing is left to measure
    assert capsys.readouterr().out == printed
