"""Ownership: whether a suspect model was trained on a victim's answers, by a watermark or by clips that the victim confers.

The watermark is DAWN's (Szyller et al., 1906.00830): `defences.watermark` gave some clips a wrong answer on purpose, the same
one for nearly equal clips. A model that was trained on the victim's answers repeats some of them. A model that was not may
repeat some too, by chance or because the wrong answer is a likely mistake: how many is measured on null models, trained without
the victim, never assumed to be 1 in num_classes.

Conferred clips are clips as they are, on which clones answer as the victim does and null models do not, after the conferrable
examples of Lukas et al. (1912.00888), which are adversarial. No answer is wrong for them, and a suspect need show labels alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from extraction.errors import UserError
from extraction.victims.defences import read_record
from extraction.victims.ledger import open_existing, read_records


class Claim(NamedTuple):
    """A suspect tested for a watermark, or on conferred clips."""

    repeated: float  # share of the triggers on which the suspect gives the watermark's label, or of the clips the victim's
    null: float  # share that null models repeat: the upper end of a 95 % interval, or the greatest of one model
    p: float  # probability of as many or more, of a model that repeats as null models do


def verify(suspect: Tensor, nulls: Sequence[Tensor], labels: Tensor) -> Claim:
    """Test a suspect's predictions (N,) for N triggers with watermark labels (N,), beside those of null models, (N,) each.

    The chance of repeating a label is the greater of two: the upper 95 % bound (Clopper and Pearson) of what all null models
    together repeat, and the rate of the null model that repeats most. A binomial tail gives p.
    """
    if not len(labels):
        raise UserError("no watermark to test: no answer was chosen to carry it; ask for a higher rate or more queries")
    if not nulls:
        raise UserError("a watermark is tested beside null models: train one at least without the victim's answers")
    chance = _bound_chance([int((null == labels).sum()) for null in nulls], [len(labels)] * len(nulls))
    return _claim(suspect, labels, chance)


def _bound_chance(matches: Sequence[int], totals: Sequence[int]) -> float:
    """The upper 95 % bound of what null models repeat together, `matches` of `totals` each, or the greatest rate of one."""
    from scipy.stats import beta  # here: it takes a second to import

    repeated, total = sum(matches), sum(totals)
    bound = 1.0 if repeated == total else float(beta.ppf(0.95, repeated + 1, total - repeated))
    return max(bound, *(match / count for match, count in zip(matches, totals, strict=True)))


def _claim(suspect: Tensor, labels: Tensor, chance: float) -> Claim:
    from scipy.stats import binom

    matches = int((suspect == labels).sum())
    return Claim(matches / len(labels), chance, float(binom.sf(matches - 1, len(labels), chance)))


class Conferred(NamedTuple):
    """Clips that a victim confers on its clones."""

    places: Tensor  # int64 (M,), of the clips that suspects are tested on
    null: float  # share on which an innocent model answers as the victim, at most: see `_bound_chance`


def fit_conferred(victim: Tensor, clones: Sequence[Tensor], nulls: Sequence[Tensor], to_fit: Tensor) -> Conferred:
    """Choose clips by the victim's top classes (N,), those of some clones and those of some null models, (N,) each.

    Chosen are the clips on which all clones and no null model answer as the victim does. Suspects are tested on those where
    `to_fit`, bool (N,), is false. What an innocent model repeats is measured where it is true: each null model on the clips
    that the others choose. Raises UserError without a clone or two null models, and where nothing is chosen.
    """
    if not clones or len(nulls) < 2:
        raise UserError("conferred clips are chosen by a clone at least and two models trained without the victim")

    def choose(others: Sequence[Tensor]) -> Tensor:
        agreed = torch.stack([clone == victim for clone in clones]).all(0)
        return agreed & ~torch.stack([null == victim for null in others]).any(0)

    places = (choose(nulls) & ~to_fit).nonzero()[:, 0]
    matches, totals = [], []
    for number, null in enumerate(nulls):
        chosen = choose([*nulls[:number], *nulls[number + 1 :]]) & to_fit
        if chosen.any():
            matches.append(int((null == victim)[chosen].sum()))
            totals.append(int(chosen.sum()))
    if not len(places) or not totals:
        raise UserError("no clip is conferred on the clones alone: the models that were trained without the victim know it too")
    return Conferred(places, _bound_chance(matches, totals))


def verify_conferred(suspect: Tensor, victim: Tensor, conferred: Conferred) -> Claim:
    """Test a suspect's top classes (N,) on conferred clips. Neither it nor its like may have been fitted to.

    A binomial tail gives p, which takes clips for independent: of each video there should be one.
    """
    return _claim(suspect[conferred.places], victim[conferred.places], conferred.null)


def count_false_claims(nulls: Sequence[Tensor], labels: Tensor, level: float = 1e-3) -> int:
    """How many null models would be claimed at this level, each tested beside the others."""
    rest = [[other for other in nulls if other is not null] for null in nulls]
    return sum(verify(null, others, labels).p < level for null, others in zip(nulls, rest, strict=True))


def read_triggers(ledger: str | Path) -> tuple[Tensor, Tensor]:
    """The clips, uint8 (N, 3, T, H, W), and labels, int64 (N,), of the watermark that a ledger's defence left in answers."""
    database, _ = open_existing(ledger)
    records = [read_record(record) for record in read_records(database)]
    found = [record for record in records if "triggers" in record]
    database.close()
    if not found:
        raise UserError(f"{ledger}: no answer in it carries a watermark (--defence dawn)")
    return torch.cat([record["triggers"] for record in found]), torch.cat([record["labels"] for record in found])
