"""How the ranks of a communicator reach each other: each is connected with a hub in the process of the unique id."""

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
ANSWER, PARTED = b"+", b"-"  # how a message of the hub begins

_HELLO = struct.Struct(f"!{TOKEN_BYTES}siiq")  # token, number of ranks, rank, process
_LENGTHS = struct.Struct("!HQ")  # of header and payload; a rank that leaves sends an empty header

Combine = Callable[[bytes, list[bytes]], bytes]


class Hub(threading.Thread):
    """It answers each round of requests, one of every rank, when all are there.

    When a rank leaves, or is lost, or requests of a round differ, it closes all connections: no round can succeed.

    Parameters
    ----------
    combine
        The answer, from the header that all requests share and their payloads by rank.
    """

    def __init__(self, combine: Combine) -> None:
        super().__init__(name="nccl hub", daemon=True)
        self._combine = combine
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._members: dict[int, socket.socket] = {}
        self._here: set[int] = set()  # ranks of this process
        _hubs[self.token] = self
        self.start()

    def run(self) -> None:
        """Serve until it is over."""
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
                raise ConnectionResetError  # who waits for the others says nothing: it is lost
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
                    raise ConnectionResetError  # as above
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
        """Ranks of this process come last: what they do next may be to end it, and the hub with it."""
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
        """Wait for the answer to a request, of so many bytes; an OSError if there will be none."""
        try:
            self._socket.sendall(_LENGTHS.pack(len(header), len(payload)) + header + payload)
            if receive(self._socket, len(ANSWER)) != ANSWER:
                raise ConnectionAbortedError
            return receive(self._socket, nbytes)
        except BaseException:
            self.interrupt()  # half a message would be taken for the begin of the next one
            raise

    def lost(self) -> bool:
        """Whether the hub has closed the connection, and not because a rank left in due form."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def interrupt(self) -> None:
        """Lose the connection: `exchange`, in whatever thread, fails."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Tell the hub, and close the connection."""
        with suppress(OSError):
            self._socket.sendall(_LENGTHS.pack(0, 0))
        self.close()
        hub = _hubs.get(self._token)
        if hub is not None and hub is not threading.current_thread() and not sys.is_finalizing():
            hub.join()  # the process may end now, and the other ranks are to know that nobody is lost

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """So many bytes; an OSError if there are fewer."""
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
