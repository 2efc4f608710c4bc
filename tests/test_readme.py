"""The README's examples print what it says, its links lead somewhere, and its numbers are right."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import numpy as np
import pytest

from cupybn import BatchNorm1d, BatchNorm2d

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def anchors(text):
    """The headings of a Markdown file, in the form in which links name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_examples_print_what_the_readme_says():
    results = doctest.testfile(str(README), module_relative=False)
    assert results.attempted > 20
    assert results.failed == 0


def test_blocks_without_output_are_python():
    for block in blocks("python"):
        if ">>>" not in block:
            ast.parse(block)


def test_blocks_without_output_import_what_they_use():
    """Blocks without output import what they use, except for the arrays that a reader has."""
    for block in blocks("python"):
        if ">>>" in block:
            continue
        nodes = list(ast.walk(ast.parse(block)))
        known = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {name.asname or name.name for name in node.names}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used - known <= {"x", "dy"}


def test_every_command_is_in_a_block_that_is_run():
    """Every command stands in a block of sh, the only blocks that `.ci/run` runs."""
    assert set(re.findall(r"^```(.+)$", TEXT, re.MULTILINE)) == {"sh", "python"}
    assert len(blocks("sh")) == 6


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the wheel comes without what is linked to")
def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else README
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_table_is_on_the_first_screen():
    before = TEXT[: TEXT.index("| | cupybn | PyTorch")]
    assert before.count("\n") < 15


def test_sections():
    """Every section has a heading of the same level."""
    headings = re.findall(r"^(##+) (.*)$", TEXT, re.MULTILINE)
    assert {level for level, _ in headings} == {"##"}
    assert [title for _, title in headings][:3] == ["Try it", "Ten lines", "A training loop"]


def test_eval_mode_at_a_mean_of_a_million(rng):
    """Eval mode at a mean of a million is off by half of 1/16, the last place of the mean in float32: "up to 3e-2"."""
    x = rng.normal(1e6, 1, (64, 64, 4, 4)).astype(np.float32)
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 2, 3), keepdims=True), exact.var((0, 2, 3), keepdims=True, ddof=1)
    for dtype, least, most in ("float32", 2**-6, 2**-5 / var.min() ** 0.5), ("float64", 0, 5e-7):
        layer = BatchNorm2d(64, momentum=1.0, dtype=dtype, device="cpu")
        layer(x)
        error = np.abs(layer.eval()(x) - (exact - mean) / np.sqrt(var + layer.eps)).max()
        assert least <= error <= most


def test_the_mean_of_variances_is_not_the_variance_of_the_whole():
    batches = np.array([[0, 2], [10, 12]], np.float32)
    layer = BatchNorm1d(1, momentum=None, device="cpu")
    for batch in batches:
        layer(batch[:, None])
    assert layer.running_mean == batches.mean()
    assert layer.running_var == batches.var(axis=1, ddof=1).mean() == 2
    assert batches.var(ddof=1) > 30
