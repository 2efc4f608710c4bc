"""Formats of checkpoint files, by their suffix, and the packages that they need.

These are imported by their names, when a file is read or written: who checks types need not have them.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import PurePath
from typing import Any

PACKAGES = {".safetensors": "safetensors", ".npz": None, ".pt": "torch", ".pth": "torch"}
"""Package that reads and writes files of a suffix; None where NumPy does."""
_INSTALL = {
    "safetensors": "`pip install '.[safetensors]'`, in a clone of cupybn, installs it",
    "torch": "install PyTorch, or use a .safetensors or .npz file",
}
"""Advice for error messages where a package is missing."""


def format_of(path: str | os.PathLike[Any]) -> str:
    """Suffix of a path, in small letters, once its package is imported.

    Raises
    ------
    ValueError
        If this is none of ``PACKAGES``. The message lists them.
    ImportError
        If the package is missing. The message says how to install it.
    """
    suffix = PurePath(os.fsdecode(path)).suffix.lower()
    if suffix not in PACKAGES:
        given = f"{os.fsdecode(path)!r}, with the suffix {suffix!r}" if suffix else repr(os.fsdecode(path))
        raise ValueError(f"expected the path of a {', '.join(PACKAGES)} file (got {given})")
    package = PACKAGES[suffix]
    if package is not None:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"{suffix} files need {package}: {_INSTALL[package]}") from error
    return suffix
