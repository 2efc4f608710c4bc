"""The examples' layers have the right gradients, what the larger examples do is right, and each tells what it takes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from functools import partial, update_wrapper
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm2d

pytest.importorskip("threadpoolctl")
ROOT = Path(__file__).parent.parent
SHARED = ("layers", "memory", "stopwatch")  # modules that examples import
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in SHARED)
NEEDED = {"distributed_digits": ["mpi4py"], "from_torch": ["safetensors"]}  # beside layers.NEEDED
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
    assert re.search(r"^    pip install '\.\[examples(,dask)?\]'( torch)?$", out, re.MULTILINE)
    assert re.search(rf"^    (python|mpiexec -n 2 python -m mpi4py) examples/{example.__name__}.py$", out, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_wrong_options(example, monkeypatch, capsys, tmp_path):
    """Wrong options print a line of usage, and a line that says what is wrong."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLUMNS", "200")  # the usage is one line
    wrong = [["--no-such-option"], ["positional"]]
    assert status(example, ["--help"], monkeypatch) == 0
    known = capsys.readouterr().out
    numbers = re.findall(r"(--\w+) [A-Z]+\s+[^(]+\(default: \d+\)", known)
    assert len(numbers) == known.count("(default: ") - ("--output" in known)
    for number in numbers:
        wrong += [[f"{number}={text}"] for text in ("0", "-1", "1.5", "many", "", "1e3", "\u00b2")]
    choices = sorted(set(re.findall(r"(--\w+) \{", known)))
    assert ("--device" in choices) == ("--device" in known)
    wrong += [[choice, "gpu"] for choice in choices]
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
    needed = [*layers.NEEDED, *NEEDED.get(name, [])]
    for missing in needed:
        monkeypatch.setitem(sys.modules, missing, None)
    for loaded in (*EXAMPLES, "stopwatch"):
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


def plain_network(rng):
    return layers.Sequential(
        layers.Conv2d(rng, 2, 3, stride=2),
        BatchNorm2d(3, activation="relu"),
        layers.Conv2d(rng, 3, 4),
        layers.Bias(4, activation="relu"),
        layers.MaxPool2d(),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 4, 5),
    )


def residual_network(rng, channels=2):
    """A small network of the same layers as ResNet-18, with a block of either kind."""
    resnet18 = importlib.import_module("resnet18")
    return layers.Sequential(
        *resnet18.conv_norm(rng, channels, 3, kernel=7, stride=2),
        layers.MaxPool2d(kernel=3, stride=2, padding=1),
        resnet18.basic_block(rng, 3, 3, stride=1),
        resnet18.basic_block(rng, 3, 4, stride=2),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 4, 5),
    )


def in_float64(network, device, rng):
    """The network on a device, in float64. Weights and biases of batch norm become others than 1 and 0."""
    for layer in network.leaves():
        if isinstance(layer, BatchNorm2d):
            layer.to(device, np.float64)
            layer.weight[...], layer.bias[...] = layers.xp.asarray(rng.uniform(0.5, 2, (2, layer.num_features)))
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    return network


@pytest.mark.parametrize("network", [plain_network, residual_network])
def test_gradients_are_the_slopes_of_the_loss(network, xp, device, rng, monkeypatch):
    """Gradients agree with the slope of the loss along a random direction of x and all parameters, in float64."""
    monkeypatch.setattr(layers, "xp", xp)
    net = in_float64(network(rng), device, rng)
    x, labels = xp.asarray(rng.standard_normal((6, 2, 16, 16))), xp.asarray(rng.integers(0, 5, 6))

    scores, vjp_fn = net.vjp(x)
    _, dscores = layers.softmax_cross_entropy(scores, labels)
    grads = vjp_fn(dscores)
    values = [x, *net.parameters()]
    assert [g.shape for g in grads] == [v.shape for v in values]
    directions = [xp.asarray(rng.standard_normal(v.shape)) for v in values]
    assert abs(net(x) - scores).max() < 1e-12

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


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1)])
def test_max_pool(kernel, stride, padding, xp, rng, monkeypatch):
    """Padding is never the maximum, and where all is equal the whole gradient comes back."""
    monkeypatch.setattr(layers, "xp", xp)
    x, pool = rng.uniform(-2, -1, (2, 3, 8, 8)), layers.MaxPool2d(kernel, stride, padding)
    y, vjp_fn = pool.vjp(xp.asarray(x))
    padded = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    assert (layers.to_numpy(y) == windows.max(axis=(4, 5))).all()
    y, vjp_fn = pool.vjp(xp.full((1, 1, 8, 8), -3.0))
    assert float(vjp_fn(xp.ones_like(y))[0].sum()) == pytest.approx(y.size)


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


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (7, 2, 3)])
def test_transposed_convolution(kernel, stride, padding, xp, rng, monkeypatch):
    """Sums of y * conv_transpose2d(x) are those of conv2d(y) * x; without a size all that windows reach is there."""
    monkeypatch.setattr(layers, "xp", xp)
    weight = xp.asarray(rng.standard_normal((4, 3, kernel, kernel)))
    x = xp.asarray(rng.standard_normal((2, 4, 5, 6)))
    transposed = layers.conv_transpose2d(x, weight, stride, padding)
    assert transposed.shape == (2, 3, *((n - 1) * stride + kernel - 2 * padding for n in (5, 6)))
    y = xp.asarray(rng.standard_normal(transposed.shape))
    expected = (layers.conv2d(y, weight, stride, padding)[0] * x).sum()
    assert float((y * transposed).sum()) == pytest.approx(float(expected), rel=1e-12)


@pytest.fixture
def resnet18(xp, monkeypatch):
    """The example resnet18, on arrays of xp."""
    module = importlib.import_module("resnet18")
    for name in ("layers", "stopwatch", "resnet18"):
        monkeypatch.setattr(sys.modules[name], "xp", xp)
    return module


def test_resnet18_is_that_of_torchvision():
    """The number of parameters, the convolutions in their order, pooling, and which blocks have shortcuts."""
    resnet18 = importlib.import_module("resnet18")
    network = resnet18.make_network()
    assert sum(parameter.size for parameter in network.parameters()) == 11_689_512
    convolutions = [layer for layer in network.leaves() if isinstance(layer, layers.Conv2d)]
    expected = [(64, 7, 2, 3), *[(64, 3, 1, 1)] * 4]
    for C in (128, 256, 512):
        expected += [(C, 3, 2, 1), (C, 3, 1, 1), (C, 1, 2, 0), (C, 3, 1, 1), (C, 3, 1, 1)]
    assert [(*c.weight.shape[::2], c.stride, c.padding) for c in convolutions] == expected
    shortcuts = [len(block.layers) == 5 for block in network.layers if isinstance(block, layers.ResidualBlock)]
    assert shortcuts == [False, False, True, False, True, False, True, False]
    assert vars(network.layers[2]) == {"kernel": 3, "stride": 2, "padding": 1}


def test_folding_changes_rounding_alone(resnet18, xp, device, rng):
    """A network with every batch norm folded has the same scores; the network that it was made of stays as it was."""
    network = in_float64(residual_network(rng), device, rng)
    batches = [xp.asarray(rng.standard_normal((4, 2, 32, 32))) for _ in range(2)]
    norms = [layer for layer in network.leaves() if isinstance(layer, BatchNorm2d)]
    cupybn.update_bn(norms, batches, network)
    expected = network.eval()(batches[0])
    folded = resnet18.fold_all(network)
    assert not any(isinstance(layer, BatchNorm2d) for layer in folded.leaves())
    assert resnet18.difference(folded(batches[0]), expected) < 1e-13
    assert (network(batches[0]) == expected).all()
    assert [norm.activation for norm in norms] == ["relu"] * 5 + [None]


@pytest.mark.parametrize("device", ["cpu"])
def test_photographs(resnet18):
    """Squares are taken from the left to the right of the photographs, and their values are from -1 to 1."""
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    left, middle, right = (resnet18.load(32, across) for across in (0, 0.5, 1))
    assert (left.shape, left.dtype) == ((2, 3, 32, 32), np.float32)
    assert -1 <= left.min() < -0.9 < 0.9 < left.max() <= 1
    # A photograph is 640 x 427: 213 pixels to the right are 16 of 32.
    assert np.corrcoef(left[..., 16:].ravel(), right[..., :16].ravel())[0, 1] > 0.98
    assert (resnet18.load(32) == middle).all()


def test_what_is_timed(resnet18, device, rng, monkeypatch):
    """Each pass of each layer counts once for its part, by a clock that ticks when it is read; results are medians."""
    pytest.importorskip("tqdm")
    reads = 26 + 26 + 26 + 14  # in a round of the four passes; in the last of three it takes longer
    ticks = iter([*range(2 * reads), *range(0, 1000 * reads, 1000)])
    stopwatch = sys.modules["stopwatch"]
    monkeypatch.setattr(stopwatch, "now", lambda: next(ticks))
    monkeypatch.setattr(stopwatch, "seconds_between", lambda start, end: end - start)
    network = in_float64(residual_network(rng), device, rng)
    x, labels = (resnet18.xp.asarray(array) for array in (rng.standard_normal((4, 2, 32, 32)), np.arange(4)))
    times = resnet18.measure(network, resnet18.fold_all(network), x, labels, repetitions=3)
    # For 6 layers of either kind the clock is read at both ends, and so it is for the whole pass.
    with_norms = {resnet18.NORM: 6, resnet18.CONVOLUTION: 6, resnet18.REST: 13}
    folded = {resnet18.NORM: 0, resnet18.CONVOLUTION: 6, resnet18.REST: 7}
    passes = (resnet18.FORWARD, resnet18.BACKWARD, resnet18.INFERENCE)
    assert times == {**dict.fromkeys(passes, with_norms), resnet18.FOLDED: folded}
    assert next(ticks, None) is None
    assert int(network.layers[1].num_batches_tracked) == 3  # inference has not been in training mode


def test_the_stopwatch(resnet18, xp, monkeypatch):  # noqa: ARG001 - the modules take arrays of xp
    """Seconds add up by name until they are asked for, and what was timed returns what it returns."""
    stopwatch = sys.modules["stopwatch"]
    if xp is np:
        ticks = iter([0, 1.5, 2, 2.25, 3, 4.5])
        monkeypatch.setattr(stopwatch, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    else:
        laps = iter([1500, 250, 1500])  # milliseconds
        monkeypatch.setattr(xp.cuda, "get_elapsed_time", lambda *_: next(laps))
    watch = stopwatch.Stopwatch()
    assert [watch.run(name, abs, -1) for name in "aba"] == [1, 1, 1]
    assert watch.seconds() == {"a": 3, "b": 0.25}
    assert watch.seconds() == {}


def run_main(example, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", "--output", str(tmp_path), *arguments])
    example.main()


@pytest.fixture
def small_resnet18(resnet18, device, rng, monkeypatch):
    """The example with a small network in the place of ResNet-18."""
    for package in layers.NEEDED:
        pytest.importorskip(package)

    def make_network():
        network = residual_network(rng, channels=3)
        for layer in network.leaves():
            if isinstance(layer, BatchNorm2d):
                layer.to(device)
        return network

    monkeypatch.setattr(resnet18, "make_network", make_network)
    return resnet18


def test_resnet18_prints_and_draws(small_resnet18, monkeypatch, capsys, tmp_path):
    """The example prints how far scores are apart, and shares that add up; they are those of the picture, too."""
    parts = {"batch norm": 0.5, "convolution": 1.0, "the rest": 0.5}
    times = dict.fromkeys(("training, forward", "training, backward", "inference"), parts)
    times["inference, folded"] = {"batch norm": 0.0, "convolution": 0.97, "the rest": 0.03}
    asked, figures, save_picture = [], [], layers.save_picture

    def measure(*arguments):
        asked.append(arguments)
        return times

    def save(figure, *arguments, **settings):
        figures.append(figure)
        save_picture(figure, *arguments, **settings)

    monkeypatch.setattr(small_resnet18, "measure", measure)
    monkeypatch.setattr(layers, "save_picture", save)
    run_main(small_resnet18, ["--size", "32", "--repetitions", "3"], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert asked[0][-1] == 3
    error = float(re.search(r"6 batch norms folded, from not folded +(\S+)", out)[1])
    assert error < 1e-5
    apart = [float(text) for text in re.findall(r"eval mode from training mode, after .* (\S+)$", out, re.MULTILINE)]
    assert apart[1] < apart[0]
    assert re.search(r"inference +25% +50% +25% +1\.00\n", out)
    assert re.search(r"inference, folded +0% +97% +3% +0\.50\n", out)
    assert (tmp_path / "resnet18.png").stat().st_size < 100_000
    (axes,) = (axes for axes in figures[0].axes if axes.containers)
    drawn = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    assert drawn.sum(axis=0) == pytest.approx([1, 1, 1, 0.5])
    begins = np.array([[bar.get_x() for bar in bars] for bars in axes.containers])
    assert begins == pytest.approx(drawn.cumsum(axis=0) - drawn)
    shown = {text.get_text() for text in axes.texts} - {""}
    assert shown == {"25%", "50%", "97%"}  # 3% has no room


def test_resnet18_with_a_wrong_fold(small_resnet18, monkeypatch, tmp_path):
    """A folded network with other scores is an error, at the end."""
    fold = cupybn.fold_conv_bn

    def wrong(*arguments):
        weight, bias = fold(*arguments)
        return weight, bias + 1e-3

    monkeypatch.setattr(cupybn, "fold_conv_bn", wrong)
    with pytest.raises(SystemExit, match="expected folding to change scores by 1e-05"):
        run_main(small_resnet18, ["--size", "32", "--repetitions", "1"], monkeypatch, tmp_path)
    assert (tmp_path / "resnet18.png").exists()


@pytest.fixture
def from_torch(xp, device, monkeypatch):
    """The example from_torch, on arrays of xp."""
    for package in ("torch", "safetensors", *layers.NEEDED):
        pytest.importorskip(package)
    module = importlib.import_module("from_torch")
    for name in ("layers", "from_torch"):
        monkeypatch.setattr(sys.modules[name], "xp", xp)
    for norm in ("BatchNorm1d", "BatchNorm2d"):
        monkeypatch.setattr(cupybn, norm, partial(getattr(cupybn, norm), device=device))
    return module


@pytest.mark.parametrize("name", ["first", "grouped", "transposed", "last"])
def test_convolutions_are_those_of_torch(name, from_torch, xp, rng):
    import torch

    module = getattr(from_torch.torch_network(), name).conv.double()
    x = rng.standard_normal((2, module.in_channels, 9, 7))
    weight, bias = (None if p is None else xp.asarray(p.detach().numpy()) for p in (module.weight, module.bias))
    settings = from_torch.CONVOLUTIONS[name][1]
    y = from_torch.convolution(xp.asarray(x), weight, bias, name in from_torch.TRANSPOSED, **settings)
    np.testing.assert_allclose(layers.to_numpy(y), module(torch.tensor(x)).detach().numpy(), rtol=0, atol=1e-13)


def test_from_torch(from_torch, monkeypatch, capsys, tmp_path):
    """Scores are PyTorch's, folded or not, from either file; and what is saved is what it had written."""
    monkeypatch.setattr(from_torch, "STEPS", 2)
    run_main(from_torch, [], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    errors = [float(text) for text in re.findall(r"largest difference from PyTorch (\S+) of", out)]
    assert len(errors) == 4
    assert max(errors) < 1e-5
    assert out.count("read by PyTorch: the same bits") == 2
    names = ["digits.pt", "digits.safetensors", "norms.pt", "norms.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("function", ["fold_conv_bn", "fold_linear_bn", "load_checkpoint", "save_checkpoint"])
@pytest.mark.parametrize("device", ["cpu"])
def test_from_torch_tells_what_is_wrong(function, from_torch, monkeypatch, tmp_path):
    """Each function of the library that gives something else than it should ends the example with an error."""
    original = getattr(cupybn, function)

    def wrong(first, *others, **settings):
        if function.startswith("fold"):
            weight, bias = original(first, *others, **settings)
            return weight, bias + 1e-2
        (norms,) = others
        if function == "load_checkpoint":
            original(first, norms)
        norms["grouped.bn."].running_mean += 1e-2
        return original(first, norms) if function == "save_checkpoint" else None

    monkeypatch.setattr(cupybn, function, wrong)
    monkeypatch.setattr(from_torch, "STEPS", 2)
    with pytest.raises(SystemExit, match=r"expected (a difference of 1e-05 or less|PyTorch to read from)"):
        run_main(from_torch, [], monkeypatch, tmp_path)


def test_from_torch_without_torch(monkeypatch, capsys, tmp_path):
    """The example ends well without PyTorch, with a line that says why it did nothing."""
    for package in ("safetensors", *layers.NEEDED):
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "torch", None)
    run_main(importlib.import_module("from_torch"), [], monkeypatch, tmp_path)
    out, _ = capsys.readouterr()
    assert out.startswith("skipped: ")
    assert out.endswith("pip install torch\n")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# image_stack


@pytest.fixture
def image_stack(xp, monkeypatch):
    """The example with small frames, on arrays of xp, where no package beside those of the extra can be found."""
    for package in layers.NEEDED:
        pytest.importorskip(package)
    module = importlib.import_module("image_stack")
    monkeypatch.setattr(layers, "xp", xp)
    for name, value in {"SIZE": 32, "CHUNK": 4, "find_spec": lambda name: None}.items():  # noqa: ARG005
        monkeypatch.setattr(module, name, value)
    return module


SMALL_STACK = ("--frames", "10", "--limit", "64")


def numbers(out, name):
    """The three numbers of a row of the example's table."""
    line = re.search(rf"^  {re.escape(name)} +(-?[\d,.]+) +(-?[\d,.]+) +(-?[\d,.]+)  ", out, re.MULTILINE)
    return np.array([float(text.replace(",", "")) for text in line.groups()])


def whole_stack(image_stack):
    """The stack in memory, as float64, and its mask."""
    stack = np.concatenate(list(image_stack.acquire(10)))
    return stack.transpose(0, 2, 3, 1).astype(np.float64), image_stack.usable(stack)


def test_image_stack(image_stack, xp, monkeypatch, capsys, tmp_path):
    """Rows are those of the whole stack in float64. The picture alone is left, and what is missing is named."""
    device = ("--device", "cpu" if xp is np else "cuda")
    run_main(image_stack, [*SMALL_STACK, *device, "--zarr"], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    stack, mask = whole_stack(image_stack)
    expected = stack[mask].var(axis=0)
    for name in ("exact, from sums of integers", "StreamingMoments, 3 chunks"):
        np.testing.assert_allclose(numbers(out, name), expected, rtol=1e-6)
    chunks = [stack[i : i + 4][mask[i : i + 4]].var(axis=0) for i in range(0, 10, 4)]
    np.testing.assert_allclose(numbers(out, "mean of the chunks' variances"), np.mean(chunks, axis=0), rtol=1e-5)
    np.testing.assert_allclose(numbers(out, "without the mask"), stack.var(axis=(0, 1, 2)), rtol=1e-6)
    assert numbers(out, "mean").tolist() == [0, 0, 0]
    assert numbers(out, "variance").tolist() == [1, 1, 1]
    assert re.findall(r"^without (\w+).*: (.*) cannot be found: pip install '\.\[dask\]'$", out, re.MULTILINE) == [
        ("Zarr", "zarr"),
        ("Dask", "dask, distributed"),
        ("xarray", "dask, xarray"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["image_stack.png"]
    assert (tmp_path / "image_stack.png").stat().st_size < 100_000


def test_image_stack_on_a_full_disk(image_stack, monkeypatch, tmp_path):
    """A disk without room for it is told of before anything is written, and nothing is left there."""
    needed = 10 * 3 * 32 * 32 * (2 + 4)
    for free in needed - 1, needed:
        monkeypatch.setattr(image_stack.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        monkeypatch.setattr(image_stack, "compare", lambda *_: sys.exit("goes on"))
        monkeypatch.setattr(sys, "argv", ["image_stack.py", "--frames", "10", "--output", str(tmp_path)])
        expected = "goes on" if free == needed else f"{tmp_path}: expected 0 MB to be free for the stack"
        with pytest.raises(SystemExit, match=f"^{re.escape(expected)}"):
            image_stack.main()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu"])
def test_image_stack_every_way(image_stack, monkeypatch, capsys, tmp_path):
    """Moments are the same from Zarr, in processes of Dask and through xarray."""
    for package in ("dask", "distributed", "xarray", "zarr"):
        pytest.importorskip(package)
    monkeypatch.setattr(image_stack, "find_spec", lambda name: name)
    run_main(image_stack, [*SMALL_STACK, "--device", "cpu", "--zarr"], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert "uint16, .zarr" in out
    stack, mask = whole_stack(image_stack)
    for name in ("StreamingMoments, 3 chunks", "Dask, 2 processes", "xarray, frame by frame"):
        np.testing.assert_allclose(numbers(out, name), stack[mask].var(axis=0), rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["image_stack.png"]


@pytest.mark.parametrize("device", ["cpu"])
def test_which_pixels_are_usable(image_stack):
    """Pixels are usable in the field of view, most of the frame, where no channel is stuck; it is dark elsewhere."""
    stack, mask = whole_stack(image_stack)
    stuck = (stack == image_stack.STUCK).any(axis=3)
    assert stuck.any(axis=0).sum() == stuck[0].sum() > 0
    field = image_stack.field_of_view(32)
    assert field[16, 1]
    assert not field[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert 0.7 < field.mean() < 0.8
    assert (mask == (field & ~stuck)).all()
    assert stack[~field & ~stuck].max() < image_stack.OFFSET * 1.5 < stack[1:][mask[1:]].min()


@pytest.mark.parametrize("device", ["cpu"])
def test_blocks_that_xarray_normalizes_are_compared(image_stack, tmp_path):
    for package in ("dask", "xarray"):
        pytest.importorskip(package)
    _, var = image_stack.write_stack(tmp_path / "stack.npy", 10)
    np.save(tmp_path / "zeros.npy", np.zeros((10, 3, 32, 32), np.float32))
    total, distance = image_stack.with_xarray(tmp_path / "stack.npy", tmp_path / "zeros.npy", "cpu")
    stack, mask = whole_stack(image_stack)
    largest = abs((stack - total.mean) / np.sqrt(var))[mask].max()
    assert distance == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu"])
def test_a_chunk_that_does_not_fit(image_stack, monkeypatch, tmp_path):
    """A limit that is too small for a chunk ends with a line that says so, and the limit that was there is back."""
    memory = sys.modules["memory"]
    if not memory.STATUS.exists():
        pytest.skip("Linux alone limits memory")
    monkeypatch.setattr(cupybn.StreamingMoments, "update", lambda *_: np.ones(10**9))
    with pytest.raises(SystemExit, match="4 frames and what they become do not fit into 64 MB: give a larger --limit"):
        run_main(image_stack, [*SMALL_STACK, "--device", "cpu"], monkeypatch, tmp_path)
    assert np.ones(10**8, np.uint8).all()
    assert not list(tmp_path.iterdir())


def faulty_image_stack(image_stack, monkeypatch):
    """What to replace by a fault in a part of the example or the library, by the error that it should lead to."""
    update, batch_norm = cupybn.StreamingMoments.update, cupybn.functional.batch_norm
    monkeypatch.setattr(image_stack, "draw", lambda *_: None)
    return {
        "moments": (cupybn.StreamingMoments, "update", lambda stats, x, mask=None: update(stats, x)),  # noqa: ARG005
        "normalized": (cupybn.functional, "batch_norm", lambda *args, **more: batch_norm(*args, **more) * 1.001),
        "xarray": (
            image_stack,
            "with_xarray",
            lambda path, _, device: (image_stack.moments_of(0, 10, path, device), 1),
        ),
        "taken": (image_stack.MemoryLimit, "look", lambda limit: limit.peaks.append(10**9)),
        "limit": (image_stack, "load_at_once", lambda _: None),
    }


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("moments", "expected the moments of the whole stack to 1e-06"),
        ("normalized", "expected a normalized stack of mean 0 and variance 1 to 1e-06"),
        ("xarray", r"expected the same normalized stack from xarray to 1e-06 \(got 1e\+00\)"),
        ("taken", "expected to take 64 MB at most"),
        ("limit", "expected the limit of memory to hold"),
    ],
)
def test_image_stack_tells_what_is_wrong(fault, message, image_stack, monkeypatch, tmp_path):
    if fault in ("taken", "limit") and not sys.modules["memory"].STATUS.exists():
        pytest.skip("Linux alone limits memory")
    if fault == "xarray":
        monkeypatch.setattr(image_stack, "find_spec", lambda name: None if name == "distributed" else name)
    monkeypatch.setattr(*faulty_image_stack(image_stack, monkeypatch)[fault])
    frames, limit = ("100", "1") if fault == "limit" else ("10", "64")
    with pytest.raises(SystemExit, match=message):
        run_main(image_stack, ["--frames", frames, "--limit", limit, "--device", "cpu"], monkeypatch, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone limits memory")
def test_memory_limit():
    """What goes beyond the limit is an error, the peaks are those of the block, and the limit ends with it."""
    resource = pytest.importorskip("resource")
    memory = importlib.import_module("memory")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.MemoryLimit(64 * 2**20, hard=True) as limit:
        with pytest.raises(MemoryError):
            np.ones(128 * 2**20, np.uint8)
        np.ones(40 * 2**20, np.uint8)
        limit.look()
        limit.look()
    assert limit.peaks[0] > 40 * 2**20 * 0.9
    assert len(limit.peaks) == 2
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert limit.peaks[1] < limit.peaks[0] / 2
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    np.ones(128 * 2**20, np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# padded_sequences


@pytest.fixture
def padded_sequences(xp, device, monkeypatch):
    """The example with few and short lines, on arrays of xp."""
    for package in layers.NEEDED:
        pytest.importorskip(package)
    module = importlib.import_module("padded_sequences")
    for owner in (layers, module):
        monkeypatch.setattr(owner, "xp", xp)
    few = {"LINES": 16, "RENEWING": 16, "LONGEST": 12, "BATCH_SIZE": 8, "WIDTH": 4, "PADDING": (0, 5)}
    for name, value in few.items():
        monkeypatch.setattr(module, name, value)
    network_of = module.Network

    def make_network(masks, seed):
        network = network_of(masks, seed)
        for norm in network.norms:
            norm.to(device)
        return network

    monkeypatch.setattr(module, "Network", make_network)
    return module


MASKS = ("NOWHERE", "MEAN", "EVERYWHERE")


def codes_of_lines(rng, xp, longest=7):
    """Codes of six lines of 3 to 7 characters."""
    codes = rng.integers(1, 96, (6, longest))
    for i, row in enumerate(codes):
        row[3 + i % 5 :] = 0
    return xp.asarray(codes)


@pytest.mark.parametrize("masks", MASKS)
def test_gradients_of_padded_sequences(masks, padded_sequences, xp, rng):
    """Gradients are the slopes of the loss along a random direction of all parameters, in float64."""
    network = padded_sequences.Network(getattr(padded_sequences, masks), 0)
    for norm in network.norms:
        norm.to(dtype=np.float64)
        norm.weight[...], norm.bias[...] = xp.asarray(rng.uniform(0.5, 2, (2, norm.num_features)))
    for layer in network.body:
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    codes, labels = codes_of_lines(rng, xp), xp.asarray(rng.integers(0, 3, 6))
    scores, vjp_fn = network.vjp(codes)
    grads = vjp_fn(layers.softmax_cross_entropy(scores, labels)[1])
    values = network.parameters()
    assert [grad.shape for grad in grads] == [value.shape for value in values]
    assert not grads[0][0].any()  # the embedding of padding is not trained
    directions = [xp.asarray(rng.standard_normal(value.shape)) for value in values]
    directions[0][0] = 0

    def loss(step):
        for value, direction in zip(values, directions, strict=True):
            value += step * direction
        result = layers.softmax_cross_entropy(network(codes), labels)[0]
        for value, direction in zip(values, directions, strict=True):
            value -= step * direction
        return float(result)

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    expected = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masks", MASKS)
def test_which_scores_depend_on_padding(masks, padded_sequences, xp, rng):
    """Scores depend on it in both modes without a mask; in training mode with one in the mean; else in none."""
    network = padded_sequences.Network(getattr(padded_sequences, masks), 0)
    for norm in network.norms:
        norm.bias[...] = 0.5  # so that padding that is not masked out is not 0 behind a norm
    codes = codes_of_lines(rng, xp)
    more = xp.pad(codes, ((0, 0), (0, 20)))
    moved = [float(abs(network.train(mode)(more) - network.train(mode)(codes)).max()) for mode in (True, False)]
    if masks == "EVERYWHERE":
        assert max(moved) < 1e-5
    else:
        assert moved[0] > 0.05
        assert moved[1] > 0.05 or masks == "MEAN"


def test_lines_that_are_padded(padded_sequences, rng):
    codes, labels = padded_sequences.load(rng)
    assert codes.shape == (48, 12)
    assert np.bincount(labels).tolist() == [16, 16, 16]
    lengths = (codes > 0).sum(axis=1)
    assert lengths.min() >= padded_sequences.SHORTEST
    assert all(row[:length].all() for row, length in zip(codes, lengths, strict=True))  # padding is behind the line
    short = codes[lengths < 12]
    batch = layers.to_numpy(padded_sequences.padded(short, 3))
    longest = (short > 0).sum(axis=1).max()
    assert batch.shape == (len(short), longest + 3)
    assert (batch[:, :longest] == short[:, :longest]).all()
    assert not batch[:, longest:].any()
    stub = "".join(chr(code + 31) for code in codes[labels == 1][0] if code)
    assert any(stub in line for line in padded_sequences.lines_of(".pyi"))


def test_padded_sequences(padded_sequences, monkeypatch, capsys, tmp_path):
    run_main(padded_sequences, ["--epochs", "1", "--seeds", "1"], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    rows = re.findall(r"^  (\w[\w, ]+\w) +[\d.]+ ± 0.0% +[\d.]+ ± 0.0% +(\S+)$", out, re.MULTILINE)
    names = [padded_sequences.NOWHERE, padded_sequences.MEAN, padded_sequences.EVERYWHERE]
    assert [name for name, _ in rows] == names * 2
    moved = [float(text) for _, text in rows]
    assert max(moved[2], moved[5]) < 1e-4 < min(moved[0], moved[3], moved[4])
    assert (tmp_path / "padded_sequences.png").stat().st_size < 100_000


@pytest.mark.parametrize("device", ["cpu"])
def test_padded_sequences_with_a_mask_that_does_nothing(padded_sequences, monkeypatch, tmp_path):
    """Batch norm that takes no notice of its mask ends the example with an error."""
    vjp = cupybn.BatchNorm1d.vjp
    monkeypatch.setattr(padded_sequences.BatchNorm1d, "vjp", lambda layer, x, mask=None: vjp(layer, x))  # noqa: ARG005
    with pytest.raises(SystemExit, match="expected scores that do not depend on padding"):
        run_main(padded_sequences, ["--epochs", "1", "--seeds", "1"], monkeypatch, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# transformer_block


def named(kind, **settings):
    """A class with some of its arguments given, under its name."""
    return update_wrapper(partial(kind, **settings), kind)


@pytest.fixture
def transformer_block(xp, device, monkeypatch, tmp_path):
    """The example on arrays of xp, with few texts, of which the first word tells the library."""
    for package in layers.NEEDED:
        pytest.importorskip(package)
    module = importlib.import_module("transformer_block")
    for owner in (layers, module):
        monkeypatch.setattr(owner, "xp", xp)
    for norm, kind in module.NORMS.items():
        monkeypatch.setitem(module.NORMS, norm, named(kind, device=device))
    monkeypatch.setattr(module, "Generator", partial(cupybn.Generator, device=device))
    for name, value in {"LONGEST": 5, "WIDTH": 8, "HEADS": 2, "HIDDEN": 12, "BATCH_SIZE": 16}.items():
        monkeypatch.setattr(module, name, value)
    for letter, library in zip("abcd", module.LIBRARIES, strict=True):
        (tmp_path / library / "tests").mkdir(parents=True)
        (tmp_path / library / "tests" / "test_it.py").write_text(f'"""Word{letter} of tests are left out."""\n')
        for file in "abcdefgh":
            texts = [f"Word{letter} of file{file} {'very ' * n}{library}." for n in range(1, 5)]
            texts += [f"Word{letter} without a full stop", f"Word{letter} short.", f"Word{letter} is one. And another."]
            texts += ["Shared by all of them.", texts[0]]
            functions = [f'def f():\n    """{text}\n\n    A second paragraph of it.\n    """\n' for text in texts]
            (tmp_path / library / f"file{file}.py").write_text("\n".join(functions))
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))
    return module


@pytest.mark.parametrize("device", ["cpu"])
def test_texts_of_the_transformer(transformer_block, rng):
    """Texts are first sentences that one library alone has, once and without its name. Whole files are held out."""
    learned, held_out = transformer_block.load(rng)
    files = []
    for texts, labels in (learned, held_out):
        assert all(text[0] == f"word{'abcd'[label]}" for text, label in zip(texts, labels, strict=True))
        assert all(text[1] == "of" and set(text[3:]) == {"very"} for text in texts)
        assert sorted(map(len, texts)) == sorted([4, 5, 5, 5] * (len(texts) // 4))  # longer ones are cut
        files.append({(int(label), text[2]) for text, label in zip(texts, labels, strict=True)})
    assert [len(texts) for texts, _ in (learned, held_out)] == [96, 32]
    assert [len(found) for found in files] == [24, 8]
    assert not files[0] & files[1]
    codes = transformer_block.vocabulary(learned[0])
    rows = transformer_block.encode([["of", "worda"], ["nothing"]], codes)
    assert rows.tolist() == [[codes["of"], codes["worda"], 0, 0, 0], [1, 0, 0, 0, 0]]
    assert sorted(codes.values()) == list(range(2, len(codes) + 2))


@pytest.mark.parametrize("device", ["cpu"])
def test_naive_bayes(transformer_block, rng):
    bayes = pytest.importorskip("sklearn.naive_bayes")
    labels = [rng.integers(0, 4, n) for n in (60, 40)]
    parts = [(rng.integers(0, 3 + 3 * of[:, None], (len(of), 5)), of) for of in labels]
    (x, labels), (x_test, labels_test) = parts
    counts, counts_test = ([np.bincount(row, minlength=x.max() + 1)[1:] for row in rows] for rows in (x, x_test))
    expected = bayes.MultinomialNB().fit(counts, labels).score(counts_test, labels_test)
    assert transformer_block.naive_bayes(*parts) == expected > 0.25


def small_transformer(module, norm, p=0.3):
    """A network in float64, with weights and biases of its norms that are not 1 and 0, and codes of words for it."""
    network, rng, xp = module.Network(norm, p, 12, seed=0), np.random.default_rng(0), module.xp
    for layer in (network.block.norm1, network.block.norm2, network.norm):
        layer.to(dtype=np.float64)
        for parameter in layer.parameters():
            parameter[...] = xp.asarray(rng.uniform(0.5, 2, parameter.shape))
    attention, mlp = network.block.attention, network.block.mlp.layers
    for layer in (network.embedding, attention.project, attention.out, mlp[0], mlp[2], network.scores):
        for name in layer.names:
            setattr(layer, name, xp.asarray(rng.normal(0, 0.5, getattr(layer, name).shape)))
    codes = rng.integers(1, 12, (6, 5))
    for i, row in enumerate(codes):
        row[2 + i % 4 :] = 0
    return network, xp.asarray(codes)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradients_of_the_transformer(norm, transformer_block, xp, rng):
    """Gradients are the slopes of the loss along a random direction of each parameter, with the same dropout."""
    network, codes = small_transformer(transformer_block, norm)
    labels, state = xp.asarray(rng.integers(0, 4, 6)), network.block.generator.state

    def loss():
        state[1] = 0
        scores, vjp_fn = network.vjp(codes)
        value, dscores = layers.softmax_cross_entropy(scores, labels)
        return float(value), dscores, vjp_fn

    _, dscores, vjp_fn = loss()
    assert int(state[1]) == 3
    _, *grads = vjp_fn(dscores)
    values = network.parameters()
    assert len(values) == (18 if norm == "layer" else 15)
    for value, grad in zip(values, grads, strict=True):
        direction = xp.asarray(rng.standard_normal(value.shape))
        value += 1e-6 * direction
        above = loss()[0]
        value -= 2e-6 * direction
        slope = (above - loss()[0]) / 2e-6
        value += 1e-6 * direction
        assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("device", ["cpu"])
def test_padding_of_the_transformer(transformer_block):
    """The word that padding stands for, and its places, change no score; other words do."""
    network, codes = small_transformer(transformer_block, "layer")
    before = network.eval()(codes)
    network.embedding.words[0, ::2] += 1
    network.embedding.places[-1, ::2] += 1
    moved = abs(network(codes) - before).max(axis=1)
    lengths = (codes > 0).sum(axis=1)
    assert (moved[lengths < 5] < 1e-12).all()
    assert (moved[lengths == 5] > 1e-3).all()


def test_a_block_that_is_run_again(transformer_block, capsys):
    """A block that is run again gives the same bits, keeps next to nothing and leaves the generator where it was."""
    network, codes = small_transformer(transformer_block, "layer")
    block, there = network.block, codes > 0
    x = network.embedding(codes)
    assert transformer_block.recompute(block, x, there)
    kept = re.search(
        r"keeps ([\d.]+) arrays of its input's size for its way back, (-?[\d.]+) if", capsys.readouterr().out
    )
    assert float(kept[2]) < float(kept[1]) / 3
    assert int(block.generator.state[1]) == 2
    y, vjp_fn = block.recomputed_vjp(x, there)
    block(x, there=there)
    vjp_fn(y)
    assert int(block.generator.state[1]) == 6
    block.recomputed_vjp = lambda x, there: (y, lambda dy: block.vjp(x, there)[1](dy))  # the generator has gone on
    assert not transformer_block.recompute(block, x, there)


def test_adam(transformer_block, xp):
    """Steps have the learning rate's size where a gradient stays, whatever it is; else they are those of torch."""
    parameters = [xp.zeros(3), xp.ones((2, 2))]
    optimizer = transformer_block.Adam(parameters, 0.01)
    for _ in range(5):
        optimizer.step([xp.asarray([1e-3, -2.0, 1e3]), xp.full((2, 2), -5.0)])
    np.testing.assert_allclose(layers.to_numpy(parameters[0]), [-0.05, 0.05, -0.05], rtol=1e-4)
    np.testing.assert_allclose(layers.to_numpy(parameters[1]), 1.05, rtol=1e-4)
    torch = pytest.importorskip("torch")
    theirs = torch.ones(3, dtype=torch.float64)
    ours, optimizers = xp.ones(3), torch.optim.Adam([theirs], 0.1, betas=(0.9, 0.99))
    optimizer = transformer_block.Adam([ours], 0.1)
    for step in range(4):
        grad = np.array([step - 1.5, 1 + step, -0.1])
        theirs.grad = torch.from_numpy(grad)
        optimizers.step()
        optimizer.step([xp.asarray(grad)])
    np.testing.assert_allclose(layers.to_numpy(ours), theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize(("device", "norm"), [("cpu", "both"), ("cuda:0", "rms")])
def test_transformer_block(norm, transformer_block, monkeypatch, capsys, tmp_path):
    """The words that tell the library are learned, and the generator that the block has is the only one that draws."""
    made, network_of = [], transformer_block.Network

    def make_network(*arguments, **named):
        made.append(arguments[:2])
        return network_of(*arguments, **named)

    monkeypatch.setattr(transformer_block, "Network", make_network)
    monkeypatch.setattr(transformer_block, "LEARNING_RATE", 0.03)
    run_main(transformer_block, ["--epochs", "8", "--seeds", "1", "--norm", norm], monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("96 texts to learn from, 32 held out, ")
    rows = dict(re.findall(r"^  (\w[\w ]+?) +[\d.]+ ± 0.0% +([\d.]+) ± 0.0%$", out, re.MULTILINE))
    names = (
        ["LayerNorm", "RMSNorm", "LayerNorm without dropout"]
        if norm == "both"
        else ["RMSNorm", "RMSNorm without dropout"]
    )
    assert list(rows) == names
    assert min(map(float, rows.values())) > 70
    p = transformer_block.P  # the first network is that of which the block is run again
    norms = ["layer", "rms"] if norm == "both" else ["rms"]
    assert made == [(norms[0], p), *((name, p) for name in norms), (norms[0], 0)]
    assert p > 0
    assert re.search(r"^  naive Bayes +100.0%\n  always the most frequent +25.0%$", out, re.MULTILINE)
    assert (tmp_path / "transformer_block.png").stat().st_size < 100_000


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("fault", ["dropout", "norm"])
def test_transformer_block_tells_what_is_wrong(fault, transformer_block, monkeypatch, tmp_path):
    """Dropout that does not draw from the block's generator ends the example with an error; so does a norm of zeros."""
    functional = transformer_block.F
    dropout_vjp = functional.dropout_vjp
    other = cupybn.Generator(7, device="cpu")
    if fault == "dropout":
        message = "expected the same gradients"
        wrong = lambda x, p, training, generator: dropout_vjp(x, p, training, generator=other)  # noqa: ARG005, E731
        monkeypatch.setattr(functional, "dropout_vjp", wrong)
    else:
        message = "expected held-out accuracies of 50% or more"
        vjp = transformer_block.LayerNorm.vjp
        wrong = lambda layer, x: (0 * x, vjp(layer, x)[1])  # noqa: E731
        monkeypatch.setattr(transformer_block.LayerNorm, "vjp", wrong)
    with pytest.raises(SystemExit, match=message):
        run_main(transformer_block, ["--seeds", "1", "--norm", "layer"], monkeypatch, tmp_path)
    assert (tmp_path / "transformer_block.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# small_batches


@pytest.fixture
def small_batches(xp, device, monkeypatch):
    """The example with few digits and small networks, on arrays of xp."""
    for package in layers.NEEDED:
        pytest.importorskip(package)
    module = importlib.import_module("small_batches")
    for owner in (layers, module):
        monkeypatch.setattr(owner, "xp", xp)
    for name in ("BatchNorm2d", "GroupNorm"):
        monkeypatch.setattr(module, name, partial(getattr(module, name), device=device))
    monkeypatch.setitem(module.NORMS, "batch norm", module.BatchNorm2d)
    stages = tuple((4, stride) for _, stride in module.STAGES)
    for name, value in {"DIGITS": 40, "SIZES": (2, 8), "STAGES": stages}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("norm", ["batch norm", "group norm"])
def test_gradients_of_small_batches(norm, small_batches, xp, rng):
    """Gradients are the slopes of the loss along a random direction of all parameters, in float64, for two images."""
    network = small_batches.make_network(norm, 3, seed=0)
    for layer in network.leaves():
        if hasattr(layer, "eps"):
            layer.to(dtype=np.float64)
            for parameter in layer.parameters():
                parameter[...] = xp.asarray(rng.uniform(0.5, 2, parameter.shape))
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    x, labels = xp.asarray(rng.uniform(0, 1, (2, 1, 8, 8))), xp.asarray(rng.integers(0, 10, 2))
    scores, vjp_fn = network.vjp(x)
    _, *grads = vjp_fn(layers.softmax_cross_entropy(scores, labels)[1])
    values = network.parameters()
    directions = [xp.asarray(rng.standard_normal(value.shape)) for value in values]

    def loss(step):
        for value, direction in zip(values, directions, strict=True):
            value += step * direction
        result = layers.softmax_cross_entropy(network(x), labels)[0]
        for value, direction in zip(values, directions, strict=True):
            value -= step * direction
        return float(result)

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    expected = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu"])
def test_networks_of_small_batches(small_batches):
    """The last norm of each network sees as many positions as its name says."""
    x = np.zeros((2, 1, 8, 8), np.float32)
    for positions, stages in small_batches.NETWORKS.items():
        for norm, kind in (("batch norm", "BatchNorm2d"), ("group norm", "GroupNorm")):
            network = small_batches.make_network(norm, stages, seed=0)
            *body, pool, _ = network.layers
            assert isinstance(pool, layers.GlobalAveragePool)
            assert {(type(layer).__name__, layer.activation) for layer in body[1::2]} == {(kind, "relu")}
            assert " x ".join(map(str, layers.Sequential(*body)(x).shape[2:])) == positions


def test_small_batches(small_batches, monkeypatch, capsys, tmp_path):
    """The table is that of the accuracies, each of a network of its kind, batch size and seed."""
    asked, accuracy = [], small_batches.accuracy

    def noted(network, learned, held_out, size, epochs, seed):
        assert len(learned[0]) == 40
        assert len(held_out[0]) == 1797 - 40
        if not asked:  # one is trained
            assert 0.02 < accuracy(network, learned, held_out, size, epochs, seed) < 0.8
        asked.append((len(network.layers) // 2 - 1, type(network.layers[1]).__name__, size, epochs, seed))
        return len(asked) ** 2 / 600

    monkeypatch.setattr(small_batches, "accuracy", noted)
    run_main(small_batches, ["--epochs", "1", "--seeds", "3"], monkeypatch, tmp_path)
    kinds = [(stages, kind) for stages in (3, 4) for kind in ("BatchNorm2d", "GroupNorm")]
    assert asked == [(*kind, size, 1, seed) for kind in kinds for seed in range(3) for size in (2, 8)]
    out = capsys.readouterr().out
    assert "batches of 2          batches of 8\n" in out
    rows = re.findall(r"^  (\w+ norm), last norm on (\d x \d) +(.*\))$", out, re.MULTILINE)
    assert rows[0] == ("batch norm", "2 x 2", "1.5% (0.2 .. 4.2)     2.7% (0.7 .. 6.0)")
    assert rows[3] == ("group norm", "1 x 1", "73.5% (60.2 .. 88.2)  80.7% (66.7 .. 96.0)")
    assert [row[:2] for row in rows[1:3]] == [("group norm", "2 x 2"), ("batch norm", "1 x 1")]
    assert (tmp_path / "small_batches.png").stat().st_size < 100_000


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(
    ("batch_norm", "group_norm", "message"),
    [(0.4, 0.9, None), (0.8, 0.9, "expected batches of 2 to cost"), (0.3, 0.4, "expected batches of 2 to cost")],
)
def test_small_batches_tells_what_is_wrong(batch_norm, group_norm, message, small_batches, monkeypatch, tmp_path):
    """Batch norm that stands small batches of single positions is an error, and so is group norm that does not."""

    def accuracy(network, learned, held_out, size, epochs, seed):  # noqa: ARG001
        if size > 2:
            return 0.9
        collapses = len(network.layers) == 10 and isinstance(network.layers[1], BatchNorm2d)
        return batch_norm if collapses else group_norm

    monkeypatch.setattr(small_batches, "SIZES", (2, 8, 16))
    monkeypatch.setattr(small_batches, "accuracy", accuracy)
    if message is None:
        run_main(small_batches, ["--seeds", "1"], monkeypatch, tmp_path)
    else:
        with pytest.raises(SystemExit, match=message):
            run_main(small_batches, ["--seeds", "1"], monkeypatch, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# gradient_penalty


@pytest.fixture
def gradient_penalty(xp, monkeypatch):
    """The example with few points and small networks, on arrays of xp."""
    for package in layers.NEEDED:
        pytest.importorskip(package)
    module = importlib.import_module("gradient_penalty")
    monkeypatch.setattr(layers, "xp", xp)
    few = {"POINTS": 24, "HELD_OUT": 50, "HIDDEN": 4, "STRENGTHS": (0, 0.3), "SHOWN": (0, 0.3)}
    for name, value in few.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_gradients_of_the_gradient_penalty(gradient_penalty, xp, device, rng):
    """Gradients are the slopes of loss + strength * penalty along a random direction of all parameters, in float64.

    And dx, of which the penalty is made, is the slope of the loss along the points.
    """
    network = gradient_penalty.make_network(0, device)
    for layer in network.leaves():
        if hasattr(layer, "eps"):
            layer.to(dtype=np.float64)
            layer.weight[...], layer.bias[...] = xp.asarray(rng.uniform(0.5, 2, (2, layer.num_features)))
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    x, labels = (array.astype(np.float64) for array in gradient_penalty.moons(24, 0))
    values = [x, *network.parameters()]
    directions = [xp.asarray(rng.standard_normal(value.shape)) for value in values]

    def slope(strength, moved):
        """The slope of loss + strength * penalty, where the values move whose numbers are given."""
        found = []
        for step in (1e-6, -2e-6, 1e-6):
            for n in moved:
                values[n] += step * directions[n]
            loss, penalty, _ = gradient_penalty.penalized(network, x, labels, 0)
            found.append(float(loss + strength * penalty))
        return (found[0] - found[1]) / 2e-6

    scores, vjp_fn = network.vjp(x)
    loss, dscores = layers.softmax_cross_entropy(scores, labels)
    dx = vjp_fn(dscores)[0]
    assert slope(0, [0]) == pytest.approx(float((dx * directions[0]).sum()), rel=1e-6)
    for strength in (0, 30):
        *terms, grads = gradient_penalty.penalized(network, x, labels, strength)
        assert [float(n) for n in terms] == pytest.approx([float(loss), 12 * float((dx * dx).sum())], rel=1e-12)
        assert [grad.shape for grad in grads] == [value.shape for value in values[1:]]
        for n, grad in enumerate(grads, 1):
            expected = float((grad * directions[n]).sum())
            assert slope(strength, [n]) == pytest.approx(expected, rel=1e-5, abs=1e-8 * (1 + strength)), n


def test_gradient_penalty(gradient_penalty, xp, monkeypatch, capsys, tmp_path):
    """The table has a row for each strength; arrays are of the kind that is asked for, and those of NumPy by name."""
    for device in ["cpu"] if xp is np else ["cuda", "cpu"]:
        run_main(
            gradient_penalty, ["--epochs", "2", "--seeds", "2", "--device", device], monkeypatch, tmp_path / device
        )
        out = capsys.readouterr().out
        assert out.startswith(f"24 points to learn from, 50 held out, {'numpy' if device == 'cpu' else 'cupy'} arrays")
        rows = re.findall(r"^  (\S+) +([\d.]+) +([\d.]+) +([\d.]+) \(([\d.]+) \.\. ([\d.]+)\) +[\d.]+%$", out, re.M)
        assert [float(strength) for strength, *_ in rows] == [0, 0.3]
        assert all(float(least) <= float(median) <= float(most) for *_, median, least, most in rows)
        assert rows[0] != rows[1]
        assert (tmp_path / device / "gradient_penalty.png").stat().st_size < 100_000


@pytest.mark.parametrize("device", ["cpu"])
def test_the_gradient_penalty_makes_surfaces_flatter(gradient_penalty):
    """A network that trained with the penalty has a smaller one in the end, and its scores vary less over the plane."""
    penalties, slopes = [], []
    grid = np.stack(np.meshgrid(np.linspace(-1, 2, 31), np.linspace(-1, 1.5, 26)), axis=2).astype(np.float32)
    for strength in (0, 0.3):
        network, (_, penalty, held_out, accuracy) = gradient_penalty.train(strength, 0, 100, "cpu")
        penalties.append(penalty)
        x, labels = gradient_penalty.moons(50, 1000)
        assert held_out == pytest.approx(float(layers.softmax_cross_entropy(network.eval()(x), labels)[0]), rel=1e-6)
        scores = network(grid.reshape(-1, 2)).reshape(26, 31, 2)
        slopes.append(abs(np.diff(scores[..., 1] - scores[..., 0])).mean())
        assert accuracy > 0.75
    assert penalties[1] < penalties[0] / 2
    assert slopes[1] < slopes[0] / 2


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(("loss", "message"), [(0.7, None), (0.9, "expected the penalty to lower the loss")])
def test_gradient_penalty_tells_what_is_wrong(loss, message, gradient_penalty, monkeypatch, tmp_path):
    """A penalty that makes no difference ends the example with an error, behind the picture."""

    def train(strength, seed, epochs, device):  # noqa: ARG001
        network = gradient_penalty.make_network(seed, device).eval()
        return network, [0.1, 0.1, loss if strength else 1.0, 0.9]

    monkeypatch.setattr(gradient_penalty, "train", train)
    if message is None:
        run_main(gradient_penalty, [], monkeypatch, tmp_path)
    else:
        with pytest.raises(SystemExit, match=message):
            run_main(gradient_penalty, [], monkeypatch, tmp_path)
    assert (tmp_path / "gradient_penalty.png").exists()
