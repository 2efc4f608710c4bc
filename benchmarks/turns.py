"""Processes that take turns: each measures with the cupybn of one checkout when it is asked to, the others wait.

A script starts itself again for each checkout (`take`), and there answers questions (`answer`), JSON in lines.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

CHILD = "--child"
"""Option that the processes of the checkouts are started with."""
Groups = Callable[[dict[str, Any]], Sequence[Sequence[Any]]]
GROUP = 1e-4
"""Seconds of a group of calls between two looks at the clock, at least."""
LEAST_STEP = 1e-7
"""Seconds that a call takes, at least, if the clock stands still meanwhile."""
SHORT_ROUNDS = 2
LEAST_GROUPS = 3
"""Groups of a burst, at least."""
GRACE = 30.0
"""Seconds beyond the time that was given after which a process that measures says where it hangs, and ends."""


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def burst(call: Callable[[], object], seconds: float, clock: Callable[[], float] | None = None) -> float:
    """Microseconds of a call, the median of a burst of so many seconds, after a first call that is not counted.

    Short calls are timed in groups, so that looking at the clock costs nothing beside them; by default the wall clock.
    """
    now = clock or time.perf_counter
    call()
    start = now()
    call()
    calls = max(1, round(GROUP / max(now() - start, LEAST_STEP)))
    times: list[float] = []
    end = now() + seconds
    while len(times) < LEAST_GROUPS or now() < end:
        start = now()
        for _ in range(calls):
            call()
        times.append((now() - start) / calls)
    return 1e6 * median(times)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of what the rounds gave, and the least."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
    return {"median": middle, "low": low, "high": high, "least": min(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio, each round's two times divided by each other."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def cell(figures: dict[str, float] | None, digits: int = 2) -> str:
    """The figures of `spread` as they stand in a table; a dash where nothing has been measured."""
    if figures is None:
        return "-"
    middle, low, high = (f"{figures[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{middle} ({low}..{high})"


def threads(n: int) -> str:
    """A number of threads in words."""
    return f"{n} thread{'s' * (n > 1)}"


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Checkout:
    """A process that measures the cupybn of a checkout.

    Parameters
    ----------
    script : str
        ``__file__`` of the script that the process runs.
    tree : Path
        Root of the checkout; the script is that of the caller, whatever the checkout has.
    arguments : sequence of str
        Options of the process.
    """

    def __init__(self, script: str, tree: Path, arguments: Sequence[str]) -> None:
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, script, CHILD, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        self.facts = self._answer()
        if Path(self.facts["package"]).parent != tree:
            self.close()
            raise SystemExit(f"the process for {tree} has found another cupybn, in {self.facts['package']}")

    def ask(self, question: Any) -> Any:
        """The answer to a question, once the process has measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit(f"a process that measures has ended with status {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end, which has no more questions then."""
        for pipe in self._process.stdin, self._process.stdout:
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answer(facts: dict[str, Any], reply: Callable[[Any], Any]) -> None:
    """Be the process of a checkout: say the facts, and then the reply to each question."""
    import cupybn

    answers, sys.stdout = sys.stdout, sys.stderr  # what anything else prints goes to the terminal
    facts = {"package": str(Path(cupybn.__file__).parent), "version": cupybn.__version__, **facts}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(reply(json.loads(line))), file=answers, flush=True)


class Turns(NamedTuple):
    """What checkouts have answered."""

    facts: list[dict[str, Any]]  # facts of each checkout
    answers: dict[str, list[list[Any]]]  # answers by question, checkout and round; a question stands there as JSON
    last: list[list[Any]]  # answers to the last questions, by checkout

    @property
    def rounds(self) -> int:
        """Rounds that every group has had."""
        return min(len(of_checkout) for of_question in self.answers.values() for of_checkout in of_question)

    def __getitem__(self, question: Any) -> list[list[Any]]:
        """The answers to a question, by checkout and round."""
        return self.answers[json.dumps(question)]


def take(
    script: str,
    trees: Sequence[Path],
    options: Sequence[str],
    groups: Groups,
    rounds: int,
    starts: int,
    last: Sequence[Any] = (),
    minutes: float | None = None,
) -> Turns:
    """Let the checkouts answer in turns.

    Parameters
    ----------
    script, trees, options
        As in `Checkout`.
    groups : function from the facts of the first checkout to a list of lists of questions
        A round is a turn of each checkout for each question of a group, in an order that changes from round to round.
        A group has all of its rounds before the next one begins.
    rounds : int
        Rounds of a group, all starts together.
    starts : int
        How many times all processes are started. Where a process happens to find its memory decides up to a tenth of
        its time.
    last : sequence of questions
        Asked once, when all rounds are done.
    minutes : float or None
        For all of it, about: there are fewer rounds and starts then, but one of each at least. A process that hangs
        says where, half a minute later, and ends. None for as long as it takes.
    """
    starts = min(starts, rounds)
    answers: dict[str, list[list[Any]]] = {}
    end, longest = math.inf if minutes is None else time.monotonic() + 60 * minutes, 0.0
    for i in progress(range(starts), "start"):
        began = time.monotonic()
        limit = [] if minutes is None else ["--minutes", f"{max(0.0, end - began) / 60:.3f}"]
        with contextlib.ExitStack() as stack:
            checkouts = [stack.enter_context(Checkout(script, tree, [*options, *limit])) for tree in trees]
            facts = [checkout.facts for checkout in checkouts]
            say(f"start {i + 1} of {starts}: ready in {time.monotonic() - began:.0f} s")
            chosen = groups(facts[0])
            for number, group in enumerate(progress(chosen, "group")):
                # The time of this start, of which each of the groups that are left has the same share.
                left = began + (end - began) / (starts - i) - time.monotonic()
                until = time.monotonic() + left / (len(chosen) - number)
                first = rounds * i // starts
                for k in range(first, rounds * (i + 1) // starts):
                    if k > first and time.monotonic() > until:
                        break
                    turn = 1 if k % 2 == 0 else -1
                    for question in group:
                        of_question = answers.setdefault(json.dumps(question), [[] for _ in trees])
                        for checkout, of_checkout in list(zip(checkouts, of_question, strict=True))[::turn]:
                            of_checkout.append(checkout.ask(question))
            longest = max(longest, time.monotonic() - began)
            is_last = i == starts - 1 or time.monotonic() + longest > end
            last_answers = [list(map(checkout.ask, last if is_last else ())) for checkout in checkouts]
        say(f"start {i + 1} of {starts}: done in {time.monotonic() - began:.0f} s")
        if is_last:
            break
    return Turns(facts, answers, last_answers)


def say(line: str) -> None:
    """Print a line on how far it has come, where no progress bar says so."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def progress(items: Iterable[Any], unit: str) -> Iterator[Any]:
    """The items, with a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, unit=unit, leave=False, disable=None))


# ---------------------------------------------------------------------------------------------------------------------
# Checkouts


def add_options(parser: argparse.ArgumentParser, rounds: int, starts: int) -> None:
    """Add the options that scripts have whose processes take turns."""
    parser.add_argument("--short", "--quick", action="store_true", help="as little as possible: does it run?")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each checkout (default: {rounds})")
    parser.add_argument("--starts", type=int, default=starts, help=f"starts of the processes (default: {starts})")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, which is measured in turns")
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """Add the option for `minutes` of `take`, which processes of the checkouts are given as well."""
    parser.add_argument("--minutes", type=float, help="for all of it, about, by fewer rounds (default: no limit)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; with --short as little of everything as there can be. Exits before a measurement that is lost.

    A process of a checkout that has `--minutes` is ended when it takes longer by GRACE.
    """
    args = parser.parse_args()
    minutes = getattr(args, "minutes", None)
    if minutes is not None and not 0 <= minutes < math.inf:
        parser.error(f"expected --minutes of 0 or more (got {minutes})")
    if args.child and minutes is not None:
        faulthandler.dump_traceback_later(60 * minutes + GRACE, exit=True)
    if min(args.rounds, args.starts) < 1:
        parser.error(f"expected --rounds and --starts of 1 or more (got {args.rounds} and {args.starts})")
    if args.short:
        args.rounds, args.starts = SHORT_ROUNDS, 1
    if args.output is not None and not args.child:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --output: {error}")
    return args


def trees(against: Path | None) -> list[Path]:
    """Roots of the checkouts: that of the cupybn which this Python finds, or this file's, and the other one, if any."""
    spec = importlib.util.find_spec("cupybn")
    found = Path(__file__).parents[1] if spec is None or spec.origin is None else Path(spec.origin).parents[1]
    return [found.resolve(), *([] if against is None else [against.resolve()])]


def commit(tree: Path) -> str:
    """Name of the commit that a checkout is at, with "-dirty" where files have changed; "unknown" without git."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
