"""Checkpoints of whole models: which batch norm layers they have, and the states of many layers at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays import kinds
from cupybn._arrays.dtypes import FLOATS, is_float
from cupybn._calls import checks
from cupybn.layers import state as _state
from cupybn.layers.layer import Layer
from cupybn.layers.names import names_of
from cupybn.layers.writing import write
from cupybn.models.formats import format_of
from cupybn.models.reading import Entries, opened, shape_of
from cupybn.models.writing import write_file

Source = Mapping[str, Any] | str | os.PathLike[Any]

MOST_LEVELS = 64
"""Number of levels of a checkpoint that are looked into: a group of HDF5 may hold itself, as a new object each time."""


def find_batch_norms(source: Source) -> dict[str, int]:
    """Prefixes and numbers of channels of the batch norm layers that a checkpoint holds, in its order.

    A layer is where there are vectors ``running_mean`` and ``running_var`` of one length. Other entries are not read.
    Which rank a layer's inputs have (`BatchNorm1d`, `BatchNorm2d` or `BatchNorm3d`), its eps and its momentum are in no
    checkpoint: they are in the code of the model.

    Parameters
    ----------
    source : mapping, str or path
        As `load_checkpoint` takes it, with PyTorch's names.

    Returns
    -------
    dict
        Prefixes, such as ``"layer1.0.bn1."``, and the number of channels of each.

    Raises
    ------
    TypeError, ValueError, ImportError, OSError
        As `load_checkpoint`, if the source cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> checkpoint = {"conv.weight": np.ones((8, 3, 3, 3))}
    >>> checkpoint |= cupybn.BatchNorm2d(8, device="cpu").state_dict("bn1.")
    >>> checkpoint |= cupybn.BatchNorm2d(16, device="cpu").state_dict("bn2.")
    >>> cupybn.find_batch_norms(checkpoint)
    {'bn1.': 8, 'bn2.': 16}
    >>> found = cupybn.find_batch_norms(checkpoint)
    >>> layers = {prefix: cupybn.BatchNorm2d(channels, device="cpu") for prefix, channels in found.items()}
    >>> cupybn.load_checkpoint(checkpoint, layers)
    """
    with opened(source) as entries:
        return next(filter(None, map(_batch_norms, _levels(entries))), {})


def _batch_norms(entries: Mapping[Any, Any]) -> dict[str, int]:
    """Prefixes and numbers of channels of the batch norm layers of a state dict."""
    found = {}
    keys = dict.fromkeys(_texts(entries))
    for key in keys:
        match = re.fullmatch(r"(|.*\W)running_mean", key, re.DOTALL)
        if match and f"{match[1]}running_var" in keys:
            shape = shape_of(entries, key)
            if shape is not None and len(shape) == 1 and shape == shape_of(entries, f"{match[1]}running_var"):
                found[match[1]] = shape[0]
    return found


def load_checkpoint(source: Source, layers: Mapping[str, Layer], *, strict: bool = True, names: str = "torch") -> None:
    """Load the states of many layers from a checkpoint: all of them, or none.

    Entries under no layer's prefix are ignored, and not read where the format allows that. Layers stay in the mode that
    they are in: new ones are in training mode, and ``layer.eval()`` is what inference needs.

    Parameters
    ----------
    source : mapping, str or path
        A mapping of names to arrays, as `BatchNorm2d.load_state_dict` takes it, or the path of a ``.safetensors``,
        ``.npz``, ``.pt`` or ``.pth`` file. What is pickled in a file is never executed. If there is nothing of the
        layers in it, but a mapping under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``, then that is it.
    layers : mapping of prefixes to layers
        Such as ``{"layer1.0.bn1.": layer}``. An entry that starts with several prefixes belongs to the longest.
    strict : bool
        Whether keys of the layers that are missing, and others under their prefixes, are errors.
    names : "torch", "keras", "flax", "chainer" or "onnx"
        Whose names the keys have, as for `BatchNorm2d.load_state_dict`.

    Raises
    ------
    KeyError
        If keys are missing or unexpected, of whichever layers. One message names all that is wrong.
    ValueError
        If only shapes or numbers of batches are wrong; if the suffix of the file is unknown, or the file is damaged; if
        names are unknown, or a layer has two prefixes.
    TypeError
        If values are no arrays of real numbers; if the source is neither a mapping nor a path, or layers is not a
        mapping of prefixes to layers.
    ImportError
        If the package for this format, safetensors or PyTorch, is missing.
    OSError
        If the file is not there, or cannot be opened.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> checkpoint = {"conv.weight": np.ones((8, 3, 3, 3))}
    >>> checkpoint |= {f"bn1.{name}": np.full(8, 2.0) for name in ("weight", "bias", "running_mean", "running_var")}
    >>> layer = cupybn.BatchNorm2d(8, device="cpu")
    >>> cupybn.load_checkpoint(checkpoint, {"bn1.": layer})  # or cupybn.load_checkpoint("resnet50.safetensors", ...)
    >>> layer.running_var
    array([2., 2., 2., 2., 2., 2., 2., 2.], dtype=float32)
    """
    checks.check_bool("strict", strict)
    theirs = names_of(names).values()
    layers = _checked(layers, source)
    twice = {id(layer): prefix for prefix, layer in reversed(layers.items())}
    for prefix, layer in layers.items():
        if twice[id(layer)] != prefix:
            raise ValueError(f"expected a layer for each prefix (got the same for {twice[id(layer)]!r} and {prefix!r})")
    expected = {prefix + name: prefix for prefix in layers for name in theirs}
    with opened(source) as entries:
        levels = _levels(entries)
        state = next((level for level in levels if not expected.keys().isdisjoint(_texts(level))), None)
        if state is None:  # then errors speak of the level that is most like a state, of several the innermost
            state = max(reversed(levels), key=lambda level: _likeness(level, tuple(theirs)))
        keys = _owned(state.keys(), expected, layers)
        loadings = [layer._loading(state, keys[prefix], strict, prefix, names) for prefix, layer in layers.items()]
        error = _state.error_of(loading.faults for loading in loadings)
        if error is not None:
            raise error
    write([(layer, loading.values) for layer, loading in zip(layers.values(), loadings, strict=True)], None)


def save_checkpoint(path: str | os.PathLike[Any], layers: Mapping[str, Layer]) -> None:
    """Save the states of many layers in a file, which `load_checkpoint` and, but for ``.npz``, PyTorch read.

    The file has these layers alone: what else a model has is put beside them with the library that wrote it. There is
    never half a file under the name: it is written beside, and then renamed. Its permissions are those of any new file.
    Arrays on a GPU are copied to the host.

    Parameters
    ----------
    path : str or path
        Its suffix says what it becomes: a ``.safetensors``, ``.npz``, ``.pt`` or ``.pth`` file. In ``.npz``, which has
        no bfloat16, these numbers are float32.
    layers : mapping of prefixes to layers
        Such as ``{"layer1.0.bn1.": layer}``.

    Raises
    ------
    ValueError
        If the suffix is unknown, or a layer has no arrays yet.
    TypeError
        If the path is none, layers is not a mapping of prefixes to layers, or something else than an array of numbers
        has been put in the place of a layer's.
    ImportError
        If the package for this format, safetensors or PyTorch, is missing.
    OSError
        If the file cannot be written. What was there before is there still.

    Examples
    --------
    >>> import tempfile
    >>> import cupybn
    >>> layer, other = (cupybn.BatchNorm2d(4, device="cpu") for _ in range(2))
    >>> layer.bias += 1
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cupybn.save_checkpoint(f"{folder}/model.npz", {"bn1.": layer})
    ...     cupybn.load_checkpoint(f"{folder}/model.npz", {"bn1.": other})
    >>> other.bias
    array([1., 1., 1., 1.], dtype=float32)
    """
    if not isinstance(path, (str, os.PathLike)):
        way_out = ": use os.fsdecode(path)" if isinstance(path, bytes) else _swapped(path)
        raise TypeError(f"expected path to be a str or a path (got {kinds.show(path)}){way_out}")
    suffix = format_of(path)
    layers = _checked(layers)
    lazy = [prefix for prefix, layer in layers.items() if layer._shape is None and layer._members]
    if lazy:
        raise ValueError(f"expected layers with arrays (got none yet for {', '.join(map(repr, lazy))})")
    states = [layer.state_dict(prefix, device="cpu") for prefix, layer in layers.items()]
    arrays = {key: _native(key, array) for state in states for key, array in state.items()}
    write_file(path, suffix, arrays)


def _native(key: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Contiguous copy in the byte order of this machine, which all formats take. The key is for messages.

    Raises
    ------
    TypeError
        If its dtype is another one than integers and batch norm's: NumPy would pickle objects.
    """
    if array.dtype.kind not in "iub" and not is_float(array.dtype):
        raise TypeError(f"expected {key} to be an array of integers or {', '.join(FLOATS)} (got dtype {array.dtype})")
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _checked(layers: Any, source: Any = None) -> dict[str, Layer]:
    """The layers by their prefixes. The argument before them is for messages.

    Raises
    ------
    TypeError
        If they are something else.
    """
    if not _state.is_mapping(layers):
        way_out = ": use {prefix: layer}" if isinstance(layers, Layer) else _swapped(source)
        raise TypeError(f"expected layers to be a mapping of prefixes to layers (got {kinds.show(layers)}){way_out}")
    checked = {prefix: layers[prefix] for prefix in layers.keys()}  # noqa: SIM118 - it may only act like a mapping
    for prefix, layer in checked.items():
        checks.check_str("prefix", prefix)
        if not isinstance(layer, Layer):
            given = kinds.describe(layer)
            raise TypeError(f"expected layers[{prefix!r}] to be a layer of cupybn (got {given}){_swapped(source)}")
    return checked


def _swapped(first: Any) -> str:
    """Hint at layers in the place of the first argument. The end of a message."""
    with contextlib.suppress(Exception):  # it may be anything
        if isinstance(first[next(iter(first.keys()))], Layer):
            return ": layers are the second argument"
    return ""


def _levels(entries: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """A checkpoint, and the mappings that it has under the names of ``NESTED``, one in another."""
    levels = [entries]
    for level in itertools.islice(levels, MOST_LEVELS):  # which grows
        texts = _texts(level) if not isinstance(level, Entries) or level.nested else ()
        for key in _state.NESTED:
            with contextlib.suppress(Exception):  # a value that cannot be read is no mapping
                inner: Any = level[key] if key in texts else None
                if _state.is_mapping(inner) and all(inner is not each for each in levels):
                    levels.append(inner)
    return levels


def _texts(entries: Mapping[Any, Any]) -> list[str]:
    """Keys that are texts."""
    return [key for key in entries.keys() if isinstance(key, str)]  # noqa: SIM118 - it may only act like a mapping


def _likeness(entries: Mapping[Any, Any], names: tuple[str, ...]) -> tuple[int, int]:
    """Numbers of keys that end with one of these names, and of all keys: how much a mapping is like a state."""
    ends = [key.endswith(names) for key in _texts(entries)]
    return sum(ends), len(ends)


def _owned(keys: Iterable[Any], expected: Mapping[str, str], layers: Iterable[str]) -> dict[str, list[Any]]:
    """Keys that belong to each layer, by its prefix: to the layer that expects them, else to the longest prefix."""
    owned: dict[str, list[Any]] = {prefix: [] for prefix in layers}
    longest_first = sorted({len(prefix) for prefix in owned}, reverse=True)
    for key in keys:
        if not isinstance(key, str):  # which only an empty prefix has under it, as in `load_state_dict`
            owner = "" if "" in owned else None
        else:
            begins = (key[:n] for n in longest_first if key[:n] in owned)
            owner = expected[key] if key in expected else next(begins, None)
        if owner is not None:
            owned[owner].append(key)
    return owned
