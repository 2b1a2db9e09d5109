"""Attention and its masks, as Transformers calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function
from transformers.utils.import_utils import is_tracing

from logpe.attention import log_attention, log_attention_varlen
from logpe.reference import PositionValues
from logpe.transformers.architectures import ARCHITECTURES
from logpe.transformers.calls import (
    BYPASSED,
    CHECKED,
    IMPLEMENTATION,
    PACKING,
    PACKING_OPTIONS,
    Packing,
    breaks_between,
    read,
    real_tokens,
    require,
    starts_from,
)


def log_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention when Transformers calls the one named ``logpe``: see ``transformers.AttentionInterface``.

    Args:
        module: the attention layer, converted by :func:`use_log_position`.
        query: (B, Hq, Nq, D). key: (B, Hkv, Nk, D), value: (B, Hkv, Nk, Dv), what the cache returned.
        attention_mask: what :func:`log_position_mask` returned.
        s_aux: (Hq,), the model's own sink of each head, which stays as it is.

    Returns:
        (B, Nq, Hq, Dv), and None for the weights.

    Raises:
        RuntimeError: the layer is not converted.
        ValueError: an option, a mask or a packing that log positions do not support.
    """
    owner: Any = getattr(module, "_log_position_owner", module)
    if not hasattr(module, "log_position_causal"):
        raise RuntimeError(
            f"this {type(module).__name__} has no log position: convert its model with "
            "logpe.transformers.use_log_position, or load it with logpe.transformers.from_pretrained"
        )
    causal: Any = module.log_position_causal  # None in cross-attention, where nothing stands anywhere
    if causal is not None and (module.is_causal if is_causal is None else is_causal) != causal:
        raise ValueError(f"is_causal must be {causal} for this {type(module).__name__}")
    if isinstance(bias := options.get("position_bias"), Tensor) and bias.dim() == 0:  # what stands in for that of T5
        del options["position_bias"]
    for name in ("output_attentions", "softcap", "position_bias", "cache"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f'{name} is not supported by the attention "{IMPLEMENTATION}"')
    if not options.get(CHECKED):  # the base model's hook was bypassed: a layer or a forward() was called directly
        if any(options.get(name) is not None for name in PACKING_OPTIONS):
            raise ValueError(BYPASSED)
        position_ids = options.get("position_ids")
        breaks = breaks_between(position_ids, None, real_tokens(attention_mask, None, position_ids))
        require({} if breaks is None else {BYPASSED: ~breaks.any()})
    starts: dict[str, Any] = {}
    parallel = getattr(module, "context_parallel", None)
    if attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1:-1] == (1, 1):
        if parallel is None:
            attention_mask = starts_from(attention_mask, query.shape[2])
        else:
            require({"attention_mask must be None with context_parallel": attention_mask.all()})
            attention_mask = None
    if attention_mask is not None:
        shape = (query.shape[0], 1, 1, 2)
        if attention_mask.dtype != torch.int32 or attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask must be 2D, padding alone: got a mask of {attention_mask.dtype} and shape "
                f"{tuple(attention_mask.shape)}, which log positions cannot honour"
            )
        first, second = attention_mask[:, 0, 0].unbind(-1)
        starts = dict(query_start=first, key_start=second)
        if not causal:
            starts = dict(query_start=first if causal is False else 0, key_start=first, key_lengths=second)
    # Called as a module, so that wrappers of sharding and of PEFT see it.
    values: PositionValues | None = None if causal is None else owner.log_position(query.device)
    if values is not None and owner is not module:  # one position serves layers on many devices
        moved: Any = {name: x.to(query.device) for name, x in values._asdict().items() if isinstance(x, Tensor)}
        values = values._replace(**moved)
    own_sink: Any = getattr(module, "log_sink", None)
    if own_sink is not None:
        s_aux = own_sink(query, scaling)
    common: Any = dict(
        is_causal=bool(causal),
        window=None if sliding_window is None else (sliding_window - 1, None if causal else sliding_window - 1),
        scale=scaling,
        dropout_p=dropout,
        sink=s_aux,
        context_parallel=parallel,
    )
    packing: Packing | None = options.get(PACKING)
    if packing is None:
        out = log_attention(query, key, value, values, **common, **starts).transpose(1, 2)
    else:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * N, H, D)
        cu_seqlens, longest = packing.cu_seqlens.to(query.device), packing.max_seqlen
        if common["sink"] is not None and common["sink"].dim() == 3:
            common["sink"] = common["sink"].transpose(0, 1).flatten(1)  # (Hq, B * N)
        out = log_attention_varlen(q, k, v, values, cu_seqlens, cu_seqlens, longest, longest, **common)
        out = out.unflatten(0, (len(query), -1))
    return out.contiguous(), None


def log_position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """Say where queries and keys stand, once per forward: see ``transformers.AttentionMaskInterface``.

    Args:
        q_offset, kv_offset: index of the first query and of the first key among all tokens so far.
        attention_mask: bool (B, N), True for a real token, with at least as many columns as there are tokens so far.

    Returns:
        int32 (B, 1, 1, 2): position of the first query and of the first key, negative in left padding; in an encoder,
        position of the first token, and the number of tokens before right padding. It has four dimensions, so that
        Transformers passes it on as it is. None where log_attention assumes the same: keys from 0, the last query at
        the last key. For a model that computes with the mask, see ``Stack.bool_mask``: bool (B, 1, 1, Nk), the keys
        that the last query sees.

    Raises:
        ValueError: the model asks for a mask of another kind, or attention_mask has another batch size or too few
            columns.
    """
    causal = "allow_is_bidirectional_skip" not in options
    parts = () if config is None else ARCHITECTURES[config.model_type]
    known = {part.causal for part in parts} or {causal}
    if use_vmap or causal not in known:
        mask = "that is not causal" if known == {True} else "of its own making"
        raise ValueError(f"the model asks for a mask {mask}, which log positions cannot honour")
    if causal and not allow_is_causal_skip and q_length > 1:
        # Possibly this is not a causal mask: the diagonals beside the main one show it.
        batch = torch.arange(batch_size, device=device)[:, None]
        index = torch.arange(q_length - 1, device=device) + q_offset
        plain = ~mask_function(batch, 0, index, index + 1)
        if local_size is None or local_size > 1:
            plain = plain & mask_function(batch, 0, index + 1, index)
        require({f"the mask is not causal, or {BYPASSED}": plain.all()})
    padding: Any = 0
    if attention_mask is not None:
        if attention_mask.shape[0] != batch_size:
            raise ValueError(f"attention_mask must have the batch size, {batch_size}, got {attention_mask.shape[0]}")
        if not isinstance(q_offset, Tensor) and attention_mask.shape[1] < q_offset + q_length:
            raise ValueError(
                f"attention_mask must cover all tokens so far, {q_offset + q_length}, got shape "
                f"{tuple(attention_mask.shape)}"
            )
        if not is_tracing(attention_mask):
            # GPT-2 passes on a view of what check_call checked.
            checked = attention_mask if attention_mask._base is None else attention_mask._base
            padding = getattr(checked, "left_padding", None)
        else:
            padding = None
        if padding is None:
            _, padding = read(attention_mask, None, {})
    if not causal:
        if attention_mask is None or not isinstance(padding, Tensor):
            return None
        end = padding + attention_mask.sum(-1, dtype=torch.int32)
        return torch.stack((-padding, end)).int().T[:, None, None]
    if any(part.bool_mask for part in parts):
        index = torch.arange(kv_length, device=device)
        first = padding[:, None] if isinstance(padding, Tensor) else torch.zeros(batch_size, 1, device=device)
        return ((index >= first) & (index < q_offset + q_length))[:, None, None]
    static = not isinstance(padding, Tensor) and not isinstance(q_offset, Tensor) and allow_is_causal_skip
    if static and kv_offset == 0 and q_offset + q_length == kv_length:
        return None
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    starts = torch.stack((zero + q_offset - padding, zero + kv_offset - padding)).int()  # (2, B): each is contiguous
    return starts.T[:, None, None]
