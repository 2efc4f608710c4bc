"""The layers: what a batch norm layer holds between calls, and which of it a call uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cupybn import functional
from cupybn._arrays import devices, kinds
from cupybn._arrays.dtypes import parameter_dtype
from cupybn._calls import checks
from cupybn._calls.call import Call
from cupybn.functional import VjpFn
from cupybn.layers import state as _state

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray

INITIAL = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
"""The arrays of a layer, in the order of its state dict, and the values that they start from."""
AFFINE = ("weight", "bias")


class _BatchNorm:
    """Batch normalization with learnable weight and bias and with running statistics.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training mode mean and var are those of the batch (var biased), and the running statistics follow them:
    running = (1 - momentum) * running + momentum * batch, with the unbiased variance. In eval mode the running
    statistics are used as they are. A layer without them uses the batch in both modes.

    Parameters
    ----------
    num_features : int or None
        C. None takes it from the first input.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the new batch in the running statistics; None for the plain mean over all batches.
    affine : bool
        Whether the layer has a weight, and a bias unless ``bias=False``.
    track_running_stats : bool
        Whether the layer has running statistics. Read at every call: setting it to False later freezes them.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's arrays are. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of weight, bias and running statistics; None is float32, also for inputs of 16 bits.
    bias : bool
    channel_axis : int
        The axis of C, counted from either end; -1 for channels-last data.
    activation : None or "relu"

    Attributes
    ----------
    weight, bias, running_mean, running_var : (C,) arrays or None
        Start at 1, 0, 0 and 1. Updated in place, never replaced but by `to`.
    num_batches_tracked : 0-d int64 array or None
    training : bool

    Raises
    ------
    ValueError
        If num_features is negative or beyond what an array can hold, no rank of the layer has the channel_axis, or the
        activation or the device is unknown.
    TypeError
        If num_features or channel_axis is not an integer, eps or momentum not a number, affine, track_running_stats or
        bias not a bool, or dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import BatchNorm1d
    >>> x = np.array([[1, 10], [3, 20], [5, 60]], np.float32)  # (N, C)
    >>> layer = BatchNorm1d(2, device="cpu")
    >>> layer(x).round(2)  # training mode
    array([[-1.22, -0.93],
           [ 0.  , -0.46],
           [ 1.22,  1.39]], dtype=float32)
    >>> layer.running_mean, layer.num_batches_tracked
    (array([0.3, 3. ], dtype=float32), array(1))
    >>> layer.eval()(x[:1]).round(2)  # with the running statistics, which one batch has moved by a tenth
    array([[0.61, 0.83]], dtype=float32)
    """

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None

    _ranks: tuple[int, ...] = ()
    """The ranks of input that the layer takes; none are named where it takes any."""

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
    ) -> None:
        if num_features is not None:
            num_features = checks.check_num_features(num_features)
        checks.as_float("eps", eps)
        if momentum is not None:
            checks.as_float("momentum", momentum)
        for name, flag in ("affine", affine), ("track_running_stats", track_running_stats), ("bias", bias):
            checks.check_bool(name, flag)
        checks.as_int("channel_axis", channel_axis)
        if self._ranks:
            checks.check_channel_axis(channel_axis, max(self._ranks))
        checks.check_activation(activation)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.dtype = parameter_dtype(np.float32 if dtype is None else dtype)
        self.channel_axis = channel_axis
        self.activation = activation
        self.training = True
        self._device = devices.resolve_device(device)
        has = {"weight": affine, "bias": affine and bias}
        self._members = tuple(name for name in INITIAL if has.get(name, track_running_stats))
        for name in INITIAL:
            setattr(self, name, None)
        if num_features is not None:
            self._allocate(num_features)

    # -----------------------------------------------------------------------------------------------------------------
    # Calls

    def forward(self, input: Array, residual: Array | None = None) -> Array:
        """The output; in training mode the running statistics are updated.

        Parameters
        ----------
        input : array of a rank that the layer takes, float16, bfloat16, float32 or float64
            Of the layer's kind and on its device.
        residual : array of the input's shape and dtype, or None
            Added before the activation.

        Returns
        -------
        array of the input's kind, shape, dtype and memory order

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.batch_norm`, and if the rank is wrong, or ``training`` or ``track_running_stats`` has
            been set to something else than a bool. The layer is as it was then.
        """
        with self._settled(input):
            return functional.forward(self._call(input, residual))

    def __call__(self, input: Array, residual: Array | None = None) -> Array:
        return self.forward(input, residual)

    def vjp(self, input: Array, residual: Array | None = None) -> tuple[Array, VjpFn]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : callable
            ``vjp_fn(grad_output) -> BatchNormGrads(input, weight, bias, residual)``; see
            `cupybn.functional.batch_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import BatchNorm1d
        >>> layer = BatchNorm1d(1, activation="relu", device="cpu")
        >>> x = np.array([[0], [1], [5]], np.float32)
        >>> y, vjp_fn = layer.vjp(x, residual=x)
        >>> dx, dweight, dbias, dresidual = vjp_fn(np.ones_like(y))
        >>> dbias, dresidual.ravel()  # ReLU stopped the first row
        (array([2.], dtype=float32), array([0., 1., 1.], dtype=float32))
        >>> for parameter, grad in zip(layer.parameters(), (dweight, dbias)):
        ...     parameter -= 0.1 * grad  # in place: the layer keeps its arrays
        >>> layer.bias
        array([-0.2], dtype=float32)
        """
        with self._settled(input):
            return functional.forward_vjp(self._call(input, residual))

    def _call(self, input: Array, residual: Array | None) -> Call:
        """Which statistics, which update: torch's table."""
        for name in "training", "track_running_stats":
            checks.check_bool(name, getattr(self, name))
        checks.check_both_or_neither(self.running_mean, self.running_var)
        momentum = None if self.momentum is None else checks.as_float("momentum", self.momentum)
        moves = momentum is not None or self.num_batches_tracked is not None
        uses_buffers = not self.training or (self.track_running_stats and moves)
        return Call(
            input,
            self.running_mean if uses_buffers else None,
            self.running_var if uses_buffers else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            residual,
            self.activation,
            self.channel_axis,
            self.num_batches_tracked,
            layer_device=self._device,
            idle=() if uses_buffers or self.running_mean is None else (self.running_mean, self.running_var),
        )

    @contextlib.contextmanager
    def _settled(self, input: Array) -> Iterator[None]:
        """Check the rank and, on the first input, take the number of features from it, unless the call fails."""
        checks.check_array("input", input)
        self._check_rank(input.ndim)
        axis = checks.check_channel_axis(self.channel_axis, input.ndim)
        lazy = self.num_features is None
        try:
            if lazy:
                self._allocate(input.shape[axis])
            yield
        except BaseException:
            if lazy:
                self._release()
            raise

    def _check_rank(self, rank: int) -> None:
        if rank not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {expected} input (got {rank}D input)")

    # -----------------------------------------------------------------------------------------------------------------
    # Modes and state

    def train(self, mode: bool = True) -> Self:
        """Training mode, or eval mode with ``mode=False``. Returns the layer."""
        if not isinstance(mode, (bool, np.bool_)):
            raise ValueError(f"expected mode to be a bool (got {kinds.show(mode)})")  # PyTorch's kind of error
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Eval mode. Returns the layer."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Running statistics and counter back to where they start, if the layer tracks them."""
        if self.track_running_stats:
            self._fill({name: INITIAL[name] for name in self._arrays() if name not in AFFINE})

    def reset_parameters(self) -> None:
        """Weight and bias back to where they start, and the running statistics as `reset_running_stats`."""
        self._fill({name: INITIAL[name] for name in self._arrays() if name in AFFINE or self.track_running_stats})

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """``("weight", array)`` and ``("bias", array)``, where the layer has them."""
        return ((name, array) for name, array in self._arrays().items() if name in AFFINE)

    def parameters(self) -> Iterator[Array]:
        """Weight and bias, where the layer has them."""
        return (array for _, array in self.named_parameters())

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """The layer's arrays themselves, not copies, under torch's names and in torch's order."""
        checks.check_str("prefix", prefix)
        return {prefix + name: array for name, array in self._arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, prefix: str = "") -> None:
        """Copy a state dict into the layer's arrays.

        Parameters
        ----------
        state : mapping of names to arrays
            NumPy, CuPy or anything that ``numpy.asarray`` takes. ``num_batches_tracked`` may be missing. Entries that
            are not the layer's are not read.
        strict : bool
            Whether missing and unexpected keys are errors.
        prefix : str
            Keys that do not start with it are ignored.

        Raises
        ------
        KeyError
            If keys are missing or unexpected. Says under which other prefix they are, if there is one.
        ValueError
            If shapes are wrong, or ``num_batches_tracked`` is not a whole number that an int64 holds, 0 or more; also
            when not strict.
        TypeError
            If this is not a mapping, or a value cannot be read or is not an array of real numbers. Nothing has been
            loaded then.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import BatchNorm2d
        >>> checkpoint = {f"encoder.bn1.{name}": np.full(3, 2.0) for name in ("weight", "bias")}
        >>> checkpoint |= {"encoder.bn1.running_mean": np.zeros(3), "encoder.bn1.running_var": np.ones(3)}
        >>> layer = BatchNorm2d(3, device="cpu")
        >>> layer.load_state_dict(checkpoint, prefix="encoder.bn1.")
        >>> layer.weight
        array([2., 2., 2.], dtype=float32)

        A file that ``np.savez("layer.npz", **layer.state_dict())`` wrote is loaded by
        ``layer.load_state_dict(np.load("layer.npz"))``; where the layer is bfloat16, too, whose name NumPy's files do
        not keep.
        """
        checks.check_bool("strict", strict, f"; did you mean prefix={strict!r}?" if isinstance(strict, str) else "")
        checks.check_str("prefix", prefix)
        _state.check_mapping(state)
        names = self._members if self.num_features is None else tuple(self._arrays())
        keys = _state.under(prefix, state.keys())
        own = {}
        for name in names:
            if prefix + name in keys:
                dtype = getattr(getattr(self, name), "dtype", self._dtype_of(name))  # that of an array of the user's
                own[name] = _state.as_array(prefix + name, _state.read(state, prefix + name), dtype)
        unexpected = [key for key in keys if key not in [prefix + name for name in names]]
        features = self.num_features
        if features is None:
            features = next((own[name].size for name in names if name in own and own[name].ndim == 1), None)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (features or 0,))
        if _state.COUNTER in shapes:
            shapes[_state.COUNTER] = ()
        _state.check(state, own, unexpected, shapes, strict, prefix)
        if features is None:  # nothing here tells a lazy layer its size
            return
        loaded = {
            name: devices.transfer(own[name], self._dtype_of(name), self._device) for name in names if name in own
        }
        if self.num_features is None:
            self._allocate(features, loaded)
        else:
            self._fill(loaded)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled CuPy arrays are on the current device: bring them to that of the layer."""
        vars(self).update(state)
        for name, array in self._arrays().items():
            if kinds.kind(array) is not None and kinds.device_of(array) != self._device:
                setattr(self, name, devices.transfer(array, array.dtype, devices.resolve_device(self._device)))

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return self._device

    def to(self, device: str) -> Self:
        """Move the layer's arrays to a device: new arrays, if it is another one. Returns the layer.

        Raises
        ------
        ValueError, RuntimeError
            If the device is unknown, or is not there.
        """
        target = devices.named_device(device)
        if target != self._device:
            moved = {name: devices.transfer(array, array.dtype, target) for name, array in self._arrays().items()}
            vars(self).update(moved, _device=target)
        return self

    def __repr__(self) -> str:
        bias = "bias" in self._members if self.num_features is None else self.bias is not None
        text = (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={bias}, track_running_stats={self.track_running_stats}"
        )
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text + ")"

    def _arrays(self) -> dict[str, Array]:
        """The arrays that there are, in the order of the state dict."""
        return {name: getattr(self, name) for name in INITIAL if getattr(self, name) is not None}

    def _allocate(self, num_features: int, values: Mapping[str, Array] | None = None) -> None:
        """Take new arrays: those that are given, and others with what they start from."""
        given = values or {}
        arrays = {
            name: given[name]
            if name in given
            else devices.full(
                () if name == _state.COUNTER else (num_features,), INITIAL[name], self._dtype_of(name), self._device
            )
            for name in self._members
        }
        vars(self).update(arrays, num_features=num_features)

    def _release(self) -> None:
        vars(self).update(dict.fromkeys(self._members), num_features=None)

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Write into the layer's arrays, all or none."""
        for name in values:
            if kinds.kind(getattr(self, name)) is None:
                raise TypeError(f"expected {name} to be an array (got {kinds.describe(getattr(self, name))})")
            checks.check_writeable(name, getattr(self, name))
        before: list[tuple[Array, Array]] = []
        try:
            for name, value in values.items():
                array = getattr(self, name)
                with devices.current(array):
                    before.append((array, devices.copied(array)))
                    array[...] = value
        except BaseException:
            for array, value in reversed(before):
                with devices.current(array):
                    array[...] = value
            raise

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.int64) if name == _state.COUNTER else self.dtype


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) and (N, C, L) arrays."""

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) arrays."""

    _ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays."""

    _ranks = (5,)


for _layer in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _layer.__doc__ = f"{_layer.__doc__}\n{(_BatchNorm.__doc__ or '').partition(chr(10))[2]}"
