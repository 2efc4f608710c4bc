"""The task that a stage is given, and the command that starts a stage."""

from __future__ import annotations

import time
from pathlib import Path

from contact.log import Log
from contact.processes import python


class Task:
    """The work of a stage.

    Parameters
    ----------
    log : Log
        For what it finds.
    out : Path
        Folder for files that are too long for a report.
    seconds : float
        How long it may take.
    rehearse : bool
        Whether sizes are tiny, to see whether the stage runs on whatever there is.
    """

    def __init__(self, log: Log, out: Path, seconds: float, rehearse: bool) -> None:
        self.log, self.out, self.rehearse = log, out, rehearse
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds that are left."""
        return self._end - time.monotonic()

    def command(self, name: str, seconds: float) -> list[str]:
        """The command of work that a tool is to watch, by the name of its module."""
        return stage_command(name, self.out, seconds, self.rehearse)


def stage_command(name: str, out: Path, seconds: float, rehearse: bool, findings: Path | None = None) -> list[str]:
    """The command that runs a stage in a process of its own; see ``__main__.py``."""
    return python(
        *("-m", "contact", name, "--out", str(out), "--seconds", f"{seconds:.1f}"),
        *(["--findings", str(findings)] if findings else []),
        *(["--rehearse"] if rehearse else []),
    )
