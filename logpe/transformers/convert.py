"""Conversion of Transformers models, and how converted ones are loaded."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import transformers
from logpe_kernels.options import LEARNABLE_PARTS, MAX_HEAD_DIM
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.falcon import modeling_falcon

from logpe.checks import DTYPES, plain_bool
from logpe.distributed import ContextParallel
from logpe.module import HeadSink
from logpe.position import PRESET_ROTATION, LogPosition, inverse_softplus, plain_options
from logpe.transformers.architectures import ARCHITECTURES, RELATIVE_BIAS, SUPPORTED, Stack
from logpe.transformers.attention import log_attention_forward
from logpe.transformers.calls import IMPLEMENTATION, check_call, check_implementation, check_packing

try:
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        TensorParallelLayer,
        replace_layer_number_by_wildcard,
    )
except ImportError:  # an earlier Transformers: positions of all heads, which attention with fewer refuses
    TensorParallelLayer = object

Model = TypeVar("Model", bound=PreTrainedModel)


def use_log_position(
    model: Model,
    preset: str = "log-bias-rope",
    *,
    share_position: bool = False,
    keep_positions: bool = False,
    sink: bool = False,
    context_parallel: ContextParallel | None = None,
    **position_options: Any,
) -> Model:
    """Turn ``model`` into a log-position model, in place; the weights are kept.

    Args:
        model: of a type in ``SUPPORTED``, with any head. Give the whole model, not a part of it. It gets a config of
            its own, so that other models made from the same config stay as they are.
        preset: see :class:`logpe.LogPosition`. ``log-invariant`` assumes logits of unit variance: of these models,
            Qwen3 and Gemma 3 normalise queries and keys.
        share_position: one LogPosition for all layers, not one for each. It becomes ``log_position`` of the base model,
            or one of the encoder and one of the decoder.
        keep_positions: keep the model's own positions, rotary or learned. With preset ``none`` the model then computes
            what it did before. Not possible with a preset that rotates.
        sink: give each head of self-attention a key without a position, whose value is zero, for queries that match
            nothing: see :class:`logpe.HeadSink`. At first it has score 0, so that a trained model needs to adapt.
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
    settings = dict(preset=preset, share_position=share_position, keep_positions=keep_positions, sink=sink)
    _check_context_parallel(context_parallel, settings)
    _install(model, settings | position_options)
    set_context_parallel(model, context_parallel)
    return model


def set_context_parallel(model: PreTrainedModel, context_parallel: ContextParallel | None) -> None:
    """Let a converted model attend across processes, for training or for a prompt longer than one GPU holds.

    Each rank then calls the model with its tokens, ``context_parallel.shard(input_ids, 1)``, and gets their logits.
    Give it no attention_mask that hides tokens, no position_ids and no filled cache. A loss needs labels that were
    shifted before they were sharded: Transformers takes them as ``shift_labels``. The config does not store it: set
    it again after loading. :class:`logpe.ContextParallel` says which gradients to sum.

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
    parts = ARCHITECTURES[model.config.model_type]
    if context_parallel is not None and not all(part.causal for part in parts):
        raise ValueError("context_parallel must be None for an encoder: what it makes of a text, one rank must hold")
    for part in parts:
        stack: Any = part.find(model.base_model)
        for module in (stack, *part.attentions(stack)[0]):
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
    check_implementation(options.pop("attn_implementation", IMPLEMENTATION), ValueError)
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
    if missing := [name for name in info["missing_keys"] if "log_position." in name or "log_sink." in name]:
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


def _install(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Convert ``model``, which may lie on the meta device, and put the settings into its config."""
    config, base = model.config, model.base_model
    _check_supported(model)
    # Plain values, whatever was given: the config must be possible to save.
    plain = plain_options(**settings)
    sink = plain_bool("sink", plain.pop("sink", False))
    plain |= {name: plain_bool(name, plain[name]) for name in ("share_position", "keep_positions")}
    if not isinstance(plain.get("learnable", True), bool):
        plain["learnable"] = sorted(plain["learnable"])  # JSON has no tuples
    options = dict(plain)
    preset, share, keep = (options.pop(name) for name in ("preset", "share_position", "keep_positions"))
    layers: list[_Layers] = []
    for part in ARCHITECTURES[config.model_type]:
        if (stack := part.find(base)) is not None:
            layers.append(_Layers(part, stack, *part.attentions(stack), config, preset, options))
    for group in layers:
        if not group.attentions:
            raise ValueError(
                f'{type(model).__name__} has no attention to convert: load it with attn_implementation="sdpa"'
            )
        first = group.positions[0]
        if sink and hasattr(group.attentions[0], "sinks"):
            raise ValueError(f"sink must be False for {type(model).__name__}, which has sinks of its own")
        if "rotary" in first.parts and keep:
            raise ValueError(f"keep_positions must be False with preset {preset!r}, which has a rotation of its own")
        if keep and sink and group.part.rotary:
            raise ValueError(
                f"sink must be False with keep_positions for {type(model).__name__}: the sink has no position, but the "
                "model has rotated the queries that it meets"
            )
        if keep and (group.part.positions in ("", RELATIVE_BIAS) or getattr(config, "alibi", False)):
            raise ValueError(f"keep_positions must be False for {type(model).__name__}, whose own are a bias")
        if "rotary" in first.parts and share and "rotary_base" not in options and not group.alike:
            raise ValueError("rotary_base must be given with share_position: the layers of this model differ in it")

    # From here on nothing fails. T5 has a config for each side.
    own_configs: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, type(config)):
                own_configs.setdefault(id(value), copy.deepcopy(value))
                own_configs[id(value)]._attn_implementation = IMPLEMENTATION
                setattr(module, name, own_configs[id(value)])
    for group in layers:
        group.install(share, keep, sink)
        if not group.part.packs and model is not group.stack:
            names = tuple(inspect.signature(model.forward).parameters)
            model.register_forward_pre_hook(functools.partial(check_packing, group.part, names), with_kwargs=True)
    attentions = [attention for group in layers for attention in group.attentions]
    for owner in {model, base}:
        if TensorParallelLayer is not object and owner._tp_plan:
            rules = {replace_layer_number_by_wildcard(n) for n, m in owner.named_modules() if m in attentions}
            owner._tp_plan = owner._tp_plan | dict.fromkeys(rules, IMPLEMENTATION)
    own_config = model.config
    own_config.log_position = plain | {"sink": True} if sink else plain  # so that earlier versions load the others
    # Saved under this name, it makes any other loader raise, rather than return a model without positions.
    own_config.attn_implementation = IMPLEMENTATION


class _Layers:
    """The attentions of a stack, and the positions that they will get."""

    def __init__(
        self,
        part: Stack,
        stack: Any,
        attentions: list[nn.Module],
        crossing: list[nn.Module],
        config: Any,
        preset: str,
        options: dict[str, Any],
    ) -> None:
        self.part, self.stack, self.attentions, self.crossing = part, stack, attentions, crossing
        num_heads = getattr(config, part.heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        rotary = [_rotary_options(config, attention) for attention in attentions]
        self.rotary_dim = int(head_dim * rotary[0]["rotary_fraction"]) if rotary else 0
        self.alike = preset in PRESET_ROTATION or all(own == rotary[0] for own in rotary)
        self.positions = []
        for attention, own in zip(attentions, rotary, strict=True):
            settings = ({} if preset in PRESET_ROTATION else own) | options  # such a preset does not turn as the model
            device = next(attention.parameters()).device
            position = LogPosition(num_heads, head_dim, preset, device=device, **settings)
            if preset == "alibi" and part.scaled_slopes and (raw := position.raw_power) is not None:
                raw.data = inverse_softplus(functional.softplus(raw.data) / head_dim**0.5)
            self.positions.append(position.train(stack.training))

    def install(self, share: bool, keep: bool, sink: bool) -> None:
        """Put the positions in, and the sinks."""
        for attention in (*self.attentions, *self.crossing):
            attention.log_position_causal = self.part.causal if attention in self.attentions else None  # type: ignore
            if self.part.forward is not None:
                attention.forward = functools.partial(self.part.forward, attention, attend=log_attention_forward)
        for attention, position in zip(self.attentions, self.positions, strict=True) if sink else ():
            device = next(attention.parameters()).device
            weights = itertools.chain(attention.parameters(), self.stack.parameters())  # quantised ones are integers
            dtype = next((x.dtype for x in weights if x.dtype in DTYPES), None)
            made = HeadSink(position.num_heads, position.head_dim, device=device, dtype=dtype)
            attention.log_sink = made.train(self.stack.training)
        if share:
            self.stack.log_position = self.positions[0]
            for attention in self.attentions:  # past nn.Module: the position is a submodule of the stack alone
                object.__setattr__(attention, "_log_position_owner", self.stack)
        else:
            for attention, position in zip(self.attentions, self.positions, strict=True):
                attention.log_position = position
        if not keep:
            self.part.remove_positions(self.stack, self.rotary_dim)
        names = tuple(inspect.signature(self.stack.forward).parameters)
        self.stack.register_forward_pre_hook(functools.partial(check_call, self.part, names), with_kwargs=True)


def _check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError unless log_attention can honour the architecture of ``model`` and its options."""
    config = model.config
    if config.model_type not in SUPPORTED:
        text = config.get_text_config().model_type
        part = (
            f" (its text part is: see the documentation of logpe.transformers on {text})" if text in SUPPORTED else ""
        )
        raise ValueError(
            f"{type(model).__name__} is of model type {config.model_type!r}, which is not supported{part}; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    for name in ("attn_logit_softcapping", "use_bidirectional_attention", "add_cross_attention"):
        for owner in (config, *model.modules()):  # layers keep what the config said when they were made
            if value := getattr(owner, name, None):
                raise ValueError(
                    f"{type(model).__name__} has {name}={value}, which is not supported: log positions need causal "
                    "self-attention with plain logits. Load it with None or False there"
                )
    causal = any(part.causal for part in ARCHITECTURES[config.model_type])
    if causal and not getattr(config, "is_causal", True):
        raise ValueError(f"{type(model).__name__} has is_causal=False, which is not supported")
    if not causal and getattr(config, "is_decoder", False):
        raise ValueError(f"{type(model).__name__} has is_decoder=True, which is not supported: it is an encoder")
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


class _HeadStyle(TensorParallelLayer):
    """Share out the positions of an attention whose heads Transformers shares out."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        from logpe.tensor_parallel import check_heads

        numbers = {name: getattr(module.config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
        check_heads(mesh, **{name: heads for name, heads in numbers.items() if heads is not None})
        getattr(module, "_log_position_owner", module).log_position.shard_heads(mesh, None)
        if hasattr(module, "log_sink"):
            module.log_sink.shard_heads(mesh, None)
        return module


@functools.cache
def _converting(model_class: Any) -> Any:
    """Return ``model_class`` with another __init__: where the config has log positions, the new model gets them.

    They must be there before weights are loaded.
    """

    def init(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        settings = getattr(config, "log_position", None)
        if settings is not None:
            check_implementation(config._attn_implementation, ValueError)
        model_class.__init__(self, config, *arguments, **options)
        self.__class__ = model_class
        if settings is None:
            return
        try:
            _install(self, settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the config has log_position={settings!r}, which does not serve: {error!r}") from error

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def register() -> None:
    """Let AutoModel and its like load converted models. They load all others as before."""
    modeling_falcon.FALCON_ATTENTION_CLASSES[IMPLEMENTATION] = modeling_falcon.FalconAttention

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


if TensorParallelLayer is not object:
    ALL_PARALLEL_STYLES.register(IMPLEMENTATION, _HeadStyle())
