"""What defences and detectors cost: beside a victim's step, and as what they remember grows.

python benchmarks/defences.py
python benchmarks/defences.py --demo

The step is Video Swin-T's with random weights, on a batch of clips of 32 x 224 x 224, answered in 400 classes. Thumbnails are a
defence's cost too. What has memory is timed on random answers and thumbnails, the worst case: few are alike.

With --demo: what defences cost honest users of the demo's victim, how often keyed randomness returns for nearly equal clips,
and when detectors raise their alarm on the demo's clips (docs/defences.md).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from operator import eq
from typing import Any

import torch
from torch import Tensor

from extraction import options
from extraction.data.augment import Augmentation, create_views, view_key
from extraction.data.clips import Clips, ClipShape, load_batches
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation.honest import fit_detector
from extraction.evaluation.scoring import predict_videos
from extraction.experiment import run_script
from extraction.network import VideoModel
from extraction.victims import swin
from extraction.victims.defences import DEFENCES, Defence, Quantiser, derive_key, fit_defence, mark
from extraction.victims.detectors import (
    DETECTORS,
    Confidence,
    NearDuplicates,
    Prada,
    Quota,
    Stream,
    first_alarm,
    thumbnail,
)  # fmt: skip
from extraction.victims.query_interface import VictimModel
from extraction.victims.wire import send
from extraction.victims.zoo import find_weights, load_model

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
    demo: bool = False
    """Measure on the demo's victim and clips instead: costs in L1, marks and alarms."""


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


def answer(clips: Clips, model: VictimModel, num_views: int = 1) -> tuple[Tensor, Stream]:
    """The clips, float (B, 3, T, H, W), and what a detector sees of them: in random order, one view of each after the other."""
    augmentation = Augmentation(0.0, 0.1, 3.0) if num_views > 1 else Augmentation(0.0, 0.0, 0.0)
    sent, answers = [], []
    for view in range(num_views):
        order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(view)).tolist()
        for batch in load_batches(clips, [order[i : i + 32] for i in range(0, len(order), 32)], 0):
            keys = [view_key(0, clips.refs[i].key, view, augmentation) for i in batch.indices]
            sent.append(create_views(batch.clips, keys, augmentation))
            answers.append(model(sent[-1]).softmax(1))
    return torch.cat(sent), Stream(torch.cat([thumbnail(batch) for batch in sent]), torch.cat(answers))


def measure_on_demo() -> None:
    write_demo_set("datasets/demo", ATTACK_SPLITS)
    model, shape = load_model("demo_swin"), ClipShape(num_frames=16, stride=1, size=48)
    val = Clips(find_videos("datasets/demo/val", model.classes, "val"), views=(1, 1), **shape)
    own = Clips(find_videos("datasets/demo/train_5per", model.classes, "train"), clip_interval=16, **shape)
    aux = Clips(find_videos("datasets/demo/unrelated_a", None), clip_interval=16, **shape)
    probs = predict_videos(model, val, "cpu").probs  # in the clips' order, as scripts fit to them
    clips, honest = answer(val, model)
    key = derive_key(find_weights("demo_swin") or "")
    print(f"{len(val)} held-out answers, median confidence {probs.amax(1).median().item():.4f}")
    for strength, (name, kind) in product((0.1, 0.3), DEFENCES.items()):
        if kind.most is None:
            continue
        try:
            found = fit_defence(name, strength, probs, key)
        except UserError as error:
            print(f"{name} at L1 {strength}: {error}")
            continue
        cost = f"L1 {found['l1']:.3f}, {100 * found['flips']:.1f} % of top classes changed"
        print(f"{name} at L1 {strength}: parameter {found['parameter']:.4g}, {cost}")
    marks = mark(honest.thumbnails, honest.probs)
    print(f"marks: {len(set(marks))} of {len(marks)} clips have one of their own")
    noise = torch.randint(-1, 2, clips.shape, generator=torch.Generator().manual_seed(0)) / 255
    changed = {
        "noise of a level": (clips + noise).clamp(0, 1),
        "H.264 at CRF 23": send(clips, "h264:23"),
        "a shift by a pixel": clips.roll(1, 4),
    }
    for name, others in changed.items():
        again = mark(thumbnail(others), torch.cat([model(batch).softmax(1) for batch in others.split(32)]))
        print(f"marks after {name}: {100 * sum(map(eq, marks, again)) / len(marks):.0f} % the same")
    once, unrelated = answer(own, model)[1], answer(aux, model)[1]
    streams = {
        "held-out clips once": honest,
        "in-domain clips once": once,
        "in-domain clips, 6 views of each": answer(own, model, 6)[1],
        "unrelated clips once": unrelated,
        "in-domain, then unrelated, once": Stream(*(torch.cat(pair) for pair in zip(once[:2], unrelated[:2], strict=True))),
    }
    for after in ("prada:0.9", "near_duplicates", "confidence"):
        name, constants = fit_detector(after, val, probs)
        for what, stream in streams.items():
            alarm = first_alarm(DETECTORS[name].create(**constants), stream)
            print(f"{after}, {what} ({len(stream.probs)}): alarm at {alarm}", flush=True)


@torch.no_grad()
def main(config: Config) -> None:
    options.check_options(config)
    torch.manual_seed(0)
    if config.demo:
        measure_on_demo()
        return
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
    run_script(main, Config, dict(demo=True))
