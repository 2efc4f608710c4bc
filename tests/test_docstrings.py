"""Docstrings: their examples print what they say, each by itself, and their first words need nothing before them."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import cupybn
from cupybn._steps.sources import KERNELS


def modules():
    for _, name, _ in pkgutil.walk_packages(cupybn.__path__, "cupybn."):
        if not name.endswith("__main__") and not (name.startswith("cupybn.torch") and find_spec("torch") is None):
            yield importlib.import_module(name)


def found():
    """The docstrings of the package that have examples, by name; each is run in an empty namespace."""
    finder = doctest.DocTestFinder()
    for module in modules():
        yield from (test for test in finder.find(module, module.__name__, globs={}) if test.examples)


EXAMPLES = {test.name: test for test in found()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    example = EXAMPLES[name]
    if "mpi4py" in example.docstring:
        try:
            from mpi4py import MPI  # noqa: F401
        except (ImportError, RuntimeError) as error:  # RuntimeError where mpi4py finds no MPI
            pytest.skip(f"pip install '.[mpi]': {error}")
    report = []
    failed, attempted = doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
    assert attempted > 0
    assert not failed, "".join(report)


def test_what_users_call_has_examples():
    layers = [cupybn.BatchNorm1d, cupybn.BatchNorm2d, cupybn.BatchNorm3d, cupybn.SyncBatchNorm]
    layers += [cupybn.InstanceNorm1d, cupybn.InstanceNorm2d, cupybn.InstanceNorm3d]
    layers += [cupybn.GroupNorm, cupybn.LayerNorm, cupybn.RMSNorm]
    layers += [cupybn.Dropout, cupybn.Dropout1d, cupybn.Dropout2d, cupybn.Dropout3d]
    functions = [getattr(cupybn.functional, name) for name in cupybn.functional.__all__ if not name.endswith("Grads")]
    functions += [cupybn.Generator, cupybn.Generator.manual_seed, cupybn.manual_seed]
    methods = [getattr(cupybn.BatchNorm2d, name) for name in ("vjp", "state_dict", "load_state_dict", "to")]
    methods += [cupybn.SyncBatchNorm.from_batchnorm, cupybn.functional.VjpFn.vjp]
    methods += [getattr(layer, name) for layer in layers[4:10] for name in ("forward", "vjp")]
    models = [cupybn.fold_conv_bn, cupybn.fold_linear_bn, cupybn.update_bn, cupybn.StreamingMoments]
    models += [cupybn.find_batch_norms, cupybn.load_checkpoint, cupybn.save_checkpoint, cupybn.IncompatibleKeys]
    for subject in [*layers, *functions, *methods, *models, cupybn.no_stats_update]:
        doc = inspect.getdoc(subject)
        assert "\nExamples\n--------\n>>> " in doc, subject


def test_no_example_is_left_out():
    """Every example in the text of the modules is run, even in docstrings that are made from others."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    trees = [ast.walk(ast.parse(inspect.getsource(module))) for module in modules()]
    docstrings = [ast.get_docstring(node) or "" for tree in trees for node in tree if isinstance(node, documented)]
    marks = sum(">>> " in text for text in docstrings)
    assert marks > 5
    made = 3 * (2 if find_spec("torch") is None else 3)  # those of batch and instance norm stand in three more classes
    assert len(EXAMPLES) == marks + made


# ---------------------------------------------------------------------------------------------------------------------
# First words

TESTS, PACKAGE = Path(__file__).parent, Path(cupybn.__file__).parent
FOLDERS = [PACKAGE, *(TESTS.parent / name for name in ("tests", "benchmarks", "examples"))]
FRAGMENT = re.compile(
    r"(about|after|also|and|as|at|before|behind|but|by|even|for|from|in|into|its?|like|likewise|nor|of|on|or|over|since"
    r"|so|than|that|the same|their|them|there|these|they|those|though|through|to|under|until|up|where|which|who|whose"
    r"|with|within|without)\b",
    re.IGNORECASE,
)
"""First words that make a reader ask "of what?": what they go with would have to stand before them."""
SHAPE = re.compile(r"\([\w, +*]*\);? ?")
"""The shape of an array, with which a comment behind a field may begin."""


def first_words(text):
    """The line and text of each docstring, those below constants included, and of each comment behind a field."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str):
                yield statement.lineno, statement.value.value.lstrip()
            if isinstance(node, ast.ClassDef) and isinstance(statement, ast.AnnAssign):
                for number in range(statement.lineno, statement.end_lineno + 1):
                    yield number, SHAPE.sub("", lines[number - 1].partition("  # ")[2], count=1)


def fragments(text):
    """The lines of docstrings and comments that begin with a fragment, and their first words."""
    return [(line, words.partition("\n")[0]) for line, words in first_words(text) if FRAGMENT.match(words)]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder.is_dir()], ids=lambda folder: folder.name)
def test_docstrings_begin_with_what_they_are_about(folder):
    paths = sorted(folder.rglob("*.py"))
    assert paths
    found = [f"{path}:{line}: {words}" for path in paths for line, words in fragments(path.read_text())]
    assert not found, "\n".join(found)


def test_fragments_are_seen_wherever_they_stand():
    text = '''"""Of the module."""
THREADS = 256
"""For each block."""
PACKS = 4
"""Packs of a thread."""

class Plan(NamedTuple):
    """
    As it is.
    """

    packs: int  # of the block
    x: Array  # (N, C, L); for the way back
    mean: Array  # (C,)
    rows: int = (
        4  # from each tile
    )
    """The same for rows."""

    def count(self):
        """That many."""
        columns: int = 3  # of the tile
        if self.packs:
            """Likewise."""

    async def wait(self):
        """Ofttimes nothing."""
'''
    assert [line for line, _ in fragments(text)] == [1, 3, 8, 12, 13, 16, 18, 21, 24]


@pytest.mark.parametrize(
    "words",
    [
        "Threads per block.",
        "Whether it is of the package.",
        "If a rank is lost, the others raise.",
        "What is found.",
        "(C,) arrays.",
    ],
)
def test_whole_beginnings_are_no_fragments(words):
    assert fragments(f'"""{words}"""') == []


DECLARATION = re.compile(r"\s*(class|const|constexpr|DEVICE|#define|enum|static|struct|template)\b")
"""The beginning of a line of CUDA that declares a type, a constant or a function."""


def fragments_in_cuda(text):
    """The comments before declarations that begin with a fragment, as the number of their first line and this line."""
    found, first = [], None
    for number, line in enumerate(text.splitlines(), 1):
        words = re.fullmatch(r"\s*//\s*(.*)", line)
        if words:
            first = (number, words[1]) if first is None else first
            continue
        if first and DECLARATION.match(line) and FRAGMENT.match(first[1]):
            found.append(first)
        first = None
    return found


def test_comments_of_kernels_begin_with_what_they_are_about():
    paths = sorted(KERNELS.rglob("*.cu*"))
    assert paths
    found = [f"{path}:{line}: {words}" for path in paths for line, words in fragments_in_cuda(path.read_text())]
    assert not found, "\n".join(found)


def test_fragments_in_cuda_are_seen():
    text = """// As in the mirror.

// Threads per block,
// as in the mirror.
constexpr int THREADS = 256;
// Of the block.
constexpr int ROWS = 8;  // of the tile
// For each channel, the sums
// of all parts.
struct Sums {
    // The same for one.
    DEVICE void add(double x) {
        // With rounding.
        sum += x;
    }
};
// Where it stands.
template <class T>
"""
    assert [line for line, _ in fragments_in_cuda(text)] == [6, 8, 11, 17]
