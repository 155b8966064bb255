"""Video Swin into R(2+1)D with queries crafted on the student beside real ones, after PRADA (Juuti et al. 2019).

    python grey_box/swin_to_r21_prada.py --demo
    python grey_box/swin_to_r21_prada.py --methods t_rnd

As `swin_to_r21.py` on the augmented 5 %, and a share of each batch is crafted further: random perturbation of the frames, a
step along the sign of the student's Jacobian (JBDA), or steps toward a random class (T-RND). Each crafted clip is one more
query: a run needs (1 + --crafted-share) times a plain run's queries, more with each epoch, for crafted clips never come again.
The 2022 report had 34.2 top-5 / 12.67 top-1, its loop having stopped at its first step.

The demo: 75.8 ± 2.2 top-1, 75.3 ± 2.0 agreement@1 after 10 560 queries (three seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from extraction import options
from extraction.attacks.crafting import create_crafter
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
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 10
    head_lr: float = 3e-5
    body_lr: float = 3e-6
    methods: tuple[Literal["random", "jbda", "t_rnd"], ...] = ("random", "jbda", "t_rnd")
    """Ways of crafting, used in turn within a batch."""
    crafted_share: options.Fraction = 0.5
    """Crafted clips for each real one."""
    craft_step: options.Fraction = 0.03
    """How far a crafted clip may move from its seed, in any value of 0 to 1."""
    craft_iterations: options.Count = 4
    """Steps of T-RND, which together go that far."""


DEMO = options.IN_DOMAIN_DEMO | dict(
    victim="demo_swin",
    student="r2plus1d_tiny",
    epochs=22,
    crafted_share=1.0,
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
    sheet = run.folder / "crafted.png"
    craft = create_crafter(
        config.methods, config.crafted_share, config.craft_step, config.craft_iterations, sheet, victim.classes
    )
    training = Training(
        run, student, optimizer, schedule, evaluator, victim, queries, config.epochs, config.batch_size, config.num_workers,
        prefetch_answers=False, **config.recipe,
    )  # fmt: skip
    for batch in training:
        if not batch.exhausted:
            batch = training.query_more(batch, *craft(student, batch))
        batch = training.vary(batch)
        loss = match(training.forward(batch.clips), batch.targets)
        training.step(loss)
    return training.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
