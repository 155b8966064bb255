"""The table of arms: what each change of the training recipe is worth at equal queries, alone and together.

    python benchmarks/arms.py --group grey_box --seeds 0 1 2 --jobs 2
    python benchmarks/arms.py --group grey_box --seeds 0 1 2 3 4 --split unseen --only plain crop_t4_long

The demo's victim, clips and students; an arm is the script of its group with flags more, and asks the same queries. Constants
are chosen on the 600 `tune` videos (the default here: runs then see no others); `--split unseen` scores on the 240 and the
1 200, for tables. All arms with data average their weights too (`--ema`), which changes no other: the average has a row of its
own. Differences are paired by seed. What is finished is not run again. Writes `table.md` and `table.png`.
"""

from dataclasses import dataclass
from typing import Literal

from extraction import options
from extraction.errors import UserError
from extraction.evaluation.suite import Experiment, run_all, write_tune_set
from extraction.experiment import run_script


def rates(rate: float) -> tuple[str, ...]:
    return ("--head-lr", str(rate), "--body-lr", str(rate))


# A group: its script, the flags of all its arms, and the flags of each. The first arm is what the others are compared with.
VIDEO = ("--aux", "ucf101", "hmdb51", "--ema", "0.99")
ONE_CYCLE, CROP, T4, LONG = ("--schedule", "one_cycle"), ("--student-crop", "0.2"), ("--temperature", "4"), ("--epochs", "18")
REPLAY, ALL = ("--replay-steps", "20"), ("--replay-clips", "8192")
VIDEO_ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "one_cycle": ONE_CYCLE,
    "logits": ("--matching", "logits"),
    "t4": T4,
    "lr3": rates(3e-3),
    "crop": CROP,
    "erase": ("--student-erase", "0.2"),
    "mixup": ("--mixup", "0.4"),
    "long": LONG,
    "crop_t4": (*CROP, *T4),
    "crop_t4_lr3": (*CROP, *T4, *rates(3e-3)),
    "crop_t4_long": (*CROP, *T4, *LONG),
}
GROUPS: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "grey_box": ("grey_box/swin_to_r21.py", (*VIDEO, "--epochs", "9", "--views-per-clip", "4"), VIDEO_ARMS),
    "grey_box_once": ("grey_box/swin_to_r21.py", (*VIDEO, "--epochs", "9", "--views-per-clip", "1"), VIDEO_ARMS),
    "label_only": (
        "black_box/natural_images_label_only.py",
        ("--ema", "0.99", "--epochs", "4", "--student-crop", "0"),
        {
            "plain": (),
            "all": ("--transfer", "all"),
            "long": ("--epochs", "8"),
            "crop": CROP,
            "long_crop": ("--epochs", "8", *CROP),
            "all_long": ("--transfer", "all", "--epochs", "8"),
            "all_long_crop": ("--transfer", "all", "--epochs", "8", *CROP),
        },
    ),
    "data_free": (
        "black_box/attack_video_swin.py",
        ("--replay-steps", "6", "--replay-clips", "1024", "--student-crop", "0"),
        {
            "plain": (),
            "crop": CROP,
            "replay": REPLAY,
            "replay_all": (*REPLAY, *ALL),
            "crop_replay": (*CROP, *REPLAY),
            "crop_replay_all": (*CROP, *REPLAY, *ALL),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions):
    group: Literal["grey_box", "grey_box_once", "label_only", "data_free"] = "grey_box"
    """Whose arms: distillation for 10 560 queries, or of each clip once (2 640); labels of moving pictures (4 200); MAZE."""
    only: tuple[str, ...] = ()
    """Run and tabulate only these arms; the others' differences need the first."""
    split: Literal["tune", "unseen"] = "tune"
    """The videos that score: those that constants are chosen on, or those that tables show."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds."""
    out_dir: str = "runs/arms"
    """Folder of all runs."""


def main(config: Config) -> str:
    options.check_options(config)
    script, shared, arms = GROUPS[config.group]
    if unknown := set(config.only) - set(arms):
        raise UserError(f"--only {min(unknown)}: the arms of {config.group} are {', '.join(arms)}")
    tuning = config.split == "tune"
    scored = ("--demo", "--val", str(write_tune_set())) if tuning else ()
    experiments = [Experiment(name, script, "-", (*scored, *shared, *flags)) for name, flags in arms.items()]
    first = next(iter(arms))
    against = first if not config.only or first in config.only else None
    out_dir = f"{config.out_dir}/{config.group}_{config.split}"
    sweep = dict(jobs=config.jobs, cluster=config.cluster)
    return run_all(experiments, out_dir, not tuning, config.seeds, config.only, None, against, **sweep)


if __name__ == "__main__":
    run_script(main, Config)
