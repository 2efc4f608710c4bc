"""Devices, by their numbers."""

from __future__ import annotations

import threading
from typing import Any

from cupy.cuda import runtime

_local = threading.local()


class Device:
    """A device by its number, by default the current one. A `with` statement makes it current for its block."""

    def __init__(self, device: int | Device | None = None) -> None:
        self.id: int = runtime.getDevice() if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        before = runtime.getDevice()
        _entered().append(before)
        if self.id != before:  # as CuPy has it: a thread that is new to CUDA gets no context by this
            runtime.setDevice(self.id)
        return self

    def __exit__(self, *exception: object) -> None:
        runtime.setDevice(_entered().pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __lt__(self, other: Device) -> bool:
        return self.id < other.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> Device:
        """Make this device current."""
        runtime.setDevice(self.id)
        return self

    def synchronize(self) -> None:
        """Wait for all work of this device."""
        with self:
            runtime.deviceSynchronize()

    @property
    def compute_capability(self) -> str:
        """The compute capability as text, such as "90"."""
        of = runtime.getDeviceProperties(self.id)
        return f"{of['major']}{of['minor']}"

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes of the device by name."""
        return {
            name.removeprefix("cudaDevAttr"): runtime.deviceGetAttribute(number, self.id)
            for name, number in vars(runtime).items()
            if name.startswith("cudaDevAttr")
        }

    @property
    def mem_info(self) -> tuple[int, int]:
        """Bytes of memory that are free, and bytes in all."""
        with self:
            return runtime.memGetInfo()


def _entered() -> list[int]:
    if not hasattr(_local, "entered"):
        _local.entered = []
    entered: list[int] = _local.entered
    return entered
