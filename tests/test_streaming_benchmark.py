"""The benchmark of streamed statistics: it runs, its chunks are what they are said to be, and memory stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

import cupybn
from cupybn._steps import tiles
from tests.benchmark_scripts import BENCHMARKS, ROOT, require

require()
for package in "dask", "sklearn":
    pytest.importorskip(package)

import streaming  # noqa: E402
import streaming_sides  # noqa: E402
from streaming_chunks import Case, Stream  # noqa: E402

SMALL = [((5, 3, 4), 1), ((3, 4, 5), -1), ((6,), -1)]


def run(*arguments):
    """What the script prints."""
    command = [sys.executable, str(BENCHMARKS / "streaming.py"), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_tables(tmp_path):
    pytest.importorskip("matplotlib")
    text = run("--quick", "--plot", "--output", tmp_path)
    results = json.loads((tmp_path / "streaming-short.json").read_text())["results"]
    cases = streaming.Cases.of(streaming.QUICK)
    assert {key: len(rows) for key, rows in results.items()} == {
        key: len(rows) for key, rows in cases._asdict().items()
    }
    for row in [*results["kinds"], *results["chunks"], *results["sizes"]]:
        assert row["gigabytes_per_second"].keys() == streaming_sides.SIDES.keys()
        assert row["ratio"].keys() == streaming_sides.SIDES.keys() - {streaming_sides.OURS}
        assert row["made"]["low"] > 0
    for row in results["errors"]:
        assert row["of"][streaming_sides.OURS]["var"] < 1e-6
    for row in results["sizes"]:
        assert row["memory"].keys() == {streaming.ALONE, streaming_sides.OURS}
    assert (tmp_path / "streaming-short.png").stat().st_size > 0
    assert (tmp_path / "streaming-short.md").read_text() in text


def test_as_much_as_one_has_time_for():
    lines = run("--quick", "--long", 0.02).splitlines()
    assert [line.split(" GB")[0].strip() for line in lines[:-2]] == ["0.00", "0.00", "0.01", "0.02"]
    assert "12 of them" in lines[-2]
    assert float(lines[-1].rpartition(" ")[2]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "{}/file"), "argument --output: "),
        (("--output", "{}/file/folder"), "argument --output: "),
        (("--starts", "0"), "expected --rounds and --starts of 1 or more (got 5 and 0)"),
        (("--rounds", "-1"), "expected --rounds and --starts of 1 or more (got -1 and 2)"),
        (("--long", "0"), "argument --long: expected a number above 0 (got 0.0)"),
        (("--long", "nan"), "argument --long: expected a number above 0 (got nan)"),
        (("--long", "inf"), "argument --long: expected a number above 0 (got inf)"),
    ],
    ids=str,
)
def test_wrong_options(options, message, monkeypatch, tmp_path, capsys):
    """What cannot be is told of before anything is measured."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--quick", *(option.format(tmp_path) for option in options)])
    monkeypatch.setattr(streaming, "measure", None)
    monkeypatch.setattr(streaming, "stream_long", None)
    with pytest.raises(SystemExit) as caught:
        streaming.main()
    assert caught.value.code == 2
    assert f"streaming.py: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize(("sample", "axis"), SMALL)
@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_known_exactly(sample, axis, masked, ratio):
    stream = Stream(Case(sample, axis, masked, ratio, size=0.05, chunk=0.01))
    chunks = [np.moveaxis(chunk, axis, -1) for chunk in stream]
    assert len(chunks) == len(stream.making) == stream.case.chunks == 5
    assert all(not np.array_equal(chunks[0], other) for other in chunks[1:])
    rows = [chunk.reshape(-1, chunk.shape[-1]) if stream.mask is None else chunk[stream.mask] for chunk in chunks]
    for c, values in enumerate(np.concatenate(rows).T):
        exact = [Fraction(float(value)) for value in values]
        mean = sum(exact) / len(exact)
        assert (len(exact), mean) == (stream.exact.count, stream.exact.mean[c])
        assert sum((value - mean) ** 2 for value in exact) / len(exact) == stream.exact.var[c]
        assert 0.9 < stream.exact.var[c] < 2  # that of the block, and that of the shifts


def test_errors_are_those_of_the_worst_channel():
    exact = streaming_sides.Stream(Case((6,), -1, False, 1.0, 0.05, 0.01)).exact
    mean, var = (np.array([float(number) for number in row]) for row in (exact.mean, exact.var))
    mean[2] += 0.25 * np.sqrt(var[2])
    var[4] *= 0.5
    assert exact.errors(mean, var) == {"mean": pytest.approx(0.25), "var": pytest.approx(0.5)}


@pytest.mark.parametrize("side", streaming_sides.SIDES)
@pytest.mark.parametrize(("sample", "axis"), SMALL)
@pytest.mark.parametrize("masked", [False, True])
def test_all_sides_stream_the_same(side, sample, axis, masked, monkeypatch):
    monkeypatch.delenv("CUPYBN_NUM_THREADS", raising=False)
    stream = Stream(Case(sample, axis, masked, 1.0, size=0.05, chunk=0.01))
    wrong = stream.exact.errors(*streaming_sides.SIDES[side](stream))
    assert max(wrong.values()) < 1e-5
    assert len(stream.making) == stream.case.chunks * (2 if "NumPy" in side else 1)
    assert "CUPYBN_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("before", [None, "3"])
def test_one_thread_is_one(before, monkeypatch):
    if before is None:
        monkeypatch.delenv("CUPYBN_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("CUPYBN_NUM_THREADS", before)
    seen = []

    class Watched(Stream):
        def chunk(self, i):
            seen.append(tiles.num_threads())
            return super().chunk(i)

    streaming_sides.on_one_thread(Watched(Case((6,), -1, False, 1.0, size=0.05, chunk=0.01)))
    assert set(seen) == {1}
    assert os.environ.get("CUPYBN_NUM_THREADS") == before


def test_the_figures_are_the_right_way_round():
    """A side's time by ours, bytes by seconds, and our time by that of the other checkout."""
    case = Case((64, 56, 56), 1, False, 1.0, size=32, chunk=16)
    size = case.chunks * case.bytes_of_chunk / 1e9
    here = [
        {"a": {"seconds": t, "making": 1, "processor": 2 * t}, "b": {"seconds": 4 * t, "making": 1, "processor": 6 * t}}
        for t in (1, 2, 3)
    ]
    there = [{"a": {"seconds": 2 * turn["a"]["seconds"]}} for turn in here]
    row = streaming.figures(case, ["a", "b"], [here, there])
    assert row["ratio"]["b"]["median"] == 4
    assert row["processor_ratio"]["b"]["median"] == 3
    assert row["gigabytes_per_second"]["a"]["median"] == pytest.approx(size / 2)
    assert row["gigabytes_per_processor_second"]["b"]["median"] == pytest.approx(size / 12)
    assert row["to_the_other_checkout"]["median"] == 0.5
    assert row["megabytes"] == pytest.approx(1e3 * size)


@pytest.mark.skipif(streaming.resident("VmHWM") is None, reason="only Linux says what a process holds")
def test_memory_is_the_most_that_was_held():
    idle = streaming.resident("VmRSS")
    x = np.ones(10_000_000)
    assert streaming.resident("VmRSS") - idle > 60
    del x
    if not streaming.forget_peak():
        pytest.skip("VmHWM cannot be set back here")
    assert streaming.resident("VmHWM") - idle < 60


# ---------------------------------------------------------------------------------------------------------------------
# Flat memory


@pytest.mark.parametrize(("sample", "axis"), [streaming.FIRST, streaming.LAST], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_memory_is_flat(sample, axis, masked, threads, monkeypatch):
    """Ten times as many chunks take no more memory; what a chunk takes is a fraction of it, but for the masked copy."""
    monkeypatch.setenv("CUPYBN_NUM_THREADS", threads)
    peaks = []
    for size in 25, 250:
        stream = Stream(Case(sample, axis, masked, 1e3, size, chunk=8))
        chunk = stream.chunk(0)
        tracemalloc.start()
        statistics = cupybn.StreamingMoments(channel_axis=axis)
        for i in range(stream.case.chunks):
            np.add(chunk, np.float32(i % 2), out=chunk)
            statistics.update(chunk, stream.mask)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1e5
        assert int(statistics.count) == stream.exact.count
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < (2 if masked else 0.5) * chunk.nbytes
