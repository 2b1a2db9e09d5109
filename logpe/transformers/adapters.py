"""Forward methods that stand in for those of attentions that do not ask Transformers for one.

Each takes what the method takes, and ``attend``, which is :func:`log_attention_forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

Attend = Callable[..., tuple[Tensor, None]]


def bloom_attention(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand in for BloomAttention.forward, whose ALiBi becomes the preset of that name."""
    q, k, v = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    dropout = self.attention_dropout.p if self.training else 0.0
    out, _ = attend(self, q, k, v, attention_mask, self.inv_norm_factor, dropout, is_causal=True)
    out = functional.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training)
    return residual + out, None


def mpt_attention(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand in for MptAttention.forward, whose ALiBi becomes the preset of that name."""
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
    q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(-1, (3, self.n_heads, -1)).unbind(-3))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    dropout = self.attn_dropout_p if self.training else 0.0
    out, _ = attend(self, q, k, v, attention_mask, self.softmax_scale, dropout, is_causal=True)
    return self.out_proj(out.flatten(2)), None


def falcon_attention(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand in for FalconAttention.forward, whose ALiBi becomes the preset of that name."""
    if attention_mask.is_floating_point():  # Falcon has added its ALiBi to it
        attention_mask = attention_mask[:, :1] > torch.finfo(attention_mask.dtype).min
    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    if alibi is None:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    dropout = self.attention_dropout.p if self.training and alibi is not None else 0.0  # as Falcon has it
    out, _ = attend(self, q, k, v, attention_mask, self.inv_norm_factor, dropout, is_causal=True)
    return self.dense(out.flatten(2)), None
