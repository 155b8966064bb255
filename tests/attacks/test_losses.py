"""Targets and losses against their formulas."""

import math

import torch

from extraction.attacks.losses import answers_to_logits, answers_to_targets, cross_entropy, kl_divergence, kl_loss, l1_loss


def test_targets_of_each_answer_type():
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
    torch.testing.assert_close(kl_divergence(logits, targets) + 10 * cross_entropy(logits, labels), (kl + 10 * ce).mean())
    torch.testing.assert_close(cross_entropy(logits, labels), ce.mean())
    assert kl_divergence(targets.log(), targets).abs() < 1e-6


def test_losses_are_per_clip():
    torch.manual_seed(0)
    logits, probs = torch.randn(4, 6), torch.randn(4, 6).softmax(1)
    kl = (probs * (probs.log() - logits.softmax(1).log())).sum(1)
    torch.testing.assert_close(kl_loss(logits, probs), kl)
    torch.testing.assert_close(l1_loss(logits, probs), (logits - probs).abs().sum(1) / 6)


def test_logits_are_recovered_up_to_their_mean():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 6)
    recovered = answers_to_logits(logits.softmax(1), "probs", 6)
    torch.testing.assert_close(recovered, logits - logits.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert answers_to_logits(logits, "logits", 6) is logits
    assert answers_to_logits(torch.tensor([[1.0, 0.0]]), "probs", 2).isfinite().all()
