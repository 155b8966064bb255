"""The benchmarks of training steps, at tiny sizes: they time what they say, and fail where they would time something else."""

import importlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from extraction.data.augment import Augmentation, create_views
from extraction.errors import UserError
from extraction.network import fit_clips

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
train_step, data_free_step = map(importlib.import_module, ("train_step", "data_free_step"))

TINY = dict(scale="demo", batch_size=2, steps=1, turns=1, memory=False, device="cpu", precision="fp32")


def read_rows(out: str, names) -> dict[str, list[float]]:
    """The numbers of each row of a table."""
    lines = {name: re.search(rf"^{re.escape(name)} +(\d.*)$", out, re.MULTILINE) for name in names}
    assert all(lines.values()), out
    return {name: [float(n) for n in re.findall(r"(?<=\s)\d+\.\d+", " " + line[1])] for name, line in lines.items()}


def test_train_step_prints_rates_whose_quotients_are_its_ratios_and_agreement(demo_set, capsys):
    train_step.main(train_step.Config(**TINY, demo_set=str(demo_set)))
    out = capsys.readouterr().out
    rows = read_rows(out, train_step.ROWS)
    for rate, ratio, to_networks, share in rows.values():
        assert ratio == pytest.approx(rate / rows["2022"][0], abs=0.02)
        assert to_networks == pytest.approx(rate / rows["2022, networks only"][0], abs=0.02)
        assert 0 < share < 100
    said = re.findall(r"demo_swin in (\w+): top-1 the same on (\d+) of (\d+) clips, mean KL (\S+) nats.*: (.+)", out)
    assert [(precision, count, met) for precision, _, count, _, met in said] == [("fp32", "24", "met"), ("bf16", "24", "met")]
    assert [int(same) for _, same, *_ in said] == [24, 24]
    exact, rounded = (float(divergence) for *_, divergence, _ in said)
    assert 0 < exact < 1e-7  # the ledger's 16 bits
    assert exact < rounded < 1e-3


def test_answers_of_another_victim_are_noticed(demo_set, capsys, monkeypatch):
    create = train_step.create_victim

    def create_spoilt(setting):
        victim = create(setting)
        victim.model.net.head.weight.data.mul_(0.8)
        return victim

    monkeypatch.setattr(train_step, "create_victim", create_spoilt)
    config = train_step.Config(**TINY, demo_set=str(demo_set))
    with pytest.raises(UserError, match="not the victim's"):
        train_step.check_answers(config, train_step.SCALES["demo"], torch.device("cpu"))
    assert "NOT MET" in capsys.readouterr().out


def test_live_answers_that_were_kept_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "view_key", lambda seed, name, view, augmentation: name.encode())
    setting, compute = train_step.SCALES["demo"]._replace(batch_size=2), train_step.choose_compute("cpu")
    step = train_step.build_ours(setting, compute, tmp_path, kept=False)
    step()
    with pytest.raises(UserError, match="2 clips paid for after 2 batches"):
        step()


def test_both_show_the_victim_the_same_clip_where_nothing_is_drawn():
    still = Augmentation(0.0, 0.0, 0.0)
    clip = torch.randint(256, (16, 48, 48, 3), dtype=torch.uint8)
    victim = train_step.create_plain(train_step.SCALES["demo"])
    student = train_step.create_student("r2plus1d_tiny", 12)
    view, small = train_step.prepare_one(clip, victim, student, still, random.Random(0))
    ours = create_views(clip[None], [b"key"], still)
    torch.testing.assert_close(view, ((ours - victim.mean) / victim.std)[0])
    smaller = ((fit_clips(ours, None, student.size) - student.mean) / student.std)[0]
    assert small.shape == smaller.shape
    assert torch.corrcoef(torch.stack([small.flatten(), smaller.flatten()]))[0, 1] > 0.8  # one of them is antialiased


def test_flops_are_the_published_ones():
    flops = train_step.count_flops(train_step.SCALES["full"])
    assert flops["victim"] == pytest.approx(2 * 282e9, rel=0.01)  # Liu et al. 2021 count multiply-adds
    assert flops["student"] == pytest.approx(3 * 2 * 152e9, rel=0.01)  # Tran et al. 2018, forward; backward is twice that


def test_profile_says_how_far_each_part_is_from_the_peak(capsys):
    train_step.main(train_step.Config(**TINY, profile=True))
    shares = re.findall(r"^(\w+): .* ms: (\S+) % of the peak", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in shares] == ["victim", "student"]
    assert all(0 < float(share) < 100 for _, share in shares)


def test_growth_runs_points_in_processes_of_their_own_and_draws_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train_step.GROWTH, "demo", dict(batch_size=(2,), processes=(1,)))
    train_step.main(train_step.Config(**TINY, growth=True, axes=("batch_size", "processes"), out=str(tmp_path / "growth.png")))
    out = capsys.readouterr().out
    points = re.findall(r"^(?:batch_size +2|processes +1) +(\S+) +(\d+) MiB", out, re.MULTILINE)
    assert len(set(points)) == 1  # the usual one, measured once
    assert len(points) == 2
    assert float(points[0][0]) > 0
    assert int(points[0][1]) > int(re.search(r"(\d+) MiB of it before", out)[1]) > 50
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_an_unknown_axis_or_row_is_one_line():
    with pytest.raises(UserError, match="--axes clips: there are batch_size"):
        train_step.main(train_step.Config(**TINY, growth=True, axes=("clips",)))
    with pytest.raises(UserError, match="--alone theirs: there are 2022"):
        train_step.main(train_step.Config(**TINY, alone="theirs"))


@pytest.fixture
def data_free_config():
    return data_free_step.Config(scale="demo", batch_size=2, turns=1, memory=False, device="cpu", precision="fp32")


def test_data_free_step_prints_rates_of_the_same_bill(data_free_config, capsys):
    data_free_step.main(data_free_config)
    out = capsys.readouterr().out
    rows = read_rows(out, data_free_step.ROWS)
    queries = int(re.search(r"an iteration is (\d+) queries", out)[1])
    assert queries == 2 * (1 + 2 + 5)
    for rate, seconds, ratio in rows.values():
        assert rate * seconds == pytest.approx(queries, rel=0.1)
        assert ratio == pytest.approx(rate / rows["2022"][0], abs=0.02)


def test_data_free_full_size_has_the_published_constants(data_free_config):
    config = data_free_step.Config(scale="full", device="cpu")
    scale, constants = data_free_step.choose_constants(config, data_free_step.choose_compute("cpu"))
    assert (scale, constants.generator, constants.batch_size, constants.smoothing) == ("full", "dvdgan", 128, 1e-3)
    assert (constants.num_directions, constants.student_steps, constants.replay_steps) == (10, 5, 10)
    assert data_free_step.count_queries(constants) == 2048


def test_an_iteration_with_another_bill_is_noticed(data_free_config, tmp_path, monkeypatch):
    compute = data_free_step.choose_compute("cpu")
    scale, constants = data_free_step.choose_constants(data_free_config, compute)
    monkeypatch.setattr(data_free_step.Attacker, "step_student", lambda attacker: None)
    monkeypatch.setattr(data_free_step.Attacker, "step_replay", lambda attacker: None)
    with pytest.raises(UserError, match="asked about 6 clips, not 16"):
        data_free_step.build_ours(scale, constants, compute, tmp_path)()


def test_a_row_alone_is_json(data_free_config, capsys):
    data_free_step.main(data_free_step.replace(data_free_config, alone="2022"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0
    assert found["memory"] > 2**26
