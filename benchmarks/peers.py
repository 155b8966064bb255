"""Other tools' extraction attacks beside ours: the same victim, clips, student, query budget, optimiser and evaluator.

pip install -e '.[peers]'
python benchmarks/peers.py
python benchmarks/peers.py --ours="--student-crop 0.2 --temperature 4 --ema 0.99" --out-dir runs/peers_recipe

The peers are the Adversarial Robustness Toolbox 1.20.1 (`CopycatCNN` by labels, arXiv 1806.05476; `KnockoffNets`, arXiv
1812.02766, random by probabilities and adaptive by labels) and the loop of ML-Doctor (arXiv 2102.02551), its answers cached:
mean squared error of the student's outputs to the victim's probabilities. They have no query counter: a wrapper around the
victim counts for them. Ours is `grey_box/swin_to_r21.py`, which sends each clip once, in its augmented view.

Where they differ: the peers hold all clips in memory, score nothing and keep nothing; ours decodes, scores itself after each
epoch and writes its ledger. `KnockoffNets` adaptive draws clips with replacement, asking for some of them twice, and takes a
step on each clip as it comes before its epochs: the column "steps" counts. Its bandit's arms are the folders of the clips; its
reward is the certainty of answers, for that of "loss" would take the softmax of probabilities.

Seconds are wall-clock from before victim and clips are loaded (ours: from the start of Python) to the saved student, and mean
little with `--jobs`; peak memory is that of the process. Each run is a process of its own. What is done is not run again;
writes table.md.
"""

import importlib.util
import json
import resource
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extraction import options
from extraction.data.clips import Clips, load_batches
from extraction.data.demo import ATTACK_SPLITS, write_demo_set
from extraction.data.folders import find_aux_videos, find_videos
from extraction.errors import UserError
from extraction.evaluation.results import format_table, read_run
from extraction.evaluation.suite import describe_spread, score_unseen
from extraction.evaluation.sweep import Step, run_cells
from extraction.experiment import run_script
from extraction.runs import current_commit
from extraction.students import Student, create_student
from extraction.victims.zoo import load_model
from extraction.weights import save_weights, write_text

PROJECT = Path(__file__).parents[1]
VICTIM, STUDENT, SHAPE = "demo_swin", "r2plus1d_tiny", (3, 16, 48, 48)
# What each is shown of an answer.
METHODS = {
    "art_knockoff_random": "probs",
    "art_copycat": "label",
    "art_knockoff_adaptive": "label",
    "ml_doctor": "probs",
    "ours_probs": "probs",
    "ours_label": "label",
}


@dataclass(frozen=True, kw_only=True)
class Config(options.SweepOptions):
    only: tuple[str, ...] = ()
    """Run only these of art_knockoff_random, art_copycat, art_knockoff_adaptive, ml_doctor, ours_probs, ours_label."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; the table has means and standard deviations."""
    budget: options.Count = 2640
    """Queries, and clips: each is asked once."""
    epochs: options.Count = 9
    """Passes of the student over its answers."""
    batch_size: options.Count = 16
    """Clips in a batch."""
    lr: options.Rate = 1.5e-3
    """Learning rate of AdamW."""
    ours: str = ""
    """Further flags of our script, in one string after an =."""
    in_domain: str = "datasets/demo/train_5per"
    """Videos of the victim's task, in class folders."""
    aux: tuple[str, ...] = ("ucf101", "hmdb51")
    """Unrelated videos."""
    out_dir: str = "runs/peers"
    """Folder of all runs."""
    here: bool = False
    """Run in this process, and write no table: what the other processes are started with."""


class CountedVictim(nn.Module):
    """A victim's probabilities (B, num_classes) for (B, 3, T, H, W) clips, each clip counted as it is answered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.num_queries = model, 0

    def forward(self, clips: Tensor) -> Tensor:
        self.num_queries += len(clips)
        return self.model(clips).softmax(1)


def load_pool(config: Config, seed: int, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All clips in memory, float32 (N, 3, T, H, W) in [0, 1], and the number of the folder of each, (N,)."""
    videos = find_videos(config.in_domain, classes, "train") + find_aux_videos(config.aux, True)
    num_frames, size = SHAPE[1:3]
    clips = Clips(videos, num_frames=num_frames, size=size, clip_interval=num_frames, num_clips=config.budget, seed=seed)
    pool, folders = np.empty((len(clips), *SHAPE), np.float32), [ref.path.parent.name for ref in clips.refs]
    for batch in load_batches(clips, [range(i, min(i + 64, len(clips))) for i in range(0, len(clips), 64)], 0):
        pool[batch.indices] = batch.clips.permute(0, 4, 1, 2, 3).numpy() / np.float32(255)
    return pool, np.unique(folders, return_inverse=True)[1]


def train_by_art(
    config: Config, method: str, victim: CountedVictim, student: Student, optimizer: Any, pool: np.ndarray, folders: np.ndarray
) -> None:
    """Train `student` by one of the toolbox's attacks."""
    from art.attacks.extraction import CopycatCNN, KnockoffNets
    from art.estimators.classification import PyTorchClassifier

    def wrap(model: nn.Module, optimizer: Any = None) -> Any:  # its cross-entropy takes probabilities too
        shape = dict(input_shape=SHAPE, nb_classes=student.num_classes, clip_values=(0.0, 1.0), device_type="cpu")
        return PyTorchClassifier(model, nn.CrossEntropyLoss(), optimizer=optimizer, **shape)

    batches = dict(batch_size_fit=config.batch_size, batch_size_query=config.batch_size)
    shared = batches | dict(nb_epochs=config.epochs, nb_stolen=config.budget)
    labels = None
    if method == "art_copycat":
        attack = CopycatCNN(wrap(victim), **shared)
    elif method == "art_knockoff_random":
        attack = KnockoffNets(wrap(victim), **shared, sampling_strategy="random", use_probability=True, verbose=False)
    else:
        attack = KnockoffNets(wrap(victim), **shared, sampling_strategy="adaptive", reward="cert", verbose=False)
        labels = folders
    attack.extract(pool, labels, thieved_classifier=wrap(student, optimizer))


def train_by_ml_doctor(config: Config, victim: CountedVictim, student: Student, optimizer: Any, pool: np.ndarray) -> None:
    """Train `student` on answers that are asked for once: mean squared error of its outputs to the probabilities."""
    clips = torch.from_numpy(pool)
    with torch.no_grad():
        answers = torch.cat([victim(part) for part in clips.split(config.batch_size)])
    student.train()
    for _ in range(config.epochs):
        for places in torch.randperm(len(clips)).split(config.batch_size):
            optimizer.zero_grad()
            F.mse_loss(student(clips[places]), answers[places]).backward()
            optimizer.step()


def run_peer(config: Config, method: str, seed: int, folder: Path) -> None:
    """Run a peer in this process, and leave its student and `results.json` in `folder`."""
    started = time.monotonic()
    model = load_model(VICTIM)
    victim = CountedVictim(model)
    np.random.seed(seed)  # the toolbox draws from it
    torch.manual_seed(seed)
    pool, folders = load_pool(config, seed, model.classes)
    student = create_student(STUDENT, len(model.classes))
    optimizer = torch.optim.AdamW(student.parameters(), config.lr, fused=True)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    if method == "ml_doctor":
        train_by_ml_doctor(config, victim, student, optimizer, pool)
    else:
        train_by_art(config, method, victim, student, optimizer, pool, folders)
    about = dict(student=STUDENT, classes=list(model.classes), num_frames=SHAPE[1], stride=1, size=SHAPE[2])
    save_weights(folder / "student.safetensors", student.net.state_dict(), about | dict(num_queries=victim.num_queries))
    results = dict(
        experiment=method, student=STUDENT, victim=VICTIM, victim_fingerprint=model.fingerprint, answers=METHODS[method],
        num_queries=victim.num_queries, commit=current_commit(), config=dict(seed=seed), stopped="epochs",
    )  # fmt: skip
    write_json(folder / "results.json", results)
    write_json(folder / "measured.json", dict(seconds=time.monotonic() - started, steps=len(steps), peak_mb=read_peak_mb()))


def read_peak_mb() -> float:
    """The most memory that this process has had, in MB. (getrusage's of a new process begins at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def build_command(config: Config, method: str, seed: int, folder: Path) -> list[str]:
    """Our script with the peers' constants: each clip is asked once."""
    answers = ["--answers", METHODS[method], "--num-clips", config.budget, "--views-per-clip", 1]
    data = ["--in-domain", config.in_domain, "--aux", *config.aux]
    training = ["--epochs", config.epochs, "--batch-size", config.batch_size, "--head-lr", config.lr, "--body-lr", config.lr]
    run = ["--demo", "--seed", seed, "--out-dir", folder, "--device", "cpu", "--clip-cache", folder / "clip_cache"]  # its own
    command = [sys.executable, PROJECT / "grey_box/swin_to_r21.py", *run, *data, *answers, *training, *shlex.split(config.ours)]
    return [str(part) for part in command]


def run_ours(config: Config, method: str, seed: int, folder: Path) -> None:
    """Run our script; `folder` is its run folder."""
    started = time.monotonic()
    command = tuple(build_command(config, method, seed, folder)[1:])
    if run_cells([[Step(method, f"{method}, seed {seed}", str(folder), command)]]):
        raise UserError(f"{method} (seed {seed}) failed; run the same again to try it once more")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    asked = json.loads((folder / "results.json").read_text())["num_queries"]
    steps = config.epochs * -(-asked // config.batch_size)
    write_json(folder / "measured.json", dict(seconds=time.monotonic() - started, steps=steps, peak_mb=peak))


def plan_step(config: Config, method: str, seed: int) -> Step:
    """One run, in a process of its own."""
    constants = ["--budget", config.budget, "--epochs", config.epochs, "--batch-size", config.batch_size, "--lr", config.lr]
    data = ["--in-domain", config.in_domain, "--aux", *config.aux, "--out-dir", config.out_dir]
    ours = [f"--ours={config.ours}"] if config.ours else []
    command = [__file__, "--here", "--only", method, "--seeds", seed, *constants, *data, *ours]
    name = f"{method} (seed {seed})"
    return Step(name, f"[{name}]", f"{config.out_dir}/seed_{seed}/{method}", tuple(str(part) for part in command))


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1))


def tabulate(config: Config, methods: list[str]) -> str:
    """The table of what there is, a row a method: means over seeds and their standard deviations."""
    rows = [["method", "answers", "queries", "steps", "top-1, unseen", "agreement@1, unseen", "seconds", "peak MB"]]
    for method in methods:
        folders = [Path(config.out_dir) / f"seed_{seed}" / method for seed in config.seeds]
        runs = [run | json.loads((f / "measured.json").read_text()) for f in folders if (run := read_run(f))]
        for suffix in ("", "_ema"):
            if not all(f"unseen_top1{suffix}" in run for run in runs):
                continue
            columns: list[tuple[str, float, int]] = [("num_queries", 1, 0), ("steps", 1, 0), (f"unseen_top1{suffix}", 100, 1)]
            columns += [(f"unseen_agreement_at_1{suffix}", 100, 1), ("seconds", 1, 0), ("peak_mb", 1, 0)]
            cells = [describe_spread([scale * run[name] for run in runs], digits) for name, scale, digits in columns]
            rows.append([f"{method}, averaged" if suffix else method, METHODS[method], *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
    seeds = ", ".join(map(str, config.seeds))
    constants = f"{config.epochs} epochs, batches of {config.batch_size}, AdamW {config.lr:g}"
    text += f"\n\n{constants}; seeds {seeds}; commit {current_commit()}.\n"
    write_text(Path(config.out_dir) / "table.md", text)
    return format_table(rows)


def main(config: Config) -> str:
    options.check_options(config)
    if unknown := set(config.only) - METHODS.keys():
        raise UserError(f"--only: none is called {min(unknown)}; there are {', '.join(METHODS)}")
    methods = [method for method in METHODS if not config.only or method in config.only]
    if any(method.startswith("art_") for method in methods) and importlib.util.find_spec("art") is None:
        raise UserError("the Adversarial Robustness Toolbox is not installed: pip install -e '.[peers]'")
    if config.in_domain == Config.in_domain:
        write_demo_set("datasets/demo", ATTACK_SPLITS)
    folders = {(method, seed): Path(config.out_dir) / f"seed_{seed}" / method for seed in config.seeds for method in methods}
    missing = [cell for cell, folder in folders.items() if not (folder / "measured.json").is_file()]
    if config.here:
        for method, seed in missing:
            folders[method, seed].mkdir(parents=True, exist_ok=True)
            (run_ours if method.startswith("ours") else run_peer)(config, method, seed, folders[method, seed])
        return ""
    failed = run_cells([[plan_step(config, *cell)] for cell in missing], config.jobs, config.cluster)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; run the same again to try these once more")
    for folder in folders.values():
        score_unseen(folder)
    table = tabulate(config, methods)
    print(f"\n{table}")
    return table


if __name__ == "__main__":
    run_script(main, Config)
