"""Docstrings where reStructuredText would take something else for what people read in them."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

ENUMERATOR = re.compile(r"^( *)(?=[A-Z]\. )")


def mark(app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    """An equation that stands indented under the first line is code; a line that begins with "C." is no list."""
    lines[:] = [ENUMERATOR.sub(r"\1\\", line) for line in lines]
    if len(lines) > 2 and not lines[1].strip() and lines[2].startswith(" "):
        lines[1:2] = ["", "::", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the event, before numpydoc does."""
    app.connect("autodoc-process-docstring", mark, priority=100)
    return {"parallel_read_safe": True}
