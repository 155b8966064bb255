"""Video Swin into C3D by plain distillation, from 5 % of the victim's videos, augmented.

    python grey_box/swin_to_c3d.py --demo
    python grey_box/swin_to_c3d.py

Clips of 32 frames go to the victim; C3D, made for 16, judges a clip by the mean of its logits over two halves. (In 2022 the
halves became two clips, which doubled the batch.) The report had 27.5 top-5 / 8.4 top-1 on Kinetics-400. C3D starts from
Sports-1M weights: DavideA/c3d-pytorch's or mmaction2's file.

The demo: 68.1 ± 1.0 top-1, 67.8 ± 1.0 agreement@1 after 10 560 queries (three seeds; victim 97.5, chance 8.3).
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
    student: str = "c3d"
    student_weights: str | None = "weights/c3d_sports1m_pretrain_20201016-dcc47ddc.pth"
    in_domain: str = "datasets/kinetics400_5per"
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 10
    head_lr: float = 3e-5
    body_lr: float = 3e-6


DEMO = options.IN_DOMAIN_DEMO | dict(
    victim="demo_swin",
    student="c3d_tiny",
    epochs=44,
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
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
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
