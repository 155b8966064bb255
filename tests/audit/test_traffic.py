"""Honest accounts: of separate videos in the two halves, the same ones each time, and their false alarms with a bound."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import binom

from extraction.audit.alarms import Fitted, Theft, dilute, report_false_alarms, report_responses, report_thefts
from extraction.audit.cells import Bench
from extraction.audit.plan import Cell
from extraction.audit.recording import Recording
from extraction.audit.traffic import CHANGES, PROFILES, Account, Query, Videos, draw_accounts, group_windows, list_folders
from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.victims.detectors import Stream

VIDEOS = Videos([list(range(30 * v, 30 * v + 13 + v)) for v in range(12)], [f"class {v % 3}" for v in range(12)])


def make_stream(count: int) -> Stream:
    return Stream(torch.zeros(count, 3, 4, 8, 8, dtype=torch.uint8), torch.full((count, 4), 0.25))


def test_accounts_are_the_same_each_time_and_their_halves_share_no_video():
    accounts = draw_accounts(VIDEOS, 4, (20, 60))
    assert accounts == draw_accounts(VIDEOS, 4, (20, 60))
    assert [account.profile for account in accounts[::4]] == list(PROFILES)
    halves = [{q.window // 30 for a in accounts for q in a.queries if a.held_out == late} for late in (False, True)]
    assert halves[0]
    assert halves[1]
    assert not halves[0] & halves[1]
    for account in accounts:
        assert len(account.queries) <= 60
        assert account.profile == "benchmark customer" or len(account.queries) >= 20


def test_profiles_are_what_they_are_called():
    accounts = {account.profile: account.queries for account in draw_accounts(VIDEOS, 2, (40, 40)) if not account.held_out}
    windows = accounts["overlapping windows"]
    assert any(a.upload == b.upload and 0 < b.window - a.window <= 2 for a, b in pairwise(windows))
    assert len({q.window // 30 for q in accounts["fixed camera"]}) == 1
    assert len({VIDEOS.folders[q.window // 30] for q in accounts["one class only"]}) == 1
    assert {q.change for q in accounts["retries and re-encodes"]} > {""}
    assert len({q.change for q in accounts["shifted footage"]}) == 1
    assert "" not in {q.change for q in accounts["shifted footage"]}
    assert len({q.window for q in accounts["benchmark customer"]}) == len(accounts["benchmark customer"])


@pytest.mark.parametrize("change", CHANGES)
def test_changed_footage_is_still_a_clip(change, random_clips):
    clips = random_clips(2, 3, 8, 32, 32)
    changed = CHANGES[change](clips.clone())
    assert changed.shape == clips.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (change == "") == torch.equal(changed, clips)


def test_no_traffic_and_one_account_are_a_line(demo_set, error_line):
    assert error_line(list_folders, ()).startswith("no honest traffic: name folders")
    assert error_line(draw_accounts, VIDEOS, 1, (20, 60)).startswith("--accounts 1: there must be 2 of a profile")
    videos = find_videos(demo_set / "val", None)[:1]
    assert "1 videos make one account" in error_line(group_windows, Clips(videos, 16, size=48))


def test_false_alarms_are_counted_on_the_held_out_half_alone_with_a_bound_that_covers():
    accounts = [Account("mixed", [Query(0, "", -1)], number % 2 == 1) for number in range(20)]
    streams = [make_stream(50 if number in (0, 1, 2, 4) else 10) for number in range(20)]  # one long one is held out
    rows = report_false_alarms([Fitted("quota", dict(limit=20))], accounts, streams)
    assert [(row["row"], row["alarmed"], row["accounts"], row["first_alarm"]) for row in rows] == [
        ("quota, mixed", 1, 10, 21), ("quota, all profiles", 1, 10, 21),
    ]  # fmt: skip
    assert binom.cdf(1, 10, rows[0]["upper"]) == pytest.approx(0.05)


def test_what_a_thief_has_by_the_alarm():
    detector = Fitted("quota", dict(limit=99))
    thefts = [
        Theft("naive", [make_stream(400)] * 3, 1.0, "probs"),
        Theft("diluted 75 %", [make_stream(400)] * 3, 0.25, "probs"),
    ]
    naive, diluted = report_thefts([detector], thefts, lambda row, queries: queries / 1000, 1000)
    assert (naive["queries_to_alarm"], naive["agreement_at_alarm"], naive["accounts_burnt"]) == (100, 0.1, 4)
    assert (diluted["useful_queries"], diluted["accounts_burnt"], diluted["queries_in_all"]) == (25, 40, 4000)
    (free,) = report_thefts([Fitted("quota", dict(limit=10**6))], thefts[:1], lambda row, queries: queries / 1000, 1000)
    assert (free["queries_to_alarm"], free["accounts_burnt"], free["agreement_at_alarm"]) == (None, None, 0.4)


def test_a_response_costs_honest_users_what_follows_false_alarms_and_its_thief_takes_the_better_half():
    accounts = [Account("mixed", [], number % 2 == 1) for number in range(4)]
    streams = [make_stream(count) for count in (200, 50, 200, 30)]  # of those held out one has 10 queries beyond the alarm
    cells = [
        dict(group="alarms", detector="quota", defence=defence, scores=dict(agreement_at_1=agreement))
        for defence, agreement in ((None, 0.5), ("label", 0.7), ("lie", 0.3))
    ]
    answers = {"label": torch.tensor([1.0, 0, 0, 0]), "lie": torch.tensor([0.0, 1, 0, 0]), "nothing": torch.full((4,), 0.25)}
    fitted = [Fitted("quota", dict(limit=40)), Fitted("prada", None, "too short")]
    rows = report_responses(
        cells, fitted, accounts, streams, dict(quota=40), lambda name, stream: answers[name].expand(len(stream.probs), 4)
    )
    found = {row["response"]: row for row in rows}
    assert {name: (row["clone"], row["worst"]) for name, row in found.items()} == {
        "nothing": (0.5, 0.5), "label": (0.7, 0.7), "lie": (0.3, 0.5),
    }  # fmt: skip
    assert {(row["queries_to_alarm"], row["alarmed"], row["accounts"]) for row in rows} == {(41, 1, 2)}
    assert {name: (row["changed"], row["l1"]) for name, row in found.items()} == {
        "nothing": (10 / 80, 0.0), "label": (10 / 80, 1.5 * 10 / 80), "lie": (10 / 80, 1.5 * 10 / 80),
    }  # fmt: skip
    assert found["lie"]["flips"] == found["nothing"]["flips"] == 10 / 80 > found["label"]["flips"] == 0


@pytest.mark.parametrize(("alarm", "defence", "changed"), [(3, "label", 3), (0, "lie", 6), (None, "lie", 0), (4, None, 0)])
def test_answers_are_true_until_the_alarm_and_then_changed(alarm, defence, changed):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    recording = Recording(logits, torch.zeros(6, 3, 4, 8, 8, dtype=torch.uint8), torch.ones(6, dtype=torch.bool))
    nothing: dict = dict.fromkeys(
        ("folder", "views", "asked", "one_order", "create", "recipe", "evaluator", "live", "checkpoint_seconds", "stop_asked")
    )
    bench = Bench(**nothing, recording=recording, order=list(range(6)), fits={}, key=b"k", alarms=dict(quota=alarm))
    cell = Cell(group="alarms", detector="quota", defence=defence, budget=6)
    views, seen, answers = bench._answer_until_alarm(cell, list(range(6)), recording)
    kept = len(views) if alarm is None else alarm
    assert views == list(range(4 if defence is None else 6))
    assert len(seen.logits) == len(answers) == len(views)
    assert torch.equal(answers[:kept], logits[:kept])
    differs = (answers.softmax(1) - logits[: len(views)].softmax(1)).abs().sum(1) > 1e-3
    assert int(differs.sum()) == changed
    if defence == "lie":
        assert (answers.argmax(1) != logits.argmax(1)).sum() == changed


def test_a_diluted_theft_has_that_share_of_honest_queries():
    stream = dilute(make_stream(100), Stream(*(part + 1 for part in make_stream(60)[:2])), 0.75, 0)
    assert len(stream.probs) == 80
    assert int((stream.thumbnails[:, 0, 0, 0, 0] == 1).sum()) == 60
