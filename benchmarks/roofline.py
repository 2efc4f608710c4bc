"""How fast the kernels can be, on paper: the share of the bandwidth of a copy, and what binds them, on seven GPUs.

    python benchmarks/roofline.py                                         # writes results/roofline.md and .png
    python benchmarks/roofline.py --measured results/h200/NAME.json

Instructions are those that `benchmarks/instructions` has counted in machine code, launches those that the library
would choose on each GPU, and rates those that NVIDIA publishes; the instructions of sm_90 stand for all. A kernel takes
as long as what it needs most: memory, issue slots, or a pipeline; and each launch takes a little on top. What the model
does not know: latencies within a block, rounds of blocks, and what the cache still holds. Measurements, where there are
some, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import matplotlib
from gpu_cases import RESNET50

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.problem import OPERATIONS
from cupybn._cli.table import markdown
from cupybn._steps import plans
from cupybn._steps.resident import Device

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BATCH = 32
PACK = 16
"""Bytes of one array that instructions are counted for."""
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
OPERATION_NAMES = ("training", "inference", "backward")
ON_CHIP = {"training": ("bn_forward", 1), "backward": ("bn_backward", 2)}
"""The kernel that keeps channels on chip, and how many arrays it reads."""
STREAMED = {
    "training": (("bn_stats", 1), ("bn_normalize", 2)),
    "inference": (("bn_normalize", 2),),
    "backward": (("bn_backward_reduce", 2), ("bn_backward_input", 3)),
}
"""The kernels of an operation that reads its input again, and how many arrays each of them reads or writes."""
ALIGNMENT = 512
"""Bytes of which the addresses of arrays are a multiple in CuPy's memory pool."""
FIRST_DEVICE = 1 << 20
"""Number that the library gets for the first of these GPUs: no real device has it, so plans for real ones stay."""
LAUNCH = 2.4
"""Microseconds that a launch takes beside moving its bytes: measured on an H200, copies of 16 to 256 MiB at 4.28
TB/s."""
SHARES = {"memory": 0.95, "issue": 0.65}
"""Shares of the published rates that a kernel reaches: dependent instructions, barriers and unequal warps take the
rest."""
SHARE_OF_A_PIPE = 0.80
REACH = 3
"""Factor by which a multiprocessor alone can exceed its equal share of the bandwidth."""
COLOURS = {
    "memory": "C2",
    "issue": "C3",
    "fma": "C1",
    "alu": "C4",
    "fp64": "C0",
    "xu": "C6",
    "lsu": "C8",
    "launch": "0.6",
}
MARKERS = {"training": "o", "inference": "s", "backward": "^"}


@dataclass(frozen=True)
class Gpu:
    """A GPU's published figures, except for clocks under load and the bandwidth of a copy: 90 % of the peak, or the
    H200's as measured.
    """

    name: str
    device: Device
    clock: float  # GHz, under load
    bandwidth: float  # GB/s of a copy
    rates: dict[str, float]
    """Thread-instructions for each clock and multiprocessor, by pipeline; "issue" is all of them together."""


def _rates(fma: float, fp64: float) -> dict[str, float]:
    return {"issue": 128, "fma": fma, "alu": 64, "fp64": fp64, "xu": 16, "lsu": 32}


def _device(multiprocessors: int, kib: int, clusters: bool = False) -> Device:
    shared = kib << 10
    return Device(multiprocessors, shared if kib == 64 else shared - 1024, shared, clusters)


GPUS = (
    Gpu("H200", _device(132, 228, True), 1.75, 4280, _rates(128, 64)),
    Gpu("H100 SXM", _device(132, 228, True), 1.75, 3000, _rates(128, 64)),
    Gpu("A100 80 GB", _device(108, 164), 1.41, 1750, _rates(64, 32)),
    Gpu("L40S", _device(142, 100), 2.3, 780, _rates(128, 2)),
    Gpu("RTX 4090", _device(128, 100), 2.5, 920, _rates(128, 2)),
    Gpu("RTX 3090", _device(82, 100), 1.75, 850, _rates(128, 2)),
    Gpu("T4", _device(40, 64), 1.2, 250, _rates(64, 2)),
)


# ---------------------------------------------------------------------------------------------------------------------
# Counted instructions


class Count(NamedTuple):
    """Thread-instructions for each pack, in all ("issue") and by pipeline, and those that a warp executes once."""

    per_pack: dict[str, float]
    once: float


Counts = dict[tuple[str, str, str], Count]  # keys: kind of rows, kernel, dtype


def read_counts(text: str) -> Counts:
    """The counts in the tables of `benchmarks/instructions`: a heading for each kind of rows, a line for each kernel
    and dtype.
    """
    counts: Counts = {}
    rows, head = "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("## "):
            rows, head = line[3:], []
        elif line.startswith("|") and not head:
            head = cells
        elif line.startswith("|") and not set(line) <= set("|-: "):
            of = dict(zip(head, cells, strict=True))
            if of.get("variant", "plain") == "plain":
                pipes = {name: float(of[name]) for name in ("issue", "fma", "alu", "fp64", "xu", "lsu") if name in of}
                counts[rows, of["kernel"], of["dtype"]] = Count(pipes, float(of["once"]))
    return counts


def kind_of_rows(channels_last: bool, channels: int, plane: int) -> str:
    """The counted kind of rows that is most like these: whole packs or not, long or short."""
    if channels_last:
        return f"Channels last, C = {256 if channels % 8 == 0 else 35}"
    return f"Channels first, rows of {'56 x 56' if plane % 8 == 0 else '14 x 14' if plane > 100 else '7 x 7'}"


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Layer(NamedTuple):
    """The input of a batch norm layer as the kernels see it: (N, C, L), or (N * L, C) channels last."""

    N: int
    C: int
    L: int
    dtype: str
    channels_last: bool

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.N * self.C * self.L * ITEMSIZE[self.dtype]

    @property
    def name(self) -> str:
        """The layer's name: C and the side of its square planes, such as "64 @ 56"."""
        return f"{self.C} @ {math.isqrt(self.L)}"


class Launch(NamedTuple):
    """A kernel with its grid, and how many bytes it moves."""

    kernel: str
    nbytes: float
    blocks: int
    threads: int


def launches(layer: Layer, operation: str, gpu: Gpu) -> list[Launch]:
    """What the library would launch on a GPU: it is asked with an array that has no memory."""
    N, C, L, dtype, channels_last = layer
    shape = (N * L, C, 1) if channels_last else (N, C, L)
    memory = SimpleNamespace(ptr=ALIGNMENT, device_id=FIRST_DEVICE + GPUS.index(gpu))
    x = SimpleNamespace(shape=shape, dtype=parameter_dtype(dtype), size=math.prod(shape), data=memory)
    with patch.object(plans, "properties_of", lambda index: GPUS[index - FIRST_DEVICE].device):
        if operation in ON_CHIP:
            kernel, arrays = ON_CHIP[operation]
            plan = plans.choose_resident(kernel, x)
            if plan is not None:
                return [_launch(kernel, arrays + 1, layer, plan.geometry)]
        streamed = STREAMED[operation]
        return [_launch(kernel, passes, layer, plans.choose(kernel, x).geometry) for kernel, passes in streamed]


def _launch(kernel: str, passes: int, layer: Layer, geometry: Any) -> Launch:
    return Launch(kernel, passes * layer.nbytes, math.prod(geometry.grid), geometry.threads)


def needs(launch: Launch, layer: Layer, gpu: Gpu, count: Count) -> dict[str, float]:
    """The microseconds that a launch needs of each resource: memory, issue slots, pipelines."""
    multiprocessors = gpu.device.multiprocessors
    busy = min(1.0, launch.blocks / multiprocessors)
    packs, warps = layer.nbytes / PACK, launch.blocks * launch.threads / 32
    times = {"memory": launch.nbytes / gpu.bandwidth / SHARES["memory"] / min(1.0, REACH * busy) / 1e3}
    for pipe, rate in gpu.rates.items():
        if pipe in count.per_pack:
            instructions = packs * count.per_pack[pipe] + (warps * 32 * count.once if pipe == "issue" else 0)
            peak = rate * multiprocessors * busy * gpu.clock * 1e3
            times[pipe] = instructions / peak / SHARES.get(pipe, SHARE_OF_A_PIPE)
    return times


class Prediction(NamedTuple):
    """The predicted time of an operation."""

    us: float
    share: float  # time of a copy of the fewest bytes / predicted time
    binds: str  # the resource that its longest launch is bound by


def predict(layer: Layer, operation: str, gpu: Gpu, counts: Counts) -> Prediction:
    """The time of an operation: the sum over its launches, each as long as the resource that it needs longest."""
    rows = kind_of_rows(layer.channels_last, layer.C, layer.L)
    total, longest, binds = 0.0, 0.0, "launch"
    for launch in launches(layer, operation, gpu):
        times = needs(launch, layer, gpu, counts[rows, launch.kernel, layer.dtype])
        worst = max(times, key=lambda name: times[name])
        total += times[worst] + LAUNCH
        if times[worst] > max(longest, LAUNCH):
            longest, binds = times[worst], worst
    copy = OPERATIONS[operation].passes * layer.nbytes / gpu.bandwidth / 1e3 + LAUNCH
    return Prediction(total, copy / total, binds)


def resnet50(channels_last: bool, dtype: str) -> list[Layer]:
    """The inputs of ResNet-50's twelve kinds of batch norm layers."""
    return [Layer(BATCH, channels, size * size, dtype, channels_last) for channels, size in RESNET50]


# ---------------------------------------------------------------------------------------------------------------------
# Beside measurements


class Measured(NamedTuple):
    """The time that was measured for an operation, and the one that is predicted."""

    case: str
    operation: str
    layer: Layer
    us: float
    share: float
    predicted: Prediction


def beside(records: Iterable[dict[str, Any]], gpu: Gpu, counts: Counts) -> Iterator[Measured]:
    """The measured operations of cupybn that the model knows, each with its prediction."""
    for record in records:
        if record["peer"] != "cupybn" or record["operation"] not in OPERATION_NAMES or "error" in record:
            continue
        if record["group"] != "first contact":
            continue  # the case with dead channels
        shape = record["shape"]
        last = record["layout"] in ("NHWC", "NC")
        C = shape[-1] if last else shape[1]
        layer = Layer(shape[0], C, math.prod(shape[1:]) // C, record["dtype"], last)
        case = f"{record['layout']} {'x'.join(map(str, shape))} {record['dtype']}"
        us = record["cold_us"]["median"]
        try:
            predicted = predict(layer, record["operation"], gpu, counts)
        except KeyError:
            continue  # no kind of rows like these was counted
        yield Measured(case, record["operation"], layer, us, record["share_of_copy"], predicted)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def page(counts: Counts, measured: Sequence[Measured], source: str) -> str:
    """The page: all predictions, and beside them what was measured."""
    parts = ["# Predictions", (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()]
    parts += [
        f"Shares of the bandwidth of a copy. Predicted: the median of ResNet-50's twelve layers at batch {BATCH}, "
        "least and most, and what binds most of them. Measured: the median of so many shapes."
    ]
    for gpu in GPUS:
        parts += [f"## {gpu.name}", markdown(HEAD, list(rows_of(gpu, counts, measured)))]
    if measured:
        head = ["case", "operation", "us, predicted", "measured", "share, predicted", "measured", "bound by"]
        rows = [
            [
                *(m.case, m.operation, f"{m.predicted.us:.1f}", f"{m.us:.1f}"),
                *(f"{m.predicted.share:.2f}", f"{m.share:.2f}", m.predicted.binds),
            ]
            for m in measured
        ]
        parts += [f"## {GPUS[0].name}, predicted and measured", f"{source}.", fit(measured), markdown(head, rows)]
    return "\n\n".join(parts) + "\n"


HEAD = ["layout, dtype", *(f"{name}, {word}" for name in OPERATION_NAMES for word in ("predicted", "measured"))]
NOT_YET = "not measured yet"


def rows_of(gpu: Gpu, counts: Counts, measured: Sequence[Measured]) -> Iterator[list[str]]:
    """The rows of a GPU's table, one for each layout and dtype: the median share, the range, and what binds most
    layers.
    """
    for channels_last in False, True:
        for dtype in ITEMSIZE:
            cells = []
            for operation in OPERATION_NAMES:
                made = [predict(layer, operation, gpu, counts) for layer in resnet50(channels_last, dtype)]
                shares = [p.share for p in made]
                ((binds, _),) = Counter(p.binds for p in made).most_common(1)
                cells.append(f"{median(shares):.2f} ({min(shares):.2f} .. {max(shares):.2f}) {binds}")
                like = (dtype, channels_last)
                here = [m.share for m in measured if m.operation == operation and m.layer[3:] == like]
                cells.append(f"{median(here):.2f}, of {len(here)}" if here and gpu is GPUS[0] else NOT_YET)
            yield [f"{'NHWC' if channels_last else 'NCHW'}, {dtype}", *cells]


def short(counts: Counts, measured: Sequence[Measured], dtype: str) -> str:
    """A table of all GPUs for one dtype."""
    rows = []
    for gpu in GPUS:
        rows += [
            [f"{gpu.name}, {row[0]}", *row[1:]]
            for row in rows_of(gpu, counts, measured)
            if row[0].endswith(f" {dtype}")
        ]
    return markdown(["GPU", *HEAD[1:]], rows)


def fit(measured: Sequence[Measured]) -> str:
    """The lines that say how far predictions are off."""
    words = []
    for name, channels_last in ("first", False), ("last", True):
        ratios = [m.us / m.predicted.us for m in measured if m.layer.channels_last == channels_last]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            words.append(f"channels {name}, {mean:.2f} ({len(ratios)}, from {min(ratios):.2f} to {max(ratios):.2f})")
    return f"Measured times as multiples of those that are predicted, geometric means: {'; '.join(words)}."


def picture(counts: Counts, measured: Sequence[Measured], dtype: str, path: Path) -> None:
    """Draw a panel for each layout and GPU: a line for each layer, a mark for each operation, a colour for what binds
    it.
    """
    size = 2 + 2.1 * len(GPUS), 7
    figure, axes = plt.subplots(2, len(GPUS), figsize=size, sharex=True, sharey=True, layout="constrained")
    used = set()
    for row, channels_last in enumerate((False, True)):
        layers = resnet50(channels_last, dtype)
        for axis, gpu in zip(axes[row], GPUS, strict=True):
            for y, layer in enumerate(layers):
                for operation, marker in MARKERS.items():
                    p = predict(layer, operation, gpu, counts)
                    axis.plot(p.share, y, marker, color=COLOURS[p.binds], markersize=5)
                    used.add(p.binds)
            if gpu is GPUS[0]:
                for m in measured:
                    if m.layer in layers:
                        axis.plot(m.share, layers.index(m.layer), MARKERS[m.operation], color="black", fillstyle="none")
            axis.set_title(f"{gpu.name}, {'NHWC' if channels_last else 'NCHW'}", fontsize=8)
            axis.set_xlim(0, 1.05)
            axis.grid(alpha=0.2)
            axis.tick_params(labelsize=7)
        axes[row][0].set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axes[0][0].invert_yaxis()
    handles = [plt.Line2D([], [], linestyle="", marker=m, color="0.4", label=o) for o, m in MARKERS.items()]
    handles += [
        plt.Line2D([], [], linestyle="", marker="o", color=COLOURS[b], label=f"bound by {b}")
        for b in COLOURS
        if b in used
    ]
    if measured:
        handles.append(plt.Line2D([], [], linestyle="", marker="o", color="black", fillstyle="none", label="measured"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    axes[1][len(GPUS) // 2].set_xlabel("share of the bandwidth of a copy", fontsize=8)
    figure.suptitle(f"Predicted: ResNet-50 at batch {BATCH}, {dtype}", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog=about[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", type=Path, default=RESULTS / "instructions.md", help="what was counted")
    parser.add_argument("--measured", type=Path, help="results on the first of the GPUs, as gpu_results.py keeps them")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float16", help="of the picture (default: float16)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the page and the picture")
    parser.add_argument("--name", default="roofline", help="of these two files (default: roofline)")
    args = parser.parse_args()
    counts = read_counts(args.instructions.read_text())
    kept = json.loads(args.measured.read_text()) if args.measured else {"records": [], "what": ""}
    measured = list(beside(kept["records"], GPUS[0], counts))
    args.output.mkdir(parents=True, exist_ok=True)
    paths = [args.output / f"{args.name}{suffix}" for suffix in (".md", ".png")]
    paths[0].write_text(page(counts, measured, kept["what"]))
    picture(counts, measured, args.dtype, paths[1])
    print(short(counts, measured, args.dtype), *([fit(measured)] if measured else []), *paths, sep="\n\n")


if __name__ == "__main__":
    main()
