"""MoViNet-A2 into a ResNet-50 of single frames, last of three stages: the winning ticket on the labelled 5 %.

    python grey_box/movinet_to_r50_ticket.py --demo          (after movinet_to_r50_finetune.py --demo)
    python grey_box/movinet_to_r50_ticket.py --own datasets/kinetics600_5per

Iterative magnitude pruning (Frankle & Carbin 2019): from the weights that `movinet_to_r50_finetune.py` saved, train some
epochs, prune the least magnitudes of the whole network, set the survivors back to where they began, and again until
`--target-sparsity` is pruned; what is left is trained once more. 33.5 % accuracy on Kinetics-600 was reported, above the
dense 22.3. True labels only: not one query more. Leaves `mask.safetensors` and `dense_and_ticket.png` too.

The demo: 79.6 ± 4.5 top-1, 76.0 ± 3.9 agreement@1 after the first stage's 9 600 queries (three seeds; victim 92.5, chance 8.3).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from extraction.compute import choose_compute
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, require_folder
from extraction.distill import distill
from extraction.pruning import Masks, count_sparsity, create_masks, hold, prune_globally, schedule_sparsities
from extraction.report import draw_curves, finish
from extraction.runs import Run, check_at_least, check_at_most, run_script, set_seed
from extraction.setting import load_stage, open_setting, repeat_results, require_inputs
from extraction.weights import save_weights


@dataclass(frozen=True)
class Config:
    victim: str = "movinet_a2_k600"
    """Whom the student is to agree with; it is not asked any more."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    student: str = "resnet50"
    """The student's network: an unknown name lists them."""
    student_weights: str = "runs/movinet_to_r50_finetune/student.safetensors"
    """What the stage before saved."""
    own: str = "datasets/kinetics600_5per"
    """Labelled videos of the victim's own task, in class folders."""
    own_list: str | None = None
    """Use only the videos of --own that this list names."""
    val: str = "datasets/kinetics600_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Stop unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 32
    stride: int = 1
    """A clip takes one of so many frames of a video: 2 is every other one."""
    step: int = 32
    """A new clip every so many frames."""
    size: int = 224
    """Height and width of the clips."""
    target_sparsity: float = 0.5
    """The share of weights (all but head, biases and norms) that is pruned in the end."""
    round_fraction: float = 0.2
    """The share of what is left that each round prunes."""
    round_epochs: int = 3
    """How long each round trains before it prunes."""
    epochs: int = 10
    """How long the ticket trains in the end."""
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
    out_dir: str = "runs/movinet_to_r50_ticket"
    demo: bool = False
    """Run on the embedded demo set: a few minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_movinet", student="resnet_demo",
    student_weights="runs/movinet_to_r50_finetune_demo/student.safetensors",
    own="datasets/demo/train_5per", val="datasets/demo/val", num_frames=16, step=16, size=48,
    round_epochs=5, epochs=20, head_lr=5e-4, body_lr=5e-4, hflip=0.0, rotation=3.0,
    num_workers=1, checkpoint_seconds=10.0, out_dir="runs/movinet_to_r50_ticket_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "epochs", "batch_size", "num_frames", "stride", "step", "size", "round_epochs")
    check_at_least(config, 0, "head_lr", "body_lr", "num_workers", "hflip", "brightness", "rotation")
    check_at_most(config, 1, "hflip", "brightness")
    sparsities = schedule_sparsities(config.round_fraction, config.target_sparsity)
    require_inputs(config, stage=True)
    if config.demo:
        write_demo_set("datasets/demo")
    compute = choose_compute(config.device, config.precision, config.compile)
    require_folder(config.own, "5 % of Kinetics-600's training set, in class folders,")
    run = Run("movinet_to_r50_ticket", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    shape = dict(num_frames=config.num_frames, stride=config.stride, size=config.size)
    victim, evaluator = open_setting(
        run, compute, victim=config.victim, victim_weights=config.victim_weights, answers="label", query_budget=0,
        val=config.val, val_list=config.val_list, min_victim_top1=config.min_victim_top1,
        batch_size=config.batch_size, num_workers=config.num_workers, **shape,
    )  # fmt: skip
    student, paid = load_stage(config.student, config.student_weights, victim.classes, compute)
    clips = Clips(find_videos(config.own, victim.classes, "train", config.own_list), step=config.step, **shape)
    early = {key: value.clone() for key, value in student.net.state_dict().items()}

    def train(run: Run, masks: Masks, epochs: int, evaluate=lambda student: {}) -> tuple[list[dict], dict[str, Tensor]]:
        """Train the survivors of `masks` from their early values. Returns the history and the weights."""
        set_seed(config.seed)
        student.net.load_state_dict(early)
        optimizer = torch.optim.AdamW(student.parameter_groups(config.head_lr, config.body_lr), fused=True)
        hold(student.net, masks, optimizer)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
        history, _ = distill(
            run, student, None, clips, optimizer, schedule, evaluate, epochs=epochs, batch_size=config.batch_size,
            label_weight=1.0, augmentation=Augmentation(config.hflip, config.brightness, config.rotation),
            seed=config.seed, num_workers=config.num_workers,
        )  # fmt: skip
        return history, student.net.state_dict()

    run.begin()
    masks = create_masks(student.net, student.spec.head)
    for number, sparsity in enumerate(sparsities, 1):
        print(f"round {number}: train, then prune to {100 * sparsity:.1f} %")
        part = Run(f"round {number}", run.folder / f"round_{number}", config, config.checkpoint_seconds)
        masks = prune_globally(train(part, masks, config.round_epochs)[1], masks, sparsity)
    history, _ = train(run, masks, config.epochs, evaluator.score)
    about = dict(student=config.student, sparsity=count_sparsity(masks))
    save_weights(run.folder / "mask.safetensors", masks, about)
    dense = Path(config.student_weights).with_name("results.json")
    curves = {"dense": json.loads(dense.read_text())["history"]} if dense.is_file() else {}
    curves[f"ticket, {100 * about['sparsity']:.0f} % pruned"] = history
    draw_curves(run.folder / "dense_and_ticket.png", curves, 1 / victim.num_classes, "movinet_to_r50: dense and winning ticket")
    return finish(
        run, student, victim, evaluator, history, broken=clips.broken, num_queries_before=paid, sparsity=about["sparsity"]
    )


if __name__ == "__main__":
    run_script(main, Config, DEMO)
