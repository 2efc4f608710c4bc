"""The report: files that are written anew after each stage, and a summary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contact.log import Findings, write_whole

MOST_LINES, MOST_COLUMNS = 60, 190
"""Most lines of the summary, and characters of a line: whoever runs this elsewhere may see 12,000 characters alone."""
MOST_FAILURES, MOST_OF_A_STAGE = 24, 6
"""Most lines of failures in the summary, and failed checks of one stage among them."""
GOOD = ("passed", "skipped")


@dataclass
class Outcome:
    """What a stage has found, and how its process ended."""

    findings: Findings
    returncode: int
    timed_out: bool
    seconds: float
    tail: str
    """The end of the stage's output."""

    @property
    def crashed(self) -> bool:
        """Whether the process crashed, or did not end by itself."""
        return self.returncode != 0

    @property
    def verdict(self) -> str:
        """The outcome in a word. A stage that has checked nothing has failed, unless it says why."""
        if self.crashed:
            return "TIME OVER" if self.timed_out else "CRASHED"
        checks = self.findings.checks
        if not checks:
            return "skipped" if self.findings.skipped else "FAILED"
        return "passed" if all(check.passed for check in checks) else "FAILED"

    @property
    def last_line(self) -> str:
        """The last line that the stage printed."""
        return next((line for line in reversed(self.tail.splitlines()) if line.strip()), "")


def cell(value: Any) -> str:
    """Text for a cell of a table; a dash for what was not measured."""
    return "-" if value is None else str(value)


class Report:
    """The outcomes of all stages.

    Parameters
    ----------
    out : Path
        Folder for ``report.md`` and ``results.json``.
    rehearse : bool
        Whether this is a rehearsal, which tells nothing of a GPU: the report says so.
    """

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.outcomes: dict[str, Outcome] = {}
        self._never_run: list[str] = []
        self._began = time.monotonic()

    def add(self, name: str, outcome: Outcome) -> None:
        """Enter the outcome of a stage, and write the files."""
        self.outcomes[name] = outcome
        stages = {name: {"verdict": o.verdict, **asdict(o)} for name, o in self.outcomes.items()}
        write_whole(self.out / "results.json", json.dumps(stages, indent=1) + "\n")
        write_whole(self.out / "report.md", "\n".join(self._markdown()) + "\n")

    def never_run(self, name: str) -> None:
        """Enter a stage that there was no time for."""
        self._never_run.append(name)

    @property
    def passed(self) -> bool:
        """Whether all that was asked for was done, as far as it can be done here, and nothing failed."""
        return not self._never_run and all(outcome.verdict in GOOD for outcome in self.outcomes.values())

    def _markdown(self) -> Iterator[str]:
        yield f"# First contact{' (rehearsal: says nothing of a GPU)' if self.rehearse else ''}"
        for name, outcome in self.outcomes.items():
            found = outcome.findings
            yield f"\n## {name}: {outcome.verdict} in {outcome.seconds:.0f} s\n"
            yield from (f"- {fact}: {value}" for fact, value in found.facts.items())
            for check in found.checks:
                yield f"- {'ok' if check.passed else '**FAIL**'} {check.name} {check.detail}".rstrip()
            yield from (f"- {note}" for note in found.notes)
            yield from (f"- skipped: {text}" for text in found.skipped)
            if found.table:
                head = list(dict.fromkeys(key for row in found.table for key in row))
                yield f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}"
                yield from (f"| {' | '.join(cell(row.get(key)) for key in head)} |" for row in found.table)
            if outcome.verdict not in GOOD and outcome.tail:
                yield f"\n```\n{outcome.tail[-2500:].strip()}\n```"

    def summary(self) -> str:
        """The most important lines of the report, which are printed at the very end."""
        title = f"===== FIRST CONTACT{' (REHEARSAL)' if self.rehearse else ''}"
        lines = [f"{title}: {time.monotonic() - self._began:.0f} s =====", *self._machine(), *self._verdicts()]
        if self._never_run:
            lines.append(f"never run, the time was over: {', '.join(self._never_run)}")
        failures = [line for name, outcome in self.outcomes.items() for line in self._failures(name, outcome)]
        lines.append(f"failures ({len(failures)} lines):" if failures else "no failures")
        lines += failures[:MOST_FAILURES]
        skipped = [f"{name}: {text}" for name, o in self.outcomes.items() for text in o.findings.skipped]
        last = [f"skipped: {'; '.join(skipped)}"] if skipped else []
        # The longest list comes last, where the summary may be cut.
        for outcome in sorted(self.outcomes.values(), key=lambda outcome: len(outcome.findings.highlights)):
            lines += outcome.findings.highlights[: max(0, MOST_LINES - len(last) - len(lines))]
        return "\n".join(line.replace("\n", " ")[:MOST_COLUMNS] for line in lines + last)

    def _machine(self) -> Iterator[str]:
        """The GPU, CuPy and PyTorch, as the stage "environment" found them."""
        if "environment" in self.outcomes:
            facts = self.outcomes["environment"].findings.facts
            gpu = next((value for name, value in facts.items() if name.startswith("GPU")), "no GPU")
            yield f"{gpu}; CuPy {facts.get('CuPy')}, PyTorch {facts.get('torch')}"

    def _verdicts(self) -> Iterator[str]:
        words = []
        for name, outcome in self.outcomes.items():
            checks = outcome.findings.checks
            passed = sum(check.passed for check in checks)
            words.append(f"{name} {outcome.verdict} {passed}/{len(checks)} {outcome.seconds:.0f}s")
        for start in range(0, len(words), 6):
            yield f"{'        ' if start else 'stages: '}{'; '.join(words[start : start + 6])}"

    def _failures(self, name: str, outcome: Outcome) -> Iterator[str]:
        failed = [check for check in outcome.findings.checks if not check.passed]
        yield from (f"  {name}: {check.name}: {check.detail}" for check in failed[:MOST_OF_A_STAGE])
        if len(failed) > MOST_OF_A_STAGE:
            yield f"  {name}: and {len(failed) - MOST_OF_A_STAGE} more"
        if outcome.crashed:
            why = " (time was over)" if outcome.timed_out else ""
            yield f"  {name} ended with {outcome.returncode}{why}: {outcome.last_line}"
        elif outcome.verdict not in GOOD and not failed:
            yield f"  {name} has checked nothing"
        if failed:
            yield from (f"    {note}" for note in outcome.findings.notes[:4])
