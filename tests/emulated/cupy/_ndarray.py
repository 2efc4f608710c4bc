"""Device arrays: views of pretended device memory, with the methods and the rules of CuPy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import cupy
from cupy import _dtypes, _memory
from cupy._run import assign, run
from cupy.cuda import Device, Stream, memory, runtime
from cupy.cuda.stream import get_current_stream, note_get, note_set

_IMPLICIT = (
    "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."
)


class Flags:
    """How an array's elements lie in memory. CuPy has no ``writeable``."""

    def __init__(self, c_contiguous: bool, f_contiguous: bool, owndata: bool) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = c_contiguous, f_contiguous, owndata

    @property
    def forc(self) -> bool:
        """Whether the array is contiguous in either order."""
        return self.c_contiguous or self.f_contiguous

    @property
    def fnc(self) -> bool:
        """Whether the array is contiguous in Fortran's order but not in C's."""
        return self.f_contiguous and not self.c_contiguous

    def __getitem__(self, name: str) -> bool:
        if name not in ("C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA"):
            raise KeyError(f"{name} is not defined for cupy.ndarray.flags")
        return bool(getattr(self, name.lower()))

    def __repr__(self) -> str:
        return "\n".join(f"  {name.upper()} : {value}" for name, value in vars(self).items())


def _operators(function: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The methods for ``x + y``, ``y + x`` and ``x += y``, made of a function of NumPy."""

    def forward(self: ndarray, other: Any) -> Any:
        return NotImplemented if _defers(other) else getattr(cupy, function)(self, other)

    def reflected(self: ndarray, other: Any) -> Any:
        return getattr(cupy, function)(other, self)

    def in_place(self: ndarray, other: Any) -> Any:
        return getattr(cupy, function)(self, other, out=self)

    return forward, reflected, in_place


def _comparison(function: str, of_anything: bool | None = None) -> Callable[..., Any]:
    """The method for ``x < y`` or its like. None and objects without an order of their own are equal to no element."""

    def compare(self: ndarray, other: Any) -> Any:
        if isinstance(other, np.ndarray) and other.ndim == 0:
            other = other.item()
        if of_anything is not None and (other is None or type(other).__eq__ is object.__eq__):
            return cupy.full(self.shape, of_anything)
        return NotImplemented if _defers(other) else getattr(cupy, function)(self, other)

    return compare


def _unary(function: str) -> Callable[[ndarray], Any]:
    def apply(self: ndarray) -> Any:
        return getattr(cupy, function)(self)

    return apply


def _method(name: str, view: bool = False, calls: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """A method made of NumPy's of the same name; `calls` is what it calls by the rules of a derived class."""

    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        if calls is not None and type(self) is not ndarray:
            calls(self)
        return run(getattr(np.ndarray, name), (self, *args), kwargs, view=view)

    method.__name__, method.__doc__ = name, f"As :meth:`numpy.ndarray.{name}`."
    return method


def _defers(other: Any) -> bool:
    """Whether an operator leaves the work to the other operand."""
    if isinstance(other, (ndarray, np.ndarray, np.generic)):
        return False
    return getattr(other, "__array_ufunc__", ndarray) is None


class ndarray:  # noqa: N801 - as CuPy has it
    """An array in the memory of a device.

    Attributes
    ----------
    _host : numpy.ndarray
        NumPy view of the elements in the pretended memory.
    _allocation : Allocation
        Block of memory that contains the elements.
    """

    __module__ = "cupy"
    __slots__ = ("__weakref__", "_allocation", "_host", "base")

    def __init__(
        self,
        shape: int | tuple[int, ...],
        dtype: npt.DTypeLike = float,
        memptr: _memory.MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: Any = "C",
    ) -> None:
        dtype = _dtypes.supported(dtype)
        shape = tuple(map(int, shape)) if hasattr(shape, "__iter__") else (int(shape),)
        if any(n < 0 for n in shape):
            raise ValueError("Negative dimensions are not allowed")
        if memptr is None:
            memptr = memory.alloc(math.prod(shape) * dtype.itemsize)
        offset = memptr.ptr - memptr.mem.ptr if memptr.mem.nbytes else 0
        buffer = memptr.mem.host if memptr.mem.nbytes else np.empty(0, np.uint8)
        self._host = np.ndarray(shape, dtype, buffer, offset, strides, order)
        self._allocation = memptr.mem
        self._allocation.arrays[id(self)] = self
        self.base: ndarray | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    def _view(self, host: npt.NDArray[Any]) -> ndarray:
        """An array of this one's class, with the shape, strides, dtype and address of a NumPy view of its memory."""
        view = object.__new__(type(self))
        offset = _address(host) - self._allocation.ptr if host.size else 0
        view._host = np.ndarray(host.shape, host.dtype, self._allocation.host, offset, host.strides)
        view._allocation = self._allocation
        view._allocation.arrays[id(view)] = view
        view.base = self if self.base is None else self.base
        return view

    def _basic(self, items: tuple[Any, ...]) -> ndarray:
        """The view that indices select which are no arrays. CuPy makes it by `view`, by a derived class's rules."""
        if type(self) is not ndarray:
            self.view()
        return self._view(self._host[items if any(item is ... for item in items) else (*items, ...)])

    def _written(self) -> npt.NDArray[Any]:
        """An array of the same shape: each item is the element's bytes in `Allocation.initialised`."""
        host = self._host
        offset = _address(host) - self._allocation.ptr if host.size else 0
        # Items as large as an element, so that any index of the array works here, too.
        kind = f"V{host.itemsize}"
        return np.ndarray(host.shape, kind, self._allocation.initialised, offset, host.strides)

    def _check(self, key: Any = None) -> None:
        """Raise UninitialisedMemoryError unless all elements, or those that a key selects, were written."""
        allocation, host = self._allocation, self._host
        if allocation._complete or not host.size:
            return
        if key is None and (host.flags.c_contiguous or host.flags.f_contiguous):
            start = _address(host) - allocation.ptr
            written = allocation.initialised[start : start + host.nbytes]
            if host.nbytes == allocation.nbytes and allocation.complete:
                return
        else:
            items = self._written() if key is None else self._written()[key]
            written = np.frombuffer(items.tobytes(), np.uint8)
        if not written.all():
            elements = written.reshape(-1, host.itemsize).all(axis=1)
            raise _memory.UninitialisedMemoryError(
                f"{elements.size - elements.sum()} of {elements.size} elements that were read of a {host.dtype} "
                f"array of shape {host.shape} on device {allocation.device} were never written"
            )

    def _mark(self, where: Any = True, key: Any = None) -> None:
        """Note that all elements, those of a mask, or those that a key selects, were written."""
        allocation, host = self._allocation, self._host
        if allocation._complete or not host.size:
            return
        if where is True and key is None and (host.flags.c_contiguous or host.flags.f_contiguous):
            start = _address(host) - allocation.ptr
            allocation.initialised[start : start + host.nbytes] = 1
            allocation._complete = host.nbytes == allocation.nbytes
            return
        one = np.frombuffer(b"\1" * host.itemsize, f"V{host.itemsize}")[0]
        if key is not None:
            self._written()[key] = one
        else:
            np.copyto(self._written(), one, where=where)

    @property
    def data(self) -> _memory.MemoryPointer:
        """The pointer to the first element."""
        offset = _address(self._host) - self._allocation.ptr if self.size else 0
        return _memory.MemoryPointer(self._allocation, offset)

    @property
    def device(self) -> Device:
        """The device whose memory the array is in."""
        return Device(self._allocation.device)

    @property
    def flags(self) -> Flags:
        """How the elements lie in memory."""
        return Flags(self._host.flags.c_contiguous, self._host.flags.f_contiguous, self.base is None)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._mark()  # a program that asks for this may write through it, unseen
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": get_current_stream().ptr or runtime.streamLegacy,
            "version": 3,
            "strides": None if self._host.flags.c_contiguous else self.strides,
            "data": (self.data.ptr if self.size else 0, False),
        }

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)

    # -----------------------------------------------------------------------------------------------------------------
    # To the host and from it

    def get(
        self,
        stream: Stream | None = None,
        order: str = "C",
        out: npt.NDArray[Any] | None = None,
        blocking: bool = True,
    ) -> npt.NDArray[Any]:
        """A copy in host memory; the host waits for it."""
        if order.upper() not in ("C", "F", "A"):
            raise ValueError(f"unsupported order: {order}")
        if out is not None:
            self._expect_alike(out, "obtained from", "Expected", "actual")
            if not (out.flags.c_contiguous or out.flags.f_contiguous):
                raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        note_get("get", stream, blocking)
        self._check()
        if out is None:
            return self._host.copy(order.upper())  # type: ignore[arg-type]
        out[...] = self._host
        return out

    def set(self, arr: npt.NDArray[Any], stream: Stream | None = None) -> None:
        """Copy a NumPy array of the same shape and dtype into this one."""
        self._expect_alike(arr, "set to", "Old", "new")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        note_set(stream)
        self._host[...] = arr
        self._mark()

    def _expect_alike(self, host: npt.NDArray[Any], how: str, ours: str, theirs: str) -> None:
        """Raise unless the elements of one array can be copied into the other; the words are CuPy's."""
        if not isinstance(host, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be {how} cupy.ndarray")
        if self.dtype != host.dtype:
            raise TypeError(f"{host.dtype} array cannot be {how} {self.dtype} array")
        if self.shape != host.shape:
            raise ValueError(f"Shape mismatch. {ours} shape: {self.shape}, {theirs} shape: {host.shape}")

    def item(self) -> Any:
        """The only element as a Python scalar."""
        return self.get().item()

    def tolist(self) -> Any:
        """Nested lists of Python scalars."""
        return self.get().tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        """The bytes of the elements in a given order."""
        return self.get().tobytes(order)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError(_IMPLICIT)

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. Use a.any() or a.all()"
            )
        if not self.size:
            warnings.warn("The truth value of an empty array is ambiguous.", DeprecationWarning, stacklevel=2)
            return False
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __reduce__(self) -> Any:
        return cupy.array, (self.get(order="A"),)

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()

    # -----------------------------------------------------------------------------------------------------------------
    # Elements

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[ndarray]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, key: Any) -> ndarray:
        items = key if isinstance(key, tuple) else (key,)
        if _is_basic(items):
            return self._basic(items)
        items = _indices(items)
        if any(isinstance(item, ndarray) and item.dtype == bool for item in items):
            note_get("boolean index")  # the host waits: only the device knows how many elements are selected

        def take(host: npt.NDArray[Any], *key: Any) -> Any:
            return host[key]

        result: ndarray = run(take, (self, *items), reads=lambda: self._check(_index_hosts(items)))
        return result

    def __setitem__(self, key: Any, value: Any) -> None:
        items = key if isinstance(key, tuple) else (key,)
        if not isinstance(value, ndarray):
            value = _scalar(value, self.dtype)
        if _is_basic(items):
            assign(self._basic(items), value)
            return
        items = _indices(items)

        def put(value: Any, *key: Any, out: npt.NDArray[Any]) -> None:
            out[key] = value

        run(put, (value, *items), {"out": self}, writes=lambda: self._mark(key=_index_hosts(items)))

    def fill(self, value: Any) -> None:
        """Set all elements to a scalar."""
        if isinstance(value, ndarray):
            if value.shape != ():
                raise ValueError("non-scalar cupy.ndarray cannot be used for fill")
        else:
            value = _scalar(value, self.dtype)
        assign(self, value)

    # -----------------------------------------------------------------------------------------------------------------
    # Copies and views

    def copy(self, order: str = "C") -> ndarray:
        """A copy of the array on the current device."""
        if not self.size or self._allocation.device == runtime.getDevice():
            return self.astype(self.dtype, order=order)
        with self.device:
            source = self.astype(self.dtype, order=order, copy=False)
        if not source.flags.forc:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        if get_current_stream()._capture is not None:
            raise NotImplementedError("the stand-in for CuPy cannot capture a copy between devices")
        source._check()
        result = _empty_of_order(source, source.dtype, "K")
        result._host[...] = source._host
        result._mark()
        return result

    def astype(
        self,
        dtype: npt.DTypeLike,
        order: str = "K",
        casting: Any = None,
        subok: bool | None = None,  # noqa: ARG002
        copy: bool = True,
    ) -> ndarray:
        """A copy with another dtype; with ``copy=False`` the array itself where that is possible."""
        dtype = _dtypes.supported(dtype)
        if casting is not None and not np.can_cast(self.dtype, dtype, casting):
            raise TypeError(
                f"Cannot cast array data from {self.dtype!r} to {dtype!r} according to the rule {casting!r}"
            )
        suits = {"C": self.flags.c_contiguous, "F": self.flags.f_contiguous, "A": self.flags.forc, "K": True}
        if not copy and dtype == self.dtype and suits[order.upper()]:
            return self
        result = _empty_of_order(self, dtype, order)
        assign(result, self)
        return result

    def view(self, dtype: npt.DTypeLike | None = None) -> ndarray:
        """An array of the same memory, with another dtype."""
        return self._view(self._host.view(self.dtype if dtype is None else _dtypes.supported(dtype)))

    reshape, ravel = (_method(name, view=True) for name in ("reshape", "ravel"))
    transpose, swapaxes, squeeze = (
        _method(name, view=True, calls=lambda array: array.view()) for name in ("transpose", "swapaxes", "squeeze")
    )
    diagonal = _method("diagonal", view=True, calls=lambda array: array[...])
    flatten = _method("flatten")
    T = property(lambda self: ndarray.transpose(self))
    real = property(lambda self: self._view(self._host.real))

    @property
    def imag(self) -> ndarray:
        """The imaginary parts: a view of complex numbers, else zeros."""
        return self._view(self._host.imag) if self.dtype.kind == "c" else cupy.zeros_like(self)

    # -----------------------------------------------------------------------------------------------------------------
    # Arithmetic

    __add__, __radd__, __iadd__ = _operators("add")
    __sub__, __rsub__, __isub__ = _operators("subtract")
    __mul__, __rmul__, __imul__ = _operators("multiply")
    __truediv__, __rtruediv__, __itruediv__ = _operators("true_divide")
    __floordiv__, __rfloordiv__, __ifloordiv__ = _operators("floor_divide")
    __mod__, __rmod__, __imod__ = _operators("remainder")
    __divmod__, __rdivmod__, _ = _operators("divmod")
    __pow__, __rpow__, __ipow__ = _operators("power")
    __matmul__, __rmatmul__, __imatmul__ = _operators("matmul")
    __and__, __rand__, __iand__ = _operators("bitwise_and")
    __or__, __ror__, __ior__ = _operators("bitwise_or")
    __xor__, __rxor__, __ixor__ = _operators("bitwise_xor")
    __lshift__, __rlshift__, __ilshift__ = _operators("left_shift")
    __rshift__, __rrshift__, __irshift__ = _operators("right_shift")
    __neg__, __pos__, __abs__, __invert__ = map(_unary, ("negative", "positive", "absolute", "invert"))
    __lt__, __le__, __gt__, __ge__ = map(_comparison, ("less", "less_equal", "greater", "greater_equal"))
    __eq__, __ne__ = _comparison("equal", False), _comparison("not_equal", True)
    __hash__ = None  # type: ignore[assignment]
    del _

    sum, prod, mean, var, std = (_method(name) for name in ("sum", "prod", "mean", "var", "std"))
    min, max, argmin, argmax = (_method(name) for name in ("min", "max", "argmin", "argmax"))
    any, all, cumsum, cumprod = (_method(name) for name in ("any", "all", "cumsum", "cumprod"))
    clip, round, conj, conjugate = (_method(name) for name in ("clip", "round", "conj", "conjugate"))
    dot, take, repeat, argsort, trace = (_method(name) for name in ("dot", "take", "repeat", "argsort", "trace"))

    def nonzero(self) -> tuple[ndarray, ...]:
        """The indices of the elements that are not zero."""
        note_get("nonzero")
        result: tuple[ndarray, ...] = run(np.nonzero, (self,))
        return result

    # -----------------------------------------------------------------------------------------------------------------
    # NumPy's functions

    __array_priority__ = 100

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        function = getattr(cupy, ufunc.__name__, None)
        if function is None or method not in ("__call__", "outer", "at", "reduce", "accumulate"):
            return NotImplemented
        if "out" in kwargs:
            if len(kwargs["out"]) != 1:
                raise ValueError("The 'out' parameter must have exactly one array value")
            kwargs["out"] = kwargs["out"][0]
        return (function if method == "__call__" else getattr(function, method))(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        module: Any = cupy
        for name in function.__module__.split(".")[1:]:
            module = getattr(module, name, None)
        ours = getattr(module, function.__name__, None)
        if ours is None or ours is function or not all(issubclass(t, (ndarray, np.ndarray)) for t in types):
            return NotImplemented
        return ours(*args, **kwargs)


def byte_range(array: ndarray) -> tuple[int, int]:
    """The addresses of an array's first byte and of the first byte past it, whatever its strides."""
    first, end = np.lib.array_utils.byte_bounds(array._host) if array.size else (array.data.ptr,) * 2
    return int(first), int(end)


def range_at(allocation: _memory.Allocation, ptr: int) -> tuple[int, int]:
    """The addresses of what somebody who was told an address may touch: of the live arrays that begin there.

    Where none does, of the whole allocation that it lies in.
    """
    arrays = [reference() for reference in allocation.arrays.valuerefs()]  # at once: other threads may make views
    ranges = [byte_range(a) for a in arrays if a is not None and a.size and _address(a._host) == ptr]
    if not ranges:
        return allocation.ptr, allocation.ptr + allocation.nbytes
    firsts, ends = zip(*ranges, strict=True)
    return min(firsts), max(ends)


def _address(host: npt.NDArray[Any]) -> int:
    return int(host.__array_interface__["data"][0])


def _scalar(value: Any, dtype: np.dtype[Any]) -> Any:
    """A host scalar as an array of a dtype; an error for any other host value, which assignment does not take."""
    with np.errstate(all="ignore"):
        host = np.asarray(value).astype(dtype)
    if host.shape != ():
        raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
    return host[()]


def _is_basic(items: tuple[Any, ...]) -> bool:
    return not any(isinstance(item, (ndarray, np.ndarray, list, bool, np.bool_)) for item in items)


def _indices(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """The indices with lists and NumPy arrays as device arrays."""
    return tuple(
        cupy.array(np.asarray(item, np.intp if isinstance(item, list) and not item else None))
        if isinstance(item, (list, np.ndarray))
        else item
        for item in items
    )


def _index_hosts(items: tuple[Any, ...]) -> tuple[Any, ...]:
    for item in items:
        if isinstance(item, ndarray):
            item._check()
    return tuple(item._host if isinstance(item, ndarray) else item for item in items)


def _empty_of_order(like: ndarray, dtype: np.dtype[Any], order: str) -> ndarray:
    """A new array of the same shape in memory order C, F, A or K."""
    strides = np.empty_like(like._host, dtype, order.upper()).strides  # type: ignore[call-overload]
    return ndarray(like.shape, dtype, strides=strides)
