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
    for name in ("demo", "demo_unseen", "demo_tune"):
        (tmp_path / "datasets" / name).symlink_to(demo_set)
    classes = sorted(folder.name for folder in (demo_set / "val").iterdir())
    about = dict(student="r2plus1d_tiny", classes=classes, num_frames=8, stride=1, size=32)
    save_weights("student.safetensors", create_student("r2plus1d_tiny", 12).net.state_dict(), about)
    plain = eval_only.Config(**eval_only.DEMO | dict(weights="student.safetensors", num_workers=0, device="cpu"))
    (tmp_path / "list.txt").write_text(
        "\n".join(f"{own}/{path.name}" for own in classes for path in (demo_set / "val" / own).iterdir())
    )
    changes = (dict(), dict(unseen=True), dict(tune=True), dict(data_list="list.txt"), dict(views="1x3"), dict(num_frames=16))
    tables = []
    for change in changes:
        eval_only.main(dataclasses.replace(plain, **change))
        tables.append({path.name for path in tmp_path.glob("*.csv")})
    # Of the same clips the table is the same; each other one has its own name. (Here both folders are one, by a link.)
    assert [len(names) for names in tables] == [1, 1, 1, 1, 2, 3]
    assert all(name.startswith(f"student.{demo_set.name}-") for name in tables[-1])
    (demo_set / "val" / "juggling").mkdir()
    try:
        with pytest.raises(UserError, match="class 'juggling' not among the 12 classes of the model; move"):
            eval_only.main(plain)
    finally:
        (demo_set / "val" / "juggling").rmdir()
    with pytest.raises(UserError, match="classes nothere: not k400 or k600, nor a text file with one name a line"):
        eval_only.main(dataclasses.replace(plain, classes="nothere"))


def test_one_set_at_a_time_and_only_of_the_demo(error_line):
    plain = eval_only.Config(demo=True, unseen=True, tune=True)
    assert error_line(eval_only.main, plain).startswith("--unseen and --tune: choose one")
    for name in ("unseen", "tune"):
        assert error_line(eval_only.main, eval_only.Config(**{name: True})) == f"--{name}: it goes with --demo"


def test_the_three_sets_are_drawn_from_three_seeds(monkeypatch):
    drawn = []
    monkeypatch.setattr(suite, "write_demo_set", lambda root, splits, seed=0: drawn.append((root.name, splits, seed)))
    suite.write_unseen_set()
    suite.write_tune_set()
    assert drawn == [("demo_unseen", {"val": 100}, 1), ("demo_tune", {"val": 50}, 2)]
