"""The tools that measure and check, on batch norm's family: both sides compute the same, and what is wrong is seen."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cupybn.__main__ import main
from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli import bench
from cupybn._cli.dropout_formula import philox
from cupybn._cli.peers import cupybn_call, torch_call
from cupybn._cli.plain import plain_call
from cupybn._cli.problem import DROPPED, FAMILY, FUSED, PASSES, Operation, label, make_arrays, problem_of
from tests.benchmark_scripts import require

NORMS = FAMILY[:-1]
SHAPES = [((2, 6, 4, 5), 1), ((2, 4, 5, 6), 3), ((3, 6), 1)]


def problems(op, dtype="float32"):
    """Problems of a function, in the layouts that it takes."""
    shapes = SHAPES if op in FUSED else [(shape, 1) for shape, _ in SHAPES]
    shapes = [(shape, axis) for shape, axis in shapes if len(shape) > 2 or op != "instance_norm"]
    return [problem_of(op, shape, parameter_dtype(dtype), axis, groups=3) for shape, axis in shapes]


def fused_with_all(op):
    """The operations of a function, also with all that it fuses."""
    more = {"activation": "relu", "residual": True} if op in FUSED else {}
    return [Operation(name, backward=backward, op=op, **of) for of in ({}, more) for name, backward in PAIRS]


PAIRS = (("forward", False), ("backward", True))


@pytest.mark.parametrize("op", NORMS)
def test_all_libraries_compute_the_same(op):
    """cupybn, plain NumPy and PyTorch are called with the same arguments, whatever is an axis of what."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for problem in problems(op):
            for operation in fused_with_all(op):
                (a,) = make_arrays(problem, np)
                ours, plain = (
                    call[0] for call in (cupybn_call(problem, operation, a)(), plain_call(np, problem, operation, a)())
                )
                axis = problem.channel_axis if op in FUSED else 1
                theirs = torch_call(torch, problem, operation, a)()[0].detach().movedim(1, axis).numpy()
                for other in plain, theirs:
                    np.testing.assert_allclose(other, ours, rtol=1e-4, atol=1e-4, err_msg=label(problem, operation))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PASSES["dropout"])
def test_all_libraries_drop_as_many(name):
    torch = pytest.importorskip("torch")
    problem, operation = problem_of("dropout", (200, 100), np.dtype(np.float32)), PASSES["dropout"][name]
    (a,) = make_arrays(problem, np)
    given = a.dy if operation.backward else a.x
    for call in (
        cupybn_call(problem, operation, a),
        plain_call(np, problem, operation, a),
        torch_call(torch, problem, operation, a),
    ):
        found = np.asarray(call()[0].detach() if hasattr(call()[0], "detach") else call()[0])
        assert np.mean(found == 0) == pytest.approx(DROPPED, abs=0.02)
        np.testing.assert_allclose(found[found != 0], given[found != 0] / (1 - DROPPED), rtol=1e-6)


def test_names_in_tables():
    half = np.dtype(np.float16)
    first, last = (problem_of("group_norm", shape, half, axis, 2) for shape, axis in (((2, 4, 3), 1), ((2, 3, 4), 2)))
    assert label(first, PASSES["group_norm"]["forward"]) == "2x4x3 float16, 2 groups, group_norm forward"
    assert label(last, PASSES["group_norm"]["forward"]) == "2x3x4 float16, channels last, 2 groups, group_norm forward"
    three = problem_of("layer_norm", (2, 3, 4), half)
    assert label(three, PASSES["layer_norm"]["backward"]) == "2x3x4 float16, layer_norm backward"
    assert (three.channels, [operation.passes for operation in PASSES["layer_norm"].values()]) == (4, [2, 3])
    assert [operation.passes for operation in PASSES["dropout"].values()] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--op layer_norm --shape 4,3 --relu", "argument --relu: layer_norm has no use for it"),
        ("--op dropout --shape 4,3 --residual", "argument --residual: dropout has no use for it"),
        ("--op rms_norm --shape 4,3 --channel-axis -1", "argument --channel-axis: rms_norm has no use for it"),
        ("--op group_norm --shape 4,3,2 --groups 2", "argument --groups: 3 channels cannot be divided into 2 groups"),
        ("--op group_norm --shape 4,3,2 --groups 0", "expected a number of groups, 1 or more (got '0')"),
        ("--op group_norm --shape 4,3,2 --channel-axis 0", "the first axis of group_norm is the batch"),
        ("--op instance_norm --shape 4,3", "instance_norm needs more than one position in each sample"),
        ("--op local_norm --shape 4,3", "invalid choice: 'local_norm'"),
    ],
)
def test_options_of_bench_that_make_no_sense(arguments, words, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", *arguments.split()])
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("op", FAMILY)
def test_bench(op, monkeypatch, capsys):
    if op not in ("group_norm", "dropout"):  # on the stand-in it compiles kernels for each of them
        monkeypatch.setattr(bench, "cuda_missing", lambda: "told so")
    assert main(["bench", "--op", op, "--shape", "2,4,3", "--groups", "2", "--backward", "--seconds", "0"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2x4x3 float32")]
    assert [row.split(", ")[-1].split()[:2] for row in rows] == [[op, "forward"], [op, "backward"]]


def test_words_of_the_formula_are_those_of_random123():
    """Known answers of Random123, `tests/kat_vectors`."""
    full = 0xFFFFFFFFFFFFFFFF
    assert philox(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(full, full, full) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = 0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks on a GPU

pytest.importorskip("matplotlib")
cp = pytest.importorskip("cupy")
require()

import gpu_cudnn  # noqa: E402
import gpu_exact  # noqa: E402
import gpu_goals  # noqa: E402
import gpu_results  # noqa: E402
from contact.log import Log  # noqa: E402
from contact.stages import family  # noqa: E402
from contact.task import Task  # noqa: E402
from gpu_cases import FAMILY as CASES  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", FAMILY)
def test_exact_tells_right_from_wrong(op, dtype, monkeypatch):
    """The error is computed right for every layout, and some samples at a time."""
    monkeypatch.setattr(gpu_exact, "MOST_ELEMENTS", 50)
    for problem in problems(op, dtype):
        for operation in fused_with_all(op):
            (a,) = make_arrays(problem, np)
            found = cupybn_call(problem, operation, a)()[0].copy()
            right = gpu_exact.errors(np, problem, operation, a, found)
            assert right.over_allowed <= 1, label(problem, operation)
            assert right.roundoffs <= (1.01 if dtype == "bfloat16" and op != "dropout" else 8)
            at = tuple(np.argwhere(found != 0)[-1])
            found[at] += np.asarray(0.3, found.dtype)
            wrong = gpu_exact.errors(np, problem, operation, a, found)
            assert min(wrong) > 1, label(problem, operation)
            found[at] = np.nan
            assert gpu_exact.errors(np, problem, operation, a, found) == (np.inf, np.inf)


@pytest.mark.parametrize("kept", [0.8, 1.0])
def test_exact_counts_what_is_dropped(kept):
    problem, operation = problem_of("dropout", (100, 100), np.dtype(np.float32)), PASSES["dropout"]["forward"]
    (a,) = make_arrays(problem, np)
    found = np.where(np.random.default_rng(0).random(a.x.shape) < kept, a.x * np.float32(1 / (1 - DROPPED)), 0)
    assert gpu_exact.errors(np, problem, operation, a, found).over_allowed > 1


@pytest.mark.skipif(not hasattr(cp, "emulator"), reason="the stand-in for cudnn-frontend runs on the stand-in for CuPy")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_cudnn_is_called_as_we_are(op, dtype):
    problem = problem_of(op, (4, 24), parameter_dtype(dtype))
    frontend = gpu_cudnn.Frontend(gpu_cudnn.load(), [])
    for operation in PASSES[op].values():
        (a,) = make_arrays(problem, cp)
        found, ours = frontend.call(problem, operation, a)(), cupybn_call(problem, operation, a)()
        assert gpu_exact.error(cp, problem, operation, a, found[0]) <= 1
        if operation.backward:
            for vector, other in zip(found[1:], ours[1:], strict=False):
                np.testing.assert_allclose(
                    *(cp.asnumpy(v).astype(np.float64) for v in (vector, other)), rtol=1e-2, atol=1e-2
                )


def test_goals_of_the_family_are_for_its_members():
    """A backward pass of group norm counts for its own goals, and for none of batch norm's."""
    fields = {"group": "family", "shape": [32, 56, 56, 256], "layout": "NHWC", "dtype": "float16", "channels": 256}
    fields |= {"x_bytes": 5e7, "peer": "cupybn", "cold_us": {"median": 10}, "launches": 3}
    records = [fields | {"op": "group_norm", "operation": "backward", "share_of_copy": 0.7}]
    records += [fields | {"op": "instance_norm", "operation": "backward", "share_of_copy": 0.9}]
    rows = [row for row in gpu_goals.compare(gpu_goals.Results(records)) if row["count"]]
    assert [(row["regime"], row["goal"], row["met"]) for row in rows] == [
        ("group norm", "backward, share of copy >= 0.75", False),
        ("instance norm", "backward, share of copy >= 0.75", True),
    ]


def test_members_have_names_of_their_own():
    names = [
        gpu_results.case_name(
            {"op": m.op, "layout": m.layout, "shape": m.shape, "dtype": m.dtype, "group": m.case.group}
        )
        for m in CASES
    ]
    assert len(set(names)) == len(CASES)
    assert {m.op for m in CASES} == set(FAMILY)
    assert all(m.case.problem.shape[m.case.problem.channel_axis] % max(m.groups, 1) == 0 for m in CASES)


def test_the_stage_sees_a_wrong_kernel(tmp_path, monkeypatch):
    """A result that is off is a failed check of the first contact, of the operation that it belongs to."""
    member = next(m for m in family.TINY_FAMILY if m.op == "rms_norm")
    monkeypatch.setattr(family, "TINY_FAMILY", (member,))
    task = Task(Log(None), tmp_path, 100, rehearse=True)
    family.run(task)
    assert [(name, passed) for name, passed, _ in task.log.findings.checks] == [("something was measured", True)]
    functional = sys.modules["cupybn.functional"]
    right = functional.rms_norm_vjp

    def wrong(x, *arguments):
        y, vjp_fn = right(x, *arguments)
        y *= 1.01
        return y, vjp_fn

    monkeypatch.setattr(functional, "rms_norm_vjp", wrong)
    family.run(task)
    failed = [name for name, passed, _ in task.log.findings.checks if not passed]
    assert failed == [f"{member.name} forward is right"]
    assert member.name in task.log.findings.highlights[0]
