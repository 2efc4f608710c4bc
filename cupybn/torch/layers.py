"""The layers of `torch.nn` on this library's steps: the same parameters, buffers, state dicts and modes."""

from __future__ import annotations

from typing import Any

import torch

from cupybn._calls.call import Caller
from cupybn._calls.checks import as_float, check_activation, check_bool, check_running
from cupybn._steps.bundles import Running
from cupybn.torch import checks
from cupybn.torch.autograd import Settings
from cupybn.torch.function import normalized

Tensor = Any  # torch.Tensor


class _BatchNorm:
    """What the layers have in common, and PyTorch's do not have.

    In training mode mean and variance are those of the batch, and the running statistics follow them; in eval mode the
    running statistics are used as they are. It is a subclass of PyTorch's layer, with the same parameters, buffers and
    state dict, and whatever else modules have.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As PyTorch's layer takes them; ``bias`` where this version of PyTorch has it.
    activation : None or "relu"
        What the output goes through, in the same pass over memory. Keyword-only, and an attribute.

    Raises
    ------
    ValueError
        If the activation is unknown.

    Examples
    --------
    >>> import torch
    >>> from cupybn.torch import BatchNorm1d
    >>> layer = BatchNorm1d(2, activation="relu")
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, 60.0]])).detach()
    tensor([[0.0000, 0.0000],
            [0.0000, 0.0000],
            [1.2247, 1.3887]])
    >>> layer.running_mean, layer.num_batches_tracked
    (tensor([0.3000, 3.0000]), tensor(1))
    """

    activation: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        **options: Any,
    ) -> None:
        check_activation(activation)
        settings = eps, momentum, affine, track_running_stats, device, dtype
        super().__init__(num_features, *settings, **options)  # type: ignore[call-arg]
        self.activation = activation

    @torch.compiler.disable
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output; in training mode the running statistics are updated.

        Parameters
        ----------
        input : tensor of a rank that the layer takes, float16, bfloat16, float32 or float64
            On the layer's device.
        residual : tensor of the input's shape and dtype, or None
            Added before the activation.

        Raises
        ------
        TypeError, ValueError
            As `cupybn.torch.batch_norm`, and if the rank is wrong, or ``training`` or ``track_running_stats`` has been
            set to something else than a bool. The layer is as it was then.
        """
        layer: Any = self
        checks.check_tensor("input", input)
        layer._check_input_dim(input)
        weight, bias, mean, var = layer.weight, layer.bias, layer.running_mean, layer.running_var
        for vector in (weight, bias, mean, var):
            if isinstance(vector, torch.Tensor):
                _check_input(input, vector)
        return normalized(input, weight, bias, residual, self._settings(input, mean, var))

    def _settings(self, input: Tensor, mean: Tensor | None, var: Tensor | None) -> Settings:
        """The settings of a call, with the statistics and the update that PyTorch chooses for these modes and flags."""
        layer: Any = self
        training, tracks = layer.training, layer.track_running_stats
        check_bool("training", training)
        check_bool("track_running_stats", tracks)
        momentum = None if layer.momentum is None else as_float("momentum", layer.momentum)
        running = Running(mean, var, momentum, layer.num_batches_tracked)
        if training and not (tracks and (momentum is not None or running.batches is not None)):
            # Frozen statistics, or a mean over all batches that nobody counts: the call goes without them.
            check_running(running, training=True)
            running = Running(momentum=momentum, batches=running.batches)
        from_batch = training or (mean is None and var is None)
        return Settings(running, from_batch, layer.eps, self.activation, Caller(_device_name(input)))

    def extra_repr(self) -> str:
        """PyTorch's text, and the activation where there is one."""
        text: str = super().extra_repr()  # type: ignore[misc]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


def _check_input(input: Tensor, vector: Tensor) -> None:
    """Check that an input is on a layer's device and has its channels, which are those of one of its vectors."""
    if vector.device != input.device:
        raise TypeError(
            f"expected input on {vector.device}, as the layer is (got a tensor on {input.device}): use "
            f"input.to({str(vector.device)!r}), or layer.to({str(input.device)!r})"
        )
    if vector.ndim == 1 and vector.shape[0] != input.shape[1]:
        channels, shape = vector.shape[0], tuple(input.shape)
        axis = max((axis for axis, size in enumerate(shape) if size == channels and axis > 1), default=None)
        hint = "" if axis is None else f": axis {axis} has {channels}, did you mean input.movedim({axis}, 1)?"
        raise ValueError(f"expected {channels} channels (num_features) on axis 1, got {shape[1]}{hint}")


def _device_name(tensor: Tensor) -> str:
    """The device of a tensor, as this library names it."""
    return "cpu" if tensor.device.type == "cpu" else f"cuda:{tensor.device.index}"


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) and (N, C, L) tensors."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) tensors."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) tensors."""


# The text of each layer is its own first line, and the rest of what the class above says of all of them.
for _layer in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _layer.__doc__ = f"{_layer.__doc__}\n{(_BatchNorm.__doc__ or '').partition(chr(10))[2]}"
