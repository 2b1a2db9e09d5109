"""Vocabularies that the studies learn from their text, with the library tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from bench.study.encoders import NEWLINE

FIRST = 4  # of the tokens that are pieces of lines; before it PAD, BEGIN, END, NEWLINE


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Return a tokenizer for the commonest words and marks in lower case; PAD and UNKNOWN are the first two ids."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("the library tokenizers is not installed: python -m pip install tokenizers") from None
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_bpe(texts: Iterable[str], size: int) -> Any:
    """Return a byte-pair encoding of the library tokenizers; the first 256 tokens are bytes, in an order of its own."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("the library tokenizers is not installed: python -m pip install tokenizers") from None
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


class Vocabulary:
    """A byte-pair encoding, one for both languages, learned from `texts`; no text is beyond it."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        self.bpe = train_bpe(texts, size - FIRST)
        self.size = FIRST + self.bpe.get_vocab_size()
        self.sha256 = hashlib.sha256(self.bpe.to_str().encode()).hexdigest()

    def encode(self, line: str) -> list[int]:
        """Return the tokens of a text without a line break."""
        return [FIRST + i for i in self.bpe.encode(line).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text, with lines on lines; PAD, BEGIN and END are not seen."""
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == NEWLINE:
                lines.append([])
            elif token >= FIRST:
                lines[-1].append(token - FIRST)
        return "\n".join(map(self.bpe.decode, lines))
