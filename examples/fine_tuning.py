"""Fine-tune with frozen statistics: a network that knows the digits 0 to 4 learns 5 to 9.

There are three ways to treat batch norm meanwhile. In training mode the running statistics follow the new digits. In
eval mode they stay as they are, and the layers use them. With ``track_running_stats = False`` they stay, too, but the
layers use the batch: the statistics are then out of date in eval mode, until one more pass over the data renews them.

    pip install '.[examples]'
    python examples/fine_tuning.py
"""

import numpy as np

import layers
from cupybn import BatchNorm2d, no_stats_update
from layers import to_numpy, xp

EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 32, 0.02


def make_network():
    rng = np.random.default_rng(0)
    return layers.Sequential(
        layers.Conv2d(rng, 1, 16),
        BatchNorm2d(16, activation="relu"),
        layers.Conv2d(rng, 16, 32, stride=2),
        BatchNorm2d(32, activation="relu"),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 32, 5),
    )


def norms(network):
    return [layer for layer in network.layers if isinstance(layer, BatchNorm2d)]


def buffers(network):
    """Bytes of all running statistics and counters, to compare them bit by bit."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [to_numpy(getattr(norm, name)).tobytes() for norm in norms(network) for name in names]


def train(network, x, labels):
    rng = np.random.default_rng(1)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        layers.train_epoch(network, optimizer, x, labels, BATCH_SIZE, rng)


def accuracy(network, x, labels):
    with no_stats_update():
        return float((network(x).argmax(axis=1) == labels).mean())


def load(first):
    """Digits of five classes: x, x_test, labels, labels_test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = (digits.target >= first) & (digits.target < first + 5)
    images, labels = digits.images[chosen][:, None] / 16, digits.target[chosen] - first
    data = train_test_split(images.astype(np.float32), labels, random_state=0, stratify=labels)
    return [xp.asarray(array) for array in data]


def main():
    layers.options(__doc__)
    x, x_test, labels, labels_test = load(0)
    network = make_network()
    train(network, x, labels)
    print(f"Digits 0 to 4: {accuracy(network.eval(), x_test, labels_test):.1%} of those held out")
    pretrained = {key: to_numpy(array).copy() for key, array in network.state_dict().items()}

    x, x_test, labels, labels_test = load(5)
    print(f"Digits 5 to 9, batch norm in {'':12}   running statistics   held out: training mode   eval mode")
    for way in ("training mode", "eval mode", "training mode, tracking nothing"):
        network = make_network()
        network.load_state_dict(pretrained)
        before = buffers(network)
        for norm in norms(network):
            norm.training = way != "eval mode"
            norm.track_running_stats = way != "training mode, tracking nothing"
        train(network, x, labels)
        moved = "have moved" if buffers(network) != before else "same bits"
        in_training = accuracy(network.train(), x_test, labels_test)
        in_eval = accuracy(network.eval(), x_test, labels_test)
        print(f"  {way:39} {moved:20} {in_training:23.1%} {in_eval:11.1%}")

    for norm in norms(network):  # the last network, which has tracked nothing
        norm.track_running_stats, norm.momentum = True, None  # the plain mean over all batches
        norm.reset_running_stats()
    network.train()(x)
    print(f"  {'... and one more pass over the data':39} renewed {accuracy(network.eval(), x_test, labels_test):48.1%}")


if __name__ == "__main__":
    layers.run(main)
