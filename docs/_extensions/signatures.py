"""Signatures with the types as the source has them, such as ``Array | None``, and not what these stand for."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

NAMES = {
    "_BatchNorm": "Layer",
    "npt.DTypeLike": "DTypeLike",
    "BatchNormGrads": "~cupybn.functional.BatchNormGrads",
    "DropoutGrads": "~cupybn.functional.DropoutGrads",
    "DropoutVjpFn": "~cupybn.functional.DropoutVjpFn",
    "Generator": "~cupybn.Generator",
    "Grads": "tuple",
    "GroupNormGrads": "~cupybn.functional.GroupNormGrads",
    "IncompatibleKeys": "~cupybn.IncompatibleKeys",
    "InstanceNormGrads": "~cupybn.functional.InstanceNormGrads",
    "LayerNormGrads": "~cupybn.functional.LayerNormGrads",
    "NormVjpFn": "~cupybn.functional.NormVjpFn",
    "RMSNormGrads": "~cupybn.functional.RMSNormGrads",
    "SecondVjpFn": "~cupybn.functional.SecondVjpFn",
    "VjpFn": "~cupybn.functional.VjpFn",
}
"""Names in annotations, and what the page has in their place: what the reader can write, and links can find."""
RETURNED = ("DropoutVjpFn", "NormVjpFn", "SecondVjpFn", "VjpFn")
"""Classes whose objects are returned by functions, and made by nobody else."""
KNOWN = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}\b" for name in NAMES))


def as_in_source(
    app: Sphinx,  # noqa: ARG001
    what: str,
    name: str,  # noqa: ARG001
    subject: Any,
    options: object,  # noqa: ARG001
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """The arguments and the result of what is documented, as its annotations are written."""
    if arguments is None:
        return arguments, returns
    if what == "class" and subject.__name__ in RETURNED:
        return "", None
    function = subject.__init__ if what == "class" else subject
    if not inspect.isroutine(function):
        return arguments, returns
    signature = inspect.signature(function)
    names = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    is_context = not inspect.isgeneratorfunction(function) and inspect.isgeneratorfunction(inspect.unwrap(function))
    result = signature.empty if what == "class" or is_context else signature.return_annotation
    text = stringify_signature(signature.replace(parameters=names, return_annotation=result))
    arguments, _, returns = KNOWN.sub(lambda known: NAMES[known[0]], text).partition(" -> ")
    return arguments, returns or None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the event."""
    app.connect("autodoc-process-signature", as_in_source)
    return {"parallel_read_safe": True}
