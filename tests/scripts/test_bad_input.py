"""Malformed videos, files and folders: each gets one line, and nothing else happens.

By hand: `python -m pytest tests/scripts/test_bad_input.py --mutations 1000`.
"""

import gc
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from extraction.compute import choose_device
from extraction.data.clips import Clips, report_broken
from extraction.data.decoding import Unreadable, decode_clip, probe
from extraction.data.demo import ACTIONS, SHAPES, create_clip, write_video
from extraction.data.folders import Video, find_videos
from extraction.errors import UserError
from extraction.evaluation.results import format_table
from extraction.experiment import refuse_other_checkout
from extraction.runs import Run, require_form
from extraction.victims import ledger
from extraction.victims.zoo import load_victim
from extraction.weights import read_checkpoint, read_metadata, read_state, save_weights
from grey_box import swin_to_r21_kd
from tests import forked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, create_clip([ACTIONS["growing"]], SHAPES, 0, 40, 64))
    return path


def without_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


def variable_rate(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, pts in enumerate([0, 10, 20, 400, 410, 1500, 1510, 1520, 3000, 3010, 3020, 3500]):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def probe_and_decode(path: Path) -> np.ndarray:
    probe(path)
    return decode_clip(path, 0, 8, 1, 32)


def write_case(case: str, path: Path, good: Path, rotate_video: Callable[[Path, Path], None]) -> None:
    whole = good.read_bytes()
    middle = create_clip([ACTIONS["growing"]], SHAPES, 0, 1, 64)
    {
        "empty": lambda: path.write_bytes(b""),
        "noise": lambda: path.write_bytes(random.Random(0).randbytes(50_000)),
        "text": lambda: path.write_text("see you later\n" * 100),
        "header only": lambda: path.write_bytes(whole[:40]),
        "truncated": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "zero frames": lambda: without_frames(path),
        "folder": lambda: path.mkdir(),
        "one frame": lambda: write_video(path, middle),
        "variable frame rate": lambda: variable_rate(path),
        "rotated": lambda: rotate_video(path, good),
        "huge": lambda: write_video(path, np.zeros((2, 4096, 4096, 3), np.uint8)),
    }[case]()


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("empty", "empty file"),
        ("noise", "Invalid data found when processing input|no video stream"),
        ("text", "Invalid data found when processing input|no video stream"),
        ("header only", "Invalid data found when processing input"),
        ("truncated", "Invalid data found when processing input"),
        ("zero frames", "no frames|no video stream|Invalid data|frames of 0x0 pixels|no frame could be decoded"),
        ("folder", "Is a directory"),
        ("one frame", None),
        ("variable frame rate", None),
        ("rotated", None),
        ("huge", None),
    ],
)
def test_videos(tmp_path, good, rotate_video, case, line):
    path = tmp_path / "video.mp4"
    write_case(case, path, good, rotate_video)
    if line is None:
        found = probe(path)
        assert decode_clip(path, 0, 8, 1, 32).shape == (8, 32, 32, 3)
        assert decode_clip(path, found.num_frames - 1, 8, 1, 32).shape == (8, 32, 32, 3)
    else:
        with pytest.raises(Unreadable, match=line) as caught:
            probe_and_decode(path)
        assert "\n" not in str(caught.value)


def test_a_rotated_video_comes_out_upright(tmp_path, good, rotate_video):
    rotate_video(tmp_path / "turned.mp4", good)
    upright, turned = decode_clip(good, 0, 1)[0], decode_clip(tmp_path / "turned.mp4", 0, 1)[0]
    assert np.array_equal(turned, np.rot90(upright, -1)) or np.array_equal(turned, np.rot90(upright, 1))
    assert not np.array_equal(turned, upright)


def test_mutations_of_real_videos_raise_nothing_else_and_leak_nothing(tmp_path, good, request):
    count = request.config.getoption("--mutations")
    folder = os.environ.get("DECODER_TESTS")  # a folder of odd real files to mutate as well
    seeds = [good] + [p for p in sorted(Path(folder or tmp_path).rglob("*")) if p.is_file() and p.stat().st_size < 3e6]
    chance, path = random.Random(0), tmp_path / "mutated"
    decoded = unreadable = 0
    for number in range(count):
        if number == count // 3:  # by now every decoder is loaded and the allocator has settled
            gc.collect()
            files, memory = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        content = bytearray(chance.choice(seeds).read_bytes())
        for _ in range(chance.randint(1, 20)):
            at = chance.randrange(len(content))
            kind = chance.randrange(40)
            if kind == 0 and len(content) > 1000:
                del content[at : at + chance.randint(1, 200)]
            elif kind == 1:
                content[at:at] = content[: chance.randint(1, 100)]
            elif kind < 20:
                content[at : at + 4] = chance.randbytes(4)
            else:
                content[at] = chance.randrange(256)
        if chance.random() < 0.2:
            del content[chance.randrange(1, len(content)) :]
        path.write_bytes(content)
        try:
            found = probe(path)
            clip = decode_clip(path, chance.randrange(found.num_frames), 4, 1, 32)
            assert clip.shape == (4, 32, 32, 3)
            decoded += 1
        except Unreadable:
            unreadable += 1
    gc.collect()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    leaked = len(os.listdir("/proc/self/fd")) - files
    print(f"{decoded} decoded, {unreadable} unreadable, {grown / 1024:.1f} MB grown, {leaked} files left open")
    assert leaked <= 0
    assert grown < 64 * 1024  # kB: of the peak, in which one large mutated frame counts too


@pytest.mark.parametrize(
    ("write", "read", "line"),
    [
        (lambda p: None, read_state, "not found"),
        (lambda p: p.write_bytes(b""), read_state, "not a readable weight file|pickled code"),
        (lambda p: p.write_bytes(b"hello" * 99), read_state, "pickled code|not a readable weight file"),
        (lambda p: p.write_text("# A model\n"), read_state, "not a weight file, or pickled code"),
        (lambda p: torch.save({"epoch": 3}, p), read_state, "not a state dict"),
        (lambda p: torch.save([1, 2], p), read_state, "not a state dict"),
        (lambda p: torch.save(torch.nn.Linear(1, 1), p), read_state, "whole module.* convert it once"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + b"x" * 500), read_checkpoint, "truncated"),
    ],
)
def test_weight_files(tmp_path, write, read, line):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(UserError, match=line) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "weights.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "package", "line"),
    [
        ("tflite", "ai_edge_litert", "not a TFLite model that can be opened"),
        ("onnx", "onnxruntime", "not an ONNX model that can be opened"),
    ],
)
@pytest.mark.parametrize("content", [b"", random.Random(0).randbytes(50_000), b"see you later\n" * 100, None])
def test_graph_files(tmp_path, kind, package, line, content):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[{kind}]'")
    path = tmp_path / f"model.{kind}"
    if content is None:
        path.mkdir()
        line = "is no file"
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        load_victim(f"{kind}:{path}")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_script_ends_with_one_line_for_a_file_that_is_no_model(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" + random.Random(0).randbytes(1000))
    done = forked.run("grey_box/eval_teacher.py", "--victim", f"onnx:{path}", "--data", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"eval_teacher.py: {path}: not an ONNX model that can be opened")
    assert done.stderr.count("\n") == 1


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="truncated"):
        read_state(path)


@pytest.mark.parametrize(
    "about",
    [
        [1, 2], "words", None, dict(classes="abc"), dict(classes=[]), dict(classes=[1]), dict(num_frames="16"), dict(size=0),
        dict(num_frames=True), dict(stride=1.5), dict(student=5), dict(architecture=["swin"]), dict(num_queries="many"),
        dict(fps=0), dict(fps="5"),
    ],
)  # fmt: skip
def test_metadata_of_another_form_is_named(about, tmp_path, error_line):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(1)}, about)
    assert error_line(read_metadata, path).startswith(f"{path}: what it says of its model is damaged")


def test_a_victim_that_does_not_say_its_clip_is_named(tmp_path, error_line):
    path = tmp_path / "victim.safetensors"
    save_weights(path, {"a": torch.zeros(1)}, dict(architecture="swin_demo", classes=["a", "b"]))
    message = error_line(load_victim, "trained", path)
    assert message == f"{path}: does not say the frames and size of the clips that it was trained on; train it again"


def test_names_that_command_a_terminal_are_escaped_where_they_are_printed(tmp_path, good, capsys, error_line):
    odd = tmp_path / "odd \x1b]0;title\x07"
    (odd / "a\u202eb").mkdir(parents=True)
    (odd / "a\u202eb" / "one\ntwo.mp4").write_bytes(b"")
    shutil.copy(good, odd / "a\u202eb" / "good.mp4")
    for function in (lambda: find_videos(odd, ["b"]), lambda: find_videos(odd / "a\u202eb", ["b"]), lambda: read_state(odd)):
        message = error_line(function)
        assert message.isprintable()
        assert r"odd \x1b]0;title\x07" in message
    clips = Clips(find_videos(odd, ["a\u202eb"]), 8, size=32)
    report_broken(clips.broken)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["left out 1 unreadable file:", rf"  {tmp_path}/odd \x1b]0;title\x07/a\u202eb/one\ntwo.mp4: empty file"]
    assert format_table([["name", "n"], ["\x1b[2J", "1"]]).splitlines()[-1] == r"\x1b[2J  1"


def test_a_script_of_another_checkout_than_the_package_says_so(tmp_path, error_line):
    other = tmp_path / "other"
    (other / "extraction").mkdir(parents=True)
    (other / "extraction" / "__init__.py").touch()
    (other / "grey_box").mkdir()
    script = shutil.copy(ROOT / "grey_box" / "labels_only.py", other / "grey_box")
    done = subprocess.run([sys.executable, script, "--demo"], capture_output=True, text=True, cwd=other)
    line = f"labels_only.py: {script} is of another checkout than the package that Python finds, {ROOT}/extraction: "
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{line}pip install -e {other}, or set PYTHONPATH={other}\n"
    for mine in (ROOT / "eval_only.py", ROOT / "grey_box" / "labels_only.py", tmp_path / "copied.py", Path("eval_only.py")):
        refuse_other_checkout(mine)
    assert error_line(refuse_other_checkout, other / "eval_only.py").startswith(f"{other}/eval_only.py is of another checkout")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*w.safetensors: folder .*nowhere is not there$"):
        save_weights(tmp_path / "nowhere" / "w.safetensors", {"a": torch.zeros(1)}, {})


def test_impossible_shapes_and_devices():
    with pytest.raises(UserError, match="num_frames is 0: it must be at least 1"):
        Clips([], 0)
    with pytest.raises(UserError, match="write auto, cpu, cuda"):
        choose_device("tpu9000")


def test_a_class_whose_videos_are_all_broken_is_named(tmp_path, good):
    (tmp_path / "sad").mkdir()
    (tmp_path / "sad" / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"sad: none of its videos can be read \(a.mp4: empty file\)"):
        Clips([Video(good, 0), Video(tmp_path / "sad" / "a.mp4", 1)], 8, size=32)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc, a folder that not even root can write")
def test_a_folder_that_cannot_be_written(demo_set):
    with pytest.raises(UserError, match=r"cannot make /proc/runs: .*; choose another --out-dir"):
        Run("x", "/proc/runs", swin_to_r21_kd.Config())


# --- run folders -------------------------------------------------------------------------------------------------------


def make_small(demo_set: Path, out_dir: Path) -> swin_to_r21_kd.Config:
    """Two batches of 18 clips, one epoch."""
    options = dict(
        demo=False, in_domain=str(demo_set / "train_5per"), val=str(demo_set / "val"), aux=(), epochs=1, batch_size=18,
        num_workers=0, out_dir=str(out_dir),
    )  # fmt: skip
    return swin_to_r21_kd.Config(**swin_to_r21_kd.DEMO | options)


@pytest.fixture
def small(demo_set, tmp_path) -> swin_to_r21_kd.Config:
    return make_small(demo_set, tmp_path / "run")


@pytest.fixture(scope="module")
def finished_run(demo_set, tmp_path_factory) -> Path:
    """The folder of a run that its query budget ended, so that there is a state.pt that a larger one goes on from."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    swin_to_r21_kd.main(replace(make_small(demo_set, folder), query_budget=20))
    return folder


OF_ANOTHER_KIND = "not of a run of these scripts; remove it, or choose another --out-dir$"
DAMAGED = r"not readable, damaged perhaps \(.*\); remove it, or choose another --out-dir$"
START_AGAIN = "remove it to start again: answers stay cached in the ledger$"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("results.json", b"{", DAMAGED),
        ("results.json", b"", DAMAGED),
        ("results.json", bytes(range(256)), DAMAGED),
        ("results.json", b"[]", OF_ANOTHER_KIND),
        ("results.json", b"{}", OF_ANOTHER_KIND),
        ("results.json", b'{"stopped": "epochs", "num_queries": 1, "config": []}', OF_ANOTHER_KIND),
        ("config.json", b"{", DAMAGED),
        ("config.json", b"[]", OF_ANOTHER_KIND),
        ("state.pt", random.Random(0).randbytes(50_000), START_AGAIN),
        ("state.pt", b"", START_AGAIN),
        ("state.pt", b"PK\x03\x04" + b"x" * 500, START_AGAIN),
        ("state.pt", [1, 2], "not the checkpoint of a run; " + START_AGAIN),
    ],
)
def test_damaged_files_of_a_run_are_named_and_a_run_goes_on_without_them(
    name, content, line, finished_run, small, tmp_path, error_line
):
    shutil.copytree(finished_run, small.out_dir)
    path = Path(small.out_dir) / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = error_line(swin_to_r21_kd.main, small)
    assert message.startswith(f"{path}: ")
    assert re.search(line, message), message
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 20
    path.unlink()
    assert swin_to_r21_kd.main(small)["num_queries"] == 36


DAMAGES_INSIDE = {
    "another student": lambda state: state.update(student={"weight": torch.zeros(3)}),
    "a list of words": lambda state: state.update(recent=["low", "lower"]),
    "a history of nothing": lambda state: state.update(history=[[]]),
    "an optimiser's averages": lambda state: [v.update(exp_avg=torch.zeros(7)) for v in state["optimizer"]["state"].values()],
    "no schedule": lambda state: state.update(schedule={}),
}


@pytest.mark.parametrize("damage", DAMAGES_INSIDE)
def test_a_checkpoint_that_is_damaged_inside_is_named(damage, finished_run, small, error_line):
    shutil.copytree(finished_run, small.out_dir)
    path = Path(small.out_dir) / "state.pt"
    state = read_checkpoint(path)
    DAMAGES_INSIDE[damage](state)
    torch.save(state, path)
    message = error_line(swin_to_r21_kd.main, small)
    assert message.startswith(f"{path}: its inside is not this run's (")
    assert re.search(START_AGAIN, message), message


@pytest.mark.parametrize(
    ("kept", "fresh", "where"),
    [
        (dict(a=1), dict(a=1, b=2), "state"),
        (dict(a="1"), dict(a=1), "state a"),
        ([[1, 2], [3]], [[1, 2], [3, 4]], "state 1"),
        (dict(w=torch.zeros(2)), dict(w=torch.zeros(3)), "state w"),
        (dict(w=[0.0]), dict(w=torch.zeros(1)), "state w"),
        (dict(name=3), dict(name="adam"), "state name"),
    ],
)
def test_the_form_of_a_state_is_compared_to_its_leaves(kept, fresh, where):
    with pytest.raises(ValueError, match=f"^{where} is of another form$"):
        require_form(kept, fresh, "state")
    require_form(fresh, fresh, "state")
    require_form(dict(a=1, b=None, c=True), dict(a=0.5, b=None, c=None), "state")


def test_a_smaller_budget_than_was_used_is_no_run_of_that_budget(finished_run, small, error_line):
    """Neither the results of another budget, nor a run that cannot be."""
    shutil.copytree(finished_run, small.out_dir)
    less = replace(small, query_budget=19)
    line = f"{small.out_dir}: its run has used 20 queries, --query-budget 19 is less; choose another --out-dir"
    assert error_line(swin_to_r21_kd.main, less) == line
    (Path(small.out_dir) / "results.json").unlink()
    line = f"{small.out_dir}/ledger.sqlite counts 20 queries, --query-budget 19 is less; choose another --out-dir"
    assert error_line(swin_to_r21_kd.main, less) == line
    assert swin_to_r21_kd.main(replace(small, query_budget=20))["num_queries"] == 20


def test_a_second_start_in_a_folder_ends_with_one_line_that_names_the_first(small, tmp_path):
    flags = {"in-domain": small.in_domain, "val": small.val, "out-dir": small.out_dir, "device": "cpu", "aux": ()}
    command = ["grey_box/swin_to_r21_kd.py", "--demo", "--epochs", "1"]
    for name, value in flags.items():
        command += [f"--{name}", *([value] if isinstance(value, str) else value)]
    with Run("swin_to_r21_kd", small.out_dir, small).locked():
        done = forked.run(*command)
        holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"swin_to_r21_kd.py: {small.out_dir}: a run is going on in it ({holder}); wait for it, or choose another --out-dir"
    )
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.lock"}
    assert swin_to_r21_kd.main(small)["num_queries"] == 36  # the lock went with its holder


KILLED_WITH_A_WORKER = """
import multiprocessing, os, signal, sys, time
from extraction.evaluation.results import format_table
from extraction.experiment import refuse_other_checkout
from extraction.runs import Run, require_form
from grey_box.swin_to_r21_kd import Config
with Run("swin_to_r21_kd", sys.argv[1], Config()).locked():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_loader_workers_do_not_hold_the_lock(small):
    """Those of a killed process live on for seconds."""
    command = [sys.executable, "-c", KILLED_WITH_A_WORKER, small.out_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as killed:
        worker = int(killed.stdout.readline())
        assert killed.wait() == -signal.SIGKILL
        try:
            with Run("swin_to_r21_kd", small.out_dir, small).locked():
                os.kill(worker, 0)  # it is still there
        finally:
            os.kill(worker, signal.SIGKILL)


def test_videos_that_are_trained_on_and_scored_need_allow_overlap(small, tmp_path, error_line, capsys):
    in_domain, val = Path(small.in_domain), tmp_path / "val"
    shutil.copytree(small.val, val)
    label = sorted(folder.name for folder in in_domain.iterdir())[0]
    shutil.copy(sorted((in_domain / label).iterdir())[0], val / label / "under_another_name.mp4")
    both = replace(small, val=str(val))
    line = "1 videos that score the student are trained on too, such as "
    message = error_line(swin_to_r21_kd.main, both)
    assert message.startswith(line + str(in_domain / label))
    assert message.endswith("; keep them out (--val-list, --in-domain-list), or pass --allow-overlap")
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0
    results = swin_to_r21_kd.main(replace(both, allow_overlap=True, out_dir=str(tmp_path / "allowed")))
    assert line in capsys.readouterr().out
    assert (results["num_queries"], results["num_val_videos"]) == (36, 25)


def test_videos_of_one_youtube_id_are_the_same(small, tmp_path, error_line):
    in_domain, val = tmp_path / "in_domain", tmp_path / "val"
    shutil.copytree(small.in_domain, in_domain)
    shutil.copytree(small.val, val)
    label = sorted(folder.name for folder in in_domain.iterdir())[0]
    for root, time_range in ((in_domain, "000000_000010"), (val, "000020_000030")):
        shutil.move(sorted((root / label).iterdir())[0], root / label / f"abcdefghijk_{time_range}.mp4")
    message = error_line(swin_to_r21_kd.main, replace(small, in_domain=str(in_domain), val=str(val)))
    assert "abcdefghijk_000000_000010.mp4; keep them out" in message


# --- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["victims.ledger", "count"],
        ["data.subsets", "--out", "list.txt"],
        ["data.transcode", "out"],
        ["victims.movinet", "out"],
        ["evaluation.results"],
    ],
)
def test_a_tool_ends_with_one_line(command, tmp_path):
    tool, *given = command
    given.insert(tool == "victims.ledger", str(tmp_path / "nowhere"))
    done = forked.run("-m", f"extraction.{tool}", *given, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{tool.split('.')[-1]}: ")
    assert "nowhere" in done.stderr
    assert "--demo" not in done.stderr
