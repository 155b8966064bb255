"""Victims by name: one line for a name, weights or an option that do not exist."""

import pytest

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
