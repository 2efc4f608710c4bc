"""The layers of the examples have the right gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cupybn import BatchNorm2d

pytest.importorskip("threadpoolctl")
sys.path.append(str(Path(__file__).parent.parent / "examples"))
layers = pytest.importorskip("layers")


def network(rng, device):
    return layers.Sequential(
        layers.Conv2d(rng, 2, 3, stride=2),
        BatchNorm2d(3, activation="relu", device=device, dtype=np.float64),
        layers.Conv2d(rng, 3, 4),
        layers.Bias(4, activation="relu"),
        layers.MaxPool2d(),
        layers.GlobalAveragePool(),
        layers.Linear(rng, 4, 5),
    )


def test_gradients_are_the_slopes_of_the_loss(xp, device, rng, monkeypatch):
    """Along a random direction of x and all parameters, in float64."""
    monkeypatch.setattr(layers, "xp", xp)
    net = network(rng, device)
    for layer in net.layers:
        for name in getattr(layer, "names", ()):
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    x, labels = xp.asarray(rng.standard_normal((6, 2, 8, 8))), xp.asarray(rng.integers(0, 5, 6))

    scores, vjp_fn = net.vjp(x)
    _, dscores = layers.softmax_cross_entropy(scores, labels)
    grads = vjp_fn(dscores)
    values = [x, *net.parameters()]
    assert [g.shape for g in grads] == [v.shape for v in values]
    directions = [xp.asarray(rng.standard_normal(v.shape)) for v in values]

    def loss(step):
        for value, direction in zip(values, directions, strict=True):
            value += step * direction
        result = layers.softmax_cross_entropy(net(x), labels)[0]
        for value, direction in zip(values, directions, strict=True):
            value -= step * direction
        return result

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)
