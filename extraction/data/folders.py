"""Labelled folders of videos: which files belong to which class, in the class order of a victim."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from extraction.errors import Stop

EXTENSIONS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".ogv", ".m4v", ".wmv", ".flv", ".3gp", ".ts"}


class Video(NamedTuple):
    path: Path
    label: int  # index into the classes; -1 for a video without a label the victim knows


def normalise_class(name: str) -> str:
    """One spelling for the many a class goes by: case, spaces, underscores and punctuation do not count."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def require_folder(root: str | Path, belongs: str) -> Path:
    """`root` as a Path. Raises Stop with what belongs there when it is missing."""
    root = Path(root)
    if not root.is_dir():
        raise Stop(f"folder {root} not found: {belongs} belongs there; or try --demo")
    return root


def _class_folders(root: Path, split: str | None) -> Path:
    """The folder whose children are the class folders: `root/split` if there is one, else `root`."""
    if split is not None and (root / split).is_dir():
        return root / split
    inner = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    # As some archives unpack: one folder in which the classes are.
    if len(inner) == 1 and any(child.is_dir() for child in inner[0].iterdir()):
        return inner[0]
    return root


def list_classes(root: str | Path, split: str | None = None) -> list[str]:
    """The names of the class folders of a labelled folder, sorted."""
    folder = _class_folders(Path(root), split)
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise Stop(f"{folder}: no class folders in it; it must be laid out as class/video files")
    return names


def find_videos(
    root: str | Path,
    classes: Sequence[str] | None,
    split: str | None = None,
    listing: str | Path | None = None,
    belongs: str = "a folder of class folders of videos",
) -> list[Video]:
    """Find the videos of `root/split/class/*` or `root/class/*`, sorted by path.

    Labels index `classes` by name, whatever the folders' order; `classes=None` leaves every video unlabelled (-1).
    `listing` keeps only the videos it names: a text file of paths below `root`, or Kinetics' CSV (`label, youtube_id,
    time_start, time_end, split`) over files named `<youtube_id>_<start>_<end>`.

    Raises Stop for a missing folder, an empty class, a class that `classes` does not have, or a list naming missing files.
    """
    root = require_folder(root, belongs)
    if listing is not None:
        return _listed_videos(root, classes, split, Path(listing))
    folder = _class_folders(root, split)
    videos, empty, unknown = [], [], []
    labels = None if classes is None else _label_map(classes)
    for name in list_classes(root, split):
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
        label = -1 if labels is None else labels.get(normalise_class(name))
        if label is None:
            unknown.append(name)
        elif not files:
            empty.append(name)
        else:
            videos += [Video(path, label) for path in files]
    if unknown:
        raise Stop(f"{folder}: {_some(unknown)} not among the victim's {len(classes)} classes; move them or rename them")
    if empty:
        raise Stop(f"{folder}: no video in {_some(empty)}; fill or remove the folder")
    return videos


def _label_map(classes: Sequence[str]) -> dict[str, int]:
    return {normalise_class(name): label for label, name in enumerate(classes)}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"class {shown}" if len(names) == 1 else f"{len(names)} classes ({shown}{', ...' if len(names) > 3 else ''})"


def _listed_videos(root: Path, classes: Sequence[str] | None, split: str | None, listing: Path) -> list[Video]:
    if not listing.is_file():
        raise Stop(f"list {listing} not found: it names the videos of {root} to use")
    labels = None if classes is None else _label_map(classes)
    if listing.suffix == ".csv":
        entries = _kinetics_rows(root, listing, split)
    else:
        lines = [line.strip() for line in listing.read_text().splitlines()]
        entries = [(root / line, Path(line).parent.name) for line in lines if line and not line.startswith("#")]
        missing = [str(path) for path, _ in entries if not path.is_file()]
        if missing:
            raise Stop(f"{listing}: {len(missing)} of its {len(entries)} files missing below {root}, the first {missing[0]}")
    unknown = sorted({name for _, name in entries if labels is not None and normalise_class(name) not in labels})
    if unknown:
        raise Stop(f"{listing}: {_some(unknown)} not among the victim's {len(classes)} classes")
    if not entries:
        raise Stop(f"{listing}: names no video that is below {root}")
    return [Video(path, -1 if labels is None else labels[normalise_class(name)]) for path, name in sorted(entries)]


def _kinetics_rows(root: Path, listing: Path, split: str | None) -> list[tuple[Path, str]]:
    """Rows of a Kinetics CSV whose video is there; what YouTube no longer has is missing from everyone's copy."""
    files = {path.stem: path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS}
    entries = []
    with listing.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"label", "youtube_id"} <= set(reader.fieldnames or []):
            raise Stop(f"{listing}: not a Kinetics CSV; its first line must name the columns label and youtube_id")
        for row in reader:
            if split is not None and row.get("split", split) not in (split, ""):
                continue
            stem = row["youtube_id"]
            if row.get("time_start"):
                stem += f"_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            path = files.get(stem) or files.get(row["youtube_id"])
            if path is not None:
                entries.append((path, row["label"]))
    return entries
