"""Give every test the interpreter where there is no GPU, a seed of its own, and poisoned memory.

Random inputs are the same in every run. ``--seed 7`` draws others, ``--seed fresh`` new ones each time; the variable
LOGPE_TEST_SEED does the same. A run that fails says which seed repeats it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

# Processes that tests start import this checkout, too.
ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PATHS))

# Triton reads this when its own modules are imported, hence before anything else can import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of all random inputs: a number, or `fresh` for another in every run (default: LOGPE_TEST_SEED, else 0)"
    parser.addoption("--seed", metavar="N", help=text)


@pytest.hookimpl(tryfirst=True)  # before that of hypothesis, which reads its seed
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, and Triton compiling for it")
    # A shell starts jobs in the background without Ctrl-C; tests of it, and the processes that they start, need it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Through the environment, where pytest-xdist's workers find the seed of the process that starts them.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        seed = config.getoption("--seed") or os.environ.get("LOGPE_TEST_SEED", "0")
        if seed == "fresh":
            seed = str(int.from_bytes(os.urandom(4), "big"))
        elif not seed.isdecimal():
            raise pytest.UsageError(f"--seed must be a number or `fresh`, got {seed}")
        os.environ["LOGPE_TEST_SEED"] = seed
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = os.environ["LOGPE_TEST_SEED"]
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _speed_up_interpreter()


def pytest_report_header() -> str:
    return f"--seed {os.environ['LOGPE_TEST_SEED']}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"--seed {os.environ['LOGPE_TEST_SEED']} repeats these inputs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    compiling = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    for item in items:
        if item.get_closest_marker("gpu") and not compiling:
            reason = "there is no GPU" if not torch.cuda.is_available() else "TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """Return where the Triton kernels run: on the GPU, or interpreted on the CPU."""
    compiling = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return torch.device("cuda" if compiling else "cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every test differently, and the same again under the same --seed."""
    digest = hashlib.sha256(f"{os.environ['LOGPE_TEST_SEED']} {request.node.nodeid}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that an element that nobody writes is noticed."""
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
    """Save two thirds of the interpreter's time, and change nothing else.

    It patches triton.language anew for each function that a kernel calls: once per launch is enough. And it computes
    whether each sum and product of integers overflows, for an assertion that it does not make outside debug mode. A
    triton without these inner names runs as it is.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    nothing = type("Scope", (), {"restore": lambda self: None})()
    languages: dict[Any, list[Any]] = {}

    def patch_once(fn: Any) -> Any:
        if fn not in languages:
            languages[fn] = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        return patch(fn) if any(tl.core.is_builtin(lang.load) for lang in languages[fn]) else nothing

    interpreter._patch_lang = patch_once
