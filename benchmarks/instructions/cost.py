"""What a kernel costs for each 16 bytes of its arrays, and what each warp costs once."""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

from instructions.cases import ON_CHIP, SUMS, Arrays, Case
from instructions.launches import Blocks, Counter, Launch, counted

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
    """Count a case at two sizes, of which the larger one has twice the rows: the difference is what packs cost."""
    rows = _rows(case, architecture)
    (less, fewer), (more, many) = (_count(case, n, architecture) for n in (rows // 2, rows))
    # Two equations: instructions = a * packs + b * warps.
    determinant = fewer * more.warps - many * less.warps
    few, all_ = by_pipe(less), by_pipe(more)
    per_pack = {p: (few[p] * more.warps - all_[p] * less.warps) / determinant * 32 for p in all_}
    issue = sum(per_pack.values())
    once = (more.issued.sum() - issue / 32 * many) / more.warps
    assert more.program is not None
    packs = many / (more.warps * 32)
    return Cost(case, issue, per_pack, once, more.program.registers, more.threads, packs)


def _rows(case: Case, architecture: int) -> int:
    """The most rows, up to some bound, that are counted with the same code as half of them."""
    itemsize = ITEMSIZE[case.dtype]
    if case.row == 1:
        rows = {True: 1 << 15, False: 1 << 11}[case.step in SUMS] * (1 if case.channels % 8 == 0 else 4)
    else:
        most = (12544 if case.step in SUMS else 6272) * PACK // itemsize
        rows = 1 << int(math.log2(most / case.row))
    if case.step not in ON_CHIP:
        return rows
    rows = min(rows, {49: 64, 196: 64}.get(case.row, rows))
    while rows >= 2:
        found = [_launch(case, n, architecture) for n in (rows // 2, rows)]
        if all(found) and len({(launch.options, launch.threads, launch.grid) for launch in found if launch}) == 1:
            return rows
        rows //= 2
    raise ValueError(f"{case} is not kept on chip")


def _launch(case: Case, rows: int, architecture: int) -> Launch | None:
    """The launch of a case, not executed; None if the library takes another kernel."""
    with counted(architecture, None, _memory(case, rows), 1) as counter:
        Arrays(case, rows).run()
    return next((launch for launch in counter.launches if launch.kernel == case.kernel), None)


def _count(case: Case, rows: int, architecture: int) -> tuple[Launch, float]:
    """The launch of a case, checked, and the packs that its executed blocks have worked on."""

    def choose(grid: tuple[int, int, int], cluster: int) -> Blocks:
        """Of sums all parts of the first channels, else a share of them from the middle.

        Channels last, blocks take packs: where channels are no whole packs, one may be spread over many blocks.
        """
        shares = range(grid[1]) if case.step in SUMS else (grid[1] // 2,)
        spread = case.step in SUMS and case.row == 1 and case.channels % (PACK // ITEMSIZE[case.dtype])
        return [(x, y, 0) for y in shares for x in range(grid[0] if spread else cluster)]

    arrays = Arrays(case, rows)
    with counted(architecture, choose, _memory(case, rows), 1) as counter:
        results = arrays.run()
        elements = arrays.check(counter, results)
    (launch,) = (launch for launch in counter.launches if launch.kernel == case.kernel)
    return launch, elements * arrays.itemsize / PACK


def _memory(case: Case, rows: int) -> int:
    """Enough for the arrays of a case."""
    arrays = 1 if case.step == "bn_stats" else 5
    return rows * case.row * case.channels * ITEMSIZE[case.dtype] * arrays + (16 << 20)


__all__ = ["Cost", "Counter", "by_pipe", "measure", "pipe"]
