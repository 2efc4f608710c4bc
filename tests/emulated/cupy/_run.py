"""Applies NumPy functions to the host memory behind device arrays: now, or when a captured graph is launched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

import cupy
from cupy._errors import CUDADriverError
from cupy.cuda import runtime
from cupy.cuda._capture import check
from cupy.cuda.stream import get_current_stream

Check = Callable[[], object]


def run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    view: bool = False,
    reads: Check | None = None,
    writes: Check | None = None,
) -> Any:
    """The results of a NumPy function as new arrays of the current device, or those that ``out=`` names.

    Parameters
    ----------
    view
        Whether the function returns views where it can; it reads the elements only if it returns none.
    reads
        Function called instead of checking that all elements of all arguments were written.
    writes
        Function called instead of noting that all elements of ``out=`` were written.
    """
    kwargs = dict(kwargs or {})
    out = kwargs.pop("out", None)
    outs = [] if out is None else list(_leaves(out))
    if not all(isinstance(array, cupy.ndarray) for array in outs):
        raise TypeError("Output arguments type must be cupy.ndarray")
    arrays = []
    for leaf in _leaves((args, kwargs)):
        if isinstance(leaf, np.ndarray):
            raise TypeError(f"Unsupported type {type(leaf)}")
        if isinstance(leaf, cupy.ndarray):
            arrays.append(leaf)

    def compute(lower: Callable[[Any], Any]) -> Any:
        lowered = _map((args, kwargs), lower)
        with ExitStack() as quiet:  # a device warns of neither infinities nor means of nothing
            quiet.enter_context(np.errstate(all="ignore"))
            # Only where it is needed: this is slow, and not safe in threads.
            if not all(array.size for array in arrays):
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", RuntimeWarning)
            return function(*lowered[0], **lowered[1], **({} if out is None else {"out": _map(out, lower)}))

    if view:
        result = compute(_host)
        if all(_source(leaf, arrays) is not None for leaf in _leaves(result) if isinstance(leaf, np.ndarray)):
            return _map(result, lambda leaf: _as_view(leaf, arrays))
    _check_devices(arrays + outs)

    def work() -> Any:
        if reads is None:
            for array in arrays:
                array._check()
        else:
            reads()
        result = compute(_host)
        if writes is None:
            for array in outs:
                array._mark(_host(kwargs.get("where", True)))
        else:
            writes()
        return result

    stream = get_current_stream()
    check(stream._status_of_use(), "launch", CUDADriverError)
    if stream._capture is None:
        result = work()
        return _map(result, _new) if out is None else out
    if out is not None:
        stream._capture.work.append(work)
        return out
    promised = _map(compute(_blank), _promise)  # of zeros: only shapes and dtypes matter before the launch
    targets = [leaf for leaf in _leaves(promised) if isinstance(leaf, cupy.ndarray)]

    def deliver() -> None:
        values = [leaf for leaf in _leaves(work()) if isinstance(leaf, (np.ndarray, np.generic))]
        for target, value in zip(targets, values, strict=True):
            target._host[...] = value
            target._mark()

    stream._capture.work.append(deliver)
    return promised


def assign(target: Any, source: Any) -> None:
    """Copy the elements of one device array, broadcast and cast, into another one."""
    run(_assign, (source,), {"out": target})


def _assign(source: Any, out: Any) -> None:
    out[...] = source


def _check_devices(arrays: list[Any]) -> None:
    current = runtime.getDevice()
    for array in arrays:
        if array._allocation.device != current:
            raise ValueError(
                f"The device where the array resides ({array._allocation.device}) is different from the current "
                f"device ({current}). Peer access is unavailable between these devices."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Leaves of nested tuples, lists and dicts


def _map(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(value, leaf) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_map(item, leaf) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return leaf(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (dict, tuple, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _host(leaf: Any) -> Any:
    return leaf._host if isinstance(leaf, cupy.ndarray) else leaf


def _blank(leaf: Any) -> Any:
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, cupy.ndarray) else leaf


def _new(leaf: Any) -> Any:
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return leaf
    array = _promise(leaf)
    array._host[...] = leaf
    array._mark()
    return array


def _promise(leaf: Any) -> Any:
    return cupy.ndarray(leaf.shape, leaf.dtype) if isinstance(leaf, (np.ndarray, np.generic)) else leaf


def _source(host: Any, arrays: list[Any]) -> Any:
    """The array whose memory a result is a view of; any array if the result has no elements."""
    for array in arrays:
        if not host.size or np.may_share_memory(host, array._allocation.host):
            return array
    return None


def _as_view(leaf: Any, arrays: list[Any]) -> Any:
    return _source(leaf, arrays)._view(leaf) if isinstance(leaf, np.ndarray) else leaf
