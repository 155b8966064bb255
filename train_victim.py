"""Train a victim from nothing on any folder of class folders of videos, so that there is something real to extract.

    python train_victim.py --data datasets/my_videos --out-dir runs/my_victim
    python grey_box/swin_to_r21_kd.py --victim trained --victim-weights runs/my_victim/victim.safetensors ...

The demo's victims, `extraction/victims/demo_*.safetensors`, were made by `python train_victim.py --demo` and
`python train_victim.py --demo --architecture movinet_demo --size 32 --epochs 1 --batch-size 32 --out-dir runs/movinet_demo`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos, list_classes, require_folder
from extraction.distill import distill
from extraction.evaluation import Evaluator
from extraction.report import draw_curve, percent
from extraction.runs import Run, check_at_least, check_at_most, choose_device, run_script, set_seed
from extraction.setting import require_lists
from extraction.victims import create_network
from extraction.weights import save_weights


@dataclass(frozen=True)
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
    """One of swin_demo, swin_t, swin_s, swin_b, movinet_demo."""
    num_frames: int = 16
    stride: int = 1
    """A clip takes one of so many frames of a video: 2 is every other one."""
    step: int = 8
    """A new clip every so many frames."""
    size: int = 48
    """Height and width of the clips."""
    epochs: int = 60
    batch_size: int = 64
    lr: float = 2e-3
    """Peak of a one-cycle schedule (AdamW)."""
    weight_decay: float = 0.05
    hflip: float = 0.0
    """Share of the views that are mirrored, 0 to 1."""
    brightness: float = 0.2
    """How far the brightness of a view is changed, 0 to 1: 0.1 is 10 % up or down at most."""
    rotation: float = 8.0
    """How far a view is turned, in degrees either way at most."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 and so on; auto is a GPU if there is one."""
    num_workers: int = 2
    """Processes that decode, one for each core at most."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints, from which an interrupted run goes on."""
    out_dir: str = "runs/train_victim"
    demo: bool = False
    """Remake the demo's victim: hours on two CPU cores."""


DEMO = dict(demo=True, data="datasets/demo", val="datasets/demo", step=16, epochs=12, out_dir="runs/train_victim_demo")


def main(config: Config) -> dict:
    check_at_least(config, 1, "epochs", "batch_size", "num_frames", "stride", "step", "size")
    check_at_least(config, 0, "lr", "weight_decay", "hflip", "brightness", "rotation", "num_workers")
    check_at_most(config, 1, "hflip", "brightness")
    require_lists(config)
    if config.demo:
        write_demo_set("datasets/demo", {"train": 2500, "val": 20})
    device = choose_device(config.device)
    root = require_folder(config.data, "a folder of class folders of videos")
    val_root = require_folder(config.val or root, "held-out labelled videos, in class folders,")
    run = Run("train_victim", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        print(f"{run.folder} is finished: top-1 {percent(run.finished['top1'])} %")
        return run.finished
    set_seed(config.seed)
    classes = list_classes(root, "train")
    model = create_network(config.architecture, len(classes), config.num_frames, config.size).to(device)
    shape = dict(num_frames=config.num_frames, stride=config.stride, size=config.size)
    clips = Clips(find_videos(root, classes, "train", config.data_list), step=config.step, **shape)
    val = Clips(find_videos(val_root, classes, "val", config.val_list), views=(1, 1), **shape)
    evaluator = Evaluator(val, classes, device, config.batch_size, config.num_workers)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(clips) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps + 1, pct_start=0.1)
    history, _ = distill(
        run,
        model,
        None,
        clips,
        optimizer,
        schedule,
        evaluator.score,
        epochs=config.epochs,
        batch_size=config.batch_size,
        label_weight=1.0,
        augmentation=Augmentation(config.hflip, config.brightness, config.rotation),
        max_grad_norm=1.0,
        seed=config.seed,
        num_workers=config.num_workers,
    )
    about = dict(architecture=config.architecture, classes=classes, num_frames=config.num_frames, size=config.size)
    from extraction.victims import swin  # here, because torchvision takes a second to import

    derived = swin.derived_buffers(model.net)
    learned = {key: value for key, value in model.net.state_dict().items() if key not in derived}
    save_weights(run.folder / "victim.safetensors", learned, about)
    draw_curve(run.folder / "curve.png", history, None, 1 / len(classes), "train_victim")
    last = {name: history[-1][name] for name in ("top1", "top5", "loss")}
    results = run.finish(dict(**last, num_classes=len(classes), num_clips=len(clips), history=history))
    print(f"top-1 {percent(results['top1'])} % on {len(val)} held-out videos: {Path(run.folder) / 'victim.safetensors'}")
    return results


if __name__ == "__main__":
    run_script(main, Config, DEMO)
