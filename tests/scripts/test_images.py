"""The scripts that send clips of images: exact queries, budgets, and a balanced transfer set."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from black_box import natural_images_label_only, stacked_images_with_movinet, stacked_images_with_swin
from extraction.data.images import Layer, write_demo_images
from extraction.errors import UserError
from extraction.victims import ledger
from extraction.weights import save_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_demo_images(tmp_path_factory.mktemp("images"), num_images=20, size=64)


def small(script, demo_set, images, out_dir, **changes):
    constants = script.DEMO | dict(
        demo=False, victim="demo_swin", images=str(images), val=str(demo_set / "val"), num_workers=0, out_dir=str(out_dir),
    )  # fmt: skip
    return script.Config(**constants | changes)


@pytest.mark.parametrize("script", [stacked_images_with_swin, stacked_images_with_movinet])
def test_num_queries_of_stacked_images_is_the_docstrings_formula(script, demo_set, images, tmp_path):
    config = small(script, demo_set, images, tmp_path / "run", num_clips=20, epochs=3, views_per_clip=2)
    results = script.main(config)
    assert results["num_queries"] == 20 * 2 == ledger.count(str(tmp_path / "run" / "ledger.sqlite"))
    assert results["experiment"] == script.__name__.rpartition(".")[2]
    assert [point["num_queries"] for point in results["history"]] == [20, 40, 40]


def test_stacked_images_stop_one_clip_short_and_list_bad_images(demo_set, images, tmp_path, capsys):
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
    stacked_images_with_swin.main(config)
    out = capsys.readouterr().out
    assert "query budget exhausted: 37 of 37 queries used" in out
    assert out.count("0003.png") == 1
    assert "left out 1 unreadable file:" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["num_queries"], results["stopped"], results["history"][-1]["epoch"]) == (37, "query budget", 2)
    assert [Path(path).name for path, _ in results["broken"]] == ["0003.png"]
    whole = stacked_images_with_swin.main(dataclasses.replace(config, query_budget=None))
    assert whole["num_queries"] == 38  # 19 readable images, two epochs


@pytest.fixture
def label_only(demo_set, images, tmp_path):
    changes = dict(num_explore=60, num_rounds=3, per_round=30, quota=8, repeats=2, epochs=2)
    return small(natural_images_label_only, demo_set, images, tmp_path / "run", **changes)


def test_num_queries_of_label_only_is_the_docstrings_formula_and_training_is_balanced(label_only, tmp_path):
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
        keys = [key for label, _, key in chosen if label == name]
        assert len(keys) == min(8, 2 * count)
        assert len(set(keys)) == count
    assert [point["num_queries"] for point in results["history"]] == [results["num_queries"]] * 2  # training asks nothing


def test_label_only_can_train_on_all_that_it_has_paid_for(label_only, tmp_path):
    results = natural_images_label_only.main(dataclasses.replace(label_only, transfer="all", epochs=1))
    chosen = json.loads((tmp_path / "run" / "transfer_set.json").read_text())
    assert len({key for _, _, key in chosen}) == results["num_queries"]
    counts = {name: len({key for label, _, key in chosen if label == name}) for name, _, _ in chosen}
    assert max(counts.values()) > 8  # beyond the quota
    for name, count in counts.items():
        assert sum(label == name for label, _, _ in chosen) == min(max(counts.values()), 2 * count)


def test_weights_of_another_network_are_found_before_the_first_query(label_only, tmp_path):
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"other\.safetensors"):
        natural_images_label_only.main(dataclasses.replace(label_only, student_weights=str(tmp_path / "other.safetensors")))
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


def test_label_only_ends_with_one_line_when_no_image_can_be_decoded(label_only, images, tmp_path, error_line):
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in images.glob("*.png"):
        (tree / path.name).write_bytes(path.read_bytes()[:-500])  # their heads are whole: found out when they are decoded
    line = error_line(natural_images_label_only.main, dataclasses.replace(label_only, images=str(tree)))
    assert line.startswith("not one clip was answered: no image can be read (")
    assert ".png" in line
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


def test_label_only_without_a_query_budget_ends_with_one_line(label_only, error_line):
    line = error_line(natural_images_label_only.main, dataclasses.replace(label_only, query_budget=0))
    assert line == "not one clip was answered: no query budget"


@pytest.mark.slow
def test_label_only_stops_one_clip_short_and_goes_on_to_where_it_would_have_come(label_only, tmp_path):
    free = natural_images_label_only.main(dataclasses.replace(label_only, out_dir=str(tmp_path / "free")))
    short = dataclasses.replace(label_only, query_budget=free["num_queries"] - 1)
    results = natural_images_label_only.main(short)
    assert results["stopped"] == "query budget"
    assert len(results["selection"]) == len(free["selection"])  # it ended within the last round
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_queries"] == free["num_queries"] - 1
    whole = natural_images_label_only.main(dataclasses.replace(label_only, query_budget=free["num_queries"]))
    assert whole["num_queries"] == free["num_queries"]
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("free", "run")]
    assert students[0] == students[1]


def test_rounds_go_around_the_classes_that_want_clips():
    rng = np.random.default_rng(0)
    asked = [natural_images_label_only.Candidate(None, np.full(6, 0.1 + 0.3 * k), k) for k in range(3)]
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
