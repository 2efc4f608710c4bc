"""Names and arguments that the files of this repository use of CuPy, and that CuPy does not have or does not take.

Names are followed through simple assignments, scope by scope; what cannot be followed is not looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.real_cupy.names import parts

FOLDERS = ("cupybn", "examples", "benchmarks", "tests")
MODULES = ("cupy", "cp", "xp")
"""Names that stand for the module wherever a function has a parameter of that name."""
ARRAYS = ("array", "asarray", "ascontiguousarray", "asfortranarray", "arange", "broadcast_to", "concatenate")
LIKE = ("empty", "full", "ones", "zeros")
RESULTS = {
    "cupy.cuda.get_current_stream": "cupy.cuda.Stream",
    "cupy.cuda.Stream.record": "cupy.cuda.Event",
    "cupy.cuda.Stream.end_capture": "cupy.cuda.Graph",
    "cupy.cuda.alloc_pinned_memory": "cupy.cuda.PinnedMemoryPointer",
    "cupy.get_default_memory_pool": "cupy.cuda.MemoryPool",
    "cupy.RawModule.get_function": "cupy.RawKernel",
    "cupyx.distributed.init_process_group": "cupyx.distributed.NCCLBackend",
    **{f"cupy.{name}": "cupy.ndarray" for name in (*ARRAYS, *LIKE, *(f"{name}_like" for name in LIKE))},
}
"""Classes of the objects that functions return."""
ATTRIBUTES = {
    "cupy.ndarray.data": "cupy.cuda.MemoryPointer",
    "cupy.ndarray.device": "cupy.cuda.Device",
    "cupy.cuda.Stream.null": "cupy.cuda.Stream",
    "cupy.cuda.Stream.ptds": "cupy.cuda.Stream",
    "cupyx.distributed.NCCLBackend._comm": "cupy.cuda.nccl.NcclCommunicator",
}
"""Classes of the objects that attributes are."""
OF_INSTANCES = {
    "cupy.cuda.Stream": ("ptr", "device_id"),
    "cupy.cuda.Event": ("ptr",),
    "cupy.cuda.runtime.CUDARuntimeError": ("status",),
    "cupy.cuda.driver.CUDADriverError": ("status",),
    "cupy.cuda.nccl.NcclError": ("status",),
    "cupyx.distributed.NCCLBackend": ("_comm", "rank", "_n_devices"),
}
"""Attributes that constructors set, so that a list of the members of the class does not have them."""


class Uses(ast.NodeVisitor):
    """Collector of the dotted names of CuPy in a file; `found` has each with its line and, if called, the call."""

    def __init__(self, text: str) -> None:
        self.scopes: list[dict[str, str | None]] = [{}]
        self.found: list[tuple[str, int, ast.Call | None]] = []
        self.visit(ast.parse(text))

    def resolve(self, node: ast.AST) -> str | None:
        """The dotted name of what an expression stands for or, if that is an object, of its class; None if unknown."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.scopes[0].get(f"self.{node.attr}")
            base = self.resolve(node.value)
            return base and ATTRIBUTES.get(f"{base}.{node.attr}", f"{base}.{node.attr}")
        return self.resolve_call(node) if isinstance(node, ast.Call) else None

    def resolve_call(self, node: ast.Call) -> str | None:
        if isinstance(node.func, ast.Name) and node.func.id == "import_cupy":
            return "cupy"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip":
            name = ast.literal_eval(node.args[0])
            return name if is_cupy(name) else None
        called = self.resolve(node.func)
        if called is None or called in RESULTS:
            return called and RESULTS[called]
        last = called.rpartition(".")[2]
        return called if last[0].isupper() or last == "ndarray" else None

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        """Note what a name stands for from now on."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for t, v in zip(target.elts, value.elts, strict=False):
                self.bind(t, v)
        elif isinstance(target, ast.Name):
            self.scopes[-1][target.id] = self.resolve(value)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.scopes[0][f"self.{target.attr}"] = self.resolve(value)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_cupy(alias.name):
                root = alias.name.partition(".")[0]
                self.scopes[-1][alias.asname or root] = alias.name if alias.asname else root

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if is_cupy(node.module or ""):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                self.scopes[-1][alias.asname or alias.name] = path
                self.found.append((path, node.lineno, None))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        if not isinstance(node, ast.Lambda):
            for decorator in node.decorator_list:
                self.visit(decorator)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append({a.arg: "cupy" if a.arg in MODULES else None for a in arguments})
        for statement in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(statement)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.bind(target, node.value)
            if not isinstance(target, ast.Name):
                self.visit(target)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, item.context_expr)
        for statement in node.body:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        path = self.resolve(node.func)
        if path and is_cupy(path) and isinstance(node.func, ast.Name) and node.func.id[0].islower():
            path += ".__call__" * path.rpartition(".")[2][0].isupper()  # an object is called, not its class
        if path and is_cupy(path):
            self.found.append((path, node.lineno, node))
            self.visit(node.func.value if isinstance(node.func, ast.Attribute) else node.func)
        else:
            self.visit(node.func)
        for child in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = self.resolve(node.value)
        if base and is_cupy(base):
            self.found.append((f"{base}.{node.attr}", node.lineno, None))
        self.visit(node.value)


def is_cupy(dotted: str) -> bool:
    """Whether a name begins with that of one of CuPy's packages."""
    return dotted.partition(".")[0] in ("cupy", "cupyx")


def wrong_uses(root: Path, real: dict[str, Any]) -> list[str]:
    """The wrong uses in all files, with file and line."""
    found = []
    for path in (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))):
        file = path.relative_to(root)
        if file.parts[:2] != ("tests", "emulated"):
            found += [f"{file}:{line}: {what}" for line, what in wrong_in_text(path.read_text(), real)]
    return found


def wrong_in_text(text: str, real: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The wrong uses in the text of one file, with their lines."""
    for dotted, line, call in Uses(text).found:
        owner, _, attribute = dotted.rpartition(".")
        if ".emulator" in dotted or attribute in (*OF_INSTANCES.get(owner, ()), *dir(BaseException)):
            continue
        if re.search(r"\._", dotted):  # private names: the tests of the stand-in look into it
            continue
        entry = look_up(dotted, real)
        if entry is None:
            yield line, f"CuPy has no {dotted}"
        elif call is not None and entry.get("parameters") is not None:
            wrong = misfit(call, entry["parameters"])
            if wrong:
                yield line, f"{dotted}: {wrong} (CuPy takes {entry['parameters']})"


def look_up(path: str, real: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of a dotted name; None if CuPy does not have it, an empty entry if the list does not tell."""
    names = path.split(".")
    length = next((n for n in range(len(names), 0, -1) if ".".join(names[:n]) in real), 0)
    entry: dict[str, Any] = {"members": real.get(".".join(names[:length]), {})}
    for name in names[length:]:
        if "members" not in entry:
            return {}
        if name not in entry["members"]:
            return None
        entry = entry["members"][name]
    return entry


def misfit(call: ast.Call, theirs: list[str]) -> str:
    """Words for the arguments of a call that are not taken; empty if all are."""
    positional, keywords = parts(theirs)
    wrong = []
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    if len(call.args) > len(positional) and "*args" not in theirs and not starred:
        wrong.append(f"{len(call.args)} positional arguments, {len(positional)} are taken")
    if "**kwargs" not in theirs:
        names = {keyword.arg for keyword in call.keywords} - {None, *positional, *keywords}
        wrong += [f"no keyword {name}" for name in sorted(map(str, names))]
    return ", ".join(wrong)
