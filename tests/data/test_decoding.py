"""Decoding: the frames that are asked for, the same pixels as the plain way, real files written by the tests."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from extraction.data.decoding import Unreadable, decode_clip, probe
from extraction.data.demo import write_video


def frame_numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in clip]


@pytest.mark.parametrize(("start", "num_frames", "stride"), [(0, 8, 1), (17, 8, 1), (30, 5, 4), (52, 8, 1)])
def test_decodes_the_frames_asked_for(write_counting_video, tmp_path, start, num_frames, stride):
    clip = decode_clip(write_counting_video(tmp_path / "a.mp4"), start, num_frames, stride)
    assert clip.shape == (num_frames, 48, 64, 3)
    assert clip.dtype == np.uint8
    assert frame_numbers(clip) == [start + stride * k for k in range(num_frames)]


def textured_video(path: Path, codec: str, layout: str, width: int = 97 * 2, height: int = 128, num_frames: int = 40) -> Path:
    """A blotchy plane that slides by, with frames that no other is made from, as H.264 has them by default."""
    plane = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        stream.codec_context.thread_count = 1
        for k in range(num_frames):
            picture = np.ascontiguousarray(np.roll(plane, (k, 2 * k), (0, 1))[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_plainly(path: Path, start: int, num_frames: int, stride: int, size: int | None, crop: float) -> np.ndarray:
    """What `decode_clip` gives, in so many words: every frame from the first on, converted as a whole, then cut."""
    pictures = []
    with av.open(str(path)) as container:
        for frame in list(container.decode(video=0))[start::stride][:num_frames]:
            scale = 1 if size is None else size / min(frame.width, frame.height)
            width, height = round(frame.width * scale), round(frame.height * scale)
            flags = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
            picture = frame.reformat(width, height, "rgb24", interpolation=flags).to_ndarray()
            if size is not None:
                y, x = round((height - size) * crop), round((width - size) * crop)
                picture = picture[y : y + size, x : x + size]
            pictures.append(picture)
    return np.stack(pictures)


@pytest.mark.parametrize(
    ("name", "codec", "layout"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p10le"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "mjpeg", "yuvj422p"),
    ],
)
def test_what_makes_decoding_fast_changes_no_pixel(tmp_path, name, codec, layout):
    path = textured_video(tmp_path / name, codec, layout)
    if codec == "libx264":
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.skip_frame = "NONREF"
            assert sum(1 for _ in container.decode(video=0)) < 25  # there is something to leave out
    for start, stride in ((0, 1), (13, 1), (21, 3), (30, 2)):
        for size, crop in ((None, 0.5), (128, 0.5), (96, 0.0), (57, 1.0), (160, 0.5)):
            asked = (path, start, 5, stride, size, crop)
            np.testing.assert_array_equal(decode_clip(*asked), decode_plainly(*asked))


def test_a_short_video_repeats_its_last_frame(write_counting_video, tmp_path):
    assert frame_numbers(decode_clip(write_counting_video(tmp_path / "a.mp4", 3), 0, 6)) == [0, 1, 2, 2, 2, 2]


def test_scales_the_short_side_and_crops_where_told(tmp_path):
    frames = np.zeros((2, 64, 128, 3), np.uint8)
    frames[:, :, 64:] = 255
    write_video(tmp_path / "a.mp4", frames)
    left, centre, right = (decode_clip(tmp_path / "a.mp4", 0, 1, 1, 32, crop)[0] for crop in (0.0, 0.5, 1.0))
    assert left.shape == (32, 32, 3)
    assert left.mean() < 5
    assert right.mean() > 250
    assert centre[:, :12].mean() < 5
    assert centre[:, 20:].mean() > 250


def test_a_video_without_pictures_is_unreadable(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(Unreadable, match="no video stream"):
        probe(tmp_path / "sound.mp4")
