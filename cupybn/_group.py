"""The ranks whose batches are one batch: what they tell each other, and what a rank does that cannot go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybn._devices import current, empty
from cupybn._dtypes import FLOATS
from cupybn._engines import Engine

Array = Any  # numpy.ndarray or cupy.ndarray

FAILED = "!"
"""What the text of a rank begins with that has raised."""


class Group:
    """The ranks of one layer.

    A message that says that its rank has failed is as long as those that the others expect: no rank waits for one that
    will not come, and no message is taken for another one. So that lengths are the same, ranks agree on the number of
    channels before the first exchange.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine) -> None:
        self.kinds = engine.kinds  # of arrays
        self._engine = engine
        self._agreed: set[int] = set()  # numbers of channels
        self._row: Array | None = None  # of the last pass forward
        self._spoke = False  # since the call began

    @contextlib.contextmanager
    def taking_part(self, forward: bool) -> Iterator[Group]:
        """A call that has one exchange: if it raises before, the other ranks are told, and raise as well."""
        self._spoke = False
        try:
            yield self
        except Exception as error:
            if not self._spoke:
                with contextlib.suppress(RuntimeError):  # what it was to say is worth more than that nobody listens
                    self._withdraw(f"{FAILED}{type(error).__qualname__}: {error}", forward)
            raise

    def gather(self, row: Array, count: int, dtype: np.dtype[Any]) -> Array:
        """The rows of `merge_moments` of all ranks.

        Parameters
        ----------
        row : (1, 1 + 2 C) array
        count : int
            Of values for each channel on this rank.
        dtype : dtype
            Of the input.

        Returns
        -------
        (ranks, 1 + 2 C) array

        Raises
        ------
        RuntimeError
            If ranks do not agree on the number of channels or the dtype, if one has raised, or does not answer.
        ValueError
            If there is but one value for each channel on all ranks.
        """
        self._spoke = True
        channels = row.shape[1] // 2
        text = f"{channels} channels of {dtype.name}"
        if channels not in self._agreed:
            self._compare(text)
            self._agreed.add(channels)
        self._row = row
        rows, headers = self._engine.gather(row, np.array([FLOATS.index(dtype.name), count], np.float64))
        if headers is not None:
            if (headers[:, 0] != headers[self._engine.rank, 0]).any():
                self._compare(text)
            if headers[:, 1].sum() == 1:
                raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks together")
        return rows

    def sum(self, row: Array) -> Array:
        """The sum of the rows of `merge_sums` of all ranks.

        Raises
        ------
        RuntimeError
            If a rank has raised, or does not answer.
        """
        self._spoke = True
        total, headers = self._engine.sum(row, np.zeros(1))
        if headers is not None and headers[0] > 0:
            self._compare("")
        return total

    def _withdraw(self, text: str, forward: bool) -> None:
        """Say that this rank has failed in the exchange that the others are waiting in, then why."""
        if self._row is not None:
            with current(self._row):
                row = empty(self._row.shape if forward else (1, self._row.size - 1), self._row)
                row.fill(np.nan)
                if forward:
                    headers = self._engine.gather(row, np.array([np.nan, 0]))[1]
                else:
                    headers = self._engine.sum(row, np.ones(1))[1]
            if headers is None:
                return  # nobody has seen it: they go on with NaN
        self._engine.texts(text)

    def _compare(self, text: str) -> None:
        """Raise unless all ranks say the same."""
        texts = self._engine.texts(text)
        failures = [f"rank {rank} raised {said[1:]}" for rank, said in enumerate(texts) if said.startswith(FAILED)]
        if failures:
            raise RuntimeError(f"synchronized batch norm: {'; '.join(failures)}")
        if len(set(texts)) > 1:
            told = "; ".join(f"rank {rank} has {said}" for rank, said in enumerate(texts))
            raise RuntimeError(f"synchronized batch norm: expected the same on all ranks ({told})")


def group_of(engine: Engine) -> Group | None:
    """Its ranks, or None if there is but one, which has nobody to talk to."""
    return Group(engine) if engine.size > 1 else None
