"""What a kernel costs for each 16 bytes of its arrays, and what each warp costs once."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

from instructions.cases import ON_CHIP, SUMS, Arrays, Case
from instructions.lanes import WARP
from instructions.launches import Blocks, Launch, counted
from instructions.program import Program

PACK = 16
"""Bytes of one array."""
PIPES = {
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD",
    "xu": "MUFU POPC FLO BREV F2F I2F F2I",
    "lsu": "LDG STG LDS STS LDL STL LD ST LDGSTS LDC SHFL",
    "control": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV WARPSYNC BAR B2R S2R CS2R NOP MEMBAR ERRBAR CGAERRBAR "
    "CCTL LDGDEPBAR DEPBAR UCGABAR_ARV UCGABAR_WAIT YIELD",
}
"""Pipelines, by the names of instructions; conversions from and to 64 bits count as fp64, IMAD also where it moves."""
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SHOWN = ("fma", "alu", "fp64", "xu", "lsu")
_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


class Cost(NamedTuple):
    """Thread-instructions for each pack: warp instructions times 32, idle lanes and both sides of a branch included."""

    case: Case
    issue: float
    pipes: dict[str, float]  # the same by pipeline; "uniform" and "control" are not shown
    once: float  # instructions of each warp, whatever there is to do
    registers: int
    threads: int  # of a block
    packs: float  # of a thread


def pipe(opcode: str) -> str:
    """The pipeline that an instruction goes to."""
    name, *modifiers = opcode.split(".")
    if name in ("F2F", "I2F", "F2I") and any("64" in modifier for modifier in modifiers):
        return "fp64"
    if name in _PIPE:
        return _PIPE[name]
    return "uniform" if name.startswith("U") or name in ("R2UR", "S2UR", "VOTEU", "LDCU") else "alu"


def by_pipe(launch: Launch) -> collections.Counter[str]:
    """Warp instructions of the executed blocks."""
    assert launch.program is not None
    result: collections.Counter[str] = collections.Counter()
    for instruction, issued in zip(launch.program.instructions, launch.issued, strict=True):
        result[pipe(instruction.opcode)] += int(issued)
    return result


def measure(case: Case, architecture: int = 90) -> Cost:
    """Count a case with two numbers of rows that the same code takes: the difference is what packs cost."""
    for rows in _numbers_of_rows(case):
        larger = _count(case, rows, architecture)
        smaller = larger and next(filter(None, (_count(case, n, architecture, larger[0]) for n in _fewer(rows))), None)
        if larger and smaller:
            break
    else:
        raise ValueError(f"{case} does not take the kernel {case.kernel} with two numbers of rows that are alike")
    (less, fewer), (more, many) = smaller, larger
    # Two equations: instructions = a * packs + b * warps.
    determinant = fewer * more.warps - many * less.warps
    few, all_ = by_pipe(less), by_pipe(more)
    per_pack = {p: (few[p] * more.warps - all_[p] * less.warps) / determinant * WARP for p in all_}
    issue = sum(per_pack.values())
    once = (more.issued.sum() - issue / WARP * many) / more.warps
    assert more.program is not None
    return Cost(case, issue, per_pack, once, more.program.registers, more.threads, many / (more.warps * WARP))


def _numbers_of_rows(case: Case) -> list[int]:
    """From the most that are worth the time down: of planes that are small as many as there are in use."""
    if case.row == 1:
        whole = case.channels % (PACK // ITEMSIZE[case.dtype]) == 0
        most = (1 << 15 if case.step in SUMS else 1 << 11) * (1 if whole else 4)
    else:
        most = (12544 if case.step in SUMS else 6272) * PACK // ITEMSIZE[case.dtype] // case.row
        most = 1 << most.bit_length() - 1
        if case.step in ON_CHIP and case.row < 28 * 28:
            most = min(most, 64)
    return [most >> n for n in range(most.bit_length() - 1)]


def _fewer(rows: int) -> list[int]:
    """Half of the rows, or somewhat more: with half of them the library may choose smaller blocks."""
    return sorted({rows // 2, rows // 2 + 1, rows * 5 // 8, rows * 3 // 4} - {0, rows})


def _count(case: Case, rows: int, architecture: int, like: Launch | None = None) -> tuple[Launch, float] | None:
    """The launch of a case, checked, and the packs that its executed blocks have worked on.

    None if the library takes another kernel, or does not launch it like the one given.
    """

    def choose(launch: Launch, compiled: Callable[[], Program]) -> Blocks:
        """Of sums all parts of the first channels, else a share of them from the middle.

        Channels last, blocks take packs: where channels are no whole packs, one may be spread over many blocks.
        """
        alike = like is None or (like.options, like.threads, like.grid) == (launch.options, launch.threads, launch.grid)
        if launch.kernel != case.kernel or not alike:
            return []
        x, y, _ = launch.grid
        spread = case.step in SUMS and case.row == 1 and case.channels % (PACK // ITEMSIZE[case.dtype])
        columns = range(x if spread else compiled().cluster)
        return [(column, share, 0) for share in (range(y) if case.step in SUMS else (y // 2,)) for column in columns]

    arrays = Arrays(case, rows)
    with counted(architecture, choose, _memory(case, rows), 1) as counter:
        results = arrays.run()
        launch = next((launch for launch in counter.launches if launch.blocks), None)
        return launch and (launch, arrays.check(counter, results) * ITEMSIZE[case.dtype] / PACK)


def _memory(case: Case, rows: int) -> int:
    """Enough for the arrays of a case."""
    arrays = 1 if case.step == "bn_stats" else 5
    return rows * case.row * case.channels * ITEMSIZE[case.dtype] * arrays + (16 << 20)

