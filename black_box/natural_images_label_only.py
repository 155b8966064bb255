"""A video classifier from its labels alone: a class-balanced set of clips of unrelated images, chosen by what it calls them.

    python black_box/natural_images_label_only.py --demo
    python black_box/natural_images_label_only.py --images datasets/coco/train2017 --val datasets/kinetics400_val

The victim gives away one label per clip. Part of the budget explores: random pictures on random paths. Up to `quota` clips
of each class it names are kept. The rest goes around what found the rare classes, in rounds: their paths, jittered, under
new pictures; and further random clips as long as classes are unnamed. The student trains on the kept clips, the same number
per class, with the labels. Each clip is asked about once:

    num_queries = num_explore + rounds * per_round,    rounds <= num_rounds: the last is the one that fills every quota

Training asks nothing. The best black-box figure published for Kinetics-400, 39.42 top-5 (34.51 for Kinetics-600), is from
24 320 label-only queries on class-balanced stacks of unrelated images; this follows its description, not its code.

The demo: 72.9 ± 1.8 top-1, 72.1 ± 1.2 agreement@1 after 4 200 queries (two seeds; victim 97.5, chance 8.3).
"""

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction.compute import choose_compute
from extraction.data.augment import view_key
from extraction.data.clips import load_batches
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.images import NUM_DRAWS, ImageRef, Images, Layer, Motion, move_pictures, write_demo_images
from extraction.distill import distill
from extraction.distributed import require_one_process
from extraction.errors import BudgetExhausted
from extraction.ledger import Ledger
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_inputs
from extraction.students import create_student
from extraction.weights import write_atomically


@dataclass(frozen=True)
class Config:
    victim: str = "swin_b_k400"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "label"
    """What the victim gives away. This attack reads the label alone, whatever there is."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    num_explore: int = 8000
    """Random clips that are asked about first."""
    num_rounds: int = 16
    """Rounds around the rare classes, at most."""
    per_round: int = 1020
    """Clips of a round."""
    quota: int = 60
    """Clips that are kept of each class."""
    repeats: int = 4
    """A class with fewer clips shows each of them up to so many times an epoch."""
    jitter: float = 0.1
    """How far a path around a kept one is from it: standard deviation of each of its numbers, which are 0..1."""
    student: str = "r2plus1d_18"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from nothing."""
    images: str = "datasets/coco/train2017"
    """Any tree of unrelated images; no labels are used."""
    layers: tuple[Layer, ...] = (
        Layer(),
        Layer(0.35, 160.0, 10.0, 2.0, periods=4.0, moving=0.35, radius=0.17),
    )
    """How each picture of a clip moves, from the bottom to the top."""
    val: str = "datasets/kinetics400_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Pay nothing unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 32
    size: int = 224
    """Height and width of the clips that are sent."""
    epochs: int = 30
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
    out_dir: str = "runs/natural_images_label_only"
    demo: bool = False
    """Run on the embedded demo set, images and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_swin", student="r2plus1d_tiny", images="datasets/demo/images", val="datasets/demo/val",
    layers=(Layer(0.03, 1.0, 0.0, 1.02), Layer(0.35, 160.0, 10.0, 2.0, periods=4.0, moving=0.35, radius=0.17)),
    num_explore=2400, num_rounds=12, per_round=300, quota=250, num_frames=16, size=48, epochs=4, lr=2e-3, num_workers=1,
    checkpoint_seconds=10.0, out_dir="runs/natural_images_label_only_demo",
)  # fmt: skip


class Asked(NamedTuple):
    """A clip that was asked about."""

    window: ImageRef
    draws: np.ndarray  # its path
    label: int  # what the victim called it


def main(config: Config) -> dict:
    check_at_least(config, 1, "num_explore", "per_round", "quota", "repeats", "epochs", "batch_size", "num_frames", "size")
    check_at_least(config, 0, "query_budget", "num_rounds", "jitter", "lr", "num_workers")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})  # the evaluator's alone
        write_demo_images("datasets/demo/images")
    require_one_process("the search")
    compute = choose_compute(config.device, config.precision, config.compile)
    images = Images(config.images, 1, len(config.layers), config.size, config.seed)
    run = Run("natural_images_label_only", config.out_dir, config, config.checkpoint_seconds)
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
    run.begin()
    paths = Motion(config.num_frames, config.layers)
    kept, selection, cut = select_clips(config, victim, images, paths, compute.device)
    chosen = balance_classes(kept, config.quota, config.repeats)
    note_transfer_set(run, chosen, victim.classes)
    draws = {view_key(config.seed, asked.window.key, 0, paths): asked.draws for asked in chosen}

    def make_views(pictures: Tensor, keys: list[bytes], paths: Motion) -> Tensor:
        return draw_clips(pictures, np.stack([draws[key] for key in keys]), paths)

    optimizer = torch.optim.Adam(student.parameters(), config.lr, fused=True)
    steps = config.epochs * -(-len(chosen) // config.batch_size)
    clips = images.of([asked.window for asked in chosen])
    history, stopped = distill(
        run, student, victim, clips, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), evaluator.score,
        epochs=config.epochs, batch_size=config.batch_size, augmentation=paths, make_views=make_views, views_per_clip=1,
        seed=config.seed, num_workers=config.num_workers,
    )  # fmt: skip
    return finish(
        run, student, victim, evaluator, history, cut or stopped, [*images.broken, *clips.broken],
        selection=selection, clips_per_class={victim.classes[k]: len(v) for k, v in enumerate(kept)},
    )  # fmt: skip


def draw_clips(pictures: Tensor, draws: np.ndarray, paths: Motion) -> Tensor:
    return move_pictures(pictures.permute(0, 1, 4, 2, 3).float().div_(255.0), torch.from_numpy(draws), paths)


def select_clips(
    config: Config, victim: Ledger, images: Images, paths: Motion, device: torch.device
) -> tuple[list[list[Asked]], list[dict], str | None]:
    """Spend the budget on finding `quota` clips of each class.

    Returns the clips of each class, what was reached after each round, and the line of an exhausted budget (or None).
    Raises BudgetExhausted when not even one clip can be asked about. Run again, it asks nothing that was answered.
    """
    kept: list[list[Asked]] = [[] for _ in victim.classes]
    selection, asked, cut = [], 0, None
    draw = np.random.default_rng([config.seed, 1])
    bar = tqdm(total=config.num_explore + config.num_rounds * config.per_round, desc="asking", unit="clip", dynamic_ncols=True)
    with bar:
        for number in range(1 + config.num_rounds):
            count = config.per_round if number else config.num_explore
            ways = propose_paths(kept, config.quota, config.jitter, count, NUM_DRAWS * len(paths.layers), draw)
            pairs = draw.integers(len(images.files), size=(count, len(paths.layers))).tolist()
            windows = [
                images.window(tuple(pair), ":" + hashlib.blake2b(way.tobytes(), digest_size=12).hexdigest())
                for pair, way in zip(pairs, ways, strict=True)
            ]
            keys = [view_key(config.seed, window.key, 0, paths) for window in windows]
            known = victim.find(keys)
            new = [i for i, key in enumerate(keys) if key not in known]
            batches = [new[i : i + config.batch_size] for i in range(0, len(new), config.batch_size)]
            bar.update(len(known))
            for batch in load_batches(images.of(windows), batches, config.num_workers):
                images.broken.extend((windows[i].path, reason) for i, reason in batch.broken)
                affordable = victim.count_affordable([keys[i] for i in batch.indices])
                indices = batch.indices[:affordable]
                if indices:
                    clips = draw_clips(batch.clips[:affordable].to(device), ways[indices], paths)
                    victim.query(clips, [keys[i] for i in indices])
                    bar.update(affordable)
                if affordable < len(batch.indices):
                    cut = (
                        f"query budget exhausted: {victim.num_queries} of {victim.query_budget} queries spent in round "
                        f"{number} of {config.num_rounds}; raise --query-budget and run again to go on"
                    )
                    break
            known = victim.find(keys)
            answered = [i for i, key in enumerate(keys) if key in known]
            asked += len(answered)
            answers = victim.query(torch.empty(0), [keys[i] for i in answered]) if answered else torch.empty(0)
            for i, label in zip(answered, (answers if answers.ndim == 1 else answers.argmax(1)).tolist(), strict=True):
                if len(kept[label]) < config.quota:
                    kept[label].append(Asked(windows[i], ways[i], label))
            full = sum(len(clips) == config.quota for clips in kept)
            reached = sum(bool(clips) for clips in kept)
            shares = dict(classes_reached=reached / len(kept), quotas_full=full / len(kept))
            selection.append(dict(num_queries=asked, **shares, kept=sum(map(len, kept))))
            bar.write(f"{asked} clips asked: {reached} of {len(kept)} classes named, {full} quotas full")
            if cut or full == len(kept):
                break
    if not asked:
        raise BudgetExhausted(cut)
    return kept, selection, cut


def propose_paths(
    kept: list[list[Asked]], quota: int, jitter: float, count: int, num_draws: int, draw: np.random.Generator
) -> np.ndarray:
    """(count, num_draws) paths in 0..1: around those of classes that want clips, random ones for classes never named."""
    ways = draw.random((count, num_draws))
    wanting = np.array([quota - len(clips) if clips else 0 for clips in kept], float)
    unnamed = sum(not clips for clips in kept) / len(kept)
    if not wanting.sum():
        return ways
    labels = draw.choice(len(kept), count, p=wanting / wanting.sum())
    for way, label, luck in zip(ways, labels, draw.random(count), strict=True):
        if luck >= unnamed:
            parent = kept[label][draw.integers(len(kept[label]))].draws
            near = parent + jitter * draw.standard_normal(num_draws)
            way[:] = 1 - abs(1 - near % 2)  # reflected at 0 and 1
    return ways


def balance_classes(kept: list[list[Asked]], quota: int, repeats: int) -> list[Asked]:
    """The transfer set: `quota` clips of every class that was named, those of rarer ones coming `repeats` times at most."""
    return [clips[k % len(clips)] for clips in kept for k in range(min(quota, repeats * len(clips)))]


def note_transfer_set(run: Run, chosen: list[Asked], classes: tuple[str, ...]) -> None:
    """Write `transfer_set.json`. A checkpoint that was trained on another one (a smaller budget's) is no use: it goes."""
    path = run.folder / "transfer_set.json"
    lines = [[classes[asked.label], str(asked.window.path), asked.window.key] for asked in chosen]
    content = json.dumps(lines, indent=0).encode()
    if not path.exists() or path.read_bytes() != content:
        (run.folder / "state.pt").unlink(missing_ok=True)
        write_atomically(path, lambda file: file.write(content))


if __name__ == "__main__":
    run_script(main, Config, DEMO)
