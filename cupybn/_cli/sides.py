"""Sides that `check` compares: kernels, mirrors, the formula; and how far their results may be apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import import_cupy
from cupybn._cli.cases import HALF_ULP

Array = npt.NDArray[Any]
Bundle = TypeVar("Bundle", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Side:
    """The steps of one implementation, and functions that bring arrays to it and back."""

    ops: Any
    name: str
    second: Any = None
    """Module with the steps of second order, which batch norm has."""

    def put(self, array: Array, offset: int = 0) -> Any:
        """A copy for this side; on a device its memory begins some elements after an aligned address."""
        if self.name != "kernels":
            return array.copy()
        memory = import_cupy().empty(array.size + offset, array.dtype)
        view = memory[offset:].reshape(array.shape)
        view[...] = import_cupy().asarray(array)
        return view

    def put_all(self, bundle: Bundle, offset: int = 0) -> Bundle:
        """A bundle whose arrays are copies for this side."""
        return _each(bundle, lambda array: self.put(array, offset))

    def out(self, like: Array, offset: int = 0) -> Any:
        """An array for results, of float64 where nothing is to be rounded."""
        return self.put(np.zeros(like.shape, np.float64 if self.name == "formula" else like.dtype), offset)

    def host(self, array: Any) -> Array:
        """An array of this side on the host."""
        host: Array = array.get() if self.name == "kernels" else np.asarray(array)
        return host

    def host_all(self, bundle: Bundle) -> Bundle:
        """A bundle whose arrays are on the host."""
        return _each(bundle, self.host)


def _each(bundle: Bundle, convert: Callable[[Any], Any]) -> Bundle:
    """The bundle with its arrays converted; numbers, names and None stay what they are."""
    return type(bundle)(*(convert(field) if hasattr(field, "dtype") else field for field in bundle))


class HasUnit(Protocol):
    """Arguments of steps, as far as bounds depend on them."""

    @property
    def unit(self) -> float:
        """A unit in the last place of the arithmetic."""


class Result(NamedTuple):
    """A result of a step, and how far that of another side may be from it."""

    value: Array
    roundings: float
    """Units in the last place of the arithmetic that the size may be off by; 0 for what no rounding touches."""
    size: Any
    """The size of the terms that the result is a sum of."""
    exact: bool = False
    """Whether kernels must have the very bits of their mirrors."""

    def bound(self, case: HasUnit, against_mirrors: bool) -> Array:
        """The largest allowed difference, element by element."""
        if self.exact and against_mirrors:
            return np.zeros(self.value.shape)
        last = 2 * HALF_ULP.get(self.value.dtype.name, 0) * np.abs(self.value.astype(np.float64))
        bound: Array = self.roundings * case.unit * self.size + last
        return bound


Results = dict[str, Result]


class Step(NamedTuple):
    """A step to check: the function that runs it on a side, and the variants to run it in."""

    run: Callable[[Any, Side], Results]
    variants: tuple[Any, ...]


def worst(case: HasUnit, run: Callable[[Any, Side], Results], ours: Side, referee: Side) -> tuple[float, str]:
    """The largest error as a share of its bound, and the name of the result that has it; more than 1 is a miss."""
    found, expected = run(case, ours), run(case, referee)
    against_mirrors = referee.name == "mirrors"
    shares = [(share_of_bound(found[name].value, of, case, against_mirrors), name) for name, of in expected.items()]
    return max(shares)


def share_of_bound(found: Array, expected: Result, case: HasUnit, against_mirrors: bool) -> float:
    if found.shape != expected.value.shape:
        return np.inf
    error = np.abs(found.astype(np.float64) - expected.value.astype(np.float64))
    bound = np.broadcast_to(expected.bound(case, against_mirrors), error.shape)
    if not against_mirrors and found.dtype.name in HALF_ULP:  # it is rounded once more than the formula's
        bound = bound + 2 * HALF_ULP[found.dtype.name] * np.abs(expected.value.astype(np.float64))
    share = np.divide(error, bound, out=np.where(error == 0, 0.0, np.inf), where=bound > 0)
    return float(np.max(np.where(np.isnan(share), np.inf, share), initial=0.0))
