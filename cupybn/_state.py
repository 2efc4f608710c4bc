"""State dicts: which keys and shapes a layer expects, and everything that is wrong with those it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybn._devices import kind
from cupybn._dtypes import is_float

COUNTER = "num_batches_tracked"


def select(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def as_array(key: str, value: Any) -> Any:
    """A CuPy array as it is, or what ``numpy.asarray`` makes of anything else.

    Raises
    ------
    TypeError
        If this is not an array of real numbers.
    """
    array = value if kind(value) == "cupy" else np.asarray(value)
    if array.dtype.kind not in "fiub" and not is_float(array.dtype):
        raise TypeError(f"expected {key} to be an array of real numbers (got dtype {array.dtype})")
    return array


def check(own: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], strict: bool, prefix: str) -> None:
    """Compare with the keys and shapes that a layer expects.

    Raises
    ------
    KeyError
        If keys are missing or unexpected and `strict` is set; names the wrong shapes, too.
    ValueError
        If only shapes are wrong.
    """
    problems = []
    if strict:
        missing = [prefix + key for key in expected if key not in own and key != COUNTER]
        unexpected = [prefix + key for key in own if key not in expected]
        problems += [f"missing keys: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected keys: {', '.join(unexpected)}"] if unexpected else []
    shapes = [
        f"expected {prefix}{key} of shape {shape} (got {own[key].shape})"
        for key, shape in expected.items()
        if key in own and own[key].shape != shape
    ]
    if problems:
        raise KeyError("; ".join(problems + shapes))
    if shapes:
        raise ValueError("; ".join(shapes))
