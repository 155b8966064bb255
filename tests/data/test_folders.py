"""Datasets as they are laid out and listed by those who publish them, in miniature, and the subsets drawn from them."""

import csv
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_only
from extraction.data.clips import Clips
from extraction.data.demo import write_video
from extraction.data.folders import find_aux_videos, find_videos, group_videos
from extraction.data.subsets import choose_share, write_subset
from extraction.errors import UserError
from extraction.students import create_student
from extraction.victims.classes import KNOWN_CLASSES, read_classes
from extraction.weights import save_weights


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path, classes, split=None, listing=None) -> list[tuple[str, int]]:
    return [(video.path.name, video.label) for video in find_videos(root, classes, split, listing)]


# --- any folder ---------------------------------------------------------------------------------------------------------


def test_folders_of_every_layout(tmp_path):
    root = tmp_path / "kinetics"
    for split in ("train", "val"):
        for name in ("air_drumming", "petting animal (not cat)"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / f"{split}.mp4").touch()
    classes = ["petting animal (not cat)", "air drumming", "zumba"]
    videos = find_videos(root, classes, "val")
    assert [(v.path.name, v.label) for v in videos] == [("val.mp4", 1), ("val.mp4", 0)]
    shutil.move(root / "train", tmp_path / "UCF-101")
    assert [v.label for v in find_videos(tmp_path / "UCF-101", None)] == [-1, -1]
    nested = tmp_path / "as_unpacked"
    nested.mkdir()
    shutil.move(tmp_path / "UCF-101", nested / "UCF-101")
    assert len(find_videos(nested, classes)) == 2


def test_lists_choose_and_name_what_is_missing(tmp_path):
    (tmp_path / "a").mkdir()
    for stem in ("x_000003_000013", "y_000000_000010"):
        (tmp_path / "a" / f"{stem}.mp4").touch()
    (tmp_path / "list.txt").write_text("a/x_000003_000013.mp4\n")
    assert len(find_videos(tmp_path, ["a"], listing=tmp_path / "list.txt")) == 1
    (tmp_path / "list.txt").write_text("a/x_000003_000013.mp4\na/gone.mp4\n")
    with pytest.raises(UserError, match=r"1 of its 2 files missing below .*gone.mp4"):
        find_videos(tmp_path, ["a"], listing=tmp_path / "list.txt")
    with (tmp_path / "val.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        rows.writerows([["a", "x", 3, 13, "val"], ["a", "deleted", 0, 10, "val"], ["a", "y", 0, 10, "train"]])
    assert [v.path.stem for v in find_videos(tmp_path, ["a"], "val", tmp_path / "val.csv")] == ["x_000003_000013"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda root: None, "belongs there; or try --demo"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: (root / "a").mkdir(parents=True), "no video in class 'a'"),
        (lambda root: (root / "what").mkdir(parents=True), "class 'what' not among the 2 classes of the model"),
    ],
)
def test_bad_folders_get_one_line(tmp_path, make, line):
    make(tmp_path / "root")
    with pytest.raises(UserError, match=line):
        find_videos(tmp_path / "root", ["a", "b"])


def test_a_flat_folder_is_unlabelled_where_that_may_be(tmp_path, error_line):
    flat = tmp_path / "clips"
    touch(flat, "b.mp4", "a.mp4", "notes.txt", ".thumbs/x.mp4")
    (flat / "list.txt").write_text("b.mp4\n")

    def find(listing=None):
        return [
            (v.path.name, v.label) for v in find_videos(flat, ["a", "b"], "val", listing, unlabelled_flag="--val-unlabelled")
        ]

    assert find() == [("a.mp4", -1), ("b.mp4", -1)]
    assert find(flat / "list.txt") == [("b.mp4", -1)]
    assert [v.label for v in find_aux_videos([str(flat)])] == [-1, -1]
    line = "no class folders in it; it must be laid out as class/video files"
    assert error_line(find_videos, flat, ["a", "b"]) == f"{flat}: {line}"  # where labels are needed


def test_class_folders_of_other_names_are_an_error_that_names_the_way_out(tmp_path, error_line):
    touch(tmp_path, "cats/1.mp4", "dogs/2.mp4", "loose.mp4")
    line = error_line(find_videos, tmp_path, ["a", "b"], "val", unlabelled_flag="--val-unlabelled")
    assert line.endswith("move them or rename them, or pass --val-unlabelled to score by agreement alone")
    assert "--val-unlabelled" not in error_line(find_videos, tmp_path, ["a", "b"])
    assert [v.label for v in find_videos(tmp_path, None, "val", unlabelled_flag="--val-unlabelled")] == [-1, -1]


# --- UCF101 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ucf(tmp_path) -> Path:
    """Three classes; class 2's files are spelt unlike its folder, as HandstandPushups' are."""
    root = tmp_path / "UCF-101"
    for name, stem in (("ApplyEyeMakeup", "ApplyEyeMakeup"), ("HandstandPushups", "HandStandPushups"), ("YoYo", "YoYo")):
        touch(root, *(f"{name}/v_{stem}_g{group:02d}_c01.avi" for group in (1, 8, 9)))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n")
    trained = [
        f"{name}/v_{stem}_g{group:02d}_c01.avi {number}"
        for number, (name, stem) in enumerate(
            [("ApplyEyeMakeup", "ApplyEyeMakeup"), ("HandstandPushups", "HandStandPushups"), ("YoYo", "YoYo")], 1
        )
        for group in (8, 9)
    ]
    (lists / "trainlist01.txt").write_text("\r\n".join(trained) + "\r\n")
    tested = [line.split()[0].replace("g08", "g01") for line in trained if "g08" in line]
    (lists / "testlist01.txt").write_text("\n".join(tested) + "\n")
    return root


def test_ucf101_official_split(error_line, ucf):
    lists = ucf.parent / "ucfTrainTestlist"
    classes = read_classes(lists / "classInd.txt")
    assert classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    assert found(ucf, classes, "val", lists / "testlist01.txt") == [
        ("v_ApplyEyeMakeup_g01_c01.avi", 0),
        ("v_HandStandPushups_g01_c01.avi", 1),
        ("v_YoYo_g01_c01.avi", 2),
    ]
    trained = found(ucf, classes[::-1], "train", lists / "trainlist01.txt")
    assert [name[-11:-8] for name, _ in trained] == ["g08", "g09"] * 3
    assert [label for _, label in trained] == [2, 2, 1, 1, 0, 0]  # the victim's order rules, not the list's numbers
    (ucf / "YoYo" / "v_YoYo_g09_c01.avi").unlink()
    line = error_line(find_videos, ucf, classes, listing=lists / "trainlist01.txt")
    assert "1 of its 6 files missing below" in line
    assert "v_YoYo_g09_c01.avi" in line
    assert "trainlist04.txt not found" in error_line(find_videos, ucf, classes, listing=lists / "trainlist04.txt")
    assert "class 'YoYo' not among the 2 classes of the model" in error_line(
        find_videos, ucf, classes[:2], listing=lists / "testlist01.txt"
    )


def test_class_names_that_only_look_numbered_are_kept(tmp_path):
    (tmp_path / "names.txt").write_text("3 point shot\njuggling\n")
    assert read_classes(tmp_path / "names.txt") == ["3 point shot", "juggling"]


def test_a_listed_file_one_folder_down_keeps_its_class(tmp_path):
    touch(tmp_path, "train/juggling balls/part 2/a b.mp4", "train/zumba/c.mp4")
    (tmp_path / "list.txt").write_text("# made by hand\ntrain/juggling balls/part 2/a b.mp4\nzumba/c.mp4 7\n")
    assert found(tmp_path, ["zumba", "juggling_balls"], "train", tmp_path / "list.txt") == [("a b.mp4", 1), ("c.mp4", 0)]


# --- HMDB51 ----------------------------------------------------------------------------------------------------------

# Names as HMDB51 has them: one begins with #, others have brackets, ampersands and semicolons.
HMDB = {
    "brush_hair": {"April_09_brush_hair_u_nm_np1_ba_goo_0.avi": "1", "atheistII_brush_hair_u_nm_np2_ri_goo_2.avi": "2"},
    "clap": {
        "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi": "1",
        "(HQ)_Rock_&_Roll;_clap_u_nm_np1_fr_med_3.avi": "2",
        "50_FIRST_DATES_clap_u_cm_np1_fr_med_0.avi": "0",
    },
}


@pytest.fixture
def hmdb(tmp_path) -> Path:
    """Split 1 as above, split 2 with training and testing exchanged."""
    splits = tmp_path / "testTrainMulti_7030_splits"
    splits.mkdir()
    for name, marks in HMDB.items():
        touch(tmp_path / "hmdb51", *(f"{name}/{file}" for file in marks))
        for number, exchanged in ((1, "012"), (2, "021")):
            lines = [f"{file} {exchanged[int(mark)]} " for file, mark in marks.items()]  # with their blank at the end
            (splits / f"{name}_test_split{number}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "hmdb51"


@pytest.mark.parametrize(
    ("split", "number", "marked"),
    [("train", "", "1"), ("val", "", "2"), ("train", ":1", "1"), ("train", ":2", "2"), ("val", ":2", "1"), (None, "", "12")],
)
def test_hmdb51_official_splits(hmdb, split, number, marked):
    expected = [
        (file, label)
        for label, name in enumerate(["brush_hair", "clap"])
        for file, mark in sorted(HMDB[name].items())
        if mark in marked
    ]
    assert found(hmdb, ["brush hair", "clap"], split, f"{hmdb.parent}/testTrainMulti_7030_splits{number}") == expected


def test_hmdb51_wrong_cases(error_line, hmdb):
    splits, classes = hmdb.parent / "testTrainMulti_7030_splits", ["brush_hair", "clap"]
    assert "no file *_test_split4.txt in it" in error_line(find_videos, hmdb, classes, listing=f"{splits}:4")
    assert "nowhere:1 not found" in error_line(find_videos, hmdb, classes, listing="nowhere:1")
    file = splits / "clap_test_split1.txt"
    whole = file.read_text()
    file.write_text(whole.replace("goo_0.avi 1", "goo_0.avi 0"))
    assert "no video in class 'clap'" in error_line(find_videos, hmdb, classes, "train", splits)
    file.write_text(whole + "stray line 5\n")
    assert "clap_test_split1.txt: 'stray line 5' is not a video and its mark" in error_line(
        find_videos, hmdb, classes, "train", splits
    )
    file.write_text(whole)
    (hmdb / "clap" / "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi").unlink()
    assert "1 of its 2 files missing below" in error_line(find_videos, hmdb, classes, "train", splits)


# --- Moments in Time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_folder", [True, False])
def test_moments_in_time(error_line, tmp_path, with_folder):
    root = tmp_path / "Moments_in_Time_256x256_30fps"
    names = ["adult+male+singing/yt-1_2.mp4", "bowing/flickr-3,4.mp4"]  # the second one has to be quoted
    for half in ("training", "validation"):
        touch(root, *(f"{half}/{name}" for name in names), f"{half}/bowing/unlisted.mp4")
    listing = root / "trainingSet.csv"
    with listing.open("w", newline="") as file:
        csv.writer(file).writerows([name if with_folder else name.split("/")[1], name.split("/")[0], 7, 3] for name in names)
    classes = ["bowing", "adult male singing"]
    expected = [("yt-1_2.mp4", 1), ("flickr-3,4.mp4", 0)]
    assert found(root, classes, "train", listing) == expected
    assert {video.path.parts[-3] for video in find_videos(root, classes, "train", listing)} == {"training"}
    assert found(root / "training", classes, "train", listing) == expected
    assert found(root, classes, "val") == [("yt-1_2.mp4", 1), ("flickr-3,4.mp4", 0), ("unlisted.mp4", 0)]
    assert {video.path.parts[-3] for video in find_videos(root, None, "val")} == {"validation"}
    (root / "training" / names[1]).unlink()
    assert "trainingSet.csv: 1 of its 2 files missing below" in error_line(find_videos, root, classes, "train", listing)
    listing.write_text("class,file\nbowing,a.mp4\n")
    assert "neither a Kinetics CSV" in error_line(find_videos, root, classes, "train", listing)
    (root / "validation" / "clapping").mkdir()
    assert "no video in class 'clapping'" in error_line(find_videos, root, [*classes, "clapping"], "val")


# --- Kinetics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kinetics(tmp_path) -> Path:
    """Real mp4 files; the CSV also names a video that is gone and, for its training half, another spelling."""
    root = tmp_path / "kinetics"
    rows = [["label", "youtube_id", "time_start", "time_end", "split"]]
    for name in ("air drumming", "petting animal (not cat)"):
        for half, said in (("train", "train"), ("val", "validate")):
            path = root / half / name.replace(" ", "_") / f"-{name[:3]}_{half}_000003_000013.mp4"
            path.parent.mkdir(parents=True)
            write_video(path, np.full((4, 32, 32, 3), 40 * len(rows), np.uint8))
            rows.append([name, f"-{name[:3]}_{half}", "3", "13", said])
    rows.append(["air drumming", "deleted", "0", "10", "train"])
    with (root / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def test_kinetics_csv(error_line, kinetics):
    classes = ["petting animal (not cat)", "air drumming"]
    for split, half in (("train", "train"), ("val", "val")):
        videos = find_videos(kinetics, classes, split, kinetics / "all.csv")
        assert [video.label for video in videos] == [1, 0]
        assert {video.path.parts[-3] for video in videos} == {half}
    clips = Clips(find_videos(kinetics, classes, None, kinetics / "all.csv"), 4, size=32)
    assert [round(float(clips[k][1].mean()) / 40) for k in range(4)] == [1, 3, 2, 4]
    for path in (kinetics / "val").rglob("-air*"):
        path.unlink()
    assert "no video in class 'air drumming'" in error_line(find_videos, kinetics, classes, "val", kinetics / "all.csv")
    (kinetics / "all.csv").write_text("label,youtube_id,time_start,time_end\nair drumming,x,three,13\n")
    assert "all.csv: row 2 is not a row of Kinetics' CSV (air drumming, x, three, 13)" in error_line(
        find_videos, kinetics, classes, None, kinetics / "all.csv"
    )
    (kinetics / "all.csv").write_bytes(b"\xff\xfe\x00\x80")
    assert "not a readable CSV" in error_line(find_videos, kinetics, classes, None, kinetics / "all.csv")


def test_eval_only_scores_on_kinetics_600(tmp_path, capsys):
    """Weights that do not say their classes: the order is k600's, in which folders' names are found again."""
    k600 = KNOWN_CLASSES["k600"]()
    student = create_student("r2plus1d_tiny", 600)
    for parameter in student.parameters():
        parameter.data.zero_()
    [head] = [m for m in student.net.modules() if getattr(m, "out_features", 0) == 600]
    head.bias.data[427] = 1.0  # says "running on treadmill" whatever it is shown
    save_weights(tmp_path / "student.safetensors", student.net.state_dict(), {})
    for name in (k600[427], k600[0]):
        path = tmp_path / "k600" / "val" / name.replace(" ", "_") / "a.mp4"
        path.parent.mkdir(parents=True)
        write_video(path, np.zeros((8, 32, 32, 3), np.uint8))
    config = eval_only.Config(
        student="r2plus1d_tiny",
        weights=str(tmp_path / "student.safetensors"),
        data=str(tmp_path / "k600"),
        classes="k600",
        num_frames=8,
        size=32,
        num_workers=0,
        device="cpu",
    )
    assert eval_only.main(config)["top1"] == 0.5
    (path,) = tmp_path.glob("student.*.classes.csv")
    table = path.read_text().splitlines()
    assert table[1:] == [f"{k600[0]},1,0.0000,1.0000", f"{k600[427]},1,1.0000,1.0000"]
    with pytest.raises(UserError, match="its head has 600 classes, the class list 400"):
        eval_only.main(eval_only.Config(**(vars(config) | {"classes": "k400"})))


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> Path:
    root = tmp_path / "set"
    for name, number in (("a", 200), ("b class", 31), ("c", 10), ("d", 1)):
        touch(root, *(f"train/{name}/{k:03d}.mp4" for k in range(number)))
    return root


def draw(root: Path, out: Path, **options) -> list[str]:
    write_subset(str(root), str(out), split="train", **options)
    return [line for line in out.read_text().splitlines() if not line.startswith("#")]


def test_subset_takes_the_same_share_of_each_class(labelled, tmp_path, capsys):
    out = tmp_path / "list.txt"
    names = draw(labelled, out, share=0.05)
    counts = {name: sum(line.split("/")[0] == name for line in names) for name in ("a", "b class", "c", "d")}
    assert counts == {"a": 10, "b class": 2, "c": 1, "d": 1}
    assert names == sorted(set(names))
    header = out.read_text().splitlines()[0]
    assert header == f"# 5 % of each class of {labelled}, split train, seed 0: 14 of 242 videos, 4 classes"
    videos = find_videos(labelled, ["d", "c", "b class", "a"], "train", out)
    assert [video.label for video in videos] == [3] * 10 + [2] * 2 + [1, 0]
    assert [video.path.relative_to(labelled / "train").as_posix() for video in videos] == names
    assert "14 of 242 videos" in capsys.readouterr().out


def test_subset_of_a_half_is_the_same_whether_it_is_named_by_split_or_by_folder(labelled, tmp_path):
    by_split = draw(labelled, tmp_path / "1.txt", share=0.1)
    write_subset(str(labelled / "train"), str(tmp_path / "2.txt"), share=0.1)
    by_folder = [line for line in (tmp_path / "2.txt").read_text().splitlines() if not line.startswith("#")]
    assert by_split == by_folder
    for root, split in ((labelled, "train"), (labelled / "train", None), (labelled / "train", "val")):
        assert len(find_videos(root, ["a", "b class", "c", "d"], split, tmp_path / "1.txt")) == len(by_split) > 20


def test_subset_is_deterministic_in_its_seed(labelled, tmp_path):
    first = draw(labelled, tmp_path / "1.txt", share=0.1)
    assert draw(labelled, tmp_path / "2.txt", share=0.1) == first
    assert (tmp_path / "1.txt").read_bytes() == (tmp_path / "2.txt").read_bytes()
    assert set(draw(labelled, tmp_path / "3.txt", share=0.1, seed=1)) != set(first)
    assert set(draw(labelled, tmp_path / "4.txt", share=0.05)) < set(first)  # the 5 % are part of the 10 %
    names = {own: [f"{own}/{k}.mp4" for k in range(50)] for own in "xyz"}
    shuffled = {own: random.Random(1).sample(names[own], 50) for own in "zxy"}
    assert list(choose_share(names, 0.2).items()) == list(choose_share(shuffled, 0.2).items())
    draws = [choose_share(names, 0.2, seed)["x"] for seed in range(200)]
    often = [sum(name in chosen for chosen in draws) for name in names["x"]]
    assert min(often) > 15  # each of the 50 is drawn 40 times of 200, give or take 5.7
    assert max(often) < 70


def test_subset_of_a_kinetics_csv(kinetics, tmp_path):
    write_subset(str(kinetics), str(tmp_path / "l.txt"), 0.5, split="val", listing=str(kinetics / "all.csv"))
    classes = ["air drumming", "petting animal (not cat)"]
    assert [video.label for video in find_videos(kinetics, classes, "val", tmp_path / "l.txt")] == [0, 1]
    assert "50 % of each class" in (tmp_path / "l.txt").read_text()
    assert len(group_videos(kinetics, "train")[1]) == 2


@pytest.mark.parametrize(
    ("spoil", "options", "line"),
    [
        (lambda root: (root / "train" / "nothing here").mkdir(), {}, "no video in class 'nothing here'"),
        (lambda root: touch(root, "val/a/x.mp4"), {"split": None}, r"halves in it \(train, val\); pass --split"),
        (
            lambda root: touch(root, "val/a/x.mp4", "images/no.jpg"),
            {"split": "test"},
            r"halves in it \(train, val\); .* has no test half",
        ),
        (lambda root: (root / "l.txt").write_text("loose.mp4\n"), {"listing": "l.txt"}, "1 of its 1 files missing"),
        (lambda root: None, {"share": 0.0}, "--share 0.0"),
        (lambda root: None, {"share": 5.0}, "--share 5.0"),
        (lambda root: None, {"listing": "gone.csv"}, "gone.csv not found"),
    ],
)
def test_subset_wrong_cases(labelled, tmp_path, monkeypatch, spoil, options, line):
    spoil(labelled)
    monkeypatch.chdir(labelled)
    with pytest.raises(UserError, match=line) as caught:
        write_subset(str(labelled), str(tmp_path / "out.txt"), **({"split": "train"} | options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.txt").exists()


def test_subset_of_videos_outside_folders_of_their_class_stops(kinetics, tmp_path):
    for path in list(kinetics.rglob("*.mp4")):
        path.rename(kinetics / path.name)
    with pytest.raises(UserError, match="is in no folder of that name"):
        write_subset(str(kinetics), str(tmp_path / "l.txt"), listing=str(kinetics / "all.csv"))


# --- names and files that are not what they seem ---------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["бег", "прыжок", "плавание"], ["C", "C++", "C#"], ["riding a bike", "riding_a_car"]])
def test_classes_of_every_script_stay_apart(classes, tmp_path):
    for name in classes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
    assert {video.label for video in find_videos(tmp_path, classes)} == {0, 1, 2} & set(range(len(classes)))


@pytest.mark.parametrize("classes", [["Jumping", "jump-ing"], ["ﬁsh", "fish"], ["a", "!?"]])
def test_two_classes_of_one_spelling_are_named(classes, tmp_path):
    for name in classes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
    with pytest.raises(UserError, match=r"class '.+' has the spelling of .+; rename one"):
        find_videos(tmp_path, classes)


def test_devices_and_pipes_are_no_videos(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "real.mp4").touch()
    (tmp_path / "a" / "endless.avi").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    assert [video.path.name for video in find_videos(tmp_path, ["a"])] == ["real.mp4"]


@pytest.mark.parametrize("name", ["../outside/a.mp4", "/etc/a.mp4"])
def test_lists_stay_below_their_folder(name, tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "list.txt").write_text(name)
    with pytest.raises(UserError, match="is not below"):
        find_videos(tmp_path / "videos", ["a"], None, tmp_path / "list.txt")
