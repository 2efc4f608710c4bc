"""Bundles: arguments of the steps that always travel together, as one thing with one name.

Each is a struct of the same name and fields in ``kernels/bundles.cuh``, which kernels take by value. First come names
for the types of their fields: each stands for a type of CUDA, and None for a null pointer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import empty

Tensor = Any
"""Contiguous (N, C, L) array of the dtype of the call; ``data_t*`` in kernels."""
Vector = Any
"""One value for each channel, a (C,) array of any float dtype and any stride; ``Vector`` in kernels."""
Doubles = Any
"""Contiguous float64 array; ``double*`` in kernels."""
Counter = Any
"""Array without axes, int64; ``long long*`` in kernels."""
Mask = Any
"""Contiguous bool array: True where there is data; ``bool*`` in kernels."""
Passed = Any
"""Record of ReLU, made by `empty_passed`; ``passed_t*`` in kernels."""
Drawn = Any
"""Contiguous uint64 array; ``unsigned long long*`` in kernels."""
Activation = str | None
"""One of `ACTIVATIONS`; its number in kernels."""

ACTIVATIONS = (None, "relu")
"""Activations in the order of their numbers, those of the enum ``Activation`` in ``kernels/bundles.cuh``."""


class Affine(NamedTuple):
    """Weight, bias and eps, by which x becomes weight * (x - mean) / sqrt(var + eps) + bias."""

    weight: Vector | None  # (C,); None stands for 1
    bias: Vector | None  # (C,); None stands for 0
    eps: float


class Running(NamedTuple):
    """Running statistics: read in eval mode, moved in training. Without arrays in training that moves none."""

    mean: Vector | None = None  # (C,)
    var: Vector | None = None  # (C,)
    momentum: float | None = 0.0  # weight of the new batch; None stands for 1 / (batches + 1): the mean over all
    batches: Counter | None = None  # (); num_batches_tracked
    skip_nonfinite: bool = False  # whether a batch leaves them alone that is not finite, rounded to their dtypes


class Epilogue(NamedTuple):
    """Last part of the output: a value becomes activation(value + residual), and 0 where a mask leaves it out."""

    residual: Tensor | None = None  # (N, C, L); added in the way forward
    activation: Activation = None
    passed: Passed | None = None  # record of where ReLU passes, which the way forward makes for the way back
    mask: Mask | None = None  # (N, L); what it leaves out is in no sum, and gradients are 0 there


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each channel, in P parts that are still to be merged.

    Parts are those of the blocks of a grid or of the ranks of a group; NumPy's steps make one.
    """

    count: Doubles  # (P,)
    mean: Doubles  # (P, C)
    m2: Doubles  # (P, C); sum((x - mean)^2)
    batches: Counter | None = None  # (); copy of num_batches_tracked before this batch, if there is no momentum

    @classmethod
    def of_rows(cls, rows: Any, batches: Counter | None = None) -> Moments:
        """The moments in the rows that `merge_moments` makes, (P, 1 + 2 C): what ranks send each other."""
        C = rows.shape[1] // 2
        return cls(rows[:, 0], rows[:, 1 : 1 + C], rows[:, 1 + C :], batches)


class Statistics(NamedTuple):
    """Mean and biased variance of each channel: copies, so that what used them stays right."""

    pairs: Doubles  # (C, 2); mean and variance of a channel side by side
    count_left: Doubles | None = None  # (1,); values of each channel that a mask has left; None without a mask

    @classmethod
    def of(cls, mean: Any, var: Any) -> Statistics:
        """The statistics of these means and variances, (C,) arrays."""
        pairs = empty((*mean.shape, 2), mean, np.float64)
        pairs[:, 0], pairs[:, 1] = mean, var
        return cls(pairs)

    @property
    def mean(self) -> Any:
        """Mean of each channel."""
        return self.pairs[:, 0]

    @property
    def var(self) -> Any:
        """Biased variance of each channel."""
        return self.pairs[:, 1]


class Sums(NamedTuple):
    """Sums over the whole batch for the gradients, in P parts that are still to be added."""

    dy: Doubles  # (P, C); sum(dy), the gradient of bias
    dy_xhat: Doubles  # (P, C); sum(dy * xhat), the gradient of weight

    @classmethod
    def of_rows(cls, rows: Any) -> Sums:
        """The sums in the row that `merge_sums` makes, (1, 2 C)."""
        C = rows.shape[1] // 2
        return cls(rows[:, :C], rows[:, C:])


class Gradients(NamedTuple):
    """Arrays that a step writes gradients to."""

    dx: Tensor  # (N, C, L)
    dresidual: Tensor | None = None  # (N, C, L)
    dweight: Vector | None = None  # (C,)
    dbias: Vector | None = None  # (C,)


class Incoming(NamedTuple):
    """What the way back of second order begins with: the gradient of the output, and a cotangent of each gradient.

    A cotangent is the gradient of a loss with respect to a gradient of the way back; None stands for zeros.
    """

    dy: Tensor  # (N, C, L)
    cdx: Tensor | None = None  # (N, C, L); cotangent of dx
    cdresidual: Tensor | None = None  # (N, C, L); cotangent of dresidual
    cdweight: Vector | None = None  # (C,); cotangent of dweight
    cdbias: Vector | None = None  # (C,); cotangent of dbias


class SecondSums(NamedTuple):
    """Sums over the whole batch for the gradients of second order, in P parts that are still to be added."""

    dy: Doubles  # (P, C); sum(dy)
    dy_xhat: Doubles  # (P, C); sum(dy * xhat)
    cdx: Doubles  # (P, C); sum(cdx)
    cdx_xhat: Doubles  # (P, C); sum(cdx * xhat)
    cdx_dy: Doubles  # (P, C); sum(cdx * dy)


class SecondGradients(NamedTuple):
    """Arrays that a step of second order writes gradients to: those of the way back's own arguments."""

    ddy: Tensor  # (N, C, L); gradient of dy
    dx: Tensor  # (N, C, L)
    dweight: Vector | None = None  # (C,)


class Drops(NamedTuple):
    """What a call of dropout has drawn: an element is dropped where its word is below the threshold, or else scaled."""

    drawn: Drawn  # (2,); seed and number of the call
    threshold: int  # p * 2^32, rounded to an integer; may be 2^32 itself, which no word reaches
    scale: float  # one over 1 - p; steps round it to the dtype of the arithmetic
