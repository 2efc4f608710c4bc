"""The cases of the table of instructions, and the table."""

from __future__ import annotations

from collections.abc import Iterable

from instructions import dropout, norms
from instructions.cases import STEPS, SUMS, VARIANTS, Case
from instructions.cost import SHOWN, Cost, Count

DTYPES = ("float32", "float16", "bfloat16")
ROWS = {"56 x 56": 3136, "14 x 14": 196, "7 x 7": 49}
CHANNELS_LAST = (256, 35)
HEADER = """# Instructions

What the kernels issue for each 16 bytes of one array: warp instructions times 32, idle lanes and both sides of a
diverged warp included. Counted without a GPU, by executing the machine code of `sm_{architecture}` on NumPy; what it
wrote was compared with float64. Written by `benchmarks/instructions`, whose README says how, and what it cannot see.

`plain` is without activation, `relu` with it (the way back works the sign out anew), `record` with a residual too. A
line through two counts tells what `each` 16 bytes more cost, `fp64` of it, and what each warp issues `once`. In the
larger count a thread had so many `packs` of 16 bytes; what each of them cost there, all in all, is the `total`, by
pipeline: `fma` (IMAD too, also where it moves), `alu`, `fp64` (conversions from and to 64 bits too), `xu`, `lsu`; the
rest is for the uniform datapath and control.

Norms within a sample and dropout, at the end, are counted once each; `variant` says what the array is.
"""
DROPOUTS = {
    "elements": (1 << 17,),
    "channels of 392": (1, 16, 1, 16, 392),
    "channels, last of all axes": (1, 8, 64, 256, 1),
}
"""Arrays of dropout to count with, by what they are."""
MORE_COLUMNS = ("kernel", "dtype", "variant", "packs", "total", *(f"its {p}" for p in SHOWN), "threads", "registers")
COLUMNS = (
    *("kernel", "dtype", "variant", "each", "fp64", "once", "packs"),
    *("total", *(f"its {pipe}" for pipe in SHOWN), "threads", "registers"),
)


def cases() -> list[Case]:
    """All cases of the table, one shape after the other."""
    shapes = [(row, None) for row in ROWS.values()] + [(1, channels) for channels in CHANNELS_LAST]
    return [
        case(step, dtype, row, channels, variant)
        for row, channels in shapes
        for step in STEPS
        for dtype in DTYPES
        for variant in VARIANTS
        if step != "bn_stats" or variant == "plain"
    ]


def case(step: str, dtype: str, row: int, channels: int | None = None, variant: str = "plain") -> Case:
    """The case of a step, dtype and row. Channels first it has so many channels that sums are split as those of large
    arrays.
    """
    if channels is None:
        channels = 256 if step in SUMS else 16
    return Case(step, dtype, row, channels, variant)


def tables(costs: Iterable[Cost]) -> str:
    """The tables, one for each shape."""
    by_shape: dict[str, list[Cost]] = {}
    for cost in costs:
        planes = {row: f"Channels first, rows of {name}" for name, row in ROWS.items()}
        title = planes.get(cost.case.row, f"Channels last, C = {cost.case.channels}")
        by_shape.setdefault(title, []).append(cost)
    return "".join(f"\n## {title}\n\n{_table(some)}" for title, some in by_shape.items())


def more_cases() -> dict[norms.Case | dropout.Case, str]:
    """Cases of the norms within a sample and of dropout, which are counted once, and what they are."""
    of_norms = {
        norms.Case(step, dtype, *array): name
        for name, array in norms.ARRAYS.items()
        for step in ("norm_forward", "norm_backward")
        for dtype in DTYPES
    }
    return of_norms | {dropout.Case(dtype, shape): name for name, shape in DROPOUTS.items() for dtype in DTYPES}


def count_once(case: norms.Case | dropout.Case, architecture: int = 90) -> Count:
    """The count of one of these cases."""
    return norms.count(case, architecture) if isinstance(case, norms.Case) else dropout.count(case, architecture)


def more_tables(counts: dict[norms.Case | dropout.Case, Count]) -> str:
    """Tables of the norms within a sample and of dropout."""
    names, by_title = more_cases(), dict[str, list[tuple[str, ...]]]()
    for case, found in counts.items():
        title = "Norms within a sample" if isinstance(case, norms.Case) else "Dropout"
        total, launch = found.per_pack(), found.launch
        assert launch.program is not None
        cells = (
            *(case.kernel.rpartition("/")[2], case.dtype, names[case]),
            *(f"{found.packs_per_thread:.1f}", f"{sum(total.values()):.0f}"),
            *(f"{total.get(pipe, 0):.1f}" for pipe in SHOWN),
            *(str(launch.threads), str(launch.program.registers)),
        )
        by_title.setdefault(title, []).append(cells)
    return "".join(f"\n## {title}\n\n{_lines(MORE_COLUMNS, rows)}" for title, rows in by_title.items())


def _table(costs: list[Cost]) -> str:
    return _lines(COLUMNS, [_cells(cost) for cost in costs])


def _lines(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |\n" for cells in (columns, *rows)]
    lines.insert(1, "|" + "---|" * 3 + "---:|" * (len(columns) - 3) + "\n")
    return "".join(lines)


def _cells(cost: Cost) -> tuple[str, ...]:
    each, total, launch = cost.each(), cost.larger.per_pack(), cost.larger.launch
    assert launch.program is not None
    return (
        *(cost.case.step, cost.case.dtype, cost.case.variant),
        *(f"{sum(each.values()):.0f}", f"{abs(each['fp64']):.1f}", f"{cost.once():.0f}"),
        *(f"{cost.larger.packs_per_thread:.1f}", f"{sum(total.values()):.0f}"),
        *(f"{total[pipe]:.1f}" for pipe in SHOWN),
        *(str(launch.threads), str(launch.program.registers)),
    )
