"""The base of all layers: named arrays on one device, state dicts, and training and eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybn._arrays import devices, kinds
from cupybn._calls import checks
from cupybn.layers import state as _state

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray

INITIAL = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
"""Names of the arrays that layers have, in the order of state dicts, and the values that they start from."""
AFFINE = ("weight", "bias")
"""Names of the arrays that are parameters."""


class Layer:
    """A layer: arrays under the names in ``INITIAL``, on one device. It has all of its arrays, or none as yet.

    Parameters
    ----------
    members : tuple of str
        Names of the arrays that this layer has, as an attribute of the same name each; the others are None.
    device : str or None
        As `cupybn._arrays.devices.resolve_device` takes it.
    dtype : dtype
        Of all arrays but the counter.
    """

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: Array | None
    num_features: int | None
    training: bool

    def __init__(self, members: tuple[str, ...], device: str | None, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.training = True
        self._members = members
        self._device = devices.resolve_device(device)
        for name in INITIAL:
            setattr(self, name, None)

    def train(self, mode: bool = True) -> Self:
        """Training mode, or eval mode with ``mode=False``. Returns the layer."""
        if not isinstance(mode, (bool, np.bool_)):
            raise ValueError(f"expected mode to be a bool (got {kinds.show(mode)})")  # PyTorch's kind of error
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Eval mode. Returns the layer."""
        return self.train(False)

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
        # A layer with arrays goes by those that it has now: the user may have set one to None, or one in its place.
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
        """Go back to having no arrays, as before `_allocate`."""
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
                with devices.on_device_of(array):
                    before.append((array, devices.copied(array)))
                    array[...] = value
        except BaseException:
            for array, value in reversed(before):
                with devices.on_device_of(array):
                    array[...] = value
            raise

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        """Dtype of the array of a name, as the layer makes it."""
        return np.dtype(np.int64) if name == _state.COUNTER else self.dtype
