"""Connects the ranks of a communicator: each has a connection to a hub in the process that made the unique id."""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from weakref import WeakValueDictionary

HOST = "127.0.0.1"
TOKEN_BYTES = 16
ANSWER, PARTED = b"+", b"-"  # the first byte of a message of the hub: an answer, or that a rank has left

_HELLO = struct.Struct(f"!{TOKEN_BYTES}siiq")  # a rank's first message: token, number of ranks, rank, process
_LENGTHS = struct.Struct("!HQ")  # lengths of header and payload; the header of a rank that leaves is empty

Combine = Callable[[bytes, list[bytes]], bytes]


class Hub(threading.Thread):
    """A server that answers a round of requests, one of every rank, once all of them are there.

    When a rank leaves, or is lost, or requests of a round differ, it closes all connections: no round can succeed.

    Parameters
    ----------
    combine
        Function that makes the answer, from the header that all requests share and their payloads by rank.
    """

    def __init__(self, combine: Combine) -> None:
        super().__init__(name="nccl hub", daemon=True)
        self._combine = combine
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._members: dict[int, socket.socket] = {}
        self._here: set[int] = set()  # ranks that are threads of this process
        _hubs[self.token] = self
        self.start()

    def run(self) -> None:
        """Serve rounds until the ranks have left."""
        with ExitStack() as sockets, suppress(OSError):
            with self._listener:
                self._gather(sockets)
            self._send_all(ANSWER)
            while self._answer():
                pass

    def _gather(self, sockets: ExitStack) -> None:
        size = None
        while len(self._members) != size:
            ready = select.select([self._listener, *self._members.values()], [], [])[0]
            if ready != [self._listener]:
                raise ConnectionResetError  # a rank that closes or speaks while the others are awaited is lost
            connection = sockets.enter_context(self._listener.accept()[0])
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                token, ranks, rank, process = _HELLO.unpack(receive(connection, _HELLO.size))
            except OSError:
                continue
            if token != self.token:
                connection.close()
                continue
            if size not in (None, ranks) or rank in self._members:
                raise ConnectionAbortedError
            size = ranks
            self._members[rank] = connection
            if process == os.getpid():
                self._here.add(rank)

    def _answer(self) -> bool:
        """Serve one round; False if a rank leaves instead."""
        requests: dict[int, tuple[bytes, bytes]] = {}
        while len(requests) < len(self._members):
            ready = select.select(list(self._members.values()), [], [])[0]
            for rank in [rank for rank, connection in self._members.items() if connection in ready]:
                if rank in requests:
                    raise ConnectionResetError  # lost, as in `run`
                header, payload = _receive_request(self._members[rank])
                if not header:
                    del self._members[rank]
                    self._send_all(PARTED)
                    return False
                requests[rank] = header, payload
        headers = {header for header, _ in requests.values()}
        if len(headers) > 1:
            raise ConnectionAbortedError
        self._send_all(ANSWER + self._combine(headers.pop(), [requests[rank][1] for rank in sorted(requests)]))
        return True

    def _send_all(self, message: bytes) -> None:
        """Send a message to all ranks; those of this process last: they may end it, and so the hub."""
        for rank in sorted(self._members, key=lambda rank: rank in self._here):
            self._members[rank].sendall(message)


class Member:
    """The connection of one rank; every method but `lost` and `interrupt` is for one thread at a time."""

    def __init__(self, port: int, token: bytes, ranks: int, rank: int) -> None:
        self._token = token
        self._socket = socket.create_connection((HOST, port))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(_HELLO.pack(token, ranks, rank, os.getpid()))
            receive(self._socket, len(ANSWER))
        except BaseException:
            self._socket.close()
            raise

    def exchange(self, header: bytes, payload: bytes, nbytes: int) -> bytes:
        """Wait for the answer to a request; `nbytes` is the answer's size. An OSError if there will be no answer."""
        try:
            self._socket.sendall(_LENGTHS.pack(len(header), len(payload)) + header + payload)
            if receive(self._socket, len(ANSWER)) != ANSWER:
                raise ConnectionAbortedError
            return receive(self._socket, nbytes)
        except BaseException:
            self.interrupt()  # else the rest of a message would be taken for the beginning of the next one
            raise

    def lost(self) -> bool:
        """Whether the hub has closed the connection for any other reason than that a rank left in due form."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def interrupt(self) -> None:
        """Break the connection, so that `exchange` fails in whatever thread it is."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Tell the hub that this rank leaves, and close the connection."""
        with suppress(OSError):
            self._socket.sendall(_LENGTHS.pack(0, 0))
        self.close()
        hub = _hubs.get(self._token)
        if hub is not None and hub is not threading.current_thread() and not sys.is_finalizing():
            hub.join()  # the process may end after this, and the other ranks must hear before that nobody is lost

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """Receive exactly `nbytes` bytes; an OSError if the connection ends before."""
    data = bytearray(nbytes)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionResetError
        rest = rest[count:]
    return bytes(data)


def _receive_request(connection: socket.socket) -> tuple[bytes, bytes]:
    header, payload = _LENGTHS.unpack(receive(connection, _LENGTHS.size))
    return receive(connection, header), receive(connection, payload)


_hubs: WeakValueDictionary[bytes, Hub] = WeakValueDictionary()
