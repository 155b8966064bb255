"""The query set: the clips to send to a victim, in the augmented views in which they are sent."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from extraction.data.augment import create_views, view_key


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

    def __len__(self) -> int:
        return len(self.clips)

    def keys(self, indices: Sequence[int], epoch: int) -> list[bytes]:
        """Names of the views that an epoch shows: what the ledger keeps answers under, and what their draws follow from."""
        view = epoch if self.views_per_clip is None else epoch % self.views_per_clip
        return [view_key(self.seed, self.clips.refs[i].key, view, self.augmentation) for i in indices]

    def views(self, loaded: Tensor, keys: Sequence[bytes]) -> Tensor:
        """What the loader gave, uint8 (B, ...) -> float (B, C, T, H, W) in [0, 1], on the same device."""
        return self.make_views(loaded, keys, self.augmentation) if len(keys) else loaded

    def count_queries(self, epochs: int) -> int:
        """The most queries that this many epochs need."""
        return len(self) * (epochs if self.views_per_clip is None else min(epochs, self.views_per_clip))
