"""The ceiling of agreement: how often a victim agrees with itself when the same clips are shown a little otherwise.

No student can be asked to agree more often with a victim than the victim does with itself under changes that leave the action
as it is.
"""

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from extraction.data.clips import ClipRef, Clips, name_clip
from extraction.data.decoding import Broken
from extraction.data.transcode import reencode_clip
from extraction.evaluation.results import format_table, percent, percent_range
from extraction.evaluation.scoring import Predictions, average, bootstrap, find_video_numbers, tally
from extraction.weights import write_text


class Predict(Protocol):
    """`predict_videos` of a victim, with a row per clip."""

    def __call__(self, *, clips: Any, desc: str) -> Predictions: ...


class Change(NamedTuple):
    """One way to show the same clips otherwise, and what came of it."""

    name: str
    scores: dict[str, float]  # agreement_at_1, agreement_at_5, mean_kl
    intervals: dict[str, list[float]]


def measure_ceiling(predict: Predict, clips: Clips, victim_probs: Tensor, size: int, crf: int) -> list[Change]:
    """Score a victim's answers to changed `clips` against its own `victim_probs` (N, num_classes) for the clips as they are.

    The changes: clips of `size` x `size` pixels, as a student of that size sends them; clips that start a frame later; half
    the temporal stride around the same moment (twice it where it is 1); frames gone through H.264 at `crf`, at the clip's own
    size. Where a video is too short for a change its last frame is repeated.
    """
    single = all(ref.stride == 1 for ref in clips.refs)
    labels, videos = torch.full((len(clips),), -1), find_video_numbers(clips)
    changed: dict[str, Any] = {
        f"{size} pixels a side": recut(clips, lambda ref: ref, size),
        "one frame later": recut(clips, lambda ref: ref._replace(start=ref.start + 1)),
        "twice the stride" if single else "half the stride": recut(
            clips, lambda ref: _centre(ref, ref.stride // 2 or 2, clips.num_frames)
        ),
        f"H.264 at CRF {crf}": Reencoded(clips, crf),
    }
    found = []
    for name, other in changed.items():
        tallies = tally(predict(clips=other, desc=name).probs, labels, victim_probs, videos)
        found.append(Change(name, average(tallies), bootstrap(tallies)))
    return found


def recut(clips: Clips, change: Callable[[ClipRef], ClipRef], size: int | None = None) -> Clips:
    """The same clips with another start or stride, which `change` gives a `ClipRef`, or of another size."""
    other = copy.copy(clips)
    other.size, other.kept = size or clips.size, None  # what is kept on disk are the clips as they were
    other.refs = []
    for ref in map(change, clips.refs):
        fingerprint = ref.key.partition(":")[0]
        key = name_clip(fingerprint, ref.start, clips.num_frames, ref.stride, other.size, ref.crop)
        other.refs.append(ref._replace(key=key))
    return other


def _centre(ref: ClipRef, stride: int, num_frames: int) -> ClipRef:
    """`ref` with another stride, its middle where it was."""
    return ref._replace(start=max(0, ref.start + (num_frames - 1) * (ref.stride - stride) // 2), stride=stride)


class Reencoded:
    """Clips whose frames have gone through H.264."""

    def __init__(self, clips: Clips, crf: int):
        self.clips, self.crf = clips, crf
        self.refs, self.broken, self.num_videos = clips.refs, clips.broken, clips.num_videos

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Broken]:
        """As `Clips` gives it."""
        _, clip = self.clips[index]
        return index, clip if isinstance(clip, Broken) else reencode_clip(clip, self.crf)


def print_ceiling(changes: list[Change]) -> None:
    """Print the table of `measure_ceiling`, in percent and nats, with 95 % intervals."""
    rows = [["% agreement with itself", "@1", "95 %", "@5", "95 %", "KL"]]
    for name, scores, intervals in changes:
        cells = [cell for k in _SHARES for cell in (percent(scores[k]), percent_range(intervals[k]))]
        rows.append([name, *cells, f"{scores['mean_kl']:.3f}"])
    print("\n" + format_table(rows) + "\n")


def write_ceiling(path: Path, changes: list[Change]) -> None:
    """Write the table of `measure_ceiling` as CSV: fractions, and the ends of their 95 % intervals."""
    text = io.StringIO()
    writer = csv.writer(text)
    names = (*_SHARES, "mean_kl")
    writer.writerow(["change", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))])
    for change, scores, intervals in changes:
        writer.writerow([change, *(f"{value:.4f}" for name in names for value in (scores[name], *intervals[name]))])
    write_text(path, text.getvalue())


_SHARES = ("agreement_at_1", "agreement_at_5")
