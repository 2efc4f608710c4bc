"""What `torch_bridge.py` measures: training steps of a network and single layers, by PyTorch and cupybn, in turns."""

from __future__ import annotations

import copy
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch_resnet import ResNet, Size
from turns import ratio, spread

import cupybn.torch
from cupybn._cli.measure import Effort, host_time

PYTORCH, CONVERTED, FUSED, COMPILED = "PyTorch", "converted", "converted and fused", "torch.compile"
Record = dict[str, Any]
Call = Callable[[], Any]

LEAST_CALL = 1e-7
"""Seconds that a call takes, at least, if the clock stands still meanwhile."""
LOSS_OFF = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative difference of the first loss from PyTorch's that is allowed."""
GRADIENTS_OFF = {"float32": 0.1, "bfloat16": 0.5}
"""Difference of its gradients, all as one vector, that is allowed: many layers make much of a rounding."""
RESULTS_OFF = {"float32": 1e-3, "bfloat16": 3e-2}
"""Difference of a layer's results from PyTorch's that is allowed, as a share of the largest of them."""


class Case(NamedTuple):
    """A memory format and a dtype of a network's training step."""

    layout: str
    """``"NCHW"`` or ``"NHWC"``, PyTorch's channels-last."""
    dtype: str
    """``"float32"``, or ``"bfloat16"``: by autocast, with parameters of float32."""

    @property
    def name(self) -> str:
        """The case's name in tables."""
        return f"{self.layout} {self.dtype}"


CASES = tuple(Case(layout, dtype) for dtype in ("float32", "bfloat16") for layout in ("NCHW", "NHWC"))


class LayerCase(NamedTuple):
    """A batch norm by itself: the shape as PyTorch has it, the memory format, the dtype of the input."""

    shape: tuple[int, ...]
    layout: str = "NCHW"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The case's name in tables."""
        return f"{self.layout} {'x'.join(map(str, self.shape))} {self.dtype}"


class Plan(NamedTuple):
    """Sizes of everything that is measured, and how often."""

    network: Size
    batch: int
    image: int
    """Height and width of the images."""
    cases: tuple[Case, ...]
    layers: tuple[LayerCase, ...]
    tiny: LayerCase
    """Layer whose kernels are done before the host has launched the next ones."""
    rounds: int
    """Turns of each side."""
    seconds: float
    """Seconds of a turn, about."""


FULL = Plan(
    network=Size(),
    batch=64,
    image=224,
    cases=CASES,
    layers=(
        LayerCase((32, 64, 112, 112)),
        LayerCase((32, 256, 56, 56)),
        LayerCase((32, 256, 56, 56), "NHWC"),
        LayerCase((32, 256, 56, 56), "NHWC", "bfloat16"),
        LayerCase((32, 512, 28, 28), "NCHW", "bfloat16"),
        LayerCase((32, 2048, 7, 7)),
    ),
    tiny=LayerCase((4, 8, 4, 4)),
    rounds=7,
    seconds=0.2,
)
"""What a GPU can do in about a minute."""
ON_THE_CPU = FULL._replace(
    batch=4, image=64, layers=tuple(case._replace(shape=(4, *case.shape[1:])) for case in FULL.layers)
)
"""What two cores can do in some minutes."""
SHORT = Plan(
    network=Size((1, 1), 8, 10),
    batch=2,
    image=32,
    cases=CASES,
    layers=(LayerCase((2, 8, 6, 6)), LayerCase((2, 8, 6, 6), "NHWC", "bfloat16")),
    tiny=LayerCase((2, 2, 2, 2)),
    rounds=2,
    seconds=0.0,
)
"""The least that shows whether it runs."""


# ---------------------------------------------------------------------------------------------------------------------
# Turns


class Clock:
    """The clock of a device: events on a GPU, else the time of the processor, which other programs do not count in.

    Parameters
    ----------
    device : str
        ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def microseconds(self, call: Call, calls: int) -> float:
        """Time of a call, of so many; one before them is not counted, since the other side was at work until then."""
        call()
        if not self.on_gpu:
            start = time.process_time()
            for _ in range(calls):
                call()
            return (time.process_time() - start) * 1e6 / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / calls


def take_turns(
    clock: Clock, sides: Mapping[str, Call], rounds: int, seconds: float, left: Call = lambda: math.inf
) -> dict[str, list[float]]:
    """Microseconds of a call of each side, in rounds that every other time go backwards.

    Parameters
    ----------
    left : function
        Seconds that are left. Without any no further round begins, once there have been two.
    """
    calls = {name: calls_of_a_turn(clock, call, seconds) for name, call in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        if number >= 2 and left() <= 0:
            break
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(clock.microseconds(sides[name], calls[name]))
    return times


def calls_of_a_turn(clock: Clock, call: Call, seconds: float) -> int:
    """How many calls of a side take so many seconds, about; one at least."""
    return max(1, round(seconds / max(clock.microseconds(call, 1) / 1e6, LEAST_CALL)))


def figures(clock: Clock, times: Mapping[str, Sequence[float]], side: str) -> Record:
    """PyTorch's time by that of a side, round by round; on a GPU the microseconds as well."""
    found: Record = {"ratio": ratio(times[PYTORCH], times[side]), "rounds": len(times[side])}
    return found | ({"us": spread(times[side])} if clock.on_gpu else {})


# ---------------------------------------------------------------------------------------------------------------------
# A network


def networks(plan: Plan) -> dict[str, nn.Module]:
    """The network of each side, with the same weights."""
    torch.manual_seed(0)
    plain = ResNet(plan.network)
    fused = ResNet(
        plan.network, cupybn.torch.BatchNorm2d, functools.partial(cupybn.torch.BatchNorm2d, activation="relu")
    )
    fused.load_state_dict(plain.state_dict())
    return {PYTORCH: plain, CONVERTED: cupybn.torch.convert(copy.deepcopy(plain)), FUSED: fused}


class Step:
    """A training step of a network: forward, loss, backward, SGD.

    Parameters
    ----------
    network : torch.nn.Module
    case : Case
    plan : Plan
    device : str
    """

    def __init__(self, network: nn.Module, case: Case, plan: Plan, device: str) -> None:
        self._device = device
        self._autocast = case.dtype == "bfloat16"
        order = memory_format(case.layout)
        self.network = network.to(device=device, memory_format=order).train()
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(plan.batch, 3, plan.image, plan.image, generator=generator)
        self._images = images.to(device).contiguous(memory_format=order)
        self._labels = torch.randint(plan.network.classes, (plan.batch,), generator=generator).to(device)
        self._optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def backward(self) -> Any:
        """The loss, whose gradients are those of the parameters then."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            loss = nn.functional.cross_entropy(self.network(self._images), self._labels)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        """Make the step."""
        self.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()  # after the step: what is left in memory then is the same before each

    def first(self) -> tuple[float, Any]:
        """Loss and gradients of the first step, which is not made."""
        loss = float(self.backward())
        gradients = torch.cat([p.grad.flatten().double() for p in self.network.parameters()])
        self._optimizer.zero_grad()
        return loss, gradients


def memory_format(layout: str) -> Any:
    """PyTorch's name of a layout."""
    return torch.channels_last if layout == "NHWC" else torch.contiguous_format


def steps(plan: Plan, case: Case, device: str, left: Call = lambda: math.inf) -> Iterator[Record]:
    """A record for each side of a training step; the one of PyTorch comes first."""
    clock = Clock(device)
    sides = {name: Step(network, case, plan, device) for name, network in networks(plan).items()}
    expected, gradients = sides[PYTORCH].first()
    off: dict[str, Record] = {}
    for name, side in sides.items():
        loss, found = side.first()
        of_loss = abs(loss - expected) / abs(expected)
        of_gradients = float((found - gradients).norm() / gradients.norm())
        right = of_loss <= LOSS_OFF[case.dtype] and of_gradients <= GRADIENTS_OFF[case.dtype]
        off[name] = {"loss_off": of_loss, "gradients_off": of_gradients, "right": right}
    del gradients, found
    times = take_turns(clock, sides, plan.rounds, plan.seconds, left)
    for name, side in sides.items():
        yield {
            **{"what": "step", "case": case.name, "side": name, "batch": plan.batch, "image": plan.image},
            **figures(clock, times, name),
            **({"peak_bytes": peak_bytes(side)} if clock.on_gpu else {}),
            **off[name],
        }


def peak_bytes(step: Call) -> int:
    """Most bytes of PyTorch's allocator that a step takes beyond what is there before it: weights and momentum."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - int(before)


def launches(plan: Plan, case: Case) -> Iterator[Record]:
    """Kernels that a step of each side launches, as PyTorch's profiler sees them.

    Whatever is timed is timed before this: a profiler may slow down launches for the rest of the process.
    """
    for name, network in networks(plan).items():
        step = Step(network, case, plan, "cuda")
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
        yield {"what": "launches", "case": case.name, "side": name, "launches": len(kernels)}


# ---------------------------------------------------------------------------------------------------------------------
# Single layers


def layer_calls(case: LayerCase, device: str, compiled: bool) -> dict[str, dict[str, Call]]:
    """Calls of each side by operation; what they return are tuples of tensors, the same ones of all sides."""
    generator = torch.Generator().manual_seed(0)
    order = memory_format(case.layout)
    dtype = getattr(torch, case.dtype)
    x, dy = (
        torch.randn(case.shape, generator=generator).to(device, dtype).contiguous(memory_format=order) for _ in range(2)
    )
    layer = nn.BatchNorm2d(case.shape[1]).to(device)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=torch.Generator(device).manual_seed(2))
    sides = {PYTORCH: layer, CONVERTED: cupybn.torch.convert(copy.deepcopy(layer))}
    operations: dict[str, dict[str, Call]] = {"forward + backward": {}}
    if case.dtype == "float32":
        operations["second order"] = {}
    for name, of_side in sides.items():
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        for operation in operations:
            operations[operation][name] = functools.partial(OPERATIONS[operation], of_side, leaf, dy)
    if compiled:
        fast = torch.compile(copy.deepcopy(layer), dynamic=False)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        operations["forward + backward"][COMPILED] = functools.partial(forward_and_backward, fast, leaf, dy)
    return operations


def forward_and_backward(layer: Any, x: Any, dy: Any) -> tuple[Any, ...]:
    """Output and gradients of a training step."""
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))


def second_order(layer: Any, x: Any, dy: Any) -> tuple[Any, ...]:
    """Gradients of a gradient penalty: the sum of the squares of the input's gradient."""
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    return (dx, *torch.autograd.grad(dx.square().sum(), (x, layer.weight)))


OPERATIONS = {"forward + backward": forward_and_backward, "second order": second_order}


def layers(
    plan: Plan, case: LayerCase, device: str, compiled: bool = False, left: Call = lambda: math.inf
) -> Iterator[Record]:
    """A record for each operation and side of a layer."""
    clock = Clock(device)
    for operation, sides in layer_calls(case, device, compiled).items():
        off = {name: results_off(call(), sides[PYTORCH]()) for name, call in sides.items()}
        times = take_turns(clock, sides, plan.rounds, plan.seconds / 10, left)
        for name in sides:
            yield {
                **{"what": "layer", "case": case.name, "operation": operation, "side": name},
                **figures(clock, times, name),
                **{"results_off": off[name], "right": off[name] <= RESULTS_OFF[case.dtype]},
            }


def host(plan: Plan, device: str, compiled: bool = False) -> Iterator[Record]:
    """A record for each operation and side of the tiny layer on a GPU: how long the host takes for a call."""
    effort = Effort(plan.seconds, most_rounds=100)
    for operation, sides in layer_calls(plan.tiny, device, compiled).items():
        for name, call in sides.items():
            found = host_time(call, torch.cuda.synchronize, effort)
            yield {"what": "host", "case": plan.tiny.name, "operation": operation, "side": name, "us": found._asdict()}


def results_off(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference of results, each as a share of its largest element; infinite where one is NaN."""
    most = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().double(), other.detach().double()
        share = float((one - other).abs().max() / other.abs().max())
        most = max(most, math.inf if math.isnan(share) else share)
    return most


# ---------------------------------------------------------------------------------------------------------------------
# All of it


class Job(NamedTuple):
    """Some measurements that belong together."""

    name: str
    records: Callable[[], Iterator[Record]]


def prepare(device: str) -> None:
    """Set what is the same for all that is measured: the fastest convolutions, or on the CPU one thread.

    Threads wait for each other wherever other programs run, and NumPy's functions have one.
    """
    torch.backends.cudnn.benchmark = True
    if device == "cpu":
        torch.set_num_threads(1)
        os.environ["CUPYBN_NUM_THREADS"] = "1"


def jobs(plan: Plan, device: str, compiled: bool = False, left: Call = lambda: math.inf) -> list[Job]:
    """All measurements of a plan, in the order in which they are to be made.

    Parameters
    ----------
    plan : Plan
    device : str
        ``"cuda"`` or ``"cpu"``. On the CPU neither time nor memory is reported, but for ratios of times.
    compiled : bool
        Whether what `torch.compile` makes of PyTorch's layer is measured, too.
    left : function
        Seconds that are left for what is measured then.
    """
    found = [Job(f"step, {case.name}", functools.partial(steps, plan, case, device, left)) for case in plan.cases]
    found += [Job(case.name, functools.partial(layers, plan, case, device, compiled, left)) for case in plan.layers]
    if device == "cuda":
        found.append(Job("host", functools.partial(host, plan, device, compiled)))
        found.append(Job("launches", functools.partial(launches, plan, plan.cases[0])))
    return found


def done(job: Job) -> list[Record]:
    """The records of a job; if it fails, those until then and one with an ``"error"``. Its memory is given back."""
    records: list[Record] = []
    try:
        records += job.records()
    except Exception as error:  # such as too little memory: the other jobs are done
        records.append({"what": "failed", "case": job.name, "error": f"{type(error).__name__}: {error}"[:500]})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return records


def wrong(records: Sequence[Record]) -> list[str]:
    """A line for each record of something that has failed, or whose results are off by more than they may be."""
    lines = [f"FAILED: {record['case']}: {record['error']}" for record in records if "error" in record]
    for record in records:
        if not record.get("right", True):
            off = ", ".join(f"{name} {record[name]:.2g}" for name in record if name.endswith("_off"))
            lines.append(f"WRONG: {record['case']}, {record.get('operation', 'step')}, {record['side']}: {off}")
    return lines
