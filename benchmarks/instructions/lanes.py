"""Registers and predicates of threads that run side by side, and how instructions name them.

What an operand stands for is told by a letter:

=====  ==========================================================================
``u``  32 bits
``i``  32 bits with a sign
``k``  32 bits in a 64-bit integer, for sums whose carries count
``w``  64 bits in two registers
``l``  64 bits with a sign
``q``  128 bits, as four numbers
``f``  float32, or one half of a register: a float16
``d``  float64
``p``  a predicate
``n``  a number in the text
=====  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Read = Callable[[], Any]
Write = Callable[[Array, Array], None]  # writes values to the threads of a mask

WARP = 32
UNIFORM = 256
"""Row of the first uniform register among the registers."""
ROWS = 512
ZERO = {"RZ": 255, "URZ": 511}
"""Rows of registers that stay 0, whatever is written there."""
ALL = np.uint64(0xFFFFFFFF)
TYPES = {"u": np.uint32, "i": np.int32, "f": np.float32, "w": np.uint64, "l": np.int64, "d": np.float64}
_NAMED = re.compile(r"([-~!]?)(\|?)(U?R(?:Z|\d+)|U?P(?:T|\d)|c\[(0x\w+)\]\[([^\]]+)\])((?:\.\w+)*)\|?((?:\.\w+)*)")
_NUMBERS = {"INF": np.inf, "QNAN": np.nan}


class UnknownInstruction(Exception):  # noqa: N818 - it names one
    """An instruction that is not known here, or not in this form."""


class Lanes:
    """Registers and predicates of whole warps: a row for each register, a column for each thread."""

    def __init__(self, threads: int, banks: dict[int, Array]) -> None:
        self.threads = threads
        self.banks = banks  # constant memory by number of its bank, as uint32
        self.registers = np.zeros((ROWS, threads), np.uint32)
        self.predicates = np.zeros((16, threads), bool)  # rows from 8 on are the uniform predicates
        self.predicates[[7, 15]] = True

    def reader(self, text: str, kind: str) -> Read:
        """A function that returns an operand's value: for every thread, or one element for all."""
        text = text.replace(".reuse", "").strip()
        if kind == "n":
            number = int(text, 0)
            return lambda: number
        named = _NAMED.fullmatch(text)
        if named is None:
            return _constant(text, kind)
        sign, bars, name, bank, offset, *suffixes = named.groups()
        if kind == "p":
            row = self.predicates[_predicate(name)]
            return (lambda: ~row) if sign == "!" else lambda: row
        if kind == "q" and bank and offset.startswith("0x"):
            four = self.banks[int(bank, 16)][int(offset, 16) // 4 :][:4]
            return lambda: four
        wide = kind in "wld"
        bits = self._constants(int(bank, 16), offset, wide) if bank else self._row(name, wide)
        suffix = "".join(suffixes)
        if suffix in (".H0_H0", ".H1_H1") and kind == "f":
            return _signed(_half(bits, suffix == ".H1_H1"), sign, bars)
        if suffix not in ("", ".64"):
            raise UnknownInstruction(f"operand {text}")
        if kind in "fd":
            return _signed(lambda: bits().view(TYPES[kind]), sign, bars)
        if kind == "k":
            return _with_carry(bits, sign)
        return _integer(bits, TYPES[kind], sign, bars)

    def writer(self, text: str, kind: str) -> Write:
        """A function that sets an operand to a value in the threads of a mask."""
        text = text.replace(".reuse", "").strip()
        if kind == "p":
            number = _predicate(text)
            if number in (7, 15):
                return _no_write
            flags = self.predicates[number]
            return lambda value, mask: np.copyto(flags, value, where=mask)
        row = _register(text)
        if row in ZERO.values():
            return _no_write
        low = self.registers[row]
        if kind == "q":
            four = self.registers[row : row + 4]
            return lambda value, mask: np.copyto(four, value[:, None], where=mask)
        if kind not in "wld":
            return lambda value, mask: np.copyto(low, value.view(np.uint32), where=mask)
        high = self.registers[row + 1]

        def write(value: Array, mask: Array) -> None:
            halves = np.ascontiguousarray(value).view(np.uint32).reshape(-1, 2)
            np.copyto(low, halves[:, 0], where=mask)
            np.copyto(high, halves[:, 1], where=mask)

        return write

    def _row(self, name: str, wide: bool) -> Read:
        row = _register(name)
        if row in ZERO.values():
            return _always(np.zeros(1, np.uint64 if wide else np.uint32))
        low = self.registers[row]
        if not wide:
            return lambda: low
        high = self.registers[row + 1]

        def read() -> Array:
            halves = np.empty((self.threads, 2), np.uint32)
            halves[:, 0], halves[:, 1] = low, high
            return halves.view(np.uint64)[:, 0]

        return read

    def _constants(self, bank: int, place: str, wide: bool) -> Read:
        """A function that returns a constant: at a fixed place, or at the places that a register holds."""
        *names, offset = re.split(r"\+", place) if "0x" in place else (place, "0x0")
        first = int(offset, 16) // 4
        words = self.banks[bank]
        if not names or names[0] in ZERO:
            return _always(words[first : first + 1 + wide].view(np.uint64 if wide else np.uint32))
        row = self._row(names[0], False)
        if not wide:
            return lambda: words[np.minimum(row() // 4 + first, words.size - 1)]
        pairs = words[first : first + (words.size - first) // 2 * 2].view(np.uint64)
        return lambda: pairs[np.minimum(row() // 8, pairs.size - 1)]


def _no_write(value: Array, mask: Array) -> None:
    """Ignore a value that is written to a register or predicate whose value is fixed."""


def _register(name: str) -> int:
    """The row of a register, by its name."""
    if name in ZERO:
        return ZERO[name]
    found = re.fullmatch(r"(U?)R(\d+)", name)
    if found is None:
        raise UnknownInstruction(f"register {name}")
    return UNIFORM * bool(found[1]) + int(found[2])


def _predicate(name: str) -> int:
    """The row of a predicate, by its name."""
    number = name.lstrip("!UP")
    return 8 * ("U" in name) + (7 if number == "T" else int(number))


def _always(value: Array) -> Read:
    return lambda: value


def _constant(text: str, kind: str) -> Read:
    """A number that stands in the instruction's text, as an array of one element."""
    try:
        if kind in "fd":
            sign = -1 if text.startswith("-") else 1
            magnitude = text.lstrip("+-")
            value = sign * _NUMBERS[magnitude] if magnitude in _NUMBERS else float(text)
            return _always(np.array([value], TYPES[kind]))
        bits = 64 if kind in "wl" else 32
        number = int(text, 0) & ((1 << bits) - 1)
    except ValueError:
        raise UnknownInstruction(f"operand {text}") from None
    if kind == "k":
        return _always(np.array([number], np.uint64))
    return _always(np.array([number], f"u{bits // 8}").view(TYPES[kind]))


def _half(bits: Read, high: bool) -> Read:
    shift = np.uint32(16 * high)
    return lambda: (bits() >> shift).astype(np.uint16).view(np.float16).astype(np.float32)


def _signed(value: Read, sign: str, bars: str) -> Read:
    """A function that returns a float with its sign or bars applied: itself, its magnitude, or minus either."""
    if bars and sign:
        return lambda: -np.abs(value())
    if bars:
        return lambda: np.abs(value())
    return (lambda: -value()) if sign else value


def _with_carry(bits: Read, sign: str) -> Read:
    """A function that returns bits or minus these, as ~x + 1, whose carry counts."""
    if sign == "-":
        return lambda: (~bits()).astype(np.uint64) + np.uint64(1)
    if sign == "~":
        return lambda: (~bits()).astype(np.uint64)
    return lambda: bits().astype(np.uint64)


def _integer(bits: Read, dtype: Any, sign: str, bars: str) -> Read:
    if bars:
        return lambda: np.abs(bits().view(np.int32)).view(dtype)
    if sign == "-":
        return lambda: (-bits()).view(dtype)
    return (lambda: (~bits()).view(dtype)) if sign == "~" else lambda: bits().view(dtype)
