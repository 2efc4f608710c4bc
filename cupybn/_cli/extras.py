"""Optional libraries, which the commands use if they are installed and can do without."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def optional(name: str) -> Any:
    """Module of this name, or None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def progress(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """Yield the items one by one, with a progress bar if stderr is a terminal and tqdm is installed."""
    tqdm = optional("tqdm")
    if tqdm is not None:
        yield from tqdm.tqdm(items, unit=unit, leave=False, disable=None)
        return
    if sys.stderr.isatty():
        print("No progress bar: tqdm is missing, `pip install '.[cli]'` installs it.", file=sys.stderr)
    yield from items
