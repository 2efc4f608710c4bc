"""Executes a program in blocks of threads side by side, and counts how often each instruction is issued.

All threads are columns of NumPy arrays. Of those that can go on, the ones at the lowest address go on together, up to
the next place where others are. Each group of lanes (see `flow`) that gets to an instruction is an issue of it, however
few its lanes, and with all of them predicated off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from instructions.arithmetic import form_of
from instructions.exchange import Exchange
from instructions.flow import CONTROL, Flow
from instructions.lanes import WARP, Array, Lanes, UnknownInstruction
from instructions.memory import LOCAL, WINDOW, Memory, Space, WrongAccess
from instructions.program import Program

Act = Callable[[Array], None]
NOTHING = (
    *("NOP", "YIELD", "NANOSLEEP", "ENDCOLLECTIVE"),
    *("MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "FENCE", "LDGDEPBAR", "DEPBAR"),
)
"""Instructions that do nothing here: copies are done at once, and all threads see the same memory."""


class Machine:
    """Some blocks of a launch, with their threads, memory and counts.

    Parameters
    ----------
    grid, threads
        The launch: blocks, and threads of each.
    blocks : sequence of (x, y, z)
        The blocks to execute: whole clusters in a row.
    cluster : int
        Blocks of a cluster.
    parameters : bytes
        Arguments of the kernel, as they lie in constant memory.
    space : Space
        Global memory.
    shared : int
        Bytes of shared memory that a block has.

    Attributes
    ----------
    issued : (instructions,) int array
        How often each instruction of the program was issued, by all warps.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        blocks: Sequence[tuple[int, int, int]],
        cluster: int,
        parameters: bytes,
        space: Space,
        shared: int,
    ) -> None:
        if threads % WARP:
            raise UnknownInstruction(f"blocks of {threads} threads")
        slots = np.repeat(np.arange(len(blocks)), threads)
        self._program = program
        self.issued = np.zeros(len(program.instructions), np.int64)
        lanes = self._lanes = Lanes(slots.size, _banks(program, grid, threads, parameters))
        self._flow = Flow(lanes, program.labels, threads, cluster)
        self._memory = Memory(lanes, space, slots, slots % cluster, shared)
        thread = np.tile(np.arange(threads), len(blocks))
        special = {"SR_TID.X": thread, "SR_LANEID": thread % WARP, "SR_CgaCtaId": slots % cluster}
        special |= {f"SR_CTAID.{axis}": np.array(blocks)[slots, n] for n, axis in enumerate("XYZ")}
        special |= {"SR_TID.Y": np.zeros(1), "SR_TID.Z": np.zeros(1), "SR_SWINHI": np.array([WINDOW])}
        self._exchange = Exchange(lanes, self._flow, {name: value.astype(np.uint32) for name, value in special.items()})
        self._acts: list[Act | None] = [None] * len(program.instructions)

    def run(self) -> None:
        """Execute the program until all threads are done."""
        with np.errstate(all="ignore"):
            while self._flow.alive.any():
                self._run_straight(*self._flow.next())

    def _run_straight(self, i: int, mask: Array, others: int) -> None:
        """Execute up to where threads may part or wait, or where other threads are."""
        groups = self._flow.groups(mask)
        while True:
            instruction = self._program.instructions[i]
            self.issued[i] += groups
            try:
                act = self._acts[i] = self._acts[i] or self._compile(i)
                act(mask)
            except (UnknownInstruction, WrongAccess, LookupError, ValueError) as error:
                text = f"{instruction.opcode} {', '.join(instruction.operands)}"
                what = (
                    error if isinstance(error, (UnknownInstruction, WrongAccess)) else f"not in this form ({error!r})"
                )
                kind = WrongAccess if isinstance(error, WrongAccess) else UnknownInstruction
                raise kind(f"{what}: {text} at {instruction.address:#x}") from error
            if instruction.opcode.partition(".")[0] in CONTROL:
                return
            i += 1
            if i >= others:
                self._flow.at[mask] = i
                return

    def _compile(self, i: int) -> Act:
        """A function that does the instruction for the threads of a mask."""
        _, guard, opcode, operands = self._program.instructions[i]
        name = opcode.partition(".")[0]
        moves = self._flow.compile(i, name, guard, opcode, operands)
        if moves is not None:
            return moves
        if name in NOTHING:
            return _do_nothing
        act = (
            self._exchange.compile(opcode, operands)
            or self._memory.compile(opcode, operands)
            or self._arithmetic(opcode, operands)
        )
        if guard is None:
            return act
        passes = self._lanes.reader(guard, "p")
        return lambda mask: act(mask & passes())

    def _arithmetic(self, opcode: str, operands: Sequence[str]) -> Act:
        found = form_of(opcode, operands)
        if found is None:
            raise UnknownInstruction("unknown instruction")
        letters, function = found
        written, read = letters.split("=")
        writers = [self._lanes.writer(o, k) for o, k in zip(operands, written, strict=False) if k != "_"]
        sources = zip(operands[len(written) :], read, strict=False)
        readers = [self._lanes.reader(operand, kind) for operand, kind in sources if kind != "_"]
        if len(writers) == 1:
            write = writers[0]
            return lambda mask: write(function(*[reader() for reader in readers]), mask)

        def act(mask: Array) -> None:
            values = function(*[reader() for reader in readers])
            for write, value in zip(writers, values, strict=True):
                write(value, mask)

        return act


def _do_nothing(mask: Array) -> None:
    """Do an instruction that changes nothing."""


def _banks(program: Program, grid: tuple[int, int, int], threads: int, parameters: bytes) -> dict[int, Array]:
    """The banks of constant memory; bank 0 has what the driver puts there: arguments, sizes, the stack's end."""
    banks = {number: _words(data) for number, data in program.constants.items()}
    sizes, stack = ((0x360, 0x370), 0x37C) if program.architecture >= 100 else ((0, 0xC), 0x28)
    first = banks[0]
    for place, values in zip(sizes, ((threads, 1, 1), grid), strict=True):
        first[place // 4 : place // 4 + 3] = values
    first[stack // 4] = LOCAL
    given = _words(parameters)
    first[program.parameters // 4 : program.parameters // 4 + given.size] = given
    return banks


def _words(data: bytes) -> Array:
    return np.frombuffer(data + b"\0" * (-len(data) % 8), np.uint32).copy()
