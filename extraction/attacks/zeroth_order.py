"""Gradients estimated from function values alone, as MAZE and DFME need them of a victim that only answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from extraction import distributed


@torch.no_grad()
def estimate_gradient(
    loss_fn: Callable[[Tensor], Tensor],
    pre_activation: Tensor,
    num_directions: int,
    epsilon: float,
    generator: torch.Generator,
    num_clips: int | None = None,
) -> Tensor:
    """Estimate the gradient of each clip's own loss by forward differences along random unit directions.

    `loss_fn` maps (B, ...) to (B,), `pre_activation` is (B, ...) with d numbers a clip. Returns the shape of
    `pre_activation`: g = d/m * sum over m directions u of (L(x + epsilon u) - L(x)) / epsilon * u. Calls `loss_fn` 1 + m times.
    The estimate's mean is the gradient (as epsilon goes to 0), its cosine with it about sqrt(m/d). `num_clips` is the size of
    the whole batch where `pre_activation` is a process's share of one.
    """
    at = loss_fn(pre_activation)
    total = torch.zeros_like(pre_activation)
    rows = (-1, *[1] * (pre_activation.ndim - 1))
    shape = (num_clips or len(pre_activation), *pre_activation.shape[1:])
    for _ in range(num_directions):
        direction = torch.randn(shape, generator=generator, device=pre_activation.device, dtype=pre_activation.dtype)
        direction = direction if num_clips is None else distributed.shard(direction)
        direction /= direction.flatten(1).norm(dim=1).view(rows)
        slope = (loss_fn(pre_activation + epsilon * direction) - at) / epsilon
        total += slope.view(rows) * direction
    return total * (pre_activation[0].numel() / num_directions)
