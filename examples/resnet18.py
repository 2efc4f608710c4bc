"""ResNet-18 on two photographs: training, inference with batch norm and with batch norm folded, and their time.

The architecture is torchvision's. The weights are random, but fixed by a seed, and the scores of its classes mean
nothing. ReLU and the sums of the residual blocks are fused into batch norm. `update_bn` settles the running statistics
on crops of the photographs and on their mirror images, and `fold_conv_bn` takes batch norm into the convolutions, which
leaves the scores as they were, to 1e-5 of the largest one.

Then it measures where the time goes: on a CPU that of all threads. Look at shares, not at seconds: the convolution is
the plain one of layers.py. Where batch norm is folded, ReLU and sums have passes of their own, counted as the rest.

    pip install '.[examples]'
    python examples/resnet18.py
"""

import copy
import sys

import numpy as np

import cupybn
import layers
from cupybn import BatchNorm2d
from layers import to_numpy, xp
from stopwatch import Stopwatch, timed

CLASSES, BOUND = 1000, 1e-5
ROOM = 0.04  # width of a part, relative to the longest bar, in which its share can be written
NORM, CONVOLUTION, REST = "batch norm", "convolution", "the rest"
COLORS = {NORM: "tab:orange", CONVOLUTION: "#8ab6d6", REST: "0.85"}
FORWARD, BACKWARD, INFERENCE, FOLDED = "training, forward", "training, backward", "inference", "inference, folded"


def conv_norm(rng, C_in, C_out, kernel=3, stride=1, activation="relu"):
    return layers.Conv2d(rng, C_in, C_out, kernel, stride), BatchNorm2d(C_out, activation=activation)


def basic_block(rng, C_in, C_out, stride):
    body = [*conv_norm(rng, C_in, C_out, stride=stride), *conv_norm(rng, C_out, C_out)]
    if C_in == C_out:
        return layers.ResidualBlock(*body)
    return layers.ResidualBlock(*body, layers.Sequential(*conv_norm(rng, C_in, C_out, 1, stride, activation=None)))


def make_network():
    rng = np.random.default_rng(0)
    blocks = []
    for C_in, C_out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [basic_block(rng, C_in, C_out, stride), basic_block(rng, C_out, C_out, 1)]
    return layers.Sequential(
        *conv_norm(rng, 3, 64, kernel=7, stride=2),
        layers.MaxPool2d(kernel=3, stride=2, padding=1),
        *blocks,
        layers.GlobalAveragePool(),
        layers.Linear(rng, 512, CLASSES),
    )


def fold(conv, norm):
    """Convolution and bias that take the place of a convolution and a batch norm in inference."""
    affine = copy.copy(norm)  # a twin that shares the arrays of norm
    affine.activation = None  # ReLU cannot be folded: it comes behind the bias
    folded, bias = copy.copy(conv), layers.Bias(norm.num_features, norm.activation)
    folded.weight, bias.bias = cupybn.fold_conv_bn(conv.weight, None, affine)
    return folded, bias


def fold_all(network):
    """The network for inference, without batch norm: each is folded into the convolution before it."""
    result = copy.copy(network)
    result.layers = []
    for layer in network.layers:
        if isinstance(layer, BatchNorm2d):
            result.layers += fold(result.layers.pop(), layer)
        else:
            result.layers.append(fold_all(layer) if isinstance(layer, layers.Sequential) else layer)
    return result


def load(size, across=0.5):
    """The photographs as (2, 3, size, size), from -1 to 1: squares from the left, across=0, to the right, across=1."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    squares = np.stack([ImageOps.fit(photo, (size, size), centering=(across, 0.5)) for photo in photos])
    return xp.asarray(squares.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)


def difference(scores, expected):
    """Largest difference, relative to the largest score."""
    return float(abs(scores - expected).max() / abs(expected).max())


def measure(network, folded, x, labels, repetitions):
    """Seconds that each pass spends in each part: medians over the repetitions."""
    from tqdm import tqdm

    watch, rounds = Stopwatch(), []
    names = {BatchNorm2d: NORM, layers.Conv2d: CONVOLUTION}
    timed_network, timed_folded = (timed(net, watch, names) for net in (network, folded))

    def seconds(function, argument):
        result = watch.run("all", function, argument)
        parts = {NORM: 0.0, CONVOLUTION: 0.0} | watch.seconds()
        parts[REST] = parts.pop("all") - sum(parts[part] for part in names.values())
        return result, parts

    for _ in tqdm(range(repetitions), desc="timing", unit="round"):
        times = {}
        network.train()
        (scores, vjp_fn), times[FORWARD] = seconds(timed_network.vjp, x)
        _, times[BACKWARD] = seconds(vjp_fn, layers.softmax_cross_entropy(scores, labels)[1])
        network.eval()
        _, times[INFERENCE] = seconds(timed_network, x)
        _, times[FOLDED] = seconds(timed_folded, x)
        rounds.append(times)
    return {name: {part: float(np.median([t[name][part] for t in rounds])) for part in COLORS} for name in rounds[0]}


def report(times, x, folder):
    """Print and draw where the time goes; the unit is one inference with batch norm."""
    from matplotlib.figure import Figure

    unit = sum(times[INFERENCE].values())
    print(f"Time, in inferences: {'':6}", *(f"{part:>14}" for part in COLORS), f"{'together':>12}")
    for name, parts in times.items():
        total = sum(parts.values())
        print(f"  {name:25}", *(f"{parts[part] / total:14.0%}" for part in COLORS), f"{total / unit:12.2f}")

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplot_mosaic([["photo 0", "bars"], ["photo 1", "bars"]], width_ratios=(1, 4))
    for n, photo in enumerate(to_numpy(x.transpose(0, 2, 3, 1))):
        panels[f"photo {n}"].imshow((photo + 1) / 2)
        panels[f"photo {n}"].set_axis_off()
    axes, ends = panels["bars"], np.zeros(len(times))
    totals = np.array([sum(parts.values()) for parts in times.values()]) / unit
    room = ROOM * totals.max()
    for part, color in COLORS.items():
        widths = np.array([parts[part] for parts in times.values()]) / unit
        bars = axes.barh(list(times), widths, left=ends, color=color, label=part)
        shares = [f"{w / total:.0%}" if w > room else "" for w, total in zip(widths, totals, strict=True)]
        axes.bar_label(bars, shares, label_type="center", fontsize=8)
        ends += widths
    axes.invert_yaxis()
    axes.set(xlabel="time (1: inference with batch norm)", title=f"ResNet-18 on two photographs, {xp.__name__} arrays")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=len(COLORS), frameon=False)
    layers.save_picture(figure, folder / "resnet18.png", dpi=90)


def main():
    args = layers.options(
        __doc__,
        "the picture",
        size=(224, "height and width of the photographs"),
        repetitions=(7, "passes of each kind that are timed"),
    )
    x, labels = load(args.size), xp.arange(2)
    network = make_network()
    parameters = sum(parameter.size for parameter in network.parameters())
    print(f"{parameters:,} random weights, fixed by a seed; photographs {x.shape}, {xp.__name__} arrays")

    trained, vjp_fn = network.train().vjp(x)
    loss, dscores = layers.softmax_cross_entropy(trained, labels)
    length = sum(float((grad**2).sum()) for grad in vjp_fn(dscores)[1:]) ** 0.5
    print(f"Training: loss {float(loss):.3f}, gradient of all weights of length {length:.3f}")

    early = difference(network.eval()(x), trained)
    norms = [layer for layer in network.leaves() if isinstance(layer, BatchNorm2d)]
    crops = [load(args.size, across) for across in (0, 0.25, 0.5, 0.75, 1)]
    cupybn.update_bn(norms, crops + [crop[..., ::-1] for crop in crops], network)
    scores = network(x)
    print("Largest difference of scores, relative to the largest score")
    print(f"  eval mode from training mode, after 1 batch    {early:.1e}")
    print(f"  eval mode from training mode, after update_bn  {difference(scores, trained):.1e}")
    folded = fold_all(network)
    error = difference(folded(x), scores)
    print(f"  {len(norms)} batch norms folded, from not folded          {error:.1e}")

    report(measure(network, folded, x, labels, args.repetitions), x, args.output)
    if not error <= BOUND:
        sys.exit(f"expected folding to change scores by {BOUND} of the largest one or less")


if __name__ == "__main__":
    layers.run(main)
