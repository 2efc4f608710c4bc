"""Links between files of the repository, which lead to the page that shows a file, where there is one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
INCLUDED = re.compile(r"^```\{include\} (\S+)$(?!\n:(start|end))", re.MULTILINE)


def pages(srcdir: Path) -> dict[Path, Path]:
    """Files that a page includes from beginning to end, and the page."""
    found = {}
    for page in srcdir.rglob("*.md"):
        for path, _ in INCLUDED.findall(page.read_text()):
            found[(page.parent / path).resolve()] = page
    return found


def lead(text: str, file: Path, page: Path, shown: dict[Path, Path]) -> str:
    """The text of a file, with links to other files as they are to stand in a page that includes it."""

    def target(link: re.Match[str]) -> str:
        path = (file.parent / link[1]).resolve()
        if not path.exists():
            return link[0]
        return os.path.relpath(shown.get(path, path), page.parent) + (link[2] or "")

    return LINK.sub(target, text)


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Rewrite the links of a page."""
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        source[0] = lead(source[0], page, page, pages(Path(app.srcdir)))


def read_included(app: Sphinx, path: Path, parent: str, source: list[str]) -> None:  # noqa: ARG001
    """Rewrite the links of a file that a page includes."""
    page = Path(app.env.doc2path(app.env.docname))
    source[0] = lead(source[0], (Path(app.srcdir) / path).resolve(), page, pages(Path(app.srcdir)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the events."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    return {"parallel_read_safe": True}
