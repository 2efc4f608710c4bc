"""Checkpoint files of each format, written without the library, and what tests compare of layers."""

from __future__ import annotations

import numpy as np
import pytest

from cupybn import BatchNorm2d, SyncBatchNorm
from tests.reference import bits

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PACKAGES = {".safetensors": "safetensors", ".npz": "numpy", ".pt": "torch", ".pth": "torch"}


def need(suffix):
    """Skip the test if the package that writes files of this suffix is missing."""
    return pytest.importorskip(PACKAGES[suffix.lower()])


def write(path, state):
    """Write NumPy arrays into a file, as users of the package of its format do. Returns the path."""
    need(path.suffix)
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        try:
            save_file(state, path)
        except SafetensorError as error:  # older versions have fewer dtypes
            pytest.skip(str(error))
    else:
        torch = pytest.importorskip("torch")
        torch.save({key: torch.from_numpy(np.array(array)) for key, array in state.items()}, path)
    return path


def a_state(rng, prefixes, features=3, **changes):
    """A state dict of several layers, with some entries replaced or, by None, left out."""
    state = {}
    for prefix in prefixes:
        state |= {prefix + name: rng.uniform(0.5, 2, features).astype(np.float32) for name in NAMES[:4]}
        state[f"{prefix}num_batches_tracked"] = np.array(7, np.int64)
    return {key: value for key, value in (state | changes).items() if value is not None}


def several(device):
    """Layers of several classes and dtypes by their prefixes, with all arrays, with few, and without any yet."""
    return {
        "bn1.": BatchNorm2d(3, device=device),
        "block.0.bn1.": BatchNorm2d(None, device=device),
        "block.0.bn2.": SyncBatchNorm(3, device=device, dtype=np.float64),
        "block.1.": BatchNorm2d(None, affine=False, device=device, dtype=np.float16),
        "": BatchNorm2d(3, bias=False, device="cpu"),
    }


def keys_of(layers):
    """All keys of layers, once they have arrays."""
    return [prefix + name for prefix, layer in layers.items() for name in NAMES if name in layer._members]


def snapshot(layers):
    """All that layers hold: the arrays themselves, and their bits."""
    arrays = [getattr(layer, name) for layer in layers.values() for name in NAMES]
    return [layer.num_features for layer in layers.values()], arrays, bits(*arrays)


def assert_unchanged(layers, before):
    features, arrays, held = snapshot(layers)
    assert features == before[0]
    assert all(now is then for now, then in zip(arrays, before[1], strict=True))
    assert held == before[2]
