"""Batch norm on sequences of different length, padded to a batch: what a mask does, and what padding does without one.

A network of three convolutions tells lines of Python, of its stub files and of C apart, character by character. The
lines are those of the installed NumPy. Three networks have the same weights in the beginning and see the same batches,
padded with zeros to their longest line: one has no mask; one has it where the mean over the steps of a line is taken,
as is usual; and one has it in batch norm, too.

Each is then tested with more padding. Without a mask the scores depend on it. With a mask in the mean alone they hardly
do in eval mode. But the statistics are of text and padding together: once they are renewed (`update_bn`) from batches
that are padded otherwise, they no longer fit the weights. With a mask in batch norm padding does not exist.

    pip install '.[examples]'
    python examples/padded_sequences.py
"""

import sys
from pathlib import Path

import numpy as np

import cupybn
import layers
from cupybn import BatchNorm1d
from layers import to_numpy, xp

EPOCHS, SEEDS = 5, 3
LINES, RENEWING = 800, 256  # lines of each kind, and of all those that renew statistics
LONGEST, SHORTEST = 100, 4  # characters of a line; longer ones are cut
BATCH_SIZE, LEARNING_RATE = 32, 0.05
WIDTH, SYMBOLS = 24, 96  # channels of a convolution; printable characters and, as 0, padding
PADDING = (0, 25, 50, 100, 200)  # steps that are added in tests
NOWHERE, MEAN, EVERYWHERE = "no mask", "mask in the mean over steps", "mask in batch norm, too"
NAMES = ("Python", "stubs", "C")
GOAL = 0.75


# ---------------------------------------------------------------------------------------------------------------------
# Lines of text


def lines_of(suffix):
    """Lines of the files of NumPy with a suffix, without what indents them."""
    files = sorted(Path(np.__file__).parent.rglob(f"*{suffix}"))
    lines = (line.strip() for file in files for line in file.read_text(errors="replace").splitlines())
    return {line[:LONGEST] for line in lines if len(line) >= SHORTEST}


def load(rng):
    """Codes of characters, (N, LONGEST) with zeros behind the end of a line, and labels, in random order."""
    kinds = [lines_of(suffix) for suffix in (".py", ".pyi", ".h")]
    codes, labels = [], []
    for label, kind in enumerate(kinds):
        alone = sorted(kind.difference(*(other for other in kinds if other is not kind)))
        chosen = [alone[i] for i in rng.permutation(len(alone))[:LINES]]
        for line in chosen:
            symbols = np.frombuffer(line.encode("ascii", "replace"), np.uint8).astype(int) - 31
            codes.append(np.pad(symbols.clip(1, SYMBOLS - 1), (0, LONGEST - len(line))))
            labels.append(label)
    order = rng.permutation(len(codes))
    return np.array(codes)[order], np.array(labels)[order]


def padded(codes, more):
    """A batch that is padded to its longest line, and by so many steps more."""
    longest = int((codes > 0).sum(axis=1).max())
    return xp.asarray(np.pad(codes[:, :longest], ((0, 0), (0, more))))


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Embedding(layers.Layer):
    """Vector of each symbol: (N, L) to (N, L, C). That of padding is 0, and stays so."""

    names = ("weight",)

    def __init__(self, rng, channels):
        self.weight = xp.asarray(rng.normal(0, 1, (SYMBOLS, channels)), xp.float32)
        self.weight[0] = 0

    def vjp(self, codes):
        def vjp_fn(dy):
            chosen = (codes.reshape(-1, 1) == xp.arange(SYMBOLS)).astype(dy.dtype)
            chosen[:, 0] = 0
            return None, chosen.T @ dy.reshape(codes.size, -1)

        return self.weight[codes], vjp_fn


class Conv1d(layers.Layer):
    """Convolution of five steps of an (N, L, C) array, as one matrix product."""

    names = ("weight",)

    def __init__(self, rng, in_channels, out_channels, kernel=5):
        std = np.sqrt(2 / (in_channels * kernel))
        self.weight = xp.asarray(rng.normal(0, std, (kernel * in_channels, out_channels)), xp.float32)
        self.kernel = kernel

    def vjp(self, x):
        N, L, C = x.shape
        k = self.kernel
        around = xp.pad(x, ((0, 0), (k // 2, k // 2), (0, 0)))
        columns = xp.concatenate([around[:, i : i + L] for i in range(k)], axis=2).reshape(N * L, k * C)

        def vjp_fn(dy):
            dy = dy.reshape(N * L, -1)
            dcolumns = (dy @ self.weight.T).reshape(N, L, k, C)
            daround = xp.zeros_like(around)
            for i in range(k):
                daround[:, i : i + L] += dcolumns[:, :, i]
            return daround[:, k // 2 : k // 2 + L], columns.T @ dy

        return (columns @ self.weight).reshape(N, L, -1), vjp_fn


class MeanOverSteps(layers.Layer):
    """Mean over the steps of each sequence that a mask has left: (N, L, C) to (N, C)."""

    def vjp(self, x, mask=None):
        there = xp.ones(x.shape[:2], bool) if mask is None else mask
        share = (there / there.sum(axis=1, keepdims=True)).astype(x.dtype)[:, :, None]
        return (x * share).sum(axis=1), lambda dy: (dy[:, None] * share,)


class Network(layers.Layer):
    """Embedding, three convolutions with batch norm and ReLU, the mean over steps, and scores."""

    def __init__(self, masks, seed):
        rng = np.random.default_rng(seed)
        self.masks = masks
        self.body = [Embedding(rng, WIDTH // 2)]
        for C in (WIDTH // 2, WIDTH, WIDTH):
            self.body += [Conv1d(rng, C, WIDTH), BatchNorm1d(WIDTH, activation="relu", channel_axis=-1)]
        self.body += [MeanOverSteps(), layers.Linear(rng, WIDTH, len(NAMES))]
        self.norms = [layer for layer in self.body if isinstance(layer, BatchNorm1d)]

    def parameters(self):
        return [parameter for layer in self.body for parameter in layer.parameters()]

    def train(self, mode=True):
        for norm in self.norms:
            norm.train(mode)
        return self

    def vjp(self, codes):
        masked = {NOWHERE: (), MEAN: (MeanOverSteps,), EVERYWHERE: (MeanOverSteps, BatchNorm1d)}[self.masks]
        x, vjp_fns = codes, []
        for layer in self.body:
            x, vjp_fn = layer.vjp(x, mask=codes > 0) if isinstance(layer, masked) else layer.vjp(x)
            vjp_fns.append(vjp_fn)

        def vjp_fn(dy):
            grads = []
            for layer_vjp_fn in reversed(vjp_fns):
                dy, *layer_grads = layer_vjp_fn(dy)
                grads = [grad for grad in layer_grads if grad is not None] + grads
            return grads

        return x, vjp_fn


# ---------------------------------------------------------------------------------------------------------------------
# Training and tests


def batches_of(codes):
    return np.array_split(np.arange(len(codes)), max(len(codes) // BATCH_SIZE, 1))


def train(network, codes, labels, epochs, seed, progress):
    rng = np.random.default_rng(seed)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    steps = epochs * len(batches_of(codes))
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(codes))
        for places in batches_of(codes):
            batch = order[places]
            optimizer.learning_rate = LEARNING_RATE * (1 - step / steps) ** 2  # they rest in the end
            scores, vjp_fn = network.train().vjp(padded(codes[batch], 0))
            _, dscores = layers.softmax_cross_entropy(scores, xp.asarray(labels[batch]))
            optimizer.step(vjp_fn(dscores))
            step += 1
            progress.update()


def scores_of(network, codes, more):
    """Scores in eval mode, of batches with so many steps of padding more, as a NumPy array."""
    network.eval()
    return np.concatenate([to_numpy(network(padded(codes[places], more))) for places in batches_of(codes)])


def tests(network, codes, codes_test, labels_test):
    """Held-out accuracies of two tests with each amount of padding, and how far scores move in either.

    In the first padding is added to the batches of the test, in the second to batches that renew the statistics.
    """
    as_trained = [scores_of(network, codes_test, more) for more in PADDING]
    renewed, codes = [], codes[:RENEWING]
    for more in PADDING:
        cupybn.update_bn(network.norms, (padded(codes[places], more) for places in batches_of(codes)), network)
        renewed.append(scores_of(network, codes_test, 0))
    accuracies = [[(scores.argmax(axis=1) == labels_test).mean() for scores in test] for test in (as_trained, renewed)]
    return accuracies, [max(abs(scores - test[0]).max() for scores in test) for test in (as_trained, renewed)]


def report(results, moved, codes):
    shares = [float((padded(codes[places], 0) == 0).mean()) for places in batches_of(codes)]
    print(f"{len(codes)} lines; padding is {min(shares):.0%} to {max(shares):.0%} of a batch in training")
    names = ("eval mode, steps added to test batches", "statistics renewed, steps added to their batches")
    for test, name in enumerate(names):
        print(f"{name:50}" + "".join(f"{more:>14}" for more in PADDING) + "   scores move by")
        for masks, found in results.items():
            accuracy = zip(100 * found[:, test].mean(axis=0), 100 * found[:, test].std(axis=0), strict=True)
            columns = "".join(f"{mean:7.1f} ± {std:3.1f}%" for mean, std in accuracy)
            print(f"  {masks:48}{columns}{moved[masks][test]:17.1g}")


def draw(folder, results, codes, labels):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    batch, *axes = figure.subplots(1, 3, width_ratios=(1.05, 1, 1))
    order = np.lexsort((-(codes > 0).sum(axis=1), labels))
    batch.imshow(np.ma.masked_equal(codes[order], 0), cmap="viridis", aspect="auto", interpolation="nearest")
    batch.set_facecolor("0.88")
    batch.text(0.97, 0.05, "padding", ha="right", fontsize=9, color="0.35", transform=batch.transAxes)
    edges = np.searchsorted(labels[order], range(len(NAMES) + 1))
    batch.set_yticks((edges[1:] + edges[:-1]) / 2 - 0.5, NAMES, rotation=90, va="center")
    batch.tick_params(axis="y", length=0)
    for edge in edges[1:-1]:
        batch.axhline(edge - 0.5, color="black", lw=0.8)
    batch.set(title=f"A batch of {len(codes)} lines, by character", xlabel="step")
    styles = {NOWHERE: ("o-", "#d62728"), MEAN: ("s--", "#ff7f0e"), EVERYWHERE: ("D-", "#1f77b4")}
    titles = ("Eval mode,\nmore padding in the test", "Statistics renewed\nfrom batches with more padding")
    for test, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for masks, found in results.items():
            mean, std = 100 * found[:, test].mean(axis=0), 100 * found[:, test].std(axis=0)
            style, colour = styles[masks]
            ax.plot(PADDING, mean, style, color=colour, label=masks, markersize=4)
            ax.fill_between(PADDING, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set(title=title, xlabel="steps of padding added")
    low = min(ax.get_ylim()[0] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, None)
    axes[0].set_ylabel("held-out accuracy (%)")
    axes[0].legend(fontsize=8, loc="lower left")
    for ax in (batch, *axes):
        ax.title.set_fontsize(10)
    layers.save_picture(figure, folder / "padded_sequences.png", dpi=80)


def main():
    args = layers.options(
        __doc__, "the picture", epochs=(EPOCHS, "passes over the data"), seeds=(SEEDS, "networks of each kind")
    )
    from tqdm import tqdm

    results, moved = {}, {}
    with tqdm(desc="train", unit="step") as progress:
        for seed in range(args.seeds):
            codes, labels = load(np.random.default_rng(seed))
            held_out = len(codes) // 4
            progress.total = 3 * args.seeds * args.epochs * len(batches_of(codes[held_out:]))
            for masks in (NOWHERE, MEAN, EVERYWHERE):
                progress.set_description(f"{masks}, seed {seed}")
                network = Network(masks, seed)
                train(network, codes[held_out:], labels[held_out:], args.epochs, seed, progress)
                found, moves = tests(network, codes[held_out:], codes[:held_out], labels[:held_out])
                results.setdefault(masks, []).append(found)
                moved.setdefault(masks, []).append(moves)
    results = {masks: np.array(found) for masks, found in results.items()}  # seeds, tests, amounts of padding
    report(results, {masks: np.max(moves, axis=0) for masks, moves in moved.items()}, codes)
    draw(args.output, results, codes[:BATCH_SIZE], labels[:BATCH_SIZE])

    if moved_too_far := [moves for moves in moved[EVERYWHERE] if max(moves) > 1e-3]:
        sys.exit(f"expected scores that do not depend on padding (they moved by {np.max(moved_too_far):.1e})")
    if args.epochs >= EPOCHS:
        means = {masks: found.mean(axis=0) for masks, found in results.items()}
        if means[EVERYWHERE].min() < GOAL:
            sys.exit(f"expected a held-out accuracy of {GOAL:.0%} or more with masks")
        if means[NOWHERE][0, -1] > means[EVERYWHERE][0, -1] - 0.05:
            sys.exit("expected padding to cost 5% of accuracy or more without a mask")


if __name__ == "__main__":
    layers.run(main)
