"""PyTorch models with cupybn's batch norms against the same models as they were, to see when converting pays.

    python benchmarks/torch_bridge.py             # on a GPU; without one on the CPU, ratios alone
    python benchmarks/torch_bridge.py --compile   # and what torch.compile makes of PyTorch's single layers
    python benchmarks/torch_bridge.py --short     # a tiny network: does it run?

The network is ResNet-50 (`torch_resnet.py`). Its training step is forward, loss, backward and SGD, in float32 and in
bfloat16 by autocast, NCHW and channels last. It is measured as PyTorch has it, by `cupybn.torch.convert`, and with
blocks that leave ReLU and the sum to the norms, which conversion alone does not. All sides have the same weights, are
in one process and take turns; the first call of a turn is not counted. Single layers are measured forward and back, and
by a gradient penalty, which takes the way back of the way back. On a GPU time is that between events, so that the
host's time counts where it takes longer than the device; a tiny layer shows it by itself. On the CPU it is that of the
processor, with one thread. The exit status is 1 if a result differs from PyTorch's by more than it may, or if a
measurement failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from turns import commit

import cupybn
from cupybn._arrays.devices import cuda_missing
from cupybn._cli.extras import optional


def main() -> int:
    parser = argparse.ArgumentParser(description="PyTorch models, converted to cupybn's batch norms and not.")
    parser.add_argument("--short", action="store_true", help="a tiny network: does it run?")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside single layers, too")
    parser.add_argument("--batch", type=int, help="images of a step (default: 64 on a GPU, 4 on the CPU)")
    parser.add_argument("--image", type=int, help="their height and width (default: 224 on a GPU, 64 on the CPU)")
    parser.add_argument("--rounds", type=int, help="turns of each side (default: 7)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop (default: no limit)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing: `pip install torch`")
    if min(value for value in (args.batch, args.image, args.rounds, 1) if value is not None) < 1:
        parser.error("expected --batch, --image and --rounds of 1 or more")
    import torch_report

    report = measure(args, the_device())
    print(f"\n{torch_report.title(report)}\n\n{torch_report.text(report)}")
    print(*torch_report.write(report, args.output), sep="\n")
    return 1 if report["wrong"] else 0


def the_device() -> str:
    """``"cuda"`` where both PyTorch and CuPy find a GPU, else ``"cpu"``."""
    torch: Any = optional("torch")
    emulated = hasattr(optional("cupy"), "emulator")
    return "cuda" if torch.cuda.is_available() and not emulated and not cuda_missing() else "cpu"


def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure, and return all that goes into the results file."""
    import torch
    import torch_measure

    torch_measure.prepare(device)
    by_device = torch_measure.FULL if device == "cuda" else torch_measure.ON_THE_CPU
    plan = torch_measure.SHORT if args.short else by_device
    given = {name: getattr(args, name) for name in ("batch", "image", "rounds") if getattr(args, name) is not None}
    plan = plan._replace(**given)
    deadline = time.monotonic() + 60 * args.minutes
    records: list[torch_measure.Record] = []
    beside = torch.cuda.is_available() and device == "cpu"
    notes = [f"on the CPU: PyTorch finds a GPU, but {cuda_missing() or 'this CuPy is the stand-in'}"] if beside else []
    for job in tqdm(torch_measure.jobs(plan, device, args.compile, lambda: deadline - time.monotonic()), unit="job"):
        if time.monotonic() > deadline:
            notes.append(f"{job.name}: not measured, the time was over")
        else:
            records += torch_measure.done(job)
    wrong = torch_measure.wrong(records)
    return {
        "device": device,
        "short": args.short,
        "machine": machine(device),
        "settings": {
            "batch": plan.batch,
            "image": plan.image,
            "rounds": plan.rounds,
            "network": plan.network._asdict(),
        },
        "notes": notes,
        "wrong": wrong,
        "records": records,
    }


def machine(device: str) -> dict[str, str]:
    """Versions of libraries, and the GPU or the number of threads."""
    import torch

    cupy = optional("cupy")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, one thread, {platform.machine()}",
        "cupybn": f"{cupybn.__version__} at {commit(Path(cupybn.__file__).parent)}",
        "PyTorch": torch.__version__,
        **({"CuPy": cupy.__version__} if device == "cuda" else {}),
        "Python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
