"""MoViNet-A2 into R3D-18 without any data: a generator makes the clips, after MAZE, DFME or DisGUIDE.

    python black_box/attack_video_movinet.py --demo
    python black_box/attack_video_movinet.py --val datasets/kinetics600_val

MAZE (Kariyappa et al. 2021) or, with `--method dfme`, DFME (Truong et al. 2021) with a time axis: the generator moves to
where student and victim disagree, its gradient estimated by asking about perturbed clips. Every perturbed clip is a
query; with m directions the attack needs

    num_queries = iterations * batch_size * (generator_steps * (1 + m) + student_steps)

With `--method disguide` (Rosenthal et al. 2023) it moves to where two students disagree, which asks nothing:
iterations * batch_size * student_steps. `--generator-steps 0` shows what the generator gives that has learnt nothing.
MAZE's published constants make that 2 048 queries an iteration. The 2022 report had 4.13 top-5 on Kinetics-600
after about 1 M queries (chance is 0.83); its generator mixed frames and channels, so expect other numbers. The demo has a
generator of few numbers, `layered`, which knows that something moves in front of something else.

The demo, on 1 200 unseen videos: 21.2 ± 8.1 top-1, 21.7 ± 8.2 agreement@1 after 12 800 queries (two seeds; victim 92.5 on
240 others, chance 8.3).
"""

from dataclasses import dataclass
from typing import Literal

from extraction import options
from extraction.attacks.data_free import SCHEDULES, Attacker, DataFree, create_optimizer, find_method
from extraction.experiment import experiment, open_attack, run_script
from extraction.generators import create_generator
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.DataFreeOptions, options.GeneratorOptions, options.VictimOptions):
    method: Literal["maze", "dfme", "disguide"] = "maze"
    """The loss, and the values of the constants below that are None."""
    victim: str = "movinet_a2_k600"
    student: str = "r3d_18"
    val: str = "datasets/kinetics600_val"
    num_frames: int = 16
    stride: int = 2
    size: int = 112
    iterations: int = 500
    batch_size: int = 128
    generator_steps: options.Natural = 1
    """Generator steps in an iteration."""
    student_steps: int = 5
    replay_steps: int | None = None
    """Student steps on replayed clips in an iteration: 10 for maze, 0 for dfme, 3 for disguide."""
    num_directions: int | None = None
    """Random directions per gradient estimate (m): 10 for maze, 1 for dfme."""
    student_lr: float = 1e-3
    generator_lr: float = 1e-5
    schedule: Literal["cosine", "steps"] | None = None
    """Of the learning rates: cosine (maze, disguide), or steps, x 0.3 at 10, 30 and 50 % (dfme)."""
    diversity: options.Rate = 0.2
    """Weight of the classes' variety in the generator's loss (disguide; published: 0.2 for 10 classes, 0.04 for 100)."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto is bf16 on a GPU, where rounding swamps the finite-difference estimate."""


DEMO = options.DEMO | dict(
    victim="demo_movinet",
    student="r2plus1d_tiny",
    generator="layered",
    iterations=50,
    batch_size=32,
    replay_steps=20,
    num_directions=2,
    epsilon=0.03,
    student_crop=0.2,
    student_lr=2e-3,
    generator_lr=3e-4,
    score_every=3200,
    checkpoint_seconds=60.0,  # with 900 MB of clips for replay
)


@experiment
def main(config: Config, run: Run) -> dict:
    method = find_method(config.method, config.answers)
    num_directions = method.num_directions if config.num_directions is None else config.num_directions
    replay_steps = method.replay_steps if config.replay_steps is None else config.replay_steps
    schedule = SCHEDULES[config.schedule or method.schedule]
    compute, victim, evaluator = open_attack(config, run, exact=True)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    generator = create_generator(config.generator, victim.num_classes, config.num_frames, config.size).to(compute.device)
    rival = None
    if method.two_students:
        rival = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    attacker = Attacker(
        victim, student, generator,
        create_optimizer(config.optimizer, student.parameters(), config.student_lr, config.weight_decay),
        create_optimizer(config.optimizer, generator.parameters(), config.generator_lr, config.weight_decay),
        method, clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if replay_steps else 0, seed=config.seed, rival=rival, crop=config.student_crop,
    )  # fmt: skip
    per_iteration = config.generator_steps * (0 if rival else 1 + num_directions) + config.student_steps
    num_queries = config.iterations * config.batch_size * per_iteration
    with DataFree(
        run, attacker, evaluator, iterations=config.iterations, num_queries=num_queries, score_every=config.score_every
    ) as attack:
        for iteration in attack:
            attacker.set_learning_rates(schedule(iteration / config.iterations))
            for _ in range(config.generator_steps):
                if rival is None:
                    attacker.step_generator(attacker.disagreement, num_directions, config.epsilon)
                else:
                    attacker.step_generator_to_disagreement(config.diversity)
            for _ in range(config.student_steps):
                attacker.step_student()
            for _ in range(replay_steps):
                attacker.step_replay()
    return attack.finish(method=config.method)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
