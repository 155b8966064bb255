"""Cells several at a time: what comes out is what comes out of one after the other, whatever is stopped, killed or missing."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from black_box import run_all as black_box
from extraction.errors import UserError
from extraction.evaluation import sweep
from extraction.evaluation.suite import Experiment, run_all
from extraction.evaluation.sweep import Step, run_cells
from tests.metered import read_meter

ROOT = Path(__file__).parents[2]
# A script as the project's are: it has its folder alone, builds on another's student, finishes and saves when it is stopped.
SCRIPT = """
import fcntl, json, os, pathlib, signal, sys, time
flags = {name: value for name, value in zip(sys.argv[1:], sys.argv[2:]) if name.startswith("--")}
out = pathlib.Path(flags["--out-dir"])
out.mkdir(parents=True, exist_ok=True)
lock = (out / "run.lock").open("w")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
def stop(number, frame):
    with (out / "stopped").open("a") as file:
        file.write("x")
    if "--deaf" not in flags:
        time.sleep(0.3)
        sys.exit(130)
signal.signal(signal.SIGTERM, stop)
student = flags["--seed"] + out.name + (pathlib.Path(flags["--from"]).read_text() if "--from" in flags else "")
(out / "environment.json").write_text(json.dumps(dict(os.environ)))
begin = time.time()
while time.time() < begin + float(flags.get("--seconds", 0)):
    time.sleep(0.05)
if "--fail" in flags:
    sys.exit("script.py: why it fails\\n")
(out / "student").write_text(student)
results = dict(
    victim=None, student="tiny", num_queries=1000, top1=0.5, seconds=3.2, num_val_videos=240, chance_top1=1 / 12, commit="abc",
    stopped="epochs", times=[begin, time.time()],
)
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def plan_cells(script: str, runs: Path, *all_flags: tuple[str, ...]) -> list[list[Step]]:
    """A cell of one step for each tuple of flags."""
    folders = [str(runs / str(number)) for number in range(len(all_flags))]
    commands = [(script, "--out-dir", folder, "--seed", "0", *flags) for folder, flags in zip(folders, all_flags, strict=True)]
    return [[Step(f"cell {k}", f"[{k}]", folders[k], command)] for k, command in enumerate(commands)]


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def interrupt_when(condition: Callable[[], object]) -> None:
    """Ctrl-C at this process, once."""

    def interrupt() -> None:
        wait_for(condition)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def read_students(runs: Path) -> dict[str, str]:
    return {str(path.relative_to(runs)): path.read_text() for path in sorted(runs.glob("seed_*/*/student"))}


def test_several_at_a_time_give_what_one_at_a_time_gives(script, tmp_path, capfd):
    first = Experiment("first", script, "-", ("--seconds", "0.5"))
    second = Experiment("second", script, "-", ("--from", "{runs}/first/student"))
    third = Experiment("third", script, "-", ("--from", "{runs}/second/student"))
    other = Experiment("other", script, "-", ("--seconds", "0.5"))
    experiments = [first, other, second, third]
    tables = [run_all(experiments, tmp_path / str(jobs), False, (0, 1), jobs=jobs) for jobs in (1, 3)]
    assert tables[0] == tables[1]
    students = [read_students(tmp_path / str(jobs)) for jobs in (1, 3)]
    assert students[0] == students[1]
    assert students[0]["seed_1/third/student"] == "1third1second1first"
    begun, ended = zip(
        *(json.loads((tmp_path / "3" / "seed_0" / name / "results.json").read_text())["times"] for name in ("first", "other")),
        strict=True,
    )
    assert max(begun) < min(ended)  # both at once
    told = capfd.readouterr().out
    assert "[seed 1, 4 of 4] third: started on" in told
    assert "[seed 1, 4 of 4] third: done in" in told
    assert (tmp_path / "3" / "seed_1" / "third" / "log.txt").is_file()
    assert not (tmp_path / "1" / "seed_1" / "third" / "log.txt").exists()
    run_all(experiments, tmp_path / "3", False, (0, 1), jobs=3)  # nothing is left to do
    assert "started" not in capfd.readouterr().out


def test_a_failure_is_told_and_hides_nothing(script, tmp_path, capfd):
    bad = Experiment("bad", script, "-", ("--fail", "yes"))
    later = Experiment("later", script, "-", ("--from", "{runs}/bad/student"))
    good = Experiment("good", script, "-", ("--seconds", "0.3"))
    with pytest.raises(UserError, match=r"^failed: bad \(seed 0\), later \(seed 0\); run the same again"):
        run_all([bad, later, good], tmp_path / "runs", False, (0,), jobs=2)
    assert "[seed 0, 1 of 3] bad: failed with status 1: script.py: why it fails" in capfd.readouterr().out
    assert "| good | - | tiny | 1000 |" in (tmp_path / "runs" / "table.md").read_text()


def test_one_at_a_time_changes_nothing_in_the_environment(script, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)

    def read(jobs: int) -> list[dict]:
        assert not run_cells(plan_cells(script, tmp_path / str(jobs), *[("--seconds", "0.5")] * 2), jobs)
        return [json.loads((tmp_path / str(jobs) / str(k) / "environment.json").read_text()) for k in range(2)]

    assert read(1) == [dict(os.environ)] * 2
    several = read(2)
    assert [cell["OMP_NUM_THREADS"] for cell in several] == ["3", "3"]
    assert {cell["CUDA_VISIBLE_DEVICES"] for cell in several} == {"4", "7"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [cell["OMP_NUM_THREADS"] for cell in read(3)] == ["5", "5"]
    assert several[0].keys() == set(os.environ)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_has_scripts_save_and_starts_no_more(jobs, number, script, tmp_path):
    cells = plan_cells(script, tmp_path, (), ("--seconds", "60"), ("--seconds", "60"), ("--seconds", "60"))
    under_way = [tmp_path / str(1 + k) for k in range(jobs)]

    def stop() -> None:
        wait_for(lambda: all((folder / "environment.json").exists() for folder in under_way))
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match=r"^stopped, 1 of 4 cells are done; the same command goes on$"):
        run_cells(cells, jobs)
    assert time.monotonic() - begin < 20
    assert [(folder / "stopped").read_text() for folder in under_way] == ["x"] * jobs
    assert not (tmp_path / str(jobs + 1)).exists()
    assert not sweep._running


def test_what_does_not_stop_is_killed(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "STOP_SECONDS", 0.5)
    interrupt_when((tmp_path / "0" / "environment.json").exists)
    with pytest.raises(KeyboardInterrupt):
        run_cells(plan_cells(script, tmp_path, ("--deaf", "yes", "--seconds", "60")), 2)
    assert (tmp_path / "0" / "stopped").read_text() == "x"
    assert not (tmp_path / "0" / "student").exists()


def test_a_script_saves_and_lets_its_folder_go_when_the_sweep_is_killed(script, tmp_path):
    cells = plan_cells(script, tmp_path, ("--seconds", "60"))
    code = f"from extraction.evaluation.sweep import Step, run_cells; run_cells({cells!r}, 2)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "0" / "environment.json").exists)
    process.kill()
    process.wait()
    wait_for((tmp_path / "0" / "stopped").exists)
    began = time.monotonic()
    sweep._wait_for_folder(tmp_path / "0", "another", 20)
    assert 0.1 < time.monotonic() - began < 10
    assert (tmp_path / "0" / "stopped").read_text() == "x"  # a second time would have cut the step short


def test_an_engine_that_is_not_there_gets_one_line(script, tmp_path, monkeypatch, error_line):
    cells = plan_cells(script, tmp_path, ())
    assert "--jobs and --cluster: choose one" in error_line(run_cells, cells, 2, "tcp://127.0.0.1:1")
    assert error_line(black_box.main, black_box.Config(jobs=0)) == "--jobs 0: it must be at least 1"
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert error_line(run_cells, cells, 1, "tcp://127.0.0.1:1").endswith("pip install -e '.[cluster]'")
    assert run_cells([], 1, "tcp://127.0.0.1:1") == []  # nothing to do


def test_cells_that_the_engine_lost_are_named(script, tmp_path, capfd):
    (steps,) = plan_cells(script, tmp_path, ())
    lost: Future = Future()
    lost.cancel()
    assert sweep._name_failed(lost, steps) == ["cell 0"]
    assert "[0]: not run to its end (CancelledError" in capfd.readouterr().out


def test_a_command_may_name_its_machine(script, tmp_path):
    (tmp_path / socket.gethostname()).write_text("of this machine")
    assert not run_cells(plan_cells(script, tmp_path, ("--from", f"{tmp_path}/{{node}}")))
    assert (tmp_path / "0" / "student").read_text() == "00of this machine"


def test_an_address_that_nobody_answers_at_gets_one_line(script, tmp_path, monkeypatch, error_line):
    pytest.importorskip("distributed")
    monkeypatch.setattr(sweep, "ANSWER_SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        assert error_line(run_cells, plan_cells(script, tmp_path, ()), 1, address).startswith(f"--cluster {address}: no Dask")


# The whole of it: real scripts, shortened, each with a meter of its own at its victim, on two nodes of an engine, one of which
# is killed in the middle of a run.

METERED = """
import pathlib, runpy, sys
from tests.metered import put_meter
out = pathlib.Path(sys.argv[sys.argv.index("--out-dir") + 1])
out.mkdir(parents=True, exist_ok=True)
put_meter(out / "meter")
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def real_experiments(demo_set, tmp_path_factory) -> list[Experiment]:
    """Four cells for each seed: three experiments, and a chain of two."""
    folder = tmp_path_factory.mktemp("metered")
    val, own = ("--val", str(demo_set / "val")), ("--in-domain", str(demo_set / "train_5per"))
    aux = ("--aux", str(demo_set / "unrelated_a"))
    short = ("--iterations", "6", "--batch-size", "8", "--score-every", "60", "--replay-clips", "40")
    before = ("--student-weights", "{runs}/swin_to_vit_auxiliary/student.safetensors")
    found = []
    for script, flags in {
        "grey_box/swin_to_r21": (*own, "--epochs", "4"),
        "grey_box/swin_to_c3d": (*own, "--epochs", "4"),
        "grey_box/swin_to_vit_auxiliary": (*aux, "--epochs", "2"),
        "grey_box/swin_to_vit_finetune": (*own, *before, "--epochs", "2"),
        "black_box/attack_video_swin": short,
    }.items():
        metered = folder / f"{Path(script).name}.py"
        metered.write_text(METERED.format(script=str(ROOT / f"{script}.py")))
        shared = ("--device", "cpu", "--num-workers", "0", "--checkpoint-seconds", "0.5", "--demo")
        found.append(Experiment(metered.stem, str(metered), "-", (*val, *flags, *shared)))
    return found


@pytest.fixture(scope="module")
def sequential(real_experiments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sequential")
    run_all(real_experiments, folder, False, (0, 1, 2))
    return folder


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a Dask scheduler with two nodes over loopback, of one thread each."""
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"], [sys.executable, "-m", "distributed.cli.dask_worker"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    nodes = [[*dask[1], address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]] * 2
    started = []
    try:
        for command in ([*dask[0], "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"], *nodes):
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        with importlib.import_module("distributed").Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in started:
            process.kill()
            process.wait()


def find_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_a_node(runs: Path, whole: bool, killed: list[Path], after: int = 3) -> None:
    """Kill -9 a node, and with `whole` all it started, in the middle of a run that has asked its victim."""

    def find_run() -> Path | None:
        if len(list(runs.glob("seed_*/*/results.json"))) < after:
            return None
        under_way = [meter.parent for meter in runs.glob("seed_*/*/meter") if not (meter.parent / "results.json").exists()]
        return next((run for run in under_way if read_meter(run / "meter") and (run / "state.pt").exists()), None)

    run = wait_for(find_run, 1200)
    script = int((run / "run.lock").read_text().split()[1])
    supervisor = find_parent(script)
    node = find_parent(supervisor)
    for pid in (node, *((supervisor, script) if whole else ())):
        os.kill(pid, signal.SIGKILL)
    killed.append(run)


def compare_runs(sequential: Path, others: Path, lost: Path | None) -> int:
    """The number of runs that two folders hold, after all of them were found equal bit for bit, and so their bills.

    In the run `lost` all processes were killed: what was counted by then, and not answered, was asked again, a batch at most.
    """
    names = sorted(path.parent.relative_to(sequential) for path in sequential.glob("seed_*/*/results.json"))
    for name in names:
        first, second = (json.loads((folder / name / "results.json").read_text()) for folder in (sequential, others))
        weights, same = (load_file(folder / name / "student.safetensors") for folder in (sequential, others))
        assert weights.keys() == same.keys()
        assert all(torch.equal(weights[key], same[key]) for key in weights), name
        bills = [results["num_queries"] for results in (first, second)]
        assert read_meter(sequential / name / "meter") == bills[0]
        assert read_meter(others / name / "meter") <= bills[1]
        if others / name == lost:
            assert bills[0] <= bills[1] <= bills[0] + first["config"]["batch_size"]
            continue
        for results in (first, second):
            del results["seconds"], results["commit"]
            results["config"] = {k: v for k, v in results["config"].items() if not str(v).startswith("/")}  # folders
        assert first == second, name
        assert read_meter(others / name / "meter") == bills[1], name
    return len(names)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["the engine's process is killed", "all processes of the node are killed"])
def test_a_node_that_dies_changes_nothing(whole, real_experiments, sequential, tmp_path, capfd):
    pytest.importorskip("distributed")
    killed: list[Path] = []
    with two_nodes() as address:
        killer = threading.Thread(target=kill_a_node, args=(tmp_path, whole, killed))
        killer.start()
        run_all(real_experiments, tmp_path, False, (0, 1, 2), cluster=address)
        killer.join()
    told = capfd.readouterr().out
    (run,) = killed
    assert told.count(f"{run.name}: started on") == 4  # three seeds, and once more
    log = (run / "log.txt").read_text()
    assert ("stopping after this step" in log) != whole
    print(f"{told}\nkilled in {run.relative_to(tmp_path)}")
    assert compare_runs(sequential, tmp_path, run if whole else None) == 15
