"""What the benchmarks of training steps share: contenders that take turns, their memory, and the machine's own speed."""

import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from extraction import distributed
from extraction.errors import UserError


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(contenders: dict[str, Callable[[], None]], turns: int, steps: int, device: torch.device) -> dict[str, list]:
    """Seconds of a step, for each turn of each contender. In turns, so that a slow moment of the machine hits all.

    A turn has so many steps, or as many as fit in ten seconds; several processes, whose clocks differ, take them all.
    """
    seconds, together = {name: [] for name in contenders}, distributed.num_processes() > 1
    for turn in range(turns):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            synchronise(device)
            begin, done = time.perf_counter(), 0
            while done < steps and (done == 0 or together or time.perf_counter() - begin < 10):
                contenders[name]()
                done += 1
            synchronise(device)
            seconds[name].append((time.perf_counter() - begin) / done)
    return seconds


def as_in_2022(step: Callable[[], None]) -> Callable[[], None]:
    """The step with PyTorch's own choices for convolutions (TF32, no trying of kernels), whatever is chosen for ours."""

    def run() -> None:
        with torch.backends.cudnn.flags(enabled=True):
            step()

    return run


def times_as_fast(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median over the turns, each compared with its own."""
    return statistics.median(other / own for own, other in zip(seconds[name], seconds[base], strict=True))


def warm_up(
    build: Callable[[], Callable[[], None]], device: torch.device, steps: int = 2
) -> tuple[Callable[[], None], int | None]:
    """Build a contender and take its first steps, which compile it and make its optimiser's state.

    Returns it with, on a GPU, the peak memory of a further step, less what other contenders hold.
    """
    gc.collect()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    step = build()
    for _ in range(steps):
        step()
    if device.type != "cuda":
        return step, None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - held


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes.

    `ru_maxrss` alone won't do: on Linux it goes on from that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(script: str, flags: list[str], num_processes: int = 1) -> dict:
    """Start a benchmark in a process of its own, or several, and read the JSON of its last line."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(several if num_processes > 1 else []), script, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_matmul(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of a big matrix product, the best of some: what a network could at most reach."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def describe_bytes(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
