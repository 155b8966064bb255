"""The training recipe: each part against its formula, and whole runs of it that resume to the same bits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extraction.attacks import distill
from extraction.attacks.distill import AnsweredBatch, Training
from extraction.attacks.losses import (
    choose_matching,
    cross_entropy,
    kl_divergence,
    match_logits,
    soft_kl_divergence,
)
from extraction.attacks.recipe import AveragedWeights, crop_and_erase, mix, one_cycle, spread_labels
from extraction.runs import Run
from extraction.students import load_student
from extraction.weights import read_state
from grey_box import labels_only, swin_to_r21_kd, swin_to_r21_prada

ALL = dict(schedule="one_cycle", ema=0.9, student_crop=0.2, student_erase=0.2, mixup=0.4)
WITHOUT = dict(ema=None, student_crop=0.0, temperature=1.0)  # of what a demo has on its own


# --- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "peak"), [(100, 5), (40, 2), (2, 0)])
def test_one_cycle_rises_for_a_twentieth_and_ends_near_zero(steps, peak):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([dict(params=weights[:1], lr=2.0), dict(params=weights[1:], lr=1.0)])
    schedule, rates = one_cycle(optimizer, steps), []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    body = [rate for _, rate in rates]
    assert body.index(max(body)) == peak
    assert body[: peak + 1] == sorted(body[: peak + 1])
    assert body[peak:] == sorted(body[peak:], reverse=True)
    assert steps < 40 or max(body) > 0.99
    assert [head for head, _ in rates] == pytest.approx([2 * rate for rate in body])
    assert optimizer.param_groups[1]["lr"] < 1e-4
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_averaged_weights_follow_their_recursion_and_give_way_bit_for_bit():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    average, expected = AveragedWeights(net, 0.5), {name: value.clone() for name, value in net.state_dict().items()}
    for step, decay in enumerate([0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 7 / 16, 8 / 17, 0.5, 0.5]):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.add_(step + 1)
        average.update(step)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in average.state.items():
        torch.testing.assert_close(value, expected[name] if value.is_floating_point() else net.state_dict()[name])
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with average.in_place():
        assert all(torch.equal(value, average.state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


def draws(*values: float) -> np.ndarray:
    return np.array([values])


def test_a_crop_is_a_part_of_the_frame_at_its_size():
    """A frame whose value is the place: after a crop to the side s about c each value is c + s * place."""
    places = (torch.arange(16) + 0.5) / 8 - 1
    across = places.expand(1, 1, 2, 16, 16)
    down = across.transpose(3, 4)
    uniform = draws(0.8, 0.75, 0.25, 0, 0, 0, 0)  # side 1 - 0.8 * 0.5, a quarter right of and above the middle
    side, right, up = 0.6, 0.4 * 0.5, -0.4 * 0.5
    shown = crop_and_erase(torch.cat([across, down], 1), uniform, 0.5, 0.0)[0]
    torch.testing.assert_close(shown[0, 1], (right + side * places).expand(16, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(shown[1, 0], (up + side * places)[:, None].expand(16, 16), atol=1e-5, rtol=0)
    whole = crop_and_erase(across.clone(), draws(0, 0.9, 0.1, 0, 0, 0, 0), 0.5, 0.0)
    torch.testing.assert_close(whole, across, atol=1e-5, rtol=0)


def test_a_tube_is_erased_from_all_frames():
    clips = torch.rand(1, 3, 4, 20, 20)
    # A quarter of half the frame; twice as high as wide: 0.5 x 0.25 of it, in the lower left corner.
    shown = crop_and_erase(clips.clone(), draws(0, 0, 0, 0.25, 1.0, 1.0, 0.0), 0.0, 0.5)
    box = torch.zeros(20, 20, dtype=torch.bool)
    box[10:, :5] = True
    assert torch.equal(shown[..., ~box], clips[..., ~box])
    torch.testing.assert_close(shown[..., box], clips.mean((2, 3, 4))[:, :, None, None].expand(1, 3, 4, 50))


def test_no_draw_erases_more_than_it_may_or_leaves_the_frame(random_clips):
    uniform = np.random.default_rng(0).random((200, 7))
    clips = random_clips(1, 3, 2, 24, 24).expand(200, -1, -1, -1, -1)
    shown = crop_and_erase(clips, uniform, 0.0, 0.3)
    erased = (shown != clips).any(1).float().mean((1, 2, 3))
    assert 0.2 < erased.max() <= 0.3 + 2 / 24
    assert 0 <= crop_and_erase(clips, uniform, 0.9, 0.3).min() <= crop_and_erase(clips, uniform, 0.9, 0.3).max() <= 1


def test_mixed_labels_share_the_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5), torch.tensor([2, -1, 4])
    partners, shares = torch.tensor([2, 0, 1]), torch.tensor([0.7, 0.4, 0.9])
    mixed = mix(spread_labels(labels, 5), partners, shares)
    each = -logits.log_softmax(1)
    expected = (0.7 * each[0, 2] + 0.3 * each[0, 4]) + 0.6 * each[1, 2] + 0.9 * each[2, 4]
    torch.testing.assert_close(cross_entropy(logits, mixed), expected / 3)
    torch.testing.assert_close(cross_entropy(logits, spread_labels(labels, 5)), cross_entropy(logits, labels))
    clips = torch.rand(3, 3, 2, 4, 4)
    torch.testing.assert_close(mix(clips, partners, shares)[1], 0.4 * clips[1] + 0.6 * clips[0])


# --- matching ----------------------------------------------------------------------------------------------------------


def test_matching_is_its_formula_and_finite_for_answers_with_zeros():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6), (3 * torch.randn(4, 6)).softmax(1)
    softened, student = (targets.log() / 4).softmax(1), (logits / 4).softmax(1)
    by_hand = 16 * (softened * (softened.log() - student.log())).sum(1).mean()
    torch.testing.assert_close(choose_matching("kl", 4.0, "probs")(logits, targets), by_hand)
    logs = targets.log()
    by_hand = ((logits - logits.mean(1)[:, None]) - (logs - logs.mean(1)[:, None])).pow(2).sum() / (2 * 4 * 6)
    torch.testing.assert_close(choose_matching("logits", 1.0, "probs")(logits, targets), by_hand)
    assert match_logits(logits, logits.softmax(1)) < 1e-10
    # At high temperatures the one becomes the other.
    torch.testing.assert_close(
        soft_kl_divergence(logits.double(), targets.double(), 1e4), match_logits(logits, targets).double(), rtol=1e-3, atol=0
    )
    rounded = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.005, 0.995, 0.0]])
    for loss in (choose_matching("logits", 1.0, "probs", 2), choose_matching("kl", 4.0, "probs", 2)):
        assert torch.isfinite(loss(torch.zeros(1, 3), rounded[0]))
        torch.testing.assert_close(loss(torch.zeros(1, 3), rounded[0]), loss(torch.zeros(1, 3), rounded[0].clamp(min=0.005)))
    assert choose_matching("kl", 1.0, "label") is choose_matching("kl", 4.0, "label") is kl_divergence


def test_the_victims_own_logits_are_not_clamped():
    logits = torch.tensor([[30.0, 0.0, -20.0]])
    loss = choose_matching("logits", 1.0, "logits")
    assert loss(logits, logits.softmax(1)) < 1e-6
    assert choose_matching("logits", 1.0, "probs")(logits, logits.softmax(1)) > 1


def test_what_cannot_be_matched_gets_one_line(error_line):
    assert "no probabilities" in error_line(choose_matching, "logits", 1.0, "label")


# --- whole runs --------------------------------------------------------------------------------------------------------


def configure(script, demo_set: Path, out_dir: Path, **changes):
    """A script's demo on a handful of clips: 36 labelled, 24 held out."""
    aux = dict(aux=(str(demo_set / "unrelated_b"),)) if hasattr(script.Config, "aux") else {}
    constants = script.DEMO | aux | dict(
        demo=False, in_domain=str(demo_set / "train_5per"), val=str(demo_set / "val"), epochs=2, num_workers=0,
        out_dir=str(out_dir),
    )  # fmt: skip
    return script.Config(**constants | changes)


def equal(first: Path, second: Path) -> bool:
    one, other = read_state(first), read_state(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(demo_set, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the results of a run with the whole recipe."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, swin_to_r21_kd.main(configure(swin_to_r21_kd, demo_set, folder, temperature=4.0, **ALL))


def test_the_average_is_scored_and_saved_beside_the_student(whole, demo_set):
    folder, results = whole
    assert {"top1_ema", "top5_ema", "agreement_at_1_ema", "agreement_at_5_ema"} <= results["history"][0].keys()
    assert results["top1_ema"] == results["history"][-1]["top1_ema"]
    assert not equal(folder / "student.safetensors", folder / "student_ema.safetensors")
    for name in ("student", "student_ema"):
        student, about = load_student("r2plus1d_tiny", folder / f"{name}.safetensors")
        assert about["num_queries"] == results["num_queries"] == 2 * 52  # the recipe asks nothing
        assert student.num_classes == 12


def test_the_recipe_resumes_to_the_same_bits_from_any_step(whole, demo_set, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def save_then_crash(self, state, real=Run.save_state):
        real(self, state)
        raise Crash

    config = configure(swin_to_r21_kd, demo_set, tmp_path, temperature=4.0, **ALL)
    monkeypatch.setattr(Run, "save_state", save_then_crash)
    monkeypatch.setattr(Run, "checkpoint_due", lambda self: True)
    for _ in range(2 * 4):  # 52 clips are four batches an epoch
        with pytest.raises(Crash):
            swin_to_r21_kd.main(config)
    results = swin_to_r21_kd.main(config)
    for name in ("student.safetensors", "student_ema.safetensors"):
        assert equal(tmp_path / name, whole[0] / name)
    assert (results["history"], results["num_queries"]) == (whole[1]["history"], whole[1]["num_queries"])


@pytest.mark.slow  # their formulas are above, and all of them together in one run
@pytest.mark.parametrize("name", [*ALL, "matching", "temperature"])
def test_each_option_alone_makes_another_student(name, demo_set, tmp_path):
    """But the average, which changes nothing of the student it is beside."""
    for folder, options in (("with", {name: (ALL | dict(matching="logits", temperature=4.0))[name]}), ("without", {})):
        config = configure(swin_to_r21_kd, demo_set, tmp_path / folder, epochs=1, **(WITHOUT | options))
        swin_to_r21_kd.main(config)
    same = equal(tmp_path / "with" / "student.safetensors", tmp_path / "without" / "student.safetensors")
    assert same == (name == "ema")


@pytest.mark.slow
def test_the_baseline_without_a_victim_takes_the_recipe_too(demo_set, tmp_path):
    results = labels_only.main(configure(labels_only, demo_set, tmp_path, epochs=1, **ALL))
    assert (results["num_queries"], 0 <= results["top1_ema"] <= 1) == (0, True)


@pytest.mark.slow
def test_crafted_clips_are_made_of_what_was_sent(demo_set, tmp_path, monkeypatch):
    seen, shown = [], []
    create = swin_to_r21_prada.create_crafter

    def watch(*given):
        craft = create(*given)
        return lambda student, batch: seen.append(batch.clips.clone()) or craft(student, batch)

    def show(self, clips, real=swin_to_r21_prada.Training.forward):
        shown.append(clips.clone())
        return real(self, clips)

    monkeypatch.setattr(swin_to_r21_prada, "create_crafter", watch)
    monkeypatch.setattr(swin_to_r21_prada.Training, "forward", show)
    found = []
    for name, options in (("plain", {}), ("varied", dict(student_crop=0.5))):
        config = configure(swin_to_r21_prada, demo_set, tmp_path / name, epochs=1, aux=(), head_lr=0.0, body_lr=0.0, **options)
        found.append(swin_to_r21_prada.main(config)["num_queries"])
    assert found[0] == found[1]
    half = len(seen) // 2
    assert torch.equal(seen[0], seen[half])
    assert shown[0].shape == shown[half].shape
    assert not torch.equal(shown[0], shown[half])


def test_matching_of_labels_ends_before_a_query(demo_set, tmp_path, error_line):
    config = configure(swin_to_r21_kd, demo_set, tmp_path, answers="label", matching="logits")
    assert error_line(swin_to_r21_kd.main, config).startswith("--answers label")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_every_script_that_has_the_recipe_follows_it():
    root = Path(__file__).parents[2]
    scripts = [path for folder in ("grey_box", "black_box") for path in (root / folder).glob("*.py")]
    training = [path for path in scripts if "Training(" in path.read_text()]
    assert len(training) == 18
    for path in training:
        text = path.read_text()
        assert ("**config.recipe" in text, "training.vary" in text) == (True, True), path
        assert ("choose_matching(" in text) == ("QueryOptions" in text), path


def test_of_several_processes_each_shows_its_share_of_one_draw(monkeypatch):
    training = SimpleNamespace(crop=0.3, erase=0.3, mixup=None, queries=SimpleNamespace(seed=5))
    clips = torch.rand(7, 3, 2, 16, 16)

    def vary(rank: int, own: slice, counts: list[int], number: int = 3) -> torch.Tensor:
        monkeypatch.setattr(distill.distributed, "rank", lambda: rank)
        empty = torch.empty(0)
        return Training.vary(training, AnsweredBatch(number, [], clips[own], empty, empty, counts, False)).clips

    whole = vary(0, slice(0, 7), [7])
    assert torch.equal(whole, vary(0, slice(0, 7), [7]))
    assert torch.equal(torch.cat([vary(0, slice(0, 3), [3, 4]), vary(1, slice(3, 7), [3, 4])]), whole)
    assert not torch.equal(vary(0, slice(0, 7), [7], number=4), whole)
