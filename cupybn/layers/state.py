"""Checks of the state dicts that layers load: keys, shapes and counts, with hints at what was probably meant."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from cupybn._arrays.dtypes import BITS_OF_BFLOAT16, is_float
from cupybn._arrays.kinds import from_dlpack, kind, plain, show

COUNTER = "num_batches_tracked"
"""Name of the counter of batches, the only one of a layer's arrays that a state dict may leave out."""
MOST_BATCHES = 2**63 - 1
"""Largest number that an int64 counter holds."""
LOADERS = {
    ".safetensors": "safetensors.numpy.load_file(path)",
    ".pt": "torch.load(path, map_location='cpu')",
    ".pth": "torch.load(path, map_location='cpu')",
}
"""Calls that read a file into a mapping, by the suffix of the file."""
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints of whole programs keep the state of the model."""


def check_mapping(state: Any) -> None:
    """Check for a mapping of names to arrays, or an object that acts like one.

    Raises
    ------
    TypeError
        If this is something else. The message says how to make a mapping of it.
    """
    if hasattr(state, "keys") and hasattr(state, "__getitem__"):
        return
    way_out = ""
    if isinstance(state, (str, bytes, os.PathLike)):
        suffix = PurePath(os.fsdecode(state)).suffix
        way_out = f": load the file first, use {LOADERS.get(suffix, 'numpy.load(path)')}"
    elif hasattr(state, "read"):
        suffix = PurePath(str(getattr(state, "name", ""))).suffix
        way_out = f": load the file first, use {LOADERS.get(suffix, 'numpy.load(file)')}"
    elif kind(state) == "numpy" and state.shape == () and state.dtype == object:
        way_out = ": use state.item()"
    elif isinstance(state, (list, tuple)):
        way_out = ": use dict(state), if these are pairs"
    elif hasattr(state, "state_dict"):
        way_out = ": use state.state_dict()"
    raise TypeError(f"expected state to be a mapping of names to arrays (got {show(state)}){way_out}")


def under(prefix: str, keys: Iterable[Any]) -> list[Any]:
    """Keys that belong to a layer: those that start with its prefix. Without a prefix, keys that are no str as well."""
    return [key for key in keys if (key.startswith(prefix) if isinstance(key, str) else not prefix)]


def read(state: Mapping[Any, Any], key: str) -> Any:
    """Value of a key.

    Raises
    ------
    TypeError
        If it cannot be read: an array of objects in a file, for example, or any array of a file that is closed.
    """
    try:
        return state[key]
    except MemoryError:
        raise
    except Exception as error:
        closed = isinstance(state, np.lib.npyio.NpzFile) and state.zip is None
        given = "a closed file" if closed else f"{type(error).__qualname__}: {error}"
        way_out = ": load it while the file is open" if closed else ""
        raise TypeError(f"expected {key} to be an array of real numbers (got {given}){way_out}") from error


def as_array(key: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """Array to copy into one of this dtype: a CuPy array as it is, anything else as ``numpy.asarray`` makes it.

    NumPy's files keep the bits of bfloat16 without its name: they are taken for bfloat16 where this dtype is bfloat16.

    Raises
    ------
    TypeError
        If this is not an array of real numbers, or some of them are masked.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(f"expected {key} to be an array of real numbers: masks are not supported, use .filled(...)")
    try:
        array = plain(value) if kind(value) == "cupy" else np.asarray(value)
    except Exception as error:  # objects raise errors of any class when NumPy asks them for an array
        given = f"{type(value).__qualname__}: {error}"
        raise TypeError(f"expected {key} to be an array of real numbers (got {given})") from error
    beyond = isinstance(value, int)  # NumPy makes an array of objects of an int that is too large for its dtypes
    if array.dtype == BITS_OF_BFLOAT16 and dtype.name == "bfloat16":
        return array.view(dtype)
    if array.dtype.kind not in "fiub" and not is_float(array.dtype) and not beyond:
        given, way_out = f"dtype {array.dtype}", ""
        if array.dtype == object and array.shape == () and kind(value) is None:  # NumPy could not read this object
            given = show(value)
            way_out = f": use {from_dlpack(key, value)}" if hasattr(type(value), "__dlpack__") else ""
        elif array.dtype == BITS_OF_BFLOAT16:
            way_out = ": if these are the bits of bfloat16, use .view(ml_dtypes.bfloat16)"
        raise TypeError(f"expected {key} to be an array of real numbers (got {given}){way_out}")
    return array


def check(
    state: Mapping[Any, Any],
    own: Mapping[str, Any],
    unexpected: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
    strict: bool,
    prefix: str,
) -> None:
    """Check the keys, the shapes and the counter of a state dict against those that a layer expects.

    Parameters
    ----------
    state : mapping
        State dict as it was given. It is read only for a hint at what was meant.
    own : mapping of names to arrays
        Arrays of the state dict that the layer expects, by their names without prefix.
    unexpected : sequence
        Keys with the layer's prefix that the layer does not know.
    shapes : mapping of names to shapes
        Shapes of the arrays that the layer expects.
    strict : bool
        Whether missing and unexpected keys are errors.
    prefix : str
        Prefix of the layer's keys.

    Raises
    ------
    KeyError
        If keys are missing or unexpected and `strict` is set. The message names wrong values as well.
    ValueError
        If only values are wrong.
    """
    values = [
        f"expected {prefix}{name} of shape {shape} (got {own[name].shape})"
        for name, shape in shapes.items()
        if name in own and own[name].shape != shape
    ]
    if COUNTER in own and own[COUNTER].shape == ():
        values += _wrong_count(prefix + COUNTER, own[COUNTER])
    missing = [prefix + name for name in shapes if name not in own and name != COUNTER]
    if strict and (missing or unexpected):
        keys = [f"missing keys: {', '.join(missing)}"] if missing else []
        keys += [f"unexpected keys: {', '.join(map(_name, unexpected))}"] if unexpected else []
        raise KeyError("; ".join(keys + values) + (_meant(state, shapes, prefix) if missing else ""))
    if values:
        raise ValueError("; ".join(values))


def _name(key: Any) -> str:
    """Text for a key in a message."""
    try:
        return str(key)
    except Exception:  # objects raise errors of any class
        return type(key).__qualname__


def _wrong_count(key: str, counter: Any) -> list[str]:
    """Errors of a counter, as a list of none or one. A counter on a device is read: it is no part of the layer yet."""
    value = (counter.get() if kind(counter) == "cupy" else counter).item()
    if 0 <= value <= MOST_BATCHES and value == int(value):
        return []
    return [f"expected {key} to be a number of batches, a whole one from 0 to 2**63 - 1 (got {value})"]


def _meant(state: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    """Hint at the prefix or key under which the state has what the layer expects. The end of a message."""
    texts = {key: None for key in state.keys() if isinstance(key, str)}  # noqa: SIM118 - it may only act like a mapping
    names = [name for name in shapes if name != COUNTER]
    prefixes = [key.removesuffix(names[0]) for key in texts if key.endswith(names[0])]
    complete = [other for other in prefixes if other != prefix and all(other + name in texts for name in names)]
    for other in sorted(complete, key=lambda other: -_alike(other, prefix)):
        if set(under(other, texts)) <= {other + name for name in shapes} and _fits(state, other, names, shapes):
            return f"; did you mean prefix={other!r}?"
    with contextlib.suppress(Exception):  # a value that cannot be read was not meant
        for key in NESTED:
            if key in texts and hasattr(state[key], "keys"):
                return f"; did you mean state[{key!r}]?"
    if any(isinstance(key, bytes) for key in state.keys()):  # noqa: SIM118
        return "; keys are to be str, not bytes: use key.decode()"
    return ""


def _alike(prefix: str, other: str) -> int:
    """Number of components, from the last one on, that two prefixes share."""
    pairs = zip(reversed(prefix.rstrip(".").split(".")), reversed(other.rstrip(".").split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _fits(state: Mapping[Any, Any], prefix: str, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the vectors under a prefix have the layer's size or, if the layer has none yet, all the same size."""
    with contextlib.suppress(Exception):  # a value that cannot be read does not fit
        given = {tuple(np.shape(state[prefix + name])) for name in names}
        wanted = shapes[names[0]]
        return len(given) == 1 and (given == {wanted} or (wanted == (0,) and len(given.pop()) == 1))
    return False
