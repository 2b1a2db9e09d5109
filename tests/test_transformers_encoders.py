"""Test encoders of Transformers with log positions: padding, long texts, heads, packing, saving, training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from test_transformers import SIZES, check_a_step, close, tokens
from transformers import AutoConfig, PreTrainedModel

import logpe
from logpe.transformers import use_log_position

LONGEST = 24  # of what the models were made for
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": NO_DROPOUT,
    "roberta": NO_DROPOUT | dict(type_vocab_size=2),
    "xlm-roberta": NO_DROPOUT | dict(type_vocab_size=2),
    "camembert": NO_DROPOUT | dict(type_vocab_size=2),
    "electra": NO_DROPOUT | dict(embedding_size=16),
    "distilbert": dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0),
    "modernbert": dict(local_attention=6, layer_types=["sliding_attention", "full_attention"], cls_token_id=1,
                       sep_token_id=2),
}  # fmt: skip
PADDING = 4


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(name: str, auto: Any = transformers.AutoModelForMaskedLM, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **(SIZES | dict(max_position_embeddings=LONGEST) | ENCODERS[name] | options))
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padded(ids: Tensor, left: bool) -> Tensor:
    """Return a mask that hides PADDING tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, slice(None, PADDING) if left else slice(-PADDING, None)] = 0
    return mask


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str, tmp_path: Path) -> None:
    plain, ids = make(name), tokens()
    with torch.no_grad():
        kept = use_log_position(copy.deepcopy(plain), "none", keep_positions=True)
        for mask in (None, padded(ids, left=False)):
            shown = torch.ones_like(ids).bool() if mask is None else mask.bool()
            close(kept(ids, attention_mask=mask).logits[shown], plain(ids, attention_mask=mask).logits[shown])
        # Without positions, an encoder sees a set.
        unordered = use_log_position(make(name, **(dict(local_attention=64) if name == "modernbert" else {})), "none")
        close(unordered(ids.flip(1)).logits, unordered(ids).logits.flip(1))

    model = use_log_position(copy.deepcopy(plain))
    with torch.no_grad():
        logits = model(ids).logits
        assert (logits.flip(1) - model(ids.flip(1)).logits).abs().max() > 1e-3
        for left in (True, False):
            mask = padded(ids, left)
            alone = model(ids[:1, PADDING:] if left else ids[:1, :-PADDING]).logits[0]
            close(model(ids, attention_mask=mask).logits[0, mask[0].bool()], alone)
            close(model(ids, attention_mask=mask).logits[1], logits[1])
        # Twice as long as the learned positions, with and without token types.
        long = tokens(2, 2 * LONGEST)
        assert model(long).logits.isfinite().all()
        if name not in ("distilbert", "modernbert"):
            close(model(long, token_type_ids=torch.zeros_like(long)).logits, model(long).logits)
            assert (model(long, token_type_ids=torch.ones_like(long)).logits - model(long).logits).abs().max() > 1e-3
        packed = torch.tensor([[*range(5), *range(6)]])
        parts = [model(part).logits for part in ids[:1].split((5, 6), 1)]
        for way in (dict(position_ids=packed), dict(cu_seq_lens_q=torch.tensor([0, 5, 11]), max_length_q=6)):
            close(model(ids[:1], **way).logits, torch.cat(parts, 1))
        with pytest.raises(ValueError, match="hides tokens between visible ones"):
            model(ids, attention_mask=torch.ones_like(ids).index_fill_(1, torch.tensor([5]), 0))
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="context_parallel must be None for an encoder"):
            logpe.transformers.set_context_parallel(model, object.__new__(logpe.ContextParallel))

    check_a_step(model, tmp_path, ids, labels=ids)
    with torch.no_grad():
        # Another head on the same encoder.
        for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification):
            other = auto.from_pretrained(tmp_path, num_labels=3)
            assert other(ids, attention_mask=padded(ids, left=False)).logits.shape[-1] == 3
            for (key, x), (_, y) in zip(
                model.base_model.state_dict().items(), other.base_model.state_dict().items(), strict=False
            ):
                assert torch.equal(x, y), key


def test_encoder_windows_are_kept() -> None:
    """A layer of ModernBERT with a window sees as far as before."""
    model = use_log_position(make("modernbert", num_hidden_layers=1, layer_types=["sliding_attention"]), "log-bias")
    ids = tokens(1, 15)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1 - 3) % (SIZES["vocab_size"] - 3) + 3
    with torch.no_grad():
        changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 0
    assert changed.tolist() == [True] * 4 + [False] * 11  # three on each side


def test_encoders_that_are_refused() -> None:
    with pytest.raises(ValueError, match="is_decoder=True, which is not supported: it is an encoder"):
        use_log_position(make("bert", transformers.AutoModelForCausalLM, is_decoder=True))
    model = use_log_position(make("bert"))
    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="is_causal must be False for this BertSelfAttention"):
        logpe.transformers.log_attention_forward(model.base_model.encoder.layer[0].attention.self, x, x, x, None,
                                                 is_causal=True)  # fmt: skip


def rising_or_falling(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return texts int64 (count, length) that count up or down, with noise; and which, int64 (count,)."""
    rising, letters = torch.randint(2, (count,)), 12
    steps = (2 * rising - 1)[:, None] * torch.arange(length)
    clean = (torch.randint(letters, (count, 1)) + steps) % letters + 4
    noise = torch.randint(4, 4 + letters, (count, length))
    return torch.where(torch.rand(count, length) < 0.25, noise, clean), rising


def learn(parameters: Any, steps: int, loss: Any) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_recipe_for_longer_texts() -> None:
    """The steps of the documentation, with a BERT of its own: trained at 32 tokens, it reads 512.

    With its learned positions stretched to that length, as is common, the same model guesses.
    """
    torch.manual_seed(0)
    short, long, masked = 32, 512, 3
    sizes = dict(vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = transformers.BertConfig(
        **sizes, max_position_embeddings=short, initializer_range=0.15, pad_token_id=0, **NO_DROPOUT
    )
    plain = transformers.BertForMaskedLM(config)

    def guess_hidden(model: Any) -> Tensor:
        ids, _ = rising_or_falling(32, short)
        hidden = torch.rand(ids.shape) < 0.15
        return model(input_ids=ids.masked_fill(hidden, masked), labels=ids.masked_fill(~hidden, -100)).loss

    learn(plain.parameters(), 250, lambda: guess_hidden(plain))
    converted = use_log_position(copy.deepcopy(plain))
    learn(logpe.parameter_groups(converted, 0.01), 120, lambda: guess_hidden(converted))
    test, labels = rising_or_falling(64, long)
    right = []
    for model in (plain.bert, converted.bert):
        head = torch.nn.Linear(32, 2)

        def classify(ids: Tensor, model: Any = model, head: Any = head) -> Tensor:
            return head(model(ids).last_hidden_state.mean(1))

        def loss(classify: Any = classify) -> Tensor:
            ids, label = rising_or_falling(32, short)
            return F.cross_entropy(classify(ids), label)

        learn([*model.parameters(), *head.parameters()], 80, loss)
        if model is plain.bert:
            embeddings = model.embeddings
            stretched = F.interpolate(embeddings.position_embeddings.weight.T[None], long, mode="linear")[0].T
            embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(stretched.detach())
            embeddings.position_ids = torch.arange(long)[None]
            embeddings.token_type_ids = torch.zeros(1, long, dtype=torch.long)
        with torch.no_grad():
            right.append((classify(test).argmax(1) == labels).float().mean().item())
    assert right[1] > 0.9
    assert right[0] < 0.75
