"""Test LogPosition: its initial values, casting, moving, saving and loading, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import logpe
from logpe import LogPosition, LogSinusoid, PositionValues, log_attention, parameter_groups, position_parameters
from logpe.position import inverse_softplus

PARTS = {
    "none": (),
    "alibi": ("power",),
    "log-bias": ("power", "rate"),
    "log-bias-rope": ("power", "rate", "theta"),
    "log-invariant": ("power", "rate", "sharpness"),
    "log-rotary": ("theta",),
    "log-rotary-bias": ("power", "rate", "theta"),
}
THETA = {"log-bias-rope": [1, 30**-0.5]}  # of a head of 8, where not the other presets'


def raw_names(position: LogPosition) -> list[str]:
    return [name for name, _ in position.named_parameters()]


# --- presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_gain", [False, True])
@pytest.mark.parametrize("preset", logpe.PRESETS)
def test_a_preset_has_its_parts_and_no_others(preset: str, query_gain: bool) -> None:
    position = LogPosition(3, 8, preset, query_gain=query_gain)
    values = position()
    assert isinstance(values, PositionValues)
    expected = PARTS[preset] + (("alpha",) if query_gain else ())
    for name in ("power", "rate", "sharpness", "alpha", "theta"):
        value = getattr(values, name)
        assert (value is not None) == (name in expected), name
        if name == "theta" and value is not None:
            assert value.dtype == torch.float64
            assert value.tolist() == pytest.approx(THETA.get(preset, [1, 0.1, 0.01, 0.001]))
            assert not value.requires_grad
        elif value is not None:
            assert value.dtype == torch.float32
            assert value.shape == (3,)
            assert (value > 0).all()
            assert value.requires_grad
            torch.testing.assert_close(value, getattr(position, name))
    assert raw_names(position) == [f"raw_{name}" for name in expected if name != "theta"]
    assert values.rotary_scale == (math.inf if preset == "log-bias-rope" else 1.0)
    assert values.gain_length == 512.0


def test_all_presets_are_listed() -> None:
    assert set(logpe.PRESETS) == set(PARTS)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),  # as the authors' code has it
        (12, [*(2 ** -(h + 1.0) for h in range(8)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_alibi_starts_with_the_slopes_of_its_paper(heads: int, slopes: list[float]) -> None:
    torch.testing.assert_close(LogPosition(heads, 8, "alibi").power.detach(), torch.tensor(slopes))


def test_alibi_is_what_log_bias_tends_to() -> None:
    """power / rate * log(1 + rate d) -> power * d as the rate falls."""
    q, k, v = torch.randn(3, 1, 4, 30, 8, dtype=torch.float64)
    power = torch.rand(4, dtype=torch.float64)
    limit = log_attention(q, k, v, PositionValues(power=power), is_causal=True, backend="reference")
    rate = torch.full_like(power, 1e-9)
    near = log_attention(q, k, v, PositionValues(power=power / rate, rate=rate), is_causal=True, backend="reference")
    torch.testing.assert_close(near, limit, rtol=1e-6, atol=1e-6)


def test_log_bias_starts_with_some_heads_that_look_far() -> None:
    """Powers from 1/2 to 4, geometric over the heads; rate ~ U(0, 1) as in KERPLE (Chi et al., 2022)."""
    for preset in ("log-bias", "log-rotary-bias"):
        torch.testing.assert_close(LogPosition(4, 8, preset).power.detach(), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    rate = LogPosition(20_000, 8).rate.detach()
    assert 0 < rate.min() < 0.03
    assert 0.99 < rate.max() <= 1 + 1e-5
    assert float(rate.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(rate.std()) == pytest.approx(1 / math.sqrt(12), abs=0.02)


def test_log_invariant_starts_as_scale_invariant_attention() -> None:
    """power 2, sharpness 2, rate 1/10 (Anson et al., 2025): m = -2 log(1 + t/10) and a^2 = 2 log(1 + t/10) + 1."""
    position = LogPosition(4, 8, "log-invariant")
    for name, value in (("power", 2.0), ("sharpness", 2.0), ("rate", 0.1)):
        torch.testing.assert_close(getattr(position, name).detach(), torch.full((4,), value))


def test_log_bias_rope_spreads_no_head_over_everything_and_turns_in_what_was_seen() -> None:
    """Powers from 1 to 4: beyond 1 the weights of far keys have a finite sum. Periods below 2 pi 30 tokens."""
    position = LogPosition(5, 64, "log-bias-rope")
    torch.testing.assert_close(position.power.detach(), 4 ** torch.linspace(0, 1, 5))
    theta = position().theta
    assert theta is not None
    assert theta.shape == (16,)
    assert 2 * math.pi / float(theta.min()) < 190
    own = LogPosition(5, 64, "log-bias-rope", rotary_scale=3, rotary_fraction=1, rotary_base=100)
    assert (own().rotary_scale, own.planes, own.rotary_base) == (3.0, 32, 100.0)


def test_the_gain_starts_at_two_at_the_gain_length_minus_one() -> None:
    """1 + log(1 + n/n0) / log(1 + n0): about log n / log n0 plus a constant."""
    position = LogPosition(4, 8, query_gain=True, gain_length=100)
    torch.testing.assert_close(position.alpha.detach(), torch.full((4,), 1 / math.log(101)))
    assert position().gain_length == 100.0


def test_heads_start_differently_and_seeds_repeat() -> None:
    torch.manual_seed(3)
    first = LogPosition(8, 8)
    torch.manual_seed(3)
    second = LogPosition(8, 8)
    for part in ("power", "rate"):
        assert torch.equal(getattr(first, part), getattr(second, part))
        assert getattr(first, part).unique().numel() == 8


@pytest.mark.parametrize(("fraction", "planes"), [(1.0, 5), (0.5, 2), (0.9, 4), (0.2, 1)])
def test_rotary_options(fraction: float, planes: int) -> None:
    position = LogPosition(2, 10, "log-rotary", rotary_fraction=fraction, rotary_base=100, rotary_scale=7)
    values = position()
    assert values.theta.tolist() == pytest.approx([100 ** (-t / planes) for t in range(planes)])
    assert values.rotary_scale == 7.0
    assert LogPosition(2, 10, "log-rotary", rotary_scale=math.inf)().rotary_scale == math.inf


def test_an_odd_head_dim_leaves_one_dim_unrotated() -> None:
    assert LogPosition(2, 9, "log-rotary")().theta.shape == (4,)


@pytest.mark.parametrize("learnable", [True, False, ("rate",), ["power", "alpha"], set(), iter(["sharpness"])])
def test_learnable_subsets(learnable: Any) -> None:
    if not isinstance(learnable, bool | tuple | list | set):  # an iterator is read once
        names = {"sharpness"}
    else:
        names = set(PARTS["log-invariant"]) | {"alpha"} if learnable is True else set(learnable or ())
    position = LogPosition(2, 8, "log-invariant", query_gain=True, learnable=learnable)
    for name in ("power", "rate", "sharpness", "alpha"):
        assert getattr(position, f"raw_{name}").requires_grad == (name in names)
    q = torch.randn(1, 2, 5, 8)
    out = log_attention(q, q, q, position, is_causal=True)
    if names:
        out.sum().backward()
    for name in ("power", "rate", "sharpness", "alpha"):
        assert (getattr(position, f"raw_{name}").grad is not None) == (name in names)


def test_a_part_that_is_absent_may_be_named_learnable() -> None:
    assert raw_names(LogPosition(2, 8, "log-bias", learnable=("power", "sharpness"))) == ["raw_power", "raw_rate"]


def test_the_mapping_is_positive_and_its_gradient_never_dies() -> None:
    position = LogPosition(5, 8)
    raw = torch.tensor([-30.0, -5.0, 0.0, 5.0, 80.0])
    with torch.no_grad():
        position.raw_power.copy_(raw)
    power = position.power
    torch.testing.assert_close(power.detach(), torch.nn.functional.softplus(raw))
    assert (power > 0).all()
    power.sum().backward()
    torch.testing.assert_close(position.raw_power.grad, raw.sigmoid())
    assert (position.raw_power.grad > 0).all()


def test_a_position_without_parts_is_no_position() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    plain = log_attention(q, k, v, is_causal=True)
    assert torch.equal(log_attention(q, k, v, LogPosition(4, 8, "none"), is_causal=True), plain)
    assert torch.equal(log_attention(q, k, v, PositionValues(), is_causal=True), plain)


def test_repr_says_what_it_is() -> None:
    text = repr(LogPosition(3, 8, "log-rotary", rotary_scale=100, query_gain=True, gain_length=64))
    for piece in ("num_heads=3", "head_dim=8", "'log-rotary'", "rotary_scale=100", "planes=4", "gain_length=64"):
        assert piece in text
    assert "rotary" not in repr(LogPosition(3, 8, "log-bias"))


# --- precision, devices, copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.bfloat16().half().float(),
        lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    ],
    ids=["half", "bfloat16", "to", "to device", "thrice", "to like"],
)
def test_half_precision_models_keep_a_float32_position(cast: Any) -> None:
    model = nn.ModuleDict(
        {"position": LogPosition(4, 8, "log-rotary-bias", query_gain=True), "linear": nn.Linear(8, 8)}
    )
    before = copy.deepcopy(model["position"])
    cast(model)
    position = model["position"]
    for name in raw_names(before):
        assert getattr(position, name).dtype == torch.float32
        assert torch.equal(getattr(position, name), getattr(before, name))
        assert getattr(position, name)._no_weight_decay
    assert position.theta.dtype == torch.float64
    assert torch.equal(position.theta, before.theta)
    if model["linear"].weight.dtype != torch.float32:
        q = torch.randn(1, 4, 5, 8).to(model["linear"].weight.dtype)
        assert log_attention(q, q, q, position, is_causal=True).dtype == q.dtype


def test_double() -> None:
    position = LogPosition(4, 8, "log-rotary-bias").double()
    assert {p.dtype for p in position.parameters()} == {torch.float64}
    assert position().power.dtype == torch.float64
    assert position.theta.dtype == torch.float64
    q = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    assert log_attention(q, q, q, position, is_causal=True).dtype == torch.float64
    with pytest.raises(TypeError, match=r"position\.power must be float32, got torch.float64"):
        log_attention(q.float(), q.float(), q.float(), position, is_causal=True)
    assert position.float().raw_power.dtype == torch.float32
    assert position.theta.dtype == torch.float64


def test_half_precision_parameters_of_a_sharder_give_float32_values() -> None:
    position = LogPosition(4, 8)
    position.raw_power.data = position.raw_power.data.bfloat16()  # past _apply, as mixed precision does it
    assert position().power.dtype == torch.float32


# --- however it comes to life -----------------------------------------------------------------------------------

LIVES = ["log-bias-rope", "log-rotary", "log-invariant"]  # with parameters and angles, or one of the two


def attended(position: Any, q: Tensor) -> Tensor:
    return log_attention(q, q, q, position, is_causal=True)


def assert_alike(position: Any, expected: LogPosition) -> None:
    """Assert the same results and the same angles, and that both can be trained."""
    q = torch.randn(1, 4, 7, 16, requires_grad=True)
    torch.testing.assert_close(attended(position, q), attended(expected, q), rtol=0, atol=0)
    attended(position, q).sum().backward()
    theta = position().theta
    assert (theta is None) == (expected.theta is None)
    if theta is not None:
        assert type(theta) is Tensor
        assert theta.dtype == torch.float64
        steps = torch.arange(expected.planes, dtype=torch.float64) / expected.planes
        torch.testing.assert_close(theta, expected.rotary_base**-steps, rtol=1e-15, atol=0)
        assert not theta.is_inference()


def made_on_meta(preset: str) -> LogPosition:
    with torch.device("meta"):
        return LogPosition(4, 16, preset)


def emptied(preset: str, source: LogPosition) -> LogPosition:
    position = made_on_meta(preset).to_empty(device="cpu")
    position.load_state_dict(source.state_dict())
    return position


def assigned(preset: str, source: LogPosition) -> LogPosition:
    position = made_on_meta(preset)
    position.load_state_dict(source.state_dict(), assign=True)
    return position


def skipped(preset: str, source: LogPosition) -> LogPosition:
    position = nn.utils.skip_init(LogPosition, 4, 16, preset)
    position.load_state_dict(source.state_dict())
    return position


def swapped(preset: str, source: LogPosition) -> LogPosition:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        position = emptied(preset, source).half().double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return position


def used_in_inference_first(preset: str, source: LogPosition) -> LogPosition:
    position = assigned(preset, source)
    with torch.inference_mode():
        attended(position, torch.randn(1, 4, 7, 16))
    return position


def used_under_a_transform_first(preset: str, source: LogPosition) -> LogPosition:
    position = assigned(preset, source)
    q = torch.randn(1, 4, 7, 16)
    torch.func.grad(lambda q: log_attention(q, q, q, position, is_causal=True, backend="reference").sum())(q)
    return position


def used_with_fake_tensors_first(preset: str, source: LogPosition) -> LogPosition:
    position = assigned(preset, source)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        attended(position, torch.randn(1, 4, 7, 16))
    return position


def saved_whole(preset: str, source: LogPosition) -> LogPosition:
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled_with_a_buffer(preset: str, source: LogPosition) -> LogPosition:
    """Return a position pickled in the old way, with its angles as a buffer."""
    state = copy.deepcopy(vars(source))
    state["_buffers"], state["_non_persistent_buffers_set"] = {"theta": state.pop("_theta")}, {"theta"}
    position = LogPosition.__new__(LogPosition)
    position.__setstate__(state)
    assert dict(position.named_buffers()) == {}
    return position.half()


def averaged(preset: str, source: LogPosition) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(source, use_buffers=True)
    average.update_parameters(source)
    return average.module


def shared_memory(preset: str, source: LogPosition) -> nn.Module:
    return copy.deepcopy(source).share_memory()


def dispatched(preset: str, source: LogPosition) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        position = LogPosition(4, 16, preset)
    for name, x in source.state_dict().items():
        accelerate.utils.set_module_tensor_to_device(position, name, "cpu", x)
    return accelerate.dispatch_model(position, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("preset", LIVES)
@pytest.mark.parametrize(
    "alive",
    [
        emptied, assigned, skipped, swapped, used_in_inference_first, used_under_a_transform_first,
        used_with_fake_tensors_first, saved_whole, pickled_with_a_buffer, averaged, shared_memory, dispatched,
    ],
)  # fmt: skip
def test_angles_follow_from_the_configuration(alive: Callable[..., Any], preset: str) -> None:
    source = LogPosition(4, 16, preset)
    position = alive(preset, source)
    assert_alike(position, source)
    assert all(p.dtype == torch.float32 for p in position.parameters())
    if alive is not dispatched:  # accelerate makes parameters of its own, without hooks to mark them
        assert all(p._no_weight_decay for p in position.parameters())
        assert_alike(copy.deepcopy(position).half(), source)


@pytest.mark.parametrize("preset", LIVES)
def test_initial_values_do_not_depend_on_defaults(preset: str) -> None:
    torch.manual_seed(7)
    expected = LogPosition(4, 16, preset, query_gain=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        for device in (torch.device("meta"), contextlib.nullcontext()):
            torch.manual_seed(7)
            torch.set_default_dtype(dtype)
            try:
                with device:
                    position = LogPosition(4, 16, preset, query_gain=True, device="cpu")
            finally:
                torch.set_default_dtype(torch.float32)
            for x, y in zip(position.parameters(), expected.parameters(), strict=True):
                assert x.dtype == torch.float32
                assert torch.equal(x, y)
            assert_alike(position, expected)


@pytest.mark.parametrize("preset", ["log-bias-rope", "log-rotary"])
def test_a_checkpoint_dispatched_by_accelerate(preset: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.linear = LogPosition(4, 16, preset), nn.Linear(16, 16)

        def forward(self, q: Tensor) -> Tensor:
            return attended(self.position, self.linear(q))

    source = Model()
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    q = torch.randn(1, 4, 7, 16)
    for include_buffers in (False, True):
        for device_map in ({"": "cpu"}, {"position": "cpu", "linear": "disk"}, {"position": "disk", "linear": "cpu"}):
            if device_map.get("position") == "disk" and not list(source.position.parameters()):
                continue  # accelerate finds nothing to put there
            with accelerate.init_empty_weights(include_buffers=include_buffers):
                model = Model()
            model = accelerate.load_checkpoint_and_dispatch(
                model, str(tmp_path / "model.safetensors"), device_map=device_map, offload_folder=str(tmp_path)
            )
            assert torch.equal(model(q), source(q))


@pytest.mark.parametrize(
    ("preset", "at_hand", "backend"), [("log-bias-rope", True, "eager"), ("log-rotary", False, "aot_eager")]
)
def test_angles_in_compiled_and_exported_graphs(preset: str, at_hand: bool, backend: str) -> None:
    class Model(nn.Module):
        def __init__(self, position: LogPosition) -> None:
            super().__init__()
            self.position = position

        def forward(self, q: Tensor) -> Tensor:
            return attended(self.position, q)

    source = LogPosition(4, 16, preset)
    position = source if at_hand else assigned(preset, source)
    model = Model(position)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in (7, 9):
        q = torch.randn(1, 4, length, 16)
        torch.testing.assert_close(compiled(q), attended(source, q))
    program = torch.export.export(model, (q,), strict=at_hand)
    torch.testing.assert_close(program.module()(q), attended(source, q))
    assert_alike(position, source)


def test_meta_device() -> None:
    with torch.device("meta"):
        position = LogPosition(4, 8, "log-rotary-bias", query_gain=True)
    assert all(p.is_meta for p in position.parameters())
    position = LogPosition(4, 8, "log-rotary-bias", query_gain=True, device="meta")
    assert all(p.is_meta for p in position.parameters())
    assert position.theta.is_meta
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=r"position.power must be on the device of q, cpu, got meta"):
        attended(position, q)
    assert attended(position, q.to("meta")).is_meta
    position.to_empty(device="cpu")
    position.reset_parameters()
    torch.testing.assert_close(position.alpha.detach(), torch.full((4,), 1 / math.log(513)))
    torch.testing.assert_close(position.power.detach(), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    assert ((position.rate > 0) & (position.rate <= 1.001)).all()
    torch.testing.assert_close(position.theta, LogPosition(4, 8, "log-rotary").theta)


def test_angles_are_no_state() -> None:
    position = LogPosition(4, 8)
    assert dict(position.named_buffers()) == {}
    assert position(torch.device("meta")).theta.is_meta
    assert position().theta is position().theta  # the same again, on the device of the parameters
    with pytest.raises(AttributeError):
        position.theta = torch.ones(2, dtype=torch.float64)
    assert "theta" not in " ".join(position.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_assigned_half_precision_values_become_float32(dtype: torch.dtype) -> None:
    source = LogPosition(4, 16)
    position = LogPosition(4, 16, device="meta")
    position.load_state_dict({name: x.to(dtype) for name, x in source.state_dict().items()}, assign=True)
    for x, y in zip(position.parameters(), source.parameters(), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.to(dtype).float())


# --- parameters that torch keeps elsewhere ----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def pruned(position: LogPosition) -> None:
    prune.random_unstructured(position, "raw_power", amount=1)


@pytest.mark.parametrize(
    ("change", "count", "exact"),
    [
        (lambda p: parametrize.register_parametrization(p, "raw_power", nn.Identity()), 2, True),
        (lambda p: parametrize.register_parametrization(p, "raw_rate", Doubled()), 2, True),
        (lambda p: parametrizations.weight_norm(p, "raw_power", dim=None), 3, True),
        (lambda p: nn.utils.weight_norm(p, "raw_power", dim=None), 3, True),
        (pruned, 2, False),
    ],
    ids=["identity", "doubled", "weight_norm", "old weight_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
def test_parameters_that_torch_computes(change: Callable[[LogPosition], Any], count: int, exact: bool) -> None:
    """Such parameters are listed, trained, not decayed, converted, saved and loaded like any others."""
    model = Layer(LogPosition(4, 16))
    expected = copy.deepcopy(model.position)
    change(model.position)
    if exact:
        q = torch.randn(1, 4, 7, 16)
        torch.testing.assert_close(attended(model.position, q), attended(expected, q))
    else:
        assert (model.position().power == math.log(2)).sum() == 1  # softplus(0)
        assert (model.position.power == math.log(2)).sum() == 1
    positions = list(position_parameters(model))
    assert len(positions) == count
    others, undecayed = parameter_groups(model, 0.5)
    assert undecayed["params"] == positions
    assert len(others["params"]) == 2
    before = [p.detach().clone() for p in positions]
    attended(model.position, torch.randn(1, 4, 7, 16)).square().sum().backward()
    torch.optim.SGD([others, undecayed], lr=0.1).step()
    assert all(p.grad is not None for p in positions)
    assert not all(torch.equal(p, x) for p, x in zip(positions, before, strict=True))
    state = copy.deepcopy(model.state_dict())
    out = attended(model.position, q := torch.randn(1, 4, 7, 16))
    model.half()
    assert all(p.dtype == torch.float32 for p in position_parameters(model))
    model.float()
    model.load_state_dict(state)
    torch.testing.assert_close(attended(model.position, q), out)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attended(model.position, q), backend="eager")
    torch.testing.assert_close(compiled(q), out)


def test_computed_parameters_are_not_reset_without_a_word() -> None:
    position = LogPosition(4, 16)
    parametrize.register_parametrization(position, "raw_power", nn.Identity())
    position.reset_parameters()  # the parameter itself
    torch.testing.assert_close(position.power.detach(), 4 ** torch.linspace(0, 1, 4))
    parametrize.register_parametrization(position, "raw_rate", Doubled())
    with pytest.raises(RuntimeError, match=r"raw_rate cannot be reset: it is computed"):
        position.reset_parameters()


def test_a_replica_of_data_parallel() -> None:
    """torch.nn.parallel.replicate makes plain tensors, and no parameters."""
    position = LogPosition(4, 16, "log-invariant", query_gain=True)
    replica = position._replicate_for_data_parallel()
    for name, parameter in position._parameters.items():
        assert parameter is not None
        setattr(replica, name, parameter * 1)
    assert not list(replica.parameters())
    q = torch.randn(1, 4, 7, 16)
    torch.testing.assert_close(attended(replica, q), attended(position, q))
    torch.testing.assert_close(replica.power, position.power)
    attended(replica, q).sum().backward()
    assert all(p.grad is not None for p in position.parameters())
    with pytest.raises(ValueError, match=r"position parameters of 0 are flattened.*use_orig_params=True"):
        parameter_groups(nn.Sequential(replica), 0.1)  # nothing there to leave undecayed


@pytest.mark.parametrize("parametrized", [False, True])
def test_functional_call(parametrized: bool) -> None:
    position = LogPosition(4, 16)
    if parametrized:
        parametrize.register_parametrization(position, "raw_power", nn.Identity())
    state = {name: (x.detach() + 0.5).requires_grad_() for name, x in position.named_parameters()}
    values = torch.func.functional_call(position, state, ())
    raws = [x for _, x in sorted(state.items(), key=lambda item: "rate" in item[0])]
    for value, raw in zip((values.power, values.rate), raws, strict=True):
        assert torch.equal(value, nn.functional.softplus(raw))
    assert not torch.equal(values.power, position().power)


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(Layer(LogPosition(4, 16)), Layer(LogPosition(4, 16)))
    model[1].position.raw_power = model[0].position.raw_power
    for change in (lambda: model.double(), lambda: model.half(), lambda: model.to("cpu"), lambda: copy.deepcopy(model)):
        again = change() or model
        assert again[1].position.raw_power is again[0].position.raw_power
        assert len(list(position_parameters(again))) == 3
        assert len(parameter_groups(again, 0.1)[1]["params"]) == 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda p: torch.compile(p, backend="eager")], ids=["dp", "compile"])
def test_a_wrapped_position_is_a_position(wrap: Any) -> None:
    position = LogPosition(4, 16)
    q = torch.randn(1, 4, 7, 16)
    torch.testing.assert_close(attended(wrap(position), q), attended(position, q))
    with pytest.raises(TypeError, match="position must be a LogPosition"):
        attended(nn.Identity(), q)


def test_the_mark_against_weight_decay_survives_new_parameters() -> None:
    """to_empty and assign put other Parameter objects in place of the marked ones."""
    position = LogPosition(4, 8, "log-bias", device="meta").to_empty(device="cpu")
    position.reset_parameters()
    assert all(p._no_weight_decay for p in position.parameters())
    position = LogPosition(4, 8, "log-bias")
    position.load_state_dict(LogPosition(4, 8, "log-bias").state_dict(), assign=True)
    assert all(p._no_weight_decay for p in position.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(clone: Any) -> None:
    position = LogPosition(4, 8, "log-rotary-bias", query_gain=True, learnable=("power",), gain_length=9)
    other = clone(position)
    q = torch.randn(1, 4, 5, 8)
    assert torch.equal(log_attention(q, q, q, position), log_attention(q, q, q, other))
    assert other.raw_power is not position.raw_power
    assert other.raw_power.requires_grad
    assert not other.raw_rate.requires_grad
    with torch.no_grad():
        other.raw_power.add_(1)
    assert not torch.equal(position.power, other.power)


# --- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", logpe.PRESETS)
def test_state_dict_round_trip(preset: str) -> None:
    source = nn.ModuleDict({"attention": LogPosition(4, 8, preset, query_gain=True)})
    target = nn.ModuleDict({"attention": LogPosition(4, 8, preset, query_gain=True)})
    assert set(source.state_dict()) == {f"attention.{name}" for name in raw_names(source["attention"])}
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert str(target.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    for x, y in zip(source["attention"](), target["attention"](), strict=True):
        assert x is y or x == y if not isinstance(x, torch.Tensor) else torch.equal(x, y)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -200.0])
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_state_is_refused_and_changes_nothing(bad: float, assign: bool) -> None:
    """softplus(-200) is 0 in float32. The module keeps every value that it had, also those before the bad one."""
    model = nn.Sequential(LogPosition(4, 8, "log-invariant"))
    state = {name: x.clone() + 1 for name, x in model.state_dict().items()}
    state["0.raw_rate"][2] = bad
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"0\.raw_rate holds .* for head 2, .* rate must be positive and finite"
    ) as error:
        model.load_state_dict(state, assign=assign)
    assert str(bad) in str(error.value)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before.state_dict()[name]), name


def test_loading_reports_what_does_not_fit() -> None:
    position = LogPosition(4, 8)
    with pytest.raises(RuntimeError, match="size mismatch"):
        position.load_state_dict(LogPosition(5, 8).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*raw_sharpness"):
        LogPosition(4, 8, "log-invariant").load_state_dict(position.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*raw_rate"):
        LogPosition(4, 8, "log-rotary").load_state_dict(position.state_dict())


def test_loading_half_precision_values() -> None:
    position = LogPosition(4, 8)
    position.load_state_dict({name: x.bfloat16() for name, x in position.state_dict().items()})
    assert position.raw_power.dtype == torch.float32


# --- optimisers -------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, position: LogPosition) -> None:
        super().__init__()
        self.position = position
        self.linear = nn.Linear(8, 8)


def test_position_parameters_and_groups() -> None:
    own = nn.Sequential(Layer(LogPosition(4, 8)), Layer(LogPosition(4, 8, "log-invariant", query_gain=True)))
    assert len(list(position_parameters(own))) == 6
    others, positions = parameter_groups(own, 0.1)
    assert positions["params"] == list(position_parameters(own))
    assert positions["weight_decay"] == 0.0
    assert others["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(8, 8), (8,)] * 2
    assert len(others["params"]) + len(positions["params"]) == len(list(own.parameters()))
    assert all(p._no_weight_decay for p in positions["params"])
    torch.optim.AdamW(parameter_groups(own, 0.1))
    assert list(position_parameters(nn.Linear(2, 2))) == []


def test_a_shared_position_is_listed_once_and_collects_both_gradients() -> None:
    shared = LogPosition(4, 8)
    model = nn.Sequential(Layer(shared), Layer(shared))
    assert list(position_parameters(model)) == [shared.raw_power, shared.raw_rate]
    assert len(parameter_groups(model, 0.1)[1]["params"]) == 2
    q = torch.randn(1, 4, 6, 8)
    gradients = []
    for count in (1, 2):
        shared.zero_grad()
        sum(log_attention(q, q, q, layer.position, is_causal=True).square().sum() for layer in model[:count]).backward()
        gradients.append(shared.raw_power.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_weight_decay_leaves_the_position_alone() -> None:
    model = Layer(LogPosition(4, 8))
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(parameter_groups(model, 0.5), lr=0.5).step()
    assert torch.equal(model.position.raw_power, before.position.raw_power)
    torch.testing.assert_close(model.linear.weight, before.linear.weight * 0.75)


def test_training_moves_the_position() -> None:
    position = LogPosition(2, 8, "log-invariant", query_gain=True)
    q, k, v, target = torch.randn(4, 1, 2, 12, 8)
    optimizer = torch.optim.Adam(position.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (log_attention(q, k, v, position, is_causal=True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# --- what it refuses --------------------------------------------------------------------------------------------


NUMBERS = [
    ("num_heads", 4, int), ("head_dim", 16, int), ("rotary_scale", 512, float), ("rotary_fraction", 0.5, float),
    ("rotary_base", 100, float), ("gain_length", 64, float), ("reach", 64, float),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "expected"), NUMBERS)
def test_options_become_plain_numbers(name: str, number: float, expected: type) -> None:
    """Numbers become what JSON can hold; what is no number is refused by name."""
    arguments: dict[str, Any] = {"num_heads": 4, "head_dim": 16, "query_gain": True}
    as_int = [np.int64(number), np.uint8(number) if number < 256 else np.int16(number), torch.tensor(int(number))]
    as_float = [np.float32(number), np.float64(number), torch.tensor(number, dtype=torch.float16), np.array(number)]
    for value in [number, *(as_int if number >= 1 else []), *(as_float if expected is float else [np.array(number)])]:
        position = LogPosition(**(arguments | {name: value}))
        assert type(getattr(position, name)) is expected
        assert getattr(position, name) == number
        plain = logpe.position.plain_options(**(arguments | {name: value}))
        assert json.loads(json.dumps(plain)) == arguments | {name: number}
    wrong = [True, np.True_, torch.tensor(True), str(number), [number], 1j, torch.ones(2), object()]
    wrong += [None] if name in ("num_heads", "head_dim", "gain_length") else []
    wrong += [4.0, np.float32(4)] if expected is int else [torch.tensor(4.0, requires_grad=True)]
    wrong += [torch.tensor(4.0, device="meta")]
    for value in wrong:
        with pytest.raises(TypeError, match=f"{name} must be a"):
            LogPosition(**(arguments | {name: value}))


@pytest.mark.parametrize("value", [np.False_, False, torch.tensor(False)])
def test_flags_become_plain(value: Any) -> None:
    plain = logpe.position.plain_options(query_gain=value, learnable=value, preset=np.str_("log-bias"))
    assert plain == {"query_gain": False, "learnable": False, "preset": "log-bias"}
    assert [type(x) for x in plain.values()] == [bool, bool, str]
    position = LogPosition(4, 16, query_gain=value, learnable=value)
    assert "alpha" not in position.parts
    assert not any(p.requires_grad for p in position.parameters())
    names = logpe.position.plain_options(learnable=np.array(["power", "rate"]))["learnable"]
    assert names == ("power", "rate")
    assert {type(name) for name in names} == {str}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, r"num_heads must be at least 1, got 0"),
        ((4, 0), {}, r"head_dim must be at least 1, got 0"),
        ((4, 8, "albi"), {}, r"preset must be one of none, alibi, log-bias, .*, got 'albi'"),
        ((4, 8, "log-rotary"), dict(rotary_scale=0), r"rotary_scale must be positive, got 0"),
        ((4, 8, "log-rotary"), dict(rotary_scale=math.nan), r"rotary_scale must be positive, got nan"),
        ((4, 8, "log-rotary"), dict(rotary_base=-1), r"rotary_base must be positive, got -1"),
        ((4, 8, "log-rotary"), dict(rotary_scale=10**400), r"rotary_scale must be at most 1\.79.*, got a number"),
        ((4, 8), dict(gain_length=0), r"gain_length must be positive, got 0"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=0), r"rotary_fraction must be in \(0, 1\], got 0"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=1.5), r"rotary_fraction must be in \(0, 1\], got 1.5"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=0.1), r"rotary_fraction 0.1 of head_dim 8 leaves no plane"),
        ((4, 1, "log-rotary"), {}, r"head_dim 1 leaves no plane"),
        ((4, 8), dict(learnable=("slope",)), r"learnable must be True, False, or name parts of .*, got \['slope'\]"),
        ((4, 8), dict(learnable="power"), r"learnable must be True, False, or name parts of .*, got 'power'"),
        ((4, 8), dict(learnable=""), r"learnable must be .*, got ''"),
        ((4, 8), dict(learnable=None), r"learnable must be .*, got None"),
        ((4, 8), dict(learnable=1), r"learnable must be .*, got 1"),
        ((4, 8, ["log-bias"]), {}, r"preset must be one of none, alibi, log-bias, .*, got \['log-bias'\]"),
        ((4, 8), dict(gain_length=math.nan), r"gain_length must be positive, got nan"),
        ((4, 8), dict(gain_length=math.inf), r"gain_length must be finite, got inf"),
        ((4, 8), dict(rotary_base=math.inf), r"rotary_base must be finite, got inf"),
        ((4, 8), dict(rotary_fraction=np.float32(math.nan)), r"rotary_fraction must be in \(0, 1\], got nan"),
        ((-(2**70), 8), {}, r"num_heads must be at least 1"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogPosition(*arguments, **options)


@pytest.mark.parametrize("value", ["false", 1, None, np.array([True]), torch.tensor(True, device="meta")])
def test_query_gain_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="query_gain must be True or False"):
        LogPosition(4, 8, query_gain=value)


def test_the_sinusoid_takes_plain_numbers() -> None:
    expected = LogSinusoid(6, 3.0, 100.0)(5)
    for as_number in (np.int64, np.array, torch.tensor):
        sinusoid = LogSinusoid(as_number(6), as_number(3), as_number(100))
        assert [type(x) for x in (sinusoid.dim, sinusoid.scale, sinusoid.base)] == [int, float, float]
        assert torch.equal(sinusoid(np.int64(5)), expected)
    with torch.device("meta"):
        sinusoid = LogSinusoid(6, 3.0, 100.0)
    assert torch.equal(sinusoid.to_empty(device="cpu").half()(5), expected)
    for name in ("dim", "scale", "base"):
        for value in (True, "3", [3], None):
            with pytest.raises(TypeError, match=f"{name} must be a"):
                LogSinusoid(**({"dim": 6} | {name: value}))
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got nan"):
            LogSinusoid(**({"dim": 6} | {name: math.nan}))
    with pytest.raises(ValueError, match="base must be positive and finite, got inf"):
        LogSinusoid(6, base=math.inf)
    with pytest.raises(ValueError, match="base must be at most"):
        LogSinusoid(6, base=10**400)
    for positions in (2.5, True, "3", -1):
        with pytest.raises((TypeError, ValueError), match="positions must be"):
            LogSinusoid(6)(positions)


@pytest.mark.parametrize("scale", [8.0, math.inf])
def test_a_compiled_sinusoid(scale: float) -> None:
    torch._dynamo.reset()
    sinusoid = LogSinusoid(7, scale)
    compiled = torch.compile(sinusoid, fullgraph=True, dynamic=True, backend="aot_eager")
    for positions in (5, 9, torch.arange(6), torch.tensor(3)):
        torch.testing.assert_close(compiled(positions), sinusoid(positions))


def test_a_traced_sinusoid() -> None:
    """torch.jit.trace makes a tensor of a length, which would be taken for one position."""
    with pytest.raises(RuntimeError, match=r"positions must be .* under torch\.jit\.trace"):
        torch.jit.trace(lambda x: x + LogSinusoid(6)(x.shape[0]), torch.ones(5, 6))
    traced = torch.jit.trace(lambda x: LogSinusoid(6)(x), torch.arange(5))
    assert torch.equal(traced(torch.arange(9)), LogSinusoid(6)(9))


@pytest.mark.parametrize("module", [LogPosition(4, 8), LogSinusoid(8), nn.Sequential(LogPosition(4, 8))])
def test_scripting_is_refused(module: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile Log\w+: use torch.compile"):
        torch.jit.script(module)


# --- the reach of heads -----------------------------------------------------------------------------------------------


def test_half_of_a_heads_weight_lies_within_its_reach() -> None:
    position = LogPosition(4, 8, "log-bias-rope", reach=128)
    start = dict(power=torch.tensor([0.2, 0.5, 3.0, 1.0]), rate=torch.tensor([1e-4, 0.1, 0.1, 2.0]))
    for name, value in start.items():
        getattr(position, f"raw_{name}").data.copy_(inverse_softplus(value))
    values = position()
    distance = torch.arange(10**7).double()
    assert values.power is not None
    assert values.rate is not None
    for power, rate, before in zip(values.power.tolist(), values.rate.tolist(), start["power"].tolist(), strict=True):
        weights = (1 + rate * distance) ** -power
        assert weights[128:].sum() / weights.sum() <= 0.51
        assert power >= before - 1e-6
    torch.testing.assert_close(values.power[2].item(), 3.0)  # far steeper than it must be
    assert values.rate[0] == 1 / 128
    assert torch.equal(values.power, position.power)
    assert torch.equal(values.rate, position.rate)
    values.power.sum().backward()
    assert position.raw_power.grad is not None
    assert (position.raw_power.grad != 0).tolist() == [False, False, True, False]  # nothing moves further out


def test_what_is_beyond_its_reach_can_come_back_under_a_dispatch_mode() -> None:
    """Such as selective checkpointing has."""
    position = LogPosition(2, 8, "log-bias", reach=16)
    position.raw_power.data.copy_(inverse_softplus(torch.tensor([0.5, 4.0])))
    with FlopCounterMode(display=False):
        (-position.power.sum()).backward()
    assert (position.raw_power.grad < 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_beyond_its_reach_can_come_back(compiled: bool) -> None:
    """A loss that wants other powers and rates than the bound gives moves the raw parameters there."""
    position = LogPosition(4, 8, "log-bias", reach=16)
    position.raw_power.data.copy_(inverse_softplus(torch.tensor([0.5, 0.5, 4.0, 0.9])))
    position.raw_rate.data.copy_(inverse_softplus(torch.tensor([1e-3, 0.3, 0.3, 1e-3])))
    wanted = torch.tensor([3.0, 1.1, 2.0, 2.5]), torch.tensor([0.2, 0.4, 0.1, 0.5])
    values = torch.compile(position, backend="aot_eager", fullgraph=True) if compiled else position
    optimizer = torch.optim.Adam(position.parameters(), lr=0.05)
    for _ in range(400):
        power, rate, *_ = values()
        optimizer.zero_grad()
        sum((x - y).square().sum() for x, y in zip((power, rate), wanted, strict=True)).backward()
        optimizer.step()
    power, rate = position.power.detach(), position.rate.detach()
    torch.testing.assert_close(rate[[0, 2, 3]], wanted[1][[0, 2, 3]], atol=0.02, rtol=0)
    torch.testing.assert_close(power[[0, 2, 3]], wanted[0][[0, 2, 3]], atol=0.02, rtol=0)
    assert power[1] == 1 + math.log(2) / torch.log1p(16 * rate[1])  # 1.1 is out of reach


def test_reach_is_an_option_like_others() -> None:
    position = LogPosition(4, 8, "log-bias", reach=np.int64(64))
    assert position.reach == 64.0
    assert type(position.reach) is float
    assert "reach=64" in repr(position)
    assert LogPosition(4, 8).reach is None
    for bad, message in ((0, "reach must be positive, got 0"), (math.inf, "reach must be finite"), ("x", "reach")):
        with pytest.raises((TypeError, ValueError), match=message):
            LogPosition(4, 8, reach=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reach must be None for preset 'alibi', which has no power and rate"):
        LogPosition(4, 8, "alibi", reach=64)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_gradients_within_the_reach(backend: str) -> None:
    """Those of the raw parameters, against the definition in float64, where one head is at its bound."""
    torch.manual_seed(0)
    position = LogPosition(2, 8, "log-bias", reach=16)
    position.raw_power.data.copy_(inverse_softplus(torch.tensor([0.5, 4.0])))
    position.raw_rate.data.fill_(inverse_softplus(torch.tensor(0.3)).item())
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    logpe.log_attention(q, k, v, position, is_causal=True, backend=backend).square().sum().backward()
    exact = copy.deepcopy(position).double()
    distance = (torch.arange(50)[:, None] - torch.arange(50)).double()
    rate = F.softplus(exact.raw_rate).clamp(min=1 / 16)
    power = torch.maximum(F.softplus(exact.raw_power), 1 + math.log(2) / torch.log1p(16 * rate))
    logit = q.double() @ k.double().mT / math.sqrt(8)
    logit = logit - power[:, None, None] * torch.log1p(rate[:, None, None] * distance.clamp(min=0))
    weights = logit.masked_fill(distance < 0, -math.inf).softmax(-1)
    exact.zero_grad()
    power.retain_grad()
    (weights @ v.double()).square().sum().backward()
    raised = power.grad.clamp(max=0) * exact.raw_power.detach().sigmoid()  # what is at its bound may only grow
    expected = torch.stack((raised[0], exact.raw_power.grad[1]))
    torch.testing.assert_close(position.raw_power.grad.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(position.raw_rate.grad.double(), exact.raw_rate.grad, rtol=1e-4, atol=1e-5)
    assert position.raw_rate.grad.abs().min() > 0  # the bound on the power moves with the rate
