"""Where the CUDA sources are."""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).parent
KERNELS = next((d for d in (_here / "kernels", _here.parent / "kernels") if d.is_dir()), _here / "kernels")
"""The folder of the ``.cu`` files: ``cupybn/kernels`` in a wheel, ``kernels`` in a checkout."""


def kernel_sources() -> list[Path]:
    """All ``.cu`` files."""
    return sorted(KERNELS.rglob("*.cu"))
