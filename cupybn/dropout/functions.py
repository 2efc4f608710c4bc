"""The functions of dropout and, at the end of this file, the flow of a call.

    arguments   -> Call.checked                -> the layout, by which the input is seen as it lies in memory
    state       -> dropout_draw                -> what the call draws: seed and number of the call, which goes up
    input       -> dropout or dropout_channels -> output
    grad_output -> the same step, same draw    -> gradient

Calls that are alike, on CuPy arrays, play the launches of the first one, as those of batch norm do.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import on_device_of, write_at_once
from cupybn._arrays.kinds import plain
from cupybn._calls import checks
from cupybn._calls.call import has_form
from cupybn._steps import cupy_dropout, numpy_dropout
from cupybn._steps.bundles import Drops
from cupybn._steps.launcher import unheard
from cupybn._steps.tape import particulars_of
from cupybn.dropout.call import Call, Channels, Checked
from cupybn.dropout.generator import Generator

Array = Any  # numpy.ndarray or cupy.ndarray

NDIMS = {"dropout1d": (2, 3), "dropout2d": (4,), "dropout3d": (4, 5)}
"""Numbers of axes that inputs may have, by the function; that of batches comes last."""
NO_NUMBERS = 0.0, 0.0
"""Numbers that tapes write anew: launches of dropout have none of them."""


class DropoutGrads(NamedTuple):
    """The gradient that ``vjp_fn`` returns."""

    input: Array


class DropoutVjpFn:
    """Function from the gradient of a call's output to that of its input: what `dropout_vjp` and the like return.

    Pure: it may be called again and changes nothing. It holds the seed and the number of its call, of which it makes
    the same random numbers anew: it stays right when the generator moves on.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y, vjp_fn = F.dropout_vjp(np.ones(8, np.float32), generator=Generator(7, device="cpu"))
    >>> bool((vjp_fn(np.ones_like(y)).input == y).all())
    True
    """

    __slots__ = ("__weakref__", "_saved")

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def __call__(self, grad_output: Array) -> DropoutGrads:
        """Gradient of the input.

        Raises
        ------
        TypeError, ValueError
            If grad_output is not an array of the input's kind, device, dtype and shape.
        """
        checked = self._saved.checked
        same_form = has_form(grad_output, checked.form)
        if not same_form:
            checks.check_like("grad_output", grad_output, checked.like_input())
        with on_device_of(grad_output):
            dense = grad_output if same_form else checked.layout.conform(plain(grad_output))
            return DropoutGrads(_backward(self._saved, dense))

    def __copy__(self) -> DropoutVjpFn:
        """Return this one: it is pure, and a copy of a function is the function itself."""
        return self

    def __deepcopy__(self, memo: object) -> DropoutVjpFn:
        return self


def dropout(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    out: Array | None = None,
) -> Array:
    """Dropout: in training each element becomes 0 with probability p, and input / (1 - p) otherwise.

    Which elements are dropped is a function of the seed of the generator, the number of its call, the place of the
    element and p: the same on every device, with every dtype and in every version.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64
        NumPy or CuPy, of any rank. All arrays of a call, and the generator, are on one device.
    p : float
        Probability to be dropped, from 0 to 1.
    training : bool
        Without it nothing is dropped.
    inplace : bool
        Whether the output is written to the input.
    generator : Generator or None
        What the random numbers are made of. None stands for a generator that each device has: see `manual_seed`.
    out : array of the input's shape and dtype, or None
        Where the output goes, in any memory order. May be `input`.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        The input itself where nothing is dropped, because training is False or p is 0.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, p not a number, training or inplace not a
        bool, or the generator none, or on another device.
    ValueError
        If p is not from 0 to 1, `out` is of another shape, it or an input in place is read-only, or both are asked for.
        No array has changed then, nor has the generator.

    Notes
    -----
    Element i, counted in the order of memory, is dropped where ``word < round(p * 2**32)``. The word is number i % 4 of
    the four that Philox4x32-10 makes of the counter (i // 4, call), with the seed for its key: word i of subsequence
    `call` of cuRAND's generator. Others are multiplied by 1 / (1 - p), rounded to float32 (float64 for float64 input),
    and rounded once. What is dropped is +0, whatever it was, NaN too. For an input that is not dense, the order is that
    of a dense copy.

    References
    ----------
    Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to prevent neural networks from
    overfitting" (2014). Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> generator = Generator(7, device="cpu")
    >>> x = np.arange(1, 9, dtype=np.float32)
    >>> F.dropout(x, 0.5, generator=generator)
    array([ 2.,  4.,  0.,  0.,  0., 12.,  0., 16.], dtype=float32)
    >>> F.dropout(x, 0.5, generator=generator)  # another call, other numbers
    array([ 0.,  0.,  0.,  0., 10., 12., 14.,  0.], dtype=float32)
    >>> F.dropout(x, 0.5, training=False) is x
    True
    """
    return forward(Call(input, p, training, inplace, generator), out)


def dropout_vjp(
    input: Array, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> tuple[Array, DropoutVjpFn]:
    """`dropout`, and the function that takes the gradient of its output to that of its input.

    Parameters
    ----------
    As `dropout`.

    Returns
    -------
    output : array
        As `dropout`.
    vjp_fn : DropoutVjpFn
        ``vjp_fn(grad_output) -> DropoutGrads(input)``. The gradient has the input's memory order. It may share memory
        with grad_output where nothing was dropped. Nothing of the input's size is kept in between.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y, vjp_fn = F.dropout_vjp(np.ones(8, np.float32), 0.5, generator=Generator(7, device="cpu"))
    >>> vjp_fn(np.full(8, 3, np.float32)).input
    array([6., 6., 0., 0., 0., 6., 0., 6.], dtype=float32)
    """
    return forward_vjp(Call(input, p, training, inplace, generator))


def dropout1d(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
    out: Array | None = None,
) -> Array:
    """`dropout` of whole channels: of (N, C, L) arrays, or (C, L) for a single sample.

    Channel c of sample n has word ``n * C + c``, in any memory order.

    Parameters
    ----------
    input : array
        As for `dropout`, with the axes above.
    channel_axis : int
        The axis of C, counted from either end of (N, C, L), and not 0; a (C, L) array stands for a batch of one.
    p, training, inplace, generator, out
        As for `dropout`.

    Returns
    -------
    array
        As `dropout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`, and if rank or channel_axis do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> x = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)  # (N, C, L)
    >>> F.dropout1d(x, 0.5, generator=Generator(7, device="cpu"))
    array([[[ 2.,  4.],
            [ 6.,  8.],
            [ 0.,  0.]],
    <BLANKLINE>
           [[ 0.,  0.],
            [ 0.,  0.],
            [22., 24.]]], dtype=float32)
    """
    return forward(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout1d"], channel_axis)), out)


def dropout1d_vjp(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
) -> tuple[Array, DropoutVjpFn]:
    """`dropout1d`, and the function that takes the gradient of its output to that of its input.

    Parameters
    ----------
    As `dropout1d`.

    Returns
    -------
    output, vjp_fn
        As `dropout_vjp`.

    Raises
    ------
    TypeError, ValueError
        As `dropout1d` and `dropout_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y, vjp_fn = F.dropout1d_vjp(np.ones((1, 4, 2), np.float32), generator=Generator(7, device="cpu"))
    >>> vjp_fn(np.ones_like(y)).input[0, :, 0]
    array([2., 2., 0., 0.], dtype=float32)
    """
    return forward_vjp(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout1d"], channel_axis)))


def dropout2d(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
    out: Array | None = None,
) -> Array:
    """`dropout` of whole channels: of (N, C, H, W) arrays.

    Parameters
    ----------
    As `dropout1d`, but for the axes.

    Returns
    -------
    array
        As `dropout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout1d`. An input of rank 3 is refused: PyTorch reads it as (N, C, L), and will read it as (C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> photos = np.ones((1, 2, 2, 8), np.float32)  # (N, H, W, C)
    >>> F.dropout2d(photos, 0.5, channel_axis=-1, generator=Generator(7, device="cpu"))[0, 0]
    array([[2., 2., 0., 0., 0., 2., 0., 2.],
           [2., 2., 0., 0., 0., 2., 0., 2.]], dtype=float32)
    """
    return forward(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout2d"], channel_axis)), out)


def dropout2d_vjp(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
) -> tuple[Array, DropoutVjpFn]:
    """`dropout2d`, and the function that takes the gradient of its output to that of its input.

    Parameters
    ----------
    As `dropout2d`.

    Returns
    -------
    output, vjp_fn
        As `dropout_vjp`.

    Raises
    ------
    TypeError, ValueError
        As `dropout2d` and `dropout_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y, vjp_fn = F.dropout2d_vjp(np.ones((1, 4, 2, 2), np.float32), generator=Generator(7, device="cpu"))
    >>> vjp_fn(np.ones_like(y)).input[0, :, 0, 0]
    array([2., 2., 0., 0.], dtype=float32)
    """
    return forward_vjp(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout2d"], channel_axis)))


def dropout3d(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
    out: Array | None = None,
) -> Array:
    """`dropout` of whole channels: of (N, C, D, H, W) arrays, or (C, D, H, W) for a single sample.

    Parameters
    ----------
    As `dropout1d`, but for the axes.

    Returns
    -------
    array
        As `dropout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout1d`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y = F.dropout3d(np.ones((4, 2, 2, 2), np.float32), 0.5, generator=Generator(7, device="cpu"))  # (C, D, H, W)
    >>> y[:, 0, 0, 0]
    array([2., 2., 0., 0.], dtype=float32)
    """
    return forward(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout3d"], channel_axis)), out)


def dropout3d_vjp(
    input: Array,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
) -> tuple[Array, DropoutVjpFn]:
    """`dropout3d`, and the function that takes the gradient of its output to that of its input.

    Parameters
    ----------
    As `dropout3d`.

    Returns
    -------
    output, vjp_fn
        As `dropout_vjp`.

    Raises
    ------
    TypeError, ValueError
        As `dropout3d` and `dropout_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> from cupybn import Generator
    >>> y, vjp_fn = F.dropout3d_vjp(np.ones((1, 4, 2, 2, 2), np.float32), generator=Generator(7, device="cpu"))
    >>> vjp_fn(np.ones_like(y)).input[0, :, 0, 0, 0]
    array([2., 2., 0., 0.], dtype=float32)
    """
    return forward_vjp(Call(input, p, training, inplace, generator, Channels(NDIMS["dropout3d"], channel_axis)))


# ---------------------------------------------------------------------------------------------------------------------
# The flow


class Saved(NamedTuple):
    """What the way back needs of the way forward."""

    checked: Checked
    drawn: Array | None  # None where nothing was drawn


def forward(call: Call, out: Array | None = None) -> Array:
    """The output of a call: the very array that was given where it is written there, or nothing is dropped."""
    output, _ = _forward(call, out)
    return output


def forward_vjp(call: Call) -> tuple[Array, DropoutVjpFn]:
    """The output of a call, and the function that goes back."""
    output, saved = _forward(call, None)
    return output, DropoutVjpFn(saved)


def _forward(call: Call, out: Array | None) -> tuple[Array, Saved]:
    """The output, and what a way back needs."""
    checked = call.checked(out)
    target = call.input if call.inplace else out
    if checked.keeps:
        if out is not None and out is not call.input:
            write_at_once([(plain(out), plain(call.input))])
        return call.input if target is None else target, Saved(checked, None)
    input, written = (call.input, target) if checked.settled else (plain(call.input), plain(target))
    with on_device_of(input):
        if not checked.draws:  # p is 1, or the input is empty
            output = _zeros(checked, input)
            if written is not None:
                write_at_once([(written, output)])
            return output if target is None else target, Saved(checked, None)
        state, drawn = call.state(checked.device), None
        try:
            made, drawn = _draw(checked, input, state, written if checked.direct else None)
            output = None if made is None else checked.layout.back(made)
            if written is not None and output is not None:
                write_at_once([(written, output)])
            return output if target is None else target, Saved(checked, drawn)
        except BaseException:
            _take_back(state, drawn)
            raise


def _draw(checked: Checked, input: Array, state: Array, out: Array | None) -> list[Array | None]:
    """New output, in the order of memory, if there is no `out`; and what was drawn."""
    tapes = checked.tapes
    if tapes is None:
        with unheard():
            return _draw_steps(checked, input, state, out)
    particulars = particulars_of("draw", (input, out), (state,), NO_NUMBERS)
    results = tapes.play(particulars)
    if results is None:
        with tapes.recorder(particulars) as recorder:
            results = recorder.results = _draw_steps(checked, input, state, out)
    return results


def _draw_steps(checked: Checked, input: Array, state: Array, out: Array | None) -> list[Array | None]:
    """`_draw`, step by step."""
    layout, ops = checked.layout, _ops_for(input)
    made = layout.empty(input) if out is None else None
    input, drawn = layout.conform(input), None
    try:
        drawn = ops.dropout_draw(state)
        _drop(checked, drawn, input, out if made is None else layout.back(made))
        return [made, drawn]
    except BaseException:
        _take_back(state, drawn)
        raise


def _take_back(state: Array, drawn: Array | None) -> None:
    """Leave the generator as it was before a call, which has raised, if that had drawn."""
    if drawn is not None:
        state[1:] -= 1


def _backward(saved: Saved, grad_output: Array) -> Array:
    """The gradient of the input, from that of the output, which has the layout of the input."""
    checked, drawn = saved
    if checked.keeps:
        return grad_output
    if drawn is None:
        return _zeros(checked, grad_output)
    tapes = checked.tapes
    if tapes is None:
        with unheard():
            (dx,) = _backward_steps(checked, drawn, grad_output)
    else:
        particulars = particulars_of("back", (grad_output,), (drawn,), NO_NUMBERS)
        results = tapes.play(particulars)
        if results is None:
            with tapes.recorder(particulars) as recorder:
                results = recorder.results = _backward_steps(checked, drawn, grad_output)
        (dx,) = results
    return checked.layout.back(dx)


def _backward_steps(checked: Checked, drawn: Array, grad_output: Array) -> list[Array | None]:
    """Gradient of the input, a new array in the order of memory."""
    dx = checked.layout.empty(grad_output)
    _drop(checked, drawn, grad_output, checked.layout.back(dx))
    return [dx]


def _drop(checked: Checked, drawn: Array, input: Array, out: Array) -> None:
    """Write what becomes of the elements of an array to another one; both have the layout."""
    layout, axes, ops = checked.layout, checked.axes, _ops_for(input)
    drops = Drops(drawn, checked.threshold, checked.scale)
    x: Array = layout.view(input)
    y: Array = layout.view(out)
    if axes is None:
        ops.dropout(x.reshape(-1), drops, y.reshape(-1))
    else:
        ops.dropout_channels(x.reshape(axes), drops, checked.swapped, y.reshape(axes))


def _zeros(checked: Checked, like: Array) -> Array:
    """New array of zeros of the kind and dtype of this one, with the layout."""
    zeros = checked.layout.empty(like)
    zeros.fill(0)
    return checked.layout.back(zeros)


def _ops_for(array: Array) -> ModuleType:
    """The module with the steps for arrays of this kind."""
    return numpy_dropout if isinstance(array, np.ndarray) else cupy_dropout
