"""Random noise against Video Swin: what a student learns from answers to clips of nothing. The baseline without data.

    python black_box/random_noise_with_swin.py --demo
    python black_box/random_noise_with_swin.py --val datasets/kinetics400_val

Every pixel of every frame is drawn from a normal distribution around grey, clipped to 0..1. Every clip is one query:

    num_queries = iterations * batch_size * student_steps

The 2022 report had 1.26 top-5 / 0.27 top-1 on Kinetics-400: chance is 1.25 / 0.25.

The demo: 8.3 top-1, 9.2 agreement@1 after 3 200 queries (two seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass

from extraction import options
from extraction.attacks.data_free import METHODS, SCHEDULES, Attacker, DataFree, create_optimizer
from extraction.experiment import experiment, open_attack, run_script
from extraction.generators import create_generator
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.DataFreeOptions, options.VictimOptions):
    victim: str = "swin_b_k400"
    student: str = "r3d_18"
    val: str = "datasets/kinetics400_val"
    num_frames: int = 16
    stride: int = 2
    size: int = 112
    iterations: int = 500
    batch_size: int = 128
    student_steps: int = 5
    replay_steps: int = 10
    student_lr: float = 1e-3


DEMO = options.DEMO | dict(
    victim="demo_swin",
    student="r2plus1d_tiny",
    iterations=20,
    batch_size=32,
    replay_steps=3,
    replay_clips=1024,
    student_lr=2e-3,
    score_every=1600,
)


@experiment
def main(config: Config, run: Run) -> dict:
    compute, victim, evaluator = open_attack(config, run, exact=True)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    generator = create_generator("noise", victim.num_classes, config.num_frames, config.size).to(compute.device)
    attacker = Attacker(
        victim, student, generator,
        create_optimizer(config.optimizer, student.parameters(), config.student_lr, config.weight_decay),
        None, METHODS["maze"], clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if config.replay_steps else 0, seed=config.seed, crop=config.student_crop,
    )  # fmt: skip
    num_queries = config.iterations * config.batch_size * config.student_steps
    with DataFree(
        run, attacker, evaluator, iterations=config.iterations, num_queries=num_queries, score_every=config.score_every
    ) as attack:
        for iteration in attack:
            attacker.set_learning_rates(SCHEDULES["cosine"](iteration / config.iterations))
            for _ in range(config.student_steps):
                attacker.step_student()
            for _ in range(config.replay_steps):
                attacker.step_replay()
    return attack.finish()


if __name__ == "__main__":
    run_script(main, Config, DEMO)
