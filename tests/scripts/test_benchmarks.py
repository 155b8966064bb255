"""The benchmarks of training steps, at tiny sizes: they time what they say, and fail where they would time something else."""

import importlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from extraction.data import probes
from extraction.data.augment import Augmentation, create_views
from extraction.data.decoding import decode_clip
from extraction.data.images import write_demo_images
from extraction.data.transcode import transcode_folder
from extraction.errors import UserError
from extraction.network import fit_clips

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
side_by_side, train_step, data_free_step = map(importlib.import_module, ("side_by_side", "train_step", "data_free_step"))

TINY = dict(scale="demo", batch_size=2, steps=1, turns=1, memory=False, device="cpu", precision="fp32")


def read_rows(out: str, names) -> dict[str, list[float]]:
    """The numbers of each row of a table."""
    lines = {name: re.search(rf"^{re.escape(name)} +(\d.*)$", out, re.MULTILINE) for name in names}
    assert all(lines.values()), out
    return {name: [float(n) for n in re.findall(r"(?<=\s)\d+\.\d+", " " + line[1])] for name, line in lines.items()}


def test_train_step_prints_rates_whose_quotients_are_its_ratios_and_agreement(demo_set, capsys):
    train_step.main(train_step.Config(**TINY, demo_set=str(demo_set)))
    out = capsys.readouterr().out
    rows = read_rows(out, train_step.ROWS)
    for rate, ratio, to_networks, share in rows.values():
        assert ratio == pytest.approx(rate / rows["2022"][0], abs=0.02)
        assert to_networks == pytest.approx(rate / rows["2022, networks only"][0], abs=0.02)
        assert 0 < share < 100
    found = re.findall(r"demo_swin in (\w+): top-1 the same on (\d+) of (\d+) clips, mean KL (\S+) nats.*: (.+)", out)
    assert [(precision, count, met) for precision, _, count, _, met in found] == [("fp32", "24", "met"), ("bf16", "24", "met")]
    assert [int(same) for _, same, *_ in found] == [24, 24]
    exact, rounded = (float(divergence) for *_, divergence, _ in found)
    assert 0 < exact < 1e-7  # the ledger's 16 bits
    assert exact < rounded < 1e-3


def test_answers_of_another_victim_are_noticed(demo_set, capsys, monkeypatch):
    create = side_by_side.create_victim

    def create_spoilt(setting):
        victim = create(setting)
        victim.model.net.head.weight.data.mul_(0.8)
        return victim

    monkeypatch.setattr(side_by_side, "create_victim", create_spoilt)
    config = train_step.Config(**TINY, demo_set=str(demo_set))
    with pytest.raises(UserError, match="not the victim's"):
        train_step.check_answers(config, train_step.SCALES["demo"])
    assert "NOT MET" in capsys.readouterr().out


def test_live_answers_that_were_cached_are_noticed(tmp_path, monkeypatch):
    keys = [bytes([k]) * 16 for k in range(2)]
    monkeypatch.setattr(train_step.QuerySet, "keys", lambda queries, indices, epoch: keys[: len(indices)])
    config, compute = train_step.Config(**TINY), train_step.choose_compute("cpu")
    step = train_step.build_ours(config, train_step.SCALES["demo"], compute, tmp_path, cached=False)
    step()
    with pytest.raises(UserError, match="2 queries after 2 batches"):
        step()


def test_both_show_the_victim_the_same_clip_where_nothing_is_drawn():
    still = Augmentation(0.0, 0.0, 0.0)
    clip = torch.randint(256, (16, 48, 48, 3), dtype=torch.uint8)
    victim = side_by_side.create_plain(train_step.SCALES["demo"])
    student = train_step.create_student("r2plus1d_tiny", 12)
    view, small = train_step.prepare_one(clip, victim, student, still, random.Random(0))
    ours = create_views(clip[None], [b"key"], still)
    torch.testing.assert_close(view, ((ours - victim.mean) / victim.std)[0])
    smaller = ((fit_clips(ours, None, student.size) - student.mean) / student.std)[0]
    assert small.shape == smaller.shape
    assert torch.corrcoef(torch.stack([small.flatten(), smaller.flatten()]))[0, 1] > 0.8  # one of them is antialiased


def test_flops_are_the_published_ones():
    flops = train_step.count_flops(train_step.SCALES["full"])
    assert flops["victim"] == pytest.approx(2 * 282e9, rel=0.01)  # Liu et al. 2021 count multiply-adds
    assert flops["student"] == pytest.approx(3 * 2 * 152e9, rel=0.01)  # Tran et al. 2018, forward; backward is twice that


def test_profile_says_how_far_each_part_is_from_the_peak(capsys):
    train_step.main(train_step.Config(**TINY, profile=True))
    shares = re.findall(r"^(\w+): .* ms: (\S+) % of the peak", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in shares] == ["victim", "student"]
    assert all(0 < float(share) < 100 for _, share in shares)


@pytest.mark.slow
def test_growth_runs_points_in_processes_of_their_own_and_draws_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train_step.GROWTH, "demo", dict(batch_size=(2,), processes=(1,)))
    train_step.main(train_step.Config(**TINY, growth=True, axes=("batch_size", "processes"), out=str(tmp_path / "growth.png")))
    out = capsys.readouterr().out
    points = re.findall(r"^(?:batch_size +2|processes +1) +(\S+) +(\d+) MiB", out, re.MULTILINE)
    assert len(set(points)) == 1  # the usual one, measured once
    assert len(points) == 2
    assert float(points[0][0]) > 0
    assert int(points[0][1]) > int(re.search(r"(\d+) MiB of it before", out)[1]) > 50
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_an_unknown_axis_or_row_is_one_line():
    with pytest.raises(UserError, match="--axes clips: there are batch_size"):
        train_step.main(train_step.Config(**TINY, growth=True, axes=("clips",)))
    with pytest.raises(UserError, match="--alone theirs: there are 2022"):
        train_step.main(train_step.Config(**TINY, alone="theirs"))


@pytest.fixture
def data_free_config():
    return data_free_step.Config(**TINY)


def test_data_free_step_prints_rates_of_the_same_queries(data_free_config, capsys):
    data_free_step.main(data_free_config)
    out = capsys.readouterr().out
    rows = read_rows(out, ("2022", "ours", "networks"))
    queries = int(re.search(r"an iteration is (\d+) queries", out)[1])
    assert queries == 2 * (1 + 2 + 5)
    for rate, seconds, ratio in rows.values():
        assert rate * seconds == pytest.approx(queries, rel=0.1)
        assert ratio == pytest.approx(rate / rows["2022"][0], abs=0.02)


def test_data_free_full_size_has_the_published_constants():
    constants = data_free_step.choose_constants(data_free_step.Config(), "full")
    assert (constants.generator, constants.batch_size, constants.epsilon) == ("dvdgan", 128, 1e-3)
    assert (constants.num_directions, constants.student_steps, constants.replay_steps) == (10, 5, 10)
    assert data_free_step.count_queries(constants) == 2048


def test_an_iteration_with_other_queries_is_noticed(data_free_config, tmp_path, monkeypatch):
    compute = data_free_step.choose_compute("cpu")
    constants = data_free_step.choose_constants(data_free_config, "demo")
    monkeypatch.setattr(data_free_step.Attacker, "step_student", lambda attacker: None)
    monkeypatch.setattr(data_free_step.Attacker, "step_replay", lambda attacker: None)
    with pytest.raises(UserError, match="had 6 queries, not 16"):
        data_free_step.build_ours("demo", constants, compute, tmp_path)()


def test_a_row_alone_is_json(data_free_config, capsys):
    data_free_step.main(data_free_step.replace(data_free_config, alone="2022"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0
    assert found["memory"] > 2**26


def test_each_row_has_the_better_of_its_thread_counts_and_turns_as_long_as_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.append(count))
    used, steps = [], []

    def build(folder):
        threads = used[-1]
        return lambda: (steps.append(threads), time.sleep(0.02 if threads == 1 else 0.001))

    row = side_by_side.prepare_row(build, str(tmp_path), torch.device("cpu"), {1, 2}, 0.1, None)
    assert row.threads == 2
    assert 10 <= row.steps <= 100
    steps.clear()
    [(name, seconds)] = side_by_side.take_turns({"row": row}, 2, torch.device("cpu")).items()
    assert (name, len(seconds), set(steps), used[-1]) == ("row", 2, {2}, 2)


def test_the_loader_s_benchmark_runs(write_counting_video, tmp_path, capsys):
    (tmp_path / "in" / "one").mkdir(parents=True)
    write_counting_video(tmp_path / "in" / "one" / "a.mp4", 30, 128, 64)
    transcode_folder(str(tmp_path / "in"), str(tmp_path / "out"), short_side=32)
    script = runpy.run_path(str(ROOT / "benchmarks" / "loader.py"))
    small = dict(num_frames=4, size=32, clips=4, batch_size=2, num_workers=(0, 1), prefetch=(2,), repeats=1, device="cpu")
    script["main"](script["Config"](data=str(tmp_path / "in"), transcoded=str(tmp_path / "out"), **small))
    out = capsys.readouterr().out
    for line in (
        "a clip takes 0.01 MB",
        "PyAV, bare",
        "decode_clip",
        "loader, 0 workers",
        "loader, 1 worker, prefetch 2",
        "times the",
    ):
        assert line in out
    script["draw_videos"](tmp_path, 64, 48, 1, 5)
    assert decode_clip(tmp_path / "0.mp4", 2, 3).shape == (3, 48, 64, 3)
    with pytest.raises(UserError, match="too many for 2 batches"):
        script["main"](script["Config"](data=str(tmp_path / "in"), **small | {"num_workers": (2,)}))


def test_the_epochs_benchmark_compares_students_and_says_how_much_faster_kept_clips_are(tmp_path, capsys, monkeypatch):
    script = importlib.import_module("epochs")
    script.draw_videos(tmp_path, 64, 48, 2, 40)
    tiny = dict(data=str(tmp_path), num_frames=4, stride=2, size=32, batch_size=4, workers=(0,), turns=1, device="cpu")
    given = script.Config(**tiny, clip_interval=8, precision="fp32")

    def run_here(_script: str, flags: list[str]) -> dict:  # without a process for each row
        row, folder = (
            next(flag.partition("=")[2] for flag in flags if flag.startswith(name)) for name in ("--row", "--folder")
        )
        return script.time_row(script.replace(given, row=row), Path(folder))

    monkeypatch.setattr(script.bench, "run_alone", run_here)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that it is put back
    script.main(given)
    out = capsys.readouterr().out
    rates = re.findall(
        r"^(before|kept) +0 workers: +(\S+) clips/s \(\S+ to \S+\), +(\S+) ms of CPU a clip, its best$", out, re.M
    )
    assert [way for way, *_ in rates] == ["before", "kept"]
    by_clock = float(re.search(r"kept, each at its best: (\S+) times as fast by the clock", out)[1])
    assert by_clock == pytest.approx(float(rates[1][1]) / float(rates[0][1]), rel=0.02)
    assert len(re.findall(r"^(decoding|copying|reading).* clips/s$", out, re.M)) == 3
    assert "all students are equal bit for bit" in out
    students = iter(("one", "another"))
    monkeypatch.setattr(script.bench, "run_alone", lambda *_: dict(times=[[1.0, 1.0]], student=next(students)))
    with pytest.raises(UserError, match="the students differ: another, one"):
        script.main(given)


def test_the_ledger_s_benchmark_runs(capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "ledger.py"))
    script["main"](script["Config"](batch_size=2, steps=2))
    out = capsys.readouterr().out
    assert len(re.findall(r"(\d+\.\d+) ms", out)) == 5
    assert out.count("% of the step") == 2


def test_the_victims_benchmark_runs(capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "victims.py"))
    script["main"](script["Config"](victims=("demo_swin", "demo_movinet"), batch_size=2, repeats=1, device="cpu"))
    assert len(re.findall(r"\d+\.\d+ clips/s, 2x16x\d+x\d+, fp32", capsys.readouterr().out)) == 2
    with pytest.raises(UserError, match="--victims nonsense: there are demo_swin"):
        script["main"](script["Config"](victims=("nonsense",), device="cpu"))


def test_the_benchmark_of_defences_times_each_of_them(capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "defences.py"))
    script["main"](script["Config"](batch_size=1, size=32, sizes=(20,), repeats=1))
    out = capsys.readouterr().out
    assert len(re.findall(r"^\w+: [\d.]+ ms, [\d.]+ % of the step$", out, re.MULTILINE)) == len(script["DEFENCES"])
    assert len(re.findall(r"^\w+: [\d.]+ ms a query after 20$", out, re.MULTILINE)) == len(script["MEMORIES"])


@pytest.mark.slow
def test_the_real_table_has_a_run_of_each_attack_within_its_bill(demo_set, tmp_path, monkeypatch):
    real_victim = importlib.import_module("real_victim")
    web = [path.relative_to(demo_set / "unrelated_a") for path in sorted((demo_set / "unrelated_a").rglob("*.mp4"))]
    for split, chosen in (("tune", web[:3]), ("val", web[3:8])):
        (tmp_path / f"{split}.txt").write_text("\n".join(map(str, chosen)))
    write_demo_images(tmp_path / "photos", 8)
    monkeypatch.setitem(real_victim.STUDENTS, "nothing", ("--student", "r2plus1d_tiny", "--student-weights", "None"))
    config = real_victim.Config(
        victim="demo_swin", web=str(demo_set / "unrelated_a"), robot=str(demo_set / "unrelated_b"), lists=str(tmp_path),
        photos=str(tmp_path / "photos"), budgets=(100,), students=("nothing",), size=32, epochs=2,
        num_workers=0, out_dir=str(tmp_path / "out"),
    )  # fmt: skip
    table = real_victim.main(config)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "experiment" not in line]
    assert [row[3] for row in rows] == ["100"] * 4 + ["16", "32"]  # all clips there are of two sets of drawn videos
    links = {split: {link.resolve() for link in (tmp_path / "out/data" / split).iterdir()} for split in ("tune", "val", "web")}
    paths = [(demo_set / "unrelated_a" / name).resolve() for name in web]
    assert links == dict(tune=set(paths[:3]), val=set(paths[3:8]), web=set(paths[8:]))


def run_gpu_parts(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *args]
    known = dict(os.environ, PYTHON=sys.executable, SCALE="demo", **environment)
    return subprocess.run(command, capture_output=True, text=True, env=known)


def test_the_parts_for_a_gpu_are_listed_and_a_wrong_one_is_named(tmp_path):
    listed = run_gpu_parts("--list")
    assert (listed.returncode, len(listed.stdout.splitlines())) == (0, 14)
    scripts = set(re.findall(r"(\S+\.py)", listed.stdout))
    assert {script for script in scripts if not (ROOT / script).is_file()} == set()
    wrong = run_gpu_parts(str(tmp_path / "out"), "victims", "train_stp")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "no part is called train_stp; there are tests demo train_step" in wrong.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_part_for_a_gpu_runs_on_a_cpu_and_leaves_its_table_and_none_runs_twice(tmp_path):
    done = run_gpu_parts(str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = re.findall(r"^### (\w+)$", (tmp_path / "tables.md").read_text(), re.MULTILINE)
    assert len(parts) == 14
    again = run_gpu_parts(str(tmp_path))
    assert again.stdout.count(" already") == 14


def test_what_answers_are_worth_is_read_off_their_curves():
    answers = importlib.import_module("answers")
    curves = {
        "probs": {100: [0.5, 0.7], 10_000: [1.0]},  # 80 % half-way, in logarithms
        "label": {100: [0.2], 10_000: [1.0]},  # three quarters of the way
        "top5": {100: [0.9]},
        "1 decimal": {100: [0.5]},
    }
    rows = answers.describe_worth(curves, 80).splitlines()[2:]
    assert rows == [
        "| probs | 1000 | 1.0 |",
        "| label | 3162 | 3.2 |",
        "| top5 | at most 100 | - |",
        "| 1 decimal | more than 100 | - |",
    ]


def test_growth_measures_what_it_says_and_leaves_nothing(demo_set, tmp_path, capsys, monkeypatch):
    growth = importlib.import_module("growth")
    monkeypatch.setattr(growth, "write_demo_set", lambda *_: demo_set)
    opened, probe = [], probes.probe
    monkeypatch.setattr(probes, "probe", lambda path: (opened.append(path), probe(path))[1])
    growth.main(growth.Config(videos=(40,), answers=(60,), clips=(50,), folder=str(tmp_path)))
    tables = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    videos, answers, clips = ([re.search(r"[\d.]+", cell)[0] for cell in row] for row in tables)
    assert (videos[0], answers[0], clips[0]) == ("40", "60", "50")
    assert len(opened) == 40  # the second start opens no video
    assert list(tmp_path.iterdir()) == []
