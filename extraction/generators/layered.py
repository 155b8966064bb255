"""A generator of few numbers: a patch that moves before a background."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayeredGenerator(nn.Module):
    """A patch that a smooth flow carries over a still picture: foreground, mask and background as in VGAN, few numbers.

    Its pre-activation (B, D) holds coarse pictures of `grid` x `grid`, a coarser mask, and velocities on 2x2 points at
    `knots` moments, which is enough for straight ways, turns, growth and swings; `render` enlarges, integrates and warps.
    Zeroth-order estimates see far more in D = 307 directions than in all the pixels of a clip. That something moves in
    front of something else is all that it knows of video.
    """

    over_time: Tensor
    rest: Tensor

    def __init__(
        self, num_classes: int, num_frames: int, size: int, width: int = 64, noise_dim: int = 64, grid: int = 8, knots: int = 3
    ):
        super().__init__()
        self.noise_dim, self.num_frames, self.size = noise_dim, num_frames, size
        self.shapes = [(3, grid, grid), (3, grid // 2 + 1, grid // 2 + 1), (1, grid // 2, grid // 2), (2, knots, 2, 2)]
        self.embedding = nn.Embedding(num_classes, noise_dim)
        self.hidden = nn.Linear(2 * noise_dim, 4 * width)
        heads = [nn.Linear(4 * width, torch.Size(shape).numel()) for shape in self.shapes]
        self.heads = nn.ModuleList(heads)
        nn.init.normal_(self.hidden.weight, std=2 * (2 * noise_dim) ** -0.5)
        # Varied from the start: two pictures of good contrast, a mask that hides some 3/4, a way of half a frame.
        for head, scale, shift in zip(heads, (1.5, 1.5, 4.0, 1.0), (0.0, 0.0, -3.0, 0.0), strict=True):
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
