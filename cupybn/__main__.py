"""The command line, ``cupybn`` or ``python -m cupybn``, and its three commands: info, check and bench."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cupybn
from cupybn._cli import bench, check, info
from cupybn._cli.options import UsageError
from cupybn._steps.tiles import wanted_threads

COMMANDS = {"info": info, "check": check, "bench": bench}
SUMMARY = "What is found on this machine, whether the kernels are right on it, and how fast they are."
CLOSED_PIPE, INTERRUPTED = 128 + 13, 128 + 2
"""Exit statuses, as if the program had been ended by SIGPIPE and by SIGINT."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Numbers of the errors that a full or broken disk raises. The commands write nothing but their output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status. No traceback for a closed pipe, a full disk or Ctrl-C."""
    try:
        try:
            return run(arguments)
        finally:
            print(end="", flush=True)  # here, not when Python ends, which would print an error for a closed pipe
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        write_no_more()
        return CLOSED_PIPE
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        write_no_more()
        print(f"{program()}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def program() -> str:
    """The command as it was typed: the script that an installation brings, or the module."""
    return "cupybn" if Path(sys.argv[0]).stem == "cupybn" else "python -m cupybn"


def write_no_more() -> None:
    """Discard what is still to be written to the standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run the command."""
    typed = program()
    parser = argparse.ArgumentParser(
        prog=typed,
        description=SUMMARY,
        usage=f"{typed} [--help] [--version] {{{','.join(COMMANDS)}}} ...",
    )
    parser.add_argument("--version", action="version", version=f"cupybn {cupybn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, prog=typed)
    for name, module in COMMANDS.items():
        summary = module.__doc__ or ""
        usage = f"{typed} {name} {module.USAGE}"
        command = commands.add_parser(name, help=summary.partition("\n")[0], description=summary, usage=usage)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        if COMMANDS[options.command] is not info:
            check_environment()
        status: int = COMMANDS[options.command].run(options)
    except UsageError as error:
        commands.choices[options.command].error(str(error))
    return status


def check_environment() -> None:
    """Raise UsageError if a variable of the environment is wrong, so that no step could compute anything."""
    try:
        wanted_threads()
    except ValueError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
