"""Batch normalization for CuPy and NumPy arrays: PyTorch's BatchNorm1d, 2d and 3d, and their functional form."""

from cupybn import functional
from cupybn._calls.tracking import no_stats_update
from cupybn.dropout.generator import Generator, manual_seed
from cupybn.functional import BatchNormGrads, DropoutGrads
from cupybn.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from cupybn.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from cupybn.layers.state import IncompatibleKeys
from cupybn.layers.syncbatchnorm import SyncBatchNorm
from cupybn.models.checkpoints import find_batch_norms, load_checkpoint, save_checkpoint
from cupybn.models.folding import fold_conv_bn, fold_linear_bn
from cupybn.models.recalibration import update_bn
from cupybn.statistics.streaming import StreamingMoments

__version__ = "0.1.0"
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGrads",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutGrads",
    "Generator",
    "IncompatibleKeys",
    "StreamingMoments",
    "SyncBatchNorm",
    "find_batch_norms",
    "fold_conv_bn",
    "fold_linear_bn",
    "functional",
    "load_checkpoint",
    "manual_seed",
    "no_stats_update",
    "save_checkpoint",
    "update_bn",
]
