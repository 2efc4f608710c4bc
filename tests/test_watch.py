"""Messages of NCCL that fail or never end, with a communicator and streams that behave as a test tells them to."""

from __future__ import annotations

import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from cupybn._ranks.watch import Watch, watch_of

LOST = "^NCCL has lost the other ranks of this communicator: "


class Event:
    """An event that is done as soon as it is recorded, if its stream runs."""

    def __init__(self, disable_timing):
        assert disable_timing
        self.stream = None

    def record(self, stream):
        self.stream, self.place = stream, stream.events
        stream.events += 1

    @property
    def ptr(self):
        return self

    @property
    def status(self):
        if self.stream is None:
            return 0  # as CUDA says of an event that was never recorded
        return self.stream.fault or (0 if self.stream.has_come_to(self.place) else 600)


class CUDARuntimeError(RuntimeError):
    pass


class Stream:
    events = fault = 0

    def __init__(self, runs=True, capturing=False):
        self.runs, self.capturing = runs, capturing

    def has_come_to(self, _):
        return self.runs

    def is_capturing(self):
        return self.capturing


class Communicator:
    comm = 7

    def __init__(self, error=None):
        self.error, self.aborted = error, threading.Event()

    def check_async_error(self):
        if self.error:
            raise RuntimeError(self.error)

    def abort(self):
        self.aborted.set()


@pytest.fixture(autouse=True)
def events(monkeypatch):
    runtime = SimpleNamespace(getDevice=lambda: 0, eventQuery=lambda ptr: ptr.status, CUDARuntimeError=CUDARuntimeError)
    cuda = SimpleNamespace(Event=Event, Device=lambda _: SimpleNamespace(use=lambda: None), runtime=runtime)
    monkeypatch.setattr("cupybn._ranks.watch.import_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr("cupybn._ranks.watch.NAP", 0.001)


def start(watch, stream, timeout=None):
    with watch.over(stream, timeout) as same:
        assert same is stream


class Stuck(Stream):
    """A stream that runs up to its first event, and never any further."""

    def has_come_to(self, place):
        return self.runs and place == 0


def test_messages_that_end_are_forgotten():
    comm = Communicator()
    watch = Watch(comm)
    for _ in range(3):
        stream = Stream(runs=False)  # does not run while the host is in the call
        start(watch, stream, timeout=0.05)
        stream.runs = True
    time.sleep(0.2)
    start(watch, Stream())
    assert not comm.aborted.is_set()


def test_a_message_that_never_ends():
    comm, stream = Communicator(), Stuck(runs=False)
    watch = Watch(comm)
    start(watch, stream, timeout=0.01)
    stream.runs = True
    assert comm.aborted.wait(10)
    assert watch.failed
    with pytest.raises(RuntimeError, match=rf"{LOST}a message has taken more than 0.01 s"):
        start(watch, Stream())


def test_without_a_limit_it_waits_for_failures():
    comm = Communicator()
    watch = Watch(comm)
    start(watch, Stuck(), timeout=None)
    assert not comm.aborted.wait(0.1)
    comm.error = "remote process exited"
    assert comm.aborted.wait(10)
    with pytest.raises(RuntimeError, match=f"{LOST}remote process exited"):
        start(watch, Stream())


@pytest.mark.parametrize("make", [lambda: Stream(runs=False), Stuck], ids=["before", "within"])
def test_a_device_that_fails(make):
    """A device that fails is noticed at once, and not taken for one that still works."""
    comm, stream = Communicator(), make()
    watch = Watch(comm)
    start(watch, stream, timeout=None)
    assert not comm.aborted.wait(0.05)
    stream.fault = 719
    assert comm.aborted.wait(10)
    with pytest.raises(RuntimeError, match=f"{LOST}719"):
        start(watch, Stream())


def test_nothing_is_sent_after_a_failure():
    """Nothing is sent after a failure, even before the communicator is aborted."""
    watch, sent = Watch(Communicator()), []
    watch._failure = "remote process exited"

    def call():
        with watch.over(Stream(), None):
            sent.append(1)

    with pytest.raises(RuntimeError, match=f"{LOST}remote process exited"):
        call()
    assert sent == []


def test_what_failed_first_is_told():
    """The first failure is told, though an abort may take long and other things fail meanwhile."""

    class Late(Communicator):
        def check_async_error(self):
            time.sleep(0.02)
            raise RuntimeError("remote process exited")

    comm = Late()
    watch = Watch(comm)

    def call():
        with watch.over(Stream(), 0.01):
            assert comm.aborted.wait(10)
            raise RuntimeError("a message that was aborted")

    with pytest.raises(RuntimeError, match=f"{LOST}remote process exited"):
        call()


def test_a_host_that_is_interrupted():
    """If the host is interrupted, the message may be on its way: it is watched to its end, which is no failure."""
    comm = Communicator()
    watch = Watch(comm)
    for stream in Stream(), Stuck():
        with pytest.raises(KeyboardInterrupt), watch.over(stream, 0.01):
            raise KeyboardInterrupt
        assert comm.aborted.wait(10 if isinstance(stream, Stuck) else 0.1) == isinstance(stream, Stuck)


def test_work_before_the_message_takes_as_long_as_it_likes():
    comm, stream = Communicator(), Stream(runs=False)
    watch = Watch(comm)
    start(watch, stream, timeout=0.01)
    assert not comm.aborted.wait(0.1)
    stream.runs = True
    start(watch, Stream())
    assert not comm.aborted.wait(0.05)


def test_a_message_that_cannot_be_started():
    watch = Watch(Communicator())
    with pytest.raises(RuntimeError, match=f"{LOST}no"), watch.over(Stream(), None):
        raise RuntimeError("no")
    with pytest.raises(RuntimeError, match=f"{LOST}no"):
        start(watch, Stream())


def test_a_host_that_waits_in_the_call():
    """A host that waits within the call, as when ranks first connect, is freed by the abort, and says why."""
    comm = Communicator()
    watch = Watch(comm)
    with pytest.raises(RuntimeError, match=f"{LOST}a message has taken more than"), watch.over(Stream(), 0.01):
        assert comm.aborted.wait(10)


def test_what_a_graph_captures_is_not_watched():
    comm = Communicator("remote process exited")
    start(Watch(comm), Stream(runs=False, capturing=True))
    assert not comm.aborted.wait(0.05)


def test_threads_and_communicators_are_let_go(monkeypatch):
    monkeypatch.setattr("cupybn._ranks.watch.IDLE", 0.01)
    comm = Communicator()
    watch = Watch(comm)
    for _ in range(2):  # a thread is started again whenever there is something to watch
        start(watch, Stream())
        thread = watch._thread
        assert thread.daemon  # so that it does not keep the process alive
        thread.join(10)
        assert not thread.is_alive()
        assert watch._thread is None
    reference = weakref.ref(comm)
    del comm, watch
    assert reference() is None


def test_layers_share_the_watch_of_a_communicator():
    first, second = Communicator(), Communicator()
    watch = watch_of(first)
    assert watch_of(first) is watch
    assert watch_of(second) is not watch  # the address may be that of a communicator that is gone
