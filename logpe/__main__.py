"""The commands of ``python -m logpe``; each is a module with an ``add_parser``."""

from __future__ import annotations

import argparse
import sys

from logpe import doctor, generate, train, tune


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m logpe", description="Attention with log positions.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (doctor, tune, train, generate):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
