"""Batch norm and group norm at batch sizes from 64 down to 2, on handwritten digits.

Batch norm takes the mean and variance of a channel from all positions of all images of a batch, group norm those of a
few channels from one image. How small a batch may be depends on what is left of an image: two networks learn the digits
with either norm, one whose last feature maps have 2 x 2 positions, and one that goes on to 1 x 1. There a batch of two
images has two values for a channel, which batch norm makes -1 and 1, whatever they were; group norm does not know how
large the batch is. All have the same number of passes over the data, at learning rates proportional to the batch size:
large batches make few steps, which is what costs accuracy there.

    pip install '.[examples]'
    python examples/small_batches.py
"""

import sys

import numpy as np

import layers
from cupybn import BatchNorm2d, GroupNorm
from layers import xp

EPOCHS, SEEDS, DIGITS = 6, 3, 300
SIZES = (2, 4, 8, 16, 32, 64)  # of batches
LEARNING_RATE = 0.1 / 32  # for each image of a batch
STAGES = ((8, 1), (16, 2), (32, 2), (32, 2))  # channels and stride of each convolution
GROUPS = 4  # of channels that share a mean and a variance
NORMS = {
    "batch norm": BatchNorm2d,
    "group norm": lambda C, activation: GroupNorm(GROUPS, C, activation=activation),
}
NETWORKS = {"2 x 2": 3, "1 x 1": 4}  # stages by the positions that they end with


def make_network(norm, stages, seed):
    rng = np.random.default_rng(seed)
    body, C_in = [], 1
    for C, stride in STAGES[:stages]:
        body += [layers.Conv2d(rng, C_in, C, stride=stride), NORMS[norm](C, activation="relu")]
        C_in = C
    return layers.Sequential(*body, layers.GlobalAveragePool(), layers.Linear(rng, C_in, 10))


def load(seed):
    """Digits to learn from, with their labels, and all others, which are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    parts = train_test_split(images, digits.target, train_size=DIGITS, random_state=seed, stratify=digits.target)
    x, x_test, labels, labels_test = map(xp.asarray, parts)
    return (x, labels), (x_test, labels_test)


def accuracy(network, learned, held_out, size, epochs, seed):
    """Share of held-out digits that a network tells right in eval mode, once it has learned in batches of a size."""
    rng = np.random.default_rng(seed)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE * size)
    for epoch in range(epochs):
        optimizer.learning_rate = LEARNING_RATE * size * (1 - epoch / epochs)
        layers.train_epoch(network.train(), optimizer, *learned, size, rng)
    x, labels = held_out
    return float((network.eval()(x).argmax(axis=1) == labels).mean())


def report(results):
    print(f"{'held-out accuracy, median (least .. most)':44}" + "".join(f"{'batches of ' + str(n):>22}" for n in SIZES))
    for (positions, norm), found in results.items():
        columns = 100 * np.stack([np.median(found, axis=0), found.min(axis=0), found.max(axis=0)])
        texts = ["{:.1f}% ({:.1f} .. {:.1f})".format(*column) for column in columns.T]
        print(f"  {norm}, last norm on {positions:17}" + "".join(f"{text:>22}" for text in texts))


def draw(folder, results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(NETWORKS), sharey=True)
    styles = dict(zip(NORMS, (("o-", "#1f77b4"), ("s--", "#d62728")), strict=True))
    for ax, positions in zip(axes, NETWORKS, strict=True):
        for norm, (style, colour) in styles.items():
            found = 100 * results[positions, norm]
            ax.plot(SIZES, np.median(found, axis=0), style, color=colour, label=norm, markersize=5)
            ax.fill_between(SIZES, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.2, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(SIZES, SIZES)
        ax.set(title=f"Last norm on {positions} positions", xlabel="batch size")
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("held-out accuracy (%)")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{DIGITS} digits to learn from: median, least and most of {len(found)} networks", fontsize=10)
    layers.save_picture(figure, folder / "small_batches.png", dpi=90)


def main():
    args = layers.options(
        __doc__, "the picture", epochs=(EPOCHS, "passes over the data"), seeds=(SEEDS, "networks of each kind")
    )
    from tqdm import tqdm

    data = [load(seed) for seed in range(args.seeds)]
    (x, _), (x_test, _) = data[0]
    print(f"{len(x)} digits to learn from, {len(x_test)} held out, {xp.__name__} arrays")
    results = {(positions, norm): np.empty((args.seeds, len(SIZES))) for positions in NETWORKS for norm in NORMS}
    with tqdm(total=len(results) * args.seeds * len(SIZES), unit="network") as progress:
        for (positions, norm), found in results.items():
            for place in np.ndindex(found.shape):
                seed, size = place[0], SIZES[place[1]]
                progress.set_description(f"{norm}, {positions}, batches of {size}")
                network = make_network(norm, NETWORKS[positions], seed)
                found[place] = accuracy(network, *data[seed], size, args.epochs, seed)
                progress.update()
    report(results)
    draw(args.output, results)

    if args.epochs >= EPOCHS:
        medians = {kind: dict(zip(SIZES, np.median(found, axis=0), strict=True)) for kind, found in results.items()}
        collapsed = medians.pop(("1 x 1", "batch norm"))
        if min(by_size[size] for by_size in (collapsed, *medians.values()) for size in (8, 16)) < 0.85:
            sys.exit("expected every network to tell 85% or more of the digits right after batches of 8 and 16")
        if min(by_size[2] for by_size in medians.values()) < collapsed[2] + 0.2:
            sys.exit("expected batches of 2 to cost 20% or more, and only of batch norm on 1 x 1 positions")


if __name__ == "__main__":
    layers.run(main)
