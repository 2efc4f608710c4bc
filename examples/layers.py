"""A few layers on NumPy and CuPy arrays, and the options of the examples: their needs beside batch normalization.

As in cupybn, ``y, vjp_fn = layer.vjp(x)`` is the forward pass, and ``vjp_fn(dy)`` the backward pass: it returns dx, and
then the gradients of the layer's parameters in their order.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import cupybn

xp = np
if cupybn.BatchNorm2d(1).device != "cpu":  # CuPy, where batch norm layers live on a GPU unless told otherwise
    import cupy as xp

NEEDED = ("matplotlib", "PIL", "sklearn", "threadpoolctl", "tqdm")
CLOSED_PIPE = 128 + 13  # exit status, as if the program had been ended by SIGPIPE


def to_numpy(array):
    """Array in host memory, for pictures and files."""
    return array.get() if hasattr(array, "get") else array


class Layer:
    """Base of the layers, with the methods of a batch norm layer: a call, modes, parameters and a state dict."""

    names = ()  # names of the parameters

    def __call__(self, x):
        return self.vjp(x)[0]

    def train(self, mode=True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)

    def parameters(self):
        return [getattr(self, name) for name in self.names]

    def state_dict(self, prefix=""):
        return {prefix + name: getattr(self, name) for name in self.names}

    def load_state_dict(self, state, prefix=""):
        for name in self.names:
            getattr(self, name)[...] = xp.asarray(state[prefix + name])


class Sequential(Layer):
    """A layer that applies other layers one after the other."""

    def __init__(self, *layers):
        self.layers = layers

    def vjp(self, x):
        vjp_fns = []
        for layer in self.layers:
            x, vjp_fn = layer.vjp(x)
            vjp_fns.append(vjp_fn)

        def vjp_fn(dy):
            grads = []
            for layer_vjp_fn in reversed(vjp_fns):
                dy, *layer_grads = layer_vjp_fn(dy)
                grads = [grad for grad in layer_grads if grad is not None] + grads  # None: batch norm had no residual
            return dy, *grads

        return x, vjp_fn

    def train(self, mode=True):
        for layer in self.layers:
            layer.train(mode)
        return self

    def parameters(self):
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def state_dict(self, prefix=""):
        return {key: a for i, layer in enumerate(self.layers) for key, a in layer.state_dict(f"{prefix}{i}.").items()}

    def load_state_dict(self, state, prefix=""):
        for i, layer in enumerate(self.layers):
            layer.load_state_dict(state, prefix=f"{prefix}{i}.")


class Conv2d(Layer):
    """Convolution of (N, C, H, W) arrays as one matrix product; no bias, as batch norm brings its own.

    In memory the channels come last, as matrix products want them: the output is an NCHW view of NHWC memory.
    """

    names = ("weight",)

    def __init__(self, rng, in_channels, out_channels, kernel=3, stride=1):
        std = np.sqrt(2 / (in_channels * kernel**2))  # He et al. (2015), for ReLU
        self.weight = xp.asarray(rng.normal(0, std, (out_channels, in_channels, kernel, kernel)), xp.float32)
        self.stride, self.padding = stride, kernel // 2

    def vjp(self, x):
        s, p, (C_out, C, k, _) = self.stride, self.padding, self.weight.shape
        padded = xp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (p, p), (p, p), (0, 0)))
        windows = xp.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))[:, ::s, ::s]
        N, H, W = windows.shape[:3]
        columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(N * H * W, k * k * C)
        weight = self.weight.transpose(2, 3, 1, 0).reshape(k * k * C, C_out)
        y = (columns @ weight).reshape(N, H, W, C_out).transpose(0, 3, 1, 2)

        def vjp_fn(dy):
            dy = dy.transpose(0, 2, 3, 1).reshape(N * H * W, C_out)
            dweight = (columns.T @ dy).reshape(k, k, C, C_out).transpose(3, 2, 0, 1)
            dcolumns = (dy @ weight.T).reshape(N, H, W, k, k, C)
            dpadded = xp.zeros_like(padded)
            for i in range(k):  # each pixel's gradient is a sum over the k x k windows that the pixel was part of
                for j in range(k):
                    dpadded[:, i : i + s * H : s, j : j + s * W : s] += dcolumns[:, :, :, i, j]
            dx = dpadded[:, p : p + x.shape[2], p : p + x.shape[3]]
            return dx.transpose(0, 3, 1, 2), dweight

        return y, vjp_fn


class MaxPool2d(Layer):
    """Maximum of every 2 x 2 pixels. Equal maxima share the gradient."""

    def vjp(self, x):
        N, C, H, W = x.shape
        blocks = x.reshape(N, C, H // 2, 2, W // 2, 2)
        y = blocks.max(axis=(3, 5), keepdims=True)

        def vjp_fn(dy):
            largest = (blocks == y).astype(x.dtype)
            shares = largest / largest.sum(axis=(3, 5), keepdims=True)
            return ((shares * dy.reshape(y.shape)).reshape(x.shape),)

        return y.reshape(N, C, H // 2, W // 2), vjp_fn


class GlobalAveragePool(Layer):
    """Mean of every channel: (N, C, H, W) to (N, C)."""

    def vjp(self, x):
        area = x.shape[2] * x.shape[3]
        return x.mean(axis=(2, 3)), lambda dy: (xp.broadcast_to(dy[:, :, None, None] / area, x.shape),)


class Linear(Layer):
    """y = x @ weight.T + bias."""

    names = ("weight", "bias")

    def __init__(self, rng, in_features, out_features):
        std = np.sqrt(2 / in_features)
        self.weight = xp.asarray(rng.normal(0, std, (out_features, in_features)), xp.float32)
        self.bias = xp.zeros(out_features, xp.float32)

    def vjp(self, x):
        return x @ self.weight.T + self.bias, lambda dy: (dy @ self.weight, dy.T @ x, dy.sum(axis=0))


class Bias(Layer):
    """Layer that takes the place of batch norm in a network without it: y = activation(x + bias + residual)."""

    names = ("bias",)

    def __init__(self, num_features, activation=None):
        self.bias, self.activation = xp.zeros(num_features, xp.float32), activation

    def vjp(self, x, residual=None):
        y = x + self.bias.reshape(-1, *[1] * (x.ndim - 2))
        y = y if residual is None else y + residual
        y = y if self.activation is None else xp.maximum(y, 0)

        def vjp_fn(dy):
            dx = dy if self.activation is None else dy * (y > 0)
            return dx, dx.sum(axis=(0, *range(2, x.ndim))), None if residual is None else dx

        return y, vjp_fn


def softmax_cross_entropy(scores, labels):
    """Mean loss, and its gradient with respect to the scores."""
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - xp.log(xp.exp(scores).sum(axis=1, keepdims=True))
    target = (labels[:, None] == xp.arange(scores.shape[1])).astype(scores.dtype)
    return -(target * log_p).sum() / len(scores), (xp.exp(log_p) - target) / len(scores)


class SGD:
    """Gradient descent with momentum: velocity = momentum * velocity + grad, parameter -= learning_rate * velocity."""

    def __init__(self, parameters, learning_rate, momentum=0.9):
        self.parameters, self.learning_rate, self.momentum = list(parameters), learning_rate, momentum
        self.velocities = [xp.zeros_like(parameter) for parameter in self.parameters]

    def step(self, grads):
        for parameter, velocity, grad in zip(self.parameters, self.velocities, grads, strict=True):
            velocity *= self.momentum
            velocity += grad
            parameter -= self.learning_rate * velocity


def train_epoch(network, optimizer, x, labels, batch_size, rng):
    """Train for one pass over the data in random order. Returns the mean loss."""
    total = 0
    for batch in np.array_split(rng.permutation(len(x)), len(x) // batch_size):
        batch = xp.asarray(batch)
        scores, vjp_fn = network.vjp(x[batch])
        loss, dscores = softmax_cross_entropy(scores, labels[batch])
        _, *grads = vjp_fn(dscores)
        optimizer.step(grads)
        total += loss * len(batch)
    return float(total) / len(x)


def run(main):
    """Run an example. No traceback if the reader of its output has seen enough, as `head` has."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard what is still to be written
        sys.exit(CLOSED_PIPE)


def options(text, epochs=None, output=None, needed=()):
    """Parse the options of an example: its text for `--help`, its number of epochs, and what it writes, for the help.

    Exits if a library is missing. Examples import libraries only after this, so that `--help` works without them.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if epochs is not None:
        parser.add_argument("--epochs", type=positive, default=epochs, help=f"passes over the data (default: {epochs})")
    if output is not None:
        parser.add_argument("--output", type=Path, default="output", help=f"folder of {output} (default: output)")
    args = parser.parse_args()
    missing = [name for name in (*NEEDED, *needed) if find_spec(name) is None]
    if missing:
        parser.exit(1, f"{parser.prog}: {', '.join(missing)} cannot be found: pip install '.[examples]'\n")
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # the matrices are small here: threads would wait for each other longer than they work
    if output is not None:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --output: {error}")
    return args


def positive(text):
    """Whole number of 1 or more from its text on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more (got {text!r})")
    return int(text)


def save_picture(figure, path, dpi):
    """Save a figure as a PNG of 256 colours, which is a third of the size."""
    from PIL import Image

    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize().save(path)
    print(f"Picture: {path}")
