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
    bound: str  # "interpolated"; "none": without any; "at most": the smallest budget has it; "not reached"


def average_seeds(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """The mean agreement of each budget, ascending, from (budget, agreement) of every student."""
    budgets: dict[int, list[float]] = {}
    for budget, agreement in points:
        budgets.setdefault(budget, []).append(agreement)
    return {budget: mean(budgets[budget]) for budget in sorted(budgets)}


def queries_to(curve: Mapping[int, float], level: float) -> Reached:
    """The queries at which a curve, budget -> agreement, first has `level`.

    Linear in the logarithm between two budgets, in the queries themselves from none (a budget of 0) to the first.
    """
    if not curve:
        raise UserError("no student to read queries off")
    points = sorted(curve.items())
    if points[0][1] >= level:
        return Reached(float(points[0][0]), "at most" if points[0][0] else "none")
    for (low, below), (high, above) in pairwise(points):
        if above >= level:
            share = (level - below) / (above - below)
            return Reached(low * (high / low) ** share if low else share * high, "interpolated")
    return Reached(None, "not reached")


def agreement_at(curve: Mapping[int, float], queries: float) -> float:
    """The agreement@1 after `queries` queries, by a curve that begins at none (0): that of the largest budget beyond it.

    Interpolated as by `queries_to`.
    """
    points = sorted(curve.items())
    for (low, below), (high, above) in pairwise(points):
        if queries <= high:
            return below + (above - below) * (math.log(queries / low) / math.log(high / low) if low else queries / high)
    return points[-1][1]
