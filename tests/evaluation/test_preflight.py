"""The preflight: a victim that is set up wrongly is found before the first query."""

import contextlib
import re
import shutil
import sqlite3
from contextlib import closing

import pytest
import torch

from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation.scoring import AnswerSpread, Evaluator, check_answers, check_victim
from extraction.victims.ledger import Ledger
from extraction.victims.trained import create_network
from extraction.victims.zoo import load_model, load_victim


def open_evaluator(demo_set, folder, classes, open_model, batch_size=24, spoil=None, labelled=True, **options) -> Evaluator:
    folder.mkdir(exist_ok=True)
    clips = Clips(find_videos(demo_set, classes if labelled else None, "val"), views=(1, 1), num_frames=16, size=48)
    content = spoil and spoil.read_bytes()
    if spoil:  # once it was looked at
        spoil.write_bytes(b"no video any more")
    ledger = Ledger(folder / "ledger.sqlite", lambda num_queries: load_victim("demo_swin", num_queries=num_queries), "probs")
    try:
        return Evaluator(clips, classes, torch.device("cpu"), batch_size, 0, ledger, open_model, **options)
    finally:
        assert ledger.num_queries == 0
        ledger.close()
        if spoil:
            spoil.write_bytes(content)


def test_preflight_passes_the_right_victim(demo_set, tmp_path):
    model = load_model("demo_swin")
    assert open_evaluator(demo_set, tmp_path, model.classes, lambda: model).victim_scores["top1"] > 0.9


def shuffle_classes(model):
    return [model.classes[(k * 5 + 3) % 12] for k in range(12)], model


def normalise_for_0_to_255(model):
    """Mean and standard deviation meant for the other scale. Bare x255 this victim forgives: layer norm divides it out."""
    model.model.mean, model.model.std = 255 * model.model.mean, 255 * model.model.std
    return model.classes, model


def forget_the_weights(model):
    model.model.net = create_network("swin_demo", 12, 16, 48).net.eval()
    return model.classes, model


@pytest.mark.parametrize("spoil", [shuffle_classes, normalise_for_0_to_255, forget_the_weights])
def test_preflight_refuses(demo_set, tmp_path, spoil):
    torch.manual_seed(0)
    classes, model = spoil(load_model("demo_swin"))
    with pytest.raises(UserError, match="wrong weights, wrong class order, wrong preprocessing") as caught:
        open_evaluator(demo_set, tmp_path, classes, lambda: model)
    assert "\n" not in str(caught.value)
    assert open_evaluator(demo_set, tmp_path, classes, lambda: model, min_victim_top1=0).victim_scores["top1"] < 0.25


# --- without labels ----------------------------------------------------------------------------------------------------


def test_preflight_without_labels_passes_the_right_victim_and_says_what_it_answers(demo_set, tmp_path, capsys):
    model = load_model("demo_swin")
    evaluator = open_evaluator(demo_set, tmp_path, model.classes, lambda: model, labelled=False)
    scores = evaluator.victim_scores
    assert (scores["top1"], scores["top5"]) == (None, None)
    assert 1 / 12 <= scores["top_class_share"] < 0.3
    assert scores["confidence"] > 0.5
    assert scores["entropy"] < 0.5
    assert "no labels: 24 clips of 24 videos score by agreement alone; the victim calls" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--min-victim-top1 0.5: the held-out videos have no labels to measure it on"):
        open_evaluator(demo_set, tmp_path / "b", model.classes, lambda: model, labelled=False, min_victim_top1=0.5)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            normalise_for_0_to_255,
            r"calls 100.0 % of the held-out clips '\w[\w ]*': wrong preprocessing or weights, or footage of one kind",
        ),
        (
            forget_the_weights,
            r"is nearly uniform on the held-out clips: mean entropy 9[5-9]\.\d % of the largest: wrong weights",
        ),
    ],
)
def test_preflight_without_labels_refuses(demo_set, tmp_path, spoil, line, error_line):
    torch.manual_seed(0)
    _, model = spoil(load_model("demo_swin"))
    message = error_line(open_evaluator, demo_set, tmp_path, model.classes, lambda: model, labelled=False)
    assert re.search(line, message), message
    assert message.endswith("no query was made (--min-victim-top1 0 switches this check off)")
    open_evaluator(demo_set, tmp_path, model.classes, lambda: model, labelled=False, min_victim_top1=0)


@pytest.mark.parametrize(("share", "entropy", "passes"), [(0.89, 0.94, True), (0.9, 0.5, False), (0.1, 0.95, False)])
def test_the_answers_that_pass(share, entropy, passes):
    answers = AnswerSpread("walk", share, 0.5, entropy)
    with contextlib.nullcontext() if passes else pytest.raises(UserError):
        check_answers(answers)
    check_answers(answers, 0)


def test_neither_labels_nor_a_victim_is_one_line(demo_set, error_line):
    clips = Clips(find_videos(demo_set, None, "val"), views=(1, 1), num_frames=16, size=48)
    line = error_line(Evaluator, clips, ["a", "b"], torch.device("cpu"), 24, 0)
    assert line == "--val: videos without labels, and no victim to agree with; lay it out as class/video files"


@pytest.mark.parametrize(("num_classes", "least"), [(2, 0.75), (12, 0.25), (400, 3 / 400)])
def test_the_least_that_passes(num_classes, least):
    check_victim({"top1": least + 1e-6}, num_classes)
    with pytest.raises(UserError):
        check_victim({"top1": least - 1e-6}, num_classes)
    check_victim({"top1": 0.0}, num_classes, 0)
    with pytest.raises(UserError):
        check_victim({"top1": 0.79}, num_classes, 0.8)


@pytest.mark.parametrize("asked", [0, 1, 3, 4])
def test_an_interrupted_scoring_of_the_victim_goes_on(demo_set, tmp_path, asked):
    """Ctrl-C after `asked` of five batches of 5 videos, one of which cannot be decoded: only the others are asked for again."""
    model, left, seen = load_model("demo_swin"), [asked], []

    def interruptible(clips):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        seen.append(len(clips))
        return model(clips)

    val = tmp_path / "val"
    shutil.copytree(demo_set / "val", val)
    first = sorted(val.rglob("*.mp4"))[0]
    whole = open_evaluator(val, tmp_path / "whole", model.classes, lambda: model, batch_size=5, spoil=first)
    with pytest.raises(KeyboardInterrupt):
        open_evaluator(val, tmp_path / "run", model.classes, lambda: interruptible, batch_size=5, spoil=first)
    left[0] = 10
    evaluator = open_evaluator(val, tmp_path / "run", model.classes, lambda: interruptible, batch_size=5, spoil=first)
    again = 1 if asked else 0  # the batch of the broken video, which has no answer, comes again
    assert seen == [4, 5, 5, 5, 4][:asked] + [4][:again] + [4, 5, 5, 5, 4][asked:]
    assert torch.equal(evaluator.victim_probs, whole.victim_probs)
    assert evaluator.victim_scores == whole.victim_scores
    assert (evaluator.victim_probs.sum(1) == 0).sum() == 1
    left[0] = 0
    kept = open_evaluator(val, tmp_path / "run", model.classes, lambda: interruptible, batch_size=5, spoil=first)
    assert torch.equal(kept.victim_probs, whole.victim_probs)


def test_what_the_preflight_cannot_tell_is_said(demo_set, tmp_path, capsys):
    model = load_model("demo_swin")
    for label in model.classes[:10]:
        shutil.copytree(demo_set / "val" / label, tmp_path / "few" / label)
    open_evaluator(tmp_path / "few", tmp_path / "ledger", model.classes, lambda: model)
    assert capsys.readouterr().out.splitlines() == [
        "2 of the victim's 12 classes have no held-out video; chance is that of all classes"
    ]
    shutil.rmtree(tmp_path / "few" / model.classes[0])
    open_evaluator(tmp_path / "few", tmp_path / "ledger", model.classes, lambda: model)
    assert capsys.readouterr().out.splitlines() == [
        "no preflight: 18 held-out videos are too few to tell a wrong victim (20 are not)",
        "3 of the victim's 12 classes have no held-out video; chance is that of all classes",
    ]


WRONG_SCALES = {
    "0 to 255": (lambda clips: 255 * clips, "clips reach from 0 to 255"),
    "normalised": (lambda clips: (clips - 0.45) / 0.225, "clips reach from -2 to 2.44"),
    "not a number": (lambda clips: clips / clips.new_tensor(0.0), "clips reach from nan to nan"),
}


@pytest.mark.parametrize("spoil", WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_clips_of_another_scale_are_refused_and_not_counted(random_clips, demo_set, tmp_path, spoil):
    change, line = spoil
    clips = random_clips(2, 3, 16, 48, 48)
    clips[0, 0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    victim = load_victim("demo_swin", query_budget=4)
    ledger = Ledger(tmp_path / "l.sqlite", lambda num_queries: victim, "probs")
    for ask in (victim.query, lambda wrong: ledger.query(wrong, [bytes(16), bytes([1]) * 16])):
        with pytest.raises(UserError, match=line) as caught:
            ask(change(clips))
        assert "\n" not in str(caught.value)
    assert (victim.num_queries, ledger.num_queries, len(ledger)) == (0, 0, 0)
    victim.query((clips + 5e-4).half().float())  # rounding is let through
    assert victim.num_queries == 2
    ledger.close()
    # The evaluator's way in: what stands between clips and model is found before a query is counted or an answer kept.
    model = load_model("demo_swin")
    with pytest.raises(UserError, match="a victim takes RGB in"):
        open_evaluator(demo_set, tmp_path / "r", model.classes, lambda: lambda clips: model(change(clips)))
    with closing(sqlite3.connect(tmp_path / "r" / "ledger.sqlite")) as kept:
        assert kept.execute("SELECT (SELECT count(*) FROM evaluator) + (SELECT count(*) FROM answers)").fetchone() == (0,)
