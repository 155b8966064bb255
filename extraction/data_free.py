"""Extraction without data: a generator makes the clips, the victim answers, the student imitates.

MAZE (Kariyappa et al. 2021, arXiv 2005.03161) and DFME (Truong et al. 2021, arXiv 2011.14779) are two settings of one
loop. In each iteration the generator moves to where student and victim disagree, its gradient estimated from answers
alone, the student learns from fresh clips, and relearns from kept ones, which costs nothing.

Clips of student steps are rounded to 8 bits before anyone sees them, so that a kept clip is exactly the one answered. The
estimator's clips are not: its steps are smaller than that.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from extraction import distributed
from extraction.distill import answers_to_targets
from extraction.errors import BudgetExhausted, UserError
from extraction.ledger import Ledger
from extraction.network import VideoModel
from extraction.report import draw_queries
from extraction.runs import Run
from extraction.victims import ANSWERS

# --- what a method is ----------------------------------------------------------------------------------------------


def kl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(victim || student) of each clip, in nats: (B, num_classes) student logits and victim probabilities -> (B,)."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)


def l1_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of each clip's logits: (B, num_classes) student's, (B, num_classes) victim's -> (B,)."""
    return (logits - targets).abs().mean(1)


def answers_to_logits(answers: Tensor, surface: str, num_classes: int) -> Tensor:
    """The victim's logits (B, num_classes): its own, or recovered from `probs` as log p - mean(log p)."""
    if surface == "logits":
        return answers
    logs = answers.clamp(min=1e-12).log()
    return logs - logs.mean(1, keepdim=True)


class Method(NamedTuple):
    """What MAZE and DFME do differently, as published."""

    read: Callable[[Tensor, str, int], Tensor]  # answers, surface, num_classes -> what the loss compares with
    loss: Callable[[Tensor, Tensor], Tensor]  # student logits, read answers -> (B,)
    surfaces: tuple[str, ...]  # the answers that it can use
    num_directions: int
    replay_steps: int
    schedule: str


METHODS = {
    # From labels alone the slopes show how the student changes, and the victim's only where its label does.
    "maze": Method(answers_to_targets, kl_loss, ANSWERS, num_directions=10, replay_steps=10, schedule="cosine"),
    "dfme": Method(answers_to_logits, l1_loss, ("logits", "probs"), num_directions=1, replay_steps=0, schedule="steps"),
}

# Factor on the learning rates, of the share of the iterations that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "steps": lambda done: 0.3 ** sum(done >= at for at in (0.1, 0.3, 0.5)),
}


def find_method(name: str, answers: str) -> Method:
    """Raises UserError for an unknown method, and for answers that it can't use."""
    if name not in METHODS:
        raise UserError(f"no method is called {name!r}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    if answers not in method.surfaces:
        raise UserError(f"--answers {answers}: {name} needs one of {', '.join(method.surfaces)}")
    return method


def find_schedule(name: str) -> Callable[[float], float]:
    if name not in SCHEDULES:
        raise UserError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def create_optimizer(name: str, parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`adam`, or `sgd` with momentum 0.9."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    raise UserError(f"no optimiser is called {name!r}; there are adam, sgd")


# --- the parts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_gradient(
    loss_fn: Callable[[Tensor], Tensor],
    pre_activation: Tensor,
    num_directions: int,
    smoothing: float,
    generator: torch.Generator,
    num_clips: int | None = None,
) -> Tensor:
    """Estimate the gradient of each clip's own loss by forward differences along random unit directions.

    `loss_fn` maps (B, ...) to (B,), `pre_activation` is (B, ...) with d numbers a clip. Returns the shape of
    `pre_activation`: g = d/m * sum over m directions u of (L(x + eps u) - L(x)) / eps * u. Calls `loss_fn` 1 + m times.
    The estimate's mean is the gradient (as eps goes to 0), its cosine with it about sqrt(m/d). `num_clips` is the size of
    the whole batch where `pre_activation` is a process's share of one.
    """
    at = loss_fn(pre_activation)
    total = torch.zeros_like(pre_activation)
    rows = (-1, *[1] * (pre_activation.ndim - 1))
    shape = (num_clips or len(pre_activation), *pre_activation.shape[1:])
    for _ in range(num_directions):
        direction = torch.randn(shape, generator=generator, device=pre_activation.device, dtype=pre_activation.dtype)
        direction = direction if num_clips is None else distributed.shard(direction)
        direction /= direction.flatten(1).norm(dim=1).view(rows)
        slope = (loss_fn(pre_activation + smoothing * direction) - at) / smoothing
        total += slope.view(rows) * direction
    return total * (pre_activation[0].numel() / num_directions)


class Replay:
    """A bounded memory of answered clips, in host memory: a uniform sample of all that were ever pushed (reservoir).

    Holds at most `capacity` clips as uint8 with their targets as float32, `num_bytes` bytes, taken at once.
    """

    def __init__(self, capacity: int, clip_shape: tuple[int, ...], num_targets: int):
        try:
            self.clips = torch.zeros((capacity, *clip_shape), dtype=torch.uint8)
        except RuntimeError:
            size = capacity * torch.Size(clip_shape).numel() / 1e9
            raise UserError(f"--replay-clips {capacity}: no room for their {size:.0f} GB in memory; lower it") from None
        self.targets = torch.zeros(capacity, num_targets)
        self.num_pushed = 0

    @property
    def num_bytes(self) -> int:
        return self.clips.nbytes + self.targets.nbytes

    def __len__(self) -> int:
        return min(self.num_pushed, len(self.clips))

    def push(self, clips: Tensor, targets: Tensor, rng: torch.Generator) -> None:
        """Offer uint8 (B, ...) clips with their (B, num_targets): each of the n so far stays with chance capacity / n."""
        clips, targets = clips.cpu(), targets.cpu()
        for clip, target in zip(clips, targets, strict=True):
            place = self.num_pushed
            if place >= len(self.clips):
                place = int(torch.randint(self.num_pushed + 1, (), generator=rng))
            if place < len(self.clips):
                self.clips[place], self.targets[place] = clip, target
            self.num_pushed += 1

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` kept clips and their targets, drawn with replacement."""
        chosen = torch.randint(len(self), (count,), generator=rng)
        return self.clips[chosen], self.targets[chosen]

    def state_dict(self) -> dict:
        full = len(self) == len(self.clips)  # a part of a tensor would be saved with all of it
        clips, targets = (kept if full else kept[: len(self)].clone() for kept in (self.clips, self.targets))
        return dict(clips=clips, targets=targets, num_pushed=self.num_pushed)

    def load_state_dict(self, state: dict) -> None:
        self.num_pushed = state["num_pushed"]
        self.clips[: len(self)], self.targets[: len(self)] = state["clips"], state["targets"]


def pairwise_distance(clips: Tensor) -> float:
    """Mean over pairs of (B, ...) clips of the root mean square difference of their pixels."""
    flat = clips.flatten(1).float()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


class Attacker:
    """What an attacker without data holds, and the steps that it takes.

    All that it draws is a function of (`seed`, iteration), and so are the keys under which the ledger keeps its
    answers: an iteration that is repeated after a crash asks for the same, and finds what is paid. Of several processes
    each takes its share of every batch; all of them keep every clip for replay, so that any number can go on. Raises UserError
    when the batch can't be shared evenly.
    """

    def __init__(
        self,
        victim: Ledger,
        student: VideoModel,
        generator: nn.Module,
        student_optimizer: torch.optim.Optimizer,
        generator_optimizer: torch.optim.Optimizer | None,
        method: Method,
        *,
        clip_shape: tuple[int, int, int, int],
        batch_size: int,
        replay_clips: int,
        seed: int,
    ):
        self.victim, self.student, self.generator = victim, student, generator
        self.student_optimizer, self.generator_optimizer = student_optimizer, generator_optimizer
        if batch_size % distributed.num_processes():
            raise UserError(f"--batch-size {batch_size}: it must be a multiple of the {distributed.num_processes()} processes")
        self.method, self.batch_size, self.seed = method, batch_size, seed
        self._student_forward = distributed.parallel(student)
        self._generator_forward = distributed.parallel(generator) if generator_optimizer is not None else generator
        self.device = next(student.parameters()).device
        self.replay = Replay(replay_clips, clip_shape, victim.num_classes)
        self.num_asked = 0  # clips asked about, paid now or in an earlier life
        self._optimizers = [o for o in (student_optimizer, generator_optimizer) if o is not None]
        self._first_rates = [[group["lr"] for group in o.param_groups] for o in self._optimizers]
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None  # the last of the generator's batches: clips, labels, said
        self.clear_figures()

    def begin(self, iteration: int, rate: float) -> None:
        """Start an iteration: its random numbers, its keys, its learning rates (the first ones times `rate`)."""
        self._iteration, self._slot, self._unread = iteration, 0, []
        for optimizer, rates in zip(self._optimizers, self._first_rates, strict=True):
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * rate
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

    def naming(self, clips: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        """A conditional generator's: minus the log probability that the victim gives to the class asked for, (B,)."""
        said = answers_to_targets(answers, self.victim.answers, self.victim.num_classes)
        return -said.gather(1, labels[:, None])[:, 0].clamp(min=1e-6).log()

    def step_generator(
        self, objective: Callable[[Tensor, Tensor, Tensor], Tensor], num_directions: int, smoothing: float
    ) -> None:
        """Lower `objective(clips, answers, labels)`, (B,), by an estimated gradient: B * (1 + num_directions) queries."""
        noise, labels = self.draw()
        pre_activation = self._generator_forward(noise, labels)
        first = []

        def loss_fn(pre_activation: Tensor) -> Tensor:
            clips = self.generator.render(pre_activation)
            answers = self.ask(clips)
            loss = objective(clips, answers, labels)
            if not first:
                first.append(loss.mean())
                self._observe(clips, answers, labels)
            return loss

        self.student.eval()  # its statistics are of the clips that it learns from
        gradient = estimate_gradient(loss_fn, pre_activation.detach(), num_directions, smoothing, self._rng, self.batch_size)
        self.student.train()
        self.generator_optimizer.zero_grad(set_to_none=True)
        pre_activation.backward(gradient / len(gradient))
        self.generator_optimizer.step()
        self._unread.append(first[0])

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
        """Train the student on a batch of kept clips: no query."""
        kept = map(distributed.shard, self.replay.sample(self.batch_size, self._replay_rng))
        if self.device.type == "cuda":  # pinned memory is copied while the device works on the step before
            kept = (own.pin_memory() for own in kept)
        clips, targets = (own.to(self.device, non_blocking=True) for own in kept)
        self._learn(clips.float() / 255, targets)

    def _learn(self, views: Tensor, targets: Tensor) -> None:
        loss = self.method.loss(self._student_forward(views), targets).mean()
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.student_optimizer.step()
        self._unread.append(loss.detach())
        self._sums["loss"] += loss.detach()
        self._sums["steps"] += 1

    # --- what it can say about itself ---

    def _observe(self, clips: Tensor, answers: Tensor, labels: Tensor) -> None:
        said = answers_to_targets(answers, self.victim.answers, self.victim.num_classes)
        self.shown = (clips, labels, said)
        self._sums["clips"] += len(said)
        self._sums["answers"] += said.sum(0)
        self._sums["entropy"] += torch.special.entr(said).sum()
        self._sums["named"] += (said.argmax(1) == labels).sum()

    def clear_figures(self) -> None:
        self._sums = {name: torch.zeros((), device=self.device) for name in ("loss", "steps", "clips", "entropy", "named")}
        self._sums["answers"] = torch.zeros(self.victim.num_classes, device=self.device)

    def _all_sums(self) -> dict[str, Tensor]:
        return {name: distributed.all_reduce_sum(value) for name, value in self._sums.items()}

    def figures(self) -> dict[str, float]:
        """The student's mean `loss` and what the generator's clips were like since `clear_figures`.

        `answer_entropy`: mean entropy of the victim's answer to a clip, in nats, low when it is sure.
        `mean_answer_entropy`: entropy of its mean answer, at most log(num_classes). Where the two are near each other, all
        the clips are answered alike: the generator has collapsed. `pairwise_distance`: of the last batch, RMS in [0, 1].
        `named_as_asked`: the share of clips that the victim named as the class they were generated for.
        """
        sums, figures = self._all_sums(), {}
        if sums["steps"]:
            figures["loss"] = (sums["loss"] / sums["steps"]).item()
        if sums["clips"]:
            figures["answer_entropy"] = (sums["entropy"] / sums["clips"]).item()
            figures["mean_answer_entropy"] = torch.special.entr(sums["answers"] / sums["clips"]).sum().item()
            figures["named_as_asked"] = (sums["named"] / sums["clips"]).item()
            if self.shown is not None and self.batch_size > 1:  # None in a life that has not come to a batch
                figures["pairwise_distance"] = pairwise_distance(self.shown[0])
        return figures

    def broke(self) -> bool:
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
        )
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return dict(**parts, sums=self._all_sums(), num_asked=self.num_asked)

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if distributed.is_main_process():  # they are those of all
            self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.num_asked = state["num_asked"]


# --- the loop ------------------------------------------------------------------------------------------------------


def extract(
    run: Run,
    attacker: Attacker,
    iterate: Callable[[Attacker, int], None],
    evaluate: Callable[[VideoModel], dict[str, float]],
    *,
    iterations: int,
    num_planned: int,
    rate: Callable[[int], float],
    score_every: int,
) -> tuple[list[dict], str]:
    """Repeat `iterate(attacker, iteration)`, which composes the attacker's steps, at `rate(iteration)` x the learning rates.

    `evaluate` scores the student every `score_every` queries and at the end; nothing here looks at what it says.
    `num_planned` is the whole bill, for the progress bar. A sheet of generated clips is drawn at each evaluation.

    Resumes from the run's checkpoint, to the same bits on a CPU, and nothing is paid twice: answers leave the ledger only
    when the state after the iteration that paid for them is on the disk. Returns the history (a dict per evaluation) and
    what stopped the loop: "iterations", or the line of an exhausted budget, which leaves the checkpoint before it so that
    a larger one goes on as if there had been no other. Raises UserError when a loss is not finite, KeyboardInterrupt after
    Ctrl-C, the state being saved.
    """
    victim, student = attacker.victim, attacker.student
    history, first, stopped = [], 0, "iterations"
    run.begin()
    state = run.load_state()
    if state:
        attacker.load_state_dict(state["attacker"])
        history, first = state["history"], state["iteration"]
        print(f"resuming {run.folder} at iteration {first} of {iterations}", flush=True)
    else:
        print(f"kept clips take {attacker.replay.num_bytes / 1e6:.0f} MB of memory", flush=True)

    def save(iteration: int) -> None:
        run.save_state(dict(attacker=attacker.state_dict(), history=history, iteration=iteration))
        victim.forget(attacker.key(iteration))  # after the state is on the disk, and not those of iterations to come

    def score(iteration: int) -> None:
        point = dict(iteration=iteration, num_queries=victim.num_queries)
        earlier = {k: v for k, v in history[-1].items() if k not in point} if history else {}
        point |= earlier | attacker.figures() | evaluate(student.eval())
        student.train()
        attacker.clear_figures()
        history.append(point)
        run.log(point["num_queries"], {k: v for k, v in point.items() if k != "num_queries"})
        if attacker.shown is not None:
            clips, labels, said = (shown[:6] for shown in attacker.shown)
            asked = [f"for {victim.classes[label]}" for label in labels.tolist()]
            draw_queries(run.folder / f"clips_{point['num_queries']:09d}.png", clips, said, asked, victim.classes)
        bar.write(_describe(point, iterations))

    if first == iterations:
        return history, stopped
    limit = num_planned if victim.query_budget is None else min(num_planned, victim.query_budget)
    bar = tqdm(total=limit, initial=min(victim.num_queries, limit), desc=run.experiment, unit="clip", dynamic_ncols=True)
    student.train()
    attacker.generator.train()
    with run.interruptible(), bar:
        for iteration in range(first, iterations):
            scored = attacker.num_asked // score_every
            attacker.begin(iteration, rate(iteration))
            try:
                iterate(attacker, iteration)
            except BudgetExhausted as error:
                stopped = str(error)
                student.train()
                score(iteration)
                break
            if attacker.broke():
                raise UserError(
                    f"a loss is not finite in iteration {iteration + 1}; the state before is in {run.folder}; "
                    "lower the learning rates"
                )
            bar.update(max(0, victim.num_queries - bar.n))
            bar.set_postfix(left=limit - victim.num_queries, refresh=False)
            due = attacker.num_asked // score_every > scored or iteration + 1 == iterations
            if due:
                score(iteration + 1)
            if run.checkpoint_due() or due:
                save(iteration + 1)
            if run.stop_asked:
                raise KeyboardInterrupt(f"saved in {run.folder}; run the same command again to continue")
    return history, stopped


def _describe(point: dict, iterations: int) -> str:
    shown = [f"{k.replace('_at_', '@')} {100 * point[k]:.1f}" for k in ("top1", "top5", "agreement_at_1") if k in point]
    varied = [f"{k.replace('_', ' ')} {point[k]:.2f}" for k in ("answer_entropy", "mean_answer_entropy") if k in point]
    loss = f"loss {point['loss']:.3f}, " if "loss" in point else ""
    return (
        f"iteration {point['iteration']}/{iterations}: {loss}{', '.join(shown)} %, {', '.join(varied)}, "
        f"{point['num_queries']} queries"
    )
