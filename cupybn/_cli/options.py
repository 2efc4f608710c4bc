"""Options of the commands: types that say what they expect, and the error for options that do not work."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np

from cupybn._arrays.dtypes import FLOATS, parameter_dtype
from cupybn._cli.extras import optional

MOST_DIMENSIONS = 32
"""Most axes of an array that CuPy takes."""


class UsageError(Exception):
    """Raised for options that do not work on this machine or together. The user sees one line, without a traceback."""


def add_dtypes(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option ``--dtype`` to a parser."""
    help = f"may be given several times (default: {default})"
    parser.add_argument("--dtype", choices=FLOATS, action="append", dest="dtypes", help=help)


def shape(text: str) -> tuple[int, ...]:
    """Shape from its text on the command line, 32,64,7,7, or as the tables print it, 32x64x7x7."""
    try:
        sizes = tuple(int(size) for size in text.split("x" if "x" in text else ","))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= MOST_DIMENSIONS or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected 2 to {MOST_DIMENSIONS} positive sizes, such as 32,64,112,112 (got {text!r})"
        )
    if math.prod(sizes) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected fewer than 2**63 elements (got {text!r})")
    return sizes


def groups(text: str) -> int:
    """Number of groups from its text on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of groups, 1 or more (got {text!r})")
    return int(text)


def seconds(text: str) -> float:
    """Number of seconds from its text on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more (got {text!r})")
    return value


def chosen_dtypes(names: list[str] | None, default: tuple[str, ...]) -> list[np.dtype[Any]]:
    """Dtypes that the user named, each once. If none is named, those of ``default`` that are available here."""
    known = optional("ml_dtypes") is not None
    hint = "ml_dtypes is missing, `pip install '.[bf16]'` installs it"
    if names and "bfloat16" in names and not known:
        raise UsageError(f"argument --dtype: bfloat16 cannot be used here: {hint}")
    if not names and "bfloat16" in default and not known:
        print(f"Without bfloat16: {hint}.", flush=True)
    return [parameter_dtype(name) for name in dict.fromkeys(names or default) if known or name != "bfloat16"]
