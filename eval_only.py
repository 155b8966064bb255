"""Score saved student weights on a folder of videos, such as the validation set of Kinetics-400 or -600.

    python eval_only.py r2plus1d_34 runs/swin_to_r21_kd/student.safetensors --data datasets/kinetics400_val
    python eval_only.py r2plus1d_34 weights/somebodys.pth --data datasets/kinetics400_val --classes k400 --views 10x3
    python eval_only.py r2plus1d_34 runs/swin_to_r21_kd/student.safetensors --data datasets/unlabelled --victim swin_b_k400

Prints top-1 and top-5 in percent with 95 % intervals (a bootstrap over videos), and writes a per-class table beside the
weights. A video is judged by the mean of the probabilities of its clips. With `--victim` also agreement@1, agreement@5 and the
mean KL(victim || student), each over clips; for videos without labels there is nothing else. Weights saved by the scripts here
know their classes and clip; for others say them.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from extraction import options
from extraction.compute import choose_compute
from extraction.data.clips import Clips, ClipShape, report_broken
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, normalise_class, require_folder
from extraction.errors import UserError, printable
from extraction.evaluation.results import describe_scores
from extraction.evaluation.scoring import (
    average,
    bootstrap,
    find_video_numbers,
    name_clips,
    parse_views,
    predict_videos,
    tally,
    write_class_table,
)
from extraction.evaluation.suite import write_tune_set, write_unseen_set
from extraction.experiment import run_script
from extraction.students import load_student
from extraction.victims.classes import read_classes
from extraction.victims.zoo import load_model


@dataclass(frozen=True, kw_only=True)
class Config(options.VictimFileOptions, options.ComputeOptions):
    student: Annotated[str, tyro.conf.Positional] = "r2plus1d_34"
    """Name of the student's network."""
    weights: Annotated[str, tyro.conf.Positional] = "runs/swin_to_r21_kd/student.safetensors"
    """Its saved weights."""
    data: str = "datasets/kinetics400_val"
    """Videos, labelled in class folders (below val/ if there is such a folder) or unlabelled in one folder."""
    data_unlabelled: bool = False
    """Take the class folders of --data for no labels: score by agreement with --victim alone."""
    data_list: str | None = None
    """Score only the videos of --data that this list names (a text file, or Kinetics' CSV)."""
    classes: str | None = None
    """Class order for weights that do not say theirs: k400, k600, or a text file with a name per line."""
    victim: str | None = None
    """Score agreement with this victim too, unmetered: any victim's name."""
    views: str = "1x1"
    """Test views, clips x crops per video; 10x3 is the published way."""
    num_frames: options.Count | None = None
    """Frames of a clip; by default what the weights were trained on, else 32."""
    stride: options.Count | None = None
    """Temporal stride; by default what the weights were trained on, else 1."""
    fps: options.FrameRate | None = None
    """Frames a second that clips take, instead of --stride; by default what the weights were trained on, if they were so."""
    size: options.Count | None = None
    """Height and width of a clip; by default what the weights were trained on, else 224."""
    csv: str | None = None
    """Where the per-class table goes; by default beside the weights, named after what was scored."""
    demo: bool = False
    """Score on the built-in demo set's held-out videos."""
    unseen: bool = False
    """With --demo: on 1 200 other videos, drawn for this alone: no experiment's constants were settled on them."""
    tune: bool = False
    """With --demo: on 600 other videos, drawn to choose constants on: no table shows them."""


DEMO = dict(
    demo=True,
    student="r2plus1d_tiny",
    weights="runs/swin_to_r21_kd_demo/student.safetensors",
    data="datasets/demo",
    num_workers=1,
)


def main(config: Config) -> dict:
    options.check_options(config)
    if config.unseen and config.tune:
        raise UserError("--unseen and --tune: choose one, the videos that tables show or those that constants are chosen on")
    if (config.unseen or config.tune) and not config.demo:
        raise UserError(f"--{'unseen' if config.unseen else 'tune'}: it goes with --demo")
    if config.unseen or config.tune:
        config = replace(config, data=str(write_unseen_set() if config.unseen else write_tune_set()))
    elif config.demo:
        write_demo_set("datasets/demo", {"val": 20})
    root = require_folder(config.data, "videos, in class folders or unlabelled,")
    views = parse_views(config.views)
    named = None if config.classes is None else read_classes(config.classes)
    compute = choose_compute(config.device, config.precision, config.compile)
    student, about = load_student(config.student, config.weights)
    if named is not None and about.get("classes"):
        raise UserError(f"--classes {config.classes}: the weights say their classes themselves; leave the option away")
    classes = about.get("classes") or named
    if classes is None:
        raise UserError(
            "the weights do not say their classes: pass --classes k400 or k600, or a text file with a name per line"
        )
    if len(classes) != student.num_classes:
        raise UserError(f"{config.weights}: its head has {student.num_classes} classes, the class list {len(classes)}")
    shape = ClipShape(
        num_frames=config.num_frames or about.get("num_frames") or 32,
        stride=config.stride or about.get("stride") or 1,
        size=config.size or about.get("size") or 224,
        fps=config.fps or (None if config.stride else about.get("fps")),
    )
    labels = None if config.data_unlabelled else classes
    videos = find_videos(root, labels, "val", config.data_list, unlabelled_flag="--data-unlabelled")
    if config.victim is None and videos[0].label < 0:
        raise UserError(f"{root}: no labels to score against; name the victim to agree with (--victim)")
    clips = Clips(videos, views=views, **shape)
    predict = partial(
        predict_videos, clips=clips, device=compute.device, batch_size=config.batch_size, num_workers=config.num_workers
    )
    of_victim = video_of = None
    if config.victim is not None:
        victim = load_model(config.victim, config.victim_weights, classes=config.victim_classes, about=config.victim_about)
        if [normalise_class(name) for name in victim.classes] != [normalise_class(name) for name in classes]:
            raise UserError(f"--victim {config.victim}: its {len(victim.classes)} classes are not those of {config.weights}")
        of_victim = predict(compute.prepare(victim), desc="scoring the victim", per_clip=True).probs
        video_of = find_video_numbers(clips)
    predictions = predict(compute.prepare(student), per_clip=config.victim is not None)
    found = tally(predictions.probs, predictions.labels, of_victim, video_of)
    results: dict[str, Any] = average(found) | {"intervals": bootstrap(found)}
    table = Path(config.csv or Path(config.weights).with_suffix(f".{name_clips(root, clips)}.classes.csv"))
    print(describe_scores(results))
    line = f"{clips.num_videos} videos of {config.data}, {config.views} views each"
    if "top1" in results:
        write_class_table(table, predictions.probs, predictions.labels, classes, video_of)
        line += f"; per class: {table}"
    print(printable(line))
    report_broken(predictions.broken)
    return results


if __name__ == "__main__":
    run_script(main, Config, DEMO)
