"""One name, three places: the kernels, their mirrors and their launchers agree in names, parameters and order."""

from __future__ import annotations

import inspect
import re
import typing

import pytest

from cupybn._arrays.dtypes import FLOATS
from cupybn._calls.checks import ACTIVATIONS
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import cupy_ops, launcher, numpy_ops
from cupybn._steps.bundles import Moments, Statistics, Sums
from cupybn._steps.launcher import KERNELS, kernel_names, signature

LAYOUTS = ("channels_first", "channels_last")
STEPS = ("bn_stats", "bn_normalize", "bn_forward", "bn_backward_reduce", "bn_backward_input", "bn_backward")
HOST_ONLY = {"scratch", "dtype", "keep"}
"""Parameters of mirrors that no kernel has: memory to work in, what DATA_T says, and whether results are null."""
GROUPS = {"moments": Moments, "statistics": Statistics, "sums": Sums}
"""Parameters that kernels take field by field."""
OVER_CHANNELS = {
    "merge_moments": ["row"],
    "mean_and_var": ["mean", "var"],
    "bn_update_running": [],
    "merge_sums": ["row"],
}
"""The steps that know no layout, and what they return."""
ALLOCATORS = {"empty_mask"}
"""Functions that launch nothing."""

KERNEL_NAMES = kernel_names()


def stem(name):
    return name.rpartition("/")[2]


def flat(names):
    """Groups as the fields that they consist of."""
    return [f"{name}_{field}" for name in names for field in GROUPS[name]._fields] if names else []


def expand(name):
    return flat([name]) if name in GROUPS else [name]


def mirror(name):
    return getattr(numpy_ops, stem(name))


def results(function):
    """The names of what a mirror returns, as the parameters of a kernel that writes it."""
    returned = typing.get_type_hints(function)["return"]
    group = [name for name, kind in GROUPS.items() if kind is returned]
    return flat(group)


def test_every_step_has_a_kernel_for_each_layout():
    assert sorted(KERNEL_NAMES) == sorted(
        [f"{layout}/{step}" for layout in LAYOUTS for step in STEPS] + [*OVER_CHANNELS]
    )


def test_mirrors_and_launchers_are_the_same_functions():
    def steps(module):
        return {
            name: list(inspect.signature(function).parameters.values())
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if not name.startswith("_") and function.__module__ == module.__name__
        }

    mirrors, launchers = steps(numpy_ops), steps(cupy_ops)
    assert mirrors.keys() == launchers.keys()
    assert mirrors.keys() == {stem(name) for name in KERNEL_NAMES} | ALLOCATORS
    for name, parameters in mirrors.items():
        ours = [(p.name, p.default) for p in launchers[name]]
        assert ours == [(p.name, p.default) for p in parameters], name


@pytest.mark.parametrize("step", ["bn_forward", "bn_backward"])
def test_steps_of_several_ranks_take_the_same(step):
    """The flow of a call does not know them apart."""
    ours, theirs = (
        list(inspect.signature(getattr(ops, step)).parameters.values()) for ops in (Synchronized, numpy_ops)
    )
    assert [(p.name, p.default) for p in ours[1:]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_kernel_takes_what_its_mirror_takes_and_writes_what_it_returns(name):
    parameters = signature(name)
    taken = [p for p in inspect.signature(mirror(name)).parameters if p not in HOST_ONLY]
    returned = OVER_CHANNELS[name] if name in OVER_CHANNELS else results(mirror(name))
    unused = {"moments_batches"} if name in ("merge_moments", "mean_and_var") else set()
    expected = [field for p in taken for field in expand(p) if field not in unused] + returned
    assert [p.name for p in parameters if p.section != "sizes"] == expected
    outputs = [p.name for p in parameters if p.section == "outputs"]
    assert outputs == expected[len(expected) - len(outputs) :]


def test_numbers_that_both_sides_know():
    text = (KERNELS / "types.cuh").read_text()
    assert f"enum {{ {', '.join(name.upper() for name in FLOATS)} }};" in text
    struct = text[text.index("struct Vector {") : text.index("DEVICE explicit operator bool")]
    assert re.findall(r"(\w+);", struct) == list(launcher.VECTOR.names)
    assert dict(zip(ACTIVATIONS, (0, 1), strict=True)) == cupy_ops.ACTIVATIONS


@pytest.mark.parametrize("step", STEPS)
def test_both_layouts_take_the_same(step):
    first, last = ([p for p in signature(f"{layout}/{step}") if p.section != "sizes"] for layout in LAYOUTS)
    assert first == last


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_source(name):
    """One kernel of the file's name, a header that names the mirror, a shape on every pointer, no header of CUDA."""
    text = (KERNELS / f"{name}.cu").read_text()
    assert re.findall(r"__global__ void (?:CLUSTER )?REGISTERS\([^)]+\) (\w+)\(", text) == [stem(name)]
    assert text.count("__global__") == 1
    head = text.partition("\n\n")[0]
    assert head.startswith(f"// {stem(name)}: ")
    assert f"// Mirror: numpy_ops.{stem(name)}\n" in text
    parameters = text[text.index("__global__") : text.index(") {", text.index("__global__"))]
    for line in re.findall(r"^    .*(?:\*|Vector) \w+,.*$", parameters, re.MULTILINE):
        assert re.search(r"// \[[\w, +]*( / WIDTH)?\]", line), line
    whole = launcher.source(name)
    assert "#include" not in whole
    assert f'#line 1 "kernels/{name}.cu"' in whole
    assert not re.search(r"atomicAdd|__restrict__|__ldg|memset", whole)


def test_the_parser_sees_a_drift(tmp_path, monkeypatch):
    """A parameter renamed, swapped or added in a source is another signature."""
    original = (KERNELS / "channels_first/bn_stats.cu").read_text()
    before = signature("channels_first/bn_stats")
    changes = {
        "renamed": ("double* moments_m2, ", "double* moments_M2, "),
        "another type": ("    long long packs_per_share)", "    double packs_per_share)"),
        "another order": ("    long long C,\n    long long L,", "    long long L,\n    long long C,"),
        "added": ("    long long packs_per_share)", "    long long more,\n    long long packs_per_share)"),
    }
    for old, new in changes.values():
        assert old in original
        (tmp_path / "bn_stats.cu").write_text(original.replace(old, new))
        monkeypatch.setattr(launcher, "KERNELS", tmp_path)
        assert signature.__wrapped__("bn_stats") != before
