"""Video Swin into R(2+1)D by plain distillation, with learning rates that restart along cosines.

    python grey_box/swin_to_r21_using_cosine.py --demo
    python grey_box/swin_to_r21_using_cosine.py

As `swin_to_r21.py` on the 5 %, UCF101 and HMDB51, but with warm restarts (Loshchilov & Hutter 2017, arXiv 1608.03983)
every 200 batches and learning rates ten times as high. No figure was published for it.

The demo: 83.9 ± 5.4 top-1, 82.9 ± 6.1 agreement@1 after 10 560 queries (three seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction import options
from extraction.attacks.distill import Training
from extraction.attacks.losses import choose_matching
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.folders import find_aux_videos, find_videos
from extraction.data.queries import QuerySet
from extraction.experiment import experiment, open_attack, run_script
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.InDomainOptions, options.VideoOptions, options.QueryOptions, options.VictimOptions):
    victim: str = "swin_b_k400"
    student: str = "r2plus1d_34"
    student_weights: str | None = "weights/r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth"
    in_domain: str = "datasets/kinetics400_5per"
    aux: tuple[str, ...] = ("ucf101", "hmdb51")
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 10
    head_lr: float = 3e-4
    body_lr: float = 3e-5
    restart_batches: options.Count = 200
    """The learning rates fall along a cosine for this many batches, then start again."""


DEMO = options.IN_DOMAIN_DEMO | dict(
    victim="demo_swin",
    student="r2plus1d_tiny",
    epochs=9,
    views_per_clip=4,
    head_lr=1.5e-3,
    body_lr=1.5e-3,
    temperature=4.0,
    student_crop=0.2,
    ema=0.99,
)


@experiment
def main(config: Config, run: Run) -> dict:
    match = choose_matching(config.matching, config.temperature, config.answers, config.decimals)
    compute, victim, evaluator = open_attack(config, run)
    videos = find_videos(config.in_domain, victim.classes, "train", config.in_domain_list)
    clips = Clips(videos + find_aux_videos(config.aux, config.demo), **config.cut, **config.shape)
    augmentation = Augmentation(config.hflip, config.brightness, config.rotation)
    queries = QuerySet(clips, augmentation, config.views_per_clip, config.seed)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    optimizer = torch.optim.AdamW(student.parameter_groups(config.head_lr, config.body_lr), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=config.restart_batches)
    training = Training(
        run, student, optimizer, schedule, evaluator, victim, queries, config.epochs, config.batch_size, config.num_workers,
        **config.recipe,
    )  # fmt: skip
    for batch in map(training.vary, training):
        loss = match(training.forward(batch.clips), batch.targets)
        training.step(loss)
    return training.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
