"""Tests of `benchmarks/roofline.py`: what it reads, and that a prediction is the resource needed longest."""

from __future__ import annotations

import json
import sys

import pytest

from tests.benchmark_scripts import require

pytest.importorskip("matplotlib")
pytest.importorskip("cupy")

require()

import roofline  # noqa: E402
from roofline import GPUS, LAUNCH, Count, Launch, Layer  # noqa: E402

BY_NAME = {gpu.name: gpu for gpu in GPUS}
KERNELS = ("bn_stats", "bn_normalize", "bn_backward_reduce", "bn_backward_input", "bn_forward", "bn_backward")
ROWS = [f"Channels first, rows of {plane}" for plane in ("56 x 56", "14 x 14", "7 x 7")]
ROWS += [f"Channels last, C = {channels}" for channels in (256, 35)]


def table(issue=315, fp64=9.9):
    lines = []
    for rows in ROWS:
        lines += [
            f"## {rows}",
            "",
            "| kernel | dtype | variant | issue | fma | fp64 | once |",
            "|---|---|---|---:|---:|",
        ]
        for kernel in KERNELS:
            for dtype in roofline.ITEMSIZE:
                lines.append(f"| {kernel} | {dtype} | plain | {issue} | 20 | {fp64} | 520 |")
                lines.append(f"| {kernel} | {dtype} | relu | 999 | 999 | 999 | 999 |")
    return "\n".join(lines)


def test_tables_are_read():
    counts = roofline.read_counts("# Instructions\n\nWords | with a line.\n" + table())
    assert counts.keys() == {
        (rows, kernel, dtype) for rows in ROWS for kernel in KERNELS for dtype in roofline.ITEMSIZE
    }
    assert counts[ROWS[0], "bn_stats", "float16"] == Count({"issue": 315, "fma": 20, "fp64": 9.9}, 520)


@pytest.mark.parametrize(
    ("channels_last", "channels", "plane", "rows"),
    [
        *(
            (False, 64, 3136, ROWS[0]),
            (False, 512, 784, ROWS[0]),
            (False, 192, 1225, ROWS[1]),
            (False, 256, 196, ROWS[1]),
        ),
        *((False, 2048, 49, ROWS[2]), (True, 1024, 196, ROWS[3]), (True, 35, 784, ROWS[4])),
    ],
)
def test_rows_that_were_counted_stand_for_others(channels_last, channels, plane, rows):
    assert roofline.kind_of_rows(channels_last, channels, plane) == rows


def test_launches_are_those_of_the_library():
    h200, t4 = BY_NAME["H200"], BY_NAME["T4"]
    large = Layer(32, 256, 3136, "float16", False)
    (one,) = roofline.launches(large, "training", h200)
    assert one.kernel == "bn_forward"
    assert one.nbytes == 2 * large.nbytes
    streamed = roofline.launches(large, "backward", t4)
    assert [(launch.kernel, launch.nbytes) for launch in streamed] == [
        ("bn_backward_reduce", 2 * large.nbytes),
        ("bn_backward_input", 3 * large.nbytes),
    ]
    assert [launch.kernel for launch in roofline.launches(large, "inference", t4)] == ["bn_normalize"]


def test_a_kernel_takes_what_it_needs_most():
    """A kernel takes as long as the resource that it needs longest, computed by hand for ten blocks on each
    multiprocessor.
    """
    gpu, layer = BY_NAME["H200"], Layer(32, 256, 1024, "float16", False)
    packs = layer.nbytes / 16
    assert packs == 1 << 20
    launch = Launch("bn_forward", 2 * layer.nbytes, 1320, 256)
    times = roofline.needs(launch, layer, gpu, Count({"issue": 300, "fp64": 10}, 500))
    clocks = (packs * 300 + 1320 * 256 * 500) / (132 * 128)
    assert times["issue"] == pytest.approx(clocks / 1750 / 0.65)
    assert times["fp64"] == pytest.approx(packs * 10 / (132 * 64) / 1750 / 0.8)
    assert times["memory"] == pytest.approx(2 * layer.nbytes / 4280e3 / 0.95)
    few = roofline.needs(launch._replace(blocks=33), layer, gpu, Count({"fp64": 10}, 0))
    assert few["fp64"] == pytest.approx(4 * times["fp64"])  # only a quarter of the multiprocessors have a block
    assert few["memory"] == pytest.approx(times["memory"] / 0.75)


@pytest.mark.parametrize(
    ("gpu", "issue", "fp64", "binds"),
    [("H200", 315, 9.9, "issue"), ("H200", 30, 1, "memory"), ("RTX 3090", 315, 40, "fp64"), ("T4", 60, 0, "memory")],
)
def test_what_binds(gpu, issue, fp64, binds):
    layer = Layer(32, 256, 3136, "float16", False)
    found = roofline.predict(layer, "training", BY_NAME[gpu], roofline.read_counts(table(issue, fp64)))
    assert found.binds == binds
    assert 0 < found.share <= 0.97
    if binds == "memory" and gpu == "H200":
        assert found.share == pytest.approx(0.95, abs=0.01)


def test_small_arrays_wait_for_the_launch():
    found = roofline.predict(
        Layer(4, 64, 49, "float16", False), "training", BY_NAME["H200"], roofline.read_counts(table())
    )
    assert found.binds == "launch"
    assert LAUNCH < found.us < 2 * LAUNCH


def test_page_and_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "counts.md").write_text(table())
    record = {"group": "first contact", "layout": "NHWC", "shape": [32, 56, 56, 256], "dtype": "float16"}
    record |= {"operation": "training", "peer": "cupybn", "cold_us": {"median": 70.0}, "share_of_copy": 0.38}
    others = [record | {"peer": "PyTorch"}, record | {"operation": "training + ReLU"}, record | {"group": "dead"}]
    kept = {"what": "These kernels", "records": [record, *others]}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    arguments = ["--instructions", tmp_path / "counts.md", "--measured", tmp_path / "kept.json", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["roofline.py", *map(str, arguments)])
    roofline.main()
    page = (tmp_path / "roofline.md").read_text()
    assert page.count("| NHWC 32x56x56x256 float16 | training | ") == 1
    (line,) = [line for line in page.splitlines() if "| 0.38, of 1 |" in line]
    assert line.startswith("| NHWC, float16 |")
    assert page.count("not measured yet") == 3 * 6 * len(GPUS) - 1
    assert f"| {GPUS[0].name}, NHWC, float16 | " in capsys.readouterr().out
    assert (tmp_path / "roofline.png").stat().st_size > 1000
