"""Scoring: top-1 and top-5 against labels, agreement with the victim's own answers, and how far chance moves them."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction import distributed
from extraction.data.clips import Clips, load_batches
from extraction.data.queries import ClipDataset, Ref
from extraction.errors import UserError, printable
from extraction.victims.ledger import Ledger
from extraction.weights import write_text


class Predictions(NamedTuple):
    """Predictions for clips, or for whole videos: the mean of the probabilities over the clips of each."""

    probs: Tensor  # float32 (N, num_classes), on the CPU; all zeros for what could not be decoded
    labels: Tensor  # int64 (N,); -1 without one
    broken: list[tuple[Path, str]]


def parse_views(views: str) -> tuple[int, int]:
    """`10x3` -> (10, 3): ten clips a video, three crops a clip."""
    try:
        num_clips, num_crops = (int(part) for part in views.lower().split("x"))
    except ValueError:
        num_clips = num_crops = 0
    if num_clips < 1 or num_crops < 1:
        raise UserError(f"views {views!r}: write clips x crops per video, such as 1x1 or 10x3")
    return num_clips, num_crops


@torch.no_grad()
def predict_videos(
    model: Callable[[Tensor], Tensor],
    clips: Clips,
    device: str | torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    desc: str = "scoring",
    per_clip: bool = False,
    kept: Tensor | None = None,
    keep: Callable[[Sequence[int], Tensor], None] = lambda places, probs: None,
) -> Predictions:
    """Run `model` (float (B, 3, T, H, W) in [0, 1] -> logits) over `clips` and average each video's probabilities.

    With `per_clip` a row is a clip. Raises UserError when nothing can be decoded.

    Where a row is one clip, what is interrupted goes on: `keep(rows, probs)` is called after each batch, and a batch whose rows
    are all in `kept` (N, num_classes), zeros for the others, is not run again. Batches stay what they are, so that no bit
    depends on where it was interrupted.
    """
    row_of = list(range(len(clips))) if per_clip else [ref.video for ref in clips.refs]
    num_rows = len(clips) if per_clip else clips.num_videos
    total, counts = None, torch.zeros(num_rows, device=device)
    broken = dict(clips.broken)
    batches = [range(i, min(i + batch_size, len(clips))) for i in range(0, len(clips), batch_size)]
    done: list[int] = []
    if kept is not None:
        of_batches = [[row_of[i] for i in batch] for batch in batches]
        whole = [bool((kept[places].sum(1) > 0).all()) for places in of_batches]
        done = [place for places, there in zip(of_batches, whole, strict=True) if there for place in places]
        batches = [batch for batch, there in zip(batches, whole, strict=True) if not there]
    batches = distributed.shard(batches)
    rounds = max(distributed.gather([len(batches)]))
    loader = load_batches(clips, batches, num_workers, pin_memory=torch.device(device).type == "cuda")
    for batch in tqdm(loader, total=len(batches), desc=desc, unit="batch", leave=False, dynamic_ncols=True):
        broken |= dict(batch.broken)
        if not batch.indices:
            keep([], torch.empty(0))
            continue
        views = batch.clips.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).float().div_(255.0)
        probs = model(views).softmax(1)
        places = [row_of[i] for i in batch.indices]
        rows = torch.tensor(places).to(device, non_blocking=True)
        if total is None:
            total = torch.zeros(num_rows, probs.shape[1], device=device)
        total.index_add_(0, rows, probs)
        counts.index_add_(0, rows, torch.ones(len(rows), device=device))
        keep(places, probs)
    for _ in range(rounds - len(batches)):
        keep([], torch.empty(0))
    num_classes = max(distributed.gather([0 if total is None else total.shape[1]]))
    if kept is not None and done:
        num_classes = kept.shape[1]  # even where nothing new could be decoded
    if num_classes == 0:
        raise UserError("none of the held-out videos can be decoded")
    if total is None:
        total = torch.zeros(num_rows, num_classes, device=device)
    total, counts = distributed.all_reduce_sum(total).cpu(), distributed.all_reduce_sum(counts).cpu()
    if kept is not None and done:
        total[done], counts[done] = kept[done], 1.0
    labels = torch.full((num_rows,), -1)
    labels[torch.tensor(row_of)] = torch.tensor([ref.label for ref in clips.refs])
    return Predictions(
        total / counts.clamp(min=1)[:, None], labels, list(dict(distributed.gather(list(broken.items()))).items())
    )


def find_video_numbers(clips: Clips) -> Tensor:
    """int64 (N,): the number of the video that each clip is of."""
    return torch.tensor([ref.video for ref in clips.refs])


def clip_keys(clips: Clips) -> list[bytes]:
    """16 bytes for each clip of `clips`, which name it in the ledger's table of the evaluator."""
    return [hashlib.blake2b(f"{ref.key}|".encode(), digest_size=16).digest() for ref in clips.refs]


def tally(probs: Tensor, labels: Tensor, victim_probs: Tensor | None = None, videos: Tensor | None = None) -> dict[str, Tensor]:
    """What each video adds to each score: float32 (V, 2), a sum and the number of observations in it.

    `probs` (N, num_classes) and `labels` (N,) are those of clips, `videos` (N,) says which video each is of (None: each of its
    own). `top1`, `top5`: one observation a video, its label among the best of the mean of its clips' probabilities; missing
    where no clip has a label (-1). Given the victim's (N, num_classes) probabilities also `agreement_at_1`, `agreement_at_5`
    (the victim's top answer is among the student's k best) and `mean_kl`, KL(victim || student) in nats: one observation a
    clip, for they say how alike two functions are, whose inputs are clips. Clips that could not be decoded are left out.
    """
    seen, labelled = probs.sum(1) > 0, bool((labels >= 0).any())
    if victim_probs is not None:
        seen = seen & (victim_probs.sum(1) > 0)
        victim_probs = victim_probs[seen]
    num_videos = len(probs) if videos is None else int(videos.max()) + 1
    videos = (torch.arange(len(probs)) if videos is None else videos)[seen]
    probs, labels = probs[seen], labels[seen]

    def add_up(values: Tensor, into: Tensor) -> Tensor:
        pairs = torch.stack([values.float(), torch.ones(len(values))], 1)
        return torch.zeros(num_videos, 2).index_add_(0, into, pairs)

    found: dict[str, Tensor] = {}
    if labelled:
        sums = torch.zeros(num_videos, probs.shape[1]).index_add_(0, videos, probs)
        counts = torch.bincount(videos, minlength=num_videos)
        label_of = torch.full((num_videos,), -1)
        label_of[videos] = labels
        there = counts.nonzero()[:, 0]
        best = _best(sums[there] / counts[there, None])
        found |= {f"top{k}": add_up(_hits(best[:, :k], label_of[there]), there) for k in (1, 5)}
    if victim_probs is not None:
        best, answers = _best(probs), victim_probs.argmax(1)
        found |= {f"agreement_at_{k}": add_up(_hits(best[:, :k], answers), videos) for k in (1, 5)}
        surprise = probs.clamp_min(torch.finfo(torch.float32).tiny).log()  # at most 87 nats, where softmax gave 0
        found["mean_kl"] = add_up((torch.special.xlogy(victim_probs, victim_probs) - victim_probs * surprise).sum(1), videos)
    return found


def _best(probs: Tensor) -> Tensor:
    return probs.topk(min(5, probs.shape[1]), dim=1).indices


def _hits(best: Tensor, wanted: Tensor) -> Tensor:
    return (best == wanted[:, None]).any(1)


def score(probs: Tensor, labels: Tensor, victim_probs: Tensor | None = None, videos: Tensor | None = None) -> dict[str, float]:
    """The scores of `tally`, each the mean over its observations: fractions, `mean_kl` in nats."""
    return average(tally(probs, labels, victim_probs, videos))


def average(tallies: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over all observations of what `tally` returned."""
    totals = {name: pairs.sum(0) for name, pairs in tallies.items()}
    return {name: (total[0] / total[1]).item() for name, total in totals.items()}


def bootstrap(tallies: Mapping[str, Tensor], num_resamples: int = 2000, seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals [low, high] of the means of `tally`: the percentile bootstrap by video (Efron 1979).

    Each resample draws as many videos as there are, with replacement, each with all its clips: clips of one video are alike,
    and would make a score look surer than it is. What comes of other seeds of training is not in it. A score of 0 or 1 has an
    interval without a width: no resample shows what no video did.
    """
    values = torch.cat(list(tallies.values()), 1).double().numpy()  # (V, 2 * names): sum, count, sum, ...
    values = values[(values[:, 1::2] > 0).any(1)]  # videos that were seen
    num_videos, draw = len(values), np.random.default_rng(seed)
    if not num_videos:
        return {}
    step, means = max(1, 2_000_000 // num_videos), []
    for first in range(0, num_resamples, step):
        count = min(step, num_resamples - first)
        drawn = draw.integers(num_videos, size=(count, num_videos)) + num_videos * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * num_videos).reshape(count, num_videos)
        sums = times @ values
        means.append(sums[:, ::2] / sums[:, 1::2])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return {name: [float(low[k]), float(high[k])] for k, name in enumerate(tallies)}


def _identify(ref: Ref) -> list[str]:
    youtube = re.fullmatch(r"(.{11})_\d{6}_\d{6}", ref.path.stem)
    return [ref.key.partition(":")[0], *([youtube[1]] if youtube else [])]


def check_victim(scores: dict[str, float], num_classes: int, min_victim_top1: float | None = None) -> None:
    """The preflight: raise UserError when a victim's `scores` on held-out clips are near chance, before the first query.

    `min_victim_top1` is the least top-1 that passes, a fraction; None: three times chance, 0: anything. With fewer than
    five classes three times chance is near or above 1, so there it is half-way from chance to perfect.
    """
    chance = 1 / num_classes
    needed = min(3 * chance, (1 + chance) / 2) if min_victim_top1 is None else min_victim_top1
    if scores["top1"] < needed:
        raise UserError(
            f"the victim names {100 * scores['top1']:.1f} % of the held-out clips right, {100 * needed:.1f} % is the least and "
            f"{100 * chance:.1f} % chance: wrong weights, wrong class order, wrong preprocessing or labels of something else; "
            "no query was made (--min-victim-top1 lowers the least, 0 switches this check off)"
        )


class AnswerSpread(NamedTuple):
    """What a victim's answers are like, without labels."""

    top_class: str  # that it names most often
    top_class_share: float  # how often; a student that says nothing else agrees as often
    confidence: float  # mean top probability
    entropy: float  # mean entropy of an answer, as a fraction of a uniform one's


def describe_answers(probs: Tensor, classes: Sequence[str]) -> AnswerSpread:
    """The spread of (N, num_classes) answers; rows of zeros, of clips that could not be decoded, are left out."""
    probs = probs[probs.sum(1) > 0]
    named = torch.bincount(probs.argmax(1), minlength=len(classes))
    entropy = torch.special.entr(probs).sum(1).mean() / math.log(max(2, len(classes)))
    share, confidence = named.max() / named.sum(), probs.amax(1).mean()
    return AnswerSpread(classes[int(named.argmax())], share.item(), confidence.item(), entropy.item())


def check_answers(answers: AnswerSpread, min_victim_top1: float | None = None) -> None:
    """The preflight without labels: raise UserError when a victim's answers can tell no student from another.

    Two faults show without labels. Clips that are prepared wrongly look all alike to a network, which names one class for
    nearly all: nine tenths of them is the limit here, for there a student that knows nothing agrees nine times of ten, whatever
    the victim is. And a network without its weights is unsure of everything: its mean entropy is that of a uniform answer to a
    few per cent, where a trained one's is well below also on footage that it knows nothing of; the limit is 95 % (297 of 400
    classes equally likely, 10.6 of 12). A wrong class order does not show. `min_victim_top1=0` switches the check off; another
    least top-1 can't be checked, and is refused.
    """
    if min_victim_top1 == 0:
        return
    if min_victim_top1 is not None:
        raise UserError(
            f"--min-victim-top1 {min_victim_top1}: the held-out videos have no labels to measure it on; leave it away"
        )
    if answers.top_class_share >= 0.9:
        fault = f"calls {100 * answers.top_class_share:.1f} % of the held-out clips {answers.top_class!r}"
        cause = "wrong preprocessing or weights, or footage of one kind, where a student that says nothing else agrees as often"
    elif answers.entropy >= 0.95:
        fault = f"is nearly uniform on the held-out clips: mean entropy {100 * answers.entropy:.1f} % of the largest"
        cause = f"wrong weights or preprocessing (mean top probability {100 * answers.confidence:.1f} %)"
    else:
        return
    raise UserError(f"the victim {fault}: {cause}; no query was made (--min-victim-top1 0 switches this check off)")


class Evaluator:
    """Scores students on held-out clips, beside the victim's own answers to them.

    The victim's answers here are the evaluator's, not the attacker's: unmetered, asked once before the attack, kept in the
    ledger's separate table, never trained on. `open_model` loads the bare victim when they are not kept yet.
    Without a ledger there is no victim to agree with; without labels (-1) there is nothing but agreement. Raises UserError
    when there is neither.

    With at least 20 held-out videos a victim that is set up wrongly raises UserError: see `check_victim` for
    `min_victim_top1`, and `check_answers` for videos without labels.
    """

    def __init__(
        self,
        clips: Clips,
        classes: Sequence[str],
        device: torch.device,
        batch_size: int,
        num_workers: int,
        ledger: Ledger | None = None,
        open_model: Callable[[], Callable[[Tensor], Tensor]] | None = None,
        min_victim_top1: float | None = None,
        allow_overlap: bool = False,
    ):
        self.allow_overlap = allow_overlap
        self.clips, self.classes, self.broken = clips, classes, list(clips.broken)
        self._predict = partial(
            predict_videos, clips=clips, device=device, batch_size=batch_size, num_workers=num_workers, per_clip=True
        )
        self._videos = find_video_numbers(clips)
        self._last: dict[str, Tensor] | None = None  # the tally of the last score
        self.top_classes = torch.empty(0, dtype=torch.int64)  # (len(clips),) at the last score; -1: not decoded
        self.victim_probs: Tensor | None = None  # (len(clips), num_classes)
        self.victim_scores: dict[str, Any] = {}
        labels = torch.tensor([ref.label for ref in clips.refs])
        labelled = bool((labels >= 0).any())
        if ledger is None:
            if not labelled:
                raise UserError("--val: videos without labels, and no victim to agree with; lay it out as class/video files")
            return

        def compute(kept: Tensor, keep: Callable[[Sequence[int], Tensor], None]) -> Tensor:
            assert open_model is not None
            return self._predict(open_model(), desc="scoring the victim", kept=kept, keep=keep).probs

        self.victim_probs = ledger.evaluator_answers(clip_keys(clips), compute)
        enough = clips.num_videos >= 20
        if not enough and min_victim_top1 != 0:
            print(f"no preflight: {clips.num_videos} held-out videos are too few to tell a wrong victim (20 are not)")
        if labelled:
            self.victim_scores = score(self.victim_probs, labels, videos=self._videos)
            if enough:
                check_victim(self.victim_scores, len(classes), min_victim_top1)
            absent = len(classes) - len(labels.unique())
            if absent:
                print(f"{absent} of the victim's {len(classes)} classes have no held-out video; chance is that of all classes")
        else:
            answers = describe_answers(self.victim_probs, classes)
            if enough:
                check_answers(answers, min_victim_top1)
            self.victim_scores = dict(top1=None, top5=None) | answers._asdict()
            print(
                f"no labels: {len(clips)} clips of {clips.num_videos} videos score by agreement alone; the victim calls "
                f"{100 * answers.top_class_share:.1f} % of them {answers.top_class!r}, its most frequent answer"
            )

    def refuse_overlap(self, clips: ClipDataset) -> None:
        """Raise UserError when videos that score a student are among those it is trained on, unless that is allowed.

        Videos are the same when their content is, or when their names have the same YouTube id, as Kinetics' files have it.
        """
        scored = {mark for ref in self.clips.refs for mark in _identify(ref)}
        both = list(dict.fromkeys(ref.path for ref in clips.refs if not scored.isdisjoint(_identify(ref))))
        if both:
            line = f"{len(both)} videos that score the student are trained on too, such as {both[0]}"
            if not self.allow_overlap:
                raise UserError(f"{line}; keep them out (--val-list, --in-domain-list), or pass --allow-overlap")
            print(printable(line))

    def score(self, student: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`top1`, `top5` and, with a victim, `agreement_at_1`, `agreement_at_5` of a student in evaluation mode."""
        predictions = self._predict(student)
        self.broken = predictions.broken
        self.top_classes = torch.where(predictions.probs.sum(1) > 0, predictions.probs.argmax(1), -1)
        self._last = tally(predictions.probs, predictions.labels, self.victim_probs, self._videos)
        return {name: value for name, value in average(self._last).items() if name != "mean_kl"}

    def summarise(self, student: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What goes with the last score: `intervals` (95 %, see `bootstrap`) and, with a victim, `mean_kl`.

        `student` is scored anew when nothing was in this process: in a run that was interrupted after its last score.
        """
        if self._last is None:
            self.score(student)
        assert self._last is not None
        kl = {name: value for name, value in average(self._last).items() if name == "mean_kl"}
        return kl | {"intervals": bootstrap(self._last)}


def name_clips(root: str | Path, clips: Clips) -> str:
    """A word for file names: the folder's name and what tells its scored clips (videos, views, shape) from all others."""
    digest = hashlib.blake2b("|".join(ref.key for ref in clips.refs).encode(), digest_size=3).hexdigest()
    folder = re.sub(r"[^\w.-]+", "_", Path(root).resolve().name)
    return f"{folder}-{digest}"


def write_class_table(
    path: str | Path, probs: Tensor, labels: Tensor, classes: Sequence[str], videos: Tensor | None = None
) -> None:
    """Write one CSV line per class: name, number of videos, top-1, top-5. Arguments are those of `tally`."""
    videos = torch.arange(len(probs)) if videos is None else videos
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", "num_videos", "top1", "top5"])
    for label in labels.unique().tolist():
        own = labels == label
        scores = score(probs[own], labels[own], videos=videos[own])
        writer.writerow([classes[label], len(videos[own].unique()), f"{scores['top1']:.4f}", f"{scores['top5']:.4f}"])
    write_text(path, text.getvalue())
