"""The command line of ``python -m logpe``. Each command is a module with an ``add_parser``."""

from __future__ import annotations

import argparse
import sys

from logpe import command
from logpe.lm import generate, train
from logpe.tuning import doctor, tune


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m logpe", description="Attention with log positions.", epilog=command.STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in (doctor, tune, train, generate):
        module.add_parser(commands)
    for name in commands.choices:
        commands.choices[name].epilog = command.STATUSES
        commands.choices[name].formatter_class = argparse.RawDescriptionHelpFormatter
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return command.BAD_USE
    return command.run(f"python -m logpe {options.command}", lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
