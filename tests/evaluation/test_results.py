"""The table of several runs: a row for each victim, and only what was scored on the same videos beside each other."""

import json
from functools import partial
from pathlib import Path

import pytest

from extraction.errors import UserError
from extraction.evaluation import plots
from extraction.evaluation.plots import draw_curve, draw_curves
from extraction.evaluation.results import describe_scores, print_results, tabulate
from tests import forked

RESULTS = dict(
    experiment="swin_to_r21", victim="demo_swin", victim_fingerprint="abc", victim_top1=0.979, victim_top5=1.0, student="tiny",
    num_queries=700, num_queries_before=11, top1=0.5, top5=0.9, agreement_at_1=0.25, agreement_at_5=0.75, num_val_videos=240,
    chance_top1=1 / 12,
)  # fmt: skip
ALONE = dict(experiment="labels_only", victim=None, victim_fingerprint=None, victim_top1=None, num_queries=0, top1=0.3)
MOVINET = dict(experiment="movinet_to_r21", victim="demo_movinet", victim_fingerprint="def", victim_top1=0.95)


def write_run(folder: Path, **changes) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS | changes))
    return folder


def read_rows(out: str) -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    return [line.rsplit(maxsplit=5) for line in out.splitlines()[3:] if line]


def test_one_run_has_its_victim_student_and_chance(capsys):
    assert print_results(RESULTS) is RESULTS
    assert read_rows(capsys.readouterr().out) == [
        ["victim", "97.9", "100.0", "-", "-", "-"],
        ["student, swin_to_r21", "50.0", "90.0", "25.0", "75.0", "711"],
        ["chance", "8.3", "41.7", "8.3", "41.7", "-"],
    ]


def test_each_victim_has_one_row_whatever_the_order(tmp_path, capsys):
    swin, again = write_run(tmp_path / "a"), write_run(tmp_path / "b", experiment="swin_to_c3d")
    movinet, alone = write_run(tmp_path / "c", **MOVINET), write_run(tmp_path / "d", **ALONE)
    tabulate((swin, again, alone))
    names = [row[0] for row in read_rows(capsys.readouterr().out)]
    assert names == ["victim", "student, swin_to_r21", "student, swin_to_c3d", "student, labels_only", "chance"]
    tabulate((movinet, swin, alone, again))
    rows = read_rows(capsys.readouterr().out)
    assert [row[:2] for row in rows[:2]] == [["victim, demo_movinet (def)", "95.0"], ["victim, demo_swin (abc)", "97.9"]]
    assert [row[0] for row in rows[2:]] == [f"student, {name}" for name in (
        "movinet_to_r21", "swin_to_r21", "labels_only", "swin_to_c3d"
    )] + ["chance"]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("num_val_videos", 24), ("chance_top1", 0.1)])
def test_other_videos_are_not_put_beside(tmp_path, capsys, name, value):
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", **{name: value})
    with pytest.raises(UserError, match=rf"a and .*c differ in {name}: .* and {value};"):
        tabulate(runs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "run has no results.json: not a finished run"),
        (json.dumps(RESULTS)[:100], "results.json: not readable, truncated perhaps"),
        ("\0\xff", "results.json: not readable"),
        (json.dumps(dict(top1=0.9, num_classes=12)), "run: no student in it"),
        ("[]", "run: no student in it"),
    ],
)
def test_what_is_no_run_of_a_student_gets_one_line(tmp_path, content, line):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "results.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=line) as caught:
        tabulate((write_run(tmp_path / "good"), tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_the_command_line(tmp_path):
    run = partial(forked.run, "-m", "extraction.evaluation.results", cwd=tmp_path)
    done = run(write_run(tmp_path / "a"), write_run(tmp_path / "b", **ALONE))
    assert (done.returncode, len(read_rows(done.stdout))) == (0, 4)
    none = run()
    assert (none.returncode, none.stderr.count("\n"), none.stdout) == (1, 1, "")
    told = run("--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "usage: python -m extraction.evaluation.results [-h] RUN" in told.stdout


def test_runs_of_one_experiment_are_told_apart_by_what_differs(tmp_path, capsys):
    folders = [
        write_run(tmp_path / answers, config=dict(answers=answers, seed=0, out_dir=answers)) for answers in ("probs", "label")
    ]
    tabulate(tuple(folders))
    names = [row[0] for row in read_rows(capsys.readouterr().out)]
    assert names[1:3] == ["student, swin_to_r21, answers probs", "student, swin_to_r21, answers label"]


def test_without_labels_there_is_agreement_alone_with_its_interval_and_that_of_averaged_weights(capsys):
    none = dict(top1=None, top5=None, victim_top1=None, victim_top5=None, agreement_at_1_ema=0.3, agreement_at_5_ema=0.8)
    intervals = dict(agreement_at_1=[0.201, 0.304], agreement_at_5=[0.7, 0.8], mean_kl=[1.0, 1.5])
    print_results(RESULTS | none | dict(intervals=intervals, mean_kl=1.25))
    out = capsys.readouterr().out
    table, _, below = out.strip().partition("\n\n")
    assert [line.rsplit(maxsplit=5) for line in table.splitlines()[2:]] == [
        ["victim", "-", "-", "-", "-", "-"],
        ["student, swin_to_r21", "-", "-", "25.0", "75.0", "711"],
        ["  95 % interval", "-", "-", "20.1-30.4", "70.0-80.0", "-"],
        ["  its averaged weights", "-", "-", "30.0", "80.0", "-"],
        ["chance", "-", "-", "8.3", "41.7", "-"],
    ]
    assert below == "mean KL(victim || student), swin_to_r21: 1.250 nats"


def test_scores_on_one_line_have_their_intervals():
    scores = dict(top1=0.5, agreement_at_1=0.25, mean_kl=1.25, clips_per_second=3.0)
    intervals = dict(top1=[0.4, 0.6], agreement_at_1=[0.2, 0.3], mean_kl=[1.0, 1.5])
    line = describe_scores(scores | dict(intervals=intervals))
    assert line == "top-1 50.0 % (40.0-60.0), agreement@1 25.0 % (20.0-30.0), KL 1.250 nats (1.000-1.500)"


def test_runs_of_other_clips_of_the_same_videos_are_not_put_beside(tmp_path):
    tabulate((write_run(tmp_path / "a"), write_run(tmp_path / "b", num_val_clips=240)))
    with pytest.raises(UserError, match=r"a and .*c differ in num_val_clips: 240 and 480;"):
        tabulate((tmp_path / "a", write_run(tmp_path / "c", num_val_clips=480)))


def test_two_groups_of_runs_are_compared_seed_by_seed(tmp_path, capsys):
    """Top-1 52, 50 and 57 against 50, 49 and 51: differences 2, 1 and 6, mean 3, standard deviation 2.65, error 1.53."""

    def write_group(name: str, scores: dict[int, float]) -> tuple[Path, ...]:
        return tuple(
            write_run(tmp_path / f"{name}{seed}", top1=score, config=dict(seed=seed, out_dir=name))
            for seed, score in scores.items()
        )

    new, old = write_group("new", {0: 0.52, 1: 0.50, 2: 0.57, 5: 0.1}), write_group("old", {2: 0.51, 1: 0.49, 0: 0.50})
    (new[0] / "unseen.json").write_text(json.dumps(dict(unseen_top1=0.5)))
    (old[2] / "unseen.json").write_text(json.dumps(dict(unseen_top1=0.4)))
    tabulate(new, old)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("differences to --against, mean ± standard error, seeds 0, 1, 2:")
    assert lines[start + 1 : start + 3] == ["  top-1, unseen +10.0 (1 seed)", "  top-1 +3.0 ± 1.5 (3 seeds)"]
    with pytest.raises(UserError, match="seed 1 twice in a group"):
        tabulate(new, (old[1], old[1]))
    with pytest.raises(UserError, match="no seed in common"):
        tabulate(new[3:], old)
    with pytest.raises(UserError, match="no seed in a group"):
        tabulate(new, (write_run(tmp_path / "bare"),))


def test_curves_without_labels_are_of_agreement(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, dpi: drawn.append(figure))
    points = [dict(epoch=k, num_queries=k, agreement_at_1=k / 4) for k in (1, 2)]
    draw_curve(tmp_path / "c.png", points, None, 0.1, "one")
    draw_curves(tmp_path / "c.png", {"labelled": [p | dict(top1=0.5) for p in points], "unlabelled": points}, 0.1, "two")
    draw_curves(tmp_path / "c.png", {"labelled": [p | dict(top1=0.5) for p in points]}, 0.1, "three")
    values = [[list(line.get_ydata()) for line in figure.axes[0].lines[:-1]] for figure in drawn]
    assert values == [[[25.0, 50.0]], [[25.0, 50.0]] * 2, [[50.0, 50.0]]]


def test_the_best_five_of_five_classes_say_nothing(capsys):
    print_results(RESULTS | dict(num_classes=5, chance_top1=0.2))
    assert [row[1:5] for row in read_rows(capsys.readouterr().out)] == [
        ["97.9", "-", "-", "-"],
        ["50.0", "-", "25.0", "-"],
        ["20.0", "-", "20.0", "-"],
    ]
