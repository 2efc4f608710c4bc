"""Counts the instructions that kernels issue for each 16 bytes, without a GPU: a table of all steps, dtypes and shapes.

    python benchmarks/instructions                            # writes benchmarks/results/instructions.md
    python benchmarks/instructions bn_stats --dtype float16   # prints some of it
    python benchmarks/instructions --hardware                 # what Nsight Compute must find on a GPU
    python benchmarks/instructions --measured DIR/ncu.csv     # the same beside what it has found

CuPy is the stand-in of the tests, also where a real one is installed. NVRTC and nvdisasm come from PyPI:
nvidia-cuda-nvrtc, nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

BENCHMARKS = Path(__file__).parent.parent
sys.path[:0] = [str(BENCHMARKS.parent / "tests" / "emulated"), str(BENCHMARKS.parent), str(BENCHMARKS)]

from instructions import hardware, report  # noqa: E402
from instructions.cost import measure  # noqa: E402
from instructions.launches import DEVICES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions of the kernels for each 16 bytes.")
    parser.add_argument("only", nargs="?", default="", help="part of the name of a kernel: others are left out")
    parser.add_argument("--dtype", choices=report.DTYPES, help="this one alone")
    parser.add_argument("--architecture", type=int, choices=DEVICES, default=90, help="90 for sm_90")
    parser.add_argument("--hardware", action="store_true", help="predict the counts of first_contact's stage ncu")
    parser.add_argument("--measured", type=Path, help="ncu.csv of that stage, to be compared with them")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results", help="folder for the whole table")
    args = parser.parse_args()
    if args.hardware or args.measured:
        print(hardware.table(args.architecture, args.measured))
        return
    cases = [c for c in report.cases() if args.only in c.kernel and args.dtype in (None, c.dtype)]
    more = [c for c in report.more_cases() if args.only in c.kernel and args.dtype in (None, c.dtype)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        costs = pool.map(partial(measure, architecture=args.architecture), cases)
        tables = report.tables(list(tqdm(costs, total=len(cases), unit="case")))
        counts = pool.map(partial(report.count_once, architecture=args.architecture), more)
        tables += report.more_tables(dict(zip(more, tqdm(counts, total=len(more), unit="case"), strict=True)))
    print(tables)
    if not args.only and args.dtype is None:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / "instructions.md"
        path.write_text(report.HEADER.format(architecture=args.architecture) + tables)
        print(path)


if __name__ == "__main__":
    main()
