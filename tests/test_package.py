"""The package as users meet it: what importing costs, what it needs, what a wheel holds."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

import cupybn


def python(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | env, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_numpy_and_nothing_else():
    code = (
        "import sys, json, numpy; a = set(sys.modules); import cupybn; print(json.dumps(sorted(set(sys.modules) - a)))"
    )
    own = {name.partition(".")[0] for name in json.loads(python(code))}
    assert "cupybn" in own
    assert not own & {"cupy", "ml_dtypes", "scipy", "torch", "matplotlib", "tqdm"}


def test_a_broken_cupy_does_no_harm(tmp_path):
    """`import cupy` may raise anything; it is only tried when a device is asked for."""
    (tmp_path / "cupy.py").write_text("raise PermissionError('no cache folder')")
    code = """
import cupybn, numpy as np
layer = cupybn.BatchNorm1d(2)
assert layer.device == "cpu", layer.device
layer(np.ones((3, 2), np.float32))
try:
    layer.to("cuda")
except RuntimeError as error:
    print(error)
"""
    message = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(cupybn.__file__).parent.parent)]))
    assert re.search(r"no cache folder.*cuda12.*cuda13", message)


def test_a_folder_called_cupy_does_no_harm(tmp_path):
    """A folder of this name is a package for Python, even without `__init__.py`."""
    (tmp_path / "cupy" / "images").mkdir(parents=True)
    code = """
import cupy, cupybn
if cupy.__file__ is not None:
    raise SystemExit(print("CuPy is installed, and found first"))
assert cupybn.BatchNorm2d(3).device == "cpu"
try:
    cupybn.BatchNorm2d(3, device="cuda")
except RuntimeError as error:
    print(error)
"""
    message = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(cupybn.__file__).parent.parent)]))
    if "CuPy is installed" in message:
        pytest.skip("a package comes before a folder, wherever they are")
    assert f"the module 'cupy' in {tmp_path / 'cupy'} cannot be used" in message
    assert re.search("cuda12.*cuda13", message)


def test_numpy_arrays_do_not_import_cupy():
    """No array but CuPy's needs CuPy: not those of derived classes, and no wrong ones."""
    code = """
import sys, numpy as np, cupybn
class Image(np.ndarray): pass
class ndarray: pass
x = np.ones((4, 3), np.float32)
layer = cupybn.BatchNorm1d(3, device="cpu")
for given in x, x.view(Image):
    layer.vjp(given)[1](given)
    cupybn.functional.moments(given)
for given in [1.0], np.ma.ones(3), np.ones(3, int), ndarray():
    try:
        cupybn.functional.moments(given)
    except TypeError:
        continue
    raise SystemExit(f"{given} is no array")
layer.load_state_dict(layer.state_dict())
print("cupy" in sys.modules)
"""
    assert python(code, PYTHONPATH=str(Path(cupybn.__file__).parent.parent)) == "False\n"


def test_public_names():
    assert set(cupybn.__all__) <= set(dir(cupybn))
    for name in cupybn.__all__:
        assert getattr(cupybn, name).__doc__, name
    for name in cupybn.functional.__all__:
        assert getattr(cupybn.functional, name).__doc__, name
    for layer in cupybn.BatchNorm1d, cupybn.BatchNorm2d, cupybn.BatchNorm3d:
        assert "num_features" in layer.__doc__
        for name, member in vars(layer.__mro__[1]).items():
            assert name.startswith("_") or name in layer.__mro__[1].__annotations__ or member.__doc__, name


def test_the_source_of_what_is_public_is_found():
    """Python looks for it in the module that a class or function says it is from."""
    for place in cupybn, cupybn.functional:
        for name in place.__all__:
            subject = getattr(place, name)
            source = "" if inspect.ismodule(subject) else inspect.getsource(subject).partition(":")[0]
            assert inspect.ismodule(subject) or re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), name


@pytest.mark.parametrize("name", [name for name in cupybn.__all__ if inspect.isclass(getattr(cupybn, name))])
def test_type_hints_are_found(name):
    """Python looks up the names in hints of a class in the module that the class says it is from."""
    assert typing.get_type_hints(getattr(cupybn, name))


def places(pickled):
    """The modules of this package that a pickle names."""
    words = {value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)}
    return {word for word in words if re.match(r"cupybn\b", word)}


def test_pickles_name_no_private_place():
    """A pickle is to be read by later versions, where private files may have moved."""
    layers = [cupybn.BatchNorm1d, cupybn.BatchNorm2d, cupybn.BatchNorm3d, cupybn.SyncBatchNorm]
    for layer in [*(layer(2, device="cpu") for layer in layers), cupybn.BatchNorm2d(None)]:
        pickled = pickle.dumps(layer)
        assert places(pickled) <= {"cupybn.layers.batchnorm", "cupybn.layers.syncbatchnorm"}, layer
        assert places(pickled)
        assert type(pickle.loads(pickled)) is type(layer)
        assert type(copy.deepcopy(layer)) is type(layer)
    for layer in cupybn.Dropout, cupybn.Dropout1d, cupybn.Dropout2d, cupybn.Dropout3d:
        pickled = pickle.dumps(layer(seed=7, device="cpu"))
        assert places(pickled) == {"cupybn.layers.dropout", "cupybn.dropout.generator"}, layer
        assert type(pickle.loads(pickled)) is layer
    grads = cupybn.BatchNormGrads(*np.ones((4, 1)))
    assert places(pickle.dumps(grads)) == {"cupybn.functional"}
    assert pickle.loads(pickle.dumps(grads)) == grads


def test_typed():
    assert (Path(cupybn.__file__).parent / "py.typed").exists()


LAYERS = """
from typing_extensions import assert_type
from cupybn import BatchNorm2d, SyncBatchNorm

class Mine(BatchNorm2d):
    pass

assert_type(Mine(3).train(), Mine)
assert_type(Mine(3).eval(), Mine)
assert_type(Mine(3).to("cpu"), Mine)
assert_type(Mine(3).to(dtype="float16").cpu().cuda(0), Mine)
assert_type(SyncBatchNorm(3).train(False).eval().to("cpu"), SyncBatchNorm)
"""


def test_methods_that_return_the_layer_keep_its_type(tmp_path):
    for name in "train", "eval", "to":
        assert getattr(cupybn.BatchNorm2d, name).__annotations__["return"] == "Self"
    pytest.importorskip("mypy")
    (tmp_path / "layers.py").write_text(LAYERS)
    options = ["--strict", "--config-file=", "--no-error-summary", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, tmp_path / "layers.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(cupybn.__file__).parents[1])
    assert (result.returncode, result.stdout) == (0, "")


def test_kernel_folder_is_found():
    from cupybn._steps.sources import KERNELS

    assert KERNELS.is_dir()
    assert (KERNELS / "README.md").exists()
