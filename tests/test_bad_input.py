"""Malformed videos, files and folders: each gets one line, and nothing else happens.

By hand: `python -m pytest tests/test_bad_input.py --mutations 1000`.
"""

import gc
import os
import random
import resource
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from extraction.data.clips import Clips, Unreadable, decode_clip, probe
from extraction.data.demo import ACTIONS, SHAPES, create_clip, write_video
from extraction.data.folders import Video
from extraction.errors import UserError
from extraction.runs import Run, choose_device
from extraction.weights import read_checkpoint, read_state, save_weights


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
        for number, time in enumerate([0, 10, 20, 400, 410, 1500, 1510, 1520, 3000, 3010, 3020, 3500]):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotated(path: Path, good: Path) -> None:
    """Turn the track's display matrix by 90 degrees, as telephones do: bytes 40 to 76 of the `tkhd` box's body."""
    content = bytearray(good.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(content)


def probe_and_decode(path: Path) -> np.ndarray:
    probe(path)
    return decode_clip(path, 0, 8, 1, 32)


def write_case(case: str, path: Path, good: Path) -> None:
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
        "rotated": lambda: rotated(path, good),
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
def test_videos(tmp_path, good, case, line):
    path = tmp_path / "video.mp4"
    write_case(case, path, good)
    if line is None:
        found = probe(path)
        assert decode_clip(path, 0, 8, 1, 32).shape == (8, 32, 32, 3)
        assert decode_clip(path, found.num_frames - 1, 8, 1, 32).shape == (8, 32, 32, 3)
    else:
        with pytest.raises(Unreadable, match=line) as caught:
            probe_and_decode(path)
        assert "\n" not in str(caught.value)


def test_a_rotated_video_comes_out_upright(tmp_path, good):
    rotated(tmp_path / "turned.mp4", good)
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


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="truncated"):
        read_state(path)


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
    from grey_box import swin_to_r21_kd

    with pytest.raises(UserError, match=r"cannot make /proc/runs: .*; choose another --out-dir"):
        Run("x", "/proc/runs", swin_to_r21_kd.Config())


@pytest.mark.parametrize(
    "command",
    [
        ["ledger", "count"],
        ["data.subsets", "--out", "list.txt"],
        ["data.transcode", "out"],
        ["victims.movinet", "out"],
        ["report"],
    ],
)
def test_a_tool_ends_with_one_line(command, tmp_path):
    tool, *given = command
    given.insert(tool == "ledger", str(tmp_path / "nowhere"))
    done = subprocess.run([sys.executable, "-m", f"extraction.{tool}", *given], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{tool.split('.')[-1]}: ")
    assert "nowhere" in done.stderr
    assert "--demo" not in done.stderr
