"""Launching a kernel that was launched before, without asking Triton again which compiled one it is.

Triton looks at every argument to tell, which for these kernels takes 20 us of host time. What it looks at are the
dtypes of tensors, whether they start at a multiple of 16 bytes, and of an integer, whether it is 1, a multiple of 16 or
longer than 32 bits: compiled kernels are kept under just that, for tensors that all start so, as torch allocates them.
So a length that was never seen before asks Triton no more than one that was. Whatever else there is goes to Triton each
time: other addresses, the interpreter, profilers, AMD, whose compiler looks at the sizes of
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
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes
KNOWN = torch.version.hip is None and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
MOST_KEPT = 1024  # numbers may be anything, and change from call to call

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

    The kernel's parameters in order are ``tensors`` (or None, tensor descriptors, tuples of those and of numbers),
    ``numbers`` (or None, tuples of those; a parameter's are all of one type) and constexprs; ``constants`` are these
    and Triton's options, by name. A ``kind`` stands for the dtypes of the tensors, for which of them are None, and for
    what the kernel is specialised for in the numbers.
    """
    if grid == 0:
        return
    if type(kernel) is not JITFunction or not KNOWN or _addresses(tensors) % ALIGNMENT != 0 or _hooked():
        kernel[(grid,)](*tensors, *numbers, **constants)
        return
    device = driver.active.get_current_device()
    rest = device, dtypes(tensors) if kind is None else None, *constants.values()
    key = kernel.fn, numbers if kind is None else kind, *rest
    kept = _kept.get(key)
    if kept is None:
        # Other numbers may have the same kernel.
        general = kernel.fn, _of_numbers(kernel, numbers) if kind is None else kind, *rest
        kept = _kept.get(general)
        if kept is None:
            compiled = kernel[(grid,)](*tensors, *numbers, **constants)
            if isinstance(compiled, CompiledKernel):
                kept = compiled, [constants[name] for name in kernel.arg_names if name in constants]
                _keep(general, kept)
            return
        _keep(key, kept)
    compiled, constexprs = kept
    # As Triton itself and PyTorch's inductor do, but for the hooks. compiled[grid](...) takes 2 us more.
    compiled.run(
        grid, 1, 1, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *tensors, *numbers, *constexprs,
    )  # fmt: skip


def _keep(key: Hashable, kept: tuple[CompiledKernel, list[Any]]) -> None:
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = kept


def specialised(x: Any, by_value: bool = True) -> Hashable:
    """Return what Triton compiles a kernel for in a number, or in each of a tuple: its type, and of an int more.

    by_value: whether it looks at the value of an int; it does so in a tuple even if the parameter is not specialised.
    """
    if isinstance(x, tuple):
        return tuple(map(specialised, x))
    if not isinstance(x, int):
        return x.__class__.__name__
    size = "int32" if -(2**31) <= x < 2**31 else "int64" if x < 2**63 else "uint64"
    return (size, x == 1, x % ALIGNMENT == 0) if by_value else size


def _of_numbers(kernel: JITFunction, numbers: tuple[Any, ...]) -> Hashable:
    """Return what Triton compiles a kernel for in its numbers, the last of its parameters before the constexprs."""
    parameters = [x for x in kernel.params if not x.is_constexpr]
    by_value = [not x.do_not_specialize for x in parameters[len(parameters) - len(numbers) :]]
    return tuple(map(specialised, numbers, by_value))


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
        elif isinstance(x, TensorDescriptor):
            result |= x.base.data_ptr()
        elif isinstance(x, tuple):
            result |= _addresses(x)
    return result


def dtypes(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the dtypes of tensors, in tuples like theirs; of a descriptor also its block; None where there is none.

    Of a number among them, what Triton compiles for in it.
    """

    def of(x: Any) -> Any:
        if x is None or isinstance(x, Tensor):
            return x if x is None else x.dtype
        if isinstance(x, (int, float)):
            return specialised(x)
        return (x.base.dtype, *x.block_shape) if isinstance(x, TensorDescriptor) else dtypes(x)

    return tuple(map(of, tensors))
