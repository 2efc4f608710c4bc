"""The shapes, dtypes and memory orders that `gpu.py` measures, the most telling ones first."""

from __future__ import annotations

from dataclasses import dataclass

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.problem import OPERATIONS, Problem

RESNET50 = [  # the number of channels C, and H = W, of its twelve shapes
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
UNET = [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 128, 32, 32, 32), (2, 256, 16, 16, 16)]
SEQUENCES = [(16, 128, 16000), (64, 512, 512), (32, 256, 1024)]
TABLES = [(128, 512), (1024, 4096), (4096, 1024), (65536, 256), (16384, 4096)]
ALL = ("float32", "float16", "bfloat16")
BARE = ("training", "inference", "backward")
DEAD = "half of the channels dead"


@dataclass(frozen=True)
class Case:
    """A problem to measure, and the operations to measure on it."""

    group: str
    layout: str  # "NCHW", "NHWC", "NC", "NCL" or "NCDHW"
    problem: Problem
    operations: tuple[str, ...]
    all_peers: bool
    """Whether also those peers are measured that nobody would choose for speed."""
    dead: bool = False
    """Whether every other channel of x is zero, as behind a ReLU whose outputs are all 0."""


def cases(full: bool, dry_run: bool) -> list[Case]:
    """All cases, in the order in which they are measured."""
    if dry_run:
        return _tiny()
    images = [
        *_images(32, ALL, tuple(OPERATIONS), all_peers=True),
        *_images(64, ALL if full else ("float16",), tuple(OPERATIONS) if full else BARE, all_peers=full),
        *_images(256, ALL if full else ("float16", "bfloat16"), tuple(OPERATIONS) if full else BARE, all_peers=full),
    ]
    if not full:
        images = [case for case in images if case.layout == "NCHW" or case.group.endswith("32")]
    others = [
        Case(group, layout, Problem(shape, parameter_dtype(dtype)), BARE, all_peers=False)
        for group, layout, shapes, dtypes in (
            ("(N, C)", "NC", TABLES, ("float32", "bfloat16")),
            ("3-D U-Net", "NCDHW", UNET, ("float32", "float16")),
            ("(N, C, L)", "NCL", SEQUENCES, ("float32", "float16")),
        )
        for dtype in (ALL if full else dtypes)
        for shape in shapes
    ]
    batch_32 = [case for case in images if case.group.endswith(" 32")]
    return [*batch_32, *odd(), *others, *(case for case in images if case not in batch_32)]


def odd() -> list[Case]:
    """Cases unlike ResNet-50's: channels that are no multiple of 8, rows that are no whole packs, dead channels."""
    large = _image(32, 256, 56, "NCHW", "float16")
    return [
        Case("35 channels", "NHWC", _image(32, 35, 28, "NHWC", "float16"), BARE, all_peers=False),
        Case("planes of 35x35", "NCHW", _image(32, 192, 35, "NCHW", "float16"), BARE, all_peers=False),
        Case(DEAD, "NCHW", large, ("training", "backward"), all_peers=False, dead=True),
    ]


def _images(batch: int, dtypes: tuple[str, ...], operations: tuple[str, ...], all_peers: bool) -> list[Case]:
    return [
        Case(f"ResNet-50, batch {batch}", layout, problem, operations, all_peers)
        for dtype in dtypes
        for layout in ("NCHW", "NHWC")
        for channels, size in RESNET50
        for problem in [_image(batch, channels, size, layout, dtype)]
    ]


def _image(batch: int, channels: int, size: int, layout: str, dtype: str) -> Problem:
    shape = (batch, channels, size, size) if layout == "NCHW" else (batch, size, size, channels)
    return Problem(shape, parameter_dtype(dtype), layout.index("C"))


def _tiny() -> list[Case]:
    small = _image(2, 3, 4, "NHWC", "float16")
    return [
        Case("tiny", "NCHW", _image(2, 3, 4, "NCHW", "float32"), tuple(OPERATIONS), all_peers=True),
        Case("tiny", "NCHW", _image(2, 2, 4, "NCHW", "bfloat16"), BARE, all_peers=True),
        Case("tiny", "NHWC", small, BARE, all_peers=False),
        Case("tiny", "NC", Problem((6, 5), parameter_dtype("float32")), BARE, all_peers=False),
        Case(DEAD, "NHWC", small, ("training",), all_peers=False, dead=True),
    ]
