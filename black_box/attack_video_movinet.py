"""MoViNet-A2 into R3D-18 without any data: a generator makes the clips, after MAZE or DFME.

    python black_box/attack_video_movinet.py --demo
    python black_box/attack_video_movinet.py --val datasets/kinetics600_val

MAZE (Kariyappa et al. 2021) or, with `--method dfme`, DFME (Truong et al. 2021) with a time axis: the generator moves to
where student and victim disagree, its gradient estimated by asking about perturbed clips. The bill, every perturbed clip
in it, with m directions:

    num_queries = iterations * batch_size * (generator_steps * (1 + m) + student_steps)

MAZE's published constants make that 2 048 queries an iteration. The 2022 report had 4.13 top-5 on Kinetics-600
after about 1 M queries (chance is 0.83); its generator mixed frames and channels, so expect other numbers. The demo has a
generator of few numbers, `layered`, which knows that something moves in front of something else.

The demo: 13.7 ± 1.2 top-1, 14.0 ± 0.9 agreement@1 after 12 800 queries (two seeds; victim 92.5, chance 8.3).
"""

from dataclasses import dataclass

from extraction.compute import choose_compute
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data_free import Attacker, create_optimizer, extract, find_method, find_schedule
from extraction.generators import create_generator
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_generator, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    method: str = "maze"
    """maze or dfme: the loss, and the values of the constants below that are None."""
    victim: str = "movinet_a2_k600"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs, top5 or label; dfme needs logits or probs."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    student: str = "r3d_18"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from nothing."""
    generator: str = "dvdgan"
    """dvdgan, deconv (a simple 3D deconvolution), layered (a patch before a background), dvdgan_small or deconv_small."""
    val: str = "datasets/kinetics600_val"
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
    generator_steps: int = 1
    student_steps: int = 5
    replay_steps: int | None = None
    """10 for maze, 0 for dfme."""
    num_directions: int | None = None
    """Of the estimate: 10 for maze, 1 for dfme."""
    smoothing: float = 1e-3
    """How far the estimate's clips are moved, before the sigmoid. As published for small images; for whole clips 0.1 loses
    less to float32: against demo_swin, 110 592 pixels, slopes correlate 0.92 with the true ones at 1e-3, 1.00 at 0.1."""
    replay_clips: int = 8192
    """How many answered clips are kept for replay; they take 3 * T * H * W bytes each."""
    optimizer: str = "adam"
    """adam, or sgd with momentum 0.9 (as both papers on small images)."""
    student_lr: float = 1e-3
    generator_lr: float = 1e-5
    weight_decay: float = 5e-4
    schedule: str | None = None
    """cosine (maze) or steps: x 0.3 at 10, 30 and 50 % (dfme)."""
    score_every: int = 100_000
    """Score the student every so many queries."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 and so on; auto is a GPU if there is one."""
    precision: str = "fp32"
    """fp32, bf16, or auto: bf16 on a GPU. In bf16 the estimated slopes drown in rounding."""
    compile: str = "auto"
    """on, off, or auto: on a GPU, in a long run."""
    num_workers: int = 8
    """Processes that decode, one for each core at most."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints, from which an interrupted run goes on."""
    out_dir: str = "runs/attack_video_movinet"
    demo: bool = False
    """Run on the embedded demo set and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_movinet", student="r2plus1d_tiny", generator="layered", val="datasets/demo/val", stride=1, size=48,
    iterations=50, batch_size=32, replay_steps=6, num_directions=2, smoothing=0.03, replay_clips=1024, student_lr=2e-3,
    generator_lr=3e-4, score_every=3200, num_workers=1, checkpoint_seconds=15.0,
    out_dir="runs/attack_video_movinet_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "iterations", "batch_size", "num_frames", "stride", "size", "num_directions", "score_every")
    check_at_least(config, 1, "student_steps", "replay_clips")
    check_at_least(config, 0, "query_budget", "generator_steps", "replay_steps", "num_workers")
    check_at_least(config, 0, "student_lr", "generator_lr", "weight_decay")
    check_at_least(config, 1e-6, "smoothing")
    method = find_method(config.method, config.answers)
    directions = method.num_directions if config.num_directions is None else config.num_directions
    replay_steps = method.replay_steps if config.replay_steps is None else config.replay_steps
    schedule = find_schedule(config.schedule or method.schedule)
    require_generator(config.generator)
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})
    compute = choose_compute(config.device, config.precision, config.compile)
    run = Run("attack_video_movinet", config.out_dir, config, config.checkpoint_seconds)
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
    generator = create_generator(config.generator, victim.num_classes, config.num_frames, config.size).to(compute.device)
    attacker = Attacker(
        victim, student, generator,
        create_optimizer(config.optimizer, student.parameters(), config.student_lr, config.weight_decay),
        create_optimizer(config.optimizer, generator.parameters(), config.generator_lr, config.weight_decay),
        method, clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if replay_steps else 0, seed=config.seed,
    )  # fmt: skip

    def iterate(attacker: Attacker, iteration: int) -> None:
        for _ in range(config.generator_steps):
            attacker.step_generator(attacker.disagreement, directions, config.smoothing)
        for _ in range(config.student_steps):
            attacker.step_student()
        for _ in range(replay_steps):
            attacker.step_replay()

    history, stopped = extract(
        run, attacker, iterate, evaluator.score, iterations=config.iterations,
        num_planned=config.iterations * config.batch_size * (config.generator_steps * (1 + directions) + config.student_steps),
        rate=lambda iteration: schedule(iteration / config.iterations), score_every=config.score_every,
    )  # fmt: skip
    return finish(run, student, victim, evaluator, history, stopped, method=config.method)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
