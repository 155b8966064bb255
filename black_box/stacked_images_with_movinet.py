"""MoViNet-A2 into R(2+1)D without a single video: unrelated images, each moved along a random path, are the clips.

    python black_box/stacked_images_with_movinet.py --demo
    python black_box/stacked_images_with_movinet.py --images datasets/coco/train2017 --val datasets/kinetics600_val

Every clip is one query: with N clips (`--num-clips`, or one for each image) and E epochs that is

    num_queries = N * min(E, views_per_clip)        (N * E without --views-per-clip)

Further epochs show answered clips again, for nothing. Against MoViNet this was never published; against Video Swin see
`stacked_images_with_swin.py`, from which this differs by its constants.

The demo: 33.3 top-1, 33.1 ± 0.3 agreement@1 after 9 600 queries (two seeds; victim 92.5, chance 8.3).
"""

from dataclasses import dataclass

import torch

from extraction.compute import choose_compute
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.images import Images, Layer, Motion, create_clips, write_demo_images
from extraction.distill import distill
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    victim: str = "movinet_a2_k600"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs, top5 or label."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    student: str = "r2plus1d_18"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from nothing."""
    images: str = "datasets/coco/train2017"
    """Any tree of unrelated images; no labels are used."""
    num_clips: int | None = None
    """Clips to be made of them; by default one for each image."""
    layers: tuple[Layer, ...] = (Layer(),)
    """How each picture of a clip moves, from the bottom to the top."""
    val: str = "datasets/kinetics600_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Pay nothing unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 32
    size: int = 224
    """Height and width of the clips that are sent."""
    epochs: int = 10
    views_per_clip: int | None = None
    """Show the same so many paths of a picture again and again instead of a new one each epoch: bounds the queries."""
    batch_size: int = 16
    lr: float = 1e-3
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
    out_dir: str = "runs/stacked_images_with_movinet"
    demo: bool = False
    """Run on the embedded demo set, images and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_movinet", student="r2plus1d_tiny", images="datasets/demo/images", val="datasets/demo/val",
    layers=(Layer(0.03, 1.0, 0.0, 1.02), Layer(0.35, 160.0, 10.0, 2.0, periods=4.0, moving=0.35, radius=0.17)),
    num_clips=2400, num_frames=16, size=48, epochs=6, views_per_clip=4, lr=2e-3, num_workers=1, checkpoint_seconds=10.0,
    out_dir="runs/stacked_images_with_movinet_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "epochs", "batch_size", "num_frames", "size", "num_clips", "views_per_clip")
    check_at_least(config, 0, "query_budget", "lr", "num_workers")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})  # the evaluator's alone
        write_demo_images("datasets/demo/images")
    compute = choose_compute(config.device, config.precision, config.compile)
    images = Images(config.images, config.num_clips, len(config.layers), config.size, config.seed)
    run = Run("stacked_images_with_movinet", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    victim, evaluator = open_setting(
        run, compute, victim=config.victim, victim_weights=config.victim_weights, answers=config.answers,
        query_budget=config.query_budget, val=config.val, val_list=config.val_list, min_victim_top1=config.min_victim_top1,
        num_frames=config.num_frames, stride=1, size=config.size, batch_size=config.batch_size, num_workers=config.num_workers,
        decimals=config.decimals,
    )  # fmt: skip
    set_seed(config.seed)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    optimizer = torch.optim.Adam(student.parameters(), config.lr, fused=True)
    steps = config.epochs * -(-len(images) // config.batch_size)
    history, stopped = distill(
        run, student, victim, images, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), evaluator.score,
        epochs=config.epochs, batch_size=config.batch_size, augmentation=Motion(config.num_frames, config.layers),
        make_views=create_clips, views_per_clip=config.views_per_clip, seed=config.seed, num_workers=config.num_workers,
    )  # fmt: skip
    return finish(run, student, victim, evaluator, history, stopped, images.broken)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
