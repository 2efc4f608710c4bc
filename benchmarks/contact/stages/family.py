"""Measures instance, group, layer and RMS norm and dropout against PyTorch and cuDNN, as ``bench`` does batch norm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from gpu_cases import FAMILY, TINY_FAMILY, Member
from gpu_measure import Bench, Record
from gpu_peers import CUDNN, CUPYBN, TORCH, peers

from contact.stages.bench import SECONDS, compared, measure
from contact.task import Task
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, Effort
from cupybn._cli.peers import cupybn_call
from cupybn._cli.problem import make_arrays

EFFORT = Effort(SECONDS, most_rounds=20)
MOST_SHARES = 14
"""Processes that compile, at most."""


def run(task: Task) -> None:
    """Measure one case after the other, as far as there is time."""
    members = TINY_FAMILY if task.rehearse else FAMILY
    compile_kernels(task, members, use)
    found, notes = peers()
    wanted = [peer for peer in found if peer.name in (CUPYBN, TORCH, CUDNN)]
    for note in notes:
        if "not available" in note and note.startswith((TORCH, CUDNN)):
            task.log.skip(note)
    bench = Bench(wanted, AS_LITTLE_AS_POSSIBLE if task.rehearse else EFFORT)
    bench.warm_up()
    measure(task, bench, members, report, "family.json")


def compile_kernels(task: Task, items: Sequence[Any], use: Callable[[Sequence[Any]], list[str]]) -> None:
    """Compile all kernels into CuPy's cache, on all processors: one by one this takes longer than the measurements.

    Each process calls `use` with some of the items; it launches what they need, and returns its errors.
    """
    began = time.monotonic()
    shares = 2 if task.rehearse else max(2, min(MOST_SHARES, (os.cpu_count() or 2) - 2))
    try:
        with ProcessPoolExecutor(shares, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(use, items[i::shares]) for i in range(shares)]
            failed = [text for job in jobs for text in job.result()]
    except BrokenProcessPool as error:
        failed = [f"a process that was to compile has ended: {error}"]
    for text in failed:
        task.log.note(text)
    task.log.fact("seconds to compile", round(time.monotonic() - began, 1))


def use(members: Sequence[Member]) -> list[str]:
    """Make each call of some members once. Returns the errors: measuring the rest goes on."""
    import cupy

    failed = []
    for member in members:
        problem = member.case.problem
        try:
            (arrays,) = make_arrays(problem, cupy)
            for operation in member.case.of_op:
                cupybn_call(problem, operation, arrays)()
            cupy.cuda.Device().synchronize()
        except Exception as error:
            failed.append(f"{member.name}: {type(error).__name__}: {error}"[:600])
    return failed


def report(task: Task, member: Member, records: Iterable[Record]) -> None:
    """Enter a row for each operation, and a line for both."""
    words = []
    for operation, cells in compared(task, member, records):
        task.log.row(case=member.name, operation=operation, **cells)
        times = {name: cells[f"{name}_x"] for name in ("torch", "cudnn")}
        others = "".join(
            f", {name} {time if isinstance(time, str) else f'x{time}'}" for name, time in times.items() if time
        )
        words.append(f"{operation} {cells['us']} us, {cells['of_copy']:.2f} of copy{others}, err {cells['error']}")
    if words:
        task.log.highlight(f"{member.name:45} {'; '.join(words)}")
