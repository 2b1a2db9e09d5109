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
(``modules_to_save=["log_position"]``, and ``"log_sink"`` where there are sinks), and keep weight decay off it:
``Trainer(optimizers=(torch.optim.AdamW(logpe.parameter_groups(model, weight_decay), lr), None))``.

AutoModel and ``pipeline`` load a converted model once this module is imported. Without the import they raise. If
another ``attn_implementation`` is asked for, they load a model without log positions, and only their report of
unexpected weights shows it. A class called by its name, such as ``LlamaForCausalLM.from_pretrained``, does not know the
positions: its model raises when it runs. :func:`from_pretrained` takes the class from the config. No code from a folder
is run.

Positions follow from the cache and from the 2D ``attention_mask``. They count from the first token that the mask
shows, so that a left-padded batch gives the results of its rows without padding. ``position_ids`` serve only positions
that the model keeps. Keys are cached without rotation; a log rotation turns them anew at each call.

Several sequences may be packed into a row, and each is attended to as if it were alone: ``position_ids`` that start
again say so (``DataCollatorWithFlattening``, padding-free training and packing with TRL), or ``cu_seq_lens_q`` and
``max_length_q``, as flash attention takes them, which a compiled model needs; or ``seq_idx``. No mask of N x N is
built, and no cache is filled.

What can be converted (:data:`SUPPORTED`), with any head:

* decoders: Llama, Mistral, Mixtral, Qwen 2 and 3 and their MoE, Gemma 1 to 3 (text), OLMo 1 to 3, Phi and Phi-3,
  SmolLM3, Granite and its MoE, GLM and GLM-4, Cohere, Ernie 4.5, EXAONE 4, Seed-OSS, Hunyuan, StarCoder 2, StableLM,
  Nemotron, Helium, Arcee, Apertus, Persimmon, gpt-oss, OPT, BLOOM, MPT, Falcon, GPT-2, GPT-BigCode, GPT-NeoX;
* encoders: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ModernBERT, whose windows stay. A bias on the
  distance alone tells an encoder nothing about direction: the default preset rotates, too, as do all whose name says
  ``rotary``;
* encoder-decoders: BART, mBART, Marian, Pegasus, T5 and mT5, whose own relative bias goes. Cross-attention has no
  positions.

They then read texts of any length, whatever ``max_position_embeddings`` says, with padding on the left or the right.
StableLM, Nemotron, OPT, BLOOM, MPT, Falcon and encoder-decoders take no packed sequences; what is not a decoder alone
takes no ``context_parallel``. The sinks of gpt-oss stay. Not yet: Llama 4 (chunks). Of a Gemma 3 that also sees,
convert the text part, a model of its own::

    text = Gemma3ForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head

What cannot be honoured is refused by name: masks other than those of a decoder or an encoder, tokens hidden between
others, attention weights, softcapping (load a Gemma 2 with ``attn_logit_softcapping=None``, and train on). Transformers
itself refuses continuous batching (``generate_batch``), which it offers only with its own attentions.

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

From ALiBi to a logarithm
-------------------------
``use_log_position(bloom, "alibi")`` keeps what BLOOM computes, now with slopes that learn and no N x N bias; so it does
for MPT, and for a Falcon with ALiBi (which divides its slopes by sqrt(head_dim), and rounds its bias to bfloat16). A
logarithm with a small rate starts out as nearly the same, power log(1 + rate d) = slope d for d far below 1 / rate, and
bends beyond; so train on from there::

    use_log_position(bloom, "log-bias")
    for position in (m for m in bloom.modules() if isinstance(m, logpe.LogPosition)):
        slopes = torch.tensor(logpe.position.alibi_slopes(position.num_heads))
        rate = torch.full_like(slopes, 1 / 2048)                       # 1 / the length at which it was trained
        position.raw_rate.data = logpe.position.inverse_softplus(rate)
        position.raw_power.data = logpe.position.inverse_softplus(slopes / rate)

Longer texts for an encoder
---------------------------
1. Convert it: ``use_log_position(model)``. ``max_position_embeddings`` no longer limits it.
2. Train its masked language model for some hundred steps on short windows of the texts to come.
3. Fine-tune the classifier on texts as long as you can afford, and look at its accuracy by length, beside that of the
   original with its learned positions interpolated to the length.

``tests/test_transformers_encoders.py`` does so with a small BERT: trained at 32 tokens, it is right at 512, where the
original with interpolated positions guesses.

Served and sharded
------------------
Tried, with the results of Transformers' own ``sdpa``: ``device_map``, offloading included; FSDP2, with tensor
parallelism for models that have a plan; LoRA; ``generate`` with beams, assistants, prompt lookup, chunked prefill and
every cache; ``torch.compile(model.forward)`` with a static cache; ``torch.export``; weights quantised by TorchAO or
PyTorch, where positions stay in float32.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from logpe.transformers.architectures import SUPPORTED
from logpe.transformers.attention import log_attention_forward, log_position_mask
from logpe.transformers.calls import IMPLEMENTATION
from logpe.transformers.convert import from_pretrained, register, set_context_parallel, use_log_position

__all__ = [
    "IMPLEMENTATION",
    "SUPPORTED",
    "from_pretrained",
    "log_attention_forward",
    "log_position_mask",
    "set_context_parallel",
    "use_log_position",
]

AttentionInterface.register(IMPLEMENTATION, log_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, log_position_mask)
register()
