"""The query interface: what an attacker gets of a victim. It answers clips, counts them, and gives nothing else."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from extraction.errors import BudgetExhausted, UserError
from extraction.network import VideoModel
from extraction.victims.defences import Defence
from extraction.victims.record import Record
from extraction.victims.wire import name_wire, send

ANSWERS = ("logits", "probs", "top5", "label")

_TOLERANCE = 1e-3  # beyond [0, 1]: rounding in half precision, not a wrong scale


class VictimModel(nn.Module):
    """A victim's model with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes).

    `classes` are the class names in the order of the logits, `fingerprint` says which weights these are. Raises UserError for
    clips outside [0, 1]: brightness from 0 to 255, or what was normalised already, would get answers that mean nothing.
    """

    model: VideoModel
    classes: tuple[str, ...]
    record: Record | None = None  # what the owner keeps of its logits

    def __init__(self, model: VideoModel, classes: list[str], name: str, fingerprint: str):
        super().__init__()
        self.model, self.classes, self.name, self.fingerprint = model, tuple(classes), name, fingerprint
        self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        extremes = torch.stack(clips.aminmax()) if len(clips) else clips.new_zeros(2)
        logits = self.model(clips) if self.record is None else self.record.answer(clips, self.model)
        _require_range(*extremes.tolist())  # read after the model is launched, so that a GPU need not wait
        if logits.shape != (len(clips), len(self.classes)):
            raise UserError(
                f"victim {self.name!r} answered {len(clips)} clips with {tuple(logits.shape)}, not ({len(clips)}, "
                f"{len(self.classes)}): its model and its classes do not belong together; no query was counted"
            )
        return logits


def _require_range(low: float, high: float) -> None:
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN is refused too
        raise UserError(
            f"clips reach from {low:.4g} to {high:.4g}, a victim takes RGB in [0, 1]: divide 0..255 by 255, and leave "
            "normalising to the victim; no query was counted"
        )


_answerers: "WeakKeyDictionary[Victim, Callable[[Tensor], Tensor]]" = WeakKeyDictionary()
_defences: "WeakKeyDictionary[Victim, Defence]" = WeakKeyDictionary()


class Victim:
    """The query interface: `query(clips) -> answers` and the query counter, nothing else. Made by `load_victim`.

    No attribute leads to the model, or to a defence (`defend`): the interface knows them through tables of this module, so
    that attack code cannot reach weights, features, gradients or keys by accident.
    """

    __slots__ = ("__weakref__", "_num_queries", "answers", "classes", "decimals", "fingerprint", "name", "query_budget", "wire")

    def __init__(
        self,
        model: VictimModel,
        answers: str = "probs",
        query_budget: int | None = None,
        decimals: int | None = None,
        num_queries: int = 0,
        wire: str | None = None,
    ):
        if answers not in ANSWERS:
            raise UserError(f"no answers are called {answers!r}; there are {', '.join(ANSWERS)}")
        if decimals is not None and not 0 <= decimals <= 9:
            raise UserError(f"--decimals {decimals}: it must be from 0 to 9")
        if query_budget is not None and query_budget < 0:
            raise UserError(f"query budget {query_budget}: it must be 0 or more")
        self.name, self.fingerprint, self.classes = model.name, model.fingerprint, model.classes
        self.answers, self.decimals, self.wire = answers, decimals, name_wire(wire)
        self.query_budget, self._num_queries = query_budget, num_queries
        _answerers[self] = model

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_queries(self) -> int:
        """Clips answered and counted so far."""
        return self._num_queries

    @property
    def queries_left(self) -> int | None:
        """Clips that the budget still allows; None without a budget."""
        return None if self.query_budget is None else self.query_budget - self._num_queries

    @torch.no_grad()
    def query(self, clips: Tensor) -> Tensor:
        """Answer float (B, 3, T, H, W) RGB clips in [0, 1]: B queries.

        Returns (B, num_classes) for `logits`, `probs` and `top5` (probabilities, all but the best five zero), and (B,)
        int64 for `label`. Raises BudgetExhausted, before anything is answered, when B is more than the budget has left.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or not clips.is_floating_point():
            raise ValueError(f"clips must be float (B, 3, T, H, W), not {clips.dtype} {tuple(clips.shape)}")
        if self.queries_left is not None and len(clips) > self.queries_left:
            raise BudgetExhausted(
                f"query budget exhausted: {self.num_queries} of {self.query_budget} queries spent, "
                f"{len(clips)} more asked for; raise --query-budget to go on"
            )
        if self.wire != "float" and len(clips):
            _require_range(*torch.stack(clips.aminmax()).tolist())  # before they are clipped
            clips = send(clips, self.wire)
        logits = _answerers[self](clips)
        if self in _defences:
            logits = _defences[self](clips, logits.float().softmax(1)).clamp(min=1e-12).log()
        answers = shape_answers(logits, self.answers, self.decimals)
        self._num_queries += len(clips)
        return answers


def defend(victim: Victim, defence: Defence) -> Victim:
    """Put a defence before a victim's answers: of any type, it is that of the defended probabilities. Returns the victim."""
    _defences[victim] = defence
    return victim


def take_records(victim: Victim) -> list[bytes]:
    """What a victim's defence wants kept, to be emptied once it is: see `Defence.records`."""
    return _defences[victim].records if victim in _defences else []


def shape_answers(logits: Tensor, answers: str, decimals: int | None = None) -> Tensor:
    """An answer of the type `answers` from (B, num_classes) logits; see `Victim.query`. `decimals` rounds all but labels."""
    if answers == "label":
        return logits.argmax(1)
    shown = logits if answers == "logits" else logits.softmax(1)
    if answers == "top5":
        best = shown.topk(min(5, shown.shape[1]), dim=1)
        shown = torch.zeros_like(shown).scatter(1, best.indices, best.values)
    return shown if decimals is None else shown.round(decimals=decimals)
