"""Libraries that may be missing: the commands do without."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def optional(name: str) -> Any:
    """A module, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def progress(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """The items one by one, beside a bar where the errors go to a terminal and tqdm is there."""
    tqdm = optional("tqdm")
    if tqdm is not None:
        yield from tqdm.tqdm(items, unit=unit, leave=False, disable=None)
        return
    if sys.stderr.isatty():
        print("No progress bar: tqdm is missing, `pip install '.[cli]'` installs it.", file=sys.stderr)
    yield from items
