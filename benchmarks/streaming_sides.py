"""Mean and variance of a stream of chunks, as each of the libraries does it: what `streaming.py` compares."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import StandardScaler
from streaming_chunks import Array, Stream

import cupybn

OURS, ONE_THREAD = "cupybn", "cupybn, 1 thread"
NUMPY, IN_FLOAT64, DASK, SKLEARN = "NumPy", "NumPy, float64", "Dask", "scikit-learn"


def streamed(stream: Stream) -> tuple[Array, Array]:
    """cupybn's, in one pass."""
    statistics = cupybn.StreamingMoments(channel_axis=stream.case.channel_axis)
    for chunk in stream:
        statistics.update(chunk, stream.mask)
    return statistics.mean, statistics.var()


def on_one_thread(stream: Stream) -> tuple[Array, Array]:
    """cupybn's, without helpers."""
    with _threads(1):
        return streamed(stream)


def numpys(stream: Stream, dtype: npt.DTypeLike = np.float32) -> tuple[Array, Array]:
    """NumPy's: two passes over all chunks, the second about the mean of all; averages of chunks in float64."""
    case, channels_last = stream.case, stream.case.channel_axis == -1
    mask = stream.mask
    axes = case.axes if mask is None else (0,)

    def passes() -> Iterator[Array]:
        return (chunk if mask is None else _rows(chunk, case.channel_axis)[mask] for chunk in stream)

    mean = sum(chunk.mean(axes, dtype=dtype).astype(np.float64) for chunk in passes()) / case.chunks
    center = mean.astype(dtype)
    if mask is None and not channels_last:
        center = center.reshape(-1, *[1] * (len(case.shape) - 2))
    var: Any = 0.0
    for chunk in passes():
        d = chunk - center
        var = var + np.square(d, out=d).mean(axes, dtype=dtype).astype(np.float64)
    return mean, var / case.chunks


def numpys_in_float64(stream: Stream) -> tuple[Array, Array]:
    """NumPy's with the arithmetic in float64."""
    return numpys(stream, np.float64)


def dasks(stream: Stream) -> tuple[Array, Array]:
    """Dask's, on the threads of its pool, as many as there are processors; what a mask leaves out is NaN."""
    case = stream.case
    make = dask.delayed(stream.chunk, pure=False)
    parts = [da.from_delayed(make(i), case.shape, np.float32) for i in range(case.chunks)]
    x = da.concatenate(parts)
    if stream.mask is None:
        moments = x.mean(case.axes), x.var(case.axes)
    else:
        whole = da.concatenate([da.from_array(np.expand_dims(stream.mask, case.channel_axis), -1)] * case.chunks)
        x = da.where(whole, x, np.float32(np.nan))
        moments = da.nanmean(x, case.axes), da.nanvar(x, case.axes)
    with np.errstate(invalid="ignore"):
        mean, var = dask.compute(*moments, scheduler="threads")
    return mean, var


def scikit_learns(stream: Stream) -> tuple[Array, Array]:
    """`StandardScaler`'s, in one pass; it takes tables, a row for each position."""
    scaler = StandardScaler()
    for chunk in stream:
        rows = _rows(chunk, stream.case.channel_axis)
        scaler.partial_fit(rows.reshape(-1, rows.shape[-1]) if stream.mask is None else rows[stream.mask])
    return scaler.mean_, scaler.var_


SIDES: dict[str, Callable[[Stream], tuple[Array, Array]]] = {
    OURS: streamed,
    ONE_THREAD: on_one_thread,
    NUMPY: numpys,
    IN_FLOAT64: numpys_in_float64,
    DASK: dasks,
    SKLEARN: scikit_learns,
}
"""Functions from a stream to mean and variance of each channel."""


def makers(side: str) -> int:
    """Number of threads on which a side has its chunks made."""
    return len(os.sched_getaffinity(0)) if side == DASK and hasattr(os, "sched_getaffinity") else 1


def _rows(chunk: Array, channel_axis: int) -> Array:
    """View of a chunk with the channels last."""
    return np.moveaxis(chunk, channel_axis, -1)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Context in which cupybn works on so many threads."""
    before = os.environ.get("CUPYBN_NUM_THREADS")
    os.environ["CUPYBN_NUM_THREADS"] = str(n)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUPYBN_NUM_THREADS"]
        else:
            os.environ["CUPYBN_NUM_THREADS"] = before
