"""Class-balanced subsets: the list of a labelled folder's "5 %" or "10 %", written once so that it can be cited.

    python -m extraction.data.subsets datasets/kinetics400 --split train --share 0.05 --out kinetics400_5per.txt

Every class gives the same share of its videos, to one video and at least one. Scripts take the list as `--in-domain-list`,
`--val-list` or `--data-list`. Videos are ranked by a hash of the seed and their path below the folder of the class folders, so
that the same folder gives the same list on every machine (also as `datasets/kinetics400/train`), and a smaller share of the
same seed is part of a larger one.
"""

import hashlib
import math
from pathlib import Path
from typing import Annotated

import tyro

from extraction.data.folders import SPLITS, class_folder, group_videos, normalise_class, refuse_empty_classes
from extraction.errors import UserError, printable, run_tool
from extraction.weights import write_atomically


def choose_share(videos: dict[str, list[str]], share: float, seed: int = 0) -> dict[str, list[str]]:
    """Draw round(share * n) of each class's n names, at least one, sorted. Neither order matters."""

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}|{name}".encode(errors="surrogateescape"), digest_size=16).digest()

    return {
        own: sorted(sorted(names, key=rank)[: max(1, math.floor(share * len(names) + 0.5))])
        for own, names in sorted(videos.items())
    }


def write_subset(
    folder: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    /,
    out: str,
    share: float = 0.05,
    seed: int = 0,
    split: str | None = None,
    listing: str | None = None,
) -> None:
    """Write the list of a class-balanced share of a labelled folder.

    Args:
        folder: Videos in class folders, as every script takes them.
        out: The text file to write: paths below the folder of the class folders, one per line.
        share: Fraction of each class, above 0 and up to 1.
        seed: Another seed draws other videos.
        split: Draw from this half only: train or val.
        listing: Draw only from the videos that this list names: a text file, a CSV, or HMDB51's folder of splits.
    """
    if not 0 < share <= 1:
        raise UserError(f"--share {share}: write a fraction above 0 and up to 1, such as 0.05")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"folder {folder} not found: it holds the labelled videos, in class folders")
    where, videos = group_videos(root, split, listing)
    inner = class_folder(root, split)
    names = {own: [_name_below(path, inner, root) for path in paths] for own, paths in videos.items()}
    _refuse_unreadable(where, names, "pass --split train or --split val" if split is None else f"{root} has no {split} half")
    refuse_empty_classes(where, videos)
    chosen = choose_share(names, share, seed)
    total, num_chosen = (sum(map(len, classes.values())) for classes in (names, chosen))
    origin = "".join(f", {name} {value}" for name, value in (("split", split), ("list", listing)) if value)
    lines = [
        f"# {100 * share:g} % of each class of {folder}{origin}, seed {seed}: {num_chosen} of {total} videos, "
        f"{len(chosen)} classes",
        "# made by python -m extraction.data.subsets",
        *(name for own in chosen.values() for name in own),
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(out, lambda file: file.write(text.encode(errors="surrogateescape")))
    print(f"{printable(out)}: {num_chosen} of {total} videos, {len(chosen)} classes")


def _name_below(path: Path, inner: Path, root: Path) -> str:
    """A video's path below the class folders' own, so that `FOLDER --split val` and `FOLDER/val` draw and name alike."""
    return path.relative_to(inner if path.is_relative_to(inner) else root).as_posix()


def _refuse_unreadable(where: Path, names: dict[str, list[str]], of_halves: str) -> None:
    """A list of paths says a video's class by its folder."""
    halves = [name for name in names if name in sum(SPLITS.values(), ())]
    if halves:
        raise UserError(f"{where}: not classes but halves in it ({', '.join(halves)}); {of_halves}")
    for own, paths in names.items():
        for path in paths:
            if normalise_class(own) not in map(normalise_class, Path(path).parts[:-1]):
                raise UserError(f"{where}: {path} of class {own!r} is in no folder of that name; lay it out as class/video")


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(write_subset, prog="python -m extraction.data.subsets", description=__doc__))
