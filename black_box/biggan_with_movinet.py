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

from extraction import distributed, options
from extraction.attacks.distill import Training
from extraction.attacks.embeddings import Codes, Sampling, code_size, find_codes, sample_clips
from extraction.attacks.losses import kl_divergence
from extraction.data.images import DEMO_LAYERS, Motion
from extraction.data.queries import QuerySet
from extraction.evaluation.results import QUERY_BUDGET
from extraction.experiment import experiment, open_attack, run_script
from extraction.generators.biggan import WEIGHTS, open_biggan
from extraction.runs import Run
from extraction.students import create_student


@dataclass(frozen=True, kw_only=True)
class Config(options.Options, options.ImageOptions, options.VictimOptions):
    victim: str = "movinet_a2_k600"
    student: str = "resnet50"
    val: str = "datasets/kinetics600_val"
    num_frames: int = 32
    size: int = 224
    generator_weights: str | None = WEIGHTS
    """BigGAN-deep of 128 pixels; None is the demo's small untrained one."""
    truncation: options.Rate = 0.8
    """Truncation of the generator's noise."""
    num_random: options.Count = 20_000
    """Random embeddings that are asked about before the search."""
    population: options.Count = 32
    """Embeddings that a step of the search asks about."""
    num_steps: options.Natural = 50
    """Steps that the search takes for a class, at most."""
    search_step: options.Rate = 0.3
    """Distance of a step's embeddings from the best one (entries are about 1)."""
    confidence: options.Fraction = 0.9
    """Confidence with which the victim must name a class."""
    codes_per_class: options.Count = 1
    """Embeddings to find for each class."""
    spread: options.Rate = 0.1
    """Standard deviation around a found embedding from which clips are drawn."""
    clips_per_class: options.Count = 200
    """Clips of each class that the student learns from."""
    epochs: int = 10
    views_per_clip: options.Count | None = None
    """Cycle through this many samples of a clip instead of a new one each epoch, which bounds the queries."""
    num_workers: int = 0


DEMO = options.DEMO | dict(
    victim="demo_movinet",
    student="r2plus1d_tiny",
    generator_weights=None,
    truncation=1.0,
    layers=DEMO_LAYERS,
    num_random=600,
    population=16,
    num_steps=25,
    codes_per_class=25,
    spread=0.15,
    clips_per_class=160,
    epochs=5,
    views_per_clip=4,
    lr=2e-3,
    student_crop=0.2,
    ema=0.99,
    num_workers=0,
)


@experiment
def main(config: Config, run: Run) -> dict:
    distributed.require_one_process("the search")
    generator, mark = open_biggan(config.generator_weights, config.truncation)
    compute, victim, evaluator = open_attack(config, run)
    student = compute.prepare(create_student(config.student, victim.num_classes, config.student_weights))
    run.begin()
    motion, make_clips = Motion(config.num_frames, config.layers), partial(sample_clips, generator.to(compute.device))
    codes, search, exhausted = find_codes(
        victim, make_clips, mark, code_size(generator, len(config.layers)), Sampling(motion), compute.device,
        num_random=config.num_random, population=config.population, num_steps=config.num_steps, step=config.search_step,
        confidence=config.confidence, codes_per_class=config.codes_per_class, seed=config.seed,
    )  # fmt: skip
    search_queries = victim.num_queries
    unreached = [entry["class"] for entry in search if not entry["reached"]]
    print(f"{len(search) - len(unreached)} of {len(search)} classes named with more than {config.confidence}")
    clips = Codes(mark, victim.classes, codes, config.clips_per_class)
    queries = QuerySet(clips, Sampling(motion, config.spread), config.views_per_clip, config.seed, make_clips)
    optimizer = torch.optim.Adam(student.parameter_groups(*config.rates), fused=True)
    steps = config.epochs * -(-len(clips) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = Training(
        run, student, optimizer, schedule, evaluator, victim, queries, config.epochs, config.batch_size, config.num_workers,
        **config.recipe,
    )  # fmt: skip
    for batch in map(training.vary, training):
        loss = kl_divergence(training.forward(batch.clips), batch.targets)
        training.step(loss)
    stopped = QUERY_BUDGET if exhausted else None
    return training.finish(stopped=stopped, search=search, unreached=unreached, search_queries=search_queries)


if __name__ == "__main__":
    run_script(main, Config, DEMO)
