"""One name, three places: kernels, mirrors and launchers agree in names, parameters and order, and on every bundle.

Mirrors and launchers come in pairs of modules, and each kernel belongs to one pair.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import types
import typing
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn._arrays.dtypes import FLOATS
from cupybn._calls import checks
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import (
    arguments,
    bundles,
    cupy_double_backward,
    cupy_dropout,
    cupy_norms,
    cupy_ops,
    geometry,
    numpy_double_backward,
    numpy_dropout,
    numpy_norms,
    numpy_ops,
    row_geometry,
    sample_geometry,
    sources,
)
from cupybn._steps.sources import KERNELS, kernel_names, signature

LAYOUTS = ("channels_first", "channels_last")
STEPS = ("bn_stats", "bn_normalize", "bn_forward", "bn_backward_reduce", "bn_backward_input", "bn_backward")
HOST_ONLY = {"scratch", "dtype", "keep", "norm"}
"""Parameters of mirrors that no kernel has: memory to work in, what DATA_T, sizes and other macros say, and whether
results are null."""
BETWEEN = {"channels_last/norm_forward": ["moments"]}
"""Parameters of kernels that no mirror has: what the first launch of a step leaves for the second one."""
RESULTS = {"Moments": "moments", "Statistics": "statistics", "Sums": "sums", "SecondSums": "sums"}
"""Bundles that mirrors return, and the parameters of kernels that write them."""
RETURNED = {
    "merge_moments": ["row"],
    "mean_and_var": ["mean", "var"],
    "bn_update_running": [],
    "merge_sums": ["row"],
    "dropout_draw": ["drawn"],
    "dropout": [],
    "dropout_channels": [],
    "norm_parameters": [],
    "norm_update_running": [],
}
"""Arrays that steps return beside bundles, under the names that they have in kernels."""
OVER_CHANNELS = ("merge_moments", "mean_and_var", "bn_update_running", "merge_sums")
"""The steps of batch norm that know no layout."""
ALLOCATORS = {"empty_passed"}
"""Functions beside the steps, which allocate and launch nothing."""
MOST_OF_KERNELS, MOST_OF_FUNCTIONS = 12, 8
"""Largest numbers of parameters that a kernel and a function may have."""
AS_IN_TORCH = {
    "functional.batch_norm",
    "functional.batch_norm_backward",
    "functional.batch_norm_vjp",
    "layers.batchnorm._BatchNorm.__init__",
    "layers.groupnorm.GroupNorm.__init__",
    "layers.instancenorm._InstanceNorm.__init__",
    "layers.syncbatchnorm.SyncBatchNorm.__init__",
    "norms.group.group_norm",
    "norms.instance.instance_norm",
    "norms.instance.instance_norm_vjp",
    "torch.function.batch_norm",
    "torch.layers._BatchNorm.__init__",
}
"""Functions for users that may have more parameters, since PyTorch's have them; the way back takes the same."""

KERNEL_NAMES = kernel_names()


class Pair(typing.NamedTuple):
    """A module of mirrors and the module of their launchers."""

    mirrors: types.ModuleType
    launchers: types.ModuleType


PAIRS = (
    Pair(numpy_ops, cupy_ops),
    Pair(numpy_double_backward, cupy_double_backward),
    Pair(numpy_dropout, cupy_dropout),
    Pair(numpy_norms, cupy_norms),
)
BATCH_NORM = PAIRS[0]


def stem(name):
    return name.rpartition("/")[2]


def steps(module):
    """The functions of a module that are steps, or allocate for them, by name: those that it defines for others."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == module.__name__
    }


def pair_of(name, pairs=PAIRS):
    """The one pair that a kernel belongs to: that whose mirrors have its name."""
    (pair,) = (pair for pair in pairs if stem(name) in steps(pair.mirrors))
    return pair


def kernels_of(pair):
    return [name for name in KERNEL_NAMES if pair_of(name) == pair]


def mirror(name):
    return getattr(pair_of(name).mirrors, stem(name))


def launcher(name):
    return getattr(pair_of(name).launchers, stem(name))


# ---------------------------------------------------------------------------------------------------------------------
# Bundles

TYPES = {
    "Tensor": "data_t*",
    "Vector": "Vector",
    "Doubles": "double*",
    "Counter": "long long*",
    "Passed": "passed_t*",
    "Mask": "bool*",
    "Drawn": "unsigned long long*",
    "Activation": "Activation",
    "float": "double",
    "int": "long long",
    "bool": "long long",
}
"""Types of the fields of structs in CUDA, by the types of the same fields in Python."""
WITHOUT_SHAPE = {"Activation", "double", "long long"}
SHAPE_OF_PASSED = ("N", "C", "L / WIDTH")
"""Shape of records in the header. Python's text does not say it: those of `numpy_ops.empty_passed` have another one."""
SIZES = {
    "ChannelsFirst": (geometry, "channels_first/packs.cuh"),
    "ChannelsLast": (geometry, "channels_last/columns.cuh"),
    "Rows": (row_geometry, "channels_first/rows.cuh"),
    "Samples": (sample_geometry, "channels_last/samples.cuh"),
}
"""Structs of sizes: the module and the header that declare each."""
SIZES_OF = {("channels_first", "norm"): "Rows", ("channels_last", "norm"): "Samples"}
"""Sizes that kernels take whose names begin so; those of other kernels have the name of their layout."""


class Field(typing.NamedTuple):
    name: str
    type: str  # the type in CUDA, without const
    nullable: bool
    shape: tuple[str, ...] | None


def shape_in(comment, brackets):
    """The sizes in the first brackets of a comment; None if it has none."""
    opening, closing = map(re.escape, brackets)
    found = re.search(rf"^[^;]*?{opening}([^{closing}]*){closing}", comment)
    return None if found is None else tuple(size.strip() for size in found[1].split(",") if size.strip())


def fields_in_python(text, names=None):
    """The fields of all NamedTuples in the text of a module, or of those with these names, by name of the class."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and (names is None or node.name in names):
            assert [ast.unparse(base) for base in node.bases] == ["NamedTuple"]
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            found[node.name] = [field_in_python(field, lines[field.lineno - 1 : field.end_lineno]) for field in fields]
    return found


def field_in_python(field, lines):
    type, bar, none = ast.unparse(field.annotation).partition(" | ")
    comments = " ".join(line.partition("#")[2] for line in lines)
    assert none == ("None" if bar else ""), ast.unparse(field)
    return Field(field.target.id, TYPES.get(type, type), none != "", shape_in(comments, "()"))


def fields_in_header(text, names=None):
    """The fields of all structs in the text of a header, or of those with these names; none follow a blank line."""
    bodies = re.findall(r"^struct (\w+) \{\n(.*?)^(?:\};|\s*$)", text, re.DOTALL | re.MULTILINE)
    wanted = [(name, body) for name, body in bodies if names is None or name in names]
    return {name: [field_in_header(line) for line in body.splitlines()] for name, body in wanted}


def field_in_header(line):
    declared = re.fullmatch(r"    (?:const )?([\w ]+?\*?) (\w+);\s*(?://(.*))?", line)
    assert declared is not None, line
    comment = declared[3] or ""
    return Field(declared[2], declared[1], "or null" in comment, shape_in(comment, "[]"))


def differences(ours, theirs):
    """Words for the differences between bundles in Python and structs in CUDA, each given as fields by its name."""
    found = [f"{name} is on one side alone" for name in ours.keys() ^ theirs.keys()]
    for bundle in ours.keys() & theirs.keys():
        names = [[field.name for field in side[bundle]] for side in (ours, theirs)]
        if names[0] != names[1]:
            found.append(f"{bundle} has {names[0]} and {names[1]}")
            continue
        for python, cuda in zip(ours[bundle], theirs[bundle], strict=True):
            shape = SHAPE_OF_PASSED if python.type == "passed_t*" else python.shape
            if python._replace(shape=shape) != cuda:
                found.append(f"{bundle}.{cuda.name} is {python} and {cuda}")
            if (cuda.shape is None) != (cuda.type in WITHOUT_SHAPE):
                found.append(f"{bundle}.{cuda.name} has {cuda.shape} for a shape")
    return found


def text_of(module):
    return Path(inspect.getsourcefile(module)).read_text()


def bundles_differ(python=None, header=None):
    """Words for the differences between the bundles in Python and in CUDA; either side may be given as another text."""
    python = text_of(bundles) if python is None else python
    header = (KERNELS / "bundles.cuh").read_text() if header is None else header
    return differences(fields_in_python(python), fields_in_header(header))


def sizes_differ(python=None, headers=None):
    """Words for the differences between sizes in Python and in CUDA; texts may be given, by the struct that they
    have.
    """
    ours, theirs = {}, {}
    for name, (module, _) in SIZES.items():
        ours |= fields_in_python((python or {}).get(name, text_of(module)), [name])
        theirs |= fields_in_header((headers or {}).get(name, header_of(name)), [name])
    return differences(ours, theirs)


def header_of(name):
    """The text that has a struct of sizes."""
    return (KERNELS / SIZES[name][1]).read_text()


def test_bundles_are_structs():
    assert len(fields_in_python(text_of(bundles))) >= 7
    assert bundles_differ() == []


def test_sizes_are_structs():
    assert sizes_differ() == []


def test_bundles_have_the_fields_that_their_text_has():
    for module, names in (bundles, None), *((module, [name]) for name, (module, _) in SIZES.items()):
        for name, fields in fields_in_python(text_of(module), names).items():
            assert getattr(module, name)._fields == tuple(field.name for field in fields)


def test_the_launcher_reads_what_the_headers_say():
    structs = fields_in_header((KERNELS / "bundles.cuh").read_text())
    for name in SIZES:
        structs |= fields_in_header(header_of(name), [name])
    for name in KERNEL_NAMES:
        for parameter in signature(name):
            read = [(field.name, field.type, field.nullable) for field in parameter.fields]
            assert read == [field[:3] for field in structs.get(parameter.type, [])], (name, parameter.name)


def test_kernels_take_all_bundles_and_no_other_structs():
    taken = {parameter.type for name in KERNEL_NAMES for parameter in signature(name) if parameter.fields}
    assert taken == fields_in_python(text_of(bundles)).keys() | SIZES.keys()
    for name in KERNEL_NAMES:
        folder, _, step = name.rpartition("/")
        layout = "".join(word.capitalize() for word in folder.split("_"))
        layout = SIZES_OF.get((folder, step.partition("_")[0]), layout)
        sizes = [(p.name, p.type, p.section) for p in signature(name) if p.type in SIZES]
        assert sizes == ([("sizes", layout, "sizes")] if layout else [])


def test_activations_have_one_order():
    def declared(text):
        (names,) = re.findall(r"^enum Activation : long long \{ (.+) \};", text, re.MULTILINE)
        return tuple(None if name == "NONE" else name.lower() for name in names.split(", "))

    assert declared((KERNELS / "bundles.cuh").read_text()) == bundles.ACTIVATIONS
    assert checks.ACTIVATIONS == bundles.ACTIVATIONS


CHANGES = {
    True: {  # of a field in Python
        "renamed": (r"^    (\w+):", r"    \1_2:"),
        "no Doubles": (r": Doubles\b", ": Vector"),
        "Doubles": (r": (?!Doubles\b)\w+", ": Doubles"),
        "never None": (r" \| None", ""),
        "None": (r"^(    \w+: \w+)(?! \|)\b", r"\1 | None"),
        "of another shape": (r"# \(", "# (K, "),
        "after one more": (r"^    \w+(: \w+).*$", r"    more\1\n\g<0>"),
    },
    False: {  # in CUDA
        "renamed": (r"(\w+);", r"\1_2;"),
        "no double*": (r"double\* ", "Vector "),
        "double*": (r"^    (const )?(?!double\*)[\w ]+?\*? (?=\w+;)", "    double* "),
        "never null": (r" or null", ""),
        "null": (r"^((?!.* or null).*)$", r"\1 // or null"),
        "of another shape": (r"// \[", "// [K, "),
        "after one more": (r"^    (.*?)\w+;(.*)$", r"    \1more;\2\n\g<0>"),
    },
}
"""Changes to the line of a field, in Python and in CUDA: words for each, a pattern, and what to put in its place."""


def places(text, python):
    """The lines of each field by bundle, as pairs: the number of the first one, and that after the last one."""
    if python:
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        return {
            of.name: [(f.lineno - 1, f.end_lineno) for f in of.body if isinstance(f, ast.AnnAssign)] for of in classes
        }
    found = {}
    for number, line in enumerate(text.splitlines()):
        if head := re.match(r"struct (\w+) \{", line):
            fields = found[head[1]] = []
        elif line in ("", "};"):
            fields = []
        elif found:
            fields.append((number, number + 1))
    return found


def changed(text, python, names):
    """Pairs of words for a change in a bundle and the text with this change: all changes of all fields, one by one."""
    lines = text.splitlines()
    for bundle, fields in places(text, python).items():
        for number, (begin, end) in enumerate(fields if bundle in names else ()):
            for what, (pattern, replacement) in CHANGES[python].items():
                line = re.sub(pattern, replacement, lines[begin], count=1)
                if line != lines[begin]:
                    yield f"{bundle}, field {number} {what}", [*lines[:begin], line, *lines[begin + 1 :]]
            yield f"{bundle}, field {number} gone", lines[:begin] + lines[end:]
            for after, last in fields[number + 1 : number + 2]:
                swapped = lines[after:last] + lines[end:after] + lines[begin:end]
                yield f"{bundle}, field {number} swapped", lines[:begin] + swapped + lines[last:]


def test_the_comparison_sees_a_change_of_one_side_alone():
    both = [(True, text_of(bundles)), (False, (KERNELS / "bundles.cuh").read_text())]
    names, seen = fields_in_python(text_of(bundles)), set()
    for python, text in both:
        for what, lines in changed(text, python, names):
            assert bundles_differ(**{"python" if python else "header": "\n".join(lines)}) != bundles_differ(), what
            seen.add((python, what))
    assert len(seen) > 2 * 5 * sum(map(len, names.values()))
    for name in SIZES:
        for what, lines in changed(text_of(SIZES[name][0]), True, [name]):
            assert sizes_differ(python={name: "\n".join(lines)}), what
        for what, lines in changed(header_of(name), False, [name]):
            assert sizes_differ(headers={name: "\n".join(lines)}), what


def test_the_comparison_sees_a_bundle_of_one_side_alone():
    more_python = "\n\nclass More(NamedTuple):\n    x: Tensor  # (N, C, L)\n"
    more_cuda = "\nstruct More {\n    data_t* x;  // [N, C, L]\n};\n"
    python, header = text_of(bundles) + more_python, (KERNELS / "bundles.cuh").read_text() + more_cuda
    assert bundles_differ(python=python) == bundles_differ(header=header) == ["More is on one side alone"]
    assert bundles_differ(python, header) == []


# ---------------------------------------------------------------------------------------------------------------------
# Kernels, mirrors and launchers


def test_every_step_of_batch_norm_has_a_kernel_for_each_layout():
    assert sorted(kernels_of(BATCH_NORM)) == sorted(
        [f"{layout}/{step}" for layout in LAYOUTS for step in STEPS] + [*OVER_CHANNELS]
    )


def test_every_kernel_belongs_to_one_pair_and_every_step_to_one_module():
    assert sorted(name for pair in PAIRS for name in kernels_of(pair)) == sorted(KERNEL_NAMES)
    names = [name for pair in PAIRS for name in steps(pair.mirrors) if name not in ALLOCATORS]
    assert sorted(names) == sorted({stem(name) for name in KERNEL_NAMES})
    with pytest.raises(ValueError, match="unpack"):
        pair_of("bn_stats", ())
    with pytest.raises(ValueError, match="unpack"):
        pair_of("bn_stats", (BATCH_NORM, Pair(numpy_ops, numpy_ops)))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.mirrors.__name__)
def test_mirrors_and_launchers_are_the_same_functions(pair):
    def parameters(module):
        return {
            name: [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
            for name, function in steps(module).items()
        }

    mirrors = parameters(pair.mirrors)
    assert mirrors == parameters(pair.launchers)
    assert mirrors.keys() == {stem(name) for name in kernels_of(pair)} | (ALLOCATORS & mirrors.keys())


def test_every_pair_of_modules_with_steps_is_held():
    """Modules are named as `numpy_ops` and `cupy_ops` are, and a module without the other one would have no steps."""
    folder = Path(inspect.getsourcefile(numpy_ops)).parent
    found = {path.stem for kind in ("numpy", "cupy") for path in folder.glob(f"{kind}_*.py")}
    assert found == {module.__name__.rpartition(".")[2] for pair in PAIRS for module in pair}


@pytest.mark.parametrize("step", ["bn_forward", "bn_backward"])
def test_steps_of_several_ranks_take_the_same(step):
    """The flow of a call passes the same arguments, whether there is one rank or several."""
    ours, theirs = (
        list(inspect.signature(getattr(ops, step)).parameters.values()) for ops in (Synchronized, numpy_ops)
    )
    assert [(p.name, p.default) for p in ours[1:]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_kernel_takes_what_its_mirror_takes_and_writes_what_it_returns(name):
    parameters = [p for p in signature(name) if p.name not in BETWEEN.get(name, [])]
    mirrored = inspect.signature(mirror(name))
    taken = [p for p in mirrored.parameters if p not in HOST_ONLY]
    returned = RESULTS.get(str(mirrored.return_annotation).removesuffix(" | None"))
    expected = taken + RETURNED.get(name, [returned] if returned else [])
    assert [p.name for p in parameters if p.section != "sizes"] == expected
    outputs = [p.name for p in parameters if p.section == "outputs"]
    assert outputs == expected[len(expected) - len(outputs) :]


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_bundle_is_the_same_one_in_a_kernel_its_mirror_and_its_launcher(name):
    """A bundle has the same name in all three, and where one takes None in its place, all do."""
    bundled = [p for p in signature(name) if p.fields and p.section != "sizes" and p.name not in BETWEEN.get(name, [])]
    structs = {p.name: (p.type, p.nullable) for p in bundled}
    kinds = fields_in_python(text_of(bundles)).keys()
    for function in mirror(name), launcher(name):
        found = {}
        for parameter in inspect.signature(function).parameters.values():
            kind, _, none = str(parameter.annotation).partition(" | ")
            if kind in kinds:
                found[parameter.name] = kind, none == "None"
        kind = str(inspect.signature(function).return_annotation).removesuffix(" | None")
        if kind in RESULTS:
            result = RESULTS[kind]
            found[result] = kind, "keep" in inspect.signature(function).parameters
        assert found == structs


@pytest.mark.parametrize("step", STEPS)
def test_both_layouts_take_the_same(step):
    first, last = ([p for p in signature(f"{layout}/{step}") if p.section != "sizes"] for layout in LAYOUTS)
    assert first == last


def test_numbers_that_both_sides_know():
    text = (KERNELS / "types.cuh").read_text()
    assert f"enum {{ {', '.join(name.upper() for name in FLOATS)} }};" in text
    (vector,) = fields_in_header(text, ["Vector"]).values()
    words = {"char*": np.uint64, "long long": np.int64}
    assert [(field.name, words[field.type]) for field in vector] == [
        (name, dtype) for name, (dtype, _) in arguments.VECTOR.fields.items()
    ]
    assert arguments._vector(1, -2, 3) == np.array((1, -2, 3), arguments.VECTOR).tobytes()


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_source(name):
    """One kernel of the file's name, a header that names the mirror, a shape on every pointer, no header of CUDA."""
    text = (KERNELS / f"{name}.cu").read_text()
    assert re.findall(r"__global__ void (?:CLUSTER )?REGISTERS\([^)]+\) (\w+)\(", text) == [stem(name)]
    assert text.count("__global__") == 1
    head = text.partition("\n\n")[0]
    assert head.startswith(f"// {stem(name)}: ")
    assert f"// Mirror: {mirror(name).__module__.rpartition('.')[2]}.{stem(name)}\n" in text
    parameters = text[text.index("__global__") : text.index(") {", text.index("__global__"))]
    for line in re.findall(r"^    .*(?:\*|Vector) \w+,.*$", parameters, re.MULTILINE):
        assert re.search(r"// \[[\w, +]*( / WIDTH)?\]", line), line
    whole = sources.source(name)
    assert "#include" not in whole
    assert f'#line 1 "kernels/{name}.cu"' in whole
    assert not re.search(r"atomicAdd|__restrict__|__ldg|memset", whole)


def test_the_parser_sees_a_drift(tmp_path, monkeypatch):
    """A parameter renamed, swapped or added in a source is another signature; so is a field of a bundle."""
    name = "channels_first/bn_stats"
    changes = [
        (f"{name}.cu", "Moments moments", "Moments parts"),
        (f"{name}.cu", "const long long* batches", "const double* batches"),
        (f"{name}.cu", "    ChannelsFirst sizes)", "    long long more,\n    ChannelsFirst sizes)"),
        ("bundles.cuh", "double* m2;", "double* M2;"),
        ("bundles.cuh", "double* m2;", "Vector m2;"),
        ("bundles.cuh", "double* m2;", "double* more;\n    double* m2;"),
        ("channels_first/packs.cuh", "long long N;\n    long long C;", "long long C;\n    long long N;"),
    ]
    before = signature(name)
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sources, "KERNELS", tmp_path)
    monkeypatch.setattr(sources, "source", sources.source.__wrapped__)
    for path, old, new in changes:
        text = (tmp_path / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new, 1))
        assert signature.__wrapped__(name) != before, new
        (tmp_path / path).write_text(text)
    assert signature.__wrapped__(name) == before


# ---------------------------------------------------------------------------------------------------------------------
# How many parameters


def too_many(text, module=""):
    """The functions of a module that take more than they may, by their names; self and cls are not counted."""

    def look(node, place, in_class):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                given = child.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in child.decorator_list)
                count = sum(argument is not None for argument in every) - (in_class and not static)
                if count > MOST_OF_FUNCTIONS:
                    yield f"{place}{child.name}"
                yield from look(child, f"{place}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from look(child, f"{place}{child.name}.", True)
            else:
                yield from look(child, place, in_class)

    return set(look(ast.parse(text), f"{module}." if module else "", False))


def test_functions_take_few_parameters():
    package = Path(cupybn.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        found |= too_many(path.read_text(), ".".join(path.relative_to(package).with_suffix("").parts))
    assert found == AS_IN_TORCH


def test_functions_of_many_parameters_are_seen():
    text = """
def eight(a, b, c, d, e, f, g, h): pass
def nine(a, b, c, d, e, f, g, h, i): pass
def stars(a, b, c, d, e, f, *g, h, **i): pass
class Of:
    def eight(self, a, b, c, d, e, f, g, h):
        def nine(a, b, c, d, e, f, g, *, h, i=0): pass
    if True:
        def nine(self, a, b, c, d, e, f, g, h, i): pass
    @staticmethod
    def static(a, b, c, d, e, f, g, h, i): pass
"""
    assert too_many(text) == {"nine", "stars", "Of.eight.nine", "Of.nine", "Of.static"}


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_kernels_take_few_parameters(name):
    assert len(signature(name)) <= MOST_OF_KERNELS
