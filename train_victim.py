"""Train a victim on any folder of class folders of videos, from nothing or from published weights below a fresh head.

    python train_victim.py --data datasets/my_videos --out-dir runs/my_victim
    python train_victim.py --data datasets/my_videos --architecture efficientnet_lite0+temporal --weights imagenet
    python grey_box/swin_to_r21_kd.py --victim trained --victim-weights runs/my_victim/victim.safetensors ...

The demo's victims, `extraction/victims/demo_*.safetensors`, were made by `python train_victim.py --demo` and
`python train_victim.py --demo --architecture movinet_demo --size 32 --epochs 1 --batch-size 32 --out-dir runs/movinet_demo`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from extraction import options
from extraction.attacks.distill import Training
from extraction.attacks.losses import cross_entropy, kl_divergence
from extraction.compute import choose_device
from extraction.data.augment import Augmentation
from extraction.data.cache import ClipCache
from extraction.data.clips import Clips, ClipShape, report_broken
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, list_classes, require_folder
from extraction.data.queries import QuerySet
from extraction.errors import UserError, printable
from extraction.evaluation.plots import draw_curve
from extraction.evaluation.results import percent
from extraction.evaluation.scoring import Evaluator
from extraction.experiment import run_script
from extraction.runs import Run
from extraction.victims.trained import (
    INT8,
    create_network,
    find_head,
    learned_weights,
    load_body,
    load_trained,
    parameter_groups,
)
from extraction.weights import save_weights


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = "datasets/my_videos"
    """Labelled videos, in class folders (below train/ and val/ if there are such folders)."""
    data_list: str | None = None
    """Train only on the videos of --data that this list names."""
    val: str | None = None
    """Held-out labelled videos; by default those of --data."""
    val_list: str | None = None
    """Use only the held-out videos that this list names."""
    architecture: str = "swin_demo"
    """The victim's network: swin_demo, swin_t, ..., movinet_demo, movinet_a0, ..., movinet_a0_stream_int8, any student's."""
    weights: str | None = None
    """Weight file to start from, all but the head: published, or an earlier victim's; imagenet for efficientnet_lite0."""
    num_frames: options.Count = 16
    """Frames of a clip."""
    stride: options.Count = 1
    """Temporal stride: a clip takes every n-th frame of a video."""
    fps: options.FrameRate | None = None
    """Frames a second that clips take, instead of --stride: every n-th frame, n by each video's own frame rate."""
    clip_interval: options.Count = 8
    """Frames from the start of a clip to the start of the next."""
    size: options.Count = 48
    """Height and width of a clip, in pixels."""
    teacher: str | None = None
    """A trained victim of the same classes, whose probabilities are learnt beside the labels (distillation)."""
    epochs: options.Count = 60
    """Passes over all clips."""
    batch_size: options.Count = 64
    """Clips in a batch."""
    lr: options.Rate = 2e-3
    """Peak of a one-cycle schedule (AdamW)."""
    body_lr: options.Rate | None = None
    """The peak below the head; by default that of --lr."""
    weight_decay: options.Rate = 0.05
    """Weight decay."""
    hflip: options.Fraction = 0.0
    """Probability of a horizontal flip."""
    brightness: options.Fraction = 0.2
    """Brightness jitter: a factor drawn from 1 - b to 1 + b."""
    rotation: options.Rate = 8.0
    """Random rotation, in degrees, either way at most."""
    crop: Annotated[float, options.Range(0, 0.9)] = 0.0
    """Show random crops, a side up to this fraction shorter; 0: whole frames."""
    mixup: Annotated[float, options.Range(0.01, 100)] | None = None
    """Mix pairs of clips, their labels too, by shares of this Beta parameter; the teacher is shown the mixed clips."""
    allow_overlap: bool = False
    """Go on when videos that score are trained on too."""
    seed: int = 0
    """Random seed: data order, augmentation and initial weights follow from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU if there is one."""
    num_workers: options.Natural = 2
    """Data loader workers, one per core at most."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints."""
    out_dir: str = "runs/train_victim"
    """The run's folder."""
    cache_gb: options.Rate = 20.0
    """Keep at most this many GB of decoded clips beside the run's folder, each set wholly or not at all; 0: none."""
    demo: bool = False
    """Remake the demo's victim: hours on two CPU cores."""


DEMO = dict(demo=True, data="datasets/demo", val="datasets/demo", clip_interval=16, epochs=12, out_dir="runs/train_victim_demo")


def main(config: Config) -> dict:
    options.check_options(config)
    if config.demo:
        write_demo_set("datasets/demo", {"train": 2500, "val": 20})
    for flag, file in (("weights", config.weights), ("teacher", config.teacher)):
        if file not in (None, "imagenet") and not Path(file).exists():
            raise UserError(f"--{flag} {file} not found")
    find_head(config.architecture)  # refuses an unknown one
    if config.architecture in INT8 and config.weights is None:
        raise UserError(f"--architecture {config.architecture}: only its head learns; pass the published file by --weights")
    device = choose_device(config.device)
    root = require_folder(config.data, "a folder of class folders of videos")
    val_root = require_folder(config.val or root, "held-out labelled videos, in class folders,")
    run = Run("train_victim", config.out_dir, config, config.checkpoint_seconds)
    with run.locked():
        if run.finished:
            print(f"{printable(run.folder)} is finished: top-1 {percent(run.finished['top1'])} %")
            return run.finished
        return train(config, run, root, val_root, device)


def train(config: Config, run: Run, root: Path, val_root: Path, device: torch.device) -> dict:
    torch.manual_seed(config.seed)
    classes = list_classes(root, "train")
    model = create_network(config.architecture, len(classes), config.num_frames, config.size)
    if config.weights is not None:
        load_body(model, config.architecture, config.weights)
    model.to(device)
    teacher = None if config.teacher is None else load_teacher(config.teacher, classes).to(device)
    shape = ClipShape(num_frames=config.num_frames, stride=config.stride, size=config.size)
    if config.fps is not None:
        shape["fps"] = config.fps
    cache = ClipCache(Path(config.out_dir).parent / "clip_cache", config.cache_gb)
    videos = find_videos(root, classes, "train", config.data_list)
    clips = Clips(videos, clip_interval=config.clip_interval, cache=cache, **shape)
    queries = QuerySet(clips, Augmentation(config.hflip, config.brightness, config.rotation), seed=config.seed)
    val = Clips(find_videos(val_root, classes, "val", config.val_list), views=(1, 1), cache=cache, **shape)
    evaluator = Evaluator(val, classes, device, config.batch_size, config.num_workers, allow_overlap=config.allow_overlap)
    peaks = config.lr, config.lr if config.body_lr is None else config.body_lr
    optimizer = torch.optim.AdamW(parameter_groups(model, config.architecture, *peaks), weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(clips) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(peaks), total_steps=steps + 1, pct_start=0.1)
    training = Training(
        run, model, optimizer, schedule, evaluator, None, queries, config.epochs, config.batch_size, config.num_workers,
        max_grad_norm=1.0, crop=config.crop, mixup=config.mixup,
    )  # fmt: skip
    for batch in map(training.vary, training):
        logits = training.forward(batch.clips)
        loss = cross_entropy(logits, batch.labels)
        if teacher is not None:
            loss = loss + kl_divergence(logits, teacher(batch.clips).softmax(1))
        training.step(loss)
    about = dict(architecture=config.architecture, classes=classes, **shape)
    save_weights(run.folder / "victim.safetensors", learned_weights(model), about)
    history = training.history
    draw_curve(run.folder / "curve.png", history, None, 1 / len(classes), "train_victim")
    last = {name: history[-1][name] for name in ("top1", "top5", "loss")}
    results = run.finish(dict(**last, num_classes=len(classes), num_clips=len(clips), history=history))
    print(f"top-1 {percent(results['top1'])} % on {len(val)} held-out videos: {printable(run.folder / 'victim.safetensors')}")
    report_broken([*training.broken, *evaluator.broken])
    return results


def load_teacher(weights: str, classes: list[str]) -> torch.nn.Module:
    """A trained victim to learn from, in evaluation mode. Raises UserError when its classes are others."""
    teacher, known = load_trained(Path(weights))
    if known != classes:
        raise UserError(f"--teacher {weights}: it knows {len(known)} other classes than the {len(classes)} of --data")
    return teacher.eval().requires_grad_(False)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
