"""Keeps what `first_contact.py` has measured under results/, and compares two such measurements.

    python benchmarks/gpu_results.py keep DIR NAME "what was measured"   # results/h200/NAME.json, .md and .png
    python benchmarks/gpu_results.py compare results/h200/BEFORE.json results/h200/AFTER.json

`keep` takes the folder that `first_contact.py --out DIR` has left; the GPU gives the folder its name. `compare` leaves
BEFORE-AFTER.md and .png beside the second file. A file says on what and with what it was measured, and nothing of the
machine beyond that.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_goals
import gpu_report
import matplotlib
from gpu_goals import Results
from gpu_measure import Record
from gpu_peers import CUDNN, CUPYBN, TORCH

from cupybn._cli.table import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("cupybn", "CuPy", "CUDA runtime", "NVRTC", "torch", "nvidia-cudnn-frontend", "NumPy", "Python")
"""Facts of the stage "environment" that are kept, beside the GPU and its driver."""
STALLS = {"kernel": "kernel", "grid": "blocks", "time": "time", "dram_pct": "memory, %", "issue_pct": "issue slots, %"}
STALLS |= {"warps_pct": "warps, %", "registers": "registers", "stalls": "cycles stalled for an instruction"}
"""Columns of Nsight Compute's table that are kept, and their headings."""
PATH = re.compile(r"(/[\w.+-]+){2,}")
DIGITS = 4
"""Significant digits of figures that are kept."""


def main() -> None:
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog=about[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="a folder of first_contact.py")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("name")
    keeping.add_argument("what", help="such as which kernels")
    keeping.add_argument("--output", type=Path, help="folder for the files (default: by the GPU, under results/)")
    comparing = commands.add_parser("compare", help="two files that were kept")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "keep":
        paths = keep(args.folder, args.name, args.what, args.output)
    else:
        paths = compare(args.before, args.after)
    print(*paths, sep="\n")


# ---------------------------------------------------------------------------------------------------------------------
# One measurement


def keep(folder: Path, name: str, what: str, output: Path | None = None) -> list[Path]:
    """Write the results of a first contact in short, as JSON, as a page and as a picture."""
    measured = summary(folder, what)
    if "stand-in" in measured["machine"]["CuPy"]:
        raise SystemExit("a rehearsal says nothing of a GPU: it is not kept")
    output = output or RESULTS / folder_name(measured["machine"]["GPU"])
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{name}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(as_json(measured))
    paths[1].write_text(page(measured))
    picture([measured], paths[2])
    return paths


def summary(folder: Path, what: str) -> dict[str, Any]:
    """What is kept of the folder of a first contact."""
    stages = json.loads((folder / "results.json").read_text())
    found = {name: stage["findings"] for name, stage in stages.items()}
    measured = [found[name] for name in ("bench", "family") if name in found]
    facts = {name: value for of in measured for name, value in of["facts"].items()}
    return {
        "what": what,
        "machine": machine(found["environment"]["facts"]),
        "copies": {name: value for name, value in facts.items() if name.startswith("copy of")},
        "stages": [
            {
                "name": name,
                "verdict": stage["verdict"],
                "passed": sum(bool(passed) for _, passed, _ in stage["findings"]["checks"]),
                "checks": len(stage["findings"]["checks"]),
                "seconds": round(stage["seconds"], 1),
            }
            for name, stage in stages.items()
        ],
        "notes": [PATH.sub("...", note) for of in measured for note in (*of["notes"], *of["skipped"])],
        "bridge": [PATH.sub("...", line) for line in found.get("bridge", {}).get("highlights", [])],
        "kernels": [{STALLS[key]: row[key] for key in STALLS} for row in found.get("ncu", {}).get("table", [])],
        "records": [rounded(shortened(record)) for record in records(folder)],
    }


def records(folder: Path) -> list[Record]:
    """The records of the stages that measure."""
    paths = [folder / f"{name}.json" for name in ("bench", "family")]
    return [record for path in paths if path.exists() for record in json.loads(path.read_text())]


def machine(facts: dict[str, Any]) -> dict[str, str]:
    """The GPU, its driver and clocks, and the versions that matter to the figures."""
    gpu = next(value for name, value in facts.items() if name.startswith("GPU"))
    query = str(facts.get("nvidia-smi", "")).split(", ")
    clocks = {"driver": query[1], "clocks, at most": f"{query[3]}, memory {query[4]}"} if len(query) > 4 else {}
    return {"GPU": gpu, **clocks, **{name: str(facts[name]) for name in VERSIONS if name in facts}}


def folder_name(gpu: str) -> str:
    """The name of the folder for a GPU, such as "h200" for "NVIDIA H200, compute capability 9.0, ..."."""
    return re.sub(r"\W+", "-", gpu.partition(",")[0].removeprefix("NVIDIA ").lower()).strip("-")


def shortened(record: Record) -> Record:
    """The record without what follows from the rest of it."""
    copy = {"copy_us": {"median": record["copy_us"]["median"]}} if "copy_us" in record else {}
    return {name: value for name, value in record.items() if name != "least_bytes"} | copy


def rounded(value: Any) -> Any:
    """The value with its floats rounded to DIGITS significant digits, also those in dicts."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def as_json(measured: dict[str, Any]) -> str:
    """The measurement as JSON, with a line for each item of a list, such as a record."""
    lines = []
    for name, value in measured.items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value, indent=1)}".replace("\n", "\n "))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def page(measured: dict[str, Any]) -> str:
    """The measurement as a page in Markdown."""
    results = Results(measured["records"])
    head = ["shape, as in memory", "operation", "us, cold (quartiles)", "warm", "share of copy"]
    head += [
        f"{TORCH} / {CUPYBN}",
        f"{CUDNN} / {CUPYBN}",
        "host us",
        "PyTorch's",
        "launches",
        "error / allowed",
        "roundoffs",
    ]
    parts = [f"# {title(measured)}", f"{measured['what']}."]
    parts += ["\n".join(f"* {name}: {value}" for name, value in (measured["machine"] | measured["copies"]).items())]
    parts += ["## Goals", markdown(gpu_goals.HEAD, gpu_goals.cells(gpu_goals.compare(results), dry_run=False))]
    parts += ["## Times", markdown(head, [line(results, record) for record in results.ours()])]
    if measured.get("bridge"):
        lines = [f"* {line}" for line in measured["bridge"]]
        parts += ["## PyTorch models, converted, and gradients of second order", "\n".join(lines)]
    if measured["kernels"]:
        rows = [[str(value) for value in row.values()] for row in measured["kernels"]]
        parts += ["## By Nsight Compute", markdown(list(STALLS.values()), rows)]
    rows = [[s["name"], s["verdict"], f"{s['passed']} of {s['checks']}", str(s["seconds"])] for s in measured["stages"]]
    parts += ["## Stages", markdown(["stage", "verdict", "checks", "seconds"], rows)]
    if measured["notes"]:
        parts += ["## Notes", "\n".join(f"* {note}" for note in measured["notes"])]
    return "\n\n".join(parts) + "\n"


def title(measured: dict[str, Any]) -> str:
    """The title of a measurement, such as "NVIDIA H200, driver 580.1, CuPy 14.2"."""
    found = measured["machine"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "CuPy") if name in found)
    return f"{found['GPU'].partition(',')[0]}, {versions}"


def line(results: Results, record: Record) -> list[str]:
    """A row of the table of times."""
    cells = gpu_report.cells(results, record)
    by_name = dict(zip(gpu_report.HEAD, cells, strict=True))
    wanted = [*gpu_report.HEAD[:5], f"{TORCH} / {CUPYBN}", f"{CUDNN} / {CUPYBN}", "host us", "PyTorch's"]
    last = [str(record["launches"]), by_name["error / allowed"], by_name["roundoffs"]]
    row = [by_name[name] for name in wanted] + last
    return [case_name(record), *row[1:]]


def case_name(record: Record) -> str:
    """The name of a record's case, such as "NCHW 32x64x56x56 float16"."""
    group = "" if record["group"] in ("first contact", "family") else f", {record['group']}"
    op = "" if record.get("op", "batch_norm") == "batch_norm" else f"{record['op']} "
    return f"{op}{record['layout']} {'x'.join(map(str, record['shape']))} {record['dtype']}{group}"


# ---------------------------------------------------------------------------------------------------------------------
# Two measurements


def compare(before: Path, after: Path) -> list[Path]:
    """Write two measurements side by side, as a page and as a picture."""
    both = [json.loads(path.read_text()) for path in (before, after)]
    stem = after.with_name(f"{before.stem}-{after.stem}")
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".md", ".png")]
    paths[0].write_text(comparison(both, [before.stem, after.stem]))
    picture(both, paths[1], [before.stem, after.stem])
    return paths


def comparison(both: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A page with a table of both measurements and how many times as fast the second one is."""
    old, new = (Results(measured["records"]) for measured in both)
    head = ["case", "operation", f"us, {names[0]}", names[1], "times as fast", f"share of copy, {names[0]}", names[1]]
    head += [f"{TORCH} / {CUPYBN}, {names[0]}", names[1], f"{CUDNN} / {CUPYBN}, {names[1]}"]
    rows, gains = [], []
    for record in new.ours():
        was = old.other(record)
        times = [None if r is None else r["cold_us"]["median"] for r in (was, record)]
        gain = None if times[0] is None else times[0] / times[1]
        gains += [] if gain is None else [gain]
        cudnn = "refused" if new.refused(record, CUDNN) else figure(new.speed_up(record, CUDNN))
        shares = [None if r is None else r["share_of_copy"] for r in (was, record)]
        torch = [None if was is None else old.speed_up(was), new.speed_up(record)]
        columns = [*(figure(t, 1) for t in times), figure(gain), *map(figure, shares), *map(figure, torch), cudnn]
        rows.append([case_name(record), record["operation"], *columns])
    mean = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None
    parts = [f"# {title(both[1])}: {names[0]} and {names[1]}"]
    parts += ["\n".join(f"* {name}: {of['what']} ({title(of)})" for name, of in zip(names, both, strict=True))]
    parts += [f"Times as fast, the geometric mean of {len(gains)}: {figure(mean)}.", markdown(head, rows)]
    return "\n\n".join(parts) + "\n"


def figure(value: float | None, digits: int = 2) -> str:
    """The text of a cell with a figure; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(sets: Sequence[dict[str, Any]], path: Path, names: Sequence[str] = ("",)) -> None:
    """Draw the share of the bandwidth of a copy: a line for each case, a panel for each operation, a mark for each
    peer.
    """
    results = [Results(measured["records"]) for measured in sets]
    last = results[-1]
    cases = list(dict.fromkeys(case_name(record) for record in last.ours()))
    panels = [name for name in gpu_report.PANELS if any(gpu_report.panel_of(r) == name for r in last.ours())]
    figure_, axes = plt.subplots(
        1, len(panels), figsize=(3.2 + 2.3 * len(panels), 1.9 + 0.27 * len(cases)), sharey=True, layout="constrained"
    )
    for axis, operation in zip(axes, panels, strict=True):
        axis.axvline(1, color="0.5", linewidth=1)
        for record in last.ours():
            if gpu_report.panel_of(record) == operation:
                _row(axis, cases.index(case_name(record)), record, results)
        axis.set_title(operation, fontsize=9)
        axis.set_xlim(0, 1.1)
        axis.grid(axis="both", alpha=0.2)
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(cases)), cases, fontsize=7)
    axes[0].invert_yaxis()
    figure_.supxlabel("share of the bandwidth of a copy, at the fewest bytes that the operation can move", fontsize=8)
    labels = [f"{CUPYBN}, {name}" if name else CUPYBN for name in names]
    marks = dict(zip(labels, (BEFORE, NOW)[-len(sets) :], strict=True))
    marks |= {peer: style for peer, style in OTHERS.items() if any(last.other(r, peer=peer) for r in last.ours())}
    handles = [plt.Line2D([], [], linestyle="", label=label, **style) for label, style in marks.items()]
    figure_.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    figure_.suptitle(title(sets[-1]), fontsize=9, x=0.01, ha="left")
    figure_.savefig(path, dpi=110)
    plt.close(figure_)


NOW = {"marker": "o", "markersize": 6, "color": "C0"}
BEFORE = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "color": "C0"}
OTHERS = {
    TORCH: {"marker": "x", "markersize": 5, "color": "C1"},
    CUDNN: {"marker": "^", "markersize": 5, "color": "C2"},
}


def _row(axis: Any, y: int, record: Record, results: Sequence[Results]) -> None:
    """Draw the marks of one case and operation."""
    for peer, style in OTHERS.items():
        theirs = results[-1].other(record, peer=peer)
        if theirs is not None:
            axis.plot(theirs["share_of_copy"], y, **style)
    was = results[0].other(record) if len(results) > 1 else None
    if was is not None:
        axis.plot([was["share_of_copy"], record["share_of_copy"]], [y, y], color="C0", linewidth=1)
        axis.plot(was["share_of_copy"], y, **BEFORE)
    axis.plot(record["share_of_copy"], y, **NOW)


if __name__ == "__main__":
    main()
