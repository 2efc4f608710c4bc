"""Benchmarks of the host, `launch.py`, `cpu.py` and `chain.py`: each runs, and figures are what they are said to be."""

from __future__ import annotations

import collections
import dis
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cupybn.functional as F
from tests.benchmark_scripts import BENCHMARKS, ROOT, require

cp = pytest.importorskip("cupy")

require()

import by_hand  # noqa: E402
import chain  # noqa: E402
import cpu  # noqa: E402
import launch  # noqa: E402
import pretended_cupy  # noqa: E402
import sampling  # noqa: E402
import sync  # noqa: E402
import turns  # noqa: E402

WITH_TORCH = importlib.util.find_spec("torch") is not None
HAND = cpu.COMPARISONS["by-hand"]
SHAPES = [((4, 8, 7, 7), "NCHW"), ((3, 5, 4, 6), "NHWC"), ((16, 9), "NC")]


def run(script, *arguments, folders=(ROOT,), python=sys.executable):
    """What a script prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [python, str(BENCHMARKS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["results"]


def folders_of_cupy():
    """Folders of cupybn and of the CuPy of these tests."""
    return [ROOT, *([ROOT / "tests" / "emulated"] if hasattr(cp, "emulator") else [])]


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def test_launch_counts_arguments(tmp_path):
    text = run("launch", "--short", "--against", ROOT, "--output", tmp_path)
    rows = results(tmp_path, "launch")
    assert len(rows) == 10
    for name, row in rows.items():
        assert len(row["arguments"]) == (2 if "streamed" in name else 1), name
        assert min(row["arguments"]) > 0
        assert max(row["arguments"]) <= launch.MOST_ARGUMENTS, name
        assert row["against_arguments"] == row["arguments"]
        assert 0 < row["us"]["least"] <= row["us"]["low"] <= row["us"]["median"] <= row["us"]["high"]
        assert row["ratio"]["low"] > 0
    assert f"(goal: at most {launch.MOST_ARGUMENTS})" in text


def test_launch_with_the_cupy_of_these_tests(tmp_path):
    run("launch", "--real", "--short", "--output", tmp_path, folders=folders_of_cupy())
    rows = results(tmp_path, "launch-real")
    assert {name: len(row["arguments"]) for name, row in rows.items() if "streamed" in name} == {
        "batch_norm, training, streamed": 2,
        "vjp_fn, streamed": 2,
    }
    assert not any("wrapping_us" in row for row in rows.values())


@pytest.mark.skipif("CUPYBN_REAL_CUPY" not in os.environ, reason="CUPYBN_REAL_CUPY names no Python that has CuPy")
def test_launch_with_the_real_cupy(tmp_path):
    text = run("launch", "--real", "--short", "--output", tmp_path, python=os.environ["CUPYBN_REAL_CUPY"])
    rows = results(tmp_path, "launch-real")
    for row in rows.values():
        assert max(row["arguments"]) <= launch.MOST_ARGUMENTS
        assert ("wrapping_us" in row) == ("up to the driver" in text)


@pytest.mark.parametrize("key", cpu.COMPARISONS)
def test_cpu(key, tmp_path):
    comparison = cpu.COMPARISONS[key]
    if comparison.with_torch and not WITH_TORCH:
        pytest.skip("PyTorch is not installed")
    pytest.importorskip("matplotlib")
    text = run("cpu", "--short", "--only", key, "--threads", 1, "--output", tmp_path)
    rows = results(tmp_path, f"{comparison.stem}-short")
    assert list(rows) == [f"{layout} {'x'.join(map(str, shape))}" for shape, layout in comparison.short]
    for row in rows.values():
        assert row.keys() == comparison.goals.keys()
        for figures in row.values():
            assert min(figures["other_ms"], figures["cupybn_ms"], figures["ratio"]["low"]) > 0
    assert (tmp_path / f"{comparison.stem}-short.png").stat().st_size > 0
    assert ("PyTorch" in text.partition("\n")[0]) == comparison.with_torch


def test_chain(tmp_path):
    text = run("chain", "--short", "--real", "--output", tmp_path, folders=folders_of_cupy())
    rows = results(tmp_path, "chain-real-short")
    assert rows.keys() >= {chain.NUMPY, chain.CUPY, chain.CUPY_GRAPH} | ({chain.TORCH} if WITH_TORCH else set())
    assert rows[chain.CUPY_GRAPH]["us"].keys() == {"step"}
    for side in chain.NUMPY, chain.CUPY:
        assert rows[side]["us"].keys() == set(chain.PHASES)
        assert bool(rows[side]["torch"]) == WITH_TORCH
        (places,) = rows[side]["places"]
        assert sum(share for kinds in places.values() for share in kinds.values()) == pytest.approx(1)
    assert "4 layers" in text


# ---------------------------------------------------------------------------------------------------------------------
# The chain, by hand, and pretended arrays


def test_the_chain_is_resnet50():
    layers = list(chain.resnet50(224))
    assert len(layers) == len(chain.shapes(short=False)) == 53
    assert collections.Counter(channels for channels, _ in layers) == sync.RESNET50
    assert set(layers) == set(cpu.RESNET50)
    assert layers[:6] == [(64, 112), (64, 56), (64, 56), (256, 56), (256, 56), (64, 56)]
    assert layers[-4:] == [(2048, 7), (512, 7), (512, 7), (2048, 7)]
    assert {side for _, side in chain.resnet50(chain.IMAGE)} == {16, 8, 4, 2, 1}


def test_the_shapes_by_hand():
    every = HAND.shapes
    assert len(set(every)) == 15
    assert collections.Counter(layout for _, layout in every) == {"NCHW": 5, "NHWC": 5, "NC": 5}
    sizes = [int(np.prod(shape)) for shape, _ in every]
    assert min(sizes) < 1600
    assert max(sizes) > 6e6


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=str)
def test_by_hand_is_the_same_function(shape, layout, rng):
    axis = -1 if layout == "NHWC" else 1
    x, dy = rng.normal(2, 3, shape), rng.normal(size=shape)
    weight, bias, mean, var = rng.uniform(0.5, 2, (4, shape[axis]))
    theirs, ours = ((mean.copy(), var.copy(), weight, bias) for _ in range(2))
    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(by_hand.inference(x, *theirs, axis), F.batch_norm(x, *ours, channel_axis=axis), **close)
    y, vjp_fn = F.batch_norm_vjp(x, *ours, training=True, channel_axis=axis)
    np.testing.assert_allclose(by_hand.training(x, *theirs, axis), y, **close)
    np.testing.assert_allclose(theirs[:2], ours[:2], **close)
    axes = by_hand.others(x, axis)
    saved = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    for a, b in zip(by_hand.backward(dy, x, *saved, weight, axis), vjp_fn(dy), strict=False):
        np.testing.assert_allclose(a, b, **close)


@pytest.mark.parametrize(("shape", "layout"), HAND.short, ids=str)
def test_both_sides_by_hand_see_the_same_data(shape, layout):
    for theirs, ours in cpu.by_hand_cases(shape, layout).values():
        a, b = theirs(), ours()
        for left, right in zip(a, b, strict=False) if isinstance(a, tuple) else [(a, b)]:
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not WITH_TORCH, reason="PyTorch is not installed")
@pytest.mark.parametrize(("shape", "layout"), cpu.COMPARISONS["torch"].short, ids=str)
def test_both_sides_beside_pytorch_see_the_same_data(shape, layout):
    for case, (theirs, ours) in cpu.torch_cases(shape, layout).items():
        a, b = theirs(), ours()
        for left, right in zip(a, b, strict=False) if case == "backward" else [(a, b)]:
            np.testing.assert_allclose(left.detach().numpy(), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 7), (3,), ()])
def test_pretended_arrays_look_like_arrays(shape):
    pretended, array = pretended_cupy.array(shape, "f4"), np.empty(shape, np.float32)
    for name in "shape", "dtype", "ndim", "size", "itemsize", "strides", "nbytes":
        assert getattr(pretended, name) == getattr(array, name), name
    assert pretended.flags.c_contiguous
    flat = pretended.reshape((array.size,))
    assert (flat.shape, flat.strides, flat.data.ptr) == ((array.size,), (4,), pretended.data.ptr)
    first, second = pretended_cupy.empty(shape, "f4"), pretended_cupy.empty(shape, "f4")
    assert abs(first.data.ptr - second.data.ptr) >= array.nbytes
    assert abs(pretended.data.ptr - pretended_cupy.array(shape, "f4").data.ptr) >= array.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Ratios


def test_ratios_are_the_right_way_round():
    assert turns.ratio([2, 6, 40], [1, 2, 4]) == {"median": 3, "low": 2.5, "high": 6.5, "least": 2}
    assert turns.spread([7]) == {"median": 7, "low": 7, "high": 7, "least": 7}
    figures = cpu.figures([(3000, 1000), (5000, 1000)])
    assert figures["ratio"]["median"] == 4  # the other's time by ours
    assert (figures["other_ms"], figures["cupybn_ms"]) == (4, 1)


def test_means_of_cpu():
    """Geometric means of all shapes and of those of a layout; the least; and our time by that of another checkout."""
    shapes = {"NCHW 1x2x3x4": 2, "NC 8x9": 4, "NC 4x5": 8}
    row = {
        name: {"ratio": turns.spread([r]), "to_the_other_checkout": turns.spread([1 / r])} for name, r in shapes.items()
    }
    text = cpu.table({name: dict.fromkeys(("training", "inference", "backward"), row[name]) for name in row}, HAND)
    found = {line[:26].strip(): line[26:].split() for line in text.splitlines()[1 + len(shapes) :]}
    assert found["mean of 1 x NCHW"] == ["2.00"] * 3
    assert found["mean of 2 x NC"] == ["5.66"] * 3
    assert found["geometric mean"] == ["4.00"] * 3
    assert found["least"] == ["2.00"] * 3
    assert found["our time / that of there"] == ["0.25"] * 3


def test_ratios_of_launch():
    """This checkout's time by the other one's, without what the errors of its launches cost."""
    here, there = [{"us": 13, "unwrapped_us": 4}] * 3, [{"us": 29, "unwrapped_us": 5}] * 3
    figures = launch.figures([here, there], [[7], [4, 9]], [3, 4.5])
    assert figures["us"]["median"] == 10
    assert figures["wrapping_us"] == 6
    assert figures["against_us"]["median"] == 20
    assert figures["ratio"]["median"] == figures["ratio_of_least"] == 0.5
    assert (figures["arguments"], figures["against_arguments"]) == ([7], [4, 9])


def test_ratios_of_the_chain():
    ours, other, torch = ([{"step": us}] * 2 for us in (2, 8, 6))
    figures = chain.figures([ours, other], [torch, torch])
    assert figures["torch"]["step"]["median"] == 3  # PyTorch's time by ours
    assert figures["there"]["step"]["median"] == 0.25  # ours by that of the other checkout
    assert chain.figures([ours], None) == {
        "us": {"step": turns.spread([2, 2])},
        "torch": {},
        "there_us": {},
        "there": {},
    }
    sides = [chain.NUMPY, chain.CUPY, chain.CUPY_GRAPH, chain.TORCH]
    fewer = chain.figures([ours], [torch[:1]])
    assert fewer["torch"]["step"] == {"median": 3, "low": 3, "high": 3, "least": 3}
    assert [chain.torch_of(side, sides) for side in sides] == [chain.TORCH] * 3 + [None]
    sides += [chain.TORCH_CUDA, chain.TORCH_GRAPH]
    assert [chain.torch_of(side, sides) for side in sides] == [*sides[3:4], *sides[4:], None, None, None]


def test_a_burst_is_timed_in_groups(monkeypatch):
    """Calls of 30 us are timed three at a time, and the first call is not counted."""
    now, calls, looks = 0.0, 0, 0

    def clock():
        nonlocal looks
        looks += 1
        return now

    def call():
        nonlocal now, calls
        calls += 1
        now += 30e-6 if calls > 1 else 1

    monkeypatch.setattr(turns.time, "perf_counter", clock)
    assert turns.burst(call, 1e-3) == pytest.approx(30)
    assert calls > 30
    assert looks < 1.2 * calls
    calls = 1
    assert turns.burst(call, 0) == pytest.approx(30)
    assert calls == 1 + 2 + 3 * turns.LEAST_GROUPS


# ---------------------------------------------------------------------------------------------------------------------
# Processes that take turns

SCRIPT = """
import sys
sys.path.append({benchmarks!r})
import turns, cupybn
def reply(question):
    print("what a library prints")
    if question == "die":
        sys.exit(3)
    with open({log!r}, "a") as log:
        log.write(cupybn.__version__ + question + " ")
    return cupybn.__version__ + question
turns.answer({{"option": sys.argv[-1]}}, reply)
"""


@pytest.fixture
def checkouts(tmp_path):
    """A script, the log that it writes, and two checkouts with a cupybn each, A and B."""
    for version in "AB":
        package = tmp_path / version / "cupybn"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS), log=str(log)))
    return str(script), log, [tmp_path / "A", tmp_path / "B"]


def test_checkouts_take_turns(checkouts):
    script, log, trees = checkouts
    taken = turns.take(script, trees, ["option"], lambda facts: [[facts["version"], "q"], ["r"]], 3, 2, ["l"])
    assert [facts["version"] for facts in taken.facts] == ["A", "B"]
    assert {facts["option"] for facts in taken.facts} == {"option"}
    for question in "A", "q", "r":
        assert taken[question] == [[f"A{question}"] * 3, [f"B{question}"] * 3]
    assert taken.last == [["Al"], ["Bl"]]
    # One round at the first start, two at the second one; whoever was last begins the next round.
    assert log.read_text() == "AA BA Aq Bq Ar Br BA AA Bq Aq AA BA Aq Bq Br Ar Ar Br Al Bl "


def test_checkouts_take_turns_while_there_is_time(checkouts, capsys):
    """Each group has one round at the first start where there is no time, and the last questions are asked."""
    script, log, trees = checkouts
    taken = turns.take(script, trees, [], lambda _: [["q"], ["r", "s"]], 9, 3, ["l"], minutes=0.0)
    assert log.read_text() == "Aq Bq Ar Br As Bs Al Bl "
    assert (taken.rounds, taken.last) == (1, [["Al"], ["Bl"]])
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if ":" in line] == [
        "start 1 of 3"
    ] * 2
    log.unlink()
    taken = turns.take(script, trees, [], lambda _: [["q"]], 9, 3, ["l"], minutes=10.0)
    assert (taken.rounds, log.read_text().count("l")) == (9, 2)


HANGS = """
import argparse, sys, time
sys.path.append({benchmarks!r})
import turns
turns.GRACE = 0.1
parser = argparse.ArgumentParser()
parser.add_argument("--output")
turns.add_options(parser, 1, 1)
turns.add_minutes(parser)
turns.parse(parser)
turns.answer({{}}, lambda _: time.sleep(600))
"""


def test_a_process_that_hangs_says_where(checkouts, tmp_path, capfd):
    _, _, trees = checkouts
    script = tmp_path / "hangs.py"
    script.write_text(HANGS.format(benchmarks=str(BENCHMARKS)))
    with pytest.raises(SystemExit, match="has ended with status 1"):
        turns.take(str(script), trees[:1], [], lambda _: [["q"]], 1, 1, minutes=0.01)
    assert "in answer" in capfd.readouterr().err


def test_a_process_that_ends_or_is_another_one(checkouts, tmp_path):
    script, _, trees = checkouts
    with turns.Checkout(script, trees[0], []) as checkout, pytest.raises(SystemExit, match="has ended with status 3"):
        checkout.ask("die")
    with pytest.raises(SystemExit, match="another cupybn"):
        turns.Checkout(script, tmp_path / "C", [])


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def example(x):
    y = len(x)
    return y + 1


def test_samples_belong_to_who_was_running():
    """What is seen at the entry of a function was its caller's time."""
    code = example.__code__
    offsets = {name: [i.offset for i in dis.get_instructions(code) if name in i.opname] for name in ("CALL", "RETURN")}
    caller = types.SimpleNamespace(f_code=types.SimpleNamespace(co_filename="caller.py"))

    def at(offset):
        return sampling.where(types.SimpleNamespace(f_code=code, f_lasti=offset, f_back=caller))

    entry = [i.offset for i in dis.get_instructions(code) if i.opname == "RESUME"] or [-1]
    assert at(entry[0]) == ("caller.py", "python")
    assert at(offsets["CALL"][-1]) == (__file__, "calls")
    assert at(offsets["RETURN"][-1]) == (__file__, "python")


def test_samples_add_up_and_leave_nothing_behind():
    before = sampling.signal.getsignal(sampling.signal.SIGALRM)
    shares = sampling.sample(lambda: sum(range(1000)), 0.2, lambda filename: Path(filename).name)
    assert sum(share for kinds in shares.values() for share in kinds.values()) == pytest.approx(1)
    assert shares[Path(__file__).name]["calls"] > 0
    assert sampling.signal.getsignal(sampling.signal.SIGALRM) is before
    assert sampling.signal.getitimer(sampling.signal.ITIMER_REAL) == (0, 0)


def test_places():
    place = sampling.place_in(Path("/a/site-packages/cupybn"))
    assert place("/a/site-packages/cupybn/_steps/plans.py") == "_steps/plans.py"
    assert place("/a/site-packages/numpy/_core/fromnumeric.py") == "numpy: fromnumeric.py"
    assert place("/usr/lib/python3/contextlib.py") == "Python: contextlib.py"
    assert place(chain.__file__) == "the benchmark"
