"""Batch norm for PyTorch: the same function and layers on tensors, with autograd, and without copies."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "cupybn.torch needs PyTorch: `pip install '.[torch]'`, in a clone of cupybn, installs it"
    ) from error

from cupybn.torch.conversion import convert
from cupybn.torch.function import batch_norm
from cupybn.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert"]
