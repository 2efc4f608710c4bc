"""The steps of the norms within a sample that `check` runs, by the name of kernel, mirror and launcher."""

from __future__ import annotations

import numpy as np

from cupybn._cli.cases import HALF_ULP, NEAR
from cupybn._cli.norm_cases import NormCase, NormVariant
from cupybn._cli.problem import FUSED
from cupybn._cli.sides import Result, Results, Side, Step
from cupybn._steps.bundles import Statistics, Sums


def norm_forward(case: NormCase, side: Side) -> Results:
    """The output, the statistics, and the record; that is opaque: what comes through of dy on the way back shows it."""
    x, out = side.put(case.x, case.offset), side.out(case.x, case.offset)
    affine, epilogue = side.put_all(case.affine), side.put_all(case.epilogue, case.offset)
    passed = side.ops.empty_passed(x, case.norm, epilogue.residual, out) if case.noted else None
    epilogue = epilogue._replace(passed=passed)
    pairs = side.host(side.ops.norm_forward(x, case.norm, affine, epilogue, out).pairs)
    mean, var = pairs.T
    std = np.sqrt(case.statistics.var)
    results = {
        "y": Result(side.host(out), 8, case.terms()),
        "mean": Result(mean, 4, (std if case.norm.centered else 0) + np.abs(mean) * HALF_ULP["float64"] / case.unit),
        "var": Result(var, 8, var),
    }
    if case.noted:
        gradients, dy = case.gradients(side), side.put(case.dy, case.offset)
        statistics, back = side.put_all(case.statistics), epilogue._replace(residual=None)
        side.ops.norm_backward(dy, x, case.norm, statistics, affine, back, gradients)
        clear = np.abs(case.before_activation) > NEAR / 10
        results["record"] = Result(np.where(clear, side.host(gradients.dresidual), 0), 0, 0)
    return results


def norm_backward(case: NormCase, side: Side) -> Results:
    """The gradients of input and residual, and the sums, from the same statistics."""
    dy, x = side.put(case.dy, case.offset), side.put(case.x, case.offset)
    statistics, affine = side.put_all(case.statistics), side.put_all(case.affine)
    epilogue, gradients = side.put_all(case.epilogue, case.offset), case.gradients(side)
    if case.noted:
        passed = side.ops.empty_passed(x, case.norm, epilogue.residual, gradients.dx)
        epilogue = epilogue._replace(passed=passed)
        side.ops.norm_forward(x, case.norm, affine, epilogue, side.out(case.x, case.offset))
    back = epilogue._replace(residual=None)
    sums = side.host_all(side.ops.norm_backward(dy, x, case.norm, statistics, affine, back, gradients))
    g = np.abs(case.dy.astype(np.float64))
    results = {
        "dx": Result(side.host(gradients.dx), 25, case.gradient_terms()),
        "sum of dy": Result(sums.dy.sum(axis=0), 32, g.sum((0, 1, 3))),
        "sum of dy * xhat": Result(sums.dy_xhat.sum(axis=0), 32, (g * np.abs(case.xhat)).sum((0, 1, 3))),
    }
    if case.noted:
        results["dresidual"] = Result(side.host(gradients.dresidual), 0, 0, exact=True)
    return results


def norm_parameters(case: NormCase, side: Side) -> Results:
    """The gradients of weight and bias, from sums in two parts."""
    parts = Sums(*(np.concatenate([part, -3 * part]) for part in case.sums))
    dweight, dbias = side.out(case.weight), side.out(case.bias)
    side.ops.norm_parameters(side.put_all(parts), dweight, dbias)
    hosts = {"dweight": side.host(dweight), "dbias": side.host(dbias)}
    return {name: Result(host, 8, np.abs(host.astype(np.float64))) for name, host in hosts.items()}


def norm_update_running(case: NormCase, side: Side) -> Results:
    """Running statistics, from those of as many samples as the shape has, each channel a row."""
    rng = np.random.default_rng(1)
    rows = case.shape[0] * case.shape[2]
    statistics = Statistics.of(rng.standard_normal(rows), rng.uniform(0.5, 2, rows))
    running = side.put_all(case.running)
    side.ops.norm_update_running(side.put_all(statistics), running, max(case.count, 2.0))
    mean, var = side.host(running.mean), side.host(running.var)
    unit = HALF_ULP["float64"] / case.unit
    return {
        "running_mean": Result(mean, 8 * unit, np.abs(mean) + 2),
        "running_var": Result(var, 8 * unit, var),
    }


def norm_steps(op: str) -> dict[str, Step]:
    """The steps of a function, with the variants that it needs."""
    bare = NormVariant(op)
    fused = (bare, NormVariant(op, "relu"), NormVariant(op, None, True), NormVariant(op, "relu", True))
    forward = fused if op in FUSED else (bare,)
    steps = {
        "norm_forward": Step(norm_forward, forward),
        "norm_backward": Step(norm_backward, tuple(v for v in forward if v.activation or not v.has_residual)),
        "norm_parameters": Step(norm_parameters, (bare,)),
    }
    return steps | ({"norm_update_running": Step(norm_update_running, (bare,))} if op == "instance_norm" else {})
