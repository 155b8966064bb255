"""A few schedules of the chaos harness; its module docstring says how to run many."""

import subprocess
import sys
from pathlib import Path

# Of each kind one: labelled videos, several stages, images, data-free, a search; scoring alone.
RUNS = [
    "swin_to_r21_concatenated",
    "movinet_to_r21",
    "stacked_images_with_swin",
    "attack_video_swin",
    "train_victim",
    "eval_only",
]


def test_nothing_is_lost_whatever_happens():
    command = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--schedules", "20", "--only", *RUNS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "20 schedules over 6 runs" in done.stdout
    assert "0 violations" in done.stdout
