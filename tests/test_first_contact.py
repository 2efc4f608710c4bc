"""`benchmarks/first_contact.py` without a GPU: rehearsed on the stand-in, with stand-ins for NVIDIA's tools, too."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cupybn import functional
from cupybn._cli import check as cli_check
from cupybn._cli.checked import CHECKED
from cupybn._cli.problem import FAMILY
from cupybn._steps import cupy_norms, launcher, norms_last, sources
from cupybn._steps.norm import Norm
from tests.benchmark_scripts import BENCHMARKS, ROOT, require

pytest.importorskip("ml_dtypes")
pytest.importorskip("tqdm")
cp = pytest.importorskip("cupy")

require()

from contact import insides, plan, report, runner  # noqa: E402
from contact.log import Check, Findings, Log, write_whole  # noqa: E402
from contact.processes import Ended, LimitedProcess, run_limited, variables  # noqa: E402
from contact.stages import (  # noqa: E402
    bench,
    check,
    environment,
    family,
    graph,
    large,
    mpi,
    nccl,
    ncu,
    precompile,
    sanitizer,
    smoke,
    suite,
)
from contact.task import Task  # noqa: E402
from gpu_cases import TINY_FAMILY  # noqa: E402

EMULATED = hasattr(cp, "emulator")


def first_contact(out, *options, **env):
    """The output of a rehearsed first contact, the outcomes by stage, and the exit status."""
    command = [sys.executable, str(BENCHMARKS / "first_contact.py"), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **env}, check=False)
    results = out / "results.json"
    return done.stdout + done.stderr, json.loads(results.read_text()) if results.exists() else {}, done.returncode


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    if EMULATED:
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "emulated"))


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins for tools

SANITIZER = """#!{python}
import os, subprocess, sys
name = sys.argv[sys.argv.index("--tool") + 1]
work = sys.argv[sys.argv.index(sys.executable):]
print("========= COMPUTE-SANITIZER")
fault = os.environ.get("TOOLS_FIND")
if not fault:
    status = subprocess.run(work).returncode
    clean = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if name == "racecheck" else None
    print("========= " + (clean or "ERROR SUMMARY: 0 errors"))
    sys.exit(status)
print(open(os.path.join(fault, name)).read())
sys.exit(int(sys.argv[sys.argv.index("--error-exitcode") + 1]))
"""
SAID = {
    "memcheck": """
========= Invalid __global__ read of size 4 bytes
=========     at bn_stats+0x2a0 in kernels/channels_first/packs.cuh:61
=========     by thread (31,0,0) in block (0,0,0)
=========     Access at 0x7f2e8be00c40 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2e8be00000 of size 3,136 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2ea1c1] in libcuda.so.1
the work is done
========= ERROR SUMMARY: 1 error""",
    "racecheck": """
========= Error: Race reported between Write access at bn_stats+0x120 in kernels/moments.cuh:40
=========     and Read access at bn_stats+0x1c0 in kernels/moments.cuh:44 [1520 hazards]
=========
the work is done
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)""",
    "synccheck": """
========= Barrier error detected. Divergent thread(s) in block.
=========     at bn_forward+0x90 in kernels/cluster.cuh:21
the work is done
========= ERROR SUMMARY: 1 error""",
    "initcheck": "========= Error: Target application terminated before first instrumented API call",
}
NCU = """#!{python}
import os, subprocess, sys
work = sys.argv[sys.argv.index(sys.executable):]
found = os.environ.get("TOOLS_FIND")
if found and "--metrics" in sys.argv:
    print("==ERROR== Failed to find metric regex:^smsp__average_warps_issue_stalled_membar(\\\\.|$)")
    sys.exit(1)
if found:
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters")
    sys.exit(1)
print("==PROF== Connected to process 71 (python3)", flush=True)
subprocess.run(work, check=True)
print("==PROF== Disconnected from process 71")
metrics = sys.argv[sys.argv.index("--metrics") + 1].split(",")
units = {{"gpu__time_duration.sum": "us", "dram__bytes_read.sum": "Mbyte"}}
head = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", *metrics]
values = ["1,234.5" if "time" in m else "6.25" if "long_scoreboard" in m else "0.5" for m in metrics]
rows = [head, ["", "", "", "", "", *(units.get(m, "") for m in metrics)]]
rows += [[str(i), "71", name, "(256, 1, 1)", "(9, 1, 1)", *values] for i, name in enumerate(("bn_stats(int)", "bn_b"))]
print("\\n".join(",".join(f'"{{cell}}"' for cell in row) for row in rows))
print("said at the end")
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Scripts that print what `ncu` and `compute-sanitizer` print, in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    for name, text in SAID.items():
        (folder / name).write_text(text)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The whole of a first contact


@pytest.mark.usefixtures("tools")
def test_rehearsal(tmp_path):
    out = tmp_path / "out"
    printed, outcomes, status = first_contact(out, "--minutes", "6")
    assert status == 0, printed
    assert set(outcomes) == set(plan.NAMES)
    verdicts = {name: outcome["verdict"] for name, outcome in outcomes.items()}
    assert verdicts.pop("mpi") in report.GOOD, printed  # where there is one
    assert set(verdicts.values()) == {"passed"}, printed
    files = {"report.md", "results.json", "bench.json", "family.json", "suite.log", "sanitizer.log", "ncu.csv"}
    assert {path.name for path in out.iterdir()} == files
    lines = printed.rpartition("===== FIRST CONTACT (REHEARSAL)")[2].splitlines()
    assert "no failures" in lines
    assert sum("of copy, torch x" in line for line in lines) == 6
    assert sum(line.startswith(tuple(FAMILY)) and "; backward" in line for line in lines) == len(TINY_FAMILY)
    assert "ncu bn_stats: 1234 us, dram 0.5 %, issue slots 0.5 %, long_scoreboard 6.2, wait 0.5, sleeping 0.5" in lines
    page = (out / "report.md").read_text()
    assert "rehearsal: says nothing of a GPU" in page
    for name in plan.NAMES:
        assert f"\n## {name}: {outcomes[name]['verdict']} in " in page
    assert "compute-sanitizer racecheck RACECHECK SUMMARY: 0 hazards displayed" in page


def test_a_stage_that_crashes_and_one_that_hangs_lose_only_themselves(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FIRST_CONTACT_FAULT", "smoke:crash,graph:hang")
    monkeypatch.setattr(runner, "LEAST", 0.5)
    monkeypatch.setattr(runner, "MARGIN", 20.0)  # plenty, so that the hanging one ends itself
    seconds = {"smoke": 100, "graph": 21, "large": 100}
    found = report.Report(tmp_path, rehearse=True)
    runner.run([plan.Stage(name, most, "") for name, most in seconds.items()], found, 200)
    assert {name: o.verdict for name, o in found.outcomes.items()} == {
        "smoke": "CRASHED",
        "graph": "TIME OVER",
        "large": "passed",
    }
    assert "Segmentation fault" in found.outcomes["smoke"].tail
    assert "in fail_on_purpose" in found.outcomes["graph"].tail  # where it hung
    assert not found.passed
    summary = found.summary()
    assert "smoke ended with -11: " in summary
    assert "graph ended with 1 (time was over): " in summary
    assert "large passed 2/2" in summary
    assert "## graph: TIME OVER in" in (tmp_path / "report.md").read_text()
    assert "--- large: passed in" in capfd.readouterr().out


def test_what_has_no_time_is_no_success(tmp_path):
    found = report.Report(tmp_path, rehearse=True)
    runner.run([plan.Stage("smoke", 100, "")], found, 1)
    assert not found.passed
    assert "never run, the time was over: smoke" in found.summary()


def test_exit_status(tmp_path):
    printed, outcomes, status = first_contact(tmp_path, "--only", "smoke", FIRST_CONTACT_FAULT="smoke:crash")
    assert status == 1
    assert outcomes["smoke"]["verdict"] == "CRASHED"
    assert "stages: smoke CRASHED 0/0" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "smoke,smoker"], "no stage smoker (there are environment, precompile,"),
        (["--only", "mpi", "--skip", "mpi"], "leave no stage"),
        *((["--minutes", text], "argument --minutes: expected a number") for text in ("0", "-1", "nan", "inf", "six")),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, words):
    printed, _, status = first_contact(tmp_path / "out", *options)
    assert status == 2
    assert words in printed
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in tmp_path / "file", tmp_path / "file" / "below":
        printed, _, status = first_contact(out)
        assert status == 2
        assert "error: argument --out: " in printed
        assert len(printed.splitlines()[-1:]) == 1
        assert "Traceback" not in printed
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("names", [["cupy"], ["ml_dtypes"], ["cupy", "ml_dtypes"]], ids=str)
def test_what_is_missing_is_told_first(tmp_path, monkeypatch, capsys, names):
    """Missing modules are told in a line, before a folder is made or a stage runs."""
    script = importlib.import_module("first_contact")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["first_contact.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {', '.join(names)} cannot be found: `pip install " in last
    assert not (tmp_path / "out").exists()


def test_help_has_all_stages(tmp_path):
    printed, _, status = first_contact(tmp_path, "--help")
    assert status == 0
    for stage in (*plan.ALONE, *plan.TOGETHER):
        assert f"{stage.seconds:.0f} s  {stage.purpose}" in printed


def test_interrupted_stages_leave_nothing_behind(tmp_path, monkeypatch):
    started = []

    class Process(LimitedProcess):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setenv("FIRST_CONTACT_FAULT", "large:hang,graph:hang")
    monkeypatch.setattr(runner, "LimitedProcess", Process)
    monkeypatch.setattr(runner.time, "sleep", interrupt)
    stages = [plan.Stage(name, 100, "") for name in ("large", "graph")]
    with pytest.raises(KeyboardInterrupt):
        runner.run(stages, report.Report(tmp_path, rehearse=True), 100)
    assert [process.wait().returncode for process in started] == [-9, -9]


def test_time_is_over_for_all_that_a_process_has_started():
    sleeper = "import time; print('slept', flush=True); time.sleep(1e6)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleeper!r}]); print(p.pid); p.wait()"
    done = run_limited([sys.executable, "-c", code], 2)
    assert (done.timed_out, done.returncode) == (True, -9)
    assert "slept" in done.output
    end = time.monotonic() + 30  # a signal takes its time
    while is_running(int(done.lines[0])):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["as usual", "in the background"])
def test_a_process_that_is_asked_first_has_its_last_words(handler):
    """A process heeds SIGINT even where this one ignores it, as jobs in the background of a shell do."""
    code = "import time\ntry: time.sleep(1e6)\nexcept KeyboardInterrupt: print('so far')"
    before = signal.signal(signal.SIGINT, handler)
    try:
        done = run_limited([sys.executable, "-c", code], 2, ask_first=True)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.timed_out, done.output) == (True, "so far\n")


def test_modules_come_from_the_checkout_first(monkeypatch):
    """Paths of the checkout come first for a process, which starts in its root, wherever this one was started."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["somewhere", ""]))
    path = variables()["PYTHONPATH"].split(os.pathsep)
    assert path == [str(ROOT), str(Path("somewhere").absolute()), str(BENCHMARKS)]


def is_running(process):
    """Whether a process is running; one that has ended may be left as a zombie, where nobody takes notice of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The output of NVIDIA's tools


def test_tools_that_find_something(tmp_path, tools):
    printed, outcomes, status = first_contact(tmp_path / "out", "--only", "ncu,sanitizer", TOOLS_FIND=str(tools))
    assert status == 1, printed
    checks = {name: (passed, detail) for name, passed, detail in outcomes["sanitizer"]["findings"]["checks"]}
    assert checks == {
        "compute-sanitizer memcheck": (False, "ERROR SUMMARY: 1 error"),
        "compute-sanitizer racecheck": (False, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"),
        "compute-sanitizer synccheck": (False, "ERROR SUMMARY: 1 error"),
        "compute-sanitizer initcheck": (False, f"{SAID['initcheck']} (did not come to its end)"),
    }
    notes = outcomes["sanitizer"]["findings"]["notes"]
    assert "memcheck: at bn_stats+0x2a0 in kernels/channels_first/packs.cuh:61" in notes
    assert any(note.startswith("racecheck: Error: Race reported between Write access at bn_stats") for note in notes)
    metrics, basic = outcomes["ncu"]["findings"]["notes"]
    assert "Failed to find metric" in metrics
    assert basic.startswith("ncu --set: ==ERROR== ERR_NVGPUCTRPERM")
    assert "ncu: ncu: 0 launches" in printed


@pytest.mark.parametrize(
    ("timed_out", "status", "output", "passed"),
    [
        (False, 0, f"{sanitizer.DONE}\n========= ERROR SUMMARY: 0 errors", True),
        (False, 0, f"{sanitizer.DONE}, as far as there was time\n========= ERROR SUMMARY: 0 errors", True),
        (False, 0, "========= ERROR SUMMARY: 0 errors", False),  # nothing was watched
        (False, 1, f"{sanitizer.DONE}\n========= ERROR SUMMARY: 0 errors", False),
        (True, -9, "========= COMPUTE-SANITIZER", True),
        (True, -9, "========= COMPUTE-SANITIZER\n========= Uninitialized __global__ memory read of size 4", False),
        (True, -9, "nothing of the tool", False),
    ],
)
def test_what_a_sanitizer_means(timed_out, status, output, passed):
    assert sanitizer.judge(Ended(status, timed_out, 1.0, output)).passed is passed


def test_launches_of_ncu_without_the_metrics():
    """The table of ``ncu --set basic`` has no such columns; the program's own output stands before and after it."""
    table = '"ID","Kernel Name","Grid Size"\n"","",""\n"0","bn_stats(const half *, int)","(512, 1, 1)"'
    (launch,) = ncu.launches(f"==PROF== x\nsaid\n{table}\nsaid\n")
    row = launch.row()
    assert (row["kernel"], row["grid"], row["stalls"]) == ("bn_stats", "(512, 1, 1)", "")
    assert np.isnan(row["dram_pct"])
    assert ncu.launches("==ERROR== none") == []


# ---------------------------------------------------------------------------------------------------------------------
# The stage that runs the tests on a GPU


@pytest.mark.parametrize(
    ("output", "counts", "failures"),
    [
        (".....F..s [ 60%]\n...E\n== 1 failed, 8 passed, 1 skipped, 1 error in 3.1s ==\n", (8, 2, 1), []),
        ("....\nFAILED tests/a.py::b - assert 1\nERROR tests/c.py\n1 failed, 1 error in 2.00s\n", (0, 2, 0), 2),
        (".....F..ss.. [ 60%]\n......E\nE   at a\nE\n.. [ 99%]\n!!!! KeyboardInterrupt !!!!\n", (17, 2, 2), []),
        ("no tests ran in 0.01s\n", (0, 0, 0), []),
    ],
)
def test_score_of_pytest(output, counts, failures):
    score = suite.score(output)
    assert (score.passed, score.failed, score.skipped) == counts
    assert len(score.failures) == (failures or 0)


@pytest.mark.parametrize(
    ("returncode", "timed_out", "output", "passed"),
    [
        (0, False, "5 passed in 1s", True),
        (1, False, "1 failed, 5 passed in 1s", False),
        (5, False, "no tests ran in 0.01s", False),
        (4, False, "ERROR: unrecognized arguments: -n", False),
        (2, True, "....... [ 10%]", True),
        (2, True, "...F... [ 10%]", False),
        (-9, True, "", False),
    ],
)
def test_what_pytest_means(tmp_path, returncode, timed_out, output, passed):
    log = Log(tmp_path / "findings")
    suite.judge(type("Task", (), {"log": log}), Ended(returncode, timed_out, 1.0, output))
    assert Findings.read(tmp_path / "findings").checks[0].passed is passed


def test_without_plugins_of_pytest(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_cuda(): pass\ndef test_cpu(): 1 / 0\n")
    command = suite.command([test], plugins=(), workers=8)
    done = run_limited([*command, "-p", "no:xdist", "-p", "no:timeout"], 60, suite.environment(required=False))
    assert str(suite.score(done.output)) == "1 passed, 0 failed, 0 skipped", done.output
    with_all = suite.command([test], plugins=suite.PLUGINS, workers=8)
    more = [option for option in with_all if option not in command]
    assert more == [*suite.PLUGINS.values(), "-n", "8", "--timeout=120"]


def test_variables_of_pytest(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    assert suite.environment(required=True).items() >= {"CUPYBN_REQUIRE_GPU": "1", "PYTEST_ADDOPTS": ""}.items()
    assert "CUPYBN_REQUIRE_GPU" not in suite.environment(required=False)


def test_the_tests_that_are_run():
    names = [path.name for path in suite.files(rehearse=False)]
    assert names[: len(suite.FIRST)] == list(suite.FIRST)
    assert "test_first_contact.py" not in names  # it would run itself
    assert {"test_errors.py", "test_syncbatchnorm.py", "test_watch.py"} <= set(names)


# ---------------------------------------------------------------------------------------------------------------------
# The stages find what they are there to find


@pytest.mark.skipif(not EMULATED, reason="the plans are those of an H200")
def test_smoke_takes_every_size_of_cluster_and_block():
    cases = smoke.cases_of_all_plans(smoke.MOST_ELEMENTS)
    assert {(len(case.shape), case.activation) for case in cases} == {(2, None), (2, "relu"), (3, None), (3, "relu")}
    ways = [(len(case.shape), way) for case in cases for way in case.label.split(", ")]
    found = {(ndim, *re.fullmatch(r"(bn_\w+) (.+) by (\d+) bytes", way).groups()) for ndim, way in ways}
    for step in insides.ON_CHIP:
        how = {ndim: {how for n, s, how, _ in found if (n, s) == (ndim, step)} for ndim in (2, 3)}
        assert {how for how in how[2] if "x" in how} == {"1 x 256"}
        assert {f"1 x {team}" for team in (32, 64, 128)} <= how[3]
        assert {f"{blocks} x 128" for blocks in (1, 2, 4, 8)} <= how[3]
        assert {f"8 x {team}" for team in (128, 256, 512)} <= how[3]
        for ndim, streamed in product((2, 3), (True, False)):
            of = {int(b) for n, s, how, b in found if (n, s, how == "streamed") == (ndim, step, streamed)}
            assert of == {2, 4, 8, 16}, (step, ndim, streamed)


def test_smoke_and_bench_end_when_their_time_is_over(tmp_path):
    for stage in smoke, bench, family:
        task = Task(Log(None), tmp_path, 0, rehearse=True)
        stage.run(task)
        assert "left out for lack of time" in task.log.findings.skipped[-1]
        assert [passed for _, passed, _ in task.log.findings.checks] == [False] * (stage is not smoke)


def test_work_that_a_tool_watches_ends_by_itself(tmp_path):
    """Tools are slow: the work takes what it needs for a case, and says how far it has come."""
    done = run_limited(Task(Log(None), tmp_path, 100, rehearse=True).command("sanitizer_work", -5), 100)
    assert done.returncode == 0, done.output
    assert done.output.startswith(f"{sanitizer.DONE}, as far as there was time: until ")


@pytest.mark.parametrize("name", ["y", "dx", "dweight", "dbias", "running_mean", "running_var"])
def test_smoke_sees_a_wrong_result(monkeypatch, name):
    case = smoke.Case((4, 3, 5), np.dtype(np.float32), 1, "relu")
    smoke.try_case(case)
    spoil(monkeypatch, name)
    with pytest.raises(AssertionError, match=rf"^{name}: off by"):
        smoke.try_case(case)


def test_smoke_sees_runs_that_differ(monkeypatch):
    spoil(monkeypatch, "y", calls=1)
    with pytest.raises(AssertionError, match=r"^y: two runs differ"):
        smoke.try_case(smoke.Case((4, 3, 5), np.dtype(np.float32)))


def spoil(monkeypatch, name, calls=2):
    """Let the first calls of `batch_norm_vjp` have one result that is wrong in its last element."""
    right = functional.batch_norm_vjp
    count = 0

    def wrong(x, running_mean, running_var, *args, **kwargs):
        nonlocal count
        count += 1
        y, vjp_fn = right(x, running_mean, running_var, *args, **kwargs)
        if count > calls:
            return y, vjp_fn
        for buffer, its in (running_mean, "running_mean"), (running_var, "running_var"), (y, "y"):
            if its == name and buffer is not None:
                buffer.reshape(-1)[-1] += 1e-1

        def back(dy):
            grads = vjp_fn(dy)
            for grad, its in zip(grads, ("dx", "dweight", "dbias"), strict=False):
                if its == name:
                    grad.reshape(-1)[-1] += 1e-1
            return grads

        return y, back

    monkeypatch.setattr(functional, "batch_norm_vjp", wrong)


@pytest.mark.parametrize("axis", large.TINY)
@pytest.mark.parametrize("name", ["output at", "gradient at", "mean of", "var of"])
def test_large_sees_a_wrong_result(monkeypatch, axis, name):
    problem = large.Problem(large.TINY[axis], np.dtype(np.float16), axis)
    large.try_problem(problem)
    spoil(monkeypatch, {"output at": "y", "gradient at": "dx"}.get(name), calls=1)
    right = functional.moments

    def wrong(x, **options):
        mean, var = right(x, **options)
        (mean if name == "mean of" else var)[-1] *= 1.001 if name in ("mean of", "var of") else 1
        return mean, var

    monkeypatch.setattr(functional, "moments", wrong)
    with pytest.raises(AssertionError, match=f"^{name}"):
        large.try_problem(problem)


@pytest.mark.parametrize(("wrong", "words"), [("result", "replay 0 differs"), ("buffer", "buffers differ")])
def test_graph_sees_a_replay_that_differs(monkeypatch, wrong, words):
    right, layers = graph.step, []

    def step(layer, x, dy):
        results = right(layer, x, dy)
        layers.append(layer)
        if layer is not layers[0]:
            (results[0] if wrong == "result" else layer.running_var)[:1] *= 2
        return results

    graph.replays_are_steps(graph.TINY[0], None)
    monkeypatch.setattr(graph, "step", step)
    with pytest.raises(AssertionError, match=words):
        graph.replays_are_steps(graph.TINY[0], None)


def test_threads_that_see_different_results(monkeypatch):
    right, count = functional.batch_norm, iter(range(1000))

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        y[:1] += next(count) == 5
        return y

    monkeypatch.setattr(functional, "batch_norm", wrong)
    with pytest.raises(AssertionError, match=r"different results of each thread: .*2"):
        graph.threads_on_streams(2)


@pytest.mark.skipif(not EMULATED, reason="the plans are those of an H200")
def test_what_is_measured_is_compiled_first():
    order = [(instance.kernel, instance.options) for instance in precompile.in_order()]
    assert sorted(order) == sorted((instance.kernel, instance.options) for instance in insides.instances_here())
    problems = [row.case.problem for row in bench.ROWS]
    asked = [insides.kernels_for(p.shape, p.channel_axis, p.dtype) for p in problems]
    assert set().union(*asked) <= set(order[:80])
    cases = smoke.all_cases(rehearse=False)
    assert set().union(*(insides.kernels_for(c.shape, c.channel_axis, c.dtype) for c in cases)) <= set(order[:350])


@pytest.mark.skipif(not EMULATED, reason="the plans are those of an H200, and launches are left out")
def test_what_check_asks_for_is_compiled_next(monkeypatch):
    """All kernels that the command launches for a dtype, as far as its calls come where no kernel does anything."""
    asked = set()

    class Launch:
        max_dynamic_shared_size_bytes = 0

        def __call__(self, *_, **__):
            pass

    def raw(kernel):
        asked.add((kernel.name, kernel.options))
        return Launch()

    monkeypatch.setattr(launcher.Kernel, "raw", property(raw))
    dtype, quick = np.dtype(np.float16), {op: CHECKED[op].shapes(quick=True) for op in CHECKED}
    for job in cli_check.kernel_jobs([dtype], quick | {"batch_norm": cli_check.SHAPES}):
        checked = CHECKED[job.op]
        with contextlib.suppress(cp.emulator.UninitialisedMemoryError):
            case = checked.case(job.shape, job.dtype, job.offset, job.variant)
            checked.steps[job.step].run(case, checked.sides[0])
    in_folders = {kernel for kernel in asked if "/" in kernel[0]}
    of_dtype = {kernel for kernel in insides.kernels_of_check() if "-DDATA_T=float16" in kernel[1]}
    assert in_folders == of_dtype
    assert asked <= {(instance.kernel, instance.options) for instance in precompile.in_order()[:650]}


def test_precompile_sees_what_does_not_compile(tmp_path, monkeypatch):
    task = Task(Log(None), tmp_path, 100, rehearse=True)
    share = precompile.compile_share(0, 2, time.time() + 100, rehearse=True)
    assert (share.compiled, share.left, share.failed) == (precompile.TINY // 2, 0, [])
    assert precompile.compile_share(0, 2, time.time(), rehearse=True).left == precompile.TINY // 2
    right = sources.source
    monkeypatch.setattr(sources, "source", lambda name: f"{right(name)}\nan error")
    failed = precompile.compile_share(0, 2, time.time() + 100, rehearse=True).failed
    assert len(failed) == precompile.TINY // 2
    assert all("-DDATA_T=" in text for text in failed)
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", lambda shares, mp_context: ThreadPoolExecutor(shares))  # noqa: ARG005
    precompile.run(task)
    ((_, passed, detail),) = task.log.findings.checks
    assert (passed, detail) == (False, f"{precompile.TINY} failed")


@pytest.fixture
def task(tmp_path):
    return Task(Log(tmp_path / "findings"), tmp_path, 100, rehearse=False)


class Done:
    """A process that has ended, in the place of one that is started."""

    def __init__(self, ended):
        self.ended = ended

    def wait(self):
        return self.ended

    def kill(self):
        pass


def test_a_dtype_that_fails(task, monkeypatch):
    """Whatever becomes of the process of one dtype, the results of the others are there."""

    def process(command, _):
        wrong = command[-1] == "bfloat16"
        return Done(Ended(-9 if wrong else 0, wrong, 1.0, "" if wrong else "All 9 calls are within their bounds."))

    monkeypatch.setattr(check, "LimitedProcess", process)
    check.run(task)
    found = {name.rpartition(" ")[2]: (passed, detail) for name, passed, detail in task.log.findings.checks}
    assert found.pop("bfloat16") == (False, "the time was over")
    assert found == dict.fromkeys(("float16", "float32", "float64"), (True, "All 9 calls are within their bounds."))


@pytest.mark.parametrize("stage", [check, mpi], ids=["check", "mpi"])
@pytest.mark.parametrize(
    ("returncode", "timed_out", "output", "detail"),
    [
        (1, False, "\n3 of 9 calls are off by more than is allowed:\n  bn_stats, float32: mean, 3 times\n\n", ""),
        (-9, True, "3 cases on 2 ranks", "the time was over"),
        (1, False, "", ""),
    ],
)
def test_commands_that_fail(task, monkeypatch, stage, returncode, timed_out, output, detail):
    ends = iter([Ended(0, False, 1.0, ""), Ended(returncode, timed_out, 1.0, output)])
    monkeypatch.setattr(mpi, "run_limited", lambda *_, **__: next(ends))
    monkeypatch.setattr(check, "LimitedProcess", lambda *_: Done(Ended(returncode, timed_out, 1.0, output)))
    monkeypatch.setattr(insides, "find_mpiexec", lambda: "mpiexec")
    stage.run(task)
    assert len(task.log.findings.checks) == (1 if stage is mpi else len(insides.dtypes()))
    for _, passed, said in task.log.findings.checks:
        assert not passed
        assert said.startswith(detail)
    if "3 times" in output:
        assert any("bn_stats, float32: mean, 3 times" in note for note in task.log.findings.notes)


@pytest.mark.parametrize("stage", [check, environment], ids=["check", "environment"])
def test_without_a_gpu_nothing_is_right(task, monkeypatch, stage):
    monkeypatch.setattr(insides, "cuda_missing", lambda: "no GPU")
    monkeypatch.setattr(environment, "mechanisms", type("None", (), {"run": staticmethod(lambda _: None)}))
    stage.run(task)
    assert not task.log.findings.checks[0].passed
    assert "no GPU" in task.log.findings.checks[0].detail


@pytest.mark.parametrize(
    ("output", "passed"), [("60 cases on 2 ranks", True), ("0 cases on 2 ranks", False), ("done", False)]
)
def test_ranks_without_cases(task, monkeypatch, output, passed):
    monkeypatch.setattr(mpi, "run_limited", lambda *_, **__: Ended(0, False, 1.0, output))
    monkeypatch.setattr(insides, "find_mpiexec", lambda: "mpiexec")
    mpi.run(task)
    assert task.log.findings.checks[0].passed is passed


def test_machines_without_tools(task, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    for stage in mpi, ncu, sanitizer:
        stage.run(task)
    assert task.log.findings.skipped == ["no mpiexec here", "no ncu here", "no compute-sanitizer here"]
    assert task.log.findings.checks == []


def test_bench_sees_what_is_wrong(task):
    row = bench.Row("NC", (6, 5), "float32", ("training", "inference", "backward"))

    def record(operation, peer, **more):
        fields = {"operation": operation, "peer": peer, "cold_us": {"median": 10.0 if peer == "cupybn" else 25.0}}
        return {**fields, "share_of_copy": 0.9, "launches": 1, "error_over_allowed": 0.5, **more}

    records = [
        record("training", "cupybn", error_over_allowed=float("nan")),
        record("training", "PyTorch"),
        record("inference", "cupybn", error="RuntimeError()"),
        {"operation": "training", "peer": "cuDNN Frontend", "error": "no engine", "refused": True},
        {"operation": "backward", "peer": "PyTorch", "error": "no memory"},
    ]
    bench.report(task, row, records)
    found = task.log.findings
    assert [(name, passed) for name, passed, _ in found.checks] == [
        ("NC 6x5 float32 training is right", False),
        ("NC 6x5 float32 inference", False),
        ("NC 6x5 float32 backward", False),
    ]
    expected = {"us": 10.0, "torch_x": 2.5, "cudnn_x": "refused", "of_copy": 0.9, "launches": 1}
    assert found.table[0].items() >= expected.items()
    assert found.notes == [
        "cuDNN Frontend refused: NC 6x5 float32 training: no engine",
        "PyTorch failed: NC 6x5 float32 backward: no memory",
    ]
    assert "10.0 us, 0.90 of copy, torch x2.5, cudnn refused" in found.highlights[0]


@pytest.mark.skipif(not EMULATED, reason="needs no second look where the stage itself runs")
def test_nccl_sees_a_communicator_that_is_not_refused():
    class Comm:
        size = 1
        check = gather = sum = texts = abort = lambda *_: None

    with pytest.raises(AssertionError, match="expected ValueError"):
        nccl.refused_once_aborted(Comm())


def test_all_that_the_library_asks_for_is_compiled(monkeypatch):
    """Every step over shapes, dtypes and alignments of all kinds, on the device that is there."""
    compiled = {(instance.kernel, instance.options) for instance in insides.instances_here()}
    assert {kernel for kernel, _ in compiled} == set(sources.kernel_names())
    shapes = [(N, C, L) for L in (1, 2, 49, 3136, 1 << 20) for N in (2, 64, 5000) for C in (2, 3, 64, 1000)]
    asked = set()
    for (N, C, L), dtype, most, masked in product(shapes, insides.dtypes(), (16, 8, 4, 2), (False, True)):
        width = math.gcd(most, (L if L > 1 else C) * dtype.itemsize) // dtype.itemsize
        if width:
            monkeypatch.setattr(insides, "_width", lambda *_, width=width: width)
            asked |= insides.kernels_for((N, C, L), 1, dtype, masked)
            asked |= insides.kernels_of_second_order((N, C, L), dtype)
    assert len(asked) > 300
    assert {"-DMASKED=1" in options for _, options in asked} == {True, False}
    assert asked <= compiled


def test_all_that_the_norms_ask_for_is_compiled():
    """Rows of every length, in groups of few and of many channels, with every dtype of weights, aligned and not."""
    compiled = {(instance.kernel, instance.options) for instance in insides.instances_here()}
    norms = [(4, Norm(1)), (4096, Norm(1)), (4096, Norm(1, False)), (100_000, Norm(1)), (24, Norm(8)), (320, Norm(32))]
    asked = set()
    for (C, norm), step, dtype, width in product(norms, insides.OF_NORMS, insides.dtypes(), (8, 4, 2, 1)):
        if width * dtype.itemsize > 16:
            continue
        for N, L, vectors in product((1, 64, 200_000), (1, 8, 3136), {dtype, np.dtype(np.float32)}):
            if (L == 1 or norm.centered) and (L if L > 1 else C // norm.groups) % width == 0:
                for summed in {False, step == "norm_backward"}:
                    asked.add(cupy_norms.row_plan(step, (N, 1, C, L), norm, dtype, width, vectors, summed, 0).kernel)
        for N, A in product((1, 64), (8, 3136)):
            asked.update(plan.kernel for plan in norms_last.plans_of(step, (N, A, C, 1), dtype, norm.groups, width, 0))
    assert len(asked) > 300
    macros = {option for kernel in asked for option in kernel.options}
    assert macros >= {f"-D{name}={value}" for name in ("ON_CHIP", "SUMS_ON_CHIP", "ELEMENTWISE") for value in (0, 1)}
    assert {(kernel.name, kernel.options) for kernel in asked} <= compiled


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def outcome(*, checks=(), status=0, timed_out=False, **findings):
    return report.Outcome(Findings(checks=list(checks), **findings), status, timed_out, 1.0, "said\n\nlast words\n")


def test_a_summary_has_sixty_lines_at_most(tmp_path):
    checks = [Check(f"check {i} " * 20, False, "why\nelse " * 60) for i in range(40)]
    lists = {name: [f"{i} {name} " * 40 for i in range(100)] for name in ("notes", "skipped", "highlights")}
    found = report.Report(tmp_path, rehearse=False)
    for name in plan.NAMES:
        found.add(name, outcome(checks=checks, status=1, **lists))
    lines = found.summary().splitlines()
    assert len(lines) == report.MOST_LINES
    assert len(found.summary().encode()) < 12000
    assert lines[-1].startswith("skipped: environment: 0 skipped")


def test_the_longest_list_is_cut(tmp_path):
    found = report.Report(tmp_path, rehearse=False)
    found.add("bench", outcome(checks=[Check("ran", True, "")], highlights=[f"row {i}" for i in range(100)]))
    found.add("ncu", outcome(checks=[Check("ran", True, "")], highlights=["ncu 0", "ncu 1"]))
    lines = found.summary().splitlines()
    assert "ncu 1" in lines
    assert lines[-1].startswith("row ")
    assert len(lines) == report.MOST_LINES


@pytest.mark.parametrize(
    ("verdict", "arguments"),
    [
        ("passed", {"checks": [Check("a", True, "")]}),
        ("FAILED", {"checks": [Check("a", True, ""), Check("b", False, "")]}),
        ("skipped", {"skipped": ["no tool"]}),
        ("FAILED", {}),
        ("CRASHED", {"checks": [Check("a", True, "")], "status": -11}),
        ("TIME OVER", {"status": 1, "timed_out": True}),
    ],
)
def test_verdicts(tmp_path, verdict, arguments):
    found = report.Report(tmp_path, rehearse=False)
    found.add("smoke", outcome(**arguments))
    assert found.outcomes["smoke"].verdict == verdict
    assert found.passed is (verdict in ("passed", "skipped"))
    assert ("last words" in (tmp_path / "report.md").read_text()) is not found.passed
    assert f"smoke {verdict}" in found.summary()
    assert ("no failures" in found.summary()) is found.passed


def test_findings_outlive_the_process(tmp_path):
    """Each entry is in the file as soon as it is made."""
    log, path = Log(tmp_path / "findings"), tmp_path / "findings"
    with log.checking("divides") as details:
        details.append(1 / 2)
    assert Findings.read(path).checks == [("divides", True, "0.5")]
    with log.checking("divides by zero"):
        _ = 1 / 0
    assert Findings.read(path).checks[1].detail.startswith("ZeroDivisionError: division by zero [")
    log.fact("answer", np.float32(42))
    log.row(a=1)
    log.note("a note")
    log.skip("no tool")
    log.highlight("a line")
    read = Findings.read(path)
    assert (read.facts, read.table, read.notes) == ({"answer": "42.0"}, [{"a": 1}], ["a note"])
    assert (read.skipped, read.highlights) == (["no tool"], ["a line"])
    assert Findings.read(tmp_path / "none") == Findings()


def test_files_are_whole(tmp_path, monkeypatch):
    """An interrupted write leaves the old text."""
    path = tmp_path / "report.md"
    write_whole(path, "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in "write_text", "replace":
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_whole(path, "new")
        assert path.read_text() == "old"
    write_whole(path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
