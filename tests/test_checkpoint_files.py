"""Files of checkpoints: what is read, what is refused, and that no half file is ever found."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import pickle
import re
import stat
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupybn import BatchNorm1d, BatchNorm2d, find_batch_norms, load_checkpoint, save_checkpoint
from cupybn.models import writing
from tests.checkpoint_files import NAMES, SUFFIXES, a_state, assert_unchanged, keys_of, need, several, snapshot, write
from tests.reference import DTYPES, bits, to_numpy
from tests.test_interrupts import interrupted

suffixes = pytest.mark.parametrize("suffix", SUFFIXES)


@pytest.fixture
def two(device):
    """Two layers, the second without arrays yet."""
    return {"bn1.": BatchNorm2d(3, device=device), "net.bn2.": BatchNorm2d(None, device=device)}


def fails(path, layers, error, **kwargs):
    """Check that a file is refused, and nothing of it is loaded; no file stays open. Returns the message."""
    before, files = snapshot(layers), open_files()
    with pytest.raises(error) as raised:
        load_checkpoint(path, layers, **kwargs)
    assert raised.type is error
    assert_unchanged(layers, before)
    assert open_files() == files
    return str(raised.value.args[0])


def open_files():
    """Number of files that this process has open, where the system tells it."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def filled(rng, device, dtype=np.float32):
    """Layers whose arrays all differ, by their prefixes, out of alphabetical order."""
    layers = {prefix: BatchNorm2d(c, device=device, dtype=dtype) for prefix, c in (("z.bn2.", 3), ("bn1.", 5), ("", 1))}
    for layer in layers.values():
        layer.load_state_dict(a_state(rng, [""], layer.num_features))
    return layers


def held(layers):
    return [bits(*layer.state_dict().values()) for layer in layers.values()]


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@suffixes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(device, rng, tmp_path, suffix, dtype):
    need(suffix)
    path, layers = tmp_path / f"model{suffix}", filled(rng, device, dtype)
    layers["bn1."].weight = layers["bn1."].weight[::-1]  # a view backwards
    before = snapshot(layers)
    assert save_checkpoint(path, layers) is None
    assert_unchanged(layers, before)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    again = {prefix: BatchNorm2d(None, device=device, dtype=dtype) for prefix in layers}
    load_checkpoint(path, again)
    assert held(again) == held(layers)
    assert find_batch_norms(path) == {"z.bn2.": 3, "bn1.": 5, "": 1}
    if suffix != ".safetensors":  # which has an order of its own
        assert list(find_batch_norms(path)) == list(layers)


@suffixes
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_paths(rng, tmp_path, suffix, upper, as_text):
    need(suffix)
    path = tmp_path / f"a model.v1{suffix.upper() if upper else suffix}"
    path = str(path) if as_text else path
    layers = filled(rng, "cpu")
    save_checkpoint(path, layers)
    again = {prefix: BatchNorm2d(None, device="cpu") for prefix in layers}
    load_checkpoint(path, again)
    assert held(again) == held(layers)
    assert len(find_batch_norms(path)) == 3


@suffixes
def test_layers_of_all_kinds(device, rng, tmp_path, suffix):
    need(suffix)
    path, layers, again = tmp_path / f"model{suffix}", several(device), several(device)
    state = a_state(rng, layers)
    load_checkpoint({key: state[key] for key in keys_of(layers)}, layers)
    save_checkpoint(path, layers)
    load_checkpoint(path, again)
    assert held(again) == held(layers)


@suffixes
def test_no_layers(tmp_path, suffix):
    need(suffix)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(path, {})
    load_checkpoint(path, {})
    assert find_batch_norms(path) == {}


@suffixes
def test_special_numbers_keep_their_bits(device, tmp_path, suffix):
    need(suffix)
    for dtype in DTYPES:
        layer, again = (BatchNorm1d(6, device=device, dtype=dtype) for _ in range(2))
        values = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0]).astype(dtype)
        values[-1] = np.nextafter(dtype.type(0), dtype.type(1))  # the least subnormal number
        layer.load_state_dict(dict.fromkeys(NAMES[:4], values), strict=False)
        save_checkpoint(tmp_path / f"model{suffix}", {"bn.": layer})
        load_checkpoint(tmp_path / f"model{suffix}", {"bn.": again})
        assert bits(*again.state_dict().values()) == bits(*layer.state_dict().values())
        assert bits(again.weight) == bits(values)


@pytest.mark.parametrize("order", "<>")
@suffixes
def test_arrays_in_another_order_of_bytes(rng, tmp_path, suffix, order):
    need(suffix)
    layer, again = BatchNorm1d(3, device="cpu"), BatchNorm1d(3, device="cpu")
    layer.weight = rng.random(3).astype(f"{order}f8")
    save_checkpoint(tmp_path / f"model{suffix}", {"bn.": layer})
    load_checkpoint(tmp_path / f"model{suffix}", {"bn.": again})
    assert bits(again.weight) == bits(layer.weight.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Read by others


def test_npz_is_read_by_numpy(device, rng, tmp_path):
    for dtype in DTYPES:
        layers = filled(rng, device, dtype)
        save_checkpoint(tmp_path / "model.npz", layers)
        with np.load(tmp_path / "model.npz", allow_pickle=False) as file:
            assert file.files == [prefix + name for prefix in layers for name in NAMES]
            for prefix, layer in layers.items():
                for name, array in layer.state_dict().items():
                    expected = to_numpy(array)
                    assert file[prefix + name].shape == array.shape
                    expected = expected.astype(np.float32) if expected.dtype == ml_dtypes.bfloat16 else expected
                    assert file[prefix + name].dtype == expected.dtype
                    assert bits(file[prefix + name]) == bits(expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_are_read_by_torch(device, rng, tmp_path, suffix, dtype):
    need(suffix)
    torch = pytest.importorskip("torch")
    path, layer = tmp_path / f"model{suffix}", BatchNorm2d(3, device=device, dtype=dtype)
    layer.load_state_dict(a_state(rng, [""]))
    save_checkpoint(path, {"1.": layer})
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        state = safetensors.load_file(path)
        with pytest.importorskip("safetensors").safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    else:
        state = torch.load(path, weights_only=True)
        assert type(state) is dict
        assert list(state) == [f"1.{name}" for name in NAMES]
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)).to(getattr(torch, dtype.name))
    module.load_state_dict(state)
    for name, tensor in module[1].state_dict().items():
        array = to_numpy(getattr(layer, name))
        assert str(tensor.dtype) == f"torch.{array.dtype.name}"
        assert bits(tensor.double().numpy().astype(array.dtype)) == bits(array)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a file beside the layers


def test_entries_that_numpy_has_not(two, rng, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    state = a_state(rng, two)
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    tensors |= {"fp8": torch.ones(4).to(torch.float8_e4m3fn), "flags": torch.ones(3) > 0, "b": torch.ones(1).bfloat16()}
    tensors |= {
        "half": torch.ones(2).half(),
        "odd": torch.ones(3).to(torch.uint8),
    }
    tensors["bn1.bias"] = tensors["bn1.bias"].bfloat16()
    complex64 = {"z": torch.ones(2).to(torch.complex64)}
    known = torch.complex64 in getattr(safetensors, "_SIZE", [torch.complex64])  # of the first versions it is not
    safetensors.save_file(tensors | complex64 if known else tensors, tmp_path / "model.safetensors")
    tensors |= complex64
    torch.save(tensors | {"sparse": torch.ones(3).to_sparse(), "epoch": 3, "note": "text"}, tmp_path / "model.pt")
    for path in tmp_path.iterdir():
        load_checkpoint(path, two)
        assert bits(two["net.bn2."].weight) == bits(state["net.bn2.weight"])
        np.testing.assert_array_equal(to_numpy(two["bn1."].bias), tensors["bn1.bias"].float().numpy())
        assert find_batch_norms(path) == {"bn1.": 3, "net.bn2.": 3}
    tensors |= {"z": torch.ones(2), "bn1.bias": torch.ones(3).to(torch.float8_e5m2)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    for path in tmp_path.iterdir():
        assert fails(path, two, TypeError).startswith("expected bn1.bias to be an array of real numbers (got ")


@suffixes
def test_libraries_that_warn(two, rng, tmp_path, suffix, monkeypatch):
    """A file is read where a library warns of how it reads it, also if warnings are errors, as they are here."""
    need(suffix)
    state = a_state(rng, two)
    path = write(tmp_path / f"model{suffix}", state)
    if suffix == ".npz":  # numbers as Python 2 wrote them, of which NumPy warns by itself
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in state.items():
                member = io.BytesIO()
                np.save(member, array)
                archive.writestr(f"{key}.npy", member.getvalue().replace(b"'shape': (3,), } ", b"'shape': (3L,), }"))
        assert b"3L" in path.read_bytes()
    else:
        module, name = ("safetensors", "safe_open") if suffix == ".safetensors" else ("torch", "load")
        library = importlib.import_module(module)
        reads = getattr(library, name)

        def warns(*args, **kwargs):
            warnings.warn("of its internals", UserWarning, stacklevel=1)
            return reads(*args, **kwargs)

        monkeypatch.setattr(library, name, warns)
    filters = [*warnings.filters]
    load_checkpoint(path, two)
    loaded = two["bn1."].state_dict("bn1.")
    assert bits(*loaded.values()) == bits(*map(state.get, loaded))
    assert find_batch_norms(path) == {"bn1.": 3, "net.bn2.": 3}
    assert warnings.filters == filters


@suffixes
def test_entries_of_bools_and_whole_numbers(two, rng, tmp_path, suffix):
    vectors = {"bn1.weight": np.array([True, False, True]), "net.bn2.bias": np.array([200, 1, 2], np.uint8)}
    load_checkpoint(write(tmp_path / f"model{suffix}", a_state(rng, two, **vectors)), two)
    assert to_numpy(two["bn1."].weight).tolist() == [1, 0, 1]
    assert to_numpy(two["net.bn2."].bias).tolist() == [200, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_without_ml_dtypes(rng, tmp_path, monkeypatch, dtype):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {key: torch.from_numpy(np.array(array)).bfloat16() for key, array in a_state(rng, ["bn."]).items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    for path in tmp_path.iterdir():
        layer = BatchNorm1d(3, device="cpu", dtype=dtype)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "ml_dtypes", None)
            load_checkpoint(path, {"bn.": layer})
        for name in NAMES[:4]:
            np.testing.assert_array_equal(to_numpy(getattr(layer, name)), tensors["bn." + name].float().numpy())


def test_entries_of_others_are_not_read(two, rng, tmp_path):
    """An entry that is damaged matters to nobody but its owner, where a file says what is damaged."""
    state = a_state(rng, two) | {"conv.weight": np.arange(1000.0)}
    path = write(tmp_path / "model.npz", state)
    data = bytearray(path.read_bytes())
    at = data.index(np.arange(500.0, 510.0).tobytes())
    data[at] ^= 255
    path.write_bytes(data)
    load_checkpoint(path, two)
    assert find_batch_norms(path) == {"bn1.": 3, "net.bn2.": 3}
    with pytest.raises(zipfile.BadZipFile), np.load(path) as file:
        file["conv.weight"]


def test_members_of_an_archive_that_are_no_arrays(two, rng, tmp_path):
    path = write(tmp_path / "model.npz", a_state(rng, two))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("bn1.README", "text")
    load_checkpoint(path, two)
    assert find_batch_norms(path) == {"bn1.": 3, "net.bn2.": 3}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_files_of_numpy(rng, tmp_path, version):
    state = a_state(rng, ["bn."])
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as file:
        for key, array in state.items():
            with file.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), version)
    layer = BatchNorm1d(None, device="cpu")
    load_checkpoint(tmp_path / "model.npz", {"bn.": layer})
    assert bits(layer.weight, layer.running_var) == bits(state["bn.weight"], state["bn.running_var"])
    assert find_batch_norms(tmp_path / "model.npz") == {"bn.": 3}


def test_files_of_torch_are_mapped_into_memory(two, rng, tmp_path, monkeypatch):
    """Files of PyTorch are mapped, so that only the layers' tensors come from the disk."""
    torch = need(".pt")
    path, load, calls = write(tmp_path / "model.pt", a_state(rng, two)), torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: calls.append(kwargs) or load(path, **kwargs))
    load_checkpoint(path, two)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_file_of_torch_that_was_compressed(two, rng, tmp_path, method):
    """An archive that another program has written anew, compressed, is read as what it was, or not at all."""
    state = a_state(rng, two)
    path = write(tmp_path / "model.pt", state)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    if method == zipfile.ZIP_LZMA:  # which PyTorch does not know
        assert "cannot be read as a .pt file: " in fails(path, two, ValueError)
        return
    load_checkpoint(path, two)
    assert bits(two["bn1."].weight, two["net.bn2."].bias) == bits(state["bn1.weight"], state["net.bn2.bias"])


@suffixes
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
def test_names_that_are_no_unicode(rng, tmp_path, suffix):
    need(suffix)
    path, layers = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix.encode()), filled(rng, "cpu")
    save_checkpoint(path, layers)
    again, message = {prefix: BatchNorm2d(None, device="cpu") for prefix in layers}, ""
    try:
        load_checkpoint(path, again)
    except ValueError as error:
        message = ascii(error)  # what runs tests in several processes cannot send the name itself
    assert not message
    assert held(again) == held(layers)


def test_files_of_older_versions_of_torch(two, rng, tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(np.array(array)) for key, array in a_state(rng, two).items()}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    load_checkpoint(tmp_path / "model.pt", two)
    assert bits(two["bn1."].bias) == bits(state["bn1.bias"].numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Files that are refused


class Evil:
    """An object that, when it is unpickled, makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.folder),)


def test_no_pickle_is_executed(two, rng, tmp_path):
    evil, state = Evil(tmp_path / "executed"), a_state(rng, two)
    np.savez(tmp_path / "array.npz", **state | {"bn1.bias": np.array([evil, 1, 2], dtype=object)})
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(evil))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(evil))
    paths = [tmp_path / "array.npz", tmp_path / "pickle.npz", tmp_path / "pickle.safetensors"]
    with contextlib.suppress(pytest.skip.Exception):  # without torch the other files are refused all the same
        torch = need(".pt")
        torch.save({"bn1.bias": evil}, tmp_path / "zip.pt")
        torch.save({"bn1.bias": evil}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"bn1.bias": evil}, protocol=2))
        paths += [tmp_path / "zip.pt", tmp_path / "old.pt", tmp_path / "pickle.pth"]
    for path in paths:
        message = fails(path, two, TypeError if path.name == "array.npz" else ValueError)
        assert "weights_only" not in message  # no advice to execute it
        assert "bn1.bias" in message or str(path) in message
        if path.name != "array.npz":
            with pytest.raises(ValueError, match=re.escape(str(path))):
                find_batch_norms(path)
        assert not (tmp_path / "executed").exists()
    with np.load(tmp_path / "array.npz", allow_pickle=True) as file, pytest.raises(TypeError):
        file["bn1.bias"] + 1  # what it would have done
    assert (tmp_path / "executed").exists()


def test_a_file_of_the_first_versions_of_torch_is_not_opened(two, tmp_path, monkeypatch):
    """PyTorch up to 2.5 extracts and executes what a .tar file says, with ``weights_only=True`` as well."""
    torch = need(".pt")
    with tarfile.open(tmp_path / "model.pt", "w") as file:
        for name in "sys_info", "pickle", "storages", "tensors":
            member, data = tarfile.TarInfo(name), pickle.dumps(Evil(tmp_path / "executed"))
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("PyTorch was to load it"))
    message = fails(tmp_path / "model.pt", two, ValueError)
    assert message.endswith(
        "cannot be read as a .pt file: it is a .tar file, as PyTorch wrote them before version 0.1.10"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_objects_of_others_are_ignored(two, rng, tmp_path):
    evil, state = Evil(tmp_path / "executed"), a_state(rng, two)
    np.savez(tmp_path / "array.npz", **state | {"note": np.array([evil], dtype=object)})
    load_checkpoint(tmp_path / "array.npz", two)
    assert len(find_batch_norms(tmp_path / "array.npz")) == 2
    assert not (tmp_path / "executed").exists()


def cut(data):
    return data[: len(data) // 2]


DAMAGE = {
    "empty": lambda _: b"",
    "text": lambda _: b"hello, this is no checkpoint at all",
    "cut": cut,
    "last bytes missing": lambda data: data[:-7],
    "beginning missing": lambda data: data[40:],
    "zeros": lambda data: bytes(len(data)),
    "beginning only": lambda data: data[:4] + bytes(200),
}


@suffixes
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(two, rng, tmp_path, suffix, damage):
    path = write(tmp_path / f"model{suffix}", a_state(rng, two))
    path.write_bytes(damage(path.read_bytes()))
    message = fails(path, two, ValueError)
    assert message.startswith(f"{path} cannot be read as a {suffix} file: ")
    assert "a .tar file" not in message
    assert len(message) > len(f"{path} cannot be read as a {suffix} file: ") + 3
    if (suffix, damage) != (".npz", DAMAGE["beginning missing"]):  # where running statistics are whole
        files = open_files()
        with pytest.raises(ValueError, match=re.escape(message)):
            find_batch_norms(path)
        assert open_files() == files


def test_damage_that_is_found_late(device, rng, tmp_path):
    """The last entry that is read is damaged: nothing has been loaded, and the error is the file's."""
    two = {"bn1.": BatchNorm2d(5000, device=device), "net.bn2.": BatchNorm2d(None, device=device)}
    state = a_state(rng, two, 5000)
    path = write(tmp_path / "model.npz", state)
    data = bytearray(path.read_bytes())
    data[data.index(state["net.bn2.running_var"].tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert find_batch_norms(path) == {"bn1.": 5000, "net.bn2.": 5000}
    message = fails(path, two, ValueError)
    assert message.startswith(f"{path} cannot be read as a .npz file: BadZipFile: Bad CRC-32")
    for name, header in ("weight", b"\x93NUMPX"), ("bias", b"\x93NUMPY\x09\x00"):
        with zipfile.ZipFile(path, "w") as file:
            for key, array in state.items():
                with file.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array))
        data = bytearray(path.read_bytes())
        at = data.index(b"\x93NUMPY", data.index(f"net.bn2.{name}.npy".encode()))
        data[at : at + len(header)] = header
        path.write_bytes(data)
        assert "cannot be read as a .npz file: " in fails(path, two, ValueError)
    at = data.index(b"\x93NUMPY", data.index(b"net.bn2.running_mean.npy"))
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a .npz file: ")):
        find_batch_norms(path)


@suffixes
def test_a_lack_of_memory_is_no_damage(two, rng, tmp_path, monkeypatch, suffix):
    path = write(tmp_path / f"model{suffix}", a_state(rng, two))
    reads = {".npz": (np.lib.format, "read_array"), ".safetensors": (np, "frombuffer")}
    module, name = reads[suffix] if suffix in reads else (need(suffix), "load")

    def failing(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setattr(module, name, failing)
    assert fails(path, two, MemoryError) == "no memory"


def test_the_cause_of_damage_is_the_error_of_the_library(tmp_path):
    (tmp_path / "model.npz").write_text("text")
    with pytest.raises(ValueError, match="cannot be read") as raised:
        find_batch_norms(tmp_path / "model.npz")
    assert type(raised.value.__cause__) is zipfile.BadZipFile


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"(1000000000000000,)}", "0 bytes are too few for shape (1000000000000000,) and dtype float32"),
        (b"(4,)}" + b" " * 20000, "Header info length ("),
        (b"(-1,)}", "negative dimensions"),
        (b"(4.0,)}", "shape is not valid"),
        (b"__import__('os').abort()}", "malformed node or string"),
    ],
    ids=["huge", "long", "negative", "float", "call"],
)
def test_headers_of_arrays(two, rng, tmp_path, header, words):
    """No header makes NumPy ask for more memory than there are bytes, and no words advise to load what is pickled."""
    path = write(tmp_path / "model.npz", a_state(rng, two, **{"bn1.weight": None}))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + header
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("bn1.weight.npy", b"\x93NUMPY\2\0" + len(header).to_bytes(4, "little") + header)
    message = fails(path, two, ValueError)
    assert message.startswith(f"{path} cannot be read as a .npz file: ValueError: {words}")
    assert "allow_pickle" not in message


def test_files_that_hold_something_else(two, tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "cannot be read as a .npz file: BadZipFile: " in fails(tmp_path / "array.npz", two, ValueError)
    torch = pytest.importorskip("torch")
    torch.save([1, 2], tmp_path / "list.pt")
    message = fails(tmp_path / "list.pt", two, ValueError)
    assert message.endswith("cannot be read as a .pt file: it holds no mapping of names to tensors (got list)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch calls deprecated, and of the words with which it refuses
        torch.jit.save(torch.jit.script(torch.nn.BatchNorm2d(3)), tmp_path / "script.pt")
        message = fails(tmp_path / "script.pt", two, ValueError)
    assert "cannot be read as a .pt file: RuntimeError: Cannot use" in message
    assert "TorchScript" in message
    for nest in (lambda value: value), (lambda value: {"epoch": 3, "model": value}):
        torch.save(nest(torch.nn.BatchNorm2d(3)), tmp_path / "module.pt")
        message = fails(tmp_path / "module.pt", two, ValueError)
        assert "UnpicklingError: WeightsUnpickler error: Unsupported global: GLOBAL torch.nn.modules.batch" in message
        assert message.endswith(
            " was not an allowed global by default: objects of such classes are not loaded, save model.state_dict() "
            "alone"
        )
        assert "weights_only" not in message
        assert "safe_globals" not in message


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("model.h5", "'{}', with the suffix '.h5'"),
        ("model", "'{}'"),
        (".npz", "'{}'"),
        ("model.pt.zip", "'{}', with the suffix '.zip'"),
        ("model.npz/", "'{}'"),
    ],
)
def test_other_suffixes(two, tmp_path, name, given):
    path = f"{tmp_path}/{name}"
    message = f"expected the path of a .safetensors, .npz, .pt, .pth file (got {given.format(path)})"
    if name.endswith("/"):  # Python takes the name of the folder
        with pytest.raises(OSError, match="directory"):
            load_checkpoint(path, two)
        return
    assert fails(path, two, ValueError) == message
    with pytest.raises(ValueError, match=re.escape(message)):
        find_batch_norms(path)
    with pytest.raises(ValueError, match=re.escape(message)):
        save_checkpoint(path, two)


@suffixes
def test_files_that_are_not_there(two, tmp_path, suffix):
    need(suffix)
    path = tmp_path / f"model{suffix}"
    for call in (lambda: load_checkpoint(path, two), lambda: find_batch_norms(str(path))):
        with pytest.raises(FileNotFoundError) as raised:
            call()
        assert (raised.value.errno, os.fspath(raised.value.filename)) == (errno.ENOENT, str(path))
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        load_checkpoint(path, two)


@pytest.mark.parametrize(
    ("suffix", "package", "advice"),
    [
        (".safetensors", "safetensors", "`pip install '.[safetensors]'`, in a clone of cupybn, installs it"),
        (".pt", "torch", "install PyTorch"),
        (".pth", "torch", "install PyTorch"),
    ],
)
def test_packages_that_are_missing(rng, tmp_path, monkeypatch, suffix, package, advice):
    path, layers = tmp_path / f"model{suffix}", filled(rng, "cpu")
    monkeypatch.setitem(sys.modules, package, None)
    for call in (load_checkpoint, lambda path, _: find_batch_norms(path), save_checkpoint):
        with pytest.raises(ImportError, match=re.escape(f"{suffix} files need {package}: {advice}")):
            call(path, layers)
    save_checkpoint(tmp_path / "model.npz", layers)
    load_checkpoint(tmp_path / "model.npz", layers)
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@suffixes
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails(rng, tmp_path, monkeypatch, suffix, error, there):
    """Whatever fails while a file is written, or is renamed: the old one is there, and nothing beside it."""
    need(suffix)
    path, layers = tmp_path / f"model{suffix}", filled(rng, "cpu")
    if there:
        path.write_bytes(b"old")

    def half(file, _):
        file.write(b"half")
        raise error

    def failing(*_):
        raise error

    for where, name, replacement in (writing._WRITERS, suffix, half), (Path, "replace", failing):
        with monkeypatch.context() as patched:
            if isinstance(where, dict):
                patched.setitem(where, name, replacement)
            else:
                patched.setattr(where, name, replacement)
            with pytest.raises(error):
                save_checkpoint(path, layers)
        assert [file.name for file in tmp_path.iterdir()] == [path.name] * there
        assert not there or path.read_bytes() == b"old"
    save_checkpoint(path, layers)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len(find_batch_norms(path)) == 3


class Full(io.FileIO):
    """A file on a disk that is full from some write on."""

    writes = 0

    def write(self, data):
        Full.writes -= 1
        if Full.writes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@suffixes
def test_a_disk_that_is_full(rng, tmp_path, monkeypatch, suffix):
    need(suffix)
    path, layers = tmp_path / f"model{suffix}", filled(rng, "cpu")
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "open", lambda path, mode: Full(path, mode))
    for most in range(200):
        Full.writes = most
        try:
            save_checkpoint(path, layers)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - it may also succeed
            assert path.read_bytes() == b"old"
            assert list(tmp_path.iterdir()) == [path]
        else:
            break
    assert most > 0
    assert len(find_batch_norms(path)) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that Python was to close
def test_an_interrupt_at_any_line(rng, tmp_path):
    """Ctrl-C at any line of the library while it saves: the old file is whole or the new one, and nothing beside it."""
    path, layers = tmp_path / "model.npz", filled(rng, "cpu")
    library, at, more = str(Path(writing.__file__).parent), 0, True
    while more:
        at += 1
        path.write_bytes(b"old")
        more = interrupted(lambda: save_checkpoint(path, layers), at, library)
        files = list(tmp_path.iterdir())
        assert len(files) == 1, f"at line {at}: {files}"
        assert path.read_bytes() == b"old" or len(find_batch_norms(path)) == 3
    assert at > 30


@suffixes
@pytest.mark.parametrize("mask", [0o027, 0o077, 0o000])
@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_permissions_are_those_of_any_new_file(rng, tmp_path, suffix, mask):
    need(suffix)
    path, layers = tmp_path / f"model{suffix}", filled(rng, "cpu")
    before = os.umask(mask)
    try:
        for _ in range(2):
            save_checkpoint(path, layers)
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
            path.chmod(0o400)  # the next one is a new file again
    finally:
        os.umask(before)


def test_names_that_an_archive_would_cut(rng, tmp_path):
    layers = filled(rng, "cpu")
    layers["a\0b."] = layers.pop("bn1.")
    with pytest.raises(ValueError, match=r"expected keys without '\\0'.*'a\\x00b.weight'"):
        save_checkpoint(tmp_path / "model.npz", layers)
    assert list(tmp_path.iterdir()) == []
    layers["/../ü\n."] = layers.pop("a\0b.")
    save_checkpoint(tmp_path / "model.npz", layers)
    assert find_batch_norms(tmp_path / "model.npz") == {"z.bn2.": 3, "": 1, "/../ü\n.": 5}


def test_two_files_of_a_folder_at_the_same_time(rng, tmp_path, monkeypatch):
    layers, original = filled(rng, "cpu"), writing._WRITERS[".npz"]

    def write_another_first(file, arrays):
        monkeypatch.setitem(writing._WRITERS, ".npz", original)
        save_checkpoint(tmp_path / "other.npz", layers)
        original(file, arrays)

    monkeypatch.setitem(writing._WRITERS, ".npz", write_another_first)
    save_checkpoint(tmp_path / "model.npz", layers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.npz", "other.npz"]


def test_a_link_stays_one(rng, tmp_path):
    (tmp_path / "real").mkdir()
    real, link, layers = tmp_path / "real" / "model.npz", tmp_path / "link.npz", filled(rng, "cpu")
    link.symlink_to(real)
    for _ in range(2):  # at first it points to nothing
        save_checkpoint(link, layers)
        assert link.is_symlink()
        assert real.is_file()
        assert not real.is_symlink()
        assert len(find_batch_norms(link)) == 3
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["link.npz", "model.npz", "real"]


def test_a_file_that_is_loaded_may_be_written(rng, tmp_path):
    """A checkpoint may be saved under the name that it was loaded from, while others still read the old one."""
    torch = need(".pt")
    path, layers = tmp_path / "model.pt", filled(rng, "cpu")
    save_checkpoint(path, layers)
    old = torch.load(path, weights_only=True, mmap=True)
    before = [tensor.clone() for tensor in old.values()]
    layers["bn1."].weight += 1
    save_checkpoint(path, layers)
    assert all(torch.equal(now, then) for now, then in zip(old.values(), before, strict=True))
    load_checkpoint(path, layers)


def test_folders_that_are_not_there(rng, tmp_path):
    layers = filled(rng, "cpu")
    path = tmp_path / "none" / "model.npz"
    with pytest.raises(FileNotFoundError) as raised:
        save_checkpoint(path, layers)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(path))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as raised:
        save_checkpoint(str(tmp_path / "file" / "model.npz"), layers)
    assert raised.value.filename == str(tmp_path / "file" / "model.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        save_checkpoint(tmp_path / "folder.npz", layers)
    assert raised.value.filename == str(tmp_path / "folder.npz")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder.npz"]


def test_a_name_as_long_as_they_may_be(rng, tmp_path):
    path = tmp_path / f"{'x' * 251}.npz"
    save_checkpoint(path, filled(rng, "cpu"))
    assert len(find_batch_norms(path)) == 3


def test_layers_without_arrays_are_not_saved(rng, tmp_path, device):
    layers = filled(rng, device) | {f"lazy{i}.": BatchNorm1d(None, device=device) for i in (1, 2)}
    with pytest.raises(ValueError, match=r"expected layers with arrays \(got none yet for 'lazy1.', 'lazy2.'\)"):
        save_checkpoint(tmp_path / "model.npz", layers)
    assert list(tmp_path.iterdir()) == []
    layers = {"none.": BatchNorm1d(None, affine=False, track_running_stats=False, device=device)}
    save_checkpoint(tmp_path / "model.npz", layers)  # which never has any
    load_checkpoint(tmp_path / "model.npz", layers)


@pytest.mark.parametrize("path", [3, None, b"model.npz", {"a": 1}], ids=str)
def test_what_is_no_path(rng, path):
    with pytest.raises(TypeError, match="expected path to be a str or a path") as raised:
        save_checkpoint(path, filled(rng, "cpu"))
    assert str(raised.value).endswith(": use os.fsdecode(path)") == isinstance(path, bytes)


@suffixes
@pytest.mark.parametrize("dtype", [object, "U3", "c8", "M8[s]", "g", "V2", ml_dtypes.float8_e5m2], ids=str)
def test_dtypes_that_are_not_saved(rng, tmp_path, suffix, dtype):
    """What no format holds is not saved, least of all as a pickle."""
    need(suffix)
    layers = filled(rng, "cpu")
    layers["bn1."].bias = np.zeros(5, dtype)
    message = (
        rf"expected bn1.bias to be an array of integers or float16, .* \(got dtype {re.escape(str(np.dtype(dtype)))}\)"
    )
    if np.dtype(dtype) == np.float64:
        pytest.skip("long double is float64 on this machine")
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / f"model{suffix}", layers)
    assert list(tmp_path.iterdir()) == []
    for taken in np.int32, ">f4", bool:
        layers["bn1."].bias = np.ones(5, taken)
        save_checkpoint(tmp_path / f"model{suffix}", layers)
        load_checkpoint(tmp_path / f"model{suffix}", {"bn1.": BatchNorm2d(5, device="cpu")})


def test_what_is_no_array_is_not_saved(rng, tmp_path):
    layers = filled(rng, "cpu")
    layers["bn1."].bias = [1.0] * 5
    with pytest.raises(TypeError, match=r"expected bias to be an array \(got list\)"):
        save_checkpoint(tmp_path / "model.npz", layers)
    assert list(tmp_path.iterdir()) == []
