"""Scores and their intervals: beside plain loops, per video and per clip."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extraction.evaluation.scoring import AnswerSpread, average, bootstrap, describe_answers, score, tally, write_class_table


@pytest.fixture
def answers():
    """Probabilities of a student and a victim for 40 videos of 1 to 3 clips, 8 classes; some clips could not be decoded."""
    draw = torch.Generator().manual_seed(0)
    videos = torch.arange(40).repeat_interleave(torch.randint(1, 4, (40,), generator=draw))
    student, victim = (torch.randn(len(videos), 8, generator=draw).softmax(1) for _ in range(2))
    student[3] = 0.0
    student[videos == 7] = 0.0
    labels = torch.randint(8, (40,), generator=draw)[videos]
    return student, labels, victim, videos


def test_top_k_is_per_video_and_agreement_per_clip(answers):
    student, labels, victim, videos = answers
    hits: dict[str, list] = {"top1": [], "top5": [], "agreement_at_1": [], "agreement_at_5": [], "mean_kl": []}
    for video in range(40):
        own = [i for i in range(len(videos)) if videos[i] == video and student[i].sum() > 0]
        if not own:
            continue
        best = student[own].mean(0).argsort(descending=True).tolist()
        hits["top1"].append(best[0] == labels[own[0]])
        hits["top5"].append(labels[own[0]] in best[:5])
        for i in own:
            best, answer = student[i].argsort(descending=True).tolist(), victim[i].argmax().item()
            hits["agreement_at_1"].append(best[0] == answer)
            hits["agreement_at_5"].append(answer in best[:5])
            hits["mean_kl"].append(F.kl_div(student[i].log(), victim[i], reduction="sum").item())
    found = score(student, labels, victim, videos)
    assert len(hits["top1"]) == 38  # two have no clip that could be decoded
    assert found == pytest.approx({name: sum(map(float, own)) / len(own) for name, own in hits.items()}, rel=1e-5)


def test_without_labels_there_is_agreement_alone_and_a_certain_wrong_answer_has_a_finite_kl(answers):
    student, labels, victim, videos = answers
    assert set(score(student, torch.full_like(labels, -1), victim, videos)) == {"agreement_at_1", "agreement_at_5", "mean_kl"}
    certain = torch.eye(8)
    assert 80 < score(certain, labels[:8], certain.roll(1, 0))["mean_kl"] < 90
    assert score(certain, labels[:8], certain)["mean_kl"] == 0.0


def test_a_class_table_counts_videos(answers, tmp_path):
    student, labels, _, videos = answers
    write_class_table(tmp_path / "t.csv", student, labels, [f"class {k}" for k in range(8)], videos)
    lines = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert sum(int(line.split(",")[1]) for line in lines) == 40


def test_clips_of_one_video_are_no_further_evidence(answers):
    student, labels, victim, _ = answers
    once, doubled = tally(student, labels, victim), [part.repeat_interleave(2, 0) for part in (student, labels, victim)]
    twice = tally(*doubled, torch.arange(len(student)).repeat_interleave(2))
    assert average(once) == pytest.approx(average(twice))
    assert bootstrap(once)["agreement_at_1"] == pytest.approx(bootstrap(twice)["agreement_at_1"])
    apart = bootstrap(tally(*doubled))["agreement_at_1"]
    low, high = bootstrap(once)["agreement_at_1"]
    assert apart[1] - apart[0] < 0.85 * (high - low)  # as if they were other videos: 1/sqrt(2) of it


def test_the_interval_is_that_of_a_share_and_follows_from_its_seed():
    hits = (torch.arange(400) % 4 == 0).float()
    share = {"top1": torch.stack([hits, torch.ones(400)], 1)}
    low, high = bootstrap(share)["top1"]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert bootstrap(share) == bootstrap(share) != bootstrap(share, seed=1)
    unseen = {"top1": torch.cat([share["top1"], torch.zeros(50, 2)])}  # videos that could not be decoded
    assert bootstrap(unseen) == bootstrap(share)


def test_clips_of_unequal_videos_weigh_alike():
    """One video of ten agreed clips, nine of one clip that is not: the mean is over clips, the resamples over videos."""
    agreed = {"agreement_at_1": torch.tensor([[10.0, 10.0]] + [[0.0, 1.0]] * 9)}
    assert average(agreed)["agreement_at_1"] == pytest.approx(10 / 19)
    low, high = bootstrap(agreed)["agreement_at_1"]
    assert low == 0.0  # a third of the resamples has not the one video
    assert high > 0.7


def test_answers_are_described_without_those_that_are_missing():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.0, 0.0]])
    found = describe_answers(probs, ["walk", "run"])
    assert found[:3] == ("walk", pytest.approx(2 / 3), pytest.approx((0.8 + 0.6 + 0.9) / 3))
    assert describe_answers(torch.full((5, 2), 0.5), ["walk", "run"]) == AnswerSpread("walk", 1.0, 0.5, pytest.approx(1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_videos", "num_clips", "share", "alike", "least"),
    [(92, 5, 0.3, 0.5, 0.92), (240, 1, 0.5, 0.0, 0.92), (92, 1, 0.9, 0.0, 0.89)],
)
def test_intervals_hold_as_often_as_they_say(num_videos, num_clips, share, alike, least):
    """500 simulated sets of videos, whose own rates are drawn from a beta distribution with intraclass correlation `alike`."""
    draw, held, held_by_clip = np.random.default_rng(0), 0, 0
    spread = 1 / max(alike, 1e-6) - 1
    for seed in range(500):
        rates = draw.beta(share * spread, (1 - share) * spread, num_videos)
        hits = torch.from_numpy(draw.random((num_videos, num_clips)) < rates[:, None]).float()
        videos = {"share": torch.stack([hits.sum(1), torch.full((num_videos,), float(num_clips))], 1)}
        clips = {"share": torch.stack([hits.flatten(), torch.ones(hits.numel())], 1)}
        (low, high), (low_by_clip, high_by_clip) = (bootstrap(found, seed=seed)["share"] for found in (videos, clips))
        held += low <= share <= high
        held_by_clip += low_by_clip <= share <= high_by_clip
    print(
        f"{num_videos} videos of {num_clips} clips, share {share}: {held / 500:.3f} by video, {held_by_clip / 500:.3f} by clip"
    )
    assert least < held / 500 < 0.98
    assert num_clips == 1 or held_by_clip / 500 < 0.8
