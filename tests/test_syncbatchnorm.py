"""Synchronized batch norm: real ranks under mpiexec, and what a single process can show."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from cupybn._ranks import engines
from tests.conftest import EMULATED
from tests.ranks.launch import RANK_ENVIRONMENT, find_mpiexec
from tests.reference import bits, to_numpy

ROOT = Path(__file__).parent.parent
LIMIT = 30.0
"""Seconds within which a lost rank must have ended all others."""


def mpiexec():
    """The launcher of ranks; tests that need it are skipped where there is none."""
    pytest.importorskip("mpi4py")
    return find_mpiexec() or pytest.skip("no mpiexec: pip install '.[mpi]'")


def start(ranks, *arguments):
    """Start Python on so many ranks, with the stand-in for CuPy if these tests use it."""
    import cupy

    path = [*([EMULATED] if hasattr(cupy, "emulator") else []), ROOT, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **RANK_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [mpiexec(), "-n", str(ranks), sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout):
    """The output of a process. If it takes longer than `timeout` it is ended, and the test fails."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # lets mpiexec end the ranks
        pytest.fail(f"{process.communicate()[0]}\nmore than {timeout} s")


# ---------------------------------------------------------------------------------------------------------------------
# Real ranks


@pytest.mark.parametrize(("ranks", "engines"), [(2, []), (3, []), (8, ["mpi"])], ids=["2", "3", "8"])
def test_ranks(ranks, engines):
    """All cases of `tests/ranks` hold, on NumPy arrays and on those of a GPU or the stand-in."""
    process = start(ranks, "-m", "mpi4py", "-m", "tests.ranks", *engines)
    output = finish(process, timeout=400)
    assert process.returncode == 0, output
    assert f"cases on {ranks} ranks" in output


def wait_for_the_end(folder, ranks, began):
    """Wait until all ranks' processes have ended, within LIMIT."""
    processes = [int((folder / f"process{rank}").read_text()) for rank in range(ranks)]
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() - began < LIMIT, f"still there: {alive}"
        time.sleep(0.1)


def is_alive(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    """A rank that is killed ends the others, with the time limit that layers have by default."""
    began = time.monotonic()
    process = start(3, "-m", "tests.ranks.lost", "SIGKILL", str(_timeout()), str(tmp_path))
    output = finish(process, LIMIT)
    assert process.returncode != 0, output
    assert (tmp_path / "process1").exists(), output
    wait_for_the_end(tmp_path, 3, began)
    assert not list(tmp_path.glob("went_on*"))


def test_a_rank_that_nobody_sees_die(tmp_path):
    """A rank that stops, which launcher and network do not notice, ends the others: each says so."""
    began = time.monotonic()
    process = start(3, "-m", "tests.ranks.lost", "SIGSTOP", "2", str(tmp_path))
    try:
        output = finish(process, LIMIT)
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "process1").read_text()), signal.SIGKILL)
    assert process.returncode != 0, output
    wait_for_the_end(tmp_path, 3, began)
    told = [path.read_text().splitlines() for path in sorted(tmp_path.glob("told*"))]
    assert told, output  # the first rank that gives up ends the others, which may not get to say it
    for seconds, text, buffers in told:
        assert 2 <= float(seconds) < 10
        assert "expected all 3 ranks to exchange statistics within timeout=2 s" in text
        assert buffers == "unchanged"
    assert not list(tmp_path.glob("went_on*"))


def _timeout():
    return inspect.signature(SyncBatchNorm).parameters["timeout"].default


def test_the_time_limit_leaves_time_to_end():
    assert 0 < _timeout() <= LIMIT - 5


# ---------------------------------------------------------------------------------------------------------------------
# A single process


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_without_a_communicator_it_is_batch_norm(xp, device, rng, shape):
    """A layer without a communicator is batch norm to the bit; one value for each channel raises."""
    cls = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(shape)]
    layers = [kind(3, activation="relu", device=device) for kind in (SyncBatchNorm, cls)]
    x, residual, dy = (xp.asarray(rng.standard_normal(shape).astype(np.float32)) for _ in range(3))
    for mode in True, False:
        results = []
        for layer in layers:
            y, vjp_fn = layer.train(mode).vjp(x, residual)
            results.append(bits(y, *vjp_fn(dy), *layer.state_dict().values()))
        assert results[0] == results[1]
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel"):
        layers[0].train()(x[:1, :, None][..., :1] if len(shape) == 2 else x[:1].reshape(1, 3, -1)[..., :1])


def test_any_rank_of_input_from_two_on(xp, device, rng):
    layer = SyncBatchNorm(3, device=device, channel_axis=-1)
    for shape in (4, 3), (2, 2, 1, 2, 1, 2, 3):
        assert layer(xp.asarray(rng.standard_normal(shape))).shape == shape
    with pytest.raises(ValueError, match=r"^expected at least 2D input \(got 1D input\)$"):
        layer(xp.ones(3))


def test_constructor_and_text():
    layer = SyncBatchNorm(3, device="cpu", activation="relu", comm=None, timeout=5)
    expected = (
        "SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation='relu')"
    )
    assert repr(layer) == expected
    assert (layer.comm, layer.timeout) == (None, 5)
    parameters = inspect.signature(BatchNorm2d).parameters
    assert list(inspect.signature(SyncBatchNorm).parameters) == [*parameters, "comm", "timeout"]
    assert cupybn.SyncBatchNorm is SyncBatchNorm


@pytest.mark.parametrize("timeout", [0, -1, np.nan, "5"])
def test_time_limits_that_are_none(timeout):
    layer = SyncBatchNorm(3, device="cpu", timeout=5)
    for call in (
        lambda: SyncBatchNorm(3, device="cpu", timeout=timeout),
        lambda: SyncBatchNorm.from_batchnorm(layer, None, timeout),
        lambda: setattr(layer, "timeout", timeout),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^expected timeout "):
            call()
    assert layer.timeout == 5


def test_time_limits_reach_the_engine():
    layer = SyncBatchNorm(3, device="cpu", timeout=5)
    engine = Alone()
    layer.comm = engine
    assert engine.timeout == 5
    for timeout in 1e9, np.inf, None:
        layer.timeout = timeout
        assert engine.timeout is layer.timeout is timeout


@pytest.mark.parametrize("cls", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_there_and_back(cls):
    plain = cls(3, eps=0.01, momentum=None, bias=False, device="cpu", channel_axis=-1, activation="relu").eval()
    layer = SyncBatchNorm.from_batchnorm(plain)
    back = layer.to_batchnorm()
    assert type(layer) is SyncBatchNorm
    assert type(back) is cls
    assert vars(back) == vars(plain)
    assert all(a is b for a, b in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True))
    assert layer.training is False
    again = SyncBatchNorm.from_batchnorm(layer)
    assert again is not layer
    assert type(again.to_batchnorm()) is cls


def test_back_from_a_layer_that_was_never_there():
    layer = SyncBatchNorm(3, device="cpu")
    with pytest.raises(ValueError, match=r"^expected a layer that was made by from_batchnorm"):
        layer.to_batchnorm()
    with pytest.raises(ValueError, match=r"channels|elements"):
        layer(np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"^expected a layer that was made by from_batchnorm"):
        layer.to_batchnorm()
    for shape in (2, 3, 4, 5), (2, 3):  # the message is about the first of the shapes
        layer(np.ones(shape))
        assert type(layer.to_batchnorm()) is BatchNorm2d
    with pytest.raises(TypeError, match=r"^expected layer to be a batch norm layer \(got int\)$"):
        SyncBatchNorm.from_batchnorm(3)


@pytest.mark.parametrize("comm", [3, "world", np.ones(2)], ids=["int", "str", "array"])
def test_what_is_no_communicator(comm):
    layer = SyncBatchNorm(3, device="cpu")
    for call in (
        lambda: SyncBatchNorm(3, device="cpu", comm=comm),
        lambda: SyncBatchNorm.from_batchnorm(layer, comm),
        lambda: setattr(layer, "comm", comm),
    ):
        with pytest.raises(TypeError, match=r"^expected comm to be a communicator of mpi4py.* \(got "):
            call()
    assert layer.comm is None


@pytest.mark.parametrize("name", ["size", "check", "gather", "sum", "texts"])
def test_what_is_no_engine(name):
    """An object that lacks a part of the protocol of engines is refused before a pass needs it."""
    engine = SimpleNamespace(**{other: None for other in ("size", "check", "gather", "sum", "texts") if other != name})
    with pytest.raises(TypeError, match=r"^expected comm to be .*an engine or None \(got SimpleNamespace\)$"):
        SyncBatchNorm(3, device="cpu", comm=engine)


def test_communicators_that_cannot_be_used():
    mpiexec()
    code = """if True:
        from mpi4py import MPI
        from cupybn import SyncBatchNorm
        for comm in MPI.COMM_NULL, MPI.COMM_SELF.Create_intercomm(0, MPI.COMM_WORLD, 1 - MPI.COMM_WORLD.rank):
            try:
                SyncBatchNorm(3, device="cpu", comm=comm)
            except (TypeError, ValueError) as error:
                print(f"{type(error).__name__}: {error}", flush=True)
    """
    output = finish(start(2, "-m", "mpi4py", "-c", code), 60)
    assert output.count("ValueError: expected comm to be a communicator of this process (got MPI.COMM_NULL)") == 2
    assert output.count("TypeError: expected comm to be an intracommunicator (got an intercommunicator)") == 2


def test_importing_and_building_layers_starts_no_mpi():
    code = """if True:
        import sys, cupybn
        cupybn.SyncBatchNorm(3, device="cpu", comm=None)
        assert not {"mpi4py", "cupyx"} & set(sys.modules), sys.modules.keys()
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EMULATED), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ---------------------------------------------------------------------------------------------------------------------
# Engines by users, and properties of NCCL


def test_nccl_of_one_rank(rng):
    """A communicator of NCCL with one rank works: its messages are right, and a layer sends none."""
    cp = pytest.importorskip("cupy")
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("no NCCL")
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    engine = engines.engine_for(comm, 30)
    row = cp.asarray(rng.standard_normal((1, 7)))
    for collective in engine.gather, engine.sum:
        result, header = collective(row, np.empty(0))
        assert header is None
        assert bits(result) == bits(row)
        assert result.shape == row.shape
    assert engine.texts("3 channels of float32") == ["3 channels of float32"]
    x = cp.asarray(rng.standard_normal((4, 3, 5)))
    layers = SyncBatchNorm(3, device="cuda:0", comm=comm), BatchNorm1d(3, device="cuda:0")
    assert bits(layers[0](x)) == bits(layers[1](x))


def test_where_mpi_says_that_it_takes_memory_of_gpus(monkeypatch):
    """The variable CUPYBN_CUDA_AWARE_MPI overrules a real MPI, whose own answer stays the same."""
    code = "from mpi4py import MPI; from cupybn._ranks.engines import cuda_aware; print(cuda_aware(), cuda_aware())"
    said = {}
    for value in "", "0", "1":
        monkeypatch.setenv("CUPYBN_CUDA_AWARE_MPI", value)
        said[value] = finish(start(1, "-c", code), 60).split()
    assert said["0"] == ["False", "False"]
    assert said["1"] == ["True", "True"]
    assert said[""] in (["False", "False"], ["True", "True"])


class Alone:
    """An engine with a second rank, which always has what this one has."""

    size = 2

    def __init__(self):
        self.messages = []

    def check(self, input):
        pass

    def gather(self, row, header):
        self.messages.append(("gather", row.size, header.size))
        xp = np if isinstance(row, np.ndarray) else __import__("cupy")
        rows = xp.empty((2, row.size))
        rows[...] = row
        return rows, np.stack([header, header])

    def sum(self, row, header):
        self.messages.append(("sum", row.size, header.size))
        total = row.copy()
        total *= 2
        return total, 2 * header

    def texts(self, text):
        self.messages.append(("texts", len(text)))
        return [text, text]


def test_an_engine_of_ones_own(xp, device, rng):
    """An engine by a user works: a message of 1 + 2 C numbers forward, one of 2 C back, and once a text."""
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    engine = Alone()
    layer, plain = SyncBatchNorm(3, device=device, comm=engine), BatchNorm1d(3, device=device)
    for _ in range(2):
        y, vjp_fn = layer.vjp(xp.asarray(x))
        grads = vjp_fn(y)
    texts, *messages = engine.messages
    assert texts == ("texts", len("3 channels of float32 in NumPy arrays") - (xp is not np))
    assert messages == [("gather", 7, 2), ("sum", 6, 1)] * 2
    twice = xp.asarray(np.concatenate([x, x]))
    for _ in range(2):
        z, plain_vjp_fn = plain.vjp(twice)
        plain_grads = plain_vjp_fn(z)
    np.testing.assert_allclose(to_numpy(y), to_numpy(z)[:4], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(to_numpy(grads.input), to_numpy(plain_grads.input)[:4], atol=1e-6)
    np.testing.assert_allclose(2 * to_numpy(grads.weight), to_numpy(plain_grads.weight), rtol=1e-5)
    np.testing.assert_allclose(to_numpy(layer.running_var), to_numpy(plain.running_var), rtol=1e-6)


def test_the_residual_has_its_gradient(xp, device, rng):
    """ReLU makes it an array of its own, which each rank fills."""
    x, residual, dy = xp.asarray(rng.standard_normal((3, 4, 3, 5)).astype(np.float32))
    gradients = []
    for layer in (
        SyncBatchNorm(3, device=device, comm=Alone(), activation="relu"),
        BatchNorm1d(3, device=device, activation="relu"),
    ):
        gradients.append(layer.vjp(x, residual)[1](dy).residual)
    assert bits(gradients[0]) == bits(gradients[1])


def test_eval_mode_sends_nothing(xp, device):
    engine = Alone()
    for layer in (
        SyncBatchNorm(3, device=device, comm=engine),
        SyncBatchNorm(3, track_running_stats=False, device=device, comm=engine),
    ):
        _, vjp_fn = layer.eval().vjp(xp.ones((4, 3, 5)))
        vjp_fn(xp.ones((4, 3, 5)))
        for call in lambda: layer("no array"), lambda: layer.vjp("no array"), lambda: vjp_fn("no array"):  # noqa: B023
            with pytest.raises(TypeError, match="str"):
                call()
    assert engine.messages == []


@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_channels_send_nothing_on_the_way_back(xp, device, activation):
    engine = Alone()
    layer = SyncBatchNorm(0, device=device, comm=engine, activation=activation)
    x = xp.ones((4, 0))
    y, vjp_fn = layer.vjp(x, residual=x)  # with ReLU, the way back needs a record
    sent = len(engine.messages)
    assert vjp_fn.mean.shape == vjp_fn.var.shape == (0,)
    assert vjp_fn(y).input.shape == (4, 0)
    with pytest.raises(TypeError, match="grad_output"):
        vjp_fn("no array")
    assert len(engine.messages) == sent > 0


@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 3, 5)), (-1, (4, 5, 3))])
def test_a_rank_that_raises_on_the_way_back_sends_as_much_as_others(xp, device, axis, shape):
    engine = Alone()
    x = xp.ones(shape)
    _, vjp_fn = SyncBatchNorm(3, channel_axis=axis, device=device, comm=engine).vjp(x)
    engine.messages.clear()
    vjp_fn(x)
    with pytest.raises(TypeError, match="grad_output"):
        vjp_fn("no array")
    first, second, text = engine.messages
    assert first == second == ("sum", 6, 1)
    assert text[0] == "texts"


def test_layers_with_a_communicator_are_copied_without_it():
    class Uncopyable(Alone):
        def __deepcopy__(self, memo):
            raise TypeError("never copied")

        def __reduce__(self):
            raise TypeError("never pickled")

    layer = SyncBatchNorm(3, device="cpu", comm=Uncopyable())
    for duplicate in copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)):
        with pytest.raises(RuntimeError, match=r"has no communicator: set layer\.comm"):
            duplicate(np.ones((2, 3)))
        duplicate.eval()(np.ones((2, 3)))
        assert type(duplicate.to_batchnorm()) is BatchNorm1d
    alone = copy.deepcopy(SyncBatchNorm(3, device="cpu"))
    assert alone.comm is None


def test_launches_and_waits(rng):
    """A training pass on a GPU is merge, exchange, merge, and the usual steps; the host waits for messages alone."""
    cp = pytest.importorskip("cupy")
    if not hasattr(cp, "emulator"):
        pytest.skip("a GPU does not tell")
    layer = SyncBatchNorm(3, device="cuda:0", comm=Alone())
    x = cp.asarray(rng.standard_normal((4, 3, 5)).astype(np.float32))
    layer.vjp(x)[1](x)
    with cp.emulator.record_syncs() as syncs, cp.emulator.record() as launches:
        _, vjp_fn = layer.vjp(x)
        forward = len(launches)
        vjp_fn(x)
    names = [launch.name for launch in launches]
    assert names[:forward] == ["bn_stats", "merge_moments", "merge_moments", "bn_normalize", "bn_update_running"]
    assert names[forward:] == ["bn_backward_reduce", "merge_sums", "bn_backward_input"]
    assert syncs == []
    with cp.emulator.record() as launches:
        layer(x)
    assert launches[3].bytes_written == x.nbytes  # without a way back the output alone
