"""The stages in their order, and how long each may take."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Stage(NamedTuple):
    """A step of the first contact: the name of its module in ``stages``, its time limit and its purpose."""

    name: str
    seconds: float
    """Seconds that the stage may take at most."""
    purpose: str


ALONE = (
    Stage("environment", 30, "versions, attributes of the device, and the mechanisms that all kernels rest on"),
    Stage("precompile", 45, "kernels into CuPy's cache, on all processors, as later stages need them; local memory"),
    Stage("smoke", 40, "every size of cluster, team and pack, both layouts, forward and backward, against float64"),
    Stage("bench", 95, "copies, then 16 shapes against PyTorch and cuDNN, caches cold, through the scripts gpu_*.py"),
    Stage("family", 60, "20 cases of the norms within a sample and of dropout, as those of bench"),
    Stage(
        "bridge", 90, "ResNet-50 in PyTorch, converted and not; cupybn.torch on CUDA tensors; gradients of second order"
    ),
    Stage("ncu", 45, "Nsight Compute over four calls: time, memory, issue slots, reasons to stall"),
)
"""Stages that need the GPU for themselves, or prepare it: they run one after the other."""
TOGETHER = (
    Stage("check", 120, "python -m cupybn check: every kernel against its mirror, a process for each dtype"),
    Stage("suite", 190, "the tests, but for those that need no GPU"),
    Stage("graph", 50, "training steps in CUDA graphs, to the bit; threads with a stream each"),
    Stage("sanitizer", 110, "Compute Sanitizer: memcheck, racecheck, synccheck and initcheck"),
    Stage("large", 60, "more than 2^31 elements in both layouts, against plain CuPy in float64"),
    Stage("nccl", 40, "one rank over NCCL: collectives, in a graph, watched, aborted, by cupyx.distributed"),
    Stage("mpi", 70, "two ranks on one GPU over MPI"),
)
"""Stages whose speed tells nothing: they run all at once."""
NAMES = tuple(stage.name for stage in (*ALONE, *TOGETHER))


def chosen(stages: tuple[Stage, ...], only: Collection[str], skip: Collection[str]) -> list[Stage]:
    """The stages among these that are wanted: where `only` is empty, all but those to skip."""
    return [stage for stage in stages if stage.name not in skip and (not only or stage.name in only)]


def described() -> str:
    """The list of all stages for ``--help``, a line for each."""
    lines = [f"  {stage.name:12}{stage.seconds:4.0f} s  {stage.purpose}" for stage in (*ALONE, *TOGETHER)]
    lines.insert(len(ALONE), "and then at the same time:")
    return "\n".join(["stages, with the most that each may take:", *lines])
