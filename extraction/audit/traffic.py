"""Honest traffic: accounts of users who are no thieves, made of the footage that a service's owner has.

Each account has a profile. Accounts with even numbers, to which detectors and defences are fitted, and odd ones, on which they
are reported, are made of different videos.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from extraction.audit.recording import Loader, Recording
from extraction.data.clips import Clips, load_batches
from extraction.errors import UserError
from extraction.victims.detectors import Stream
from extraction.victims.wire import send

Change = Callable[[Tensor], Tensor]


def _shake(clips: Tensor) -> Tensor:
    """Every frame moved by up to a twelfth of its height and width, as a hand would."""
    reach = max(1, clips.shape[3] // 12)
    return torch.stack([
        frame.roll((reach * (t % 3 - 1), reach * (t % 2)), (2, 3)) for t, frame in enumerate(clips.unbind(2))
    ], 2)  # fmt: skip


def _crop(clips: Tensor) -> Tensor:
    """The middle nine tenths, enlarged again."""
    height, width = clips.shape[3:]
    y, x = height // 20, width // 20
    inner = clips[..., y : height - y, x : width - x].flatten(1, 2)
    return torch.nn.functional.interpolate(inner, (height, width), mode="bilinear", antialias=True).view_as(clips).clamp(0, 1)


# What becomes of a clip before it is sent: float (B, 3, T, H, W) in [0, 1] -> the same.
SHIFTS: dict[str, Change] = {
    "dark": lambda clips: clips * 0.35,
    "shaky": _shake,
    "upright": lambda clips: clips.transpose(3, 4).flip(4).contiguous(),  # a telephone held upright, shown lying
    "half the frame rate": lambda clips: clips[:, :, torch.arange(clips.shape[2]) // 2 * 2],
}
CHANGES: dict[str, Change] = SHIFTS | {
    "": lambda clips: clips,
    "compressed": lambda clips: send(clips, "h264:32"),
    "cropped": _crop,
}


class Query(NamedTuple):
    """A clip that an honest user sends."""

    window: int  # its number among all windows
    change: str  # of `CHANGES`
    upload: int  # the upload that it is cut from; -1: it is one itself


class Account(NamedTuple):
    """An honest user."""

    profile: str
    queries: list[Query]
    held_out: bool  # reported on, not fitted to


class Videos(NamedTuple):
    """Windows of videos, a quarter of a clip apart, by video."""

    windows: list[list[int]]  # of each video, in the order of their starts
    folders: list[str]  # what each video's folder is called: its class, perhaps


def _send_single(windows: Sequence[int]) -> list[Query]:
    return [Query(window, "", -1) for window in windows]


def _send_iid(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    return _send_single([rng.choice(rng.choice(videos.windows)) for _ in range(count)])


def _send_windows(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    """Windows of whole videos, a half or a quarter of a clip apart, one upload a video."""
    found: list[Query] = []
    step, order = rng.choice((1, 2)), rng.sample(range(len(videos.windows)), len(videos.windows))
    while len(found) < count:
        upload = len(found)
        found += [Query(window, "", upload) for window in videos.windows[order[0]][::step]]
        order = order[1:] + order[:1]
    return found[:count]


def _send_camera(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    """A camera that stays: one of the longest videos, every clip for itself, from the beginning again at its end."""
    longest = max(len(windows) for windows in videos.windows)
    windows = rng.choice([windows for windows in videos.windows if 2 * len(windows) >= longest])
    once = windows[::4] + windows[2::4]
    return _send_single((once * (count // len(once) + 1))[:count])


def _send_retries(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    """Clips of which three in ten are sent once more: as they are, compressed or cropped."""
    found: list[Query] = []
    for _ in range(count):
        if found and rng.random() < 0.3:
            found.append(Query(rng.choice(found).window, rng.choice(("", "compressed", "cropped")), -1))
        else:
            found += _send_iid(videos, 1, rng)
    return found


def _send_one_class(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    folder = rng.choice(sorted(set(videos.folders)))
    own = [windows for windows, name in zip(videos.windows, videos.folders, strict=True) if name == folder]
    return _send_iid(Videos(own, []), count, rng)


def _send_shifted(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    """Footage of another kind: dark, shaky, upright or of half the frame rate, one of these an account."""
    change = rng.choice(sorted(SHIFTS))
    return [query._replace(change=change) for query in _send_iid(videos, count, rng)]


def _send_benchmark(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    """The middle of every video, class by class, as a labelled benchmark is run: no service can tell that from a theft."""
    return _send_single([windows[len(windows) // 2] for windows in videos.windows])[:count]


def _send_mixed(videos: Videos, count: int, rng: random.Random) -> list[Query]:
    part = -(-count // 3)
    parts = [make(videos, part, rng) for make in (_send_iid, _send_windows, _send_retries)]
    return [query for found in parts for query in found][:count]


PROFILES: dict[str, Callable[[Videos, int, random.Random], list[Query]]] = {
    "i.i.d. clips": _send_iid,
    "overlapping windows": _send_windows,
    "fixed camera": _send_camera,
    "retries and re-encodes": _send_retries,
    "one class only": _send_one_class,
    "shifted footage": _send_shifted,
    "benchmark customer": _send_benchmark,
    "mixed": _send_mixed,
}


def group_windows(clips: Clips) -> Videos:
    """The windows of each video. Raises UserError when there are too few videos for two accounts of different ones."""
    windows: dict[int, list[int]] = {}
    folders: dict[int, str] = {}
    for number, ref in enumerate(clips.refs):
        windows.setdefault(ref.video, []).append(number)
        folders[ref.video] = ref.path.parent.name
    if len(windows) < 4:
        raise UserError(
            f"--traffic: {len(windows)} videos make one account; name folders with 4 videos or more, of which one half is "
            "fitted to and the other reported on"
        )
    return Videos(list(windows.values()), [folders[video] for video in windows])


def draw_accounts(videos: Videos, per_profile: int, queries: tuple[int, int], seed: int = 0) -> list[Account]:
    """`per_profile` accounts of every profile, of lengths drawn between the two of `queries`, evenly in their logarithm.

    Even accounts take the even videos, odd ones the odd. Raises UserError for fewer than two accounts of a profile.
    """
    if per_profile < 2:
        raise UserError(f"--accounts {per_profile}: there must be 2 of a profile, one to fit to and one to report on")
    halves = [Videos(videos.windows[half::2], videos.folders[half::2]) for half in (0, 1)]
    accounts = []
    for profile, send_queries in PROFILES.items():
        for number in range(per_profile):
            rng = random.Random(f"{seed}/{profile}/{number}")
            low, high = queries
            count = round(low * (high / low) ** rng.random())
            accounts.append(Account(profile, send_queries(halves[number % 2], count, rng), number % 2 == 1))
    return accounts


def list_distinct(accounts: Sequence[Account]) -> list[tuple[int, str]]:
    """The clips of all accounts, each once: window and change, in the order of their first use."""
    return list(dict.fromkeys((query.window, query.change) for account in accounts for query in account.queries))


def name_clips(clips: Clips, wanted: Sequence[tuple[int, str]]) -> list[bytes]:
    """A key for each, of its content."""
    return [f"{clips.refs[window].key}|{change}".encode() for window, change in wanted]


def open_loader(
    clips: Clips, wanted: Sequence[tuple[int, str]], batch_size: int, num_workers: int, device: torch.device
) -> Loader:
    """What `recording.record` takes, for a list of windows and changes."""

    def load(places: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        by_change: dict[str, list[int]] = {}
        for place in places:
            by_change.setdefault(wanted[place][1], []).append(place)
        for change, own in by_change.items():
            batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
            windows = [[wanted[place][0] for place in batch] for batch in batches]
            for batch, found in zip(batches, load_batches(clips, windows, num_workers), strict=True):
                there = set(found.indices)
                if there:
                    pixels = found.clips.to(device).permute(0, 4, 1, 2, 3).float() / 255
                    yield [place for place in batch if wanted[place][0] in there], CHANGES[change](pixels)

    return load


def make_streams(accounts: Sequence[Account], wanted: Sequence[tuple[int, str]], recording: Recording) -> list[Stream]:
    """What detectors see of each account: its clips that could be decoded."""
    place, probs = {clip: number for number, clip in enumerate(wanted)}, recording.probs
    streams = []
    for account in accounts:
        rows = torch.tensor([place[query.window, query.change] for query in account.queries])
        uploads = torch.tensor([query.upload for query in account.queries])
        seen = recording.decoded[rows]
        streams.append(Stream(recording.thumbnails[rows[seen]], probs[rows[seen]], uploads[seen]))
    return streams


def list_folders(paths: Sequence[str]) -> list[Path]:
    """The folders of honest footage. Raises UserError when none is named."""
    if not paths:
        raise UserError("no honest traffic: name folders of your users' videos (--traffic FOLDER ...), or try --demo")
    return [Path(path) for path in paths]
