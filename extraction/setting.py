"""What every attack starts from: the victim's door with its ledger, and a referee on held-out clips."""

from pathlib import Path

import torch

from extraction.data.clips import Clips
from extraction.data.folders import find_videos, require_folder
from extraction.evaluation import Referee
from extraction.ledger import Ledger
from extraction.runs import Run
from extraction.victims import load_model, load_victim


def open_setting(
    run: Run,
    device: torch.device,
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
) -> tuple[Ledger, Referee]:
    """Open the metered, answers-only victim of `run`, and the referee that scores students on the videos of `val`.

    The referee looks at the middle clip of each video, `num_frames` frames every `stride`, `size` x `size` pixels.
    Raises Stop, before anything is paid, for what is missing and for a victim near chance (`check_victim`).
    """
    require_folder(val, "held-out labelled videos of the victim's task, in class folders,")
    ledger = Ledger(
        run.folder / "ledger.sqlite",
        lambda spent: load_victim(victim, victim_weights, answers, query_budget, device, num_queries=spent),
        answers,
    )
    videos = find_videos(val, ledger.classes, "val", val_list)
    clips = Clips(videos, num_frames=num_frames, stride=stride, size=size, views=(1, 1))
    referee = Referee(
        clips, ledger.classes, device, batch_size, num_workers, ledger,
        lambda: load_model(victim, victim_weights, device), min_victim_top1,
    )  # fmt: skip
    return ledger, referee
