"""Queries made out of answered clips on the student, as PRADA (Juuti et al. 2019, arXiv 1805.02628) describes attackers' ways.

Each takes float (B, 3, T, H, W) clips in [0, 1] and returns such clips, none further than a bound from its seed in any
value. Only the student's gradients are used: the victim gives answers, never gradients.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.report import draw_clips

METHODS = ("random", "jbda", "t_rnd")


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
) -> Callable[[nn.Module, Tensor, Tensor, Sequence[bytes]], tuple[Tensor, list[bytes]]]:
    """What `distill` wants for `craft`: from each answered batch, crafts `share` of its clips, by `methods` in turn.

    Draws the first crafted clips beside their seeds into `sheet`.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"no crafting method is called {method!r}; there are {', '.join(METHODS)}")
    if not (methods and 0 < share <= 1 and 0 < step <= 1 and iterations >= 1):
        raise UserError("crafting needs a method, a share above 0 up to 1, a step above 0 up to 1 and at least one iteration")

    def craft(student: nn.Module, views: Tensor, targets: Tensor, keys: Sequence[bytes]) -> tuple[Tensor, list[bytes]]:
        seeds = views[: max(1, round(share * len(views)))]
        labels, training = targets[: len(seeds)].argmax(1), student.training
        student.eval()  # the norms' statistics are not the crafted clips' to move
        crafted, crafted_keys = torch.empty_like(seeds), [b""] * len(seeds)
        for number, method in enumerate(methods):
            own = list(range(number, len(seeds), len(methods)))
            if not own:
                continue
            chosen, named, names = seeds[own], labels[own], [b"%s|%s" % (keys[i], method.encode()) for i in own]
            if method == "random":
                crafted[own] = perturb_randomly(chosen, names, step)
            elif method == "jbda":
                crafted[own] = augment_by_jacobian(student, chosen, named, step)
            else:
                wanted = draw_targets(named, len(classes), names)
                crafted[own] = approach_targets(student, chosen, wanted, step, iterations)
            for i, name in zip(own, names, strict=True):
                crafted_keys[i] = hashlib.blake2b(name, digest_size=16).digest()
        student.train(training)
        if not sheet.exists():
            pairs = torch.stack([seeds[:6], crafted[:6]], dim=1).flatten(0, 1)
            captions = [c for i in range(len(pairs) // 2) for c in (f"seed: {classes[labels[i]]}", methods[i % len(methods)])]
            draw_clips(sheet, pairs, captions)
        return crafted, crafted_keys

    return craft
