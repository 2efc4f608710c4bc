"""What the commands use beside NumPy: libraries that may be missing, what comes with them, and a progress bar."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from cupybn._dtypes import parameter_dtype

Item = TypeVar("Item")

NEEDS_TQDM = "this command shows its progress with tqdm, which is missing: `pip install cupybn[cli]` installs it"


def optional(name: str) -> Any:
    """A module, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def progress(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """The items one by one, beside a bar on the terminal; the program ends with a message where there is no tqdm."""
    tqdm = optional("tqdm")
    if tqdm is None:
        raise SystemExit(NEEDS_TQDM)
    yield from tqdm.tqdm(items, unit=unit, leave=False)


def usable_dtypes(names: Sequence[str]) -> list[np.dtype[Any]]:
    """Those that NumPy knows here."""
    known = [name for name in names if name != "bfloat16" or optional("ml_dtypes") is not None]
    if len(known) < len(names):
        print("Without bfloat16: ml_dtypes is missing, `pip install cupybn[bf16]` installs it.")
    return [parameter_dtype(name) for name in known]
