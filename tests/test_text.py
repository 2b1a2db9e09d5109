"""Text for a language model: what is read and what is left out, by name; tokens, their split and their windows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from logpe.lm import text

ROOT = Path(__file__).parents[1]


def read(*sources: Path, **options: Any) -> tuple[dict[str, bytes], list[str]]:
    """The documents, and what was left out."""
    skipped = text.Skipped()
    found = text.documents(sources, skipped=skipped, **options)
    return {document.path: document.text for document in found}, skipped.lines()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="names and links of POSIX")
def test_what_is_left_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for folder in (root / "sub" / "deep", root / ".git", root / "locked", root / "run", root / "old", elsewhere):
        folder.mkdir(parents=True)
    expected = {"a": b"first", "sub/b": b"second", "sub/deep/c": b"third", "linked/d": b"fourth", "link": b"fifth"}
    expected["sub/caf\udce9"] = b"sixth"  # 0xe9 alone is no UTF-8
    for name, content in expected.items():
        if "link" not in name:
            Path(os.fsdecode(os.path.join(root, name))).write_bytes(content)
    (elsewhere / "d").write_bytes(b"fourth")
    (tmp_path / "fifth").write_bytes(b"fifth")
    (root / "linked").symlink_to(elsewhere)
    (root / "link").symlink_to(tmp_path / "fifth")
    (root / "again").symlink_to("sub")  # read once, under its own name
    (root / "sub" / "around").symlink_to("..")
    (root / "up").symlink_to(tmp_path)
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    for name in (".hidden", ".git/x", "locked/x", "run/x", "old/tokens.safetensors", "old/metrics.jsonl", "secret"):
        (root / name).write_bytes(b"not to be read")
    for i in range(5):
        (root / f"binary{i}").write_bytes(b"a\0b")
    (root / "none").touch()
    (root / "z").write_bytes(b"first")

    def refusing(original: Any, name: str) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir, "/locked"))
    monkeypatch.setattr("builtins.open", refusing(open, "/secret"))
    found, lines = read(root, out=root / "run")
    assert found == expected
    assert sorted(lines) == sorted(
        [
            "left out, hidden: .git, .hidden",
            "left out, the output of a training: old, run",
            "left out, a link to a folder around the text: up, sub/around",
            "left out, a zero byte is no text: binary0, binary1, binary2 and 2 more",
            "left out, cannot be read (No such file or directory): broken",
            "left out, cannot be read (Permission denied): locked, secret",
            "left out, not a file: pipe",
            "left out, empty: none",
            "left out, a copy of another: z",
        ]
    )
    with pytest.warns(UserWarning, match="cannot be read"):  # nobody else would say so
        assert len(list(text.folder(root))) > 6
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, "/text"))
    with pytest.raises(PermissionError):
        read(root)


NAMES = """
import sys
from pathlib import Path
from logpe.lm import text

for document in text.documents([Path(sys.argv[1])]):
    print(document.name.hex(), document.hash, document.text.decode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_are_bytes(tmp_path: Path) -> None:
    """The same documents on the same sides, whatever the locale."""
    names = [b"a", "\u00e9".encode(), b"caf\xe9", "\u65e5".encode()]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(name.hex())
    printed = []
    for locale in (dict(PYTHONUTF8="1"), dict(LC_ALL="C", PYTHONUTF8="0")):
        environment = {**os.environ, **locale}
        command = [sys.executable, "-c", NAMES, str(tmp_path)]
        printed.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert printed[0] == printed[1]
    assert [line.split()[0] for line in printed[0].splitlines()] == [name.hex() for name in sorted(names)]


def test_several_sources(tmp_path: Path) -> None:
    for name in ("one/a", "two/a", "two/b", "three"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    sources = [tmp_path / name for name in ("one", "two", "three")]
    found = [document.text.decode() for document in text.documents(sources)]
    assert found == ["one/a", "two/a", "two/b", "three"]  # by path
    text.write_tokens(tmp_path / "tokens", sources, None)
    assert text.load_tokens(tmp_path / "tokens").origin["source"] == [str(source.resolve()) for source in sources]
    with pytest.raises(ValueError, match=f"no file or folder {tmp_path / 'four'}"):
        text.documents([*sources, tmp_path / "four"])


def test_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def write(name: str, rows: list[Any]) -> Path:
        table = datasets.table.InMemoryTable.from_pydict({"body": rows})
        dataset = datasets.Dataset(table, fingerprint="0")  # given, as some versions fail to compute it
        datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / name)
        return tmp_path / name

    root = write("data", [*(f"text {i} " * 20 for i in range(30)), None, "with\0zero", ""])
    found, lines = read(root, column="body")
    assert len(found) == 31
    assert found["train/7"] == b"text 7 " * 20
    assert found["train/31"] == b"withzero"
    assert lines == [
        "left out, no text in the row: train/30",
        "left out, zero bytes of the row: train/31",
        "left out, empty: train/32",
    ]
    with pytest.raises(ValueError, match="--column must be one of body"):
        read(root)
    with pytest.raises(ValueError, match=r"--column must hold text, got 'body' in .*: int in row 0"):
        read(write("numbers", [1, 2]), column="body")


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"log": 0, "bias": 1, "[UNK]": 2, "[PAD]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=3, pad_token="[PAD]", length=300)
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "text").write_bytes(b"log bias far " * 60 + b"\xff")
    told: list[str] = []
    text.write_tokens(tmp_path / "tokens", [tmp_path / "text"], tmp_path / "words.json", say=told.append)
    found = text.load_tokens(tmp_path / "tokens")
    tokens = [0, 1, 2] * 60 + [2]
    cut = len(tokens) - len(tokens) // 10
    assert found.train.tolist() == [*tokens[:cut], 4]
    assert found.test.tolist() == [*tokens[cut:], 4]
    assert found.vocabulary == 5
    assert told == [
        "read 1 documents, 781 bytes",
        "left out, bytes that are no UTF-8: text",
        "--tokenizer makes 61 tokens of text that it does not know",
    ]


def test_characters_without_a_token_are_counted(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.save(str(tmp_path / "letters.json"))
    (tmp_path / "text").write_text("ab\u00e9a \u65e5b\u65e5\n" * 50)
    told: list[str] = []
    text.write_tokens(tmp_path / "tokens", [tmp_path / "text"], tmp_path / "letters.json", say=told.append)
    assert told[1:] == [r"left out, characters that --tokenizer has no token for: 150, such as '\u65e5', '\xe9'"]


def test_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"log\xff bias")
    with pytest.raises(ValueError, match="the tokens reach 255, and the model has a vocabulary of 255"):
        text.write_tokens(tmp_path / "tokens", [tmp_path / "text"], None, end=3, vocabulary=255)
    text.write_tokens(tmp_path / "tokens", [tmp_path / "text"], None, end=3, vocabulary=256)
    assert text.load_tokens(tmp_path / "tokens").train[-1] == 3


@pytest.mark.parametrize("damage", ["half", "header", "bit", "empty", "other"])
def test_damaged_tokens(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens"
    (tmp_path / "text").write_bytes(bytes(random.Random(0).choices(range(1, 256), k=500)))
    text.write_tokens(path, [tmp_path / "text"], None)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-20] ^= 1
    elif damage == "other":
        from safetensors.torch import save_file

        save_file({"train": torch.zeros(3)}, path, {"about": json.dumps(dict(vocabulary=256))})
        content = bytearray(path.read_bytes())
    else:
        del content[{"half": len(content) // 2, "header": 100, "empty": 0}[damage] :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: "):
        text.load_tokens(path, check=True)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import safetensors.torch

    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device")

    (tmp_path / "text").write_text("log bias " * 50)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"tokens.* cannot be written: .*No space left on device"):
        text.write_tokens(tmp_path / "tokens", [tmp_path / "text"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


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
    prepared = text.Tokens(tokens, tokens, torch.tensor([8, 50, 100]), 256, {}, "")
    found, lengths = text.held_out_windows(prepared, [4, 9, 64], 100)
    assert lengths == [4, 9]
    assert found[:, 0].tolist() == [8, 50, 18, 60, 28, 70, 38, 80, 90]  # documents take turns
    assert (found.diff(dim=1) == 1).all()
    found, lengths = text.held_out_windows(prepared, [60, 80], 100)  # longer than any document
    assert (found.shape, lengths) == ((1, 81), [60, 80])


def test_one_file_is_split_by_place(tmp_path: Path) -> None:
    content = bytes(random.Random(0).choices(range(1, 256), k=500))
    (tmp_path / "one").write_bytes(content)
    text.write_tokens(tmp_path / "tokens", [tmp_path / "one"], None)
    prepared = text.load_tokens(tmp_path / "tokens")
    assert bytes(prepared.train.tolist()) == content[:450] + b"\0"
    assert bytes(prepared.test.tolist()) == content[450:] + b"\0"
    assert prepared.test_ends.tolist() == [51]
