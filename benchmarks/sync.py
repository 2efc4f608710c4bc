"""Times of synchronized batch norm: the exchange between ranks, and a step with it beside one without.

    python benchmarks/sync.py            # 1, 2, 4 and 8 ranks under mpiexec; a table, results and a plot
    python benchmarks/sync.py --short    # 2 ranks, a few calls: does it run?
    python benchmarks/sync.py --paper    # no ranks: bytes, messages and times of a model for 8, 64 and 1024 of them

Ranks hold NumPy arrays, float32, (8, C, 14, 14) each, and use one thread. A step is a forward pass in training and the
way back. `SyncBatchNorm` and `BatchNorm2d` take turns in every round, after a barrier; the exchange is measured by
itself as well, as rows of C channels that are gathered, then added up. Medians of all rounds on rank 0, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import numpy as np
from cpu_files import Measured, save
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # ranks are started as in the tests

import cupybn
from cupybn import BatchNorm2d, SyncBatchNorm
from cupybn._ranks.engines import engine_for
from tests.ranks.launch import RANK_ENVIRONMENT, find_mpiexec

RANKS, CHANNELS, ROUNDS = (1, 2, 4, 8), (16, 64, 256, 1024, 2048), 60
SAMPLES, SIDE = 8, 14

Times = dict[str, list[float]]
"""Lower quartile, median and upper quartile in us, of the exchange, the synchronized and the plain step."""
Results = dict[str, dict[str, Times]]
"""Times by number of ranks and number of channels."""


# ---------------------------------------------------------------------------------------------------------------------
# The measurement, which runs on every rank


def measure(folder: Path, channels: list[int], rounds: int) -> None:
    """Measure all calls on the ranks that there are; rank 0 writes the times to a file in the folder."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    results = {}
    for C in channels:
        x = np.random.default_rng(comm.rank).standard_normal((SAMPLES, C, SIDE, SIDE)).astype(np.float32)
        calls = {
            "exchange": exchange(comm, C),
            "synchronized": step(SyncBatchNorm(C, device="cpu", comm=comm, timeout=None), x),
            "plain": step(BatchNorm2d(C, device="cpu"), x),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                comm.Barrier()
                start = time.perf_counter()
                call()
                times[name].append(1e6 * (time.perf_counter() - start))
        results[str(C)] = {name: quantiles(values[1:], n=4) for name, values in times.items()}
    if comm.rank == 0:
        (folder / f"{comm.size}.json").write_text(json.dumps(results))


def step(layer: BatchNorm2d | SyncBatchNorm, x: np.ndarray) -> Callable[[], None]:
    def call() -> None:
        y, vjp_fn = layer.vjp(x)
        vjp_fn(y)

    return call


def exchange(comm: object, C: int) -> Callable[[], None]:
    """A call that exchanges the two messages of a step with the other ranks."""
    engine = engine_for(comm, None)
    moments, sums = np.zeros((1, 1 + 2 * C)), np.zeros((1, 2 * C))

    def call() -> None:
        engine.gather(moments, np.zeros(2))
        engine.sum(sums, np.zeros(1))

    return call


# ---------------------------------------------------------------------------------------------------------------------
# The process that starts the ranks


def run(ranks: int, channels: list[int], rounds: int) -> dict[str, Times]:
    """The times of so many ranks, by channels."""
    mpiexec = find_mpiexec()
    if mpiexec is None:
        sys.exit("no mpiexec: pip install '.[mpi]'")
    options = ["--rounds", str(rounds), "--channels", *map(str, channels)]
    with tempfile.TemporaryDirectory() as folder:
        command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--folder", folder, *options]
        subprocess.run(command, check=True, env=os.environ | RANK_ENVIRONMENT)
        results: dict[str, Times] = json.loads((Path(folder) / f"{ranks}.json").read_text())
    return results


def table(results: Results) -> str:
    """The table, with a line for each number of ranks and of channels."""
    lines = [f"{'ranks':>5}{'C':>6}{'exchange, us':>22}{'step, us':>24}{'without ranks, us':>24}{'ratio':>7}"]
    for ranks, rows in results.items():
        for C, times in rows.items():
            cells = (f"{mid:.0f} ({low:.0f}..{high:.0f})" for low, mid, high in times.values())
            exchange, synchronized, plain = cells
            ratio = times["synchronized"][1] / times["plain"][1]
            lines.append(f"{ranks:>5}{C:>6}{exchange:>22}{synchronized:>24}{plain:>24}{ratio:>7.2f}")
    return "\n".join(lines)


def plot(results: Results, title: str, path: Path) -> None:
    """Draw the time of the exchange over the channels, and that of a step relative to one without ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ranks, rows in results.items():
        channels = [int(C) for C in rows]
        low, mid, high = zip(*(times["exchange"] for times in rows.values()), strict=True)
        if ranks != "1":
            left.loglog(channels, mid, "o-", label=f"{ranks} ranks")
            left.fill_between(channels, low, high, alpha=0.15)
        ratios = [times["synchronized"][1] / times["plain"][1] for times in rows.values()]
        right.semilogx(channels, ratios, "o-", label=f"{ranks} ranks")
    left.set(title="Exchange, both ways", xlabel="channels", ylabel="us")
    right.set(title="A step of SyncBatchNorm / of BatchNorm2d", xlabel="channels", ylabel="times", ylim=0)
    for axes in left, right:
        axes.set_xticks(list(CHANNELS), [str(C) for C in CHANNELS])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------------
# The model

LINKS = {"NVLink": (450e9, 2e-6), "network": (50e9, 5e-6)}
"""Links that the model assumes: bytes/s that a rank receives, and seconds for each message.

NVLink is that of an H200, 900 GB/s in both directions together; the network has 400 Gb/s for each GPU.
"""
RESNET50 = {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4}
"""Number of ResNet-50's batch norm layers by their channels: 53 layers with 26,560 channels."""


def on_paper() -> str:
    """The table of the model, for a step of single layers and of ResNet-50.

    Its columns are the bytes that a rank receives, the messages that follow one after the other, and the times.
    """
    lines = [f"{'':16}{'ranks':>6}{'gathered':>12}{'added up':>12}{'rounds':>8}{'NVLink':>12}{'network':>12}"]
    layers = {f"C = {C}": {C: 1} for C in (64, 512, 2048)} | {"ResNet-50": RESNET50}
    for name, counts in layers.items():
        for ranks in 8, 64, 1024:
            gathered = sum(n * (ranks - 1) * 8 * (3 + 2 * C) for C, n in counts.items())
            summed = sum(n * 2 * (ranks - 1) / ranks * 8 * (1 + 2 * C) for C, n in counts.items())
            rounds = 2 * math.ceil(math.log2(ranks)) * sum(counts.values())
            times = (1e6 * (rounds * latency + (gathered + summed) / rate) for rate, latency in LINKS.values())
            cells = "".join(f"{f'{t:,.0f} us':>12}" for t in times)
            lines.append(f"{name:16}{ranks:>6}{amount(gathered):>12}{amount(summed):>12}{rounds:>8}{cells}")
    return "\n".join(lines)


def amount(n: float) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description="What synchronized batch norm costs.")
    parser.add_argument("--short", action="store_true", help="2 ranks and few calls")
    parser.add_argument("--paper", action="store_true", help="a model instead of measurements")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--channels", type=int, nargs="*", default=CHANNELS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to ranks alone
    args = parser.parse_args()
    if args.folder:
        measure(args.folder, args.channels, args.rounds)
        return
    if args.paper:
        print(on_paper())
        return
    ranks, channels, rounds = ((2,), [16], 3) if args.short else (RANKS, args.channels, args.rounds)
    results = {str(n): run(n, channels, rounds) for n in tqdm(ranks, unit="run")}
    versions = f"cupybn {cupybn.__version__}, NumPy {np.__version__}, {mpi_version()}"
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"
    print(f"{versions}\n{machine}, float32, {rounds} rounds: median (quartiles)\n{table(results)}")
    stem = args.output / ("sync-short" if args.short else "sync")
    save(Measured(versions, machine, rounds, results), stem, plot)


def mpi_version() -> str:
    """The version of the MPI that mpi4py finds, asked in another process so that MPI is not started here."""
    code = "from mpi4py import MPI; print(' '.join(MPI.Get_library_version().split()[:3]))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
