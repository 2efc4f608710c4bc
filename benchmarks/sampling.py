"""Time of a program by source file, from samples at random times, which hardly slow it down.

A profiler that looks at each call, as cProfile does, makes short functions look long: under it a call of cupybn takes
five times as long. Here a timer interrupts the program about every millisecond, and the line that it is at is looked
up. Python handles a signal only where it looks for one: when a function begins, at the end of a call of something that
is not written in Python, and when a loop goes round. So the time before the first line of a function is its caller's,
and time in NumPy, CuPy and built-in functions belongs to the line that calls them, and is told apart from what runs in
Python itself. What is left of error: the last lines of a function after its last call count for its caller.
"""

from __future__ import annotations

import dis
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL = 1e-3
"""Mean seconds between two samples."""

Places = dict[str, dict[str, float]]
"""Shares of the time by place; of each what runs in Python itself, and what in calls of anything else."""


def sample(call: Callable[[], object], seconds: float, place: Callable[[str], str]) -> Places:
    """Make calls for so many seconds, and return the shares of their time; `place` names that of a source file."""
    counts: Counter[tuple[str, str]] = Counter()
    rng = random.Random(0)

    def next_one() -> None:
        signal.setitimer(signal.ITIMER_REAL, INTERVAL * rng.uniform(0.5, 1.5))

    def look(_: int, frame: FrameType | None) -> None:
        if frame is not None:
            counts[where(frame)] += 1
        next_one()

    before = signal.signal(signal.SIGALRM, look)
    next_one()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    total = sum(counts.values())
    places: Places = {}
    for (filename, kind), n in counts.items():
        shares = places.setdefault(place(filename), {"python": 0.0, "calls": 0.0})
        shares[kind] += n / total
    return places


def where(frame: FrameType) -> tuple[str, str]:
    """File that a sample belongs to, and whether it is Python itself that runs or a call of something else."""
    operation = operation_of(frame)
    if operation == "RESUME" and frame.f_back is not None:  # the function has just been entered
        return frame.f_back.f_code.co_filename, "python"
    return frame.f_code.co_filename, "calls" if "CALL" in operation else "python"


def operation_of(frame: Any) -> str:
    """Name of the instruction of the interpreter that a function is at; that of its entry is RESUME."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return "RESUME" if at < 0 else dis.opname[code[at]]


def place_in(package: Path) -> Callable[[str], str]:
    """Function that names the place of a source file: its path in the package, or else whose file it is, and its name.

    All files of this folder are one place.
    """
    ours, here = f"{package}/", f"{Path(__file__).parent}/"

    def place(filename: str) -> str:
        if filename.startswith(ours):
            return filename.removeprefix(ours)
        if filename.startswith(here):
            return "the benchmark"
        _, installed, inside = filename.rpartition("/site-packages/")
        return f"{inside.partition('/')[0] if installed else 'Python'}: {Path(filename).name}"

    return place
