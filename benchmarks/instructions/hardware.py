"""What Nsight Compute must count on a GPU, predicted by executing every block of the launches that it looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import cupy
from contact.stages import ncu, ncu_work
from tqdm import tqdm

from instructions.launches import Blocks, Launch, counted


def predict(architecture: int, shapes: Iterable[tuple[tuple[int, ...], int]] = ncu_work.SHAPES) -> list[Launch]:
    """The launches of ``contact/stages/ncu_work.py`` in order: forward passes, then a backward pass."""
    forward: list[Launch] = []
    backward: list[Launch] = []
    for shape, axis in tqdm(list(shapes), unit="shape"):
        values = ncu_work.values(shape).get()
        with counted(architecture, whole_grid, 5 * values.nbytes + (64 << 20)) as counter:
            x = cupy.asarray(values)
            vjp_fn = ncu_work.forward_pass(x, axis)
            first, done = not forward, len(counter.launches)
            if first:
                vjp_fn(x)
        forward += counter.launches[:done]
        backward += counter.launches[done:]
    return forward + backward


def whole_grid(launch: Launch, compiled: object) -> Blocks:  # noqa: ARG001
    """All blocks of a launch, in order of their clusters, which lie along x."""
    x, y, z = map(range, launch.grid)
    return [(i, j, k) for k in z for j in y for i in x]


def table(architecture: int, measured: Path | None = None) -> str:
    """The table of predicted counts, beside those that Nsight Compute has written into ``ncu.csv``."""
    found = ncu.launches(measured.read_text()) if measured else []
    rows = [("kernel", "grid", "threads", "predicted", "measured", "ratio")]
    for n, launch in enumerate(predict(architecture)):
        assert launch.blocks == math.prod(launch.grid)
        predicted, actual = int(launch.issued.sum()), math.nan
        if n < len(found) and found[n].row()["kernel"] == launch.kernel.rpartition("/")[2]:
            actual = found[n].number(ncu.INSTRUCTIONS)
        numbers = f"{predicted}", f"{actual:.0f}", f"{actual / predicted:.4f}"
        rows.append((launch.kernel, " x ".join(map(str, launch.grid)), str(launch.threads), *numbers))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---:|---:|---:|---:|", *lines[1:]])
