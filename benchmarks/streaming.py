"""Statistics of more data than fits: `cupybn.StreamingMoments` beside NumPy, Dask and scikit-learn, on the CPU.

    python benchmarks/streaming.py --plot               # all of it, some ten minutes; results/streaming.{json,md,png}
    python benchmarks/streaming.py --quick              # a few MB: does it run?
    python benchmarks/streaming.py --long 100           # only this: 100 GB through cupybn, its memory and its errors
    python benchmarks/streaming.py --against TREE       # beside the cupybn of another checkout, in turns

All sides take mean and variance of each channel of the same float32 chunks (`streaming_sides.py`), one after the other
in one process; a turn repeats a short stream for a tenth of a second. Chunks are made while they are streamed, each
when it is asked for (`streaming_chunks.py`), and the time that this takes is measured chunk by chunk and taken off: of
Dask, which has its chunks made on all of its threads at once, as much as each of these has spent. So NumPy, which has
to go through the data twice, is not charged for reading it twice. Figures are medians of all rounds, with quartiles,
and ratios are those of two turns of one round. Processor times, of all threads together, are there for machines that
have something else to do.

Errors are those of the worst channel, against moments that are known without rounding. Memory is the most that a
process of its own has held while it streamed, beyond what it held before, when all libraries had been imported: the
block that chunks are made from, and the chunk, are part of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from cpu_files import Measured, save, write
from streaming_chunks import Case, Stream
from turns import Checkout, add_options, answer, cell, commit, parse, progress, ratio, spread, take, trees

ROUNDS, STARTS = 5, 2
TURN, SHORT_TURN = 0.1, 0.0
"""Seconds of a turn, at least."""
ALONE = "chunks alone"
"""Side that only makes the chunks."""
FIRST, LAST = ((64, 56, 56), 1), ((56, 56, 64), -1)
KINDS = [FIRST, LAST, ((4, 500, 500), 1), ((224, 224, 3), -1), ((30,), -1)]
"""Shapes of a sample and axes of the channels."""
RATIOS = [1.0, 1e3, 1e6]


class Sizes(NamedTuple):
    """How much is streamed, in MB."""

    streamed: float  # MB of the streams of most figures
    chunk: float  # MB of their chunks
    chunks: list[float]  # MB of chunks that are compared
    sizes: list[float]  # MB of streams that are compared


FULL = Sizes(streamed=128, chunk=16, chunks=[1, 2, 4, 16, 64], sizes=[10, 40, 160, 640, 4000])
QUICK = Sizes(streamed=4, chunk=2, chunks=[1, 2], sizes=[2, 8])


class Cases(NamedTuple):
    """All cases, by the table that they belong to."""

    kinds: list[Case]
    chunks: list[Case]
    sizes: list[Case]
    errors: list[Case]

    @classmethod
    def of(cls, sizes: Sizes) -> Cases:
        """The cases of these sizes."""
        usual = sizes.streamed, sizes.chunk
        return cls(
            kinds=[Case(*kind, masked, 1, *usual) for masked in (False, True) for kind in KINDS],
            chunks=[Case(*FIRST, False, 1, sizes.streamed, chunk) for chunk in sizes.chunks],
            sizes=[Case(*FIRST, False, 1, size, sizes.chunk) for size in sizes.sizes],
            errors=[
                Case(*kind, masked, r, *usual) for masked in (False, True) for kind in (FIRST, LAST) for r in RATIOS
            ],
        )


# ---------------------------------------------------------------------------------------------------------------------
# The process of a checkout


def child(args: argparse.Namespace) -> None:
    """Answer for all sides in a turn each, or for the memory of one."""
    import dask
    import sklearn
    from streaming_sides import SIDES

    versions = [f"NumPy {np.__version__}", f"Dask {dask.__version__}", f"scikit-learn {sklearn.__version__}"]
    idle, turn, order = resident("VmRSS"), SHORT_TURN if args.short else TURN, list(SIDES)

    @functools.lru_cache(maxsize=1)
    def stream(case: Case) -> Stream:
        return Stream(case)

    def reply(question: list[Any]) -> Any:
        kind, *fields = question
        case = Case(tuple(fields[0]), *fields[1:])
        if kind == "memory":
            return memory(args.side, Stream(case), idle)
        if kind == "errors":
            return {side: stream(case).exact.errors(*SIDES[side](stream(case))) for side in SIDES}
        order.append(order.pop(0))  # another one is first in every round
        return {side: seconds(side, stream(case), turn) for side in order}

    answer({"versions": versions, "sides": list(SIDES)}, reply)


def seconds(side: str, stream: Stream, least: float) -> dict[str, float]:
    """Median seconds of a side for a stream, without those that making the chunks took, which are beside them.

    Those of processors are of all threads together, and do not grow where other programs take turns with this one.
    """
    from streaming_sides import SIDES, makers

    turns: list[dict[str, float]] = []
    end = time.perf_counter() + least
    while not turns or time.perf_counter() < end:
        stream.making.clear()
        start, used = time.perf_counter(), time.process_time()
        SIDES[side](stream)
        elapsed, used = time.perf_counter() - start, time.process_time() - used
        making, used_for_making = map(sum, zip(*stream.making, strict=True))
        making /= makers(side)
        turns.append({"seconds": elapsed - making, "making": making, "processor": used - used_for_making})
    counted = turns[len(turns) > 1 :]  # the first one wakes threads
    return {name: median(turn[name] for turn in counted) for name in turns[0]}


def memory(side: str, stream: Stream, idle: float | None) -> float | None:
    """Most MB that this process holds while it streams, beyond those that it held when idle; None if unknown."""
    from streaming_sides import SIDES

    if idle is None or not forget_peak():
        return None
    if side == ALONE:
        for _ in stream:
            pass
    else:
        SIDES[side](stream)
    peak = resident("VmHWM")
    return None if peak is None else peak - idle


def resident(name: str) -> float | None:
    """MB that this process holds in memory, VmRSS, or has held at most, VmHWM; None where Linux does not say it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name)), None)


def forget_peak() -> bool:
    """Let VmHWM begin anew; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The facts of each checkout, and all figures."""
    cases = Cases.of(QUICK if args.short else FULL)
    timed = [case for group in cases[:3] for case in group]
    options = ["--short"] * args.short
    questions = [[["seconds", *case]] for case in dict.fromkeys(timed)]
    last = [["errors", *case] for case in cases.errors]
    turns = take(__file__, trees(args.against), options, lambda _: questions, args.rounds, args.starts, last)
    sides = turns.facts[0]["sides"]

    def of(case: Case) -> dict[str, Any]:
        return figures(case, sides, turns[("seconds", *case)])

    results = {
        "kinds": [of(case) | {"masked": case.masked, "axis": case.channel_axis} for case in cases.kinds],
        "chunks": [of(case) for case in cases.chunks],
        "sizes": [of(case) for case in cases.sizes],
        "errors": [
            {"shape": case.name, "masked": case.masked, "axis": case.channel_axis, "ratio": case.ratio, "of": errors}
            for case, errors in zip(cases.errors, turns.last[0], strict=True)
        ],
    }
    peaks = memories([ALONE, *sides[: 1 if args.short else None]], cases.sizes, options)
    for row, *of_sides in zip(results["sizes"], *peaks.values(), strict=True):
        row["memory"] = dict(zip(peaks, of_sides, strict=True))
    return turns.facts, rounded(results)


def rounded(figures: Any) -> Any:
    """Figures with four digits, all of them that there are in lists and dicts."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


def figures(case: Case, sides: Sequence[str], answers: list[list[Any]]) -> dict[str, Any]:
    """Figures of a case: GB/s of each side and of making the chunks, and the sides' times by ours."""
    here = answers[0]
    size = case.chunks * case.bytes_of_chunk / 1e9
    times, used = ({side: [turn[side][what] for turn in here] for side in sides} for what in ("seconds", "processor"))
    ours = times[sides[0]]
    row: dict[str, Any] = {
        "shape": case.name,
        "megabytes": 1e3 * size,
        "chunk": case.bytes_of_chunk / 1e6,
        "gigabytes_per_second": {side: spread([size / t for t in times[side]]) for side in sides},
        "gigabytes_per_processor_second": {side: spread([size / t for t in used[side]]) for side in sides},
        "made": spread([size / turn[sides[0]]["making"] for turn in here]),
        "ratio": {side: ratio(times[side], ours) for side in sides[1:]},
        "processor_ratio": {side: ratio(used[side], used[sides[0]]) for side in sides[1:]},
    }
    if len(answers) > 1:
        row["to_the_other_checkout"] = ratio(ours, [turn[sides[0]]["seconds"] for turn in answers[1]])
    return row


def memories(sides: Sequence[str], cases: Sequence[Case], options: Sequence[str]) -> dict[str, list[float | None]]:
    """Most memory that each side needs for each case, the smaller ones first."""
    found = {}
    for side in progress(sides, "process"):
        with Checkout(__file__, trees(None)[0], [*options, "--side", side]) as process:
            found[side] = [process.ask(["memory", *case]) for case in cases]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The tables, and the picture


def tables(results: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = ["time / cupybn's, median (quartiles)", *(times(results[key]) for key in ("kinds", "chunks", "sizes"))]
    parts += ["processor time, of all threads together / cupybn's", processor_times(results["kinds"])]
    parts += ["error of the mean in stds, of the variance relative to itself, worst channel", errors(results["errors"])]
    parts += ["most MB beyond those of an idle process", memory_table(results["sizes"])]
    return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def what(row: dict[str, Any]) -> str:
    """What a row is about: shape, the axis of the channels, and mask."""
    axis = {1: ", channels first", -1: ", channels last"}.get(row.get("axis", 0), "")
    return row["shape"] + axis + ", masked" * row.get("masked", False)


def times(rows: Sequence[dict[str, Any]]) -> str:
    """Times of all sides by ours."""
    sides = list(rows[0]["ratio"])
    there = ["there"] * ("to_the_other_checkout" in rows[0])
    cells = [
        [what(row), f"{row['megabytes']:.0f}", f"{row['chunk']:.1f}", f"{row['made']['median']:.1f}"]
        + [f"{row['gigabytes_per_second'][name]['median']:.2f}" for name in list(row["gigabytes_per_second"])[:1]]
        + [cell(row["ratio"][side]) for side in sides]
        + [cell(row["to_the_other_checkout"]) for _ in there]
        for row in rows
    ]
    return markdown(["chunks", "MB", "MB of a chunk", "GB/s made", "GB/s of cupybn", *sides, *there], cells)


def processor_times(rows: Sequence[dict[str, Any]]) -> str:
    """Processor times of all sides by ours."""
    sides = list(rows[0]["processor_ratio"])
    cells = [[what(row), *(cell(row["processor_ratio"][side]) for side in sides)] for row in rows]
    return markdown(["chunks", *sides], cells)


def errors(rows: Sequence[dict[str, Any]]) -> str:
    """Errors of mean and variance of all sides."""
    sides = list(rows[0]["of"])
    cells = [
        [what(row), f"{row['ratio']:.0e}"]
        + [f"{row['of'][side]['mean']:.0e}, {row['of'][side]['var']:.0e}" for side in sides]
        for row in rows
    ]
    return markdown(["chunks", "mean / std", *sides], cells)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Memory of all sides."""
    sides = list(rows[0]["memory"])
    cells = [[f"{row['megabytes']:.0f}", *(megabytes(row["memory"][side]) for side in sides)] for row in rows]
    return markdown(["MB streamed", *sides], cells)


def megabytes(number: float | None) -> str:
    """A number of MB, a dash where it is unknown."""
    return "-" if number is None else f"{number:.0f}"


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Draw throughput and memory by size, and the errors by mean / std."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    speed, held, *wrong = figure.subplots(1, 4)
    rows = results["sizes"]
    sides = list(rows[0]["gigabytes_per_second"])
    x = [row["megabytes"] for row in rows]
    colors = {side: f"C{i}" for i, side in enumerate(sides)} | {ALONE: "0.5"}
    for side in sides:
        of_side = [row["gigabytes_per_processor_second"][side] for row in rows]
        middle, low, high = ([f[name] for f in of_side] for name in ("median", "low", "high"))
        speed.plot(x, middle, "o-", color=colors[side], markersize=4, label=side)
        speed.fill_between(x, low, high, color=colors[side], alpha=0.2, linewidth=0)
    unit = "GB for each second of a processor"
    speed.set(xscale="log", yscale="log", xlabel="MB streamed", ylabel=f"{unit} (more is better)", title="throughput")
    for side in rows[0]["memory"]:
        of_side = [row["memory"][side] for row in rows]
        if None not in of_side:
            held.plot(x, of_side, "o-", color=colors[side], markersize=4, label=side)
    held.plot(x, x, ":", color="0.5", linewidth=1, label="all of the data")
    held.set(xscale="log", yscale="log", xlabel="MB streamed", ylabel="MB beyond an idle process", title="memory")
    for axes, moment in zip(wrong, ("mean", "var"), strict=True):
        bars(axes, results["errors"], moment, colors)
    for axes in speed, held:
        axes.grid(which="both", alpha=0.2)
        axes.set_xticks(x, [f"{n:.0f}" for n in x])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*held.get_legend_handles_labels(), loc="outside lower center", ncols=len(colors) + 1, fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=80)


def bars(axes: Any, rows: Sequence[dict[str, Any]], moment: str, colors: dict[str, str]) -> None:
    """Draw the errors of a moment, the greater one of both layouts, as bars for each mean / std."""
    sides, ratios = list(rows[0]["of"]), sorted({row["ratio"] for row in rows})
    floor = 1e-17
    for i, side in enumerate(sides):
        heights = [max(row["of"][side][moment] for row in rows if row["ratio"] == r) for r in ratios]
        at = np.arange(len(ratios)) + (i - (len(sides) - 1) / 2) * 0.8 / len(sides)
        axes.bar(at, [max(h, floor) for h in heights], 0.8 / len(sides), color=colors[side], label=side)
    unit = "stds" if moment == "mean" else "relative"
    name = {"mean": "mean", "var": "variance"}[moment]
    axes.set(yscale="log", xlabel="mean / std", ylabel=f"{unit} (less is better)", title=f"error of the {name}")
    axes.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
    axes.set_ylim(bottom=floor)
    axes.grid(axis="y", alpha=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# As much as one has time for


def stream_long(gigabytes: float, sizes: Sizes) -> None:
    """Stream so many GB through cupybn, and print what that took, the memory by then, and the errors."""
    from tqdm import tqdm

    import cupybn

    idle = resident("VmRSS")
    stream = Stream(Case(*FIRST, False, 1e6, 1e3 * gigabytes, sizes.chunk))
    statistics = cupybn.StreamingMoments(channel_axis=1)
    forget_peak()
    start, marks = time.perf_counter(), [0.01, 0.1, 0.5, 1.0]
    of_chunk = stream.case.bytes_of_chunk
    with tqdm(total=stream.case.chunks * of_chunk, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for i, chunk in enumerate(stream, start=1):
            statistics.update(chunk)
            bar.update(of_chunk)
            while marks and i >= marks[0] * stream.case.chunks:
                peak = resident("VmHWM")
                held = None if peak is None or idle is None else peak - idle
                print(f"{i * of_chunk / 1e9:8.2f} GB: at most {megabytes(held)} MB beyond an idle process", flush=True)
                del marks[0]
    elapsed = time.perf_counter() - start
    making, _ = map(sum, zip(*stream.making, strict=True))
    print(f"{elapsed:.1f} s, of which {making:.1f} s made the chunks, {stream.case.chunks} of them")
    wrong = stream.exact.errors(statistics.mean, statistics.var())
    print(f"mean / std 1e6, worst channel: mean off by {wrong['mean']:.1e} std, variance by {wrong['var']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of a stream of chunks, against NumPy, Dask, scikit-learn.")
    add_options(parser, ROUNDS, STARTS)
    parser.add_argument("--long", type=float, metavar="GB", help="only stream so much through cupybn, in one go")
    parser.add_argument("--plot", action="store_true", help="draw a picture, too")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.child:
        child(args)
        return
    if args.long is not None:
        if not 0 < args.long < float("inf"):
            parser.error(f"argument --long: expected a number above 0 (got {args.long})")
        stream_long(args.long, QUICK if args.short else FULL)
        return
    for name, package in ("dask", "dask"), ("sklearn", "scikit-learn"):
        if importlib.util.find_spec(name) is None:
            parser.error(f"{package} is missing: `pip install '.[bench,dask,examples]'`")
    facts, results = measure(args)
    names = [f"cupybn {fact['version']} at {commit(Path(fact['package']).parent)}" for fact in facts]
    versions = ", ".join([names[0], *facts[0]["versions"]])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = f"{cores} processors, {platform.machine()}, Python {platform.python_version()}"
    text = f"{versions}\n{machine}, float32, {args.rounds} rounds\n\n{tables(results)}\n"
    print(text)
    stem = args.output / ("streaming" + "-short" * args.short)
    measured = Measured(versions, machine, args.rounds, results)
    if args.plot:
        save(measured, stem, plot)
    else:
        print(f"results: {write(measured, stem)}")
    stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
