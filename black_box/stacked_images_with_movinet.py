"""MoViNet-A2 into R(2+1)D without a single video: unrelated images, each moved along a random path, are the clips.

    python black_box/stacked_images_with_movinet.py --demo
    python black_box/stacked_images_with_movinet.py --images datasets/coco/train2017 --val datasets/kinetics600_val

Every clip is one query: with N clips (`--num-clips`, or one for each image) and E epochs that is

    num_queries = N * min(E, views_per_clip)        (N * E without --views-per-clip)

Further epochs show answered clips again, without a query. Against MoViNet this was never published; against Video Swin see
`stacked_images_with_swin.py`, from which this differs by its constants.

The demo: 33.3 top-1, 33.1 ± 0.3 agreement@1 after 9 600 queries (two seeds; victim 92.5, chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction import options
from extraction.attacks.distill import Training
from extraction.attacks.losses import kl_divergence
from extraction.data.images import DEMO_LAYERS, Images, Motion, create_clips
from extraction.data.queries import QuerySet
from extraction.experiment import experiment, open_attack, run_script
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.ImageOptions, options.VictimOptions):
    victim: str = "movinet_a2_k600"
    student: str = "r2plus1d_18"
    val: str = "datasets/kinetics600_val"
    num_frames: int = 32
    size: int = 224
    images: str = "datasets/coco/train2017"
    """Any tree of unrelated images; no labels are used."""
    num_clips: options.Count | None = None
    """Clips to make of them; by default one for each image."""
    epochs: int = 10
    views_per_clip: options.Count | None = None
    """Cycle through this many paths of a clip instead of a new one each epoch, which bounds the queries."""


DEMO = options.DEMO | dict(
    victim="demo_movinet",
    student="r2plus1d_tiny",
    images="datasets/demo/images",
    layers=DEMO_LAYERS,
    num_clips=2400,
    epochs=6,
    views_per_clip=4,
    lr=2e-3,
    student_crop=0.2,
    ema=0.99,
)


@experiment
def main(config: Config, run: Run) -> dict:
    compute, victim, evaluator = open_attack(config, run)
    images = Images(config.images, config.num_clips, len(config.layers), config.size, config.seed, config.cache)
    motion = Motion(config.num_frames, config.layers)
    queries = QuerySet(images, motion, config.views_per_clip, config.seed, create_clips)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    optimizer = torch.optim.Adam(student.parameter_groups(*config.rates), fused=True)
    steps = config.epochs * -(-len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = Training(
        run, student, optimizer, schedule, evaluator, victim, queries, config.epochs, config.batch_size, config.num_workers,
        **config.recipe,
    )  # fmt: skip
    for batch in map(training.vary, training):
        loss = kl_divergence(training.forward(batch.clips), batch.targets)
        training.step(loss)
    return training.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
