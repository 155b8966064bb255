"""What a type of answer is worth in queries: agreement with the victim against queries, a student of its own for each budget.

    python benchmarks/answers.py --seeds 0 1 2 --jobs 2
    python benchmarks/answers.py --grey-box="--student-crop 0.2" --level 80

Grey-box are videos of the task and unrelated ones (`grey_box/swin_to_r21.py` with --aux; with the true labels of the task's
videos `swin_to_r21_kd.py`), label-only moving pictures (`black_box/natural_images_label_only.py`), on the demo's victim, scored
on its 1 200 unseen videos. Students of one attack take as many steps whatever they were answered. Constants are those that
`benchmarks/arms.py` chose on other videos; `--grey-box` and `--label-only` change them. Of students with `--ema` the averaged
one counts. What is finished is not run again. Writes `table.md`, `worth.md` and `agreement.png`.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from extraction import options
from extraction.audit.curves import Reached, average_seeds, queries_to
from extraction.evaluation.plots import draw_budgets
from extraction.evaluation.results import read_run
from extraction.evaluation.suite import Experiment, run_all
from extraction.experiment import run_script
from extraction.weights import write_text

# Temperatures are for probabilities that are whole.
PLAIN, KD = "grey_box/swin_to_r21.py", "grey_box/swin_to_r21_kd.py"
ANSWERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "probs": (PLAIN, ("--temperature", "4")),
    "probs with true labels": (KD, ("--temperature", "4")),
    "1 decimal": (PLAIN, ("--decimals", "1")),
    "top5": (PLAIN, ("--answers", "top5")),
    "label": (PLAIN, ("--answers", "label")),
    "label with true labels": (KD, ("--answers", "label")),
}
GREY_BOX, LABEL_ONLY = (660, 2640, 10_560), (1000, 4200, 10_000)
CLIPS = 2640  # of the demo's labelled share and its unrelated videos
PASSES = 9  # over that many clips, of every grey-box student
SHOWN = 24_000  # clips of a label-only student


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions):
    grey_box: str = "--student-crop 0.2 --ema 0.99"
    """Flags more for the scripts of grey_box, in one string after an =."""
    label_only: str = "--transfer all"
    """Flags more for black_box/natural_images_label_only.py, in one string after an =."""
    level: options.Rate = 90.0
    """Agreement@1, in percent, that answers are compared at."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds."""
    out_dir: str = "runs/answers"
    """Folder of all runs."""


def build_grey_box(config: Config, answers: str, budget: int) -> Experiment:
    clips = min(budget, CLIPS)
    flags = ["--aux", "ucf101", "hmdb51", "--num-clips", clips, "--views-per-clip", budget // clips]
    script, own = ANSWERS[answers]
    flags += ["--epochs", PASSES * CLIPS // clips, *own, *shlex.split(config.grey_box)]
    return Experiment(f"{answers} {budget}", script, "-", tuple(str(flag) for flag in flags))


def build_label_only(config: Config, budget: int) -> Experiment:
    flags = ["--num-explore", budget // 2, "--num-rounds", 5, "--per-round", budget // 10, "--quota", budget]
    flags += ["--epochs", max(1, SHOWN // budget), *shlex.split(config.label_only)]
    name = f"label of moving pictures {budget}"
    return Experiment(name, "black_box/natural_images_label_only.py", "-", tuple(str(flag) for flag in flags))


def main(config: Config) -> str:
    options.check_options(config)
    built = {(answers, budget): build_grey_box(config, answers, budget) for answers in ANSWERS for budget in GREY_BOX}
    built |= {("label of moving pictures", budget): build_label_only(config, budget) for budget in LABEL_ONLY}
    sweep = dict(jobs=config.jobs, cluster=config.cluster)
    try:
        return run_all(list(built.values()), config.out_dir, True, config.seeds, **sweep)
    finally:
        curves: dict[str, dict[int, list[float]]] = {}
        for (answers, _), experiment in built.items():
            for seed in config.seeds:
                results = read_run(Path(config.out_dir) / f"seed_{seed}" / experiment.name)
                if results is not None and "unseen_agreement_at_1" in results:  # interrupted runs are not scored there yet
                    score = results.get("unseen_agreement_at_1_ema", results["unseen_agreement_at_1"])
                    curves.setdefault(answers, {}).setdefault(results["num_queries"], []).append(score)
        if curves:
            draw_budgets(Path(config.out_dir) / "agreement.png", curves, "agreement@1 on unseen videos")
            worth = describe_worth(curves, config.level)
            write_text(Path(config.out_dir) / "worth.md", worth)
            print(worth)


def describe_worth(curves: dict[str, dict[int, list[float]]], level: float) -> str:
    """A table: the queries of each type of answer that `level` percent takes, and how many times those of probabilities."""
    lines = [f"| answers | queries to {level:g} % agreement@1 | times those of probs |", "| --- | --- | --- |"]
    reached: dict[str, Reached] = {}
    for answers, points in curves.items():
        curve = average_seeds([(budget, score) for budget, scores in points.items() for score in scores])
        reached[answers] = queries_to(curve, level / 100)
    base = reached.get("probs")
    for answers, (queries, bound) in reached.items():
        most = max(curves[answers])
        shown = f"more than {most}" if queries is None else f"{'at most ' * (bound == 'at most')}{queries:.0f}"
        known = queries and base and base.queries and bound == base.bound == "interpolated"
        lines.append(f"| {answers} | {shown} | {f'{queries / base.queries:.1f}' if known else '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Config, {})
