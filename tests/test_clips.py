"""Folders, decoding, views: real mp4 files, written by the tests."""

import csv
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation

from extraction.data.augment import Augmentation, create_views, view_key
from extraction.data.clips import Clips, Unreadable, decode_clip, load_batches, probe
from extraction.data.demo import ACTIONS, SHAPES, create_clip, list_classes, write_video
from extraction.data.folders import find_videos
from extraction.errors import UserError


def counting_video(path: Path, num_frames: int = 60, width: int = 64, height: int = 48) -> Path:
    """Frame k is grey, as bright as 4 k."""
    frames = np.stack([np.full((height, width, 3), 4 * k, np.uint8) for k in range(num_frames)])
    write_video(path, frames)
    return path


def frame_numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in clip]


@pytest.mark.parametrize(("start", "num_frames", "stride"), [(0, 8, 1), (17, 8, 1), (30, 5, 4), (52, 8, 1)])
def test_decodes_the_frames_asked_for(tmp_path, start, num_frames, stride):
    clip = decode_clip(counting_video(tmp_path / "a.mp4"), start, num_frames, stride)
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


def test_a_short_video_repeats_its_last_frame(tmp_path):
    assert frame_numbers(decode_clip(counting_video(tmp_path / "a.mp4", 3), 0, 6)) == [0, 1, 2, 2, 2, 2]


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


def test_windows_follow_step_and_views(tmp_path):
    folder = tmp_path / "v" / "one"
    folder.mkdir(parents=True)
    counting_video(folder / "a.mp4", 60)
    videos = find_videos(tmp_path / "v", ["one"])
    assert [w.start for w in Clips(videos, 16, step=16, size=32).refs] == [0, 16, 32]
    assert [w.start for w in Clips(videos, 16, stride=2, step=10, size=32).refs] == [0, 10, 20]
    scored = Clips(videos, 16, size=32, views=(2, 3))
    assert [(w.start, w.crop) for w in scored.refs] == [(11, 0.0), (11, 0.5), (11, 1.0), (33, 0.0), (33, 0.5), (33, 1.0)]
    assert {w.video for w in scored.refs} == {0}


def test_loader_brings_uint8_and_sets_broken_clips_aside(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counting_video(tmp_path / name / "good.mp4", 20)
    (tmp_path / "two" / "bad.mp4").write_bytes(b"not a video" * 100)
    whole = (tmp_path / "one" / "good.mp4").read_bytes()
    clips = Clips(find_videos(tmp_path, ["two", "one"]), 8, size=32)
    assert [path.name for path, _ in clips.broken] == ["bad.mp4"]
    assert [w.label for w in clips.refs if w.start == 0] == [1, 0]  # the class order given, not the folders'
    (tmp_path / "one" / "good.mp4").write_bytes(whole[:60])  # breaks after it was looked at
    batch = next(iter(load_batches(clips, [range(len(clips))], 0)))
    assert batch.clips.dtype == torch.uint8
    assert batch.clips.shape == (2, 8, 32, 32, 3)
    assert [clips.refs[i].path.parent.name for i, _ in batch.broken] == ["one", "one"]


def test_folders_of_every_layout(tmp_path):
    root = tmp_path / "kinetics"
    for split in ("train", "val"):
        for name in ("air_drumming", "petting animal (not cat)"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / f"{split}.mp4").touch()
    classes = ["petting animal (not cat)", "air drumming", "zumba"]
    videos = find_videos(root, classes, "val")
    assert [(v.path.name, v.label) for v in videos] == [("val.mp4", 1), ("val.mp4", 0)]
    shutil.move(root / "train", tmp_path / "UCF-101")
    assert [v.label for v in find_videos(tmp_path / "UCF-101", None)] == [-1, -1]
    nested = tmp_path / "as_unpacked"
    nested.mkdir()
    shutil.move(tmp_path / "UCF-101", nested / "UCF-101")
    assert len(find_videos(nested, classes)) == 2


def test_lists_choose_and_name_what_is_missing(tmp_path):
    (tmp_path / "a").mkdir()
    for stem in ("x_000003_000013", "y_000000_000010"):
        (tmp_path / "a" / f"{stem}.mp4").touch()
    (tmp_path / "list.txt").write_text("a/x_000003_000013.mp4\n")
    assert len(find_videos(tmp_path, ["a"], listing=tmp_path / "list.txt")) == 1
    (tmp_path / "list.txt").write_text("a/x_000003_000013.mp4\na/gone.mp4\n")
    with pytest.raises(UserError, match=r"1 of its 2 files missing below .*gone.mp4"):
        find_videos(tmp_path, ["a"], listing=tmp_path / "list.txt")
    with (tmp_path / "val.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        rows.writerows([["a", "x", 3, 13, "val"], ["a", "deleted", 0, 10, "val"], ["a", "y", 0, 10, "train"]])
    assert [v.path.stem for v in find_videos(tmp_path, ["a"], "val", tmp_path / "val.csv")] == ["x_000003_000013"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda root: None, "belongs there; or try --demo"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: (root / "a").mkdir(parents=True), "no video in class 'a'"),
        (lambda root: (root / "what").mkdir(parents=True), "class 'what' not among the victim's 2 classes"),
    ],
)
def test_bad_folders_get_one_line(tmp_path, make, line):
    make(tmp_path / "root")
    with pytest.raises(UserError, match=line):
        find_videos(tmp_path / "root", ["a", "b"])


def test_a_class_without_a_readable_video_stops(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="none of its videos can be read"):
        Clips(find_videos(tmp_path, ["a"]), 8, size=32)


def test_a_video_without_pictures_is_unreadable(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(Unreadable, match="no video stream"):
        probe(tmp_path / "sound.mp4")


# --- views ---------------------------------------------------------------------------------------------------------


def views_of(clip: np.ndarray, augmentation: Augmentation, count: int) -> torch.Tensor:
    batch = torch.from_numpy(clip)[None].repeat(count, 1, 1, 1, 1)
    return create_views(batch, [view_key(0, "clip", k, augmentation) for k in range(count)], augmentation)


def test_a_view_is_a_function_of_its_key_and_not_of_its_batch():
    clip = create_clip([ACTIONS["growing"]], SHAPES, 1, 8, 32)
    augmentation = Augmentation(0.5, 0.1, 15.0)
    many, again = views_of(clip, augmentation, 6), views_of(clip, augmentation, 6)
    assert torch.equal(many, again)
    alone = create_views(torch.from_numpy(clip)[None], [view_key(0, "clip", 4, augmentation)], augmentation)
    torch.testing.assert_close(alone[0], many[4])
    assert view_key(0, "clip", 1, augmentation) != view_key(1, "clip", 1, augmentation)
    assert len({tuple(view.flatten()[::97].tolist()) for view in many}) == 6


def test_views_stay_in_range_and_treat_all_frames_alike():
    frame = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    views = views_of(np.repeat(frame, 5, 0), Augmentation(0.5, 0.3, 20.0), 16)
    assert views.shape == (16, 3, 5, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1
    assert torch.equal(views[:, :, :1].expand_as(views), views)


def test_flip_brightness_and_rotation_do_what_they_say():
    clip = np.zeros((2, 33, 33, 3), np.uint8)
    clip[:, 16, 26] = 200  # a dot to the right of the centre
    still = views_of(clip, Augmentation(0.0, 0.0, 0.0), 1)
    torch.testing.assert_close(still[0].permute(1, 2, 3, 0), torch.from_numpy(clip).float() / 255)
    flipped = views_of(clip, Augmentation(1.0, 0.0, 0.0), 1)[0, 0, 0]
    assert (flipped.argmax() // 33, flipped.argmax() % 33) == (16, 6)
    share = (views_of(clip, Augmentation(0.5, 0.0, 0.0), 400)[:, 0, 0, 16, 6] > 0.5).float().mean()
    assert 0.4 < share < 0.6
    light = views_of(clip, Augmentation(0.0, 0.1, 0.0), 200)[:, 0, 0, 16, 26] * 255 / 200
    assert 0.9 <= light.min() < 0.92
    assert 1.08 < light.max() <= 1.1
    turned = views_of(clip, Augmentation(0.0, 0.0, 45.0), 200)[:, 0, 0].flatten(1).argmax(1)
    angles = torch.atan2((turned // 33 - 16).float(), (turned % 33 - 16).float()).rad2deg()
    assert angles.abs().max() <= 48
    assert angles.max() > 35
    assert angles.min() < -35


# --- the demo set --------------------------------------------------------------------------------------------------


def test_demo_pixels_are_the_same_everywhere():
    import hashlib

    digest = hashlib.sha256()
    for name, motion in ACTIONS.items():
        digest.update(create_clip([motion], SHAPES, name, 16, 64).tobytes())
    assert digest.hexdigest() == "014b6570c53ba1bfa2b746fce369b1d37de9748a80f260cbedf3edb507ec4a72"


def test_the_same_pictures_become_the_same_bytes(tmp_path):
    """Whatever was encoded before and lies in memory: x264's assembly reads beyond its buffers."""
    clips = [create_clip([motion], SHAPES, number, 16, 64) for number, motion in enumerate(ACTIONS.values())]
    seen = [set() for _ in clips]
    for turn in range(6):
        draw = np.random.default_rng(turn)
        litter = [draw.integers(0, 256, size, dtype=np.uint8) for size in draw.integers(1_000, 200_000, 20)]
        for number in draw.permutation(len(clips)):
            litter[number % len(litter)] = draw.integers(0, 256, 5_000 * number + 100, dtype=np.uint8)
            write_video(tmp_path / "video.mp4", clips[number])
            seen[number].add((tmp_path / "video.mp4").read_bytes())
    assert [len(contents) for contents in seen] == [1] * len(clips)


def test_demo_scales_to_many_classes_and_large_frames():
    assert len(list_classes(400)) == 400
    clip = create_clip(list(list_classes(400).values())[399], SHAPES, 0, 4, 224)
    assert clip.shape == (4, 224, 224, 3)
    assert (clip[0] != clip[3]).any()


def test_no_frame_of_the_demo_tells_left_from_right():
    """Twin classes show the same frames in another order, so a single frame's statistics cannot separate them."""
    middle = {
        name: np.stack([create_clip([ACTIONS[name]], SHAPES, i, 9, 32)[4] for i in range(40)]).astype(float)
        for name in ("moving left", "moving right")
    }
    difference = (middle["moving left"].mean(0) - middle["moving right"].mean(0)) / 255
    assert np.abs(difference).mean() < 0.02  # the same seeds: at mid-time left and right are the same picture
