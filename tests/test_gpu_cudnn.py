"""`benchmarks/gpu_cudnn.py` without a GPU: on a stand-in for NVIDIA's frontend, and what the frontend itself takes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest

import cupybn.functional as F
from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE
from cupybn._cli.problem import EPS, MOMENTUM, OPERATIONS, Problem, make_arrays
from tests import real_cupy
from tests.benchmark_scripts import BENCHMARKS, ROOT, require

pytest.importorskip("matplotlib")
cp = pytest.importorskip("cupy")
if not hasattr(cp, "emulator"):
    pytest.skip("the stand-in for cudnn-frontend runs on the stand-in for CuPy", allow_module_level=True)

require()

import gpu_cudnn  # noqa: E402
import gpu_exact  # noqa: E402
import gpu_report  # noqa: E402
from gpu_cases import BARE, Case  # noqa: E402
from gpu_goals import Results  # noqa: E402
from gpu_measure import Bench, failures  # noqa: E402
from gpu_peers import CUDNN, CUPYBN, peers  # noqa: E402

EMULATED = ROOT / "tests" / "emulated"
SHAPES = [((4, 3, 5, 5), 1), ((4, 5, 5, 3), -1), ((8, 3), 1), ((4, 3, 7), 1), ((4, 7, 3), -1), ((2, 3, 2, 3, 4), 1)]


MISSING = [
    ((8, 3), 1, [8, 3, 1, 1], [3, 1, 3, 3]),
    ((4, 3, 7), 1, [4, 3, 7, 1], [21, 7, 1, 1]),
    ((4, 7, 3), -1, [4, 3, 7, 1], [21, 1, 3, 3]),
]


@pytest.mark.parametrize(("shape", "axis", "dims", "strides"), MISSING, ids=str)
def test_missing_axes_follow_the_memory_order(shape, axis, dims, strides):
    """The strides of missing axes decide which engines cuDNN has."""
    assert gpu_cudnn.dims_and_strides(Problem(shape, np.dtype(np.float16), axis)) == (dims, strides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_calls_are_batch_norm(name, shape, axis, dtype):
    pytest.importorskip("ml_dtypes")
    problem, operation = Problem(shape, parameter_dtype(dtype), axis), OPERATIONS[name]
    a, expected = make_arrays(problem, cp, 2)
    found = gpu_cudnn.Frontend(gpu_cudnn.load(), []).call(problem, operation, a)()
    assert found[0].dtype == problem.dtype
    assert found[0].shape == shape
    assert gpu_exact.error(cp, problem, operation, a, found[0]) <= 1
    vectors = expected.running_mean, expected.running_var, expected.weight, expected.bias
    residual = expected.residual if operation.residual else None
    options = {"residual": residual, "activation": operation.activation, "channel_axis": axis}
    _, vjp_fn = F.batch_norm_vjp(expected.x, *vectors, operation.training, MOMENTUM, EPS, **options)
    for stat in "running_mean", "running_var":
        np.testing.assert_allclose(*(cp.asnumpy(getattr(of, stat)) for of in (a, expected)), rtol=1e-5, atol=1e-6)
    if operation.backward:
        gradients = vjp_fn(expected.dy)
        for vector, other in zip(found[1:3], gradients[1:3], strict=True):
            np.testing.assert_allclose(cp.asnumpy(vector), cp.asnumpy(other), rtol=2e-3, atol=2e-3)
        if operation.residual:
            assert (cp.asnumpy(found[3]) == cp.asnumpy(gradients.residual)).all()


def test_inference_by_its_own_operation_where_there_is_one(monkeypatch):
    monkeypatch.setattr(gpu_cudnn.load(), "REFUSED_OPERATION", "")
    problem, operation = Problem((4, 3, 5, 5), np.dtype(np.float16)), OPERATIONS["inference"]
    (a,), notes = make_arrays(problem, cp), []
    (found,) = gpu_cudnn.Frontend(gpu_cudnn.load(), notes).call(problem, operation, a)()
    assert gpu_exact.error(cp, problem, operation, a, found) <= 1
    assert not notes


def test_a_refusal_is_no_failure():
    found, notes = peers()
    bench = Bench([peer for peer in found if peer.name in (CUDNN, CUPYBN)], AS_LITTLE_AS_POSSIBLE)
    problem = Problem((2, 3, 3, 35), np.dtype(np.float16), 3)
    records = list(bench.records(Case("odd", "NHWC", problem, BARE, all_peers=False)))
    refused = [(r["operation"], r["error"]) for r in records if r.get("refused")]
    assert refused == [("training", "No valid engine configs"), ("backward", "No valid engine configs")]
    assert failures(records) == [f"{CUDNN}, refused 2 times: No valid engine configs"]
    assert [r["operation"] for r in records if r["peer"] == CUDNN and "error" not in r] == ["inference"]
    assert sum("refuses batchnorm_inference" in note for note in notes) == 1
    results = Results(records)
    column = gpu_report.HEAD.index(f"{CUDNN} / {CUPYBN}")
    cells = [gpu_report.cells(results, record)[column] for record in results.ours()]
    assert cells[0] == cells[2] == "refused"
    assert float(cells[1]) >= 0  # a figure, whatever it is


def test_a_failure_is_no_refusal(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("illegal address")

    found, _ = peers()
    monkeypatch.setattr(gpu_cudnn.Frontend, "_execute", fails)
    bench = Bench([peer for peer in found if peer.name == CUDNN], AS_LITTLE_AS_POSSIBLE)
    (record,) = bench.records(Case("x", "NC", Problem((4, 3), np.dtype(np.float32)), ("training",), all_peers=False))
    assert "illegal address" in record["error"]
    assert not record.get("refused")


def test_dead_channels_are_measured_as_such():
    seen = []

    class Peer:
        name, everywhere = "spy", True
        takes = staticmethod(lambda *_: True)

        @staticmethod
        def surroundings():
            raise RuntimeError("seen")

        @staticmethod
        def call(*_): ...

    bench = Bench([Peer()], AS_LITTLE_AS_POSSIBLE)
    make = bench.records.__globals__["make_arrays"]
    bench.records.__globals__["make_arrays"] = lambda *args: seen.extend(made := make(*args)) or made
    try:
        problem = Problem((2, 3, 3, 4), np.dtype(np.float16), 3)
        list(bench.records(Case("x", "NHWC", problem, ("training",), all_peers=False, dead=True)))
    finally:
        bench.records.__globals__["make_arrays"] = make
    for a in seen:
        x = cp.asnumpy(a.x)
        assert not x[..., ::2].any()
        assert x[..., 1::2].all()
        assert cp.asnumpy(a.dy).all()


@pytest.mark.parametrize("lacks", ["the frontend", "cuDNN"])
def test_absent_is_said_in_a_line(lacks, monkeypatch):
    find, module = importlib.util.find_spec, gpu_cudnn.load()

    def no_library():
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    if lacks == "cuDNN":
        monkeypatch.setattr(module, "backend_version", no_library)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cudnn" else find(name))
    found, notes = peers()
    assert CUDNN not in [peer.name for peer in found]
    why = "it finds no cuDNN: Unable to find symbol cudnnGetVersion" if lacks == "cuDNN" else "it is not installed"
    assert [note for note in notes if note.startswith(CUDNN)] == [f"{CUDNN}: not available, {why}"]


def test_the_library_is_found_anywhere_on_the_path(tmp_path, monkeypatch):
    library = tmp_path / "nvidia" / gpu_cudnn.LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded.append((name, mode)))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    gpu_cudnn._load_library()
    assert loaded == [(str(library), ctypes.RTLD_GLOBAL)]


def test_the_frontend_itself_takes_these_calls():
    path = [folder for folder in sys.path if folder != str(EMULATED)]
    if PathFinder.find_spec("cudnn", path) is None:
        pytest.skip("nvidia-cudnn-frontend is not installed")
    script = Path(real_cupy.__path__[0]) / "draw_cudnn.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(ROOT)])}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("drawn by ")
