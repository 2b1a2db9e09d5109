"""Triton kernels for attention with log positions: tensors in, tensors out. Needs torch and triton alone."""

from .backward import backward
from .forward import forward
from .rotation import rotate

__all__ = ["backward", "forward", "rotate"]
