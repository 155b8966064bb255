"""The grey-box family: crafting, pruning, the stages, and every script's queries on a handful of clips."""

import dataclasses
import json

import pytest
import torch

from extraction.errors import UserError
from extraction.students import create_student, load_student, pruning
from extraction.victims import zoo
from extraction.weights import read_state, save_weights
from grey_box import (
    swin_to_c3d,
    swin_to_r21,
    swin_to_r21_prada,
    swin_to_r21_using_cosine,
    swin_to_vit_auxiliary,
    swin_to_vit_finetune,
    swin_to_vit_ticket,
)

IN_DOMAIN, AUX = 12 * 3, 8 * 3 + 8 * 2  # clips of the session's small demo set


def small(script, demo_set, out_dir, **changes):
    config = dataclasses.replace(
        script.Config(**script.DEMO), demo=False, val=str(demo_set / "val"), epochs=1, num_workers=0, device="cpu",
        checkpoint_seconds=1e9, out_dir=str(out_dir),
    )  # fmt: skip
    if hasattr(config, "in_domain"):
        changes = {"in_domain": str(demo_set / "train_5per"), **changes}
    if getattr(config, "aux", ()):
        changes = {"aux": (str(demo_set / "unrelated_a"), str(demo_set / "unrelated_b")), **changes}
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("script", "num_queries"),
    [
        (swin_to_r21, IN_DOMAIN),
        (swin_to_c3d, IN_DOMAIN),
        (swin_to_r21_using_cosine, IN_DOMAIN + AUX),
        (swin_to_r21_prada, 2 * IN_DOMAIN),
        (swin_to_vit_auxiliary, AUX),
    ],
)
def test_each_script_asks_what_it_says(script, num_queries, demo_set, tmp_path):
    results = script.main(small(script, demo_set, tmp_path))
    assert results["num_queries"] == num_queries
    assert results["chance_top1"] == 1 / 12
    assert {"top1", "top5", "agreement_at_1", "agreement_at_5", "victim_top1", "config"} <= set(results)
    assert (tmp_path / "student.safetensors").is_file()


def test_the_learning_rates_restart(demo_set, tmp_path, monkeypatch):
    seen = []
    real = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts

    class Watched(real):
        def step(self, epoch=None):
            super().step(epoch)
            seen.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.lr_scheduler, "CosineAnnealingWarmRestarts", Watched)
    swin_to_r21_using_cosine.main(small(swin_to_r21_using_cosine, demo_set, tmp_path, restart_batches=3, head_lr=1.0))
    rates = seen[1:]  # its first call sets the schedule up
    assert rates[:4] == pytest.approx([0.75, 0.25, 1.0, 0.75], abs=1e-6)


@pytest.mark.parametrize(
    "short", [pytest.param(1, marks=pytest.mark.slow), 20]
)  # the budget ends among the crafted clips, or among the real ones
def test_crafting_never_passes_the_budget_and_goes_on_from_there(short, demo_set, tmp_path, capsys):
    whole = small(swin_to_r21_prada, demo_set, tmp_path / "whole")
    swin_to_r21_prada.main(whole)
    budget = 2 * IN_DOMAIN - short
    cut = dataclasses.replace(whole, out_dir=str(tmp_path / "cut"), query_budget=budget)
    results = swin_to_r21_prada.main(cut)
    assert (results["num_queries"], results["stopped"]) == (budget, "query budget")
    assert f"query budget exhausted: {budget} of {budget} queries used" in capsys.readouterr().out
    results = swin_to_r21_prada.main(dataclasses.replace(cut, query_budget=None))
    assert results["num_queries"] == 2 * IN_DOMAIN
    # A batch that was cut is answered in two parts, whose sums are rounded otherwise: all but the last bits are equal.
    students = [read_state(tmp_path / name / "student.safetensors") for name in ("whole", "cut")]
    assert all(torch.allclose(students[0][key], students[1][key], atol=1e-3) for key in students[0])


@pytest.fixture(scope="module")
def dense(demo_set, tmp_path_factory):
    """What the stage before saves."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("dense")
    from extraction.data.demo import ACTIONS

    made = create_student("vit_demo", 12)
    about = dict(student="vit_demo", classes=sorted(ACTIONS), num_queries=77)
    save_weights(folder / "student.safetensors", made.net.state_dict(), about)
    return str(folder / "student.safetensors")


def test_a_ticket_is_zero_where_it_is_pruned_after_every_step(dense, demo_set, tmp_path, monkeypatch):
    checked, masks_held = [], []

    def watch(net, masks, optimizer, real=pruning.keep_masked):
        early = {key: value.clone() for key, value in net.state_dict().items()}
        real(net, masks, optimizer)
        masks_held.append(masks)
        state = net.state_dict()
        for name, mask in masks.items():  # rewound: survivors have their early values, bit for bit
            assert torch.equal(state[name][mask], early[name][mask])
            assert torch.equal(early[name], read_state(dense)[name])

        def after_a_step(*_):
            for name, mask in masks.items():
                assert (state[name][~mask] == 0).all()
            checked.append(1)

        optimizer.register_step_post_hook(after_a_step)

    monkeypatch.setattr(swin_to_vit_ticket, "keep_masked", watch)
    config = small(swin_to_vit_ticket, demo_set, tmp_path, student_weights=dense, round_epochs=1, target_sparsity=0.6)
    results = swin_to_vit_ticket.main(config)
    assert len(masks_held) == 6  # five rounds and the ticket
    assert len(checked) == 6 * 3  # 36 clips are three batches
    assert results["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert (results["num_queries"], results["num_queries_before"]) == (0, 77)
    saved, mask = (read_state(tmp_path / f"{name}.safetensors") for name in ("student", "mask"))
    assert sum(int((~m).sum()) for m in mask.values()) / sum(m.numel() for m in mask.values()) == pytest.approx(0.6, abs=1e-3)
    assert all((saved[name][~m.bool()] == 0).all() for name, m in mask.items())
    assert any((saved[name] != read_state(dense)[name]).any() for name in mask)
    assert load_student("vit_demo", tmp_path / "student.safetensors")[1]["num_queries"] == 77


def test_a_stage_says_what_it_waits_for(dense, demo_set, tmp_path):
    config = small(swin_to_vit_finetune, demo_set, tmp_path / "run")
    for demo, command in (("_demo", "swin_to_vit_auxiliary.py --demo"), ("", "swin_to_vit_auxiliary.py` saves.*or try --demo")):
        missing = f"{tmp_path}/swin_to_vit_auxiliary{demo}/student.safetensors"
        with pytest.raises(UserError, match=rf"goes on from what `python grey_box/{command}"):
            swin_to_vit_finetune.main(dataclasses.replace(config, student_weights=missing))
    made = create_student("vit_demo", 3)
    other = tmp_path / "other.safetensors"
    save_weights(other, made.net.state_dict(), dict(student="vit_demo", classes=["a", "b", "c"]))
    with pytest.raises(UserError, match="3 other classes than the victim's 12"):
        swin_to_vit_finetune.main(dataclasses.replace(config, student_weights=str(other)))


def test_fine_tuning_goes_on_from_the_saved_weights_and_asks_nothing(dense, demo_set, tmp_path):
    config = small(swin_to_vit_finetune, demo_set, tmp_path, student_weights=dense, head_lr=0.0, body_lr=0.0)
    results = swin_to_vit_finetune.main(config)
    assert (results["num_queries"], results["num_queries_before"]) == (0, 77)
    after = read_state(tmp_path / "student.safetensors")
    assert all(torch.equal(value, after[key]) for key, value in read_state(dense).items())
    assert json.loads((tmp_path / "results.json").read_text())["agreement_at_1"] >= 0


def test_a_module_of_ones_own_is_attacked(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "VICTIMS", dict(zoo.VICTIMS))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d(2), torch.nn.Flatten(), torch.nn.Linear(24, 12))
    zoo.add_victim("mine", net, sorted(path.name for path in (demo_set / "val").iterdir()), size=16)
    options = dict(victim="mine", min_victim_top1=0, query_budget=20, batch_size=10)
    results = swin_to_r21.main(small(swin_to_r21, demo_set, tmp_path, **options))
    assert (results["victim"], results["num_queries"], results["stopped"]) == ("mine", 20, "query budget")
    assert 0 <= results["agreement_at_1"] <= 1
