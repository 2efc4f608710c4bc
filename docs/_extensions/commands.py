"""The directive ``command-help``: what a command of ``python -m cupybn`` says with ``--help``."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from cupybn.__main__ import main


class CommandHelp(Directive):
    """A block of text, made when the pages are built, so that it cannot be out of date."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The text as a literal block."""
        output = io.StringIO()
        columns = mock.patch.dict(os.environ, COLUMNS="88", NO_COLOR="1")
        with columns, contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([*self.arguments, "--help"])
        text = output.getvalue().rstrip()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
