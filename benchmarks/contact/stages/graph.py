"""Tries training steps in CUDA graphs, and threads of the host that use a stream each."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from contact.task import Task

SHAPES = ((32, 64, 14, 14), (32, 64, 112, 112), (8, 3, 9, 7))
TINY = ((4, 3, 5, 5),)
REPLAYS = 3
THREADS, CALLS = 4, 20


def run(task: Task) -> None:
    """Try the graphs, then the threads."""
    for shape in TINY if task.rehearse else SHAPES:
        for momentum in (0.1, None):
            with task.log.checking(f"graph of a training step, {shape}, momentum {momentum}"):
                replays_are_steps(shape, momentum)
    with task.log.checking(f"{THREADS} threads of the host, each on its own stream, first launches at once"):
        threads_on_streams(3 if task.rehearse else CALLS)


def replays_are_steps(shape: tuple[int, ...], momentum: float | None) -> None:
    """Check that each replay of a graph gives the bits of a step without one, and leaves the same buffers."""
    import cupy

    import cupybn

    rng = np.random.default_rng(0)
    batches = rng.standard_normal((REPLAYS, 2, *shape)).astype(np.float16)  # x and dy
    eager, captured = (cupybn.BatchNorm2d(shape[1], momentum=momentum, device="cuda:0") for _ in range(2))
    expected = [bits(step(eager, *map(cupy.asarray, batch))) for batch in batches]

    stream = cupy.cuda.Stream(non_blocking=True)
    x, dy = map(cupy.asarray, batches[0])
    cupy.cuda.Device().synchronize()
    with stream:
        with cupybn.no_stats_update():
            step(captured, x, dy)  # compiles the kernels: nothing may be compiled during a capture
        stream.begin_capture()
        results = step(captured, x, dy)
        graph = stream.end_capture()
    for number, batch in enumerate(batches):
        x.set(batch[0])
        dy.set(batch[1])
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert bits(results) == expected[number], f"replay {number} differs from a step without a graph"
    assert bits(captured.state_dict().values()) == bits(eager.state_dict().values()), "buffers differ"


def step(layer: Any, x: Any, dy: Any) -> list[Any]:
    """Output and gradients of one training step."""
    y, vjp_fn = layer.vjp(x)
    return [y, *vjp_fn(dy)[:3]]


def bits(arrays: Any) -> list[bytes]:
    """The bytes of arrays, to compare results to the bit."""
    return [array.get().tobytes() for array in arrays]


def threads_on_streams(calls: int) -> None:
    """Check that threads which compile, load and launch the same kernel at once get the same bits in every call."""
    import cupy

    import cupybn.functional as F

    rng = np.random.default_rng(0)
    xs = [cupy.asarray(rng.standard_normal((16, 24, 11))) for _ in range(THREADS)]
    cupy.cuda.Device().synchronize()
    gate = threading.Barrier(THREADS)
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                gate.wait()
                ys = [F.batch_norm(xs[i], None, None, training=True) for _ in range(calls)]
                stream.synchronize()
                results[i] = len(set(bits(ys)))
        except Exception as error:
            results[i] = repr(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(THREADS), 1), f"different results of each thread: {results}"
