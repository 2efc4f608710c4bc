"""Memory that a call allocates beside its result: a fraction of the input."""

from __future__ import annotations

import tracemalloc
import weakref

import numpy as np
import pytest

import cupybn.functional as F
from cupybn._steps.tiles import SHORT

BUFFER = 8 * SHORT if np.lib.NumpyVersion(np.__version__) < "2.3.0" else 0
"""Bytes of the buffer of an iterator of NumPy's that count as allocated: NumPy before 2.3 makes it anew each time."""
SHAPES = [((8, 64, 56, 56), 1), ((8, 1024, 14, 14), 1), ((8, 512, 7, 7), 1), ((8, 28, 28, 256), 3), ((4096, 256), 1)]
SHAPES += [((2, 3, 300, 301), 1), ((16, 128, 2000), 1), ((100_003, 5), 1)]


def allocated(call):
    """Most bytes that a call holds at once."""
    call()  # what is made once and kept, threads and caches, does not count
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_temporaries(shape, axis, threads, rng, monkeypatch):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", threads)
    x = rng.standard_normal(shape).astype(np.float32)
    vectors = [np.ones(shape[axis], np.float32) for _ in range(4)]
    for training in True, False:
        forward = allocated(lambda t=training: F.batch_norm(x, *vectors, t, channel_axis=axis))
        assert forward <= 1.25 * x.nbytes + BUFFER, f"{forward / x.nbytes:.2f} times the input, the output included"
        vjp_fn = F.batch_norm_vjp(x, *vectors, training, channel_axis=axis)[1]
        backward = allocated(lambda f=vjp_fn: f(x))
        assert backward <= 1.25 * x.nbytes + BUFFER, f"{backward / x.nbytes:.2f} times the input, its gradient included"


def test_an_output_of_ones_own(rng):
    x = rng.standard_normal((8, 256, 56, 56)).astype(np.float32)
    for out in np.empty_like(x), x:
        assert allocated(lambda out=out: F.batch_norm(x, None, None, training=True, out=out)) <= 0.3 * x.nbytes


def test_vjp_fn_keeps_what_it_needs(rng):
    """A `vjp_fn` keeps one copy of an input that is not dense, and no residual that only has to be added."""
    x = rng.standard_normal((8, 256, 30, 28)).astype(np.float32)[:, :, ::2]
    residual = x.copy()
    refs = [weakref.ref(a) for a in (x, residual)]
    _, vjp_fn = F.batch_norm_vjp(x, None, None, training=True, residual=residual)
    dy = x.copy()
    del x, residual
    assert [ref() for ref in refs] == [None, None]
    assert vjp_fn(dy).residual is dy
