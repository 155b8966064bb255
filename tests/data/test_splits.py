"""Lists that divide a folder by group."""

from pathlib import Path

import pytest

from extraction.data.folders import find_videos
from extraction.data.splits import write_splits


@pytest.fixture
def sentences(tmp_path) -> Path:
    root = tmp_path / "words"
    for word in ("bin", "lay"):
        (root / word).mkdir(parents=True)
        for number in range(20):
            (root / word / f"s{number:02}.mp4").touch()
    return root


def split(root: Path, seed: int = 0, shares=(0.6, 0.2, 0.2), group=r"(\w+)\.mp4$") -> list[Path]:
    out = [root.parent / f"{seed}.{number}.txt" for number in range(len(shares))]
    write_splits(str(root), group=group, shares=shares, out=tuple(map(str, out)), seed=seed)
    return out


def test_a_group_is_on_one_side_alone_in_every_class(sentences):
    parts = [find_videos(sentences, ["bin", "lay"], listing=file) for file in split(sentences)]
    assert [len(part) for part in parts] == [24, 8, 8]
    stems = [{video.path.stem for video in part} for part in parts]
    assert [len(part) for part in stems] == [12, 4, 4]  # each sentence with both of its words
    assert len(set.union(*stems)) == 20


def test_lists_are_the_same_everywhere_and_another_seed_draws_others(sentences, tmp_path):
    first = [file.read_text().splitlines() for file in split(sentences)]
    assert first[1][2:6] == ["bin/s00.mp4", "bin/s06.mp4", "bin/s13.mp4", "bin/s14.mp4"]
    (sentences / "lay").rename(tmp_path / "away")  # which classes there are does not change who goes where
    assert [line for line in first[1][2:] if line.startswith("bin")] == split(sentences)[1].read_text().splitlines()[2:]
    assert split(sentences, seed=1)[1].read_text().splitlines()[2:] != first[1][2:6]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(group="mp4"), "put parentheses round the part that is the group's name"),
        (dict(group="(x"), "not a regular expression"),
        (dict(group="(zzz)"), "finds no group in bin/s00.mp4"),
        (dict(shares=(0.6, 0.6)), "write fractions above 0, up to 1 together"),
        (dict(shares=(0.99, 0.01)), "would have no video of class 'bin'; draw with another --seed or larger --shares"),
    ],
)
def test_what_cannot_be_divided_gets_one_line(sentences, error_line, options, line):
    assert line in error_line(split, sentences, **options)
    assert not list(sentences.parent.glob("*.txt"))
