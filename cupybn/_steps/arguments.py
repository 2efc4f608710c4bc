"""The arguments of a kernel: given by name, checked, and brought into the form in which CuPy takes them.

CuPy passes on whatever it gets, so all is checked here. A struct is given as a NamedTuple with the same fields, and
goes by value: CuPy copies NumPy arrays of one element.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import FLOATS
from cupybn._steps.sources import Parameter

Array = Any  # cupy.ndarray

VECTOR = np.dtype([("data", np.uint64), ("stride", np.int64), ("dtype", np.int64)])
"""Fields of ``Vector`` in ``types.cuh``: values of a dtype with its number in FLOATS, any number of bytes apart."""
CODES = {"Vector": f"{VECTOR.itemsize}s", "double": "8s", "long long": "q"}
"""Codes of Python's `struct` for types of fields; for pointers it is "Q", for enums "q". Doubles go as bytes: as
numbers, 0.0 and -0.0 would be one key of `_by_value`."""
NAN = float("nan")
"""Number that a kernel gets for None where it takes a double."""
_NULL = object()
"""Stands for each field of a struct in whose place None is given."""


@functools.lru_cache(maxsize=4096)
def _vector(ptr: int, stride: int, dtype: int) -> bytes:
    """The bytes of a ``Vector``."""
    return struct.pack("=Qqq", ptr, stride, dtype)


_double = struct.Struct("=d").pack
"""Makes the bytes of a double."""
_NO_VECTOR = _vector(0, 0, 0)
"""The bytes of a ``Vector`` that is null."""


@functools.cache
def _void(code: str) -> np.dtype[Any]:
    """The dtype of a struct. NumPy takes longer to make one than for all else that `_by_value` does."""
    return np.dtype((np.void, struct.calcsize(code)))


@functools.lru_cache(maxsize=4096)
def _by_value(code: str, *words: Any) -> npt.NDArray[Any]:
    """The array of one element that CuPy copies for a struct. It is kept: most arguments of a program come again.

    Its dtype has no fields: CuPy asks for the interface of the array, and NumPy would list fields each time anew.
    """
    return np.frombuffer(struct.pack(code, *words), _void(code))


@functools.cache
def _number_of(dtype: np.dtype[Any]) -> int:
    """The number of a dtype in kernels; -1 if it has none."""
    return FLOATS.index(dtype.name) if dtype.name in FLOATS else -1


class Arguments:
    """The arguments that a kernel takes.

    All values are listed one after the other, for a struct those of its fields. Then they are read type by type, which
    costs less than to ask for the type of each; in the end those of a struct are packed into its bytes.

    Parameters
    ----------
    kernel : str
        Its name, for messages.
    parameters : sequence of Parameter
    pointees : mapping of types of pointers to dtypes
    """

    def __init__(self, kernel: str, parameters: Sequence[Parameter], pointees: Mapping[str, np.dtype[Any]]) -> None:
        self._kernel, self._pointees = kernel, pointees
        self.names = [parameter.name for parameter in parameters]
        self._values: list[tuple[str, Parameter]] = []  # all values in order, each with its name in messages
        # Of each parameter: its name, the names of its fields, and what stands for their values if None is given.
        self._given: list[tuple[str, tuple[str, ...], list[Any]]] = []
        # Of each parameter: the code that packs its values, the number of the first one, and that behind the last. The
        # code is "" for a single value that CuPy takes as it is.
        self._taken: list[tuple[str, int, int]] = []
        for parameter in parameters:
            self._add(parameter)
        numbered = [(i, value) for i, (_, value) in enumerate(self._values)]
        whole = {start for code, start, _ in self._taken if not code}
        self._arrays = [
            (i, value.nullable, pointees[value.type], i in whole) for i, value in numbered if value.type in pointees
        ]
        self._vectors = [(i, value.nullable) for i, value in numbered if value.type == "Vector"]
        self._doubles = [(i, value.nullable, i in whole) for i, value in numbered if value.type == "double"]
        self._integers = [i for i, value in numbered if value.type == "long long"]
        self._enums = [(i, _numbers(value.names)) for i, value in numbered if value.names]

    def _add(self, parameter: Parameter) -> None:
        """List the values that a parameter consists of."""
        name, fields, start = parameter.name, parameter.fields, len(self._values)
        self._values += [(f"{name}.{field.name}", field) for field in fields] or [(name, parameter)]
        code = "".join(CODES.get(field.type, "Q" if field.type in self._pointees else "q") for field in fields)
        if parameter.type == "Vector":
            code = CODES["Vector"]
        nulls = [_NULL] * len(fields) if parameter.nullable else []
        interned = tuple(sys.intern(field.name) for field in fields)  # as those of classes: compared in no time
        self._given.append((sys.intern(name), interned, nulls))
        self._taken.append((code and f"={code}", start, len(self._values)))

    def read(self, arguments: Mapping[str, Any], device: int) -> list[Any]:
        """The arguments in order, as CuPy takes them, for a launch on a device.

        Raises
        ------
        TypeError
            If an argument is missing, unknown, of another type or dtype than declared, or strided.
        ValueError
            If an array is on another device.
        """
        values: list[Any] = []
        try:
            for name, fields, nulls in self._given:
                value = arguments[name]
                if not fields:
                    values.append(value)
                elif value is None and nulls:
                    values += nulls
                elif getattr(value, "_fields", None) == fields:
                    values += value
                else:
                    raise self._unexpected(name, f"a NamedTuple of {', '.join(fields)}", value)
        except KeyError:
            raise self._odd(arguments) from None
        if len(arguments) != len(self.names):
            raise self._odd(arguments)
        self._read_arrays(values, device)
        self._read_numbers(values)
        return [_by_value(code, *values[start:stop]) if code else values[start] for code, start, stop in self._taken]

    def _read_arrays(self, values: list[Any], device: int) -> None:
        """Put addresses into the place of arrays, but for those that CuPy takes as they are."""
        for i, nullable, dtype, whole in self._arrays:
            array = values[i]
            if array is _NULL or (array is None and nullable):
                values[i] = None if whole else 0
            elif getattr(array, "dtype", _NULL) == dtype and array.flags.c_contiguous:  # not None, which equals float64
                data = array.data
                if data.device_id != device:
                    raise self._elsewhere(i, array, device)
                if not whole:
                    values[i] = data.ptr
            else:
                raise self._unexpected(self._values[i][0], f"a C-contiguous array of {dtype}", array)
        for i, nullable in self._vectors:
            array = values[i]
            if array is _NULL or (array is None and nullable):
                values[i] = _NO_VECTOR
                continue
            if getattr(array, "ndim", None) != 1 or (number := _number_of(array.dtype)) < 0:
                raise self._unexpected(self._values[i][0], f"a 1-D array of {', '.join(FLOATS)}", array)
            data = array.data
            if data.device_id != device:
                raise self._elsewhere(i, array, device)
            values[i] = _vector(data.ptr, array.strides[0], number)

    def _read_numbers(self, values: list[Any]) -> None:
        """Put numbers into the place of what stands for them."""
        for i, nullable, whole in self._doubles:
            value = values[i]
            if type(value) is not float:
                value = NAN if value is _NULL or (value is None and nullable) else self._number(i, value, float)
            values[i] = value if whole else _double(value)
        for i in self._integers:
            value = values[i]
            if type(value) is not int:
                values[i] = 0 if value is _NULL else self._number(i, value, operator.index)
        for i, numbers in self._enums:
            value = values[i]
            try:
                values[i] = 0 if value is _NULL else numbers[value]
            except (KeyError, TypeError):
                raise self._unexpected(self._values[i][0], f"one of {', '.join(map(repr, numbers))}", value) from None

    def _number(self, i: int, value: Any, convert: Any) -> Any:
        """A number in the type that a kernel takes, from one of another type."""
        is_array = hasattr(value, "ndim") and not isinstance(value, np.generic)  # which would have to be read
        with contextlib.suppress(TypeError, ValueError):
            if not is_array:
                return convert(value)
        name, parameter = self._values[i]
        raise self._unexpected(name, "a number" if parameter.type == "double" else "an integer", value)

    def _odd(self, arguments: Mapping[str, Any]) -> TypeError:
        """Error for arguments that are missing, or that the kernel does not have."""
        odd = ", ".join(sorted(arguments.keys() ^ set(self.names)))
        return TypeError(f"{self._kernel}: expected {', '.join(self.names)} (missing or unknown: {odd})")

    def _elsewhere(self, i: int, array: Array, device: int) -> ValueError:
        """Error for an array on another device than that of the launch."""
        name, got = self._values[i][0], array.data.device_id
        return ValueError(f"{self._kernel}: expected {name} on device {device} (got {got})")

    def _unexpected(self, name: str, expected: str, value: Any) -> TypeError:
        """Error for a value of another kind than the kernel takes."""
        given = type(value).__qualname__
        if hasattr(value, "dtype"):
            given = f"shape {value.shape}, strides {value.strides}, {value.dtype}"
        return TypeError(f"{self._kernel}: {name}: expected {expected} (got {given})")


def _numbers(names: Sequence[str]) -> dict[str | None, int]:
    """The numbers of the names in an enum, in lower case; None stands for ``NONE``."""
    return {None if name == "NONE" else name.lower(): number for number, name in enumerate(names)}
