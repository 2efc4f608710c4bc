"""Parts of Markdown files: blocks of code, headings and links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
"""A block, from its fence to the next one."""
INCLUDE = re.compile(r"^```\{include\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a language, without their fences."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def languages(text: str) -> set[str]:
    """What stands behind the fences that open a block."""
    return {fence.partition("\n")[0].removeprefix("```") for fence in FENCES.findall(text)}


def anchors(text: str) -> set[str]:
    """The headings, in the form in which links name them."""
    headings = re.findall(r"^#+ (.*)$", FENCES.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", FENCES.sub("", text))


def with_included(page: Path) -> str:
    """The text of a page, with the files that it includes from beginning to end in the place of the directives."""
    return INCLUDE.sub(lambda found: found[0] if found[2] else with_included(page.parent / found[1]), page.read_text())


def names_from_nowhere(block: str) -> set[str]:
    """Names that a block of Python uses, and neither imports nor defines."""
    nodes = list(ast.walk(ast.parse(block)))
    known = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {name.asname or name.name for name in node.names}
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - known


def dead_ends(page: Path) -> list[str]:
    """Links of a file that lead to no file, or to no heading of it."""
    found = []
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(with_included(target))):
            found.append(link)
    return found
