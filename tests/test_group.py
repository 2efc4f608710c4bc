"""What ranks that are interrupted leave behind: two of them in one process, each a thread."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cupybn import SyncBatchNorm, functional
from cupybn._ranks import group, synchronized
from cupybn._steps import numpy_ops
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running
from cupybn.layers import batchnorm, syncbatchnorm
from cupybn.layers import layer as base
from tests.reference import bits

MODULES = (base, batchnorm, functional, numpy_ops, group, synchronized, syncbatchnorm)
FILES = {module.__file__ for module in MODULES}
LEFT = object()
LOST = "RuntimeError: this rank has lost the other ranks of this communicator: "
WITHDRAWN = "RuntimeError: synchronized batch norm: rank 0 raised KeyboardInterrupt"


class Rank:
    """An engine. Messages of two ranks meet in the order in which they are sent, as those of MPI and NCCL."""

    size = 2

    def __init__(self, rank, inboxes):
        self.rank, self.inboxes = rank, inboxes
        self.mixed_up = []

    def check(self, input):
        pass

    def gather(self, row, header):
        both = self.exchange("gather", np.concatenate([header, row[0]]))
        return both[:, header.size :], both[:, : header.size]

    def sum(self, row, header):
        total = self.exchange("sum", np.concatenate([header, row[0]])).sum(0)
        return total[None, header.size :], total[: header.size]

    def texts(self, text):
        return self.exchange("texts", np.array(text)).tolist()

    def exchange(self, what, message):
        self.inboxes[1 - self.rank].put((what, message))
        received = self.inboxes[self.rank].get(timeout=20)
        if received is LEFT:
            self.inboxes[self.rank].put(LEFT)
            raise RuntimeError("the other rank has left")
        theirs, theirs_message = received
        if (what, message.size) != (theirs, theirs_message.size):
            self.mixed_up.append(f"{what} of {message.size}, {theirs} of {theirs_message.size}")
            raise RuntimeError("messages that do not belong together")
        return np.stack([message, theirs_message] if self.rank == 0 else [theirs_message, message])

    def leave(self):
        self.inboxes[1 - self.rank].put(LEFT)


class Interrupt:
    """A trace function that raises KeyboardInterrupt before one of the lines that this thread comes to."""

    def __init__(self, line):
        self.lines, self.where = line, None

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            if self.lines == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self.lines -= 1
        return self


def outcome(call):
    try:
        call()
    except (RuntimeError, TypeError, ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def interrupted(calls, interrupt):
    """What both ranks say of each of two calls, and the arrays of rank 0 after its first one, which is interrupted."""
    said, arrays = ([], []), []

    def other():
        said[1].extend(outcome(calls[1]) for _ in range(2))
        calls[1].engine.leave()

    thread = threading.Thread(target=other)
    thread.start()
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        said[0].append(outcome(calls[0]))
    finally:
        sys.settrace(before)
    arrays = bits(*calls[0].layer.state_dict().values())
    said[0].append(outcome(calls[0]))
    calls[0].engine.leave()
    thread.join(60)
    assert not thread.is_alive()
    return said, arrays


class Call:
    """A pass forward, or back."""

    def __init__(self, engine, layer, x, forward):
        self.engine, self.layer, self.x = engine, layer, x
        self.vjp_fn = None if forward else layer.vjp(x)[1]

    def __call__(self):
        if self.vjp_fn is None:
            self.layer(self.x)
        else:
            self.vjp_fn(self.x)


def calls_of(forward, passes, **kwargs):
    """The calls of two ranks that have made so many passes."""
    inboxes = queue.SimpleQueue(), queue.SimpleQueue()
    engines = [Rank(rank, inboxes) for rank in range(2)]
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    calls = [None, None]

    def make(rank):
        layer = SyncBatchNorm(3, device="cpu", comm=engines[rank], **kwargs)
        for _ in range(passes):
            layer(x[rank])
        calls[rank] = Call(engines[rank], layer, x[rank], forward)

    thread = threading.Thread(target=make, args=(1,))
    thread.start()
    make(0)
    thread.join(60)
    return calls


@pytest.mark.parametrize("bare", [False, True], ids=["arrays", "bare"])
@pytest.mark.parametrize(("forward", "passes"), [(True, 0), (True, 1), (False, 0)], ids=["first", "later", "back"])
def test_interrupts_at_every_line(forward, passes, bare):
    """A call that is cut off leaves the layer as it was, or has done all. The other rank either goes on as this one
    does, or one of the next calls raises on both; no message is taken for another one."""
    kwargs = {"affine": False, "track_running_stats": False} if bare else {}
    states = []
    for passes_more in 0, 1:
        calls = calls_of(True, passes + passes_more + (not forward), **kwargs)
        states.append(bits(*calls[0].layer.state_dict().values()))
    if not forward:
        states[1] = states[0]
    told = set()
    for line in itertools.count():
        calls, interrupt = calls_of(forward, passes, **kwargs), Interrupt(line)
        said, arrays = interrupted(calls, interrupt)
        if interrupt.where is None:
            break
        assert said[0][0].startswith("KeyboardInterrupt"), interrupt.where
        assert [call.engine.mixed_up for call in calls] == [[], []], interrupt.where
        assert arrays in states, interrupt.where
        if said[0][1] == said[1][1] == "":
            ours, theirs = (bits(*call.layer.state_dict().values()) for call in calls)
            assert ours == theirs, interrupt.where
        if said[1][0] == WITHDRAWN:
            assert said[0][1] == said[1][1] == "", interrupt.where
        told.update(said[1])
    assert said == (["", ""], ["", ""])
    assert line > 20
    assert WITHDRAWN in told
    assert any("behind the others since KeyboardInterrupt" in text for text in told)


@pytest.mark.parametrize("message", ["gather", "texts"])
def test_interrupts_while_the_others_are_told(monkeypatch, message):
    """The others may have heard, or not: nothing more is sent that they could take for something else."""
    calls = calls_of(True, 1)

    def interrupted_message(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calls[0].engine, message, interrupted_message)
    calls[0].x = "no array"
    said, _ = interrupted(calls, None)
    assert said[0][0] == "KeyboardInterrupt: "
    assert said[0][1].startswith("RuntimeError: this rank has lost the other ranks of this communicator: TypeError: ")
    left = "RuntimeError: the other rank has left"
    assert said[1] == [left, f"{LOST}{left}"]
    assert calls[1].engine.mixed_up == []


# ---------------------------------------------------------------------------------------------------------------------
# Errors in the middle of an exchange


class CUDARuntimeError(RuntimeError):
    """The error of that name of CuPy: a RuntimeError, but none that all ranks raise."""


@pytest.fixture
def fails(monkeypatch):
    """Let a method of an engine raise when it is called once more, before or after it has sent its message."""

    def let(engine, name, error, sent):
        method = getattr(engine, name)

        def once(*args):
            monkeypatch.setattr(engine, name, method)
            if sent:
                method(*args)
            raise error

        monkeypatch.setattr(engine, name, once)

    return let


@pytest.mark.parametrize("error", [CUDARuntimeError("launch failure"), RuntimeError("no"), ValueError("no")], ids=repr)
@pytest.mark.parametrize("sent", [False, True], ids=["unsent", "sent"])
@pytest.mark.parametrize(
    ("forward", "passes", "message"),
    [(True, 0, "texts"), (True, 0, "gather"), (True, 1, "gather"), (False, 0, "sum")],
    ids=["texts", "first", "later", "back"],
)
def test_errors_in_the_middle_of_an_exchange(fails, forward, passes, message, sent, error):
    """The other rank may wait for what was not sent: nothing more is, by any layer, and all of them say why."""
    calls = calls_of(forward, passes)
    engine, x = calls[0].engine, calls[0].x
    others = SyncBatchNorm(3, device="cpu", comm=engine), SyncBatchNorm(5, device="cpu", comm=engine)
    before = [bits(*call.layer.state_dict().values()) for call in calls]
    fails(engine, message, error, sent)
    said, arrays = interrupted(calls, None)
    reason = f"{type(error).__name__}: {error}"
    assert said[0] == [reason, f"{LOST}{reason}"]
    assert arrays == before[0]
    left = "RuntimeError: the other rank has left"
    if not sent:
        assert said[1] == [left, f"{LOST}{left}"]
        assert bits(*calls[1].layer.state_dict().values()) == before[1]
    assert left in said[1]
    assert calls[0].engine.mixed_up == calls[1].engine.mixed_up == []
    sent_before = calls[1].engine.inboxes[1].qsize()
    for layer in *others, SyncBatchNorm(3, device="cpu", comm=engine):
        state = bits(*layer.state_dict().values())
        assert outcome(lambda layer=layer: layer(np.zeros((4, layer.num_features), np.float32))) == f"{LOST}{reason}"
        assert bits(*layer.state_dict().values()) == state
    assert np.isfinite(others[0].eval()(x)).all()
    assert calls[1].engine.inboxes[1].qsize() == sent_before


@pytest.mark.parametrize(("forward", "message"), [(True, "gather"), (True, "texts"), (False, "sum"), (False, "texts")])
def test_errors_while_the_others_are_told(fails, forward, message):
    """The others wait for a message that this rank could not send; its own error is that of the call, the first one."""
    calls = calls_of(forward, 1)
    fails(calls[0].engine, message, CUDARuntimeError("launch failure"), False)
    calls[0].x = "no array"
    said, _ = interrupted(calls, None)
    told = f"TypeError: expected {'input' if forward else 'grad_output'} to be a NumPy or CuPy array (got str)"
    assert said[0] == [told, f"{LOST}{told}"]
    left = "RuntimeError: the other rank has left"
    assert said[1] == [left, f"{LOST}{left}"]
    assert calls[1].engine.mixed_up == []


@pytest.mark.parametrize("case", ["texts", "one value", "dtypes", "back"])
def test_errors_that_all_ranks_raise(case):
    """Nobody waits for anything, and the same layers go on."""
    forward = case != "back"
    calls = calls_of(forward, 0 if case == "texts" else 1)
    x = [call.x for call in calls]
    match case:
        case "texts" | "dtypes":
            calls[0].x = x[0].astype(np.float64)
            expected = "RuntimeError: synchronized batch norm: expected the same on all ranks (rank 0 has 3 channels of"
        case "one value":
            calls[0].x, calls[1].x = x[0][:1], x[1][:0]
            expected = "ValueError: Expected more than 1 value per channel when training, got 1 on all ranks together"
        case "back":
            calls[0].x = x[0][:1]
            expected = "ValueError: expected grad_output of the input's shape"
    said = on_both(calls, lambda rank: outcome(calls[rank]))
    assert said[0].startswith(expected)
    if case == "back":
        expected = f"RuntimeError: synchronized batch norm: rank 0 raised {expected}"
    assert said[1].startswith(expected)
    for rank in range(2):
        calls[rank].x = x[rank]
    assert [call.engine.lost for call in calls] == [None, None]
    assert on_both(calls, lambda rank: outcome(calls[rank])) == ["", ""]
    others = [SyncBatchNorm(5, device="cpu", comm=call.engine) for call in calls]
    assert on_both(calls, lambda rank: outcome(lambda: others[rank](np.ones((2, 5), np.float32)))) == ["", ""]
    assert calls[0].engine.mixed_up == calls[1].engine.mixed_up == []


def on_both(calls, act):
    """What both ranks return, each in its thread."""
    returned = [None] * len(calls)

    def keep(rank):
        returned[rank] = act(rank)

    threads = [threading.Thread(target=keep, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return returned


class Alone:
    """A group of one rank."""

    def gather(self, row, count, dtype):  # noqa: ARG002
        return row

    def sum(self, row):
        return row


@pytest.mark.parametrize(("samples", "made"), [(2, 0), (0, 5)])
def test_arrays_without_parts_are_made_where_a_rank_has_no_samples(monkeypatch, samples, made):
    shapes, empty = [], synchronized.empty
    monkeypatch.setattr(synchronized, "empty", lambda shape, *rest: shapes.append(shape) or empty(shape, *rest))
    steps = synchronized.Synchronized(numpy_ops, Alone())
    x, affine, epilogue = np.ones((samples, 3, 4), np.float32), Affine(None, None, 1e-5), Epilogue()
    statistics = steps.bn_forward(x, affine, Running(), epilogue, np.empty_like(x))
    steps.bn_backward(x, x, statistics, affine, epilogue, 0.0, Gradients(np.empty_like(x)))
    assert len(shapes) == made
