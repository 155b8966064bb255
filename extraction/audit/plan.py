"""The plan of an audit: which students are trained, on which answers, how many queries that takes, and how long it will be."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from extraction.errors import UserError
from extraction.victims.defences import DEFENCES, check_defence
from extraction.victims.detectors import DETECTORS

# Answer types: what a service may show, the least of it last. `logits` say what `probs` do: softmax, which training takes.
ANSWERS: dict[str, tuple[str, int | None]] = {
    "logits": ("logits", None),
    "probs": ("probs", None),
    "top5": ("top5", None),
    "2 decimals": ("probs", 2),
    "1 decimal": ("probs", 1),
    "label": ("label", None),
}
DAWN_RATE = 0.01  # share of the answers that carry the watermark

# Live attacks, with what each is compared with: the same queries without what makes it what it is.
DATA_FREE, LARGER, AT_REST = "data-free", "data-free, larger steps", "data-free, generator at rest"
CRAFTED, OWN_VIEWS = "crafted queries", "own views alone"
CONTROLS = {DATA_FREE: AT_REST, LARGER: AT_REST, CRAFTED: OWN_VIEWS}
LIVE_DEFENCES = ("modelguard_w", "misinformation")  # the strongest without a state: one keeps the top class, one lies
RESPONSES = ("label", "misinformation", "lie")  # what an account gets after a detector's alarm; nothing is one too
BEFORE = "answers before the alarm"  # the attacker who trains on these alone: all that there is where nothing follows
STUDENT_STEPS = 5  # on fresh clips, in an iteration of the data-free attack


class Scale(NamedTuple):
    """How much an audit looks at. Fixed before any run, and printed."""

    answers: tuple[str, ...]
    defences: tuple[str, ...]
    strengths: tuple[float, ...]  # mean L1 to honest answers
    num_budgets: int  # each a quarter of the next
    share: float  # the largest budget, of all views
    passes: float  # what a student sees, of --epochs passes over all clips
    num_seeds: int  # of the answer types; defences have one
    num_nulls: int  # innocent students
    num_accounts: int  # of each honest profile
    account_queries: tuple[int, int]  # the least and the most of an honest account
    live_budget: int  # the most queries of each attack that runs live
    responses: tuple[str, ...] = RESPONSES


SCALES = {
    "quick": Scale(
        ("logits", "probs", "1 decimal", "label"), ("noise", "reverse_sigmoid", "modelguard_w", "misinformation"),
        (0.3,), 3, 0.5, 0.33, 1, 3, 8, (50, 250), 1280, ("label", "misinformation"),
    ),
    "default": Scale(
        tuple(ANSWERS), ("noise", "reverse_sigmoid", "mad", "mad_argmax", "modelguard_w", "modelguard_s", "misinformation"),
        (0.1, 0.3, 0.6), 4, 1.0, 0.33, 2, 5, 12, (50, 500), 5120,
    ),
    "thorough": Scale(
        tuple(ANSWERS), ("noise", "reverse_sigmoid", "mad", "mad_argmax", "modelguard_w", "modelguard_s", "misinformation"),
        (0.1, 0.3, 0.6), 5, 1.0, 1.0, 3, 20, 40, (50, 2000), 10_240,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A student to be trained and scored: the answers it learns from, and what the attacker makes of them."""

    group: str  # the table that it belongs to: answers, defences, alarms, views, ownership, suspects, innocent, live
    answers: str = "probs"  # of `ANSWERS`
    defence: str | None = None
    strength: float | None = None  # mean L1 that the defence costs honest users
    attacker: str = "naive"
    views: str = "all"  # all: in random order; one: a single view of each clip
    budget: int = 0
    seed: int = 0
    same_as: str | None = None  # the name of a cell with the same answers and seed, whose student this is
    wire: str | None = None  # of a live attack; None: the audit's
    detector: str | None = None  # after whose alarm the defence begins

    @property
    def row(self) -> str:
        """The name of its row: the same for every budget and seed."""
        defence = [] if self.defence is None else [self.defence + ("" if self.strength is None else f" {self.strength:g}")]
        after = [] if self.detector is None else [f"after {self.detector}"]
        views = ["one view a clip"] if self.views == "one" else []
        watermark = ["watermarked"] if self.group == "ownership" else []
        return "labels alone" if self.group == "innocent" else ", ".join(
            [
                self.answers, *([] if self.wire is None else [self.wire]), *watermark, *defence, *after, *views,
                *([] if self.attacker == "naive" else [self.attacker]),
            ]
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The name of its file."""
        return re.sub(r"[^\w.]+", "_", f"{self.group} {self.row} {self.budget} seed {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | dict(row=self.row, name=self.name)


class Plan(NamedTuple):
    """What an audit will do."""

    cells: list[Cell]
    budgets: list[int]  # ascending
    one_view_budget: int
    recipe_clips: int  # that each student sees, but those of live attacks

    @property
    def num_students(self) -> int:
        """Students to be trained on recorded answers at most: cells with the same ones share one."""
        return sum(cell.same_as is None or cell.group == "alarms" for cell in self.cells if cell.group != "live")

    @property
    def live_queries(self) -> int:
        return sum(cell.budget for cell in self.cells if cell.group == "live")


def plan_budgets(scale: Scale, num_views: int, most: int | None, batch_size: int) -> list[int]:
    """The budgets, each a quarter of the next. Raises UserError when the smallest is less than a batch."""
    largest = int(scale.share * num_views) if most is None else min(most, num_views)
    budgets = [largest // 4**k for k in reversed(range(scale.num_budgets))]
    if budgets[0] < batch_size:
        raise UserError(
            f"a budget of {largest} queries is too small: the smallest of {scale.num_budgets} would be {budgets[0]}, less "
            f"than a batch of {batch_size}; raise --query-budget (to {batch_size * 4 ** (scale.num_budgets - 1)}), or lower "
            "--batch-size"
        )
    return budgets


def plan_cells(
    scale: Scale, num_clips: int, views_per_clip: int, most: int | None, batch_size: int, epochs: int, answers: Sequence[str],
    defences: Sequence[str], wire: str = "float", num_directions: int = 1,
) -> Plan:  # fmt: skip
    """All cells of an audit: each answer type at each budget, each defence with each attacker, answers after alarms, ownership,
    innocent students, live attacks.

    `answers` and `defences` narrow the scale's down, if any are named. Data-free attacks ask along `num_directions`; `wire` is
    the audit's, by its full name. Raises UserError for a name that is none, for a defence
    that needs probabilities where only labels are answered, and for a budget that is too small.
    """
    types = tuple(answers) or scale.answers
    if unknown := set(types) - set(ANSWERS):
        raise UserError(f"--answers {min(unknown)}: there are {', '.join(ANSWERS)}")
    chosen = tuple(defences) or scale.defences
    shown = "label" if types == ("label",) else "probs"
    for name in chosen:
        if name in DEFENCES and (DEFENCES[name].most is None or name == "dawn"):
            raise UserError(f"--defences {name}: not one with a strength; ownership and what follows an alarm have their own")
        if defences or shown == "probs":
            check_defence(name, scale.strengths[0], None, shown)
    if shown == "label":
        chosen = tuple(name for name in chosen if DEFENCES[name].lies)
    # Labels bound all defences that keep the top class; probabilities come before logits, which share their students.
    types = tuple(kind for kind in ("probs", *ANSWERS) if kind in (*types, "label"))
    types = tuple(dict.fromkeys(types))
    num_views = num_clips * views_per_clip
    budgets = plan_budgets(scale, num_views, most, batch_size)
    largest = budgets[-1]
    cells = [
        Cell(group="answers", answers=kind, budget=budget, seed=seed)
        for kind in types
        for budget in budgets
        for seed in range(scale.num_seeds)
    ]
    if {"logits", "probs"} <= set(types):
        cells = [
            replace(cell, same_as=replace(cell, answers="probs").name) if cell.answers == "logits" else cell for cell in cells
        ]
    if shown == "probs" and "probs" not in types:  # what stands behind the defences
        cells += [Cell(group="answers", budget=largest)]
    label = Cell(group="answers", answers="label", budget=largest).name
    for name in chosen:
        for strength in scale.strengths:
            base = Cell(group="defences", answers=shown, defence=name, strength=strength, budget=largest)
            for attacker in list_attackers(name, shown, views_per_clip):
                same = label if attacker == "top-1" and not DEFENCES[name].lies else None
                cells.append(replace(base, attacker=attacker, same_as=same))
    middle = scale.strengths[len(scale.strengths) // 2]
    cells += plan_alarms(shown, scale.responses, middle, largest)
    one_view = min(num_clips, largest)
    cells.append(Cell(group="views", answers=shown, views="one", budget=one_view))
    for attacker in ("naive", "top-1", *(["agreeing views"] if views_per_clip > 1 else [])):
        cells.append(Cell(group="ownership", answers=shown, defence="dawn", attacker=attacker, budget=largest))
    # Clones of another seed than those by which conferred clips are chosen: the same first weights would make them alike.
    suspects = [Cell(group="answers", answers=kind, budget=largest, seed=1) for kind in dict.fromkeys((shown, "label"))]
    known = {cell.name for cell in cells}
    cells += [replace(cell, group="suspects", same_as=cell.name if cell.name in known else None) for cell in suspects]
    cells += [Cell(group="innocent", answers="label", seed=1000 + k) for k in range(scale.num_nulls)]
    behind = [(name, middle) for name in LIVE_DEFENCES if name in chosen]
    coarse = ["1 decimal"] if shown == "probs" and "1 decimal" in types else []
    live_budget = scale.live_budget if most is None else min(scale.live_budget, most)
    cells += plan_live(shown, coarse, behind, wire, live_budget, batch_size, num_directions)
    recipe_clips = max(batch_size, round(scale.passes * epochs * num_clips))
    return Plan(cells, budgets, one_view, recipe_clips)


def plan_alarms(shown: str, responses: Sequence[str], strength: float, budget: int) -> list[Cell]:
    """For each detector a clone of the answers before its alarm, and one of all for each response that changes what is shown.

    Where there is no alarm it is the undefended clone, `same_as`. `strength` is that of misinformation.
    """
    undefended = Cell(group="answers", answers=shown, budget=budget)
    base = replace(undefended, group="alarms", same_as=undefended.name)
    found = []
    for detector in DETECTORS:
        found.append(replace(base, detector=detector, attacker=BEFORE))
        for name in responses:
            if shown != "label" or DEFENCES[name].lies:
                found.append(
                    replace(base, detector=detector, defence=name, strength=None if DEFENCES[name].most is None else strength)
                )
    return found


def count_iteration(batch_size: int, num_directions: int) -> int:
    """Queries of an iteration of the data-free attack: one generator step, and the student's."""
    return batch_size * (1 + num_directions + STUDENT_STEPS)


def list_live_wires(wire: str) -> list[str]:
    """The wires that live attacks go through, each coarser than the one before: floats, 8 bits, H.264 (the audit's own)."""
    return ["float", "uint8", wire if wire.startswith("h264") else "h264:23"]


def plan_live(
    shown: str, coarse: Sequence[str], defences: Sequence[tuple[str, float]], wire: str, budget: int, batch_size: int,
    num_directions: int,
) -> list[Cell]:  # fmt: skip
    """The live attacks: behind each wire, and behind the audit's wire with each defence, beside their controls.

    Data-free ones also behind each of the `coarse` answer types, and with larger steps behind the coarsest wire. A budget of
    less than an iteration leaves them out, one of less than a batch leaves out the crafted queries too.
    """
    wires, cells = list_live_wires(wire), []
    iterations = budget // count_iteration(batch_size, num_directions)
    for attacker, queries in (
        (DATA_FREE, iterations * count_iteration(batch_size, num_directions)),
        (CRAFTED, budget // batch_size * batch_size),
    ):
        if not queries:
            continue
        base = Cell(group="live", answers=shown, attacker=attacker, wire=wire, budget=queries)
        cells += [replace(base, wire=name) for name in wires]
        cells += [replace(base, defence=name, strength=strength) for name, strength in defences]
        if attacker == DATA_FREE:
            cells += [replace(base, answers=kind) for kind in coarse]
            cells.append(replace(base, wire=wires[-1], attacker=LARGER))
        cells.append(replace(base, attacker=CONTROLS[attacker]))
    return cells


def list_attackers(defence: str, answers: str, views_per_clip: int) -> list[str]:
    """The attackers that a defence is judged by: all that have something to do about it."""
    averaged = ["averaged views"] if views_per_clip > 1 else []
    if answers == "label":
        return ["naive", *averaged]
    undoing = ["sure answers"] if defence == "misinformation" else ["recovery"]
    return ["naive", "top-1", *undoing, *averaged]


class Prices(NamedTuple):
    """What things cost in seconds on this machine, from a short measurement."""

    step: float  # a student's step, a clip
    predict: float  # a student's prediction, a clip
    answer: float  # a victim's answer, a clip
    generate: float = 0.0  # a generated clip
    craft: float = 0.0  # a gradient of the student's with respect to a clip
    encode: float = 0.0  # a clip through H.264


def estimate_seconds(plan: Plan, prices: Prices, num_views: int, num_honest: int, num_val: int) -> float:
    """How long an audit takes; recovery's tables, detectors and pictures are taken as a twentieth, and half a minute."""
    students = plan.num_students * (plan.recipe_clips * prices.step + num_val * prices.predict)
    answers = (num_views + num_honest) * prices.answer
    live = [cell for cell in plan.cells if cell.group == "live"]
    attacks = sum(cell.budget * _price_live(cell, prices) + 2 * num_val * prices.predict for cell in live)
    return 30 + 1.05 * (students + answers + attacks)


def _price_live(cell: Cell, prices: Prices) -> float:
    """Seconds of a query of a live attack, with what follows from it."""
    answer = prices.answer + (prices.encode if (cell.wire or "").startswith("h264") else 0.0)
    if cell.attacker in (CRAFTED, OWN_VIEWS):  # half of the queries are crafted, in turn with 0, 1 and 4 gradients
        return answer + prices.step + (prices.craft * 5 / 6 if cell.attacker == CRAFTED else 0.0)
    return answer + prices.generate + 2 * prices.step  # fresh and replayed clips; generators' queries take predictions instead
