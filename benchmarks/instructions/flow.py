"""Control flow: where threads are in a program, how warps diverge and join again, barriers.

A warp that diverges is two groups of lanes from then on, and each of them issues its instructions by itself, also where
both happen to be at the same place: they are one again where a barrier (BSSY and BSYNC, or WARPSYNC) joins them, as on
hardware.
"""

# Methods that make instructions all have the same parameters, whether they need them or not.
# ruff: noqa: ARG002

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from instructions.arithmetic import is_predicate
from instructions.lanes import ALL, WARP, Array, Lanes, Read, UnknownInstruction

Act = Callable[[Array], None]
Guarded = Callable[[Array], Array]
"""Function that takes a mask of threads, and leaves those whose predicates let them pass."""
END = 1 << 30
"""Number behind those of all instructions."""
WORD = 16
"""Bytes of an instruction."""
_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


class Flow:
    """The place of every thread in a program.

    Parameters
    ----------
    labels : dict
        Addresses of the program's labels.
    threads, cluster : int
        Threads of a block, and blocks of a cluster.

    Attributes
    ----------
    at : int array
        The number of each thread's next instruction.
    group : int array
        The group that each thread is in, by the number of its first thread when it came about.
    result : uint32 array
        What the last barrier that reduces has found, for each thread.
    """

    def __init__(self, lanes: Lanes, labels: dict[str, int], threads: int, cluster: int) -> None:
        total = lanes.threads
        self._lanes, self._labels = lanes, labels
        self._block, self._cluster = threads, threads * cluster
        self._warp, self._lane = np.arange(total) // WARP, np.arange(total) % WARP
        self.at = np.zeros(total, np.int64)
        self.alive = np.ones(total, bool)
        self._waiting = np.zeros(total, bool)
        self.group = self._warp * WARP
        self._members: dict[str, Array] = {}  # by barrier of a warp: the lanes that it is to join, for each thread
        self._joining = np.zeros(total, bool)
        self._needed: dict[int, Read] = {}  # by instruction where lanes wait for others: the lanes that must come
        self._barrier = np.full(total, -1)  # number of the block's barrier where a thread waits
        self._flag = np.zeros(total, bool)  # value that a thread contributes to its barrier
        self.result = np.zeros(total, np.uint32)
        # By barrier of a block: how many threads it waits for (None: all), and its reduction.
        self._kinds: dict[int, tuple[int | None, str]] = {}
        self._arrivals = np.zeros(total, np.int64)  # how often a thread has arrived at the cluster's barrier
        self._in_cluster = np.zeros(total, bool)  # whether a thread waits at the cluster's barrier

    def next(self) -> tuple[int, Array, int]:
        """The lowest instruction at which threads can go on, the mask of these threads, and the lowest one at which
        others can.
        """
        able = self.alive & ~self._waiting
        if not able.any():
            raise RuntimeError("all threads wait")
        at = np.where(able, self.at, END)
        first = int(at.min())
        mask = at == first
        return first, mask, int(at[~mask].min(initial=END))

    def groups(self, mask: Array) -> int:
        """How many groups the threads of a mask belong to."""
        return int(np.count_nonzero(self._groups_of(mask)))

    def lanes_of_group(self, mask: Array, flags: Array) -> Array:
        """The lanes of a thread's group that are in the mask and have their flag set, as bits, for each thread of the
        mask.
        """
        bits = np.where(flags & mask, _BITS[self._lane], 0).astype(np.float64)  # float64 holds sums of 32 bits exactly
        return np.bincount(self.group[mask], bits[mask], mask.size).astype(np.uint64)[self.group]

    def _groups_of(self, mask: Array) -> Array:
        """Whether a group has threads in the mask, for each number of a group."""
        found = np.zeros(mask.size, bool)
        found[self.group[mask]] = True
        return found

    def compile(self, i: int, name: str, guard: str | None, opcode: str, operands: Sequence[str]) -> Act | None:
        """A function that does the instruction for the threads of a mask; None if it does not move threads."""
        make = _CONTROL.get(name)
        if make is None:
            return None
        passes = [
            self._lanes.reader(operand, "p") for operand in (guard, *operands) if operand and is_predicate(operand)
        ]

        def guarded(mask: Array) -> Array:
            for read in passes:
                mask = mask & read()
            return mask

        return make(self, i, guarded, opcode, [operand for operand in operands if not is_predicate(operand)])

    # -----------------------------------------------------------------------------------------------------------------
    # Branches

    def _branch(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        target = self._place(operands[-1])
        if ".DIV" in opcode:  # branches if other lanes of the warp are elsewhere
            lanes = self._lanes.reader(operands[0] if len(operands) > 1 else "~URZ", "k")
            return lambda mask: self._go(mask, guarded(mask) & (self.lanes_of_group(mask, mask) != lanes()), target, i)
        if ".U" in opcode:  # branches if all lanes that are here together would
            return lambda mask: self._go(mask, self._unanimous(mask, guarded(mask)), target, i)
        return lambda mask: self._go(mask, guarded(mask), target, i)

    def _unanimous(self, mask: Array, taken: Array) -> Array:
        """Lanes that take a branch together with all others of their group."""
        return taken & (self.lanes_of_group(mask, taken) == self.lanes_of_group(mask, mask))

    def _return(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        """RET and BRX: to the address in a register; for BRX it counts from the next instruction, plus a distance."""
        name, distance, *_ = (*operands[0].split(), "0")
        read = self._lanes.reader(name, "i")
        shift = (i + 1) * WORD + int(distance, 0) if opcode.startswith("BRX") else 0

        def act(mask: Array) -> None:
            taken, places = guarded(mask), (read().astype(np.int64) + shift) // WORD
            self.at[mask] = i + 1
            for place in np.unique(places[taken]):
                self._split(mask, taken & (places == place))
            self.at[taken] = places[taken]

        return act

    def _exit(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        def act(mask: Array) -> None:
            self.alive[guarded(mask)] = False
            self.at[mask] = i + 1
            self._join_again()
            for number in np.unique(self._barrier[self._barrier >= 0]):
                self._meet(int(number))
            self._meet_cluster()

        return act

    def _go(self, mask: Array, taken: Array, target: int, i: int) -> None:
        self._split(mask, taken)
        self.at[mask] = i + 1
        self.at[taken] = target

    def _split(self, mask: Array, taken: Array) -> None:
        """Make two groups of each one of which some threads go elsewhere and others stay."""
        rest = mask & ~taken
        if taken.any() and rest.any():
            both = (self._groups_of(taken) & self._groups_of(rest))[self.group]
            before = self.group.copy()
            self._regroup(taken & both, before)
            self._regroup(rest & both, before)

    def _regroup(self, mask: Array, key: Array) -> None:
        """Make a group of the threads that have the same key; keys are smaller than the number of threads."""
        threads, first = np.flatnonzero(mask), np.zeros(mask.size, np.int64)
        first[key[threads][::-1]] = threads[::-1]  # of several with one key the first is written last, and stays
        self.group[threads] = first[key[threads]]

    def _place(self, operand: str) -> int:
        return self._labels[operand.strip("`() ")] // WORD

    # -----------------------------------------------------------------------------------------------------------------
    # Warps join again

    def _note_members(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        members = self.members(operands[0])

        def act(mask: Array) -> None:
            taken = guarded(mask)
            members[taken] = self.lanes_of_group(taken, taken)[taken]
            self.at[mask] = i + 1

        return act

    def _leave_members(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        members = self.members(operands[-1])

        def act(mask: Array) -> None:
            members[:] &= ~self._bits_of_warp(guarded(mask))
            self.at[mask] = i + 1
            self._join_again()

        return act

    def _join_members(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        members = self.members(operands[0])
        return self._joining_act(i, guarded, lambda: members)

    def _join_lanes(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        if ".ALL" not in opcode:
            return self._joining_act(i, guarded, self._lanes.reader(operands[0], "k"))
        whole = np.array([ALL])
        return self._joining_act(i, guarded, lambda: whole)

    def _joining_act(self, i: int, guarded: Guarded, needed: Read) -> Act:
        self._needed[i] = needed

        def act(mask: Array) -> None:
            taken = guarded(mask)
            self._go(mask, taken, i, i)
            self._joining |= taken
            self._join(i)

        return act

    def _join(self, i: int) -> None:
        """Let the threads go on whose needed lanes are all at this instruction, each warp's as one group."""
        here = self._joining & (self.at == i)
        needed = np.broadcast_to(self._needed[i](), here.shape)
        missing = needed & self._bits_of_warp(self.alive) & ~self._bits_of_warp(here)
        done = here & (missing == 0)
        self._joining[done] = False
        self._waiting[here] = ~done[here]
        self.at[done] = i + 1
        if self.groups(done) > np.count_nonzero(done.reshape(-1, WARP).any(1)):
            first = np.log2((needed & -needed).astype(np.float64)).astype(np.int64)  # lowest lane needed
            self._regroup(done, self._warp * WARP + first)

    def _join_again(self) -> None:
        """Try again to join wherever threads wait, because fewer lanes are needed now."""
        for place in np.unique(self.at[self._joining]):
            self._join(int(place))

    def members(self, name: str) -> Array:
        """The lanes that a barrier of a warp is to join, for each thread."""
        return self._members.setdefault(name, np.zeros(self.at.size, np.uint64))

    def _bits_of_warp(self, flags: Array) -> Array:
        """The flags of a thread's warp as bits, for each thread."""
        packed = np.packbits(flags.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
        return np.repeat(packed[:, 0], WARP).astype(np.uint64)

    # -----------------------------------------------------------------------------------------------------------------
    # Barriers of blocks and clusters

    def _synchronize(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        if not re.fullmatch(r"0x\w+|\d+", operands[0]) or "ARV" in opcode:
            raise UnknownInstruction("a barrier of this kind")
        number = int(operands[0], 0)
        reduction = next((name for name in ("POPC", "AND", "OR") if f"RED.{name}" in opcode), "")
        kind = int(operands[1], 0) if len(operands) > 1 else None, reduction

        def act(mask: Array) -> None:
            taken = guarded(mask)
            self._kinds[number] = kind
            self._flag[mask] = taken[mask]
            self.at[mask] = i + 1
            waiting = mask if reduction else taken
            self._waiting |= waiting
            self._barrier[waiting] = number
            self._meet(number)

        return act

    def _meet(self, number: int) -> None:
        """Let the threads of a block go on if all of them wait at the barrier, or as many as it counts."""
        here, shape = self._barrier == number, (-1, self._block)
        count, reduction = self._kinds[number]
        arrived = here.reshape(shape).sum(1)
        done = (here | ~self.alive).reshape(shape).all(1) if count is None else arrived == count
        going = here & np.repeat(done, self._block)
        if reduction:
            flags = (self._flag & here).reshape(shape).sum(1)
            found = {"POPC": flags, "AND": flags == arrived, "OR": flags > 0}[reduction]
            self.result[going] = np.repeat(found, self._block)[going]
        self._barrier[going] = -1
        self._waiting[going] = False

    def _arrive_at_cluster(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        def act(mask: Array) -> None:
            self._arrivals[mask] += 1
            self.at[mask] = i + 1
            self._meet_cluster()

        return act

    def _wait_for_cluster(self, i: int, guarded: Guarded, opcode: str, operands: Sequence[str]) -> Act:
        def act(mask: Array) -> None:
            self._in_cluster |= mask
            self._waiting |= mask
            self.at[mask] = i + 1
            self._meet_cluster()

        return act

    def _meet_cluster(self) -> None:
        """Let threads go on that wait at the cluster's barrier, if all its threads have arrived as often."""
        arrivals = np.where(self.alive, self._arrivals, END).reshape(-1, self._cluster)
        going = self._in_cluster & (np.repeat(arrivals.min(1), self._cluster) >= self._arrivals)
        self._in_cluster[going] = False
        self._waiting[going] = False


_CONTROL = {
    "BRA": Flow._branch,
    "JMP": Flow._branch,
    "CALL": Flow._branch,
    "RET": Flow._return,
    "BRX": Flow._return,
    "EXIT": Flow._exit,
    "BSSY": Flow._note_members,
    "BREAK": Flow._leave_members,
    "BSYNC": Flow._join_members,
    "WARPSYNC": Flow._join_lanes,
    "BAR": Flow._synchronize,
    "UCGABAR_ARV": Flow._arrive_at_cluster,
    "UCGABAR_WAIT": Flow._wait_for_cluster,
}
CONTROL = frozenset(_CONTROL)
"""Names of the instructions that move threads elsewhere, or make them wait."""
