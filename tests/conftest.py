"""The devices that the tests of the public contract run on: NumPy, and a GPU or the stand-in for one."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cupybn._kernels import kernel_names, source
from tests import nvrtc

EMULATED = Path(__file__).parent / "emulated"


def _use_a_gpu_or_the_stand_in() -> None:
    """Where no GPU can be used, `import cupy` is to find the stand-in, unless CUPYBN_REQUIRE_GPU forbids it."""
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


_stop = threading.Event()


def pytest_collection_finish(session):
    """Before a long run, compile all kernels for the stand-in beside the tests, which leave a processor to it."""
    import cupy

    if hasattr(cupy, "emulator") and len(session.items) > 1000 and not hasattr(session.config, "workerinput"):
        cupy.RawModule(code="").compile()  # the runtime, which all need
        instances = [instance for name in kernel_names() for instance in nvrtc.instances(name)]
        instances.sort(key=lambda i: (i.index_bits, not i.vectorized, i.dtype != "float32"))
        # All that the thread needs, before tests turn the loader to other folders.
        kernels = [(source(i.kernel), i.kernel.rpartition("/")[2], i.options) for i in instances]
        session.config.ahead = threading.Thread(target=_compile_ahead, args=(cupy, kernels))
        session.config.ahead.start()


def pytest_sessionfinish(session):
    _stop.set()
    if hasattr(session.config, "ahead"):
        session.config.ahead.join()


def _compile_ahead(cupy, kernels):
    for kernel in kernels:
        if _stop.is_set():
            return
        cupy.RawKernel(*kernel).compile()


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
