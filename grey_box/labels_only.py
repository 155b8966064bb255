"""The baseline of every grey-box attack: the same student, trained on the 5 % labelled share alone, without a victim.

    python grey_box/labels_only.py --demo

What an attack gains over this is what the victim's answers were worth.

The demo: 52.6 ± 3.1 top-1 after 0 queries (three seeds; chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction.compute import choose_compute
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, list_classes, require_folder
from extraction.distill import distill
from extraction.evaluation import Evaluator
from extraction.report import finish
from extraction.runs import Run, check_at_least, check_at_most, run_script, set_seed
from extraction.setting import repeat_results, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    student: str = "r2plus1d_34"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = "weights/r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth"
    """Weight file that the student starts from, all but its head; None: from nothing."""
    own: str = "datasets/kinetics400_5per"
    """Labelled videos of the task, in class folders."""
    own_list: str | None = None
    """Use only the videos of --own that this list names."""
    val: str = "datasets/kinetics400_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    num_frames: int = 32
    stride: int = 1
    """A clip takes one of so many frames of a video: 2 is every other one."""
    step: int = 32
    """A new clip every so many frames."""
    size: int = 224
    """Height and width of the clips."""
    epochs: int = 30
    """More than an attack's 10: there are fewer clips."""
    batch_size: int = 16
    head_lr: float = 3e-5
    """Learning rate of the student's head, its last layer (AdamW)."""
    body_lr: float = 3e-6
    """Learning rate of the layers below the head."""
    hflip: float = 0.5
    """Share of the views that are mirrored, 0 to 1."""
    brightness: float = 0.1
    """How far the brightness of a view is changed, 0 to 1: 0.1 is 10 % up or down at most."""
    rotation: float = 15.0
    """How far a view is turned, in degrees either way at most."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 and so on; auto is a GPU if there is one."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU."""
    compile: str = "auto"
    """on, off, or auto: on a GPU, in a long run."""
    num_workers: int = 8
    """Processes that decode, one for each core at most."""
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints, from which an interrupted run goes on."""
    out_dir: str = "runs/labels_only"
    demo: bool = False
    """Run on the embedded demo set: a minute on two CPU cores."""


DEMO = dict(
    demo=True, student="r2plus1d_tiny", student_weights=None, own="datasets/demo/train_5per", val="datasets/demo/val",
    num_frames=16, step=16, size=48, epochs=20, head_lr=1e-3, body_lr=1e-3, hflip=0.0, rotation=3.0, num_workers=1,
    checkpoint_seconds=10.0, out_dir="runs/labels_only_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "epochs", "batch_size", "num_frames", "stride", "step", "size")
    check_at_least(config, 0, "head_lr", "body_lr", "num_workers", "hflip", "brightness", "rotation")
    check_at_most(config, 1, "hflip", "brightness")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo")
    compute = choose_compute(config.device, config.precision, config.compile)
    require_folder(config.own, "5 % of Kinetics-400's training set, in class folders,")
    require_folder(config.val, "Kinetics-400's validation set (or 10 % of it), in class folders,")
    run = Run("labels_only", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    classes = list_classes(config.own, "train")
    shape = dict(num_frames=config.num_frames, stride=config.stride, size=config.size)
    clips = Clips(find_videos(config.own, classes, "train", config.own_list), step=config.step, **shape)
    val = Clips(find_videos(config.val, classes, "val", config.val_list), views=(1, 1), **shape)
    evaluator = Evaluator(val, classes, compute.device, config.batch_size, config.num_workers)
    set_seed(config.seed)
    student = compute.prepare(create_student(config.student, len(classes), config.student_weights))
    optimizer = torch.optim.AdamW(student.parameter_groups(config.head_lr, config.body_lr), fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    history, _ = distill(
        run, student, None, clips, optimizer, schedule, evaluator.score,
        epochs=config.epochs, batch_size=config.batch_size, label_weight=1.0,
        augmentation=Augmentation(config.hflip, config.brightness, config.rotation),
        seed=config.seed, num_workers=config.num_workers,
    )  # fmt: skip
    return finish(run, student, None, evaluator, history, broken=clips.broken)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
