"""DAWN's verification: a clone is claimed, and no model that was trained without the victim."""

import pytest
import torch
from scipy.stats import binom

from extraction.victims import ownership
from extraction.victims.defences import draw, read_record, watermark
from extraction.victims.ownership import count_false_claims, fit_conferred, verify, verify_conferred

NUM_CLASSES, NUM_FEATURES = 12, 10


def draw_data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, so that models trained apart make the same mistakes."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(NUM_CLASSES, (count,), generator=rng)
    return centres[labels] + 1.3 * torch.randn(count, NUM_FEATURES, generator=rng), labels


def train(inputs: torch.Tensor, targets: torch.Tensor, seed: int, hidden: int = 0, steps: int = 60) -> torch.nn.Module:
    torch.manual_seed(seed)
    below = [torch.nn.Linear(NUM_FEATURES, hidden), torch.nn.ReLU()] if hidden else []
    net = torch.nn.Sequential(*below, torch.nn.Linear(hidden or NUM_FEATURES, NUM_CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def theft() -> dict:
    """A victim, what a thief asks it with a watermark in the answers, and 20 models trained on data of their own."""
    victim = train(*draw_data(2000, 1), seed=0)
    queries = draw_data(1500, 2)[0]
    with torch.no_grad():
        probs = victim(queries).softmax(1)
        answers, chosen = watermark(probs, draw(b"key", [b"%d" % k for k in range(len(queries))]), 0.04)
    nulls = [train(*draw_data(600, 100 + k), seed=k)(queries).argmax(1) for k in range(20)]
    clone = train(queries, answers, seed=50, hidden=300, steps=150)(queries).argmax(1)
    return dict(nulls=nulls, clone=clone, answers=answers, probs=probs, chosen=chosen)


def test_a_clone_is_claimed_and_no_null_model_is(theft):
    chosen = theft["chosen"]
    nulls, labels = [null[chosen] for null in theft["nulls"]], theft["answers"][chosen].argmax(1)
    claim = verify(theft["clone"][chosen], nulls, labels)
    assert claim.repeated > 0.5
    assert claim.null < 0.1
    assert claim.p < 1e-6
    assert count_false_claims(nulls, labels) == 0


def test_a_chance_that_is_assumed_claims_innocent_models(theft):
    """Where the label is the second guess of an unsure victim, innocent models share it, more often than 1 in 11."""
    unsure = (theft["probs"].amax(1) < 0.6).nonzero()[:60, 0]
    nulls, second = [null[unsure] for null in theft["nulls"]], theft["probs"][unsure].topk(2).indices[:, 1]
    assumed = [binom.sf(int((null == second).sum()) - 1, len(second), 1 / (NUM_CLASSES - 1)) for null in nulls]
    assert sum(p < 1e-3 for p in assumed) >= 10
    assert count_false_claims(nulls, second) == 0
    assert count_false_claims(nulls, second, level=0.05) <= 2


def test_the_chance_is_what_null_models_repeat_and_p_its_binomial_tail():
    labels = torch.zeros(20, dtype=torch.int64)
    nulls = [torch.tensor([0] * hits + [1] * (20 - hits)) for hits in (2, 6)]
    suspect = torch.tensor([0] * 15 + [1] * 5)
    claim = verify(suspect, nulls, labels)
    assert claim.repeated == 0.75
    assert binom.cdf(8, 40, claim.null) == pytest.approx(0.05)  # more than the 6 of 20 of one of them
    assert claim.p == pytest.approx(binom.sf(14, 20, claim.null))


def test_what_cannot_be_tested_gets_one_line(error_line, tmp_path):
    labels = torch.zeros(3, dtype=torch.int64)
    assert "train one at least without" in error_line(verify, labels, [], labels)
    assert "no answer was chosen" in error_line(verify, labels[:0], [labels[:0]], labels[:0])
    assert "not found" in error_line(ownership.read_triggers, tmp_path / "none.sqlite")


def test_a_damaged_record_of_a_defence_gets_one_line(error_line):
    assert "what a defence remembers is damaged" in error_line(read_record, b"noise")
    assert "what a defence remembers is damaged" in error_line(read_record, None)


@pytest.fixture(scope="module")
def models() -> dict:
    """A victim's top classes on held-out inputs, those of 4 clones and of 12 innocent models, and which half is fitted to."""
    victim = train(*draw_data(300, 1), seed=0, hidden=30, steps=150)  # it has mistakes of its own
    queries, held_out = draw_data(3000, 2)[0], draw_data(2000, 3)[0]

    @torch.no_grad()
    def tell(model, inputs=held_out):
        return model(inputs).argmax(1)

    clones = [tell(train(queries, tell(victim, queries), seed=10 + k, hidden=30, steps=150)) for k in range(4)]
    innocent = [tell(train(*draw_data(300, 20 + k), seed=20 + k, hidden=30, steps=150)) for k in range(12)]
    return dict(victim=tell(victim), clones=clones, innocent=innocent, to_fit=torch.arange(2000) % 2 == 0)


def test_conferred_clips_tell_clones_from_innocent_models_that_they_were_not_chosen_by(models):
    victim, (clones, suspects), (nulls, others) = (
        models["victim"], (models["clones"][:2], models["clones"][2:]), (models["innocent"][:4], models["innocent"][4:]),
    )  # fmt: skip
    conferred = fit_conferred(victim, clones, nulls, models["to_fit"])
    assert len(conferred.places) >= 20
    assert not models["to_fit"][conferred.places].any()
    assert all(verify_conferred(suspect, victim, conferred).p < 1e-3 for suspect in suspects)
    claims = [verify_conferred(other, victim, conferred) for other in others]
    assert sum(claim.p < 1e-3 for claim in claims) == 0
    # Chosen by them an innocent model agrees nowhere; what it repeats elsewhere is measured, and bounds most of the others.
    assert verify_conferred(nulls[0], victim, conferred).repeated == 0.0
    assert 0 < sum(claim.repeated for claim in claims) / len(claims) < conferred.null


def test_what_is_measured_of_innocent_models_is_not_where_suspects_are_tested(models):
    victim, clones, nulls, to_fit = models["victim"], models["clones"][:2], models["innocent"][:4], models["to_fit"]
    before = fit_conferred(victim, clones, nulls, to_fit)
    changed = [torch.where(to_fit, null, -1) for null in nulls]  # nothing is known of them in the other half
    after = fit_conferred(victim, clones, changed, to_fit)
    assert after.null == before.null
    assert len(after.places) > len(before.places)


def test_conferred_clips_want_models_to_choose_by(models, error_line):
    victim, clones, nulls, to_fit = models["victim"], models["clones"], models["innocent"], models["to_fit"]
    assert "a clone at least and two models" in error_line(fit_conferred, victim, [], nulls, to_fit)
    assert "a clone at least and two models" in error_line(fit_conferred, victim, clones, nulls[:1], to_fit)
    assert error_line(fit_conferred, victim, clones, [victim, victim], to_fit).startswith("no clip is conferred")
