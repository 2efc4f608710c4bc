"""What the project is published with: archives, versions, the console script, workflows and the citation agree."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import cupybn
from cupybn.__main__ import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
INCLUDED = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
"""Files and folders of the source distribution, beside those that hatch always takes."""
ALWAYS = {"/.gitignore", "/pyproject.toml"}

if not (ROOT / ".github").is_dir():
    pytest.skip("neither a checkout nor a source distribution", allow_module_level=True)


def files_of_the_checkout(*more):
    """Paths of the files that git holds, and of those that it would take if ``--others`` is given."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "ls-files", "-z", "--cached", "--exclude-standard", *more]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Version and metadata


def test_the_version_comes_from_one_place():
    assert PYPROJECT["tool"]["hatch"]["version"] == {"path": "cupybn/__init__.py"}
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", cupybn.__version__)
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [cupybn.__version__]
    (latest, *_) = re.findall(r"^## (\S+) ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest == cupybn.__version__
    assert f'"{cupybn.__version__}"' not in (ROOT / "docs" / "conf.py").read_text()


def test_every_python_is_told_and_tried():
    """The versions of Python are those of the classifiers, those that CI runs on, and all from the least one on."""
    classified = [name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    (tried,) = re.findall(r"^ +python: \[(.*)\]$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)
    assert tried == ", ".join(f'"{version}"' for version in classified)
    least = int(classified[0].partition(".")[2])
    assert PROJECT["requires-python"] == f">=3.{least}"
    assert classified == [f"3.{minor}" for minor in range(least, least + len(classified))]


def test_cuda_versions_are_those_of_the_extras():
    classified = {name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if "NVIDIA CUDA ::" in name}
    assert {f"cuda{version}" for version in classified} == {extra for extra in EXTRAS if extra.startswith("cuda")}


def test_extras_that_are_named_exist():
    """The extras that messages, documents and other extras name are there."""
    named = set()
    for path in files_of_the_checkout():
        if path.endswith((".py", ".md", ".toml", ".yml", ".yaml")) or path == ".ci/run":
            named |= set(re.findall(r"(?<![\w)\]])(?:cupybn|\.|\$wheel)\[([a-z0-9,]+)\]", (ROOT / path).read_text()))
    names = {name for together in named for name in together.split(",")}
    assert names >= {"bf16", "cuda13", "dev", "examples", "safetensors"}
    assert names <= EXTRAS.keys()


# ---------------------------------------------------------------------------------------------------------------------
# The console script


def installed():
    """The installed distribution, which a run of nothing but the checkout has not."""
    try:
        return distribution("cupybn")
    except PackageNotFoundError:
        return pytest.skip("cupybn is not installed")


def test_the_installed_version():
    assert installed().version == cupybn.__version__, "install it anew, after a change of its version"


def test_the_entry_point_is_the_command_line():
    (script,) = installed().entry_points.select(group="console_scripts")
    assert PROJECT["scripts"] == {"cupybn": script.value}
    assert script.load() is main


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--version"], 0, rf"cupybn {re.escape(cupybn.__version__)}\n", ""),
        (["bench"], 2, "", r"usage: cupybn bench .*\ncupybn bench: error: .*--shape\n"),
        (["info"], 0, rf"cupybn: +{re.escape(cupybn.__version__)}\n(.+\n)+", ""),
    ],
    ids=str,
)
def test_the_console_script(arguments, status, out, err):
    """The script says its own name, and ends with the status of the command."""
    installed()
    script = Path(sysconfig.get_path("scripts")) / "cupybn"
    result = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, bool(re.fullmatch(out, result.stdout))) == (status, True), result.stdout
    assert re.fullmatch(err, result.stderr), result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def test_the_source_distribution_has_all_of_the_checkout():
    """Nothing that git holds is left out, and nothing is named that is not there."""
    tops = {f"/{name.partition('/')[0]}" for name in files_of_the_checkout()}
    assert {*INCLUDED, *ALWAYS} == tops


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_what_is_linked_to_is_in_the_source_distribution(page):
    for link in re.findall(r"\]\(([^)\s#]+)", (ROOT / page).read_text()):
        assert (ROOT / link).exists(), link
        assert any(Path("/", link).is_relative_to(entry) for entry in INCLUDED), link


def built(hook, tree, folder, monkeypatch):
    """The path of an archive of a tree, as a build front end has it made."""
    backend = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(tree)
    return folder / getattr(backend, hook)(str(folder))


def contents(wheel):
    """The checksum of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist()}


def test_archives(tmp_path, monkeypatch):
    """The source distribution has every file, the wheel what it runs with; a wheel of the former is the same."""
    files = {name for name in files_of_the_checkout("--others") if f"/{name.partition('/')[0]}" in {*INCLUDED, *ALWAYS}}
    sdist = built("build_sdist", ROOT, tmp_path, monkeypatch)
    stem = f"cupybn-{cupybn.__version__}"
    assert sdist.name == f"{stem}.tar.gz"
    with tarfile.open(sdist) as archive:
        assert set(archive.getnames()) == {f"{stem}/{name}" for name in {*files, "PKG-INFO"}}
        archive.extractall(tmp_path, filter="data")

    wheel = contents(built("build_wheel", ROOT, tmp_path, monkeypatch))
    package = {name for name in files if name.startswith("cupybn/")}
    kernels = {f"cupybn/{name}" for name in files if name.startswith("kernels/")}
    assert {"cupybn/py.typed", "cupybn/__main__.py"} <= package
    assert {"cupybn/kernels/bundles.cuh", "cupybn/kernels/channels_first/bn_stats.cu"} <= kernels
    assert {name for name in wheel if ".dist-info/" not in name} == package | kernels
    told = {name.partition("/")[2] for name in wheel if ".dist-info/" in name}
    assert told == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}

    (tmp_path / "again").mkdir()
    assert contents(built("build_wheel", tmp_path / stem, tmp_path / "again", monkeypatch)) == wheel


# ---------------------------------------------------------------------------------------------------------------------
# Files that the forge and other services read


def read(path):
    """What a YAML file holds."""
    return pytest.importorskip("yaml").safe_load((ROOT / path).read_text())


WORKFLOWS = sorted(path.name for path in (ROOT / ".github/workflows").iterdir())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_may_do_little(name):
    """Workflows only read the repository, stop in the end, keep no credentials, and pin the actions of others."""
    workflow = read(f".github/workflows/{name}")
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job or job["uses"].startswith("./"), job
        for step in job.get("steps", ()):
            action = step.get("uses", "")
            assert re.fullmatch(r"([\w-]+/[\w-]+@(release/)?v\d+)?", action), action
            assert not action.startswith("actions/checkout") or step["with"] == {"persist-credentials": False}


def test_ci_runs_what_every_change_must_pass():
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert "if" not in job


def test_a_release_needs_all_of_ci():
    """One job of the release alone can sign in to the index, and it waits for CI, the archives and a person."""
    jobs = read(".github/workflows/release.yml")["jobs"]
    assert jobs["ci"] == {"uses": "./.github/workflows/ci.yml"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    publish = jobs["publish"]
    assert (publish["needs"], publish["environment"]) == (["ci", "build"], "release")
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("run" in step for step in publish["steps"])


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    asked = {field["id"] for field in fields if field.get("validations", {}).get("required")}
    assert asked == ({"what", "example", "info", "check"} if name == "bug_report" else {"task", "now"})


def test_the_documentation_is_built_with_its_extra():
    config = read(".readthedocs.yaml")
    assert config["sphinx"] == {"configuration": "docs/conf.py", "fail_on_warning": True}
    (install,) = config["python"]["install"]
    assert set(install["extra_requirements"]) <= EXTRAS.keys()


def test_the_citation_says_what_the_package_says():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["title"] == PROJECT["name"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["abstract"].startswith(PROJECT["description"])
