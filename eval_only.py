"""Score saved student weights on a labelled folder of videos, such as the validation set of Kinetics-400 or -600.

    python eval_only.py r2plus1d_34 runs/swin_to_r21_kd/student.safetensors --data datasets/kinetics400_val
    python eval_only.py r2plus1d_34 weights/somebodys.pth --data datasets/kinetics400_val --classes k400 --views 10x3

Prints top-1 and top-5 in percent and writes a per-class table beside the weights. A video is judged by the mean of the
probabilities of its clips. Weights saved by the scripts here know their classes and clip; for others say them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from extraction import options
from extraction.compute import choose_compute
from extraction.data.clips import Clips, ClipShape, report_broken
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, read_classes, require_folder
from extraction.errors import UserError, printable
from extraction.evaluation.results import percent
from extraction.evaluation.scoring import name_clips, parse_views, predict_videos, score, write_class_table
from extraction.evaluation.suite import write_unseen_set
from extraction.experiment import run_script
from extraction.students import load_student
from extraction.victims.classes import KNOWN_CLASSES


@dataclass(frozen=True, kw_only=True)
class Config(options.ComputeOptions):
    student: Annotated[str, tyro.conf.Positional] = "r2plus1d_34"
    """Name of the student's network."""
    weights: Annotated[str, tyro.conf.Positional] = "runs/swin_to_r21_kd/student.safetensors"
    """Its saved weights."""
    data: str = "datasets/kinetics400_val"
    """Labelled videos in class folders (below val/ if there is such a folder)."""
    data_list: str | None = None
    """Score only the videos of --data that this list names (a text file, or Kinetics' CSV)."""
    classes: str | None = None
    """Class order for weights that do not say theirs: k400, k600, or a text file with a name per line."""
    views: str = "1x1"
    """Test views, clips x crops per video; 10x3 is the published way."""
    num_frames: options.Count | None = None
    """Frames of a clip; by default what the weights were trained on, else 32."""
    stride: options.Count | None = None
    """Temporal stride; by default what the weights were trained on, else 1."""
    size: options.Count | None = None
    """Height and width of a clip; by default what the weights were trained on, else 224."""
    csv: str | None = None
    """Where the per-class table goes; by default beside the weights, named after what was scored."""
    demo: bool = False
    """Score on the built-in demo set's held-out videos."""
    unseen: bool = False
    """With --demo: on 1 200 other videos, drawn for this alone: no experiment's constants were settled on them."""


DEMO = dict(
    demo=True,
    student="r2plus1d_tiny",
    weights="runs/swin_to_r21_kd_demo/student.safetensors",
    data="datasets/demo",
    num_workers=1,
)


def main(config: Config) -> dict:
    options.check_options(config)
    if config.unseen and not config.demo:
        raise UserError("--unseen: it goes with --demo")
    if config.unseen:
        config = replace(config, data=str(write_unseen_set()))
    elif config.demo:
        write_demo_set("datasets/demo", {"val": 20})
    root = require_folder(config.data, "labelled videos, in class folders,")
    views = parse_views(config.views)
    named = None if config.classes is None else _read_classes(config.classes)
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
    )
    clips = Clips(find_videos(root, classes, "val", config.data_list), views=views, **shape)
    predictions = predict_videos(compute.prepare(student), clips, compute.device, config.batch_size, config.num_workers)
    results = score(predictions.probs, predictions.labels)
    table = Path(config.csv or Path(config.weights).with_suffix(f".{name_clips(root, clips)}.classes.csv"))
    write_class_table(table, predictions.probs, predictions.labels, classes)
    print(f"top-1 {percent(results['top1'])} %, top-5 {percent(results['top5'])} %")
    print(printable(f"{clips.num_videos} videos of {config.data}, {config.views} views each; per class: {table}"))
    report_broken(predictions.broken)
    return results


def _read_classes(name: str) -> list[str]:
    if name in KNOWN_CLASSES:
        return list(KNOWN_CLASSES[name]())
    if not Path(name).is_file():
        raise UserError(f"--classes {name}: neither one of {', '.join(KNOWN_CLASSES)} nor a file")
    return read_classes(name)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
