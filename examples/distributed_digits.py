"""Train the network of train_digits.py on several processes, each with its own part of every batch.

The worst case for plain batch norm: batches are spread by digit, and unevenly. With `SyncBatchNorm` the ranks take the
steps of a single process that has the whole batch, but for rounding. On some processors a matrix product rounds a row
alike in every batch, and losses differ in the last bit; on others a ReLU turns out the other way now and then, and the
difference grows. With `BatchNorm2d` each rank normalizes by the statistics of its own digits, and in eval mode by its
own running statistics. All start at the same weights. Prints how far their losses are from those of the single process,
and their accuracies on digits that were held out; draws the losses.

    pip install '.[examples]'
    mpiexec -n 2 python -m mpi4py examples/distributed_digits.py
"""

import sys
from functools import partial

import numpy as np

import layers
from cupybn import BatchNorm2d, SyncBatchNorm
from layers import xp
from train_digits import BATCH_SIZE, LEARNING_RATE, accuracy, make_network

EPOCHS = 3
FIRST, BOUND = 10, 2e-3  # in the first FIRST steps, rounding moves a loss by less than BOUND, other statistics by more
SHOWN = 1e-8  # smallest difference that is drawn: a logarithmic axis has no place for 0
SINGLE, SYNCHRONIZED, PLAIN = "single process", "SyncBatchNorm", "BatchNorm2d"


def part_of(comm, batch, labels):
    """Part of this rank when a batch is sorted by label and cut in the ratio n : n - 1 : ... : 1."""
    ratio = np.arange(comm.size, 0, -1)
    cuts = len(batch) * ratio.cumsum() // ratio.sum()
    return np.split(batch[labels[batch].argsort()], cuts[:-1])[comm.rank]


def sum_over_ranks(comm, arrays):
    """Sums of arrays over all ranks, exchanged as one message. All ranks get the same bits."""
    from mpi4py import MPI

    message = np.concatenate([layers.to_numpy(array).ravel() for array in arrays])
    comm.Allreduce(MPI.IN_PLACE, message)
    parts = np.split(message, np.cumsum([array.size for array in arrays])[:-1])
    return [xp.asarray(part.reshape(array.shape)) for part, array in zip(parts, arrays, strict=True)]


def train(name, norm, comm, x, labels, epochs):
    """Train a network on the ranks of comm together. Returns the network and the loss of every step."""
    from mpi4py import MPI
    from tqdm import tqdm

    rng = np.random.default_rng(0)
    network = make_network(norm).train()
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    batches = [b for _ in range(epochs) for b in np.array_split(rng.permutation(len(x)), len(x) // BATCH_SIZE)]
    losses = []
    for batch in tqdm(batches, desc=name, unit="step", disable=MPI.COMM_WORLD.rank > 0):
        part = part_of(comm, batch, labels)
        scores, vjp_fn = network.vjp(xp.asarray(x[part]))
        loss, dscores = layers.softmax_cross_entropy(scores, xp.asarray(labels[part]))
        share = len(part) / len(batch)  # weight of this rank, so that sums over ranks are means over the batch
        _, *grads = vjp_fn(dscores * share)
        loss, *grads = sum_over_ranks(comm, [loss * share, *grads])
        optimizer.step(grads)
        losses.append(float(loss))
    parameters = b"".join(layers.to_numpy(parameter).tobytes() for parameter in network.parameters())
    if len(set(comm.allgather(parameters))) > 1:
        raise RuntimeError(f"{name}: ranks have different parameters")
    return network, np.array(losses)


def report(ranks, losses, accuracies, folder):
    """Print and draw the results, and exit with an error if they are not as the text at the top says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, distance_axes = figure.subplots(1, 2)
    styles = {SINGLE: {"color": "0.75", "linewidth": 5}, SYNCHRONIZED: {"color": "C0"}, PLAIN: {"color": "C1"}}
    early = {}
    for name, values in losses.items():
        steps, distance = range(1, len(values) + 1), np.abs(values - losses[SINGLE])
        early[name] = distance[:FIRST].max()
        print(
            f"{name:14}: last loss {values[-1]:.4f}; loss differs by {early[name]:.1e} in the first {FIRST} steps, by "
            f"{distance.max():.1e} in all {len(values)}; held-out accuracy on each rank",
            *(f"{held_out:.2%}" for held_out in accuracies[name]),
        )
        loss_axes.semilogy(steps, values, label=name, **styles[name])
        if name != SINGLE:
            distance_axes.semilogy(steps, np.maximum(distance, SHOWN), ".-", **styles[name])

    loss_axes.set(title="Training loss", xlabel="step", ylabel="cross entropy")
    loss_axes.legend()
    label = "cross entropy (0 is drawn at 1e-8)"
    distance_axes.set(title="Difference from the single process", xlabel="step", ylabel=label, ylim=(SHOWN / 3, 3))
    figure.suptitle(f"Batches of handwritten digits, spread by digit over {ranks} rank{'s' * (ranks > 1)}")
    layers.save_picture(figure, folder / "distributed_digits.png", dpi=90)

    if not early[SYNCHRONIZED] <= BOUND:
        sys.exit(f"expected {SYNCHRONIZED} to follow the single process to {BOUND} in the first {FIRST} steps")
    if ranks > 1 and not early[PLAIN] > BOUND:
        sys.exit(f"expected {PLAIN} not to follow the single process to {BOUND} in the first {FIRST} steps")


def main():
    args = layers.options(__doc__, "the picture", needed=("mpi4py",), epochs=(EPOCHS, "passes over the data"))
    from mpi4py import MPI
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    world = MPI.COMM_WORLD
    if xp is not np:
        xp.cuda.Device(world.rank % xp.cuda.runtime.getDeviceCount()).use()  # one for each rank, if there are enough

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    data = train_test_split(images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    x, x_test, labels, labels_test = data
    if world.rank == 0:
        print(f"{len(x)} digits to learn from, {len(x_test)} held out, {xp.__name__} arrays, {world.size} ranks")

    losses, accuracies = {}, {}
    for name, norm, comm in (
        (SINGLE, BatchNorm2d, MPI.COMM_SELF),  # every rank trains this network by itself, on whole batches
        (SYNCHRONIZED, partial(SyncBatchNorm, comm=world), world),
        (PLAIN, BatchNorm2d, world),
    ):
        network, losses[name] = train(name, norm, comm, x, labels, args.epochs)
        held_out = accuracy(network, xp.asarray(x_test), xp.asarray(labels_test), training=False)
        accuracies[name] = world.gather(held_out)
    if world.rank == 0:
        report(world.size, losses, accuracies, args.output)


if __name__ == "__main__":
    layers.run(main)
