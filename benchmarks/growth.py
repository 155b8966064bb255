"""What grows with the size of an attack: starting over many videos, the ledger's answers, decoded clips that are kept.

    python benchmarks/growth.py
    python benchmarks/growth.py --videos 1000 --answers 10000 --clips 10000

Videos are hard links to those of the demo set, so that they cost no disk and yet are files of their own. Answers have the
probabilities of 400 classes, 10 000 of them in a transaction; then batches of 16 are found and kept. Clips are of 8x8 pixels:
what their number costs shows, not what their pixels do.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from extraction import options
from extraction.data.cache import ClipCache, Source, open_cache
from extraction.data.clips import Clips
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.folders import find_videos
from extraction.experiment import run_script
from extraction.victims.ledger import Ledger, encode_answers

NUM_CLASSES, BATCH, TIMES = 400, 16, 50


@dataclass(frozen=True, kw_only=True)
class Config:
    videos: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of videos."""
    answers: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Numbers of answers in a ledger."""
    clips: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Numbers of clips that are kept."""
    folder: str | None = None
    """Where all that is made, and removed again; by default a temporary folder beside the demo set."""


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def take_ms(run: Callable[[int], object]) -> float:
    """The median of some runs, in ms, numbered as they come."""
    return 1e3 * median(seconds(lambda k=k: run(k)) for k in range(TIMES))


def measure_videos(folder: Path, count: int) -> str:
    """Two starts over `count` videos in class folders: the first looks into each, the second into none."""
    sources = sorted(write_demo_set("datasets/demo", ATTACK_SPLITS).glob("unrelated_*/**/*.mp4"))
    for k in range(count):
        path = folder / "videos" / f"class_{k % 100}" / f"{k}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[k % len(sources)], path)
    cache = ClipCache(folder / "clip_cache", 1.0)

    def start() -> None:
        Clips(find_videos(folder / "videos", None), num_frames=16, cache=cache)

    first, second = seconds(start), seconds(start)
    size = (folder / "clip_cache" / "probes.sqlite").stat().st_size / 1e6
    return f"| {count} | {first:.1f} s | {second:.2f} s | {size:.1f} MB |"


def measure_ledger(folder: Path, count: int) -> str:
    """Opening a ledger of `count` answers, finding a batch in it, keeping one more."""
    names = tuple(f"class {k}" for k in range(NUM_CLASSES))
    victim: Any = SimpleNamespace(name="victim", fingerprint="0", classes=names, query_budget=None, records=[])
    rows = encode_answers(torch.rand(10_000, NUM_CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1), "probs")
    draw = np.random.default_rng(0)
    keys = [draw.bytes(16) for _ in range(count + BATCH * TIMES)]

    def open_ledger() -> Ledger:
        return Ledger(folder / "ledger.sqlite", lambda num_queries: victim, "probs")

    ledger = open_ledger()
    for i in tqdm(range(0, count, len(rows)), desc=f"{count} answers", leave=False):
        ledger._keep(dict(zip(keys[i : min(i + len(rows), count)], rows, strict=False)))
    ledger.close()
    size = sum(path.stat().st_size for path in folder.glob("ledger.sqlite*")) / 1e9
    opening = seconds(lambda: open_ledger().close())
    ledger, places = open_ledger(), draw.integers(0, count, (TIMES, BATCH))
    finding = take_ms(lambda k: ledger.find([keys[place] for place in places[k]]))
    keeping = take_ms(lambda k: ledger._keep(dict(zip(keys[count + k * BATCH :][:BATCH], rows, strict=False))))
    ledger.close()
    return f"| {count} | {size:.2f} GB | {opening:.2f} s | {finding:.2f} ms | {keeping:.2f} ms |"


def measure_clips(folder: Path, count: int) -> str:
    """Opening a file of `count` kept clips; writing and reading one of them."""
    (folder / "video").touch()
    sources = [Source(str(k), [folder / "video"]) for k in range(count)]
    cache, clip = ClipCache(folder / "clips", 100.0), np.zeros((4, 8, 8, 3), np.uint8)
    begin = time.perf_counter()
    kept = open_cache(cache, sources, clip.shape)
    opening = time.perf_counter() - begin
    assert kept is not None
    places = np.random.default_rng(0).integers(0, count, TIMES).tolist()
    writing = take_ms(lambda k: kept.write(places[k], kept.name(places[k]), clip))
    reading = take_ms(lambda k: kept.read(places[k], clip))
    return f"| {count} | {kept.file_size / 1e9:.2f} GB | {opening:.2f} s | {writing:.2f} ms | {reading:.2f} ms |"


def main(config: Config) -> None:
    options.check_options(config)
    parts: list[tuple[str, Callable[[Path, int], str], tuple[int, ...]]] = [
        ("| videos | first start | second start | index |", measure_videos, config.videos),
        (f"| answers | file | opening | finding {BATCH} | keeping {BATCH} |", measure_ledger, config.answers),
        ("| clips kept | file | opening | writing one | reading one |", measure_clips, config.clips),
    ]
    write_demo_set("datasets/demo", ATTACK_SPLITS)
    for head, measure, counts in parts:
        print(f"\n{head}\n|{' --- |' * (head.count('|') - 1)}")
        for count in counts:
            # On the disk of the demo set: only there can its videos be linked.
            folder = Path(tempfile.mkdtemp(prefix="growth-", dir=config.folder or "datasets"))
            try:
                print(measure(folder, count), flush=True)
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main, Config)
