"""The files that a benchmark on the CPU leaves: its measurements as JSON, and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """What was measured, and with what; the fields are the keys of the JSON."""

    versions: str
    machine: str
    rounds: int
    results: dict[str, Any]


def write(measured: Measured, stem: Path) -> Path:
    """Write ``stem.json``, and return its path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(measured._asdict(), indent=1) + "\n")
    return path


def save(measured: Measured, stem: Path, plot: Callable[[Any, str, Path], None]) -> None:
    """Write ``stem.json`` and ``stem.png``, and print where they are; `plot` takes the results, a title and a path.

    Without matplotlib there is no plot.
    """
    path = write(measured, stem)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"results: {path}; no plot: matplotlib is missing")
        return
    plot(measured.results, f"{measured.versions}; {measured.machine}", stem.with_suffix(".png"))
    print(f"results: {path}, plot: {stem}.png")
