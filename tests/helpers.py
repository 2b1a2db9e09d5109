"""Calls of log_attention with random inputs, and the comparison with float64 that all kernel tests share."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from logpe_kernels.options import LEARNABLE_PARTS
from torch import Tensor

from logpe import PRESETS, LogPosition, PositionValues, log_attention, log_attention_varlen

RESULTS = Path(__file__).parents[1] / "bench" / "results"
PARAMETERS = LEARNABLE_PARTS
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Call:
    """A call of log_attention, or with ``lengths`` of log_attention_varlen, and the cotangents of its results.

    values are leaves: those that require a gradient are the learned ones. dlse None: only out is differentiated.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    values: PositionValues
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor | None
    lengths: tuple[Tensor, Tensor] | None = None  # of the queries and of the keys of each packed sequence

    def replace(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)


def presets_of(head_dim: int) -> list[str]:
    """Return the presets that have a plane to rotate in such a head, or rotate nothing."""
    least = {"log-rotary": 2, "log-rotary-bias": 2, "log-bias-rope": 4}
    return [preset for preset in PRESETS if head_dim >= least.get(preset, 1)]


def make_values(
    heads: int, head_dim: int, preset: str = "log-bias", *, learnable: Any = True, device: Any = None, **options: Any
) -> PositionValues:
    """Return the values of a LogPosition as leaves, drawn so that every part matters at some tens of tokens."""
    position = LogPosition(heads, head_dim, preset, learnable=learnable, device=device, **options)
    with torch.no_grad():
        for name in PARAMETERS:
            if getattr(position, f"raw_{name}") is not None:
                getattr(position, f"raw_{name}").uniform_(-2, 1)  # 0.13 to 1.3
    leaves = {}
    for name in PARAMETERS:
        value = getattr(position, name)
        if value is not None:
            leaves[name] = value.detach().requires_grad_(getattr(position, f"raw_{name}").requires_grad)
    return position()._replace(**leaves)


def make_call(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    num_queries: int = 40,
    num_keys: int | None = None,
    head_dim: int = 16,
    *,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    values: PositionValues | None = None,
    preset: str = "log-bias",
    query_gain: bool = False,
    lse_gradient: bool = True,
    **options: Any,
) -> Call:
    """Return a dense call on normal inputs, with ``values`` or else a fresh draw for ``preset``.

    value_dim: of v and the output; by default head_dim.
    """
    kv_heads, num_keys = kv_heads or heads, num_queries if num_keys is None else num_keys
    value_dim = value_dim or head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if values is None:
        values = make_values(heads, head_dim, preset, query_gain=query_gain, device=device)
    return Call(
        normal(batch, heads, num_queries, head_dim),
        normal(batch, kv_heads, num_keys, head_dim),
        normal(batch, kv_heads, num_keys, value_dim),
        values,
        options,
        normal(batch, heads, num_queries, value_dim),
        torch.randn(batch, heads, num_queries, device=device) if lse_gradient else None,
    )


def make_packed_call(
    lengths_q: list[int], lengths_k: list[int], *, outside: int = 0, device: Any = None, **arguments: Any
) -> Call:
    """Return a packed call of sequences of these lengths, followed by ``outside`` tokens that belong to none."""
    total_q, total_k = sum(lengths_q) + outside, sum(lengths_k) + outside
    call = make_call(1, num_queries=total_q, num_keys=total_k, device=device, **arguments)
    q, k, v, dout = (x[0].transpose(0, 1).contiguous() for x in (call.q, call.k, call.v, call.dout))
    lengths = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths_q, lengths_k))
    dlse = None if call.dlse is None else call.dlse[0]
    return call.replace(q=q, k=k, v=v, dout=dout, dlse=dlse, lengths=lengths)


def run(call: Call, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return out, lse and the gradients dq, dk, dv, dpower, ... of what requires one.

    dtype: of the tensors, if not that of the call; with float64 the position and the cotangents are float64 too.
    """
    dtype = dtype or call.q.dtype

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype).requires_grad_()

    def wide(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if dtype == torch.float64 else x

    inputs = {"dq": leaf(call.q), "dk": leaf(call.k), "dv": leaf(call.v)}
    values = call.values._replace(
        **{name: wide(x) for name in PARAMETERS if (x := getattr(call.values, name)) is not None}
    )
    options = dict(call.options, backend=backend, return_lse=True)
    if call.lengths is None:
        out, lse = log_attention(*inputs.values(), values, **options)
    else:
        bounds = [torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in call.lengths]
        longest = [int(x.max()) if len(x) else 0 for x in call.lengths]
        out, lse = log_attention_varlen(*inputs.values(), values, *bounds, *longest, **options)
    for name in PARAMETERS:
        x = getattr(values, name)
        if x is not None and x.requires_grad:
            inputs[f"d{name}"] = x
    results, cotangents = [out], [call.dout.to(out.dtype)]
    if call.dlse is not None:
        results.append(lse)
        cotangents.append(call.dlse.to(lse.dtype))
    gradients = torch.autograd.grad(results, list(inputs.values()), cotangents, materialize_grads=True)
    outcome: dict[str, Tensor] = {"out": out.detach(), "lse": lse.detach()}
    outcome.update(zip(inputs, gradients, strict=True))
    return outcome


class Reference:
    """The float64 results of a call, and the bounds on how far from them each result may be.

        max |actual - exact|  <=  factor * max |eager - exact| + eps(dtype) * size,    size = max |exact|

    with factor 1.1 for float16 and bfloat16, and 2 for float32, where both errors are the noise of one order of
    summation or another. Infinite values must agree exactly, and nothing may be NaN.

    Eager rounds to the input dtype: q and k after the rotation, the product q k^T, the weights before they meet
    v, and out; on the way back dout v^T, the weights' gradient, and dq, dk and dv before and after the inverse
    rotation. Scale, gain, bias, softmax and lse are float32, but made of rounded products; so are the gradients
    of the position's parameters, which is why their bound, too, goes by the dtype of the inputs.

    One draw of a few tokens is no statistic, so a single call is given four allowances (test_kernels also pools
    the errors of many draws, and there it needs none):

    * g = P (dP - delta + dlse) is a difference, and its rounding goes by the size of its terms: dq and dk of a
      query that sees one key are nothing else. So size is at least that of the gradient with nothing cancelled,
      for dout = 0 and dlse = |dlse| + |dout| |v| / sqrt(Dv); in float32 that of the parameters too, where the
      errors of the rows add up as a random walk does.
    * Eager forms the weights once. The kernels form them again in the backward, from a float32 lse, with a
      relative error of eps * |lse|: in float32 size is taken 2 (1 + max |lse|) times; in half precision, where it
      shows if scores are in the thousands, 2 max |lse| times float32's eps is added to the eps of the dtype.
    * A logit is a sum of D products and a bias, which may cancel: in float32 the size of lse is at least that of the
      products, scale max |q| max |k|.
    * The gradient of a parameter is one number per head, and eager's may be right by luck. In half precision its
      error is the largest of four, at inputs that differ in the last bit, and at least 2.5 times their root mean
      square: of two heads, eight errors are few.
    """

    def __init__(self, call: Call) -> None:
        dtype = call.q.dtype
        self.exact = run(call, "reference", torch.float64)
        draws = [(run(call, "reference"), self.exact)]
        if dtype in HALF and any(x is not None and x.requires_grad for x in call.values[:4]):
            for _ in range(3):
                near = call.replace(**{name: _moved(getattr(call, name)) for name in ("q", "k", "v", "dout")})
                draws.append((run(near, "reference"), run(near, "reference", torch.float64)))
        uncancelled = _uncancelled(call)
        rows = call.q.numel() / (call.q.shape[-1] * call.q.shape[1]) if call.q.numel() else 1
        largest_lse = _largest(self.exact["lse"])
        self.factor, self.eps = (1.1 if dtype in HALF else 2.0), torch.finfo(dtype).eps
        self.eager, self.size = {}, {}
        for name, exact in self.exact.items():
            parameter = name[1:] in PARAMETERS
            differences = [a[name] - b[name] for a, b in (draws if parameter else draws[:1])]
            errors = [_largest(x) for x in differences]
            if len(errors) > 1:
                errors.append(2.5 * float(torch.stack(differences).square().mean().sqrt()))
            size = _largest(exact)
            if name in ("dq", "dk"):
                size = max(size, _largest(uncancelled[name]))
            if dtype == torch.float32:
                if parameter:
                    size = max(size, _largest(uncancelled[name]) / rows**0.5)
                size *= 2 * (1 + largest_lse)
                if name == "lse":
                    size = max(size, _largest_product(call))
            elif dtype in HALF:
                size *= 1 + 2 * largest_lse * torch.finfo(torch.float32).eps / self.eps
            self.eager[name], self.size[name] = max(errors), size

    def check(self, actual: Mapping[str, Tensor]) -> None:
        """Assert that these results of :func:`run` are within the bounds."""
        assert actual.keys() == self.exact.keys()
        for name, exact in self.exact.items():
            x = actual[name]
            assert x.shape == exact.shape, name
            infinite = ~exact.isfinite()
            assert torch.equal(x[infinite].double(), exact[infinite]), f"{name}: {x[infinite]} is not -inf"
            assert x[~infinite].isfinite().all(), f"{name} holds {x[~infinite & ~x.isfinite()]}"
            error, bound = _largest(x - exact), self.factor * self.eager[name] + self.eps * self.size[name]
            assert error <= bound, (
                f"{name}: error {error:.3g}, above {bound:.3g} = {self.factor} * {self.eager[name]:.3g} (eager) + "
                f"{self.eps:.3g} * {self.size[name]:.3g} (size)"
            )


def check(call: Call, backend: str = "triton") -> dict[str, Tensor]:
    """Run a call on ``backend``, compare it with the float64 reference, and return the results."""
    actual = run(call, backend)
    assert actual["out"].dtype == call.q.dtype
    Reference(call).check(actual)
    return actual


def _largest(x: Tensor) -> float:
    """Return the largest finite magnitude, 0 where there is none."""
    return float(x.double().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


def _largest_product(call: Call) -> float:
    """Return scale times the largest norms of a query and of a key: no scaled product exceeds it."""
    q, k = (_largest(x.double().nan_to_num(0, 0, 0).norm(dim=-1)) for x in (call.q, call.k))
    scale = call.options.get("scale")
    return q * k * (call.q.shape[-1] ** -0.5 if scale is None else abs(scale))


def _moved(x: Tensor) -> Tensor:
    """Move each value of x about one unit in the last place up or down; the layout stays."""
    step = torch.randint(-1, 2, x.shape, device=x.device) * torch.finfo(x.dtype).eps
    return (x.detach().double() * (1 + step)).to(x.dtype)


def _uncancelled(call: Call) -> dict[str, Tensor]:
    """Return float64 gradients for cotangents so large and of one sign that dP - delta does not cancel."""
    rows = call.dout.double().nan_to_num(0, 0, 0).norm(dim=-1)
    if call.lengths is not None:
        rows = rows.T  # (heads, total)
    keep = 1 - call.options.get("dropout_p", 0.0)
    rows = rows * _largest(call.v.double().nan_to_num(0, 0, 0).norm(dim=-1)) / call.v.shape[-1] ** 0.5 / keep
    if call.dlse is not None:
        rows = rows + call.dlse.double().nan_to_num(0, 0, 0).abs()
    return run(call.replace(dout=torch.zeros_like(call.dout), dlse=rows), "reference", torch.float64)


def status_of(main: Callable[..., int], *arguments: Any) -> Any:
    """Return the exit status of a program, which argparse raises where it refuses an option itself."""
    try:
        return main(*arguments)
    except SystemExit as refused:
        return refused.code


def run_processes(file: str, world: int, *arguments: Any, **environment: str) -> None:
    """Run a test file as a program in ``world`` processes, ``file RANK ARGUMENTS...``, and check that all end well."""
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | environment
    workers = [
        subprocess.Popen(
            [sys.executable, file, str(rank), *map(str, arguments)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
