"""The errors of CUDA, with the texts that CuPy gives them."""

from __future__ import annotations

from typing import ClassVar

_KNOWN = {
    1: ("InvalidValue", "INVALID_VALUE", "invalid argument"),
    100: ("NoDevice", "NO_DEVICE", "no CUDA-capable device is detected"),
    101: ("InvalidDevice", "INVALID_DEVICE", "invalid device ordinal"),
    400: ("InvalidResourceHandle", "INVALID_HANDLE", "invalid resource handle"),
    401: ("IllegalState", "ILLEGAL_STATE", "the operation cannot be performed in the present state"),
    500: ("SymbolNotFound", "NOT_FOUND", "named symbol not found"),
    600: ("NotReady", "NOT_READY", "device not ready"),
    700: ("IllegalAddress", "ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
    719: ("LaunchFailure", "LAUNCH_FAILED", "unspecified launch failure"),
    900: (
        "StreamCaptureUnsupported",
        "STREAM_CAPTURE_UNSUPPORTED",
        "operation not permitted when stream is capturing",
    ),
    901: (
        "StreamCaptureInvalidated",
        "STREAM_CAPTURE_INVALIDATED",
        "operation failed due to a previous error during capture",
    ),
    905: (
        "StreamCaptureIsolation",
        "STREAM_CAPTURE_ISOLATION",
        "dependency created on uncaptured work in another stream",
    ),
    906: (
        "StreamCaptureImplicit",
        "STREAM_CAPTURE_IMPLICIT",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
    907: (
        "CapturedEvent",
        "CAPTURED_EVENT",
        "operation not permitted on an event last recorded in a capturing stream",
    ),
    908: (
        "StreamCaptureWrongThread",
        "STREAM_CAPTURE_WRONG_THREAD",
        "attempt to terminate a thread-local capture sequence from another thread",
    ),
    912: (
        "InvalidClusterSize",
        "INVALID_CLUSTER_SIZE",
        "a kernel launch error has occurred due to cluster misconfiguration",
    ),
}


class _CUDAError(RuntimeError):
    """An error that CUDA reports by its number. `__cause__` adds what only the stand-in knows of it."""

    _prefix: ClassVar[str]
    _name: ClassVar[int]

    def __init__(self, status: int) -> None:
        self.status = status
        known = _KNOWN[status]
        super().__init__(f"{self._prefix}{known[self._name]}: {known[-1]}")

    def __reduce__(self) -> tuple[type[_CUDAError], tuple[int]]:
        return type(self), (self.status,)


class CUDARuntimeError(_CUDAError):
    """An error of the CUDA runtime: memory, streams, events, graphs, devices."""

    _prefix, _name = "cudaError", 0


class CUDADriverError(_CUDAError):
    """An error of the CUDA driver: modules, kernels, launches."""

    _prefix, _name = "CUDA_ERROR_", 1


class DetailError(Exception):
    """The cause of an error, in the stand-in's own words, as CUDA has none."""
