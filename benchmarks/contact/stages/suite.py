"""Runs the tests on the GPU, except for those that need none."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from contact import insides
from contact.log import write_whole
from contact.processes import ROOT, Ended, python, run_limited
from contact.task import Task

TESTS = ROOT / "tests"
FIRST = ("test_kernels.py", "test_launching.py", "test_accuracy.py", "test_functional.py", "test_batchnorm.py")
"""Test files to run first, should the time not be enough for all."""
LEFT_OUT = (
    *("test_compile.py", "test_torch.py", "test_tiles.py", "test_numpy_ops.py", "test_readme.py", "test_package.py"),
    *("test_first_contact.py", "test_bridge_benchmark.py", "test_geometry.py"),
)
"""Test files that need no GPU, beside those of the stand-in."""
TINY = ("test_layout.py",)
WORKERS, MOST_FAILURES, SECONDS_OF_A_TEST = 8, 50, 120
MARKS = re.compile(r"([.sFExX]+) *(\[ *\d+%\])?")
"""Pattern of a line in which pytest shows its progress."""
MOST_OF_THE_LOG = 400_000
PLUGINS = {"xdist": "xdist.plugin", "pytest_timeout": "pytest_timeout", "hypothesis": "_hypothesis_pytestplugin"}
"""Modules of the pytest plugins that the tests use, by the package. No others are loaded: warnings are errors here, and
a machine may have many plugins that warn."""


class Score(NamedTuple):
    """How many tests passed, failed and were skipped, even if pytest was stopped before its end."""

    passed: int
    failed: int
    skipped: int
    failures: list[str]

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run(task: Task) -> None:
    """Run the tests; those that there was no time for do not count as failed."""
    if importlib.util.find_spec("pytest") is None:
        task.log.skip("no pytest here")
        return
    missing = [name for name in (*FIRST, *LEFT_OUT, *TINY) if not (TESTS / name).exists()]
    task.log.check("the files of tests that are named here exist", not missing, ", ".join(missing))
    plugins = [name for name in PLUGINS if importlib.util.find_spec(name)]
    done = run_limited(
        command(files(task.rehearse), plugins, 2 if task.rehearse else WORKERS),
        task.left() - 6,
        environment(required=not insides.is_stand_in()),
        ask_first=True,
    )
    write_whole(task.out / "suite.log", done.output[-MOST_OF_THE_LOG:])
    print(done.output[-3000:])
    judge(task, done)


def judge(task: Task, done: Ended) -> None:
    """Enter the result of pytest."""
    found = score(done.output)
    for failure in found.failures[:25]:
        task.log.note(failure[:300])
    if done.timed_out:
        task.log.skip(f"tests, left out for lack of time: {found} until then")
    passed = found.failed == 0 and found.passed > 0 and (done.returncode == 0 or done.timed_out)
    last = "" if passed or not done.lines else f"; {done.lines[-1].strip('= ')}"
    task.log.check("the tests", passed, f"{found}{' when the time was over' if done.timed_out else ''}{last}")


def files(rehearse: bool) -> list[Path]:
    """The test files, in the order in which they run."""
    if rehearse:
        return [TESTS / name for name in TINY]
    every = [path for path in sorted(TESTS.glob("test_*.py")) if "emulated" not in path.name]
    wanted = [path for path in every if path.name not in LEFT_OUT]
    return sorted(wanted, key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))


def command(paths: Sequence[Path], plugins: Collection[str], workers: int) -> list[str]:
    """The command that runs pytest, with options of installed plugins alone."""
    return python(
        *("-m", "pytest", "-q", f"--maxfail={MOST_FAILURES}", "-p", "no:cacheprovider", "--tb=short", "-rsfE"),
        *(option for name in plugins for option in ("-p", PLUGINS[name])),
        *("-k", "not cpu", "--deselect", "tests/test_syncbatchnorm.py::test_ranks[8]", "--durations=5"),
        *(["-n", str(workers)] if "xdist" in plugins else []),
        *([f"--timeout={SECONDS_OF_A_TEST}"] if "pytest_timeout" in plugins else []),
        *map(str, paths),
    )


def environment(required: bool) -> dict[str, str]:
    """Environment variables of pytest: none of an outer pytest; CI=1, with which hypothesis sets no deadlines."""
    inherited = {name: "" for name in os.environ if name.startswith("PYTEST_")}
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CI": "true"}
    return {**inherited, **own, **({"CUPYBN_REQUIRE_GPU": "1"} if required else {})}


def score(output: str) -> Score:
    """Count the results in the last line of pytest or, where there is none, in the marks of its progress."""
    failures = list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (.+)$", output, re.MULTILINE)))
    totals = [line for line in output.splitlines() if re.search(r"\b\d+ (passed|failed|errors?|skipped)\b.* in ", line)]
    if totals:
        count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", totals[-1])}
        failed = count.get("failed", 0) + count.get("error", 0)
        return Score(count.get("passed", 0), failed, count.get("skipped", 0), failures)
    lines = [match for line in output.splitlines() if (match := MARKS.fullmatch(line.strip()))]
    marks = "".join(match[1] for match in lines if match[2] or len(match[1]) > 4)
    return Score(marks.count("."), marks.count("F") + marks.count("E"), marks.count("s"), failures)
