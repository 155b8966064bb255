"""What was found by looking into videos, kept: a start over files that have not changed opens none of them."""

import contextlib
import functools
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from extraction.data.decoding import Probe, Unreadable, probe

# Of a file with the same size and times the content is taken to be the same, as the clip cache does.
_SCHEMA = """CREATE TABLE IF NOT EXISTS probes (
    path TEXT PRIMARY KEY, state TEXT, num_frames INTEGER, fingerprint TEXT, fps REAL, digest BLOB) WITHOUT ROWID"""
_DAMAGED = sqlite3.Error, ValueError  # the latter: text that is none, a row of too few columns


def probe_videos(paths: Sequence[Path], folder: Path | None = None, desc: str = "looking at videos") -> list[Probe | str]:
    """The `Probe` of each video, or the reason why it can't be read.

    `folder` keeps what was found in `probes.sqlite`. It is no more than a memory: one that can't be read or written is done
    without, and may be removed at any time. Unreadable videos are looked at anew each time.
    """
    states = [_describe_file(path) for path in paths]
    absolute = functools.cache(os.path.abspath)  # of a folder, which has many videos
    places = [os.path.join(absolute(folder), name) for folder, name in map(os.path.split, paths)]
    known = dict(_read(folder, places)) if folder is not None else {}
    found: list[Probe | str | None] = []
    for place, state in zip(places, states, strict=True):
        kept = known.get(place)
        found.append(Probe(*kept[1:]) if kept is not None and state and kept[0] == state else None)
    missing = [number for number, result in enumerate(found) if result is None]
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.map(_probe_or_reason, [paths[number] for number in missing])
        bar = tqdm(results, total=len(missing), desc=desc, unit="video", leave=False, dynamic_ncols=True, disable=not missing)
        for number, result in zip(missing, bar, strict=True):
            found[number] = result
    if folder is not None:
        # Only where the file was the same before and after it was looked at.
        rows = [
            (places[number], states[number], *result, _digest(places[number], states[number], *result))
            for number in missing
            if isinstance(result := found[number], Probe) and states[number] and states[number] == _describe_file(paths[number])
        ]
        _write(folder, rows)
    return [result for result in found if result is not None]


def _describe_file(path: Path) -> str:
    """Size and times of a file; empty when it is gone."""
    try:
        about = os.stat(path)
    except OSError:
        return ""
    return f"{about.st_size}|{about.st_mtime_ns}|{about.st_ctime_ns}"


def _probe_or_reason(path: Path) -> Probe | str:
    try:
        return probe(path)
    except Unreadable as error:
        return str(error)


def _read(folder: Path, places: Sequence[str]) -> Iterator[tuple[str, list]]:
    file = folder / "probes.sqlite"
    if not file.is_file():
        return
    with contextlib.suppress(*_DAMAGED), contextlib.closing(sqlite3.connect(file, timeout=60)) as database:
        for i in range(0, len(places), 500):
            part = places[i : i + 500]
            marks = ",".join("?" * len(part))
            rows = database.execute(f"SELECT * FROM probes WHERE path IN ({marks})", part)
            yield from [(path, about) for path, *about, digest in rows if digest == _digest(path, *about)]


def _digest(*row: object) -> bytes:
    """8 bytes that tell damage: SQLite does not look whether a row is what was written, and a wrong one would be believed."""
    return hashlib.blake2b(repr(row).encode(), digest_size=8).digest()


def _write(folder: Path, rows: Sequence[tuple]) -> None:
    if not rows:
        return
    file = folder / "probes.sqlite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
            database.execute(_SCHEMA)
            database.executemany("INSERT OR REPLACE INTO probes VALUES (?, ?, ?, ?, ?, ?)", rows)
    except OSError:
        pass
    except _DAMAGED as error:
        if "locked" not in str(error):  # it would not be of use the next time either
            with contextlib.suppress(OSError):
                file.unlink()
