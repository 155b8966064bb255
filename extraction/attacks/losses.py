"""What students are trained to: the victim's answers as targets, and the losses against them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from extraction.errors import UserError


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


def choose_matching(
    matching: str, temperature: float, answers: str, decimals: int | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss against the victim's probabilities that an attack's options name: `kl_divergence`, at a temperature or not, or
    `match_logits`. Called with student logits and victim probabilities, both (B, num_classes).

    The logarithm of a probability that was rounded away is none: probabilities are clamped at half of the last decimal, and at
    1e-6 where nothing was rounded; of logits none is. `temperature` is that of the KL to probabilities, and changes nothing
    else: a label has one alone, which none softens. Raises UserError for logits that are to match a label.
    """
    if matching == "kl" and (temperature == 1.0 or answers == "label"):
        return kl_divergence
    if answers == "label":
        raise UserError("--answers label: it has no probabilities that --matching logits could match")
    floor = torch.finfo(torch.float32).tiny if answers == "logits" else 1e-6 if decimals is None else 0.5 * 10.0**-decimals
    if matching == "kl":
        return partial(soft_kl_divergence, temperature=temperature, floor=floor)
    return partial(match_logits, floor=floor)


def soft_kl_divergence(logits: Tensor, targets: Tensor, temperature: float, floor: float = 1e-6) -> Tensor:
    """t^2 KL(victim || student) at temperature t, mean over clips (Hinton et al. 2015, arXiv 1503.02531).

    Both sides are softmax(log-probabilities / t); `floor` is the least probability of the victim.
    """
    softened = (targets.clamp(min=floor).log() / temperature).softmax(1)
    return temperature**2 * kl_divergence(logits / temperature, softened)


def match_logits(logits: Tensor, targets: Tensor, floor: float = 1e-6) -> Tensor:
    """Half the mean squared difference of the student's logits and the victim's log-probabilities, each about its own mean.

    Matching logits (Ba & Caruana 2014, arXiv 1312.6184), which probabilities tell up to a constant a clip; it is what
    `soft_kl_divergence` tends to at high temperatures. `floor` is the least probability of the victim.
    """
    logs = targets.clamp(min=floor).log()
    return 0.5 * ((logits - logits.mean(1, keepdim=True)) - (logs - logs.mean(1, keepdim=True))).square().mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy to the true labels (B,) where there are any (-1: none), summed and divided by all clips, in nats.

    After mixup labels are float (B, num_classes): the share of each class in a clip, of those that have a label.
    """
    if labels.is_floating_point():
        return -(labels * logits.log_softmax(1)).sum() / len(logits)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(logits)


def kl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """MAZE's loss: KL(victim || student) of each clip, in nats, (B,)."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)


def l1_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """DFME's loss: mean absolute difference of each clip's logits, (B, num_classes) student's and victim's -> (B,)."""
    return (logits - targets).abs().mean(1)
