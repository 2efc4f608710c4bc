"""The CUDA driver: its errors, and the one function that programs call through ctypes, because CuPy lacks it."""

# The names are CUDA's.
# ruff: noqa: N802

from __future__ import annotations

import ctypes
from typing import Any

from cupy._errors import CUDADriverError
from cupy.cuda import _capture

__all__ = ["CUDADriverError"]


class _Library:
    """The object that ``ctypes.cdll["libcuda.so.1"]`` is on the stand-in."""

    @staticmethod
    def cuThreadExchangeStreamCaptureMode(mode: Any) -> int:
        """Swap the capture mode of this thread with the one that a ctypes pointer points to."""
        value = mode.contents if hasattr(mode, "contents") else mode._obj
        try:
            value.value = _capture.exchange_mode(value.value)
        except ValueError:
            return 1
        return 0


setattr(ctypes.cdll, "libcuda.so.1", _Library())  # ctypes takes this attribute for a library that is already loaded
