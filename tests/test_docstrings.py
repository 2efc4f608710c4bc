"""The examples in docstrings print what they say, each by itself, so that a reader can paste it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import cupybn


def found():
    """The docstrings of the package that have examples, by name; each is run in an empty namespace."""
    finder = doctest.DocTestFinder()
    for _, name, _ in pkgutil.walk_packages(cupybn.__path__, "cupybn."):
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            yield from (test for test in finder.find(module, name, globs={}) if test.examples)


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
    """Every example is run, even in docstrings that are made from others."""
    marks = sum(
        inspect.getsource(importlib.import_module(name)).count("Examples\n")
        for _, name, _ in pkgutil.walk_packages(cupybn.__path__, "cupybn.")
        if not name.endswith("__main__")
    )
    assert marks > 0
    assert len(EXAMPLES) == marks + 3  # the layers' example stands in three more classes
