"""The devices that the tests of the public contract run on."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(params=["cpu"])
def device(request):
    """The device of the arrays of a test, as the layers name it."""
    return request.param


@pytest.fixture
def xp(device):
    """The module whose arrays live on `device`."""
    return {"cpu": np}[device]


@pytest.fixture
def rng():
    return np.random.default_rng(0)
