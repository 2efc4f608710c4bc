"""Integers of 64 bits that the kernels cut to 32 without saying so: sizes that are small however large arrays are."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupybn._steps import geometry, sources
from cupybn._steps.resident import Device
from cupybn._steps.sources import kernel_names
from tests.conftest import EMULATED

COMPILER = shutil.which("g++")
SMALL = {"parts"}
"""Sizes that the kernels take as 64-bit integers, as they do all others, and go on with as int: `tile` by a cast."""
MACROS = {"DATA_T": "float16", "INDEX_BITS": 64, "THREADS": 256, "CLUSTER_BLOCKS": 8}
MACROS |= {
    "CENTERED": 1,
    "ELEMENTWISE": 1,
    "ON_CHIP": 1,
    "SUMS_ON_CHIP": 1,
    "ROWS_AT_ONCE": 2,
    "PARAMETER_T": "float16",
}
WARNING = re.compile(r"(?m)^kernels/(.+):(\d+):(\d+): warning: ")


def conversions(text, width):
    """Places where integers are converted to what may not hold them: file, line, column."""
    macros = [f"-D{name}={value}" for name, value in {**MACROS, "WIDTH": width}.items()]
    text = '#include "device.h"\n' + text.replace("extern __shared__", "extern")
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", "-Wconversion", "-Wno-float-conversion", *macros,
         "-isystem", EMULATED / "cupy" / "runtime", "-xc++", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {(file, int(line), int(column)) for file, line, column in WARNING.findall(done.stderr)}


def converted(name, width):
    """The expressions that are converted, by their first names."""
    found = set()
    for file, line, column in conversions(sources.source(name), width):
        text = (sources.KERNELS / file).read_text().splitlines()[line - 1]
        found.add(re.match(r"\w*", text[column - 1 :])[0] or text)
    return found


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")


@needs_compiler
@pytest.mark.parametrize("name", kernel_names())
def test_indices_are_not_cut(name):
    assert converted(name, 1) | converted(name, 8) <= SMALL | {"magnitude"}  # of a float16


@needs_compiler
def test_conversions_are_seen():
    text = sources.source("channels_first/bn_stats")
    changed = text.replace("    index_t stride, wrap; ", "    int stride, wrap; ", 1)
    assert changed != text
    assert conversions(changed, 1) > conversions(text, 1)


many = st.integers(1, 1000) | st.integers(1, 2**40)
devices = st.builds(Device, st.integers(1, 200), st.just(227 << 10), st.just(228 << 10), st.booleans())
packs = st.sampled_from([(2, 1), (2, 2), (2, 8), (4, 1), (4, 4), (8, 1), (8, 2)])
"""Bytes of an element, and elements of a pack."""


@given(many, many, many, packs, devices)
def test_what_is_cut_is_small(N, C, rows, pack, device):
    """What the kernels count with it is small, too: the packs of a thread, and those of a channel or a tile on chip."""
    itemsize, width = pack
    L, whole = rows * width, -(-C // width) * width
    first = geometry.channels_first_resident(N, C, L, itemsize, width, 1, device)
    last = geometry.channels_last_resident(N, whole, itemsize, width, 1, device)
    sums = (
        geometry.channels_first(N, C, L, itemsize, width, None),
        geometry.channels_last(N, whole, itemsize, width, 1, None),
    )
    for laid in filter(None, (first, last, *sums)):
        assert getattr(laid.sizes, "tile", 0) < 2**31
        assert laid.parts < 2**31
    assert first is None or first.sizes.packs * geometry.LEAST_THREADS < 2**31  # of all its teams
    assert last is None or last.sizes.M * last.sizes.tile < 2**31
