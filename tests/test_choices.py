"""Which launches a call takes, where an argument decides."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn
from cupybn import cupy_ops
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
    ],
    ids=str,
)
def test_two_launches_only_where_a_counter_decides(options, launches):
    """All blocks would have to read it before one moves it."""
    layer = cupybn.BatchNorm1d(3, device="cuda:0", **options)
    with emulator.record() as made:
        layer(cp.ones((4, 3, 5), np.float32))
    assert [launch.name for launch in made] == launches
    layer.num_batches_tracked = None
    with emulator.record() as made:
        layer(cp.ones((4, 3, 5), np.float32))
    assert [launch.name for launch in made] == ["bn_forward"]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_same_launches_and_bits_without_an_update(momentum):
    """So that a pass that only repeats another one, or warms up for a capture, compiles what is launched there."""
    layer, x = (
        cupybn.BatchNorm1d(3, momentum=momentum, device="cuda:0"),
        cp.arange(60, dtype=np.float32).reshape(4, 3, 5),
    )
    with emulator.record() as without, cupybn.no_stats_update():
        expected = layer(x)
    with emulator.record() as made:
        y = layer(x)
    assert [launch.name for launch in made] == [launch.name for launch in without]
    assert bits(y) == bits(expected)


def test_packs_where_they_have_elements_of_two_rows_at_most():
    """Also of exactly one row each."""
    for shape, packs in ((2, 3, 4), True), ((2, 3, 3), False), ((2, 3, 5), True), ((9, 4, 1), True), ((9, 6, 1), False):
        x = cp.empty(shape, np.float32)
        plan = cupy_ops._choose_resident("bn_forward", x)
        assert f"-DVECTORIZED={int(packs)}" in plan.kernel.options
        assert cupy_ops.empty_mask(x, x, x).dtype == (np.uint8 if packs else np.bool_)
