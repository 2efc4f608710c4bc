"""Runs one stage in this process, as `runner.py` starts it: ``python -m contact NAME --out DIR --seconds 30``.

``FIRST_CONTACT_FAULT=smoke:crash,graph:hang`` in the environment makes these stages crash and hang, to rehearse what
becomes of the others.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import time
from pathlib import Path

from contact import plan
from contact.log import Log
from contact.task import Task

GRACE = 1.0
"""Seconds that a stage which hangs may live beyond its time: then it prints where it hangs, and ends."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--findings", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.name in plan.NAMES:
        faulthandler.dump_traceback_later(args.seconds + GRACE, exit=True)
    fail_on_purpose(args.name)
    task = Task(Log(args.findings), args.out, args.seconds, args.rehearse)
    importlib.import_module(f"contact.stages.{args.name}").run(task)


def fail_on_purpose(name: str) -> None:
    """Crash or hang, if the environment variable FIRST_CONTACT_FAULT asks this stage to."""
    faults = os.environ.get("FIRST_CONTACT_FAULT", "")
    fault = dict(item.split(":") for item in faults.split(",") if item).get(name)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "hang":
        time.sleep(1e6)


if __name__ == "__main__":
    main()
