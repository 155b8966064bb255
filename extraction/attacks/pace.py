"""On a CPU: whether the victim answers the next batch beside the student's step, or before it."""

import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

from extraction import distributed

PACES = ("overlap", "turns")
_WARM_UP, _TIMED = 2, 4  # batches of each pace
TRIAL = len(PACES) * (_WARM_UP + _TIMED)
_GAIN = 1.1


class Pace:
    """How the cores are shared out, batch by batch.

    "overlap": the victim answers a batch while the student learns from the one before, each on the threads that PyTorch has
    when the run begins: all but the loader's workers', or OMP_NUM_THREADS. "turns": one after the other, each on all threads.
    "auto" goes through `TRIAL` batches, half of them in each pace, and keeps the faster, overlap unless turns gain a tenth:
    overlap is better where both take alike, turns where one takes nearly all the time. The number of threads decides how sums
    are rounded, so `chosen` is kept in the run's state, and a run goes on to the same bits.

    Nothing is tried where there is nothing to choose: on a GPU, among several processes, with a single thread, without a
    victim, or in an epoch shorter than the trial.
    """

    def __init__(self, asked: Literal["auto", "overlap", "turns"], possible: bool, default: Literal["overlap", "turns"]):
        self.shared = torch.get_num_threads()
        possible = possible and distributed.ALL_THREADS > 1
        self.chosen: str | None = default if not possible else None if asked == "auto" else asked
        self.seconds: dict[str, float] = {}  # of a batch, in the trial
        self._first, self._times = 0, list[float]()

    def begin(self, first: int, can_try: bool) -> None:
        """From batch `first` on; `can_try`: a whole trial comes before anything else does."""
        self._first = first
        if not can_try and self.chosen is None:
            self.chosen = "overlap"

    def at(self, batch: int) -> str:
        """The pace of a batch."""
        return self.chosen or PACES[(batch - self._first) // (TRIAL // len(PACES))]

    def asks_ahead(self, batch: int) -> bool:
        """Whether the next batch is asked about beside this one's step."""
        return self.at(batch) == "overlap"

    @contextmanager
    def running(self) -> Generator[None]:
        """Within it PyTorch's threads may change; after it they are what they were."""
        try:
            yield
        finally:
            torch.set_num_threads(self.shared)

    def set_threads(self, batch: int, alone: bool) -> None:
        """Choose PyTorch's threads for a batch: all when the student is `alone`, because no answer and no clip is new."""
        torch.set_num_threads(distributed.ALL_THREADS if alone or self.at(batch) == "turns" else self.shared)

    def end_of(self, batch: int) -> str | None:
        """Take the time of a batch that is done. Returns a line to print when that ends the trial."""
        if self.chosen is not None:
            return None
        self._times.append(time.perf_counter())
        if batch - self._first + 1 < TRIAL:
            return None
        taken = [after - before for before, after in zip(self._times, self._times[1:], strict=False)]
        for number, pace in enumerate(PACES):
            last = (number + 1) * (TRIAL // len(PACES)) - 1
            self.seconds[pace] = statistics.median(taken[last - _TIMED : last])
        self.chosen = "turns" if self.seconds["turns"] * _GAIN < self.seconds["overlap"] else "overlap"
        each = {pace: f"{1000 * seconds:.0f} ms" for pace, seconds in self.seconds.items()}
        return (
            f"a batch with victim and student at once, {self.shared} thread(s) each: {each['overlap']}; in turns on "
            f"{distributed.ALL_THREADS}: {each['turns']}; --pace {self.chosen} from here"
        )
