"""What calls of one layout share, worked out once: the only memory of calls.

A model makes the same call again and again. All that follows from the layouts of its tensors and from its numbers is
in a :class:`Plan`, which holds no tensor. A slow, plain path makes it and raises what is wrong; later calls find it by
their :func:`call_key`. With LOGPE_PLAN=0 in the environment nothing is remembered: then every call is checked, and
every launch goes through Triton.
"""

import operator
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .configs import Traits, log2_length, padded
from .options import MAX_HEAD_DIM, NUM_LEARNABLE, NUM_TENSORS, Options, new_output
from .position import Parameters
from .tile import Dropout, Layer, Sequences, Strides, in_units

#: Kernel arguments whose value must not lead to a new compilation: lengths change from call to call.
RUNTIME_INTEGERS = ["num_queries", "num_keys", "total_queries", "total_keys", "query_start", "key_start"]
MIN_PAGE_SIZE = 16
FARTHEST = 2**30  # window, in tokens: a position plus or minus it stays an int32
MOST_PLANS = 1024  # lengths are part of a key, and may change from call to call

Made = TypeVar("Made")
enabled = os.environ.get("LOGPE_PLAN", "1") != "0"
_plans: dict[Hashable, Any] = {}
_lock = threading.RLock()


def call_key(tensors: Iterable[Tensor | None], *rest: Hashable) -> Hashable:
    """Return what a plan is found by, the layouts of the tensors and the rest; None: it will not be remembered."""
    if not enabled:
        return None
    try:
        layouts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    except RuntimeError:  # nested and sparse tensors have no shape or no strides
        return None
    return *layouts, *configs.overrides.items(), *rest


def get(key: Hashable) -> Any:
    """Return what is remembered under a key, or None."""
    return _plans.get(key)


def find(key: Hashable, make: Callable[[], Made]) -> Made:
    """Return what is remembered under a key; if there is nothing yet, make it, once for all threads that ask."""
    if key is None:
        return make()
    known = _plans.get(key)
    if known is None:
        with _lock:
            known = _plans.get(key)
            if known is None:
                known = make()
                if len(_plans) >= MOST_PLANS:
                    _plans.clear()
                _plans[key] = known
    return known


def count() -> int:
    """Return how many plans are remembered."""
    return len(_plans)


def clear() -> None:
    """Forget all plans, and what was read of devices and of files of configurations."""
    _plans.clear()
    configs.forget()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. triton.cdiv, which serves kernels too, takes 3 us on the host."""
    return -(-a // b)


_sequences = operator.attrgetter(*Sequences._fields)


class Plan:
    """What calls share that differ in the values of their tensors and the positions of the first tokens.

    kernels: the compiled ones, see :func:`launch`. options: those of the call that it was made for, without tensors.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        cu_seqlens_q, dropout_p = options.cu_seqlens_q, options.dropout_p
        self.packed = cu_seqlens_q is not None
        self.batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.head_dim, self.value_dim = q.shape[-1], v.shape[-1]
        self.widest = max(self.head_dim, self.value_dim)  # its tiles fit: the other takes no more memory
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
        for name in ("head_dim", "value_dim"):
            if not 1 <= getattr(self, name) <= MAX_HEAD_DIM:
                raise ValueError(f"{name} must be from 1 to {MAX_HEAD_DIM}, got {getattr(self, name)}")
        self.traits = Traits(
            q.device,
            q.element_size(),
            self.widest,
            wide_values=padded(self.value_dim) >= 4 * padded(self.head_dim),
            power=options.power is not None,
            sharpness=options.sharpness is not None,
            alpha=options.alpha is not None,
            key_bias=options.key_bias is not None,
            causal=options.window_right == 0,
            log2_length=log2_length(self.num_queries, self.num_keys),
        )
        self._dropout = int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)  # threshold, scale
        lengths = self.num_queries, self.num_keys, self.total_queries, k.shape[0] if self.packed else 0
        if max(lengths) >= 2**31:
            raise ValueError(f"there may be up to 2^31 - 1 tokens, got {max(lengths)}")
        window = [None if side is None else min(side, FARTHEST) for side in (options.window_left, options.window_right)]
        heads = self.heads, self.heads // self.kv_heads
        self._numbers = Layer(float(options.scale), float(options.gain_length), *heads, *window), *lengths
        rows = self.heads * self.num_queries
        self.lse_layout = (self.batch, self.heads, self.num_queries), (rows, self.num_queries, 1)  # shape, strides
        like_q, like_k = (torch.empty_like(x, device="meta") for x in (q, k))  # as q and k are after a rotation
        q, k = (q, k) if options.theta is None else (like_q, like_k)
        self.strides = self.strides_of(q=q, k=k, v=v, out=new_output(like_q, False, self.value_dim))
        self.options = Options._make((*(None,) * NUM_TENSORS, *options[NUM_TENSORS:]))
        self.kernels: dict[Hashable, Any] = {}
        self._once: dict[Hashable, Any] = {}

    def numbers(self, options: Options) -> tuple[Any, ...]:
        """Return the numbers that all kernels of a call take, in the order of their parameters."""
        query_start, key_start = options.query_start, options.key_start
        if not (-(2**31) <= query_start < 2**31 and -(2**31) <= key_start < 2**31):
            raise ValueError(f"query_start and key_start must be int32, got {query_start} and {key_start}")
        return *self._numbers, query_start, key_start

    def shared(self, options: Options) -> tuple[Parameters, Sequences, Dropout | None]:
        """Return the tensors that all kernels of a call take, in the order of their parameters."""
        dropout = Dropout(options.dropout_seed, *self._dropout) if options.dropout_p > 0 else None
        return Parameters(*options[:NUM_LEARNABLE]), Sequences(*_sequences(options)), dropout

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned in the first call with this name."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def tiles(self, kernel: str) -> tuple[Any, dict[str, Any]]:
        """Return the configuration of a kernel, and the constants of its launch."""

        def look_up() -> tuple[Any, dict[str, Any]]:
            config = configs.lookup(kernel, self.traits)
            return config, self.constants(config)

        return self.once(kernel, look_up)

    def constants(self, config: Any) -> dict[str, Any]:
        """Return the constexprs of a kernel that is launched with a configuration, and Triton's options."""
        return dict(
            HEAD_DIM=self.head_dim,
            VALUE_DIM=self.value_dim,
            enable_fp_fusion=True,  # a * b + c in one instruction; Triton 3.10 no longer does so by default
            **config.launch(),
        )

    def strides_of(self, **tensors: Tensor) -> Strides:
        """Return (batch, head, token) strides by name; the batches of packed (total, H, D) are rows apart."""
        if self.packed:
            return Strides(**{name: in_units((0, x.stride(1), x.stride(0))) for name, x in tensors.items()})
        return Strides(**{name: in_units(x.stride()[:3]) for name, x in tensors.items()})

    def descriptors(self, config: Any, rows: int, *tensors: Tensor) -> tuple[TensorDescriptor | None, ...]:
        """Return descriptors of tensors (B, H, N, D) for loads of [1, 1, rows, padded(D)]; None if config has no TMA.

        TMA wants steps of 16 bytes: a tensor that is aligned otherwise, expanded or empty is loaded through pointers.
        """
        return tuple(self.descriptor(x, rows) for x in tensors) if config.TMA else (None,) * len(tensors)

    def descriptor(self, x: Tensor, rows: int) -> TensorDescriptor | None:
        """Return the descriptor of one tensor, as :meth:`descriptors` does with TMA."""
        if self.packed:
            x = x.transpose(0, 1)[None]  # (1, H, total, D)

        def layout() -> tuple[list[int], ...] | None:
            steps = [stride * x.element_size() for stride in x.stride()[:-1]]
            if x.numel() == 0 or any(step == 0 or step % 16 for step in steps):
                return None
            return list(x.shape), list(x.stride()), [1, 1, rows, padded(x.shape[-1])]

        described = self.once((x.shape, x.stride(), rows), layout)
        return None if described is None or x.data_ptr() % 16 else TensorDescriptor(x, *described)


def plan_of(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Plan:
    """Return the plan of a call of the kernels, whose checks are those of :class:`Plan`."""
    key = call_key((q, k, v, *options[:NUM_TENSORS]), options[NUM_TENSORS + 2 :])  # without the starts
    return find(key, lambda: Plan(q, k, v, options))
