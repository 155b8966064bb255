"""Golden runs: every script, shortened, must give the numbers that it gave before.

    python tests/golden.py              # records what there is nothing to compare with, compares the rest
    python tests/golden.py --record     # these are the numbers from now on (say why in CHANGELOG.md)
    python tests/golden.py --project ../other-checkout --record

Each script runs with one thread on a small drawing of the demo set; kept are the fingerprint of the student's weights, the
number of queries and the whole history. Bits depend on the processor, PyTorch and the number of threads, so the numbers stay
on the machine that recorded them, under runs/golden/.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[1]
SMALL = "runs/golden/demo_set"  # below the project whose scripts run
VIDEOS = ["--own", f"{SMALL}/train_5per", "--val", f"{SMALL}/val"]
AUX = ["--aux", f"{SMALL}/unrelated_a", f"{SMALL}/unrelated_b"]
VAL = ["--val", f"{SMALL}/val"]
RECIPE = ["--schedule", "one_cycle", "--ema", "0.9", "--temperature", "4", "--student-crop", "0.2", "--student-erase", "0.2"]
SHORT = ["--iterations", "3", "--batch-size", "8", "--score-every", "60", "--replay-clips", "40"]

# Scripts that build on each other stand in one chain: (name of the run, script, flags).
CHAINS: list[list[tuple[str, str, list[str]]]] = [
    [("labels_only", "grey_box/labels_only.py", [*VIDEOS, "--epochs", "2"])],
    [("swin_to_c3d", "grey_box/swin_to_c3d.py", [*VIDEOS, "--epochs", "2"])],
    [("swin_to_r21", "grey_box/swin_to_r21.py", [*VIDEOS, "--epochs", "2"])],
    [("swin_to_r21_top5", "grey_box/swin_to_r21.py", [*VIDEOS, "--epochs", "2", "--answers", "top5", "--hflip", "0.5"])],
    [("swin_to_r21_concatenated", "grey_box/swin_to_r21.py", [*VIDEOS, *AUX, "--epochs", "2", "--answers", "label"])],
    [("swin_to_r21_using_cosine", "grey_box/swin_to_r21_using_cosine.py", [*VIDEOS, *AUX, "--epochs", "2"])],
    [("swin_to_r21_prada", "grey_box/swin_to_r21_prada.py", [*VIDEOS, "--epochs", "2"])],
    [("swin_to_r21_prada_budget", "grey_box/swin_to_r21_prada.py", [*VIDEOS, "--epochs", "2", "--query-budget", "90"])],
    [
        ("swin_to_r21_kd", "grey_box/swin_to_r21_kd.py", [*VIDEOS, *AUX, "--epochs", "3", "--views-per-clip", "2"]),
        ("eval_only", "eval_only.py", ["r2plus1d_tiny", "{swin_to_r21_kd}", "--data", f"{SMALL}/val", "--views", "2x3"]),
    ],
    [("swin_to_r21_kd_budget", "grey_box/swin_to_r21_kd.py", [*VIDEOS, *AUX, "--epochs", "2", "--query-budget", "100"])],
    [("swin_to_r21_kd_recipe", "grey_box/swin_to_r21_kd.py", [*VIDEOS, *AUX, "--epochs", "2", *RECIPE, "--mixup", "0.4"])],
    [("movinet_to_r21", "grey_box/movinet_to_r21.py", [*VIDEOS, *AUX, "--epochs", "2"])],
    *(
        [
            (f"{pair}_auxiliary", f"grey_box/{pair}_auxiliary.py", [*VAL, *AUX, "--epochs", "2"]),
            (
                f"{pair}_finetune",
                f"grey_box/{pair}_finetune.py",
                [*VIDEOS, "--epochs", "2", "--student-weights", f"{{{pair}_auxiliary}}"],
            ),
            (
                f"{pair}_ticket",
                f"grey_box/{pair}_ticket.py",
                [*VIDEOS, "--epochs", "2", "--round-epochs", "1", "--student-weights", f"{{{pair}_finetune}}"],
            ),
        ]
        for pair in ("swin_to_vit", "movinet_to_r50")
    ),
    [("attack_video_swin", "black_box/attack_video_swin.py", [*VAL, *SHORT])],
    [("attack_video_swin_dfme", "black_box/attack_video_swin.py", [*VAL, *SHORT, "--method", "dfme", "--optimizer", "sgd"])],
    [("attack_video_swin_budget", "black_box/attack_video_swin.py", [*VAL, *SHORT, "--query-budget", "150"])],
    [("attack_video_movinet", "black_box/attack_video_movinet.py", [*VAL, *SHORT, "--generator", "dvdgan_small"])],
    *(
        [(f"conditional_gan_with_{v}", f"black_box/conditional_gan_with_{v}.py", [*VAL, *SHORT, "--generator-iterations", "2"])]
        for v in ("swin", "movinet")
    ),
    [("random_noise_with_swin", "black_box/random_noise_with_swin.py", [*VAL, *SHORT])],
    *(
        [(f"stacked_images_with_{v}", f"black_box/stacked_images_with_{v}.py", [*VAL, "--num-clips", "48", "--epochs", "2"])]
        for v in ("swin", "movinet")
    ),
    [
        (
            "natural_images_label_only",
            "black_box/natural_images_label_only.py",
            [*VAL, *["--num-explore", "80", "--num-rounds", "2", "--per-round", "30", "--quota", "20", "--epochs", "2"]],
        )
    ],
    *(
        [
            (
                f"biggan_with_{v}",
                f"black_box/biggan_with_{v}.py",
                [
                    *VAL,
                    *[
                        "--num-random",
                        "60",
                        "--num-steps",
                        "2",
                        "--codes-per-class",
                        "3",
                        "--clips-per-class",
                        "4",
                        "--epochs",
                        "2",
                    ],
                ],
            )
        ]
        for v in ("swin", "movinet")
    ),
    [("train_victim", "train_victim.py", ["--data", f"{SMALL}/train_5per", *VAL, "--epochs", "2"])],
    [
        (f"eval_teacher_{v}", "grey_box/eval_teacher.py", ["--victim", v, "--data", f"{SMALL}/val", "--views", "2x1"])
        for v in ("swin", "movinet")
    ],
]


def run_script(project: Path, out_dir: Path, script: str, flags: list[str]) -> dict:
    """Run one script of `project` afresh. Returns what is kept of it."""
    shutil.rmtree(out_dir, ignore_errors=True)
    demo = [] if script == "train_victim.py" else ["--demo"]
    flags = [str(out_dir.parent / flag[1:-1] / "student.safetensors") if flag.startswith("{") else flag for flag in flags]
    where = ["--csv", f"{out_dir}.csv"] if script == "eval_only.py" else ["--out-dir", str(out_dir)]
    often = [] if script.endswith(("eval_only.py", "eval_teacher.py")) else ["--checkpoint-seconds", "1e9"]
    command = [sys.executable, script, *demo, *flags, *where, *often, "--device", "cpu", "--num-workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode and "budget" not in done.stdout + done.stderr:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    if (out_dir / "results.json").is_file():
        results = json.loads((out_dir / "results.json").read_text())
        weights = load_file(next(out_dir / f"{name}.safetensors" for name in ("student", "victim")
                                 if (out_dir / f"{name}.safetensors").is_file()))  # fmt: skip
        mark = hashlib.sha256()
        for name in sorted(weights):
            mark.update(name.encode() + weights[name].numpy().tobytes())
        history = [list(point.values()) for point in results["history"]]
        return dict(weights=mark.hexdigest()[:16], num_queries=results.get("num_queries"), history=history)
    tables = [Path(f"{out_dir}.csv")] if script == "eval_only.py" else sorted(out_dir.glob("*.csv"))
    return dict(tables=[path.read_text() for path in tables])


def draw_small_set(project: Path) -> None:
    splits = "{'train_5per': 3, 'val': 2, 'unrelated_a': 3, 'unrelated_b': 2}"
    code = f"from extraction.data.demo import write_demo_set as w; w({SMALL!r}, {splits}); w('datasets/demo')"
    environment = os.environ | {"PYTHONPATH": str(project)}
    subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep what the runs give now")
    parser.add_argument("--project", type=Path, default=PROJECT, help="the checkout whose scripts run")
    parser.add_argument("--only", nargs="*", default=(), help="parts of names: run only chains with such a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="scripts at a time, one thread each")
    args = parser.parse_args()
    kept_in = PROJECT / "runs" / "golden" / f"{platform.machine()}-{torch.__version__}.json"
    kept = json.loads(kept_in.read_text()) if kept_in.is_file() else {}
    project = args.project.resolve()
    (project / "runs/golden").mkdir(parents=True, exist_ok=True)
    draw_small_set(project)
    found: dict[str, dict] = {}

    def run_chain(chain: list[tuple[str, str, list[str]]]) -> None:
        for name, script, flags in chain:
            found[name] = run_script(project, project / "runs/golden" / name, script, flags)
            new = args.record or name not in kept
            says = "recorded" if new else "equal" if found[name] == kept[name] else "DIFFERS"
            print(f"{name:32} {says}  queries {found[name].get('num_queries', '-')}", flush=True)

    chains = [c for c in CHAINS if not args.only or any(part in name for name, _, _ in c for part in args.only)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_chain, chains))
    different = [name for name in found if not args.record and name in kept and kept[name] != found[name]]
    kept_in.parent.mkdir(parents=True, exist_ok=True)
    kept_in.write_text(json.dumps({**kept, **{n: found[n] for n in found if args.record or n not in kept}}, indent=1))
    for name in different:
        print(f"\n{name}\n  was {json.dumps(kept[name])[:600]}\n  is  {json.dumps(found[name])[:600]}")
    print(f"{len(found) - len(different)} of {len(found)} runs as recorded in {kept_in}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
