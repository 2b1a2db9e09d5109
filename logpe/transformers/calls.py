"""What is checked, and worked out once, before each forward of a converted model: padding and packed sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from logpe.distributed import ContextParallel
from logpe.transformers.architectures import Stack

#: The name under which Transformers knows our attention, and the masks that go with it.
IMPLEMENTATION = "logpe"
#: The keyword by which :func:`check_call` tells the attention that it has checked the call.
CHECKED = "log_position_checked"
#: The keyword by which it hands over what it knows of packed sequences.
PACKING = "log_position_packing"
#: The keywords that say that a row of the batch holds several sequences. position_ids that start again say so, too.
PACKING_OPTIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
TRACED_PACKING = "position_ids start again: tell a traced model of packed sequences by cu_seq_lens_q and max_length_q"
BYPASSED = "position_ids hold packed sequences: call the whole model, not the forward method of a part of it"
HOLES = (
    "attention_mask hides tokens between visible ones: their positions are undefined. Pad on the left (or, where "
    "nothing follows, on the right)"
)


def check_implementation(implementation: Any, error: type[Exception]) -> None:
    """Raise ``error`` for any other attention, which would silently leave the positions out."""
    if implementation != IMPLEMENTATION:
        raise error(
            f'attn_implementation must be "{IMPLEMENTATION}" or left out for a model with log positions, '
            f"got {implementation!r}"
        )


def check_call(
    part: Stack, names: tuple[str, ...], stack: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Refuse, before each forward of a stack, what the attention cannot see or would wait for once more.

    Args:
        part: what is known of the stack.
        names: names of the forward's arguments.
    """
    parallel = getattr(stack, "context_parallel", None)
    with contextlib.nullcontext() if parallel is None else parallel.together():
        check_implementation(stack.config._attn_implementation, RuntimeError)
        given = dict(zip(names, arguments, strict=False)) | options
        return (), _checked_call(part, names, given, stack.config.model_type, parallel)


def check_packing(
    part: Stack, names: tuple[str, ...], model: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Refuse packed sequences before the forward of a model that may keep them from its stack: see ``Stack.packs``."""
    given = dict(zip(names, arguments, strict=False)) | options
    if any(given.get(name) is not None for name in (*PACKING_OPTIONS, "position_ids")):
        _checked_call(part, names, given, model.config.model_type, None)


def _checked_call(
    part: Stack, names: tuple[str, ...], given: dict[str, Any], model_type: str, parallel: ContextParallel | None
) -> dict[str, Any]:
    """Return what the forward is called with; see :func:`check_call`."""
    told = {name: given.pop(name, None) for name in PACKING_OPTIONS}
    mask, position_ids, cache = (given.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    padding_mask = mask if isinstance(mask, Tensor) and mask.dim() < 4 else None
    conditions = {}
    if padding_mask is not None and padding_mask.dtype != torch.bool:
        message = "attention_mask must hold 0 and 1. Tell packed sequences by position_ids or cu_seq_lens_q"
        conditions[message] = ((padding_mask == 0) | (padding_mask == 1)).all()
    visible = None if padding_mask is None else padding_mask.to(torch.bool, copy=True)
    packing = _told_packing(told, visible, conditions)
    breaks = None
    if packing is None:
        breaks = breaks_between(position_ids, told["seq_idx"], real_tokens(mask, cache, position_ids))
    packed, padding = read(visible, breaks, conditions)
    tokens = _tokens(given)
    if parallel is not None:
        cached = cache is not None and cache.get_seq_length() > 0
        hidden = visible is not None and not visible.all()
        given_too = {"position_ids": position_ids is not None, "past_key_values": cached, "attention_mask": hidden}
        if refused := [name for name, present in given_too.items() if present]:
            raise ValueError(
                f"{refused[0]} must be None with context_parallel: a rank sees its tokens alone. generate() runs in "
                "one process"
            )
    if packed or packing is not None:
        if not part.packs:
            raise ValueError(f"packed sequences are not supported for model type {model_type!r}: pad them instead")
        for name, allowed in (("past_key_values", cache is None), ("use_cache", not given.get("use_cache"))):
            if not allowed:
                raise ValueError(f"{name} must be None or False with packed sequences, which no cache keeps apart")
        if mask is not None and padding_mask is None:
            raise ValueError("attention_mask must have two dimensions, or be None, with packed sequences")
        given[PACKING] = packing or _found_packing(tokens, breaks, visible)
        if "use_cache" in names:
            given["use_cache"] = False
        visible, padding = tokens.new_ones(tokens.shape[:2], dtype=torch.bool), 0
    elif mask is None and cache is None and position_ids is not None and tokens is not None:
        # Nothing is hidden. Without a mask, Transformers would look at position_ids once more.
        visible = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    traced = visible is not None and is_tracing(visible)
    if visible is not None and not traced:
        visible.left_padding = padding  # type: ignore[attr-defined]  # for log_position_mask
    if visible is not None and (PACKING in given or not traced):
        given["attention_mask"] = visible
    takes_types = "token_type_ids" in names and not part.causal
    if takes_types and given.get("token_type_ids") is None and tokens is not None:
        # Those that an encoder keeps are no longer than its learned positions.
        given["token_type_ids"] = tokens.new_zeros(tokens.shape[:2], dtype=torch.long)
    return given | {CHECKED: True}


class Packing(NamedTuple):
    """Sequences that lie side by side, in one row or in several: see :func:`logpe.log_attention_varlen`."""

    cu_seqlens: Tensor  # int32, over the tokens of all rows in turn
    max_seqlen: int


def _told_packing(told: Mapping[str, Any], visible: Tensor | None, conditions: dict[str, Tensor]) -> Packing | None:
    """Return the packing that a caller tells as flash attention takes it, and add what must hold for it."""
    cu_seqlens, keys, longest, longest_key = (told[name] for name in PACKING_OPTIONS[:4])
    if cu_seqlens is None:
        if name := next((name for name in PACKING_OPTIONS[:4] if told[name] is not None), None):
            raise ValueError(f"cu_seq_lens_q must be given with {name}")
        return None
    if keys is not None and keys is not cu_seqlens:
        if keys.shape != cu_seqlens.shape:
            raise ValueError(f"cu_seq_lens_k must have the shape of cu_seq_lens_q, got {tuple(keys.shape)}")
        conditions["cu_seq_lens_k must be cu_seq_lens_q"] = (keys == cu_seqlens).all()
    if visible is not None:
        conditions["attention_mask must hide nothing with cu_seq_lens_q"] = visible.all()
    if longest is None and longest_key is None:
        longest = cu_seqlens.diff().max() if len(cu_seqlens) > 1 else 0
    return Packing(cu_seqlens.int(), max(int(n) for n in (longest, longest_key) if n is not None))


def breaks_between(position_ids: Tensor | None, seq_idx: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Return before which tokens, from the second on, another sequence begins: bool (B or 1, N - 1), or None.

    Args:
        position_ids: they count up by one within a sequence.
        seq_idx: number of the sequence.
        real: see :func:`real_tokens`; position_ids may be anything at padding.
    """
    breaks = None if seq_idx is None else seq_idx.diff() != 0
    if position_ids is not None:
        jumps = position_ids.diff() != 1
        if real is not None:
            jumps = jumps & (real[..., 1:] & real[..., :-1]).to(jumps.device)
        breaks = jumps if breaks is None else jumps | breaks
    return None if breaks is None or breaks.shape[-1] == 0 else breaks


def _found_packing(tokens: Tensor, breaks: Tensor | None, visible: Tensor | None) -> Packing:
    """Return the packing that ``breaks`` show. Padding counts as sequences of its own, which no other sees."""
    starts = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    if breaks is not None:
        starts[:, 1:] = breaks
    if visible is not None:
        starts[:, 1:] |= visible.diff()
    first = starts.flatten().nonzero()[:, 0].int()
    cu_seqlens = torch.cat([first, first.new_tensor([starts.numel()])])
    return Packing(cu_seqlens, int(cu_seqlens.diff().max()))


def _tokens(given: Mapping[str, Any]) -> Any:
    """Return input_ids (B, N) or inputs_embeds (B, N, dim), whichever is given."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def real_tokens(mask: Any, cache: Any, position_ids: Tensor | None) -> Tensor | None:
    """Return which of the next tokens, as many as ``position_ids``, are real, (B, N).

    None means that all are, or that the mask will be refused later.
    """
    if isinstance(mask, dict):  # by type of layer
        mask = next((x for x in mask.values() if x is not None), None)
    if mask is None or position_ids is None:
        return None
    index = torch.arange(position_ids.shape[-1], device=mask.device)
    if mask.dim() < 4:
        index = index + (0 if cache is None else cache.get_seq_length())
        return mask.bool()[..., index.clamp(max=mask.shape[-1] - 1)]
    if mask.dtype == torch.bool and mask.shape[1:-1] == (1, 1):
        mask = starts_from(mask, len(index))
    return mask[:, 0, 0, :1] + index >= 0 if mask.dtype == torch.int32 else None


def starts_from(visible: Tensor, num_queries: int) -> Tensor:
    """Return the positions of the first query and the first key, int32 (B, 1, 1, 2): see :func:`log_position_mask`.

    Args:
        visible: bool (B, 1, 1, Nk), the keys that the last query sees.
    """
    seen = visible.cumsum(-1, dtype=torch.int32)
    return torch.stack((seen[..., -1] - num_queries, -(seen == 0).sum(-1, dtype=torch.int32)), -1)


def read(visible: Tensor | None, breaks: Tensor | None, conditions: dict[str, Tensor]) -> tuple[bool, int | Tensor]:
    """Return whether rows hold several sequences, and how many tokens are hidden before the first visible one.

    That is int32 (B,), or 0 if none are hidden anywhere. This is the only time that a forward waits for the GPU. In a
    trace, whose values come later, the graph asserts that rows hold one sequence each.

    Args:
        visible: bool (B, N), True for a real token; None if all are.
        breaks: see :func:`breaks_between`.
        conditions: bool tensors () that must be True, by the message if one is not.

    Raises:
        ValueError: a condition does not hold, or tokens are hidden between visible ones.
    """
    unbroken = {} if breaks is None else {TRACED_PACKING: ~breaks.any()}
    one_run: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    if visible is not None:
        runs = visible[..., :1].sum(-1) + (visible[..., 1:] & ~visible[..., :-1]).sum(-1)
        one_run, shown = {HOLES: (runs <= 1).all()}, {"all": visible.all()}
    if any(map(is_tracing, (conditions | unbroken | one_run).values())):
        require(conditions | unbroken | one_run)
        values = {"all": False}
    else:
        values = _values(conditions | unbroken | one_run | shown)
        packed = not values.get(TRACED_PACKING, True)
        _raise_unless({name: values[name] for name in (conditions if packed else conditions | one_run)})
        if packed:
            return True, 0
    if visible is None or values["all"]:
        return False, 0
    # Right padding needs no treatment: no real query comes after it.
    return False, (visible.cumsum(-1) == 0).sum(-1, dtype=torch.int32).flatten()


def require(conditions: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless bool tensors () hold, by message. In a trace the graph will assert them."""
    if any(map(is_tracing, conditions.values())):
        for message, condition in conditions.items():
            torch._assert_async(condition, message)
    else:
        _raise_unless(_values(conditions))


def _values(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Read bool tensors () from the GPU, all at once."""
    devices = [x.device for x in tensors.values()]
    together = [x.to(devices[0]) for x in tensors.values()]
    return dict(zip(tensors, torch.stack(together).tolist() if together else [], strict=True))


def _raise_unless(conditions: Mapping[str, bool]) -> None:
    for message, holds in conditions.items():
        if not holds:
            raise ValueError(message)
