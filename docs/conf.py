"""Configuration of the documentation: ``python -m sphinx -b html -W --keep-going -n docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import cupybn

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))

WITHOUT_SECTIONS = (
    *("index", "start", "how-it-works", "speed", "gallery"),
    *("limits", "glossary", "changelog", "contributing"),
)
"""Pages that have no others below them, and so no list of them beside the text."""

project = "cupybn"
author = "The cupybn developers"
copyright = author
version = release = cupybn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "blocks",
    "commands",
    "docstrings",
    "drawings",
    "repository",
    "signatures",
]
nitpicky = True
exclude_patterns = ["_*"]
templates_path = ["_templates"]
default_role = "autolink"  # in docstrings: a link where the name is that of an object, as NumPy has it
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # links name headings as they do on GitHub

autodoc_typehints = "none"  # those of signatures come from _extensions/signatures.py
autosummary_generate = True
autodoc_mock_imports = ["torch"]  # pages are the same where it is not installed, and need not load it
numpydoc_show_class_members = False  # the template of a class has the table of its members
nitpick_ignore = [
    ("py:class", name) for name in ("Any", "Iterator", "Mapping", "Module", "Self", "Tensor", "os.PathLike")
]
nitpick_ignore_regex = [("py:obj", r"(cupyx?|mpi4py|numpy|torch)\..*")]  # with them, docstrings name modules that exist
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "cupybn"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_favicon = "_static/logo.svg"
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_sidebars = {page: [] for page in WITHOUT_SECTIONS}
html_theme_options = {
    "logo": {"text": "cupybn", "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg"},
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
}
