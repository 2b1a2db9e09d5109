"""What a call asks for, brought into the form that the kernels take. Shared by the launchers.

A model makes the same call again and again: what follows from the layouts of tensors and from options alone is worked
out once, and kept as Sizes.
"""

import functools
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Traits, log2_length, padded
from .launch import dtypes, specialised
from .options import MAX_HEAD_DIM, NUM_TENSORS, Options
from .position import Parameters
from .rotation import rotate
from .tile import Dropout, Layer, Sequences, Strides

#: Kernel arguments whose value must not lead to a new compilation: lengths change from call to call.
RUNTIME_INTEGERS = ["num_queries", "num_keys", "total_queries", "total_keys", "query_start", "key_start"]
MIN_PAGE_SIZE = 16
FARTHEST = 2**30  # window, in tokens: a position plus or minus it stays an int32
MOST_KINDS = 1024  # kept: lengths are among what makes a kind, and may change from call to call


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


class Sizes:
    """What calls share that differ in the values of their tensors and the positions of the first tokens. No tensors."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
    ) -> None:
        cu_seqlens_q, dropout_p = options.cu_seqlens_q, options.dropout_p
        self.packed = cu_seqlens_q is not None
        self.batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.heads, self.kv_heads, self.head_dim = q.shape[1], k.shape[1], q.shape[-1]
        self.num_queries, self.num_keys = q.shape[-2], k.shape[-2]
        if self.packed:
            self.num_queries, self.num_keys = options.max_seqlen_q, options.max_seqlen_k
        self.total_queries = q.shape[0] if self.packed else 0
        if options.block_table is not None:
            self.num_keys = options.block_table.shape[1] * k.shape[2]
            if self.packed or options.theta is not None or dropout_p > 0:
                raise ValueError("a block_table goes without cu_seqlens, without theta and without dropout")
            if k.shape[2] < MIN_PAGE_SIZE or k.shape[2] & (k.shape[2] - 1) != 0:
                raise ValueError(f"page_size must be a power of two from {MIN_PAGE_SIZE} on, got {k.shape[2]}")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, got {self.head_dim}")
        self.traits = Traits(
            q.device,
            q.element_size(),
            self.head_dim,
            power=options.power is not None,
            sharpness=options.sharpness is not None,
            alpha=options.alpha is not None,
            key_bias=options.key_bias is not None,
            causal=options.window_right == 0,
            log2_length=log2_length(self.num_queries, self.num_keys),
        )
        self.dropout = int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)  # threshold, scale
        lengths = self.num_queries, self.num_keys, self.total_queries, k.shape[0] if self.packed else 0
        window = [None if side is None else min(side, FARTHEST) for side in (options.window_left, options.window_right)]
        if max(lengths) >= 2**31:
            raise ValueError(f"there may be up to 2^31 - 1 tokens, got {max(lengths)}")
        heads = self.heads, self.heads // self.kv_heads
        layer = Layer(float(options.scale), float(options.gain_length), *heads, *window)
        self.numbers = layer, *lengths  # in the order of the kernels' parameters
        self.fixed = specialised(layer)
        rows = self.heads * self.num_queries
        self.lse_layout = (self.batch, self.heads, self.num_queries), (rows, self.num_queries, 1)  # shape, strides
        self.strides: Strides | None = None  # of the forward pass, once there was one, and
        self.compiled_kind: Hashable = None  # that of the kernels compiled for it, which are not compiled for lengths


_sizes: dict[Hashable, Sizes] = {}


def sizes_of(q: Tensor, k: Tensor, v: Tensor, kind: Hashable, options: Options) -> Sizes:
    """The Sizes of a call, kept under its kind: without one, under all that they are made of, and the dtypes."""
    kind = kind or (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
        *[None if x is None else (x.shape, x.dtype) for x in options[:NUM_TENSORS]], options[NUM_TENSORS + 2 :],
    )  # fmt: skip
    found = _sizes.get(kind)
    if found is None:
        found = Sizes(q, k, v, options)
        if len(_sizes) >= MOST_KINDS:
            _sizes.clear()
        _sizes[kind] = found
    return found


@functools.lru_cache(MOST_KINDS)
def _one_object_for(*equal: Hashable) -> object:
    return object()


_position, _sequences = operator.attrgetter(*Parameters._fields), operator.attrgetter(*Sequences._fields)


class Problem:
    """One call: its sizes, its tensors (turned, where there is a rotation), and the numbers that all kernels share.

    kind: stands for the layouts and dtypes of all tensors and for ``options`` but the starts; a caller that knows it
    saves looking at them.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        kind: Hashable = None,
    ) -> None:
        query_start, key_start = options.query_start, options.key_start
        if not (-(2**31) <= query_start < 2**31 and -(2**31) <= key_start < 2**31):
            raise ValueError(f"query_start and key_start must be int32, got {query_start} and {key_start}")
        self.sizes = sizes = sizes_of(q, k, v, kind, options)
        self.q, self.k, self.v = q, k, v
        self.parameters = Parameters(*_position(options))
        self.sequences = Sequences(*_sequences(options))
        self.block_table = options.block_table
        self.dropout = Dropout(options.dropout_seed, *sizes.dropout) if options.dropout_p > 0 else None
        self.tensors = self.parameters, self.sequences, self.dropout
        self.numbers = *sizes.numbers, query_start, key_start
        self.theta = options.theta
        if self.theta is not None:
            self.rotary_scale = options.rotary_scale
            self._query_axis = self.sequences.cu_seqlens_q, self.sequences.query_starts, query_start, sizes.num_queries
            self._key_axis = self.sequences.cu_seqlens_k, self.sequences.key_starts, key_start, sizes.num_keys
            self.q = self.rotate_queries(q, new_output(q, sizes.packed))
            self.k = self.rotate_keys(k, new_output(k, sizes.packed))

    def complete_sizes(self, out: Tensor) -> None:
        """Once, from the first call of a kind: what the layouts of its outputs decide."""
        sizes = self.sizes
        strides, tensors = self.strides(out=out), (self.q, self.k, self.v, *self.tensors, self.block_table)
        sizes.compiled_kind = _one_object_for(specialised(strides), sizes.fixed, dtypes(tensors))
        sizes.strides = strides

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
        if self.sizes.packed:
            x = x.transpose(0, 1)[None]  # (1, H, total, D)
        steps = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.numel() == 0 or x.data_ptr() % 16 or any(step == 0 or step % 16 for step in steps):
            return None
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(self.sizes.head_dim)])

    def strides(self, **like_q_or_k: Tensor) -> Strides:
        """Strides of q, k, v, and of the tensors given by their field's name."""
        packed = self.sizes.packed
        return Strides(
            q=token_strides(self.q, packed),
            k=token_strides(self.k, packed),
            v=token_strides(self.v, packed),
            **{name: token_strides(x, packed) for name, x in like_q_or_k.items()},
        )
