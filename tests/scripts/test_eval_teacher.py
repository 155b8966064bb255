"""Scoring a victim itself: `grey_box/eval_teacher.py`."""

import subprocess
import sys
from pathlib import Path

from extraction.victims import zoo
from grey_box import eval_teacher

ROOT = Path(__file__).parents[2]


def test_eval_teacher_scores_the_demo_victim(demo_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(zoo.VICTIMS, "swin_b_k400", zoo.VICTIMS["demo_swin"])
    options = dict(stride=1, num_workers=0, device="cpu", out_dir=str(tmp_path))
    config = eval_teacher.Config(victim="swin", data=str(demo_set), **options)
    results = eval_teacher.main(config)
    assert results["top1"] > 0.9
    assert results["clips_per_second"] > 0
    (path,) = tmp_path.glob(f"swin_b_k400.{demo_set.name}-*.classes.csv")
    table = path.read_text().splitlines()
    assert (len(table), table[0]) == (13, "class,num_videos,top1,top5")
    out = capsys.readouterr().out
    assert "24 videos of" in out
    assert "on clips of 16x48x48; attacks send clips of their own size" in out


def test_eval_teacher_stops_in_one_line_without_weights():
    done = subprocess.run(
        [sys.executable, "grey_box/eval_teacher.py", "--victim", "movinet"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("eval_teacher.py: victim weights weights/movinet_a2_base not found")
    assert done.stderr.count("\n") == 1
