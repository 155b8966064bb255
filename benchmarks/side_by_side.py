"""What the benchmarks of training steps share: networks, contenders that take turns, their memory, the machine's own speed."""

import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from extraction import distributed, options
from extraction.compute import Compute
from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import swin
from extraction.victims.classes import kinetics400_classes
from extraction.victims.ledger import Ledger
from extraction.victims.query_interface import Victim, VictimModel
from extraction.victims.trained import create_network
from extraction.victims.zoo import find_weights, load_model
from extraction.weights import read_metadata, read_state

Step = Callable[[], None]
Build = Callable[[Path], Step]  # given a folder of its own
KEPT_FLAGS = ("scale", "batch_size", "num_frames", "size", "turns", "device", "precision", "compile")


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """Rows that are timed in turns."""

    scale: Literal["auto", "full", "demo"] = "auto"
    """full, demo, or auto: full on a GPU."""
    batch_size: options.Count | None = None
    """Clips of a step."""
    seconds: options.Rate = 5.0
    """Seconds of a turn."""
    steps: options.Count | None = None
    """Steps of a turn, instead."""
    turns: options.Count = 3
    """Turns of each row; their median counts."""
    memory: bool = True
    """On a CPU: start each row once more, in a process of its own, for its peak memory."""
    profile: bool = False
    """Show where the time of our step goes, instead."""
    alone: str | None = None
    """Run this row alone and print its results as JSON: others of these options start it so."""
    threads: options.Count | None = None
    """PyTorch's threads of a row that runs alone."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for a GPU."""


class Setting(NamedTuple):
    """What is extracted from what, and the shapes of it."""

    victim: str
    student: str
    num_frames: int
    size: int
    student_size: int
    decoded: tuple[int, int]  # height and width of the frames that the scripts of 2022 resized themselves


SCALES = {
    "full": Setting("swin_b", "r2plus1d_34", 32, 224, 112, (256, 340)),
    "demo": Setting("demo_swin", "r2plus1d_tiny", 16, 48, 32, (64, 64)),
}


def choose_scale(config: RaceOptions, compute: Compute) -> str:
    return config.scale if config.scale != "auto" else "full" if compute.device.type == "cuda" else "demo"


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
    return VictimModel(model, kinetics400_classes(), setting.victim, "random")


def open_ledger(folder: Path, setting: Setting, compute: Compute, exact: bool = False) -> Ledger:
    victim = compute.prepare(create_victim(setting))
    return Ledger(folder / "ledger.sqlite", lambda num_queries: Victim(victim, num_queries=num_queries), "probs", exact=exact)


# --- contenders ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A contender, ready to be timed."""

    step: Step
    steps: int  # of a turn
    threads: int  # of PyTorch
    memory: int | None  # peak of a step on a GPU, less what other contenders hold


def as_in_2022(step: Step) -> Step:
    """The step with PyTorch's own choices for convolutions (TF32, no trying of kernels), whatever is chosen for ours."""

    def run() -> None:
        with torch.backends.cudnn.flags(enabled=True):
            step()

    return run


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_steps(step: Step, count: int, device: torch.device) -> float:
    """Seconds of a step, the mean of `count`; of several processes the slowest one's."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(device)
    return max(distributed.gather([(time.perf_counter() - begin) / count]))


def prepare_row(build: Build, folder: str, device: torch.device, threads: set[int], seconds: float, steps: int | None) -> Row:
    """Build a contender with each number of threads and keep the fastest.

    Its first two steps compile it and make its optimiser's state. A turn has `steps`, or as many as take `seconds`.
    """
    found: list[tuple[float, Row]] = []
    for number in threads:
        torch.set_num_threads(number)  # before it is built: threads that it starts take the number over
        gc.collect()
        held, memory = torch.cuda.memory_allocated() if device.type == "cuda" else 0, None
        step = build(Path(tempfile.mkdtemp(dir=folder)))
        took = [time_steps(step, 1, device) for _ in range(2)][1]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            took = time_steps(step, 1, device)
            memory = torch.cuda.max_memory_allocated() - held
        if len(threads) > 1 or not steps:  # two steps say little: at least a second does
            took = time_steps(step, max(1, round(1 / took)), device)
        found.append((took, Row(step, steps or max(1, round(seconds / took)), number, memory)))
    return min(found, key=lambda pair: pair[0])[1]


def take_turns(rows: Mapping[str, Row], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step, for each turn of each contender. In turns, so that a slow moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(turns):
        for name in list(rows)[:: 1 if turn % 2 == 0 else -1]:
            torch.set_num_threads(rows[name].threads)
            seconds[name].append(time_steps(rows[name].step, rows[name].steps, device))
    return seconds


def times_as_fast(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over the turns, each compared with its own."""
    return statistics.median(other / own for own, other in zip(seconds[name], seconds[base], strict=True))


def race(
    builds: Mapping[str, Build], config: RaceOptions, device: torch.device, script: str
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """Time all contenders, on a CPU each at the better of one thread and all; their memory there is that of processes of
    their own, if `config.memory`."""
    threads = torch.get_num_threads()
    choices, rows = {threads} if device.type == "cuda" else {1, threads}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # an answer may still be on its way
        for name, build in builds.items():
            rows[name] = prepare_row(build, folder, device, choices, config.seconds, config.steps)
        seconds = take_turns(rows, config.turns, device)
    torch.set_num_threads(threads)
    if config.memory and device.type == "cpu":
        for name, row in rows.items():
            flags = to_flags(config, steps=1, turns=1, threads=row.threads, alone=name)
            rows[name] = row._replace(memory=run_alone(script, flags)["memory"])
    return rows, seconds


# --- alone in a process ----------------------------------------------------------------------------------------------


def run_row(builds: Mapping[str, Build], config: RaceOptions, device: torch.device) -> dict[str, float]:
    """What a process that runs one row reports: seconds of a step, its peak memory, and the memory before the networks."""
    if config.alone not in builds:
        raise UserError(f"--alone {config.alone}: there are {'; '.join(builds)}")
    before, threads = peak_memory(), {config.threads or torch.get_num_threads()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        row = prepare_row(builds[config.alone], folder, device, threads, config.seconds, config.steps)
        seconds = statistics.median(take_turns({"": row}, config.turns, device)[""])
    memory = peak_memory() if row.memory is None else row.memory
    return dict(seconds=seconds, memory=max(distributed.gather([memory])), before=before)


def to_flags(config: RaceOptions, **changes: Any) -> list[str]:
    """The flags of a run like this one."""
    values = {name: getattr(config, name) for name in KEPT_FLAGS if hasattr(config, name)} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def run_alone(script: str, flags: list[str], num_processes: int = 1) -> dict:
    """Start a benchmark in a process of its own, or several, and read the JSON of its last line."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(several if num_processes > 1 else []), script, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes.

    `ru_maxrss` alone won't do: on Linux it goes on from that of the process that started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# --- what is printed -------------------------------------------------------------------------------------------------


def measure_matmul(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of a big matrix product, the best of some: what a network could at most reach."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    return 2 * size**3 / min(time_steps(partial(torch.mm, a, b), 1, device) for _ in range(10))


def profile(step: Step, count: int, device: torch.device, title: str) -> tuple[Any, float]:
    """Print where the time of `count` steps goes. Returns the profiler's averages, and the seconds of a step under it."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, key = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = time_steps(step, count, device)
    print(f"\n{title}, {count} steps")
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=50))
    return profiler.key_averages(), seconds


def describe(networks: str, shape: tuple[int, ...], compute: Compute) -> str:
    where = torch.cuda.get_device_name() if compute.device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    ours = f"ours in {str(compute.precision)[6:]}, {'not compiled' if compute.compile_after is None else 'compiled'}"
    return f"{networks}, batches of {'x'.join(map(str, shape))}, {where}; {ours}"


def describe_bytes(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
