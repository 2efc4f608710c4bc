"""Checks of the states that layers load: keys, shapes and counts, with hints at what was probably meant."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.dtypes import BITS_OF_BFLOAT16, is_float
from cupybn._arrays.kinds import from_dlpack, kind, plain, show
from cupybn.layers.names import COUNTER, NAMES, is_vector
from cupybn.layers.tensors import is_tensor, of_tensor

MOST_BATCHES = 2**63 - 1
"""Largest number that an int64 counter holds."""
LOADERS = {
    ".safetensors": "safetensors.numpy.load_file(path)",
    ".pt": "torch.load(path, map_location='cpu', weights_only=True)",
    ".pth": "torch.load(path, map_location='cpu', weights_only=True)",
}
"""Calls that read a file into a mapping, by the suffix of the file."""
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints of whole programs keep the state of the model."""


class UnreadableError(Exception):
    """A file that is damaged. `read` lets it pass: that is no fault of an entry."""


def is_mapping(value: object) -> bool:
    """Whether this is a mapping, or acts like one, as groups of HDF5 files do."""
    return hasattr(value, "keys") and hasattr(value, "__getitem__")


def check_mapping(state: Any, name: str = "state", alternative: str = "") -> None:
    """Check for a mapping of names to arrays, or an object that acts like one. The rest is for messages.

    Raises
    ------
    TypeError
        If this is something else. The message says how to make a mapping of it.
    """
    if is_mapping(state):
        return
    way_out = ""
    if alternative and isinstance(state, bytes):
        way_out = f": use os.fsdecode({name})"
    elif isinstance(state, (str, bytes, os.PathLike)):
        suffix = PurePath(os.fsdecode(state)).suffix
        way_out = f": load the file first, use {LOADERS.get(suffix, 'numpy.load(path)')}"
    elif hasattr(state, "read"):
        suffix = PurePath(str(getattr(state, "name", ""))).suffix
        way_out = f": load the file first, use {LOADERS.get(suffix, 'numpy.load(file)')}"
    elif kind(state) == "numpy" and state.shape == () and state.dtype == object:
        way_out = f": use {name}.item()"
    elif isinstance(state, (list, tuple)):
        way_out = f": use dict({name}), if these are pairs"
    elif hasattr(state, "state_dict"):
        way_out = f": use {name}.state_dict()"
    wanted = " ".join(filter(None, ["a mapping of names to arrays", alternative]))
    raise TypeError(f"expected {name} to be {wanted} (got {show(state)}){way_out}")


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
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:
        closed = isinstance(state, np.lib.npyio.NpzFile) and state.zip is None
        given = "a closed file" if closed else f"{type(error).__qualname__}: {error}"
        way_out = ": load it while the file is open" if closed else ""
        raise TypeError(f"expected {key} to be an array of real numbers (got {given}){way_out}") from error


def as_array(key: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """Array to copy into one of this dtype: a CuPy array as it is, anything else as a NumPy array.

    NumPy's files keep the bits of bfloat16 without its name: they are taken for bfloat16 where this dtype is bfloat16.

    Raises
    ------
    TypeError
        If this is not an array of real numbers, or some of them are masked.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(f"expected {key} to be an array of real numbers: masks are not supported, use .filled(...)")
    try:
        array = of_tensor(value) if is_tensor(value) else plain(value) if kind(value) == "cupy" else np.asarray(value)
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


class IncompatibleKeys(NamedTuple):
    """Keys that a state dict and a layer do not share, as `BatchNorm2d.load_state_dict` returns them.

    Attributes
    ----------
    missing_keys : list of str
        Keys that the layer expects and the state has not, in full and in the names of the state. The number of batches
        is not among them: a state may leave it out.
    unexpected_keys : list
        Keys under the layer's prefix that the layer does not know.

    Examples
    --------
    >>> from cupybn import BatchNorm1d
    >>> layer = BatchNorm1d(2, device="cpu")
    >>> layer.load_state_dict({"weight": [1, 2], "bias": [3, 4], "scale": [5, 6]}, strict=False)
    IncompatibleKeys(missing_keys=['running_mean', 'running_var'], unexpected_keys=['scale'])
    """

    missing_keys: list[str]
    unexpected_keys: list[Any]


class Expected(NamedTuple):
    """What a layer expects of a state."""

    framework: str  # one of `NAMES`, which the state is written in
    prefix: str
    keys: Mapping[str, str]  # full keys in the state by the names of the layer's arrays, where the framework has one
    shapes: Mapping[str, tuple[int | None, ...]]  # shapes of all of the layer's arrays; None is any number of channels


class Faults(NamedTuple):
    """What is wrong with a state."""

    keys: list[str]
    values: list[str]
    types: list[TypeError]
    hint: str

    def text(self) -> str:
        """All of it, in one line."""
        return "; ".join([*self.keys, *self.values, *map(str, self.types)]) + self.hint


def error_of(faults: Iterable[Faults]) -> Exception | None:
    """The one error that names all that is wrong; None if nothing is."""
    found = [each for each in faults if each.keys or each.values or each.types]
    if not found:
        return None
    text = "; ".join(each.text() for each in found)
    if any(each.keys for each in found):
        return KeyError(text)
    return ValueError(text) if any(each.values for each in found) else TypeError(text)


def faults_of(
    state: Mapping[Any, Any], given: Mapping[str, Any], expected: Expected, keys: IncompatibleKeys, strict: bool
) -> Faults:
    """What is wrong with the keys, the shapes and the counter of a state.

    Parameters
    ----------
    state : mapping
        State as it was given. It is read only for a hint at what was meant.
    given : mapping of names to arrays
        Arrays of the state that the layer expects.
    expected : Expected
        What the layer expects.
    keys : IncompatibleKeys
        Keys that are missing and unexpected.
    strict : bool
        Whether these are errors.
    """
    values = [
        f"expected {expected.keys[name]} of shape {'(C,)' if None in shape else shape} (got {given[name].shape})"
        for name, shape in expected.shapes.items()
        if name in given and given[name].shape != shape
    ]
    if COUNTER in given and given[COUNTER].shape == ():
        values += _wrong_count(expected.keys[COUNTER], given[COUNTER])
    texts = []
    if strict and keys.missing_keys:
        texts.append(f"missing keys: {', '.join(keys.missing_keys)}")
    if strict and keys.unexpected_keys:
        texts.append(f"unexpected keys: {', '.join(map(_name, keys.unexpected_keys))}")
    return Faults(texts, values, [], _meant(state, expected) if strict and keys.missing_keys else "")


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
    given = show(value) if isinstance(value, int) else value  # Python makes no text of an int of too many digits
    return [f"expected {key} to be a number of batches, a whole one from 0 to 2**63 - 1 (got {given})"]


def _meant(state: Mapping[Any, Any], expected: Expected) -> str:
    """Hint at the prefix, names or key under which the state has what the layer expects. The end of a message."""
    texts = {key: None for key in state.keys() if isinstance(key, str)}  # noqa: SIM118 - it may only act like a mapping
    prefix, first = expected.prefix, NAMES[expected.framework][next(iter(expected.keys))]
    others = [key.removesuffix(first) for key in texts if key.endswith(first) and key != prefix + first]
    for other in _likely_first(others, prefix):
        if _would_load(state, texts, other, expected.framework, expected.shapes):
            return f"; did you mean prefix={other!r}?"
    for framework in NAMES:
        if _would_load(state, texts, prefix, framework, expected.shapes):
            return f"; did you mean names={framework!r}?"
    with contextlib.suppress(Exception):  # a value that cannot be read was not meant
        for key in NESTED:
            if key in texts and is_mapping(state[key]):
                return f"; did you mean state[{key!r}]?"
    if any(isinstance(key, bytes) for key in state.keys()):  # noqa: SIM118
        return "; keys are to be str, not bytes: use key.decode()"
    return ""


def _likely_first(others: list[str], prefix: str) -> Iterator[str]:
    """Prefixes that end like this one, and then the others, those first that share the most components with it."""
    yield from (other for other in others if other.endswith(prefix))
    yield from sorted(
        (other for other in others if not other.endswith(prefix)), key=lambda other: -_alike(other, prefix)
    )


def _alike(prefix: str, other: str) -> int:
    """Number of components, from the last one on, that two prefixes share."""
    parts = (reversed(re.split("[./]", text.rstrip("./"))) for text in (prefix, other))
    pairs = zip(*parts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _would_load(
    state: Mapping[Any, Any],
    texts: Mapping[str, Any],
    prefix: str,
    framework: str,
    shapes: Mapping[str, tuple[int | None, ...]],
) -> bool:
    """Whether a state has under this prefix, in the names of this framework, all that a layer expects and no more.

    The arrays must have the layer's shape or, if it has none yet, vectors of one size.
    """
    theirs = {name: prefix + NAMES[framework][name] for name in shapes if name in NAMES[framework]}
    vectors = [key for name, key in theirs.items() if name != COUNTER]
    if not all(key in texts for key in vectors) or not set(under(prefix, texts)) <= set(theirs.values()):
        return False
    with contextlib.suppress(Exception):  # a value that cannot be read does not fit
        given = [tuple(np.shape(state[key])) for key in vectors]
        expected = {shapes[name] for name in theirs if name != COUNTER}
        if any(len(shape) != 1 for shape in expected):
            return {*given} == expected
        sizes = {math.prod(shape) for shape in given} | {shape[0] for shape in expected}
        return all(is_vector(shape, framework) for shape in given) and len(sizes - {None}) <= 1
    return False
