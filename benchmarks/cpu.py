"""Batch norm and its family on NumPy arrays against PyTorch on the CPU, and against what one writes by hand.

    python benchmarks/cpu.py                       # all comparisons; tables, results and plots in benchmarks/results
    python benchmarks/cpu.py --only by-hand        # one of them; without PyTorch those by hand are left
    python benchmarks/cpu.py --against TREE        # and those of another checkout, in turns
    python benchmarks/cpu.py --short               # small shapes, a few calls: does it run?

A comparison has shapes of its own. Both sides are in one process, float32, on the same data and memory order, and take
turns: a round is a burst of calls of one, then of the other. The first call of a burst is not counted, since the
threads of the other may still be winding down. Processes are started several times, as where they find their memory
decides up to a tenth of the time. The ratio of a shape is the median over the rounds of (the other's
median time / cupybn's median time), beside it the quartiles. PyTorch and cupybn use the same number of threads; by hand
(`by_hand.py`) there is one, as NumPy's functions have. The family's times are those of the processor: with one thread
(`--threads 1`) they can be compared also where other programs run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import by_hand
import numpy as np
from cpu_files import Measured, save
from turns import add_options, answer, burst, cell, commit, parse, ratio, spread, take, threads, trees

ROUNDS, STARTS = 9, 3
BURST, SHORT_BURST = 5e-3, 1e-4
"""Seconds of a burst of calls, at least."""
RESNET50 = [  # the number of channels C, and H = W, of its twelve shapes
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
TICKS = [0.1, 0.2, 0.5, 1, 2, 5]

Shape = tuple[tuple[int, ...], str]
"""Sizes in memory order as the layout names them, and the layout; but PyTorch's NHWC is that of an NCHW array."""
Pair = tuple[Callable[[], object], Callable[[], object]]
"""Calls to compare, the other's and ours."""
Results = dict[str, dict[str, dict[str, Any]]]
"""Figures by shape and case."""


class Comparison(NamedTuple):
    """Something that cupybn is compared with."""

    name: str
    stem: str  # name of the files
    goals: dict[str, float | None]  # goal for the geometric mean by case
    least: float | None  # goal for every single shape
    shapes: list[Shape]
    short: list[Shape]
    cases: Callable[[tuple[int, ...], str], dict[str, Pair]]

    processor_time: bool = False
    """Whether the processor's time is measured, of all threads: that of a machine that has other work to do, too."""

    @property
    def with_torch(self) -> bool:
        """Whether PyTorch is what it is compared with."""
        return self.name == "PyTorch"


# ---------------------------------------------------------------------------------------------------------------------
# The calls


def torch_cases(shape: tuple[int, ...], layout: str) -> dict[str, Pair]:
    """PyTorch's calls and ours; channels last are a memory order for both."""
    import torch

    import cupybn.functional as F

    torch.manual_seed(0)
    torch.set_grad_enabled(True)
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
    fused: dict[str, Any] = {"residual": residual, "activation": "relu"}

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


def by_hand_cases(shape: tuple[int, ...], layout: str) -> dict[str, Pair]:
    """The calls of `by_hand` and ours, each with running statistics of its own."""
    import cupybn.functional as F

    rng = np.random.default_rng(0)
    axis = -1 if layout == "NHWC" else 1
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    weight, bias, mean, var = (rng.uniform(0.5, 2, shape[axis]).astype(np.float32) for _ in range(4))
    theirs, ours = ((mean.copy(), var.copy(), weight, bias) for _ in range(2))
    axes = by_hand.others(x, axis)
    saved = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    vjp_fn = F.batch_norm_vjp(x, None, None, weight, bias, training=True, channel_axis=axis)[1]
    return {
        "training": (
            lambda: by_hand.training(x, *theirs, axis),
            lambda: F.batch_norm(x, *ours, training=True, channel_axis=axis),
        ),
        "inference": (
            lambda: by_hand.inference(x, *theirs, axis),
            lambda: F.batch_norm(x, *ours, channel_axis=axis),
        ),
        "backward": (lambda: by_hand.backward(dy, x, *saved, weight, axis), lambda: vjp_fn(dy)),
    }


MEMBERS = {
    "layer": ("layer_norm", 1),
    "rms": ("rms_norm", 1),
    "group": ("group_norm", 1),
    "group-last": ("group_norm", -1),
    "instance": ("instance_norm", 1),
    "instance-last": ("instance_norm", -1),
    "dropout": ("dropout", 1),
}
"""Functions of batch norm's family and their channel axes, by what stands for the layout in the tables."""
FAMILY_SHAPES: list[Shape] = [
    *((shape, norm) for norm in ("layer", "rms") for shape in [(256, 1024), (4096, 1024), (1024, 4096), (65536, 64)]),
    *((shape, "group") for shape in [(2, 320, 32, 32), (8, 64, 56, 56)]),
    *((shape, "group-last") for shape in [(2, 32, 32, 320), (8, 56, 56, 64)]),
    *((shape, "instance") for shape in [(8, 64, 56, 56), (2, 32, 24, 24, 24)]),
    *((shape, "instance-last") for shape in [(8, 56, 56, 64), (2, 24, 24, 24, 32)]),
    *((shape, "dropout") for shape in [(256, 1024), (4096, 1024)]),
]
SHORT_FAMILY: list[Shape] = [((2, 8, 3), "group"), ((6, 8), "rms"), ((6, 8), "dropout")]
GROUPS, FEW_GROUPS = 32, 4
"""Groups of channels, and those of a handful of channels."""


def family_cases(shape: tuple[int, ...], layout: str) -> dict[str, Pair]:
    """PyTorch's calls of the family and ours."""
    import torch

    from cupybn._cli.peers import torch_call

    return _family_cases(shape, layout, functools.partial(torch_call, torch))


def family_by_hand_cases(shape: tuple[int, ...], layout: str) -> dict[str, Pair]:
    """Calls of the family in plain NumPy, as `cupybn bench` has them, and ours."""
    from cupybn._cli.plain import plain_call

    return _family_cases(shape, layout, functools.partial(plain_call, np))


def _family_cases(shape: tuple[int, ...], layout: str, other: Callable[..., Any]) -> dict[str, Pair]:
    from cupybn._cli.peers import cupybn_call
    from cupybn._cli.problem import PASSES, make_arrays, problem_of

    op, axis = MEMBERS[layout]
    groups = GROUPS if shape[axis] >= GROUPS else FEW_GROUPS
    problem = problem_of(op, shape, np.dtype(np.float32), axis, groups)
    (a,) = make_arrays(problem, np)
    of_op = PASSES[op].items()
    return {name: (other(problem, operation, a), cupybn_call(problem, operation, a)) for name, operation in of_op}


COMPARISONS = {
    "torch": Comparison(
        name="PyTorch",
        stem="cpu",
        goals={"training": 1.0, "inference": 1.0, "backward": 0.8, "add + ReLU": None},
        least=None,
        shapes=[
            *(((8, c, hw, hw), layout) for layout in ("NCHW", "NHWC") for c, hw in RESNET50),
            ((256, 1024), "NC"),
            ((4096, 256), "NC"),
            ((16, 128, 2000), "NCL"),
        ],
        short=[((8, 64, 14, 14), "NHWC"), ((16, 128), "NC")],
        cases=torch_cases,
    ),
    "by-hand": Comparison(
        name="by hand",
        stem="cpu-by-hand",
        goals={"training": 2.0, "inference": 2.0, "backward": 2.0},
        least=0.4,
        shapes=[
            *((s, "NCHW") for s in [(4, 8, 7, 7), (8, 64, 28, 28), (32, 64, 28, 28), (32, 256, 14, 14)]),
            ((8, 64, 112, 112), "NCHW"),
            *((s, "NHWC") for s in [(8, 14, 14, 64), (8, 28, 28, 128), (8, 56, 56, 64), (32, 14, 14, 256)]),
            ((8, 56, 56, 256), "NHWC"),
            *((s, "NC") for s in [(64, 64), (256, 1024), (4096, 256), (16384, 128), (65536, 64)]),
        ],
        short=[((4, 8, 7, 7), "NCHW"), ((2, 7, 7, 8), "NHWC"), ((64, 64), "NC")],
        cases=by_hand_cases,
    ),
    "family": Comparison(
        name="PyTorch",
        stem="cpu-family",
        goals={"forward": None, "backward": None},
        least=None,
        shapes=FAMILY_SHAPES,
        short=SHORT_FAMILY,
        cases=family_cases,
        processor_time=True,
    ),
    "family-by-hand": Comparison(
        name="by hand",
        stem="cpu-family-by-hand",
        goals={"forward": None, "backward": None},
        least=None,
        shapes=FAMILY_SHAPES,
        short=SHORT_FAMILY,
        cases=family_by_hand_cases,
        processor_time=True,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The process of a checkout


def child(args: argparse.Namespace) -> None:
    """Answer for one round of a shape and a case."""
    comparison = COMPARISONS[args.only]
    versions = [f"NumPy {np.__version__}"]
    torch: Any = None
    if comparison.with_torch:
        import torch

        args.threads = args.threads or torch.get_num_threads()
        torch.set_num_threads(args.threads)
        versions.append(f"PyTorch {torch.__version__}")
    args.threads = args.threads or processors()
    os.environ["CUPYBN_NUM_THREADS"] = str(args.threads)

    @functools.lru_cache(maxsize=1)  # the arrays of one shape at a time
    def cases(i: int) -> dict[str, Pair]:
        return comparison.cases(*shapes(comparison, args.short)[i])

    def reply(question: tuple[int, str]) -> list[float]:
        i, case = question
        pair = cases(i)[case]
        if torch is not None:
            torch.set_grad_enabled(case == "backward")
        clock = time.process_time if comparison.processor_time else None
        return [burst(call, SHORT_BURST if args.short else BURST, clock) for call in pair]

    answer({"versions": versions, "threads": args.threads}, reply)


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def shapes(comparison: Comparison, short: bool) -> list[Shape]:
    """The shapes of a comparison, or those that show whether it runs."""
    return comparison.short if short else comparison.shapes


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks


def measure(key: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Results]]:
    """The facts of each checkout and the figures; those of the first one have the ratio to the second, if any."""
    comparison = COMPARISONS[key]
    options = ["--only", key, *["--short"] * args.short]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    chosen = shapes(comparison, args.short)
    questions = [[(i, case)] for i in range(len(chosen)) for case in comparison.goals]
    turns = take(__file__, trees(args.against), options, lambda _: questions, args.rounds, args.starts)
    results: list[Results] = [{} for _ in turns.facts]
    for i, (shape, layout) in enumerate(chosen):
        name = f"{layout} {'x'.join(map(str, shape))}"
        for case in comparison.goals:
            answers = turns[i, case]
            for result, of_one in zip(results, answers, strict=True):
                result.setdefault(name, {})[case] = figures(of_one)
            if len(answers) > 1:
                ours = [[times[1] for times in of_one] for of_one in answers]
                results[0][name][case]["to_the_other_checkout"] = ratio(*ours)
    return turns.facts, results


def figures(turns: list[tuple[float, float]]) -> dict[str, Any]:
    """The ratio of the turns, the other's time by ours, with the median times in ms."""
    theirs, ours = zip(*turns, strict=True)
    times = {"other_ms": spread(theirs)["median"] / 1e3, "cupybn_ms": spread(ours)["median"] / 1e3}
    return {"ratio": ratio(theirs, ours), **times}


def ratios(results: Results, case: str) -> list[float]:
    """The median ratios of all shapes."""
    return [row[case]["ratio"]["median"] for row in results.values()]


def table(results: Results, comparison: Comparison) -> str:
    """The table of ratios with quartiles, a line for each shape; the geometric means, the least, and the goals."""
    goals = comparison.goals
    lines = [f"{comparison.name + ' time / cupybn time':26}" + "".join(f"{case:>20}" for case in goals)]
    for name, row in results.items():
        lines.append(f"{name:26}" + "".join(f"{cell(row[case]['ratio']):>20}" for case in goals))
    of_case = [ratios(results, case) for case in goals]
    for layout, n in Counter(name.partition(" ")[0] for name in results).items():
        some = {name: row for name, row in results.items() if name.startswith(f"{layout} ")}
        means = "".join(f"{geometric_mean(ratios(some, case)):>20.2f}" for case in goals)
        lines.append(f"{f'mean of {n} x {layout}':26}{means}")
    lines.append(f"{'geometric mean':26}" + "".join(f"{geometric_mean(numbers):>20.2f}" for numbers in of_case))
    lines.append(f"{'goal':26}" + "".join(f"{goal or '-':>20}" for goal in goals.values()))
    lines.append(f"{'least':26}" + "".join(f"{min(numbers):>20.2f}" for numbers in of_case))
    if comparison.least is not None:
        lines.append(f"{'goal':26}" + f"{comparison.least:>20}" * len(goals))
    if all("to_the_other_checkout" in row[case] for row in results.values() for case in goals):
        times = [[row[case]["to_the_other_checkout"]["median"] for row in results.values()] for case in goals]
        lines.append(f"{'our time / that of there':26}" + "".join(f"{geometric_mean(t):>20.2f}" for t in times))
    return "\n".join(lines)


def plot(comparison: Comparison, results: Results, title: str, path: Path) -> None:
    """Draw the ratios of all shapes as dots over their quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names, goals = list(results), comparison.goals
    figure = Figure(figsize=(1 + 3 * len(goals), max(2.5, 0.9 + 0.19 * len(names))), layout="constrained")
    panels = figure.subplots(1, len(goals), sharey=True)
    shown = [median for case in goals for median in ratios(results, case)]
    low, high = min(TICKS[0], *shown), max(TICKS[-1], *shown)
    ticks = [t for n in range(math.floor(math.log10(low)), 3) for t in (10**n, 2 * 10**n, 5 * 10**n)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    for axes, (case, goal) in zip(panels, goals.items(), strict=True):
        rows = [row[case]["ratio"] for row in results.values()]
        axes.hlines(names, [r["low"] for r in rows], [r["high"] for r in rows], color="0.7")
        axes.plot([r["median"] for r in rows], names, "o", color="C0", markersize=4)
        axes.axvline(1, color="0.5", linewidth=1)
        if comparison.least is not None:
            axes.axvline(comparison.least, color="C3", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel=f"time {'of ' * (comparison.with_torch)}{comparison.name} / of cupybn")
        mean = geometric_mean(ratios(results, case))
        axes.set_title(f"{case}: {mean:.2f}" + (f" (goal {goal})" if goal else ""))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(low * 0.9, high * 1.1)
        axes.grid(axis="x", which="both", alpha=0.2)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Batch norm and its family on NumPy arrays against PyTorch and against NumPy by hand."
    )
    add_options(parser, ROUNDS, STARTS)
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison (default: all that can be made)")
    parser.add_argument("--threads", type=int, help="of cupybn and PyTorch (default: as many as there are)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parse(parser)
    if args.child:
        child(args)
        return
    if args.only and COMPARISONS[args.only].with_torch and not has_torch():
        parser.error("PyTorch is missing: `pip install torch`")
    for key in COMPARISONS if args.only is None else [args.only]:
        if COMPARISONS[key].with_torch and not has_torch():
            print(f"PyTorch is missing (`pip install torch`): the comparison {key} is left out")
        else:
            compare(key, args)


def compare(key: str, args: argparse.Namespace) -> None:
    """Make a comparison: print it, and leave its files."""
    comparison = COMPARISONS[key]
    facts, results = measure(key, args)
    machine = f"{threads(facts[0]['threads'])}, {platform.machine()}, Python {platform.python_version()}"
    print(f"{', '.join(facts[0]['versions'])}\n{machine}, float32, {args.rounds} rounds: median (quartiles)")
    names = [f"cupybn {fact['version']} at {commit(Path(fact['package']).parent)}" for fact in facts]
    for name, result in zip(names, results, strict=True):
        print(f"\n{name}\n{table(result, comparison)}")
    versions = ", ".join([names[0], *facts[0]["versions"]])
    stem = args.output / (comparison.stem + "-short" * args.short)
    save(Measured(versions, machine, args.rounds, results[0]), stem, functools.partial(plot, comparison))


if __name__ == "__main__":
    main()
