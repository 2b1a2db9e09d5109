"""The commands of ``python -m logpe``."""

from __future__ import annotations

import argparse
import sys

from logpe import train, tune
from logpe.doctor import doctor


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m logpe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, devices, backends and tiles, and check them")
    parser_of_tune = commands.add_parser(
        "tune",
        help="measure the fastest tiles for this GPU and keep them",
        description=tune.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_arguments(parser_of_tune)
    train.add_parser(commands)
    options = parser.parse_args(arguments)
    if "run" in options:
        return options.run(options)
    return tune.main(options) if options.command == "tune" else int(doctor() > 0)


if __name__ == "__main__":
    sys.exit(main())
