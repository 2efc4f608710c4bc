"""Running statistics of data that drifts, and how fast they follow with momentum 0.5, 0.1, 0.01 and None.

The batches are strips of a photograph, two pixels wide, from left to right. The smaller the momentum, the steadier and
the later the running mean, and the longer it remembers that it started at 0. None is the plain mean of all batches so
far.

    pip install '.[examples]'
    python examples/running_statistics.py
"""

import numpy as np

import cupybn.functional as F
import layers
from cupybn import BatchNorm1d
from layers import xp

BLUE = 2  # number of the channel that is shown
STYLES = {
    "mean of batch": {"color": "0.75", "linewidth": 4},
    "mean so far": {"color": "black", "linestyle": ":", "linewidth": 3},
}


def main():
    args = layers.options(__doc__, output="the picture")
    from matplotlib.figure import Figure
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg")
    strips = np.split(photograph.astype(np.float32), photograph.shape[1] // 2, axis=1)
    batches = [xp.asarray(strip.reshape(-1, 3)) for strip in strips]  # (N, C): pixels and their colours
    means = {"mean of batch": [float(F.moments(x)[0][BLUE]) for x in batches]}
    means["mean so far"] = np.cumsum(means["mean of batch"]) / np.arange(1, len(batches) + 1)
    for momentum in (0.5, 0.1, 0.01, None):
        norm = BatchNorm1d(3, momentum=momentum)
        running_mean = means[f"momentum {momentum}"] = []
        for x in batches:
            norm(x)
            running_mean.append(float(norm.running_mean[BLUE]))

    shown = (1, 20, 60, 100, 200, len(batches))
    print(f"{len(batches)} batches of {len(batches[0])} pixels: mean of the blue channel")
    print("after batch    ", *(f"{batch:7}" for batch in shown))
    for name, values in means.items():
        print(f"{name:15}", *(f"{values[batch - 1]:7.2f}" for batch in shown))

    figure = Figure(figsize=(8, 5), layout="constrained")
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.5))
    top.imshow(photograph[::3, ::3], extent=(0.5, len(batches) + 0.5, 0, 1), aspect="auto")
    top.set(title="Batch after batch, a photograph from left to right", yticks=[])
    for name, values in means.items():
        axes.plot(range(1, len(batches) + 1), values, label=name, **STYLES.get(name, {}))
    axes.set(xlabel="batch", ylabel="running_mean of blue (0 to 255)")
    axes.legend(loc="lower right", ncols=2)
    layers.save_picture(figure, args.output / "running_statistics.png", dpi=80)


if __name__ == "__main__":
    layers.run(main)
