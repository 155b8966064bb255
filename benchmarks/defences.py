"""What defences and detectors cost: beside a victim's step, and as what they remember grows.

python benchmarks/defences.py

The step is Video Swin-T's with random weights, on a batch of clips of 32 x 224 x 224, answered in 400 classes. Thumbnails are a
defence's cost too. What has memory is timed on random answers and thumbnails, the worst case: few are alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from extraction import options
from extraction.experiment import run_script
from extraction.network import VideoModel
from extraction.victims import swin
from extraction.victims.defences import DEFENCES, Defence, Quantiser
from extraction.victims.detectors import Confidence, NearDuplicates, Prada, Quota, Stream

MEMORIES: dict[str, Callable[[], Any]] = {
    "quota": lambda: Quota(10**9),
    "prada": lambda: Prada(-1.0),
    "near_duplicates": lambda: NearDuplicates(-1.0, [1000.0, 1.0]),
    "confidence": lambda: Confidence([1.0] * 10 + [0.0], 9.0),
    "modelguard_s": Quantiser,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: options.Count = 16
    """Clips of a batch."""
    size: options.Count = 224
    """Height and width of a clip, in pixels."""
    sizes: tuple[int, ...] = (1000, 10_000, 100_000)
    """How many queries what has memory has seen when it is timed."""
    repeats: options.Count = 3
    """Batches timed; the best counts."""


def time_best(repeats: int, run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of several runs."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - begin))
    return min(found)


def draw_queries(count: int) -> Stream:
    probs = (3 * torch.randn(count, 400)).softmax(1)
    return Stream(torch.randint(0, 256, (count, 3, 4, 8, 8), dtype=torch.uint8), probs)


def feed(memory: Any, queries: Stream) -> None:
    _ = memory(queries.probs, 0.3) if isinstance(memory, Quantiser) else memory.observe(queries)


@torch.no_grad()
def main(config: Config) -> None:
    options.check_options(config)
    torch.manual_seed(0)
    net = VideoModel(swin.FusedSwin(swin.create_swin("swin_t", 400)), 32, config.size, swin.MEAN, swin.STD).eval()
    clips = torch.rand(config.batch_size, 3, 32, config.size, config.size)
    probs = draw_queries(config.batch_size).probs
    net(clips[:1])
    one = time_best(config.repeats, lambda: net(clips[:1]))
    step = one * config.batch_size  # a clip at a time is as fast on a CPU, and fits into little memory
    print(f"Swin-T, {config.batch_size} clips of 32x{config.size}x{config.size}: {step:.0f} ms", flush=True)
    for name in DEFENCES:
        defence = Defence(dict(name=name, parameter=0.3), bytes(32))
        cost = time_best(config.repeats, lambda defence=defence: defence(clips, probs))
        print(f"{name}: {cost:.1f} ms, {100 * cost / step:.2f} % of the step", flush=True)
    for name, create in MEMORIES.items():
        memory, seen = create(), 0
        found = []
        for size in config.sizes:
            while seen < size:
                queries = draw_queries(min(1000, size - seen))
                feed(memory, queries)
                seen += len(queries.probs)
            more = draw_queries(100)
            found.append(f"{time_best(1, lambda memory=memory, more=more: feed(memory, more)) / 100:.3f}")
            seen += 100
        print(f"{name}: {', '.join(found)} ms a query after {', '.join(map(str, config.sizes))}", flush=True)


if __name__ == "__main__":
    run_script(main, Config)
