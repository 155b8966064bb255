"""The cells of an audit: a student of what one attacker makes of recorded answers, scored, and kept as a file."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extraction.attacks.losses import answers_to_targets
from extraction.audit.attackers import average_views, keep_agreeing, keep_sure, take_top1, undo
from extraction.audit.live import Live
from extraction.audit.plan import ANSWERS, DAWN_RATE, Cell
from extraction.audit.recording import Recording, Views
from extraction.audit.students import Checkpoints, Recipe, train_student
from extraction.errors import UserError, printable
from extraction.evaluation.scoring import Evaluator, score
from extraction.students import Student
from extraction.victims.defences import DEFENCES, draw, fit_defence, mark, measure, watermark
from extraction.victims.detectors import Stream
from extraction.victims.query_interface import shape_answers
from extraction.weights import write_text


class Fit(NamedTuple):
    """A defence at a strength: its parameter, what it costs honest users that it was not fitted to, or why it cannot be had."""

    parameter: float | None
    cost: dict[str, Any]
    reason: str = ""


def replay(name: str, parameter: float, recording: Recording | Stream, key: bytes) -> Tensor:
    """The probabilities (N, num_classes) that a defence answers a recording with, or an account, in its order."""
    probs = recording.probs
    return DEFENCES[name].defend(probs, draw(key, mark(recording.thumbnails, probs)), key, parameter)


def fit_to_honest(
    name: str, strength: float, to_fit: Recording, held_out: Recording, val: Recording, labels: Tensor, key: bytes
) -> Fit:
    """A defence's parameter for a mean L1 of `strength` on honest clips, and its cost on others and on held-out videos.

    `l1`, `l1_95` (the 95 % quantile), `flips` (top classes changed) and `decisions` (at 0.9 confidence) are of honest clips
    that it was not fitted to; `top1` and `top1_lost` of the labelled videos, None without labels; `ms` a query.
    """
    try:
        parameter = fit_defence(name, strength, to_fit.probs, key)["parameter"]
    except UserError as error:
        return Fit(None, {}, str(error))
    begin = time.perf_counter()
    answers = replay(name, parameter, held_out, key)
    seconds = time.perf_counter() - begin
    honest, cost = held_out.probs, measure(held_out.probs, answers)
    decisions = ((honest.amax(1) >= 0.9) != (answers.amax(1) >= 0.9)).float().mean().item()
    found: dict[str, Any] = dict(
        l1=cost.l1, l1_95=(answers - honest).abs().sum(1).quantile(0.95).item(), flips=cost.flips, decisions=decisions,
        top1=None, top1_lost=None, ms=1e3 * seconds / len(honest),
    )  # fmt: skip
    if (labels >= 0).any():
        before, after = (score(probs, labels)["top1"] for probs in (val.probs, replay(name, parameter, val, key)))
        found |= dict(top1=after, top1_lost=before - after)
    return Fit(parameter, found)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells of an audit share."""

    folder: Path  # of the cells' files
    views: Views
    asked: list[int]  # the views that were recorded
    recording: Recording  # of these
    order: list[int]  # views in the order in which a thief sends them
    one_order: list[int]  # one view of each clip
    fits: dict[tuple[str, float], Fit]
    create: Callable[[], Student]
    recipe: Recipe
    evaluator: Evaluator
    key: bytes
    live: Live
    checkpoint_seconds: float
    stop_asked: Callable[[], bool]  # whether to save and stop
    alarms: Mapping[str, int | None]  # the query of `order`, from 0, at which each detector raises its alarm; None: at none

    def triggers(self) -> tuple[list[int], Tensor]:
        """The views of `order` whose answers carry the watermark, and its labels, int64."""
        recording = self._record_of(self.order)
        answers, chosen = self._watermark(recording)
        chosen &= recording.decoded
        return [self.order[k] for k in chosen.nonzero()[:, 0].tolist()], answers[chosen].argmax(1)

    def _watermark(self, recording: Recording) -> tuple[Tensor, Tensor]:
        probs = recording.probs
        return watermark(probs, draw(self.key, mark(recording.thumbnails, probs)), DAWN_RATE)

    def _record_of(self, views: Sequence[int]) -> Recording:
        place = {view: k for k, view in enumerate(self.asked)}
        return self.recording.take([place[view] for view in views])

    def answers(self, cell: Cell) -> tuple[list[int], Tensor, Tensor]:
        """The views that a cell's thief sends, the answers as targets (N, num_classes), and which it trains on, bool (N,)."""
        views = (self.one_order if cell.views == "one" else self.order)[: cell.budget]
        recording = self._record_of(views)
        logits = recording.logits
        if cell.group == "alarms":
            views, recording, logits = self._answer_until_alarm(cell, views, recording)
        elif cell.group == "ownership":
            logits = self._watermark(recording)[0].clamp(min=1e-12).log()
        elif cell.defence is not None:
            parameter = self.fits[cell.defence, cell.strength or 0.0].parameter
            assert parameter is not None
            logits = replay(cell.defence, parameter, recording, self.key).clamp(min=1e-12).log()
        kind, decimals = ANSWERS[cell.answers]
        targets = answers_to_targets(shape_answers(logits, kind, decimals), kind, logits.shape[1])
        return (views, *self._attack(cell, targets, [view % self.views.num_clips for view in views], recording.decoded))

    def _answer_until_alarm(self, cell: Cell, views: list[int], recording: Recording) -> tuple[list[int], Recording, Tensor]:
        """The views that a thief with one account gets answers to, and these as logits: true before the alarm, then changed."""
        alarm = self.alarms[cell.detector or ""]
        true = len(views) if alarm is None else alarm
        if cell.defence is None:  # nothing from then on
            return views[:true], recording.take(range(true)), recording.logits[:true]
        parameter = 0.0 if cell.strength is None else self.fits[cell.defence, cell.strength].parameter or 0.0
        changed = replay(cell.defence, parameter, recording, self.key).clamp(min=1e-12).log()
        return views, recording, torch.cat([recording.logits[:true], changed[true:]])

    def _attack(self, cell: Cell, targets: Tensor, clips: list[int], decoded: Tensor) -> tuple[Tensor, Tensor]:
        """What the attacker makes of its answers."""
        if cell.attacker == "top-1":
            return take_top1(targets), decoded
        if cell.attacker == "averaged views":
            return average_views(targets, clips), decoded
        if cell.attacker == "agreeing views":
            return targets, decoded & keep_agreeing(targets, clips)
        if cell.attacker in ("recovery", "sure answers"):
            parameter = self.fits[cell.defence or "", cell.strength or 0.0].parameter or 0.0
            if cell.attacker == "sure answers":
                return targets, decoded & keep_sure(targets, parameter)
            return undo(cell.defence or "", parameter, targets), decoded
        return targets, decoded

    def _training_set(self, cell: Cell) -> tuple[list[int], Tensor, int]:
        """The views that a cell's student learns from, their targets, and how many of them are answers.

        All have the thief's own labelled clips, asked or not, in the views that it would send: what a clone has more than an
        innocent student are its answers. Views without one have zeros.
        """
        own = [view for view in range(len(self.views)) if self.views.label(view) >= 0]
        views, targets = list[int](), torch.zeros(0, self.recording.logits.shape[1])
        if cell.group != "innocent":
            views, targets, kept = self.answers(cell)
            views, targets = [v for v, keep in zip(views, kept.tolist(), strict=True) if keep], targets[kept]
            if not views:
                raise UserError(f"{cell.row}: the attacker keeps none of {cell.budget} answers; raise --query-budget")
        more = sorted(set(own) - set(views))
        return views + more, torch.cat([targets, targets.new_zeros(len(more), targets.shape[1])]), len(views)

    def run(self, cell: Cell, done: dict[str, dict], desc: str) -> dict:
        """The result of a cell: the kept one, that of a cell with the same training set and seed among `done`, or a new one."""
        kept = read_cell(self.folder, cell)
        if kept is not None:
            return kept
        result = cell.to_dict() | dict(status="done")
        reason = "" if cell.strength is None else self.fits[cell.defence or "", cell.strength].reason
        if cell.detector is not None and cell.detector not in self.alarms:
            reason = "honest accounts are too few or too short to fit the detector to"
        if reason:
            result |= dict(status="not possible", reason=reason, scores={})
        elif cell.group == "live":
            begin = time.monotonic()
            result |= self.live.run(cell)
            result["seconds"] = round(time.monotonic() - begin, 1)
        else:
            result |= self._score(cell, done, desc)
        write_text(_path(self.folder, cell), json.dumps(result, indent=1) + "\n")
        if cell.group == "live":
            self.live.forget(cell)
        elif "digest" in result:
            self._checkpoint(cell, result["digest"]).unlink(missing_ok=True)
        return result

    def _checkpoint(self, cell: Cell, digest: str) -> Path:
        return self.folder / f"{cell.name}-{digest}.pt"

    def _score(self, cell: Cell, done: dict[str, dict], desc: str) -> dict[str, Any]:
        begin = time.monotonic()
        views, targets, num_answers = self._training_set(cell)
        labels = torch.tensor([self.views.label(view) for view in views])
        digest = hashlib.blake2b(repr((views, self.recipe, cell.seed)).encode(), digest_size=8)
        digest.update(targets.contiguous().numpy().tobytes())
        other = done.get(cell.same_as or "")
        # A defence may change a top class where none is well ahead; then this is a student of its own after all.
        if other is not None and (cell.answers == "logits" or digest.hexdigest() == other["digest"]):
            return other | cell.to_dict() | dict(seconds=0.0)
        # Named by what it learns from, so that no other student goes on from it.
        checkpoints = Checkpoints(self._checkpoint(cell, digest.hexdigest()), self.checkpoint_seconds, self.stop_asked)
        student = train_student(self.create, self.views, views, targets, labels, self.recipe, cell.seed, desc, checkpoints)
        result: dict[str, Any] = dict(
            num_queries=cell.budget, num_trained_on=num_answers, digest=digest.hexdigest(), same_as=None
        )
        result["scores"] = self.evaluator.score(student) | self.evaluator.summarise(student)
        if cell.group in ("innocent", "suspects") or (cell.group == "answers" and cell.budget == len(self.order)):
            result["on_val"] = self.evaluator.top_classes.tolist()
        if cell.group in ("ownership", "innocent"):
            result["on_triggers"] = self._predict_triggers(student)
        return result | dict(seconds=round(time.monotonic() - begin, 1))

    @torch.no_grad()
    def _predict_triggers(self, student: Student) -> list[int]:
        """The student's top class on every trigger, -1 where a clip cannot be decoded any more."""
        views, _ = self.triggers()
        found = dict.fromkeys(views, -1)
        batches = [views[i : i + self.views.batch_size] for i in range(0, len(views), self.views.batch_size)]
        for batch, clips in self.views.load(batches):
            found.update(zip(batch, student(clips).argmax(1).tolist(), strict=True))
        return [found[view] for view in views]


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def read_cell(folder: Path, cell: Cell) -> dict | None:
    """The result that `folder` keeps; None for one that is missing or damaged. Raises UserError when it is another cell's."""
    path = _path(folder, cell)
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    wanted = {name: value for name, value in cell.to_dict().items() if name != "same_as"}
    if not isinstance(kept, dict) or "scores" not in kept:
        return None
    if any(kept.get(name) != value for name, value in wanted.items()):
        raise UserError(f"{printable(path)}: of another audit; choose another --out-dir, or remove it")
    return kept
