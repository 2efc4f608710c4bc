"""Words of the arguments of every kernel: they are where the fields of its structs are."""

from __future__ import annotations

import numpy as np
import pytest

from cupybn._steps import bundles as real_bundles
from cupybn._steps import sources
from cupybn._steps.arguments import VECTOR, Arguments
from cupybn._steps.geometry import ChannelsFirst, ChannelsLast
from cupybn._steps.row_geometry import Rows
from cupybn._steps.sample_geometry import Samples
from cupybn._steps.tape import NUMBERS

cp = pytest.importorskip("cupy")

SIZES = {sizes.__name__: sizes for sizes in (ChannelsFirst, ChannelsLast, Rows, Samples)}
"""Structs of a layout's sizes."""
STRUCTS = {
    "Affine": [("weight", VECTOR), ("bias", VECTOR), ("eps", "f8")],
    "Running": [("mean", VECTOR), ("var", VECTOR), ("momentum", "f8"), ("batches", "u8"), ("skip_nonfinite", "i8")],
    "Epilogue": [("residual", "u8"), ("activation", "i8"), ("passed", "u8"), ("mask", "u8")],
    "Moments": [("count", "u8"), ("mean", "u8"), ("m2", "u8"), ("batches", "u8")],
    "Statistics": [("pairs", "u8"), ("count_left", "u8")],
    "Sums": [("dy", "u8"), ("dy_xhat", "u8")],
    "Gradients": [("dx", "u8"), ("dresidual", "u8"), ("dweight", VECTOR), ("dbias", VECTOR)],
    "Incoming": [("dy", "u8"), ("cdx", "u8"), ("cdresidual", "u8"), ("cdweight", VECTOR), ("cdbias", VECTOR)],
    "SecondSums": [(name, "u8") for name in ("dy", "dy_xhat", "cdx", "cdx_xhat", "cdx_dy")],
    "SecondGradients": [("ddy", "u8"), ("dx", "u8"), ("dweight", VECTOR)],
    "Drops": [("drawn", "u8"), ("threshold", "i8"), ("scale", "f8")],
    "Vector": VECTOR,
    **{struct: [(name, "i8") for name in sizes._fields] for struct, sizes in SIZES.items()},
}
"""Fields of all structs that kernels take, with their dtypes: pointers are u8."""
TYPES = {"double": "f8", "long long": "i8"}


def field_of(parameter):
    return np.dtype(STRUCTS.get(parameter.type, TYPES.get(parameter.type, "u8")))


def value_for(dtype, name, drawn):
    """A value of its own for a word, and the value that is to be found there."""
    if dtype == VECTOR:
        base = cp.zeros(40, np.float32)[len(drawn) :: 2][:5]
        drawn.append(base)
        return base, (base.data.ptr, 8, 2)
    if name.endswith("activation"):
        return "relu", 1
    if dtype == np.float64:
        drawn.append(None)
        return 0.5 + len(drawn), 0.5 + len(drawn)
    if dtype == np.int64:
        drawn.append(None)
        return 1000 + len(drawn), 1000 + len(drawn)
    return None, None


@pytest.mark.parametrize("name", sources.kernel_names())
def test_words_of_every_kernel(name):
    """Values land where the fields of a struct with the kernel's parameters are, one behind the other."""
    dtype = np.dtype(np.float32)
    pointees = {
        "data_t*": dtype, "double*": np.dtype(np.float64), "long long*": np.dtype(np.int64), "bool*": np.dtype(bool),
        "passed_t*": np.dtype(bool), "unsigned long long*": np.dtype(np.uint64),
    }  # fmt: skip
    signature = sources.signature(name)
    whole = np.dtype([(parameter.name, field_of(parameter)) for parameter in signature])
    arguments, drawn, expected, arrays = Arguments(name, signature, pointees), [], {}, {}
    given, bundles = {}, vars(real_bundles) | SIZES

    def value(full_name, declared, dtype):
        if declared.type in pointees:
            array = cp.zeros((), pointees[declared.type])
            expected[full_name] = array.data.ptr
        else:
            array, expected[full_name] = value_for(dtype, full_name, drawn)
        if isinstance(array, cp.ndarray):
            arrays[full_name] = array
        return array

    for parameter in signature:
        of = whole[parameter.name]
        if parameter.fields:
            fields = {f.name: value(f"{parameter.name}.{f.name}", f, of[f.name]) for f in parameter.fields}
            assert list(fields) == list(of.names)
            given[parameter.name] = bundles[parameter.type](**fields)
        else:
            given[parameter.name] = value(parameter.name, parameter, of)
    listed = arguments.listed(given)
    words = arguments.packed(listed, 0)
    found = np.frombuffer(words, whole)
    assert found.size == 1

    for parameter, (start, stop) in zip(signature, arguments.ranges, strict=True):
        of, begin = whole.fields[parameter.name]
        assert (start * 8, stop * 8) == (begin, begin + of.itemsize)
    for full_name, wanted in expected.items():
        outer, _, inner = full_name.partition(".")
        of, begin = whole.fields[outer]
        if inner:
            begin += of.fields[inner][1]
        assert arguments.places[full_name] * 8 == begin, full_name
        at = found[0][outer][inner] if inner else found[0][outer]
        assert (at.item() if at.dtype.names else at) == wanted, full_name
    assert arguments.places.keys() == expected.keys()
    assert dict(arguments.arrays(listed)) == {arguments.places[full_name]: a for full_name, a in arrays.items()}
    nothing = {parameter.name: None if parameter.nullable else given[parameter.name] for parameter in signature}
    there = [n for n in arrays if nothing[n.partition(".")[0]] is not None]
    assert [word for word, _ in arguments.arrays(arguments.listed(nothing))] == [
        word for word, _ in arguments.arrays(listed) if word in {arguments.places[n] for n in there}
    ]


def test_numbers_of_a_tape_are_doubles_that_kernels_take():
    """Each name in NUMBERS is that of a double of some kernel; others depend on the form of a call alone."""
    declared = {}
    for name in sources.kernel_names():
        for parameter in sources.signature(name):
            for field in parameter.fields or (parameter,):
                full_name = f"{parameter.name}.{field.name}" if parameter.fields else field.name
                if field.type == "double":
                    declared.setdefault(full_name, []).append(name)
    # Elements of a channel, one over them, and what dropout keeps is multiplied by: it depends on p alone.
    assert {*declared} == {*NUMBERS, "count", "inv_count", "drops.scale"}
