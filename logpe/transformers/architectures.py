"""Which models of Transformers can be converted, and what a conversion must know of them.

To add one, add it to :data:`ARCHITECTURES` and to the configurations of one of ``tests/test_transformers_decoders.py``,
``test_transformers_encoders.py`` and ``test_transformers_seq2seq.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logpe.transformers import adapters

RELATIVE_BIAS = "relative_attention_bias"
CROSS_ATTENTION = ("encoder_attn", "EncDecAttention")


@dataclass(frozen=True)
class Stack:
    """What a conversion must know of a stack of layers: a decoder, an encoder, or one of the two in a larger model.

    Args:
        path: where it is in the base model; by default it is the base model itself.
        positions: the path, from the stack, of the module with the model's own positions. RELATIVE_BIAS for that of
            T5, which its attentions have; empty where ``forward`` leaves them out.
        rotary: whether that module gives the angles of a rotary embedding; else it is added to the token embedding.
        angles_per_plane: how often it gives the angle of a plane: for each of its two dimensions, or once.
        attention: what the names of its classes of attention end with.
        causal: whether a token sees those before it alone, as in a decoder; in an encoder it sees all.
        heads: what the config calls the number of its heads.
        packs: whether the model passes further keyword arguments on to its attention, as packed sequences need.
        bool_mask: whether the model computes with the mask, and needs a bool one: see :func:`log_position_mask`.
        scaled_slopes: whether its ALiBi, if it has one, is divided by sqrt(head_dim), as the logits are.
        forward: stands in for the forward of its attention, where that does not ask Transformers for an attention:
            see :mod:`logpe.transformers.adapters`.
    """

    path: str = ""
    positions: str = "rotary_emb"
    rotary: bool = True
    angles_per_plane: int = 2
    attention: str = "Attention"
    causal: bool = True
    heads: str = "num_attention_heads"
    packs: bool = True
    bool_mask: bool = False
    scaled_slopes: bool = False
    forward: Callable[..., Any] | None = None

    def find(self, base: nn.Module) -> nn.Module | None:
        """Return the stack in ``base``; None where it has none, like the encoder of a decoder alone."""
        return base.get_submodule(self.path) if hasattr(base, self.path) or not self.path else None

    def attentions(self, stack: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the modules of self-attention, from the first layer on, and those of cross-attention."""
        found = [(name, module) for name, module in stack.named_modules() if _is_a(module, self.attention)]
        crossing = [module for name, module in found if name.endswith(CROSS_ATTENTION)]
        return [module for _, module in found if module not in crossing], crossing

    def remove_positions(self, stack: nn.Module, rotary_dim: int) -> None:
        """Put a stand-in where ``stack`` has its own positions; ``rotary_dim`` says how much of a head they turn."""
        if self.positions == RELATIVE_BIAS:
            for module in (module for group in self.attentions(stack) for module in group):
                module.has_relative_attention_bias = False  # type: ignore[assignment]
                if hasattr(module, RELATIVE_BIAS):
                    delattr(module, RELATIVE_BIAS)
                module.register_forward_pre_hook(_no_bias, with_kwargs=True)
            return
        if not self.positions:
            return
        path, _, name = self.positions.rpartition(".")
        angles = rotary_dim * self.angles_per_plane // 2
        setattr(stack.get_submodule(path), name, _NoRotation(angles) if self.rotary else _NoEmbedding())


def _is_a(module: nn.Module, suffix: str) -> bool:
    return type(module).__name__.endswith(suffix)


def _no_bias(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
    """Stand in for the relative bias that T5 hands to its attention: it would make one of N x N zeros."""
    return arguments, options | {"position_bias": torch.zeros((), device=next(module.parameters()).device)}


class _NoRotation(nn.Module):
    """Stand in for a rotary embedding: turn the first ``dim`` of a head by nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        shape = (*position_ids.shape, self.dim)
        return x.new_ones(shape), x.new_zeros(shape)


class _NoEmbedding(nn.Module):
    """Stand in for learned positions: add nothing."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        given = next((x for x in (*arguments, *options.values()) if isinstance(x, Tensor)), None)
        return torch.zeros((), device=None if given is None else given.device)


DECODER = (Stack(),)
LEARNED = (Stack(positions="wpe", rotary=False),)
BERT = (Stack(positions="embeddings.position_embeddings", rotary=False, attention="SelfAttention", causal=False),)
BART = tuple(
    Stack(side, "embed_positions", rotary=False, causal=side == "decoder", heads=f"{side}_attention_heads", packs=False)
    for side in ("encoder", "decoder")
)
T5 = tuple(
    Stack(side, RELATIVE_BIAS, rotary=False, attention="T5Attention", causal=side == "decoder", packs=False)
    for side in ("encoder", "decoder")
)

#: By ``config.model_type``.
ARCHITECTURES: dict[str, tuple[Stack, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"), DECODER),
    "gpt2": LEARNED,
    "gpt_neox": DECODER,
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"), DECODER),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "phi", "phi3", "smollm3", "granite", "glm", "glm4"), DECODER),
    **dict.fromkeys(("cohere", "cohere2", "exaone4", "ernie4_5", "seed_oss", "hunyuan_v1_dense"), DECODER),
    **dict.fromkeys(("starcoder2", "helium", "arcee", "apertus", "persimmon"), DECODER),
    **dict.fromkeys(("stablelm", "nemotron"), (Stack(packs=False),)),
    "gpt_oss": (Stack(angles_per_plane=1),),
    "gpt_bigcode": LEARNED,
    "opt": (Stack("decoder", "embed_positions", rotary=False, packs=False),),
    "bloom": (Stack(positions="", packs=False, forward=adapters.bloom_attention),),
    "mpt": (Stack(positions="", packs=False, bool_mask=True, forward=adapters.mpt_attention),),
    "falcon": (Stack(packs=False, bool_mask=True, scaled_slopes=True, forward=adapters.falcon_attention),),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"), BERT),
    "modernbert": (Stack(causal=False),),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus"), BART),
    **dict.fromkeys(("t5", "mt5"), T5),
}

#: Values of ``config.model_type`` that can be converted.
SUPPORTED = tuple(ARCHITECTURES)
