"""A bounded memory of answered clips, to train on again without a query."""

import torch
from torch import Tensor

from extraction.errors import UserError


class Replay:
    """A bounded memory of answered clips, in host memory: a uniform sample of all that were ever pushed (reservoir).

    Holds at most `capacity` clips as uint8 with their targets as float32, `num_bytes` bytes, taken at once.
    """

    def __init__(self, capacity: int, clip_shape: tuple[int, ...], num_targets: int):
        try:
            self.clips = torch.zeros((capacity, *clip_shape), dtype=torch.uint8)
        except RuntimeError:
            size = capacity * torch.Size(clip_shape).numel() / 1e9
            raise UserError(f"--replay-clips {capacity}: no room for their {size:.0f} GB in memory; lower it") from None
        self.targets = torch.zeros(capacity, num_targets)
        self.num_pushed = 0

    @property
    def num_bytes(self) -> int:
        return self.clips.nbytes + self.targets.nbytes

    def __len__(self) -> int:
        return min(self.num_pushed, len(self.clips))

    def push(self, clips: Tensor, targets: Tensor, rng: torch.Generator) -> None:
        """Offer uint8 (B, ...) clips with their (B, num_targets): each of the n so far stays with chance capacity / n."""
        clips, targets = clips.cpu(), targets.cpu()
        for clip, target in zip(clips, targets, strict=True):
            place = self.num_pushed
            if place >= len(self.clips):
                place = int(torch.randint(self.num_pushed + 1, (), generator=rng))
            if place < len(self.clips):
                self.clips[place], self.targets[place] = clip, target
            self.num_pushed += 1

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` kept clips and their targets, drawn with replacement."""
        chosen = torch.randint(len(self), (count,), generator=rng)
        return self.clips[chosen], self.targets[chosen]

    def state_dict(self) -> dict:
        full = len(self) == len(self.clips)  # a part of a tensor would be saved with all of it
        clips, targets = (kept if full else kept[: len(self)].clone() for kept in (self.clips, self.targets))
        return dict(clips=clips, targets=targets, num_pushed=self.num_pushed)

    def load_state_dict(self, state: dict) -> None:
        self.num_pushed = int(state["num_pushed"])
        full, clips, targets = len(self), state["clips"], state["targets"]
        if (clips.shape, targets.shape) != (self.clips[:full].shape, self.targets[:full].shape):
            raise ValueError(f"replay clips {tuple(clips.shape)}, {full} pushed")
        self.clips[: len(self)], self.targets[: len(self)] = state["clips"], state["targets"]
