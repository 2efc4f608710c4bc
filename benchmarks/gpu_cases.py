"""The shapes, dtypes and memory orders that `gpu.py` measures, the most telling ones first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.problem import OPERATIONS, Operation, Problem, operation_of, problem_of

RESNET50 = [  # the number of channels C, and H = W, of its twelve shapes
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
UNET = [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 128, 32, 32, 32), (2, 256, 16, 16, 16)]
SEQUENCES = [(16, 128, 16000), (64, 512, 512), (32, 256, 1024)]
TABLES = [(128, 512), (1024, 4096), (4096, 1024), (65536, 256), (16384, 4096)]
ALL = ("float32", "float16", "bfloat16")
BARE = ("training", "inference", "backward")
BOTH = ("forward", "backward")
"""Operations of the family that are measured."""
DEAD = "half of the channels dead"


@dataclass(frozen=True)
class Case:
    """A problem to measure, and the operations to measure on it."""

    group: str
    layout: str  # "NCHW", "NHWC", "NC", "NCL", "NCDHW" or "NDHWC"
    problem: Problem
    operations: tuple[str, ...]
    all_peers: bool
    """Whether also those peers are measured that nobody would choose for speed."""
    dead: bool = False
    """Whether every other channel of x is zero, as behind a ReLU whose outputs are all 0."""
    op: str = "batch_norm"
    """The function that is measured, one of `OPS`."""

    @property
    def of_op(self) -> list[Operation]:
        """The operations, each with its function."""
        return [operation_of(self.op, name) for name in self.operations]


class Member(NamedTuple):
    """A case of batch norm's family, in the few words that tell it from the others."""

    op: str
    layout: str
    shape: tuple[int, ...]  # sizes in the order of memory
    dtype: str
    groups: int = 0

    @property
    def name(self) -> str:
        """The member's name in tables."""
        return f"{self.op} {self.layout} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the operations that are measured."""
        return BOTH

    @property
    def case(self) -> Case:
        """The member as a case."""
        axis = self.layout.index("C")
        problem = problem_of(self.op, self.shape, parameter_dtype(self.dtype), axis, self.groups)
        return Case("family", self.layout, problem, self.operations, all_peers=False, op=self.op)


FAMILY = (
    Member("layer_norm", "NC", (16384, 4096), "bfloat16"),
    Member("rms_norm", "NC", (16384, 4096), "bfloat16"),
    Member("group_norm", "NCHW", (2, 320, 64, 64), "float16", 32),
    Member("group_norm", "NHWC", (2, 64, 64, 320), "float16", 32),
    Member("dropout", "NC", (8192, 8192), "float16"),
    Member("instance_norm", "NCHW", (8, 64, 128, 128), "float16"),
    Member("layer_norm", "NC", (8192, 8192), "bfloat16"),
    Member("rms_norm", "NC", (8192, 8192), "bfloat16"),
    Member("layer_norm", "NC", (131072, 128), "bfloat16"),
    Member("rms_norm", "NC", (131072, 128), "bfloat16"),
    Member("layer_norm", "NC", (8192, 128), "bfloat16"),
    Member("rms_norm", "NC", (8192, 128), "bfloat16"),
    Member("group_norm", "NCHW", (32, 256, 56, 56), "float16", 32),
    Member("group_norm", "NHWC", (32, 56, 56, 256), "float16", 32),
    Member("instance_norm", "NCDHW", (2, 32, 96, 96, 96), "float16"),
    Member("instance_norm", "NDHWC", (2, 96, 96, 96, 32), "float16"),
    Member("layer_norm", "NC", (4096, 16384), "bfloat16"),
    Member("rms_norm", "NC", (4096, 16384), "bfloat16"),
    Member("layer_norm", "NC", (4096, 1024), "float32"),
    Member("dropout", "NC", (8192, 8192), "float32"),
)
"""The cases of the family, the most telling ones first."""
TINY_FAMILY = (
    Member("layer_norm", "NC", (6, 40), "bfloat16"),
    Member("rms_norm", "NC", (6, 40), "float32"),
    Member("group_norm", "NCHW", (2, 4, 3, 3), "float16", 2),
    Member("group_norm", "NHWC", (2, 3, 3, 8), "float16", 2),
    Member("instance_norm", "NCHW", (2, 3, 4, 4), "float32"),
    Member("instance_norm", "NDHWC", (2, 3, 2, 3, 4), "float16"),
    Member("dropout", "NC", (64, 64), "float32"),
)
"""The cases of a dry run."""


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
    family = [member.case for member in FAMILY]
    return [*batch_32, *odd(), *family, *others, *(case for case in images if case not in batch_32)]


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
        *(member.case for member in TINY_FAMILY),
    ]
