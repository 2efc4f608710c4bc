"""What a program with many layers pays: ResNet-50's 53 batch norms on small inputs, forward and back, against PyTorch.

    python benchmarks/chain.py                     # NumPy, CuPy without launches, PyTorch; table, results and plot
    python benchmarks/chain.py --real              # with the CuPy that is installed, on a GPU where there is one
    python benchmarks/chain.py --against TREE      # and those of another checkout, in turns
    python benchmarks/chain.py --minutes 1         # in about so long: fewer rounds
    python benchmarks/chain.py --short             # four layers, a few calls: does it run?

Each layer has an input of its own, as convolutions stand between them: those of two images of 32 x 32, the smallest
that ResNet-50 takes (16 x 16 behind its first layer, 1 x 1 in its last blocks; 4,096 to 65,536 elements). So what a
call costs before its first element counts, as it does for small layers, and on a GPU for larger ones.

A step is eager, float32, in training: `vjp` of all layers, then each `vjp_fn` in reverse. PyTorch's is `BatchNorm2d` of
all layers, then one call of autograd for all gradients. Each library has one thread (`--threads`), as two gain nothing
on arrays this small. Microseconds for each layer, until all is done; sides take turns in one process. Without a GPU,
CuPy is measured on pretended arrays (`pretended_cupy.py`), with --real on its own arrays up to the driver
(`real_cupy.py`), less what the driver's error costs. With a GPU a step is also captured in a CUDA graph, of CuPy and of
PyTorch, and replayed.

The plot shows where the time of a step goes, by source file of cupybn (`sampling.py` has how). What the driver's error
costs, some percent, is in the shares of `launcher.py` there.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pretended_cupy
import real_cupy
from cpu import has_torch
from cpu_files import Measured, save
from sampling import Places, place_in, sample
from turns import add_minutes, add_options, answer, burst, cell, commit, parse, ratio, spread, take, threads, trees

ROUNDS, STARTS = 30, 3
SHORT_LAYERS, SHORT_IMAGE = 4, 8
TURN, LEAST_STEPS = 10e-3, 2
"""Seconds and steps of a turn, at least."""
SAMPLED, SHORT_SAMPLED = 4.0, 0.05
"""Seconds that steps are sampled for."""
SMALL, REST = 0.01, "other files"
"""Least share of the time that has a bar of its own in the plot, and the name of the bar of all others."""
BATCH, IMAGE = 2, 32
PHASES = ("forward", "back", "step")
NUMPY, CUPY, CUPY_GRAPH = "NumPy", "CuPy", "CuPy, CUDA graph"
TORCH, TORCH_CUDA, TORCH_GRAPH = "PyTorch", "PyTorch, CUDA", "PyTorch, CUDA graph"

Times = dict[str, float]
"""Microseconds of a layer by phase; a graph has the whole step alone."""
Results = dict[str, dict[str, Any]]
"""Figures by side: times, the ratio to PyTorch, those of the other checkout, and the places of `sampling`."""


def resnet50(image: int) -> Iterator[tuple[int, int]]:
    """Channels and side of the plane of each batch norm, in the order in which they are called."""
    side = image // 2
    yield 64, side
    side //= 2  # the pooling
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = 64 << stage
        for block in range(blocks):
            yield planes, side
            if stage > 0 and block == 0:  # the second convolution of the block has the stride
                side //= 2
            yield planes, side
            yield 4 * planes, side
            if block == 0:
                yield 4 * planes, side  # that of the shortcut


def shapes(short: bool) -> list[tuple[int, int, int, int]]:
    """The shapes of the inputs, of all layers or of the first ones with a smaller image."""
    every = [(BATCH, channels, side, side) for channels, side in resnet50(SHORT_IMAGE if short else IMAGE)]
    return every[:SHORT_LAYERS] if short else every


# ---------------------------------------------------------------------------------------------------------------------
# The process of a checkout


class Side(NamedTuple):
    """A library that runs the chain: its way forward, and the way back from what that has returned."""

    forward: Callable[[], Any]
    back: Callable[[Any], object]
    wait: Callable[[], object] = lambda: None

    def step(self) -> object:
        """Both ways."""
        return self.back(self.forward())

    def times(self, layers: int) -> Times:
        """Median microseconds of a layer in a turn, whose first step is not counted."""
        self.step()
        self.wait()
        times: list[tuple[float, float]] = []
        end = time.perf_counter() + TURN
        while len(times) < LEAST_STEPS or time.perf_counter() < end:
            start = time.perf_counter()
            forward = self.forward()
            self.wait()
            middle = time.perf_counter()
            self.back(forward)
            self.wait()
            times.append((middle - start, time.perf_counter() - middle))
        forwards, backs = zip(*times, strict=True)
        steps = [sum(pair) for pair in times]
        return {phase: 1e6 * median(t) / layers for phase, t in zip(PHASES, (forwards, backs, steps), strict=True)}


def cupybn_side(inputs: list[Any], gradients: list[Any], device: str, wait: Callable[[], object]) -> Side:
    """The chain of cupybn's layers, on arrays of any kind."""
    from cupybn import BatchNorm2d

    layers = [BatchNorm2d(x.shape[1], device=device) for x in inputs]

    def forward() -> list[Any]:
        return [layer.vjp(x)[1] for layer, x in zip(layers, inputs, strict=True)]

    def back(vjp_fns: list[Any]) -> list[Any]:
        return [vjp_fn(dy) for vjp_fn, dy in zip(reversed(vjp_fns), reversed(gradients), strict=True)]

    return Side(forward, back, wait)


def torch_side(inputs: list[Any], gradients: list[Any], device: str) -> Side:
    """The chain of PyTorch's layers; its inputs need gradients, as those behind other layers do."""
    import torch

    layers = [torch.nn.BatchNorm2d(x.shape[1], device=device) for x in inputs]
    xs = [torch.tensor(x, device=device, requires_grad=True) for x in inputs]
    dys = [torch.tensor(dy, device=device) for dy in gradients]
    leaves = [*xs, *(parameter for layer in layers for parameter in layer.parameters())]

    def forward() -> list[Any]:
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]

    def back(ys: list[Any]) -> object:
        return torch.autograd.grad(ys, leaves, dys)

    return Side(forward, back, torch.cuda.synchronize if device == "cuda" else lambda: None)


def chains(args: argparse.Namespace) -> tuple[str, dict[str, Side], dict[str, Callable[[], list[float]]]]:
    """What CuPy is, in words; the sides, and replays of a whole step in a CUDA graph, in microseconds."""
    os.environ["CUPYBN_NUM_THREADS"] = str(args.threads)
    rng = np.random.default_rng(0)
    every = shapes(args.short)
    inputs, gradients = ([rng.standard_normal(shape, np.float32) for shape in every] for _ in range(2))
    cupy: Any = real_cupy if args.real else pretended_cupy
    what = cupy.prepare()
    sides = {NUMPY: cupybn_side(inputs, gradients, "cpu", lambda: None)}
    on_device = ([cupy.array(shape, "f4") for shape in every] for _ in range(2))
    sides[CUPY] = cupybn_side(*on_device, "cuda:0", cupy.wait)
    graphs = {}
    if args.real and real_cupy.on_gpu():
        from cupybn._cli.measure import CupyGraph

        graphs[CUPY_GRAPH] = CupyGraph([sides[CUPY].step], keep=False)
    if has_torch():
        import torch

        torch.set_num_threads(args.threads)
        sides[TORCH] = torch_side(inputs, gradients, "cpu")
        if args.real and torch.cuda.is_available():
            from cupybn._cli.measure import TorchGraph

            sides[TORCH_CUDA] = torch_side(inputs, gradients, "cuda")
            try:
                graphs[TORCH_GRAPH] = TorchGraph([sides[TORCH_CUDA].step], False, torch, torch.cuda.Stream())
            except RuntimeError as error:
                print(f"PyTorch's graph is left out: {error}", file=sys.stderr)
    return what, sides, {name: lambda graph=graph: graph.replay(LEAST_STEPS) for name, graph in graphs.items()}


def child(args: argparse.Namespace) -> None:
    """Answer for a turn of a side, or for the places of its time."""
    import cupybn

    layers = len(shapes(args.short))
    what, sides, graphs = chains(args)
    unlaunched = args.real and not real_cupy.on_gpu()

    def reply(question: tuple[str, str]) -> Any:
        kind, name = question
        if kind == "places":
            where = place_in(Path(cupybn.__file__).parent)
            return sample(sides[name].step, SHORT_SAMPLED if args.short else SAMPLED, where)
        if name in graphs:
            return {"step": median(graphs[name]()) / layers}
        times = sides[name].times(layers)
        if unlaunched and name == CUPY:
            less_the_errors(sides[name], times, layers)
        return times

    versions = [f"NumPy {np.__version__}"]
    if has_torch():
        import torch

        versions.append(f"PyTorch {torch.__version__}")
    answer({"what": what, "sides": [*sides, *graphs], "versions": versions, "layers": layers}, reply)


def less_the_errors(side: Side, times: Times, layers: int) -> None:
    """Take off what the errors cost that launches end with where there is no driver."""
    error = burst(real_cupy.launch_nothing, TURN / 10)
    before = real_cupy.RawKernel.launches
    forward = side.forward()
    between = real_cupy.RawKernel.launches
    side.back(forward)
    after = real_cupy.RawKernel.launches
    for phase, launches in zip(PHASES, (between - before, after - between, after - before), strict=True):
        times[phase] -= error * launches / layers


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int, Results]:
    """The facts of each checkout, the number of rounds, and the figures by side."""
    found = trees(args.against)
    options = [option for option in ("--real", "--short") if getattr(args, option.removeprefix("--"))]
    options += ["--threads", str(args.threads)]
    turns = take(
        __file__,
        found,
        options,
        lambda facts: [[("times", name) for name in facts["sides"]]],
        args.rounds,
        args.starts,
        [("places", name) for name in (NUMPY, CUPY)],
        args.minutes,
    )
    names = turns.facts[0]["sides"]
    results: Results = {}
    for name in names:
        peer = torch_of(name, names)
        results[name] = figures(turns["times", name], None if peer is None else turns["times", peer])
    for name, places in zip((NUMPY, CUPY), zip(*turns.last, strict=True), strict=True):
        results[name]["places"] = places
    return turns.facts, turns.rounds, results


def torch_of(side: str, sides: list[str]) -> str | None:
    """PyTorch's side that another one is compared with; None if there is none."""
    if side.startswith(TORCH):
        return None
    on_gpu = {CUPY: TORCH_CUDA, CUPY_GRAPH: TORCH_GRAPH}.get(side)
    return next((peer for peer in (on_gpu, TORCH) if peer in sides), None)


def figures(turns: list[list[Times]], peer: list[list[Times]] | None) -> dict[str, Any]:
    """Figures of a side, from its turns and from those of PyTorch, by checkout."""
    result: dict[str, Any] = {"us": {}, "torch": {}, "there_us": {}, "there": {}}
    for phase in turns[0][0]:
        ours, *there = ([times[phase] for times in of_one] for of_one in turns)
        result["us"][phase] = spread(ours)
        if peer is not None:
            both = zip((times[phase] for times in peer[0]), ours, strict=False)  # there may be fewer rounds of one
            result["torch"][phase] = ratio(*zip(*both, strict=True))
        for other in there:
            result["there_us"][phase], result["there"][phase] = spread(other), ratio(ours, other)
    return result


COLUMNS = {
    "us": ("us of a layer, median", 1),
    "torch": ("PyTorch / this", 2),
    "there_us": ("us there", 1),
    "there": ("this / there", 2),
}
"""Columns of the table: what stands above each, and digits."""


def table(results: Results) -> str:
    """The table, a line for each side and phase; the other checkout's columns are there where it was measured."""
    there = [key for key in COLUMNS if any(row[key] for row in results.values())]
    lines = [f"{'':22}{'':9}{'least':>9}" + "".join(f"{COLUMNS[key][0]:>24}" for key in there)]
    for name, row in results.items():
        for phase in row["us"]:
            cells = (cell(row[key].get(phase), COLUMNS[key][1]) for key in there)
            least = row["us"][phase]["least"]
            lines.append(f"{name:22}{phase:9}{least:9.1f}" + "".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


def rows_of(places: list[Places]) -> list[str]:
    """Places that have a bar of their own, those that take longest first, and then the rest."""
    shares: Counter[str] = Counter()
    for of_one in places:
        for place, kinds in of_one.items():
            shares[place] = max(shares[place], sum(kinds.values()))
    return [*(place for place, share in shares.most_common() if share >= SMALL), REST]


def share_of(places: Places, row: str, rows: list[str], kind: str) -> float:
    """Share of the time in the place of a row, or of all places that have none."""
    names = places.keys() - set(rows) if row == REST else {row}
    return sum(places.get(name, {}).get(kind, 0.0) for name in names)


def plot(results: Results, title: str, path: Path) -> None:
    """Draw where the time of a step goes, a panel for each side, with a bar for each source file and checkout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, (NUMPY, CUPY), strict=True):
        row = results[name]
        steps = [row[key]["step"]["median"] for key in ("us", "there_us") if row[key]]
        places: list[Places] = row["places"]
        rows = rows_of(places)
        height = 0.8 / len(places)
        for i, (of_one, step) in enumerate(zip(places, steps, strict=True)):
            at = [y + (i - (len(places) - 1) / 2) * height for y in range(len(rows))]
            python, calls = ([step * share_of(of_one, p, rows, kind) for p in rows] for kind in ("python", "calls"))
            alpha, where = (1.0, "") if i == 0 else (0.4, ", the other checkout")
            axes.barh(at, python, height, color="C0", alpha=alpha, label=f"Python{where}")
            axes.barh(
                at,
                calls,
                height,
                left=python,
                color="C1",
                alpha=alpha,
                label=f"calls of NumPy, CuPy, built-in functions{where}",
            )
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.invert_yaxis()
        axes.set(title=f"{name}: " + ", there ".join(f"{step:.0f} us" for step in steps), xlabel="us of a layer, step")
        axes.grid(axis="x", alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="A chain of ResNet-50's batch norms on small inputs.")
    add_options(parser, ROUNDS, STARTS)
    add_minutes(parser)
    parser.add_argument("--real", action="store_true", help="with the CuPy that is installed")
    parser.add_argument("--threads", type=int, default=1, help="of cupybn and of PyTorch (default: 1)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parse(parser)
    if args.child:
        child(args)
        return
    facts, rounds, results = measure(args)
    commits = ", against ".join(commit(Path(fact["package"]).parent) for fact in facts)
    versions = ", ".join([f"cupybn {facts[0]['version']} ({commits})", *facts[0]["versions"]])
    machine = f"CuPy: {facts[0]['what']}; {platform.machine()}, Python {platform.python_version()}"
    how = f"{facts[0]['layers']} layers, float32, {threads(args.threads)}, {rounds} rounds: median (quartiles)"
    print(f"{versions}\n{machine}\n{how}\n{table(results)}")
    stem = args.output / ("chain" + "-real" * args.real + "-short" * args.short)
    save(Measured(versions, machine, rounds, results), stem, plot)


if __name__ == "__main__":
    main()
