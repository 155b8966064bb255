"""How fast epochs over cached answers go: with clips that are decoded in each of them, and with clips kept on disk.

python benchmarks/epochs.py
python benchmarks/epochs.py --data datasets/hmdb51 --num-frames 16 --stride 2 --size 112 --clip-interval 64

`Training` as the scripts run it, over the clips of a folder of videos, into a small student. The victim answers in the first
epoch, which isn't timed; `before` decodes each clip in every epoch, in small pages of memory, `kept` reads what
`extraction.data.cache` keeps, clips and their views, in huge pages. Each row is a process of its own, and all take turns, so
that a slow moment of the machine hits all; on a busy one CPU time is the figure to read. All students must be the same bit for
bit: the run ends with status 1 where they aren't.
"""

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import side_by_side as bench
import torch
from drawn_videos import draw_videos
from tqdm import tqdm

from extraction import options
from extraction.attacks import distill
from extraction.attacks.distill import Training
from extraction.attacks.losses import kl_divergence
from extraction.compute import choose_compute
from extraction.data.augment import Augmentation
from extraction.data.cache import ClipCache
from extraction.data.clips import Clips, count_cores, load_batches
from extraction.data.folders import EXTENSIONS, Video, require_folder
from extraction.data.queries import QuerySet
from extraction.errors import UserError
from extraction.experiment import run_script
from extraction.runs import Run
from extraction.students import create_student

WAYS = ("before", "kept")


@dataclass(frozen=True, kw_only=True)
class Config(options.ComputeOptions):
    data: str | None = None
    """A folder of videos; by default four of ten seconds are drawn."""
    student: str = "r2plus1d_tiny"
    """The student's network: an unknown name lists them."""
    num_frames: options.Count = 16
    """Frames of a clip."""
    stride: options.Count = 6
    """Temporal stride: a clip takes every n-th frame of a video."""
    clip_interval: options.Count = 48
    """Frames from the start of a clip to the start of the next."""
    size: options.Count = 112
    """Height and width of a clip, in pixels."""
    epochs: options.Count = 2
    """Epochs that are timed, in each turn; views are kept from two on."""
    turns: options.Count = 3
    """How often each row is timed; medians count."""
    workers: tuple[int, ...] = ()
    """Loader workers to try; by default 0, 1, 2, 4, ... up to the number of cores."""
    hflip: options.Fraction = 0.5
    """Probability of a horizontal flip."""
    rotation: options.Rate = 15.0
    """Random rotation, in degrees, either way at most."""
    row: str | None = None
    """Time one row, before or kept, and print it as JSON."""
    folder: str | None = None
    """With --row: where its clips and its answers are kept."""


def find_clips(config: Config, cache: ClipCache | None = None) -> Clips:
    root = require_folder(config.data or "", "videos")
    videos = [Video(path, 0) for path in sorted(root.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not videos:
        raise UserError(f"{root}: no video in it")
    return Clips(videos, config.num_frames, config.stride, config.clip_interval, config.size, cache=cache)


def cpu_seconds() -> float:
    """CPU time of this process and of its workers, those that live on and those that have ended."""
    total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def time_row(config: Config, folder: Path) -> dict:
    """Seconds and CPU seconds of a clip in each epoch but the first, and the student's fingerprint at the end."""
    compute = choose_compute(config.device, config.precision, config.compile)
    clips = find_clips(config, ClipCache(folder / "clips", 1000) if config.row == "kept" else None)
    ledger = bench.open_ledger(folder, bench.SCALES["demo"], compute)
    torch.manual_seed(0)
    student = compute.prepare(create_student(config.student, ledger.num_classes))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    queries = QuerySet(clips, Augmentation(config.hflip, 0.1, config.rotation), 1)
    distill.tqdm = partial(tqdm, disable=True)
    epochs, marks = 1 + config.epochs, list[tuple[float, float]]()
    with tempfile.TemporaryDirectory() as out_dir, contextlib.redirect_stdout(None):
        training = Training(
            Run("benchmark", out_dir, config, math.inf), student, optimizer, schedule, None, ledger, queries, epochs,
            config.batch_size, config.num_workers,
        )  # fmt: skip
        for batch in training:
            training.step(kl_divergence(training.forward(batch.clips), batch.targets))
            bench.synchronise(compute.device)
            if (batch.number + 1) % training.order.per_epoch == 0:
                marks.append((time.perf_counter(), cpu_seconds()))
    if ledger.num_queries != len(clips):
        raise UserError(f"{ledger.num_queries} queries for {len(clips)} clips: this is not what is timed")
    weights = b"".join(weight.detach().cpu().numpy().tobytes() for weight in student.state_dict().values())
    times = [[(after - before) / len(clips) for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]
    return dict(times=times, student=hashlib.sha256(weights).hexdigest()[:16])


def measure_floors(config: Config) -> dict[str, float]:
    """Clips a second of the parts, each alone on one thread."""
    clips = find_clips(config)
    few = list(range(0, len(clips), max(1, len(clips) // 32)))
    rates = {}
    begin, decoded = time.perf_counter(), []
    for batch in load_batches(clips, [few], 0):
        decoded = list(batch.clips)
    rates["decoding, one core"] = len(decoded) / (time.perf_counter() - begin)
    pixels = torch.stack(decoded)
    into, seconds = torch.empty_like(pixels), []
    for _ in range(10):
        begin = time.perf_counter()
        np.copyto(into.numpy(), pixels.numpy())
        seconds.append(time.perf_counter() - begin)
    rates["copying pixels in memory"] = len(pixels) / min(seconds)
    with tempfile.TemporaryDirectory() as folder:
        kept = find_clips(config, ClipCache(Path(folder), 1000))
        for _ in range(2):
            begin = time.perf_counter()
            for index in few:
                kept[index]
            rates["reading kept clips, one thread"] = len(few) / (time.perf_counter() - begin)
    return rates


def main(config: Config) -> None:
    options.check_options(config)
    if config.row is not None:
        if config.row not in WAYS or config.folder is None:
            raise UserError(f"--row {config.row}: write {' or '.join(WAYS)}, and name a --folder")
        print(json.dumps(time_row(config, Path(config.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = config.data or f"{folder}/drawn"
        if config.data is None:
            draw_videos(Path(data), 340, 256)
        compare(config, data, folder)


def compare(config: Config, data: str, folder: str) -> None:
    names = [
        "student", "num_frames", "stride", "clip_interval", "size", "epochs", "hflip", "rotation", "batch_size", "device",
        "precision", "compile",
    ]  # fmt: skip
    given = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]
    workers = config.workers or (0, *(2**k for k in range(count_cores().bit_length())))
    rows: dict[tuple[str, int], list[list[float]]] = {(way, count): [] for way in WAYS for count in workers}
    students = set()
    for turn in range(config.turns):
        for way, count in list(rows)[:: 1 if turn % 2 == 0 else -1]:
            os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(way == "kept"))
            found = bench.run_alone(
                __file__, [*given, f"--data={data}", f"--row={way}", f"--num-workers={count}", f"--folder={folder}"]
            )
            rows[way, count] += found["times"]
            students.add(found["student"])
    medians = {row: [median(column) for column in zip(*times, strict=True)] for row, times in rows.items()}
    best = {way: min((row for row in rows if row[0] == way), key=lambda row: medians[row][0]) for way in WAYS}
    for row, (seconds, cpu) in medians.items():
        slowest, fastest = (1 / extreme(times[0] for times in rows[row]) for extreme in (max, min))
        rate = f"{1 / seconds:7.1f} clips/s ({slowest:.1f} to {fastest:.1f}), {1e3 * cpu:5.1f} ms of CPU a clip"
        print(f"{row[0]:7} {row[1]} workers: {rate}{', its best' * (row in best.values())}")
    (before, cpu_before), (kept, cpu_kept) = (medians[best[way]] for way in WAYS)
    print(f"kept, each at its best: {before / kept:.2f} times as fast by the clock, {cpu_before / cpu_kept:.2f} by CPU time")
    for name, rate in measure_floors(replace(config, data=data)).items():
        print(f"{name:31} {rate:8.1f} clips/s")
    if len(students) > 1:
        raise UserError(f"the students differ: {', '.join(sorted(students))}")
    print(f"all students are equal bit for bit ({students.pop()})")


if __name__ == "__main__":
    run_script(main, Config)
