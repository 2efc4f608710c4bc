"""The stand-in for CuPy, and all uses of CuPy in this repository, compared with an installed CuPy; no GPU is needed.

CUPYBN_REAL_CUPY names a Python that has CuPy: where it has none, that is a failure. By default, this Python is asked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.real_cupy import inventory, names, uses
from tests.real_cupy.meant import MEANT

ROOT = Path(__file__).parents[1]
EMULATED = ROOT / "tests" / "emulated"


def run(python, arguments, **environment):
    """The output of a Python that finds nothing of this process's path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python():
    """A Python that has the real CuPy."""
    if "CUPYBN_REAL_CUPY" in os.environ:
        return os.environ["CUPYBN_REAL_CUPY"]
    if PathFinder.find_spec("cupy", [path for path in sys.path if path != str(EMULATED)]) is None:
        pytest.skip("CuPy is not installed, and CUPYBN_REAL_CUPY names no Python that has it")
    return sys.executable


@pytest.fixture(scope="module")
def real(python, tmp_path_factory):
    """The inventory of CuPy. Where NCCL is not installed, CuPy's module for it finds functions that do nothing."""
    find = "import importlib.util as u; print(u.find_spec('cupy_backends.cuda.libs.nccl').origin)"
    module = Path(run(python, ["-c", find]).strip())
    folder = tmp_path_factory.mktemp("nccl")
    functions = sorted(set(re.findall(rb"\bnccl[A-Z]\w+", module.read_bytes())))
    text = "".join(f'extern "C" void {name.decode()}() {{}}\n' for name in functions)
    command = ["g++", "-x", "c++", "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-", "-o", folder / "libnccl.so.2"]
    subprocess.run(command, input=text, text=True, check=True)
    return json.loads(run(python, [inventory.__file__], LD_LIBRARY_PATH=str(folder)))


@pytest.fixture(scope="module")
def stand_in(python):
    return json.loads(run(python, [inventory.__file__], PYTHONPATH=str(EMULATED)))


def test_which_is_which(stand_in, real):
    assert "emulator" in stand_in["cupy"]
    assert "emulator" not in real["cupy"]
    assert "exp" in stand_in["cupy"]  # CuPy makes it when it is asked for
    assert "allReduce" in real["cupy.cuda.nccl"]["NcclCommunicator"]["members"]


def test_the_stand_in_has_nothing_that_cupy_has_not(stand_in, real):
    """All differences are meant, and all that are meant are there."""
    found = names.differences(stand_in, real)
    assert {name: what for name, what in found.items() if name not in MEANT} == {}
    assert MEANT.keys() - found.keys() == set()


def test_which_methods_of_a_derived_class_views_call(python):
    """What CuPy calls by the rules of a class that is derived from its own, the stand-in calls as well."""
    script = Path(inventory.__file__).with_name("derived.py")
    theirs, ours = (json.loads(run(python, [script], **found)) for found in ({}, {"PYTHONPATH": str(EMULATED)}))
    assert ours == theirs
    assert theirs["broadcast_to"] == ["Derived", "view"]


def test_this_repository_uses_nothing_that_cupy_has_not(real):
    assert uses.wrong_uses(ROOT, real) == []


# ---------------------------------------------------------------------------------------------------------------------
# The comparison itself


class Example:
    """Example(int first, second=(1, 2), *, third=None)"""

    limit = 3

    def method(self, a, /, b, *args, c=0, **kwargs):
        pass

    @property
    def size(self):
        """A number."""


def test_parameters():
    assert inventory.parameters(Example.method) == ["self", "a", "b", "*args", "c=", "**kwargs"]
    assert inventory.from_docstring(Example) == ["first", "second=", "*", "third="]
    assert inventory.parameters(lambda *, x: x) == ["*", "x"]
    assert inventory.from_docstring(len) is None
    entry = inventory.describe(Example)
    assert {name: member["kind"] for name, member in entry["members"].items()} == {
        "limit": "value",
        "method": "function",
        "size": "property",
    }
    assert entry["members"]["limit"]["value"] == 3
    assert entry["members"]["method"]["parameters"] == ["a", "b", "*args", "c=", "**kwargs"]


def function(*parameters):
    return {"kind": "function", "parameters": list(parameters)}


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        (function("x", "out="), function("x", "out=", "*", "dtype="), None),
        (function("x"), function("x", "y="), None),
        (function("x", "*", "y="), function("x", "**kwargs"), None),
        (function("*args"), function("x"), None),
        ({"kind": "property"}, {"kind": "value"}, None),
        (function("x"), function("*args", "x="), None),
        (function("x"), None, "only the stand-in has it"),
        (function("x"), {"kind": "class"}, "a function, in CuPy a class"),
        ({"kind": "value", "value": 1}, {"kind": "value", "value": 2}, "1, in CuPy 2"),
        (function("x", "where="), function("x"), "where is not taken"),
        (function("x", "*", "where="), function("x"), "keyword where is not taken"),
        (function("x", "y"), function("y", "x"), "parameter 0 is y, not x, parameter 1 is x, not y"),
        (function("x"), function("x", "y"), "y is needed"),
        (function("x"), function("x", "*", "y"), "y is needed"),
    ],
)
def test_differences(ours, theirs, wrong):
    theirs = {} if theirs is None else {"thing": theirs}
    found = names.differences({"cupy": {"thing": ours}}, {"cupy": theirs})
    assert (found == {}) if wrong is None else found["cupy.thing"].startswith(wrong)
    of_class = {"C": {"kind": "class", "members": {"thing": ours}}}
    found = names.differences({"cupy": of_class}, {"cupy": {"C": {"kind": "class", "members": theirs}}})
    assert (found == {}) if wrong is None else found["cupy.C.thing"].startswith(wrong)


def test_texts_of_errors_are_compared():
    assert names.differences({"errors": {"1": "no"}}, {"errors": {"1": "no", "2": "?"}}) == {}
    assert "error 1" in names.differences({"errors": {"1": "no"}}, {"errors": {"1": "yes"}})


STREAM = {"kind": "class", "parameters": ["null="], "members": {"use": function()}}
PACKAGE = {
    "cupy": {"empty": function("shape", "dtype="), "ndarray": {"kind": "class", "members": {"sum": function("axis=")}}},
    "cupy.cuda": {"Stream": STREAM, "get_current_stream": function()},
}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("import cupy\ncupy.empty(3, dtype=int).sum(axis=0)", None),
        ("import cupy\ncupy.empty(1, 2, *shape)", None),
        ("import cupy\ncupy.cuda.Stream().ptr", None),
        ("import numpy\nnumpy.nothing", None),
        ("cupy = pytest.importorskip('cupy')\ncupy.nothing", "no cupy.nothing"),
        ("def f(self):\n    self.cupy = import_cupy()\n    self.cupy.nothing()", "no cupy.nothing"),
        ("from cupy import nothing", "no cupy.nothing"),
        ("import cupy as cp\nlambda x: cp.cuda.nothing(x)", "no cupy.cuda.nothing"),
        ("def f(xp):\n    xp.empty(1, 2, 3)", "cupy.empty: 3 positional arguments, 2 are taken"),
        ("import cupy\ncupy.empty(1, where=2)", "cupy.empty: no keyword where"),
        ("import cupy\ncupy.empty(1).nothing", "no cupy.ndarray.nothing"),
        ("import cupy\nx, y = cupy.empty(1), 2\nx.sum(0, 1)", "cupy.ndarray.sum: 2 positional arguments, 1 are"),
        ("import cupy\nwith cupy.cuda.Stream(priority=1): pass", "cupy.cuda.Stream: no keyword priority"),
        ("import cupy\nwith cupy.cuda.Stream() as s: s.nothing = 1", "no cupy.cuda.Stream.nothing"),
        ("from cupy.cuda import get_current_stream as g\ng().nothing()", "no cupy.cuda.Stream.nothing"),
    ],
)
def test_uses(text, wrong):
    found = [what for _, what in uses.wrong_in_text(text, PACKAGE)]
    assert (found == []) if wrong is None else any(wrong in what for what in found)
