"""Instance, group, layer and RMS norm by the textbook, in float64 and independent of the library, and the cases that
tests run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import cupybn.functional as F
from tests.reference import Reference, to_numpy

Array = Any  # numpy.ndarray or cupy.ndarray


class Case(NamedTuple):
    """One of the functions, and the arguments that say what a row is."""

    function: str
    num_groups: int | None = None
    normalized_shape: tuple[int, ...] | None = None
    channel_axis: int = 1

    @property
    def by_channels(self):
        """Whether parameters have a value for each channel, and calls take a residual and an activation."""
        return self.function in ("instance_norm", "group_norm")

    @property
    def options(self):
        """Keyword arguments that say what a row is."""
        if not self.by_channels:
            return {"normalized_shape": self.normalized_shape}
        groups = {} if self.function == "instance_norm" else {"num_groups": self.num_groups}
        return {**groups, "channel_axis": self.channel_axis}

    def __call__(self, input, **others):
        return getattr(F, self.function)(input, **self.options, **others)

    def vjp(self, input, **others):
        return getattr(F, f"{self.function}_vjp")(input, **self.options, **others)

    def parameter_shape(self, shape):
        """Shape of weight and bias for an input of a shape."""
        return (shape[self.channel_axis],) if self.by_channels else self.normalized_shape

    @property
    def names(self):
        """Names of the parameters."""
        return ("weight",) if self.function == "rms_norm" else ("weight", "bias")

    def arguments(self, xp, rng, shape, dtype=np.float32, parameters=np.float32, residual=False):
        """Arguments with random values; those of parameters are kept away from 0."""
        given = {"input": xp.asarray((3 + 2 * rng.normal(size=shape)).astype(dtype))}
        for name in self.names:
            given[name] = xp.asarray(rng.uniform(0.5, 2, self.parameter_shape(shape)).astype(parameters))
        if residual:
            given["residual"] = xp.asarray(rng.normal(size=shape).astype(dtype))
        return given

    def expect(self, input, weight=None, bias=None, *, eps=None, residual=None, activation=None, dy=None):
        """All results, in float64 or, for float64 data, wider."""
        x = to_numpy(input)
        wide = np.longdouble if x.dtype == np.float64 else np.float64
        if eps is None:
            eps = 1e-5 if self.function != "rms_norm" else 2.0**-52 if x.dtype == np.float64 else 2.0**-23
        rows, back, column = self._rows(x.shape)

        def spread(parameter, default):
            return np.full(1, default) if parameter is None else to_numpy(parameter).astype(wide).reshape(column)

        x = x.astype(wide)
        centered = self.function != "rms_norm"
        values = rows(x)
        mean = values.mean(axis=-1, keepdims=True) if centered else 0 * values[..., :1]
        var = np.square(values - mean).mean(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            rstd = 1 / np.sqrt(var + eps)
            xhat = back((values - mean) * rstd)
        y = xhat * spread(weight, 1) + spread(bias, 0)
        if residual is not None:
            y = y + to_numpy(residual).astype(wide)
        passed = y > 0 if activation == "relu" else np.ones(y.shape, bool)
        y = np.where(np.isnan(y) | passed, y, 0)
        sizes = np.abs(spread(weight, 1)) * (1 + np.abs(xhat)) + np.abs(spread(bias, 0))
        terms = {"y": sizes + (0 if residual is None else np.abs(to_numpy(residual).astype(wide)))}
        result = Reference(y, mean[..., 0], var[..., 0], terms=terms)
        if dy is None:
            return result
        g = np.where(passed, to_numpy(dy).astype(wide), 0)
        scaled, normalized = rows(g * spread(weight, 1)), rows(xhat)
        m1 = scaled.mean(axis=-1, keepdims=True) if centered else 0
        m2 = (scaled * normalized).mean(axis=-1, keepdims=True)
        dx = back((scaled - m1 - normalized * m2) * rstd)
        largest = back(np.broadcast_to(np.abs(scaled * rstd).max(axis=-1, keepdims=True), scaled.shape))
        others = tuple(i for i in range(x.ndim) if not self._is_parameter_axis(i, x.ndim))
        shape = self.parameter_shape(x.shape)
        terms |= {
            "dx": largest,
            "dweight": np.abs(g * xhat).sum(axis=others).reshape(shape),
            "dbias": np.abs(g).sum(axis=others).reshape(shape),
            "dresidual": 0.0,
        }
        dweight, dbias = (g * xhat).sum(axis=others).reshape(shape), g.sum(axis=others).reshape(shape)
        return result._replace(dx=dx, dweight=dweight, dbias=dbias, dresidual=g, terms=terms)

    def _is_parameter_axis(self, axis, ndim):
        """Whether parameters run along an axis of the input."""
        if self.by_channels:
            return axis == self.channel_axis % ndim
        return axis >= ndim - len(self.normalized_shape)

    def _rows(self, shape):
        """Functions from an array to its rows, along the last axis, and back; and the shape in which parameters
        broadcast.
        """
        ndim = len(shape)
        column = [n if self._is_parameter_axis(i, ndim) else 1 for i, n in enumerate(shape)]
        if not self.by_channels:
            samples = shape[: ndim - len(self.normalized_shape)]
            return (lambda a: a.reshape(*samples, -1)), (lambda a: a.reshape(shape)), column
        axis = self.channel_axis % ndim
        order = [0, axis, *(i for i in range(1, ndim) if i != axis)]
        groups = shape[axis] if self.num_groups is None else self.num_groups
        moved = [shape[i] for i in order]

        def rows(array):
            return array.transpose(order).reshape(shape[0], groups, -1)

        def back(array):
            return array.reshape(moved).transpose(np.argsort(order))

        return rows, back, column


CASES = (
    Case("instance_norm"),
    Case("instance_norm", channel_axis=-1),
    Case("group_norm", 2),
    Case("group_norm", 1),
    Case("group_norm", 4, channel_axis=2),
    Case("layer_norm", normalized_shape=(6,)),
    Case("layer_norm", normalized_shape=(4, 6)),
    Case("rms_norm", normalized_shape=(6,)),
    Case("rms_norm", normalized_shape=(4, 4, 6)),
)
"""Cases for inputs of the shape SHAPE."""
SHAPE = (3, 4, 4, 6)
"""Shape in which neighbouring axes have sizes of their own or a common one."""
EACH = (CASES[0], CASES[2], CASES[6], CASES[7])
"""One case of each function."""


def name_of(case):
    """Name of a test with this case."""
    given = [value for value in case[1:] if value is not None]
    return " ".join([case.function, *(str(value) for value in given)])
