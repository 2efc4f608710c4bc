"""Folding, for inference: batch norm after a linear map or a convolution becomes part of its weight and bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybn._arrays.devices import empty, on_device_of
from cupybn._arrays.kinds import describe, device_of, plain
from cupybn._calls import checks
from cupybn.layers.batchnorm import _BatchNorm

Array = Any  # numpy.ndarray or cupy.ndarray

VECTORS = ("weight", "bias", "running_mean", "running_var")
"""Names of a layer's arrays that are folded."""


def fold_conv_bn(
    weight: Array, bias: Array | None, layer: _BatchNorm, *, transpose: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Weight and bias of the convolution that does what one with these and then the layer in eval mode do.

        scale = layer.weight / sqrt(layer.running_var + layer.eps)
        new weight = weight * scale,   new bias = (bias - layer.running_mean) * scale + layer.bias

    Computed in float64, and rounded once. The layer's mode does not matter, and nothing that is given changes.

    Parameters
    ----------
    weight : array of rank >= 3, float16, bfloat16, float32 or float64
        Of shape (O, I / groups, ...), as that of ``torch.nn.Conv2d``, or (I, O / groups, ...) with `transpose`, as that
        of ``torch.nn.ConvTranspose2d``: O channels out, I channels in, and any number of further axes.
    bias : (O,) array or None
        None stands for 0. Of any of the dtypes, and on the weight's device.
    layer : batch norm layer with running statistics
        Of O channels, without an activation, and on the weight's device. A ``copy.copy`` of a layer shares its arrays:
        the activation of such a twin can be set to None.
    transpose : bool
        Whether the convolution is a transposed one.
    groups : int
        The groups that the channels of the convolution are divided in.

    Returns
    -------
    weight, bias : arrays of the weight's kind and dtype
        New ones. There is always a bias.

    Raises
    ------
    TypeError
        If weight or bias is not an array of the right kind, device and dtype, layer not a batch norm layer on the same
        device, transpose not a bool, or groups not an integer.
    ValueError
        If shapes, channels or groups do not fit; if the layer has no running statistics, or an activation.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> layer = cupybn.BatchNorm2d(2, eps=0, device="cpu")
    >>> layer.running_mean[...], layer.running_var[...] = (1, 2), (4, 16)
    >>> weight = np.ones((2, 3, 1, 1), np.float32)  # from 3 channels to 2
    >>> weight, bias = cupybn.fold_conv_bn(weight, None, layer)
    >>> weight[:, 0, 0, 0], bias
    (array([0.5 , 0.25], dtype=float32), array([-0.5, -0.5], dtype=float32))
    """
    checks.check_bool("transpose", transpose)
    groups = checks.as_int("groups", groups)
    if groups < 1:
        raise ValueError(f"expected groups >= 1 (got {groups})")
    checks.check_array("weight", weight)
    if weight.ndim < 3:
        way_out = ": use fold_linear_bn" if weight.ndim == 2 else ""
        raise ValueError(f"expected weight of a convolution, with 3 axes or more (got shape {weight.shape}){way_out}")
    divided = weight.shape[0]
    if divided % groups != 0:
        text = f"expected groups to divide the {divided} {'input' if transpose else 'output'} channels of weight"
        raise ValueError(f"{text} (got groups={groups})")
    channels = weight.shape[1] * groups if transpose else weight.shape[0]
    features = _check_layer(layer, weight)
    if channels != features:
        layout = "(I, O / groups, ...)" if transpose else "(O, I / groups, ...)"
        raise _other_channels(features, weight, channels, layout, _meant(weight, features, transpose, groups))
    _check_bias(bias, weight, channels)
    return _folded(weight, bias, layer, groups if transpose else None)


def fold_linear_bn(weight: Array, bias: Array | None, layer: _BatchNorm) -> tuple[Array, Array]:
    """Weight and bias of the linear map that does what one with these and then the layer in eval mode do.

    Parameters
    ----------
    weight : (O, I) array
        As that of ``torch.nn.Linear``: from I features to O.
    bias, layer
        As for `fold_conv_bn`.

    Returns
    -------
    weight, bias : arrays of the weight's kind and dtype
        As `fold_conv_bn`.

    Raises
    ------
    TypeError, ValueError
        As `fold_conv_bn`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> rng = np.random.default_rng(0)
    >>> weight, bias = rng.normal(size=(2, 3)), rng.normal(size=2)
    >>> layer = cupybn.BatchNorm1d(2, device="cpu", dtype="float64")
    >>> y = layer(rng.normal(size=(8, 3)) @ weight.T + bias)  # in training: the running statistics move
    >>> x = rng.normal(size=(1, 3))
    >>> new_weight, new_bias = cupybn.fold_linear_bn(weight, bias, layer)
    >>> np.allclose(x @ new_weight.T + new_bias, layer.eval()(x @ weight.T + bias))
    True
    """
    checks.check_array("weight", weight)
    if weight.ndim != 2:
        way_out = ": use fold_conv_bn" if weight.ndim > 2 else ""
        raise ValueError(f"expected weight of a linear map, with 2 axes (got shape {weight.shape}){way_out}")
    features = _check_layer(layer, weight)
    if weight.shape[0] != features:
        way_out = ": use weight.T" if weight.shape[1] == features else ""
        raise _other_channels(features, weight, weight.shape[0], "(O, I)", way_out)
    _check_bias(bias, weight, features)
    return _folded(weight, bias, layer, None)


def _folded(weight: Array, bias: Array | None, layer: _BatchNorm, groups: int | None) -> tuple[Array, Array]:
    """New weight and bias; groups are those of a transposed convolution, whose outputs are on axis 1, else None."""
    with np.errstate(all="ignore"), on_device_of(weight):
        scale = _wide(layer.weight, 1) / np.sqrt(_wide(layer.running_var, 1) + float(layer.eps))
        new_bias = (_wide(bias, 0) - _wide(layer.running_mean, 0)) * scale + _wide(layer.bias, 0)
        if groups is None:
            new_weight = _wide(weight, 1) * scale.reshape(-1, *[1] * (weight.ndim - 1))
        else:
            rows, columns, *kernel = weight.shape
            grouped = _wide(weight, 1).reshape(groups, rows // groups, columns, *kernel)
            new_weight = grouped * scale.reshape(groups, 1, columns, *[1] * len(kernel))
        return _rounded(new_weight, weight, weight.shape), _rounded(new_bias, weight, new_bias.shape)


def _wide(array: Array | None, default: float) -> Any:
    """Float64 array with these values, or the number that stands for None."""
    return default if array is None else plain(array).astype(np.float64)


def _rounded(values: Array, like: Array, shape: tuple[int, ...]) -> Array:
    """New C-contiguous array with these values, in the dtype of another one."""
    rounded = empty(shape, like)
    rounded[...] = values.reshape(shape)
    return rounded


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_layer(layer: _BatchNorm, weight: Array) -> int:
    """Number of channels of a layer; raises unless it can be folded into this weight."""
    if not isinstance(layer, _BatchNorm):
        way_out = ""
        if hasattr(layer, "state_dict") and hasattr(layer, "running_mean"):
            way_out = ": load its state dict into one, cupybn.BatchNorm2d(...).load_state_dict(layer.state_dict())"
        raise TypeError(f"expected layer to be a batch norm layer of cupybn (got {describe(layer)}){way_out}")
    if layer.activation is not None:
        raise ValueError(
            f"the activation is not folded: expected a layer without one (got activation={layer.activation!r}): use "
            "twin = copy.copy(layer), which shares its arrays, with twin.activation = None, and apply the activation "
            "to what the folded weight and bias give"
        )
    name = type(layer).__qualname__
    if layer.num_features is None:
        raise ValueError(
            f"expected layer to have running statistics (got a {name} without arrays, which it makes for its first "
            "input or state dict)"
        )
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"expected layer to have running statistics (got a {name} without): one that takes those of each batch "
            "cannot be folded"
        )
    checks.check_eps(layer.eps, training=False)
    sizes = {}
    for vector in VECTORS:
        array = getattr(layer, vector)
        if array is None:
            continue
        checks.check_array(f"layer.{vector}", array)
        if device_of(array) != device_of(weight):
            raise TypeError(
                f"expected layer to be on {device_of(weight)} like weight, a {describe(weight)} (got one on "
                f'{device_of(array)}): use layer.to("{device_of(weight)}")'
            )
        if array.ndim != 1:
            raise ValueError(f"expected layer.{vector} of shape (C,) (got {array.shape})")
        sizes[vector] = array.size
    features: int = sizes["running_mean"]
    for vector, size in sizes.items():
        if size != features:
            raise ValueError(f"layer.{vector} should contain {features} elements not {size}")
    return features


def _check_bias(bias: Array | None, weight: Array, channels: int) -> None:
    """Check for a bias that goes with a weight of so many output channels."""
    if bias is None:
        return
    checks.check_array("bias", bias, weight, "weight")
    if bias.shape != (channels,):
        raise ValueError(f"expected bias of shape ({channels},) (got {bias.shape})")


def _other_channels(features: int, weight: Array, channels: int, layout: str, way_out: str) -> ValueError:
    """Error for a weight with other output channels than the layer."""
    return ValueError(
        f"expected weight with {features} output channels, as layer has, in the layout {layout} (got {channels}, in "
        f"shape {weight.shape}){way_out}"
    )


def _meant(weight: Array, features: int, transpose: bool, groups: int) -> str:
    """Hint at the arguments with which a weight would fit a layer of so many channels. The end of a message."""
    first, second = weight.shape[:2]
    if not transpose:
        return "; did you mean transpose=True?" if second * groups == features else ""
    if first == features:
        return "; did you mean transpose=False?"
    wanted = features // second if second else 0
    fits = wanted and wanted * second == features and first % wanted == 0
    return f"; did you mean groups={wanted}?" if fits else ""
