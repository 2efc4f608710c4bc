"""Host time of a call on CuPy arrays, without a GPU: its checks, plans and launches, but for what the driver does.

    python benchmarks/launch.py                    # our own Python: arrays are pretended, launches do nothing; no CuPy
    python benchmarks/launch.py --real             # with CuPy's own arrays and its way with arguments, where installed
    python benchmarks/launch.py --against TREE     # and those of another checkout, in turns
    python benchmarks/launch.py --minutes 1        # in about so long: fewer rounds
    python benchmarks/launch.py --short            # a few calls: does it run?

With --real where there is a GPU, it is all real: the host's time for calls that it does not wait for. Microseconds for
one call are the least of all rounds, as other programs only ever add to them, and beside it the median. The ratio is
that of turns which follow each other: short ones, and many. `--output FOLDER` keeps the figures as JSON. What stands in
the place of CuPy is in `pretended_cupy.py`, what is left out in `real_cupy.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pretended_cupy
import real_cupy
from cpu_files import Measured, write
from turns import Checkout, add_minutes, add_options, answer, burst, cell, commit, parse, ratio, spread, take, trees

ROUNDS, STARTS = 150, 3
TURN = 1e-3
"""Seconds of a turn."""
ON_CHIP, STREAMED = (32, 64, 56, 56), (4096, 256)
"""Shapes of inputs: one whose channels stay on chip, in one launch, and one whose channels are read in two."""
SHORT = (2, 4, 4, 4), (4096, 4)
"""Shapes for --short, small enough for a stand-in for CuPy that runs the kernels."""
MOST_ARGUMENTS = 10
"""Goal for the number of arguments of a launch that CuPy sees."""
NOTHING = "a launch without arguments"
"""Name, among the cases, of what is subtracted for every launch that the driver's error has ended."""

Results = dict[str, dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------------
# The process of a checkout


def cases(cupy: Any, on_chip: tuple[int, ...], streamed: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """The calls that are measured, on these shapes; `cupy` is the module of this folder that makes the arrays."""
    from cupybn import BatchNorm2d, functional

    x, dy = (cupy.array(on_chip, "f4") for _ in range(2))
    vectors = [cupy.array(on_chip[1:2], "f4") for _ in range(4)]
    _, vjp_fn = functional.batch_norm_vjp(x, *vectors, True)
    x2, dy2 = (cupy.array(streamed, "f4") for _ in range(2))
    vectors2 = [cupy.array(streamed[1:2], "f4") for _ in range(4)]
    _, vjp_fn2 = functional.batch_norm_vjp(x2, *vectors2, True)
    layer, frozen = (BatchNorm2d(on_chip[1], device="cuda:0") for _ in range(2))
    frozen.eval()
    _, layer_vjp_fn = layer.vjp(x)
    return {
        "batch_norm, training": lambda: functional.batch_norm(x, *vectors, True),
        "batch_norm, inference": lambda: functional.batch_norm(x, *vectors),
        "batch_norm_vjp, training": lambda: functional.batch_norm_vjp(x, *vectors, True),
        "its vjp_fn": lambda: vjp_fn(dy),
        "batch_norm, training, streamed": lambda: functional.batch_norm(x2, *vectors2, True),
        "vjp_fn, streamed": lambda: vjp_fn2(dy2),
        "BatchNorm2d, training": lambda: layer(x),
        "BatchNorm2d, eval": lambda: frozen(x),
        "BatchNorm2d.vjp": lambda: layer.vjp(x),
        "its vjp_fn (of the layer)": lambda: layer_vjp_fn(dy),
    }


def child(args: argparse.Namespace) -> None:
    """Answer for the times of a case, or with --count for the numbers of arguments of its launches."""
    cupy: Any = real_cupy if args.real else pretended_cupy
    what = cupy.prepare()
    launches = count_arguments() if args.count else []
    calls = cases(cupy, *(SHORT if args.short else (ON_CHIP, STREAMED)))
    names = list(calls)
    unlaunched = args.real and not real_cupy.on_gpu()
    if unlaunched:
        calls[NOTHING] = real_cupy.launch_nothing

    def reply(name: str) -> Any:
        call = calls[name]
        if args.count:
            call()  # the first call may be another one than all others
            launches.clear()
            call()
            return launches
        times = {"us": burst(call, TURN)}
        if unlaunched:
            with without_wrapping():
                times["unwrapped_us"] = burst(call, TURN)
        cupy.wait()
        return times

    answer({"what": what, "cases": names, "unlaunched": unlaunched}, reply)


@contextlib.contextmanager
def without_wrapping() -> Iterator[None]:
    """Context in which launches do nothing at all."""
    real_cupy.RawKernel.wraps = False
    try:
        yield
    finally:
        real_cupy.RawKernel.wraps = True


def count_arguments() -> list[int]:
    """A list that gets, for each launch from now on, the number of its arguments."""
    import cupy

    launches: list[int] = []

    class Counted(cupy.RawKernel):
        """A kernel whose arguments are counted."""

        def __call__(self, grid: Any, block: Any, args: Any, **options: Any) -> Any:
            launches.append(len(args))
            return super().__call__(grid, block, args, **options)

    cupy.RawKernel = Counted
    return launches


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], Results]:
    """The facts of this checkout, and figures by case."""
    options = [option for option in ("--real", "--short") if getattr(args, option.removeprefix("--"))]
    found = trees(args.against)
    counts = []
    for tree in found:
        with Checkout(__file__, tree, [*options, "--count"]) as counter:
            counts.append({name: counter.ask(name) for name in counter.facts["cases"]})
    names = list(counts[0])

    def questions(facts: dict[str, Any]) -> list[list[str]]:
        return [[*names, NOTHING] if facts["unlaunched"] else names]

    turns = take(__file__, found, options, questions, args.rounds, args.starts, minutes=args.minutes)
    facts = turns.facts[0]
    nothing = [0.0 for _ in found]
    if facts["unlaunched"]:
        nothing = [min(turn["us"] for turn in of_one) for of_one in turns[NOTHING]]
    facts |= {"commits": [commit(tree) for tree in found], "nothing_us": nothing[0], "rounds": turns.rounds}
    return facts, {name: figures(turns[name], [c[name] for c in counts], nothing) for name in names}


def figures(turns: list[list[dict[str, float]]], counts: list[list[int]], nothing: list[float]) -> dict[str, Any]:
    """Figures of a case, from its turns, the arguments of its launches and the time of an empty launch, by checkout."""
    net = [
        [turn["us"] - len(launches) * empty for turn in of_one]
        for of_one, launches, empty in zip(turns, counts, nothing, strict=True)
    ]
    result: dict[str, Any] = {"us": spread(net[0]), "arguments": counts[0]}
    if "unwrapped_us" in turns[0][0]:
        result["wrapping_us"] = min(net[0]) - min(turn["unwrapped_us"] for turn in turns[0])
    if len(net) > 1:
        result |= {"against_us": spread(net[1]), "against_arguments": counts[1]}
        result |= {"ratio": ratio(net[0], net[1]), "ratio_of_least": min(net[0]) / min(net[1])}
    return result


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "us": ("us of a call", lambda times: f"{times['least']:.1f} ({times['median']:.1f})"),
    "wrapping_us": ("arguments", lambda least: f"{least:.1f}"),
    "against_us": ("us there", lambda times: f"{times['least']:.1f} ({times['median']:.1f})"),
    "ratio": ("ratio", cell),
    "ratio_of_least": ("of the least", lambda number: f"{number:.2f}"),
}
"""Columns of the table: what stands above each, and how it is written."""


def table(results: Results) -> str:
    """The table, a line for each case, with the columns that have been measured."""
    there = [key for key in COLUMNS if key in next(iter(results.values()))]
    lines = [f"{'':32}" + "".join(f"{COLUMNS[key][0]:>19}" for key in there) + "   arguments of its launches"]
    for name, row in results.items():
        cells = "".join(f"{COLUMNS[key][1](row[key]):>19}" for key in there)
        before = f", there {_counts(row['against_arguments'])}" if "ratio" in row else ""
        lines.append(f"{name:32}{cells}   {_counts(row['arguments'])}{before}")
    most = max(n for row in results.values() for n in row["arguments"])
    return "\n".join([*lines, f"most arguments of a launch: {most} (goal: at most {MOST_ARGUMENTS})"])


def _counts(launches: list[int]) -> str:
    return " + ".join(map(str, launches))


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of a call on CuPy arrays.")
    add_options(parser, ROUNDS, STARTS)
    add_minutes(parser)
    parser.add_argument("--real", action="store_true", help="with the CuPy that is installed")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON (default: none are kept)")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.child:
        child(args)
        return
    facts, results = measure(args)
    versions = f"cupybn {facts['version']} ({', against '.join(facts['commits'])}), NumPy {np.__version__}"
    machine = f"{facts['what']}; {platform.machine()}, Python {platform.python_version()}"
    how = f"float32, {facts['rounds']} rounds: least (median); ratio: median (quartiles)"
    print(f"{versions}\n{machine}, {how}\n{table(results)}")
    if facts["unlaunched"]:
        print(
            f"left out for every launch: {facts['nothing_us']:.1f} us, until the driver would be called and its error"
        )
    if args.output:
        stem = args.output / ("launch-real" if args.real else "launch")
        print(f"results: {write(Measured(versions, machine, facts['rounds'], results), stem)}")


if __name__ == "__main__":
    main()
