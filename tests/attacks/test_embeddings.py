"""Codes of a frozen generator: clips drawn around them, and the search for those that a victim names."""

import numpy as np
import pytest
import torch

from extraction.attacks.embeddings import Codes, Sampling, code_size, find_codes, sample_clips
from extraction.data.images import Layer, Motion
from extraction.errors import BudgetExhausted
from extraction.generators.biggan import create_demo_biggan

KEYS = [bytes([k]) * 16 for k in range(12)]
MOTION = Motion(8, (Layer(),))


def test_a_clip_is_its_code_and_its_key_alone():
    generator, sampling = create_demo_biggan(), Sampling(MOTION, 0.1)
    codes = torch.randn(len(KEYS), code_size(generator, 1))
    clips = sample_clips(generator, codes, KEYS, sampling)
    assert clips.shape == (len(KEYS), 3, 8, 32, 32)
    assert 0 <= clips.min() <= clips.max() <= 1
    order = torch.randperm(len(KEYS))
    permuted = sample_clips(generator, codes[order], [KEYS[k] for k in order], sampling)
    torch.testing.assert_close(permuted, clips[order], rtol=0, atol=1e-4)
    other = sample_clips(generator, codes, KEYS[::-1], sampling)
    assert (other - clips).abs().amax((1, 2, 3, 4)).min() > 0.05
    assert (clips[:, :, 1:] - clips[:, :, :-1]).abs().amax((1, 3, 4)).min() > 1e-3


def test_codes_come_in_turn_and_keep_their_names():
    first, second, third = np.zeros((3, 4), np.float32) + np.arange(3, dtype=np.float32)[:, None]
    clips = Codes("g", ["a", "b", "c"], [[first, second], [], [third]], 3)
    assert [clips[k][1][0] for k in range(len(clips))] == [0, 1, 0, 2, 2, 2]
    assert len({ref.key for ref in clips.refs}) == 6
    assert [ref.key for ref in Codes("other", ["a"], [[first]], 1).refs] != [clips.refs[0].key]


class Oracle:
    """A victim of three classes that looks at the first two entries of a code; the third class it never names."""

    answers, num_classes, classes, query_budget = "probs", 3, ("near", "far", "never"), None

    def __init__(self, left: int = 10**9):
        self.left, self.kept, self.reserved = left, {}, set()

    @property
    def num_queries(self) -> int:
        return len(self.kept)

    def find(self, keys) -> dict:
        return {key: self.kept[key] for key in keys if key in self.kept}

    def reserve(self, keys) -> int:
        assert len(set(keys)) == len(keys)
        new = [key for key in keys if key not in self.kept and key not in self.reserved][: self.left]
        self.left -= len(new)
        self.reserved.update(new)
        return next((k for k, key in enumerate(keys) if key not in self.kept and key not in self.reserved), len(keys))

    def query(self, clips, keys):
        if len(clips):
            assert not self.find(keys)
            assert self.reserved.issuperset(keys)  # counted before the victim sees them
            self.kept |= dict(zip(keys, answer(clips), strict=True))
        return torch.stack([self.kept[key] for key in keys])


def answer(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([2.0 - 4.0 * codes[:, 0], 4.0 * codes[:, 0] - 14.0, -codes[:, 1].abs() - 4.0], 1).softmax(1)


def search(victim: Oracle, **changes):
    constants = dict(num_random=20, population=10, num_steps=6, step=0.5, confidence=0.9, codes_per_class=3, seed=0)
    return find_codes(
        victim, lambda codes, keys, sampling: codes, "g", 2, Sampling(MOTION), torch.device("cpu"), **constants | changes
    )


def test_the_search_climbs_counts_exactly_and_lists_what_it_did_not_reach():
    victim = Oracle()
    codes, report, exhausted = search(victim, num_steps=60)
    assert exhausted is False
    assert [entry["reached"] for entry in report] == [True, True, False]
    assert victim.num_queries == 20 + 10 * sum(entry["steps"] for entry in report)
    assert [entry["num_queries"] for entry in report] == [10 * entry["steps"] for entry in report]
    assert report[1]["steps"] > 1  # no random code is as far out as this class asks for
    assert report[2]["steps"] == 60
    assert [len(found) for found in codes] == [3, 3, 1]
    for label in (0, 1):
        for code in codes[label]:
            assert answer(torch.from_numpy(code)[None])[0, label] > 0.9
    assert report[2]["confidence"] < 0.9


def test_the_search_repeats_and_stops_at_the_budget():
    whole = search(Oracle())
    assert [entry["confidence"] for entry in whole[1]] == [entry["confidence"] for entry in search(Oracle())[1]]
    for left in (7, 20, 33):
        victim = Oracle(left)
        codes, report, exhausted = search(victim)
        assert victim.num_queries == left
        assert exhausted is True
        assert len(report) == 3
        assert all(codes)
    victim = Oracle(0)
    with pytest.raises(BudgetExhausted, match="no room for a single query"):
        search(victim)
    assert victim.num_queries == 0
