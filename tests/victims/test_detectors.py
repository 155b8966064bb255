"""Detectors: each against its published rule, and what they keep of an account."""

import numpy as np
import pytest
import torch
from scipy.stats import shapiro

from extraction.victims import detectors
from extraction.victims.detectors import (
    DETECTORS,
    Confidence,
    NearDuplicates,
    Prada,
    Quota,
    Stream,
    count_false_alarms,
    first_alarm,
    split_accounts,
    thumbnail,
)


def draw_stream(count: int, seed: int, num_classes: int = 4, spread: float = 30.0) -> Stream:
    """Thumbnails around one of each class, and answers that name it, more and less surely."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randint(60, 196, (num_classes, 3, 4, 8, 8), generator=torch.Generator().manual_seed(99)).float()
    classes = torch.randint(num_classes, (count,), generator=rng)
    pixels = centres[classes] + spread * torch.randn(count, 3, 4, 8, 8, generator=rng)
    logits = torch.randn(count, num_classes, generator=rng) + 6 * torch.eye(num_classes)[classes]
    return Stream(pixels.round().clamp(0, 255).byte(), logits.softmax(1))


def join(*streams: Stream) -> Stream:
    return Stream(torch.cat([s.thumbnails for s in streams]), torch.cat([s.probs for s in streams]))


def cut(stream: Stream, size: int) -> list[Stream]:
    parts = [field if field is None else field.split(size) for field in stream]
    return [Stream(parts[0][k], parts[1][k], parts[2] and parts[2][k]) for k in range(len(parts[0]))]


CONSTANTS = dict(
    quota=dict(limit=137),
    prada=dict(delta=0.9),
    near_duplicates=dict(radius=0.5, scales=[400.0, 0.5], hits=5),
    confidence=dict(normal=[9, 5, 1, 0, 0, 0, 0, 0, 0, 0, 0], delta=0.2, length=50),
)


def attack(seed: int = 5) -> Stream:
    """Clips once each, then slightly changed ones of them."""
    once = draw_stream(150, seed)
    changed = (once.thumbnails.int() + torch.randint(-2, 3, once.thumbnails.shape)).clamp(0, 255).byte()
    return join(once, once._replace(thumbnails=changed))


@pytest.mark.parametrize("name", DETECTORS)
def test_an_alarm_does_not_depend_on_how_queries_come_and_stays(name):
    torch.manual_seed(0)
    stream, found = attack(), []
    for size in (1, 7, 300):
        detector = DETECTORS[name].create(**CONSTANTS[name])
        found.append(torch.cat([detector.observe(part) for part in cut(stream, size)]))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    alarm = int(found[2].nonzero()[0])
    assert found[2][alarm:].all()
    assert first_alarm(DETECTORS[name].create(**CONSTANTS[name]), stream, batch_size=11) == alarm


def test_thumbnails_are_small_and_in_order():
    clips = torch.zeros(2, 3, 16, 48, 64)
    clips[0, 0, :4] = 0.8  # red for the first quarter
    clips[1, :, :, :, 32:] = 1.0  # white on the right
    found = thumbnail(clips)
    assert (found.dtype, found.shape) == (torch.uint8, (2, 3, 4, 8, 8))
    assert found[0, 0].flatten(1).unique(dim=1).flatten().tolist() == [204, 0, 0, 0]
    assert found[0, 1:].max() == 0
    assert found[1, 2, 2, 3].tolist() == [0] * 4 + [255] * 4


# --- quota ---------------------------------------------------------------------------------------------------------------


def test_the_quota_is_what_the_busiest_honest_account_makes():
    honest = [draw_stream(count, count) for count in (10, 30, 20)]
    constants = detectors.fit_quota(honest)
    assert [first_alarm(Quota(**constants), account) for account in honest] == [None, None, None]
    assert first_alarm(Quota(**constants), draw_stream(31, 0)) == 30


# --- PRADA ---------------------------------------------------------------------------------------------------------------


def follow_recipe(stream: Stream, delta: float) -> tuple[list[float], list[bool]]:
    """PRADA as its paper and its released agent have it, with lists that only grow: statistics, and alarms unlatched."""
    members: dict[int, list] = {}
    inner: dict[int, list] = {}
    thresholds: dict[int, float] = {}
    seen: dict[int, list] = {}
    statistics, alarms = [], []
    for number, (pixels, probs) in enumerate(zip(stream.thumbnails.double().numpy(), stream.probs, strict=True)):
        label = int(probs.argmax())
        if label not in members:
            members[label], inner[label], thresholds[label] = [pixels], [0.0], 0.0
        else:
            nearest = min(float(np.sqrt(((pixels - other) ** 2).sum())) for other in members[label])
            seen.setdefault(label, []).append(nearest)
            if nearest > thresholds[label]:
                members[label].append(pixels)
                inner[label].append(nearest)
                thresholds[label] = max(thresholds[label], float(np.mean(inner[label]) - np.std(inner[label])))
        alarm = False
        if number % 10 == 0:
            pool = np.array([d for distances in seen.values() if len(distances) >= 10 for d in distances])
            if len(pool):
                pool = pool[abs(pool - pool.mean()) < 3 * pool.std()]
            if len(pool) > 100:
                statistics.append(float(shapiro(pool).statistic))
                alarm = statistics[-1] < delta
        alarms.append(alarm)
    return statistics, alarms


@pytest.mark.parametrize("stream", [draw_stream(400, 1), attack()], ids=["honest", "attack"])
def test_prada_follows_the_published_recipe(stream):
    statistics, alarms = follow_recipe(stream, 0.9)
    detector = Prada(0.9)
    found = detector.observe(stream)
    assert detector.statistic == pytest.approx(min(statistics), abs=1e-5)
    assert found.tolist() == np.logical_or.accumulate(alarms).tolist()


def test_prada_finds_small_steps_and_leaves_clips_sent_once_alone():
    assert first_alarm(Prada(0.9), draw_stream(400, 1)) is None
    assert 150 <= (first_alarm(Prada(0.9), attack()) or 0) < 300


def test_pradas_threshold_raises_no_alarm_for_those_it_is_fitted_to():
    honest = [attack(seed) for seed in (5, 6)] + [draw_stream(300, 7)]  # some of whom look like an attack
    constants = detectors.fit_prada(honest)
    assert constants["delta"] < 0.9
    assert [first_alarm(Prada(**constants), account) for account in honest] == [None, None, None]
    assert detectors.fit_prada([draw_stream(300, 7)]) == dict(delta=0.9)


# --- near-duplicates -----------------------------------------------------------------------------------------------------


def test_near_duplicates_counts_pairs_of_different_uploads():
    torch.manual_seed(0)
    base = draw_stream(20, 3)
    stream = join(base, base)
    uploads = torch.arange(20).repeat(2)
    rules = dict(radius=0.01, scales=[400.0, 0.5], hits=3)
    assert first_alarm(NearDuplicates(**rules), stream) == 22  # the third repeat
    assert first_alarm(NearDuplicates(**rules), stream._replace(uploads=uploads)) is None
    uploads[25:] += 20
    assert first_alarm(NearDuplicates(**rules), stream._replace(uploads=uploads)) == 27


def test_near_duplicates_finds_the_nearest_that_comparing_all_finds():
    stream = draw_stream(200, 4)._replace(uploads=torch.arange(200) // 4)
    detector = NearDuplicates(0.1, [400.0, 0.5])
    found = detector.nearest(stream)
    features = torch.from_numpy(detector._project(stream)).double()
    for number in range(1, 200):
        others = [other for other in range(number) if stream.uploads[other] != stream.uploads[number]]
        if others:
            expected = (features[others] - features[number]).norm(dim=1).min()
            assert found[number].item() == pytest.approx(expected.item(), rel=1e-3)
    assert found[:4].isinf().all()


def test_the_radius_is_that_of_honest_queries():
    honest = [draw_stream(200, seed) for seed in range(4)]
    constants = detectors.fit_near_duplicates(honest, rate=0.01)
    found = torch.cat([NearDuplicates(**constants).nearest(account) for account in honest])
    assert (found <= constants["radius"]).sum() == pytest.approx(8, abs=1)
    assert first_alarm(NearDuplicates(**constants), attack()) == pytest.approx(150 + 49, abs=8)
    assert first_alarm(NearDuplicates(**constants), draw_stream(300, 9)) is None


# --- confidence ----------------------------------------------------------------------------------------------------------


def test_confidence_levels_are_half_decades_of_doubt():
    doubts = torch.tensor([0.5, 0.3, 0.05, 0.02, 2e-4, 1e-7], dtype=torch.float64)
    probs = torch.stack([1 - doubts, 0.75 * doubts, 0.25 * doubts], 1)
    assert detectors.confidence_levels(probs).tolist() == [0, 1, 2, 3, 7, 10]


def test_hodas_rule_by_hand():
    normal = [0, 0, 1, 5, 9, 5, 1, 0, 0, 0, 0]
    counts = np.array(
        [[0, 0, 2, 10, 20, 15, 3, 0, 0, 0, 0], [0, 0, 20, 20, 8, 2, 0, 0, 0, 0, 0], [0, 0, 2, 10, 20, 15, 3, 0, 0, 0, 0]]
    )
    levels = [np.repeat(np.arange(11), row) for row in counts]
    doubt = torch.from_numpy(10 ** -((np.concatenate(levels) + 0.5) / 2))
    stream = Stream(torch.zeros(150, 3, 4, 8, 8, dtype=torch.uint8), torch.stack([1 - doubt, doubt], 1))
    distances = [1 - np.corrcoef(row, normal)[0, 1] for row in counts]
    assert distances[0] < 0.1 < distances[1]
    assert first_alarm(Confidence(normal, delta=0.1, length=50), stream) == 99  # at the end of the second fifty
    assert first_alarm(Confidence(normal, delta=distances[1] + 1e-9, length=50), stream) is None
    assert first_alarm(Confidence(normal, delta=distances[1] - 1e-9, length=50), stream) == 99


def test_the_histogram_is_the_mean_and_delta_the_greatest_honest_distance():
    honest = [draw_stream(250, seed) for seed in range(4)]
    constants = detectors.fit_confidence(honest, length=100)
    assert sum(constants["normal"]) == pytest.approx(100)
    assert all(first_alarm(Confidence(**constants), account) is None for account in honest)
    closer = constants | dict(delta=constants["delta"] - 1e-9)
    assert sum(first_alarm(Confidence(**closer), account) is not None for account in honest) == 1
    sure = draw_stream(100, 9)
    assert first_alarm(Confidence(**constants), sure._replace(probs=(20 * sure.probs).softmax(1))) == 99


def test_an_even_histogram_is_like_no_other():
    assert detectors.pearson_distance(torch.ones(11), torch.arange(11)) == 1.0


def test_too_few_honest_queries_get_one_line(error_line):
    short = [draw_stream(20, 0)]
    assert "no honest account has 100 queries" in error_line(detectors.fit_confidence, short)
    assert "more than 100 distances" in error_line(detectors.fit_prada, short)
    assert "two queries of different uploads" in error_line(detectors.fit_near_duplicates, [draw_stream(1, 0)])


# --- accounts, and what is kept of them ------------------------------------------------------------------------------------


def test_constants_and_false_alarms_come_from_different_accounts():
    accounts = [draw_stream(20, seed) for seed in range(5)]
    to_fit, others = split_accounts(accounts)
    assert [id(a) for a in to_fit] == [id(a) for a in accounts[::2]]
    assert [id(a) for a in others] == [id(a) for a in accounts[1::2]]


def test_false_alarms_have_a_bound():
    honest = [draw_stream(count, count) for count in (5, 15, 5, 5)]
    found = count_false_alarms(lambda: Quota(10), honest)
    assert found[:2] == (1, 4)
    assert found.upper == pytest.approx(0.7514, abs=1e-4)  # sum of binomials: P(at most 1 of 4) = 0.05
    assert sum((1, 4)[k] * found.upper**k * (1 - found.upper) ** (4 - k) for k in (0, 1)) == pytest.approx(0.05)
    assert count_false_alarms(lambda: Quota(3), honest).upper == 1.0


def test_what_is_kept_of_an_account_has_a_bound():
    stream = draw_stream(600, 1, num_classes=2)
    near, prada = NearDuplicates(-1.0, [400.0, 0.5], memory=100), Prada(-1.0, memory=50)
    unbounded = NearDuplicates(-1.0, [400.0, 0.5])
    found, whole = near.nearest(stream), unbounded.nearest(stream)
    prada.observe(stream)
    assert len(near._kept.rows) == 100
    assert all(len(each.rows) <= 50 for each in prada._sets.values())
    assert torch.equal(found[:101], whole[:101])
    assert (found >= whole - 1e-4).all()
    assert (found > whole + 1e-4).any()
    features = torch.from_numpy(near._project(stream))
    expected = (features[499:599] - features[599]).norm(dim=1).min()  # of the latest 100
    assert found[599].item() == pytest.approx(expected.item(), rel=1e-3)
