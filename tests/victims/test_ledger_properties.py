"""Random sequences of what runs and tools do to ledgers, held against a model of a few sets and numbers.

Two runs share a ledger and a budget, a third has a ledger of its own; each reserves, asks, is refused, crashes before or after
the victim answered, and is opened again; ledgers are merged and copied. An independent meter counts what victims answer.
"""

import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from extraction.errors import BudgetExhausted, UserError
from extraction.victims import ledger as ledger_module
from extraction.victims.ledger import Ledger

BUDGET = 12
RUNS = {"first": "shared", "second": "shared", "third": "own"}  # run -> ledger
BATCH = st.lists(st.integers(0, 19), min_size=1, max_size=4)


class Crash(BaseException):
    pass


class CountingVictim:
    """Answers the number that a clip is made of; the meter of a ledger counts what it answers."""

    name, fingerprint, classes = "tiny", "abc", tuple("abcdefghijklmnopqrst")

    def __init__(self, meter, place, budget):
        self.meter, self.place, self.query_budget, self.ends = meter, place, budget, ""

    def query(self, clips):
        if self.ends == "refuses":
            raise UserError("clips are not in [0, 1]")
        if self.ends == "crashes before":
            raise Crash
        self.meter[self.place] += len(clips)
        if self.ends == "crashes after":
            raise Crash
        return clips[:, 0, 0, 0, 0].long()


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Ledgers(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.meter, self.runs, self.victims = defaultdict(int), {}, {}
        self.answers = defaultdict(set)  # ledger -> numbers with an answer
        self.shares = {"shared": {"shared": 0}, "own": {"own": 0}}  # ledger -> whose queries -> how many
        self.reserved = {run: set() for run in RUNS}
        for run in RUNS:
            self.open(run)

    def teardown(self):
        for run in getattr(self, "runs", {}).values():
            run.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def path(self, place: str) -> str:
        return f"{self.folder.name}/{place}.sqlite"

    def count(self, place: str) -> int:
        return sum(self.shares[place].values())

    def budget(self, run: str) -> int | None:
        return BUDGET if RUNS[run] == "shared" else None

    @rule(run=st.sampled_from(list(RUNS)))
    def open(self, run):
        """A run starts, or is killed and starts again: what it had reserved and not asked stays counted."""
        if run in self.runs:
            self.runs[run].close()
        self.reserved[run] = set()
        self.victims[run] = CountingVictim(self.meter, RUNS[run], self.budget(run))
        shared = RUNS[run] == "shared"
        self.runs[run] = Ledger(self.path(RUNS[run]), lambda _: self.victims[run], "label", shared=shared)
        assert self.runs[run].num_queries == self.count(RUNS[run])

    def affordable(self, run: str, numbers: list[int]) -> int:
        """Of new numbers, how many the budget has room for."""
        budget = self.budget(run)
        return len(numbers) if budget is None else max(0, min(len(numbers), budget - self.count(RUNS[run])))

    @rule(run=st.sampled_from(list(RUNS)), batch=BATCH)
    def reserve(self, run, batch):
        place = RUNS[run]
        new = [n for n in dict.fromkeys(batch) if n not in self.answers[place] | self.reserved[run]]
        affordable = new[: self.affordable(run, new)]
        taken = batch.index(new[len(affordable)]) if len(affordable) < len(new) else len(batch)
        assert self.runs[run].reserve([key_of(n) for n in batch]) == taken
        self.shares[place][place] += len(affordable)
        self.reserved[run] |= set(affordable)

    @rule(
        run=st.sampled_from(list(RUNS)),
        batch=BATCH,
        ends=st.sampled_from(["", "", "", "refuses", "crashes before", "crashes after"]),
    )
    def ask(self, run, batch, ends):
        place, victim = RUNS[run], self.victims[run]
        victim.ends = ends
        new = [n for n in dict.fromkeys(batch) if n not in self.answers[place]]
        uncounted = [n for n in new if n not in self.reserved[run]]
        keys, clips = (
            [key_of(n) for n in batch],
            torch.tensor(batch, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 1, 1),
        )
        if self.affordable(run, uncounted) < len(uncounted):
            with pytest.raises(BudgetExhausted):
                self.runs[run].query(clips, keys)
            return
        self.shares[place][place] += len(uncounted)
        if new and ends == "refuses":  # it answered nothing, and nothing is counted of it
            with pytest.raises(UserError):
                self.runs[run].query(clips, keys)
            self.shares[place][place] -= len(new)
            self.reserved[run] -= set(new)
        elif new and ends:
            with pytest.raises(Crash):
                self.runs[run].query(clips, keys)
            self.open(run)
        else:
            assert self.runs[run].query(clips, keys).tolist() == batch
            self.answers[place] |= set(new)
            self.reserved[run] -= set(new)

    @rule(into=st.sampled_from(["shared", "own"]), copied=st.booleans())
    def merge(self, into, copied):
        """Merge the other ledger, or a copy of it: what was merged before counts once."""
        other = "own" if into == "shared" else "shared"
        source, theirs = self.path(other), dict(self.shares[other])
        if copied:
            source = f"{self.folder.name}/copy.sqlite"
            Path(source).unlink(missing_ok=True)
            ledger_module.copy(self.path(other), source)
        added = ledger_module.merge(self.path(into), source)
        assert added == len(self.answers[other] - self.answers[into])
        self.answers[into] |= self.answers[other]
        for whose, number in theirs.items():
            self.shares[into][whose] = max(number, self.shares[into].get(whose, 0))

    @rule(before=st.integers(0, 20))
    def forget(self, before):
        """A run's own ledger drops answers; one that is shared keeps them."""
        self.runs["third"].forget(key_of(before))
        self.runs["first"].forget(key_of(before))
        self.answers["own"] = {n for n in self.answers["own"] if n >= before}

    @invariant()
    def nothing_is_lost_and_all_is_counted(self):
        for place in self.shares if hasattr(self, "shares") else ():
            database, about = ledger_module.open_existing(self.path(place))
            counted, kept = int(about["num_queries"]), dict(database.execute("SELECT key, answer FROM answers"))
            database.close()
            assert counted == self.count(place)
            assert counted >= self.meter[place]
            assert kept == {key_of(n): n.to_bytes(4, "little") for n in self.answers[place]}
        if hasattr(self, "meter"):
            assert self.meter["shared"] <= BUDGET


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
