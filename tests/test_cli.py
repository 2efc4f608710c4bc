"""``cupybn`` and ``python -m cupybn``: what the commands say, and that `check` misses nothing that is wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn.__main__ import CLOSED_PIPE, COMMANDS, INTERRUPTED, main
from cupybn._cli import bench, cases, check, extras, info, memory, sides
from cupybn._cli import options as cli_options
from cupybn._cli.checked import CHECKED
from cupybn._cli.measure import AS_LITTLE_AS_POSSIBLE, COLD, CupyGraph, cold_sets, device_time, rotate, spread
from cupybn._cli.peers import cupybn_call, torch_call
from cupybn._cli.problem import OPERATIONS, Problem, make_arrays
from cupybn._cli.table import table
from cupybn._steps import cupy_ops, numpy_double_backward, numpy_norms
from cupybn._steps.bundles import Epilogue
from cupybn._steps.sources import kernel_names
from tests.reference import bits

ROOT = Path(__file__).parent.parent


def without_gpu(*arguments):
    """Run a command where no CuPy or no GPU is found."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "cupybn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)


def refused(arguments, capsys):
    """The words of a command about bad options, after a check that they are told in two lines, with status 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    out, err = capsys.readouterr()
    usage, error = err.splitlines()
    assert usage.startswith("usage: python -m cupybn")
    assert out == ""
    return error.partition("error: ")[2]


def missing(monkeypatch, *names):
    """Let the commands find none of these modules."""
    here = extras.optional
    for module in extras, cli_options, info, bench:
        monkeypatch.setattr(module, "optional", lambda name: None if name in names else here(name))


def module_of(side, step):
    """The module of a side that has a step."""
    return side.ops if hasattr(side.ops, step) else side.second


STEPS = {step: op for op, checked in reversed(CHECKED.items()) for step in checked.steps}
"""The first function that has each step."""


@pytest.fixture
def one_shape(monkeypatch):
    """Quick checks have only the first shape of each layout."""
    for op, checked in CHECKED.items():
        shapes = {layout: shapes[:1] for layout, shapes in checked.quick.items()}
        monkeypatch.setitem(CHECKED, op, checked._replace(quick=shapes))


def only(monkeypatch, step):
    """Let `check` know a single step of batch norm, and its kernel."""
    checked = CHECKED["batch_norm"]
    monkeypatch.setitem(CHECKED, "batch_norm", checked._replace(steps={step: checked.steps[step]}))
    monkeypatch.setattr(check, "OPS", ("batch_norm",))
    monkeypatch.setattr(check, "kernel_names", lambda: [step])


# ---------------------------------------------------------------------------------------------------------------------
# All commands


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"cupybn {cupybn.__version__}\n"


TYPED = {
    "/site-packages/cupybn/__main__.py": "python -m cupybn",
    "/bin/cupybn": "cupybn",
    "cupybn": "cupybn",
    "cupybn.exe": "cupybn",
    "": "python -m cupybn",
}
"""The command that somebody typed, by the path that Python has for the program."""


@pytest.mark.parametrize("path", TYPED)
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help(command, path, monkeypatch, capsys):
    """The usage is what somebody typed, and could type again."""
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command, "--help"])
    usage, *rest = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: {' '.join([TYPED[path], *command])} ")
    assert len(rest) > 5


@pytest.mark.parametrize("path", TYPED)
@pytest.mark.parametrize("arguments", ["train", "bench", "bench --shape 3"])
def test_errors_name_the_command_as_it_was_typed(arguments, path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments.split())
    usage, error = capsys.readouterr().err.splitlines()
    command = "" if arguments == "train" else " bench"
    assert usage.startswith(f"usage: {TYPED[path]}{command} ")
    assert error.startswith(f"{TYPED[path]}{command}: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: command"),
        ("train", "invalid choice: 'train'"),
        ("info --xml", "unrecognized arguments: --xml"),
        ("check --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("check --dtype", "argument --dtype: expected one argument"),
        ("bench", "required: --shape"),
        ("bench --shape 4,3 --dtype float8", "argument --dtype: invalid choice: 'float8'"),
        ("bench --shape 3", "argument --shape: expected 2 to 32 positive sizes, such as 32,64,112,112 (got '3')"),
        ("bench --shape 3,0", "(got '3,0')"),
        ("bench --shape=-4,3", "(got '-4,3')"),
        ("bench --shape 3,x", "(got '3,x')"),
        ("bench --shape 3,4.0", "(got '3,4.0')"),
        ("bench --shape=", "(got '')"),
        (f"bench --shape 2{',1' * 40}", "argument --shape: expected 2 to 32"),
        ("bench --shape 1,16", "argument --shape: Expected more than 1 value per channel when training"),
        ("bench --shape 4,3 --shape 1,7,1", "got input size (1, 7, 1)"),
        ("bench --shape 16,1 --channel-axis 0", "argument --shape: Expected more than 1 value"),
        ("bench --shape 4,3 --channel-axis 9", "argument --channel-axis: expected channel_axis in [-2, 2) for 2D"),
        ("bench --shape 4,3,2 --shape 4,3 --channel-axis -3", "argument --channel-axis: expected channel_axis"),
        ("bench --shape 4,3 --channel-axis x", "argument --channel-axis: invalid int value: 'x'"),
        ("bench --shape 4,3 --seconds -1", "argument --seconds: expected a number of seconds, 0 or more (got '-1')"),
        ("bench --shape 4,3 --seconds nan", "(got 'nan')"),
        ("bench --shape 4,3 --seconds inf", "(got 'inf')"),
        ("bench --shape 4,3 --seconds soon", "(got 'soon')"),
        ("bench --shape 400000000,1600000", "argument --shape: 400000000x1600000 float32 does not fit in memory"),
        ("bench --shape 99999999,99999999 --dtype float16", "float16 does not fit in memory: training needs"),
        ("bench --shape 99999999999,99999999999", "argument --shape: expected fewer than 2**63 elements"),
        (f"bench --shape {9**400},2", "argument --shape: expected fewer than 2**63 elements"),
        ("bench --shape 3x4,5", "(got '3x4,5')"),
    ],
)
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_bad_options_are_told_in_two_lines(arguments, message, gpu, monkeypatch, capsys):
    if not gpu:
        for module in bench, check:
            monkeypatch.setattr(module, "cuda_missing", lambda: "told so")
    elif "does not fit" in message and not hasattr(pytest.importorskip("cupy"), "emulator"):
        pytest.skip("the allocation tells, after a line of notes")
    assert message in refused(arguments.split(), capsys)


class OutOfMemoryError(RuntimeError):
    """An error that is known by its name, which is that of PyTorch's."""


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError])
def test_memory_that_runs_out_is_no_traceback(error, monkeypatch, capsys):
    """Memory may run out while arrays are made, or while a call is measured: both are told in a line."""

    def full(*_):
        raise error("no more\nand a lot of advice")

    for names in ["make_arrays"], ["cpu_row", "gpu_row"]:
        for name in names:
            monkeypatch.setattr(bench, name, full)
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["bench", "--shape", "4,3"])
        _, message = capsys.readouterr().err.splitlines()
        assert message.endswith("argument --shape: 4x3 float32 does not fit in memory: no more")


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise ValueError("told so")

    for name in "cpu_row", "gpu_row":
        monkeypatch.setattr(bench, name, broken)
    with pytest.raises(ValueError, match="told so"):
        main(["bench", "--shape", "4,3"])


def test_what_fits_in_memory(monkeypatch):
    """Backward passes take more memory than forward passes, and narrow dtypes take more for their size."""
    problem = Problem((1 << 10, 1 << 10), np.dtype(np.float16))
    for name, arrays in ("training", 3 + 2 * 3), ("backward", 3 + 2 * 7):
        monkeypatch.setattr(memory, "free_bytes", lambda arrays=arrays: 2 * arrays * problem.nbytes)
        memory.check_memory(problem, OPERATIONS[name], sets=2)
        with pytest.raises(cli_options.UsageError, match=f"{name} needs about"):
            memory.check_memory(problem, OPERATIONS[name], sets=3)
    assert memory.free_bytes() > 0


@pytest.mark.parametrize("command", ["check", "bench --shape 4,3"])
@pytest.mark.parametrize("text", ["garbage", ""])
def test_a_bad_number_of_threads_is_told_before_anything_runs(command, text, monkeypatch, capsys):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", text)
    assert refused(command.split(), capsys).startswith("expected CUPYBN_NUM_THREADS to be a number of threads, 1 or mo")


def test_info_tells_threads_or_what_is_wrong_with_them(monkeypatch, capsys):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "3")
    assert main(["info"]) == 0
    assert re.search(r"^threads on the CPU: +3$", capsys.readouterr().out, re.MULTILINE)
    assert info.facts()["threads"] == 3
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "garbage")
    assert main(["info"]) == 0
    assert re.search(
        r"^threads on the CPU: +none: expected .* \(got 'garbage'\)", capsys.readouterr().out, re.MULTILINE
    )
    known = info.facts()
    assert known["threads"] is None
    assert "(got 'garbage')" in known["not_found"]["threads"]


@pytest.mark.parametrize("error", [ValueError, OverflowError, RuntimeError])
def test_arrays_that_cannot_be_made_are_told_in_two_lines(error, monkeypatch, capsys):
    def broken(*_):
        raise error("too much\nand a lot of advice")

    monkeypatch.setattr(bench, "make_arrays", broken)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", "--shape", "4,3"])
    _, message = capsys.readouterr().err.splitlines()
    assert message.endswith(f"argument --shape: 4x3 float32 cannot be made: {error.__name__}: too much")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_told_in_a_line(unbuffered):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "cupybn", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
            env=env,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr == "python -m cupybn: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=str)
def test_a_closed_pipe_is_quiet(arguments, unbuffered):
    """A reader such as `head`, which reads no more than it wants, has closed the pipe."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "cupybn", *arguments]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, env=env, check=False)
    os.close(write)
    assert result.stderr == b""
    kept = "--help" in arguments and unbuffered  # argparse keeps what it hears to itself, but not before Python 3.11
    assert result.returncode in ((0, CLOSED_PIPE) if kept else (CLOSED_PIPE,))


def test_a_closed_output_is_quiet():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m cupybn info >&-"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, timeout=120, env=env, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_interrupted(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main(["info"]) == INTERRUPTED


# ---------------------------------------------------------------------------------------------------------------------
# info


def test_info_without_gpu():
    result = without_gpu("info")
    assert result.returncode == 0, result.stderr
    assert "NumPy mirrors" in result.stdout
    assert f"{len(kernel_names())} in " in result.stdout
    assert "pip install '.[cuda13]'" in result.stdout


KEYS = (
    "cupybn python machine numpy ml_dtypes mpi4py safetensors threads kernels kernel_folder cupy_missing cupy stand_in "
    "cuda_driver cuda_runtime nvrtc nccl kernel_cache not_found gpus"
)
"""Keys of ``info --json``, on which programs may count."""


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_info_as_json_has_the_same_keys_everywhere(gpu, monkeypatch, capsys):
    if not gpu:
        monkeypatch.setattr(info, "cuda_missing", lambda: "told so")
    missing(monkeypatch, "ml_dtypes")
    assert main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert set(known) == set(KEYS.split())
    assert known["cupybn"] == cupybn.__version__
    assert known["kernels"] == len(kernel_names())
    assert known["ml_dtypes"] is None
    for name in "mpi4py", "safetensors":
        assert known[name] == getattr(info.optional(name), "__version__", None)
    assert known["cupy_missing"] == (None if gpu else "told so")
    assert (known["cupy"] is not None) == gpu
    if gpu:
        assert set(known["gpus"][0]) == {"name", "compute_capability", "multiprocessors", "memory_bytes", "l2_bytes"}
    else:
        assert known["gpus"] == []
    for name in known["not_found"]:
        assert known[name] is None


def test_info_says_what_installs_what_is_missing(monkeypatch, capsys):
    missing(monkeypatch, "ml_dtypes", "mpi4py", "safetensors")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for extra in "bf16", "mpi", "safetensors":
        assert f"`pip install '.[{extra}]'`" in out


def test_info_names_gpus_and_versions(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "multiprocessors" in lines["GPU 0"]
    for name in (
        "CuPy",
        "CUDA runtime",
        "CUDA driver supports",
        "NVRTC",
        "NCCL",
        "mpi4py",
        "safetensors",
        "compiled kernels",
    ):
        assert lines[name].strip(), name


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_check_knows_every_kernel():
    assert {name.rpartition("/")[2] for name in kernel_names()} == STEPS.keys()


def test_check_of_the_kernels(capsys):
    assert main(["check", "--quick", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in kernel_names())
    assert "within their bounds" in out
    if hasattr(pytest.importorskip("cupy"), "emulator"):
        assert "No GPU was there" in out.splitlines()[-1]


@pytest.mark.parametrize("name", kernel_names())
def test_check_launches_what_it_says(name, monkeypatch):
    """The kernel that a row names is launched, and not other ones that give the same results."""
    cp = pytest.importorskip("cupy")
    if not hasattr(cp, "emulator"):
        pytest.skip("a GPU does not tell")
    monkeypatch.setattr(check, "kernel_names", lambda: [name])
    with cp.emulator.record() as launches:
        assert main(["check", "--quick", "--dtype", "float32"]) == 0
    assert name.rpartition("/")[2] in {launch.name for launch in launches}


def test_check_without_gpu():
    result = without_gpu("check", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no kernels to check" in result.stdout
    assert all(f"\n{step} " in result.stdout for step in STEPS)
    *_, last_but_one, last = result.stdout.splitlines()
    assert "calls are within their bounds." in last_but_one
    assert last == "No kernel has run: only their NumPy mirrors were compared, with a plain formula in NumPy."


@pytest.mark.parametrize("command", ["check", "check --dtype float32", "bench --shape 4,3"], ids=str)
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_a_dtype_that_is_wanted_and_missing(command, gpu, monkeypatch, capsys):
    missing(monkeypatch, "ml_dtypes")
    for module in bench, check:
        monkeypatch.setattr(module, "cuda_missing", lambda: "" if gpu else "told so")
    message = refused([*command.split(), "--dtype", "bfloat16"], capsys)
    assert message.startswith("argument --dtype: bfloat16 cannot be used here: ")
    assert "`pip install '.[bf16]'`" in message


@pytest.mark.usefixtures("one_shape")
def test_check_of_all_dtypes_without_one(monkeypatch, capsys):
    missing(monkeypatch, "ml_dtypes")
    only(monkeypatch, "mean_and_var")
    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    assert main(["check", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "Without bfloat16: ml_dtypes is missing" in out
    assert next(line for line in out.splitlines() if "allowed" in line).split()[4:] == ["float16", "float32", "float64"]


def test_a_dtype_twice_is_checked_once():
    assert cli_options.chosen_dtypes(["float32", "float16", "float32"], ()) == [np.float32, np.float16]


def test_a_check_of_nothing_fails(monkeypatch, capsys):
    """An installation has no kernels: nothing is checked, and that is told as a failure."""
    monkeypatch.setattr(check, "cuda_missing", lambda: "")
    monkeypatch.setattr(check, "kernel_names", list)
    assert main(["check", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "Nothing was checked." in out
    assert "within" not in out


def failing_check(capsys):
    """The output of a check that finds something wrong."""
    assert main(["check", "--quick", "--dtype", "float32"]) == 1
    return capsys.readouterr().out


def spoiled(function):
    """A step in the place of another one, with one result of that one off by a thousandth."""

    def step(*args, **kwargs):
        result = function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        written = bound["gradients"].dx if "gradients" in bound else bound.get("out")
        if result is None and written is None:
            written = bound["running"].var if "running" in bound else bound["dweight"]
        if written is not None:
            written[...] = written * 1.001
            return result
        if not isinstance(result, tuple):
            return result * 1.001
        fields = dict(zip(getattr(result, "_fields", ("mean", "var")), result, strict=True))
        last = next(name for name in ("m2", "dy_xhat", "var") if name in fields)
        fields[last] = fields[last] * 1.001
        return type(result)(**fields) if hasattr(result, "_fields") else tuple(fields.values())

    return step


def called(step):
    """How a step's call with the first shape of the first function that has it begins in a list."""
    checked = CHECKED[STEPS[step]]
    return f"{step}, {checked.axes} = {checked.quick['channels_first'][0]}, float32, "


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", STEPS)
def test_check_sees_a_wrong_mirror(step, monkeypatch, capsys):
    """A check without a GPU names the step whose mirror is wrong."""
    mirrors = module_of(CHECKED[STEPS[step]].sides[1], step)
    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    monkeypatch.setattr(mirrors, step, spoiled(getattr(mirrors, step)))
    assert f"  {called(step)}" in failing_check(capsys)


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", STEPS)
def test_check_sees_a_wrong_kernel(step, monkeypatch, capsys):
    kernels = module_of(CHECKED[STEPS[step]].sides[0], step)
    monkeypatch.setattr(kernels, step, spoiled(getattr(kernels, step)))
    monkeypatch.setattr(check, "kernel_names", lambda: [n for n in kernel_names() if n.rpartition("/")[2] == step])
    assert called(step) in failing_check(capsys)


@pytest.mark.parametrize("op", CHECKED)
def test_check_of_one_function(op, monkeypatch, capsys):
    """The steps of a function are checked, and no others."""
    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    assert main(["check", "--op", op, "--quick", "--dtype", "float32"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d\d$", line)]
    assert rows == [*CHECKED[op].steps]


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("step", ["bn_normalize", "bn_forward", "norm_forward"])
def test_check_sees_a_wrong_record(step, monkeypatch, capsys):
    mirrors = CHECKED[STEPS[step]].sides[1].ops
    right = getattr(mirrors, step)

    def wrong(*args):
        result = right(*args)
        (epilogue,) = (argument for argument in args if isinstance(argument, Epilogue))
        if epilogue.passed is not None:
            epilogue.passed[...] = True
        return result

    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    monkeypatch.setattr(mirrors, step, wrong)
    of = "instance_norm" if mirrors is numpy_norms else "training"
    assert f"{called(step)}{of}, relu, residual: record" in failing_check(capsys)


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("mode", ["training", "eval"])
def test_check_sees_what_is_wrong_of_some_cotangents_alone(mode, monkeypatch, capsys):
    """Second order without a cotangent of dx is checked as well, where a kernel reads less."""
    right = numpy_double_backward.bn_double_backward_input

    def wrong(incoming, *rest):
        right(incoming, *rest)
        *_, inv_count, gradients = rest
        if incoming.cdx is None and (inv_count == 0) == (mode == "eval"):
            gradients.ddy[...] *= 1.001

    monkeypatch.setattr(check, "cuda_missing", lambda: "told so")
    monkeypatch.setattr(numpy_double_backward, "bn_double_backward_input", wrong)
    out = failing_check(capsys)
    assert f"{called('bn_double_backward_input')}{mode}, relu: ddy of vectors, " in out
    assert out.count(": ddy of vectors, ") == out.count(f"float32, {mode}, ") == 4 * 2


def broken(*_):
    """A step that raises, as one does that cannot be compiled or launched."""
    raise RuntimeError("told so\nand a lot of advice")


@pytest.mark.usefixtures("one_shape")
def test_check_goes_on_after_an_error(monkeypatch, capsys):
    monkeypatch.setattr(cupy_ops, "bn_backward", broken)
    out = failing_check(capsys)
    assert re.search(r"^\d+ of \d+ calls have raised an error:$", out, re.MULTILINE)
    assert "float32, training, relu: RuntimeError: told so" in out
    assert re.search(r"^\S*/bn_backward +error$", out, re.MULTILINE)
    assert "\nmean_and_var " in out
    for words in "times", "off by", "inf", "within":
        assert words not in out


@pytest.mark.usefixtures("one_shape")
def test_check_says_once_what_all_calls_raise(monkeypatch, capsys):
    monkeypatch.setattr(check, "worst", broken)
    out = failing_check(capsys)
    assert re.search(r"^All \d+ calls have raised the same error: RuntimeError: told so$", out, re.MULTILINE)
    assert out.count("RuntimeError") == 1


@pytest.mark.usefixtures("one_shape")
def test_check_tells_errors_from_misses(monkeypatch, capsys):
    monkeypatch.setattr(cupy_ops, "bn_backward", broken)
    monkeypatch.setattr(cupy_ops, "mean_and_var", spoiled(cupy_ops.mean_and_var))
    out = failing_check(capsys)
    assert "calls have raised an error:" in out
    assert re.search(r"^\d+ of \d+ calls are off by more than is allowed:\n  mean_and_var, ", out, re.MULTILINE)


@pytest.mark.parametrize("side", CHECKED["batch_norm"].sides, ids=lambda side: side.name)
def test_bundles_come_to_a_side_and_back(side):
    """All arrays of an unaligned case are unaligned; values that are no arrays stay as they are."""
    given = Epilogue(np.arange(6, dtype=np.float32).reshape(1, 2, 3), "relu")
    there = side.put_all(given, offset=1)
    assert (type(there), there.activation, there.passed) == (Epilogue, "relu", None)
    if side.name == "kernels":
        assert there.residual.data.ptr % 16 == 4
    back = side.host_all(there)
    assert (type(back), back.activation, back.passed) == (Epilogue, "relu", None)
    np.testing.assert_array_equal(back.residual, given.residual)
    back.residual[...] = 7
    assert given.residual.max() == 5


def test_check_takes_nan_for_wrong():
    case = cases.Case((2, 3, 4), np.dtype(np.float32), 0, cases.Variant())
    right = sides.Result(np.ones(3), 8, 1)
    assert sides.share_of_bound(np.ones(3), right, case, False) == 0
    assert sides.share_of_bound(np.full(3, np.nan), right, case, False) == np.inf
    assert sides.share_of_bound(np.ones(4), right, case, False) == np.inf
    assert sides.share_of_bound(np.full(3, 1 + 16 * case.unit), right, case, False) == pytest.approx(2)
    exact = right._replace(exact=True)
    assert sides.share_of_bound(np.full(3, 1 + case.unit), exact, case, True) == np.inf


# ---------------------------------------------------------------------------------------------------------------------
# bench


def test_bench_without_gpu():
    arguments = ("--shape", "4,3,5,5", "--shape", "7,6", "--dtype", "float32", "--dtype", "bfloat16", "--seconds", "0")
    result = without_gpu("bench", *arguments, "--backward")
    assert result.returncode == 0, result.stderr
    assert "No GPU" in result.stdout
    for name in "4x3x5x5 float32, training", "4x3x5x5 bfloat16, backward", "7x6 float32, inference":
        assert f"\n{name} " in result.stdout


@pytest.mark.parametrize("more", [[], ["--relu"], ["--residual", "--channel-axis", "-1"]], ids=str)
def test_bench(more, capsys):
    assert main(["bench", "--shape", "2,3,4,5", "--dtype", "float16", "--backward", "--seconds", "0", *more]) == 0
    *_, first, second, third, empty, ratios = capsys.readouterr().out.splitlines()
    rows = [first, second, third]
    assert empty == ""
    assert "at 2.0 cupybn takes half the time" in ratios.lower()
    assert [row.split(", ")[-1].split()[0] for row in rows] == ["training", "inference", "backward"]
    assert all(("channels last" in row) == ("-1" in more) for row in rows)


def test_names_of_problems_are_taken_as_shapes():
    for shape in (4, 3), (32, 64, 7, 7):
        assert cli_options.shape(Problem(shape, np.dtype(np.float32)).name.split()[0]) == shape


@pytest.mark.parametrize(
    ("axis", "end"),
    [
        (1, ""),
        (-3, ""),
        (3, ", channels last"),
        (-1, ", channels last"),
        (0, ", channel axis 0"),
        (-2, ", channel axis 2"),
    ],
)
def test_names_of_problems_have_their_channel_axis(axis, end):
    assert Problem((2, 3, 4, 5), np.dtype(np.float32), axis).name == f"2x3x4x5 float32{end}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_pytorch_takes_what_it_is_given(dtype):
    """PyTorch takes the arguments in all dtypes: with float64 it takes no float32 vectors."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    problem = Problem((4, 3, 5), cli_options.chosen_dtypes([dtype], ())[0])
    (arrays,) = make_arrays(problem, np)
    try:
        for operation in OPERATIONS.values():
            assert torch_call(torch, problem, operation, arrays)()[0].shape == problem.shape
    finally:
        torch.set_num_threads(threads)


def test_operations_of_bench():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    chosen = bench.operations(parser.parse_args(["--shape", "2,3", "--residual", "--backward"]))
    assert [o.name for o in chosen] == [f"{name} + add + ReLU" for name in ("training", "inference", "backward")]
    assert chosen[0] == OPERATIONS["training + add + ReLU"]
    assert chosen[2] == OPERATIONS["backward + add + ReLU"]


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["check --quick --dtype float32", "bench --shape 4,3 --seconds 0"], ids=str)
def test_a_missing_tqdm_costs_the_bar_alone(command, terminal, monkeypatch, capsys):
    missing(monkeypatch, "tqdm")
    only(monkeypatch, "mean_and_var")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(command.split()) == 0
    assert ("`pip install '.[cli]'`" in capsys.readouterr().err) == terminal


def test_the_bar_is_for_terminals(capsys):
    pytest.importorskip("tqdm")
    assert list(extras.progress([1, 2], "case")) == [1, 2]
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# Parts that the commands share


def test_passes():
    found = {name: operation.passes for name, operation in OPERATIONS.items()}
    assert found == {
        "training": 2,
        "inference": 2,
        "backward": 3,
        "training + ReLU": 2,
        "backward + ReLU": 3,
        "training + add + ReLU": 3 + 1 / 16,
        "backward + add + ReLU": 4 + 1 / 16,
    }


def test_sets_exceed_the_cache():
    effort = AS_LITTLE_AS_POSSIBLE._replace(most_sets=1000, least_calls=4)
    assert cold_sets(10, 100, effort) * 10 > COLD * 100
    assert cold_sets(1e9, 100, effort) == 2
    assert cold_sets(1, 1e9, effort) == 1000
    assert rotate(["a", "b", "c"], effort) == ["a", "b", "c", "a"]
    assert rotate(list("abcdef"), effort) == list("abcdef")


def test_device_time_is_that_of_one_call():
    class Graph:
        calls, replays = 5, 0

        def replay(self, rounds):
            self.replays += rounds
            return [100.0] * rounds

    graph = Graph()
    effort = AS_LITTLE_AS_POSSIBLE._replace(seconds=1e-3, most_rounds=20)
    assert device_time(graph, effort) == (20, 20, 20)
    assert graph.replays == 2 + 10
    assert spread([1, 2, 3, 4, 5]) == (3, 2, 4)


@pytest.mark.parametrize("keep", [True, False])
def test_a_graph_computes_what_its_calls_compute(keep):
    import cupy as cp

    problem, operation = Problem((3, 4, 5), np.dtype(np.float32)), OPERATIONS["training"]
    sets = make_arrays(problem, cp, 2)
    sets[1].x[...] *= 3
    calls = [cupybn_call(problem, operation, arrays) for arrays in sets]
    expected = [bits(call()[0]) for call in calls]
    graph = CupyGraph(calls, keep)
    graph.replay(2)
    assert [bits(result[0]) for result in graph.results] == expected[0 if keep else 1 :]


def test_arrays_repeat_their_pattern(monkeypatch):
    monkeypatch.setattr("cupybn._cli.problem.PATTERN", 7)
    (arrays,) = make_arrays(Problem((2, 3, 3), np.dtype(np.float32)), np)
    flat = arrays.x.reshape(-1)
    assert np.array_equal(flat[:7], flat[7:14])
    assert np.array_equal(flat[:4], flat[14:])


def test_table():
    assert table(["a", "bb"], [["long", "1"], ["", "22"]]).splitlines() == [
        "a     bb",
        "----  --",
        "long   1",
        "      22",
    ]
