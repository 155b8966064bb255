"""Held-out videos without labels, and several clips of each: every kind of script scores by agreement alone."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import eval_only
from black_box import random_noise_with_swin, stacked_images_with_swin
from extraction.data.images import write_demo_images
from extraction.evaluation.scoring import Evaluator
from extraction.victims import ledger
from extraction.weights import read_metadata, read_state, save_weights
from grey_box import eval_teacher, labels_only, swin_to_vit_auxiliary

IMAGES = dict(num_clips=20, epochs=1, views_per_clip=1)
NOISE = dict(iterations=2, batch_size=4, student_steps=1, replay_steps=1, replay_clips=8, score_every=100)


@pytest.fixture(scope="module")
def flat(demo_set, tmp_path_factory) -> Path:
    """The 24 held-out videos without their class folders."""
    folder = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted((demo_set / "val").rglob("*.mp4"))):
        shutil.copy(path, folder / f"{number}.mp4")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_demo_images(tmp_path_factory.mktemp("images"), num_images=20, size=64)


def configure(script, val, out_dir, **changes):
    plain = dict(demo=False, victim="demo_swin", val=str(val), num_workers=0, device="cpu", out_dir=str(out_dir))
    known = {field.name for field in dataclasses.fields(script.Config)}
    return script.Config(**script.DEMO | {name: value for name, value in plain.items() if name in known} | changes)


def check_scores(results: dict, num_clips: int) -> None:
    assert {results[name] for name in ("top1", "top5", "victim_top1", "victim_top5")} == {None}
    assert (results["num_val_videos"], results["num_val_clips"]) == (24, num_clips)
    assert set(results["intervals"]) == {"agreement_at_1", "agreement_at_5", "mean_kl"}
    for name, (low, high) in results["intervals"].items():
        assert low <= results[name] <= high
    assert results["history"][-1]["agreement_at_1"] == results["agreement_at_1"]
    assert not {"top1", "top5", "mean_kl"} & results["history"][-1].keys()


def test_a_black_box_attack_is_scored_by_agreement_per_clip(flat, images, tmp_path, monkeypatch, capsys):
    constants = dict(images=str(images), val_clips=2, num_frames=8, **IMAGES)
    config = configure(stacked_images_with_swin, flat, tmp_path / "run", **constants)
    results = stacked_images_with_swin.main(config)
    check_scores(results, 48)
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "no labels: 48 clips of 24 videos score by agreement alone" in out
    assert re.search(r"^victim( +-){5}$", out, re.MULTILINE)
    path = tmp_path / "run" / "results.json"
    kept = json.loads(path.read_text())
    path.unlink()  # as if it had been interrupted after its last score: scored anew, the same
    scored = []
    monkeypatch.setattr(Evaluator, "score", lambda self, student, real=Evaluator.score: scored.append(1) or real(self, student))
    stacked_images_with_swin.main(config)
    again = json.loads(path.read_text())
    assert scored == [1]
    assert {name: again[name] for name in kept if name != "seconds"} == {k: v for k, v in kept.items() if k != "seconds"}


def test_an_attack_without_data_and_a_grey_box_one_of_unrelated_videos_run_so(flat, demo_set, tmp_path):
    check_scores(random_noise_with_swin.main(configure(random_noise_with_swin, flat, tmp_path / "noise", **NOISE)), 24)
    config = configure(
        swin_to_vit_auxiliary, demo_set, tmp_path / "aux", aux=(str(flat),), val_unlabelled=True, allow_overlap=True, epochs=1
    )  # class folders, taken for none; unrelated videos that lie flat
    check_scores(swin_to_vit_auxiliary.main(config), 24)


def test_labels_alone_need_labels(flat, demo_set, tmp_path, error_line):
    config = configure(labels_only, flat, tmp_path, in_domain=str(demo_set / "train_5per"))
    assert error_line(labels_only.main, config).startswith("--val: videos without labels, and no victim to agree with")


def test_classes_that_the_victim_does_not_know_are_refused_before_a_query(flat, images, tmp_path, error_line):
    (tmp_path / "val" / "somewhere").mkdir(parents=True)
    shutil.copy(flat / "0.mp4", tmp_path / "val" / "somewhere")
    config = configure(stacked_images_with_swin, tmp_path / "val", tmp_path / "run", images=str(images), **IMAGES)
    line = error_line(stacked_images_with_swin.main, config)
    assert "class 'somewhere' not among the 12 classes of the model; move them or rename them, or pass --val-unlabelled" in line
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


def test_eval_only_gives_the_numbers_of_a_run(flat, demo_set, images, tmp_path, error_line, capsys):
    constants = dict(images=str(images), val_clips=3, num_frames=8, **IMAGES)
    config = configure(stacked_images_with_swin, demo_set, tmp_path / "run", **constants)
    results = stacked_images_with_swin.main(config)
    assert (results["num_val_videos"], results["num_val_clips"]) == (24, 72)
    scores = ("top1", "top5", "agreement_at_1", "agreement_at_5", "mean_kl")
    assert set(results["intervals"]) == set(scores)
    weights = str(tmp_path / "run" / "student.safetensors")
    common = dict(student="r2plus1d_tiny", weights=weights, num_workers=0, device="cpu", views="3x1")
    found = eval_only.main(eval_only.Config(data=str(demo_set), victim="demo_swin", **common))
    # The run has the victim's answers from its ledger, in 16 bits.
    assert [found[name] for name in scores] == pytest.approx([results[name] for name in scores], abs=1e-3)
    assert found["top1"] == results["top1"]
    without = eval_only.main(eval_only.Config(data=str(demo_set), **common))
    assert (without["top1"], set(without["intervals"])) == (results["top1"], {"top1", "top5"})
    unlabelled = eval_only.main(eval_only.Config(data=str(flat), victim="demo_swin", **common))
    assert unlabelled["agreement_at_1"] == found["agreement_at_1"]
    assert "top1" not in unlabelled
    assert capsys.readouterr().out.splitlines()[-2].startswith("agreement@1 ")
    line = error_line(eval_only.main, eval_only.Config(data=str(flat), **common))
    assert line == f"{flat}: no labels to score against; name the victim to agree with (--victim)"
    about = read_metadata(weights)
    save_weights(tmp_path / "other.safetensors", read_state(weights), about | dict(classes=about["classes"][::-1]))
    other = common | dict(weights=str(tmp_path / "other.safetensors"))
    line = error_line(eval_only.main, eval_only.Config(data=str(flat), victim="demo_swin", **other))
    assert line == f"--victim demo_swin: its 12 classes are not those of {tmp_path / 'other.safetensors'}"


def test_eval_teacher_describes_and_measures_the_ceiling_of_unlabelled_videos(flat, tmp_path, capsys):
    plain = dict(victim="demo_swin", data=str(flat), stride=1, num_workers=0, device="cpu", out_dir=str(tmp_path))
    config = eval_teacher.Config(**plain, ceiling=True, ceiling_size=32)
    results = eval_teacher.main(config)
    assert "top1" not in results
    assert results["top_class_share"] < 0.3
    out = capsys.readouterr().out
    assert "demo_swin: no labels; most often " in out
    assert "32 pixels a side" in out
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"demo_swin\.flat\d*-\w+\.ceiling\.csv", path.name)
    assert len(path.read_text().splitlines()) == 5
    # The demo's victim is of single steps of motion: a clip at another stride is another action to it, a smaller one is not.
    agreed = [scores["agreement_at_1"] for scores in results["ceiling"].values()]
    assert agreed[0] > 0.8 > agreed[2]
