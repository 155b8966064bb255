"""The demo set: the same pixels and bytes everywhere, and no class that a single frame gives away."""

import hashlib

import numpy as np

from extraction.data.decoding import probe
from extraction.data.demo import ACTIONS, SHAPES, create_clip, list_classes, write_traffic, write_video


def test_demo_pixels_are_the_same_everywhere():
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


def test_a_long_video_begins_its_action_anew_in_every_scene_over_one_background(tmp_path):
    motions, seed = [ACTIONS["moving right"]], "1/0/traffic/moving right/0"
    long = create_clip(motions, SHAPES, seed, 64, 32, scenes=4)
    assert long.shape == (64, 32, 32, 3)
    assert (long == create_clip(motions, SHAPES, seed, 64, 32, scenes=4)).all()
    grey = long.astype(int).mean((1, 2, 3))
    assert np.abs(np.diff(grey)).max() < 40  # the same background and sprite: no cut to another video
    (folder,) = write_traffic(tmp_path, {"cameras": (1, 48)}, processes=1)
    (path,) = folder.rglob("*.mp4")
    assert probe(path).num_frames == 48


def test_no_frame_of_the_demo_tells_left_from_right():
    """Twin classes show the same frames in another order, so a single frame's statistics cannot separate them."""
    middle = {
        name: np.stack([create_clip([ACTIONS[name]], SHAPES, i, 9, 32)[4] for i in range(40)]).astype(float)
        for name in ("moving left", "moving right")
    }
    difference = (middle["moving left"].mean(0) - middle["moving right"].mean(0)) / 255
    assert np.abs(difference).mean() < 0.02  # the same seeds: at mid-time left and right are the same picture
