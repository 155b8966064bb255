"""Clips: where they are cut, what the loader brings, and what becomes of a video that cannot be read."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from extraction.data import probes
from extraction.data.clips import Clips, load_batches
from extraction.data.decoding import probe
from extraction.data.demo import write_video
from extraction.data.folders import Video, find_videos
from extraction.errors import UserError


def test_some_of_the_clips_are_among_more_of_them(write_counting_video, tmp_path):
    videos = [Video(write_counting_video(tmp_path / f"{n}.mp4", 60 + n), 0) for n in range(3)]
    drawn = [Clips(videos, 16, clip_interval=4, size=32, num_clips=n, seed=3).refs for n in (5, 9, 1000)]
    assert [len(refs) for refs in drawn] == [5, 9, 36]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert len({ref.path for ref in drawn[1]}) == 3
    assert drawn[1] == [ref for ref in drawn[2] if ref in drawn[1]]  # in their order
    assert Clips(videos, 16, clip_interval=4, size=32, num_clips=9, seed=4).refs != drawn[1]


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


def test_fps_takes_the_nearest_frames_of_each_video(tmp_path):
    """Videos of 24, 30 and 50 frames a second; frame k is as bright as 4 k."""
    frames = np.stack([np.full((48, 64, 3), 4 * k, np.uint8) for k in range(60)])
    rates = {24: 5, 30: 6, 50: 10, 3: 1}  # frames a second: the stride for 5 a second
    for fps in rates:
        write_video(tmp_path / f"{fps:02d}.mp4", frames, fps)
    videos = [Video(tmp_path / f"{fps:02d}.mp4", -1) for fps in rates]
    clips = Clips(videos, 4, stride=7, size=32, views=(1, 1), fps=5)
    assert [ref.stride for ref in clips.refs] == list(rates.values())
    for index, stride in enumerate(rates.values()):
        start = clips.refs[index].start
        assert start == round((60 - (3 * stride + 1)) / 2)
        shown = clips[index][1][:, 16, 16, 0] / 4
        assert np.abs(shown - np.arange(start, start + 4 * stride, stride)).max() < 0.5
        # A clip is named as one of that stride is: what was answered about it is not asked again.
        assert clips.refs[index] == Clips(videos[index : index + 1], 4, stride=stride, size=32, views=(1, 1)).refs[0]._replace(
            video=index
        )
    assert len(Clips(videos[:1], 4, size=32, fps=5).refs) == 3  # a new clip where the last one ends, by the video's own stride


def test_a_video_that_does_not_say_its_rate_is_left_out_where_it_matters(write_counting_video, tmp_path, monkeypatch):
    videos = [Video(write_counting_video(tmp_path / f"{name}.mp4", 20), -1) for name in "ab"]
    monkeypatch.setattr(probes, "probe", lambda path: probe(path)._replace(**{"fps": None} if path.stem == "b" else {}))
    assert Clips(videos, 4, size=32).broken == []
    assert Clips(videos, 4, size=32, fps=5).broken == [(tmp_path / "b.mp4", "no frame rate in the file, which --fps wants")]


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
