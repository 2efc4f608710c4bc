"""The layers of the examples have the right gradients, and every example tells what it takes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupybn import BatchNorm2d

pytest.importorskip("threadpoolctl")
ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "layers")
sys.path.append(str(ROOT / "examples"))
layers = pytest.importorskip("layers")


@pytest.fixture
def example(request):
    """An example as a module; skipped if something that it imports is missing."""
    try:
        return importlib.import_module(request.param)
    except (ImportError, RuntimeError) as error:  # RuntimeError where mpi4py finds no MPI
        return pytest.skip(f"pip install '.[examples]': {error}")


def status(example, arguments, monkeypatch):
    """The exit status of an example whose arguments end it before it does anything."""
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        example.main()
    return caught.value.code


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_help(example, monkeypatch, capsys):
    """The option --help prints the text at the top of the example's file."""
    assert status(example, ["--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert example.__doc__ in out
    assert "    pip install '.[examples]'\n" in out
    assert re.search(rf"^    (python|mpiexec -n 2 python -m mpi4py) examples/{example.__name__}.py$", out, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_wrong_options(example, monkeypatch, capsys, tmp_path):
    """Wrong options print a line of usage, and a line that says what is wrong."""
    (tmp_path / "file").write_text("")
    wrong = [["--no-such-option"], ["positional"]]
    assert status(example, ["--help"], monkeypatch) == 0
    known = capsys.readouterr().out
    if "--epochs" in known:
        wrong += [[f"--epochs={epochs}"] for epochs in ("0", "-1", "1.5", "many", "", "1e3", "\u00b2")]
    if "--output" in known:
        wrong += [["--output", str(tmp_path / "file")], ["--output", str(tmp_path / "file" / "below")]]
    for arguments in wrong:
        assert status(example, arguments, monkeypatch) == 2, arguments
        usage, error = capsys.readouterr().err.splitlines()
        assert usage.startswith(f"usage: {example.__name__}.py"), arguments
        assert arguments[0].partition("=")[0] in error, arguments


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_the_extra(name, monkeypatch, capsys):
    """Help works without the packages of the extra; anything else ends with a line that says what is missing."""
    needed = [*layers.NEEDED, *(["mpi4py"] if name == "distributed_digits" else [])]
    for missing in needed:
        monkeypatch.setitem(sys.modules, missing, None)
    for loaded in EXAMPLES:
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    example = importlib.import_module(name)
    assert status(example, ["--help"], monkeypatch) == 0
    capsys.readouterr()
    assert status(example, [], monkeypatch) == 1
    assert capsys.readouterr() == ("", f"{name}.py: {', '.join(needed)} cannot be found: pip install '.[examples]'\n")


def test_a_closed_pipe_is_quiet():
    """A reader that closes the pipe early, such as `head`, causes no error."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "import layers; layers.run(lambda: print('a line'))"]
    options = {"cwd": ROOT / "examples", "env": os.environ | {"PYTHONUNBUFFERED": ""}, "timeout": 120, "check": False}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, **options)
    os.close(write)
    assert (result.returncode, result.stderr) == (layers.CLOSED_PIPE, b"")
    for name in EXAMPLES:
        assert "    layers.run(main)\n" in (ROOT / "examples" / f"{name}.py").read_text()


def test_the_readme_names_every_example():
    named = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == EXAMPLES


def test_pictures_are_small():
    pictures = list((ROOT / "examples" / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stem in EXAMPLES
        assert picture.stat().st_size < 100_000, picture


def network(rng, device):
    return layers.Sequential(
        layers.Conv2d(rng, 2, 3, stride=2),
        BatchNorm2d(3, activation="relu", device=device, dtype=np.float64),
        layers.Conv2d(rng, 3, 4),
        layers.Bias(4, activation="relu"),
        layers.MaxPool2d(),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 4, 5),
    )


def test_gradients_are_the_slopes_of_the_loss(xp, device, rng, monkeypatch):
    """Gradients agree with the slope of the loss along a random direction of x and all parameters, in float64."""
    monkeypatch.setattr(layers, "xp", xp)
    net = network(rng, device)
    for layer in net.layers:
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    x, labels = xp.asarray(rng.standard_normal((6, 2, 8, 8))), xp.asarray(rng.integers(0, 5, 6))

    scores, vjp_fn = net.vjp(x)
    _, dscores = layers.softmax_cross_entropy(scores, labels)
    grads = vjp_fn(dscores)
    values = [x, *net.parameters()]
    assert [g.shape for g in grads] == [v.shape for v in values]
    directions = [xp.asarray(rng.standard_normal(v.shape)) for v in values]

    def loss(step):
        for value, direction in zip(values, directions, strict=True):
            value += step * direction
        result = layers.softmax_cross_entropy(net(x), labels)[0]
        for value, direction in zip(values, directions, strict=True):
            value -= step * direction
        return result

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("example", ["distributed_digits"], indirect=True)
def test_losses_that_are_the_same_are_drawn(example, monkeypatch, tmp_path):
    """Equal losses are drawn at the bottom of the logarithmic axis, which has no place for a difference of 0."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(layers, "save_picture", lambda figure, *_, **__: figures.append(figure))
    single = np.linspace(2, 1, 5)
    distances = {example.SINGLE: 0, example.SYNCHRONIZED: np.array([0, 0, 1e-7, 0, 1e-4]), example.PLAIN: 0.1}
    example.report(2, {n: single + d for n, d in distances.items()}, {name: [1.0] for name in distances}, tmp_path)
    axes = figures[0].axes[1]
    drawn = axes.lines[0].get_ydata()
    assert drawn == pytest.approx([1e-8, 1e-8, 1e-7, 1e-8, 1e-4], rel=1e-6)
    bottom, top = axes.get_ylim()
    assert bottom < drawn.min() < drawn.max() < top
    assert "1e-8" in axes.get_ylabel()
