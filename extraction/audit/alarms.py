"""Detectors in an audit: fitted to half of the honest accounts, counted on the others, and what a thief has by then."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extraction.audit.traffic import Account
from extraction.errors import UserError
from extraction.victims.detectors import DETECTORS, Detector, Stream, bound_share, first_alarm

DILUTIONS = (0.5, 0.75, 0.9)  # share of honest-looking queries in a diluted theft


class Fitted(NamedTuple):
    """A detector with its constants, or why it has none."""

    name: str
    constants: dict[str, Any] | None
    reason: str = ""

    @property
    def create(self) -> Callable[[], Detector] | None:
        constants = self.constants
        return None if constants is None else lambda: DETECTORS[self.name].create(**constants)


def fit_detectors(accounts: Sequence[Account], streams: Sequence[Stream]) -> list[Fitted]:
    """Every detector, fitted to the accounts of all profiles that are not held out."""
    own = [stream for account, stream in zip(accounts, streams, strict=True) if not account.held_out and len(stream.probs)]
    fitted = []
    for name, kind in DETECTORS.items():
        try:
            fitted.append(Fitted(name, kind.fit(own)))
        except UserError as error:
            fitted.append(Fitted(name, None, str(error)))
    return fitted


def report_false_alarms(fitted: Sequence[Fitted], accounts: Sequence[Account], streams: Sequence[Stream]) -> list[dict]:
    """A row for each detector and honest profile: alarmed accounts of those held out, with the upper 95 % bound.

    The bound is Clopper and Pearson's, one-sided. Accounts of a profile share footage, so that they are no independent draws
    from all customers: a bound says how little so few accounts can show, no more.
    """
    rows = []
    profiles = [*dict.fromkeys(account.profile for account in accounts), "all profiles"]
    for detector in fitted:
        if detector.create is None:
            continue
        for profile in profiles:
            held_out = [
                stream
                for account, stream in zip(accounts, streams, strict=True)
                if account.held_out and profile in (account.profile, "all profiles")
            ]
            first = [found + 1 for stream in held_out if (found := first_alarm(detector.create(), stream)) is not None]
            rows.append(
                dict(
                    row=f"{detector.name}, {profile}", detector=detector.name, profile=profile, alarmed=len(first),
                    accounts=len(held_out), upper=bound_share(len(first), len(held_out)), first_alarm=min(first, default=None),
                    queries=sum(len(stream.probs) for stream in held_out),
                )
            )  # fmt: skip
    return rows


class Theft(NamedTuple):
    """What one account of a thief sends."""

    attacker: str
    streams: list[Stream]  # in several random orders
    share: float  # of its queries that the thief trains on
    curve: str  # row of the students that its useful queries make


def dilute(theft: Stream, honest: Stream, share: float, seed: int) -> Stream:
    """A theft among honest-looking queries, `share` of all, in a random order, as long as both last."""
    useful = min(len(theft.probs), int(len(honest.probs) * (1 - share) / share))
    other = round(useful * share / (1 - share))
    order = torch.randperm(useful + other, generator=torch.Generator().manual_seed(seed))
    parts = (torch.cat([a[:useful], b[:other]])[order] for a, b in zip(theft[:2], honest[:2], strict=True))
    return Stream(*parts)


def list_thefts(
    thumbnails: Tensor, probs: Tensor, all_order: Sequence[int], one_order: Sequence[int], honest: Stream,
    rows: Mapping[str, str], repeats: int = 3,
) -> list[Theft]:  # fmt: skip
    """The thieves that detectors watch, given recorded views: in random order, one of each clip, as one upload, diluted.

    `rows` says of which students the curves are: of all views, of one view a clip. The honest-looking queries are recorded
    honest clips that no account of the half that is fitted to has sent.
    """

    def shuffle(order: Sequence[int]) -> list[Stream]:
        streams = []
        for seed in range(repeats):
            places = torch.tensor(order)
            places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
            streams.append(Stream(thumbnails[places], probs[places]))
        return streams

    everything, once = shuffle(all_order), shuffle(one_order)
    thefts = [
        Theft("naive", everything, 1.0, rows["all"]),
        Theft("one view a clip", once, 1.0, rows["one"]),
        Theft(
            "all as one upload", [s._replace(uploads=torch.zeros(len(s.probs)).long()) for s in everything], 1.0, rows["all"]
        ),
    ]
    for share in DILUTIONS:
        diluted = [dilute(stream, honest, share, seed) for seed, stream in enumerate(everything)]
        thefts.append(Theft(f"diluted {100 * share:.0f} %", diluted, 1 - share, rows["all"]))
    return thefts


def report_thefts(
    fitted: Sequence[Fitted], thefts: Sequence[Theft], agreement: Callable[[str, float], float], budget: int
) -> list[dict]:
    """A row for each detector and thief: queries by the alarm, the clone's agreement by then, accounts that a theft burns.

    `agreement(row, queries)` is that of a clone made with that many useful queries. Queries by the alarm are the median of the
    orders; an order without an alarm counts as longer than all others. A theft of `budget` useful queries, or of all that there
    are, is spread over as many accounts as it takes, each closed at its alarm. None: one would do as far as it was watched.
    """
    rows = []
    for detector in fitted:
        if detector.create is None:
            continue
        for theft in thefts:
            found = [first_alarm(detector.create(), stream) for stream in theft.streams]
            middle = median(math.inf if alarm is None else alarm + 1 for alarm in found)
            alarm, length = (None if math.isinf(middle) else int(middle)), len(theft.streams[0].probs)
            useful = theft.share * (length if alarm is None else alarm)
            whole = length if theft.share == 1 else budget / theft.share  # queries that the whole theft takes
            rows.append(
                dict(
                    row=f"{detector.name}, {theft.attacker}", detector=detector.name, attacker=theft.attacker,
                    queries_to_alarm=alarm, orders_alarmed=sum(a is not None for a in found), orders=len(found),
                    queries_watched=length, useful_queries=round(useful), agreement_at_alarm=agreement(theft.curve, useful),
                    accounts_burnt=None if alarm is None else math.ceil(whole / alarm), queries_in_all=round(whole),
                )
            )  # fmt: skip
    return rows


def find_alarms(fitted: Sequence[Fitted], theft: Stream) -> dict[str, int | None]:
    """The query of a theft, from 0, at which each detector that has constants raises its alarm; None: at none."""
    return {d.name: first_alarm(d.create(), theft) for d in fitted if d.create is not None}


def report_responses(
    cells: Sequence[dict], fitted: Sequence[Fitted], accounts: Sequence[Account], streams: Sequence[Stream],
    alarms: Mapping[str, int | None], respond: Callable[[str, Stream], Tensor],
) -> list[dict]:  # fmt: skip
    """A row for each detector and response: the clone of a thief with one account, and what false alarms cost honest users.

    `respond(name, stream)` gives the answers (N, num_classes) after an alarm. The thief may train on all answers or on those
    before the alarm alone: `worst` is the better clone of the two. The honest cost is over all queries of the held-out
    accounts, those without a false alarm among them: `changed` is the share that gets an answer more than 0.01 in L1 from the
    true one, or none; `flips` the share whose top class changes, or is not given; `l1` the mean distance, with an even answer
    for none.
    """
    own = [cell for cell in cells if cell["group"] == "alarms" and cell["scores"]]
    clones = {(c["detector"], c["defence"]): c["scores"]["agreement_at_1"] for c in own}
    rows = []
    for detector in fitted:
        if detector.create is None:
            continue
        held_out = [stream for account, stream in zip(accounts, streams, strict=True) if account.held_out]
        first = [first_alarm(detector.create(), stream) for stream in held_out]
        total = sum(len(stream.probs) for stream in held_out)
        before = clones[detector.name, None]
        for response in ("nothing", *dict.fromkeys(c["defence"] for c in own if c["defence"])):
            clone = before if response == "nothing" else clones.get((detector.name, response))
            if clone is None:
                continue
            l1, changed, flips = 0.0, 0, 0
            for stream, alarm in zip(held_out, first, strict=True):
                if alarm is None:
                    continue
                late = Stream(stream.thumbnails[alarm:], stream.probs[alarm:])
                answers = respond(response, late)
                apart = (answers - late.probs).abs().sum(1)
                l1 += apart.sum().item()
                changed += len(apart) if response == "nothing" else int((apart > 0.01).sum())
                flips += len(apart) if response == "nothing" else int((answers.argmax(1) != late.probs.argmax(1)).sum())
            alarm = alarms[detector.name]
            rows.append(
                dict(
                    row=f"{detector.name}, {response}", detector=detector.name, response=response,
                    queries_to_alarm=None if alarm is None else alarm + 1, clone=clone, before=before, worst=max(clone, before),
                    alarmed=sum(a is not None for a in first), accounts=len(held_out), changed=changed / max(1, total),
                    flips=flips / max(1, total), l1=l1 / max(1, total),
                )
            )  # fmt: skip
    return rows
