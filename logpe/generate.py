"""``python -m logpe generate``: text from a converted Transformers model, token by token as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class ByteTokenizer:
    """Text as its UTF-8 bytes, for models of 256 tokens that come without a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        """Text of the bytes; those that are no UTF-8 show as U+FFFD."""
        return bytes(int(token) for token in tokens).decode(errors="replace")


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``, what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser("generate", help="text from a converted Transformers model", description=__doc__)
    parser.add_argument("--model", required=True, help="folder that save_pretrained wrote")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most this many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Load, generate and print; returns the exit status."""
    try:
        return _generate(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at exit
        return 1


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        return _fail(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 < arguments.top_p <= 1:
        return _fail(f"--top-p must be in (0, 1], got {arguments.top_p}")
    if not arguments.temperature >= 0:
        return _fail(f"--temperature must be at least 0, got {arguments.temperature}")
    if not 0 <= arguments.seed < 2**63:
        return _fail(f"--seed must be from 0 to 2**63 - 1, got {arguments.seed}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        return _fail(f"--device {arguments.device}: {error}")
    if not (Path(arguments.model) / "config.json").exists():
        return _fail(f"{arguments.model} is not a folder with a config.json")
    try:
        import transformers

        from logpe.transformers import from_pretrained
    except ImportError as error:
        return _fail(f"{error}: pip install 'logpe[hf]'")
    try:
        model = from_pretrained(arguments.model).to(arguments.device)
        tokenizer = _tokenizer(Path(arguments.model), model.config.vocab_size)
    except (OSError, ValueError, RuntimeError) as error:
        return _fail(str(error))
    prompt = tokenizer.encode(arguments.prompt)
    if not prompt:
        return _fail("--prompt must hold at least one token")
    tokens = torch.tensor([prompt], device=arguments.device)
    drawing: dict[str, Any] = dict(do_sample=False)
    if arguments.temperature > 0:
        drawing = dict(do_sample=True, temperature=arguments.temperature, top_p=arguments.top_p, top_k=0)
    torch.manual_seed(arguments.seed)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=arguments.max_new_tokens,
        streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
        **drawing,
    )
    return 0


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    import transformers

    if any((folder / name).exists() for name in TOKENIZER_FILES):
        return transformers.AutoTokenizer.from_pretrained(folder)
    if vocab_size != 256:
        raise ValueError(f"{folder} holds no tokenizer, and a vocabulary of {vocab_size}: bytes are 256")
    return ByteTokenizer()


def _fail(message: str) -> int:
    print(f"python -m logpe generate: {message}", file=sys.stderr)
    return 2
