"""Detectors: whether an account's queries look like an extraction.

A detector watches one account. It is shown what the service sees of each query, a thumbnail of the clip and the true
probabilities, in the order of the queries, and raises its alarm at one of them; an alarm stays. Its constants come from honest
accounts alone (`fit`), never from attacks, and its false alarms are counted on other honest accounts than these
(`count_false_alarms`).

`quota` counts queries, and is what every other one must beat. `prada` looks at the shape of nearest-neighbour distances
(Juuti et al., 1805.02628), `near_duplicates` counts pairs of nearly equal queries (SEAT: Zhang et al., AISec 2021), and
`confidence` compares the histogram of the victim's confidence with honest ones by HODA's rule (Sadeghzadeh et al., 2106.11424).
What each keeps of an account has a bound.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from extraction.errors import UserError


class Stream(NamedTuple):
    """An account's queries, in their order."""

    thumbnails: Tensor  # uint8 (N, 3, 4, 8, 8)
    probs: Tensor  # float (N, num_classes), the victim's true ones
    uploads: Tensor | None = None  # int64 (N,): the upload that a clip is cut from; None: each its own


class Detector(Protocol):
    """Watches one account: `observe` its next queries, and say for each whether the alarm is raised by then, bool (B,)."""

    def observe(self, stream: Stream) -> Tensor: ...


def thumbnail(clips: Tensor) -> Tensor:
    """Thumbnails of 4 frames, 8 x 8: float (B, 3, T, H, W) RGB clips in [0, 1] -> uint8 (B, 3, 4, 8, 8), on the CPU."""
    return (F.adaptive_avg_pool3d(clips.float(), (4, 8, 8)) * 255).round().clamp(0, 255).byte().cpu()


def first_alarm(detector: Detector, stream: Stream, batch_size: int = 100) -> int | None:
    """The number of the query, from 0, at which the alarm is raised; None: at none of the stream."""
    for start in range(0, len(stream.probs), batch_size):
        now = slice(start, start + batch_size)
        part = Stream(stream.thumbnails[now], stream.probs[now], None if stream.uploads is None else stream.uploads[now])
        alarms = detector.observe(part).nonzero()
        if len(alarms):
            return start + int(alarms[0])
    return None


def _latch(raised: bool, alarms: Sequence[bool]) -> Tensor:
    """Whether the alarm is raised by each query, given whether it was before them, and at which of them."""
    return torch.tensor(np.logical_or.accumulate([raised, *alarms])[1:], dtype=torch.bool)


class _Latest:
    """The latest `limit` of the rows appended, in no order, in an array that grows with them."""

    def __init__(self, limit: int):
        self.limit, self._count, self._room = limit, 0, np.empty(0)

    def append(self, row: np.ndarray) -> None:
        if self._count == len(self._room) < self.limit:
            longer = np.empty((min(max(16, 2 * self._count), self.limit), *row.shape), row.dtype)
            longer[: self._count] = self._room.reshape(self._count, *row.shape)
            self._room = longer
        self._room[self._count % self.limit] = row
        self._count += 1

    @property
    def rows(self) -> np.ndarray:
        return self._room[: self._count]


# --- quota ---------------------------------------------------------------------------------------------------------------


class Quota:
    """The control: an alarm at the first query beyond `limit`."""

    def __init__(self, limit: int):
        self.limit, self._count = limit, 0

    def observe(self, stream: Stream) -> Tensor:
        numbers = torch.arange(self._count, self._count + len(stream.probs))
        self._count += len(numbers)
        return numbers >= self.limit


def fit_quota(honest: Sequence[Stream]) -> dict[str, Any]:
    """As many queries as the busiest honest account makes."""
    return dict(limit=max(len(account.probs) for account in honest))


# --- PRADA ---------------------------------------------------------------------------------------------------------------


class Prada:
    """PRADA (Juuti et al., EuroS&P 2019): distances between honest queries are normally distributed, a crafted attack's not.

    Each predicted class has a growing set. The L2 distance of a query to the nearest of the set is kept, and it joins the set
    when that is more than the class's threshold, the greatest mean - deviation that the set's own distances had so far. At
    every tenth query, from the first on, the distances of all classes that have ten or more, without those 3 deviations off,
    are tested when they are more than 100: an alarm when Shapiro-Wilk's W is below `delta`. As published, but on thumbnails,
    with an alarm that stays, and with the latest `memory` of each set and the latest 5000 distances at most.
    """

    def __init__(self, delta: float = 0.9, memory: int = 500):
        self.delta, self.memory = delta, memory
        self.statistic = np.inf  # the least W so far
        self._raised, self._num_queries = False, 0
        self._sets: dict[int, _Latest] = {}
        self._thresholds: dict[int, float] = {}
        self._sums: dict[int, tuple[int, float, float]] = {}  # of a set's distances: their number, sum and sum of squares
        self._distances = _Latest(5000)  # of all classes: class and distance
        self._counts: Counter[int] = Counter()

    def observe(self, stream: Stream) -> Tensor:
        pixels, classes = stream.thumbnails.flatten(1).numpy(), stream.probs.argmax(1).tolist()
        alarms = [self._add(query, label) for query, label in zip(pixels, classes, strict=True)]
        raised, self._raised = self._raised, self._raised or any(alarms)
        return _latch(raised, alarms)

    def _add(self, query: np.ndarray, label: int) -> bool:
        if label not in self._sets:
            self._sets[label] = _Latest(self.memory)
            self._sets[label].append(query)
            self._sums[label], self._thresholds[label] = (1, 0.0, 0.0), 0.0
        else:
            apart = self._sets[label].rows.astype(np.float32) - query
            distance = float(np.sqrt(np.einsum("nd,nd->n", apart, apart).min()))
            self._distances.append(np.array([label, distance]))
            self._counts[label] += 1
            if distance > self._thresholds[label]:
                self._sets[label].append(query)
                number, total, squares = self._sums[label]
                self._sums[label] = number, total, squares = number + 1, total + distance, squares + distance * distance
                mean = total / number
                deviation = max(squares / number - mean * mean, 0.0) ** 0.5
                self._thresholds[label] = max(self._thresholds[label], mean - deviation)
        self._num_queries += 1
        return self._num_queries % 10 == 1 and self._test() < self.delta

    def _test(self) -> float:
        from scipy.stats import shapiro  # here: it takes a second to import

        if len(self._distances.rows) <= 100:
            return np.inf
        labels, found = self._distances.rows.T
        found = found[np.isin(labels, [label for label, count in self._counts.items() if count >= 10])]
        found = found[np.abs(found - found.mean()) < 3 * found.std()] if len(found) else found
        if len(found) <= 100:
            return np.inf
        w = float(shapiro(found).statistic)
        self.statistic = min(self.statistic, w)
        return w


def fit_prada(honest: Sequence[Stream]) -> dict[str, Any]:
    """A little less than the least W of any honest account, the published 0.9 at most."""
    detectors = [Prada(delta=-1.0) for _ in honest]
    for detector, account in zip(detectors, honest, strict=True):
        detector.observe(account)
    least = min(detector.statistic for detector in detectors)
    if least == np.inf:
        raise UserError(
            "prada: no honest account has the more than 100 distances, in classes with 10 or more, that its test takes"
        )
    return dict(delta=min(0.9, least - 1e-3))


# --- near-duplicates -----------------------------------------------------------------------------------------------------

_PROJECTED = 32


class NearDuplicates:
    """SEAT's rule (Zhang et al., AISec 2021; after Chen et al., 1907.05587): an alarm at the `hits`-th nearly equal pair.

    A query is a hit when an earlier one of another upload is within `radius`, in thumbnails and square roots of
    probabilities, each divided by its honest spread; a random projection to 32 numbers stands for them. SEAT trains an encoder
    for this. Windows of one upload are no pairs: a service knows what they are cut from. The latest `memory` queries are
    kept, 140 bytes each.
    """

    def __init__(self, radius: float, scales: Sequence[float], hits: int = 50, memory: int = 100_000):
        self.radius, self.scales, self.hits = radius, tuple(scales), hits
        self._kept, self._squares, self._uploads = _Latest(memory), _Latest(memory), _Latest(memory)
        self._num_queries, self._num_hits = 0, 0

    def observe(self, stream: Stream) -> Tensor:
        hits = self._num_hits + (self.nearest(stream) <= self.radius).long().cumsum(0)
        self._num_hits = int(hits[-1]) if len(hits) else self._num_hits
        return hits >= self.hits

    def nearest(self, stream: Stream) -> Tensor:
        """The distance (B,) of each query to the nearest earlier one of another upload; it is kept for those to come."""
        numbers = range(self._num_queries, self._num_queries + len(stream.probs))
        self._num_queries += len(numbers)
        # Those which are an upload of their own have numbers that no upload has.
        uploads = [-1 - number for number in numbers] if stream.uploads is None else stream.uploads.tolist()
        found = []
        for query, upload in zip(self._project(stream), uploads, strict=True):
            distance = np.inf
            if len(self._kept.rows):
                # |k - q|^2 but for |q|^2, and the nearest one's exactly: rounding would swamp nearly equal ones.
                squares = self._squares.rows[:, 0] - 2 * (self._kept.rows @ query)
                if upload >= 0:
                    squares[self._uploads.rows[:, 0] == upload] = np.inf
                nearest = int(squares.argmin())
                if np.isfinite(squares[nearest]):
                    distance = float(np.linalg.norm(self._kept.rows[nearest] - query))
            found.append(distance)
            self._kept.append(query)
            self._squares.append(np.array([query @ query], np.float32))
            self._uploads.append(np.array([upload]))
        return torch.tensor(found)

    def _project(self, stream: Stream) -> np.ndarray:
        pixels, answers = stream.thumbnails.flatten(1).float() / self.scales[0], stream.probs.float().sqrt() / self.scales[1]
        features = torch.cat([pixels, answers], 1)
        matrix = torch.randn(features.shape[1], _PROJECTED, generator=torch.Generator().manual_seed(0))
        return (features @ matrix / _PROJECTED**0.5).numpy()


def fit_near_duplicates(honest: Sequence[Stream], rate: float = 0.001) -> dict[str, Any]:
    """The radius within which `rate` of the honest queries have an earlier one, of the same account and another upload."""
    pixels = torch.cat([account.thumbnails.flatten(1) for account in honest]).float()
    answers = torch.cat([account.probs for account in honest]).float().sqrt()
    scales = [max(float((each - each.mean(0)).square().sum(1).mean().sqrt()), 1e-6) for each in (pixels, answers)]
    found = torch.cat([NearDuplicates(0.0, scales).nearest(account) for account in honest])
    found = found[found.isfinite()]
    if not len(found):
        raise UserError("near_duplicates: no honest account has two queries of different uploads to fit a radius to")
    return dict(radius=found.double().quantile(rate).item(), scales=scales)


# --- confidence ----------------------------------------------------------------------------------------------------------

_LEVELS = 11  # as many as HODA has snapshots


def confidence_levels(probs: Tensor) -> Tensor:
    """How sure the victim is, in 11 levels of half a decade: (B, num_classes) -> int64 (B,).

    0: the other classes have more than 10^-0.5, 10: less than 10^-5. Even levels would put a sure victim into one.
    """
    others = probs.double().sort(1).values[:, :-1].sum(1)  # 1 - top would have lost its digits in a ledger's 16 bits
    return (-2 * others.clamp(min=1e-12).log10()).floor().clamp(0, _LEVELS - 1).long()


def pearson_distance(histogram: Tensor, normal: Tensor) -> float:
    """1 - Pearson's correlation of two histograms, 0 to 2; 1 where one of them is even."""
    a, b = (each.double() - each.double().mean() for each in (histogram, normal))
    norm = float(a.norm() * b.norm())
    return 1 - float(a @ b) / norm if norm > 0 else 1.0


class Confidence:
    """HODA's rule (Sadeghzadeh et al., 2106.11424) on the victim's confidence.

    At every `length`-th query the histogram of the latest `length` is compared with the honest one: an alarm when their
    Pearson distance is more than `delta`. HODA's own histogram is of hardness, the training epoch from which on a clip's label
    stays, which takes snapshots of the victim's training.
    """

    def __init__(self, normal: Sequence[float], delta: float, length: int = 100):
        self.normal, self.delta, self.length = torch.tensor(normal, dtype=torch.float64), delta, length
        self._histogram, self._raised = torch.zeros(_LEVELS, dtype=torch.float64), False

    def observe(self, stream: Stream) -> Tensor:
        alarms = []
        for level in confidence_levels(stream.probs).tolist():
            self._histogram[level] += 1
            full = self._histogram.sum() == self.length
            alarms.append(bool(full) and pearson_distance(self._histogram, self.normal) > self.delta)
            if full:
                self._histogram.zero_()
        raised, self._raised = self._raised, self._raised or any(alarms)
        return _latch(raised, alarms)


def fit_confidence(honest: Sequence[Stream], length: int = 100) -> dict[str, Any]:
    """The mean histogram of all whole sequences of honest queries, and the greatest distance that one of these has from it."""
    levels = [confidence_levels(account.probs) for account in honest]
    parts = [part for each in levels for part in each.split(length) if len(part) == length]
    if not parts:
        raise UserError(f"confidence: no honest account has {length} queries to fit a histogram to")
    histograms = torch.stack([part.bincount(minlength=_LEVELS) for part in parts]).double()
    normal = histograms.mean(0)
    delta = max(pearson_distance(histogram, normal) for histogram in histograms)
    return dict(normal=normal.tolist(), delta=delta, length=length)


# --- fitting and counting ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A detector that can be asked for by its name."""

    create: Callable[..., Detector]  # from its constants
    fit: Callable[[Sequence[Stream]], dict[str, Any]]  # its constants, from honest accounts


DETECTORS: dict[str, Kind] = {
    "quota": Kind(Quota, fit_quota),
    "prada": Kind(Prada, fit_prada),
    "near_duplicates": Kind(NearDuplicates, fit_near_duplicates),
    "confidence": Kind(Confidence, fit_confidence),
}


def split_accounts(accounts: Sequence[Stream]) -> tuple[list[Stream], list[Stream]]:
    """Honest accounts to fit constants to, every second one, and those to count false alarms on."""
    return list(accounts[::2]), list(accounts[1::2])


class FalseAlarms(NamedTuple):
    """How many honest accounts raised the alarm, of how many, and the share that 95 of 100 such counts lie below."""

    alarmed: int
    accounts: int
    upper: float


def bound_share(alarmed: int, accounts: int) -> float:
    """The share of all accounts that 95 of 100 such counts lie below, one-sided (Clopper and Pearson)."""
    from scipy.stats import beta

    return 1.0 if alarmed == accounts else float(beta.ppf(0.95, alarmed + 1, accounts - alarmed))


def count_false_alarms(create: Callable[[], Detector], honest: Sequence[Stream]) -> FalseAlarms:
    """Count the alarms of a new detector for each honest account, with the upper 95 % bound of their share."""
    alarmed = sum(first_alarm(create(), account) is not None for account in honest)
    return FalseAlarms(alarmed, len(honest), bound_share(alarmed, len(honest)))
