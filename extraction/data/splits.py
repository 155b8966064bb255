"""Lists that divide a labelled folder between victim, attacker and scoring, by what must not be on two sides of a wall.

    python -m extraction.data.splits datasets/grid_words --group '(\\w+)\\.mp4$' \\
        --shares 0.6 0.2 0.2 --out victim.txt attacker.txt val.txt

Videos of one person, one recording or one sentence resemble each other: a victim that was scored on the same sentence as it was
trained on is scored too well. The part of a path that `--group` finds says which videos belong together; all of them go into
one list, in every class. Groups are ranked by a hash of the seed and their name: the same folder gives the same lists on every
machine.
"""

import hashlib
import re
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, BinaryIO

import tyro

from extraction.data.folders import group_videos, refuse_empty_classes
from extraction.errors import UserError, run_tool
from extraction.weights import write_atomically


def divide_groups(groups: set[str], shares: tuple[float, ...], seed: int = 0) -> list[set[str]]:
    """Disjoint sets of groups, a set for each of `shares`; together they are all groups if the shares sum to 1."""
    ranked = sorted(groups, key=lambda name: hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=16).digest())
    ends = [round(share * len(ranked)) for share in accumulate(shares)]
    return [set(ranked[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def write_splits(
    folder: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    /,
    group: str,
    shares: tuple[float, ...],
    out: tuple[str, ...],
    seed: int = 0,
) -> None:
    """Write a list of videos for each share of the groups of a labelled folder.

    Args:
        folder: Videos in class folders, as every script takes them.
        group: Regular expression, searched in a video's path below the folder; its first parentheses are the group's name.
        shares: Fractions of the groups, up to 1 together.
        out: A text file to write for each share: paths below the folder, one per line.
        seed: Another seed draws other groups.
    """
    if len(shares) != len(out):
        raise UserError(f"--shares has {len(shares)} fractions, --out {len(out)} files; give a file for each")
    if not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise UserError(f"--shares {' '.join(map(str, shares))}: write fractions above 0, up to 1 together")
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"--group {group!r}: not a regular expression ({error})") from None
    if not pattern.groups:
        raise UserError(f"--group {group!r}: put parentheses round the part that is the group's name")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"folder {folder} not found: it holds the labelled videos, in class folders")
    where, videos = group_videos(root)
    refuse_empty_classes(where, videos)
    names = {own: {path.relative_to(root).as_posix(): "" for path in paths} for own, paths in videos.items()}
    for paths in names.values():
        for path in paths:
            found = pattern.search(path)
            if found is None or not found[1]:
                raise UserError(f"--group {group!r}: finds no group in {path}")
            paths[path] = found[1]
    groups = {name for paths in names.values() for name in paths.values()}
    parts = divide_groups(groups, shares, seed)
    lists = [{own: [p for p, name in paths.items() if name in part] for own, paths in names.items()} for part in parts]
    for file, chosen in zip(out, lists, strict=True):
        lacking = [own for own, paths in chosen.items() if not paths]
        if lacking:
            raise UserError(f"{file}: would have no video of class {lacking[0]!r}; draw with another --seed or larger --shares")
    for file, chosen, share, part in zip(out, lists, shares, parts, strict=True):
        count = sum(map(len, chosen.values()))
        lines = [
            f"# {100 * share:g} % of the groups {group} of {folder}, seed {seed}: "
            f"{len(part)} of {len(groups)} groups, {count} videos, {len(chosen)} classes",
            "# made by python -m extraction.data.splits",
            *(path for paths in chosen.values() for path in paths),
        ]
        write_atomically(file, partial(_write_lines, lines))
        print(f"{file}: {count} videos of {len(part)} of {len(groups)} groups, {len(chosen)} classes")


def _write_lines(lines: list[str], file: BinaryIO) -> None:
    file.write(("\n".join(lines) + "\n").encode(errors="surrogateescape"))


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(write_splits, prog="python -m extraction.data.splits", description=__doc__))
