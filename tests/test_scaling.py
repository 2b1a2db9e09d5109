"""``python -m bench scaling``: what it counts is what the methods send, hold and compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from bench.__main__ import main
from bench.speed import scaling

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo backend here"
)


def test_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--length=250", "--heads=4", "--kv-heads=2", "--head-dim=8", "--processes", "1", "2", "--device=cpu"]
    assert main(["scaling", *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling-cpu.json").read_text())
    assert (tmp_path / "scaling-cpu.png").exists()
    assert found["settings"]["length"] == 250
    assert "all-gather" in capsys.readouterr().out
    rows = {(row["processes"], row["method"], row["layout"]): row for row in found["rows"]}
    assert len(rows) == 1 + 6
    for row in rows.values():
        ranks = row["ranks"]
        assert len(ranks) == row["processes"]
        assert sum(rank["keys"] for rank in ranks) == 2 * 250 * 2 * 8 * 4
        assert sum(rank["pairs"] for rank in ranks) == 4 * 250 * 251 // 2
    one = rows[1, "all-gather", "head-tail"]["ranks"][0]
    assert one["sent"] == one["received at once"] == 0
    for method in ("all-gather", "ring"):
        # Causal and contiguous: only the first half of the keys travels, once forward, and once more backward.
        first, second = rows[2, method, "contiguous"]["ranks"]
        parameters = 2 * 4 * 8
        assert first["sent forward"] == first["keys"]
        assert first["sent"] == 2 * first["keys"] + parameters
        assert second["sent forward"] == 0
        assert second["sent"] == first["keys"] + parameters
        assert scaling.summary(rows[2, method, "head-tail"])["imbalance"] < 1.02
        assert scaling.summary(rows[2, method, "contiguous"])["imbalance"] > 1.4
    errors = found["torch_peers"]["flex"]
    if "refused" not in errors:  # its mask knows where the tokens are, its score_mod does not
        largest = errors["largest error by rank"]
        assert max(largest["no bias"]) < 1e-5


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scaling", "--length=0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
