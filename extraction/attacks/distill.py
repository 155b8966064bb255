"""Training a student on a victim's answers: the batches, and all that happens between two of them.

    training = Training(run, student, optimizer, schedule, evaluator, victim, QuerySet(clips, ...), 10, 16)
    for batch in map(training.vary, training):
        loss = kl_divergence(training.forward(batch.clips), batch.targets)
        training.step(loss)
    return training.finish()

The script says what the loss is; `vary` makes of a batch, as the victim saw it, what the student is shown. `Training` draws
order and views from the seed, queries the victim within its budget, scores the student after its epochs (evenly, at most
`MAX_SCORES` of them), logs, saves, and resumes.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from extraction import distributed
from extraction.attacks.losses import answers_to_targets
from extraction.attacks.pace import PACES, TRIAL, Pace
from extraction.attacks.recipe import NUM_DRAWS, AveragedWeights, crop_and_erase, mix, one_cycle, seed_step, spread_labels
from extraction.data.clips import Batch, Broken, load_with_pauses, name_once
from extraction.data.queries import KeptViews, QuerySet
from extraction.errors import UserError, printable
from extraction.evaluation.plots import draw_queries
from extraction.evaluation.results import QUERY_BUDGET, finish
from extraction.evaluation.scoring import Evaluator
from extraction.network import VideoModel
from extraction.runs import Run, require_form, restore_optimizer
from extraction.students import Student
from extraction.victims.ledger import Ledger

MAX_SCORES = 20  # of a run: of many short epochs, scoring each would take longer than training


class AnsweredBatch(NamedTuple):
    """A process's share of a batch, with the victim's answers."""

    number: int  # of the batch, from the start of training
    keys: list[bytes]
    clips: Tensor  # float (B, C, T, H, W) in [0, 1]; (B, windows, ...) where a frozen body's features are kept
    labels: Tensor  # int64 (B,), true labels; -1 without one. After mixup float (B, num_classes)
    targets: Tensor  # float (B, num_classes), the victim's probabilities; empty without a victim
    counts: list[int]  # clips in each process
    exhausted: bool  # the query budget left some out


class Training:
    """The batches of a training run, each a step of the student; see this module's docstring.

    `schedule` steps each batch; a plateau schedule is given the mean loss of the last 100 batches. `victim=None` trains on
    true labels alone. `prefetch_answers` asks about the next batch while the student learns from this one, on a CPU as `pace`
    says ("auto", "overlap" or "turns": `extraction.attacks.pace.Pace`). `clips.png` in the run's folder shows the first batch
    as the victim saw it. `history` has a dict per evaluation, `stopped` what ended the run: "epochs" or "query budget".

    A student whose body is frozen says the same of a view each time: what its body makes of views that come round again is kept
    where decoded clips are, unless `vary` shows it something else, and then its head alone is trained.

    The recipe (`extraction.attacks.recipe`) is off by default. `use_one_cycle` puts that schedule, over all batches, in the
    place of `schedule`. `ema` averages the weights with this decay: the average is scored beside the student in `history`
    (`top1_ema` and so on) and saved as `student_ema.safetensors`, but the student, which later stages go on from, is the one
    with its own weights. `crop`, `erase` and `mixup` are what `vary` does.

    Resumes from the run's checkpoint, bitwise reproducible on a CPU. Of several processes (`extraction.distributed`) each takes
    its share of every batch. Raises UserError when the loss is not finite, KeyboardInterrupt after Ctrl-C, the state being
    saved.
    """

    def __init__(
        self,
        run: Run,
        student: VideoModel,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        evaluator: Evaluator | None,
        victim: Ledger | None,
        queries: QuerySet,
        epochs: int,
        batch_size: int,
        num_workers: int = 0,
        *,
        max_grad_norm: float | None = None,
        prefetch_answers: bool = True,
        use_one_cycle: bool = False,
        ema: float | None = None,
        crop: float = 0.0,
        erase: float = 0.0,
        mixup: float | None = None,
        pace: Literal["auto", "overlap", "turns"] = "auto",
    ):
        self.run, self.student, self.optimizer, self.schedule = run, student, optimizer, schedule
        self.evaluator, self.victim, self.queries = evaluator, victim, queries
        self.epochs, self.num_workers, self.max_grad_norm = epochs, num_workers, max_grad_norm
        # Not where what processes say to each other would depend on it.
        prefetch_answers = prefetch_answers and distributed.num_processes() == 1
        if evaluator is not None:
            evaluator.refuse_overlap(queries.clips)
        self.order = _Order(len(queries), batch_size, epochs, queries.seed)
        if use_one_cycle:
            self.schedule = one_cycle(optimizer, self.order.num_batches)
        self.crop, self.erase, self.mixup = crop, erase, mixup
        if mixup is not None:  # partners are of the same process
            distributed.require_one_process("--mixup")
        self.device = next(student.parameters()).device
        choice = prefetch_answers and victim is not None and self.device.type == "cpu"
        self.pace = Pace(pace, choice, "overlap" if prefetch_answers else "turns")
        self.history: list[dict] = []
        self.stopped = "epochs"
        self.broken: list[tuple[Path, str]] = list(queries.clips.broken)
        self._losses: deque[float] = deque(maxlen=100)
        self._unread: list[Tensor] = []
        self._forward = distributed.parallel(student)
        self._features: KeptViews | None = None
        self._may_keep_features = prefetch_answers  # not where further clips are crafted from a batch's own (`query_more`)
        self.average = None if ema is None else AveragedWeights(student.net, ema)

    # --- what a script calls ---

    def __iter__(self) -> Iterator[AnsweredBatch]:
        first = self._resume()
        if first == self.order.num_batches:
            return
        refs, total = self.queries.clips.refs, self.epochs * len(self.queries)
        done = min(first * self.order.batch_size, total)
        self._bar = tqdm(total=total, initial=done, desc=self.run.experiment, unit="clip", dynamic_ncols=True)
        self._features = self._keep_features()
        if self.device.type == "cpu" and self._features is None:
            self.queries.keep_views(self.epochs)
        shares = map(distributed.shard, self.order.batches_from(first))
        loader = load_with_pauses(self.queries.clips, shares, self.num_workers, pin_memory=self.device.type == "cuda")
        self.pace.begin(first, can_try=first % self.order.per_epoch + TRIAL < self.order.per_epoch)
        batches = prefetch(loader, first, self.order.per_epoch, self._query, self.pace.asks_ahead)
        self.student.train()
        with self.run.interruptible(), self._bar, contextlib.closing(batches), self.pace.running():
            for loaded, batch in batches:
                self.pace.set_threads(batch.number, alone=self._nothing_is_new(batch.number // self.order.per_epoch))
                self.broken.extend(loaded.broken)
                if batch.number == 0 and batch.keys and self.victim is not None:
                    sources = [refs[i].path.parent.name for i in loaded.indices]
                    draw_queries(self.run.folder / "clips.png", batch.clips, batch.targets, sources, self.victim.classes)
                if batch.exhausted:
                    self._save(batch.number)  # from here a larger budget goes on
                self._batch = batch
                if min(batch.counts):  # a process without a clip (a last batch can be so small) can't take part in a step
                    yield batch
                self._bar.update(sum(self._batch.counts))
                self._end_step()
                if line := self.pace.end_of(batch.number):
                    self._bar.write(line)
                if self._batch.exhausted:
                    break
        self.broken = name_once(distributed.gather(self.broken))

    def _keep_features(self) -> KeptViews | None:
        """Room for what a frozen body makes of each view; None where it is not the same each time, or nothing comes again."""
        student, again = self.student, self.queries.views_per_clip is not None and self.epochs > self.queries.views_per_clip
        varied = self.crop or self.erase or self.mixup
        if not (isinstance(student, Student) and student.frozen and again and self._may_keep_features) or varied:
            return None
        found = (self.queries.clips[place][1] for place in range(len(self.queries)))
        loaded = next((item for item in found if not isinstance(item, Broken)), None)
        if loaded is None:
            return None
        like = self.queries.make_views(torch.as_tensor(loaded)[None], self.queries.keys([0], 0), self.queries.augmentation)
        shape = tuple(student.eval().embed(like.to(self.device)).shape[1:])
        return self.queries.keep(shape, f"{student.name} {student.fingerprint_body()} {student.precision} {self.device.type} ")

    def _nothing_is_new(self, epoch: int) -> bool:
        """By the epoch alone, and not by what is cached: a run goes on to the same bits."""
        return self.queries.views_per_clip is not None and epoch >= self.queries.views_per_clip

    def vary(self, batch: AnsweredBatch) -> AnsweredBatch:
        """`batch` as the student is shown it: cropped, erased and mixed, deterministic in (seed, batch); itself without these.

        The answers are those to the clips that were sent. Mixed are clips, answers and labels, these then (B, num_classes).
        """
        if not (self.crop or self.erase or self.mixup):
            return batch
        draw, before = seed_step(self.queries.seed, batch.number), sum(batch.counts[: distributed.rank()])
        uniform = draw.random((sum(batch.counts), NUM_DRAWS))[before : before + len(batch.clips)]
        batch = batch._replace(clips=crop_and_erase(batch.clips, uniform, self.crop, self.erase))
        if self.mixup is None:
            return batch
        assert self.evaluator is not None
        partners = torch.from_numpy(draw.permutation(len(batch.clips))).to(self.device)
        shares = torch.from_numpy(draw.beta(self.mixup, self.mixup, len(batch.clips)).astype(np.float32)).to(self.device)
        labels = spread_labels(batch.labels, len(self.evaluator.classes))
        return batch._replace(
            clips=mix(batch.clips, partners, shares),
            targets=mix(batch.targets, partners, shares) if len(batch.targets) else batch.targets,
            labels=mix(labels, partners, shares),
        )

    def forward(self, clips: Tensor) -> Tensor:
        """The student's logits (B, num_classes), to be followed by `step`.

        What is drawn in a step, such as dropout, is seeded by its number, so that no state of it need be kept.
        """
        number = self.queries.seed * 1_000_003 + self._batch.number
        torch.manual_seed(number * distributed.num_processes() + distributed.rank())
        if self._features is None:
            return self._forward(clips)
        assert isinstance(self.student, Student)
        if not self._is_embedded(self._batch.number):
            clips = self.student.embed(clips)
            self._features.write(self._batch.keys, clips.cpu())
        return self.student.classify(clips)

    def step(self, loss: Tensor) -> None:
        """Step the optimiser and the schedule on the mean loss of this process's clips."""
        loss = loss * (len(self._batch.clips) / sum(self._batch.counts))
        self.optimizer.zero_grad(set_to_none=True)
        (loss * distributed.num_processes()).backward()  # gradients are averaged over the processes
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self._batch.number)
        if not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        self._unread.append(loss.detach())

    def query_more(self, batch: AnsweredBatch, clips: Tensor, keys: Sequence[bytes]) -> AnsweredBatch:
        """`batch` with further (B, C, T, H, W) clips named by `keys`, one query each, as many as the budget allows."""
        assert self.victim is not None
        count = self.victim.reserve(keys)
        wanted, counts = zip(*distributed.gather([(len(keys), count)]), strict=True)
        exhausted = sum(counts) < sum(wanted)
        if sum(counts):
            batch = batch._replace(
                clips=torch.cat([batch.clips, clips[:count]]),
                labels=torch.cat([batch.labels, batch.labels.new_full((count,), -1)]),
                targets=torch.cat([batch.targets, self._ask(clips[:count], keys[:count])]),
                counts=[a + b for a, b in zip(batch.counts, counts, strict=True)],
            )
        if exhausted:
            self._save(batch.number)
        self._batch = batch._replace(exhausted=exhausted)
        return self._batch

    def finish(self, *, stopped: str | None = None, broken: Sequence[tuple[Path, str]] = (), **more: Any) -> dict:
        """Save the student, write and print the results (`extraction.evaluation.results.finish`); `more` goes into them."""
        assert self.evaluator is not None
        assert isinstance(self.student, Student)
        return finish(
            self.run, self.student, self.victim, self.evaluator, self.history, stopped or self.stopped,
            [*broken, *self.broken], None if self.average is None else self.average.state, pace=self.pace.chosen, **more,
        )  # fmt: skip

    # --- what happens between two batches ---

    def _query(self, loaded: Batch, number: int) -> AnsweredBatch:
        """The views of a batch, as many as the budget allows, with the victim's answers."""
        keys = self.queries.keys(loaded.indices, number // self.order.per_epoch)
        affordable = len(keys) if self.victim is None else self.victim.reserve(keys)
        wanted, counts = zip(*distributed.gather([(len(keys), affordable)]), strict=True)
        keys, clips = keys[:affordable], loaded.clips[:affordable].to(self.device, non_blocking=True)
        clips = self._recall(clips, keys) if self._is_embedded(number) else self.queries.views(clips, keys)
        targets = self._ask(clips, keys) if self.victim is not None and sum(counts) else torch.empty(0)
        labels = torch.tensor([self.queries.clips.refs[i].label for i in loaded.indices[:affordable]], dtype=torch.int64)
        labels = labels.to(self.device, non_blocking=True)
        return AnsweredBatch(number, keys, clips, labels, targets, list(counts), sum(counts) < sum(wanted))

    def _is_embedded(self, number: int) -> bool:
        """Whether the views of a batch come as what the student's frozen body made of them."""
        return self._features is not None and self._nothing_is_new(number // self.order.per_epoch)

    def _recall(self, loaded: Tensor, keys: list[bytes]) -> Tensor:
        """The kept features of views, made again where they were lost."""
        assert self._features is not None
        assert isinstance(self.student, Student)
        if self.victim is not None and len(self.victim.find(keys)) < len(set(keys)):
            self._ask(
                self.queries.views(loaded, keys), keys
            )  # the ledger lost answers: the victim is sent clips, never features
        features, held = self._features.read(keys)
        if missing := [row for row, kept in enumerate(held) if not kept]:
            names = [keys[row] for row in missing]
            features[missing] = self.student.embed(self.queries.views(loaded[missing], names)).cpu()
            self._features.write(names, features[missing])
        return features.to(self.device, non_blocking=True)

    def _ask(self, clips: Tensor, keys: Sequence[bytes]) -> Tensor:
        assert self.victim is not None
        return answers_to_targets(self.victim.query(clips, keys), self.victim.answers, self.victim.num_classes)

    def _end_step(self) -> None:
        """Read losses, score, log, save."""
        number, exhausted = self._batch.number, self._batch.exhausted
        epoch, end_of_epoch = number // self.order.per_epoch, (number + 1) % self.order.per_epoch == 0
        if exhausted:
            self.stopped = QUERY_BUDGET
        pause = self.run.checkpoint_due() or end_of_epoch or exhausted
        # On a GPU the loss is read only now and then, so that the device never waits for the host.
        if len(self._unread) >= (1 if self.device.type == "cpu" else 10) or (pause and self._unread):
            self._read_losses(epoch, number)
        between = math.ceil(self.epochs / MAX_SCORES)
        if exhausted or (end_of_epoch and ((epoch + 1) % between == 0 or epoch + 1 == self.epochs)):
            point: dict[str, Any] = dict(epoch=epoch + 1, num_queries=self._num_queries(), loss=self._mean_loss())
            if self.evaluator is not None:
                averaged = self._score_average(self.evaluator)
                point |= self.evaluator.score(self.student.eval()) | averaged
                self.student.train()
            self.history.append(point)
            scores = {name: value for name, value in point.items() if name not in ("epoch", "num_queries")}
            self.run.log(point["num_queries"], scores)
            self._bar.write(_describe_point(point, self.epochs))
        if exhausted:
            return
        if pause:
            self._save(number + 1)
        if self.run.stop_asked:
            raise KeyboardInterrupt(f"saved in {self.run.folder}; run the same command again to continue")

    def _score_average(self, evaluator: Evaluator) -> dict[str, float]:
        """The scores of the averaged weights, `top1_ema` and so on, if there are any.

        They come before the student's own, for intervals and KL are those of the evaluator's last score.
        """
        if self.average is None:
            return {}
        with self.average.in_place():
            return {f"{name}_ema": value for name, value in evaluator.score(self.student.eval()).items()}

    def _read_losses(self, epoch: int, number: int) -> None:
        for value in distributed.all_reduce_sum(torch.stack(self._unread)).tolist():
            if not math.isfinite(value):
                raise UserError(
                    f"the loss became {value} in epoch {epoch + 1}, batch {number % self.order.per_epoch + 1} or up to "
                    f"{len(self._unread) - 1} before it; the state before is in {self.run.folder}; lower the learning rates"
                )
            self._losses.append(value)
            if isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step(self._mean_loss())
        self._unread.clear()
        spent = {} if self.victim is None else {"queries": _describe_queries(self.victim)}
        self._bar.set_postfix(loss=f"{self._mean_loss():.3f}", **spent, refresh=False)

    def _mean_loss(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    def _num_queries(self) -> int:
        return 0 if self.victim is None else self.victim.num_queries

    def _resume(self) -> int:
        """Load the run's checkpoint, if there is one. Returns the number of the first batch to train on."""
        self.run.begin()
        state = self.run.load_state()
        if state is None:
            if self.victim is not None:
                most = self.queries.count_queries(self.epochs)
                print(f"{len(self.queries)} clips, {self.epochs} epochs: at most {most} queries", flush=True)
            return 0
        with self.run.restoring():
            fresh = dict(num_queries=0, batch=0, recent=[0.0] * len(state["recent"]), schedule=self.schedule.state_dict())
            require_form({name: state[name] for name in fresh}, fresh, "state")
            require_form([point["num_queries"] for point in state["history"]], [0] * len(state["history"]), "history")
            if not 0 <= state["batch"] <= self.order.num_batches:
                raise ValueError(f"batch {state['batch']} of {self.order.num_batches}")
            if self.victim is not None:
                self.victim.require_count(state["num_queries"])
            self.student.net.load_state_dict(state["student"])
            restore_optimizer(self.optimizer, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.average is not None:
                self.average.load_state_dict(state["ema"])
            if state.get("pace") not in (None, *PACES):
                raise ValueError(f"pace {state['pace']!r}")
            self.pace.chosen = state.get("pace")  # none: of a run before there was a choice
            self._losses.extend(state["recent"])
            self.history = state["history"]
        print(f"resuming {printable(self.run.folder)} at batch {state['batch']} of {self.order.num_batches}", flush=True)
        return state["batch"]

    def _save(self, batch: int) -> None:
        parts: dict[str, Any] = dict(student=self.student.net, optimizer=self.optimizer, schedule=self.schedule)
        state = {name: part.state_dict() for name, part in parts.items()}
        counted = dict(num_queries=self._num_queries(), recent=list(self._losses), history=self.history, batch=batch)
        counted["pace"] = self.pace.chosen
        averaged = {} if self.average is None else dict(ema=self.average.state_dict())
        self.run.save_state(state | counted | averaged)


class _Order:
    """Which clips each batch of each epoch holds: deterministic in the seed."""

    def __init__(self, num_clips: int, batch_size: int, epochs: int, seed: int):
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.per_epoch = math.ceil(num_clips / batch_size)
        self.num_batches = self.per_epoch * epochs

    def batches_from(self, first: int) -> Iterator[list[int]]:
        for epoch in range(first // self.per_epoch, self.num_batches // self.per_epoch):
            shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_clips, generator=shuffle).tolist()
            begin = first - epoch * self.per_epoch if epoch == first // self.per_epoch else 0
            for i in range(begin, self.per_epoch):
                yield order[i * self.batch_size : (i + 1) * self.batch_size]


def prefetch(
    loader: Iterator[Batch | None],
    first: int,
    per_epoch: int,
    query: Callable[[Batch, int], AnsweredBatch],
    ahead: Callable[[int], bool],
) -> Generator[tuple[Batch, AnsweredBatch]]:
    """The batches of `loader`, numbered from `first` on, each with what `query(batch, number)` makes of it.

    Where `ahead(number)` a thread asks about the next batch while this one is in use, but not beyond an epoch of `per_epoch`
    batches, whose number of queries is written down at its end. A pause of `load_with_pauses` ends where nothing is in use.
    """
    numbers, upcoming, end = itertools.count(first), None, object()

    def fetch() -> Any:
        batch = next(loader, end)
        return (batch, query(batch, next(numbers))) if isinstance(batch, Batch) else batch

    with ThreadPoolExecutor(1) as thread:
        while (item := upcoming.result() if upcoming else fetch()) is not end:
            upcoming = None
            if item is None:
                continue
            number = item[1].number
            goes_on = (number + 1) % per_epoch and not item[1].exhausted and ahead(number)
            upcoming = thread.submit(fetch) if goes_on else None
            yield item


def _describe_queries(victim: Ledger) -> str:
    return f"{victim.num_queries}" + (f"/{victim.query_budget}" if victim.query_budget is not None else "")


def _describe_point(point: dict, epochs: int) -> str:
    shown = [
        f"{name.replace('_at_', '@')} {100 * point[name]:.1f}"
        for name in ("top1", "top5", "agreement_at_1", "top1_ema", "agreement_at_1_ema")
        if name in point
    ]
    scores = f"{', '.join(shown)} %, " if shown else ""
    loss = "untrained" if math.isnan(point["loss"]) else f"loss {point['loss']:.3f}"
    return f"epoch {point['epoch']}/{epochs}: {loss}, {scores}{point['num_queries']} queries"
