"""Hugging Face Transformers models with log positions, in one line.

    import logpe.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("...")                # Llama, Qwen2, Qwen3, Mistral, Gemma, GPT-2, ...
    logpe.transformers.use_log_position(model)                         # in place; the weights are kept
    model.generate(**inputs)                                           # any decoding, any cache; Trainer, PEFT, ...
    model.save_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out")                # any AutoModel: a classifier, too; or pipeline()

The model's attention becomes :func:`logpe.log_attention`, through Transformers' own interfaces for attention and
masks; no N x N mask is built. The model's own positions, rotary or learned, are taken out, unless
``keep_positions=True`` keeps them. Each attention gets a :class:`logpe.LogPosition` as its submodule ``log_position``:
parameters like any others, in float32 whatever the dtype of the model. Name it to PEFT
(``modules_to_save=["log_position"]``), and keep weight decay off it:
``Trainer(optimizers=(torch.optim.AdamW(logpe.parameter_groups(model, weight_decay), lr), None))``.

AutoModel and ``pipeline`` load a converted model once this module is imported. Before, they raise, unless another
``attn_implementation`` is asked for; then only their report of unexpected weights tells. A class called by its name,
such as ``LlamaForCausalLM.from_pretrained``, does not know the positions: its model raises when it runs.
:func:`from_pretrained` takes the class from the config. No code from a folder is run.

Positions follow from the cache and from the 2D ``attention_mask``. They count from the first token that the mask
shows, so that a left-padded batch gives the results of its rows without padding. ``position_ids`` serve only positions
that the model keeps. Keys are cached without rotation; a log rotation turns them anew at each call.

Several sequences may be packed into a row, and each is attended to as if it were alone: ``position_ids`` that start
again say so (``DataCollatorWithFlattening``, padding-free training and packing with TRL), or ``cu_seq_lens_q`` and
``max_length_q``, as flash attention takes them, which a compiled model needs; or ``seq_idx``. No mask of N x N is
built, and no cache is filled.

What cannot be honoured is refused by name: masks that are not causal, tokens hidden between others, attention weights,
softcapping (load a Gemma 2 with ``attn_logit_softcapping=None``, and train on). Transformers itself refuses continuous
batching (``generate_batch``), which it offers only with its own attentions.

Continuing a model that was trained with RoPE
---------------------------------------------
1. Convert it: ``use_log_position(model, "log-rotary-bias", rotary_scale=length)``, with the length in tokens at which
   it was trained. The rotation keeps the model's own theta. f_c(n) = c log(1 + n/c) is nearly n for n far below
   c = ``rotary_scale``: near positions stay about where they were, and far ones move together. A smaller scale leaves
   more to learn again and carries further. So does ``"log-bias-rope"``, whose rotation is not the model's.
2. Train all weights for some hundred steps, with the lengths and the kind of data of before. Take about a third of the
   peak learning rate, and a higher one for the positions: they are a few numbers that start from a random draw.

       groups = logpe.parameter_groups(model, weight_decay=0.1)        # the weights, the positions
       groups[0]["lr"], groups[1]["lr"] = peak_rate / 3, 1e-2
       optimizer = torch.optim.AdamW(groups)

3. Compare the loss with that of the original model, first at the old length, then at longer ones.

``tests/test_transformers.py`` goes through these steps with a small model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from logpe_kernels.options import LEARNABLE_PARTS, MAX_HEAD_DIM
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.import_utils import is_tracing

from logpe.attention import log_attention, log_attention_varlen
from logpe.checks import plain_bool
from logpe.distributed import ContextParallel
from logpe.position import PRESET_ROTATION, LogPosition, plain_options
from logpe.reference import PositionValues

try:
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        TensorParallelLayer,
        replace_layer_number_by_wildcard,
    )
except ImportError:  # an earlier Transformers: positions of all heads, which attention with fewer refuses
    TensorParallelLayer = object

#: Values of ``config.model_type`` that can be converted.
SUPPORTED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
#: The name under which Transformers knows our attention, and the masks that go with it.
IMPLEMENTATION = "logpe"
#: The keyword by which :func:`_check_call` tells the attention that it has checked the call.
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

Model = TypeVar("Model", bound=PreTrainedModel)


def use_log_position(
    model: Model,
    preset: str = "log-bias-rope",
    *,
    share_position: bool = False,
    keep_positions: bool = False,
    context_parallel: ContextParallel | None = None,
    **position_options: Any,
) -> Model:
    """Turn ``model`` into a log-position model, in place; the weights are kept.

    Args:
        model: a Llama, Qwen2, Qwen3, Mistral, Gemma (1, 2, 3: text), GPT-2 or GPT-NeoX model, with any head. Give
            the whole model, not a part of it. It gets a config of its own, so that other models made from the same
            config stay as they are.
        preset: see :class:`logpe.LogPosition`. ``log-invariant`` assumes logits of unit variance: of these models,
            Qwen3 and Gemma 3 normalise queries and keys.
        share_position: one LogPosition for all layers, not one for each. It becomes ``log_position`` of the base model.
        keep_positions: keep the model's own positions, rotary or learned. With preset ``none`` the model then computes
            what it did before. Not possible with a preset that rotates.
        context_parallel: see :func:`set_context_parallel`.
        position_options: more keywords for LogPosition, such as ``query_gain=True``. ``rotary_base`` and
            ``rotary_fraction`` default to those of the model's own rotary embedding, without the scaling of its rope
            type (yarn, llama3 and so on). ``log-bias-rope`` has its own.

    Returns:
        model. Its config carries the settings, so that :func:`from_pretrained` restores it.

    Raises:
        TypeError: not a Transformers model.
        ValueError: an unsupported model or an unsupported option of it, or a bad argument, named. The model is left
            as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if getattr(model.config, "log_position", None) is not None:
        raise ValueError(f"model has log positions already: {model.config.log_position}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must not have weights on the meta device: convert it before it is offloaded")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "model must not have its heads across processes: convert and save it in one, and load it with "
            "from_pretrained and a distributed_config"
        )
    for name in ("num_heads", "head_dim", "device"):
        if name in position_options:
            raise ValueError(f"position_options must not hold {name}: a position has that of its layer")
    settings = dict(preset=preset, share_position=share_position, keep_positions=keep_positions)
    _check_context_parallel(context_parallel, settings)
    _install(model, settings | position_options)
    set_context_parallel(model, context_parallel)
    return model


def set_context_parallel(model: PreTrainedModel, context_parallel: ContextParallel | None) -> None:
    """Let a converted model attend across processes, for training or for a prompt longer than one GPU holds.

    Each rank then calls the model with its tokens, ``context_parallel.shard(input_ids, 1)``, and gets their logits.
    Give it no attention_mask that hides tokens, no position_ids and no filled cache. A loss needs labels that were
    shifted before they were sharded: Transformers takes them as ``shift_labels``. No setting of the config: set it
    again after loading. For whose gradient is whose see :class:`logpe.ContextParallel`.

    Args:
        model: converted by :func:`use_log_position`, or loaded by :func:`from_pretrained`.
        context_parallel: how the tokens lie across processes; None for one process.

    Raises:
        TypeError, ValueError: a bad argument, or a model without log positions or with positions of its own.
    """
    settings = getattr(model.config, "log_position", None)
    if settings is None:
        raise ValueError("model must have log positions: convert it with use_log_position")
    _check_context_parallel(context_parallel, settings)
    base = model.base_model
    for module in (base, *_attentions(base)):
        module.context_parallel = context_parallel


def from_pretrained(directory: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that :func:`use_log_position` converted and ``save_pretrained`` saved.

    Args:
        directory: the folder, or the name of a model on the Hub.
        options: keywords of ``PreTrainedModel.from_pretrained``, such as ``dtype`` and ``device_map``. With
            ``distributed_config=DistributedConfig(tp_size=2)`` the positions lie across processes like the heads, if
            Transformers has a plan for the model (not for GPT-2).

    Returns:
        The model, of the class it was saved from, in evaluation mode.

    Raises:
        ValueError: there is no converted model, or its position parameters are missing or not positive and finite, or
            the ranks of tensor parallelism do not divide the heads and the key heads.
    """
    if options.pop("trust_remote_code", None):
        raise ValueError("trust_remote_code must be False: no code from a folder is run")
    _check_implementation(options.pop("attn_implementation", IMPLEMENTATION), ValueError)
    config, _ = transformers.PreTrainedConfig.get_config_dict(directory, **options)
    if not config:
        raise ValueError(f"{directory} holds no config.json")
    if config.get("log_position") is None:
        raise ValueError(
            f"{directory} holds a {config.get('model_type')} model without log positions: load it with Transformers, "
            "and convert it with use_log_position"
        )
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(f"architectures in the config of {directory} must name a model class of Transformers first, "
                         f"got {architectures}")  # fmt: skip
    return _load(model_class, directory, **options)


def _load(model_class: Any, directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
    """Load a converted model as ``model_class``. That may differ from the class that was saved: its head is new."""
    wants_info = options.pop("output_loading_info", False)
    options = dict(use_safetensors=True) | options | dict(output_loading_info=True, trust_remote_code=False)
    model, info = _converting(model_class).from_pretrained(directory, *arguments, **options)
    if missing := [name for name in info["missing_keys"] if "log_position." in name]:
        raise ValueError(f"{directory} lacks the position parameters {', '.join(sorted(missing))}")
    learnable = model.config.log_position.get("learnable", True)
    learned = LEARNABLE_PARTS if learnable is True else learnable or ()
    owners = [module for module in model.modules() if isinstance(getattr(module, "log_position", None), LogPosition)]
    for owner in owners:
        # What Transformers' loader does not do: move the angles, check and mark the parameters, freeze parts.
        position, device = owner.log_position, next(owner.parameters()).device
        if device.type != "meta":  # which means offloaded
            position.to(device)
        position.load_state_dict(position.state_dict())
        for name, parameter in position.named_parameters():
            parameter.requires_grad_(name.removeprefix("raw_") in learned)
    return (model, info) if wants_info else model


def _check_context_parallel(context_parallel: Any, settings: Mapping[str, Any]) -> None:
    if context_parallel is None:
        return
    if not isinstance(context_parallel, ContextParallel):
        raise TypeError(f"context_parallel must be a ContextParallel or None, got {type(context_parallel).__name__}")
    if settings.get("keep_positions"):
        raise ValueError("keep_positions must be False with context_parallel: the model counts from 0 on every rank")


def _attentions(base: nn.Module) -> list[nn.Module]:
    return [module for module in base.modules() if type(module).__name__.endswith("Attention")]


# --- conversion ---------------------------------------------------------------------------------------------


def _install(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Convert ``model``, which may lie on the meta device, and put the settings into its config."""
    config, base = model.config, model.base_model
    _check_supported(model)
    # Plain values, whatever was given: the config must be possible to save.
    plain = plain_options(**settings)
    plain |= {name: plain_bool(name, plain[name]) for name in ("share_position", "keep_positions")}
    if not isinstance(plain.get("learnable", True), bool):
        plain["learnable"] = sorted(plain["learnable"])  # JSON has no tuples
    options = dict(plain)
    preset, share, keep = (options.pop(name) for name in ("preset", "share_position", "keep_positions"))
    attentions = _attentions(base)
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    preset_rotates = preset in PRESET_ROTATION  # in its own way, not in the model's
    rotary = [{} if preset_rotates else _rotary_options(config, attention) for attention in attentions]

    def make(layer: int) -> LogPosition:
        device = next(attentions[layer].parameters()).device
        position = LogPosition(num_heads, head_dim, preset, device=device, **(rotary[layer] | options))
        return position.train(model.training)

    positions = [make(layer) for layer in range(1 if share else len(attentions))]
    if "rotary" in positions[0].parts:
        if keep:
            raise ValueError(f"keep_positions must be False with preset {preset!r}, which has a rotation of its own")
        if share and "rotary_base" not in options and rotary.count(rotary[0]) < len(rotary):
            raise ValueError("rotary_base must be given with share_position: the layers of this model differ in it")

    names = tuple(inspect.signature(base.forward).parameters)
    own_config = copy.deepcopy(config)

    # From here on nothing fails.
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is config:
                setattr(module, name, own_config)
    if share:
        base.log_position = positions[0]
        for attention in attentions:  # past nn.Module: the position is a submodule of the base model alone
            object.__setattr__(attention, "_log_position_owner", base)
    else:
        for attention, position in zip(attentions, positions, strict=True):
            attention.log_position = position
    if not keep:
        if hasattr(base, "wpe"):
            base.wpe = _NoEmbedding()
        else:
            base.rotary_emb = _NoRotation(int(head_dim * _rotary_options(config, attentions[0])["rotary_fraction"]))
    for owner in {model, base}:
        if TensorParallelLayer is not object and owner._tp_plan:
            rules = {replace_layer_number_by_wildcard(n) for n, m in owner.named_modules() if m in attentions}
            owner._tp_plan = owner._tp_plan | dict.fromkeys(rules, IMPLEMENTATION)
    base.register_forward_pre_hook(functools.partial(_check_call, names), with_kwargs=True)
    own_config.log_position = plain
    own_config._attn_implementation = IMPLEMENTATION
    # Saved under this name, it makes any other loader raise, rather than return a model without positions.
    own_config.attn_implementation = IMPLEMENTATION


def _check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError unless log_attention can honour the architecture of ``model`` and its options."""
    config = model.config
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{type(model).__name__} is of model type {config.model_type!r}, which is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    for name in ("attn_logit_softcapping", "use_bidirectional_attention", "add_cross_attention"):
        for owner in (config, *model.modules()):  # layers keep what the config said when they were made
            if value := getattr(owner, name, None):
                raise ValueError(
                    f"{type(model).__name__} has {name}={value}, which is not supported: log positions need causal "
                    "self-attention with plain logits. Load it with None or False there"
                )
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{type(model).__name__} has is_causal=False, which is not supported")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"{type(model).__name__} has head_dim {head_dim}, supported is at most {MAX_HEAD_DIM}")


def _rotary_options(config: Any, attention: nn.Module) -> dict[str, float]:
    """Return base and fraction of the model's own rotary embedding, as LogPosition takes them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(getattr(attention, "layer_type", None), parameters)  # Gemma 3: by type of layer
    return dict(
        rotary_base=float(parameters.get("rope_theta", 10000.0)),
        rotary_fraction=float(parameters.get("partial_rotary_factor", 1.0)),
    )


def _check_implementation(implementation: Any, error: type[Exception]) -> None:
    """Raise ``error`` for any other attention, which would silently leave the positions out."""
    if implementation != IMPLEMENTATION:
        raise error(
            f'attn_implementation must be "{IMPLEMENTATION}" or left out for a model with log positions, '
            f"got {implementation!r}"
        )


def _check_call(
    names: tuple[str, ...], base: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Refuse, before each forward of the base model, what the attention cannot see or would wait for once more.

    Args:
        names: names of the forward's arguments.
    """
    parallel = getattr(base, "context_parallel", None)
    with contextlib.nullcontext() if parallel is None else parallel.together():
        return _checked_call(names, base, arguments, options, parallel)


def _checked_call(
    names: tuple[str, ...],
    base: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    parallel: ContextParallel | None,
) -> tuple[tuple[()], dict[str, Any]]:
    """Return what the forward is called with; see :func:`_check_call`."""
    _check_implementation(base.config._attn_implementation, RuntimeError)
    given = dict(zip(names, arguments, strict=False)) | options
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
        breaks = _breaks(position_ids, told["seq_idx"], _real_tokens(mask, cache, position_ids))
    packed, padding = _read(visible, breaks, conditions)
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
        for name, allowed in (("past_key_values", cache is None), ("use_cache", not given.get("use_cache"))):
            if not allowed:
                raise ValueError(f"{name} must be None or False with packed sequences, which no cache keeps apart")
        if mask is not None and padding_mask is None:
            raise ValueError("attention_mask must have two dimensions, or be None, with packed sequences")
        given |= {"use_cache": False, PACKING: packing or _found_packing(tokens, breaks, visible)}
        visible, padding = tokens.new_ones(tokens.shape[:2], dtype=torch.bool), 0
    elif mask is None and cache is None and position_ids is not None and tokens is not None:
        # Nothing is hidden. Without a mask, Transformers would look at position_ids once more.
        visible = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    traced = visible is not None and is_tracing(visible)
    if visible is not None and not traced:
        visible.left_padding = padding  # type: ignore[attr-defined]  # for log_position_mask
    if visible is not None and (PACKING in given or not traced):
        given["attention_mask"] = visible
    return (), given | {CHECKED: True}


class _Packing(NamedTuple):
    """Sequences that lie side by side, in one row or in several: see :func:`logpe.log_attention_varlen`."""

    cu_seqlens: Tensor  # int32, over the tokens of all rows in turn
    max_seqlen: int


def _told_packing(told: Mapping[str, Any], visible: Tensor | None, conditions: dict[str, Tensor]) -> _Packing | None:
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
    return _Packing(cu_seqlens.int(), max(int(n) for n in (longest, longest_key) if n is not None))


def _breaks(position_ids: Tensor | None, seq_idx: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Return before which tokens, from the second on, another sequence begins: bool (B or 1, N - 1), or None.

    Args:
        position_ids: they count up by one within a sequence.
        seq_idx: number of the sequence.
        real: see :func:`_real_tokens`; position_ids may be anything at padding.
    """
    breaks = None if seq_idx is None else seq_idx.diff() != 0
    if position_ids is not None:
        jumps = position_ids.diff() != 1
        if real is not None:
            jumps = jumps & (real[..., 1:] & real[..., :-1]).to(jumps.device)
        breaks = jumps if breaks is None else jumps | breaks
    return None if breaks is None or breaks.shape[-1] == 0 else breaks


def _found_packing(tokens: Tensor, breaks: Tensor | None, visible: Tensor | None) -> _Packing:
    """Return the packing that ``breaks`` show. Padding counts as sequences of its own, which no other sees."""
    starts = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    if breaks is not None:
        starts[:, 1:] = breaks
    if visible is not None:
        starts[:, 1:] |= visible.diff()
    first = starts.flatten().nonzero()[:, 0].int()
    cu_seqlens = torch.cat([first, first.new_tensor([starts.numel()])])
    return _Packing(cu_seqlens, int(cu_seqlens.diff().max()))


def _tokens(given: Mapping[str, Any]) -> Any:
    """Return input_ids (B, N) or inputs_embeds (B, N, dim), whichever is given."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def _real_tokens(mask: Any, cache: Any, position_ids: Tensor | None) -> Tensor | None:
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
    return mask[:, 0, 0, :1] + index >= 0 if mask.dtype == torch.int32 else None


def _read(visible: Tensor | None, breaks: Tensor | None, conditions: dict[str, Tensor]) -> tuple[bool, int | Tensor]:
    """Return whether rows hold several sequences, and how many tokens are hidden before the first visible one.

    That is int32 (B,), or 0 if none are hidden anywhere. This is the only time that a forward waits for the GPU. In a
    trace, whose values come later, the graph asserts that rows hold one sequence each.

    Args:
        visible: bool (B, N), True for a real token; None if all are.
        breaks: see :func:`_breaks`.
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
        _require(conditions | unbroken | one_run)
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


class _HeadStyle(TensorParallelLayer):
    """Share out the positions of an attention whose heads Transformers shares out."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        from logpe.tensor_parallel import check_heads

        numbers = {name: getattr(module.config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
        check_heads(mesh, **{name: heads for name, heads in numbers.items() if heads is not None})
        getattr(module, "_log_position_owner", module).log_position.shard_heads(mesh, None)
        return module


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

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


@functools.cache
def _converting(model_class: Any) -> Any:
    """Return ``model_class`` with another __init__: where the config has log positions, the new model gets them.

    They must be there before weights are loaded.
    """

    def init(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        settings = getattr(config, "log_position", None)
        if settings is not None:
            _check_implementation(config._attn_implementation, ValueError)
        model_class.__init__(self, config, *arguments, **options)
        self.__class__ = model_class
        if settings is None:
            return
        try:
            _install(self, settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the config has log_position={settings!r}, which does not serve: {error!r}") from error

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def _register() -> None:
    """Let AutoModel and its like load converted models. They load all others as before."""

    def register(auto: Any, config_class: Any, model_class: Any) -> None:
        @classmethod  # type: ignore[misc]
        def from_pretrained(cls: Any, directory: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
            converted = getattr(config, "log_position", None) is not None
            load = functools.partial(_load, model_class) if converted else model_class.from_pretrained
            return load(directory, *arguments, config=config, **options)

        converting = _converting(model_class)
        members = {"from_pretrained": from_pretrained, "__module__": model_class.__module__, "registered_by": __name__}
        auto.register(config_class, type(model_class.__name__, (converting,), members), exist_ok=True)

    for auto in list(vars(modeling_auto).values()):
        mapping: Any = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        for config_class in map(CONFIG_MAPPING.__getitem__, SUPPORTED if mapping is not None else ()):
            model_class = mapping.get(config_class, None)
            if getattr(model_class, "config_class", None) is config_class and not hasattr(model_class, "registered_by"):
                register(auto, config_class, model_class)


# --- attention and its masks, as Transformers calls them ----------------------------------------------------


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
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention when Transformers calls the one named ``logpe``: see ``transformers.AttentionInterface``.

    Args:
        module: the attention layer, converted by :func:`use_log_position`.
        query: (B, Hq, Nq, D). key, value: (B, Hkv, Nk, D), what the cache returned.
        attention_mask: what :func:`log_position_mask` returned.

    Returns:
        (B, Nq, Hq, D), and None for the weights.
    """
    owner: Any = getattr(module, "_log_position_owner", module)
    if not hasattr(owner, "log_position"):
        raise RuntimeError(
            f"this {type(module).__name__} has no log position: convert its model with "
            "logpe.transformers.use_log_position, or load it with logpe.transformers.from_pretrained"
        )
    if not (module.is_causal if is_causal is None else is_causal):
        raise ValueError("is_causal must be True: log positions serve causal self-attention")
    for name in ("output_attentions", "softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f'{name} is not supported by the attention "{IMPLEMENTATION}"')
    if not options.get(CHECKED):  # the base model's hook was bypassed: a layer or a forward() was called directly
        if any(options.get(name) is not None for name in PACKING_OPTIONS):
            raise ValueError(BYPASSED)
        position_ids = options.get("position_ids")
        breaks = _breaks(position_ids, None, _real_tokens(attention_mask, None, position_ids))
        _require({} if breaks is None else {BYPASSED: ~breaks.any()})
    starts = {}
    if attention_mask is not None:
        shape = (query.shape[0], 1, 1, 2)
        if attention_mask.dtype != torch.int32 or attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask must be 2D, padding alone: got a mask of {attention_mask.dtype} and shape "
                f"{tuple(attention_mask.shape)}, which log positions cannot honour"
            )
        query_start, key_start = attention_mask[:, 0, 0].unbind(-1)
        starts = dict(query_start=query_start, key_start=key_start)
    # Called as a module, so that wrappers of sharding and of PEFT see it.
    values: PositionValues = owner.log_position(query.device)
    if owner is not module:  # one position serves layers on many devices
        moved: Any = {name: x.to(query.device) for name, x in values._asdict().items() if isinstance(x, Tensor)}
        values = values._replace(**moved)
    common: Any = dict(
        is_causal=True,
        window=None if sliding_window is None else (sliding_window - 1, None),
        scale=scaling,
        dropout_p=dropout,
        context_parallel=getattr(module, "context_parallel", None),
    )
    packing: _Packing | None = options.get(PACKING)
    if packing is None:
        out = log_attention(query, key, value, values, **common, **starts).transpose(1, 2)
    else:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * N, H, D)
        cu_seqlens, longest = packing.cu_seqlens.to(query.device), packing.max_seqlen
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
    **options: Any,
) -> Tensor | None:
    """Say where queries and keys stand, once per forward: see ``transformers.AttentionMaskInterface``.

    Args:
        q_offset, kv_offset: index of the first query and of the first key among all tokens so far.
        attention_mask: bool (B, N), True for a real token, with at least as many columns as there are tokens so far.

    Returns:
        int32 (B, 1, 1, 2): position of the first query and of the first key, negative in left padding. It has four
        dimensions, so that Transformers passes it on as it is. None where log_attention assumes the same: keys from
        0, the last query at the last key.
    """
    if use_vmap or "allow_is_bidirectional_skip" in options:
        raise ValueError("the model asks for a mask that is not causal, which log positions cannot honour")
    if not allow_is_causal_skip and q_length > 1:
        # Possibly this is not a causal mask: the diagonals beside the main one show it.
        batch = torch.arange(batch_size, device=device)[:, None]
        index = torch.arange(q_length - 1, device=device) + q_offset
        plain = ~mask_function(batch, 0, index, index + 1)
        if local_size is None or local_size > 1:
            plain = plain & mask_function(batch, 0, index + 1, index)
        _require({f"the mask is not causal, or {BYPASSED}": plain.all()})
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
            # GPT-2 passes on a view of what _check_call checked.
            checked = attention_mask if attention_mask._base is None else attention_mask._base
            padding = getattr(checked, "left_padding", None)
        else:
            padding = None
        if padding is None:
            _, padding = _read(attention_mask, None, {})
    static = not isinstance(padding, Tensor) and not isinstance(q_offset, Tensor) and allow_is_causal_skip
    if static and kv_offset == 0 and q_offset + q_length == kv_length:
        return None
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    starts = torch.stack((zero + q_offset - padding, zero + kv_offset - padding)).int()  # (2, B): each is contiguous
    return starts.T[:, None, None]


def _require(conditions: Mapping[str, Tensor]) -> None:
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


AttentionInterface.register(IMPLEMENTATION, log_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, log_position_mask)
if TensorParallelLayer is not object:
    ALL_PARALLEL_STYLES.register(IMPLEMENTATION, _HeadStyle())
_register()
