"""Test two processes on the CPU: data parallel training, and sharded models that keep their position."""

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

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo backend here"
)


def test_two_processes(tmp_path: Path) -> None:
    """All cases run in one pair of processes, for starting them takes most of the time."""
    run_processes(__file__, WORLD, tmp_path / "rendezvous")


# --- what each process runs -----------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    """Return a model that is the same on every rank."""
    from logpe import LogPosition, log_attention

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = LogPosition(4, 8, "log-invariant", query_gain=True)
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return self.out(log_attention(q, k, v, self.position, is_causal=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    return Model()


def make_layers() -> nn.Module:
    """Return LogAttention layers with all parameters and angles that there are, the same on every rank."""
    from logpe import LogAttention

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = LogAttention(32, 4, batch_first=True, qk_norm=True)
            self.second = LogAttention(32, 4, batch_first=True, position="log-rotary", kdim=32)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.first, self.second):
                x = layer(x, x, x, need_weights=False, is_causal=True)[0]
            return x

    torch.manual_seed(0)
    return Layers()


def train(
    model: nn.Module,
    x: Tensor,
    after_backward: Callable[[], None] = lambda: None,
    groups: Any = None,
) -> None:
    """Take three steps of the position and of the rest towards a made-up target."""
    from logpe import parameter_groups

    optimizer = torch.optim.AdamW(groups or parameter_groups(model, 0.1), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        after_backward()
        optimizer.step()


def all_equal(x: Tensor) -> bool:
    """Return whether the ranks hold the same bits."""
    copies = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(copies, x.detach().contiguous())
    return all(torch.equal(copies[0], other) for other in copies)


def data_parallel(rank: int) -> None:
    """Check that the parameters move, stay equal, and are those of one process with the whole batch."""
    import logpe

    model = make_model()
    alone = copy.deepcopy(model)
    start = copy.deepcopy(model)
    batch = torch.randn(2 * WORLD, 12, 32, generator=torch.Generator().manual_seed(1))
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, batch[2 * rank : 2 * rank + 2])
    train(alone, batch)
    moved = list(logpe.position_parameters(model))
    assert len(moved) == 4
    for p, before, expected in zip(
        moved, logpe.position_parameters(start), logpe.position_parameters(alone), strict=True
    ):
        assert all_equal(p)
        assert not torch.equal(p, before)
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-4)


def sharded_bfloat16(rank: int) -> None:
    """Check a bfloat16 model: its position is left out of the sharding, stays float32, and trains."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import logpe

    model = make_model().bfloat16()
    positions = list(logpe.position_parameters(model))
    before = [p.detach().clone() for p in positions]
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), ignored_params=set(positions))

    def average() -> None:  # ignored parameters are the caller's to synchronise
        for p in positions:
            dist.all_reduce(p.grad)
            p.grad /= WORLD

    torch.manual_seed(rank)
    train(model, torch.randn(2, 12, 32, dtype=torch.bfloat16), average)
    assert model.qkv.weight.dtype == torch.bfloat16
    assert model.qkv.weight.to_local().shape == (48, 32)
    assert positions == list(logpe.position_parameters(model))
    for p, start in zip(positions, before, strict=True):
        assert p.dtype == torch.float32
        assert all_equal(p)
        assert not torch.equal(p, start)


def sharded_mixed_precision(rank: int) -> None:
    """Check a model that computes in bfloat16: its position, sharded or not, stays float32, and trains."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    import logpe

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for ignore in (False, True):
        model = make_model()
        before = [p.detach().clone() for p in logpe.position_parameters(model)]
        ignored = set(logpe.position_parameters(model)) if ignore else set()
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy, ignored_params=ignored)
        torch.manual_seed(rank)
        train(model, torch.randn(2, 12, 32))
        for p, start in zip(logpe.position_parameters(model), before, strict=True):
            assert p.dtype == torch.float32
            whole = p if ignore else p.full_tensor()
            assert not torch.equal(whole, start)
            assert ignore or all_equal(whole)


def sharded_by_fsdp1(rank: int) -> None:
    """Check that FullyShardedDataParallel, which flattens by default, gives the results of one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    import logpe

    batch = torch.randn(2 * WORLD, 12, 32, generator=torch.Generator().manual_seed(1))
    mine = slice(2 * rank, 2 * rank + 2)
    cases: dict[str, dict[str, Any]] = {
        "flat": {},
        "original": dict(use_orig_params=True),
        "units": dict(auto_wrap_policy=ModuleWrapPolicy({logpe.LogPosition})),
    }
    for make in (make_model, make_layers):
        for name, options in cases.items():
            alone = make()
            model = FullyShardedDataParallel(make(), device_id=torch.device("cpu"), **options)
            torch.testing.assert_close(model(batch[mine]), alone(batch[mine]))
            groups = None
            if name == "flat":  # nothing tells the positions from the rest
                with pytest.raises(ValueError, match=r"position parameters of .*position are flattened"):
                    logpe.parameter_groups(model, 0.1)
                groups = [{"params": m.parameters(), "weight_decay": 0.0} for m in (model, alone)]
            train(model, batch[mine], groups=groups and groups[:1])
            train(alone, batch, groups=groups and groups[1:])
            torch.testing.assert_close(model(batch[mine]), alone(batch[mine]), rtol=2e-3, atol=1e-3)


def sharded_on_meta(rank: int) -> None:
    """Check models made on meta: both shardings initialise them late, or load them, and angles are there."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    x = torch.randn(2, 12, 32)
    for make in (make_model, make_layers):
        with torch.device("meta"):
            first, second = make(), make()
        sharded = FullyShardedDataParallel(first, device_id=torch.device("cpu"), use_orig_params=True)
        assert torch.isfinite(sharded(x)).all()
        fully_shard(second, mesh=init_device_mesh("cpu", (WORLD,)))
        second.to_empty(device="cpu")
        for module in second.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        alone = make()
        for (name, p), expected in zip(second.named_parameters(), alone.parameters(), strict=True):
            if "raw_" in name and "rate" not in name:  # which is drawn
                torch.testing.assert_close(p.full_tensor(), expected)
        assert torch.isfinite(second(x)).all()
        second.reshard()
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(second, alone.state_dict(), options=whole)
        torch.testing.assert_close(second(x), alone(x))
        with FullyShardedDataParallel.summon_full_params(sharded):
            sharded.module.load_state_dict(alone.state_dict())
        torch.testing.assert_close(sharded(x), alone(x))


if __name__ == "__main__":
    rank, rendezvous = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for case in (data_parallel, sharded_bfloat16, sharded_mixed_precision, sharded_by_fsdp1, sharded_on_meta):
        print(case.__name__, flush=True)
        case(rank)
    dist.barrier()  # see logpe.lm.train.World
    dist.destroy_process_group()
