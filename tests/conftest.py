"""The devices that the tests of the public contract run on: NumPy, and a GPU or the stand-in for one."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

EMULATED = Path(__file__).parent / "emulated"


def _use_a_gpu_or_the_stand_in() -> None:
    """Let `import cupy` find the stand-in where no GPU can be used, unless CUPYBN_REQUIRE_GPU forbids it."""
    try:
        import cupy

        usable = cupy.cuda.is_available()
    except Exception:
        usable = False
    if usable:
        return
    if os.environ.get("CUPYBN_REQUIRE_GPU") == "1":
        pytest.exit("CUPYBN_REQUIRE_GPU=1, but CuPy finds no GPU", returncode=1)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends")]:
        del sys.modules[name]
    sys.path.insert(0, str(EMULATED))


_use_a_gpu_or_the_stand_in()

with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples in every run, however long a busy machine takes for one.
    settings.register_profile("cupybn", deadline=None, derandomize=True)
    settings.load_profile("cupybn")


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request):
    """The device of the arrays of a test, as the layers name it."""
    return request.param


@pytest.fixture
def xp(device):
    """The module whose arrays live on `device`."""
    if device == "cpu":
        return np
    import cupy

    return cupy


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_tapes():
    """No launches are kept from earlier tests: the first call of a test that is like no other takes its steps."""
    from cupybn._calls import call
    from cupybn.dropout import call as dropout_call

    call._cache.clear()
    dropout_call._cache.clear()


@pytest.fixture
def fresh_plans():
    """No plans of launches are kept from earlier tests, which may have made them for other devices or settings."""
    from tests.steps import forget_plans

    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def streamed(monkeypatch, fresh_plans):  # noqa: ARG001
    """All channels are streamed: nothing is kept on chip."""
    from cupybn._steps import geometry, resident

    monkeypatch.setattr(resident, "BLOCKS", ())
    monkeypatch.setattr(geometry, "ON_CHIP_TILE", ())


@pytest.fixture(params=["on chip", "streamed"])
def either(request):
    """Channels are kept on chip where they fit, and then all of them are streamed."""
    request.getfixturevalue("fresh_plans" if request.param == "on chip" else "streamed")


@pytest.fixture(params=["NumPy", "on chip", "streamed"])
def way(request):
    """The module of the arrays, whose steps are NumPy's own or one of the two families of kernels."""
    if request.param == "NumPy":
        return np
    request.getfixturevalue("fresh_plans" if request.param == "on chip" else "streamed")
    import cupy

    return cupy


@pytest.fixture
def plays(monkeypatch):
    """The tapes that have been played to their ends, one entry for each time."""
    from cupybn._steps.tape import Tape

    played, original = [], Tape.play

    def play(self, particulars):
        results = original(self, particulars)
        if results is not None:
            played.append(self)
        return results

    monkeypatch.setattr(Tape, "play", play)
    return played
