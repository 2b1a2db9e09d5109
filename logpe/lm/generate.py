"""``python -m logpe generate``: text from a model with log positions, token by token as it comes.

The model is the output of ``python -m logpe train``, or a converted Transformers model that save_pretrained wrote.
The prompt comes from --prompt, or from standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from logpe.command import find_device
from logpe.lm import model as language_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class ByteTokenizer:
    """Text as its bytes, for models of 256 tokens that come without a tokenizer."""

    def encode(self, text: bytes) -> list[int]:
        """Return the bytes of ``text``."""
        return list(text)

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        """Return the text of the bytes; those that are no UTF-8 show as U+FFFD."""
        return bytes(int(token) for token in tokens).decode(errors="replace")


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``, what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser("generate", help="text from a trained or converted model", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help=(
        "--out of python -m logpe train, or a folder that save_pretrained wrote"
    ))  # fmt: skip
    parser.add_argument("--prompt", help=(
        "the text to continue; - or nothing reads standard input, but for a newline at its end"
    ))  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most this many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability (%(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Load, generate and print; return the exit status. Raises ValueError, OSError for what is wrong."""
    for name in ("max_new_tokens", "top_k"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p must be in (0, 1], got {arguments.top_p}")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0, got {arguments.temperature}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {arguments.seed}")
    device = find_device(arguments.device)
    folder = language_model.find_model(arguments.model)
    model = language_model.load_converted(folder).to(device)
    if bad := [name for name, x in model.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{folder} holds numbers that are not finite, in {bad[0]}: its training went wrong")
    tokenizer = _tokenizer(folder, model.config.vocab_size)
    prompt = tokenizer.encode(_prompt(arguments.prompt, isinstance(tokenizer, ByteTokenizer)))
    if not prompt:
        raise ValueError("--prompt must hold at least one token")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} gives token {max(prompt)}, and the model has {model.config.vocab_size} of them"
        )
    import transformers

    tokens = torch.tensor([prompt], device=device)
    drawing: dict[str, Any] = dict(do_sample=False)
    if arguments.temperature > 0:
        top_k = arguments.top_k or 0
        drawing = dict(do_sample=True, temperature=arguments.temperature, top_p=arguments.top_p, top_k=top_k)
    torch.manual_seed(arguments.seed)
    with contextlib.suppress(AttributeError):  # a stream of a test or a notebook
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=arguments.max_new_tokens,
            streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
            **drawing,
        )
    except OSError:  # a closed pipe
        raise
    except Exception as error:  # its generation_config.json is anybody's
        raise ValueError(f"{folder} cannot generate: {language_model.one_line(error)}") from error
    return 0


def _prompt(argument: str | None, as_bytes: bool) -> Any:
    """Return the prompt as text, or as its bytes, which may end inside a character."""
    if argument is None or argument == "-":
        if sys.stdin is None or (sys.stdin.isatty() and argument is None):
            raise ValueError("--prompt must be given, or a text on standard input")
        text = sys.stdin.buffer.read().removesuffix(b"\n").removesuffix(b"\r")
    else:
        text = os.fsencode(argument)
    return text if as_bytes else text.decode(errors="replace")


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    import transformers

    if any((folder / name).exists() for name in TOKENIZER_FILES):
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the folder is anybody's
            if "trust_remote_code" in str(error):  # which the message advises
                raise ValueError(f"the tokenizer in {folder} needs code from there, which is never run") from None
            why = language_model.one_line(error)
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {why}") from None
    if vocab_size != 256:
        raise ValueError(f"{folder} holds no tokenizer, and a vocabulary of {vocab_size}: bytes are 256")
    return ByteTokenizer()
