"""Detectors of a single run: fitted to accounts of honest users who send held-out clips, for want of real ones.

`audit.py` has accounts of more kinds, of longer footage.
"""

from typing import Any

import torch
from torch import Tensor

from extraction.data.clips import Clips, load_batches
from extraction.victims.defences import parse_detector
from extraction.victims.detectors import DETECTORS, Stream, count_false_alarms, split_accounts, thumbnail


def fit_detector(after: str, clips: Clips, probs: Tensor) -> tuple[str, dict[str, Any]]:
    """A detector's name and constants, fitted to accounts that send held-out clips in random order, of a thousand at most.

    Every second video is in these accounts; those of the others count the false alarms that are printed. A histogram of 100
    takes more clips than there may be, so that for `confidence` they are drawn again and again, as HODA's are.
    """
    name, constants = parse_detector(after)
    if constants is not None:
        return name, constants
    chosen = range(0, len(clips), max(1, len(clips) // 1000))
    loaded = list(load_batches(clips, [chosen[i : i + 16] for i in range(0, len(chosen), 16)], num_workers=0))
    kept = [batch for batch in loaded if batch.indices]
    thumbnails = torch.cat([thumbnail(batch.clips.permute(0, 4, 1, 2, 3) / 255.0) for batch in kept])
    places = torch.tensor([i for batch in kept for i in batch.indices])
    videos = torch.tensor([clips.refs[i].video for batch in kept for i in batch.indices])
    order = torch.Generator().manual_seed(0)
    accounts = []
    for number in range(20):
        own = (videos % 2 == number % 2).nonzero()[:, 0]
        again = torch.randint(len(own), (5000,), generator=order) if name == "confidence" else None
        own = own[torch.randperm(len(own), generator=order) if again is None else again]
        accounts.append(Stream(thumbnails[own], probs[places[own]], videos[own]))
    to_fit, others = split_accounts(accounts)
    constants = DETECTORS[name].fit(to_fit)
    alarms = count_false_alarms(lambda: DETECTORS[name].create(**constants), others)
    print(f"{name}: {alarms.alarmed} false alarms in {alarms.accounts} accounts of {len(others[0].probs)} queries")
    return name, constants
