"""Attackers who know the defence: what they make of defended answers is nearer to the true ones, or leaves the lies out."""

import pytest
import torch

from extraction.audit.attackers import average_views, keep_agreeing, keep_sure, recover_noise, take_top1, undo
from extraction.victims.defences import DEFENCES, calibrate, draw, measure, noise

KEY = b"the owner's key" * 2


def draw_answers(count: int = 300, num_classes: int = 12) -> torch.Tensor:
    """As sure and as unsure as a victim may be."""
    rng = torch.Generator().manual_seed(5)
    sharpness = torch.exp(torch.empty(count, 1).uniform_(0.0, 3.0, generator=rng))
    return (sharpness * torch.randn(count, num_classes, generator=rng)).softmax(1)


@pytest.mark.parametrize(("name", "left"), [("reverse_sigmoid", 0.2), ("mad", 0.3), ("mad_argmax", 0.2), ("noise", 0.4)])
def test_recovery_undoes_most_of_a_known_defence(name, left):
    true = draw_answers()
    draws = draw(KEY, [b"%d" % k for k in range(len(true))])
    parameter, cost = calibrate(lambda x: DEFENCES[name].defend(true, draws, KEY, x), true, 0.3, DEFENCES[name].most)
    defended = DEFENCES[name].defend(true, draws, KEY, parameter)
    recovered = undo(name, parameter, defended)
    assert cost.l1 == pytest.approx(0.3, rel=0.01)
    assert measure(true, recovered).l1 < left * cost.l1
    assert torch.allclose(recovered.sum(1), torch.ones(len(true)))
    assert measure(true, take_top1(defended)).l1 > measure(true, recovered).l1


def test_noise_is_undone_exactly_where_one_class_alone_can_have_got_it():
    true = torch.tensor([[0.9, 0.05, 0.03, 0.02]])
    defended = noise(true, torch.tensor([[0, 1]]), 0.4)  # a fifth of it onto another class
    assert measure(true, defended).l1 == pytest.approx(0.4, abs=0.03)
    assert recover_noise(defended, 0.4) == pytest.approx(true, abs=1e-6)


def test_views_are_averaged_by_clip():
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert average_views(answers, [7, 3, 7]).tolist() == [[0.75, 0.25], [0.0, 1.0], [0.75, 0.25]]


def test_unsure_and_outvoted_answers_are_left_out():
    answers = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9]])
    assert keep_sure(answers, 0.8).tolist() == [True, False, True, True]
    assert keep_agreeing(answers, [0, 0, 0, 1]).tolist() == [True, True, False, True]
