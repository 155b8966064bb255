"""Students of an audit: trained on recorded answers, scored on held-out clips. One short job each."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from extraction.attacks.losses import cross_entropy, kl_divergence
from extraction.attacks.recipe import NUM_DRAWS, AveragedWeights, crop_and_erase, seed_step
from extraction.audit.recording import Views
from extraction.errors import UserError
from extraction.students import Student
from extraction.weights import read_checkpoint, write_atomically


class Recipe(NamedTuple):
    """How every student of an audit is trained: all alike, whatever its budget, so that answers alone make the difference."""

    num_clips: int  # clips that a student sees, again and again those it has
    head_lr: float
    body_lr: float
    label_weight: float  # of the cross-entropy to true labels, where there are any
    ema: float = 0.98  # decay a step of the averaged weights, which are the student
    crop: float = 0.2  # it is shown random crops of the views, a side up to this fraction shorter


class Checkpoints(NamedTuple):
    """Where a student that is being trained is kept, and how often."""

    path: Path
    seconds: float  # between two
    stop_asked: Callable[[], bool]  # whether to save and stop


def train_student(
    create: Callable[[], Student],
    views: Views,
    chosen: Sequence[int],
    targets: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    desc: str,
    checkpoints: Checkpoints,
) -> Student:
    """A student of the views `chosen`: KL to `targets` (N, num_classes), cross-entropy to `labels` (N,), -1 without one.

    The recipe of grey_box/swin_to_r21_kd.py with crops and averaged weights (docs/recipe.md): so short a training ends less far
    from where it leads, and less by chance. Half of each batch has a label, where there are both kinds of views: what is known
    of the task itself is not drowned in unrelated video. A row of zeros in `targets` is no answer: that view is learnt from its
    label alone. Deterministic in the seed on a CPU, wherever it was interrupted: it goes on from its checkpoint.

    Raises UserError when the loss is not finite, or the checkpoint is another student's, KeyboardInterrupt when it is asked to
    stop.
    """
    torch.manual_seed(seed)
    student = create().train()
    optimizer = torch.optim.AdamW(student.parameter_groups(recipe.head_lr, recipe.body_lr), fused=True)
    schedule = ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    average = AveragedWeights(student.net, recipe.ema)
    batches = draw_batches(labels, views.batch_size, recipe.num_clips, seed)
    place, answered = {view: k for k, view in enumerate(chosen)}, targets.sum(1) > 0
    losses: deque[float] = deque(maxlen=100)
    parts: dict[str, Any] = dict(student=student.net, optimizer=optimizer, schedule=schedule, average=average)
    done = _resume(checkpoints.path, parts, losses, views.device)
    saved = time.monotonic()
    # A GPU is waited for once an epoch alone; on a CPU reading is free.
    unread: list[Tensor] = []
    per_read = 1 if views.device.type == "cpu" else max(1, len(chosen) // views.batch_size)

    def read_losses() -> None:
        for value in torch.stack(unread).tolist() if unread else []:
            if not math.isfinite(value):
                raise UserError(f"{desc}: the loss became {value}; lower --head-lr and --body-lr")
            losses.append(value)
            schedule.step(sum(losses) / len(losses))
        unread.clear()

    wanted = [[chosen[k] for k in batch] for batch in batches]
    with tqdm(total=len(batches), initial=done, desc=desc, unit="step", leave=False, dynamic_ncols=True) as bar:
        for found, clips in views.load(wanted[done:]):
            while found[0] not in wanted[done]:  # a batch of which nothing can be decoded
                done += 1
            done += 1
            rows = torch.tensor([place[view] for view in found])
            uniform = seed_step(seed, done).random((len(clips), NUM_DRAWS))
            logits = student(crop_and_erase(clips, uniform, recipe.crop, 0.0))
            told = answered[rows]
            loss = recipe.label_weight * cross_entropy(logits, labels[rows].to(views.device))
            if told.any():
                loss = loss + kl_divergence(logits[told], targets[rows][told].to(views.device)) * told.float().mean().item()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update(done - 1)
            unread.append(loss.detach())
            if len(unread) == per_read:
                read_losses()
            bar.update()
            stop = checkpoints.stop_asked()
            if stop or time.monotonic() - saved >= checkpoints.seconds:
                read_losses()
                _save(checkpoints.path, parts, losses, done, views.device)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt(f"{desc}: saved; run the same command again to continue")
    read_losses()
    student.net.load_state_dict(average.state)
    return student.eval()


def draw_batches(labels: Tensor, batch_size: int, num_clips: int, seed: int) -> list[list[int]]:
    """Batches of places in `labels` (N,), as many as `num_clips` fill, half of each with a label (-1: without), if both exist.

    Each kind comes in an order of its own, drawn anew when all of it has come.
    """
    order = torch.Generator().manual_seed(seed)
    kinds = [kind for kind in ((labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]) if len(kind)]
    size = min(batch_size, len(labels))
    count = max(1, num_clips // size)
    columns = []
    for kind, width in zip(kinds, (size,) if len(kinds) == 1 else (size // 2, size - size // 2), strict=True):
        rounds = max(1, -(-count * width // len(kind)))
        places = torch.cat([kind[torch.randperm(len(kind), generator=order)] for _ in range(rounds)])
        columns.append(places[: count * width].view(count, width))
    return torch.cat(columns, 1).tolist()


def _save(path: Path, parts: dict[str, Any], losses: deque[float], done: int, device: torch.device) -> None:
    drawn = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]  # dropout's
    state = {name: part.state_dict() for name, part in parts.items()} | dict(losses=list(losses), done=done, drawn=drawn)
    write_atomically(path, lambda file: torch.save(state, file))


def _resume(path: Path, parts: dict[str, Any], losses: deque[float], device: torch.device) -> int:
    """Load a checkpoint, if there is one. Returns the number of batches that are done."""
    if not path.exists():
        return 0
    state = read_checkpoint(path)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses.extend(state["losses"])
        torch.set_rng_state(state["drawn"][0])
        if device.type == "cuda" and len(state["drawn"]) > 1:
            torch.cuda.set_rng_state(state["drawn"][1], device)
        return int(state["done"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:120]
        raise UserError(f"{path}: not the checkpoint of this student ({line}); remove it to train it from the start") from None
