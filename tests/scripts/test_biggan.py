"""The BigGAN scripts: exact queries of search and distillation, and budgets that end in either."""

import json

import pytest
import torch

from black_box import biggan_with_movinet, biggan_with_swin
from extraction.errors import UserError
from extraction.victims import ledger
from extraction.weights import save_weights


def small(script, demo_set, out_dir, **changes):
    constants = script.DEMO | dict(
        demo=False, victim="demo_swin", val=str(demo_set / "val"), num_random=40, population=6, num_steps=2, codes_per_class=2,
        clips_per_class=2, epochs=3, views_per_clip=2, out_dir=str(out_dir),
    )  # fmt: skip
    return script.Config(**constants | changes)


@pytest.mark.parametrize("script", [biggan_with_swin, pytest.param(biggan_with_movinet, marks=pytest.mark.slow)])
def test_num_queries_is_the_docstrings_formula(script, demo_set, tmp_path):
    results = script.main(small(script, demo_set, tmp_path / "run"))
    steps = sum(entry["steps"] for entry in results["search"])
    assert 0 < steps <= 12 * 2
    assert results["search_queries"] == 40 + 6 * steps
    assert results["num_queries"] == 40 + 6 * steps + 12 * 2 * 2 == ledger.count(str(tmp_path / "run" / "ledger.sqlite"))
    assert results["unreached"] == [entry["class"] for entry in results["search"] if entry["confidence"] <= 0.9]
    assert len(results["unreached"]) < 12


def test_a_budget_that_ends_in_the_search_leaves_a_student_and_says_that_it_is_untrained(demo_set, tmp_path, capsys):
    config = small(biggan_with_swin, demo_set, tmp_path / "run", query_budget=20)
    for repeated in (False, True):
        results = biggan_with_swin.main(config)
        out = capsys.readouterr().out
        assert "query budget exhausted: 20 of 20 queries used; run again with a larger --query-budget" in out
        assert ("untrained" in out) != repeated
        assert results["stopped"] == "query budget"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["num_queries"], results["search_queries"], results["history"][0]["loss"]) == (20, 20, None)


def test_no_budget_at_all_ends_with_one_line(demo_set, tmp_path, error_line):
    config = small(biggan_with_swin, demo_set, tmp_path / "run", query_budget=0)
    assert error_line(biggan_with_swin.main, config) == "--query-budget 0: no room for a single query"


def test_weights_of_another_network_are_found_before_the_first_query(demo_set, tmp_path):
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    config = small(biggan_with_swin, demo_set, tmp_path / "run", student_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"other\.safetensors"):
        biggan_with_swin.main(config)
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


@pytest.mark.slow
def test_a_budget_that_ends_in_search_or_distillation_is_not_passed(demo_set, tmp_path):
    free = biggan_with_swin.main(small(biggan_with_swin, demo_set, tmp_path / "free", num_steps=1))
    searched, whole = free["search_queries"], free["num_queries"]
    for budget, epoch in ((searched - 1, 1), (whole - 1, 2)):
        config = small(biggan_with_swin, demo_set, tmp_path / "short", query_budget=budget, num_steps=1)
        results = biggan_with_swin.main(config)
        assert results["stopped"] == "query budget"
        assert results["history"][-1]["epoch"] == epoch
        assert json.loads((tmp_path / "short" / "results.json").read_text())["num_queries"] == budget
    again = biggan_with_swin.main(small(biggan_with_swin, demo_set, tmp_path / "short", num_steps=1))
    assert (again["num_queries"], again["stopped"]) == (whole, "epochs")
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("free", "short")]
    assert students[0] == students[1]
