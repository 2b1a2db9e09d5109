"""Test encoder-decoders of Transformers with log positions: padding, caches, beams, long texts, saving, training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from test_transformers import VOCABULARY, check_a_step, close, tokens
from test_transformers_encoders import padded
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import logpe
from logpe.position import LogPosition
from logpe.transformers import use_log_position

LONGEST = 24  # of what the models were made for
SIZES = dict(vocab_size=VOCABULARY, d_model=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1, forced_eos_token_id=None)  # fmt: skip
OF_BART = dict(encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=2,
               encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=LONGEST, dropout=0.0)  # fmt: skip
OF_T5 = dict(num_layers=2, num_decoder_layers=1, num_heads=4, d_kv=8, d_ff=48, dropout_rate=0.0)
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": OF_BART,
    "mbart": OF_BART,
    "marian": OF_BART | dict(decoder_vocab_size=VOCABULARY),
    "pegasus": OF_BART,
    "t5": OF_T5,
    "mt5": OF_T5,
}


def make(name: str, **options: Any) -> PreTrainedModel:
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **(SIZES | SEQ2SEQ[name] | options)))
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "t5" in name and key.endswith("q.weight") else 0.3)
    return model.eval()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(name: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plain, source, target = make(name), tokens(2, 13), tokens(2, 9)
    masks = [padded(source, left) for left in (True, False)]
    model = use_log_position(copy.deepcopy(plain))
    positions = [module for module in model.modules() if isinstance(module, LogPosition)]
    assert len(positions) == 3  # none in cross-attention
    with torch.no_grad():
        if "t5" in name:
            with pytest.raises(ValueError, match=r"keep_positions must be False for .*, whose own are a bias"):
                use_log_position(copy.deepcopy(plain), "none", keep_positions=True)
        else:
            kept = use_log_position(copy.deepcopy(plain), "none", keep_positions=True)
            for mask in (None, masks[1]):
                given = dict(input_ids=source, attention_mask=mask, decoder_input_ids=target)
                close(kept(**given).logits, plain(**given).logits)
        # Without positions, the encoder and the cross-attention see a set.
        unordered = use_log_position(copy.deepcopy(plain), "none")
        one = dict(decoder_input_ids=target)
        close(unordered(source.flip(1), **one).logits, unordered(source, **one).logits)

        expected = model(source, **one).logits
        assert (model(source.flip(1), **one).logits - expected).abs().max() > 1e-3
        for left, mask in zip((True, False), masks, strict=True):
            alone = source[:1, 4:] if left else source[:1, :-4]
            logits = model(source, attention_mask=mask, **one).logits
            close(logits[0], model(alone, decoder_input_ids=target[:1]).logits[0])
            close(logits[1], expected[1])
        # Padding of the target, and a cache.
        hidden = padded(target, left=True)
        logits = model(source, decoder_input_ids=target, decoder_attention_mask=hidden).logits
        close(logits[0, 4:], model(source[:1], decoder_input_ids=target[:1, 4:]).logits[0])
        output = model(source, decoder_input_ids=target[:, :5], use_cache=True)
        rest = dict(encoder_outputs=(output.encoder_last_hidden_state,), past_key_values=output.past_key_values)
        close(model(decoder_input_ids=target[:, 5:], **rest).logits, expected[:, 5:])
        # Longer than the learned positions.
        assert model(tokens(1, 2 * LONGEST), decoder_input_ids=tokens(1, LONGEST + 3)).logits.isfinite().all()
        for beams in (1, 3):
            written = [
                model.generate(source, attention_mask=masks[1], num_beams=beams, max_new_tokens=8, min_new_tokens=8,
                               do_sample=False, use_cache=caching)
                for caching in (True, False)
            ]  # fmt: skip
            assert torch.equal(*written)
        with pytest.raises(ValueError, match="packed sequences are not supported for model type"):
            model(source, decoder_input_ids=target, cu_seq_lens_q=torch.tensor([0, 5, 13]))

    check_a_step(model, tmp_path, source, labels=target)


def test_no_dense_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted T5 makes nothing of N x N elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr("logpe.transformers.attention.log_attention", lambda q, k, v, *_, **__: q)
    model, source = use_log_position(make("t5")), tokens(1, 300)
    with torch.no_grad(), Largest() as largest:
        model(source, decoder_input_ids=source, attention_mask=padded(source, left=False))
    assert largest.elements < 300 * 300


def test_shared_positions() -> None:
    """The encoder has one, and the decoder another."""
    model = use_log_position(make("bart", encoder_layers=3, decoder_layers=2), share_position=True)
    encoder, decoder = model.model.encoder.log_position, model.model.decoder.log_position
    assert [encoder.num_heads, decoder.num_heads] == [4, 2]
    assert [m for m in model.modules() if isinstance(m, LogPosition)] == [encoder, decoder]
    model(tokens(), decoder_input_ids=tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in logpe.position_parameters(model))
