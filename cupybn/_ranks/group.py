"""A group of ranks that share one batch: what they send each other, and what happens when one of them raises."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybn._arrays.devices import full, on_device_of
from cupybn._arrays.dtypes import FLOATS
from cupybn._arrays.kinds import kind
from cupybn._ranks.engines import CapturingError, Engine

Array = Any  # numpy.ndarray or cupy.ndarray

FAILED = "!"
"""First character of the text sent by a rank that raised."""


class _Exchange(enum.Enum):
    """Progress of a call's exchange. It decides what a rank owes the others if it raises."""

    AHEAD = enum.auto()
    """The exchange is still to come: this rank has sent nothing, and the others will wait for its message."""
    BEGUN = enum.auto()
    """This rank may have sent something, and does not know what the others wait for."""
    OVER = enum.auto()
    """This rank has sent and received everything; the others go on."""
    RAISED = enum.auto()
    """Every rank raises, so none waits for a message."""


class Group:
    """The ranks of one layer, which exchange one row in each call.

    Every call takes these steps, on all ranks at the same time::

        1. compare    texts: "3 channels of float32 in NumPy arrays". Left out where all ranks are known to have the
                      same number of channels.
        2. exchange   `gather` in a forward pass, `sum` in a backward pass: a row of statistics, and beside it a
                      header, which shows whether a rank has failed: (dtype, count), with NaN for the dtype if it has,
                      or (0 or 1).
        3. compare    texts, only where a header says that a rank has failed or that dtypes differ: all ranks raise.
        4. over       each rank goes on by itself.

    MPI and NCCL match messages by their order and expect them to have the same length on all ranks. All texts have one
    length; rows have one only if the ranks agree on the number of channels. So ranks compare texts before the first
    exchange of a layer, and before each one if the layer has no arrays and only the input tells the number of channels.

    A rank that raises must not leave the others waiting::

        it raises                 what it sends                          what the other ranks do
        ------------------------  -------------------------------------  ---------------------------------------
        before it has sent        its error as the text of step 1 or,    raise that error
        anything                  where that is left out, a header that
                                  says "failed", then the error in a text
        in step 1, 2 or 3, and    nothing more, by any layer on this     wait for it until their timeout
        the others do not raise   communicator: it might be taken for
                                  another message
        in step 4                 its error, in the next call            have gone on; raise in their next call

    Where what ranks hold need not be alike (`cupybn._ranks.totals`), `texts` and `rows` are steps 1 and 2: the ranks
    compare texts in every call, by rules of their own, and there is no step 3.

    With NCCL the host does not see headers. A rank that fails before step 2 then sends a row of NaN, and the other
    ranks go on with NaN.

    Parameters
    ----------
    engine : Engine
    name : str
        What the ranks do together, for messages.
    """

    def __init__(self, engine: Engine, name: str = "synchronized batch norm") -> None:
        self.engine = engine
        self._name = name
        self._agreed: int | None = None  # number of channels that all ranks had when they last compared texts
        self._same_lengths = False  # whether rows are known to have one length in this call: step 1 is left out
        self._exchange = _Exchange.AHEAD
        self._behind: str | None = None  # error of this rank's last call, if the other ranks finished theirs

    @contextlib.contextmanager
    def taking_part(self, forward: bool, channels: int | None, device: str) -> Iterator[Group]:
        """Context of one call. If it raises, the other ranks learn of it in the way that the class describes.

        Parameters
        ----------
        forward : bool
            Which exchange the call has: `gather` if True, else `sum`.
        channels : int or None
            Number of channels of the layer; None if only the input has one.
        device : str
            Device of the layer.

        Raises
        ------
        RuntimeError
            If this rank lost the other ranks or fell behind them in an earlier call.
        """
        lost = self.engine.lost
        if lost is not None:
            raise RuntimeError(f"this rank has lost the other ranks of this communicator: {lost}")
        self._exchange = _Exchange.AHEAD
        # A backward pass comes after a forward pass, in which the ranks have agreed.
        self._same_lengths = channels is not None and (not forward or channels == self._agreed)
        try:
            if self._behind is not None:
                told, self._behind = self._behind, None
                raise RuntimeError(f"this rank is behind the others since {told}")
            yield self
        except BaseException as error:
            text = f"{type(error).__qualname__}: {error}".removesuffix(": ")  # some errors have no message
            try:
                if self._exchange is _Exchange.AHEAD:
                    self._exchange = _Exchange.BEGUN
                    with contextlib.suppress(Exception):  # the error of the call matters more than one in telling it
                        self._withdraw(FAILED + text, forward, channels, device)
                        self._exchange = _Exchange.RAISED
            finally:  # even if Ctrl-C interrupts the lines above
                if self._exchange is _Exchange.OVER:
                    self._behind = text
                elif self._exchange is _Exchange.BEGUN and self.engine.lost is None:
                    self.engine.lost = text
            raise

    def gather(self, row: Array, count: int, dtype: np.dtype[Any]) -> Array:
        """Rows of all ranks, one below the other: the exchange of a forward pass.

        Parameters
        ----------
        row : (1, 1 + 2 C) array
            This rank's row, as `merge_moments` makes it.
        count : int
            Number of values per channel on this rank.
        dtype : dtype
            Dtype of the input.

        Returns
        -------
        (ranks, 1 + 2 C) array

        Raises
        ------
        RuntimeError
            If ranks disagree on the number of channels or the dtype, or if one has raised or does not answer.
        ValueError
            If all ranks together have only one value per channel.
        """
        channels = row.shape[1] // 2
        arrays = {"numpy": "NumPy", "cupy": "CuPy"}[kind(row) or ""]
        text = f"{channels} channels of {dtype.name} in {arrays} arrays"
        header = np.array([FLOATS.index(dtype.name), count], np.float64)
        self._exchange = _Exchange.BEGUN
        if not self._same_lengths:
            self._compare(text)
            self._agreed = channels
        rows, headers = self.engine.gather(row, header)
        if headers is not None:
            if (headers[:, 0] != headers[0, 0]).any():  # dtypes differ, or a rank has failed: NaN equals nothing
                self._compare(text)
            if headers[:, 1].sum() == 1:
                self._exchange = _Exchange.RAISED
                raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks together")
        self._exchange = _Exchange.OVER
        return rows

    def sum(self, row: Array) -> Array:
        """Sum of the rows of all ranks, which `merge_sums` makes: the exchange of a backward pass.

        Raises
        ------
        RuntimeError
            If a rank has raised, or does not answer.
        """
        header = np.zeros(1)
        self._exchange = _Exchange.BEGUN
        total, headers = self.engine.sum(row, header)
        if headers is not None and headers[0] > 0:  # number of ranks that have failed
            self._compare("a pass backward")
        self._exchange = _Exchange.OVER
        return total

    def texts(self, text: str) -> list[str]:
        """Texts of all ranks, in their order: step 1 of a call whose ranks compare them by rules of their own.

        A call in which they do not fit ends with `all_raise`.

        Raises
        ------
        RuntimeError
            If a rank has raised, or does not answer.
        """
        self._exchange = _Exchange.BEGUN
        try:
            texts = self.engine.texts(text)
        except CapturingError:  # on all ranks, since all of them capture this call
            self._exchange = _Exchange.RAISED
            raise
        failures = [f"rank {rank} raised {said[1:]}" for rank, said in enumerate(texts) if said.startswith(FAILED)]
        if failures:
            self._exchange = _Exchange.RAISED
            raise RuntimeError(f"{self._name}: {'; '.join(failures)}")
        return texts

    def rows(self, row: Array) -> Array:
        """Rows of all ranks, (ranks, n), which have one length, as their texts have shown: step 2 of such a call."""
        rows, _ = self.engine.gather(row, np.zeros(1))
        self._exchange = _Exchange.OVER
        return rows

    def all_raise(self) -> None:
        """Note that every rank is about to raise, by what all of them have been told."""
        self._exchange = _Exchange.RAISED

    def _withdraw(self, text: str, forward: bool, channels: int | None, device: str) -> None:
        """Take this rank's part in the exchange that the others wait in, to say that it has failed, and then why."""
        if self._same_lengths:
            assert channels is not None
            n = 1 + 2 * channels if forward else 2 * channels
            row = full((1, n), np.nan, np.dtype(np.float64), device)
            with on_device_of(row):
                if forward:
                    _, headers = self.engine.gather(row, np.array([np.nan, 0]))
                else:
                    _, headers = self.engine.sum(row, np.ones(1))
            if headers is None:
                return  # the hosts of the other ranks see no headers: they go on with NaN, and expect no text
        with contextlib.suppress(CapturingError):
            self.engine.texts(text)

    def _compare(self, text: str) -> None:
        """Raise unless all ranks send the same text, and none of them a failure."""
        texts = self.texts(text)
        if len(set(texts)) > 1:
            self._exchange = _Exchange.RAISED
            told = "; ".join(f"rank {rank} has {said}" for rank, said in enumerate(texts))
            raise RuntimeError(f"{self._name}: expected the same on all ranks ({told})")
