"""Models of torch's own layers, whose attention logpe.replace_attention gives a position: a reader and a translator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logpe
from bench.study.model import Encoding, autocast, encoding
from logpe.lm import model as language_model
from logpe.lm.model import EMBEDDING_STD
from logpe.position import PRESET_PARTS, LogPosition

PAD, BEGIN, END, NEWLINE = range(4)  # PAD fills up texts for readers too


def layer_encoding(name: str, train_length: int) -> Encoding:
    """Return an encoding that torch's own layers can have, see replace_attention. Raises ValueError for others."""
    chosen = encoding(name, train_length)
    added = chosen.rotary is not None and "rotary" not in PRESET_PARTS[chosen.preset]
    if chosen.yarn or chosen.gain_on_bias or added:
        raise ValueError(f"{name!r} is no LogPosition: YaRN, logit-gain and an added rotation do not apply here")
    return chosen


def replace_attention(model: nn.Module, encoding: Encoding) -> None:
    """Give the attention of torch's layers the position of a layer_encoding; its sinusoid is for the model."""
    logpe.replace_attention(
        model,
        encoding.preset,
        share_position=encoding.shared,
        qk_norm=encoding.qk_norm,
        position_options=encoding.options,
        sink=encoding.sink,
    )
    for module in model.modules():
        if isinstance(module, LogPosition):
            encoding.start(module)


# --- the classifier ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A transformer encoder, the mean of what it makes of each word, and a linear layer.

    The mean, not a first token of its own: that one would stand at position 0 and see far words through the encoding
    alone, by design hardly at all with a distance bias. So every word counts alike, and what is tested is what the
    encoding makes of it. Without an encoding this is a bag of words with attention.

    The same seed gives every encoding the same weights to start from.
    """

    def __init__(self, shape: language_model.Shape, classes: int, encoding: Encoding, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
            layer = nn.TransformerEncoderLayer(
                shape.dim, shape.heads, 4 * shape.dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(shape.dim), False)
            self.head = nn.Linear(shape.dim, classes)
            for weight in self.encoder.parameters():  # the layers are copies of one
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)
            nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
            nn.init.zeros_(self.head.weight)
            replace_attention(self.encoder, encoding)
        scale = encoding.sinusoid_scale
        self.sinusoid = None if scale is None else logpe.LogSinusoid(shape.dim, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of documents int64 (B, N), with PAD behind shorter ones."""
        hidden = tokens == PAD
        x = self.embedding(tokens)
        if self.sinusoid is not None:  # as large against the embedding as in the first Transformer
            x = x + EMBEDDING_STD * self.sinusoid(tokens.shape[1], device=x.device)
        x = self.encoder(x, src_key_padding_mask=hidden)
        return self.head(x.masked_fill(hidden[..., None], 0).sum(dim=1) / (~hidden).sum(dim=1, keepdim=True))

    def predict(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities, float32 (B, classes), of tokens (B, N)."""
        with autocast(tokens.device):
            return self(tokens).float().log_softmax(dim=-1)


# --- the translator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a model; as many layers in the encoder as in the decoder."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    dropout: float


def project(attention: logpe.LogAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values, (B, H, N, D) each, of x (B, N, dim)."""
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
        """Return what the layer makes of x (B, 1, dim), the next token of each text."""
        layer = self.layer
        q, k, v = project(self.own, layer.norm1(x))
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        x = x + self.output(self.own, logpe.log_attention(q, self.k, self.v, self.own.position, is_causal=True))
        q, _, _ = project(self.cross, layer.norm2(x))
        x = x + self.output(self.cross, logpe.log_attention(q, self.memory_k, self.memory_v, key_mask=self.shown))
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))

    @staticmethod
    def output(attention: logpe.LogAttention, out: Tensor) -> Tensor:
        """Return the output of attention, (B, H, 1, D), for the residual branch, (B, 1, dim)."""
        return attention.out_proj(out.transpose(1, 2).flatten(2))


def translator_encoding(name: str, train_length: int) -> Encoding:
    """Return an encoding that the translator can have. Raises ValueError for others."""
    chosen = layer_encoding(name, train_length)
    if chosen.qk_norm or chosen.sink:
        raise ValueError(f"{name!r} normalises queries and keys or has a sink, and the decoder here does neither")
    return chosen


class Translator(nn.Module):
    """An encoder-decoder, embeddings tied. The same seed gives every encoding the same weights.

    Self-attention has the position: both ways in the encoder, causal in the decoder. Cross-attention has none.
    """

    def __init__(self, shape: Shape, encoding: Encoding, seed: int) -> None:
        super().__init__()
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
            replace_attention(self, encoding)
        for module in self.modules():
            if isinstance(module, logpe.LogAttention):
                module.dropout = 0.0  # of attention weights; the residual branches keep theirs
        self.sinusoid = None
        if encoding.sinusoid_scale is not None:
            self.sinusoid = logpe.LogSinusoid(shape.dim, encoding.sinusoid_scale)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return (B, N, dim) of tokens int64 (B, N), the first of them at position ``start``."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        if self.sinusoid is None:
            return x
        return x + self.sinusoid(torch.arange(start, start + tokens.shape[1], device=x.device)).to(x)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory (B, S, dim) of padded texts int64 (B, S); and bool (B, S), where it is no padding."""
        padding = source == PAD
        return self.encoder(self.embed(source), src_key_padding_mask=padding), ~padding

    def logits(self, x: Tensor) -> Tensor:
        """Return logits float32 (B, N, vocabulary) of what the decoder gives, (B, N, dim)."""
        return F.linear(x, self.embedding.weight).float()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits, float32 (B, N, vocabulary), of what follows each of the target's tokens, int64 (B, N)."""
        memory, shown = self.encode(source)
        x = self.decoder(self.embed(target), memory, memory_key_padding_mask=~shown, tgt_is_causal=True)
        return self.logits(x)

    @torch.inference_mode()
    def translate(self, source: Tensor, most: Tensor) -> list[list[int]]:
        """Return greedy translations of padded texts int64 (B, S), to END or the ``most`` tokens of each, int64 (B,).

        The END is part of it: a translation without one was cut off.
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
