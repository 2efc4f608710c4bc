"""The wings of the package: a wing is a floor, and modules import from their own wing or from lower floors only."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import cupybn

FLOORS = (
    ("_cli", "__main__", "torch"),
    ("__init__",),  # the package itself, for users: imports from all floors but the one above
    ("models",),
    ("layers",),
    ("functional",),
    ("dropout", "norms", "statistics"),
    ("_calls",),
    ("_ranks",),
    ("_steps",),
    ("_arrays",),
)
"""Wings by floor, the highest first."""
HEIGHT = {wing: len(FLOORS) - floor for floor, wings in enumerate(FLOORS) for wing in wings}
PACKAGE = Path(cupybn.__file__).parent
ROOT = PACKAGE.parent


def wing(module):
    """The wing of a module, by the name that it is imported by."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(text, modules):
    """The modules of the package that a file imports, anywhere: also in functions, and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            names = [argument.value for argument in given if isinstance(argument, ast.Constant)]
        else:
            continue
        found |= {name for name in names if isinstance(name, str) and re.match(r"cupybn\b", name)}
    return found


LOADERS = ("import_module", "__import__")


def faults(imports):
    """Words for each fault of imports, which are given as the modules that each module imports."""
    found = [f"{module} lies in no wing" for module in imports if wing(module) not in HEIGHT]
    if found:
        return found
    for module, others in imports.items():
        found += [f"{module} imports {other}" for other in others if HEIGHT[wing(other)] > HEIGHT[wing(module)]]
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {', '.join(error.args[1])}")
    return found


@pytest.fixture(scope="module")
def texts():
    """The text of each module of the package, by its name."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return files


def test_imports_go_down(texts):
    assert len(texts) > 30
    assert faults({module: imported(text, texts) for module, text in texts.items()}) == []


def test_every_wing_has_a_line_of_the_table(texts):
    """The table has the wings from the highest floor to the lowest; some lines may be about wings to come."""
    path = ROOT / "CONTRIBUTING.md"
    if not path.exists():
        pytest.skip("CONTRIBUTING.md is not part of the wheel")
    named = re.findall(r"^\| `cupybn/(\w+)(?:/|\.py)` \|", path.read_text(), re.MULTILINE)
    there = {wing(module) for module in texts} - {"__init__", "__main__"}
    assert named == [name for wings in FLOORS for name in wings if name in there.union(named)]


UP_AND_DOWN = {
    "cupybn": {"cupybn.functional"},
    "cupybn.__main__": {"cupybn._cli.bench", "cupybn"},
    "cupybn._cli.bench": {"cupybn", "cupybn._cli.table"},
    "cupybn._cli.table": set(),
    "cupybn.functional": {"cupybn._calls.call", "cupybn._steps.numpy_ops"},
    "cupybn._calls.call": {"cupybn._ranks.group", "cupybn._calls.checks"},
    "cupybn._calls.checks": {"cupybn._arrays.kinds"},
    "cupybn._ranks.group": {"cupybn._steps.numpy_ops"},
    "cupybn._steps.numpy_ops": {"cupybn._arrays.kinds"},
    "cupybn._arrays.kinds": set(),
}


@pytest.mark.parametrize(
    ("module", "other", "fault"),
    [
        ("cupybn._arrays.kinds", "cupybn._steps.numpy_ops", "cupybn._arrays.kinds imports cupybn._steps.numpy_ops"),
        ("cupybn._ranks.group", "cupybn._calls.checks", "cupybn._ranks.group imports cupybn._calls.checks"),
        ("cupybn._calls.call", "cupybn", "cupybn._calls.call imports cupybn"),
        ("cupybn.functional", "cupybn._cli.table", "cupybn.functional imports cupybn._cli.table"),
        ("cupybn", "cupybn._cli.table", "cupybn imports cupybn._cli.table"),
        ("cupybn._calls.checks", "cupybn._calls.call", "a circle: .*cupybn._calls.checks, cupybn._calls.call"),
        ("cupybn._tools.new", "cupybn._arrays.kinds", "cupybn._tools.new lies in no wing"),
        ("cupybn.jax", "cupybn.functional", "cupybn.jax lies in no wing"),
        ("cupybn.functional", "cupybn.torch.layers", "cupybn.functional imports cupybn.torch.layers"),
    ],
)
def test_faults_are_seen(module, other, fault):
    assert faults(UP_AND_DOWN) == []
    assert re.fullmatch(fault, faults(UP_AND_DOWN | {module: UP_AND_DOWN.get(module, set()) | {other}})[0])


def test_imports_are_seen_wherever_they_stand():
    modules = {"cupybn.functional", "cupybn._steps.tiles", "cupybn._calls.checks", "cupybn._arrays.kinds"}
    text = '''"""
>>> import cupybn.layers
"""
import numpy, cupybnx
import cupybn.functional as F
from cupybn import functional, BatchNorm1d
from cupybn._steps.tiles import gather
if TYPE_CHECKING:
    from cupybn._calls import checks
def late():
    from cupybn._arrays.kinds import kind
    importlib.import_module("cupybn._ranks.group")
    __import__(name="cupybn._ranks.watch")
'''
    assert imported(text, modules) == modules | {"cupybn", "cupybn._ranks.group", "cupybn._ranks.watch"}
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        imported("from . import functional", modules)
