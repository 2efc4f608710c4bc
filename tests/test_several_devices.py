"""Devices that differ, in one process: what is known of one is not used for another."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._steps import plans
from cupybn._steps.bundles import Moments, Running
from cupybn._steps.geometry import Geometry
from cupybn._steps.launcher import SHARED, Kernel, kernel
from cupybn._steps.resident import Device
from tests.reference import to_numpy
from tests.steps import forget_plans

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
if emulator is None:
    pytest.skip("needs GPUs that differ", allow_module_level=True)

SMALL = replace(emulator.T4, multiprocessors=3)
DEVICES = {"large, small": (emulator.H200, SMALL), "small, large": (SMALL, emulator.H200)}


pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def devices(request):
    with emulator.pretend(*request.param):
        yield request.param


def both_ways(x, device):
    """Output and gradients of a copy on a device, and the launches that they took."""
    with cp.cuda.Device(device), emulator.record() as launches:
        on_device = cp.asarray(x)
        y, vjp_fn = F.batch_norm_vjp(on_device, None, None, training=True)
        grads = vjp_fn(on_device)
    return [to_numpy(a) for a in (y, grads.input)], launches


@pytest.mark.parametrize(
    ("shape", "large", "small"),
    [
        ((5, 2, 4000), "on chip", "streamed"),  # 80 kB in a channel, which the small device has no room for
        ((5, 2, 1500), "on chip", "on chip"),
        ((5000, 32, 1), "streamed", "streamed"),
        ((100, 32, 1), "on chip", "on chip"),
    ],
    ids=str,
)
def test_each_device_is_asked_for_what_it_has(rng, devices, plays, shape, large, small):
    """Devices take turns: nothing is kept of one for the other. The stand-in refuses what a device cannot do."""
    x = rng.standard_normal(shape).astype(np.float32)
    y, vjp_fn = F.batch_norm_vjp(x, None, None, training=True)
    expected = y, vjp_fn(x).input
    names = {"on chip": ["bn_forward", "bn_backward"]}
    names["streamed"] = ["bn_stats", "bn_normalize", "bn_backward_reduce", "bn_backward_input"]
    for device in 0, 1, 0, 1:
        results, launches = both_ways(x, device)
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        is_large = devices[device] is emulator.H200
        assert [launch.name for launch in launches] == names[large if is_large else small]
        assert {launch.device for launch in launches} == {device}
        assert is_large or all(launch.cluster == 1 for launch in launches)
        assert all(launch.shared_mem <= devices[device].shared_memory_per_block_optin for launch in launches)
    assert len(plays) == 4  # there and back, the second time on each device


def test_clusters_from_the_first_generation_that_has_them(rng):
    x = rng.standard_normal((5, 2, 4000)).astype(np.float32)
    for capability in ("75", "80", "86", "89", "90", "100", "103", "120", "121"):
        with emulator.pretend(replace(emulator.H200, compute_capability=capability)):
            forget_plans()
            _, launches = both_ways(x, 0)
            assert {launch.cluster > 1 for launch in launches} == {int(capability) >= 90}, capability


def test_large_grids_on_large_devices_alone(devices):
    """Elementwise steps have larger grids on a large device; sums have the same on all."""
    grids, elementwise = {}, ("bn_normalize", "bn_backward_input", "bn_double_backward_input")
    for device, properties in enumerate(devices):
        with cp.cuda.Device(device):
            x = cp.empty((4, 1, 1_000_000), np.float32)
        for step in *elementwise, *plans.SUMS:
            grids[step, properties is SMALL] = np.prod(plans.choose(step, x).geometry.grid)
    for step in elementwise:
        assert grids[step, False] > 2 * grids[step, True]
    for step in plans.SUMS:
        assert grids[step, False] == grids[step, True]


def test_what_is_known_of_a_device():
    properties = replace(
        SMALL,
        shared_memory_per_block=7 << 10,
        shared_memory_per_block_optin=8 << 10,
        shared_memory_per_multiprocessor=9 << 10,
    )
    with emulator.pretend(emulator.H200, properties):
        assert plans.properties_of(0) == Device(132, 227 << 10, 228 << 10, clusters=True)
        assert plans.properties_of(1) == Device(3, 8 << 10, 9 << 10, clusters=False)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays on another device


def on_device(device, *shapes, dtype=np.float32):
    with cp.cuda.Device(device):
        return [cp.ones(shape, dtype) for shape in shapes]


@pytest.mark.usefixtures("devices")
def test_a_load_that_fails_is_undone_where_the_arrays_are(rng, monkeypatch):
    layer, write, devices = cupybn.BatchNorm1d(3, device="cuda:1"), cp.ndarray.__setitem__, []
    refusing, before = [layer.running_var], [to_numpy(array) for array in layer.state_dict().values()]

    def setitem(array, key, value):
        devices.append((cp.cuda.Device().id, array.device.id))
        write(array, key, value)
        if refusing and array is refusing[0]:
            refusing.clear()
            raise MemoryError

    monkeypatch.setattr(cp.ndarray, "__setitem__", setitem)
    names = "weight", "bias", "running_mean", "running_var"
    with pytest.raises(MemoryError):
        layer.load_state_dict(dict(zip(names, rng.uniform(2, 3, (4, 3)), strict=True)))
    monkeypatch.undo()
    assert set(devices) == {(1, 1)}  # the current one, and that of the array
    for array, then in zip(layer.state_dict().values(), before, strict=True):
        np.testing.assert_array_equal(to_numpy(array), then)


@pytest.mark.usefixtures("devices")
def test_statistics_and_folded_weights_are_where_the_arrays_are(rng):
    """Results are on the device of what was given, also where that is not the current one."""
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 5), (3, 2, 4)))
    results = []
    for device in "cuda:1", "cpu":
        layer = cupybn.BatchNorm1d(3, device=device)
        with cp.cuda.Device(1):
            given = [array if device == "cpu" else cp.asarray(array) for array in (x, weight)]
        _, vjp_fn = layer.vjp(given[0])
        statistics = vjp_fn.mean, vjp_fn.var
        grads = F.batch_norm_backward(given[0], given[0], *statistics, layer.weight, layer.bias)
        folded = cupybn.fold_conv_bn(given[1], layer.bias, layer)
        results.append([*statistics, *grads[:3], *folded])
    assert {array.device.id for array in results[0]} == {1}
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(to_numpy(ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "name", ["running_mean", "running_var", "weight", "bias", "residual", "out", "num_batches_tracked", "grad_output"]
)
def test_one_array_elsewhere_after_good_calls(name, plays):
    names = ["running_mean", "running_var", "weight", "bias"]
    x, residual, out, *vectors = on_device(0, (4, 3, 5), (4, 3, 5), (4, 3, 5), 3, 3, 3, 3)
    arrays = dict(zip(names, vectors, strict=True)) | {"residual": residual, "out": out}
    layer = cupybn.BatchNorm1d(3, device="cuda:0")
    for _ in range(2):
        layer(x)
        F.batch_norm(x, **arrays, training=True)
        _, vjp_fn = F.batch_norm_vjp(x, None, None, training=True)
        vjp_fn(x)
    assert len(plays) == 4
    before = [to_numpy(a).copy() for a in (*arrays.values(), *layer.state_dict().values())]
    dtype = np.int64 if name == "num_batches_tracked" else np.float32
    shape = 3 if name in names else () if name == "num_batches_tracked" else (4, 3, 5)
    (elsewhere,) = on_device(1, shape, dtype=dtype)
    calls = {"grad_output": lambda: vjp_fn(elsewhere), "num_batches_tracked": lambda: layer(x)}
    call = calls.get(name, lambda: F.batch_norm(x, **arrays | {name: elsewhere}, training=True))
    if name == "num_batches_tracked":
        layer.num_batches_tracked = elsewhere
    with emulator.record() as launches, pytest.raises(TypeError, match=r"cuda:1|num_batches_tracked"):
        call()
    assert launches == []
    if name != "num_batches_tracked":
        after = [to_numpy(a) for a in (*arrays.values(), *layer.state_dict().values())]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("bundle", "field"), [("moments", "mean"), ("running", "mean"), ("running", "batches")])
def test_kernels_look_at_each_launch(bundle, field):
    """Arrays and vectors alike are looked at, whatever a kernel has been launched with before."""
    update = kernel("bn_update_running", **plans.macros_of(np.dtype(np.float64), 1, 32, Geometry((1,))))
    count, means, m2, mean, var = on_device(0, (1,), (1, 3), (1, 3), 3, 3, dtype=np.float64)
    (counter,) = on_device(0, (), dtype=np.int64)
    moments, running = Moments(count, means, m2), Running(mean, var, 0.1, counter)
    arguments = {"moments": moments, "running": running, "statistics": None, "count": 0.0, "C": 3}
    update.launch((1,), 256, arguments)
    array = getattr(arguments[bundle], field)
    (elsewhere,) = on_device(1, array.shape, dtype=array.dtype)
    spoilt = arguments | {bundle: arguments[bundle]._replace(**{field: elsewhere})}
    with emulator.record() as launches:
        with pytest.raises(ValueError, match=rf"bn_update_running: expected {bundle}.{field} on device 0 \(got 1\)"):
            update.launch((1,), 256, spoilt)
        with cp.cuda.Device(1), pytest.raises(ValueError, match=r"on device 1 \(got 0\)"):
            update.launch((1,), 256, arguments)
    assert launches == []


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_layers_stay_on_their_device(duplicate):
    """CuPy unpickles arrays on the device that is current."""
    layer = duplicate(cupybn.BatchNorm1d(3, device="cuda:1"))
    assert layer.device == "cuda:1"
    assert {array.device.id for array in layer.state_dict().values()} == {1}


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic shared memory


class Raw:
    """CuPy's kernel, as far as it has to do with shared memory: a limit for each device, and launches within it."""

    def __init__(self):
        self.limits, self.asked = {}, []
        self.before_setting = lambda: None

    @property
    def max_dynamic_shared_size_bytes(self):
        raise AssertionError("CuPy would compile for that")

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        device = cp.cuda.runtime.getDevice()
        self.before_setting()
        self.asked.append((device, size))
        self.limits[device] = size

    def __call__(self, _grid, _block, _values, *, shared_mem):
        most = self.limits.get(cp.cuda.runtime.getDevice(), SHARED)
        assert shared_mem <= most, f"{shared_mem} bytes asked for where there are {most}"


@pytest.fixture
def asking(devices):  # noqa: ARG001
    """A kernel without arguments to speak of, and a function that launches it with so much shared memory."""
    made = Kernel("bn_update_running", plans.macros_of(np.dtype(np.float64), 1, 32, Geometry((1,))))
    nothing = SimpleNamespace(listed=lambda _: [], packed=lambda *_: bytes(8), ranges=[(0, 1)])
    made.raw, made.arguments = Raw(), nothing

    def launch(size, device=0):
        with cp.cuda.Device(device):
            made.launch((1,), 32, {}, size)

    return made.raw, launch


def test_the_limit_goes_up_alone_on_each_device(asking):
    raw, launch = asking
    for size in 0, SHARED, 40_000, 40_000, 100, 90_000, 60_000:
        launch(size)
    launch(60_000, 1)
    launch(50_000, 1)
    launch(90_000)
    assert raw.asked == [(0, 40_000), (0, 90_000), (1, 60_000)]


def test_a_limit_that_was_refused_is_asked_for_again(asking):
    raw, launch = asking

    def refuse():
        raise RuntimeError("no")

    raw.before_setting = refuse
    with pytest.raises(RuntimeError):
        launch(90_000)
    raw.before_setting = lambda: None
    launch(50_000)
    launch(90_000)
    assert raw.asked == [(0, 50_000), (0, 90_000)]


@pytest.mark.parametrize("sizes", [(40_000, 90_000), (90_000, 40_000)], ids=str)
def test_two_threads_that_ask_at_once(asking, sizes):
    """One thread is about to set its limit when the other one finds that it needs another limit."""
    raw, launch = asking
    inside, other = threading.Event(), threading.Event()

    def before_setting():
        if not inside.is_set():
            inside.set()
            other.wait(0.2)  # if that can go on meanwhile

    raw.before_setting = before_setting
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(launch, sizes[0])
        assert inside.wait(10)
        second = pool.submit(lambda: (launch(sizes[1]), other.set()))
        first.result()
        second.result()
    assert raw.limits == {0: 90_000}
    launch(90_000)


def test_eight_threads_up_and_down(asking):
    raw, launch = asking
    start = threading.Barrier(8)

    def work(seed):
        draw = random.Random(seed)
        start.wait()
        for _ in range(200):
            launch(draw.randrange(100_000), draw.randrange(2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for device in 0, 1:
        sizes = [size for d, size in raw.asked if d == device]
        assert sizes == sorted(set(sizes))
        assert raw.limits[device] == sizes[-1]


def test_eight_threads_through_the_library(rng):
    """Threads take channels of 4 to 200 kB on one device; the stand-in refuses a launch beyond the limit."""
    xs = [rng.standard_normal((2, 2, size)).astype(np.float32) for size in (500, 25_000, 3000, 12_000, 20_000, 8000)]
    expected = [F.batch_norm(x, None, None, training=True) for x in xs]
    with emulator.pretend(replace(emulator.H200, compute_capability="80")):
        copies = [cp.asarray(x) for x in xs]

        def work(seed):
            order = random.Random(seed).sample(range(len(xs)), len(xs))
            return [(i, to_numpy(F.batch_norm(copies[i], None, None, training=True))) for i in order]

        with ThreadPoolExecutor(8) as pool:
            for results in pool.map(work, range(8)):
                for i, y in results:
                    np.testing.assert_allclose(y, expected[i], atol=1e-5)
