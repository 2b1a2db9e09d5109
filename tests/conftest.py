"""What every test gets: the interpreter where there is no GPU, fresh seeds, and poisoned memory."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

# Triton reads this when its own modules are imported, hence before anything else can import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, and Triton compiling for it")
    # A shell starts jobs in the background without Ctrl-C; tests of it, and the processes that they start, need it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Through the environment, where pytest-xdist's workers find the seed of the process that starts them.
    os.environ.setdefault("LOGPE_TEST_SEED", str(int.from_bytes(os.urandom(4), "big")))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _speed_up_interpreter()


def pytest_report_header() -> str:
    return f"LOGPE_TEST_SEED={os.environ['LOGPE_TEST_SEED']}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"LOGPE_TEST_SEED={os.environ['LOGPE_TEST_SEED']} repeats these inputs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    compiling = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    for item in items:
        if item.get_closest_marker("gpu") and not compiling:
            reason = "there is no GPU" if not torch.cuda.is_available() else "TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run: on the GPU, or interpreted on the CPU."""
    compiling = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return torch.device("cuda" if compiling else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A new one for every run and test, the same again under the same LOGPE_TEST_SEED."""
    digest = hashlib.sha256(f"{os.environ['LOGPE_TEST_SEED']} {request.node.nodeid}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an element that nobody writes shows itself."""
    _device_constructors()  # what ``with torch.device(...)`` serves: cached before the names change

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if type(out) is torch.Tensor and out.is_floating_point() and out.device.type != "meta":
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poisoned(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def _speed_up_interpreter() -> None:
    """Half of the interpreter's time goes into patching triton.language anew for each function that a kernel calls.

    Patch it once per launch. Nothing else changes, and a triton without this inner function runs as it is.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch = interpreter._patch_lang
    except (ImportError, AttributeError):
        return
    nothing = type("Scope", (), {"restore": lambda self: None})()
    languages: dict[Any, list[Any]] = {}

    def patch_once(fn: Any) -> Any:
        if fn not in languages:
            languages[fn] = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        return patch(fn) if any(tl.core.is_builtin(lang.load) for lang in languages[fn]) else nothing

    interpreter._patch_lang = patch_once
