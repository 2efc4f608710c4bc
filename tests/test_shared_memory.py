"""Arrays of a call that share memory give the results of the values that they all had when the call began."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import overlap
from tests.reference import bits, to_numpy

C = 5
SHAPES = {"channels first": (4, C, 6), "channels last": (24, C)}
VECTORS = ("weight", "bias", "running_mean", "running_var")
TENSORS = ("input", "residual", "out")
OVERLAPS = {  # pairs of vectors, made in memory of 2 C elements
    "the same array": lambda memory: (first := memory[:C], first),
    "another view": lambda memory: (memory[:C], memory[:C]),
    "shifted": lambda memory: (memory[:C], memory[2 : 2 + C]),
    "reversed": lambda memory: (memory[:C], memory[C - 1 :: -1]),
    "strided": lambda memory: (memory[:C], memory[: 2 * C : 2]),
}


@pytest.fixture
def xp(way):
    return way


@pytest.fixture
def device(way):
    return "cpu" if way is np else "cuda:0"


def arguments(xp, rng, shape):
    """Arrays for all arguments of a call, none of which shares memory."""

    def draw(size):
        return xp.asarray(rng.uniform(0.5, 2, size).astype(np.float32))

    return {name: draw(C) for name in VECTORS} | {name: draw(shape) for name in TENSORS}


def separate(given):
    """Copies of the arrays, which share no memory."""
    return {name: array.copy() for name, array in given.items()}


def call(given, dy, training, with_out):
    """The bits of all results of a call."""
    options = {"residual": given["residual"], "activation": "relu"}
    vectors = (given["running_mean"], given["running_var"], given["weight"], given["bias"], training, 0.5)
    if with_out:
        y = F.batch_norm(given["input"], *vectors, **options, out=given["out"])
        return bits(y)
    y, vjp_fn = F.batch_norm_vjp(given["input"], *vectors, **options)
    return bits(y, *vjp_fn(dy))


def check(given, dy, training, with_out, tangled):
    """Compare with a call of separate arrays; buffers that share memory with arrays only read move alike."""
    alone = separate(given)
    expected = call(alone, dy, training, with_out)
    assert call(given, dy, training, with_out) == expected
    written = {"running_mean", "running_var"} | ({"out"} if with_out else set())
    for name in written:
        if name not in tangled or not (written - {name}) & set(tangled):
            assert bits(given[name]) == bits(alone[name]), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shared", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("pair", list(itertools.combinations(VECTORS, 2)), ids="-".join)
def test_two_vectors(xp, rng, pair, shared, shape):
    dy = xp.asarray(rng.standard_normal(shape).astype(np.float32))
    for training, with_out in itertools.product((True, False), repeat=2):
        given = arguments(xp, rng, shape)
        memory = xp.asarray(rng.uniform(0.5, 2, 2 * C).astype(np.float32))
        given |= dict(zip(pair, shared(memory), strict=True))
        check(given, dy, training, with_out, pair)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_a_vector_in_a_tensor(xp, rng, tensor, vector, shape):
    """A vector may lie in a tensor, along the channels of one sample or along neighbours in memory."""
    dy = xp.asarray(rng.standard_normal(shape).astype(np.float32))
    for training in True, False:
        for find in (lambda a: a.reshape(-1)[3 : 3 + C], lambda a: a[(1, slice(None), *[2] * (a.ndim - 2))]):
            given = arguments(xp, rng, shape)
            given[vector] = find(given[tensor])
            check(given, dy, training, tensor == "out", (tensor, vector))


def test_in_place_with_a_vector_in_the_input(xp, rng):
    for name, training in itertools.product(VECTORS, (True, False)):
        given = arguments(xp, rng, (4, C, 6))
        given["out"] = given["input"]
        given[name] = given["input"][2, :, 1]
        alone = separate(given)
        alone["out"] = alone["input"]
        expected = call(alone, None, training, True)
        assert call(given, None, training, True) == expected


@pytest.mark.parametrize("momentum", [0.5, None])
def test_layers_with_one_array_in_two_roles(xp, device, rng, momentum):
    x = xp.asarray(rng.standard_normal((30, C)).astype(np.float32))
    for one, other in itertools.permutations(VECTORS, 2):
        layer, expected = (cupybn.BatchNorm1d(C, momentum=momentum, device=device) for _ in range(2))
        for name in VECTORS:
            getattr(layer, name)[...] = xp.asarray(rng.uniform(0.5, 2, C).astype(np.float32))
        expected.load_state_dict(layer.state_dict() | {one: layer.state_dict()[other]})
        setattr(layer, one, getattr(layer, other))
        for _ in range(2):
            for name in VECTORS:
                getattr(expected, name)[...] = getattr(layer, name)
            y, vjp_fn = layer.vjp(x)
            wanted, wanted_vjp_fn = expected.vjp(x)
            assert bits(y, *vjp_fn(x)[:3]) == bits(wanted, *wanted_vjp_fn(x)[:3]), (one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_other_calls_move_does_not_change_the_way_back(xp, rng, name, training):
    x = xp.asarray(rng.standard_normal((30, C)).astype(np.float32))
    given = arguments(xp, rng, x.shape)
    given[name] = given["running_var"]
    vectors = [given[key] for key in ("running_mean", "running_var", "weight", "bias")]
    with cupybn.no_stats_update():
        _, vjp_fn = F.batch_norm_vjp(x, *vectors, training, activation="relu")
    before = bits(*vjp_fn(x)[:3])
    F.batch_norm(x * 9, *vectors, True)
    assert bits(*vjp_fn(x)[:3]) == before


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_buffers_that_a_layer_does_not_use_at_first(xp, device, rng, role, buffer):
    """Buffers that are frozen at first may move later: the way back of an earlier call does not change."""
    x = xp.asarray(rng.standard_normal((30, C)).astype(np.float32))
    layer = cupybn.BatchNorm1d(C, device=device, activation="relu")
    getattr(layer, buffer)[...] = 0.5
    setattr(layer, role, getattr(layer, buffer))
    layer.track_running_stats = False
    _, vjp_fn = layer.vjp(x)
    before = bits(*vjp_fn(x)[:3])
    layer.track_running_stats = True
    layer(9 * x)
    assert bits(*vjp_fn(x)[:3]) == before


def test_one_array_for_both_running_statistics(xp, rng):
    """The variance is written last, and after it the output, if the array is part of it."""
    for with_out in False, True:
        given = arguments(xp, rng, (4, C, 6))
        both = given["out"][1, :, 2] if with_out else given["running_mean"]
        given |= {"running_mean": both, "running_var": both}
        alone = separate(given)
        assert call(given, given["residual"], True, with_out) == call(alone, given["residual"], True, with_out)
        assert with_out or bits(both) == bits(alone["running_var"])


def test_nothing_is_written_to_buffers_in_eval_mode(rng):
    """One array for both running statistics may be read-only there."""
    given = arguments(np, rng, (30, C))
    given["running_mean"] = given["running_var"]
    given["running_var"].flags.writeable = False
    check(given, given["residual"], False, False, ("running_mean", "running_var"))


def test_columns_of_one_array_are_no_overlap(xp, rng):
    """Columns of one array have no element in common: nothing is copied, and `vjp_fn` holds the weight by reference."""
    x = xp.asarray(rng.standard_normal((30, C)).astype(np.float32))
    table = xp.asarray(rng.uniform(0.5, 2, (C, 4)).astype(np.float32))
    alone = table.copy()
    mean, var, weight, bias = (table[:, i] for i in range(4))
    y, vjp_fn = F.batch_norm_vjp(x, mean, var, weight, bias, True)
    columns = [alone[:, i].copy() for i in range(4)]
    assert bits(y) == bits(F.batch_norm(x, *columns, True))
    assert bits(mean, var) == bits(*columns[:2])
    before = to_numpy(vjp_fn(x).input).copy()
    weight *= 2
    np.testing.assert_allclose(to_numpy(vjp_fn(x).input), 2 * before, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What counts as overlapping


def may_overlap(arrays):
    """The quick answer to whether the arrays share memory."""
    return overlap.may_overlap(arrays, [overlap.Extent.of(array) for array in arrays])


def test_overlapping(xp):
    memory = xp.zeros(40)
    grid = memory[:36].reshape(6, 6)
    arrays = {"all": memory, "begin": memory[:10], "end": memory[10:], "even": memory[::2], "odd": memory[1::2]}
    arrays |= {"row": grid[2], "column": grid[:, 2], "reversed": memory[9::-1], "elsewhere": xp.zeros(40)}
    arrays |= {"bytes": memory.view(np.uint8)[12:20], "empty": memory[:0], "empty rows": grid[:, :0]}
    expected = {
        *(("all", name) for name in ("begin", "end", "even", "odd", "row", "column", "reversed", "bytes")),
        *(("begin", name) for name in ("even", "odd", "column", "reversed", "bytes")),
        *(("end", name) for name in ("even", "odd", "row", "column")),
        *(("even", name) for name in ("row", "column", "reversed", "bytes")),
        *(("odd", name) for name in ("row", "reversed", "bytes")),
        *(("row", "column"), ("column", "reversed"), ("column", "bytes"), ("reversed", "bytes")),
    }
    for one, other in itertools.permutations(arrays, 2):
        found = overlap.overlapping({one: arrays[one]}, {other: arrays[other]})
        assert bool(found) == ((one, other) in expected or (other, one) in expected), (one, other)


def test_the_quick_answer_counts_the_last_element(xp):
    """Neighbours do not overlap, and an array with itself does."""
    memory = xp.zeros(5)
    for other, expected in (memory[2:], True), (memory[:1:-1], True), (memory[3:], False):
        pair = [memory[:3], other]
        for arrays in pair, pair[::-1]:
            assert may_overlap(arrays) == expected
            assert may_overlap([xp.zeros(2), *arrays, xp.zeros(3)]) == expected
    assert may_overlap([memory, xp.zeros(2), memory])
    assert may_overlap([xp.zeros(2), memory[::2], memory[1::2]])  # whose ends cross


def test_overlapping_names_what_overlaps_with_other_names(xp):
    a, b = xp.zeros(3), xp.zeros(3)
    assert overlap.overlapping({"a": a, "b": b}, {"a": a, "b": b}) == []
    assert overlap.overlapping({"a": a, "b": b, "c": a[1:]}, {"a": a}) == ["c"]
    assert overlap.overlapping({"a": a, "b": b}, {}) == []


def test_arrays_too_intricate_to_decide_count_as_overlapping(xp):
    """Arrays with strides that make the search for a common element too hard count as overlapping."""
    strides = [8 * s for s in (3, 5, 7, 11, 13, 17, 19, 23)]
    shape = (7,) * len(strides)
    memory = xp.zeros(sum(s * 6 for s in (3, 5, 7, 11, 13, 17, 19, 23)) + 2)
    one = xp.lib.stride_tricks.as_strided(memory, shape, strides)
    other = xp.lib.stride_tricks.as_strided(memory[1:], shape, strides)
    assert overlap.overlapping({"one": one}, {"other": other}) == ["one"]


def test_buffers_that_do_not_move_are_not_written(rng):
    """Running statistics in the same memory, which cannot be written to, in eval mode: there is nothing to put back."""
    x, statistics = rng.standard_normal((4, 3)), np.ones(3)
    statistics.flags.writeable = False
    y, vjp_fn = F.batch_norm_vjp(x, statistics, statistics)
    assert bits(y) == bits(F.batch_norm(x, statistics, statistics.copy()))
    assert bits(vjp_fn(x).input) == bits(F.batch_norm_vjp(x, statistics, statistics.copy())[1](x).input)


def test_spans_of_arrays_that_reach_into_each_other(rng):
    """Whatever the order of arrays and the signs of their strides, the answer is that of a look at each byte."""
    memory = np.zeros(64)
    answers = set()
    for _ in range(400):
        arrays = []
        for _ in range(rng.integers(1, 5)):
            start, step, size = rng.integers(0, 64), rng.choice([1, 2, -1, -3]), rng.integers(1, 9)
            stop = start + step * size
            arrays.append(memory[start : stop if stop >= 0 else None : step])
        extents = [overlap.Extent.of(array) for array in arrays]
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        taken = [i for at, (begin, end) in zip(addresses, extents, strict=True) for i in range(at + begin, at + end)]
        answers.add(len(set(taken)) < len(taken))
        assert overlap.Spans.of(extents).overlap(addresses) == (len(set(taken)) < len(taken))
    assert answers == {True, False}
