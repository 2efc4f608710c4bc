"""The CUDA driver: its errors, and the one function that programs reach through ctypes, since CuPy has it not."""

# The names are CUDA's.
# ruff: noqa: N802

from __future__ import annotations

import ctypes
from typing import Any

from cupy._errors import CUDADriverError
from cupy.cuda import _capture

__all__ = ["CUDADriverError"]


class _Library:
    """What ``ctypes.cdll["libcuda.so.1"]`` has here."""

    @staticmethod
    def cuThreadExchangeStreamCaptureMode(mode: Any) -> int:
        """Swap the capture mode of this thread with the one at a pointer of ctypes."""
        value = mode.contents if hasattr(mode, "contents") else mode._obj
        try:
            value.value = _capture.exchange_mode(value.value)
        except ValueError:
            return 1
        return 0


setattr(ctypes.cdll, "libcuda.so.1", _Library())  # as if somebody had loaded it before
