"""What a GPU must find: the launches that Nsight Compute looks at in first contact, every block of them executed here."""

from __future__ import annotations

import math

import cupy
from tqdm import tqdm

from contact.stages import ncu_work
from instructions.launches import Blocks, Launch, counted


def predict(architecture: int, shapes: tuple[tuple[tuple[int, ...], int], ...] = ncu_work.SHAPES) -> list[Launch]:
    """The launches of the calls that ``contact/stages/ncu_work.py`` makes: forward passes, and backward of the first."""
    result: list[Launch] = []
    for n, (shape, axis) in enumerate(tqdm(shapes, unit="shape")):
        values = ncu_work.values(shape).get()
        with counted(architecture, whole_grid, 5 * values.nbytes + (64 << 20)) as counter:
            x = cupy.asarray(values)
            vjp_fn = ncu_work.forward_pass(x, axis)
            if n == 0:
                vjp_fn(x)
        result += counter.launches
    return result


def whole_grid(launch: Launch, compiled: object) -> Blocks:  # noqa: ARG001
    """All blocks; clusters lie along x."""
    x, y, z = map(range, launch.grid)
    return [(i, j, k) for k in z for j in y for i in x]


def table(architecture: int) -> str:
    """The prediction for people."""
    lines = ["| kernel | grid | threads | smsp__inst_executed.sum |", "|---|---|---:|---:|"]
    for launch in predict(architecture):
        assert launch.blocks == math.prod(launch.grid)
        lines.append(f"| {launch.kernel} | {launch.grid} | {launch.threads} | {launch.issued.sum()} |")
    return "\n".join(lines)
