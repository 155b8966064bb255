"""The class lists of published victims, in the order of their logits."""

import pytest

from extraction.data.folders import normalise_class
from extraction.victims.classes import KNOWN_CLASSES, read_classes


def test_the_class_lists_of_kinetics():
    k400, k600 = (KNOWN_CLASSES[name]() for name in ("k400", "k600"))
    assert (len(k400), len(k600)) == (400, 600)
    assert k600 == sorted(k600)
    assert len({normalise_class(name) for name in k600}) == 600
    # Where others have them: class indices published with I3D and MoViNet.
    assert [k600[k] for k in (0, 17, 236, 307, 427, 599)] == [
        "abseiling", "backflip (human)", "jogging", "parkour", "running on treadmill", "zumba",
    ]  # fmt: skip


def test_a_text_file_has_one_name_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("first of all\n\n  second  \r\nthird", newline="")
    assert read_classes(path) == ["first of all", "second", "third"]
    assert read_classes("k600")[0] == "abseiling"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "0 class names, two are the least: one a line"),
        (b"a\nb\na\n", "names the class 'a' twice"),
        (b"\xff\xfe\x00", "nor a text file with one name a line ('utf-8' codec can't decode"),
    ],
)
def test_other_files_get_one_line(tmp_path, error_line, content, line):
    (tmp_path / "names.txt").write_bytes(content)
    assert line in error_line(read_classes, tmp_path / "names.txt")
