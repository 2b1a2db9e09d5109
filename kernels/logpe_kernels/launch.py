"""Launching a kernel that was launched before, without asking Triton again which compiled one it is.

Triton looks at every argument to tell, which for these kernels takes 20 us of host time. What it looks at are the
dtypes of tensors, whether they start at a multiple of 16 bytes, and the values of numbers: compiled kernels are kept
under just that, for tensors that all start so, as torch allocates them. Whatever else there is goes to Triton each
time: other addresses, tensor descriptors, the interpreter, profilers, AMD, whose compiler looks at the sizes of
tensors as well, and versions of Triton that this was not tried with. Triton's knobs count when a kernel is first
launched.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

ALIGNMENT = 16  # bytes
KNOWN = torch.version.hip is None and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
MOST_KEPT = 1024  # lengths are numbers, and change from call to call

_kept: dict[Hashable, tuple[CompiledKernel, list[Any]]] = {}


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    kind: Hashable = None,
) -> None:
    """kernel[(grid,)](*tensors, *numbers, **constants), on the current device, if the grid is not empty.

    The kernel's parameters in order are ``tensors`` (or None, tensor descriptors, tuples of those), ``numbers`` (or
    None, tuples of those; a parameter's are all of one type) and constexprs; ``constants`` are these and Triton's
    options, by name. A ``kind`` stands for the dtypes of the tensors, for which of them are None, and for the numbers,
    but for int32 values that the kernel is not specialised for.
    """
    if grid == 0:
        return
    key = None
    if type(kernel) is JITFunction and KNOWN and _addresses(tensors) % ALIGNMENT == 0:
        device = driver.active.get_current_device()
        key = kernel.fn, device, kind or (numbers, *dtypes(tensors)), *constants.values()
        kept = _kept.get(key)
        if kept is not None and not _hooked():
            compiled, constexprs = kept
            stream = driver.active.get_current_stream(device)
            # As Triton itself and PyTorch's inductor do, but for the hooks. compiled[grid](...) takes 2 us more.
            compiled.run(
                grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *tensors, *numbers, *constexprs,
            )  # fmt: skip
            return
    compiled = kernel[(grid,)](*tensors, *numbers, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]


def _hooked() -> bool:
    """Whether a profiler, say, wants to hear of launches. Triton's hooks are lists of functions."""
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True))


def _addresses(tensors: tuple[Any, ...]) -> int:
    """All addresses in one, whose low bits are those of any of them."""
    result = 0
    for x in tensors:
        if x is None:
            continue
        if isinstance(x, Tensor):
            result |= x.data_ptr()
        elif isinstance(x, tuple):
            result |= _addresses(x)
        else:
            result |= 1  # a tensor descriptor
    return result


def dtypes(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of tensors, in tuples like theirs; None where there is none."""
    return tuple(x if x is None else x.dtype if isinstance(x, Tensor) else dtypes(x) for x in tensors)
