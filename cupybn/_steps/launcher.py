"""The one place that finds, compiles and launches CUDA kernels; it knows nothing of batch norm.

A kernel is the one ``extern "C" __global__`` function of a ``.cu`` file, with the file's name. What it takes is read
from its source: parameters stand one per line, with a comment that says "or null" where None is meant, and with
``// outputs`` and ``// sizes`` in between. Arguments are given by name and checked: CuPy passes on whatever it gets.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
    """A parameter of a kernel, as its source declares it."""

    name: str
    type: str  # without const: "data_t*", "double", "long long", "Vector", ...
    section: str  # "inputs", "outputs" or "sizes"
    nullable: bool


@functools.cache
def signature(name: str) -> tuple[Parameter, ...]:
    """What a kernel takes, in order."""
    stem = name.rpartition("/")[2]
    text = (KERNELS / f"{name}.cu").read_text()
    head = re.search(rf'extern "C" __global__ void (?:\w+(?:\([^)]*\))? )*{stem}\((.*?)\) \{{', text, re.DOTALL)
    assert head is not None, f"{name}.cu has no kernel of its name"
    section, parameters = "inputs", []
    for line in head[1].strip().splitlines():
        heading = re.fullmatch(r"\s*// (outputs|sizes)", line)
        if heading:
            section = heading[1]
            continue
        declared = re.fullmatch(r"\s*(?:const )?(.+?)\s+(\w+),?\s*(?://(.*))?", line)
        assert declared is not None, f"{name}.cu: {line.strip()!r} is no parameter"
        parameters.append(Parameter(declared[2], declared[1], section, "or null" in (declared[3] or "")))
    return tuple(parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

SHARED = 32 << 10
"""Bytes of dynamic shared memory that a block may have without asking: of 48 KiB, what kernels leave of them."""
VECTOR = np.dtype([("data", np.uint64), ("stride", np.int64), ("dtype", np.int64)])
"""``Vector`` of ``types.cuh``: values of any float dtype, numbered as in FLOATS, any number of bytes apart."""


@functools.lru_cache(maxsize=4096)
def _vector(ptr: int, stride: int, dtype: int) -> npt.NDArray[Any]:
    """Passed by value: CuPy copies arrays of one element."""
    return np.array((ptr, stride, dtype), VECTOR)


_NO_VECTOR = _vector(0, 0, 0)


@functools.cache
def _vector_dtype(dtype: np.dtype[Any]) -> int:
    """Its number; -1 if it has none."""
    return FLOATS.index(dtype.name) if dtype.name in FLOATS else -1


def _describe(value: Any) -> str:
    if not hasattr(value, "dtype"):
        return type(value).__qualname__
    return f"shape {value.shape}, strides {value.strides}, {value.dtype}"


_asking = threading.Lock()


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
        pointers = {  # what they point to
            "data_t*": macros.get("DATA_T"),
            "double*": np.dtype(np.float64),
            "long long*": np.dtype(np.int64),
            "mask_t*": np.dtype(np.uint8 if macros.get("WIDTH", 1) > 1 else np.bool_),
        }
        self._names = [p.name for p in signature(name)]
        numbered = list(enumerate(signature(name)))
        self._integers = [i for i, p in numbered if p.type == "long long"]
        self._floats = [i for i, p in numbered if p.type == "double"]
        self._vectors = [(i, p.nullable) for i, p in numbered if p.type == "Vector"]
        self._arrays = [(i, p.nullable, pointers[p.type]) for i, p in numbered if p.type in pointers]
        self._shared: dict[int, int] = {}  # what has been asked for, on each device

    def launch(self, grid: tuple[int, ...], block: int, arguments: Mapping[str, Any], shared: int = 0) -> None:
        """Launch on the current stream of the current device, with so many bytes of dynamic shared memory.

        Raises
        ------
        TypeError
            If an argument is missing, unknown, of another dtype than declared, or strided.
        ValueError
            If an array is on another device. Nothing is launched then.
        """
        values = self._in_order(arguments)
        device = import_cupy().cuda.runtime.getDevice()
        for i in self._integers:
            values[i] = int(values[i])
        for i in self._floats:
            values[i] = float(values[i])
        for i, nullable, dtype in self._arrays:
            array = values[i]
            if array is None and nullable:
                continue
            if getattr(array, "dtype", None) != dtype or not array.flags.c_contiguous:
                raise self._unexpected(i, f"a C-contiguous array of {dtype}", array)
            if array.data.device_id != device:
                raise self._elsewhere(i, array, device)
        for i, nullable in self._vectors:
            array = values[i]
            if array is None and nullable:
                values[i] = _NO_VECTOR
                continue
            if getattr(array, "ndim", None) != 1 or _vector_dtype(array.dtype) < 0:
                raise self._unexpected(i, f"a 1-D array of {', '.join(FLOATS)}", array)
            if array.data.device_id != device:
                raise self._elsewhere(i, array, device)
            values[i] = _vector(array.data.ptr, array.strides[0], _vector_dtype(array.dtype))
        if shared > self._shared.get(device, SHARED):
            with _asking:  # or another thread could ask for less, later
                most = max(shared, self._shared.get(device, SHARED))
                self.raw.max_dynamic_shared_size_bytes = most
                self._shared[device] = most
        self.raw(grid, (block,), values, shared_mem=shared)

    def _in_order(self, arguments: Mapping[str, Any]) -> list[Any]:
        try:
            if len(arguments) == len(self._names):
                return [arguments[name] for name in self._names]
        except KeyError:
            pass
        odd = sorted(arguments.keys() ^ set(self._names))
        raise TypeError(f"{self.name}: expected {', '.join(self._names)} (missing or unknown: {', '.join(odd)})")

    def _elsewhere(self, i: int, array: Array, device: int) -> ValueError:
        return ValueError(f"{self.name}: expected {self._names[i]} on device {device} (got {array.data.device_id})")

    def _unexpected(self, i: int, expected: str, value: Any) -> TypeError:
        return TypeError(f"{self.name}: {self._names[i]}: expected {expected} (got {_describe(value)})")

    @functools.cached_property
    def raw(self) -> Any:
        """CuPy's kernel, which compiles at its first launch on each device."""
        return import_cupy().RawKernel(source(self.name), self.name.rpartition("/")[2], self.options)


@functools.cache
def kernel(name: str, **macros: Any) -> Kernel:
    """The one `Kernel` of this name and these macros."""
    return Kernel(name, macros)
