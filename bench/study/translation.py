"""Translate short, then long: an encoder-decoder with each position encoding, English to German.

Small transformers (torch's own layers through logpe.replace_attention) that differ in nothing but the position encoding
(same weights to start from, same batches, same dropout) learn from the message catalogues of programs, from texts of
one line or a few, none longer than --limit tokens on either side. Then they translate held-out messages as short as
those, longer messages, and texts of so many lines that no training example was as long.

    apt-get download libreoffice-l10n-de && dpkg -x libreoffice-l10n-de_*.deb data/libreoffice
    python -m pip install --no-deps --target data/django Django==5.2.19
    python -m bench translation --data data/libreoffice data/django

--data takes any folders with catalogues, .mo or .po, in a folder named `de` or named `de` themselves. Every finished
measurement is on disk at once: Ctrl-C or --minutes loses nothing, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import re
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

# Before torch is loaded: threads that wait by spinning make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import sacrebleu
    import tokenizers
    from babel.messages import mofile, pofile
except ImportError as error:
    missing = str(error.name).partition(".")[0]
    raise SystemExit(f"{missing} is not installed: python -m pip install -c constraints.txt -e '.[bench]'") from None

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logpe
from bench import command
from bench.command import at_least, count, positive, share
from bench.common import device_name
from bench.plots import curve, panels, style
from bench.study import findings, training
from bench.study import protocol as study
from bench.study.model import ENCODINGS, OPTIONS, Encoding, layer_encoding, replace_attention
from bench.study.training import Advance
from logpe.lm.text import TEST_SHARE, stable_hash

FORMAT = 1  # raise it when a change here makes earlier results incomparable
NAMES = [name for name, e in ENCODINGS.items() if not (e.yarn or e.qk_norm)]
DEFAULT = ["sinusoid", "rope", "log-bias", "log-rotary-bias", "log-bias-rope"]
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        encodings=DEFAULT, seeds=[0, 1], limit=16, steps=1200, batch=32,
        vocabulary=2000, dim=128, layers=2, heads=4, dropout=0.1, learning_rate=3e-3, tested=96,
    ),
    "cuda": dict(
        encodings=DEFAULT, seeds=[0, 1, 2], limit=24, steps=3000, batch=256,
        vocabulary=4000, dim=256, layers=4, heads=4, dropout=0.3, learning_rate=1e-3, tested=512,
    ),
}  # fmt: skip

# --- pairs ------------------------------------------------------------------------------------------------------------

TARGET = "de"
DATA_HELP = """Two sources of catalogues, unpacked into the folder data:
  apt-get download libreoffice-l10n-de && dpkg -x libreoffice-l10n-de_*.deb data/libreoffice
  python -m pip install --no-deps --target data/django Django==5.2.19"""
Pair = tuple[str, str]
# What may hold a ~, _ or & that marks no key: %(name)s, $(name), $name$, {name}, &lt;
PLACEHOLDER = r"%\([^)]*\)\w|\$\([^)]*\)|\$\w+\$|\{[^}]*\}|&\w+;"


def clean(text: str) -> str:
    """On one line, without the mark of the key that opens a menu: "Save ~As" -> "Save As"; placeholders stay."""
    text = " ".join(text.split())
    if len(re.findall(r"[~_&]", re.sub(PLACEHOLDER, "", text))) != 1:  # several are something else
        return text
    return re.sub(rf"({PLACEHOLDER})|[~_&](?=\w)", lambda match: match[1] or "", text)


def messages(path: Path) -> Iterator[Pair]:
    """What a catalogue translates; plurals form by form, contexts and what waits for review left out."""
    with path.open("rb") as file:
        try:
            catalogue = mofile.read_mo(file) if path.suffix == ".mo" else pofile.read_po(file)
        except (OSError, ValueError, struct.error, pofile.PoFileError) as error:
            raise ValueError(f"{path} is not a catalogue: {error}") from None
    for message in catalogue:
        if message.id and message.string and not message.fuzzy:
            forms = [(x,) if isinstance(x, str) else x for x in (message.id, message.string)]
            yield from zip(*forms, strict=False)


@dataclass(frozen=True)
class Pairs:
    """English and German, both sides of the split in order of the English."""

    catalogues: int
    train: list[Pair]
    test: list[Pair]
    sha256: str

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return dict(
            catalogues=self.catalogues, train_pairs=len(self.train), test_pairs=len(self.test), sha256=self.sha256
        )


def held_out(english: str) -> bool:
    """By a hash of its letters, so that "Sheet %1" and "~Sheet 2..." are on one side."""
    letters = "".join(c for c in english.casefold() if c.isalpha())
    return stable_hash(letters.encode()) % TEST_SHARE == 0


def read(folders: Sequence[Path]) -> tuple[int, list[Pair]]:
    """How many catalogues there are in these folders, and one German text (the most frequent) for each English one.

    Names and codes, the same in both languages or without a word, are left out. ValueError: nothing to read.
    """
    paths = []
    for root in folders:
        found = [path for suffix in ("mo", "po") for path in root.rglob(f"*.{suffix}")]
        home = root.resolve().name
        found = [p for p in found if TARGET in (home, *p.relative_to(root).with_suffix("").parts)]
        if not found:
            raise ValueError(f"--data {root} holds no catalogue of {TARGET} (.mo or .po). {DATA_HELP}")
        paths += found
    german: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(paths):
        for pair in messages(path):
            source, target = map(clean, pair)
            if target and source != target and re.search(r"[^\W\d_]{2}", source):
                german[source][target] += 1
    # Not most_common, whose order among equals is that of the files.
    return len(paths), [(source, max(seen, key=lambda t: (seen[t], t))) for source, seen in sorted(german.items())]


def load(folders: Sequence[Path]) -> Pairs:
    """All pairs of all catalogues in these folders. ValueError: nothing to read, or a side of the split stays empty."""
    catalogues, pairs = read(folders)
    train = [pair for pair in pairs if not held_out(pair[0])]
    test = [pair for pair in pairs if held_out(pair[0])]
    if not train or not test:
        raise ValueError(
            f"{len(train)} pairs to train on and {len(test)} to test on; each needs one or more. {DATA_HELP}"
        )
    digest = hashlib.sha256("".join(f"{source}\0{target}\0" for source, target in pairs).encode())
    return Pairs(catalogues, train, test, digest.hexdigest())


# --- tokens -----------------------------------------------------------------------------------------------------------

PAD, BEGIN, END, NEWLINE = range(4)
FIRST = 4  # of the tokens that are pieces of lines
Tokens = tuple[list[int], list[int]]  # of both sides; NEWLINE between lines, and neither BEGIN nor END


class Vocabulary:
    """A byte-pair encoding, one for both languages, learned from `texts`; no text is beyond it."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.bpe.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - FIRST, initial_alphabet=alphabet, show_progress=False
        )
        self.bpe.train_from_iterator(texts, trainer)
        self.size = FIRST + self.bpe.get_vocab_size()
        self.sha256 = hashlib.sha256(self.bpe.to_str().encode()).hexdigest()

    def encode(self, line: str) -> list[int]:
        """Of a text without a line break."""
        return [FIRST + i for i in self.bpe.encode(line).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Lines are put on lines; PAD, BEGIN and END are not seen."""
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == NEWLINE:
                lines.append([])
            elif token >= FIRST:
                lines[-1].append(token - FIRST)
        return "\n".join(map(self.bpe.decode, lines))


def join(pairs: Sequence[Tokens]) -> Tokens:
    """Pairs, as the lines of one text."""
    sides = [list(pairs[0][0]), list(pairs[0][1])]
    for pair in pairs[1:]:
        for side, more in zip(sides, pair, strict=True):
            side += [NEWLINE, *more]
    return sides[0], sides[1]


def pad(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 (len(texts), longest), filled up with PAD at the end."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts], device=device)


# --- what is trained on, and what is tested ---------------------------------------------------------------------------

MOST_LINES = 4  # in training
TRIES = 12  # pairs drawn to fill the lines of an example; those that are too long for it are skipped
POOL = 8  # batches
REACH = (1, 2, 4)  # tests go to so many times the limit ...
LINES = (2, 4, 8)  # ... and to so many lines


class Examples:
    """What models train on: half single pairs, half texts of 2 to MOST_LINES lines within the limit.

    POOL batches are drawn together, sorted by length and cut: texts of one length leave little padding.
    """

    def __init__(self, pairs: Sequence[Tokens], limit: int, batch: int) -> None:
        self.pairs = [pair for pair in pairs if max(map(len, pair)) <= limit]
        if not self.pairs:
            raise ValueError(f"no pair to train on has at most {limit} tokens (--limit) on either side")
        self.limit, self.batch = limit, batch
        self.pool = functools.lru_cache(maxsize=1)(self._pool)

    def __call__(self, seed: int, step: int) -> list[Tokens]:
        """The batch of a step."""
        turn, part = divmod(step, POOL)
        return self.pool(seed, turn)[part]

    def _pool(self, seed: int, turn: int) -> list[list[Tokens]]:
        """Of so many batches, in any order."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
        count = POOL * self.batch
        lines = torch.randint(2, MOST_LINES + 1, (count,), generator=generator)
        lines[: count // 2] = 1
        draws = torch.randint(len(self.pairs), (count, TRIES), generator=generator)
        pool = [self.draw(*drawn) for drawn in zip(lines.tolist(), draws.tolist(), strict=True)]
        pool.sort(key=lambda text: sum(map(len, text)))
        order = torch.randperm(POOL, generator=generator).tolist()
        return [pool[part * self.batch : (part + 1) * self.batch] for part in order]

    def draw(self, lines: int, numbers: list[int]) -> Tokens:
        """A text of so many of these pairs, or fewer, as the limit has it."""
        chosen = [self.pairs[numbers[0]]]
        for pair in (self.pairs[i] for i in numbers[1:]):
            if len(chosen) < lines and max(map(len, join([*chosen, pair]))) <= self.limit:
                chosen.append(pair)
        return join(chosen)


def make_tests(pairs: Sequence[Tokens], limit: int, count: int) -> dict[str, list[Tokens]]:
    """Held-out texts by name, at most `count` each; whatever is beyond the limit is so on both sides.

    Pairs by length, 2 lines within the limit, and so many lines that they are beyond it. ValueError: too few pairs.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
    tests: dict[str, list[Tokens]] = {}
    low = 0
    for factor in REACH:
        name = f"1 line, {low + 1}-{factor * limit}"
        tests[name] = [pair for pair in pairs if low < min(map(len, pair)) and max(map(len, pair)) <= factor * limit]
        low = factor * limit
    short = tests[f"1 line, 1-{limit}"]
    wanted: list[tuple[str, int, Callable[[Tokens], bool]]] = [
        (f"2 lines, 1-{limit}", 2, lambda text: max(map(len, text)) <= limit)
    ]
    wanted += [(f"{n} lines, {limit + 1}+", n, lambda text: min(map(len, text)) > limit) for n in LINES]
    for name, lines, fits in wanted:
        if len(short) < lines:
            raise ValueError(f"{len(short)} held-out pairs have at most {limit} tokens (--limit); {lines} are needed")
        draws = (torch.randperm(len(short), generator=generator)[:lines].tolist() for _ in range(100 * count))
        tests[name] = [text for draw in draws if fits(text := join([short[i] for i in draw]))][:count]
    return {name: texts[:count] for name, texts in tests.items() if texts}


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a model; as many layers in the encoder as in the decoder."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    dropout: float


def project(attention: logpe.LogAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, dim) -> queries, keys and values, (B, H, N, D) each."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


class CachedLayer:
    """A layer of nn.TransformerDecoder (norm first) in evaluation, for one more target token at a time.

    memory: (B, S, dim). shown: bool (B, S), where it is no padding.
    """

    def __init__(self, layer: nn.TransformerDecoderLayer, memory: Tensor, shown: Tensor) -> None:
        self.layer, self.shown = layer, shown
        self.own, self.cross = (cast(logpe.LogAttention, x) for x in (layer.self_attn, layer.multihead_attn))
        _, self.memory_k, self.memory_v = project(self.cross, memory)
        self.k = self.v = self.memory_k[:, :, :0]  # of the tokens so far: a text each, all of one length

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, 1, dim), the next token of each -> as x."""
        layer = self.layer
        q, k, v = project(self.own, layer.norm1(x))
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        x = x + self.output(self.own, logpe.log_attention(q, self.k, self.v, self.own.position, is_causal=True))
        q, _, _ = project(self.cross, layer.norm2(x))
        x = x + self.output(self.cross, logpe.log_attention(q, self.memory_k, self.memory_v, key_mask=self.shown))
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))

    @staticmethod
    def output(attention: logpe.LogAttention, out: Tensor) -> Tensor:
        """(B, H, 1, D) -> (B, 1, dim)."""
        return attention.out_proj(out.transpose(1, 2).flatten(2))


def encoding(name: str) -> Encoding:
    """Raises ValueError."""
    found = layer_encoding(name)
    if found.qk_norm:
        raise ValueError(f"{name!r} normalises queries and keys, which the cache of the decoder here does not")
    return found


class Translator(nn.Module):
    """An encoder-decoder, embeddings tied. The same seed gives every encoding the same weights.

    Self-attention has the position: both ways in the encoder, causal in the decoder. Cross-attention has none.
    """

    def __init__(self, shape: Shape, name: str, seed: int) -> None:
        super().__init__()
        chosen = encoding(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer: dict[str, Any] = dict(
                d_model=shape.dim,
                nhead=shape.heads,
                dim_feedforward=4 * shape.dim,
                dropout=shape.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer), shape.layers, nn.LayerNorm(shape.dim), enable_nested_tensor=False
            )
            self.norm = nn.LayerNorm(shape.dim)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), shape.layers, self.norm)
            for weight in self.parameters():
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)
            self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
            nn.init.normal_(self.embedding.weight, std=shape.dim**-0.5)
            replace_attention(self, chosen)
        for module in self.modules():
            if isinstance(module, logpe.LogAttention):
                module.dropout = 0.0  # of attention weights; the residual branches keep theirs
        self.sinusoid = None
        if chosen.sinusoid_scale is not None:
            self.sinusoid = logpe.LogSinusoid(shape.dim, chosen.sinusoid_scale)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """int64 (B, N), the first of them at position `start` -> (B, N, dim)."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        if self.sinusoid is None:
            return x
        return x + self.sinusoid(torch.arange(start, start + tokens.shape[1], device=x.device)).to(x)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (B, S), padded -> memory (B, S, dim); and bool (B, S), where it is no padding."""
        padding = source == PAD
        return self.encoder(self.embed(source), src_key_padding_mask=padding), ~padding

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, dim) of the decoder -> float32 (B, N, vocabulary)."""
        return F.linear(x, self.embedding.weight).float()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits, float32 (B, N, vocabulary), of what follows each of the target's tokens, int64 (B, N)."""
        memory, shown = self.encode(source)
        x = self.decoder(self.embed(target), memory, memory_key_padding_mask=~shown, tgt_is_causal=True)
        return self.logits(x)

    @torch.inference_mode()
    def translate(self, source: Tensor, most: Tensor) -> list[list[int]]:
        """Greedily: int64 (B, S), padded, and the most tokens of each, int64 (B,) -> what was said up to END, if any.

        The END is part of it, so that a text without one is one that was cut off.
        """
        memory, shown = self.encode(source)
        layers = [CachedLayer(layer, memory, shown) for layer in self.decoder.layers]
        token = torch.full_like(most, BEGIN)
        done = torch.zeros_like(shown[:, 0])
        said = []
        for n in range(int(most.max())):
            x = self.embed(token[:, None], n)
            for layer in layers:
                x = layer(x)
            token = self.logits(self.norm(x))[:, 0].argmax(-1).masked_fill(done, PAD)
            said.append(token)
            done = done | (token == END) | (n + 1 >= most)
            if n % 8 == 7 and done.all():  # not at each token: a GPU would have to be waited for
                break
        return [[t for t in text if t != PAD] for text in torch.stack(said, dim=1).tolist()]


# --- training and scoring ---------------------------------------------------------------------------------------------

LABEL_SMOOTHING = 0.1
KEPT_EXAMPLES = 4


@dataclass(frozen=True)
class Settings(training.Settings):
    """Of this comparison."""

    pairs: str  # sha256
    vocabulary: str  # sha256
    device: str
    versions: dict[str, str]
    shape: Shape
    limit: int  # tokens of a side in training
    steps: int
    batch: int
    tested: int  # texts of a test
    learning_rate: float
    weight_decay: float = 0.1
    format: int = FORMAT


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def shifted(target: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the decoder reads, and what it is to say after each token; int64 (B, N) both."""
    return pad([[BEGIN, *text] for text in target], device), pad([[*text, END] for text in target], device)


def train(
    model: Translator, examples: Examples, seed: int, settings: Settings, checkpoint: Path, advance: Advance
) -> dict[str, Any]:
    """Trains to the end, from the checkpoint if there is one; see training.fit."""
    device = next(model.parameters()).device

    def batch_loss(step: int) -> tuple[Tensor, Callable[[], list[float]]]:
        torch.manual_seed(1_000_003 * seed + step)  # of the dropout
        source, target = zip(*examples(seed, step), strict=True)
        said, wanted = shifted(target, device)
        with autocast(device):
            logits = model(pad(source, device), said)
        loss = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, label_smoothing=LABEL_SMOOTHING
        )
        return loss, lambda: [loss.item()]

    seconds, kept = training.fit(
        model,
        batch_loss,
        settings.steps,
        settings.learning_rate,
        settings.weight_decay,
        checkpoint,
        lambda n: advance(n * training_work(settings)),
    )
    return {
        "steps": settings.steps,
        "loss_at_the_end": round(fmean(numbers[0] for numbers in kept), 4),  # mean of the last tenth, smoothed labels
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": study.learned_positions(model),
        "seconds": seconds,
    }


def training_work(settings: Settings) -> int:
    """Of one step, in tokens read; backward costs twice the forward pass."""
    return 3 * 2 * settings.limit * settings.batch


def scoring_work(texts: Sequence[Tokens]) -> int:
    """Of some texts; a token said costs as much as several read."""
    return sum(len(source) + 8 * len(target) for source, target in texts)


def measures(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """sacrebleu's chrF and BLEU of the whole test, the ratio of lengths in words, and how often the lines are as many.

    For sacrebleu a text is one line.
    """
    said, wanted = ([text.replace("\n", " ") for text in side] for side in (translations, references))
    bleu = sacrebleu.corpus_bleu(said, [wanted])
    lines = [t.count("\n") == r.count("\n") for t, r in zip(translations, references, strict=True)]
    return {
        "chrf": round(sacrebleu.corpus_chrf(said, [wanted]).score, 3),
        "bleu": round(bleu.score, 3),
        "length_ratio": round(bleu.sys_len / bleu.ref_len, 4),
        "lines_right": round(fmean(lines), 4),
    }


@torch.inference_mode()
def score(model: Translator, vocabulary: Vocabulary, texts: Sequence[Tokens], advance: Advance) -> dict[str, Any]:
    """Of greedy translations of one test; and, with the reference given token by token, bits per character of it."""
    device = next(model.parameters()).device
    together = 64 if device.type == "cpu" else 512
    model.eval()
    start = time.perf_counter()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    said: dict[int, list[int]] = {}
    nats = 0.0
    for first in range(0, len(order), together):
        numbers = order[first : first + together]
        source, target = zip(*(texts[i] for i in numbers), strict=True)
        most = torch.tensor([3 * len(text) // 2 + 16 for text in source], device=device)
        with autocast(device):
            said |= dict(zip(numbers, model.translate(pad(source, device), most), strict=True))
            given, wanted = shifted(target, device)
            logits = model(pad(source, device), given)
        nats += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum").item()
        advance(scoring_work([texts[i] for i in numbers]))
    translations = [vocabulary.decode(said[i]) for i in range(len(texts))]
    sources, references = ([vocabulary.decode(side) for side in sides] for sides in zip(*texts, strict=True))
    shown = zip(sources, references, translations, strict=True)
    return {
        **measures(translations, references),
        "cut_off": round(fmean(text[-1:] != [END] for text in said.values()), 4),
        "bits_per_character": round(nats / math.log(2) / sum(map(len, references)), 5),
        "examples": [list(texts) for _, texts in zip(range(KEPT_EXAMPLES), shown, strict=False)],
        "seconds": round(time.perf_counter() - start, 2),
    }


# --- what was found ---------------------------------------------------------------------------------------------------

MEASURES = {  # in the JSON: form, name
    "chrf": (".1f", "chrF"),
    "bleu": (".1f", "BLEU"),
    "length_ratio": (".2f", "length ratio"),
    "lines_right": (".2f", "lines right"),
    "bits_per_character": (".3f", "bits per character"),
}
JOB = "translation"


def values(runs: findings.Runs, name: str, test: str, measure: str) -> dict[str, float]:
    """By seed, where it is measured."""
    tests = {seed: jobs[JOB]["lengths"] for seed, jobs in runs.get(name, {}).items()}
    return {seed: found[test][measure] for seed, found in tests.items() if test in found}


def table(runs: findings.Runs, tests: Sequence[str], baseline: str) -> str:
    """Every measure of every encoding, mean and spread over seeds; and chrF minus the baseline's, seed by seed."""
    lines = [["measure", "encoding", *tests]]
    names = [name for name in runs if any(values(runs, name, test, "chrf") for test in tests)]
    for measure, (form, label) in MEASURES.items():
        for name in names:
            cells = []
            for found in (list(values(runs, name, test, measure).values()) for test in tests):
                spread = f" ± {stdev(found):{form}}" if len(found) > 1 else ""
                cells.append(f"{fmean(found):{form}}{spread}" if found else "-")
            lines.append([label, name, *cells])
    for name in names:
        cells = []
        for test in tests:
            here, there = (values(runs, n, test, "chrf") for n in (name, baseline))
            found = [here[seed] - there[seed] for seed in here if seed in there]
            between = f" ({min(found):+.1f} to {max(found):+.1f})" if len(found) > 1 else ""
            cells.append(f"{fmean(found):+.1f}{between}" if found else "-")
        if name != baseline:
            lines.append([f"chrF minus {baseline}", name, *cells])
    return findings.markdown(lines)


def picture(path: Path, runs: findings.Runs, tests: Sequence[str], note: str) -> None:
    """chrF of single lines and of many; how long the translations of many are, and bits per character of their
    references, which do not depend on where a translation stops. Bands: the seeds.
    """
    single, many = ([test for test in tests if test.startswith("1 line,") is one] for one in (True, False))
    drawn = [
        (single, "chrf", "chrF"),
        (many, "chrf", "chrF"),
        (many, "length_ratio", "length against the reference's"),
        (many, "bits_per_character", "bits per character, reference given"),
    ]
    names = [name for name in runs if any(values(runs, name, test, "chrf") for test in tests)]
    with panels(path, len(drawn), note, columns=2, size=(4.8, 3.6), legend="right center") as axes:
        for axis, (shown, measure, label) in zip(axes, drawn, strict=True):
            for name in names:
                points = {i: list(values(runs, name, test, measure).values()) for i, test in enumerate(shown)}
                curve(axis, {i: found for i, found in points.items() if found}, **style(name, names))
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1, zorder=0)  # the training length
            axis.set_xticks(range(len(shown)), [test.replace(", ", "\n") for test in shown])
            axis.set_xlabel("lines, and tokens of a text")
            axis.set_ylabel(label)
            if measure != "bits_per_character":
                axis.set_ylim(bottom=0)
        axes[2].axhline(1, color="0.6", linestyle=":", linewidth=1, zorder=0)


def examples(runs: findings.Runs, tests: Sequence[str]) -> str:
    """A few translations of every test, by the first seed of each encoding."""
    lines = []
    for test in tests:
        shown = {
            name: next(iter(seeds.values()))[JOB]["lengths"][test]["examples"]
            for name, seeds in runs.items()
            if test in next(iter(seeds.values()))[JOB]["lengths"]
        }
        for i, (source, reference, _) in enumerate(next(iter(shown.values()), [])[:2]):
            lines.append(f"\n{test}")
            said = {"English": source, "reference": reference} | {name: found[i][2] for name, found in shown.items()}
            lines += [f"  {who:<16}{text.replace(chr(10), ' | ')}" for who, text in said.items()]
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What is left out is taken from BUDGETS, by the device."""
    p = command.new_parser(
        "bench translation",
        __doc__,
        f"encodings: {', '.join(NAMES)}\noptions of one, as in log-bias+gain: +{', +'.join(OPTIONS)}",
    )

    default = command.default_of(BUDGETS)
    p.add_argument("--data", type=Path, nargs="+", default=[Path("data")], metavar="DIR", help="(default data)")
    p.add_argument("--encodings", nargs="+", metavar="NAME", help=f"see below {default('encodings')}")
    p.add_argument("--limit", type=count, metavar="N", help=f"tokens of a side in training {default('limit')}")
    p.add_argument("--steps", type=count, metavar="N", help=f"of training {default('steps')}")
    p.add_argument("--batch", type=count, metavar="N", help=f"examples per step {default('batch')}")
    p.add_argument("--tested", type=count, metavar="N", help=f"texts of a test, at most {default('tested')}")
    p.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help=f"one run each {default('seeds')}")
    p.add_argument(
        "--vocabulary", type=at_least(512), metavar="N", help=f"tokens, 256 of them bytes {default('vocabulary')}"
    )
    for name, what in (("dim", "width of the model"), ("layers", "of each side"), ("heads", "of a layer")):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{what} {default(name)}")
    p.add_argument("--dropout", type=share, metavar="P", help=f"of residual branches {default('dropout')}")
    p.add_argument("--learning-rate", type=positive, metavar="R", help=f"at its highest {default('learning_rate')}")
    p.add_argument("--baseline", default="rope", metavar="NAME", help="of the paired differences (default rope)")
    command.add_run_options(p)
    return p


@command.program("bench translation")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(arguments)
    deadline = command.deadline(args.minutes)
    device = command.parse_device(args.device)
    command.fill_in(args, BUDGETS["cpu" if device.type == "cpu" else "cuda"])
    if args.dim % args.heads:
        raise ValueError(f"--dim must be a multiple of --heads, {args.heads}, got {args.dim}")
    for name in args.encodings:
        encoding(name)
    pairs = load(args.data)
    vocabulary = Vocabulary((text for pair in pairs.train for text in pair), args.vocabulary)
    train_tokens, test_tokens = (
        [(vocabulary.encode(source), vocabulary.encode(target)) for source, target in side]
        for side in (pairs.train, pairs.test)
    )
    drawn = Examples(train_tokens, args.limit, args.batch)
    tests = make_tests(test_tokens, args.limit, args.tested)
    versions = {"torch": torch.__version__, "logpe": logpe.__version__}
    settings = Settings(
        pairs=pairs.sha256,
        vocabulary=vocabulary.sha256,
        device=device_name(device),
        versions=versions | {module.__name__: module.__version__ for module in (sacrebleu, tokenizers)},
        shape=Shape(vocabulary.size, args.dim, args.layers, args.heads, args.dropout),
        limit=args.limit,
        steps=args.steps,
        batch=args.batch,
        tested=args.tested,
        learning_rate=args.learning_rate,
    )
    stage = training.Stage(
        build=lambda name, seed: Translator(settings.shape, name, seed).to(device),
        train=lambda model, seed, checkpoint, advance: train(model, drawn, seed, settings, checkpoint, advance),
        score=lambda model, test, seed, advance: score(model, vocabulary, tests[test], advance),
        training_work=settings.steps * training_work(settings),
        tests={name: scoring_work(texts) for name, texts in tests.items()},
    )
    stamp = command.stamp()
    about = command.about(
        "bench translation",
        arguments,
        settings,
        stamp,
        data={**pairs.describe(), "short_train_pairs": len(drawn.pairs)},
        tests={
            name: {
                "texts": len(texts),
                "mean_tokens": [round(fmean(map(len, side)), 1) for side in zip(*texts, strict=True)],
            }
            for name, texts in tests.items()
        },
    )
    path = training.results_path(args.out, f"translation-{device.type}", settings.key)
    results = training.Results(path, about, args.fresh)
    stop: KeyboardInterrupt | None = None
    try:
        training.measure(results, {JOB: stage}, args.encodings, args.seeds, deadline, stamp)
    except KeyboardInterrupt as error:
        stop = error
    show(results, list(tests), settings, args.baseline)
    return command.stopped(stop) if stop else 0


def show(results: training.Results, tests: Sequence[str], settings: Settings, baseline: str) -> None:
    """Prints examples and the table, and draws the picture where matplotlib is installed."""
    runs = results.runs
    print(examples(runs, tests))
    print("\n" + table(runs, tests, baseline))
    print(
        f"Trained on texts of at most {settings.limit} tokens a side. Spread: standard deviation over seeds; of the"
        " differences, from the lowest to the highest.\nlength ratio: words said over those of the reference;"
        " lines right: share of texts with as many lines as the reference."
    )
    if not results.path.exists():
        return
    print(f"\nMeasured in {findings.seconds(runs) / 60:.1f} minutes: {results.path}")
    if not any(values(runs, name, test, "chrf") for name in runs for test in tests):
        return
    trained = [jobs[JOB]["train"] for seeds in runs.values() for jobs in seeds.values()]
    seeds = sorted({seed for by_seed in runs.values() for seed, jobs in by_seed.items() if jobs[JOB]["lengths"]})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {', '.join(seeds)} (bands: all of them)"
    note = (
        f"Encoder-decoders, {max(t.get('parameters', 0) for t in trained) / 1e6:.2f} M parameters, {settings.steps:,}"
        f" steps of {settings.batch} texts of at most {settings.limit} tokens, 1 to {MOST_LINES} lines.\n"
        f"English to German, held-out messages of programs, greedy, {which}. Right of the dashed line: longer"
        " than any text in training."
    )
    try:
        picture(results.path.with_suffix(".png"), runs, tests, note)
        print(results.path.with_suffix(".png"))
    except ImportError:
        print("No picture: matplotlib is not installed.")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
