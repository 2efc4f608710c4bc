"""Measures instance, group, layer and RMS norm and dropout against PyTorch and cuDNN, as ``bench`` does batch norm."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_cases import FAMILY, TINY_FAMILY, Member
from gpu_measure import Bench, Record
from gpu_peers import CUDNN, CUPYBN, TORCH, peers

from contact.stages.bench import SECONDS, compared, measure
from contact.task import Task
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, Effort

EFFORT = Effort(SECONDS, most_rounds=20)


def run(task: Task) -> None:
    """Measure one case after the other, as far as there is time."""
    found, notes = peers()
    wanted = [peer for peer in found if peer.name in (CUPYBN, TORCH, CUDNN)]
    for note in notes:
        if "not available" in note and note.startswith((TORCH, CUDNN)):
            task.log.skip(note)
    bench = Bench(wanted, AS_LITTLE_AS_POSSIBLE if task.rehearse else EFFORT)
    bench.warm_up()
    measure(task, bench, TINY_FAMILY if task.rehearse else FAMILY, report, "family.json")


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
