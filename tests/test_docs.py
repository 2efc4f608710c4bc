"""The pages of the documentation: what they print, name and link to, and that Sphinx builds them without a warning.

Recipes are run by `test_recipes`.
"""

from __future__ import annotations

import ast
import doctest
import html
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, InstanceNorm1d
from tests.markdown import blocks, dead_ends, languages, names_from_nowhere

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EMULATED = ROOT / "tests" / "emulated"
GENERATED = DOCS / "api" / "generated"
SOURCES = sorted(path for path in DOCS.rglob("*") if path.is_file() and GENERATED not in path.parents)
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in SOURCES if path.suffix == ".md"}
RECIPES = {name for name in PAGES if name.startswith("recipes")}
OWN = [name for name in PAGES if name not in RECIPES]
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
README = (ROOT / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


WITH_TORCH = [name for name in OWN if ">>> import torch" in TEXTS[name]]
"""Pages whose examples need PyTorch: `test_torch_pages` runs them."""


@pytest.mark.parametrize("name", [name for name in OWN if ">>> " in TEXTS[name] and name not in WITH_TORCH])
def test_examples_print_what_the_page_says(name):
    results = doctest.testfile(str(PAGES[name]), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", OWN)
def test_blocks(name):
    """Blocks are examples that print something, Python that imports what it uses, or commands that CI runs."""
    text = TEXTS[name]
    directives = {language for language in languages(text) if language.startswith("{")}
    assert languages(text) - directives <= {"python", "sh", "text"}
    for block in blocks(text, "python"):
        if ">>> " not in block:
            assert names_from_nowhere(block) <= {"x", "dy"}, block  # arrays that a reader has
    for block in blocks(text, "sh"):
        assert block in blocks(README, "sh"), block


def test_there_are_blocks_of_every_kind():
    for language, least in ("python", 8), ("sh", 4), ("text", 1):
        assert sum(len(blocks(TEXTS[name], language)) for name in OWN) >= least


# ---------------------------------------------------------------------------------------------------------------------
# Links, and what is to be on some page


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the wheel comes without what is linked to")
@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert dead_ends(PAGES[name]) == []


def below(name):
    """A page, and the pages that its tables of contents lead to."""
    yield name
    for tree in blocks(TEXTS[name], "{toctree}"):
        for line in tree.split("\n"):
            entry = re.sub(r".*<(.*)>", r"\1", line)
            if entry and not entry.startswith(":"):
                yield from below((Path(name).parent / entry).as_posix())


def test_every_page_is_in_one_table_of_contents():
    assert sorted(below("index")) == sorted(PAGES)


def listed():
    """Names in the lists of the reference."""
    for name in PAGES:
        if name.startswith("api/"):
            for block in blocks(TEXTS[name], "{eval-rst}"):
                for summary in block.split(".. autosummary::")[1:]:
                    if ":toctree:" in summary:
                        yield from re.findall(r"^   (\w+)$", summary, re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    public = {*cupybn.__all__, *cupybn.functional.__all__} - {"functional"}
    assert sorted(listed()) == sorted([*public, *of_tensors()])


def of_tensors():
    """Public names of `cupybn.torch`, which only imports where PyTorch is."""
    text = (Path(cupybn.__file__).parent / "torch" / "__init__.py").read_text()
    return ast.literal_eval(re.search(r"__all__ = (\[.*?\])", text, re.DOTALL)[1])


@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="no examples here")
def test_every_picture_is_in_the_gallery():
    pictures = {path.name for path in (ROOT / "examples" / "pictures").iterdir()}
    assert pictures == set(re.findall(r"!\[[^]]+\]\(\.\./examples/pictures/(.+?)\)", TEXTS["gallery"]))
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    named = set(re.findall(r"\]\(\.\./examples/(\w+\.py)\)", TEXTS["gallery"]))
    assert named == {name for name in examples if f"| `{name}` |" in README}


def test_every_variable_of_the_environment_is_in_the_reference():
    sources = "".join(path.read_text() for path in Path(cupybn.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"CUPYBN_\w+", sources)) == set(re.findall(r"^\| `(CUPYBN_\w+)`", TEXTS["api/types"], re.M))


def test_nothing_names_a_place_of_one_machine():
    for path in SOURCES:
        if path.suffix in {".md", ".py", ".css", ".svg", ".rst"}:
            assert not re.findall(r"(?<![\w.])/(?:work|tmp|root|home|usr)\b", path.read_text()), path


# ---------------------------------------------------------------------------------------------------------------------
# What the pages claim


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


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("has", ["yes", "no"])
@pytest.mark.parametrize("training", [True, False])
def test_the_table_of_which_statistics_are_used(training, has, tracks):
    """The rows of the table in the layers' reference say what a layer does."""
    rows = re.findall(r"^\| (True|False) \| (\w+) \| (yes|no) \| (.*) \| (.*) \| (.*) \|$", TEXTS["api/layers"], re.M)
    matching = [
        row[3:] for row in rows if row[0] == str(training) and row[1] in (str(tracks), "either") and row[2] == has
    ]
    ((used, running, counter),) = matching
    layer = BatchNorm1d(1, track_running_stats=has == "yes", device="cpu").train(training)
    layer.track_running_stats = tracks
    y = layer(np.array([[1], [3]], np.float32))
    assert used == ("the batch" if abs(y[0] + 1) < 1e-3 else "the running statistics")
    if has == "yes":
        assert running == ("follow the batch" if layer.running_mean != 0 else "stay")
        assert counter == ("+ 1" if layer.num_batches_tracked == 1 else "stays")
    else:
        assert (running, counter) == ("-", "-")
        assert layer.running_mean is None


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("has", ["yes", "no"])
@pytest.mark.parametrize("training", [True, False])
def test_the_table_of_instance_norm(training, has, tracks):
    """The rows of the table in the norms' reference say what a layer does."""
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (yes|no) \| (.*) \| (.*) \|$", TEXTS["api/norms"], re.M)
    matching = [
        row[3:]
        for row in rows
        if row[0] in (str(training), "either") and row[1] in (str(tracks), "either") and row[2] == has
    ]
    ((used, running),) = matching
    layer = InstanceNorm1d(1, track_running_stats=has == "yes", device="cpu").train(training)
    layer.track_running_stats = tracks
    y = layer(np.array([[[1, 3]]], np.float32))
    assert used == ("the rows" if abs(y[0, 0, 0] + 1) < 1e-3 else "the running statistics")
    if has == "yes":
        assert running == ("follow the rows" if layer.running_mean != 0 else "stay")
    else:
        assert running == "-"
        assert layer.running_mean is None


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

EXTENSIONS = ("sphinx", "myst_parser", "numpydoc", "pydata_sphinx_theme", "sphinx_copybutton", "sphinx_design")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages as HTML, which are built as CI builds them, but from copies."""
    if not all(importlib.util.find_spec(extension) for extension in EXTENSIONS):
        pytest.skip("pip install '.[docs]'")
    copy = tmp_path_factory.mktemp("site")
    for folder in "docs", "kernels", "benchmarks", "examples":
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("generated", "__pycache__"))
    for page in ROOT.glob("*.md"):
        shutil.copy(page, copy)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-q", "docs", "html"]
    folders = [str(ROOT), str(EMULATED)]  # where CuPy is there, docstrings may name parts of it that are found
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return copy / "html"


def text_of(page):
    """The words of a page, without its marks."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page.read_text())))


def test_sphinx_builds_every_page(site):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert {*PAGES} <= built


def test_pages_need_no_network(site):
    """Scripts, styles and pictures are the pages' own; only links that a reader follows lead elsewhere."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert loaded
        assert not [target for target in loaded if re.match(r"(\w+:)?//", target)], page


def test_signatures_have_the_types_of_the_source(site):
    text = text_of(site / "api" / "generated" / "cupybn.functional.batch_norm.html")
    assert re.search(r"\( ?input: Array, running_mean: Array \| None, running_var: Array \| None, weight: ", text)
    for page in site.glob("api/generated/*.html"):
        article = text_of(page)
        for unreadable in "TypeAlias", "numpy._typing", "Union[", "typing.", "_BatchNorm":
            assert unreadable not in article, (page.name, unreadable)


def shown_blocks(page):
    """The blocks of code of a page."""
    found = re.findall(r"<pre>(.*?)</pre>", page.read_text(), re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", block)) for block in found]


def test_equations_are_blocks(site):
    equation = "y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)"
    names = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm2d", "GroupNorm"]
    for name in names:
        page = site / "api" / "generated" / f"cupybn.{name}.html"
        assert equation in [block.strip() for block in shown_blocks(page)]
        assert "<blockquote>" not in page.read_text()


def test_docstrings_are_read_as_they_are_meant(site):
    """A sentence that begins with "C. " is no list of one item, and no mark of a language is left in the text."""
    for page in site.glob("api/generated/*.html"):
        assert '<ol class="upperalpha' not in page.read_text(), page
        assert "`" not in text_of(page), page


def test_blocks_end_without_an_empty_line(site):
    blocks = [block for page in site.rglob("*.html") for block in shown_blocks(page)]
    assert len(blocks) > 50
    assert not [block for block in blocks if block.endswith("\n\n")]


@pytest.mark.parametrize(
    "name",
    [
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "SyncBatchNorm",
        "InstanceNorm1d",
        "GroupNorm",
        "LayerNorm",
        "RMSNorm",
    ],
)
def test_members_of_layers_are_documented_with_those_that_are_inherited(site, name):
    """Every method and property has its place on the page of the class; arrays are in the list of its attributes."""
    page = (site / "api" / "generated" / f"cupybn.{name}.html").read_text()
    kind = getattr(cupybn, name)
    members = [member for member, _ in inspect.getmembers(kind) if not member.startswith("_")]
    assert len(members) > 10
    for member in members:
        assert f'id="cupybn.{name}.{member}"' in page, member
        assert page.count(f'href="#cupybn.{name}.{member}"') >= 2, member  # in the table, and in the table of contents


def test_commands_say_what_they_say(site):
    page = text_of(site / "api" / "commands.html")
    for option in "--json", "--quick", "--channel-axis", "--seconds", "--version":
        assert option in page


def test_drawings_are_part_of_the_page(site):
    """Drawings take the colours of the page, so they are in its text, not beside it."""
    page = (site / "how-it-works.html").read_text()
    drawings = sorted(path.read_text() for path in (DOCS / "drawings").iterdir())
    assert len(drawings) == page.count('<svg class="drawing"') == 3
    for drawing in drawings:
        assert re.search(r"<title>.+</title>", drawing)[0] in page


def test_included_files_link_to_pages(site):
    """Links between files of the repository lead to the page that shows the file, or else to a copy of it."""
    page = (site / "benchmarks.html").read_text()
    assert 'href="results/h200.html"' in page
    assert 'href="results/h200.html#goals"' in page
    page = (site / "gallery.html").read_text()
    assert re.search(r'href="_downloads/\w+/train_digits.py"', page)
