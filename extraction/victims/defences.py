"""Defences: what a victim's probabilities go through before they become answers, to spoil what is learned from them.

The functions change probabilities (B, num_classes) and return probabilities. Most are named after a paper; each has one
parameter, and published values of it mean another cost for every victim, so that `calibrate` finds the one that costs honest
users a given mean L1 distance. What is drawn at random is drawn from a secret key and from what a clip looks like
(`draw`), never anew: asking again, or asking about a nearly equal clip, averages nothing away. `Defence` is one of them as it
stands behind a query interface, with its key and its memory.

Where the top class is kept, an attacker who trains on it alone is not hindered: label-only answers are the bound.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from extraction.errors import UserError
from extraction.victims.detectors import DETECTORS, Detector, Stream, thumbnail
from extraction.weights import fingerprint, fingerprint_state

# By how much the top class stays above the others. ModelGuard has 1e-4, which the 16 bits of a ledger cannot tell from a tie.
_MARGIN = 1e-3

# --- draws ---------------------------------------------------------------------------------------------------------------


def mark(thumbnails: Tensor, probs: Tensor) -> list[bytes]:
    """What a clip looks like, coarsely, as a few bytes: the same for nearly equal clips.

    From uint8 (B, 3, 4, 8, 8) thumbnails (`detectors.thumbnail`) and (B, num_classes) probabilities: which eighths of the clip
    are brighter than the whole, and the victim's top class.
    """
    eighths = F.adaptive_avg_pool3d(thumbnails.float().mean(1), (2, 2, 2)).flatten(1)
    bits = (eighths > eighths.mean(1, keepdim=True)).byte().tolist()
    return [bytes([*row, *top.to_bytes(4, "little")]) for row, top in zip(bits, probs.argmax(1).tolist(), strict=True)]


def draw(key: bytes, marks: Sequence[bytes]) -> Tensor:
    """Two random numbers for each mark: int64 (B, 2) in [0, 2^63), a function of the secret key and the mark alone."""
    digests = b"".join(hashlib.blake2b(mark, key=key, digest_size=16).digest() for mark in marks)
    return (
        torch.frombuffer(bytearray(digests), dtype=torch.int64).view(-1, 2) & (2**63 - 1) if marks else torch.empty(0, 2).long()
    )


def _draw_other_class(probs: Tensor, draws: Tensor) -> Tensor:
    """A class of each row, (B, 1), that is not its top one."""
    num_classes = probs.shape[1]
    return (probs.argmax(1, keepdim=True) + 1 + draws[:, 1:] % (num_classes - 1)) % num_classes


# --- functions of probabilities ------------------------------------------------------------------------------------------


def noise(probs: Tensor, draws: Tensor, epsilon: float) -> Tensor:
    """Keyed noise, the control: epsilon / 2 of the probability goes to a random class that is not the top one.

    Mazeika et al. (2206.10341) call it Random. A defence that does no better at the same cost is none.
    """
    onto = torch.zeros_like(probs).scatter_(1, _draw_other_class(probs, draws), 1.0)
    return torch.lerp(probs, onto, epsilon / 2)


def reverse_sigmoid(probs: Tensor, beta: float, gamma: float = 0.2) -> Tensor:
    """Reverse sigmoid (Lee et al., 1806.00054): y - beta (sigmoid(gamma logit y) - 1/2), clipped and renormalised.

    Keeps the top class of answers with a peak; of nearly even ones a large beta can change it.
    """
    logits = torch.logit(probs.double(), eps=1e-9)
    moved = (probs - beta * (torch.sigmoid(gamma * logits) - 0.5)).clamp(0, 1)
    return (moved / moved.sum(1, keepdim=True).clamp(min=1e-12)).to(probs.dtype)


def draw_surrogate(key: bytes, num_classes: int) -> Tensor:
    """The answer (num_classes,) of MAD's surrogate: nearly even, as an untrained network's is."""
    digest = hashlib.blake2b(b"surrogate", key=key, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return (0.1 * torch.randn(num_classes, generator=generator)).softmax(0)


def mad(probs: Tensor, epsilon: float, surrogate: Tensor) -> Tensor:
    """MAD, maximising angular deviation (Orekondy et al., 1906.10908): towards the class that turns a gradient away most.

    The surrogate, of which gradients of the last linear layer are taken as in the authors' code, answers q. Its gradient
    for an answer y is then (y - q) h^T, whose features h drop out when directions are compared: a closed form, without a
    Jacobian. Moves at most epsilon in L1. Beyond about 1 the top class changes.
    """
    q = surrogate.to(probs)
    away = probs - q
    dots = away - (away @ q)[:, None]  # of each vertex e_j - q with y - q
    cosines = dots / (1 - 2 * q + q @ q).sqrt()
    vertex = torch.zeros_like(probs).scatter_(1, cosines.argmin(1, keepdim=True), 1.0)
    return _move_towards(probs, vertex, epsilon)


def mad_argmax(probs: Tensor, epsilon: float) -> Tensor:
    """MAD-argmax: as `mad`, among answers that keep the top class; an untrained surrogate's answer is taken as even.

    The corners of those are even over any set of classes with the top one among them. Of each size the best is that of the
    least likely other classes, so that as many corners as classes are looked at, and not 2^(num_classes - 1).
    """
    num_classes, top = probs.shape[1], probs.argmax(1, keepdim=True)
    order = probs.scatter(1, top, -torch.inf).argsort(1)  # the top class first
    sizes = torch.arange(1, num_classes, device=probs.device, dtype=probs.dtype)  # all classes are the surrogate's own answer
    deviations = probs.gather(1, order).cumsum(1)[:, :-1] / sizes - 1 / num_classes
    best = (deviations / (1 / sizes - 1 / num_classes).sqrt()).argmin(1, keepdim=True)  # the cosine, but for its length
    weights = (torch.arange(num_classes, device=probs.device) <= best) / (best + 1)
    moved = _move_towards(probs, torch.zeros_like(probs).scatter_(1, order, weights.to(probs)), epsilon)
    moved = moved.scatter_add(1, top, torch.full_like(top, _MARGIN, dtype=probs.dtype))
    return moved / moved.sum(1, keepdim=True)


def _move_towards(probs: Tensor, goal: Tensor, epsilon: float) -> Tensor:
    """On the way from `probs` to `goal`, `epsilon` far in L1 at most."""
    distance = (goal - probs).abs().sum(1, keepdim=True)
    return torch.lerp(probs, goal, (epsilon / distance.clamp(min=1e-12)).clamp(max=1.0))


def modelguard_w(probs: Tensor, epsilon: float, margin: float = _MARGIN) -> Tensor:
    """ModelGuard-W (Tang et al., USENIX Security 2024): the answer that says least of the true one, by their linear program.

    Minimises sum(log(y + 1e-6) * answer) over the simplex within `epsilon` in L1, the top class `margin` above all others.
    For a given probability of the top class the rest is a matter of sorting; the optimum is convex in that probability,
    which is found by golden sections. Where nothing within `epsilon` has that margin, the true answer.
    """
    order = probs.scatter(1, probs.argmax(1, keepdim=True), torch.inf).argsort(1)  # costs rise with y; the top class is last
    y = probs.double().gather(1, order)
    rest, top, budget = y[:, :-1], y[:, -1:], epsilon / 2
    costs = (y + 1e-6).log()

    def fits(new_top: Tensor) -> Tensor:
        """Whether there is room for the rest below the margin, and the budget reaches."""
        cap = new_top - margin
        needed = (top - new_top).clamp(min=0) + (rest - cap).clamp(min=0).sum(1, keepdim=True)
        return (needed <= budget) & (rest.shape[1] * cap >= 1 - new_top)

    low, high = torch.zeros_like(top), (top + budget).clamp(max=1.0)
    possible = fits(high)
    for _ in range(40):  # to the least that fits
        middle = (low + high) / 2
        low, high = torch.where(fits(middle), low, middle), torch.where(fits(middle), middle, high)
    low, high = high, (top + budget).clamp(max=1.0)
    least, golden = low, (5**0.5 - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        cost_a, cost_b = ((_fill(rest, top, new_top, margin, budget) * costs).sum(1, keepdim=True) for new_top in (a, b))
        left = cost_a <= cost_b
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    answer = _fill(rest, top, torch.maximum(high, least), margin, budget)
    answer = torch.where(possible, answer, y).clamp(min=0)
    answer = torch.zeros_like(answer).scatter_(1, order, answer / answer.sum(1, keepdim=True))
    return answer.to(probs.dtype)


def _fill(rest: Tensor, top: Tensor, new_top: Tensor, margin: float, budget: float) -> Tensor:
    """The cheapest answer (B, num_classes) whose last, top class is `new_top`, given rows in ascending order.

    What the top class gives, what stands above its cap and what the budget still allows is taken from the likeliest of the
    other classes and given to the least likely, up to the cap.
    """
    cap = new_top - margin
    base = torch.minimum(rest, cap).clamp(min=0)
    over = (rest - base).sum(1, keepdim=True)
    given = top - new_top  # negative: taken
    # Without a budget the mass fills the least likely classes, one after the other.
    mass = 1 - new_top
    before = torch.arange(rest.shape[1], device=rest.device) * cap
    ideal = torch.minimum((mass - before).clamp(min=0), cap)
    wanted = (base - ideal).clamp(min=0).sum(1, keepdim=True)
    drained = torch.minimum(wanted, budget - over - given.clamp(min=0))
    drained = torch.maximum(drained, (-given - over).clamp(min=0))
    filled = drained + over + given
    room = cap - base
    added = torch.minimum((filled - (room.cumsum(1) - room)).clamp(min=0), room)
    above = base.sum(1, keepdim=True) - base.cumsum(1)  # what stands in likelier classes
    taken = torch.minimum((drained - above).clamp(min=0), base)
    return torch.cat([base + added - taken, new_top], 1)


def swap(probs: Tensor, draws: Tensor) -> Tensor:
    """A keyed lie: the top probability changes places with that of a random other class."""
    top, other = probs.argmax(1, keepdim=True), _draw_other_class(probs, draws)
    return probs.scatter(1, top, probs.gather(1, other)).scatter(1, other, probs.gather(1, top))


def misinform(probs: Tensor, draws: Tensor, threshold: float) -> Tensor:
    """Adaptive misinformation (Kariyappa and Qureshi, 1911.07100), after training: unsure answers become lies.

    (1 - a) y + a f(y) with a = sigmoid(1000 (threshold - max y)), as published. The published f is a second network,
    trained to be wrong, and the victim is trained to be unsure of foreign clips; here f is the keyed `swap`.
    """
    share = torch.sigmoid(1000 * (threshold - probs.amax(1, keepdim=True)))
    return torch.lerp(probs, swap(probs, draws), share)


def threshold_for_share(honest: Tensor, share: float) -> float:
    """The threshold of `misinform` below which this share of (N, num_classes) honest answers is."""
    return honest.amax(1).double().quantile(share).item()


def watermark(probs: Tensor, draws: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """DAWN (Szyller et al., 1906.00830): of a keyed selection of clips, `rate` of all, the answer is the keyed `swap`.

    Returns the answers and which are selected, bool (B,). A thief who trains on them repeats them:
    `extraction.victims.ownership` tests that.
    """
    chosen = draws[:, 0].double() / 2**63 < rate
    return torch.where(chosen[:, None], swap(probs, draws), probs), chosen


class Quantiser:
    """ModelGuard-S (Tang et al., USENIX Security 2024): many true answers get the same reply.

    The reply is the first stored answer of the same top class within `epsilon` in L1; where there is none, the true answer,
    which is stored from then on. So what it replies depends on all that was asked before, whoever asked.
    """

    def __init__(self) -> None:
        self._cells: dict[int, Tensor] = {}  # top class -> stored answers, with room for more below them
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __call__(self, probs: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Answer (B, num_classes) probabilities, in order. Returns the replies, and which rows were stored, bool (B,)."""
        replies, stored = probs.clone(), torch.zeros(len(probs), dtype=torch.bool)
        for row, top in enumerate(probs.argmax(1).tolist()):
            cells = self._cells[top][: self._counts[top]] if top in self._cells else probs[:0]
            near = ((cells - probs[row]).abs().sum(1) <= epsilon).nonzero()
            if len(near):
                replies[row] = cells[near[0, 0]]
            else:
                self.store(probs[row])
                stored[row] = True
        return replies, stored

    def store(self, answer: Tensor) -> None:
        top = int(answer.argmax())
        count, cells = self._counts.get(top, 0), self._cells.get(top, answer.new_empty(0, len(answer)))
        if count == len(cells):
            cells = torch.cat([cells, torch.zeros(max(4, count), len(answer), dtype=answer.dtype)])
        cells[count] = answer
        self._cells[top], self._counts[top] = cells, count + 1


# --- cost and calibration ------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a defence costs honest users."""

    l1: float  # mean L1 distance of answers from the true ones, 0 to 2
    flips: float  # share of answers whose top class is another


def measure(honest: Tensor, answers: Tensor) -> Cost:
    """The cost of giving (N, num_classes) `answers` where the true ones are `honest`."""
    distance = (answers.double() - honest.double()).abs().sum(1).mean()
    return Cost(distance.item(), (answers.argmax(1) != honest.argmax(1)).double().mean().item())


def calibrate(defend: Callable[[float], Tensor], honest: Tensor, target: float, most: float) -> tuple[float, Cost]:
    """The parameter in [0, most] at which `defend(parameter)`, of the `honest` answers, costs a mean L1 of `target`.

    By bisection. Returns the parameter tried that came nearest, and its cost: a defence whose cost jumps may miss the target.
    Raises UserError when its greatest cost is below.
    """
    tried = {most: measure(honest, defend(most))}
    if tried[most].l1 < target:
        raise UserError(f"the defence costs at most L1 {tried[most].l1:.3g} on these answers, not {target}; lower its strength")
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        tried[middle] = measure(honest, defend(middle))
        if abs(tried[middle].l1 - target) < 1e-4 * target:
            break
        low, high = (middle, high) if tried[middle].l1 < target else (low, middle)
    best = min(tried, key=lambda parameter: abs(tried[parameter].l1 - target))
    return best, tried[best]


# --- behind a query interface --------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A defence that can be asked for by its name."""

    defend: Callable[[Tensor, Tensor, bytes, float], Tensor]  # of probabilities, draws, key and parameter
    most: float | None  # the greatest parameter; None: there is none to choose
    lies: bool  # changes top classes on purpose, so that label-only answers are defended too


def _only_top(probs: Tensor) -> Tensor:
    return torch.zeros_like(probs).scatter_(1, probs.argmax(1, keepdim=True), 1.0)


DEFENCES: dict[str, Kind] = {
    "noise": Kind(lambda probs, draws, key, x: noise(probs, draws, x), 2.0, True),
    "reverse_sigmoid": Kind(lambda probs, draws, key, x: reverse_sigmoid(probs, x), 1.0, False),
    "mad": Kind(lambda probs, draws, key, x: mad(probs, x, draw_surrogate(key, probs.shape[1])), 2.0, True),
    "mad_argmax": Kind(lambda probs, draws, key, x: mad_argmax(probs, x), 2.0, False),
    "modelguard_w": Kind(lambda probs, draws, key, x: modelguard_w(probs, x), 2.0, False),
    "modelguard_s": Kind(lambda probs, draws, key, x: Quantiser()(probs, x)[0], 2.0, False),
    "misinformation": Kind(lambda probs, draws, key, x: misinform(probs, draws, x), 1.1, True),
    "dawn": Kind(lambda probs, draws, key, x: watermark(probs, draws, x)[0], 1.0, True),
    "label": Kind(lambda probs, draws, key, x: _only_top(probs), None, False),
    "lie": Kind(lambda probs, draws, key, x: swap(probs, draws), None, True),
    "nothing": Kind(lambda probs, draws, key, x: torch.full_like(probs, 1 / probs.shape[1]), None, True),
}


def check_defence(name: str | None, strength: float | None, after: str | None, answers: str) -> str | None:
    """What is asked for, in words: `noise 0.3 after prada`; None without a defence. Raises UserError, in one line."""
    if name is None:
        for flag, value in (("--defence-strength", strength), ("--defence-after", after)):
            if value is not None:
                raise UserError(f"{flag} {value} needs a defence: --defence, one of {', '.join(DEFENCES)}")
        return None
    if name not in DEFENCES:
        raise UserError(f"--defence {name}: there are {', '.join(DEFENCES)}")
    kind = DEFENCES[name]
    if answers == "label" and not kind.lies:
        raise UserError(f"--defence {name} keeps the top class, of which --answers label shows nothing else; it needs probs")
    if kind.most is None and strength is not None:
        raise UserError(f"--defence {name} has no strength; leave --defence-strength away")
    if kind.most is not None and strength is None:
        raise UserError(
            f"--defence {name} needs --defence-strength: the mean L1 distance it may cost honest users, such as 0.3"
        )
    if after is not None:
        parse_detector(after)
    return " ".join([name, *([] if strength is None else [f"{strength:g}"]), *([] if after is None else [f"after {after}"])])


def parse_detector(after: str) -> tuple[str, dict[str, Any] | None]:
    """`prada` -> ("prada", None), whose constants are to be fitted; `quota:500`, `prada:0.9` -> with them."""
    match after.partition(":"):
        case "quota", ":", limit if limit.isdecimal():
            return "quota", dict(limit=int(limit))
        case "prada", ":", delta if re.fullmatch(r"0?\.\d+", delta):
            return "prada", dict(delta=float(delta))
        case name, "", "" if name in DETECTORS and name != "quota":
            return name, None
    raise UserError(
        f"--defence-after {after}: there are quota:N (queries), prada, prada:W (its threshold, published 0.9), near_duplicates "
        "and confidence"
    )


def fit_defence(name: str, strength: float | None, honest: Tensor, key: bytes) -> dict[str, Any]:
    """The constants of a defence: `parameter`, and what it costs on (N, num_classes) honest answers, of which 1000 are taken.

    Raises UserError when `strength`, a mean L1 distance, is more than it can cost.
    """
    honest = honest[torch.linspace(0, len(honest) - 1, min(len(honest), 1000)).long()].float().cpu()
    draws = draw(key, [b"honest %d" % number for number in range(len(honest))])
    kind = DEFENCES[name]

    def defend(parameter: float) -> Tensor:
        return kind.defend(honest, draws, key, parameter)

    if kind.most is None or strength is None:
        parameter, cost = None, measure(honest, defend(0.0))
    else:
        parameter, cost = calibrate(defend, honest, strength, kind.most)
    return dict(name=name, parameter=parameter, l1=cost.l1, flips=cost.flips)


def derive_key(weights: str | Path | Mapping[str, Tensor]) -> bytes:
    """The secret key of a victim's owner: it follows from the weights, a file or a state dict, which an attacker has not."""
    content = fingerprint_state(weights, 64) if isinstance(weights, Mapping) else fingerprint(weights, 64)
    return hashlib.blake2b(content.encode(), person=b"defence key", digest_size=32).digest()


def hash_key(key: bytes) -> str:
    """A name for a key, from which the key does not follow."""
    return hashlib.blake2b(b"name", key=key, digest_size=8).hexdigest()


def read_record(record: bytes) -> dict[str, Tensor]:
    """The tensors of one of `Defence.records`. Raises UserError."""
    try:
        return safetensors.torch.load(record)
    except (safetensors.SafetensorError, TypeError) as error:
        raise UserError(f"what a defence remembers is damaged ({error}); put a whole ledger back, or ask anew") from None


class Defence:
    """A defence as it stands behind a query interface, with its key and what it remembers.

    `defence` has the constants of `fit_defence`; with a `detector`, its name and constants, answers are true until its alarm.
    What must survive a crash is in `records`: bytes to be written, in order, with the answers, and given to `replay` later.
    """

    def __init__(self, defence: dict[str, Any], key: bytes, detector: Sequence[Any] | None = None):
        self.name, self.parameter, self._key = defence["name"], defence["parameter"] or 0.0, key
        self._detector: Detector | None = None if detector is None else DETECTORS[detector[0]].create(**detector[1])
        self._alarmed = detector is None
        self._quantiser = Quantiser()
        self.records: list[bytes] = []

    @property
    def remembers(self) -> bool:
        """Whether answers follow from what was asked before, or leave something to be kept."""
        return self._detector is not None or self.name in ("modelguard_s", "dawn")

    def __call__(self, clips: Tensor, probs: Tensor) -> Tensor:
        """The probabilities to answer float (B, 3, T, H, W) clips with, given the true ones, both (B, num_classes)."""
        true, thumbnails, record = probs.float().cpu(), thumbnail(clips), dict[str, Tensor]()
        alarmed = torch.full((len(true),), self._alarmed)
        if self._detector is not None and not self._alarmed:
            record |= dict(thumbnails=thumbnails, probs=true)
            alarmed = self._observe(thumbnails, true)
        answers = true.clone()
        if alarmed.any():
            draws = draw(self._key, mark(thumbnails[alarmed], true[alarmed]))
            if self.name == "modelguard_s":
                answers[alarmed], stored = self._quantiser(true[alarmed], self.parameter)
                record |= dict(stored=true[alarmed][stored]) if stored.any() else {}
            elif self.name == "dawn":
                answers[alarmed], chosen = watermark(true[alarmed], draws, self.parameter)
                if chosen.any():
                    pixels = (clips.detach().cpu()[alarmed][chosen] * 255).round().clamp(0, 255).byte()
                    record |= dict(triggers=pixels, labels=answers[alarmed][chosen].argmax(1))
            else:
                answers[alarmed] = DEFENCES[self.name].defend(true[alarmed], draws, self._key, self.parameter)
        if record:
            self.records.append(safetensors.torch.save({name: value.contiguous() for name, value in record.items()}))
        return answers.to(probs)

    def _observe(self, thumbnails: Tensor, probs: Tensor) -> Tensor:
        assert self._detector is not None
        alarmed = self._detector.observe(Stream(thumbnails, probs))
        self._alarmed = bool(alarmed.any())
        return alarmed

    def replay(self, record: bytes) -> None:
        """Remember again what a record says. Raises UserError."""
        found = read_record(record)
        if "probs" in found:
            self._observe(found["thumbnails"], found["probs"])
        for answer in found.get("stored", ()):
            self._quantiser.store(answer)
