"""The query set: the clips to send to a victim, in the augmented views in which they are sent."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from extraction.data.augment import create_views, view_key
from extraction.data.cache import KeptItems, Source, name_item, open_cache


class Ref(Protocol):
    """Names one clip of a dataset: `ClipRef`, `ImageRef`, `CodeRef`."""

    @property
    def path(self) -> Path: ...
    @property
    def key(self) -> str: ...  # of its content, for the ledger
    @property
    def label(self) -> int: ...  # -1 without one


class ClipDataset(Protocol):
    """What can be distilled from: `Clips` of videos, `Images` that are moved, `Codes` of a generator.

    Item i is (i, what `QuerySet.make_views` makes a clip of), or (i, the `Broken` file that it can't be had from).
    """

    @property
    def refs(self) -> Sequence[Ref]: ...
    @property
    def broken(self) -> list[tuple[Path, str]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[int, Any]: ...


class KeptViews:
    """Something of each view of a query set, of one shape, kept on disk by the view's key."""

    def __init__(self, items: KeptItems, keys: Sequence[bytes]):
        self.items, self.places = items, {key: place for place, key in enumerate(keys)}

    def read(self, keys: Sequence[bytes]) -> tuple[Tensor, list[bool]]:
        """What is kept of views, float32 (B, ...), and which of them are; the other rows hold nothing."""
        rows = torch.empty(len(keys), *self.items.shape)
        return rows, [self.items.read(self.places[key], row.numpy()) for key, row in zip(keys, rows, strict=True)]

    def write(self, keys: Sequence[bytes], rows: Tensor) -> None:
        for key, row in zip(keys, rows, strict=True):
            self.items.write(self.places[key], self.items.name(self.places[key]), row.numpy())


class QuerySet:
    """Clips and the views in which they are sent: view n of a clip is the same pixels whenever it is shown.

    `augmentation` says how views differ, `make_views(loaded, keys, augmentation)` makes them on the device. With
    `views_per_clip` the views of a clip come round again, else every epoch has a new one.
    """

    def __init__(
        self,
        clips: ClipDataset,
        augmentation: NamedTuple,
        views_per_clip: int | None = None,
        seed: int = 0,
        make_views: Callable[[Tensor, Sequence[bytes], Any], Tensor] = create_views,
    ):
        self.clips, self.augmentation, self.make_views = clips, augmentation, make_views
        self.views_per_clip, self.seed = views_per_clip, seed
        self._kept: KeptViews | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def keys(self, indices: Sequence[int], epoch: int) -> list[bytes]:
        """Names of the views that an epoch shows: what the ledger keeps answers under, and what their draws follow from."""
        view = epoch if self.views_per_clip is None else epoch % self.views_per_clip
        return [view_key(self.seed, self.clips.refs[i].key, view, self.augmentation) for i in indices]

    def views(self, loaded: Tensor, keys: Sequence[bytes]) -> Tensor:
        """What the loader gave, uint8 (B, ...) -> float (B, C, T, H, W) in [0, 1], on the same device."""
        if not len(keys):
            return loaded
        if self._kept is None:
            return self.make_views(loaded, keys, self.augmentation)
        views, held = self._kept.read(keys)
        if not all(held):
            views = self.make_views(loaded, keys, self.augmentation)
            missing = [row for row, kept in enumerate(held) if not kept]
            self._kept.write([keys[row] for row in missing], views[missing])
        return views

    def keep_views(self, epochs: int) -> None:
        """Keep views where the dataset keeps its clips, if the epochs show each at least three times: on a CPU, where making
        one takes longer than reading four times a clip's bytes. Not those that are as quickly made: nothing is turned."""
        if self.views_per_clip is None or epochs < 3 * self.views_per_clip:
            return
        _, loaded = self.clips[0]
        if not isinstance(loaded, np.ndarray):
            return
        like = self.make_views(torch.from_numpy(loaded)[None], self.keys([0], 0), self.augmentation)
        if like.is_contiguous():
            self._kept = self.keep(tuple(like.shape[1:]))

    def keep(self, shape: tuple[int, ...], maker: str = "") -> KeptViews | None:
        """Room for something of `shape`, float32, of each view, where the dataset keeps its clips; None where it keeps none.

        `maker` names what it follows from beside the view, PyTorch and the processor.
        """
        cache = getattr(self.clips, "cache", None)
        if cache is None or self.views_per_clip is None:
            return None
        keys = [key for view in range(self.views_per_clip) for key in self.keys(range(len(self)), view)]
        sources = [
            Source(key.hex(), [ref.path])
            for key, (_, ref) in zip(keys, product(range(self.views_per_clip), self.clips.refs), strict=True)
        ]
        maker = f"{maker}PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
        # Named by the files as they are now: views are made a while after their clips are loaded.
        names = [name_item(source) for source in sources]
        items = open_cache(cache, sources, shape, np.float32, maker, names)
        return None if items is None else KeptViews(items, keys)

    def count_queries(self, epochs: int) -> int:
        """The most queries that this many epochs need."""
        return len(self) * (epochs if self.views_per_clip is None else min(epochs, self.views_per_clip))
