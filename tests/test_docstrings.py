"""The examples in docstrings print what they say, each by itself, so that a reader can paste it."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil

import pytest

import cupybn


def modules():
    for _, name, _ in pkgutil.walk_packages(cupybn.__path__, "cupybn."):
        if not name.endswith("__main__"):
            yield importlib.import_module(name)


def found():
    """The docstrings of the package that have examples, by name; each is run in an empty namespace."""
    finder = doctest.DocTestFinder()
    tests = [test for module in modules() for test in finder.find(module, module.__name__, globs={})]
    for name in cupybn.__all__:
        subject = getattr(cupybn, name)
        if not inspect.ismodule(subject):  # it says that it is from another module than that of its text
            tests += finder.find(subject, f"cupybn.{name}", module=False, globs={})
    return [test for test in tests if test.examples]


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
    functions = [getattr(cupybn.functional, name) for name in cupybn.functional.__all__ if name != "BatchNormGrads"]
    methods = [cupybn.BatchNorm2d.vjp, cupybn.BatchNorm2d.load_state_dict, cupybn.SyncBatchNorm.from_batchnorm]
    for subject in [*layers, *functions, *methods, cupybn.no_stats_update]:
        doc = inspect.getdoc(subject)
        assert "\nExamples\n--------\n>>> " in doc, subject


def test_no_example_is_left_out():
    """Every example in the text of the modules is run, even in docstrings that are made from others."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    trees = [ast.walk(ast.parse(inspect.getsource(module))) for module in modules()]
    docstrings = [ast.get_docstring(node) or "" for tree in trees for node in tree if isinstance(node, documented)]
    marks = sum(">>> " in text for text in docstrings)
    assert marks > 5
    assert len(EXAMPLES) == marks + 3  # that of the layers stands in three more classes
