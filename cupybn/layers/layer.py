"""The base of all layers: named arrays on one device, state dicts, and training and eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays import devices, kinds
from cupybn._arrays.dtypes import FLOATS, parameter_dtype
from cupybn._calls import checks
from cupybn.layers import state as _state
from cupybn.layers.names import COUNTER, is_vector, names_of
from cupybn.layers.state import IncompatibleKeys
from cupybn.layers.writing import check_array, check_target, write

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray

INITIAL = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
"""Names of the arrays that layers have, in the order of state dicts, and the values that they start from."""
AFFINE = ("weight", "bias")
"""Names of the arrays that are parameters."""


class Layer:
    """A layer: arrays under the names in ``INITIAL``, on one device. It has all of its arrays, or none as yet.

    All have one shape, but for the counter, which has no axes.

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
    training: bool

    def __init__(self, members: tuple[str, ...], device: str | None, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.training = True
        self._members = members
        self._device = devices.resolve_device(device)
        for name in INITIAL:
            setattr(self, name, None)

    @property
    def _shape(self) -> tuple[int, ...] | None:
        """Shape of the layer's arrays but the counter; None as long as there are none, and an input is to tell."""
        return ()

    def _settings_for(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Attributes from which a layer that had no shape has this one, by name."""
        raise NotImplementedError(f"{type(self).__name__} has a shape from the beginning")

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

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Running statistics and the number of batches with their names, where the layer has them."""
        return ((name, array) for name, array in self._arrays().items() if name not in AFFINE)

    def buffers(self) -> Iterator[Array]:
        """Running statistics and the number of batches, where the layer has them."""
        return (array for _, array in self.named_buffers())

    def state_dict(self, prefix: str = "", device: str | None = None, names: str = "torch") -> dict[str, Array]:
        """The layer's arrays by their names, in torch's order.

        Parameters
        ----------
        prefix : str
            Beginning of all keys.
        device : "cpu", "cuda", "cuda:N" or None
            Where copies of the arrays are to be; None for the arrays themselves, not copies.
        names : "torch", "keras", "flax", "chainer" or "onnx"
            Whose names the keys are to have. Only torch and Chainer have one for ``num_batches_tracked``; under the
            names of others it is left out.

        Raises
        ------
        ValueError, RuntimeError
            If names or device are unknown, or the device is not there.
        TypeError
            If the prefix is no str.

        Examples
        --------
        >>> from cupybn import BatchNorm2d
        >>> layer = BatchNorm2d(2, device="cpu")
        >>> state = layer.state_dict("bn1/", device="cpu", names="keras")
        >>> state.keys()
        dict_keys(['bn1/gamma', 'bn1/beta', 'bn1/moving_mean', 'bn1/moving_variance'])
        >>> layer.bias += 1
        >>> state["bn1/beta"]  # a copy, which does not follow
        array([0., 0.], dtype=float32)
        """
        checks.check_str("prefix", prefix)
        theirs = names_of(names)
        arrays = {name: array for name, array in self._arrays().items() if name in theirs}
        if device is not None:
            target = devices.named_device(device)
            for name, array in arrays.items():
                check_array(name, array)
            arrays = {name: devices.transfer(array, array.dtype, target) for name, array in arrays.items()}
        return {prefix + theirs[name]: array for name, array in arrays.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, prefix: str = "", names: str = "torch"
    ) -> IncompatibleKeys:
        """Copy a state dict into the layer's arrays.

        Parameters
        ----------
        state : mapping of names to arrays
            NumPy, CuPy, tensors of PyTorch or anything that ``numpy.asarray`` takes. ``num_batches_tracked`` may be
            missing. Entries that are not the layer's are not read.
        strict : bool
            Whether missing and unexpected keys are errors.
        prefix : str
            Keys that do not start with it are ignored.
        names : "torch", "keras", "flax", "chainer" or "onnx"
            Whose names the keys have:

            ======= ======== ======= ============= ================= =====================
            torch   weight   bias    running_mean  running_var       num_batches_tracked
            keras   gamma    beta    moving_mean   moving_variance   none
            flax    scale    bias    mean          var               none
            chainer gamma    beta    avg_mean      avg_var           N
            onnx    scale    B       input_mean    input_var         none
            ======= ======== ======= ============= ================= =====================

            Where they are not torch's, vectors may have the shape (1, C, 1, 1) or the like: every axis but that of C is
            1 long. A counter without a name is not there: the layer keeps its own.

        Returns
        -------
        IncompatibleKeys
            Lists of the missing and of the unexpected keys, in full; both are empty after a strict load.

        Raises
        ------
        KeyError
            If keys are missing or unexpected. Says under which other prefix or names they are, if they are.
        ValueError
            If shapes are wrong, or ``num_batches_tracked`` is not a whole number that an int64 holds, 0 or more; also
            when not strict. If names are unknown.
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
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> layer.weight
        array([2., 2., 2.], dtype=float32)

        A file that ``np.savez("layer.npz", **layer.state_dict())`` wrote is loaded by
        ``layer.load_state_dict(np.load("layer.npz"))``; where the layer is bfloat16, too, whose name NumPy's files do
        not keep.
        """
        checks.check_bool("strict", strict, f"; did you mean prefix={strict!r}?" if isinstance(strict, str) else "")
        checks.check_str("prefix", prefix)
        _state.check_mapping(state)
        loading = self._loading(state, _state.under(prefix, state.keys()), strict, prefix, names)
        if loading.faults.types:
            raise loading.faults.types[0]
        error = _state.error_of([loading.faults])
        if error is not None:
            raise error
        return write([(self, loading.values)], loading.keys)

    def _loading(self, state: Mapping[Any, Any], keys: Sequence[Any], strict: bool, prefix: str, names: str) -> Loading:
        """What a state has for this layer, read and checked, as copies on the layer's device; nothing is written yet.

        The keys are those of the state that this layer should know.
        """
        theirs = names_of(names)
        # A layer with arrays goes by those that it has now: the user may have set one to None, or one in its place.
        arrays = self._arrays()
        own = self._members if self._shape is None else tuple(arrays)
        wanted = {name: prefix + theirs[name] for name in own if name in theirs}
        given: dict[str, Any] = {}
        types: list[TypeError] = []
        for name, key in wanted.items():
            if key in keys:
                dtype = getattr(arrays.get(name), "dtype", self._dtype_of(name))
                try:
                    given[name] = _state.as_array(key, _state.read(state, key), dtype)
                except TypeError as error:
                    types.append(error)
        incompatible = _state.IncompatibleKeys(
            [key for name, key in wanted.items() if key not in keys and name != COUNTER],
            [key for key in keys if key not in wanted.values()],
        )
        shape = self._shape
        if shape is None:  # of vectors, as long as nothing tells their size
            shape = next(((each.size,) for each in given.values() if is_vector(each.shape, names)), None)
        shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(own, (None,) if shape is None else shape)
        if COUNTER in shapes:
            shapes[COUNTER] = ()
        for name, array in given.items():
            if name != COUNTER and is_vector(array.shape, names) and (array.size,) == shape:
                given[name] = array.reshape(shape)
        expected = _state.Expected(names, prefix, wanted, shapes)
        faults = _state.faults_of(state, given, expected, incompatible, strict)._replace(types=types)
        for name in given if self._shape is not None else ():
            try:
                check_target(prefix + name, arrays[name], shapes[name])
            except TypeError as error:
                faults.types.append(error)
            except ValueError as error:
                faults.values.append(str(error))
        values: dict[str, Any] = {}
        if _state.error_of([faults]) is None and shape is not None:  # else nothing tells a lazy layer its size
            values = self._values(given, shape)
        return Loading(values, incompatible, faults)

    def _values(self, given: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """What `write` is to write so that the layer holds these arrays, as copies on their devices."""
        if self._shape is None:
            copies = {name: devices.transfer(given[name], self._dtype_of(name), self._device) for name in given}
            return self._made(shape, copies) | self._settings_for(shape)
        arrays = {name: getattr(self, name) for name in given}
        return {
            name: devices.transfer(given[name], array.dtype, kinds.device_of(array)) for name, array in arrays.items()
        }

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

    def to(self, device: str | None = None, dtype: npt.DTypeLike | None = None) -> Self:
        """Move the layer's arrays to a device, and weight, bias and running statistics to a dtype.

        Arrays that fit stay the same ones; others are replaced by new ones.

        Parameters
        ----------
        device : "cpu", "cuda", "cuda:N" or None
            None leaves them where they are.
        dtype : dtype or None
            float16, bfloat16, float32 or float64, which `dtype` of the layer then is; None leaves them as they are.
            Numbers that are too large for it become inf.

        Returns
        -------
        The layer.

        Raises
        ------
        ValueError, RuntimeError
            If the device is unknown, or is not there.
        TypeError, ImportError
            If the dtype is another one, or is ``"bfloat16"``, and ml_dtypes is missing. Nothing has changed then.

        Examples
        --------
        >>> from cupybn import BatchNorm2d
        >>> layer = BatchNorm2d(2, device="cpu")
        >>> layer.to(dtype="float64").running_mean
        array([0., 0.])
        """
        given = _dtype_in_place_of(device)
        if given:
            raise ValueError(f"unknown device {kinds.show(device)}: to set the dtype, use to(dtype={given!r})")
        target = None if device is None else devices.named_device(device)
        cast = None if dtype is None else parameter_dtype(dtype)
        moved: dict[str, Array] = {}
        copies: dict[tuple[int, np.dtype[Any]], Array] = {}  # an array in two roles stays one
        for name, array in self._arrays().items():
            check_array(name, array)
            there = kinds.device_of(array) if target is None else target
            as_dtype = array.dtype if cast is None or name == COUNTER else cast
            if (there, as_dtype) != (kinds.device_of(array), array.dtype):
                key = id(array), as_dtype
                if key not in copies:
                    copies[key] = devices.transfer(array, as_dtype, there)
                moved[name] = copies[key]
        settings: dict[str, Any] = {} if target is None else {"_device": target}
        vars(self).update(moved, **settings, **({} if cast is None else {"dtype": cast}))
        return self

    def cpu(self) -> Self:
        """Move the layer's arrays to the host, as ``to("cpu")``. Returns the layer."""
        return self.to("cpu")

    def cuda(self, index: int | None = None) -> Self:
        """Move the layer's arrays to a CUDA device, the current one unless another is given. Returns the layer."""
        return self.to("cuda" if index is None else f"cuda:{checks.as_int('index', index)}")

    def _arrays(self) -> dict[str, Array]:
        """The arrays that there are, in the order of the state dict."""
        return {name: getattr(self, name) for name in INITIAL if getattr(self, name) is not None}

    def _made(self, shape: tuple[int, ...], values: Mapping[str, Array]) -> dict[str, Array]:
        """All arrays that the layer has, of this shape: those that are given, and new ones."""
        return {
            name: values[name]
            if name in values
            else devices.full(() if name == COUNTER else shape, INITIAL[name], self._dtype_of(name), self._device)
            for name in self._members
        }

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Take new arrays, with what they start from."""
        settings = {} if self._shape is not None else self._settings_for(shape)
        vars(self).update(self._made(shape, {}), **settings)

    def _reset(self, names: Sequence[str]) -> None:
        """Set those arrays of these names that there are back to where they start."""
        self._fill({name: INITIAL[name] for name in self._arrays() if name in names})

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Write into the layer's arrays, all or none."""
        for name in values:
            check_target(name, getattr(self, name))
        write([(self, values)], None)

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        """Dtype of the array of a name, as the layer makes it."""
        return np.dtype(np.int64) if name == COUNTER else self.dtype


class Loading(NamedTuple):
    """What a state has for a layer, before any of it is written."""

    values: dict[str, Any]  # what `write` is to write
    keys: IncompatibleKeys
    faults: _state.Faults  # if there are any, there are no values


def _dtype_in_place_of(device: Any) -> str:
    """Name of the dtype that was given in the place of a device; an empty text if none was."""
    if not isinstance(device, (str, type, np.dtype)) and type(device).__name__ != "dtype":  # PyTorch has such a class
        return ""
    with contextlib.suppress(Exception):
        return parameter_dtype(device).name
    name = str(device).removeprefix("torch.")
    return name if name in FLOATS else ""
