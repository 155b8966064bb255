"""The loop and the losses: exact queries, equal bits, budgets, and what goes wrong."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import eval_only
from extraction.distill import answers_to_targets, distillation_loss
from extraction.errors import BudgetExhausted, Stop
from extraction.weights import read_state
from grey_box import labels_only, swin_to_r21_kd


@pytest.fixture
def config(demo_set, tmp_path):
    """The demo's constants on a handful of clips: 36 labelled, 40 unrelated, 24 held out."""
    demo = swin_to_r21_kd.DEMO | dict(
        demo=False, own=str(demo_set / "train_5per"), val=str(demo_set / "val"), epochs=2, num_workers=0,
        unrelated=(str(demo_set / "unrelated_a"), str(demo_set / "unrelated_b")), out_dir=str(tmp_path / "run"),
    )  # fmt: skip
    return swin_to_r21_kd.Config(**demo)


def weights_of(config) -> dict:
    return read_state(f"{config.out_dir}/student.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_leaves_everything_and_repeats_to_the_bit(config, tmp_path):
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 2 * 76
    needed = (
        "experiment victim student answers num_queries query_budget num_classes top1 top5 victim_top1 victim_top5 "
        "agreement_at_1 agreement_at_5 chance_top1 seconds commit config"
    )
    assert set(needed.split(" ")) <= set(json.loads((tmp_path / "run" / "results.json").read_text()))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "results.json", "curve.png", "clips.png", "student.safetensors", "state.pt", "ledger.sqlite"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "again"))
    swin_to_r21_kd.main(other)
    assert equal(weights_of(config), weights_of(other))
    different = dataclasses.replace(config, out_dir=str(tmp_path / "seed"), seed=1, epochs=1)
    swin_to_r21_kd.main(different)
    assert not equal(weights_of(config), weights_of(different))
    # The saved student, scored by itself, repeats the run's numbers exactly.
    scored = eval_only.main(
        eval_only.Config("r2plus1d_tiny", f"{config.out_dir}/student.safetensors", config.val, num_workers=0, device="cpu")
    )
    assert (scored["top1"], scored["top5"]) == (results["top1"], results["top5"])
    assert len((tmp_path / "run" / "student.classes.csv").read_text().splitlines()) == 13


@pytest.mark.gpu
def test_a_gpu_trains_resumes_and_pays_the_same(config):
    on_gpu = dataclasses.replace(config, device="cuda", num_workers=2)
    with pytest.raises(BudgetExhausted, match="100 of 100"):
        swin_to_r21_kd.main(dataclasses.replace(on_gpu, query_budget=100))
    assert swin_to_r21_kd.main(on_gpu)["num_queries"] == 2 * 76


def test_the_budget_is_never_passed_and_the_student_is_saved(config, tmp_path):
    short = dataclasses.replace(config, query_budget=2 * 76 - 1)
    with pytest.raises(BudgetExhausted, match="query budget exhausted: 151 of 151 queries spent in epoch 2 of 2"):
        swin_to_r21_kd.main(short)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["num_queries"] == 151
    assert results["top1"] >= 0
    eval_only.main(eval_only.Config("r2plus1d_tiny", f"{config.out_dir}/student.safetensors", config.val, num_workers=0))
    # A larger budget goes on from there, to where an unlimited run would have come.
    whole = dataclasses.replace(config, query_budget=2 * 76)
    assert swin_to_r21_kd.main(whole)["num_queries"] == 152
    free = dataclasses.replace(config, out_dir=str(tmp_path / "free"))
    swin_to_r21_kd.main(free)
    assert equal(weights_of(whole), weights_of(free))


def test_views_per_clip_bounds_the_queries(config):
    assert swin_to_r21_kd.main(dataclasses.replace(config, epochs=3, views_per_clip=1))["num_queries"] == 76


def test_a_second_run_over_a_full_ledger_pays_nothing_and_needs_no_weights(config, tmp_path, monkeypatch):
    from extraction import victims

    swin_to_r21_kd.main(config)
    for name in ("results.json", "state.pt", "student.safetensors", "config.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    monkeypatch.setitem(victims.VICTIMS, "demo_swin", (None, tmp_path / "nowhere.safetensors", "elsewhere"))
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 152
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (tmp_path / "student.safetensors").read_bytes()


def test_resumes_to_the_same_bits_from_any_step(config, tmp_path, monkeypatch):
    from extraction.runs import Run

    swin_to_r21_kd.main(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    whole = weights_of(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))

    class Crash(Exception):
        pass

    def save_then_crash(self, state, real=Run.save_state):
        real(self, state)
        raise Crash

    monkeypatch.setattr(Run, "save_state", save_then_crash)
    monkeypatch.setattr(Run, "checkpoint_due", lambda self: True)
    for _ in range(2 * 5):  # 76 clips are five batches an epoch, each followed by a checkpoint and a crash
        with pytest.raises(Crash):
            swin_to_r21_kd.main(config)
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 152
    assert equal(weights_of(config), whole)


def test_other_constants_are_refused_in_the_same_folder(config):
    swin_to_r21_kd.main(dataclasses.replace(config, epochs=1))
    with pytest.raises(Stop, match=r"holds a run with other constants \(epochs 1 -> 2\)"):
        swin_to_r21_kd.main(config)


def test_a_loss_that_is_not_finite_stops_and_says_where(config):
    with pytest.raises(Stop, match=r"the loss became (nan|inf) in epoch 1, batch \d"):
        swin_to_r21_kd.main(dataclasses.replace(config, head_lr=1e30, body_lr=1e30))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(num_frames=0), "--num-frames 0: it must be at least 1"),
        (dict(query_budget=-1), "--query-budget -1: it must be at least 0"),
        (dict(answers="all"), "no answers are called 'all'"),
        (dict(student="resnet"), "no student is called 'resnet'"),
        (dict(device="cuda:7"), "device cuda:7: PyTorch sees"),
        (dict(device="gpu"), "device 'gpu': write auto, cpu, cuda"),
        (dict(own="nowhere"), "folder nowhere not found"),
        (dict(victim_weights="nowhere.pth"), r"victim weights nowhere.pth not found"),
        (dict(student_weights="nowhere.pth"), "weights nowhere.pth not found"),
        (dict(own_list="nowhere.txt"), "list nowhere.txt not found"),
        (dict(out_dir="/proc/run"), "cannot make /proc/run"),
    ],
)
def test_bad_constants_get_one_line(config, change, line):
    with pytest.raises(Stop, match=line) as caught:
        swin_to_r21_kd.main(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers", ["logits", "top5", "label"])
def test_every_surface_trains(config, answers):
    assert swin_to_r21_kd.main(dataclasses.replace(config, epochs=1, answers=answers))["answers"] == answers


def test_the_baseline_asks_no_victim(config, tmp_path):
    demo = labels_only.DEMO | dict(demo=False, own=config.own, val=config.val, epochs=2, num_workers=0)
    results = labels_only.main(labels_only.Config(**demo | dict(out_dir=str(tmp_path / "labels"))))
    assert results["num_queries"] == 0
    assert results["victim"] is None


# --- losses --------------------------------------------------------------------------------------------------------


def test_targets_of_each_surface():
    probs = torch.tensor([[0.4, 0.2, 0.15, 0.1, 0.05, 0.06, 0.04]])
    torch.testing.assert_close(answers_to_targets(probs, "probs", 7), probs)
    torch.testing.assert_close(answers_to_targets(probs.log(), "logits", 7), probs)
    assert answers_to_targets(torch.tensor([2]), "label", 4).tolist() == [[0, 0, 1, 0]]
    top5 = probs * (probs > 0.05)
    torch.testing.assert_close(answers_to_targets(top5, "top5", 7)[0, [4, 6]], torch.tensor([0.045, 0.045]))
    assert math.isclose(answers_to_targets(top5, "top5", 7).sum().item(), 1.0, rel_tol=1e-6)


def test_the_loss_is_kl_plus_weighted_true_label_loss_per_clip():
    torch.manual_seed(0)
    logits, targets, labels = torch.randn(4, 6), torch.randn(4, 6).softmax(1), torch.tensor([3, -1, 0, -1])
    log_q = logits - logits.exp().sum(1, keepdim=True).log()
    kl = (targets * (targets.log() - log_q)).sum(1)
    ce = torch.stack([-log_q[0, 3], torch.tensor(0.0), -log_q[2, 0], torch.tensor(0.0)])
    torch.testing.assert_close(distillation_loss(logits, targets, labels, 10.0), (kl + 10 * ce).mean())
    torch.testing.assert_close(distillation_loss(logits, None, labels, 1.0), ce.mean())
    assert F.kl_div(targets.log(), targets, reduction="batchmean").abs() < 1e-6
    assert distillation_loss(targets.log(), targets, labels, 0.0).abs() < 1e-6
