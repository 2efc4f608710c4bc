"""Moments of arrays that come one after the other."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import import_cupy, module_of, on_device_of
from cupybn._arrays.kinds import describe, device_of
from cupybn._calls import checks
from cupybn._ranks.engines import TIMEOUT, engine_for
from cupybn._ranks.group import Group
from cupybn._ranks.totals import total_of_ranks
from cupybn._steps.launcher import unheard
from cupybn._steps.ops import ops_for
from cupybn._steps.totals import Total
from cupybn.statistics.axes import ChannelAxis, as_channel_axis, check_axes, sizes_along
from cupybn.statistics.moments import parts_of

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray


class StreamingMoments:
    """Mean and variance of each channel of arrays that come one after the other, as if they were one array.

    Count, mean and sum of squared deviations merge exactly, in float64 (Chan, Golub and LeVeque, 1979), so that chunks
    may be cut at will, and come in any order. Memory is that of three numbers for each channel, whatever streams
    through. The same chunks in the same order give the same bits.

    Parameters
    ----------
    channel_axis : int or tuple of ints
        The channel axis of the arrays, which have rank >= 2 then, or several axes: what shares a place along all of
        them shares statistics. Where the channels of several axes do not lie in memory as those of one, chunks are
        copied.

    Attributes
    ----------
    channel_axis : int or tuple of ints

    Raises
    ------
    TypeError
        If channel_axis is neither an int nor a tuple of ints.
    ValueError
        If it is an empty tuple, or has an axis twice.

    See Also
    --------
    cupybn.functional.moments : The same of a single array.

    Notes
    -----
    On CuPy arrays an update is a few launches, always the same ones, on the current stream, and nothing waits for the
    host; `synchronize` and ``repr`` do. An update that is captured in a CUDA graph is an error: each launch of the
    graph would add to what there was when it was captured.

    What is held is never changed but replaced as a whole. So an error, Ctrl-C included, leaves everything as it was,
    and copies and sums share memory with what they were made of, and nothing else. Several threads that update one
    object may lose updates: let each have its own, and add them up.

    Pickles hold a few arrays, so that Dask, joblib and MPI can send them.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> stats = cupybn.StreamingMoments()
    >>> for chunk in np.split(np.arange(24, dtype=np.float32).reshape(12, 2), [2, 7]):  # (N, C)
    ...     _ = stats.update(chunk)
    >>> stats
    StreamingMoments(channel_axis=1, channels=2, count=12, device='cpu')
    >>> stats.mean, stats.std(ddof=1).round(3)
    (array([11., 12.]), array([7.211, 7.211]))

    Workers have their own, which add up:

    >>> halves = [cupybn.StreamingMoments().update(np.full((4, 1), x, np.float32)) for x in (1, 3)]
    >>> (halves[0] + halves[1]).var()
    array([1.])
    """

    _seen: _Seen | None = None  # what was added; None before there is anything

    def __init__(self, channel_axis: int | tuple[int, ...] = 1) -> None:
        self._channel_axis = as_channel_axis(channel_axis)

    @property
    def channel_axis(self) -> ChannelAxis:
        """The channel axis of the arrays, or the tuple of axes."""
        return self._channel_axis

    def update(self, input: Array, mask: Array | None = None) -> Self:
        """Add the values of an array. Returns this object.

        Parameters
        ----------
        input : array
            Of a kind and dtype that `cupybn.functional.batch_norm` takes. Chunks may differ in rank, dtype, memory
            order and all sizes but those along the channel axes. An empty one changes nothing.
        mask : bool array or None
            True where there is data: of the input's shape without the channel axes, or one that broadcasts to it. What
            it leaves out is as if it were not there.

        Raises
        ------
        TypeError
            If an argument is not an array of the right kind, device and dtype.
        ValueError
            If the input has no such axes or other channels than those before, or the mask does not broadcast.
        RuntimeError
            If the update is captured in a CUDA graph. Nothing has changed then.
        """
        axes = check_axes(input, self._channel_axis)
        if mask is not None:
            checks.check_mask(mask, input, axes)
        shape = sizes_along(input, axes)
        self._check_fits("input", input, shape)
        if input.size == 0:
            return self
        _check_not_captured(input)
        ops = ops_for(input)
        with on_device_of(input), unheard():
            total = Total.of(ops.merge_moments(parts_of(ops, input, axes, mask)))
            if self._seen is not None:
                total = self._seen.total.plus(ops, total)
        self._seen = _Seen(shape, total)
        return self

    def merge(self, other: StreamingMoments) -> Self:
        """Add all values that another object has seen, and leave that one as it is. Returns this object.

        Raises
        ------
        TypeError
            If `other` is no `StreamingMoments`, or on another device.
        ValueError
            If it has other channels.
        RuntimeError
            If this is captured in a CUDA graph. Nothing has changed then.
        """
        if not isinstance(other, StreamingMoments):
            raise TypeError(f"expected other to be a StreamingMoments (got {describe(other)})")
        seen = other._seen
        if seen is None:
            return self
        self._check_fits("other", seen.total.row, seen.shape)
        if self._seen is not None:
            _check_not_captured(seen.total.row)
            with on_device_of(seen.total.row), unheard():
                seen = _Seen(seen.shape, self._seen.total.plus(ops_for(seen.total.row), seen.total))
        self._seen = seen
        return self

    def __add__(self, other: object) -> Self:
        if not isinstance(other, StreamingMoments):
            return NotImplemented
        return copy.copy(self).merge(other)

    def synchronize(self, comm: Any, timeout: float | None = TIMEOUT) -> Self:
        """Moments of what all ranks of a communicator have added: a new object, with the same bits on each of them.

        All ranks call this at the same time. What each one has added stays its own. The host waits for the others.

        Parameters
        ----------
        comm : communicator or None
            As for `SyncBatchNorm`; None is a single process.
        timeout : float or None
            Seconds that a rank waits for the others before it raises. None waits for ever.

        Returns
        -------
        StreamingMoments
            On the device of what this rank has added. One that has added nothing gets NumPy arrays.

        Raises
        ------
        TypeError
            If comm is no communicator, or does not go with the arrays of this rank: NCCL takes CuPy arrays on its
            device.
        ValueError
            On all ranks, if they have other channels, or if one has added nothing and the communicator is NCCL's.
        RuntimeError
            If a rank does not answer, or has raised before they exchanged anything: then it raises on all of them.

        Examples
        --------
        >>> import numpy as np
        >>> import cupybn
        >>> from mpi4py import MPI
        >>> comm = MPI.COMM_WORLD
        >>> stats = cupybn.StreamingMoments()
        >>> chunk = np.array([[comm.rank, 0], [comm.rank, 1]], np.float32)  # of this rank
        >>> int(stats.update(chunk).synchronize(comm).count) == 2 * comm.size
        True
        """
        checks.check_timeout(timeout)
        new = copy.copy(self)
        if comm is None:
            return new
        group, seen = Group(engine_for(comm, timeout), "StreamingMoments.synchronize"), self._seen
        device = "cpu" if seen is None else device_of(seen.total.row)
        with group.taking_part(True, None, device):
            if seen is None:
                total, shape = total_of_ranks(group, None, ())
            else:
                _check_not_captured(seen.total.row)
                with on_device_of(seen.total.row), unheard():
                    total, shape = total_of_ranks(group, seen.total, seen.shape)
        new._seen = None if total is None else _Seen(shape, total)
        return new

    @property
    def count(self) -> Array:
        """Number of values of each channel: a new int64 array without axes, on the device; NumPy's before an update."""
        if self._seen is None:
            return np.zeros((), np.int64)
        row = self._seen.total.row
        with on_device_of(row):
            return row[:, 0].astype(np.int64).reshape(())

    @property
    def mean(self) -> Array:
        """Mean of each channel: a new float64 array, of the shape that the arrays have along the channel axes.

        NaN where masks have left nothing. ValueError before anything was added, as for the others.
        """
        shape, total = self._some()
        with on_device_of(total.row), unheard():
            return ops_for(total.row).mean_and_var(total.moments(), np.dtype(np.float64))[0].reshape(shape)

    def var(self, ddof: float = 0) -> Array:
        """Variance of each channel: a new float64 array, like `mean`.

        Parameters
        ----------
        ddof : float
            What is subtracted from the count that the squares are divided by: 1 for the unbiased variance.

        Returns
        -------
        array
            NaN where the count is not above ddof.

        Raises
        ------
        TypeError
            If ddof is not a number.
        ValueError
            Before anything was added.
        """
        ddof = checks.as_float("ddof", ddof)
        shape, total = self._some()
        with on_device_of(total.row):
            return total.var(ddof).reshape(shape)

    def std(self, ddof: float = 0) -> Array:
        """Standard deviation of each channel: the square root of `var`, with the same arguments and errors."""
        var = self.var(ddof)
        with on_device_of(var):
            return module_of(var).sqrt(var)

    def __repr__(self) -> str:
        about = ""
        if self._seen is not None:
            shape = self._seen.shape
            about = f"channels={shape if isinstance(self._channel_axis, tuple) else shape[0]}, "
        device = "" if self._seen is None else f", device={device_of(self._seen.total.row)!r}"
        return f"{type(self).__name__}(channel_axis={self._channel_axis}, {about}count={int(self.count)}{device})"

    def _some(self) -> _Seen:
        """What was added; raises if that is nothing."""
        if self._seen is None:
            raise ValueError("expected an update before statistics are asked for (got none): nothing was added yet")
        return self._seen

    def _check_fits(self, name: str, array: Array, shape: tuple[int, ...]) -> None:
        """Check that something on this array's device, with channels of this shape, goes with what was added."""
        if self._seen is None:
            return
        expected, total = self._seen
        if device_of(array) != device_of(total.row):
            raise TypeError(
                f"expected {name} on {device_of(total.row)}, as what was added before (got one on {device_of(array)}): "
                "use an object for each device"
            )
        if shape != expected:
            raise ValueError(f"expected {name} with {_words(expected)}, as what was added before (got {_words(shape)})")


class _Seen(NamedTuple):
    """What was added to an object."""

    shape: tuple[int, ...]  # sizes along the channel axes
    total: Total


def _words(shape: tuple[int, ...]) -> str:
    """Words for the channels of an array, in messages."""
    return f"{shape[0]} channels" if len(shape) == 1 else f"channels of shape {shape}"


def _check_not_captured(array: Array) -> None:
    """Check that work on this array is not being captured in a CUDA graph."""
    if not isinstance(array, np.ndarray) and import_cupy().cuda.get_current_stream().is_capturing():
        raise RuntimeError(
            "expected a StreamingMoments to be used without a CUDA graph, whose launches would each begin with what "
            "there is now (got a call that is captured in one): use cupybn.functional.moments there"
        )
