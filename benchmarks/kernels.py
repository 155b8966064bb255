"""What other kernels would give: the victim's attention by each backend of PyTorch's, small students as CUDA graphs.

python benchmarks/kernels.py
python benchmarks/kernels.py --scale demo --device cpu

The victim is the one of `train_step.py`, its clips on the device; an additive mask decides which backends take it, and those
that do not are listed with PyTorch's reason. The students' rows are a forward and a backward pass and the optimiser's step as
they are, compiled, and on a GPU recorded once as a graph and replayed. All rows take turns. Nothing here is what the scripts
do: it says whether that would be worth changing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import side_by_side as bench
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from extraction import options
from extraction.compute import Compute, choose_compute
from extraction.experiment import run_script
from extraction.students import create_student
from extraction.victims.query_interface import Victim

BACKENDS = ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
STUDENTS = ("r2plus1d_tiny", "resnet_demo")  # whose kernels are shorter than their starts


@dataclass(frozen=True, kw_only=True)
class Config(bench.RaceOptions):
    batch_size: options.Count = 16
    """Clips of a step."""


def build_victim(config: Config, setting: bench.Setting, compute: Compute, backend: str, folder: Path) -> bench.Step:
    victim = Victim(compute.prepare(bench.create_victim(setting)), "probs")
    clips = draw_clips(config, setting, compute)
    chosen: Any = (
        contextlib.nullcontext if backend == "as PyTorch chooses" else partial(sdpa_kernel, [getattr(SDPBackend, backend)])
    )

    def step() -> None:
        with chosen():
            victim.query(clips)

    step()  # raises where the backend does not take the mask
    return step


def build_student(config: Config, setting: bench.Setting, compute: Compute, name: str, how: str, folder: Path) -> bench.Step:
    torch.manual_seed(0)
    student = compute.prepare(create_student(name, 12)).train()
    clips = draw_clips(config, setting._replace(size=48, num_frames=16), compute)
    targets = torch.full((config.batch_size, 12), 1 / 12, device=compute.device)
    graphed = how == "as a graph"
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, **dict(capturable=True) if graphed else dict(fused=True))
    forward: Any = torch.compile(student, dynamic=False) if how == "compiled" else student

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graphed)
        F.cross_entropy(forward(clips), targets).backward()
        optimizer.step()

    if not graphed:
        return step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warmed up beside the stream that records
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def draw_clips(config: Config, setting: bench.Setting, compute: Compute) -> Tensor:
    return torch.rand(config.batch_size, 3, setting.num_frames, setting.size, setting.size, device=compute.device)


def list_rows(config: Config, setting: bench.Setting, compute: Compute) -> Iterator[tuple[str, bench.Build]]:
    for backend in ("as PyTorch chooses", *BACKENDS):
        yield f"victim, {backend}", partial(build_victim, config, setting, compute, backend)
    ways = ("as it is", "compiled", *["as a graph"] * (compute.device.type == "cuda"))
    for name in STUDENTS:
        for how in ways:
            yield f"{name}, {how}", partial(build_student, config, setting, compute, name, how)


def main(config: Config) -> None:
    options.check_options(config)
    compute = choose_compute(config.device, config.precision, "off" if config.compile == "auto" else config.compile)
    setting = bench.SCALES[bench.choose_scale(config, compute)]
    rows, threads = {}, {config.threads or torch.get_num_threads()}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, build in list_rows(config, setting, compute):
            try:
                rows[name] = bench.prepare_row(build, folder, compute.device, threads, config.seconds, config.steps)
            except RuntimeError as error:  # of PyTorch: this backend does not take it
                print(f"{name}: not to be had ({str(error).strip().splitlines()[0][:100]})")
        found = bench.take_turns(rows, config.turns, compute.device)
    print(f"\n{'':38} ms a batch   clips/s")
    for name, seconds in found.items():
        best = sorted(seconds)[len(seconds) // 2]
        print(f"{name:38} {1e3 * best:10.2f}  {config.batch_size / best:8.1f}")


if __name__ == "__main__":
    run_script(main, Config)
