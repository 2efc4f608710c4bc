"""Runs the four tools of NVIDIA's Compute Sanitizer over all kernels, at once."""

from __future__ import annotations

import re
import shutil
from typing import NamedTuple

from contact.log import write_whole
from contact.processes import Ended, LimitedProcess
from contact.stages.sanitizer_work import DONE
from contact.task import Task

TOOLS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "synccheck": (),
    "initcheck": (),
}
"""The tools' names, each with its options."""
FOUND = 9
"""Exit status by which a tool says that it has found a fault."""
FAULT = re.compile(r"Invalid|Error|[Hh]azard|Race reported|Barrier error|Uninitialized")
PLACE = re.compile(r"Warning| at .*(?:\+0x|\()")
MOST_OF_A_LOG, MOST_FINDINGS = 60_000, 4


class Judgement(NamedTuple):
    """What a tool's output means: whether it passed, why, and the lines to report."""

    passed: bool
    detail: str
    findings: list[str]


def run(task: Task) -> None:
    """Run the tools, and enter what each has found."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        task.log.skip("no compute-sanitizer here")
        return
    limit = task.left() - 4
    work = task.command("sanitizer_work", limit - 8)
    running = {
        name: LimitedProcess(
            [tool, "--tool", name, *options, "--print-limit", "20", "--error-exitcode", str(FOUND), *work], limit
        )
        for name, options in TOOLS.items()
    }
    ended = {name: process.wait() for name, process in running.items()}
    logs = [f"==== {name}, exit {done.returncode}\n{done.output[-MOST_OF_A_LOG:]}" for name, done in ended.items()]
    write_whole(task.out / "sanitizer.log", "\n".join(logs))
    for name, done in ended.items():
        judgement = judge(done)
        if not task.log.check(f"compute-sanitizer {name}", judgement.passed, judgement.detail):
            for finding in judgement.findings[:MOST_FINDINGS]:
                task.log.note(f"{name}: {finding}")


def judge(done: Ended) -> Judgement:
    """Judge a tool's output: it passes if it ran, even until its time was over, and found nothing."""
    of_tool = [line.lstrip("=").strip() for line in done.lines if line.startswith("=====")]
    summaries = [line for line in of_tool if " SUMMARY: " in line]
    lines = [line for line in of_tool if line not in summaries]
    faults = [line for line in lines if FAULT.search(line)]
    finished = any(line.startswith(DONE) for line in done.lines)
    passed = (done.timed_out and bool(of_tool) and not faults) or (done.returncode == 0 and finished)
    words = summaries[-1:] or ([] if passed else done.lines[-1:])
    if not finished:
        words = [*words, f"(did not come to its end{', the time was over' if done.timed_out else ''})"]
    return Judgement(passed, " ".join(words), [line for line in lines if line in faults or PLACE.search(f" {line}")])
