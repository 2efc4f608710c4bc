"""Views by strides."""

import numpy as np

from cupy._functions import lift

as_strided = lift(np.lib.stride_tricks.as_strided)
sliding_window_view = lift(np.lib.stride_tricks.sliding_window_view)
