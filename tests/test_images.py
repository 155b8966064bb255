"""Clips out of images, and the two attacks that send them: their paths, their exact bills, their balance."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from black_box import natural_images_label_only, stacked_images_with_movinet, stacked_images_with_swin
from extraction import ledger
from extraction.data.images import Images, Layer, Motion, create_clips, draw_texture, read_image, write_demo_images
from extraction.errors import BudgetExhausted, UserError
from extraction.weights import save_weights

TWO = Motion(16, stacked_images_with_swin.DEMO["layers"])
ONE = Motion(16)
KEYS = [bytes([k]) * 16 for k in range(24)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_demo_images(tmp_path_factory.mktemp("images"), num_images=20, size=64)


def pictures_of(images: Path, paths: Motion, count: int, size: int = 48) -> torch.Tensor:
    source = Images(images, count, len(paths.layers), size)
    return torch.from_numpy(np.stack([source[k][1] for k in range(count)]))


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [ONE, TWO])
def test_every_frame_of_a_clip_differs_and_all_are_in_range(images, paths):
    clips = create_clips(pictures_of(images, paths, len(KEYS)), KEYS, paths)
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
    paths = Motion(16, (Layer(translation=0.2, rotation=0.0, shear=0.0, scale=1.0),))
    clips = create_clips(picture, KEYS, paths)[:, 0].double()
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
    assert isinstance(read.pop("cut.png"), str)  # its head is whole: found out when it is decoded
    for picture in read.values():
        assert picture.shape == (1, 32, 32, 3)
        assert picture.dtype == np.uint8
    assert read["grey.bmp"].std() > 1


def test_clips_go_through_all_images_before_one_comes_again_and_have_names_of_their_own(images):
    source = Images(images, 50, 2, 48, seed=3)
    assert len(source) == 50
    assert len({window.pictures[0] for window in source.refs[:20]}) == 20
    assert len({window.key for window in source.refs}) == 50
    assert [w.key for w in Images(images, 50, 2, 48, seed=3).refs] == [w.key for w in source.refs]
    assert [w.pictures for w in Images(images, 50, 2, 48, seed=4).refs] != [w.pictures for w in source.refs]
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


# --- scripts ---------------------------------------------------------------------------------------------------------


def small(script, demo_set, images, out_dir, **changes):
    constants = script.DEMO | dict(
        demo=False, victim="demo_swin", images=str(images), val=str(demo_set / "val"), num_workers=0, out_dir=str(out_dir),
    )  # fmt: skip
    return script.Config(**constants | changes)


@pytest.mark.parametrize("script", [stacked_images_with_swin, stacked_images_with_movinet])
def test_stacked_images_bill_as_their_docstring_says(script, demo_set, images, tmp_path):
    config = small(script, demo_set, images, tmp_path / "run", num_clips=20, epochs=3, views_per_clip=2)
    results = script.main(config)
    assert results["num_queries"] == 20 * 2 == ledger.count(str(tmp_path / "run" / "ledger.sqlite"))
    assert results["experiment"] == script.__name__.rpartition(".")[2]
    assert [point["num_queries"] for point in results["history"]] == [20, 40, 40]


def test_stacked_images_stop_one_clip_short_and_list_bad_images(demo_set, images, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in images.glob("*.png"):
        (tree / path.name).write_bytes(path.read_bytes())
    cut = tree / "0003.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    config = small(
        stacked_images_with_swin, demo_set, tree, tmp_path / "run", layers=(Layer(),), num_clips=None, epochs=2,
        views_per_clip=None, query_budget=37,
    )  # fmt: skip
    with pytest.raises(BudgetExhausted, match="37 of 37 queries spent in epoch 2 of 2"):
        stacked_images_with_swin.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["num_queries"] == 37
    assert {Path(path).name for path, _ in results["broken"]} == {"0003.png"}
    whole = stacked_images_with_swin.main(dataclasses.replace(config, query_budget=None))
    assert whole["num_queries"] == 38  # 19 readable images, two epochs


@pytest.fixture
def label_only(demo_set, images, tmp_path):
    changes = dict(num_explore=60, num_rounds=3, per_round=30, quota=8, repeats=2, epochs=2)
    return small(natural_images_label_only, demo_set, images, tmp_path / "run", **changes)


def test_label_only_bills_as_its_docstring_says_and_trains_on_a_balanced_set(label_only, tmp_path):
    results = natural_images_label_only.main(label_only)
    rounds = len(results["selection"]) - 1
    assert results["answers"] == "label"
    assert results["num_queries"] == 60 + 30 * rounds == ledger.count(str(tmp_path / "run" / "ledger.sqlite"))
    assert [point["num_queries"] for point in results["selection"]] == [60 + 30 * k for k in range(rounds + 1)]
    kept = results["clips_per_class"]
    assert max(kept.values()) == 8  # the quota
    assert sum(count > 0 for count in kept.values()) == round(12 * results["selection"][-1]["classes_reached"]) >= 6
    chosen = json.loads((tmp_path / "run" / "transfer_set.json").read_text())
    for name, count in kept.items():
        own = [key for label, _, key in chosen if label == name]
        assert len(own) == min(8, 2 * count)
        assert len(set(own)) == count
    assert [point["num_queries"] for point in results["history"]] == [results["num_queries"]] * 2  # training asks nothing


def test_weights_of_another_network_are_found_before_the_search_is_paid(label_only, tmp_path):
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"other\.safetensors"):
        natural_images_label_only.main(dataclasses.replace(label_only, student_weights=str(tmp_path / "other.safetensors")))
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


@pytest.mark.slow
def test_label_only_stops_one_clip_short_and_goes_on_to_where_it_would_have_come(label_only, tmp_path):
    free = natural_images_label_only.main(dataclasses.replace(label_only, out_dir=str(tmp_path / "free")))
    short = dataclasses.replace(label_only, query_budget=free["num_queries"] - 1)
    with pytest.raises(BudgetExhausted, match="queries spent in round"):
        natural_images_label_only.main(short)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_queries"] == free["num_queries"] - 1
    whole = natural_images_label_only.main(dataclasses.replace(label_only, query_budget=free["num_queries"]))
    assert whole["num_queries"] == free["num_queries"]
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("free", "run")]
    assert students[0] == students[1]


def test_rounds_go_around_the_classes_that_want_clips():
    rng = np.random.default_rng(0)
    asked = [natural_images_label_only.Asked(None, np.full(6, 0.1 + 0.3 * k), k) for k in range(3)]
    kept = [[asked[0]] * 10, [asked[1]] * 2, [asked[2]] * 9]
    ways = natural_images_label_only.propose_paths(kept, 10, 0.01, 900, 6, rng)
    assert ways.min() >= 0
    assert ways.max() <= 1
    nearest = np.abs(ways.mean(1)[:, None] - np.array([0.1, 0.4, 0.7])).argmin(1)
    assert (nearest == 0).sum() == 0  # its quota is full
    assert 0.8 < (nearest == 1).mean() < 0.97  # 8 wanted against 1
    # Half of the classes never named: half of the paths are random.
    ways = natural_images_label_only.propose_paths([[asked[1]], []], 10, 0.01, 900, 6, rng)
    assert 0.4 < (np.abs(ways - 0.4).max(1) > 0.1).mean() < 0.6
