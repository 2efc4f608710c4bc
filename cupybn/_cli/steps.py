"""The steps of batch norm that `check` runs, by the name of kernel, mirror and launcher."""

from __future__ import annotations

import numpy as np

from cupybn._cli import formula
from cupybn._cli.cases import HALF_ULP, MOMENTUM, NEAR, Case, Variant
from cupybn._cli.sides import Result, Results, Side, Step
from cupybn._steps import numpy_ops
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Statistics, Sums, Tensor


def bn_stats(case: Case, side: Side) -> Results:
    """The parts merge to the mean and the squared deviations of the whole, which is what a user sees of them."""
    x, counter = side.put(case.given(case.x), case.offset), side.put(np.array(5))
    mask = None if case.mask is None else side.put(case.mask, case.offset)
    parts = side.host_all(side.ops.bn_stats(x, counter, mask=mask))
    count, mean, m2, _ = Moments.of_rows(numpy_ops.merge_moments(parts))
    std = np.sqrt(m2 / count)
    return {
        "count": Result(count, 0, 0),
        "batches": Result(np.asarray(parts.batches), 0, 0),
        "mean": Result(mean, 4, std),
        "m2": Result(m2, 8, m2),
    }


def mean_and_var(case: Case, side: Side) -> Results:
    """Mean and variance, from moments in three parts, rounded to both dtypes."""
    results = {}
    for dtype in np.float32, np.float64:
        both = side.ops.mean_and_var(side.put_all(case.moments), np.dtype(dtype))
        for name, vector in zip(("mean", "var"), both, strict=True):
            host = side.host(vector)
            results[f"{name} {np.dtype(dtype)}"] = Result(host, 4 * HALF_ULP["float64"] / case.unit, np.abs(host))
    return results


def merge_moments(case: Case, side: Side) -> Results:
    """Merged moments, from three parts as steps leave them, and from rows as ranks exchange them."""
    moments = side.put_all(case.moments)
    rows = side.put(np.stack([np.hstack(part) for part in zip(*case.moments[:3], strict=True)]))
    ours = {"row": side.ops.merge_moments(moments), "row of rows": side.ops.merge_moments(Moments.of_rows(rows))}
    hosts = {name: side.host(row) for name, row in ours.items()}
    return {name: Result(row, 8 * HALF_ULP["float64"] / case.unit, np.abs(row)) for name, row in hosts.items()}


def bn_update_running(case: Case, side: Side) -> Results:
    """Running statistics and counter, from moments in one part; and where these are not finite, and are skipped."""
    moments = Moments(*(field[:1].copy() for field in case.moments[:3]))
    running = side.put_all(Running(case.statistics.mean, case.statistics.var, MOMENTUM, np.array(2)))
    side.ops.bn_update_running(side.put_all(moments), running)
    mean, var = side.host(running.mean), side.host(running.var)
    moments.mean[0, -1] = np.inf
    skipping = running._replace(skip_nonfinite=True)
    side.ops.bn_update_running(side.put_all(moments), skipping)
    return {
        "skipped": Result(np.abs(side.host(skipping.mean) - mean) + np.abs(side.host(skipping.var) - var), 0, 0),
        "running_mean": Result(mean, 4 * HALF_ULP["float64"] / case.unit, np.abs(mean) + 2),
        "running_var": Result(var, 4 * HALF_ULP["float64"] / case.unit, var),
        "num_batches_tracked": Result(side.host(running.batches), 0, 0),
    }


def bn_normalize(case: Case, side: Side) -> Results:
    """The output, from the same moments, or from running statistics."""
    moments = side.put_all(case.moments) if case.training else None
    forward = _Forward(case, side)
    statistics = side.ops.bn_normalize(
        forward.x, moments, forward.affine, forward.running, forward.epilogue, forward.out
    )
    used = Statistics.of(*formula.mean_and_var(case.moments, np.float64)) if case.training else case.statistics
    return forward.results(statistics, used, exact=not case.training)


def bn_forward(case: Case, side: Side) -> Results:
    """The output and the statistics, from x alone."""
    forward = _Forward(case, side)
    statistics = side.ops.bn_forward(forward.x, forward.affine, forward.running, forward.epilogue, forward.out)
    return forward.results(statistics, case.batch_statistics(), exact=False)


def bn_backward_reduce(case: Case, side: Side) -> Results:
    """The sums of gradients, from the same statistics."""
    sums = side.host_all(side.ops.bn_backward_reduce(*backward_arguments(case, side)))
    terms = np.abs(case.dy.astype(np.float64))
    return {
        "sum of dy": Result(sums.dy.sum(axis=0), 32, terms.sum((0, 2))),
        "sum of dy * xhat": Result(
            sums.dy_xhat.sum(axis=0), 32, (terms * np.abs(case.xhat(case.statistics))).sum((0, 2))
        ),
    }


def merge_sums(case: Case, side: Side) -> Results:
    """The merged sums, from two parts."""
    parts = Sums(*(np.concatenate([part, -3 * part]) for part in case.sums))
    dweight, dbias = side.out(case.weight), side.out(case.bias)
    row = side.host(side.ops.merge_sums(side.put_all(parts), side.put(np.array([float(case.count)])), dweight, dbias))
    hosts = {"row": row, "dweight": side.host(dweight), "dbias": side.host(dbias)}
    return {name: Result(host, 8, np.abs(host.astype(np.float64))) for name, host in hosts.items()}


def bn_backward_input(case: Case, side: Side) -> Results:
    """The gradients, from the same statistics and sums."""
    gradients = _empty_gradients(case, side)
    _, inv_count = case.statistics_given()
    side.ops.bn_backward_input(*backward_arguments(case, side), side.put_all(case.sums), inv_count, gradients)
    return _gradient_results(case, side.host_all(gradients), case.sums)


def bn_backward(case: Case, side: Side) -> Results:
    """The gradients, from the same statistics."""
    gradients = _empty_gradients(case, side)
    _, inv_count = case.statistics_given()
    side.ops.bn_backward(*backward_arguments(case, side), inv_count, gradients)
    return _gradient_results(case, side.host_all(gradients), None)


class _Forward:
    """The arguments of a step that writes the output, and after it their results."""

    def __init__(self, case: Case, side: Side) -> None:
        self.case, self.side = case, side
        self.x, self.out = side.put(case.given(case.x), case.offset), side.out(case.x, case.offset)
        self.affine, self.running = side.put_all(case.affine), side.put_all(case.running)
        residual = case.epilogue.residual
        given = case.epilogue._replace(residual=None if residual is None else case.given(residual))
        epilogue = side.put_all(given, case.offset)
        masks = () if epilogue.mask is None else (epilogue.mask,)
        passed = side.ops.empty_passed(self.x, epilogue.residual, self.out, *masks) if case.noted else None
        self.epilogue = epilogue._replace(passed=passed)

    def results(self, statistics: Statistics, used: Statistics, exact: bool) -> Results:
        """All results of the step. The record is opaque: what comes through of dy on the way back shows it."""
        case, side = self.case, self.side
        mean, var = side.host(statistics.pairs).T
        std = np.sqrt(used.var)
        running_mean, running_var = side.host(self.running.mean), side.host(self.running.var)
        results = {
            "y": Result(side.host(self.out), 8, case.terms(used), exact),
            "mean": Result(mean, 4, std + np.abs(mean) * HALF_ULP["float64"] / case.unit, exact),
            "var": Result(var, 8, var, exact),
            "running_mean": Result(running_mean, 4, std + np.abs(running_mean) * HALF_ULP["float64"] / case.unit),
            "running_var": Result(running_var, 8, running_var),
        }
        if self.running.batches is not None:
            results["num_batches_tracked"] = Result(side.host(self.running.batches), 0, 0)
        if self.epilogue.passed is not None:
            gradients = _empty_gradients(case, side)
            dy, x, given, affine, _ = backward_arguments(case, side)
            epilogue = self.epilogue._replace(residual=None)
            given = given._replace(count_left=None)
            side.ops.bn_backward_input(dy, x, given, affine, epilogue, side.put_all(case.sums), 0.0, gradients)
            clear = np.abs(case.before_activation(used)) > NEAR / 10
            results["record"] = Result(np.where(clear, side.host(gradients.dresidual), 0), 0, 0)
        return results


def backward_arguments(case: Case, side: Side) -> tuple[Tensor, Tensor, Statistics, Affine, Epilogue]:
    """The arguments that the steps of the way back begin with; the way forward has written the record."""
    forward = _Forward(case, side)
    if case.noted:
        running = side.put_all(Running(case.statistics.mean, case.statistics.var))
        side.ops.bn_normalize(forward.x, None, forward.affine, running, forward.epilogue, forward.out)
    dy, statistics = side.put(case.given(case.dy), case.offset), side.put_all(case.statistics_given()[0])
    return dy, forward.x, statistics, forward.affine, forward.epilogue._replace(residual=None)


def _empty_gradients(case: Case, side: Side) -> Gradients:
    """The arrays that a step of the way back writes to."""
    dx, dresidual = (side.out(case.x, case.offset) for _ in range(2))
    return Gradients(dx, dresidual if case.noted else None, side.out(case.weight), side.out(case.bias))


def _gradient_results(case: Case, gradients: Gradients, sums: Sums | None) -> Results:
    """All results of a step of the way back; if it was given the sums, nothing is rounded in another order."""
    given = sums is not None
    assert gradients.dweight is not None
    assert gradients.dbias is not None
    g = np.abs(case.dy.astype(np.float64))
    sizes = np.zeros((2, case.shape[1]))
    if not given:
        sizes[:] = (g * np.abs(case.xhat(case.statistics))).sum((0, 2)), g.sum((0, 2))
    results = {
        "dx": Result(gradients.dx, 25, case.gradient_terms(sums), given),
        "dweight": Result(gradients.dweight, 84, sizes[0], given),
        "dbias": Result(gradients.dbias, 84, sizes[1], given),
    }
    if gradients.dresidual is not None:
        results["dresidual"] = Result(gradients.dresidual, 0, 0, exact=True)
    return results


_FUSED = ((None, False), ("relu", False), (None, True), ("relu", True))
_NO_RESIDUAL_ALONE = ((None, False), ("relu", False), ("relu", True))
_MASKED = tuple(Variant(training, "relu", True, True) for training in (True, False))
_FORWARD = *(Variant(True, *fused) for fused in _FUSED), _MASKED[0]
_REDUCE = *(Variant(True, *fused) for fused in _NO_RESIDUAL_ALONE), _MASKED[0]
_BACKWARD = *(Variant(training, *fused) for training in (True, False) for fused in _NO_RESIDUAL_ALONE), *_MASKED
_NORMALIZE = *(Variant(training, *fused) for training in (True, False) for fused in _FUSED), *_MASKED

STEPS = {
    "bn_stats": Step(bn_stats, (Variant(), Variant(masked=True))),
    "mean_and_var": Step(mean_and_var, (Variant(),)),
    "merge_moments": Step(merge_moments, (Variant(),)),
    "bn_update_running": Step(bn_update_running, (Variant(),)),
    "bn_normalize": Step(bn_normalize, _NORMALIZE),
    "bn_forward": Step(bn_forward, _FORWARD),
    "bn_backward_reduce": Step(bn_backward_reduce, _REDUCE),
    "merge_sums": Step(merge_sums, (Variant(),)),
    "bn_backward_input": Step(bn_backward_input, _BACKWARD),
    "bn_backward": Step(bn_backward, _BACKWARD),
}
"""The steps to check, by the name of kernel, mirror and launcher."""
