"""The recipes of the documentation: what they print, on NumPy and CuPy arrays, and what they say of other libraries."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm2d
from tests.reference import to_numpy
from tests.test_syncbatchnorm import finish, start

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "recipes.md"
PAGES = {page.stem: page for page in sorted((ROOT / "docs" / "recipes").glob("*.md"))}
TEXTS = {name: page.read_text() for name, page in PAGES.items()}
SCREEN = 60
"""Most lines of a recipe."""
EITHER = "import numpy as xp  # or: import cupy as xp"
"""Line of the recipes that are about arrays of either kind."""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(name, text):
    """What the examples of a text have defined in the end; it is an error if they print something else."""
    example = doctest.DocTestParser().get_doctest(text, {}, name, str(PAGES[name]), 0)
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
    assert attempted > 0
    assert not failed, "".join(report)
    return example.globs


def rows(name):
    """The cells of the tables of a recipe, a list for each row."""
    lines = re.findall(r"^\| (.*) \|$", TEXTS[name], re.MULTILINE)
    return [line.split(" | ") for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# All recipes


def test_the_index_has_every_recipe():
    text = INDEX.read_text()
    (tree,) = blocks(text, r"\{toctree\}")
    entries = re.findall(r"^recipes/(.*)$", tree, re.MULTILINE)
    assert sorted(entries) == sorted(PAGES)
    assert re.findall(r"^\| .* \| \[.*\]\(recipes/(.*)\.md\) \|$", text, re.MULTILINE) == entries


@pytest.mark.parametrize("name", PAGES)
def test_a_recipe_is_a_screen(name):
    lines = TEXTS[name].splitlines()
    assert len(lines) <= SCREEN
    assert lines[0].startswith("# ")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[name]):
        assert (PAGES[name].parent / link).is_file(), link


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if ">>> " in text])
def test_a_recipe_prints_what_it_says(name):
    if "mpi4py" in TEXTS[name]:
        try:
            from mpi4py import MPI  # noqa: F401
        except (ImportError, RuntimeError) as error:  # RuntimeError where mpi4py finds no MPI
            pytest.skip(f"pip install '.[mpi]': {error}")
    run(name, TEXTS[name])


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if EITHER in text])
def test_a_recipe_prints_the_same_of_cupy_arrays(name):
    text = TEXTS[name].replace(EITHER, "import cupy as xp").replace('device="cpu"', 'device="cuda"')
    found = run(name, text)
    assert found["xp"].__name__ == "cupy"


def test_no_code_goes_unnoticed():
    """Code that no doctest runs is that which tests below run, or that of other libraries, in blocks of text."""
    plain = {name for name, text in TEXTS.items() if any(">>> " not in block for block in blocks(text, "python"))}
    assert plain == {
        "cupy-cudnn-drop-in",
        "from-pytorch",
        "pytorch-checkpoints",
        "pytorch-jax",
        "streaming-statistics",
    }
    assert {name for name, text in TEXTS.items() if blocks(text, "text")} == {
        "from-keras-and-flax",
        "from-onnx",
        "several-processes",
    }
    for text in TEXTS.values():
        assert set(re.findall(r"^```(\S+)$", text, re.MULTILINE)) <= {"python", "text"}


# ---------------------------------------------------------------------------------------------------------------------
# From cupy.cudnn

SIGNATURES = {
    "batch_normalization_forward_training": "x, gamma, beta, running_mean, running_var, mean, inv_std, eps, decay, "
    "is_for_conv2d, cudnn_mode, debug, d_layout",
    "batch_normalization_forward_inference": "x, gamma, beta, mean, var, eps, is_for_conv2d, cudnn_mode, d_layout",
    "batch_normalization_backward": "x, gamma, gy, mean, inv_std, eps, is_for_conv2d, cudnn_mode, debug, d_layout, "
    "reserve_space",
}
"""Parameters in `cupyx/cudnn.pyx` of CuPy 13.6."""


@pytest.fixture
def drop_in():
    (code,) = blocks(TEXTS["cupy-cudnn-drop-in"], "python")
    module = ModuleType("cudnn_batch_norm")
    exec(code, vars(module))
    return module


def test_the_drop_in_has_the_parameters_of_cupy_13(drop_in):
    for name, parameters in SIGNATURES.items():
        signature = inspect.signature(getattr(drop_in, name))
        assert ", ".join(signature.parameters) == parameters
        assert signature.parameters["d_layout"].default == drop_in.CUDNN_TENSOR_NCHW
    modes = "PER_ACTIVATION", "SPATIAL", "SPATIAL_PERSISTENT"
    assert [getattr(drop_in, f"CUDNN_BATCHNORM_{mode}") for mode in modes] == [0, 1, 2]


class Case(NamedTuple):
    """A way in which `cupyx.cudnn` could be called."""

    shape: tuple[int, ...]  # x
    vectors: tuple[int, ...]  # gamma and the others
    axes: tuple[int, ...]  # axes that share statistics
    settings: tuple[bool, int]  # is_for_conv2d, cudnn_mode
    layout: int = 0  # d_layout


CASES = {
    "spatial": Case((4, 3, 5, 2), (1, 3, 1, 1), (0, 2, 3), (True, 1)),
    "persistent": Case((4, 3, 5, 2), (3,), (0, 2, 3), (True, 2)),
    "NHWC": Case((4, 5, 2, 3), (3,), (0, 1, 2), (True, 1), 1),
    "per activation": Case((4, 3, 2, 2), (3, 2, 2), (0,), (True, 0)),
    "five axes": Case((4, 3, 2, 2, 2), (3,), (0, 2, 3, 4), (True, 1)),
    "five axes, NHWC": Case((4, 3, 2, 2, 2), (3,), (0, 2, 3, 4), (True, 1), 1),  # the layout is that of four axes alone
    "linear": Case((6, 3), (3,), (0,), (False, 0)),
    "linear, three axes": Case((4, 5, 3), (3,), (0, 1), (False, 0)),
}
DECAY, EPS = 0.75, 0.5
CLOSE = {"rtol": 3e-6, "atol": 3e-5}
"""Tolerance for float32, of values that are sums of terms up to 10: that of the contract is 3e-6 of the largest one."""


def cudnn_reference(x, gy, gamma, beta, axes):
    """What cuDNN computes, in float64: y, mean, inv_std, the unbiased variance, gx, ggamma, gbeta."""
    x, gy, gamma, beta = (array.astype(np.float64) for array in (x, gy, gamma, beta))
    others = [1 if axis in axes else length for axis, length in enumerate(x.shape)]
    gamma, beta = gamma.reshape(others), beta.reshape(others)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    inv_std = 1 / np.sqrt(var + EPS)
    xhat = (x - mean) * inv_std
    ggamma, gbeta = (gy * xhat).sum(axes, keepdims=True), gy.sum(axes, keepdims=True)
    count = x.size // mean.size
    gx = gamma * inv_std * (gy - gbeta / count - xhat * ggamma / count)
    return gamma * xhat + beta, mean, inv_std, var * count / (count - 1), gx, ggamma, gbeta


@pytest.mark.parametrize("name", CASES)
def test_the_drop_in_is_batch_norm_by_cudnn(drop_in, name, xp, rng):
    case = CASES[name]
    x, gy = rng.normal(2, 3, (2, *case.shape)).astype(np.float32)
    gamma, beta, running_mean, running_var = rng.uniform(0.5, 1.5, (4, *case.vectors)).astype(np.float32)
    y, mean, inv_std, var, gx, ggamma, gbeta = cudnn_reference(x, gy, gamma, beta, case.axes)
    moved_mean = DECAY * running_mean + (1 - DECAY) * mean.reshape(case.vectors)
    moved_var = DECAY * running_var + (1 - DECAY) * var.reshape(case.vectors)
    normalized = (x - moved_mean.reshape(mean.shape)) / np.sqrt(moved_var.reshape(mean.shape) + EPS)
    inferred = normalized * gamma.reshape(mean.shape) + beta.reshape(mean.shape)

    def check(ours, expected, shape=case.vectors):
        assert ours.shape == shape
        np.testing.assert_allclose(to_numpy(ours), expected.reshape(shape), **CLOSE)

    arrays = [xp.asarray(array) for array in (x, gamma, beta, running_mean, running_var)]
    settings = EPS, DECAY, *case.settings, False, case.layout
    ours, saved_mean, saved_inv_std = drop_in.batch_normalization_forward_training(*arrays, None, None, *settings)
    check(ours, y, case.shape)
    check(saved_mean, mean)
    check(saved_inv_std, inv_std)
    check(arrays[3], moved_mean)
    check(arrays[4], moved_var)
    ours = drop_in.batch_normalization_forward_inference(*arrays, EPS, *case.settings, case.layout)
    check(ours, inferred, case.shape)
    x, gamma, gy = arrays[0], arrays[1], xp.asarray(gy)
    given = x, gamma, gy, saved_mean, saved_inv_std, EPS, *case.settings, False, case.layout
    grads = drop_in.batch_normalization_backward(*given, reserve_space=None)
    for ours, expected, shape in zip(grads, (gx, ggamma, gbeta), (case.shape, case.vectors, case.vectors), strict=True):
        check(ours, expected, shape)


def test_the_drop_in_writes_statistics_where_it_is_told(drop_in, xp, rng):
    x = xp.asarray(rng.normal(2, 3, (4, 3, 5, 2)).astype(np.float32))
    vectors = [xp.ones((1, 3, 1, 1), np.float32) for _ in range(4)]
    settings = 1e-5, 0.9, True, 1, False
    y, *expected = drop_in.batch_normalization_forward_training(x, *vectors, None, None, *settings)
    given = [xp.zeros((1, 3, 1, 1), np.float32) for _ in range(2)]
    again = drop_in.batch_normalization_forward_training(x, *vectors, *given, *settings)
    assert to_numpy(again).tobytes() == to_numpy(y).tobytes()
    for ours, theirs in zip(given, expected, strict=True):
        assert to_numpy(ours).tobytes() == to_numpy(theirs).astype(np.float32).tobytes()


def test_what_the_drop_in_does_otherwise(drop_in, xp, rng):
    """Dtypes of statistics and gradients, and the memory order, are those that the recipe says."""
    x = xp.asarray(rng.normal(2, 3, (4, 5, 2, 3)).astype(np.float16)).transpose(0, 3, 1, 2)
    vectors = [xp.ones(3, np.float32) for _ in range(4)]
    settings = True, drop_in.CUDNN_BATCHNORM_SPATIAL, False
    y, mean, inv_std = drop_in.batch_normalization_forward_training(x, *vectors, None, None, 1e-5, 0.9, *settings)
    gx, *grads = drop_in.batch_normalization_backward(x, vectors[0], y, mean, inv_std, 1e-5, *settings)
    assert y.strides == gx.strides == x.strides
    assert [array.dtype.name for array in (y, gx, mean, inv_std)] == ["float16"] * 2 + ["float64"] * 2
    assert [grad.dtype.name for grad in grads] == ["float32"] * 2


def calls(name, function):
    """Calls of a function in the tables of a recipe."""
    return re.findall(rf"`(F\.{function}\(.*?\))`", "".join(map(str, rows(name))))


def test_calls_in_the_table_are_those_of_cudnn(rng):
    x, gy = rng.normal(2, 3, (2, 4, 3, 5, 2)).astype(np.float32)
    gamma, beta, running_mean, running_var = rng.uniform(0.5, 1.5, (4, 3)).astype(np.float32)
    known = {"F": cupybn.functional, "decay": DECAY, "eps": EPS}
    known |= {"x": x, "gy": gy, "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    y, mean, inv_std, var, *expected = cudnn_reference(x, gy, gamma, beta, (0, 2, 3))
    moved = [DECAY * old + (1 - DECAY) * new.ravel() for old, new in ((running_mean, mean), (running_var, var))]

    (forward,) = calls("from-cupy-cudnn", "batch_norm_vjp")
    ours, vjp_fn = eval(forward, known)
    np.testing.assert_allclose(ours, y, **CLOSE)
    np.testing.assert_allclose([running_mean, running_var], moved, **CLOSE)
    known |= {"vjp_fn": vjp_fn, "mean": vjp_fn.mean, "var": vjp_fn.var}
    (code,) = re.findall(r"`(\(vjp_fn\.var .*?)`", TEXTS["from-cupy-cudnn"])
    np.testing.assert_allclose(eval(code, known), inv_std.ravel(), **CLOSE)
    (inference,) = calls("from-cupy-cudnn", "batch_norm")
    np.testing.assert_allclose(eval(inference, known), y, **CLOSE)
    (backward,) = calls("from-cupy-cudnn", "batch_norm_backward")
    for grads in eval(backward, known), eval("vjp_fn(gy)", known):
        for grad, theirs in zip(grads, expected, strict=False):
            np.testing.assert_allclose(grad, theirs.reshape(grad.shape), **CLOSE)


def test_calls_in_the_table_are_those_of_chainer(rng):
    x = (rng.normal(2, 3, (4, 3, 5)) / 500).astype(np.float32)  # small numbers, so that eps matters
    gamma, beta, m, v = rng.uniform(0.5, 1.5, (4, 3)).astype(np.float32)
    v *= 1e-5
    statistics = [(x.mean((0, 2), np.float64), x.astype(np.float64).var((0, 2))), (m.copy(), v.copy())]
    found = calls("from-chainer", "batch_norm")
    for call, (mean, var) in zip(found[::-1], statistics[::-1], strict=True):  # in training last, when m and v move
        expected = (x - mean[:, None]) / np.sqrt(var[:, None] + FRAMEWORKS["chainer"].eps) * gamma[:, None]
        ours = eval(call, {"F": cupybn.functional, "x": x, "m": m, "v": v, "gamma": gamma, "beta": beta})
        np.testing.assert_allclose(ours, expected + beta[:, None], rtol=1e-5, atol=1e-5 * abs(expected).max())


# ---------------------------------------------------------------------------------------------------------------------
# cuDNN Frontend


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the wheel comes without results")
def test_what_is_said_of_cudnn_frontend_is_in_the_results():
    results = (ROOT / "benchmarks" / "results" / "h200" / "masks.md").read_text()
    assert "cuDNN Frontend: 1.32.0, with cuDNN 9.19.0" in results
    assert "frontend 1.32 with cuDNN 9.19" in TEXTS["cudnn-frontend"]
    found = re.findall(r"^\| (NCHW|NHWC|NC) (\S+) .*?\| (\w+)[^|]*\|(?:[^|]*\|){4} ([\d.]+|refused) \|", results, re.M)
    assert len(found) > 40
    refused = {(shape.rpartition("x")[2], what) for _, shape, what, ratio in found if ratio == "refused"}
    assert refused == {("35", "training"), ("35", "backward")}
    assert "cuDNN refuses batchnorm_inference" in results
    ratios = {}  # cuDNN's time divided by ours
    for order, _, what, ratio in found:
        if ratio != "refused":
            where = "inference" if what == "inference" else order
            ratios.setdefault(where, []).append(float(ratio))
    assert min(ratios["NCHW"]) > 1
    assert min(ratios["NHWC"]) < 1 < max(ratios["NHWC"])
    assert min(ratios["inference"]) < 1 < max(ratios["inference"])


# ---------------------------------------------------------------------------------------------------------------------
# From other frameworks


class Framework(NamedTuple):
    """A framework's batch norm, as its code has it."""

    recipe: str
    names: tuple[str, str, str, str]  # weight, bias, running mean and running variance
    defaults: tuple[str, ...]  # what the recipe is to say
    kept: float  # weight of the old running statistics
    eps: float
    axis: int
    ddof: int  # running variance: 0 is biased


FRAMEWORKS = {
    "chainer": Framework(
        "from-chainer", ("gamma", "beta", "avg_mean", "avg_var"), ("decay=0.9", "eps=2e-5"), 0.9, 2e-5, 1, 1
    ),
    "keras": Framework(
        "from-keras-and-flax",
        ("gamma", "beta", "moving_mean", "moving_variance"),
        ("momentum=0.99", "epsilon=0.001", "axis=-1"),
        0.99,
        1e-3,
        -1,
        0,
    ),
    "flax": Framework(
        "from-keras-and-flax",
        ("scale", "bias", "mean", "var"),
        ("momentum=0.99", "epsilon=1e-05", "axis=-1"),
        0.99,
        1e-5,
        -1,
        0,
    ),
    "onnx": Framework(
        "from-onnx", ("scale", "B", "input_mean", "input_var"), ("momentum=0.9", "epsilon=1e-05"), 0.9, 1e-5, 1, 0
    ),
}


@pytest.mark.parametrize("names", FRAMEWORKS)
def test_layers_of_other_frameworks(names, rng):
    """A layer with the settings of the recipe goes on where that of the framework was."""
    framework = FRAMEWORKS[names]
    x = rng.normal(2, 3, (4, 3, 3, 3)).astype(np.float32)
    values = rng.uniform(0.5, 1.5, (4, 3)).astype(np.float32)
    layer = BatchNorm2d(
        3, eps=framework.eps, momentum=1 - framework.kept, channel_axis=framework.axis, device="cpu"
    ).eval()
    layer.load_state_dict(dict(zip(framework.names, values, strict=True)), names=names)
    axes = tuple(axis for axis in range(4) if axis != framework.axis % 4)
    vector = [3 if axis == framework.axis % 4 else 1 for axis in range(4)]
    weight, bias, running_mean, running_var = (value.astype(np.float64).reshape(vector) for value in values)
    expected = (x - running_mean) / np.sqrt(running_var + framework.eps) * weight + bias
    np.testing.assert_allclose(layer(x), expected, **CLOSE)

    layer.train()
    if framework.ddof == 1:
        y = layer(x)
    else:
        y, _ = run("from-keras-and-flax", TEXTS["from-keras-and-flax"])["step"](layer, x)
    mean, var = x.mean(axes, dtype=np.float64, keepdims=True), x.astype(np.float64).var(axes, keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + framework.eps) * weight + bias, **CLOSE)
    var = x.astype(np.float64).var(axes, ddof=framework.ddof, keepdims=True)
    for ours, old, new in (layer.running_mean, running_mean, mean), (layer.running_var, running_var, var):
        moved = framework.kept * old + (1 - framework.kept) * new
        np.testing.assert_allclose(ours, moved.ravel(), rtol=1e-6)


@pytest.mark.parametrize("names", FRAMEWORKS)
def test_tables_of_names_and_defaults(names):
    framework, cells = FRAMEWORKS[names], "".join(map(str, rows(FRAMEWORKS[names].recipe)))
    text = TEXTS[framework.recipe]
    for name in framework.names:
        assert f"`{name}`" in cells or f'"{name}"' in text
    for default in framework.defaults:
        assert f"`{default}`" in cells
    assert f"{1 - framework.kept:.2g}" in "".join(re.findall(r"`momentum=\S+`|give [\d.]+", cells))
    assert f'names="{names}"' in text


@pytest.mark.parametrize(("names", "column"), [("keras", 1), ("flax", 2)])
def test_each_name_stands_beside_ours(names, column):
    for ours, theirs in zip(("weight", "bias", "running_mean", "running_var"), FRAMEWORKS[names].names, strict=True):
        (row,) = [row for row in rows("from-keras-and-flax") if row[-1].partition(",")[0] == f"`{ours}`"]
        assert row[column].partition(",")[0] == f"`{theirs}`"


def test_axes_of_chainer_and_cudnn(drop_in):
    """The axis of channels is the one that Chainer's leave out, and that of the layout of cuDNN."""
    (row,) = [row for row in rows("from-chainer") if row[0].startswith("`axis=(0, ")]
    axes, ours = (re.findall(r"axis=(\(.*?\)|-?\d)`", cell) for cell in row)
    for theirs, axis in zip(axes, ours, strict=True):
        assert sorted([*ast.literal_eval(theirs), int(axis) % 4]) == [0, 1, 2, 3]
    (row,) = [row for row in rows("from-cupy-cudnn") if "CUDNN_TENSOR_NHWC" in row[1]]
    axes = [int(axis) for axis in re.findall(r"`channel_axis=(-?\d)`", row[1])]
    spatial = drop_in.CUDNN_BATCHNORM_SPATIAL
    assert axes == [drop_in.with_channels(np.ones((1, 1, 1, 1)), True, spatial, layout)[1] for layout in (0, 1)]


def test_lines_that_save_arrays_of_keras_and_flax(monkeypatch, tmp_path):
    """The keys are those that the recipe loads. What Keras and Flax hand out is made up."""

    class Weight:
        def __init__(self, path):
            self.path = path

        def __array__(self, dtype=None, copy=None):
            return np.full(3, 2.0)

    def weights(names):
        return {name: np.full(3, 2.0) for name in FRAMEWORKS[names].names}

    (text,) = blocks(TEXTS["from-keras-and-flax"], "text")
    monkeypatch.chdir(tmp_path)
    keras = SimpleNamespace(weights=[Weight(f"bn1/{name}") for name in weights("keras")])
    nnx = SimpleNamespace(state=lambda layer: layer, to_pure_dict=dict)
    flax = list(weights("flax").items())
    linen = {"params": {"bn1": dict(flax[:2])}, "batch_stats": {"bn1": dict(flax[2:])}}
    models = [{"model": keras}, {"model": SimpleNamespace(bn1=dict(flax)), "nnx": nnx}, {"variables": linen}]
    for line, known in zip(text.splitlines(), models, strict=True):
        exec(line, {"np": np, **known})
    for file, names in ("keras.npz", "keras"), ("nnx.npz", "flax"), ("linen.npz", "flax"):
        layer = BatchNorm2d(3, device="cpu")
        cupybn.load_checkpoint(file, {"bn1/": layer}, names=names)
        assert all((array == 2).all() for key, array in layer.state_dict().items() if key != "num_batches_tracked")


def test_lines_that_save_arrays_of_onnx(monkeypatch, tmp_path):
    """A graph with the fields of ONNX's is enough."""
    (text,) = blocks(TEXTS["from-onnx"], "text")
    monkeypatch.chdir(tmp_path)
    arrays = [SimpleNamespace(name=f"array{number}", value=np.full(3, number, np.float32)) for number in range(4)]
    other = SimpleNamespace(op_type="Relu", input=["z"], output=["y"])
    norm = SimpleNamespace(op_type="BatchNormalization", input=["x", "array3", "array1", "array0", "array2"])
    norm.output = ["/bn1/y"]
    graph = SimpleNamespace(initializer=arrays, node=[norm, other])
    helper = SimpleNamespace(to_array=lambda array: array.value)
    onnx = SimpleNamespace(load=lambda path: SimpleNamespace(graph=graph), numpy_helper=helper)  # noqa: ARG005
    exec(text, {"np": np, "onnx": onnx})
    layer = BatchNorm2d(3, device="cpu")
    cupybn.load_checkpoint("norms.npz", {"/bn1/y/": layer}, names="onnx")
    assert [float(array[0]) for array in (layer.weight, layer.bias, layer.running_mean, layer.running_var)] == [
        3,
        1,
        0,
        2,
    ]


def test_one_value_for_a_channel_is_an_error():
    """All frameworks of the recipes take it; the tables say that we do not."""
    layer = BatchNorm2d(3, device="cpu")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(np.ones((1, 3, 1, 1), np.float32))
    for recipe in "from-chainer", "from-keras-and-flax":
        (row,) = [cells for cells in rows(recipe) if cells[0].startswith("one value for a channel")]
        assert "ValueError" in row[-1]


def test_chainers_mean_over_batches():
    """Chainer's fine-tuning keeps 1 - 1/N of the old statistics, which is what `momentum=None` does."""
    batches = np.array([[1, 3, 5], [10, 14, 30]], np.float32)[..., None]
    layer = cupybn.BatchNorm1d(1, momentum=None, device="cpu")
    mean, var = 0.0, 1.0
    for number, batch in enumerate(batches, 1):
        layer(batch)
        mean += (batch.mean() - mean) / number
        var += (batch.var(ddof=1) - var) / number
    np.testing.assert_allclose([layer.running_mean[0], layer.running_var[0]], [mean, var], rtol=1e-6)


def test_tensors_become_arrays():
    torch = pytest.importorskip("torch")
    (tensors,) = (block for block in blocks(TEXTS["from-pytorch"], "python") if ">>> " not in block)
    found = {}
    exec(tensors, found)
    x, y, tensor = found["x"], found["y"], found["tensor"]
    assert (np.from_dlpack(x.detach()).ctypes.data, tensor.data_ptr()) == (x.data_ptr(), y.ctypes.data)
    assert torch.equal(tensor, torch.nn.BatchNorm2d(8)(x))  # x is constant: all of it is 0 in both
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(x)  # as it is part of a graph of autograd
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(torch.ones(2, dtype=torch.bfloat16))


def test_what_pytorch_does_otherwise():
    """The rows of the table, of PyTorch and of this library; what the page prints is not repeated."""
    torch = pytest.importorskip("torch")
    nn, T = torch.nn, torch.nn.functional
    dropped = T.dropout(torch.tensor([np.nan, -1.0]), 1.0)
    assert dropped[0].isnan()
    assert bool(torch.signbit(dropped[1]))
    assert not np.signbit(cupybn.functional.dropout(np.array([np.nan, -1.0]), 1.0)).any()
    with pytest.warns(UserWarning, match="dropout2d"):
        T.dropout2d(torch.ones(2, 3, 4))

    x = np.arange(96, dtype=np.float32).reshape(2, 4, 4, 3).transpose(0, 3, 1, 2)
    theirs = nn.InstanceNorm2d(3, track_running_stats=True).eval()
    theirs.track_running_stats = False
    y = theirs(torch.from_numpy(x))
    assert theirs.running_mean.any()
    assert y.is_contiguous()
    assert not y.is_contiguous(memory_format=torch.channels_last)
    theirs = nn.InstanceNorm2d(3, momentum=None, track_running_stats=True)
    theirs(torch.from_numpy(x))
    assert not theirs.running_mean.any()
    theirs, ours = nn.InstanceNorm2d(3).eval(), cupybn.InstanceNorm2d(3, device="cpu").eval()
    theirs.track_running_stats = ours.track_running_stats = True
    with pytest.raises(RuntimeError):
        theirs(torch.from_numpy(x))
    assert abs(ours(x).mean((2, 3))).max() < 1e-6

    with pytest.raises(ValueError, match="more than 1 value"):
        T.group_norm(torch.ones(1, 4), 4)
    assert not T.group_norm(torch.ones(2, 4), 4).any()
    assert T.layer_norm(torch.ones(1, 4), (4,), eps=-1.0).isnan().all()
    with pytest.raises(RuntimeError):
        T.layer_norm(torch.ones(1, 4), (3,))
    weight = torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        T.layer_norm(torch.ones(1, 4), (4,), weight)
    assert cupybn.functional.layer_norm(np.ones((1, 4), np.float32), 4, weight.numpy()).dtype == np.float32
    with pytest.raises(IndexError):
        T.instance_norm(torch.ones(0, 3, 4), weight=torch.ones(3))


def test_the_norms_have_the_names_of_pytorch():
    named = re.findall(r"^\| \w+ \|.*\| `(\w+)\(", TEXTS["norms"], re.MULTILINE)
    assert named == ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm"]
    torch = pytest.importorskip("torch")
    for name in named:
        theirs, ours = (inspect.signature(getattr(owner, name)).parameters for owner in (torch.nn, cupybn))
        assert list(ours)[: len(theirs)] == list(theirs)


def test_a_checkpoint_of_pytorch(monkeypatch, tmp_path, rng):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    load, put_back, fold = blocks(TEXTS["pytorch-checkpoints"], "python")
    found = {}
    exec(load, found)
    model, norms = found["model"], found["norms"]
    assert found["channels"] == {"1.": 8, "5.": 4}
    assert "BatchNorm2d(number)" in TEXTS["pytorch-checkpoints"]
    for prefix, norm in norms.items():
        theirs = model[int(prefix[0])]
        assert (type(norm).__name__, norm.eps, norm.training) == (type(theirs).__name__, theirs.eps, False)
        for array in norm.state_dict().values():
            array[...] = rng.integers(1, 9, array.shape)  # trained
    before = model.state_dict()
    exec(put_back, found)
    trained = torch.load("trained.pt", weights_only=True)
    assert trained["epoch"] == 3
    assert list(trained["state_dict"]) == list(before)
    assert torch.equal(trained["state_dict"]["4.weight"], before["4.weight"])
    assert trained["state_dict"]["5.running_mean"].numpy().tobytes() == norms["5."].running_mean.tobytes()
    x = torch.from_numpy(rng.normal(size=(2, 3, 5, 5)).astype(np.float32))
    y = model.eval()(x)
    exec(fold, found)
    assert isinstance(model[1], torch.nn.Identity)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_norms_of_safetensors_are_put_back(monkeypatch, tmp_path):
    """The line of the recipe, with the functions for NumPy arrays."""
    numpy_files = pytest.importorskip("safetensors.numpy")
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"`(save_file\(.*\))`", TEXTS["pytorch-checkpoints"])
    norm = BatchNorm2d(2, device="cpu")
    whole = {"conv.weight": np.ones((2, 3, 1, 1), np.float32), **norm.state_dict("bn.")}
    numpy_files.save_file(whole, "model.safetensors")
    norm.bias += 1
    cupybn.save_checkpoint("norms.safetensors", {"bn.": norm})
    exec(line, vars(numpy_files).copy())
    trained = numpy_files.load_file("trained.safetensors")
    assert trained.keys() == whole.keys()
    assert trained["bn.bias"].tolist() == [1, 1]
    assert trained["conv.weight"].tolist() == whole["conv.weight"].tolist()


def test_a_model_of_pytorch_that_is_converted():
    """Loss, gradient and the gradients of the parameters are those of PyTorch's own layers."""
    torch = pytest.importorskip("torch")
    code, _ = blocks(TEXTS["pytorch-jax"], "python")
    found = {}
    exec(code, found)
    model, x = found["model"], found["x"]
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    assert type(model[1]) is cupybn.torch.BatchNorm2d
    plain.load_state_dict(model.state_dict())
    plain[1].reset_running_stats()
    loss = plain(x).square().mean()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(found["loss"], loss)
    torch.testing.assert_close(found["dx"], dx, rtol=1e-4, atol=1e-7)
    ours = [parameter.grad for parameter in model.parameters()]
    (loss + dx.square().sum()).backward()
    for grad, parameter in zip(ours, plain.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)
    for buffer, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs)


def test_batch_norm_as_callbacks_of_jax(rng):
    """Output and gradients have the same bits as without JAX, compiled or not, also where the mean is large."""
    jax = pytest.importorskip("jax")
    _, code = blocks(TEXTS["pytorch-jax"], "python")
    found = {}
    exec(code, found)
    x, dy = (rng.normal(mean, 1, (4, 3, 5, 5)).astype(np.float32) for mean in (1e5, 0))
    affine = [np.array(values, np.float32) for values in ([1, 2, 0.5], [0, -1, 1])]
    y, vjp_fn = cupybn.functional.batch_norm_vjp(x, None, None, *affine, training=True)
    for batch_norm in found["batch_norm"], jax.jit(found["batch_norm"]):
        theirs, vjp_of_jax = jax.vjp(batch_norm, x, *affine)
        assert np.asarray(theirs).tobytes() == y.tobytes()
        for grad, expected in zip(vjp_of_jax(dy), vjp_fn(dy)[:3], strict=True):
            assert np.asarray(grad).tobytes() == expected.tobytes()
    half = jax.numpy.asarray(x, jax.numpy.bfloat16)
    assert found["batch_norm"](half, *affine).dtype == half.dtype
    slopes = jax.grad(lambda weight: found["batch_norm"](x, weight, affine[1]).sum())
    with pytest.raises(ValueError, match="JVP"):  # there is no second order
        jax.grad(lambda weight: slopes(weight).sum())(affine[0])


def test_what_jax_copies():
    """NumPy reads what JAX has made, and JAX reads what NumPy has made if it begins at a multiple of 64 bytes."""
    jax = pytest.importorskip("jax")
    array = jax.numpy.arange(48.0).reshape(4, 12)
    x = np.from_dlpack(array)
    assert x.ctypes.data == array.unsafe_buffer_pointer()
    assert not x.flags.writeable
    assert cupybn.BatchNorm1d(12, device="cpu")(x).shape == (4, 12)
    memory = np.zeros(1024, np.uint8)
    begin = -memory.ctypes.data % 64
    for offset in 0, 4, 16, 32:
        y = memory[begin + offset :][:256].view(np.float32)
        shared = jax.numpy.from_dlpack(y).unsafe_buffer_pointer() == y.ctypes.data
        assert shared == (offset == 0)


# ---------------------------------------------------------------------------------------------------------------------
# What people do around a layer


def eval_mode(layer):
    layer.eval()


def no_tracking(layer):
    layer.track_running_stats = False


WAYS = {"layer.train()": BatchNorm2d.train, "layer.eval()": eval_mode, "layer.track_running_stats = False": no_tracking}


@pytest.mark.parametrize("row", rows("frozen")[1:], ids=lambda row: row[0])
def test_ways_to_freeze(row, rng):
    way, normalizes, moves, gradient = row
    layer = BatchNorm2d(3, device="cpu")
    layer.running_var[...] = 4
    x, dy = rng.normal(2, 3, (2, 4, 3, 2, 2)).astype(np.float32)
    if "no_stats_update" in way:
        with cupybn.no_stats_update():
            y, vjp_fn = layer.vjp(x)
    else:
        WAYS[re.match("`(.*?)`", way)[1]](layer)
        y, vjp_fn = layer.vjp(x)
    of_batch = abs(y.mean()) < 1e-6
    assert normalizes == ("the batch" if of_batch else "the running statistics")
    assert moves.startswith("move" if layer.running_mean.any() else "stay")
    simple = np.allclose(vjp_fn(dy).input, dy / np.sqrt(4 + layer.eps), rtol=1e-6)
    assert gradient.startswith("`weight / sqrt" if simple else "that of training")


def test_replays_are_steps():
    """Three replays of the graph leave the layer as three steps without it."""
    found = run("cuda-graphs", TEXTS["cuda-graphs"])
    layer, x, dy = found["layer"], found["x"], found["dy"]
    eager = BatchNorm2d(3, device="cuda")
    for batch in range(3):
        x[...] = batch
        y, vjp_fn = eager.vjp(x)
        dx, *grads, _ = vjp_fn(dy)
        for parameter, grad in zip(eager.parameters(), grads, strict=True):
            parameter -= 0.1 * grad
    for ours, theirs in zip(layer.state_dict().values(), eager.state_dict().values(), strict=True):
        assert to_numpy(ours).tobytes() == to_numpy(theirs).tobytes()
    assert to_numpy(found["y"]).tobytes() == to_numpy(y).tobytes()
    assert to_numpy(found["dx"]).tobytes() == to_numpy(dx).tobytes()


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_moments_by_dask(frames, monkeypatch, rng):
    """The sum has the moments of all blocks, however many there are, also where the channels were apart."""
    array = pytest.importorskip("dask.array")
    stack = rng.integers(0, 4096, (frames, 2, 4, 4)).astype(np.uint16)
    monkeypatch.setattr(array, "from_zarr", lambda _: array.from_array(stack, chunks=(1, 1, 4, 2)))
    (code,) = (block for block in blocks(TEXTS["streaming-statistics"], "python") if ">>> " not in block)
    found = {}
    exec(code, found)
    total = found["total"]
    assert int(total.count) == frames * 16
    np.testing.assert_allclose(total.mean, stack.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(total.var(), stack.var((0, 2, 3)), rtol=1e-6)


RANK = """
import doctest, sys
from mpi4py import MPI
import numpy as np
text = open(sys.argv[1]).read()
example = doctest.DocTestParser().get_doctest(text, {}, sys.argv[1], None, 0)
assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
comm, layer = MPI.COMM_WORLD, example.globs["layer"]
states = comm.allgather([array.tobytes() for array in layer.state_dict().values()])
assert states[0] == states[1], "other weights or statistics on the other rank"
layer.bias[...] = comm.rank
for array in layer.state_dict().values(): comm.Bcast(array)
assert not layer.bias.any()
done = comm.gather((comm.rank, float(example.globs["x"][0, 0, 0, 0])))
if comm.rank == 0:
    print("ranks that are equal:", *sorted({rank for rank, _ in done}), "data that differ:", len({x for _, x in done}))
"""


def test_the_recipe_for_several_processes_on_two(tmp_path):
    broadcast = "for array in layer.state_dict().values(): comm.Bcast(array)"
    assert broadcast in RANK
    assert broadcast in TEXTS["several-processes"]
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = start(2, "-m", "mpi4py", str(script), str(PAGES["several-processes"]))
    output = finish(process, 120)
    assert process.returncode == 0, output
    assert "ranks that are equal: 0 1 data that differ: 2" in output


def test_blocks_of_text_are_python_or_one_command():
    for name, text in TEXTS.items():
        for block in blocks(text, "text"):
            if name == "several-processes":
                assert block == "mpiexec -n 4 python -m mpi4py train.py\n"
            else:
                ast.parse(block)
