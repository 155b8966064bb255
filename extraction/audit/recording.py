"""What a victim's owner records once: full-precision logits and thumbnails of the clips of a transfer set or of honest users.

Every answer type and every defence that is a function of these is a replay of the recording, so that a clip is computed once,
however many answers an audit looks at.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from extraction.data.clips import load_batches
from extraction.data.queries import QuerySet
from extraction.errors import UserError
from extraction.victims.detectors import thumbnail
from extraction.victims.query_interface import Victim
from extraction.victims.wire import send
from extraction.weights import read_state, save_weights

CHUNK = 256  # clips in a file: what a killed process has to compute again at most

# The clips, float (n, 3, T, H, W) in [0, 1], of some places of a list, with the places that could be decoded.
Loader = Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Tensor]]]


class Recording(NamedTuple):
    """A victim's answers to a list of N clips."""

    logits: Tensor  # float32 (N, num_classes); zeros for what could not be decoded
    thumbnails: Tensor  # uint8 (N, 3, 4, 8, 8), of the clips as they arrived
    decoded: Tensor  # bool (N,)

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(1)

    def take(self, places: Sequence[int]) -> "Recording":
        rows = torch.tensor(places, dtype=torch.int64)
        return Recording(*(part[rows] for part in self))


def record(folder: str | Path, name: str, keys: Sequence[bytes], load: Loader, victim: Victim, desc: str) -> Recording:
    """Ask `victim`, opened with logits, about the clips that `keys` name and `load` gives; kept below `folder`.

    What is kept is not asked again: files of `CHUNK` clips, named by the victim, its wire and the keys. The victim counts each
    clip that it answers. Raises UserError when no clip can be decoded, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=len(keys), desc=desc, unit="clip", dynamic_ncols=True) as bar:
        for start in range(0, len(keys), CHUNK):
            places = range(start, min(start + CHUNK, len(keys)))
            named = [victim.fingerprint, victim.wire, *(keys[place].hex() for place in places)]
            digest = hashlib.blake2b("|".join(named).encode(), digest_size=6).hexdigest()
            path = folder / f"{name}-{start:07d}-{digest}.safetensors"
            part = _read(path, len(places), victim.num_classes)
            if part is None:
                part = _ask(places, load, victim)
                save_weights(path, part._asdict(), dict(victim=victim.name))
            parts.append(part)
            bar.update(len(places))
    recording = Recording(*(torch.cat(list(part)) for part in zip(*parts, strict=True)))
    if not recording.decoded.any():
        raise UserError(f"{name}: none of its {len(keys)} clips can be decoded")
    return recording


def _ask(places: Sequence[int], load: Loader, victim: Victim) -> Recording:
    count, first = len(places), places[0]
    logits, decoded = torch.zeros(count, victim.num_classes), torch.zeros(count, dtype=torch.bool)
    thumbnails = torch.zeros(count, 3, 4, 8, 8, dtype=torch.uint8)
    for found, clips in load(places):
        rows = torch.tensor([place - first for place in found], dtype=torch.int64)
        logits[rows] = victim.query(clips).float().cpu()
        thumbnails[rows], decoded[rows] = thumbnail(send(clips, victim.wire)), True
    return Recording(logits, thumbnails, decoded)


def _read(path: Path, count: int, num_classes: int) -> Recording | None:
    """A kept file; None for one that is missing or damaged, which is asked again."""
    try:
        part = Recording(**read_state(path))
    except (UserError, TypeError):
        return None
    return part if part.logits.shape == (count, num_classes) and len(part.decoded) == count else None


class Views:
    """The views of a query set, numbered: view n of clip i is number n * len(clips) + i. What a thief may send."""

    def __init__(self, queries: QuerySet, batch_size: int, num_workers: int, device: torch.device):
        assert queries.views_per_clip is not None
        self.queries, self.num_clips, self.views_per_clip = queries, len(queries.clips), queries.views_per_clip
        self.batch_size, self.num_workers, self.device = batch_size, num_workers, device
        queries.keep_views(1_000_000)  # every student comes back to them

    def __len__(self) -> int:
        return self.num_clips * self.views_per_clip

    def key(self, view: int) -> bytes:
        number, clip = divmod(view, self.num_clips)
        return self.queries.keys([clip], number)[0]

    def label(self, view: int) -> int:
        return self.queries.clips.refs[view % self.num_clips].label

    def load(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """The views of each batch that could be decoded, and their clips, float (n, 3, T, H, W) on the device."""
        wanted = [[view % self.num_clips for view in batch] for batch in batches]
        loaded = load_batches(self.queries.clips, wanted, self.num_workers, pin_memory=self.device.type == "cuda")
        for batch, clips, found in zip(batches, wanted, loaded, strict=True):
            missing = len(clips) - len(found.indices)
            there = set(found.indices)
            views = list(batch) if not missing else [v for v, i in zip(batch, clips, strict=True) if i in there]
            if views:
                pixels = found.clips.to(self.device, non_blocking=True)
                yield views, self.queries.views(pixels, [self.key(view) for view in views])

    def loader(self, views: Sequence[int]) -> Loader:
        """What `record` takes, for a list of views."""
        place = {view: k for k, view in enumerate(views)}

        def load(places: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
            wanted = [views[k] for k in places]
            batches = [wanted[i : i + self.batch_size] for i in range(0, len(wanted), self.batch_size)]
            for found, clips in self.load(batches):
                yield [place[view] for view in found], clips

        return load
