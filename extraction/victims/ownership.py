"""Ownership: whether a suspect model has learned a victim's watermark, DAWN's (Szyller et al., 1906.00830).

`defences.watermark` gave some clips a wrong answer on purpose, the same one for nearly equal clips. A model that was trained on
the victim's answers repeats some of them. A model that was not may repeat some too, by chance or because the wrong answer is a
likely mistake: how many is measured on null models, trained without the victim, never assumed to be 1 in num_classes.
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
    """A suspect tested for a watermark."""

    repeated: float  # share of the triggers on which the suspect gives the watermark's label
    null: float  # share that null models repeat: the upper end of a 95 % interval, or the greatest of one model
    p: float  # probability of as many or more, of a model that repeats as null models do


def verify(suspect: Tensor, nulls: Sequence[Tensor], labels: Tensor) -> Claim:
    """Test a suspect's predictions (N,) for N triggers with watermark labels (N,), beside those of null models, (N,) each.

    The chance of repeating a label is the greater of two: the upper 95 % bound (Clopper and Pearson) of what all null models
    together repeat, and the rate of the null model that repeats most. A binomial tail gives p.
    """
    from scipy.stats import beta, binom  # here: it takes a second to import

    if not len(labels):
        raise UserError("no watermark to test: no answer was chosen to carry it; ask for a higher rate or more queries")
    if not nulls:
        raise UserError("a watermark is tested beside null models: train one at least without the victim's answers")
    counts = [int((null == labels).sum()) for null in nulls]
    repeated, total = sum(counts), len(labels) * len(nulls)
    bound = 1.0 if repeated == total else float(beta.ppf(0.95, repeated + 1, total - repeated))
    chance = max(bound, max(counts) / len(labels))
    matches = int((suspect == labels).sum())
    return Claim(matches / len(labels), chance, float(binom.sf(matches - 1, len(labels), chance)))


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
