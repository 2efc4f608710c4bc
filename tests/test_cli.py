"""``python -m cupybn``: what the commands say, and that `check` misses nothing that is wrong."""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupybn import cupy_ops, numpy_ops
from cupybn.__main__ import main
from cupybn._cli import bench, cases, check, extras, sides
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, COLD, CupyGraph, cold_sets, device_time, rotate, spread
from cupybn._cli.peers import cupybn_call
from cupybn._cli.problem import OPERATIONS, Problem, make_arrays
from cupybn._cli.steps import STEPS
from cupybn._cli.table import table
from cupybn._kernels import kernel_names
from tests.reference import bits

ROOT = Path(__file__).parent.parent


def without_gpu(*arguments):
    """Run a command where no CuPy or no GPU is found."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "cupybn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)


@pytest.fixture
def one_shape(monkeypatch):
    monkeypatch.setattr(check, "QUICK", {"channels_first": [(6, 5, 49)], "channels_last": [(37, 3, 1)]})


# ---------------------------------------------------------------------------------------------------------------------
# info


def test_info_without_gpu():
    result = without_gpu("info")
    assert result.returncode == 0, result.stderr
    assert "NumPy mirrors" in result.stdout
    assert f"{len(kernel_names())} in " in result.stdout
    assert "pip install '.[cuda13]'" in result.stdout


def test_info_names_gpus_and_versions(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "multiprocessors" in lines["GPU 0"]
    for name in "CuPy", "CUDA runtime", "CUDA driver supports", "NVRTC", "NCCL", "mpi4py", "compiled kernels":
        assert lines[name].strip(), name


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_check_knows_every_kernel():
    assert {name.rpartition("/")[2] for name in kernel_names()} == STEPS.keys()


def test_check_of_the_kernels(capsys):
    assert main(["check", "--quick", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in kernel_names())
    assert "within their bounds" in out


@pytest.mark.parametrize("name", kernel_names())
def test_check_launches_what_it_says(name, monkeypatch):
    """The kernel of a row, not other ones that come to the same."""
    cp = pytest.importorskip("cupy")
    if not hasattr(cp, "emulator"):
        pytest.skip("a GPU does not tell")
    monkeypatch.setattr(check, "kernel_names", lambda: [name])
    with cp.emulator.record() as launches:
        assert main(["check", "--quick", "--dtype", "float32"]) == 0
    assert name.rpartition("/")[2] in {launch.name for launch in launches}


def test_check_without_gpu():
    result = without_gpu("check", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no kernels to check" in result.stdout
    assert all(f"\n{step} " in result.stdout for step in STEPS)


def spoiled(function):
    """The same step, with one of its results off by a thousandth."""

    def step(*args, **kwargs):
        result = function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        for name in "out", "dx":
            if name in bound:
                bound[name][...] = bound[name] * 1.001
                return result
        fields = dict(zip(getattr(result, "_fields", ("mean", "var")), result, strict=True))
        last = next(name for name in ("m2", "dy_xhat", "var") if name in fields)
        fields[last] = fields[last] * 1.001
        return type(result)(**fields) if hasattr(result, "_fields") else tuple(fields.values())

    return step


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", STEPS)
def test_check_sees_a_wrong_mirror(step, monkeypatch, capsys):
    """And names it; without a GPU."""
    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    monkeypatch.setattr(numpy_ops, step, spoiled(getattr(numpy_ops, step)))
    assert main(["check", "--quick", "--dtype", "float32"]) == 1
    assert f"  {step}, (N, C, L) = (6, 5, 49), float32, " in capsys.readouterr().out


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", STEPS)
def test_check_sees_a_wrong_kernel(step, monkeypatch, capsys):
    monkeypatch.setattr(cupy_ops, step, spoiled(getattr(cupy_ops, step)))
    monkeypatch.setattr(check, "kernel_names", lambda: [n for n in kernel_names() if n.endswith(step)])
    assert main(["check", "--quick", "--dtype", "float32"]) == 1
    assert f"{step}, (N, C, L) = " in capsys.readouterr().out


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", ["bn_normalize", "bn_forward"])
def test_check_sees_a_wrong_mask(step, monkeypatch, capsys):
    right = getattr(numpy_ops, step)

    def wrong(*args):
        result = right(*args)
        if args[-1] is not None:
            args[-1][...] = True
        return result

    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    monkeypatch.setattr(numpy_ops, step, wrong)
    assert main(["check", "--quick", "--dtype", "float32"]) == 1
    assert f"{step}, (N, C, L) = (6, 5, 49), float32, training, relu, residual: mask" in capsys.readouterr().out


@pytest.mark.usefixtures("one_shape")
def test_check_goes_on_after_an_error(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("told so")

    monkeypatch.setattr(cupy_ops, "bn_backward", broken)
    assert main(["check", "--quick", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: told so" in out
    assert "\nmean_and_var " in out


def test_check_takes_nan_for_wrong():
    case = cases.Case((2, 3, 4), np.dtype(np.float32), 0, cases.Variant())
    right = sides.Result(np.ones(3), 8, 1)
    assert sides.share_of_bound(np.ones(3), right, case, False) == 0
    assert sides.share_of_bound(np.full(3, np.nan), right, case, False) == np.inf
    assert sides.share_of_bound(np.ones(4), right, case, False) == np.inf
    assert sides.share_of_bound(np.full(3, 1 + 16 * case.unit), right, case, False) == pytest.approx(2)
    exact = right._replace(exact=True)
    assert sides.share_of_bound(np.full(3, 1 + case.unit), exact, case, True) == np.inf


# ---------------------------------------------------------------------------------------------------------------------
# bench


def test_bench_without_gpu():
    arguments = ("--shape", "4,3,5,5", "--shape", "7,6", "--dtype", "float32", "--dtype", "bfloat16", "--seconds", "0")
    result = without_gpu("bench", *arguments, "--backward")
    assert result.returncode == 0, result.stderr
    assert "No GPU" in result.stdout
    for name in "4x3x5x5 float32, training", "4x3x5x5 bfloat16, backward", "7x6 float32, inference":
        assert f"\n{name} " in result.stdout


@pytest.mark.parametrize("more", [[], ["--relu"], ["--residual", "--channel-axis", "-1"]], ids=str)
def test_bench(more, capsys):
    assert main(["bench", "--shape", "2,3,4,5", "--dtype", "float16", "--backward", "--seconds", "0", *more]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split(", ")[-1].split()[0] for row in rows] == ["training", "inference", "backward"]
    assert all(("channels last" in row) == ("-1" in more) for row in rows)


@pytest.mark.parametrize("text", ["3", "3,0", "3,x", ""])
def test_bench_refuses_what_is_no_shape(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--shape", text])
    assert "--shape" in capsys.readouterr().err


def test_operations_of_bench():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    chosen = bench.operations(parser.parse_args(["--shape", "2,3", "--residual", "--backward"]))
    assert [o.name for o in chosen] == [f"{name} + add + ReLU" for name in ("training", "inference", "backward")]
    assert chosen[0] == OPERATIONS["training + add + ReLU"]
    assert chosen[2] == OPERATIONS["backward + add + ReLU"]


@pytest.mark.parametrize("command", [["check", "--quick"], ["bench", "--shape", "4,3"]], ids=str)
def test_without_tqdm(command, monkeypatch):
    """A message that names the extra; `info` does without."""
    monkeypatch.setattr(extras, "optional", lambda _: None)  # nor ml_dtypes
    with pytest.raises(SystemExit, match=r"cupybn\[cli\]"):
        main(command)
    assert main(["info"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def test_passes():
    found = {name: operation.passes for name, operation in OPERATIONS.items()}
    assert found == {
        "training": 2,
        "inference": 2,
        "backward": 3,
        "training + ReLU": 2,
        "backward + ReLU": 3,
        "training + add + ReLU": 3 + 1 / 16,
        "backward + add + ReLU": 4 + 1 / 16,
    }


def test_sets_exceed_the_cache():
    effort = AS_LITTLE_AS_POSSIBLE._replace(most_sets=1000, least_calls=4)
    assert cold_sets(10, 100, effort) * 10 > COLD * 100
    assert cold_sets(1e9, 100, effort) == 2
    assert cold_sets(1, 1e9, effort) == 1000
    assert rotate(["a", "b", "c"], effort) == ["a", "b", "c", "a"]
    assert rotate(list("abcdef"), effort) == list("abcdef")


def test_device_time_is_that_of_one_call():
    class Graph:
        calls, replays = 5, 0

        def replay(self, rounds):
            self.replays += rounds
            return [100.0] * rounds

    graph = Graph()
    effort = AS_LITTLE_AS_POSSIBLE._replace(seconds=1e-3, most_rounds=20)
    assert device_time(graph, effort) == (20, 20, 20)
    assert graph.replays == 2 + 10
    assert spread([1, 2, 3, 4, 5]) == (3, 2, 4)


@pytest.mark.parametrize("keep", [True, False])
def test_a_graph_computes_what_its_calls_compute(keep):
    import cupy as cp

    problem, operation = Problem((3, 4, 5), np.dtype(np.float32)), OPERATIONS["training"]
    sets = make_arrays(problem, cp, 2)
    sets[1].x[...] *= 3
    calls = [cupybn_call(problem, operation, arrays) for arrays in sets]
    expected = [bits(call()[0]) for call in calls]
    graph = CupyGraph(calls, keep)
    graph.replay(2)
    assert [bits(result[0]) for result in graph.results] == expected[0 if keep else 1 :]


def test_arrays_repeat_their_pattern(monkeypatch):
    monkeypatch.setattr("cupybn._cli.problem.PATTERN", 7)
    (arrays,) = make_arrays(Problem((2, 3, 3), np.dtype(np.float32)), np)
    flat = arrays.x.reshape(-1)
    assert np.array_equal(flat[:7], flat[7:14])
    assert np.array_equal(flat[:4], flat[14:])


def test_table():
    assert table(["a", "bb"], [["long", "1"], ["", "22"]]).splitlines() == [
        "a     bb",
        "----  --",
        "long   1",
        "      22",
    ]
