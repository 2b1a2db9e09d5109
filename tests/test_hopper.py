"""The forward kernel whose warps have different work: its numbers, and that nobody waits forever.

It is emulated on the CPU, where the emulator shows that it finds faults. On a GPU of sm_90 it runs in a process of its
own, which is killed if it hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Call, make_call, make_packed_call
from torch import Tensor

pytest.importorskip("triton")
from logpe_kernels import configs
from logpe_kernels.configs import Config
from triton.runtime.errors import InterpreterError

from logpe import log_attention, log_attention_varlen

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
if INTERPRETED:
    from gluon_emulator import SOURCE, emulated
SPECIALIZED = Config(128, 64, 8, 2, SPECIALIZED=True)
LIMIT = 300  # seconds on a GPU, compilation included


def draw() -> int:
    """Return a seed for the order in which warpgroups run."""
    return int(torch.randint(2**31, ()))


@pytest.fixture
def hopper() -> Iterator[ModuleType]:
    with emulated(draw()) as module, configs.override(forward=SPECIALIZED):
        yield module


def new_call(**options: Any) -> Call:
    """Return a call in half precision, of grouped heads and a length that no tile divides, with changes."""
    return make_call(
        **(dict(batch=1, heads=2, kv_heads=1, num_queries=150, head_dim=64, dtype=torch.bfloat16) | options)
    )


@torch.no_grad()
def forward(call: Call, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return out and lse."""
    inputs = [x.to(dtype) for x in (call.q, call.k, call.v)]
    return log_attention(*inputs, call.values, **call.options, backend=backend, return_lse=True)


def check_forward(call: Call) -> None:
    """Compare out and lse with float64, as helpers.Reference does."""
    dtype = call.q.dtype
    runs = (("triton", dtype), ("reference", torch.float64), ("reference", dtype))
    for actual, exact, eager in zip(*(forward(call, *run) for run in runs), strict=True):
        finite = exact.isfinite()
        assert torch.equal(actual.isfinite(), finite)  # a query that sees nothing has an lse of -inf
        actual, exact, eager = actual[finite], exact[finite], eager[finite]
        bound = 1.1 * (eager - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (actual - exact).abs().max() <= bound


SERVED: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "several programs, far tiles": dict(num_queries=600, is_causal=True),
    "full, other queries than keys": dict(num_queries=130, num_keys=260, query_start=70),
    "a chunk": dict(num_queries=65, num_keys=190, is_causal=True),
    "one key": dict(num_queries=65, num_keys=1, query_start=0),
    "a window": dict(window=(70, 30)),
    "a causal window": dict(window=(40, 0)),
    "a window far on, keys too": dict(num_queries=100, num_keys=240, window=(200, 0), query_start=1000, key_start=860),
    "float16, a head_dim in between": dict(head_dim=40, dtype=torch.float16, is_causal=True),
    "values of another size": dict(head_dim=64, value_dim=128, is_causal=True),
    "keys of another size": dict(head_dim=96, value_dim=48, is_causal=True),
    "no position": dict(preset="none", is_causal=True),
    "linear": dict(preset="alibi"),
    "rotated": dict(preset="log-bias-rope", is_causal=True),
    "sharpness and a gain": dict(preset="log-invariant", query_gain=True, is_causal=True),
}


@interpreted
@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_numbers(case: dict[str, Any], hopper: ModuleType) -> None:
    call = new_call(**case)
    check_forward(call)
    assert len(hopper.programs) == 2 * -(-call.q.shape[2] // 128)


@interpreted
def test_several_sequences_in_other_layouts(hopper: ModuleType) -> None:
    call = make_call(2, 4, 2, 140, 140, 64, dtype=torch.bfloat16, is_causal=True)
    tokens_first = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    check_forward(call.replace(**tokens_first))
    assert len(hopper.programs) == 2 * 4 * 2
    # TMA takes neither repeated rows nor those that start between two multiples of 16 bytes.
    check_forward(call.replace(k=call.k[:1, :1].expand(2, 2, -1, -1)))
    check_forward(call.replace(q=torch.cat([call.q, call.q], -1)[..., 4:68]))
    assert len(hopper.programs) == 2 * 4 * 2


REFUSED: dict[str, dict[str, Any]] = {
    "float32": dict(dtype=torch.float32),
    "small heads": dict(head_dim=32),
    "large values": dict(value_dim=256),
    "dropout": dict(dropout_p=0.1),
    "lengths": dict(key_lengths=torch.tensor([100])),
    "a mask of keys": dict(key_mask=torch.arange(150)[None] < 100),
    "starts": dict(query_start=torch.tensor([7])),
    "queries before the text": dict(query_start=-20, is_causal=True),
    "keys that nobody sees": dict(num_queries=130, num_keys=150, query_start=0, is_causal=True),
    "rows that are no multiple of 16 bytes": dict(head_dim=50),
}


@interpreted
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_calls_go_to_the_other_kernel(case: dict[str, Any], hopper: ModuleType) -> None:
    call = new_call(**case)
    if "dropout_p" in case:
        forward(call, "triton", call.q.dtype)
    else:
        check_forward(call)
    assert not hopper.programs


@interpreted
def test_packed_calls_go_to_the_other_kernel(hopper: ModuleType) -> None:
    call = make_packed_call([70, 80], [70, 80], heads=2, head_dim=64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 70, 150], dtype=torch.int32)
    log_attention_varlen(call.q, call.k, call.v, call.values, bounds, bounds, 80, 80, backend="triton")
    assert not hopper.programs


WAIT_FOR_K = "qk = warpgroup_mma_wait(0, deps=[qk])  # [GROUP_ROWS, BLOCK_N]"
WAIT_FOR_V = "acc = warpgroup_mma_wait(0, deps=[acc])  # [GROUP_ROWS, BLOCK_DV]"
FAULTS: dict[str, dict[str, str]] = {
    "k is released before it was read": {WAIT_FOR_K: "release(program.k, t)", "release(program.k, t)": WAIT_FOR_K},
    "v is released before it was read": {WAIT_FOR_V: "release(program.v, t)", "release(program.v, t)": WAIT_FOR_V},
    "nobody waits for a tile": {"mbarrier.wait(ring.filled.index(t % STAGES), (t // STAGES) & 1)": "pass"},
    "nobody waits for a place": {"mbarrier.wait(ring.free.index(stage), (t // STAGES + 1) & 1)": "pass"},
    "one reader is enough": {"new_ring(k_tma, num_stages, WARPGROUPS)": "new_ring(k_tma, num_stages, 1)"},
    "the other parity": {"(t // STAGES + 1) & 1": "(t // STAGES) & 1"},
    "v is never released": {"release(program.v, t)": "pass"},
}


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("changes", FAULTS.values(), ids=FAULTS)
def test_the_emulator_finds_faults(changes: dict[str, str], tmp_path: Path) -> None:
    source = SOURCE.read_text()
    assert all(source.count(line) == 1 for line in changes)
    for number, line in enumerate(changes):
        source = source.replace(line, f"<{number}>")
    for number, line in enumerate(changes.values()):
        source = source.replace(f"<{number}>", line)
    (tmp_path / "hopper.py").write_text(source)
    call = new_call(num_queries=300, is_causal=True)
    with (
        pytest.raises((AssertionError, InterpreterError)),
        emulated(draw(), tmp_path / "hopper.py"),
        configs.override(forward=SPECIALIZED),
    ):
        check_forward(call)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    subprocess.run([sys.executable, __file__], check=True, timeout=LIMIT)


def on_a_gpu() -> None:
    """Compare all that is served, with either width of tiles; the same call gives the same bits again."""
    from logpe_kernels import hopper

    served: list[bool] = []
    attention = hopper.attention

    def counted(*arguments: Any) -> bool:
        served.append(attention(*arguments))
        return served[-1]

    hopper.attention = counted
    for columns in (64, 128):
        with configs.override(forward=SPECIALIZED._replace(BLOCK_N=columns)):
            for name, case in SERVED.items():
                call = new_call(**case, device="cuda")
                check_forward(call)
                first, again = (forward(call, "triton", call.q.dtype) for _ in range(2))
                assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), name
            long = new_call(
                batch=2, heads=16, kv_heads=4, num_queries=4001, head_dim=128, is_causal=True, device="cuda"
            )
            check_forward(long)
    assert all(served)
    assert len(served) == 2 * (3 * len(SERVED) + 1)


if __name__ == "__main__":
    on_a_gpu()
