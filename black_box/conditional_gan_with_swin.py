"""Video Swin into R3D-18 without any data: first a generator that the victim names as asked, then a student of its clips.

    python black_box/conditional_gan_with_swin.py --demo
    python black_box/conditional_gan_with_swin.py --val datasets/kinetics400_val

First the class-conditional generator learns, from the victim's answers alone, to make clips that the victim names as the
class they were asked for: it lowers -log p(class), its gradient estimated by forward differences. Then it stays as it
is, and the student learns from the answers to its clips. The bill, with m directions:

    num_queries = batch_size * (generator_iterations * (1 + m) + iterations * student_steps)

The 2022 report had 4.85 top-5 / 0.84 top-1 on Kinetics-400 after about 1 M queries (chance is 1.25 / 0.25). The demo has
a generator of few numbers, `layered`, which knows that something moves in front of something else: most of its score comes
from that knowledge; its 20 steps don't teach it to be named as asked (`named_as_asked` in results.json).

The demo: 28.1 ± 3.8 top-1, 28.1 ± 4.4 agreement@1 after 11 200 queries (two seeds; victim 97.5, chance 8.3).
"""

from dataclasses import dataclass

from extraction.compute import choose_compute
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data_free import METHODS, SCHEDULES, Attacker, create_optimizer, extract
from extraction.errors import UserError
from extraction.generators import create_generator
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_generator, require_inputs
from extraction.students import create_student


@dataclass(frozen=True)
class Config:
    victim: str = "swin_b_k400"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs or top5: a label alone has no slope."""
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
    generator_iterations: int = 400
    """Of the generator alone, first."""
    iterations: int = 800
    """Of the student alone, then."""
    batch_size: int = 128
    student_steps: int = 5
    replay_steps: int = 10
    num_directions: int = 10
    """Of the estimate."""
    smoothing: float = 1e-3
    """How far the estimate's clips are moved, before the sigmoid."""
    replay_clips: int = 8192
    """How many answered clips are kept for replay; they take 3 * T * H * W bytes each."""
    optimizer: str = "adam"
    """adam, or sgd with momentum 0.9."""
    student_lr: float = 1e-3
    generator_lr: float = 1e-5
    weight_decay: float = 5e-4
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
    out_dir: str = "runs/conditional_gan_with_swin"
    demo: bool = False
    """Run on the embedded demo set and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_swin", student="r2plus1d_tiny", generator="layered", val="datasets/demo/val", stride=1, size=48,
    generator_iterations=20, iterations=50, batch_size=32, replay_steps=6, num_directions=4, smoothing=0.03,
    replay_clips=1024, student_lr=2e-3, generator_lr=1e-3, score_every=3200, num_workers=1, checkpoint_seconds=15.0,
    out_dir="runs/conditional_gan_with_swin_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(
        config, 1, "iterations", "student_steps", "batch_size", "num_frames", "stride", "size", "num_directions", "score_every"
    )
    check_at_least(config, 0, "query_budget", "generator_iterations", "replay_steps", "num_workers")
    check_at_least(config, 0, "student_lr", "generator_lr", "weight_decay")
    check_at_least(config, 1e-6, "smoothing")
    if config.answers == "label":
        raise UserError("--answers label: the generator needs to see how near a clip is to its class; use probs, logits or top5")
    require_generator(config.generator)
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})
    compute = choose_compute(config.device, config.precision, config.compile)
    run = Run("conditional_gan_with_swin", config.out_dir, config, config.checkpoint_seconds)
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
        METHODS["maze"], clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        replay_clips=config.replay_clips if config.replay_steps else 0, seed=config.seed,
    )  # fmt: skip

    def iterate(attacker: Attacker, iteration: int) -> None:
        if iteration < config.generator_iterations:
            attacker.step_generator(attacker.naming, config.num_directions, config.smoothing)
            return
        for _ in range(config.student_steps):
            attacker.step_student()
        for _ in range(config.replay_steps):
            attacker.step_replay()

    def rate(iteration: int) -> float:
        own = iteration - config.generator_iterations
        return SCHEDULES["cosine"](own / config.iterations if own >= 0 else iteration / config.generator_iterations)

    history, stopped = extract(
        run, attacker, iterate, evaluator.score, iterations=config.generator_iterations + config.iterations,
        num_planned=config.batch_size
        * (config.generator_iterations * (1 + config.num_directions) + config.iterations * config.student_steps),
        rate=rate, score_every=config.score_every,
    )  # fmt: skip
    return finish(run, student, victim, evaluator, history, stopped)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
