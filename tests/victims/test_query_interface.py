"""The query interface: metered, and nothing but answers comes out of it."""

import gc
import types

import pytest
import torch

from extraction.errors import BudgetExhausted
from extraction.victims.query_interface import ANSWERS, shape_answers
from extraction.victims.zoo import load_model, load_victim


@pytest.fixture
def clips(random_clips) -> torch.Tensor:
    return random_clips(6, 3, 16, 48, 48)


def test_counts_each_clip_and_stops_before_the_budget_is_passed(clips):
    victim = load_victim("demo_swin", query_budget=8)
    victim.query(clips)
    assert (victim.num_queries, victim.queries_left) == (6, 2)
    with pytest.raises(BudgetExhausted, match="6 of 8 queries spent, 3 more"):
        victim.query(clips[:3])
    assert victim.num_queries == 6  # the refused clips were not counted
    victim.query(clips[:2])
    assert victim.queries_left == 0


def test_answer_types_are_what_they_are_called(clips):
    logits = load_model("demo_swin")(clips)
    outputs = {kind: load_victim("demo_swin", answers=kind).query(clips) for kind in ANSWERS}
    torch.testing.assert_close(outputs["logits"], logits)
    torch.testing.assert_close(outputs["probs"], logits.softmax(1))
    assert torch.equal(outputs["label"], logits.argmax(1))
    assert outputs["label"].dtype == torch.int64
    assert ((outputs["top5"] > 0).sum(1) == 5).all()
    assert torch.equal(outputs["top5"].max(1).values, outputs["probs"].max(1).values)


def test_rounding_hides_digits(clips):
    outputs = load_victim("demo_swin", decimals=2).query(clips)
    torch.testing.assert_close(outputs * 100, (outputs * 100).round(), atol=1e-4, rtol=0)
    assert torch.equal(shape_answers(torch.tensor([[0.0, 3.0]]), "probs", 1), torch.tensor([[0.0, 1.0]]))


def test_no_gradient_comes_through_the_query_interface(clips):
    clips.requires_grad_(True)
    assert not load_victim("demo_swin").query(clips).requires_grad


def test_no_attribute_of_the_query_interface_leads_to_the_model():
    victim = load_victim("demo_swin")
    seen, todo = set(), [victim]
    while todo:  # every object reachable through attributes and containers
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, (torch.nn.Module, torch.Tensor)), thing
        if isinstance(thing, types.MethodType):
            todo.append(thing.__self__)
        elif isinstance(thing, (list, tuple, set, dict)):
            todo += list(thing.values()) if isinstance(thing, dict) else list(thing)
        elif not isinstance(thing, (str, int, float, type(None))):
            names = [name for name in dir(thing) if not name.startswith("__")]
            todo += [getattr(thing, name) for name in names]
    gc.collect()
