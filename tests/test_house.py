"""The rules of the house that a reader can check: who may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"logpe": ROOT / "logpe", "bench": ROOT / "bench", "logpe_kernels": ROOT / "kernels" / "logpe_kernels"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # which are public


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_imports(source: str) -> Iterator[str]:
    """Underscored names of this project's other modules that a module imports or reads."""
    tree = ast.parse(source)
    ours = set()  # names that hold something of another module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in PACKAGES):
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (f"line {node.lineno}: {a.name}" for a in node.names if _is_private(a.name))
        elif isinstance(node, ast.Import):
            ours |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in PACKAGES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in ours:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_module_imports_the_underscored_names_of_another() -> None:
    modules = [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    assert len(modules) > 30
    private = {str(path.relative_to(ROOT)): list(private_imports(path.read_text())) for path in modules}
    assert not {path: names for path, names in private.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "from logpe.checks import _known",
        "from ..checks import _known as known",
        "from . import _known",
        "from logpe import checks\nchecks._known.clear()",
        "import logpe.checks as c\ndef f():\n    return c._known",
        "import logpe.checks\nlogpe.checks._known",
        "def f():\n    from bench import common\n    common._known = 1",
        "import logpe_kernels\nlogpe_kernels.plan._known",
    ],
)
def test_it_would_be_noticed(source: str) -> None:
    assert len(list(private_imports(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["import torch\ntorch._C", "from logpe import position\nposition.__name__", "def _f(self):\n    self._known"],
)
def test_a_module_may_use_its_own(source: str) -> None:
    assert not list(private_imports(source))


def test_docstrings_read_without_the_name() -> None:
    """None goes on from the name of its function, as "Of the ..." would."""
    paths = [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                assert text.split()[0] not in ("Of", "As", "And", "Nor", "Else", "Now."), f"{path}: {text}"
