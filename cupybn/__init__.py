"""Batch, instance, group, layer and RMS norm and dropout for CuPy and NumPy arrays: PyTorch's layers and functions."""

from cupybn import functional
from cupybn._calls.tracking import no_stats_update
from cupybn.dropout.generator import Generator, manual_seed
from cupybn.functional import (
    BatchNormGrads,
    DropoutGrads,
    GroupNormGrads,
    InstanceNormGrads,
    LayerNormGrads,
    RMSNormGrads,
)
from cupybn.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from cupybn.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from cupybn.layers.groupnorm import GroupNorm
from cupybn.layers.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from cupybn.layers.layernorm import LayerNorm, RMSNorm
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
    "GroupNorm",
    "GroupNormGrads",
    "IncompatibleKeys",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "InstanceNormGrads",
    "LayerNorm",
    "LayerNormGrads",
    "RMSNorm",
    "RMSNormGrads",
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
