"""Runs stages, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from contact.log import Findings
from contact.plan import Stage
from contact.processes import LimitedProcess
from contact.report import Outcome, Report
from contact.task import stage_command

LEAST = 5.0
"""Seconds that must be left for a stage to be worth starting."""
MARGIN = 3.0
"""Seconds beyond a stage's time until its process is killed: it should have ended itself by then."""
KEPT = 6000
"""Characters that are kept of the end of a stage's output."""


def run(stages: Sequence[Stage], report: Report, left: float) -> None:
    """Run these stages at the same time, and report each as soon as it ends.

    Parameters
    ----------
    left : float
        Seconds in which all of them must have ended.
    """
    running: dict[str, tuple[float, LimitedProcess]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for stage in stages:
                seconds = min(stage.seconds, left) - MARGIN
                if seconds < LEAST:
                    report.never_run(stage.name)
                    continue
                command = stage_command(stage.name, report.out, seconds, report.rehearse, Path(folder) / stage.name)
                running[stage.name] = seconds, LimitedProcess(command, seconds + MARGIN)
            while running:
                for name in [name for name, (_, process) in running.items() if process.is_over()]:
                    seconds, process = running.pop(name)
                    ended = process.wait()
                    timed_out = ended.timed_out or ended.seconds >= seconds
                    findings = Findings.read(Path(folder) / name)
                    outcome = Outcome(findings, ended.returncode, timed_out, ended.seconds, ended.output[-KEPT:])
                    report.add(name, outcome)
                    print(f"--- {name}: {outcome.verdict} in {outcome.seconds:.0f} s", flush=True)
                time.sleep(0.05)
        finally:
            for _, process in running.values():
                process.kill()
