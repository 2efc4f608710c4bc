"""Docstrings where reStructuredText or numpydoc would take something else for what people read in them."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

CHANGES = [
    (re.compile(r"\A(.+\n)\n(?= )"), r"\1\n::\n\n"),
    (re.compile(r"^Parameters\n-+\n(As .+)$", re.MULTILINE), r"**Parameters:** \1"),
    (re.compile(r"^( *)(?=[A-Z]\. )", re.MULTILINE), r"\1\\"),
]
"""An equation that stands indented under the first line is code, a sentence about all parameters is no parameter, and
a line that begins with "C. " is no item of a list."""


def mark(app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    """Make the changes."""
    text = "\n".join(lines)
    for pattern, replacement in CHANGES:
        text = pattern.sub(replacement, text)
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the event, before numpydoc does."""
    app.connect("autodoc-process-docstring", mark, priority=100)
    return {"parallel_read_safe": True}
