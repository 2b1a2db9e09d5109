"""Translation in miniature: catalogues of a toy language, the cached decoder, scores by hand, resumed runs."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from helpers import status_of
from studies import numbers, stop_at

for package in ("babel", "sacrebleu", "tokenizers"):  # without which bench.study.translation ends
    pytest.importorskip(package)

from babel.messages import Catalog, mofile  # noqa: E402

from bench.study import corpus, runner, translation  # noqa: E402
from bench.study.encoders import BEGIN, END, NEWLINE, PAD, Shape, Translator, translator_encoding  # noqa: E402
from bench.study.translation import Examples, join, make_tests, pad  # noqa: E402
from bench.study.vocabulary import FIRST, Vocabulary  # noqa: E402
from logpe.command import TIME_IS_OVER  # noqa: E402

CPU = torch.device("cpu")
VERBS = {"open": "öffnen", "close": "schließen", "move": "verschieben", "read": "lesen", "delete": "löschen"}
KINDS = {"red": "rote", "long": "lange", "new": "neue", "old": "alte", "whole": "ganze", "last": "letzte"}
THINGS = {"line": "Zeile", "file": "Datei", "page": "Seite", "table": "Tabelle", "formula": "Formel", "list": "Liste"}
PAIRS = [
    (f"{verb} the {kind} {thing}", f"die {KINDS[kind]} {THINGS[thing]} {VERBS[verb]}")
    for verb, kind, thing in itertools.product(VERBS, KINDS, THINGS)
]
PAIRS += [
    (f"{first}, then {second}", f"{german}, dann {other}")
    for (first, german), (second, other) in zip(PAIRS[:60], PAIRS[90:150], strict=True)
]


def write_catalogue(path, messages):
    """A .mo file of (English, German, keywords of babel's Catalog.add)."""
    catalogue = Catalog(locale="de")
    for english, german, *more in messages:
        catalogue.add(english, german, **(more[0] if more else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        mofile.write_mo(file, catalogue)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Catalogues of a language that can be learned."""
    root = tmp_path_factory.mktemp("data")
    write_catalogue(root / "locale/de/LC_MESSAGES/toy.mo", PAIRS)
    return root


def arguments(folder, out, *more):
    small = ["--steps", "6", "--batch", "4", "--tested", "6", "--limit", "12", "--vocabulary", "512"]
    small += ["--dim", "16", "--layers", "1", "--heads", "2", "--device", "cpu", "--processes", "1", "--seeds", "0"]
    return ["--data", str(folder), "--out", str(out), *small, *more]


def tokens_of(pairs):
    vocabulary = Vocabulary((text for pair in pairs for text in pair), 512)
    return vocabulary, [(vocabulary.encode(source), vocabulary.encode(target)) for source, target in pairs]


def texts(count, size, longest=9):
    """Tokens of made-up texts, no two of the same length."""
    return [torch.randint(FIRST, size, (longest - i,)).tolist() for i in range(count)]


# --- catalogues -------------------------------------------------------------------------------------------------------


def test_what_is_read_from_catalogues(tmp_path):
    messages = [
        ("Save ~As", "Speichern ~unter"),
        (("%d page", "%d pages"), ("%d Seite", "%d Seiten"), {"context": "a count"}),
        ("Line\n  break", "Zeilen\numbruch"),
        ("Bitmap", "Bitmap"),  # the same in both
        ("%1 > 2", "%1 größer 2"),  # no word
        ("Nothing", ""),
        *[("Close", german, {"context": str(i)}) for i, german in enumerate(["Schließen", "Zu", "S~chließen"])],
    ]
    write_catalogue(tmp_path / "share/de/LC_MESSAGES/program.mo", messages)
    write_catalogue(tmp_path / "share/fr/LC_MESSAGES/program.mo", [("Wrong language", "Mauvaise langue")])
    (tmp_path / "po").mkdir()
    (tmp_path / "po/de.po").write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        'msgid "Save %(file_name)s"\nmsgstr "%(file_name)s speichern"\n\n'
        '#, fuzzy\nmsgid "Not yet"\nmsgstr "Noch nicht"\n'
    )
    expected = {
        "Save As": "Speichern unter",
        "%d page": "%d Seite",
        "%d pages": "%d Seiten",
        "Line break": "Zeilen umbruch",
        "Close": "Schließen",
        "Save %(file_name)s": "%(file_name)s speichern",
    }
    count, pairs = corpus.read_pairs([tmp_path / "share", tmp_path / "po"])
    assert count == 2
    assert pairs == sorted(expected.items())
    assert corpus.read_pairs([tmp_path]) == (count, pairs)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("_Open...", "Open..."),
        ("Ö~ffnen", "Öffnen"),
        ("&File", "File"),
        ("Row & Column", "Row & Column"),
        ("snake_case_name", "snake_case_name"),
        ("%(verbose_name)s _added", "%(verbose_name)s added"),
        ("$(ARG_1) and {user_id}: _OK", "$(ARG_1) and {user_id}: OK"),
        ("a &lt; b", "a &lt; b"),
        ("approx. ~ 5", "approx. ~ 5"),
        (" two\n  lines\t", "two lines"),
    ],
)
def test_marks_of_keys_go_and_placeholders_stay(text, cleaned):
    assert corpus.clean(text) == cleaned


def test_split_does_not_leak(folder, tmp_path):
    pairs = corpus.load_pairs([folder])
    train, test = ({source for source, _ in side} for side in (pairs.train, pairs.test))
    assert train
    assert test
    assert not train & test
    assert train | test == {source for source, _ in PAIRS}
    for text in PAIRS[:50]:  # near copies go where the text goes
        assert len({corpus.is_held_out(form.format(text[0])) for form in ("{}", "{} 2...", "~{}:", "%1 {}")}) == 1
    more = [*PAIRS, *((f"really {source}", f"wirklich {target}") for source, target in PAIRS)]
    write_catalogue(tmp_path / "de/toy.mo", more)
    longer = corpus.load_pairs([tmp_path])
    assert train <= {source for source, _ in longer.train}
    assert test <= {source for source, _ in longer.test}
    assert longer.sha256 != pairs.sha256


def test_missing_data_says_how_to_get_it(tmp_path, capsys):
    for root in (tmp_path / "nowhere", tmp_path):
        assert status_of(translation.main, arguments(root, tmp_path)) == 2
        printed = capsys.readouterr().err
        assert str(root) in printed
        assert "apt-get download libreoffice-l10n-de" in printed
    (tmp_path / "de.mo").write_bytes(b"\xde\x12\x04\x95 cut short")
    with pytest.raises(ValueError, match=r"de\.mo is not a catalogue"):
        corpus.load_pairs([tmp_path])


@pytest.mark.parametrize("name", ["sacrebleu", "tokenizers", "babel"])
def test_missing_package_says_how_to_get_it(name):
    code = f"import sys; sys.modules[{name!r}] = None; import bench.study.translation"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{name} is not installed: python -m pip install -c constraints.txt -e '.[bench]'"
    ]


# --- tokens, examples, tests ------------------------------------------------------------------------------------------


def test_vocabulary_holds_every_text():
    vocabulary, tokens = tokens_of(PAIRS)
    assert vocabulary.size <= 512
    assert vocabulary.sha256 == tokens_of(PAIRS)[0].sha256
    assert all(vocabulary.decode(source) == pair[0] for pair, (source, _) in zip(PAIRS, tokens, strict=True))
    strange = "▸ 日本 <s> \U0001f600 %1$s"
    assert vocabulary.decode(vocabulary.encode(strange)) == strange
    source, _ = join([(vocabulary.encode(line), [BEGIN]) for line in ("a line", strange, "b")])
    assert vocabulary.decode([BEGIN, *source, END, PAD]) == f"a line\n{strange}\nb"
    assert min(min(source + target) for source, target in tokens) >= FIRST


def test_examples_are_single_pairs_and_lines_within_the_limit():
    _, tokens = tokens_of(PAIRS)
    draw = Examples(tokens, limit=24, batch=25)
    batches = [draw(3, step) for step in range(2 * translation.POOL)]
    assert batches[5] == draw(3, 5) != draw(4, 5)
    pool = [text for batch in batches[: translation.POOL] for text in batch]
    assert max(len(side) for text in pool for side in text) <= 24
    assert all(text not in pool for text in batches[translation.POOL] if NEWLINE in text[0])
    known = {(tuple(source), tuple(target)) for source, target in tokens}

    def lines(side):
        return [tuple(part) for is_end, part in itertools.groupby(side, lambda t: t == NEWLINE) if not is_end]

    counts = []
    for source, target in pool:
        parts = list(zip(lines(source), lines(target), strict=True))
        assert set(parts) <= known
        counts.append(len(parts))
    assert len(counts) == 200
    assert 100 <= counts.count(1) < 150  # a long pair stays alone
    assert max(counts) == translation.MOST_LINES
    with pytest.raises(ValueError, match="--limit"):
        Examples(tokens, limit=2, batch=4)


def test_tests_are_as_long_as_they_say():
    _, tokens = tokens_of(PAIRS)
    limit = sorted(max(map(len, pair)) for pair in tokens)[len(tokens) // 2]
    tests = make_tests(tokens, limit, 10)
    assert tests == make_tests(tokens, limit, 10)
    assert next(iter(tests)) == f"1 line, 1-{limit}"
    assert {int(name.split()[0]) for name in tests} == {1, *translation.LINES}
    for name, found in tests.items():
        count, span = int(name.split()[0]), name.split(", ")[1]
        low, high = (int(x) if x else 10**6 for x in span.replace("+", "-").split("-"))
        assert 0 < len(found) <= 10
        for text in found:
            assert all(side.count(NEWLINE) == count - 1 and low <= len(side) <= high for side in text)


# --- the model --------------------------------------------------------------------------------------------------------

TINY = Shape(vocabulary=300, dim=16, layers=2, heads=2, dropout=0.1)


@pytest.mark.parametrize("name", translation.NAMES)
def test_cached_translation_has_the_models_own_logits(name, monkeypatch):
    model = Translator(TINY, translator_encoding(name, 16), seed=0).eval()
    source = pad(texts(3, 300), CPU)
    most = torch.tensor([20, 13, 5])
    with torch.no_grad():  # so that END comes up now and then, and texts do not repeat one token
        model.embedding.weight.mul_(4)
    seen = []
    logits = model.logits
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda x: seen.append(logits(x)) or seen[-1])
        said = model.translate(source, most)
    for row, (text, whole, limit) in enumerate(zip(source, said, most.tolist(), strict=True)):
        assert END not in whole[:-1]
        assert len(whole) == limit or whole[-1] == END
        cached = torch.cat(seen, dim=1)[row, : len(whole)]
        assert whole == cached.argmax(-1).tolist()
        with torch.no_grad():
            torch.testing.assert_close(cached, model(text[None, text != PAD], torch.tensor([[BEGIN, *whole[:-1]]]))[0])


def test_options_of_an_encoding():
    model = Translator(TINY, translator_encoding("log-bias-rope+base=3+power=0.5:2+shared", 16), seed=0)
    position = model.encoder.layers[0].self_attn.position
    assert position is model.decoder.layers[1].self_attn.position
    assert position.rotary_base == 3
    assert position.power.tolist() == pytest.approx([0.5, 2.0])
    bounded = Translator(TINY, translator_encoding("log-bias+bounded", 16), seed=0)
    assert bounded.encoder.layers[0].self_attn.position.reach == 16
    absent = "no LogPosition"
    for name, message in (("rope-yarn", absent), ("log-bias+rotary=0.5", absent), ("rop", "must be")):
        with pytest.raises(ValueError, match=message):
            translator_encoding(name, 16)
    with pytest.raises(ValueError, match="normalises queries and keys"):
        translator_encoding("log-bias+qk-norm", 16)


def test_translation_ends_at_the_end():
    model = Translator(TINY, translator_encoding("log-bias", 16), seed=0).eval()
    with torch.no_grad():  # END wins always
        model.norm.weight.zero_()
        model.norm.bias.copy_(10 * model.embedding.weight[END])
    source = pad(texts(3, 300), CPU)
    assert model.translate(source, torch.full((3,), 30)) == [[END]] * 3


@pytest.mark.parametrize("name", translation.NAMES)
def test_model_is_causal_and_blind_to_padding(name):
    model = Translator(TINY, translator_encoding(name, 16), seed=0)
    source, target = texts(2, 300), pad(texts(2, 300), CPU)
    assert not torch.equal(model(pad(source, CPU), target), model(pad(source, CPU), target))  # dropout
    model.eval()
    logits = model(pad(source, CPU), target)
    torch.testing.assert_close(model(pad(source, CPU), target[:, :4]), logits[:, :4])
    torch.testing.assert_close(model(pad(source[1:], CPU), target[1:]), logits[1:])
    logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_encodings_differ_in_the_position_alone():
    models = {name: Translator(TINY, translator_encoding(name, 16), seed=5) for name in translation.NAMES}
    plain = models["none"].state_dict()
    for name, model in models.items():
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain.items())
        assert all(".position." in key for key in state.keys() - plain.keys())
        for layer in model.encoder.layers:
            assert bool(layer.self_attn.position) is (name not in ("none", "sinusoid", "log-sinusoid"))
        for layer in model.decoder.layers:
            assert layer.multihead_attn.position is None
            assert bool(layer.self_attn.position) is (name not in ("none", "sinusoid", "log-sinusoid"))
    state = Translator(TINY, translator_encoding("none", 16), seed=6).state_dict()
    assert not any(torch.equal(state[key], plain[key]) for key in plain if plain[key].ndim == 2)


@pytest.mark.parametrize(
    ("name", "told"), [("log-bias", False), ("rope", True), ("log-rotary-bias", True), ("sinusoid", True)]
)
def test_only_a_distance_has_no_direction(name, told):
    model = Translator(TINY, translator_encoding(name, 16), seed=0).eval()
    source = torch.tensor(texts(1, 300))
    there, back = (model.encode(x)[0] for x in (source, source.flip(1)))
    assert torch.allclose(there, back.flip(1), atol=1e-5) is not told


# --- training and scores ----------------------------------------------------------------------------------------------


def test_scores_of_hand_made_translations():
    references = ["Öffnen Sie die Datei", "die erste Zeile\ndie zweite Zeile", "Das ist noch eine Zeile hier"]
    assert translation.measures(references, references) == {
        "chrf": 100.0, "bleu": 100.0, "length_ratio": 1.0, "lines_right": 1.0,
    }  # fmt: skip
    short = [references[0], "die erste Zeile", references[2]]
    found = translation.measures(short, references)
    assert found["length_ratio"] == round(13 / 16, 4)
    assert found["lines_right"] == round(2 / 3, 4)
    assert 50 < found["bleu"] < 100  # by the brevity penalty, every word being right
    assert abs(found["bleu"] - 100 * 2.718281828 ** (1 - 16 / 13)) < 0.01
    nothing = translation.measures(["", "", ""], references)
    assert nothing == {"chrf": 0.0, "bleu": 0.0, "length_ratio": 0.0, "lines_right": round(2 / 3, 4)}


def test_training_learns_to_translate(tmp_path):
    vocabulary, tokens = tokens_of(PAIRS[:8])
    settings = translation.Settings(
        pairs="", vocabulary="", device="", versions={}, shape=Shape(vocabulary.size, 32, 1, 2, 0.0), limit=10,
        steps=120, batch=8, tested=8, learning_rate=1e-2,
    )  # fmt: skip
    model = Translator(settings.shape, translator_encoding("log-rotary-bias", 16), seed=0).eval()
    before = translation.score(model, vocabulary, tokens, lambda n: None)
    examples = Examples(tokens, settings.limit, settings.batch)
    loss = translation.line_loss(model, examples, 0)
    found = runner.fit(model, loss, settings, 120, tmp_path / "model", lambda work: None)
    model.eval()
    after = translation.score(model, vocabulary, tokens, lambda n: None)
    assert found["steps"] == 120
    assert len(found["positions"]) == 2
    assert after["bits_per_character"] < before["bits_per_character"] / 4
    assert after["chrf"] > 90 > before["chrf"]
    assert after["cut_off"] == 0
    # Of the right text for each, whatever order they are translated in.
    assert [text[1] for text in after["examples"]] == [german for _, german in PAIRS[:4]]
    assert [text[0] for text in after["examples"]] == [english for english, _ in PAIRS[:4]]


def test_interrupted_run_resumes_to_the_same_numbers(folder, tmp_path, monkeypatch, capsys):
    encodings = ["--encodings", "sinusoid", "log-bias", "--tested", "2"]
    assert translation.main(arguments(folder, tmp_path / "whole", *encodings)) == 0
    whole = numbers(tmp_path / "whole" / "translation-cpu.json")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("chrF", "length ratio", "8 lines, 13+", "log-bias", "reference"))
    assert (tmp_path / "whole" / "translation-cpu.png").stat().st_size > 10_000
    about = json.loads((tmp_path / "whole" / "translation-cpu.json").read_text())
    assert about["settings"]["steps"] == 6
    assert about["data"]["train_pairs"] + about["data"]["test_pairs"] == len(PAIRS)

    stop_at(monkeypatch, [4, 18])  # in the first training, in the second
    command = arguments(folder, tmp_path / "pieces", *encodings)
    statuses = [translation.main(command) for _ in range(3)]
    assert statuses == [130, 130, 0]
    assert numbers(tmp_path / "pieces" / "translation-cpu.json") == whole
    assert translation.main([*command, "--steps", "5", "--minutes", "0"]) == TIME_IS_OVER  # another file
    assert numbers(tmp_path / "pieces" / "translation-cpu.json") == whole


def test_bad_arguments_are_named(folder, tmp_path, capsys):
    for more in (["--steps", "0"], ["--heads", "3"], ["--vocabulary", "100"], ["--limit", "2"], ["--data", "/no"]):
        assert status_of(translation.main, arguments(folder, tmp_path, *more)) == 2
        assert more[0] in capsys.readouterr().err
