"""Augmented views of clips, made on the device from uint8.

A view is deterministic in (seed, clip, view number): shown again, it is the same pixels, and its answer is cached.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """One random draw per clip, the same for all its frames; all zeros leave the clip as it is."""

    hflip: float = 0.5  # probability of a horizontal flip
    brightness: float = 0.1  # factor drawn from 1 - b to 1 + b
    rotation: float = 15.0  # degrees, drawn from -r to r; corners become black


def view_key(seed: int, clip_key: str, view: int, augmentation: NamedTuple) -> bytes:
    """16 bytes that name one view of one clip: equal exactly when the pixels sent would be."""
    return hashlib.blake2b(f"{seed}|{clip_key}|{view}|{tuple(augmentation)}".encode(), digest_size=16).digest()


def create_views(clips: Tensor, keys: Sequence[bytes], augmentation: Augmentation) -> Tensor:
    """Turn uint8 (B, T, H, W, C) clips into the views that `keys` name: float (B, C, T, H, W) in [0, 1], same device."""
    pixels = clips.permute(0, 4, 1, 2, 3)
    if augmentation.rotation:  # which wants them in this order: as bytes they are a quarter to move
        pixels = pixels.contiguous()
    return augment(pixels.float().div_(255.0), keys, augmentation)


def augment(views: Tensor, keys: Sequence[bytes], augmentation: Augmentation) -> Tensor:
    """Augment float (B, C, T, H, W) clips in [0, 1], each as its key draws. Their memory may be written to."""

    def to_device(values: np.ndarray) -> Tensor:  # without waiting for what the device is busy with
        return torch.from_numpy(values.astype(np.float32)).to(views.device, non_blocking=True)

    draws = [np.frombuffer(hashlib.blake2b(key, digest_size=24).digest(), np.uint64) for key in keys]
    uniform = (np.stack(draws) >> np.uint64(11)).astype(np.float64) / 2.0**53
    flip = np.where(uniform[:, 0] < augmentation.hflip, -1.0, 1.0)
    factor = 1.0 + augmentation.brightness * (2.0 * uniform[:, 1] - 1.0)
    angle = math.radians(augmentation.rotation) * (2.0 * uniform[:, 2] - 1.0)
    if augmentation.rotation:
        height, width = views.shape[3:]
        cos, sin, aspect, zero = np.cos(angle), np.sin(angle), height / width, np.zeros_like(angle)
        rows = [[cos * flip, -sin * aspect * flip, zero], [sin / aspect, cos, zero]]
        matrix = to_device(np.array(rows).transpose(2, 0, 1))
        flat = views.flatten(1, 2)  # one grid for all the frames of a clip
        grid = F.affine_grid(matrix, list(flat.shape), align_corners=False)
        views = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False).view_as(views)
    elif augmentation.hflip:
        views = torch.where(to_device(flip)[:, None, None, None, None] < 0, views.flip(4), views)
    if augmentation.brightness:
        views = views.mul_(to_device(factor)[:, None, None, None, None])
    return views.clamp_(0.0, 1.0)
