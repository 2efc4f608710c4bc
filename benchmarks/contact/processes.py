"""Processes with a time limit: neither a crash nor a hang of one reaches whoever has started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
"""The root folder of the checkout."""
LAST_WORDS = 4.0
"""Seconds between asking a process to stop and killing it."""


class Ended(NamedTuple):
    """How a process ended: its exit status, whether its time was over, how long it took, and its output."""

    returncode: int
    timed_out: bool
    seconds: float
    output: str
    """Everything that the process printed, errors included."""

    @property
    def lines(self) -> list[str]:
        """The lines of the output that are not empty."""
        return [line for line in self.output.splitlines() if line.strip()]


class LimitedProcess:
    """A process that is ended when its time is over, together with all processes that it has started.

    Parameters
    ----------
    command : sequence of str
    seconds : float
        Seconds after which the process is ended.
    environment : mapping or None
        Environment variables beside those of `variables`.
    ask_first : bool
        Send SIGINT first when the time is over, so that the process can print what it has so far.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        environment: Mapping[str, str] | None = None,
        ask_first: bool = False,
    ) -> None:
        self._ask_first = ask_first
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        self._began = time.monotonic()
        self._end = self._began + max(1.0, seconds)
        with _heeding_interrupts():
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**variables(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_over(self) -> bool:
        """Whether the process has ended, or its time is over."""
        return self._process.poll() is not None or time.monotonic() >= self._end

    def wait(self) -> Ended:
        """Wait until the process ends or its time is over, and end what is left of it."""
        timed_out = False
        try:
            self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
            if self._ask_first:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LAST_WORDS)
        finally:
            self.kill()
        with self._output as output:
            output.seek(0)
            text = output.read().decode(errors="replace")
        return Ended(self._process.returncode, timed_out, time.monotonic() - self._began, text)

    def kill(self) -> None:
        """Kill the process and all that it has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """Context in which processes start that heed SIGINT, which a job in the background of a shell ignores."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_limited(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, ask_first: bool = False
) -> Ended:
    """Run a process until it ends or its time is over."""
    return LimitedProcess(command, seconds, environment, ask_first).wait()


def variables() -> dict[str, str]:
    """Environment variables of every process: where modules are found, tracebacks of crashes, unbuffered output."""
    given = [str(Path(folder).absolute()) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    path = os.pathsep.join([str(ROOT), *given, str(ROOT / "benchmarks")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def python(*arguments: str) -> list[str]:
    """The command that runs this Python with some arguments."""
    return [sys.executable, *arguments]
