"""How fast a student is trained on a victim's answers: our step beside that of 2022, in one process, in turns.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --profile
    python benchmarks/train_step.py --growth --out growth.png

On a GPU at full size (Video Swin-B into R(2+1)D-34), on a CPU at the demo's. Then: whether fast answers are still the
victim's; the run ends with status 1 where they aren't.

The step of 2022: float32, eager, torchvision's Swin as it is, clips made ready on the CPU in float, one at a time, in the
training process, every view asked about anew, the loss read each step; `saving`: the whole student pickled after each.
`networks only` is that without the making ready, its clips lying on the device, as if any number of workers had made them.
Ours is what `extraction.distill` does with a batch that the loader brings (`benchmarks/loader.py`): copy, views on the
device, the ledger, the victim where the ledger does not know the view (`live`, else `kept`), and the student's step.

Published victims get random weights: they are as fast as trained ones. 2022's float32 is PyTorch's: on a GPU its convolutions
use TF32 and matrix products don't, so that their share of a matrix product's peak can pass 100 %. When a turn of ours ends an
answer is still on its way, at most one more than is counted.
"""

import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from extraction.distill import Asked, answers_to_targets, ask_ahead, distillation_loss
from extraction.ledger import Ledger
from side_by_side import (
    as_in_2022,
    describe_bytes,
    measure_matmul,
    peak_memory,
    run_alone,
    synchronise,
    take_turns,
    times_as_fast,
    warm_up,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

from extraction import distributed
from extraction.compute import PRECISIONS, Compute, choose_compute
from extraction.data.augment import Augmentation, create_views, view_key
from extraction.data.clips import Clips, load_batches
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.runs import check_at_least, choose_device, run_script
from extraction.students import STUDENTS, create_student
from extraction.students.r2plus1d import FlatConv3d
from extraction.victims import KNOWN_CLASSES, Victim, VictimModel, create_network, find_weights, load_model, swin
from extraction.weights import read_metadata, read_state

AUGMENTATION, LABEL_WEIGHT, HEAD_LR, BODY_LR = Augmentation(), 10.0, 3e-5, 3e-6
NUM_BATCHES = 2  # different ones, that come round
MIN_SAME, MAX_DIVERGENCE = 0.995, 1e-3


@dataclass(frozen=True)
class Config:
    scale: str = "auto"
    """full, demo, or auto: full on a GPU."""
    batch_size: int | None = None
    """16."""
    num_frames: int | None = None
    """Of the clips and of both networks: 32 at full size, 16 in the demo."""
    size: int | None = None
    """224 and 48. The student's grows with it."""
    steps: int | None = None
    """Of a turn: 50 on a GPU, 4 on a CPU."""
    turns: int = 3
    """Their median counts."""
    memory: bool = True
    """On a CPU: start each row once more, in a process of its own, for its peak memory."""
    demo_set: str = "datasets/demo"
    """Where the clips are that fast and slow answers are compared on; drawn when they aren't there."""
    profile: bool = False
    """Show where the time of our step goes, instead."""
    growth: bool = False
    """Show how our step grows, instead."""
    axes: tuple[str, ...] = ("batch_size", "num_frames", "size", "processes")
    """Along what."""
    out: str = "growth.png"
    """The picture of it."""
    alone: str | None = None
    """Run this row alone and print its figures as JSON: --growth and --memory start it so."""
    device: str = "auto"
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU."""
    compile: str = "auto"
    """on, off, or auto: on for a GPU, but off along --growth, where every point would compile."""


class Setting(NamedTuple):
    """What is stolen from what, and the shapes of it."""

    victim: str
    student: str
    batch_size: int
    num_frames: int
    size: int
    student_size: int
    decoded: tuple[int, int]  # height and width of the frames that the scripts of 2022 resized themselves


SCALES = {
    "full": Setting("swin_b", "r2plus1d_34", 16, 32, 224, 112, (256, 340)),
    "demo": Setting("demo_swin", "r2plus1d_tiny", 16, 16, 48, 32, (64, 64)),
}
GROWTH = {
    "full": dict(batch_size=(4, 8, 16, 32), num_frames=(16, 32, 64), size=(112, 224, 336), processes=(1, 2)),
    "demo": dict(batch_size=(4, 8, 16, 32), num_frames=(8, 16, 32), size=(24, 48, 96), processes=(1, 2)),
}


def choose_setting(config: Config, device: torch.device) -> tuple[str, Setting]:
    scale = config.scale if config.scale != "auto" else "full" if device.type == "cuda" else "demo"
    if scale not in SCALES:
        raise UserError(f"--scale {scale}: write auto, {' or '.join(SCALES)}")
    setting = SCALES[scale]
    if config.size:
        larger = config.size / setting.size
        decoded = tuple(round(side * larger) for side in setting.decoded)
        setting = setting._replace(size=config.size, student_size=round(setting.student_size * larger), decoded=decoded)
    shape = dict(batch_size=config.batch_size, num_frames=config.num_frames)
    return scale, setting._replace(**{name: value for name, value in shape.items() if value})


# --- networks --------------------------------------------------------------------------------------------------------


def create_plain(setting: Setting) -> VideoModel:
    """The victim as torchvision has it: float (B, 3, T, H, W) in [0, 1] -> logits."""
    if setting.victim == "demo_swin":
        path = find_weights("demo_swin")
        about = read_metadata(path)
        model = create_network(about["architecture"], len(about["classes"]), setting.num_frames, setting.size)
        swin.load_state(model.net, read_state(path), path, about["architecture"])
    else:
        torch.manual_seed(0)
        net = swin.create_swin(setting.victim, 400)
        model = VideoModel(net, setting.num_frames, setting.size, swin.MEAN, swin.STD)
    return model.eval().requires_grad_(False)


def create_victim(setting: Setting) -> VictimModel:
    """The same victim as ours run it."""
    if setting.victim == "demo_swin":
        victim = load_model("demo_swin")
        victim.model.num_frames, victim.model.size = setting.num_frames, setting.size
        return victim
    model = create_plain(setting)
    model.net = swin.FusedSwin(model.net)
    return VictimModel(model, KNOWN_CLASSES["k400"](), setting.victim, "random")


def open_ledger(path: Path, setting: Setting, compute: Compute, exact: bool = False) -> Ledger:
    victim = lambda spent: Victim(compute.prepare(create_victim(setting)), "probs", num_queries=spent)  # noqa: E731
    return Ledger(path, victim, "probs", exact=exact)


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


def build_legacy(setting: Setting, device: torch.device, folder: Path, prepare: bool, save: bool) -> Callable[[], None]:
    victim, rng = create_plain(setting), random.Random(0)
    num_classes = victim.net.head.out_features
    torch.manual_seed(0)
    student = create_student(setting.student, num_classes)
    student.size = setting.student_size
    optimizer = torch.optim.AdamW(student.parameter_groups(HEAD_LR, BODY_LR))
    victim_net, student_net = victim.net.to(device), student.net.to(device).train()
    shape = setting.batch_size, setting.num_frames, *setting.decoded, 3
    decoded = [torch.randint(256, shape, dtype=torch.uint8) for _ in range(NUM_BATCHES)]
    labels = torch.randint(num_classes, (setting.batch_size,))
    counter, path = itertools.count(), folder / f"student_{prepare}.pth"

    def make_ready(batch: Tensor) -> tuple[Tensor, Tensor]:
        views = zip(*(prepare_one(clip, victim, student, AUGMENTATION, rng) for clip in batch), strict=True)
        return tuple(torch.stack(view).to(device) for view in views)

    ready = [] if prepare else [make_ready(batch) for batch in decoded]

    def step() -> None:
        number = next(counter) % NUM_BATCHES
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
            torch.save(student_net, path)

    return as_in_2022(step)


# --- our step --------------------------------------------------------------------------------------------------------


def build_ours(setting: Setting, compute: Compute, folder: Path, kept: bool, flat: bool = True) -> Callable[[], None]:
    device = compute.device
    ledger = open_ledger(folder / f"kept_{kept}_{flat}.sqlite", setting, compute)
    torch.manual_seed(0)
    student = create_student(setting.student, ledger.num_classes)
    student.size = setting.student_size
    for module in [] if flat else student.modules():
        if isinstance(module, FlatConv3d):
            module.__class__ = nn.Conv3d
    student = compute.prepare(student).train()
    optimizer = torch.optim.AdamW(student.parameter_groups(HEAD_LR, BODY_LR), fused=True)
    forward, world = distributed.parallel(student), distributed.num_processes()
    places = distributed.shard(range(setting.batch_size))
    shape = len(places), setting.num_frames, setting.size, setting.size, 3
    loaded = [torch.randint(256, shape, dtype=torch.uint8) for _ in range(NUM_BATCHES)]
    loaded = [batch.pin_memory() if device.type == "cuda" else batch for batch in loaded]
    known = torch.randint(ledger.num_classes, (len(places),)).tolist()
    read_every, unread = 1 if device.type == "cpu" else 10, []

    def ask(clips: Tensor, number: int) -> Asked:
        view = number % NUM_BATCHES if kept else number
        keys = [view_key(0, f"clip {place}", view, AUGMENTATION) for place in places]
        ledger.count_affordable(keys)
        views = create_views(clips.to(device, non_blocking=True), keys, AUGMENTATION)
        targets = answers_to_targets(ledger.query(views, keys), ledger.answers, ledger.num_classes)
        return Asked(keys, views, torch.tensor(known).to(device, non_blocking=True), targets, [len(keys)], False)

    numbers = itertools.count()
    # One epoch without end, so that each batch is asked about while the one before is learnt from.
    batches = ask_ahead(itertools.cycle(loaded), 0, 1 << 62, lambda clips, _: ask(clips, next(numbers)), world == 1)

    def step() -> None:
        number, _, asked = next(batches)
        torch.manual_seed(number * world + distributed.rank())
        logits = forward(asked.views)
        loss = distillation_loss(logits, asked.targets, asked.labels, LABEL_WEIGHT) * (len(logits) / setting.batch_size)
        optimizer.zero_grad(set_to_none=True)
        (loss * world).backward()
        optimizer.step()
        unread.append(loss.detach())
        if len(unread) >= read_every:
            if not all(map(math.isfinite, distributed.all_reduce_sum(torch.stack(unread)).tolist())):
                raise UserError("the loss of our step is not finite")
            unread.clear()
        paid = [min(number + ahead, NUM_BATCHES) if kept else number + ahead for ahead in (1, 2)]
        if ledger.num_queries not in [count * setting.batch_size for count in paid]:
            raise UserError(f"{ledger.num_queries} clips paid for after {number + 1} batches: this is not what is timed")

    return step


ROWS: dict[str, Callable[[Setting, Compute, Path], Callable[[], None]]] = {
    "2022": lambda setting, compute, folder: build_legacy(setting, compute.device, folder, True, False),
    "2022, saving": lambda setting, compute, folder: build_legacy(setting, compute.device, folder, True, True),
    "2022, networks only": lambda setting, compute, folder: build_legacy(setting, compute.device, folder, False, False),
    "2022, networks only, saving": lambda setting, compute, folder: build_legacy(setting, compute.device, folder, False, True),
    "ours, live": partial(build_ours, kept=False),
    "ours, kept": partial(build_ours, kept=True),
}
# Where flat convolutions run in two dimensions, what that gains; on a CPU they are 3D in all rows.
GPU_ROWS = {"ours, kept, 3D convolutions": partial(build_ours, kept=True, flat=False)}


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
        student = STUDENTS[setting.student].create(400)
        return dict(victim=count(victim, setting.size, False), student=count(student, setting.student_size, True))


def run_row(name: str, config: Config, setting: Setting, compute: Compute) -> dict[str, float]:
    """What a process that runs one row says of itself."""
    if name not in ROWS:
        raise UserError(f"--alone {name}: there are {'; '.join(ROWS)}")
    if not name.startswith("ours"):
        distributed.require_one_process(name)
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        step, memory = warm_up(partial(ROWS[name], setting, compute, Path(folder)), compute.device)
        seconds = statistics.median(take_turns({name: step}, config.turns, config.steps, compute.device)[name])
    memory = peak_memory() if memory is None else memory
    return dict(clips_per_second=setting.batch_size / seconds, memory=max(distributed.gather([memory])), before=before)


def to_flags(config: Config, **changes) -> list[str]:
    """The flags of a run of one row like this one."""
    kept = ("scale", "batch_size", "num_frames", "size", "steps", "turns", "device", "precision", "compile")
    values = {name: getattr(config, name) for name in kept} | changes
    return [part for name, value in values.items() if value is not None for part in (f"--{name.replace('_', '-')}", str(value))]


def describe(setting: Setting, compute: Compute) -> str:
    where = torch.cuda.get_device_name() if compute.device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    compiled = "not compiled" if compute.compile_after is None else "compiled"
    shape = f"{setting.batch_size}x{setting.num_frames}x{setting.size}x{setting.size}"
    ours = f"ours in {str(compute.precision)[6:]}, {compiled}"
    return f"{setting.victim} into {setting.student} at {setting.student_size}, batches of {shape}, {where}; {ours}"


def compare_speed(config: Config, setting: Setting, compute: Compute) -> None:
    device, flops = compute.device, count_flops(setting)
    peaks = {precision: measure_matmul(device, precision) for precision in {torch.float32, compute.precision}}
    with tempfile.TemporaryDirectory() as folder:
        steps, memory = {}, {}
        rows = ROWS | (GPU_ROWS if device.type == "cuda" else {})
        for name, build in rows.items():
            steps[name], memory[name] = warm_up(partial(build, setting, compute, Path(folder)), device)
        seconds = take_turns(steps, config.turns, config.steps, device)
    if config.memory and device.type == "cpu":
        few = dict(steps=1, turns=1)
        memory = {name: run_alone(__file__, to_flags(config, alone=name, **few))["memory"] for name in rows}
    bases = "2022", "2022, networks only"
    print(f"{'':28} {'clips/s':>8} {'x 2022':>8} {'x networks only':>16} {'peak memory':>12} {'of the matmul peak':>19}")
    for name in rows:
        rate = setting.batch_size / statistics.median(seconds[name])
        ratios = [times_as_fast(seconds, name, base) for base in bases]
        work = flops["student"] + (0 if "kept" in name else flops["victim"])
        share = 100 * work * rate / peaks[compute.precision if name.startswith("ours") else torch.float32]
        print(f"{name:28} {rate:8.2f} {ratios[0]:8.2f} {ratios[1]:16.2f} {describe_bytes(memory[name]):>12} {share:17.1f} %")
    measured = ", ".join(f"{peak / 1e12:.2f} TFLOP/s in {str(precision)[6:]}" for precision, peak in peaks.items())
    print(
        f"a clip is {flops['victim'] / 1e9:.2f} GFLOP of victim and {flops['student'] / 1e9:.2f} of student; matmul: {measured}"
    )


# --- are fast answers still the victim's -----------------------------------------------------------------------------


@torch.no_grad()
def compare_answers(setting: Setting, compute: Compute, batches: list[Tensor]) -> tuple[int, int, float]:
    """How many of the uint8 (B, T, H, W, C) clips have the same top class as of plain torchvision in float32, of how many,
    and the mean KL (plain || fast) in nats. The fast answers are those that a student gets: through the ledger."""
    plain, same, divergence, count = create_plain(setting).to(compute.device), 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(Path(folder) / "answers.sqlite", setting, compute)
        for batch in batches:
            keys = [view_key(0, f"clip {count + place}", 0, AUGMENTATION) for place in range(len(batch))]
            views = create_views(batch.to(compute.device), keys, AUGMENTATION)
            slow = plain(views).double().softmax(1)
            fast = answers_to_targets(ledger.query(views, keys), ledger.answers, ledger.num_classes).double()
            fast /= fast.sum(1, keepdim=True)  # again, in float64: the sum's rounding in float32 is more than the divergence
            same += int((slow.argmax(1) == fast.argmax(1)).sum())
            divergence += F.kl_div(fast.clamp(min=1e-30).log(), slow, reduction="sum").item()
            count += len(batch)
        ledger.close()
    return same, count, divergence / count


def load_demo_clips(root: str, setting: Setting) -> list[Tensor]:
    classes = load_model("demo_swin").classes
    if not (Path(root) / "val").is_dir():
        write_demo_set(root, {"val": ATTACK_SPLITS["val"]})
    clips = Clips(find_videos(Path(root) / "val", classes, "val"), setting.num_frames, size=setting.size, views=(1, 1))
    indices = [range(k, min(k + setting.batch_size, len(clips))) for k in range(0, len(clips), setting.batch_size)]
    return [batch.clips for batch in load_batches(clips, indices, 0)]


def check_answers(config: Config, setting: Setting, device: torch.device) -> None:
    """Raises UserError where a bar is not met. The shares are those of a trained victim: a random one answers all clips alike."""
    demo, met = SCALES["demo"], True
    loaded = load_demo_clips(config.demo_set, demo)
    for precision in PRECISIONS:
        compute = choose_compute(config.device, precision, config.compile)
        same, count, divergence = compare_answers(demo, compute, loaded)
        good = same >= MIN_SAME * count and divergence <= MAX_DIVERGENCE
        print(f"demo_swin in {precision}: top-1 the same on {same} of {count} clips, mean KL {divergence:.1e} nats", end="; ")
        print(f"wanted {100 * MIN_SAME} %, {MAX_DIVERGENCE}: {'met' if good else 'NOT MET'}", flush=True)
        met = met and good
        if setting.victim != "demo_swin":
            shape = setting.batch_size, setting.num_frames, setting.size, setting.size, 3
            _, count, divergence = compare_answers(setting, compute, [torch.randint(256, shape, dtype=torch.uint8)])
            good = divergence <= MAX_DIVERGENCE
            print(f"{setting.victim}, random, in {precision}: mean KL {divergence:.1e} nats: {'met' if good else 'NOT MET'}")
            met = met and good
    if not met:
        raise UserError("fast answers are not the victim's")


# --- where the time goes, and how it grows ---------------------------------------------------------------------------


def show_profile(config: Config, setting: Setting, compute: Compute) -> None:
    device, flops = compute.device, count_flops(setting)
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(compute.prepare(create_victim(setting)), "probs")
        views = torch.rand(setting.batch_size, 3, setting.num_frames, setting.size, setting.size, device=device)
        parts = dict(victim=lambda: victim.query(views), student=build_ours(setting, compute, Path(folder), True))
        if device.type == "cuda":  # both at once: what is left between their kernels
            parts["victim + student"] = build_ours(setting, compute, Path(folder), False)
            flops["victim + student"] = flops["victim"] + flops["student"]
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, step in parts.items():
            for _ in range(2):
                step()
            seconds = statistics.median(take_turns({name: step}, config.turns, config.steps, device)[name])
            with torch.profiler.profile(activities=activities) as profile:
                begin = time.perf_counter()
                for _ in range(config.steps):
                    step()
                synchronise(device)
                whole = time.perf_counter() - begin
            key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(f"\n{name}{', with views and a ledger that knows them' if name == 'student' else ''}, {config.steps} steps")
            print(profile.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=50))
            if device.type == "cuda":
                kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
                busy = sum(kernel.self_device_time_total for kernel in kernels if not kernel.is_user_annotation) / 1e6
                print(f"{name}: the device is idle for {100 * max(0.0, 1 - busy / whole):.1f} % of the time")
            peak, work = measure_matmul(device, compute.precision), setting.batch_size * flops[name]
            rates = (
                f"{flops[name] / 1e9:.2f} GFLOP a clip, {1e3 * seconds:.1f} ms a batch; at matmul's {peak / 1e12:.2f} TFLOP/s"
            )
            print(f"{name}: {rates} it would take {1e3 * work / peak:.1f} ms: {100 * work / peak / seconds:.1f} % of the peak")


def show_growth(config: Config, scale: str, setting: Setting, compute: Compute) -> None:
    """Each point in processes of its own, the others of its constants being the setting's."""
    unknown = set(config.axes) - set(GROWTH[scale])
    if unknown:
        raise UserError(f"--axes {' '.join(sorted(unknown))}: there are {', '.join(GROWTH[scale])}")
    compile = "off" if config.compile == "auto" else config.compile
    plain = replace(config, batch_size=setting.batch_size, num_frames=setting.num_frames, size=setting.size, compile=compile)
    usual, points = asdict(plain) | dict(processes=1), {axis: [] for axis in config.axes}
    known: dict[tuple, dict] = {}
    print(f"{'':10} {'':>5}  {'clips/s':>8}  {'peak memory':>11}")
    for axis in config.axes:
        for value in GROWTH[scale][axis]:
            count = value if axis == "processes" else 1
            if compute.device.type == "cuda" and count > torch.cuda.device_count():
                print(f"{axis:10} {value:5}  not measured: there are {torch.cuda.device_count()} GPUs")
                continue
            point = (axis, value) if value != usual[axis] else ()  # the usual one is on all axes
            if point not in known:
                changes = {} if axis == "processes" else {axis: value}
                known[point] = run_alone(__file__, to_flags(plain, alone="ours, live", **changes), count)
            found = known[point]
            points[axis].append((value, found["clips_per_second"], found["memory"]))
            print(f"{axis:10} {value:5}  {found['clips_per_second']:8.2f}  {describe_bytes(found['memory']):>11}", flush=True)
    if compute.device.type == "cpu":
        before = describe_bytes(found["before"])
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
    check_at_least(config, 1, "batch_size", "num_frames", "size", "steps", "turns")
    on_gpu = choose_device(config.device).type == "cuda"
    if config.compile == "auto" and on_gpu and not config.growth:
        config = replace(config, compile="on")
    config = replace(config, steps=config.steps or (50 if on_gpu else 4))
    compute = choose_compute(config.device, config.precision, config.compile)
    scale, setting = choose_setting(config, compute.device)
    if config.alone:
        print(json.dumps(run_row(config.alone, config, setting, compute)))
        return
    distributed.require_one_process("a comparison")
    begin = time.perf_counter()
    print(describe(setting, compute), flush=True)
    if config.profile:
        show_profile(config, setting, compute)
    elif config.growth:
        show_growth(config, scale, setting, compute)
    else:
        compare_speed(config, setting, compute)
        check_answers(config, setting, compute.device)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_script(main, Config)
