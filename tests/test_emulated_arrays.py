"""The arrays, devices and streams of the stand-in for CuPy."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cupybn._arrays import devices, kinds
from cupybn._calls.layout import Layout

if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("this is the real CuPy", allow_module_level=True)

from cupy import _memory, emulator  # noqa: E402
from cupy._ndarray import byte_range  # noqa: E402

ml_dtypes = pytest.importorskip("ml_dtypes")
Uninitialised = emulator.UninitialisedMemoryError
CUDARuntimeError = cupy.cuda.runtime.CUDARuntimeError


@pytest.fixture
def two_devices():
    with emulator.pretend(emulator.H200, emulator.T4):
        yield
        cupy.cuda.Device(0).use()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64])
def test_new_memory_is_poison(dtype):
    assert np.isnan(cupy.empty((3, 5), dtype)._host).all()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.get(),
        lambda x: x + 1,
        lambda x: x.sum(),
        lambda x: x.copy(),
        lambda x: cupy.exp(x),
        lambda x: cupy.zeros((2, 3)).__setitem__(..., x),
        lambda x: x.T.reshape(-1),
        lambda x: x[[0]],
        lambda x: cupy.concatenate([x, x]),
        lambda x: x.__iadd__(1),
        lambda x: cupy.where(x, 1, 2),
        lambda x: pickle.dumps(x),
    ],
)
def test_elements_that_nobody_wrote_are_not_read(read):
    with pytest.raises(Uninitialised, match=r"of 6|of 3"):
        read(cupy.empty((2, 3)))
    read(cupy.ones((2, 3)))


def test_writes_count_element_by_element():
    x = cupy.empty((4, 6), np.float32)
    x[1:3, ::2] = 1
    assert (x[1:3, ::2].get() == 1).all()
    y = cupy.empty(4)
    y[1:3] = 1
    with pytest.raises(Uninitialised, match="2 of 4"):
        y.get()
    with pytest.raises(Uninitialised, match="18 of 24 elements that were read of a float32"):
        x.get()
    with pytest.raises(Uninitialised, match="1 of 2"):
        x[1, :2].get()
    x[:, 1::2] = 2
    x[cupy.array([0, 3])] = 3
    np.testing.assert_array_equal(x.get(), [[3] * 6, [1, 2] * 3, [1, 2] * 3, [3] * 6])


def test_advanced_indices_read_and_write_what_they_name():
    x = cupy.empty(5)
    x[cupy.array([4, 0])] = cupy.array([1.0, 2.0])
    np.testing.assert_array_equal(x[[0, 4]].get(), [2, 1])
    with pytest.raises(Uninitialised, match="1 of 2"):
        x[[0, 1]]
    x[cupy.array([False, True, True, True, False])] = 7
    np.testing.assert_array_equal(x.get(), [2, 7, 7, 7, 1])


def test_outputs_are_written_where_their_mask_is():
    out = cupy.empty(3)
    cupy.copyto(out, 2, where=cupy.array([True, False, True]))
    np.testing.assert_array_equal(out[::2].get(), [2, 2])
    with pytest.raises(Uninitialised, match="1 of 3"):
        out.get()


def test_what_universal_functions_have_in_cupy():
    x = cupy.ones(3)
    for keyword in ({"where": True}, {"order": "K"}, {"subok": True}):
        with pytest.raises(TypeError, match="Wrong arguments"):
            cupy.exp(x, **keyword)
    assert cupy.add(x, 1, dtype=np.float32, casting="unsafe").dtype == np.float32
    assert (cupy.add.reduce(x), cupy.multiply.accumulate(x).tolist()) == (3, [1, 1, 1])
    for method, arguments in (("reduce", (x,)), ("accumulate", (x,)), ("at", (x, 0, 1))):
        with pytest.raises(NotImplementedError, match=f"cupy_arctan2.{method}"):
            getattr(cupy.arctan2, method)(*arguments)


def test_views_need_no_elements():
    x = cupy.empty((2, 3, 4))
    for view in x.T, x[1], x.reshape(6, 4), x[:, None], x.swapaxes(0, 1), cupy.broadcast_to(x, (5, 2, 3, 4)), x.view():
        assert view._allocation is x._allocation
        assert view.base is x
        assert not view.flags.owndata


def test_addresses_alignment_and_guards():
    x = cupy.zeros((3, 5), np.float32)
    assert x.data.ptr % 512 == 0
    assert x.data.ptr == x._host.ctypes.data == x[0].data.ptr
    assert x[1, 2:].data.ptr == x.data.ptr + 28
    allocation = x._allocation
    assert (allocation.nbytes, allocation.device, allocation.initialised.sum()) == (60, 0, 60)
    assert _memory.find(x.data.ptr + 59) is _memory.find(x.data.ptr) is allocation
    assert _memory.find(x.data.ptr + 60) is None
    assert _memory.find(x.data.ptr - 1) is None
    assert byte_range(x) == byte_range(x[::-1, ::-1]) == (x.data.ptr, x.data.ptr + 60)
    assert byte_range(x[1:, 1]) == (x.data.ptr + 24, x.data.ptr + 48)
    assert allocation.guards_intact()
    allocation._buffer[allocation._start + 60] = 0
    assert not allocation.guards_intact()
    assert cupy.empty((0, 3)).data.ptr == 0


def test_memory_is_counted_and_forgotten():
    gc.collect()
    emulator.reset_usage()
    before, total = emulator.usage().live_bytes, emulator.usage().total_bytes
    x = cupy.zeros(1000, np.uint8)
    y = cupy.zeros(500, np.uint8)
    ptr = x.data.ptr
    del y
    z = cupy.empty(400, np.uint8)
    x[::2].fill(1)
    del z
    use = emulator.usage()
    assert (use.live_bytes - before, use.peak_bytes - before, use.total_bytes - total) == (1000, 1500, 1900)
    assert use.allocations == 3
    view = x[3:]
    del x
    assert _memory.find(ptr) is not None
    del view
    assert _memory.find(ptr) is None
    assert emulator.usage().live_bytes == before


def test_allocators_are_asked():
    asked = []

    def allocator(size):
        asked.append(size)
        return cupy.get_default_memory_pool().malloc(size)

    cupy.cuda.set_allocator(allocator)
    try:
        cupy.zeros((3, 2), np.float32) + 1
    finally:
        cupy.cuda.set_allocator(None)
    cupy.zeros(3)
    assert asked == [24, 24]
    with cupy.cuda.using_allocator(allocator):
        cupy.zeros(4)
        with cupy.cuda.using_allocator():
            cupy.zeros(5)
        with pytest.raises(ValueError, match="inside `using_allocator`"):
            cupy.cuda.set_allocator(None)
    cupy.zeros(3)
    assert asked == [24, 24, 32]


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def test_arrays_look_like_those_of_cupy():
    x = cupy.ones((2, 3), np.float32)
    assert type(x).__module__ == "cupy"
    assert not isinstance(x, np.ndarray)
    interface = x.T.__cuda_array_interface__
    assert interface["data"] == (x.data.ptr, False)
    assert (interface["shape"], interface["strides"], interface["typestr"]) == ((3, 2), (4, 12), "<f4")
    assert x.__cuda_array_interface__["strides"] is None
    assert (x.flags.c_contiguous, x.flags.f_contiguous, x.flags.owndata, x.flags.forc) == (True, False, True, True)
    assert x.T.flags["F_CONTIGUOUS"]
    assert not hasattr(x.flags, "writeable")
    assert cupy.get_array_module(1, x) is cupy
    assert cupy.get_array_module(np.ones(1)) is np
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)


def test_no_implicit_conversion():
    x = cupy.ones(3)
    with pytest.raises(
        TypeError, match=r"Implicit conversion to a NumPy array is not allowed\. Please use `\.get\(\)`"
    ):
        np.asarray(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.ones(3)[...] = x
    with pytest.raises(TypeError):
        range(cupy.array(3))  # CuPy's arrays are no indices


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, h: x + h,
        lambda x, h: h + x,
        lambda x, h: h < x,
        lambda x, h: x.__imul__(h),
        lambda x, h: cupy.maximum(x, h),
        lambda x, h: np.maximum(h, x),
        lambda x, h: np.concatenate([x, h]),
        lambda x, h: x @ h,
        lambda _, h: cupy.exp(h),
        lambda _, h: cupy.sum(h),
        lambda x, h: np.add(x, x, out=h),
    ],
)
def test_numpy_and_device_arrays_do_not_mix(mix):
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>|must be cupy.ndarray"):
        mix(cupy.ones(3), np.ones(3))


def test_assignment_takes_scalars_and_device_arrays():
    x = cupy.zeros((2, 3), np.float32)
    for value in np.ones(3), [1, 2, 3]:
        with pytest.raises(ValueError, match="non-scalar"):
            x[...] = value
    x[0] = np.array(2.7)
    x[1] = cupy.array([1, 2, 3])
    np.testing.assert_array_equal(x.get(), np.array([[2.7] * 3, [1, 2, 3]], np.float32))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.set(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="float64 array cannot be set to float32"):
        x.set(np.ones((2, 3)))
    x.set(np.ones((2, 3), np.float32))
    assert (x == 1).all()


def test_functions_of_numpy_give_device_arrays():
    x = cupy.arange(4, dtype=np.float32)
    for result in np.exp(x), np.float32(2) * x, np.sum(x), np.add.reduce(x), np.concatenate([x, x]), 2 - x, np.mean(x):
        assert type(result) is cupy.ndarray
        assert result.dtype == np.float32
    assert (np.float64(2) * x).dtype == np.float64
    assert (x * 2.5).dtype == np.float32
    np.testing.assert_array_equal(np.maximum(x, 2).get(), [2, 2, 2, 3])
    np.add(x, 1, out=x)
    np.testing.assert_array_equal(x.get(), [1, 2, 3, 4])
    cupy.add.at(x, cupy.array([0, 0]), 10)
    assert x[0] == 21


def test_results_have_no_dimension_rather_than_no_array():
    x = cupy.arange(6.0).reshape(2, 3)
    for result in x.sum(), x.mean(), x.max(), x.argmax(), x.any(), x[1, 2], cupy.allclose(x, x), cupy.count_nonzero(x):
        assert type(result) is cupy.ndarray
        assert result.shape == ()
    assert float(x.mean()) == 2.5
    assert int(x.argmax()) == 5
    assert f"{x.max():.1f}" == "5.0"
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)


def test_results_are_in_the_order_of_c():
    x = cupy.ones((2, 3, 4)).transpose(0, 2, 1)
    assert (x + 1).flags.c_contiguous
    assert x.copy().flags.c_contiguous
    assert x.copy("K").strides == x.astype(np.float64).strides == cupy.zeros_like(x).strides == x.strides


def test_out_has_the_exact_shape():
    with pytest.raises(ValueError, match="Out shape is mismatched"):
        cupy.add(cupy.ones(3), 1, out=cupy.empty((2, 3)))
    with pytest.raises(TypeError, match=r"must be cupy\.ndarray"):
        cupy.ones((2, 3)).sum(axis=0, out=np.empty(3))


@pytest.mark.parametrize("key", [0, (1, 2), slice(1), (..., 0), (None, 1), (slice(None, None, -2), slice(1, None))])
def test_indices_give_views(key):
    host = np.arange(12.0).reshape(3, 4)
    x = cupy.array(host)
    np.testing.assert_array_equal(x[key].get(), host[key])
    assert x[key].strides == host[(*key, ...) if isinstance(key, tuple) and ... not in key else key].strides
    x[key] += 100
    host[key] += 100
    np.testing.assert_array_equal(x.get(), host)


def test_reshape_copies_exactly_when_numpy_does():
    x = cupy.arange(24.0).reshape(2, 3, 4)
    assert x.reshape(6, 4)._allocation is x._allocation
    assert x.transpose(0, 2, 1).reshape(8, 3)._allocation is not x._allocation
    assert x[:, :, ::2].reshape(6, 2)._allocation is x._allocation
    windows = cupy.lib.stride_tricks.sliding_window_view(x, 2, axis=2)
    assert windows.shape == (2, 3, 3, 2)
    assert windows._allocation is x._allocation


def test_operators():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 9, (2, 4, 4))
    x, y = cupy.array(a), cupy.array(b)
    binary = [f"x {operator} y" for operator in "+ - * / // % ** @ & | ^ << >> < <= == != > >=".split()]  # noqa: SIM905
    for text in [*binary, "-x", "abs(x)", "~x", "2 - x", "2 ** x", "x.dot(y)", "x.var(axis=0)", "divmod(x, y)[1]"]:
        expected = eval(text, {"x": a, "y": b})
        result = eval(text, {"x": x, "y": y})
        np.testing.assert_array_equal(result.get(), expected, strict=True)
    assert not (x == None).any()  # noqa: E711
    view = x[0]
    view *= 2
    np.testing.assert_array_equal(x[0].get(), 2 * a[0])


def test_bfloat16():
    x = cupy.array([1, 2, 3], ml_dtypes.bfloat16)
    assert (x * x).dtype == x.dtype == x.mean().dtype
    assert x.dtype.name == "bfloat16"
    assert (x.astype(np.float32) + x).dtype == np.float32
    np.testing.assert_array_equal(x.view(np.uint16).get(), [0x3F80, 0x4000, 0x4040])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(x)).get(), x.get())


@pytest.mark.parametrize("dtype", [object, "U3", "S2", np.longdouble, "M8[s]", "V4", ">f4", [("a", "f4")]])
def test_dtypes_that_devices_do_not_know(dtype):
    for make in cupy.empty, cupy.zeros, lambda n, dtype: cupy.array(np.zeros(n, dtype)), cupy.ones(3).astype:
        with pytest.raises((ValueError, TypeError)):
            make(3, dtype) if make != cupy.ones(3).astype else make(dtype)


def test_infinities_are_quiet():
    x = cupy.array([0.0, -1.0])
    np.testing.assert_array_equal((1 / x).get(), [np.inf, -1])
    assert cupy.isnan(cupy.sqrt(x)[1])
    assert cupy.isnan(cupy.ones((0, 3)).mean(axis=0)).all()


def test_copies_are_deep():
    x = cupy.arange(6.0).reshape(2, 3).T
    for twin in copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x)), cupy.array(x), x.copy():
        assert twin._allocation is not x._allocation
        np.testing.assert_array_equal(twin.get(), x.get())
    assert pickle.loads(pickle.dumps(x)).strides == x.strides
    assert cupy.asarray(x) is x
    assert cupy.ascontiguousarray(x).flags.c_contiguous
    nested = cupy.array([[x[0, 0], x[0, 1]], [x[1, 0], x[1, 1]]])
    np.testing.assert_array_equal(nested.get(), x[:2].get())


def test_what_cupy_has_not_is_not_there():
    for name in "memmap", "asmatrix", "array2strings", "testing", "object_":
        with pytest.raises(AttributeError, match=name):
            getattr(cupy, name)


# ---------------------------------------------------------------------------------------------------------------------
# Devices, streams, graphs


@pytest.mark.usefixtures("two_devices")
def test_devices():
    assert cupy.cuda.is_available()
    assert cupy.cuda.runtime.getDeviceCount() == 2
    x = cupy.ones(3)
    with cupy.cuda.Device(1) as device:
        assert cupy.cuda.runtime.getDevice() == 1
        assert device.compute_capability == "75"
        assert device.attributes["MultiProcessorCount"] == 40
        assert device.attributes["MaxSharedMemoryPerBlockOptin"] == 65536
        y = cupy.ones(3)
    assert cupy.cuda.Device().id == 0
    assert cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"] == 232448
    assert cupy.cuda.runtime.getDeviceProperties(1)["name"] == b"Emulated T4"
    assert (x.device.id, y.device.id, y.data.device_id) == (0, 1, 1)
    for mix in lambda: x + y, lambda: y + 1, lambda: x.__setitem__(..., y), lambda: y.fill(0):
        with pytest.raises(ValueError, match=r"resides \(1\) is different from the current device \(0\)"):
            mix()
    assert y.copy().device.id == 0
    assert cupy.array(y).device.id == 0
    assert cupy.array(y[::2], order="C").device.id == 0
    with pytest.raises(NotImplementedError, match="non-contiguous array between devices"):
        cupy.array(y[::2])
    assert copy.deepcopy(y).device.id == 1
    assert (y.get() == 1).all()
    with pytest.raises(CUDARuntimeError, match="invalid device ordinal"):
        cupy.cuda.Device(2).use()


def test_no_device():
    with emulator.pretend():
        assert not cupy.cuda.is_available()
        with pytest.raises(CUDARuntimeError, match="cudaErrorNoDevice"):
            cupy.zeros(3)


@pytest.mark.usefixtures("two_devices")
def test_device_and_stream_belong_to_the_thread():
    seen = []

    def look():
        seen.append((cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream()))

    with cupy.cuda.Device(1), cupy.cuda.Stream() as stream:
        assert cupy.cuda.get_current_stream() is stream
        assert cupy.cuda.get_current_stream(0) == cupy.cuda.Stream.null
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(0, cupy.cuda.Stream.null)]
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
    with pytest.raises(RuntimeError, match="created on device 1"):
        stream.use()


def test_syncs_are_counted():
    x = cupy.ones(3)
    with emulator.record_syncs() as outer:
        with emulator.record_syncs() as syncs:
            y = (x + 1).sum() / 3
            y.shape, y[...], y.reshape(1), x.copy(), x.astype("f4"), x[cupy.array([1])]
            assert syncs == []
            float(y), y.item(), x.tolist(), x.tobytes(), repr(x), bool(y), cupy.asnumpy(x)
            cupy.cuda.Device().synchronize()
            assert syncs == ["get"] * 7 + ["synchronize"]
            assert emulator.host_syncs == 8
        assert len(outer) == 8
        x.get(blocking=False)
        assert emulator.host_syncs == 8


def test_launches_are_recorded_apart():
    launch = emulator.Launch("k", (1, 1, 1), (32, 1, 1), 0, 0, 0, 4, 8)
    before = len(emulator.launches)
    with emulator.record() as launches:
        emulator.launches.append(launch)
        assert launches == [launch]
    assert emulator.launches[before:] == [launch]
    del emulator.launches[before:]


def test_the_library_knows_the_arrays():
    host = np.arange(48, dtype=np.float32).reshape(2, 4, 3, 2)
    x = cupy.array(host).transpose(0, 3, 1, 2)
    assert kinds.describe(x) == "CuPy array on cuda:0"
    layout = Layout.of(x, 1)
    assert layout.shape == (24, 2, 1)
    assert layout.view(x)._allocation is x._allocation
    assert layout.conform(x) is x
    assert layout.back(layout.empty(x)).strides == x.strides
    conformed = layout.conform(cupy.ascontiguousarray(x))
    assert conformed.strides == x.strides
    np.testing.assert_array_equal(conformed.get(), x.get())
    assert devices.transfer(x, np.dtype(np.float64), "cpu").dtype == np.float64
    assert devices.transfer([1, 2], np.dtype(np.float32), "cuda:0").device.id == 0
