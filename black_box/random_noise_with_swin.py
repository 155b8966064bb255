"""Random noise against Video Swin: what a student learns from answers to clips of nothing. The baseline without data.

    python black_box/random_noise_with_swin.py --demo
    python black_box/random_noise_with_swin.py --val datasets/kinetics400_val

Every pixel of every frame is drawn from a normal distribution around grey, clipped to 0..1. The bill:

    num_queries = iterations * batch_size * student_steps

The 2022 report had 1.26 top-5 / 0.27 top-1 on Kinetics-400: chance is 1.25 / 0.25.

The demo: 8.3 top-1, 9.2 agreement@1 after 3 200 queries (two seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass

from extraction.compute import choose_compute
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data_free import METHODS, SCHEDULES, Attacker, create_optimizer, extract
from extraction.generators import create_generator
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    victim: str = "swin_b_k400"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs, top5 or label."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    student: str = "r3d_18"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from nothing."""
    val: str = "datasets/kinetics400_val"
    """Held-out labelled videos that score the student; nothing is chosen by them."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Pay nothing unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 16
    stride: int = 2
    """A clip takes one of so many frames of a held-out video: 2 is every other one."""
    size: int = 112
    """Height and width of the clips that are sent."""
    iterations: int = 500
    batch_size: int = 128
    student_steps: int = 5
    replay_steps: int = 10
    replay_clips: int = 8192
    """How many answered clips are kept for replay; they take 3 * T * H * W bytes each."""
    optimizer: str = "adam"
    """adam, or sgd with momentum 0.9."""
    student_lr: float = 1e-3
    weight_decay: float = 5e-4
    score_every: int = 100_000
    """Score the student every so many queries."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 and so on; auto is a GPU if there is one."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU."""
    compile: str = "auto"
    """on, off, or auto: on a GPU, in a long run."""
    num_workers: int = 8
    """Processes that decode, one for each core at most."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints, from which an interrupted run goes on."""
    out_dir: str = "runs/random_noise_with_swin"
    demo: bool = False
    """Run on the embedded demo set and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_swin", student="r2plus1d_tiny", val="datasets/demo/val", stride=1, size=48, iterations=20,
    batch_size=32, replay_steps=3, replay_clips=1024, student_lr=2e-3, score_every=1600, num_workers=1,
    checkpoint_seconds=15.0, out_dir="runs/random_noise_with_swin_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "iterations", "batch_size", "num_frames", "stride", "size", "student_steps", "score_every")
    check_at_least(config, 1, "replay_clips")
    check_at_least(config, 0, "query_budget", "replay_steps", "num_workers")
    check_at_least(config, 0, "student_lr", "weight_decay")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})
    compute = choose_compute(config.device, config.precision, config.compile)
    run = Run("random_noise_with_swin", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    victim, evaluator = open_setting(
        run, compute, victim=config.victim, victim_weights=config.victim_weights, answers=config.answers,
        query_budget=config.query_budget, val=config.val, val_list=config.val_list, min_victim_top1=config.min_victim_top1,
        num_frames=config.num_frames, stride=config.stride, size=config.size, batch_size=config.batch_size,
        num_workers=config.num_workers, exact=True, decimals=config.decimals,
    )  # fmt: skip
    set_seed(config.seed)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    generator = create_generator("noise", victim.num_classes, config.num_frames, config.size).to(compute.device)
    attacker = Attacker(
        victim, student, generator,
        create_optimizer(config.optimizer, student.parameters(), config.student_lr, config.weight_decay),
        None, METHODS["maze"], clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if config.replay_steps else 0, seed=config.seed,
    )  # fmt: skip

    def iterate(attacker: Attacker, iteration: int) -> None:
        for _ in range(config.student_steps):
            attacker.step_student()
        for _ in range(config.replay_steps):
            attacker.step_replay()

    history, stopped = extract(
        run, attacker, iterate, evaluator.score, iterations=config.iterations,
        num_planned=config.iterations * config.batch_size * config.student_steps,
        rate=lambda iteration: SCHEDULES["cosine"](iteration / config.iterations), score_every=config.score_every,
    )  # fmt: skip
    return finish(run, student, victim, evaluator, history, stopped)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
