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

The demo, on 1 200 unseen videos: 84.3 ± 1.5 top-1, 82.8 ± 1.5 agreement@1 after 4 200 queries (five seeds; victim 97.1, chance
8.3).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extraction import distributed, options
from extraction.attacks.distill import Training
from extraction.attacks.losses import kl_divergence
from extraction.data.augment import view_key
from extraction.data.clips import load_batches
from extraction.data.images import DEMO_LAYERS, NUM_DRAWS, ImageRef, Images, Layer, Motion, move_pictures
from extraction.data.queries import QuerySet
from extraction.errors import UserError
from extraction.evaluation.results import QUERY_BUDGET
from extraction.experiment import experiment, open_attack, run_script
from extraction.runs import Run
from extraction.students import create_student
from extraction.victims.ledger import Ledger
from extraction.weights import write_atomically


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.ImageOptions, options.VictimOptions):
    victim: str = "swin_b_k400"
    answers: Literal["logits", "probs", "top5", "label"] = "label"
    """What the victim returns for a clip; this attack uses the label alone."""
    student: str = "r2plus1d_18"
    val: str = "datasets/kinetics400_val"
    num_frames: int = 32
    size: int = 224
    images: str = "datasets/coco/train2017"
    """Any tree of unrelated images; no labels are used."""
    layers: options.Layers = (Layer(), DEMO_LAYERS[1])
    num_explore: options.Count = 8000
    """Random clips that are asked about first."""
    num_rounds: options.Natural = 16
    """Rounds around the rare classes, at most."""
    per_round: options.Count = 1020
    """Clips of a round."""
    quota: options.Count = 60
    """Clips that are kept of each class."""
    repeats: options.Count = 4
    """How often an epoch shows each clip of a class with fewer, at most."""
    jitter: options.Rate = 0.1
    """Distance of a path from the kept one it is drawn around: standard deviation of each of its numbers, which are 0 to 1."""
    transfer: Literal["quota", "all"] = "quota"
    """Clips to train on: the quota of each class, or all that were answered, rarer classes repeated up to the largest one."""
    epochs: int = 30


DEMO = options.DEMO | dict(
    victim="demo_swin",
    student="r2plus1d_tiny",
    images="datasets/demo/images",
    layers=DEMO_LAYERS,
    num_explore=2400,
    num_rounds=12,
    per_round=300,
    quota=250,
    epochs=8,
    lr=2e-3,
    student_crop=0.2,
    ema=0.99,
)


class Candidate(NamedTuple):
    """A clip that was asked about."""

    ref: ImageRef
    draws: np.ndarray  # its path
    label: int  # the victim's answer


@experiment
def main(config: Config, run: Run) -> dict:
    distributed.require_one_process("the search")
    images = Images(config.images, 1, len(config.layers), config.size, config.seed, config.cache)
    compute, victim, evaluator = open_attack(config, run)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    run.begin()
    motion = Motion(config.num_frames, config.layers)
    answered, selection, exhausted = select_clips(config, victim, images, motion, compute.device)
    kept = [clips[: config.quota] for clips in answered]
    each = config.quota if config.transfer == "quota" else max(map(len, answered))
    chosen = balance_classes(kept if config.transfer == "quota" else answered, each, config.repeats)
    note_transfer_set(run, chosen, victim.classes)
    draws = {view_key(config.seed, candidate.ref.key, 0, motion): candidate.draws for candidate in chosen}

    def make_views(pictures: Tensor, keys: Sequence[bytes], motion: Motion) -> Tensor:
        return draw_clips(pictures, np.stack([draws[key] for key in keys]), motion)

    queries = QuerySet(images.of([candidate.ref for candidate in chosen]), motion, 1, config.seed, make_views)
    optimizer = torch.optim.Adam(student.parameter_groups(*config.rates), fused=True)
    steps = config.epochs * -(-len(chosen) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = Training(
        run, student, optimizer, schedule, evaluator, victim, queries, config.epochs, config.batch_size, config.num_workers,
        **config.recipe,
    )  # fmt: skip
    for batch in map(training.vary, training):
        loss = kl_divergence(training.forward(batch.clips), batch.targets)
        training.step(loss)
    clips_per_class = {victim.classes[label]: len(clips) for label, clips in enumerate(kept)}
    return training.finish(
        stopped=QUERY_BUDGET if exhausted else None, broken=images.broken, selection=selection, clips_per_class=clips_per_class
    )


def draw_clips(pictures: Tensor, draws: np.ndarray, motion: Motion) -> Tensor:
    return move_pictures(pictures.permute(0, 1, 4, 2, 3).float().div_(255.0), torch.from_numpy(draws), motion)


def select_clips(
    config: Config, victim: Ledger, images: Images, motion: Motion, device: torch.device
) -> tuple[list[list[Candidate]], list[dict], bool]:
    """Spend the budget on finding `quota` clips of each class.

    Returns all clips by the class they were named, what was reached after each round, and whether the budget is exhausted.
    Raises UserError when not even one clip can be asked about. Run again, it asks nothing that was answered.
    """
    named: list[list[Candidate]] = [[] for _ in victim.classes]
    selection, asked, exhausted = [], 0, False
    draw = np.random.default_rng([config.seed, 1])
    bar = tqdm(total=config.num_explore + config.num_rounds * config.per_round, desc="asking", unit="clip", dynamic_ncols=True)
    with bar:
        for number in range(1 + config.num_rounds):
            count = config.per_round if number else config.num_explore
            kept = [clips[: config.quota] for clips in named]
            ways = propose_paths(kept, config.quota, config.jitter, count, NUM_DRAWS * len(motion.layers), draw)
            pairs = draw.integers(len(images.files), size=(count, len(motion.layers))).tolist()
            refs = [
                images.ref(tuple(pair), ":" + hashlib.blake2b(way.tobytes(), digest_size=12).hexdigest())
                for pair, way in zip(pairs, ways, strict=True)
            ]
            keys = [view_key(config.seed, ref.key, 0, motion) for ref in refs]
            known = victim.find(keys)
            new = [i for i, key in enumerate(keys) if key not in known]
            batches = [new[i : i + config.batch_size] for i in range(0, len(new), config.batch_size)]
            bar.update(len(known))
            for batch in load_batches(images.of(refs), batches, config.num_workers):
                images.broken.extend(batch.broken)
                affordable = victim.reserve([keys[i] for i in batch.indices])
                indices = batch.indices[:affordable]
                if indices:
                    clips = draw_clips(batch.clips[:affordable].to(device), ways[indices], motion)
                    victim.query(clips, [keys[i] for i in indices])
                    bar.update(affordable)
                if affordable < len(batch.indices):
                    exhausted = True
                    break
            known = victim.find(keys)
            answered = [i for i, key in enumerate(keys) if key in known]
            asked += len(answered)
            answers = victim.query(torch.empty(0), [keys[i] for i in answered]) if answered else torch.empty(0)
            for i, label in zip(answered, (answers if answers.ndim == 1 else answers.argmax(1)).tolist(), strict=True):
                named[label].append(Candidate(refs[i], ways[i], label))
            counts = [min(len(clips), config.quota) for clips in named]
            full, reached = counts.count(config.quota), sum(map(bool, counts))
            shares = dict(classes_reached=reached / len(counts), quotas_full=full / len(counts))
            selection.append(dict(num_queries=asked, **shares, kept=sum(counts)))
            bar.write(f"{asked} clips asked: {reached} of {len(counts)} classes named, {full} quotas full")
            if exhausted or full == len(counts):
                break
    if not asked:
        reason = "" if exhausted else f" ({images.broken[0][0].name}: {images.broken[0][1]})"
        raise UserError(f"not one clip was answered: {'no query budget' if exhausted else 'no image can be read'}{reason}")
    return named, selection, exhausted


def propose_paths(
    kept: list[list[Candidate]], quota: int, jitter: float, count: int, num_draws: int, draw: np.random.Generator
) -> np.ndarray:
    """(count, num_draws) paths in 0..1: around those of classes that want clips, random ones for classes never named."""
    ways = draw.random((count, num_draws))
    wanting = np.array([quota - len(clips) if clips else 0 for clips in kept], float)
    unnamed = sum(not clips for clips in kept) / len(kept)
    if not wanting.sum():
        return ways
    labels = draw.choice(len(kept), count, p=wanting / wanting.sum())
    for way, label, chance in zip(ways, labels, draw.random(count), strict=True):
        if chance >= unnamed:
            parent = kept[label][draw.integers(len(kept[label]))].draws
            near = parent + jitter * draw.standard_normal(num_draws)
            way[:] = 1 - abs(1 - near % 2)  # reflected at 0 and 1
    return ways


def balance_classes(kept: list[list[Candidate]], quota: int, repeats: int) -> list[Candidate]:
    """The transfer set: `quota` clips of every class that was named, each clip of a rarer one `repeats` times at most."""
    return [clips[k % len(clips)] for clips in kept for k in range(min(quota, repeats * len(clips)))]


def note_transfer_set(run: Run, chosen: list[Candidate], classes: tuple[str, ...]) -> None:
    """Write `transfer_set.json`. A checkpoint that was trained on another one (a smaller budget's) is no use: it goes."""
    path = run.folder / "transfer_set.json"
    lines = [[classes[candidate.label], str(candidate.ref.path), candidate.ref.key] for candidate in chosen]
    content = json.dumps(lines, indent=0).encode()
    if not path.exists() or path.read_bytes() != content:
        (run.folder / "state.pt").unlink(missing_ok=True)
        write_atomically(path, lambda file: file.write(content))


if __name__ == "__main__":
    run_script(main, Config, DEMO)
