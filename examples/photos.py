"""Two real photographs through batch norm, a VGG block, a ResNet block and a classifier, in training and in eval mode.

The photographs are channels-last arrays and are normalised as such. The weights are random: there are shapes and
statistics to see here, and how eval mode comes to agree with training mode; the scores of the classes mean nothing.

    pip install '.[examples]'
    python examples/photos.py
"""

import numpy as np

import cupybn.functional as F
import layers
from cupybn import BatchNorm2d
from layers import to_numpy, xp

BATCHES = 40  # passes in training mode, in which the running statistics settle, at momentum 0.1
MODES = ("training mode", "eval mode after 1 batch", f"eval mode after {BATCHES} batches")


def resnet_block(rng, C_in, C_out):
    """Residual block at half the height and width."""
    return layers.ResidualBlock(
        layers.Conv2d(rng, C_in, C_out, stride=2),
        BatchNorm2d(C_out, activation="relu"),
        layers.Conv2d(rng, C_out, C_out),
        BatchNorm2d(C_out, activation="relu"),
        layers.Sequential(layers.Conv2d(rng, C_in, C_out, kernel=1, stride=2), BatchNorm2d(C_out)),
    )


def vgg_block(rng, C_in, C_out):
    return layers.Sequential(
        layers.Conv2d(rng, C_in, C_out),
        BatchNorm2d(C_out, activation="relu"),
        layers.Conv2d(rng, C_out, C_out),
        BatchNorm2d(C_out, activation="relu"),
        layers.MaxPool2d(),
    )


def in_three_modes(layer, x):
    """Outputs of a layer in training mode, in eval mode right after that, and in eval mode after more batches."""
    layer.train()
    outputs = [layer(x)]
    outputs.append(layer.eval()(x))
    layer.train()
    for _ in range(BATCHES - 1):
        layer(x)
    outputs.append(layer.eval()(x))
    return dict(zip(MODES, outputs, strict=True))


def print_moments(title, x, channel_axis):
    mean, var = F.moments(x, channel_axis=channel_axis)
    channels = (f"{float(m):8.3f} +- {float(v) ** 0.5:6.3f}" for m, v in zip(mean[:3], var[:3], strict=True))
    print(f"  {title:27}", *channels)


def main():
    args = layers.options(__doc__, output="the picture")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.datasets import load_sample_images

    photos = np.stack(load_sample_images().images)[:, :416:2, ::2]
    x = xp.asarray(photos.astype(np.float32))
    print(f"Photographs {x.shape}: red, green and blue, mean +- standard deviation")
    print_moments("as they are, 0 to 255", x, -1)
    normalised = in_three_modes(BatchNorm2d(3, channel_axis=-1), x)
    for mode, y in normalised.items():
        print_moments(mode, y, -1)

    rng = np.random.default_rng(0)
    x = normalised[MODES[0]].transpose(0, 3, 1, 2)  # an NCHW view of the same memory, which the blocks keep
    vgg, resnet = vgg_block(rng, 3, 16), resnet_block(rng, 16, 32)
    head = layers.Sequential(layers.GlobalAveragePool(), layers.Linear(rng, 32, 10))
    features = {"VGG block": in_three_modes(vgg, x)}
    features["ResNet block"] = in_three_modes(resnet, features["VGG block"][MODES[0]])
    for name, outputs in features.items():
        print(f"{name} {outputs[MODES[0]].shape}: the first three channels of the output")
        for mode, y in outputs.items():
            print_moments(mode, y, 1)
    scores = {mode: head(y) for mode, y in features["ResNet block"].items()}
    print(f"Scores {scores[MODES[0]].shape} of random classes: largest difference from training mode")
    for mode in MODES[1:]:
        print(f"  {mode:27} {float(abs(scores[mode] - scores[MODES[0]]).max()):8.3f}")

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(2, 4)
    for photo, (name, outputs) in enumerate(features.items()):
        maps = [to_numpy(y[photo, 0]) for y in outputs.values()]
        axes[photo, 0].imshow(photos[photo, ::2, ::2])
        axes[photo, 0].set_ylabel(name)
        for ax, mode, feature_map in zip(axes[photo, 1:], MODES, maps, strict=True):
            image = ax.imshow(feature_map, vmin=0, vmax=2.5, cmap=colormaps["magma"].resampled(10))
            ax.set_title(mode if photo == 0 else "", fontsize=10)
        bar = figure.colorbar(image, ax=axes[photo], extend="max")
        bar.set_label("output, channel 0\n(standard deviations)", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_title("photograph", fontsize=10)
    figure.suptitle("Feature maps of two blocks with random weights", fontsize=12)
    layers.save_picture(figure, args.output / "photos.png", dpi=80)


if __name__ == "__main__":
    layers.run(main)
