"""The step between a clip and a model: every model takes the same clips and does its own sampling and normalising."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

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
        down, across = (_resize_matrix(side, size, clips.device) for side in clips.shape[3:])
        clips = down @ clips @ across.T
    return clips


@lru_cache
@torch.inference_mode(False)  # what is kept must serve outside of it too
def _resize_matrix(side: int, size: int, device: torch.device) -> Tensor:
    """(size, side): what bilinear resizing with antialiasing does to a line of pixels. Two products are faster than the
    library's resizing, by half on a CPU."""
    line = torch.eye(side, device=device).view(1, side, 1, side)  # as channels
    return F.interpolate(line, (1, size), mode="bilinear", antialias=True).view(side, size).T.contiguous()


# How convolutions like their clips and images: channels last.
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class VideoModel(nn.Module):
    """A network with its own preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> float32 logits (B, num_classes).

    `num_frames` and `size` are what the network was trained on (None: any), `mean` and `std` its normalisation in [0, 1].
    `precision` and `compile_after` say how it is run (`extraction.compute`).
    """

    precision = torch.float32
    compile_after: int | None = None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        num_frames: int | None = None,
        size: int | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.net, self.num_frames, self.size = net, num_frames, size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1, 1), persistent=False)
        self._batches: Counter = Counter()  # by shape and mode
        self._compiled: dict[tuple, Any] = {}  # in a dict, where nn.Module does not take it for a part

    def forward(self, clips: Tensor) -> Tensor:
        return self.run((fit_clips(clips, self.num_frames, self.size) - self.mean) / self.std)

    def run(self, batch: Tensor) -> Tensor:
        """The network's float32 logits for a batch that is preprocessed."""
        if batch.ndim in LAYOUTS:
            batch = batch.contiguous(memory_format=LAYOUTS[batch.ndim])
        with torch.autocast(batch.device.type, self.precision, enabled=self.precision != torch.float32):
            return self._pick_net(batch)(batch).float()

    def _pick_net(self, batch: Tensor) -> Callable[[Tensor], Tensor]:
        """The compiled network for a shape that came often, the plain one for the others, such as an epoch's last batch."""
        if self.compile_after is None:
            return self.net
        shape = (*batch.shape, self.training, torch.is_grad_enabled())
        self._batches[shape] += 1
        if self._batches[shape] <= self.compile_after:
            return self.net
        if shape not in self._compiled:
            size = "x".join(map(str, batch.shape))
            print(f"compiling {type(self.net).__name__} for batches of {size}, once; this takes a while", flush=True)
            self._compiled[shape] = torch.compile(self.net, dynamic=False)
        return self._compiled[shape]
