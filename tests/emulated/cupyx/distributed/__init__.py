"""The part of ``cupyx.distributed`` that the stand-in has."""

from __future__ import annotations

import os

from cupyx.distributed._nccl_comm import DEFAULT_HOST, DEFAULT_PORT, NCCLBackend

__all__ = ["NCCLBackend", "init_process_group"]


def init_process_group(
    n_devices: int,
    rank: int,
    *,
    backend: str = "nccl",
    host: str | None = None,
    port: int | None = None,
    use_mpi: bool = False,
) -> NCCLBackend:
    """Wait for all ranks; rank 0 has to run on `host`, and listens at `port` unless they meet through MPI."""
    if n_devices <= 0:
        raise ValueError(f"Invalid number of devices {n_devices}")
    if not 0 <= rank < n_devices:
        raise ValueError(f"Invalid number of rank {rank} {n_devices}")
    if backend != "nccl":
        raise ValueError(f"{backend} is not supported")
    if host is None:
        host = os.environ.get("CUPYX_DISTRIBUTED_HOST", DEFAULT_HOST)
    if port is None:
        port = int(os.environ.get("CUPYX_DISTRIBUTED_PORT", DEFAULT_PORT))
    return NCCLBackend(n_devices, rank, host, port, use_mpi)
