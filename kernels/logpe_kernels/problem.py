"""What a call asks for, brought into the form that the kernels take. Shared by the forward and backward launchers."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Traits, log2_length, padded
from .position import Position
from .rotation import rotate
from .tile import Sequences, Strides

#: Kernel arguments whose value must not lead to a new compilation: lengths change from call to call.
RUNTIME_INTEGERS = [
    "dropout_threshold",
    "num_queries",
    "num_keys",
    "total_queries",
    "total_keys",
    "query_start",
    "key_start",
    "window_left",
    "window_right",
]
MAX_HEAD_DIM = 256
MIN_PAGE_SIZE = 16
FARTHEST = 2**30  # window, in tokens: a position plus or minus it stays an int32


def cdiv(a: int, b: int) -> int:
    """Division rounded up. triton.cdiv, which serves kernels too, takes 3 us on the host."""
    return -(-a // b)


def token_strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """(batch, head, token) strides of (B, H, N, D), or of packed (total, H, D), whose batches are rows apart."""
    if packed:
        token, head, _ = x.stride()
        return 0, head, token
    batch, head, token, _ = x.stride()
    return batch, head, token


def new_output(x: Tensor, packed: bool) -> Tensor:
    """An output laid out like x; packed ones start from zeros, since tokens outside every sequence keep them."""
    return torch.zeros_like(x) if packed else torch.empty_like(x)


@functools.cache
def constants(head_dim: int, config: Any) -> dict[str, Any]:
    """The constexprs of a kernel that is launched with a configuration, and Triton's options. Not to be changed."""
    return dict(
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        enable_fp_fusion=True,  # a * b + c in one instruction; Triton 3.10 no longer does so by default
        **config.launch(),
    )


class Problem:
    """One call: its tensors (turned, where there is a rotation), sizes, and the arguments that all kernels share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        power: Tensor | None = None,
        rate: Tensor | None = None,
        sharpness: Tensor | None = None,
        alpha: Tensor | None = None,
        theta: Tensor | None = None,
        query_starts: Tensor | None = None,
        key_starts: Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_bias: Tensor | None = None,
        context_lengths: Tensor | None = None,
        block_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        query_start: int = 0,
        key_start: int = 0,
        window_left: int | None = None,
        window_right: int | None = None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        rotary_scale: float = 1.0,
        gain_length: float = 512.0,
        scale: float,
        dropout_p: float = 0.0,
    ) -> None:
        self.packed = cu_seqlens_q is not None
        self.batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
        self.heads, self.kv_heads, self.head_dim = q.shape[1], k.shape[1], q.shape[-1]
        self.num_queries, self.num_keys = (max_seqlen_q, max_seqlen_k) if self.packed else (q.shape[2], k.shape[2])
        self.total_queries = q.shape[0] if self.packed else 0
        self.block_table = block_table
        if block_table is not None:
            self.num_keys = block_table.shape[1] * k.shape[2]
            if self.packed or theta is not None or dropout_p > 0:
                raise ValueError("a block_table goes without cu_seqlens, without theta and without dropout")
            if k.shape[2] < MIN_PAGE_SIZE or k.shape[2] & (k.shape[2] - 1) != 0:
                raise ValueError(f"page_size must be a power of two from {MIN_PAGE_SIZE} on, got {k.shape[2]}")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, got {self.head_dim}")
        self.theta, self.rotary_scale = theta, rotary_scale
        self._query_axis = (cu_seqlens_q, query_starts, query_start, self.num_queries)
        self._key_axis = (cu_seqlens_k, key_starts, key_start, self.num_keys)
        self.q, self.k, self.v = q, k, v
        if theta is not None:
            self.q = self.rotate_queries(q, new_output(q, self.packed))
            self.k = self.rotate_keys(k, new_output(k, self.packed))
        self.position = Position(power, rate, sharpness, alpha)
        self.traits = Traits(  # by position, which is quicker
            q.device,
            q.element_size(),
            self.head_dim,
            power is not None,
            sharpness is not None,
            alpha is not None,
            key_bias is not None,
            window_right == 0,
            log2_length(self.num_queries, self.num_keys),
        )
        self.sequences = Sequences(
            cu_seqlens_q, cu_seqlens_k, query_starts, key_starts, key_lengths, key_bias, context_lengths
        )
        self.dropout_seed = dropout_seed if dropout_p > 0 else None
        self.tensors = self.position, self.sequences, self.dropout_seed
        self.dropout = int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)  # threshold, scale
        self.numbers = (  # in the order of the kernels' parameters
            float(scale),
            float(gain_length),
            self.heads,
            self.heads // self.kv_heads,
            self.num_queries,
            self.num_keys,
            self.total_queries,
            k.shape[0] if self.packed else 0,
            query_start,
            key_start,
            None if window_left is None else min(window_left, FARTHEST),
            None if window_right is None else min(window_right, FARTHEST),
        )

    def rotate_queries(self, x: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
        """Turn x, which is laid out like q, into out (which may be x)."""
        assert self.theta is not None
        return rotate(x, out, self.theta, self.rotary_scale, *self._query_axis, inverse=inverse)

    def rotate_keys(self, x: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
        """Turn x, which is laid out like k, into out (which may be x)."""
        assert self.theta is not None
        return rotate(x, out, self.theta, self.rotary_scale, *self._key_axis, inverse=inverse)

    def descriptors(self, config: Any, rows: int, *tensors: Tensor) -> tuple[TensorDescriptor | None, ...]:
        """Of tensors laid out like q or k, for loads of [1, 1, rows, BLOCK_D]; None where config has no TMA.

        TMA wants steps of 16 bytes: a tensor that is aligned otherwise, expanded or empty is loaded through pointers.
        """
        return tuple(self._descriptor(x, rows) for x in tensors) if config.TMA else (None,) * len(tensors)

    def _descriptor(self, x: Tensor, rows: int) -> TensorDescriptor | None:
        if self.packed:
            x = x.transpose(0, 1)[None]  # (1, H, total, D)
        steps = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.numel() == 0 or x.data_ptr() % 16 or any(step == 0 or step % 16 for step in steps):
            return None
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(self.head_dim)])

    def strides(self, lse: Tensor, **like_q_or_k: Tensor) -> Strides:
        """Strides of q, k, v, of lse (batch, head), and of the tensors given by their field's name."""
        return Strides(
            q=token_strides(self.q, self.packed),
            k=token_strides(self.k, self.packed),
            v=token_strides(self.v, self.packed),
            lse=(0, lse.stride(0)) if self.packed else lse.stride()[:-1],
            **{name: token_strides(x, self.packed) for name, x in like_q_or_k.items()},
        )
