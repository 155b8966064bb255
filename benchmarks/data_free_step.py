"""How fast clips are made, asked about and learned from without data: our iteration of MAZE beside that of 2022, in turns.

    python benchmarks/data_free_step.py
    python benchmarks/data_free_step.py --batch-size 32
    python benchmarks/data_free_step.py --profile

The constants are those of `black_box/attack_video_swin.py`: on a GPU the published ones (Video Swin-B, R3D-18, a DVD-GAN of
16x112x112, batch 128), on a CPU the demo's. An iteration is a generator step, its gradient estimated from answers along
some directions, student steps on fresh clips, and replay steps on kept ones.

The iteration of 2022: float32, eager, torchvision's Swin as it is, one forward of victim and student for each direction,
every clip kept for replay as float in a list that grows for ever and moved to the device for each step, every loss read.
Ours is `extraction.data_free.Attacker` with its ledger. Published victims get random weights: they are as fast.
"""

import json
import math
import random
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from extraction.data_free import Attacker, create_optimizer, find_method
from side_by_side import as_in_2022, describe_bytes, peak_memory, run_alone, synchronise, take_turns, times_as_fast, warm_up
from torch import Tensor
from train_step import SCALES, create_plain, open_ledger

from extraction import distributed
from extraction.compute import Compute, choose_compute
from extraction.errors import UserError
from extraction.generators import create_generator
from extraction.runs import check_at_least, run_script
from extraction.students import create_student

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "black_box" / "attack_video_swin.py"))


@dataclass(frozen=True)
class Config:
    scale: str = "auto"
    """full, demo, or auto: full on a GPU."""
    batch_size: int | None = None
    """Clips of a step; by default the script's."""
    iterations: int = 1
    """Of a turn."""
    turns: int = 3
    """Their median counts."""
    memory: bool = True
    """On a CPU: start each row once more, in a process of its own, for its peak memory."""
    profile: bool = False
    """Show where the time of our iteration goes, instead."""
    alone: str | None = None
    """Run this row alone and print its figures as JSON: --memory starts it so."""
    device: str = "auto"
    precision: str = "fp32"
    """fp32, as in the attack, or bf16: there the estimated slopes drown in rounding."""
    compile: str = "auto"
    """on, off, or auto: on for a GPU."""


def choose_constants(config: Config, compute: Compute) -> tuple[str, Any]:
    """The script's, with what its method says where they are None."""
    scale = config.scale if config.scale != "auto" else "full" if compute.device.type == "cuda" else "demo"
    if scale not in SCALES:
        raise UserError(f"--scale {scale}: write auto, {' or '.join(SCALES)}")
    constants = SCRIPT["Config"](**SCRIPT["DEMO"] if scale == "demo" else {})
    method = find_method(constants.method, constants.answers)
    usual = dict(num_directions=method.num_directions, replay_steps=method.replay_steps, batch_size=constants.batch_size)
    wanted = dict(num_directions=constants.num_directions, replay_steps=constants.replay_steps, batch_size=config.batch_size)
    return scale, replace(constants, **{name: usual[name] if value is None else value for name, value in wanted.items()})


def count_queries(constants: Any) -> int:
    """The bill of an iteration."""
    asked = constants.generator_steps * (1 + constants.num_directions) + constants.student_steps
    return asked * constants.batch_size


def create_networks(constants: Any, num_classes: int) -> tuple:
    torch.manual_seed(0)
    student = create_student(constants.student, num_classes)
    return student, create_generator(constants.generator, num_classes, constants.num_frames, constants.size)


# --- the iteration of 2022 -------------------------------------------------------------------------------------------


def build_legacy(scale: str, constants: Any, compute: Compute, folder: Path) -> Callable[[], None]:
    device, batch = compute.device, constants.batch_size
    victim = create_plain(SCALES[scale]).to(device)
    num_classes = victim.net.head.out_features
    student, generator = (net.to(device).train() for net in create_networks(constants, num_classes))
    decay = constants.weight_decay
    student_optimizer = torch.optim.Adam(student.parameters(), constants.student_lr, weight_decay=decay)
    generator_optimizer = torch.optim.Adam(generator.parameters(), constants.generator_lr, weight_decay=decay)
    kept: list[tuple[Tensor, Tensor]] = []
    rng, asked = random.Random(0), [0]

    @torch.no_grad()
    def ask(clips: Tensor) -> Tensor:
        asked[0] += len(clips)
        return victim(clips).softmax(1)

    def draw() -> tuple[Tensor, Tensor]:
        noise = torch.randn(batch, generator.noise_dim, device=device)
        return noise, torch.randint(num_classes, (batch,), device=device)

    def disagree(pre_activation: Tensor) -> Tensor:
        clips = generator.render(pre_activation)
        answers = ask(clips)
        return -F.kl_div(student(clips).log_softmax(1), answers, reduction="none").sum(1)

    def learn(clips: Tensor, answers: Tensor) -> float:
        loss = F.kl_div(student(clips).log_softmax(1), answers, reduction="batchmean")
        student_optimizer.zero_grad()
        loss.backward()
        student_optimizer.step()
        return loss.item()

    def step_generator() -> float:
        pre_activation = generator(*draw())
        rows = (-1, *[1] * (pre_activation.ndim - 1))
        with torch.no_grad():
            start, gradient = disagree(pre_activation), torch.zeros_like(pre_activation)
            for _ in range(constants.num_directions):
                direction = torch.randn_like(pre_activation)
                direction /= direction.flatten(1).norm(dim=1).view(rows)
                slope = (disagree(pre_activation + constants.smoothing * direction) - start) / constants.smoothing
                gradient += slope.view(rows) * direction
            gradient *= pre_activation[0].numel() / constants.num_directions
        generator_optimizer.zero_grad()
        pre_activation.backward(gradient / batch)
        generator_optimizer.step()
        return start.mean().item()

    def step_student() -> float:
        with torch.no_grad():
            clips = generator.render(generator(*draw()))
        answers = ask(clips)
        kept.append((clips.cpu(), answers.cpu()))
        return learn(clips, answers)

    def step_replay() -> float:
        clips, answers = rng.choice(kept)
        return learn(clips.to(device), answers.to(device))

    def iterate() -> None:
        before = asked[0]
        losses = [step_generator() for _ in range(constants.generator_steps)]
        losses += [step_student() for _ in range(constants.student_steps)]
        losses += [step_replay() for _ in range(constants.replay_steps)]
        if not all(map(math.isfinite, losses)):
            raise UserError("a loss of 2022's iteration is not finite")
        check_bill(asked[0] - before, constants)

    return as_in_2022(iterate)


# --- our iteration ---------------------------------------------------------------------------------------------------


def create_attacker(scale: str, constants: Any, compute: Compute, folder: Path) -> Attacker:
    ledger = open_ledger(folder / "ledger.sqlite", SCALES[scale], compute, exact=True)
    student, generator = create_networks(constants, ledger.num_classes)
    student, generator = compute.prepare(student).train(), generator.to(compute.device).train()
    return Attacker(
        ledger, student, generator,
        create_optimizer(constants.optimizer, student.parameters(), constants.student_lr, constants.weight_decay),
        create_optimizer(constants.optimizer, generator.parameters(), constants.generator_lr, constants.weight_decay),
        find_method(constants.method, constants.answers),
        clip_shape=(3, constants.num_frames, constants.size, constants.size), batch_size=constants.batch_size,
        replay_clips=constants.replay_clips, seed=0,
    )  # fmt: skip


def list_steps(attacker: Attacker, constants: Any) -> dict[str, tuple[int, Callable[[], None]]]:
    """The kinds of step of an iteration, in order: how many, and how one is taken."""
    estimate = partial(attacker.step_generator, attacker.disagreement, constants.num_directions, constants.smoothing)
    return {
        "generator": (constants.generator_steps, estimate),
        "student": (constants.student_steps, attacker.step_student),
        "replay": (constants.replay_steps, attacker.step_replay),
    }


def build_ours(scale: str, constants: Any, compute: Compute, folder: Path) -> Callable[[], None]:
    attacker = create_attacker(scale, constants, compute, folder)
    steps, done = list_steps(attacker, constants), [0]

    def iterate() -> None:
        before = attacker.victim.num_queries
        attacker.begin(done[0], 1.0)
        done[0] += 1
        for count, step in steps.values():
            for _ in range(count):
                step()
        if attacker.broke():
            raise UserError("a loss of our iteration is not finite")
        check_bill(attacker.victim.num_queries - before, constants)

    return iterate


def check_bill(asked: int, constants: Any) -> None:
    if asked != count_queries(constants):
        raise UserError(f"an iteration asked about {asked} clips, not {count_queries(constants)}: this is not what is timed")


ROWS = {"2022": build_legacy, "ours": build_ours}


# --- what is measured ------------------------------------------------------------------------------------------------


def run_row(name: str, config: Config, scale: str, constants: Any, compute: Compute) -> dict[str, float]:
    """What a process that runs one row says of itself."""
    if name not in ROWS:
        raise UserError(f"--alone {name}: there are {'; '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder:
        step, memory = warm_up(partial(ROWS[name], scale, constants, compute, Path(folder)), compute.device, 1)
        seconds = statistics.median(take_turns({name: step}, config.turns, config.iterations, compute.device)[name])
    return dict(seconds=seconds, memory=peak_memory() if memory is None else memory)


def compare_speed(config: Config, scale: str, constants: Any, compute: Compute) -> None:
    device, steps, memory = compute.device, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in ROWS.items():
            steps[name], memory[name] = warm_up(partial(build, scale, constants, compute, Path(folder)), device, 1)
        seconds = take_turns(steps, config.turns, config.iterations, device)
    if config.memory and device.type == "cpu":
        kept = ("scale", "batch_size", "device", "precision", "compile")
        flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in kept if getattr(config, name) is not None]
        for name in ROWS:
            memory[name] = run_alone(__file__, [*flags, "--turns=1", f"--alone={name}"])["memory"]
    print(f"{'':6} {'queries/s':>10} {'s an iteration':>15} {'x 2022':>7} {'peak memory':>12}")
    for name in ROWS:
        took = statistics.median(seconds[name])
        rate, ratio = count_queries(constants) / took, times_as_fast(seconds, name, "2022")
        print(f"{name:6} {rate:10.2f} {took:15.2f} {ratio:7.2f} {describe_bytes(memory[name]):>12}")
    pixels = 3 * constants.num_frames * constants.size**2
    grows = constants.student_steps * constants.batch_size * 4 * pixels
    print(
        f"an iteration is {count_queries(constants)} queries; replay of 2022 takes {describe_bytes(grows)} more of host memory "
        f"in each, ours {describe_bytes(constants.replay_clips * pixels)} in all"
    )


def show_profile(config: Config, scale: str, constants: Any, compute: Compute) -> None:
    device = compute.device
    with tempfile.TemporaryDirectory() as folder:
        attacker = create_attacker(scale, constants, compute, Path(folder))
        steps = list_steps(attacker, constants)
        seconds = {name: [] for name in steps}
        for number in range(1 + config.turns):
            attacker.begin(number, 1.0)
            for name, (count, step) in steps.items():
                synchronise(device)
                begin = time.perf_counter()
                for _ in range(count):
                    step()
                synchronise(device)
                seconds[name].append(time.perf_counter() - begin)
        for name, (count, _) in steps.items():
            print(f"{name:10} {1e3 * statistics.median(seconds[name][1:]):8.1f} ms an iteration, {count} steps")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, (_, step) in steps.items():
            with torch.profiler.profile(activities=activities) as profile:
                step()
                synchronise(device)
            key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(f"\na {name} step")
            print(profile.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=50))


def main(config: Config) -> None:
    check_at_least(config, 1, "batch_size", "iterations", "turns")
    distributed.require_one_process("this comparison")
    compute = choose_compute(config.device, config.precision, config.compile)
    if config.compile == "auto" and compute.device.type == "cuda":
        compute = compute._replace(compile_after=1)
    scale, constants = choose_constants(config, compute)
    if config.alone:
        print(json.dumps(run_row(config.alone, config, scale, constants, compute)))
        return
    begin = time.perf_counter()
    where = torch.cuda.get_device_name() if compute.device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    shape = f"{constants.batch_size}x{constants.num_frames}x{constants.size}x{constants.size}"
    ours = f"ours in {str(compute.precision)[6:]}, {'not compiled' if compute.compile_after is None else 'compiled'}"
    print(
        f"{SCALES[scale].victim} into {constants.student}, {constants.generator}, batches of {shape}, {where}; {ours}",
        flush=True,
    )
    if config.profile:
        show_profile(config, scale, constants, compute)
    else:
        compare_speed(config, scale, constants, compute)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_script(main, Config)
