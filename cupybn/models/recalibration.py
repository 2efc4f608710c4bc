"""Recalibration: running statistics computed anew, as the exact moments of some batches."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from cupybn._arrays.devices import copied, on_device_of, zeros_like
from cupybn._arrays.kinds import describe, device_of, plain, show
from cupybn._calls import checks
from cupybn._calls.overlap import Extent, may_overlap, overlapping
from cupybn._steps.bundles import Running
from cupybn._steps.observer import Observer, choose
from cupybn.layers.batchnorm import _BatchNorm, observers
from cupybn.layers.writing import check_target, write

Array = Any  # numpy.ndarray or cupy.ndarray

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the arrays that are computed anew."""
SETTINGS = ("training", "momentum", "track_running_stats", "skip_nonfinite")
"""Names of the settings that decide what a call does with running statistics."""


def update_bn(
    layers: Iterable[_BatchNorm],
    batches: Iterable[Any],
    forward: Callable[[Any], object],
    *,
    progress: bool = False,
) -> None:
    """Set the running statistics of layers to the moments of all that they see in these batches.

    They are those of all batches as one array, weighted by counts and with the unbiased variance, however the batches
    are cut; momentum plays no part. For weights that were averaged or edited, data that has drifted, and layers whose
    running statistics have not followed the last steps of training.

    Parameters
    ----------
    layers : iterable of batch norm layers
        Each is in training mode until the last batch is done, and then in the mode that it was in. Where `forward`
        sets ``momentum``, ``track_running_stats`` or ``skip_nonfinite``, these, too, are what they were.
    batches : iterable
        Taken one by one.
    forward : callable
        Called as ``forward(batch)`` for each batch: the pass through the model, in which the layers are called. What it
        returns is not used.
    progress : bool
        Whether to show a progress bar, by tqdm.

    Raises
    ------
    TypeError
        If layers is no iterable of batch norm layers, batches no iterable, forward not callable, or progress no bool.
    ValueError
        If there are no layers or no batches, a layer has no running statistics, or two layers share theirs.
    RuntimeError
        If a layer is in the midst of another `update_bn`, or a call of it is captured in a CUDA graph.
    ImportError
        If there is to be a progress bar, and tqdm is missing.

    Notes
    -----
    Whatever is raised, Ctrl-C included, by `forward` and `batches` as well: statistics, counters, modes and settings of
    the layers are as they were. Weights that `forward` has changed are not.

    Calls in eval mode, within `no_stats_update` and of empty inputs do not count, nor do those of which a mask leaves
    less than two values for each channel, or that ``skip_nonfinite`` leaves out. ``num_batches_tracked`` becomes the
    number of calls that did; a layer that has seen none keeps what it had. A layer whose statistics are frozen
    (``track_running_stats`` set to False) gets new ones all the same.

    Until all is done, the running statistics stay what they were, on the device, and nothing waits for the host.
    Batches merge as the blocks of a GPU do (Chan, Golub and LeVeque, 1979). CUDA graphs that are launched by
    `forward` call no layer, and so nothing is seen of them; a call that is captured in one is an error. Where `forward`
    uses several streams, let those that call the same layer wait for each other, and in the end the current one for
    all of them.

    The ranks of a `SyncBatchNorm` call this function together, each with its parts of the same number of batches; a
    part may be empty.

    ``torch.optim.swa_utils.update_bn`` takes the plain mean over batches of their means and variances: it differs where
    batches have different sizes, and in the variance also where their means differ.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> layer = cupybn.BatchNorm1d(1, device="cpu").eval()
    >>> x = np.array([[1], [2], [3], [4], [10]], np.float32)
    >>> cupybn.update_bn([layer], [x[:2], x[2:]], layer)  # the model is this layer alone
    >>> layer.running_mean, layer.running_var, layer.num_batches_tracked
    (array([4.], dtype=float32), array([12.5], dtype=float32), array(2))
    >>> layer.training
    False
    """
    seen = _checked(layers)
    if not callable(forward):
        raise TypeError(f"expected forward to be callable (got {show(forward)})")
    checks.check_bool("progress", progress)
    bar = _tqdm() if progress else None
    try:
        iterator = iter(batches)
    except TypeError as error:
        raise TypeError(f"expected batches to be an iterable (got {show(batches)})") from error
    before: list[_Before] = []
    try:
        for name, layer, observer in seen:
            if observers.setdefault(id(layer), observer) is not observer:
                raise RuntimeError(f"{name} is in the midst of another update_bn: call one after the other")
        before = [_Before.of(layer) for _, layer, _ in seen]
        for _, layer, _ in seen:
            layer.training = True
        count = 0
        with _shown(iterator, batches, bar) as shown:
            for batch in shown:
                forward(batch)
                count += 1
        if count == 0:
            raise ValueError("expected one batch or more (got none): has an iterator been used up?")
        for each in before:
            each.restore_settings()
        write([(layer, _statistics(name, layer, observer)) for name, layer, observer in seen], None)
        _release(seen)
    except BaseException:
        _release(seen)  # again, as Ctrl-C may have come in the midst of it
        for each in before:
            each.restore()
        raise


class _Seen(NamedTuple):
    """A layer that is recalibrated."""

    name: str  # name of the layer in messages
    layer: _BatchNorm
    observer: Observer


class _Before(NamedTuple):
    """A layer before it is recalibrated."""

    layer: _BatchNorm
    attributes: dict[str, Any]
    copies: list[tuple[Array, Array]]  # running statistics and counter, and what they held

    @classmethod
    def of(cls, layer: _BatchNorm) -> _Before:
        """A layer as it is now, with copies of what `forward` might write to."""
        copies = []
        for array in _buffers(layer).values():
            with on_device_of(array):
                copies.append((array, copied(array)))
        return cls(layer, {**vars(layer)}, copies)

    def restore_settings(self) -> None:
        """Give the layer the mode and settings that it had."""
        vars(self.layer).update({name: self.attributes[name] for name in SETTINGS if name in self.attributes})

    def restore(self) -> None:
        """Give the layer all that it had, statistics included."""
        vars(self.layer).update(self.attributes)
        for array, values in self.copies:
            # The error that is on its way matters more than one of a device that takes no more work.
            with contextlib.suppress(Exception), on_device_of(array):
                plain(array)[...] = values


def _release(seen: list[_Seen]) -> None:
    """Let the layers be observed no longer."""
    for _, layer, observer in seen:
        if observers.get(id(layer)) is observer:
            del observers[id(layer)]


def _tqdm() -> Any:
    """The class of progress bars.

    Raises
    ------
    ImportError
        If tqdm is missing.
    """
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: `pip install '.[cli]'`, in a clone of cupybn, installs it"
        ) from error


def _shown(iterator: Iterator[Any], batches: Any, bar: Any) -> contextlib.AbstractContextManager[Iterable[Any]]:
    """Context that gives the batches, and shows how many have been taken, with a progress bar of this class if any."""
    if bar is None:
        return contextlib.nullcontext(iterator)
    total = None
    with contextlib.suppress(Exception):  # an iterable need not know its length
        total = len(batches)
    shown: contextlib.AbstractContextManager[Iterable[Any]] = bar(iterator, total=total, unit="batch")
    return shown


def _statistics(name: str, layer: _BatchNorm, observer: Observer) -> dict[str, Array]:
    """New values of a layer's running statistics and counter, by name; none if it has seen nothing."""
    if observer.ops is None:
        return {}
    _check_buffers(name, layer, observer)  # again, as they may be new
    arrays = {buffer: plain(array) for buffer, array in _buffers(layer).items()}
    with on_device_of(observer.batches):
        new = {buffer: zeros_like(array) for buffer, array in arrays.items()}
        observer.ops.bn_update_running(observer.moments(), Running(new["running_mean"], new["running_var"], 1.0))
        new["num_batches_tracked"] = observer.batches
        # Whether anything counted is known on the device alone: batches may have been empty on all ranks.
        counted = observer.batches > 0
        return {buffer: choose(counted, new[buffer], array) for buffer, array in arrays.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _checked(layers: Iterable[_BatchNorm]) -> list[_Seen]:
    """The layers that were given, each once; raises unless all have running statistics of their own."""
    expected = "expected layers to be an iterable of batch norm layers"
    if isinstance(layers, _BatchNorm):
        raise TypeError(f"{expected} (got a {describe(layers)}): use [layer]")
    if hasattr(layers, "keys") and hasattr(layers, "values"):
        raise TypeError(f"{expected} (got a {describe(layers)}): use layers.values()")
    try:
        iterator = iter(layers)
    except TypeError as error:
        raise TypeError(f"{expected} (got {show(layers)})") from error
    seen: dict[int, _Seen] = {}
    for i, layer in enumerate(iterator):
        if not isinstance(layer, _BatchNorm):
            raise TypeError(f"expected layers[{i}] to be a batch norm layer of cupybn (got {show(layer)})")
        _check_buffers(f"layers[{i}]", layer)
        seen.setdefault(id(layer), _Seen(f"layers[{i}]", layer, Observer()))
    if not seen:
        raise ValueError("expected one layer or more (got none): has an iterator been used up?")
    _check_separate([*seen.values()])
    return [*seen.values()]


def _check_buffers(name: str, layer: _BatchNorm, observer: Observer | None = None) -> None:
    """Check for a layer with running statistics that may be written to, or one that will make them.

    They must fit what the observer has seen, if one is given.
    """
    lazy = layer.num_features is None
    if any(buffer not in layer._members if lazy else getattr(layer, buffer) is None for buffer in BUFFERS[:2]):
        raise ValueError(f"expected {name} to have running statistics (got a {type(layer).__qualname__} without)")
    for buffer, array in _buffers(layer).items():
        check_target(f"{name}.{buffer}", array)
        if observer is not None and buffer in BUFFERS[:2]:
            observer.check_fits(f"{name}.{buffer}", array, array.size)
    if layer.num_batches_tracked is not None:
        checks.check_counter(layer.num_batches_tracked, layer.running_mean)


def _buffers(layer: _BatchNorm) -> dict[str, Array]:
    """The buffers that a layer has, by name."""
    return {name: getattr(layer, name) for name in BUFFERS if getattr(layer, name) is not None}


def _check_separate(seen: list[_Seen]) -> None:
    """Check that no two layers share a buffer: each would overwrite what the other has seen."""
    by_device: dict[str, list[Array]] = {}
    for _, layer, _ in seen:
        for array in _buffers(layer).values():
            by_device.setdefault(device_of(array), []).append(array)
    if not any(may_overlap(arrays, map(Extent.of, arrays)) for arrays in by_device.values()):
        return
    for i, (name, layer, _) in enumerate(seen):
        for other, other_layer, _ in seen[:i]:
            others = {(other, buffer): array for buffer, array in _buffers(other_layer).items()}
            shared = overlapping(_buffers(layer), others)
            if shared:
                raise ValueError(
                    f"expected layers with running statistics of their own (got {other} and {name}, which share "
                    f"{', '.join(shared)}): give one of them"
                )
