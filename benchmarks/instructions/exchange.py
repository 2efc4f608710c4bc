"""The instructions by which a thread learns its place, and the threads of a warp tell each other values."""

# Methods that make instructions all have the same parameters, whether they need them or not.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from instructions.flow import Flow
from instructions.lanes import WARP, Array, Lanes, UnknownInstruction

Act = Callable[[Array], None]


class Exchange:
    """The instructions whose result depends on which thread executes them, and with which others.

    Parameters
    ----------
    special : dict
        Values of the special registers, by name.
    """

    def __init__(self, lanes: Lanes, flow: Flow, special: dict[str, Array]) -> None:
        self._lanes, self._flow, self._special = lanes, flow, special
        self._threads = np.arange(lanes.threads)
        self._lane = self._threads % WARP

    def compile(self, opcode: str, operands: Sequence[str]) -> Act | None:
        """A function that does the instruction for the threads of a mask; None if it is none of these."""
        name, *modifiers = opcode.split(".")
        make = _EXCHANGE.get(name)
        return None if make is None else make(self, modifiers, operands)

    def _read_special(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        if operands[1] not in self._special:
            raise UnknownInstruction("special register")
        write, value = self._lanes.writer(operands[0], "u"), self._special[operands[1]]
        return lambda mask: write(value, mask)

    def _shuffle(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """SHFL: a value of another lane; a lane that would read out of range, or from a lane that is elsewhere, keeps
        its own.
        """
        inside, write = self._lanes.writer(operands[0], "p"), self._lanes.writer(operands[1], "u")
        value, by, limits = (self._lanes.reader(operand, "u") for operand in operands[2:5])
        kind = modifiers[0]

        def act(mask: Array) -> None:
            n = by().astype(np.int64) & (WARP - 1)
            limit = limits().astype(np.int64)
            segment, last = limit >> 8 & (WARP - 1), limit & (WARP - 1)
            least = self._lane & segment
            most = least | last & ~segment
            if kind == "IDX":
                source = least | n & ~segment
            else:
                source = {"BFLY": self._lane ^ n, "UP": self._lane - n, "DOWN": self._lane + n}[kind]
            valid = source >= most if kind == "UP" else source <= most
            source = np.where(valid, source, self._lane)
            found = np.broadcast_to(value(), mask.shape)[self._threads - self._lane + source]
            write(found, mask)
            inside(valid, mask)

        return act

    def _vote(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        *targets, source = operands
        passes = self._lanes.reader(source, "p")
        writers = [(t.lstrip("U")[0], self._lanes.writer(t, "p" if t.lstrip("U")[0] == "P" else "u")) for t in targets]

        def act(mask: Array) -> None:
            flags = passes()
            ballot = self._flow.lanes_of_group(mask, flags)
            found = ballot != 0 if modifiers[0] == "ANY" else ballot == self._flow.lanes_of_group(mask, mask)
            for letter, write in writers:
                write(found if letter == "P" else ballot.astype(np.uint32), mask)

        return act

    def _first_active(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """R2UR: the value of the first lane of the group, for all of it."""
        write, read = self._lanes.writer(operands[0], "u"), self._lanes.reader(operands[-1], "u")

        def act(mask: Array) -> None:
            ballot = self._flow.lanes_of_group(mask, mask)
            first = np.log2(np.maximum(ballot & -ballot, 1).astype(np.float64)).astype(np.int64)
            write(np.broadcast_to(read(), mask.shape)[self._threads - self._lane + first], mask)

        return act

    def _match(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """MATCH: the lanes of the group that have the same value, as bits."""
        write, read = self._lanes.writer(operands[-2], "u"), self._lanes.reader(operands[-1], "u")
        if modifiers != ["ANY"]:
            raise UnknownInstruction("of all lanes")

        def act(mask: Array) -> None:
            value, found = np.broadcast_to(read(), mask.shape), np.zeros(mask.size, np.uint32)
            for one in np.unique(value[mask]):
                same = mask & (value == one)
                found[same] = self._flow.lanes_of_group(mask, same).astype(np.uint32)[same]
            write(found, mask)

        return act

    def _reduce(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """REDUX: the sum, minimum or the like over the lanes of the group."""
        write, read = self._lanes.writer(operands[0], "u"), self._lanes.reader(operands[1], "u")
        signed = "S32" in modifiers
        function = next((_REDUCTIONS[m] for m in modifiers if m in _REDUCTIONS), np.add)

        def act(mask: Array) -> None:
            value, found = np.broadcast_to(read(), mask.shape), np.zeros(mask.size, np.uint32)
            for group in np.unique(self._flow.group[mask]):
                same = mask & (self._flow.group == group)
                some = value[same].view(np.int32) if signed else value[same]
                found[same] = function.reduce(some, dtype=some.dtype).view(np.uint32)
            write(found, mask)

        return act

    def _from_predicates(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """P2R: a register with some predicates among its bits, in the byte that the first operand names."""
        name, _, byte = operands[0].partition(".B")
        write, shift = self._lanes.writer(name, "u"), np.uint32(8 * int(byte or 0))
        old, chosen = self._lanes.reader(operands[2].partition(".")[0], "u"), self._lanes.reader(operands[3], "u")

        def act(mask: Array) -> None:
            bits = np.packbits(self._lanes.predicates[:7], axis=0, bitorder="little")[0].astype(np.uint32)
            keep = ~(chosen() << shift)
            write(old() & keep | (bits & chosen()) << shift, mask)

        return act

    def _to_predicates(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """R2P: predicates set from the bits of a register, the reverse of P2R."""
        name, _, byte = operands[1].partition(".B")
        source, chosen = self._lanes.reader(name, "u"), self._lanes.reader(operands[2], "n")
        shift = np.uint32(8 * int(byte or 0))

        def act(mask: Array) -> None:
            bits = source() >> shift
            for n in range(7):
                if chosen() >> n & 1:
                    np.copyto(self._lanes.predicates[n], bits >> np.uint32(n) & np.uint32(1) != 0, where=mask)

        return act

    def _barrier_result(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """B2R: the result of the last barrier that reduces."""
        number = self._lanes.writer(operands[0], "u")
        flag = self._lanes.writer(operands[1] if len(operands) > 1 else "PT", "p")

        def act(mask: Array) -> None:
            number(self._flow.result, mask)
            flag(self._flow.result != 0, mask)

        return act

    def _from_members(self, modifiers: Sequence[str], operands: Sequence[str]) -> Act:
        """BMOV: the lanes that a barrier of a warp is to join, moved to or from a register."""
        if operands[0].startswith("B"):
            members, read = self._flow.members(operands[0]), self._lanes.reader(operands[1], "k")
            return lambda mask: np.copyto(members, read(), where=mask)
        members, write = self._flow.members(operands[1]), self._lanes.writer(operands[0], "u")
        return lambda mask: write(members.astype(np.uint32), mask)


_REDUCTIONS: dict[str, np.ufunc] = {
    **{"OR": np.bitwise_or, "AND": np.bitwise_and, "XOR": np.bitwise_xor},
    **{"MIN": np.minimum, "MAX": np.maximum},
}
_EXCHANGE = {
    "S2R": Exchange._read_special,
    "S2UR": Exchange._read_special,
    "SHFL": Exchange._shuffle,
    "VOTE": Exchange._vote,
    "VOTEU": Exchange._vote,
    "MATCH": Exchange._match,
    "REDUX": Exchange._reduce,
    "R2UR": Exchange._first_active,
    "P2R": Exchange._from_predicates,
    "R2P": Exchange._to_predicates,
    "B2R": Exchange._barrier_result,
    "BMOV": Exchange._from_members,
}
