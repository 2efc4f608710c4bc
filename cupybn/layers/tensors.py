"""Tensors of PyTorch as NumPy arrays. PyTorch is not imported for this: whoever has a tensor has done so."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cupybn._arrays.dtypes import bfloat16_of


def is_tensor(value: object) -> bool:
    """Whether this is a tensor of PyTorch, such as a parameter."""
    return any(base.__name__ == "Tensor" and base.__module__ == "torch" for base in type(value).__mro__)


def of_tensor(tensor: Any) -> Any:
    """NumPy array with the values of a tensor, over its memory if that is the host's. Autograd does not matter."""
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy knows no such dtype
        return bfloat16_of(tensor.detach().view(sys.modules["torch"].int16).numpy(force=True).view(np.uint16))
    return tensor.numpy(force=True)
