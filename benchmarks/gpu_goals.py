"""What cupybn wants to reach on a GPU, beside what was measured.

A goal holds for every record of its regime: what counts is the one that is farthest from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from gpu_cudnn_norms import NORMS
from gpu_measure import SMALL, Record
from gpu_peers import CUPYBN, TORCH

FORWARD = ("training",)
BACKWARD = ("backward",)
RELU = ("training + ReLU", "backward + ReLU")
ADD_RELU = ("training + add + ReLU", "backward + add + ReLU")


class Results:
    """Records of measurements, found by what they measure."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._by_key = {self._key(record): record for record in records if "error" not in record}
        self._refused = {self._key(record) for record in records if record.get("refused")}

    @staticmethod
    def _key(record: Record, **changed: Any) -> tuple[Any, ...]:
        of = record | changed
        return (
            of.get("op", "batch_norm"),
            of["group"],
            tuple(of["shape"]),
            of["layout"],
            of["dtype"],
            of["operation"],
            of["peer"],
        )

    def ours(self) -> list[Record]:
        """The records of cupybn."""
        return [record for record in self._by_key.values() if record["peer"] == CUPYBN]

    def other(self, record: Record, **changed: Any) -> Record | None:
        """The record of another peer or operation on the same arrays; None if there is none."""
        return self._by_key.get(self._key(record, **changed))

    def refused(self, record: Record, peer: str) -> bool:
        """Whether another peer refuses the operation of a record."""
        return self._key(record, peer=peer) in self._refused

    def speed_up(self, record: Record, peer: str = TORCH, time: str = "cold_us") -> float | None:
        """How many times as long another peer takes; None where it was not measured."""
        theirs = self.other(record, peer=peer)
        if theirs is None or time not in theirs or time not in record:
            return None
        return float(theirs[time]["median"] / record[time]["median"])


Value = Callable[[Results, Record], float | None]


def share(_results: Results, record: Record) -> float:
    """The time of a copy of the fewest bytes that the operation must move, over the operation's time."""
    return float(record["share_of_copy"])


def speed_up(results: Results, record: Record) -> float | None:
    """PyTorch's time on the device over cupybn's."""
    return results.speed_up(record)


def host_speed_up(results: Results, record: Record) -> float | None:
    """PyTorch's time on the host over cupybn's."""
    return results.speed_up(record, time="host_us")


def device_us(_results: Results, record: Record) -> float:
    """Microseconds on the device, with cold caches."""
    return float(record["cold_us"]["median"])


def launches(_results: Results, record: Record) -> float:
    """How many kernels cupybn launched."""
    return float(record["launches"])


def against_bare(results: Results, record: Record) -> float | None:
    """The time with ReLU over the time without it."""
    bare = results.other(record, operation=record["operation"].partition(" + ")[0])
    return None if bare is None else float(record["cold_us"]["median"] / bare["cold_us"]["median"])


class Goal(NamedTuple):
    """A bound on a value, for certain operations in a regime: the layouts, dtypes, sizes that `where` lets through."""

    regime: str
    what: str
    operations: tuple[str, ...]
    value: Value
    bound: float
    at_most: bool = False
    ops: tuple[str, ...] = ("batch_norm",)
    where: Callable[[Record], bool] = lambda _: True

    @property
    def text(self) -> str:
        """The goal in words, such as "speed-up >= 1.7"."""
        return f"{self.what} {'<=' if self.at_most else '>='} {self.bound:g}"


def _plane(record: Record) -> int:
    return int(record["shape"][2] * record["shape"][3])


def _large(record: Record) -> bool:
    return record["layout"] == "NCHW" and record["x_bytes"] >= 50e6 and record["channels"] >= 256


def _few_channels(record: Record) -> bool:
    return record["layout"] == "NCHW" and record["channels"] <= 128 and _plane(record) >= 28 * 28


def _bfloat16(record: Record) -> bool:
    of_layout = record["layout"] == "NCHW" and record["dtype"] == "bfloat16"
    return of_layout and record["channels"] <= 256 and record["x_bytes"] >= 12e6


def _nhwc(*dtypes: str) -> Callable[[Record], bool]:
    return lambda record: record["layout"] == "NHWC" and record["dtype"] in dtypes


def _small(record: Record) -> bool:
    return bool(record["x_bytes"] <= SMALL)


def _goals() -> Iterator[Goal]:
    regime = "NCHW, tensors >= 50 MB, C >= 256"
    yield Goal(regime, "forward, share of copy", FORWARD, share, 0.88, where=_large)
    yield Goal(regime, "forward, speed-up against PyTorch", FORWARD, speed_up, 1.7, where=_large)
    yield Goal(regime, "backward, share of copy", BACKWARD, share, 0.85, where=_large)
    yield Goal(regime, "backward, speed-up against PyTorch", BACKWARD, speed_up, 2, where=_large)
    regime = "NCHW, C <= 128, planes >= 28x28"
    yield Goal(regime, "forward, speed-up against PyTorch", FORWARD, speed_up, 4, where=_few_channels)
    yield Goal(regime, "backward, speed-up against PyTorch", BACKWARD, speed_up, 6, where=_few_channels)
    regime = "NCHW bfloat16, C <= 256, >= 12 MB"
    yield Goal(regime, "forward, speed-up against PyTorch", FORWARD, speed_up, 6, where=_bfloat16)
    yield Goal(regime, "backward, speed-up against PyTorch", BACKWARD, speed_up, 8, where=_bfloat16)
    half, others = _nhwc("float16"), _nhwc("bfloat16", "float32")
    yield Goal("NHWC float16", "forward, speed-up against PyTorch", FORWARD, speed_up, 1.5, where=half)
    yield Goal("NHWC float16", "backward, speed-up against PyTorch", BACKWARD, speed_up, 2.2, where=half)
    regime = "NHWC bfloat16, float32"
    yield Goal(regime, "speed-up against PyTorch", FORWARD + BACKWARD, speed_up, 3, where=others)
    regime = "tensors <= 8 MB"
    yield Goal(regime, "launches", FORWARD + BACKWARD, launches, 1, True, where=_small)
    yield Goal(regime, "forward, us on the device", FORWARD, device_us, 5, True, where=_small)
    yield Goal(regime, "backward, us on the device", BACKWARD, device_us, 6, True, where=_small)
    yield Goal("inference", "share of copy", ("inference",), share, 0.98)
    yield Goal("BN + ReLU", "time / that of BN alone", RELU, against_bare, 1.02, True)
    yield Goal("BN + add + ReLU", "speed-up against PyTorch, unfused", ADD_RELU, speed_up, 3)
    yield Goal("host time of a call", "speed-up against PyTorch", (*FORWARD, *BACKWARD, "inference"), host_speed_up, 1)


def _family_goals() -> Iterator[Goal]:
    regime, ops = "layer and RMS norm, >= 64 MB", NORMS
    yield Goal(regime, "forward, share of copy", ("forward",), share, 0.9, ops=ops, where=_streams)
    yield Goal(regime, "backward, share of copy", BACKWARD, share, 0.85, ops=ops, where=_streams)
    yield Goal(regime, "speed-up against PyTorch", ("forward", *BACKWARD), speed_up, 1, ops=ops, where=_streams)
    regime = "layer and RMS norm, 2 MB"
    yield Goal(regime, "forward, us on the device", ("forward",), device_us, 3, True, ops, _small)
    yield Goal(regime, "backward, us on the device", BACKWARD, device_us, 6, True, ops, _small)
    for regime, ops in ("group norm", ("group_norm",)), ("instance norm", ("instance_norm",)):
        yield Goal(regime, "forward, share of copy", ("forward",), share, 0.8, ops=ops)
        yield Goal(regime, "backward, share of copy", BACKWARD, share, 0.75, ops=ops)
        yield Goal(regime, "speed-up against PyTorch", ("forward", *BACKWARD), speed_up, 1, ops=ops)
    yield Goal("dropout", "share of copy", ("forward", *BACKWARD), share, 0.92, ops=("dropout",))


def _streams(record: Record) -> bool:
    return bool(record["x_bytes"] >= 64e6)


GOALS = (*_goals(), *_family_goals())


def compare(results: Results) -> list[dict[str, Any]]:
    """A row for each goal: how many records are of its regime, their median, the worst of them, and whether it meets
    the goal.
    """
    rows = []
    for goal in GOALS:
        of_op = [r for r in results.ours() if r.get("op", "batch_norm") in goal.ops]
        of_regime = [r for r in of_op if r["operation"] in goal.operations and goal.where(r)]
        values = [v for v in (goal.value(results, record) for record in of_regime) if v is not None]
        row: dict[str, Any] = {"regime": goal.regime, "goal": goal.text, "count": len(values)}
        if values:
            farthest = max(values) if goal.at_most else min(values)
            met = farthest <= goal.bound if goal.at_most else farthest >= goal.bound
            row |= {"median": median(values), "farthest": farthest, "met": met}
        rows.append(row)
    return rows


def cells(rows: Sequence[dict[str, Any]], dry_run: bool) -> list[list[str]]:
    """The rows of `compare` as text for a table."""
    return [
        [
            row["regime"],
            row["goal"],
            *(
                [f"{row['median']:.3g}", f"{row['farthest']:.3g}", str(row["count"]), "yes" if row["met"] else "no"]
                if row["count"] and not dry_run
                else ["not measured", "", "", "dry run" if dry_run else ""]
            ),
        ]
        for row in rows
    ]


HEAD = ["regime", "goal", "median", "farthest", "measured", "met"]
