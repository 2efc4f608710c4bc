"""`benchmarks/gpu.py` without a GPU: its dry run, and how it judges results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cupybn.functional as F
from cupybn._cli.problem import OPERATIONS, Problem, make_arrays
from tests.benchmark_scripts import BENCHMARKS, ROOT, require

pytest.importorskip("matplotlib")
cp = pytest.importorskip("cupy")

require()

import gpu_exact  # noqa: E402
import gpu_goals  # noqa: E402
from gpu_cases import cases  # noqa: E402


def run(*arguments):
    folders = [ROOT, *([ROOT / "tests" / "emulated"] if hasattr(cp, "emulator") else [])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


def results():
    return {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}


def test_dry_run(tmp_path):
    before = results()
    done = run("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert results() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-dry-run-copy.png",
        "gpu-dry-run-torch.png",
        "gpu-dry-run.json",
        "gpu-dry-run.md",
    ]
    note = "dry run, not a measurement"
    assert note in done.stdout
    assert note in (tmp_path / "gpu-dry-run.md").read_text()
    report = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert report["dry_run"] is True
    assert report["machine"].keys() >= {"GPU", "CUDA driver supports", "CUDA runtime", "CuPy", "PyTorch", "cupybn"}
    assert len(report["goals"]) == len(gpu_goals.GOALS)
    assert {record["note"] for record in report["records"]} == {note}
    ours = [record for record in report["records"] if record["peer"] == "cupybn"]
    measured = [(tuple(r["shape"]), r["dtype"], r["operation"]) for r in ours]
    tiny = cases(full=False, dry_run=True)
    assert measured == [(c.problem.shape, c.problem.dtype.name, name) for c in tiny for name in c.operations]
    for record in ours:
        assert record["error_over_allowed"] <= 1
        assert record["launches"] in (1, 2)
        for time in "cold_us", "warm_us", "copy_us", "host_us":
            assert record[time].keys() == {"median", "low", "high"}
    if hasattr(cp, "emulator"):
        assert any("PyTorch: not available" in line for line in report["notes"])


def test_refusals():
    """Figures of the stand-in never look like those of a GPU, nor take their place."""
    assert run("--dry-run", "--output", str(BENCHMARKS / "results")).returncode == 2
    if hasattr(cp, "emulator"):
        assert run().returncode == 2


def test_the_short_selection_has_every_layer_in_every_dtype_and_order():
    selected = cases(full=False, dry_run=False)
    batch_32 = [case for case in selected if case.group == "ResNet-50, batch 32"]
    assert len(batch_32) == 12 * 3 * 2
    assert {case.operations for case in batch_32} == {tuple(OPERATIONS)}
    assert {case.layout for case in selected} == {"NCHW", "NHWC", "NC", "NCL", "NCDHW", "NDHWC"}
    assert {case.problem for case in selected} < {case.problem for case in cases(full=True, dry_run=False)}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(6, 5, 7), (4, 3, 6)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_tells_right_from_wrong(shape, name, dtype, monkeypatch):
    """The error is computed right with the channels last, and some channels at a time."""
    monkeypatch.setattr(gpu_exact, "MOST_ELEMENTS", 50)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    operation, problem = OPERATIONS[name], Problem(shape, dtype, -1)
    (a,) = make_arrays(problem, np)
    residual = a.residual if operation.residual else None
    arguments = (a.x, a.running_mean, a.running_var, a.weight, a.bias, operation.training)
    y, vjp_fn = F.batch_norm_vjp(*arguments, residual=residual, activation=operation.activation, channel_axis=-1)
    found = vjp_fn(a.dy).input if operation.backward else y
    assert gpu_exact.error(np, problem, operation, a, found) <= 1
    found[1, 2, 0] += np.asarray(0.1, dtype)
    assert gpu_exact.error(np, problem, operation, a, found) > 1
    found[1, 2, 0] = np.nan
    assert gpu_exact.error(np, problem, operation, a, found) == np.inf


def record(peer, us, **more):
    fields = {"shape": [32, 256, 112, 112], "layout": "NCHW", "dtype": "float32", "operation": "training"}
    sizes = {"group": "large", "channels": 256, "x_bytes": 4e8, "share_of_copy": 0.9, "cold_us": {"median": us}}
    return fields | sizes | {"peer": peer} | more


def test_goals_hold_for_the_worst():
    other = {"shape": [64, 512, 64, 64]}
    fast = [record("cupybn", 10), record("PyTorch", 30)]
    slow = [record("cupybn", 10, **other, share_of_copy=0.8), record("PyTorch", 18, **other)]
    rows = {(r["regime"], r["goal"]): r for r in gpu_goals.compare(gpu_goals.Results(fast + slow))}
    regime = "NCHW, tensors >= 50 MB, C >= 256"
    share, speed_up = (
        rows[regime, "forward, share of copy >= 0.88"],
        rows[regime, "forward, speed-up against PyTorch >= 1.7"],
    )
    assert (share["count"], share["farthest"], share["met"]) == (2, 0.8, False)
    assert (speed_up["count"], speed_up["farthest"], speed_up["met"]) == (2, 1.8, True)
    assert speed_up["median"] == pytest.approx(2.4)
    assert rows[regime, "backward, share of copy >= 0.85"]["count"] == 0
    assert gpu_goals.cells([rows[regime, "backward, share of copy >= 0.85"]], False)[0][2] == "not measured"


def test_a_failed_peer_is_no_result():
    failed = {**record("PyTorch", 1), "error": "RuntimeError()"}
    results = gpu_goals.Results([record("cupybn", 10), failed])
    assert results.speed_up(results.ours()[0]) is None
