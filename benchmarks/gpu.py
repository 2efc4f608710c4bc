"""Batch norm and its family on a GPU, on CuPy arrays, against PyTorch, cuDNN, plain CuPy and a copy of as many bytes.

    python benchmarks/gpu.py             # in less than 8 minutes: JSON, a table and plots in benchmarks/results
    python benchmarks/gpu.py --full      # every batch size, dtype and operation, however long it takes
    python benchmarks/gpu.py --compile   # with what torch.compile makes of the family, which takes its time
    python benchmarks/gpu.py --dry-run   # all of the code on tiny shapes, also on the stand-in for CuPy; no figures

Time on the device is that of replays of a graph, by events, on buffers that are several times as large as the L2 cache
together (cold), or on the same ones again and again (warm). Time on the host is measured apart. Every result that was
timed is compared with float64. A share of the bandwidth of a copy is (time of a copy of the least bytes that the
operation must move) / (its time). The exit status is 1 if a result of cupybn is wrong, or a measurement of it failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_goals
import gpu_report
from gpu_cases import cases
from gpu_measure import Bench, Record, failures
from gpu_peers import CUPYBN, peers
from tqdm import tqdm

from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._cli import info
from cupybn._cli.extras import optional
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, Effort
from cupybn._cli.table import table

RESULTS = Path(__file__).parent / "results"
DRY_RUN = "dry run, not a measurement"
MINUTES = 7.0
"""Minutes after which no further case is measured; writing tables and plots takes some more seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Batch norm and its family on CuPy arrays, on a GPU.")
    parser.add_argument("--full", action="store_true", help="every batch size, dtype and operation, without a limit")
    parser.add_argument("--dry-run", action="store_true", help="all of the code on tiny shapes; says nothing of speed")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside the family, too")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"when to stop (default: {MINUTES:g})")
    parser.add_argument("--seconds", type=float, default=0.03, help="for each figure (default: 0.03)")
    parser.add_argument("--output", type=Path, help="folder for the results")
    args = parser.parse_args()
    missing = cuda_missing()
    if missing:
        parser.error(missing)
    if hasattr(import_cupy(), "emulator") and not args.dry_run:
        parser.error("this CuPy is the stand-in, which can only be had with --dry-run")
    folder = args.output or (Path(tempfile.mkdtemp(prefix="cupybn-gpu-")) if args.dry_run else RESULTS)
    if args.dry_run and folder.resolve() == RESULTS.resolve():
        parser.error("a dry run leaves the results of measurements alone")

    effort = AS_LITTLE_AS_POSSIBLE if args.dry_run else Effort(args.seconds)
    report = measure(args, effort)
    print(f"\n{gpu_report.title(report)}\n")
    print(table(gpu_goals.HEAD, gpu_goals.cells(report["goals"], report["dry_run"])))
    print("", *report["notes"], sep="\n")
    print("", *gpu_report.write(report, folder), sep="\n")
    return 1 if wrong(report["records"]) else 0


def measure(args: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Measure, and return all that goes into the results file."""
    found, notes = peers(args.compile)
    bench = Bench(found, effort)
    deadline = float("inf") if args.full or args.dry_run else time.monotonic() + 60 * args.minutes
    records: list[Record] = []
    skipped = 0
    bench.warm_up()
    for case in tqdm(cases(args.full, args.dry_run), unit="case"):
        if time.monotonic() > deadline:
            skipped += 1
        else:
            records += bench.records(case)
    if skipped:
        notes.append(f"{skipped} cases: not measured, the time was over")
    notes += failures(records)
    notes += [
        f"WRONG: {CUPYBN}, {record['op']}, {record['shape']}, {record['dtype']}, {record['operation']}"
        for record in wrong(records)
    ]
    return {
        "dry_run": args.dry_run,
        "note": DRY_RUN if args.dry_run else "",
        "machine": machine(),
        "settings": {"full": args.full, **effort._asdict()},
        "goals": gpu_goals.compare(gpu_goals.Results(records)),
        "notes": notes,
        "records": [record | ({"note": DRY_RUN} if args.dry_run else {}) for record in records],
    }


def machine() -> dict[str, str]:
    """Versions of libraries and driver, and the name of the GPU."""
    found = dict(info.lines())
    torch = optional("torch")
    gpu = next((value for name, value in found.items() if name.startswith("GPU")), "none")
    kept = {name: found[name] for name in ("cupybn", "CuPy", "CUDA driver supports", "CUDA runtime", "NVRTC", "NumPy")}
    cudnn = torch.backends.cudnn.version() if torch is not None else None
    return {
        "GPU": gpu,
        **kept,
        "PyTorch": "not found" if torch is None else f"{torch.__version__} (CUDA {torch.version.cuda})",
        "cuDNN": str(cudnn or "not found"),
        "Python": found["Python"],
    }


def wrong(records: list[Record]) -> list[Record]:
    """The measurements of cupybn that failed, or whose result is off by more than it may be."""
    ours = [record for record in records if record["peer"] in (CUPYBN, "all")]
    return [record for record in ours if "error" in record or not record["error_over_allowed"] <= 1]


if __name__ == "__main__":
    sys.exit(main())
