"""Checkpoint files, written beside their place and then renamed: nobody ever finds half a file under the name."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


def write_file(path: str | os.PathLike[Any], suffix: str, arrays: Arrays) -> None:
    """Write arrays into a file of a format, in the place of the file that is there, or that a link there points to.

    An error or Ctrl-C leaves that one as it was, and nothing beside it.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    beside = target.with_name(f".cupybn-{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:  # with the permissions of any new file
            _WRITERS[suffix](file, arrays)
        beside.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(beside):  # a name that the user does not know
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
        raise


def _npz(file: IO[bytes], arrays: Arrays) -> None:
    """Write a file of NumPy, which has no bfloat16: float32 holds all its numbers."""
    cut = [key for key in arrays if "\0" in key]
    if cut:
        raise ValueError(f"expected keys without '\\0', at which .npz files end names (got {cut[0]!r})")
    wide: dict[str, Any] = {key: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for key, a in arrays.items()}
    np.savez(file, **wide)


def _safetensors(file: IO[bytes], arrays: Arrays) -> None:
    """Write a file of safetensors. Its format is called "pt", since the names are PyTorch's."""
    file.write(import_module("safetensors.numpy").save(dict(arrays), metadata={"format": "pt"}))


def _tensors(file: IO[bytes], arrays: Arrays) -> None:
    """Write a file of PyTorch: a dict of tensors.

    It is made in memory, since PyTorch hides why it could not write: a full disk, or Ctrl-C.
    """
    torch, made = import_module("torch"), io.BytesIO()

    def tensor(array: npt.NDArray[Any]) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({key: tensor(array) for key, array in arrays.items()}, made)
    file.write(made.getbuffer())


_WRITERS: dict[str, Callable[[IO[bytes], Arrays], None]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".pt": _tensors,
    ".pth": _tensors,
}
