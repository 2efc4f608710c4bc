"""ResNet-50 in plain PyTorch, written by hand, and the same network with the sum and ReLU left to the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

EXPANSION = 4
"""Channels that leave a block for each channel of its 3x3 convolution."""
FIRST_WEIGHT = 0.1
"""Weight that the last norm of a block begins with. With 1, as by default, gradients of the first step are chaotic: in
bfloat16 those of NCHW and NHWC have nothing in common."""
Norm = Callable[[int], nn.Module]


class Size(NamedTuple):
    """How large a network is."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage; from stage to stage planes get half as wide, and channels twice as many."""
    width: int = 64
    """Channels of the first convolution, and of the 3x3 ones of the first stage."""
    classes: int = 1000


class Bottleneck(nn.Module):
    """Three convolutions with a norm behind each, and the input added to what they make.

    Parameters
    ----------
    inputs, width : int
        Channels that come in, and those of the 3x3 convolution.
    stride : int
    norm, norm_before_relu : functions from a number of channels to a layer
    """

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, norm_before_relu: Norm) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm_before_relu(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm_before_relu(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm_before_relu(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Any) -> Any:
        """The output of the block, in as few arrays as PyTorch's operations in place allow."""
        identity = self.downsample(x)
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        return torch.relu_(self.bn3(self.conv3(x)).add_(identity))


class FusedBottleneck(Bottleneck):
    """The block whose norms rectify; the last one adds the block's input as well."""

    def forward(self, x: Any) -> Any:
        """Output of the block, as that of `Bottleneck`."""
        identity = self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), residual=identity)


class ResNet(nn.Module):
    """A residual network for images of three channels; the names of its parameters are those that others use.

    Parameters
    ----------
    size : Size
    norm : function from a number of channels to a layer
    fused_norm : function from a number of channels to a layer, or None
        Layer that rectifies what it has normalized, and takes a residual before that. None for ReLU and sums by
        themselves.
    """

    def __init__(self, size: Size, norm: Norm = nn.BatchNorm2d, fused_norm: Norm | None = None) -> None:
        super().__init__()
        block = Bottleneck if fused_norm is None else FusedBottleneck
        before_relu = norm if fused_norm is None else fused_norm
        self.conv1 = nn.Conv2d(3, size.width, 7, 2, 3, bias=False)
        self.bn1 = before_relu(size.width)
        self.relu = nn.ReLU(inplace=True) if fused_norm is None else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, width = size.width, size.width
        for number, blocks in enumerate(size.blocks, 1):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(block(inputs, width, 2 if number > 1 and i == 0 else 1, norm, before_relu))
                inputs = EXPANSION * width
            self.add_module(f"layer{number}", stage)
            width *= 2
        self.stages = len(size.blocks)
        self.fc = nn.Linear(inputs, size.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, FIRST_WEIGHT)

    def forward(self, x: Any) -> Any:
        """The logits of the images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))
