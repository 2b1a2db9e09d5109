"""What README.md shows works: its Python runs, and the programs take the options of its commands."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.__main__
import logpe.__main__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (match[1], README[: match.start(2)].count("\n"), match[2])  # language, lines before it, text
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
SHELL = "\n".join(text for language, _, text in BLOCKS if language in ("", "sh", "bash", "shell"))
INLINE = "\n".join(re.findall(r"`(python -m (?:bench|logpe) [^`]+)`", README))
COMMANDS = {
    shlex.join(words)
    for line in f"{SHELL}\n{INLINE}".splitlines()
    for command in line.split(" && ")
    if (words := shlex.split(command, comments=True))
}


def a_language_model() -> dict[str, Any]:
    """Names that the lines on Transformers take for granted."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, pad_token_id=0, max_position_embeddings=64)  # fmt: skip
    inputs = dict(input_ids=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4)
    return dict(model=AutoModelForCausalLM.from_config(config), inputs=inputs,
                AutoModelForCausalLM=AutoModelForCausalLM)  # fmt: skip


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, each with the names of those before it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = dict(rejected=1)  # tokens of a draft
    blocks = [(line, text) for language, line, text in BLOCKS if language == "python"]
    assert len(blocks) >= 4
    for line, text in blocks:
        if "logpe.transformers" in text:
            if importlib.util.find_spec("transformers") is None:
                continue
            names |= a_language_model()
        exec(compile("\n" * line + text, "README.md", "exec"), names)


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of a Markdown page, as links give them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    """So do the links of the other pages, and each record and picture stands on one of them."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("bench/results/*.md")]
    linked = set()
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"
            linked.add(path)
    results = {path for path in (ROOT / "bench/results").iterdir() if path.suffix in (".json", ".csv", ".png")}
    assert not results - linked


class Parsed(BaseException):
    """The options of a command are accepted."""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    words = shlex.split(command)
    if words[:3] in (["python", "-m", "bench"], ["python", "-m", "logpe"]):
        main = bench.__main__.main if words[2] == "bench" else logpe.__main__.main
        if any(word.startswith("-") for word in words[3:]):
            with pytest.raises(Parsed):
                main(words[3:])
        else:  # a program, by its name
            with pytest.raises(SystemExit, match="0"):
                main([*words[3:], "--help"])
    elif "pip" in words[:3]:
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[(.*?)\]", command):
            assert f"\n{extra} = [" in project
        if "-c" in words:
            assert (ROOT / words[words.index("-c") + 1]).is_file()
    else:
        assert words[:3] == ["python", "-m", "pytest"], f"no test of the README knows how to check {command}"
