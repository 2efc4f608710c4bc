"""Batch normalization for CuPy and NumPy arrays: PyTorch's BatchNorm1d, 2d and 3d, and their functional form."""

from cupybn import functional
from cupybn._calls.tracking import no_stats_update
from cupybn.functional import BatchNormGrads
from cupybn.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from cupybn.layers.state import IncompatibleKeys
from cupybn.layers.syncbatchnorm import SyncBatchNorm
from cupybn.models.folding import fold_conv_bn, fold_linear_bn
from cupybn.models.recalibration import update_bn

__version__ = "0.1.0"
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGrads",
    "IncompatibleKeys",
    "SyncBatchNorm",
    "fold_conv_bn",
    "fold_linear_bn",
    "functional",
    "no_stats_update",
    "update_bn",
]
