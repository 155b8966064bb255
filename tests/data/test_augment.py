"""Augmented views: deterministic in their key, in range, and as strong as their options say."""

import numpy as np
import torch

from extraction.data.augment import Augmentation, create_views, view_key
from extraction.data.demo import ACTIONS, SHAPES, create_clip


def views_of(clip: np.ndarray, augmentation: Augmentation, count: int) -> torch.Tensor:
    batch = torch.from_numpy(clip)[None].repeat(count, 1, 1, 1, 1)
    return create_views(batch, [view_key(0, "clip", k, augmentation) for k in range(count)], augmentation)


def test_a_view_is_deterministic_in_its_key_whatever_its_batch():
    clip = create_clip([ACTIONS["growing"]], SHAPES, 1, 8, 32)
    augmentation = Augmentation(0.5, 0.1, 15.0)
    many, again = views_of(clip, augmentation, 6), views_of(clip, augmentation, 6)
    assert torch.equal(many, again)
    alone = create_views(torch.from_numpy(clip)[None], [view_key(0, "clip", 4, augmentation)], augmentation)
    torch.testing.assert_close(alone[0], many[4])
    assert view_key(0, "clip", 1, augmentation) != view_key(1, "clip", 1, augmentation)
    assert len({tuple(view.flatten()[::97].tolist()) for view in many}) == 6


def test_views_stay_in_range_and_treat_all_frames_alike():
    frame = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    views = views_of(np.repeat(frame, 5, 0), Augmentation(0.5, 0.3, 20.0), 16)
    assert views.shape == (16, 3, 5, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1
    assert torch.equal(views[:, :, :1].expand_as(views), views)


def test_flip_brightness_and_rotation_do_what_they_say():
    clip = np.zeros((2, 33, 33, 3), np.uint8)
    clip[:, 16, 26] = 200  # a dot to the right of the centre
    still = views_of(clip, Augmentation(0.0, 0.0, 0.0), 1)
    torch.testing.assert_close(still[0].permute(1, 2, 3, 0), torch.from_numpy(clip).float() / 255)
    flipped = views_of(clip, Augmentation(1.0, 0.0, 0.0), 1)[0, 0, 0]
    assert (flipped.argmax() // 33, flipped.argmax() % 33) == (16, 6)
    share = (views_of(clip, Augmentation(0.5, 0.0, 0.0), 400)[:, 0, 0, 16, 6] > 0.5).float().mean()
    assert 0.4 < share < 0.6
    light = views_of(clip, Augmentation(0.0, 0.1, 0.0), 200)[:, 0, 0, 16, 26] * 255 / 200
    assert 0.9 <= light.min() < 0.92
    assert 1.08 < light.max() <= 1.1
    turned = views_of(clip, Augmentation(0.0, 0.0, 45.0), 200)[:, 0, 0].flatten(1).argmax(1)
    angles = torch.atan2((turned // 33 - 16).float(), (turned % 33 - 16).float()).rad2deg()
    assert angles.abs().max() <= 48
    assert angles.max() > 35
    assert angles.min() < -35
