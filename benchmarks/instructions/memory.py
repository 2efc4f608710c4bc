"""Loads and stores of global, shared and local memory, and which of them are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructions.lanes import Array, Lanes, Read, UnknownInstruction

WINDOW = 0x7F00
"""Upper half of the generic addresses that stand for shared memory."""
LOCAL = 4 << 10
"""Bytes of a thread's local memory: its stack."""
RESERVED = 1 << 10
"""Bytes of shared memory that CUDA keeps, from sm_90 on the first ones."""
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_WRITTEN = {1: 1, 2: 0x0101, 4: 0x01010101}
"""Marks of 1, 2 and 4 bytes that were all written, as one integer."""
_TERM = re.compile(r"([+-]?)(0x[0-9a-f]+|U?R(?:\d+|Z))((?:\.\w+)*)")


class WrongAccess(Exception):  # noqa: N818
    """An access out of bounds, at an address that is no multiple of its size, or to what nobody has written."""


class Space:
    """Memory that loads and stores reach.

    Parameters
    ----------
    data : uint8 array
    base : int
        The address of the first byte.
    initialised : uint8 array, optional
        1 for each byte that was written; a load of any other byte is wrong. None: all may be loaded.
    """

    def __init__(self, data: Array, base: int = 0, initialised: Array | None = None) -> None:
        self._base, self._size = np.uint64(base), data.size
        self._data = {1: data, 2: data.view(np.uint16), 4: data.view(np.uint32)}
        self._written = None if initialised is None else {n: initialised.view(f"u{n}") for n in self._data}

    def load(self, addresses: Array, size: int, signed: bool) -> list[Array]:
        """The values of the registers that a load fills, for each address."""
        unit, places = self._places(addresses, size)
        if self._written and not all((self._written[unit][at] == _WRITTEN[unit]).all() for at in places):
            raise WrongAccess("a load of what nobody has written")
        values = [self._data[unit][at] for at in places]
        if signed:
            return [value.view(f"i{unit}").astype(np.int32).view(np.uint32) for value in values]
        return [value.astype(np.uint32) for value in values]

    def store(self, addresses: Array, size: int, registers: Sequence[Array]) -> None:
        """Write the values of registers to each address, one register behind the other."""
        unit, places = self._places(addresses, size)
        for at, register in zip(places, registers, strict=True):
            self._data[unit][at] = register
            if self._written:
                self._written[unit][at] = _WRITTEN[unit]

    def _places(self, addresses: Array, size: int) -> tuple[int, list[Array]]:
        """The size of a unit, at most four bytes, and the indices of the units at each address."""
        at = (addresses - self._base).view(np.int64)
        if (at < 0).any() or (at + size > self._size).any():
            raise WrongAccess("an access beyond all memory")
        if (at % size).any():
            raise WrongAccess(f"{size} bytes at a crooked address")
        unit = min(size, 4)
        return unit, [at // unit + n for n in range(size // unit)]


class Memory:
    """Global, shared and local memory of the threads of some blocks.

    Parameters
    ----------
    space : Space
        Global memory.
    slots, ranks : int arrays
        For each thread the number of its block, and the place of the block in its cluster.
    shared : int
        Bytes of a block's shared memory.
    """

    def __init__(self, lanes: Lanes, space: Space, slots: Array, ranks: Array, shared: int) -> None:
        self.lanes, self.space = lanes, space
        self.pitch = -(-(shared + RESERVED) // 16) * 16
        self.shared = Space(np.zeros(self.pitch * (int(slots.max()) + 1), np.uint8))
        self.local = Space(np.zeros(LOCAL * lanes.threads, np.uint8))
        self.slots, self.first = slots.astype(np.uint64), (slots - ranks).astype(np.uint64)
        self._bases = np.arange(lanes.threads, dtype=np.uint64) * np.uint64(LOCAL)

    def compile(self, opcode: str, operands: Sequence[str]) -> Callable[[Array], None] | None:
        """A function that does a load or store for the threads of a mask; None if the instruction is neither."""
        name, *modifiers = opcode.split(".")
        size = next((_BYTES[m] for m in modifiers if m in _BYTES), 4)
        signed = bool({"S16", "S8"} & set(modifiers))
        place = {"G": self._global, "S": self._in_shared, "L": self._in_local, "": self._generic}
        if name == "LDGSTS":
            return self._copy(self._address(operands[0], False), self._address(operands[1], True), size)
        if name not in ("LD", "LDG", "LDS", "LDL", "ST", "STG", "STS", "STL"):
            return None
        find = place[name[2:]]
        wide = name[2:] in ("G", "")
        if name.startswith("LD"):
            return self._load(find, operands[0], self._address(operands[1], wide), size, signed)
        return self._store(find, self._address(operands[0], wide), operands[1], size)

    def _load(self, find: Any, target: str, address: Read, size: int, signed: bool) -> Callable[[Array], None]:
        writers = [self.lanes.writer(name, "u") for name in registers(target, size)]

        def load(mask: Array) -> None:
            if not mask.any():
                return
            space, at = find(np.broadcast_to(address(), mask.shape)[mask], mask)
            value = np.empty(mask.shape, np.uint32)
            for writer, found in zip(writers, space.load(at, size, signed), strict=True):
                value[mask] = found
                writer(value, mask)

        return load

    def _store(self, find: Any, address: Read, source: str, size: int) -> Callable[[Array], None]:
        readers = [self.lanes.reader(name, "u") for name in registers(source, size)]

        def store(mask: Array) -> None:
            if mask.any():
                space, at = find(np.broadcast_to(address(), mask.shape)[mask], mask)
                space.store(at, size, [np.broadcast_to(read(), mask.shape)[mask] for read in readers])

        return store

    def _copy(self, target: Read, source: Read, size: int) -> Callable[[Array], None]:
        """LDGSTS (cp.async): the copy is done at once."""

        def copy(mask: Array) -> None:
            if mask.any():
                space, at = self._global(np.broadcast_to(source(), mask.shape)[mask], mask)
                found = space.load(at, size, False)
                space, at = self._in_shared(np.broadcast_to(target(), mask.shape)[mask], mask)
                space.store(at, size, found)

        return copy

    def _global(self, address: Array, mask: Array) -> tuple[Space, Array]:  # noqa: ARG002
        return self.space, address

    def _in_shared(self, address: Array, mask: Array) -> tuple[Space, Array]:
        """Places in the shared memory of a thread's own block, whichever block the address names."""
        return self.shared, self._within(address, self.slots[mask])

    def _in_local(self, address: Array, mask: Array) -> tuple[Space, Array]:
        return self.local, address + self._bases[mask]

    def _generic(self, address: Array, mask: Array) -> tuple[Space, Array]:
        """Places of generic addresses: in global memory, or in the shared memory of a block of the cluster."""
        there = address >> np.uint64(32) == WINDOW
        if not there.any():
            return self.space, address
        if not there.all():
            raise UnknownInstruction("an access to both global and shared memory")
        rank = (address & np.uint64(0xFFFFFFFF)) >> np.uint64(24)
        return self.shared, self._within(address, self.first[mask] + rank)

    def _within(self, address: Array, slots: Array) -> Array:
        place = address & np.uint64(0xFFFFFF)
        if (place >= self.pitch).any():
            raise WrongAccess("an access beyond the block's shared memory")
        return place + slots * np.uint64(self.pitch)

    def _address(self, text: str, wide: bool) -> Read:
        """A function that returns the sum in brackets. Registers have 64 bits if they say so; where a wide sum names no
        size, all have.
        """
        inside = text[text.rindex("[") + 1 : -1].replace("+-", "-")
        terms: list[Read] = []
        matched = list(_TERM.finditer(inside))
        if "".join(m[0] for m in matched) != inside:
            raise UnknownInstruction(f"address {text}")
        pairs = wide and not any(m[3] for m in matched)  # sm_75 writes no .64
        for m in matched:
            sign, name, suffix = m[1], m[2], m[3]
            if name.startswith("0x"):
                number = np.array([int(name, 16)], np.uint64)
                terms.append(lambda value=-number if sign == "-" else number: value)  # type: ignore[misc]
                continue
            scale = re.search(r"\.X(\d+)", suffix)
            pair = suffix == ".64" or (wide and name.startswith("UR")) or pairs
            read = self.lanes.reader(name, "w" if pair else "k")
            terms.append(_scaled(read, np.uint64(scale[1])) if scale else read)

        def address() -> Array:
            total: Array = sum((term() for term in terms[1:]), terms[0]())
            return total if wide else total & np.uint64(0xFFFFFFFF)

        return address


def registers(first: str, size: int) -> list[str]:
    """The names of the registers that so many bytes fill."""
    first = first.replace(".reuse", "")
    found = re.fullmatch(r"(U?R)(\d+)", first)
    count = max(1, size // 4)
    if found is None:  # RZ, which stands for all of them
        return [first] * count
    return [f"{found[1]}{int(found[2]) + n}" for n in range(count)]


def _scaled(read: Read, factor: Any) -> Read:
    return lambda: read() * factor
