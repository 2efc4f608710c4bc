"""The folder of the benchmarks, for the tests that import its scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def require() -> None:
    """Make the scripts importable, or skip the module that calls this while it is imported."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
