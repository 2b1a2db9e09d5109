"""The programs of this package: ``python -m bench`` lists them, ``python -m bench throughput`` runs one."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = {
    "extrapolation": "study",
    "translation": "study",
    "classification": "study",
    "generation": "study",
    "throughput": "speed",
    "decode": "speed",
    "host_overhead": "speed",
    "compile_report": "speed",
    "counters": "speed",
    "scaling": "speed",
    "gpu": "speed",
}


def usage() -> str:
    """Return the names of the programs, each with the first line of its documentation. Imports none of them."""
    lines = ["usage: python -m bench PROGRAM ...        (python -m bench PROGRAM --help says more)", ""]
    for name, folder in PROGRAMS.items():
        source = (Path(__file__).parent / folder / f"{name}.py").read_text()
        lines.append(f"  {name:16} {(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program that the command line names; return its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in PROGRAMS:
        print(usage() + (f"\n\nThere is no program {name!r}." if name else ""), file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"bench.{PROGRAMS[name]}.{name}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
