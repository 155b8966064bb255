"""The baseline of every grey-box attack: the same student, trained on the 5 % labelled share alone, without a victim.

    python grey_box/labels_only.py --demo

What an attack gains over this is what the victim's answers were worth.

The demo, on 1 200 unseen videos, its averaged weights: 90.6 ± 1.2 top-1 (three seeds; chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction import options
from extraction.attacks.distill import Training
from extraction.attacks.losses import cross_entropy
from extraction.compute import choose_compute
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.folders import find_videos, list_classes
from extraction.data.queries import QuerySet
from extraction.evaluation.scoring import Evaluator
from extraction.experiment import experiment, find_val_videos, run_script
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.InDomainOptions, options.VideoOptions):
    student: str = "r2plus1d_34"
    student_weights: str | None = "weights/r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth"
    in_domain: str = "datasets/kinetics400_5per"
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 30
    head_lr: float = 3e-5
    body_lr: float = 3e-6


DEMO = options.IN_DOMAIN_DEMO | dict(student="r2plus1d_tiny", epochs=30, head_lr=3e-3, body_lr=3e-3, student_crop=0.2, ema=0.99)


@experiment
def main(config: Config, run: Run) -> dict:
    compute = choose_compute(config.device, config.precision, config.compile)
    classes = list_classes(config.in_domain, "train")
    videos = find_videos(config.in_domain, classes, "train", config.in_domain_list)
    clips = Clips(videos, **config.cut, **config.shape)
    queries = QuerySet(clips, Augmentation(config.hflip, config.brightness, config.rotation), seed=config.seed)
    val = Clips(find_val_videos(config, classes), views=(config.val_clips, 1), **config.shape)
    evaluator = Evaluator(
        val, classes, compute.device, config.batch_size, config.num_workers, allow_overlap=config.allow_overlap
    )
    student = compute.prepare(create_student(config.student, len(classes), config.student_weights))
    optimizer = torch.optim.AdamW(student.parameter_groups(config.head_lr, config.body_lr), fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    training = Training(
        run, student, optimizer, schedule, evaluator, None, queries, config.epochs, config.batch_size, config.num_workers,
        **config.recipe,
    )  # fmt: skip
    for batch in map(training.vary, training):
        loss = cross_entropy(training.forward(batch.clips), batch.labels)
        training.step(loss)
    return training.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
