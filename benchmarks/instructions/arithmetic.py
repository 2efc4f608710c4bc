"""The instructions that compute: all but memory, control flow, and what the threads of a warp tell each other.

Each name has a function of modifiers and operands that returns a form: the letters of `lanes` for what is written and
read, such as ``"u=uuu"``, and a function of the values read, which returns what is written. Uniform instructions, whose
names begin with a U, are those without.

Rounding is to nearest, subnormal numbers are kept, and approximations are exact: branches are the same.
"""

# Functions behind `@form` all have the same parameters, whether they need them or not.
# ruff: noqa: ARG001, ARG005

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructions.lanes import ALL, Array, UnknownInstruction

Form = tuple[str, Callable[..., Any]]
Make = Callable[[list[str], Sequence[str]], Form]
FORMS: dict[str, Make] = {}
U32, U64, I64, F32, F64 = np.uint32, np.uint64, np.int64, np.float32, np.float64


def form_of(opcode: str, operands: Sequence[str]) -> Form | None:
    """The form of an instruction; None if its name is unknown."""
    name, *modifiers = opcode.split(".")
    make = FORMS.get(name) or FORMS.get(name.removeprefix("U"))
    return None if make is None else make(modifiers, operands)


def form(*names: str) -> Callable[[Make], Make]:
    """A decorator for the function that gives the form of these instructions."""

    def note(make: Make) -> Make:
        FORMS.update(dict.fromkeys(names, make))
        return make

    return note


def always(name: str, letters: str, function: Callable[..., Any]) -> None:
    """Enter an instruction that has one form whatever its modifiers."""
    FORMS[name] = lambda modifiers, operands: (letters, function)


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate, perhaps negated."""
    return re.fullmatch(r"!?U?P[T\d]", operand) is not None


def low(value: Array) -> Array:
    """The lower 32 bits of each value."""
    return (value & ALL).astype(U32)


# ---------------------------------------------------------------------------------------------------------------------
# Integers

always("VIADD", "u=uu", operator.add)
always("IABS", "u=i", lambda x: np.abs(x).view(U32))
always("POPC", "u=u", lambda x: np.bitwise_count(x).astype(U32))
always("CS2R", "w=_", lambda: np.zeros(1, U64))


@form("MOV", "LDC", "LDCU")
def move(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a move of 32, 64 or 128 bits."""
    if not {"32", "64", "128", "U32", "SPILL"}.issuperset(modifiers):
        raise UnknownInstruction("of this size")
    return "q=q" if "128" in modifiers else "w=w" if "64" in modifiers else "u=u", lambda x: x


@form("SEL")
def select(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of an instruction that chooses between two values."""
    return ("w=wwp" if "64" in modifiers else "u=uup"), lambda a, b, p: np.where(p, a, b)


@form("IMAD")
def multiply_add(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a * b + c; WIDE: the product has 64 bits; HI: the upper half of that."""
    unsigned = "U32" in modifiers
    if not {"WIDE", "HI"} & set(modifiers):
        if "X" in modifiers:
            return "u=uuup", lambda a, b, c, carry: a * b + c + carry.astype(U32)
        return "u=uuu", lambda a, b, c: a * b + c

    def product(a: Array, b: Array) -> Array:
        return a.astype(U64) * b if unsigned else (a.astype(I64) * b).view(U64)

    letters = "uuw" if unsigned else "iiw"
    if "HI" in modifiers:
        return f"u={letters}", lambda a, b, c: ((product(a, b) + c) >> U64(32)).astype(U32)
    if is_predicate(operands[1]):

        def with_carry(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
            total = product(a, b) + c
            return total, total < c

        return f"wp={letters}", with_carry
    if "X" in modifiers:
        return f"w={letters}p", lambda a, b, c, carry: product(a, b) + c + carry.astype(U64)
    return f"w={letters}", lambda a, b, c: product(a, b) + c


@form("IADD3", "IADD")
def add(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a sum of two or three numbers, with up to two carries in and out."""
    carries = sum(map(is_predicate, operands[1:3]))
    terms = [operand for operand in operands[1 + carries :] if not is_predicate(operand)]
    carried = len(operands) - 1 - carries - len(terms)
    if "64" in modifiers:
        if carried or any(operand not in ("PT", "UPT") for operand in operands[1 : 1 + carries]):
            raise UnknownInstruction("carries of 64-bit sums")
        return "w" + "_" * carries + "=" + "w" * len(terms), lambda *values: sum(values[1:], values[0])

    def total(*values: Array) -> Any:
        result = functools.reduce(operator.add, (value.astype(U64) for value in values))
        above = result >> U64(32)
        return (low(result), *(above > U64(n) for n in range(carries))) if carries else low(result)

    return "u" + "p" * carries + "=" + "k" * len(terms) + "p" * carried, total


@form("LEA")
def shift_add(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of (a << shift) + b; HI: the upper half of that for a of 64 bits."""
    carries = int(is_predicate(operands[1]))

    def result(shifted: Array, b: Array, carry: Any = None) -> Any:
        total = (shifted & ALL) + b + (U64(0) if carry is None else carry.astype(U64))
        return (low(total), total > ALL) if carries else low(total)

    written = "u" + "p" * carries
    extended = "p" if "X" in modifiers else ""
    if "HI" not in modifiers:
        return f"{written}=kkn", lambda a, b, shift: result(a << U64(shift), b)
    if "SX32" in modifiers:
        return f"{written}=ikn{extended}", lambda a, b, shift, *carry: result(
            (a.astype(I64) << I64(shift) >> I64(32)).view(U64), b, *carry
        )
    return f"{written}=kkkn{extended}", lambda a, b, upper, shift, *carry: result(
        (upper << U64(32) | a) << U64(shift) >> U64(32), b, *carry
    )


def _lookup(table: int, *inputs: Array) -> Array:
    """A boolean function of three inputs, bit by bit, from its table of eight values."""
    a, b, c = inputs
    few = bin(table).count("1") <= 4  # a sum of few terms; else of its negation, which has fewer
    terms = [
        (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in range(8) if (table >> n & 1) == few
    ]
    result = functools.reduce(operator.or_, terms) if terms else a & ~a
    return result if few else ~result


_SHORT = {0xC0: lambda a, b, c: a & b, 0xFC: lambda a, b, c: a | b, 0x3C: lambda a, b, c: a ^ b}


@form("LOP3")
def logic(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of any function of the bits of three numbers; with a predicate in front: whether any bit is set."""
    flagged = is_predicate(operands[0])
    table = int(operands[4 + flagged], 0)
    function = _SHORT.get(table, functools.partial(_lookup, table))
    if not flagged:
        return "u=uuu", function

    def with_flag(a: Array, b: Array, c: Array, _: int, other: Array) -> tuple[Array, Array]:
        result = function(a, b, c)
        return (result != 0) & other if "PAND" in modifiers else (result != 0) | other, result

    return "pu=uuunp", with_flag


@form("PLOP3")
def predicate_logic(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of two boolean functions of three predicates."""
    return "pp=pppnn", lambda a, b, c, one, other: (_lookup(one, a, b, c), _lookup(other, a, b, c))


@form("SHF")
def funnel_shift(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a shift of two registers as one number of 64 bits; HI: its upper half, or of the second register
    alone if the number has 32 bits.
    """
    left, high, signed = "L" in modifiers, "HI" in modifiers, bool({"S32", "S64"} & set(modifiers))
    bits = 64 if {"S64", "U64"} & set(modifiers) else 32

    def shifted(lower: Array, by: Array, upper: Array) -> Array:
        n = (by & U32(bits - 1) if "W" in modifiers else np.minimum(by, U32(bits))).astype(U64)
        whole = upper.astype(U64) << U64(32) | lower
        if left:
            result = whole << np.minimum(n, U64(63))
        elif bits == 64 or not high:
            n = np.minimum(n, U64(63))
            result = (whole.view(I64) >> n.view(I64)).view(U64) if signed else whole >> n
        else:
            return low(
                (upper.view(np.int32).astype(I64) >> n.view(I64)).view(U64) if signed else upper.astype(U64) >> n
            )
        return low(result >> U64(32)) if high else low(result)

    return "u=uuu", shifted


@form("PRMT")
def permute(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a choice of bytes out of eight; where a selector's highest bit is set, copies of the byte's sign."""
    if modifiers:
        raise UnknownInstruction("modes")

    def permuted(a: Array, selectors: Array, b: Array) -> Array:
        whole, result = b.astype(U64) << U64(32) | a, U32(0)
        for n in range(4):
            selector = selectors >> U32(4 * n) & U32(15)
            byte = whole >> (selector & U32(7)).astype(U64) * U64(8) & U64(255)
            byte = np.where(selector & U32(8), (byte >> U64(7)) * U64(255), byte)
            result = result | byte.astype(U32) << U32(8 * n)
        return result

    return "u=uuu", permuted


def _least_or_most(a: Array, b: Array, least: Array) -> Array:
    return np.where(least, np.minimum(a, b), np.maximum(a, b))


@form("IMNMX", "VIMNMX")
def least_or_most(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a minimum or maximum: the lesser number if the predicate is set, else the greater one."""
    if "S64" in modifiers or len(operands) != 4:
        raise UnknownInstruction("of 64 bits")
    return ("u=uup" if "U32" in modifiers else "i=iip"), _least_or_most


@form("VIADDMNMX")
def add_least_or_most(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a minimum or maximum of a + b and c."""
    letters = "u=uuup" if "U32" in modifiers else "i=iiip"
    return letters, lambda a, b, c, least: _least_or_most(a + b, c, least)


@form("FLO")
def first_bit(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a search for the highest bit that is set; SH: how far it is from the top."""

    def found(x: Array) -> Array:
        place = np.floor(np.log2(np.maximum(x, 1).astype(F64))).astype(np.int32)
        return np.where(x == 0, np.int32(-1), np.int32(31) - place if "SH" in modifiers else place)

    return "i=u", found


@form("BREV")
def reverse_bits(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a reversal of all bits."""

    def reversed_bits(x: Array) -> Array:
        bits = np.unpackbits(np.ascontiguousarray(x).view(np.uint8), bitorder="little")
        return np.packbits(bits).view(U32).byteswap()

    return "u=u", reversed_bits


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "EQ": operator.eq,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_NEGATED = {"NEU": "EQ", "LTU": "GE", "LEU": "GT", "GTU": "LE", "GEU": "LT"}
_COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def _compare(name: str, a: Array, b: Array) -> Array:
    """Compare integers or floats; floats by a name that ends in U compare as true if one is NaN."""
    if name == "NE":
        return (a < b) | (a > b)
    if name in ("NAN", "NUM"):
        return (np.isnan(a) | np.isnan(b)) == (name == "NAN")
    if name == "EQU":
        return ~((a < b) | (a > b))
    return ~_ORDERED[_NEGATED[name]](a, b) if name in _NEGATED else _ORDERED[name](a, b)


def _comparison(letter: str) -> Make:
    """The form of a comparison and its negation, combined with a predicate; EX: of upper halves, given the result of
    the lower ones.
    """

    def make(modifiers: list[str], operands: Sequence[str]) -> Form:
        kind = letter
        if letter == "i":
            wide = {"U64", "S64"} & set(modifiers)
            unsigned = {"U32", "U64"} & set(modifiers)
            kind = ("w" if unsigned else "l") if wide else ("u" if unsigned else "i")
        name = modifiers[0]
        if name not in (*_ORDERED, *_NEGATED, "NE", "NAN", "NUM", "EQU"):
            raise UnknownInstruction("unknown comparison")
        combine = next(_COMBINE[m] for m in modifiers if m in _COMBINE)

        def compared(a: Array, b: Array, other: Array, lower: Any = None) -> tuple[Array, Array]:
            result = _compare(name, a, b)
            if lower is not None:
                strict = {"LE": "LT", "GE": "GT"}.get(name, name)
                result = result & lower if name == "EQ" else _compare(strict, a, b) | (a == b) & lower
            return combine(result, other), combine(~result, other)

        return f"pp={kind}{kind}p" + "p" * ("EX" in modifiers), compared

    return make


FORMS |= {"ISETP": _comparison("i"), "FSETP": _comparison("f"), "DSETP": _comparison("d")}


# ---------------------------------------------------------------------------------------------------------------------
# Floats

always("FADD", "f=ff", operator.add)
always("FMUL", "f=ff", operator.mul)
always("FFMA", "f=fff", lambda a, b, c: (a.astype(F64) * b + c).astype(F32))
always("FSEL", "f=ffp", lambda a, b, p: np.where(p, a, b))
always("FCHK", "p=ff", lambda a, b: np.zeros(1, bool))
always("DADD", "d=dd", operator.add)
always("DMUL", "d=dd", operator.mul)
always("DFMA", "d=ddd", lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(F64))


@form("FMNMX", "DMNMX")
def least_or_most_float(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a minimum or maximum of floats; with NAN, NaN wins."""
    less, more = (np.minimum, np.maximum) if "NAN" in modifiers else (np.fmin, np.fmax)
    return "f=ffp", lambda a, b, least: np.where(least, less(a, b), more(a, b))


@form("HADD2")
def add_halves(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of the one sum of float16 that kernels use: it turns a float16 into a float32."""
    if modifiers != ["F32"]:
        raise UnknownInstruction("arithmetic of two halves")
    return "f=ff", operator.add


@form("HFMA2")
def multiply_add_halves(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of the one product of float16 that kernels use: it sets a register to two constants."""
    if tuple(operands[1:3]) != ("-RZ", "RZ"):
        raise UnknownInstruction("arithmetic of two halves")
    if "BF16_V2" in modifiers and set(operands[3:]) != {"0"}:
        raise UnknownInstruction("constants of bfloat16")
    both = np.array([float(operands[4]), float(operands[3])], np.float16).view(U32)
    return "u=____", lambda: both


def _narrowed(x: Array, to: str) -> Array:
    """The 16 bits of a float32 that is rounded to another dtype."""
    if to == "F16":
        return x.astype(np.float16).view(np.uint16).astype(U32)
    bits = x.view(U32)
    rounded = bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded)


@form("F2FP")
def pack(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a packing of two float32 as the halves of a register, the first one above."""
    to = "BF16" if "BF16" in modifiers else "F16"

    def packed(upper: Array, lower: Array) -> Array:
        if "RELU" in modifiers:
            upper, lower = np.fmax(upper, F32(0)), np.fmax(lower, F32(0))
        return _narrowed(upper, to) << U32(16) | _narrowed(lower, to)

    return "u=ff", packed


def _toward(x: Array, rounded: Array, mode: Sequence[str]) -> Array:
    """The value x in its rounding mode, given x rounded to nearest."""
    exact, found = x.astype(F64), rounded.astype(F64)
    if "RZ" in mode:
        return np.where(np.abs(found) > np.abs(exact), np.nextafter(rounded, F32(0)), rounded)
    if "RP" in mode:
        return np.where(found < exact, np.nextafter(rounded, F32(np.inf)), rounded)
    return rounded


@form("F2F")
def convert_float(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a conversion between dtypes of floats."""
    to, of = [m for m in modifiers if m in ("F16", "BF16", "F32", "F64")][:2]
    if (to, of) == ("F64", "F32"):
        return "d=f", lambda x: x.astype(F64)
    if (to, of) == ("F32", "F64"):
        return "f=d", lambda x: _toward(x, x.astype(F32), modifiers)
    if of == "F32":
        return "u=f", lambda x: _narrowed(x, to)
    raise UnknownInstruction(f"from {of} to {to}")


@form("I2F", "I2FP")
def convert_integer(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a conversion of integers to floats."""
    kind = next((k for m, k in (("U64", "w"), ("S64", "l"), ("U32", "u")) if m in modifiers), "i")
    if "F64" in modifiers:
        return f"d={kind}", lambda x: x.astype(F64)
    return f"f={kind}", lambda x: _toward(x, x.astype(F32), modifiers)


@form("F2I")
def convert_to_integer(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of a conversion of floats to integers, rounded towards zero."""
    if "TRUNC" not in modifiers:
        raise UnknownInstruction("rounding")
    least, most = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)
    kind = "d" if "F64" in modifiers else "f"
    return f"u={kind}", lambda x: low(
        np.clip(np.nan_to_num(np.trunc(x.astype(F64))), least, most).astype(I64).view(U64)
    )


_SPECIAL: dict[str, Callable[[Array], Array]] = {
    "RCP": lambda x: F32(1) / x,
    "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
}


@form("MUFU")
def special_function(modifiers: list[str], operands: Sequence[str]) -> Form:
    """The form of reciprocals and the like; those of float64 take and give the upper half alone."""
    name = modifiers[0]
    if name in ("RCP64H", "RSQ64H"):

        def upper_half(x: Array) -> Array:
            value = (x.astype(U64) << U64(32)).view(F64)
            return ((1 / (value if name == "RCP64H" else np.sqrt(value))).view(U64) >> U64(32)).astype(U32)

        return "u=u", upper_half
    if name not in _SPECIAL:
        raise UnknownInstruction(name)
    return "f=f", _SPECIAL[name]
