"""How a student is trained on the answers there are: learning rates, averaged weights, and what it is shown of a clip.

Nothing here makes a query, and nothing changes one: the victim's answer is that to the view that was sent.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from extraction.runs import require_form

WARM_UP = 0.05  # share of the steps
NUM_DRAWS = 7  # numbers in 0..1 for a clip


def one_cycle(optimizer: torch.optim.Optimizer, num_steps: int) -> OneCycleLR:
    """Learning rates that rise to each group's own over the first 5 % of `num_steps`, then fall to nearly zero at the last.

    One cycle of Smith & Topin 2017 (arXiv 1708.07120), of the rates alone, along cosines.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, peaks, total_steps=num_steps + 1, pct_start=WARM_UP, cycle_momentum=False)


class AveragedWeights:
    """An exponential moving average of a network's weights and statistics (Polyak & Juditsky 1992).

    After step t (from 0): average = d * average + (1 - d) * weights, d = min(decay, (1 + t) / (10 + t)), so that the first
    weights do not last in a short run. Counters are copied. `state` has the form of `net.state_dict()`.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net, self.decay = net, decay
        self.state = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after step number `step`, from 0."""
        now = self.net.state_dict()
        moving = [name for name, value in now.items() if value.is_floating_point()]
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([self.state[name] for name in moving], [now[name] for name in moving], weight)
        for name in now.keys() - set(moving):
            self.state[name].copy_(now[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the average of a checkpoint. Raises ValueError when it is another network's."""
        require_form(state, {name: value.cpu() for name, value in self.state.items()}, "averaged weights")
        for name, value in state.items():
            self.state[name].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the averaged weights; after it, bit for bit, its own."""
        own = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(self.state)
        try:
            yield
        finally:
            self.net.load_state_dict(own)


def seed_step(seed: int, step: int) -> np.random.Generator:
    """What is drawn for the student in a step: deterministic in (seed, step), so that no state of it need be kept."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(f"{seed}|{step}|student".encode(), digest_size=8).digest()))


def crop_and_erase(clips: Tensor, uniform: np.ndarray, crop: float, erase: float) -> Tensor:
    """Crop and erase float (B, C, T, H, W) clips as `uniform` (B, 7), numbers in 0..1, draws; all frames of a clip alike.

    A part of 1 - `crop` to 1 of the frame's sides, anywhere in it, is resized to the whole: a random resized crop that keeps
    the proportions, for directions may tell classes. Then a tube, a box of up to `erase` of the frame's area in all frames,
    half to twice as high as wide, becomes the clip's mean colour (random erasing, Zhong et al. 2017, arXiv 1708.04896). Nothing
    is mirrored, turned or reversed: the answer would not be that of the clip any more.
    """
    height, width = clips.shape[3:]
    if crop:
        side = 1.0 - crop * uniform[:, 0]
        zero = np.zeros_like(side)
        across, down = ((1.0 - side) * (2.0 * uniform[:, k] - 1.0) for k in (1, 2))
        rows = np.array([[side, zero, across], [zero, side, down]]).transpose(2, 0, 1).astype(np.float32)
        flat = clips.flatten(1, 2)  # one grid for all the frames of a clip
        grid = F.affine_grid(torch.from_numpy(rows).to(clips.device, non_blocking=True), list(flat.shape), align_corners=False)
        clips = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False).view_as(clips)
    if erase:
        area, slim = erase * uniform[:, 3], 2.0 ** (2.0 * uniform[:, 4] - 1.0)
        high, wide = (np.minimum(1.0, np.sqrt(area * ratio)) for ratio in (slim, 1.0 / slim))
        inside = [
            find_inside(share, uniform[:, k], length) for share, k, length in ((high, 5, height), (wide, 6, width))
        ]  # (B, H) and (B, W)
        box = torch.from_numpy(inside[0][:, :, None] & inside[1][:, None, :]).to(clips.device, non_blocking=True)
        clips = torch.where(box[:, None, None], clips.mean((2, 3, 4), keepdim=True), clips)
    return clips


def find_inside(share: np.ndarray, place: np.ndarray, length: int) -> np.ndarray:
    """The pixels of a line, (B, length) bool, whose centres are in a `share` (B,) of it, at its left (`place` 0) to right."""
    centres, start = (np.arange(length) + 0.5) / length, (1.0 - share) * place
    return (centres >= start[:, None]) & (centres < (start + share)[:, None])


def mix(values: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): shares * values + (1 - shares) * values[partners], along the first axis."""
    shares = shares.view(-1, *[1] * (values.ndim - 1))
    return shares * values + (1 - shares) * values[partners]


def spread_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as rows (B, num_classes) that can be mixed: one-hot, all zeros for none (-1)."""
    return F.one_hot(labels.clamp(min=0), num_classes).float() * (labels >= 0)[:, None]
