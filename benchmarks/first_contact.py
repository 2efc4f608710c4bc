"""First contact with a GPU: in one call of some minutes, all that only hardware can tell.

    python3 benchmarks/first_contact.py --minutes 6 --out DIR
    python3 benchmarks/first_contact.py --minutes 3 --only precompile,bench,ncu --out DIR
    PYTHONPATH=tests/emulated python3 benchmarks/first_contact.py --rehearse --out DIR     # without a GPU

cupybn is taken from this checkout and need not be installed. Each stage is a process with a time limit of its own: one
that crashes or hangs loses only itself. After each of them report.md and results.json in DIR are written anew; the last
60 lines that are printed are a summary. The exit status is 1 if anything failed, or there was no time for it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from contact import plan
from contact.plan import Stage
from contact.report import Report
from contact.runner import run

FOR_THE_REST, AT_THE_END = 12.0, 3.0
"""Seconds that a stage which runs alone leaves to later stages, and that all stages leave for the summary."""
PATIENCE = 5.0
"""Factor by which stages of a rehearsal get more time: the machine may be slow and busy."""
NEEDED = ("numpy", "cupy", "ml_dtypes", "tqdm")
"""Modules that every stage needs."""


def main() -> int:
    args = arguments()
    end = time.monotonic() + 60 * args.minutes
    report = Report(args.out.resolve(), args.rehearse)
    alone, together = ([patient(s, args.rehearse) for s in plan.chosen(of, args.only, args.skip)] for of in GROUPS)
    try:
        for stage in alone:
            run([stage], report, end - time.monotonic() - (FOR_THE_REST if together else AT_THE_END))
        run(together, report, end - time.monotonic() - AT_THE_END)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    finally:
        print(report.summary(), flush=True)
    return 0 if report.passed else 1


GROUPS = (plan.ALONE, plan.TOGETHER)


def patient(stage: Stage, rehearse: bool) -> Stage:
    """The stage, with more time if this is a rehearsal."""
    return stage._replace(seconds=stage.seconds * PATIENCE) if rehearse else stage


def arguments() -> argparse.Namespace:
    """The options of the command line; naming a stage that does not exist is an error."""
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0],
        epilog=f"{about[2]}\n{plan.described()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, at most eight files")
    parser.add_argument("--minutes", type=minutes, default=8, help="for everything (default: 8)")
    parser.add_argument("--only", type=names, default=(), metavar="A,B", help="these stages alone")
    parser.add_argument("--skip", type=names, default=(), metavar="A,B", help="all stages but these")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on whatever `import cupy` finds")
    args = parser.parse_args()
    if not any(plan.chosen(stages, args.only, args.skip) for stages in GROUPS):
        parser.error("--only and --skip leave no stage")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(
            f"{', '.join(missing)} cannot be found: `pip install '.[cuda13,bf16,cli]'` installs what is needed"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def minutes(text: str) -> float:
    """Parse the minutes for the whole run."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of minutes, more than 0 (got {text!r})")


def names(text: str) -> list[str]:
    """Parse names of stages with commas in between."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in found if name not in plan.NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)} (there are {', '.join(plan.NAMES)})")
    return found


if __name__ == "__main__":
    sys.exit(main())
