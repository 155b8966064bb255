"""Queries to an agreement, read off students of a few budgets."""

import pytest

from extraction.audit.curves import agreement_at, average_seeds, queries_to


def test_queries_are_interpolated_in_their_logarithm():
    curve = {100: 0.2, 400: 0.4, 1600: 0.8}
    assert queries_to(curve, 0.3).queries == pytest.approx(200)
    assert queries_to(curve, 0.6) == (pytest.approx(800), "interpolated")
    assert queries_to(curve, 0.8).queries == pytest.approx(1600)
    assert queries_to({0: 0.1} | curve, 0.15) == (pytest.approx(50), "interpolated")


def test_what_is_not_reached_is_said_and_so_is_what_the_smallest_budget_has():
    curve = {100: 0.5, 400: 0.6}
    assert queries_to(curve, 0.7) == (None, "not reached")
    assert queries_to(curve, 0.4) == (100.0, "at most")
    assert queries_to({0: 0.4} | curve, 0.4) == (0.0, "none")


def test_a_curve_that_falls_is_read_at_its_first_crossing():
    assert queries_to({100: 0.2, 400: 0.6, 1600: 0.5}, 0.4).queries == pytest.approx(200)


def test_seeds_are_averaged():
    assert average_seeds([(400, 0.5), (100, 0.2), (400, 0.7)]) == {100: 0.2, 400: pytest.approx(0.6)}


def test_agreement_after_some_queries_starts_at_that_of_none():
    curve = {0: 0.1, 100: 0.4, 400: 0.6}
    assert agreement_at(curve, 0) == pytest.approx(0.1)
    assert agreement_at(curve, 50) == pytest.approx(0.25)
    assert agreement_at(curve, 200) == pytest.approx(0.5)
    assert agreement_at(curve, 9999) == pytest.approx(0.6)
