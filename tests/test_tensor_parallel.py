"""Test tensor parallelism on the CPU: modules whose heads lie across two processes against whole ones."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_processes
from torch import Tensor, nn

WORLD = 2
EXACT = dict(rtol=1e-12, atol=1e-12)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo backend here"
)


def test_two_processes(tmp_path: Path) -> None:
    """All cases run in one pair of processes, for starting them takes most of the time."""
    run_processes(__file__, WORLD, tmp_path)


# --- what each process runs -----------------------------------------------------------------------------------------


def make_mesh(*shape: int) -> Any:
    """Return a mesh of the processes; its last dimension shares out the heads."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :])


def check_like_whole(
    sharded: nn.Module, whole: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> None:
    """Check output, gradients and full state of a sharded module against those of the whole one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.tensor import DTensor

    results = []
    for module in (sharded, whole):
        own = x.clone().requires_grad_()
        out = run(module, own)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append((out, own.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    assert gradients.keys() == {name for name, _ in sharded.named_parameters()}
    for name, p in sharded.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        if p.grad is None:
            continue
        gradient = p.grad
        if isinstance(p, DTensor):
            assert gradient.placements == p.placements, name
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, gradients[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")

    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded, options=options)
    assert state.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name], value), name
    other = {name: value + 0.125 for name, value in state.items()}
    set_model_state_dict(sharded, dict(other), options=options)
    back = get_model_state_dict(sharded, options=options)
    assert all(torch.equal(back[name], other[name]) for name in other)
    whole.load_state_dict(other)
    with torch.no_grad():
        torch.testing.assert_close(run(sharded, x), run(whole, x), **EXACT)


def self_attention(module: nn.Module, x: Tensor) -> Tensor:
    """Return causal self-attention, whose keys may come from some of the features."""
    keys = x if module.kdim == x.shape[-1] else x[..., : module.kdim]
    return module(x, keys, x, need_weights=False, is_causal=True)[0]


def attention_modules(rank: int, folder: Path) -> None:
    """Check LogAttention with all parameters that it may have, grouped heads included."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    import logpe

    mesh = make_mesh(WORLD)
    cases: dict[str, dict[str, Any]] = {
        "default": {},
        "grouped": dict(
            num_kv_heads=2, qk_norm=True, batch_first=True, position_options=dict(query_gain=True), sink=True
        ),
        "separate": dict(kdim=24, num_kv_heads=2, position="log-invariant", batch_first=True),
        "rotary": dict(position="log-rotary", bias=False),
        "appended": dict(position=None, add_bias_kv=True, add_zero_attn=True),
    }
    for name, options in cases.items():
        print(name, flush=True)
        torch.manual_seed(0)
        whole = logpe.LogAttention(32, 4, dtype=torch.float64, **options)
        with torch.no_grad():
            for p in whole.parameters():
                p.add_(0.1 * torch.rand_like(p))
        whole = whole.double()
        sharded = copy.deepcopy(whole)
        assert parallelize_module(sharded, mesh, logpe.HeadParallel()) is sharded
        if sharded.position is not None:
            assert (sharded.position.num_heads, sharded.position.local_heads) == (4, 2)
            for p in logpe.position_parameters(sharded):
                assert p.placements == (Shard(0),)
                assert p.to_local().shape == (2,)
                assert p._no_weight_decay
        for p in (sharded.in_proj_weight, sharded.q_proj_weight):
            assert p is None or p.to_local().shape[0] * WORLD == p.shape[0]
        x = torch.randn(6, 6, 32, dtype=torch.float64)  # so that the batch may come first or second
        check_like_whole(sharded, whole, self_attention, x)

        # Masks: for each head (the slow path), and for keys.
        mask = torch.randn(6 * 4, 6, 6, dtype=torch.float64)
        padding = torch.arange(6) >= 6 - torch.arange(6)[:, None] % 2
        for masks in (dict(attn_mask=mask), dict(attn_mask=mask[0]), dict(key_padding_mask=padding)):
            with torch.no_grad():
                ours, theirs = (module(x, x[..., : module.kdim], x, need_weights=False, **masks)[0]
                                for module in (sharded, whole))  # fmt: skip
            torch.testing.assert_close(ours, theirs, **EXACT)


def refusals(rank: int, folder: Path) -> None:
    """Check that what cannot be is refused by name, and that the module stays as it was."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    import logpe

    mesh, style = make_mesh(WORLD), logpe.HeadParallel()
    x = torch.randn(2, 5, 24)
    for options, message in (
        (dict(num_heads=3), "num_heads must be a multiple of the 2 ranks that share the heads, got 3"),
        (dict(num_heads=4, num_kv_heads=1), r"num_kv_heads must be a multiple of the 2 ranks .* got 1"),
    ):
        module = logpe.LogAttention(24, **options, batch_first=True)
        before = self_attention(module, x)
        with pytest.raises(ValueError, match=message):
            parallelize_module(module, mesh, style)
        assert torch.equal(self_attention(module, x), before)
    with pytest.raises(TypeError, match=r"HeadParallel must be given to a LogAttention, .* got Linear"):
        parallelize_module(nn.Linear(4, 4), mesh, style)
    with pytest.raises(ValueError, match="must have one dimension, got 2"):
        parallelize_module(logpe.LogAttention(24, 4), make_mesh(1, WORLD), style)
    module = parallelize_module(logpe.LogAttention(24, 4, batch_first=True), mesh, style)
    with pytest.raises(ValueError, match="shared out once"):
        parallelize_module(module, mesh, style)
    with pytest.raises(ValueError, match="need_weights must be False with HeadParallel"):
        module(x, x, x)
    mask = torch.zeros(5, 5, requires_grad=True)
    with pytest.raises(ValueError, match="attn_mask must not require a gradient with HeadParallel"):
        module(x, x, x, attn_mask=mask, need_weights=False)
    replicated = distribute_tensor(x, mesh, [Replicate()])
    with pytest.raises(TypeError, match="query must be the tensor of this rank, got a DTensor"):
        self_attention(module, replicated)

    # A position of all heads on ranks with fewer, and the other way round.
    q = torch.randn(1, 2, 5, 8)
    for preset in ("log-bias", "log-rotary"):
        position = logpe.LogPosition(4, 8, preset)
        with pytest.raises(ValueError, match="position was built for num_heads 4, and q has 2 heads"):
            logpe.log_attention(q, q, q, position)
        parallelize_module(position, mesh, style)
        assert parallelize_module(position, mesh, style) is position
        whole = torch.randn(1, 4, 5, 8)
        with pytest.raises(ValueError, match="num_heads 4, 2 of them on this rank, and q has 4 heads"):
            logpe.log_attention(whole, whole, whole, position)
        logpe.log_attention(q, q, q, position)
        cache = logpe.KVCache(1, 2, 8, 8, position=position, dtype=q.dtype)
        torch.testing.assert_close(cache.attend(q, q, q), logpe.log_attention(q, q, q, position, is_causal=True))
    with pytest.raises(ValueError, match=r"position.power must have shape \(2,\), got \(4,\)"):
        logpe.log_attention(q, q, q, logpe.LogPosition(4, 8, "log-bias")())
    with pytest.raises(TypeError, match=r"q must be the tensor of this rank, got a DTensor: pass q.to_local\(\)"):
        logpe.log_attention(distribute_tensor(q, mesh, [Replicate()]), q, q)


def dropout(rank: int, folder: Path) -> None:
    """Check that heads on different ranks drop different weights, on both paths, and that ranks agree afterwards."""
    from torch.distributed.tensor.parallel import parallelize_module

    import logpe

    module = logpe.LogAttention(8, 2, dropout=0.5, position="none", bias=False, batch_first=True)
    with torch.no_grad():  # both heads see the same
        module.in_proj_weight.copy_(torch.randn(3, 1, 4, 8).expand(3, 2, 4, 8).reshape(24, 8))
        module.out_proj.weight.copy_(torch.eye(8))
    parallelize_module(module, make_mesh(WORLD), logpe.HeadParallel())
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    outs = []
    for options in (dict(is_causal=True), dict(attn_mask=torch.ones(6, 6).triu(1).bool())):
        torch.manual_seed(2)
        outs.append(module(x, x, x, need_weights=False, **options)[0])
    torch.testing.assert_close(*outs)
    first, second = outs[0].chunk(2, -1)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(*(module.eval()(x, x, x, need_weights=False)[0].chunk(2, -1)))


def with_context_parallel(rank: int, folder: Path) -> None:
    """Check that heads lie along one dimension of a mesh, and tokens along another."""
    from torch.distributed.tensor.parallel import parallelize_module

    import logpe

    size = dist.get_world_size() // WORLD
    mesh = make_mesh(size, WORLD)
    torch.manual_seed(0)
    whole = logpe.LogAttention(32, 4, num_kv_heads=2, qk_norm=True, batch_first=True).double()
    sharded = parallelize_module(copy.deepcopy(whole), mesh["tensor"], logpe.HeadParallel())
    cp = sharded.context_parallel = logpe.ContextParallel(mesh["data"])
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mine = cp.shard(x, 1).requires_grad_()
    out = self_attention(sharded, mine)
    expected = self_attention(whole, x.requires_grad_())
    torch.testing.assert_close(cp.unshard(out, 1), expected, **EXACT)
    expected.sum().backward()
    out.sum().backward()
    torch.testing.assert_close(cp.unshard(mine.grad, 1), x.grad, **EXACT)
    for name, p in sharded.named_parameters():
        gradient = p.grad.full_tensor()
        if not name.startswith("position"):  # of which context parallelism makes the sum
            dist.all_reduce(gradient, group=mesh["data"].get_group())
        torch.testing.assert_close(gradient, whole.get_parameter(name).grad, **EXACT)
    sharded.dropout = 0.1
    with pytest.raises(ValueError, match="dropout must be 0 with context_parallel and HeadParallel"):
        self_attention(sharded, mine)


def language_model(rank: int, folder: Path) -> None:
    """Check the language model: a step of the optimiser, and its state, are those of the whole model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.tensor.parallel import parallelize_module

    import logpe
    from logpe.lm.model import LanguageModel, Shape

    shape = Shape(dim=32, layers=2, heads=4, qk_norm=True, vocabulary=16, sink=True)
    whole = LanguageModel(shape, dict(query_gain=True), seed=0).double()
    sharded = copy.deepcopy(whole)
    parallelize_module(sharded, make_mesh(WORLD), {"blocks.*.attention": logpe.HeadParallel()})
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
    states = []
    for model in (sharded, whole):
        optimizer = torch.optim.AdamW(logpe.parameter_groups(model, 0.1), lr=1e-2)
        model(tokens).square().mean().backward()
        optimizer.step()
        states.append(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)))
        optimizer.zero_grad()
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for name, state in states[1]["state"].items():
        torch.testing.assert_close(states[0]["state"][name]["exp_avg"], state["exp_avg"], **EXACT)
    torch.testing.assert_close(sharded(tokens), whole(tokens), **EXACT)
    torch.testing.assert_close(sharded(tokens, last=2), whole(tokens)[:, -2:], **EXACT)


def converted(rank: int, folder: Path) -> None:
    """Check that a converted Transformers model loads with its heads and positions across processes, and trains."""
    transformers = pytest.importorskip("transformers")
    from torch.distributed.tensor import Shard
    from transformers.distributed import DistributedConfig

    import logpe.transformers

    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(1))  # 0 is padding
    for share in (False, True):
        torch.manual_seed(0)
        plain = transformers.Qwen3ForCausalLM(config)
        whole = logpe.transformers.use_log_position(plain, share_position=share, sink=True)
        for sink in (module for module in whole.modules() if isinstance(module, logpe.HeadSink)):
            torch.nn.init.normal_(sink.key)
            torch.nn.init.normal_(sink.bias)
        path = folder / f"share-{share}"
        if rank == 0:
            whole.save_pretrained(path)
        dist.barrier()
        parallel = DistributedConfig(tp_size=WORLD)
        sharded = logpe.transformers.from_pretrained(path, distributed_config=parallel)
        gradients = []
        for model in (sharded, whole.eval()):
            logits = model(tokens).logits
            logits.square().mean().backward()
            sinks = [module for module in model.modules() if isinstance(module, logpe.HeadSink)]
            assert len(sinks) == 2
            learned = [*logpe.position_parameters(model), *(p for sink in sinks for p in sink.parameters())]
            gradients.append((logits, [p.grad for p in learned]))
        torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-5)
        assert gradients[0][1]
        for ours, theirs in zip(gradients[0][1], gradients[1][1], strict=True):
            assert ours.placements[-1] == Shard(0)
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-3, atol=1e-6)
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(sharded.generate(tokens, **options), whole.generate(tokens, **options))
        sharded.config.log_position = None
        with pytest.raises(ValueError, match="must not have its heads across processes"):
            logpe.transformers.use_log_position(sharded)

    config.num_key_value_heads = 1
    if rank == 0:
        logpe.transformers.use_log_position(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder / "uneven")
    dist.barrier()
    with pytest.raises(ValueError, match=r"num_key_value_heads must be a multiple of the 2 ranks .* got 1"):
        logpe.transformers.from_pretrained(folder / "uneven", distributed_config=DistributedConfig(tp_size=WORLD))


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    for case in (attention_modules, refusals, dropout, with_context_parallel, language_model, converted):
        print(case.__name__, flush=True)
        case(rank, folder)
    dist.barrier()  # see logpe.lm.train.World
    dist.destroy_process_group()
