"""Two moons, learned with a gradient penalty and without: gradients of gradients, by hand, through batch norm.

A network that learns 100 noisy points by heart is steep where they disagree. The penalty is how steep: half the mean
over the points of |N * dx|^2, where dx is the gradient of the loss with respect to a point. Whoever trains with it goes
back through the way back, for which batch norm has ``vjp_fn.vjp``.

In training mode batch norm lets the points of a batch act on each other, so that none has a slope of its own: critics
of a WGAN-GP, which ask for one of 1 at each point, take layer norm instead. Here the penalty is that of the one loss of
the whole batch, whose gradient is there whatever acts on what.

    pip install '.[examples]'
    python examples/gradient_penalty.py
"""

import sys

import numpy as np

import layers
from cupybn import BatchNorm1d
from cupybn.functional import BatchNormGrads

EPOCHS, SEEDS, POINTS, HELD_OUT, NOISE = 300, 5, 100, 2000, 0.3
HIDDEN, LEARNING_RATE = 64, 0.1
STRENGTHS = (0, 0.01, 0.03, 0.1, 0.3, 1)  # of the penalty
SHOWN = (0, 0.3)  # the strengths whose networks are drawn


class Linear(layers.Linear):
    """The linear layer, with a way back that has the form of batch norm's and can be gone back itself."""

    def vjp(self, x):
        y, first_order = super().vjp(x)

        def vjp_fn(dy):
            return BatchNormGrads(*first_order(dy), residual=None)

        def vjp_of_vjp(dy):
            def second_vjp_fn(cotangents):  # of dx = dy @ weight; nothing comes from those of weight and bias here
                cdx, *_ = cotangents
                return cdx @ self.weight.T, BatchNormGrads(None, dy.T @ cdx, None, None)

            return vjp_fn(dy), second_vjp_fn

        vjp_fn.vjp = vjp_of_vjp
        return y, vjp_fn


def softmax_cross_entropy(scores, labels):
    """Mean loss, its gradient with respect to the scores, and the function that goes back through that gradient."""
    loss, dscores = layers.softmax_cross_entropy(scores, labels)
    p = layers.xp.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    def vjp_of_dscores(cdscores):  # dscores = (p - target) / N
        return p * (cdscores - (p * cdscores).sum(axis=1, keepdims=True)) / len(scores)

    return loss, dscores, vjp_of_dscores


def penalized(network, x, labels, strength):
    """Loss and penalty of a batch, without its strength, and the gradients of loss + strength * penalty."""
    vjp_fns, y = [], x
    for layer in network.layers:
        y, vjp_fn = layer.vjp(y)
        vjp_fns.append(vjp_fn)
    loss, dscores, vjp_of_dscores = softmax_cross_entropy(y, labels)

    second_vjp_fns, dx = [], dscores  # the way back, from the last layer to the points
    for vjp_fn in reversed(vjp_fns):
        (dx, *_), second_vjp_fn = vjp_fn.vjp(dx)
        second_vjp_fns.append(second_vjp_fn)
    penalty = len(x) / 2 * (dx * dx).sum()

    seconds, cdx = [], strength * len(x) * dx  # the way back of the way back, which begins at the points
    for second_vjp_fn in reversed(second_vjp_fns):
        cdx, second = second_vjp_fn(BatchNormGrads(cdx, None, None, None))
        seconds.append(second)

    grads, dy = [], dscores + vjp_of_dscores(cdx)  # and the way back for both, which meet in every layer
    for vjp_fn, second in zip(reversed(vjp_fns), reversed(seconds), strict=True):
        both = zip(vjp_fn(dy), second, strict=True)
        dy, *layer_grads = (grad if more is None else grad + more for grad, more in both)
        grads = [grad for grad in layer_grads if grad is not None] + grads
    return loss, penalty, grads


def make_network(seed, device):
    rng = np.random.default_rng(seed)
    return layers.Sequential(
        Linear(rng, 2, HIDDEN),
        BatchNorm1d(HIDDEN, activation="relu", device=device),
        Linear(rng, HIDDEN, HIDDEN),
        BatchNorm1d(HIDDEN, activation="relu", device=device),
        Linear(rng, HIDDEN, 2),
    )


def moons(count, seed):
    """Points of two moons, and which moon each belongs to."""
    from sklearn.datasets import make_moons

    x, labels = make_moons(count, noise=NOISE, random_state=seed)
    return layers.xp.asarray(x, layers.xp.float32), layers.xp.asarray(labels)


def train(strength, seed, epochs, device):
    """A trained network in eval mode; and its loss, its penalty, and loss and accuracy for points that are held out."""
    (x, labels), (x_test, labels_test) = moons(POINTS, seed), moons(HELD_OUT, 1000 + seed)
    network = make_network(seed, device)
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    for epoch in range(epochs):
        optimizer.learning_rate = LEARNING_RATE * (1 - epoch / epochs)
        loss, penalty, grads = penalized(network, x, labels, strength)
        optimizer.step(grads)
    scores = network.eval()(x_test)
    held_out, _ = layers.softmax_cross_entropy(scores, labels_test)
    return network, [float(n) for n in (loss, penalty, held_out, (scores.argmax(axis=1) == labels_test).mean())]


def report(results):
    print("strength     loss   penalty   held-out loss, median (least .. most)   held-out accuracy")
    for strength, found in results.items():
        loss, penalty, held_out, accuracy = np.median(found, axis=0)
        around = f"{held_out:.3f} ({found[:, 2].min():.3f} .. {found[:, 2].max():.3f})"
        print(f"  {strength:<7g}{loss:8.3f}{penalty:10.2f}{around:>41}{accuracy:20.1%}")


def draw(folder, networks, results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    surfaces, curve = left.subplots(1, 2), right.subplots()
    across, up = np.linspace(-2, 3, 201), np.linspace(-1.6, 2.1, 151)
    grid = np.stack(np.meshgrid(across, up), axis=2).reshape(-1, 2)
    x, labels = (layers.to_numpy(array) for array in moons(POINTS, 0))
    for ax, (strength, network) in zip(surfaces, networks.items(), strict=True):
        scores = layers.to_numpy(network(layers.xp.asarray(grid, layers.xp.float32))).reshape(len(up), len(across), 2)
        p = 1 / (1 + np.exp(scores[..., 0] - scores[..., 1]))
        image = ax.contourf(across, up, p, np.linspace(0, 1, 11), cmap="RdBu_r", vmin=-0.2, vmax=1.2)
        ax.contour(across, up, p, [0.5], colors="black", linewidths=1)
        for label, colour in enumerate(("#053061", "#b2182b")):
            ax.scatter(*x[labels == label].T, s=24, color=colour, edgecolors="white", linewidths=0.8)
        ax.set(title=f"penalty of strength {strength}" if strength else "no penalty", xticks=[], yticks=[])
    left.colorbar(image, ax=surfaces, location="bottom", pad=0.03, aspect=50, label="probability of the lower moon")
    held_out = np.array([found[:, 2] for found in results.values()])
    places = range(len(results))
    curve.plot(places, np.median(held_out, axis=1), "o-", color="#1b7837")
    curve.fill_between(places, held_out.min(axis=1), held_out.max(axis=1), color="#1b7837", alpha=0.2, lw=0)
    curve.set_xticks(places, [f"{strength:g}" for strength in results])
    curve.set(title=f"loss of {HELD_OUT:,} held-out points", xlabel="strength of the penalty", ylim=(0, None))
    curve.grid(axis="y", alpha=0.3)
    few = f"median, least and most of {held_out.shape[1]} networks" if held_out.shape[1] > 1 else "one network"
    figure.suptitle(f"Two moons, {POINTS} points to learn from; right: {few}", fontsize=12)
    layers.save_picture(figure, folder / "gradient_penalty.png", dpi=90)


def main():
    args = layers.options(
        __doc__,
        "the picture",
        epochs=(EPOCHS, "passes over the data"),
        seeds=(SEEDS, "networks and sets of points"),
        device=True,
    )
    from tqdm import tqdm

    if args.device == "cpu":
        layers.xp = np
    print(f"{POINTS} points to learn from, {HELD_OUT} held out, {layers.xp.__name__} arrays")
    networks, results = {}, {}
    with tqdm(total=len(STRENGTHS) * args.seeds, unit="network") as progress:
        for strength in STRENGTHS:
            progress.set_description(f"strength {strength}")
            results[strength] = np.empty((args.seeds, 4))
            for seed in range(args.seeds):
                network, results[strength][seed] = train(strength, seed, args.epochs, args.device)
                if seed == 0 and strength in SHOWN:
                    networks[strength] = network
                progress.update()
    report(results)
    draw(args.output, networks, results)

    without, with_penalty = (np.median(results[strength][:, 2]) for strength in SHOWN)
    if args.epochs >= EPOCHS and with_penalty > 0.8 * without:
        sys.exit("expected the penalty to lower the loss of held-out points by 20% or more")


if __name__ == "__main__":
    layers.run(main)
