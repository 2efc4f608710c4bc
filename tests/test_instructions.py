"""Budgets of instructions that the kernels may issue, counted in their machine code, without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.counting import require

require()

from instructions import dropout, norms  # noqa: E402
from instructions.cases import Case  # noqa: E402
from instructions.cost import count  # noqa: E402
from instructions.report import case  # noqa: E402


class Budget(NamedTuple):
    """Most thread-instructions for each 16 bytes of one array, on sm_90: 5 % more than were counted.

    A budget includes what each warp issues once, 250 to 1000 instructions, spread over the packs that its threads have
    in the cases of `count`: 4 to 128 packs of 16 bytes. So a kernel on chip, which has few packs, may issue more for
    each, and a kernel whose threads get other numbers of packs needs other budgets.
    """

    float32: tuple[int, int]  # float32 with packs of 16 bytes, then with packs of one element
    float16: int  # float16 with packs of 16 bytes; with packs of one element it issues what bfloat16 does
    relu: int | None  # float16 with ReLU; None for kernels without activation
    bfloat16: int  # bfloat16 with packs of one element; with packs of 16 bytes it issues what float16 does
    fp64: tuple[float, float]  # instructions on 64 bits, in float32 and in float16, with packs of 16 bytes
    record: int | None = None  # float16 with ReLU by a record; None for kernels that are not held to it


BUDGETS = {
    "channels_first/bn_stats": Budget((54, 105), 67, None, 185, (4.0, 3.4)),
    "channels_first/bn_backward_reduce": Budget((59, 102), 94, 127, 185, (3.4, 3.4)),
    "channels_first/bn_normalize": Budget((37, 66), 62, 62, 143, (1.0, 1.0)),
    "channels_first/bn_backward_input": Budget((49, 89), 91, 128, 191, (0.8, 0.8)),
    "channels_first/bn_forward": Budget((89, 215), 128, 128, 392, (4.0, 3.4)),
    "channels_first/bn_backward": Budget((129, 278), 202, 241, 567, (4.8, 4.8)),
    "channels_last/bn_stats": Budget((43, 81), 86, None, 171, (2.5, 8.2)),
    "channels_last/bn_backward_reduce": Budget((36, 64), 92, 128, 166, (2.5, 8.0)),
    "channels_last/bn_normalize": Budget((26, 41), 53, 53, 97, (1.0, 1.0)),
    "channels_last/bn_backward_input": Budget((36, 59), 82, 117, 140, (0.5, 0.5)),
    "channels_last/bn_forward": Budget((148, 207), 209, 209, 287, (14.0, 20.7)),
    "channels_last/bn_backward": Budget((184, 249), 301, 341, 389, (13.6, 23.8)),
    "channels_first/bn_double_backward_reduce": Budget((98, 165), 157, 191, 301, (7.4, 7.4), 177),
    "channels_first/bn_double_backward_input": Budget((77, 149), 148, 193, 346, (1.3, 1.3), 180),
    "channels_last/bn_double_backward_reduce": Budget((81, 115), 169, 198, 294, (6.7, 13.9), 198),
    "channels_last/bn_double_backward_input": Budget((59, 116), 155, 201, 283, (0.9, 0.8), 204),
}
DROPOUT = {
    dropout.Case("float32", (1 << 17,)): 78,
    dropout.Case("float16", (1 << 17,)): 147,
    dropout.Case("bfloat16", (1 << 17,)): 147,
    dropout.Case("float64", (1 << 16,)): 79,
    dropout.Case("float16", (1 << 16,), offset=1): 543,
    dropout.Case("float32", (1, 16, 1, 16, 512)): 137,
    dropout.Case("float16", (1, 16, 1, 16, 392)): 177,
    dropout.Case("float32", (1, 8, 64, 256, 1)): 126,
    dropout.Case("float16", (1, 8, 64, 256, 1)): 207,
}
"""Most thread-instructions of dropout for each 16 bytes of one array, on sm_90: 5 % more than were counted. Of these
Philox takes 40 for each block of four words."""
NORMS = {
    ("norm_forward", "float32", "layer norm of 1024"): 132,
    ("norm_forward", "float16", "layer norm of 128"): 246,
    ("norm_forward", "bfloat16", "layer norm of 4096"): 180,
    ("norm_forward", "float16", "RMS norm of 4096"): 147,
    ("norm_forward", "float16", "group norm, 10 x 64 x 64"): 138,
    ("norm_forward", "float32", "group norm, 10 x 64 x 64"): 101,
    ("norm_forward", "float16", "group norm, channels last, 16 x 16 x 10"): 285,
    ("norm_backward", "float32", "layer norm of 1024"): 237,
    ("norm_backward", "float16", "layer norm of 128"): 363,
    ("norm_backward", "bfloat16", "layer norm of 4096"): 348,
    ("norm_backward", "float16", "RMS norm of 4096"): 322,
    ("norm_backward", "float16", "group norm, 10 x 64 x 64"): 457,
    ("norm_backward", "float32", "group norm, 10 x 64 x 64"): 379,
    ("norm_backward", "float16", "group norm, channels last, 16 x 16 x 10"): 357,
}
"""Most thread-instructions of the norms within a sample for each 16 bytes of one array, on sm_90: 5 % more than were
counted."""
REGISTERS = 128
"""Most registers of a thread; `test_compile.py` holds each kernel to fewer."""


def cases(kernel: str, dtype: str) -> dict[Case, int]:
    """The cases of a kernel in a dtype, with their budgets."""
    layout, _, step = kernel.partition("/")
    whole, single = ((56 * 56, None), (7 * 7, None)) if layout == "channels_first" else ((1, 256), (1, 35))
    budget = BUDGETS[kernel]
    if dtype == "bfloat16":
        return {case(step, dtype, *single): budget.bfloat16}
    if dtype == "float32":
        return {case(step, dtype, *whole): budget.float32[0], case(step, dtype, *single): budget.float32[1]}
    gated = {"relu": budget.relu, "record": budget.record}
    with_relu = {case(step, dtype, *whole, variant): most for variant, most in gated.items() if most is not None}
    return {case(step, dtype, *whole): budget.float16, **with_relu}


def over(found: float, allowed: float, what: str) -> list[str]:
    """A line about a count that is more than allowed; no line otherwise."""
    return [f"{what}: {found:.1f} of {allowed:.1f}"] if found > allowed else []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", BUDGETS)
def test_kernels_keep_to_their_budgets(kernel, dtype):
    excess = []
    for n, (counted, allowed) in enumerate(cases(kernel, dtype).items()):
        found = count(counted)
        per_pack = found.per_pack()
        excess += over(sum(per_pack.values()), allowed, f"{counted}, {found.packs_per_thread:.1f} packs of a thread")
        excess += over(found.launch.program.registers, REGISTERS, f"{counted}, registers")
        if n == 0 and dtype != "bfloat16":
            excess += over(per_pack["fp64"], BUDGETS[kernel].fp64[dtype == "float16"], f"{counted}, float64")
    assert not excess, "\n".join(excess)


@pytest.mark.parametrize(("case", "allowed"), DROPOUT.items(), ids=lambda given: str(given).replace(" ", ""))
def test_dropout_keeps_to_its_budgets(case, allowed):
    found = dropout.count(case)
    assert not over(sum(found.per_pack().values()), allowed, f"{case}, {found.packs_per_thread:.1f} packs of a thread")
    assert found.launch.program.registers <= 64


@pytest.mark.parametrize(("step", "dtype", "array", "allowed"), [(*case, most) for case, most in NORMS.items()])
def test_norms_keep_to_their_budgets(step, dtype, array, allowed):
    found = norms.count(norms.Case(step, dtype, *norms.ARRAYS[array]))
    assert not over(sum(found.per_pack().values()), allowed, f"{array}, {found.packs_per_thread:.1f} packs of a thread")
    assert found.launch.program.registers <= REGISTERS
