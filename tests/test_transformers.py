"""Test Transformers models with log positions: conversion, caches, padding, saving, training, compilation."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import logpe
import logpe.__main__
import logpe.transformers
from logpe.files import load_tensors, save_tensors
from logpe.position import LogPosition
from logpe.transformers import attention as interface
from logpe.transformers import from_pretrained, use_log_position
from logpe.transformers.calls import PACKING_OPTIONS

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = 5
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=1),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=WINDOW),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
}
PADDING = 4


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(name: str = "llama", **options: Any) -> PreTrainedModel:
    """Return a model with weights so large that it matters which token sees which."""
    config = CONFIGS[name]()
    for key, value in options.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def left_padding(ids: Tensor) -> Tensor:
    """Return a mask that hides the first PADDING tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return mask


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality up to rounding: these logits go through some hundred float32 operations."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * max(1.0, float(expected.detach().abs().max())))


def position_of(model: PreTrainedModel) -> list[LogPosition]:
    return [module for module in model.modules() if isinstance(module, LogPosition)]


def check_a_step(model: PreTrainedModel, folder: Path, ids: Tensor, **labels: Tensor) -> None:
    """Train for a step, which reaches all positions, and load what is saved."""
    optimizer = torch.optim.AdamW(logpe.parameter_groups(model, weight_decay=0.1), lr=1e-3)
    before = model(ids, **labels).loss
    before.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in logpe.position_parameters(model))
    optimizer.step()
    with torch.no_grad():
        after = model(ids, **labels)
        assert after.loss < before
        model.save_pretrained(folder)
        close(from_pretrained(folder)(ids, **labels).logits, after.logits)


# --- conversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_own_positions_kept(name: str) -> None:
    model, ids = make(name), tokens()
    mask = left_padding(ids)
    padded = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    expected, expected_padded = model(ids).logits, model(ids, **padded).logits
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    assert use_log_position(model, "none", keep_positions=True) is model
    close(model(ids).logits, expected)
    close(model(ids, **padded).logits[mask.bool()], expected_padded[mask.bool()])
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("preset", ["log-bias", "log-bias-rope", "log-rotary"])
@torch.no_grad()
def test_against_the_definition(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted model is the model with each attention computed by the reference, from unrotated q and k."""
    model, ids = use_log_position(make(name), preset, query_gain=True), tokens()
    logits = model(ids).logits
    calls = []

    def by_the_reference(q: Tensor, k: Tensor, v: Tensor, values: Any, **options: Any) -> Tensor:
        calls.append(options)
        return logpe.log_attention(q, k, v, values, backend="reference", **options)

    monkeypatch.setattr(interface, "log_attention", by_the_reference)
    close(model(ids).logits, logits)
    windows = [call["window"] for call in calls]
    assert windows == ([(WINDOW - 1, None), None] if name == "gemma3_text" else [None, None])
    if preset == "log-rotary":
        planes = {"llama": 4, "gemma3_text": 4, "gpt2": 4, "gpt_neox": 1}[name]
        assert [position.planes for position in position_of(model)] == [planes] * 2
        bases = {"gemma3_text": [1e4, 1e6]}.get(name, [1e4, 1e4])
        assert [position.rotary_base for position in position_of(model)] == bases
    if preset == "log-bias-rope":  # whatever the model had
        head_dim = position_of(model)[0].head_dim
        rotations = [(position.rotary_base, position.planes) for position in position_of(model)]
        assert rotations == [(30.0, head_dim // 4)] * 2


def test_sinks(tmp_path: Path) -> None:
    """At first a key of score zero; trained, saved, cached and packed like all else."""
    model, ids = use_log_position(make(), query_gain=True, sink=True, share_position=True), tokens()
    assert model.config.log_position["sink"] is True
    plain = use_log_position(make(), query_gain=True, share_position=True)
    assert "sink" not in plain.config.log_position
    sinks = [module for module in model.modules() if isinstance(module, logpe.HeadSink)]
    assert len(sinks) == 2
    assert len(position_of(model)) == 1
    with torch.no_grad():
        plain.load_state_dict({n: x for n, x in model.state_dict().items() if "log_sink" not in n})
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
        for sink in sinks:
            sink.bias.fill_(-1e4)  # none
        close(model(ids).logits, plain(ids).logits)
        for sink in sinks:
            sink.bias.normal_()
            sink.key.normal_()
        logits, mask = model(ids).logits, left_padding(ids)
        close(model(ids, attention_mask=mask).logits[0, PADDING:], model(ids[:1, PADDING:]).logits[0])
        cache = model(ids[:, :6], use_cache=True).past_key_values
        steps = [model(part, past_key_values=cache).logits for part in (ids[:, 6:7], ids[:, 7:])]
        close(torch.cat(steps, 1), logits[:, 6:])
        packed = torch.tensor([[*range(5), *range(6)]])
        parts = [model(part).logits for part in ids[:1].split((5, 6), 1)]
        close(model(ids[:1], position_ids=packed).logits, torch.cat(parts, 1))
    check_a_step(model, tmp_path, ids, labels=ids)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for sink in sinks for p in sink.parameters())
    path = tmp_path / "model.safetensors"
    weights = {name: x for name, x in load_tensors(path).items() if "log_sink.key" not in name}
    save_tensors(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the position parameters .*log_sink\.key"):
        from_pretrained(tmp_path)


def test_sinks_beside_weights_of_integers() -> None:
    """As quantised models keep them."""

    class Quantised(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.scale = linear.weight.detach().abs().amax() / 127
            weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) * self.scale).T

    model = make().bfloat16()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name)))
    use_log_position(model, sink=True)
    assert {x.dtype for n, x in model.named_parameters() if "log_sink" in n} == {torch.bfloat16}
    assert model(tokens()).logits.isfinite().all()


@torch.no_grad()
def test_rotary_on_log_positions_becomes_rope() -> None:
    """rotary_scale = inf is the model's own RoPE: same base, same planes, same order of dimensions."""
    for name in ("llama", "gemma3_text", "gpt_neox"):
        model, ids = make(name), tokens()
        expected = model(ids).logits
        close(use_log_position(model, "log-rotary", rotary_scale=math.inf)(ids).logits, expected)


@torch.no_grad()
def test_positions_are_gone() -> None:
    """With preset none and nothing kept, only the causal mask knows the order."""
    for name in ("llama", "gpt2", "gpt_neox"):
        model, ids = use_log_position(make(name), "none"), tokens(1)
        swapped = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
        model.config.num_hidden_layers = 1  # a second layer would see the order through the mask
        if name == "gpt2":
            del model.transformer.h[1:]
        if name == "gpt_neox":
            del model.gpt_neox.layers[1:]
        close(model(swapped).logits[:, -1], model(ids).logits[:, -1])


def test_parameters() -> None:
    model = use_log_position(make(), "log-bias", query_gain=True, learnable=["power", "alpha"])
    names = [name for name, _ in model.named_parameters() if "log_position" in name]
    parts = ("power", "rate", "alpha")
    assert names == [f"model.layers.{i}.self_attn.log_position.raw_{part}" for i in (0, 1) for part in parts]
    assert len(list(logpe.position_parameters(model))) == 6
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    for position in position_of(model):
        assert position.raw_power.grad.abs().min() > 0
        assert position.raw_alpha.grad.abs().min() > 0
        assert position.raw_rate.grad is None
    shared = use_log_position(make(), share_position=True)
    assert [name for name, _ in shared.named_modules() if name.endswith("log_position")] == ["model.log_position"]
    shared(ids, labels=ids).loss.backward()
    assert shared.model.log_position.raw_power.grad.abs().min() > 0
    clone = copy.deepcopy(shared)
    with torch.no_grad():
        clone.model.log_position.raw_power += 1
        assert not torch.equal(clone(ids).logits, shared(ids).logits)


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_heads(head: str) -> None:
    model = getattr(transformers, head).from_config(CONFIGS["qwen3"]())
    use_log_position(model)
    output = model(tokens())
    assert (output[0] if head == "AutoModel" else output.logits).isfinite().all()


# --- what is refused ----------------------------------------------------------------------------------------


def test_unsupported_models() -> None:
    ctrl = transformers.CTRLModel(transformers.CTRLConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, dff=8))
    with pytest.raises(ValueError, match=r"CTRLModel is of model type 'ctrl'.*supported are llama, .*gpt_neox"):
        use_log_position(ctrl)
    with pytest.raises(TypeError, match=r"PreTrainedModel, got Linear"):
        use_log_position(torch.nn.Linear(2, 2))  # type: ignore[type-var]
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="must not have weights on the meta device"):
        use_log_position(offloaded)
    for name, option, value in (
        ("gemma2", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gpt2", "add_cross_attention", True),
        ("llama", "is_causal", False),
    ):
        model = make(name)
        setattr(model.config, option, value)
        with pytest.raises(ValueError, match=f"{option}={value}.* not supported"):
            use_log_position(model)
        assert not position_of(model)
    model = make("gemma2", attn_logit_softcapping=50.0)
    model.config.attn_logit_softcapping = None  # the layers have read it
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50.0.* not supported.* Load it with None"):
        use_log_position(model)


def test_converting_touches_one_model_alone() -> None:
    """Models that were made from one config object share it."""
    config, ids = CONFIGS["gemma3_text"](), tokens()
    before = config.to_dict()
    models = [AutoModelForCausalLM.from_config(config) for _ in range(3)]
    plain, first, second = models
    before, implementation = config.to_dict(), config._attn_implementation
    expected = plain(ids).logits
    use_log_position(first, "log-bias")
    with pytest.raises(ValueError, match="keep_positions must be False"):
        use_log_position(second, "log-rotary", keep_positions=True)
    use_log_position(second, "none", share_position=True)
    assert (config.to_dict(), config._attn_implementation) == (before, implementation)
    assert torch.equal(plain(ids).logits, expected)
    assert [model.config.log_position["preset"] for model in (first, second)] == ["log-bias", "none"]
    for model in (first, second, copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        held = [x for module in model.modules() for x in vars(module).values()]
        assert {id(x) for x in held if isinstance(x, transformers.PreTrainedConfig)} == {id(model.config)}
        assert type(model) is type(plain)
        assert model(ids).logits.isfinite().all()
        assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape == (2, 13)
    clone = copy.deepcopy(first)
    clone.config.log_position["preset"] = "other"
    assert first.config.log_position["preset"] == "log-bias"


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        (dict(rotary_scale=np.int64(512)), dict(rotary_scale=512.0)),
        (dict(rotary_scale=torch.tensor(512), rotary_base=np.float32(2), gain_length=Fraction(7, 2)),
         dict(rotary_scale=512.0, rotary_base=2.0, gain_length=3.5)),
        (dict(rotary_fraction=np.float64(0.5), share_position=np.True_),
         dict(rotary_fraction=0.5, share_position=True)),
        (dict(query_gain=np.True_, learnable=("rate", np.str_("power")), preset=np.str_("log-bias")),
         dict(query_gain=True, learnable=["power", "rate"], preset="log-bias")),
        (dict(learnable={"rate"}, rotary_scale=None), dict(learnable=["rate"], rotary_scale=None)),
        (dict(learnable=iter(["rate"])), dict(learnable=["rate"])),
        (dict(learnable=np.False_), dict(learnable=False)),
    ],
)  # fmt: skip
def test_options_that_are_no_plain_values_are_saved(
    options: dict[str, Any], saved: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = use_log_position(make(), **(dict(preset="log-rotary-bias") | options)), tokens()
    expected = dict(preset="log-rotary-bias", share_position=False, keep_positions=False) | saved
    assert model.config.log_position == expected
    assert {type(x) for x in model.config.log_position.values()} <= {str, bool, float, list, type(None)}
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.log_position == expected
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bad_options_leave_the_model_as_it_was() -> None:
    model, ids = make(), tokens()
    expected = model(ids).logits
    for message, options in (
        ("preset must be one of", dict(preset="albi")),
        ("keep_positions must be False with preset 'log-rotary'", dict(preset="log-rotary", keep_positions=True)),
        ("sink must be False with keep_positions", dict(preset="log-bias", keep_positions=True, sink=True)),
        ("gain_length must be positive", dict(query_gain=True, gain_length=0)),
        ("must not hold device", dict(device="cpu")),
        ("must not hold num_heads", dict(num_heads=4)),
    ):
        with pytest.raises(ValueError, match=message):
            use_log_position(model, **options)
    with pytest.raises(TypeError, match="colour"):
        use_log_position(model, colour=1)
    with pytest.raises(ValueError, match="rotary_base must be given"):
        use_log_position(make("gemma3_text"), "log-rotary", share_position=True)
    assert torch.equal(model(ids).logits, expected)
    use_log_position(model)
    with pytest.raises(ValueError, match="has log positions already"):
        use_log_position(model)


def test_masks_that_cannot_be_honoured() -> None:
    model, ids = use_log_position(make()), tokens()
    gap = torch.ones_like(ids)
    gap[1, 3:5] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens between visible ones"):
        model(ids, attention_mask=gap)
    for mask in (torch.ones(2, 1, 11, 11, dtype=torch.bool), torch.zeros(2, 1, 11, 11)):
        with pytest.raises(ValueError, match="attention_mask must be 2D"):
            model(ids, attention_mask=mask)
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match="is_causal must be True"):
        logpe.transformers.log_attention_forward(model.model.layers[0].self_attn, q, q, q, None, is_causal=False)
    with pytest.raises(ValueError, match="a mask that is not causal"):
        model(ids, is_causal=False)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask must have the batch size, 2, got 3"):
        model(ids, attention_mask=torch.ones(3, 11, dtype=torch.long))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must cover all tokens so far, 22, got shape \(2, 11\)"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="a mask that is not causal"):
        model(ids)


def heads(name: str) -> list[type[PreTrainedModel]]:
    """Return every class of an architecture that an AutoModel knows."""
    config_class = type(CONFIGS[name]())
    autos = [getattr(transformers, auto) for auto in dir(transformers) if auto.startswith("AutoModel")]
    mappings = [auto._model_mapping for auto in autos if getattr(auto, "_model_mapping", None) is not None]
    known = {mapping[config_class] for mapping in mappings if config_class in mapping}
    known = {head for head in known if getattr(head, "config_class", None) is config_class}
    return sorted(known, key=lambda head: head.__name__)


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
LENGTHS = (5, 6)


def packed_batch(ids: Tensor) -> dict[str, Any]:
    """Return what DataCollatorWithFlattening makes of two sequences, with all that it can tell."""
    rows = [{"input_ids": row.tolist()} for row in ids[0].split(LENGTHS)]
    collator = transformers.DataCollatorWithFlattening
    batch = collator(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert torch.equal(batch["position_ids"], PACKED)
    assert set(PACKING_OPTIONS) < batch.keys()
    return dict(batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those of the separate sequences, however a batch says that it is packed."""
    ids, ones = tokens(1), torch.ones(1, 11, dtype=torch.long)
    no_dropout = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # of GPT-2
    model = use_log_position(make(name, **no_dropout), "log-rotary-bias", query_gain=True).train()
    own = model.loss_function
    batch = packed_batch(ids)
    labels = batch.pop("labels")
    parts = ids.split(LENGTHS, 1)
    losses = [own(model(part).logits, part, VOCABULARY, num_items_in_batch=9) for part in parts]
    expected_loss = sum(losses)
    expected_loss.backward()
    expected_gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    expected = torch.cat([model(part).logits for part in parts], 1).detach()
    # log_attention never sees what belongs to log_attention_varlen.
    monkeypatch.setattr(interface, "log_attention", None)
    told = {key: batch[key] for key in PACKING_OPTIONS}
    flash = {key: x for key, x in told.items() if key != "seq_idx"}
    ways = [dict(position_ids=PACKED), dict(position_ids=PACKED + 7), dict(position_ids=PACKED, attention_mask=ones)]
    ways += [flash, dict(cu_seq_lens_q=told["cu_seq_lens_q"]), dict(seq_idx=told["seq_idx"])]
    ways += [dict(batch, input_ids=None, inputs_embeds=model.get_input_embeddings()(ids).detach())]
    for way in ways:
        model.zero_grad()
        output = model(**{"input_ids": ids, **way}, labels=labels, num_items_in_batch=9)
        close(output.logits, expected)
        close(output.loss, expected_loss)
        assert output.past_key_values is None
    model.gradient_checkpointing_enable()
    model(ids, position_ids=PACKED, labels=labels, num_items_in_batch=9).loss.backward()
    for key, x in expected_gradients.items():
        close(model.get_parameter(key).grad, x)
    # What happens in one sequence does not reach the other, bit by bit.
    other = torch.cat([tokens(1, 5), parts[1]], 1)
    with torch.no_grad():
        both = [model.eval()(x, position_ids=PACKED).logits for x in (ids, other)]
    assert torch.equal(both[0][:, 5:], both[1][:, 5:])
    assert not torch.equal(both[0][:, :5], both[1][:, :5])


@torch.no_grad()
def test_packed_rows() -> None:
    """Rows of a batch may be packed differently, begin anywhere, and end in padding."""
    model, ids = use_log_position(make("mistral"), "log-rotary-bias"), tokens(3)
    position_ids = torch.stack([PACKED[0], torch.arange(11), torch.tensor([3, 4, 5, 0, 0, 1, 2, 3, 4, 1, 1])])
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    parts = [(0, 0, 5), (0, 5, 11), (1, 0, 11), (2, 0, 3), (2, 3, 4), (2, 4, 9)]
    logits = model(ids, position_ids=position_ids, attention_mask=mask).logits
    for row, first, end in parts:
        close(logits[row, first:end], model(ids[row : row + 1, first:end]).logits[0])


def test_packed_sequences_that_are_refused() -> None:
    ids, ones = tokens(1), torch.ones(1, 11, dtype=torch.long)
    model = use_log_position(make())
    told = packed_batch(ids)
    refusals: list[tuple[dict[str, Any], str]] = [
        (dict(attention_mask=PACKED.lt(5).long() + 1), "attention_mask must hold 0 and 1. Tell packed sequences by"),
        (dict(cu_seq_lens_k=told["cu_seq_lens_k"]), "cu_seq_lens_q must be given with cu_seq_lens_k"),
        (dict(max_length_q=6), "cu_seq_lens_q must be given with max_length_q"),
        (dict(cu_seq_lens_q=told["cu_seq_lens_q"], cu_seq_lens_k=torch.tensor([0, 11])), "must have the shape"),
        (dict(cu_seq_lens_q=told["cu_seq_lens_q"], cu_seq_lens_k=told["cu_seq_lens_k"] + 1), "cu_seq_lens_k must be"),
        (dict(cu_seq_lens_q=told["cu_seq_lens_q"], max_length_q=3), "max_seqlen_q"),
        (dict(cu_seq_lens_q=torch.tensor([0, 5, 12])), "cu_seqlens_q"),
        (dict(cu_seq_lens_q=told["cu_seq_lens_q"], attention_mask=ones.tril(-1)), "attention_mask must hide nothing"),
        (dict(position_ids=PACKED, use_cache=True), "use_cache must be None or False with packed sequences"),
        (dict(position_ids=PACKED, past_key_values=transformers.DynamicCache()), "past_key_values must be None"),
    ]
    for options, message in refusals:
        with pytest.raises(ValueError, match=message):
            model(ids, **options)
    written: dict[str, Any] = dict(max_new_tokens=2, min_new_tokens=2)
    for cache in (dict(), dict(cache_implementation="static")):
        with pytest.raises(ValueError, match="must be None or False with packed sequences"):
            generate(model, ids, ones, position_ids=PACKED, **written, **cache)
    # Without a cache, the last sequence goes on.
    alone = generate(model, ids[:, 5:], ones[:, 5:], **written).sequences[:, 6:]
    written |= dict(position_ids=PACKED, use_cache=False)
    assert torch.equal(generate(model, ids, ones, **written).sequences[:, 11:], alone)
    for options in (dict(position_ids=PACKED), dict(cu_seq_lens_q=told["cu_seq_lens_q"])):  # past all hooks
        with pytest.raises(ValueError, match="position_ids hold packed sequences: call the whole model"):
            model.model.forward(input_ids=ids, **options)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_position_ids_that_are_not_packed(name: str) -> None:
    """position_ids may have an offset, and any value at padding, with every type of mask and cache."""
    model, ids = use_log_position(make(name), "log-rotary-bias"), tokens()
    mask = left_padding(ids)
    expected, expected_padded = model(ids).logits, model(ids, attention_mask=mask).logits
    for start in (0, 5):
        positions = torch.arange(start, start + 11)[None]
        for given in (positions, positions.expand(2, -1)):
            for options in (dict(), dict(attention_mask=torch.ones_like(ids)), dict(use_cache=False)):
                close(model(ids, position_ids=given, **options).logits, expected)
    close(model.lm_head(model.base_model.forward(ids, position_ids=positions)[0]), expected)
    count = mask.cumsum(-1) - 1
    right = mask.flip(1)
    for fill in (0, 1, 99):
        for padding_mask in (mask, mask.bool(), mask.float()):
            logits = model(ids, attention_mask=padding_mask, position_ids=count.masked_fill(mask == 0, fill)).logits
            close(logits[mask.bool()], expected_padded[mask.bool()])
        model(ids, attention_mask=right, position_ids=(right.cumsum(-1) - 1).masked_fill(right == 0, fill))
    for cache in (
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=16),
    ):
        logits = [
            model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=count.masked_fill(mask == 0, 1)[:, start:end],
                past_key_values=cache,
            ).logits
            for start, end in ((0, 6), (6, 7), (7, 11))
        ]
        close(torch.cat(logits, 1)[mask.bool()], expected_padded[mask.bool()])
        cache.reset()
        options = dict(attention_mask=mask, position_ids=count.clamp(min=0)[:, :6], past_key_values=cache)
        logits = model(ids[:, :6], **options).logits  # a mask that covers what is to come
        close(logits[mask[:, :6].bool()], expected_padded[:, :6][mask[:, :6].bool()])


class Looks(torch.overrides.TorchFunctionMode):
    """Count what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_a_forward_waits_for_the_gpu_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, nothing looks at position_ids."""
    monkeypatch.setattr(interface, "log_attention", lambda q, *_, **options: q)  # on a CPU it looks at starts
    model, ids = use_log_position(make(name)), tokens()
    model.config.use_cache = False
    positions = torch.arange(11)[None]
    for expected, options in (
        (0, dict(use_cache=True)),
        (1, dict(position_ids=positions)),
        (1, dict(position_ids=positions, use_cache=True)),
        (1, dict(attention_mask=torch.ones_like(ids))),
        (1, dict(attention_mask=left_padding(ids))),
        (1, dict(attention_mask=left_padding(ids).bool(), position_ids=positions)),
    ):
        with Looks() as looks:
            model(ids, **options)
        assert looks.count == expected, options
    cache = model(ids, use_cache=True).past_key_values
    with Looks() as looks:
        model(ids[:, :1], position_ids=positions[:, :1] + 11, past_key_values=cache)
    assert looks.count == 0


def test_another_attention_is_refused() -> None:
    model = copy.deepcopy(use_log_position(make()))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=f"attn_implementation must be .* got '{implementation}'"):
            model(tokens())
    model.set_attn_implementation("logpe")
    model(tokens())


# --- padding and caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("preset", ["log-bias", "log-rotary-bias"])
@torch.no_grad()
def test_padding(name: str, preset: str) -> None:
    """A padded row gives what the row alone gives; positions count from the first real token."""
    model, ids = use_log_position(make(name), preset, query_gain=True), tokens()
    left, right = left_padding(ids), left_padding(ids).flip(1)
    alone, whole = model(ids[:1, PADDING:]).logits[0], model(ids).logits
    padded = model(ids, attention_mask=left).logits
    close(padded[0, PADDING:], alone)
    close(padded[1], whole[1])
    close(model(ids, attention_mask=right).logits[0, :-PADDING], model(ids[:1, :-PADDING]).logits[0])
    both = left * right
    close(model(ids, attention_mask=both).logits[0, PADDING:-PADDING], model(ids[:1, PADDING:-PADDING]).logits[0])
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, whole)


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
@torch.no_grad()
def test_kernels(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton gives the same: padding, a window, a static cache with room left, one token and many."""
    pytest.importorskip("triton")
    model, ids = use_log_position(make(name), "log-rotary-bias", query_gain=True), tokens()
    mask = left_padding(ids)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    monkeypatch.setattr(interface, "log_attention", functools.partial(logpe.log_attention, backend="triton"))
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    logits = [
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits.cpu()
        for start, end in ((0, 9), (9, 10), (10, 11))
    ]
    close(torch.cat(logits, 1)[mask.bool().cpu()], expected)


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = dict(max_new_tokens=10, min_new_tokens=10, return_dict_in_generate=True, output_logits=True)
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **(settings | options))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_caches(name: str) -> None:
    """Every cache gives the tokens and logits of no cache: padded, and longer than the sliding window."""
    preset = ("log-bias", "log-rotary-bias")[list(CONFIGS).index(name) % 2]
    model, ids = use_log_position(make(name), preset, query_gain=True), tokens()
    mask = left_padding(ids)
    for mode in (dict(do_sample=False), dict(do_sample=True, top_p=0.9), dict(do_sample=False, num_beams=2)):
        expected = generate(model, ids, mask, use_cache=False, **mode)
        for cache in (dict(), dict(cache_implementation="static")):
            actual = generate(model, ids, mask, **cache, **mode)
            assert torch.equal(actual.sequences, expected.sequences)
            for a, b in zip(actual.logits, expected.logits, strict=True):
                close(a, b)
    alone = generate(model, ids[:1, PADDING:], None, do_sample=False).sequences[0]
    padded = generate(model, ids, mask, do_sample=False).sequences[0]
    assert torch.equal(alone, padded[PADDING:])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_assisted_generation(name: str) -> None:
    """Drafts give the tokens of greedy decoding; the cache drops their rejected ends."""
    model = use_log_position(make(name), "log-rotary-bias", query_gain=True)
    ids = torch.randint(3, VOCABULARY, (1, 4)).repeat(1, 4)  # a prompt whose pieces come again
    # Transformers gives an assistant no mask, and hides from it whatever looks like padding.
    options = dict(do_sample=False, max_new_tokens=24, suppress_tokens=[0])
    for mask in (None, left_padding(ids)):
        expected = generate(model, ids, mask, **options).sequences
        assistant = use_log_position(make(name), "log-bias")
        near = copy.deepcopy(model)  # an assistant whose drafts are accepted, mostly
        near.lm_head.weight.add_(0.01 * torch.randn_like(near.lm_head.weight))
        for draft in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=assistant), dict(assistant_model=near)):
            actual = generate(model, ids, mask, **options, **draft).sequences
            assert torch.equal(actual, expected), draft


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_cache_by_hand(name: str) -> None:
    """Chunks of many tokens meet a cache that holds some already, or a static cache with room left."""
    model, ids = use_log_position(make(name), "log-rotary-bias", query_gain=True), tokens(2, 17)
    mask = left_padding(ids)
    expected = model(ids, attention_mask=mask).logits
    for masked in (True, False):
        if not masked:
            expected = model(ids).logits
        for cache in (
            transformers.DynamicCache(config=model.config),
            transformers.StaticCache(config=model.config, max_cache_len=23),
        ):
            start = 0
            for end in (6, 7, 12, 17):
                logits = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end] if masked else None,
                    past_key_values=cache,
                ).logits
                shown = mask[:, start:end].bool() if masked else torch.ones(2, end - start, dtype=torch.bool)
                close(logits[shown], expected[:, start:end][shown])
                start = end


# --- saving and loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", dict(preset="log-bias", learnable=["power"], query_gain=True, gain_length=64)),
        ("llama", dict(preset="log-rotary", rotary_scale=math.inf, rotary_fraction=0.5)),
        ("gemma3_text", dict(preset="log-rotary-bias", rotary_scale=16.0)),
        ("gemma3_text", dict(preset="log-bias-rope", share_position=True)),
        ("gpt_neox", dict(preset="log-bias-rope", rotary_base=20.0)),
        ("gpt2", dict(preset="log-invariant", share_position=True)),
        ("gpt2", dict(preset="none", keep_positions=True)),
    ],
)
@torch.no_grad()
def test_round_trip(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = use_log_position(make(name), **options), tokens()
    for parameter in logpe.position_parameters(model):
        parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for mine, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad
        assert getattr(mine, "_no_weight_decay", False) == getattr(theirs, "_no_weight_decay", False)
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again", dtype=torch.bfloat16, device_map={"": "cpu"})
    assert again.config.log_position == model.config.log_position
    for mine, theirs in zip(logpe.position_parameters(again), logpe.position_parameters(model), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == torch.float32
    assert again.dtype == torch.bfloat16
    error = (again(ids).logits - model(ids).logits).abs().max()
    assert error < 0.3 * model(ids).logits.abs().max()


def test_loading_without_positions_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use_log_position(make())
    model.save_pretrained(tmp_path / "converted")
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a llama model without log positions"):
        from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="attn_implementation must be"):
        from_pretrained(tmp_path / "converted", attn_implementation="sdpa")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no config.json"):
        from_pretrained(tmp_path / "empty")
    for architectures in (None, [], {}, [3], ["MyLlama"], ["pipeline"], ["LlamaConfig"], "LlamaForCausalLM"):
        config = json.loads((tmp_path / "converted" / "config.json").read_text()) | dict(architectures=architectures)
        (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"architectures in the config of .* must name a model class of Trans"):
            from_pretrained(tmp_path / "empty")
    # The plain class, with logpe imported: no silent attention without positions.
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    with pytest.raises(RuntimeError, match=r"load it with logpe.transformers.from_pretrained"):
        loaded(tokens())
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["attn_implementation"] == "logpe"
    with monkeypatch.context() as without_logpe:
        without_logpe.delitem(transformers.AttentionInterface._global_mapping, "logpe")
        with pytest.raises(ValueError, match=r'attn_implementation="logpe"` is not supported'):
            AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    # A checkpoint that lacks a position is not drawn anew.
    state = model.state_dict()
    del state["model.layers.1.self_attn.log_position.raw_rate"]
    model.save_pretrained(tmp_path / "converted", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks the position parameters model\.layers\.1\.self_attn.*raw_rate"):
        from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        model.model.layers[0].self_attn.log_position.raw_power[2] = math.nan
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="raw_power holds nan for head 2"):
        from_pretrained(tmp_path / "converted")


AUTO = {
    "AutoModel": ("", dict()),
    "AutoModelForCausalLM": ("", dict()),
    "AutoModelForSequenceClassification": ("score.", dict(num_labels=3)),
    "AutoModelForTokenClassification": ("score.", dict(num_labels=3)),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_auto_models(name: str, tmp_path: Path) -> None:
    """Each AutoModel loads a converted language model as it was saved; another head is new, positions are kept."""
    share, plain, ids = bool(list(CONFIGS).index(name) % 2), make(name), tokens()
    plain.save_pretrained(tmp_path / "plain")
    model = use_log_position(plain, share_position=share, learnable=["power"])
    for parameter in logpe.position_parameters(model):
        parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "converted")
    hidden = model.base_model(ids)[0]
    for auto, (new, options) in AUTO.items():
        loader = getattr(transformers, auto)
        options = options | (dict(pad_token_id=0) if new else {})
        if type(model.config) not in loader._model_mapping:
            continue
        loaded, info = loader.from_pretrained(tmp_path / "converted", output_loading_info=True, **options)
        assert type(loaded).__module__.startswith("transformers.models.")
        assert getattr(transformers, type(loaded).__name__) is type(loaded)
        assert not loaded.training
        assert torch.equal(loaded.base_model(ids)[0], hidden)
        assert all(new and name.startswith((new, "classifier.")) for name in info["missing_keys"])
        assert loaded.config.log_position == model.config.log_position
        if not new and auto != "AutoModel":
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        frozen = [parameter.requires_grad for parameter in logpe.position_parameters(loaded)]
        assert frozen == [parameter.requires_grad for parameter in logpe.position_parameters(model)]
        with pytest.raises(ValueError, match="attn_implementation must be"):
            loader.from_pretrained(tmp_path / "converted", attn_implementation="sdpa", **options)
        if new:  # a classifier is saved and loaded in turn
            loaded.save_pretrained(tmp_path / auto)
            again = loader.from_pretrained(tmp_path / auto)
            assert torch.equal(again(ids).logits, loaded(ids).logits)
            assert torch.equal(from_pretrained(tmp_path / auto)(ids).logits, loaded(ids).logits)
        ordinary = loader.from_pretrained(tmp_path / "plain", attn_implementation="eager", **options)
        assert type(ordinary) is type(loaded)
        assert ordinary.config._attn_implementation == "eager"
        assert not position_of(ordinary)
        assert type(loader.from_config(CONFIGS[name]())) is type(loaded)
    base = transformers.AutoModel.from_pretrained(tmp_path / "converted")
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "base").base_model(ids)[0], hidden)


@torch.no_grad()
def test_other_ways_to_a_converted_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model, ids = use_log_position(make("qwen3")), tokens()
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert type(fresh) is type(model)
    assert len(position_of(fresh)) == 2
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert len(position_of(AutoModelForCausalLM.from_config(model.config))) == 2
    with pytest.raises(ValueError, match="attn_implementation must be"):
        AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", pad_token="t0")
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    text = pipe("t5 t7", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    row = model.generate(torch.tensor([[5, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:]
    assert text.split() == [f"t{i}" for i in row.tolist() if i != 0]  # t0 is special: not printed


@pytest.mark.parametrize("how", ["float32", "bfloat16", "auto", "device_map", "default dtype", "empty"])
@torch.no_grad()
def test_a_loaded_model_is_the_saved_one(how: str, tmp_path: Path) -> None:
    """Whatever way its memory is allocated, the bits are the same."""
    ids = tokens()
    for name, preset in (("llama", "log-bias-rope"), ("gemma3_text", "log-rotary-bias"), ("gpt2", "log-rotary")):
        model = use_log_position(make(name), preset, query_gain=True)
        options: dict[str, Any] = {}
        if how in ("bfloat16", "auto", "default dtype"):
            model = model.to(torch.bfloat16)
            model.config.dtype = torch.bfloat16
            options = {"default dtype": {}, "auto": dict(dtype="auto")}.get(how, dict(dtype=torch.bfloat16))
        if how == "device_map":
            pytest.importorskip("accelerate")
            options = dict(device_map="cpu")
        model.save_pretrained(tmp_path / name)
        for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16 if how == "default dtype" else default)
            try:
                if how == "empty":
                    accelerate = pytest.importorskip("accelerate")
                    config = transformers.AutoConfig.from_pretrained(tmp_path / name)
                    with accelerate.init_empty_weights():
                        empty = AutoModelForCausalLM.from_config(config)
                    empty.tie_weights()
                    loaded = accelerate.load_checkpoint_and_dispatch(empty.eval(), tmp_path / name, {"": "cpu"})
                else:
                    loaded = load(tmp_path / name, **options)
            finally:
                torch.set_default_dtype(default)
            assert torch.equal(loaded(ids).logits, model(ids).logits)
            assert all(parameter.dtype == torch.float32 for parameter in logpe.position_parameters(loaded))


def test_hostile_folders(tmp_path: Path) -> None:
    """No code from a folder is run, and odd settings are refused by name."""
    model = use_log_position(make())
    model.save_pretrained(tmp_path)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for file in ("evil.py", "custom_generate/generate.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config["auto_map"] = {auto: f"evil.{name}" for auto, name in zip(autos, ("C", "M", "M"), strict=True)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert len(position_of(load(tmp_path))) == 2
    with pytest.raises(ValueError, match="trust_remote_code must be False"):
        from_pretrained(tmp_path, trust_remote_code=True)
    good = config["log_position"]
    changes = (dict(rotary_scale="x"), dict(learnable=3), dict(colour=1), dict(preset=["log-bias"]), dict(device="cpu"))
    for odd in ("log-bias", [1], {}, *(good | change for change in changes)):
        (tmp_path / "config.json").write_text(json.dumps(config | dict(log_position=odd)))
        for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=r"the config has log_position=.*, which does not serve"):
                load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle
    with pytest.raises(OSError, match="safetensors"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- training -----------------------------------------------------------------------------------------------


def test_gradient_checkpointing() -> None:
    model, ids = use_log_position(make(), "log-rotary-bias", query_gain=True).train(), tokens()
    batch = dict(input_ids=ids, attention_mask=left_padding(ids), labels=ids, use_cache=False)
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_served_in_other_ways(tmp_path: Path) -> None:
    """Prompt lookup, chunked prefill, quantised weights, a layer on disk, torch.export."""
    model, ids = use_log_position(make()), tokens(1)
    expected = generate(model, ids, None).sequences
    for options in (dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=4)):
        assert torch.equal(generate(model, ids, None, **options).sequences, expected)
    logits = model(ids).logits
    exported = torch.export.export(model, (ids,), dict(use_cache=False), strict=False).module()
    close(exported(ids, use_cache=False).logits, logits)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.1"] = "disk"
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    close(offloaded(ids).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its successor is another package
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert {parameter.dtype for parameter in logpe.position_parameters(quantised)} == {torch.float32}
    assert (quantised(ids).logits - logits).abs().max() < 0.3 * logits.abs().max()


@pytest.mark.parametrize("packed", [False, True])
def test_trainer(packed: bool, tmp_path: Path) -> None:
    """Packed, in bfloat16; as it is, in float32."""
    pytest.importorskip("accelerate")
    model = use_log_position(make(attention_dropout=0.1))
    before = [parameter.detach().clone() for parameter in logpe.position_parameters(model)]
    rows: list[dict[str, Any]] = [{"input_ids": row, "labels": row} for row in tokens(8)]
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt") if packed else None
    if packed:
        rows = [{"input_ids": row["input_ids"][: 4 + n].tolist()} for n, row in enumerate(rows)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        bf16=packed,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=4,
    )
    optimizer = torch.optim.AdamW(logpe.parameter_groups(model, weight_decay=0.1), lr=1e-2)
    data = dict(train_dataset=rows, data_collator=collator)
    trainer = transformers.Trainer(model, arguments, **data, optimizers=(optimizer, None))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert math.isfinite(trainer.train().training_loss), losses
    for parameter, start in zip(logpe.position_parameters(model), before, strict=True):
        assert (parameter.cpu() - start).abs().min() > 0
    loaded = from_pretrained(tmp_path / "checkpoint-4")
    for mine, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.cpu(), theirs.cpu())


def test_bfloat16() -> None:
    model, ids = use_log_position(make(), "log-rotary-bias").to(torch.bfloat16), tokens()
    assert all(parameter.dtype == torch.float32 for parameter in logpe.position_parameters(model))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("share", [False, True])
def test_peft(share: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, ids = use_log_position(make(), share_position=share), tokens()
    start = copy.deepcopy(base)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["log_position"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    before = model(ids).logits.detach()
    model(ids, labels=ids).loss.backward()
    trained = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(trained) == (2 if share else 4)
    assert all(parameter.grad.abs().min() > 0 for parameter in trained)
    optimizer.step()
    model.eval()
    assert not torch.allclose(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(start, tmp_path).eval()
    close(loaded(ids).logits, model(ids).logits)


# --- a model that knows something ---------------------------------------------------------------------------

LENGTH = 64


@functools.cache
def text() -> bytes:
    topics = pytest.importorskip("pydoc_data.topics").topics  # English about Python; some distributions ship it apart
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def windows(count: int, held_out: bool, generator: torch.Generator) -> Tensor:
    """Return (count, LENGTH) tokens from the first tenth of the text, which is held out, or from the rest."""
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    data = data[: len(data) // 10] if held_out else data[len(data) // 10 :]
    start = torch.randint(len(data) - LENGTH, (count,), generator=generator)
    return data[start[:, None] + torch.arange(LENGTH)]


@torch.no_grad()
def evaluate(model: PreTrainedModel) -> float:
    """Return the loss in nats per byte on held-out windows."""
    ids = windows(64, True, torch.Generator().manual_seed(2))
    return float(model.eval()(ids, labels=ids).loss)


def train(model: PreTrainedModel, groups: list[dict[str, Any]], steps: int) -> float:
    """Train by the usual recipe of warm-up, cosine and clipping, and return what :func:`evaluate` does."""
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        ids = windows(16, False, generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return evaluate(model)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Train a model with RoPE, convert it, train on; return its folder, and the loss after each of the three."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config)
        losses = [train(model, [{"params": model.parameters(), "lr": 5e-3}], 500)]
        use_log_position(model, "log-rotary-bias", rotary_scale=LENGTH)
        losses.append(evaluate(model))
        groups = logpe.parameter_groups(model, weight_decay=0.1)
        groups[0]["lr"], groups[1]["lr"] = 5e-3 / 3, 1e-2
        losses.append(train(model, groups, 100))
    folder = tmp_path_factory.mktemp("continued")
    model.save_pretrained(folder)
    return folder, losses


def test_continued_training_recovers(continued: tuple[Path, list[float]]) -> None:
    trained, converted, recovered = continued[1]
    assert trained < 1.8  # nats per byte; single bytes have 3.2
    assert converted > trained + 0.1
    assert recovered - trained < 0.25 * (converted - trained)


@torch.no_grad()
def test_generated_text(continued: tuple[Path, list[float]]) -> None:
    """Far beyond the training length, generated text is like the data, and the same with every cache."""
    model = from_pretrained(continued[0])
    ids = torch.tensor([list(b"The following "), list(b"A string that ")])
    runs = [
        generate(model, ids, None, max_new_tokens=2 * LENGTH, do_sample=True, temperature=0.5, **cache)
        for cache in (dict(use_cache=False), dict(), dict(cache_implementation="static"))
    ]
    for run in runs[1:]:
        assert torch.equal(run.sequences, runs[0].sequences)
    pieces = {text()[i : i + 4] for i in range(len(text()) - 3)}
    for row in runs[0].sequences[:, ids.shape[1] :].tolist():
        known = [bytes(row[i : i + 4]) in pieces for i in range(len(row) - 3)]
        assert sum(known) > 0.75 * len(known), bytes(row)


def command(*arguments: str) -> int:
    return logpe.__main__.main(["generate", *arguments])


def test_command(continued: tuple[Path, list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", str(continued[0]), "--device", "cpu", "--prompt", "The following ")
    outputs = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        assert command(*common, "--max-new-tokens", "20", "--top-p", "0.9", *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert all(out.startswith("The following ") for out in outputs)
    ids = torch.tensor([list(b"The following ")])
    row = from_pretrained(continued[0]).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)[0]
    assert outputs[3] == bytes(row.tolist()).decode(errors="replace") + "\n"


def test_command_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = use_log_position(make())
    model.save_pretrained(tmp_path)
    assert command("--model", str(tmp_path), "--device", "cpu", "--prompt", "t5") == 2
    assert "holds no tokenizer, and a vocabulary of 97" in capsys.readouterr().err
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0").save_pretrained(tmp_path)
    options = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "5")
    assert command("--model", str(tmp_path), "--prompt", "t5 t7", *options) == 0
    ids = torch.tensor([[5, 7]])
    row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0)[0]
    assert capsys.readouterr().out.split() == [f"t{i}" for i in row.tolist() if i != 0]  # t0 is special: not printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "nowhere is not a folder with a config.json"),
        (["--model", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--model", "x", "--seed", "-1"], "--seed must be from 0 to 2**63 - 1, got -1"),
    ],
)
def test_command_refuses(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("--prompt", "x", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("how", ["Ctrl-C", "closed pipe"])
def test_command_stopped_midway(how: str, continued: tuple[Path, list[float]]) -> None:
    command = [sys.executable, "-m", "logpe", "generate", "--model", str(continued[0]), "--device", "cpu"]
    command += ["--prompt", "The following ", "--max-new-tokens", "100000"]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.read(20).startswith(b"The following ")
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=60) == {"Ctrl-C": 130, "closed pipe": 1}[how]


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def recompile_freely() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield


def test_compiled_training() -> None:
    """One graph serves all lengths, forward and backward, without a break; packed sequences must be told."""
    torch._dynamo.reset()
    model = use_log_position(make(num_hidden_layers=1), "log-rotary-bias", query_gain=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 14, 18):
        ids, position_ids, results = tokens(2, length), torch.arange(length)[None], []
        for run in (compiled, model):
            model.zero_grad()
            output = run(ids, labels=ids, position_ids=position_ids, use_cache=False)
            output.loss.backward()
            results.append([output.logits.detach(), *(parameter.grad for parameter in model.parameters())])
        for actual, expected in zip(*results, strict=True):
            close(actual, expected)
        torch._dynamo.config.error_on_recompile = True
    model.zero_grad()
    with pytest.raises((RuntimeError, ValueError), match="tell a traced model of packed sequences by cu_seq_lens_q"):
        compiled(ids, labels=ids, position_ids=(torch.arange(18) % 10)[None], use_cache=False)


@torch.no_grad()
def test_compiled_packed() -> None:
    """One graph serves packed sequences of any number and length."""
    torch._dynamo.reset()
    model = use_log_position(make(num_hidden_layers=1), "log-rotary-bias")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for lengths in ((5, 6), (3, 3, 6), (7, 2, 2, 5)):
        ids, cu_seqlens = tokens(1, sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
        options = dict(cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths), use_cache=False)
        options["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        parts = [model(part).logits for part in ids.split(lengths, 1)]
        close(compiled(ids, **options).logits, torch.cat(parts, 1))
        torch._dynamo.config.error_on_recompile = True


@torch.no_grad()
def test_compiled_with_padding() -> None:
    """A compiled model asserts what an eager one checks about masks."""
    torch._dynamo.reset()
    model = use_log_position(make("gemma3_text"), "log-bias")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 18):
        ids = tokens(2, length)
        batch = dict(input_ids=ids, attention_mask=left_padding(ids), use_cache=False)
        shown = batch["attention_mask"].bool()
        close(compiled(**batch).logits[shown], model(**batch).logits[shown])
        torch._dynamo.config.error_on_recompile = True
    batch["attention_mask"][0, 6:9] = 0
    with pytest.raises((RuntimeError, ValueError), match="hides tokens between visible ones"):
        compiled(**batch)


def test_compiled_generation() -> None:
    """Each decode step on a static cache is one graph, the same for all steps, as generate does itself on a GPU."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = use_log_position(make(num_hidden_layers=1), "log-rotary-bias", query_gain=True), tokens()
    expected = generate(model, ids, left_padding(ids), do_sample=False)
    settings = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True
    torch._dynamo.config.error_on_recompile = True
    options = dict(cache_implementation="static", compile_config=settings)
    actual = generate(model, ids, left_padding(ids), do_sample=False, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(actual.sequences, expected.sequences)
