"""How fast clips are made, asked about and learned from without data: our iteration of MAZE beside that of 2022, in turns.

    python benchmarks/data_free_step.py
    python benchmarks/data_free_step.py --batch-size 32
    python benchmarks/data_free_step.py --profile

The constants are those of `black_box/attack_video_swin.py`: on a GPU the published ones (Video Swin-B, R3D-18, a DVD-GAN of
16x112x112, batch 128), on a CPU the demo's, each
loop on one thread or on all, whichever is faster. An iteration is a generator step, its gradient estimated from answers along
some directions, student steps on fresh clips, and replay steps on kept ones.

The iteration of 2022: float32, eager, torchvision's Swin as it is, one forward of victim and student for each direction,
every clip kept for replay as float in a list that grows for ever and moved to the device for each step, every loss read.
Ours is `extraction.attacks.data_free.Attacker` with its ledger. `networks` is its floor: our victim and the student alone, as
often, on clips that are there, without the generator. Published victims get random weights: they are as fast.
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
from typing import Any, Literal

import side_by_side as bench
import torch
from side_by_side import SCALES, Build, Step
from torch import Tensor

from extraction import distributed, options
from extraction.attacks.data_free import Attacker, create_optimizer, find_method
from extraction.attacks.losses import kl_divergence, kl_loss
from extraction.attacks.zeroth_order import estimate_gradient
from extraction.compute import Compute, choose_compute
from extraction.errors import UserError
from extraction.experiment import run_script
from extraction.generators import create_generator
from extraction.students import create_student

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "black_box" / "attack_video_swin.py"))


@dataclass(frozen=True, kw_only=True)
class Config(bench.RaceOptions):
    batch_size: int | None = None
    """Clips of a step; by default the script's."""
    seconds: float = 10.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """fp32, as in the attack, or bf16, whose rounding swamps the finite-difference estimate."""


def choose_constants(config: Config, scale: str) -> Any:
    """The script's, with what its method says where they are None."""
    constants = SCRIPT["Config"](**SCRIPT["DEMO"] if scale == "demo" else {})
    method = find_method(constants.method, constants.answers)
    usual = dict(num_directions=method.num_directions, replay_steps=method.replay_steps)
    chosen = {name: value for name, value in usual.items() if getattr(constants, name) is None}
    return replace(constants, **chosen, batch_size=config.batch_size or constants.batch_size)


def count_queries(constants: Any) -> int:
    """The queries of an iteration."""
    return constants.batch_size * (constants.generator_steps * (1 + constants.num_directions) + constants.student_steps)


def check_queries(asked: int, constants: Any) -> None:
    if asked != count_queries(constants):
        raise UserError(f"an iteration had {asked} queries, not {count_queries(constants)}: this is not what is timed")


def create_networks(constants: Any, num_classes: int) -> tuple:
    torch.manual_seed(0)
    student = create_student(constants.student, num_classes)
    return student, create_generator(constants.generator, num_classes, constants.num_frames, constants.size)


# --- the iteration of 2022 -------------------------------------------------------------------------------------------


def build_legacy(scale: str, constants: Any, compute: Compute, folder: Path) -> Step:
    device, batch = compute.device, constants.batch_size
    victim = bench.create_plain(SCALES[scale]).to(device)
    num_classes = victim.net.head.out_features
    student, generator = (net.to(device).train() for net in create_networks(constants, num_classes))
    decay = constants.weight_decay
    student_optimizer = torch.optim.Adam(student.parameters(), constants.student_lr, weight_decay=decay)
    generator_optimizer = torch.optim.Adam(generator.parameters(), constants.generator_lr, weight_decay=decay)
    kept: list[tuple[Tensor, Tensor]] = []
    rng, torch_rng, asked = random.Random(0), torch.Generator(device).manual_seed(0), [0]

    @torch.no_grad()
    def ask(clips: Tensor) -> Tensor:
        asked[0] += len(clips)
        return victim(clips).softmax(1)

    def generate() -> Tensor:
        noise = torch.randn(batch, generator.noise_dim, device=device)
        return generator(noise, torch.randint(num_classes, (batch,), device=device))

    def disagree(pre_activation: Tensor) -> Tensor:
        clips = generator.render(pre_activation)
        answers = ask(clips)
        return -kl_loss(student(clips), answers)

    def learn(clips: Tensor, answers: Tensor) -> float:
        loss = kl_divergence(student(clips), answers)
        student_optimizer.zero_grad()
        loss.backward()
        student_optimizer.step()
        return loss.item()

    def step_generator() -> float:
        pre_activation = generate()
        at = pre_activation.detach()
        gradient = estimate_gradient(disagree, at, constants.num_directions, constants.epsilon, torch_rng)
        generator_optimizer.zero_grad()
        pre_activation.backward(gradient / batch)
        generator_optimizer.step()
        return gradient.sum().item()

    def step_student() -> float:
        with torch.no_grad():
            clips = generator.render(generate())
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
        check_queries(asked[0] - before, constants)

    return bench.as_in_2022(iterate)


# --- our iteration ---------------------------------------------------------------------------------------------------


def create_attacker(scale: str, constants: Any, compute: Compute, folder: Path) -> Attacker:
    ledger = bench.open_ledger(folder, SCALES[scale], compute, exact=True)
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
    estimate = partial(attacker.step_generator, attacker.disagreement, constants.num_directions, constants.epsilon)
    return {
        "generator": (constants.generator_steps, estimate),
        "student": (constants.student_steps, attacker.step_student),
        "replay": (constants.replay_steps, attacker.step_replay),
    }


def build_ours(scale: str, constants: Any, compute: Compute, folder: Path) -> Step:
    attacker = create_attacker(scale, constants, compute, folder)
    steps = list_steps(attacker, constants)

    def iterate() -> None:
        before = attacker.victim.num_queries
        attacker.begin(before // count_queries(constants))
        for count, step in steps.values():
            for _ in range(count):
                step()
        if attacker.has_nonfinite_loss():
            raise UserError("a loss of our iteration is not finite")
        check_queries(attacker.victim.num_queries - before, constants)

    return iterate


# --- the floor -------------------------------------------------------------------------------------------------------


def build_networks(scale: str, constants: Any, compute: Compute, folder: Path) -> Step:
    """The networks of ours alone, on the same clips and answers each time: nothing is made, counted or kept."""
    victim = compute.prepare(bench.create_victim(SCALES[scale]))
    student, _ = create_networks(constants, len(victim.classes))
    student = compute.prepare(student).train()
    optimizer = create_optimizer(constants.optimizer, student.parameters(), constants.student_lr, constants.weight_decay)
    clips = torch.rand(constants.batch_size, 3, constants.num_frames, constants.size, constants.size, device=compute.device)
    with torch.no_grad():
        answers = victim.model(clips).softmax(1)

    def iterate() -> None:
        with torch.no_grad():
            for _ in range(constants.generator_steps * (1 + constants.num_directions)):
                victim.model(clips)
                student.eval()(clips)
            for _ in range(constants.student_steps):
                victim.model(clips)
        student.train()
        for _ in range(constants.student_steps + constants.replay_steps):
            loss = kl_divergence(student(clips), answers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return iterate


def list_builds(scale: str, constants: Any, compute: Compute) -> dict[str, Build]:
    builds = {"2022": build_legacy, "ours": build_ours, "networks": build_networks}
    return {name: partial(build, scale, constants, compute) for name, build in builds.items()}


# --- what is measured ------------------------------------------------------------------------------------------------


def compare_speed(config: Config, scale: str, constants: Any, compute: Compute) -> None:
    rows, seconds = bench.race(list_builds(scale, constants, compute), config, compute.device, __file__)
    print(f"{'':8} {'queries/s':>10} {'s an iteration':>15} {'x 2022':>7} {'peak memory':>12} {'threads':>8} {'a turn':>7}")
    for name, row in rows.items():
        took = statistics.median(seconds[name])
        rate, ratio = count_queries(constants) / took, bench.times_as_fast(seconds, name, "2022")
        memory = bench.describe_bytes(row.memory)
        print(f"{name:8} {rate:10.2f} {took:15.2f} {ratio:7.2f} {memory:>12} {row.threads:8} {row.steps:7}")
    pixels = 3 * constants.num_frames * constants.size**2
    grows = constants.student_steps * constants.batch_size * 4 * pixels
    print(
        f"an iteration is {count_queries(constants)} queries; replay of 2022 takes {bench.describe_bytes(grows)} more of host "
        f"memory in each, ours {bench.describe_bytes(constants.replay_clips * pixels)} in all"
    )


def show_profile(config: Config, scale: str, constants: Any, compute: Compute) -> None:
    with tempfile.TemporaryDirectory() as folder:
        attacker = create_attacker(scale, constants, compute, Path(folder))
        steps = list_steps(attacker, constants)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(1 + config.turns):
            attacker.begin(number)
            for name, (count, step) in steps.items():
                seconds[name].append(count * bench.time_steps(step, count, compute.device) if count else 0.0)
        for name, (count, _) in steps.items():
            print(f"{name:10} {1e3 * statistics.median(seconds[name][1:]):8.1f} ms an iteration, {count} steps")
        for name, (_, step) in steps.items():
            bench.profile(step, 1, compute.device, f"{name} step")


def main(config: Config) -> None:
    options.check_options(config)
    distributed.require_one_process("this comparison")
    compute = choose_compute(config.device, config.precision, config.compile)
    if config.compile == "auto" and compute.device.type == "cuda":
        compute = compute._replace(compile_after=1)
    scale = bench.choose_scale(config, compute)
    constants = choose_constants(config, scale)
    if config.alone:
        print(json.dumps(bench.run_row(list_builds(scale, constants, compute), config, compute.device)))
        return
    begin = time.perf_counter()
    networks = f"{SCALES[scale].victim} into {constants.student}, {constants.generator}"
    shape = (constants.batch_size, constants.num_frames, constants.size, constants.size)
    print(bench.describe(networks, shape, compute), flush=True)
    (show_profile if config.profile else compare_speed)(config, scale, constants, compute)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_script(main, Config)
