"""Measures the bandwidth of copies, and the most telling shapes against PyTorch and cuDNN, as ``gpu.py`` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gpu_cases import BARE, DEAD, Case
from gpu_measure import Bench, Record
from gpu_peers import CUDNN, CUPYBN, TORCH, peers

from contact.log import write_whole
from contact.task import Task
from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, Effort, copy_time
from cupybn._cli.problem import Problem

FUSED = ("training + add + ReLU", "backward + add + ReLU")
SECONDS = 0.02
"""Seconds of measuring for each figure."""
LEAST_LEFT = 6.0
"""Seconds that must be left for another case to begin."""


class Row(NamedTuple):
    """A case of the benchmark, in the few words that tell it from the others."""

    layout: str
    shape: tuple[int, ...]
    dtype: str
    operations: tuple[str, ...] = BARE
    dead: bool = False

    @property
    def name(self) -> str:
        """The row's name in tables."""
        return f"{self.layout} {'x'.join(map(str, self.shape))} {self.dtype}{', half dead' if self.dead else ''}"

    @property
    def case(self) -> Case:
        """The row as the `Case` that `gpu_measure` takes."""
        problem = Problem(self.shape, parameter_dtype(self.dtype), self.layout.index("C"))
        group = DEAD if self.dead else "first contact"
        return Case(group, self.layout, problem, self.operations, all_peers=False, dead=self.dead)


TINY = (
    Row("NCHW", (2, 3, 4, 4), "float32", BARE[::2]),
    Row("NHWC", (2, 4, 4, 8), "float16"),
    Row("NHWC", (2, 4, 4, 8), "float16", BARE[:1], dead=True),
)
ROWS = (
    Row("NCHW", (32, 256, 56, 56), "float16", (*BARE, *FUSED)),
    Row("NHWC", (32, 56, 56, 256), "float16"),
    Row("NCHW", (32, 64, 112, 112), "float16"),
    Row("NCHW", (32, 64, 56, 56), "bfloat16"),
    Row("NCHW", (32, 512, 28, 28), "float32"),
    Row("NCHW", (32, 1024, 14, 14), "float16"),
    Row("NCHW", (32, 2048, 7, 7), "float16"),
    Row("NHWC", (32, 14, 14, 1024), "bfloat16"),
    Row("NHWC", (32, 28, 28, 512), "float32", (*BARE, *FUSED)),
    Row("NC", (65536, 256), "bfloat16"),
    Row("NCHW", (256, 256, 56, 56), "float16"),
    Row("NCHW", (32, 128, 28, 28), "float32"),
    Row("NC", (128, 512), "float32"),
    Row("NHWC", (32, 28, 28, 35), "float16"),
    Row("NCHW", (32, 192, 35, 35), "float16"),
    Row("NCHW", (32, 256, 56, 56), "float16", ("training", "backward"), dead=True),
)
"""The cases, the most telling ones first; the last three are the exceptions of `gpu_cases.odd`."""


def run(task: Task) -> None:
    """Measure one case after the other, as far as there is time."""
    found, notes = peers()
    wanted = [peer for peer in found if peer.name in (CUPYBN, TORCH, CUDNN)]
    for note in notes:
        if note.startswith((TORCH, CUDNN)):
            (task.log.skip if "not available" in note else task.log.note)(note)
    known = len(notes)
    bench = Bench(wanted, AS_LITTLE_AS_POSSIBLE if task.rehearse else Effort(SECONDS))
    bench.warm_up()
    copies(task, bench)
    measure(task, bench, TINY if task.rehearse else ROWS, report, "bench.json")
    for note in notes[known:]:
        task.log.note(note)


def measure(task: Task, bench: Bench, rows: Sequence[Any], report: Callable[..., None], name: str) -> None:
    """Measure some rows, or members of the family, and leave the records in a file."""
    records: list[Record] = []
    for row in rows:
        if task.left() < LEAST_LEFT:
            task.log.skip(f"{row.name}, left out for lack of time")
            continue
        found_here = list(bench.records(row.case))
        records += found_here
        report(task, row, found_here)
        write_whole(task.out / name, json.dumps(records))
    ours = [record for record in records if record["peer"] == CUPYBN and "error" not in record]
    task.log.check("something was measured", bool(ours), f"{len(ours)} results of {CUPYBN}, {len(records)} in all")


def copies(task: Task, bench: Bench) -> None:
    """Measure the bandwidth of copies, with which everything else is compared."""
    words = []
    for mib in (1,) if task.rehearse else (16, 64, 256, 2048):
        spread = copy_time(mib << 20, bench.l2_bytes, bench.effort)
        words.append(f"{mib} MiB {(mib << 20) / spread.median / 1e3:.0f} GB/s")
        task.log.fact(f"copy of {mib} MiB in all", f"{words[-1].partition('MiB ')[2]} ({spread.median:.1f} us)")
    task.log.highlight(f"copy: {', '.join(words)}")


def compared(task: Task, row: Any, records: Iterable[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each operation of a row, beside PyTorch's and cuDNN's; and a failed check where there are none, or
    where a result is wrong.
    """
    by_peer: dict[tuple[str, str], Record] = {(r["operation"], r["peer"]): r for r in records}
    for operation in row.operations:
        name = f"{row.name} {operation}"
        ours = by_peer.get((operation, CUPYBN)) or by_peer.get((operation, "all")) or {"error": "there is no record"}
        torch, cudnn = (by_peer.get((operation, peer), {}) for peer in (TORCH, CUDNN))
        for peer, theirs in (TORCH, torch), (CUDNN, cudnn):
            if "error" in theirs:
                how = "refused" if theirs.get("refused") else "failed"
                task.log.note(f"{peer} {how}: {name}: {theirs['error'][:200]}")
        if "error" in ours:
            task.log.check(name, False, ours["error"])
            continue
        cells = {
            "us": median(ours, "cold_us"),
            "of_copy": round(ours["share_of_copy"], 2),
            "torch_x": times(ours, torch),
            "cudnn_x": times(ours, cudnn),
            "warm": median(ours, "warm_us"),
            "host": median(ours, "host_us"),
            "torch_host": median(torch, "host_us"),
            "cudnn_host": median(cudnn, "host_us"),
            "launches": ours["launches"],
            "error": round(ours["error_over_allowed"], 3),
        }
        if not ours["error_over_allowed"] <= 1:
            task.log.check(f"{name} is right", False, f"{ours['error_over_allowed']:.3g} times the allowed error")
        yield operation, cells


def report(task: Task, row: Row, records: Iterable[Record]) -> None:
    """Enter a line for each operation of a row."""
    for operation, cells in compared(task, row, records):
        of_cudnn = cells["cudnn_x"] if isinstance(cells["cudnn_x"], str) else f"x{cells['cudnn_x']}"
        host = "" if cells["host"] is None else f"host {cells['host']}/{cells['torch_host']}, "
        task.log.row(case=row.name, operation=operation, **cells)
        task.log.highlight(
            f"{row.name:36} {operation:21} {cells['us']:>8} us, {cells['of_copy']:.2f} of copy, "
            f"torch x{cells['torch_x']}, cudnn {of_cudnn}, "
            f"{host}err {cells['error']}"
        )


def times(ours: Record, theirs: Record) -> float | str | None:
    """How many times as long a peer takes, as text; empty where it was not measured."""
    if "error" in theirs:
        return "refused" if theirs.get("refused") else "failed"
    return round(theirs["cold_us"]["median"] / ours["cold_us"]["median"], 2) if theirs else None


def median(record: dict[str, Any], name: str) -> float | None:
    """The median of a time in microseconds, if it was measured."""
    return round(record[name]["median"], 1) if name in record else None
