"""Compiles the kernels into CuPy's cache on disk, on all processors: first those that later stages measure."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contact.task import Task

if TYPE_CHECKING:
    from contact.insides import Instance

TINY = 4
"""Instances that a rehearsal compiles."""
MOST_SHARES = 14


class Share(NamedTuple):
    """What one of the processes has compiled."""

    compiled: int
    left: int
    failed: list[str]
    with_local_memory: list[str]
    """Kernels that use local memory: their registers spill, or they index an array that each thread has."""


def run(task: Task) -> None:
    """Compile all instances, and report the failures."""
    log, shares = task.log, 2 if task.rehearse else max(2, min(MOST_SHARES, (os.cpu_count() or 2) - 2))
    began = time.time()
    end = began + max(5.0, task.left() - 6)
    with ProcessPoolExecutor(shares, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_share, i, shares, end, task.rehearse) for i in range(shares)]
        done = [job.result() for job in jobs]
    log.fact("compiled", sum(share.compiled for share in done))
    log.fact("seconds", round(time.time() - began, 1))
    if left := sum(share.left for share in done):
        log.skip(f"{left} instances, left out for lack of time")
    local = [text for share in done for text in share.with_local_memory]
    log.fact("with local memory", len(local))
    failed = [text for share in done for text in share.failed]
    for text in (*failed[:8], *local[:5]):
        log.note(text)
    log.check("all kernels compile and load", not failed, f"{len(failed)} failed")


def compile_share(index: int, shares: int, end: float, rehearse: bool) -> Share:
    """Compile one process's share of the instances, until `end` on the clock that all processes read."""
    instances = in_order()
    if rehearse:
        instances = instances[:: len(instances) // TINY][:TINY]
    instances = instances[index::shares]
    compiled = 0
    failed: list[str] = []
    local: list[str] = []
    for number, instance in enumerate(instances):
        if time.time() > end:
            return Share(compiled, len(instances) - number, failed, local)
        name = f"{instance.kernel} {' '.join(instance.options)}"
        try:
            kernel = instance.loader.raw
            kernel.compile()
            if getattr(kernel, "local_size_bytes", 0):
                local.append(f"{name}: {kernel.num_regs} registers, {kernel.local_size_bytes} bytes of local memory")
            compiled += 1
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:600])
    return Share(compiled, 0, failed, local)


def in_order() -> list[Instance]:
    """All instances for this device: first those that the shapes of other stages need."""
    from contact import insides
    from contact.stages import bench, large, ncu_work, smoke

    half = np.dtype(np.float16)
    measured = [(row.shape, row.case.problem.channel_axis, row.case.problem.dtype) for row in bench.ROWS]
    measured += [(shape, axis, half) for shape, axis in ncu_work.SHAPES]
    checked = [(case.shape, case.channel_axis, case.dtype) for case in smoke.all_cases(rehearse=False)]
    checked += [(shape, axis, half) for axis, shape in large.SHAPES.items()]
    asked = [set().union(*(insides.kernels_for(*arrays) for arrays in of)) for of in (measured, checked)]
    asked.append(insides.kernels_of_check())

    def urgency(instance: Instance) -> int:
        key = instance.kernel, instance.options
        rest = len(asked) + ("/" in instance.kernel)  # kernels that know no layout are few, and every call takes some
        return next((number for number, kernels in enumerate(asked) if key in kernels), rest)

    return sorted(insides.instances_here(), key=urgency)
