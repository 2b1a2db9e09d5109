"""Attention whose sense of position is logarithmic: train short, run long.

The shapes in docstrings are made of these letters:

    B        sequences in a batch
    Hq       query heads
    Hkv      heads of keys and values; query head h reads key head h // (Hq // Hkv)
    H        heads, where only one number of them matters
    Nq, Nk   queries and keys of a sequence
    N        tokens of a sequence
    total    tokens of all sequences together, packed one after the other; total_q and total_k where they differ
    D        size of a head, head_dim
    Dv       the same of v and the output, where it may differ from that of q and k
"""

from typing import TYPE_CHECKING, Any

from logpe.attention import log_attention, log_attention_varlen, merge_partials, rotate
from logpe.cache import KVCache, PagedKVCache
from logpe.distributed import ContextParallel
from logpe.module import HeadSink, LogAttention, replace_attention
from logpe.position import PRESETS, LogPosition, LogSinusoid, parameter_groups, position_parameters
from logpe.reference import PositionValues

if TYPE_CHECKING:
    from logpe.tensor_parallel import HeadParallel

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ContextParallel",
    "HeadParallel",
    "HeadSink",
    "KVCache",
    "LogAttention",
    "LogPosition",
    "LogSinusoid",
    "PagedKVCache",
    "PositionValues",
    "log_attention",
    "log_attention_varlen",
    "merge_partials",
    "parameter_groups",
    "position_parameters",
    "replace_attention",
    "rotate",
]


def __getattr__(name: str) -> Any:
    """Import what takes a while when it is first asked for."""
    if name == "HeadParallel":
        from logpe.tensor_parallel import HeadParallel

        return HeadParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
