"""Generators of clips for attackers without data. Each maps noise and a class to a pre-activation, and that to a clip.

    pre_activation = generator(noise, labels)   # float (B, noise_dim), int64 (B,) -> float (B, ...)
    clips = generator.render(pre_activation)    # float (B, 3, T, H, W) in [0, 1]

The two are apart because zeroth-order attacks perturb between them. In `DVDGenerator` and `DeconvGenerator` the
pre-activation is the clip before its sigmoid, as published; in `LayeredGenerator` it is 307 numbers.

Attacks keep a generator in training mode: batch normalisation then uses the batch's own statistics, so that clips of a
batch influence each other through these. In evaluation mode clip b is a function of noise b and label b alone.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from extraction.errors import UserError


def _halvings(size: int) -> int:
    """How often frames of `size` are halved down to a base of 3 to 8 pixels. Raises UserError when they can't be."""
    count = 0
    while size % 2 == 0 and size > 4:
        size, count = size // 2, count + 1
    if size > 8 or count == 0:
        raise UserError("--size of generated clips must be 3 to 8 times a power of two: 48, 64, 112, 224, ...")
    return count


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation of (B*T, C, H, W) frames, scaled and shifted by their clip's (B, D) condition."""

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.shift = (nn.Linear(condition_dim, channels, bias=False) for _ in range(2))
        for linear in (self.gain, self.shift):
            nn.init.normal_(linear.weight, std=0.1 * condition_dim**-0.5)

    def forward(self, frames: Tensor, condition: Tensor) -> Tensor:
        per_clip = len(frames) // len(condition)
        gain, shift = (f(condition).repeat_interleave(per_clip, 0)[..., None, None] for f in (self.gain, self.shift))
        return self.norm(frames) * (1 + gain) + shift


class ConvGRU(nn.Module):
    """A convolutional gated recurrent unit (Ballas et al. 2016, arXiv 1511.06432): (B, T, C, H, W) -> the same, causal in T."""

    def __init__(self, channels: int):
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        state, states = torch.zeros_like(inputs[:, 0]), []
        for frame in inputs.unbind(1):
            reset, update = self.gates(torch.cat([frame, state], 1)).sigmoid().chunk(2, 1)
            new = self.candidate(torch.cat([frame, reset * state], 1)).tanh()
            state = (1 - update) * state + update * new
            states.append(state)
        return torch.stack(states, 1)


class UpBlock(nn.Module):
    """A residual block on (B*T, C, H, W) frames that doubles their height and width."""

    def __init__(self, channels_in: int, channels_out: int, condition_dim: int):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(channels_in, condition_dim)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = ConditionalBatchNorm(channels_out, condition_dim)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, frames: Tensor, condition: Tensor) -> Tensor:
        hidden = F.interpolate(F.relu(self.norm1(frames, condition)), scale_factor=2.0)
        hidden = self.conv2(F.relu(self.norm2(self.conv1(hidden), condition)))
        return hidden + F.interpolate(self.shortcut(frames), scale_factor=2.0)


class DVDGenerator(nn.Module):
    """A class-conditional generator after DVD-GAN (Clark et al. 2019, arXiv 1907.06571).

    Class embedding and noise make a coarse map and a code for each frame; ConvGRUs carry them through time in the first
    two stages; residual blocks with conditional batch normalisation enlarge every frame. The output layer has spectral
    norm, and a learned gain beside it for the contrast. `width` multiplies the channels: 64 for 16x112x112 or 32x224x224
    clips, 8 for 16x48x48.
    """

    def __init__(self, num_classes: int, num_frames: int, size: int, width: int = 64, noise_dim: int = 120):
        super().__init__()
        ups = _halvings(size)
        self.noise_dim, self.num_frames, self.base = noise_dim, num_frames, size >> ups
        channels = [width * min(8, 2 ** (ups - k)) for k in range(ups + 1)]  # 8, ..., 8, 4, 2, 1 times the width
        condition_dim = 2 * noise_dim
        self.embedding = nn.Embedding(num_classes, noise_dim)
        self.first = nn.Linear(condition_dim, channels[0] * self.base**2)
        self.per_frame = nn.Linear(condition_dim, num_frames * channels[0])
        self.grus = nn.ModuleList(ConvGRU(c) for c in channels[:2])
        self.blocks = nn.ModuleList(UpBlock(a, b, condition_dim) for a, b in itertools.pairwise(channels))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.last = spectral_norm(nn.Conv2d(channels[-1], 3, 3, padding=1))
        self.gain = nn.Parameter(torch.tensor(4.0))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        batch, length = len(noise), self.num_frames
        condition = torch.cat([noise, self.embedding(labels)], 1)
        still = self.first(condition).view(batch, 1, -1, self.base, self.base)
        frames = still + self.per_frame(condition).view(batch, length, -1, 1, 1)
        for number, block in enumerate(self.blocks):
            if number < len(self.grus):
                frames = self.grus[number](frames)
            frames = block(frames.flatten(0, 1), condition).unflatten(0, (batch, length))
        frames = self.gain * self.last(F.relu(self.norm(frames.flatten(0, 1))))
        return frames.unflatten(0, (batch, length)).transpose(1, 2)  # (B, 3, T, H, W)

    def render(self, pre_activation: Tensor) -> Tensor:
        return pre_activation.sigmoid()


class DeconvGenerator(nn.Module):
    """Class embedding and noise through transposed 3D convolutions, as in VGAN (Vondrick et al. 2016, arXiv 1609.02612)."""

    def __init__(self, num_classes: int, num_frames: int, size: int, width: int = 64, noise_dim: int = 120):
        super().__init__()
        ups, time_ups = _halvings(size), 0
        while time_ups < ups and num_frames % 2 ** (time_ups + 1) == 0 and num_frames >> (time_ups + 1) > 1:
            time_ups += 1
        channels = [width * min(8, 2 ** (ups - k)) for k in range(ups + 1)]
        self.noise_dim, self.shape = noise_dim, (channels[0], num_frames >> time_ups, size >> ups, size >> ups)
        self.embedding = nn.Embedding(num_classes, noise_dim)
        self.first = nn.Linear(2 * noise_dim, channels[0] * self.shape[1] * self.shape[2] ** 2)
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise(channels)):
            time = (4, 2, 1) if number < time_ups else (3, 1, 1)
            kernel, stride, padding = ((t, s, s) for t, s in zip(time, (4, 2, 1), strict=True))
            layers += [nn.BatchNorm3d(a), nn.ReLU(), nn.ConvTranspose3d(a, b, kernel, stride, padding, bias=False)]
        layers += [nn.BatchNorm3d(channels[-1]), nn.ReLU(), nn.Conv3d(channels[-1], 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:  # PyTorch's own beginning makes clips of hardly any contrast
            if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
                reached = layer.in_channels * torch.Size(layer.kernel_size).numel() / torch.Size(layer.stride).numel()
                nn.init.normal_(layer.weight, std=(2 / reached) ** 0.5)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        condition = torch.cat([noise, self.embedding(labels)], 1)
        return self.layers(self.first(condition).unflatten(1, self.shape))  # (B, 3, T, H, W)

    def render(self, pre_activation: Tensor) -> Tensor:
        return pre_activation.sigmoid()


class LayeredGenerator(nn.Module):
    """A patch that a smooth flow carries over a still picture: foreground, mask and background as in VGAN, few numbers.

    Its pre-activation (B, D) holds coarse pictures of `grid` x `grid`, a coarser mask, and velocities on 2x2 points at
    `knots` moments, which is enough for straight ways, turns, growth and swings; `render` enlarges, integrates and warps.
    Zeroth-order estimates see far more in D = 307 directions than in all the pixels of a clip. That something moves in
    front of something else is all that it knows of video.
    """

    def __init__(
        self, num_classes: int, num_frames: int, size: int, width: int = 64, noise_dim: int = 64, grid: int = 8, knots: int = 3
    ):
        super().__init__()
        self.noise_dim, self.num_frames, self.size = noise_dim, num_frames, size
        self.shapes = [(3, grid, grid), (3, grid // 2 + 1, grid // 2 + 1), (1, grid // 2, grid // 2), (2, knots, 2, 2)]
        self.embedding = nn.Embedding(num_classes, noise_dim)
        self.hidden = nn.Linear(2 * noise_dim, 4 * width)
        self.heads = nn.ModuleList(nn.Linear(4 * width, torch.Size(shape).numel()) for shape in self.shapes)
        nn.init.normal_(self.hidden.weight, std=2 * (2 * noise_dim) ** -0.5)
        # Varied from the start: two pictures of good contrast, a mask that hides some 3/4, a way of half a frame.
        for head, scale, shift in zip(self.heads, (1.5, 1.5, 4.0, 1.0), (0.0, 0.0, -3.0, 0.0), strict=True):
            nn.init.normal_(head.weight, std=scale * (4 * width) ** -0.5)
            nn.init.constant_(head.bias, shift)
        # From velocities at the knots, in half frames per frame, to shifts that count from the middle of the clip's time.
        velocities = (
            F.interpolate(torch.eye(knots)[None], num_frames, mode="linear", align_corners=True)[0].T * 1.28 / num_frames
        )
        shifts = velocities.cumsum(0)
        self.register_buffer("over_time", shifts - shifts.mean(0), persistent=False)  # (T, knots)
        rest = F.affine_grid(torch.eye(2, 3)[None], [1, 3, size, size], align_corners=False)
        self.register_buffer("rest", rest, persistent=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([noise, self.embedding(labels)], 1)).tanh()  # odd: clips share no mean
        return torch.cat([head(hidden) for head in self.heads], 1)

    def render(self, pre_activation: Tensor) -> Tensor:
        parts = pre_activation.split([torch.Size(shape).numel() for shape in self.shapes], 1)
        front, back, mask, velocity = (part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))
        batch, length, size = len(front), self.num_frames, self.size
        ways = _enlarge(velocity.transpose(1, 2).flatten(0, 1), size)  # at the knots, before they are spread over time
        ways = ways.view(batch, -1, 2, size * size).transpose(2, 3).flatten(2)
        where = self.rest - (self.over_time @ ways).view(batch, length, size, size, 2)
        still = torch.cat([_enlarge(front, size), _enlarge(mask, size)], 1)
        moved = F.grid_sample(still, where.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False)
        moved = moved.view(batch, 4, length, size, size)
        cover = moved[:, 3:].sigmoid()
        return (cover * moved[:, :3] + (1 - cover) * _enlarge(back, size)[:, :, None]).sigmoid()


def _enlarge(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, (size, size), mode="bicubic", align_corners=False)


class NoiseGenerator(nn.Module):
    """No generator at all: every pixel of every frame drawn from a normal distribution around grey, clipped to [0, 1]."""

    def __init__(self, num_classes: int, num_frames: int, size: int, std: float = 0.25):
        super().__init__()
        self.noise_dim, self.shape, self.std = 3 * num_frames * size**2, (3, num_frames, size, size), std

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return noise.unflatten(1, self.shape)

    def render(self, pre_activation: Tensor) -> Tensor:
        return (0.5 + self.std * pre_activation).clamp(0.0, 1.0)


GENERATORS = {
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
