"""Script that prints the public names of the CuPy that Python finds as JSON: kinds, parameters and numbers.

Real CuPy is made of Cython: where `inspect.signature` knows nothing, the first line of the docstring does.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from typing import Any

MODULES = (
    "cupy",
    "cupy.lib",
    "cupy.lib.stride_tricks",
    "cupy.cuda",
    "cupy.cuda.device",
    "cupy.cuda.driver",
    "cupy.cuda.graph",
    "cupy.cuda.memory",
    "cupy.cuda.nccl",
    "cupy.cuda.pinned_memory",
    "cupy.cuda.runtime",
    "cupy.cuda.stream",
    "cupyx",
    "cupyx.distributed",
    "cupyx.distributed._nccl_comm",
)
STATUSES = (1, 100, 101, 400, 401, 500, 600, 700, 719, 900, 901, 905, 906, 907, 908, 912)
"""Numbers of the errors of CUDA's runtime that the stand-in knows."""

Entry = dict[str, Any]


def parameters(thing: Any) -> list[str] | None:
    """Names of parameters as ``name``, ``name=`` (with a default), ``*``, ``*args``, ``**kwargs``; None if unknown."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return from_docstring(thing)
    found = []
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not {"*", "*args"} & set(found):
            found.append("*")
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind)
        found.append(f"{prefix}{'args' if prefix == '*' else 'kwargs'}" if prefix else name_of(p.name, p.default))
    return (from_docstring(thing) or found) if found[-2:] == ["*args", "**kwargs"] else found


def name_of(name: str, default: object) -> str:
    """The name of a parameter, with a sign of equality if there is a default."""
    return name if default is inspect.Parameter.empty else f"{name}="


def from_docstring(thing: Any) -> list[str] | None:
    """Parameters in the first line of a docstring, such as ``alloc_pinned_memory(size_t size) -> PinnedMemory``."""
    first = (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]
    match = re.match(r"[\w.]+\((.*?)\)(?:\s*->.*)?$", first)
    if match is None:
        return None
    found = []
    for part in split(match[1].replace("\\", "")):
        if part.startswith("**"):
            found.append("**kwargs")
        elif part.startswith("*"):
            found.append("*" if part == "*" else "*args")
        elif part != "/":
            name, equals, _ = part.partition("=")
            found.append(name.partition(":")[0].split()[-1].lstrip("*") + ("=" if equals else ""))
    return found


def split(text: str) -> list[str]:
    """The parts of a text between commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def kind_of(thing: Any) -> str:
    """The kind of a thing, as far as a program can tell."""
    if inspect.ismodule(thing):
        return "module"
    if inspect.isclass(thing):
        return "class"
    if callable(thing):
        return "function"
    if isinstance(thing, property) or inspect.isgetsetdescriptor(thing) or inspect.ismemberdescriptor(thing):
        return "property"
    return "value"


def describe(thing: Any) -> Entry:
    """The entry of a thing: its kind, and the parameters, members or value that it has."""
    entry: Entry = {"kind": kind_of(thing)}
    if entry["kind"] in ("function", "class"):
        found = parameters(thing)
        entry["parameters"] = found[1:] if found and found[0] == "self" else found
    if entry["kind"] == "class":
        entry["members"] = {name: describe(member(thing, name)) for name in members(thing)}
    if isinstance(thing, (int, float)) and not isinstance(thing, bool):
        entry["value"] = thing
    return entry


def members(of: type) -> list[str]:
    """The public names in a class, but for those of Python's own classes."""
    inherited = {name for base in of.__mro__ if base.__module__ == "builtins" for name in vars(base)}
    return [
        name
        for name in dir(of)
        if (not name.startswith("_") or name in ("__cuda_array_interface__", "__call__")) and name not in inherited
    ]


def member(of: type, name: str) -> Any:
    """The member of this name in a class or, where that is a descriptor of no known kind, the value that it gives."""
    static = inspect.getattr_static(of, name, None)
    return getattr(of, name, static) if static is None or kind_of(static) == "value" else static


def inventory() -> dict[str, Any]:
    """Entries by module and name, and the texts of the runtime's errors by their numbers."""
    found: dict[str, Any] = {}
    for module_name in MODULES:
        module = module_of(module_name)
        found[module_name] = {
            name: entry for name in sorted(dir(module)) if (entry := entry_of(module, name)) is not None
        }
    cupy = importlib.import_module("cupy")
    made_on_demand = {name for name in dir(importlib.import_module("numpy")) if not name.startswith("_")}
    for name in sorted(made_on_demand - found["cupy"].keys()):
        if hasattr(cupy, name):  # its parameters are those of NumPy's function
            found["cupy"][name] = {"kind": kind_of(getattr(cupy, name))}
    found["errors"] = {str(status): str(cupy.cuda.runtime.CUDARuntimeError(status)) for status in STATUSES}
    return found


def module_of(dotted: str) -> Any:
    """A module by its name in its package, which need not be that of its file."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        package, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(package), name)


def entry_of(module: Any, name: str) -> Entry | None:
    """The entry of a name in a module; None if it is private, or the module has imported it for itself."""
    thing = getattr(module, name)
    if name.startswith("_") or name == "annotations":
        return None
    if inspect.ismodule(thing) and not thing.__name__.startswith(("cupy", "cupyx")):
        return None
    owner = getattr(thing, "__module__", None)
    if module.__name__ != "cupy" and isinstance(owner, str) and not owner.startswith(("cupy", "cupyx")):
        return None
    own = not inspect.ismodule(thing) and (owner == module.__name__ or kind_of(thing) == "value")
    public = getattr(module, "__all__", None)
    return describe(thing) | {"public": own if public is None else name in public}


if __name__ == "__main__":
    print(json.dumps(inventory()))
