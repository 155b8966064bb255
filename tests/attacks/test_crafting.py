"""Queries crafted on the student: bounds, directions, and what they leave alone."""

import pytest
import torch
from torch import nn

from extraction.attacks import crafting
from extraction.attacks.distill import AnsweredBatch
from extraction.students import create_student


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


def test_random_perturbation_is_deterministic_in_the_key(clips):
    keys = [bytes([i]) for i in range(20)]
    once, again = (crafting.perturb_randomly(clips, keys, 0.03) for _ in range(2))
    assert torch.equal(once, again)
    assert (once - clips).abs().max() <= 0.03 + 1e-6
    assert (once - clips).abs().mean() > 0.01
    assert not torch.equal(once, crafting.perturb_randomly(clips, keys[::-1], 0.03))


def test_crafting_leaves_the_student_alone_and_names_each_clip(student, clips, tmp_path):
    methods, classes = ("random", "jbda", "t_rnd"), [str(i) for i in range(12)]
    craft = crafting.create_crafter(methods, 0.5, 0.03, 2, tmp_path / "crafted.png", classes)
    before, targets = (
        {key: value.clone() for key, value in student.net.state_dict().items()},
        student(clips).softmax(1).detach(),
    )
    student.train()
    batch = AnsweredBatch(7, [bytes([i]) for i in range(20)], clips, torch.full((20,), -1), targets, [20], False)
    crafted, keys = craft(student, batch)
    assert student.training
    assert len(crafted) == 10
    assert len(set(keys)) == 10
    student.eval()
    assert all(torch.equal(before[key], value) for key, value in student.net.state_dict().items())  # statistics too
    assert all(parameter.grad is None for parameter in student.parameters())
    assert (tmp_path / "crafted.png").is_file()
