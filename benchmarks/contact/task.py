"""What a stage is asked to do, and the command that starts it."""

from __future__ import annotations

import time
from pathlib import Path

from contact.log import Log
from contact.processes import python


class Task:
    """What a stage is asked to do.

    Parameters
    ----------
    log : Log
        Log for what the stage finds.
    out : Path
        Folder for files that are too long for a report.
    seconds : float
        Seconds that the stage may take.
    rehearse : bool
        Whether sizes are tiny: whether the stage runs at all, on whatever machine.
    """

    def __init__(self, log: Log, out: Path, seconds: float, rehearse: bool) -> None:
        self.log, self.out, self.rehearse = log, out, rehearse
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left of the stage's time."""
        return self._end - time.monotonic()

    def command(self, name: str, seconds: float) -> list[str]:
        """The command that starts a program for a tool to watch, given the name of its module."""
        return stage_command(name, self.out, seconds, self.rehearse)


def stage_command(name: str, out: Path, seconds: float, rehearse: bool, findings: Path | None = None) -> list[str]:
    """The command that runs a stage in a process of its own; see ``__main__.py``."""
    return python(
        *("-m", "contact", name, "--out", str(out), "--seconds", f"{seconds:.1f}"),
        *(["--findings", str(findings)] if findings else []),
        *(["--rehearse"] if rehearse else []),
    )
