"""What a run leaves: its saved student, its curve, `results.json`, and tables of the results of several runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import tyro
from torch import Tensor

from extraction.data.clips import name_once, report_broken
from extraction.errors import UserError, printable, run_tool
from extraction.evaluation.plots import draw_curve
from extraction.evaluation.scoring import Evaluator
from extraction.runs import Run
from extraction.students import Student
from extraction.victims.ledger import Ledger
from extraction.weights import save_weights

# What the scores are called on screen.
SCORES = {"top1": "top-1", "top5": "top-5", "agreement_at_1": "agreement@1", "agreement_at_5": "agreement@5"}
UNSEEN_SCORES = {"unseen_top1": "top-1, unseen", "unseen_agreement_at_1": "agreement@1, unseen"}
QUERY_BUDGET = "query budget"  # what `stopped` says of a run that its budget ended
# The options that tell runs of one experiment apart.
_DEFENCE = ("defence", "defence_strength", "defence_after", "wire")
_NAMING = ("victim", "answers", "decimals", *_DEFENCE, "query_budget", "seed", "student")


def finish(
    run: Run,
    student: Student,
    victim: Ledger | None,
    evaluator: Evaluator,
    history: list[dict],
    stopped: str = "epochs",
    broken: Sequence[tuple[Path, str]] = (),
    averaged: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> dict:
    """Save the student, draw the curve, write `results.json` and print the table. `more` goes into the results.

    `averaged` weights of the student are saved beside it, as `student_ema.safetensors`.
    `num_queries_before`, the queries of earlier stages, count in the student's file and in the table too.
    `stopped` is "epochs", "iterations" or `QUERY_BUDGET`. Returns the results.
    """
    clips = evaluator.clips
    summary = evaluator.summarise(student.eval())
    about = dict(
        student=student.name,
        classes=list(evaluator.classes),
        num_frames=clips.num_frames,
        stride=clips.stride,
        size=clips.size,
        num_queries=more.get("num_queries_before", 0) + (victim.num_queries if victim is not None else 0),
    )
    if clips.fps is not None:
        about["fps"] = clips.fps
    save_weights(run.folder / "student.safetensors", student.net.state_dict(), about)
    if averaged is not None:
        save_weights(run.folder / "student_ema.safetensors", averaged, about)
    chance = 1.0 / len(evaluator.classes)
    draw_curve(run.folder / "curve.png", history, evaluator.victim_scores.get("top1"), chance, run.experiment)
    final = {k: v for k, v in history[-1].items() if k not in ("epoch", "iteration", "num_queries", "loss")}
    victim_scores = {f"victim_{name}": value for name, value in evaluator.victim_scores.items()}
    broken = name_once([*broken, *evaluator.broken])
    results = run.finish(
        dict(
            victim=victim.victim if victim is not None else None,
            victim_fingerprint=victim.fingerprint if victim is not None else None,
            student=student.name,
            answers=victim.answers if victim is not None else None,
            num_queries=victim.num_queries if victim is not None else 0,
            query_budget=run.config.get("query_budget"),
            num_classes=len(evaluator.classes),
            num_val_videos=clips.num_videos,
            num_val_clips=len(clips),
            chance_top1=chance,
            **dict.fromkeys(("top1", "top5")) | final,  # None without labels
            **summary,
            **victim_scores,
            stopped=stopped,
            broken=[[str(path), reason] for path, reason in broken],
            history=history,
            **more,
        )
    )
    print_results(results)
    report_broken(broken)
    print(f"all of it is in {printable(run.folder)}")
    if stopped == QUERY_BUDGET:
        print(say_how_to_go_on(results["num_queries"], results["query_budget"]))
    return results


def say_how_to_go_on(num_queries: int, query_budget: int | None) -> str:
    return (
        f"query budget exhausted: {num_queries} of {query_budget} queries used; run again with a larger --query-budget to go on"
    )


def count_queries(results: dict) -> int:
    """What a student cost in all: the queries of its run, and those of the stages before."""
    return results["num_queries"] + results.get("num_queries_before", 0)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def percent_range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"


def describe_scores(scores: Mapping[str, Any]) -> str:
    """One line of scores and the 95 % `intervals` beside them: `top-1 88.5 % (84.2-92.1), ...`."""
    intervals, known = scores["intervals"], {name: label for name, label in SCORES.items() if name in scores}
    shown = [f"{label} {percent(scores[name])} % ({percent_range(intervals[name])})" for name, label in known.items()]
    if "mean_kl" in scores:
        low, high = intervals["mean_kl"]
        shown.append(f"KL {scores['mean_kl']:.3f} nats ({low:.3f}-{high:.3f})")
    return ", ".join(shown)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row being the head."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def print_results(*runs: dict) -> dict:
    """Print one table of the results of runs on the same held-out videos: victims, students, chance. Returns the last."""
    last = runs[-1]
    rows = [["% on held-out videos" + _describe_clips(runs), *SCORES.values(), "queries"]]
    victims = dict.fromkeys(
        (run["victim"], run["victim_fingerprint"], percent(run["victim_top1"]), percent(run["victim_top5"]))
        for run in runs
        if run.get("victim") is not None
    )
    for name, fingerprint, *scores in victims:
        rows.append(["victim" if len(victims) == 1 else f"victim, {name} ({fingerprint})", *scores, "-", "-", "-"])
    for name, run in zip(_tell_apart(runs), runs, strict=True):
        rows.append([f"student, {name}", *(percent(run.get(score)) for score in SCORES), str(count_queries(run))])
        if "intervals" in run:  # of the videos alone: what another random seed would change is not in it
            rows.append(["  95 % interval", *(percent_range(run["intervals"].get(score)) for score in SCORES), "-"])
        if "agreement_at_1_ema" in run or "top1_ema" in run:
            rows.append(["  its averaged weights", *(percent(run.get(f"{score}_ema")) for score in SCORES), "-"])
    chance = [percent(last["chance_top1"]), percent(5 * last["chance_top1"])]
    labelled = any(run.get("top1") is not None for run in runs)
    rows.append(["chance", *(chance if labelled else ["-", "-"]), *chance, "-"])
    if last.get("num_classes", 6) <= 5:  # the best five are all there are
        rows = [[cell if k not in (2, 4) or row is rows[0] else "-" for k, cell in enumerate(row)] for row in rows]
    print("\n" + format_table(rows) + "\n")
    for name, run in zip(_tell_apart(runs), runs, strict=True):
        if run.get("mean_kl") is not None:
            print(printable(f"mean KL(victim || student), {name}: {run['mean_kl']:.3f} nats"))
    return last


def _describe_clips(runs: Sequence[dict]) -> str:
    """The clips that all the runs were scored on, frames x height x width: a victim scores otherwise on others."""
    shapes = {tuple(run.get("config", {}).get(name) for name in ("num_frames", "size", "size")) for run in runs}
    shape = shapes.pop() if len(shapes) == 1 else (None,)
    return "" if None in shape else f", clips of {'x'.join(map(str, shape))}"


def _tell_apart(runs: Sequence[dict]) -> list[str]:
    """A name for each run: its experiment, and what differs between the runs of one experiment."""
    names = []
    for run in runs:
        same = [other for other in runs if other["experiment"] == run["experiment"]]
        differs = [
            f"{key.replace('_', ' ')} {run.get('config', {}).get(key)}"
            for key in _NAMING
            if len({str(other.get("config", {}).get(key)) for other in same}) > 1
        ]
        if not differs and len(same) > 1:
            differs = [str(run.get("config", {}).get("out_dir"))]
        names.append(", ".join([run["experiment"], *differs]))
    return names


def read_results(folder: str | Path) -> dict:
    """The results of a finished run. Raises UserError, in one line, for a folder without, or without a student in them."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no results.json: not a finished run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable, truncated perhaps ({error})") from None
    if not isinstance(results, dict) or "student" not in results:
        raise UserError(f"{folder}: no student in it; the table has runs of the attacks")
    return results


def read_run(folder: Path) -> dict | None:
    """The results of a run, with its scores on the unseen videos if there are any; None for one that has not ended."""
    if not (folder / "results.json").is_file():
        return None
    unseen = folder / "unseen.json"
    return read_results(folder) | (json.loads(unseen.read_text()) if unseen.is_file() else {})


def describe_difference(scores: Mapping[int, float], reference: Mapping[int, float], digits: int = 1) -> str:
    """`+2.1 ± 0.4 (3 seeds)`: mean and standard error of the paired differences over the seeds that both have.

    Both map a seed to a score. What a seed does to both, such as its order of the clips, is not in a paired difference. One
    seed has no standard error; `-` without a seed in common.
    """
    seeds = sorted(scores.keys() & reference.keys())
    if not seeds:
        return "-"
    differences = [scores[seed] - reference[seed] for seed in seeds]
    shown = f"{mean(differences):+.{digits}f}"
    if len(seeds) == 1:
        return f"{shown} (1 seed)"
    return f"{shown} ± {stdev(differences) / len(seeds) ** 0.5:.{digits}f} ({len(seeds)} seeds)"


def _print_differences(runs: Sequence[dict], others: Sequence[dict]) -> None:
    """Print how two groups of runs differ, paired by seed. Raises UserError for groups that cannot be paired."""
    groups: list[dict[int, dict]] = [{}, {}]
    for group, members in zip(groups, (runs, others), strict=True):
        for run in members:
            seed = run.get("config", {}).get("seed")
            if seed is None or seed in group:
                raise UserError(
                    f"{run['experiment']}: {'no seed' if seed is None else f'seed {seed} twice'} in a group to compare"
                )
            group[seed] = run
    seeds = sorted(groups[0].keys() & groups[1].keys())
    if not seeds:
        raise UserError("--against: the two groups have no seed in common")
    print(f"differences to --against, mean ± standard error, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}:")
    for name, label in (UNSEEN_SCORES | SCORES).items():
        scores, reference = (
            {seed: 100 * run[name] for seed, run in group.items() if run.get(name) is not None} for group in groups
        )
        if scores.keys() & reference.keys():
            print(f"  {label} {describe_difference(scores, reference)}")


def tabulate(
    folders: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN ...", help="Folders of finished runs, a row each.", help_behavior_hint="(required)"),
    ],
    against: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(metavar="RUN ...", help="Other runs: say how the first differ from these, paired by seed."),
    ] = (),
) -> None:
    """One table of several runs on the same held-out videos: their victims, their students, chance."""
    if not folders:
        raise UserError("name the folder of a run, or several: python -m extraction.evaluation.results RUN ...")
    num_first, folders = len(folders), (*folders, *against)
    runs = [read_results(folder) | (read_run(folder) or {}) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        for name, default in (("num_val_videos", None), ("num_val_clips", "num_val_videos"), ("chance_top1", None)):
            first, own = (other.get(name, other.get(default)) for other in (runs[0], run))
            if own != first:
                raise UserError(
                    f"{folders[0]} and {folder} differ in {name}: {first:.4g} and {own:.4g}; "
                    "only scores on the same held-out videos go into one table"
                )
    print_results(*runs)
    if against:
        _print_differences(runs[:num_first], runs[num_first:])


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(tabulate, prog="python -m extraction.evaluation.results"))
