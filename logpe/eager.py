"""The private doors of torch: past the dispatcher, where nobody watches operators.

The way of some thirty arguments into C++ and back, twice, takes longer than all the rest of a call's host time. A
version of torch without these doors gets the public way: the operator, for every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

#: A context in which operators have no derivative: the implementation of an operator's derivative needs it.
below_autograd = torch._C._AutoDispatchBelowAutograd
_PLAIN = (Tensor, torch.nn.Parameter)

try:
    _is_transforming = torch._C._are_functorch_transforms_active
    _is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # left over from a functional transform
    _num_dispatch_modes = torch._C._len_torch_dispatch_stack
    _tracing_state = torch._C._get_tracing_state
    known = isinstance(forward_ad._current_level, int)
except AttributeError:
    known = False


def transforming() -> bool:
    """Whether a transform of torch.func runs (grad, vjp, jvp, vmap, ...), as far as torch lets us know."""
    return known and not torch.compiler.is_compiling() and _is_transforming()


def tracing() -> bool:
    """Whether torch.jit.trace records the call."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def forward_mode() -> bool:
    """Whether forward-mode differentiation runs, as far as torch lets us know."""
    return known and forward_ad._current_level >= 0


def observed() -> bool:
    """Whether somebody wants to see operators: compiler, tracer, functional transform, dispatch mode, forward AD."""
    return (
        not known
        or torch.compiler.is_compiling()
        or _tracing_state() is not None
        or _num_dispatch_modes() > 0
        or _is_transforming()
        or forward_mode()
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are no subclasses, no lazy views, and not left over from a functional transform."""
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or _is_wrapped(x) or x.is_neg():
            return False
    return True


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """Return function.apply without its questions after functional transforms, which take 2 us.

    It is for calls that are not :func:`observed`, on tensors that are :func:`plain`.
    """
    return super(Function, function).apply  # type: ignore[misc]
