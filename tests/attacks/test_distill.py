"""Training on answers: exact queries, equal bits, budgets, and what goes wrong."""

import dataclasses
import json
import threading

import pytest
import torch

import eval_only
from extraction import distributed
from extraction.attacks.distill import AnsweredBatch, Training, prefetch
from extraction.data import clips
from extraction.data.clips import Batch
from extraction.errors import UserError
from extraction.students import Student
from extraction.victims.ledger import Ledger
from extraction.victims.zoo import VICTIMS, load_victim
from extraction.weights import read_state
from grey_box import labels_only, swin_to_r21_kd


@pytest.fixture
def config(demo_set, tmp_path):
    """The demo's constants on a handful of clips: 36 labelled, 40 auxiliary, 24 held out."""
    demo = swin_to_r21_kd.DEMO | dict(
        demo=False, in_domain=str(demo_set / "train_5per"), val=str(demo_set / "val"), epochs=2, num_workers=0,
        aux=(str(demo_set / "unrelated_a"), str(demo_set / "unrelated_b")), out_dir=str(tmp_path / "run"),
    )  # fmt: skip
    return swin_to_r21_kd.Config(**demo)


def weights_of(config) -> dict:
    return read_state(f"{config.out_dir}/student.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_leaves_everything_and_repeats_to_the_bit(config, tmp_path):
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 2 * 76
    needed = (
        "experiment victim student answers num_queries query_budget num_classes top1 top5 victim_top1 victim_top5 "
        "agreement_at_1 agreement_at_5 chance_top1 seconds commit config"
    )
    assert set(needed.split(" ")) <= set(json.loads((tmp_path / "run" / "results.json").read_text()))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "results.json", "curve.png", "clips.png", "student.safetensors", "state.pt", "ledger.sqlite"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "again"))
    swin_to_r21_kd.main(other)
    assert equal(weights_of(config), weights_of(other))
    different = dataclasses.replace(config, out_dir=str(tmp_path / "seed"), seed=1, epochs=1)
    swin_to_r21_kd.main(different)
    assert not equal(weights_of(config), weights_of(different))
    # The saved student, scored by itself, repeats the run's numbers exactly.
    scored = eval_only.main(
        eval_only.Config(
            student="r2plus1d_tiny",
            weights=f"{config.out_dir}/student.safetensors",
            data=config.val,
            num_workers=0,
            device="cpu",
        )
    )
    assert (scored["top1"], scored["top5"]) == (results["top1"], results["top5"])
    (table,) = (tmp_path / "run").glob("student.*.classes.csv")
    assert len(table.read_text().splitlines()) == 13


@pytest.mark.gpu
def test_a_gpu_trains_resumes_and_counts_the_same(config):
    on_gpu = dataclasses.replace(config, device="cuda", num_workers=2)
    assert swin_to_r21_kd.main(dataclasses.replace(on_gpu, query_budget=100))["num_queries"] == 100
    assert swin_to_r21_kd.main(on_gpu)["num_queries"] == 2 * 76


def test_the_budget_is_never_passed_and_the_student_is_saved(config, tmp_path, capsys):
    short = dataclasses.replace(config, query_budget=2 * 76 - 1)
    swin_to_r21_kd.main(short)
    line = "query budget exhausted: 151 of 151 queries used; run again with a larger --query-budget to go on"
    assert line in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["num_queries"], results["stopped"], results["history"][-1]["epoch"]) == (151, "query budget", 2)
    assert results["top1"] >= 0
    eval_only.main(
        eval_only.Config(
            student="r2plus1d_tiny", weights=f"{config.out_dir}/student.safetensors", data=config.val, num_workers=0
        )
    )
    capsys.readouterr()
    swin_to_r21_kd.main(short)  # the same command again: the same table, the same line
    out = capsys.readouterr().out
    assert f"{100 * results['top1']:.1f}" in out
    assert line in out
    with pytest.raises(UserError, match="its run has used 151 queries, --query-budget 30 is less"):
        swin_to_r21_kd.main(dataclasses.replace(config, query_budget=30))
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    # A larger budget goes on from there, to where an unlimited run would have come.
    whole = dataclasses.replace(config, query_budget=2 * 76)
    assert swin_to_r21_kd.main(whole)["num_queries"] == 152
    free = dataclasses.replace(config, out_dir=str(tmp_path / "free"))
    swin_to_r21_kd.main(free)
    assert equal(weights_of(whole), weights_of(free))


def test_a_student_that_was_never_trained_has_no_loss(config, tmp_path, capsys):
    swin_to_r21_kd.main(dataclasses.replace(config, query_budget=0))
    assert "query budget exhausted: 0 of 0 queries used" in capsys.readouterr().out

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)
    assert results["history"][0]["loss"] is None


def test_no_more_workers_than_cores(monkeypatch, recwarn):
    started = []

    class Loader(clips.DataLoader):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.num_workers)

    monkeypatch.setattr(clips, "DataLoader", Loader)
    for num_workers in (10**3, 1):
        assert list(clips.load_batches([], [], num_workers)) == []
    assert started == [clips.count_cores(), 1]
    assert not recwarn.list


def test_views_per_clip_bounds_the_queries(config):
    assert swin_to_r21_kd.main(dataclasses.replace(config, epochs=3, views_per_clip=1))["num_queries"] == 76


def test_the_student_has_all_threads_once_nothing_is_new(config, monkeypatch):
    monkeypatch.setattr(distributed, "ALL_THREADS", 2)
    seen, step = [], Training.step
    monkeypatch.setattr(Training, "step", lambda training, loss: seen.append(torch.get_num_threads()) or step(training, loss))
    swin_to_r21_kd.main(dataclasses.replace(config, epochs=3, views_per_clip=2))
    assert seen == [1] * 10 + [2] * 5
    assert torch.get_num_threads() == 1


def test_a_second_run_over_a_full_ledger_asks_nothing_and_needs_no_weights(config, tmp_path, monkeypatch):
    swin_to_r21_kd.main(config)
    for name in ("results.json", "state.pt", "student.safetensors", "config.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    monkeypatch.setitem(VICTIMS, "demo_swin", (None, tmp_path / "nowhere.safetensors", "elsewhere"))
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 152
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (tmp_path / "student.safetensors").read_bytes()


def test_answers_of_another_run_cost_nothing_and_give_the_same_student(config, tmp_path):
    swin_to_r21_kd.main(config)
    again = dataclasses.replace(
        config, out_dir=str(tmp_path / "again"), answers_from=(f"{config.out_dir}/ledger.sqlite",), query_budget=0
    )
    results = swin_to_r21_kd.main(again)
    assert (results["num_queries"], results["stopped"]) == (0, "epochs")
    assert equal(weights_of(config), weights_of(again))


def test_resumes_to_the_same_bits_from_any_step(config, tmp_path, monkeypatch):
    from extraction.runs import Run

    swin_to_r21_kd.main(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    whole = weights_of(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))

    class Crash(Exception):
        pass

    def save_then_crash(self, state, real=Run.save_state):
        real(self, state)
        raise Crash

    monkeypatch.setattr(Run, "save_state", save_then_crash)
    monkeypatch.setattr(Run, "checkpoint_due", lambda self: True)
    for _ in range(2 * 5):  # 76 clips are five batches an epoch, each followed by a checkpoint and a crash
        with pytest.raises(Crash):
            swin_to_r21_kd.main(config)
    results = swin_to_r21_kd.main(config)
    assert results["num_queries"] == 152
    assert equal(weights_of(config), whole)


def test_other_constants_are_refused_in_the_same_folder(config):
    swin_to_r21_kd.main(dataclasses.replace(config, epochs=1))
    with pytest.raises(UserError, match=r"holds a run with other constants \(epochs 1 -> 2\)"):
        swin_to_r21_kd.main(config)


def test_a_loss_that_is_not_finite_stops_and_says_where(config):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in epoch 1, batch \d"):
        swin_to_r21_kd.main(dataclasses.replace(config, head_lr=1e30, body_lr=1e30))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(num_frames=0), "--num-frames 0: it must be at least 1"),
        (dict(query_budget=-1), "--query-budget -1: it must be at least 0"),
        (dict(answers="all"), "--answers all: it must be one of logits, probs, top5, label"),
        (dict(student="resnet"), "no student is called 'resnet'"),
        (dict(device="cuda:7"), "device cuda:7: PyTorch sees"),
        (dict(device="gpu"), "device 'gpu': write auto, cpu, cuda"),
        (dict(in_domain="nowhere"), "folder nowhere not found"),
        (dict(victim_weights="nowhere.pth"), r"victim weights nowhere.pth not found"),
        (dict(student_weights="nowhere.pth"), "weights nowhere.pth not found"),
        (dict(in_domain_list="nowhere.txt"), "list nowhere.txt not found"),
        (dict(out_dir="/proc/run"), "cannot make /proc/run"),
    ],
)
def test_bad_constants_get_one_line(config, change, line):
    with pytest.raises(UserError, match=line) as caught:
        swin_to_r21_kd.main(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


def test_rounded_answers_are_what_the_student_learns_from(config, tmp_path):
    swin_to_r21_kd.main(dataclasses.replace(config, epochs=1, decimals=1))
    kept = Ledger(tmp_path / "run" / "ledger.sqlite", lambda num_queries: load_victim("demo_swin", decimals=1), "probs", 1)
    answers = kept.query(torch.zeros(76, 3, 16, 48, 48), [key for key, _ in kept])
    assert set((10 * answers).round().int().flatten().tolist()) > {0, 10}
    assert torch.equal(answers, answers.round(decimals=1))
    with pytest.raises(UserError, match="keeps decimals 1, this run wants 2"):
        Ledger(tmp_path / "run" / "ledger.sqlite", lambda num_queries: load_victim("demo_swin", decimals=2), "probs", 2)
    with pytest.raises(UserError, match="--decimals 10: it must be at most 9"):
        swin_to_r21_kd.main(dataclasses.replace(config, decimals=10, out_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("answers", ["logits", "top5", "label"])
def test_every_answer_type_trains(config, answers):
    assert swin_to_r21_kd.main(dataclasses.replace(config, epochs=1, answers=answers))["answers"] == answers


def test_the_baseline_asks_no_victim(config, tmp_path):
    demo = labels_only.DEMO | dict(demo=False, in_domain=config.in_domain, val=config.val, epochs=2, num_workers=0)
    results = labels_only.main(labels_only.Config(**demo | dict(out_dir=str(tmp_path / "labels"))))
    assert results["num_queries"] == 0
    assert results["victim"] is None


def test_workers_are_started_again_by_the_thread_that_trains_and_not_beside_it():
    """A fork beside a computing thread leaves locks held in the child: one in some dozens of workers hung for ever."""
    training = threading.Event()

    def load():
        for number in range(6):
            yield Batch([number], torch.empty(0), [])
            if number in (0, 2, 3):
                yield None
                assert threading.current_thread() is threading.main_thread()
                assert not training.is_set()

    def query(batch, number):
        assert batch.indices == [number - 10]
        return AnsweredBatch(number, [], torch.empty(0), torch.empty(0), torch.empty(0), [1], False)

    numbers = []
    for _, batch in prefetch(load(), 10, 100, query, ahead=lambda number: True):
        training.set()
        numbers.append(batch.number)
        training.clear()
    assert numbers == list(range(10, 16))


def test_a_frozen_body_sees_each_view_once_and_the_student_is_the_same(config, tmp_path, monkeypatch):
    frozen = dataclasses.replace(
        config, epochs=5, views_per_clip=2, body_lr=0.0, student_crop=0.0, out_dir=str(tmp_path / "kept")
    )
    seen, embed = [], Student.embed
    monkeypatch.setattr(Student, "embed", lambda student, clips: seen.append(len(clips)) or embed(student, clips))
    results = swin_to_r21_kd.main(frozen)
    assert results["num_queries"] == 2 * 76
    assert sum(seen) == 2 * 76 + 1  # one, first, tells what there will be
    whole = dataclasses.replace(frozen, cache_gb=0.0, out_dir=str(tmp_path / "not_kept"))
    assert swin_to_r21_kd.main(whole)["num_queries"] == 2 * 76
    assert sum(seen) == 2 * 76 + 2  # that one alone
    ours, theirs = weights_of(frozen), weights_of(whole)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in theirs)
    # Killed amid views that come again, and amid new ones, and with features lost: the same bits.
    for number, last in enumerate((3, 13)):
        killed, steps, step = dataclasses.replace(frozen, out_dir=str(tmp_path / f"killed_{number}")), [], Training.step
        with monkeypatch.context() as patch:

            def stop(training, loss, last=last, steps=steps, step=step):
                step(training, loss)
                steps.append(loss)
                if len(steps) == last:
                    training.run.stop_asked = True

            patch.setattr(Training, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                swin_to_r21_kd.main(killed)
        assert swin_to_r21_kd.main(killed)["num_queries"] == 2 * 76
        assert equal(weights_of(killed), ours)
