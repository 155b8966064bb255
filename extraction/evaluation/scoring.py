"""Scoring: top-1 and top-5 against labels, and agreement with the victim's own top answer."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from extraction import distributed
from extraction.data.clips import Clips, load_batches
from extraction.data.queries import ClipDataset, Ref
from extraction.errors import UserError, printable
from extraction.victims.ledger import Ledger
from extraction.weights import write_atomically


class Predictions(NamedTuple):
    """Predictions for whole videos: the mean of the probabilities over the clips of each."""

    probs: Tensor  # float32 (V, num_classes), on the CPU; all zeros for a video that could not be decoded
    labels: Tensor  # int64 (V,)
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
    kept: Tensor | None = None,
    keep: Callable[[Sequence[int], Tensor], None] = lambda places, probs: None,
) -> Predictions:
    """Run `model` (float (B, 3, T, H, W) in [0, 1] -> logits) over `clips` and average each video's probabilities.

    With one clip a video, what is interrupted goes on: `keep(videos, probs)` is called after each batch, and one whose videos
    all have a row in `kept` (V, num_classes), zeros for the others, is not run again. Batches stay what they are, so that no
    bit depends on where it was interrupted.
    """
    total, counts = None, torch.zeros(clips.num_videos, device=device)
    broken = dict(clips.broken)
    batches = [range(i, min(i + batch_size, len(clips))) for i in range(0, len(clips), batch_size)]
    done: list[int] = []
    if kept is not None:
        of_batches = [[clips.refs[i].video for i in batch] for batch in batches]
        whole = [bool((kept[videos].sum(1) > 0).all()) for videos in of_batches]
        done = [video for videos, there in zip(of_batches, whole, strict=True) if there for video in videos]
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
        places = [clips.refs[i].video for i in batch.indices]
        videos = torch.tensor(places).to(device, non_blocking=True)
        if total is None:
            total = torch.zeros(clips.num_videos, probs.shape[1], device=device)
        total.index_add_(0, videos, probs)
        counts.index_add_(0, videos, torch.ones(len(videos), device=device))
        keep(places, probs)
    for _ in range(rounds - len(batches)):
        keep([], torch.empty(0))
    num_classes = max(distributed.gather([0 if total is None else total.shape[1]]))
    if kept is not None and done:
        num_classes = kept.shape[1]  # even where nothing new could be decoded
    if num_classes == 0:
        raise UserError("none of the held-out videos can be decoded")
    if total is None:
        total = torch.zeros(clips.num_videos, num_classes, device=device)
    total, counts = distributed.all_reduce_sum(total).cpu(), distributed.all_reduce_sum(counts).cpu()
    if kept is not None and done:
        total[done], counts[done] = kept[done], 1.0
    labels = torch.full((clips.num_videos,), -1)
    for ref in clips.refs:
        labels[ref.video] = ref.label
    return Predictions(
        total / counts.clamp(min=1)[:, None], labels, list(dict(distributed.gather(list(broken.items()))).items())
    )


def video_keys(clips: Clips) -> list[bytes]:
    """16 bytes for each video of `clips`, naming the clips it is scored on."""
    names = [""] * clips.num_videos
    for ref in clips.refs:
        names[ref.video] += ref.key + "|"
    return [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names]


def score(probs: Tensor, labels: Tensor, victim_probs: Tensor | None = None) -> dict[str, float]:
    """Score the videos that could be decoded, in fractions.

    `top1`, `top5`: (V, num_classes) probabilities against (V,) labels. Given the victim's probabilities, `agreement_at_1`,
    `agreement_at_5` too: how often the victim's top answer is among the student's k best.
    """
    seen = probs.sum(1) > 0
    best, labels = probs[seen].topk(min(5, probs.shape[1]), dim=1).indices, labels[seen]
    results = {"top1": _hits(best[:, :1], labels), "top5": _hits(best, labels)}
    if victim_probs is not None:
        answer = victim_probs[seen].argmax(1)
        results |= {"agreement_at_1": _hits(best[:, :1], answer), "agreement_at_5": _hits(best, answer)}
    return results


def _hits(best: Tensor, wanted: Tensor) -> float:
    return (best == wanted[:, None]).any(1).float().mean().item()


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


class Evaluator:
    """Scores students on held-out clips, beside the victim's own answers to them.

    The victim's answers here are the evaluator's, not the attacker's: unmetered, asked once before the attack, kept in the
    ledger's separate table, never trained on. `open_model` loads the bare victim when they are not kept yet.
    Without a ledger there is no victim to agree with.

    With at least 20 held-out videos a victim near chance raises UserError: see `check_victim` for `min_victim_top1`.
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
        self._predict = partial(predict_videos, clips=clips, device=device, batch_size=batch_size, num_workers=num_workers)
        self.victim_probs, self.victim_scores = None, {}
        if ledger is not None:
            labels = torch.full((clips.num_videos,), -1)
            for ref in clips.refs:
                labels[ref.video] = ref.label

            def compute(kept: Tensor, keep: Callable[[Sequence[int], Tensor], None]) -> Tensor:
                assert open_model is not None
                return self._predict(open_model(), desc="scoring the victim", kept=kept, keep=keep).probs

            self.victim_probs = ledger.evaluator_answers(video_keys(clips), compute)
            self.victim_scores = score(self.victim_probs, labels)
            if clips.num_videos >= 20:
                check_victim(self.victim_scores, len(classes), min_victim_top1)
            elif min_victim_top1 != 0:
                print(f"no preflight: {clips.num_videos} held-out videos are too few to tell a wrong victim (20 are not)")
            absent = len(classes) - len(labels.unique())
            if absent:
                print(f"{absent} of the victim's {len(classes)} classes have no held-out video; chance is that of all classes")

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
        return score(predictions.probs, predictions.labels, self.victim_probs)


def name_clips(root: str | Path, clips: Clips) -> str:
    """A word for file names: the folder's name and what tells its scored clips (videos, views, shape) from all others."""
    digest = hashlib.blake2b("|".join(ref.key for ref in clips.refs).encode(), digest_size=3).hexdigest()
    folder = re.sub(r"[^\w.-]+", "_", Path(root).resolve().name)
    return f"{folder}-{digest}"


def write_class_table(path: str | Path, probs: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Write one CSV line per class: name, number of videos, top-1, top-5."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", "num_videos", "top1", "top5"])
    for label in labels.unique().tolist():
        own = labels == label
        scores = score(probs[own], labels[own])
        writer.writerow([classes[label], int(own.sum()), f"{scores['top1']:.4f}", f"{scores['top5']:.4f}"])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
