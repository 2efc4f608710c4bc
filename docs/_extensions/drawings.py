"""Drawings that become part of the page, so that they have its colours, light and dark."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def put_into_page(app: Sphinx, document: nodes.document) -> None:
    """Replace images from the folder ``drawings`` by their text."""
    for image in list(document.findall(nodes.image)):
        path = Path(app.srcdir) / image["uri"]
        if path.parent.name == "drawings" and app.builder.format == "html":
            app.env.note_dependency(path)
            image.replace_self(nodes.raw("", path.read_text(), format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the event after which a page is read."""
    app.connect("doctree-read", put_into_page)
    return {"parallel_read_safe": True}
