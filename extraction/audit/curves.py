"""Agreement against queries, of separate students at a few budgets: how many queries an agreement takes, and the reverse."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from extraction.errors import UserError


class Reached(NamedTuple):
    """How many queries an agreement takes."""

    queries: float | None  # None: more than the largest budget
    bound: str  # "interpolated"; "at most": the smallest budget has it; "not reached"


def average_seeds(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """The mean agreement of each budget, ascending, from (budget, agreement) of every student."""
    budgets: dict[int, list[float]] = {}
    for budget, agreement in points:
        budgets.setdefault(budget, []).append(agreement)
    return {budget: mean(budgets[budget]) for budget in sorted(budgets)}


def queries_to(curve: Mapping[int, float], level: float) -> Reached:
    """The queries at which a curve, budget -> agreement, first has `level`: linear in the logarithm between two budgets."""
    if not curve:
        raise UserError("no student to read queries off")
    points = sorted(curve.items())
    if points[0][1] >= level:
        return Reached(float(points[0][0]), "at most")
    for (low, below), (high, above) in pairwise(points):
        if above >= level:
            share = (level - below) / (above - below)
            return Reached(math.exp(math.log(low) + share * (math.log(high) - math.log(low))), "interpolated")
    return Reached(None, "not reached")


def agreement_at(curve: Mapping[int, float], queries: float, without: float) -> float:
    """The agreement@1 after `queries` queries: that of the largest budget beyond it, and `without` any at none.

    Below the smallest budget it is linear in the queries, above linear in their logarithm.
    """
    points = sorted(curve.items())
    if queries <= points[0][0]:
        return without + (points[0][1] - without) * queries / points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if queries <= high:
            return below + (above - below) * math.log(queries / low) / math.log(high / low)
    return points[-1][1]
