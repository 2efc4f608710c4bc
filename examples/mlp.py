"""Batch norm on tabular data, (N, C): raw measurements in units of their own, with batch norm and without.

A network with two hidden layers tells malignant from benign tumours by 30 measurements of cell nuclei. Some are 0.004
on average and some 880, and nobody scaled them: the first batch norm does. Each network may have the learning rate
that suits it.

    pip install '.[examples]'
    python examples/mlp.py
"""

import numpy as np

import layers
from cupybn import BatchNorm1d
from layers import xp

EPOCHS, BATCH_SIZE, HIDDEN = 25, 64, 32


def make_network(norm, seed):
    rng = np.random.default_rng(seed)
    return layers.Sequential(
        norm(30),
        layers.Linear(rng, 30, HIDDEN),
        norm(HIDDEN, activation="relu"),
        layers.Linear(rng, HIDDEN, HIDDEN),
        norm(HIDDEN, activation="relu"),
        layers.Linear(rng, HIDDEN, 2),
    )


def held_out_accuracy(norm, learning_rate, seed):
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    data = load_breast_cancer()
    data = train_test_split(data.data.astype(np.float32), data.target, random_state=seed, stratify=data.target)
    x, x_test, labels, labels_test = map(xp.asarray, data)
    network = make_network(norm, seed)
    optimizer = layers.SGD(network.parameters(), learning_rate)
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        layers.train_epoch(network, optimizer, x, labels, BATCH_SIZE, rng)
    return float((network.eval()(x_test).argmax(axis=1) == labels_test).mean())


def main():
    layers.options(__doc__)
    print("Held-out accuracy in eval mode, mean of 3 splits (always the larger class: 62.7%)")
    print("learning rate   with batch norm   without batch norm")
    for learning_rate in (1e-5, 1e-4, 1e-3, 1e-2):
        with_norm, without = (
            np.mean([held_out_accuracy(norm, learning_rate, seed) for seed in range(3)])
            for norm in (BatchNorm1d, layers.Bias)
        )
        print(f"{learning_rate:<13g}   {with_norm:<15.1%}   {without:.1%}")


if __name__ == "__main__":
    layers.run(main)
