"""Checkpoint files as mappings that read an entry when it is asked for. Nothing that is pickled is ever executed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tarfile
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import IO, Any

import numpy as np

from cupybn._arrays.dtypes import bfloat16_of
from cupybn._arrays.kinds import plain
from cupybn.layers.state import UnreadableError, check_mapping, read
from cupybn.models.formats import format_of

Shape = tuple[int, ...]


@contextlib.contextmanager
def opened(source: Any) -> Iterator[Mapping[Any, Any]]:
    """A context with the entries of a checkpoint: of a file, which is closed at its end, or the mapping itself.

    Raises
    ------
    TypeError
        If this is neither a path nor a mapping.
    ValueError
        If the suffix is unknown; or the file is damaged, at whichever moment that is found. The message has the words
        of the library that reads it.
    ImportError
        If that library is missing.
    """
    if not isinstance(source, (str, os.PathLike)):
        check_mapping(source, "source", "or the path of a file")
        yield source
        return
    suffix = format_of(source)
    try:
        with open(source, "rb") as file:  # noqa: PTH123 - this raises what Python raises for any path
            with _damage():
                entries = _READERS[suffix](os.fsdecode(source), file)
            yield entries
    except UnreadableError as error:
        raise ValueError(f"{os.fsdecode(source)} cannot be read as a {suffix} file: {error}") from error.__cause__


def shape_of(entries: Mapping[Any, Any], key: Any) -> Shape | None:
    """Shape of an entry, which of a file is not read for that; None if it has none.

    Raises
    ------
    TypeError
        If it cannot be read.
    """
    if isinstance(entries, Entries):
        return entries.shape(key)
    return _shape(read(entries, key))


def _shape(value: Any) -> Shape | None:
    """Shape of a value; None if it has none."""
    with contextlib.suppress(Exception):  # objects raise errors of any class
        return tuple(np.shape(plain(value)))
    return None


class Entries(Mapping[str, Any]):
    """Entries of a file by their names, each of which is read when it is asked for."""

    _places: Mapping[str, Any]
    """Places of the entries in the file, by their names."""
    nested = False
    """Whether an entry may be a mapping itself."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @abstractmethod
    def shape(self, key: str) -> Shape | None:
        """Shape of an entry, without its elements; None if it has none."""


class _Npz(Entries):
    """Arrays of a file that `numpy.savez` has written. Its entries are files of one array each, in a ZIP archive."""

    def __init__(self, _: str, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        names = (name for name in self._zip.namelist() if name.endswith(".npy"))
        self._places = {name.removesuffix(".npy"): name for name in names}

    def __getitem__(self, key: str) -> Any:
        name = self._places[key]
        with _damage(), self._zip.open(name) as member:
            shape, dtype = _npy_header(member)
            rest = self._zip.getinfo(name).file_size - member.tell()
            if math.prod(shape) * dtype.itemsize > rest and not dtype.hasobject:  # or NumPy asks for all that memory
                raise ValueError(f"{rest} bytes are too few for shape {shape} and dtype {dtype}")
        if dtype.hasobject:
            raise ValueError("an array of objects, which are pickled: none is loaded, as with allow_pickle=False")
        with _damage(), self._zip.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def shape(self, key: str) -> Shape:
        with _damage(), self._zip.open(self._places[key]) as member:
            return _npy_header(member)[0]


def _npy_header(member: IO[bytes]) -> tuple[Shape, np.dtype[Any]]:
    """Shape and dtype of the array that a file of NumPy holds."""
    old = np.lib.format.read_magic(member) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


class _Safetensors(Entries):
    """Arrays of a file of safetensors: a header of JSON, and the elements behind it.

    The library checks the file. It is read here since not all versions of it have bfloat16 for NumPy.
    """

    def __init__(self, path: str, file: IO[bytes]) -> None:
        with import_module("safetensors").safe_open(path, framework="numpy"):
            pass
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        self._places = {key: place for key, place in header.items() if key != "__metadata__"}
        self._file, self._start = file, 8 + size

    def __getitem__(self, key: str) -> Any:
        place = self._places[key]
        dtype = _SAFETENSORS.get(place["dtype"])
        if dtype is None:
            raise TypeError(f"dtype {place['dtype']}")
        with _damage():
            begin, end = place["data_offsets"]
            self._file.seek(self._start + begin)
            array = np.frombuffer(self._file.read(end - begin), dtype).reshape(place["shape"])
        return bfloat16_of(array) if place["dtype"] == "BF16" else array

    def shape(self, key: str) -> Shape:
        return tuple(self._places[key]["shape"])


_SAFETENSORS = {"BOOL": "?", "BF16": "<u2"} | {
    f"{letter}{8 * size}": f"<{kind}{size}"
    for letter, kind, sizes in (("F", "f", (2, 4, 8)), ("I", "i", (1, 2, 4, 8)), ("U", "u", (1, 2, 4, 8)))
    for size in sizes
}
"""Dtypes of NumPy by their names in files of safetensors."""


class _Tensors(Entries):
    """Whatever ``torch.save`` has written, tensors on the host. They are read from the file as they are used."""

    nested = True

    def __init__(self, path: str, file: IO[bytes]) -> None:
        begins = file.read(512)
        file.seek(0)
        if any(begins) and tarfile.is_tarfile(file):  # which takes zeros for an empty one
            # Some versions of PyTorch extract and execute what such a file says, whatever they are told.
            raise UnreadableError("it is a .tar file, as PyTorch wrote them before version 0.1.10")
        file.seek(0)
        mapped = _may_be_mapped(path, file)
        loaded = import_module("torch").load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(loaded, Mapping):
            raise UnreadableError(f"it holds no mapping of names to tensors (got {type(loaded).__qualname__})")
        self._places = loaded

    def __getitem__(self, key: str) -> Any:
        return self._places[key]

    def shape(self, key: str) -> Shape | None:
        return _shape(self._places[key])


def _may_be_mapped(path: str, file: IO[bytes]) -> bool:
    """Whether PyTorch reads a file right if it maps it into memory.

    Older files cannot be mapped, nor names that are no Unicode. Of an archive that another program has compressed the
    compressed bytes would be taken for the elements.
    """
    if file.read(4) != b"PK\3\4":
        return False
    try:
        path.encode()
        with zipfile.ZipFile(file) as archive:
            return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except Exception:  # Python's own of many classes: PyTorch is to say what is wrong
        return False


_READERS: dict[str, Callable[[str, IO[bytes]], Entries]] = {
    ".safetensors": _Safetensors,
    ".npz": _Npz,
    ".pt": _Tensors,
    ".pth": _Tensors,
}


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """A context in which an error, but for a lack of memory, says that the file is damaged, and a warning nothing.

    What libraries warn of is how they read, such as PyTorch of sparse tensors: a file is none the worse for it, also
    where a program has turned warnings into errors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:  # libraries raise errors of many classes, Python's for ZIP archives among them
        raise UnreadableError(f"{type(error).__qualname__}: {_words(str(error))}") from error


def _words(message: str) -> str:
    """What a library says of a file, but for its advice how to execute what is pickled: nobody should for a state."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    words = [line for line in lines if "weights_only" not in line and "\x1b" not in line]
    words = words or [line.partition(". ")[0] for line in lines[:1]]
    sentences = [sentence for line in words for sentence in re.split(r"(?<=\.)\s+", line)]
    text = " ".join(s for s in sentences if "Please use `torch" not in s and "allow_pickle" not in s)
    if "Unsupported global" in text:  # PyTorch's words for an object of another class than its tensors
        text = f"{text.rstrip('.')}: objects of such classes are not loaded, save model.state_dict() alone"
    return text
