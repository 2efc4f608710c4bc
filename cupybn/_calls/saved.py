"""What the way back of a call needs of the way forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from cupybn._calls.call import Checked
from cupybn._steps.bundles import Affine, Epilogue
from cupybn._steps.tape import Tapes

Array = Any  # numpy.ndarray or cupy.ndarray


class Saved(NamedTuple):
    """Arrays and settings that the way back needs of the way forward."""

    ops: Any  # steps as `ops_for_call` returns them; None where there is nothing to do
    checked: Checked
    tapes: Tapes | None  # launches of calls that are alike; None where this one has taken its steps for itself
    input: Array  # dense, in the layout
    pairs: Array | None  # statistics, as `Statistics` has them; None for rows without elements
    affine: Affine
    epilogue: Epilogue  # activation, passed and mask: the record has all that the way back needs of the residual
    count_left: Array | None = None  # what `Statistics` has beside the pairs
