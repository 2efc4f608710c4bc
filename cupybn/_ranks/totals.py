"""Totals of all ranks as one: what `StreamingMoments` of several processes exchange."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupybn._arrays.devices import module_of, transfer
from cupybn._arrays.kinds import device_of, kind
from cupybn._ranks.group import Group
from cupybn._steps.ops import ops_for
from cupybn._steps.totals import Total

Array = Any  # numpy.ndarray or cupy.ndarray
Shape = tuple[int, ...]

NOTHING = "nothing"
"""Text of a rank that has added nothing."""
CHANNELS = " channels in "
"""Words of the texts of all others that follow the numbers of channels."""


def total_of_ranks(group: Group, total: Total | None, shape: Shape) -> tuple[Total | None, Shape]:
    """Total of all ranks, with the same bits on each, and its shape; None if no rank has added anything.

    It is on the device of this rank's own. Where some ranks have NumPy arrays, or none, all of them merge on the host:
    there the bits are the same.

    Parameters
    ----------
    group : Group
        Whose call this is in.
    total : Total or None
        This rank's own; None if it has added nothing.
    shape : tuple of ints
        Sizes along the channel axes of what was added.

    Raises
    ------
    ValueError
        On all ranks: if they have other channels, or one has nothing that the group's engine could send.
    RuntimeError
        If a rank has raised, or does not answer.
    """
    if total is None:
        texts = group.texts(NOTHING)
    else:
        group.engine.check(total.row)
        arrays = {"numpy": "NumPy", "cupy": "CuPy"}[kind(total.row) or ""]
        texts = group.texts(f"{'x'.join(map(str, shape))}{CHANNELS}{arrays} arrays")
    told = [text for text in texts if text != NOTHING]
    if not told:
        return None, ()
    _check_texts(group, texts)
    shape = tuple(map(int, told[0].partition(CHANNELS)[0].split("x")))
    on_devices = len(told) == len(texts) and all(text.endswith("CuPy arrays") for text in told)
    rows = group.rows(_packed(total, int(np.prod(shape)), on_devices))
    C = rows.shape[1] // 3
    totals = [Total(rows[r : r + 1, : 1 + 2 * C], rows[r, 1 + 2 * C :]) for r in range(len(rows))]
    merged = functools.reduce(functools.partial(_plus, ops_for(rows)), totals)
    if total is not None and device_of(total.row) != device_of(merged.row):
        merged = Total(*(transfer(array, array.dtype, device_of(total.row)) for array in merged))
    return merged, shape


def _plus(ops: Any, total: Total, other: Total) -> Total:
    """Total of both."""
    return total.plus(ops, other)


def _packed(total: Total | None, channels: int, on_device: bool) -> Array:
    """A total in one row, (1, 1 + 3 C), on its device or on the host; zeros for None."""
    if total is None:
        return np.zeros((1, 1 + 3 * channels))
    row = module_of(total.row).concatenate((total.row, total.pivot[None]), axis=1)
    return row if on_device or kind(row) == "numpy" else row.get()


def _check_texts(group: Group, texts: list[str]) -> None:
    """Check that ranks agree on the channels, by their texts, and that those without any can take part."""
    told = "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(texts))
    if len({text.partition(CHANNELS)[0] for text in texts if text != NOTHING}) > 1:
        group.all_raise()
        raise ValueError(f"expected moments of the same channels on all ranks ({told})")
    if NOTHING in texts:
        try:
            group.engine.check(np.zeros(1))  # which a rank without a device would send
        except TypeError:
            group.all_raise()
            raise ValueError(
                f"expected an update on every rank ({told}): a rank without arrays has no device to receive moments on"
            ) from None
