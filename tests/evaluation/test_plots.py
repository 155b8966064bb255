"""Pictures: names of every script, and what no font draws."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib import font_manager, pyplot
from matplotlib.font_manager import FontEntry
from PIL import Image

from extraction.evaluation import plots


@pytest.fixture(autouse=True)
def _only_the_fonts_of_matplotlib(monkeypatch):
    """Whatever else this machine has; and nothing is known of an earlier test."""
    own = [font for font in font_manager.fontManager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    for cached in (plots._find_font, plots._say_undrawable):
        cached.cache_clear()
    with pyplot.rc_context():
        yield
    for cached in (plots._find_font, plots._say_undrawable):
        cached.cache_clear()


def draw(path, classes: list[str], source: str = "aux") -> np.ndarray:
    """A sheet of a clip for each class, named by the victim."""
    clips = torch.zeros(len(classes), 3, 2, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_queries(path, clips, torch.eye(len(classes)), [source] * len(classes), classes)
    return np.asarray(Image.open(path))


def test_what_a_font_draws_stays_and_the_rest_is_escaped_and_said_once(tmp_path, capsys):
    drawn = ["бег", "ركض", "swim ü", "€ 5 to $9 $x^$"]
    assert plots.make_drawable(drawn) == drawn
    draw(tmp_path / "a.png", drawn)
    assert capsys.readouterr().out == ""
    assert plots.make_drawable(["跑步 jogging", "two\nlines"]) == ["\\u8dd1\\u6b65 jogging", "two\\nlines"]
    draw(tmp_path / "b.png", ["跑步", "游泳", *drawn] * 3, "来源")
    assert capsys.readouterr().out.splitlines() == [
        "some names are written with escapes in the pictures: no font here draws them (Noto's fonts would)"
    ]


def test_a_class_that_no_font_draws_has_its_number(tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(plots, "draw_clips", lambda path, views, names: captions.extend(names))
    draw_queries = plots.draw_queries
    draw_queries(tmp_path / "a.png", torch.zeros(2, 3, 1, 4, 4), torch.eye(2), ["aux", "aux"], ["run", "跑步"])
    assert captions == ["aux: the victim says run (100 %)", "aux: the victim says class 1, 跑步 (100 %)"]


def test_plain_names_are_drawn_as_they_always_were(tmp_path):
    pyplot.rcParams["text.parse_math"] = True
    plots._find_font(ord("a"))
    assert pyplot.rcParams["font.family"] == ["sans-serif"]
    assert plots.make_drawable(["agreement@1, 88.5 ± 2.1 %"]) == ["agreement@1, 88.5 ± 2.1 %"]
    assert pyplot.rcParams["font.family"] == ["sans-serif"]


def test_a_font_of_the_system_is_used_where_the_default_has_no_letter(tmp_path, monkeypatch, capsys):
    """U+10330, Gothic, which a font that stands for the system's is said to draw."""
    path = next(font.fname for font in font_manager.fontManager.ttflist if font.name == "DejaVu Serif")
    system = FontEntry(
        fname=path, name="A Gothic Font", style="normal", variant="normal", weight=400, stretch="normal", size="scalable"
    )
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, system])
    read = plots._read_charmap
    monkeypatch.setattr(plots, "_read_charmap", lambda name: read(name) | ({0x10330} if name == path else set()))
    assert plots.make_drawable(["\U00010330"]) == ["\U00010330"]
    assert pyplot.rcParams["font.family"][0] == "sans-serif"
    assert len(pyplot.rcParams["font.family"]) == 2
    assert capsys.readouterr().out == ""
