"""`benchmarks/gpu_results.py`: what is kept of a measurement, and two of them side by side."""

from __future__ import annotations

import json

import pytest

from tests.benchmark_scripts import require

pytest.importorskip("matplotlib")
cp = pytest.importorskip("cupy")

require()

import gpu_results  # noqa: E402
from gpu_peers import CUDNN, TORCH  # noqa: E402

FACTS = {
    "GPU 0": "NVIDIA H200, compute capability 9.0, 132 multiprocessors",
    "executable": "/home/somebody/python3",
    "kernels": "16 in /home/somebody/kernels",
    "nvidia-smi": "NVIDIA H200, 580.159.04, 143771 MiB, 1980 MHz, 3201 MHz, 375 MHz, Disabled",
    "CuPy": "14.2.0",
    "torch": "2.11.0",
}
NCU = {"kernel": "bn_stats", "grid": "256", "time": "34 us", "dram_pct": 32.9, "read": "5", "write": "2"}
NCU |= {"issue_pct": 59.7, "warps_pct": 23.4, "registers": "119", "stalls": "wait 1.3"}


def record(operation, peer, us, share):
    times = {"cold_us": {"median": us, "low": us, "high": us}, "copy_us": {"median": us * share, "low": 1, "high": 2}}
    head = {"group": "first contact", "layout": "NCHW", "shape": [32, 64, 56, 56], "dtype": "float16", "channels": 64}
    head |= {"x_bytes": 12845056, "operation": operation, "peer": peer, "least_bytes": 1}
    return head | times | {"share_of_copy": share, "error_over_allowed": 0.5, "launches": 1}


def left_by_first_contact(folder, us, facts=FACTS):
    folder.mkdir()
    refused = record("backward", CUDNN, 1, 1) | {"error": "No valid engine configs", "refused": True}
    records = [record("training", "cupybn", us, 0.123456789), record("training", TORCH, 60.0, 0.25)]
    records += [record("training", CUDNN, 90.0, 0.2), record("backward", "cupybn", us, 0.5), refused]
    nothing = {"checks": [["it works", True, ""]], "facts": {}, "notes": [], "skipped": [], "table": []}
    stages = {
        "environment": nothing | {"facts": facts},
        "bench": nothing
        | {"facts": {"copy of 1 MiB in all": "4000 GB/s"}, "notes": [f"{CUDNN}: 1.32.0, in /home/somebody/site"]},
        "family": nothing,
        "bridge": nothing | {"highlights": ["step, NCHW float32: converted 80.0 ms, x1.25"]},
        "ncu": nothing | {"table": [NCU]},
        "suite": nothing | {"checks": [["the tests", False, "in /home/somebody"]]},
    }
    outcome = {"seconds": 1.26, "tail": "host somewhere"}
    stages = {
        name: {"verdict": "passed" if found["checks"][0][1] else "FAILED", "findings": found, **outcome}
        for name, found in stages.items()
    }
    (folder / "results.json").write_text(json.dumps(stages))
    (folder / "bench.json").write_text(json.dumps(records))
    of_family = {"op": "layer_norm", "layout": "NC", "shape": [8192, 128], "group": "family", "roundoffs": 0.75}
    records = [record("forward", peer, us, 0.8) | of_family for peer, us in (("cupybn", us), (TORCH, 80.0))]
    (folder / "family.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def kept(tmp_path):
    for name, us in ("before", 40.0), ("after", 20.0):
        gpu_results.keep(left_by_first_contact(tmp_path / f"{name}-folder", us), name, f"what {name} is", tmp_path)
    return tmp_path


def test_what_is_kept(kept):
    text, page = (kept / "before.json").read_text(), (kept / "before.md").read_text()
    for private in "somebody", "somewhere":
        assert private not in text + page
    found = json.loads(text)
    assert found["what"] == "what before is"
    expected = {"driver": "580.159.04", "clocks, at most": "1980 MHz, memory 3201 MHz", "CuPy": "14.2.0"}
    assert found["machine"].items() >= expected.items()
    assert found["records"][0]["share_of_copy"] == 0.1235
    assert [s["verdict"] for s in found["stages"]] == [*["passed"] * 5, "FAILED"]
    assert max(map(len, text.splitlines())) < 600  # a line for each record
    assert "| NCHW 32x64x56x56 float16 | training | 40.0 (40.0..40.0) | - | 0.12 | 1.50 | 2.25 |" in page
    assert "| NCHW 32x64x56x56 float16 | backward | 40.0 (40.0..40.0) | - | 0.50 | - | refused |" in page
    assert "| layer_norm NC 8192x128 float16 | forward | 40.0 (40.0..40.0) | - | 0.80 | 2.00 | - |" in page
    assert "| 1 | 0.50 | 0.75 |" in page
    assert "* step, NCHW float32: converted 80.0 ms, x1.25\n" in page
    assert "| bn_stats | 256 | 34 us | 32.9 | 59.7 | 23.4 | 119 | wait 1.3 |" in page
    assert "| suite | FAILED | 0 of 1 | 1.3 |" in page
    assert f"* {CUDNN}: 1.32.0, in ...\n" in page
    assert (kept / "before.png").stat().st_size > 1000


def test_a_rehearsal_is_not_kept(tmp_path):
    folder = left_by_first_contact(tmp_path / "folder", 1.0, FACTS | {"CuPy": "14.2.0 (the stand-in)"})
    with pytest.raises(SystemExit, match="says nothing of a GPU"):
        gpu_results.keep(folder, "name", "what", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_two_side_by_side(kept):
    paths = gpu_results.compare(kept / "before.json", kept / "after.json")
    assert [path.name for path in paths] == ["before-after.md", "before-after.png"]
    page = paths[0].read_text()
    assert "* before: what before is" in page
    assert "the geometric mean of 3: 2.00." in page
    assert "| training | 40.0 | 20.0 | 2.00 | 0.12 | 0.12 | 1.50 | 3.00 | 4.50 |" in page
    assert "| backward | 40.0 | 20.0 | 2.00 | 0.50 | 0.50 | - | - | refused |" in page


def test_the_folder_is_named_after_the_gpu():
    assert gpu_results.folder_name("NVIDIA GeForce RTX 4090, compute capability 8.9") == "geforce-rtx-4090"
    assert gpu_results.folder_name(FACTS["GPU 0"]) == "h200"
