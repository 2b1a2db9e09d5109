"""Triton kernels for attention with log positions: tensors in, tensors out. Needs torch and triton alone.

The letters of shapes:

    B   sequences              Hq   query heads    Nq   queries of a sequence    D   head_dim of q and k
                               Hkv  key heads      Nk   keys of a sequence       Dv  head_dim of v

Hq is a multiple of Hkv: query head h attends to key head h // (Hq / Hkv). H and N stand for those of either side. In
packed tensors, (total, H, D), sequences of any length lie one after the other.

The functions are imported on first use, since options are needed where there is no triton, too. They are named like
the operators of logpe, and not like their modules, whose import would put a module in place of a function.
"""

from importlib import import_module
from typing import Any

from .options import Options

__all__ = ["Options", "attention", "attention_backward", "rotate"]  # __getattr__ has them
_MODULES = {"attention": "forward", "attention_backward": "backward", "rotate": "rotation"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
