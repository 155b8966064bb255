"""Clips out of images: how their pictures move, and which pictures they are of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from extraction.data.images import (
    DEMO_LAYERS,
    Images,
    Layer,
    Motion,
    create_clips,
    draw_texture,
    read_image,
    write_demo_images,
)
from extraction.errors import UserError

TWO = Motion(16, DEMO_LAYERS)
ONE = Motion(16)
KEYS = [bytes([k]) * 16 for k in range(24)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_demo_images(tmp_path_factory.mktemp("images"), num_images=20, size=64)


def pictures_of(images: Path, motion: Motion, count: int, size: int = 48) -> torch.Tensor:
    source = Images(images, count, len(motion.layers), size)
    return torch.from_numpy(np.stack([source[k][1] for k in range(count)]))


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", [ONE, TWO])
def test_every_frame_of_a_clip_differs_and_all_are_in_range(images, motion):
    clips = create_clips(pictures_of(images, motion, len(KEYS)), KEYS, motion)
    assert clips.shape == (len(KEYS), 3, 16, 48, 48)
    assert clips.dtype == torch.float32
    assert clips.min() >= 0
    assert clips.max() <= 1
    frames = clips.transpose(1, 2).flatten(2)
    apart = torch.cdist(frames, frames, p=float("inf")) + torch.eye(16)
    assert apart.amin() > 2e-4  # any two frames, not only neighbours
    assert (clips[:, :, 1:] - clips[:, :, :-1]).abs().amax((1, 3, 4)).median() > 0.05
    assert clips.std((2, 3, 4)).amin() > 0  # pictures, not one colour


def test_frames_do_not_share_memory(images):
    clips = create_clips(pictures_of(images, ONE, 1), KEYS[:1], ONE)
    before = clips[0, :, 1].clone()
    clips[0, :, 0] = 0
    assert torch.equal(clips[0, :, 1], before)


def test_a_path_is_its_keys_alone_whatever_else_is_in_the_batch(images):
    pictures, order = pictures_of(images, TWO, len(KEYS)), torch.randperm(len(KEYS))
    clips = create_clips(pictures, KEYS, TWO)
    assert torch.equal(create_clips(pictures, KEYS, TWO), clips)
    permuted = create_clips(pictures[order], [KEYS[k] for k in order], TWO)
    torch.testing.assert_close(permuted, clips[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(create_clips(pictures[3:4], KEYS[3:4], TWO), clips[3:4], rtol=0, atol=1e-6)
    assert (create_clips(pictures, KEYS[::-1], TWO) - clips).abs().amax((1, 2, 3, 4)).min() > 0.05


def test_no_corner_is_black(images):
    white = torch.full((len(KEYS), 1, 48, 48, 3), 255, dtype=torch.uint8)
    assert create_clips(white, KEYS, ONE).min() > 0.999


def test_a_path_moves_no_further_than_its_constants():
    # A small bright square in the middle: its centre is where the path has moved it.
    picture = torch.zeros(len(KEYS), 1, 64, 64, 3, dtype=torch.uint8)
    picture[:, :, 29:35, 29:35] = 255
    motion = Motion(16, (Layer(translation=0.2, rotation=0.0, shear=0.0, scale=1.0),))
    clips = create_clips(picture, KEYS, motion)[:, 0].double()
    place = (torch.arange(64) + 0.5) / 64 - 0.5
    centre = torch.stack([(clips.sum(2 + axis) * place).sum(2) / clips.sum((2, 3)) for axis in (0, 1)], 2)
    reach = centre.norm(dim=2).amax(1)
    assert reach.max() <= 0.2 * 1.06  # a swing drifts by 5 %
    assert reach.min() >= 0.2 * 0.35
    assert reach.std() > 0.01
    still = create_clips(picture, KEYS, Motion(16, (Layer(0.0, 0.0, 0.0, 1.0),)))
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still))


def test_a_patch_covers_some_of_the_frame_and_the_rest_is_the_other_picture():
    layers = torch.zeros(len(KEYS), 2, 48, 48, 3, dtype=torch.uint8)
    layers[:, 1] = 255
    share = create_clips(layers, KEYS, TWO).mean((1, 2, 3, 4))
    assert share.min() > 0.005
    assert share.max() < 0.8


# --- image sets ------------------------------------------------------------------------------------------------------


def test_images_are_found_in_any_tree_and_bad_ones_are_listed(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.fromarray(draw_texture(rng, 40)).save(tmp_path / "flat.png")
    Image.fromarray(draw_texture(rng, 90)).crop((0, 0, 50, 90)).save(tmp_path / "a" / "tall.JPG", "JPEG")
    Image.fromarray(draw_texture(rng, 40)).convert("L").save(tmp_path / "a" / "b" / "grey.bmp")
    Image.fromarray(draw_texture(rng, 40)).convert("RGBA").save(tmp_path / "a" / "b" / "alpha.webp")
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "text.jpg").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("not even called a picture")
    whole = (tmp_path / "flat.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    images = Images(tmp_path, None, 1, 32)
    assert {path.name for path, _ in images.broken} == {"empty.png", "text.jpg"}
    assert all(reason for _, reason in images.broken)
    read = {images.refs[k].path.name: images[k][1] for k in range(len(images))}
    assert set(read) == {"flat.png", "tall.JPG", "grey.bmp", "alpha.webp", "cut.png"}
    assert read.pop("cut.png").path == tmp_path / "cut.png"  # its head is whole: found out when it is decoded
    layered = Images(tmp_path, None, 3, 32)
    cut = [path.name for path, _ in layered.files].index("cut.png")
    broken = [layered[k][1] for k, ref in enumerate(layered.refs) if cut in ref.pictures]
    assert {found.path.name for found in broken} == {"cut.png"}  # and not the bottom picture's file
    assert {ref.pictures.index(cut) for ref in layered.refs if cut in ref.pictures} > {0}
    for picture in read.values():
        assert picture.shape == (1, 32, 32, 3)
        assert picture.dtype == np.uint8
    assert read["grey.bmp"].std() > 1


def test_clips_go_through_all_images_before_one_comes_again_and_have_names_of_their_own(images):
    source = Images(images, 50, 2, 48, seed=3)
    assert len(source) == 50
    assert len({ref.pictures[0] for ref in source.refs[:20]}) == 20
    assert len({ref.key for ref in source.refs}) == 50
    assert [ref.key for ref in Images(images, 50, 2, 48, seed=3).refs] == [ref.key for ref in source.refs]
    assert [ref.pictures for ref in Images(images, 50, 2, 48, seed=4).refs] != [ref.pictures for ref in source.refs]
    assert len(Images(images, None, 1, 48)) == 20


def test_missing_and_empty_folders_get_one_line(tmp_path):
    with pytest.raises(UserError, match=r"folder .*nowhere not found"):
        Images(tmp_path / "nowhere", None, 1, 48)
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(UserError, match=r"no readable image in it \(bad.png: not an image\)"):
        Images(tmp_path, None, 1, 48)


def test_demo_images_repeat_and_vary(images, tmp_path):
    again = write_demo_images(tmp_path / "again", num_images=20, size=64)
    pictures = [read_image(path, 64) for path in sorted(images.glob("*.png"))]
    assert all(np.array_equal(a, read_image(b, 64)) for a, b in zip(pictures, sorted(again.glob("*.png")), strict=True))
    assert len({picture.tobytes() for picture in pictures}) == 20
    assert min(picture.std() for picture in pictures) > 5
