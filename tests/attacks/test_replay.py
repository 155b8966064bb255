"""The replay memory: bounded, fair, and back from its state."""

import torch

from extraction.attacks.replay import Replay


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
