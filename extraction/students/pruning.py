"""Iterative magnitude pruning with rewinding: the search for a winning ticket (Frankle & Carbin 2019, arXiv 1803.03635)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from extraction.errors import UserError

Masks = dict[str, Tensor]  # name of a weight -> bool of its shape: what survives


def create_masks(net: nn.Module, head: str) -> Masks:
    """Masks that keep everything, for all weight matrices and kernels of `net` but those of its module `head`.

    Biases and norms are few and stay; the head is left alone, as its few weights each belong to one class.
    """
    names = [name for name, weight in net.named_parameters() if weight.ndim > 1 and not name.startswith(head + ".")]
    state = net.state_dict()
    return {name: torch.ones_like(state[name], dtype=torch.bool) for name in names}


def count_sparsity(masks: Masks) -> float:
    """The share of weights that are pruned, of all that masks cover."""
    return 1.0 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def prune_globally(trained: Mapping[str, Tensor], masks: Masks, sparsity: float) -> Masks:
    """Prune the least magnitudes among the survivors of all `masks` together, until `sparsity` of the weights is gone.

    `trained` holds the weights to judge by. What is pruned stays pruned. Exact to one weight, ties broken by position.
    """
    covered = sum(mask.numel() for mask in masks.values())
    keep = covered - round(sparsity * covered)
    # -1 for what is gone already, below every magnitude.
    ranks = torch.cat([torch.where(mask, trained[name].abs(), -1.0).flatten() for name, mask in masks.items()])
    if keep > int((ranks >= 0).sum()):
        raise ValueError(f"a sparsity of {sparsity} is less than what is pruned already")
    kept = torch.zeros_like(ranks, dtype=torch.bool)
    kept[ranks.sort(descending=True, stable=True).indices[:keep]] = True
    parts = kept.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def schedule_sparsities(fraction: float, target: float) -> list[float]:
    """The sparsity after each round that prunes `fraction` of what is left, ending at `target` exactly.

    Raises UserError when either is not between 0 and 1.
    """
    if not (0 < fraction < 1 and 0 < target < 1):
        raise UserError(f"--round-fraction {fraction} and --target-sparsity {target}: both must lie between 0 and 1")
    sparsities = []
    left = 1.0 - fraction
    while 1.0 - left < target:
        sparsities.append(1.0 - left)
        left *= 1.0 - fraction
    return [*sparsities, target]


@torch.no_grad()
def keep_masked(net: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
    """Set the pruned weights of `net` to zero, now and after every step of `optimizer`."""
    weights = dict(net.named_parameters())
    masks = {name: mask.to(weights[name].device) for name, mask in masks.items()}

    @torch.no_grad()
    def apply(*_: object) -> None:
        for name, mask in masks.items():
            weights[name].mul_(mask)

    apply()
    optimizer.register_step_post_hook(apply)
