"""Values whose squares float32 does not hold: they are no constant channels, and constant ones are not lost either."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests import reference

TINY = 1e-24  # its square is 0 in float32
CHANNELS = {
    "two signs": lambda n: np.resize([TINY, -TINY], n),
    "pairs among zeros": lambda n: np.where(np.arange(n) % 40 < 2, np.resize([TINY, -TINY], n), 0),
    "one pair in the middle": lambda n: np.where(np.arange(n) // 2 == n // 4, np.resize([TINY, -TINY], n), 0),
    "one pair at the end": lambda n: np.where(np.arange(n) >= n - 2, np.resize([TINY, -TINY], n), 0),
    "pairs that are 128 apart": lambda n: np.array([0, TINY, -TINY, 0])[np.arange(n) // 128 % 4],  # rows of one thread
    "pairs that are 256 apart": lambda n: np.array([0, TINY, -TINY, 0])[np.arange(n) // 256 % 4],
    "a mean": lambda n: 3 * TINY + np.resize([TINY, -TINY], n),
    "constant": lambda n: np.full(n, TINY),
    "zeros": np.zeros,
    "usual": lambda n: np.sin(np.arange(n)),
}
LAYOUTS = {  # shape, channel axis
    "channels first": ((40, len(CHANNELS), 30), 1),
    "odd rows": ((40, len(CHANNELS), 31), 1),
    "channels last": ((1200, len(CHANNELS)), 1),
    "few": ((2, len(CHANNELS)), 1),
    "large": ((3, len(CHANNELS), 60000), 1),
}


@pytest.fixture
def xp(way):
    return way


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tiny_channels(xp, layout, dtype):
    shape, axis = layout
    count = int(np.prod(shape)) // len(CHANNELS)
    channels = np.stack([values(count) for values in CHANNELS.values()], axis=-1)
    others = [n for i, n in enumerate(shape) if i != axis]
    x = np.ascontiguousarray(np.moveaxis(channels.reshape(*others, -1), -1, axis).astype(dtype))
    running_mean, running_var = np.zeros((2, len(CHANNELS)))
    F = reference.OnDevice(xp)
    y, _ = F.batch_norm_vjp(x, running_mean, running_var, training=True, momentum=1.0, eps=1e-60, channel_axis=axis)
    expected = reference.batch_norm(x, eps=1e-60, channel_axis=axis)
    assert np.all(expected.var[:5] > 0) or count == 2
    reference.assert_close(y, expected.y, np.float32, 4.0)
    bound = 1e-6 * (np.sqrt(expected.var) + np.abs(expected.mean))
    assert np.all(np.abs(running_mean - expected.mean) <= bound)
    np.testing.assert_allclose(running_var, expected.var * count / (count - 1), rtol=1e-6, atol=0)
    mean, var = F.moments(x, channel_axis=axis)
    assert np.all(np.abs(mean - expected.mean) <= bound)
    np.testing.assert_allclose(var, expected.var.astype(np.float32), rtol=1e-6)
