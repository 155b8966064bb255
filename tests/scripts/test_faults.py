"""Scripts killed at random moments end as if nothing had happened: the same bits, and no query that is not counted.

By hand: `python -m pytest tests/scripts/test_faults.py --kills 100 --whole-demo`.
"""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extraction.victims import ledger
from extraction.weights import read_checkpoint, read_metadata, read_state

ROOT = Path(__file__).parents[2]
SCRIPTS = ["grey_box/swin_to_r21_kd.py", "black_box/attack_video_swin.py"]  # a later one joins by a line here and below


def small_demo(demo_set: Path, script: str = SCRIPTS[0]) -> list[str]:
    """Flags that make a script's demo a matter of seconds."""
    aux = ["--aux", demo_set / "unrelated_a", demo_set / "unrelated_b"]
    flags = {
        "grey_box/swin_to_r21_kd.py": ["--in-domain", demo_set / "train_5per", "--epochs", 5, *aux],
        "black_box/attack_video_swin.py": ["--iterations", 12, "--batch-size", 4, "--replay-clips", 32, "--score-every", 100],
    }
    return [str(flag) for flag in ["--val", demo_set / "val", *flags[script]]]


def start(script: str, out_dir: Path, flags: list[str]) -> subprocess.Popen:
    metered = [sys.executable, str(ROOT / "tests/metered.py"), f"{out_dir}.meter", str(ROOT / script)]
    command = [*metered, "--demo", "--device", "cpu", "--out-dir", str(out_dir), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_to_the_end(script: str, out_dir: Path, flags: list[str]) -> str:
    process = start(script, out_dir, flags)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    return output


@pytest.mark.slow  # tests/chaos has a few such kills, and other faults, in the plain tests
@pytest.mark.parametrize("script", SCRIPTS)
def test_random_kills_change_nothing(script, tmp_path, demo_set, request):
    kills, whole = request.config.getoption("--kills"), request.config.getoption("--whole-demo")
    flags = ["--checkpoint-seconds", "0.3"] + ([] if whole else small_demo(demo_set, script))
    run_to_the_end(script, tmp_path / "undisturbed", flags)
    looping = json.loads((tmp_path / "undisturbed" / "results.json").read_text())["seconds"]
    chance = random.Random(0)
    done = 0
    while done < kills:
        saved = when_it_saved(tmp_path / "killed")
        process = start(script, tmp_path / "killed", flags)
        wait = chance.uniform(0.1, 3.0)
        if chance.random() < 0.7:  # in the loop, after a checkpoint of this life; else while it starts
            while process.poll() is None and when_it_saved(tmp_path / "killed") == saved:
                time.sleep(0.02)
            wait = chance.uniform(0.0, looping / kills)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
            check_nothing_is_torn(tmp_path / "killed")
        else:
            output = process.communicate()[0]
            assert process.returncode == 0, output[-2000:]
            break
    run_to_the_end(script, tmp_path / "killed", flags)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("undisturbed", "killed")]
    students = [read_student(tmp_path / name) for name in ("undisturbed", "killed")]
    answered = (tmp_path / "killed.meter").stat().st_size
    print(
        f"{script}: {done} kills, {results[1]['num_queries']} queries counted, {answered} answered, {looping:.0f} s undisturbed"
    )
    assert done >= kills / 2
    assert students[0] == students[1]
    # A batch is counted before the victim sees it: one that was killed in flight is asked again, and counted again.
    undisturbed, killed = (result["num_queries"] for result in results)
    assert undisturbed == (tmp_path / "undisturbed.meter").stat().st_size
    assert undisturbed <= answered <= killed <= undisturbed + done * results[1]["config"]["batch_size"]
    for point, other in zip(*(result["history"] for result in results), strict=True):
        assert point["num_queries"] <= other["num_queries"] <= killed
        assert point | {"num_queries": 0} == other | {"num_queries": 0}
    rows = ledger.count(str(tmp_path / "killed" / "ledger.sqlite"))
    if script.startswith("grey_box"):
        assert rows == undisturbed  # each cached answer is a view of its own: none was lost, none is there twice
    else:
        assert rows <= undisturbed  # some are forgotten, on purpose
    ledger.verify(str(tmp_path / "killed" / "ledger.sqlite"))


def read_student(folder: Path) -> tuple[dict[str, bytes], dict]:
    """Bits and metadata of a student, all but its number of queries: a batch that was killed in flight is counted twice."""
    path = folder / "student.safetensors"
    weights = {name: value.numpy().tobytes() for name, value in read_state(path).items()}
    return weights, {name: value for name, value in read_metadata(path).items() if name != "num_queries"}


def when_it_saved(folder: Path) -> int:
    path = folder / "state.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def check_nothing_is_torn(folder: Path) -> None:
    if (folder / "state.pt").exists():
        read_checkpoint(folder / "state.pt")
    for name in ("config.json", "results.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())


@pytest.mark.slow  # of these two the plain tests have their fault among those of tests/chaos
def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tmp_path, demo_set):
    flags = small_demo(demo_set)
    process = start(SCRIPTS[0], tmp_path / "run", flags)
    while not (tmp_path / "run" / "clips.png").exists():  # the first batch is through
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert "resuming" in run_to_the_end(SCRIPTS[0], tmp_path / "run", flags)


def test_without_data_a_script_stops_at_once_with_one_line(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / SCRIPTS[0])]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout == ""
    assert len(process.stderr.strip().splitlines()) == 1
    assert "weights/r2plus1d_34" in process.stderr
    assert "--demo" in process.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 10  # some 3; by the clock a busy machine takes any time


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_goes_on_from_the_checkpoint_before(tmp_path, demo_set):
    def no_room() -> None:  # files may not grow beyond half a checkpoint
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    # Decoding in the process itself: workers hand clips over in files in memory, to which the limit would apply too.
    flags = [*small_demo(demo_set), "--checkpoint-seconds", "0.2", "--num-workers", "0"]
    run_to_the_end(SCRIPTS[0], tmp_path / "undisturbed", flags)
    process = start(SCRIPTS[0], tmp_path / "run", flags)
    state = tmp_path / "run" / "state.pt"
    while not state.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = state.read_bytes()
    command = [sys.executable, str(ROOT / SCRIPTS[0]), "--demo", "--device", "cpu", "--out-dir", str(tmp_path / "run"), *flags]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=no_room)
    assert failed.returncode == 1, failed.stderr
    assert re.search(r"cannot write .*state.pt: .*; make room", failed.stderr.strip().splitlines()[-1])
    assert "Traceback" not in failed.stderr
    assert state.read_bytes() == before
    assert not list((tmp_path / "run").glob("*.partial"))
    run_to_the_end(SCRIPTS[0], tmp_path / "run", flags)
    students = [read_student(tmp_path / name) for name in ("undisturbed", "run")]
    assert students[0] == students[1]
