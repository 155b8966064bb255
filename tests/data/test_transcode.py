"""Transcoding a folder once: frames, folders and colours stay, and an interrupted job goes on."""

import multiprocessing
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from extraction.data.decoding import decode_clip, probe
from extraction.data.demo import write_video
from extraction.data.folders import find_videos
from extraction.data.transcode import transcode, transcode_folder
from extraction.errors import UserError


def counting_video(path: Path, num_frames: int = 30, side: int = 64) -> Path:
    """Frame k is as bright as 8 k on its left, and black on its right."""
    frames = np.zeros((num_frames, side, 2 * side, 3), np.uint8)
    frames[:, :, :side] = 8 * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames)
    return path


def count_key_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


def test_copies_keep_frames_and_folders(tmp_path, capsys):
    first = counting_video(tmp_path / "in" / "val" / "one" / "a.mp4")
    second = counting_video(tmp_path / "in" / "val" / "two" / "b.mp4", 17)
    second = second.rename(second.with_suffix(".avi"))
    (tmp_path / "in" / "val" / "two" / "bad.mp4").write_bytes(b"not a video" * 100)
    transcode_folder(str(tmp_path / "in"), str(tmp_path / "out"), short_side=32)
    copies = [tmp_path / "out" / "val" / name for name in ("one/a.mp4", "two/b.mp4")]
    assert sorted((tmp_path / "out").rglob("*.*")) == sorted([*copies, tmp_path / "out" / ".transcode.json"])
    out = capsys.readouterr().out
    assert "left out 1 unreadable file:" in out
    assert "bad.mp4: Invalid data" in out
    assert "2 of 3 videos, 2 of them made now" in out
    for video, copy, num_frames in zip((first, second), copies, (30, 17), strict=True):
        assert probe(copy).num_frames == probe(video).num_frames == num_frames
        clip = decode_clip(copy, 9, 5)
        assert clip.shape == (5, 32, 64, 3)
        assert [round(frame[:, :28].mean() / 8) for frame in clip] == [9, 10, 11, 12, 13]
        assert clip[:, :, 36:].max() < 8
        assert count_key_frames(copy) == -(-num_frames // 8)
        assert count_key_frames(video) == 1
    (tmp_path / "list.txt").write_text("one/a.mp4\ntwo/b.avi 2\n")  # the originals' list, as UCF101's, fits the copies
    listed = find_videos(tmp_path / "out", ["one", "two"], "val", str(tmp_path / "list.txt"))
    assert [video.path for video in listed] == copies
    before = [copy.stat().st_mtime_ns for copy in copies]
    transcode_folder(str(tmp_path / "in"), str(tmp_path / "out"), short_side=32)
    assert before == [copy.stat().st_mtime_ns for copy in copies]
    with pytest.raises(UserError, match="holds videos of other options"):
        transcode_folder(str(tmp_path / "in"), str(tmp_path / "out"))


def test_copies_are_the_same_bytes_whatever_goes_on_beside_them(tmp_path):
    for number in range(8):
        side = (50, 64, 96)[number % 3]
        draw = np.random.default_rng(number)
        frames = draw.integers(0, 256, (12, side, 70, 3), np.uint8).repeat(2, 0)
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "in" / "a" / f"{number}.mp4", frames)
    damaged = bytearray((tmp_path / "in" / "a" / "7.mp4").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "in" / "a" / "damaged.mp4").write_bytes(damaged)
    found = []
    for number, workers in enumerate((1, 4, 4, 4)):
        transcode_folder(str(tmp_path / "in"), str(tmp_path / f"out{number}"), short_side=32, workers=workers)
        copies = sorted((tmp_path / f"out{number}").rglob("*.mp4"))
        found.append({copy.name: copy.read_bytes() for copy in copies})
    assert len(found[0]) == 9
    assert found[1:] == found[:1] * 3
    # x264 writes its settings into each file.
    assert all(b" threads=1 lookahead_threads=1 " in content for content in found[1].values())


def test_a_small_video_is_not_enlarged_and_colours_stay(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt = 75, 51, "yuv444p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2, 1  # full range, BT.709
        frame = av.VideoFrame.from_ndarray(np.full((51, 75, 3), (200, 40, 90), np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace=1, dst_color_range=2)
        for k in range(20):
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert transcode(tmp_path / "a.mkv", tmp_path / "b.mp4") is None
    for name in ("a.mkv", "b.mp4"):
        np.testing.assert_allclose(decode_clip(tmp_path / name, 11, 1).mean((0, 1, 2)), (200, 40, 90), atol=3)
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (74, 50, 20)
        assert stream.average_rate == Fraction(30000, 1001)


def test_a_rotated_video_is_turned_upright(rotate_video, tmp_path):
    rotate_video(tmp_path / "a.mp4", counting_video(tmp_path / "flat.mp4", side=32))
    transcode(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, frame.rotation) == (32, 64, 0)
    video, copy = (decode_clip(tmp_path / name, 9, 5).astype(int) for name in ("a.mp4", "b.mp4"))
    assert video.shape == copy.shape == (5, 64, 32, 3)
    assert abs(video - copy).mean() < 2


def test_the_same_command_goes_on_after_a_kill(tmp_path):
    for k in range(6):
        counting_video(tmp_path / "in" / "one" / f"{k}.mp4", 30, 512)
    job = (str(tmp_path / "in"), str(tmp_path / "out"))
    child = multiprocessing.get_context("spawn").Process(target=transcode_folder, args=job, kwargs={"workers": 1})
    child.start()
    out, waited = tmp_path / "out" / "one", time.monotonic()
    while not ((out / "1.mp4").exists() and list(out.glob("*.partial"))):
        assert time.monotonic() - waited < 60
        time.sleep(0.002)
    child.kill()
    child.join()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert 2 <= len(done) < 6
    transcode_folder(*job)
    assert sorted(path.name for path in out.iterdir()) == [f"{k}.mp4" for k in range(6)]
    assert {probe(path).num_frames for path in out.iterdir()} == {30}
    assert done == {path: path.stat().st_mtime_ns for path in done}


@pytest.mark.parametrize(
    ("source", "out", "options", "line"),
    [
        ("in", "in/copies", {}, "lie in one another"),
        ("in", ".", {}, "lie in one another"),
        ("gone", "out", {}, "folder .*gone not found"),
        ("empty", "out", {}, "no video in it"),
        ("in", "full", {}, "is not empty"),
        ("in", "out", {"gop": 0}, "--gop 0: write a number from 1"),
        ("in", "out", {"short_side": 225}, "an even number"),
        ("in", "out", {"workers": 0}, "--workers 0"),
        ("twins", "out", {}, "would have the same copy"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, source, out, options, line):
    for path in ("in/one/a.mp4", "twins/one/a.mp4", "twins/one/a.avi", "full/notes.txt", "empty/one/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(UserError, match=line) as caught:
        transcode_folder(str(tmp_path / source), str(tmp_path / out), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
