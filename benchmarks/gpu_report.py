"""The results of `gpu.py` as JSON, as a table in Markdown, and as two plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_goals
import matplotlib
from gpu_goals import Results
from gpu_measure import Record
from gpu_peers import APEX, COMPILED, CUDNN, ENGINE, EXPERT, NATIVE, PLAIN, TORCH

from cupybn._cli.table import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = ("training", "inference", "backward", "training + add + ReLU", "backward + add + ReLU")
CHANNELS_LAST = ("NHWC", "NDHWC")
COLOURS = {"float32": "C0", "float16": "C1", "bfloat16": "C2"}
OTHERS = (TORCH, CUDNN, NATIVE, PLAIN, EXPERT, COMPILED, APEX, ENGINE)
HEAD = [
    *("shape, as in memory", "operation", "us, cold (quartiles)", "warm", "share of copy"),
    *(f"{peer} / cupybn" for peer in OTHERS),
    *("host us", "PyTorch's", "error / allowed", "roundoffs"),
]


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write all files; their names say whether this was a dry run."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("gpu-dry-run" if report["dry_run"] else "gpu")
    results = Results(report["records"])
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md")]
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    paths[1].write_text(text(report, results))
    plots: dict[str, tuple[str, Callable[[Record], float | None]]] = {
        "copy": ("share of the bandwidth of a copy, at the least traffic", lambda r: float(r["share_of_copy"])),
        "torch": ("PyTorch time / cupybn time", results.speed_up),
    }
    for name, (label, value) in plots.items():
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        plot(results, value, label, title(report), paths[-1])
    return paths


def title(report: dict[str, Any]) -> str:
    """The title of a report: the library, the GPU, and whether this was a dry run."""
    machine = report["machine"]
    what = ", ".join(f"{name} {machine[name]}" for name in ("cupybn", "CuPy", "PyTorch", "CUDA runtime"))
    return f"{report['note'] + ': ' if report['dry_run'] else ''}{machine['GPU']}; {what}"


def text(report: dict[str, Any], results: Results) -> str:
    """The whole page in Markdown."""
    parts = ["# Batch norm and its family on a GPU", *([f"**{report['note']}**"] if report["dry_run"] else [])]
    parts += ["\n".join(f"* {name}: {value}" for name, value in report["machine"].items())]
    parts += ["## Goals", markdown(gpu_goals.HEAD, gpu_goals.cells(report["goals"], report["dry_run"]))]
    ours = results.ours()
    for group in dict.fromkeys(map(_group, ours)):
        rows = [cells(results, r) for r in ours if _group(r) == group]
        columns = [i for i in range(len(HEAD)) if any(row[i] != "-" for row in rows)]  # of what was measured at all
        rows = [[row[i] for i in columns] for row in rows]
        parts += [f"## {', '.join(group)}", markdown([HEAD[i] for i in columns], rows)]
    parts += ["## Notes", "\n".join(f"* {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def cells(results: Results, record: Record) -> list[str]:
    """The cells of a record's row in the table."""
    cold, torch = record["cold_us"], results.other(record, peer=TORCH)

    def median(of: Record | None, name: str) -> str:
        return f"{of[name]['median']:.1f}" if of is not None and name in of else "-"

    def ratio(peer: str) -> str:
        value = results.speed_up(record, peer)
        return f"{value:.2f}" if value is not None else "refused" if results.refused(record, peer) else "-"

    return [
        "x".join(map(str, record["shape"])),
        record["operation"],
        f"{cold['median']:.1f} ({cold['low']:.1f}..{cold['high']:.1f})",
        median(record, "warm_us"),
        f"{record['share_of_copy']:.2f}",
        *map(ratio, OTHERS),
        median(record, "host_us"),
        median(torch, "host_us"),
        f"{record['error_over_allowed']:.2f}",
        f"{record['roundoffs']:.2f}" if "roundoffs" in record else "-",
    ]


def plot(results: Results, value: Callable[[Record], float | None], label: str, heading: str, path: Path) -> None:
    """Draw a dot for each shape and dtype, a panel for each operation; dots are filled for channels first."""
    ours = results.ours()
    names = list(dict.fromkeys(_name(record) for record in ours))
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(16, 2 + 0.16 * len(names)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, operation in zip(axes[0], PANELS, strict=True):
        for dtype, colour in COLOURS.items():
            for filled in True, False:
                dots = [
                    (v, names.index(_name(record)))
                    for record in ours
                    if panel_of(record) == operation
                    and record["dtype"] == dtype
                    and (record["layout"] not in CHANNELS_LAST) == filled
                    and (v := value(record)) is not None
                ]
                axis.scatter(
                    [v for v, _ in dots],
                    [y for _, y in dots],
                    s=14,
                    facecolors=colour if filled else "none",
                    edgecolors=colour,
                    label=f"{dtype}, {'channels first' if filled else 'channels last'}",
                )
        axis.axvline(1, color="0.5", linewidth=1)
        axis.set_title(operation, fontsize=9)
        axis.set_xlabel(label, fontsize=7)
        axis.grid(axis="both", alpha=0.2)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=6)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=6)
    figure.suptitle(heading, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def panel_of(record: Record) -> str:
    """The panel of a plot in which a record stands: a forward pass of the family is one of training."""
    return "training" if record["operation"] == "forward" else str(record["operation"])


def _group(record: Record) -> tuple[str, ...]:
    of_family = () if record["op"] == "batch_norm" else (record["op"],)
    return *of_family, record["group"], record["layout"], record["dtype"]


def _name(record: Record) -> str:
    sizes = list(record["shape"])
    if record["layout"] in CHANNELS_LAST:
        sizes = [sizes[0], sizes[-1], *sizes[1:-1]]
    return "x".join(map(str, sizes)) + (f" {record['op']}" if record["op"] != "batch_norm" else "")
