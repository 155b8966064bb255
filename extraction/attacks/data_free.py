"""Extraction without data: a generator makes the clips, the victim answers, the student imitates.

MAZE (Kariyappa et al. 2021, arXiv 2005.03161) and DFME (Truong et al. 2021, arXiv 2011.14779) are two settings of one
loop. In each iteration the generator moves to where student and victim disagree, its gradient estimated from answers
alone, the student learns from fresh clips, and relearns from kept ones, which costs nothing. DisGUIDE (Rosenthal et al.,
AAAI 2023) trains two students and moves the generator to where they disagree, whose gradient is known: no query for it.

Clips of student steps are rounded to 8 bits before anyone sees them, so that a kept clip is exactly the one answered. The
estimator's clips are not: its steps are smaller than that.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from extraction import distributed
from extraction.attacks.losses import answers_to_logits, answers_to_targets, kl_loss, l1_loss
from extraction.attacks.recipe import NUM_DRAWS, crop_and_erase
from extraction.attacks.replay import Replay
from extraction.attacks.zeroth_order import estimate_gradient
from extraction.errors import BudgetExhausted, UserError, printable
from extraction.evaluation.plots import draw_queries
from extraction.evaluation.results import QUERY_BUDGET, finish
from extraction.evaluation.scoring import Evaluator
from extraction.runs import Run, require_form, restore_optimizer
from extraction.students import Student
from extraction.victims.ledger import Ledger
from extraction.victims.query_interface import ANSWERS

# --- what a method is ----------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """What MAZE, DFME and DisGUIDE do differently, as published but where METHODS says otherwise."""

    read: Callable[[Tensor, str, int], Tensor]  # answers, answer_type, num_classes -> what the loss compares with
    loss: Callable[[Tensor, Tensor], Tensor]  # student logits, read answers -> (B,)
    answer_types: tuple[str, ...]  # the answers that it can use
    num_directions: int
    replay_steps: int
    schedule: str
    two_students: bool = False  # the generator follows their disagreement, not that with the victim


METHODS = {
    # From labels alone the estimate shows how the student changes, and the victim only where its label does.
    "maze": Method(answers_to_targets, kl_loss, ANSWERS, num_directions=10, replay_steps=10, schedule="cosine"),
    "dfme": Method(answers_to_logits, l1_loss, ("logits", "probs"), num_directions=1, replay_steps=0, schedule="steps"),
    # Published with DFME's loss, or cross-entropy to labels, x 0.3 at 40 and 80 % and votes of both students at the end. Here
    # the loss of MAZE does for all answers, the rates end at zero, and one student is scored, as those of the others are.
    "disguide": Method(
        answers_to_targets, kl_loss, ANSWERS, num_directions=0, replay_steps=3, schedule="cosine", two_students=True
    ),
}

# Factor on the learning rates, of the share of the iterations that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "steps": lambda done: 0.3 ** sum(done >= at for at in (0.1, 0.3, 0.5)),
}


def find_method(name: str, answers: str) -> Method:
    """Raises UserError for answers that the method can't use."""
    method = METHODS[name]
    if answers not in method.answer_types:
        raise UserError(f"--answers {answers}: {name} needs one of {', '.join(method.answer_types)}")
    return method


def create_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`adam`, or `sgd` with momentum 0.9."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=True)


# --- the parts -----------------------------------------------------------------------------------------------------


def pairwise_distance(clips: Tensor) -> float:
    """Mean over pairs of (B, ...) clips of the root mean square difference of their pixels."""
    flat = clips.flatten(1).float()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


class Attacker:
    """What an attacker without data holds, and the steps that it takes.

    All that it draws is deterministic in (`seed`, iteration), and so are the keys under which the ledger keeps its answers: an
    iteration that is repeated after a crash asks for the same, and finds the cached answers. Of several processes each takes
    its share of every batch; all of them keep every clip for replay, so that any number can go on. Raises UserError when the
    batch can't be shared evenly.
    """

    def __init__(
        self,
        victim: Ledger,
        student: Student,
        generator: nn.Module,
        student_optimizer: torch.optim.Optimizer,
        generator_optimizer: torch.optim.Optimizer | None,
        method: Method,
        *,
        clip_shape: tuple[int, int, int, int],
        batch_size: int,
        replay_clips: int,
        seed: int,
        rival: Student | None = None,
        crop: float = 0.0,
    ):
        self.victim, self.student, self.rival = victim, student, rival  # the second of two students
        like_the_first: Any = type(student_optimizer)
        self.rival_optimizer = None if rival is None else like_the_first(rival.parameters(), **student_optimizer.defaults)
        self.generator: Any = generator  # see extraction/generators
        self.student_optimizer, self.generator_optimizer = student_optimizer, generator_optimizer
        if batch_size % distributed.num_processes():
            raise UserError(f"--batch-size {batch_size}: it must be a multiple of the {distributed.num_processes()} processes")
        self.method, self.batch_size, self.seed, self.crop = method, batch_size, seed, crop
        self._student_forward = distributed.parallel(student)
        self._rival_forward = distributed.parallel(rival) if rival is not None else None
        self._generator_forward = distributed.parallel(generator) if generator_optimizer is not None else generator
        self.device = next(student.parameters()).device
        self.replay = Replay(replay_clips, clip_shape, victim.num_classes)
        self.num_asked = 0  # clips asked about, including those before a resume
        self._optimizers = [o for o in (student_optimizer, generator_optimizer, self.rival_optimizer) if o is not None]
        self._first_rates = [[group["lr"] for group in o.param_groups] for o in self._optimizers]
        self.last_batch: tuple[Tensor, Tensor, Tensor] | None = (
            None  # the last of the generator's batches: clips, labels, targets
        )
        self._distance_before: float | None = None
        self.reset_metrics()

    def set_learning_rates(self, factor: float) -> None:
        """Set all learning rates to the initial ones times `factor`."""
        for optimizer, rates in zip(self._optimizers, self._first_rates, strict=True):
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * factor

    def begin(self, iteration: int) -> None:
        """Start an iteration: its random numbers and its keys."""
        self._iteration, self._slot = iteration, 0
        self._unread: list[Tensor] = []
        number = self.seed * 1_000_003 + iteration
        self._rng = torch.Generator(self.device).manual_seed(2 * number)
        self._replay_rng = torch.Generator().manual_seed(2 * number + 1)
        torch.manual_seed(number * distributed.num_processes() + distributed.rank())  # for what layers draw, such as dropout

    def key(self, iteration: int, slot: int = 0) -> bytes:
        """Names clip `slot` of an iteration; earlier iterations sort before later ones."""
        return iteration.to_bytes(6, "big") + (self.seed % 2**32).to_bytes(4, "big") + slot.to_bytes(6, "big")

    def ask(self, clips: Tensor) -> Tensor:
        """The victim's answers to (B, 3, T, H, W) clips: B queries. Raises BudgetExhausted before the budget is passed."""
        keys = distributed.shard([self.key(self._iteration, self._slot + k) for k in range(self.batch_size)])
        answers = self.victim.query(clips, keys)
        self._slot += self.batch_size
        self.num_asked += self.batch_size
        return answers

    def draw(self) -> tuple[Tensor, Tensor]:
        """Noise (B, noise_dim) and classes (B,) for this process's share of a batch."""
        shape = (self.batch_size, self.generator.noise_dim)
        labels = torch.randint(self.victim.num_classes, shape[:1], generator=self._rng, device=self.device)
        noise = torch.randn(shape, generator=self._rng, device=self.device)
        return distributed.shard(noise), distributed.shard(labels)

    def disagreement(self, clips: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        """MAZE's and DFME's objective for the generator: minus the student's loss, (B,)."""
        return -self.method.loss(self.student(clips), self.method.read(answers, self.victim.answers, self.victim.num_classes))

    def class_objective(self, clips: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        """A conditional generator's: minus the log probability that the victim gives to the class asked for, (B,)."""
        targets = answers_to_targets(answers, self.victim.answers, self.victim.num_classes)
        return -targets.gather(1, labels[:, None])[:, 0].clamp(min=1e-6).log()

    def step_generator(
        self, objective: Callable[[Tensor, Tensor, Tensor], Tensor], num_directions: int, epsilon: float
    ) -> None:
        """Lower `objective(clips, answers, labels)`, (B,), by an estimated gradient: B * (1 + num_directions) queries."""
        noise, labels = self.draw()
        pre_activation = self._generator_forward(noise, labels)
        first: list[Tensor] = []

        def loss_fn(pre_activation: Tensor) -> Tensor:
            clips = self.generator.render(pre_activation)
            answers = self.ask(clips)
            loss = objective(clips, answers, labels)
            if not first:
                first.append(loss.mean())
                self._observe(clips, answers, labels)
            return loss

        assert self.generator_optimizer is not None
        self.student.eval()  # its statistics are of the clips that it learns from
        gradient = estimate_gradient(loss_fn, pre_activation.detach(), num_directions, epsilon, self._rng, self.batch_size)
        self.student.train()
        self.generator_optimizer.zero_grad(set_to_none=True)
        pre_activation.backward(gradient / len(gradient))
        self.generator_optimizer.step()
        self._unread.append(first[0])

    def step_generator_to_disagreement(self, diversity: float) -> None:
        """Raise the disagreement of the two students, by its own gradient: no query.

        The loss is DisGUIDE's: minus the mean standard deviation of their two probabilities of a class, and `diversity` times
        minus the entropy of their mean answer to the batch, so that all classes come up.
        """
        assert self.rival is not None
        assert self.generator_optimizer is not None
        noise, labels = self.draw()
        pre_activation = self._generator_forward(noise, labels)
        clips = self.generator.render(pre_activation)
        for student in (self.student, self.rival):
            student.eval()  # their statistics are of the clips that they learn from
        probs = torch.stack([self.student(clips), self.rival(clips)]).softmax(2)
        loss = -probs.std(0).mean() - diversity * torch.special.entr(probs.mean((0, 1))).sum()
        (gradient,) = torch.autograd.grad(loss, pre_activation)  # the students' weights want none
        for student in (self.student, self.rival):
            student.train()
        self.generator_optimizer.zero_grad(set_to_none=True)
        pre_activation.backward(gradient)
        self.generator_optimizer.step()
        self._unread.append(loss.detach())

    def step_student(self) -> None:
        """Train the student on the answers to a fresh batch, and keep it: B queries."""
        with torch.no_grad():
            noise, labels = self.draw()
            views = (self.generator.render(self.generator(noise, labels)) * 255).round_()
            clips, views = views.to(torch.uint8), views / 255
        answers = self.ask(views)
        self._observe(views, answers, labels)
        targets = self.method.read(answers, self.victim.answers, self.victim.num_classes)
        self._learn(views, targets)
        if len(self.replay.clips):
            self.replay.push(distributed.gather_tensor(clips), distributed.gather_tensor(targets), self._replay_rng)

    def step_replay(self) -> None:
        """Train the student on a batch of kept clips, cropped at random with `crop`: no query."""
        kept = [distributed.shard(part) for part in self.replay.sample(self.batch_size, self._replay_rng)]
        if self.device.type == "cuda":  # pinned memory is copied while the device works on the step before
            kept = [part.pin_memory() for part in kept]
        clips, targets = (part.to(self.device, non_blocking=True) for part in kept)
        views = clips.float() / 255
        if self.crop:  # of the whole batch, so that any number of processes draws alike
            uniform = torch.rand(self.batch_size, NUM_DRAWS, dtype=torch.float64, generator=self._replay_rng)
            views = crop_and_erase(views, distributed.shard(uniform).numpy(), self.crop, 0.0)
        self._learn(views, targets)

    def _learn(self, views: Tensor, targets: Tensor) -> None:
        loss = self._fit(self._student_forward, self.student_optimizer, views, targets)
        if self.rival_optimizer is not None:
            self._fit(self._rival_forward, self.rival_optimizer, views, targets)
        self._sums["loss"] += loss.detach()
        self._sums["steps"] += 1

    def _fit(self, forward: Any, optimizer: torch.optim.Optimizer, views: Tensor, targets: Tensor) -> Tensor:
        loss = self.method.loss(forward(views), targets).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self._unread.append(loss.detach())
        return loss

    # --- what it can say about itself ---

    def _observe(self, clips: Tensor, answers: Tensor, labels: Tensor) -> None:
        targets = answers_to_targets(answers, self.victim.answers, self.victim.num_classes)
        self.last_batch = (clips, labels, targets)
        self._sums["clips"] += len(targets)
        self._sums["answers"] += targets.sum(0)
        self._sums["entropy"] += torch.special.entr(targets).sum()
        self._sums["named"] += (targets.argmax(1) == labels).sum()

    def reset_metrics(self) -> None:
        self._sums = {name: torch.zeros((), device=self.device) for name in ("loss", "steps", "clips", "entropy", "named")}
        self._sums["answers"] = torch.zeros(self.victim.num_classes, device=self.device)

    def _all_sums(self) -> dict[str, Tensor]:
        return {name: distributed.all_reduce_sum(value) for name, value in self._sums.items()}

    def metrics(self) -> dict[str, float]:
        """The student's mean `loss` and what the generator's clips were like since `reset_metrics`.

        `answer_entropy`: mean entropy of the victim's answer to a clip, in nats, low when it is sure.
        `mean_answer_entropy`: entropy of its mean answer, at most log(num_classes). Where the two are near each other, all
        the clips are answered alike: the generator has collapsed. `pairwise_distance`: of the last batch, RMS in [0, 1].
        `conditional_accuracy`: the share of clips that the victim named as the class they were generated for.
        """
        sums, metrics = self._all_sums(), {}
        if sums["steps"]:
            metrics["loss"] = (sums["loss"] / sums["steps"]).item()
        if sums["clips"]:
            metrics["answer_entropy"] = (sums["entropy"] / sums["clips"]).item()
            metrics["mean_answer_entropy"] = torch.special.entr(sums["answers"] / sums["clips"]).sum().item()
            metrics["conditional_accuracy"] = (sums["named"] / sums["clips"]).item()
            if (distance := self._distance()) is not None:
                metrics["pairwise_distance"] = distance
        return metrics

    def _distance(self) -> float | None:
        """The pairwise distance of the last batch; after a resume, before the first batch, that of the one before it."""
        if self.last_batch is None:
            return self._distance_before
        return pairwise_distance(self.last_batch[0]) if self.batch_size > 1 else None

    def has_nonfinite_loss(self) -> bool:
        """Whether a loss of this iteration is not finite."""
        return bool(self._unread) and not distributed.all_reduce_sum(torch.stack(self._unread)).isfinite().all()

    # --- what resumes it ---

    def _parts(self) -> dict:
        parts = dict(
            student=self.student.net,
            generator=self.generator,
            student_optimizer=self.student_optimizer,
            generator_optimizer=self.generator_optimizer,
            replay=self.replay,
            rival=None if self.rival is None else self.rival.net,
            rival_optimizer=self.rival_optimizer,
        )
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return dict(**parts, sums=self._all_sums(), num_asked=self.num_asked, distance=self._distance())

    def load_state_dict(self, state: dict) -> None:
        require_form([state["sums"], state["num_asked"]], [{k: v.cpu() for k, v in self._sums.items()}, 0], "sums")
        for name, part in self._parts().items():
            if isinstance(part, torch.optim.Optimizer):
                restore_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
        if distributed.is_main_process():  # they are those of all
            self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.num_asked, self._distance_before = state["num_asked"], state.get("distance")


# --- the loop ------------------------------------------------------------------------------------------------------


class DataFree:
    """The iterations of an attack without data, scored, logged, saved and resumed, until they or the query budget end.

        with DataFree(run, attacker, evaluator, ...) as attack:
            for iteration in attack:
                attacker.step_student()
        return attack.finish()

    `num_queries` is what the attack needs in all, for the progress bar. The student is scored every `score_every` queries and
    at the end; nothing here looks at the scores. A sheet of generated clips is drawn at each evaluation.

    Resumes bitwise reproducible on a CPU, and cached answers are not asked for again: they leave the ledger only when the state
    after their iteration is on the disk. An exhausted budget ends the `with` block and leaves the checkpoint before it, so that
    a larger one goes on as if there had been no other. Raises UserError when a loss is not finite, KeyboardInterrupt after
    Ctrl-C, the state being saved.
    """

    def __init__(
        self, run: Run, attacker: Attacker, evaluator: Evaluator, *, iterations: int, num_queries: int, score_every: int
    ):
        self.run, self.attacker, self.evaluator, self.victim = run, attacker, evaluator, attacker.victim
        self.iterations, self.score_every = iterations, score_every
        self.history: list[dict] = []
        self.stopped = "iterations"
        self._limit = num_queries if self.victim.query_budget is None else min(num_queries, self.victim.query_budget)
        self._exits = contextlib.ExitStack()
        self._iteration = 0

    def __enter__(self) -> "DataFree":
        self._iteration = self._resume()
        done = min(self.victim.num_queries, self._limit)
        self._bar = tqdm(total=self._limit, initial=done, desc=self.run.experiment, unit="clip", dynamic_ncols=True)
        self._exits.enter_context(self.run.interruptible())
        self._exits.enter_context(self._bar)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        with self._exits:
            if isinstance(error, BudgetExhausted):
                self.stopped = QUERY_BUDGET
                self.attacker.student.train()
                self._score(self._iteration)
        return isinstance(error, BudgetExhausted)

    def __iter__(self) -> Iterator[int]:
        self.attacker.student.train()
        self.attacker.generator.train()
        for iteration in range(self._iteration, self.iterations):
            self._iteration = iteration
            scored = self.attacker.num_asked // self.score_every
            self.attacker.begin(iteration)
            yield iteration
            if self.attacker.has_nonfinite_loss():
                raise UserError(
                    f"a loss is not finite in iteration {iteration + 1}; the state before is in {self.run.folder}; "
                    "lower the learning rates"
                )
            self._bar.update(max(0, self.victim.num_queries - self._bar.n))
            self._bar.set_postfix(left=self._limit - self.victim.num_queries, refresh=False)
            due = self.attacker.num_asked // self.score_every > scored or iteration + 1 == self.iterations
            if due:
                self._score(iteration + 1)
            if self.run.checkpoint_due() or due:
                self._save(iteration + 1)
            if self.run.stop_asked:
                raise KeyboardInterrupt(f"saved in {self.run.folder}; run the same command again to continue")

    def finish(self, **more: Any) -> dict:
        """Save the student, write and print the results (`extraction.evaluation.results.finish`); `more` goes into them."""
        return finish(self.run, self.attacker.student, self.victim, self.evaluator, self.history, self.stopped, **more)

    def _resume(self) -> int:
        self.run.begin()
        state = self.run.load_state()
        if state is None:
            print(f"clips kept for replay take {self.attacker.replay.num_bytes / 1e6:.0f} MB of memory", flush=True)
            return 0
        with self.run.restoring():
            require_form([state["num_queries"], state["iteration"]], [0, 0], "state")
            require_form([point["num_queries"] for point in state["history"]], [0] * len(state["history"]), "history")
            if not 0 <= state["iteration"] <= self.iterations:
                raise ValueError(f"iteration {state['iteration']} of {self.iterations}")
            self.victim.require_count(state["num_queries"])
            self.attacker.load_state_dict(state["attacker"])
            self.history = state["history"]
        print(f"resuming {printable(self.run.folder)} at iteration {state['iteration']} of {self.iterations}", flush=True)
        return state["iteration"]

    def _save(self, iteration: int) -> None:
        state = dict(attacker=self.attacker.state_dict(), num_queries=self.victim.num_queries)
        self.run.save_state(state | dict(history=self.history, iteration=iteration))
        self.victim.forget(self.attacker.key(iteration))  # after the state is on the disk, and not those of iterations to come

    def _score(self, iteration: int) -> None:
        point = dict(iteration=iteration, num_queries=self.victim.num_queries)
        earlier = {k: v for k, v in self.history[-1].items() if k not in point} if self.history else {}
        point |= earlier | self.attacker.metrics() | self.evaluator.score(self.attacker.student.eval())
        self.attacker.student.train()
        self.attacker.reset_metrics()
        self.history.append(point)
        self.run.log(point["num_queries"], {k: v for k, v in point.items() if k != "num_queries"})
        if self.attacker.last_batch is not None:
            clips, labels, targets = (part[:6] for part in self.attacker.last_batch)
            wanted = [f"for {self.victim.classes[label]}" for label in labels.tolist()]
            sheet = self.run.folder / f"clips_{point['num_queries']:09d}.png"
            draw_queries(sheet, clips, targets, wanted, self.victim.classes)
        self._bar.write(_describe(point, self.iterations))


def _describe(point: dict, iterations: int) -> str:
    shown = [f"{k.replace('_at_', '@')} {100 * point[k]:.1f}" for k in ("top1", "top5", "agreement_at_1") if k in point]
    varied = [f"{k.replace('_', ' ')} {point[k]:.2f}" for k in ("answer_entropy", "mean_answer_entropy") if k in point]
    loss = f"loss {point['loss']:.3f}, " if "loss" in point else ""
    return (
        f"iteration {point['iteration']}/{iterations}: {loss}{', '.join(shown)} %, {', '.join(varied)}, "
        f"{point['num_queries']} queries"
    )
