"""Tries PyTorch models with cupybn's batch norms on the GPU, and measures what converting them brings; and the way back
of second order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gpu_second_order
from chain import resnet50
from gpu_second_order import SHAPES, TINY, Shape

from contact import insides
from contact.log import write_whole
from contact.stages.family import compile_kernels
from contact.task import Task
from cupybn._cli.extras import optional
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, Effort
from cupybn._cli.problem import make_arrays

FILE = "bridge.json"
EFFORT = Effort(0.02, most_rounds=20)
LEAST_LEFT = 6.0
"""Seconds that must be left for a shape of second order to begin."""
FOR_A_JOB = 14.0
"""Seconds that must be left for a network to begin."""
ROUNDS, SECONDS = 5, 0.15
"""Turns of each side, and seconds of a turn."""


def run(task: Task) -> None:
    """Compile what is measured, try the bridge, then measure: the way back of second order, networks, single layers."""
    device = device_of(task)
    compile_kernels(task, shapes(task.rehearse, device), use)
    if device is not None:
        import torch_measure

        from contact.stages import bridge_checks

        torch_measure.prepare(device)
        bridge_checks.run(task, device)
    records = second_order(task)
    if device is not None:
        models(task, device, records)
    measured = [record for record in records if "error" not in record]
    task.log.check("something was measured", bool(measured), f"{len(measured)} records")


def device_of(task: Task) -> str | None:
    """The device of PyTorch's tensors, a CPU in a rehearsal; None, and a line that says why, where there is none."""
    torch: Any = optional("torch")
    if torch is None:
        task.log.skip("no torch")
        return None
    if torch.cuda.is_available() and not insides.is_stand_in():
        return "cuda"
    task.log.skip("no torch that finds a GPU")
    return "cpu" if task.rehearse else None


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def shapes(rehearse: bool, device: str | None) -> Sequence[Shape]:
    """The arrays that kernels are needed for: of all batch norms of ResNet-50, in any layout and dtype, and others."""
    if rehearse:
        return TINY
    if device is None:
        return SHAPES
    from torch_measure import FULL

    found = [*SHAPES]
    wanted = [
        ((FULL.batch, channels, side, side), case)
        for channels, side in set(resnet50(FULL.image))
        for case in FULL.cases
    ]
    for (N, C, *sides), case in [*wanted, *((case.shape, case) for case in (*FULL.layers, FULL.tiny))]:
        found.append(Shape(case.layout, (N, C, *sides) if case.layout == "NCHW" else (N, *sides, C), case.dtype))
    return found


def use(some: Sequence[Shape]) -> list[str]:
    """Make a step over arrays of some shapes, both ways back. Returns the errors: measuring the rest goes on."""
    import cupy

    failed = []
    for shape in some:
        try:
            (arrays,) = make_arrays(shape.problem, cupy)
            gpu_second_order.cupybn_call(shape.problem, arrays)()
            cupy.cuda.Device().synchronize()
        except Exception as error:
            failed.append(f"{shape.name}: {type(error).__name__}: {error}"[:600])
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def second_order(task: Task) -> list[dict[str, Any]]:
    """Measure the way back of second order on CuPy arrays, as far as there is time."""
    records: list[dict[str, Any]] = []
    for shape in TINY if task.rehearse else SHAPES:
        if task.left() < LEAST_LEFT:
            task.log.skip(f"second order, {shape.name}, left out for lack of time")
            continue
        name = f"second order, {shape.name}"
        try:
            record = gpu_second_order.record(shape, AS_LITTLE_AS_POSSIBLE if task.rehearse else EFFORT)
        except Exception as error:  # such as too little memory: the other shapes are measured
            task.log.check(name, False, f"{type(error).__name__}: {error}")
            continue
        records.append({"what": "second order"} | record)
        report_second_order(task, name, record)
        write_whole(task.out / FILE, json.dumps(records))
    return records


def report_second_order(task: Task, name: str, record: dict[str, Any]) -> None:
    """Enter a shape of second order; a wrong result is a failed check."""
    error = record["error_over_allowed"]
    task.log.check(f"{name} is right", error <= 1, f"{error:.3g} times the allowed error")
    if "torch_error" in record:
        task.log.note(f"PyTorch failed: {name}: {record['torch_error']}")
    us, torch_x = round(record["us"]["median"], 1), record.get("torch_ratio")
    torch_x = None if torch_x is None else round(torch_x, 2)
    task.log.row(case=name, us=us, of_copy=round(record["share_of_copy"], 2), torch_x=torch_x, off=f"{error:.2g}")
    beside = "" if torch_x is None else f", torch x{torch_x}"
    task.log.highlight(f"{name}: {us} us, {record['share_of_copy']:.2f} of copy{beside}, err {error:.2g}")


def models(task: Task, device: str, records: list[dict[str, Any]]) -> None:
    """Measure networks and single layers, converted and not, as far as there is time, and add to the records."""
    import torch_measure

    plan = torch_measure.SHORT if task.rehearse else torch_measure.FULL._replace(rounds=ROUNDS, seconds=SECONDS)
    for job in torch_measure.jobs(plan, device, left=lambda: task.left() - LEAST_LEFT):
        if task.left() < (FOR_A_JOB if job.name.startswith("step") else LEAST_LEFT):
            task.log.skip(f"{job.name}, left out for lack of time")
            continue
        of_job = torch_measure.done(job)
        records += of_job
        for line in torch_measure.wrong(of_job):
            task.log.check(job.name, False, line)
        report(task, of_job)
        write_whole(task.out / FILE, json.dumps(records))


def report(task: Task, records: Iterable[dict[str, Any]]) -> None:
    """Enter a row for each record, and a line for each case of a step and of the host."""
    import torch_report

    by_line: dict[str, list[str]] = {}
    for record in records:
        if "error" in record:
            continue
        cells = torch_report.cells(record)
        task.log.row(what=record["what"], **cells)
        if record["what"] in LINES:
            words = LINES[record["what"]](record, cells)
            by_line.setdefault(f"{record['what']}, {record['case']}", []).append(f"{record['side']} {words}")
    for name, words in by_line.items():
        task.log.highlight(f"{name}: {'; '.join(words)}")


def of_step(record: dict[str, Any], cells: dict[str, str]) -> str:
    """Words for a side of a step."""
    time = f"{record['us']['median'] / 1e3:.1f} ms, " if "us" in record else ""
    memory = f", {cells['peak GB']} GB" if "peak GB" in cells else ""
    return f"{time}x{record['ratio']['median']:.2f}{memory}"


def of_host(record: dict[str, Any], _: dict[str, str]) -> str:
    """Words for a side of the tiny layer."""
    return f"{record['operation']} {record['us']['median']:.0f} us"


def of_launches(record: dict[str, Any], _: dict[str, str]) -> str:
    """Words for a side whose launches have been counted."""
    return str(record["launches"])


LINES: dict[str, Callable[[dict[str, Any], dict[str, str]], str]] = {
    "step": of_step,
    "host": of_host,
    "launches": of_launches,
}
"""Kinds of records that stand in the summary, and what is said there of a side."""
