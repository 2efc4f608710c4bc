"""The layer whose batch is spread over the ranks of a communicator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from cupybn._calls import checks
from cupybn._ranks.engines import TIMEOUT, engine_for
from cupybn._ranks.group import Group
from cupybn.functional import BatchNormGrads, VjpFn
from cupybn.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, ...) arrays with the statistics of all ranks together.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training mode every rank calls the layer with its part of the batch, at the same time: mean and var are those of
    the whole batch, and the running statistics follow them, with the same bits on every rank if they start from the
    same. Parts may differ in all but C and dtype; a rank may have one sample, or none, and a mask or none. In eval mode
    nothing is exchanged.

    Gradients of the input and the residual are those of a loss that is summed over all ranks: where it is a mean over
    the batch, each rank has its share of it. Every rank calls ``vjp_fn`` as often as the others. The gradients of
    weight and bias are those of the rank's own part: who trains adds them up, as those of any other layer. There is no
    second order (``vjp_fn.vjp``) after training on several ranks.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for `BatchNorm2d`.
    bias, channel_axis, activation, skip_nonfinite
        As for `BatchNorm2d`.
    comm : communicator or None
        Of mpi4py, an NCCLBackend of `cupyx.distributed`, or a ``cupy.cuda.nccl.NcclCommunicator``; the last two for
        CuPy arrays on their device. None is a single process. No other thread may use it while the layer is called.
    timeout : float or None
        Seconds that a rank waits for the others before it raises, whatever these are doing meanwhile: more than one
        rank takes alone, to validate or to write a checkpoint. None waits for ever.

    Attributes
    ----------
    comm : communicator or None
        May be set. Copies and pickles of the layer leave it out, and want it back before they train.
    timeout : float or None
        May be set.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `BatchNorm2d`, and if comm is no communicator, or not one of this process.

    See Also
    --------
    cupybn.BatchNorm2d : What is the same here.

    Notes
    -----
    Each forward pass in training gathers one message from each rank, (count, mean, M2): 1 + 2 C numbers of float64.
    Each backward pass adds up one, (sum(dy), sum(dy * xhat)): 2 C numbers. Before its first pass a layer compares
    channels, dtype and kind of arrays of all ranks; before every pass, if it has neither parameters nor buffers. Means
    and squared deviations merge as those of the blocks of a GPU do (Chan, Golub and LeVeque, 1979).

    If a rank raises in the layer, or has other channels, another dtype or kind of arrays, all ranks raise, and their
    buffers are as they were. One that raises after the exchange, as where memory runs out, is heard of at the next
    call.

    If a rank is lost, the others raise after ``timeout`` seconds, their buffers as they were. The communicator is of no
    more use then: a rank that was only late may have gone on, and has other buffers. At the end of such a process MPI
    is aborted, as it would wait for ever. A rank that is interrupted, as by Ctrl-C, tells the others like one that
    raises; in the middle of an exchange, it has lost them.

    With NCCL, no host sees what is sent or waits for it. Where a rank raises after the first pass, outputs of the
    others are NaN; where one is lost, those of the pass are, and the next call raises. Another dtype is noticed in the
    first pass alone; it does no harm later.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import SyncBatchNorm
    >>> from mpi4py import MPI
    >>> comm = MPI.COMM_WORLD
    >>> layer = SyncBatchNorm(2, comm=comm, device="cpu")
    >>> x = np.random.default_rng(comm.rank).normal(size=(8, 2)).astype(np.float32)  # the part of this rank
    >>> y, vjp_fn = layer.vjp(x)
    >>> dx, dweight, dbias, _ = vjp_fn(np.ones_like(y))
    >>> for grad in dweight, dbias:
    ...     comm.Allreduce(MPI.IN_PLACE, grad)
    >>> bool((dbias == 8 * comm.size).all())
    True
    """

    _comm: object
    _timeout: float | None
    _left_out: bool
    """Whether this is a copy of a layer with a communicator, which the copy has not got."""

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
        skip_nonfinite: bool = False,
        comm: Any = None,
        timeout: float | None = TIMEOUT,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            channel_axis=channel_axis,
            activation=activation,
            skip_nonfinite=skip_nonfinite,
        )
        self._kind: type[_BatchNorm] | None = None  # class of the layer that `to_batchnorm` makes
        self._connect(comm, timeout)

    @classmethod
    def from_batchnorm(cls, layer: _BatchNorm, comm: Any = None, timeout: float | None = TIMEOUT) -> Self:
        """A synchronized layer that shares the arrays of another one, and has its modes and settings.

        A layer that takes its features from the first input has no arrays to share before that.

        Parameters
        ----------
        layer : BatchNorm1d, BatchNorm2d or BatchNorm3d
        comm, timeout
            As for the constructor.

        Raises
        ------
        TypeError
            If this is not a batch norm layer.

        Examples
        --------
        >>> from cupybn import BatchNorm2d, SyncBatchNorm
        >>> layer = BatchNorm2d(3, device="cpu")
        >>> synchronized = SyncBatchNorm.from_batchnorm(layer, comm=None)  # or MPI.COMM_WORLD
        >>> synchronized.weight is layer.weight
        True
        >>> type(synchronized.to_batchnorm())
        <class 'cupybn.layers.batchnorm.BatchNorm2d'>
        """
        if not isinstance(layer, _BatchNorm):
            raise TypeError(f"expected layer to be a batch norm layer (got {type(layer).__qualname__})")
        kind = layer._kind if isinstance(layer, SyncBatchNorm) else type(layer)
        new = cls.__new__(cls)
        vars(new).update(vars(layer), _kind=kind)
        new._connect(comm, timeout)
        return new

    def to_batchnorm(self) -> _BatchNorm:
        """A layer of one process that shares the arrays of this one, and has its modes and settings.

        It is of the class that this one was made from, else of that which takes inputs like the first one.

        Raises
        ------
        ValueError
            If there was neither, or there is no such class.
        """
        if self._kind is None:
            raise ValueError(
                "expected a layer that was made by from_batchnorm, or has seen an input of 2 to 5 dimensions: which of "
                "BatchNorm1d, BatchNorm2d and BatchNorm3d is it to be?"
            )
        new = self._kind.__new__(self._kind)
        vars(new).update({name: value for name, value in vars(self).items() if name not in _OWN})
        return new

    @property
    def comm(self) -> Any:
        """The communicator."""
        return self._comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        self._connect(comm, self._timeout)

    @property
    def timeout(self) -> float | None:
        """Seconds that a rank waits for the others before it raises."""
        return self._timeout

    @timeout.setter
    def timeout(self, timeout: float | None) -> None:
        checks.check_timeout(timeout)
        self._timeout = timeout
        if self._process_group is not None:
            self._process_group.engine.timeout = timeout

    def forward(self, input: Array, residual: Array | None = None, mask: Array | None = None) -> Array:
        """Return the output, as `BatchNorm2d.forward`; in training all ranks call it, each with a mask or without."""
        with self._together(input):
            return super().forward(input, residual, mask)

    def vjp(self, input: Array, residual: Array | None = None, mask: Array | None = None) -> tuple[Array, VjpFn]:
        """Return output and ``vjp_fn``, as `BatchNorm2d.vjp`; after training, all ranks call ``vjp_fn``."""
        with self._together(input) as group:
            output, vjp_fn = super().vjp(input, residual, mask)
        channels = input.shape[self.channel_axis]
        if group is None or channels == 0:  # which exchanges nothing on the way back
            return output, vjp_fn
        return output, _SynchronizedVjpFn(vjp_fn, group, channels, self._device)

    @contextlib.contextmanager
    def _together(self, input: Array) -> Iterator[Group | None]:
        """A context in which the other ranks, if they take part in the call, hear of it if this one raises."""
        if self.training and self._left_out:
            raise RuntimeError(
                f"this copy of a {type(self).__name__} has no communicator: set layer.comm to one, or to None for a "
                "single process"
            )
        group = self._process_group if self.training else None
        if group is None:
            yield None
        else:
            with group.taking_part(True, self.num_features if self._arrays() else None, self._device):
                group.engine.check(input)
                yield group
        if self._kind is None:
            self._kind = _KINDS.get(input.ndim)

    def _connect(self, comm: Any, timeout: float | None) -> None:
        """Take a communicator, or leave all as it is and raise."""
        checks.check_timeout(timeout)
        engine = None if comm is None else engine_for(comm, timeout)
        group = Group(engine) if engine is not None and engine.size > 1 else None
        vars(self).update(_comm=comm, _process_group=group, _timeout=timeout, _left_out=False)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles: all but the communicator, which belongs to this process."""
        return vars(self) | {
            "_comm": None,
            "_process_group": None,
            "_left_out": self._left_out or self._comm is not None,
        }


class _SynchronizedVjpFn(VjpFn):
    """Function that goes back, as all ranks call it."""

    __slots__ = ("_taking_part",)

    def __init__(self, vjp_fn: VjpFn, group: Group, channels: int, device: str) -> None:
        super().__init__(vjp_fn._saved)
        self._taking_part = functools.partial(group.taking_part, False, channels, device)

    def __call__(self, grad_output: Array) -> BatchNormGrads:
        with self._taking_part():
            return super().__call__(grad_output)


_OWN = ("_kind", "_comm", "_process_group", "_left_out", "_timeout")
"""Attributes that layers of one process do not have."""
_KINDS: dict[int, type[_BatchNorm]] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
"""Layers of one process, by the rank of their inputs."""
