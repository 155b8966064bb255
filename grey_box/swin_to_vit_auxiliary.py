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
from typing import Annotated

import torch
import tyro

from extraction.compute import choose_compute
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos
from extraction.distill import distill
from extraction.report import finish
from extraction.runs import Run, check_at_least, check_at_most, run_script, set_seed
from extraction.setting import find_unrelated, open_setting, repeat_results, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    victim: str = "swin_b_k400"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs, top5 or label."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    student: str = "vit_tiny"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = "weights/vit_tiny_patch16_224.safetensors"
    """Weight file that the student starts from, all but its head; None: from nothing."""
    unrelated: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--aux"])] = ("moments_in_time",)
    """Unrelated video: moments_in_time, ucf101, hmdb51, or any folders."""
    val: str = "datasets/kinetics400_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Pay nothing unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 32
    stride: int = 1
    """A clip takes one of so many frames of a video: 2 is every other one."""
    step: int = 32
    """A new clip every so many frames."""
    size: int = 224
    """Height and width of the clips that are sent."""
    epochs: int = 10
    views_per_clip: int | None = None
    """Show the same so many views of a clip again and again instead of a new one each epoch: bounds the queries."""
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
    out_dir: str = "runs/swin_to_vit_auxiliary"
    demo: bool = False
    """Run on the embedded demo set and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_swin", student="vit_demo", student_weights=None,
    unrelated=("ucf101", "hmdb51"), val="datasets/demo/val", num_frames=16, step=16, size=48,
    epochs=8, views_per_clip=4, head_lr=1.5e-3, body_lr=1.5e-3, hflip=0.0, rotation=3.0,
    num_workers=1, checkpoint_seconds=10.0, out_dir="runs/swin_to_vit_auxiliary_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "epochs", "batch_size", "num_frames", "stride", "step", "size", "views_per_clip")
    check_at_least(config, 0, "query_budget", "head_lr", "body_lr", "num_workers", "hflip", "brightness", "rotation")
    check_at_most(config, 1, "hflip", "brightness")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo")
    compute = choose_compute(config.device, config.precision, config.compile)
    unrelated = find_unrelated(config.unrelated, config.demo)
    run = Run("swin_to_vit_auxiliary", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    shape = dict(num_frames=config.num_frames, stride=config.stride, size=config.size)
    victim, evaluator = open_setting(
        run, compute, victim=config.victim, victim_weights=config.victim_weights, answers=config.answers,
        query_budget=config.query_budget, val=config.val, val_list=config.val_list, min_victim_top1=config.min_victim_top1,
        batch_size=config.batch_size, num_workers=config.num_workers, decimals=config.decimals, **shape,
    )  # fmt: skip
    first, *others = (Clips(find_videos(folder, None), step=config.step, **shape) for folder in unrelated)
    clips = first.joined(*others)
    set_seed(config.seed)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    optimizer = torch.optim.AdamW(student.parameter_groups(config.head_lr, config.body_lr), fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    history, stopped = distill(
        run, student, victim, clips, optimizer, schedule, evaluator.score, epochs=config.epochs, batch_size=config.batch_size,
        augmentation=Augmentation(config.hflip, config.brightness, config.rotation),
        views_per_clip=config.views_per_clip, seed=config.seed, num_workers=config.num_workers,
    )  # fmt: skip
    return finish(run, student, victim, evaluator, history, stopped, clips.broken)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
