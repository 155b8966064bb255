"""benchmarks/peers.py at a tiny size: other tools' attacks are counted at the victim, and ours has their constants."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from extraction import options
from extraction.evaluation import suite
from extraction.students import load_student
from grey_box import swin_to_r21

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
peers = importlib.import_module("peers")


def configure(demo_set, tmp_path, **changes):
    data = dict(in_domain=str(demo_set / "train_5per"), aux=(str(demo_set / "unrelated_b"),))
    return peers.Config(**data | dict(budget=20, epochs=2, batch_size=8, seeds=(0,), out_dir=str(tmp_path)) | changes)


@pytest.mark.slow
def test_a_peer_is_counted_at_the_victim_trained_and_scored(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "UNSEEN", tmp_path / "unseen")
    monkeypatch.setattr(suite, "write_unseen_set", lambda: demo_set)
    table = peers.main(configure(demo_set, tmp_path, only=("ml_doctor",)))
    folder = tmp_path / "seed_0" / "ml_doctor"
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["steps"] == 2 * 3
    assert measured["peak_mb"] > 100
    assert json.loads((folder / "results.json").read_text())["num_queries"] == 20
    assert load_student("r2plus1d_tiny", folder / "student.safetensors")[1]["num_queries"] == 20
    row = table.splitlines()[-1].split()
    assert row[:4] == ["ml_doctor", "probs", "20", "6"]
    written = (tmp_path / "table.md").read_text()
    assert all(cell in written for cell in row)
    before = (folder / "measured.json").stat().st_mtime_ns
    peers.main(configure(demo_set, tmp_path, only=("ml_doctor",)))
    assert (folder / "measured.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("method", "steps"), [("art_knockoff_random", 6), ("art_copycat", 6), ("art_knockoff_adaptive", 26)])
def test_the_toolbox_asks_as_many_queries_as_it_may(method, steps, demo_set, tmp_path):
    pytest.importorskip("art")
    peers.run_peer(configure(demo_set, tmp_path), method, 0, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["num_queries"] == 20
    assert json.loads((tmp_path / "measured.json").read_text())["steps"] == steps


def test_probabilities_reach_the_toolboxs_student(demo_set, tmp_path, monkeypatch):
    """Not their top classes, which it trains on where a loss takes nothing else."""
    pytest.importorskip("art")
    seen = []
    loss = peers.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(peers.nn.CrossEntropyLoss, "forward", lambda self, a, b: seen.append(b.clone()) or loss(self, a, b))
    peers.run_peer(configure(demo_set, tmp_path, epochs=1), "art_knockoff_random", 0, tmp_path)
    assert seen[0].shape == (8, 12)
    assert seen[0].sum(1).tolist() == pytest.approx([1] * 8, abs=1e-5)
    assert ((seen[0] > 0.01) & (seen[0] < 0.99)).any()


def test_ours_has_the_peers_constants(demo_set, tmp_path):
    config = configure(demo_set, tmp_path, ours="--schedule one_cycle --ema 0.9")
    _, script, *flags = peers.build_command(config, "ours_label", 3, tmp_path)
    assert Path(script).name == "swin_to_r21.py"
    ours = options.parse_options(swin_to_r21.Config, swin_to_r21.Config(**swin_to_r21.DEMO), "", flags)
    assert (ours.num_clips, ours.views_per_clip, ours.epochs, ours.batch_size) == (20, 1, 2, 8)
    assert (ours.answers, ours.seed, ours.head_lr, ours.body_lr) == ("label", 3, 1.5e-3, 1.5e-3)
    assert (ours.schedule, ours.ema, ours.victim, ours.student) == ("one_cycle", 0.9, peers.VICTIM, peers.STUDENT)
    assert (ours.num_frames, ours.size, ours.size) == peers.SHAPE[1:]


def test_a_run_of_its_own_has_the_same_constants(demo_set, tmp_path):
    config = configure(demo_set, tmp_path, ours="--schedule one_cycle", jobs=2)
    _, *flags = peers.plan_step(config, "ours_label", 3).command
    given = options.parse_options(peers.Config, peers.Config(), "", flags)
    assert given == peers.Config(**vars(config) | dict(only=("ours_label",), seeds=(3,), here=True, jobs=1))


def test_a_method_that_is_none_and_a_toolbox_that_is_not_there_get_one_line(demo_set, tmp_path, monkeypatch, error_line):
    assert "none is called nonsense" in error_line(peers.main, configure(demo_set, tmp_path, only=("nonsense",)))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert error_line(peers.main, configure(demo_set, tmp_path)).endswith("pip install -e '.[peers]'")
