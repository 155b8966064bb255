"""Clips cut out of videos, and batches of uint8 on their way to the device."""

import hashlib
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from extraction.data.cache import ClipCache, Source, open_cache
from extraction.data.decoding import Broken, Unreadable, decode_clip
from extraction.data.folders import Video
from extraction.data.probes import probe_videos
from extraction.errors import UserError, printable


class ClipShape(TypedDict):
    """Frames, temporal stride (or, instead of it, frames a second) and pixels a side of a clip."""

    num_frames: int
    stride: int
    size: int
    fps: NotRequired[float | None]


class ClipOptions(ClipShape):
    """What `Clips` takes beside its videos in all scripts: the shape of a clip, and where decoded clips are kept."""

    cache: ClipCache | None


class Cut(TypedDict):
    """What `Clips` takes to cut the videos that a student is trained on."""

    clip_interval: int
    num_clips: int | None
    seed: int


class ClipRef(NamedTuple):
    """Where a clip starts, and what it shows: the unit that is asked about and answered."""

    path: Path
    start: int  # first frame
    label: int  # -1 without one
    key: str  # names the clip's content for the ledger
    video: int  # clips of one video share it
    crop: float = 0.5  # where along the long side the square is cut
    stride: int = 1


def name_clip(fingerprint: str, start: int, num_frames: int, stride: int, size: int | None, crop: float) -> str:
    """The `ClipRef.key` of a clip: the video's content and all that decides which pixels of it are shown."""
    return f"{fingerprint}:{start}:{num_frames}x{stride}:{size}:{crop}"


class Clips(Dataset):
    """The clips of a list of videos: `num_frames` frames at a temporal stride, `size` x `size` pixels, a new clip every
    `clip_interval` frames.

    With `fps` the stride is each video's own instead: round(its frame rate / fps), at least 1. So clips of footage of mixed
    rates take as near to `fps` frames a second as every n-th frame comes.

    With `views=(N, M)` each video gives N clips spread evenly over its length, each in M crops along the long side: the
    way videos are scored. With `num_clips` it is that many of all, at most, drawn from `seed`: a smaller number's are among a
    larger one's. With `cache` clips of a given size are decoded once and kept (`extraction.data.cache`). `broken`
    lists the videos that were left out, each with its reason; UserError is raised when that leaves a class empty.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        num_frames: int,
        stride: int = 1,
        clip_interval: int | None = None,
        size: int | None = None,
        views: tuple[int, int] | None = None,
        cache: ClipCache | None = None,
        desc: str = "looking at videos",
        fps: float | None = None,
        num_clips: int | None = None,
        seed: int = 0,
    ):
        counts = dict(num_frames=num_frames, stride=stride, clip_interval=clip_interval, size=size, num_clips=num_clips)
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        self.num_frames, self.stride, self.size, self.fps = num_frames, stride, size, fps
        self.refs: list[ClipRef] = []
        self.broken: list[tuple[Path, str]] = []
        self.num_videos = 0  # those that can be read
        kept_in = cache.folder if cache is not None and cache.max_gb else None
        for video, found in zip(videos, probe_videos([video.path for video in videos], kept_in, desc), strict=True):
            if fps and not isinstance(found, str) and not found.fps:
                found = "no frame rate in the file, which --fps wants"
            if isinstance(found, str):
                self.broken.append((video.path, found))
                continue
            if fps and found.fps:
                stride = max(1, round(found.fps / fps))
            last = max(0, found.num_frames - ((num_frames - 1) * stride + 1))
            if views:
                starts = [round(last * (k + 0.5) / views[0]) for k in range(views[0])]
                crops = [0.5] if views[1] == 1 else [k / (views[1] - 1) for k in range(views[1])]
            else:
                starts, crops = list(range(0, last + 1, clip_interval or num_frames * stride)), [0.5]
            for start in starts:
                for crop in crops:
                    key = name_clip(found.fingerprint, start, num_frames, stride, size, crop)
                    self.refs.append(ClipRef(video.path, start, video.label, key, self.num_videos, crop, stride))
            self.num_videos += 1
        self._refuse_empty_classes(videos)
        if num_clips is not None:
            ranks = [hashlib.blake2b(f"{seed}:{ref.key}".encode(), digest_size=8).digest() for ref in self.refs]
            drawn = sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:num_clips])
            self.refs = [self.refs[i] for i in drawn]
        self.cache = cache
        self.kept = None
        if size:
            self.kept = open_cache(cache, [Source(ref.key, [ref.path]) for ref in self.refs], (num_frames, size, size, 3))

    def _refuse_empty_classes(self, videos: Sequence[Video]) -> None:
        lost = {video.label for video in videos} - {ref.label for ref in self.refs}
        for video in videos:
            if video.label in lost:
                reason = next(reason for path, reason in self.broken if path == video.path)
                raise UserError(f"{video.path.parent}: none of its videos can be read ({video.path.name}: {reason})")

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Broken]:
        """The clip as uint8 (T, H, W, 3), or the file that it can't be had from."""
        ref = self.refs[index]
        decode = partial(decode_clip, ref.path, ref.start, self.num_frames, ref.stride, self.size, ref.crop)
        try:
            return index, self.kept.get(index, decode) if self.kept else decode()
        except Unreadable as error:
            return index, Broken(ref.path, str(error))


class Batch(NamedTuple):
    """Clips that could be decoded, of those a sampler asked for."""

    indices: list[int]
    clips: Tensor  # uint8 (B, T, H, W, C)
    broken: list[Broken]  # what could not


def collate(items: list[tuple[int, np.ndarray | Broken]]) -> Batch:
    good = [(index, clip) for index, clip in items if not isinstance(clip, Broken)]
    clips = torch.from_numpy(np.stack([clip for _, clip in good])) if good else torch.empty(0, dtype=torch.uint8)
    return Batch([index for index, _ in good], clips, [clip for _, clip in items if isinstance(clip, Broken)])


def count_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_batches(
    dataset: Any, batches: Iterable[Sequence[int]], num_workers: int, pin_memory: bool = False, prefetch: int = 2
) -> Iterator[Batch]:
    """A `Batch` for each list of indices in `batches`, in order, decoded in `num_workers` processes.

    Once all of the dataset is kept on disk as many threads read it instead: handing a clip over from another process takes
    longer than reading it. There are never more workers than cores. Each is up to `prefetch` batches ahead; more than 2 is not
    faster (`benchmarks/loader.py`), and every batch ahead takes its place in shared memory. When a worker is killed (the system
    does so when memory is short) all are started again from the batch that is missing; the fourth time raises UserError.
    """
    loaded = load_with_pauses(dataset, batches, num_workers, pin_memory, prefetch)
    return (batch for batch in loaded if batch is not None)


def load_with_pauses(
    dataset: Any, batches: Iterable[Sequence[int]], num_workers: int, pin_memory: bool = False, prefetch: int = 2
) -> Iterator[Batch | None]:
    """`load_batches` for a thread beside one that computes: None comes before workers are started again.

    A process that forks while another of its threads computes leaves locks held for ever in the child, which then hangs. After
    None, ask for the next batch when nothing else runs.
    """
    num_workers, source = min(num_workers, count_cores()), iter(batches)
    kept = getattr(dataset, "kept", None) if num_workers else None
    to_read: list[Sequence[int]] = []

    def until_complete() -> Iterator[Sequence[int]]:
        for batch in source:
            if kept is not None and kept.complete():
                to_read.append(batch)
                return
            yield batch

    if kept is None or not kept.complete():  # no process is started for nothing
        yield from _load_in_processes(dataset, until_complete(), num_workers, pin_memory, prefetch)
    yield from _load_in_threads(dataset, itertools.chain(to_read, source), max(1, num_workers), pin_memory, prefetch)


def _load_in_threads(
    dataset: Any, batches: Iterable[Sequence[int]], num_threads: int, pin_memory: bool, prefetch: int
) -> Iterator[Batch]:
    def load(batch: Sequence[int]) -> Batch:
        loaded = collate([dataset[index] for index in batch])
        return loaded._replace(clips=loaded.clips.pin_memory()) if pin_memory else loaded

    source, waiting = iter(batches), deque[Future[Batch]]()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            while True:
                waiting.extend(
                    pool.submit(load, batch) for batch in itertools.islice(source, prefetch * num_threads - len(waiting))
                )
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _load_in_processes(
    dataset: Any, batches: Iterator[Sequence[int]], num_workers: int, pin_memory: bool, prefetch: int
) -> Iterator[Batch | None]:
    waiting = deque[Sequence[int]]()

    def remember() -> Iterator[Sequence[int]]:
        for batch in batches:
            waiting.append(batch)
            yield batch

    for attempt in range(4):
        loader = DataLoader(
            dataset,
            batch_sampler=itertools.chain(list(waiting), remember()),  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if num_workers else None,
            worker_init_fn=_start_worker,
            timeout=2 if num_workers else 0,  # how often workers are looked after
        )
        loaded = iter(loader)
        if num_workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise wherever the program is
        error = yield from _iterate(loaded, waiting)
        if error is None:
            return
        line = f"a loader worker was killed, for want of memory perhaps, or is stuck ({error})"
        if attempt == 3:
            raise UserError(f"{line}, four times now; lower --num-workers, then run the same again")
        print(f"\n{line}; starting the workers again", file=sys.stderr)
        del loaded  # ends the other workers
        yield None


def _iterate(loaded: Iterator[Batch], waiting: deque[Sequence[int]]) -> Generator[Batch, None, str | None]:
    """Yield batches, taking each off `waiting`. Returns what became of the workers, None at the end of the batches."""
    started = time.monotonic()
    while True:
        try:
            batch = next(loaded)
        except StopIteration:
            return None
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # the worker went while its batch was read
            return type(error).__name__
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            if not re.search(r"DataLoader (worker|timed out)", line):
                raise
            if "timed out" in line and time.monotonic() - started < 600:  # slow, or waiting for lost shared memory for ever
                continue
            return line
        waiting.popleft()
        yield batch
        started = time.monotonic()


def _start_worker(_number: int) -> None:
    # Ctrl-C reaches a whole group of processes; the loop decides when to end, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def name_once(broken: Iterable[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Each file with the first of its reasons: every clip of a damaged one has a reason of its own."""
    reasons: dict[Path, str] = {}
    for path, reason in broken:
        reasons.setdefault(path, reason)
    return list(reasons.items())


def report_broken(broken: Sequence[tuple[Path, str]], limit: int = 10) -> None:
    """Say at the end which files were left out, and why, each once."""
    if not broken:
        return
    broken = name_once(broken)
    print(f"left out {len(broken)} unreadable file{'s' if len(broken) > 1 else ''}:")
    for path, reason in broken[:limit]:
        print(f"  {printable(path)}: {printable(reason)}")
    if len(broken) > limit:
        print(f"  ... and {len(broken) - limit} more, all in results.json")
