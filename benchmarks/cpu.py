"""Batch norm of NumPy arrays against PyTorch on the CPU: how many times as long PyTorch takes.

    python benchmarks/cpu.py             # all shapes, a table, results and a plot in benchmarks/results
    python benchmarks/cpu.py --short     # two shapes, a few calls: does it run?

Both use the same number of threads, in one process, float32. They take turns: a round is a burst of calls of one, then
of the other. The first call of a burst is not counted, since the threads of the other may still be winding down. The
ratio of a shape is the median over the rounds of (PyTorch's median time / cupybn's median time).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import matplotlib
import numpy as np
from cpu_files import Measured, save
from tqdm import tqdm

import cupybn
import cupybn.functional as F
from cupybn._cli.extras import optional

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

torch: Any = optional("torch")

RESNET50 = [  # the number of channels C, and H = W, of its twelve shapes
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
SHAPES = [
    *(((8, c, hw, hw), layout) for layout in ("NCHW", "NHWC") for c, hw in RESNET50),
    ((256, 1024), "NC"),
    ((4096, 256), "NC"),
    ((16, 128, 2000), "NCL"),
]
SHORT = [((8, 64, 14, 14), "NHWC"), ((16, 128), "NC")]
GOALS = {"training": 1.0, "inference": 1.0, "backward": 0.8, "add + ReLU": None}
CALLS = 3
TICKS = [0.1, 0.2, 0.5, 1, 2, 5]


def cases(shape: tuple[int, ...], layout: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The pairs of calls to compare, PyTorch's and ours, on the same data and memory order."""
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    tensors = [torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3)]
    vectors = [torch.zeros(shape[1]), torch.ones(shape[1]), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    x, residual, dy = (t.numpy() for t in tensors)
    running_and_affine = [v.numpy().copy() for v in vectors]
    t, t_residual, t_dy = tensors
    batch_norm = torch.nn.functional.batch_norm

    leaves = [v.clone().requires_grad_() for v in (t, *vectors[2:])]
    t_y = batch_norm(leaves[0], *vectors[:2], *leaves[1:], training=True)
    vjp_fn = F.batch_norm_vjp(x, *running_and_affine, training=True)[1]
    fused = {"residual": residual, "activation": "relu"}

    def torch_add_relu() -> torch.Tensor:
        return torch.relu_(batch_norm(t, *vectors, training=True).add_(t_residual))

    return {
        "training": (
            lambda: batch_norm(t, *vectors, training=True),
            lambda: F.batch_norm(x, *running_and_affine, training=True),
        ),
        "inference": (lambda: batch_norm(t, *vectors), lambda: F.batch_norm(x, *running_and_affine)),
        "backward": (lambda: torch.autograd.grad(t_y, leaves, t_dy, retain_graph=True), lambda: vjp_fn(dy)),
        "add + ReLU": (torch_add_relu, lambda: F.batch_norm(x, *running_and_affine, training=True, **fused)),
    }


def burst(call: Callable[[], object]) -> float:
    """The median seconds of a few calls, after a first one that is not counted."""
    call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(shape: tuple[int, ...], layout: str, rounds: int) -> dict[str, dict[str, float]]:
    """The median ratio of each case with its spread over the rounds, and the median times."""
    results = {}
    for case, (theirs, ours) in cases(shape, layout).items():
        grad = torch.enable_grad() if case == "backward" else torch.no_grad()
        with grad:
            times = [(burst(theirs), burst(ours)) for _ in range(rounds)]
        ratios = [a / b for a, b in times]
        results[case] = {
            "ratio": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "torch_ms": 1e3 * median(a for a, _ in times),
            "cupybn_ms": 1e3 * median(b for _, b in times),
        }
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of ratios with their spread, a line for each shape, and the geometric means."""
    lines = [f"{'PyTorch time / cupybn time':26}" + "".join(f"{case:>22}" for case in GOALS)]
    for name, row in results.items():
        cells = (f"{r['ratio']:.2f} ({r['low']:.2f}..{r['high']:.2f})" for r in row.values())
        lines.append(f"{name:26}" + "".join(f"{cell:>22}" for cell in cells))
    means = (geometric_mean(row[case]["ratio"] for row in results.values()) for case in GOALS)
    lines.append(f"{'geometric mean':26}" + "".join(f"{mean:>22.2f}" for mean in means))
    lines.append(f"{'goal':26}" + "".join(f"{goal or '-':>22}" for goal in GOALS.values()))
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], title: str, path: Path) -> None:
    """Draw the ratios of all shapes as dots over their spread."""
    figure, axes = plt.subplots(1, len(GOALS), figsize=(13, 6), sharey=True, layout="constrained")
    names = list(results)
    for axis, (case, goal) in zip(axes, GOALS.items(), strict=True):
        rows = [row[case] for row in results.values()]
        ratios = [r["ratio"] for r in rows]
        axis.hlines(names, [r["low"] for r in rows], [r["high"] for r in rows], color="0.7")
        axis.plot(ratios, names, "o", color="C0", markersize=4)
        axis.axvline(1, color="0.5", linewidth=1)
        axis.set(xscale="log", xlabel="PyTorch time / cupybn time")
        axis.set_title(f"{case}: {geometric_mean(ratios):.2f}" + (f" (goal {goal})" if goal else ""))
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(TICKS[0], TICKS[-1])
        axis.grid(axis="x", which="both", alpha=0.2)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="Batch norm of NumPy arrays against PyTorch on the CPU.")
    parser.add_argument("--short", action="store_true", help="two small shapes and few calls")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each library per case (default: 9)")
    parser.add_argument("--threads", type=int, help="of both libraries (default: as many as PyTorch takes)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parser.parse_args()
    if torch is None:
        parser.error("PyTorch is missing: `pip install torch`")

    args.threads = torch.get_num_threads() if args.threads is None else args.threads
    torch.set_num_threads(args.threads)
    os.environ["CUPYBN_NUM_THREADS"] = str(args.threads)
    shapes, rounds = (SHORT, 2) if args.short else (SHAPES, args.rounds)
    results = {}
    for shape, layout in tqdm(shapes, unit="shape"):
        results[f"{layout} {'x'.join(map(str, shape))}"] = measure(shape, layout, rounds)
    versions = f"cupybn {cupybn.__version__}, NumPy {np.__version__}, PyTorch {torch.__version__}"
    machine = f"{args.threads} threads, {platform.machine()}, Python {platform.python_version()}"
    print(f"{versions}\n{machine}, float32, {rounds} rounds: median (lowest..highest)\n{table(results)}")

    stem = args.output / ("cpu-short" if args.short else "cpu")
    save(Measured(versions, machine, rounds, results), stem, plot)


if __name__ == "__main__":
    main()
