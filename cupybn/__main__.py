"""``python -m cupybn``: what is found on this machine, whether the kernels are right on it, and how fast they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cupybn._cli import bench, check, info

COMMANDS = {"info": info, "check": check, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupybn", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__ or ""
        command = commands.add_parser(name, help=summary.partition("\n")[0], description=summary)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    status: int = COMMANDS[options.command].run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
