"""The way back of the norms within a sample."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from cupybn._calls.call import Call
from cupybn._calls.flow import WayBack, backward, forward_and_saved
from cupybn._calls.saved import Saved

Array = Any  # numpy.ndarray or cupy.ndarray

Grads = TypeVar("Grads", bound=tuple[Any, ...])


class NormVjpFn(WayBack, Generic[Grads]):
    """Function from the gradient of a call's output to those of its arguments: what `layer_norm_vjp` returns.

    `instance_norm_vjp`, `group_norm_vjp` and `rms_norm_vjp` return such functions, too. Pure: it may be called again
    and changes nothing. It holds input, weight and bias by reference, and what it needs of the residual and the
    statistics as a copy.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[0, 1, 5], [2, 2, 8]], np.float32)  # two rows
    >>> y, vjp_fn = F.rms_norm_vjp(x, 3)
    >>> grads = vjp_fn(np.array([[1, 0, 0], [0, 0, 1]], np.float32))  # of a loss that is y[0, 0] + y[1, 2]
    >>> type(grads).__name__, grads.weight
    ('RMSNormGrads', None)
    >>> grads.input.round(3)
    array([[ 0.34 ,  0.   ,  0.   ],
           [-0.045, -0.045,  0.023]], dtype=float32)
    """

    __slots__ = ("_grads",)

    def __init__(self, saved: Saved, grads: type[Grads]) -> None:
        super().__init__(saved)
        self._grads = grads

    def __call__(self, grad_output: Array) -> Grads:
        """Gradients of the arguments, as the named tuple of the function.

        Raises
        ------
        TypeError, ValueError
            If grad_output is not an array of the input's kind, device, dtype and shape.
        """
        gradients = backward(self._saved, grad_output)
        named: Any = self._grads  # a class of named tuples
        grads: Grads = named(*gradients[: len(named._fields)])
        return grads


def forward_vjp(call: Call, grads: type[Grads]) -> tuple[Array, NormVjpFn[Grads]]:
    """The output of a call, and the function that goes back and returns gradients of this class."""
    output, saved = forward_and_saved(call)
    return output, NormVjpFn(saved, grads)
