"""MoViNet-A2 into a per-frame ResNet-50 out of a frozen BigGAN: embeddings that the victim names are found, then sampled.

    python black_box/biggan_with_movinet.py --demo
    python black_box/biggan_with_movinet.py --val datasets/kinetics600_val

For each of the victim's C classes an embedding of BigGAN-deep (and a path along which its images move) is searched with an
evolution strategy, from answers alone, until the victim names the class with a confidence above 0.9. Clips drawn around the
embeddings then distil the student. Every clip is one query:

    num_queries = num_random + population * steps + C * clips_per_class * min(epochs, views_per_clip)

where `steps` counts the steps that the search took over all classes, at most C * num_steps: `results.json` lists them, and
the classes that were not reached. 12.43 % accuracy was reported on Kinetics-600; how is not told, so expect other numbers.

The demo: 56.5 ± 0.9 top-1, 55.2 ± 0.3 agreement@1 after 10 328 to 10 648 queries (two seeds; victim 92.5, chance 8.3).
"""

from dataclasses import dataclass
from functools import partial

import torch

from extraction.biggan import WEIGHTS, create_demo_biggan, load_biggan
from extraction.compute import choose_compute
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.images import Layer, Motion
from extraction.distill import distill
from extraction.distributed import require_one_process
from extraction.embeddings import Codes, Sampling, code_size, find_codes, sample_clips
from extraction.errors import BudgetExhausted
from extraction.report import finish
from extraction.runs import Run, check_at_least, run_script, set_seed
from extraction.setting import open_setting, repeat_results, require_inputs
from extraction.students import create_student
from extraction.weights import fingerprint


@dataclass(frozen=True)
class Config:
    victim: str = "movinet_a2_k600"
    """Whom to ask: an unknown name lists them; torchvision:, mmaction2: and pytorchvideo: take a model's name after them."""
    victim_weights: str | None = None
    """Weight file of the victim; by default its usual place under weights/."""
    answers: str = "probs"
    """What the victim gives away: logits, probs, top5 or label."""
    decimals: int | None = None
    """Round the victim's numbers to so many decimals."""
    query_budget: int | None = None
    """Stop before more than this many clips are answered; the student is saved and scored, exit status 1."""
    generator_weights: str | None = WEIGHTS
    """BigGAN-deep of 128 pixels; None is the demo's small untrained one."""
    truncation: float = 0.8
    num_random: int = 20_000
    """Random embeddings that are asked about before the search."""
    population: int = 32
    """Embeddings that a step of the search asks about."""
    num_steps: int = 50
    """Steps that the search takes for a class, at most."""
    step: float = 0.3
    confidence: float = 0.9
    codes_per_class: int = 1
    """Embeddings to find for each class."""
    spread: float = 0.1
    """How far around a found embedding clips are drawn (its entries are about 1)."""
    clips_per_class: int = 200
    layers: tuple[Layer, ...] = (Layer(),)
    """How each picture of a clip moves, from the bottom to the top."""
    student: str = "resnet50"
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from nothing."""
    val: str = "datasets/kinetics600_val"
    """Held-out labelled videos that score the student."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    min_victim_top1: float | None = None
    """Pay nothing unless the victim's top-1 on --val is at least this, a fraction (0.3); by default 3 times chance, 0: off."""
    num_frames: int = 32
    size: int = 224
    """Height and width of the held-out clips; the generator's own are 128x128."""
    epochs: int = 10
    views_per_clip: int | None = None
    """Show the same so many samples of a clip again and again instead of a new one each epoch: bounds the queries."""
    batch_size: int = 16
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 and so on; auto is a GPU if there is one."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU."""
    compile: str = "auto"
    """on, off, or auto: on a GPU, in a long run."""
    num_workers: int = 0
    """Processes that decode, one for each core at most."""
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints, from which an interrupted run goes on."""
    out_dir: str = "runs/biggan_with_movinet"
    demo: bool = False
    """Run on the embedded demo set, generator and victim: minutes on two CPU cores."""


DEMO = dict(
    demo=True, victim="demo_movinet", student="r2plus1d_tiny", generator_weights=None, truncation=1.0, val="datasets/demo/val",
    layers=(Layer(0.03, 1.0, 0.0, 1.02), Layer(0.35, 160.0, 10.0, 2.0, periods=4.0, moving=0.35, radius=0.17)),
    num_random=600, population=16, num_steps=25, codes_per_class=25, spread=0.15, clips_per_class=160,
    num_frames=16, size=48, epochs=5, views_per_clip=4, lr=2e-3, checkpoint_seconds=10.0,
    out_dir="runs/biggan_with_movinet_demo",
)  # fmt: skip


def main(config: Config) -> dict:
    check_at_least(config, 1, "num_random", "population", "codes_per_class", "clips_per_class", "epochs", "batch_size")
    check_at_least(config, 1, "num_frames", "size", "views_per_clip")
    check_at_least(config, 0, "query_budget", "num_steps", "step", "confidence", "spread", "lr", "num_workers")
    require_inputs(config)
    if config.demo:
        write_demo_set("datasets/demo", {"val": ATTACK_SPLITS["val"]})  # the evaluator's alone
    require_one_process("the search")
    compute = choose_compute(config.device, config.precision, config.compile)
    if config.generator_weights is None:
        generator, mark = create_demo_biggan(), "demo"
    else:
        generator = load_biggan(config.generator_weights, truncation=config.truncation)
        mark = f"{fingerprint(config.generator_weights)}@{config.truncation}"
    run = Run("biggan_with_movinet", config.out_dir, config, config.checkpoint_seconds)
    if run.finished:
        return repeat_results(run.finished)
    victim, evaluator = open_setting(
        run, compute, victim=config.victim, victim_weights=config.victim_weights, answers=config.answers,
        query_budget=config.query_budget, val=config.val, val_list=config.val_list, min_victim_top1=config.min_victim_top1,
        num_frames=config.num_frames, stride=1, size=config.size, batch_size=config.batch_size, num_workers=config.num_workers,
        decimals=config.decimals,
    )  # fmt: skip
    set_seed(config.seed)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    run.begin()
    paths, make_clips = Motion(config.num_frames, config.layers), partial(sample_clips, generator.to(compute.device))
    codes, search, cut = find_codes(
        victim, make_clips, mark, code_size(generator, len(config.layers)), Sampling(paths), compute.device,
        num_random=config.num_random, population=config.population, num_steps=config.num_steps, step=config.step,
        confidence=config.confidence, codes_per_class=config.codes_per_class, seed=config.seed,
    )  # fmt: skip
    unreached = [entry["class"] for entry in search if not entry["reached"]]
    searched = victim.num_queries
    print(f"{len(search) - len(unreached)} of {len(search)} classes named with more than {config.confidence}; "
          f"not reached: {', '.join(unreached) or 'none'}")  # fmt: skip
    clips = Codes(mark, victim.classes, codes, config.clips_per_class)
    if not len(clips):
        raise BudgetExhausted(cut)
    optimizer = torch.optim.Adam(student.parameters(), config.lr, fused=True)
    steps = config.epochs * -(-len(clips) // config.batch_size)
    history, stopped = distill(
        run, student, victim, clips, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), evaluator.score,
        epochs=config.epochs, batch_size=config.batch_size, augmentation=Sampling(paths, config.spread), make_views=make_clips,
        views_per_clip=config.views_per_clip, seed=config.seed, num_workers=config.num_workers,
    )  # fmt: skip
    return finish(
        run, student, victim, evaluator, history, f"{cut}; the student is untrained" if cut else stopped,
        search=search, unreached=unreached, search_queries=searched,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, Config, DEMO)
