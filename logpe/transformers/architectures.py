"""Which models of Transformers can be converted, and what a conversion must know of them.

To add one, add it to :data:`ARCHITECTURES` and to the configurations in ``tests/test_transformers_decoders.py`` or
``tests/test_transformers_encoders.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """What a conversion must know of a type of model.

    Args:
        positions: the path, from the base model, of the module with the model's own positions.
        rotary: whether that module gives the angles of a rotary embedding; else it is added to the token embedding.
        attention: what the names of its classes of self-attention end with.
        causal: whether a token sees those before it alone, as in a decoder; in an encoder it sees all.
        packs: whether the model hands its attention what it is not told by name, and so packed sequences.
    """

    positions: str = "rotary_emb"
    rotary: bool = True
    attention: str = "Attention"
    causal: bool = True
    packs: bool = True

    def attentions(self, base: nn.Module) -> list[nn.Module]:
        """Return the modules of self-attention, from the first layer on."""
        return [module for module in base.modules() if type(module).__name__.endswith(self.attention)]

    def remove_positions(self, base: nn.Module, rotary_dim: int) -> None:
        """Put a stand-in where ``base`` has its own positions; ``rotary_dim`` says how much of a head they turn."""
        path, _, name = self.positions.rpartition(".")
        stand_in = _NoRotation(rotary_dim) if self.rotary else _NoEmbedding()
        setattr(base.get_submodule(path), name, stand_in)


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
        given = (x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        return torch.zeros((), device=next(given).device)


BERT = Architecture("embeddings.position_embeddings", rotary=False, attention="SelfAttention", causal=False)

#: By ``config.model_type``.
ARCHITECTURES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"), Architecture()),
    "gpt2": Architecture("wpe", rotary=False),
    "gpt_neox": Architecture(),
    # From here on: tested in test_transformers_decoders.py.
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"), Architecture()),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "phi", "phi3", "smollm3", "granite", "glm", "glm4"), Architecture()),
    **dict.fromkeys(("cohere", "cohere2", "exaone4", "ernie4_5", "seed_oss", "hunyuan_v1_dense"), Architecture()),
    **dict.fromkeys(("starcoder2", "helium", "arcee", "apertus", "persimmon"), Architecture()),
    **dict.fromkeys(("stablelm", "nemotron"), Architecture(packs=False)),
    "gpt_bigcode": Architecture("wpe", rotary=False),
    # Encoders: tested in test_transformers_encoders.py.
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"), BERT),
    "modernbert": Architecture(causal=False),
}

#: Values of ``config.model_type`` that can be converted.
SUPPORTED = tuple(ARCHITECTURES)
