"""Attention whose sense of position is logarithmic: train short, run long."""

from logpe.attention import log_attention, log_attention_varlen, merge_partials, rotate
from logpe.cache import KVCache, PagedKVCache
from logpe.module import LogAttention, replace_attention
from logpe.position import PRESETS, LogPosition, LogSinusoid, parameter_groups, position_parameters
from logpe.reference import PositionValues

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
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
