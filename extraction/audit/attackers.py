"""Attackers who know what stands between them and a victim: what each makes of the answers it got, before it trains on them.

A defence is as good as its worst attacker. All of these know the defence and its parameter, none knows its key. They take
answered probabilities (N, num_classes) and return targets of the same shape, or which answers to keep.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from extraction.victims.defences import DEFENCES, draw

_COMPARED = 16  # greatest probabilities by which answers are looked up: the rest of many classes says little


def take_top1(answers: Tensor) -> Tensor:
    """The top class alone: what no defence that keeps it can spoil."""
    return torch.zeros_like(answers).scatter_(1, answers.argmax(1, keepdim=True), 1.0)


def average_views(answers: Tensor, clips: Sequence[int]) -> Tensor:
    """The mean answer to all views of a clip, for each of them; `clips` says of which clip each answer is."""
    _, place = torch.tensor(clips).unique(return_inverse=True)
    num_clips = int(place.max()) + 1 if len(place) else 0
    sums = torch.zeros(num_clips, answers.shape[1]).index_add_(0, place, answers)
    counts = torch.bincount(place, minlength=num_clips)[:, None]
    return (sums / counts)[place]


def keep_sure(answers: Tensor, threshold: float) -> Tensor:
    """Which answers to keep, bool (N,): those at least as sure as the threshold below which misinformation lies."""
    return answers.amax(1) >= threshold


def keep_agreeing(answers: Tensor, clips: Sequence[int]) -> Tensor:
    """Which answers to keep, bool (N,): those of the top class that most views of their clip have.

    A clip with one view is kept. Against a watermark, whose lies other views of the clip seldom share.
    """
    _, place = torch.tensor(clips).unique(return_inverse=True)
    votes = torch.zeros(int(place.max()) + 1, answers.shape[1])
    votes.index_put_((place, answers.argmax(1)), torch.ones(len(place)), accumulate=True)
    return votes[place, answers.argmax(1)] >= votes.amax(1)[place]


class Table(NamedTuple):
    """Simulated pairs of a true and a defended answer, each in descending order of the defended one."""

    true: Tensor  # (M, num_classes)
    defended: Tensor  # (M, min(num_classes, 16))


def simulate(defend: Callable[[Tensor, Tensor], Tensor], num_classes: int, count: int = 20_000, seed: int = 0) -> Table:
    """Pairs for `recover`: softmax of normal logits, as sharp as a victim may be, and `defend(probs, draws)` of them."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = torch.exp(torch.empty(count, 1).uniform_(0.0, 3.0, generator=rng))
    true = (sharpness * torch.randn(count, num_classes, generator=rng)).softmax(1)
    defended = defend(true, draw(b"an attacker's own key", [b"%d" % number for number in range(count)]))
    order = defended.argsort(1, descending=True)
    return Table(true.gather(1, order), defended.gather(1, order)[:, :_COMPARED])


def recover(answers: Tensor, table: Table, neighbours: int = 8) -> Tensor:
    """The mean of the true answers whose defended ones are nearest to each of `answers`: partial Bayes of Tang et al. (2024).

    They take all within L1 0.01; here the nearest few, so that none is left without. Defences treat all classes alike, so that
    answers are compared in descending order, which takes far fewer pairs. The top class stays.
    """
    order = answers.argsort(1, descending=True)
    wanted = answers.gather(1, order)[:, :_COMPARED]
    found = torch.empty_like(answers)
    for rows in torch.arange(len(answers)).split(64):
        nearest = torch.cdist(wanted[rows], table.defended, p=1).topk(neighbours, dim=1, largest=False).indices
        found[rows] = table.true[nearest].mean(1)
    recovered = torch.zeros_like(answers).scatter_(1, order, found)
    return recovered / recovered.sum(1, keepdim=True).clamp(min=1e-12)


def recover_noise(answers: Tensor, epsilon: float) -> Tensor:
    """Keyed noise undone: of the classes that may have got epsilon / 2, that which would have the least without it.

    A closed form where there is one such class; else the table's average is no better.
    """
    spike = epsilon / 2
    rest = answers - spike
    top = answers.argmax(1, keepdim=True)
    candidates = torch.where(rest >= -1e-6, rest, torch.inf).scatter(1, top, torch.inf)
    least = candidates.min(1, keepdim=True)
    cleaned = answers.scatter_add(1, least.indices, torch.where(least.values.isfinite(), -spike, 0.0)).clamp(min=0)
    return cleaned / cleaned.sum(1, keepdim=True).clamp(min=1e-12)


def undo(name: str, parameter: float, answers: Tensor) -> Tensor:
    """The true probabilities as an attacker recovers them who knows the defence and its parameter, not its key."""
    if name == "noise":
        return recover_noise(answers, parameter)

    def defend(probs: Tensor, draws: Tensor) -> Tensor:
        return DEFENCES[name].defend(probs, draws, b"an attacker's own key", parameter)

    return recover(answers, simulate(defend, answers.shape[1]))
