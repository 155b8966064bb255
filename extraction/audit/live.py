"""Attacks that cannot be replayed: data-free ones and crafted queries, run against the victim behind its query interface.

What they ask depends on what was answered, so that each runs by itself behind a wire, an answer type and a defence, with a
ledger and a checkpoint of its own: a killed one goes on, and asks nothing that its ledger has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extraction.attacks.crafting import create_crafter
from extraction.attacks.data_free import METHODS, SCHEDULES, Attacker, DataFree, create_optimizer
from extraction.attacks.distill import Training
from extraction.attacks.losses import answers_to_targets, cross_entropy, kl_divergence, kl_loss
from extraction.audit.plan import ANSWERS, AT_REST, CRAFTED, LARGER, STUDENT_STEPS, Cell, count_iteration
from extraction.audit.students import Recipe
from extraction.data.queries import QuerySet
from extraction.evaluation.scoring import Evaluator
from extraction.students import Student
from extraction.victims.defences import Defence
from extraction.victims.ledger import Ledger
from extraction.victims.query_interface import Victim, VictimModel, defend

REPLAY_STEPS = 6  # student steps on replayed clips in an iteration of the data-free attack
SLOPE_DIRECTIONS = 8  # along which finite differences are compared
_REPLAY_BYTES = 2**30  # of memory for them at most
_METHODS, _CRAFT_STEP, _CRAFT_ITERATIONS = ("random", "jbda", "t_rnd"), 0.03, 4  # as grey_box/swin_to_r21_prada.py


class Estimate(NamedTuple):
    """How a data-free attacker estimates gradients: `m` random directions, finite-difference step `epsilon`."""

    num_directions: int
    epsilon: float
    generator_lr: float


@dataclass(frozen=True, kw_only=True)
class Live:
    """What all live cells of an audit share."""

    open_run: Callable[[Cell], Any]  # the folder of a cell's own run
    model: VictimModel
    key: bytes
    parameters: Mapping[tuple[str, float], float | None]  # of defences, by name and strength
    create: Callable[[], Student]
    create_generator: Callable[[], Any]
    queries: QuerySet  # new views of the thief's own labelled clips, which crafted queries start from
    clip_shape: tuple[int, int, int, int]  # 3, T, H, W
    batch_size: int
    num_workers: int
    recipe: Recipe
    estimate: Estimate
    evaluator: Evaluator

    def run(self, cell: Cell) -> dict[str, Any]:
        """Attack, score the student. `num_queries` is what the ledger counted; of a data-free attack `slopes` too.

        Raises UserError when a loss is not finite, KeyboardInterrupt after Ctrl-C, the state being saved.
        """
        run = self.open_run(cell)
        victim = self._open_victim(cell, run)
        torch.manual_seed(cell.seed)
        student, found = self.create(), dict[str, Any]()
        try:
            if cell.attacker.startswith("data-free"):
                attacker = self._attack_without_data(cell, run, victim, student)
                found["slopes"] = self.measure_slopes(cell, attacker)
            else:
                self._train_on_crafted(cell, run, victim, student)
            found["scores"] = self.evaluator.score(student.eval()) | self.evaluator.summarise(student)
            found["num_queries"] = victim.num_queries
        finally:
            victim.close()
        run.finish(dict(stopped="done", **found))
        return found

    def forget(self, cell: Cell) -> None:
        """Remove the checkpoint of a cell whose result is kept."""
        (self.open_run(cell).folder / "state.pt").unlink(missing_ok=True)

    def _open_victim(self, cell: Cell, run: Any) -> Ledger:
        kind, decimals = ANSWERS[cell.answers]
        ledger = Ledger(
            run.folder / "ledger.sqlite", lambda spent: Victim(self.model, kind, cell.budget, decimals, spent, cell.wire), kind,
            decimals, exact=True, defence=None if cell.defence is None else f"{cell.defence} {cell.strength:g}", wire=cell.wire,
        )  # fmt: skip
        if cell.defence is not None:
            ledger.defend(lambda: self.key, lambda key: dict(defence=self._constants(cell), detector=None))
        return ledger

    def _constants(self, cell: Cell) -> dict[str, Any]:
        return dict(name=cell.defence, parameter=self.parameters[cell.defence or "", cell.strength or 0.0])

    def _attack_without_data(self, cell: Cell, run: Any, victim: Ledger, student: Student) -> Attacker:
        """MAZE (Kariyappa et al., 2005.03161), as black_box/attack_video_swin.py, or with a generator that never learns."""
        generator = self.create_generator()
        num_bytes = torch.Size(self.clip_shape).numel()
        attacker = Attacker(
            victim, student, generator, torch.optim.Adam(student.parameter_groups(self.recipe.head_lr, self.recipe.body_lr)),
            create_optimizer("adam", generator.parameters(), self.estimate.generator_lr, 5e-4), METHODS["maze"],
            clip_shape=self.clip_shape, batch_size=self.batch_size, replay_clips=max(1, min(1024, _REPLAY_BYTES // num_bytes)),
            seed=cell.seed,
        )  # fmt: skip
        per_iteration = count_iteration(self.batch_size, self.estimate.num_directions)
        iterations, epsilon = cell.budget // per_iteration, self.estimate.epsilon * (10 if cell.attacker == LARGER else 1)
        with DataFree(
            run, attacker, self.evaluator, iterations=iterations, num_queries=cell.budget, score_every=cell.budget + 1
        ) as attack:
            for iteration in attack:
                attacker.set_learning_rates(SCHEDULES["cosine"](iteration / iterations))
                if cell.attacker != AT_REST:
                    attacker.step_generator(attacker.disagreement, self.estimate.num_directions, epsilon)
                for _ in range(STUDENT_STEPS if cell.attacker != AT_REST else per_iteration // self.batch_size):
                    attacker.step_student()
                for _ in range(REPLAY_STEPS):
                    attacker.step_replay()
        return attacker

    def _train_on_crafted(self, cell: Cell, run: Any, victim: Ledger, student: Student) -> None:
        """Crafted queries beside own views, as grey_box/swin_to_r21_prada.py; or as many own views, the control."""
        crafted = cell.attacker == CRAFTED
        sheet = run.folder / "crafted.png"
        craft = create_crafter(_METHODS, 1.0, _CRAFT_STEP, _CRAFT_ITERATIONS, sheet, self.model.classes)
        optimizer = torch.optim.AdamW(student.parameter_groups(self.recipe.head_lr, self.recipe.body_lr), fused=True)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
        seeds = self.batch_size // 2 if crafted else self.batch_size  # so that all students see batches alike
        epochs = -(-cell.budget // len(self.queries))
        training = Training(
            run, student, optimizer, schedule, None, victim, self.queries, epochs, max(1, seeds), self.num_workers,
            prefetch_answers=False,
        )  # fmt: skip
        for batch in training:
            if crafted and not batch.exhausted:
                batch = training.query_more(batch, *craft(student, batch))
            logits = training.forward(batch.clips)
            labelled = self.recipe.label_weight * cross_entropy(logits, batch.labels)
            training.step(kl_divergence(logits, batch.targets) + labelled)

    def measure_slopes(self, cell: Cell, attacker: Attacker) -> list[dict[str, float]]:
        """`compare_slopes` behind a cell's wire, answers and defence, at the attack's step and at ten times that."""
        kind, decimals = ANSWERS[cell.answers]
        behind = Victim(self.model, kind, decimals=decimals, wire=cell.wire)
        if cell.defence is not None:
            defend(behind, Defence(self._constants(cell), self.key))
        rng = torch.Generator(attacker.device).manual_seed(cell.seed)
        noise = torch.randn(self.batch_size, attacker.generator.noise_dim, generator=rng, device=attacker.device)
        labels = torch.randint(behind.num_classes, (self.batch_size,), generator=rng, device=attacker.device)
        with torch.no_grad():
            start = attacker.generator(noise, labels)
        student, render, epsilon = attacker.student.eval(), attacker.generator.render, self.estimate.epsilon
        found = []
        for times in (1, 10):
            kept = compare_slopes(
                Victim(self.model, "probs"), behind, render, student, start, epsilon, times * epsilon, SLOPE_DIRECTIONS, rng
            )
            found.append(dict(epsilon=times * epsilon, kept=kept))
        return found


@torch.no_grad()
def compare_slopes(
    exact: Victim, behind: Victim, render: Callable[[Tensor], Tensor], student: Callable[[Tensor], Tensor], start: Tensor,
    epsilon: float, epsilon_behind: float, num_directions: int, rng: torch.Generator,
) -> float:  # fmt: skip
    """What is left of finite differences behind an interface: their cosine with those of an exact one, 1 all, 0 nothing.

    The slopes are those of KL(victim || student) along random unit directions from the pre-activations `start` (B, ...), the
    student's answer held still: what the victim alone can tell. `exact` shows probabilities. Asks each interface
    B (1 + num_directions) clips: the owner's own look, no queries of a thief.
    """
    told = student(render(start))
    rows = (-1, *[1] * (start.ndim - 1))
    directions = []
    for _ in range(num_directions):
        direction = torch.randn(start.shape, generator=rng, device=start.device)
        directions.append(direction / direction.flatten(1).norm(dim=1).view(rows))

    def find_slopes(victim: Victim, step: float) -> Tensor:
        def loss(pre_activation: Tensor) -> Tensor:
            answers = victim.query(render(pre_activation))
            return kl_loss(told, answers_to_targets(answers, victim.answers, victim.num_classes)).double()

        at = loss(start)
        return torch.cat([loss(start + step * direction) - at for direction in directions]) / step

    true, found = find_slopes(exact, epsilon), find_slopes(behind, epsilon_behind)
    norm = float(true.norm() * found.norm())
    return float(true @ found) / norm if norm > 0 else 0.0
