"""The private doors of Triton: launching a kernel again without asking Triton which compiled one it is.

Triton looks at every argument to tell, which for these kernels takes 20 us of host time. It looks at the dtypes of
tensors, at whether they start at a multiple of 16 bytes, and at numbers. Calls of one layout share all of these, where
their tensors start as torch allocates them. Everything else goes to Triton each time, the public way: other addresses,
the interpreter, profilers, AMD, whose compiler looks at the sizes of tensors as well, and versions of Triton that this
was not tried with. Triton's knobs count when a kernel is first launched.
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


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    kernels: dict[Hashable, Any],
    variant: Hashable = None,
) -> None:
    """Do kernel[(grid,)](*tensors, *numbers, **constants), on the current device, if the grid is not empty.

    The kernel's parameters in order are ``tensors`` (or None, tensor descriptors, tuples of those and of numbers),
    ``numbers`` (or None, tuples of those) and constexprs; ``constants`` are these and Triton's options, by name.
    ``kernels`` holds what was compiled for calls of one layout; ``variant`` tells apart what else Triton compiles for
    in one kernel of theirs.
    """
    if grid == 0:
        return
    if not isinstance(kernel, JITFunction) or not KNOWN or _addresses(tensors) % ALIGNMENT != 0 or _hooked():
        kernel[(grid,)](*tensors, *numbers, **constants)
        return
    device = driver.active.get_current_device()
    key = kernel.fn, device, variant
    known = kernels.get(key)
    if known is None:
        compiled = kernel[(grid,)](*tensors, *numbers, **constants)
        if isinstance(compiled, CompiledKernel):
            kernels[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]
        return
    compiled, constexprs = known
    # As Triton itself and PyTorch's inductor do, but for the hooks. compiled[grid](...) takes 2 us more.
    compiled.run(
        grid, 1, 1, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *tensors, *numbers, *constexprs,
    )  # fmt: skip


def _hooked() -> bool:
    """Whether a profiler, say, wants to hear of launches. Triton's hooks are lists of functions."""
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True))


def _addresses(tensors: tuple[Any, ...]) -> int:
    """Return all addresses in one, whose low bits are those of any of them."""
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
    """Return the dtypes of tensors, in tuples like theirs; of a descriptor also its block; None where there is none."""

    def of(x: Any) -> Any:
        if x is None or isinstance(x, Tensor):
            return x if x is None else x.dtype
        return (x.base.dtype, *x.block_shape) if isinstance(x, TensorDescriptor) else dtypes(x)

    return tuple(map(of, tensors))
