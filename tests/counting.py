"""Makes the counter of `benchmarks/instructions` available to tests."""

from __future__ import annotations

import pytest

from tests import benchmark_scripts, nvrtc


def require() -> None:
    """Make the counter importable, or skip the module that calls this while it is imported."""
    pytest.importorskip("ml_dtypes")
    pytest.importorskip("tqdm")
    cupy = pytest.importorskip("cupy")
    if not hasattr(cupy, "emulator"):
        pytest.skip("launches are caught on the stand-in for CuPy", allow_module_level=True)
    benchmark_scripts.require()
    if nvrtc.find_library() is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc", allow_module_level=True)
    from instructions.program import find_nvdisasm

    if find_nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm", allow_module_level=True)
