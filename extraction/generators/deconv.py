"""A generator of transposed 3D convolutions, as in VGAN (Vondrick et al. 2016, arXiv 1609.02612)."""

import itertools

import torch
from torch import Tensor, nn

from extraction.generators.dvdgan import count_halvings


class DeconvGenerator(nn.Module):
    """Class embedding and noise through transposed 3D convolutions, as in VGAN (Vondrick et al. 2016, arXiv 1609.02612)."""

    def __init__(self, num_classes: int, num_frames: int, size: int, width: int = 64, noise_dim: int = 120):
        super().__init__()
        ups, time_ups = count_halvings(size), 0
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
