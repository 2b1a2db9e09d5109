"""kernels/logpe_kernels is a Hub kernel: Hugging Face's ``kernels`` loads the folder by itself, without logpe."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "kernels" / "logpe_kernels"


def has(package: str) -> bool:
    """Whether it is installed: our own folder of the name ``kernels`` is a namespace, which has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def run(code: str, *paths: Path, cwd: Path = ROOT) -> str:
    """Run ``code`` in a new process that finds ``paths`` beside what is installed; returns what it printed."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, paths)), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


LOAD = """
import math, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

kernel = get_local_kernel(Path({folder!r}))
assert not [name for name in sys.modules if name.split(".")[0] in ("logpe", "logpe_kernels")], "not by itself"
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = torch.randn(3, 1, 2, 21, 16, device=device).unbind()
power, rate = torch.rand(2, 2, device=device).unbind()
out, lse = kernel.attention(q, k, v, kernel.Options(power=power, rate=rate, window_right=0, scale=0.25))

distance = (torch.arange(21)[:, None] - torch.arange(21)).to(device)
logits = q @ k.mT * 0.25 - power[:, None, None] * torch.log1p(rate[:, None, None] * distance.abs())
logits = logits.masked_fill(distance < 0, -math.inf)
torch.testing.assert_close(out, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
print("right")
"""


@pytest.mark.skipif(not has("kernels"), reason="Hugging Face's kernels is not installed")
@pytest.mark.parametrize("published", [False, True])
def test_loads_by_itself(published: bool, tmp_path: Path) -> None:
    """The folder as it is, and as the build variant of a repository."""
    folder = FOLDER
    if published:
        (tmp_path / "build").mkdir()
        (tmp_path / "build" / "torch-universal").symlink_to(FOLDER)
        folder = tmp_path
    assert run(LOAD.format(folder=str(folder)), cwd=tmp_path) == "right\n"


def test_metadata() -> None:
    """What the library asks of a variant, for where it is not installed."""
    metadata = json.loads((FOLDER / "metadata.json").read_text())
    assert set(metadata) == {"name", "id", "version", "license", "python-depends", "backend"}
    assert metadata["name"].replace("-", "_") == FOLDER.name
    assert metadata["id"].isidentifier()


def test_imports_stay_inside() -> None:
    """Relative, torch, triton or the standard library: nothing that a Hub kernel would lack."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, f"{file.name} imports {names}"


@pytest.mark.skipif(not has("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("first", ["transformers", "logpe"])
def test_import_order(first: str) -> None:
    """From the root of the repository, where our folder has the library's name: each finds its own."""
    second = "logpe" if first == "transformers" else "transformers"
    code = f"""
import {first}
import {second}
import logpe.transformers, logpe_kernels
from transformers.utils import is_kernels_available
from transformers.integrations import hub_kernels
model = transformers.LlamaModel(transformers.LlamaConfig(
    vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
logpe.transformers.use_log_position(model)
model(transformers.models.llama.modeling_llama.torch.tensor([[1, 2, 3]]))
print(is_kernels_available())
"""
    if has("kernels"):
        code += "import kernels; kernels.get_local_kernel"
    assert run(code, ROOT, ROOT / "kernels").strip() in ("True", "False")
