"""Test that every supported type of decoder converts: its own positions go, and what is asked in two ways agrees."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from test_transformers import CONFIGS, SIZES, WINDOW, check_a_step, close, left_padding, tokens
from test_transformers_encoders import ENCODERS
from test_transformers_seq2seq import SEQ2SEQ
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.falcon import modeling_falcon

import logpe
from logpe.position import alibi_slopes, inverse_softplus
from logpe.transformers import SUPPORTED, use_log_position
from logpe.transformers.architectures import ARCHITECTURES

EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
HEAD_DIM = dict(head_dim=8)
#: What each type needs beside small sizes.
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=16),
    "qwen3_moe": EXPERTS | HEAD_DIM,
    "granitemoe": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "phi": {},
    "phi3": {},  # one projection for q, k and v
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(attention_multiplier=0.3),
    "glm": HEAD_DIM,  # half of each head turns
    "glm4": HEAD_DIM,
    "cohere": {},
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "ernie4_5": HEAD_DIM,
    "seed_oss": HEAD_DIM,
    "hunyuan_v1_dense": HEAD_DIM,
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "helium": HEAD_DIM,
    "arcee": {},
    "apertus": {},
    "persimmon": {},
    "gpt_oss": EXPERTS | HEAD_DIM | SLIDING,  # attention sinks
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, activation_function="gelu"),  # ReLU hides differences
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, attn_config=dict(clip_qkv=3.0)),
    "falcon": dict(alibi=True, bias=True),
    "gpt_bigcode": dict(n_embd=32, n_head=4, n_layer=2, n_inner=48, n_positions=128),
}
#: Types whose own positions are ALiBi.
ALIBI = ("bloom", "mpt", "falcon")


def make(name: str, layers: int = 2) -> PreTrainedModel:
    """Return a model with weights so large that it matters which token sees which."""
    config = AutoConfig.for_model(name, **(SIZES | dict(num_key_value_heads=2) | OTHERS[name]))
    for key in ("attention_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    if layers == 1:
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-1:]
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_every_supported_model_is_tested() -> None:
    assert sorted([*CONFIGS, *OTHERS, *ENCODERS, *SEQ2SEQ]) == sorted(SUPPORTED)


@pytest.mark.parametrize("name", OTHERS)
def test_decoder(name: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plain, ids = make(name), tokens()
    with torch.no_grad():
        expected = plain(ids).logits
        same = dict(preset="alibi") if name in ALIBI else dict(preset="none", keep_positions=True)
        kept = use_log_position(pickle.loads(pickle.dumps(plain)), **same)
        close(pickle.loads(pickle.dumps(kept))(ids).logits, expected)
        # Without positions, one layer sees the tokens before the last one as a set.
        alone = use_log_position(make(name, layers=1), "none")
        mixed = torch.cat([ids[:, :10].flip(1), ids[:, 10:]], 1)
        close(alone(mixed).logits[:, -1], alone(ids).logits[:, -1])

    model = use_log_position(copy.deepcopy(plain), "log-bias-rope", sink=name != "gpt_oss")  # which has its own
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, logpe.HeadSink):
                module.key.normal_()
                module.bias.normal_()
        logits = model(ids).logits
        assert (logits - expected).abs().max() > 1e-3 * expected.abs().max()
        mask = left_padding(ids)
        close(model(ids, attention_mask=mask).logits[0, 4:], model(ids[:1, 4:]).logits[0])
        cache = model(ids[:, :6], use_cache=True).past_key_values
        steps = [model(part, past_key_values=cache).logits for part in (ids[:, 6:7], ids[:, 7:])]
        close(torch.cat(steps, 1), logits[:, 6:])
        packed = torch.tensor([[*range(5), *range(6)]])
        if ARCHITECTURES[name][0].packs:
            parts = [model(part).logits for part in ids[:1].split((5, 6), 1)]
            close(model(ids[:1], position_ids=packed).logits, torch.cat(parts, 1))
        else:
            for options in (dict(position_ids=packed), dict(cu_seq_lens_q=torch.tensor([0, 5, 11]))):
                with pytest.raises(ValueError, match="packed sequences are not supported for model type"):
                    model(ids[:1], **options)

    check_a_step(model, tmp_path, ids, labels=ids)


@torch.no_grad()
def test_the_text_part_of_a_model_that_sees() -> None:
    """As documented."""
    sees = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    given = dict(text_config=SIZES | HEAD_DIM, vision_config=sees | dict(patch_size=4), mm_tokens_per_image=1)
    model: Any = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**given)).eval()
    with pytest.raises(ValueError, match=r"'gemma3', .* \(its text part is: see .* on gemma3_text\)"):
        use_log_position(model)
    text: Any = transformers.Gemma3ForCausalLM(model.config.text_config).eval()
    text.model, text.lm_head = model.model.language_model, model.lm_head
    ids = tokens()
    close(use_log_position(text, "none", keep_positions=True)(ids).logits, model(ids).logits)


FALCONS: list[dict[str, Any]] = [
    {},  # one head of keys, and a rotation
    dict(multi_query=False, parallel_attn=False, alibi=True),
    dict(new_decoder_architecture=True, num_kv_heads=2),
]


@pytest.mark.parametrize(("name", "options"), [*(("falcon", options) for options in FALCONS), ("mpt", {})])
@torch.no_grad()
def test_models_that_compute_with_the_mask(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches and generated tokens are those of the model before."""
    monkeypatch.setitem(OTHERS, name, options if name == "falcon" else OTHERS[name])
    plain, ids = make(name), tokens()
    own = dict(preset="alibi") if name == "mpt" or "alibi" in options else dict(preset="none", keep_positions=True)
    model = use_log_position(copy.deepcopy(plain), **own)
    left = left_padding(ids)
    for mask in (left, left.flip(1)):
        expected = plain(ids, attention_mask=mask).logits
        close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
    given = dict(attention_mask=left, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    ways: list[dict[str, Any]] = [{}, dict(num_beams=3), dict(use_cache=False)]
    if own["preset"] == "none":  # Falcon itself takes no such cache with its ALiBi
        ways.append(dict(cache_implementation="static", disable_compile=True))
    for how in ways:
        expected = plain.generate(ids, do_sample=False, **given, **how)
        assert torch.equal(model.generate(ids, do_sample=False, **given, **how), expected)
    if own["preset"] == "alibi":
        with pytest.raises(ValueError, match=r"keep_positions must be False for \w+, whose own are a bias"):
            use_log_position(plain, "none", keep_positions=True)


def test_a_decoder_that_is_refused() -> None:
    """Chunks: refused by the name of the type."""
    name = "llama4_text"
    config = AutoConfig.for_model(name, **(SIZES | HEAD_DIM | dict(num_local_experts=4)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=f"model type '{name}', which is not supported"):
        use_log_position(model)


def test_an_attention_of_another_class() -> None:
    model: Any = make("falcon")
    for layer in model.transformer.h:
        layer.self_attention.__class__ = modeling_falcon.FalconFlashAttention2  # as it is loaded with that
    with pytest.raises(ValueError, match=r'has no attention to convert: load it with attn_implementation="sdpa"'):
        use_log_position(model, "log-rotary")


@torch.no_grad()
def test_sinks_stay() -> None:
    """One far above all scores takes all of the weight, so that values do not matter."""
    with pytest.raises(ValueError, match="sink must be False for GptOssForCausalLM, which has sinks of its own"):
        use_log_position(make("gpt_oss"), sink=True)
    model, ids = use_log_position(make("gpt_oss")), tokens()
    logits = [model(ids).logits]
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(1e3)
    logits.append(model(ids).logits)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.bias.zero_()
    assert (logits[1] - logits[0]).abs().max() > 1e-3 * logits[0].abs().max()
    assert torch.equal(model(ids).logits, logits[1])


@torch.no_grad()
def test_from_alibi_to_a_logarithm() -> None:
    """As documented: a small rate starts out as nearly linear."""
    plain, ids = make("bloom"), tokens()
    expected = plain(ids).logits
    errors = []
    for length in (128, 8192):
        model = use_log_position(copy.deepcopy(plain), "log-bias")
        for position in (m for m in model.modules() if isinstance(m, logpe.LogPosition)):
            slopes = torch.tensor(alibi_slopes(position.num_heads))
            rate = torch.full_like(slopes, 1 / length)
            position.raw_rate.data = inverse_softplus(rate)
            position.raw_power.data = inverse_softplus(slopes / rate)
        errors.append(float((model(ids).logits - expected).abs().max() / expected.abs().max()))
    assert errors[1] < errors[0] / 10
    assert errors[1] < 1e-2
