"""The layers of dropout: layers without arrays, some with a generator of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cupybn._calls import checks
from cupybn.dropout import functions
from cupybn.dropout.call import Call, Channels, check_p
from cupybn.dropout.functions import NDIMS, DropoutVjpFn
from cupybn.dropout.generator import Generator
from cupybn.layers.layer import Layer

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray


class Dropout(Layer):
    """Dropout: in training mode each element becomes 0 with probability p, and x / (1 - p) otherwise.

    In eval mode the output is the input. See `cupybn.functional.dropout` for what is dropped.

    Parameters
    ----------
    p : float
        Probability to be dropped, from 0 to 1. Read at every call.
    inplace : bool
        Whether the output is written to the input. Read at every call.
    seed : int or None
        Seed of a generator of the layer's own, from 0 to 2**64 - 1. With None it draws from that which
        `cupybn.manual_seed` is for, that of the input's device, and takes arrays of any device.
    device : "cpu", "cuda", "cuda:N" or None
        Where its generator is. None is the current CUDA device if CuPy finds one, else "cpu".

    Attributes
    ----------
    generator : Generator or None
        The layer's own generator. May be set, as to one that several layers share.
    training : bool
        The mode, which `train` and `eval` set. New layers are in training mode.

    Raises
    ------
    TypeError
        If p is not a number, inplace not a bool, or seed not an integer.
    ValueError
        If p is not from 0 to 1, the seed is negative or too large, or the device is unknown.
    RuntimeError
        If the device is not there.

    Notes
    -----
    The state dict is empty. To go on after a checkpoint as without it, save ``layer.generator.state`` beside it.
    Pickles and deep copies have a copy of the generator, which goes on by itself.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import Dropout
    >>> layer = Dropout(0.5, seed=7, device="cpu")
    >>> x = np.arange(1, 9, dtype=np.float32)
    >>> y, vjp_fn = layer.vjp(x)
    >>> y
    array([ 2.,  4.,  0.,  0.,  0., 12.,  0., 16.], dtype=float32)
    >>> vjp_fn(np.ones_like(y)).input
    array([2., 2., 0., 0., 0., 2., 0., 2.], dtype=float32)
    >>> layer.eval()(x) is x
    True
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, seed: int | None = None, device: str | None = None
    ) -> None:
        check_p(p)
        checks.check_bool("inplace", inplace)
        super().__init__((), device, np.dtype(np.float32))
        self.p = p
        self.inplace = inplace
        self.seed = seed
        self.generator = None if seed is None else Generator(seed, self._device)

    def forward(self, input: Array) -> Array:
        """The output, as `cupybn.functional.dropout`; in eval mode the input itself.

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.dropout`, and if ``training`` has been set to something else than a bool.
        """
        return functions.forward(self._call(input))

    def __call__(self, input: Array) -> Array:
        """The output, as `forward`."""
        return self.forward(input)

    def vjp(self, input: Array) -> tuple[Array, DropoutVjpFn]:
        """The output, as `forward`, and the function from the output's gradient to that of the input.

        Returns
        -------
        output : array
        vjp_fn : callable
            ``vjp_fn(grad_output) -> DropoutGrads(input)``; see `cupybn.functional.dropout_vjp`.
        """
        return functions.forward_vjp(self._call(input))

    def _call(self, input: Array) -> Call:
        """The call that this layer makes."""
        return Call(input, self.p, self.training, self.inplace, self.generator, self._channels(), of_layer=True)

    def _channels(self) -> Channels | None:
        """What is dropped as a whole; None for single elements."""
        return None

    def to(self, device: str | None = None, dtype: npt.DTypeLike | None = None) -> Self:
        """Move the layer's generator, if it has one, to a device. Returns the layer.

        Parameters
        ----------
        device : "cpu", "cuda", "cuda:N" or None
            None leaves it where it is.
        dtype : dtype or None
            Taken as by other layers; there is no array that it could be for.

        Raises
        ------
        ValueError, RuntimeError
            If the device is unknown, or is not there.

        Examples
        --------
        >>> from cupybn import Dropout
        >>> layer = Dropout(seed=7, device="cpu").to("cpu")
        >>> layer.device, layer.generator.device
        ('cpu', 'cpu')
        """
        before = self._device, self.dtype
        super().to(device, dtype)
        if self.generator is not None and device is not None:
            try:
                self.generator.to(self._device)
            except BaseException:
                self._device, self.dtype = before
                raise
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._settings().items())})"

    def _settings(self) -> dict[str, Any]:
        """Arguments of the constructor that the text of the layer has."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"p": self.p, "inplace": self.inplace, **seed}


class _ChannelDropout(Dropout):
    """Dropout of whole channels of a sample."""

    _name: str
    """Name of the function."""

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        seed: int | None = None,
        device: str | None = None,
        channel_axis: int = 1,
    ) -> None:
        self.channel_axis = channel_axis
        self._channels().axis()
        super().__init__(p, inplace, seed=seed, device=device)

    def _channels(self) -> Channels:
        return Channels(NDIMS[self._name], self.channel_axis)

    def _settings(self) -> dict[str, Any]:
        axis = {} if self.channel_axis == 1 else {"channel_axis": self.channel_axis}
        return {**super()._settings(), **axis}


class Dropout1d(_ChannelDropout):
    """Dropout of whole channels of (N, C, L) arrays, or (C, L) for a single sample, as `Dropout` of their elements.

    Parameters
    ----------
    p, inplace, seed, device
        As for `Dropout`.
    channel_axis : int
        The axis of C, counted from either end of (N, C, L), and not 0.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import Dropout1d
    >>> layer = Dropout1d(0.5, seed=7, device="cpu")
    >>> layer(np.ones((1, 4, 2), np.float32))[0]
    array([[2., 2.],
           [2., 2.],
           [0., 0.],
           [0., 0.]], dtype=float32)
    """

    _name = "dropout1d"


class Dropout2d(_ChannelDropout):
    """Dropout of whole channels of (N, C, H, W) arrays, as `Dropout` of their elements.

    Parameters
    ----------
    p, inplace, seed, device
        As for `Dropout`.
    channel_axis : int
        The axis of C, counted from either end, and not 0; -1 for channels-last data.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import Dropout2d
    >>> layer = Dropout2d(0.5, seed=7, device="cpu", channel_axis=-1)
    >>> layer(np.ones((1, 2, 2, 4), np.float32))[0, 0]
    array([[2., 2., 0., 0.],
           [2., 2., 0., 0.]], dtype=float32)
    """

    _name = "dropout2d"


class Dropout3d(_ChannelDropout):
    """Dropout of whole channels of (N, C, D, H, W) arrays, or (C, D, H, W), as `Dropout` of their elements.

    Parameters
    ----------
    p, inplace, seed, device
        As for `Dropout`.
    channel_axis : int
        The axis of C, counted from either end of (N, C, D, H, W), and not 0.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import Dropout3d
    >>> layer = Dropout3d(0.5, seed=7, device="cpu")
    >>> layer(np.ones((4, 1, 1, 2), np.float32))[:, 0, 0]  # (C, D, H, W)
    array([[2., 2.],
           [2., 2.],
           [0., 0.],
           [0., 0.]], dtype=float32)
    """

    _name = "dropout3d"
