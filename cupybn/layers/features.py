"""Layers of which each channel has a value in all arrays: batch norm's and instance norm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._calls import checks
from cupybn._calls.call import Call
from cupybn.layers.layer import AFFINE, INITIAL, Layer

Array = Any  # numpy.ndarray or cupy.ndarray

T = TypeVar("T")


class FeatureLayer(Layer):
    """A layer with weight, bias and running statistics, (C,) arrays. Without features it takes C from the first input.

    Parameters
    ----------
    num_features : int or None
        C.
    device, dtype
        As users give them.
    bias : bool
        Whether a layer that has a weight has a bias, too.
    settings
        What the layer keeps under the same name: all other arguments that batch norm and instance norm have in common.
    """

    num_features: int | None

    _ndims: tuple[int, ...] = ()
    """Numbers of axes that inputs may have; () if any will do."""

    def __init__(
        self, num_features: int | None, device: str | None, dtype: npt.DTypeLike | None, bias: bool, **settings: Any
    ) -> None:
        if num_features is not None:
            num_features = checks.as_size("num_features", num_features)
        checks.as_float("eps", settings["eps"])
        if settings["momentum"] is not None:
            checks.as_float("momentum", settings["momentum"])
        for name in "affine", "track_running_stats":
            checks.check_bool(name, settings[name])
        checks.check_bool("bias", bias)
        checks.as_int("channel_axis", settings["channel_axis"])
        if self._ndims:
            self._check_channel_axis(settings["channel_axis"], max(self._ndims))
        checks.check_activation(settings["activation"])
        has = {"weight": settings["affine"], "bias": settings["affine"] and bias}
        members = tuple(name for name in INITIAL if has.get(name, settings["track_running_stats"]))
        super().__init__(members, device, parameter_dtype(np.float32 if dtype is None else dtype))
        self.num_features = num_features
        self.eps: float = settings["eps"]
        self.momentum: float | None = settings["momentum"]
        self.affine: bool = settings["affine"]
        self.track_running_stats: bool = settings["track_running_stats"]
        self.channel_axis: int = settings["channel_axis"]
        self.activation: str | None = settings["activation"]
        if num_features is not None:
            self._allocate((num_features,))

    @property
    def _shape(self) -> tuple[int, ...] | None:
        return None if self.num_features is None else (self.num_features,)

    def _settings_for(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"num_features": shape[0]}

    def _check_channel_axis(self, channel_axis: int, ndim: int) -> int:
        """Channel axis counted from the front; raises unless an array with so many axes has it."""
        return checks.check_channel_axis(channel_axis, ndim)

    def _check_input(self, input: Array) -> int:
        """Channel axis of an input, counted from the front; raises unless it may be one."""
        return checks.check_input(input, self.channel_axis, self._ndims)

    def _call(self, input: Array, *others: Array | None) -> Call:
        """The call that this layer makes for an input and further arrays."""
        raise NotImplementedError

    def _run(self, run: Callable[[Call], T], input: Array, *others: Array | None) -> T:
        """What a function makes of the call of this layer.

        A layer without features takes their number from the input, and has none again if the call fails.
        """
        if self.num_features is not None:
            return run(self._call(input, *others))
        axis = self._check_input(input)
        try:
            self._allocate((input.shape[axis],))
            return run(self._call(input, *others))
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        """Go back to having no arrays, as before `_allocate`."""
        vars(self).update(dict.fromkeys(self._members), num_features=None)

    def reset_running_stats(self) -> None:
        """Set running statistics and counter back to where they start, if the layer tracks them."""
        if self.track_running_stats:
            self._reset([name for name in INITIAL if name not in AFFINE])

    def reset_parameters(self) -> None:
        """Set weight and bias back to where they start, and the running statistics as `reset_running_stats` does."""
        self._reset([name for name in INITIAL if name in AFFINE or self.track_running_stats])

    def __repr__(self) -> str:
        bias = "bias" in self._members if self.num_features is None else self.bias is not None
        text = (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={bias}, track_running_stats={self.track_running_stats}"
        )
        return f"{text}{self._extras()})"

    def _extras(self) -> str:
        """The end of the text: settings that PyTorch does not have, where they are not what they are unless given."""
        text = "" if self.channel_axis == 1 else f", channel_axis={self.channel_axis}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
