"""eval_only.py: class lists and tables."""

import dataclasses

import pytest

import eval_only
from extraction.errors import UserError
from extraction.evaluation import suite
from extraction.students import create_student
from extraction.weights import save_weights


def test_eval_only_checks_the_class_list_and_keeps_both_tables(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_only, "write_demo_set", lambda *_, **__: None)
    monkeypatch.setattr(suite, "write_demo_set", lambda root, *_, **__: root)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    for name in ("demo", "demo_unseen"):
        (tmp_path / "datasets" / name).symlink_to(demo_set)
    classes = sorted(folder.name for folder in (demo_set / "val").iterdir())
    about = dict(student="r2plus1d_tiny", classes=classes, num_frames=8, stride=1, size=32)
    save_weights("student.safetensors", create_student("r2plus1d_tiny", 12).net.state_dict(), about)
    plain = eval_only.Config(**eval_only.DEMO | dict(weights="student.safetensors", num_workers=0, device="cpu"))
    for config in (plain, dataclasses.replace(plain, unseen=True)):
        eval_only.main(config)
    assert {path.name for path in tmp_path.glob("*.csv")} == {"student.classes.csv", "student.unseen.classes.csv"}
    with pytest.raises(UserError, match="--classes nothere: neither one of k400, k600 nor a file"):
        eval_only.main(dataclasses.replace(plain, classes="nothere"))
