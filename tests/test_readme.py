"""The README's examples print what it says, its commands are run, and its links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.markdown import blocks, dead_ends, languages, links

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()


def test_examples_print_what_the_readme_says():
    results = doctest.testfile(str(README), module_relative=False)
    assert results.attempted > 8
    assert results.failed == 0


def test_every_command_is_in_a_block_that_is_run():
    """Every command stands in a block of sh, the only blocks that `.ci/run` runs."""
    assert languages(TEXT) == {"sh", "python"}
    assert len(blocks(TEXT, "sh")) == 6


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the wheel comes without what is linked to")
def test_links_lead_somewhere():
    assert len(links(TEXT)) > 5
    assert dead_ends(README) == []


def test_the_table_is_on_the_first_screen():
    before = TEXT[: TEXT.index("| | cupybn | PyTorch")]
    assert before.count("\n") < 15


def test_sections():
    """Every section has a heading of the same level."""
    headings = re.findall(r"^(##+) (.*)$", TEXT, re.MULTILINE)
    assert {level for level, _ in headings} == {"##"}
    assert [title for _, title in headings][:2] == ["Try it", "Ten lines"]


def test_it_is_read_in_a_few_minutes():
    assert TEXT.count("\n") <= 165
