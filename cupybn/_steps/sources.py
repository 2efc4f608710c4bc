"""The one place that finds and reads the CUDA sources.

A kernel is the one ``extern "C" __global__`` function of a ``.cu`` file, with the file's name. What it takes is read
from its source: parameters stand one per line, with a comment that says "or null" where None is meant, and with
``// outputs`` and ``// sizes`` in between. So do the fields of structs, which go by value.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

_package = Path(__file__).parents[1]
KERNELS = next((d for d in (_package / "kernels", _package.parent / "kernels") if d.is_dir()), _package / "kernels")
"""The folder of the ``.cu`` files: ``cupybn/kernels`` in a wheel, ``kernels`` in a checkout."""


def kernel_names() -> list[str]:
    """Names of all kernels, which are the paths of their files: ``"channels_first/bn_stats"``."""
    return sorted(path.relative_to(KERNELS).with_suffix("").as_posix() for path in KERNELS.rglob("*.cu"))


@functools.cache
def source(name: str) -> str:
    """Text of a kernel with that of its headers in front: CuPy's cache of compiled kernels does not see headers."""
    return _with_headers(KERNELS / f"{name}.cu", set())


def _with_headers(path: Path, seen: set[Path]) -> str:
    """Text of a file and, once each, its headers; ``#line`` keeps places in messages of compilers right."""
    if path.resolve() in seen:
        return ""
    seen.add(path.resolve())
    label = f"kernels/{path.resolve().relative_to(KERNELS.resolve()).as_posix()}"
    lines = [f'#line 1 "{label}"']
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        include = re.fullmatch(r'#include "(.+)"', line)
        if include:
            lines += [_with_headers(path.parent / include[1], seen), f'#line {number + 1} "{label}"']
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


class Parameter(NamedTuple):
    """A parameter of a kernel or a field of a struct, as the source declares it."""

    name: str
    type: str  # the type without const: "data_t*", "double", "long long", "Vector", "Affine", ...
    section: str  # "inputs", "outputs" or "sizes"
    nullable: bool
    fields: tuple[Parameter, ...] = ()  # fields of a struct; none for all else
    names: tuple[str, ...] = ()  # names in an enum; none for all else


@functools.cache
def signature(name: str) -> tuple[Parameter, ...]:
    """The parameters of a kernel, in order."""
    stem, text = name.rpartition("/")[2], source(name)
    head = re.search(rf'extern "C" __global__ void (?:\w+(?:\([^)]*\))? )*{stem}\((.*?)\) \{{', text, re.DOTALL)
    assert head is not None, f"{name}.cu has no kernel of its name"
    section, parameters = "inputs", []
    for line in head[1].strip().splitlines():
        heading = re.fullmatch(r"\s*// (outputs|sizes)", line)
        if heading:
            section = heading[1]
        else:
            parameters.append(_declared(name, line, section))
    return tuple(parameters)


def _declared(name: str, line: str, section: str) -> Parameter:
    """The parameter of a kernel, or the field of a struct, that a line of its source declares."""
    declared = re.fullmatch(r"\s*(?:const )?(.+?)\s+(\w+)[,;]?\s*(?://(.*))?", line)
    assert declared is not None, f"{name}.cu: {line.strip()!r} is no parameter"
    type, variable, comment = declared.groups()
    definitions = _definitions(source(name))
    body = "" if type == "Vector" else definitions.get(("struct", type), "")
    fields = tuple(_declared(name, field, section) for field in body.splitlines())
    names = tuple(re.findall(r"\w+", definitions.get(("enum", type), "")))
    return Parameter(variable, type, section, "or null" in (comment or ""), fields, names)


@functools.cache
def _definitions(text: str) -> dict[tuple[str, str], str]:
    """The fields of structs and the names of enums in a source, up to a blank line, by ("struct" or "enum", type).

    A source is searched once for all of them: it is long.
    """
    pattern = r"^(struct|enum) (\w+)(?: : [\w ]+)? \{\s*(.*?)\s*(?:\n\n|\})"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return {(kind, type): body for kind, type, body in found}
