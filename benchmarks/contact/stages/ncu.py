"""Runs NVIDIA Nsight Compute over four calls: it tells what their kernels wait for."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from typing import Any, NamedTuple

from contact.log import write_whole
from contact.processes import run_limited
from contact.task import Task

TIME, READ, WRITE = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
INSTRUCTIONS = "smsp__inst_executed.sum"
REGISTERS, GRID = "launch__registers_per_thread", "launch__grid_size"
REASONS = (
    *("long_scoreboard", "short_scoreboard", "barrier", "membar", "lg_throttle", "mio_throttle"),
    *("math_pipe_throttle", "wait", "not_selected", "sleeping", "branch_resolving", "no_instruction"),
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = (
    *(TIME, READ, WRITE, DRAM, WARPS, ISSUE, INSTRUCTIONS, REGISTERS, GRID, "launch__block_size"),
    *("launch__shared_mem_per_block_dynamic", "launch__waves_per_multiprocessor", "lts__t_sector_hit_rate.pct"),
    *("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum"),
    "sm__inst_executed_pipe_fp64.avg.pct_of_peak_sustained_active",
    *(STALL.format(reason) for reason in REASONS),
)
WAYS = (("--metrics", ",".join(METRICS)), ("--set", "basic"))
"""Options of ncu that ask for the metrics; the later ones are for versions that do not know one of the metrics."""
LEAST_LEFT = 12.0
"""Seconds that must be left to try the next options."""


class Launch(NamedTuple):
    """A launch of a kernel, with the values of its metrics as text and their units."""

    values: dict[str, str]
    units: dict[str, str]

    def number(self, metric: str) -> float:
        """The value of a metric; NaN if it is missing."""
        try:
            return float(self.values.get(metric, "").replace(",", ""))
        except ValueError:
            return math.nan

    def with_unit(self, metric: str) -> str:
        """The value of a metric with its unit, as text."""
        return f"{self.number(metric):.4g} {self.units.get(metric, '')}".strip()

    def stalls(self) -> str:
        """The three reasons that warps wait for most, as text."""
        ratios = [(self.number(STALL.format(reason)), reason) for reason in REASONS]
        worst = sorted((pair for pair in ratios if not math.isnan(pair[0])), reverse=True)[:3]
        return ", ".join(f"{reason} {ratio:.1f}" for ratio, reason in worst)

    def row(self) -> dict[str, Any]:
        """The launch as a row of the report's table."""
        return {
            "kernel": self.values.get("Kernel Name", "?").partition("(")[0],
            "grid": self.values.get(GRID) or self.values.get("Grid Size"),
            "time": self.with_unit(TIME),
            "dram_pct": round(self.number(DRAM), 1),
            "read": self.with_unit(READ),
            "write": self.with_unit(WRITE),
            "issue_pct": round(self.number(ISSUE), 1),
            "warps_pct": round(self.number(WARPS), 1),
            "registers": self.values.get(REGISTERS),
            "stalls": self.stalls(),
        }


def run(task: Task) -> None:
    """Profile the calls, at whatever clocks the GPU has."""
    tool = shutil.which("ncu")
    if tool is None:
        task.log.skip("no ncu here")
        return
    base = [
        tool,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "-k",
        "regex:^bn_",
        "--csv",
        "--page",
        "raw",
    ]
    found: list[Launch] = []
    for way in WAYS:
        seconds = task.left() - 3
        done = run_limited([*base, *way, *task.command("ncu_work", seconds)], seconds)
        write_whole(task.out / "ncu.csv", done.output)
        found = launches(done.output)
        if found:
            break
        said = " | ".join(re.findall(r"^==(?:ERROR|WARNING)== .*", done.output, re.MULTILINE)) or done.output[-300:]
        task.log.note(f"ncu {way[0]}: {said}")
        if task.left() < LEAST_LEFT:
            break
    for launch in found:
        row = launch.row()
        task.log.row(**row)
        task.log.highlight(
            f"ncu {row['kernel']}: {row['time']}, dram {row['dram_pct']} %, issue slots {row['issue_pct']} %, "
            f"{row['stalls']}"
        )
    task.log.check("ncu", bool(found), f"{len(found)} launches")


def launches(output: str) -> list[Launch]:
    """The launches in the output of ncu: a table, whose second line has the units, among other lines."""
    start = output.find('"ID"')
    if start < 0:
        return []
    rows = list(csv.DictReader(io.StringIO(output[start:])))
    units = next((row for row in rows if row["ID"] == ""), {})
    return [Launch(row, units) for row in rows if (row["ID"] or "").isdigit()]
