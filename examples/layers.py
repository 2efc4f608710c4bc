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

    def __call__(self, x, **more):
        return self.vjp(x, **more)[0]

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
    """A layer that applies other layers one after the other. Without any, its output is its input."""

    def __init__(self, *layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

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

    def leaves(self):
        """Layers in it that have no other layers in them, in their order."""
        for layer in self.layers:
            yield from layer.leaves() if isinstance(layer, Sequential) else (layer,)

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


class ResidualBlock(Sequential):
    """Residual block of conv1, norm1, conv2, norm2 and, unless the shortcut is x itself, a layer for that.

    y = relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)), of which norm2 does normalization, sum and ReLU in one
    pass: both norms have ``activation="relu"``.
    """

    def __call__(self, x):
        conv1, norm1, conv2, norm2, *shortcut = self.layers
        return norm2(conv2(norm1(conv1(x))), residual=Sequential(*shortcut)(x))

    def vjp(self, x):
        conv1, norm1, conv2, norm2, *shortcut = self.layers
        y, body_vjp = Sequential(conv1, norm1, conv2).vjp(x)
        residual, shortcut_vjp = Sequential(*shortcut).vjp(x)
        y, norm2_vjp = norm2.vjp(y, residual=residual)

        def vjp_fn(dy):
            dy, *dnorm2, dresidual = norm2_vjp(dy)
            dx, *dbody = body_vjp(dy)
            dx_of_shortcut, *dshortcut = shortcut_vjp(dresidual)
            return dx + dx_of_shortcut, *dbody, *dnorm2, *dshortcut

        return y, vjp_fn


def pad(x, padding, value=0):
    """The (N, H, W, C) view of an (N, C, H, W) array, with rows and columns of a value around each image."""
    around = (padding, padding)
    return xp.pad(x.transpose(0, 2, 3, 1), ((0, 0), around, around, (0, 0)), constant_values=value)


def places(kernel, stride, H, W):
    """Indices into padded images, one for each place of a window: the elements that H x W windows have there."""
    down, right = ([slice(i, i + stride * n, stride) for i in range(kernel)] for n in (H, W))
    return [(slice(None), i, j) for i in down for j in right]


def conv2d(x, weight, stride=1, padding=0):
    """Convolution of an (N, C, H, W) array as one matrix product, and the function from dy to dx and dweight.

    In memory the channels come last, as matrix products want them: the output is an NCHW view of NHWC memory.
    """
    C_out, C, k, _ = weight.shape
    H, W = ((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])
    padded = pad(x, padding)
    columns = xp.stack([padded[place] for place in places(k, stride, H, W)], axis=3).reshape(-1, k * k * C)
    y = columns @ weight.transpose(0, 2, 3, 1).reshape(C_out, k * k * C).T

    def vjp_fn(dy):
        dweight = columns.T @ dy.transpose(0, 2, 3, 1).reshape(-1, C_out)
        dx = conv_transpose2d(dy, weight, stride, padding, x.shape[2:])
        return dx, dweight.reshape(k, k, C, C_out).transpose(3, 2, 0, 1)

    return y.reshape(-1, H, W, C_out).transpose(0, 3, 1, 2), vjp_fn


def conv_transpose2d(x, weight, stride=1, padding=0, size=None):
    """Transposed convolution: each pixel adds a window to the output, where it overlaps with those of others.

    The weight is (C_in, C_out, k, k), and (H, W) of the output as small as windows allow unless a size says otherwise.
    """
    C_in, C, k, _ = weight.shape
    N, _, H, W = x.shape
    size = [(n - 1) * stride + k - 2 * padding for n in (H, W)] if size is None else size
    columns = x.transpose(0, 2, 3, 1).reshape(-1, C_in) @ weight.transpose(0, 2, 3, 1).reshape(C_in, k * k * C)
    columns = columns.reshape(N, H, W, k * k, C)
    padded = xp.zeros((N, *(n + 2 * padding for n in size), C), columns.dtype)
    for n, place in enumerate(places(k, stride, H, W)):
        padded[place] += columns[:, :, :, n]
    y = padded[:, padding : padding + size[0], padding : padding + size[1]]
    return xp.ascontiguousarray(y).transpose(0, 3, 1, 2)


class Conv2d(Layer):
    """Convolution; no bias, as batch norm brings its own."""

    names = ("weight",)

    def __init__(self, rng, in_channels, out_channels, kernel=3, stride=1):
        std = np.sqrt(2 / (in_channels * kernel**2))  # He et al. (2015), for ReLU
        self.weight = xp.asarray(rng.normal(0, std, (out_channels, in_channels, kernel, kernel)), xp.float32)
        self.stride, self.padding = stride, kernel // 2

    def vjp(self, x):
        return conv2d(x, self.weight, self.stride, self.padding)


class MaxPool2d(Layer):
    """Maximum of every window of kernel x kernel pixels. Equal maxima share the gradient."""

    def __init__(self, kernel=2, stride=2, padding=0):
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def vjp(self, x):
        p, (H_x, W_x) = self.padding, x.shape[2:]
        H, W = ((size + 2 * p - self.kernel) // self.stride + 1 for size in x.shape[2:])
        padded = pad(x, p, -xp.inf)
        windows = places(self.kernel, self.stride, H, W)
        y = padded[windows[0]]
        for place in windows[1:]:
            y = xp.maximum(y, padded[place])

        def vjp_fn(dy):
            largest = [(padded[place] == y).astype(dy.dtype) for place in windows]
            shares = dy.transpose(0, 2, 3, 1) / sum(largest)
            dpadded = xp.zeros_like(padded)
            for place, is_largest in zip(windows, largest, strict=True):
                dpadded[place] += shares * is_largest
            return (dpadded[:, p : p + H_x, p : p + W_x].transpose(0, 3, 1, 2),)

        return y.transpose(0, 3, 1, 2), vjp_fn


class GlobalAveragePool(Layer):
    """Mean of every channel: (N, C, H, W) to (N, C)."""

    def vjp(self, x):
        area = x.shape[2] * x.shape[3]
        return x.mean(axis=(2, 3)), lambda dy: (xp.broadcast_to(dy[:, :, None, None] / area, x.shape),)


class Linear(Layer):
    """y = x @ weight.T + bias, where x may have any axes before that of its features."""

    names = ("weight", "bias")

    def __init__(self, rng, in_features, out_features):
        std = np.sqrt(2 / in_features)
        self.weight = xp.asarray(rng.normal(0, std, (out_features, in_features)), xp.float32)
        self.bias = xp.zeros(out_features, xp.float32)

    def vjp(self, x):
        rows = x.reshape(-1, x.shape[-1])

        def vjp_fn(dy):
            dy = dy.reshape(len(rows), -1)
            return (dy @ self.weight).reshape(x.shape), dy.T @ rows, dy.sum(axis=0)

        return (rows @ self.weight.T + self.bias).reshape(*x.shape[:-1], -1), vjp_fn


class Bias(Layer):
    """Layer that takes the place of batch norm in a network without it: y = activation(x + bias + residual)."""

    names = ("bias",)

    def __init__(self, num_features, activation=None):
        self.bias, self.activation = xp.zeros(num_features, xp.float32), activation

    def vjp(self, x, residual=None):
        y = x + self.bias.reshape(-1, *[1] * (x.ndim - 2))
        if residual is not None:
            y += residual
        if self.activation is not None:
            xp.maximum(y, 0, out=y)

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


def options(text, output=None, needed=(), device=False, switches=None, choices=None, **numbers):
    """Parse the options of an example: its text for `--help`, what it writes, and its numbers, for the help.

    A number has a default and a text: ``epochs=(3, "passes over the data")``. A switch has a text, a choice its values,
    of which the first is the default, and a text. With ``device=True`` there is an option for whose arrays are taken.
    Exits if a library is missing. Examples import libraries only after this, so that `--help` works without them.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{meaning} (default: {default})")
    for name, meaning in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    for name, (values, meaning) in (choices or {}).items():
        parser.add_argument(f"--{name}", choices=values, default=values[0], help=meaning)
    if device:
        default = "cpu" if xp is np else "cuda"
        meaning = "NumPy or CuPy arrays; if not given: cuda where there is a GPU, else cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=meaning)
    if output is not None:
        parser.add_argument("--output", type=Path, default="output", help=f"folder of {output} (default: output)")
    args = parser.parse_args()
    if device and args.device == "cuda" and xp is np:
        parser.error("argument --device: CuPy finds no GPU")
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
