"""Attention whose heads are shared out among processes, as tensor parallelism does it.

The module must not be imported where nobody asks for it: DTensor takes a while to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from logpe.distributed import count_tokens, intersect


class HeadParallel(ParallelStyle):
    """A style of ``parallelize_module`` that gives each rank some of the heads of an attention, and their positions.

    It serves :class:`LogAttention`, and the attention of a model that ``python -m logpe train`` trains::

        mesh = init_device_mesh("cuda", (data, tensor), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"layers.*.self_attn": logpe.HeadParallel()})

    Rank r of P holds the heads from r * Hq / P to before (r + 1) * Hq / P, and the key heads that belong to them. All
    ranks of the mesh call the module with the same local tensors and get the same output. Outputs and gradients are
    those of the whole module, up to rounding.

    * Power, rate, sharpness and alpha become DTensors, ``Shard(0)``. Called, the position returns the values of this
      rank's heads alone. Attention of your own takes the style for its LogPosition: give it the rank's q, k and v.
    * The weights of the projections become DTensors: ``Shard(0)`` before attention, ``Shard(1)`` after it. Where q, k
      and v share one weight, no placement of DTensor splits it by head. A rank then stores an even share of its rows,
      and each forward and each backward exchanges them for those of the rank's heads: as many bytes as a rank stores.
    * What all heads share (RMSNorm on q and k, the output's bias) becomes ``Replicate``, with the summed gradient.

    So a full state_dict (``torch.distributed.checkpoint.state_dict``) is that of the whole module, and its optimiser's
    is, too. Apply the style before FSDP2 and before you make the optimiser. With a ``context_parallel``, use another
    dimension of the mesh.

    Of :class:`LogAttention` it refuses ``need_weights``, masks that require a gradient, and dropout together with
    ``context_parallel``. Dropout alone is not that of one process: each rank adds its number to the seed that it draws,
    so seed all ranks alike.

    Raises:
        TypeError: the module is none of these.
        ValueError: the mesh has more than one dimension, its ranks do not divide the heads or the key heads, or the
            module is shared out already. The module is left as it was.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shard_heads: Any = getattr(module, "shard_heads", None)
        if shard_heads is None:
            raise TypeError(
                "HeadParallel must be given to a LogAttention, a LogPosition or the attention of a LanguageModel, "
                f"got {type(module).__name__}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"the mesh of HeadParallel must have one dimension, got {device_mesh.ndim}: pass one of a larger mesh, "
                'as in mesh["tensor"]'
            )
        shard_heads(device_mesh, self.src_data_rank)
        return module


def check_heads(mesh: DeviceMesh, **numbers: int) -> None:
    """Raise ValueError unless the ranks of ``mesh`` divide the numbers of heads."""
    for name, heads in numbers.items():
        if heads % mesh.size():
            raise ValueError(f"{name} must be a multiple of the {mesh.size()} ranks that share the heads, got {heads}")


def distribute(module: nn.Module, placements: Mapping[str, Placement], mesh: DeviceMesh, source: int | None) -> None:
    """Turn parameters of ``module`` into DTensors, by name. One that is None stays None.

    Args:
        source: the rank whose values count; None: each rank has them all.
    """
    for name, placement in placements.items():
        whole = getattr(module, name)
        if whole is not None:
            shards = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=source)
            setattr(module, name, nn.Parameter(shards, requires_grad=whole.requires_grad))


def share(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return ``x``, which is the same on all ranks, so that its gradient will be the sum of those of all ranks."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def whole_value(parameter: Any) -> Tensor:
    """Return the value of a replicated DTensor, whose gradient will be the sum of those of all ranks."""
    return share(parameter.to_local(), parameter.device_mesh)


def rows_of_heads(packed: Any, sizes: Sequence[int]) -> Tensor:
    """Return the rows of this rank's heads, differentiable in ``packed``.

    Args:
        packed: a DTensor of blocks of rows, such as those of q, k and v, sharded evenly along them.
        sizes: the rows of each block. A rank's heads have an even share of each.
    """
    mesh, held = packed.device_mesh, packed.to_local()
    ranks, rank, count = mesh.size(), mesh.get_local_rank(), held.shape[0]
    first = [sum(sizes[:block]) for block in range(len(sizes))]
    wanted = [
        [(start + size * r // ranks, start + size * (r + 1) // ranks) for start, size in zip(first, sizes, strict=True)]
        for r in range(ranks)
    ]
    # From each rank to each other one, in rising order: what arrives is in order, too.
    moves = [[intersect(rows, [(r * count, (r + 1) * count)]) for rows in wanted] for r in range(ranks)]
    parts = [held[a - rank * count : b - rank * count] for spans in moves[rank] for a, b in spans]
    sent = [count_tokens(spans) for spans in moves[rank]]
    received = [count_tokens(moves[r][rank]) for r in range(ranks)]
    return _AllToAll.apply(torch.cat(parts), sent, received, mesh.get_group())


class _AllToAll(torch.autograd.Function):
    """Send rows to each rank, and receive some from each; the gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _AllToAll.apply(*gradients, *ctx.back), None, None, None
