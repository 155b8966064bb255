"""Attacks without data: query counts, budgets, and runs that are interrupted."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from black_box import (
    attack_video_movinet,
    attack_video_swin,
    conditional_gan_with_movinet,
    conditional_gan_with_swin,
    random_noise_with_swin,
)
from extraction.attacks import data_free
from extraction.attacks.data_free import METHODS, SCHEDULES, Attacker, find_method, pairwise_distance
from extraction.errors import UserError
from extraction.evaluation import results as results_module
from extraction.generators import create_generator
from extraction.runs import Run
from extraction.students import create_student
from extraction.victims.ledger import Ledger
from extraction.victims.query_interface import Victim
from extraction.victims.zoo import load_victim
from extraction.weights import read_state


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Batches of two clips are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Brightness:
    """A victim of two classes, dark and bright, that can't be differentiated."""

    answers, num_classes, classes = "probs", 2, ("dark", "bright")

    @torch.no_grad()
    def query(self, clips, keys):
        assert len(set(keys)) == len(clips)
        bright = (20 * (clips.mean((1, 2, 3, 4)) - 0.5)).sigmoid()
        return torch.stack([1 - bright, bright], 1)


@pytest.mark.parametrize("objective", ["class_objective", "disagreement"])
def test_a_generator_goes_where_its_objective_is_lower(objective):
    torch.manual_seed(0)
    student = create_student("r2plus1d_tiny", 2).requires_grad_(False)
    generator = create_generator("layered", 2, 4, 24)
    attacker = Attacker(
        Brightness(), student, generator, None, torch.optim.Adam(generator.parameters(), 3e-3), METHODS["maze"],
        clip_shape=(3, 4, 24, 24), batch_size=12, replay_clips=0, seed=0,
    )  # fmt: skip

    @torch.no_grad()
    def value() -> float:
        attacker.begin(10**6)  # always the same noise
        noise, labels = attacker.draw()
        clips = generator.render(generator(noise, labels))
        student.eval()
        return getattr(attacker, objective)(clips, attacker.ask(clips), labels).mean().item()

    before = value()
    for iteration in range(20):
        attacker.begin(iteration)
        attacker.step_generator(getattr(attacker, objective), 10, 0.05)
    assert value() < before - 0.15
    if objective == "class_objective":
        assert value() < 0.4  # from some log 2, for dark and bright alike


def test_a_generator_goes_where_two_students_disagree_and_asks_nothing():
    torch.manual_seed(0)
    student, rival = create_student("r2plus1d_tiny", 3), create_student("r2plus1d_tiny", 3)
    for model in (student, rival):
        model.head.weight.data.normal_(std=5e3)  # fresh ones say the same of everything
    generator = create_generator("layered", 3, 4, 24)
    victim = Brightness()
    victim.num_classes, victim.query = 3, None
    attacker = Attacker(
        victim, student, generator, torch.optim.SGD(student.parameters(), 0.5), torch.optim.Adam(generator.parameters(), 3e-3),
        METHODS["disguide"], clip_shape=(3, 4, 24, 24), batch_size=12, replay_clips=0, seed=0, rival=rival,
    )  # fmt: skip
    assert attacker.rival_optimizer.defaults["lr"] == 0.5
    weights = [parameter.clone() for model in (student, rival) for parameter in model.parameters()]

    @torch.no_grad()
    def value() -> float:
        attacker.begin(10**6)  # always the same noise
        clips = generator.render(generator(*attacker.draw()))
        first, second = student.eval()(clips).softmax(1), rival.eval()(clips).softmax(1)
        mean = (first + second).mean(0) / 2
        return (-((first - second).abs() / 2**0.5).mean() + 0.2 * (mean * mean.log()).sum()).item()

    before = value()
    attacker.begin(10**6)
    attacker.step_generator_to_disagreement(0.2)
    assert attacker._unread[-1].item() == pytest.approx(before, abs=1e-5)
    for iteration in range(20):
        attacker.begin(iteration)
        attacker.step_generator_to_disagreement(0.2)
    assert value() < before - 0.008
    after = [parameter for model in (student, rival) for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


# --- losses and methods --------------------------------------------------------------------------------------------


def test_replayed_clips_are_cropped_and_fresh_ones_are_not(monkeypatch):
    shown = []
    monkeypatch.setattr(Attacker, "_learn", lambda attacker, views, targets: shown.append((views, targets)))
    for crop in (0.0, 0.3, 0.3):
        torch.manual_seed(0)
        student, generator = create_student("r2plus1d_tiny", 2), create_generator("layered", 2, 4, 24)
        attacker = Attacker(
            Brightness(), student, generator, torch.optim.SGD(student.parameters(), 0.0), None, METHODS["maze"],
            clip_shape=(3, 4, 24, 24), batch_size=4, replay_clips=4, seed=0, crop=crop,
        )  # fmt: skip
        attacker.begin(0)
        attacker.step_student()
        attacker.step_replay()
    fresh, replayed = shown[::2], shown[1::2]
    assert all(torch.equal(views, fresh[0][0]) for views, _ in fresh)
    (whole, told), (cropped, same), (again, _) = replayed
    assert torch.equal(told, same)  # the answers are those to the whole clips
    assert whole.shape == cropped.shape
    assert 0.001 < (whole - cropped).abs().mean() < 0.2
    assert torch.equal(cropped, again)


def test_methods_and_schedules_are_the_published_ones():
    assert (METHODS["maze"].num_directions, METHODS["maze"].replay_steps) == (10, 10)
    assert (METHODS["dfme"].num_directions, METHODS["dfme"].replay_steps) == (1, 0)
    steps = [SCHEDULES["steps"](done) for done in (0, 0.09, 0.1, 0.3, 0.5, 0.99)]
    assert steps == pytest.approx([1, 1, 0.3, 0.09, 0.027, 0.027])
    assert [SCHEDULES["cosine"](done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    for answers in ("label", "top5"):
        with pytest.raises(UserError, match=f"--answers {answers}: dfme needs one of logits, probs"):
            find_method("dfme", answers)


def test_pairwise_distance():
    clips = torch.stack([torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), 0.5)])
    assert pairwise_distance(clips) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert pairwise_distance(torch.zeros(4, 3, 2, 4, 4)) == 0


# --- whole runs ----------------------------------------------------------------------------------------------------

SMALL = dict(demo=False, iterations=3, batch_size=2, replay_clips=8, num_workers=0, score_every=1000)
ATTACK = SMALL | dict(replay_steps=1, num_directions=2, student_steps=2)
CGAN = ATTACK | dict(generator_iterations=2)
SCRIPTS = [
    # module, constants, its queries by hand
    (attack_video_swin, ATTACK, 3 * 2 * (1 * (1 + 2) + 2)),
    (attack_video_swin, ATTACK | dict(method="dfme", num_directions=None, generator_steps=2), 3 * 2 * (2 * (1 + 1) + 2)),
    (attack_video_swin, ATTACK | dict(method="disguide", num_directions=None), 3 * 2 * 2),
    (attack_video_movinet, ATTACK | dict(num_directions=None, iterations=1), 1 * 2 * (1 * (1 + 10) + 2)),
    (random_noise_with_swin, SMALL | dict(replay_steps=1, student_steps=2), 3 * 2 * 2),
    (conditional_gan_with_swin, CGAN, 2 * (2 * (1 + 2) + 3 * 2)),
    (conditional_gan_with_movinet, CGAN | dict(iterations=1), 2 * (2 * (1 + 2) + 1 * 2)),
]


@pytest.fixture
def configure(demo_set, tmp_path, monkeypatch):
    """The demo's constants with a handful of clips, against the demo's Swin, scored on 12 videos. Nothing is drawn."""
    monkeypatch.setattr(data_free, "draw_queries", lambda *_: None)
    monkeypatch.setattr(results_module, "draw_curve", lambda *_: None)
    val = tmp_path / "val"
    for video in sorted((demo_set / "val").glob("*/00000.mp4")):
        (val / video.parent.name).mkdir(parents=True)
        (val / video.parent.name / video.name).symlink_to(video)

    def configure(module, constants: dict, folder: str = "run"):
        more = dict(victim="demo_swin", val=str(val), out_dir=str(tmp_path / folder))
        return module.Config(**module.DEMO | constants | more)

    return configure


class Meter:
    """Counts what the victim itself is asked, and which answers are written."""

    def __init__(self, monkeypatch):
        self.asked, self.keys = 0, []

        def query(victim, clips, real=Victim.query):
            answers = real(victim, clips)
            self.asked += len(clips)
            assert clips.min() >= 0
            assert clips.max() <= 1
            return answers

        def keep(ledger, rows, real=Ledger._keep):
            self.keys += rows
            return real(ledger, rows)

        monkeypatch.setattr(Victim, "query", query)
        monkeypatch.setattr(Ledger, "_keep", keep)


def weights_of(config) -> dict:
    return read_state(f"{config.out_dir}/student.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("module", "constants", "num_queries"), SCRIPTS)
def test_the_queries_are_the_closed_form_and_every_forward_is_counted(module, constants, num_queries, configure, monkeypatch):
    meter = Meter(monkeypatch)
    results = module.main(configure(module, constants))
    assert results["num_queries"] == meter.asked == num_queries
    assert len(set(meter.keys)) == num_queries
    assert results["stopped"] == "iterations"
    assert 0 <= results["answer_entropy"] <= results["mean_answer_entropy"] <= math.log(12) + 1e-5
    assert 0 < results["pairwise_distance"] < 1
    assert "agreement_at_1" in results["history"][-1]


def test_a_run_leaves_sheets_of_its_clips_and_everything_else(configure, monkeypatch, tmp_path):
    monkeypatch.undo()
    attack_video_swin.main(configure(attack_video_swin, ATTACK | dict(score_every=20)))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"clips_000000020.png", "clips_000000030.png", "curve.png", "results.json", "state.pt", "ledger.sqlite"} <= left
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [point["num_queries"] for point in results["history"]] == [20, 30]
    assert results["top1"] == results["history"][-1]["top1"]
    assert results["method"] == "maze"
    assert "chance_top1" in results


def test_a_budget_one_clip_short_stops_inside_an_iteration_and_a_larger_one_goes_on(configure, monkeypatch, capsys):
    config = configure(attack_video_swin, ATTACK)
    free = configure(attack_video_swin, ATTACK, "free")
    attack_video_swin.main(free)
    meter = Meter(monkeypatch)
    attack_video_swin.main(dataclasses.replace(config, query_budget=29))
    assert "query budget exhausted: 28 of 29 queries used; run again" in capsys.readouterr().out
    results = json.loads(Path(config.out_dir, "results.json").read_text())
    assert results["num_queries"] == meter.asked == 28
    assert results["history"][-1]["iteration"] == 2
    assert results["stopped"] == "query budget"
    assert not equal(weights_of(config), weights_of(free))
    results = attack_video_swin.main(dataclasses.replace(config, query_budget=30))
    assert results["num_queries"] == meter.asked == len(set(meter.keys)) == 30
    assert equal(weights_of(config), weights_of(free))


def test_a_budget_of_nothing_leaves_a_student_all_the_same(configure, capsys):
    config = configure(random_noise_with_swin, SMALL)
    assert random_noise_with_swin.main(dataclasses.replace(config, query_budget=1))["num_queries"] == 0
    assert "0 of 1 queries used" in capsys.readouterr().out
    assert weights_of(config)


def test_a_budget_that_ends_a_start_before_its_first_clip(configure, monkeypatch, capsys):
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: True)
    config, histories = configure(attack_video_swin, ATTACK), []
    for budget in (20, 21):  # two iterations, and then less than another batch
        results = attack_video_swin.main(dataclasses.replace(config, query_budget=budget))
        assert results["num_queries"] == 20
        assert f"20 of {budget} queries used" in capsys.readouterr().out
        histories.append(results["history"])
    assert histories[0] == histories[1]
    assert "pairwise_distance" in histories[1][-1]
    assert attack_video_swin.main(config)["num_queries"] == 30


@pytest.mark.parametrize(
    ("module", "constants", "num_queries"),
    [
        (attack_video_swin, ATTACK | dict(iterations=4), 40),
        (attack_video_swin, ATTACK | dict(iterations=4, method="disguide"), 16),
        pytest.param(conditional_gan_with_swin, CGAN, 24, marks=pytest.mark.slow),
    ],
)
def test_crashes_between_batches_change_neither_bits_nor_count(module, constants, num_queries, configure, monkeypatch):
    undisturbed = configure(module, constants | dict(score_every=10), "undisturbed")
    whole = module.main(undisturbed)
    config = configure(module, constants | dict(score_every=10))
    meter = Meter(monkeypatch)

    class Crash(Exception):
        pass

    # Deterministic, and each start gets a little further: it dies at the n-th of the moments below, counted anew.
    moments = {"left": 0}

    def dying(real):
        def at_the_end(*args, **kwargs):
            result = real(*args, **kwargs)
            moments["left"] -= 1
            if moments["left"] <= 0:
                raise Crash
            return result

        return at_the_end

    monkeypatch.setattr(Ledger, "_keep", dying(Ledger._keep))  # answers are cached, nothing has come of them
    monkeypatch.setattr(Ledger, "forget", dying(Ledger.forget))  # saved and forgotten
    monkeypatch.setattr(Run, "save_state", dying(Run.save_state))  # saved, not yet forgotten
    # Not every iteration has a checkpoint, so that starts repeat iterations with cached answers.
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: meter.asked % 3 == 0)
    starts = 0
    while True:
        starts += 1
        moments["left"] = 2 + starts % 4
        try:
            results = module.main(config)
            break
        except Crash:
            assert starts < 60
    assert starts > 4
    assert meter.asked == len(set(meter.keys)) == results["num_queries"] == whole["num_queries"] == num_queries
    assert equal(weights_of(config), weights_of(undisturbed))
    assert results["history"] == whole["history"]


def test_a_checkpoint_keeps_answers_of_later_iterations(configure, monkeypatch):
    """A start without checkpoints dies in the third iteration; the next one saves after the first, with the rest cached."""
    config = configure(attack_video_swin, ATTACK)
    meter = Meter(monkeypatch)
    with monkeypatch.context() as patch:

        def dying(ledger, rows, real=Ledger._keep):
            kept = real(ledger, rows)
            if meter.asked == 24:
                raise InterruptedError
            return kept

        patch.setattr(Ledger, "_keep", dying)
        with pytest.raises(InterruptedError):
            attack_video_swin.main(config)
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: True)
    saved = []

    def forget(ledger, before, real=Ledger.forget):
        real(ledger, before)
        saved.append(len(ledger))

    monkeypatch.setattr(Ledger, "forget", forget)
    assert attack_video_swin.main(config)["num_queries"] == meter.asked == len(set(meter.keys)) == 30
    assert saved == [14, 4, 0]  # of 24 cached, ten an iteration; then all


def test_ctrl_c_saves_after_the_iteration_and_goes_on_to_the_same_bits(configure, monkeypatch):
    undisturbed = configure(attack_video_swin, ATTACK, "undisturbed")
    attack_video_swin.main(undisturbed)
    config = configure(attack_video_swin, ATTACK)
    meter = Meter(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "begin", lambda run, real=Run.begin: (real(run), setattr(run, "stop_asked", True)))
        with pytest.raises(KeyboardInterrupt, match="run the same command again to continue"):
            attack_video_swin.main(config)
        assert meter.asked == 10
    ledger = Ledger(f"{config.out_dir}/ledger.sqlite", lambda num_queries: load_victim("demo_swin"), "probs", exact=True)
    assert (len(ledger), ledger.num_queries) == (0, 10)  # what led to the checkpoint is forgotten
    ledger.close()
    assert attack_video_swin.main(config)["num_queries"] == meter.asked == 30
    assert equal(weights_of(config), weights_of(undisturbed))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(configure):
    configs = [configure(attack_video_swin, ATTACK | dict(iterations=1), name) for name in ("first", "second", "third")]
    configs[2] = dataclasses.replace(configs[2], seed=1)
    for config in configs:
        attack_video_swin.main(config)
    assert equal(weights_of(configs[0]), weights_of(configs[1]))
    assert not equal(weights_of(configs[0]), weights_of(configs[2]))


@pytest.mark.parametrize(
    ("module", "change", "line"),
    [
        (attack_video_swin, dict(method="dfme", answers="label"), "--answers label: dfme needs one of logits, probs"),
        (attack_video_swin, dict(generator="gan"), "--generator gan: it must be one of dvdgan, deconv, layered"),
        (attack_video_swin, dict(generator="noise"), "--generator noise: it must be one of dvdgan"),
        (attack_video_swin, dict(generator="dvdgan", size=50), "--size of generated clips must be"),
        (attack_video_swin, dict(student_steps=0), "--student-steps 0: it must be at least 1"),
        (attack_video_swin, dict(schedule="linear"), "--schedule linear: it must be one of cosine, steps"),
        (attack_video_swin, dict(optimizer="lion"), "--optimizer lion: it must be one of adam, sgd"),
        (attack_video_swin, dict(student_lr=1e30), "a loss is not finite in iteration"),
        (conditional_gan_with_swin, dict(answers="label"), "--answers label: it must be one of logits, probs, top5"),
        (random_noise_with_swin, dict(val="nowhere"), "folder nowhere not found"),
    ],
)
def test_bad_constants_get_one_line(module, change, line, configure):
    constants = {attack_video_swin: ATTACK, conditional_gan_with_swin: CGAN}.get(module, SMALL)
    with pytest.raises(UserError, match=line) as caught:
        module.main(dataclasses.replace(configure(module, constants), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers", ["logits", "label"])
def test_maze_takes_other_answers(answers, configure):
    results = attack_video_swin.main(configure(attack_video_swin, ATTACK | dict(answers=answers, iterations=1)))
    assert results["answers"] == answers
