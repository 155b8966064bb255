"""Video Swin into a ViT of single frames, first of three stages: distillation from unrelated videos alone.

    python grey_box/swin_to_vit_auxiliary.py --demo
    python grey_box/swin_to_vit_auxiliary.py --aux moments_in_time

The student sees frames one by one and its logits are averaged over a clip; KL to the victim's probabilities on Moments in
Time, whose labels are not used. 8.3 % accuracy on Kinetics-400 was reported. `swin_to_vit_finetune.py` and
`swin_to_vit_ticket.py` go on from its weights. The student starts from ImageNet weights in timm's key layout. In the demo,
where no single frame tells anything, the student's three colours are three frames in a row.

The demo: 49.0 ± 1.5 top-1, 48.2 ± 0.6 agreement@1 after 9 600 queries (three seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction import options
from extraction.attacks.distill import Training
from extraction.attacks.losses import choose_matching
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.folders import find_aux_videos
from extraction.data.queries import QuerySet
from extraction.experiment import experiment, open_attack, run_script
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.VideoOptions, options.QueryOptions, options.VictimOptions):
    victim: str = "swin_b_k400"
    student: str = "vit_tiny"
    student_weights: str | None = "weights/vit_tiny_patch16_224.safetensors"
    aux: tuple[str, ...] = ("moments_in_time",)
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 10
    head_lr: float = 3e-5
    body_lr: float = 3e-6


DEMO = options.VIDEO_DEMO | dict(
    victim="demo_swin",
    student="vit_demo",
    aux=("ucf101", "hmdb51"),
    epochs=8,
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
    clips = Clips(find_aux_videos(config.aux, config.demo), **config.cut, **config.shape)
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
