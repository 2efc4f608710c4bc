"""The arguments of a kernel: given by name, checked, and packed into the 64-bit words that the kernel finds.

CuPy passes on whatever it gets, so all is checked here. A struct is given as a NamedTuple with the same fields, and
goes by value.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cupybn._arrays.dtypes import FLOATS
from cupybn._steps.sources import Parameter

Array = Any  # cupy.ndarray

VECTOR = np.dtype([("data", np.uint64), ("stride", np.int64), ("dtype", np.int64)])
"""Fields of ``Vector`` in ``types.cuh``: values of a dtype with its number in FLOATS, any number of bytes apart."""
WORD = 8
"""Bytes of a word. Whatever a kernel takes begins at one: an address, a number, each field of a struct."""
CODES = {"Vector": f"{VECTOR.itemsize}s", "double": "d"}
"""Codes of Python's `struct` for types of values; for pointers it is "Q", for integers and enums "q"."""
NAN = float("nan")
"""Number that a kernel gets for None where it takes a double."""
_NULL = object()
"""Stands for each field of a struct in whose place None is given."""


@functools.lru_cache(maxsize=4096)
def _vector(ptr: int, stride: int, dtype: int) -> bytes:
    """The bytes of a ``Vector``."""
    return struct.pack("=Qqq", ptr, stride, dtype)


_NO_VECTOR = _vector(0, 0, 0)
"""The bytes of a ``Vector`` that is null."""


@functools.cache
def _number_of(dtype: np.dtype[Any]) -> int:
    """The number of a dtype in kernels; -1 if it has none."""
    return FLOATS.index(dtype.name) if dtype.name in FLOATS else -1


class Arguments:
    """The arguments that a kernel takes.

    All values are listed one after the other, for a struct those of its fields. Then they are read type by type, which
    costs less than to ask for the type of each, and packed.

    Parameters
    ----------
    kernel : str
        Its name, for messages.
    parameters : sequence of Parameter
    pointees : mapping of types of pointers to dtypes

    Attributes
    ----------
    ranges : list of (int, int)
        Of each parameter, the number of its first word and that behind its last.
    places : mapping of names of values to numbers of words
        A field of a struct is named with the parameter in front, as ``"affine.eps"``.
    """

    def __init__(self, kernel: str, parameters: Sequence[Parameter], pointees: Mapping[str, np.dtype[Any]]) -> None:
        self._kernel, self._pointees = kernel, pointees
        self.names = [parameter.name for parameter in parameters]
        self.ranges: list[tuple[int, int]] = []
        self.places: dict[str, int] = {}
        self._values: list[tuple[str, Parameter]] = []  # all values in order, each with its name
        # Of each parameter: its name, the names of its fields, and what stands for their values if None is given.
        self._given: list[tuple[str, tuple[str, ...], list[Any]]] = []
        for parameter in parameters:
            self._add(parameter)
        numbered = [(i, value) for i, (_, value) in enumerate(self._values)]
        self._arrays = [(i, value.nullable, pointees[value.type]) for i, value in numbered if value.type in pointees]
        self._vectors = [(i, value.nullable) for i, value in numbered if value.type == "Vector"]
        self._doubles = [(i, value.nullable) for i, value in numbered if value.type == "double"]
        self._integers = [i for i, value in numbered if value.type == "long long"]
        self._enums = [(i, _numbers(value.names)) for i, value in numbered if value.names]
        self._pack = struct.Struct("=" + "".join(self._code(value) for _, value in self._values)).pack

    def _add(self, parameter: Parameter) -> None:
        """List the values that a parameter consists of."""
        name, fields = parameter.name, parameter.fields
        start = end = self.ranges[-1][1] if self.ranges else 0
        for full_name, value in [(f"{name}.{field.name}", field) for field in fields] or [(name, parameter)]:
            self._values.append((full_name, value))
            self.places[full_name] = end
            end += struct.calcsize("=" + self._code(value)) // WORD
        self.ranges.append((start, end))
        nulls = [_NULL] * len(fields) if parameter.nullable else []
        interned = tuple(sys.intern(field.name) for field in fields)  # as those of classes: compared in no time
        self._given.append((sys.intern(name), interned, nulls))

    def _code(self, value: Parameter) -> str:
        """The code that packs a value."""
        return CODES.get(value.type, "Q" if value.type in self._pointees else "q")

    def listed(self, arguments: Mapping[str, Any]) -> list[Any]:
        """All values in order, as they are given: those of single parameters and of fields.

        Raises
        ------
        TypeError
            If an argument is missing or unknown, or is not the bundle that it should be.
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
        return values

    def packed(self, listed: Sequence[Any], device: int) -> bytes:
        """The words of these values, for a launch on a device.

        Raises
        ------
        TypeError
            If a value is of another type or dtype than declared, or strided.
        ValueError
            If an array is on another device.
        """
        values = [*listed]
        self._read_arrays(values, device)
        self._read_numbers(values)
        return self._pack(*values)

    def arrays(self, listed: Sequence[Any]) -> Iterator[tuple[int, Array]]:
        """The arrays among values that are listed, each with the number of the word in which its address goes."""
        for i in [i for i, *_ in self._arrays] + [i for i, _ in self._vectors]:
            if listed[i] is not None and listed[i] is not _NULL:
                yield self.places[self._values[i][0]], listed[i]

    def _read_arrays(self, values: list[Any], device: int) -> None:
        """Put addresses into the place of arrays."""
        for i, nullable, dtype in self._arrays:
            array = values[i]
            if array is _NULL or (array is None and nullable):
                values[i] = 0
            elif getattr(array, "dtype", _NULL) == dtype and array.flags.c_contiguous:  # not None, which equals float64
                data = array.data
                if data.device_id != device:
                    raise self._elsewhere(i, array, device)
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
        for i, nullable in self._doubles:
            value = values[i]
            if type(value) is not float:
                values[i] = NAN if value is _NULL or (value is None and nullable) else self._number(i, value, float)
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
