"""Tries shapes that use every size of cluster, team and pack, in both layouts, forward and backward."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from contact import insides
from contact.task import Task

MOST_ELEMENTS, FEW_ELEMENTS = 1 << 22, 1 << 12
"""Most elements of a shape, and of one in a rehearsal."""
CHANNELS = (2, 8, 16, 35, 48, 64, 130, 256, 300)
SAMPLES_AND_POSITIONS = (
    *((2, 33), (8, 49), (16, 196), (32, 196), (32, 784), (32, 1003), (64, 784), (32, 3136), (64, 3136)),
    *((64, 3137), (64, 3138), (64, 3140)),
    *((64, 1), (1568, 1), (6272, 1), (25088, 1), (50000, 1)),
)
NEAR = 0.01
"""Arguments of ReLU that are nearer to 0 may be rounded to the other side: no gradient is sent back to them."""
MOMENTUM = 0.1
LEAST_LEFT = 7.0
"""Seconds that must be left for another case to begin."""


class Case(NamedTuple):
    """One set of arguments of batch norm."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channel_axis: int = 1
    activation: str | None = None
    label: str = "odd shape"

    @property
    def name(self) -> str:
        """The case's name in the report."""
        return f"{self.label}: {self.shape}, axis {self.channel_axis}, {self.dtype.name}, {self.activation or 'bare'}"


def run(task: Task) -> None:
    """Try the cases one by one, as far as there is time."""
    cases = all_cases(task.rehearse)
    for number, case in enumerate(cases):
        if task.left() < LEAST_LEFT:
            task.log.skip(f"{len(cases) - number} of {len(cases)} cases, left out for lack of time")
            return
        with task.log.checking(case.name):
            try_case(case)


def all_cases(rehearse: bool) -> list[Case]:
    """All cases: the odd ones, which are small, then those of all plans by their size."""
    return [*odd_cases(rehearse), *cases_of_all_plans(FEW_ELEMENTS if rehearse else MOST_ELEMENTS)]


def cases_of_all_plans(most_elements: int) -> list[Case]:
    """The smallest shape for each plan that the library can choose on this device; every second case with ReLU."""
    shapes = [(N, C, L) for (N, L), C in product(SAMPLES_AND_POSITIONS, CHANNELS)]
    shapes = sorted((shape for shape in shapes if math.prod(shape) <= most_elements), key=math.prod)
    seen: set[tuple[Any, ...]] = set()
    cases: list[Case] = []
    for shape, dtype in product(shapes, insides.dtypes()):
        N, C, L = shape
        ways = {(L == 1, dtype, step, insides.how_on_chip(step, shape, dtype)) for step in insides.ON_CHIP}
        if not ways <= seen:
            seen |= ways
            label = ", ".join(f"{step} {how}" for *_, step, how in sorted(ways, key=str))
            activation = "relu" if len(cases) % 2 else None
            cases.append(Case((N, C) if L == 1 else shape, dtype, 1, activation, label))
    return cases


def odd_cases(rehearse: bool) -> list[Case]:
    """Cases that no plan singles out: rows of an odd number of bytes, short rows channels last, few long rows."""
    shapes = (((2, 3, 5 if rehearse else 20, 7), 1), ((2, 5, 7, 8), 3), ((3, 2, 41 if rehearse else 4099), 1))
    dtypes = (np.dtype(np.float16), np.dtype(np.float32))
    return [Case(shape, dtype, axis) for shape, axis in shapes for dtype in dtypes]


def try_case(case: Case) -> None:
    """Compare a training step with float64, within the bounds of the tests, and a repetition of it to the bit."""
    import cupy

    import cupybn.functional as F

    rng = np.random.default_rng(1)
    C = case.shape[case.channel_axis]
    options: dict[str, Any] = {"channel_axis": case.channel_axis}
    x = (rng.standard_normal(case.shape, np.float32) * 2 + 3).astype(case.dtype)
    dy = rng.standard_normal(case.shape, np.float32).astype(case.dtype)
    weight, bias = rng.uniform(0.5, 1.5, C).astype(np.float32), rng.standard_normal(C).astype(np.float32)
    if case.activation:
        dy[np.abs(insides.batch_norm(x, weight, bias, **options).y) < NEAR] = 0
    expected = insides.batch_norm(x, weight, bias, dy=dy, relu=case.activation == "relu", **options)

    on_gpu = [cupy.asarray(array) for array in (x, weight, bias)]
    running = cupy.zeros(C, np.float32), cupy.ones(C, np.float32)
    passes = []
    for buffers in running, (None, None):
        arguments = (on_gpu[0], *buffers, *on_gpu[1:], True, MOMENTUM)
        y, vjp_fn = F.batch_norm_vjp(*arguments, activation=case.activation, **options)
        passes.append((y, *vjp_fn(cupy.asarray(dy))[:3]))
    cupy.cuda.Device().synchronize()
    assert expected.terms is not None
    for name, one, two in zip(("y", "dx", "dweight", "dbias"), *passes, strict=True):
        assert one.get().tobytes() == two.get().tobytes(), f"{name}: two runs differ"
        close(name, one, getattr(expected, name), case.dtype, expected.terms[name], insides.ROUNDINGS[name])
    n = x.size // C
    close("running_mean", running[0], MOMENTUM * expected.mean)
    close("running_var", running[1], 1 - MOMENTUM + MOMENTUM * expected.var * n / (n - 1))


def close(
    name: str,
    found: Any,
    wanted: Any,
    computed_in: Any = np.float32,
    scale: Any = 1.0,
    roundings: float = insides.ROUNDINGS["y"],
) -> None:
    """Compare as the tests do; an error names what was compared."""
    try:
        insides.assert_close(found, wanted, computed_in, scale, roundings)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
