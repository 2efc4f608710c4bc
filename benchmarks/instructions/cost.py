"""What a kernel costs: instructions for each 16 bytes of its arrays (a pack), and those that each warp issues once."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

from instructions.cases import ON_CHIP, SUMS, Arrays, Case
from instructions.lanes import WARP
from instructions.launches import Blocks, Launch, counted
from instructions.program import Program

PACK = 16
"""Bytes of one array that costs are given for."""
PIPES = {
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD",
    "xu": "MUFU POPC FLO BREV F2F I2F F2I",
    "lsu": "LDG STG LDS STS LDL STL LD ST LDGSTS LDC SHFL",
    "control": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV WARPSYNC BAR B2R S2R CS2R NOP MEMBAR ERRBAR CGAERRBAR "
    "CCTL LDGDEPBAR DEPBAR UCGABAR_ARV UCGABAR_WAIT YIELD",
}
"""Pipelines with the names of their instructions. Conversions from and to 64 bits count as fp64, IMAD as fma even where
it moves."""
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SHOWN = ("fma", "alu", "fp64", "xu", "lsu")
_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


class Count(NamedTuple):
    """A launch whose result was checked, and how many packs its executed blocks have worked on."""

    launch: Launch
    packs: float

    @property
    def packs_per_thread(self) -> float:
        """Packs that a thread works on, on average; less than 1 where a block has more threads than packs."""
        return self.packs / (self.launch.warps * WARP)

    def by_pipe(self) -> collections.Counter[str]:
        """Issued warp instructions by pipeline."""
        assert self.launch.program is not None
        result: collections.Counter[str] = collections.Counter()
        for instruction, issued in zip(self.launch.program.instructions, self.launch.issued, strict=True):
            result[pipe(instruction.opcode)] += int(issued)
        return result

    def per_pack(self) -> dict[str, float]:
        """Thread-instructions for each pack, by pipeline: warp instructions times 32, including what each block does
        once.
        """
        return {p: issued * WARP / self.packs for p, issued in self.by_pipe().items()}


class Cost(NamedTuple):
    """Counts of two launches with different numbers of packs, and the line through both."""

    case: Case
    larger: Count
    smaller: Count

    def each(self) -> dict[str, float]:
        """Thread-instructions that each further pack costs, by pipeline."""
        (more, many), (less, few) = self.larger, self.smaller
        # Solves two equations: instructions = a * packs + b * warps.
        determinant = many * less.warps - few * more.warps
        issued, fewer = self.larger.by_pipe(), self.smaller.by_pipe()
        return {p: (issued[p] * less.warps - fewer[p] * more.warps) * WARP / determinant for p in issued}

    def once(self) -> float:
        """Instructions that a warp issues once, however many packs it has."""
        warps, packs_per_warp = self.larger.launch.warps, self.larger.packs / self.larger.launch.warps
        return int(self.larger.launch.issued.sum()) / warps - sum(self.each().values()) / WARP * packs_per_warp


def pipe(opcode: str) -> str:
    """The pipeline that executes an instruction."""
    name, *modifiers = opcode.split(".")
    if name in ("F2F", "I2F", "F2I") and any("64" in modifier for modifier in modifiers):
        return "fp64"
    if name in _PIPE:
        return _PIPE[name]
    return "uniform" if name.startswith("U") or name in ("R2UR", "S2UR", "VOTEU", "LDCU") else "alu"


def count(case: Case, architecture: int = 90) -> Count:
    """Count a case, with the largest number of rows that is worth the time and takes the case's kernel."""
    found = next(filter(None, (_count(case, rows, architecture) for rows in _numbers_of_rows(case))), None)
    assert found is not None, f"{case} does not take the kernel {case.kernel}"
    return found


def measure(case: Case, architecture: int = 90) -> Cost:
    """Count a case with two numbers of rows that are launched alike, so that the difference is what packs cost."""
    for rows in _numbers_of_rows(case):
        larger = _count(case, rows, architecture)
        for fewer in _fewer(rows) if larger else ():
            smaller = _count(case, fewer, architecture, larger.launch)
            if smaller:
                return Cost(case, larger, smaller)
    raise ValueError(f"{case} does not take the kernel {case.kernel} with two numbers of rows that are alike")


def _numbers_of_rows(case: Case) -> list[int]:
    """Numbers of rows to try, from the most that are worth the time down; small planes on chip get as many as real
    batches have.
    """
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
    """Numbers of rows to compare with: half as many, or somewhat more, as the library may choose smaller blocks for
    half.
    """
    return sorted({rows // 2, rows // 2 + 1, rows * 5 // 8, rows * 3 // 4} - {0, rows})


def _count(case: Case, rows: int, architecture: int, like: Launch | None = None) -> Count | None:
    """A count with so many rows; None if the library takes another kernel, or launches it otherwise than `like`."""

    def choose(launch: Launch, compiled: Callable[[], Program]) -> Blocks:
        """The blocks to execute: for sums all parts of the first channels, else one share, from the middle.

        Channels last, a block takes packs: where channels are no whole packs, one may be spread over many blocks.
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
        return launch and Count(launch, arrays.check(counter, results) * ITEMSIZE[case.dtype] / PACK)


def _memory(case: Case, rows: int) -> int:
    """Bytes of memory that hold the arrays of a case."""
    arrays = 1 if case.step == "bn_stats" else 7 if "double" in case.step else 5
    return rows * case.row * case.channels * ITEMSIZE[case.dtype] * arrays + (16 << 20)
