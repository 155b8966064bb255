"""Scoring a victim itself: `grey_box/eval_teacher.py`."""

from pathlib import Path

from extraction.victims import zoo
from grey_box import eval_teacher
from tests import forked

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


OWN = """
from extraction.victims.zoo import load_model


def create():
    demo = load_model("demo_swin")
    return demo.model, [f"class {k}" for k in range(12)]
"""


def test_eval_teacher_scores_a_victim_of_ones_own_by_classes_of_ones_own(demo_set, tmp_path):
    (tmp_path / "my_model.py").write_text(OWN)
    (tmp_path / "names.txt").write_text("\n".join(zoo.load_model("demo_swin").classes))
    options = dict(data=str(demo_set), stride=1, num_workers=0, device="cpu", out_dir=str(tmp_path))
    victim = dict(victim=f"{tmp_path}/my_model.py:create", victim_classes=str(tmp_path / "names.txt"))
    results = eval_teacher.main(eval_teacher.Config(**victim, **options))
    assert results["top1"] > 0.9
    assert len(list(tmp_path.glob("my_model.*.classes.csv"))) == 1


def test_eval_teacher_stops_in_one_line_without_weights():
    done = forked.run("grey_box/eval_teacher.py", "--victim", "movinet")
    assert done.returncode == 1
    assert done.stderr.startswith("eval_teacher.py: victim weights weights/movinet_a2_base not found")
    assert done.stderr.count("\n") == 1
