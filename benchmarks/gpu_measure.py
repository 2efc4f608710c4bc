"""The measurements of one case: every operation by every peer, as records for the results."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import gpu_exact
from gpu_cases import Case
from gpu_cudnn import RefusedError
from gpu_peers import CUDNN, CUPYBN, TORCH, Peer

from cupybn._arrays.devices import import_cupy
from cupybn._cli.extras import optional
from cupybn._cli.measure import Call, Effort, cold_sets, copy_time, device_time, host_time, release, rotate
from cupybn._cli.problem import Arrays, Operation, make_arrays
from cupybn._steps import launcher

Record = dict[str, Any]

SMALL = 8e6
"""Bytes of x up to which the host may take longer than the device, so that its time is measured as well."""
WARM = 64e6
"""Bytes of x up to which some of it may stay in the L2 cache until the next call, so that warm calls are timed as
well."""
WARM_CALLS = 20


class Bench:
    """The peers, the effort and the GPU's cache: what is the same for all cases."""

    def __init__(self, peers: Sequence[Peer], effort: Effort) -> None:
        self.peers, self.effort = peers, effort
        self.cupy = cupy = import_cupy()
        device = cupy.cuda.runtime.getDevice()
        self.l2_bytes = int(cupy.cuda.runtime.getDeviceProperties(device)["l2CacheSize"])
        self.copy = functools.cache(lambda nbytes: copy_time(nbytes, self.l2_bytes, effort))

    def warm_up(self) -> None:
        """Copy until the GPU runs at full clocks."""
        end = time.monotonic() + min(1.0, 30 * self.effort.seconds)
        self.copy(1 << 16)
        while time.monotonic() < end:
            copy_time(1 << 28, self.l2_bytes, self.effort)

    def records(self, case: Case) -> Iterator[Record]:
        """A record for each operation and peer; with an ``"error"`` where something failed or was refused."""
        sets = cold_sets(2 * case.problem.nbytes, self.l2_bytes, self.effort)
        try:
            arrays = make_arrays(case.problem, self.cupy, sets)
            if case.dead:
                for a in arrays:
                    self.cupy.moveaxis(a.x, case.problem.channel_axis, 0)[::2] = 0
        except Exception as error:  # the GPU has too little memory
            yield {**self._head(case, case.of_op[0], "all"), "error": repr(error)}
            return
        for operation in case.of_op:
            for peer in self.peers:
                if not peer.takes(case.problem, operation) or not (peer.everywhere or case.all_peers):
                    continue
                try:
                    with peer.surroundings():
                        yield from self._measure(case, operation, peer, arrays)
                except RefusedError as refusal:
                    yield {**self._head(case, operation, peer.name), "error": str(refusal), "refused": True}
                except Exception as error:  # a peer that fails is noted, and the others are measured
                    yield {**self._head(case, operation, peer.name), "error": repr(error)[:500]}
        del arrays
        self.release()

    def release(self) -> None:
        """Give back the memory of a case, since the next one needs blocks of other sizes."""
        release()
        self.cupy.get_default_memory_pool().free_all_blocks()
        torch = optional("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _head(self, case: Case, operation: Operation, peer: str) -> Record:
        return {
            "group": case.group,
            "layout": case.layout,
            "shape": list(case.problem.shape),
            "dtype": case.problem.dtype.name,
            "channels": case.problem.channels,
            "x_bytes": case.problem.nbytes,
            "op": operation.op,
            "operation": operation.name,
            "peer": peer,
        }

    def _measure(self, case: Case, operation: Operation, peer: Peer, arrays: Sequence[Arrays]) -> Iterator[Record]:
        problem = case.problem
        nbytes = int(operation.passes * problem.nbytes)
        calls = [peer.call(problem, operation, a) for a in arrays]
        rotation = rotate(calls, self.effort)
        graph = peer.graph(rotation, True)
        cold = device_time(graph, self.effort)
        last = arrays[(len(rotation) - 1) % len(arrays)]
        found = peer.output(problem, graph.results[-1])
        errors = gpu_exact.errors(self.cupy, problem, operation, last, found)
        del graph, found
        copy = self.copy(nbytes)
        record = {
            **self._head(case, operation, peer.name),
            "least_bytes": nbytes,
            "cold_us": cold._asdict(),
            "copy_us": copy._asdict(),
            "share_of_copy": copy.median / cold.median,
            "error_over_allowed": errors.over_allowed,
            "roundoffs": errors.roundoffs,
        }
        if peer.name in (CUPYBN, TORCH, CUDNN):
            if problem.nbytes <= WARM:
                warm = peer.graph(calls[:1] * min(WARM_CALLS, 4 * self.effort.burst), False)
                record["warm_us"] = device_time(warm, self.effort)._asdict()
            if problem.nbytes <= SMALL:
                record["host_us"] = host_time(calls[0], self.cupy.cuda.Device().synchronize, self.effort)._asdict()
        if peer.name == CUPYBN:
            record["launches"] = count_launches(calls[0])
        yield record


def failures(records: Sequence[Record]) -> list[str]:
    """A line for each reason why measurements failed or were refused."""
    counts = Counter(
        (record["peer"], "refused" if record.get("refused") else "failed", record["error"])
        for record in records
        if "error" in record
    )
    return [f"{peer}, {how} {count} times: {error}" for (peer, how, error), count in sorted(counts.items())]


def count_launches(call: Call) -> int:
    """How many kernels cupybn launches in a call."""
    run, count = launcher.Kernel.run, 0

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        run(*args, **kwargs)

    launcher.Kernel.run = counted  # type: ignore[method-assign]
    try:
        call()
    finally:
        launcher.Kernel.run = run  # type: ignore[method-assign]
    return count
