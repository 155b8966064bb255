"""How fast a student is trained on a victim's answers: our step beside that of 2022, in one process, in turns.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --profile
    python benchmarks/train_step.py --growth --out growth.png

On a GPU at full size (Video Swin-B into R(2+1)D-34), on a CPU at the demo's, where each loop runs on one thread or on all,
whichever is faster. Then: whether fast answers are still the victim's; the run ends with status 1 where they aren't.

The step of 2022: float32, eager, torchvision's Swin as it is, clips made ready on the CPU in float, one at a time, in the
training process, every view asked about anew, the loss read each step; `saving`: the whole student pickled after each.
`networks only` is that without the making ready, its clips lying on the device, as if any number of workers had made them.
Ours is the loop of the scripts, `extraction.attacks.distill.Training`, over clips that need no decoding (`benchmarks/loader.py`
has that): loading, views on the device, the ledger, the victim where the ledger does not know the view (`live`, else
`cached`), the student's step.

Published victims get random weights: they are as fast as trained ones. 2022's float32 is PyTorch's: on a GPU its convolutions
use TF32 and matrix products don't, so that their share of a matrix product's peak can pass 100 %. When a turn of ours ends an
answer is still on its way, at most one more than is counted.
"""

import contextlib
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import side_by_side as bench
import torch
import torch.nn.functional as F
from side_by_side import SCALES, Build, Setting, Step
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from extraction import distributed, options
from extraction.attacks import distill
from extraction.attacks.distill import Training
from extraction.attacks.losses import answers_to_targets, cross_entropy, kl_divergence
from extraction.compute import PRECISIONS, Compute, choose_compute, choose_device
from extraction.data.augment import Augmentation
from extraction.data.clips import ClipRef, Clips, load_batches
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.folders import find_videos
from extraction.data.queries import ClipDataset, QuerySet
from extraction.errors import UserError
from extraction.experiment import run_script
from extraction.network import VideoModel
from extraction.network.names import find_network
from extraction.network.r2plus1d import FlatConv3d
from extraction.runs import Run
from extraction.students import create_student
from extraction.victims import swin
from extraction.victims.query_interface import Victim
from extraction.victims.zoo import load_model

AUGMENTATION, LABEL_WEIGHT, HEAD_LR, BODY_LR = Augmentation(), 10.0, 3e-5, 3e-6
NUM_BATCHES = 2  # different ones, that come round
NUM_STEPS = 2048  # of an epoch; its end logs and saves
MIN_SAME, MAX_DIVERGENCE = 0.995, 1e-3


@dataclass(frozen=True, kw_only=True)
class Config(bench.RaceOptions):
    batch_size: int = 16
    """Clips of a step."""
    num_frames: options.Count | None = None
    """Frames of the clips and of both networks: 32 at full size, 16 in the demo."""
    size: options.Count | None = None
    """Height and width of a clip: 224 and 48. The student's grow with them."""
    demo_set: str = "datasets/demo"
    """Where the clips are that fast and slow answers are compared on; drawn when they aren't there."""
    growth: bool = False
    """Show how our step grows, instead; not compiled but with --compile on, since every point would compile."""
    axes: tuple[str, ...] = ("batch_size", "num_frames", "size", "processes")
    """What --growth varies."""
    out: str = "growth.png"
    """The picture of --growth."""
    num_workers: options.Natural = 0
    """Loader workers of our rows; 0 is 4 on a GPU."""


GROWTH: dict[str, dict[str, tuple[int, ...]]] = {
    "full": dict(batch_size=(4, 8, 16, 32), num_frames=(16, 32, 64), size=(112, 224, 336), processes=(1, 2)),
    "demo": dict(batch_size=(4, 8, 16, 32), num_frames=(8, 16, 32), size=(24, 48, 96), processes=(1, 2)),
}


def choose_setting(config: Config, scale: str) -> Setting:
    setting = SCALES[scale]
    if config.size:
        larger = config.size / setting.size
        decoded = tuple(round(side * larger) for side in setting.decoded)
        setting = setting._replace(size=config.size, student_size=round(setting.student_size * larger), decoded=decoded)
    return setting._replace(num_frames=config.num_frames or setting.num_frames)


# --- the step of 2022 ------------------------------------------------------------------------------------------------


def normalise(frames: Tensor, model: VideoModel) -> Tensor:
    return TF.normalize(frames, model.mean.flatten().tolist(), model.std.flatten().tolist())


def prepare_one(
    clip: Tensor, victim: VideoModel, student: VideoModel, augmentation: Augmentation, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """A decoded clip, uint8 (T, H, W, C), made ready by itself: (C, T, H, W) for the victim and for the student.

    With that year's defaults: resizing without antialias, rotation to the nearest pixel.
    """
    frames = clip.permute(0, 3, 1, 2).float() / 255
    frames = TF.center_crop(TF.resize(frames, victim.size, antialias=False), victim.size)
    if rng.random() < augmentation.hflip:
        frames = TF.hflip(frames)
    frames = TF.adjust_brightness(frames, rng.uniform(1 - augmentation.brightness, 1 + augmentation.brightness))
    frames = TF.rotate(frames, rng.uniform(-augmentation.rotation, augmentation.rotation))
    small = TF.resize(frames, [student.size, student.size], antialias=False)
    return normalise(frames, victim).transpose(0, 1), normalise(small, student).transpose(0, 1)


def build_legacy(config: Config, setting: Setting, compute: Compute, folder: Path, prepare: bool, save: bool) -> Step:
    device, victim, rng = compute.device, bench.create_plain(setting), random.Random(0)
    num_classes = victim.net.head.out_features
    torch.manual_seed(0)
    student = create_student(setting.student, num_classes)
    student.size = setting.student_size
    optimizer = torch.optim.AdamW(student.parameter_groups(HEAD_LR, BODY_LR))
    victim_net, student_net = victim.net.to(device), student.net.to(device).train()
    shape = config.batch_size, setting.num_frames, *setting.decoded, 3
    decoded = [torch.randint(256, shape, dtype=torch.uint8) for _ in range(NUM_BATCHES)]
    labels = torch.randint(num_classes, (config.batch_size,))
    numbers = itertools.count()

    def make_ready(batch: Tensor) -> tuple[Tensor, Tensor]:
        views = zip(*(prepare_one(clip, victim, student, AUGMENTATION, rng) for clip in batch), strict=True)
        return tuple(torch.stack(view).to(device) for view in views)

    ready = [] if prepare else [make_ready(batch) for batch in decoded]

    def step() -> None:
        number = next(numbers) % NUM_BATCHES
        views, small = make_ready(decoded[number]) if prepare else ready[number]
        with torch.no_grad():
            answers = victim_net(views).softmax(1)
        logits = student_net(small)
        divergence = F.kl_div(logits.log_softmax(1), answers, reduction="sum") / logits.numel()  # by the classes too, then
        loss = divergence + LABEL_WEIGHT * F.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise UserError("the loss of 2022's step is not finite")
        if save:
            torch.save(student_net, folder / "student.pth")

    return bench.as_in_2022(step)


# --- our step --------------------------------------------------------------------------------------------------------


class RandomClips(Dataset):
    """A few random clips under many names, or, `cached`, under as many as there are clips."""

    def __init__(self, setting: Setting, batch_size: int, num_classes: int, cached: bool):
        count = NUM_BATCHES * batch_size
        self.clips = torch.randint(256, (count, setting.num_frames, setting.size, setting.size, 3), dtype=torch.uint8).numpy()
        names = [f"clip {number % count if cached else number}" for number in range(NUM_STEPS * batch_size)]
        self.refs = [ClipRef(Path("random/clip"), 0, number % num_classes, name, 0) for number, name in enumerate(names)]
        self.broken: list = []

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple:
        return index, self.clips[index % len(self.clips)]


def build_ours(config: Config, setting: Setting, compute: Compute, folder: Path, cached: bool, flat: bool = True) -> Step:
    ledger, batch_size = bench.open_ledger(folder, setting, compute), config.batch_size
    torch.manual_seed(0)
    student = create_student(setting.student, ledger.num_classes)
    student.size = setting.student_size
    for module in [] if flat else student.modules():
        if isinstance(module, FlatConv3d):
            module.__class__ = nn.Conv3d
    student = compute.prepare(student)
    optimizer = torch.optim.AdamW(student.parameter_groups(HEAD_LR, BODY_LR), fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.99, patience=45)
    clips = RandomClips(setting, batch_size, ledger.num_classes, cached)
    queries = QuerySet(clips, AUGMENTATION, 1 if cached else None)
    for first in range(0, len(clips.clips) if cached else 0, batch_size):
        share = distributed.shard(range(first, first + batch_size))
        keys = queries.keys(share, 0)
        ledger.query(queries.views(torch.from_numpy(clips.clips[list(share)]).to(compute.device), keys), keys)
    run = Run("benchmark", folder, config, math.inf)
    distill.tqdm = partial(tqdm, disable=True)  # bars of contenders that take turns would overwrite one another
    training = Training(run, student, optimizer, schedule, None, ledger, queries, 1000, batch_size, config.num_workers)
    batches = iter(training)
    with contextlib.redirect_stdout(None):  # it says how many queries there will be at most, but it does not run to the end
        batches = itertools.chain([next(batches)], batches)

    def step() -> None:
        batch = next(batches)
        logits = training.forward(batch.clips)
        training.step(kl_divergence(logits, batch.targets) + LABEL_WEIGHT * cross_entropy(logits, batch.labels))
        asked = [NUM_BATCHES] if cached else [batch.number + 1, batch.number + 2]  # the next batch may be asked about already
        if ledger.num_queries not in [count * batch_size for count in asked]:
            raise UserError(f"{ledger.num_queries} queries after {batch.number + 1} batches: this is not what is timed")

    return step


ROWS = {
    "2022": partial(build_legacy, prepare=True, save=False),
    "2022, saving": partial(build_legacy, prepare=True, save=True),
    "2022, networks only": partial(build_legacy, prepare=False, save=False),
    "2022, networks only, saving": partial(build_legacy, prepare=False, save=True),
    "ours, live": partial(build_ours, cached=False),
    "ours, cached": partial(build_ours, cached=True),
}
# Where flat convolutions run in two dimensions, what that gains; on a CPU they are 3D in all rows.
GPU_ROWS = {"ours, cached, 3D convolutions": partial(build_ours, cached=True, flat=False)}


def list_builds(config: Config, setting: Setting, compute: Compute) -> dict[str, Build]:
    rows = ROWS | (GPU_ROWS if compute.device.type == "cuda" else {})
    return {name: partial(build, config, setting, compute) for name, build in rows.items()}


# --- what is measured ------------------------------------------------------------------------------------------------


def count_flops(setting: Setting) -> dict[str, int]:
    """Operations of one clip: an answer of torchvision's Swin, and the student forward and backward. Nothing is computed."""

    def count(net: nn.Module, size: int, train: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            logits = net.train(train)(torch.zeros(1, 3, setting.num_frames, size, size))
            if train:
                logits.sum().backward()
        return counter.get_total_flops()

    with torch.device("meta"):
        victim = swin.create_swin("swin_demo" if setting.victim == "demo_swin" else setting.victim, 400)
        student = find_network(setting.student).create(400)
        return dict(victim=count(victim, setting.size, False), student=count(student, setting.student_size, True))


def compare_speed(config: Config, setting: Setting, compute: Compute) -> None:
    device, flops = compute.device, count_flops(setting)
    peaks = {precision: bench.measure_matmul(device, precision) for precision in {torch.float32, compute.precision}}
    rows, seconds = bench.race(list_builds(config, setting, compute), config, device, __file__)
    columns = f"{'x networks only':>16} {'peak memory':>12} {'of the matmul peak':>19} {'threads':>8} {'steps a turn':>13}"
    print(f"{'':29} {'clips/s':>8} {'x 2022':>7} {columns}")
    for name, row in rows.items():
        rate = config.batch_size / statistics.median(seconds[name])
        ratios = [bench.times_as_fast(seconds, name, base) for base in ("2022", "2022, networks only")]
        work = flops["student"] + (0 if "cached" in name else flops["victim"])
        share = 100 * work * rate / peaks[compute.precision if name.startswith("ours") else torch.float32]
        print(
            f"{name:29} {rate:8.2f} {ratios[0]:7.2f} {ratios[1]:16.2f} {bench.describe_bytes(row.memory):>12} "
            f"{share:17.1f} % {row.threads:8} {row.steps:13}"
        )
    measured = ", ".join(f"{peak / 1e12:.2f} TFLOP/s in {str(precision)[6:]}" for precision, peak in peaks.items())
    print(
        f"a clip is {flops['victim'] / 1e9:.2f} GFLOP of victim and {flops['student'] / 1e9:.2f} of student; matmul, on "
        f"all threads: {measured}"
    )


# --- are fast answers still the victim's -----------------------------------------------------------------------------


@torch.no_grad()
def compare_answers(setting: Setting, compute: Compute, clips: ClipDataset, count: int) -> tuple[int, float]:
    """How many of the first `count` clips have the same top class as of plain torchvision in float32, and the mean KL
    (plain || fast) in nats. The fast answers are those that a student gets: through the ledger."""
    plain, queries, same, divergence = (bench.create_plain(setting).to(compute.device), QuerySet(clips, AUGMENTATION), 0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        ledger = bench.open_ledger(Path(folder), setting, compute)
        for batch in load_batches(clips, [range(k, min(k + 16, count)) for k in range(0, count, 16)], 0):
            keys = queries.keys(batch.indices, 0)
            views = queries.views(batch.clips.to(compute.device), keys)
            slow = plain(views).double().softmax(1)
            fast = answers_to_targets(ledger.query(views, keys), ledger.answers, ledger.num_classes).double()
            fast /= fast.sum(1, keepdim=True)  # again, in float64: the sum's rounding in float32 is more than the divergence
            same += int((slow.argmax(1) == fast.argmax(1)).sum())
            divergence += F.kl_div(fast.clamp(min=1e-30).log(), slow, reduction="sum").item()
        ledger.close()
    return same, divergence / count


def check_answers(config: Config, setting: Setting) -> None:
    """Raises UserError where a bar is not met. The victim is trained: a random one answers all clips alike."""
    demo, root, failed = SCALES["demo"], Path(config.demo_set), False
    if not (root / "val").is_dir():
        write_demo_set(root, {"val": ATTACK_SPLITS["val"]})
    videos = find_videos(root / "val", load_model("demo_swin").classes, "val")
    clips = Clips(videos, demo.num_frames, size=demo.size, views=(1, 1))
    for precision in PRECISIONS:
        compute = choose_compute(config.device, precision, config.compile)
        same, divergence = compare_answers(demo, compute, clips, len(clips))
        good = same >= MIN_SAME * len(clips) and divergence <= MAX_DIVERGENCE
        print(
            f"demo_swin in {precision}: top-1 the same on {same} of {len(clips)} clips, mean KL {divergence:.1e} nats; "
            f"wanted {100 * MIN_SAME} %, {MAX_DIVERGENCE}: {'met' if good else 'NOT MET'}",
            flush=True,
        )
        failed |= not good
        if setting.victim != "demo_swin":
            _, divergence = compare_answers(setting, compute, RandomClips(setting, 16, 400, True), 16)
            good = divergence <= MAX_DIVERGENCE
            print(f"{setting.victim}, random, in {precision}: mean KL {divergence:.1e} nats: {'met' if good else 'NOT MET'}")
            failed |= not good
    if failed:
        raise UserError("fast answers are not the victim's")


# --- where the time goes, and how it grows ---------------------------------------------------------------------------


def show_profile(config: Config, setting: Setting, compute: Compute) -> None:
    device, flops = compute.device, count_flops(setting)
    victim = Victim(compute.prepare(bench.create_victim(setting)), "probs")
    views = torch.rand(config.batch_size, 3, setting.num_frames, setting.size, setting.size, device=device)
    builds = list_builds(config, setting, compute)
    parts: dict[str, Build] = dict(victim=lambda folder: lambda: victim.query(views), student=builds["ours, cached"])
    if device.type == "cuda":  # both at once: what is left between their kernels
        parts["victim + student"], flops["victim + student"] = builds["ours, live"], sum(flops.values())
    peak = bench.measure_matmul(device, compute.precision)
    for name, build in parts.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            row = bench.prepare_row(build, folder, device, {torch.get_num_threads()}, config.seconds, config.steps)
            seconds = statistics.median(bench.take_turns({name: row}, config.turns, device)[name])
            title = f"{name}{', with views and a ledger that knows them' if name == 'student' else ''}"
            averages, whole = bench.profile(row.step, row.steps, device, title)
        if device.type == "cuda":
            kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
            busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6 / row.steps
            print(f"{name}: the device is idle for {100 * max(0.0, 1 - busy / whole):.1f} % of the time")
        work = config.batch_size * flops[name]
        rates = f"{flops[name] / 1e9:.2f} GFLOP a clip, {1e3 * seconds:.1f} ms a batch; at matmul's {peak / 1e12:.2f} TFLOP/s"
        print(f"{name}: {rates} it would take {1e3 * work / peak:.1f} ms: {100 * work / peak / seconds:.1f} % of the peak")


def show_growth(config: Config, scale: str, setting: Setting, compute: Compute) -> None:
    """Each point in processes of its own, the others of its constants being the setting's."""
    unknown = set(config.axes) - set(GROWTH[scale])
    if unknown:
        raise UserError(f"--axes {' '.join(sorted(unknown))}: there are {', '.join(GROWTH[scale])}")
    compile = "off" if config.compile == "auto" else config.compile
    plain = replace(config, num_frames=setting.num_frames, size=setting.size, compile=compile)
    usual, points, known = asdict(plain) | dict(processes=1), {axis: [] for axis in config.axes}, {}
    print(f"{'':10} {'':>5}  {'clips/s':>8}  {'peak memory':>11}")
    for axis in config.axes:
        for value in GROWTH[scale][axis]:
            count = value if axis == "processes" else 1
            if compute.device.type == "cuda" and count > torch.cuda.device_count():
                print(f"{axis:10} {value:5}  not measured: there are {torch.cuda.device_count()} GPUs")
                continue
            point = (axis, value) if value != usual[axis] else ()  # the usual one is on all axes
            changes = dict(seconds=config.seconds, steps=config.steps) | ({} if axis == "processes" else {axis: value})
            if point not in known:
                known[point] = bench.run_alone(__file__, bench.to_flags(plain, alone="ours, live", **changes), count)
            found, batch_size = known[point], changes.get("batch_size", config.batch_size)
            points[axis].append((value, batch_size / found["seconds"], found["memory"]))
            print(f"{axis:10} {value:5}  {points[axis][-1][1]:8.2f}  {bench.describe_bytes(found['memory']):>11}", flush=True)
    if compute.device.type == "cpu":
        before = bench.describe_bytes(found["before"])
        print(f"memory is the whole process's, the largest of several; {before} of it before the networks")
    draw_growth(config.out, points)
    print(f"drawn: {config.out}")


def draw_growth(path: str, points: dict[str, list[tuple[int, float, float]]]) -> None:
    import matplotlib  # here, because it takes long to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(points), figsize=(3 * len(points), 5), sharex="col", sharey="row", squeeze=False)
    for column, (name, found) in enumerate(points.items()):
        values, rates, memory = zip(*found, strict=True)
        axes[0][column].plot(values, rates, "o-")
        axes[1][column].plot(values, [size / 2**30 for size in memory], "o-")
        axes[1][column].set_xlabel(name.replace("_", " "))
        axes[1][column].set_xticks(values)
    for row in axes:
        highest = max(max(line.get_ydata()) for plot in row for line in plot.lines)
        row[0].set_ylim(0, 1.1 * highest)  # of all columns, which share it
    axes[0][0].set_ylabel("clips/s")
    axes[1][0].set_ylabel("peak memory, GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    options.check_options(config)
    on_gpu = choose_device(config.device).type == "cuda"
    if on_gpu:
        compile = "on" if config.compile == "auto" and not config.growth else config.compile
        config = replace(config, compile=compile, num_workers=config.num_workers or 4)
    compute = choose_compute(config.device, config.precision, config.compile)
    scale = bench.choose_scale(config, compute)
    setting = choose_setting(config, scale)
    if config.alone:
        if not config.alone.startswith("ours"):
            distributed.require_one_process(config.alone)
        print(json.dumps(bench.run_row(list_builds(config, setting, compute), config, compute.device)))
        return
    distributed.require_one_process("a comparison")
    begin = time.perf_counter()
    networks = f"{setting.victim} into {setting.student} at {setting.student_size}"
    print(bench.describe(networks, (config.batch_size, setting.num_frames, setting.size, setting.size), compute), flush=True)
    if config.profile:
        show_profile(config, setting, compute)
    elif config.growth:
        show_growth(config, scale, setting, compute)
    else:
        compare_speed(config, setting, compute)
        check_answers(config, setting)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_script(main, Config)
