"""The plan: what is trained, on how many queries, and what it refuses."""

import pytest

from extraction.audit.plan import SCALES, Cell, Prices, estimate_seconds, list_attackers, plan_budgets, plan_cells
from extraction.victims.defences import DEFENCES

SHAPE = dict(num_clips=2640, views_per_clip=4, most=None, batch_size=16, epochs=9, answers=(), defences=())


@pytest.mark.parametrize("name", SCALES)
def test_every_cell_has_a_name_of_its_own_and_shares_a_student_of_an_earlier_one(name):
    plan = plan_cells(SCALES[name], **SHAPE)
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(plan.cells):
        assert cell.budget <= plan.budgets[-1]
        if cell.same_as and cell.answers != "logits":
            assert cell.same_as in names[:number]
    recorded = [cell for cell in plan.cells if cell.group != "live"]
    planned = [cell for cell in recorded if cell.same_as is None or cell.group == "alarms"]  # what an alarm may change
    assert plan.num_students == len(planned) < len(recorded)


def test_the_top_class_of_a_defence_that_keeps_it_is_the_label_row():
    plan = plan_cells(SCALES["default"], **SHAPE)
    label = Cell(group="answers", answers="label", budget=10_560).name
    for cell in plan.cells:
        if cell.attacker == "top-1" and cell.group == "defences":
            assert cell.same_as == (None if DEFENCES[cell.defence].lies else label)


def test_live_attacks_are_in_the_estimate_and_a_coarser_wire_costs_more():
    with_live, without = (plan_cells(SCALES["quick"]._replace(live_budget=most), **SHAPE) for most in (1280, 0))
    assert without.live_queries == 0 < with_live.live_queries
    assert with_live.num_students == without.num_students
    prices = Prices(step=1.0, predict=0.0, answer=1.0, generate=1.0, craft=1.0, encode=0.0)
    more = [estimate_seconds(plan, prices, 0, 0, 0) for plan in (without, with_live)]
    assert 1.05 * 2 * with_live.live_queries < more[1] - more[0] < 1.05 * 4 * with_live.live_queries
    assert estimate_seconds(with_live, prices._replace(encode=1.0), 0, 0, 0) > more[1] + 1280


def test_budgets_are_each_a_quarter_of_the_next():
    assert plan_budgets(SCALES["default"], 10_560, None, 16) == [165, 660, 2640, 10_560]
    assert plan_budgets(SCALES["quick"], 10_560, 1000, 16) == [62, 250, 1000]


def test_one_view_has_no_attacker_who_averages():
    assert "averaged views" not in list_attackers("noise", "probs", 1)
    assert list_attackers("misinformation", "probs", 4) == ["naive", "top-1", "sure answers", "averaged views"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (dict(most=100), "a budget of 100 queries is too small: the smallest of 3 would be 6, less than a batch of 16"),
        (dict(answers=("top9",)), "--answers top9: there are logits, probs, top5"),
        (dict(defences=("nonsense",)), "--defence nonsense: there are noise"),
        (dict(defences=("dawn",)), "--defences dawn: not one with a strength"),
        (dict(answers=("label",), defences=("modelguard_w",)), "--defence modelguard_w keeps the top class"),
    ],
)
def test_what_cannot_be_is_one_line(changed, line, error_line):
    assert error_line(plan_cells, SCALES["quick"], **SHAPE | changed).startswith(line)


def test_label_answers_are_audited_behind_the_defences_that_lie():
    plan = plan_cells(SCALES["quick"], **SHAPE | dict(answers=("label",)))
    assert {cell.defence for cell in plan.cells if cell.group == "defences"} == {"noise", "misinformation"}
    assert {cell.answers for cell in plan.cells} == {"label"}
    assert {cell.defence for cell in plan.cells if cell.group == "alarms"} == {None, "misinformation"}  # it shows labels anyway
