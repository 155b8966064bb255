"""The grey-box family: crafting, pruning, the stages, and every script's bill on a handful of clips."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from extraction import crafting, pruning
from extraction.errors import BudgetExhausted, UserError
from extraction.students import create_student, load_student
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

OWN, UNRELATED = 12 * 3, 8 * 3 + 8 * 2  # clips of the session's small demo set


def small(script, demo_set, out_dir, **changes):
    config = dataclasses.replace(
        script.Config(**script.DEMO), demo=False, val=str(demo_set / "val"), epochs=1, num_workers=0, device="cpu",
        checkpoint_seconds=1e9, out_dir=str(out_dir),
    )  # fmt: skip
    if hasattr(config, "own"):
        changes = {"own": str(demo_set / "train_5per"), **changes}
    if getattr(config, "unrelated", ()):
        changes = {"unrelated": (str(demo_set / "unrelated_a"), str(demo_set / "unrelated_b")), **changes}
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("script", "num_queries"),
    [
        (swin_to_r21, OWN),
        (swin_to_c3d, OWN),
        (swin_to_r21_using_cosine, OWN + UNRELATED),
        (swin_to_r21_prada, 2 * OWN),
        (swin_to_vit_auxiliary, UNRELATED),
    ],
)
def test_each_script_pays_for_what_it_says(script, num_queries, demo_set, tmp_path):
    results = script.main(small(script, demo_set, tmp_path))
    assert results["num_queries"] == num_queries
    assert results["chance_top1"] == 1 / 12
    assert {"top1", "top5", "agreement_at_1", "agreement_at_5", "victim_top1", "config"} <= set(results)
    assert (tmp_path / "student.safetensors").is_file()


def test_the_rates_restart_after_so_many_batches(demo_set, tmp_path, monkeypatch):
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


# --- crafting ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return create_student("r2plus1d_tiny", 12).eval()


@pytest.fixture(scope="module")
def clips():
    return torch.rand(20, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


def test_t_rnd_raises_the_target_and_stays_within_bounds(student, clips):
    labels = student(clips).argmax(1)
    targets = crafting.draw_targets(labels, 12, [bytes([i]) for i in range(20)])
    assert (targets != labels).all()
    assert targets.unique().numel() > 3
    crafted = crafting.approach_targets(student, clips, targets, 0.03, 4)
    assert crafted.min() >= 0
    assert crafted.max() <= 1
    assert (crafted - clips).abs().max() <= 0.03 + 1e-6
    before, after = (student(x).softmax(1).gather(1, targets[:, None]) for x in (clips, crafted))
    assert (after > before).float().mean() >= 0.9


def test_jbda_steps_along_the_sign_of_the_jacobian(clips):
    linear = nn.Linear(3 * 8 * 32 * 32, 12)

    class Flat(nn.Module):
        def forward(self, x):
            return linear(x.flatten(1))

    labels = torch.arange(20) % 12
    middle = 0.25 + 0.5 * clips  # nothing is cut off at 0 or 1
    crafted = crafting.augment_by_jacobian(Flat(), middle, labels, 0.02)
    expected = middle + 0.02 * linear.weight[labels].sign().view_as(middle)
    assert torch.allclose(crafted, expected, atol=1e-6)


def test_random_perturbation_is_a_function_of_the_key(clips):
    keys = [bytes([i]) for i in range(20)]
    once, again = (crafting.perturb_randomly(clips, keys, 0.03) for _ in range(2))
    assert torch.equal(once, again)
    assert (once - clips).abs().max() <= 0.03 + 1e-6
    assert (once - clips).abs().mean() > 0.01
    assert not torch.equal(once, crafting.perturb_randomly(clips, keys[::-1], 0.03))


def test_crafting_leaves_the_student_alone_and_names_each_clip(student, clips, tmp_path):
    craft = crafting.create_crafter(crafting.METHODS, 0.5, 0.03, 2, tmp_path / "crafted.png", [str(i) for i in range(12)])
    before, said = {key: value.clone() for key, value in student.net.state_dict().items()}, student(clips).softmax(1).detach()
    student.train()
    crafted, keys = craft(student, clips, said, [bytes([i]) for i in range(20)])
    assert student.training
    assert len(crafted) == 10
    assert len(set(keys)) == 10
    student.eval()
    assert all(torch.equal(before[key], value) for key, value in student.net.state_dict().items())  # statistics too
    assert all(parameter.grad is None for parameter in student.parameters())
    assert (tmp_path / "crafted.png").is_file()


@pytest.mark.parametrize("short", [1, 20])  # the budget ends among the crafted clips, or among the real ones
def test_crafting_never_passes_the_budget_and_goes_on_from_there(short, demo_set, tmp_path):
    whole = small(swin_to_r21_prada, demo_set, tmp_path / "whole")
    swin_to_r21_prada.main(whole)
    budget = 2 * OWN - short
    cut = dataclasses.replace(whole, out_dir=str(tmp_path / "cut"), query_budget=budget)
    with pytest.raises(BudgetExhausted, match=f"{budget} of {budget} queries"):
        swin_to_r21_prada.main(cut)
    results = swin_to_r21_prada.main(dataclasses.replace(cut, query_budget=None))
    assert results["num_queries"] == 2 * OWN
    # A batch that was cut is answered in two parts, whose sums are rounded otherwise: all but the last bits are equal.
    students = [read_state(tmp_path / name / "student.safetensors") for name in ("whole", "cut")]
    assert all(torch.allclose(students[0][key], students[1][key], atol=1e-3) for key in students[0])


# --- the winning ticket --------------------------------------------------------------------------------------------


def test_pruning_takes_the_least_magnitudes_of_all_weights_together():
    weights = {"a": torch.tensor([[1.0, -5.0], [0.1, 3.0]]), "b": torch.tensor([[0.2, -0.3, 4.0, 2.0]])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks = pruning.prune_globally(weights, masks, 3 / 8)
    assert masks["a"].tolist() == [[True, True], [False, True]]
    assert masks["b"].tolist() == [[False, False, True, True]]
    weights["a"][1, 0] = 9.0  # what is gone stays gone, however large
    masks = pruning.prune_globally(weights, masks, 0.5)
    assert masks["a"].tolist() == [[False, True], [False, True]]
    assert pruning.count_sparsity(masks) == 0.5
    with pytest.raises(ValueError, match="less than what is pruned already"):
        pruning.prune_globally(weights, masks, 0.25)


def test_the_rounds_prune_a_share_of_what_is_left_and_end_on_the_target():
    assert pruning.schedule_sparsities(0.2, 0.5) == pytest.approx([0.2, 0.36, 0.488, 0.5])
    assert pruning.schedule_sparsities(0.5, 0.5) == [0.5]
    with pytest.raises(UserError, match="--target-sparsity 1"):
        pruning.schedule_sparsities(0.2, 1.0)


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

    def watch(net, masks, optimizer, real=pruning.hold):
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

    monkeypatch.setattr(swin_to_vit_ticket, "hold", watch)
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
    with pytest.raises(UserError, match="run that first"):
        swin_to_vit_finetune.main(dataclasses.replace(config, student_weights="nowhere.safetensors"))
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
