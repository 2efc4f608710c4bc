"""Masks, and batches that must not be remembered, where a batch is spread over ranks."""

from __future__ import annotations

import numpy as np

import cupybn
from tests.masked import left, spoilt
from tests.ranks.batches import whole
from tests.ranks.world import arrays_of, fill
from tests.reference import HALF_ULP, ROUNDINGS, assert_close, batch_norm, bits, moved, to_numpy


def masks(world, sizes, length, given=None, share=0.6):
    """The mask of the whole batch. Ranks that are not given one have all of their positions."""
    mask = world.random.random((sum(sizes), length)) < share
    mask[:, 0] |= share > 0
    for rank in range(world.size):
        if given is not None and rank not in given:
            mask[sum(sizes[:rank]) : sum(sizes[: rank + 1])] = True
    return mask


def check_masked_step(world, layer, tensors, mask, sizes, given=None):
    """Compare a training step with a single process that has what the masks leave, and nothing else.

    Only the ranks that are given pass their masks; None stands for all of them.
    """
    tensors = [spoilt(array, mask, 1) for array in tensors]
    x, residual, dy = (left(array, mask, 1) for array in tensors)
    weight, bias = to_numpy(layer.weight), to_numpy(layer.bias)
    expected = batch_norm(x, weight, bias, eps=layer.eps, residual=residual, relu=layer.activation == "relu", dy=dy)
    running = [to_numpy(array).copy() for array in (layer.running_mean, layer.running_var)]
    tracked = int(layer.num_batches_tracked)
    ours = world.share(mask, sizes) if given is None or world.rank in given else None
    my_x, my_residual, my_dy = (world.share(array, sizes) for array in tensors)
    y, vjp_fn = layer.vjp(my_x, my_residual, ours)
    grads = vjp_fn(my_dy)
    begin = sum(sizes[: world.rank])
    mine = mask[begin : begin + sizes[world.rank]]
    rows = slice(mask[:begin].sum(), mask[:begin].sum() + mine.sum())
    for name, array in ("y", y), ("dx", grads.input), ("dresidual", grads.residual):
        assert not to_numpy(array).swapaxes(1, 2)[~mine].any(), name
        terms = np.broadcast_to(expected.terms[name], x.shape)[rows]
        assert_close(left(array, mine, 1), getattr(expected, name)[rows], np.float32, terms, ROUNDINGS[name])
    for name, grad in ("dweight", grads.weight), ("dbias", grads.bias):
        parts = np.array(world.mpi.allgather(to_numpy(grad).astype(np.float64)))
        bound = HALF_ULP[grad.dtype.name] * np.abs(parts).sum(0) + 1e-5 * expected.terms[name]
        assert np.all(np.abs(parts.sum(0) - getattr(expected, name)) <= bound), name
    world.everywhere(*arrays_of(layer))
    for array, wanted in zip((layer.running_mean, layer.running_var), moved(*running, x), strict=True):
        assert_close(array, wanted, np.float32, roundings=4)
    assert int(layer.num_batches_tracked) == tracked + 1


def test_masks(world):
    """Masks on all ranks, on some of them alone, and with a rank that has no position left, or no samples."""
    for sizes in [3] * world.size, world.uneven():
        tensors = whole(world, (3, 8), sizes)
        for given in None, {0}, set(range(1, world.size)):
            layer = fill(world.layer(3, activation="relu"), world.random)
            check_masked_step(world, layer, tensors, masks(world, sizes, 8, given), sizes, given)
        mask = masks(world, sizes, 8)
        mask[: sizes[0] if sum(sizes[1:]) else 1] = False  # the first rank has nothing left, if another one has samples
        check_masked_step(world, fill(world.layer(3), world.random), tensors, mask, sizes)


def test_less_than_two_values_are_left_on_all_ranks(world):
    """Nothing moves on any rank, and none raises: hosts know the shapes alone."""
    sizes = [2] * world.size
    x, _, dy = whole(world, (3, 8), sizes)
    layer = fill(world.layer(3, momentum=None), world.random)
    before = bits(*arrays_of(layer))
    mask = np.zeros((sum(sizes), 8), bool)
    for left_one in False, True:
        mask[-1, 3] = left_one  # on the last rank
        y, vjp_fn = layer.vjp(world.share(spoilt(x, mask, 1), sizes), None, world.share(mask, sizes))
        grads = vjp_fn(world.share(spoilt(dy, mask, 1), sizes))
        assert bits(*arrays_of(layer)) == before
        rows = left(y, world.share(mask, sizes), 1)
        assert bits(rows) == bits(np.tile(to_numpy(layer.bias), (len(rows), 1)))
        assert np.count_nonzero(to_numpy(y)) == rows.size
        assert not to_numpy(grads.input).any()
    mask[0, 0] = True  # on the first one
    layer(world.share(x, sizes), mask=world.share(mask, sizes))
    world.everywhere(*arrays_of(layer))
    assert bits(*arrays_of(layer)) != before


def test_masks_in_eval_mode(world):
    """Nothing is exchanged: each rank has the bits of a layer of its own."""
    sizes = [2] * world.size
    x, residual, _ = whole(world, (3, 8), sizes)
    mask = masks(world, sizes, 8)
    layer = fill(world.layer(3), world.random).eval()
    given = [world.share(array, sizes) for array in (spoilt(x, mask, 1), residual, mask)]
    if world.rank == 0:
        alone = fill(cupybn.BatchNorm1d(3, device=world.device), world.random).eval()
        assert bits(layer(*given)) == bits(alone(*given))
    world.mpi.Barrier()


def test_a_wrong_mask_on_one_rank(world):
    layer = fill(world.layer(3), world.random)
    sizes = [2] * world.size
    x, _, _ = whole(world, (3, 8), sizes)
    layer(world.share(x, sizes))
    mask = world.xp.ones((2, 8) if world.rank != 1 else (2, 7), bool)
    before = bits(*arrays_of(layer))
    if world.rank == 1:
        with world.all_raise(ValueError, r"^expected mask of shape \(2, 8\)", *arrays_of(layer)):
            layer(world.share(x, sizes), mask=mask)
    elif world.host_sees:
        with world.all_raise(RuntimeError, "rank 1 raised ValueError: expected mask of shape", *arrays_of(layer)):
            layer(world.share(x, sizes), mask=mask)
    else:
        layer(world.share(x, sizes), mask=mask)
        assert bits(*arrays_of(layer)) == before
        world.mpi.Barrier()


def test_batches_that_are_not_finite(world):
    """Every rank leaves its statistics alone where any rank has what is not finite; nothing else is different."""
    sizes = [2] * world.size
    for momentum in 0.1, None:
        layer, plain = (
            fill(world.layer(3, momentum=momentum, skip_nonfinite=skip), np.random.default_rng(1))
            for skip in (True, False)
        )
        for bad in None, np.nan, None, np.inf:
            x, residual, dy = whole(world, (3, 8), sizes)
            if bad is not None:
                x[-1, 1, 3] = bad  # on the last rank
            before = bits(*arrays_of(layer))
            found = []
            for each in layer, plain:
                y, vjp_fn = each.vjp(world.share(x, sizes), world.share(residual, sizes))
                found.append(bits(y, *vjp_fn(world.share(dy, sizes))))
            assert found[0] == found[1]
            assert (world.everywhere(*arrays_of(layer)) == before) == (bad is not None)
        assert int(layer.num_batches_tracked) == 7  # two more than `fill` has set
        assert int(plain.num_batches_tracked) == 9


def test_a_variance_of_all_ranks_beyond_the_dtype(world):
    """What counts is the whole batch: the parts of all ranks are finite in float16, and their variance is not."""
    layer = fill(world.layer(3, dtype=np.float16, skip_nonfinite=True), world.random)
    before = bits(*arrays_of(layer))
    x = world.xp.full((2, 3, 4), 400 if world.rank == 0 else -400, np.float32)
    for _ in range(2):
        layer(x)
        assert world.everywhere(*arrays_of(layer)) == before
    layer(x / 10)
    assert world.everywhere(*arrays_of(layer)) != before


def test_recalibration_leaves_out(world):
    """What masks leave out is in no statistic, and no batch counts that is skipped."""
    sizes = [2] * world.size
    layer = fill(world.layer(3, skip_nonfinite=True), world.random)
    batches, values = [], []
    for bad, share in (None, 0.6), (np.nan, 0.6), (None, 0.4), (None, 0), (np.inf, 0.6):
        x, _, _ = whole(world, (3, 8), sizes)
        mask = masks(world, sizes, 8, share=share)
        x = spoilt(x, mask, 1)
        if bad is not None:
            x[-1, 1, 0] = bad
        elif share > 0:
            values.append(left(x, mask, 1).astype(np.float64))
        batches.append((world.share(x, sizes), world.share(mask, sizes)))
    cupybn.update_bn([layer], batches, lambda batch: layer(batch[0], mask=batch[1]))
    together = np.concatenate(values)
    np.testing.assert_allclose(to_numpy(layer.running_mean), together.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(to_numpy(layer.running_var), together.var(0, ddof=1), rtol=1e-6)
    assert int(layer.num_batches_tracked) == 2
    world.everywhere(*arrays_of(layer))
