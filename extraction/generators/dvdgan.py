"""A class-conditional video generator after DVD-GAN (Clark et al. 2019, arXiv 1907.06571)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from extraction.errors import UserError


def count_halvings(size: int) -> int:
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
        ups = count_halvings(size)
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
