"""The switch `no_stats_update`: whether forward passes of a thread update running statistics."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Inside(threading.local):
    """Contexts that a thread is in. A set, not a stack: generators and tasks may leave them in any order."""

    def __init__(self) -> None:
        self.contexts: set[object] = set()


_inside = _Inside()


@contextlib.contextmanager
def no_stats_update() -> Iterator[None]:
    """Let forward passes in this context leave running statistics and counters alone.

    They still normalise with the batch in training mode. For passes that only repeat another one: recomputation under
    checkpointing, warm-up before a graph capture. Holds for the thread that enters it; may be nested.

    Examples
    --------
    >>> import cupybn
    >>> import numpy as np
    >>> layer = cupybn.BatchNorm1d(2, device="cpu")
    >>> with cupybn.no_stats_update():
    ...     y = layer(np.array([[1, 10], [3, 20]], np.float32))
    >>> layer.running_mean, layer.num_batches_tracked
    (array([0., 0.], dtype=float32), array(0))
    """
    context = object()
    try:
        _inside.contexts.add(context)
        yield
    finally:
        _inside.contexts.discard(context)


def updates_stats() -> bool:
    """Whether running statistics move: False within `no_stats_update`."""
    return not _inside.contexts
