"""Faults of one rank are raised on all ranks and change nothing, and the next pass works again."""

from __future__ import annotations

import copy
import pickle
import time

import numpy as np
import pytest

from cupybn._ranks import engines
from cupybn._steps import cupy_ops, numpy_ops
from tests.ranks.world import arrays_of, fill
from tests.reference import bits, to_numpy


def share_of(world, C=3, dtype=np.float32):
    return world.xp.asarray(np.random.default_rng(world.rank).standard_normal((4, C, 2)).astype(dtype))


def works(world, layer):
    """Check that a training step works, forward and back."""
    y, vjp_fn = layer.vjp(share_of(world))
    np.testing.assert_allclose(world.gather(y).mean((0, 2)), to_numpy(layer.bias), rtol=0, atol=1e-5)
    assert np.isfinite(to_numpy(vjp_fn(y).input)).all()
    world.everywhere(*(layer.state_dict()[name] for name in ("running_mean", "running_var", "num_batches_tracked")))


def test_another_number_of_channels(world):
    layer = world.layer(4 if world.rank == 1 else 3)
    with world.all_raise(
        RuntimeError, r"rank 0 has 3 channels of float32 in \w+ arrays; rank 1 has 4", *arrays_of(layer)
    ):
        layer(share_of(world, layer.num_features))
    with world.all_raise(RuntimeError, "rank 1 has 4 channels", *arrays_of(layer)):  # the same error each time
        layer(share_of(world, layer.num_features))
    works(world, world.layer(3))


def test_another_dtype(world):
    layer = world.layer(3)
    odd = np.float64 if world.rank == world.size - 1 else np.float32
    with world.all_raise(RuntimeError, f"rank {world.size - 1} has 3 channels of float64", *arrays_of(layer)):
        layer(share_of(world, dtype=odd))
    works(world, layer)
    if world.host_sees:  # the host also notices it later than in the first pass
        with world.all_raise(RuntimeError, f"rank {world.size - 1} has 3 channels of float64", *arrays_of(layer)):
            layer(share_of(world, dtype=odd))
        works(world, layer)


def test_a_rank_that_raises(world):
    """An error of one rank is raised on all, before the first exchange, whose length is not yet known, and later on."""
    for lazy in False, True:
        layer = world.layer(None if lazy else 3)
        for again in False, True:
            failing = world.rank == 1
            expected = (
                (ValueError, r"^expected at least 2D") if failing else (RuntimeError, r"rank 1 raised ValueError")
            )
            if again and not world.host_sees and not failing:
                before = bits(*arrays_of(layer))
                assert np.isnan(to_numpy(layer(share_of(world)))).all()
                assert bits(*arrays_of(layer)) == before
                world.mpi.Barrier()
            else:
                with world.all_raise(*expected, *arrays_of(layer)):
                    layer(share_of(world)[:, 0, 0] if failing else share_of(world))
            if not again:
                assert (layer.num_features is None) == lazy
            works(world, layer)


def test_several_ranks_that_raise(world):
    layer = world.layer(3)
    if world.rank == 0:
        with world.all_raise(RuntimeError, "rank 1 raised TypeError: expected residual"):
            layer(share_of(world))
    else:
        with world.all_raise(TypeError, "^expected residual"):
            layer(share_of(world), residual="no array")
    works(world, layer)


def test_ranks_that_raise_on_the_way_back(world):
    """An error on the way back is raised on all ranks, whether one rank has it or all but one."""
    layer = world.layer(3)
    y, vjp_fn = layer.vjp(share_of(world))
    for first in 0, 1:
        if (world.rank == 0) == (first == 0):
            with world.all_raise(ValueError, "^expected grad_output of the input's shape"):
                vjp_fn(y[:1])
        elif world.host_sees:
            with world.all_raise(RuntimeError, f"rank {first} raised ValueError: expected grad_output"):
                vjp_fn(y)
        else:
            assert np.isnan(to_numpy(vjp_fn(y).input)).all()
            world.mpi.Barrier()
        assert np.isfinite(to_numpy(vjp_fn(y).input)).all()
        works(world, layer)


def test_errors_of_a_single_process_are_raised_on_all(world):
    """Errors that each rank finds by itself are raised as in a single process, though the ranks tell each other."""
    layer = world.layer(3)
    with world.all_raise(ValueError, r"^expected 3 channels \(num_features\) on axis 1, got 5", *arrays_of(layer)):
        layer(share_of(world, 5))
    layer.eps = 0.0
    with world.all_raise(ValueError, "^batch_norm eps must be positive", *arrays_of(layer)):
        layer(share_of(world))
    layer.eps = 1e-5
    works(world, layer)


def test_arrays_that_the_engine_does_not_know(world):
    if world.engine not in ("cupyx", "nccl"):
        return
    layer = world.layer(3, device="cpu")
    with world.all_raise(TypeError, r"^expected input to be a CuPy array on cuda:\d, as the communicator is"):
        layer(to_numpy(share_of(world)))


def test_layers_without_arrays_compare_their_channels_each_time(world):
    """Layers without arrays compare their channels in each pass, as each pass may have another number of them."""
    layer = world.layer(None, affine=False, track_running_stats=False)
    for C in 3, 5:
        layer(share_of(world, C))
    with world.all_raise(RuntimeError, r"rank 0 has 3 channels of float32 .*; rank 1 has 5"):
        layer(share_of(world, 3 if world.rank == 0 else 5))
    y, vjp_fn = layer.vjp(share_of(world, 5))
    layer(share_of(world, 3))
    if world.rank == 0:
        with world.all_raise(ValueError, "^expected grad_output"):
            vjp_fn(y[:1])
    elif world.host_sees:
        with world.all_raise(RuntimeError, "rank 0 raised ValueError: expected grad_output"):
            vjp_fn(y)
    else:
        vjp_fn(y)
        world.mpi.Barrier()
    expected = (TypeError, "^expected residual") if world.rank == 1 else (RuntimeError, "rank 1 raised TypeError")
    with world.all_raise(*expected):
        layer(share_of(world, 3), residual=3 if world.rank == 1 else None)
    assert np.isfinite(to_numpy(layer(share_of(world, 3)))).all()


def test_no_channels_on_one_rank(world):
    layer = world.layer(0 if world.rank == 0 else 3)
    with world.all_raise(RuntimeError, r"rank 0 has 0 channels .*; rank 1 has 3 channels", *arrays_of(layer)):
        layer(share_of(world, layer.num_features))
    layer = world.layer(0)
    y, vjp_fn = layer.vjp(share_of(world, 0))
    assert vjp_fn(y).weight.shape == (0,)
    works(world, world.layer(3))


def test_a_rank_that_raises_after_the_exchange(world):
    """If one rank raises after the exchange, the others, which have gone on, raise at their next call; later calls
    work.
    """
    layer = world.layer(3)
    layer(share_of(world))
    ops = numpy_ops if world.xp is np else cupy_ops
    if world.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "bn_normalize", raise_memory_error)
            with pytest.raises(MemoryError):
                layer(share_of(world))
    else:
        layer(share_of(world))
    before = bits(*arrays_of(layer))
    if world.rank == 1:
        with world.all_raise(RuntimeError, "^this rank is behind the others since MemoryError: too much"):
            layer(share_of(world))
    elif world.host_sees:
        with world.all_raise(RuntimeError, "rank 1 raised RuntimeError: this rank is behind the others"):
            layer(share_of(world))
    else:
        assert np.isnan(to_numpy(layer(share_of(world)))).all()
        world.mpi.Barrier()
    assert bits(*arrays_of(layer)) == before
    for array, whole in zip(arrays_of(layer), world.mpi.bcast([to_numpy(a) for a in arrays_of(layer)]), strict=True):
        # Sets the same values on all ranks, as a program that restores a checkpoint does.
        array[...] = world.xp.asarray(whole)
    works(world, layer)


def raise_memory_error(*_, **__):
    raise MemoryError("too much")


def test_copies_ask_for_a_communicator(world):
    layer = fill(world.layer(3), world.random)
    works(world, layer)
    for duplicate in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert bits(*arrays_of(duplicate)) == bits(*arrays_of(layer))
        before = bits(*arrays_of(duplicate))
        with pytest.raises(RuntimeError, match=r"has no communicator: set layer\.comm"):
            duplicate(share_of(world))
        assert duplicate.comm is None
        with pytest.raises(RuntimeError, match="has no communicator"):
            pickle.loads(pickle.dumps(duplicate))(share_of(world))
        assert bits(*arrays_of(duplicate)) == before
        x = share_of(world)
        assert bits(duplicate.eval()(x)) == bits(layer.eval()(x))
        layer.train()
        duplicate.train().comm = world.comm
        assert duplicate.timeout == layer.timeout
        works(world, duplicate)
        duplicate.comm = None
        x = share_of(world)
        assert bits(duplicate(x[..., None])) == bits(duplicate.to_batchnorm()(x))


def test_a_rank_that_does_not_come(world):
    """Ranks give up waiting for one that does not come; with that communicator they give up at once from then on."""
    layer = world.layer(3, comm=duplicate_of(world))
    layer(share_of(world))
    world.mpi.Barrier()
    if world.rank == 0:
        time.sleep(1)
    else:
        layer.timeout = 0.3
        before, began = bits(*arrays_of(layer)), time.monotonic()
        with pytest.raises(RuntimeError, match=GIVES_UP if world.host_sees else "NCCL has lost the other ranks"):
            keep_calling(layer, share_of(world))
        assert time.monotonic() - began < 10
        again = r"^this rank has lost the other ranks .*: expected all" if world.host_sees else "^NCCL has lost"
        with pytest.raises(RuntimeError, match=again):
            layer(share_of(world))
        assert bits(*arrays_of(layer)) == before
        if world.host_sees:  # the communicator is lost to every layer, also to a new one
            with pytest.raises(RuntimeError, match="has lost the other ranks"):
                world.layer(5, comm=layer.comm)(share_of(world, 5))
        else:
            with pytest.raises(ValueError, match=r"^expected comm to be alive"):
                layer.comm = layer.comm
    world.mpi.Barrier()
    if world.rank == 0 and world.host_sees:
        layer(share_of(world))  # comes late, when the others have given up
    if world.host_sees:
        check_that_nothing_more_comes(world, layer.comm)
    works(world, world.layer(3))


def test_a_rank_whose_device_fails_in_the_middle_of_an_exchange(world):
    """A rank whose device fails sends nothing more: the others would take it for the awaited message."""
    if world.xp is np or world.engine == "cupyx":
        return
    from cupy.cuda import runtime

    def fail(*_, **__):
        raise runtime.CUDARuntimeError(719)

    place = {"mpi": (engines._Staging, "download"), "cuda-aware": (engines, "empty"), "nccl": (engines, "_nan")}
    comm = duplicate_of(world)
    layers = [world.layer(3, comm=comm) for _ in range(2)]
    for layer in layers:
        layer(share_of(world))
    arrays = [array for layer in layers for array in arrays_of(layer)]
    before = bits(*arrays)
    world.mpi.Barrier()
    if world.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*place[world.engine], fail)
            with pytest.raises(runtime.CUDARuntimeError):
                layers[0](share_of(world))
        for layer in *layers, world.layer(3, comm=comm):
            with pytest.raises(RuntimeError, match=r"has lost the other ranks .*: CUDARuntimeError: cudaErrorLaunch"):
                layer(share_of(world))
    else:
        layers[0].timeout = 0.3
        with pytest.raises(RuntimeError, match=GIVES_UP if world.host_sees else "NCCL has lost the other ranks"):
            keep_calling(layers[0], share_of(world))
    assert bits(*arrays) == before
    world.mpi.Barrier()
    # Sends the message that is missing, else MPI waits for it for ever when the process ends.
    if world.rank == 1 and world.host_sees:
        comm.Delete_attr(engines._lost_key())
        layers[0]._process_group.engine.gather(*expected_message(world))
    elif world.rank == 1:
        comm.abort()
    works(world, world.layer(3))


def expected_message(world):
    """The row and header that a rank without samples sends."""
    return world.xp.zeros((1, 7)), np.array([0.0, 0.0])


def check_that_nothing_more_comes(world, comm):
    """Check that a lost rank sends nothing more, as its messages would be taken for others."""
    sent, received = np.zeros(1), np.zeros(world.size)
    if world.rank == 0:
        request = comm.Iallgather(sent, received)
        time.sleep(0.1)
        assert not request.Test()
        world.mpi.Barrier()
    else:
        world.mpi.Barrier()
        request = comm.Iallgather(sent, received)
    request.Wait()


def keep_calling(layer, x):
    """Call the layer until it raises; with NCCL the host notices late."""
    for _ in range(100):
        layer(x)
        time.sleep(0.1)


GIVES_UP = r"^rank \d expected all \d ranks to exchange statistics within timeout=0\.3 s"


def duplicate_of(world):
    """A communicator that the test may lose."""
    if world.host_sees:
        return world.mpi.Dup()
    from cupy.cuda import nccl

    return nccl.NcclCommunicator(
        world.size, world.mpi.bcast(nccl.get_unique_id() if world.rank == 0 else None), world.rank
    )
