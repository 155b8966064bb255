"""The ceiling of agreement: what each change makes of the clips, and how it is counted."""

import csv
from functools import partial

import numpy as np
import torch

from extraction.data.cache import ClipCache
from extraction.data.clips import Clips
from extraction.data.decoding import Broken
from extraction.data.folders import Video
from extraction.data.transcode import reencode_clip
from extraction.evaluation.ceiling import Reencoded, measure_ceiling, print_ceiling, recut, write_ceiling
from extraction.evaluation.scoring import predict_videos


def test_a_recut_clip_is_named_as_clips_names_it(write_counting_video, tmp_path):
    video = Video(write_counting_video(tmp_path / "a.mp4", 60), -1)
    clips = Clips([video], 8, stride=4, size=32, views=(2, 1))
    assert recut(clips, lambda ref: ref, 16).refs == Clips([video], 8, stride=4, size=16, views=(2, 1)).refs
    assert recut(clips, lambda ref: ref).refs == clips.refs
    later = recut(clips, lambda ref: ref._replace(start=ref.start + 1, stride=2))
    assert [ref.key.split(":")[1:3] for ref in later.refs] == [[str(ref.start + 1), "8x2"] for ref in clips.refs]
    (_, clip), (_, whole) = later[0], Clips([video], 60)[0]
    assert np.abs(clip[:, 16, 16, 0].astype(int) - whole[later.refs[0].start :: 2, 24, 32, 0][:8]).max() <= 1
    # What is kept on disk are the clips as they were.
    kept = Clips([video], 8, stride=4, size=32, views=(2, 1), cache=ClipCache(tmp_path / "cache", 1.0))
    assert all(np.array_equal(kept[0][1], clips[0][1]) for _ in range(2))
    assert kept.kept is not None
    again = recut(kept, lambda ref: ref._replace(start=ref.start + 1, stride=2))
    assert np.array_equal(again[0][1], clip)
    assert not np.array_equal(kept[0][1], clip)


def test_a_victim_that_looks_at_one_frame_disagrees_as_often_as_that_frame_moves(write_counting_video, tmp_path, capsys):
    """Frame k is as bright as 4 k: the class is the number of the clip's first frame, of its size, or of neither."""
    path = write_counting_video(tmp_path / "a.mp4", 60)
    # A clip of 8 frames at stride 4 starts at 15 in the middle; at stride 2 around the same moment at 22.
    clips = Clips([Video(path, -1)] * 3, 8, stride=4, size=32, views=(1, 1))

    def name_first_frame(batch: torch.Tensor) -> torch.Tensor:
        first = (batch[:, 0, 0].mean((1, 2)) * 255 / 4).round().long()
        return 20.0 * torch.nn.functional.one_hot(first, 64).float()

    def name_size(batch: torch.Tensor) -> torch.Tensor:
        return 20.0 * torch.nn.functional.one_hot(torch.full((len(batch),), batch.shape[3]), 64).float()

    agreed = {}
    for victim in (name_first_frame, name_size):
        predict = partial(predict_videos, victim, device="cpu", per_clip=True)
        probs = predict(clips=clips).probs
        changes = measure_ceiling(predict, clips, probs, 16, 30)
        agreed[victim] = [change.scores["agreement_at_1"] for change in changes]
    assert probs.argmax(1).tolist() == [32] * 3
    assert agreed == {name_first_frame: [1.0, 0.0, 0.0, 1.0], name_size: [0.0, 1.0, 1.0, 1.0]}
    assert [change.scores["mean_kl"] > 1 for change in changes] == [True, False, False, False]
    print_ceiling(changes)
    assert "H.264 at CRF 30" in capsys.readouterr().out
    write_ceiling(tmp_path / "c.csv", changes)
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [float(row["agreement_at_1_low"]) for row in rows] == [0.0, 1.0, 1.0, 1.0]


def test_half_the_stride_keeps_the_middle_of_the_clip(write_counting_video, tmp_path):
    video = Video(write_counting_video(tmp_path / "a.mp4", 60), -1)
    shown = []

    def note(batch: torch.Tensor) -> torch.Tensor:
        shown.append((batch[0, 0].mean((1, 2)) * 255 / 4).round().int().tolist())
        return torch.eye(len(batch), 4)

    for stride in (4, 1):
        clips = Clips([video], 8, stride=stride, size=32, views=(1, 1))
        predict = partial(predict_videos, note, device="cpu", per_clip=True)
        measure_ceiling(predict, clips, predict(clips=clips).probs, 16, 30)
    start = round((60 - 29) / 2)
    assert shown[0] == list(range(start, start + 32, 4))
    assert shown[2] == [frame + 1 for frame in shown[0]]
    assert shown[3] == list(range(start + 7, start + 23, 2))
    assert shown[5] == list(range(26, 34))
    assert shown[8] == list(range(22, 38, 2))  # at stride 1 there is no half: twice the stride


def test_reencoding_damages_more_at_a_higher_crf_and_keeps_the_shape(demo_set):
    videos = [Video(sorted((demo_set / "val").rglob("*.mp4"))[0], -1)]
    for size in (48, 33):
        clips = Clips(videos, 16, size=size)
        (_, clip), (_, damaged) = clips[0], Reencoded(clips, 40)[0]
        loss = {crf: np.abs(reencode_clip(clip, crf).astype(int) - clip).mean() for crf in (1, 20)}
        loss[40] = np.abs(damaged.astype(int) - clip).mean()
        assert damaged.shape == clip.shape
        assert damaged.dtype == np.uint8
        assert loss[1] < loss[20] < loss[40]
        assert loss[1] < (4 if size == 48 else 2)  # half the colours are lost where the sides are even
        assert loss[40] > 3


def test_a_clip_that_cannot_be_decoded_is_left_out_of_every_change(write_counting_video, tmp_path):
    videos = [Video(write_counting_video(tmp_path / f"{name}.mp4", 20), -1) for name in "ab"]
    clips = Clips(videos, 8, size=32, views=(1, 1))
    videos[1].path.write_bytes(b"no video any more")
    assert isinstance(Reencoded(clips, 30)[1][1], Broken)
    predict = partial(predict_videos, lambda batch: torch.eye(len(batch), 4), device="cpu", per_clip=True)
    changes = measure_ceiling(predict, clips, predict(clips=clips).probs, 16, 30)
    assert [change.scores["agreement_at_1"] for change in changes] == [1.0] * 4
