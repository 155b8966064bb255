"""Defences and the wire as options of scripts: fitted before the first query, written down, refused in one line."""

import dataclasses
import json
import sqlite3

import pytest

from extraction.errors import UserError
from grey_box import swin_to_r21


def defended(demo_set, out_dir, **options) -> swin_to_r21.Config:
    return dataclasses.replace(
        swin_to_r21.Config(**swin_to_r21.DEMO), demo=False, val=str(demo_set / "val"), in_domain=str(demo_set / "train_5per"),
        epochs=1, num_workers=0, device="cpu", checkpoint_seconds=1e9, query_budget=16, out_dir=str(out_dir), **options,
    )  # fmt: skip


def read_about(path) -> dict:
    with sqlite3.connect(path) as database:
        return dict(database.execute("SELECT name, value FROM about"))


def test_a_defence_is_fitted_to_held_out_answers_before_the_first_query(demo_set, tmp_path, capsys):
    options = dict(defence="modelguard_s", defence_strength=0.02, wire="uint8")
    results = swin_to_r21.main(defended(demo_set, tmp_path, **options))
    assert results["num_queries"] == 16
    about = read_about(tmp_path / "ledger.sqlite")
    assert (about["defence"], about["wire"]) == ("modelguard_s 0.02", "uint8")
    fitted = json.loads(about["defence_constants"])["defence"]
    assert (
        f"defence modelguard_s, on the victim's answers to held-out videos: mean L1 {fitted['l1']:.3g}"
        in capsys.readouterr().out
    )
    assert 0.01 < fitted["l1"] < 0.04  # of 24 answers, which it takes together one by one
    assert about["defence_key"] not in json.dumps(fitted)
    (tmp_path / "results.json").unlink()
    (tmp_path / "state.pt").unlink(missing_ok=True)
    assert swin_to_r21.main(defended(demo_set, tmp_path, **options))["num_queries"] == 16  # all of it cached


def test_an_alarm_is_fitted_to_held_out_videos(demo_set, tmp_path, capsys):
    swin_to_r21.main(defended(demo_set, tmp_path, defence="lie", defence_after="near_duplicates"))
    assert "near_duplicates: 0 false alarms in 10 accounts of 12 queries" in capsys.readouterr().out
    name, constants = json.loads(read_about(tmp_path / "ledger.sqlite")["defence_constants"])["detector"]
    assert name == "near_duplicates"
    assert constants["radius"] > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(defence="nonsense", defence_strength=0.3), "--defence nonsense: it must be one of noise, "),
        (dict(defence="noise"), "--defence noise needs --defence-strength"),
        (dict(defence="modelguard_w", defence_strength=0.3, answers="label"), "--defence modelguard_w keeps the top class"),
        (dict(defence="noise", defence_strength=3.0), "--defence-strength 3.0: it must be at most 2"),
        (dict(defence="lie", defence_after="nonsense"), "--defence-after nonsense: there are quota:N (queries), prada"),
        (dict(wire="vp9"), "--wire vp9: there are float, uint8"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_made(options, line, demo_set, tmp_path):
    with pytest.raises(UserError) as caught:
        swin_to_r21.main(defended(demo_set, tmp_path / "run", **options))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
