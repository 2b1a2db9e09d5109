"""Launching a kernel that was launched before, without asking Triton again which compiled one it is.

Triton looks at every argument to tell, which for these kernels takes 20 us of host time. What it looks at are the dtypes
of tensors, whether they start at a multiple of 16 bytes, and the values of numbers: compiled kernels are kept under
just that, for tensors that all start so, as torch allocates them. Whatever else there is goes to Triton each time:
other addresses, tensor descriptors, the interpreter, and AMD, whose compiler looks at the sizes of tensors as well.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

ALIGNMENT = 16  # bytes
MOST_KEPT = 1024  # lengths are numbers, and change from call to call

_kept: dict[Hashable, tuple[CompiledKernel, list[Hashable]]] = {}


def launch(kernel: Any, grid: int, tensors: tuple[Any, ...], numbers: tuple[Hashable, ...], **constants: Any) -> None:
    """kernel[(grid,)](*tensors, *numbers, **constants), on the current device, if the grid is not empty.

    The kernel's parameters in order are ``tensors`` (or None, tensor descriptors, tuples of those), ``numbers`` (or
    None, tuples of those) and constexprs; ``constants`` are these and Triton's options, by name.
    """
    if grid == 0:
        return
    dtypes: list[Any] = []
    key = None
    if type(kernel) is JITFunction and not torch.version.hip and _addresses(tensors, dtypes) % ALIGNMENT == 0:
        device = driver.active.get_current_device()
        key = kernel.fn, device, *dtypes, numbers, *constants.values()
        if (kept := _kept.get(key)) is not None:
            compiled, constexprs = kept
            stream = driver.active.get_current_stream(device)
            compiled[grid, 1, 1](*tensors, *numbers, *constexprs, stream=stream)
            return
    compiled = kernel[(grid,)](*tensors, *numbers, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):
        if len(_kept) == MOST_KEPT:
            _kept.clear()
        _kept[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]


def _addresses(tensors: tuple[Any, ...], dtypes: list[Any]) -> int:
    """All addresses in one, whose low bits are those of any of them; collects the dtypes."""
    result = 0
    for x in tensors:
        if x is None:
            dtypes.append(None)
        elif isinstance(x, Tensor):
            dtypes.append(x.dtype)
            result |= x.data_ptr()
        elif isinstance(x, tuple):
            result |= _addresses(x, dtypes)
        else:
            result |= 1  # a tensor descriptor
    return result
