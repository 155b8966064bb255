"""Score a victim itself on held-out videos: what it knows bounds what can be stolen, and shows that it is set up right.

    python grey_box/eval_teacher.py --victim swin --data datasets/kinetics400_val
    python grey_box/eval_teacher.py --victim movinet --data-list datasets/kinetics600_10per.csv --views 10x3
    python grey_box/eval_teacher.py --victim movinet --data datasets/unlabelled --fps 5 --ceiling

Prints top-1, top-5, their 95 % intervals (a bootstrap over videos) and clips per second, and writes a per-class table. A video
is judged by the mean of the probabilities of its clips. Without `--data` it is the 10 % class-balanced validation set of the
victim's own task. Of videos without labels it says what the answers are like. `--ceiling` measures how often the victim agrees
with itself when the same clips are shown a little otherwise, which bounds what a student's agreement can mean
(`extraction/evaluation/ceiling.py`), and writes that as a table too. Nothing is metered: this is the evaluator's view, not an
attacker's.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from extraction import options
from extraction.compute import choose_compute
from extraction.data.clips import Clips, report_broken
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, require_folder
from extraction.errors import UserError, printable
from extraction.evaluation.ceiling import measure_ceiling, print_ceiling, write_ceiling
from extraction.evaluation.results import describe_scores, percent
from extraction.evaluation.scoring import (
    average,
    bootstrap,
    describe_answers,
    find_video_numbers,
    name_clips,
    parse_views,
    predict_videos,
    tally,
    write_class_table,
)
from extraction.experiment import run_script
from extraction.victims.zoo import find_weights, load_model

SHORT_NAMES = {"swin": "swin_b_k400", "movinet": "movinet_a2_k600"}
DEMO_NAMES = {"swin": "demo_swin", "movinet": "demo_movinet"}


@dataclass(frozen=True, kw_only=True)
class Config(options.VictimFileOptions, options.ComputeOptions):
    victim: str = "swin"
    """Any victim's name; swin and movinet are short for swin_b_k400 and movinet_a2_k600 (and for the demo's own)."""
    data: str | None = None
    """Videos in class folders, or unlabelled in one; by default datasets/kinetics400_val, for k600 victims kinetics600_val."""
    data_unlabelled: bool = False
    """Take the class folders of --data for no labels."""
    data_list: str | None = None
    """Score only the videos of --data that this list names (a text file, or Kinetics' CSV)."""
    views: str = "1x1"
    """Test views, clips x crops per video; published are 4x3 for Swin and 1x1 for MoViNet."""
    num_frames: options.Count | None = None
    """Frames of a clip; by default what the victim was trained on, else 32."""
    stride: options.Count | None = None
    """Temporal stride; by default as published: 5 for k600 victims (5 frames a second of 25), else 2."""
    fps: options.FrameRate | None = None
    """Frames a second that clips take, instead of --stride: every n-th frame, n by each video's own frame rate."""
    size: options.Count | None = None
    """Height and width of a clip; by default what the victim was trained on, else 224."""
    ceiling: bool = False
    """Measure the victim's agreement with itself on clips that are resized, shifted, of another stride, and re-encoded."""
    ceiling_size: options.Count = 112
    """Height and width of the resized clips of --ceiling: those of the student's clips."""
    ceiling_crf: Annotated[int, options.Range(0, 51)] = 28
    """Quality at which --ceiling re-encodes clips (x264's CRF, 0 is lossless)."""
    out_dir: str = "runs/eval_teacher"
    """Where the per-class table goes, named after the victim and what was scored."""
    demo: bool = False
    """Score a demo victim on the built-in demo set's held-out videos."""


DEMO = dict(demo=True, data="datasets/demo", stride=1, num_workers=1, out_dir="runs/eval_teacher_demo")


class Stopwatch:
    """A model that adds up the clips it has seen and the seconds it took, its first batch (warming up) left out."""

    def __init__(self, model, device: torch.device):
        self.model, self.device = model, device
        self.clips, self.seconds, self.first = 0, 0.0, 0.0

    def __call__(self, clips: Tensor) -> Tensor:
        started = time.perf_counter()
        logits = self.model(clips)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - started
        if not self.first:
            self.first = len(clips) / took
        else:
            self.clips, self.seconds = self.clips + len(clips), self.seconds + took
        return logits

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.clips else self.first


def main(config: Config) -> dict:
    options.check_options(config)
    name = (DEMO_NAMES if config.demo else SHORT_NAMES).get(config.victim, config.victim)
    find_weights(name, config.victim_weights)
    if config.demo:
        write_demo_set("datasets/demo", {"val": 20})
    k600 = "k600" in name or config.victim_classes == "k600"
    root = require_folder(
        config.data or f"datasets/kinetics{600 if k600 else 400}_val", "held-out videos (10 % of a validation set, say)"
    )
    views = parse_views(config.views)
    compute = choose_compute(config.device, config.precision, config.compile)
    victim = compute.prepare(load_model(name, config.victim_weights, classes=config.victim_classes, about=config.victim_about))
    named = None if config.data_unlabelled else victim.classes
    clips = Clips(
        find_videos(root, named, "val", config.data_list, unlabelled_flag="--data-unlabelled"),
        views=views,
        num_frames=config.num_frames or victim.model.num_frames or 32,
        stride=config.stride or (5 if k600 else 2),
        size=config.size or victim.model.size or 224,
        fps=config.fps,
    )
    timed, started = Stopwatch(victim, compute.device), time.perf_counter()
    predict = partial(
        predict_videos, timed, device=compute.device, batch_size=config.batch_size, num_workers=config.num_workers,
        per_clip=config.ceiling,
    )  # fmt: skip
    predictions = predict(clips=clips)
    seconds = time.perf_counter() - started
    written = Path(config.out_dir) / f"{Path(name.replace(':', '_')).stem}.{name_clips(root, clips)}"
    table = written.with_name(f"{written.name}.classes.csv")
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {table.parent}: {error.strerror}; choose another --out-dir") from None
    video_of = find_video_numbers(clips) if config.ceiling else None
    results: dict[str, Any] = {"clips_per_second": timed.clips_per_second}
    line = f"{clips.num_videos} videos of {root}, {config.views} views each"
    if clips.refs[0].label >= 0:
        found = tally(predictions.probs, predictions.labels, videos=video_of)
        results |= average(found) | {"intervals": bootstrap(found)}
        write_class_table(table, predictions.probs, predictions.labels, victim.classes, video_of)
        scores = f"{describe_scores(results)}, chance {percent(1 / len(victim.classes))} %,"
        line += f"; per class: {table}"
    else:
        answers = describe_answers(predictions.probs, victim.classes)
        results |= answers._asdict()
        scores = (
            f"no labels; most often {answers.top_class!r}, {percent(answers.top_class_share)} %; mean top probability "
            f"{percent(answers.confidence)} %, mean entropy {percent(answers.entropy)} % of the largest,"
        )
    shape = f"{clips.num_frames}x{clips.size}x{clips.size}"
    print(printable(f"{name}: {scores} on clips of {shape}; attacks send clips of their own size, where it scores otherwise"))
    print(printable(line))
    print(f"{timed.clips_per_second:.1f} clips/s in the victim, {len(clips) / seconds:.1f} with decoding, on {compute.device}")
    report_broken(predictions.broken)
    if config.ceiling:
        changes = measure_ceiling(predict, clips, predictions.probs, config.ceiling_size, config.ceiling_crf)
        results["ceiling"] = {change.name: change.scores for change in changes}
        print_ceiling(changes)
        write_ceiling(written.with_name(f"{written.name}.ceiling.csv"), changes)
    return results


if __name__ == "__main__":
    run_script(main, Config, DEMO)
