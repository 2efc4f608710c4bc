"""A batch that is spread over ranks gives what the whole batch gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np

import cupybn
from cupybn import BatchNorm2d, SyncBatchNorm
from tests.ranks.world import arrays_of, fill
from tests.reference import (
    DTYPES,
    HALF_ULP,
    ROUNDINGS,
    arguments,
    assert_close,
    batch_norm,
    bits,
    in_order,
    moved,
    to_numpy,
)

# Shapes without the axis of the samples, which is the first.
SHAPES = [(3,), (3, 5), (3, 4, 5), (3, 2, 3, 2), (2, 3, 1, 2, 2), (4, 5, 3)]
AXES = [1, 1, 1, 1, 2, -1]


def whole(world, shape, sizes, dtype=np.float32, axis=1):
    """x, residual and dy of the whole batch."""
    rng = world.random
    shape = (sum(sizes), *shape)
    x, residual, dy = (to_numpy(arguments(np, rng, shape, dtype=dtype, channel_axis=axis)["input"]) for _ in range(3))
    return x, residual, dy


def close_share(world, sizes, ours, expected, name):
    """Compare a rank's share of an output or gradient with that share of the reference."""
    begin = sum(sizes[: world.rank])
    part = slice(begin, begin + sizes[world.rank])
    terms = np.broadcast_to(expected.terms[name], getattr(expected, name).shape)[part]
    assert_close(ours, getattr(expected, name)[part], ours.dtype, terms, ROUNDINGS[name])


def check_step(world, layer, x, residual, dy, sizes):
    """Compare output and gradients of a training step with the whole batch; returns the reference."""
    expected = batch_norm(
        x,
        to_numpy(layer.weight),
        to_numpy(layer.bias),
        eps=layer.eps,
        residual=residual,
        relu=layer.activation == "relu",
        channel_axis=layer.channel_axis,
        dy=dy,
    )
    running = [to_numpy(a).copy() for a in (layer.running_mean, layer.running_var)]
    tracked = int(layer.num_batches_tracked)
    share = [None if a is None else world.share(a, sizes) for a in (x, residual, dy)]
    y, vjp_fn = layer.vjp(*share[:2])
    grads = vjp_fn(share[2])
    assert y.shape == grads.input.shape == share[0].shape
    assert y.dtype == grads.input.dtype == x.dtype
    close_share(world, sizes, y, expected, "y")
    close_share(world, sizes, grads.input, expected, "dx")
    if residual is None:
        assert grads.residual is None
    else:
        close_share(world, sizes, grads.residual, expected, "dresidual")
    for name, grad in ("dweight", grads.weight), ("dbias", grads.bias):
        parts = np.array(world.mpi.allgather(to_numpy(grad).astype(np.float64)))  # each rank rounds its part
        bound = HALF_ULP[grad.dtype.name] * np.abs(parts).sum(0) + 1e-5 * expected.terms[name]
        assert np.all(np.abs(parts.sum(0) - getattr(expected, name)) <= bound)
    world.everywhere(layer.running_mean, layer.running_var, layer.num_batches_tracked)
    wanted = moved(*running, x, channel_axis=layer.channel_axis)
    for now, then in zip((layer.running_mean, layer.running_var), wanted, strict=True):
        assert_close(now, then, np.float32)
    assert layer.num_batches_tracked == tracked + 1
    world.everywhere(vjp_fn.mean, vjp_fn.var)  # also where a rank has no samples
    assert_close(vjp_fn.mean, expected.mean, x.dtype, expected.terms["mean"])
    assert_close(vjp_fn.var, expected.var, x.dtype)
    assert bits(*vjp_fn(share[2])) == bits(*grads)  # a `vjp_fn` changes nothing, though it exchanges sums at each call


def test_all_ranks_of_inputs(world):
    """Inputs of every rank and shape, with samples at the front or behind the channels, give what the whole batch
    gives.
    """
    for shape, axis in zip(SHAPES, AXES, strict=True):
        sizes = world.uneven()
        x, residual, dy = whole(world, shape, sizes, axis=axis)
        channels = x.shape[axis]
        layer = fill(world.layer(channels, channel_axis=axis), world.random)
        check_step(world, layer, x, None, dy, sizes)
        layer = fill(world.layer(channels, channel_axis=axis, activation="relu"), world.random)
        check_step(world, layer, x, residual, dy, sizes)
        check_step(world, layer, x[::-1].copy(), residual, dy, sizes)


def test_dtypes(world):
    for dtype in DTYPES:
        sizes = world.uneven()
        x, residual, dy = whole(world, (3, 4), sizes, dtype)
        layer = fill(world.layer(3, activation="relu"), world.random)
        check_step(world, layer, x, residual, dy, sizes)
        # Parameters may have any dtype, whatever the input's.
        other = ml_dtypes.bfloat16 if dtype == np.float64 else np.float64
        check_step(world, fill(world.layer(3, dtype=other), world.random), x, None, dy, sizes)


def test_float64_is_exchanged_as_float64(world):
    sizes = world.uneven()
    x = world.random.normal(1e6, 1, (sum(sizes), 3, 7))
    layer = world.layer(3, affine=False, dtype=np.float64, momentum=1.0)
    y, expected = layer(world.share(x, sizes)), batch_norm(x)
    begin = sum(sizes[: world.rank])
    error = np.abs(to_numpy(y) - expected.y[begin : begin + len(y)])
    assert np.all(error <= 1e6 * 4 * HALF_ULP["float64"] + 1e-12)
    n = x.size // 3
    np.testing.assert_allclose(to_numpy(layer.running_var), (expected.var * n / (n - 1)).astype(np.float64), rtol=1e-9)


def test_the_accuracy_of_one_process(world):
    """A spread batch is as accurate as a whole one: at a mean of a million standard deviations, with outliers, of
    constants.
    """
    sizes = [16] * world.size
    for spoil in (False, True):
        x = world.random.normal(1e6, 1, (sum(sizes), 4, 33)).astype(np.float32)
        x[:, 1] = -7e29
        if spoil:
            x[0, 0, 0], x[-1, 2, -1] = 1e10, -1e4
        layer = world.layer(4, momentum=1.0, affine=False)
        y = to_numpy(layer(world.share(x, sizes)))
        expected = batch_norm(x)
        ours = expected.y[world.rank * 16 : (world.rank + 1) * 16]
        assert np.all(np.abs(y - ours) <= 1e-6 + 2.0**-22 * np.abs(ours))
        assert np.all(y[:, 1] == 0)
        n = x.size // 4
        np.testing.assert_allclose(to_numpy(layer.running_var), expected.var * n / (n - 1), rtol=1e-6)
        single = BatchNorm2d(4, affine=False, device="cpu")(x[:, :, None])[:, :, 0]
        np.testing.assert_allclose(world.gather(y), single, rtol=2.0**-22, atol=2e-6)


def test_nan_stays_in_its_channel(world):
    sizes = [2] * world.size
    x = world.random.standard_normal((sum(sizes), 3, 5)).astype(np.float32)
    clean = to_numpy(world.layer(3)(world.share(x, sizes)))
    x[0, 1, 0] = np.nan
    spoilt = to_numpy(world.layer(3)(world.share(x, sizes)))
    assert np.isnan(spoilt[:, 1]).all()
    np.testing.assert_array_equal(spoilt[:, ::2], clean[:, ::2])


def test_one_value_for_each_channel_of_each_rank(world):
    x = world.random.standard_normal((world.size, 3)).astype(np.float32)
    check_step(world, fill(world.layer(3), world.random), x, None, x[::-1].copy(), [1] * world.size)


def test_one_value_on_all_ranks_together(world):
    """One value for each channel on all ranks together is an error where the host sees it; running statistics stay."""
    layer = fill(world.layer(3), world.random)
    sizes = [1] + [0] * (world.size - 1)
    x = world.share(np.full((1, 3), 2, np.float32), sizes)
    if world.host_sees:
        with world.all_raise(ValueError, "Expected more than 1 value per channel when training", *arrays_of(layer)):
            layer(x)
    else:
        before = bits(*arrays_of(layer))
        np.testing.assert_array_equal(to_numpy(layer(x)), np.tile(to_numpy(layer.bias), (len(x), 1)))
        assert bits(*arrays_of(layer)) == before


def test_nothing_on_any_rank_changes_nothing(world):
    for shape in (0, 3, 4), (2, 3, 0):
        layer = fill(world.layer(3, momentum=None), world.random)
        before = bits(*arrays_of(layer))
        x = world.xp.empty(shape, np.float32)
        y, vjp_fn = layer.vjp(x, x)
        grads = vjp_fn(x)
        assert y.shape == grads.input.shape == grads.residual.shape == shape
        assert bits(*arrays_of(layer)) == before
        assert not to_numpy(grads.weight).any()
        assert not to_numpy(grads.bias).any()


def test_every_rank_may_lie_in_memory_as_it_likes(world):
    """Running statistics have the same bits on all ranks, though each rank's input has a memory order of its own."""
    sizes = [3] * world.size
    x, _, dy = whole(world, (4, 6, 5), sizes)
    layer = fill(world.layer(4), world.random)
    share = world.share(x, sizes)
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)]
    y, vjp_fn = layer.vjp(in_order(share, orders[world.rank % 3]))
    grads = vjp_fn(in_order(world.share(dy, sizes), orders[(world.rank + 1) % 3]))
    expected = batch_norm(x, to_numpy(layer.weight), to_numpy(layer.bias), dy=dy)
    close_share(world, sizes, y, expected, "y")
    close_share(world, sizes, grads.input, expected, "dx")
    world.everywhere(layer.running_mean, layer.running_var)


def test_cumulative_momentum(world):
    sizes = world.uneven()
    layer = world.layer(3, momentum=None)
    batches = [world.random.normal(k, 1 + k, (sum(sizes), 3, 4)).astype(np.float32) for k in range(3)]
    for x in batches:
        layer(world.share(x, sizes))
    expected = np.mean([batch_norm(x).mean for x in batches], axis=0)
    np.testing.assert_allclose(to_numpy(layer.running_mean), expected, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 3
    world.everywhere(*arrays_of(layer))


def test_which_statistics_move(world):
    """Running statistics move as in a single process: not in `no_stats_update`, nor without tracking or buffers."""
    sizes = [2] * world.size
    x = world.random.standard_normal((sum(sizes), 3, 4)).astype(np.float32)
    share, expected = world.share(x, sizes), batch_norm(x)
    frozen = world.layer(3)
    frozen.track_running_stats = False
    bare = world.layer(3, affine=False, track_running_stats=False)
    for layer in frozen, bare:
        before = bits(*arrays_of(layer))
        close_share(world, sizes, layer(share), expected, "y")
        assert bits(*arrays_of(layer)) == before
    layer = world.layer(3)
    before = bits(*arrays_of(layer))
    with cupybn.no_stats_update():
        close_share(world, sizes, layer(share), expected, "y")
    assert bits(*arrays_of(layer)) == before
    # The number of positions may change from pass to pass.
    close_share(world, sizes, bare(share[..., :2]), batch_norm(x[..., :2]), "y")


def test_a_layer_without_arrays_takes_any_number_of_channels(world):
    layer, sizes = world.layer(None, affine=False, track_running_stats=False), world.uneven()
    for C in 3, 5, 3:
        x = world.random.standard_normal((sum(sizes), C, 2)).astype(np.float32)
        close_share(world, sizes, layer(world.share(x, sizes)), batch_norm(x), "y")


def test_lazy_layers(world):
    """A lazy layer takes its number of features from its input, even if its share is empty."""
    sizes = world.uneven()
    x, residual, dy = whole(world, (3, 4), sizes)
    layer = world.layer(None, activation="relu")
    layer(world.share(x, sizes))
    assert layer.num_features == 3
    check_step(world, layer, x, residual, dy, sizes)


def test_eval_mode_exchanges_nothing(world):
    """A layer in eval mode sends no message, not even one without buffers, which uses its own batch."""
    layers = world.layer(3).eval(), world.layer(3, track_running_stats=False).eval()
    if world.rank == 0:
        x = world.random.standard_normal((4, 3, 2)).astype(np.float32)
        dy = world.xp.asarray(x[::-1].copy())
        for layer, running in zip(layers, [(np.zeros(3), np.ones(3)), None], strict=True):
            expected = batch_norm(x, running=running, dy=to_numpy(dy))
            y, vjp_fn = layer.vjp(world.xp.asarray(x))
            assert_close(y, expected.y, np.float32, expected.terms["y"])
            assert_close(vjp_fn(dy).input, expected.dx, np.float32, expected.terms["dx"], ROUNDINGS["dx"])
    world.mpi.Barrier()


def test_a_vjp_fn_outlives_the_next_passes(world):
    """A `vjp_fn` goes back through the pass that made it, in the mode of that pass, whatever passes come later."""
    sizes = world.uneven()
    x, _, dy = whole(world, (3, 4), sizes)
    layer = world.layer(3)
    _, vjp_fn = layer.vjp(world.share(x, sizes))
    first = bits(*vjp_fn(world.share(dy, sizes)))
    layer(world.share(3 * x[::-1].copy(), sizes))
    layer.eval()
    assert bits(*vjp_fn(world.share(dy, sizes))) == first


def test_a_graph_of_a_training_step(world):
    """A training step over NCCL can be captured, as no message waits for the host; replays use new data and keep
    counting.
    """
    if world.engine != "nccl":
        return
    sizes = [2] * world.size
    first, dy, second = whole(world, (3, 4), sizes)
    x, dy = world.share(first, sizes), world.share(dy, sizes)
    layer, plain = world.layer(3, momentum=None), world.layer(3, momentum=None)
    stream = world.xp.cuda.Stream(non_blocking=True)
    with stream:
        with cupybn.no_stats_update():
            layer.vjp(x)[1](dy)  # compiles the kernels, and lets the ranks compare their channels
        stream.begin_capture()
        y, vjp_fn = layer.vjp(x)
        grads = vjp_fn(dy)
        graph = stream.end_capture()
        for batch in first, second:
            x[...] = world.share(batch, sizes)
            graph.launch()
            stream.synchronize()
            expected, plain_vjp_fn = plain.vjp(world.share(batch, sizes))
            stream.synchronize()
            assert bits(y, *grads) == bits(expected, *plain_vjp_fn(dy))
    assert bits(*arrays_of(layer)) == bits(*arrays_of(plain))
    assert layer.num_batches_tracked == 2


def test_parts_of_the_world(world):
    """Ranks of a group share statistics among themselves alone; one rank alone gives the bits of a single process."""
    if world.engine != "mpi":
        return
    comm = world.mpi.Split(world.rank % 2)
    x = world.random.standard_normal((world.size, 2, 3, 4)).astype(np.float32)
    layer = world.layer(3, comm=comm)
    y = to_numpy(layer(world.xp.asarray(x[world.rank])))
    mine = x[world.rank % 2 :: 2].reshape(-1, 3, 4)
    begin = 2 * comm.rank
    assert_close(y, batch_norm(mine).y[begin : begin + 2], np.float32)
    comm.Free()

    from mpi4py import MPI

    share = world.xp.asarray(x[world.rank])[..., None]
    alone, plain = world.layer(3, comm=MPI.COMM_SELF), BatchNorm2d(3, device=world.device)
    assert bits(alone(share), *arrays_of(alone)) == bits(plain(share), *arrays_of(plain))


def test_shared_arrays(world):
    sizes = world.uneven()
    x, residual, dy = whole(world, (3, 4, 2), sizes)
    plain = fill(BatchNorm2d(3, device=world.device, activation="relu"), world.random)
    layer = SyncBatchNorm.from_batchnorm(plain, world.comm)
    check_step(world, layer, x, residual, dy, sizes)
    assert all(a is b for a, b in zip(arrays_of(layer), arrays_of(plain), strict=True))
    back = layer.to_batchnorm()
    assert type(back) is BatchNorm2d
    assert all(a is b for a, b in zip(arrays_of(back), arrays_of(plain), strict=True))
    if sizes[world.rank]:
        share = world.share(x, sizes)
        assert bits(back.eval()(share)) == bits(layer.eval()(share))


def test_recalibration(world):
    """Running statistics become the moments of what all ranks have seen, however it is spread; empty batches do not
    count.
    """
    layers = fill(world.layer(3), world.random), world.layer(None, activation="relu")
    batches = [world.random.normal(1e3 * k, 1, (5 * world.size, 3, 5)).astype(np.float32) for k in range(3)]
    spreads = world.uneven(), world.uneven(least=2), [0] * world.size
    whole_batches = [x[: sum(sizes)] for x, sizes in zip(batches, spreads, strict=True)]
    shares = [world.share(x, sizes) for x, sizes in zip(batches, spreads, strict=True)]
    cupybn.update_bn(layers, shares, lambda x: layers[1].vjp(layers[0](x)))
    seen = np.concatenate(whole_batches).transpose(1, 0, 2).reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(to_numpy(layers[0].running_mean), seen.mean(1), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(layers[0].running_var), seen.var(1, ddof=1), rtol=1e-6)
    assert layers[0].num_batches_tracked == layers[1].num_batches_tracked == 2
    world.everywhere(*(array for layer in layers for array in arrays_of(layer)[2:]))

    before = bits(*(array for layer in layers for array in arrays_of(layer)))
    cupybn.update_bn(layers, shares[2:], lambda x: layers[1](layers[0](x)))  # on all ranks together, nothing is seen
    assert bits(*(array for layer in layers for array in arrays_of(layer))) == before
    if not world.host_sees:
        return
    failing = world.rank == 1
    expected = (ValueError, "^expected at least 2D") if failing else (RuntimeError, "rank 1 raised ValueError")
    with world.all_raise(*expected, *(array for layer in layers for array in arrays_of(layer))):
        cupybn.update_bn(layers, shares, lambda x: layers[0](x[:, 0, 0] if failing and x is shares[2] else x))

    resized = world.layer(3, affine=False)

    def resize(x):
        resized(x)
        if failing:
            resized.running_mean, resized.running_var = resized.running_mean[:2], resized.running_var[:2]
        resized(x[:, :2] if failing else x)

    expected = (
        (ValueError, "^expected input with 3 channels") if failing else (RuntimeError, "rank 1 raised ValueError")
    )
    with world.all_raise(*expected, *arrays_of(resized)):
        cupybn.update_bn([resized], shares, resize)
