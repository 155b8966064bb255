"""The step between a clip and a model: every model takes the same clips and does its own sampling and normalising."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit_clips(clips: Tensor, num_frames: int | None, size: int | None) -> Tensor:
    """Sample (B, C, T, H, W) evenly to `num_frames` and resize it to `size` x `size`; None leaves an axis as it is."""
    length = clips.shape[2]
    if num_frames is not None and length != num_frames:
        index = (torch.arange(num_frames, device=clips.device) * 2 + 1) * length // (2 * num_frames)
        clips = clips[:, :, index]
    if size is not None and clips.shape[3:] != (size, size):
        batch, channels, length = clips.shape[:3]
        frames = clips.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True)
        clips = frames.view(batch, length, channels, size, size).transpose(1, 2)
    return clips


class Preprocessed(nn.Module):
    """A network with its own preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> float32 logits (B, num_classes).

    `num_frames` and `size` are what the network was trained on (None: any), `mean` and `std` its normalisation in [0, 1].
    """

    def __init__(
        self,
        net: nn.Module,
        num_frames: int | None = None,
        size: int | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.net, self.num_frames, self.size = net, num_frames, size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1, 1), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        return self.net((fit_clips(clips, self.num_frames, self.size) - self.mean) / self.std).float()
