"""The real table: what each attack gets out of a real Kinetics-600 classifier for 1 000, 3 000 and 10 000 queries.

python benchmarks/real_victim.py --victim tflite:weights/movinet_a0_stream_int8.tflite --web datasets/web_video \
    --robot datasets/robot_video --photos datasets/photos

Footage without labels is enough: students are scored by agreement with the victim, on web videos that `real_victim/val.txt`
beside this script keeps out of every attack; constants were chosen on those of `real_victim/tune.txt` (`--split tune`). All
other web videos are the attacker's. Every row is a run of a script of the project with a bill of its budget; what is
finished is not run again, and the victim's owner keeps the logits of clips that come again (`--victim-record`), which
changes no bill. Writes `table.md` and `agreement.png`, agreement against queries.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from extraction import options
from extraction.data.folders import find_videos, require_folder
from extraction.errors import UserError
from extraction.evaluation.plots import draw_budgets
from extraction.evaluation.results import read_run
from extraction.evaluation.suite import Experiment, run_all
from extraction.experiment import run_script

HERE = Path(__file__).parent
ATTACKS = ("random_noise", "maze", "label_only", "stacked_images", "web_video", "web_and_robot_video")
# A student from nothing, small enough to learn anything at all from so few answers; and a backbone that knows ImageNet.
STUDENTS: dict[str, tuple[str, ...]] = {
    "nothing": ("--student", "r2plus1d_tiny@8x64", "--student-weights", "None"),
    "imagenet": ("--student", "efficientnet_lite0@4x112", "--student-weights", "imagenet"),
}


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions, options.VictimFileOptions):
    victim: str = "movinet_a0_stream_k600"
    """The model under attack, as in every script."""
    web: str = "datasets/web_video"
    """Folder of unlabelled web videos, the attacker's and the held-out ones."""
    robot: str = "datasets/robot_video"
    """Folder of unlabelled videos of another kind."""
    photos: str = "datasets/photos"
    """Any tree of photographs."""
    attacks: tuple[str, ...] = ATTACKS
    """Which rows to run."""
    students: tuple[str, ...] = ("nothing", "imagenet")
    """What students start from."""
    budgets: tuple[int, ...] = (1000, 3000, 10_000)
    """Queries of a run."""
    lists: str = str(HERE / "real_victim")
    """Folder of val.txt and tune.txt, which name the web videos that no attack may have."""
    split: Literal["val", "tune"] = "val"
    """The held-out videos that score: those of the table, or those that constants are chosen on."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds; with several, the table has their mean and standard deviation."""
    size: options.Count = 172
    """Height and width of a clip, in pixels; of MAZE's, which its generator makes and the victim resizes, 160."""
    epochs: options.Count = 10
    """Passes over the answered clips."""
    lr: options.Rate = 1e-3
    """Learning rate of the head, and of a student from nothing."""
    body_lr: options.Rate = 0.0
    """That of a backbone that knows ImageNet; 0: it stays as it is."""
    recipe: str = "--student-crop 0.2 --ema 0.99"
    """Flags more where all of a student is trained on given clips (docs/recipe.md), in one string after an =; of students with
    --ema the averaged one is drawn. A backbone that stays as it is has none: what it makes of a clip is then kept."""
    num_workers: options.Natural = 2
    """Data loader workers, one per core at most."""
    out_dir: str = "runs/real_victim"
    """Folder of all runs."""


def name_run(attack: str, student: str, budget: int) -> str:
    return f"{attack}_{student}_{budget}"


def build_experiment(config: Config, data: Path, attack: str, student: str, budget: int) -> Experiment:
    """The script of an attack and its flags, so that it asks exactly `budget` queries."""
    if budget < 100 or budget % 100:
        raise UserError(f"--budgets {budget}: must be hundreds")
    body_lr = config.lr if student == "nothing" else config.body_lr
    if attack in ("random_noise", "maze"):
        noise = attack == "random_noise"
        script = f"black_box/{'random_noise_with_swin' if noise else 'attack_video_movinet'}.py"
        # 100 queries an iteration, each clip replayed twice.
        flags = ["--iterations", budget // 100, "--batch-size", 20, "--student-steps", 5 if noise else 3]
        flags += ["--replay-steps", 10, "--replay-clips", min(budget, 4000), "--student-lr", config.lr]
        flags += ["--score-every", 5000, *([] if noise else ["--num-directions", 1])]
    elif attack == "label_only":
        script = "black_box/natural_images_label_only.py"
        flags = ["--num-explore", budget // 2, "--num-rounds", 5, "--per-round", budget // 10]
        flags += ["--quota", budget, "--repeats", 1, "--images", config.photos, "--lr", config.lr, "--body-lr", body_lr]
        flags += ["--epochs", config.epochs]
    elif attack == "stacked_images":
        script = "black_box/stacked_images_with_movinet.py"
        flags = ["--num-clips", budget, "--views-per-clip", 1, "--images", config.photos]
        flags += ["--lr", config.lr, "--body-lr", body_lr, "--epochs", config.epochs]
    else:
        # A view of each of at most 1 000 clips before any has two: 51 videos of eight seconds have not many more.
        views = max(1, budget // 1000)
        script = "grey_box/movinet_to_r50_auxiliary.py"
        robot = [require_folder(config.robot, "unlabelled videos of another kind")] if attack == "web_and_robot_video" else []
        flags = ["--aux", data / "web", *robot, "--clip-interval", 6]
        flags += ["--num-clips", budget // views, "--views-per-clip", views, "--epochs", config.epochs * views]
        flags += ["--head-lr", config.lr, "--body-lr", body_lr]
    if attack not in ("random_noise", "maze") and body_lr:
        flags += shlex.split(config.recipe)
    record = "victim_{node}.record" if config.cluster else "victim.record"  # which machines cannot share
    victim = ["--victim", config.victim, "--victim-record", Path(config.out_dir) / record]
    for flag in ("victim_weights", "victim_classes", "victim_about"):
        if getattr(config, flag) is not None:
            victim += [f"--{flag.replace('_', '-')}", getattr(config, flag)]
    size = 160 if attack == "maze" else config.size
    shown = ["--val", data / config.split, "--val-clips", 3, "--num-frames", 16, "--fps", 5, "--size", size]
    shared = [*STUDENTS[student], "--num-workers", config.num_workers, "--checkpoint-seconds", 60]
    given = tuple(str(flag) for flag in (*victim, *shown, *shared, *flags))
    return Experiment(name_run(attack, student, budget), script, "-", given)


def divide_videos(config: Config, out_dir: Path) -> None:
    """Folders of links to the attacker's, the tuning and the held-out web videos."""
    lists = {split: Path(config.lists) / f"{split}.txt" for split in ("tune", "val")}
    named = {split: {video.path for video in find_videos(config.web, None, None, file)} for split, file in lists.items()}
    for video in find_videos(config.web, None):
        split = next((split for split, paths in named.items() if video.path in paths), "web")
        link = out_dir / split / "_".join(video.path.relative_to(config.web).parts)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(video.path.resolve())


def main(config: Config) -> str:
    options.check_options(config)
    for flag, given, known in (("attacks", config.attacks, ATTACKS), ("students", config.students, STUDENTS)):
        if unknown := set(given) - set(known):
            raise UserError(f"--{flag}: none is called {min(unknown)}; there are {', '.join(known)}")
    require_folder(config.web, "unlabelled web videos")
    require_folder(config.photos, "photographs")
    out_dir = Path(config.out_dir)
    divide_videos(config, out_dir / "data")
    cells = [(a, s, b) for b in config.budgets for s in config.students for a in config.attacks]
    experiments = [build_experiment(config, out_dir / "data", *cell) for cell in cells]
    try:
        return run_all(experiments, out_dir, False, config.seeds, jobs=config.jobs, cluster=config.cluster)
    finally:
        curves: dict[str, dict[int, list[float]]] = {}
        for attack, student, budget in cells:
            for seed in config.seeds:
                results = read_run(out_dir / f"seed_{seed}" / name_run(attack, student, budget))
                if results is not None:
                    points = curves.setdefault(f"{attack.replace('_', ' ')}, from {student}", {})
                    points.setdefault(budget, []).append(results.get("agreement_at_5_ema", results["agreement_at_5"]))
        if curves:
            draw_budgets(out_dir / "agreement.png", curves, "agreement@5")


if __name__ == "__main__":
    run_script(main, Config, {})
