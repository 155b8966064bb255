"""What every attack starts from: the victim's door with its ledger, and a evaluator on held-out clips."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extraction.compute import Compute
from extraction.data.clips import Clips
from extraction.data.folders import find_videos, require_folder
from extraction.errors import BudgetExhausted, UserError
from extraction.evaluation import Evaluator
from extraction.generators import GENERATORS
from extraction.ledger import Ledger
from extraction.report import print_results
from extraction.runs import Run
from extraction.students import Student, load_student, require_student
from extraction.victims import Victim, load_model


def require_inputs(config: Any, stage: bool = False) -> None:
    """Raise UserError for a student that is none and for files of `config` that are missing, before the work of a run begins.

    A `stage` goes on from the student that an earlier one saved.
    """
    require_student(config.student)
    if config.student_weights is not None and not Path(config.student_weights).is_file():
        instead = (
            "this stage goes on from the one before; run that first, or give another file"
            if stage
            else "put them there, pass --student-weights None to start from nothing, or try --demo"
        )
        raise UserError(f"student weights {config.student_weights} not found: {instead}")
    require_lists(config)


def require_lists(config: Any) -> None:
    """Raise UserError for a list of videos that is missing."""
    for name in ("own_list", "data_list", "val_list"):
        listing = getattr(config, name, None)
        if listing is not None and not Path(re.sub(r":\d+$", "", listing)).exists():  # HMDB51's folder has a number after it
            raise UserError(f"list {listing} not found: --{name.replace('_', '-')} names the videos to use")


def require_generator(name: str) -> None:
    """Raise UserError when no generator that can learn is called so."""
    learning = [known for known in GENERATORS if known != "noise"]
    if name not in learning:
        raise UserError(f"no generator that learns is called {name!r}; there are {', '.join(learning)}")


def repeat_results(results: dict) -> dict:
    """Print the table of a run that has ended. Raises BudgetExhausted, as it did then, when the query budget ended it."""
    print_results(results)
    if results["stopped"] not in ("epochs", "iterations"):
        raise BudgetExhausted(results["stopped"])
    return results


def open_setting(
    run: Run,
    compute: Compute,
    *,
    victim: str,
    victim_weights: str | None,
    answers: str,
    query_budget: int | None,
    val: str | Path,
    val_list: str | None,
    min_victim_top1: float | None,
    num_frames: int,
    stride: int,
    size: int,
    batch_size: int,
    num_workers: int,
    decimals: int | None = None,
    exact: bool = False,
) -> tuple[Ledger, Evaluator]:
    """Open the metered, answers-only victim of `run`, and the evaluator that scores students on the videos of `val`.

    The evaluator looks at the middle clip of each video, `num_frames` frames every `stride`, `size` x `size` pixels.
    `exact` keeps all the digits of the victim's answers.
    Raises UserError, before anything is paid, for what is missing and for a victim near chance (`check_victim`).
    """
    require_folder(val, "held-out labelled videos of the victim's task, in class folders,")
    ledger = Ledger(
        run.folder / "ledger.sqlite",
        lambda spent: Victim(compute.prepare(load_model(victim, victim_weights)), answers, query_budget, decimals, spent),
        answers,
        decimals,
        exact,
    )
    videos = find_videos(val, ledger.classes, "val", val_list)
    clips = Clips(videos, num_frames=num_frames, stride=stride, size=size, views=(1, 1))
    evaluator = Evaluator(
        clips, ledger.classes, compute.device, batch_size, num_workers, ledger,
        lambda: compute.prepare(load_model(victim, victim_weights)), min_victim_top1,
    )  # fmt: skip
    return ledger, evaluator


# Where the seeds' unrelated video is, and what stands in for it in the demo.
UNRELATED = {
    "ucf101": ("datasets/UCF-101", "datasets/demo/unrelated_a"),
    "hmdb51": ("datasets/hmdb51", "datasets/demo/unrelated_b"),
    "moments_in_time": ("datasets/Moments_in_Time_Raw", "datasets/demo/unrelated_a"),
}


def find_unrelated(names: Sequence[str], demo: bool = False) -> list[Path]:
    """The folders of unrelated video: a name of `UNRELATED`, or a folder as it is. Raises UserError for a missing one."""
    folders = [UNRELATED[name][demo] if name in UNRELATED else name for name in names]
    return [require_folder(folder, f"unrelated video ({', '.join(UNRELATED)})") for folder in folders]


def load_stage(name: str, weights: str | Path, classes: Sequence[str], compute: Compute) -> tuple[Student, int]:
    """A student as an earlier stage saved it, head and all, and the queries it has cost so far.

    Raises UserError when the file is missing, holds another student, or was made for other classes than the victim's.
    """
    student, about = load_student(name, weights)
    if tuple(about.get("classes", ())) != tuple(classes):
        raise UserError(f"{weights}: a student of {student.num_classes} other classes than the victim's {len(classes)}")
    return compute.prepare(student), about.get("num_queries", 0)
