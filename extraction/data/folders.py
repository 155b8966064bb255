"""Labelled folders of videos: which files belong to which class, in the class order of a victim."""

import csv
import os
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from extraction.errors import UserError

EXTENSIONS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".ogv", ".m4v", ".wmv", ".flv", ".3gp", ".ts"}
# What the halves of a dataset are called, in folders (Moments in Time: training, validation) and in Kinetics' CSVs.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "validate")}


_FLAT = ""  # the class of videos in no class folder


class Video(NamedTuple):
    path: Path
    label: int  # index into the classes; -1 for a video without a label the victim knows


def normalise_class(name: str) -> str:
    """One spelling for the many a class goes by: case, spaces, underscores and punctuation do not count.

    Letters and digits of every script do; so do + and # at the end of a word, by which C, C++ and C# differ.
    """
    folded = re.sub(r"[+#](?=\w)", " ", unicodedata.normalize("NFKC", name).casefold())  # Moments in Time: adult+male+singing
    return "".join(c for c in folded if c in "+#" or unicodedata.category(c)[0] in "LMN")


def index_classes(classes: Sequence[str]) -> dict[str, int]:
    """The label of each class by its normalised name. Raises UserError for two classes of one spelling, or none."""
    labels: dict[str, int] = {}
    for label, name in enumerate(classes):
        spelling = normalise_class(name)
        if not spelling or spelling in labels:
            other = repr(classes[labels[spelling]]) if spelling else "nothing but punctuation"
            raise UserError(f"class {name!r} has the spelling of {other}; rename one")
        labels[spelling] = label
    return labels


def require_folder(root: str | Path, belongs: str) -> Path:
    """`root` as a Path. Raises UserError with what belongs there when it is missing."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"folder {root} not found: {belongs} belongs there; or try --demo")
    return root


def class_folder(root: Path, split: str | None) -> Path:
    """The folder whose children are the class folders: that of the split below `root` if there is one, else `root`."""
    for name in _spellings(split):
        if (root / name).is_dir():
            return root / name
    inner = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    # As some archives unpack: one folder in which the classes are.
    if len(inner) == 1 and any(child.is_dir() for child in inner[0].iterdir()):
        return inner[0]
    return root


def _spellings(split: str | None) -> tuple[str, ...]:
    return () if split is None else SPLITS.get(split, (split,))


def list_classes(root: str | Path, split: str | None = None) -> list[str]:
    """The names of the class folders of a labelled folder, sorted."""
    folder = class_folder(Path(root), split)
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: no class folders in it; it must be laid out as class/video files")
    index_classes(names)
    return names


def find_videos(
    root: str | Path,
    classes: Sequence[str] | None,
    split: str | None = None,
    listing: str | Path | None = None,
    belongs: str = "a folder of class folders of videos",
    unlabelled_flag: str | None = None,
) -> list[Video]:
    """Find the videos of `root/split/class/*` or `root/class/*`, sorted by path.

    Labels index `classes` by name, whatever the folders' order; `classes=None` leaves every video unlabelled (-1), in class
    folders or not. `unlabelled_flag` names the option by which a user says that, where videos may be unlabelled at all: there
    videos in no class folder, but flat in `root` or `root/split`, are unlabelled too. Class folders that `classes` does not
    have may be unlabelled footage or a wrong class list: they stay an error, which names that option.

    `split` "train" and "val" also find `training` and `validation`. `listing` keeps only the videos it names, and is

    - a text file of paths below `root`, one per line, as UCF101's `trainlist01.txt` (a number after the path is ignored);
    - Kinetics' CSV (`label, youtube_id, time_start, time_end, split`) over files named `<youtube_id>_<start>_<end>`;
    - Moments in Time's CSV (`class/file.mp4, class, ...` without a header; the class folder may be left away);
    - HMDB51's folder `testTrainMulti_7030_splits`, with `:2` or `:3` after it for its other splits: the videos that it
      marks for `split`, "train" or "val" (its test set), else both.

    Raises UserError for a missing folder, an empty class, a class that `classes` does not have, or a list naming missing files.
    """
    root = require_folder(root, belongs)
    known = None if classes is None else index_classes(classes)
    where, videos = group_videos(root, split, listing, known)
    if videos.keys() == {_FLAT}:
        if known is not None and unlabelled_flag is None:
            raise UserError(f"{where}: no class folders in it; it must be laid out as class/video files")
        known = None
    unknown = [name for name in videos if known is not None and normalise_class(name) not in known]
    if unknown and classes is not None:
        mend = "move them or rename them"
        if unlabelled_flag is not None:
            mend += f", or pass {unlabelled_flag} to score by agreement alone"
        raise UserError(f"{where}: {_some(unknown)} not among the {len(classes)} classes of the model; {mend}")
    refuse_empty_classes(where, videos)
    labels = {name: -1 if known is None else known[normalise_class(name)] for name in videos}
    found = [Video(path, labels[name]) for name, paths in videos.items() for path in paths]
    return sorted(found)


def group_videos(
    root: Path, split: str | None = None, listing: str | Path | None = None, known: Container[str] | None = None
) -> tuple[Path, dict[str, list[Path]]]:
    """The videos of each class, by the name its folder or list gives it; a class without any has an empty list.

    Videos that lie flat in a folder without class folders, or that a list of paths names there, stand under "".
    Arguments are those of `find_videos`; `known`: normalised names of the classes there are, which tell a class folder
    from one inside it. Returns what was read, for messages, too. Raises UserError as `find_videos` does.
    """
    if listing is not None:
        return Path(listing), _read_listing(root, split, listing, known)
    folder = class_folder(root, split)
    if not any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir()):
        flat = [path for path in _find_files(folder) if path.parent == folder]
        if flat:
            return folder, {_FLAT: flat}
    return folder, {name: _find_files(folder / name) for name in list_classes(root, split)}


def refuse_empty_classes(where: Path, videos: dict[str, list[Path]]) -> None:
    """Raise UserError, by name, for classes without a video; `where` is the folder or list that has them."""
    empty = [name for name, paths in videos.items() if not paths]
    if empty:
        raise UserError(f"{where}: no video in {_some(empty)}; fill or remove it")


def _find_files(folder: Path) -> list[Path]:
    """Regular files alone: reading a device or a pipe may never end. Sorted by their parts, as paths are."""
    found, folders = [], [os.fspath(folder)]
    while folders:  # twice as fast as os.walk and a stat of each file, four times as Path.rglob
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                    found.append(entry.path)
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"class {shown}" if len(names) == 1 else f"{len(names)} classes ({shown}{', ...' if len(names) > 3 else ''})"


# --- unrelated videos ------------------------------------------------------------------------------------------------

# Where the unrelated videos of the 2022 experiments are, and what stands in for them in the demo.
AUX = {
    "ucf101": ("datasets/UCF-101", "datasets/demo/unrelated_a"),
    "hmdb51": ("datasets/hmdb51", "datasets/demo/unrelated_b"),
    "moments_in_time": ("datasets/Moments_in_Time_Raw", "datasets/demo/unrelated_a"),
}


def find_aux_folders(names: Sequence[str], demo: bool = False) -> list[Path]:
    """The folders of unrelated videos: a name of `AUX`, or a folder as it is. Raises UserError for a missing one."""
    folders = [AUX[name][demo] if name in AUX else name for name in names]
    return [require_folder(folder, f"unrelated video ({', '.join(AUX)})") for folder in folders]


def find_aux_videos(names: Sequence[str], demo: bool = False) -> list[Video]:
    """The videos of these folders, without labels."""
    return [video for folder in find_aux_folders(names, demo) for video in find_videos(folder, None)]


# --- lists -----------------------------------------------------------------------------------------------------------


def _read_listing(root: Path, split: str | None, listing: str | Path, known: Container[str] | None) -> dict[str, list[Path]]:
    path = Path(listing)
    splits, _, number = str(listing).rpartition(":") if re.search(r":\d+$", str(listing)) else (str(listing), "", "1")
    if path.is_file() and path.suffix == ".csv":
        videos = _read_csv(root, split, path)
    elif path.is_file():
        videos = _group(_read_paths(root, split, path, known))
    elif Path(splits).is_dir():
        videos = _read_hmdb(class_folder(root, None), Path(splits), number, split)
    else:
        raise UserError(f"list {listing} not found: it names the videos of {root} to use")
    named = [video for paths in videos.values() for video in paths]
    missing = [video for video in named if not video.is_file()]
    if missing:
        raise UserError(f"{listing}: {len(missing)} of its {len(named)} files missing below {root}, the first {missing[0]}")
    if not named:
        raise UserError(f"{listing}: names no video that is below {root}")
    return videos


def _group(entries: Iterable[tuple[Path, str]]) -> dict[str, list[Path]]:
    videos: dict[str, list[Path]] = {}
    for path, name in entries:
        videos.setdefault(name, []).append(path)
    return videos


def _read_lines(path: Path) -> list[str]:
    """The lines that say something, without the blanks around them."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None


def _below(root: Path, folder: Path, name: str) -> Path:
    """A listed file: below `root`, or else below the folder in which the classes are. Raises UserError for one outside."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"listed file {name!r} is not below {root}; lists name files by their paths below the folder")
    path = _or_copy(root / name)
    return path if path.is_file() else _or_copy(folder / name)


def _or_copy(video: Path) -> Path:
    """A listed file, or the mp4 that `extraction.data.transcode` made of it."""
    copy = video.with_suffix(".mp4")
    return copy if not video.is_file() and copy.is_file() else video


def _read_paths(root: Path, split: str | None, listing: Path, known: Container[str] | None) -> list[tuple[Path, str]]:
    entries, inner = [], class_folder(root, split)
    for line in _read_lines(listing):
        if line.startswith("#"):
            continue
        name = re.sub(r"(\.\w+)\s+\d+$", r"\1", line)  # UCF101 numbers the classes here; the folder's name says it too
        folders = Path(name).parts[:-1][::-1]
        own = next((folder for folder in folders if known and normalise_class(folder) in known), "".join(folders[:1]))
        entries.append((_below(root, inner, name), own))
    return entries


def _read_hmdb(root: Path, splits: Path, number: str, split: str | None) -> dict[str, list[Path]]:
    """Files `<class>_test_split<number>.txt` with lines `video mark`: 1 for training, 2 for testing, 0 for neither."""
    ending = f"_test_split{number}.txt"
    files = sorted(splits.glob(f"*{ending}"))
    if not files:
        raise UserError(f"{splits}: no file *{ending} in it; HMDB51 has the splits 1, 2 and 3, as in {splits}:2")
    wanted, videos = {"train": "1", "val": "2", "test": "2"}.get(split or "", "12"), {}
    for file in files:
        name = file.name.removesuffix(ending)
        marks = [line.rsplit(maxsplit=1) for line in _read_lines(file)]
        wrong = [line for line in marks if len(line) != 2 or line[1] not in ("0", "1", "2")]
        if wrong:
            raise UserError(f"{file}: {' '.join(wrong[0])!r} is not a video and its mark, 0, 1 or 2")
        videos[name] = [_or_copy(root / name / video) for video, mark in marks if mark in wanted]
    return videos


def _read_csv(root: Path, split: str | None, listing: Path) -> dict[str, list[Path]]:
    try:
        with listing.open(newline="", encoding="utf-8-sig") as file:
            first, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{listing}: not a readable CSV file ({error})") from None
    if {"label", "youtube_id"} <= set(first):
        return _group_kinetics(root, split, listing, [dict(zip(first, row, strict=False)) for row in rows])
    if len(first) > 1 and Path(first[0]).suffix.lower() in EXTENSIONS and all(len(row) > 1 for row in rows):
        # Moments in Time: the file, with or without its class folder, and the class.
        inner = class_folder(root, split)
        named = [(name if "/" in name else f"{own}/{name}", own) for name, own, *_ in [first, *rows]]
        return _group((_below(root, inner, name), own) for name, own in named)
    raise UserError(
        f"{listing}: neither a Kinetics CSV (its first line names the columns label and youtube_id) "
        "nor one of Moments in Time (lines of class/file.mp4,class,...)"
    )


def _group_kinetics(root: Path, split: str | None, listing: Path, rows: list[dict[str, str]]) -> dict[str, list[Path]]:
    """The videos that are there: what YouTube no longer has is missing from everyone's copy."""
    files = {path.stem: path for path in _find_files(root)}
    videos: dict[str, list[Path]] = {}
    for number, row in enumerate(rows, 2):
        if split is not None and row.get("split") and row["split"] not in _spellings(split):
            continue
        try:
            stem, own = row["youtube_id"], videos.setdefault(row["label"], [])
            if row.get("time_start"):
                stem += f"_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (KeyError, ValueError):
            raise UserError(f"{listing}: row {number} is not a row of Kinetics' CSV ({', '.join(row.values())})") from None
        path = files.get(stem) or files.get(row["youtube_id"])
        if path is not None:
            own.append(path)
    return videos
