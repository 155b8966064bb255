"""What students are trained to: the victim's answers as targets, and the losses against them."""

import torch.nn.functional as F
from torch import Tensor


def answers_to_targets(answers: Tensor, answer_type: str, num_classes: int) -> Tensor:
    """The distribution (B, num_classes) that an answer stands for.

    A label stands for all of the probability on it; after a top five the rest is shared evenly among the other classes.
    """
    if answer_type == "label":
        return F.one_hot(answers, num_classes).float()
    if answer_type == "logits":
        return answers.softmax(1)
    if answer_type == "top5" and num_classes > 5:
        hidden = answers == 0
        rest = (1.0 - answers.sum(1, keepdim=True)).clamp(min=0.0)
        answers = answers + hidden * rest / hidden.sum(1, keepdim=True).clamp(min=1)
    return answers / answers.sum(1, keepdim=True).clamp(min=1e-12)  # rounding may have taken the sum off 1


def answers_to_logits(answers: Tensor, answer_type: str, num_classes: int) -> Tensor:
    """The victim's logits (B, num_classes): its own, or recovered from `probs` as log p - mean(log p) (DFME)."""
    if answer_type == "logits":
        return answers
    logs = answers.clamp(min=1e-12).log()
    return logs - logs.mean(1, keepdim=True)


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(victim || student), mean over clips, in nats: student logits and victim probabilities, both (B, num_classes)."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy to the true labels (B,) where there are any (-1: none), summed and divided by all clips, in nats."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(logits)


def kl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """MAZE's loss: KL(victim || student) of each clip, in nats, (B,)."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)


def l1_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """DFME's loss: mean absolute difference of each clip's logits, (B, num_classes) student's and victim's -> (B,)."""
    return (logits - targets).abs().mean(1)
