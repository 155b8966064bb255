"""Victims by name: one line for a name, weights or an option that do not exist."""

import pytest
import torch

from extraction.network import VideoModel
from extraction.victims import zoo
from extraction.victims.zoo import load_victim


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(name="swin_x"), "no victim is called 'swin_x'"),
        (dict(answers="everything"), "no answers are called 'everything'"),
        (dict(query_budget=-1), "query budget -1"),
        (dict(name="swin_t_k400"), "swin_tiny_patch244_window877_kinetics400_1k.pth"),
        (dict(name="trained"), "--victim-weights"),
        (dict(classes="k400"), "victim 'demo_swin': has 12 outputs, but 400 class names are given for them"),
        (dict(classes="nowhere.txt"), "classes nowhere.txt: not k400 or k600, nor a text file with one name a line"),
        (dict(about="about.json"), "--victim-about is for tflite and onnx files; demo_swin knows itself what its clips are"),
    ],
)
def test_bad_arguments_get_one_line(error_line, change, line):
    assert line in error_line(load_victim, **(dict(name="demo_swin") | change))


def test_classes_of_a_named_victim_can_be_told_in_other_words(tmp_path):
    victim = load_victim("demo_swin")
    (tmp_path / "names.txt").write_text("\n".join(f"{name}s" for name in victim.classes))
    other = load_victim("demo_swin", classes=tmp_path / "names.txt")
    assert other.classes == tuple(f"{name}s" for name in victim.classes)
    assert other.fingerprint.startswith(f"{victim.fingerprint}-")  # a ledger tells the two apart


MODEL = VideoModel(torch.nn.Flatten())
WRONG_FORMS = {
    "NoneType": None,
    "VideoModel": MODEL,
    "(VideoModel, int)": (MODEL, 12),
    "(VideoModel, str)": (MODEL, "swim"),
    "(VideoModel, list)": (MODEL, [1, 2]),
    "(VideoModel, tuple)": (MODEL, ()),
    "(Flatten, list)": (torch.nn.Flatten(), ["a"]),
    "(list, VideoModel)": (["a"], MODEL),
    "tuple": (MODEL, ["a"], 3),
}


@pytest.mark.parametrize("found", WRONG_FORMS)
def test_a_loader_that_returns_another_form_is_named(found, tmp_path, monkeypatch, error_line):
    (tmp_path / "w.pth").touch()
    returned = WRONG_FORMS[found]
    monkeypatch.setitem(zoo.VICTIMS, "mine", (lambda path: returned, tmp_path / "w.pth", "me"))
    monkeypatch.setitem(zoo.FAMILIES, "ours", (lambda member, path: returned, "me"))
    for name in ("mine", "ours:a"):
        message = error_line(load_victim, name, tmp_path / "w.pth")
        assert message.startswith(f"victim '{name}': its loader returned {found}, not (VideoModel, [class name, ...] in")


@pytest.mark.parametrize("classes", [["a", "b"], ("a", "b", "c", "d")])
def test_classes_that_are_not_the_models_are_found_before_a_query_is_counted(classes, tmp_path, monkeypatch, error_line):
    (tmp_path / "w.pth").touch()
    monkeypatch.setitem(zoo.VICTIMS, "mine", (lambda path: (VideoModel(torch.nn.Flatten()), classes), tmp_path / "w.pth", "me"))
    victim = load_victim("mine")
    assert "answered 2 clips with (2, 3), not (2, " in error_line(victim.query, torch.zeros(2, 3, 1, 1, 1))
    assert victim.num_queries == 0
