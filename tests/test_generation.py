"""Writing past the training length: decoding with the cache, draws, the measures, and the command in miniature."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import status_of
from studies import numbers, stop_at, write_texts

from bench.study import corpus, generation, judge, protocol, runner
from bench.study.model import ENCODINGS, Model, Shape, encoding
from logpe.command import TIME_IS_OVER

TINY = Shape(dim=16, layers=2, heads=2)
VARIANTS = (
    "log-bias+shared",
    "log-bias+gain=4+sink",
    "log-bias+rotary=0.5",
    "log-invariant+rotary=0.5+gain",
    "rope+qk-norm",
    "rope+rotary=0.5",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty documents of words, 1,100 to 2,000 bytes."""
    return write_texts(tmp_path_factory.mktemp("corpus"), 60, 1100, 2000)


def settings(**changes):
    found = dict(corpus="", device="", versions={}, shape=TINY, train_length=16, length=128, prompt=8, steps=1, batch=2)
    found |= dict(samples=2, real=3, temperature=1.0, top_p=1.0, judge="rope", judge_length=32, judge_steps=1)
    return judge.Settings(**found | dict(judge_batch=2, learning_rate=5e-3) | changes)


def arguments(folder, out, *more):
    small = "--device cpu --processes 1 --train-length 16 --times 4 --prompt 8 --steps 3 --batch-bytes 32"
    small += " --samples 2 --real 2 --judge-length 32 --judge-steps 3 --judge-batch 2 --dim 16 --layers 1 --heads 2"
    return ["--corpus", str(folder), "--out", str(out), *small.split(), *more]


# --- decoding with the cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODINGS, *VARIANTS])
def test_cached_logits_are_those_without_a_cache(name):
    model = Model(TINY, encoding(name, 16), seed=0)
    tokens = torch.randint(256, (3, 40))  # beyond the 16 it is made for
    with torch.inference_mode():
        expected = model(tokens)
        with model.decoding(3, 40):
            parts = [model(part) for part in tokens.split([7, 1, 1, 5, *[1] * 26], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)
        torch.testing.assert_close(model(tokens), expected)  # and nothing of the cache remains


@pytest.mark.parametrize("name", ["none", "rope", "alibi", "log-bias", "log-invariant"])
def test_a_window_hides_what_came_before(name):
    """One layer that knows distances alone sees the same as if the text began there."""
    model = Model(Shape(dim=16, layers=1, heads=2), encoding(name, 16), seed=0)
    tokens = torch.randint(256, (2, 30))
    with torch.inference_mode(), model.decoding(2, 30, window=9):
        model(tokens[:, :20])
        found = torch.cat([model(tokens[:, n : n + 1]) for n in range(20, 30)], dim=1)
    for n in range(20, 30):
        with torch.inference_mode():
            torch.testing.assert_close(found[:, n - 20], model(tokens[:, n - 9 : n + 1])[:, -1])


def test_what_cannot_be_decoded_says_so(folder, tmp_path, capsys):
    model = Model(TINY, encoding("log-bias+logit-gain", 16), seed=0)
    with pytest.raises(ValueError, match="logit-gain"), model.decoding(1, 8):
        pass
    assert status_of(generation.main, arguments(folder, tmp_path, "--encodings", "rope", "log-bias+logit-gain")) == 2
    assert "log-bias+logit-gain: a gain on the whole logit" in capsys.readouterr().err
    model = Model(TINY, encoding("alibi", 16), seed=0)
    with pytest.raises(ValueError, match="cache is full"), model.decoding(1, 8):
        model(torch.randint(256, (1, 9)))
    assert all(attention.cache is None for attention in model.attentions)


@pytest.mark.parametrize("name", ["log-sinusoid", "alibi", "log-rotary-bias"])
def test_writes_what_the_model_without_a_cache_would(name):
    model, asked = Model(TINY, encoding(name, 16), seed=0), settings(length=40, top_p=1e-9)  # only ever the likeliest
    prompts = torch.randint(256, (2, 8))
    text = generation.write(model, prompts, asked, None, 0, lambda n: None)
    expected = prompts
    with torch.inference_mode():
        for _ in range(32):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(text, expected)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_come_as_often_as_they_should():
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    chance = (torch.arange(10000, dtype=torch.float64)[:, None] + 0.5) / 10000

    def shares(temperature, top_p):
        drawn = generation.draw(p.log().expand(10000, 4), chance, temperature, top_p)
        return (drawn.flatten().bincount(minlength=4) / 10000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=1e-3)
    assert shares(1.0, 0.7) == pytest.approx([0, 0.5 / 0.8, 0, 0.3 / 0.8], abs=1e-3)  # 0.5 alone does not reach 0.7
    assert shares(1.0, 0.3) == [0, 1, 0, 0]
    squares = (p**2 / (p**2).sum()).tolist()
    assert shares(0.5, 1.0) == pytest.approx(squares, abs=1e-3)
    sure = torch.tensor([[0.0, -math.inf]])
    assert generation.draw(sure, torch.tensor([[1 - 1e-16]], dtype=torch.float64), 1.0, 1.0).item() == 0


def test_seed_and_temperature_decide_what_is_written():
    model, prompts = Model(TINY, encoding("log-bias", 16), seed=0), torch.randint(256, (2, 8))

    def written(seed, **changes):
        return generation.write(model, prompts, settings(length=32, **changes), None, seed, lambda n: None)

    assert torch.equal(written(0), written(0))
    assert torch.equal(written(0)[:, :8], prompts)
    assert not torch.equal(written(0), written(1))
    assert not torch.equal(written(0), written(0, temperature=0.5))
    assert not torch.equal(written(0), written(0, top_p=0.5))


# --- measures ---------------------------------------------------------------------------------------------------------


def test_repeated():
    text = torch.tensor([list(b"abcabcxxxxabc")])
    assert judge.repeated(text, 3, 100)[0].int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    assert judge.repeated(text, 3, 6)[0].int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    texts = torch.randint(254, 256, (3, 400))  # eight of the largest bytes fill all 64 bits
    for n, history in ((8, 50), (5, 20)):
        found = judge.repeated(texts, n, history)
        for row, marks in zip(texts.tolist(), found.tolist(), strict=True):
            for i, mark in enumerate(marks):
                gram = row[i - n + 1 : i + 1]
                places = range(max(n - 1, i - history), i)
                assert mark == (i >= n - 1 and any(row[j - n + 1 : j + 1] == gram for j in places))


def test_drift_and_printable():
    frequencies = torch.ones(256).double()
    assert judge.drift(torch.arange(256), frequencies) == pytest.approx(0, abs=1e-9)
    assert judge.drift(torch.zeros(7, dtype=torch.int64), frequencies) == pytest.approx(8)
    frequencies[0] = 3 * 255  # a probability of 3/4
    half = torch.tensor([[0, 1], [1, 0]])
    assert judge.drift(half, frequencies) == pytest.approx(0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 * 1020))
    assert judge.printable(torch.tensor(list(b"a\n\t\r ~\x7f\x1f\xff\0"))) == pytest.approx(0.6)


def test_bins_of_positions():
    assert settings().edges == [8, 16, 32, 64, 128]
    assert settings(prompt=5, length=100).edges == [5, 8, 16, 32, 64, 100]
    assert settings(prompt=64, length=100).edges == [64, 100]


def test_judge_reads_no_more_than_it_was_trained_on_and_every_byte_once():
    asked = settings(prompt=8, length=61)  # its end is not that of a piece
    model = Model(TINY, encoding("log-bias", 16), seed=0)
    texts = torch.randint(256, (2, asked.context - asked.prompt + asked.length))
    lengths = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found = judge.judged_bits(model, texts, asked)
    hook.remove()
    assert max(lengths) < asked.judge_length
    assert found.shape == (2, asked.length - asked.prompt)
    for place in range(asked.context, texts.shape[1]):
        first = place - asked.context - (place - asked.context) % asked.piece
        assert asked.context <= place - first < asked.judge_length
        with torch.inference_mode():
            logits = model(texts[:, first:place])[:, -1]
        expected = F.cross_entropy(logits, texts[:, place], reduction="none") / math.log(2)
        torch.testing.assert_close(found[:, place - asked.context], expected)


def test_scores_by_bin():
    asked, model = settings(), Model(TINY, encoding("none", 16), seed=0)
    model.embedding.weight.data.zero_()  # which gives every byte the same chance
    texts = torch.full((4, asked.context - asked.prompt + asked.length), 32)
    texts[:2, -64:] = torch.arange(1, 129).view(2, 64) % 31  # no byte twice, and none a space
    found = judge.scored(model, texts, torch.ones(256).double(), asked)
    assert found["bits"] == [8.0] * 4
    assert found["repetition"] == [1.0, 1.0, 1.0, pytest.approx((0.5 + 33 / 64) / 2, abs=0.26)]
    assert found["drift"][:3] == [8.0] * 3
    assert 5.0 < found["drift"][3] < 6.5  # the mean of two texts of spaces and two of 31 bytes alike
    assert found["printable"][:3] == [1.0] * 3
    assert len(found["bits_of_each_text"]) == 4


# --- the split --------------------------------------------------------------------------------------------------------


def test_writers_judge_and_prompts_share_no_document(folder):
    text, asked = corpus.load(str(folder)), settings()
    texts = judge.Texts(text, asked, [0])
    sides = [{d.path for d in side} for side in (texts.written, texts.judged, text.test)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == 60
    held_out = [d.text for d in text.test]
    for window in texts.windows:
        assert any(bytes(window.tolist()) in document for document in held_out)
    assert torch.equal(texts.real(0), texts.windows[:3])
    more = judge.Texts(text, asked, [0, 1])  # another seed changes nothing for the first
    assert torch.equal(more.real(0), texts.real(0))
    assert not torch.equal(more.real(1), texts.real(0))
    assert texts.frequencies.sum() == sum(len(d.text) for d in texts.written) + 256
    with pytest.raises(ValueError, match="fewer --real"):
        judge.Texts(text, asked, [1000])


# --- the command ------------------------------------------------------------------------------------------------------


ENOUGH = ("--encodings", "rope", "log-bias", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupts: where it is, and what it found."""
    out = tmp_path_factory.mktemp("whole")
    assert generation.main(arguments(folder, out, *ENOUGH)) == 0
    (path,) = out.glob("*.json")
    return path, json.loads(path.read_text())


def test_processes_side_by_side_share_a_judge(whole, folder, tmp_path):
    path, _ = whole
    assert generation.main(arguments(folder, tmp_path, *ENOUGH, "--processes", "2")) == 0
    assert numbers(tmp_path / path.name) == numbers(path)


def test_what_a_run_leaves(whole, folder, capsys):
    pytest.importorskip("matplotlib")
    path, found = whole
    assert {"key", "command", "commit", "date", "python", "corpus", "settings", "edges"} < found.keys()
    assert found["corpus"]["sha256"] == corpus.load(str(folder)).digest
    assert {"writers", "judge", "windows", "test"} < found["corpus"].keys()
    runs = found["runs"]
    assert list(runs) == ["real", "rope", "log-bias"]
    for name, seeds in runs.items():
        assert seeds.keys() == {"0", "1"}
        for run in seeds.values():
            (record,) = run.values()
            assert record["lengths"].keys() == ({"all"} if name == "real" else {"all", "window"})
            for scored in record["lengths"].values():
                assert all(len(scored[measure]) == 3 for measure in ("bits", "repetition", "drift", "printable"))
                assert all(0 < bits < 12 for bits in scored["bits"])
    assert runs["real"]["0"]["judge"]["train"] == runs["real"]["1"]["judge"]["train"]  # the one judge
    assert path.with_suffix(".png").stat().st_size > 10000
    assert generation.main(arguments(folder, path.parent, *ENOUGH)) == 0  # nothing is left to do
    assert json.loads(path.read_text())["runs"] == runs
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    (cells,) = (cells for cells in lines if [cell.strip() for cell in cells[1:3]] == ["log-bias", "window"])
    last = [run["text"]["lengths"]["window"]["bits"][-1] for run in runs["log-bias"].values()]
    real = [run["judge"]["lengths"]["all"]["bits"][-1] for run in runs["real"].values()]
    assert float(cells[6].split("±")[0]) == pytest.approx(sum(last) / 2, abs=1e-3)
    assert float(cells[7]) == pytest.approx((sum(last) - sum(real)) / 2, abs=1e-3)


def test_stopped_at_any_moment_it_finds_the_same(whole, folder, tmp_path, monkeypatch):
    """In the judge's training, in a writer's, and while it writes."""
    stop_at(monkeypatch, [3, 14, 30])
    command = arguments(folder, tmp_path, *ENOUGH)
    assert [generation.main(command) for _ in range(4)] == [130, 130, 130, 0]
    (path,) = tmp_path.glob("*.json")
    assert numbers(path) == numbers(whole[0])


@pytest.mark.parametrize("damaged", [False, True])
def test_minutes_and_a_judge_that_is_gone(folder, tmp_path, capsys, damaged):
    command = arguments(folder, tmp_path, "--encodings", "none", "--seeds", "0")
    assert generation.main([*command, "--minutes", "0"]) == TIME_IS_OVER
    assert "The time is over: the same command" in capsys.readouterr().out
    assert generation.main(command) == 0
    assert generation.main([*command, "0", "1", "--minutes", "0"]) == TIME_IS_OVER  # the table shows what there is
    assert "| none " in capsys.readouterr().out
    (weights,) = (tmp_path / ".cache").glob("*-judge/*/model.safetensors")
    kept = weights.read_bytes()
    more = arguments(folder, tmp_path, "--encodings", "none", "alibi", "--seeds", "0")
    if damaged:
        weights.write_bytes(kept[:-100])
        with pytest.warns(UserWarning, match="model.safetensors is not what was written"):
            assert generation.main(more) == 0  # it is trained again
    else:
        shutil.rmtree(weights.parent)
        assert generation.main(more) == 0
    assert weights.read_bytes() == kept


def test_training_lowers_the_loss_and_the_judge_knows_text_from_noise(folder, tmp_path):
    asked = settings(steps=60, batch=4)
    texts = judge.Texts(corpus.load(str(folder)), asked, [0])
    model = Model(asked.shape, encoding("log-bias", 16), seed=0)

    def bits(text):
        return judge.judged_bits(model, text, asked).mean().item()

    before, noise = bits(texts.real(0)), torch.randint(256, texts.real(0).shape)
    loss = protocol.byte_loss(model, lambda generator: texts.sampler(asked.batch, generator), 0)
    found = runner.fit(model, loss, asked, asked.steps, tmp_path / "checkpoint", lambda work: None)
    assert found["bits_at_the_end"] < before - 3
    assert bits(texts.real(0)) < before - 3
    assert bits(noise) > before


def test_bad_arguments(folder, tmp_path):
    for bad in (
        ["--encodings", "rpoe"],
        ["--judge", "rpoe"],
        ["--samples", "0"],
        ["--samples", "3"],  # more than --real
        ["--prompt", "25"],  # the judge has 24 bytes of context
        ["--times", "1", "--prompt", "16"],
        ["--temperature", "0"],
        ["--top-p", "1.5"],
        ["--seeds", "-1"],
        ["--seeds", "1000"],
        ["--corpus", "nowhere"],
    ):
        assert status_of(generation.main, [*arguments(folder, tmp_path), *bad]) == 2
