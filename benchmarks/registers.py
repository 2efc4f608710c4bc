"""Lists what the compiled kernels use: registers, shared memory and spills, for every generation of GPUs, without a
GPU.

python benchmarks/registers.py       # a table in benchmarks/results/registers.md
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # `tests.nvrtc`, below, compiles the kernels

from cupybn._steps import sources
from tests import nvrtc
from tests.nvrtc import ARCHITECTURES, Instance, Usage

HEADER = """# Registers

Registers of a thread, where packs have 16 bytes and indices 32 bits, by compute capability, and static shared
memory of a block in bytes; NVRTC {version}. Spills are bytes stored + loaded, where there are any. Blocks have the
fewest threads that they may have, as these may have the fewest registers; kernels that keep channels on chip are in
clusters of eight from 9.0 on. Written by `benchmarks/registers.py`.

"""
PHASES = ("on chip", "only sums", "after sums")
"""Words for what a launch of the norms for channels last does of a step."""
COLUMNS = ["kernel", "dtype", *(f"{a // 10}.{a % 10}" for a in ARCHITECTURES), "shared", "spills"]


def row(instance: Instance, usages: list[Usage]) -> list[str]:
    """The cells of an instance's row, from its usage on each architecture."""
    spills = [
        f"{column}: {usage.spill_stores} + {usage.spill_loads}"
        for column, usage in zip(COLUMNS[2:], usages, strict=False)
        if usage.spilled
    ]
    return [
        name_of(instance),
        instance.dtype,
        *(str(usage.registers) for usage in usages),
        str(max(usage.shared for usage in usages)),
        ", ".join(spills) or "-",
    ]


def name_of(instance: Instance) -> str:
    """The kernel's name, and for those of the norms what they are compiled for."""
    if instance.rows:
        rows = {given: name for name, given in nvrtc.ROWS.items()}
        return f"{instance.kernel}, {rows[instance.rows[:2]]}"
    return instance.kernel if instance.phase < 0 else f"{instance.kernel}, {PHASES[instance.phase]}"


def listed(architecture: int) -> list[Instance]:
    """The instances of the table, as many for each architecture."""
    found = []
    for kernel in sources.kernel_names():
        every = nvrtc.instances(kernel, architecture)
        if kernel in nvrtc.NORMS_FIRST:
            found += every[: len(nvrtc.ROWS)]  # the others are compiled for one architecture alone
        else:
            any_packs = "/" not in kernel and kernel not in nvrtc.IN_PACKS
            found += [i for i in every if any_packs or (i.pack_bytes, i.index_bits, i.masked) == (16, 32, False)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of the compiled kernels.")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder for the table")
    args = parser.parse_args()

    by_architecture = [listed(architecture) for architecture in ARCHITECTURES]
    instances = by_architecture[-1]
    jobs = [job for same in zip(*by_architecture, strict=True) for job in zip(same, ARCHITECTURES, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda job: nvrtc.compile_instance(*job)[1], jobs)
        usages = [nvrtc.usage(log) for log in tqdm(logs, total=len(jobs), unit="kernel")]

    each = len(ARCHITECTURES)
    rows = [row(instance, usages[i * each : (i + 1) * each]) for i, instance in enumerate(instances)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *rows)]
    lines.insert(1, "|" + "---|" * 2 + "---:|" * (each + 1) + "---|")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "registers.md"
    path.write_text(HEADER.format(version=nvrtc.version()) + "\n".join(lines) + "\n")
    print(f"{path}: {len(usages)} kernels, at most {max(usage.registers for usage in usages)} registers")


if __name__ == "__main__":
    main()
