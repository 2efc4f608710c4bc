"""The one place that finds, compiles and launches CUDA kernels; it knows nothing of batch norm.

A kernel is the one ``extern "C" __global__`` function of a ``.cu`` file, with the file's name. What it takes is read
from its source: parameters stand one per line, with a comment that says "or null" where None is meant, and with
``// outputs`` and ``// sizes`` in between. So do the fields of structs, which go by value: their arguments are
NamedTuples with the same fields. Arguments are given by name and checked: CuPy passes on whatever it gets.
"""

from __future__ import annotations

import functools
import operator
import re
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._arrays.dtypes import FLOATS

Array = Any  # cupy.ndarray

_package = Path(__file__).parents[1]
KERNELS = next((d for d in (_package / "kernels", _package.parent / "kernels") if d.is_dir()), _package / "kernels")
"""The folder of the ``.cu`` files: ``cupybn/kernels`` in a wheel, ``kernels`` in a checkout."""


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def kernel_names() -> list[str]:
    """All kernels, by the path of their file: ``"channels_first/bn_stats"``."""
    return sorted(path.relative_to(KERNELS).with_suffix("").as_posix() for path in KERNELS.rglob("*.cu"))


@functools.cache
def source(name: str) -> str:
    """The text of a kernel with that of its headers in front: CuPy's cache of compiled kernels does not see headers."""
    return _with_headers(KERNELS / f"{name}.cu", set())


def _with_headers(path: Path, seen: set[Path]) -> str:
    """Each header once, where it is first included; ``#line`` keeps places in messages of compilers right."""
    if path.resolve() in seen:
        return ""
    seen.add(path.resolve())
    label = f"kernels/{path.resolve().relative_to(KERNELS.resolve()).as_posix()}"
    lines = [f'#line 1 "{label}"']
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        include = re.fullmatch(r'#include "(.+)"', line)
        if include:
            lines += [_with_headers(path.parent / include[1], seen), f'#line {number + 1} "{label}"']
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


class Parameter(NamedTuple):
    """A parameter of a kernel or a field of a struct, as the source declares it."""

    name: str
    type: str  # without const: "data_t*", "double", "long long", "Vector", "Affine", ...
    section: str  # "inputs", "outputs" or "sizes"
    nullable: bool
    fields: tuple[Parameter, ...] = ()  # of a struct


@functools.cache
def signature(name: str) -> tuple[Parameter, ...]:
    """The parameters of a kernel, in order."""
    stem, text = name.rpartition("/")[2], source(name)
    head = re.search(rf'extern "C" __global__ void (?:\w+(?:\([^)]*\))? )*{stem}\((.*?)\) \{{', text, re.DOTALL)
    assert head is not None, f"{name}.cu has no kernel of its name"
    section, parameters = "inputs", []
    for line in head[1].strip().splitlines():
        heading = re.fullmatch(r"\s*// (outputs|sizes)", line)
        if heading:
            section = heading[1]
        else:
            parameters.append(_declared(name, line, section))
    return tuple(parameters)


def _declared(name: str, line: str, section: str) -> Parameter:
    """The parameter of a kernel, or the field of a struct, that a line of its source declares."""
    declared = re.fullmatch(r"\s*(?:const )?(.+?)\s+(\w+)[,;]?\s*(?://(.*))?", line)
    assert declared is not None, f"{name}.cu: {line.strip()!r} is no parameter"
    body = "" if declared[1] == "Vector" else _definition(name, "struct", declared[1])
    fields = tuple(_declared(name, field, section) for field in body.splitlines())
    return Parameter(declared[2], declared[1], section, "or null" in (declared[3] or ""), fields)


def _definition(name: str, kind: str, type: str) -> str:
    """The fields of a struct or the names of an enum in a kernel's source, up to a blank line; "" if it has none."""
    head = rf"^{kind} {re.escape(type)}(?: : [\w ]+)? \{{"
    body = re.search(rf"{head}\s*(.*?)\s*(?:\n\n|\}})", source(name), re.DOTALL | re.MULTILINE)
    return "" if body is None else body[1]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

SHARED = 32 << 10
"""Bytes of dynamic shared memory that a block may have without asking: of 48 KiB, what kernels leave of them."""
VECTOR = np.dtype([("data", np.uint64), ("stride", np.int64), ("dtype", np.int64)])
"""``Vector`` of ``types.cuh``: values of any float dtype, numbered as in FLOATS, any number of bytes apart."""
CODES = {"Vector": "Qqq", "double": "d", "long long": "q"}
"""Codes of `struct` for the types of parameters; enums are "q", and all others are pointers, "Q"."""

Words = tuple[Any, ...]
"""An argument as `struct.pack` takes it."""
Reader = Callable[[Any, int], Any]
"""A function that checks an argument for a device and returns what CuPy takes, or words."""


@functools.cache
def _number_of(dtype: np.dtype[Any]) -> int:
    """The number of a dtype in kernels; -1 if it has none."""
    return FLOATS.index(dtype.name) if dtype.name in FLOATS else -1


class _Readers:
    """How the arguments of a kernel are read, by the types of its parameters.

    Parameters
    ----------
    kernel : str
        Its name.
    pointees : mapping of types of pointers to dtypes
    """

    def __init__(self, kernel: str, pointees: Mapping[str, np.dtype[Any]]) -> None:
        self._kernel, self._pointees = kernel, pointees

    def whole(self, parameter: Parameter) -> Reader:
        """The reader of a parameter: returns what CuPy takes."""
        name, fields = parameter.name, parameter.fields
        if fields:
            code = "".join(self._code(field.type) for field in fields)
            pack = _packer(code, self._struct(parameter))
            if all(field.type == "long long" for field in fields):  # sizes, which are the same again and again
                return functools.lru_cache(maxsize=64, typed=True)(pack)
            return pack
        if parameter.type in self._pointees:
            return self._array(name, parameter)
        words = self._words(name, parameter)
        if parameter.type == "Vector":
            return _packer(CODES["Vector"], words)
        return lambda value, device: words(value, device)[0]

    def _code(self, type: str) -> str:
        return CODES.get(type, "Q" if type in self._pointees else "q")

    def _struct(self, parameter: Parameter) -> Reader:
        """The reader of a NamedTuple with the fields of a struct: returns its words."""
        names = tuple(field.name for field in parameter.fields)
        readers = [self._words(f"{parameter.name}.{field.name}", field) for field in parameter.fields]
        nothing = (0,) * sum(len(self._code(field.type)) for field in parameter.fields)

        def words(value: Any, device: int) -> Words:
            if value is None and parameter.nullable:
                return nothing
            if getattr(value, "_fields", None) != names:
                raise self._unexpected(parameter.name, f"a NamedTuple of {', '.join(names)}", value)
            found: Words = ()
            for read, field in zip(readers, value, strict=True):
                found += read(field, device)
            return found

        return words

    def _words(self, name: str, parameter: Parameter) -> Reader:
        """The reader of anything but a struct: returns its words."""
        if parameter.type == "Vector":
            return self._vector(name, parameter.nullable)
        if parameter.type in ("double", "long long"):
            return self._number(name, parameter)
        if parameter.type in self._pointees:
            array = self._array(name, parameter)
            return lambda value, device: (0 if array(value, device) is None else value.data.ptr,)
        return self._enum(name, parameter.type)

    def _array(self, name: str, parameter: Parameter) -> Reader:
        """The reader of a pointer: returns the array."""
        dtype, nullable = self._pointees[parameter.type], parameter.nullable

        def array(value: Any, device: int) -> Array | None:
            if value is None and nullable:
                return None
            if getattr(value, "dtype", None) != dtype or not value.flags.c_contiguous:
                raise self._unexpected(name, f"a C-contiguous array of {dtype}", value)
            if value.data.device_id != device:
                raise self._elsewhere(name, value, device)
            return value

        return array

    def _vector(self, name: str, nullable: bool) -> Reader:
        """The reader of a vector: returns its words."""

        def words(value: Any, device: int) -> Words:
            if value is None and nullable:
                return 0, 0, 0
            if getattr(value, "ndim", None) != 1 or (number := _number_of(value.dtype)) < 0:
                raise self._unexpected(name, f"a 1-D array of {', '.join(FLOATS)}", value)
            if value.data.device_id != device:
                raise self._elsewhere(name, value, device)
            return value.data.ptr, value.strides[0], number

        return words

    def _number(self, name: str, parameter: Parameter) -> Reader:
        """The reader of a number: returns it as a word; a double that is None is NaN."""
        nullable, nan = parameter.nullable, float("nan")
        convert, expected = (float, "a number") if parameter.type == "double" else (operator.index, "an integer")

        def words(value: Any, _: int) -> Words:
            if value is None and nullable:
                return (nan,)
            try:
                return (convert(value),)
            except (TypeError, ValueError):
                raise self._unexpected(name, expected, value) from None

        return words

    def _enum(self, name: str, type: str) -> Reader:
        """The reader of a name in an enum, in lower case, where None stands for ``NONE``: returns its number."""
        names = re.findall(r"\w+", _definition(self._kernel, "enum", type))
        assert names, f"{self._kernel}.cu: {type} is no type of parameters"
        numbers = {None if text == "NONE" else text.lower(): (number,) for number, text in enumerate(names)}

        def words(value: Any, _: int) -> Words:
            if value not in numbers:
                raise self._unexpected(name, f"one of {', '.join(map(repr, numbers))}", value)
            return numbers[value]

        return words

    def _elsewhere(self, name: str, array: Array, device: int) -> ValueError:
        return ValueError(f"{self._kernel}: expected {name} on device {device} (got {array.data.device_id})")

    def _unexpected(self, name: str, expected: str, value: Any) -> TypeError:
        given = type(value).__qualname__
        if hasattr(value, "dtype"):
            given = f"shape {value.shape}, strides {value.strides}, {value.dtype}"
        return TypeError(f"{self._kernel}: {name}: expected {expected} (got {given})")


def _packer(code: str, words: Reader) -> Reader:
    """A reader that packs words into a NumPy array of one element, which CuPy passes by value.

    Of a dtype without fields: CuPy asks for the interface of the array, and NumPy lists fields anew each time.
    """
    pack, dtype = struct.Struct(f"={code}").pack, np.dtype((np.void, struct.calcsize(f"={code}")))
    return lambda value, device: np.frombuffer(pack(*words(value, device)), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Launches

_asking = threading.Lock()
"""Held while a kernel is asked for more shared memory: another thread could ask for less, later."""


class Kernel:
    """A kernel with a set of macros, compiled at its first launch.

    Parameters
    ----------
    name : str
        As in `kernel_names`.
    macros : mapping of names to values
        ``DATA_T``, a dtype, is what ``data_t`` stands for.
    """

    def __init__(self, name: str, macros: Mapping[str, Any]) -> None:
        self.name = name
        self.options = tuple(f"-D{key}={getattr(value, 'name', value)}" for key, value in macros.items())
        readers = _Readers(
            name,
            {
                "data_t*": macros["DATA_T"],
                "double*": np.dtype(np.float64),
                "long long*": np.dtype(np.int64),
                "mask_t*": np.dtype(np.uint8 if macros.get("WIDTH", 1) > 1 else np.bool_),
            },
        )
        self._readers = {parameter.name: readers.whole(parameter) for parameter in signature(name)}
        self._shared: dict[int, int] = {}  # bytes that have been asked for, on each device

    def launch(self, grid: tuple[int, ...], block: int, arguments: Mapping[str, Any], shared: int = 0) -> None:
        """Launch on the current stream of the current device, with so many bytes of dynamic shared memory.

        Raises
        ------
        TypeError
            If an argument is missing, unknown, of another dtype than declared, or strided.
        ValueError
            If an array is on another device. Nothing is launched then.
        """
        if len(arguments) != len(self._readers) or arguments.keys() != self._readers.keys():
            odd = sorted(arguments.keys() ^ self._readers.keys())
            expected = ", ".join(self._readers)
            raise TypeError(f"{self.name}: expected {expected} (missing or unknown: {', '.join(odd)})")
        device = import_cupy().cuda.runtime.getDevice()
        values = [read(arguments[name], device) for name, read in self._readers.items()]
        if shared > self._shared.get(device, SHARED):
            with _asking:
                most = max(shared, self._shared.get(device, SHARED))
                self.raw.max_dynamic_shared_size_bytes = most
                self._shared[device] = most
        self.raw(grid, (block,), values, shared_mem=shared)

    @functools.cached_property
    def raw(self) -> Any:
        """CuPy's kernel, which compiles at its first launch on each device."""
        return import_cupy().RawKernel(source(self.name), self.name.rpartition("/")[2], self.options)


@functools.cache
def kernel(name: str, **macros: Any) -> Kernel:
    """The one `Kernel` of this name and these macros."""
    return Kernel(name, macros)
