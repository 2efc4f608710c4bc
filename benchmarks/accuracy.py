"""How far batch norm and its family are from float64 on difficult float32 data: cupybn, PyTorch (CPU), plain NumPy.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import cupybn
import cupybn.functional as F
from cupybn._cli.extras import optional
from cupybn._cli.peers import cupybn_call, torch_call
from cupybn._cli.plain import plain_call
from cupybn._cli.problem import FUSED, PASSES, Arrays, Problem, problem_of

torch: Any = optional("torch")
SHAPE = (16, 8, 14, 14)
FAMILY: dict[str, tuple[str, tuple[int, ...], int]] = {
    "group_norm, NCHW": ("group_norm", (8, 64, 16, 16), 1),
    "group_norm, NHWC": ("group_norm", (8, 16, 16, 64), -1),
    "instance_norm": ("instance_norm", (8, 64, 16, 16), 1),
    "layer_norm, 4096": ("layer_norm", (64, 4096), 1),
    "layer_norm, 16": ("layer_norm", (16384, 16), 1),
    "rms_norm, 4096": ("rms_norm", (64, 4096), 1),
}
"""Function, shape and channel axis of what is tried of the family, by its name in the table."""
RATIOS = (1.0, 1e2, 1e4, 1e5, 1e6)
"""Mean by standard deviation of the family's data."""


def data() -> dict[str, np.ndarray]:
    """Batches in float32, each under the name of what makes it difficult."""
    normal = np.random.default_rng(0).standard_normal(SHAPE)
    outlier = normal.copy()
    outlier[0, :, 0, 0] = 1e4
    return {
        name: x.astype(np.float32)
        for name, x in {
            "mean 0, std 1": normal,
            "mean 1e4, std 1": normal + 1e4,
            "mean 1e6, std 1": normal + 1e6,
            "one outlier of 1e4": outlier,
            "constant 1e4": np.full(SHAPE, 1e4),
            "constant 1e8": np.full(SHAPE, 1e8),
            "mean 0, std 1e20": normal * 1e20,
        }.items()
    }


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output and the unbiased variance, computed in float64."""
    x = x.astype(np.float64)
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    n = x.size // x.shape[1]
    return (x - mean) / np.sqrt(var + 1e-5), var.ravel() * n / (n - 1)


def run_cupybn(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    running_mean, running_var = np.zeros((2, x.shape[1]), np.float32)
    return F.batch_norm(x, running_mean, running_var, training=True, momentum=1.0), running_var


def run_torch(x: np.ndarray, memory_format: torch.memory_format) -> tuple[np.ndarray, np.ndarray]:
    t = torch.from_numpy(x).contiguous(memory_format=memory_format)
    running_mean, running_var = torch.zeros(2, x.shape[1])
    y = torch.nn.functional.batch_norm(t, running_mean, running_var, training=True, momentum=1.0)
    return y.numpy(), running_var.numpy()


def run_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + np.float32(1e-5)), x.var((0, 2, 3), ddof=1)


def family_errors(name: str, ratio: float) -> dict[str, tuple[float, float]]:
    """The greatest errors of output and of the input's gradient, by library."""
    op, shape, axis = FAMILY[name]
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape) + offset for offset in (ratio, 0.0))
    problem = problem_of(op, shape, np.dtype(np.float32), axis, groups=8)
    C = problem.channels
    a = Arrays(*(v.astype(np.float32) for v in (x, dy, x, np.ones(C), np.zeros(C), np.zeros(C), np.ones(C))))
    wide, exact = problem_of(op, shape, np.dtype(np.float64), axis, groups=8), Arrays(*(v.astype(float) for v in a))
    found: dict[str, list[float]] = {}
    for operation in PASSES[op].values():
        expected = plain_call(np, wide, operation, exact)()[0]
        sides = {
            "cupybn": cupybn_call(problem, operation, a)()[0],
            "PyTorch": from_torch(problem, op, torch_call(torch, problem, operation, a)()[0]),
            "plain NumPy": plain_call(np, problem, operation, a)()[0],
        }
        for library, result in sides.items():
            found.setdefault(library, []).append(float(np.abs(result - expected).max()))
    return {library: (forward, backward) for library, (forward, backward) in found.items()}


def from_torch(problem: Problem, op: str, tensor: Any) -> np.ndarray:
    """A result of PyTorch in the memory order of the problem."""
    return np.asarray(tensor.detach().movedim(1, problem.channel_axis if op in FUSED else 1))


def family_table() -> str:
    """The errors of the family, a line for each function and mean."""
    lines = ["greatest error of y | of dx, by mean/std", f"{'':28}" + "".join(f"{ratio:>20g}" for ratio in RATIOS)]
    for name in FAMILY:
        of_ratios = [family_errors(name, ratio) for ratio in RATIOS]
        for library in of_ratios[0]:
            cells = [" | ".join(f"{error:.0e}" for error in of[library]) for of in of_ratios]
            lines.append(f"{f'{name}: {library}':28}".ljust(30) + "".join(f"{cell:>20}" for cell in cells)[2:])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()
    if torch is None:
        parser.error("PyTorch is missing: `pip install torch`")

    runs = {
        "cupybn": run_cupybn,
        "PyTorch NCHW": lambda x: run_torch(x, torch.contiguous_format),
        "PyTorch NHWC": lambda x: run_torch(x, torch.channels_last),
        "plain NumPy": run_numpy,
    }
    print(f"cupybn {cupybn.__version__}, PyTorch {torch.__version__} (CPU), NumPy {np.__version__}; shape {SHAPE}")
    print("greatest error of y | greatest relative error of running_var")
    print(f"{'':20}" + "".join(f"{name:>20}" for name in runs))
    for name, x in data().items():
        y0, var0 = exact(x)
        cells = []
        with np.errstate(all="ignore"):
            for run in runs.values():
                y, var = run(x)
                relative = np.where(var0 > 0, np.abs(var - var0.astype(np.float32)) / var0, np.abs(var))
                cells.append(f"{np.abs(y - y0).max():.1e} | {np.nan_to_num(relative).max():.0e}")
        print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"\n{family_table()}")


if __name__ == "__main__":
    main()
