"""Test what works where packages are missing.

Without triton, logpe imports, the CPU backends work, and backend="triton" says what is missing. Without the packages
that only some tests need, the other tests run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_TRITON = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import logpe

assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", WITHOUT_TRITON + code], env=env, capture_output=True, text=True)


def test_the_cpu_backends_work() -> None:
    result = python("""
position = logpe.LogPosition(4, 8, "log-rotary-bias", query_gain=True)
q, k = torch.randn(2, 4, 20, 8, requires_grad=True), torch.randn(2, 2, 20, 8)
results = []
for backend in ("auto", "blocked", "reference"):
    out = logpe.log_attention(q, k, k, position, is_causal=True, backend=backend)
    results.append([out, *torch.autograd.grad(out.square().sum(), [q, *position.parameters()])])
for x, y, z in zip(*results):
    torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, y)
cu = torch.tensor([0, 3, 8])
logpe.log_attention_varlen(*torch.randn(3, 8, 4, 8), position, cu, cu, 5, 5, is_causal=True)
logpe.LogAttention(16, 2, batch_first=True)(*torch.randn(3, 2, 5, 16))
print("works")
""")
    assert result.stdout == "works\n", result.stderr


def test_asking_for_triton_says_that_it_is_missing() -> None:
    code = """
try:
    logpe.log_attention(*torch.randn(3, 1, 2, 5, 8), backend="triton")
except RuntimeError as error:
    print(error)
"""
    message = 'backend="triton" cannot run here: '
    interpreted = python(code, TRITON_INTERPRET="1")
    assert interpreted.stdout.startswith(message + "triton cannot be imported: No module named 'triton"), interpreted
    plain = python(code, TRITON_INTERPRET="0")
    assert plain.stdout.startswith(message + "the Triton kernels need a GPU, and the tensors are on cpu"), plain


def test_importing_logpe_does_not_import_triton() -> None:
    """Importing it would take a second, and freeze TRITON_INTERPRET before the user can set it."""
    code = "import sys, logpe; print([name for name in sys.modules if name.partition('.')[0] == 'triton'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_every_test_file_is_collected_without_the_optional_packages() -> None:
    optional = ["accelerate", "babel", "datasets", "matplotlib", "peft", "sacrebleu", "safetensors", "scipy"]
    optional += ["tensorboard", "tokenizers", "transformers"]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional}))  # importing them raises ModuleNotFoundError\n"
    code += "import pytest; sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
