"""A stopwatch for the passes of a network's layers, on NumPy and CuPy arrays: where its time goes."""

import copy
import time

import numpy as np

import layers
from layers import xp


class Stopwatch:
    """Times of calls by name.

    On a CPU it is the time of all threads of the process, which is the same on a busy machine. On a GPU it is the time
    between two events of the stream, for which the host does not wait.
    """

    def __init__(self):
        self.laps = []

    def run(self, name, function, *args, **kwargs):
        """Result of a call, whose time is added to what has this name."""
        start = now()
        result = function(*args, **kwargs)
        self.laps.append((name, start, now()))
        return result

    def seconds(self):
        """Seconds by name, since this was asked the last time."""
        total = {}
        for name, start, end in self.laps:
            total[name] = total.get(name, 0) + seconds_between(start, end)
        self.laps.clear()
        return total


def now():
    if xp is np:
        return time.process_time()
    event = xp.cuda.Event()
    event.record()
    return event


def seconds_between(start, end):
    if xp is np:
        return end - start
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end) / 1000  # CuPy has milliseconds


class Timed:
    """A layer whose passes, forward and backward, a stopwatch times under a name."""

    def __init__(self, layer, watch, name):
        self.layer, self.watch, self.name = layer, watch, name

    def __call__(self, *args, **kwargs):
        return self.watch.run(self.name, self.layer, *args, **kwargs)

    def vjp(self, *args, **kwargs):
        y, vjp_fn = self.watch.run(self.name, self.layer.vjp, *args, **kwargs)
        return y, lambda dy: self.watch.run(self.name, vjp_fn, dy)


def timed(network, watch, names):
    """A network of the same layers, of which a stopwatch times those of the classes that have names."""
    result = copy.copy(network)
    result.layers = []
    for layer in network.layers:
        if isinstance(layer, layers.Sequential):
            layer = timed(layer, watch, names)
        elif type(layer) in names:
            layer = Timed(layer, watch, names[type(layer)])
        result.layers.append(layer)
    return result
