"""The results of `torch_bridge.py` as tables of text, as JSON, and as a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turns import cell

from cupybn._cli.table import table

Record = dict[str, Any]

MILLISECONDS = 1e-3
"""Factor by which microseconds of a step are shown."""
PYTORCH = "PyTorch"
COLOURS = {PYTORCH: "0.6", "converted": "C0", "converted and fused": "C1", "torch.compile": "C2"}
"""Colours of the sides; those without one of their own are not drawn."""


def title(report: Record) -> str:
    """A line that says what was measured where."""
    return ", ".join([f"{'short: ' if report['short'] else ''}{report['machine']['device']}", *versions(report)])


def versions(report: Record) -> list[str]:
    """Names of the libraries with their versions."""
    return [f"{name} {version}" for name, version in report["machine"].items() if name != "device"]


def text(report: Record) -> str:
    """All tables, and the notes."""
    settings = report["settings"]
    head = f"A training step, batch {settings['batch']}, images {settings['image']} x {settings['image']}"
    parts = [of_kind(report, "step", f"{head}; the ratio is PyTorch's time / its")]
    parts += [of_kind(report, "layer", "One batch norm; the ratio is PyTorch's time / its")]
    parts += [of_kind(report, "host", "One tiny batch norm: time of the host for a call")]
    parts += [of_kind(report, "launches", "Kernels that a training step launches")]
    parts.append("\n".join(report["notes"] + report["wrong"]))
    return "\n\n".join(part for part in parts if part)


def of_kind(report: Record, what: str, about: str) -> str:
    """The table of one kind of records; empty where there are none. Who has ratios to itself alone is left out."""
    every = [record for record in report["records"] if record["what"] == what]
    records = [record for record in every if record["side"] != PYTORCH or "us" in record or "launches" in record]
    if not records:
        return ""
    rows = [cells(record) for record in records]
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = table(head, [[row.get(name, "-") for name in head] for row in rows])
    return f"{about}\n{lines}"


def cells(record: Record) -> dict[str, str]:
    """The cells of a record's row, by the heads of their columns."""
    found = {"case": record["case"]}
    if "operation" in record:
        found["operation"] = record["operation"]
    found["side"] = record["side"]
    if "us" in record:
        factor, unit = (MILLISECONDS, "ms") if record["what"] == "step" else (1.0, "us")
        found[unit] = cell({name: factor * value for name, value in record["us"].items()}, 1)
    if "ratio" in record and record["side"] != PYTORCH:
        found["ratio (quartiles)"] = cell(record["ratio"])
    if "peak_bytes" in record:
        found["peak GB"] = f"{record['peak_bytes'] / 1e9:.2f}"
    for name in ("loss_off", "gradients_off", "results_off"):
        if name in record:
            found[name.replace("_", " ")] = f"{record[name]:.1g}"
    if "launches" in record:
        found["launches"] = str(record["launches"])
    return found


def write(report: Record, folder: Path) -> list[str]:
    """Write all files, and say where they are; their names say what they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-short" if report["short"] else "" if report["device"] == "cuda" else "-cpu"
    stem = folder / f"torch-bridge{kind}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    said = [f"results: {stem}.json"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*said, "no plot: matplotlib is missing"]
    plot(report, stem.with_suffix(".png"))
    return [*said, f"plot: {stem}.png"]


def plot(report: Record, path: Path) -> None:
    """Draw how many times as long PyTorch takes, of steps and of layers, and on a GPU the memory of a step."""
    from matplotlib.figure import Figure

    steps, layers = ([r for r in report["records"] if r["what"] == what] for what in ("step", "layer"))
    settings = report["settings"]
    of_step = f"training step, batch {settings['batch']}, {settings['image']} x {settings['image']}"
    every = (
        (of_step, steps, _dots),
        ("one batch norm", layers, _dots),
        (of_step, [record for record in steps if "peak_bytes" in record], _bars),
    )
    panels = [panel for panel in every if panel[1]]
    height = 1.6 + 0.28 * max((len(names_of(records)) for _, records, _ in panels), default=1)
    figure = Figure(figsize=(5 * max(1, len(panels)), height), layout="constrained")
    for number, (about, records, draw) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        draw(axes, records)
        names = names_of(records)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", alpha=0.2)
        axes.set_axisbelow(True)
        axes.set_title(about, fontsize=8)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(title(report), fontsize=8)
    figure.savefig(path, dpi=100)


def names_of(records: Sequence[Record]) -> list[str]:
    """The rows of a panel."""
    return list(dict.fromkeys(map(_name, records)))


def _name(record: Record) -> str:
    return record["case"] + ("\nsecond order" if record.get("operation") == "second order" else "")


def _dots(axes: Any, records: Sequence[Record]) -> None:
    """Dots over quartiles of the ratios, side by side within a row."""
    names, sides = names_of(records), [side for side in COLOURS if side != PYTORCH]
    present = [side for side in sides if any(record["side"] == side for record in records)]
    for number, side in enumerate(present):
        of_side = [record for record in records if record["side"] == side]
        rows = [names.index(_name(record)) + 0.24 * (number - (len(present) - 1) / 2) for record in of_side]
        ratios = [record["ratio"] for record in of_side]
        axes.hlines(rows, [r["low"] for r in ratios], [r["high"] for r in ratios], color=COLOURS[side], alpha=0.5)
        axes.plot([r["median"] for r in ratios], rows, "o", color=COLOURS[side], markersize=4, label=side)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("PyTorch's time / its time", fontsize=7)


def _bars(axes: Any, records: Sequence[Record]) -> None:
    """Bars of the memory that a step takes beyond weights and momentum."""
    names, sides = names_of(records), list(dict.fromkeys(record["side"] for record in records))
    for number, side in enumerate(sides):
        of_side = [record for record in records if record["side"] == side]
        rows = [names.index(_name(record)) + 0.25 * (number - (len(sides) - 1) / 2) for record in of_side]
        axes.barh(rows, [r["peak_bytes"] / 1e9 for r in of_side], height=0.22, color=COLOURS[side], label=side)
    axes.set_xlabel("GB of a step beside weights and momentum", fontsize=7)
