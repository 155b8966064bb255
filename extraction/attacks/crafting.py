"""Queries made out of answered clips on the student, as PRADA (Juuti et al. 2019, arXiv 1805.02628) describes attackers' ways.

Each takes float (B, 3, T, H, W) clips in [0, 1] and returns such clips, none further than a bound from its seed in any
value. Only the student's gradients are used: the victim gives answers, never gradients.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from extraction.attacks.distill import AnsweredBatch
from extraction.errors import UserError
from extraction.evaluation.plots import draw_clips


def perturb_randomly(clips: Tensor, keys: Sequence[bytes], step: float) -> Tensor:
    """Move every value of every frame by a uniform draw from -step to step, as `keys` seed it."""
    noise = torch.stack([torch.rand(clip.shape, generator=_generator(key)) for clip, key in zip(clips, keys, strict=True)])
    return (clips + step * (2.0 * noise.to(clips.device) - 1.0)).clamp(0.0, 1.0)


def augment_by_jacobian(student: nn.Module, clips: Tensor, labels: Tensor, step: float) -> Tensor:
    """Jacobian-based augmentation: x + step * sign(dF_c/dx), F the student's logits, c the victim's label (B,)."""
    gradient = _gradient(lambda x: student(x).gather(1, labels[:, None]), clips)
    return (clips + step * gradient.sign()).clamp(0.0, 1.0)


def approach_targets(student: nn.Module, clips: Tensor, targets: Tensor, step: float, iterations: int) -> Tensor:
    """T-RND: `iterations` signed gradient steps that raise the student's probability of the class `targets` (B,).

    Together they move no value by more than `step`.
    """
    crafted = clips
    for _ in range(iterations):
        gradient = _gradient(lambda x: student(x).log_softmax(1).gather(1, targets[:, None]), crafted)
        crafted = (crafted + step / iterations * gradient.sign()).clamp(0.0, 1.0)
    return crafted


def draw_targets(labels: Tensor, num_classes: int, keys: Sequence[bytes]) -> Tensor:
    """A class for each clip that is not its label (B,), as `keys` seed it."""
    shifts = [torch.randint(1, num_classes, (), generator=_generator(key)) for key in keys]
    return (labels + torch.stack(shifts).to(labels.device)) % num_classes


def _generator(key: bytes) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))


def _gradient(value: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
    clips = clips.detach().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(value(clips).sum(), clips)[0]


def create_crafter(
    methods: Sequence[str], share: float, step: float, iterations: int, sheet: Path, classes: Sequence[str]
) -> Callable[[nn.Module, AnsweredBatch], tuple[Tensor, list[bytes]]]:
    """`craft(student, batch) -> clips, keys`: further queries from `share` of a batch's clips, by `methods` in turn.

    The keys name the crafted clips, which are new in every step. The first of them are drawn beside their seeds into `sheet`.
    """
    if not (methods and share > 0 and step > 0):
        raise UserError("crafting needs a method, a share above 0 and a step above 0")

    def craft(student: nn.Module, batch: AnsweredBatch) -> tuple[Tensor, list[bytes]]:
        seeds = batch.clips[: max(1, round(share * len(batch.clips)))]
        labels, training = batch.targets[: len(seeds)].argmax(1), student.training
        student.eval()  # the norms' statistics are not the crafted clips' to move
        crafted, crafted_keys = torch.empty_like(seeds), [b""] * len(seeds)
        for number, method in enumerate(methods):
            own = list(range(number, len(seeds), len(methods)))
            if not own:
                continue
            keys = [b"%s|%d|%s" % (batch.keys[i], batch.number, method.encode()) for i in own]
            if method == "random":
                crafted[own] = perturb_randomly(seeds[own], keys, step)
            elif method == "jbda":
                crafted[own] = augment_by_jacobian(student, seeds[own], labels[own], step)
            else:
                wanted = draw_targets(labels[own], len(classes), keys)
                crafted[own] = approach_targets(student, seeds[own], wanted, step, iterations)
            for i, key in zip(own, keys, strict=True):
                crafted_keys[i] = hashlib.blake2b(key, digest_size=16).digest()
        student.train(training)
        if not sheet.exists():
            pairs = torch.stack([seeds[:6], crafted[:6]], dim=1).flatten(0, 1)
            captions = [
                c for i in range(len(pairs) // 2) for c in (f"seed: {classes[int(labels[i])]}", methods[i % len(methods)])
            ]
            draw_clips(sheet, pairs, captions)
        return crafted, crafted_keys

    return craft
