"""Launches that a call takes, where an argument decides."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._steps import cupy_ops, launched, plans
from cupybn._steps.geometry import channels_last
from tests.reference import bits

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
if emulator is None:
    pytest.skip("a GPU does not tell", allow_module_level=True)


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, ["bn_forward"]),
        ({"momentum": None, "track_running_stats": False}, ["bn_forward"]),
        ({"momentum": None}, ["bn_stats", "bn_normalize"]),
        ({"skip_nonfinite": True, "track_running_stats": False}, ["bn_forward"]),
    ],
    ids=str,
)
def test_two_launches_only_where_a_counter_decides(options, launches):
    """All blocks would have to read a counter before one of them moves it."""
    layer = cupybn.BatchNorm1d(3, device="cuda:0", **options)
    with emulator.record() as made:
        layer(cp.ones((4, 3, 5), np.float32))
    assert [launch.name for launch in made] == launches
    layer.num_batches_tracked = None
    with emulator.record() as made:
        layer(cp.ones((4, 3, 5), np.float32))
    assert [launch.name for launch in made] == ["bn_forward"]


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_launches_and_bits_without_an_update(momentum, skip_nonfinite, masked):
    """A pass that only repeats another one, or warms up for a capture, compiles what is launched there."""
    layer, x, mask = (
        cupybn.BatchNorm1d(3, momentum=momentum, device="cuda:0", skip_nonfinite=skip_nonfinite),
        cp.arange(60, dtype=np.float32).reshape(4, 3, 5),
        cp.ones((4, 5), bool) if masked else None,
    )
    with emulator.record() as without, cupybn.no_stats_update():
        expected = layer(x, mask=mask)
    before = bits(*layer.state_dict().values())
    with emulator.record() as made:
        y = layer(x, mask=mask)
    assert bits(*layer.state_dict().values()) != before
    assert [launch.name for launch in made] == [launch.name for launch in without]
    assert bits(y) == bits(expected)


@pytest.mark.parametrize(
    ("shape", "offset", "width", "nbytes"),
    [
        ((2, 3, 4), 0, 4, 6),
        ((2, 3, 3), 0, 1, 18),
        ((2, 3, 6), 0, 2, 18),
        ((2, 3, 5), 0, 1, 30),
        ((9, 4, 1), 0, 4, 9),
        ((9, 6, 1), 0, 2, 27),
        ((9, 5, 1), 0, 1, 45),
        ((2, 3, 4), 2, 2, 12),
        ((9, 4, 1), 1, 1, 36),
    ],
    ids=str,
)
def test_packs_as_wide_as_rows_and_memory_allow(shape, offset, width, nbytes):
    """The record has a byte for each pack, and is bool where packs are single elements."""
    x = cp.empty(np.prod(shape) + offset, np.float32)[offset:].reshape(shape)
    plan = plans.choose_resident("bn_forward", x)
    assert f"-DWIDTH={width}" in plan.kernel.options
    passed = cupy_ops.empty_passed(x, x, x)
    assert passed.dtype == (np.uint8 if width > 1 else np.bool_)
    assert passed.shape == ((passed.size,) if width > 1 else shape)
    assert passed.nbytes == nbytes


def test_a_record_decides_on_packs():
    """Packs of the way back are those that the record was made of; only dy may have to be copied for it."""
    x, dy, whole = (cp.zeros(61, np.float32)[offset:][:60].reshape(2, 3, 10) for offset in (0, 1, 0))
    passed = cupy_ops.empty_passed(x, x, x)
    assert plans.width_of(x) == plans.width_of(x, dy, passed=passed) == 2
    assert plans.width_of(x, dy) == 1
    assert launched.aligned_for(passed, x, whole) is whole
    assert launched.aligned_for(None, x, dy) is dy
    copied = launched.aligned_for(passed, x, dy)
    assert copied is not dy
    assert copied.data.ptr % 8 == 0
    narrow = cupy_ops.empty_passed(dy, x, x)
    assert narrow.dtype == np.bool_
    assert plans.width_of(x, dy, passed=narrow) == 1
    assert launched.aligned_for(narrow, x, dy) is dy


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(
    ("step", "arrays"),
    [
        *(("bn_stats", 1), ("bn_normalize", 1), ("bn_backward_reduce", 2), ("bn_backward_input", 2)),
        *(("bn_double_backward_reduce", 2), ("bn_double_backward_input", 2)),
    ],
)
def test_sums_of_the_way_back_read_two_arrays(step, arrays):
    """The choice of launches knows it, also that of the launch that merges their parts."""
    x = cp.empty((40960, 128, 1), np.float32)
    multiprocessors = None if step in plans.SUMS else plans.properties_of(0).multiprocessors
    expected, other = (channels_last(40960, 128, 4, 4, n, multiprocessors) for n in (arrays, 3 - arrays))
    assert plans.choose(step, x).geometry == expected != other


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("training", [True, False])
def test_without_a_way_back_the_output_alone_is_written(training):
    """Neither statistics nor a record are written."""
    x = cp.arange(48, dtype=np.float32).reshape(4, 3, 4)
    buffers = (None, None) if training else (cp.zeros(3), cp.ones(3))
    with emulator.record() as made:
        y = F.batch_norm(x, *buffers, training=training, residual=x, activation="relu")
    assert made[-1].bytes_written == y.nbytes


@pytest.mark.usefixtures("streamed")
def test_the_counter_is_copied_where_a_later_launch_reads_the_copy():
    written = []
    for momentum in None, 0.1:
        layer = cupybn.BatchNorm1d(3, momentum=momentum, device="cuda:0")
        with emulator.record() as made:
            layer(cp.ones((4, 3, 5), np.float32))
        assert made[0].name == "bn_stats"
        written.append(made[0].bytes_written)
    assert written[0] - written[1] == layer.num_batches_tracked.nbytes
