"""The trial of overlap and turns, on a clock of its own."""

import dataclasses

import pytest
import torch

from extraction import distributed
from extraction.attacks import pace
from extraction.attacks.distill import Training
from extraction.attacks.pace import TRIAL, Pace
from grey_box import swin_to_r21_kd


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(distributed, "ALL_THREADS", 2)


def run_trial(monkeypatch, seconds: dict[str, float], first: int = 0) -> Pace:
    """A trial whose batches take so long by their pace, the first of each pace ten times that."""
    chosen, clock, lines = Pace("auto", True, "overlap"), 0.0, []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock)
    chosen.begin(first, can_try=True)
    for batch in range(first, first + TRIAL):
        assert chosen.chosen is None
        begins = (batch - first) % (TRIAL // 2) == 0
        clock += seconds[chosen.at(batch)] * (10 if begins else 1)
        lines.append(chosen.end_of(batch))
    assert not any(lines[:-1])
    assert f"--pace {chosen.chosen} from here" in lines[-1]
    assert chosen.seconds == pytest.approx(seconds)
    assert chosen.end_of(first + TRIAL) is None
    return chosen


def test_turns_are_kept_where_they_gain_a_tenth(two_threads, monkeypatch):
    assert run_trial(monkeypatch, dict(overlap=1.2, turns=1.0)).chosen == "turns"
    assert run_trial(monkeypatch, dict(overlap=1.05, turns=1.0), first=40).chosen == "overlap"
    assert run_trial(monkeypatch, dict(overlap=1.0, turns=1.5)).chosen == "overlap"


def test_where_there_is_nothing_to_choose_nothing_is_tried(two_threads, monkeypatch):
    assert Pace("auto", False, "turns").chosen == "turns"
    assert [Pace(asked, True, "overlap").chosen for asked in ("auto", "overlap", "turns")] == [None, "overlap", "turns"]
    short = Pace("auto", True, "overlap")
    short.begin(0, can_try=False)
    assert short.chosen == "overlap"
    monkeypatch.setattr(distributed, "ALL_THREADS", 1)
    assert Pace("auto", True, "overlap").chosen == Pace("turns", True, "overlap").chosen == "overlap"


def test_a_run_keeps_to_its_choice_and_resumes_with_it(demo_set, tmp_path, two_threads, monkeypatch):
    demo = swin_to_r21_kd.DEMO | dict(
        demo=False, in_domain=str(demo_set / "train_5per"), val=str(demo_set / "val"), epochs=1, num_workers=0, batch_size=2,
        aux=(), out_dir=str(tmp_path / "whole"), checkpoint_seconds=0.0,
    )  # fmt: skip
    config, faster, clock, seen, step = swin_to_r21_kd.Config(**demo), 2, 0.0, [], Training.step

    def tick() -> float:
        nonlocal clock
        clock += 1 if torch.get_num_threads() == faster else 2
        return clock

    def noted(training, loss):
        seen.append(torch.get_num_threads())
        step(training, loss)

    monkeypatch.setattr(pace.time, "perf_counter", tick)
    monkeypatch.setattr(Training, "step", noted)
    results = swin_to_r21_kd.main(config)
    assert results["pace"] == "turns"
    assert seen == [1] * 6 + [2] * 12
    assert torch.get_num_threads() == 1

    def interrupted(training, loss):
        if training._batch.number == 15:
            raise KeyboardInterrupt
        step(training, loss)

    parts = dataclasses.replace(config, out_dir=str(tmp_path / "parts"))
    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swin_to_r21_kd.main(parts)
    faster = 1  # a new trial would choose otherwise
    monkeypatch.setattr(Training, "step", step)
    assert swin_to_r21_kd.main(parts)["pace"] == "turns"
    whole, resumed = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == resumed
