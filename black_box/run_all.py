"""Every black-box experiment, ending in their table with our numbers beside the published.

    python black_box/run_all.py --demo
    python black_box/run_all.py --demo --seeds 0 1 2
    python black_box/run_all.py --seeds 0 1 2 --jobs 4

What is finished is not run again; after an interruption the same command goes on. Writes `table.md` and `table.png`.
"""

from dataclasses import dataclass

from extraction import options
from extraction.evaluation.suite import Experiment, run_all
from extraction.experiment import run_script

PUBLISHED = {
    "random_noise_with_swin": "1.26 / 0.27",
    "attack_video_swin": "2.69 / 0.41",
    "attack_video_movinet": "4.13 / -",
    "conditional_gan_with_swin": "4.85 / 0.84",
    "conditional_gan_with_movinet": "-",
    "stacked_images_with_swin": "1.22 / 0.30",
    "stacked_images_with_movinet": "-",
    "natural_images_label_only": "39.42 / -",
    "biggan_with_swin": "- / 7.8",
    "biggan_with_movinet": "- / 12.43",
}


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions):
    seeds: tuple[int, ...] = (0,)
    """Random seeds; with several, the table has their mean and standard deviation."""
    only: tuple[str, ...] = ()
    """Run and tabulate only these experiments."""
    against: str | None = None
    """Add a column with the differences to this experiment, paired by seed, and their standard error."""
    write_docs: bool = False
    """Write the table into docs/results.md too, between the markers of this script."""
    out_dir: str = "runs/black_box"
    """Folder of all runs, a folder for each seed in it."""
    demo: bool = False
    """Run on the built-in demo set and victims: an hour or more on one CPU core."""


DEMO = dict(demo=True, out_dir="runs/black_box_demo")


def main(config: Config) -> str:
    options.check_options(config)
    experiments = [Experiment(name, f"black_box/{name}.py", published) for name, published in PUBLISHED.items()]
    document = "black_box/run_all.py" if config.write_docs else None
    return run_all(
        experiments, config.out_dir, config.demo, config.seeds, config.only, document, config.against,
        jobs=config.jobs, cluster=config.cluster,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, Config, DEMO)
