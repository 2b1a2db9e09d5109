"""``python -m logpe generate`` on what train wrote: prompts, options, and folders that nobody should trust."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from logpe.__main__ import main
from logpe.lm import model as language_model
from logpe.lm.model import LanguageModel, Shape

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as train leaves it, with a small model of bytes."""
    run = tmp_path_factory.mktemp("run")
    language_model.save_pretrained(LanguageModel(Shape(16, 1, 2), {}, seed=0), run / "transformers", end=0)
    return run


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the model, to spoil."""
    return Path(shutil.copytree(trained / "transformers", tmp_path / "model"))


def generate(model: Path, *options: str) -> int:
    return main(["generate", "--model", str(model), "--device=cpu", "--max-new-tokens=5", *options])


def refused(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> str:
    assert generate(model, *options) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# --- prompts and options ----------------------------------------------------------------------------------------------


def test_folder_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(trained, "--prompt=log") == generate(trained / "transformers", "--prompt=log") == 0
    first, second = capsys.readouterr().out.split("log")[1:]
    assert first == second != ""


def test_prompt_from_standard_input(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(trained, "--prompt=caf\u00e9") == 0
    expected = capsys.readouterr().out
    for options in ([], ["--prompt=-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("caf\u00e9\n".encode())))
        assert generate(trained, *options) == 0
        assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "--prompt must hold at least one token" in refused(capsys, trained)
    terminal = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "--prompt must be given, or a text on standard input" in refused(capsys, trained)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_prompt_that_ends_inside_a_character(trained: Path, encoding: str) -> None:
    """Its bytes go to the model as they are, whatever the locale."""
    environment = dict(os.environ)
    if encoding == "ascii":
        environment |= dict(LC_ALL="C", PYTHONUTF8="0")
    command = [sys.executable, "-m", "logpe", "generate", "--model", str(trained), "--device=cpu", "--max-new-tokens=1"]
    prompt = b"--prompt=caf\xc3"
    ended = subprocess.run([*map(os.fsencode, command), prompt], env=environment, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(b"caf")


def test_sigterm(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(language_model, "load_converted", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert generate(trained, "--prompt=x") == 130
    assert "python -m logpe generate: stopped" in capsys.readouterr().err


def test_prompt_is_not_truncated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor padded, whatever the file of the tokenizer says."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20, pad_id=9, pad_token="t9")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert generate(folder, "--prompt=t1 t2 t3 t4") == 0
    words = capsys.readouterr().out.split()
    assert words[:4] == ["t1", "t2", "t3", "t4"]
    assert len(words) <= 9


def test_top_k(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The likeliest token alone is what temperature 0 takes."""
    outputs = []
    for options in (["--top-k=1", "--seed=5"], ["--top-k=1", "--seed=6"], ["--temperature=0"], ["--seed=5"]):
        assert generate(trained, "--prompt=log", *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k=0"], "--top-k must be at least 1, got 0"),
        (["--temperature=nan"], "--temperature must be at least 0, got nan"),
        (["--temperature=inf"], "--temperature must be at least 0, got inf"),
        (["--top-p=nan"], "--top-p must be in (0, 1], got nan"),
        (["--device=foo"], "--device foo: "),
        (["--device=meta"], "--device meta: "),
    ],
)
def test_refuses_options(trained: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, trained, "--prompt=x", *options)


# --- folders ----------------------------------------------------------------------------------------------------------


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED: list[tuple[str, Any]] = [  # a file, and its content; half of it; or changed values of config.json
    *(
        ("config.json", values)
        for values in (
            dict(architectures=None),
            dict(architectures=[5]),
            dict(architectures="LlamaForCausalLM"),
            dict(architectures=["pipeline"]),
            dict(architectures=["Trainer"]),
            dict(architectures=["../evil"]),
            dict(model_type="evil"),
            dict(vocab_size="many"),
            dict(vocab_size=-5),
            dict(hidden_size=15),
            dict(num_attention_heads=0),
            dict(num_hidden_layers=10**6 * -1),
            dict(log_position=5),
            dict(log_position=dict(preset="evil")),
            dict(log_position=dict(preset="log-bias", share_position=False, keep_positions=False, evil=1)),
            dict(attn_implementation="evil/kernel"),
            dict(_attn_implementation="evil/kernel:attention"),
            dict(dtype="evil"),
            b"{",
            b"[]",
            b"\xff\xfe",
        )
    ),
    ("model.safetensors", b""),
    ("model.safetensors", "half"),
    ("tokenizer.json", b"{}"),
    ("tokenizer_config.json", b"["),
    ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
    ("tokenizer.model", b"evil"),
    ("generation_config.json", b'{"eos_token_id": "x", "max_length": "y"}'),
]


@pytest.mark.parametrize(("name", "content"), REFUSED, ids=str)
def test_refused_files(folder: Path, name: str, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / name
    if isinstance(content, dict):
        change(folder, **content)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    assert str(folder) in refused(capsys, folder, "--prompt=x")


def test_weights_that_are_not_finite(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel(Shape(16, 1, 2), {}, seed=0)
    model.blocks[0].mlp.up.weight.data[3, 2] = torch.nan
    language_model.save_pretrained(model, tmp_path, end=0)
    message = refused(capsys, tmp_path, "--prompt=x")
    assert "holds numbers that are not finite, in model.layers.0.mlp.gate_proj" in message


EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
def generate(model, *args, **kwargs):
    Path({mark!r}).touch()
"""


class Pickled:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["tokenizer", "config", "both in config", "custom_generate", "pickle", "adapter"])
def test_code_of_a_folder_does_not_run(
    folder: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anybody asked: "y" would be the answer."""
    mark = tmp_path / "ran"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    harmless = False
    if how == "tokenizer":
        tokenizer = dict(tokenizer_class="Tokenizer", auto_map=dict(AutoTokenizer=["evil.Tokenizer", "evil.Tokenizer"]))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    elif how == "config":
        change(folder, auto_map=dict(AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model"))
        harmless = True  # the model is Transformers' own
    elif how == "both in config":
        change(folder, auto_map=dict(AutoConfig="evil.Config", AutoTokenizer=["evil.Tokenizer", "evil.Tokenizer"]))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Tokenizer"}')
    elif how == "custom_generate":
        (folder / "custom_generate").mkdir()
        (folder / "evil.py").rename(folder / "custom_generate" / "generate.py")
        harmless = True
    elif how == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(mark)))
    else:
        (folder / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path="evil/base")))
    if harmless:
        assert generate(folder, "--prompt=x") == 0
    else:
        message = refused(capsys, folder, "--prompt=x")
        assert str(folder) in message
        assert "=True" not in message  # the advice of Transformers, which nobody can follow here
    assert not mark.exists()
