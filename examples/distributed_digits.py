"""Train the network of train_digits.py on several processes, each with its own part of every batch.

The worst case for plain batch norm: each rank sees other digits, and the first ranks see more of them than the last.
Synchronized, the ranks take the steps of a single process that has the whole batch; with `BatchNorm2d` each normalizes
with the statistics of its own digits. All three networks have the same initial weights and batches. Prints how far
their losses are from those of the single process, and their accuracies on digits that were held out; draws both losses
and distances.

    CUPYBN_NUM_THREADS=1 mpiexec -n 2 python -m mpi4py examples/distributed_digits.py
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from mpi4py import MPI
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import layers
from cupybn import BatchNorm2d, SyncBatchNorm
from layers import xp
from train_digits import BATCH_SIZE, LEARNING_RATE, accuracy, make_network

EPOCHS, FIRST, BOUND = 3, 10, 1e-4  # in the first steps, rounding moves the loss by less than this


def part_of(comm, batch, labels):
    """This rank's part of a batch: sorted by label and cut into parts of sizes n, n - 1, ... 1."""
    sizes = np.arange(comm.size, 0, -1)
    cuts = len(batch) * sizes.cumsum() // sizes.sum()
    return np.split(batch[labels[batch].argsort()], cuts[:-1])[comm.rank]


def sum_over_ranks(comm, arrays):
    """The sums of arrays over all ranks, which get the same bits, as one message."""
    message = np.concatenate([layers.to_numpy(array).ravel() for array in arrays])
    comm.Allreduce(MPI.IN_PLACE, message)
    parts = np.split(message, np.cumsum([array.size for array in arrays])[:-1])
    return [xp.asarray(part.reshape(array.shape)) for part, array in zip(parts, arrays, strict=True)]


def train(name, norm, comm, x, labels, epochs):
    """The network, and the loss of every step, by the ranks of comm."""
    rng = np.random.default_rng(0)
    network = make_network(norm).train()
    optimizer = layers.SGD(network.parameters(), LEARNING_RATE)
    batches = [b for _ in range(epochs) for b in np.array_split(rng.permutation(len(x)), len(x) // BATCH_SIZE)]
    losses = []
    for batch in tqdm(batches, desc=name, unit="step", disable=MPI.COMM_WORLD.rank > 0):
        part = part_of(comm, batch, labels)
        scores, vjp_fn = network.vjp(xp.asarray(x[part]))
        loss, dscores = layers.softmax_cross_entropy(scores, xp.asarray(labels[part]))
        share = len(part) / len(batch)  # sums over ranks are to be means over the batch
        _, *grads = vjp_fn(dscores * share)
        loss, *grads = sum_over_ranks(comm, [loss * share, *grads])
        optimizer.step(grads)
        losses.append(float(loss))
    parameters = b"".join(layers.to_numpy(parameter).tobytes() for parameter in network.parameters())
    if len(set(comm.allgather(parameters))) > 1:
        raise RuntimeError(f"{name}: ranks have different parameters")
    return network, np.array(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default="output", help="folder of the picture")
    args = parser.parse_args()

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8), from 0 to 1
    data = train_test_split(images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    x, x_test, labels, labels_test = data

    world = MPI.COMM_WORLD
    single, synchronized, plain = "single process", "SyncBatchNorm", "BatchNorm2d"
    runs = {
        single: train(single, BatchNorm2d, MPI.COMM_SELF, x, labels, args.epochs),  # every rank does the same
        synchronized: train(synchronized, partial(SyncBatchNorm, comm=world), world, x, labels, args.epochs),
        plain: train(plain, BatchNorm2d, world, x, labels, args.epochs),
    }
    if world.rank > 0:
        return  # eval mode needs no other ranks

    distances = {}
    for name, (network, losses) in runs.items():
        d = distances[name] = np.abs(losses - runs[single][1])
        held_out = accuracy(network, xp.asarray(x_test), xp.asarray(labels_test), training=False)
        print(name, d[:FIRST].max(), d[:21].max(), d.max(), losses[-1], held_out, d[:21])


if __name__ == "__main__":
    main()
