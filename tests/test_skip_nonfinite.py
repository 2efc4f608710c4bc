"""Batches that must not be remembered: running statistics that stay where a batch is not finite in their dtype."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from tests.masked import masked_arguments
from tests.reference import DTYPES, arguments, bits, exactly, to_numpy

SHAPE = (4, 3, 8)
BAD = np.nan, np.inf, -np.inf
FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


def batch(xp, rng, bad=None, dtype=np.float32):
    """A batch of SHAPE, with a value that is not finite in channel 1 if one is given."""
    x = rng.normal(size=SHAPE).astype(dtype)
    if bad is not None:
        x[2, 1, 3] = bad
    return xp.asarray(x)


def buffers(xp, mean_dtype=np.float32, var_dtype=None):
    """Running statistics that are not what a batch has."""
    var_dtype = mean_dtype if var_dtype is None else var_dtype
    return xp.asarray(np.array([7, 8, 9], mean_dtype)), xp.asarray(np.array([2, 3, 4], var_dtype))


def state(layer):
    """The bits of all that a layer holds."""
    return bits(*layer.state_dict().values())


# ---------------------------------------------------------------------------------------------------------------------
# Functions


@pytest.mark.parametrize("bad", [None, *BAD])
def test_a_batch_that_is_not_finite(way, rng, bad):
    """No channel moves; outputs and gradients are those without skipping, to the bit."""
    x, dy = batch(way, rng, bad), batch(way, rng)
    found = []
    for skip in False, True:
        running = buffers(way)
        before = bits(*running)
        for _ in range(2):
            y, vjp_fn = F.batch_norm_vjp(x, *running, training=True, activation="relu", skip_nonfinite=skip)
            assert (bits(*running) == before) == (skip and bad is not None)
        found.append(bits(y, *vjp_fn(dy), vjp_fn.mean, vjp_fn.var, *(running if bad is None else ())))
        again = buffers(way)
        out = way.zeros(SHAPE, np.float32)
        F.batch_norm(x, *again, training=True, activation="relu", skip_nonfinite=skip, out=out)
        assert bits(out) == bits(y)
        assert (bits(*again) == before) == (skip and bad is not None)
    assert found[0] == found[1]


@pytest.mark.parametrize("bad", BAD)
def test_it_is_the_batch_that_counts(way, rng, bad):
    """Statistics that are not finite move as ever where the batch is."""
    running, expected = buffers(way), buffers(way)
    for statistics in running, expected:
        statistics[0][0], statistics[1][2] = bad, bad
    x = batch(way, rng)
    F.batch_norm(x, *running, training=True, skip_nonfinite=True)
    F.batch_norm(x, *expected, training=True)
    assert bits(*running) == bits(*expected)
    assert to_numpy(running[1])[0] != 2


def pair(xp, low, high, shape=SHAPE, dtype=np.float32):
    """A batch whose values in channel 1 are these two, half of them each, and 0 and 1 in all others."""
    x = np.zeros(shape, dtype)
    x[::2] = 1
    x[:, 1], x[::2, 1] = low, high
    return xp.asarray(x)


NUMBERS = {
    "mean beyond float16": (FLOAT16, FLOAT32, 1e5, 1e5, False),
    "mean within float32": (FLOAT32, FLOAT32, 1e5, 1e5, True),
    "mean that rounds to the largest float16": (FLOAT16, FLOAT16, 65519.0, 65519.0, True),
    "mean that rounds beyond": (FLOAT16, FLOAT16, 65520.0, 65520.0, False),
    "mean in the other buffer's dtype": (FLOAT32, FLOAT16, 1e5, 1e5, True),
    "variance beyond float16": (FLOAT32, FLOAT16, -300, 300, False),
    "variance within float32": (FLOAT16, FLOAT32, -300, 300, True),
    "variance beyond float32": (FLOAT32, FLOAT32, -1e20, 1e20, False),
    "variance beyond bfloat16": (FLOAT32, np.dtype(ml_dtypes.bfloat16), -1e20, 1e20, False),
    "variance within float64": (FLOAT32, np.dtype(np.float64), -1e20, 1e20, True),
    "unbiased variance alone beyond float16": (FLOAT16, FLOAT16, -252, 252, False),  # 63504 * 32 / 31 = 65552.5
    "unbiased variance just within float16": (FLOAT16, FLOAT16, -251.5, 251.5, True),  # 63252.25 * 32 / 31 = 65292.6
    "negative mean beyond bfloat16": (np.dtype(ml_dtypes.bfloat16), FLOAT32, -3.4e38, -3.4e38, False),
}
"""Dtypes of both buffers, values of a channel, and whether its mean and unbiased variance are finite there."""


@pytest.mark.parametrize(("mean_dtype", "var_dtype", "low", "high", "finite"), NUMBERS.values(), ids=NUMBERS)
def test_finite_in_the_dtype_of_its_buffer(way, mean_dtype, var_dtype, low, high, finite):
    running = buffers(way, mean_dtype, var_dtype)
    before, x = bits(*running), pair(way, low, high)
    F.batch_norm(x, *running, training=True, skip_nonfinite=True)
    assert (bits(*running) != before) == finite
    if finite:
        expected = buffers(way, mean_dtype, var_dtype)
        F.batch_norm(x, *expected, training=True)
        assert bits(*running) == bits(*expected)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, float("nan")])
def test_momentum_does_not_decide(xp, rng, momentum):
    """A momentum of 0 leaves statistics alone that a batch would turn into NaN; one of NaN makes them NaN."""
    running = buffers(xp)
    before = bits(*running)
    F.batch_norm(batch(xp, rng, np.inf), *running, training=True, momentum=momentum, skip_nonfinite=True)
    assert bits(*running) == before
    F.batch_norm(batch(xp, rng), *running, training=True, momentum=momentum, skip_nonfinite=True)
    assert np.isnan(to_numpy(running[0])).all() == np.isnan(momentum)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_every_dtype(rng, dtype):
    for bad in (None, *BAD):
        running = buffers(np, np.float64)
        before = bits(*running)
        F.batch_norm(batch(np, rng, bad, dtype), *running, training=True, skip_nonfinite=True)
        assert (bits(*running) == before) == (bad is not None)


def test_a_mask_decides_on_what_there_is(xp, rng):
    """What is masked out is not looked at, be it NaN; what is left is."""
    given, _ = masked_arguments(xp, rng, SHAPE)
    given |= {"training": True, "skip_nonfinite": True}
    plain = given | {"skip_nonfinite": False} | dict(zip(("running_mean", "running_var"), buffers(xp), strict=True))
    given |= dict(zip(("running_mean", "running_var"), buffers(xp), strict=True))
    before = bits(given["running_mean"], given["running_var"])
    F.batch_norm(**given)
    F.batch_norm(**plain)
    assert bits(given["running_mean"], given["running_var"]) == bits(plain["running_mean"], plain["running_var"])
    moved = bits(given["running_mean"], given["running_var"])
    assert moved != before
    n, position = np.argwhere(to_numpy(given["mask"]))[0]
    given["input"][n, 1, position] = np.inf
    F.batch_norm(**given)
    assert bits(given["running_mean"], given["running_var"]) == moved


def test_arrays_that_share_memory(xp, rng):
    """Buffers that overlap each other, and a weight that is one of them, are skipped and moved as others."""
    for bad in None, np.nan:
        x = batch(xp, rng, bad)
        found = []
        for skip in False, True:
            memory = xp.asarray(np.arange(1, 5, dtype=np.float32))
            y = F.batch_norm(x, memory[:3], memory[1:], memory[1:], training=True, skip_nonfinite=skip)
            found.append(bits(memory, y))
            assert (memory.tolist() == [1, 2, 3, 4]) == (skip and bad is not None)
        assert found[0] == found[1] or bad is not None
        assert found[0][1] == found[1][1]


def test_nothing_to_move(xp, rng):
    """The setting does not matter in eval mode, and without buffers."""
    x = batch(xp, rng, np.inf)
    running = buffers(xp)
    before = bits(*running)
    for training, given in (False, running), (True, (None, None)):
        expected = bits(F.batch_norm(x, *given, training=training))
        assert bits(F.batch_norm(x, *given, training=training, skip_nonfinite=True)) == expected
    assert bits(*running) == before


WRONG = {"None": None, "1": 1, "0": 0, "1.0": 1.0, "'no'": "no", "list": [True]}


@pytest.mark.parametrize(("text", "value"), WRONG.items(), ids=WRONG)
def test_what_is_no_bool(xp, device, rng, text, value):
    """Anything else is an error in both modes that changes nothing, also right after a call with True or False."""
    shown = text if text != "list" else repr(value)
    message = exactly(f"expected skip_nonfinite to be a bool (got {shown})")
    x, running = batch(xp, rng), buffers(xp)
    layer = BatchNorm1d(3, device=device)
    for training in True, False:
        layer.train(training)
        for good in True, False, np.True_, np.False_:
            layer.skip_nonfinite = good
            F.batch_norm(x, *running, training=training, skip_nonfinite=good)
            layer(x)
            before = bits(*running) + state(layer)
            layer.skip_nonfinite = value
            for function in F.batch_norm, F.batch_norm_vjp:
                with pytest.raises(TypeError, match=message):
                    function(x, *running, training=training, skip_nonfinite=value)
            for call in layer, layer.vjp:
                for layer.track_running_stats in False, True:
                    with pytest.raises(TypeError, match=message):
                        call(x)
            assert bits(*running) + state(layer) == before
    with pytest.raises(TypeError, match=message):
        BatchNorm1d(3, device=device, skip_nonfinite=value)


def test_bools_of_numpy(way, rng):
    x = batch(way, rng, np.nan)
    for skip in np.True_, np.False_, True, False:
        running = buffers(way)
        before = bits(*running)
        F.batch_norm(x, *running, training=True, skip_nonfinite=skip)
        assert (bits(*running) == before) == bool(skip)


def test_it_is_keyword_only(rng):
    for function in F.batch_norm, F.batch_norm_vjp:
        with pytest.raises(TypeError, match="positional"):
            function(batch(np, rng), *buffers(np), None, None, True, 0.1, 1e-5, True)
    with pytest.raises(TypeError, match="positional"):
        BatchNorm1d(3, 1e-5, 0.1, True, True, "cpu", None, True)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", BAD)
def test_layers(way, rng, momentum, bad):
    """Neither statistics nor counter know of a batch that was skipped: what follows is as if it had not been."""
    device = "cpu" if way is np else "cuda:0"
    layer, other = (BatchNorm1d(3, momentum=momentum, device=device, skip_nonfinite=skip) for skip in (True, False))
    for spoilt in None, bad, None, bad, bad, None:
        x = batch(way, rng, spoilt)
        before = state(layer)
        y, vjp_fn = layer.vjp(x)
        if spoilt is None:
            other(x)
        else:
            assert state(layer) == before
            with cupybn.no_stats_update():
                expected, other_vjp_fn = other.vjp(x)
            assert bits(y, *vjp_fn(x)) == bits(expected, *other_vjp_fn(x))
        assert state(layer) == state(other)
    assert layer.num_batches_tracked == 3


KINDS = {
    "1d": (BatchNorm1d, (4, 3)),
    "2d": (BatchNorm2d, (4, 3, 2, 4)),
    "3d": (BatchNorm3d, (2, 3, 2, 2, 2)),
    "synchronized": (SyncBatchNorm, (4, 3, 2, 4)),
}


@pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS)
def test_every_layer_has_it(xp, device, rng, kind, shape):
    """An attribute, False unless told otherwise, which is read at every call."""
    x = arguments(xp, rng, shape)["input"]
    x[0, 0] = np.inf
    layer = kind(3, device=device)
    assert layer.skip_nonfinite is False
    layer.skip_nonfinite = True
    fresh = state(layer)
    layer(x)
    assert state(layer) == fresh
    layer.skip_nonfinite = False
    layer(x)
    assert layer.num_batches_tracked == 1
    assert not np.isfinite(to_numpy(layer.running_mean)[0])
    assert kind(3, device=device, skip_nonfinite=True).skip_nonfinite is True


def test_a_layer_without_features(xp, device, rng):
    layer = BatchNorm1d(None, device=device, skip_nonfinite=True)
    layer(batch(xp, rng, np.nan))
    assert layer.num_features == 3
    assert layer.num_batches_tracked == 0
    assert to_numpy(layer.running_var).tolist() == [1, 1, 1]


def test_text():
    for kind, _ in KINDS.values():
        text = repr(kind(3, device="cpu"))
        assert "skip_nonfinite" not in text
        assert repr(kind(3, device="cpu", skip_nonfinite=True)) == text[:-1] + ", skip_nonfinite=True)"
    layer = BatchNorm2d(3, channel_axis=-1, activation="relu", skip_nonfinite=True, device="cpu")
    assert repr(layer).endswith("channel_axis=-1, activation='relu', skip_nonfinite=True)")


@pytest.mark.parametrize("kind", [BatchNorm1d, SyncBatchNorm])
def test_copies_and_pickles(xp, device, rng, kind):
    layer = kind(3, device=device, skip_nonfinite=True)
    for other in copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert other.skip_nonfinite is True
        before = state(other)
        other(batch(xp, rng, np.nan))
        assert state(other) == before


@pytest.mark.parametrize("kind", [BatchNorm1d, SyncBatchNorm])
def test_pickles_of_older_layers(xp, device, rng, kind):
    """A layer that was pickled before there was the setting is one that does not skip."""
    layer = kind(3, device=device)
    older = layer.__getstate__() if kind is SyncBatchNorm else dict(vars(layer))
    older = {name: value for name, value in older.items() if name != "skip_nonfinite"}
    new = kind.__new__(kind)
    new.__setstate__(older)
    assert repr(new) == repr(layer)
    new(batch(xp, rng, np.nan))
    assert new.num_batches_tracked == 1
    for other in copy.deepcopy(new), SyncBatchNorm.from_batchnorm(new):
        assert other.skip_nonfinite is False


@pytest.mark.parametrize("skip", [True, False])
def test_conversions(skip):
    layer = BatchNorm2d(3, device="cpu", skip_nonfinite=skip)
    synchronized = SyncBatchNorm.from_batchnorm(layer)
    assert synchronized.skip_nonfinite is skip
    assert SyncBatchNorm.from_batchnorm(synchronized).skip_nonfinite is skip
    assert synchronized.to_batchnorm().skip_nonfinite is skip
    synchronized.skip_nonfinite = not skip
    assert (layer.skip_nonfinite, synchronized.to_batchnorm().skip_nonfinite) == (skip, not skip)


def test_state_dicts_do_not_have_it():
    layer, other = (BatchNorm2d(3, device="cpu", skip_nonfinite=skip) for skip in (True, False))
    assert layer.state_dict().keys() == other.state_dict().keys()
    layer.load_state_dict(other.state_dict())
    assert layer.skip_nonfinite is True
    assert layer.to(dtype=np.float64).skip_nonfinite is True


@pytest.mark.parametrize("how", ["no_stats_update", "track_running_stats", "eval", "no counter"])
def test_statistics_that_stay_anyway(xp, device, rng, how):
    layer = BatchNorm1d(3, device=device, momentum=None if how == "no counter" else 0.1, skip_nonfinite=True)
    layer.track_running_stats = how != "track_running_stats"
    layer.train(how != "eval")
    if how == "no counter":
        layer.num_batches_tracked = None
    before = state(layer)
    for bad in None, np.nan:
        if how == "no_stats_update":
            with cupybn.no_stats_update():
                layer(batch(xp, rng, bad))
        else:
            layer(batch(xp, rng, bad))
    assert state(layer) == before


def test_without_a_counter(xp, device, rng):
    layer = BatchNorm1d(3, device=device, skip_nonfinite=True)
    layer.num_batches_tracked = None
    before = state(layer)
    layer(batch(xp, rng, np.inf))
    assert state(layer) == before
    layer(batch(xp, rng))
    assert state(layer) != before


# ---------------------------------------------------------------------------------------------------------------------
# Recalibration


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_recalibration(xp, device, rng, dtype):
    """Batches that are skipped are in no statistic, and do not count: by the dtypes of the layer's buffers."""
    layer = BatchNorm1d(3, device=device, dtype=dtype, skip_nonfinite=True)
    good = [batch(xp, rng) for _ in range(3)]
    large = pair(xp, -300, 300)  # its variance is beyond float16 alone
    batches = [good[0], batch(xp, rng, np.nan), large, good[1], batch(xp, rng, np.inf), good[2]]
    cupybn.update_bn([layer], batches, layer)
    seen = good + ([large] if dtype == np.float32 else [])
    values = np.concatenate([to_numpy(x).astype(np.float64) for x in seen])
    rtol, atol = (1e-6, 1e-7) if dtype == np.float32 else (2e-3, 1e-3)
    np.testing.assert_allclose(to_numpy(layer.running_mean), values.mean((0, 2)), rtol=rtol, atol=atol)
    unbiased = values.transpose(1, 0, 2).reshape(3, -1).var(1, ddof=1)
    np.testing.assert_allclose(to_numpy(layer.running_var), unbiased, rtol=rtol)
    assert layer.num_batches_tracked == len(seen)


def test_recalibration_with_nothing_that_counts(xp, device, rng):
    layer = BatchNorm1d(3, device=device, skip_nonfinite=True)
    layer(batch(xp, rng))
    before = state(layer)
    cupybn.update_bn([layer], [batch(xp, rng, bad) for bad in BAD], layer)
    assert state(layer) == before


def test_recalibration_gives_the_setting_back(rng):
    """A setting that a pass changes is what it was in the end; and it is read at every call."""
    layer = BatchNorm1d(3, device="cpu")

    def forward(x):
        layer.skip_nonfinite = True
        layer(x)

    cupybn.update_bn([layer], [batch(np, rng), batch(np, rng, np.nan)], forward)
    assert layer.skip_nonfinite is False
    assert layer.num_batches_tracked == 1
    assert np.isfinite(layer.running_var).all()


# ---------------------------------------------------------------------------------------------------------------------
# Launches that are made again


def test_a_tape_of_calls_that_do_not_skip(xp, rng):
    """Calls that differ in the setting alone do not take each other's launches."""
    for order in (False, True), (True, False):
        for skip in order * 2:
            running = buffers(xp)
            before = bits(*running)
            F.batch_norm(batch(xp, rng, np.nan), *running, training=True, skip_nonfinite=skip)
            assert (bits(*running) == before) == skip


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_graph(rng, momentum):
    """A captured step decides anew at each launch, with the mask and the batch that it finds then."""
    cp = pytest.importorskip("cupy")
    x, mask = cp.zeros(SHAPE, np.float32), cp.ones((4, 8), bool)
    layer, plain = (BatchNorm1d(3, momentum=momentum, device="cuda:0", skip_nonfinite=True) for _ in range(2))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        with cupybn.no_stats_update():
            layer.vjp(x, mask=mask)[1](x)  # compiles the kernels
        stream.begin_capture()
        y, vjp_fn = layer.vjp(x, mask=mask)
        grads = vjp_fn(x)
        graph = stream.end_capture()
        for bad, share in (None, 0.7), (np.nan, 0.7), (None, 0.5), (np.inf, 1.1), (None, 0), (None, 1.1):
            x[...] = batch(cp, rng, bad)
            left = rng.random((4, 8)) < share
            left[2, 3] = share > 0  # where the bad value is
            mask[...] = cp.asarray(left)
            graph.launch()
            stream.synchronize()
            expected, plain_vjp_fn = plain.vjp(x, mask=mask)
            assert bits(y, *grads) == bits(expected, *plain_vjp_fn(x))
            assert state(layer) == state(plain)
    assert layer.num_batches_tracked == 3
