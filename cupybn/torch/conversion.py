"""Conversion of a model: its layers of batch norm become those of this library."""

from __future__ import annotations

from typing import Any

import torch

from cupybn.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

Module = Any  # torch.nn.Module

LAYERS = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
"""This library's layers by PyTorch's."""


def convert(model: Module) -> Module:
    """Make this library's layers of all ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in a model, in place.

    Each layer stays the same object, and only its class changes: parameters, buffers, mode, hooks and all else that it
    has are as they were, wherever it is used. Layers of other classes are left alone, also those that are derived from
    these, as ``torch.nn.SyncBatchNorm``, lazy and parametrized ones. A second time changes nothing.

    Parameters
    ----------
    model : torch.nn.Module
        A layer of batch norm itself, too.

    Returns
    -------
    torch.nn.Module
        The model.

    Examples
    --------
    >>> import torch
    >>> from cupybn.torch import convert
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> type(convert(model)[1])
    <class 'cupybn.torch.layers.BatchNorm2d'>
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module (got {type(model).__qualname__})")
    for module in model.modules():
        if type(module) in LAYERS:
            module.__class__ = LAYERS[type(module)]
    return model
