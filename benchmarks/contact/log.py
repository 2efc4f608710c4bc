"""The log of a stage, a file that is written anew after each entry: what came before a crash is not lost."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MOST_DETAIL, MOST_PRINTED = 600, 400
"""Most characters of a detail that are kept, and of a line that are printed."""


class Check(NamedTuple):
    """A named condition that must hold, and whether it did."""

    name: str
    passed: bool
    detail: str


@dataclass
class Findings:
    """Everything that a stage reports: checks, facts, tables, notes."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Reasons why something could not be done on this machine, or was left out."""
    highlights: list[str] = field(default_factory=list)
    """Lines for the summary of the whole run."""

    @classmethod
    def read(cls, path: Path) -> Findings:
        """The findings that a `Log` has left in a file; empty where there is no file."""
        if not path.exists():
            return cls()
        found = cls(**json.loads(path.read_text()))
        found.checks = [Check(*check) for check in found.checks]
        return found


class Log:
    """Takes down what a stage finds.

    Parameters
    ----------
    path : Path or None
        File for the findings. None for work that a tool watches: the tool says what it finds.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.findings = Findings()

    def check(self, name: str, passed: bool, detail: Any = "") -> bool:
        """Enter whether something that must hold does hold; returns that."""
        check = Check(name, bool(passed), str(detail)[:MOST_DETAIL])
        self.findings.checks.append(check)
        self._write(f"{'ok  ' if passed else 'FAIL'} {name} {check.detail}")
        return check.passed

    @contextlib.contextmanager
    def checking(self, name: str) -> Iterator[list[Any]]:
        """Enter a check that passes if the block raises nothing; yields a list for its details."""
        details: list[Any] = []
        try:
            yield details
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.check(name, False, f"{type(error).__name__}: {error} [{place.filename}:{place.lineno}]")
        else:
            self.check(name, True, " ".join(map(str, details)))

    def fact(self, name: str, value: Any) -> None:
        """Enter a fact, which is neither right nor wrong."""
        self.findings.facts[name] = value
        self._write(f"     {name}: {value}")

    def row(self, **cells: Any) -> None:
        """Enter a row of the table."""
        self.findings.table.append(cells)
        self._write("     " + "  ".join(f"{name}={value}" for name, value in cells.items()))

    def note(self, text: str) -> None:
        """Enter a note: a sentence."""
        self.findings.notes.append(text[:2000])
        self._write(f"     {text}")

    def skip(self, text: str) -> None:
        """Enter what could not be done here, or was left out, and why."""
        self.findings.skipped.append(text[:MOST_DETAIL])
        self._write(f"skip {text}")

    def highlight(self, line: str) -> None:
        """Enter a line for the summary."""
        self.findings.highlights.append(line)
        self._write(f"     {line}")

    def _write(self, line: str) -> None:
        print(line[:MOST_PRINTED], flush=True)
        if self._path is not None:
            write_whole(self._path, json.dumps(asdict(self.findings), default=str))


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it finds its old text or the new one, whatever happens in between."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)
