"""Many experiments in one go: what is done is not done again, a failure is said and hides nothing, figures are the runs'."""

import json
from pathlib import Path

import pytest
import torch

from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation import suite
from extraction.evaluation.scoring import predict_videos
from extraction.evaluation.suite import Experiment, run_all, write_between_markers, write_table
from extraction.students import create_student
from extraction.victims.zoo import load_model
from extraction.weights import save_weights

SCRIPT = """
import json, pathlib, sys
flags = {name: value for name, value in zip(sys.argv[1:], sys.argv[2:]) if name.startswith("--")}
out = pathlib.Path(flags["--out-dir"])
out.mkdir(parents=True, exist_ok=True)
(out / "count").write_text((out / "count").read_text() + "x" if (out / "count").exists() else "x")
if "--fail" in flags and not pathlib.Path(flags["--fail"]).exists():
    sys.exit(1)
seed = int(flags["--seed"])
results = dict(
    victim="demo_swin", victim_top1=0.979, student="tiny", num_queries=1000, num_queries_before=seed, top1=0.5 + 0.1 * seed,
    top5=0.9, agreement_at_1=0.25, seconds=3.2, num_val_videos=240, chance_top1=1 / 12, commit="abc", argv=sys.argv[1:],
    stopped="query budget exhausted" if "--short" in flags else "epochs",
)
(out / "unseen.json").write_text(json.dumps(dict(unseen_top1=0.4 + 0.1 * seed, unseen_agreement_at_1=0.3)))
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def experiments(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return [
        Experiment("first", str(script), "54.8 / 31.4"),
        Experiment("second", str(script), "- / 8.3", ("--fail", str(tmp_path / "fixed"), "--from", "{runs}/first/student")),
    ]


def test_a_failure_is_named_and_only_what_is_missing_runs_again(experiments, tmp_path):
    runs = tmp_path / "runs"
    (runs / "clip_cache" / "clips").mkdir(parents=True)
    with pytest.raises(UserError, match=r"failed: second \(seed 0\), second \(seed 1\)"):
        run_all(experiments, runs, True, (0, 1))
    assert (runs / "clip_cache" / "clips").is_dir()
    table = (runs / "table.md").read_text()
    assert "| second | - | - | - | - | - | - | - | - | - | - / 8.3 |" in table
    (tmp_path / "fixed").touch()
    table = run_all(experiments, runs, True, (0, 1))
    assert not (runs / "clip_cache").exists()
    assert (runs / "seed_0" / "first" / "count").read_text() == "x"
    assert (runs / "seed_0" / "second" / "count").read_text() == "xx"
    row = "| {} | demo_swin 97.9 | tiny | 1000 ± 1 | 45.0 ± 7.1 | 30.0 | 55.0 ± 7.1 | 90.0 | 25.0 | 3 | {} |"
    assert row.format("first", "54.8 / 31.4") in table
    assert row.format("second", "- / 8.3") in table
    assert "240 held-out videos, chance 8.3; seeds 0, 1; commit abc." in table
    assert (runs / "table.png").stat().st_size > 1000
    argv = json.loads((runs / "seed_1" / "second" / "results.json").read_text())["argv"]
    assert argv[argv.index("--from") + 1] == f"{runs}/seed_1/first/student"
    assert "--demo" in argv
    assert "| second |" not in run_all(experiments, runs, True, (0,), ("first",))
    with pytest.raises(UserError, match="no experiment is called third; there are first, second"):
        run_all(experiments, runs, True, (0,), ("third",))


def test_runs_scored_without_labels_show_agreement_and_its_intervals(experiments, tmp_path):
    bare = [experiments[0]._replace(published="-")]
    run_all(bare, tmp_path, False, (0, 1))
    for seed, path in enumerate(sorted(tmp_path.glob("seed_*/first/results.json"))):
        none = dict(top1=None, top5=None, victim_top1=None, victim="tflite:some/where/a.tflite")
        scored = dict(agreement_at_5=0.5 + 0.2 * seed, mean_kl=1.25, intervals=dict(agreement_at_5=[0.44, 0.58]))
        path.write_text(json.dumps(json.loads(path.read_text()) | none | scored))
        path.with_name("unseen.json").unlink()
    head = "| experiment | victim | student | queries | agreement@1 | agreement@5 | mean KL, nats | seconds |"
    both, one = write_table(bare, tmp_path, (0, 1)), write_table(bare, tmp_path, (0,))
    assert head in both
    assert "| first | tflite:a.tflite | tiny | 1000 ± 1 | 25.0 | 60.0 ± 14.1 | 1.25 | 3 |" in both
    assert "| first | tflite:a.tflite | tiny | 1000 | 25.0 | 50.0 (44.0-58.0) | 1.25 | 3 |" in one
    assert "with 95 % intervals by video; seed 0" in one


def test_differences_are_paired_by_seed_and_have_a_standard_error(experiments, tmp_path):
    """0.6, 0.5, 0.9 against 0.4, 0.5, 0.6: differences 20, 0 and 30 points, mean 16.7, standard deviation 15.28, error 8.82."""
    runs = [experiments[0], experiments[0]._replace(name="other")]
    run_all(runs, tmp_path, False, (0, 1, 2))
    for name, scores in (("first", (0.4, 0.5, 0.6)), ("other", (0.6, 0.5, 0.9))):
        for seed, score in enumerate(scores):
            (tmp_path / f"seed_{seed}" / name / "unseen.json").write_text(json.dumps(dict(unseen_top1=score)))
    table = run_all(runs, tmp_path, False, (0, 1, 2), against="first")
    head, _, first, other = table.splitlines()[:4]
    column = head.split(" | ").index("top-1, unseen: difference to first")
    assert (first.split(" | ")[column], other.split(" | ")[column]) == ("-", "+16.7 ± 8.8 (3 seeds)")
    assert "paired by seed" in table
    assert "+16.7" in run_all(runs, tmp_path, False, (0, 1, 2), only=("other",), against="first")
    (tmp_path / "seed_1" / "first" / "results.json").unlink()
    assert "| +25.0 ± 5.0 (2 seeds) |" in write_table(runs, tmp_path, (0, 1, 2), "first")  # of 20 and 30
    with pytest.raises(UserError, match="no experiment is called third"):
        run_all(runs, tmp_path, False, (0,), against="third")


def test_unseen_videos_are_scored_with_and_without_a_victim_that_is_asked_once(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "UNSEEN", tmp_path / "unseen")
    monkeypatch.setattr(suite, "write_unseen_set", lambda: demo_set)
    opened = []
    monkeypatch.setattr(suite, "load_model", lambda *given, **more: opened.append(given) or load_model(*given, **more))
    victim = load_model("demo_swin")
    about = dict(student="r2plus1d_tiny", classes=list(victim.classes), num_frames=16, stride=1, size=48)
    student = create_student("r2plus1d_tiny", 12)
    shown = dict(student="r2plus1d_tiny", config={})
    scores = []
    for name, of in (("a", dict(victim="demo_swin", victim_fingerprint=victim.fingerprint)), ("b", dict(victim=None))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(shown | of))
        save_weights(tmp_path / name / "student.safetensors", student.net.state_dict(), about)
        if name == "a":  # with averaged weights, here those of a student that names one class
            only = student.net.state_dict() | {"fc.bias": torch.eye(12)[3] * 1e6}
            save_weights(tmp_path / name / "student_ema.safetensors", only, about)
        for _ in range(2):
            suite.score_unseen(tmp_path / name)
        scores.append(json.loads((tmp_path / name / "unseen.json").read_text()))
    assert len(opened) == 1
    (kept,) = (tmp_path / "unseen" / "victims").iterdir()
    assert kept.name.startswith(f"{victim.fingerprint}-")
    assert scores[0].keys() == {f"unseen_{name}{of}" for name in ("top1", "agreement_at_1") for of in ("", "_ema")} | {
        "num_unseen_videos"
    }
    assert scores[0]["unseen_top1_ema"] == pytest.approx(1 / 12)
    assert scores[1] == {name: scores[0][name] for name in ("unseen_top1", "num_unseen_videos")}
    clips = Clips(find_videos(demo_set, victim.classes, "val"), 16, size=48, views=(1, 1))
    own, theirs = (predict_videos(model.eval(), clips, "cpu").probs for model in (student, victim))
    assert scores[0]["unseen_agreement_at_1"] == pytest.approx((own.argmax(1) == theirs.argmax(1)).float().mean().item())
    (tmp_path / "a" / "unseen.json").write_text(json.dumps(dict(unseen_top1=0.5)))  # of before
    suite.score_unseen(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "unseen.json").read_text()) == scores[0]
    assert len(opened) == 1


def test_no_results_at_all_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no experiment has left results"):
        write_table([Experiment("none", "nowhere.py", "-")], tmp_path, (0,))
    with pytest.raises(UserError, match="--seeds: name at least one"):
        run_all([Experiment("none", "nowhere.py", "-")], tmp_path, False, ())


def test_when_everything_fails_all_are_named(experiments, tmp_path):
    never = [Experiment(name, experiments[0].script, "-", ("--fail", str(tmp_path / "never"))) for name in ("one", "two")]
    with pytest.raises(
        UserError, match=r"no experiment has left results there; failed: one \(seed 3\), two \(seed 3\)"
    ) as caught:
        run_all(never, tmp_path / "runs", False, (3,))
    assert "\n" not in str(caught.value)


def test_a_run_that_its_query_budget_ended_goes_on(experiments, tmp_path):
    short = [Experiment("short", experiments[0].script, "-", ("--short", "yes"))]
    for _ in range(2):
        run_all(short, tmp_path, False, (0,))
    assert (tmp_path / "seed_0" / "short" / "count").read_text() == "xx"


def test_the_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- some/script.py -->\n\nold\n<!-- end -->\nafter\n<!-- end -->\n")
    for text in ("new | new", "newer"):
        write_between_markers(page, "some/script.py", text)
        assert page.read_text() == f"before\n<!-- some/script.py -->\n\n{text}\n<!-- end -->\nafter\n<!-- end -->\n"
    with pytest.raises(UserError, match=r"no lines <!-- other.py --> and <!-- end --> in it"):
        write_between_markers(page, "other.py", "new")
    assert "newer" in page.read_text()


def test_scripts_are_the_projects_wherever_one_stands(experiments, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(suite, "PROJECT", tmp_path)
    run_all([Experiment("one", "script.py", "-")], "runs", False, (0,))
    assert (tmp_path / "elsewhere" / "runs" / "seed_0" / "one" / "results.json").is_file()


def test_results_cut_short_get_one_line(experiments, tmp_path):
    run_all(experiments[:1], tmp_path, False, (0,))
    results = tmp_path / "seed_0" / "first" / "results.json"
    results.write_text(results.read_text()[:50])
    with pytest.raises(UserError, match=r"results.json: not readable, truncated perhaps"):
        run_all(experiments[:1], tmp_path, False, (0,))


def test_the_tables_name_scripts_that_exist():
    from black_box.run_all import PUBLISHED
    from grey_box.run_all import list_experiments

    root = Path(__file__).parents[2]
    assert root == suite.PROJECT
    scripts = {e.script for e in list_experiments(True)} | {f"black_box/{name}.py" for name in PUBLISHED}
    present = {str(p.relative_to(root)) for folder in ("grey_box", "black_box") for p in (root / folder).glob("*.py")}
    assert scripts == present - {"grey_box/run_all.py", "black_box/run_all.py", "grey_box/eval_teacher.py"}
