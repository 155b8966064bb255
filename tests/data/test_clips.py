"""Clips: where they are cut, what the loader brings, and what becomes of a video that cannot be read."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from extraction.data.clips import Clips, load_batches
from extraction.data.folders import find_videos
from extraction.errors import UserError


def test_clips_follow_clip_interval_and_views(write_counting_video, tmp_path):
    folder = tmp_path / "v" / "one"
    folder.mkdir(parents=True)
    write_counting_video(folder / "a.mp4", 60)
    videos = find_videos(tmp_path / "v", ["one"])
    assert [w.start for w in Clips(videos, 16, clip_interval=16, size=32).refs] == [0, 16, 32]
    assert [w.start for w in Clips(videos, 16, stride=2, clip_interval=10, size=32).refs] == [0, 10, 20]
    scored = Clips(videos, 16, size=32, views=(2, 3))
    assert [(w.start, w.crop) for w in scored.refs] == [(11, 0.0), (11, 0.5), (11, 1.0), (33, 0.0), (33, 0.5), (33, 1.0)]
    assert {w.video for w in scored.refs} == {0}


def test_loader_brings_uint8_and_sets_broken_clips_aside(write_counting_video, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_counting_video(tmp_path / name / "good.mp4", 20)
    (tmp_path / "two" / "bad.mp4").write_bytes(b"not a video" * 100)
    whole = (tmp_path / "one" / "good.mp4").read_bytes()
    clips = Clips(find_videos(tmp_path, ["two", "one"]), 8, size=32)
    assert [path.name for path, _ in clips.broken] == ["bad.mp4"]
    assert [w.label for w in clips.refs if w.start == 0] == [1, 0]  # the class order given, not the folders'
    (tmp_path / "one" / "good.mp4").write_bytes(whole[:60])  # breaks after it was looked at
    batch = next(iter(load_batches(clips, [range(len(clips))], 0)))
    assert batch.clips.dtype == torch.uint8
    assert batch.clips.shape == (2, 8, 32, 32, 3)
    assert [broken.path.parent.name for broken in batch.broken] == ["one", "one"]


def test_a_class_without_a_readable_video_stops(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="none of its videos can be read"):
        Clips(find_videos(tmp_path, ["a"]), 8, size=32)


# --- workers -------------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        time.sleep(0.01)
        return index, np.full((2, 4, 4, 3), index, np.uint8)


def test_a_killed_worker_costs_no_clip(capfd):
    batches, seen = [list(range(first, first + 5)) for first in range(0, 60, 5)], []
    for number, batch in enumerate(load_batches(Numbers(), iter(batches), 1)):
        seen += batch.indices
        assert batch.clips[:, 0, 0, 0, 0].tolist() == batch.indices
        if number == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert seen == list(range(60))
    assert "a loader worker was killed" in capfd.readouterr().err


def test_workers_that_die_again_and_again_end_in_one_line():
    class Deadly(Numbers):
        def __getitem__(self, index: int):
            if index == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    loader = load_batches(Deadly(), [[i] for i in range(20)], 1)
    with pytest.raises(UserError, match="four times now; lower --num-workers"):
        list(loader)
