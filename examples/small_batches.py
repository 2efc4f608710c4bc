"""Batch norm and group norm beside each other at batch sizes 64 to 2, on handwritten digits.

Batch norm takes the mean and variance of a channel from the batch, group norm those of a few channels from one image:
the first has the fewer values the smaller the batch is, and what it takes in eval mode was learned from such batches.
The same small network learns the digits with either norm, and without any, in the same number of passes over the data,
at a learning rate proportional to the batch size. Prints and draws the mistakes in digits that were held out.

    pip install '.[examples]'
    python examples/small_batches.py
"""

import sys

import numpy as np

import layers
from cupybn import BatchNorm2d, GroupNorm
from layers import xp

EPOCHS, SEEDS, SIZES = 4, 5, (2, 4, 8, 16, 32, 64)
LEARNING_RATE = 0.1 / 32  # for each image of a batch
WIDTH, GROUPS = 16, 4  # channels of the first convolution, and groups of channels
KINDS = {
    "batch norm": BatchNorm2d,
    "group norm": lambda C, activation: GroupNorm(GROUPS, C, activation=activation),
    "no norm": layers.Bias,
}


def make_network(norm, seed):
    rng = np.random.default_rng(seed)
    body, channels = [], 1
    for C, stride in ((WIDTH, 1), (2 * WIDTH, 2), (2 * WIDTH, 1)):
        body += [layers.Conv2d(rng, channels, C, stride=stride), norm(C, activation="relu")]
        channels = C
    return layers.Sequential(*body, layers.GlobalAveragePool(), layers.Linear(rng, channels, 10))


def load(seed):
    """Images and labels to learn from, and those held out, of this seed's split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    parts = train_test_split(images, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    return [xp.asarray(part) for part in parts]


def mistakes(norm, size, epochs, seed):
    """Share of held-out digits that a network gets wrong in eval mode, after training with a batch size."""
    x, x_test, labels, labels_test = load(seed)
    network, rng = make_network(norm, seed), np.random.default_rng(seed)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE * size)
    for epoch in range(epochs):
        optimizer.learning_rate = LEARNING_RATE * size * (1 - epoch / epochs)
        layers.train_epoch(network.train(), optimizer, x, labels, size, rng)
    return float((network.eval()(x_test).argmax(axis=1) != labels_test).mean())
