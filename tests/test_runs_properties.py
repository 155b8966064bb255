"""Random sequences of what starts, crashes and ends do to a run's folder, held against a model."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from extraction.errors import UserError
from extraction.runs import Run


@dataclass(frozen=True)
class Config:
    seed: int = 0
    query_budget: int | None = None
    num_workers: int = 0  # may differ when a run is resumed


CONFIGS = st.builds(Config, st.integers(0, 1), st.sampled_from([None, 10, 20]), st.integers(0, 2))


class Folder(RuleBasedStateMachine):
    @initialize(config=CONFIGS)
    def begin(self, config):
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "run"
        self.began = self.saved = self.finished = self.run = None
        self.start(config)

    def teardown(self):
        if hasattr(self, "place"):
            self.place.cleanup()

    @rule(config=CONFIGS)
    def start(self, config):
        """A start in the folder, after a crash perhaps."""
        if self.began is not None and self.began.seed != config.seed:
            with pytest.raises(UserError, match="holds a run with other constants"):
                Run("experiment", self.folder, config)
            return
        now = config.query_budget
        if self.finished is not None and now is not None and now < self.finished[1]:
            with pytest.raises(UserError, match="is less"):
                Run("experiment", self.folder, config)
            return
        self.run = Run("experiment", self.folder, config)
        if self.finished is not None:
            before, num_queries = self.finished
            goes_on = now != before and (now is None or now > num_queries)
            assert (self.run.finished is None) == goes_on
        else:
            assert self.run.finished is None
        self.config = config
        state = self.run.load_state()
        assert (None if state is None else state["step"]) == self.saved

    @rule()
    def write_down_the_constants(self):
        self.run.begin()
        self.began = self.config

    @rule(step=st.integers(0, 99), ends=st.sampled_from(["", "", "crash", "full"]))
    def save(self, step, ends):
        """A checkpoint; one that a crash or a full disk cuts short leaves the one before."""
        if not ends:
            self.run.save_state(dict(step=step, weights=torch.zeros(3)))
            self.saved = step
            return

        def write(_state, file):
            file.write(b"half")
            raise OSError(28, "No space left on device") if ends == "full" else KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", write)
            with pytest.raises(UserError if ends == "full" else KeyboardInterrupt):
                self.run.save_state(dict(step=step))

    @rule(num_queries=st.integers(0, 20))
    def finish(self, num_queries):
        budget = self.config.query_budget
        num_queries = num_queries if budget is None else min(num_queries, budget)
        stopped = "query budget" if num_queries == budget else "epochs"
        self.run.finish(dict(num_queries=num_queries, stopped=stopped))
        self.finished = budget, num_queries


TestFolder = Folder.TestCase
TestFolder.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
