"""Graphs of captured work."""

# The parameters are CuPy's, whether they are used here or not.

from __future__ import annotations

from typing import Any

from cupy.cuda._capture import Work


class Graph:
    """A graph of captured work. Unlike CUDA's graphs, it keeps the arrays alive that it works on."""

    _work: list[Work]
    _device: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "currently this class cannot be initiated by the user and must be created via stream capture"
        )

    @classmethod
    def _from_stream(cls, work: list[Work], device: int) -> Graph:
        graph = cls.__new__(cls)
        graph._work, graph._device = work, device
        return graph

    def launch(self, stream: Any = None) -> None:
        """Do the captured work, in the order in which it was captured."""
        from cupy.cuda.stream import get_current_stream

        (get_current_stream() if stream is None else stream)._enqueue(self._run, "launch of a graph")

    def upload(self, stream: Any = None) -> None:
        """Do nothing: there is no device to upload to."""

    def _run(self) -> None:
        from cupy.cuda.device import Device

        with Device(self._device):
            for work in self._work:
                work()
