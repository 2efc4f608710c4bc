"""Statistics and normalization of an image stack on disk that is larger than the memory it may take, chunk by chunk.

The stack is a time-lapse such as a microscope takes, made of a real photograph: (T, C, H, W) counts of 16 bits. The
stage drifts, the lamp warms up, the field of view is round, and some pixels of the camera are stuck at the largest
count. A mask leaves these pixels and the dark around the field out of all statistics.

The statistics come chunk by chunk, from tasks of Dask in two processes, and from `xarray.apply_ufunc`: the same
numbers, which are those of exact sums of integers. The mean of the chunks' variances is another, as the chunks' means
differ. On Linux this process limits its own memory meanwhile (with NumPy arrays and an .npy file), so that what does
not stay small is an error. What needs a package that is missing is left out, and named.

    pip install '.[examples,dask]'
    python examples/image_stack.py
"""

import pickle
import shutil
import sys
import tempfile
from fractions import Fraction
from functools import partial, reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path

import numpy as np

import cupybn
import cupybn.functional as F
import layers
from layers import to_numpy
from memory import MemoryLimit

FRAMES, LIMIT = 200, 32
SIZE, CHUNK = 256, 4  # pixels of a frame in either direction, frames of a chunk
STUCK = 65535  # largest count: such pixels are saturated
OFFSET = 400  # counts in the dark
LAMP = np.array([48_000, 36_000, 22_000])  # counts of red, green and blue light once the lamp is warm
COLOURS = ("red", "green", "blue")
BOUND = 1e-6  # largest error of a variance, relative, and of means and normalized values, in standard deviations
WORKERS = 2


# ---------------------------------------------------------------------------------------------------------------------
# The stack, on disk


def field_of_view(size):
    """The round part of a frame that light gets to, (H, W)."""
    y, x = (np.indices((size, size)) - (size - 1) / 2) / (size / 2)
    return x**2 + y**2 < 0.98


def acquire(count):
    """Chunks of frames, as a camera would take them."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg")[60 : 60 + SIZE].transpose(2, 0, 1) / 255
    rng, inside = np.random.default_rng(0), field_of_view(SIZE)
    stuck = rng.random((SIZE, SIZE)) < 0.004
    when = np.arange(count) / max(count - 1, 1)
    left = (when * (photograph.shape[2] - SIZE)).astype(int)  # the stage drifts by so many pixels
    lamp = 0.06 + 0.94 * (1 - np.exp(-3 * when)) / (1 - np.exp(-3)) + 0.01 * rng.standard_normal(count)
    for start in range(0, count, CHUNK):
        frames = []
        for t in range(start, min(start + CHUNK, count)):
            slide = 0.8 + 0.2 * photograph[..., left[t] : left[t] + SIZE]  # it lets 80% to 100% of the light through
            light = OFFSET + max(lamp[t], 0.03) * LAMP[:, None, None] * slide * inside
            light += np.sqrt(light) * rng.standard_normal(light.shape)  # noise of photons
            frames.append(np.where(stuck, STUCK, light.clip(0, STUCK - 1).round()))
        yield np.array(frames, np.uint16)


def write_stack(path, count):
    """Write the stack. Returns the exact mean and variance of each channel, from sums of integers, as floats."""
    from tqdm import tqdm

    stack = create(path, (count, 3, SIZE, SIZE), np.uint16)
    n, sums, squares = 0, [0] * 3, [0] * 3
    start = 0
    for chunk in tqdm(acquire(count), desc="acquire", total=-(-count // CHUNK), unit="chunk"):
        stack[start : start + len(chunk)] = chunk
        start += len(chunk)
        there = usable(chunk)
        n += int(there.sum())
        for c in range(3):
            values = chunk[:, c][there].astype(np.uint64)
            sums[c] += int(values.sum())
            squares[c] += int((values**2).sum())
    mean = [float(Fraction(s, n)) for s in sums]
    var = [float(Fraction(n * q - s * s, n * n)) for s, q in zip(sums, squares, strict=True)]
    return np.array(mean), np.array(var)


def create(path, shape, dtype):
    """New array on disk, to be written a slice at a time."""
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_array(path, mode="w", shape=shape, dtype=dtype, chunks=(CHUNK, *shape[1:]))
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def stored(path, mode="r"):
    """Array on disk, to be read a slice at a time, or written with mode "r+".

    Open it anew for each slice: pages of a file that have been read count as memory until its map is closed.
    """
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_array(path, mode=mode)
    return np.load(path, mmap_mode=mode)


def load_at_once(path):
    """What most people try first. Returns the text of the error, or None if it worked."""
    try:
        stored(path)[:].astype(np.float32)
    except MemoryError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Its statistics


def usable(frames):
    """The mask of some frames, (T, H, W): True in the field of view, where no channel is saturated."""
    return field_of_view(frames.shape[-1]) & (frames < STUCK).all(axis=1)


def on_device(frames, device):
    """Frames as float32 and their mask, NumPy or CuPy arrays. All counts of 16 bits are exact in float32."""
    xp = layers.xp if device == "cuda" else np
    return xp.asarray(frames, xp.float32), xp.asarray(usable(frames))


def moments_of(start, stop, path, device):
    """Moments of one chunk: a task of Dask, whose result travels between processes and is added to others."""
    x, mask = on_device(stored(path)[start:stop], device)
    return cupybn.StreamingMoments().update(x, mask)


def frame_moments(frame, device):
    """Moments of one frame, (C, H, W): what `xarray.apply_ufunc` puts in the place of each."""
    x, mask = on_device(frame[None], device)
    return cupybn.StreamingMoments().update(x, mask)


def normalize(frames, mean, var, device="cpu"):
    """Frames in standard deviations from the mean of their channel, as a NumPy array; 0 where they are masked out."""
    x, mask = on_device(frames, device)
    return to_numpy(F.batch_norm(x, mean, var, eps=0, mask=mask))


def in_chunks(path, device, memory):
    """Moments of the stack, of all pixels too, and the course of things: arrays with a row for each chunk."""
    from tqdm import tqdm

    total, everything = cupybn.StreamingMoments(), cupybn.StreamingMoments()
    course = {"chunk's mean": [], "chunk's var": [], "running var": []}
    for start in tqdm(range(0, stored(path).shape[0], CHUNK), desc="statistics", unit="chunk"):
        x, mask = on_device(stored(path)[start : start + CHUNK], device)
        total.update(x, mask)
        everything.update(x)
        for name, array in zip(course, (*F.moments(x, mask=mask), total.var()), strict=True):
            course[name].append(to_numpy(array))
        memory.look()
    return total, everything, {name: np.array(rows, np.float64) for name, rows in course.items()}


def normalize_in_chunks(path, target, mean, var, device, memory):
    """Write the normalized stack. Returns its moments."""
    from tqdm import tqdm

    shape = stored(path).shape
    create(target, shape, np.float32)
    result = cupybn.StreamingMoments()
    for start in tqdm(range(0, shape[0], CHUNK), desc="normalization", unit="chunk"):
        chunk = stored(path)[start : start + CHUNK]
        y = normalize(chunk, mean, var, device)
        stored(target, "r+")[start : start + CHUNK] = y
        result.update(y, usable(chunk))
        memory.look()
    return result


def with_dask(path, device):
    """Moments of the stack from tasks in several processes, each of a chunk, that a tree of sums brings together."""
    from distributed import Client, LocalCluster, as_completed
    from tqdm import tqdm

    settings = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**settings) as cluster, Client(cluster) as client:
        starts = range(0, stored(path).shape[0], CHUNK)
        parts = client.map(partial(moments_of, path=path, device=device), starts, [start + CHUNK for start in starts])
        for _ in tqdm(as_completed(parts), desc=f"Dask, {WORKERS} processes", total=len(parts), unit="chunk"):
            pass
        while len(parts) > 1:
            odd = parts[len(parts) // 2 * 2 :]
            parts = client.map(add, parts[::2], parts[1::2]) + odd
        return parts[0].result()


def with_xarray(path, target, device):
    """Moments of the stack, and how far its normalized blocks are from those that are stored.

    Each frame becomes its moments: an array of objects with the stack's labels, to be summed over any groups of frames.
    """
    import xarray
    from dask.array import from_array
    from tqdm.dask import TqdmCallback

    chunks = (CHUNK, *stored(path).shape[1:])
    labels = {"dims": ("time", "channel", "y", "x"), "coords": {"channel": list(COLOURS)}}
    stack, expected = (xarray.DataArray(from_array(stored(p), chunks=chunks), **labels) for p in (path, target))
    frames = xarray.apply_ufunc(
        partial(frame_moments, device=device),
        stack,
        input_core_dims=[["channel", "y", "x"]],
        vectorize=True,
        dask="parallelized",
        output_dtypes=[object],
    )
    with TqdmCallback(desc="xarray, statistics", unit="task"):
        total = reduce(add, frames.values)
    scale = partial(normalize, mean=total.mean, var=total.var(), device=device)
    normalized = xarray.apply_ufunc(scale, stack, dask="parallelized", output_dtypes=[np.float32])
    with TqdmCallback(desc="xarray, normalization", unit="task"):
        return total, float(abs(normalized - expected).max())


def found(what, *packages):
    """Whether packages can be found; if not, a line says what is left out."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(f"without {what}: {', '.join(missing)} cannot be found: pip install '.[dask]'")
    return not missing


# ---------------------------------------------------------------------------------------------------------------------
# The report


def row(name, values, note=""):
    print(f"  {name:34}", *(f"{round(float(value), 2) + 0.0:16,.2f}" for value in values), f"  {note}")


def error_of(values, exact):
    return float(abs(to_numpy(values) / exact - 1).max())


def draw(folder, path, course, exact, total, memory):
    """Draw frames as they are and normalized, what becomes of the statistics chunk by chunk, and the memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    top.suptitle("Frames of red, green and blue, as the lamp warms up and the stage drifts", fontsize=11)
    draw_frames(top.subplots(3, 5), stored(path), [to_numpy(array) for array in (total.mean, total.var())])
    drift, estimate, taken = bottom.subplots(1, 3)
    draw_course(drift, estimate, course, exact[1])
    draw_memory(taken, memory, 4 * stored(path).size)
    for ax in (drift, estimate, taken):
        ax.title.set_fontsize(10)
    layers.save_picture(figure, folder / "image_stack.png", dpi=80)


def draw_frames(axes, stack, of_stack):
    """Draw frames in the rows of axes: counts, and standard deviations of the stack, and of each frame alone."""
    names = ("as stored\n(counts)", "normalized by\nthe stack", "normalized by\neach frame")
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name, fontsize=9)
    for column, t in zip(axes.T, np.linspace(0, stack.shape[0] - 1, axes.shape[1]).astype(int), strict=True):
        frame = stack[t : t + 1]
        mask = usable(frame)
        of_frame = F.moments(frame.astype(np.float32), mask=mask, dtype=np.float64)
        by_stack, by_frame = (np.where(mask[:, None], normalize(frame, *m), np.inf) for m in (of_stack, of_frame))
        for ax, image in zip(column, (frame / LAMP.max(), by_stack / 4 + 0.5, by_frame / 5 + 0.5), strict=True):
            ax.imshow(image[0, :, ::2, ::2].transpose(1, 2, 0).clip(0, 1))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        column[0].set_title(f"frame {t}", fontsize=9)


def draw_course(drift, estimate, course, exact_var):
    """Draw the moments of each chunk, and standard deviations after each chunk, in thousands of counts."""
    after = np.arange(1, len(course["running var"]) + 1)
    colours = dict(zip(COLOURS, ("#d62728", "#2ca02c", "#1f77b4"), strict=True))
    for c, (name, colour) in enumerate(colours.items()):
        mean, std = course["chunk's mean"][:, c] / 1e3, np.sqrt(course["chunk's var"][:, c]) / 1e3
        drift.plot(after, mean, color=colour, label=name)
        drift.fill_between(after, mean - std, mean + std, color=colour, alpha=0.3, lw=0)
        estimate.plot(after, np.sqrt(course["running var"][:, c]) / 1e3, color=colour)
        estimate.axhline(np.sqrt(exact_var[c]) / 1e3, color=colour, linestyle=":")
        estimate.plot(
            after, np.sqrt(np.cumsum(course["chunk's var"][:, c]) / after) / 1e3, color=colour, linestyle="--"
        )
    for name, style in {"StreamingMoments": "-", "exact, whole stack": ":", "mean of chunks' variances": "--"}.items():
        estimate.plot([], [], color="0.3", linestyle=style, label=name)
    drift.set(title="Mean ± std of each chunk", xlabel="chunk", ylabel="thousand counts", ylim=(0, None))
    drift.legend(fontsize=8, loc="lower right")
    estimate.set(title="Standard deviation so far", xlabel="chunk", ylabel="thousand counts")
    estimate.set_ylim(0, 1.4 * np.sqrt(exact_var.max()) / 1e3)  # room for the legend
    estimate.legend(fontsize=8, loc="upper left")


def draw_memory(axes, memory, whole):
    for name, limit in memory.items():
        axes.plot(range(1, len(limit.peaks) + 1), np.array(limit.peaks) / 1e6, label=name)
    for name, size, style in (("the stack as float32", whole, ":"), ("limit", limit.size, "--")):
        axes.axhline(size / 1e6, color="0.3", linestyle=style)
        axes.annotate(name, (1, size / 1e6), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set(title="Memory taken, peak of each chunk", xlabel="chunk", ylabel="MB")
    axes.set_ylim(0, 1.15 * max(whole, limit.size) / 1e6)
    axes.legend(fontsize=8, loc="center right")


def main():
    args = layers.options(
        __doc__,
        "the picture",
        device=True,
        switches={"zarr": "store the stack as Zarr, not as .npy"},
        frames=(FRAMES, "frames of the stack"),
        limit=(LIMIT, "megabytes that this process may take"),
    )
    args.zarr = args.zarr and found("Zarr, as .npy", "zarr")
    check_space(args.output, args.frames)
    with tempfile.TemporaryDirectory(dir=args.output, ignore_cleanup_errors=True) as folder:
        compare(args, Path(folder))


def check_space(folder, count):
    """Exit unless the disk has room for the stack and for what it becomes: writes to a mapped file would be fatal."""
    needed, free = count * 3 * SIZE**2 * (2 + 4), shutil.disk_usage(folder).free  # uint16, and float32
    if needed > free:
        sys.exit(
            f"{folder}: expected {needed / 1e6:.0f} MB to be free for the stack and what it becomes "
            f"(got {free / 1e6:.0f} MB): give another --output, or fewer --frames"
        )


def compare(args, folder):
    """All of it, with the stack in a folder that is deleted afterwards."""
    path, target = (folder / f"{name}.{'zarr' if args.zarr else 'npy'}" for name in ("stack", "normalized"))
    exact = write_stack(path, args.frames)
    shape = stored(path).shape
    whole, limit = 4 * int(np.prod(shape)), args.limit * 10**6
    print(
        f"Stack {shape}, uint16, {path.suffix}: {whole / 1e6:.0f} MB as float32, limit {args.limit} MB, {args.device}"
    )
    hard = args.device == "cpu" and not args.zarr  # drivers of GPUs and threads of Zarr reserve more than they take
    if hard:
        with MemoryLimit(limit, hard) as alone:
            error = load_at_once(path)
        print(f"Loaded at once: {error or 'no error'}")
        if alone.hard and error is None and whole > limit:
            sys.exit("expected the limit of memory to hold")

    memory = {name: MemoryLimit(limit, hard) for name in ("statistics", "normalization")}
    try:
        with memory["statistics"] as limited:
            total, everything, course = in_chunks(path, args.device, limited)
        with memory["normalization"] as limited:
            result = normalize_in_chunks(path, target, total.mean, total.var(), args.device, limited)
    except MemoryError:
        sys.exit(f"{CHUNK} frames and what they become do not fit into {args.limit} MB: give a larger --limit")
    ways = {f"StreamingMoments, {len(course['running var'])} chunks": total}
    if found("Dask", "dask", "distributed"):
        ways[f"Dask, {WORKERS} processes"] = with_dask(path, args.device)
    distance = 0
    if found("xarray", "dask", "xarray"):
        ways["xarray, frame by frame"], distance = with_xarray(path, target, args.device)

    print("Variance of each channel" + " " * 25 + "".join(f"{colour:>17}" for colour in COLOURS))
    row("exact, from sums of integers", exact[1])
    errors = {name: error_of(stats.var(), exact[1]) for name, stats in ways.items()}
    for name, stats in ways.items():
        row(name, stats.var(), f"off by {errors[name]:.0e}")
    naive = course["chunk's var"].mean(axis=0)
    row("mean of the chunks' variances", naive, f"{float((exact[1] / naive).max()):.0f} times too small")
    row("without the mask", everything.var(), f"off by {error_of(everything.var(), exact[1]):.0%}")
    print("Normalized stack")
    row("mean", result.mean)
    row("variance", result.var())
    peaks = [peak for part in memory.values() for peak in part.peaks]
    if peaks:
        print(f"Memory taken: {max(peaks) / 1e6:.0f} MB at most, of {whole / 1e6:.0f} MB", end="; ")
    print(f"what travels between processes is {len(pickle.dumps(total))} bytes for each chunk")
    draw(args.output, path, course, exact, total, memory)

    off = [abs(to_numpy(stats.mean) - exact[0]).max() / np.sqrt(exact[1].min()) for stats in ways.values()]
    if max(*errors.values(), *off) > BOUND:
        sys.exit(f"expected the moments of the whole stack to {BOUND}")
    if distance > BOUND:
        sys.exit(f"expected the same normalized stack from xarray to {BOUND} (got {distance:.0e})")
    if abs(to_numpy(result.mean)).max() > BOUND or error_of(result.var(), 1) > BOUND:
        sys.exit(f"expected a normalized stack of mean 0 and variance 1 to {BOUND}")
    if hard and peaks and max(peaks) > limit:
        sys.exit(f"expected to take {args.limit} MB at most")


if __name__ == "__main__":
    layers.run(main)
