"""Every grey-box experiment, ending in their table with our numbers beside the published.

    python grey_box/run_all.py --demo
    python grey_box/run_all.py --demo --seeds 0 1 2
    python grey_box/run_all.py --seeds 0 1 2 --jobs 4

What is finished is not run again; after an interruption the same command goes on. Writes `table.md` and `table.png`.
"""

from dataclasses import dataclass

from extraction import options
from extraction.evaluation.suite import Experiment, run_all
from extraction.experiment import run_script


def grey_box(name: str, published: str, *flags: str) -> Experiment:
    return Experiment(name, f"grey_box/{name}.py", published, flags)


def stage(name: str, published: str, before: str) -> Experiment:
    return grey_box(name, published, "--student-weights", f"{{runs}}/{before}/student.safetensors")


CONCATENATED = {True: ("--epochs", "9", "--views-per-clip", "4"), False: ()}  # as many queries as the other demos


def list_experiments(demo: bool) -> list[Experiment]:
    return [
        grey_box("labels_only", "-"),
        grey_box("swin_to_c3d", "27.5 / 8.4"),
        grey_box("swin_to_r21", "42.5 / 19.1"),
        Experiment(
            "swin_to_r21_concatenated", "grey_box/swin_to_r21.py", "51.8 / 30.6",
            ("--aux", "ucf101", "hmdb51", *CONCATENATED[demo]),
        ),
        grey_box("swin_to_r21_using_cosine", "-"),
        grey_box("swin_to_r21_prada", "34.2 / 12.67"),
        grey_box("swin_to_r21_kd", "54.8 / 31.4"),
        grey_box("movinet_to_r21", "67.3 / -"),
        grey_box("swin_to_vit_auxiliary", "- / 8.3"),
        stage("swin_to_vit_finetune", "- / 12.6", "swin_to_vit_auxiliary"),
        stage("swin_to_vit_ticket", "- / 17.3", "swin_to_vit_finetune"),
        grey_box("movinet_to_r50_auxiliary", "- / 13.8"),
        stage("movinet_to_r50_finetune", "- / 22.3", "movinet_to_r50_auxiliary"),
        stage("movinet_to_r50_ticket", "- / 33.5", "movinet_to_r50_finetune"),
    ]  # fmt: skip


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
    out_dir: str = "runs/grey_box"
    """Folder of all runs, a folder for each seed in it."""
    demo: bool = False
    """Run on the built-in demo set and victims: an hour or more on one CPU core."""


DEMO = dict(demo=True, out_dir="runs/grey_box_demo")


def main(config: Config) -> str:
    options.check_options(config)
    document = "grey_box/run_all.py" if config.write_docs else None
    return run_all(
        list_experiments(config.demo), config.out_dir, config.demo, config.seeds, config.only, document, config.against,
        jobs=config.jobs, cluster=config.cluster,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, Config, DEMO)
