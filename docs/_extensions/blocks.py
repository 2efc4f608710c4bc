"""Blocks of code without the empty line at their end, which doctest asks for before the fence."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx


def strip(app: Sphinx, document: nodes.document) -> None:  # noqa: ARG001
    """Leave out empty lines at the end of blocks."""
    for block in document.findall(nodes.literal_block):
        if block.rawsource == block.astext():  # else it is highlighted already
            block.rawsource = block.rawsource.rstrip("\n")
            block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the event after which a page is read."""
    app.connect("doctree-read", strip)
    return {"parallel_read_safe": True}
