"""The distillation loop of the grey-box experiments: ask the victim about views of real clips, train the student on them."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from extraction import distributed
from extraction.data.augment import create_views, view_key
from extraction.data.clips import Batch, Clips, load_batches
from extraction.errors import UserError
from extraction.ledger import Ledger
from extraction.network import VideoModel
from extraction.report import draw_queries
from extraction.runs import Run


def answers_to_targets(answers: Tensor, surface: str, num_classes: int) -> Tensor:
    """The distribution (B, num_classes) that an answer stands for.

    A label stands for all of the probability on it; after a top five the rest is shared evenly among the other classes.
    """
    if surface == "label":
        return F.one_hot(answers, num_classes).float()
    if surface == "logits":
        return answers.softmax(1)
    if surface == "top5" and num_classes > 5:
        hidden = answers == 0
        rest = (1.0 - answers.sum(1, keepdim=True)).clamp(min=0.0)
        answers = answers + hidden * rest / hidden.sum(1, keepdim=True).clamp(min=1)
    return answers / answers.sum(1, keepdim=True).clamp(min=1e-12)  # rounding may have taken the sum off 1


def distillation_loss(logits: Tensor, targets: Tensor | None, labels: Tensor, label_weight: float) -> Tensor:
    """Mean over the clips of KL(victim || student) + `label_weight` * cross-entropy, the latter where a label is known.

    `targets` (B, num_classes) are the victim's probabilities (None: true labels alone), `labels` (B,) has -1 for a clip
    without one. Both terms are per clip, in nats.
    """
    loss = logits.new_zeros(())
    if targets is not None:
        loss = F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")
    if label_weight:
        loss = loss + label_weight * F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(logits)
    return loss


class _Order:
    """Which clips each batch of each epoch holds: a function of the seed."""

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


def distill(
    run: Run,
    student: VideoModel,
    victim: Ledger | None,
    clips: Clips,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    evaluate: Callable[[VideoModel], dict[str, float]],
    *,
    epochs: int,
    batch_size: int,
    label_weight: float = 0.0,
    augmentation: NamedTuple,
    make_views: Callable[[Tensor, Sequence[bytes], NamedTuple], Tensor] = create_views,
    craft: Callable[[VideoModel, Tensor, Tensor, Sequence[bytes]], tuple[Tensor, list[bytes]]] | None = None,
    views_per_clip: int | None = None,
    max_grad_norm: float | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> tuple[list[dict], str]:
    """Train `student` on the victim's answers to views of `clips`, and on true labels where clips have them.

    Each epoch shows every clip once, as a new view; with `views_per_clip` the views come round again, free of charge.
    `make_views` turns what the loader gives into the clips that are sent, as `augmentation` and a view's key say.
    `craft(student, views, targets, keys)` makes further clips, and keys that name them, out of a batch that was answered
    (`keys` name the batch in this step); each is asked about too, one query a clip, and trained on beside the batch.
    `schedule` steps each batch; a plateau schedule is given the mean loss of the last 100 batches. `evaluate` scores the
    student after each epoch. `clips.png` in the run's folder shows the first batch as the victim saw it. `victim=None`
    trains on the labels alone.

    Resumes from the run's checkpoint, to the same bits on a CPU. Of several processes (`extraction.distributed`) each takes
    its share of every batch. Returns the history (a dict per evaluation) and what
    stopped the loop: "epochs", or the line of an exhausted budget. Raises UserError when the loss is not finite and
    KeyboardInterrupt after Ctrl-C, the state being saved.
    """
    device = next(student.parameters()).device
    order = _Order(len(clips), batch_size, epochs, seed)
    forward = distributed.parallel(student)
    # On a GPU the loss is read only now and then, so that the device never waits for the host.
    read_every = 1 if device.type == "cpu" else 10
    recent, history, first, stopped = deque(maxlen=100), [], 0, "epochs"
    plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)

    run.begin()
    state = run.load_state()
    if state:
        student.net.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        recent.extend(state["recent"])
        history, first = state["history"], state["batch"]
        print(f"resuming {run.folder} at batch {first} of {order.num_batches}", flush=True)
    elif victim is not None:
        views = epochs if views_per_clip is None else min(epochs, views_per_clip)
        crafted = "" if craft is None else ", and one for each clip crafted on them"
        print(f"{len(clips)} clips in {views} views each: at most {len(clips) * views} queries{crafted}", flush=True)

    def save(batch: int) -> None:
        run.save_state(
            dict(
                student=student.net.state_dict(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                recent=list(recent),
                history=history,
                batch=batch,
            )
        )

    if first == order.num_batches:
        return history, stopped

    bar = tqdm(
        total=epochs * len(clips), initial=min(first * batch_size, epochs * len(clips)), desc=run.experiment, unit="clip",
        dynamic_ncols=True,
    )  # fmt: skip
    shares = map(distributed.shard, order.batches_from(first))
    loader = load_batches(clips, shares, num_workers, pin_memory=device.type == "cuda")

    def ask(batch: Batch, epoch: int) -> Asked:
        """Make views of a batch, as many as the budget allows, and let the victim answer them."""
        view = epoch if views_per_clip is None else epoch % views_per_clip
        keys = [view_key(seed, clips.refs[i].key, view, augmentation) for i in batch.indices]
        affordable = len(keys) if victim is None else victim.count_affordable(keys)
        wanted, counts = zip(*distributed.gather([(len(keys), affordable)]), strict=True)
        keys, views, targets = keys[:affordable], batch.clips[:affordable].to(device, non_blocking=True), None
        if affordable:
            views = make_views(views, keys, augmentation)
        if victim is not None and sum(counts):
            targets = _ask(victim, views, keys)
        labels = torch.tensor([clips.refs[i].label for i in batch.indices[:affordable]], dtype=torch.int64)
        return Asked(keys, views, labels.to(device, non_blocking=True), targets, list(counts), sum(counts) < sum(wanted))

    unread: list[Tensor] = []
    student.train()
    mean_loss = sum(recent) / len(recent) if recent else math.nan
    # The next batch is asked about while the student learns from this one: not where the order of bills or of what
    # processes say to each other would depend on it, nor beyond an epoch, whose bill is written down at its end.
    looks_ahead = craft is None and distributed.num_processes() == 1
    batches = ask_ahead(loader, first, order.per_epoch, ask, looks_ahead)
    with run.interruptible(), bar, contextlib.closing(batches):
        for number, batch, asked in batches:
            epoch = number // order.per_epoch
            clips.broken.extend((clips.refs[i].path, reason) for i, reason in batch.broken)
            keys, views, labels, targets, counts, exhausted = asked
            num_shown = sum(counts)
            if number == 0 and keys and victim is not None:
                sources = [clips.refs[i].path.parent.name for i in batch.indices]
                draw_queries(run.folder / "clips.png", views, targets, sources, victim.classes)
            if craft is not None and not exhausted and min(counts):
                crafted, crafted_keys = craft(student, views, targets, [b"%s|%d" % (key, number) for key in keys])
                count = victim.count_affordable(crafted_keys)
                wanted, crafted_counts = zip(*distributed.gather([(len(crafted_keys), count)]), strict=True)
                exhausted = sum(crafted_counts) < sum(wanted)
                if sum(crafted_counts):
                    targets = torch.cat([targets, _ask(victim, crafted[:count], crafted_keys[:count])])
                    views = torch.cat([views, crafted[:count]])
                    labels = torch.cat([labels, labels.new_full((count,), -1)])
                    counts = [a + b for a, b in zip(counts, crafted_counts, strict=True)]
            if exhausted:
                save(number)  # from here a larger budget goes on; what follows trains on the last answers there are
            if min(counts):  # a process without a clip (a last batch can be so small) can't take part in a step
                # What is drawn in a step, such as dropout, is a function of the step, so that no state of it need be kept.
                torch.manual_seed((seed * 1_000_003 + number) * distributed.num_processes() + distributed.rank())
                loss = distillation_loss(forward(views), targets, labels, label_weight) * (len(views) / sum(counts))
                optimizer.zero_grad(set_to_none=True)
                (loss * distributed.num_processes()).backward()  # gradients are averaged over the processes
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
                optimizer.step()
                if not plateau:
                    schedule.step()
                unread.append(loss.detach())
            bar.update(num_shown)
            if exhausted:
                stopped = (
                    f"query budget exhausted: {victim.num_queries} of {victim.query_budget} queries spent "
                    f"in epoch {epoch + 1} of {epochs}; raise --query-budget and run again to go on"
                )
            end_of_epoch = (number + 1) % order.per_epoch == 0
            pause = run.checkpoint_due() or end_of_epoch or stopped != "epochs"
            if len(unread) >= read_every or (pause and unread):
                for value in distributed.all_reduce_sum(torch.stack(unread)).tolist():
                    if not math.isfinite(value):
                        raise UserError(
                            f"the loss became {value} in epoch {epoch + 1}, batch {number % order.per_epoch + 1} or up to "
                            f"{len(unread) - 1} before it; the state before is in {run.folder}; lower the learning rates"
                        )
                    recent.append(value)
                    mean_loss = sum(recent) / len(recent)
                    if plateau:
                        schedule.step(mean_loss)
                unread.clear()
                spent = {} if victim is None else {"queries": _describe_spending(victim)}
                bar.set_postfix(loss=f"{mean_loss:.3f}", **spent, refresh=False)
            if end_of_epoch or stopped != "epochs":
                point = dict(epoch=epoch + 1, num_queries=victim.num_queries if victim is not None else 0, loss=mean_loss)
                point |= evaluate(student.eval())
                student.train()
                history.append(point)
                run.log(point["num_queries"], {k: v for k, v in point.items() if k not in ("epoch", "num_queries")})
                bar.write(_describe_point(point, epochs))
            if stopped != "epochs":
                break
            if pause:
                save(number + 1)
            if run.stop_asked:
                raise KeyboardInterrupt(f"saved in {run.folder}; run the same command again to continue")
    clips.broken = list(dict.fromkeys(distributed.gather(clips.broken)))
    return history, stopped


class Asked(NamedTuple):
    """A process's share of a batch, answered."""

    keys: list[bytes]
    views: Tensor  # float (B, C, T, H, W)
    labels: Tensor  # (B,), -1 without one
    targets: Tensor | None  # (B, num_classes)
    counts: list[int]  # clips in each process
    exhausted: bool  # the budget left some out


def ask_ahead(
    loader: Iterable[Batch], first: int, per_epoch: int, ask: Callable[[Batch, int], Asked], looks_ahead: bool
) -> Iterator[tuple[int, Batch, Asked]]:
    """The batches of `loader`, from number `first` on, each with what `ask(batch, epoch)` says of it.

    With `looks_ahead` a thread asks about a batch while the one before it is in use, within an epoch of `per_epoch` batches.
    """
    source, upcoming = enumerate(loader, first), None

    def fetch() -> tuple[int, Batch, Asked] | None:
        number, batch = next(source, (0, None))
        return None if batch is None else (number, batch, ask(batch, number // per_epoch))

    with ThreadPoolExecutor(1) as thread:
        while (item := upcoming.result() if upcoming else fetch()) is not None:
            goes_on = looks_ahead and (item[0] + 1) % per_epoch and not item[2].exhausted
            upcoming = thread.submit(fetch) if goes_on else None
            yield item


def _ask(victim: Ledger, clips: Tensor, keys: Sequence[bytes]) -> Tensor:
    return answers_to_targets(victim.query(clips, keys), victim.answers, victim.num_classes)


def _describe_spending(victim: Ledger) -> str:
    return f"{victim.num_queries}" + (f"/{victim.query_budget}" if victim.query_budget is not None else "")


def _describe_point(point: dict, epochs: int) -> str:
    shown = [
        f"{name.replace('_at_', '@')} {100 * point[name]:.1f}" for name in ("top1", "top5", "agreement_at_1") if name in point
    ]
    scores = f"{', '.join(shown)} %, " if shown else ""
    loss = "untrained" if math.isnan(point["loss"]) else f"loss {point['loss']:.3f}"
    return f"epoch {point['epoch']}/{epochs}: {loss}, {scores}{point['num_queries']} queries"
