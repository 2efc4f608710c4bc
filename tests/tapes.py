"""Calls that are alike but for addresses and numbers, for tests of what is played of them from tapes."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import cupy as cp
import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from tests.reference import bits, in_order

emulator = getattr(cp, "emulator", None)

NAMES = ("weight", "bias", "running_mean", "running_var")
"""Names of the vectors of a call."""
C = 3
SHAPE = (4, C, 2, 4)


@contextlib.contextmanager
def without_tapes():
    """A context in which every call takes its steps, and that leaves no tape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_call, "_cache", {})
        patch.setattr(_call.Call, "particulars", lambda *_: None)
        yield


@contextlib.contextmanager
def recorded():
    """A context with a list of its launches; on a GPU that stays empty."""
    if emulator is None:
        yield []
    else:
        with emulator.record() as launches:
            yield launches


def placed(values, order=None, offset=0):
    """An array of the device whose axes are in an order of memory, some elements after an aligned address."""
    order = tuple(range(values.ndim)) if order is None else order
    host = np.ascontiguousarray(values.transpose(order))
    view = cp.empty(host.size + offset, host.dtype)[offset:].reshape(host.shape)
    view[...] = cp.asarray(host)
    return view.transpose(np.argsort(order).tolist())


def spread(values, step):
    """A vector of the device with its values some elements apart."""
    view = cp.zeros(values.size * abs(step), values.dtype)[::step]
    view[...] = cp.asarray(values)
    return view


class Form(NamedTuple):
    """What calls have in common that are alike."""

    shape: tuple[int, ...] = SHAPE
    order: tuple[int, ...] | None = None  # axes in the order of memory
    dtype: Any = np.float32
    vectors: Any = np.float32  # one dtype, or those of NAMES
    step: int = 1  # elements between values of a vector
    given: tuple[str, ...] = NAMES
    residual: bool = False
    activation: str | None = None
    training: bool = True
    update: bool = True
    eps: Any = 1e-3
    offsets: tuple[int, int, int] = (0, 0, 0)  # elements of input, residual and gradient behind an aligned address
    mask: int | str | None = None  # elements of the mask behind an aligned address, or "broadcasts"
    skip_nonfinite: bool = False
    out: str | None = None
    layer: dict | None = None  # options of a layer that makes the call
    taped: bool = True  # whether calls are played from the second one on
    taped_back: bool = True  # whether their ways back are


NC, NHWC = {"shape": (6, 8)}, {"order": (0, 2, 3, 1)}
RELU = {"residual": True, "activation": "relu"}
EVAL, LAYER = {"training": False}, {"layer": {}}
DTYPES = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
OUT = {"out": "new"}
MASK, SKIP = {"mask": 0}, {"skip_nonfinite": True}
FORMS = {
    "training": {},
    "eval": EVAL,
    "a bool of NumPy": {"training": np.True_},
    "no update": {"update": False},
    "no buffers": {"given": ("weight", "bias")},
    "nothing but the input": {"given": ()},
    "no weight": {"given": NAMES[1:]} | RELU,
    "no bias, eval": {"given": ("weight", "running_mean", "running_var")} | EVAL,
    "no affine, eval": {"given": NAMES[2:]} | EVAL | RELU,
    "residual": {"residual": True},
    "relu": {"activation": "relu"},
    "residual, relu": RELU,
    "residual, relu, eval": RELU | EVAL,
    "channels last": NHWC,
    "channels last, residual, relu": NHWC | RELU,
    "channels last, eval": NHWC | EVAL | RELU,
    "(N, C)": NC | RELU,
    "(N, C), eval": NC | EVAL,
    "channels slowest": {"order": (1, 3, 0, 2)} | RELU,
    "float16": {"dtype": np.float16} | RELU,
    "bfloat16": {"dtype": ml_dtypes.bfloat16} | RELU,
    "float64": {"dtype": np.float64} | RELU,
    "vectors of all dtypes": {"vectors": DTYPES} | RELU,
    "vectors of all dtypes, eval": {"vectors": DTYPES[::-1]} | EVAL,
    "every third value": {"step": 3},
    "backwards": {"step": -2},
    "backwards, eval": {"step": -1} | EVAL,
    "eps of NumPy": {"eps": np.float32(1e-3)},
    "misaligned input": {"offsets": (1, 0, 0)} | RELU,
    "misaligned input, no record": {"offsets": (1, 0, 0)},
    "misaligned residual": {"offsets": (0, 1, 0)} | RELU,
    "misaligned gradient": {"offsets": (0, 0, 1)},
    "misaligned gradient, record": {"offsets": (0, 0, 1), "taped_back": False} | RELU,  # it is copied
    "half a pack": {"offsets": (2, 2, 2)} | RELU,
    "misaligned, eval": {"offsets": (1, 2, 3)} | EVAL,
    "out": OUT,
    "out, eval": OUT | EVAL | RELU,
    "out is the input": {"out": "input"},
    "out is the input, eval": {"out": "input"} | EVAL | RELU,
    "out is the input, no buffers": {"out": "input", "given": ("weight", "bias")},
    "out is the residual, eval": {"out": "residual"} | EVAL | RELU,
    "out is the residual, no update": {"out": "residual", "update": False} | RELU,
    "out of another order": {"out": "other order", "taped": False} | EVAL,
    "layer": LAYER,
    "layer, eval": LAYER | EVAL | RELU,
    "layer, mean over all batches": {"layer": {"momentum": None}},
    "layer, mean over all batches, no update": {"layer": {"momentum": None}, "update": False},
    "layer, mean over all batches, no buffers": {"layer": {"momentum": None, "track_running_stats": False}},
    "layer without buffers": {"layer": {"track_running_stats": False}} | RELU,
    "layer without affine": {"layer": {"affine": False}},
    "frozen layer": {"layer": {"frozen": True}},
    "mask": MASK,
    "mask, residual": MASK | {"residual": True},
    "mask, residual, relu": MASK | RELU,
    "mask, eval": MASK | EVAL | RELU,
    "mask, channels last": MASK | NHWC | RELU,
    "mask, out is the input": MASK | {"out": "input"},
    "mask, layer, mean over all batches": MASK | {"layer": {"momentum": None}},
    "misaligned mask": {"mask": 1} | RELU,
    "mask that broadcasts": {"mask": "broadcasts", "taped": False, "taped_back": False} | RELU,
    "skip what is not finite": SKIP,
    "skip what is not finite, mask": SKIP | MASK,
    "skip what is not finite, no update": SKIP | {"update": False},
    "skip what is not finite, layer": {"layer": SKIP},
    "skip what is not finite, mean over all batches": {"layer": SKIP | {"momentum": None}},
}
FORMS = {name: Form(**form) for name, form in FORMS.items()}
CASES = {f"{name}, vjp": (form, True) for name, form in FORMS.items() if form.out is None}
CASES |= {name: (form, False) for name, form in FORMS.items() if "gradient" not in name}


class Outcome(NamedTuple):
    """What a call left behind: bits of all arrays and strides of results, and the launches."""

    bits: list[bytes | None]
    strides: list[Any]
    launches: list[tuple]


def draw(form, seed):
    """Arrays for a call of a form by their names, and other gradients of its output."""
    rng = np.random.default_rng(seed)
    x, residual, *dys = ((rng.standard_normal(form.shape) * 2 + 1).astype(form.dtype) for _ in range(5))
    offsets = form.offsets
    arrays = {"input": placed(x, form.order, offsets[0])}
    if form.residual:
        arrays["residual"] = placed(residual, form.order, offsets[1])
    dtypes = form.vectors if isinstance(form.vectors, tuple) else [form.vectors] * len(NAMES)
    for name, dtype in zip(NAMES, dtypes, strict=True):
        if name in form.given:
            arrays[name] = spread(rng.uniform(0.5, 2, form.shape[1]).astype(dtype), form.step)
    if form.mask is not None:
        arrays["mask"] = mask_of(form, rng)
    return arrays, [placed(dy, form.order, offsets[2]) for dy in dys]


def mask_of(form, rng):
    """The mask of a call of a form."""
    shape = form.shape[0], *form.shape[2:]
    if form.mask == "broadcasts":
        return cp.asarray(rng.random(shape[1:]) < 0.7)
    axes = (0, 1, 2, 3) if form.order is None else form.order
    return placed(rng.random(shape) < 0.7, [i - (i > 1) for i in axes if i != 1], form.mask)


def out_of(form, arrays):
    """The `out` of a call with these arrays."""
    if form.out in (None, "input", "residual"):
        return arrays.get(form.out)
    x = arrays["input"]
    return in_order(cp.zeros_like(x), (3, 2, 1, 0)) if form.out == "other order" else cp.zeros_like(x)


def layer_of(form, arrays, momentum):
    """The layer that makes a call with these arrays."""
    options = {"momentum": momentum, "activation": form.activation, "eps": form.eps} | form.layer
    frozen = options.pop("frozen", False)
    layer = cupybn.BatchNorm2d(form.shape[1], device="cuda:0", **options)
    layer.train(form.training)
    layer.track_running_stats = layer.track_running_stats and not frozen
    for name in NAMES:
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = arrays[name]
    return layer


def act(form, seed, back, alone=True):
    """The outcome of a call of a form with other arrays and another momentum for each seed.

    Launches are listed unless other threads may launch, too.
    """
    arrays, dys = draw(form, seed)
    momentum = 0.1 + seed / 10
    out = out_of(form, arrays)
    context = contextlib.nullcontext() if form.update else cupybn.no_stats_update()
    with recorded() if alone else contextlib.nullcontext([]) as launches:
        if form.layer is not None:
            layer = layer_of(form, arrays, momentum)
            with context:
                run = layer.vjp if back else lambda *given: (layer(*given), None)
                y, vjp_fn = run(arrays["input"], arrays.get("residual"), arrays.get("mask"))
            held = layer.state_dict()
        else:
            rest = {"momentum": momentum, "training": form.training, "activation": form.activation, "eps": form.eps}
            rest["skip_nonfinite"] = form.skip_nonfinite
            given = {"running_mean": None, "running_var": None} | arrays | rest
            with context:
                y, vjp_fn = F.batch_norm_vjp(**given) if back else (F.batch_norm(**given, out=out), None)
            held = arrays
        results = [y, *held.values()]
        if back:
            results += [grad for dy in (dys[0], dys[0], dys[1]) for grad in vjp_fn(dy)]
    assert out is None or back or y is out
    where = [(launch.name, *launch[1:6], launch.cluster) for launch in launches]
    return Outcome(bits(*results), [None if a is None else a.strides for a in results], where)


def alike(ours, theirs):
    """Check that two outcomes are one."""
    assert ours.strides == theirs.strides
    assert ours.launches == theirs.launches
    assert ours.bits == theirs.bits


def kernels_of(tape):
    return [launch.kernel for launch in tape.launches]


def tapes():
    """All tapes that there are, and None for calls that cannot be told again."""
    found = []
    for checked in _call._cache.values():
        found += [] if checked.tapes is None else checked.tapes.values()
    return found
