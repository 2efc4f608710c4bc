"""What needs PyTorch, and what does not: imports, and the examples of the pages that use it."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from tests.test_docs import PAGES, WITH_TORCH  # noqa: E402


@pytest.mark.parametrize("name", WITH_TORCH)
def test_examples_print_what_the_page_says(name):
    torch.manual_seed(0)
    results = doctest.testfile(str(PAGES[name]), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_nobody_else_imports_torch():
    """All that users import, and the commands, do without it."""
    code = "import sys, cupybn, cupybn.functional, cupybn._cli.check; print([m for m in sys.modules if 'torch' in m])"
    result = run(code)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_without_torch():
    """An error says what installs it; the module is not left half imported."""
    result = run("import sys; sys.modules['torch'] = None; import cupybn.torch")
    assert result.returncode == 1
    message = "ImportError: cupybn.torch needs PyTorch: `pip install '.[torch]'`, in a clone of cupybn, installs it"
    assert result.stderr.strip().splitlines()[-1] == message


def test_an_import_needs_no_cupy():
    code = """
import sys
sys.modules["cupy"] = None
import torch, cupybn.torch
cupybn.torch.BatchNorm1d(2)(torch.ones(3, 2))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
