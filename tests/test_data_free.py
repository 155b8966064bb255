"""The data-free loop: the estimator, the bills, the budget, the replay memory, and runs that are interrupted."""

import dataclasses
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from extraction.data_free import (
    METHODS,
    SCHEDULES,
    Attacker,
    Replay,
    answers_to_logits,
    estimate_gradient,
    find_method,
    kl_loss,
    l1_loss,
    pairwise_distance,
)
from extraction.ledger import Ledger, export, verify

from black_box import (
    attack_video_movinet,
    attack_video_swin,
    conditional_gan_with_movinet,
    conditional_gan_with_swin,
    random_noise_with_swin,
)
from extraction import data_free, report
from extraction.errors import BudgetExhausted, UserError
from extraction.generators import create_generator
from extraction.runs import Run
from extraction.students import create_student
from extraction.victims import Victim, load_victim
from extraction.weights import read_state


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Batches of two clips are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the estimator -------------------------------------------------------------------------------------------------


def smooth_problem(d: int = 60):
    """A loss per clip with a gradient known in closed form: sum of sines and a square."""
    torch.manual_seed(0)
    weight = torch.randn(d, dtype=torch.float64)

    def loss_fn(x):
        return (weight * x.flatten(1)).sin().sum(1) + 0.05 * x.flatten(1).square().sum(1)

    at = torch.randn(1, 3, d // 3, dtype=torch.float64)
    gradient = weight * (weight * at.flatten(1)).cos() + 0.1 * at.flatten(1)
    return loss_fn, at, gradient[0]


@pytest.mark.parametrize("num_directions", [1, 4, 10])
def test_the_estimate_is_unbiased_and_as_good_as_theory_says(num_directions):
    loss_fn, at, gradient = smooth_problem()
    d, draws = 60, 1000
    rng = torch.Generator().manual_seed(1)
    # A batch of one point is 1 000 draws at once, each with its own directions.
    estimates = estimate_gradient(loss_fn, at.expand(draws, -1, -1), num_directions, 1e-5, rng).flatten(1)
    cosine = F.cosine_similarity(estimates, gradient[None]).mean().item()
    # Of m random directions in d dimensions the gradient's share is sqrt(m / d), to first order in 1/m and m/d.
    expected = math.sqrt(num_directions / d) * (math.sqrt(2 / math.pi) if num_directions == 1 else 1)
    assert cosine == pytest.approx(expected, rel=0.1)
    # The mean over the draws is the gradient within the sampling error, whose size is known:
    # E|g - mean|^2 = |gradient|^2 (d - 1) / m nearly.
    mean = estimates.mean(0)
    error = (mean - gradient).norm() / gradient.norm()
    assert error < 1.3 * math.sqrt(d / num_directions / draws)
    scale = (mean @ gradient / gradient.square().sum()).item()
    assert scale == pytest.approx(1, abs=0.15)


def test_the_estimate_treats_each_clip_by_itself_and_asks_once_and_once_per_direction():
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        return x.flatten(1).sum(1) * torch.tensor([0.0, 1.0, 0.0, -2.0])

    rng = torch.Generator().manual_seed(0)
    estimate = estimate_gradient(loss_fn, torch.zeros(4, 5), 400, 1e-2, rng)
    assert calls == [4] * 401
    assert (estimate[[0, 2]] == 0).all()
    assert estimate[1].mean().item() == pytest.approx(1, abs=0.25)
    assert estimate[3].mean().item() == pytest.approx(-2, abs=0.5)


class Brightness:
    """A victim of two classes, dark and bright, that can't be differentiated."""

    answers, num_classes, classes = "probs", 2, ("dark", "bright")

    @torch.no_grad()
    def query(self, clips, keys):
        assert len(set(keys)) == len(clips)
        bright = (20 * (clips.mean((1, 2, 3, 4)) - 0.5)).sigmoid()
        return torch.stack([1 - bright, bright], 1)


@pytest.mark.parametrize("objective", ["naming", "disagreement"])
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
        attacker.begin(10**6, 1.0)  # always the same noise
        noise, labels = attacker.draw()
        clips = generator.render(generator(noise, labels))
        student.eval()
        return getattr(attacker, objective)(clips, attacker.ask(clips), labels).mean().item()

    before = value()
    for iteration in range(20):
        attacker.begin(iteration, 1.0)
        attacker.step_generator(getattr(attacker, objective), 10, 0.05)
    assert value() < before - 0.15
    if objective == "naming":
        assert value() < 0.4  # from some log 2, for dark and bright alike


# --- losses and methods --------------------------------------------------------------------------------------------


def test_losses_are_per_clip():
    torch.manual_seed(0)
    logits, probs = torch.randn(4, 6), torch.randn(4, 6).softmax(1)
    kl = (probs * (probs.log() - logits.softmax(1).log())).sum(1)
    torch.testing.assert_close(kl_loss(logits, probs), kl)
    torch.testing.assert_close(l1_loss(logits, probs), (logits - probs).abs().sum(1) / 6)


def test_logits_are_recovered_up_to_their_mean():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 6)
    recovered = answers_to_logits(logits.softmax(1), "probs", 6)
    torch.testing.assert_close(recovered, logits - logits.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert answers_to_logits(logits, "logits", 6) is logits
    assert answers_to_logits(torch.tensor([[1.0, 0.0]]), "probs", 2).isfinite().all()


def test_methods_and_schedules_are_the_published_ones():
    assert (METHODS["maze"].num_directions, METHODS["maze"].replay_steps) == (10, 10)
    assert (METHODS["dfme"].num_directions, METHODS["dfme"].replay_steps) == (1, 0)
    steps = [SCHEDULES["steps"](done) for done in (0, 0.09, 0.1, 0.3, 0.5, 0.99)]
    assert steps == pytest.approx([1, 1, 0.3, 0.09, 0.027, 0.027])
    assert [SCHEDULES["cosine"](done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    for surface in ("label", "top5"):
        with pytest.raises(UserError, match=f"--answers {surface}: dfme needs one of logits, probs"):
            find_method("dfme", surface)
    with pytest.raises(UserError, match="no method is called 'mace'; there are maze, dfme"):
        find_method("mace", "probs")


# --- the replay memory ---------------------------------------------------------------------------------------------


def test_the_replay_memory_stays_flat_and_keeps_a_fair_sample():
    def push_all(seed: int, pushes: int = 10_000, batch: int = 50) -> Replay:
        replay, rng = Replay(200, (1, 2, 1, 1), 1), torch.Generator().manual_seed(seed)
        for first in range(0, pushes, batch):
            numbers = torch.arange(first, first + batch)
            clips = torch.stack([numbers // 256, numbers % 256], 1).view(-1, 1, 2, 1, 1).to(torch.uint8)
            replay.push(clips, numbers[:, None].float(), rng)
            sizes.add((replay.num_bytes, replay.clips.data_ptr(), replay.clips.untyped_storage().nbytes()))
            assert len(replay) == min(200, first + batch)
        return replay

    sizes: set = set()
    replay = push_all(0)
    assert replay.num_bytes == 200 * 2 + 200 * 4
    assert len(sizes) == 1
    kept = replay.targets[:, 0].long()
    assert (kept == replay.clips.view(200, 2).long() @ torch.tensor([256, 1])).all()  # each clip with its own target
    assert len(kept.unique()) == 200
    # Fair: over 20 memories of 2 000 clips every tenth of these is kept alike (400 of 4 000, sd 18), first and last too.
    shares = torch.zeros(10)
    for seed in range(20):
        sizes.clear()
        shares += torch.bincount(push_all(seed, 2000).targets[:, 0].long() // 200, minlength=10)
    assert shares.sum() == 4000
    assert (shares - 400).abs().max() < 4.5 * 18
    clips, targets = replay.sample(64, torch.Generator().manual_seed(3))
    assert set(targets[:, 0].long().tolist()) <= set(kept.tolist())
    assert (clips.view(64, 2).long() @ torch.tensor([256, 1]) == targets[:, 0].long()).all()


def test_a_replay_memory_comes_back_from_its_state(tmp_path):
    for pushes in (3, 9):
        rng = torch.Generator().manual_seed(0)
        replay = Replay(5, (1, 1, 1, 1), 2)
        replay.push(torch.arange(pushes).view(-1, 1, 1, 1, 1).to(torch.uint8), torch.rand(pushes, 2), rng)
        again = Replay(5, (1, 1, 1, 1), 2)
        again.load_state_dict(replay.state_dict())
        assert len(again) == len(replay) == min(pushes, 5)
        assert torch.equal(again.clips, replay.clips)
        assert torch.equal(again.targets, replay.targets)
        assert again.num_pushed == pushes


def test_pairwise_distance():
    clips = torch.stack([torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), 0.5)])
    assert pairwise_distance(clips) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert pairwise_distance(torch.zeros(4, 3, 2, 4, 4)) == 0


# --- the ledger forgets --------------------------------------------------------------------------------------------


def test_the_ledger_keeps_every_digit_and_forgets_answers_but_not_the_bill(tmp_path):
    def open_ledger(exact: bool = True) -> Ledger:
        return Ledger(
            tmp_path / "ledger.sqlite", lambda spent: load_victim("demo_swin", num_queries=spent), "probs", exact=exact
        )

    clips = torch.rand(4, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))
    keys = [bytes([0, step, slot]) for step in range(2) for slot in range(2)]
    ledger = open_ledger()
    answers = ledger.query(clips, keys)
    assert torch.equal(answers, load_victim("demo_swin").query(clips))
    ledger.forget(keys[2])
    assert (len(ledger), ledger.num_queries) == (2, 4)
    ledger.close()
    verify(str(tmp_path / "ledger.sqlite"))
    export(str(tmp_path / "ledger.sqlite"), str(tmp_path / "answers.npz"))
    assert (numpy.load(tmp_path / "answers.npz")["answers"] == answers[2:].numpy()).all()
    ledger = open_ledger()
    assert ledger.num_queries == 4
    assert torch.equal(ledger.query(clips[2:], keys[2:]), answers[2:])
    assert ledger.num_queries == 4  # those of the later step were kept
    ledger.query(clips[:1], keys[:1])
    assert ledger.num_queries == 5
    ledger.close()
    with pytest.raises(UserError, match="keeps answers packed as logits, this run wants probs"):
        open_ledger(exact=False)


# --- whole runs ----------------------------------------------------------------------------------------------------

SMALL = dict(demo=False, iterations=3, batch_size=2, replay_clips=8, num_workers=0, score_every=1000)
ATTACK = SMALL | dict(replay_steps=1, num_directions=2, student_steps=2)
CGAN = ATTACK | dict(generator_iterations=2)
SCRIPTS = [
    # module, constants, its bill by hand
    (attack_video_swin, ATTACK, 3 * 2 * (1 * (1 + 2) + 2)),
    (attack_video_swin, ATTACK | dict(method="dfme", num_directions=None, generator_steps=2), 3 * 2 * (2 * (1 + 1) + 2)),
    (attack_video_movinet, ATTACK | dict(num_directions=None, iterations=1), 1 * 2 * (1 * (1 + 10) + 2)),
    (random_noise_with_swin, SMALL | dict(replay_steps=1, student_steps=2), 3 * 2 * 2),
    (conditional_gan_with_swin, CGAN, 2 * (2 * (1 + 2) + 3 * 2)),
    (conditional_gan_with_movinet, CGAN | dict(iterations=1), 2 * (2 * (1 + 2) + 1 * 2)),
]


@pytest.fixture
def configure(demo_set, tmp_path, monkeypatch):
    """The demo's constants with a handful of clips, against the demo's Swin, scored on 12 videos. Nothing is drawn."""
    monkeypatch.setattr(data_free, "draw_queries", lambda *_: None)
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)
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


@pytest.mark.parametrize(("module", "constants", "bill"), SCRIPTS)
def test_the_bill_is_the_closed_form_and_every_forward_is_on_it(module, constants, bill, configure, monkeypatch):
    meter = Meter(monkeypatch)
    results = module.main(configure(module, constants))
    assert results["num_queries"] == meter.asked == bill
    assert len(set(meter.keys)) == bill
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


def test_a_budget_one_clip_short_stops_inside_an_iteration_and_a_larger_one_goes_on(configure, monkeypatch):
    config = configure(attack_video_swin, ATTACK)
    free = configure(attack_video_swin, ATTACK, "free")
    attack_video_swin.main(free)
    meter = Meter(monkeypatch)
    with pytest.raises(BudgetExhausted, match="query budget exhausted: 28 of 29 queries spent, 2 more asked for"):
        attack_video_swin.main(dataclasses.replace(config, query_budget=29))
    results = json.loads(Path(config.out_dir, "results.json").read_text())
    assert results["num_queries"] == meter.asked == 28
    assert results["history"][-1]["iteration"] == 2
    assert results["stopped"].startswith("query budget exhausted")
    assert not equal(weights_of(config), weights_of(free))
    results = attack_video_swin.main(dataclasses.replace(config, query_budget=30))
    assert results["num_queries"] == meter.asked == len(set(meter.keys)) == 30
    assert equal(weights_of(config), weights_of(free))


def test_a_budget_of_nothing_leaves_a_student_all_the_same(configure):
    config = configure(random_noise_with_swin, SMALL)
    with pytest.raises(BudgetExhausted, match="0 of 1 queries spent"):
        random_noise_with_swin.main(dataclasses.replace(config, query_budget=1))
    assert weights_of(config)


def test_a_budget_that_ends_a_life_before_its_first_clip(configure, monkeypatch):
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: True)
    config = configure(attack_video_swin, ATTACK)
    for budget in (20, 21):  # two iterations, and then less than another batch
        with pytest.raises(BudgetExhausted, match=f"20 of {budget} queries spent"):
            attack_video_swin.main(dataclasses.replace(config, query_budget=budget))
    assert attack_video_swin.main(config)["num_queries"] == 30


@pytest.mark.parametrize(
    ("module", "constants", "bill"),
    [
        (attack_video_swin, ATTACK | dict(iterations=4), 40),
        pytest.param(conditional_gan_with_swin, CGAN, 24, marks=pytest.mark.slow),
    ],
)
def test_crashes_anywhere_change_neither_bits_nor_bill(module, constants, bill, configure, monkeypatch):
    undisturbed = configure(module, constants | dict(score_every=10), "undisturbed")
    whole = module.main(undisturbed)
    config = configure(module, constants | dict(score_every=10))
    meter = Meter(monkeypatch)

    class Crash(Exception):
        pass

    # Deterministic, and each life gets a little further: it dies at the n-th of the moments below, counted anew.
    moments = {"left": 0}

    def dying(real):
        def at_the_end(*args, **kwargs):
            result = real(*args, **kwargs)
            moments["left"] -= 1
            if moments["left"] <= 0:
                raise Crash
            return result

        return at_the_end

    monkeypatch.setattr(Ledger, "_keep", dying(Ledger._keep))  # answers are paid, nothing has come of them
    monkeypatch.setattr(Ledger, "forget", dying(Ledger.forget))  # saved and forgotten
    monkeypatch.setattr(Run, "save_state", dying(Run.save_state))  # saved, not yet forgotten
    # Not every iteration has a checkpoint, so that lives repeat iterations that were paid for.
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: meter.asked % 3 == 0)
    lives = 0
    while True:
        lives += 1
        moments["left"] = 2 + lives % 4
        try:
            results = module.main(config)
            break
        except Crash:
            assert lives < 60
    assert lives > 4
    assert meter.asked == len(set(meter.keys)) == results["num_queries"] == whole["num_queries"] == bill
    assert equal(weights_of(config), weights_of(undisturbed))
    assert results["history"] == whole["history"]


def test_a_checkpoint_spares_what_a_longer_life_has_paid_for(configure, monkeypatch):
    """A life without checkpoints dies in the third iteration; the next one saves after the first, with the rest paid."""
    config = configure(attack_video_swin, ATTACK)
    meter = Meter(monkeypatch)
    with monkeypatch.context() as patch:

        def dying(ledger, rows, real=Ledger._keep):
            real(ledger, rows)
            if meter.asked == 24:
                raise InterruptedError

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
    assert saved == [14, 4, 0]  # of 24 paid, ten an iteration; then all


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
    ledger = Ledger(f"{config.out_dir}/ledger.sqlite", lambda spent: load_victim("demo_swin"), "probs", exact=True)
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
        (attack_video_swin, dict(generator="gan"), "no generator that learns is called 'gan'"),
        (attack_video_swin, dict(generator="noise"), "no generator that learns is called 'noise'; there are dvdgan"),
        (attack_video_swin, dict(generator="dvdgan", size=50), "--size of generated clips must be"),
        (attack_video_swin, dict(student_steps=0), "--student-steps 0: it must be at least 1"),
        (attack_video_swin, dict(schedule="linear"), "no schedule is called 'linear'; there are cosine, steps"),
        (attack_video_swin, dict(optimizer="lion"), "no optimiser is called 'lion'"),
        (attack_video_swin, dict(student_lr=1e30), "a loss is not finite in iteration"),
        (conditional_gan_with_swin, dict(answers="label"), "--answers label: the generator needs to see"),
        (random_noise_with_swin, dict(val="nowhere"), "folder nowhere not found"),
    ],
)
def test_bad_constants_get_one_line(module, change, line, configure):
    constants = {attack_video_swin: ATTACK, conditional_gan_with_swin: CGAN}.get(module, SMALL)
    with pytest.raises(UserError, match=line) as caught:
        module.main(dataclasses.replace(configure(module, constants), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers", ["logits", "label"])
def test_maze_takes_other_surfaces(answers, configure):
    results = attack_video_swin.main(configure(attack_video_swin, ATTACK | dict(answers=answers, iterations=1)))
    assert results["answers"] == answers
