"""Students of an audit: trained on recorded answers, scored on held-out clips. One short job each."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from extraction.attacks.losses import cross_entropy, kl_divergence
from extraction.audit.recording import Views
from extraction.errors import UserError
from extraction.students import Student


class Recipe(NamedTuple):
    """How every student of an audit is trained: all alike, whatever its budget, so that answers alone make the difference."""

    num_clips: int  # clips that a student sees, again and again those it has
    head_lr: float
    body_lr: float
    label_weight: float  # of the cross-entropy to true labels, where there are any


def train_student(
    create: Callable[[], Student],
    views: Views,
    chosen: Sequence[int],
    targets: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    desc: str,
) -> Student:
    """A student of the views `chosen`: KL to `targets` (N, num_classes), cross-entropy to `labels` (N,), -1 without one.

    The recipe of grey_box/swin_to_r21_kd.py. A row of zeros in `targets` is no answer: that view is learnt from its label
    alone. Deterministic in the seed on a CPU. Raises UserError when the loss is not finite.
    """
    torch.manual_seed(seed)
    student = create().train()
    optimizer = torch.optim.AdamW(student.parameter_groups(recipe.head_lr, recipe.body_lr), fused=True)
    schedule = ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    order = torch.Generator().manual_seed(seed)
    size = min(views.batch_size, len(chosen))
    batches: list[list[int]] = []
    while len(batches) * size < recipe.num_clips:
        shuffled = torch.randperm(len(chosen), generator=order).tolist()
        batches += [shuffled[i : i + size] for i in range(0, len(chosen) - size + 1, size)]
    batches = batches[: max(1, recipe.num_clips // size)]
    place, answered = {view: k for k, view in enumerate(chosen)}, targets.sum(1) > 0
    losses: deque[float] = deque(maxlen=100)
    # A GPU is waited for once an epoch alone; on a CPU reading is free.
    unread: list[Tensor] = []
    per_read = 1 if views.device.type == "cpu" else max(1, len(chosen) // size)

    def read_losses() -> None:
        for value in torch.stack(unread).tolist() if unread else []:
            if not math.isfinite(value):
                raise UserError(f"{desc}: the loss became {value}; lower --head-lr and --body-lr")
            losses.append(value)
            schedule.step(sum(losses) / len(losses))
        unread.clear()

    with tqdm(total=len(batches), desc=desc, unit="step", leave=False, dynamic_ncols=True) as bar:
        for found, clips in views.load([[chosen[k] for k in batch] for batch in batches]):
            rows = torch.tensor([place[view] for view in found])
            logits = student(clips)
            told = answered[rows]
            loss = recipe.label_weight * cross_entropy(logits, labels[rows].to(views.device))
            if told.any():
                loss = loss + kl_divergence(logits[told], targets[rows][told].to(views.device)) * told.float().mean().item()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            unread.append(loss.detach())
            if len(unread) == per_read:
                read_losses()
            bar.update()
    read_losses()
    return student.eval()
