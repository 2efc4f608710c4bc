"""The ranks whose batches are one batch: what they tell each other, and what a rank does that cannot go on."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybn._arrays.devices import current, full
from cupybn._arrays.dtypes import FLOATS
from cupybn._arrays.kinds import kind
from cupybn._ranks.engines import CapturingError, Engine

Array = Any  # numpy.ndarray or cupy.ndarray

FAILED = "!"
"""What the text of a rank begins with that has raised."""


class _Exchange(enum.Enum):
    """How far that of a call has come."""

    AHEAD = enum.auto()
    """Nothing has been sent."""
    BEGUN = enum.auto()
    """Something may have been sent."""
    OVER = enum.auto()
    """All has been sent and received: the other ranks go on."""
    RAISED = enum.auto()
    """All ranks raise, and none waits for anything."""


class Group:
    """The ranks of one layer.

    A message that says that its rank has failed is as long as those that the others expect: no rank waits for one that
    will not come, and no message is taken for another one. So that lengths are the same, ranks compare their numbers of
    channels in texts, which all have one length: before the first exchange of a layer, and before every one if only
    the input has a number of channels.

    Parameters
    ----------
    engine : Engine
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._agreed: int | None = None  # channels, in the last texts
        self._compared = False  # whether this call needs no texts
        self._exchange = _Exchange.AHEAD
        self._behind: str | None = None  # why this rank did not finish its last call

    @contextlib.contextmanager
    def taking_part(self, forward: bool, channels: int | None, device: str) -> Iterator[Group]:
        """A call that has one exchange: if it raises before, the other ranks are told, and raise as well.

        If it raises afterwards, they have gone on. They are told at the next call, which raises. If it is cut off in
        between, by Ctrl-C or by an error that the others have not got as well, no layer sends anything more over this
        communicator: it might be taken for another message.

        Parameters
        ----------
        forward : bool
            Which exchange: `gather` or `sum`.
        channels : int or None
            Of the layer. None if only the input has a number of them.
        device : str
            Of the layer.
        """
        lost = self.engine.lost
        if lost is not None:
            raise RuntimeError(f"this rank has lost the other ranks of this communicator: {lost}")
        self._exchange = _Exchange.AHEAD
        self._compared = channels is not None and (not forward or channels == self._agreed)
        try:
            if self._behind is not None:
                told, self._behind = self._behind, None
                raise RuntimeError(f"this rank is behind the others since {told}")
            yield self
        except BaseException as error:
            text = f"{type(error).__qualname__}: {error}".removesuffix(": ")
            try:
                if self._exchange is _Exchange.AHEAD:
                    self._exchange = _Exchange.BEGUN
                    with contextlib.suppress(Exception):  # what this rank was to say is worth more than how that failed
                        self._withdraw(FAILED + text, forward, channels, device)
                        self._exchange = _Exchange.RAISED
            finally:  # also if this is interrupted in its turn
                if self._exchange is _Exchange.OVER:
                    self._behind = text
                elif self._exchange is _Exchange.BEGUN and self.engine.lost is None:
                    self.engine.lost = text
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
        channels = row.shape[1] // 2
        arrays = {"numpy": "NumPy", "cupy": "CuPy"}[kind(row) or ""]
        text = f"{channels} channels of {dtype.name} in {arrays} arrays"
        header = np.array([FLOATS.index(dtype.name), count], np.float64)
        self._exchange = _Exchange.BEGUN
        if not self._compared:
            self._compare(text)
            self._agreed = channels
        rows, headers = self.engine.gather(row, header)
        if headers is not None:
            if (headers[:, 0] != headers[0, 0]).any():
                self._compare(text)
            if headers[:, 1].sum() == 1:
                self._exchange = _Exchange.RAISED
                raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks together")
        self._exchange = _Exchange.OVER
        return rows

    def sum(self, row: Array) -> Array:
        """The sum of the rows of `merge_sums` of all ranks.

        Raises
        ------
        RuntimeError
            If a rank has raised, or does not answer.
        """
        header = np.zeros(1)
        self._exchange = _Exchange.BEGUN
        total, headers = self.engine.sum(row, header)
        if headers is not None and headers[0] > 0:
            self._compare("a pass backward")
        self._exchange = _Exchange.OVER
        return total

    def _withdraw(self, text: str, forward: bool, channels: int | None, device: str) -> None:
        """Say that this rank has failed in the exchange that the others are waiting in, then why."""
        if self._compared:
            assert channels is not None
            n = 1 + 2 * channels if forward else 2 * channels
            row = full((1, n), np.nan, np.dtype(np.float64), device)
            with current(row):
                if forward:
                    _, headers = self.engine.gather(row, np.array([np.nan, 0]))
                else:
                    _, headers = self.engine.sum(row, np.ones(1))
            if headers is None:
                return  # nobody has seen it: they go on with NaN
        with contextlib.suppress(CapturingError):
            self.engine.texts(text)

    def _compare(self, text: str) -> None:
        """Raise unless all ranks say the same."""
        try:
            texts = self.engine.texts(text)
        except CapturingError:
            self._exchange = _Exchange.RAISED
            raise
        failures = [f"rank {rank} raised {said[1:]}" for rank, said in enumerate(texts) if said.startswith(FAILED)]
        if failures:
            self._exchange = _Exchange.RAISED
            raise RuntimeError(f"synchronized batch norm: {'; '.join(failures)}")
        if len(set(texts)) > 1:
            self._exchange = _Exchange.RAISED
            told = "; ".join(f"rank {rank} has {said}" for rank, said in enumerate(texts))
            raise RuntimeError(f"synchronized batch norm: expected the same on all ranks ({told})")
