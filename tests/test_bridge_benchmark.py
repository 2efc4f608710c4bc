"""`benchmarks/torch_bridge.py` and its stage of `first_contact.py`: they run, and see what is wrong, without a GPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
import itertools
import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from tests.benchmark_scripts import require

pytest.importorskip("ml_dtypes")
pytest.importorskip("tqdm")
torch = pytest.importorskip("torch")
cp = pytest.importorskip("cupy")

require()

import chain  # noqa: E402
import gpu_exact  # noqa: E402
import gpu_second_order  # noqa: E402
import torch_bridge  # noqa: E402
import torch_measure  # noqa: E402
import torch_report  # noqa: E402
from contact.log import Log  # noqa: E402
from contact.stages import bridge, bridge_checks  # noqa: E402
from contact.task import Task  # noqa: E402
from torch.autograd.gradcheck import GradcheckError  # noqa: E402
from torch_measure import CONVERTED, FUSED, PYTORCH, SHORT, Case, LayerCase  # noqa: E402
from torch_resnet import ResNet, Size  # noqa: E402

import cupybn.torch  # noqa: E402
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE  # noqa: E402
from cupybn._cli.problem import make_arrays  # noqa: E402

EMULATED = hasattr(cp, "emulator")
HAS_GPU = torch.cuda.is_available()
ONE = SHORT._replace(cases=(Case("NCHW", "float32"),), layers=(LayerCase((2, 3, 4, 4)),))
SPREAD = {"median": 2.0, "low": 1.5, "high": 2.5, "least": 1.0}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Threads of PyTorch wait for each other on a busy machine."""
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.mark.skipif(HAS_GPU, reason="is about what is said without a GPU")
def test_short(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["torch_bridge.py", "--short", "--output", str(tmp_path)])
    assert torch_bridge.main() == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "torch-bridge-short.json").read_text())
    assert (tmp_path / "torch-bridge-short.png").stat().st_size > 0
    records = report["records"]
    steps = [(r["case"], r["side"]) for r in records if r["what"] == "step"]
    assert steps == [(case.name, side) for case in SHORT.cases for side in (PYTORCH, CONVERTED, FUSED)]
    layers = {(r["case"], r["operation"], r["side"]) for r in records if r["what"] == "layer"}
    operations = [(case, "forward + backward") for case in SHORT.layers] + [(SHORT.layers[0], "second order")]
    assert layers == {(case.name, operation, side) for case, operation in operations for side in (PYTORCH, CONVERTED)}
    assert {record["what"] for record in records} == {"step", "layer"}
    for record in records:
        assert record["right"], record
        assert record["ratio"]["low"] > 0
        assert not {"us", "peak_bytes", "launches"} & record.keys()
    heads = {word for line in printed.splitlines() if line.startswith("case ") for word in line.split()}
    assert {"ratio", "loss", "results"} <= heads
    assert not {"us", "ms", "GB", "launches"} & heads
    assert "CPU, one thread" in printed
    rows = [line for line in printed.splitlines() if line.startswith("N")]
    assert len(rows) == 2 * len(SHORT.cases) + len(operations)
    assert not any(PYTORCH in row for row in rows)


@pytest.mark.parametrize("minutes", ["0", "9"])
def test_exit_status(tmp_path, monkeypatch, capsys, minutes):
    """A job that fails is told by the exit status, and one that there is no time for by a line."""
    pytest.importorskip("matplotlib")
    fails = torch_measure.Job("a job", lambda: iter(range(1 // 0)))
    monkeypatch.setattr(torch_measure, "jobs", lambda *_: [fails])
    arguments = ["--short", "--minutes", minutes, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["torch_bridge.py", *arguments])
    in_time = minutes != "0"
    assert torch_bridge.main() == (1 if in_time else 0)
    said = "FAILED: a job: ZeroDivisionError: " if in_time else "a job: not measured, the time was over"
    assert said in capsys.readouterr().out
    assert (tmp_path / "torch-bridge-short.json").exists()


def test_without_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torch_bridge.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"^2$"):
        torch_bridge.main()
    assert "PyTorch is missing" in capsys.readouterr().err


def test_the_network_is_resnet50():
    """ResNet-50 has so many parameters, and batch norms over the planes that `chain.py` lists."""
    with torch.device("meta"):
        network = ResNet(Size())
        planes = []
        for layer in batch_norms(network):
            layer.register_forward_hook(lambda _, args, __: planes.append(tuple(args[0].shape[1:3])))
        logits = network(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == 25_557_032
    assert logits.shape == (2, 1000)
    assert collections.Counter(planes) == collections.Counter(chain.resnet50(224))


def test_sides_share_weights_and_nothing_else():
    sides = torch_measure.networks(ONE)
    states = [side.state_dict() for side in sides.values()]
    assert list(states[0]) == list(states[1]) == list(states[2])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert torch.equal(value, states[2][name])
        assert len({state[name].data_ptr() for state in states}) == 3
    classes = [{type(layer) for layer in batch_norms(side)} for side in sides.values()]
    assert classes == [{torch.nn.BatchNorm2d}, {cupybn.torch.BatchNorm2d}, {cupybn.torch.BatchNorm2d}]
    rectify = [sum(m.activation == "relu" for m in batch_norms(side)) for side in list(sides.values())[1:]]
    shortcuts = len(ONE.network.blocks)
    assert rectify == [0, len(batch_norms(sides[FUSED])) - shortcuts]


def spoil(monkeypatch):
    """Let converted layers have another eps."""
    right = cupybn.torch.convert

    def wrong(model):
        model = right(model)
        for layer in batch_norms(model):
            layer.eps = 0.5
        return model

    monkeypatch.setattr(cupybn.torch, "convert", wrong)


def test_results_that_differ_are_seen(monkeypatch):
    spoil(monkeypatch)
    step, layer = torch_measure.jobs(ONE, "cpu")
    records = [*torch_measure.done(step), *torch_measure.done(layer)]
    assert {(r["side"], r["right"]) for r in records} == {(PYTORCH, True), (CONVERTED, False), (FUSED, True)}
    lines = torch_measure.wrong(records)
    assert [line.partition(": ")[0] for line in lines] == ["WRONG"] * 3
    assert f"NCHW float32, step, {CONVERTED}: loss_off " in lines[0]
    assert f"NCHW 2x3x4x4 float32, second order, {CONVERTED}: results_off " in lines[2]


def test_a_job_that_fails_is_told_and_the_others_are_done():
    def records():
        yield {"what": "step"}
        raise MemoryError("much")

    found = torch_measure.done(torch_measure.Job("NCHW", records))
    assert found == [{"what": "step"}, {"what": "failed", "case": "NCHW", "error": "MemoryError: much"}]
    assert torch_measure.wrong(found) == ["FAILED: NCHW: MemoryError: much"]
    report = {"records": found[1:], "settings": {"batch": 1, "image": 2}, "notes": ["n"], "wrong": ["w"]}
    assert torch_report.text(report) == "n\nw"


def test_not_a_number_is_no_small_difference():
    one, other = [torch.ones(2)], [torch.tensor([1.0, float("nan")])]
    assert torch_measure.results_off(other, one) == float("inf")
    assert torch_measure.results_off(one, one) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Turns


class Clock:
    """A clock in whose place calls say what they take, and are taken down."""

    on_gpu = False

    def __init__(self):
        self.log = ""

    def microseconds(self, call, calls):
        self.log += call.name * calls + " "
        return call.us


def test_sides_take_turns():
    """Every other round goes backwards; each turn has as many calls as take its time, and one at least."""
    sides = {name: SimpleNamespace(name=name, us=us) for name, us in (("a", 100.0), ("b", 300.0))}
    clock = Clock()
    times = torch_measure.take_turns(clock, sides, 3, 3e-4)
    assert clock.log == "a b " + "aaa b " + "b aaa " + "aaa b "
    assert times == {"a": [100.0] * 3, "b": [300.0] * 3}
    assert torch_measure.calls_of_a_turn(clock, sides["a"], 0.0) == 1
    times = torch_measure.take_turns(Clock(), sides, 9, 0.0, left=lambda: 0.0)
    assert {name: len(of) for name, of in times.items()} == {"a": 2, "b": 2}


def test_ratios_are_the_right_way_round():
    times = {PYTORCH: [6.0, 8.0], CONVERTED: [2.0, 4.0]}
    clock = torch_measure.Clock("cpu")
    assert torch_measure.figures(clock, times, CONVERTED) == {
        "ratio": {"median": 2.5, "low": 2.25, "high": 2.75, "least": 2.0},
        "rounds": 2,
    }
    clock.on_gpu = True
    assert torch_measure.figures(clock, times, CONVERTED)["us"]["median"] == 3


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_turn_leaves_out_its_first_call(monkeypatch, on_gpu):
    now, calls = 0.0, 0

    def call():
        nonlocal now, calls
        calls += 1
        now += 0.003 if calls > 1 else 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now

        synchronize = record

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch_measure.time, "process_time", lambda: now)
    clock = torch_measure.Clock("cuda" if on_gpu else "cpu")
    assert clock.microseconds(call, 4) == pytest.approx(3000)
    assert calls == 5


def test_memory_of_a_step_is_what_it_takes_beside_what_is_there(monkeypatch):
    held = {"now": 700, "most": 5000}

    def step():
        held["most"] = max(held["most"], held["now"] + 300)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    assert torch_measure.peak_bytes(step) == 300


def test_a_step_leaves_no_gradients():
    step = torch_measure.Step(ResNet(SHORT.network), SHORT.cases[0], SHORT, "cpu")
    before = [p.detach().clone() for p in step.network.parameters()]
    loss, gradients = step.first()
    assert loss > 0
    assert float(gradients.norm()) > 0
    assert all(p.grad is None for p in step.network.parameters())
    assert all(map(torch.equal, before, step.network.parameters()))
    step()
    assert all(p.grad is None for p in step.network.parameters())
    assert not any(map(torch.equal, before, step.network.parameters()))


@pytest.mark.parametrize("case", torch_measure.CASES, ids=lambda case: case.name)
def test_norms_see_the_dtype_and_the_memory_format_of_the_case(case):
    for network in torch_measure.networks(ONE).values():
        step = torch_measure.Step(network, case, ONE, "cpu")
        seen = []
        network.bn1.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        step.first()
        assert seen[0].dtype == getattr(torch, case.dtype)
        assert seen[0].is_contiguous(memory_format=torch_measure.memory_format(case.layout))
        assert not seen[0].is_contiguous() or case.layout == "NCHW"


# ---------------------------------------------------------------------------------------------------------------------
# What is reported of a GPU


def test_report_of_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {"what": what, "case": "NCHW float32", "side": side, "ratio": SPREAD, "us": SPREAD, **more}
        for side in (PYTORCH, CONVERTED, FUSED)
        for what, more in (
            ("step", {"peak_bytes": 5_250_000_000, "loss_off": 1.25e-6, "gradients_off": 0.0}),
            ("layer", {"operation": "second order", "results_off": 0.0}),
        )
    ]
    records += [
        {"what": "host", "case": "tiny", "operation": "forward + backward", "side": PYTORCH, "us": SPREAD},
        {"what": "launches", "case": "NCHW float32", "side": PYTORCH, "launches": 161},
    ]
    machine = {"device": "a GPU", "PyTorch": "2"}
    settings = {"batch": 64, "image": 224}
    report = {"device": "cuda", "short": False, "machine": machine, "settings": settings, "records": records}
    report |= {"notes": [], "wrong": []}
    cells = torch_report.cells(records[2])
    assert cells["ms"] == "0.0 (0.0..0.0)"
    assert cells["ratio (quartiles)"] == "2.00 (1.50..2.50)"
    assert (cells["peak GB"], cells["loss off"]) == ("5.25", "1e-06")
    assert "ratio (quartiles)" not in torch_report.cells(records[0])
    text = torch_report.text(report)
    assert "A training step, batch 64, images 224 x 224" in text
    assert "tiny  forward + backward  PyTorch  2.0 (1.5..2.5)" in text
    assert "NCHW float32  PyTorch       161" in text
    said = torch_report.write(report, tmp_path)
    assert [line.rpartition("/")[2] for line in said] == ["torch-bridge.json", "torch-bridge.png"]
    assert (tmp_path / "torch-bridge.png").stat().st_size > 0


def test_what_is_measured_on_a_gpu_alone():
    names = [[job.name for job in torch_measure.jobs(ONE, device)] for device in ("cpu", "cuda")]
    assert names[0] == ["step, NCHW float32", "NCHW 2x3x4x4 float32"]
    assert names[1] == [*names[0], "host", "launches"]


# ---------------------------------------------------------------------------------------------------------------------
# Second order on CuPy arrays

SHAPES = [
    gpu_second_order.Shape(layout, sizes, dtype)
    for layout, sizes in (("NCHW", (4, 3, 5, 6)), ("NHWC", (4, 5, 6, 3)), ("NC", (40, 3)))
    for dtype in ("float32", "float64")
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_pytorch_computes_the_same(shape):
    """Gradients of second order of PyTorch's are right by the formula, and each of them is looked at."""
    problem = shape.problem
    (arrays,) = make_arrays(problem, np)
    ddy, dx, dweight = gpu_second_order.torch_call(torch, problem, arrays)()
    ddy, dx = (np.ascontiguousarray(t.movedim(1, problem.channel_axis).numpy()) for t in (ddy, dx))
    dweight = dweight.numpy()
    found = ddy, (dx, dweight, None, None)
    assert gpu_exact.second_order(np, problem, arrays, found).over_allowed < 1
    for array in ddy, dx, dweight:
        kept = array.flat[-1].copy()
        array.flat[-1] += 1e-3 * np.abs(array).max()
        assert gpu_exact.second_order(np, problem, arrays, found).over_allowed > 1
        array.flat[-1] = np.nan
        assert gpu_exact.second_order(np, problem, arrays, found).over_allowed == np.inf
        array.flat[-1] = kept


@pytest.mark.parametrize("shape", gpu_second_order.TINY, ids=lambda shape: shape.name)
def test_second_order_is_measured(shape):
    record = gpu_second_order.record(shape, AS_LITTLE_AS_POSSIBLE)
    assert record["error_over_allowed"] <= 1
    assert 0 < record["us"]["low"] <= record["us"]["median"]
    assert record["share_of_copy"] == pytest.approx(record["copy_us"]["median"] / record["us"]["median"])
    assert ("torch_us" in record) == HAS_GPU


def test_the_copy_moves_as_many_bytes_as_the_kernels(monkeypatch):
    """Three reads for the sums, three reads and two writes for the gradients."""
    seen = []
    right = gpu_second_order.copy_time
    monkeypatch.setattr(
        gpu_second_order, "copy_time", lambda nbytes, *rest: seen.append(nbytes) or right(nbytes, *rest)
    )
    shape = gpu_second_order.TINY[0]
    gpu_second_order.record(shape, AS_LITTLE_AS_POSSIBLE)
    assert seen == [8 * shape.problem.nbytes]


# ---------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture
def task(tmp_path):
    return Task(Log(tmp_path / "findings"), tmp_path, 100, rehearse=True)


def failed(task):
    return [name for name, passed, _ in task.log.findings.checks if not passed]


def test_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(bridge_checks, "run", lambda *_: None)
    task = Task(Log(None), tmp_path, 0, rehearse=True)
    bridge.run(task)
    left_out = [line for line in task.log.findings.skipped if line.endswith("left out for lack of time")]
    assert len(left_out) == len(bridge.TINY) + len(torch_measure.jobs(SHORT, "cpu"))
    assert failed(task) == ["something was measured"]
    monkeypatch.setattr(bridge, "models", lambda _, __, records: records.append({"error": "out of memory"}))
    bridge.run(task)
    assert failed(task) == ["something was measured"] * 2


@pytest.mark.parametrize("missing", ["torch", "GPU"])
def test_without_what_it_is_about(task, monkeypatch, missing):
    """Gradients of second order are left where PyTorch or its GPU is missing, and a line says why the rest is not."""
    task.rehearse = False
    fake = None if missing == "torch" else SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(bridge, "optional", lambda _: fake)
    seen = []
    monkeypatch.setattr(bridge, "compile_kernels", lambda _, shapes, __: seen.append(shapes))
    monkeypatch.setattr(bridge, "second_order", lambda _: [{"what": "second order"}])
    monkeypatch.setattr(bridge, "models", None)
    bridge.run(task)
    assert task.log.findings.skipped == ["no torch" if missing == "torch" else "no torch that finds a GPU"]
    assert seen == [bridge.SHAPES]
    assert failed(task) == []


def test_all_that_is_measured_is_compiled_first():
    """A shape for each batch norm of the network, in each layout and dtype, and those that are measured alone."""
    found = set(bridge.shapes(False, "cuda"))
    plan = torch_measure.FULL
    assert {("NHWC", (64, 112, 112, 64), "bfloat16"), ("NCHW", (64, 2048, 7, 7), "float32")} <= found
    assert {("NHWC", (32, 56, 56, 256), "bfloat16"), ("NCHW", plan.tiny.shape, "float32")} <= found
    assert set(bridge.SHAPES) <= found
    assert sum(shape.sizes[0] == plan.batch for shape in found) == 4 * 12


@pytest.mark.skipif(not EMULATED, reason="spoils what a GPU computes")
def test_the_stage_sees_what_is_wrong(task, monkeypatch):
    """A wrong result of each part is a failed check, and the rest is reported."""
    right = gpu_second_order.cupybn_call

    def wrong(problem, arrays):
        def call():
            ddy, gradients = right(problem, arrays)()
            gradients.weight[:1] *= 2
            return ddy, gradients

        return call

    monkeypatch.setattr(gpu_second_order, "cupybn_call", wrong)
    monkeypatch.setattr(bridge, "TINY", bridge.TINY[:1])
    monkeypatch.setattr(torch_measure, "SHORT", ONE)
    spoil(monkeypatch)
    begun = []
    monkeypatch.setattr(bridge, "compile_kernels", lambda _, shapes, use: begun.append(use(shapes)))
    monkeypatch.setattr(bridge_checks, "run", lambda _, device: begun.append(device))
    bridge.run(task)
    assert begun == [[], "cpu"]
    name = f"second order, {bridge.TINY[0].name}"
    assert failed(task) == [f"{name} is right", "step, NCHW float32", *["NCHW 2x3x4x4 float32"] * 2]
    lines = task.log.findings.highlights
    us = json.loads((task.out / bridge.FILE).read_text())[0]["us"]["median"]
    assert task.log.findings.table[0]["us"] == round(us, 1)
    assert lines[0].startswith(f"{name}: {round(us, 1)} us, ")
    assert lines[1].startswith("step, NCHW float32: PyTorch x1.00; converted x")
    assert len(lines) == 2
    assert [row["side"] for row in task.log.findings.table[1:]] == [
        PYTORCH,
        CONVERTED,
        FUSED,
        *[PYTORCH, CONVERTED] * 2,
    ]
    kept = json.loads((task.out / bridge.FILE).read_text())
    assert collections.Counter(record["what"] for record in kept) == {"second order": 1, "step": 3, "layer": 4}


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is doubled."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, dy):
        return 2 * dy


def test_checks_of_the_bridge_pass(task):
    bridge_checks.run(task, "cpu")
    assert failed(task) == []
    assert len(task.log.findings.checks) == 4 + 1 + 4 + 3
    assert task.log.findings.skipped == ["memory and streams of PyTorch: no GPU"]


def test_checks_see_wrong_gradients(monkeypatch):
    right = cupybn.torch.batch_norm
    monkeypatch.setattr(
        cupybn.torch, "batch_norm", lambda x, *args, **options: right(Doubled.apply(x), *args, **options)
    )
    with pytest.raises(GradcheckError):
        bridge_checks.gradients("cpu", training=True, fused=False)


def test_checks_see_copied_buffers(monkeypatch):
    right = cupybn.torch.convert
    monkeypatch.setattr(cupybn.torch, "convert", lambda model: right(model).double().float())
    with pytest.raises(AssertionError, match=r"became|float"):
        bridge_checks.addresses("cpu")


@pytest.mark.parametrize("wrong", ["value", "strides"])
def test_checks_see_results_that_differ(monkeypatch, wrong):
    right, calls = cupybn.torch.BatchNorm2d.forward, iter(range(9))

    def forward(layer, input, residual=None):
        y = right(layer, input, residual)
        if next(calls) > 0:
            return y
        return 1.001 * y if wrong == "value" else y.contiguous(memory_format=torch.contiguous_format)

    monkeypatch.setattr(cupybn.torch.BatchNorm2d, "forward", forward)
    with pytest.raises(AssertionError, match="off by" if wrong == "value" else "strides"):
        bridge_checks.as_on_the_cpu("cpu", (3, 4, 5, 5), "NHWC", "float32")


def test_checks_see_strides_at_the_edges(monkeypatch):
    right, calls = cupybn.torch.BatchNorm2d.forward, iter(range(99))

    def forward(layer, input, residual=None):
        y = right(layer, input, residual)
        return y if next(calls) % 2 else y.as_strided(y.shape, [max(1, stride) for stride in y.stride()][::-1])

    monkeypatch.setattr(cupybn.torch.BatchNorm2d, "forward", forward)
    with pytest.raises(AssertionError, match="strides"):
        bridge_checks.edges("cpu")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("wrong", ["error", "value"])
def test_checks_see_what_threads_do(monkeypatch, wrong):
    right = cupybn.torch.BatchNorm2d.forward

    def forward(layer, input, residual=None):
        if threading.current_thread() is threading.main_thread():
            return right(layer, input, residual)
        if wrong == "error":
            raise RuntimeError("invalid device context")
        return right(layer, input, residual) * (1 + 2**-20)

    monkeypatch.setattr(cupybn.torch.BatchNorm2d, "forward", forward)
    with pytest.raises(AssertionError, match="an error in the thread" if wrong == "error" else "equal"):
        bridge_checks.new_thread("cpu", (3, 4, 5, 5))


def test_checks_see_what_comes_back_from_elsewhere(monkeypatch):
    calls = itertools.count()

    def add_once(tensor):
        return tensor * (1 + 2**-10) if next(calls) == 0 else tensor

    hooks = functools.partial(torch.autograd.graph.saved_tensors_hooks, lambda tensor: tensor.clone(), add_once)
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", hooks)
    with pytest.raises(AssertionError, match="equal"):
        bridge_checks.saved_elsewhere("cpu", (3, 4, 5, 5))
