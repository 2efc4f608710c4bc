"""Batch norm on sequences: (N, C, L), and with ``channel_axis=-1`` (N, L, C), without moving the data.

The sequences are the lines of a photograph, of 640 steps with three channels. The numbers are the same in every layout,
up to the order in which they were added; those of a view are the same bits as those of the array that it looks at.

    pip install '.[examples]'
    python examples/sequence.py
"""

import numpy as np

import layers
from cupybn import BatchNorm1d
from layers import xp


def results(x, dy, channel_axis):
    """Arrays that one step of training makes, by name; those of x's shape as (N, L, C)."""
    norm = BatchNorm1d(3, channel_axis=channel_axis)
    y, vjp_fn = norm.vjp(x)
    dx, dweight, dbias, _ = vjp_fn(dy)
    if channel_axis == 1:
        y, dx = y.transpose(0, 2, 1), dx.transpose(0, 2, 1)
    return {
        "y": y,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def main():
    layers.options(__doc__)
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg").astype(np.float32)
    rng = np.random.default_rng(0)
    x = xp.asarray(photograph)  # (N, L, C)
    dy = xp.asarray(rng.normal(size=x.shape).astype(np.float32))
    x_view, dy_view = x.transpose(0, 2, 1), dy.transpose(0, 2, 1)  # (N, C, L) in the same memory

    last = results(x, dy, channel_axis=-1)
    view = results(x_view, dy_view, channel_axis=1)
    first = results(xp.ascontiguousarray(x_view), xp.ascontiguousarray(dy_view), channel_axis=1)

    print(f"(N, L, C) = {x.shape}, the same as an (N, C, L) view, and copied to (N, C, L)")
    print("array           largest value   largest difference of the view   of the copy")
    for name, array in last.items():
        size, of_view, of_copy = (float(abs(a).max()) for a in (array, array - view[name], array - first[name]))
        print(f"{name:15} {size:13.2f}   {of_view:30.2g}   {of_copy:11.2g}")


if __name__ == "__main__":
    layers.run(main)
