"""The grey-box table on real labelled motion: 22 words of the GRID corpus, read from the lips.

    python benchmarks/lip_reading.py --victim-weights runs/lip_reading/victim.safetensors --seeds 0 1 2 --jobs 2

docs/data.md says how the corpus is laid out and divided by sentence, docs/verification.md how a victim is made. The attacker
has the labelled clips of a fifth of the sentences, and clips of other words without labels. The constants are those of the
victim's teacher, chosen before any student was trained; rows differ by their script and by what the victim answers alone. What
is finished is not run again. Writes `table.md`.
"""

from dataclasses import dataclass

from extraction import options
from extraction.data.folders import require_folder
from extraction.evaluation.suite import Experiment, run_all
from extraction.experiment import run_script


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions):
    data: str = "datasets/grid"
    """Folder with task/, its lists and aux/, as docs/data.md lays them out."""
    victim_weights: str = "runs/lip_reading/victim.safetensors"
    """The victim, made by train_victim.py on task.victim.txt."""
    only: tuple[str, ...] = ()
    """Run and tabulate only these rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds."""
    epochs: options.Count = 30
    """Passes over the clips."""
    views_per_clip: options.Count = 4
    """Views of a clip that the victim is asked about: 1 200 clips make 4 800 queries."""
    size: options.Count = 64
    """Height and width of a clip, in pixels."""
    out_dir: str = "runs/lip_reading/rows"
    """Folder of all runs."""


def main(config: Config) -> str:
    options.check_options(config)
    task = require_folder(f"{config.data}/task", "clips of the task's words")
    aux = require_folder(f"{config.data}/aux", "clips of other words")
    own = ["--in-domain", task, "--in-domain-list", f"{config.data}/task.attacker.txt"]
    shown = ["--val", task, "--val-list", f"{config.data}/task.val.txt"]
    shown += ["--num-frames", 16, "--stride", 1, "--size", config.size]
    learnt = ["--student", "r2plus1d_tiny", "--student-weights", None, "--epochs", config.epochs, "--batch-size", 16]
    learnt += ["--head-lr", 0.002, "--body-lr", 0.002, "--num-workers", 1]
    varied = ["--schedule", "one_cycle", "--hflip", 0.5, "--brightness", 0.2, "--rotation", 8, "--clip-interval", 8]
    shared = [*own, *shown, *learnt, *varied]
    record = f"{config.out_dir}/{'victim_{node}.record' if config.cluster else 'victim.record'}"
    victim = ["--victim", "trained", "--victim-weights", config.victim_weights, "--victim-record", record]
    asked = [*victim, "--views-per-clip", config.views_per_clip]
    rows = {
        "labels_only": ("grey_box/labels_only.py", []),
        "own": ("grey_box/swin_to_r21.py", asked),
        "concatenated": ("grey_box/swin_to_r21.py", [*asked, "--aux", aux]),
        "kd": ("grey_box/swin_to_r21_kd.py", [*asked, "--aux", aux, "--label-weight", 1]),
        "label_only": ("grey_box/swin_to_r21.py", [*asked, "--aux", aux, "--answers", "label"]),
    }
    experiments = [
        Experiment(name, script, "-", tuple(str(flag) for flag in (*shared, *flags))) for name, (script, flags) in rows.items()
    ]
    return run_all(experiments, config.out_dir, False, config.seeds, config.only, jobs=config.jobs, cluster=config.cluster)


if __name__ == "__main__":
    run_script(main, Config, {})
