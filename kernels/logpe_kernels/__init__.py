"""Triton kernels for attention with log positions: tensors in, tensors out. Needs torch and triton alone.

The letters of shapes:

    B   sequences              Hq   query heads    Nq   queries of a sequence    D   head_dim
                               Hkv  key heads      Nk   keys of a sequence

Hq is a multiple of Hkv: query head h attends to key head h // (Hq / Hkv). H and N stand for those of either side. In
packed tensors, (total, H, D), sequences of any length lie one after the other.
"""

from .backward import backward
from .forward import forward
from .rotation import rotate

__all__ = ["backward", "forward", "rotate"]
