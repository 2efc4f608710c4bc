"""Batch norm by the textbook, in float64 and independent of the library, and the comparisons that the tests make with
it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cupybn import functional

DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
ROUNDINGS = {"y": 8, "dx": 25, "dweight": 84, "dbias": 84, "dresidual": 0}
"""Rounding errors that the contract allows, in units in the last place of the arithmetic: in float32 1e-6, 3e-6 and
1e-5."""


class Reference(NamedTuple):
    """All results of batch norm for one batch, in float64 or, for float64 data, wider; vectors have shape (C,)."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray  # biased variance
    dx: np.ndarray | None = None
    dweight: np.ndarray | None = None
    dbias: np.ndarray | None = None
    dresidual: np.ndarray | None = None
    # For each result the sizes of the terms that it is a sum of: rounding errors are relative to these.
    terms: dict | None = None


def batch_norm(
    x, weight=None, bias=None, *, running=None, eps=1e-5, residual=None, relu=False, channel_axis=1, dy=None
) -> Reference:
    """The results of a forward pass and, given `dy`, of a backward pass. `running` is (mean, var) in eval mode, else
    None.
    """
    x = np.asarray(x)
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    x = x.astype(wide)
    axis = channel_axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]

    def column(vector, default):
        return default if vector is None else np.asarray(vector).astype(wide).reshape(shape)

    if running is None:
        mean = x.mean(axis=others, keepdims=True)
        var = ((x - mean) ** 2).mean(axis=others, keepdims=True)
    else:
        mean, var = (column(v, None) for v in running)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    y = xhat * column(weight, 1) + column(bias, 0)
    if residual is not None:
        y = y + np.asarray(residual).astype(wide)
    passed = y > 0 if relu else np.ones(y.shape, bool)
    y = np.where(np.isnan(y) | passed, y, 0)
    sizes = np.abs(column(weight, 1)) * (1 + np.abs(xhat)) + np.abs(column(bias, 0))
    terms = {"y": sizes + (0 if residual is None else np.abs(residual, dtype=wide)), "mean": np.sqrt(var).ravel()}
    result = Reference(y, mean.ravel(), var.ravel(), terms=terms)
    if dy is None:
        return result
    g = np.where(passed, np.asarray(dy).astype(wide), 0)
    dbias, dweight = g.sum(axis=others), (g * xhat).sum(axis=others)
    dx = g * rstd * column(weight, 1)
    terms |= {
        "dx": np.abs(dx).max(axis=others, keepdims=True, initial=0),
        "dweight": np.abs(g * xhat).sum(axis=others),
        "dbias": np.abs(g).sum(axis=others),
        "dresidual": 0.0,
    }
    if running is None:
        n = x.size // x.shape[axis]
        dx -= (dbias.reshape(shape) + xhat * dweight.reshape(shape)) / n * rstd * column(weight, 1)
    return result._replace(dx=dx, dweight=dweight, dbias=dbias, dresidual=g, terms=terms)


def to_numpy(array) -> np.ndarray:
    """The array itself, or a copy on the host if it is a GPU's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def bits(*arrays) -> list[bytes | None]:
    """The bytes of arrays, to compare results or states to the last bit."""
    return [None if array is None else to_numpy(array).tobytes() for array in arrays]


def exactly(text: str) -> str:
    """A pattern that matches this message and no longer one."""
    return f"^{re.escape(text)}$"


def assert_close(actual, expected, computed_in, scale=1.0, roundings=ROUNDINGS["y"]) -> None:
    """Compare within one rounding to the dtype of `actual` and some roundings in the arithmetic of `computed_in`.

    `scale` is the size of the terms that `actual` is a sum of. NaN is close to nothing.
    """
    actual, expected = to_numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    unit = 2 * HALF_ULP["float64" if computed_in == np.float64 else "float32"]
    bound = HALF_ULP[actual.dtype.name] * np.abs(expected) + roundings * unit * np.maximum(np.abs(expected), scale)
    error = np.abs(actual.astype(np.float64) - expected)
    assert np.all(error <= bound), f"off by {np.max(error)} where {np.min(bound)} and more is allowed"


def in_order(array, axes):
    """A copy of a NumPy or CuPy array as a dense view whose memory runs through `axes`, slowest first."""
    dense = array.transpose(axes).copy(order="C")
    return dense.transpose([int(i) for i in np.argsort(axes)])


def arguments(xp, rng, shape, *, channel_axis=1, dtype=np.float32, vectors=np.float32) -> dict:
    """Arguments for `cupybn.functional.batch_norm` with random values; `vectors` is one dtype, or four by name."""

    def draw(dtype, size, low=None):
        values = rng.normal(size=size) if low is None else rng.uniform(low, 2, size)
        return xp.asarray(values.astype(dtype))

    names = ("running_mean", "running_var", "weight", "bias")
    dtypes = vectors if isinstance(vectors, dict) else dict.fromkeys(names, vectors)
    channels = shape[channel_axis]
    return {
        "input": xp.asarray((3 + 2 * rng.normal(size=shape)).astype(dtype)),
        **{name: draw(dtypes[name], channels, 0.5 if name == "running_var" else None) for name in names},
        "residual": draw(dtype, shape),
        "channel_axis": channel_axis,
    }


def expect(arguments: dict, dy=None) -> Reference:
    """The reference for keyword arguments of `cupybn.functional.batch_norm`."""
    given = {
        name: value if value is None or np.isscalar(value) else to_numpy(value) for name, value in arguments.items()
    }
    training = given.pop("training", False)
    running = given.pop("running_mean", None), given.pop("running_var", None)
    given.pop("momentum", None)
    return batch_norm(
        given.pop("input"),
        relu=given.pop("activation", None) == "relu",
        running=None if training else running,
        dy=None if dy is None else to_numpy(dy),
        **given,
    )


def moved(running_mean, running_var, x, *, momentum=0.1, channel_axis=1) -> tuple[np.ndarray, np.ndarray]:
    """The running statistics after one more batch, in float64."""
    x = to_numpy(x)
    batch = batch_norm(x, channel_axis=channel_axis)
    n = x.size // x.shape[channel_axis]
    return tuple(
        (1 - momentum) * to_numpy(running).astype(np.float64) + momentum * statistic
        for running, statistic in ((running_mean, batch.mean), (running_var, batch.var * n / (n - 1)))
    )


def assert_output(y, expected: Reference, computed_in) -> None:
    """Compare an output with the reference's."""
    assert_close(y, expected.y, computed_in, expected.terms["y"])


def assert_gradients(grads, expected: Reference, computed_in) -> None:
    """Compare the gradients that a `vjp_fn` returned with the reference's; a gradient that does not exist is None."""
    for name, grad in zip(("dx", "dweight", "dbias", "dresidual"), grads, strict=True):
        if grad is not None:
            assert_close(grad, getattr(expected, name), computed_in, expected.terms[name], ROUNDINGS[name])


class OnDevice:
    """The functions of `cupybn.functional` for NumPy arrays, computed on the device of another array module.

    Arguments keep their memory order on the way there, results on the way back; running statistics move in place.
    """

    def __init__(self, xp):
        self.xp = xp

    def moments(self, x, **options):
        return tuple(map(to_numpy, functional.moments(self._to(x), **options)))

    def batch_norm(self, *args, **kwargs):
        return self.batch_norm_vjp(*args, **kwargs)[0]

    def batch_norm_vjp(self, x, running_mean, running_var, *args, **kwargs):
        running = [self._to(v) for v in (running_mean, running_var)]
        args, kwargs = [self._to(a) for a in args], {name: self._to(a) for name, a in kwargs.items()}
        y, vjp_fn = functional.batch_norm_vjp(self._to(x), *running, *args, **kwargs)
        for mine, theirs in zip((running_mean, running_var), running, strict=True):
            if mine is not None and mine.flags.writeable:
                mine[...] = to_numpy(theirs)

        def back(dy):
            return functional.BatchNormGrads(*(None if g is None else to_numpy(g) for g in vjp_fn(self._to(dy))))

        return to_numpy(y), back

    def _to(self, array):
        if not isinstance(array, np.ndarray) or self.xp is np:
            return array
        order = sorted(range(array.ndim), key=lambda i: -array.strides[i])
        return self.xp.asarray(array.transpose(order)).transpose(np.argsort(order).tolist())
