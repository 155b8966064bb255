"""Live attacks: metered, bounded, resumed without asking again; and what is left of finite differences."""

import dataclasses
from pathlib import Path

import pytest
import torch

from extraction.attacks.data_free import Attacker
from extraction.attacks.distill import Training
from extraction.audit.live import SLOPE_DIRECTIONS, Estimate, Live, compare_slopes
from extraction.audit.plan import AT_REST, CONTROLS, CRAFTED, DATA_FREE, OWN_VIEWS, Cell, list_live_wires, plan_live
from extraction.audit.students import Recipe
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.data.queries import QuerySet
from extraction.evaluation.scoring import Evaluator
from extraction.generators import create_generator
from extraction.network import VideoModel
from extraction.runs import Run
from extraction.students import create_student
from extraction.victims.query_interface import Victim, VictimModel
from extraction.victims.zoo import load_model

SHAPE = dict(num_frames=8, size=32)
BATCH, BUDGET = 4, 64  # two iterations of 4 * (1 + 2 + 5) queries


@pytest.fixture(scope="module")
def model() -> VictimModel:
    return load_model("demo_swin")


@pytest.fixture
def make_live(demo_set, model):
    classes = model.classes
    val = Clips(find_videos(demo_set / "val", classes), **SHAPE)
    own = Clips(find_videos(demo_set / "train_5per", classes), **SHAPE)

    def make(folder: Path) -> Live:
        return Live(
            open_run=lambda cell: Run(cell.row, folder / cell.name, cell, 300.0), model=model, key=b"k" * 32,
            parameters={("modelguard_w", 0.3): 0.3}, create=lambda: create_student("r2plus1d_tiny", len(classes)),
            create_generator=lambda: create_generator("layered", len(classes), 8, 32),
            queries=QuerySet(own, Augmentation(0.0, 0.1, 3.0), None, 0), clip_shape=(3, 8, 32, 32), batch_size=BATCH,
            num_workers=0, recipe=Recipe(64, 1e-3, 1e-3, 1.0), estimate=Estimate(2, 0.03, 1e-3),
            evaluator=Evaluator(val, classes, torch.device("cpu"), 8, 0),
        )  # fmt: skip

    return make


@pytest.fixture
def meter(monkeypatch) -> list[tuple[str, int]]:
    """The wire and the number of clips of all answers that a thief's interface gave."""
    answered: list[tuple[str, int]] = []
    query = Victim.query

    def count(self, clips):
        answers = query(self, clips)
        if self.query_budget is not None:  # the owner's own look has none
            answered.append((self.wire, len(clips)))
        return answers

    monkeypatch.setattr(Victim, "query", count)
    return answered


@pytest.mark.parametrize("attacker", [DATA_FREE, pytest.param(AT_REST, marks=pytest.mark.slow), CRAFTED, OWN_VIEWS])
def test_a_live_attack_spends_its_budget_and_its_bill_is_what_was_answered(attacker, make_live, meter, tmp_path):
    result = make_live(tmp_path).run(Cell(group="live", attacker=attacker, wire="uint8", budget=BUDGET))
    assert result["num_queries"] == sum(count for _, count in meter) == BUDGET
    assert {wire for wire, _ in meter} == {"uint8"}
    assert 0 <= result["scores"]["top1"] <= 1
    assert ("slopes" in result) == (attacker in (DATA_FREE, AT_REST))


@pytest.mark.parametrize(
    ("attacker", "of", "step"),
    [pytest.param(DATA_FREE, Attacker, "step_replay", marks=pytest.mark.slow), (CRAFTED, Training, "step")],
)
def test_a_killed_attack_goes_on_without_asking_again(attacker, of, step, make_live, meter, tmp_path, monkeypatch):
    cell = Cell(group="live", attacker=attacker, wire="float", defence="modelguard_w", strength=0.3, budget=BUDGET)
    whole = make_live(tmp_path / "whole").run(cell)
    meter.clear()
    calls = []

    real = getattr(of, step)

    def die(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(of, step, die)
        with pytest.raises(KeyboardInterrupt):
            make_live(tmp_path / "killed").run(cell)
    before = sum(count for _, count in meter)
    assert 0 < before < BUDGET
    live = make_live(tmp_path / "killed")
    assert live.run(cell) == whole
    assert sum(count for _, count in meter) == BUDGET
    live.forget(cell)
    assert not list(tmp_path.glob("killed/*/state.pt"))
    assert list(tmp_path.glob("killed/*/ledger.sqlite"))


def test_a_defence_stands_before_a_live_attack(make_live, tmp_path):
    cell = Cell(group="live", attacker=OWN_VIEWS, wire="float", budget=16)
    live = make_live(tmp_path)
    run = live.open_run(cell)
    clips = torch.rand(2, 3, 8, 32, 32)
    plain = live._open_victim(cell, run).query(clips, [b"a", b"b"])
    behind = dataclasses.replace(cell, defence="modelguard_w", strength=0.3)
    defended = live._open_victim(behind, live.open_run(behind)).query(clips, [b"a", b"b"])
    assert (plain - defended).abs().sum(1).max() > 0.25
    assert torch.equal(plain.argmax(1), defended.argmax(1))


def give_opinion(clips: torch.Tensor) -> torch.Tensor:
    """A student of two classes."""
    return clips.flatten(1)[:, :2]


class Threshold(torch.nn.Module):
    """Two classes, by brightness."""

    def forward(self, clips):
        bright = 4 * (clips.mean((1, 2, 3, 4)) - 0.5)
        return torch.stack([-bright, bright], 1)


def test_slopes_are_kept_by_exact_answers_and_lost_by_rounded_ones():
    network = VideoModel.__new__(VideoModel)
    torch.nn.Module.__init__(network)
    network.forward = Threshold().forward
    model = VictimModel(network, ["dark", "bright"], "threshold", "f")
    start = torch.randn(6, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = Victim(model, "probs")

    def compare(behind: Victim, step: float) -> float:
        rng = torch.Generator().manual_seed(1)
        return compare_slopes(exact, behind, torch.sigmoid, give_opinion, start, 0.1, step, SLOPE_DIRECTIONS, rng)

    assert compare(Victim(model, "probs"), 0.1) == pytest.approx(1.0)
    assert compare(Victim(model, "label"), 0.1) == 0.0
    assert compare(Victim(model, "probs", decimals=1), 0.1) < 0.3
    rounded = [compare(Victim(model, "probs", wire="uint8"), step) for step in (0.1, 5.0)]
    assert rounded[0] < 0.9 < rounded[1]


def test_every_live_attack_has_a_control_of_as_many_queries_within_the_budget():
    cells = plan_live("probs", ["1 decimal"], [("modelguard_w", 0.3)], "float", 1280, 16, 2)
    assert len({cell.name for cell in cells}) == len(cells)
    budgets = {cell.attacker: cell.budget for cell in cells}
    for attack, control in CONTROLS.items():
        assert 0 < budgets[attack] == budgets[control] <= 1280
    assert budgets[DATA_FREE] % (16 * 8) == 0
    assert {cell.wire for cell in cells if cell.attacker == CRAFTED and cell.defence is None} == {"float", "uint8", "h264:23"}
    assert list_live_wires("h264:30")[-1] == "h264:30"
    assert not plan_live("probs", [], [], "float", 15, 16, 2)
    assert {cell.attacker for cell in plan_live("probs", [], [], "float", 100, 16, 2)} == {CRAFTED, OWN_VIEWS}
