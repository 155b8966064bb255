"""Draw docs/picture.png from two finished runs: what the victim saw and answered, and how near its answers the student came.

    make picture

The runs are `swin_to_r21_kd.py --demo --views-per-clip 9 --out-dir runs/picture_kd`, in which every answer is used once, and
`labels_only.py --demo`.
"""

import sys
from pathlib import Path

import matplotlib
import torch

from extraction.attacks.losses import answers_to_targets
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips, load_batches
from extraction.data.folders import find_videos
from extraction.data.queries import QuerySet
from extraction.errors import UserError
from extraction.evaluation.results import read_results
from extraction.victims.ledger import Ledger
from extraction.victims.zoo import load_victim

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLIPS, FRAMES = 5, 6


def main(kd: str = "runs/picture_kd", baseline: str = "runs/labels_only_demo", out: str = "docs/picture.png") -> None:
    results, alone = read_results(kd), read_results(baseline)
    config = results["config"]
    ledger = Ledger(Path(kd) / "ledger.sqlite", lambda num: load_victim(config["victim"], num_queries=num), config["answers"])
    videos = find_videos(config["in_domain"], ledger.classes, "train")
    shape = {name: config[name] for name in ("num_frames", "stride", "size")}
    clips = Clips(videos, clip_interval=config["clip_interval"], **shape)
    augmentation = Augmentation(config["hflip"], config["brightness"], config["rotation"])
    queries = QuerySet(clips, augmentation, config["views_per_clip"], config["seed"])
    chosen = list(range(len(clips) // CLIPS // 2, len(clips), len(clips) // CLIPS))[:CLIPS]
    (batch,) = load_batches(clips, [chosen], 0)
    keys = queries.keys(batch.indices, 0)
    views = queries.views(batch.clips, keys)
    targets = answers_to_targets(ledger.query(torch.empty(0), keys), ledger.answers, ledger.num_classes)  # cached: no query

    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots(CLIPS, FRAMES + 1, width_ratios=[1] * FRAMES + [2.6])
    left.suptitle("What the victim saw, and what it answered", fontsize=11)
    for row, clip, target in zip(axes, views, targets, strict=True):
        for column, axis in enumerate(row):
            axis.axis("off")
            if column < FRAMES:
                frame = round(column * (clip.shape[1] - 1) / (FRAMES - 1))
                axis.imshow(clip[:, frame].permute(1, 2, 0).numpy(), interpolation="nearest")
        best = target.topk(2)
        lines = [
            f"{ledger.classes[k]} {100 * p:.0f} %" for p, k in zip(best.values, best.indices.tolist(), strict=True) if p > 0.01
        ]
        row[-1].text(0, 0.5, "\n".join(lines), va="center", fontsize=8.5, transform=row[-1].transAxes)

    axis, history = right.subplots(), results["history"]
    chance = 100 * results["chance_top1"]
    used = [0, *(point["num_queries"] for point in history)]
    axis.plot(used, [chance, *(100 * p["agreement_at_1"] for p in history)], marker="o", label="agreement@1 with the victim")
    axis.plot(used, [chance, *(100 * p["top1"] for p in history)], marker="o", markersize=3, label="student top-1")
    for value, label, style in (
        (results["victim_top1"], "victim top-1", "--"),
        (alone["top1"], "same student, true labels alone", "-."),
        (results["chance_top1"], "chance", ":"),
    ):
        axis.axhline(100 * value, color="grey", linestyle=style, linewidth=1, label=label)
    axis.set(xlabel="queries used", ylabel="% of held-out videos", ylim=(0, 102), xlim=(0, None))
    axis.set_title("What the answers were worth", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(out, dpi=100)
    print(f"{out} drawn from {kd} and {baseline}, commit {results['commit']}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"picture.py: {error}")
