"""LogPosition: what it starts as, what survives casting, moving, saving and loading, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import logpe
from logpe import LogPosition, PositionValues, log_attention, parameter_groups, position_parameters

PARTS = {
    "none": (),
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


def test_meta_device() -> None:
    with torch.device("meta"):
        position = LogPosition(4, 8, "log-rotary-bias", query_gain=True)
    assert all(p.is_meta for p in position.parameters())
    position = LogPosition(4, 8, "log-rotary-bias", query_gain=True, device="meta")
    assert all(p.is_meta for p in position.parameters())
    assert position.theta.is_meta
    position.to_empty(device="cpu")
    position.reset_parameters()
    torch.testing.assert_close(position.alpha.detach(), torch.full((4,), 1 / math.log(513)))
    torch.testing.assert_close(position.power.detach(), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    assert ((position.rate > 0) & (position.rate <= 1.001)).all()
    torch.testing.assert_close(position.theta, LogPosition(4, 8, "log-rotary").theta)


def test_meta_then_assigned_state() -> None:
    position = LogPosition(4, 8, "log-bias", device="meta")
    loaded = LogPosition(4, 8, "log-bias")
    position.load_state_dict(loaded.state_dict(), assign=True)
    assert torch.equal(position.raw_power, loaded.raw_power)


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
    """softplus(-200) is 0 in float32. The module keeps every value that it had, those before the bad one too."""
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


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, r"num_heads must be at least 1, got 0"),
        ((4, 0), {}, r"head_dim must be at least 1, got 0"),
        ((4, 8, "alibi"), {}, r"preset must be one of none, log-bias, .*, got 'alibi'"),
        ((4, 8, "log-rotary"), dict(rotary_scale=0), r"rotary_scale must be positive, got 0"),
        ((4, 8, "log-rotary"), dict(rotary_scale=math.nan), r"rotary_scale must be positive, got nan"),
        ((4, 8, "log-rotary"), dict(rotary_base=-1), r"rotary_base must be positive, got -1"),
        ((4, 8), dict(gain_length=0), r"gain_length must be positive, got 0"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=0), r"rotary_fraction must be in \(0, 1\], got 0"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=1.5), r"rotary_fraction must be in \(0, 1\], got 1.5"),
        ((4, 8, "log-rotary"), dict(rotary_fraction=0.1), r"rotary_fraction 0.1 of head_dim 8 leaves no plane"),
        ((4, 1, "log-rotary"), {}, r"head_dim 1 leaves no plane"),
        ((4, 8), dict(learnable=("slope",)), r"learnable must be True, False, or name parts of .*, got \['slope'\]"),
        ((4, 8), dict(learnable="power"), r"learnable"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogPosition(*arguments, **options)
