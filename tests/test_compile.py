"""The Triton kernels compile for every target, without a GPU, within its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("forward", "backward_dq", "backward_dkdv")
ITEMSIZES = ("2", "4")
HEAD_DIMS = ("16", "32", "64", "128", "256")


def compile_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), *sys.path]))
    command = [sys.executable, "-m", "bench.compile_report", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def one_config(tmp_path: Path, target: str, config: list[int]) -> str:
    """A file with a table that has one configuration for everything on one target."""
    entry = {kernel: {size: dict.fromkeys(HEAD_DIMS, config) for size in ITEMSIZES} for kernel in KERNELS}
    file = tmp_path / "table.json"
    file.write_text(json.dumps({target: entry}))
    return str(file)


def test_slice_compiles_for_every_target(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = compile_report("--quick", "--check", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["failures"] == []
    assert report["versions"]["triton"]
    rows = report["rows"]
    assert len(rows) <= 300
    assert {row["target"] for row in rows} == set(TARGETS)
    assert {row["kernel"] for row in rows} >= {"forward", "dq", "dkdv", "rotate"}
    for target in TARGETS:  # Each is compiled on its own: no target is answered from another's cache.
        registers = [row["registers"] for row in rows if row["target"] == target and row["kernel"] == "forward"]
        assert registers, target
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in rows)
    assert all(row["shared"] > 0 for row in rows if row["products"])


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("sm_80", [128, 128, 4, 1], "spills"),
        ("sm_89", [128, 128, 8, 4], "bytes of shared memory, sm_89 has 101376"),
        ("gfx942", [128, 96, 4, 1], "does not compile"),
    ],
)
def test_check_fails(tmp_path: Path, target: str, config: list[int], reason: str) -> None:
    arguments = ["--targets", target, "--head-dims", "128", "--dtypes", "bfloat16", "--presets", "none"]
    arguments += ["--kernels", "forward", "--configs", one_config(tmp_path, target, config)]
    result = compile_report(*arguments, "--check")
    assert result.returncode == 1, result.stdout + result.stderr[-3000:]
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any(reason in line for line in failures), result.stdout
    assert all(line.startswith(f"FAIL {target} forward bfloat16 D=128") for line in failures)


def test_default_table_has_every_cell() -> None:
    import logpe_kernels

    assert logpe_kernels.__file__
    shipped = json.loads((Path(logpe_kernels.__file__).parent / "configs" / "default.json").read_text())
    assert set(shipped) == set(TARGETS)
    for target, kernels in shipped.items():
        assert set(kernels) == set(KERNELS), target
        for kernel, sizes in kernels.items():
            assert set(sizes) == set(ITEMSIZES), (target, kernel)
            for itemsize, head_dims in sizes.items():
                assert set(head_dims) == set(HEAD_DIMS), (target, kernel, itemsize)
                for head_dim, cell in head_dims.items():
                    where = (target, kernel, itemsize, head_dim)
                    assert isinstance(cell, list) or set(cell) == {"light", "heavy"}, where
                    for block_m, block_n, num_warps, num_stages in [cell] if isinstance(cell, list) else cell.values():
                        assert all(16 <= n <= 256 and n & (n - 1) == 0 for n in (block_m, block_n)), where
                        assert num_warps in (1, 2, 4, 8), where
                        assert num_stages >= 1, where
