"""Names that frameworks have for the arrays of a batch norm layer, and the shapes that vectors have there."""

from __future__ import annotations

from collections.abc import Mapping

from cupybn._arrays.kinds import show

COUNTER = "num_batches_tracked"
"""Name of the counter of batches, the only one of a layer's arrays that a state may leave out."""

TORCH = ("weight", "bias", "running_mean", "running_var", COUNTER)
"""Names of the arrays in PyTorch and here, in the order of state dicts."""

NAMES: dict[str, dict[str, str]] = {
    framework: dict(zip(TORCH, theirs, strict=False))
    for framework, theirs in {
        "torch": TORCH,
        "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
        "flax": ("scale", "bias", "mean", "var"),
        "chainer": ("gamma", "beta", "avg_mean", "avg_var", "N"),
        "onnx": ("scale", "B", "input_mean", "input_var"),
    }.items()
}
"""Names of each framework by those of PyTorch. Some frameworks count no batches."""


def names_of(framework: str) -> Mapping[str, str]:
    """Names that a framework has, by those of PyTorch.

    Raises
    ------
    ValueError
        If the framework is unknown. The message lists those that are known.
    """
    if isinstance(framework, str) and framework in NAMES:
        return NAMES[framework]
    way_out = ""
    if isinstance(framework, str) and framework.lower() in NAMES:
        way_out = f"; did you mean names={framework.lower()!r}?"
    raise ValueError(f"unknown names {show(framework)}: expected one of {', '.join(map(repr, NAMES))}{way_out}")


def is_vector(shape: tuple[int, ...], framework: str) -> bool:
    """Whether an array of this shape may be a vector: (C,) in PyTorch; elsewhere (1, C, 1, 1) and the like as well."""
    return len(shape) == 1 or (framework != "torch" and len(shape) > 1 and sum(n != 1 for n in shape) <= 1)
