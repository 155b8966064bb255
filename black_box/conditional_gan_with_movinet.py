"""MoViNet-A2 into R3D-18 without any data: first a generator that the victim names as asked, then a student of its clips.

    python black_box/conditional_gan_with_movinet.py --demo
    python black_box/conditional_gan_with_movinet.py --val datasets/kinetics600_val

First the class-conditional generator learns, from the victim's answers alone, to make clips that the victim names as the
class they were asked for: it lowers -log p(class), its gradient estimated by forward differences. Then it stays as it
is, and the student learns from the answers to its clips. With m directions:

    num_queries = batch_size * (generator_iterations * (1 + m) + iterations * student_steps)

No number was reported against MoViNet. The demo has a generator of few numbers, `layered`, which knows that something
moves in front of something else.

The demo: 15.8 ± 1.2 top-1, 17.3 ± 0.9 agreement@1 after 11 200 queries (two seeds; victim 92.5, chance 8.3).
"""

from dataclasses import dataclass
from typing import Literal

from extraction import options
from extraction.attacks.data_free import METHODS, SCHEDULES, Attacker, DataFree, create_optimizer
from extraction.experiment import experiment, open_attack, run_script
from extraction.generators import create_generator
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.DataFreeOptions, options.GeneratorOptions, options.VictimOptions):
    victim: str = "movinet_a2_k600"
    student: str = "r3d_18"
    val: str = "datasets/kinetics600_val"
    num_frames: int = 16
    stride: int = 2
    size: int = 112
    answers: Literal["logits", "probs", "top5"] = "probs"
    """What the victim returns for a clip; a label alone has no slope to climb."""
    generator_iterations: options.Natural = 400
    """Iterations of the generator alone, first."""
    iterations: int = 800
    """Iterations of the student alone, then."""
    batch_size: int = 128
    student_steps: int = 5
    replay_steps: int = 10
    num_directions: int = 10
    student_lr: float = 1e-3
    generator_lr: float = 1e-5
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto is bf16 on a GPU, where rounding swamps the finite-difference estimate."""


DEMO = options.DEMO | dict(
    victim="demo_movinet",
    student="r2plus1d_tiny",
    generator="layered",
    generator_iterations=20,
    iterations=50,
    batch_size=32,
    replay_steps=20,
    num_directions=4,
    epsilon=0.03,
    student_crop=0.2,
    student_lr=2e-3,
    generator_lr=1e-3,
    score_every=3200,
)


@experiment
def main(config: Config, run: Run) -> dict:
    compute, victim, evaluator = open_attack(config, run, exact=True)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    generator = create_generator(config.generator, victim.num_classes, config.num_frames, config.size).to(compute.device)
    attacker = Attacker(
        victim, student, generator,
        create_optimizer(config.optimizer, student.parameters(), config.student_lr, config.weight_decay),
        create_optimizer(config.optimizer, generator.parameters(), config.generator_lr, config.weight_decay),
        METHODS["maze"], clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if config.replay_steps else 0, seed=config.seed, crop=config.student_crop,
    )  # fmt: skip
    iterations = config.generator_iterations + config.iterations
    num_queries = config.batch_size * (
        config.generator_iterations * (1 + config.num_directions) + config.iterations * config.student_steps
    )
    with DataFree(
        run, attacker, evaluator, iterations=iterations, num_queries=num_queries, score_every=config.score_every
    ) as attack:
        for iteration in attack:
            if iteration < config.generator_iterations:
                attacker.set_learning_rates(SCHEDULES["cosine"](iteration / config.generator_iterations))
                attacker.step_generator(attacker.class_objective, config.num_directions, config.epsilon)
                continue
            attacker.set_learning_rates(SCHEDULES["cosine"]((iteration - config.generator_iterations) / config.iterations))
            for _ in range(config.student_steps):
                attacker.step_student()
            for _ in range(config.replay_steps):
                attacker.step_replay()
    return attack.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
