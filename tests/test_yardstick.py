"""The plain kernel that the compile report compares ours with computes attention."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_call
from logpe_kernels import configs
from logpe_kernels.configs import Config

from bench.speed import yardstick


@pytest.mark.parametrize(("length", "causal"), [(64, True), (45, True), (45, False)])
def test_yardstick(length: int, causal: bool, device: torch.device) -> None:
    call = make_call(2, 2, 2, length, length, 16, preset="none", device=device)
    q, k, v = (x.contiguous() for x in (call.q, call.k, call.v))
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device=device)
    with configs.override(Config(16, 16, 4, 1)):
        yardstick.forward(q, k, v, out, lse, causal)
    scores = q.double() @ k.double().mT * 16**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(length, length, device=device).tril().bool(), -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double() * math.log(2), scores.logsumexp(-1), atol=2e-6, rtol=1e-5)
