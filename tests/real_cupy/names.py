"""Names of the stand-in that CuPy does not have, or has with other kinds, parameters or values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]


def differences(stand_in: dict[str, Any], real: dict[str, Any]) -> dict[str, str]:
    """Reasons why a program that works with the stand-in fails with CuPy, by the dotted names that it uses."""
    found: dict[str, str] = {}
    for module, entries in stand_in.items():
        if module == "errors":
            texts = real["errors"]
            found |= {f"error {k}": f"{v!r}, in CuPy {texts[k]!r}" for k, v in entries.items() if v != texts[k]}
            continue
        for name, entry in entries.items():
            found |= dict(of_entry(f"{module}.{name}", entry, real[module].get(name)))
    return found


def of_entry(path: str, ours: Entry, theirs: Entry | None) -> Iterator[tuple[str, str]]:
    """The differences of one name and of its members, as pairs of a dotted name and a reason."""
    if theirs is None:
        if ours.get("public", True):
            yield path, f"only the stand-in has it ({ours['kind']})"
        return
    kinds = {ours["kind"], theirs["kind"]}
    if len(kinds) == 2 and kinds != {"property", "value"}:
        yield path, f"a {ours['kind']}, in CuPy a {theirs['kind']}"
        return
    if {"value"} <= ours.keys() & theirs.keys() and ours["value"] != theirs["value"]:
        yield path, f"{ours['value']}, in CuPy {theirs['value']}"
    wrong = unlike(ours.get("parameters"), theirs.get("parameters"))
    if wrong:
        yield path, f"{wrong} (takes {ours['parameters']}, in CuPy {theirs['parameters']})"
    for name, entry in ours.get("members", {}).items():
        yield from of_entry(f"{path}.{name}", entry, theirs.get("members", {}).get(name))


def unlike(ours: list[str] | None, theirs: list[str] | None) -> str:
    """Reasons why a call that fits the stand-in's parameters can fail in CuPy; empty if there are none."""
    if ours is None or theirs is None or "*args" in ours:
        return ""
    positional, keywords = parts(ours)
    their_positional, their_keywords = parts(theirs)
    takes_any = "**kwargs" in theirs
    wrong = []
    if "*args" not in theirs:
        for i, name in enumerate(positional):
            if i < len(their_positional) and their_positional[i] != name:
                wrong.append(f"parameter {i} is {their_positional[i]}, not {name}")
            elif i >= len(their_positional) and name not in their_keywords and not takes_any:
                wrong.append(f"{name} is not taken")
    known = their_positional + their_keywords
    wrong += [f"keyword {name} is not taken" for name in keywords if name not in known and not takes_any]
    needed = [name for name in theirs if name.isidentifier() and name not in positional + keywords]
    return ", ".join(wrong + [f"{name} is needed" for name in needed])


def parts(found: list[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters that can be passed by position, and of those that cannot."""
    end = next((i for i, name in enumerate(found) if name in ("*", "*args")), len(found))
    names = [[name.rstrip("=") for name in half if not name.startswith("*")] for half in (found[:end], found[end:])]
    return names[0], names[1]
