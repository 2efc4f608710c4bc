"""How many instructions the kernels may issue, counted in their machine code, without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.counting import require

require()

from instructions.cost import count  # noqa: E402
from instructions.report import ROWS, case  # noqa: E402


class Budget(NamedTuple):
    """Most thread-instructions for each 16 bytes of one array, on sm_90: of rows of whole packs, and of other rows."""

    float32: tuple[int, int]
    half: tuple[int, int]  # float16 and bfloat16
    relu: int | None  # float16 with ReLU, rows of whole packs
    fp64: float  # of them float64 and conversions from and to 64 bits, rows of whole packs
    registers: int  # of a thread


BUDGETS = {
    "channels_first/bn_stats": Budget((40, 110), (55, 180), None, 4, 128),
    "channels_first/bn_normalize": Budget((25, 60), (50, 110), 60, 0, 80),
    "channels_first/bn_backward_reduce": Budget((40, 80), (70, 140), 125, 2, 64),
    "channels_first/bn_backward_input": Budget((40, 80), (80, 150), 110, 0, 96),
    "channels_first/bn_forward": Budget((75, 140), (120, 240), 125, 2.6, 64),
    "channels_first/bn_backward": Budget((75, 155), (150, 250), 195, 1, 64),
    "channels_last/bn_stats": Budget((40, 110), (55, 180), None, 2.5, 128),
    "channels_last/bn_normalize": Budget((25, 60), (50, 110), 60, 0, 80),
    "channels_last/bn_backward_reduce": Budget((40, 80), (70, 140), 125, 2, 128),
    "channels_last/bn_backward_input": Budget((40, 80), (80, 150), 110, 0, 96),
    "channels_last/bn_forward": Budget((75, 140), (120, 240), 125, 2.6, 64),
    "channels_last/bn_backward": Budget((75, 155), (150, 250), 195, 1, 64),
}
ONCE = {"issue": 300, "fp64": 50}
"""What each warp may issue beside that, whatever it has to do."""


def over(found, allowed, what):
    """A line about a count that is more than allowed; none about others."""
    return [f"{what}: {found:.1f} of {allowed:.1f}"] if found > allowed else []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", BUDGETS)
def test_kernels_keep_to_their_budgets(kernel, dtype):
    layout, _, step = kernel.partition("/")
    budget = BUDGETS[kernel]
    whole, other = budget.float32 if dtype == "float32" else budget.half
    shapes = ROWS if layout == "channels_first" else {"C = 256": 1, "C = 35": 1}
    wanted = []
    for n, (name, row) in enumerate(shapes.items()):
        channels = None if row > 1 else int(name.removeprefix("C = "))
        if n == 0:
            wanted += [(name, case(step, dtype, row, channels), whole)]
            if dtype == "float16" and budget.relu is not None:
                wanted += [(f"{name} with ReLU", case(step, dtype, row, channels, "relu"), budget.relu)]
        elif dtype != "bfloat16":
            wanted += [(name, case(step, dtype, row, channels), other)]
    excess = []
    for name, wanted_case, allowed in wanted:
        found = count(wanted_case)
        packs, per_pack = found.packs_per_thread, found.per_pack()
        excess += over(
            sum(per_pack.values()), allowed + ONCE["issue"] / packs, f"{name}, {packs:.1f} packs of a thread"
        )
        excess += over(found.launch.program.registers, budget.registers, f"{name}, registers")
        if allowed == whole:
            excess += over(per_pack["fp64"], budget.fp64 + ONCE["fp64"] / packs, f"{name}, float64")
    assert not excess, "\n".join(excess)
