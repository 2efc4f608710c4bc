"""Train a small residual network on real handwritten digits, with batch norm and without.

Both networks have the same layers, initial weights, batches and learning rate. Prints their accuracies on digits that
were held out, in training mode and in eval mode; draws the learning curves; writes a checkpoint and reads it back.

    pip install '.[examples]'
    python examples/train_digits.py
"""

import sys

import numpy as np

import layers
from cupybn import BatchNorm2d, no_stats_update
from layers import xp

EPOCHS, BATCH_SIZE, LEARNING_RATE, GOAL = 15, 64, 0.1, 0.98


def make_network(norm):
    rng = np.random.default_rng(0)

    def conv_norm_relu(C_in, C_out):
        return layers.Conv2d(rng, C_in, C_out), norm(C_out, activation="relu")

    return layers.Sequential(
        *conv_norm_relu(1, 32),
        layers.ResidualBlock(*conv_norm_relu(32, 32), *conv_norm_relu(32, 32)),
        layers.MaxPool2d(),
        *conv_norm_relu(32, 64),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 64, 10),
    )


def accuracy(network, x, labels, training):
    with no_stats_update():  # a test must not move the running statistics, not even one in training mode
        return float((network.train(training)(x).argmax(axis=1) == labels).mean())


def train(name, network, x, labels, x_test, labels_test, epochs):
    """Train a network. Returns the training loss and the held-out accuracy of every epoch."""
    from tqdm import tqdm

    rng = np.random.default_rng(0)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    losses, accuracies = [], []
    progress = tqdm(range(epochs), desc=name, unit="epoch")
    for _ in progress:
        network.train()
        losses.append(layers.train_epoch(network, optimizer, x, labels, BATCH_SIZE, rng))
        accuracies.append(accuracy(network, x_test, labels_test, training=False))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", held_out=f"{accuracies[-1]:.1%}")
    return losses, accuracies


def main():
    args = layers.options(__doc__, "the picture and the checkpoint", epochs=(EPOCHS, "passes over the data"))
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    data = train_test_split(images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    x, x_test, labels, labels_test = map(xp.asarray, data)
    print(f"{len(x)} digits to learn from, {len(x_test)} held out, {xp.__name__} arrays")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, wrong_axes = figure.subplots(1, 2)
    networks = {"with batch norm": make_network(BatchNorm2d), "without batch norm": make_network(layers.Bias)}
    for name, network in networks.items():
        losses, accuracies = train(name, network, x, labels, x_test, labels_test, args.epochs)
        loss_axes.semilogy(range(1, args.epochs + 1), losses, "o-", label=name)
        wrong = len(x_test) * (1 - np.array(accuracies))
        wrong_axes.plot(range(1, args.epochs + 1), wrong.round(), "o-", label=name)
        in_training = accuracy(network, x_test, labels_test, training=True)
        print(f"{name:18}: held-out accuracy {in_training:.2%} in training mode, {accuracies[-1]:.2%} in eval mode")

    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross entropy")
    wrong_axes.set(title=f"Mistakes in {len(x_test)} held-out digits, eval mode", xlabel="epoch", ylabel="mistakes")
    wrong_axes.set_yscale("symlog", linthresh=1)  # a logarithmic axis that has a place for 0
    wrong_axes.set(
        ylim=(-0.2, len(x_test)), yticks=(0, 1, 3, 10, 30, 100, 300), yticklabels=(0, 1, 3, 10, 30, 100, 300)
    )
    wrong_axes.legend()
    figure.suptitle(f"1,797 handwritten digits, the same network at learning rate {LEARNING_RATE}")
    layers.save_picture(figure, args.output / "train_digits.png", dpi=90)

    network = networks["with batch norm"]
    np.savez(args.output / "digits.npz", **{key: layers.to_numpy(array) for key, array in network.state_dict().items()})
    fresh = make_network(BatchNorm2d)
    with np.load(args.output / "digits.npz") as checkpoint:
        fresh.load_state_dict(checkpoint)
    if not (fresh.eval()(x_test) == network.eval()(x_test)).all():
        raise RuntimeError("the checkpoint does not give the same outputs")
    print(f"The checkpoint gives the same bits: {args.output / 'digits.npz'}")
    if args.epochs == EPOCHS and accuracy(network, x_test, labels_test, training=False) < GOAL:
        sys.exit(f"expected a held-out accuracy of {GOAL:.0%} or more in eval mode")


if __name__ == "__main__":
    layers.run(main)
