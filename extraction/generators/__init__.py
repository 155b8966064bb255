"""Generators of clips for attackers without data. Each maps noise and a class to a pre-activation, and that to a clip.

    pre_activation = generator(noise, labels)   # float (B, noise_dim), int64 (B,) -> float (B, ...)
    clips = generator.render(pre_activation)    # float (B, 3, T, H, W) in [0, 1]

The two are apart because zeroth-order attacks perturb between them. In `DVDGenerator` and `DeconvGenerator` the
pre-activation is the clip before its sigmoid, as published; in `LayeredGenerator` it is 307 numbers.

Attacks keep a generator in training mode: batch normalisation then uses the batch's own statistics, so that clips of a
batch influence each other through these. In evaluation mode clip b is a function of noise b and label b alone.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from extraction.errors import UserError
from extraction.generators.deconv import DeconvGenerator
from extraction.generators.dvdgan import DVDGenerator
from extraction.generators.layered import LayeredGenerator


class NoiseGenerator(nn.Module):
    """No generator at all: every pixel of every frame drawn from a normal distribution around grey, clipped to [0, 1]."""

    def __init__(self, num_classes: int, num_frames: int, size: int, std: float = 0.25):
        super().__init__()
        self.noise_dim, self.shape, self.std = 3 * num_frames * size**2, (3, num_frames, size, size), std

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return noise.unflatten(1, self.shape)

    def render(self, pre_activation: Tensor) -> Tensor:
        return (0.5 + self.std * pre_activation).clamp(0.0, 1.0)


GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "dvdgan": DVDGenerator,
    "dvdgan_small": partial(DVDGenerator, width=8, noise_dim=32),
    "deconv": DeconvGenerator,
    "deconv_small": partial(DeconvGenerator, width=8, noise_dim=32),
    "layered": LayeredGenerator,
    "noise": NoiseGenerator,
}


def create_generator(name: str, num_classes: int, num_frames: int, size: int) -> nn.Module:
    """A fresh generator of `num_frames` frames of `size` x `size`. Raises UserError for an unknown name or an odd size."""
    if name not in GENERATORS:
        raise UserError(f"no generator is called {name!r}; there are {', '.join(GENERATORS)}")
    return GENERATORS[name](num_classes, num_frames, size)
